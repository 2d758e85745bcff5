"""Where time comes from; core code never asks the machine itself."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A clock that only goes forward, in nanoseconds from some start of its own."""

    def now_ns(self) -> int:
        """The present time in nanoseconds."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC, in nanoseconds."""
        return time.monotonic_ns()


class VirtualClock:
    """A clock that stands still until it is told to move; the simulator's."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        """The time that it was last moved to, in nanoseconds."""
        return self._now_ns

    def move_to(self, now_ns: int) -> None:
        """Set the time to `now_ns`. Raises ValueError for a time that is past."""
        if now_ns < self._now_ns:
            raise ValueError(f"the clock is at {self._now_ns} ns and cannot go back to {now_ns} ns")
        self._now_ns = now_ns


def wall_ns() -> int:
    """CLOCK_REALTIME, in nanoseconds since 1970: what file systems stamp their inodes with."""
    return time.time_ns()
