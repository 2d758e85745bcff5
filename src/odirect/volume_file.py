"""A file inside a volume, for synchronous callers: what `odirect.File` is for one that the kernel serves."""

from __future__ import annotations

import collections
import errno
import io
import operator
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

from odirect.base import trace
from odirect.base.errors import ClosedError, ODirectError, UnsupportedError
from odirect.base.units import checked_offset
from odirect.block.bio import ATOMIC, FUA, READ, WRITE
from odirect.block.buffers import as_bytes_view
from odirect.block.device import Limits
from odirect.block.file_device import FileDevice
from odirect.dio import batch
from odirect.dio.here import here
from odirect.dio.mapping import Extent, ExtentKind
from odirect.dio.opening import OpenMode
from odirect.dio.outcome import Kind, Outcome, Promise
from odirect.dio.requests import Request
from odirect.dio.write_order import Crowd
from odirect.fs.base import Access, Done, VolumeFile
from odirect.fs.file import NodeFile
from odirect.fs.paths import failure
from odirect.fs.requests import NodeRequests
from odirect.raw_file import Buffer, RawFile
from odirect.ring._calls import DirectHandle
from odirect.sched.interrupts import Quiet
from odirect.sched.locks import Mutex
from odirect.sched.traps import gather, this_scheduler
from odirect.volume_runner import Runner, named

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.dio.requests import Requests

T = TypeVar("T")
_OPERATIONS = {"read": READ, "write": WRITE}
# How much of a file is looked through at once for data or a hole.
_SEEK_BYTES = 1 << 30
# What has bytes; space that was allocated and never written reads as zeroes.
_DATA = (ExtentKind.MAPPED, ExtentKind.DELALLOC, ExtentKind.INLINE, ExtentKind.ENCODED)


class _Simple(NamedTuple):
    """What single system calls need: `inside` judges a request by the file's size, `device` reads from the image."""

    inside: DirectHandle
    device: DirectHandle
    outcome: Outcome


class FileInVolume(RawFile):
    """An open file of a volume; works wherever a raw binary file does.

    Transfers at a given offset (`pread`, `pwrite`, ...) may be made from several threads at once, and so
    may all else; reads and writes at the position take turns. Every error carries the path as it was
    given to `Volume.open`. Made by that.
    """

    def __init__(
        self,
        runner: Runner,
        handle: VolumeFile,
        path: str | bytes,
        mode: OpenMode,
        access: Access,
        flags: int,
        seen: Callable[[int, Outcome], Outcome],
        volume: object,
    ) -> None:
        """runner: the volume's. seen: what becomes of an outcome by the image's own file system.

        volume: kept as long as this is, because it closes itself when nobody has it any more.
        """
        super().__init__(path, mode)
        self._volume = volume
        self.access: Access = access
        self._runner = runner
        self._handle = handle
        self._flags = (flags & ~(FUA | ATOMIC), flags)
        self._seen = seen
        self._position = handle.size_bytes if mode.appends else 0
        self._submission: _Submission | None = None
        self._inside = Crowd()
        self._simple = self._simple_way() if mode.readable else None

    def _simple_way(self) -> _Simple | None:
        """How to read by single system calls, if that can be."""
        if not self._has_native_loop(READ):
            return None
        device = cast(FileDevice, cast(NodeFile, self._handle).node.home.device)
        limits = device.limits
        aligns = limits.read_align, limits.write_align, limits.memory_align
        whole = DirectHandle(device.fd, *aligns)
        whole.size_hint = device.size_bytes
        return _Simple(DirectHandle(device.fd, *aligns), whole, self._seen(READ, Outcome(Kind.DIRECT)))

    # What it is.

    def fileno(self) -> int:
        """Raises io.UnsupportedOperation: the kernel does not know this file."""
        raise io.UnsupportedOperation("a file inside a volume has no descriptor")

    @property
    def inode(self) -> int:
        """The number of its inode."""
        return self._handle.inode

    @property
    def size(self) -> int:
        """The present size in bytes."""
        self._check_open()
        return self._handle.size_bytes

    @property
    def limits(self) -> Limits:
        """What a direct request must be aligned to, with the sources."""
        return self._handle.limits

    def __repr__(self) -> str:
        return self._shown("FileInVolume", self.access)

    # Transfers at an offset.

    def preadinto(self, buffer: Buffer, offset: int) -> int:
        """Read into `buffer` from byte `offset`; the number of bytes, 0 at the end of the file.

        What lies past the bytes that are counted is left as it was (F02). Raises DeviceError,
        CorruptionError, WouldBlockError, AlignmentError and NotDirectError (strict), ValueError for a
        negative offset.
        """
        count = self._simple_read(buffer, offset)
        return count or self._checked_transfer(READ, [as_bytes_view(buffer, writable=True)], offset)

    def _simple_read(self, buffer: Buffer, offset: int) -> int:
        """The bytes read by one system call, if nothing else is needed for them; 0 if something is."""
        simple = self._simple
        if simple is None or trace.active is not None:
            return 0
        handle = cast(NodeFile, self._handle)
        node = handle.node
        simple.inside.size_hint = node.size_bytes
        length = simple.inside.fits(READ, buffer, offset)
        if length <= 0 or self.closed:
            return 0

        def begin() -> int:
            addr = node.place(READ, offset, length) if handle.may(READ) else -1
            if addr >= 0:
                node.in_flight.up()
                self._runner.work_outside(1)
            return addr

        def end() -> None:
            node.in_flight.down()
            self._runner.work_outside(-1)

        # A handler that raised in between would leave the file waiting for this read for ever.
        with Quiet():
            addr = self._runner.call(begin)
            if addr < 0:
                return 0
            try:
                count = simple.device.pread(buffer, addr)
            finally:
                self._runner.call(end)
        if count != length:
            return 0  # The general way finds out why.
        self._tallies.add(simple.outcome, count)
        return count

    def pwrite(self, buffer: Buffer, offset: int) -> int:
        """Write `buffer` at byte `offset`; the number of bytes, fewer only where the volume is full.

        Raises NoSpaceError, ReadOnlyError, and what `preadinto` raises.
        """
        return self._checked_transfer(WRITE, [as_bytes_view(buffer, writable=False)], offset)

    # The file as a whole.

    def truncate(self, size: int | None = None, /) -> int:
        """Make the file `size` bytes long (default: up to the position); the new size."""
        self._check_usable(WRITE)
        size = self._position if size is None else operator.index(size)
        if size < 0:
            raise ValueError(f"a file cannot have {size} bytes")
        self._run(self._handle.truncate(size))
        return size

    def fallocate(
        self, offset: int, length: int, *, punch: bool = False, zero: bool = False, keep_size: bool = False
    ) -> None:
        """Punch a hole into [offset, offset+length), or make it read as zeroes, growing the file unless keep_size.

        Reserving space (neither of the two) is UnsupportedError: no file system here keeps space unwritten.
        """
        self._check_usable(WRITE)
        offset, length = check_clearing(offset, length, punch=punch, zero=zero, path=self.name)
        self._run(clear(self._handle, offset, length, grow=zero and not keep_size))

    def extents(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Where the bytes are on the device, holes included, in order, up to the size rounded up to a block."""
        length = max(0, self.size - offset) if length is None else length
        if offset < 0 or length < 0:
            raise ValueError(f"{length} bytes at {offset} is not a range")
        return self._run(self._handle.extents(offset, length))

    def sync(self, *, data_only: bool = False) -> None:
        """Make everything written durable: fsync, or fdatasync. Tells once of each write-back that failed (F41)."""
        self._run(self._handle.sync(data_only=data_only))

    def close(self) -> None:
        """Wait for what was submitted, write back what went through the cache, and close. Twice is harmless."""
        if self.closed:
            return
        if self._runner.closed or self._runner.forked:
            super().close()  # The volume has closed it already; or it is the parent's to close.
            return
        self._runner.check_outside()
        try:
            if self._submission is not None:
                self._submission.drain()
        finally:
            super().close()
            try:
                self._inside.wait()
            except BaseException:
                self._runner.abandon(self._handle)
                raise
            if not self._runner.closed:
                self._run_anyhow(self._handle.close())

    def __del__(self) -> None:
        # Thrown away, at any moment, perhaps in the middle of a step: it is closed with the next call.
        if hasattr(self, "_inside") and not self.closed:
            self._runner.abandon(self._handle)
            super().close()

    # Many at once.

    def submit(self, op: Literal["read", "write"], offset: int, buffer: Buffer, tag: object = None) -> Request:
        """Start a transfer and return at once (B07); `completions` gives it back when it is done.

        The buffer belongs to the device until then. Requests that grow the file are done in the
        order in which they were submitted (G04, F03).
        """
        number = _OPERATIONS.get(op)
        if number is None:
            raise ValueError(f"operation {op!r}: use 'read' or 'write'")
        self._check_usable(number)
        offset = checked_offset(offset)
        view = as_bytes_view(buffer, writable=number == READ)
        if self._submission is None:
            self._submission = _Submission(self)
        return self._submission.submit(number, offset, buffer, view, tag)

    # How.

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the file is closed", path=self.name)
        self._runner.check()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns; `close` waits for it."""

        def unless_closed() -> T:
            if self.closed:
                raise ClosedError("the file is closed", path=self.name)
            return self._run_anyhow(coroutine)

        try:
            return self._inside.run(unless_closed)
        finally:
            if not getattr(coroutine, "cr_suspended", False):
                coroutine.close()

    def _run_anyhow(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(coroutine)
        except ODirectError as error:
            named(error, self.name)
            raise

    async def _move(self, op: int, offset: int | None, segments: Sequence[memoryview]) -> Done:
        """One request, counted, however it was started."""
        flags = self._flags[op]
        if op == READ:
            done = await self._handle.read(cast(int, offset), segments, access=self.access, flags=flags)
        else:
            done = await self._handle.write(offset, segments, access=self.access, flags=flags)
        done = done._replace(outcome=self._seen(op, done.outcome))
        self._tallies.add(done.outcome, done.transferred)
        return done

    def _transfer(self, op: int, segments: list[memoryview], offset: int) -> int:
        return self._run(self._move(op, offset, segments)).transferred

    def _append(self, buffer: Buffer) -> int:
        view = as_bytes_view(buffer, writable=False)
        self._check_usable(WRITE)

        async def append() -> int:
            done = await self._move(WRITE, None, [view] if len(view) else [])
            self._position = self._handle.size_bytes
            return done.transferred

        return self._run(append())

    def _seek_kind(self, offset: int, whence: int) -> int:
        return self._run(self._find(offset, data=whence == os.SEEK_DATA))

    async def _find(self, offset: int, *, data: bool) -> int:
        """The first byte at or past `offset` that is data, or in a hole (there is one at the end)."""
        size = self._handle.size_bytes
        if not 0 <= offset < size:
            raise failure(errno.ENXIO, f"seeking from {offset}")
        for start in range(offset, size, _SEEK_BYTES):
            for extent in await self._handle.extents(start, min(_SEEK_BYTES, size - start)):
                end = extent.offset + extent.length
                if end > offset and (extent.kind in _DATA) is data and max(extent.offset, offset) < size:
                    return max(extent.offset, offset)
        if data:
            raise failure(errno.ENXIO, f"seeking data from {offset}")
        return size

    def _batch(
        self, op: int, view: memoryview, places: NDArray[numpy.int64], length: int, depth: int
    ) -> NDArray[numpy.int64]:
        import numpy

        results = numpy.zeros(len(places), dtype=numpy.int64)
        left = list(range(len(places)))
        if self._has_native_loop(op) and length and left:
            self._batch_natively(op, places, length, view, depth, results)
            left = numpy.flatnonzero(results != length).tolist()
        if left:
            self._run(self._batch_by_tasks(op, left, places.tolist(), length, view, depth, results))
        return results

    def _has_native_loop(self, op: int) -> bool:
        """Whether transfers may go past the volume, between the caller's memory and a descriptor."""
        handle = self._handle
        return (
            self.access != "buffered"
            and not self._flags[op]
            and trace.active is None
            and isinstance(handle, NodeFile)
            and isinstance(handle.node.home.device, FileDevice)
        )

    def _batch_natively(
        self,
        op: int,
        offsets: NDArray[numpy.int64],
        length: int,
        view: memoryview,
        depth: int,
        results: NDArray[numpy.int64],
    ) -> None:
        """Do what is simple of a batch on this thread's ring; `results` has the length for each that is done."""
        handle = cast(NodeFile, self._handle)
        device = cast(FileDevice, handle.node.home.device)
        begun: list[NDArray[numpy.int64]] = []

        async def begin() -> None:
            begun.append(await handle.begin_batch(op, offsets, length))
            self._runner.work_outside(1)

        async def end() -> None:
            await handle.end_batch(op)
            self._runner.work_outside(-1)

        try:
            self._run(begin())
            (addrs,) = begun
            ring = here().idle_ring()
            for first, last in batch.simple_runs(device.limits, op, view, addrs, length, device.size_bytes):
                part, answers = view[first * length : last * length], results[first:last]
                batch.run_natively(ring, device.fd, op, part, addrs[first:last], length, 0, answers, depth)
        finally:
            if begun:  # Also if a signal's handler raised just behind it.
                self._run_anyhow(end())
        whole = int((results == length).sum())
        if whole:
            promise = Promise.NONE if op == READ else Promise.DEVICE
            outcome = self._seen(op, Outcome(Kind.DIRECT, promise=promise))
            self._tallies.add(outcome, whole * length, whole)

    async def _batch_by_tasks(
        self,
        op: int,
        left: list[int],
        places: list[int],
        length: int,
        view: memoryview,
        depth: int,
        results: NDArray[numpy.int64],
    ) -> None:
        """Each of `left` as a task, `depth` at once; what grows the file one by one, lowest offset first (F03)."""
        size = self._handle.size_bytes
        growing = [number for number in left if op == WRITE and places[number] + length > size]
        growing.sort(key=lambda number: places[number])
        late = set(growing)
        turns = iter([number for number in left if number not in late])
        failed: dict[int, BaseException] = {}

        async def one(number: int) -> bool:
            part = view[number * length : (number + 1) * length]
            try:
                done = await self._move(op, places[number], [part] if length else [])
            except Exception as error:
                failed[number] = error
                return False
            results[number] = done.transferred
            return True

        async def work() -> None:
            for number in turns:
                await one(number)

        scheduler = await this_scheduler()
        await gather(*[scheduler.spawn(work()) for _ in range(min(depth, len(left) - len(growing)))])
        for number in growing:
            if not await one(number):
                break  # What lies above it would leave a hole below the size.
        if failed:
            raise failed[min(failed)]


def check_clearing(offset: int, length: int, *, punch: bool, zero: bool, path: object) -> tuple[int, int]:
    """The range of a `fallocate`, as plain ints. Raises what it cannot do in a volume."""
    offset, length = operator.index(offset), operator.index(length)
    if offset < 0 or length <= 0:
        raise ValueError(f"{length} bytes at {offset} is not a range")
    if punch and zero:
        raise ValueError("punch and zero exclude each other")
    if not punch and not zero:
        raise UnsupportedError("space cannot be reserved in this file system", path=path)
    return offset, length


async def clear(handle: VolumeFile, offset: int, length: int, *, grow: bool) -> None:
    """Make a range read as zeroes; grow: make the file longer too, where the range ends past it."""
    await handle.punch(offset, length)
    if grow and offset + length > handle.size_bytes:
        await handle.truncate(offset + length)


class _Submission:
    """Requests in flight of one file, for `submit` and `completions`: each a task of the volume's scheduler."""

    def __init__(self, file: FileInVolume) -> None:
        self._file = file
        self._growing = Mutex()
        self._pending = 0
        self._finished: collections.deque[Request] = collections.deque()
        self._requests: NodeRequests | None = None
        handle = file._handle
        if isinstance(handle, NodeFile):
            flags = file._flags[WRITE]
            self._requests = NodeRequests(handle, file._runner.scheduler, file.access, flags, self._ended, shared=True)

    def submit(self, op: int, offset: int, buffer: object, view: memoryview, tag: object) -> Request:
        """See `FileInVolume.submit`."""
        simple = self._requests
        if simple is not None and simple.may_begin(op):
            runner = self._file._runner
            call = runner.call_quickly if simple.may_be_left else runner.call
            begun = call(lambda: simple.begin(op, offset, buffer, tag))
            if begun is not None:
                return begun
        # What a ring would tell it, its task does.
        request = Request(cast("Requests", None), op, offset, len(view), buffer, tag)
        self._pending += 1
        try:
            self._file._runner.start(self._work(request, view))
        except BaseException:
            self._pending -= 1
            raise
        return request

    @property
    def _outstanding(self) -> int:
        """Requests that are not done: tasks of ours, and what was begun without one."""
        return self._pending + (self._requests.pending if self._requests is not None else 0)

    def _ended(self, request: Request) -> None:
        """A request that was begun without a task is done. Runs in the dispatch, or in a task."""
        file = self._file
        if request.outcome is not None:
            request.outcome = file._seen(request.op, request.outcome)
            file._tallies.add(request.outcome, request.transferred)
        elif isinstance(request.exception, ODirectError):
            named(request.exception, file.name)
        self._finished.append(request)

    def completions(self) -> Iterator[Request]:
        """See `FileInVolume.completions`."""
        while True:
            while self._finished:
                yield self._finished.popleft()
            if not self._outstanding:
                if self._finished:
                    continue  # A handler that used the file itself has waited for them.
                return
            self._file._runner.wait_until(lambda: self._finished or not self._outstanding)

    def drain(self) -> None:
        """Wait for everything in flight; requests that nobody asked for are dropped."""
        if self._outstanding:
            self._file._runner.wait_until(lambda: not self._outstanding)

    async def _work(self, request: Request, view: memoryview) -> None:
        failed: BaseException | None = None
        done: Done | None = None
        try:
            done = await self._in_turn(request, [view] if len(view) else [])
        except ODirectError as error:
            failed = named(error, self._file.name)
        except BaseException as error:
            failed = error
        request.exception = failed
        request.outcome = None if done is None else done.outcome
        request.transferred = 0 if done is None else done.transferred
        self._pending -= 1
        self._finished.append(request)

    async def _in_turn(self, request: Request, segments: list[memoryview]) -> Done:
        """The request itself; those that grow the file wait for one another, in order (G04)."""
        file = self._file
        if request.op == WRITE and request.offset + request.length > file._handle.size_bytes:
            with await self._growing.hold():
                return await file._move(WRITE, request.offset, segments)
        return await file._move(request.op, request.offset, segments)
