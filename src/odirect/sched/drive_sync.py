"""The synchronous driver: a caller pumps the scheduler in his own thread until his task has ended.

Several threads may call at once. Entry is serialised by one lock; waiting is not: one of them at a
time polls the devices, outside the lock, for all; when his own task has ended he passes that duty
on. There is no helper thread.
"""

from __future__ import annotations

import collections
import select
import threading
from collections.abc import Coroutine, MutableSequence, Sequence
from typing import Any, TypeVar

from odirect.sched.scheduler import Completion, Pollable, Scheduler, Task

T = TypeVar("T")


class Stalled(RuntimeError):
    """A task waits for something that nobody will ever do: a bug, found instead of hanging."""


class SyncDriver:
    """Runs coroutines of one scheduler for synchronous callers."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.lock = threading.RLock()
        self._turn = threading.Condition(self.lock)
        self._polling = False
        self._waiting = 0
        # Polled, but not yet told: an interrupt on the way loses nothing that a device has given.
        self._arrived: collections.deque[Completion] = collections.deque()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns; raises what it raises.

        A KeyboardInterrupt (or what another signal handler raises) cancels the task and waits for
        the I/O that it has in flight, whose memory is the device's until then (F24); a second one
        leaves at once, and the task ends when this driver is used or drained next.
        """
        with self.lock:
            task = self.scheduler.spawn(coroutine)
            try:
                self._pump(task)
            except BaseException:
                task.cancel()
                try:
                    self._pump(task)
                except Stalled:
                    pass  # It came just when a completion was passed on, which is lost. The memory is not.
                raise
            return task.result()

    def _pump(self, task: Task[T]) -> None:
        scheduler = self.scheduler
        while True:
            while self._arrived:
                scheduler.dispatch((self._arrived.popleft(),))
            if scheduler.run_ready() and self._waiting:
                self._turn.notify_all()  # The task of somebody who waits may have ended in this thread.
            if task.done:
                break
            scheduler.commit()
            if self._polling:
                self._wait_for_turn()
                continue
            self._polling = True
            try:
                self._poll_unlocked()
            finally:
                self._polling = False
                self._turn.notify_all()
        self._turn.notify_all()

    def _wait_for_turn(self) -> None:
        self._waiting += 1
        try:
            self._turn.wait(self._alarm_seconds())
        finally:
            self._waiting -= 1

    def _alarm_seconds(self) -> float | None:
        alarm_ns = self.scheduler.next_alarm_ns()
        if alarm_ns is None:
            return None
        return max(0, alarm_ns - self.scheduler.clock.now_ns()) / 1e9

    def _poll_unlocked(self) -> None:
        timeout_ns = -1
        alarm_ns = self.scheduler.next_alarm_ns()
        if alarm_ns is not None:
            timeout_ns = max(0, alarm_ns - self.scheduler.clock.now_ns())
        devices = tuple(self.scheduler.devices)
        try:
            self.lock.release()
            poll_any(devices, timeout_ns, self._arrived)
        finally:
            self.lock.acquire()


def poll_any(
    devices: Sequence[Pollable], timeout_ns: int, finished: MutableSequence[Completion] | None = None
) -> Sequence[Completion]:
    """What any of `devices` has finished; waits up to `timeout_ns` (-1: until there is something).

    A device that says by `in_flight` that it has nothing is left out, so that the usual case is one
    call of one device. finished: extended and returned; what one device gave is in it although the
    next one's `poll` is interrupted.
    """
    if finished is None:
        finished = []
    busy = [device for device in devices if getattr(device, "in_flight", 1)]
    if len(busy) == 1:
        finished.extend(busy[0].poll(timeout_ns))
        return finished
    if not busy and timeout_ns < 0:
        raise Stalled("a task waits, but no device has anything in flight and no alarm is set")
    for device in busy:
        finished.extend(device.poll(0))
    if finished or timeout_ns == 0:
        return finished
    poller = select.poll()
    for device in busy:
        descriptor = device.wakeup_fd()
        if descriptor is None:  # It can only be asked, so look at all of them every millisecond.
            timeout_ns = min(timeout_ns, 1_000_000) if timeout_ns >= 0 else 1_000_000
        else:
            poller.register(descriptor, select.POLLIN)
    for device in busy:  # What finished before its descriptor was there did not make it readable.
        finished.extend(device.poll(0))
    if not finished:
        poller.poll(None if timeout_ns < 0 else -(-timeout_ns // 1_000_000))
        for device in busy:
            finished.extend(device.poll(0))
    return finished
