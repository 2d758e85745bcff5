"""Completions that need a task of their own."""

from __future__ import annotations

from odirect.dio.completion import DeferredQueue
from odirect.sched.scheduler import Scheduler
from odirect.sched.traps import Event, wait


def test_completions_run_one_after_the_other_in_one_task():
    """G05: in the order in which they were put, although the first one waits."""
    scheduler = Scheduler()
    queue = DeferredQueue(scheduler)
    order: list[str] = []
    gate = Event()

    async def complete(name: str) -> None:
        order.append(f"{name} begins")
        if name == "first":
            await wait(gate)
        order.append(f"{name} ends")

    assert queue.idle
    queue.put(complete("first"))
    queue.put(complete("second"))
    assert len(scheduler.ready) == 1 and not queue.idle
    scheduler.run_ready()
    queue.put(complete("third"))
    scheduler.run_ready()
    assert order == ["first begins"] and not queue.idle
    gate.fire()
    scheduler.run_ready()
    assert order == [f"{name} {what}" for name in ("first", "second", "third") for what in ("begins", "ends")]
    assert queue.idle


def test_nothing_is_run_where_it_is_put():
    """G05: `put` is called while completions are told, and must not wait or run anything."""
    scheduler = Scheduler()
    queue = DeferredQueue(scheduler)
    done: list[int] = []

    async def complete(number: int) -> None:
        done.append(number)

    queue.put(complete(1))
    assert done == []
    scheduler.run_ready()
    assert done == [1] and queue.idle


def test_a_completion_may_put_another_and_an_idle_queue_starts_again():
    """G05: nothing that is put is forgotten, whenever that is."""
    scheduler = Scheduler()
    queue = DeferredQueue(scheduler)
    done: list[int] = []

    async def complete(number: int) -> None:
        done.append(number)
        if number < 3:
            queue.put(complete(number + 1))

    queue.put(complete(1))
    scheduler.run_ready()
    assert done == [1, 2, 3] and queue.idle
    queue.put(complete(7))
    scheduler.run_ready()
    assert done == [1, 2, 3, 7] and queue.idle and not scheduler.ready
