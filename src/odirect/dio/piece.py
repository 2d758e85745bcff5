"""A part of a request that one bio was sent for: resumed when it comes back short, until it is whole.

This is the one place where a short transfer is resumed, and where the end of a file is told from one
by its size (F04).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from odirect.base.errors import DeviceError, from_errno
from odirect.base.units import align_down
from odirect.block.bio import NOWAIT, READ, WRITE, Bio
from odirect.block.buffers import slice_segments
from odirect.block.device import BlockDevice

# A device that moves no byte this often in a row, without an error, never will.
MOST_STALLS = 16
#: Answers that mean "ask again", unless the request said not to wait.
TRANSIENT = (errno.EAGAIN, errno.EINTR)
VERB = {READ: "reading", WRITE: "writing"}


class Piece:
    """`length` bytes of memory that go to or come from byte `offset` of a device.

    done: bytes moved so far. error: why it will not be whole; None if it is, or met the device's end.
    """

    __slots__ = ("done", "error", "flags", "length", "offset", "op", "segments", "stalls")

    def __init__(self, op: int, offset: int, segments: Sequence[memoryview], length: int, flags: int = 0) -> None:
        self.op = op
        self.offset = offset
        self.segments = segments
        self.length = length
        self.flags = flags
        self.done = 0
        self.stalls = 0
        self.error: BaseException | None = None

    def bio(self, start: int) -> Bio:
        """A bio for what is left from byte `start` on; its sender sets `end` and `private`."""
        segments = slice_segments(self.segments, start, self.length - start) if start else self.segments
        return Bio(self.op, self.offset + start, segments, self.length - start, self.flags)

    def came_back(self, bio: Bio, device: BlockDevice) -> Bio | None:
        """The bio to go on with after `bio`, or None if the piece has come to its end, good or bad."""
        before = self.done
        self.done = max(before, bio.addr - self.offset + bio.done_bytes)
        waits = not (self.flags & NOWAIT and bio.error == errno.EAGAIN)
        if bio.error and not (bio.error in TRANSIENT and waits):
            self.error = from_errno(bio.error, f"{VERB[self.op]} {bio.length} bytes at {bio.addr}")
            return None
        if self.done >= self.length:
            return None
        reached = self.offset + self.done
        if self.op == READ and reached >= device.size_bytes:
            return None
        self.stalls = 0 if self.done > before else self.stalls + 1
        if self.stalls > MOST_STALLS:
            self.error = DeviceError(f"{VERB[self.op]} at {reached}: the device moves nothing and gives no error")
            return None
        limits = device.limits
        unit = limits.read_align if self.op == READ else limits.write_align
        return self.bio(self._restart(max(unit, limits.memory_align)))

    def _restart(self, unit: int) -> int:
        """The last byte, not past what was moved, that is aligned on the device and in memory."""
        start = 0
        for segment in self.segments:
            if self.done < start + len(segment):
                return start + align_down(self.done - start, unit)
            start += len(segment)
        return start
