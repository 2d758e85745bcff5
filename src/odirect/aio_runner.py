"""Runs the coroutines of one volume in one event loop: what `volume_runner` is for synchronous callers.

Callers await futures. A caller who is cancelled stops waiting; what he began goes on to its end, and
`end` waits for it. A loop that is closed with the volume open leaves the tasks where they are; `finish`
takes them on from there without one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from odirect.base.errors import ClosedError, ODirectError
from odirect.sched.drive_asyncio import AsyncioDriver
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.locks import Count
from odirect.sched.scheduler import Scheduler, Task
from odirect.volume_runner import named

T = TypeVar("T")


class LoopRunner:
    """The way into one volume's scheduler, for one loop and its thread. name: the volume's, for messages."""

    def __init__(self, loop: asyncio.AbstractEventLoop, scheduler: Scheduler, name: str) -> None:
        self.loop = loop
        self.scheduler = scheduler
        self.name = name
        self.driver = AsyncioDriver(loop, scheduler)
        #: What has been started and has not ended.
        self.busy = Count()
        #: Done when the last coroutine has ended; None before `end`.
        self.ended: asyncio.Future[None] | None = None
        self._last: Task[None] | None = None
        self._process = os.getpid()
        self._thread = threading.get_ident()

    @property
    def closed(self) -> bool:
        """Whether nothing may be started any more."""
        return self._last is not None

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that opened the volume."""
        return os.getpid() != self._process

    @property
    def elsewhere(self) -> bool:
        """Whether this is another thread than the loop's, which may not enter its ring."""
        return threading.get_ident() != self._thread

    def check(self) -> None:
        """Raise ClosedError if the volume is closed or the parent's, RuntimeError in another loop."""
        if self.closed:
            raise ClosedError("the volume is closed", path=self.name)
        if self.forked:
            message = "the volume was opened by the parent process; a forked child must open it itself"
            raise ClosedError(message, path=self.name)
        self.check_loop()

    def check_loop(self) -> None:
        """Raise RuntimeError unless the loop that the volume was opened in is running here."""
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("the volume belongs to another event loop")

    def start(self, coroutine: Coroutine[Any, Any, T], path: object) -> asyncio.Future[T]:
        """What `coroutine` will return; its errors name `path`. It is begun at the end of this turn of the loop."""
        try:
            self.check()
        except BaseException:
            coroutine.close()
            raise
        future: asyncio.Future[T] = self.loop.create_future()
        self.busy.up()
        self.scheduler.spawn(self._counted(coroutine, future, path))
        self.driver.kick()
        return future

    def end(self, coroutine: Coroutine[Any, Any, None], path: object) -> asyncio.Future[None]:
        """The same for the last one: from now on nothing is started. It must wait for what is `busy` itself."""
        self.ended = self.loop.create_future()
        self._last = self.scheduler.spawn(self._report(coroutine, self.ended, path))
        self.driver.kick()
        return self.ended

    def finish(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run `coroutine` as the last, or the one that `end` was given, to its end, without the loop.

        For a loop that is closed, or about to be; in its thread.
        """
        driver = SyncDriver(self.scheduler)
        last = self._last
        if last is None:
            last = self._last = self.scheduler.spawn(coroutine)
        else:
            coroutine.close()
        driver.wait_until(lambda: last.done)
        last.result()

    async def _counted(self, coroutine: Coroutine[Any, Any, T], future: asyncio.Future[T], path: object) -> None:
        try:
            await self._report(coroutine, future, path)
        finally:
            self.busy.down()

    async def _report(self, coroutine: Coroutine[Any, Any, T], future: asyncio.Future[T], path: object) -> None:
        try:
            result = await coroutine
        except GeneratorExit:
            raise  # Thrown away with its loop: there is nobody to tell.
        except BaseException as error:
            settle(future, named(error, path) if isinstance(error, ODirectError) else error)
        else:
            if not (future.done() or self.loop.is_closed()):
                future.set_result(result)


def settle(future: asyncio.Future[Any], error: BaseException | None) -> None:
    """Tell the caller of an error, if he is still there."""
    if future.done() or future.get_loop().is_closed():
        return
    if isinstance(error, Exception):
        future.set_exception(error)
    else:
        future.cancel()
