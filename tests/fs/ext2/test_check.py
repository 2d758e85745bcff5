"""Checking a whole volume: silent on clean ones, and finding what e2fsck finds on damaged ones."""

from __future__ import annotations

import os
import random
import re
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.make_kit import SEED, accepted, e2fsck, make_file, make_on, mke2fs, over
from tests.loops import mounted, needs_tool

from odirect.block.memory import MemoryDevice
from odirect.fs.base import Finding
from odirect.fs.ext2 import mkfs
from odirect.fs.ext2.check import check_device
from odirect.fs.ext2.checking import Bits, ranges
from odirect.fs.ext2.format import GROUP_DESCRIPTOR, SUPERBLOCK, GroupDescriptor, Superblock
from odirect.fs.ext2.indexhash import HALF_MD4, LEGACY, TEA, index_hash
from odirect.testing.devices import OddDevice

KIB, MIB = 1 << 10, 1 << 20


def found_in(data: bytes | bytearray) -> list[Finding]:
    """What `check` finds in an image."""
    device = MemoryDevice(len(data), data=data)
    return over(device, check_device(device, name="image"))


def source_tree(at: Path) -> Path:
    """A directory with some of everything that needs no privilege."""
    at.mkdir()
    for number in range(6):
        directory = at / f"directory-{number}"
        directory.mkdir()
        for length in (0, 1, 1024, 5000, 20_000):
            (directory / f"file-{length}").write_bytes(random.Random(length).randbytes(length))
    os.link(at / "directory-0" / "file-5000", at / "directory-1" / "second-name")
    (at / "short").symlink_to("target")
    (at / "long").symlink_to("t" * 200)
    os.mkfifo(at / "pipe")
    (at / "large").write_bytes(random.Random(3).randbytes(400_000))
    with (at / "sparse").open("wb") as file:
        file.seek(30 << 20)
        file.write(b"end")
    (at / "directory-2" / "deep" / "deeper").mkdir(parents=True)
    return at


@pytest.fixture(scope="module")
def populated(scratch_root: Path) -> bytes:
    """A volume of 1 KiB blocks, made and filled by mke2fs."""
    path = scratch_root / "populated.img"
    source = source_tree(scratch_root / "populated-source")
    assert mke2fs(path, 10 * MIB, "-b", "1024", "-d", str(source)) == ""
    accepted(path)
    return path.read_bytes()


class Image:
    """A populated image that is being damaged, with the places of what is in it (as debugfs tells them)."""

    def __init__(self, data: bytes, scratch: Path) -> None:
        self.data = bytearray(data)
        self.path = scratch / "damaged.img"
        self.path.write_bytes(data)
        self.superblock = Superblock(*SUPERBLOCK.struct.unpack_from(data, 1024))
        self.block_bytes = 1024 << self.superblock.log_block_size
        self.groups = [
            GroupDescriptor(*GROUP_DESCRIPTOR.struct.unpack_from(data, 2048 + 32 * group))
            for group in range(-(-self.superblock.blocks_count // self.superblock.blocks_per_group))
        ]

    def debugfs(self, request: str) -> str:
        words = [needs_tool("debugfs"), "-R", request, str(self.path)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def number(self, name: str) -> int:
        found = re.search(r"Inode: (\d+)", self.debugfs(f"stat {name}"))
        assert found
        return int(found[1])

    def inode(self, name: str) -> int:
        """The byte of the record of the inode that has this name."""
        group, index = divmod(self.number(name) - 1, self.superblock.inodes_per_group)
        return self.groups[group].inode_table * self.block_bytes + index * self.superblock.inode_size

    def blocks(self, name: str) -> list[int]:
        return [int(word) for word in self.debugfs(f"blocks {name}").split()]

    def put(self, at: int, value: int, length: int = 4) -> None:
        self.data[at : at + length] = value.to_bytes(length, "little")

    def get(self, at: int, length: int = 4) -> int:
        return int.from_bytes(self.data[at : at + length], "little")

    def entry(self, directory: str, name: bytes) -> int:
        """The byte of the entry `name` in a directory of one block."""
        at = self.blocks(directory)[0] * self.block_bytes
        return self.data.index(name, at) - 8

    def both(self) -> tuple[list[Finding], int]:
        """What `check` finds now, and what e2fsck exits with."""
        self.path.write_bytes(self.data)
        return found_in(self.data), e2fsck(self.path)[0]


# --- clean volumes ------------------------------------------------------------------------------


def test_nothing_is_found_in_a_filled_volume(populated: bytes) -> None:
    assert found_in(populated) == []


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64 * KIB, []),
        (20 * MIB, ["-b", "1024", "-I", "128"]),
        (20 * MIB, ["-b", "2048", "-O", "^resize_inode"]),
        (40 * MIB, ["-b", "4096", "-N", "4000"]),
        (30 * MIB, ["-r", "0"]),
        (30 * MIB, ["-b", "1024", "-O", "^sparse_super,^resize_inode"]),
        (30 * MIB, ["-b", "1024", "-g", "1024"]),
    ],
)
def test_nothing_is_found_in_what_mke2fs_makes(scratch: Path, size: int, options: list[str]) -> None:
    path = scratch / "volume.img"
    source = scratch / "source"
    (source / "directory").mkdir(parents=True)
    said = mke2fs(path, size, *options, *(["-d", str(source)] if size > MIB else []))
    assert said == "" or size < MIB
    if not said:
        assert found_in(path.read_bytes()) == []


@pytest.mark.parametrize("options", [{}, {"block_bytes": 4096}, {"revision": 0}, {"resize_inode": False}])
def test_nothing_is_found_in_what_is_made_here(options: dict[str, int]) -> None:
    device = MemoryDevice(20 * MIB)
    make_on(device, 20 * MIB, **options)
    seen: list[tuple[str, int, int]] = []
    assert over(device, check_device(device, name="image", progress=lambda *step: seen.append(step))) == []
    assert {what for what, _, _ in seen} == {"inodes", "directories", "bitmaps"}
    assert all(done <= total for _, done, total in seen) and seen[-1][1] == seen[-1][2]


def test_any_alignment_of_the_device() -> None:
    """F51: blocks smaller than what the device reads, and memory aligned to more than a page."""
    for memory_align, read_align in ((512, 4096), (4096, 512), (8192, 65536)):
        device = OddDevice(8 * MIB, memory_align=memory_align, read_align=read_align, write_align=512)
        make_on(device, 8 * MIB)
        assert over(device, check_device(device, name="image")) == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-b", "1024"], ["-b", "4096"], ["-b", "2048", "-I", "128"], ["-r", "0"]])
def test_nothing_is_found_in_what_the_kernel_leaves(scratch: Path, options: list[str]) -> None:
    """With indexes of one and two levels, attributes (shared too), devices, holes, and names taken away again."""
    path = scratch / "volume.img"
    assert mke2fs(path, 40 * MIB, *options) == ""
    with mounted(path, "ext2") as at:
        for count, name in ((300, "index"), (3000, "n" * 60)):
            (at / name[:9]).mkdir()
            for number in range(count):
                (at / name[:9] / f"{name}-{number}").touch()
        for number in range(0, 3000, 3):
            (at / "nnnnnnnnn" / f"{'n' * 60}-{number}").unlink()
        (at / "ümläut").write_bytes(b"x" * 100_000)
        for number in range(200):
            (at / "index" / f"größe-{number}").touch()
        if options[0] != "-r":
            for number in range(5):
                os.setxattr(at / "index" / f"index-{number}", "user.name", b"v" * 300)
                os.setxattr(at / "index" / f"index-{number + 5}", "user.small", b"v")
        os.mknod(at / "null", 0o20600, os.makedev(1, 3))
        os.mknod(at / "disk", 0o60600, os.makedev(259, 70000))
        os.link(at / "ümläut", at / "index" / "other")
        (at / "link").symlink_to("l" * 100)
        with (at / "sparse").open("wb") as file:
            for place in (0, 5 << 20, 300 << 20):
                file.seek(place)
                file.write(b"data")
    accepted(path)
    assert found_in(path.read_bytes()) == []


# --- damage, one kind at a time -----------------------------------------------------------------

Damage = Callable[[Image], None]


def _ring(image: Image) -> None:
    """A directory whose only name is below itself."""
    first = image.entry("/", b"directory-2")
    image.put(image.entry("directory-2/deep", b"deeper"), image.get(first))
    image.put(first, 0)


def _same_block(image: Image) -> None:
    image.put(image.inode("directory-0/file-1024") + 40, image.blocks("directory-1/file-1024")[0])


def _own_block_of_numbers(image: Image) -> None:
    """The doubly indirect block is its own first number."""
    at = image.inode("large") + 40 + 13 * 4
    image.put(image.get(at) * image.block_bytes, image.get(at))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "free blocks of the volume": (lambda i: i.put(1024 + 12, 7), "superblock.*free_blocks_count 7"),
    "free inodes of the volume": (lambda i: i.put(1024 + 16, 7), "superblock.*free_inodes_count 7"),
    "magic": (lambda i: i.put(1024 + 56, 0, 2), "magic"),
    "feature": (lambda i: i.put(1024 + 103, 4, 1), "read-only compatible features 0x4000000"),
    "reserved": (lambda i: i.put(1024 + 8, i.superblock.blocks_count), "r_blocks_count"),
    "journal": (lambda i: i.put(1024 + 210, 4, 1), "a journal"),
    "free blocks of a group": (lambda i: i.put(2048 + 12, 7, 2), "group 0.*free_blocks_count 7"),
    "directories of a group": (lambda i: i.put(2048 + 16, 77, 2), "used_dirs_count 77"),
    "flags of a group": (lambda i: i.put(2048 + 18, 3, 2), "group 0.*flags 0x3"),
    "place of a bitmap": (lambda i: i.put(2048 + 32, 3), "group 1.*block_bitmap 3"),
    "table over a bitmap": (lambda i: i.put(2048 + 8, i.groups[0].block_bitmap), "inode_table.*a place of its own"),
    "block marked free": (
        lambda i: i.put(i.groups[0].block_bitmap * 1024, 0x7F, 1),
        "block bitmap of group 0.*block 8 marked as free",
    ),
    "block marked used": (
        lambda i: i.put(i.groups[1].block_bitmap * 1024 + 200, 0xFF, 1),
        "block bitmap of group 1.*marked as used",
    ),
    "end of a bitmap": (lambda i: i.put(i.groups[0].inode_bitmap * 1024 + 1023, 0, 1), "zeroes behind its end"),
    "inode marked free": (lambda i: i.put(i.groups[0].inode_bitmap * 1024 + 1, 0xFB, 1), "inode 11 marked as free"),
    "mode": (lambda i: i.put(i.inode("large"), 0, 2), "mode 0o0"),
    "links": (lambda i: i.put(i.inode("large") + 26, 3, 2), "3 links, expected 1"),
    "no links": (lambda i: i.put(i.inode("large") + 26, 0, 2), "leads to inode .* which is free"),
    "deleted": (lambda i: i.put(i.inode("large") + 20, 1_600_000_000), "time of deletion"),
    "sectors": (lambda i: i.put(i.inode("large") + 28, 2), "found 2 sectors"),
    "size of a file": (lambda i: i.put(i.inode("large") + 4, 2000), "found 2000 bytes"),
    "size of a directory": (lambda i: i.put(i.inode("directory-3") + 4, 5), "a directory of 5 bytes"),
    "block outside": (lambda i: i.put(i.inode("large") + 44, 999_999), "block 999999, expected a block below"),
    "block of metadata": (lambda i: i.put(i.inode("large") + 44, 3), "block 3, expected a block for files"),
    "flags": (lambda i: i.put(i.inode("large") + 32, 0x80000), "flags of other features"),
    "fragment": (lambda i: i.put(i.inode("large") + 112, 5), "faddr"),
    "extra size": (lambda i: i.put(i.inode("large") + 128, 131, 2), "extra_isize 131"),
    "attributes' block": (lambda i: i.put(i.inode("large") + 104, 5), "attributes in block 5"),
    "short link": (lambda i: i.put(i.inode("short") + 4, 9), "a link of 9 bytes"),
    "long link": (lambda i: i.put(i.blocks("long")[0] * 1024 + 50, 0, 1), "a link of 200 bytes.*50"),
    "pipe with a size": (lambda i: i.put(i.inode("pipe") + 4, 1), "a device, pipe or socket"),
    "reserved inode": (lambda i: i.put(i.groups[0].inode_table * 1024 + 8 * 256, 0o100644, 2), "inode 9.*reserved"),
    "resize inode": (lambda i: i.put(i.inode("<7>") + 40 + 13 * 4, 9999), "inode 7"),
    "root": (lambda i: i.put(i.inode("<2>"), 0o100755, 2), "root directory.*a directory"),
    "one block, two files": (_same_block, "used by inode (\\d+) and inode (?!\\1)"),
    "a tree in itself": (_own_block_of_numbers, "used by inode \\d+, more than once"),
    "entry's length": (lambda i: i.put(i.entry("directory-0", b"file-1024") + 4, 6, 2), "an entry of 6 bytes"),
    "entry's type": (lambda i: i.put(i.entry("directory-0", b"file-1024") + 7, 2, 1), "type 2 of b'file-1024'"),
    "entry's name": (lambda i: i.put(i.entry("directory-0", b"file-1024") + 9, 47, 1), "no slash"),
    "entry to nowhere": (lambda i: i.put(i.entry("directory-0", b"file-1024"), 1 << 30), "leads to inode 1073741824"),
    "entry to a free inode": (lambda i: i.put(i.entry("directory-0", b"file-1024"), 2000), "inode 2000, which is free"),
    "entry to the root": (lambda i: i.put(i.entry("directory-0", b"file-1024"), 2), "the root directory"),
    "the same name twice": (lambda i: i.put(i.entry("directory-0", b"file-1") + 13, 0x30, 1), "twice|again|already"),
    "a second name of a directory": (
        lambda i: i.put(i.entry("directory-0", b"file-1024"), i.number("directory-3")),
        "a second name of directory",
    ),
    "no name": (lambda i: i.put(i.entry("directory-0", b"file-1024"), 0), "no name that leads to it"),
    "a directory without a name": (lambda i: i.put(i.entry("/", b"directory-3"), 0), "directory \\d+: .*no name"),
    "directories in a ring": (_ring, "in a ring"),
    "'..' elsewhere": (
        lambda i: i.put(i.blocks("directory-2/deep")[0] * 1024 + 12, 2),
        "'..' to inode 2, expected inode",
    ),
    "'.' elsewhere": (lambda i: i.put(i.blocks("directory-3")[0] * 1024, 2), "'.' to inode 2"),
    "no '..'": (lambda i: i.put(i.blocks("directory-3")[0] * 1024 + 20, 0x41, 1), "b'..' as entry 2"),
}

#: Where e2fsck takes what it needs from a copy, or counts for itself, and says nothing.
MENDED_BY_COPIES = {
    "free blocks of the volume",
    "free inodes of the volume",
    "magic",
    "place of a bitmap",
    "table over a bitmap",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_as_by_e2fsck(populated: bytes, scratch: Path, kind: str) -> None:
    """Each kind is named by a finding, and e2fsck does not like it either."""
    image = Image(populated, scratch)
    damage, expected = DAMAGES[kind]
    damage(image)
    findings, code = image.both()
    assert code != 0 or kind in MENDED_BY_COPIES
    assert any(re.search(expected, str(finding), re.S) for finding in findings), [str(one) for one in findings]


@pytest.mark.parametrize("options", [["-O", "has_journal"], ["-O", "sparse_super2,^resize_inode"], ["-l", "{bad}"]])
def test_nothing_is_found_in_relatives(scratch: Path, options: list[str]) -> None:
    """A journal, copies elsewhere, and a long list of bad blocks."""
    bad = scratch / "bad"
    bad.write_text("\n".join(map(str, (5000, *range(20_000, 20_600)))))
    path = scratch / "volume.img"
    assert mke2fs(path, 40 * MIB, "-b", "1024", *[word.format(bad=bad) for word in options]) == ""
    assert found_in(path.read_bytes()) == []


def test_what_has_other_structures_is_not_judged(scratch: Path) -> None:
    """Bitmaps that only checksums of groups explain are not called wrong."""
    path = scratch / "volume.img"
    assert mke2fs(path, 40 * MIB, "-b", "1024", "-O", "uninit_bg") == ""
    assert [finding.found for finding in found_in(path.read_bytes())] == ["read-only compatible features 0x10"]


def test_shared_attributes_are_counted(scratch: Path) -> None:
    """The count of inodes in a block of attributes is held against the inodes."""
    source = scratch / "source"
    source.mkdir()
    (source / "file").touch()
    path = scratch / "volume.img"
    assert mke2fs(path, 4 * MIB, "-b", "1024", "-I", "128", "-d", str(source)) == ""
    value = scratch / "value"
    value.write_bytes(b"v" * 100)
    words = [needs_tool("debugfs"), "-w", "-R", f"ea_set -f {value} file user.name", str(path)]
    subprocess.run(words, capture_output=True, check=True)
    image = Image(path.read_bytes(), scratch)
    assert found_in(image.data) == []
    block = image.get(image.inode("file") + 104)
    image.put(block * 1024 + 4, 3)
    findings, code = image.both()
    assert code and any("3 inodes that share them, expected 1" in str(one) for one in findings)
    image.put(block * 1024 + 4, 1)
    image.put(block * 1024 + 1023, 0x41, 1)
    findings, code = image.both()
    assert code and any("hash" in str(one) for one in findings)


def test_copies_are_compared() -> None:
    """What e2fsck would need in an emergency."""
    device = MemoryDevice(20 * MIB)
    make_on(device, 20 * MIB)
    data = bytearray(device.data)
    data[8193 * 1024 + 4] ^= 1
    data[8194 * 1024 + 8] ^= 1
    said = [str(finding) for finding in found_in(data)]
    assert len(said) == 2 and "copy of the superblock in group 1" in said[0]
    assert "copy of the descriptor of group 0, in group 1" in said[1]


# --- damage at random ---------------------------------------------------------------------------


def metadata_bytes(image: Image) -> list[tuple[int, int]]:
    """The ranges where a change may matter: superblock, descriptors, bitmaps, inodes in use, directories, trees."""
    size = image.block_bytes
    ranges_found = [(1024, 0x100), (2048, 32 * len(image.groups))]
    for group in image.groups:
        ranges_found += [(group.block_bitmap * size, size), (group.inode_bitmap * size, size)]
    table = image.groups[0].inode_table * size
    ranges_found += [(table + number * 256, 160) for number in range(1, 55)]
    for name in ("/", "directory-0", "directory-1", "directory-2/deep", "lost+found"):
        ranges_found += [(block * size, size) for block in image.blocks(name)]
    ranges_found += [(image.get(image.inode("large") + 40 + 4 * place) * size, size) for place in (12, 13)]
    return ranges_found


@pytest.mark.slow
def test_what_e2fsck_finds_is_found(populated: bytes, scratch: Path) -> None:
    """A few bits anywhere in the metadata: where e2fsck is not content, there is a finding."""
    image = Image(populated, scratch)
    places = metadata_bytes(image)
    rng = random.Random(20)
    wrong = 0
    for _ in range(100):
        image.data[:] = populated
        changes = []
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            start, length = rng.choice(places)
            at = start + rng.randrange(length)
            image.data[at] ^= 1 << rng.randrange(8)
            changes.append((at, image.data[at]))
        findings, code = image.both()
        wrong += code != 0
        assert findings or not code, (changes, e2fsck(image.path)[1])
    assert wrong > 40


@settings(max_examples=60)
@given(data=st.data())
def test_nothing_makes_it_raise_or_go_on_without_end(data: st.DataObject) -> None:
    """Whole blocks of metadata replaced by noise, ones or other blocks: there is an answer, and not silence."""
    device = MemoryDevice(2 * MIB)
    make_on(device, 2 * MIB)
    image = bytearray(device.data)
    plan = mkfs.plan(2 * MIB)
    used = plan.first_block(0) + plan.overhead(0) + 14
    for _ in range(data.draw(st.integers(1, 3))):
        block = data.draw(st.integers(2, used - 1))
        start = data.draw(st.integers(0, 1000))
        length = data.draw(st.integers(1, 1024 - start))
        noise = random.Random(data.draw(st.integers(0, 1 << 16))).randbytes(length)
        filling = data.draw(st.sampled_from([noise, b"\xff" * length, bytes(image[9 * 1024 : 9 * 1024 + length])]))
        image[block * 1024 + start : block * 1024 + start + length] = filling
    assert isinstance(found_in(image), list)


def test_the_report_is_bounded() -> None:
    """Every inode of a table is wrong: the report ends, and says how many more there were."""
    device = MemoryDevice(64 * MIB)
    make_on(device, 64 * MIB, bytes_per_inode=4096)
    image = bytearray(device.data)
    table = GroupDescriptor(*GROUP_DESCRIPTOR.struct.unpack_from(image, 2048)).inode_table * 1024
    for number in range(20, 2000):
        image[table + number * 256 : table + number * 256 + 128] = b"\xff" * 128
    findings = found_in(image)
    assert len(findings) == 5001 and "more errors" in str(findings[-1])


def test_a_device_without_room_for_a_superblock() -> None:
    assert "room for a superblock" in str(found_in(bytes(512))[0])
    assert found_in(bytes(64 * KIB))


# --- pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LEGACY, HALF_MD4, TEA])
def test_hashes_are_those_of_debugfs(scratch: Path, kind: int) -> None:
    """Names of all lengths, as the tool hashes them."""
    path = scratch / "volume.img"
    make_file(path, MIB)
    tool = needs_tool("debugfs")
    names = ["a", "abc", "abcd", "x" * 31, "x" * 32, "x" * 33, "some-file-name.txt", "z" * 255, "größe"]
    for name in names:
        words = f"dx_hash -h {('legacy', 'half_md4', 'tea')[kind]} -s {uuid.UUID(bytes=SEED)} {name}"
        said = subprocess.run([tool, "-R", words, str(path)], capture_output=True, text=True, check=True).stdout
        found = re.search(r"is (0x[0-9a-f]+)", said)
        assert found
        if name.isascii():
            assert index_hash(name.encode(), kind, SEED, signed=True) == int(found[1], 16)
        either = {index_hash(name.encode(), kind, SEED, signed=signed) for signed in (True, False)}
        assert int(found[1], 16) in either


def test_an_unknown_hash_is_refused() -> None:
    with pytest.raises(ValueError, match="hash 3"):
        index_hash(b"name", 3, SEED, signed=True)


@given(st.lists(st.lists(st.integers(0, 199), max_size=30), max_size=6))
def test_bits_are_a_set(batches: list[list[int]]) -> None:
    import numpy

    bits = Bits(200)
    model: set[int] = set()
    for batch in batches:
        again = bits.add(numpy.array(batch, numpy.int64))
        seen: set[int] = set()
        repeated = []
        for number in sorted(batch):
            if number in model or number in seen:
                repeated.append(number)
            seen.add(number)
        assert again.tolist() == repeated
        model |= seen
        assert bits.part(0, 200).nonzero()[0].tolist() == sorted(model)
        assert bits.part(13, 50).nonzero()[0].tolist() == sorted(n - 13 for n in model if 13 <= n < 63)


@given(st.integers(0, 100), st.integers(0, 100))
def test_a_range_of_bits(start: int, length: int) -> None:
    bits = Bits(200)
    bits.add_range(start, start + length)
    assert bits.part(0, 200).nonzero()[0].tolist() == list(range(start, start + length))


def test_ranges_are_short() -> None:
    assert ranges([3, 4, 5, 9]) == "3-5, 9"
    assert ranges(list(range(0, 40, 2))).endswith("and 12 more")
