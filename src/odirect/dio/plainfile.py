"""One open plain file or block device: which way each request goes, and what can be said of it after.

A request goes direct (`dio.bounce` over a `FileDevice`) as long as the kernel lets it. Where it is
refused, at open, later or in mid-stream (F50), the alignment is asked for again and tightened; when
nothing more can be tried, the page cache takes it (`CachedFileDevice`), and the outcome says so.
"""

from __future__ import annotations

import dataclasses
import errno
import mmap
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from odirect.base import trace
from odirect.base.errors import (
    AtomicLimitError,
    DeviceError,
    NoSpaceError,
    NotDirectError,
    ODirectError,
    StickySyncError,
    WouldBlockError,
)
from odirect.base.units import align_up
from odirect.block.bio import ATOMIC, FUA, NOWAIT, READ, WRITE
from odirect.block.buffers import BufferPool, slice_segments
from odirect.block.device import BlockDevice, Limits, WithLimits
from odirect.dio import blockdev, bounce
from odirect.dio.blockdev import Refused, check_aligned
from odirect.dio.bounce import Moved, Route
from odirect.dio.outcome import Kind, Outcome, Promise, Reason, worst
from odirect.dio.write_order import WriteOrder
from odirect.sched.locks import Mutex

# When the kernel refuses what it said that it takes, these are tried before direct I/O is given up.
_STRICTER = (512, 4096, 65536)
#: Where a regular file ends for a writer: the largest offset that the kernel knows.
NO_END = (1 << 63) - 1


@dataclasses.dataclass(slots=True)
class FileState:
    """What all who use one open file share, from whichever thread or loop.

    refused: per operation (READ, WRITE) why the kernel does not do it direct, if it does not.
    cached: likewise, where the kernel takes direct I/O and serves it from its cache.
    failed_sync: the first sync that failed; the file stays failed (F41).
    """

    limits: Limits
    path: object
    is_block: bool
    refused: dict[int, Reason] = dataclasses.field(default_factory=dict)
    cached: dict[int, Reason] = dataclasses.field(default_factory=dict)
    failed_sync: str | None = None

    def remember_failed_sync(self, error: BaseException) -> None:
        """A sync, or a write that was to be durable, has failed: the first of them is kept."""
        if self.failed_sync is None:
            self.failed_sync = str(error)

    def check_sync(self) -> None:
        """Raise StickySyncError if a sync has failed: what was written before may be lost (F41)."""
        if self.failed_sync is not None:
            raise StickySyncError(
                f"an earlier sync failed ({self.failed_sync}); what was written before it may be lost. "
                "Write it again through a newly opened file",
                path=self.path,
            )


class PlainFile:
    """The coroutine side of an open file; `files.File` and `aio.File` are its faces.

    ask_again: gives the file's limits anew, after the kernel has refused a request.
    """

    def __init__(
        self,
        state: FileState,
        direct: BlockDevice | None,
        cached: BlockDevice | None,
        pool: BufferPool,
        *,
        strict: bool = False,
        ask_again: Callable[[], Limits] | None = None,
    ) -> None:
        self.state = state
        self.strict = strict
        self.order = WriteOrder()
        self._direct = direct
        self._cached = cached
        self._pool = pool
        self._ask_again = ask_again
        self._limited: WithLimits | None = None
        self._growing = Mutex()

    @property
    def size_bytes(self) -> int:
        """The present size."""
        device = self._direct if self._direct is not None else self._cached
        if device is None:
            raise RuntimeError("a file needs a device")
        return device.size_bytes

    async def read(
        self, offset: int, segments: Sequence[memoryview], length: int, flags: int = 0, traced: int = 0
    ) -> Moved:
        """Read up to `length` bytes at `offset`, none past the end (F02).

        traced: the request in the trace that this is a part of; 0: it is one itself.
        """
        if trace.active is not None and not traced:
            return await self._traced(self.read, READ, offset, segments, length, flags)
        self._check_strict(READ, offset, segments, length)
        while True:
            direct = self._device_for(READ)
            end = self.size_bytes
            if direct is None:
                return await self._through_cache(READ, offset, segments, length, flags, end, traced)
            route = Route(direct, self._pool, self._cached, None, self.order, traced)
            refused = Refused()
            moved = await bounce.read(route, offset, segments, length, end=end, flags=flags, refused=refused)
            if not refused:
                return self._honest(READ, moved)
            self._tighten(READ, direct.limits, traced=traced)
            self._check_strict(READ, offset, segments, length)
            # Reading again what was read already does no harm.

    async def write(
        self, offset: int, segments: Sequence[memoryview], length: int, flags: int = 0, traced: int = 0
    ) -> Moved:
        """Write `length` bytes at `offset`; a block device that ends before takes fewer (B09).

        traced: as in `read`.
        """
        if trace.active is not None and not traced:
            return await self._traced(self.write, WRITE, offset, segments, length, flags)
        if flags & FUA:
            self.state.check_sync()
        if flags & ATOMIC:
            return await self._write_atomic(offset, segments, length, flags, traced)
        self._check_strict(WRITE, offset, segments, length)
        try:
            if self.state.is_block:
                return await self._write(offset, segments, length, flags, self.size_bytes, ordered=False, traced=traced)
            if offset + length > NO_END:
                raise NoSpaceError(f"writing {length} bytes at {offset}: past the largest file size", errno=errno.EFBIG)
            if offset + length <= self.size_bytes:
                return await self._write(offset, segments, length, flags, NO_END, ordered=False, traced=traced)
            # The size must not be seen before the data below it is there (F03).
            with await trace.waiting(self._growing.hold(), traced, "lock"):
                return await self._write(offset, segments, length, flags, NO_END, ordered=True, traced=traced)
        except DeviceError as error:
            if flags & FUA:
                self.state.remember_failed_sync(error)
            raise

    async def _traced(
        self,
        call: Callable[..., Coroutine[Any, Any, Moved]],
        op: int,
        offset: int,
        segments: Sequence[memoryview],
        length: int,
        flags: int,
    ) -> Moved:
        """`read` or `write` as a request of the trace."""
        traced = trace.begin(None, "file", op, offset, length, flags, file=trace.name_of(self.state.path))
        try:
            moved = await call(offset, segments, length, flags, traced)
        except BaseException as error:
            trace.end(traced, 0, error)
            raise
        trace.end(traced, moved.transferred, outcome=str(moved.outcome))
        return moved

    async def sync(self, *, data_only: bool = False) -> None:
        """Make everything written durable. After a failure every later call fails too (F41)."""
        self.state.check_sync()
        device = self._direct if self._direct is not None else self._cached
        if device is None:
            raise RuntimeError("a file needs a device")
        try:
            await blockdev.flush(device, metadata=not data_only)
        except ODirectError as error:
            self.state.remember_failed_sync(error)
            raise

    async def change_range(self, op: int, offset: int, length: int) -> None:
        """DISCARD or ZERO a range."""
        device = self._direct if self._direct is not None else self._cached
        if device is None:
            raise RuntimeError("a file needs a device")
        await blockdev.change_range(device, op, offset, length)

    def _device_for(self, op: int) -> BlockDevice | None:
        """The device for direct I/O, under the limits that are known by now; None if it is refused."""
        device = self._direct
        if device is None or op in self.state.refused:
            return None
        limits = self.state.limits
        if device.limits is limits:
            return device
        if self._limited is None or self._limited.limits is not limits:
            self._limited = WithLimits(device, limits)
        return self._limited

    def _check_strict(self, op: int, offset: int, segments: Sequence[memoryview], length: int) -> None:
        if not self.strict:
            return
        reason = self.state.refused.get(op) or self.state.cached.get(op)
        if reason is not None or self._direct is None:
            raise self._not_direct(op, reason or Reason.REFUSED)
        check_aligned(self.state.limits, op, offset, segments, length)

    def _not_direct(self, op: int, reason: Reason) -> NotDirectError:
        verb = "reading" if op == READ else "writing"
        return NotDirectError(
            f"{verb} cannot go direct: {reason.value}; open it with access='auto' to allow the page cache",
            path=self.state.path,
        )

    async def _write(
        self,
        offset: int,
        segments: Sequence[memoryview],
        length: int,
        flags: int,
        end: int,
        *,
        ordered: bool,
        traced: int,
    ) -> Moved:
        direct = self._device_for(WRITE)
        if direct is None:
            return await self._through_cache(WRITE, offset, segments, length, flags, end, traced)
        route = Route(direct, self._pool, self._cached, None, self.order, traced)
        refused = Refused()
        moved = await bounce.write(
            route, offset, segments, length, end=end, flags=flags, ordered=ordered, refused=refused
        )
        if not refused:
            return self._honest(WRITE, moved)
        # What went through stays; each run that was refused is written in the next best way (F07).
        runs = _joined(refused)
        again = self._tighten(WRITE, direct.limits, [(offset + start, size) for start, size in runs], traced=traced)
        if self.strict and not again:
            raise self._not_direct(WRITE, Reason.REFUSED)
        self._check_strict(WRITE, offset, segments, length)
        outcome: Outcome | None = moved.outcome if moved.transferred else None
        total = moved.transferred
        for start, size in runs:
            parts = slice_segments(segments, start, size)
            if again:
                rest = await self._write(offset + start, parts, size, flags, end, ordered=ordered, traced=traced)
            else:
                rest = await self._through_cache(WRITE, offset + start, parts, size, flags, end, traced)
            outcome = worst(outcome, rest.outcome)
            total += rest.transferred
            if rest.transferred < size:
                return Moved(start + rest.transferred, outcome)
        return Moved(total, outcome or moved.outcome)

    async def _write_atomic(
        self, offset: int, segments: Sequence[memoryview], length: int, flags: int, traced: int
    ) -> Moved:
        """An atomic write goes direct as one bio or not at all: nothing else keeps the promise (F43)."""
        direct = self._device_for(WRITE)
        if direct is None:
            raise AtomicLimitError("an atomic write cannot go through the page cache", path=self.state.path)
        end = self.size_bytes if self.state.is_block else NO_END
        with await trace.waiting(self.order.direct(offset, length), traced, "lock"):
            count = await blockdev.transfer(
                direct, WRITE, offset, segments, length, flags=flags, end=end, traced=traced
            )
        promise = Promise.DURABLE if flags & FUA else Promise.DEVICE
        return Moved(count, Outcome(Kind.DIRECT, promise=promise))

    async def _through_cache(
        self, op: int, offset: int, segments: Sequence[memoryview], length: int, flags: int, end: int, traced: int
    ) -> Moved:
        if self._cached is None:
            raise NotDirectError(
                "direct I/O is refused, and there is no page cache to go through", path=self.state.path
            )
        reason = self.state.refused.get(op, Reason.REFUSED)
        if trace.active is not None:
            trace.emit(traced, "fallback", reason=reason.value, offset=offset)
        if op == READ:
            length = max(0, min(length, end - offset))
            segments = slice_segments(segments, 0, length)
        if flags & NOWAIT and op == WRITE:
            raise WouldBlockError("writing without waiting: it would go through the page cache", path=self.state.path)
        promise = Promise.NONE
        if op == READ:
            count = await blockdev.transfer(
                self._cached, op, offset, segments, length, flags=flags, end=end, ordered=True, traced=traced
            )
        else:
            with await trace.waiting(self.order.merge(offset, length), traced, "lock"):
                count = await blockdev.transfer(
                    self._cached, op, offset, segments, length, flags=flags, end=end, ordered=True, traced=traced
                )
            promise = Promise.DURABLE if flags & FUA else Promise.DEVICE
        return Moved(count, Outcome(Kind.BUFFERED, reason, promise))

    def _honest(self, op: int, moved: Moved) -> Moved:
        """The outcome, with what the file system did behind our back."""
        reason = self.state.cached.get(op)
        if reason is None:
            return moved
        return Moved(moved.transferred, Outcome(Kind.BUFFERED, reason, moved.outcome.promise))

    def _tighten(self, op: int, old: Limits, runs: Sequence[tuple[int, int]] = (), *, traced: int = 0) -> bool:
        """After a refusal under `old`: ask for the limits again, try coarser units, or give direct I/O up (F50).

        runs: what was refused of a write. False: no run holds a whole block of the coarser units, so
        that trying again would say nothing about them, and the limits stay.
        """
        if trace.active is not None:
            trace.emit(traced, "refused", unit=old.read_align if op == READ else old.write_align)
        if self.state.limits is not old or op in self.state.refused:
            return True  # Another request was refused under the same limits, and has done it.
        new = self._ask_again() if self._ask_again is not None else old
        if all(after <= before for after, before in zip(_units(new), _units(old), strict=True)):
            coarser = _coarser(old)
            if coarser is None:
                self.state.refused[op] = Reason.REFUSED
                return True
            unit = coarser.write_align
            if op == WRITE and not any(align_up(start, unit) + unit <= start + size for start, size in runs):
                return False
            new = coarser
        self.state.limits = new
        return True


def _joined(refused: Refused) -> list[tuple[int, int]]:
    """The runs in order, neighbours as one: together they may fill a coarser unit."""
    runs: list[tuple[int, int]] = []
    for start, size in sorted(refused):
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        else:
            runs.append((start, size))
    return runs


def _units(limits: Limits) -> tuple[int, int, int]:
    return limits.read_align, limits.write_align, limits.memory_align


def _coarser(limits: Limits) -> Limits | None:
    """The next coarser units to try: memory first, then offsets and lengths; None after the coarsest."""
    unit = max(limits.read_align, limits.write_align)
    memory = limits.memory_align
    if memory < mmap.PAGESIZE:
        memory = mmap.PAGESIZE
    else:
        coarser = next((step for step in _STRICTER if step > unit), None)
        if coarser is None:
            return None
        unit = coarser
    fields = ("read_align", "write_align", "memory_align")
    sources = {**limits.sources, **dict.fromkeys(fields, "refused below")}
    return dataclasses.replace(
        limits,
        read_align=max(unit, limits.read_align),
        write_align=max(unit, limits.write_align),
        memory_align=memory,
        max_bio_bytes=max(limits.max_bio_bytes, unit),
        sources=sources,
    )
