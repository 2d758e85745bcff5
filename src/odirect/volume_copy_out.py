"""Copying files and trees out of a volume.

What a volume holds is not trusted: everything is made relative to the descriptor of a directory that
was made or opened here, no symbolic link below the target is ever followed, and names are checked. Each
thing is made under a hidden name and takes its own when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Coroutine, Iterator
from typing import Any, NamedTuple, TypeVar

from odirect import files
from odirect.base.errors import DirectoryError, ExistsError, MissingError, ODirectError, UnsupportedError
from odirect.block.in_use import check_unused, suspects
from odirect.dio.mapping import ExtentKind
from odirect.fs import tree
from odirect.fs.base import Attributes, FileKind, VolumeFile
from odirect.fs.paths import checked_name, path_bytes, resolve
from odirect.host_tree import set_xattrs
from odirect.sched.interrupts import Interrupts
from odirect.sched.scheduler import Task
from odirect.volume_bulk import read_ahead
from odirect.volume_copy import (
    DIRECT_BYTES,
    Buffers,
    Counts,
    Progress,
    TreeReport,
    chunks,
    finished,
    on_host,
    settle,
    temporary_name,
)
from odirect.volume_names import AnyPath, VolumeNames
from odirect.volume_runner import named

T = TypeVar("T")
HostPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# How much of a file is looked through at once for data.
_WINDOW_BYTES = 1 << 30
_HOLES = (ExtentKind.HOLE, ExtentKind.UNWRITTEN)
_SECTOR_BYTES = 512
_NO_PRIVILEGE = (errno.EPERM, errno.EACCES)


class _Item(NamedTuple):
    """Something to copy. below: its path from the top; depth: 0 for the top."""

    name: bytes
    below: bytes
    depth: int
    attributes: Attributes


class _Place(NamedTuple):
    """A directory of the host that is being filled."""

    fd: int
    item: _Item | None


def copy_out(
    volume: VolumeNames,
    source: AnyPath,
    target: HostPath,
    *,
    recursive: bool = True,
    attributes: bool = True,
    progress: Progress | None = None,
) -> TreeReport:
    """A report of copying `source` in the volume to `target` on the host; see `Volume.copy_out`."""
    encoded, shown = volume._path(source)
    host = path_bytes(target)
    with Interrupts() as interrupts:
        top = volume.run(resolve(volume.file_system, encoded), shown)
        if top.kind is FileKind.DIRECTORY and not recursive:
            raise DirectoryError("it is a directory, and recursive was not asked for", path=shown)
        items, with_xattrs = volume.run(_plan(volume, top, attributes), shown)
        interrupts.check()
        copier = _CopyOut(volume, encoded, items, with_xattrs, attributes, progress, interrupts)
        final = copier.copy(host)
        return copier.counts.report(os.fsdecode(final))


async def _plan(volume: VolumeNames, top: Attributes, keep: bool) -> tuple[list[_Item], set[int]]:
    """All that is to be copied, each directory followed at once by what is in it; and who may have attributes."""
    file_system = volume.file_system
    items = [_Item(b"", b"", 0, top)]
    if top.kind is FileKind.DIRECTORY:
        met = {top.inode}
        found = await file_system.tree(top.inode)
        # No name has a zero in it, so that this is the order of directories, then of names.
        for below, attributes, _ in sorted(found, key=lambda entry: entry.path.replace(b"/", b"\0")):
            if stat.S_ISDIR(attributes.mode):
                if attributes.inode in met:
                    message = "a directory of the volume is in itself, or has two names; check the volume"
                    raise UnsupportedError(message, path=file_system.name)
                met.add(attributes.inode)
            name = checked_name(file_system, below.rpartition(b"/")[2])
            items.append(_Item(name, below, below.count(b"/") + 1, attributes))
    numbers = [item.attributes.inode for item in items] if keep else []
    return items, await file_system.with_xattrs(numbers)


def _is_small(item: _Item, most: int) -> bool:
    """Whether it is a file without holes, and with one name, that is best read with many others."""
    attributes = item.attributes
    return (
        stat.S_ISREG(attributes.mode)
        and attributes.links == 1
        and attributes.size <= most
        and attributes.size <= attributes.blocks512 * _SECTOR_BYTES
    )


class _CopyOut:
    """One copy out of a volume."""

    def __init__(
        self,
        volume: VolumeNames,
        source: bytes,
        items: list[_Item],
        with_xattrs: set[int],
        attributes: bool,
        progress: Progress | None,
        interrupts: Interrupts,
    ) -> None:
        """with_xattrs: the inodes that may have extended attributes which are to be kept."""
        sizes = {
            item.attributes.inode: item.attributes.size for item in items if item.attributes.kind is FileKind.REGULAR
        }
        self.counts = Counts(progress, sum(sizes.values()), interrupts)
        self._volume = volume
        self._runner = volume.runner
        self._file_system = volume.file_system
        self._source = source
        self._items = items
        self._keep = attributes
        self._buffers = Buffers()
        #: Directories that are being filled, the innermost last.
        self._places: list[_Place] = []
        self._final = b""
        self._with_xattrs = with_xattrs
        #: Inode numbers of files that may be in use: to ask for each of many files would take as long as to copy it.
        self._suspects = suspects()
        most = self._file_system.small_file_bytes
        self._small = {
            number
            for number, item in enumerate(items)
            if item.depth and item.attributes.inode not in with_xattrs and _is_small(item, most)
        }
        #: Where an inode with several names is already: its path below the top, and who it is on the host.
        self._seen: dict[int, tuple[bytes, os.stat_result]] = {}

    def copy(self, host: bytes) -> bytes:
        """Copy everything; the path on the host that the top has."""
        top = self._items[0]
        outer, name, self._final = _find_target(self._source, host, top)
        self._places = [_Place(outer, None)]
        small = [item for number, item in enumerate(self._items) if number in self._small]
        source = os.fsdecode(self._source)
        contents = read_ahead(self._volume, small, lambda item: item.attributes, source)
        try:
            for number, item in enumerate(self._items):
                while len(self._places) > item.depth + 1:
                    self._leave()
                if number in self._small:
                    self._copy_small(item, next(contents)[1])
                else:
                    self._copy_one(item, name if not item.depth else item.name)
                self.counts.add()
            while len(self._places) > 1:
                self._leave()
        finally:
            for place in self._places:
                os.close(place.fd)
            self._places = []
        return self._final

    def _leave(self) -> None:
        """Nothing more comes into the innermost directory: its attributes are set."""
        place = self._places[-1]
        if place.item is not None:
            xattrs = self._read_xattrs(place.item)
            with self._on_host(place.item, "setting the attributes"):
                self._give_attributes(place.item, place.fd, xattrs)
        self._places.pop()
        os.close(place.fd)

    def _copy_one(self, item: _Item, name: bytes) -> None:
        parent = self._places[-1].fd
        attributes = item.attributes
        kind = attributes.kind
        if kind is FileKind.DIRECTORY:
            with self._on_host(item, "making a directory"):
                self._places.append(_Place(self._make_directory(parent, name), item))
            return
        if self._linked(item, parent, name):
            self.counts.hard_links += 1
            return
        if kind is FileKind.REGULAR:
            with self._new_name(item, parent, name) as temporary:
                self._copy_file(item, parent, temporary)
            self.counts.files += 1
        elif kind is FileKind.SYMLINK:
            target = self._run(item, self._file_system.read_link(attributes.inode))
            xattrs = self._read_xattrs(item)
            with self._new_name(item, parent, name) as temporary, self._on_host(item, "making a symbolic link"):
                os.symlink(target, temporary, dir_fd=parent)
                self._give_attributes_by_name(item, parent, temporary, xattrs)
            self.counts.links += 1
        elif not self._make_node(item, parent, name):
            return
        if attributes.links > 1:
            with self._on_host(item, "looking at the copy"):
                self._seen[attributes.inode] = item.below, os.stat(name, dir_fd=parent, follow_symlinks=False)

    def _make_directory(self, parent: int, name: bytes) -> int:
        """A descriptor of the directory `name`, made unless it is there, and really one."""
        if not name:
            return os.open(b".", _DIRECTORY, dir_fd=parent)
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            self.counts.directories += 1
        except FileExistsError:
            if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                message = "a symbolic link is where a directory should be; it is not followed"
                raise ExistsError(message) from None
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)

    def _linked(self, item: _Item, parent: int, name: bytes) -> bool:
        """Whether this is a further name of something that was copied, and was made so."""
        known = self._seen.get(item.attributes.inode)
        if known is None:
            return False
        below, status = known
        top = self._places[1].fd
        try:
            with self._on_host(item, "linking"):
                if _same(status, name, parent):
                    return True
            with self._new_name(item, parent, name) as temporary, self._on_host(item, "linking"):
                os.link(below, temporary, src_dir_fd=top, dst_dir_fd=parent, follow_symlinks=False)
                if not _same(status, temporary, parent):
                    raise ExistsError("something else has taken the place of the copy")
        except ODirectError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
                raise
            self.counts.leave_out(item.below, "a hard link", error)
            return False
        return True

    def _make_node(self, item: _Item, parent: int, name: bytes) -> bool:
        """Whether a fifo, socket or device could be made."""
        attributes = item.attributes
        xattrs = self._read_xattrs(item)
        try:
            with self._new_name(item, parent, name) as temporary, self._on_host(item, "making it"):
                os.mknod(temporary, stat.S_IFMT(attributes.mode) | 0o600, attributes.device_number, dir_fd=parent)
                self._give_attributes_by_name(item, parent, temporary, xattrs)
        except ODirectError as error:
            if error.errno not in _NO_PRIVILEGE:
                raise
            self.counts.leave_out(item.below, f"a {attributes.kind.value}", error)
            return False
        self.counts.nodes += 1
        return True

    @contextlib.contextmanager
    def _new_name(self, item: _Item, parent: int, name: bytes) -> Iterator[bytes]:
        """A hidden name that nothing has; what is made there takes `name` in the end, or goes."""
        with self._on_host(item, "looking for its name"):
            try:
                there = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if stat.S_ISDIR(there.st_mode):
                    raise DirectoryError("a directory has that name, and is not replaced by what is none")
                if stat.S_ISREG(there.st_mode) and (not item.depth or there.st_ino in self._suspects):
                    check_unused(b"/proc/self/fd/%d/%s" % (parent, name), what="replace")
            except FileNotFoundError:
                pass
            temporary = temporary_name(name, lambda hidden: _is_there(hidden, parent))
        try:
            yield temporary
            with self._on_host(item, "giving it its name"):
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            raise

    # Files.

    def _copy_file(self, item: _Item, parent: int, temporary: bytes) -> None:
        xattrs = self._read_xattrs(item)
        with self._on_host(item, "creating"):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o600, dir_fd=parent)
        try:
            handle = self._run(item, self._file_system.open_file(item.attributes.inode, writable=False))
            try:
                self._fill(item, handle, fd)
            finally:
                self._run(item, handle.close())
            with self._on_host(item, "setting the attributes"):
                self._give_attributes(item, fd, xattrs)
        finally:
            os.close(fd)

    def _copy_small(self, item: _Item, content: bytes) -> None:
        """Make a file whose content is here already, and that has no extended attributes."""
        parent = self._places[-1].fd
        with self._new_name(item, parent, item.name) as temporary, self._on_host(item, "writing"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o600, dir_fd=parent)
            try:
                _write_full(fd, memoryview(content), 0)
                self._give_attributes(item, fd, {})
            finally:
                os.close(fd)
        self.counts.files += 1
        self.counts.add(copied=len(content))

    def _fill(self, item: _Item, handle: VolumeFile, fd: int) -> None:
        """Copy the bytes: each chunk is written while the next one is read."""
        size = handle.size_bytes
        ahead: Task[int] | None = None
        done = 0
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: settle(self._runner, ahead))
            writer: files.File | None = None
            if size >= DIRECT_BYTES:
                with self._on_host(item, "opening"):
                    writer = stack.enter_context(files.open(f"/proc/self/fd/{fd}", "r+"))
            pieces = self._pieces(item, handle, size)
            piece = next(pieces, None)
            view = self._buffers.next()
            if piece is not None:
                ahead = self._runner.start(tree.read_whole(handle, view[: piece[1]], piece[0]))
            while piece is not None and ahead is not None:
                (offset, length), taken = piece, view[: piece[1]]
                self._finished(item, ahead, length)
                ahead, piece = None, next(pieces, None)
                if piece is not None:
                    view = self._buffers.next()
                    ahead = self._runner.start(tree.read_whole(handle, view[: piece[1]], piece[0]))
                with self._on_host(item, "writing"):
                    _write_full(fd if writer is None else writer, taken, offset)
                self.counts.add(copied=length, skipped=max(0, offset - done))
                done = offset + length
            with self._on_host(item, "setting the size"):
                os.ftruncate(fd, size)
            self.counts.add(skipped=size - done)

    def _pieces(self, item: _Item, handle: VolumeFile, size: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is to be moved, in order: what is no hole, in chunks."""
        for window in range(0, size, _WINDOW_BYTES):
            for extent in self._run(item, handle.extents(window, min(_WINDOW_BYTES, size - window))):
                start, end = max(window, extent.offset), min(size, extent.offset + extent.length)
                if extent.kind not in _HOLES and start < end:
                    yield from chunks(start, min(end, window + _WINDOW_BYTES))

    # Attributes.

    def _read_xattrs(self, item: _Item) -> dict[bytes, bytes]:
        if item.attributes.inode not in self._with_xattrs:
            return {}
        return self._run(item, self._file_system.xattrs(item.attributes.inode))

    def _give_attributes(self, item: _Item, fd: int, xattrs: dict[bytes, bytes]) -> None:
        """Give an open file or directory what its original has."""
        attributes = item.attributes
        mode = stat.S_IMODE(attributes.mode)
        if not self._keep:
            os.fchmod(fd, mode & 0o777)
            return
        try:
            os.fchown(fd, attributes.uid, attributes.gid)
        except OSError as error:
            if error.errno not in (*_NO_PRIVILEGE, errno.EINVAL):
                raise
            self.counts.leave_out(item.below, f"owner {attributes.uid}:{attributes.gid}", error)
            # What would have run as the owner must not run as us.
            mode &= 0o1777
        # A new owner takes capabilities away, and permissions may forbid to add attributes: so in between.
        for name, reason in set_xattrs(fd, xattrs):
            self.counts.leave_out(item.below, os.fsdecode(name), reason)
        os.fchmod(fd, mode)
        os.utime(fd, ns=(attributes.atime_ns, attributes.mtime_ns))

    def _give_attributes_by_name(self, item: _Item, parent: int, name: bytes, xattrs: dict[bytes, bytes]) -> None:
        """The same for what cannot be opened: a symbolic link, a fifo, a device."""
        attributes = item.attributes
        is_link = attributes.kind is FileKind.SYMLINK
        mode = stat.S_IMODE(attributes.mode)
        if not self._keep:
            if not is_link:
                os.chmod(name, mode & 0o777, dir_fd=parent)
            return
        try:
            os.chown(name, attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (*_NO_PRIVILEGE, errno.EINVAL):
                raise
            self.counts.leave_out(item.below, f"owner {attributes.uid}:{attributes.gid}", error)
            mode &= 0o1777
        # The one way to the attributes of what is not opened that goes by a descriptor of its directory.
        path = b"/proc/self/fd/%d/%s" % (parent, name)
        for attribute, reason in set_xattrs(path, xattrs, follow_symlinks=False):
            self.counts.leave_out(item.below, os.fsdecode(attribute), reason)
        if not is_link:
            # Made by us, a moment ago, under a name that nobody knows.
            os.chmod(name, mode, dir_fd=parent)
        times = (attributes.atime_ns, attributes.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    # How.

    def _run(self, item: _Item, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns; its errors name the path of `item` in the volume."""
        return self._volume.run(coroutine, self._source_of(item))

    def _finished(self, item: _Item, reading: Task[int], length: int) -> None:
        try:
            if finished(self._runner, reading) < length:
                raise MissingError("it became shorter while it was copied")
        except ODirectError as error:
            named(error, self._source_of(item))
            raise

    def _source_of(self, item: _Item) -> str:
        return os.fsdecode(os.path.join(self._source, item.below) if item.below else self._source)

    def _on_host(self, item: _Item, doing: str) -> contextlib.AbstractContextManager[None]:
        return on_host(doing, os.fsdecode(os.path.join(self._final, item.below) if item.below else self._final))


def _find_target(source: bytes, host: bytes, top: _Item) -> tuple[int, bytes, bytes]:
    """A descriptor of the directory that the top goes into, its name there (b"": it is that), and its path."""
    is_directory = top.attributes.kind is FileKind.DIRECTORY
    with on_host("opening the target", host):
        if os.path.isdir(host):
            name = os.path.basename(source)
            final = host if name in (b"", b".", b"..") else os.path.join(host, name)
            return os.open(host, _DIRECTORY), b"" if final is host else name, final
        if host.endswith(b"/") and not is_directory:
            raise MissingError("there is no such directory")
        above, name = os.path.split(host.rstrip(b"/"))
        return os.open(above or b".", _DIRECTORY), name, host


def _is_there(name: bytes, parent: int) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _same(status: os.stat_result, name: bytes, parent: int) -> bool:
    """Whether `name` is the file that `status` is of."""
    try:
        return os.path.samestat(os.stat(name, dir_fd=parent, follow_symlinks=False), status)
    except FileNotFoundError:
        return False


def _write_full(target: int | files.File, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        if isinstance(target, int):
            done += os.pwrite(target, view[done:], offset + done)
        else:
            done += target.pwrite(view[done:], offset + done)
