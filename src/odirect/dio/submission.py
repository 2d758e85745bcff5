"""Requests of one open file that a synchronous caller starts now and collects later: `submit` and `completions`.

A `Submission` pumps the scheduler in its caller's thread and hands out what has finished. What a request is
made of is its `Starter`'s business: `file_submission` is for a plain file, over a ring and scheduler of its
own; a file in a volume gives a starter and the driver of the volume.

A signal's handler may raise anywhere in here: then a request that was begun is given out by the next
`completions`, and nothing is given out twice.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from odirect.block.bio import READ, WRITE
from odirect.block.buffers import BufferPool
from odirect.block.cached_file import CachedFileDevice
from odirect.block.device import Limits
from odirect.block.file_device import FileDevice
from odirect.block.queue import RingQueue
from odirect.dio.here import POOL_CHUNK_BYTES, POOL_CHUNKS
from odirect.dio.outcome import Outcome
from odirect.dio.plainfile import FileState, PlainFile
from odirect.dio.requests import Request, Requests
from odirect.ring.choose import open_ring
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Scheduler

T = TypeVar("T")

#: Requests of `submit` that are given to the kernel at once; more are held back.
SUBMIT_DEPTH = 128
# Threads that do them where there is no io_uring.
_WORKERS = 8
_OPERATIONS = {"read": READ, "write": WRITE}


class Driver(Protocol):
    """What a submission needs of `sched.drive_sync.SyncDriver`."""

    def wait_until(self, done: Callable[[], object]) -> None:
        """Pump until `done()` is true."""
        ...

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, called inside; then what is ready is run."""
        ...


class Starter(Protocol):
    """Starts the requests of one open file; `dio.requests.Requests` is one."""

    @property
    def pending(self) -> int:
        """Requests that were started and are not done."""
        ...

    def start_now(self, op: int, offset: int, buffer: object, tag: object) -> Request | None:
        """A request that needs no task, started; None, with nothing done, for any other.

        Called without the driver, from the thread that submits; if a handler raises in it, `pending` is right.
        """
        ...

    def collect(self, finished: collections.deque[Request]) -> bool:
        """Wait for requests that need nothing run, and add them; False if it takes the driver to go on.

        Called without the driver, from the thread that submits; the requests are told to nobody else.
        """
        ...

    def start_task(self, op: int, offset: int, buffer: object, tag: object) -> Request:
        """Any other request, started as a task. Called inside the driver."""
        ...

    def resized(self, size: int) -> None:
        """The file has this many bytes now."""
        ...


class Submission:
    """Requests in flight of one open file, for `submit` and `completions`; of the thread that makes it.

    make: gives the starter, which must call what it is given once with every request that is done, inside
    the driver. check: raises what keeps the file from this operation (READ, WRITE). tell: is given every request
    that is done, first. release: called by `close` when nothing is in flight any more; its argument says whether
    this is the thread that made it.
    """

    def __init__(
        self,
        driver: Driver,
        make: Callable[[Callable[[Request], None]], Starter],
        *,
        check: Callable[[int], None],
        tell: Callable[[Request], None],
        release: Callable[[bool], None],
    ) -> None:
        self._driver = driver
        self._check = check
        self._tell = tell
        self._release = release
        self._thread = threading.get_ident()
        self._finished: collections.deque[Request] = collections.deque()
        self._requests = make(self._done)

    def submit(self, op: str, offset: int, buffer: object, tag: object) -> Request:
        """The request, started. See `File.submit`."""
        number = _OPERATIONS.get(op)
        if number is None:
            raise ValueError(f"operation {op!r}: use 'read' or 'write'")
        self._check(number)
        self._check_thread()
        request = self._requests.start_now(number, offset, buffer, tag)
        if request is not None:
            return request
        return self._driver.call(lambda: self._requests.start_task(number, offset, buffer, tag))

    def resized(self, size: int) -> None:
        """The file has been cut."""
        self._requests.resized(size)

    def settle(self) -> None:
        """Wait until nothing is in flight, if that is this thread's to do; `completions` gives it out later."""
        if self._thread == threading.get_ident():
            self._drain()

    def completions(self) -> Iterator[Request]:
        """Requests as they finish, until none is left. See `File.completions`."""
        finished = self._finished
        self._check_thread()
        while True:
            while finished:
                # No call from here to the `yield`: no handler can come in between and lose it.
                request = finished[0]
                del finished[0]
                yield request
            if not self._requests.pending:
                if finished:
                    continue  # A handler that used the file itself has waited for them.
                return
            try:
                collected = self._requests.collect(finished)
            finally:
                for request in finished:
                    self._tell(request)
            if not collected:
                self._driver.wait_until(self._has_finished)

    def close(self) -> None:
        """Wait for everything in flight and let go of what it ran on; requests nobody asked for are dropped."""
        if self._requests.pending:
            self._check_thread()
        try:
            self._drain()
        finally:
            self._release(self._thread == threading.get_ident())

    def _check_thread(self) -> None:
        if self._thread != threading.get_ident():
            raise RuntimeError("submit and completions belong to the thread that called submit first")

    def _drain(self) -> None:
        if self._requests.pending:
            self._driver.wait_until(lambda: not self._requests.pending)

    def _has_finished(self) -> object:
        return self._finished or not self._requests.pending

    def _done(self, request: Request) -> None:
        self._tell(request)
        self._finished.append(request)


def file_submission(
    state: FileState,
    direct_fd: int,
    cached_fd: int,
    flags: int,
    expected: tuple[Outcome, Outcome],
    *,
    strict: bool,
    ask_again: Callable[[], Limits],
    check: Callable[[int], None],
    tell: Callable[[Request], None],
) -> Submission:
    """A `Submission` for an open plain file or block device.

    direct_fd: negative where direct I/O is refused. The descriptors stay the caller's. expected: for READ and
    WRITE, the outcome of a transfer that the kernel takes as it is. The rest is as for `PlainFile` and `Submission`.
    """
    queue = RingQueue(open_ring(SUBMIT_DEPTH, workers=_WORKERS), open_polled=lambda: open_ring(iopoll=True))
    cached = CachedFileDevice(cached_fd)
    scheduler = Scheduler()
    scheduler.add_device(queue)
    scheduler.add_device(cached)
    device = FileDevice(queue, direct_fd, state.limits) if direct_fd >= 0 else None
    pool = BufferPool(POOL_CHUNK_BYTES, POOL_CHUNKS, ring=queue.ring)
    plain = PlainFile(state, device, cached, pool, strict=strict, ask_again=ask_again)

    def make(notify: Callable[[Request], None]) -> Requests:
        return Requests(state, device, plain, scheduler, cached_fd, flags, expected, notify)

    def release(own: bool) -> None:
        # Another thread may not enter the ring; closing it, with nothing in flight, gives the slot back too.
        if own and device is not None:
            device.close()
        queue.close()
        cached.close()

    return Submission(SyncDriver(scheduler), make, check=check, tell=tell, release=release)
