"""Runs of metadata on their way between memory and a device, each in as few bios as its limits allow.

The rooms below the engine have no use for its outcomes and fallbacks: metadata is aligned, and either
all of a run is moved or that is an error. What comes back short is resumed here (F04).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from odirect.base.errors import DeviceError, from_errno
from odirect.base.units import align_down
from odirect.block.bio import READ, Bio
from odirect.block.buffers import slice_segments
from odirect.block.device import BlockDevice
from odirect.sched.traps import Event, shielded

# A device that moves no byte this often in a row, without an error, never will.
_MOST_STALLS = 16
# Answers that mean "ask again".
_TRANSIENT = (errno.EAGAIN, errno.EINTR)


class _Part:
    """What one bio moves: bytes from `start` of the transfer on. `done` of them were."""

    __slots__ = ("done", "length", "segments", "stalls", "start")

    def __init__(self, start: int, segments: Sequence[memoryview], length: int) -> None:
        self.start = start
        self.segments = segments
        self.length = length
        self.done = 0
        self.stalls = 0


class Transfer:
    """One run of device bytes that is read or written: all of it, up to the device's end, or an error.

    ended     fires when every bio has come back, good or bad
    error     the first error, in order of completion (B04), or None
    """

    def __init__(
        self,
        device: BlockDevice,
        op: int,
        addr: int,
        segments: Sequence[memoryview],
        *,
        name: str,
        finish: Callable[[Transfer], None] | None = None,
    ) -> None:
        """A transfer between `segments` and the device from byte `addr` on, not started yet.

        Address, segments' lengths and places must be as the device's limits say. `name`: the
        volume's, for messages. `finish` is called once, just before `ended` fires, from where
        completions are told: it must not wait.
        """
        self.ended = Event()
        self.error: Exception | None = None
        self._device = device
        self._op = op
        self._addr = addr
        self._name = name
        self._finish = finish
        limits = device.limits
        self._unit = limits.read_align if op == READ else limits.write_align
        # A segment is resumed where it is aligned on the device and in memory.
        self._step = max(self._unit, limits.memory_align)
        self._parts = self._cut(segments, limits.max_bio_bytes, limits.max_segments)
        self._outstanding = len(self._parts)

    @property
    def moved(self) -> int:
        """How many bytes from the start were moved without a gap."""
        count = 0
        for part in self._parts:
            count += part.done
            if part.done < part.length:
                break
        return count

    def start(self) -> None:
        """Queue every bio; the driver commits them."""
        for part in self._parts:
            self._submit(part, 0)

    def _cut(self, segments: Sequence[memoryview], most_bytes: int, most_segments: int) -> list[_Part]:
        most_bytes = align_down(most_bytes, self._unit)
        parts: list[_Part] = []
        taken: list[memoryview] = []
        start = size = 0
        for segment in segments:
            at = 0
            while at < len(segment):
                if size == most_bytes or len(taken) == most_segments:
                    parts.append(_Part(start, taken, size))
                    start += size
                    taken, size = [], 0
                piece = segment[at : at + most_bytes - size]
                taken.append(piece)
                at += len(piece)
                size += len(piece)
        if size:
            parts.append(_Part(start, taken, size))
        return parts

    def _submit(self, part: _Part, at: int) -> None:
        length = part.length - at
        segments = slice_segments(part.segments, at, length) if at else part.segments
        bio = Bio(self._op, self._addr + part.start + at, segments, length, end=self._came_back, private=part)
        try:
            self._device.submit(bio)
        except Exception as error:  # The device was closed, or the memory cannot be used (B08).
            self._end_part(error)

    def _came_back(self, bio: Bio) -> None:
        """A bio has come back: whole, short or failed. Runs in the completion; never waits."""
        part = cast(_Part, bio.private)
        before = part.done
        first = self._addr + part.start
        part.done = max(before, bio.addr - first + bio.done_bytes)
        if bio.error and bio.error not in _TRANSIENT:
            self._end_part(from_errno(bio.error, f"{self._verb} {bio.length} bytes at {bio.addr}", self._name))
            return
        reached = first + part.done
        if part.done >= part.length or (self._op == READ and reached >= self._device.size_bytes):
            self._end_part(None)
            return
        part.stalls = 0 if part.done > before else part.stalls + 1
        if part.stalls > _MOST_STALLS:
            text = f"{self._verb} at {reached}: the device moves nothing and gives no error"
            self._end_part(DeviceError(text, path=self._name))
            return
        self._submit(part, self._restart(part))
        # No task need be woken by this, and without one a driver may not come by to commit.
        self._device.commit()

    def _restart(self, part: _Part) -> int:
        """The last byte of `part`, not past what was moved, that is aligned on the device and in memory."""
        start = 0
        for segment in part.segments:
            if part.done < start + len(segment):
                return start + align_down(part.done - start, self._step)
            start += len(segment)
        return start

    def _end_part(self, error: Exception | None) -> None:
        if error is not None and self.error is None:
            self.error = error
        self._outstanding -= 1
        if not self._outstanding:
            if self._finish is not None:
                self._finish(self)
            self.ended.fire()

    @property
    def _verb(self) -> str:
        return "reading" if self._op == READ else "writing"


async def all_back(events: Iterable[Event]) -> None:
    """Return when all `events` have fired; a cancellation is raised only then (F24).

    Source: docs/concurrency.md, cancelling.
    """
    interrupted: BaseException | None = None
    for event in events:
        try:
            await shielded(event)
        except GeneratorExit:
            raise  # Thrown away: nobody will run it again.
        except BaseException as error:
            interrupted = interrupted or error
    if interrupted is not None:
        raise interrupted
