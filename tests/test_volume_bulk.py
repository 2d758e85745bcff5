"""Trees of small files, many at a time: `read_files`, and `copy_in` and `copy_out` of whole trees."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.fs.ext2.make_kit import accepted
from tests.loops import made_image, mounted, needs_tool
from tests.volume_kit import KINDS, volume_of

import odirect
from odirect.base.errors import ClosedError, CorruptionError, ExistsError, MissingError, NoSpaceError
from odirect.fs.base import NewFile, NewFiles
from odirect.volumes import Volume

_BLOCKS = [pytest.param(("-b", str(size)), id=f"blocks of {size}") for size in (1024, 4096)]


def _content(dice: random.Random, size: int) -> bytes:
    return dice.randbytes(size)


def _write(path: Path, data: bytes, holes: tuple[tuple[int, int], ...] = ()) -> None:
    """A file with these bytes, but for the holes."""
    with path.open("wb") as file:
        at = 0
        for start, end in holes:
            file.seek(at)
            file.write(data[at:start])
            at = end
        file.seek(at)
        file.write(data[at:])
        file.truncate(len(data))


def _make_tree(top: Path, seed: int, files: int = 120) -> None:
    """Directories, files of all sorts of sizes, holes, hard and symbolic links, a pipe."""
    dice = random.Random(seed)
    places = [top]
    top.mkdir()
    # Ends of blocks, of what the inode names itself, and of what one indirect block does.
    sizes = [0, 1, 1023, 1024, 1025, 4095, 4096, 4097, 12 << 10, 13 << 10, (12 << 10) + 1, 48 << 10, (48 << 10) + 1]
    sizes += [268 << 10, (268 << 10) + 1, 1 << 20, (1 << 20) + 1, 3 << 20]
    for number in range(files):
        if dice.random() < 0.08:
            places.append(dice.choice(places) / f"dir{number}")
            places[-1].mkdir()
        path = dice.choice(places) / f"file{number}"
        size = sizes[number] if number < len(sizes) else dice.randrange(1, 20_000)
        holes: tuple[tuple[int, int], ...] = ()
        data = _content(dice, size)
        if size >= 12288 and dice.random() < 0.2:
            data = data[:4096] + bytes(4096) + data[8192:]
            holes = ((4096, 8192),)
        _write(path, data, holes)
        path.chmod(dice.choice((0o600, 0o644, 0o755, 0o4711)))
        seconds = dice.randrange(-(10**9), 2**33)
        os.utime(path, ns=(seconds * 10**9 + dice.randrange(10**9), seconds * 10**9 + dice.randrange(10**9)))
        if dice.random() < 0.05:
            os.link(path, dice.choice(places) / f"hard{number}")
        if dice.random() < 0.05:
            (dice.choice(places) / f"soft{number}").symlink_to(dice.choice(("file1", "../nothing", "x" * 200)))
    _write(top / "empty and long", bytes(9 << 20), ((0, 9 << 20),))
    os.mkfifo(top / "pipe")


def _seen(top: Path, *, times: bool = True) -> dict[str, tuple[Any, ...]]:
    """What there is below a directory of the host, by path."""
    found: dict[str, tuple[Any, ...]] = {}
    first: dict[int, str] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(top))
        what: Any = None
        if stat.S_ISREG(status.st_mode):
            what = path.read_bytes(), first.setdefault(status.st_ino, name)
        elif stat.S_ISLNK(status.st_mode):
            what = os.readlink(path)
        about = stat.filemode(status.st_mode), status.st_uid, status.st_gid
        found[name] = (what, *about, status.st_mtime_ns if times else 0)
    return found


def _contents(top: Path) -> dict[str, bytes]:
    return {f"/{path.relative_to(top)}": path.read_bytes() for path in top.rglob("file*") if path.is_file()} | {
        f"/{path.relative_to(top)}": path.read_bytes() for path in top.rglob("hard*")
    }


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mkfs", _BLOCKS)
def test_reads_every_file_of_a_tree(mkfs: tuple[str, ...], tmp_path: Path) -> None:
    """Byte for byte: holes, empty files, files of exactly one block, hard links, large files."""
    _make_tree(tmp_path / "tree", 1)
    with volume_of("ext2", tmp_path, mkfs, 64 << 20) as volume:
        volume.copy_in(f"{tmp_path}/tree/", "/")
        expected = _contents(tmp_path / "tree") | {"/empty and long": bytes(9 << 20)}
        found = list(volume.read_files())
        assert len(found) == len(expected)
        assert dict(found) == expected
        # As the kernel's tool laid the same tree out.
    image = tmp_path / "mke2fs.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    words = [needs_tool("mke2fs"), "-q", "-F", "-t", "ext2", *mkfs, "-d", str(tmp_path / "tree"), str(image)]
    subprocess.run(words, check=True, capture_output=True)
    with odirect.open_volume(image) as volume:
        assert dict(volume.read_files()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_reads_below_a_directory_or_one_file(kind: str, tmp_path: Path) -> None:
    """Paths are of the type of the one given, and good for `open`."""
    with volume_of(kind, tmp_path) as volume:
        volume.makedirs("/a/b")
        volume.write_bytes("/a/one", b"1" * 5000)
        volume.write_bytes("/a/b/two", b"2")
        volume.write_bytes("/outside", b"3")
        volume.symlink("/outside", "/a/link")
        volume.symlink("a", "/to a")
        assert sorted(volume.read_files("a")) == [("a/b/two", b"2"), ("a/one", b"1" * 5000)]
        assert sorted(volume.read_files(b"/a/")) == [(b"/a/b/two", b"2"), (b"/a/one", b"1" * 5000)]
        assert sorted(path for path, _ in volume.read_files("/to a")) == ["/to a/b/two", "/to a/one"]
        assert sorted(path for path, _ in volume.read_files(volume / "a")) == ["/a/b/two", "/a/one"]
        assert list(volume.read_files("/a/one")) == [("/a/one", b"1" * 5000)]
        assert list(volume.read_files("/a/link")) == [("/a/link", b"3")]
        assert all(volume.read_bytes(path) == content for path, content in volume.read_files())
        volume.mkdir("/empty")
        assert list(volume.read_files("/empty")) == []
        with pytest.raises(MissingError, match="nothing"):
            list(volume.read_files("/nothing"))


def test_reads_what_is_in_the_cache_of_an_open_file(tmp_path: Path) -> None:
    """Bytes that were not written back, and a size that the disk does not know."""
    with volume_of("ext2", tmp_path) as volume:
        for number in range(5):
            volume.write_bytes(f"/{number}", b"old")
        with volume.open("/1", "r+", access="buffered") as one, volume.open("/3", "a", access="buffered") as three:
            one.pwrite(b"new", 0)
            three.write(b"er" * 30_000)
            assert dict(volume.read_files()) == {
                "/0": b"old", "/1": b"new", "/2": b"old", "/3": b"old" + b"er" * 30_000, "/4": b"old"
            }  # fmt: skip


def test_whoever_stops_leaves_the_volume_in_order(tmp_path: Path) -> None:
    """What is being read ahead when the reader goes is waited for (F24)."""
    with made_image("ext2", 32 << 20, directory=tmp_path) as image:
        with odirect.open_volume(image, "r+") as volume:
            for number in range(40):
                volume.write_bytes(f"/{number}", bytes([number]) * 1_000_000 if number < 20 else b"x")
        with odirect.open_volume(image, "r+") as volume:
            reader = volume.read_files()
            next(reader)
            del reader
            assert volume.read_bytes("/3") == bytes([3]) * 1_000_000
            reader = volume.read_files()
            next(reader)
            volume.remove("/7")
        with pytest.raises(ClosedError):
            list(reader)
        accepted(image)


def test_a_wrong_block_number_is_told(tmp_path: Path) -> None:
    """In an inode and in an indirect block: neither zeroes nor another file's bytes."""
    with made_image("ext2", 8 << 20, directory=tmp_path, mkfs=("-b", "1024")) as image:
        with odirect.open_volume(image, "r+") as volume:
            volume.write_bytes("/a", b"a" * 20_000)
            inode = volume.stat("/a").st_ino
            leaf = volume.extents("/a", 0, 20_000)
        shown = subprocess.run([needs_tool("debugfs"), "-R", f"stat <{inode}>", image], capture_output=True, text=True)
        leaf_block = int(shown.stdout.split("(IND):")[1].split(",")[0])
        assert leaf[0].addr is not None
        raw = bytearray(image.read_bytes())
        struct.pack_into("<I", raw, leaf_block * 1024 + 8, 1 << 30)
        image.write_bytes(raw)
        with odirect.open_volume(image) as volume, pytest.raises(CorruptionError, match=f"block 14 of inode {inode}"):
            list(volume.read_files())
        subprocess.run(
            [needs_tool("debugfs"), "-w", "-R", f"sif <{inode}> block[IND] 2", image], check=True, capture_output=True
        )
        with odirect.open_volume(image) as volume, pytest.raises(CorruptionError, match=f"inode {inode}"):
            list(volume.read_files())


@pytest.mark.parametrize("inode_bytes", [128, 256])
def test_who_has_extended_attributes(inode_bytes: int, tmp_path: Path) -> None:
    """In a block, and, as e2fsprogs and the kernel put short ones, behind the inode."""
    with made_image("ext2", 8 << 20, directory=tmp_path, mkfs=("-I", str(inode_bytes))) as image:
        with odirect.open_volume(image, "r+") as volume:
            for name in ("none", "block", "behind"):
                volume.write_bytes(f"/{name}", b"x")
            volume.set_xattr("/block", "user.a", b"b" * 500)
        words = [needs_tool("debugfs"), "-w", "-R", "ea_set /behind user.short value", str(image)]
        subprocess.run(words, check=True, capture_output=True)
        with odirect.open_volume(image) as volume:
            numbers = {name: volume.stat(f"/{name}").st_ino for name in ("none", "block", "behind")}
            assert volume.xattrs("/behind") == {b"user.short": b"value"}
            found = volume.runner.run(volume.file_system.with_xattrs(list(numbers.values())))
            assert found == {numbers["block"], numbers["behind"]}
            assert volume.runner.run(volume.file_system.with_xattrs([])) == set()


# --- copying -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_tree_comes_back_as_it_went(kind: str, seed: int, tmp_path: Path) -> None:
    """Contents, kinds, permissions, owners, times, links; holes stay holes."""
    _make_tree(tmp_path / "tree", seed)
    before = _seen(tmp_path / "tree")
    with volume_of(kind, tmp_path, ("-b", "4096", "-I", "256"), 64 << 20) as volume:
        went = volume.copy_in(f"{tmp_path}/tree/", "/", attributes=True)
        assert went.left_out == []
        came = volume.copy_out("/", tmp_path / "back")
        assert came.left_out == []
        assert (went.files, went.directories + 1, *went[3:6]) == (came.files, came.directories, *came[3:6])
        assert volume.stat("/empty and long").st_blocks == 0
    assert _seen(tmp_path / "back") == before
    assert (tmp_path / "back" / "empty and long").stat().st_blocks == 0


@pytest.mark.slow
def test_the_checker_and_the_kernel_agree(tmp_path: Path) -> None:
    """What `copy_in` makes with many files at once is what Linux reads."""
    _make_tree(tmp_path / "tree", 4)
    with made_image("ext2", 64 << 20, directory=tmp_path, mkfs=("-I", "256")) as image:
        with odirect.open_volume(image, "r+") as volume:
            volume.rmdir("/lost+found")
            volume.copy_in(f"{tmp_path}/tree/", "/")
        accepted(image)
        with mounted(image, "ext2", "ro") as point:
            assert _seen(point) == _seen(tmp_path / "tree")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_replaced(kind: str, tmp_path: Path) -> None:
    """Files with names that are taken, among those that are made together."""
    _make_tree(tmp_path / "tree", 5, 40)
    with volume_of(kind, tmp_path, size=64 << 20) as volume:
        volume.copy_in(f"{tmp_path}/tree/", "/")
        names = [path for path, _ in volume.read_files()][::8]
        for name in names:
            volume.write_bytes(name, b"something else")
        volume.copy_in(f"{tmp_path}/tree/", "/")
        assert dict(volume.read_files()) == _contents(tmp_path / "tree") | {"/empty and long": bytes(9 << 20)}
        volume.copy_out("/", tmp_path / "back")
        volume.copy_out("/.", tmp_path / "back")
    assert _seen(tmp_path / "back", times=False) == _seen(tmp_path / "tree", times=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_passes_its_group_on(kind: str, tmp_path: Path) -> None:
    """Without attributes files get the owner of the volume, and the group of a set-group-ID directory."""
    (tmp_path / "tree").mkdir()
    for number in range(3):
        (tmp_path / "tree" / str(number)).write_bytes(b"x" * 100)
    (tmp_path / "tree" / "0").chmod(0o6755)
    with volume_of(kind, tmp_path) as volume:
        volume.mkdir("/plain")
        volume.mkdir("/shared")
        volume.chown("/shared", 5, 77)
        volume.chmod("/shared", 0o2775)
        for place in ("/plain", "/shared"):
            volume.copy_in(f"{tmp_path}/tree/", place, attributes=False)
        assert [volume.stat(f"/shared/{number}").st_gid for number in range(3)] == [77] * 3
        assert [volume.stat(f"/plain/{number}").st_gid for number in range(3)] == [os.getegid()] * 3
        assert stat.S_IMODE(volume.stat("/plain/0").st_mode) == 0o755
        assert volume.stat("/plain/0").st_mtime > 10**9
        volume.copy_in(f"{tmp_path}/tree/", "/shared")
        assert [volume.stat(f"/shared/{number}").st_gid for number in range(3)] == [os.getegid()] * 3
        assert stat.S_IMODE(volume.stat("/shared/0").st_mode) == 0o6755


class _StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.3, 0.7, 0.99])
def test_an_interrupted_copy_leaves_a_sound_volume(after: float, tmp_path: Path) -> None:
    """Whatever is there then is whole, but for the times of directories."""
    _make_tree(tmp_path / "tree", 6)

    def stop(done: int, total: int) -> None:
        if done >= after * total:
            raise _StopError

    with made_image("ext2", 64 << 20, directory=tmp_path) as image:
        with odirect.open_volume(image, "r+") as volume:
            with pytest.raises(_StopError):
                volume.copy_in(f"{tmp_path}/tree/", "/", progress=stop)
            assert volume.check() == []
            _is_part_of(volume, tmp_path / "tree")
        accepted(image)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_copy_to_the_host_leaves_whole_files(kind: str, tmp_path: Path) -> None:
    """And no hidden ones; the volume can be used and closed."""
    _make_tree(tmp_path / "tree", 7)

    def stop(done: int, total: int) -> None:
        if done > 0.4 * total:
            raise _StopError

    with volume_of(kind, tmp_path, ("-b", "4096"), 64 << 20) as volume:
        volume.copy_in(f"{tmp_path}/tree/", "/")
        with pytest.raises(_StopError):
            volume.copy_out("/", tmp_path / "back", progress=stop)
    kept, found = _seen(tmp_path / "tree", times=False), _seen(tmp_path / "back", times=False)
    assert 0 < len(found) < len(kept)
    for path, (what, *_) in found.items():
        if isinstance(what, tuple):
            assert kept[path][0][0] == what[0]
        else:
            assert kept[path][0] == what


def _is_part_of(volume: Volume, tree: Path) -> None:
    everything = _contents(tree) | {"/empty and long": bytes(9 << 20)}
    found = dict(volume.read_files())
    assert found.items() <= everything.items()


def test_a_full_volume_has_all_that_fits(tmp_path: Path) -> None:
    """NoSpaceError names the file that does not fit; those before it are there, whole."""
    (tmp_path / "tree").mkdir()
    for number in range(100):
        (tmp_path / "tree" / f"{number:04}").write_bytes(bytes([number]) * 30_000)
    with volume_of("ext2", tmp_path, ("-b", "1024", "-m", "0"), 2 << 20) as volume:
        with pytest.raises(NoSpaceError) as failed:
            volume.copy_in(f"{tmp_path}/tree/", "/")
        missing = int(os.path.basename(failed.value.filename))
        found = dict(volume.read_files())
        assert sorted(found) == [f"/{number:04}" for number in range(missing)]
        assert all(content == bytes([int(path[1:])]) * 30_000 for path, content in found.items())
        assert volume.statfs().f_bfree < 40


def test_new_files_have_new_generations_and_exact_times(tmp_path: Path) -> None:
    """A handle of a deleted file must not fit its successor in the same inode; times go as far as the disk's."""
    with volume_of("ext2", tmp_path, ("-I", "256")) as volume:
        file_system, root = volume.file_system, volume.stat("/").st_ino
        times = [0, 1_700_000_000_123_456_789, -5_000_000_001, (1 << 33) * 10**9 + 7, 10**20]
        files = [NewFile(root, b"%d" % number, b"x" * number, 0o640, 70_000, 80_000, at, at)
                 for number, at in enumerate(times)]  # fmt: skip
        numbers = volume.runner.run(file_system.create_whole(files))
        assert numbers == [volume.stat(f"/{number}").st_ino for number in range(len(times))]
        last = (1 << 31) * 10**9 - 1 + (3 << 32) * 10**9
        for number, at in enumerate(times):
            found = volume.stat(f"/{number}")
            assert (found.st_mtime_ns, found.st_atime_ns) == (min(at, last), min(at, last))
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (70_000, 80_000, 0o640)
        before = {number: file_system.inode(number).generation for number in numbers}  # type: ignore[attr-defined]
        for number in range(len(times)):
            volume.remove(f"/{number}")
        volume.sync()
        again = volume.runner.run(file_system.create_whole([file._replace(name=b"new" + file.name) for file in files]))
        assert sorted(again) == sorted(numbers)
        for number in again:
            assert file_system.inode(number).generation == before[number] + 1  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="owner"):
            volume.runner.run(file_system.create_whole([files[0]._replace(name=b"odd", uid=1 << 32)]))
        assert not volume.exists("/odd")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_begun_may_be_given_up(kind: str, tmp_path: Path) -> None:
    """No file is there, no name, and no block is lost; then the same files can be made."""
    with volume_of(kind, tmp_path, ("-b", "1024")) as volume:
        file_system, root = volume.file_system, volume.stat("/").st_ino
        # With the room that the directory takes for more names.
        made = [NewFile(root, b"%d" % number, b"x" * 700 * number, 0o640, 1, 2, 10**18, -1) for number in range(60)]
        files = NewFiles.pack(made, file_system.block_bytes)
        assert [row._replace(content=bytes(row.content)) for row in files.rows(file_system.block_bytes)] == made
        before = volume.statfs()
        making = volume.runner.run(file_system.begin_whole(files))
        volume.runner.run(making.give_up())
        assert volume.statfs() == before
        assert dict(volume.read_files()) == {}
        numbers = volume.runner.run(volume.runner.run(file_system.begin_whole(files)).finish())
        assert dict(volume.read_files()) == {f"/{os.fsdecode(file.name)}": bytes(file.content) for file in made}
        assert numbers == [volume.stat(f"/{number}").st_ino for number in range(60)]
        status = volume.stat("/7")
        assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o640, 1, 2)
        assert (status.st_atime_ns, status.st_mtime_ns) == (10**18, -1)
        with pytest.raises(ExistsError):
            making = volume.runner.run(file_system.begin_whole(files))
            volume.runner.run(making.finish())
        assert volume.check() == []
