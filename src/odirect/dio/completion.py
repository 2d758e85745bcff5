"""Completions that must wait for something, and so need a task of their own (G05)."""

from __future__ import annotations

import collections
from collections.abc import Coroutine
from typing import Any

from odirect.sched.scheduler import Scheduler, Task


class DeferredQueue:
    """A volume's deferred completions, done one after the other by one task.

    The task is there only while there is something to do, so nothing has to be ended with the volume.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiting: collections.deque[Coroutine[Any, Any, None]] = collections.deque()
        self._worker: Task[None] | None = None

    def put(self, completion: Coroutine[Any, Any, None]) -> None:
        """Run `completion`, which must not raise, after those that were put before it."""
        self._waiting.append(completion)
        if self._worker is None:
            self._worker = self._scheduler.spawn(self._work(), "deferred completions")

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting or running."""
        return self._worker is None

    async def _work(self) -> None:
        while self._waiting:
            await self._waiting.popleft()
        # No await lies between the last look and this, so nothing can be put and forgotten.
        self._worker = None
