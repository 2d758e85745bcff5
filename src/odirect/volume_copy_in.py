"""Copying files and trees from the host into a volume."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Coroutine, Iterator
from typing import Any, NamedTuple, TypeVar

from odirect import files
from odirect.base.errors import (
    DirectoryError,
    ExistsError,
    InUseError,
    MissingError,
    NoSpaceError,
    NotDirectoryError,
    ODirectError,
    PathError,
    UnsupportedError,
)
from odirect.fs import tree
from odirect.fs.base import FileKind, NewFile, VolumeFile
from odirect.fs.paths import path_bytes, present, walk
from odirect.sched.clock import wall_ns
from odirect.sched.interrupts import Interrupts
from odirect.sched.scheduler import Task
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

# Small files are made so many at a time, or so many bytes.
_MOST_SMALL = 256
_MOST_SMALL_BYTES = 8 << 20
_SECTOR_BYTES = 512

T = TypeVar("T")
HostPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class _Item(NamedTuple):
    """Something to copy. parent: the number of its directory's item, -1 for the top."""

    path: bytes
    parent: int
    name: bytes
    status: os.stat_result


def copy_in(
    volume: VolumeNames,
    source: HostPath,
    target: AnyPath,
    *,
    recursive: bool = True,
    attributes: bool = True,
    progress: Progress | None = None,
) -> TreeReport:
    """A report of copying `source` of the host to `target` in the volume; see `Volume.copy_in`."""
    encoded, shown = volume._path(target)
    host = path_bytes(source)
    with Interrupts() as interrupts:
        items = _plan(host, recursive)
        interrupts.check()
        copier = _CopyIn(volume, items, attributes, progress, interrupts)
        final = copier.copy(host, encoded, shown)
        return copier.counts.report(os.fsdecode(final))


def _plan(host: bytes, recursive: bool) -> list[_Item]:
    """All that is to be copied, a directory before what is in it."""
    with on_host("looking at it", host):
        top = os.stat(host)
    if stat.S_ISDIR(top.st_mode) and not recursive:
        raise DirectoryError("it is a directory, and recursive was not asked for", path=host)
    items = [_Item(host, -1, b"", top)]
    number = 0
    while number < len(items):
        item = items[number]
        if stat.S_ISDIR(item.status.st_mode):
            with on_host("listing", item.path), os.scandir(item.path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
                items += [_Item(each.path, number, each.name, each.stat(follow_symlinks=False)) for each in found]
        number += 1
    return items


class _Small(NamedTuple):
    """A small file that was read."""

    item: _Item
    new: NewFile


class _Directory(NamedTuple):
    """A directory of the volume before anything was added: its names, and the group that what is made there gets."""

    names: frozenset[bytes]
    group: int | None


class _CopyIn:
    """One copy into a volume."""

    def __init__(
        self,
        volume: VolumeNames,
        items: list[_Item],
        attributes: bool,
        progress: Progress | None,
        interrupts: Interrupts,
    ) -> None:
        sizes: dict[tuple[int, int], int] = {}
        for _, _, _, status in items:
            if stat.S_ISREG(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
        self.counts = Counts(progress, sum(sizes.values()), interrupts)
        self._volume = volume
        self._file_system = volume.file_system
        self._runner = volume.runner
        self._items = items
        self._keep = attributes
        self._buffers = Buffers()
        self._host = self._final = b""
        self._small: list[_Small] = []
        self._small_bytes = 0
        self._making: tuple[list[_Small], Task[list[int]]] | None = None
        self._directories: dict[int, _Directory] = {}
        #: The inode in the volume of each item that is there.
        self._inodes: dict[int, int] = {}
        self._seen: dict[tuple[int, int], int] = {}

    def copy(self, host: bytes, target: bytes, shown: str | bytes) -> bytes:
        """Copy everything; the path in the volume that the top has."""
        directory, name, final = self._volume.run(self._find_target(host, target), shown)
        self._host, self._final = host, final
        with contextlib.ExitStack() as stack:
            stack.callback(self._settle_small)
            for number, item in enumerate(self._items):
                parent = directory if item.parent < 0 else self._inodes[item.parent]
                last = name if item.parent < 0 else item.name
                if not self._gather(item, parent, last):
                    self._inodes[number] = self._copy_one(item, parent, last)
                self.counts.add()
            self._send_small()
            self._finish_small()
        # Times of directories, when nothing is added to them any more.
        for number in reversed(range(len(self._items))):
            item = self._items[number]
            if stat.S_ISDIR(item.status.st_mode):
                self._finish(item, self._inodes[number])
                self.counts.add()
        return final

    def _run(self, item: _Item, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns; its errors name the path that `item` gets in the volume."""
        return self._volume.run(coroutine, self._path_of(item))

    def _path_of(self, item: _Item) -> str:
        below = item.path[len(self._host) :].lstrip(b"/")
        return os.fsdecode(os.path.join(self._final, below) if below else self._final)

    async def _find_target(self, host: bytes, target: bytes) -> tuple[int, bytes, bytes]:
        """The directory and name that the top gets (b"" for the directory itself), and its path."""
        spot = await walk(self._file_system, target, follow=True)
        is_directory = stat.S_ISDIR(self._items[0].status.st_mode)
        found = spot.attributes
        if found is None:
            if spot.slash and not is_directory:
                raise MissingError("there is no such directory")
            return spot.directory, spot.name, target
        if found.kind is not FileKind.DIRECTORY:
            present(spot)
            return spot.directory, spot.name, target
        name = os.path.basename(host)
        if name in (b"", b".", b".."):
            return found.inode, b"", target
        return found.inode, name, os.path.join(target, name)

    def _copy_one(self, item: _Item, parent: int, name: bytes) -> int:
        """The inode that `item` has in the volume."""
        status = item.status
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            return self._run(item, self._make_directory(item, parent, name)) if name else parent
        known = self._seen.get((status.st_dev, status.st_ino)) if status.st_nlink > 1 else None
        if known is not None:
            self._run(item, self._link(known, parent, name))
            self.counts.hard_links += 1
            return known
        if stat.S_ISREG(mode):
            inode = self._copy_file(item, parent, name)
            self.counts.files += 1
        elif stat.S_ISLNK(mode):
            with on_host("reading the link", item.path):
                target = os.readlink(item.path)
            inode = self._make_node(item, parent, name, target=target)
            self.counts.links += 1
        else:
            inode = self._make_node(item, parent, name)
            self.counts.nodes += 1
        self._seen[status.st_dev, status.st_ino] = inode
        return inode

    async def _make_directory(self, item: _Item, parent: int, name: bytes) -> int:
        found = await self._there(parent, name)
        if found is not None:
            inode, kind = found
            if kind is not FileKind.DIRECTORY:
                raise NotDirectoryError("a directory cannot replace what is none")
            return inode
        self.counts.directories += 1
        return await self._create(item, parent, name, 0o700)

    async def _link(self, inode: int, parent: int, name: bytes) -> None:
        found = await self._there(parent, name)
        if found is not None:
            if found[0] == inode:
                return
            if found[1] is FileKind.DIRECTORY:
                raise _not_replaced(None)
            await self._file_system.unlink(parent, name)
        await self._file_system.link(inode, parent, name)

    def _make_node(self, item: _Item, parent: int, name: bytes, *, target: bytes = b"") -> int:
        """A symbolic link, fifo, socket or device."""

        async def make(temporary: bytes) -> int:
            return await self._create(item, parent, temporary, target=target)

        with self._new_name(item, parent, name) as temporary:
            inode = self._run(item, make(temporary))
            self._finish(item, inode)
        return inode

    async def _create(
        self, item: _Item, parent: int, name: bytes, permissions: int | None = None, *, target: bytes = b""
    ) -> int:
        status = item.status
        owner = tree.Owner(status.st_uid, status.st_gid) if self._keep else self._volume.owner
        mode = stat.S_IFMT(status.st_mode) | (
            stat.S_IMODE(status.st_mode) & 0o777 if permissions is None else permissions
        )
        return await self._file_system.create(
            parent, name, mode, uid=owner.uid, gid=owner.gid, device_number=status.st_rdev, target=target
        )

    async def _there(self, parent: int, name: bytes) -> tuple[int, FileKind] | None:
        """The inode that has the name already, and what it is."""
        try:
            inode = await self._file_system.lookup(parent, name)
        except MissingError:
            return None
        return inode, (await self._file_system.attributes(inode)).kind

    @contextlib.contextmanager
    def _new_name(self, item: _Item, parent: int, name: bytes) -> Iterator[bytes]:
        """The name that something new is made under; it is removed if making it fails.

        Where something has the final name already, it is another one, which takes its place when all is well.
        """
        file_system = self._file_system
        found = self._run(item, self._there(parent, name))
        temporary = name
        if found is not None:
            if found[1] is FileKind.DIRECTORY:
                raise _not_replaced(self._path_of(item))
            temporary = temporary_name(name, lambda hidden: self._run(item, self._there(parent, hidden)) is not None)
        try:
            yield temporary
            if temporary != name:
                self._run(item, file_system.rename(parent, temporary, parent, name))
        except ExistsError:
            raise  # Somebody else's: it is not ours to remove.
        except BaseException:
            with contextlib.suppress(ODirectError):
                self._run(item, file_system.unlink(parent, temporary))
            raise

    # Files.

    def _copy_file(self, item: _Item, parent: int, name: bytes) -> int:
        fd, status = _open_item(item)
        try:
            with self._new_name(item, parent, name) as temporary:
                inode = self._run(item, self._create(item, parent, temporary, 0o600))
                handle = self._run(item, self._file_system.open_file(inode, writable=True))
                try:
                    self._fill(item, fd, handle, status.st_size)
                finally:
                    self._run(item, handle.close())
                self._finish(item, inode)
        finally:
            os.close(fd)
        return inode

    def _fill(self, item: _Item, fd: int, handle: VolumeFile, size: int) -> None:
        """Copy the bytes: each chunk is written while the next one is read."""
        writing: Task[None] | None = None
        end = 0
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: settle(self._runner, writing))
            reader: files.File | None = None
            if size >= DIRECT_BYTES:
                reader = stack.enter_context(files.open(f"/proc/self/fd/{fd}"))
            for start, stop in _data_runs(item, fd, size):
                if start > end:
                    self.counts.add(skipped=start - end)
                for offset, length in chunks(start, stop):
                    view = self._buffers.next()[:length]
                    _read_full(item, fd if reader is None else reader, view, offset)
                    if writing is not None:
                        self._finished(item, writing)
                    writing = self._runner.start(tree.write_whole(handle, offset, view))
                    self.counts.add(copied=length)
                end = stop
            if writing is not None:
                self._finished(item, writing)
            if end < size:
                self._run(item, handle.truncate(size))
                self.counts.add(skipped=size - end)

    def _finished(self, item: _Item, writing: Task[None]) -> None:
        try:
            finished(self._runner, writing)
        except ODirectError as error:
            named(error, self._path_of(item))
            raise

    # Small files, many at once: while one batch is on its way to the device the next one is read.

    def _gather(self, item: _Item, parent: int, name: bytes) -> bool:
        """Read a small file, to be made with others soon; False if it is one that must be made by itself."""
        status = item.status
        most = self._file_system.small_file_bytes
        if not stat.S_ISREG(status.st_mode) or status.st_size > most or status.st_nlink != 1 or item.parent < 0:
            return False
        directory = self._directories.get(parent)
        if directory is None:
            directory = self._directories[parent] = self._run(item, self._look_at(parent))
        if name in directory.names:
            return False
        fd, status = _open_item(item)
        try:
            size = status.st_size
            if size > most or (size > status.st_blocks * _SECTOR_BYTES and _has_holes(item, fd, size)):
                return False
            with on_host("reading", item.path):
                if self._keep and _may_have_xattrs(fd):
                    return False
                content = os.read(fd, size)
        finally:
            os.close(fd)
        if len(content) < size:
            raise InUseError("it became shorter while it was copied", path=item.path)
        if len(self._small) == _MOST_SMALL or self._small_bytes + size > _MOST_SMALL_BYTES:
            self._send_small()
        self._small_bytes += size
        self._small.append(_Small(item, self._new_file(item, directory, parent, name, content)))
        return True

    def _new_file(self, item: _Item, directory: _Directory, parent: int, name: bytes, content: bytes) -> NewFile:
        status = item.status
        mode = stat.S_IMODE(status.st_mode)
        if self._keep:
            times = status.st_atime_ns, status.st_mtime_ns
            return NewFile(parent, name, content, mode, status.st_uid, status.st_gid, *times)
        now_ns, owner = wall_ns(), self._volume.owner
        group = owner.gid if directory.group is None else directory.group
        return NewFile(parent, name, content, mode & 0o777, owner.uid, group, now_ns, now_ns)

    async def _look_at(self, directory: int) -> _Directory:
        """What is in a directory already, and the group that it gives to what is made there."""
        found = await self._file_system.attributes(directory)
        names = frozenset(entry.name for entry in await self._file_system.entries(directory))
        return _Directory(names, found.gid if found.mode & stat.S_ISGID else None)

    def _send_small(self) -> None:
        """Begin to make what was gathered, once the batch before is done."""
        self._finish_small()
        small, self._small, self._small_bytes = self._small, [], 0
        if small:
            coroutine = self._file_system.create_whole([each.new for each in small])
            self._making = small, self._runner.start(coroutine)

    def _finish_small(self) -> None:
        """Wait for the batch that is being made."""
        if self._making is None:
            return
        small, task = self._making
        try:
            finished(self._runner, task)
        except NoSpaceError:
            # One by one, so that all are there that there is room for, and the error names the first that is not.
            self._making = None
            for item, new in small:
                if self._run(item, self._there(new.directory, new.name)) is None:
                    self._copy_one(item, new.directory, new.name)
                else:
                    self._count_small(new)
            return
        except ODirectError as error:
            named(error, self._path_of(small[0].item))
            raise
        self._making = None
        for each in small:
            self._count_small(each.new)

    def _count_small(self, new: NewFile) -> None:
        self.counts.files += 1
        self.counts.add(copied=len(new.content))

    def _settle_small(self) -> None:
        if self._making is not None:
            settle(self._runner, self._making[1])

    # Attributes.

    def _finish(self, item: _Item, inode: int) -> None:
        """Give an inode what its original has."""
        self._run(item, self._give_attributes(item, inode, self._attributes_of(item)))

    def _attributes_of(self, item: _Item) -> dict[bytes, bytes]:
        """The extended attributes that are to be kept."""
        found = dict(_host_xattrs(item, self.counts)) if self._keep else {}
        for name in [name for name in found if name.startswith(b"system.")]:
            # A file system keeps them in a form of its own.
            self.counts.leave_out(item.path, os.fsdecode(name), OSError(errno.EOPNOTSUPP, ""))
            del found[name]
        return found

    async def _give_attributes(self, item: _Item, inode: int, xattrs: dict[bytes, bytes]) -> None:
        """Set permissions, and, if they are kept, owners, times and extended attributes."""
        status, file_system = item.status, self._file_system
        mode = stat.S_IMODE(status.st_mode)
        is_link = stat.S_ISLNK(status.st_mode)
        if not self._keep:
            if not is_link:
                await file_system.set_attributes(inode, mode=mode & 0o777)
            return
        for name, value in xattrs.items():
            try:
                await file_system.set_xattr(inode, name, value)
            except (UnsupportedError, PathError, NoSpaceError) as error:
                self.counts.leave_out(item.path, os.fsdecode(name), error)
        await file_system.set_attributes(
            inode,
            mode=None if is_link else mode,
            uid=status.st_uid,
            gid=status.st_gid,
            atime_ns=status.st_atime_ns,
            mtime_ns=status.st_mtime_ns,
        )


def _not_replaced(path: object) -> DirectoryError:
    return DirectoryError("a directory has that name, and is not replaced by what is none", path=path)


def _open_item(item: _Item) -> tuple[int, os.stat_result]:
    """A descriptor of the very file that was planned for, the caller's to close, and what it says now."""
    # The top may have been reached by a link; what is below never is.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if item.parent >= 0 else 0)
    with on_host("opening", item.path):
        fd = os.open(item.path, flags)
    try:
        status = os.fstat(fd)
        if (status.st_ino, status.st_dev) != (item.status.st_ino, item.status.st_dev):
            raise InUseError("another file has taken its name while it was copied", path=item.path)
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def _data_runs(item: _Item, fd: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the runs of the file that are no holes."""
    end = 0
    while end < size:
        with on_host("looking for holes", item.path):
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                if error.errno != errno.EINVAL:
                    raise
                start, end = end, size  # Its file system has no notion of holes.
            else:
                end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        if start >= end:
            return
        yield start, end


def _has_holes(item: _Item, fd: int, size: int) -> bool:
    return list(_data_runs(item, fd, size)) != [(0, size)]


def _may_have_xattrs(fd: int) -> bool:
    try:
        return bool(os.listxattr(fd))
    except OSError as error:
        return error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS)


def _read_full(item: _Item, source: int | files.File, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        with on_host("reading", item.path):
            if isinstance(source, int):
                count = os.preadv(source, [view[done:]], offset + done)
            else:
                count = source.preadinto(view[done:], offset + done)
        if not count:
            raise InUseError("it became shorter while it was copied", path=item.path)
        done += count


def _host_xattrs(item: _Item, counts: Counts) -> Iterator[tuple[bytes, bytes]]:
    follow = item.parent < 0
    try:
        names = os.listxattr(item.path, follow_symlinks=follow)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            counts.leave_out(item.path, "extended attributes", error)
        return
    for name in names:
        try:
            yield os.fsencode(name), os.getxattr(item.path, name, follow_symlinks=follow)
        except OSError as error:
            counts.leave_out(item.path, name, error)
