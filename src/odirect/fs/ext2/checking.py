"""What the parts of `check` share: reading blocks past any cache, sets of blocks and inodes, and the report.

The device is read, not the volume's cache, so that what is found is what is there. Reads are large and
many at once, and memory is bounded: bits for blocks, a few bytes for each inode, and one batch of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from odirect.base.errors import DeviceError, ODirectError
from odirect.base.units import align_down, align_up
from odirect.block.bio import READ
from odirect.block.filters.base import private_buffer
from odirect.dio.blockdev import transfer
from odirect.fs.base import Finding
from odirect.sched.traps import gather, this_scheduler

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.block.device import BlockDevice

    Blocks = NDArray[numpy.int64]

#: The memory of one batch of blocks.
BATCH_BYTES = 4 << 20
#: After this many findings no more are kept: the volume is not what it was, and the report must end.
_MOST_FINDINGS = 5000
_REPAIR = "e2fsck -f"
_CORRUPT = re.compile(r"(?P<structure>.*) at byte (?P<addr>\d+): found (?P<found>.*), expected (?P<expected>.*)", re.S)


class Report:
    """The findings so far. muted: nothing is added (a walk that only repeats what another has reported)."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.muted = False
        self._more = 0

    def add(self, structure: str, addr: int | None, found: object, expected: object) -> None:
        """Note that `found` is in `structure` instead of `expected`."""
        if self.muted:
            return
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(Finding(structure, addr, str(found), str(expected), _REPAIR))
        else:
            self._more += 1

    def add_error(self, structure: str, addr: int | None, error: ODirectError) -> None:
        """Note what a reader of the volume refused with."""
        matched = _CORRUPT.fullmatch(error.message)
        if matched is None:
            self.add(structure, addr, error.message, "a structure that can be read")
        else:
            self.add(matched["structure"], int(matched["addr"]), matched["found"], matched["expected"])

    def finish(self) -> list[Finding]:
        """All findings; the last one counts those that were too many."""
        if self._more:
            self.findings.append(Finding("the volume", None, f"{self._more} more errors", "none", _REPAIR))
            self._more = 0
        return self.findings


class Reader:
    """Blocks of the volume, straight from its device."""

    def __init__(self, device: BlockDevice, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._device = device
        self._unit = max(device.limits.read_align, 1)
        self._memory_align = device.limits.memory_align

    async def run(self, block: int, count: int) -> memoryview:
        """The bytes of `count` adjacent blocks. Raises DeviceError."""
        return await self.bytes_at(block * self.block_bytes, count * self.block_bytes)

    async def bytes_at(self, addr: int, length: int) -> memoryview:
        """`length` bytes from byte `addr` on. Raises DeviceError, also where the device ends before."""
        start = align_down(addr, self._unit)
        end = align_up(addr + length, self._unit)
        memory = private_buffer(end - start, self._memory_align)
        moved = await transfer(self._device, READ, start, [memory], end - start)
        if moved < addr + length - start:
            raise DeviceError(f"reading {length} bytes at {addr}: the device gave {max(0, moved - addr + start)}")
        return memory[addr - start : addr - start + length]

    async def blocks(self, numbers: Sequence[int]) -> dict[int, memoryview]:
        """The bytes of each of `numbers`, adjacent ones read at once, all in flight together.

        The caller asks for no more than fits `BATCH_BYTES` a few times.
        """
        scheduler = await this_scheduler()
        runs: list[tuple[int, int]] = []
        for block in sorted(set(numbers)):
            if runs and runs[-1][0] + runs[-1][1] == block:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        found: dict[int, memoryview] = {}
        # No more tasks at once than a device has a use for.
        for at in range(0, len(runs), 128):
            part = runs[at : at + 128]
            read = await gather(*[scheduler.spawn(self.run(block, count)) for block, count in part])
            size = self.block_bytes
            for (block, count), data in zip(part, read, strict=True):
                for index in range(count):
                    found[block + index] = data[index * size : (index + 1) * size]
        return found


class Bits:
    """A set of numbers below `length`, one bit each."""

    def __init__(self, length: int) -> None:
        import numpy

        self.length = length
        self.raw = numpy.zeros(length // 8 + 1, numpy.uint8)

    def add_range(self, start: int, stop: int) -> None:
        """Add all numbers from `start` to `stop` - 1."""
        first, last = -(-start // 8), stop // 8
        if first < last:
            self.raw[first:last] = 0xFF
        edges = range(start, stop) if first > last else (*range(start, min(first * 8, stop)), *range(last * 8, stop))
        for number in edges:
            self.raw[number >> 3] |= 1 << (number & 7)

    def has(self, numbers: Blocks) -> NDArray[numpy.bool_]:
        """Of each of `numbers` whether it is in the set."""
        import numpy

        found: NDArray[numpy.bool_] = (self.raw[numbers >> 3] >> (numbers & 7).astype(numpy.uint8) & 1) != 0
        return found

    def add(self, numbers: Blocks) -> Blocks:
        """Add `numbers`; gives those that were there already, or are twice among them."""
        import numpy

        if not len(numbers):
            return numbers
        ordered = numpy.sort(numbers)
        again = numpy.zeros(len(ordered), numpy.bool_)
        again[1:] = ordered[1:] == ordered[:-1]
        again |= self.has(ordered)
        # The bits of one byte are put together first: an assignment by index keeps only the last of several.
        places = ordered >> 3
        starts = numpy.concatenate(([0], numpy.flatnonzero(places[1:] != places[:-1]) + 1))
        masks = (1 << (ordered & 7)).astype(numpy.uint8)
        self.raw[places[starts]] |= numpy.bitwise_or.reduceat(masks, starts)
        found: Blocks = ordered[again]
        return found

    def add_one(self, number: int) -> bool:
        """Add `number`; whether it was there already."""
        mask = 1 << (number & 7)
        before = bool(self.raw[number >> 3] & mask)
        self.raw[number >> 3] |= mask
        return before

    def has_one(self, number: int) -> bool:
        """Whether `number` is in the set."""
        return bool(self.raw[number >> 3] >> (number & 7) & 1)

    def part(self, start: int, length: int) -> NDArray[numpy.uint8]:
        """`length` numbers from `start` on, a 0 or 1 each."""
        import numpy

        first = start >> 3
        bits = numpy.unpackbits(self.raw[first : (start + length + 7) // 8], bitorder="little")
        return bits[start - first * 8 : start - first * 8 + length]


def ranges(numbers: Sequence[int]) -> str:
    """ "3-5, 9" for [3, 4, 5, 9]; at most a few, then how many more."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] + 1 == number:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs[:8])
    return shown if len(runs) <= 8 else f"{shown} and {len(runs) - 8} more"
