"""`odirect.copy`: whole files and devices, past the page cache, with all or nothing as the result.

A regular file is written under a hidden temporary name beside its target and takes the target's name
when it is whole, so that nobody ever sees half a copy (a process that is killed outright leaves the hidden
file behind). A block device is written in place.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import itertools
import mmap
import os
import select
import stat
from collections.abc import Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

from odirect.base.errors import (
    DirectoryError,
    InUseError,
    MissingError,
    NoSpaceError,
    NotDirectError,
    NotDirectoryError,
    PathError,
    UnsupportedError,
    from_errno,
)
from odirect.base.units import align_down, align_up, is_power_of_two
from odirect.block.bio import READ, WRITE
from odirect.block.buffers import BufferPool, Lease
from odirect.block.cached_file import CachedFileDevice
from odirect.block.file_device import FileDevice, file_bytes
from odirect.block.in_use import check_unused
from odirect.block.limits import file_limits
from odirect.block.queue import RingQueue
from odirect.dio.bounce import Moved
from odirect.dio.copying import Chunk, Digests, Mover, chunks_of, settled, shrank
from odirect.dio.opening import Opened, Path, open_file, plain_file
from odirect.dio.outcome import Kind, Outcome, Tally
from odirect.dio.plainfile import NO_END, PlainFile
from odirect.ring._calls import fallocate
from odirect.ring.choose import open_ring
from odirect.sched.clock import Clock
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.interrupts import Interrupts
from odirect.sched.scheduler import Scheduler, Task
from odirect.sched.traps import gather, joined, this_scheduler, wait, yield_now

T = TypeVar("T")
Access = Literal["auto", "strict"]
Progress = Callable[[int, int], None]

#: How much one request moves, and how many chunks are under way, unless told otherwise: measured, a fast disk
#: that is read and written at once wants some tens of MiB in flight.
CHUNK_BYTES = 4 << 20
DEPTH = 16
#: More chunks than this are not under way at once: each has a buffer of its own.
MOST_DEPTH = 1024

# Threads for a file whose direct I/O is refused at open: each does one request through the page cache.
_CACHE_WORKERS = 4
# Buffers for the edges that bounce; a chunk holds none of them while it waits for another.
_EDGE_BYTES, _EDGES = 1 << 20, 4
# A file whose size is not known beforehand grows in steps, each of them a change of metadata.
_GROWTH_BYTES = 64 << 20
# One fallocate of more would keep a signal waiting.
_MOST_ALLOCATED = 16 << 30
_LONGEST_NAME = 255
# What one read of a stream asks for: the kernel makes some files (/proc/sys) in memory, and refuses 4 MiB of it.
_MOST_READ = 1 << 20
# Network file systems call their transfer size a block.
_LARGEST_BLOCK = 1 << 16


class CopyReport(NamedTuple):
    """What was copied, and how.

    target: the path that was written (in the directory, if one was named). bytes_copied were moved,
    bytes_skipped are holes: not moved, and read as zeroes in the copy. read_outcomes has the reading
    back of a verified copy, too.
    """

    target: str
    bytes_copied: int
    bytes_skipped: int
    seconds: float
    read_outcomes: dict[Outcome, Tally]
    write_outcomes: dict[Outcome, Tally]
    verified: bool
    durable: bool

    @property
    def bytes_per_second(self) -> float:
        """The rate at which the copy advanced, holes not counted."""
        return self.bytes_copied / self.seconds if self.seconds else 0.0


def copy(
    source: Path,
    target: Path,
    *,
    verify: bool = False,
    durable: bool = False,
    sparse: bool = True,
    progress: Progress | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    depth: int = DEPTH,
    overwrite_in_use: bool = False,
    access: Access = "auto",
    clock: Clock | None = None,
) -> CopyReport:
    """A report of copying the file or block device `source` to `target`: a file, a device or a directory.

    verify: read the copy back past the page cache, and compare it with what was written.
    durable: the copy, and its name, survive a power cut when this returns.
    sparse: holes stay holes; on a device they become zeroes by the device's own command if it has
    one. Without it every byte is written.
    progress: called with (bytes done, bytes in all) after each chunk; holes count, and verifying
    counts as much again. What it raises ends the copy.
    chunk_bytes, depth: how much one request moves, and how many chunks are under way (1024 at most); more
    memory than their product is not used.
    overwrite_in_use: write to a device that is mounted or in use, or over an image file that is.
    access: "strict" raises NotDirectError instead of going through the page cache; parts of blocks at
    the end of a file, which have no other way, excepted.

    A source whose size says nothing, because its bytes are made while it is read (in /proc, /sys), is read to its
    end through the page cache; `progress` is told 0 for the whole.

    A symbolic link as target is followed. A target that exists keeps its mode, a new one gets the
    source's, less the umask. If anything fails or interrupts it, the target is as it was, and no
    temporary file is left (a device that was being written holds a part of the copy).

    Raises InUseError, also for a source that became shorter, NoSpaceError before the first byte is
    written wherever that can be known, VerifyError with the first byte that differs, PathError if both
    are the same file, and the errors of opening, reading and writing.
    """
    line_depth, strict = _checked(chunk_bytes, depth, access, clock)
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        reading = open_file(source, "r", strict=strict)
        stack.callback(reading.close)
        _refuse_cached(reading, READ, strict)
        found = _find_target(target, source)
        _refuse_same(reading, found)
        size = file_bytes(reading.cached_fd)
        mode = 0o666 if reading.state.is_block else stat.S_IMODE(os.fstat(reading.cached_fd).st_mode)
        writing = _Target(found, mode & 0o777, strict=strict, overwrite_in_use=overwrite_in_use)
        if reading.generated:
            stream = _Stream(reading.cached_fd, reading.state.path, Outcome(Kind.BUFFERED, reading.state.refused[READ]))
            options = _Options(verify, durable, strict, progress, chunk_bytes, line_depth, clock)
            return _copy_stream(stream, writing, options, stack, interrupts)
        stack.push(writing)  # before it is opened: an interrupt may come right after that
        writing.open()
        to_device = writing.opened.state.is_block
        writing.make_room(size)
        line = stack.enter_context(_Line(reading, writing.opened, chunk_bytes, line_depth, clock))

        data = _data_runs(reading.cached_fd, size) if sparse and not reading.state.is_block else iter([(0, size)])
        runs = list(settled(data, size, line.unit))
        if not to_device:
            writing.allocate([run for run in runs if not run.hole], line.chunk_bytes)
        interrupts.check()

        def chunks() -> Iterator[Chunk]:
            return chunks_of(runs, line.chunk_bytes)

        done = _Done(progress, size * (2 if verify else 1), interrupts)
        mover = Mover(line.pool, depth=line.depth, strict=strict, on_bytes=done.add)
        digests = Digests() if verify else None
        from_file, to_file = line.file(reading), line.file(writing.opened)
        line.run(mover.copy(from_file, to_file, chunks(), digests=digests, zero=to_device))
        if file_bytes(reading.cached_fd) < size:
            raise shrank(from_file, file_bytes(reading.cached_fd), size)
        if durable:
            line.run(to_file.sync())
        if digests is not None:
            writing.forget_pages()
            line.run(mover.check(from_file, to_file, chunks(), digests, is_hole=writing.has_hole))
        interrupts.check()
        writing.commit(durable)
        return line.report(writing, mover, verified=verify, durable=durable)


def copy_in(
    stream_fd: int,
    target: Path,
    *,
    verify: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    depth: int = DEPTH,
    overwrite_in_use: bool = False,
    access: Access = "auto",
    clock: Clock | None = None,
) -> CopyReport:
    """A report of writing all that can be read from `stream_fd`, a pipe or the like, to `target`.

    As `copy`, but the size is known only at the end: `progress` is told 0 for the whole, and what
    verifying finds is named by its chunk alone. Reading the stream blocks.
    """
    line_depth, strict = _checked(chunk_bytes, depth, access, clock)
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        found = _find_target(target, None)
        writing = _Target(found, 0o666, strict=strict, overwrite_in_use=overwrite_in_use)
        options = _Options(verify, durable, strict, progress, chunk_bytes, line_depth, clock)
        return _copy_stream(_Stream(stream_fd, "-", None), writing, options, stack, interrupts)


def copy_out(
    source: Path,
    stream_fd: int,
    *,
    offset: int = 0,
    length: int | None = None,
    progress: Progress | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    depth: int = DEPTH,
    access: Access = "auto",
    clock: Clock | None = None,
) -> CopyReport:
    """A report of writing bytes [offset, offset+length) of `source`, or all up to its end, to `stream_fd`.

    Several chunks are read ahead while the stream takes one. What lies past the end is left out.
    Raises PathError (EPIPE) if nobody reads the stream any more, and the errors of opening and reading.
    """
    line_depth, strict = _checked(chunk_bytes, depth, access, clock)
    if offset < 0 or (length is not None and length < 0):
        raise ValueError("the offset and the length cannot be negative")
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        reading = open_file(source, "r", strict=strict)
        stack.callback(reading.close)
        _refuse_cached(reading, READ, strict)
        size = NO_END if reading.generated else file_bytes(reading.cached_fd)
        end = size if length is None else min(size, offset + length)
        line = stack.enter_context(_Line(reading, None, chunk_bytes, line_depth, clock))
        total = max(0, end - offset)
        done = _Done(progress, 0 if reading.generated else total, interrupts)
        mover = Mover(line.pool, depth=line.depth, strict=strict, on_bytes=done.add)
        from_file = line.file(reading)
        wanted = chunks_of([Chunk(offset, total)], line.chunk_bytes)
        if reading.generated:
            line.run(_give_generated(mover, from_file, wanted, stream_fd, interrupts))
        else:
            line.run(_give_out(line, mover, from_file, wanted, stream_fd, interrupts))
        return CopyReport("-", mover.copied, 0, line.seconds, mover.reads.totals(), mover.writes.totals(), False, False)


# --- checks before anything is touched -----------------------------------------------------------


def _checked(chunk_bytes: int, depth: int, access: str, clock: object) -> tuple[int, bool]:
    """The depth, and whether the access is "strict". Raises ValueError and TypeError for what cannot be."""
    if access not in ("auto", "strict"):
        raise ValueError(f"access {access!r}: use 'auto' or 'strict'")
    if chunk_bytes < 1 or depth < 1:
        raise ValueError(f"chunks of {chunk_bytes} bytes, {depth} at once: both must be at least 1")
    if depth > MOST_DEPTH:
        raise ValueError(f"{depth} chunks at once: there can be {MOST_DEPTH} at most")
    if clock is not None and not callable(getattr(clock, "now_ns", None)):
        raise TypeError(f"a clock has now_ns(); {type(clock).__name__} has not")
    return depth, access == "strict"


def _refuse_cached(opened: Opened, op: int, strict: bool) -> None:
    """Raise NotDirectError if `strict` and it is known already that the page cache would be used."""
    reason = opened.state.refused.get(op) or opened.state.cached.get(op)
    if strict and reason is not None:
        verb = "reading" if op == READ else "writing"
        raise NotDirectError(f"{verb} it cannot go direct: {reason.value}", path=opened.state.path)


def _refuse_same(reading: Opened, found: _Found) -> None:
    status, other = os.fstat(reading.cached_fd), found.status
    if other is None:
        return
    same_device = stat.S_ISBLK(status.st_mode) and stat.S_ISBLK(other.st_mode) and status.st_rdev == other.st_rdev
    if same_device or os.path.samestat(status, other):
        raise PathError("source and target are the same", errno=errno.EINVAL, path=found.path)


class _Found(NamedTuple):
    """The path that is to be written, with no symbolic link at its end, and what is there now."""

    path: str
    status: os.stat_result | None


def _find_target(target: Path, source: Path | None) -> _Found:
    """Where the copy goes. Raises DirectoryError, NotDirectoryError, UnsupportedError and PathErrors."""
    path = os.fsdecode(target)
    if os.path.isdir(path):
        if source is None:
            raise DirectoryError("it is a directory; a stream has no name to take there", path=path)
        path = os.path.join(path, os.path.basename(os.path.abspath(os.fsdecode(source))))
    elif path.endswith("/"):
        raise NotDirectoryError("it is not a directory", path=path)
    path = os.path.realpath(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return _Found(path, None)
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, "looking at the target", path) from error
    if stat.S_ISDIR(status.st_mode):
        raise DirectoryError("it is a directory; a file cannot replace it", path=path)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise UnsupportedError("it is neither a regular file nor a block device; use - for a stream", path=path)
    return _Found(path, status)


def _data_runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole in the file, as its file system says (SEEK_DATA, SEEK_HOLE)."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # No data from here on, or the file was cut meanwhile, which is found out later.
            yield at, size  # It does not tell.
            return
        if start < size:
            yield start, min(end, size)
        at = max(end, start + 1)


def _is_hole(fd: int, chunk: Chunk) -> bool:
    """Whether the file has no data in this range, as its file system says."""
    try:
        return os.lseek(fd, chunk.offset, os.SEEK_DATA) >= chunk.end
    except OSError as error:
        return error.errno == errno.ENXIO


# --- the target ----------------------------------------------------------------------------------


class _Target:
    """What is written: a device in place, or a new file that takes the target's name in the end.

    A context manager: whatever is not committed when it is left is removed.
    """

    def __init__(self, found: _Found, mode: int, *, strict: bool, overwrite_in_use: bool) -> None:
        self.path = found.path
        self._replaced = found.status
        self._mode = mode
        self._strict = strict
        self._overwrite_in_use = overwrite_in_use
        self._temporary: str | None = None
        self._opened: Opened | None = None
        self._hold_fd = -1
        self._grown = 0
        self._allocates = True

    def __enter__(self) -> _Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._clean_up()
        except BaseException:
            self._clean_up()  # Whoever is impatient interrupts twice; what is done by then is not done again.
            raise

    @property
    def opened(self) -> Opened:
        """What is open; RuntimeError before `open`."""
        if self._opened is None:
            raise RuntimeError("the target is not open")
        return self._opened

    def open(self) -> None:
        """Open the device, or make the temporary file. What goes wrong is cleaned up by leaving."""
        if self._replaced is not None and stat.S_ISBLK(self._replaced.st_mode):
            self._open_device()
        else:
            self._open_new()
        _refuse_cached(self.opened, WRITE, self._strict)

    def has_hole(self, chunk: Chunk) -> bool:
        """Whether a new file has no data there; of a device it cannot be told."""
        return not self.opened.state.is_block and _is_hole(self.opened.cached_fd, chunk)

    def make_room(self, size: int) -> None:
        """Give a new file its size; raise NoSpaceError if a device is too small."""
        if self.opened.state.is_block:
            there = file_bytes(self.opened.cached_fd)
            if there < size:
                raise NoSpaceError(f"it has {there} bytes, and {size} are to be copied", path=self.path)
        else:
            self.cut(size)

    def allocate(self, data: list[Chunk], chunk_bytes: int) -> None:
        """Reserve the space for the data, so that a lack of it is told before anything is written.

        Writes into space that is reserved also need not wait for each other. What fits in one chunk
        is told as early without.
        """
        if sum(run.length for run in data) <= chunk_bytes:
            return
        for run in chunks_of(data, _MOST_ALLOCATED):
            self._reserve(run.offset, run.length)

    def grow_to(self, size: int) -> None:
        """Make a new file at least that long, in large steps; `cut` takes the rest away again."""
        if size > self._grown and not self.opened.state.is_block:
            start, self._grown = self._grown, align_up(size, _GROWTH_BYTES)
            self.cut(self._grown)
            # More than will be needed, perhaps, so a lack of space means nothing yet.
            with contextlib.suppress(NoSpaceError):
                self._reserve(start, self._grown - start)

    def cut(self, size: int) -> None:
        """Give a new file exactly this size."""
        if self.opened.state.is_block:
            return
        try:
            os.ftruncate(self.opened.cached_fd, size)
        except OSError as error:
            raise from_errno(error.errno or errno.EIO, f"giving the copy {size} bytes", self.path) from error

    def forget_pages(self) -> None:
        """Drop what the page cache has of it, so that what is read next is from the device."""
        os.posix_fadvise(self.opened.cached_fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def commit(self, durable: bool) -> None:
        """Let a new file take the target's name; its directory is synced, too, if `durable`."""
        # The last part of a block went through the cache.
        self.forget_pages()
        if self._temporary is None:
            return
        if not self._overwrite_in_use:
            # Once more: a large copy takes its time, and somebody may have opened a volume in the target meanwhile.
            with contextlib.suppress(MissingError):
                check_unused(self.path, what="replace")
        try:
            self._like_replaced()
            os.rename(self._temporary, self.path)
            self._temporary = None
            if durable:
                directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        except OSError as error:
            raise from_errno(error.errno or errno.EIO, "giving the copy its name", self.path) from error

    def _clean_up(self) -> None:
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None
        if self._hold_fd >= 0:
            os.close(self._hold_fd)
            self._hold_fd = -1
        if self._opened is not None:
            self._opened.close()

    def _open_device(self) -> None:
        self._opened = open_file(self.path, "r+", strict=self._strict, overwrite_in_use=self._overwrite_in_use)
        if self._overwrite_in_use:
            return
        try:
            # Whoever mounts it, or asks as we did, is refused as long as this is open.
            self._hold_fd = os.open(self.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise InUseError("will not write to it: it has just been mounted or claimed", path=self.path) from error
            raise from_errno(error.errno or errno.EIO, "claiming", self.path) from error

    def _open_new(self) -> None:
        if self._replaced is not None:
            self._check_replaceable()
        fd = self._make_temporary()
        try:
            # The kernel has taken the umask off by now. Until it is whole, the copy is ours alone.
            self._mode = stat.S_IMODE(os.fstat(fd).st_mode)
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
        self._opened = open_file(str(self._temporary), "r+", strict=self._strict)
        # Errors name what the caller named.
        self.opened.state.path = self.path

    def _check_replaceable(self) -> None:
        """Raise what writing to the present file would: its directory may allow what it does not."""
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.ETXTBSY:  # A program that runs keeps its old file, and is not harmed.
                raise from_errno(error.errno or errno.EIO, "opening for writing", self.path) from error
        if not self._overwrite_in_use:
            check_unused(self.path, what="replace")

    def _make_temporary(self) -> int:
        """A descriptor of a new hidden file in the target's directory."""
        directory, name = os.path.split(self.path)
        number = 0
        while True:
            ending = f".{os.getpid()}-{number}.odirect"
            kept = os.fsencode(name)[: _LONGEST_NAME - 1 - len(ending)]
            path = os.path.join(directory, f".{os.fsdecode(kept)}{ending}")
            # Remembered first: an interrupt may come between the file and its descriptor.
            self._temporary = path
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
            except FileExistsError:
                self._temporary = None
                number += 1
            except OSError as error:
                self._temporary = None
                raise from_errno(error.errno or errno.EIO, "making a temporary file beside it", self.path) from error

    def _like_replaced(self) -> None:
        """Give the copy the mode, and as far as we may the owner, of the file that it replaces."""
        fd, replaced = self.opened.cached_fd, self._replaced
        if replaced is not None:
            self._mode = stat.S_IMODE(replaced.st_mode)
            status = os.fstat(fd)
            if (status.st_uid, status.st_gid) != (replaced.st_uid, replaced.st_gid):
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, replaced.st_uid, replaced.st_gid)
        os.fchmod(fd, self._mode)

    def _reserve(self, offset: int, length: int) -> None:
        state = self.opened.state
        if WRITE in state.cached or WRITE in state.refused:
            return  # Reserving would keep btrfs from compressing, and those writes go one by one anyhow.
        while self._allocates:
            answer = fallocate(self.opened.cached_fd, 0, offset, length)
            if answer == -errno.EINTR:
                continue
            if answer in (-errno.ENOSPC, -errno.EDQUOT, -errno.EFBIG):
                raise from_errno(-answer, f"reserving {length} bytes for the copy", self.path)
            # Where it cannot be done, the write itself will tell.
            self._allocates = answer == 0
            return


# --- what a copy runs on -------------------------------------------------------------------------


class _Done:
    """Counts what is done for `progress`; between two chunks is where a copy can be interrupted."""

    def __init__(self, progress: Progress | None, total: int, interrupts: Interrupts) -> None:
        self._progress = progress
        self._total = total
        self._interrupts = interrupts
        self._done = 0

    def add(self, count: int) -> None:
        """Tell the caller; what he raises, or a signal that has come, ends the copy here."""
        self._done += count
        progress = self._progress
        if progress is not None and count:
            self._interrupts.allowed(lambda: progress(self._done, self._total))
        self._interrupts.check()


class _Line:
    """The ring, the scheduler and the buffers of one copy; gone with it, so that nothing stays pinned.

    A context manager; leaving it waits for what is in flight.
    """

    def __init__(
        self, reading: Opened | None, writing: Opened | None, chunk_bytes: int, depth: int, clock: Clock | None
    ) -> None:
        unit = 1
        if reading is not None:
            unit = max(unit, reading.state.limits.read_align)
        if writing is not None:
            unit = max(unit, writing.state.limits.write_align, writing.state.limits.read_align)
            if not writing.state.is_block:
                block = os.fstatvfs(writing.cached_fd).f_frsize
                unit = max(unit, block if is_power_of_two(block) and block <= _LARGEST_BLOCK else 1)
        #: What the edges of holes are multiples of.
        self.unit = unit
        self.chunk_bytes = align_up(chunk_bytes, max(unit, mmap.PAGESIZE))
        self.depth = depth
        # On a ring of threads, a thread for each chunk: somebody must wait for each.
        self._queue = RingQueue(open_ring(2 * depth, workers=min(depth, 16)))
        self.pool = BufferPool(self.chunk_bytes, depth, ring=self._queue.ring)
        self._edges = BufferPool(_EDGE_BYTES, _EDGES)
        self._scheduler = Scheduler(clock)
        self._scheduler.add_device(self._queue)
        self._driver = SyncDriver(self._scheduler)
        self._cached: list[CachedFileDevice] = []
        self._start_ns = self._scheduler.clock.now_ns()

    def __enter__(self) -> _Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.close()
        for device in self._cached:
            device.close()

    @property
    def seconds(self) -> float:
        """How long this line has been there."""
        return (self._scheduler.clock.now_ns() - self._start_ns) / 1e9

    def file(self, opened: Opened) -> PlainFile:
        """The coroutine side of an open file on this line."""
        refused = opened.direct_fd < 0
        cached = CachedFileDevice(opened.cached_fd, workers=min(self.depth, _CACHE_WORKERS) if refused else 0)
        self._cached.append(cached)
        self._scheduler.add_device(cached)
        # Not registered: the kernel lets go of a ring's registered files some time after the ring is closed,
        # and until then the space of a copy that failed and was removed would not be free.
        direct = None if refused else FileDevice(self._queue, opened.direct_fd, opened.state.limits, register=False)
        fd = opened.cached_fd if refused else opened.direct_fd
        return plain_file(
            opened,
            direct,
            cached,
            self._edges,
            ask_again=lambda: file_limits(fd, path=opened.state.path, writable=opened.mode.writable)[0],
        )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns."""
        return self._driver.run(coroutine)

    def nudge(self) -> None:
        """Hand what is queued to the kernel, and note what has finished, before something that blocks."""
        self._scheduler.commit()
        self._scheduler.dispatch(self._queue.poll(0))

    def report(self, writing: _Target, mover: Mover, *, verified: bool, durable: bool) -> CopyReport:
        """How it went."""
        return CopyReport(
            writing.path,
            mover.copied,
            mover.skipped,
            self.seconds,
            mover.reads.totals(),
            mover.writes.totals(),
            verified,
            durable,
        )


# --- streams -------------------------------------------------------------------------------------


class _Stream(NamedTuple):
    """What is read from where it stands to its end. path: for errors. outcome: of its reads, if they count."""

    fd: int
    path: object
    outcome: Outcome | None


class _Options(NamedTuple):
    """What a copy was asked for; see `copy`."""

    verify: bool
    durable: bool
    strict: bool
    progress: Progress | None
    chunk_bytes: int
    depth: int
    clock: Clock | None


def _copy_stream(
    stream: _Stream, writing: _Target, options: _Options, stack: contextlib.ExitStack, interrupts: Interrupts
) -> CopyReport:
    """A report of writing all that the stream gives to the target, which is left with `stack`."""
    stack.push(writing)  # before it is opened: an interrupt may come right after that
    writing.open()
    line = stack.enter_context(_Line(None, writing.opened, options.chunk_bytes, options.depth, options.clock))
    done = _Done(options.progress, 0, interrupts)
    mover = Mover(line.pool, depth=line.depth, strict=options.strict, on_bytes=done.add)
    digests = Digests() if options.verify else None
    to_file = line.file(writing.opened)
    size = line.run(_take_in(stream, line, mover, to_file, writing, digests, interrupts))
    writing.cut(size)
    if options.durable:
        line.run(to_file.sync())
    if digests is not None:
        writing.forget_pages()
        whole = chunks_of([Chunk(0, size)], line.chunk_bytes)
        line.run(mover.check(None, to_file, whole, digests, is_hole=writing.has_hole))
    interrupts.check()
    writing.commit(options.durable)
    return line.report(writing, mover, verified=options.verify, durable=options.durable)


async def _take_in(
    stream: _Stream,
    line: _Line,
    mover: Mover,
    to_file: PlainFile,
    writing: _Target,
    digests: Digests | None,
    interrupts: Interrupts,
) -> int:
    """Write what the stream gives, chunk by chunk; how many bytes that was.

    Reading blocks this thread, but not the writes that the kernel has been given before.
    """

    async def put(number: int, offset: int, lease: Lease, length: int) -> None:
        with lease:
            view = lease.view[:length]
            if digests is not None:
                digests.keep(number, view)
            await mover.write(to_file, offset, view)
        mover.copied += length
        mover.done(length)

    scheduler = await this_scheduler()
    tasks: collections.deque[Task[None]] = collections.deque()
    offset = 0
    try:
        for number in itertools.count():
            lease = await mover.pool.take()
            try:
                # The stream may be waited for long: has anything failed, or been interrupted?
                for task in [task for task in tasks if task.done]:
                    tasks.remove(task)
                    task.result()
                length = read_full(stream.fd, lease.view, interrupts, path=stream.path)
                if length and stream.outcome is not None:
                    mover.reads.add(Moved(length, stream.outcome))
                if length == line.chunk_bytes:
                    writing.grow_to(offset + length)
                elif length and offset + length > file_bytes(writing.opened.cached_fd):
                    writing.cut(offset + length)
            except BaseException:
                lease.release()
                raise
            if not length:
                lease.release()
                break
            tasks.append(scheduler.spawn(put(number, offset, lease, length)))
            await yield_now()
            line.nudge()
            await yield_now()
            offset += length
            if length < line.chunk_bytes:
                break
        await gather(*tasks)
    except BaseException:
        await _wait_for(tasks)
        raise
    return offset


async def _give_out(
    line: _Line,
    mover: Mover,
    from_file: PlainFile,
    chunks: Iterator[Chunk],
    stream_fd: int,
    interrupts: Interrupts,
) -> None:
    """Write the chunks to the stream in order, while the next ones are being read."""

    async def get(chunk: Chunk, lease: Lease) -> memoryview:
        # From the start of its first block, so that it need not be bounced.
        start = align_down(chunk.offset, line.unit)
        await mover.fill(from_file, Chunk(start, chunk.end - start), lease.view)
        return lease.view[chunk.offset - start : chunk.end - start]

    scheduler = await this_scheduler()
    ahead: collections.deque[tuple[Task[memoryview], Lease]] = collections.deque()
    try:
        while True:
            while len(ahead) < line.depth and (chunk := next(chunks, None)) is not None:
                lease = await mover.pool.take()
                ahead.append((scheduler.spawn(get(chunk, lease)), lease))
            if not ahead:
                return
            task, lease = ahead[0]
            view = await joined(task)
            line.nudge()
            interrupts.allowed(functools.partial(_write_full, stream_fd, view))
            ahead.popleft()
            lease.release()
            mover.copied += len(view)
            mover.done(len(view))
    except BaseException:
        await _wait_for([task for task, _ in ahead])
        raise


async def _give_generated(
    mover: Mover, from_file: PlainFile, chunks: Iterator[Chunk], stream_fd: int, interrupts: Interrupts
) -> None:
    """Write the chunks to the stream in order, up to the one that gives less: there the file ends."""
    for chunk in chunks:
        with await mover.pool.take() as lease:
            moved = await from_file.read(chunk.offset, [lease.view[: chunk.length]], chunk.length)
            mover.reads.add(moved)
            interrupts.allowed(functools.partial(_write_full, stream_fd, lease.view[: moved.transferred]))
        mover.copied += moved.transferred
        mover.done(moved.transferred)
        if moved.transferred < chunk.length:
            return


async def _wait_for(tasks: Iterable[Task[Any]]) -> None:
    """Wait until all have ended, well or not: their memory is the device's until then (F24)."""
    for task in tasks:
        while not task.done:
            with contextlib.suppress(BaseException):
                await wait(task.ended)


def read_full(fd: int, view: memoryview, interrupts: Interrupts, *, path: object = "-") -> int:
    """Fill `view` from a stream; how many bytes there were until its end. path: what errors name."""
    done = 0
    while done < len(view):
        interrupts.wait_for(fd, select.POLLIN)
        try:
            count = os.readv(fd, [view[done : done + _MOST_READ]])
        except BlockingIOError:
            continue  # Somebody else reads it, too, and was quicker.
        except OSError as error:
            raise from_errno(error.errno or errno.EIO, "reading the stream", path) from error
        if not count:
            break
        done += count
    return done


def _write_full(fd: int, view: memoryview) -> None:
    """Write all of `view` to a stream."""
    done = 0
    while done < len(view):
        try:
            done += os.write(fd, view[done:])
        except BlockingIOError:
            _wait_until_ready(fd, select.POLLOUT)
        except OSError as error:
            raise from_errno(error.errno or errno.EIO, "writing to the stream", "-") from error


def _wait_until_ready(fd: int, event: int) -> None:
    """Wait for a stream that somebody has made non-blocking."""
    poller = select.poll()
    poller.register(fd, event)
    poller.poll()
