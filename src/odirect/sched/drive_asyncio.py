"""The asyncio driver: one pump a loop, woken by the devices' descriptors; callers await futures.

What is queued during one turn of the loop is handed over at its end, in one call (G13). Cancelling
an awaiting caller cancels his wait alone: a bio in flight stays the device's (F24).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from odirect.sched.scheduler import Pollable, Scheduler

T = TypeVar("T")


class AsyncioDriver:
    """Pumps one scheduler inside one running event loop. Used in that loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, scheduler: Scheduler | None = None) -> None:
        self.loop = loop
        self.scheduler = Scheduler() if scheduler is None else scheduler
        self._watched: dict[Pollable, int] = {}
        self._scheduled = False
        self._alarm: asyncio.TimerHandle | None = None

    def watch(self, device: Pollable) -> None:
        """Commit and poll `device` from now on, whenever its descriptor is readable.

        Raises ValueError if it has none: an event loop cannot wait for it then.
        """
        if device in self._watched:
            return
        descriptor = device.wakeup_fd()
        if descriptor is None:
            raise ValueError(f"{device!r} has no descriptor that an event loop could wait for")
        self._watched[device] = descriptor
        self.scheduler.add_device(device)
        self.loop.add_reader(descriptor, self._readable, device)

    def unwatch(self, device: Pollable) -> None:
        """Leave `device` alone from now on."""
        descriptor = self._watched.pop(device, None)
        if descriptor is not None:
            self.scheduler.remove_device(device)
            if not self.loop.is_closed():
                self.loop.remove_reader(descriptor)

    def kick(self) -> None:
        """Run what is ready and hand over what is queued, at the end of this turn of the loop."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._turn)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns, run on the scheduler.

        Cancelling the caller cancels the task too, which ends when its I/O in flight has come back.
        """
        future: asyncio.Future[T] = self.loop.create_future()
        task = self.scheduler.spawn(self._report(coroutine, future))
        self.kick()
        try:
            return await future
        except asyncio.CancelledError:
            task.cancel()
            self.kick()
            raise

    async def _report(self, coroutine: Coroutine[Any, Any, T], future: asyncio.Future[T]) -> None:
        try:
            result = await coroutine
        except BaseException as error:
            if future.done() or self.loop.is_closed():
                return
            if isinstance(error, Exception):
                future.set_exception(error)
            else:
                future.cancel()
        else:
            if not future.done():
                future.set_result(result)

    def _turn(self) -> None:
        self._scheduled = False
        scheduler = self.scheduler
        scheduler.run_ready()
        scheduler.commit()
        for device in tuple(self._watched):
            # What has come back meanwhile is taken without waiting for the loop to look at descriptors.
            scheduler.dispatch(device.poll(0))
        if scheduler.ready:
            self.kick()
        if scheduler.next_alarm_ns() is not None:
            self._set_alarm()

    def _readable(self, device: Pollable) -> None:
        scheduler = self.scheduler
        scheduler.dispatch(device.poll(0))
        if scheduler.ready:
            self.kick()

    def _set_alarm(self) -> None:
        when_ns = self.scheduler.next_alarm_ns()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if when_ns is not None:
            delay = max(0, when_ns - self.scheduler.clock.now_ns()) / 1e9
            self._alarm = self.loop.call_later(delay, self.kick)
