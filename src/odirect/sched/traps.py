"""The only functions of the data path that suspend; all others await one of these.

A coroutine suspends by yielding a `Waitable` to whoever runs it (the scheduler), which adds the
task to it and goes on with another. The waitable gives a value or an error to the task when it
fires. Which functions suspend can thus be read from one short file.
"""

from __future__ import annotations

import types
from collections.abc import Generator
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from odirect.sched.scheduler import Scheduler, Task

T = TypeVar("T")


class Waitable(Protocol):
    """Something that a task can wait for."""

    def add_waiter(self, task: Task[object]) -> None:
        """Remember `task`, or make it ready at once if there is nothing to wait for."""
        ...

    def discard_waiter(self, task: Task[object]) -> None:
        """Forget `task`, which is being cancelled; harmless if it is not waiting here."""
        ...


@types.coroutine
def wait(waitable: Waitable) -> Generator[Waitable, object, object]:
    """What `waitable` fires with; raises what it fails with."""
    return (yield waitable)


class Event:
    """A value that will be there once. Fires all its waiters; later ones do not wait."""

    __slots__ = ("_error", "_value", "_waiters", "fired")

    def __init__(self) -> None:
        self.fired = False
        self._value: object = None
        self._error: BaseException | None = None
        self._waiters: list[Task[object]] = []

    @property
    def value(self) -> object:
        """What it fired with; raises what it failed with."""
        if self._error is not None:
            raise self._error
        return self._value

    def fire(self, value: object = None) -> None:
        """Give `value` to everybody who waits now or later. Firing again changes nothing."""
        if not self.fired:
            self.fired = True
            self._value = value
            waiters, self._waiters = self._waiters, []
            for task in waiters:
                task.make_ready(value)

    def fail(self, error: BaseException) -> None:
        """Raise `error` in everybody who waits now or later."""
        if not self.fired:
            self.fired = True
            self._error = error
            waiters, self._waiters = self._waiters, []
            for task in waiters:
                task.make_ready(None, error)

    def add_waiter(self, task: Task[object]) -> None:
        """See `Waitable`."""
        if self.fired:
            task.make_ready(self._value, self._error)
        else:
            self._waiters.append(task)

    def discard_waiter(self, task: Task[object]) -> None:
        """See `Waitable`."""
        if task in self._waiters:
            self._waiters.remove(task)


class _Turn:
    """Ready at once, after everybody who is ready already."""

    __slots__ = ()

    def add_waiter(self, task: Task[object]) -> None:
        task.make_ready(None)

    def discard_waiter(self, task: Task[object]) -> None:
        pass


class _Alarm:
    """Ready when the scheduler's clock has reached a time."""

    __slots__ = ("_task", "when_ns")

    def __init__(self, when_ns: int) -> None:
        self.when_ns = when_ns
        self._task: Task[object] | None = None

    @property
    def wanted(self) -> bool:
        return self._task is not None

    def add_waiter(self, task: Task[object]) -> None:
        self._task = task
        task.scheduler.add_alarm(self)

    def discard_waiter(self, task: Task[object]) -> None:
        self._task = None

    def ring(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.make_ready(None)


class _Clocked:
    """Turns a delay into an alarm on the clock of whichever scheduler runs the task."""

    __slots__ = ("_alarm", "_delay_ns")

    def __init__(self, delay_ns: int) -> None:
        self._delay_ns = delay_ns
        self._alarm: _Alarm | None = None

    def add_waiter(self, task: Task[object]) -> None:
        self._alarm = _Alarm(task.scheduler.clock.now_ns() + self._delay_ns)
        self._alarm.add_waiter(task)

    def discard_waiter(self, task: Task[object]) -> None:
        if self._alarm is not None:
            self._alarm.discard_waiter(task)


class _Here:
    """Ready at once, with the scheduler that runs the task."""

    __slots__ = ()

    def add_waiter(self, task: Task[object]) -> None:
        task.make_ready(task.scheduler)

    def discard_waiter(self, task: Task[object]) -> None:
        pass


_TURN = _Turn()
_HERE = _Here()


async def yield_now() -> None:
    """Let everybody who is ready run first."""
    await wait(_TURN)


async def this_scheduler() -> Scheduler:
    """The scheduler that runs the caller, to spawn helpers of a request on."""
    return cast("Scheduler", await wait(_HERE))


async def sleep_ns(delay_ns: int) -> None:
    """Wait for `delay_ns` nanoseconds of the scheduler's clock."""
    await wait(_Clocked(delay_ns))


async def shielded(event: Event) -> object:
    """What `event` fires with, waited for even by a task that is being cancelled.

    For waiting on I/O: the memory belongs to the device until then, so whoever lent it must not
    go on. The cancellation is raised once the event has fired (design: cancelling a caller cancels
    its wait, never an I/O in flight).
    """
    interrupted: BaseException | None = None
    while not event.fired:
        try:
            await wait(event)
        except GeneratorExit:
            # Thrown away: nobody will run it again, and the bio itself keeps the memory alive. An error that we
            # kept would keep this frame, and so whatever the collector has begun to throw away with us.
            interrupted = None
            raise
        except BaseException as error:
            if event.fired:
                raise
            interrupted = error
    if interrupted is not None:
        raise interrupted
    return event.value


async def gather(*awaitables: Task[T]) -> list[T]:
    """The results of all tasks, in order; the first error (in that order) after all have ended.

    If the caller is cancelled, every task is cancelled and waited for before the cancellation
    goes on, so that nothing outlives the call.
    """
    interrupted: BaseException | None = None
    for task in awaitables:
        while not task.done:
            try:
                await wait(task.ended)
            except GeneratorExit:
                interrupted = None
                raise  # Thrown away: nobody will run it again.
            except BaseException as error:
                if interrupted is None:
                    interrupted = error
                    for other in awaitables:
                        other.cancel()
    if interrupted is not None:
        raise interrupted
    return [task.result() for task in awaitables]


async def joined(task: Task[T]) -> T:
    """The result of `task`, or its error. Cancelling the caller does not cancel the task."""
    await wait(task.ended)
    return task.result()
