"""A tiny scheduler: tasks that are ready, devices that finish bios, alarms of a clock.

It has no thread, no event loop and no clock of its own. A driver calls `run_ready` and `commit`,
gets finished bios from the devices, and hands them to `dispatch`. `drive_sync`, `drive_asyncio` and
the simulator do so, each in its own way, over the same tasks.
"""

from __future__ import annotations

import collections
import heapq
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

from odirect.sched.clock import Clock, MonotonicClock
from odirect.sched.traps import Event, Waitable

T = TypeVar("T")


class Cancelled(BaseException):
    """Raised in a task at the place where it waits, when somebody cancels it."""


class Alarm(Protocol):
    """Something to be called at a time."""

    when_ns: int

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        ...

    def ring(self) -> None:
        """The time has come."""
        ...


class Completion(Protocol):
    """What a device finishes; `block.bio.Bio` is one."""

    end: Callable[[Any], None] | None


class Pollable(Protocol):
    """What the scheduler needs of a device."""

    def commit(self) -> None:
        """Hand over what is queued."""
        ...

    def poll(self, timeout_ns: int) -> Sequence[Completion]:
        """What has finished."""
        ...

    def wakeup_fd(self) -> int | None:
        """Readable when there is something to poll."""
        ...


class Task(Generic[T]):
    """A coroutine on a scheduler. `ended` fires when it has returned, failed or been cancelled."""

    __slots__ = (
        "_cancel_asked",
        "_coroutine",
        "_error",
        "_ready",
        "_result",
        "_send_error",
        "_send_value",
        "_waits_for",
        "done",
        "ended",
        "name",
        "scheduler",
    )

    def __init__(self, scheduler: Scheduler, coroutine: Coroutine[Waitable, object, T], name: str) -> None:
        self.scheduler = scheduler
        self.name = name
        self.ended = Event()
        self.done = False
        self._coroutine = coroutine
        self._result: T | None = None
        self._error: BaseException | None = None
        self._ready = False
        self._waits_for: Waitable | None = None
        self._send_value: object = None
        self._send_error: BaseException | None = None
        self._cancel_asked = False

    def __repr__(self) -> str:
        state = "done" if self.done else "ready" if self._ready else f"waiting for {self._waits_for!r}"
        return f"<Task {self.name} {state}>"

    def result(self) -> T:
        """What the coroutine returned; raises what it raised. RuntimeError while it runs."""
        if not self.done:
            raise RuntimeError(f"{self.name} has not ended")
        if self._error is not None:
            raise self._error
        return cast(T, self._result)

    @property
    def error(self) -> BaseException | None:
        """What it raised, if it has ended by raising."""
        return self._error

    def make_ready(self, value: object, error: BaseException | None = None) -> None:
        """Run it soon, giving it `value` or raising `error` where it waits. For waitables."""
        if self.done or self._ready:
            raise RuntimeError(f"{self.name} was woken twice")
        self._waits_for = None
        self._ready = True
        self._send_value = value
        self._send_error = error
        self.scheduler.ready.append(self)

    def cancel(self) -> None:
        """Raise Cancelled in it where it waits, now or when it waits next.

        What it was given already (a lock, a result) reaches it first: a task that is ready is not
        interrupted, so that nothing that was granted is lost.
        """
        if self.done:
            return
        if self._ready or self._waits_for is None:
            self._cancel_asked = True
            return
        self._waits_for.discard_waiter(cast("Task[object]", self))
        self.make_ready(None, Cancelled())

    def step(self) -> None:
        """Run it up to where it waits next. For the scheduler."""
        self._ready = False
        value, error = self._send_value, self._send_error
        self._send_value = self._send_error = None
        try:
            waitable = self._coroutine.send(value) if error is None else self._coroutine.throw(error)
        except StopIteration as stop:
            self._finish(stop.value, None)
            return
        except BaseException as raised:
            self._finish(None, raised)
            return
        self._waits_for = waitable
        if self._cancel_asked:
            self._cancel_asked = False
            self.make_ready(None, Cancelled())
        else:
            waitable.add_waiter(cast("Task[object]", self))

    def _finish(self, result: T | None, error: BaseException | None) -> None:
        self._result = result
        self._error = error
        self.done = True
        self.ended.fire()


class Scheduler:
    """Tasks, devices and alarms. One thread at a time may be inside."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = MonotonicClock() if clock is None else clock
        self.ready: collections.deque[Task[Any]] = collections.deque()
        self.devices: list[Pollable] = []
        self._alarms: list[tuple[int, int, Alarm]] = []
        self._numbers = itertools.count()

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str = "") -> Task[T]:
        """A new task, ready to run."""
        task = Task(self, coroutine, name or f"task-{next(self._numbers)}")
        task.make_ready(None)
        return task

    def add_device(self, device: Pollable) -> None:
        """Commit and poll `device` from now on."""
        if device not in self.devices:
            self.devices.append(device)

    def remove_device(self, device: Pollable) -> None:
        """Leave `device` alone from now on."""
        if device in self.devices:
            self.devices.remove(device)

    def add_alarm(self, alarm: Alarm) -> None:
        """Call `alarm.ring()` once the clock has reached `alarm.when_ns`."""
        heapq.heappush(self._alarms, (alarm.when_ns, next(self._numbers), alarm))

    def next_alarm_ns(self) -> int | None:
        """The time of the earliest alarm that somebody still waits for."""
        while self._alarms and not self._alarms[0][2].wanted:
            heapq.heappop(self._alarms)
        return self._alarms[0][0] if self._alarms else None

    def pick(self) -> Task[Any]:
        """The ready task that runs next; the simulator chooses otherwise."""
        return self.ready.popleft()

    def run_ready(self) -> bool:
        """Run tasks until none is ready, and ring the alarms whose time has come; whether any task ran."""
        ran = False
        while True:
            while self.ready:
                ran = True
                self.pick().step()
            if not self._ring_alarms():
                return ran

    def commit(self) -> None:
        """Hand over what the tasks have queued, one call a device (G13)."""
        for device in self.devices:
            device.commit()

    def dispatch(self, finished: Sequence[Completion]) -> None:
        """Tell everybody who waits for these bios."""
        for completion in finished:
            end = completion.end
            if end is not None:
                end(completion)

    def _ring_alarms(self) -> bool:
        if not self._alarms:
            return False
        now_ns = self.clock.now_ns()
        rang = False
        while self._alarms and self._alarms[0][0] <= now_ns:
            heapq.heappop(self._alarms)[2].ring()
            rang = True
        return rang
