"""A device that holds back what has finished until a clock says so."""

from __future__ import annotations

import heapq
import itertools
import select
from typing import TYPE_CHECKING

from odirect.block.filters.base import Filter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from odirect.block.bio import Bio
    from odirect.block.device import BlockDevice
    from odirect.sched.clock import Clock

_STEP_NS = 1_000_000


class Delay(Filter):
    """Returns a bio no earlier than `delay_ns(bio)` nanoseconds of `clock` after its submission.

    The data moves when the lower device moves it; the completion alone is late. Strangers' bios
    pass at once. `next_due_ns` says when there will be something, for whoever moves a virtual clock.
    """

    def __init__(self, lower: BlockDevice, clock: Clock, delay_ns: int | Callable[[Bio], int]) -> None:
        super().__init__(lower)
        self._clock = clock
        self._delay_ns = delay_ns
        self._due: dict[Bio, int] = {}
        self._held: list[tuple[int, int, Bio]] = []
        self._numbers = itertools.count()

    def submit(self, bio: Bio) -> None:
        """Queue `bio`; its delay starts now."""
        delay = self._delay_ns if isinstance(self._delay_ns, int) else self._delay_ns(bio)
        self.lower.submit(bio)
        self._due[bio] = self._clock.now_ns() + delay

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios whose time has come; may return none although some are held.

        While bios are held it waits a millisecond at most, whatever `timeout_ns` says: a virtual
        clock moves only once the caller has come back.
        """
        finished = self._look()
        if finished or timeout_ns == 0:
            return finished
        if not self._held:
            self._sort_in(self.lower.poll(timeout_ns), finished)
            return finished or self._look()
        wait_ns = min(_STEP_NS, self._held[0][0] - self._clock.now_ns())
        if timeout_ns > 0:
            wait_ns = min(wait_ns, timeout_ns)
        poller = select.poll()
        descriptor = self.lower.wakeup_fd()
        if descriptor is not None:
            poller.register(descriptor, select.POLLIN)
        poller.poll(-(-max(wait_ns, 0) // 1_000_000))
        return self._look()

    @property
    def in_flight(self) -> int:
        """What is held, and what is on the lower device."""
        return len(self._held) + self.lower.in_flight

    @property
    def next_due_ns(self) -> int | None:
        """When the next bio that the lower device has finished comes out; None if it has none."""
        return self._held[0][0] if self._held else None

    def wakeup_fd(self) -> int | None:
        """None: no descriptor becomes readable with the time of an injected clock."""
        return None

    def wakeup_fds(self) -> list[int] | None:
        """None, as `wakeup_fd`."""
        return None

    def close(self) -> None:
        """Close the lower device; what is held comes out of the next `poll` at once."""
        self.lower.close()
        self._held = [(0, number, bio) for _, number, bio in self._held]
        self._due.clear()

    def _look(self) -> list[Bio]:
        finished: list[Bio] = []
        self._sort_in(self.lower.poll(0), finished)
        now_ns = self._clock.now_ns()
        while self._held and self._held[0][0] <= now_ns:
            finished.append(heapq.heappop(self._held)[2])
        return finished

    def _sort_in(self, bios: Sequence[Bio], finished: list[Bio]) -> None:
        for bio in bios:
            due_ns = self._due.pop(bio, None)
            if due_ns is None:
                finished.append(bio)
            else:
                heapq.heappush(self._held, (due_ns, next(self._numbers), bio))
