"""A device with a write cache that a power cut empties.

What is written is remembered, sector by sector, and reaches the lower device only through a flush,
FUA, or `evict`. `power_cut` lets an arbitrary part of what was not flushed arrive and forgets the
rest, which is all that a disk promises: F40, F41, F43.
"""

from __future__ import annotations

import collections
import dataclasses
import errno as _errno
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from odirect.base.errors import from_errno
from odirect.base.units import is_power_of_two
from odirect.block.bio import ATOMIC, FLUSH, FUA, META, PREFLUSH, READ, WRITE, ZERO, Bio
from odirect.block.check import refusal
from odirect.block.filters.base import ActiveFilter, child_of, joined, private_buffer

if TYPE_CHECKING:
    from odirect.block.device import BlockDevice, Limits


class Dice(Protocol):
    """What is asked of the randomness that is passed in; `random.Random` has it."""

    def random(self) -> float:
        """A number from 0 up to but not 1."""
        ...

    def choice(self, seq: Sequence[float], /) -> float:
        """One of these."""
        ...


class Unit(NamedTuple):
    """What a power cut keeps or drops as one: a sector of one write, or the whole of an atomic one."""

    sequence: int
    addr: int
    length: int


class _Dirty:
    """A unit in the cache. `data` None: zeroes.

    lost: a failed flush forgot it (F41). landed: the lower device has it, or something newer.
    """

    __slots__ = ("atomic", "data", "landed", "lost", "unit")

    def __init__(self, unit: Unit, data: bytes | None, atomic: bool) -> None:
        self.unit = unit
        self.data = data
        self.atomic = atomic
        self.lost = False
        self.landed = False


class _Job:
    """Something to be brought to the lower device, one at a time so that order is kept there.

    `bio` is told at the end; `units` are the dirty units that are clean then; `children` are still
    to be sent, one after another, so that a power cut can come between any two. A job has to do
    with units numbered below `before` alone.
    """

    __slots__ = ("after", "before", "bio", "build", "children", "error", "units")

    def __init__(
        self, bio: Bio | None, before: int, build: Callable[[_Job], None], after: Callable[[_Job], None]
    ) -> None:
        self.bio = bio
        self.before = before
        self.build = build
        self.after = after
        self.children: collections.deque[Bio] = collections.deque()
        self.units: list[_Dirty] = []
        self.error = 0


class VolatileCache(ActiveFilter):
    """The lower device behind a volatile write cache; size and sectors are the lower one's.

    A write is acknowledged when it is in the cache. FLUSH (and PREFLUSH) brings everything that was
    committed before it to the lower device and flushes that; FUA brings that one bio. A flush
    moves one run at a time, so a power cut may come between any two.
    """

    def __init__(self, lower: BlockDevice, *, fua: bool = True, limits: Limits | None = None) -> None:
        """`limits`: others than the lower device's, to claim for example atomic writes, which the cache keeps."""
        super().__init__(lower)
        claimed = limits or lower.limits
        self._sector = max(claimed.logical_block, lower.limits.write_align)
        self._limits = dataclasses.replace(
            claimed,
            logical_block=self._sector,
            write_align=max(claimed.write_align, self._sector),
            volatile_cache=True,
            fua=fua,
            poll=False,
        )
        self._queued: list[Bio] = []
        self._dirty: list[_Dirty] = []
        self._latest: dict[int, _Dirty] = {}
        self._sequence = 0
        self._reads: dict[Bio, tuple[Bio, dict[int, _Dirty]]] = {}
        self._jobs: collections.deque[_Job] = collections.deque()
        self._child: Bio | None = None
        self._cut = False
        self._failures: collections.deque[tuple[int, bool]] = collections.deque()

    @property
    def limits(self) -> Limits:
        """The lower device's, with a volatile cache."""
        return self._limits

    def submit(self, bio: Bio) -> None:
        """Queue `bio`. Raises ClosedError after `close`."""
        self._check_open()
        bio.error = bio.done_bytes = 0
        self._queued.append(bio)

    def commit(self) -> None:
        """Take everything queued into the cache, and start what has to reach the lower device."""
        with self._lock:
            queued, self._queued = self._queued, []
            for bio in queued:
                self._take_in(bio)
            self._advance()
        self.lower.commit()

    def close(self) -> None:
        """Write everything back, as a device does that is shut down in order, then close the lower device."""
        if self._closed:
            return
        self.commit()
        if not self._cut:
            with self._lock:
                self._jobs.append(_Job(None, self._sequence, self._build_flush, self._end_flush))
                self._advance()
        super().close()

    def unflushed(self) -> list[Unit]:
        """What a power cut now may drop, in the order of writing."""
        return [dirty.unit for dirty in self._dirty if not dirty.landed and not dirty.lost]

    def fail_flush(self, errno: int = _errno.EIO, *, times: int = 1, lose: bool = True) -> None:
        """Fail the next `times` bios that flush (FLUSH, PREFLUSH) with `errno`.

        lose: what was to be flushed is forgotten as well: it reads back until the power cut, and a
        later flush "succeeds" without it, as with page caches that mark what failed clean (F41).
        """
        self._failures.extend([(errno, lose)] * times)

    def evict(self, rng: Dice | None = None, share: float = 0.5) -> int:
        """Start bringing some of the cache to the lower device, as caches do unasked; how many sectors, at least.

        rng chooses each sector with probability `share`; without rng everything goes. Nobody may
        rely on it: the lower device is not flushed, and a sector goes with all it is atomic with.
        """
        with self._lock:
            chosen = {at for at in sorted(self._latest) if rng is None or rng.random() < share}
            if chosen and not self._cut:
                job = _Job(None, self._sequence, lambda job: self._build_sectors(job, chosen), self._clean)
                self._jobs.append(job)
                self._advance()
        self.lower.commit()
        return len(chosen)

    def power_cut(
        self,
        rng: Dice | None = None,
        *,
        keep: Collection[Unit] | Callable[[Unit], bool] | None = None,
        in_flight: str = "error",
    ) -> list[Unit]:
        """Lose power now; returns the units that had been unflushed and arrived all the same.

        keep       which those are: a collection of units, or a function; without it `rng` chooses,
                   and without that nothing unflushed survives
        in_flight  "error": bios that are not finished come back with EIO; "lost": they never do

        Until `reopen` every bio fails with EIO. Acknowledged completions are still in `poll`.
        """
        if in_flight not in ("error", "lost"):
            raise ValueError(f"in_flight is {in_flight!r}, neither 'error' nor 'lost'")
        with self._lock:
            self._cut = True
            unfinished = [*self._queued, *(parent for parent, _ in self._reads.values())]
            unfinished += [job.bio for job in self._jobs if job.bio is not None]
            self._queued.clear()
            while self._jobs:
                job = self._jobs.popleft()
                job.children.clear()
                if self._child is not None:  # The device below has it: it lands before the rest is chosen.
                    self._jobs.appendleft(job)
                    break
        self._drain_children()
        with self._lock:
            self._jobs.clear()
            share = 0.0 if rng is None else rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))

            def survives(unit: Unit) -> bool:
                if keep is None:
                    return rng is not None and rng.random() < share
                return keep(unit) if callable(keep) else unit in keep

            arrived = [dirty for dirty in self._dirty if dirty.landed or (not dirty.lost and survives(dirty.unit))]
            self._dirty.clear()
            self._latest.clear()
            self._failures.clear()
        for dirty in arrived:
            if not dirty.landed:
                self._write_through(dirty)
        with self._lock:
            if in_flight == "error":
                for bio in unfinished:
                    bio.error = _errno.EIO
                    bio.done_bytes = 0
                    self._finish(bio)
        return [dirty.unit for dirty in arrived]

    def reopen(self) -> None:
        """Power is back: the device answers again, with an empty cache."""
        self._cut = False

    # Taking bios in.

    def _take_in(self, bio: Bio) -> None:
        bio.error = _errno.EIO if self._cut else refusal(bio, self.size_bytes, self._limits)
        if bio.error:
            self._finish(bio)
        elif bio.op == READ:
            self._read(bio)
        elif bio.op == FLUSH:
            self._jobs.append(_Job(bio, self._sequence, self._build_flush, self._end_flush))
        elif bio.flags & PREFLUSH:
            # The bio is taken in once the flush is done: it must not reach the disk before it.
            self._jobs.append(_Job(bio, self._sequence, self._build_flush, self._end_preflush))
        else:
            self._write(bio)

    def _read(self, bio: Bio) -> None:
        # What is in the cache now is laid over what the lower device answers. A later write to the
        # same bytes runs beside this read, and either answer is right.
        first = bio.addr - bio.addr % self._sector
        sectors = range(first, bio.addr + bio.length, self._sector)
        over = {at: self._latest[at] for at in sectors if at in self._latest}
        if len(over) == len(sectors):
            bio.done_bytes = bio.length
            self._lay_over(bio, over)
            self._finish(bio)
            return
        child = child_of(READ, bio.addr, bio.segments, bio.length, bio.flags)
        self._reads[child] = (bio, over)
        self.lower.submit(child)

    def _write(self, bio: Bio) -> None:
        try:
            data = joined(bio.segments) if bio.op == WRITE else None
        except (BufferError, TypeError, ValueError):
            bio.error = _errno.EFAULT
            self._finish(bio)
            return
        added: list[_Dirty] = []
        if bio.flags & ATOMIC:
            added.append(_Dirty(Unit(self._sequence, bio.addr, bio.length), data, True))
        else:
            for place in range(0, bio.length, self._sector):
                part = None if data is None else data[place : place + self._sector]
                added.append(_Dirty(Unit(self._sequence, bio.addr + place, self._sector), part, False))
        self._sequence += 1
        self._dirty.extend(added)
        for dirty in added:
            for at in range(dirty.unit.addr, dirty.unit.addr + dirty.unit.length, self._sector):
                self._latest[at] = dirty
        bio.done_bytes = bio.length
        if bio.flags & FUA:
            sectors = set(range(bio.addr, bio.addr + bio.length, self._sector))
            self._jobs.append(_Job(bio, self._sequence, lambda job: self._build_fua(job, sectors), self._end_flush))
        else:
            self._finish(bio)

    def _lay_over(self, bio: Bio, over: dict[int, _Dirty]) -> None:
        """Put these sectors into what `bio` has read."""
        place = bio.addr
        try:
            for segment in bio.segments:
                if not segment.nbytes:
                    continue
                flat = segment.cast("B")
                stop = place + flat.nbytes
                for at, dirty in over.items():
                    start, end = max(place, at), min(stop, at + self._sector)
                    if start < end:
                        flat[start - place : end - place] = _part(dirty, start, end)
                place = stop
        except (BufferError, TypeError, ValueError):
            bio.error = _errno.EFAULT
            bio.done_bytes = 0

    # Bringing the cache to the lower device.

    def _advance(self) -> None:
        while self._child is None and self._jobs:
            job = self._jobs[0]
            if job.build is not _built:
                build, job.build = job.build, _built
                build(job)
            if job.children and not job.error:
                self._child = job.children.popleft()
                self.lower.submit(self._child)
                self.lower.commit()
                return
            self._jobs.popleft()
            job.after(job)

    def _build_flush(self, job: _Job) -> None:
        if self._failures:
            job.error, lose = self._failures.popleft()
            for dirty in self._dirty if lose else ():
                # What was written after this flush is not its to lose.
                dirty.lost = dirty.lost or dirty.unit.sequence < job.before
            return
        self._build_sectors(job, {at for at, dirty in self._latest.items() if not dirty.lost})
        meta = job.bio.flags & META if job.bio is not None else 0
        job.children.append(child_of(FLUSH, 0, (), 0, meta))

    def _build_fua(self, job: _Job, sectors: set[int]) -> None:
        self._build_sectors(job, sectors)
        if self.lower.limits.volatile_cache:
            # A flush afterwards instead of FUA serves lower devices with and without it.
            job.children.append(child_of(FLUSH, 0, (), 0))

    def _build_sectors(self, job: _Job, sectors: set[int]) -> None:
        """Children that write these sectors as they are now; what they overwrite becomes clean with them."""
        runs: list[list[int]] = []
        whole = self._whole_atomics(sectors & self._latest.keys())
        for at in sorted(whole):
            if runs and runs[-1][-1] + self._sector == at and self._may_join(runs[-1], at):
                runs[-1].append(at)
            else:
                runs.append([at])
        job.children.extend(self._child_for(run) for run in runs)
        # Older versions of a sector go with its latest one, which is what is written.
        job.units = [dirty for dirty in self._dirty if not dirty.lost and dirty.unit.addr in whole]

    def _may_join(self, run: list[int], at: int) -> bool:
        """Whether sector `at` may go in one bio with `run`: atomic groups stay whole and alone."""
        before, group = self._group_of(run[-1]), self._group_of(at)
        if before is not None or group is not None:
            return before == group
        if (self._latest[at].data is None) != (self._latest[run[-1]].data is None):
            return False
        return (len(run) + 1) * self._sector <= self.lower.limits.max_bio_bytes

    def _group_of(self, at: int) -> int | None:
        """The first byte of the largest atomic unit in the cache that covers sector `at`, None if none does.

        Atomic writes are naturally aligned powers of two, so that any two are apart or nested.
        """
        around = [dirty.unit for dirty in self._dirty if dirty.atomic and not dirty.lost and _covers(dirty.unit, at)]
        return max(around, key=lambda unit: unit.length).addr if around else None

    def _whole_atomics(self, sectors: set[int]) -> set[int]:
        """`sectors` and all that must not be parted from them."""
        whole = set(sectors)
        atomics = [dirty.unit for dirty in self._dirty if dirty.atomic and not dirty.lost]
        for unit in sorted(atomics, key=lambda unit: unit.length):
            inside = range(unit.addr, unit.addr + unit.length, self._sector)
            if any(at in whole for at in inside):
                whole.update(inside)
        return whole

    def _child_for(self, run: list[int]) -> Bio:
        start, length = run[0], len(run) * self._sector
        if all(self._latest[at].data is None for at in run):
            return child_of(ZERO, start, (), length)
        buffer = private_buffer(length, self.lower.limits.memory_align)
        for at in run:
            buffer[at - start : at - start + self._sector] = _part(self._latest[at], at, at + self._sector)
        flags = self._atomic_flag(start, length) if self._group_of(start) is not None else 0
        return child_of(WRITE, start, (buffer,), length, flags)

    def _atomic_flag(self, addr: int, length: int) -> int:
        """ATOMIC if the lower device promises this write to be whole as well, else 0: one bio is all we can do."""
        limits = self.lower.limits
        promised = limits.atomic_min <= length <= limits.atomic_max
        return ATOMIC if promised and is_power_of_two(length) and addr % length == 0 else 0

    def _clean(self, job: _Job) -> None:
        """Forget what the lower device has; what was written meanwhile stays."""
        if job.error:
            return
        done = set(map(id, job.units))
        self._dirty = [dirty for dirty in self._dirty if id(dirty) not in done]
        for at in [at for at, dirty in self._latest.items() if id(dirty) in done]:
            del self._latest[at]

    def _end_flush(self, job: _Job) -> None:
        self._clean(job)
        if job.bio is not None:
            job.bio.error = job.error
            if job.error:
                job.bio.done_bytes = 0
            self._finish(job.bio)

    def _end_preflush(self, job: _Job) -> None:
        self._clean(job)
        if job.bio is None:
            return
        if job.error:
            job.bio.error = job.error
            self._finish(job.bio)
        else:
            self._write(job.bio)

    def _returned(self, bio: Bio) -> None:
        if bio is self._child:
            self._child = None
            if not self._jobs:
                return
            if bio.error:
                self._jobs[0].error = bio.error
            elif bio.op != FLUSH:
                for dirty in self._jobs[0].units:
                    dirty.landed = dirty.landed or bio.addr <= dirty.unit.addr < bio.addr + bio.length
            return
        read = self._reads.pop(bio, None)
        if read is None:
            self._finish(bio)
        elif not self._cut:
            parent, over = read
            parent.error, parent.done_bytes = bio.error, bio.done_bytes
            if not bio.error:
                self._lay_over(parent, over)
            self._finish(parent)

    def _kept(self) -> int:
        return len(self._queued) + len(self._jobs)

    # Losing power.

    def _drain_children(self) -> None:
        """Wait for our own bios on the lower device: it owns their memory."""
        while self._reads or self._child is not None:
            back = self.lower.poll(-1)
            with self._lock:
                for bio in back:
                    self._returned(bio)

    def _write_through(self, dirty: _Dirty) -> None:
        unit = dirty.unit
        buffer = private_buffer(unit.length, self.lower.limits.memory_align)
        buffer[:] = _part(dirty, unit.addr, unit.addr + unit.length)
        flags = self._atomic_flag(unit.addr, unit.length) if dirty.atomic else 0
        child = self._child = child_of(WRITE, unit.addr, (buffer,), unit.length, flags)
        self.lower.submit(child)
        self.lower.commit()
        self._drain_children()
        if child.error:
            raise from_errno(child.error, f"writing back {unit.length} bytes at {unit.addr} at a power cut")


def _built(job: _Job) -> None:
    """The mark of a job that has been built."""


def _covers(unit: Unit, at: int) -> bool:
    return unit.addr <= at < unit.addr + unit.length


def _part(dirty: _Dirty, start: int, end: int) -> bytes:
    """The unit's bytes for device bytes [start, end)."""
    if dirty.data is None:
        return bytes(end - start)
    return dirty.data[start - dirty.unit.addr : end - dirty.unit.addr]
