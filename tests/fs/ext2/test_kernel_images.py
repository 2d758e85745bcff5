"""Whole volumes through `odirect.open_volume`, held against the kernel, mke2fs, debugfs and e2fsck.

What the kernel (or a tool) made is read here to the last byte and attribute; what is changed here is
mounted and seen by the kernel as a twin that only the kernel has changed, and e2fsck finds nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import random
import re
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from tests.fs.ext2 import reading_kit
from tests.fs.ext2.reading_kit import debugfs
from tests.loops import mounted, needs_root, needs_tool, run

import odirect
from odirect.base.errors import NoSpaceError, ODirectError
from odirect.volumes import Volume

SEED = "00010203-0405-0607-0809-0a0b0c0d0e0f"
#: Names whose hashes are the same where SEED is the volume's (F35).
COLLIDING = (
    (b"collide-0002824", b"collide-0231983"),
    (b"collide-0232789", b"collide-0345346"),
    (b"collide-0029877", b"collide-0332921"),
)
ODD_NAMES = (
    b"n" * 255,
    b"n" * 254 + b"m",
    b"n" * 254,
    b"\xff\xfe not utf-8 \x80",
    b"\x01\n\t ",
    "日本".encode(),
    "é".encode("latin-1"),
    b"-rf",
    b" ",
    b"...",
    b"..x",
    b"a",
    b"aa",
    b"aaa",
    b"aaaa",
    b"aaab",
)
SECOND = 1_000_000_000
TIMES = (
    0,
    -1,
    -SECOND,
    -5 * SECOND + 7,
    -(2**31) * SECOND,
    (2**31 - 1) * SECOND,
    2**31 * SECOND + 999_999_999,
    2**32 * SECOND,
    4_000_000_000 * SECOND + 5,
    15_000_000_000 * SECOND + 1,
    1_700_000_000 * SECOND + 123_456_789,
)
_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


# --- the same verbs for the kernel and for us ----------------------------------------------------


class Tree(Protocol):
    """What both sides can do; paths are bytes from the volume's root."""

    def write(self, path: bytes, data: bytes) -> None: ...
    def pwrite(self, path: bytes, offset: int, data: bytes) -> None: ...
    def append(self, path: bytes, data: bytes) -> None: ...
    def truncate(self, path: bytes, size: int) -> None: ...
    def punch(self, path: bytes, offset: int, length: int) -> None: ...
    def unlink(self, path: bytes) -> None: ...
    def rename(self, path: bytes, new: bytes) -> None: ...
    def link(self, path: bytes, new: bytes) -> None: ...
    def symlink(self, target: bytes, path: bytes) -> None: ...
    def mkdir(self, path: bytes) -> None: ...
    def rmdir(self, path: bytes) -> None: ...
    def mknod(self, path: bytes, mode: int, device: int) -> None: ...
    def chmod(self, path: bytes, mode: int) -> None: ...
    def chown(self, path: bytes, uid: int, gid: int) -> None: ...
    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None: ...
    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None: ...
    def remove_xattr(self, path: bytes, name: bytes) -> None: ...
    def listdir(self, path: bytes) -> list[bytes]: ...
    def lstat(self, path: bytes) -> os.stat_result: ...
    def readlink(self, path: bytes) -> bytes: ...
    def xattrs(self, path: bytes) -> dict[bytes, bytes]: ...
    def segments(self, path: bytes) -> list[tuple[int, bytes]]: ...


class Kernel:
    """A mounted volume."""

    def __init__(self, point: Path) -> None:
        self._point = os.fsencode(point)

    def at(self, path: bytes) -> bytes:
        return self._point + path

    def write(self, path: bytes, data: bytes) -> None:
        with open(self.at(path), "wb") as file:
            file.write(data)

    def pwrite(self, path: bytes, offset: int, data: bytes) -> None:
        with open(self.at(path), "r+b", buffering=0) as file:
            file.seek(offset)
            file.write(data)

    def append(self, path: bytes, data: bytes) -> None:
        with open(self.at(path), "ab") as file:
            file.write(data)

    def truncate(self, path: bytes, size: int) -> None:
        os.truncate(self.at(path), size)

    def punch(self, path: bytes, offset: int, length: int) -> None:
        with open(self.at(path), "r+b") as file:
            ctypes.set_errno(0)
            end = (ctypes.c_int64(offset), ctypes.c_int64(length))
            if _libc.fallocate(file.fileno(), _PUNCH, *end):
                raise OSError(ctypes.get_errno(), "fallocate")

    def unlink(self, path: bytes) -> None:
        os.unlink(self.at(path))

    def rename(self, path: bytes, new: bytes) -> None:
        os.rename(self.at(path), self.at(new))

    def link(self, path: bytes, new: bytes) -> None:
        os.link(self.at(path), self.at(new), follow_symlinks=False)

    def symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, self.at(path))

    def mkdir(self, path: bytes) -> None:
        os.mkdir(self.at(path), 0o755)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self.at(path))

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        os.mknod(self.at(path), mode, device)

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        os.chown(self.at(path), uid, gid, follow_symlinks=False)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        os.utime(self.at(path), ns=(atime_ns, mtime_ns), follow_symlinks=False)

    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        os.setxattr(self.at(path), name, value, follow_symlinks=False)

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        os.removexattr(self.at(path), name, follow_symlinks=False)

    def listdir(self, path: bytes) -> list[bytes]:
        return os.listdir(self.at(path))

    def lstat(self, path: bytes) -> os.stat_result:
        return os.lstat(self.at(path))

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(self.at(path))

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        names = os.listxattr(self.at(path), follow_symlinks=False)
        return {os.fsencode(name): os.getxattr(self.at(path), name, follow_symlinks=False) for name in names}

    def segments(self, path: bytes) -> list[tuple[int, bytes]]:
        with open(self.at(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return list(_segments(size, file.seek, lambda length, at: os.pread(file.fileno(), length, at)))


class Ours:
    """The same, by odirect."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume

    def unlink(self, path: bytes) -> None:
        self.volume.unlink(path)

    def rename(self, path: bytes, new: bytes) -> None:
        self.volume.rename(path, new)

    def link(self, path: bytes, new: bytes) -> None:
        self.volume.link(path, new)

    def mkdir(self, path: bytes) -> None:
        self.volume.mkdir(path)

    def rmdir(self, path: bytes) -> None:
        self.volume.rmdir(path)

    def chmod(self, path: bytes, mode: int) -> None:
        self.volume.chmod(path, mode)

    def listdir(self, path: bytes) -> list[bytes]:
        return self.volume.listdir(path)

    def lstat(self, path: bytes) -> os.stat_result:
        return self.volume.lstat(path)

    def readlink(self, path: bytes) -> bytes:
        return self.volume.readlink(path)

    def write(self, path: bytes, data: bytes) -> None:
        self.volume.write_bytes(path, data)

    def pwrite(self, path: bytes, offset: int, data: bytes) -> None:
        with self.volume.open(path, "r+") as file:
            assert file.pwrite(data, offset) == len(data)

    def append(self, path: bytes, data: bytes) -> None:
        with self.volume.open(path, "a") as file:
            assert file.write(data) == len(data)

    def truncate(self, path: bytes, size: int) -> None:
        with self.volume.open(path, "r+") as file:
            file.truncate(size)

    def punch(self, path: bytes, offset: int, length: int) -> None:
        with self.volume.open(path, "r+") as file:
            file.fallocate(offset, length, punch=True)

    def symlink(self, target: bytes, path: bytes) -> None:
        self.volume.symlink(target, path)

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        self.volume.mknod(path, mode, device)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        self.volume.chown(path, uid, gid, follow_symlinks=False)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        self.volume.utime(path, ns=(atime_ns, mtime_ns), follow_symlinks=False)

    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        self.volume.set_xattr(path, name, value, follow_symlinks=False)

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        self.volume.remove_xattr(path, name, follow_symlinks=False)

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        found = self.volume.xattrs(path, follow_symlinks=False)
        return {os.fsencode(name): value for name, value in found.items()}

    def segments(self, path: bytes) -> list[tuple[int, bytes]]:
        with self.volume.open(path) as file:
            return list(_segments(file.size, file.seek, file.pread))


def _segments(
    size: int, seek: Callable[[int, int], int], pread: Callable[[int, int], bytes]
) -> Iterator[tuple[int, bytes]]:
    """The parts of a file that are no holes, and some bytes of the holes, which must be zeroes."""
    at = 0
    while at < size:
        try:
            start = seek(at, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            start = size
        if start > at:
            for place in (at, (at + start) // 2, start - 1):
                assert pread(1, place) == b"\0"
        if start == size:
            return
        at = min(seek(start, os.SEEK_HOLE), size)
        data = pread(at - start, start)
        assert len(data) == at - start
        yield start, data


def snapshot(tree: Tree) -> dict[bytes, tuple[Any, ...]]:
    """All that can be seen of a volume, exactly: places of holes, numbers of inodes, times, and so on."""
    found: dict[bytes, tuple[Any, ...]] = {}
    once: dict[int, tuple[Any, Any]] = {}  # Some files have thousands of names.
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        here = path or b"/"
        status = tree.lstat(here)
        content: Any = None
        if status.st_ino in once:
            attributes, content = once[status.st_ino]
        else:
            attributes = tree.xattrs(here)
        if status.st_ino in once:
            pass
        elif stat.S_ISDIR(status.st_mode):
            names = tree.listdir(here)
            assert len(names) == len(set(names))
            waiting += [path + b"/" + name for name in names]
        elif stat.S_ISREG(status.st_mode):
            content = [(at, len(data), hashlib.sha256(data).digest()) for at, data in tree.segments(here)]
        elif stat.S_ISLNK(status.st_mode):
            content = tree.readlink(here)
        fields = (status.st_mode, status.st_ino, status.st_nlink, status.st_uid, status.st_gid, status.st_size)
        times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        space = (status.st_blocks, status.st_rdev)
        if status.st_nlink > 1:
            once[status.st_ino] = attributes, content
        found[path] = (fields, times, space, attributes, content)
    return found


def plain(tree: Tree) -> dict[bytes, tuple[Any, ...]]:
    """What of a volume does not depend on where things are and when they were done; mtime is set by `settle`."""
    found: dict[bytes, tuple[Any, ...]] = {}
    ids: dict[int, bytes] = {}
    contents: dict[int, bytes] = {}
    for path, (fields, times, space, attributes, _) in sorted(snapshot(tree).items()):
        mode, number, links, uid, gid, size = fields
        content: Any = None
        if stat.S_ISREG(mode) and number in contents:
            content = contents[number]
        elif stat.S_ISREG(mode):
            digest = hashlib.sha256()
            for at, data in tree.segments(path):
                for start in range(0, len(data), 1 << 10):
                    piece = data[start : start + (1 << 10)].rstrip(b"\0")
                    if piece:
                        digest.update(struct.pack("<QI", at + start, len(piece)) + piece)
            content = contents[number] = digest.digest()
        elif stat.S_ISLNK(mode):
            content = tree.readlink(path)
        same_as = ids.setdefault(number, path)
        shape = None if stat.S_ISDIR(mode) else size
        found[path] = (mode, links, uid, gid, shape, times[:2], space[1], attributes, content, same_as)
    return found


def compare(image: Path, kind: str = "ext2") -> dict[bytes, tuple[Any, ...]]:
    """What the volume holds, on which the kernel and we agree, and which e2fsck finds whole before and after."""
    reading_kit.check(image)
    with mounted(image, kind, "ro") as point:
        theirs = snapshot(Kernel(point))
        counts = os.statvfs(point)
    reading_kit.check(image)
    before = _digest(image)
    with odirect.open_volume(image) as volume:
        ours = snapshot(Ours(volume))
        assert volume.check() == []
        space = volume.statfs()
    for path in theirs.keys() | ours.keys():
        assert ours.get(path) == theirs.get(path), path
    assert (space.f_bfree, space.f_bavail, space.f_files, space.f_ffree) == (
        counts.f_bfree,
        counts.f_bavail,
        counts.f_files,
        counts.f_ffree,
    )
    assert _digest(image) == before
    return ours


def writable(image: Path) -> Volume:
    """The volume, open for writing, as soon as the kernel has let go of the loop device that it was mounted by.

    Whoever looks at all loop devices at that moment, as tests beside this one do, delays that.
    """
    for _ in range(100):
        if not run("losetup", "--associated", image):
            break
    return odirect.open_volume(image, "r+")


def _digest(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(tree: Tree, shape: str) -> None:
    """Give everything times that depend on its name only, what is in a directory before itself."""
    # The kernel itself keeps times of revision 0 too long for the disk as long as it is mounted.
    times = TIMES[:6] if shape == "revision-0" else TIMES
    paths: list[tuple[bytes, bool]] = []
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        is_dir = stat.S_ISDIR(tree.lstat(path or b"/").st_mode)
        paths.append((path, is_dir))
        if is_dir:
            waiting += [path + b"/" + name for name in tree.listdir(path or b"/")]
    done: set[int] = set()
    for path, _ in sorted(paths, reverse=True):
        number = tree.lstat(path or b"/").st_ino
        if number not in done:
            done.add(number)
            dice = random.Random(path)
            tree.utime(path or b"/", dice.choice(times), dice.choice(times))


# --- images --------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "1k-128": (24 << 20, ("-b", "1024", "-I", "128")),
    "1k-256": (24 << 20, ("-b", "1024", "-I", "256", "-O", "^resize_inode")),
    "2k-128": (24 << 20, ("-b", "2048", "-I", "128", "-O", "^filetype")),
    "2k-256": (24 << 20, ("-b", "2048", "-I", "256", "-O", "^dir_index,^sparse_super,^resize_inode")),
    "4k-128": (32 << 20, ("-b", "4096", "-I", "128", "-g", "2048")),
    "4k-256": (32 << 20, ("-b", "4096", "-I", "256")),
    "1k-1024": (24 << 20, ("-b", "1024", "-I", "1024", "-O", "^large_file,^ext_attr")),
    "revision-0": (24 << 20, ("-b", "1024", "-r", "0", "-O", "none")),
    "ext3": (32 << 20, ("-b", "1024", "-I", "256", "-J", "size=4")),
}
WRITABLE = [name for name in SHAPES if name != "ext3"]
QUICK = ("1k-128", "4k-256", "revision-0", "ext3")


def _slow(names: list[str] | tuple[str, ...], quick: tuple[str, ...] = QUICK) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@contextlib.contextmanager
def shaped(name: str, directory: Path, *more: str, size: int = 0, file: str = "image") -> Iterator[Path]:
    """An empty volume of that shape."""
    normal, options = SHAPES[name]
    path = directory / file
    with open(path, "wb") as made:
        made.truncate(size or normal)
    kind = ("-t", "ext3" if name == "ext3" else "ext2") if name != "revision-0" else ()
    options += () if name == "revision-0" else ("-E", f"hash_seed={SEED}")
    run("mke2fs", "-q", "-F", *kind, *options, *more, path)
    try:
        yield path
    finally:
        path.unlink()


def fill(tree: Tree, block_bytes: int, *, names: int) -> None:
    """One of everything that there can be."""
    dice = random.Random(5)
    tree.mkdir(b"/files")
    for size in (0, 1, 511, 512, 1023, 1024, 4095, 4096, 4097, 12 * block_bytes, 12 * block_bytes + 1, 400_000):
        tree.write(b"/files/of-%d" % size, dice.randbytes(size))
    pointers = block_bytes // 4
    levels = (12, 12 + pointers, 12 + pointers + pointers**2)
    tree.write(b"/files/sparse", b"")
    for block in (0, 11, *levels, levels[0] + 7, levels[1] + pointers + 1, levels[2] + pointers * 3 + 1):
        if block * block_bytes < 1 << 33:
            tree.pwrite(b"/files/sparse", block * block_bytes + 5, b"data")
    tree.write(b"/files/hole", b"")
    tree.truncate(b"/files/hole", 10_000_001)
    tree.write(b"/files/punched", dice.randbytes(100_000))
    tree.punch(b"/files/punched", 12_288, 50_000)
    tree.write(b"/files/cut", dice.randbytes(300_000))
    tree.truncate(b"/files/cut", 13_001)
    tree.mkdir(b"/odd")
    for name in ODD_NAMES:
        tree.write(b"/odd/" + name, name * 2)
    tree.mkdir(b"/odd/" + b"d" * 255)
    tree.mkdir(b"/links")
    for length in (1, 58, 59, 60, 61, 255, block_bytes - 1):
        tree.symlink(b"t" * min(length, 4095), b"/links/of-%d" % length)
    tree.symlink(b"../odd/a", b"/links/leads")
    for number in range(5):
        tree.link(b"/files/of-4097", b"/links/hard-%d" % number)
    tree.link(b"/links/of-60", b"/links/hard-link")
    tree.mkdir(b"/nodes")
    tree.mknod(b"/nodes/fifo", stat.S_IFIFO | 0o600, 0)
    tree.mknod(b"/nodes/socket", stat.S_IFSOCK | 0o640, 0)
    for kind, major, minor in (
        (stat.S_IFCHR, 1, 3),
        (stat.S_IFBLK, 255, 255),
        (stat.S_IFCHR, 256, 0),
        (stat.S_IFBLK, 4095, 1048575),
    ):
        tree.mknod(b"/nodes/%d-%d" % (major, minor), kind | 0o600, os.makedev(major, minor))
    tree.mkdir(b"/times")
    for number, time_ns in enumerate(TIMES):
        tree.write(b"/times/%d" % number, b"")
        tree.utime(b"/times/%d" % number, time_ns, TIMES[-number])
    tree.mkdir(b"/modes")
    for mode in (0, 0o777, 0o4755, 0o2711, 0o1777):
        tree.write(b"/modes/%o" % mode, b"")
        tree.chown(b"/modes/%o" % mode, 100_000 + mode, 70_000)
        tree.chmod(b"/modes/%o" % mode, mode)
    tree.mkdir(b"/attributes")
    for name in (b"small", b"shared-1", b"shared-2", b"shared-3", b"large", b"empty", b"many"):
        tree.write(b"/attributes/" + name, name)
    tree.set_xattr(b"/attributes/small", b"user.s", b"value")
    for number in (1, 2, 3):
        tree.set_xattr(b"/attributes/shared-%d" % number, b"user.same", b"s" * 300)
        tree.set_xattr(b"/attributes/shared-%d" % number, b"trusted.too", b"t")
    tree.set_xattr(b"/attributes/large", b"user.l" + b"n" * 200, b"l" * (block_bytes - 400))
    tree.set_xattr(b"/attributes/empty", b"user.nothing", b"")
    for number in range(12):
        tree.set_xattr(b"/attributes/many", b"user.%d" % number, b"%d" % number * 9)
    tree.set_xattr(b"/attributes/many", b"security.s", b"\0\xff")
    tree.set_xattr(b"/attributes", b"trusted.directory", b"x")
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in ((1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 4, 0xFFFFFFFF))
    )
    tree.set_xattr(b"/attributes/small", b"system.posix_acl_access", acl)
    tree.set_xattr(b"/attributes", b"system.posix_acl_default", acl)
    tree.mkdir(b"/names")
    for pair in COLLIDING:
        for name in pair:
            tree.write(b"/names/" + name, name)
    for number in range(names):
        tree.link(b"/files/of-1", b"/names/a name of some length %06d" % number)
    tree.mkdir(b"/names/in-it")


# --- what others made, read here -----------------------------------------------------------------


@pytest.mark.parametrize("shape", _slow(list(SHAPES)))
def test_what_the_kernel_made(shape: str, scratch: Path) -> None:
    """Every name, attribute and byte (F02, F35)."""
    needs_root()
    kind = "ext3" if shape == "ext3" else "ext2"
    with shaped(shape, scratch, "-N", "512") as image:
        with mounted(image, kind) as point:
            fill(Kernel(point), _block_bytes(shape), names=400)
        found = compare(image, kind)
        with odirect.open_volume(image) as volume:
            for name, other in COLLIDING:
                assert volume.read_bytes(b"/names/" + name) == name
                assert volume.read_bytes(b"/names/" + other) == other
                assert not volume.exists(b"/names/" + name[:-1]) and not volume.exists(b"/names/" + name + b"0")
            assert volume.read_bytes("/links/leads") == b"aa"
            _check_times(found, shape)
            assert _has_index(image, b"/names") == (shape not in ("revision-0", "2k-256"))
            if shape == "ext3":
                assert "has_journal" in volume.features
        if shape.endswith("-128"):
            blocks = {_xattr_block(image, b"/attributes/shared-%d" % number) for number in (1, 2, 3)}
            assert len(blocks) == 1 and blocks != {0}, "the kernel has not shared the block"


def _block_bytes(shape: str) -> int:
    options = SHAPES[shape][1]
    return int(options[options.index("-b") + 1])


def _check_times(found: dict[bytes, tuple[Any, ...]], shape: str) -> None:
    """What the kernel itself keeps: nanoseconds and all where inodes are large."""
    if shape in ("1k-256", "2k-256", "4k-256", "1k-1024", "ext3"):
        assert [found[b"/times/%d" % number][1][0] for number in range(len(TIMES))] == list(TIMES)
    else:
        assert found[b"/times/2"][1][0] == -SECOND


def _has_index(image: Path, path: bytes) -> bool:
    """Whether a directory has an index, as debugfs sees it."""
    flags = re.search(r"Flags: (0x[0-9a-f]+)", run("debugfs", "-R", f"stat {path.decode()}", image))
    assert flags is not None
    return bool(int(flags.group(1), 16) & 0x1000)


def _xattr_block(image: Path, path: bytes) -> int:
    found = re.search(r"File ACL: (\d+)", run("debugfs", "-R", f"stat {path.decode()}", image))
    return int(found.group(1)) if found else 0


def test_the_colliding_names_do_collide(scratch: Path) -> None:
    """By another's reckoning (F35)."""
    with shaped("1k-128", scratch) as image:
        for pair in COLLIDING:
            said = [run("debugfs", "-R", f"dx_hash -h half_md4 -s {SEED} {name.decode()}", image) for name in pair]
            hashes = [reading_kit.searched(r"is (0x[0-9a-f]+)", text).group(1) for text in said]
            assert hashes[0] == hashes[1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1k-128", "4k-256"])
def test_a_directory_with_20_000_names(shape: str, scratch: Path) -> None:
    """With an index by the kernel; read, looked up, and grown and shrunk here, and then by the kernel again."""
    needs_root()
    with shaped(shape, scratch) as image:
        with mounted(image, "ext2") as point:
            fill(Kernel(point), _block_bytes(shape), names=20_000)
        assert _has_index(image, b"/names")
        found = compare(image)
        assert len(found) > 20_000
        with writable(image) as volume:
            for name, other in COLLIDING:
                volume.unlink(b"/names/" + name)
                assert volume.read_bytes(b"/names/" + other) == other
            for number in range(0, 3000, 3):
                volume.unlink(b"/names/a name of some length %06d" % number)
            for number in range(1500):
                volume.symlink(b"t", b"/names/new and longer than what was there before it %06d" % number)
        found = compare(image)
        assert not _has_index(image, b"/names")
        with mounted(image, "ext2") as point:
            tree = Kernel(point)
            for name, other in COLLIDING:
                tree.write(b"/names/" + name, name)
                tree.unlink(b"/names/" + other)
            for number in range(1500):
                tree.unlink(b"/names/new and longer than what was there before it %06d" % number)
        assert len(compare(image)) == len(found) - 1500


@pytest.mark.parametrize("shape", _slow(list(SHAPES)))
def test_what_mke2fs_and_debugfs_made(shape: str, scratch: Path) -> None:
    """Without root: a directory that mke2fs copied in, and what debugfs added, against that directory."""
    source = scratch / "source"
    (source / "d" / "e").mkdir(parents=True)
    dice = random.Random(3)
    for size in (0, 1, 4096, 100_001):
        (source / "d" / f"of-{size}").write_bytes(dice.randbytes(size))
    with (source / "sparse").open("wb") as file:
        for block in (0, 13, 300, 70_000):
            file.seek(block << 10)
            file.write(b"%d" % block)
    with contextlib.chdir(source / "d" / "e"):
        for name in ODD_NAMES:
            Path(os.fsdecode(name)).write_bytes(name)
    os.symlink("d/of-1", source / "fast")
    os.symlink("d/" * 100, source / "slow")
    os.link(source / "d" / "of-4096", source / "hard")
    os.mkfifo(source / "fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made, contextlib.chdir(source):
        made.bind("socket")
    for number, made_path in enumerate(sorted(source.rglob("*"))):
        os.utime(made_path, (1000 + number, 2**31 - 1 - number), follow_symlinks=False)
    with shaped(shape, scratch, "-d", str(source)) as image:
        attributes = shape not in ("revision-0", "1k-1024")  # Those have no ext_attr.
        debugfs(image, "mknod null c 1 3", "mknod disk b 300 60000")
        if attributes:
            debugfs(image, f"ea_set hard user.long {'v' * 300}", "ea_set hard user.short w", "ea_set d trusted.x y")
        reading_kit.check(image)
        with odirect.open_volume(image) as volume:
            ours = snapshot(Ours(volume))
            data = {path: _joined(Ours(volume).segments(path)) for path, seen in ours.items() if type(seen[4]) is list}
            assert volume.check() == []
        # A directory's own size differs, and so do numbers of inodes, and times when they changed.
        expected = snapshot(Kernel(source))
        assert ours.keys() - expected.keys() == {b"/lost+found", b"/null", b"/disk"}
        for path, (fields, times, _, _, content) in expected.items():
            if not path:
                continue
            found = ours[path]
            is_dir = stat.S_ISDIR(fields[0])
            keep = slice(2, 5) if is_dir else slice(2, 6)
            assert (found[0][0], found[0][keep]) == (fields[0], fields[keep]), path
            assert found[1][1] == times[1] // SECOND * SECOND or found[1][1] == times[1], path
            if not stat.S_ISREG(fields[0]):
                assert found[4] == content
            else:
                assert data[path] == _joined(Kernel(source).segments(path))
        assert ours[b"/null"][2][1] == os.makedev(1, 3) and ours[b"/disk"][2][1] == os.makedev(300, 60000)
        if attributes:
            assert ours[b"/d/of-4096"][3] == {b"user.long": b"v" * 300, b"user.short": b"w"}
            assert ours[b"/d"][3] == {b"trusted.x": b"y"}


def _joined(segments: list[tuple[int, bytes]]) -> dict[int, bytes]:
    """The parts of a file that are not zero: how holes are cut depends on the size of blocks."""
    return {
        at + start: piece
        for at, data in segments
        for start in range(0, len(data), 1024)
        if (piece := data[start : start + 1024].rstrip(b"\0"))
    }


# --- what we write, seen by the kernel -----------------------------------------------------------

_PATHS = [
    b"/%s%d" % (name, number) for name in (b"file", b"d1/file", b"d2/file", b"d2/deep/file") for number in range(4)
]
_DIRECTORIES = [b"/d1", b"/d2", b"/d2/deep", b"/d3"]
_XATTRS = (b"user.a", b"user.long-name-of-an-attribute", b"trusted.t", b"security.s", b"user.b")


def program(dice: random.Random, length: int, block_bytes: int) -> Iterator[tuple[Any, ...]]:
    """Operations that meet, many of which fail."""
    deep = (12 + block_bytes // 4 + (block_bytes // 4) ** 2) * block_bytes
    for _ in range(length):
        path, new = dice.choice(_PATHS), dice.choice(_PATHS)
        size = dice.choice((0, 1, 100, 512, 4096, 5000, dice.randrange(60_000)))
        offset = dice.choice((0, 1, 511, 4096, dice.randrange(40_000), dice.randrange(400_000)))
        yield dice.choice(
            (
                ("write", path, dice.randbytes(size)),
                ("write", path, dice.randbytes(size)),
                ("pwrite", path, offset, dice.randbytes(size)),
                ("pwrite", path, offset, dice.randbytes(size)),
                ("pwrite", path, min(deep + offset, 1 << 33), b"far"),
                ("append", path, dice.randbytes(size)),
                ("truncate", path, offset),
                ("punch", path, offset, dice.choice((1, 1024, 4096, 100_000))),
                ("unlink", path),
                ("rename", path, new),
                ("rename", path, new),
                ("rename", dice.choice(_DIRECTORIES), dice.choice(_DIRECTORIES)),
                ("link", path, new),
                ("symlink", b"x" * dice.choice((1, 59, 60, 500)), new),
                ("mkdir", dice.choice(_DIRECTORIES)),
                ("mkdir", dice.choice(_DIRECTORIES)),
                ("rmdir", dice.choice(_DIRECTORIES)),
                ("mknod", new, dice.choice((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR)) | 0o600, os.makedev(5, 300)),
                ("chmod", path, dice.choice((0o600, 0o777, 0o755, 0o1444))),
                ("chown", path, dice.choice((0, 1000, 100_000)), dice.choice((0, 70_000))),
                ("set_xattr", path, dice.choice(_XATTRS), dice.randbytes(dice.choice((0, 1, 30, 200)))),
                ("set_xattr", path, dice.choice(_XATTRS), b"shared" * 20),
                ("set_xattr", dice.choice(_DIRECTORIES), dice.choice(_XATTRS), b"d"),
                ("remove_xattr", path, dice.choice(_XATTRS)),
            )
        )


def perform(tree: Tree, operation: tuple[Any, ...]) -> int:
    """The errno of doing it, 0 if it was done."""
    verb, *arguments = operation
    if verb in ("write", "pwrite", "append", "truncate", "punch", "chmod"):
        # A fifo would wait for somebody at its other end, and links are not to be followed here.
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(tree.lstat(arguments[0]).st_mode):
                return -1
    try:
        getattr(tree, verb)(*arguments)
    except OSError as error:
        return error.errno or -2
    return 0


@pytest.mark.parametrize("shape", _slow(WRITABLE, ("1k-128", "4k-256")))
def test_we_and_the_kernel_by_turns(shape: str, scratch: Path) -> None:
    """The kernel makes, we change, the kernel changes, we again: the same as the kernel alone, and e2fsck is silent.

    Beforehand there are things that only the kernel makes: directories with an index, shared blocks of
    attributes, blocks in all levels of a file.
    """
    needs_root()
    block_bytes = _block_bytes(shape)
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(shaped(shape, scratch, "-N", "700"))
        twin = stack.enter_context(shaped(shape, scratch, "-N", "700", file="twin"))
        alone = Kernel(stack.enter_context(mounted(twin, "ext2", "noatime")))
        fill(alone, block_bytes, names=120)
        with mounted(image, "ext2") as point:
            fill(Kernel(point), block_bytes, names=120)
        for turn in range(4):
            operations = list(program(random.Random(f"{shape}-{turn}"), 150, block_bytes))
            operations += list(_with_what_was_there(turn))
            expected = [perform(alone, operation) for operation in operations]
            if turn % 2:
                with mounted(image, "ext2") as point:
                    assert [perform(Kernel(point), operation) for operation in operations] == expected
                    settle(Kernel(point), shape)
            else:
                with writable(image) as volume:
                    tree = Ours(volume)
                    for operation, said in zip(operations, expected, strict=True):
                        assert perform(tree, operation) == said, operation[:2]
                    settle(tree, shape)
                    assert volume.check() == []
            settle(alone, shape)
            compare(image)
            with mounted(image, "ext2", "ro") as point:
                ours, theirs = plain(Kernel(point)), plain(alone)
            for path in ours.keys() | theirs.keys():
                assert ours.get(path) == theirs.get(path), (turn, path)


def _with_what_was_there(turn: int) -> Iterator[tuple[Any, ...]]:
    """Changes of what `fill` has made; the first is done here, the next by the kernel, and so on."""
    tag = b"%d" % turn
    yield "set_xattr", b"/attributes/shared-%d" % (turn % 3 + 1), b"user.mine", tag
    yield "set_xattr", b"/attributes/small", b"user.grown", tag * 500
    yield "remove_xattr", b"/attributes/many", b"user.%d" % turn
    yield "write", b"/attributes/shared-2", tag * 3000
    yield "chmod", b"/files/of-0", (0o6755, 0o4644, 0o2711, 0o6777)[turn]
    yield "chown", b"/files/of-0", 1000 + turn, 1000
    if turn == 2:
        yield "unlink", b"/attributes/shared-3"
    for number in range(60):
        yield "link", b"/files/of-512", b"/names/%d from turn %s" % (number, tag * 20)
    for number in range(turn * 25, turn * 25 + 25):
        yield "unlink", b"/names/a name of some length %06d" % number
    yield "rename", b"/names/" + COLLIDING[turn % 3][0], b"/odd/moved-" + tag
    yield "rename", b"/names/" + COLLIDING[turn % 3][1], b"/names/" + COLLIDING[turn % 3][0]
    yield "punch", b"/files/sparse", 0, 12 << 12
    yield "pwrite", b"/files/hole", 5_000_000 + turn * 5000, tag * 4096
    yield "truncate", b"/files/sparse", (40 << 20) >> turn
    yield "append", b"/files/of-4097", tag * 9999
    yield "rename", b"/odd/" + b"n" * 255, b"/odd/" + tag + b"o" * 254
    yield "rename", b"/odd/" + b"d" * 255, b"/names/in-it" + tag
    yield "unlink", b"/links/hard-" + tag
    yield "unlink", b"/nodes/" + (b"fifo", b"socket", b"1-3", b"4095-1048575")[turn]
    yield "mknod", b"/nodes/new" + tag, stat.S_IFBLK | 0o640, os.makedev(8 + turn * 100, 16 + turn * 500)
    yield "symlink", b"l" * (59 + turn), b"/links/new" + tag
    for number in range(2):
        yield "rmdir", b"/names/in-it%d" % number


@pytest.mark.parametrize("shape", _slow(WRITABLE, ("1k-128",)))
def test_full_to_the_last_block(shape: str, scratch: Path) -> None:
    """What fits is kept whole, what does not leaves nothing, space that is given back can be used (F30)."""
    needs_root()
    dice = random.Random(7)
    with shaped(shape, scratch, "-N", "128", size=4 << 20) as image:
        with mounted(image, "ext2") as point:
            Kernel(point).write(b"/kernel", dice.randbytes(500_000))
        held: dict[bytes, bytes] = {}
        with writable(image) as volume:
            for number in range(200):
                data = dice.randbytes(dice.choice((300_000, 60_000, 5000)))
                path = b"/file-%d" % number
                try:
                    volume.write_bytes(path, data)
                except NoSpaceError:
                    # A part may be there, as it would be in the kernel; overwriting what is there needs no space.
                    part = volume.read_bytes(path)
                    assert data.startswith(part)
                    volume.unlink(path)
                    if len(data) == 5000:
                        break
                else:
                    held[path] = data
            for path, data in held.items():
                with volume.open(path, "r+") as file:
                    file.pwrite(data[::-1], 0)
                held[path] = data[::-1]
            with pytest.raises(NoSpaceError):
                volume.write_bytes("/never", bytes(200_000))
            volume.unlink("/never")
            gone = dice.choice(sorted(held))
            volume.unlink(gone)
            del held[gone]
            volume.write_bytes("/again", b"again" * 100)
            held[b"/again"] = b"again" * 100
            made = 0
            with pytest.raises(NoSpaceError):
                for number in range(1000):
                    volume.mknod(f"/{number}", stat.S_IFIFO | 0o600)
                    made += 1
            assert volume.check() == []
        found = compare(image)
        assert len(found) == 1 + 1 + 1 + len(held) + made
        with mounted(image, "ext2", "ro") as point:
            for path, data in held.items():
                assert Path(os.fsdecode(Kernel(point).at(path))).read_bytes() == data


@pytest.mark.parametrize("shape", _slow(WRITABLE, ("4k-256",)))
def test_one_of_everything_made_here(shape: str, scratch: Path) -> None:
    """The same tree that the kernel makes, made by us, is the same to the kernel."""
    needs_root()
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(shaped(shape, scratch, "-N", "512"))
        twin = stack.enter_context(shaped(shape, scratch, "-N", "512", file="twin"))
        alone = Kernel(stack.enter_context(mounted(twin, "ext2", "noatime")))
        fill(alone, _block_bytes(shape), names=200)
        with writable(image) as volume:
            fill(Ours(volume), _block_bytes(shape), names=200)
            settle(Ours(volume), shape)
            assert volume.check() == []
        settle(alone, shape)
        compare(image)
        with mounted(image, "ext2", "ro") as point:
            ours, theirs = plain(Kernel(point)), plain(alone)
        for path in ours.keys() | theirs.keys():
            assert ours.get(path) == theirs.get(path), path


def test_ext3_is_read_only(scratch: Path) -> None:
    """A journal is not written past (F34); the message says so."""
    with shaped("ext3", scratch) as image, pytest.raises(ODirectError, match=r"journal \(ext3\), which is only read"):
        odirect.open_volume(image, "r+")


def test_features_that_revision_0_gets(scratch: Path) -> None:
    """Attributes and large files make it revision 1, as in the kernel; it stays whole, and can be written again."""
    with shaped("revision-0", scratch) as image:
        assert reading_kit.read_bytes(image, 1024 + 0x4C, 4) == bytes(4)
        with writable(image) as volume:
            volume.write_bytes("/file", b"x")
        reading_kit.check(image)
        assert reading_kit.read_bytes(image, 1024 + 0x4C, 4) == bytes(4)
        with writable(image) as volume:
            volume.set_xattr("/file", "user.name", b"value")
        reading_kit.check(image)
        with writable(image) as volume, volume.open("/file", "r+") as file:
            assert volume.xattrs("/file") == {b"user.name": b"value"}
            file.pwrite(b"far", 1 << 31)
        reading_kit.check(image)
        with writable(image) as volume:
            assert {"ext_attr", "large_file"} <= set(volume.features)
            assert volume.stat("/file").st_size == (1 << 31) + 3
            assert volume.check() == []


def test_attributes_of_users_are_for_files_and_directories(scratch: Path) -> None:
    """As in the kernel; other kinds of attributes may be on anything."""
    with shaped("4k-256", scratch) as image:
        with writable(image) as volume:
            volume.mknod("/fifo", stat.S_IFIFO | 0o600)
            volume.symlink("nowhere", "/link")
            for path in ("/fifo", "/link"):
                with pytest.raises(ODirectError) as caught:
                    volume.set_xattr(path, "user.name", b"value", follow_symlinks=False)
                assert caught.value.errno == errno.EPERM
                volume.set_xattr(path, "trusted.name", b"value", follow_symlinks=False)
                assert volume.xattrs(path, follow_symlinks=False) == {b"trusted.name": b"value"}
            assert volume.readlink("/link") == "nowhere"
        reading_kit.check(image)


def test_the_tools_are_there() -> None:
    """The judges of this file."""
    for tool in ("mke2fs", "debugfs", "e2fsck"):
        needs_tool(tool)
