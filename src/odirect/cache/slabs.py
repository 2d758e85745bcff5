"""Aligned memory in equal slots, cut from larger pieces, so that many small blocks can go direct."""

from __future__ import annotations

from odirect.base.units import align_up
from odirect.block.filters.base import private_buffer

_SLAB_BYTES = 256 << 10


class Slot:
    """One slot: `memory` is all of it, writable, at a multiple of the pool's alignment."""

    __slots__ = ("_slab", "memory")

    def __init__(self, memory: memoryview, slab: _Slab) -> None:
        self.memory = memory
        self._slab = slab


class _Slab:
    """One piece of memory, and which of its slots are free."""

    __slots__ = ("free", "slots")

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.free: list[Slot] = []


class Slabs:
    """A pool of slots of at least `slot_bytes`, grown as needed; pieces wholly free go back, but for one.

    `slot_bytes` is rounded up to a multiple of `memory_align`, so that every slot's address is one.
    """

    def __init__(self, slot_bytes: int, memory_align: int) -> None:
        self.slot_bytes = align_up(slot_bytes, memory_align)
        self._align = memory_align
        self._open: dict[_Slab, None] = {}  # those with a free slot

    def take(self) -> Slot:
        """A slot, with whatever was in it before. Raises MemoryError when there is none to be had."""
        slab = next(reversed(self._open), None) or self._grow()
        slot = slab.free.pop()
        if not slab.free:
            del self._open[slab]
        return slot

    def give(self, slot: Slot) -> None:
        """Take `slot` back. Nobody may look at it any more, nor may a device have it."""
        slab = slot._slab
        slab.free.append(slot)
        self._open.setdefault(slab)
        if len(slab.free) == slab.slots and len(self._open) > 1:
            del self._open[slab]

    def _grow(self) -> _Slab:
        slots = max(1, _SLAB_BYTES // self.slot_bytes)
        memory = private_buffer(slots * self.slot_bytes, self._align)
        slab = _Slab(slots)
        slab.free.extend(Slot(memory[at : at + self.slot_bytes], slab) for at in range(0, len(memory), self.slot_bytes))
        self._open[slab] = None
        return slab
