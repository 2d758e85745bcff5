"""Directories: the kernel's and debugfs' read name by name, and no entry believed that cannot be."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.reading_kit import PLACE, Image, debugfs, make, write_bytes
from tests.fs.ext2.test_blockmap import FREE, made_up
from tests.fs.ext2.test_inode import geometry_of
from tests.loops import mounted, needs_root, run

from odirect.base.errors import CorruptionError
from odirect.fs.ext2.directory import Entry, entries, find, list_all
from odirect.fs.ext2.format import ENTRY_HEAD, FileType, Incompat, entry_bytes

TYPED = geometry_of(128, feature_incompat=int(Incompat.FILETYPE))
UNTYPED = geometry_of(128)
TYPES = {
    stat.S_IFREG: FileType.REGULAR,
    stat.S_IFDIR: FileType.DIRECTORY,
    stat.S_IFCHR: FileType.CHARACTER,
    stat.S_IFBLK: FileType.BLOCK,
    stat.S_IFIFO: FileType.FIFO,
    stat.S_IFSOCK: FileType.SOCKET,
    stat.S_IFLNK: FileType.SYMLINK,
}


def entry(inode: int, rec_len: int, name: bytes = b"", file_type: int = 0) -> bytes:
    head = ENTRY_HEAD.pack(ENTRY_HEAD.kind(inode, rec_len, len(name), file_type))
    return (head + name).ljust(rec_len, b"\0")


def block_of(*parts: bytes) -> bytes:
    """A block that begins with these entries; what does not fit is cut off."""
    return b"".join(parts).ljust(1024, b"\0")[:1024]


class Directory:
    """A made-up directory with these blocks, inode 12."""

    def __init__(self, *blocks: bytes, typed: bool = True) -> None:
        self.made = made_up()
        self.made.geometry.has_file_type = typed
        self.made.inode.mode = stat.S_IFDIR
        numbers = iter(range(6000, 7000))
        for index, raw in enumerate(blocks):
            self.made.content[FREE + index] = bytearray(raw)
            self.made.grow(index, FREE + index, numbers)
        self.made.inode.size = len(blocks) * 1024
        self.map = self.made.map()

    def find(self, name: bytes):
        return self.made.load(lambda: find(self.made, self.map, self.made.inode, name))

    def names(self) -> list[bytes]:
        return [one.name for one in self.list()]

    def list(self) -> list[Entry]:
        return self.made.load(lambda: list_all(self.made, self.map, self.made.inode))


DOTS = entry(12, 12, b".", 2) + entry(2, 12, b"..", 2)


def listing(image: Image, number: int) -> list[Entry]:
    inode, blockmap = image.inode(number), image.map(number)
    return image.cache.load(lambda: list_all(image.cache, blockmap, inode))


def found(image: Image, number: int, name: bytes):
    inode, blockmap = image.inode(number), image.map(number)
    return image.cache.load(lambda: find(image.cache, blockmap, inode, name))


# --- with the kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [["-b", "1024"], ["-b", "4096", "-O", "^filetype,^dir_index"], ["-b", "2048", "-r", "0"]]
)
def test_directories_of_the_kernel(scratch: Path, options: list[str]):
    """Long and odd names, hard links, every kind of file, many entries with many removed among them."""
    needs_root()
    path = make(scratch / "k.img", 64 << 20, *options, "-N", "6000")
    odd = [b"n" * 255, b"a\nb", b"\xff\xfe", b" ", "ä€😀".encode(), b"...", b"..a", b".a", b"*", b"a" * 128]
    with mounted(path, "ext2") as point:
        top = os.fsencode(point)
        os.mkdir(top + b"/odd")
        for name in odd:
            Path(os.fsdecode(top + b"/odd/" + name)).touch()
        os.link(top + b"/odd/*", top + b"/odd/link")
        os.mkfifo(top + b"/odd/fifo")
        os.mknod(top + b"/odd/char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(top + b"/odd/block", stat.S_IFBLK | 0o600, os.makedev(8, 1))
        os.symlink("x", top + b"/odd/symlink")
        os.mkdir(top + b"/odd/dir")
        os.mkdir(top + b"/many")
        os.mknod(top + b"/many/0", stat.S_IFREG | 0o600)
        for count in range(1, 1200):
            os.link(top + b"/many/0", top + b"/many/entry number %d" % count)
        for count in range(1, 1200, 3):
            os.unlink(top + b"/many/entry number %d" % count)
        said = {
            name: {
                one.name: (one.inode(), one.stat(follow_symlinks=False).st_mode)
                for one in os.scandir(top + b"/" + name)
            }
            for name in (b"odd", b"many")
        }
        inodes = {name: os.stat(top + b"/" + name).st_ino for name in said}
    image = Image(path)
    typed = image.geometry.has_file_type
    for name, theirs in said.items():
        ours = listing(image, inodes[name])
        assert [(one.name, one.inode) for one in ours[:2]] == [(b".", inodes[name]), (b"..", 2)]
        wanted = {
            other: (inode, TYPES[stat.S_IFMT(mode)] if typed else FileType.UNKNOWN)
            for other, (inode, mode) in theirs.items()
        }
        assert {one.name: (one.inode, one.file_type) for one in ours[2:]} == wanted
        assert len(ours) == len(wanted) + 2
        for other in list(wanted)[::7]:
            there = found(image, inodes[name], other)
            assert (there.inode, there.file_type) == wanted[other]
            raw = image.block(there.block)
            assert ENTRY_HEAD.read(raw, there.offset, PLACE).inode == there.inode
            if there.previous_offset is not None:
                assert (
                    there.previous_offset + ENTRY_HEAD.read(raw, there.previous_offset, PLACE).rec_len == there.offset
                )
        for other in (b"missing", b"entry number 1", b"n" * 254, b"X"):
            assert found(image, inodes[name], other) is None
    lost = found(image, 2, b"lost+found")
    assert (lost.inode, lost.file_type) == (11, FileType.DIRECTORY if typed else FileType.UNKNOWN)
    assert {one.name for one in listing(image, 2)} == {b".", b"..", b"lost+found", b"odd", b"many"}


@pytest.mark.slow
def test_twenty_thousand_entries_of_the_kernel(scratch: Path):
    """With an index, whose blocks look like free entries, in a directory that needs indirect blocks."""
    needs_root()
    path = make(scratch / "k.img", 64 << 20, "-b", "1024", "-N", "22000")
    with mounted(path, "ext2") as point:
        (point / "d").mkdir()
        here = os.open(point / "d", os.O_RDONLY)
        try:
            for count in range(20000):
                os.mknod(f"file {count:05d}", stat.S_IFREG | 0o600, dir_fd=here)
        finally:
            os.close(here)
        said = {os.fsencode(one.name): one.inode() for one in os.scandir(point / "d")}
        number = (point / "d").stat().st_ino
    image = Image(path)
    assert image.inode(number).flags & 0x1000
    assert image.inode(number).size > 12 * 1024
    assert {one.name: one.inode for one in listing(image, number)[2:]} == said
    inode, blockmap = image.inode(number), image.map(number)
    for name in list(said)[::101]:
        assert image.cache.load(lambda name=name: find(image.cache, blockmap, inode, name)).inode == said[name]
    assert len(said) == 20000


# --- with debugfs, as anybody --------------------------------------------------------------------


def test_a_directory_of_debugfs(scratch: Path):
    path = make(scratch / "d.img", 8 << 20, "-b", "1024")
    names = [f"name-{count}-{'x' * (count % 60)}" for count in range(60)]
    debugfs(path, "mkdir d", "expand_dir d", "expand_dir d", "expand_dir d", "cd d", f"write {__file__} file")
    debugfs(path, "cd d", *(f"mkdir {name}" for name in names[:20]), *(f"ln file {name}" for name in names[20:]))
    debugfs(path, "cd d", f"unlink {names[30]}", f"rmdir {names[3]}")
    image = Image(path)
    number = found(image, 2, b"d").inode
    said = re.findall(r"^\s*(\d+)\s+\d+ \((\d)\).* (\S+) ?$", run("debugfs", "-R", "ls -l d", path), re.M)
    assert {(one.inode, one.file_type, one.name.decode()) for one in listing(image, number)} == {
        (int(inode), int(file_type), name) for inode, file_type, name in said if inode != "0"
    }
    assert len(listing(image, number)) == 2 + 1 + 60 - 2
    assert found(image, number, names[30].encode()) is None
    # A block whose bytes were changed is found out, whichever name is asked for.
    raw = bytearray(image.block(image.map(number).lookup(0, 1).block))
    raw[4:6] = b"\x0d\0"
    write_bytes(path, image.map(number).lookup(0, 1).block * 1024, raw)
    with pytest.raises(CorruptionError, match=f"directory block .* of inode {number} at byte .*rec_len 13"):
        found(Image(path), number, b"no such name")


# --- single blocks -------------------------------------------------------------------------------

names = st.binary(min_size=1, max_size=255).map(lambda raw: raw.replace(b"\0", b"z").replace(b"/", b"z"))


@settings(max_examples=100)
@given(data=st.data(), typed=st.booleans())
def test_any_good_block_is_read(data: st.DataObject, typed: bool):
    parts, wanted, at = [], [], 0
    while at < 1024:
        name = data.draw(names)
        least = entry_bytes(len(name))
        rec_len = 1024 - at
        if rec_len < least:
            name, least = b"", 12
        elif rec_len - least >= 12 and data.draw(st.booleans()):
            rec_len = least + 4 * data.draw(st.integers(0, (rec_len - least - 12) // 4))
        inode = data.draw(st.integers(1, 2048)) if name and data.draw(st.booleans()) else 0
        file_type = data.draw(st.integers(0, 7)) if typed else 0
        parts.append(entry(inode, rec_len, name, file_type))
        wanted.append(Entry(at, inode, rec_len, name if inode else b"", file_type if inode else 0))
        at += rec_len
    assert list(entries(TYPED if typed else UNTYPED, b"".join(parts), PLACE)) == wanted


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (entry(5, 0, b"a"), "at byte 0: found rec_len 0, expected a multiple of 4 from 12 to 1024"),
        (entry(5, 8, b"a"), "rec_len 8"),
        (entry(5, 14, b"a"), "rec_len 14"),
        (entry(5, 1028, b"a"), "rec_len 1028"),
        (entry(5, 65532, b"a"), "rec_len 65532"),
        (entry(0, 0), "rec_len 0"),
        (entry(5, 12, b"abcde"), "a name of 5 bytes, expected 1 to 255 that fit rec_len 12"),
        (entry(5, 12), "a name of 0 bytes"),
        (entry(5, 1012, b"a") + entry(5, 12, b"abcde"), "at byte 1012: found a name of 5"),
        (entry(5, 1016, b"a"), "at byte 1016: found 8 bytes left"),
        (entry(5, 1020, b"a"), "at byte 1020: found 4 bytes left"),
        (entry(2049, 1024, b"a"), "inode 2049, expected a number from 1 to 2048"),
        (entry(5, 1024, b"a", 8), "file_type 8"),
        (entry(5, 1024, b"a/b"), "name b'a/b'"),
        (entry(5, 1024, b"a\0b"), "name b'a\\\\x00b'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_entries_that_cannot_be(raw: bytes, words: str):
    with pytest.raises(CorruptionError, match=words):
        list(entries(TYPED, block_of(raw), PLACE))


def test_without_types_the_length_has_two_bytes():
    with pytest.raises(CorruptionError, match="a name of 257 bytes"):
        list(entries(UNTYPED, block_of(entry(5, 1024, b"a", 1)), PLACE))
    with pytest.raises(CorruptionError, match="1000 bytes, expected a block of 1024"):
        list(entries(TYPED, bytes(1000), PLACE))


@settings(max_examples=200)
@given(data=st.data(), typed=st.booleans())
def test_any_bytes_give_entries_or_an_error(data: st.DataObject, typed: bool):
    raw = data.draw(st.binary(max_size=1024).map(lambda raw: raw.ljust(1024, b"\0")))
    if data.draw(st.booleans()):
        flipped = bytearray(DOTS + entry(13, 1000, b"a name", 1))
        for bit in data.draw(st.lists(st.integers(0, 50 * 8), min_size=1, max_size=4)):
            flipped[bit // 8] ^= 1 << bit % 8
        raw = bytes(flipped)
    geometry = TYPED if typed else UNTYPED
    try:
        read = list(entries(geometry, raw, PLACE))
    except CorruptionError:
        pass
    else:
        assert sum(one.rec_len for one in read) == 1024
        assert all(one.inode <= 2048 and bool(one.name) == bool(one.inode) for one in read)
    directory = Directory(raw, typed=typed)
    for ask in (directory.list, lambda: directory.find(b"a name")):
        try:
            ask()
        except CorruptionError as error:
            assert "expected" in str(error)


# --- whole directories ---------------------------------------------------------------------------


def test_names_are_found_whole():
    """F35: by all their bytes, and not where the same bytes are something else."""
    directory = Directory(
        DOTS
        + entry(0, 12, b"ab", 1)
        + entry(13, 16, b"xab", 1)
        + entry(14, 20, b"abc", 1)
        + entry(15, 1024 - 72, b"ab", 1),
        entry(0, 24, b"cd", 1) + entry(16, 1000, b"e" * 255, 1),
    )
    assert directory.find(b"ab") == (FREE, 72, 52, 15, 1)
    assert directory.find(b"xab").offset == 36
    assert directory.find(b"e" * 255) == (FREE + 1, 24, 0, 16, 1)
    assert directory.find(b".") == (FREE, 0, None, 12, 2)
    assert directory.find(b"..").inode == 2
    for name in (b"cd", b"a", b"abcd", b"e" * 254):
        assert directory.find(name) is None
    assert directory.names() == [b".", b"..", b"xab", b"abc", b"ab", b"e" * 255]
    for name in (b"", b"x" * 256, b"a/b", b"a\0"):
        with pytest.raises(ValueError, match="cannot be the name"):
            directory.find(name)


def test_an_entry_that_is_passed_over_once_more():
    """The name's bytes, with its length before them, inside another name: walked, and not taken."""
    tricky = b"wxyz" + b"\2\1ab"
    directory = Directory(DOTS + entry(13, 40, tricky, 1) + entry(14, 1024 - 64, b"ab", 1))
    assert directory.find(b"ab").inode == 14
    assert Directory(DOTS + entry(13, 1000, tricky, 1)).find(b"ab") is None


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (
            [entry(12, 1024, b".", 2)],
            r"\[b'.'\] of inodes \[12\], expected the entries '.' \(inode 12\) and '..' first",
        ),
        ([entry(13, 12, b".", 2) + entry(2, 1012, b"..", 2)], r"of inodes \[13, 2\]"),
        ([entry(12, 12, b".", 2) + entry(2, 1012, b"a", 2)], "b'a'"),
        ([entry(12, 12, b".", 2) + entry(0, 1012, b"..", 2)], r"of inodes \[12, 0\]"),
        ([entry(0, 1024)], "'.'"),
        ([DOTS + entry(12, 1000, b".", 2)], r"at byte \d+: found another entry b'.'"),
        ([DOTS + entry(0, 1000), entry(2, 1024, b"..", 2)], "another entry b'..'"),
        ([DOTS + entry(0, 1000), bytes(1024)], "rec_len 0"),
    ],
)
def test_directories_that_cannot_be(blocks: list[bytes], words: str):
    for ask in (Directory.names, lambda directory: directory.find(b"something else")):
        with pytest.raises(CorruptionError, match=words):
            ask(Directory(*blocks))


def test_sizes_holes_and_blocks_twice():
    good = [DOTS + entry(13, 1000, b"a", 1), entry(14, 1024, b"b", 1)]
    for size, words in (
        (0, "0 bytes"),
        (1000, "1000 bytes"),
        (3072, "a hole at block 2"),
        (1024 << 15, "of 33554432 bytes"),
    ):
        directory = Directory(*good)
        directory.made.inode.size = size
        with pytest.raises(CorruptionError, match=f"inode 12 at byte .*{words}"):
            directory.names()
    directory = Directory(*good)
    directory.made.inode.set_pointer(1, FREE)
    with pytest.raises(CorruptionError, match="the same block twice"):
        directory.find(b"a")


def test_a_block_is_checked_once_until_it_changes():
    """A wrong entry is found out by the first look-up, whatever it asks for; a changed block is read anew."""
    directory = Directory(DOTS + entry(13, 1000, b"a", 1), entry(14, 1024, b"b", 1))
    assert directory.find(b"a").inode == 13
    assert directory.map.verified == {0}
    assert directory.find(b"b").inode == 14
    assert directory.map.verified == {0, 1}
    directory.made.content[FREE + 1][4:6] = b"\7\0"
    directory.made.held.clear()
    directory.map.changed(1, 1)
    assert directory.find(b"a").inode == 13
    for name in (b"b", b"none"):
        with pytest.raises(CorruptionError, match="rec_len 7"):
            directory.find(name)


def test_all_missing_blocks_are_named_at_once():
    directory = Directory(DOTS + entry(0, 1000), *(entry(13, 1024, b"%d" % count, 1) for count in range(40)))
    before = len(directory.made.loads)
    assert len(directory.names()) == 42
    assert len(directory.made.loads) - before == 2
    assert len(directory.made.loads[-1]) == 41
