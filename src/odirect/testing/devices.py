"""Devices that are odd or broken, in memory, for tests."""

from __future__ import annotations

import dataclasses
import errno
import itertools
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from odirect.base.units import align_down
from odirect.block.bio import READ, WRITE, Bio
from odirect.block.device import Limits
from odirect.block.filters.volatile_cache import Dice, Unit, VolatileCache
from odirect.block.memory import MemoryDevice

if TYPE_CHECKING:
    from odirect.block.device import BlockDevice

_MEMORY_ALIGNS = (4, 512, 4096)
_OFFSET_ALIGNS = (512, 4096, 65536)


class OddDevice(MemoryDevice):
    """A device in memory whose alignments are not what one is used to (F51)."""

    def __init__(self, size_bytes: int, *, memory_align: int, read_align: int, write_align: int | None = None) -> None:
        write = read_align if write_align is None else write_align
        limits = Limits(
            logical_block=min(read_align, write),
            physical_block=max(read_align, write),
            read_align=read_align,
            write_align=write,
            memory_align=memory_align,
            fua=True,
            discard=True,
            volatile_cache=False,
            sources={"read_align": "fake", "write_align": "fake", "memory_align": "fake"},
        )
        super().__init__(size_bytes, limits=limits)

    def __repr__(self) -> str:
        limits = self.limits
        return f"<OddDevice memory {limits.memory_align} read {limits.read_align} write {limits.write_align}>"

    @classmethod
    def every(cls, size_bytes: int) -> Iterator[OddDevice]:
        """One device for every memory, read and write alignment of F51: 4, 512, 4096 by 512, 4096, 65536."""
        for memory, read, write in itertools.product(_MEMORY_ALIGNS, _OFFSET_ALIGNS, _OFFSET_ALIGNS):
            yield cls(size_bytes, memory_align=memory, read_align=read, write_align=write)


class BitRotDevice(MemoryDevice):
    """A device some of whose bytes read wrong, or not at all. `data` stays what was written.

    The faults lie over the data, by byte; writing there heals them unless they are `stuck`.
    """

    def __init__(
        self, size_bytes: int, *, limits: Limits | None = None, data: bytes | bytearray | memoryview | None = None
    ) -> None:
        super().__init__(size_bytes, limits=limits, data=data)
        self._flipped: dict[int, int] = {}
        self._unreadable: set[int] = set()
        self._stuck: set[int] = set()

    def rot(self, addr: int, mask: int = 1, *, stuck: bool = False) -> None:
        """Flip the bits `mask` of the byte at `addr` whenever it is read."""
        if not 0 <= addr < self.size_bytes or not 0 < mask < 256:
            raise ValueError(f"no bits {mask:#x} at {addr}")
        self._flipped[addr] = self._flipped.get(addr, 0) ^ mask
        if stuck:
            self._stuck.add(addr)

    def lose(self, addr: int, length: int, *, stuck: bool = False) -> None:
        """Make reads that touch [addr, addr+length) fail with EIO, in whole logical blocks."""
        unit = self.limits.logical_block
        for sector in range(align_down(addr, unit), addr + length, unit):
            self._unreadable.add(sector)
            if stuck:
                self._stuck.add(sector)

    def heal(self) -> None:
        """Remove every fault; `data` was right all the time."""
        self._flipped.clear()
        self._unreadable.clear()
        self._stuck.clear()

    @property
    def faulty(self) -> list[int]:
        """The first bytes of what reads wrong or not at all, sorted."""
        return sorted({*self._flipped, *self._unreadable})

    def _read(self, bio: Bio) -> None:
        super()._read(bio)
        unit = self.limits.logical_block
        end = bio.addr + bio.done_bytes
        if any(sector < end and bio.addr < sector + unit for sector in self._unreadable):
            bio.error, bio.done_bytes = errno.EIO, 0
            return
        for addr, mask in self._flipped.items():
            if bio.addr <= addr < end:
                _flip(bio, addr - bio.addr, mask)

    def _write(self, bio: Bio) -> None:
        super()._write(bio)
        self._overwritten(bio)

    def _zero(self, bio: Bio) -> None:
        super()._zero(bio)
        self._overwritten(bio)

    def _overwritten(self, bio: Bio) -> None:
        healed = [addr for addr in self.faulty if bio.addr <= addr < bio.addr + bio.length and addr not in self._stuck]
        for addr in healed:
            self._flipped.pop(addr, None)
            self._unreadable.discard(addr)


class MisdirectedDevice(MemoryDevice):
    """A device that now and then reads or writes at the wrong place and says that all went well.

    `data` is what is on it; `intended` is what would be there had it done as it was told.
    """

    def __init__(
        self, size_bytes: int, *, limits: Limits | None = None, data: bytes | bytearray | memoryview | None = None
    ) -> None:
        super().__init__(size_bytes, limits=limits, data=data)
        self.intended = bytearray(self.data)
        self._astray: list[tuple[int, int, int]] = []
        self.happened: list[tuple[int, int, int]] = []

    def misdirect(self, op: int, addr: int, to: int) -> None:
        """Let the next READ or WRITE that begins at `addr` go to `to` instead, once.

        `happened` lists (op, addr, to) of those that did. What would go past the end stops there.
        """
        if op not in (READ, WRITE) or not 0 <= to < self.size_bytes:
            raise ValueError(f"operation {op} cannot be sent to {to}")
        self._astray.append((op, addr, to))

    def _read(self, bio: Bio) -> None:
        to = self._sent_astray(bio)
        if to is None:
            super()._read(bio)
            return
        wanted = max(0, min(bio.length, self.size_bytes - bio.addr))
        wrong = bytes(self.data[to : to + wanted]).ljust(wanted, b"\0")
        place = 0
        for segment in bio.segments:
            count = min(segment.nbytes, wanted - place)
            segment[:count] = wrong[place : place + count]
            place += count
        bio.done_bytes = wanted

    def _write(self, bio: Bio) -> None:
        to = self._sent_astray(bio)
        data = b"".join(bio.segments)
        self.intended[bio.addr : bio.addr + len(data)] = data
        if to is None:
            super()._write(bio)
            return
        room = min(len(data), self.size_bytes - to)
        self.data[to : to + room] = data[:room]
        bio.done_bytes = bio.length

    def _zero(self, bio: Bio) -> None:
        super()._zero(bio)
        self.intended[bio.addr : bio.addr + bio.length] = bytes(bio.length)

    def _sent_astray(self, bio: Bio) -> int | None:
        for entry in self._astray:
            op, addr, to = entry
            if op == bio.op and addr == bio.addr:
                self._astray.remove(entry)
                self.happened.append(entry)
                return to
        return None


class TornDevice(VolatileCache):
    """A volatile cache that loses power by itself: once it has been given its `cut_at`-th change, from 0.

    That bio and all that were handed over with it are in flight then; what of all the unflushed
    arrives is as in `power_cut`. Afterwards `was_cut` is true, and everything fails until `reopen`.
    A `cut_at` past the last change cuts nothing: `changes` says how many there were.
    """

    def __init__(
        self,
        lower: BlockDevice,
        *,
        cut_at: int,
        rng: Dice | None = None,
        keep: Collection[Unit] | None = None,
        in_flight: str = "error",
        fua: bool = True,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(lower, fua=fua, limits=limits)
        self.changes = 0
        self.was_cut = False
        self._cut_at = cut_at
        self._rng = rng
        self._keep = keep
        self._in_flight = in_flight
        self._due = False

    def submit(self, bio: Bio) -> None:
        """Queue `bio`, and count it if it changes or flushes something."""
        super().submit(bio)
        if bio.op != READ:
            self._due = self._due or self.changes == self._cut_at
            self.changes += 1

    def commit(self) -> None:
        """Hand over what is queued; lose power if the bio that is to see it was among it."""
        super().commit()
        if self._due:
            self._due = False
            self.was_cut = True
            self.power_cut(self._rng, keep=self._keep, in_flight=self._in_flight)


def atomic_limits(largest: int, *, smallest: int = 512, base: Limits | None = None) -> Limits:
    """Limits that promise whole writes of `smallest` to `largest` bytes (F43)."""
    return dataclasses.replace(
        base or Limits(fua=True, discard=True), atomic_min=smallest, atomic_max=largest, atomic_max_segments=0
    )


def _flip(bio: Bio, place: int, mask: int) -> None:
    for segment in bio.segments:
        if place < segment.nbytes:
            segment[place] ^= mask
            return
        place -= segment.nbytes
