"""Tasks, events, alarms, and what cancelling means."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest

from odirect.sched.clock import MonotonicClock, VirtualClock
from odirect.sched.locks import Mutex
from odirect.sched.scheduler import Cancelled, Scheduler, Task
from odirect.sched.traps import Event, gather, joined, shielded, sleep_ns, this_scheduler, wait, yield_now


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(VirtualClock())


def run(scheduler: Scheduler, coroutine: Coroutine[Any, Any, Any]) -> Any:
    task = scheduler.spawn(coroutine)
    scheduler.run_ready()
    return task.result()


async def value_of(event: Event) -> object:
    return await wait(event)


# --- tasks ----------------------------------------------------------------------------------------


def test_a_task_ends_with_its_value_or_its_error(scheduler):
    async def gives() -> int:
        return 7

    async def fails() -> None:
        raise KeyError("x")

    good, bad = scheduler.spawn(gives(), "good"), scheduler.spawn(fails())
    assert repr(good) == "<Task good ready>"
    with pytest.raises(RuntimeError, match="good has not ended"):
        good.result()
    scheduler.run_ready()
    assert good.done and good.result() == 7 and good.error is None and repr(good) == "<Task good done>"
    assert bad.done and isinstance(bad.error, KeyError)
    with pytest.raises(KeyError):
        bad.result()


def test_ready_tasks_run_in_turn(scheduler):
    order = []

    async def count(name: str) -> None:
        for number in range(3):
            order.append(f"{name}{number}")
            await yield_now()

    for name in "abc":
        scheduler.spawn(count(name))
    scheduler.run_ready()
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def test_a_task_knows_its_scheduler(scheduler):
    assert run(scheduler, this_scheduler()) is scheduler


def test_run_ready_says_whether_anything_ran(scheduler):
    """Whoever shares the scheduler with other threads has to tell them then."""
    assert not scheduler.run_ready()
    scheduler.spawn(yield_now())
    assert scheduler.run_ready()
    assert not scheduler.run_ready()


def test_waking_a_task_twice_is_an_error(scheduler):
    task = scheduler.spawn(yield_now())
    with pytest.raises(RuntimeError, match="twice"):
        task.make_ready(None)
    scheduler.run_ready()
    with pytest.raises(RuntimeError, match="twice"):
        task.make_ready(None)


# --- events ---------------------------------------------------------------------------------------


def test_an_event_fires_once_for_everybody(scheduler):
    event = Event()
    early = [scheduler.spawn(value_of(event)) for _ in range(2)]
    scheduler.run_ready()
    event.fire("first")
    event.fire("second")
    event.fail(KeyError())
    late = scheduler.spawn(value_of(event))
    scheduler.run_ready()
    assert [task.result() for task in (*early, late)] == ["first"] * 3
    assert event.value == "first"


def test_an_event_can_fail(scheduler):
    event = Event()
    early = scheduler.spawn(value_of(event))
    scheduler.run_ready()
    event.fail(KeyError("lost"))
    event.fail(ValueError())
    event.fire("too late")
    late = scheduler.spawn(value_of(event))
    scheduler.run_ready()
    assert isinstance(early.error, KeyError) and isinstance(late.error, KeyError)
    with pytest.raises(KeyError):
        _ = event.value


# --- cancelling -----------------------------------------------------------------------------------


def test_cancelling_a_waiting_task(scheduler):
    """A cancelled waiter leaves no trace where it waited."""
    event = Event()
    task = scheduler.spawn(value_of(event))
    scheduler.run_ready()
    task.cancel()
    task.cancel()
    event.fire()  # It must not be woken again.
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled)
    task.cancel()
    assert isinstance(task.error, Cancelled)


def test_cancelling_a_task_that_has_not_begun(scheduler):
    """It runs up to where it waits first, so that its `finally` holds."""
    steps = []

    async def work() -> None:
        steps.append("begun")
        await yield_now()
        steps.append("not reached")

    task = scheduler.spawn(work())
    task.cancel()
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled) and steps == ["begun"]


def test_a_pending_cancellation_does_not_enter_the_line(scheduler):
    """A task that was cancelled while it ran must not be left in the line of what it waits for next."""
    event = Event()
    task: Task[object]

    async def work() -> None:
        task.cancel()
        await wait(event)

    task = scheduler.spawn(work())
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled)
    event.fire()
    scheduler.run_ready()


def test_a_cancellation_may_be_caught_once(scheduler):
    """Like any exception: whoever catches it goes on, and the next wait is a wait again."""
    event = Event()

    async def work() -> object:
        with contextlib.suppress(Cancelled):
            await wait(event)
        return await wait(event)

    task = scheduler.spawn(work())
    scheduler.run_ready()
    task.cancel()
    scheduler.run_ready()
    assert not task.done
    event.fire(3)
    scheduler.run_ready()
    assert task.result() == 3


def test_a_granted_lock_is_not_lost_by_cancelling(scheduler):
    """F01: the grant comes first, so that the `with` gives it back; the cancellation comes at the next wait."""
    lock = Mutex()
    entered = []

    async def work() -> None:
        with await lock.hold():
            entered.append(True)
            await yield_now()

    held = lock.try_hold()
    assert held is not None
    task = scheduler.spawn(work())
    scheduler.run_ready()
    held.release()  # The task is granted the lock and is ready, but has not run.
    task.cancel()
    scheduler.run_ready()
    assert entered == [True]
    assert isinstance(task.error, Cancelled) and lock.idle


def test_a_result_that_came_first_is_not_lost_by_cancelling(scheduler):
    event = Event()
    task = scheduler.spawn(value_of(event))
    scheduler.run_ready()
    event.fire("here")
    task.cancel()
    scheduler.run_ready()
    assert task.result() == "here"


# --- shielded -------------------------------------------------------------------------------------


def test_shielded_waits_in_spite_of_being_cancelled(scheduler):
    """F24: memory that was lent to a device stays lent until the device is done."""
    event = Event()
    task = scheduler.spawn(shielded(event))
    scheduler.run_ready()
    for _ in range(3):
        task.cancel()
        scheduler.run_ready()
        assert not task.done
    event.fire()
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled)


def test_shielded_cancelled_at_the_very_end(scheduler):
    """Cancelled and fired before it runs again: the cancellation is raised, and the wait is over."""
    event = Event()
    task = scheduler.spawn(shielded(event))
    scheduler.run_ready()
    task.cancel()
    event.fire("done")
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled)


def test_shielded_gives_the_value_or_the_error(scheduler):
    good, bad, over = Event(), Event(), Event()
    over.fire(5)
    tasks = [scheduler.spawn(shielded(event)) for event in (good, bad, over)]
    scheduler.run_ready()
    good.fire(4)
    bad.fail(KeyError())
    scheduler.run_ready()
    assert [tasks[0].result(), tasks[2].result()] == [4, 5]
    assert isinstance(tasks[1].error, KeyError)


@pytest.mark.parametrize("kind", ["shielded", "gather"])
def test_what_is_thrown_away_does_not_insist(scheduler, kind):
    """F24: closing a coroutine (the loop or the interpreter ends) must not be answered by waiting on.

    The bio keeps its memory alive by itself.
    """
    event = Event()

    async def gathered() -> None:
        await gather(scheduler.spawn(value_of(event)))

    coroutine = shielded(event) if kind == "shielded" else gathered()
    task = scheduler.spawn(coroutine)
    scheduler.run_ready()
    assert not task.done
    coroutine.close()


# --- gather and joined ----------------------------------------------------------------------------


def test_gather_gives_results_in_order(scheduler):
    events = [Event() for _ in range(3)]

    async def all_of() -> list[object]:
        return await gather(*[scheduler.spawn(value_of(event)) for event in events])

    task = scheduler.spawn(all_of())
    for number in (2, 0, 1):
        scheduler.run_ready()
        assert not task.done
        events[number].fire(number)
    scheduler.run_ready()
    assert task.result() == [0, 1, 2]


def test_gather_raises_the_first_error_in_order_after_all_have_ended(scheduler):
    events = [Event() for _ in range(3)]
    tasks: list[Task[object]] = []

    async def all_of() -> list[object]:
        tasks.extend(scheduler.spawn(value_of(event)) for event in events)
        return await gather(*tasks)

    task = scheduler.spawn(all_of())
    scheduler.run_ready()
    events[2].fail(KeyError())
    events[1].fail(ValueError())
    scheduler.run_ready()
    assert not task.done
    events[0].fire()
    scheduler.run_ready()
    assert isinstance(task.error, ValueError) and all(each.done for each in tasks)


def test_a_cancelled_gather_waits_for_all(scheduler):
    """F24: nothing outlives the call, not even a task that takes its time to end."""
    io = Event()
    tasks: list[Task[object]] = []

    async def all_of() -> None:
        tasks.extend([scheduler.spawn(shielded(io)), scheduler.spawn(value_of(Event()))])
        await gather(*tasks)

    task = scheduler.spawn(all_of())
    scheduler.run_ready()
    task.cancel()
    scheduler.run_ready()
    assert not task.done and [each.done for each in tasks] == [False, True]
    task.cancel()
    scheduler.run_ready()
    assert not task.done
    io.fire()
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled) and all(isinstance(each.error, Cancelled) for each in tasks)


def test_a_gather_that_is_cancelled_before_it_waits(scheduler):
    started: list[Task[object]] = []

    async def all_of() -> None:
        started.append(scheduler.spawn(value_of(Event())))
        await gather(*started)

    task = scheduler.spawn(all_of())
    task.cancel()
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled) and isinstance(started[0].error, Cancelled)


def test_gather_of_nothing_and_of_what_has_ended(scheduler):
    ended = scheduler.spawn(yield_now())
    scheduler.run_ready()
    assert run(scheduler, gather()) == []
    assert run(scheduler, gather(ended)) == [None]


def test_joined_does_not_cancel_what_it_waits_for(scheduler):
    event = Event()
    worker = scheduler.spawn(value_of(event))
    task = scheduler.spawn(joined(worker))
    scheduler.run_ready()
    task.cancel()
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled) and not worker.done
    event.fail(KeyError())
    scheduler.run_ready()
    with pytest.raises(KeyError):
        run(scheduler, joined(worker))


# --- alarms ---------------------------------------------------------------------------------------


def test_alarms_ring_in_order_of_time(scheduler):
    order = []

    async def sleep(delay: int) -> None:
        await sleep_ns(delay)
        order.append(delay)

    for delay in (30, 10, 20, 10):
        scheduler.spawn(sleep(delay))
    scheduler.run_ready()
    assert scheduler.next_alarm_ns() == 10
    scheduler.clock.move_to(9)
    scheduler.run_ready()
    assert order == []
    scheduler.clock.move_to(25)
    scheduler.run_ready()
    assert order == [10, 10, 20] and scheduler.next_alarm_ns() == 30
    scheduler.clock.move_to(1000)
    scheduler.run_ready()
    assert order == [10, 10, 20, 30] and scheduler.next_alarm_ns() is None


def test_a_cancelled_sleeper_leaves_no_alarm(scheduler):
    """An alarm that is for nobody must keep no driver waiting, and hide no `Stalled`."""
    task = scheduler.spawn(sleep_ns(100))
    other = scheduler.spawn(sleep_ns(200))
    scheduler.run_ready()
    task.cancel()
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled)
    assert scheduler.next_alarm_ns() == 200
    scheduler.clock.move_to(200)
    scheduler.run_ready()
    assert other.done and scheduler.next_alarm_ns() is None


def test_a_sleep_of_nothing_ends(scheduler):
    assert run(scheduler, sleep_ns(0)) is None


def test_clocks():
    clock = VirtualClock(5)
    assert clock.now_ns() == 5
    clock.move_to(5)
    clock.move_to(6)
    with pytest.raises(ValueError, match="cannot go back"):
        clock.move_to(5)
    assert clock.now_ns() == 6
    monotonic = MonotonicClock()
    assert monotonic.now_ns() <= monotonic.now_ns()


# --- devices --------------------------------------------------------------------------------------


def test_devices_are_added_and_removed_once(scheduler):
    class Device:
        commits = 0

        def commit(self) -> None:
            self.commits += 1

    device = Device()
    scheduler.add_device(device)
    scheduler.add_device(device)
    scheduler.commit()
    assert device.commits == 1
    scheduler.remove_device(device)
    scheduler.remove_device(device)
    scheduler.commit()
    assert device.commits == 1


def test_dispatch_calls_each_end_in_order(scheduler):
    """B07: a bio that nobody waits for is no error."""

    class Done:
        def __init__(self, end):
            self.end = end

    seen = []
    bios = [Done(seen.append), Done(None), Done(seen.append)]
    scheduler.dispatch(bios)
    assert seen == [bios[0], bios[2]]
