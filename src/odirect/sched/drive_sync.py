"""The synchronous driver: a caller pumps the scheduler in his own thread until his task has ended.

Several threads may call at once. Entry is serialised by one lock; waiting is not: one of them at a
time polls the devices, outside the lock, for all; when his own task has ended he passes that duty
on. There is no helper thread.

Whoever runs tasks while somebody else polls may do what concerns the one who polls: end his task, send
something to a device that he does not look at, set an alarm before the time that he waits for. Then
he is woken, by the device that he waits in. A device that has no `wake` is waited for by its descriptor,
beside one of ours, once there has been more than one thread; one without a descriptor too must come back by itself.

Signals' handlers run at moments when nothing is half done, or where a device waits and would lose nothing.
"""

from __future__ import annotations

import collections
import os
import select
import threading
from collections.abc import Callable, Coroutine, MutableSequence, Sequence
from typing import Any, TypeVar

from odirect.sched.interrupts import Noted, Quiet
from odirect.sched.scheduler import Completion, Pollable, Scheduler

T = TypeVar("T")

_Done = Callable[[], object]


class Stalled(RuntimeError):
    """A task waits for something that nobody will ever do: a bug, found instead of hanging."""


class _Waiter:
    """A thread that waits until what it is there for is done, or until it is its turn to poll."""

    __slots__ = ("bell", "done")

    def __init__(self, done: _Done) -> None:
        self.done = done
        self.bell = threading.Lock()
        self.bell.acquire()

    def ring(self) -> None:
        """Wake it."""
        if self.bell.locked():
            self.bell.release()


class _Watch:
    """The thread that polls: what it is there for, which devices it looks at, and until when (None: for ever)."""

    __slots__ = ("deadline_ns", "devices", "done", "wake")

    def __init__(
        self, done: _Done, devices: Sequence[Pollable], deadline_ns: int | None, wake: Callable[[], object] | None
    ) -> None:
        self.done = done
        self.devices = devices
        self.deadline_ns = deadline_ns
        #: Makes it look around; None if it cannot be reached, or has been told already.
        self.wake = wake


class _Bell:
    """An eventfd that is closed with its driver."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.fd)

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def still(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass


class SyncDriver:
    """Runs coroutines of one scheduler for synchronous callers.

    lock: held by whoever is inside; also for callers who use the scheduler's tasks and locks by themselves.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.lock = threading.RLock()
        self._watch: _Watch | None = None
        self._line: list[_Waiter] = []
        # There has been more than one thread inside; then devices that cannot be woken are waited for with the bell.
        self._several = False
        self._bell: _Bell | None = None
        #: Threads that do I/O of their own which tasks wait for; changed under the lock, within `run` or `call`.
        self.outside = 0
        # Polled, but not yet told: an interrupt on the way loses nothing that a device has given.
        self._arrived: collections.deque[Completion] = collections.deque()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns; raises what it raises.

        A KeyboardInterrupt (or what another signal handler raises) cancels the task and waits for
        the I/O that it has in flight, whose memory is the device's until then (F24); a second one
        leaves at once, and the task ends when this driver is used or drained next.

        Raises Stalled if the task waits, and nothing is in flight that could end that.
        """
        with Quiet() as quiet, self.lock:
            task = self.scheduler.spawn(coroutine)

            def done() -> bool:
                return task.done

            try:
                self._pump(done, quiet)
            except BaseException:
                task.cancel()
                try:
                    self._pump(done, quiet)
                except Stalled:
                    pass  # It stalled before, and its clean-up does again. What it raised first is told.
                raise
            finally:
                self._leave()
            return task.result()

    def wait_until(self, done: _Done) -> None:
        """Pump until `done()` is true, which only what runs on the scheduler can make it.

        What a signal's handler raises leaves at once, with nothing lost. Raises Stalled as `run` does.
        """
        with Quiet() as quiet, self.lock:
            try:
                self._pump(done, quiet)
            finally:
                self._leave()

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, called under the lock and kept from signals; then what is ready is run."""
        with Quiet(), self.lock:
            try:
                result = function()
                self.scheduler.run_ready()
                return result
            finally:
                self._leave()

    def call_quickly(self, function: Callable[[], T]) -> T:
        """As `call`, for a function that makes no task ready, and that a signal's handler may leave anywhere."""
        with self.lock:
            if self._watch is None and not self._line:
                return function()
        return self.call(function)

    def close(self) -> None:
        """Let go of the descriptor that several threads needed; nobody may be inside. It can be used again."""
        with self.lock:
            self._bell = None

    def _pump(self, done: _Done, quiet: Quiet) -> None:
        scheduler = self.scheduler
        arrived = self._arrived
        while True:
            while arrived:
                scheduler.dispatch((arrived.popleft(),))
            scheduler.run_ready()
            if done():
                return
            scheduler.commit()
            if self._line or self._watch is not None:
                self._tell_others()
            if quiet.came:
                self._let_handlers_speak(quiet)
            elif self._watch is not None:
                self._wait_for_turn(done, quiet)
            else:
                self._poll(done, quiet)

    def _leave(self) -> None:
        """Before the lock is given back for good: see to those who are still there."""
        if self._line or self._watch is not None:
            # What was run here may have queued something for their tasks.
            self.scheduler.commit()
            self._tell_others()
            self._hand_over()

    def _hand_over(self) -> None:
        if self._watch is None and self._line:
            self._line[0].ring()

    def _tell_others(self) -> None:
        """Wake whoever has got what he waits for, and the one who polls if he must look again."""
        for waiter in self._line:
            if waiter.done():
                waiter.ring()
        watch = self._watch
        if watch is None or watch.wake is None:
            return
        alarm_ns = self.scheduler.next_alarm_ns()
        if (
            watch.done()
            or not (watch.devices or self.outside)
            or (alarm_ns is not None and (watch.deadline_ns is None or alarm_ns < watch.deadline_ns))
            or any(device not in watch.devices for device in self._busy())
        ):
            wake, watch.wake = watch.wake, None
            wake()

    def _let_handlers_speak(self, quiet: Quiet) -> None:
        # Not under the lock, and not with the duty: a handler may wait for another thread.
        self._hand_over()
        self.lock.release()
        try:
            quiet.check()
        finally:
            self.lock.acquire()

    def _wait_for_turn(self, done: _Done, quiet: Quiet) -> None:
        self._several = True
        alarm_ns = self.scheduler.next_alarm_ns()
        seconds = -1.0 if alarm_ns is None else max(0, alarm_ns - self.scheduler.clock.now_ns()) / 1e9
        waiter = _Waiter(done)
        self._line.append(waiter)
        self.lock.release()
        try:
            quiet.raises = True
            waiter.bell.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))
        except Noted:
            pass
        finally:
            quiet.raises = False
            self.lock.acquire()
            self._line.remove(waiter)

    def _busy(self) -> list[Pollable]:
        return [device for device in self.scheduler.devices if getattr(device, "in_flight", 1)]

    def _poll(self, done: _Done, quiet: Quiet) -> None:
        devices = self._busy()
        timeout_ns = -1
        alarm_ns = self.scheduler.next_alarm_ns()
        if alarm_ns is not None:
            timeout_ns = max(0, alarm_ns - self.scheduler.clock.now_ns())
        elif not devices and not self.outside:
            # Said under the lock: whoever enters now could send something before we looked.
            raise _stalled()
        bell, wake = None, None
        if len(devices) == 1:
            wake = getattr(devices[0], "wake", None)
        several = self._several or self.outside > 0
        if wake is None and several and (len(devices) != 1 or devices[0].wakeup_fd() is not None):
            bell = self._bell = self._bell or _Bell()
            wake = bell.ring
        self._watch = _Watch(done, devices, alarm_ns, wake)
        self.lock.release()
        try:
            wait_for_any(devices, timeout_ns, self._arrived, quiet, bell)
        except Noted:
            pass
        finally:
            quiet.waits = None
            self.lock.acquire()
            self._watch = None


def wait_for_any(
    devices: Sequence[Pollable],
    timeout_ns: int,
    finished: MutableSequence[Completion],
    quiet: Quiet | None,
    bell: _Bell | None,
) -> None:
    """Wait for any of `devices`, or for the bell, and put what they give on `finished`.

    A handler's exception may come only where `quiet` is told so.
    """
    if len(devices) == 1 and bell is None:
        if quiet is not None:
            quiet.waits = devices[0]
        finished.extend(devices[0].poll(timeout_ns))
        return
    for device in devices:
        finished.extend(device.poll(0))
    if finished or timeout_ns == 0:
        return
    poller = select.poll()
    for device in devices:
        descriptor = device.wakeup_fd()
        if descriptor is None:  # It can only be asked, so look at all of them every millisecond.
            timeout_ns = min(timeout_ns, 1_000_000) if timeout_ns >= 0 else 1_000_000
        else:
            poller.register(descriptor, select.POLLIN)
    if bell is not None:
        poller.register(bell.fd, select.POLLIN)
    for device in devices:  # What finished before its descriptor was there did not make it readable.
        finished.extend(device.poll(0))
    if finished:
        return
    try:
        if quiet is not None:
            quiet.raises = True
        poller.poll(None if timeout_ns < 0 else -(-timeout_ns // 1_000_000))
    finally:
        if quiet is not None:
            quiet.raises = False
    if bell is not None:
        bell.still()
    for device in devices:
        finished.extend(device.poll(0))


def _stalled() -> Stalled:
    return Stalled("a task waits, but no device has anything in flight and no alarm is set")
