"""The synchronous driver: one scheduler, served by the threads that wait for it."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from odirect.base.errors import AlignmentError
from odirect.block.buffers import empty
from odirect.block.memory import MemoryDevice
from odirect.dio.blockdev import transfer
from odirect.sched.drive_sync import Stalled, SyncDriver, wait_for_any
from odirect.sched.locks import Mutex
from odirect.sched.scheduler import Cancelled, Scheduler
from odirect.sched.traps import Event, gather, shielded, sleep_ns, wait

#: Longer than anything here takes; whoever waits that long has been forgotten.
PATIENCE = 20


class Io:
    """One thing that a Gate finishes when it is let through."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.event = Event()
        self.end: Callable[[Any], None] | None = lambda _: self.event.fire(name)


class Gate:
    """A device whose I/O ends when the test says so; `poll` waits for that."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.queued: list[Io] = []
        self.running: dict[str, Io] = {}
        self.finished: collections.deque[Io] = collections.deque()
        self.interrupts: collections.deque[BaseException] = collections.deque()
        self.pollers: list[str] = []
        self.inside = 0

    @property
    def in_flight(self) -> int:
        with self.condition:
            return len(self.queued) + len(self.running) + len(self.finished)

    def commit(self) -> None:
        with self.condition:
            self.running.update({io.name: io for io in self.queued})
            self.queued.clear()
            self.condition.notify_all()

    def poll(self, timeout_ns: int) -> list[Io]:
        with self.condition:
            assert not self.inside, "two threads poll one device"
            self.inside += 1
            self.pollers.append(threading.current_thread().name)
            self.condition.notify_all()
            try:
                if timeout_ns:
                    seconds = PATIENCE if timeout_ns < 0 else timeout_ns / 1e9
                    ready = self.condition.wait_for(lambda: self.finished or self.interrupts, seconds)
                    assert ready or timeout_ns > 0, f"nothing came; still running: {list(self.running)}"
                if self.interrupts:
                    raise self.interrupts.popleft()
                taken = list(self.finished)
                self.finished.clear()
                return taken
            finally:
                self.inside -= 1

    def wakeup_fd(self) -> int | None:
        return None

    async def io(self, name: str) -> object:
        io = Io(name)
        with self.condition:
            self.queued.append(io)
        return await shielded(io.event)

    # What the test does.

    def let(self, *names: str) -> None:
        """Finish these."""
        with self.condition:
            for name in names:
                self.finished.append(self.running.pop(name))
            self.condition.notify_all()

    def interrupt(self, error: BaseException) -> None:
        """Raise this in whoever polls."""
        with self.condition:
            self.interrupts.append(error)
            self.condition.notify_all()

    def wait_until(self, happened: Callable[[], object]) -> None:
        with self.condition:
            assert self.condition.wait_for(happened, PATIENCE), "it never came to that"


class Caller:
    """A thread that runs one coroutine."""

    def __init__(self, driver: SyncDriver, name: str, coroutine: Any) -> None:
        self.answer: object = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(driver, coroutine), name=name, daemon=True)
        self.thread.start()

    def _run(self, driver: SyncDriver, coroutine: Any) -> None:
        try:
            self.answer = driver.run(coroutine)
        except BaseException as error:
            self.error = error

    def join(self) -> object:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), f"{self.thread.name} has been forgotten"
        if self.error is not None:
            raise self.error
        return self.answer


class Pipe:
    """A device with a descriptor that becomes readable with what it has."""

    def __init__(self, *, in_flight: int | None = None) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.items: list[object] = []
        self.asked: list[int] = []
        if in_flight is not None:
            self.in_flight = in_flight

    def give(self, item: object) -> None:
        self.items.append(item)
        os.eventfd_write(self.fd, 1)

    def commit(self) -> None:
        """Nothing is queued here."""

    def poll(self, timeout_ns: int) -> list[Any]:
        self.asked.append(timeout_ns)
        taken, self.items = self.items, []
        return taken

    def wakeup_fd(self) -> int | None:
        return self.fd


@pytest.fixture
def pipes() -> Iterator[list[Pipe]]:
    made = [Pipe(in_flight=1) for _ in range(3)]
    yield made
    for pipe in made:
        os.close(pipe.fd)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def driver(gate: Gate) -> SyncDriver:
    scheduler = Scheduler()
    scheduler.add_device(gate)
    return SyncDriver(scheduler)


# --- one thread -----------------------------------------------------------------------------------


def test_runs_a_coroutine_over_a_device():
    device = MemoryDevice(8192, data=b"x" * 8192)
    scheduler = Scheduler()
    scheduler.add_device(device)
    driver = SyncDriver(scheduler)
    view = empty(1024)
    with pytest.raises(AlignmentError):
        driver.run(transfer(device, 0, 100, [view], 1024))
    assert driver.run(transfer(device, 0, 512, [view], 1024)) == 1024
    assert bytes(view) == b"x" * 1024
    device.close()


def test_raises_what_the_coroutine_raises(driver):
    async def fails() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        driver.run(fails())


def test_sleeps_without_a_device():
    assert SyncDriver(Scheduler()).run(sleep_ns(1000)) is None


def test_stalled_instead_of_hanging(driver):
    """F01: whoever waits for a lock that was left held is told so, and his other locks are given back."""
    held, other = Mutex(), Mutex()
    assert held.try_hold() is not None

    async def work() -> None:
        with await other.hold(), await held.hold():
            pass

    with pytest.raises(Stalled):
        driver.run(work())
    assert other.idle


def test_an_interrupt_waits_for_what_is_in_flight(driver, gate):
    """F24: Ctrl-C in `poll` cancels the task, and leaves when the device has given the memory back."""
    seen = []

    async def work() -> None:
        try:
            await gate.io("slow")
        except Cancelled:
            seen.append(dict(gate.running))
            raise

    gate.interrupt(KeyboardInterrupt())
    caller = Caller(driver, "main", work())
    gate.wait_until(lambda: len(gate.pollers) == 2)
    assert caller.thread.is_alive() and seen == []
    gate.let("slow")
    with pytest.raises(KeyboardInterrupt):
        caller.join()
    assert seen == [{}]


def test_a_second_interrupt_leaves_at_once(driver, gate):
    """The task is left behind; it ends when the driver is used next."""
    ended = []

    async def work() -> None:
        try:
            await gate.io("slow")
        finally:
            ended.append(True)

    gate.interrupt(KeyboardInterrupt("first"))
    gate.interrupt(KeyboardInterrupt("second"))
    caller = Caller(driver, "main", work())
    with pytest.raises(KeyboardInterrupt, match="second"):
        caller.join()
    assert ended == [] and list(gate.running) == ["slow"]
    gate.let("slow")
    next_one = Caller(driver, "next", gate.io("next"))
    gate.wait_until(lambda: "next" in gate.running)
    gate.let("next")
    assert next_one.join() == "next"
    assert ended == [True]


def test_an_interrupt_between_two_devices_loses_nothing(pipes):
    """What the first device has given is told although the second one's poll is interrupted."""
    first, second, scheduler = pipes[0], pipes[1], Scheduler()
    for pipe in (first, second):
        scheduler.add_device(pipe)
    one, two = Io("one"), Io("two")
    first.items = [one]

    def interrupted(timeout_ns: int) -> list[Any]:
        del second.poll
        first.in_flight = 0
        second.items = [two]
        raise KeyboardInterrupt

    second.poll = interrupted  # type: ignore[method-assign]

    async def both() -> None:
        await gather(*[scheduler.spawn(shielded(io.event)) for io in (one, two)])

    with pytest.raises(KeyboardInterrupt):
        SyncDriver(scheduler).run(both())
    assert one.event.fired and two.event.fired


# --- several threads ------------------------------------------------------------------------------


def test_waiting_is_not_serialised(driver, gate):
    """Two threads' I/O is in flight at once; entry is serialised, waiting is not."""
    callers = [Caller(driver, name, gate.io(name)) for name in ("a", "b")]
    gate.wait_until(lambda: len(gate.running) == 2)
    gate.let("a", "b")
    assert [caller.join() for caller in callers] == ["a", "b"]


def test_many_threads_finish_in_any_order(driver, gate):
    """Each gets his own answer; one at a time polls, and there is always one."""
    names = [f"t{number}" for number in range(8)]
    callers = {name: Caller(driver, name, gate.io(name)) for name in names}
    gate.wait_until(lambda: len(gate.running) == 8)
    for name in (names[place] for place in (3, 0, 7, 5, 1, 6, 2, 4)):
        gate.let(name)
        assert callers[name].join() == name
    assert not gate.in_flight


def test_the_pump_is_handed_over(driver, gate):
    """Who polled has his answer and goes; the other takes the duty over, and is not forgotten."""
    first = Caller(driver, "first", gate.io("a"))
    gate.wait_until(lambda: gate.inside)
    second = Caller(driver, "second", gate.io("b"))
    gate.wait_until(lambda: "b" in gate.running)
    gate.let("a")
    assert first.join() == "a"
    gate.wait_until(lambda: gate.pollers[-1] == "second")
    gate.let("b")
    assert second.join() == "b"
    assert set(gate.pollers[: gate.pollers.index("second")]) == {"first"}


def test_one_threads_interrupt_is_not_the_others(driver, gate):
    """The one who polls is interrupted: the other's completion is not lost, and both leave in order."""
    first = Caller(driver, "first", gate.io("a"))
    gate.wait_until(lambda: gate.inside)
    second = Caller(driver, "second", gate.io("b"))
    gate.wait_until(lambda: "b" in gate.running)
    gate.interrupt(KeyboardInterrupt())
    gate.wait_until(lambda: not gate.interrupts)
    gate.let("b")
    assert second.join() == "b"
    gate.wait_until(lambda: gate.inside)
    assert first.thread.is_alive()
    gate.let("a")
    with pytest.raises(KeyboardInterrupt):
        first.join()


def test_whoever_is_helped_by_a_third_is_told(driver, gate):
    """A task may be ended by another thread that only passed by; its own thread must wake up then."""
    event = Event()
    poller = Caller(driver, "poller", gate.io("long"))
    gate.wait_until(lambda: gate.inside)
    waiter = Caller(driver, "waiter", wait(event))
    # It has spawned its task once somebody waits for the event.
    while not event._waiters:
        pass

    async def fire() -> None:
        event.fire("at last")
        await gate.io("third")

    third = Caller(driver, "third", fire())
    gate.wait_until(lambda: "third" in gate.running)
    assert waiter.join() == "at last"
    gate.let("third", "long")
    assert poller.join() == "long"
    third.join()


def test_an_error_of_one_is_not_the_others(driver, gate):
    async def fails() -> None:
        await gate.io("bad")
        raise KeyError

    bad, good = Caller(driver, "bad", fails()), Caller(driver, "good", gate.io("good"))
    gate.wait_until(lambda: len(gate.running) == 2)
    gate.let("bad", "good")
    assert good.join() == "good"
    with pytest.raises(KeyError):
        bad.join()


def test_tasks_run_in_one_thread_at_a_time(driver, gate):
    """Whoever is inside is alone there, so that code that awaits nothing is atomic."""
    inside = []

    async def work(name: str) -> None:
        for number in range(20):
            inside.append(name)
            assert inside == [name]
            inside.clear()
            await gate.io(f"{name}{number}")

    callers = [Caller(driver, name, work(name)) for name in "abcd"]
    stop = threading.Event()

    def feed() -> None:
        while not stop.is_set():
            with gate.condition:
                gate.condition.wait_for(lambda: gate.running or stop.is_set(), 0.05)
                gate.finished.extend(gate.running.values())
                gate.running.clear()
                gate.condition.notify_all()

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        for caller in callers:
            caller.join()
    finally:
        stop.set()
        feeder.join()


# --- several devices -----------------------------------------------------------------------------


def waited_for(devices: list[Pipe], timeout_ns: int) -> list[Any]:
    finished: list[Any] = []
    wait_for_any(devices, timeout_ns, finished, None, None)
    return finished


def driven(pipes: list[Pipe], giver: Pipe) -> object:
    """What a task gets that waits for something that `giver` has finished."""
    scheduler = Scheduler()
    for pipe in pipes:
        scheduler.add_device(pipe)
    io = Io("done")
    giver.items.append(io)

    async def work() -> object:
        return await wait(io.event)

    return SyncDriver(scheduler).run(work())


def test_only_the_one_that_is_busy_is_asked(pipes):
    pipes[0].in_flight = pipes[2].in_flight = 0
    assert driven(pipes, pipes[1]) == "done"
    assert [pipe.asked for pipe in pipes] == [[], [-1], []]


def test_a_device_that_does_not_say_what_is_in_flight_is_asked(pipes):
    for pipe in pipes:
        del pipe.in_flight
    assert driven(pipes, pipes[2]) == "done"
    assert all(pipe.asked for pipe in pipes)


def test_nothing_will_come_where_no_device_is_busy(pipes):
    for pipe in pipes:
        pipe.in_flight = 0
    with pytest.raises(Stalled):
        driven(pipes, pipes[0])


def test_a_task_may_wait_for_a_thread_that_is_outside(pipes):
    """No device is busy, but a thread does I/O of its own: its end is waited for (G06)."""
    driver = SyncDriver(Scheduler())
    ended = Event()

    def begin() -> None:
        driver.outside += 1

    def end() -> None:
        driver.outside -= 1
        ended.fire("ended")

    driver.call(begin)
    other = threading.Timer(0.01, driver.call, [end])
    other.start()

    async def work() -> object:
        return await wait(ended)

    assert driver.run(work()) == "ended"
    other.join()
    driver.close()


def test_all_are_looked_at_before_any_is_waited_for(pipes):
    pipes[0].items, pipes[2].items = [1], [2, 3]
    assert waited_for(pipes, -1) == [1, 2, 3]
    assert waited_for(pipes, 0) == []


def test_a_descriptor_wakes(pipes):
    giver = threading.Timer(0.01, pipes[1].give, ["x"])
    giver.start()
    assert waited_for(pipes, -1) == ["x"]
    giver.join()


def test_what_came_before_the_descriptor_was_there_is_seen(pipes):
    """Finished between the look and the making of the descriptor: nothing would make it readable."""

    def late() -> int:
        pipes[1].items.append("late")
        return pipes[1].fd

    pipes[1].wakeup_fd = late  # type: ignore[method-assign]
    assert waited_for(pipes, -1) == ["late"]


def test_an_alarm_ends_the_wait(pipes):
    assert waited_for(pipes, 1_000) == []
    assert waited_for([], 1_000) == []


def test_one_that_can_only_be_asked(pipes):
    pipes[0].wakeup_fd = lambda: None  # type: ignore[method-assign]
    assert waited_for(pipes, -1) == []  # It looked, waited a millisecond, and looked again.
    assert waited_for(pipes, 10_000_000_000) == []
    assert set(pipes[0].asked) == {0}
