"""The generic direct-I/O engine that file systems plug into: rows G.

A file system gives an `Inode` (its size, lock, count of I/O in flight, and what the page cache must
do) and a `Mapper` (file bytes to device bytes). The engine checks alignment, walks the mappings,
builds bios, and completes the request once: with the count, or the first error that matters. It works
on runs: its cost grows with extents and bios, not with bytes.

    check (G01) ─ lock, write back (G03) ─ count (G06) ─┬─ map (G07) ─ zero or build (G09–G12) ─┐
                                                        └───────────── until mapped ◄───────────┘
    ─ unlock (G03) ─ wait, or leave in flight (G18) ─ end_io (G17) ─ count down (G06) ─ tell (G16)
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, cast

from odirect.base import trace
from odirect.base.errors import AlignmentError, BadBufferError, DeviceError, ODirectError
from odirect.base.units import align_down, align_up
from odirect.block.bio import READ, WRITE, Bio
from odirect.block.buffers import empty, scatter_bytes, segments_aligned, slice_segments
from odirect.block.device import BlockDevice, Limits
from odirect.dio import zeroing
from odirect.dio.completion import DeferredQueue
from odirect.dio.mapping import (
    BOUNDARY,
    DEFER_COMPLETION,
    DIRTY,
    NEW,
    SHARED,
    BioHook,
    Extent,
    ExtentKind,
    Fallback,
    Mapper,
)
from odirect.dio.outcome import Kind, Reason
from odirect.dio.piece import Piece
from odirect.ring._calls import zero_fill
from odirect.sched.locks import Count, Held, Mutex
from odirect.sched.traps import Event, shielded

# Bios in flight while a request is still being built; beyond that completed ones are reaped first (G14).
_MOST_IN_FLIGHT = 64
_READS_ZEROES = frozenset({ExtentKind.HOLE, ExtentKind.UNWRITTEN})
# Where a request stops, and why. Delalloc is data that only the page cache has: a reader who got
# zeroes for it would be misled, a writer would need an allocation (G08).
_STOPS_READS = {
    ExtentKind.DELALLOC: Reason.CACHED_BY_FS,
    ExtentKind.INLINE: Reason.INLINE,
    ExtentKind.ENCODED: Reason.ENCODED,
}
_STOPS_WRITES = {
    ExtentKind.HOLE: Reason.HOLE,
    ExtentKind.DELALLOC: Reason.HOLE,
    ExtentKind.INLINE: Reason.INLINE,
    ExtentKind.ENCODED: Reason.ENCODED,
}
# How a trace calls the flags of an extent.
_FLAGS = {NEW: "new", SHARED: "shared", BOUNDARY: "boundary", DEFER_COMPLETION: "defer completion", DIRTY: "dirty"}


class DioFlags(enum.IntFlag):
    """What a file system asks of the engine.

    LOCKING: the engine takes the inode lock for reads; writes come under it (G03). SKIP_HOLES: a
    write inside the file allocates nothing (G07). ASYNC_EXTEND: a write past the end may complete
    asynchronously (G04). SKIP_DIO_COUNT: the file system counts what is in flight itself (G06).
    """

    NONE = 0
    LOCKING = 1
    SKIP_HOLES = 2
    ASYNC_EXTEND = 4
    SKIP_DIO_COUNT = 8


class Inode(Protocol):
    """A file, as the engine needs to know it."""

    block_bytes: int
    lock: Mutex
    in_flight: Count

    @property
    def size_bytes(self) -> int:
        """The file's size."""
        ...

    @property
    def limits(self) -> Limits:
        """What the device, or the choosiest of several, takes."""
        ...

    def deferred(self) -> DeferredQueue:
        """The volume's queue of deferred completions, made on first use (G05)."""
        ...

    async def write_back(self, offset: int, length: int) -> None:
        """Write dirty cached data of the range to the device, and wait for it."""
        ...

    async def sync_written(self, offset: int, length: int, *, data_only: bool) -> None:
        """Make a range that was just written durable, with the metadata that is needed to read it."""
        ...

    def forget_blocks(self, device: BlockDevice, addr: int, length: int) -> None:
        """Drop cached copies, as metadata, of device bytes that are about to hold data (G11)."""
        ...


class DirectRequest:
    """One request to the engine, and how it ended.

    asynchronous: it may be left in flight (G04, G18). sync, data_only: a write is durable when it
    is done, as O_SYNC or O_DSYNC have it (G05). bio_flags are put on every bio. When `done` has
    fired, `result()` gives the bytes moved, or raises; `fallback` says why a request stopped early
    and its rest is for the buffered path, `bounced` why a part went through private memory.
    """

    __slots__ = (
        "asynchronous",
        "bio_flags",
        "bounced",
        "data_only",
        "done",
        "error",
        "fallback",
        "holes",
        "length",
        "offset",
        "op",
        "segments",
        "sync",
        "transferred",
    )

    def __init__(
        self,
        op: int,
        offset: int,
        segments: Sequence[memoryview],
        *,
        asynchronous: bool = False,
        sync: bool = False,
        data_only: bool = True,
        bio_flags: int = 0,
    ) -> None:
        self.op = op
        self.offset = offset
        self.segments = segments
        self.length = sum(map(len, segments))
        self.asynchronous = asynchronous
        self.sync = sync
        self.data_only = data_only
        self.bio_flags = bio_flags
        self.done = Event()
        self.transferred = 0
        self.error: BaseException | None = None
        self.fallback: Reason | None = None
        self.bounced = Reason.NONE
        #: Whether a read met ranges without data, for which the device is not asked.
        self.holes = False

    def result(self) -> int:
        """The bytes moved; raises the error; RuntimeError while it is in flight."""
        if not self.done.fired:
            raise RuntimeError("the request is still in flight")
        if self.error is not None:
            raise self.error
        return self.transferred

    async def wait(self) -> int:
        """The result, once there is one."""
        await shielded(self.done)
        return self.result()


async def direct_io(request: DirectRequest, inode: Inode, mapper: Mapper, flags: int) -> None:
    """Do `request`; it is done on return, unless it is asynchronous and was left in flight (G18).

    What goes wrong after the start is in the request. Raises AlignmentError before anything is
    locked, counted or mapped (G01), and what writing cached data back raises (G03).
    """
    if not request.length:
        request.done.fire()
        return
    if trace.active is not None:
        trace.begin(request, "engine", request.op, request.offset, request.length, DioFlags(flags).name or "")
    held: Held | None = None
    try:
        unit = _unit(request, inode)
        if flags & DioFlags.LOCKING and request.op == READ:
            locking = inode.lock.hold()
            held = await (locking if trace.active is None else trace.waiting(locking, request, "lock"))
            writing = inode.write_back(request.offset, request.length)
            await (writing if trace.active is None else trace.waiting(writing, request, "write back"))
    except BaseException as error:
        if held is not None:
            held.release()
        if trace.active is not None:
            trace.end(request, 0, error)
        raise
    try:
        work = _Work(request, inode, mapper, flags, unit)
        await work.build()
    finally:
        # The look-ups are done; the I/O need not be (G03).
        if held is not None:
            held.release()
    await work.wait_or_leave()


def _unit(request: DirectRequest, inode: Inode) -> int:
    """The dio block: the file system's block, or the device's where only that fits (G01)."""
    limits = inode.limits
    finer = limits.read_align if request.op == READ else limits.write_align
    for unit in (max(inode.block_bytes, finer), finer):
        if request.offset % unit == 0 and segments_aligned(request.segments, limits.memory_align, unit):
            return unit
    raise AlignmentError(
        f"direct I/O of {request.length} bytes at {request.offset}: offset and every length must be multiples "
        f"of {finer}, and every buffer's address of {limits.memory_align}"
    )


def _outcome(request: DirectRequest) -> str:
    """Which way a request went, for the trace."""
    went = f"{Kind.BOUNCED} ({request.bounced})" if request.bounced else str(Kind.DIRECT)
    return went if request.fallback is None else f"{went}, up to: {request.fallback}"


async def _traced_mapping(asked: Awaitable[Extent | Fallback], request: DirectRequest) -> Extent | Fallback:
    """The mapper's answer, with the wait for it and what it says in the trace."""
    answer = await trace.waiting(asked, request, "mapping")
    if isinstance(answer, Extent):
        flags = " ".join(name for flag, name in _FLAGS.items() if answer.flags & flag)
        where = {"offset": answer.offset, "length": answer.length, "addr": answer.addr}
        trace.emit(request, "extent", extent=answer.kind.name.lower(), **where, flags=flags)
    return answer


class _Run:
    """Contiguous bytes of the device and the file, gathered for one bio (G12)."""

    __slots__ = ("addr", "device", "file_offset", "new", "segments", "size")

    def __init__(self, device: BlockDevice, addr: int, file_offset: int, new: bool) -> None:
        self.device = device
        self.addr = addr
        self.file_offset = file_offset
        self.new = new
        self.segments: list[memoryview] = []
        self.size = 0

    def goes_on(self, device: BlockDevice, addr: int, file_offset: int, new: bool) -> bool:
        """Whether what is there continues this, on the device and in the file (G12)."""
        return (
            self.device is device
            and self.addr + self.size == addr
            and self.file_offset + self.size == file_offset
            and self.new == new
        )


class _Sent(Piece):
    """A run that was sent: where it belongs in the file, and whether its blocks are new.

    covers: it is zeroes, sent in place of a piece of new blocks that failed.
    """

    __slots__ = ("covers", "device", "file_offset", "new")

    def __init__(self, op: int, run: _Run, flags: int, *, covers: bool = False) -> None:
        super().__init__(op, run.addr, run.segments, run.size, flags)
        self.device = run.device
        self.file_offset = run.file_offset
        self.new = run.new
        self.covers = covers


class _Work:
    """A request while it is worked on."""

    def __init__(self, request: DirectRequest, inode: Inode, mapper: Mapper, flags: int, unit: int) -> None:
        self.request = request
        self.inode = inode
        self.mapper = mapper
        self.flags = flags
        self.unit = unit
        self.size = inode.size_bytes
        self.writes = request.op == WRITE
        self.end = end = request.offset + request.length
        # A size that is published before the data is on the device shows what was there before (G04).
        extends = self.writes and end > self.size and not flags & DioFlags.ASYNC_EXTEND
        self.asynchronous = request.asynchronous and not extends
        self.defer = self.writes and request.sync
        self.hook = cast("BioHook | None", mapper if hasattr(mapper, "submit") else None)
        self.failed: Callable[[DirectRequest], None] | None = getattr(mapper, "failed", None)
        self.position = request.offset
        self.private: object = None
        self.run: _Run | None = None
        # The last sector of a file that ends within it, and the byte of the file that it begins with.
        self.tail: memoryview | None = None
        self.tail_offset = 0
        self.padded = False
        self.outstanding = 0
        self.left = False
        self.changed = Event()
        self.build_error: BaseException | None = None
        self.fault: BaseException | None = None
        self.device_error: BaseException | None = None
        if not flags & DioFlags.SKIP_DIO_COUNT:
            inode.in_flight.up()

    # -- building --------------------------------------------------------------------------------

    async def build(self) -> None:
        """Map and send the whole request, or as much of it as can go direct."""
        request = self.request
        end = request.offset + request.length
        if not self.writes:
            # Blocks past the end of the file, rounded up, are nobody's to read (G09).
            end = min(end, align_up(self.size, self.unit))
        try:
            while self.position < end and self._going():
                answer = await self._map(end - self.position)
                if isinstance(answer, Fallback):
                    self._stop(answer.reason)
                    break
                if not await self._take(answer, end):
                    break
            self._send()
        except GeneratorExit:
            raise  # Thrown away: nothing may be sent any more.
        except BaseException as error:
            self.build_error = error
            # What was gathered is dropped, but new blocks would then show what was in them (F11).
            # What was sent is waited for (G16, G20).
            if self.run is not None and self.run.new:
                self._send()
            self.run = None

    def _going(self) -> bool:
        return self.device_error is None and self.fault is None

    async def _map(self, left: int) -> Extent | Fallback:
        """The mapper's answer for what comes next, checked: a wrong one must not become wrong data (G07)."""
        asked = self.mapper.get_blocks(self.request, self.position, left, self._creates())
        answer = await (asked if trace.active is None else _traced_mapping(asked, self.request))
        if isinstance(answer, Extent) and not (
            answer.length > 0 and answer.offset <= self.position < answer.offset + answer.length
        ):
            raise RuntimeError(f"the mapper was asked for byte {self.position} and answered {answer}")
        return answer

    def _stop(self, reason: Reason) -> None:
        """What comes next cannot go direct (G08)."""
        self.request.fallback = reason
        if trace.active is not None:
            trace.emit(self.request, "fallback", reason=reason.value, offset=self.position)

    def _creates(self) -> bool:
        """Whether missing blocks may be allocated here (G07)."""
        if not self.writes:
            return False
        if not self.flags & DioFlags.SKIP_HOLES:
            return True
        return self.position >= align_up(self.size, self.inode.block_bytes)

    async def _take(self, extent: Extent, end: int) -> bool:
        """Use one mapping; False if the request stops here."""
        stop = min(end, extent.offset + extent.length)
        self.private = extent.private
        if extent.flags & DEFER_COMPLETION:
            self.defer = True
        reason = (_STOPS_WRITES if self.writes else _STOPS_READS).get(extent.kind)
        if reason is not None:
            self._stop(reason)
            return False
        if not self.writes and extent.kind in _READS_ZEROES:
            return self._read_zeroes(stop)
        if extent.device is None or extent.addr is None:
            raise RuntimeError(f"the mapper answered {extent}, which has no place")
        await self._gather(extent, extent.device, extent.addr, stop)
        return self._going()

    def _read_zeroes(self, stop: int) -> bool:
        """A read of what has no data: zeroes, written here (G09)."""
        self.request.holes = True
        for target in self._memory(self.position, min(stop, self.size)):
            try:
                done = zero_fill(target)
            except ValueError:  # It is read-only.
                done = -1
            if done < 0:
                self.fault = BadBufferError("the caller's memory cannot be written")
                return False
        self.position = stop
        return True

    async def _gather(self, extent: Extent, device: BlockDevice, addr: int, stop: int) -> None:
        """Add [position, stop) to the bio being built, with zeroes around it in new blocks (G10, G12)."""
        first, size = self.position, stop - self.position
        new = self.writes and bool(extent.flags & NEW)
        if not self.writes and stop > self.size:
            segments = self._memory_to_the_end(device.limits.read_align)
        else:
            segments = self._memory(first, stop)
        if new or (self.writes and extent.kind is ExtentKind.UNWRITTEN):
            self.inode.forget_blocks(device, addr, extent.length)
            # Elsewhere than at the request's ends, the rest of the block is the request's own data.
            lead = zeroing.before(first, self.inode.block_bytes) if first == self.request.offset else 0
            trail = zeroing.after(stop, self.inode.block_bytes) if stop == self.end else 0
            if lead or trail:
                self.padded = True
                segments = [*zeroing.zero_segments(lead), *segments, *zeroing.zero_segments(trail)]
                first, size = first - lead, size + lead + trail
        at = addr + first - extent.offset
        added = await self._add(device, at, first, segments, new)
        if new and added < size:
            # Building stops within new blocks: the rest of them must not show what was in them (F11, G15).
            zeroes = zeroing.zero_segments(size - added)
            await self._add(device, at + added, first + added, zeroes, new, to_the_end=True)
        self.position = stop
        if extent.flags & BOUNDARY:
            await self._send_and_reap()

    async def _add(
        self,
        device: BlockDevice,
        addr: int,
        file_offset: int,
        segments: Sequence[memoryview],
        new: bool,
        *,
        to_the_end: bool = False,
    ) -> int:
        """Add memory to the bio being built: how many bytes, fewer if building is to stop (G14)."""
        limits = device.limits
        align = limits.write_align if self.writes else limits.read_align
        most = limits.max_bio_bytes - limits.max_bio_bytes % align
        # Where a segment is cut, its second part must be aligned in memory too (F51).
        grain = limits.memory_align if align < limits.memory_align <= most else align
        added = 0
        for segment in segments:
            at = 0
            while at < len(segment):
                run = self.run
                if run is not None and not run.goes_on(device, addr + added, file_offset + added, new):
                    if not await self._send_and_reap() and not to_the_end:
                        return added
                    run = None
                if run is None:
                    run = self.run = _Run(device, addr + added, file_offset + added, new)
                left, room = len(segment) - at, most - run.size
                taken = left if left <= room else align_down(room, grain)
                if taken:
                    run.segments.append(segment[at : at + taken])
                    run.size += taken
                    at += taken
                    added += taken
                is_full = not taken or run.size == most or len(run.segments) == limits.max_segments
                if is_full and not await self._send_and_reap() and not to_the_end:
                    return added
        return added

    def _memory(self, start: int, stop: int) -> list[memoryview]:
        try:
            return slice_segments(self.request.segments, start - self.request.offset, stop - start)
        except ValueError as error:  # It was released after it was checked (G15).
            self.fault = self.fault or BadBufferError(f"the caller's memory cannot be used: {error}")
            return []

    def _memory_to_the_end(self, align: int) -> list[memoryview]:
        """The caller's memory for the file's last whole sectors, and private memory for the rest of the file.

        What the device holds behind the file's last byte is not the caller's to see, nor is his
        memory there ours to write (F02, F11).
        """
        whole = max(self.position, align_down(self.size, align))
        segments = self._memory(self.position, whole)
        if whole < self.size:
            self.tail = empty(align_up(self.size, align) - whole)
            self.tail_offset = whole
            self.request.bounced = Reason.END_OF_FILE
            segments.append(self.tail)
        return segments

    # -- sending and completing ------------------------------------------------------------------

    def _send(self) -> None:
        run, self.run = self.run, None
        if run is not None:
            piece = _Sent(self.request.op, run, self.request.bio_flags)
            self._submit(piece, piece.bio(0))

    async def _send_and_reap(self) -> bool:
        """Send what is gathered, and wait if much is in flight (G14); whether building goes on."""
        self._send()
        await self._until_below(_MOST_IN_FLIGHT)
        return self._going()

    def _submit(self, piece: _Sent, bio: Bio) -> None:
        bio.private = piece
        bio.end = self._ended
        if trace.active is not None:
            trace.sent(self.request, bio)
        self.outstanding += 1
        try:
            if self.hook is not None:
                self.hook.submit(bio, piece.file_offset + bio.addr - piece.offset)
            else:
                piece.device.submit(bio)
        except BaseException as error:
            trace.not_taken(bio, error)
            self.outstanding -= 1
            if isinstance(error, (TypeError, ValueError, BufferError)) and not isinstance(error, ODirectError):
                # The buffer cannot be used; whoever refused it has queued nothing.
                error = BadBufferError(f"the caller's memory cannot be used: {error}")
            self._failed(piece, error)

    def _ended(self, bio: Bio) -> None:
        """A bio has come back. Runs in the completion; never waits."""
        piece = cast(_Sent, bio.private)
        self.outstanding -= 1
        following = piece.came_back(bio, piece.device)
        if following is not None:
            self._submit(piece, following)
        elif piece.error is not None:
            self._failed(piece, piece.error)
        elif piece.done < piece.length:
            message = (
                f"the device ends at {piece.device.size_bytes}, before the file's byte "
                f"{piece.file_offset + piece.done} that is mapped to {piece.offset + piece.done}"
            )
            self._failed(piece, DeviceError(message))
        self.changed.fire()
        if self.left and not self.outstanding:
            self._complete()

    def _failed(self, piece: _Sent, error: BaseException) -> None:
        """A piece will not be whole: new blocks must not show what was in them before (G15, F11)."""
        if isinstance(error, BadBufferError) and not piece.covers:
            self.fault = self.fault or error
        else:
            self.device_error = self.device_error or error
        if not piece.new or piece.covers:
            return
        limits = piece.device.limits
        step = min(align_down(limits.max_bio_bytes, limits.write_align), limits.max_segments * zeroing.ZERO_BYTES)
        for start in range(0, piece.length, step):
            run = _Run(piece.device, piece.offset + start, piece.file_offset + start, True)
            run.size = min(step, piece.length - start)
            run.segments = zeroing.zero_segments(run.size)
            cover = _Sent(WRITE, run, piece.flags, covers=True)
            self._submit(cover, cover.bio(0))

    async def _until_below(self, number: int) -> None:
        """Wait until fewer than `number` bios are in flight; a cancellation is kept for later (G20)."""
        wait = 0
        if trace.active is not None and self.outstanding >= number:
            wait = trace.wait(self.request, "the rest" if number == 1 else "room")
        while self.outstanding >= number:
            self.changed = Event()
            try:
                await shielded(self.changed)
            except GeneratorExit:
                raise
            except BaseException as error:
                if self.build_error is None:
                    self.build_error = error
                self.device_error = self.device_error or error
        if wait:
            trace.waited(wait)

    async def wait_or_leave(self) -> None:
        """Leave the request in flight where that is allowed, else wait for all of it (G18)."""
        request = self.request
        # Whoever writes the rest of a padded block next must not be overtaken by its zeroes (F10).
        may_stay = not self.writes or (self.position == self.end and not self.padded)
        if self.asynchronous and may_stay and self.outstanding and self.build_error is None and self._going():
            self.left = True
            if trace.active is not None:
                trace.emit(request, "left", bios=self.outstanding)
            return
        await self._until_below(1)
        self._complete()
        await shielded(request.done)

    def _complete(self) -> None:
        """Every bio has ended: the result, `end_io`, the count, and then the caller is told (G16, G17)."""
        self.left = False
        error = self.build_error or self.fault or self.device_error
        transferred = 0
        if error is None:
            transferred = self.position - self.request.offset
            if not self.writes:
                transferred = max(0, min(transferred, self.size - self.request.offset))
            if self.tail is not None:
                error = self._copy_tail(self.tail)
                transferred = 0 if error is not None else transferred
        queue: DeferredQueue | None = None
        if self.defer and transferred:
            try:
                queue = self.inode.deferred()
            except BaseException as raised:  # There is nobody to raise it to but the caller.
                error = raised
        if queue is not None:
            if trace.active is not None:
                trace.emit(self.request, "deferred", transferred=transferred)
            queue.put(self._complete_later(transferred))
        else:
            self._tell(transferred, error)

    def _copy_tail(self, tail: memoryview) -> BaseException | None:
        """Give the caller the file's last bytes (F02); why that could not be."""
        try:
            scatter_bytes(self._memory(self.tail_offset, self.size), tail)
        except (ODirectError, TypeError, ValueError, BufferError) as error:
            return error
        return self.fault

    async def _complete_later(self, transferred: int) -> None:
        """The same by a task, because making it durable has to wait (G05)."""
        request = self.request
        error: BaseException | None = None
        try:
            self._end_io(transferred)
            if request.sync:
                syncing = self.inode.sync_written(request.offset, transferred, data_only=request.data_only)
                await (syncing if trace.active is None else trace.waiting(syncing, request, "sync"))
        except BaseException as raised:
            error = raised
        self._finish(transferred, error)

    def _tell(self, transferred: int, error: BaseException | None) -> None:
        try:
            if transferred:
                self._end_io(transferred)
            elif self.failed is not None:
                if trace.active is not None:
                    trace.emit(self.request, "failed")
                self.failed(self.request)
        except BaseException as raised:  # Told to the caller, not to whoever dispatches.
            error = error or raised
        self._finish(transferred, error)

    def _end_io(self, transferred: int) -> None:
        if trace.active is not None:
            trace.emit(self.request, "end_io", transferred=transferred)
        self.mapper.end_io(self.request, self.request.offset, transferred, self.private)

    def _finish(self, transferred: int, error: BaseException | None) -> None:
        if not self.flags & DioFlags.SKIP_DIO_COUNT:
            self.inode.in_flight.down()
        self.request.transferred = 0 if error is not None else transferred
        self.request.error = error
        if trace.active is not None:
            trace.end(self.request, self.request.transferred, error, _outcome(self.request))
        self.request.done.fire()
