"""A device whose latencies, order of completion and faults are chosen."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from odirect.base.errors import ClosedError
from odirect.block.bio import FLUSH, READ, WRITE, Bio, Op
from odirect.block.buffers import slice_segments
from odirect.block.filters.base import child_of
from odirect.testing.devices import BitRotDevice

if TYPE_CHECKING:
    from odirect.block.device import BlockDevice, Limits
    from odirect.sched.clock import VirtualClock
    from odirect.testing.choices import Chooser


@dataclasses.dataclass(frozen=True, slots=True)
class SimFaults:
    """How often what goes wrong: probabilities from 0 to 1, by bio.

    A failed write moved nothing, everything, or (by choice) whole blocks from its start. A short
    transfer ends at a multiple of the alignment. A faulty bio never harms the store's other bytes.
    """

    read_error: float = 0.0
    write_error: float = 0.0
    flush_error: float = 0.0
    short: float = 0.0
    errno: int = errno.EIO


class World(Protocol):
    """What a SimDevice needs of its simulation."""

    chooser: Chooser
    clock: VirtualClock

    @property
    def note(self) -> Callable[..., None]:
        """Adds an entry to the trace."""
        ...


class _Flight:
    """A bio on its way. `due_ns` is when it is back; `early`: its data moved when it was committed."""

    __slots__ = ("bio", "due_ns", "early", "number")

    def __init__(self, bio: Bio, number: int, due_ns: int, early: bool) -> None:
        self.bio = bio
        self.number = number
        self.due_ns = due_ns
        self.early = early


class SimDevice:
    """A BlockDevice of a `Simulation`. `store` holds the bytes, untouched by the faults laid over them.

    In a simulation time moves by itself; elsewhere `poll(-1)` moves the clock to the next
    completion. Bios that are in flight together are carried out in any order.
    """

    #: Latencies that are chosen from, from a cache hit to a disk that was asleep.
    LATENCIES_NS = (1_000, 10_000, 20_000, 80_000, 100_000, 500_000, 8_000_000)

    def __init__(
        self,
        world: World,
        size_bytes: int,
        *,
        name: str,
        limits: Limits | None = None,
        store: BlockDevice | None = None,
        faults: SimFaults | None = None,
        latencies_ns: Sequence[int] | None = None,
        any_order: bool = False,
    ) -> None:
        self.name = name
        if store is None:
            store = BitRotDevice(size_bytes, limits=limits)
        self.store = store
        self.faults = faults or SimFaults()
        self._world = world
        self._latencies_ns = tuple(latencies_ns or self.LATENCIES_NS)
        self._any_order = any_order
        self._queued: list[Bio] = []
        self._flights: list[_Flight] = []
        self._finished: list[Bio] = []
        self._submitted = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<SimDevice {self.name}>"

    @property
    def size_bytes(self) -> int:
        """The store's."""
        return self.store.size_bytes

    @property
    def limits(self) -> Limits:
        """The store's."""
        return self.store.limits

    @property
    def in_flight(self) -> int:
        """Bios submitted that `poll` has not yet returned."""
        return len(self._queued) + len(self._flights) + len(self._finished)

    @property
    def flying(self) -> int:
        """Bios that were committed and are not finished: the choices of `finish_next`."""
        return len(self._flights)

    @property
    def next_due_ns(self) -> int | None:
        """When the next bio is finished; None if none is in flight."""
        if self._finished:
            return self._world.clock.now_ns()
        return min((flight.due_ns for flight in self._flights), default=None)

    def submit(self, bio: Bio) -> None:
        """Queue `bio`. Raises ClosedError after `close`."""
        if self._closed:
            raise ClosedError(f"{self.name} is closed")
        bio.error = bio.done_bytes = 0
        self._queued.append(bio)

    def commit(self) -> None:
        """Send everything queued on its way, each with a latency of its own."""
        queued, self._queued = self._queued, []
        for bio in queued:
            latency_ns = 0
            early = False
            if not self._any_order:
                choices = self._latencies_ns
                latency_ns = choices[self._world.chooser.choose(len(choices))]
                early = self._world.chooser.chance(0.5)
            flight = _Flight(bio, self._submitted, self._world.clock.now_ns() + latency_ns, early)
            self._submitted += 1
            self._note("submit", flight)
            self._flights.append(flight)
            if early:
                self._carry_out(flight)

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """What is finished by now, in a chosen order; a wait moves the clock instead."""
        if timeout_ns and not self._finished and self._flights:
            self._wait(timeout_ns)
        if not self._any_order:
            now_ns = self._world.clock.now_ns()
            due = [flight for flight in self._flights if flight.due_ns <= now_ns]
            while due:
                self._end(due.pop(self._world.chooser.choose(len(due))))
        finished, self._finished = self._finished, []
        return finished

    def finish_next(self, choice: int) -> None:
        """Let the `choice`-th of the bios in flight be finished now."""
        self._end(self._flights[choice])

    def wakeup_fd(self) -> int | None:
        """None: virtual time wakes nobody."""
        return None

    def close(self) -> None:
        """Finish what is in flight (a later `poll` returns it), and close the store."""
        if self._closed:
            return
        self.commit()
        self._closed = True
        while self._flights:
            self._end(self._flights[self._world.chooser.choose(len(self._flights))])
        self.store.close()

    def _wait(self, timeout_ns: int) -> None:
        clock = self._world.clock
        if self._any_order:
            self.finish_next(self._world.chooser.choose(len(self._flights)))
            return
        due_ns = max(clock.now_ns(), min(flight.due_ns for flight in self._flights))
        if timeout_ns > 0:
            due_ns = min(due_ns, clock.now_ns() + timeout_ns)
        clock.move_to(due_ns)

    def _end(self, flight: _Flight) -> None:
        self._flights.remove(flight)
        if not flight.early:
            self._carry_out(flight)
        self._note("finish", flight, flight.bio.error, flight.bio.done_bytes)
        self._finished.append(flight.bio)

    def _carry_out(self, flight: _Flight) -> None:
        bio, chooser, faults = flight.bio, self._world.chooser, self.faults
        rate = faults.read_error if bio.op == READ else faults.flush_error if bio.op == FLUSH else faults.write_error
        if chooser.chance(rate):
            moved = self._prefix(bio, chooser.choose(3)) if bio.op == WRITE else 0
            self._note("fault", flight, faults.errno, moved)
            if moved:
                self._do(bio, moved)
            bio.error, bio.done_bytes = faults.errno, 0
        elif bio.op in (READ, WRITE) and chooser.chance(faults.short):
            moved = self._prefix(bio, 2)
            self._note("short", flight, moved)
            bio.error, bio.done_bytes = self._do(bio, moved) if moved else (0, 0)
        else:
            bio.error, bio.done_bytes = self._do(bio, bio.length)

    def _prefix(self, bio: Bio, how: int) -> int:
        """How many bytes of `bio` move: for 0 none, for 1 all, for 2 some, in whole blocks."""
        if how == 2:
            unit = self.limits.read_align if bio.op == READ else self.limits.write_align
            blocks = bio.length // unit
            return unit * (1 + self._world.chooser.choose(blocks - 1)) if blocks > 1 else 0
        return bio.length if how else 0

    def _do(self, bio: Bio, length: int) -> tuple[int, int]:
        """(errno, bytes) of carrying out the first `length` bytes of `bio` on the store."""
        whole = length == bio.length
        segments = bio.segments if whole else slice_segments(bio.segments, 0, length)
        child = child_of(bio.op, bio.addr, segments, length, bio.flags)
        self.store.submit(child)
        self.store.commit()
        back = False
        while not back:
            for finished in self.store.poll(-1):
                if finished is child:
                    back = True
                else:  # Somebody else sends to the store as well; it is theirs.
                    self._finished.append(finished)
        return child.error, child.done_bytes

    def _note(self, what: str, flight: _Flight, *details: object) -> None:
        bio = flight.bio
        self._world.note(what, self.name, flight.number, Op(bio.op).name, bio.addr, bio.length, bio.flags, *details)
