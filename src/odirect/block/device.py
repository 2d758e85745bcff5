"""What every block device is: drivers, memory, plain files and filters speak these verbs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from odirect.base.units import is_power_of_two
from odirect.block.bio import MAX_SEGMENTS, Bio


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a device takes and promises, each figure with its source.

    All sizes are in bytes. `read_align` and `write_align` are what the offset and the length of a
    direct transfer must be multiples of, `memory_align` what a buffer's address must be a multiple
    of; 1 means that anything goes. `logical_block` is the sector that the device addresses,
    `physical_block` the one that it writes without reading first. `atomic_max` 0 means that no
    write is promised to be whole after a power cut. `sources` maps a field's name to where its
    value is from ("statx", "BLKSSZGET", "probe", "default", ...).
    """

    logical_block: int = 512
    physical_block: int = 512
    read_align: int = 512
    write_align: int = 512
    memory_align: int = 512
    max_bio_bytes: int = 8 << 20
    max_segments: int = MAX_SEGMENTS
    queue_depth: int = 128
    fua: bool = False
    discard: bool = False
    volatile_cache: bool = True
    poll: bool = False
    atomic_min: int = 0
    atomic_max: int = 0
    atomic_max_segments: int = 0
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("logical_block", "physical_block", "read_align", "write_align", "memory_align"):
            if not is_power_of_two(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, not a power of two")
        if self.max_bio_bytes < max(self.read_align, self.write_align) or self.max_segments < 1:
            raise ValueError("a bio must be able to hold one block in one segment")


@runtime_checkable
class BlockDevice(Protocol):
    """Drivers and filters alike. See `docs/concurrency.md` for who may call what from where."""

    @property
    def size_bytes(self) -> int:
        """The device's end: reads stop there, writes beyond it are ENOSPC (B09)."""
        ...

    @property
    def limits(self) -> Limits:
        """What the device takes and promises."""
        ...

    def submit(self, bio: Bio) -> None:
        """Queue `bio`, which is submitted once. Never blocks, never calls back.

        What the device refuses comes back from `poll` as the bio's error. Memory that cannot be
        used (read-only for a READ, not contiguous, released) may raise ValueError, TypeError or
        BufferError here instead; nothing is queued then (B08).
        """
        ...

    def commit(self) -> None:
        """Hand over everything queued, in one call: the plug's end (G13)."""
        ...

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios, each returned once; 0 looks, -1 waits until there is one.

        It may return none although it waited: a signal, a wake-up that was for somebody else, or
        nothing in flight. Raises nothing for a failed bio: that is in `bio.error`.
        """
        ...

    @property
    def in_flight(self) -> int:
        """0 if nothing that was submitted is still to come from `poll`.

        Else how many are, with those of others that share what is below.
        """
        ...

    def wakeup_fd(self) -> int | None:
        """A descriptor that is readable when `poll(0)` would return bios, or None if there is none.

        `poll` resets it.
        """
        ...

    def close(self) -> None:
        """Wait for what is in flight, then let go of everything. Closing twice is harmless."""
        ...


class WithLimits:
    """A device under other limits: the same bios, cut and aligned another way.

    For a device that turned out to be choosier than it said (F50). Whoever polls, polls the device
    below: its bios pass unchanged.
    """

    def __init__(self, device: BlockDevice, limits: Limits) -> None:
        self._device = device
        self.limits = limits

    @property
    def size_bytes(self) -> int:
        """The device's."""
        return self._device.size_bytes

    @property
    def in_flight(self) -> int:
        """The device's."""
        return self._device.in_flight

    def submit(self, bio: Bio) -> None:
        """Pass it down."""
        self._device.submit(bio)

    def commit(self) -> None:
        """Pass it down."""
        self._device.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """The device's."""
        return self._device.poll(timeout_ns)

    def wakeup_fd(self) -> int | None:
        """The device's."""
        return self._device.wakeup_fd()

    def close(self) -> None:
        """Nothing: the device is not this view's to close."""
