"""Locks for tasks: mutex, reader/writer, and ranges. Fair, and released by plain functions.

    with await lock.hold(offset, length):
        ...

`hold` suspends; leaving the `with` does not, so that clean-up cannot be interrupted (design:
release and clean-up are plain functions). Waiting is in order of arrival: nobody overtakes
somebody whom he would have to wait for, so that no one starves.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from odirect.sched.traps import wait

if TYPE_CHECKING:
    from odirect.sched.scheduler import Task


class _Releasable(Protocol):
    def _release(self, held: Held) -> None: ...


class Held:
    """A lock, or a range of one, that is held. A context manager; `release` may be called once."""

    __slots__ = ("_lock", "_task", "end", "shared", "start")

    def __init__(self, lock: _Releasable, start: int, end: int, shared: bool) -> None:
        self._lock: _Releasable | None = lock
        self._task: Task[object] | None = None
        self.start = start
        self.end = end
        self.shared = shared

    def release(self) -> None:
        """Give it back. Raises RuntimeError the second time: a lock released twice hides a bug."""
        lock, self._lock = self._lock, None
        if lock is None:
            raise RuntimeError(f"range {self.start}..{self.end} is not held any more")
        lock._release(self)

    def conflicts(self, other: Held) -> bool:
        """Whether the two cannot be held at once."""
        overlap = max(self.start, other.start) < min(self.end, other.end)
        return overlap and not (self.shared and other.shared)

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Held {self.start}..{self.end} {'shared' if self.shared else 'exclusive'}>"


class _Request:
    """The waitable of one wait in a RangeLock's line."""

    __slots__ = ("held", "lock")

    def __init__(self, lock: RangeLock, held: Held) -> None:
        self.lock = lock
        self.held = held

    def add_waiter(self, task: Task[object]) -> None:
        self.held._task = task
        self.lock._line.append(self.held)

    def discard_waiter(self, task: Task[object]) -> None:
        self.held._task = None
        if self.held in self.lock._line:
            self.lock._line.remove(self.held)
            self.lock._grant()


class RangeLock:
    """Locks on byte ranges, shared or exclusive, granted in order of arrival.

    The cost of taking and giving back is linear in what is held and waited for, which is bounded
    by the requests in flight.
    """

    def __init__(self) -> None:
        self._held: list[Held] = []
        self._line: list[Held] = []

    async def hold(self, start: int, length: int, *, shared: bool = False) -> Held:
        """The range [start, start+length), held. A length of 0 conflicts with nothing."""
        held = self._wish(start, length, shared)
        if self._is_free(held, self._line):
            self._held.append(held)
            return held
        await wait(_Request(self, held))
        return held

    def try_hold(self, start: int, length: int, *, shared: bool = False) -> Held | None:
        """The range, held, or None if that would have to wait."""
        held = self._wish(start, length, shared)
        if not self._is_free(held, self._line):
            return None
        self._held.append(held)
        return held

    def is_locked(self, start: int, length: int) -> bool:
        """Whether anybody holds any of the range. For tests (F01)."""
        return any(held.conflicts(Held(self, start, start + length, False)) for held in self._held)

    @property
    def idle(self) -> bool:
        """Whether nothing is held and nobody waits."""
        return not self._held and not self._line

    def _wish(self, start: int, length: int, shared: bool) -> Held:
        if start < 0 or length < 0:
            raise ValueError(f"not a range: {start}+{length}")
        return Held(self, start, start + length, shared)

    def _is_free(self, held: Held, before: list[Held]) -> bool:
        return not any(held.conflicts(other) for other in self._held) and not any(
            held.conflicts(other) for other in before
        )

    def _release(self, held: Held) -> None:
        self._held.remove(held)
        self._grant()

    def _grant(self) -> None:
        """Give their range to all in the line who conflict with no holder and nobody before them."""
        still: list[Held] = []
        for held in self._line:
            if self._is_free(held, still):
                self._held.append(held)
                task, held._task = held._task, None
                if task is not None:
                    task.make_ready(None)
            else:
                still.append(held)
        self._line = still


class RWLock:
    """A lock held by many readers or one writer, granted in order of arrival."""

    def __init__(self) -> None:
        self._ranges = RangeLock()

    async def read(self) -> Held:
        """Held together with other readers."""
        return await self._ranges.hold(0, 1, shared=True)

    async def write(self) -> Held:
        """Held alone."""
        return await self._ranges.hold(0, 1)

    def try_read(self) -> Held | None:
        """Held together with other readers, or None if that would have to wait."""
        return self._ranges.try_hold(0, 1, shared=True)

    def try_write(self) -> Held | None:
        """Held alone, or None if that would have to wait."""
        return self._ranges.try_hold(0, 1)

    @property
    def idle(self) -> bool:
        """Whether nobody holds it or waits for it."""
        return self._ranges.idle


class Mutex:
    """A lock held by one, granted in order of arrival."""

    def __init__(self) -> None:
        self._ranges = RangeLock()

    async def hold(self) -> Held:
        """Held."""
        return await self._ranges.hold(0, 1)

    def try_hold(self) -> Held | None:
        """Held, or None if that would have to wait."""
        return self._ranges.try_hold(0, 1)

    @property
    def idle(self) -> bool:
        """Whether nobody holds it or waits for it."""
        ranges = self._ranges
        return not (ranges._held or ranges._line)


class Count:
    """A number of things in flight that one can wait to reach zero (G06)."""

    def __init__(self) -> None:
        self.value = 0
        self._waiters: list[Task[object]] = []

    def up(self) -> None:
        """One more."""
        self.value += 1

    def down(self) -> None:
        """One less; at zero everybody who waits goes on. RuntimeError below zero."""
        if self.value <= 0:
            raise RuntimeError("counted down below zero")
        self.value -= 1
        if not self.value:
            waiters, self._waiters = self._waiters, []
            for task in waiters:
                task.make_ready(None)

    async def zero(self) -> None:
        """Wait until it is zero."""
        while self.value:
            await wait(self)

    def add_waiter(self, task: Task[object]) -> None:
        """See `Waitable`."""
        if self.value:
            self._waiters.append(task)
        else:
            task.make_ready(None)

    def discard_waiter(self, task: Task[object]) -> None:
        """See `Waitable`."""
        if task in self._waiters:
            self._waiters.remove(task)
