"""Copying trees into and out of a volume of an event loop.

The copying itself (`volume_copy_in`, `volume_copy_out`) is written for callers that wait, and much of it is system
calls on the host that block. So it is done in a thread of its own, and only what it has the volume do is handed to the
loop's thread, which alone may enter the volume's scheduler. A thread that waits for a loop that has been closed gives
up with ClosedError.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, cast

from odirect.aio_runner import LoopRunner
from odirect.base.errors import ClosedError
from odirect.fs.base import FileSystem
from odirect.fs.tree import Owner
from odirect.sched.scheduler import Task
from odirect.volume_copy import Progress, TreeReport
from odirect.volume_names import VolumeNames
from odirect.volume_runner import Runner

T = TypeVar("T")

# How often a thread that waits looks whether the loop is still there, in seconds: nobody tells it.
_LOOK_S = 1.0


class Stopped(Exception):
    """Ends a copy that nobody waits for any more."""


class _Answer(Generic[T]):
    """What was handed to the loop's thread will give: like a `Task`, for another thread."""

    def __init__(self) -> None:
        self.done = False
        self._value: T | None = None
        self._error: BaseException | None = None

    def settle(self, value: T | None, error: BaseException | None) -> None:
        """It is there."""
        self._value, self._error, self.done = value, error, True

    def result(self) -> T:
        """What it is; raises what it raised."""
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


class _ThreadRunner(Runner):
    """The way into a volume of a loop from another thread: what copying needs of a `Runner`, and nothing else."""

    def __init__(self, inner: LoopRunner) -> None:
        self.scheduler = inner.scheduler
        self.name = inner.name
        self._inner = inner
        self._changed = threading.Condition()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns, run in the loop's thread."""
        task = self.start(coroutine)
        self.wait_until(lambda: task.done)
        return task.result()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Task[T]:
        """The task of `coroutine`, which is begun by the loop when it comes round."""
        answer = _Answer[T]()

        async def answered() -> None:
            try:
                value, error = await coroutine, None
            except GeneratorExit:
                raise
            except BaseException as raised:
                value, error = None, raised
            self._settle(answer, value, error)

        def begin() -> None:
            whole = answered()
            try:
                ended = self._inner.start(whole, self.name)
            except BaseException as error:
                coroutine.close()
                self._settle(answer, None, error)
            else:
                ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

        self._hand_over(begin, coroutine)
        return cast("Task[T]", answer)

    def call_in_loop(self, function: Callable[[], T]) -> T:
        """What the plain `function` returns, called by the loop."""
        answer = _Answer[T]()

        def call() -> None:
            try:
                value, error = function(), None
            except BaseException as raised:
                self._settle(answer, None, raised)
            else:
                self._settle(answer, value, error)

        self._hand_over(call)
        self.wait_until(lambda: answer.done)
        return answer.result()

    def wait_until(self, done: Callable[[], object]) -> None:
        """Wait until `done()` is true of what was handed over."""
        with self._changed:
            while not self._changed.wait_for(done, _LOOK_S):
                if self._inner.loop.is_closed():
                    raise self._gone()

    def _hand_over(self, function: Callable[[], None], coroutine: Coroutine[Any, Any, Any] | None = None) -> None:
        try:
            self._inner.loop.call_soon_threadsafe(function)
        except RuntimeError:
            if coroutine is not None:
                coroutine.close()
            raise self._gone() from None

    def _settle(self, answer: _Answer[T], value: T | None, error: BaseException | None) -> None:
        with self._changed:
            answer.settle(value, error)
            self._changed.notify_all()

    def _gone(self) -> ClosedError:
        return ClosedError("the event loop that the volume belongs to was closed during a copy", path=self.name)


class Copying:
    """A copy in a thread of its own. ended: what comes of it, a future of the volume's loop."""

    def __init__(
        self,
        file_system: FileSystem,
        inner: LoopRunner,
        owner: Owner,
        progress: Progress | None,
        copy: Callable[[VolumeNames, Progress], TreeReport],
    ) -> None:
        """copy: called with the volume as that thread has it, and the progress that it must tell.

        progress: called in the loop's thread; what it raises ends the copy.
        """
        inner.check()
        self.ended: asyncio.Future[TreeReport] = inner.loop.create_future()
        self._loop = inner.loop
        self._runner = _ThreadRunner(inner)
        self._progress = progress
        self._stopped = False
        volume = VolumeNames(file_system, self._runner, reasons={}, seen=lambda _, outcome: outcome, owner=owner)
        threading.Thread(target=self._work, args=(volume, copy), name="odirect-copy", daemon=True).start()

    def stop(self) -> None:
        """Have it end at the next chunk, and clean up after itself."""
        self._stopped = True

    def _work(self, volume: VolumeNames, copy: Callable[[VolumeNames, Progress], TreeReport]) -> None:
        report: TreeReport | None = None
        error: BaseException | None = None
        try:
            report = copy(volume, self._tell)
        except BaseException as raised:
            error = raised
        try:
            self._loop.call_soon_threadsafe(self._end, report, error)
        except RuntimeError:
            pass  # The loop was closed: there is nobody to tell.

    def _tell(self, done: int, total: int) -> None:
        progress = self._progress
        if self._stopped:
            raise Stopped
        if progress is not None:
            self._runner.call_in_loop(lambda: progress(done, total))

    def _end(self, report: TreeReport | None, error: BaseException | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(cast("TreeReport", report))
        elif isinstance(error, Exception) and not isinstance(error, (StopIteration, Stopped)):
            self.ended.set_exception(error)
        else:
            self.ended.cancel()
