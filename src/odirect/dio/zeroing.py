"""Zeroes for what a write leaves of a new block, and for what a failed write leaves (G10, G15).

The zeroes come from one page-aligned buffer that everybody shares and nobody writes to.
"""

from __future__ import annotations

import functools

from odirect.base.units import align_down, align_up
from odirect.block.buffers import empty

#: The shared buffer's size: no segment of zeroes is longer.
ZERO_BYTES = 64 << 10


@functools.cache
def _zeroes() -> memoryview:
    return empty(ZERO_BYTES).toreadonly()


def zero_segments(length: int) -> list[memoryview]:
    """Segments of zeroes, `length` bytes together."""
    whole, rest = divmod(length, ZERO_BYTES)
    segments = [_zeroes()] * whole
    if rest:
        segments.append(_zeroes()[:rest])
    return segments


def before(offset: int, block_bytes: int) -> int:
    """Bytes of the block that holds byte `offset` that lie before it."""
    return offset - align_down(offset, block_bytes)


def after(end: int, block_bytes: int) -> int:
    """Bytes of the block that holds byte `end - 1` that lie behind it."""
    return align_up(end, block_bytes) - end
