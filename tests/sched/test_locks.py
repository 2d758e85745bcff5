"""Locks: never two holders that conflict, first come first served, and nothing is left behind."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odirect.sched.clock import VirtualClock
from odirect.sched.locks import Count, Held, Mutex, RangeLock, RWLock
from odirect.sched.scheduler import Cancelled, Scheduler, Task
from odirect.sched.traps import Event, wait

SIZE = 12


@dataclasses.dataclass(eq=False)
class Wish:
    """One wish for a range, as the model sees it: waiting, held, or over."""

    start: int
    end: int
    shared: bool
    state: str = "waiting"

    def conflicts(self, other: Wish) -> bool:
        both = range(max(self.start, other.start), min(self.end, other.end))
        return len(both) > 0 and not (self.shared and other.shared)


class Model:
    """What the lock must do: each waiter is held as soon as nobody before it stands in its way."""

    def __init__(self) -> None:
        self.wishes: list[Wish] = []

    def add(self, wish: Wish) -> None:
        self.wishes.append(wish)
        self.settle()

    def remove(self, wish: Wish) -> None:
        self.wishes.remove(wish)
        wish.state = "over"
        self.settle()

    def settle(self) -> None:
        for place, wish in enumerate(self.wishes):
            earlier = [other for other in self.wishes[:place] if wish.conflicts(other)]
            # Somebody later may hold what he got while this one waited for something else.
            later = [other for other in self.wishes[place:] if other.state == "held" and wish.conflicts(other)]
            if wish.state == "waiting" and not earlier and not later:
                wish.state = "held"


class Runner:
    """One task that takes what was wished for and holds it until told."""

    def __init__(self, scheduler: Scheduler, lock: RangeLock, wish: Wish) -> None:
        self.wish = wish
        self.lock = lock
        self.holds = False
        self.let_go = Event()
        self.task: Task[None] = scheduler.spawn(self.run())

    async def run(self) -> None:
        with await self.lock.hold(self.wish.start, self.wish.end - self.wish.start, shared=self.wish.shared):
            self.holds = True
            try:
                await wait(self.let_go)
            finally:
                self.holds = False


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.integers(0, SIZE), st.integers(0, SIZE // 2), st.booleans()),
        st.tuples(st.just("try"), st.integers(0, SIZE), st.integers(0, SIZE // 2), st.booleans()),
        st.tuples(st.sampled_from(["release", "cancel", "release and cancel"]), st.integers(0, 20)),
        st.tuples(st.just("run")),
    ),
    max_size=60,
)


@settings(max_examples=400)
@given(ACTIONS)
def test_range_lock_does_what_the_model_does(actions):
    """F01: no two conflicting holders, no overtaking, everybody is served, nothing is left behind.

    Also when waiters are cancelled, before or after the lock was granted to them.
    """
    scheduler, lock, model = Scheduler(VirtualClock()), RangeLock(), Model()
    runners: list[Runner] = []
    tried: list[tuple[Held, Wish]] = []

    def check() -> None:
        scheduler.run_ready()
        holders = [runner.wish for runner in runners if runner.holds] + [wish for _, wish in tried]
        for place, wish in enumerate(holders):
            assert not any(wish.conflicts(other) for other in holders[:place]), "two conflicting holders"
        assert {id(runner.wish) for runner in runners if runner.holds} == {
            id(runner.wish) for runner in runners if runner.wish.state == "held"
        }
        assert lock.idle == (not model.wishes)
        for byte in range(SIZE * 2):
            taken = any(wish.start <= byte < wish.end for wish in model.wishes if wish.state == "held")
            assert lock.is_locked(byte, 1) == taken

    def finish(runner: Runner) -> None:
        runner.let_go.fire()
        scheduler.run_ready()
        assert runner.task.done
        runners.remove(runner)
        model.remove(runner.wish)

    for action, *rest in actions:
        if action == "hold":
            start, length, shared = rest
            wish = Wish(start, start + length, shared)
            runners.append(Runner(scheduler, lock, wish))
            scheduler.run_ready()
            model.add(wish)
        elif action == "try":
            start, length, shared = rest
            wish = Wish(start, start + length, shared)
            held = lock.try_hold(start, length, shared=shared)
            assert (held is None) == any(wish.conflicts(other) for other in model.wishes)
            if held is not None:
                tried.append((held, wish))
                model.add(wish)
        elif action == "run":
            scheduler.run_ready()
        elif runners or tried:
            number = rest[0] % (len(runners) + len(tried))
            if number >= len(runners):
                held, wish = tried.pop(number - len(runners))
                held.release()
                model.remove(wish)
            elif action == "release":
                if runners[number].wish.state == "held":
                    finish(runners[number])
            elif action == "cancel":
                runner = runners.pop(number)
                runner.task.cancel()
                scheduler.run_ready()
                assert isinstance(runner.task.error, Cancelled)
                model.remove(runner.wish)
            else:
                # Whoever gets the lock now is ready, but has not run when it is cancelled.
                holder = next((runner for runner in runners if runner.wish.state == "held"), None)
                waiter = next((runner for runner in runners if runner.wish.state == "waiting"), None)
                if holder is not None and waiter is not None:
                    runners.remove(holder)
                    runners.remove(waiter)
                    holder.let_go.fire()
                    scheduler.ready.popleft().step()
                    waiter.task.cancel()
                    scheduler.run_ready()
                    assert waiter.task.done
                    model.remove(holder.wish)
                    model.remove(waiter.wish)
        check()

    for held, wish in tried:
        held.release()
        model.remove(wish)
    tried.clear()
    while runners:
        first = next((runner for runner in runners if runner.wish.state == "held"), None)
        assert first is not None, "everybody waits and nobody holds"
        check()
        finish(first)
    check()
    assert lock.idle


def test_nobody_overtakes_a_conflicting_waiter():
    """A reader who comes after a waiting writer waits, though he could read now; one beside it does not."""
    scheduler, lock = Scheduler(), RangeLock()
    reader = lock.try_hold(0, 10, shared=True)
    assert reader is not None
    writer = Runner(scheduler, lock, Wish(5, 15, False))
    scheduler.run_ready()
    late = Runner(scheduler, lock, Wish(8, 9, True))
    beside = Runner(scheduler, lock, Wish(2, 4, True))
    scheduler.run_ready()
    assert (writer.holds, late.holds, beside.holds) == (False, False, True)
    assert lock.try_hold(8, 1, shared=True) is None
    writer.task.cancel()  # Now nobody stands before him.
    scheduler.run_ready()
    assert late.holds
    for runner in (late, beside):
        runner.let_go.fire()
    reader.release()
    scheduler.run_ready()
    assert lock.idle


def test_a_range_is_released_once_and_must_be_one():
    scheduler, lock = Scheduler(), RangeLock()
    held = lock.try_hold(3, 4)
    assert held is not None and repr(held) == "<Held 3..7 exclusive>"
    held.release()
    with pytest.raises(RuntimeError, match=r"3\.\.7"):
        held.release()
    for start, length in ((-1, 2), (0, -1)):
        task = scheduler.spawn(lock.hold(start, length))
        scheduler.run_ready()
        assert isinstance(task.error, ValueError)
        with pytest.raises(ValueError):
            lock.try_hold(start, length)
    assert lock.idle


def test_a_range_of_nothing_conflicts_with_nothing():
    lock = RangeLock()
    whole = lock.try_hold(0, 10)
    nothing = lock.try_hold(5, 0)
    assert whole is not None and nothing is not None
    whole.release()
    assert not lock.is_locked(0, 10)
    nothing.release()
    assert lock.idle


def test_an_error_inside_gives_the_lock_back():
    scheduler, lock = Scheduler(), RangeLock()

    async def work() -> None:
        with await lock.hold(0, 1):
            raise KeyError

    task = scheduler.spawn(work())
    scheduler.run_ready()
    assert isinstance(task.error, KeyError) and lock.idle


def test_readers_share_and_a_writer_is_alone():
    scheduler, lock = Scheduler(), RWLock()
    first, second = lock.try_read(), lock.try_read()
    assert first is not None and second is not None and lock.try_write() is None
    order = []

    async def write() -> None:
        with await lock.write():
            order.append("write")

    async def read() -> None:
        with await lock.read():
            order.append("read")

    scheduler.spawn(write())
    scheduler.run_ready()
    scheduler.spawn(read())
    scheduler.run_ready()
    assert order == [] and lock.try_read() is None
    first.release()
    scheduler.run_ready()
    assert order == []
    second.release()
    scheduler.run_ready()
    assert order == ["write", "read"] and lock.idle


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["enter", "leave", "cancel"]), max_size=40))
def test_a_mutex_serves_in_order_of_arrival(actions):
    """Exactly one holds it, who came first of those that are left; at the end nobody."""
    scheduler, lock = Scheduler(), Mutex()
    line: list[tuple[Task[None], Event, list[bool]]] = []

    async def work(leave: Event, inside: list[bool]) -> None:
        with await lock.hold():
            inside.append(True)
            await wait(leave)

    for action in [*actions, *["leave"] * len(actions)]:
        if action == "enter":
            leave, inside = Event(), []
            line.append((scheduler.spawn(work(leave, inside)), leave, inside))
        elif line and action == "leave":
            task, leave, _ = line.pop(0)
            leave.fire()
        elif line:
            task, _, _ = line.pop(len(line) // 2)
            task.cancel()
        scheduler.run_ready()
        assert [bool(inside) for _, _, inside in line] == [place == 0 for place in range(len(line))]
        assert lock.idle == (not line)
        held = lock.try_hold()
        assert (held is not None) == (not line)
        if held is not None:
            held.release()


def test_a_count_is_waited_for():
    """G06: everybody goes on at zero; who was cancelled leaves no trace, and who comes late does not wait."""
    scheduler, count = Scheduler(), Count()
    with pytest.raises(RuntimeError, match="below zero"):
        count.down()
    count.up()
    count.up()
    tasks = [scheduler.spawn(count.zero()) for _ in range(3)]
    scheduler.run_ready()
    tasks[1].cancel()
    count.down()
    scheduler.run_ready()
    assert [task.done for task in tasks] == [False, True, False]
    count.down()
    scheduler.run_ready()
    assert all(task.done for task in tasks) and isinstance(tasks[1].error, Cancelled)
    late = scheduler.spawn(count.zero())
    scheduler.run_ready()
    assert late.done


def test_a_count_that_rises_again_is_waited_for_again():
    scheduler, count = Scheduler(), Count()
    count.up()
    task = scheduler.spawn(count.zero())
    scheduler.run_ready()
    count.down()
    count.up()  # Before the task could run.
    scheduler.run_ready()
    assert not task.done
    count.down()
    scheduler.run_ready()
    assert task.done
