"""What a synchronous caller's requests run on: one scheduler, ring and pool a thread.

A thread that calls waits for its own requests only, so threads share nothing, and the ring may be
one that a single thread enters, which is the cheapest.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from odirect.block.buffers import BufferPool
from odirect.block.queue import RingQueue
from odirect.ring.choose import open_ring, thread_ring
from odirect.ring.contract import Ring
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Pollable, Scheduler

T = TypeVar("T")

#: Size and number of the private buffers that bounced requests of one thread or loop share.
POOL_CHUNK_BYTES = 1 << 20
POOL_CHUNKS = 8


class Here:
    """One thread's scheduler, queue and pool."""

    def __init__(self) -> None:
        self.queue = RingQueue(thread_ring(), open_polled=lambda: open_ring(iopoll=True))
        self.pool = BufferPool(POOL_CHUNK_BYTES, POOL_CHUNKS, ring=self.queue.ring)
        self.scheduler = Scheduler()
        self.scheduler.add_device(self.queue)
        self._driver = SyncDriver(self.scheduler)

    def run(self, coroutine: Coroutine[Any, Any, T], *devices: Pollable) -> T:
        """What `coroutine` returns; `devices` are polled, besides the queue, while it runs."""
        for device in devices:
            self.scheduler.add_device(device)
        try:
            return self._driver.run(coroutine)
        finally:
            for device in devices:
                self.scheduler.remove_device(device)

    def idle_ring(self) -> Ring:
        """The ring, with nothing in flight: what an interrupted call left behind is waited for first."""
        while self.queue.in_flight:
            self.scheduler.dispatch(self.queue.poll(-1))
            self.scheduler.run_ready()
            self.scheduler.commit()
        return self.queue.ring


_threads = threading.local()


def here() -> Here:
    """This thread's own, made on first use; anew after a fork."""
    found: Here | None = getattr(_threads, "here", None)
    if found is None:
        found = _threads.here = Here()
    return found


def forget() -> None:
    """Give up this thread's own; the next call makes it anew.

    For a forked child, and after an exception that came from outside (a signal's handler): tasks may
    have been stopped anywhere, with locks held. What is in flight is waited for when it is freed.
    """
    _threads.__dict__.clear()


os.register_at_fork(after_in_child=forget)
