"""`odirect.aio.open_volume`: file systems inside image files and devices that are not mounted, for asyncio.

    async with odirect.aio.open_volume("disk.img", "r+") as volume:
        await volume.mkdir("/new")
        async with volume.open("/data.bin") as file:
            buffers = [odirect.empty(4096) for _ in range(32)]
            await asyncio.gather(*(file.preadinto(b, i * 4096) for i, b in enumerate(buffers)))

Each volume has a ring of its own, in the thread of the loop that opened it. What is done is what
`odirect.Volume` does under the same name. A caller who is cancelled stops waiting; what he began goes on, and
`close` waits for it. Looking and changing in memory is done in the loop's thread: a `check` of a large volume keeps
the loop busy for as long as it computes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import stat
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, AnyStr, Generic, TypeVar, overload

from odirect import volume_tasks as tasks
from odirect.aio_opening import Opening
from odirect.aio_runner import LoopRunner
from odirect.aio_volume_copy import Copying
from odirect.aio_volume_file import FileInVolume, OpenFile
from odirect.base.errors import (
    ClosedError,
    MissingError,
    ODirectError,
    PathError,
)
from odirect.block.buffers import as_bytes_view
from odirect.block.device import BlockDevice
from odirect.dio.mapping import Extent
from odirect.dio.opening import Path, parse_mode
from odirect.fs import tree
from odirect.fs.base import Access, Attributes, FileKind, FileSystem, Finding, VolumeFile
from odirect.fs.paths import path_bytes, resolve
from odirect.fs.tree import ROOT, Owner
from odirect.volume_bulk import find_files, path_below, read_window, windows
from odirect.volume_copy import Progress, TreeReport
from odirect.volume_copy_in import copy_in
from odirect.volume_copy_out import copy_out
from odirect.volume_entries import stat_result, statvfs_result
from odirect.volume_facts import VolumeFacts, device_number
from odirect.volume_names import InVolume, VolumeNames
from odirect.volume_opening import SMALLEST_BLOCK_BYTES, Image, LockedImage, lock_image, mount
from odirect.volume_pure_path import PureVolumePath
from odirect.volume_runner import named

__all__ = ["Entry", "Volume", "open_volume"]

T = TypeVar("T")

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes] | InVolume


def open_volume(
    path: Path,
    mode: str = "r",
    *,
    overwrite_in_use: bool = False,
    owner: tuple[int, int] | None = None,
    use_reserved: bool = False,
) -> Opening[Volume]:
    """A `Volume`, when awaited or entered with `async with`. Arguments and errors as for `odirect.open_volume`."""
    if mode not in ("r", "r+"):
        raise ValueError(f"mode {mode!r}: use 'r' or 'r+'")
    writable = mode == "r+"
    whose = Owner(os.geteuid(), os.getegid()) if owner is None else Owner(*owner)

    def lock() -> LockedImage:
        return lock_image(path, writable=writable, overwrite_in_use=overwrite_in_use)

    async def begin() -> Volume:
        mounting = _Mounting(await asyncio.to_thread(lock), writable=writable, use_reserved=use_reserved)
        return Volume(await mounting.mount(), mounting.runner, image=mounting.image, owner=whose)

    async def make() -> Volume:
        opening = asyncio.ensure_future(begin())
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # It goes on, and what it opens is closed when it is there.
            opening.add_done_callback(_close_opened)
            raise

    return Opening(make)


def _close_opened(opening: asyncio.Future[Volume]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result()._open.begin_closing()


class _Mounting:
    """An image in this thread's loop, and the file system in it."""

    def __init__(self, locked: LockedImage, *, writable: bool, use_reserved: bool) -> None:
        try:
            self.image = Image(locked, shared=False)
        except BaseException:
            locked.close()
            raise
        self.runner = LoopRunner(asyncio.get_running_loop(), self.image.scheduler, self.image.name)
        self._writable = writable
        self._use_reserved = use_reserved
        self._mounted: FileSystem | None = None

    async def mount(self) -> FileSystem:
        """The file system, open. If it cannot be, everything is closed."""
        driver = self.runner.driver
        try:
            driver.watch(self.image.polled)
            if self.image.align_bytes > SMALLEST_BLOCK_BYTES:
                await self._choose_way()
            await self.runner.start(self._open(self.image.device, self._writable), self.image.name)
            if self._mounted is None:
                raise RuntimeError("a file system was opened and is not there")
            return self._mounted
        except BaseException as error:
            if not isinstance(error, ODirectError):
                # The loop ends: a volume that was begun to be written must not stay marked as in use.
                with contextlib.suppress(ODirectError):
                    self.runner.finish(self._give_up())
            driver.unwatch(self.image.polled)
            self.image.close()
            raise

    async def _choose_way(self) -> None:
        """Go through the page cache where blocks are smaller than what the device takes; a look says how large."""
        driver = self.runner.driver
        with self.image.beside() as device:
            driver.watch(device)
            try:
                await self.runner.start(self._open(device, False), self.image.name)
                if self._mounted is None:
                    raise RuntimeError("a file system was opened and is not there")
                looked, self._mounted = self._mounted, None
                await self.runner.start(looked.close(), self.image.name)
            finally:
                driver.unwatch(device)
        if looked.block_bytes % self.image.align_bytes:
            driver.unwatch(self.image.polled)
            self.image.use_cache()
            driver.watch(self.image.polled)

    async def _open(self, device: BlockDevice, writable: bool) -> None:
        self._mounted = await mount(self.image, device, writable=writable, use_reserved=self._use_reserved)

    async def _give_up(self) -> None:
        await self.runner.busy.zero()
        if self._mounted is not None:
            await self._mounted.close()


class Entry(Generic[AnyStr]):
    """A name in a directory of a volume: `os.DirEntry`, but what may look at the volume is to be awaited.

    name, and path (what was scanned, and the name), are of the type of the scanned path.
    """

    __slots__ = ("_inode", "_kind", "_volume", "name", "path")

    def __init__(self, volume: Volume, name: AnyStr, path: AnyStr, inode: int, kind: FileKind) -> None:
        self.name: AnyStr = name
        self.path: AnyStr = path
        self._volume = volume
        self._inode = inode
        self._kind = kind

    def inode(self) -> int:
        """The number of its inode."""
        return self._inode

    async def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a directory, or leads to one. False if there is nothing any more."""
        return await self._is(FileKind.DIRECTORY, follow_symlinks)

    async def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a regular file, or leads to one. False if there is nothing any more."""
        return await self._is(FileKind.REGULAR, follow_symlinks)

    async def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return await self._is(FileKind.SYMLINK, False)

    async def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """What it is now."""
        return await self._volume.stat(self.path, follow_symlinks=follow_symlinks)

    def __repr__(self) -> str:
        return f"<aio.Entry {self.name!r}>"

    async def _is(self, wanted: FileKind, follow: bool) -> bool:
        known = self._kind
        if known is not FileKind.UNKNOWN and not (follow and known is FileKind.SYMLINK):
            return known is wanted
        try:
            found = await self._volume.attributes(self.path, follow_symlinks=follow)
        except MissingError:
            return False
        return found.kind is wanted


class _OpenVolume:
    """The part of a volume that what is in flight refers to; it is kept until it is closed, unlike its `Volume`."""

    def __init__(self, file_system: FileSystem, runner: LoopRunner, image: Image | None) -> None:
        self.file_system = file_system
        self.runner = runner
        self.image = image
        self.files: set[OpenFile] = set()
        #: Copies that have not ended; closing begins when they have.
        self.copies: set[Copying] = set()
        #: Done when closing has begun, if it waits for copies.
        self.waiting: asyncio.Future[None] | None = None
        #: Whether nothing is left of it.
        self.released = False
        _open.add(self)

    def begin_closing(self) -> None:
        """Begin what `Volume.close` does, in the loop's thread."""
        if self.runner.closed or self.released or self.waiting is not None:
            return
        if self.copies:
            self.waiting = self.runner.loop.create_future()
        else:
            self._begin_closing()

    def add_copy(self, copying: Copying) -> None:
        """Have closing wait for a copy."""
        self.copies.add(copying)

        def ended(future: asyncio.Future[TreeReport]) -> None:
            _nobody_asks(future)
            self.copies.discard(copying)
            if self.waiting is not None and not self.copies and not self.waiting.done():
                if not self.runner.closed:
                    self._begin_closing()
                self.waiting.set_result(None)

        copying.ended.add_done_callback(ended)

    def _begin_closing(self) -> None:
        for file in self.files:
            file.closed = True
        self.runner.end(self._shut_down(), self.file_system.name).add_done_callback(self._ended)

    def close_without_loop(self) -> None:
        """Do it at once, where the loop is closed. In a child, or another thread, let go of the descriptors instead."""
        for file in self.files:
            file.closed = True
        if self.runner.forked or self.runner.elsewhere:
            # Its ring is another's; what was not synced is lost.
            if self.image is not None:
                self.image.forget()
            self.released = True
            _open.discard(self)
            return
        try:
            self.runner.finish(self._shut_down())
        except ODirectError as error:
            raise named(error, self.file_system.name) from error.__cause__
        finally:
            self._release()

    def abandon(self, file: OpenFile) -> None:
        """See `aio_volume_file.Home`."""
        if not (self.runner.closed or file.closed):
            self.runner.start(file.shut(), file.name).add_done_callback(_nobody_asks)

    def closed_file(self, file: OpenFile) -> None:
        """See `aio_volume_file.Home`."""
        self.files.discard(file)

    def abandon_opened(self, opening: asyncio.Future[VolumeFile]) -> None:
        """Close what was opened for a caller who was cancelled."""
        if not (opening.cancelled() or opening.exception() is not None or self.runner.closed):
            self.runner.start(opening.result().close(), self.file_system.name).add_done_callback(_nobody_asks)

    async def _shut_down(self) -> None:
        await self.runner.busy.zero()
        failed: ODirectError | None = None
        for file in list(self.files):
            try:
                await file.shut()
            except ODirectError as error:
                failed = failed or named(error, file.name)
        try:
            await self.file_system.close()
        except ODirectError as error:
            raise error from failed
        if failed is not None:
            raise failed

    def _ended(self, ended: asyncio.Future[None]) -> None:
        _nobody_asks(ended)
        self._release()

    def _release(self) -> None:
        if self.released:
            return
        self.released = True
        _open.discard(self)
        if self.image is not None:
            self.runner.driver.unwatch(self.image.polled)
            self.image.close()


class Volume(VolumeFacts):
    """An open volume of one event loop: its files and directories by paths from its root. Made by `open_volume`.

    A path is str, bytes, a PathLike or `volume / "name"`; what is given back is of its type. Nobody's permissions
    are checked.
    """

    def __init__(
        self, file_system: FileSystem, runner: LoopRunner, *, image: Image | None, owner: Owner = ROOT
    ) -> None:
        """image: what it is on, closed with the volume; None for a file system that is on nothing.

        owner: whose what is made will be.
        """
        self.file_system = file_system
        self.runner = runner
        self.owner = owner
        self._image = image
        self._reasons = {} if image is None else image.reasons
        self._open = _OpenVolume(file_system, runner, image)
        self._device = device_number(file_system)

    # What it is.

    @property
    def closed(self) -> bool:
        """Whether it has been closed, or is being closed."""
        return self.runner.closed or self._open.released or self._open.waiting is not None

    def __repr__(self) -> str:
        return self._shown("odirect.aio.Volume")

    def __truediv__(self, segment: AnyPath) -> PureVolumePath:
        return PureVolumePath(self, segment)

    @property
    def root(self) -> PureVolumePath:
        """The root directory as a path: it names, and the volume's methods take it; it asks nothing itself."""
        return PureVolumePath(self)

    # As a whole.

    async def statfs(self) -> os.statvfs_result:
        """How full it is, as `os.statvfs` gives it."""
        space = await self._run(self.file_system.space(), self.name)
        return statvfs_result(space, writable=self.writable)

    async def sync(self) -> None:
        """Make everything durable: files and names."""
        await self._run(self.file_system.sync(), self.name)

    async def check(self) -> list[Finding]:
        """What is wrong with it, found by a walk that only reads."""
        return await self._run(self.file_system.check(), self.name)

    async def read_files(self, top: AnyPath = "/") -> AsyncIterator[tuple[Any, bytes]]:
        """(path, content) of every regular file below the directory `top`, or of the file that `top` is.

        As `odirect.Volume.read_files`: many at a time, the next ones being read while some are handed out.
        """
        encoded, shown = self._path(top)
        files = await self._run(find_files(self.file_system, encoded), shown)
        portions = windows(files, lambda file: file[1].size)

        def begin() -> tuple[Sequence[tuple[bytes, Attributes]], asyncio.Future[list[bytes]]] | None:
            window = next(portions, None)
            if window is None:
                return None
            reading = self.runner.start(read_window(self.file_system, [found for _, found in window]), shown)
            reading.add_done_callback(_nobody_asks)
            return window, reading

        ahead = begin()
        while ahead is not None:
            window, reading = ahead
            contents = await reading
            ahead = begin()
            for (below, _), content in zip(window, contents, strict=True):
                yield path_below(shown, below), content

    async def copy_in(
        self,
        source: Path,
        target: AnyPath,
        *,
        recursive: bool = True,
        attributes: bool = True,
        progress: Progress | None = None,
    ) -> TreeReport:
        """A report of copying `source`, a file or directory of the host, to `target` in the volume.

        As `odirect.Volume.copy_in`; the host's side is done in a thread. progress: called in the loop's thread. A
        caller who is cancelled ends the copy at its next chunk; it cleans up, and `close` waits for that.
        """
        _, inside = self._path(target)

        def copy(volume: VolumeNames, tell: Progress) -> TreeReport:
            return copy_in(volume, source, inside, recursive=recursive, attributes=attributes, progress=tell)

        return await self._copy(copy, progress)

    async def copy_out(
        self,
        source: AnyPath,
        target: Path,
        *,
        recursive: bool = True,
        attributes: bool = True,
        progress: Progress | None = None,
    ) -> TreeReport:
        """A report of copying `source`, a file or directory of the volume, to `target` on the host.

        As `odirect.Volume.copy_out`, and otherwise as `copy_in`.
        """
        _, inside = self._path(source)

        def copy(volume: VolumeNames, tell: Progress) -> TreeReport:
            return copy_out(volume, inside, target, recursive=recursive, attributes=attributes, progress=tell)

        return await self._copy(copy, progress)

    # Files.

    def open(
        self,
        path: AnyPath,
        mode: str = "r",
        *,
        access: Access = "auto",
        dsync: bool = False,
        nowait: bool = False,
        hipri: bool = False,
        atomic: bool = False,
        permissions: int = 0o644,
    ) -> Opening[FileInVolume]:
        """The regular file at `path`, when awaited or entered with `async with`.

        The arguments and errors are those of `odirect.Volume.open`; there is no position, so "a" is a mode
        that makes a file and cuts nothing.
        """
        opening = parse_mode(mode)
        encoded, shown = self._path(path)
        flags = tasks.transfer_flags(
            opening, access, self._reasons, shown, dsync=dsync, nowait=nowait, hipri=hipri, atomic=atomic
        )
        seen = self._image.seen if self._image is not None and self._reasons else None

        async def make() -> FileInVolume:
            begin = tasks.open_file(self.file_system, encoded, opening, permissions=permissions, owner=self.owner)
            handle = self.runner.start(begin, shown)
            try:
                file = OpenFile(self._open, await asyncio.shield(handle), shown, access, flags, seen)
            except asyncio.CancelledError:
                # The file is opened all the same, and nobody has it.
                handle.add_done_callback(self._open.abandon_opened)
                raise
            self._open.files.add(file)
            return FileInVolume(file, opening, self)

        return Opening(make)

    async def read_bytes(self, path: AnyPath) -> bytes:
        """All bytes of the file at `path`."""
        encoded, shown = self._path(path)
        return await self._run(tasks.read_bytes(self.file_system, encoded), shown)

    async def write_bytes(self, path: AnyPath, data: object, *, permissions: int = 0o644) -> int:
        """How many bytes were written: all of `data`, which the file at `path` then holds, and nothing else."""
        encoded, shown = self._path(path)
        view = as_bytes_view(data, writable=False)
        write = tasks.write_bytes(self.file_system, encoded, view, permissions=permissions, owner=self.owner)
        return await self._run(write, shown)

    async def extents(self, path: AnyPath, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Where the bytes of the file at `path` are on the device, holes included, in order."""
        async with self.open(path) as file:
            return await file.extents(offset, length)

    # Looking.

    async def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """What is at `path`; follow_symlinks: what a symbolic link leads to."""
        return stat_result(await self.attributes(path, follow_symlinks=follow_symlinks), self._device)

    async def lstat(self, path: AnyPath) -> os.stat_result:
        """What is at `path`, be it a symbolic link."""
        return await self.stat(path, follow_symlinks=False)

    async def attributes(self, path: AnyPath, *, follow_symlinks: bool = True) -> Attributes:
        """What is at `path`, as the file system says it."""
        encoded, shown = self._path(path)
        return await self._run(resolve(self.file_system, encoded, follow=follow_symlinks), shown)

    async def exists(self, path: AnyPath, *, follow_symlinks: bool = True) -> bool:
        """Whether there is anything at `path`."""
        return await self._kind(path, follow_symlinks) is not None

    async def is_dir(self, path: AnyPath, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a directory at `path`."""
        return await self._kind(path, follow_symlinks) is FileKind.DIRECTORY

    async def is_file(self, path: AnyPath, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a regular file at `path`."""
        return await self._kind(path, follow_symlinks) is FileKind.REGULAR

    async def is_symlink(self, path: AnyPath) -> bool:
        """Whether there is a symbolic link at `path`."""
        return await self._kind(path, False) is FileKind.SYMLINK

    @overload
    async def scandir(self, path: bytes | os.PathLike[bytes]) -> list[Entry[bytes]]: ...
    @overload
    async def scandir(self, path: str | os.PathLike[str] | InVolume = "/") -> list[Entry[str]]: ...
    async def scandir(self, path: AnyPath = "/") -> list[Entry[bytes]] | list[Entry[str]]:
        """The entries of the directory at `path`, but "." and "..", as it is now."""
        encoded, shown = self._path(path)
        found = await self._run(tree.list_directory(self.file_system, encoded), shown)
        if isinstance(shown, bytes):
            return [Entry(self, name, os.path.join(shown, name), number, kind) for name, number, kind in found]
        decoded = [(os.fsdecode(name), number, kind) for name, number, kind in found]
        return [Entry(self, name, os.path.join(shown, name), number, kind) for name, number, kind in decoded]

    @overload
    async def listdir(self, path: bytes | os.PathLike[bytes]) -> list[bytes]: ...
    @overload
    async def listdir(self, path: str | os.PathLike[str] | InVolume = "/") -> list[str]: ...
    async def listdir(self, path: AnyPath = "/") -> list[str] | list[bytes]:
        """The names in the directory at `path`."""
        encoded, shown = self._path(path)
        found = await self._run(tree.list_directory(self.file_system, encoded), shown)
        if isinstance(shown, bytes):
            return [entry.name for entry in found]
        return [os.fsdecode(entry.name) for entry in found]

    async def walk(
        self,
        top: AnyPath = "/",
        *,
        topdown: bool = True,
        onerror: Callable[[ODirectError], object] | None = None,
        followlinks: bool = False,
    ) -> AsyncIterator[tuple[Any, list[Any], list[Any]]]:
        """(directory, names of directories in it, other names) for `top` and all below, as `os.walk` does.

        topdown: a directory before what is in it; then what is taken out of its list of directories is not
        gone into. onerror: called with the error of a directory that cannot be listed; else it is left out.
        """
        stack: list[Any] = [self._path(top)[1]]
        while stack:
            place = stack.pop()
            if isinstance(place, tuple):
                yield place
                continue
            try:
                directories, others, links = await self._sorted(place)
            except ODirectError as error:
                if onerror is not None:
                    onerror(error)
                continue
            if topdown:
                yield place, directories, others  # The caller may change the list.
            else:
                stack.append((place, directories, others))
            stack += [os.path.join(place, name) for name in reversed(directories) if followlinks or name not in links]

    @overload
    async def readlink(self, path: bytes | os.PathLike[bytes]) -> bytes: ...
    @overload
    async def readlink(self, path: str | os.PathLike[str] | InVolume) -> str: ...
    async def readlink(self, path: AnyPath) -> str | bytes:
        """Where the symbolic link at `path` leads."""
        encoded, shown = self._path(path)
        target = await self._run(tree.read_link(self.file_system, encoded), shown)
        return target if isinstance(shown, bytes) else os.fsdecode(target)

    async def xattrs(self, path: AnyPath, *, follow_symlinks: bool = True) -> dict[bytes, bytes]:
        """The extended attributes of what is at `path`, by their full names (b"user.comment")."""
        encoded, shown = self._path(path)
        return await self._run(tasks.xattrs(self.file_system, encoded, follow=follow_symlinks), shown)

    # Making.

    async def mkdir(self, path: AnyPath, mode: int = 0o755, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory; parents: and what is missing above it; exist_ok: one that is there will do."""
        encoded, shown = self._path(path)
        make = tasks.make_directory(
            self.file_system, encoded, mode, owner=self.owner, parents=parents, exist_ok=exist_ok
        )
        await self._run(make, shown)

    async def makedirs(self, path: AnyPath, mode: int = 0o755, exist_ok: bool = False) -> None:
        """Make a directory and what is missing above it, as `os.makedirs` does."""
        await self.mkdir(path, mode, parents=True, exist_ok=exist_ok)

    async def mknod(self, path: AnyPath, mode: int = tasks.NEW_NODE, device: int = 0) -> None:
        """Make an empty file, fifo, socket or device; mode: its type (a file, if none is said) and permissions."""
        await self._make(path, tasks.node_mode(mode, self._path(path)[1]), device_number=device)

    async def symlink(self, target: AnyPath, path: AnyPath) -> None:
        """Make `path` a symbolic link to `target`, which need not be there, and is kept as it is given."""
        await self._make(path, stat.S_IFLNK | 0o777, target=self._path(target)[0])

    async def link(self, source: AnyPath, path: AnyPath, *, follow_symlinks: bool = False) -> None:
        """Give what is at `source` the name `path` too (a hard link)."""
        await self._run_both(
            source, path, lambda old, new: tree.link(self.file_system, old, new, follow=follow_symlinks)
        )

    # Moving and removing.

    async def rename(self, source: AnyPath, path: AnyPath) -> None:
        """Move `source` to `path`, over what is there, as rename(2) does."""
        await self._run_both(source, path, lambda old, new: tree.rename(self.file_system, old, new))

    replace = rename

    async def remove(self, path: AnyPath) -> None:
        """Remove a name of what is no directory."""
        encoded, shown = self._path(path)
        await self._run(tree.unlink(self.file_system, encoded), shown)

    unlink = remove

    async def rmdir(self, path: AnyPath) -> None:
        """Remove an empty directory."""
        encoded, shown = self._path(path)
        await self._run(tree.remove_directory(self.file_system, encoded), shown)

    async def rmtree(self, path: AnyPath) -> None:
        """Remove a directory and everything in it; symbolic links are removed, not followed."""
        encoded, shown = self._path(path)
        await self._run(tree.remove_tree(self.file_system, encoded), shown)

    # Changing.

    async def chmod(self, path: AnyPath, mode: int, *, follow_symlinks: bool = True) -> None:
        """Set the permissions of what is at `path`. Those of a symbolic link cannot be set: UnsupportedError."""
        encoded, shown = self._path(path)
        await self._run(tasks.change_mode(self.file_system, encoded, mode, follow=follow_symlinks), shown)

    async def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """Set the owner and group of what is at `path`; -1 leaves one as it is."""
        encoded, shown = self._path(path)
        change = tasks.change_owner(self.file_system, encoded, uid, gid, follow=follow_symlinks)
        await self._run(change, shown)

    async def utime(
        self,
        path: AnyPath,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        """Set the times of access and change, in seconds or nanoseconds; without either, to now."""
        chosen_ns = tasks.chosen_times(times, ns)
        encoded, shown = self._path(path)
        change = tasks.change_times(self.file_system, encoded, chosen_ns, follow=follow_symlinks)
        await self._run(change, shown)

    async def set_xattr(self, path: AnyPath, name: str | bytes, value: bytes, *, follow_symlinks: bool = True) -> None:
        """Set an extended attribute; name: in full ("user.comment")."""
        await self._change_xattr(path, name, bytes(as_bytes_view(value, writable=False)), follow_symlinks)

    async def remove_xattr(self, path: AnyPath, name: str | bytes, *, follow_symlinks: bool = True) -> None:
        """Remove an extended attribute; PathError with ENODATA if there is none."""
        await self._change_xattr(path, name, None, follow_symlinks)

    # Closing.

    async def close(self) -> None:
        """Wait for what was begun, close the files, make everything durable, mark it clean. Twice is harmless.

        Raises what cannot be written; it is closed all the same. A caller who is cancelled meanwhile does not keep
        it open. Where its loop has been closed, it is done at once, which blocks.
        """
        open_volume = self._open
        if open_volume.released:
            return
        if self.runner.forked or self.runner.loop.is_closed():
            open_volume.close_without_loop()
            return
        self.runner.check_loop()
        open_volume.begin_closing()
        if open_volume.waiting is not None:
            await asyncio.shield(open_volume.waiting)
        if self.runner.ended is not None:
            await asyncio.shield(self.runner.ended)

    async def __aenter__(self) -> Volume:
        self.runner.check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if not hasattr(self, "_device") or self._open.released or sys.is_finalizing():
            return
        if not (self.closed or self.runner.forked):
            warnings.warn(f"a volume was not closed: {self!r}", ResourceWarning, stacklevel=2, source=self)
        loop = self.runner.loop
        if self.runner.forked or loop.is_closed():
            self._open.close_without_loop()
        else:
            loop.call_soon_threadsafe(self._open.begin_closing)

    # How.

    async def _copy(self, copy: Callable[[VolumeNames, Progress], TreeReport], progress: Progress | None) -> TreeReport:
        if self.closed:
            raise ClosedError("the volume is closed", path=self.name)
        copying = Copying(self.file_system, self.runner, self.owner, progress, copy)
        self._open.add_copy(copying)
        try:
            return await asyncio.shield(copying.ended)
        except asyncio.CancelledError:
            copying.stop()
            raise

    async def _run(self, coroutine: Coroutine[Any, Any, T], shown: object) -> T:
        """What `coroutine` returns; its errors name `shown`. It goes on when the caller is cancelled."""
        return await self.runner.start(coroutine, shown)

    def _path(self, path: AnyPath) -> tuple[bytes, str | bytes]:
        """A path as the file system has it, and as messages show it: as it was given."""
        if isinstance(path, InVolume):
            if path.volume is not self:
                raise ValueError(f"{path} belongs to another volume")
            path = path.path
        return path_bytes(path), os.fspath(path)

    async def _run_both(
        self, source: AnyPath, path: AnyPath, call: Callable[[bytes, bytes], Coroutine[Any, Any, None]]
    ) -> None:
        (old, old_shown), (new, new_shown) = self._path(source), self._path(path)
        try:
            await self._run(call(old, new), old_shown)
        except ODirectError as error:
            error.filename2 = new_shown
            raise

    async def _make(self, path: AnyPath, mode: int, *, device_number: int = 0, target: bytes = b"") -> None:
        encoded, shown = self._path(path)
        make = tree.make(self.file_system, encoded, mode, owner=self.owner, device_number=device_number, target=target)
        await self._run(make, shown)

    async def _change_xattr(self, path: AnyPath, name: str | bytes, value: bytes | None, follow: bool) -> None:
        encoded, shown = self._path(path)
        await self._run(tasks.change_xattr(self.file_system, encoded, name, value, follow=follow), shown)

    async def _kind(self, path: AnyPath, follow: bool) -> FileKind | None:
        """What is at `path`, None if nothing is: also for links in a ring, and for what cannot be a path."""
        try:
            encoded, shown = self._path(path)
        except ValueError:
            return None
        found = await self._run(tasks.found_at(self.file_system, encoded, follow=follow), shown)
        return None if found is None else found.kind

    async def _sorted(self, directory: AnyStr) -> tuple[list[AnyStr], list[AnyStr], set[AnyStr]]:
        """The names in a directory: of directories, also by links; of all else; and those of them that are links."""
        encoded = path_bytes(directory)
        file_system = self.file_system

        async def sort() -> tuple[list[bytes], list[bytes], set[bytes]]:
            directories: list[bytes] = []
            others: list[bytes] = []
            links: set[bytes] = set()
            for entry in await tree.list_directory(file_system, encoded):
                try:
                    kind = await tree.kind_of_entry(file_system, entry)
                    is_directory = kind is FileKind.DIRECTORY
                    if kind is FileKind.SYMLINK:
                        links.add(entry.name)
                        is_directory = await tree.is_directory(file_system, os.path.join(encoded, entry.name))
                except PathError:  # A link that leads in a ring, or what has gone meanwhile.
                    is_directory = False
                (directories if is_directory else others).append(entry.name)
            return directories, others, links

        found = await self._run(sort(), directory)
        if isinstance(directory, bytes):
            return found
        directories, others, links = (map(os.fsdecode, names) for names in found)
        return list(directories), list(others), set(links)


def _nobody_asks(ended: asyncio.Future[Any]) -> None:
    """Take note of an error, so that asyncio does not say that it was never looked at."""
    if not ended.cancelled():
        ended.exception()


#: What is not closed yet; when the program ends, it is.
_open: set[_OpenVolume] = set()


@atexit.register
def _close_all() -> None:
    for volume in list(_open):
        with contextlib.suppress(Exception):
            if not volume.runner.loop.is_running():
                volume.close_without_loop()
