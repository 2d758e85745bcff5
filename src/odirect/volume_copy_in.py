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
    from_errno,
)
from odirect.fs import tree
from odirect.fs.base import ACLS, FileKind, Making, NewFiles, VolumeFile
from odirect.fs.paths import path_bytes, present, walk
from odirect.host_tree import (
    ATIME,
    ATIME_NS,
    DEV,
    GID,
    INO,
    MODE,
    MTIME,
    MTIME_NS,
    NLINK,
    SIZE,
    UID,
    Batch,
    Listing,
    SmallFiles,
    Status,
    list_tree,
    row_of,
)
from odirect.ring._calls import ANOTHER, NOT_SMALL, SHORTER
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

# Some files of /proc refuse to be read in larger pieces.
_STREAM_BYTES = 1 << 20

# Directories are finished so many at a time; between them signals are looked for.
_DIRECTORIES = 64

T = TypeVar("T")
HostPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def copy_in(
    volume: VolumeNames,
    source: HostPath,
    target: AnyPath,
    *,
    recursive: bool = True,
    attributes: bool = True,
    progress: Progress | None = None,
    listings: list[Listing] | None = None,
) -> TreeReport:
    """A report of copying `source` of the host to `target` in the volume; see `Volume.copy_in`.

    listings: of `source`, for who has them already.
    """
    encoded, shown = volume._path(target)
    host = path_bytes(source)
    with Interrupts() as interrupts:
        with on_host("looking at it", host):
            top = _Item(host, b"", os.stat(host), is_top=True)
        is_directory = stat.S_ISDIR(top.status.st_mode)
        if is_directory and not recursive:
            raise DirectoryError("it is a directory, and recursive was not asked for", path=host)
        if listings is None:
            listings = list_tree(host) if is_directory else []
        interrupts.check()
        counts = Counts(progress, _total(listings) or top.status.st_size, interrupts)
        copier = _CopyIn(volume, top, listings, attributes, counts)
        final = copier.copy(encoded, shown)
        return counts.report(os.fsdecode(final))


class _Item(NamedTuple):
    """Something to copy. is_top: it may have been reached by a symbolic link."""

    path: bytes
    name: bytes
    status: Status | os.stat_result
    is_top: bool = False


def _total(listings: list[Listing]) -> int:
    """The bytes of all regular files, those of several names once."""
    total = 0
    seen: set[tuple[int, int]] = set()
    for listing in listings:
        statuses = listing.statuses[listing.are(stat.S_IFREG)]
        linked = statuses[:, NLINK] > 1
        total += int(statuses[~linked, SIZE].sum())
        for dev, ino, size in statuses[linked][:, [DEV, INO, SIZE]].tolist():
            if (dev, ino) not in seen:
                seen.add((dev, ino))
                total += size
    return total


class _Making(NamedTuple):
    """Small files on their way into the volume: their batch, and the rows of it that are made."""

    batch: Batch
    rows: list[int]
    making: Making


class _Directory(NamedTuple):
    """A directory of the volume before anything small was added.

    names: of what is in it. group: that what is made there gets, if not its maker's. inherits: what is made there
    gets access rights that only making it by itself finds out.
    """

    names: frozenset[bytes]
    group: int | None
    inherits: bool


class _CopyIn:
    """One copy into a volume."""

    def __init__(
        self, volume: VolumeNames, top: _Item, listings: list[Listing], attributes: bool, counts: Counts
    ) -> None:
        self.counts = counts
        self._volume = volume
        self._file_system = volume.file_system
        self._runner = volume.runner
        self._top = top
        self._listings = listings
        self._keep = attributes
        self._buffers = Buffers()
        self._final = b""
        self._making: _Making | None = None
        self._directories: dict[int, _Directory] = {}
        #: The item of each listing, and its inode in the volume; those of the listings before this one are all there.
        self._made: dict[int, tuple[_Item, int]] = {}
        self._filled = 0
        self._seen: dict[tuple[int, int], int] = {}
        #: Directories that this copy has made: the host has no name in them twice, and nobody else knows of them.
        self._fresh: set[int] = set()
        #: By inode, the permission bits that it can have: what its directory let it inherit says so.
        self._most: dict[int, int] = {}

    def copy(self, target: bytes, shown: str | bytes) -> bytes:
        """Copy everything; the path in the volume that the top has."""
        top = self._top
        directory, name, final = self._volume.run(self._find_target(target), shown)
        self._final = final
        inode = self._copy_one(top, directory, name)
        self.counts.add()
        if self._listings:
            self._made[0] = top, inode
            most, block_bytes = self._file_system.small_file_bytes, self._file_system.block_bytes
            with SmallFiles(self._listings, most, block_bytes, plain=self._keep) as files:
                try:
                    for batch in files:
                        self._fill_up_to(batch.parts[-1].listing + 1)
                        self._make_small(files, batch)
                    self._finish_small(files)
                except BaseException:
                    self._give_up_small()
                    raise
            self._fill_up_to(len(self._listings))
        self._finish_directories()
        return final

    def _fill_up_to(self, end: int) -> None:
        """Copy what is not small of the listings up to number `end`."""
        most = self._file_system.small_file_bytes
        for number in range(self._filled, end):
            listing = self._listings[number]
            _, parent = self._made[number]
            for row in (~listing.small(most)).nonzero()[0].tolist():
                item = _Item(listing.path_of(row), listing.names[row], Status.of(listing.statuses[row]))
                inode = self._copy_one(item, parent, item.name)
                if row in listing.below:
                    self._made[listing.below[row]] = item, inode
                self.counts.add()
        self._filled = max(self._filled, end)

    def _finish_directories(self) -> None:
        """Give directories what their originals have, their times too: nothing is added to them any more."""

        async def finish(some: list[tuple[_Item, int]]) -> None:
            for item, inode in some:
                try:
                    await self._give_attributes(item, inode, self._attributes_of(item))
                except ODirectError as error:
                    named(error, self._path_of(item))
                    raise

        made = list(reversed(self._made.values()))
        for start in range(0, len(made), _DIRECTORIES):
            self._runner.run(finish(made[start : start + _DIRECTORIES]))
            self.counts.add()

    def _run(self, item: _Item, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns; its errors name the path that `item` gets in the volume."""
        return self._volume.run(coroutine, self._path_of(item))

    def _path_of(self, item: _Item) -> str:
        below = item.path[len(self._top.path) :].lstrip(b"/")
        return os.fsdecode(os.path.join(self._final, below) if below else self._final)

    async def _find_target(self, target: bytes) -> tuple[int, bytes, bytes]:
        """The directory and name that the top gets (b"" for the directory itself), and its path."""
        spot = await walk(self._file_system, target, follow=True)
        is_directory = stat.S_ISDIR(self._top.status.st_mode)
        found = spot.attributes
        if found is None:
            if spot.slash and not is_directory:
                raise MissingError("there is no such directory")
            return spot.directory, spot.name, target
        if found.kind is not FileKind.DIRECTORY:
            present(spot)
            return spot.directory, spot.name, target
        name = os.path.basename(self._top.path)
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
        inode = await self._create(item, parent, name, 0o700)
        self._fresh.add(inode)
        return inode

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
            self._make_like(item, inode)
        return inode

    async def _create(
        self, item: _Item, parent: int, name: bytes, permissions: int | None = None, *, target: bytes = b""
    ) -> int:
        status = item.status
        owner = tree.Owner(status.st_uid, status.st_gid) if self._keep else self._volume.owner
        mode = stat.S_IFMT(status.st_mode) | (
            stat.S_IMODE(status.st_mode) & 0o777 if permissions is None else permissions
        )
        inode = await self._file_system.create(
            parent, name, mode, uid=owner.uid, gid=owner.gid, device_number=status.st_rdev, target=target
        )
        if not self._keep and (bits := await self._file_system.inherited_mode(parent)) is not None:
            self._most[inode] = bits
        return inode

    async def _there(self, parent: int, name: bytes) -> tuple[int, FileKind] | None:
        """The inode that has the name already, and what it is."""
        if parent in self._fresh:
            return None
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
                self._make_like(item, inode)
        finally:
            os.close(fd)
        return inode

    def _fill(self, item: _Item, fd: int, handle: VolumeFile, size: int) -> None:
        """Copy the bytes: each chunk is written while the next one is read."""
        if not size:
            self._fill_as_it_comes(item, fd, handle)
            return
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

    def _fill_as_it_comes(self, item: _Item, fd: int, handle: VolumeFile) -> None:
        """Copy what a file without a size gives: nothing, or what is made while it is read, as in /proc."""
        offset = 0
        view = self._buffers.next()[:_STREAM_BYTES]
        while True:
            with on_host("reading", item.path):
                count = os.preadv(fd, [view], offset)
            if not count:
                return
            self._run(item, tree.write_whole(handle, offset, view[:count]))
            self.counts.add(copied=count)
            offset += count

    def _finished(self, item: _Item, writing: Task[None]) -> None:
        try:
            finished(self._runner, writing)
        except ODirectError as error:
            named(error, self._path_of(item))
            raise

    # Small files, many at once: while one batch is on its way to the device the next ones are read.

    def _make_small(self, files: SmallFiles, batch: Batch) -> None:
        """Begin to make what is small of a batch, finish the batch before, and copy by itself what is not."""
        rows: list[int] = []
        alone: list[int] = []
        row = 0
        for number, listed in batch.parts:
            directory = self._directory(number)
            for name in batch.names[row : row + len(listed)]:
                result = batch.results[row]
                if result not in (0, NOT_SMALL):
                    self._finish_small(files)
                    raise _not_read(self._item_of(batch, row), result)
                small = result == 0 and name not in directory.names and not directory.inherits
                (rows if small else alone).append(row)
                row += 1
        making: Making | None = None
        if rows:
            try:
                making = self._run(self._item_of(batch, rows[0]), self._begin(batch, rows))
            except NoSpaceError:
                # One by one, so that all are there that there is room for, and the error names the first that is not.
                alone = sorted(alone + rows)
        # What was begun is given up if something fails from here on.
        before, self._making = self._making, None if making is None else _Making(batch, rows, making)
        if before is not None:
            self._finish(files, before)
        if making is None:
            files.release(batch)
        for row in alone:
            self._copy_alone(batch, row)

    async def _begin(self, batch: Batch, rows: list[int]) -> Making:
        import numpy

        statuses, rooms, names, memory = batch.statuses, batch.rooms, batch.names, batch.memory
        numbers = numpy.repeat(
            [self._made[number][1] for number, _ in batch.parts], [len(listed) for _, listed in batch.parts]
        )
        if len(rows) < len(names):
            statuses, rooms, numbers = statuses[rows], rooms[rows], numbers[rows]
            names = [names[row] for row in rows]
        block_bytes = self._file_system.block_bytes
        needed = -(-statuses[:, SIZE] // block_bytes) * block_bytes
        if len(names) < len(batch.names) or (needed < rooms).any():
            # What is not made here, or became shorter, leaves a gap.
            starts = (numpy.cumsum(batch.rooms) - batch.rooms)[rows].tolist()
            at = 0
            for start, length in zip(starts, needed.tolist(), strict=True):
                memory[at : at + length] = memory[start : start + length]
                at += length
        modes, uids, gids = (statuses[:, column] for column in (MODE, UID, GID))
        atimes, mtimes = statuses[:, [ATIME, ATIME_NS]], statuses[:, [MTIME, MTIME_NS]]
        if self._keep:
            modes = modes & 0o7777
        else:
            owner = self._volume.owner
            groups = [self._directories[number].group for number in numbers.tolist()]
            modes = modes & 0o777
            uids = numpy.full(len(rows), owner.uid)
            gids = numpy.array([owner.gid if group is None else group for group in groups])
            atimes = mtimes = numpy.tile(numpy.array(divmod(wall_ns(), 1_000_000_000)), (len(rows), 1))
        memory = memory[: int(needed.sum())]
        return await self._file_system.begin_whole(
            NewFiles(numbers, names, memory, statuses[:, SIZE], modes, uids, gids, atimes, mtimes)
        )

    def _directory(self, number: int) -> _Directory:
        """The directory of a listing, as it was when it was first asked for."""
        item, inode = self._made[number]
        found = self._directories.get(inode)
        if found is None:
            found = self._directories[inode] = self._run(item, self._look_at(inode))
        return found

    async def _look_at(self, directory: int) -> _Directory:
        """What is in a directory already, and what it gives to what is made there."""
        if self._keep and directory in self._fresh:
            return _Directory(frozenset(), None, False)
        found = await self._file_system.attributes(directory)
        names = frozenset(entry.name for entry in await self._file_system.entries(directory))
        inherits = not self._keep and await self._file_system.inherited_mode(directory) is not None
        return _Directory(names, found.gid if found.mode & stat.S_ISGID else None, inherits)

    def _item_of(self, batch: Batch, row: int) -> _Item:
        number, at = row_of(batch.parts, row)
        return _Item(self._listings[number].path_of(at), batch.names[row], Status.of(batch.statuses[row]))

    def _copy_alone(self, batch: Batch, row: int) -> None:
        item = self._item_of(batch, row)
        number, _ = row_of(batch.parts, row)
        self._copy_one(item, self._made[number][1], item.name)
        self.counts.add()

    def _finish_small(self, files: SmallFiles) -> None:
        """Finish the batch that is being made, if there is one."""
        if self._making is not None:
            begun, self._making = self._making, None
            self._finish(files, begun)

    def _finish(self, files: SmallFiles, begun: _Making) -> None:
        """Wait for a batch, and let it have its names."""
        batch, rows, making = begun
        try:
            self._run(self._item_of(batch, rows[0]), making.finish())
        except NoSpaceError:
            for row in rows:
                self._copy_alone(batch, row)
        else:
            self.counts.files += len(rows)
            self.counts.add(copied=int(batch.statuses[rows, SIZE].sum()))
        files.release(batch)

    def _give_up_small(self) -> None:
        """Nothing of the batch that was being made is in flight any more."""
        if self._making is not None:
            (batch, rows, making), self._making = self._making, None
            with contextlib.suppress(ODirectError):
                self._run(self._item_of(batch, rows[0]), making.give_up())

    # Attributes.

    def _make_like(self, item: _Item, inode: int) -> None:
        """Give an inode what its original has."""
        self._run(item, self._give_attributes(item, inode, self._attributes_of(item)))

    def _attributes_of(self, item: _Item) -> dict[bytes, bytes]:
        """The extended attributes that are to be kept."""
        found = dict(_host_xattrs(item, self.counts)) if self._keep else {}
        for name in [name for name in found if name.startswith(b"system.") and name not in ACLS]:
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
                await file_system.set_attributes(inode, mode=mode & self._most.get(inode, 0o777))
            return
        missed = await tree.make_like(
            file_system,
            inode,
            mode=None if is_link else mode,
            owner=(status.st_uid, status.st_gid),
            times_ns=(status.st_atime_ns, status.st_mtime_ns),
            xattrs=xattrs,
        )
        for name, error in missed:
            self.counts.leave_out(item.path, os.fsdecode(name), error)


def _not_replaced(path: object) -> DirectoryError:
    return DirectoryError("a directory has that name, and is not replaced by what is none", path=path)


def _open_item(item: _Item) -> tuple[int, os.stat_result]:
    """A descriptor of the very file that was planned for, the caller's to close, and what it says now."""
    # The top may have been reached by a link; what is below never is.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if not item.is_top else 0)
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


def _not_read(item: _Item, result: int) -> ODirectError:
    """Why a small file could not be read."""
    if result == ANOTHER:
        return InUseError("another file has taken its name while it was copied", path=item.path)
    if result == SHORTER:
        return InUseError("it became shorter while it was copied", path=item.path)
    return from_errno(-result, "reading", item.path)


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
    follow = item.is_top
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
