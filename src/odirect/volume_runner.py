"""Runs the coroutines of one volume for synchronous callers, in whichever thread they call.

All threads share the volume's scheduler (`sched.drive_sync`): entry is serialised, waiting is not. What
must not happen in the middle of a step is kept out: a file that is thrown away is closed with the next
call, and a forked child is refused.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from odirect.base.errors import ClosedError, CorruptionError, DeviceError, ODirectError
from odirect.dio.write_order import Crowd
from odirect.sched.drive_sync import Stalled, SyncDriver
from odirect.sched.scheduler import Scheduler, Task

T = TypeVar("T")


class Closable(Protocol):
    """What may be thrown away without having been closed."""

    async def close(self) -> None:
        """Let go."""
        ...


class Runner:
    """The way into one volume's scheduler. name: the volume's, for messages."""

    def __init__(self, scheduler: Scheduler, name: object) -> None:
        self.scheduler = scheduler
        self.name = name
        self._driver = SyncDriver(scheduler)
        self._inside = Crowd()
        self._process = os.getpid()
        self._abandoned: collections.deque[Closable] = collections.deque()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing may be run any more."""
        return self._closed

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that opened the volume."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise ClosedError if the volume is closed, or belongs to the parent process."""
        if self._closed:
            raise ClosedError("the volume is closed", path=self.name)
        if self.forked:
            raise ClosedError(
                "the volume was opened by the parent process; a forked child must open it itself", path=self.name
            )

    def check_outside(self) -> None:
        """Raise RuntimeError if this thread is in the middle of a call (a signal's handler is)."""
        if threading.get_ident() in self._inside:
            raise RuntimeError("the volume is used in the middle of a call of the same thread")

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns. Raises ClosedError, and RuntimeError in the middle of a call of this thread."""
        try:
            self.check_outside()
            return self._inside.run(lambda: self._run(coroutine))
        finally:
            if not getattr(coroutine, "cr_suspended", False):
                coroutine.close()  # It was never begun.

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Task[T]:
        """The task of `coroutine`, run as far as it goes without waiting; `run` takes it on from there."""
        try:
            self.check_outside()

            def unless_closed() -> Task[T]:
                self.check()
                return self._start(coroutine)

            return self._inside.run(unless_closed)
        except BaseException:
            if not getattr(coroutine, "cr_suspended", False):
                coroutine.close()
            raise

    def call(self, function: Callable[[], T]) -> T:
        """What the plain `function` returns, called where tasks run; what it queued is handed over."""
        return self._call(function, self._driver.call)

    def call_quickly(self, function: Callable[[], T]) -> T:
        """`call` of what makes no task ready, and may be left anywhere by what a signal's handler raises."""
        return self._call(function, self._driver.call_quickly)

    def _call(self, function: Callable[[], T], call: Callable[[Callable[[], T]], T]) -> T:
        self.check_outside()

        def unless_closed() -> T:
            self.check()
            return call(function)

        return self._inside.run(unless_closed)

    def work_outside(self, threads: int) -> None:
        """So many threads more (or fewer) do I/O of their own that tasks may wait for. Within `run` or `call`."""
        self._driver.outside += threads

    def wait_until(self, done: Callable[[], object]) -> None:
        """Take what was started on until `done()` is true. What a signal's handler raises leaves at once."""
        self.check_outside()

        def wait() -> None:
            self.check()
            self._driver.wait_until(done)

        self._inside.run(wait)

    def abandon(self, what: Closable) -> None:
        """Close `what` with the next call. For `__del__`, which runs anywhere, also within a step."""
        if not self._closed and not self.forked:
            self._abandoned.append(what)

    def close(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Wait until no thread is inside, then run `coroutine` as the last, to its end.

        What a signal's handler raises is raised when it has ended; the second time, at once.
        """
        try:
            self.check_outside()
            self.check()
            self._closed = True
            try:
                self._inside.wait()
                self._close_abandoned()
            except BaseException:
                self._closed = False
                raise
            self._run_to_the_end(coroutine)
            self._driver.close()
        finally:
            if not getattr(coroutine, "cr_suspended", False):
                coroutine.close()

    def _run_to_the_end(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._start(coroutine)
        interrupted: BaseException | None = None
        while not task.done:
            try:
                self._driver.wait_until(lambda: task.done)
            except BaseException as error:
                if interrupted is not None or isinstance(error, Stalled):
                    raise
                interrupted = error
        if interrupted is not None:
            raise interrupted
        task.result()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self.check()
        self._close_abandoned()
        return self._driver.run(coroutine)

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Task[T]:
        scheduler = self.scheduler

        def begin() -> Task[T]:
            task = scheduler.spawn(coroutine)
            scheduler.run_ready()
            scheduler.commit()
            return task

        return self._driver.call(begin)

    def _close_abandoned(self) -> None:
        while self._abandoned:
            try:
                self._driver.run(self._abandoned.popleft().close())
            except ODirectError:
                pass  # There is nobody left to tell.


def named(error: ODirectError, path: object) -> ODirectError:
    """`error`, told of the path that the caller gave; what the volume or its device did keeps the volume's name."""
    if error.filename is None or not isinstance(error, (DeviceError, CorruptionError, ClosedError)):
        error.filename = path
    return error
