"""Everything that is done to a volume by path, for synchronous callers, in the manner of `os`.

A path is str, bytes, a PathLike or a `VolumePath` of the same volume. It begins at the volume's root, with
or without a slash in front. What is given back is of its type: str for text (names that are no UTF-8 as
`os.fsdecode` has them), bytes for bytes. Nobody's permissions are checked: whoever can open the image may
do everything in it.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, overload

from odirect.base.errors import (
    ExistsError,
    MissingError,
    NotDirectError,
    NotDirectoryError,
    ODirectError,
    PathError,
    UnsupportedError,
)
from odirect.block.bio import FUA, HIPRI, NOWAIT, READ, WRITE
from odirect.block.buffers import as_bytes_view, empty
from odirect.dio.mapping import Extent
from odirect.dio.opening import parse_mode
from odirect.dio.outcome import Outcome, Reason
from odirect.fs import tree
from odirect.fs.base import ACCESSES, Access, Attributes, FileKind, FileSystem
from odirect.fs.paths import path_bytes, resolve
from odirect.fs.tree import Owner
from odirect.sched.clock import wall_ns
from odirect.volume_entries import Scan, VolumeEntry, stat_result
from odirect.volume_file import FileInVolume
from odirect.volume_runner import Runner, named

T = TypeVar("T")
_Name = TypeVar("_Name", str, bytes)

# What `chown` leaves as it is.
_KEEP = -1
_NEW_NODE = stat.S_IFREG | 0o600


class InVolume:
    """The part of `VolumePath` that a volume looks at."""

    __slots__ = ("path", "volume")

    def __init__(self, volume: VolumeNames, path: str) -> None:
        self.volume = volume
        self.path = path


AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes] | InVolume


class VolumeNames:
    """The names of an open volume and what is behind them; `Volume` is one.

    owner: whose what is made will be.
    """

    def __init__(
        self,
        file_system: FileSystem,
        runner: Runner,
        *,
        reasons: dict[int, Reason],
        seen: Callable[[int, Outcome], Outcome],
        owner: Owner,
    ) -> None:
        """reasons, seen: of `volume_opening.Image`."""
        self.file_system = file_system
        self.runner = runner
        self.owner = owner
        self._reasons = reasons
        self._seen = seen
        self._files: weakref.WeakSet[FileInVolume] = weakref.WeakSet()
        # Equal for the same volume, so that `os.path.samestat` works within it, and unequal for others.
        self._device = int.from_bytes(file_system.uuid[:4], "little")

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
        permissions: int = 0o644,
    ) -> FileInVolume:
        """The regular file at `path`, with the interface of `odirect.File`.

        mode: "r", "r+", "w", "w+", "x", "x+", "a", "a+", with or without "b"; "a" appends, whoever else
        writes. access: "auto" takes any offset, length and memory; "strict" raises AlignmentError or
        NotDirectError for what does not go past the page cache; "buffered" goes through a cache of ours.
        dsync: every write is durable when it returns. nowait: a request that would wait raises
        WouldBlockError. hipri: poll the device where it can be polled. permissions: of a new file.

        Raises MissingError, ExistsError, DirectoryError, UnsupportedError for what has no bytes, ReadOnlyError.
        """
        opening = parse_mode(mode)
        if access not in ACCESSES:
            raise ValueError(f"access {access!r}: use 'auto', 'strict' or 'buffered'")
        encoded, shown = self._path(path)
        for op, wanted in ((READ, opening.readable), (WRITE, opening.writable)):
            if access == "strict" and wanted and op in self._reasons:
                message = f"the volume's image does not go past the page cache: {self._reasons[op].value}"
                raise NotDirectError(message, path=shown)
        flags = (FUA if dsync else 0) | (NOWAIT if nowait else 0) | (HIPRI if hipri else 0)

        async def begin() -> FileInVolume:
            handle = await tree.open_file(
                self.file_system,
                encoded,
                writable=opening.writable,
                create=opening.create,
                exclusive=opening.exclusive,
                truncate=opening.truncate,
                permissions=permissions,
                owner=self.owner,
            )
            return FileInVolume(self.runner, handle, shown, opening, access, flags, self._seen, self)

        file = self.run(begin(), shown)
        self._files.add(file)
        return file

    def read_bytes(self, path: AnyPath) -> bytes:
        """All bytes of the file at `path`."""
        encoded, shown = self._path(path)

        async def read() -> bytes:
            file = await tree.open_file(self.file_system, encoded, writable=False)
            try:
                buffer = empty(file.size_bytes)
                return bytes(buffer[: await tree.read_whole(file, buffer)])
            finally:
                await file.close()

        return self.run(read(), shown)

    def write_bytes(self, path: AnyPath, data: object, *, permissions: int = 0o644) -> int:
        """How many bytes were written: all of `data`, which the file at `path` then holds, and nothing else."""
        encoded, shown = self._path(path)
        view = as_bytes_view(data, writable=False)

        async def write() -> int:
            file = await tree.open_file(
                self.file_system,
                encoded,
                writable=True,
                create=True,
                truncate=True,
                permissions=permissions,
                owner=self.owner,
            )
            try:
                await tree.write_whole(file, 0, view)
            finally:
                await file.close()
            return len(view)

        return self.run(write(), shown)

    def extents(self, path: AnyPath, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Where the bytes of the file at `path` are on the device, holes included, in order."""
        with self.open(path) as file:
            return file.extents(offset, length)

    # Looking.

    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """What is at `path`; follow_symlinks: what a symbolic link leads to."""
        return stat_result(self.attributes(path, follow_symlinks=follow_symlinks), self._device)

    def lstat(self, path: AnyPath) -> os.stat_result:
        """What is at `path`, be it a symbolic link."""
        return self.stat(path, follow_symlinks=False)

    def attributes(self, path: AnyPath, *, follow_symlinks: bool = True) -> Attributes:
        """What is at `path`, as the file system says it."""
        encoded, shown = self._path(path)
        return self.run(resolve(self.file_system, encoded, follow=follow_symlinks), shown)

    def exists(self, path: AnyPath, *, follow_symlinks: bool = True) -> bool:
        """Whether there is anything at `path`."""
        return self._found(path, follow_symlinks) is not None

    def is_dir(self, path: AnyPath, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a directory at `path`."""
        return self._kind(path, follow_symlinks) is FileKind.DIRECTORY

    def is_file(self, path: AnyPath, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a regular file at `path`."""
        return self._kind(path, follow_symlinks) is FileKind.REGULAR

    def is_symlink(self, path: AnyPath) -> bool:
        """Whether there is a symbolic link at `path`."""
        return self._kind(path, False) is FileKind.SYMLINK

    @overload
    def scandir(self, path: bytes | os.PathLike[bytes]) -> Scan[bytes]: ...
    @overload
    def scandir(self, path: str | os.PathLike[str] | InVolume = "/") -> Scan[str]: ...
    def scandir(self, path: AnyPath = "/") -> Scan[str] | Scan[bytes]:
        """The entries of the directory at `path`, but "." and "..", as it is now."""
        encoded, shown = self._path(path)
        found = self.run(tree.list_directory(self.file_system, encoded), shown)
        if isinstance(shown, bytes):
            return Scan([VolumeEntry(self, name, _joined(shown, name), number, kind) for name, number, kind in found])
        return Scan(
            [
                VolumeEntry(self, os.fsdecode(name), _joined(shown, os.fsdecode(name)), number, kind)
                for name, number, kind in found
            ]
        )

    @overload
    def listdir(self, path: bytes | os.PathLike[bytes]) -> list[bytes]: ...
    @overload
    def listdir(self, path: str | os.PathLike[str] | InVolume = "/") -> list[str]: ...
    def listdir(self, path: AnyPath = "/") -> list[str] | list[bytes]:
        """The names in the directory at `path`."""
        encoded, shown = self._path(path)
        found = self.run(tree.list_directory(self.file_system, encoded), shown)
        if isinstance(shown, bytes):
            return [entry.name for entry in found]
        return [os.fsdecode(entry.name) for entry in found]

    def walk(
        self,
        top: AnyPath = "/",
        *,
        topdown: bool = True,
        onerror: Callable[[ODirectError], object] | None = None,
        followlinks: bool = False,
    ) -> Iterator[tuple[Any, list[Any], list[Any]]]:
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
            directories: list[Any] = []
            others: list[Any] = []
            links = set()
            try:
                for entry in self.scandir(place):
                    try:
                        is_directory = entry.is_dir()
                    except PathError:  # A link that leads in a ring.
                        is_directory = False
                    (directories if is_directory else others).append(entry.name)
                    if is_directory and not followlinks and entry.is_symlink():
                        links.add(entry.name)
            except ODirectError as error:
                if onerror is not None:
                    onerror(error)
                continue
            if topdown:
                yield place, directories, others  # The caller may change the list.
            else:
                stack.append((place, directories, others))
            stack += [_joined(place, name) for name in reversed(directories) if name not in links]

    @overload
    def readlink(self, path: bytes | os.PathLike[bytes]) -> bytes: ...
    @overload
    def readlink(self, path: str | os.PathLike[str] | InVolume) -> str: ...
    def readlink(self, path: AnyPath) -> str | bytes:
        """Where the symbolic link at `path` leads."""
        encoded, shown = self._path(path)
        target = self.run(tree.read_link(self.file_system, encoded), shown)
        return target if isinstance(shown, bytes) else os.fsdecode(target)

    def xattrs(self, path: AnyPath, *, follow_symlinks: bool = True) -> dict[str, bytes]:
        """The extended attributes of what is at `path`, by their full names ("user.comment")."""
        encoded, shown = self._path(path)

        async def read() -> dict[bytes, bytes]:
            found = await resolve(self.file_system, encoded, follow=follow_symlinks)
            return await self.file_system.xattrs(found.inode)

        return {os.fsdecode(name): value for name, value in self.run(read(), shown).items()}

    # Making.

    def mkdir(self, path: AnyPath, mode: int = 0o755, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory; parents: and what is missing above it; exist_ok: one that is there will do."""
        encoded, shown = self._path(path)
        if parents:
            self.run(
                tree.make_directories(self.file_system, encoded, permissions=mode, owner=self.owner, exist_ok=exist_ok),
                shown,
            )
            return
        try:
            self._make(path, stat.S_IFDIR | stat.S_IMODE(mode))
        except ExistsError:
            if not exist_ok or not self.is_dir(path):
                raise

    def makedirs(self, path: AnyPath, mode: int = 0o755, exist_ok: bool = False) -> None:
        """Make a directory and what is missing above it, as `os.makedirs` does."""
        self.mkdir(path, mode, parents=True, exist_ok=exist_ok)

    def mknod(self, path: AnyPath, mode: int = _NEW_NODE, device: int = 0) -> None:
        """Make an empty file, fifo, socket or device; mode: its type (a file, if none is said) and permissions."""
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind in (stat.S_IFDIR, stat.S_IFLNK):
            raise PathError("mknod makes no directories and no links", errno=errno.EPERM, path=self._path(path)[1])
        self._make(path, kind | stat.S_IMODE(mode), device_number=device)

    def symlink(self, target: str | bytes | os.PathLike[str] | os.PathLike[bytes], path: AnyPath) -> None:
        """Make `path` a symbolic link to `target`, which need not be there, and is kept as it is given."""
        self._make(path, stat.S_IFLNK | 0o777, target=path_bytes(target))

    def link(self, source: AnyPath, path: AnyPath, *, follow_symlinks: bool = False) -> None:
        """Give what is at `source` the name `path` too (a hard link)."""
        self._run_both(source, path, lambda old, new: tree.link(self.file_system, old, new, follow=follow_symlinks))

    # Moving and removing.

    def rename(self, source: AnyPath, path: AnyPath) -> None:
        """Move `source` to `path`, over what is there, as rename(2) does."""
        self._run_both(source, path, lambda old, new: tree.rename(self.file_system, old, new))

    replace = rename

    def remove(self, path: AnyPath) -> None:
        """Remove a name of what is no directory."""
        encoded, shown = self._path(path)
        self.run(tree.unlink(self.file_system, encoded), shown)

    unlink = remove

    def rmdir(self, path: AnyPath) -> None:
        """Remove an empty directory."""
        encoded, shown = self._path(path)
        self.run(tree.remove_directory(self.file_system, encoded), shown)

    def rmtree(self, path: AnyPath) -> None:
        """Remove a directory and everything in it; symbolic links are removed, not followed."""
        encoded, shown = self._path(path)
        self.run(tree.remove_tree(self.file_system, encoded), shown)

    # Changing.

    def chmod(self, path: AnyPath, mode: int, *, follow_symlinks: bool = True) -> None:
        """Set the permissions of what is at `path`. Those of a symbolic link cannot be set: UnsupportedError."""
        encoded, shown = self._path(path)
        if not follow_symlinks and self.is_symlink(path):
            raise UnsupportedError("a symbolic link has no permissions of its own", path=shown)
        self.run(tree.change(self.file_system, encoded, mode=stat.S_IMODE(mode)), shown)

    def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """Set the owner and group of what is at `path`; -1 leaves one as it is."""
        encoded, shown = self._path(path)
        change = tree.change(
            self.file_system,
            encoded,
            follow=follow_symlinks,
            uid=None if uid == _KEEP else uid,
            gid=None if gid == _KEEP else gid,
        )
        self.run(change, shown)

    def utime(
        self,
        path: AnyPath,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        """Set the times of access and change, in seconds or nanoseconds; without either, to now."""
        if times is not None and ns is not None:
            raise ValueError("utime takes times or ns, not both")
        if times is not None:
            ns = (int(times[0] * 1_000_000_000), int(times[1] * 1_000_000_000))
        elif ns is None:
            now_ns = wall_ns()
            ns = (now_ns, now_ns)
        encoded, shown = self._path(path)
        change = tree.change(self.file_system, encoded, follow=follow_symlinks, atime_ns=ns[0], mtime_ns=ns[1])
        self.run(change, shown)

    def set_xattr(self, path: AnyPath, name: str | bytes, value: bytes, *, follow_symlinks: bool = True) -> None:
        """Set an extended attribute; name: in full ("user.comment")."""
        self._change_xattr(path, name, bytes(as_bytes_view(value, writable=False)), follow_symlinks)

    def remove_xattr(self, path: AnyPath, name: str | bytes, *, follow_symlinks: bool = True) -> None:
        """Remove an extended attribute; PathError with ENODATA if there is none."""
        self._change_xattr(path, name, None, follow_symlinks)

    # How.

    def open_files(self) -> list[FileInVolume]:
        """The files of it that somebody has."""
        while True:
            try:
                return [file for file in self._files if not file.closed]
            except RuntimeError:
                continue  # Another thread has just opened one.

    def run(self, coroutine: Coroutine[Any, Any, T], path: object) -> T:
        """What `coroutine` returns; its errors name `path`."""
        try:
            return self.runner.run(coroutine)
        except ODirectError as error:
            named(error, path)
            raise

    def _path(self, path: AnyPath) -> tuple[bytes, str | bytes]:
        """A path as the file system has it, and as messages show it: as it was given."""
        if isinstance(path, InVolume):
            if path.volume is not self:
                raise ValueError(f"{path} belongs to another volume")
            path = path.path
        return path_bytes(path), os.fspath(path)

    def _run_both(
        self, source: AnyPath, path: AnyPath, call: Callable[[bytes, bytes], Coroutine[Any, Any, None]]
    ) -> None:
        (old, old_shown), (new, new_shown) = self._path(source), self._path(path)
        try:
            self.run(call(old, new), old_shown)
        except ODirectError as error:
            error.filename2 = new_shown
            raise

    def _make(self, path: AnyPath, mode: int, *, device_number: int = 0, target: bytes = b"") -> None:
        encoded, shown = self._path(path)
        make = tree.make(self.file_system, encoded, mode, owner=self.owner, device_number=device_number, target=target)
        self.run(make, shown)

    def _change_xattr(self, path: AnyPath, name: str | bytes, value: bytes | None, follow: bool) -> None:
        encoded, shown = self._path(path)

        async def change() -> None:
            found = await resolve(self.file_system, encoded, follow=follow)
            await self.file_system.set_xattr(found.inode, os.fsencode(name), value)

        self.run(change(), shown)

    def _found(self, path: AnyPath, follow: bool) -> Attributes | None:
        """What is at `path`, None if nothing is: also for links in a ring, and for what cannot be a path."""
        try:
            encoded, shown = self._path(path)
        except ValueError:
            if isinstance(path, InVolume):
                raise
            return None
        try:
            return self.run(resolve(self.file_system, encoded, follow=follow), shown)
        except (MissingError, NotDirectoryError):
            return None
        except PathError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                return None
            raise

    def _kind(self, path: AnyPath, follow: bool) -> FileKind | None:
        found = self._found(path, follow)
        return None if found is None else found.kind


def _joined(directory: _Name, name: _Name) -> _Name:
    """A name in a directory, as one path."""
    return os.path.join(directory, name)
