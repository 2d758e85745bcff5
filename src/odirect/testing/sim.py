"""Runs tasks on simulated devices and a virtual clock; one seed is one run, to the last step.

    def scenario(sim):
        device = sim.device(1 << 20)
        ...
        return main(sim, device)          # a coroutine

    run_seeds(range(300), scenario)       # AssertionError naming the seed
    explore(scenario, max_states=10_000)  # every order there is

Who runs next, when each bio finishes, in which order completions are told, and what fails: all of
it is decided by one `Chooser`, and written to `Simulation.trace`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from odirect.block.device import BlockDevice, Limits
from odirect.block.filters.base import ActiveFilter
from odirect.block.filters.delay import Delay
from odirect.sched.clock import VirtualClock
from odirect.sched.drive_sync import Stalled
from odirect.sched.scheduler import Cancelled, Completion, Scheduler, Task
from odirect.sched.traps import Event
from odirect.testing.choices import Chooser, RandomChooser, ScriptedChooser
from odirect.testing.sim_device import SimDevice, SimFaults

T = TypeVar("T")

#: Rounds without an end after which a run is taken for endless.
MOST_ROUNDS = 1_000_000

#: How often a filter that says that it is busy is polled in vain before it is believed to be stuck.
_PATIENCE = 64

#: Rounds that the tasks of a failed run get for ending.
_ROUNDS_TO_ABANDON = 10_000


class SimScheduler(Scheduler):
    """A scheduler whose next task is chosen, and whose steps are traced."""

    def __init__(self, sim: Simulation) -> None:
        super().__init__(sim.clock)
        self.tasks: list[Task[Any]] = []
        self._sim = sim

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str = "") -> Task[T]:
        """A new task, ready to run, remembered in `tasks`."""
        task = super().spawn(coroutine, name)
        self.tasks.append(task)
        self._sim.note("spawn", task.name)
        return task

    def pick(self) -> Task[Any]:
        """Any of the ready tasks."""
        place = self._sim.chooser.choose(len(self.ready))
        task = self.ready[place]
        del self.ready[place]
        self._sim.note("step", task.name)
        return task


class Simulation:
    """One run. As a context manager it adds the seed to whatever error leaves it.

    seed     of the one generator, `rng`, which tests may use too (for data, offsets, ...)
    reproduction  after the `with`: what to write to have this run again
    trace    (virtual nanosecond, what, ...) of everything that happened, in order
    ordering "latency": bios finish when their chosen latency is over; "any": whichever is chosen
             is the next, so that every order is possible (`explore`)
    """

    def __init__(self, seed: int = 0, *, chooser: Chooser | None = None, ordering: str = "latency") -> None:
        if ordering not in ("latency", "any"):
            raise ValueError(f"ordering is {ordering!r}, neither 'latency' nor 'any'")
        self.seed = seed
        self.rng = random.Random(seed)
        self.chooser: Chooser = RandomChooser(self.rng) if chooser is None else chooser
        self.clock = VirtualClock()
        self.trace: list[tuple[object, ...]] = []
        self._traces = True
        self.reproduction = ""
        self.scheduler = SimScheduler(self)
        self._ordering = ordering
        self._devices: list[SimDevice] = []
        self._awaited: list[Task[Any]] = []

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reproduction = self._reproduction()
        if error is not None:
            error.add_note(f"reproduce it with {self.reproduction}; it failed at {self.clock.now_ns()} ns")
        self.abandon()

    def _reproduction(self) -> str:
        if isinstance(self.chooser, ScriptedChooser):
            return f"replay({[choice for choice, _ in self.chooser.taken]}, scenario)"
        return f"Simulation({self.seed})"

    def note(self, what: str, *details: object) -> None:
        """Add an entry to the trace, with the time."""
        if self._traces:
            self.trace.append((self.clock.now_ns(), what, *details))

    def device(
        self,
        size_bytes: int = 0,
        *,
        name: str = "",
        limits: Limits | None = None,
        store: BlockDevice | None = None,
        faults: SimFaults | None = None,
        latencies_ns: Sequence[int] | None = None,
        add: bool = True,
    ) -> SimDevice:
        """A simulated device of `size_bytes`, or over `store`, a device that answers at once.

        add: whether the scheduler polls it. Not so if a filter is to go over it: add that one then.
        """
        device = SimDevice(
            self,
            size_bytes,
            name=name or f"device-{len(self._devices)}",
            limits=limits,
            store=store,
            faults=faults,
            latencies_ns=latencies_ns,
            any_order=self._ordering == "any",
        )
        self._devices.append(device)
        if add:
            self.scheduler.add_device(device)
        return device

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str = "") -> Task[T]:
        """A new task, which `run` waits for and whose error it raises."""
        task = self.scheduler.spawn(coroutine, name)
        self._awaited.append(task)
        return task

    def run(self, coroutine: Coroutine[Any, Any, T], name: str = "main") -> T:
        """What `coroutine` returns once it and every task spawned here have ended.

        Raises the first error of any of them, but for having been cancelled; tasks whose errors are
        expected are spawned on the scheduler. Raises Stalled, naming the tasks, if they wait for
        what nobody will ever do: a lock that was left held, a completion that got lost (F01).
        """
        task = self.spawn(coroutine, name)
        silent = 0
        for _ in range(MOST_ROUNDS):
            self.scheduler.run_ready()
            self.scheduler.commit()
            for awaited in self._awaited:
                if awaited.done and awaited.error is not None and not isinstance(awaited.error, Cancelled):
                    raise awaited.error
            if self._dispatch():
                silent = 0
                continue
            waiting = [awaited for awaited in self._awaited if not awaited.done]
            if not waiting and not any(device.flying for device in self._devices):
                self._awaited.clear()
                return task.result()
            if not self._next_event():
                silent += 1
                if silent < _PATIENCE and any(map(_is_busy, self.scheduler.devices)):
                    continue
                if waiting:
                    raise Stalled(f"{', '.join(map(repr, waiting))}: nothing will ever happen again")
                self._awaited.clear()
                return task.result()
        raise Stalled(f"no end after {MOST_ROUNDS} rounds; waiting: {[t.name for t in self._awaited if not t.done]}")

    def abandon(self) -> None:
        """Cancel every task that has not ended, and let what is in flight come back, so that nothing lingers.

        None of it is traced or decided by `chooser`. Does nothing after a run that has ended well.
        """
        left = self._unfinished()
        if not left:
            return
        self._traces = False
        self.chooser = RandomChooser(random.Random(0))
        with contextlib.suppress(Exception):  # The run has failed already; its own error is what counts.
            for task in left:
                task.cancel()
            for _ in range(_ROUNDS_TO_ABANDON):
                self.scheduler.run_ready()
                if not self._unfinished():
                    return
                self.scheduler.commit()
                if not self._dispatch() and not self._next_event():
                    break
            # What is waited for under a shield never comes: pretend that it did.
            for task in self._unfinished():
                if isinstance(task._waits_for, Event):
                    task._waits_for.fire()
            self.scheduler.run_ready()
        for task in self._unfinished():
            with contextlib.suppress(RuntimeError):
                task._coroutine.close()

    def _unfinished(self) -> list[Task[Any]]:
        return [task for task in self.scheduler.tasks if not task.done]

    def _dispatch(self) -> bool:
        """Tell whoever waits for what has finished, in a chosen order; False if nothing has."""
        finished: list[Completion] = []
        for device in tuple(self.scheduler.devices):
            finished.extend(device.poll(0))
        order: list[Completion] = []
        while finished:
            order.append(finished.pop(self.chooser.choose(len(finished))))
        self.scheduler.dispatch(order)
        return bool(order)

    def _next_event(self) -> bool:
        """Move time to the next thing that happens; False if nothing ever will."""
        alarm_ns = self.scheduler.next_alarm_ns()
        busy = [device for device in self._devices if device.flying]
        if self._ordering == "any":
            ways = sum(device.flying for device in busy)
            choice = self.chooser.choose(ways + (alarm_ns is not None)) if ways or alarm_ns is not None else -1
            for device in busy:
                if 0 <= choice < device.flying:
                    device.finish_next(choice)
                    return True
                choice -= device.flying
            times = [] if alarm_ns is None else [alarm_ns]
        else:
            times = [device.next_due_ns for device in busy if device.next_due_ns is not None]
            if alarm_ns is not None:
                times.append(alarm_ns)
        times += [due_ns for due_ns in map(_held_until, self.scheduler.devices) if due_ns is not None]
        if not times:
            return False
        self.clock.move_to(max(self.clock.now_ns(), min(times)))
        return True


class Explored(NamedTuple):
    """How many runs there were, and whether these were all that there are."""

    runs: int
    complete: bool


Scenario = Callable[[Simulation], Coroutine[Any, Any, object]]


def run_seeds(seeds: Iterable[int], scenario: Scenario) -> int:
    """Run `scenario` once for each seed; returns how many.

    The first failure becomes an AssertionError that names its seed.
    """
    runs = 0
    for seed in seeds:
        sim = Simulation(seed)
        _run(sim, scenario)
        runs += 1
    return runs


def explore(scenario: Scenario, max_states: int) -> Explored:
    """Run `scenario` for every sequence of decisions, depth first, at most `max_states` runs.

    For small scenarios: two or three tasks of a few bios. The first failure becomes an
    AssertionError that says how to `replay` it. Source: stateless model checking by re-execution.
    """
    script: list[int] | None = []
    runs = 0
    while script is not None:
        if runs == max_states:
            return Explored(runs, complete=False)
        chooser = ScriptedChooser(script)
        _run(Simulation(chooser=chooser, ordering="any"), scenario)
        runs += 1
        script = chooser.next_script()
    return Explored(runs, complete=True)


def replay(script: Sequence[int], scenario: Scenario) -> Simulation:
    """The simulation after one run of `scenario` with these decisions, as `explore` names them."""
    sim = Simulation(chooser=ScriptedChooser(script), ordering="any")
    _run(sim, scenario)
    return sim


def _run(sim: Simulation, scenario: Scenario) -> None:
    try:
        with sim:
            sim.run(scenario(sim))
        if isinstance(sim.chooser, ScriptedChooser):
            sim.chooser.check_used_up()
    except Exception as error:
        raise AssertionError(f"{sim.reproduction} failed: {type(error).__name__}: {error}") from error


def _is_busy(device: object) -> bool:
    """Whether a filter in the stack of `device` has more to do at its next poll."""
    while device is not None:
        if isinstance(device, ActiveFilter) and device.is_busy:
            return True
        device = getattr(device, "lower", None)
    return False


def _held_until(device: object) -> int | None:
    """When a Delay in the stack of `device` lets go of its next bio."""
    found: list[int] = []
    while device is not None:
        if isinstance(device, Delay) and device.next_due_ns is not None:
            found.append(device.next_due_ns)
        device = getattr(device, "lower", None)
    return min(found, default=None)
