"""An ext2 volume and a file system in memory that are told to do the same, and must answer the same.

Results, errnos and, in the end, every name, attribute and byte are compared. Paths go through `fs.paths`, so
that symbolic links, their loops and ".." are part of it. A volume may be too small: what fails for want of room
must have changed nothing (F30).
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from tests.dio.kit import drive
from tests.fs.ext2.crash_kit import Fsck
from tests.fs.ext2.crash_model import with_canary
from tests.fs.ext2.raw_image import RawImage
from tests.fs.ext2.writing_kit import device_of, fresh_image

from odirect.base.errors import NoSpaceError
from odirect.block.buffers import empty
from odirect.fs import paths
from odirect.fs.base import FileSystem, VolumeFile
from odirect.fs.ext2.volume import Ext2, open_ext2
from odirect.sched.scheduler import Scheduler
from odirect.testing.memory_fs import MemoryFileSystem

T = TypeVar("T")

ROOMY = (2 << 20, "-b", "1024", "-I", "256", "-N", "256", "-m", "0")
TIGHT = (160 << 10, "-b", "1024", "-I", "256", "-N", "32", "-m", "0")

KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)


class Twins:
    """Both, and the handles that are open on both."""

    def __init__(self, image: tuple[Any, ...] = ROOMY) -> None:
        self.tight = image is TIGHT
        self.device = device_of(with_canary(fresh_image(*image)))
        self.now = 1_700_000_000_000_000_000
        self.log: list[tuple[Any, ...]] = []
        self._open()
        self.model = MemoryFileSystem(
            block_bytes=1024, largest_file=self.ours.max_file_bytes, clock_ns=lambda: self.now, most_links=32000
        )
        self.handles: list[tuple[VolumeFile, VolumeFile]] = []
        self._run(self.ours.rmdir(2, b"lost+found"))
        for side in self.sides:
            self._run(side.set_attributes(side.root, mode=0o755, uid=0, gid=0, atime_ns=self.now, mtime_ns=self.now))

    @property
    def sides(self) -> tuple[FileSystem, FileSystem]:
        return self.ours, self.model

    def _open(self) -> None:
        self.ours: Ext2 = self._run(
            open_ext2(self.device, name="image", writable=True, scheduler=Scheduler(), clock_ns=lambda: self.now)
        )

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return drive(coroutine, self.device)

    def _answer(self, coroutine: Coroutine[Any, Any, Any]) -> tuple[str, Any]:
        try:
            return "gave", self._run(coroutine)
        except OSError as error:
            return "failed", errno.errorcode[error.errno or 0]
        except ValueError:
            return "refused", None

    def both(self, *what: Any, of: Callable[[int], Coroutine[Any, Any, Any]]) -> Any:
        """What ours (0) answers, which is what the model (1) answers."""
        self.now += 1_001_001_001
        self.log.append(what)
        first = self._answer(of(0))
        if self.tight and first == ("failed", "ENOSPC"):
            self.log.append(("there was no room",))
            return first
        second = self._answer(of(1))
        assert first == second, f"{what}: {first}, and the model {second}; before: {self.log[-30:-1]}"
        return first

    # Names.

    def at(
        self,
        path: bytes,
        what: str,
        do: Callable[[FileSystem, paths.Spot], Awaitable[Any]],
        *arguments: Any,
        follow: bool = False,
    ) -> Any:
        """Do something where a path leads, on both."""

        async def go(number: int) -> Any:
            side = self.sides[number]
            return await do(side, await paths.walk(side, path, follow=follow))

        return self.both(what, path, *arguments, of=go)

    def create(self, path: bytes, mode: int, uid: int, gid: int, number: int = 0) -> None:
        async def make(side: FileSystem, spot: paths.Spot) -> None:
            await side.create(spot.directory, spot.name or b".", mode, uid=uid, gid=gid, device_number=number)

        self.at(path, "create", make, oct(mode))

    def symlink(self, path: bytes, target: bytes) -> None:
        async def make(side: FileSystem, spot: paths.Spot) -> None:
            await side.create(spot.directory, spot.name or b".", stat.S_IFLNK | 0o777, target=target)

        self.at(path, "symlink", make, target)

    def unlink(self, path: bytes) -> None:
        self.at(path, "unlink", lambda side, spot: side.unlink(spot.directory, spot.name or b"."))

    def rmdir(self, path: bytes) -> None:
        self.at(path, "rmdir", lambda side, spot: side.rmdir(spot.directory, spot.name or b"."))

    def link(self, source: bytes, path: bytes) -> None:
        async def go(number: int) -> None:
            side = self.sides[number]
            found = await paths.resolve(side, source, follow=False)
            spot = await paths.walk(side, path, follow=False)
            await side.link(found.inode, spot.directory, spot.name or b".")

        self.both("link", source, path, of=go)

    def rename(self, source: bytes, path: bytes) -> None:
        async def go(number: int) -> None:
            side = self.sides[number]
            old = await paths.walk(side, source, follow=False)
            new = await paths.walk(side, path, follow=False)
            await side.rename(old.directory, old.name or b".", new.directory, new.name or b".")

        self.both("rename", source, path, of=go)

    def readdir(self, path: bytes) -> None:
        async def names(side: FileSystem, spot: paths.Spot) -> list[tuple[bytes, str]]:
            return sorted((entry.name, entry.kind) for entry in await side.entries(paths.present(spot).inode))

        self.at(path, "readdir", names, follow=True)

    def read_link(self, path: bytes) -> None:
        self.at(path, "readlink", lambda side, spot: side.read_link(paths.present(spot).inode))

    # Attributes.

    def stat(self, path: bytes, follow: bool) -> None:
        async def look(side: FileSystem, spot: paths.Spot) -> Any:
            return self._attributes(paths.present(spot))

        self.at(path, "stat", look, follow=follow)

    def _attributes(self, found: Any) -> tuple[Any, ...]:
        size = 0 if stat.S_ISDIR(found.mode) else found.size
        times = () if self.tight else (found.atime_ns, found.mtime_ns, found.ctime_ns)
        return stat.filemode(found.mode), found.links, found.uid, found.gid, size, found.device_number, times

    def set_attributes(self, path: bytes, values: dict[str, int]) -> None:
        async def change(side: FileSystem, spot: paths.Spot) -> None:
            await side.set_attributes(paths.present(spot).inode, **values)  # type: ignore[arg-type]

        self.at(path, "set_attributes", change, values, follow=True)

    def set_xattr(self, path: bytes, name: bytes, value: bytes | None) -> None:
        async def change(side: FileSystem, spot: paths.Spot) -> None:
            await side.set_xattr(paths.present(spot).inode, name, value)

        self.at(path, "set_xattr", change, name, value)

    def xattrs(self, path: bytes) -> None:
        self.at(path, "xattrs", lambda side, spot: side.xattrs(paths.present(spot).inode))

    # Files.

    def open(self, path: bytes) -> None:
        opened: list[VolumeFile] = []

        async def go(side: FileSystem, spot: paths.Spot) -> int:
            opened.append(await side.open_file(paths.present(spot).inode, writable=True))
            return opened[-1].size_bytes

        self.at(path, "open", go, follow=True)
        if len(opened) == 2:
            self.handles.append((opened[0], opened[1]))

    def _handle(self, which: int) -> tuple[VolumeFile, VolumeFile] | None:
        return self.handles[which % len(self.handles)] if self.handles else None

    def write(self, which: int, offset: int | None, length: int, value: int, access: Any) -> None:
        handle = self._handle(which)
        if handle is None:
            return
        memory = empty(length)
        memory[:] = bytes([value]) * length
        moved: list[int] = []

        async def go(number: int) -> int:
            part = memory[: moved[0]] if moved and self.tight else memory
            done = await handle[number].write(offset, [part], access=access)
            moved.append(done.transferred)
            return done.transferred

        self.both("write", which, offset, length, access, of=go)

    def read(self, which: int, offset: int, length: int, access: Any) -> None:
        handle = self._handle(which)
        if handle is None:
            return
        memory = empty(length)

        async def go(number: int) -> bytes:
            done = await handle[number].read(offset, [memory], access=access)
            return bytes(memory[: done.transferred])

        self.both("read", which, offset, length, access, of=go)

    def truncate(self, which: int, size: int) -> None:
        handle = self._handle(which)
        if handle is not None:
            self.both("truncate", which, size, of=lambda number: handle[number].truncate(size))

    def punch(self, which: int, offset: int, length: int) -> None:
        handle = self._handle(which)
        if handle is not None:
            self.both("punch", which, offset, length, of=lambda number: handle[number].punch(offset, length))

    def fsync(self, which: int) -> None:
        handle = self._handle(which)
        if handle is not None:
            self.both("fsync", which, of=lambda number: handle[number].sync())

    def close(self, which: int) -> None:
        handle = self._handle(which)
        if handle is not None:
            self.handles.remove(handle)
            self.both("close", which, of=lambda number: handle[number].close())

    # The volume.

    def sync(self) -> None:
        self.both("sync", of=lambda number: self.sides[number].sync())

    def reopen(self) -> None:
        while self.handles:
            self.close(0)
        self.log.append(("reopen",))
        self._run(self.ours.close())
        self._open()

    def judge(self, fsck: Fsck) -> None:
        """Compare all there is, before and after it was closed; e2fsck finds nothing."""
        expected = self.tree(self.model)
        assert self.tree(self.ours) == expected, f"{_differing(self.tree(self.ours), expected)}; {self.log[-40:]}"
        self.reopen()
        expected = self.tree(self.model)
        assert self.tree(self.ours) == expected, f"{_differing(self.tree(self.ours), expected)}; {self.log[-40:]}"
        assert self.ours.allocator.reserved == 0
        self._run(self.ours.close())
        image = bytes(self.device.data)
        fsck.image.write_bytes(image)
        status, said = fsck.run("-fn")
        assert status == 0, f"{said}\n{self.log[-60:]}"
        raw = RawImage(image)
        for path, number in raw.paths().items():
            assert raw.records[number].content == expected[path][1] or raw.records[number].kind != stat.S_IFREG, path

    def tree(self, side: FileSystem) -> dict[bytes, tuple[Any, ...]]:
        """Every path with all that can be told of it."""

        async def walk() -> dict[bytes, tuple[Any, ...]]:
            found: dict[bytes, tuple[Any, ...]] = {
                b"": (self._attributes(await side.attributes(side.root)), None, await side.xattrs(side.root))
            }
            waiting = [(b"", side.root)]
            while waiting:
                path, directory = waiting.pop()
                for entry in await side.entries(directory):
                    below = path + b"/" + entry.name if path else entry.name
                    attributes = await side.attributes(entry.inode)
                    assert entry.kind == attributes.kind, f"{below!r} is a {attributes.kind}, listed as {entry.kind}"
                    content: bytes | None = None
                    if stat.S_ISLNK(attributes.mode):
                        content = await side.read_link(entry.inode)
                    elif stat.S_ISREG(attributes.mode):
                        content = await self._content(side, entry.inode)
                    elif stat.S_ISDIR(attributes.mode):
                        waiting.append((below, entry.inode))
                    found[below] = self._attributes(attributes), content, await side.xattrs(entry.inode)
            return found

        return self._run(walk())

    async def _content(self, side: FileSystem, number: int) -> bytes:
        file = await side.open_file(number, writable=False)
        try:
            memory = empty(file.size_bytes)
            done = await file.read(0, [memory]) if len(memory) else None
            return bytes(memory[: done.transferred if done else 0])
        finally:
            await file.close()

    def compare_mounted(self, point: Path) -> None:
        """What Linux sees there is what the model has."""
        for path, (attributes, content, xattrs) in self.tree(self.model).items():
            there = os.path.join(os.fsencode(point), path)
            seen = os.lstat(there)
            mode, links, uid, gid, size, number, times = attributes
            assert (stat.filemode(seen.st_mode), seen.st_nlink, seen.st_uid, seen.st_gid) == (mode, links, uid, gid), (
                path
            )
            assert mode[0] == "d" or seen.st_size == size, path
            assert mode[0] not in "bc" or seen.st_rdev == number, path
            assert not times or (seen.st_mtime_ns, seen.st_ctime_ns) == times[1:], path
            if mode[0] == "l":
                assert os.readlink(there) == content, path
            elif mode[0] == "-":
                assert Path(os.fsdecode(there)).read_bytes() == content, path
            found = {
                name: os.getxattr(there, name, follow_symlinks=False)
                for name in os.listxattr(there, follow_symlinks=False)
            }
            assert {os.fsencode(name): value for name, value in found.items()} == xattrs, (path, found, xattrs)


def _differing(one: dict[bytes, Any], other: dict[bytes, Any]) -> str:
    return "; ".join(
        f"{path!r}: {str(one.get(path))[:300]}, and the model {str(other.get(path))[:300]}"
        for path in sorted({*one, *other})
        if one.get(path) != other.get(path)
    )


# --- random programs -----------------------------------------------------------------------------

NAMES = (b"a", b"b", b"c", b"dir", b"dir/x", b"dir/sub", b"dir/sub/y", b"a/z", b"link", b"link/x", b"dir/../b", b"..")
ODD = (b"", b"/", b".", b"dir/", b"b/", b"dir/.", b"n" * 255, b"n" * 256, b"dir//x", b"dir/sub/..", b"nothing/x")
TARGETS = (b"dir", b"a", b"/dir/sub", b"link", b"../b", b"nowhere", b"t" * 70, b"t" * 1023, b"t" * 1024, b"dir/sub/")
XATTRS = (b"user.one", b"user.two", b"trusted.three", b"security.four")


def random_step(twins: Twins, dice: random.Random) -> None:
    """One random operation on both."""

    def path() -> bytes:
        return dice.choice(NAMES if dice.random() < 0.9 else ODD)

    which = dice.randrange(8)
    verb = dice.choices(
        ("create", "symlink", "unlink", "rmdir", "link", "rename", "readdir", "readlink", "stat", "attributes", "xattr",
         "xattrs", "open", "write", "read", "truncate", "punch", "fsync", "close", "sync", "reopen"),
        (14, 4, 6, 4, 5, 10, 3, 1, 4, 5, 5, 2, 8, 14, 5, 4, 3, 2, 4, 1, 0.5),
    )[0]  # fmt: skip
    offset = dice.choice((0, 512, 1000, 1024, 12 << 10, 13 << 10, dice.randrange(20 << 10)))
    length = dice.choice((1, 512, 1024, 3000, 4096, 0))
    if verb == "create":
        mode = dice.choice((KINDS[0], KINDS[0], KINDS[1], KINDS[1], dice.choice(KINDS))) | dice.choice(
            (0o644, 0o755, 0o2775)
        )
        twins.create(path(), mode, dice.choice((0, 7)), dice.choice((0, 70000)), dice.choice((0, 0x103, 0x12345)))
    elif verb == "symlink":
        twins.symlink(path(), dice.choice(TARGETS))
    elif verb == "unlink":
        twins.unlink(path())
    elif verb == "rmdir":
        twins.rmdir(path())
    elif verb == "link":
        twins.link(path(), path())
    elif verb == "rename":
        twins.rename(path(), path())
    elif verb == "readdir":
        twins.readdir(path())
    elif verb == "readlink":
        twins.read_link(path())
    elif verb == "stat":
        twins.stat(path(), dice.random() < 0.5)
    elif verb == "attributes":
        twins.set_attributes(
            path(),
            dice.choice(
                ({"mode": 0o600}, {"mode": 0o6755}, {"uid": 99, "gid": 1 << 20}, {"mtime_ns": 5}, {"atime_ns": 10**18})
            ),
        )
    elif verb == "xattr":
        twins.set_xattr(path(), dice.choice(XATTRS), dice.choice((None, b"", b"value", b"v" * 200)))
    elif verb == "xattrs":
        twins.xattrs(path())
    elif verb == "open":
        twins.open(path())
    elif verb == "write":
        access = dice.choice(("auto", "buffered"))
        twins.write(which, dice.choice((offset, offset, None)), length, dice.randrange(1, 200), access)
    elif verb == "read":
        twins.read(which, offset, length, dice.choice(("auto", "buffered")))
    elif verb == "truncate":
        twins.truncate(which, dice.choice((0, offset, 300 << 10)))
    elif verb == "punch":
        twins.punch(which, offset, length or 1)
    elif verb == "fsync":
        twins.fsync(which)
    elif verb == "close":
        twins.close(which)
    elif verb == "sync":
        twins.sync()
    else:
        twins.reopen()


def run_twins(seed: int, steps: int, image: tuple[Any, ...], fsck: Fsck) -> Twins:
    """A random program. AssertionError with its seed."""
    dice = random.Random(seed)
    twins = Twins(image)
    try:
        for _ in range(steps):
            random_step(twins, dice)
        twins.judge(fsck)
    except NoSpaceError as error:
        raise AssertionError(f"seed {seed}: {error!r} {twins.log[-20:]}") from error
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    return twins
