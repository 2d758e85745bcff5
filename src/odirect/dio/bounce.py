"""Requests of any alignment on a device that is choosy: what is aligned goes direct, the rest bounces.

A request falls into a head, a body and a tail. The body goes between the caller's memory and the
device. The edges, and a body whose memory is misaligned, go through a private buffer. An edge of a
write is a part of a block: it is merged by the device's byte-wise twin where there is one (the
kernel's page cache of the same file, which merges under the file's own lock), else it is read,
changed and written back here, under a range lock that all writers of the device share.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from odirect.base import trace
from odirect.base.errors import NoSpaceError, WouldBlockError
from odirect.base.units import align_down, align_up
from odirect.block.bio import FUA, NOWAIT, READ, WRITE
from odirect.block.buffers import (
    BufferPool,
    empty,
    gather_bytes,
    scatter_bytes,
    segments_aligned,
    slice_segments,
)
from odirect.block.device import BlockDevice, Limits
from odirect.dio.blockdev import Refused, transfer
from odirect.dio.outcome import Kind, Outcome, Promise, Reason, worst
from odirect.dio.write_order import WriteOrder
from odirect.sched.locks import Held, RangeLock
from odirect.sched.traps import gather, this_scheduler

# Two or three small I/Os take longer than one that reads a little more.
_READ_WHOLE_BELOW = 128 << 10
# Chunks of one bounced request in flight at once: one is copied while others are moved.
_WORKERS = 4


class Route(NamedTuple):
    """Where a request may go.

    twin: takes any bytes, merges parts of blocks by itself. order: needed where there is a twin;
    shared by all who write to the two. lock: needed where there is none; shared by everybody who
    writes to the device. traced: the request in the trace, if there is one.
    """

    device: BlockDevice
    pool: BufferPool
    twin: BlockDevice | None = None
    lock: RangeLock | None = None
    order: WriteOrder | None = None
    traced: int = 0


class Moved(NamedTuple):
    """How many bytes of a request were moved, and which way."""

    transferred: int
    outcome: Outcome


class Part(NamedTuple):
    """A run of a request; reason NONE: it can go direct."""

    start: int
    length: int
    reason: Reason


DIRECT_READ = Outcome(Kind.DIRECT)


async def read(
    route: Route,
    offset: int,
    segments: Sequence[memoryview],
    length: int,
    *,
    end: int,
    flags: int = 0,
    refused: Refused | None = None,
) -> Moved:
    """Read up to `length` bytes at `offset` into the segments, none past `end` (F02).

    The caller's memory past the bytes that are counted is not touched. Raises what `transfer`
    raises.
    """
    count = max(0, min(length, end - offset))
    if not count:
        return Moved(0, DIRECT_READ)
    limits = route.device.limits
    parts = plan(limits, limits.read_align, offset, segments, count, cut=count < length)
    if len(parts) > 1 and count <= _READ_WHOLE_BELOW <= route.pool.chunk_bytes:
        parts = [Part(0, count, next(part.reason for part in parts if part.reason))]
    done = 0
    outcome: Outcome | None = None
    for part in parts:
        runs = slice_segments(segments, part.start, part.length)
        own = None if refused is None else Refused()
        try:
            if part.reason is Reason.NONE:
                how = DIRECT_READ
                at, traced = offset + part.start, route.traced
                got = await transfer(
                    route.device, READ, at, runs, part.length, flags=flags, end=end, refused=own, traced=traced
                )
            else:
                if trace.active is not None:
                    _tell(route, offset, part)
                how = Outcome(Kind.BOUNCED, part.reason)
                got = await _bounced_read(route, offset + part.start, runs, part.length, end, flags, own)
        except WouldBlockError:
            if not done:
                raise
            break  # What was read before counts (F08).
        outcome = worst(outcome, how)
        done += got
        if own:
            _collect(refused, own, part.start)
        elif got < part.length:
            break
    return Moved(done, outcome or DIRECT_READ)


async def write(
    route: Route,
    offset: int,
    segments: Sequence[memoryview],
    length: int,
    *,
    end: int,
    flags: int = 0,
    ordered: bool = False,
    refused: Refused | None = None,
) -> Moved:
    """Write `length` bytes of the segments at `offset`; a device that ends at `end` takes fewer (B09).

    The parts go in order, so that a file that grows has at every moment no hole below its size
    (F03). Raises what `transfer` raises.
    """
    promise = Promise.DURABLE if flags & FUA else Promise.DEVICE
    if not length:
        return Moved(0, Outcome(Kind.DIRECT, promise=promise))
    if offset >= end:
        raise NoSpaceError(f"writing {length} bytes at {offset}: the device ends at {end}")
    length = min(length, end - offset)
    limits = route.device.limits
    unit = limits.write_align if route.twin is not None else max(limits.read_align, limits.write_align)
    done = 0
    outcome: Outcome | None = None
    parts = plan(limits, unit, offset, segments, length)
    if flags & NOWAIT:
        parts = _without_waiting(parts, offset)
    for number, part in enumerate(parts):
        runs = slice_segments(segments, part.start, part.length)
        at = offset + part.start
        own = None if refused is None else Refused()
        if part.reason is Reason.NONE:
            got = await _direct_write(route, at, runs, part.length, end, flags, ordered, own)
            outcome = worst(outcome, Outcome(Kind.DIRECT, promise=promise))
        else:
            if trace.active is not None:
                _tell(route, offset, part)
            got = await _bounced_write(route, at, runs, part.length, end, flags, unit, ordered, own)
            outcome = worst(outcome, Outcome(Kind.BOUNCED, part.reason, promise))
        done += got
        if own:
            # What follows is left to the other way too: it must not be there before what was refused (F03).
            _collect(refused, own, part.start)
            _collect(refused, ((later.start, later.length) for later in parts[number + 1 :]), 0)
            break
        if got < part.length:
            break
    return Moved(done, outcome or Outcome(Kind.DIRECT, promise=promise))


def _tell(route: Route, offset: int, part: Part) -> None:
    """A part that bounces, for the trace."""
    where = {"offset": offset + part.start, "length": part.length}
    trace.emit(route.traced, "bounce", reason=part.reason.value, **where)


def _without_waiting(parts: list[Part], offset: int) -> list[Part]:
    """What NOWAIT can do of a write: merging a part of a block, and copying, may wait (F08)."""
    direct = list(takewhile(lambda part: part.reason is Reason.NONE, parts))
    if not direct:
        raise WouldBlockError(f"writing at {offset} without waiting: it is not aligned, and bouncing it may wait")
    return direct


def plan(
    limits: Limits, unit: int, offset: int, segments: Sequence[memoryview], length: int, *, cut: bool = False
) -> list[Part]:
    """Head, body and tail of a request, or the whole as one part if its memory is misaligned.

    cut: the request was cut at the end of the file, which is why its tail bounces.
    """
    head = min(length, align_up(offset, unit) - offset)
    body = align_down(length - head, unit)
    tail = length - head - body
    if body and not segments_aligned(slice_segments(segments, head, body), limits.memory_align, unit):
        reason = Reason.MISALIGNED_OFFSET if head else Reason.MISALIGNED_MEMORY
        return [Part(0, length, reason)]
    parts = [
        Part(0, head, Reason.MISALIGNED_OFFSET),
        Part(head, body, Reason.NONE),
        Part(head + body, tail, Reason.END_OF_FILE if cut else Reason.MISALIGNED_LENGTH),
    ]
    return [part for part in parts if part.length]


def _chunks(start: int, end: int, most: int, unit: int) -> list[tuple[int, int]]:
    """[start, end) cut at multiples of `most`, so that each piece fits a buffer with its blocks whole."""
    if most % unit:
        raise ValueError(f"a private buffer of {most} bytes does not hold whole blocks of {unit}")
    cuts = [start, *range(align_down(start, most) + most, end, most), end]
    return list(pairwise(cuts))


async def _bounced_read(
    route: Route,
    offset: int,
    segments: Sequence[memoryview],
    length: int,
    end: int,
    flags: int,
    refused: Refused | None,
) -> int:
    unit, traced = route.device.limits.read_align, route.traced
    chunks = _chunks(offset, offset + length, route.pool.chunk_bytes, unit)
    got = [0] * len(chunks)

    async def one(number: int) -> bool:
        start, stop = chunks[number]
        first, last = align_down(start, unit), align_up(stop, unit)
        own = None if refused is None else Refused()
        lease = route.pool.try_take() if flags & NOWAIT else None
        if lease is None:
            if flags & NOWAIT:
                if not number:
                    raise WouldBlockError(f"reading at {start} without waiting: all private buffers are in use")
                return False  # What was read before counts (F08).
            lease = await trace.waiting(route.pool.take(), route.traced, "buffer")
        with lease:
            view = lease.view[: last - first]
            try:
                count = await transfer(
                    route.device, READ, first, [view], last - first, flags=flags, end=end, refused=own, traced=traced
                )
            except WouldBlockError:
                if not number:
                    raise
                return False  # What was read before counts (F08).
            if own and refused is not None:
                refused.append((start - offset, stop - start))
                return False
            count = max(0, min(stop, first + count) - start)
            target = slice_segments(segments, start - offset, count)
            scatter_bytes(target, view[start - first : start - first + count])
        got[number] = count
        return count == stop - start

    await _in_turn(one, len(chunks), 1 if flags & NOWAIT else _WORKERS)
    return _prefix(got, chunks)


async def _bounced_write(
    route: Route,
    offset: int,
    segments: Sequence[memoryview],
    length: int,
    end: int,
    flags: int,
    unit: int,
    ordered: bool,
    refused: Refused | None,
) -> int:
    """Write from a private copy; the parts of blocks at either end are merged."""
    chunks = _chunks(offset, offset + length, route.pool.chunk_bytes, unit)
    got = [0] * len(chunks)
    untried = dict(enumerate(chunks))

    async def one(number: int) -> bool:
        start, stop = untried.pop(number)
        own = None if refused is None else Refused()
        with await trace.waiting(route.pool.take(), route.traced, "buffer") as lease:
            copy = _copy(lease.view, slice_segments(segments, start - offset, stop - start), start, stop, unit)
            got[number] = await _copied_write(route, start, copy, end, flags, unit, own)
        if own:
            _collect(refused, own, start - offset)
        return got[number] == stop - start

    await _in_turn(one, len(chunks), 1 if ordered else _WORKERS)
    if not refused:
        return _prefix(got, chunks)
    _collect(refused, ((start - offset, stop - start) for start, stop in untried.values()), 0)
    return sum(got)


class _Copy(NamedTuple):
    """Private copies of the part of a block at the head, the whole blocks, and the part at the tail."""

    head: memoryview
    body: memoryview
    tail: memoryview


def _copy(buffer: memoryview, segments: Sequence[memoryview], start: int, stop: int, unit: int) -> _Copy:
    """A copy in `buffer` of what goes to device bytes [start, stop); the whole blocks are at its start, aligned."""
    length = stop - start
    head = min(length, align_up(start, unit) - start)
    body = align_down(length - head, unit)
    copy = _Copy(buffer[length - head : length], buffer[:body], buffer[body : length - head])
    gather_bytes(copy.head, slice_segments(segments, 0, head))
    gather_bytes(copy.body, slice_segments(segments, head, body))
    gather_bytes(copy.tail, slice_segments(segments, head + body, length - head - body))
    return copy


async def _copied_write(
    route: Route, offset: int, copy: _Copy, end: int, flags: int, unit: int, refused: Refused | None
) -> int:
    """Write a private copy in order; what follows a refused body is refused with it."""
    head, body, tail = copy
    own = None if refused is None else Refused()
    done = 0
    if head:
        done = await _merge(route, offset, head, end, flags, unit)
    if body and done == len(head):
        done += await _direct_write(route, offset + done, [body], len(body), end, flags, True, own)
    if own:
        _collect(refused, own, len(head))
        _collect(refused, [(0, len(tail))] if tail else [], len(head) + len(body))
    elif tail and done == len(head) + len(body):
        done += await _merge(route, offset + done, tail, end, flags, unit)
    return done


async def _direct_write(
    route: Route,
    offset: int,
    runs: Sequence[memoryview],
    length: int,
    end: int,
    flags: int,
    ordered: bool,
    refused: Refused | None,
) -> int:
    lock = route.lock if route.lock is not None else RangeLock()
    held: Held | None
    if flags & NOWAIT:
        if route.order is not None:
            held = route.order.try_direct(offset, length)
        else:
            held = lock.try_hold(offset, length, shared=True)
        if held is None:
            raise WouldBlockError(f"writing at {offset} without waiting: a part of a block there is being merged")
    elif route.order is not None:
        held = await trace.waiting(route.order.direct(offset, length), route.traced, "lock")
    else:
        held = await trace.waiting(lock.hold(offset, length, shared=True), route.traced, "lock")
    with held:
        return await transfer(
            route.device,
            WRITE,
            offset,
            runs,
            length,
            flags=flags,
            end=end,
            ordered=ordered,
            refused=refused,
            traced=route.traced,
        )


async def _merge(route: Route, offset: int, view: memoryview, end: int, flags: int, unit: int) -> int:
    """Write a part of one block, leaving the rest of the block as it is; the bytes written."""
    size, traced = len(view), route.traced
    if route.twin is not None:
        order = route.order if route.order is not None else WriteOrder()
        with await trace.waiting(order.merge(offset, size), traced, "lock"):
            return await transfer(
                route.twin, WRITE, offset, [view], size, flags=flags, end=end, ordered=True, traced=traced
            )
    start = align_down(offset, unit)
    lock = route.lock if route.lock is not None else RangeLock()
    with await trace.waiting(lock.hold(start, unit), traced, "lock"):
        # Not from the pool: the caller may hold one of its buffers, and must not wait for another.
        block = empty(unit)
        await transfer(route.device, READ, start, [block], unit, traced=traced)
        block[offset - start : offset - start + size] = view
        moved = await transfer(route.device, WRITE, start, [block], unit, flags=flags, end=end, traced=traced)
    return max(0, min(size, start + moved - offset))


async def _in_turn(one: Callable[[int], Coroutine[Any, Any, bool]], number: int, workers: int) -> None:
    """Do one(0), one(1), ... with at most `workers` at once; start no more after one that is False."""
    turns = iter(range(number))
    going = True
    first: BaseException | None = None

    async def work() -> None:
        nonlocal going, first
        while going:
            turn = next(turns, None)
            if turn is None:
                return
            try:
                whole = await one(turn)
            except GeneratorExit:
                raise  # Thrown away: kept, it would keep all that is thrown away with us.
            except BaseException as error:
                going = False
                first = error if first is None else first
                raise
            going = going and whole

    if workers == 1 or number == 1:
        await work()
        return
    scheduler = await this_scheduler()
    try:
        await gather(*[scheduler.spawn(work()) for _ in range(min(workers, number))])
    except Exception as error:
        if first is None or first is error:
            raise
        raise first from None  # The first error to come, not the first worker's (B04).


def _prefix(got: Sequence[int], chunks: Sequence[tuple[int, int]]) -> int:
    """Bytes from the start up to the first chunk that is not whole."""
    count = 0
    for size, (start, stop) in zip(got, chunks, strict=True):
        count += size
        if size < stop - start:
            break
    return count


def _collect(refused: Refused | None, own: Iterable[tuple[int, int]], start: int) -> None:
    if refused is not None:
        refused.extend((start + at, size) for at, size in own)
