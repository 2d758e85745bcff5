"""`odirect.open`: plain files and block devices, past the page cache, for synchronous callers.

A request that the kernel can take as it is costs one system call (B02). Any other runs through
`dio.plainfile` on this thread's own ring. Both ways give the same bytes, errors and outcomes.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from odirect.base import trace
from odirect.base.errors import (
    AlignmentError,
    AtomicLimitError,
    DeviceError,
    ODirectError,
    UnsupportedError,
    from_errno,
)
from odirect.block.bio import ATOMIC, DISCARD, FUA, HIPRI, NOWAIT, READ, WRITE, ZERO
from odirect.block.buffers import as_bytes_view
from odirect.block.cached_file import CachedFileDevice
from odirect.block.device import Limits
from odirect.block.file_device import FileDevice, file_bytes
from odirect.block.limits import file_limits
from odirect.dio import batch
from odirect.dio.bounce import DIRECT_READ, Moved
from odirect.dio.here import Here, forget, here
from odirect.dio.opening import Opened, Path, open_file, plain_file
from odirect.dio.outcome import Kind, Outcome, Promise, Reason
from odirect.dio.plainfile import NO_END, FileState, PlainFile
from odirect.dio.requests import Request
from odirect.dio.submission import Submission, file_submission
from odirect.dio.write_order import Crowd, WriteGate
from odirect.raw_file import Buffer, RawFile, past_end
from odirect.ring._calls import NOT_SIMPLE, DirectHandle, fallocate
from odirect.ring.contract import RWF_DSYNC, RWF_HIPRI, RWF_NOWAIT

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

T = TypeVar("T")
Access = Literal["auto", "strict"]

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


def open(
    path: Path,
    mode: str = "r",
    *,
    access: Access = "auto",
    dsync: bool = False,
    nowait: bool = False,
    hipri: bool = False,
    atomic: bool = False,
    overwrite_in_use: bool = False,
) -> File:
    """A `File` over the plain file or block device at `path`.

    mode: "r", "r+", "w", "w+", "x", "x+", "a", "a+", with or without "b". "a" starts at the end; it is
    not atomic against other processes that append.
    access: "auto" takes any offset, length and memory, bounces what is not aligned, and falls back
    to the page cache where the kernel refuses direct I/O; "strict" raises AlignmentError or
    NotDirectError instead.
    dsync: every write is durable when it returns (B05). nowait: a request that would wait raises
    WouldBlockError. hipri: poll the device for completions where it can be polled (B06). atomic:
    every write is whole or not there after a power cut, within the device's limits (F43).
    overwrite_in_use: write to a block device or file although it is mounted, looped, locked or otherwise in use.

    Raises ValueError for a mode or access that is none, and what `dio.opening.open_file` raises.
    """
    flags = request_flags(access, dsync=dsync, nowait=nowait, hipri=hipri, atomic=atomic)
    opened = open_file(path, mode, strict=access == "strict", overwrite_in_use=overwrite_in_use)
    return File(opened, access, flags)


def request_flags(access: Access, *, dsync: bool, nowait: bool, hipri: bool, atomic: bool) -> int:
    """The flags of every request of a file that is opened so. Raises ValueError for an access that is none."""
    if access not in ("auto", "strict"):
        raise ValueError(f"access {access!r}: use 'auto' or 'strict'")
    return (FUA if dsync else 0) | (NOWAIT if nowait else 0) | (HIPRI if hipri else 0) | (ATOMIC if atomic else 0)


def expected_outcome(state: FileState, op: int, flags: int) -> Outcome:
    """The outcome of a transfer that the kernel takes as it is."""
    promise = Promise.NONE
    if op == WRITE:
        promise = Promise.DURABLE if flags & FUA else Promise.DEVICE
    reason = state.cached.get(op)
    if reason is None:
        return Outcome(Kind.DIRECT, Reason.NONE, promise)
    return Outcome(Kind.BUFFERED, reason, promise)


def check_atomic(opened: Opened, flags: int) -> None:
    """Raise AtomicLimitError if writes are to be atomic, and the device promises that of none (F43)."""
    if flags & ATOMIC and opened.direct_fd >= 0 and not opened.state.limits.atomic_max:
        raise AtomicLimitError("an atomic write: the device promises none at all", path=opened.state.path)


def truncate_file(opened: Opened, size: int) -> int:
    """The new size of the file, `size`.

    Raises ValueError if it is negative, UnsupportedError for a device, and the kernel's answer.
    """
    path = opened.state.path
    if opened.state.is_block:
        raise UnsupportedError("a block device has the size that it has", path=path)
    if size < 0:
        raise ValueError(f"a file cannot have {size} bytes")
    try:
        os.ftruncate(opened.cached_fd, size)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", errno.EFBIG) or errno.EIO
        raise from_errno(number, f"truncating to {size} bytes", path) from error
    return size


def change_space(opened: Opened, offset: int, length: int, *, punch: bool, zero: bool, keep_size: bool) -> None:
    """What `File.fallocate` does to a regular file, and refuses of any."""
    offset, length = operator.index(offset), operator.index(length)
    if offset < 0 or length <= 0 or offset + length > NO_END:
        raise ValueError(f"{length} bytes at {offset} is not a range")
    if punch and zero:
        raise ValueError("punch and zero exclude each other")
    if opened.state.is_block:
        raise UnsupportedError("a block device has all its space already", path=opened.state.path)
    mode = _PUNCH_HOLE | _KEEP_SIZE if punch else (_ZERO_RANGE if zero else 0) | (_KEEP_SIZE if keep_size else 0)
    answer = fallocate(opened.cached_fd, mode, offset, length)
    if answer < 0:
        raise from_errno(-answer, f"fallocate of {length} bytes at {offset}", opened.state.path)


class File(RawFile):
    """An open plain file or block device; works wherever a raw binary file does.

    Transfers at a given offset (`pread`, `pwrite`, ...) may be made from several threads at once;
    `read`, `write` and `seek` share one position, which a lock protects. `submit` and `completions`
    belong to one thread. `close` waits for what other threads have begun.
    """

    def __init__(self, opened: Opened, access: Access, flags: int) -> None:
        super().__init__(cast("str | bytes", opened.state.path), opened.mode)
        self._opened = opened
        self._state = opened.state
        self._flags = flags
        self.access: Access = access
        self._rwf = (
            (RWF_NOWAIT if flags & NOWAIT else 0)
            | (RWF_HIPRI if flags & HIPRI else 0)
            | (RWF_DSYNC if flags & FUA else 0)
        )
        self._read_rwf = self._rwf & ~RWF_DSYNC
        limits = self._state.limits
        # An atomic write has rules of its own, and goes the general way.
        self._simple = DirectHandle(opened.direct_fd, limits.read_align, limits.write_align, limits.memory_align)
        self._simple_writes = not flags & ATOMIC and WRITE not in self._state.refused
        if READ in self._state.refused:
            self._simple.fd = -1
        self._simple_limits = limits
        self._sized = not opened.generated
        self._local = threading.local()
        self._find_size()
        self._read_outcome = expected_outcome(self._state, READ, flags)
        self._write_outcome = expected_outcome(self._state, WRITE, flags)
        if opened.mode.appends:
            self._position = self._simple.size_hint

    # What it is.

    def fileno(self) -> int:
        """A descriptor of the same file without O_DIRECT, which stands where `tell` does now.

        It is for what takes any file: `os.fstat`, `fcntl`, `mmap`, a child's standard input, `numpy.fromfile`. What is
        read and written there goes through the page cache, also with access "strict", is no request of this file and
        has no outcome; the kernel keeps both ways one file as long as neither meets the other in mid-flight.
        """
        self._check_open()
        fd = self._opened.cached_fd
        with self._position_lock, contextlib.suppress(OSError, OverflowError):
            # Past what the kernel can seek to, there is nothing to read either.
            os.lseek(fd, self._position, os.SEEK_SET)
        return fd

    @property
    def size(self) -> int:
        """The present size in bytes."""
        self._check_open()
        return self._find_size()

    @property
    def limits(self) -> Limits:
        """Every alignment and limit as it is known by now, each with its source."""
        return self._state.limits

    def __repr__(self) -> str:
        return self._shown("odirect.File", self.access)

    # Transfers at an offset.

    def preadinto(self, buffer: Buffer, offset: int) -> int:
        """Read into `buffer` from byte `offset`; the number of bytes, 0 at the end of the file.

        What lies past the bytes that are counted is left as it was (F02). Raises DeviceError,
        WouldBlockError, AlignmentError and NotDirectError (strict), ValueError for a negative offset.
        """
        # What is traced goes the general way, which tells what it does.
        count = self._simple.pread(buffer, offset, self._read_rwf) if trace.active is None else NOT_SIMPLE
        if count > 0 and count == memoryview(buffer).nbytes:  # type: ignore[arg-type]
            self._tallies.add(self._read_outcome, count)
            return count
        return self._checked_transfer(READ, [as_bytes_view(buffer, writable=True)], offset)

    def pwrite(self, buffer: Buffer, offset: int) -> int:
        """Write `buffer` at byte `offset`; the number of bytes, all of them but at a device's end.

        Raises NoSpaceError, DeviceError, and what `preadinto` raises.
        """
        if self._simple_writes and trace.active is None and (self._state.failed_sync is None or not self._flags & FUA):
            if self._state.is_block:
                # The kernel has no lock of its own there.
                wait = not self._flags & NOWAIT
                count = self._gate.direct(lambda: self._simple.pwrite(buffer, offset, self._rwf), wait=wait)
            else:
                count = self._simple.pwrite(buffer, offset, self._rwf)
            # A part that was written without waiting counts: the rest could say that it would block (F08).
            if count > 0 and (count == memoryview(buffer).nbytes or self._flags & NOWAIT):  # type: ignore[arg-type]
                end = offset + count
                if end > self._simple.size_hint:
                    self._simple.size_hint = end
                self._tallies.add(self._write_outcome, count)
                return count
            if count < 0 and count != NOT_SIMPLE and self._flags & FUA:
                self._check_durable_write(-count, offset)
        return self._checked_transfer(WRITE, [as_bytes_view(buffer, writable=False)], offset)

    # The file as a whole.

    def truncate(self, size: int | None = None, /) -> int:
        """Make the file `size` bytes long (default: up to the position); the new size."""
        self._check_usable(WRITE)
        size = truncate_file(self._opened, self._position if size is None else size)
        self._simple.size_hint = size
        if self._submission is not None:
            self._submission.resized(size)
        return size

    def fallocate(
        self, offset: int, length: int, *, punch: bool = False, zero: bool = False, keep_size: bool = False
    ) -> None:
        """Reserve space for [offset, offset+length), or punch a hole there, or make it read as zeroes.

        keep_size: do not make the file longer; always so when punching. On a block device only
        punch (discard) and zero have a meaning. Raises UnsupportedError where the file system or
        device cannot, NoSpaceError.
        """
        self._check_usable(WRITE)
        if self._state.is_block and (punch or zero) and offset >= 0 and length > 0:
            self._entered(
                lambda: self._run(lambda plain: plain.change_range(DISCARD if punch else ZERO, offset, length))
            )
            return
        change_space(self._opened, offset, length, punch=punch, zero=zero, keep_size=keep_size)
        self._find_size()

    def sync(self, *, data_only: bool = False) -> None:
        """Make everything written durable: fsync, or fdatasync. After a failure it fails for ever (F41)."""
        self._entered(lambda: self._run(lambda plain: plain.sync(data_only=data_only)))

    def close(self) -> None:
        """Wait for what is in flight, also of other threads, and close. Twice is harmless.

        Raises RuntimeError if this very thread is inside a call (a signal's handler is).
        """
        if self.closed:
            return
        if threading.get_ident() in self._inside:
            raise RuntimeError("the file is closed in the middle of a call of the same thread")
        try:
            if self._submission is not None:
                self._submission.close()
        finally:
            self._simple.fd = -1
            super().close()
            self._inside.wait()
            self._opened.close()

    # Many at once.

    def submit(self, op: Literal["read", "write"], offset: int, buffer: Buffer, tag: object = None) -> Request:
        """Start a transfer and return at once (B07); `completions` gives it back when it is done.

        The buffer belongs to the device until then. Requests that grow the file are done in the
        order in which they were submitted (G04, F03).
        """
        if self._submission is None:
            self._check_open()
            if not self._sized:
                raise UnsupportedError(
                    "its bytes are made while it is read, and nothing of it can be in flight: use read", path=self.name
                )
            self._submission = file_submission(
                self._state,
                self._opened.direct_fd,
                self._opened.cached_fd,
                self._flags,
                (self._read_outcome, self._write_outcome),
                strict=self.access == "strict",
                ask_again=self._ask_again,
                check=self._check_atomic_use if self._flags & ATOMIC else self._check_usable,
                tell=self._tally,
            )
        return self._submission.submit(op, offset, buffer, tag)

    # How.

    def _check_atomic_use(self, op: int) -> None:
        self._check_usable(op)
        if op == WRITE:
            check_atomic(self._opened, self._flags)

    def _tally(self, request: Request) -> None:
        if request.outcome is not None:
            self._tallies.add(request.outcome, request.transferred)
        elif past_end(request.exception, request.op, request.offset, self._find_size):
            request.exception, request.outcome = None, DIRECT_READ
            self._tallies.add(DIRECT_READ, 0)

    def _entered(self, call: Callable[[], T]) -> T:
        """What `call` returns. It takes several steps, and `close` waits, so that none meets another file."""

        def unless_closed() -> T:
            self._check_open()
            return call()

        return self._inside.run(unless_closed)

    def _forget_threads(self) -> None:
        super()._forget_threads()
        self._inside = Crowd()
        self._gate = WriteGate()
        # What was submitted before a fork is the parent's.
        self._submission: Submission | None = None

    def _merges(self, offset: int, length: int) -> bool:
        """Whether such a write goes through the page cache, in part at least."""
        return WRITE in self._state.refused or (offset | length) % self._state.limits.write_align != 0

    def _in_turn(self, merges: bool, call: Callable[[], T]) -> T:
        """What `call`, a write, returns; it is kept apart from those of other threads, and of `submit`."""
        if self._flags & NOWAIT:
            return self._gate.direct(call, wait=False)  # It merges nothing: that may wait.
        if not merges:
            return self._gate.direct(call)
        if self._submission is not None:
            self._submission.settle()
        return self._gate.merge(call)

    def _find_size(self) -> int:
        size = file_bytes(self._opened.cached_fd)
        self._simple.size_hint = size
        return size

    def _plain(self, place: Here) -> tuple[PlainFile, CachedFileDevice]:
        """This thread's way through `dio.plainfile`."""
        known = getattr(self._local, "plain", None)
        if known is None or known[0] is not place:
            opened = self._opened
            direct = None
            if opened.direct_fd >= 0:
                direct = FileDevice(place.queue, opened.direct_fd, self._state.limits, register=False)
            cached = CachedFileDevice(opened.cached_fd)
            plain = plain_file(
                opened,
                direct,
                cached,
                place.pool,
                strict=self.access == "strict",
                ask_again=self._ask_again,
            )
            known = self._local.plain = (place, plain, cached)
        return known[1], known[2]

    def _ask_again(self) -> Limits:
        fd = self._opened.direct_fd if self._opened.direct_fd >= 0 else self._opened.cached_fd
        return file_limits(fd, path=self.name, writable=self._opened.mode.writable)[0]

    def _run(self, call: Callable[[PlainFile], Coroutine[Any, Any, T]]) -> T:
        place = here()
        plain, cached = self._plain(place)
        coroutine = call(plain)
        try:
            return place.run(coroutine, cached)
        except ODirectError as error:
            if error.filename is None:
                error.filename = self.name
            raise
        except BaseException:
            self._local.__dict__.clear()
            forget()
            raise
        finally:
            if not getattr(coroutine, "cr_suspended", False):
                coroutine.close()  # A signal's exception came before it was begun.
            limits = self._state.limits
            if limits is not self._simple_limits:
                self._adopt(limits)

    def _adopt(self, limits: Limits) -> None:
        """The kernel turned out to be choosier than it said (F50): the simple way must know."""
        self._simple_limits = limits
        simple = self._simple
        simple.read_align, simple.write_align = limits.read_align, limits.write_align
        simple.memory_align = limits.memory_align

    def _transfer(self, op: int, segments: list[memoryview], offset: int) -> int:
        if op == READ:
            try:
                moved = self._entered(lambda: self._move(op, segments, offset))
            except AlignmentError as error:
                if not past_end(error, op, offset, self._find_size):
                    raise
                moved = Moved(0, DIRECT_READ)
        else:
            check_atomic(self._opened, self._flags)
            merges = self._merges(offset, sum(map(len, segments)))
            moved = self._entered(lambda: self._in_turn(merges, lambda: self._move(op, segments, offset)))
        self._tallies.add(moved.outcome, moved.transferred)
        return moved.transferred

    def _append(self, buffer: Buffer) -> int:
        self._position = self.size
        count = self.pwrite(buffer, self._position)
        self._position += count
        return count

    def _seek_kind(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self._opened.cached_fd, offset, whence)
        except OSError as error:
            raise from_errno(error.errno or errno.EIO, f"seeking from {offset}", self.name) from error

    def _move(self, op: int, segments: list[memoryview], offset: int) -> Moved:
        length = sum(map(len, segments))
        if op == READ:
            flags = self._flags & ~(FUA | ATOMIC)
            moved = self._run(lambda plain: plain.read(offset, segments, length, flags))
        else:
            flags = self._flags
            moved = self._run(lambda plain: plain.write(offset, segments, length, flags))
        if op in self._state.refused:
            self._simple.fd = -1  # The simple way is closed; it would be refused every time.
        self._find_size()
        return moved

    def _batch(
        self, op: int, view: memoryview, places: NDArray[numpy.int64], length: int, depth: int
    ) -> NDArray[numpy.int64]:
        import numpy

        results = numpy.full(len(places), -1, dtype=numpy.int64)

        def move() -> None:
            self._batch_move(op, view, places, length, results, depth)

        if op == READ:
            self._entered(move)
            return results
        check_atomic(self._opened, self._flags)
        if self._flags & FUA:
            self._state.check_sync()
        merges = self._merges(int(numpy.bitwise_or.reduce(places)) if len(places) else 0, length)
        self._entered(lambda: self._in_turn(merges, move))
        return results

    def _batch_move(
        self,
        op: int,
        view: memoryview,
        places: NDArray[numpy.int64],
        length: int,
        results: NDArray[numpy.int64],
        depth: int,
    ) -> None:
        import numpy

        size = self._find_size()
        if self._simple.fd >= 0 and not self._flags & ATOMIC and op not in self._state.refused and trace.active is None:
            self._batch_natively(op, view, places, length, size, results, depth)
        left: list[int] = numpy.flatnonzero(results != length).tolist()
        if left:
            self._batch_generally(op, view, places.tolist(), length, size, left, results, depth)

    def _batch_natively(
        self,
        op: int,
        view: memoryview,
        places: NDArray[numpy.int64],
        length: int,
        size: int,
        results: NDArray[numpy.int64],
        depth: int,
    ) -> None:
        flags = self._read_rwf if op == READ else self._rwf
        ring = here().idle_ring()
        expected = self._read_outcome if op == READ else self._write_outcome
        for first, last in batch.simple_runs(self._state.limits, op, view, places, length, size):
            part = view[first * length : last * length]
            answers = results[first:last]
            batch.run_natively(
                ring, self._opened.direct_fd, op, part, places[first:last], length, flags & ~RWF_HIPRI, answers, depth
            )
            whole = int((answers == length).sum())
            if whole:
                self._tallies.add(expected, whole * length, whole)

    def _batch_generally(
        self,
        op: int,
        view: memoryview,
        places: list[int],
        length: int,
        size: int,
        left: list[int],
        results: NDArray[numpy.int64],
        depth: int,
    ) -> None:
        """What the native loop could not do whole: it says how each really went."""
        flags = self._flags if op == WRITE else self._flags & ~(FUA | ATOMIC)
        failed: dict[int, Exception] = {}
        outcomes: dict[int, Moved | Exception] = {}
        if op == WRITE and flags & (FUA | NOWAIT):
            # What was tried, and must not be tried again.
            for element in left:
                result = int(results[element])
                if result > 0 and flags & NOWAIT:
                    outcomes[element] = Moved(result, self._write_outcome)
                elif result < -1 and flags & FUA:
                    try:
                        self._check_durable_write(-result, places[element])
                    except DeviceError as error:
                        failed[element] = error
        growing = []
        if op == WRITE and not self._state.is_block:
            growing = [element for element in left if places[element] + length > size]
        finished = {*failed, *outcomes, *growing}
        inside = [element for element in left if element not in finished]
        outcomes |= self._run(lambda plain: batch.run_each(plain, op, view, places, inside, length, flags, depth))
        for first, number in batch.growing_runs(growing, places, length):
            run = view[first * length : (first + number) * length]
            try:
                moved = self._move(op, [run] if length else [], places[first])
            except ODirectError as error:
                failed[first] = error
                break  # What lies above it would leave a hole below the size (F03).
            for turn in range(number):
                # Without waiting, less than the whole may have been written.
                part = max(0, min(length, moved.transferred - turn * length))
                outcomes[first + turn] = Moved(part, moved.outcome)
        for element, outcome in outcomes.items():
            if isinstance(outcome, Exception) and past_end(outcome, op, places[element], self._find_size):
                outcome = Moved(0, DIRECT_READ)
            if isinstance(outcome, Moved):
                results[element] = outcome.transferred
                self._tallies.add(outcome.outcome, outcome.transferred)
            else:
                failed[element] = outcome
        if failed:
            raise failed[min(failed)]

    def _check_durable_write(self, number: int, offset: int) -> None:
        """Raise the device's error of a write that was to be durable: a second try would seem to succeed (F41).

        What is not the device's (no space, memory that cannot be used) may be tried again.
        """
        error = from_errno(number, f"writing at {offset}", self.name)
        if isinstance(error, DeviceError) and number != errno.EINVAL:
            self._state.remember_failed_sync(error)
            raise error
