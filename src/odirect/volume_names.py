"""Everything that is done to a volume by path, for synchronous callers, in the manner of `os`.

A path is str, bytes, a PathLike or a `VolumePath` of the same volume. It begins at the volume's root, with
or without a slash in front. What is given back is of its type: str for text (names that are no UTF-8 as
`os.fsdecode` has them), bytes for bytes. Nobody's permissions are checked: whoever can open the image may
do everything in it.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, overload

from odirect import volume_tasks as tasks
from odirect.base.errors import (
    ODirectError,
    PathError,
)
from odirect.block.buffers import as_bytes_view
from odirect.dio.mapping import Extent
from odirect.dio.opening import parse_mode
from odirect.dio.outcome import Outcome, Reason
from odirect.fs import tree
from odirect.fs.base import Access, Attributes, FileKind, FileSystem
from odirect.fs.paths import path_bytes, resolve
from odirect.fs.tree import Owner
from odirect.volume_entries import Scan, VolumeEntry, stat_result
from odirect.volume_facts import device_number
from odirect.volume_file import FileInVolume
from odirect.volume_runner import Runner, named

T = TypeVar("T")
_Name = TypeVar("_Name", str, bytes)


class InVolume:
    """The part of a path of a volume that the volume looks at."""

    __slots__ = ("path", "volume")

    def __init__(self, volume: object, path: str) -> None:
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
        self._device = device_number(file_system)

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
    ) -> FileInVolume:
        """The regular file at `path`, with the interface of `odirect.File`.

        mode: "r", "r+", "w", "w+", "x", "x+", "a", "a+", with or without "b"; "a" appends, whoever else
        writes. access: "auto" takes any offset, length and memory; "strict" raises AlignmentError or
        NotDirectError for what does not go past the page cache; "buffered" goes through a cache of ours.
        dsync: every write is durable when it returns. nowait: a request that would wait raises
        WouldBlockError. hipri: poll the device where it can be polled. atomic: refused (UnsupportedError), no
        file system here can promise it. permissions: of a new file.

        Raises MissingError, ExistsError, DirectoryError, UnsupportedError for what has no bytes, ReadOnlyError.
        """
        opening = parse_mode(mode)
        encoded, shown = self._path(path)
        flags = tasks.transfer_flags(
            opening, access, self._reasons, shown, dsync=dsync, nowait=nowait, hipri=hipri, atomic=atomic
        )

        async def begin() -> FileInVolume:
            handle = await tasks.open_file(
                self.file_system, encoded, opening, permissions=permissions, owner=self.owner
            )
            return FileInVolume(self.runner, handle, shown, opening, access, flags, self._seen, self)

        file = self.run(begin(), shown)
        self._files.add(file)
        return file

    def read_bytes(self, path: AnyPath) -> bytes:
        """All bytes of the file at `path`."""
        encoded, shown = self._path(path)
        return self.run(tasks.read_bytes(self.file_system, encoded), shown)

    def write_bytes(self, path: AnyPath, data: object, *, permissions: int = 0o644) -> int:
        """How many bytes were written: all of `data`, which the file at `path` then holds, and nothing else."""
        encoded, shown = self._path(path)
        view = as_bytes_view(data, writable=False)
        write = tasks.write_bytes(self.file_system, encoded, view, permissions=permissions, owner=self.owner)
        return self.run(write, shown)

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

    def xattrs(self, path: AnyPath, *, follow_symlinks: bool = True) -> dict[bytes, bytes]:
        """The extended attributes of what is at `path`, by their full names (b"user.comment")."""
        encoded, shown = self._path(path)
        return self.run(tasks.xattrs(self.file_system, encoded, follow=follow_symlinks), shown)

    # Making.

    def mkdir(self, path: AnyPath, mode: int = 0o755, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory; parents: and what is missing above it; exist_ok: one that is there will do."""
        encoded, shown = self._path(path)
        make = tasks.make_directory(
            self.file_system, encoded, mode, owner=self.owner, parents=parents, exist_ok=exist_ok
        )
        self.run(make, shown)

    def makedirs(self, path: AnyPath, mode: int = 0o755, exist_ok: bool = False) -> None:
        """Make a directory and what is missing above it, as `os.makedirs` does."""
        self.mkdir(path, mode, parents=True, exist_ok=exist_ok)

    def mknod(self, path: AnyPath, mode: int = tasks.NEW_NODE, device: int = 0) -> None:
        """Make an empty file, fifo, socket or device; mode: its type (a file, if none is said) and permissions."""
        self._make(path, tasks.node_mode(mode, self._path(path)[1]), device_number=device)

    def symlink(self, target: AnyPath, path: AnyPath) -> None:
        """Make `path` a symbolic link to `target`, which need not be there, and is kept as it is given."""
        self._make(path, stat.S_IFLNK | 0o777, target=self._path(target)[0])

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
        self.run(tasks.change_mode(self.file_system, encoded, mode, follow=follow_symlinks), shown)

    def chown(self, path: AnyPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """Set the owner and group of what is at `path`; -1 leaves one as it is."""
        encoded, shown = self._path(path)
        self.run(tasks.change_owner(self.file_system, encoded, uid, gid, follow=follow_symlinks), shown)

    def utime(
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
        self.run(tasks.change_times(self.file_system, encoded, chosen_ns, follow=follow_symlinks), shown)

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
        self.run(tasks.change_xattr(self.file_system, encoded, name, value, follow=follow), shown)

    def _found(self, path: AnyPath, follow: bool) -> Attributes | None:
        """What is at `path`, None if nothing is: also for links in a ring, and for what cannot be a path."""
        try:
            encoded, shown = self._path(path)
        except ValueError:
            if isinstance(path, InVolume):
                raise
            return None
        return self.run(tasks.found_at(self.file_system, encoded, follow=follow), shown)

    def _kind(self, path: AnyPath, follow: bool) -> FileKind | None:
        found = self._found(path, follow)
        return None if found is None else found.kind


def _joined(directory: _Name, name: _Name) -> _Name:
    """A name in a directory, as one path."""
    return os.path.join(directory, name)
