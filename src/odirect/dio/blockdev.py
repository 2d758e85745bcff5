"""Direct I/O on a block device, or on a plain file that the kernel maps: rows B.

`transfer` moves bytes between the caller's memory and a device that must take them as they are:
what is not aligned is refused (`dio.bounce` is for that). This is also the place where a bio that the
kernel refused is told from one that failed; what came back short is resumed by `dio.piece`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, cast

from odirect.base import trace
from odirect.base.errors import AlignmentError, AtomicLimitError, NoSpaceError, from_errno
from odirect.base.units import align_down, is_power_of_two
from odirect.block.bio import ATOMIC, FLUSH, FUA, META, NOWAIT, READ, Bio
from odirect.block.buffers import segments_aligned, slice_segments
from odirect.block.device import BlockDevice, Limits
from odirect.dio.piece import VERB, Piece
from odirect.sched.traps import Event, shielded

#: What a kernel answers that does not do this directly.
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)

#: Trackers kept for reuse; a request that finds none makes one (B03).
_RESERVE = 32


class Refused(list[tuple[int, int]]):
    """Runs (position in the request, length) that the device refused: EINVAL, EOPNOTSUPP (F50).

    Nothing of them was moved; everything else of the request was. Whoever passes one of these to
    `transfer` finishes them some other way, so that no byte is moved twice (F07).
    """


def check_aligned(limits: Limits, op: int, offset: int, segments: Sequence[memoryview], length: int) -> None:
    """Raise AlignmentError unless the device can take this as it is (B01, EINVAL)."""
    unit = limits.read_align if op == READ else limits.write_align
    verb = VERB[op]
    if offset % unit or length % unit:
        raise AlignmentError(f"{verb} {length} bytes at {offset}: offset and length must be multiples of {unit}")
    if not segments_aligned(segments, limits.memory_align, unit):
        raise AlignmentError(
            f"{verb} {length} bytes at {offset}: every buffer must be at a multiple of "
            f"{limits.memory_align} bytes in memory and have a multiple of {unit} bytes"
        )


async def transfer(
    device: BlockDevice,
    op: int,
    offset: int,
    segments: Sequence[memoryview],
    length: int,
    *,
    flags: int = 0,
    end: int | None = None,
    ordered: bool = False,
    refused: Refused | None = None,
    traced: int = 0,
) -> int:
    """The number of bytes moved between `segments` and the device at byte `offset`.

    end: where the device or file ends (default: its size); None of it is asked again unless a
    transfer is short. A read stops there; a write there is ENOSPC (B09); writers of files that
    grow pass their own end. flags: BioFlags for the bios; FUA means that the data is durable when
    this returns (B05). ordered: at most one bio in flight, lowest first, so that a growing file
    has at every moment no hole below its size (F03). refused: collects what was refused instead
    of raising EINVAL. traced: the request in the trace that this is a part of; 0: it is one itself.

    Raises AlignmentError (B01), AtomicLimitError (F43), the first error of any bio (B04), and
    WouldBlockError for NOWAIT if nothing was done (F08). Source: rows B; block/fops.c's contract.
    """
    if trace.active is not None and not traced:
        options: dict[str, Any] = {"flags": flags, "end": end, "ordered": ordered, "refused": refused}
        return await _traced_transfer(device, op, offset, segments, length, options)
    limits = device.limits
    check_aligned(limits, op, offset, segments, length)
    if flags & ATOMIC:
        _check_atomic(limits, offset, segments, length)
    wanted = length
    length = _clip(device, op, offset, length, end, limits)
    if not length:
        return 0
    if length < wanted:
        segments = slice_segments(segments, 0, length)
    flush_after = False
    if flags & FUA and not limits.fua:
        flags &= ~FUA
        flush_after = True

    if flags & NOWAIT:
        count = await _one_by_one(device, op, offset, segments, length, flags, limits, refused, traced)
    elif length <= limits.max_bio_bytes and len(segments) <= limits.max_segments:
        bio = Bio(op, offset, segments, length, flags)
        await run(device, bio, traced)
        if bio.done_bytes == length and not bio.error:
            count = length
        else:
            count = await _finish_by_tracker(device, bio, refused, traced)
    else:
        tracker = _take_tracker()
        try:
            count = await tracker.run(device, op, offset, segments, length, flags, ordered, refused, traced)
        finally:
            _give_tracker(tracker)
    if flush_after and count:
        await flush(device, traced=traced)
    return count


async def _traced_transfer(
    device: BlockDevice, op: int, offset: int, segments: Sequence[memoryview], length: int, options: dict[str, Any]
) -> int:
    """`transfer` as a request of its own in the trace."""
    traced = trace.begin(None, "device", op, offset, length, options["flags"])
    try:
        count = await transfer(device, op, offset, segments, length, traced=traced, **options)
    except BaseException as error:
        trace.end(traced, 0, error)
        raise
    trace.end(traced, count, outcome="refused, in part" if options["refused"] else "direct")
    return count


async def run(device: BlockDevice, bio: Bio, traced: int = 0) -> None:
    """Submit `bio` and wait until it is finished, whatever its result (B02: the simple path)."""
    event = Event()
    bio.end = event.fire
    if trace.active is not None:
        trace.sent(traced, bio)
    try:
        device.submit(bio)
    except BaseException as error:
        trace.not_taken(bio, error)
        raise
    await shielded(event)


async def flush(device: BlockDevice, *, metadata: bool = False, traced: int = 0) -> None:
    """Make durable all that was completed before; with the metadata if asked. Raises DeviceError."""
    await _run_alone(device, Bio(FLUSH, 0, flags=META if metadata else 0), "syncing", traced)


async def change_range(device: BlockDevice, op: int, offset: int, length: int) -> None:
    """DISCARD or ZERO [offset, offset+length). Raises the device's error."""
    doing = f"{'discarding' if op != 4 else 'zeroing'} {length} bytes at {offset}"
    await _run_alone(device, Bio(op, offset, length=length), doing, 0)


async def _run_alone(device: BlockDevice, bio: Bio, doing: str, traced: int) -> None:
    """Run a bio without data, as a request of its own in the trace if it is part of none. Raises its error."""
    own = 0
    if trace.active is not None and not traced:
        own = traced = trace.begin(None, "device", bio.op, bio.addr, bio.length, bio.flags)
    try:
        await run(device, bio, traced)
        if bio.error:
            raise from_errno(bio.error, doing)
    except BaseException as error:
        trace.end(own, 0, error)
        raise
    if own:
        trace.end(own, bio.length, outcome="direct")


class _Tracker:
    """A request of several bios, or of one that did not go through whole (B03).

    Counting starts with the second bio. The first error, in order of completion, is the request's
    (B04, F06); once there is one, no more is built, and what is in flight is waited for (B08).
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._device: BlockDevice | None = None
        self._pieces: list[Piece] = []
        self._outstanding = 0
        self._error: BaseException | None = None
        self._moved = Event()
        self._refused: Refused | None = None
        self._refusing = False
        self._traced = 0

    async def run(
        self,
        device: BlockDevice,
        op: int,
        offset: int,
        segments: Sequence[memoryview],
        length: int,
        flags: int,
        ordered: bool,
        refused: Refused | None,
        traced: int,
    ) -> int:
        """Build the bios, keep the device's queue full but bounded (G14), and wait for all."""
        self._begin(device, refused, traced)
        limits = device.limits
        depth = 1 if ordered else max(1, limits.queue_depth)
        unit = limits.read_align if op == READ else limits.write_align
        for start, parts, size in split(segments, length, limits, unit):
            await self._until_below(depth)
            if self._error is not None:
                break
            if self._refusing and refused is not None:
                # One was refused, so the rest would be: leave it whole to the other way.
                refused.append((start, length - start))
                break
            self._start(Piece(op, offset + start, parts, size, flags))
        return await self._finish()

    async def adopt(self, device: BlockDevice, bio: Bio, refused: Refused | None, traced: int) -> int:
        """Go on with a bio of the simple path that did not go through whole."""
        self._begin(device, refused, traced)
        piece = Piece(bio.op, bio.addr, bio.segments, bio.length, bio.flags)
        self._pieces.append(piece)
        self._outstanding += 1
        bio.private = piece
        self._ended(bio)
        return await self._finish()

    def _begin(self, device: BlockDevice, refused: Refused | None, traced: int) -> None:
        self._device = device
        self._refused = refused
        self._traced = traced

    async def _finish(self) -> int:
        await self._until_below(1)
        if self._error is not None:
            raise self._error
        count = 0
        for piece in self._pieces:
            count += piece.done
            if piece.done < piece.length and piece.error is None:
                break
        return count

    async def _until_below(self, number: int) -> None:
        """Wait until fewer than `number` bios are in flight.

        A cancellation counts as the request's error: it stops the building, and is raised when
        every bio has come back.
        """
        wait = 0
        if trace.active is not None and self._outstanding >= number:
            wait = trace.wait(self._traced, "the rest" if number == 1 else "room")
        while self._outstanding >= number:
            self._moved = Event()
            try:
                await shielded(self._moved)
            except GeneratorExit:
                raise  # Thrown away: nobody will run it again.
            except BaseException as error:
                self._fail(error)
        if wait:
            trace.waited(wait)

    def _start(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._submit(piece, piece.bio(0))

    def _submit(self, piece: Piece, bio: Bio) -> None:
        device = self._device
        if device is None:
            raise RuntimeError("the tracker is not in use")
        bio.end = self._ended
        bio.private = piece
        if trace.active is not None:
            trace.sent(self._traced, bio)
        try:
            device.submit(bio)
        except Exception as error:  # A buffer that cannot be used (B08).
            trace.not_taken(bio, error)
            piece.error = error
            self._fail(error)
            return
        self._outstanding += 1

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error

    def _ended(self, bio: Bio) -> None:
        """A bio has come back: whole, short, refused or failed. Runs in the completion; never waits."""
        piece = cast(Piece, bio.private)
        device = self._device
        if device is None:
            raise RuntimeError("the tracker is not in use")
        self._outstanding -= 1
        following = piece.came_back(bio, device)
        if following is not None:
            self._submit(piece, following)
        elif piece.error is not None:
            if bio.error in REFUSALS and self._refused is not None:
                self._refusing = True
                first = self._pieces[0].offset
                # What of it was moved counts; the rest is for whoever asked for the list.
                self._refused.append((piece.offset - first + piece.done, piece.length - piece.done))
            else:
                self._fail(piece.error)
        self._moved.fire()


def split(
    segments: Sequence[memoryview], length: int, limits: Limits, unit: int
) -> Sequence[tuple[int, Sequence[memoryview], int]]:
    """(position, segments, length) of each bio that a request of `length` bytes becomes.

    Every bio but the last is a multiple of `unit` long, and holds at most the device's bytes and
    segments.
    """
    most = align_down(limits.max_bio_bytes, unit)
    bios: list[tuple[int, Sequence[memoryview], int]] = []
    parts: list[memoryview] = []
    start = size = 0
    for segment in segments:
        at = 0
        while at < len(segment) and start + size < length:
            if len(parts) == limits.max_segments or size == most:
                bios.append((start, tuple(parts), size))
                start += size
                parts, size = [], 0
            taken = min(len(segment) - at, most - size, length - start - size)
            parts.append(segment[at : at + taken])
            at += taken
            size += taken
    if size:
        bios.append((start, tuple(parts), size))
    return bios


async def _finish_by_tracker(device: BlockDevice, bio: Bio, refused: Refused | None, traced: int) -> int:
    tracker = _take_tracker()
    try:
        return await tracker.adopt(device, bio, refused, traced)
    finally:
        _give_tracker(tracker)


async def _one_by_one(
    device: BlockDevice,
    op: int,
    offset: int,
    segments: Sequence[memoryview],
    length: int,
    flags: int,
    limits: Limits,
    refused: Refused | None,
    traced: int,
) -> int:
    """NOWAIT: one bio after the other, none resumed, so that what was done is a true prefix (F08)."""
    unit = limits.read_align if op == READ else limits.write_align
    count = 0
    for start, parts, size in split(segments, length, limits, unit):
        bio = Bio(op, offset + start, parts, size, flags)
        await run(device, bio, traced)
        count += bio.done_bytes
        if bio.done_bytes == size and not bio.error:
            continue
        if count:
            break
        if bio.error in REFUSALS and refused is not None:
            refused.append((0, length))
            break
        inside = op != READ or offset < device.size_bytes
        error = bio.error or (errno.EAGAIN if inside else 0)
        if error:
            raise from_errno(error, f"{VERB[op]} {size} bytes at {offset}")
        break
    return count


def _clip(device: BlockDevice, op: int, offset: int, length: int, end: int | None, limits: Limits) -> int:
    """How much of the request lies before the end (B09)."""
    if not length:
        return 0
    end = device.size_bytes if end is None else end
    if op == READ:
        # The last block may hold less than its size; the device answers with what there is.
        unit = limits.read_align
        return max(0, min(length, -(-(end - offset) // unit) * unit))
    if offset >= end:
        raise NoSpaceError(f"writing {length} bytes at {offset}: the device ends at {end}")
    return min(length, align_down(end - offset, limits.write_align) or length)


def _check_atomic(limits: Limits, offset: int, segments: Sequence[memoryview], length: int) -> None:
    """An atomic write is one bio, a power of two long and at a multiple of that, within the limits."""
    most_segments = limits.atomic_max_segments or limits.max_segments
    if (
        not limits.atomic_max
        or not limits.atomic_min <= length <= limits.atomic_max
        or not is_power_of_two(length)
        or offset % length
        or len(segments) > most_segments
        or length > limits.max_bio_bytes
    ):
        promised = f"{limits.atomic_min} to {limits.atomic_max} bytes" if limits.atomic_max else "none at all"
        raise AtomicLimitError(
            f"an atomic write of {length} bytes at {offset} in {len(segments)} segments: the device promises "
            f"{promised}, of a length that is a power of two, at a multiple of it, in at most {most_segments} segments"
        )


_trackers: list[_Tracker] = [_Tracker() for _ in range(_RESERVE)]


def _take_tracker() -> _Tracker:
    try:
        return _trackers.pop()
    except IndexError:
        return _Tracker()


def _give_tracker(tracker: _Tracker) -> None:
    if tracker._outstanding:
        return  # Its request was thrown away; the bios in flight still know it.
    tracker._reset()
    if len(_trackers) < _RESERVE:
        _trackers.append(tracker)
