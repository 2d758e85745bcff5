"""Requests that are started now and finish later: what `submit` and asyncio are made of (B07).

An aligned transfer inside the file is one operation on the ring, with the request itself as its tag:
nothing else is made for it. Any other, and one that did not go through whole, becomes a task that
goes through `dio.plainfile`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

from odirect.base import trace
from odirect.base.errors import DeviceError, ODirectError, from_errno
from odirect.base.units import checked_offset
from odirect.block.bio import ATOMIC, FUA, HIPRI, NOWAIT, READ, WRITE
from odirect.block.buffers import as_bytes_view
from odirect.block.device import Limits
from odirect.block.file_device import FileDevice, file_bytes, transfer_flags
from odirect.dio.blockdev import REFUSALS
from odirect.dio.outcome import Outcome
from odirect.dio.piece import TRANSIENT, VERB
from odirect.dio.plainfile import FileState, PlainFile
from odirect.ring._calls import DirectHandle
from odirect.sched.scheduler import Scheduler


class Request:
    """One transfer that was started.

    op (0 read, 1 write), offset, length, buffer and tag are as they were given; the buffer is the
    device's until the request is done. Then `result()` gives the number of bytes, or raises the
    error; `outcome` says which way it went (None if it failed).
    """

    __slots__ = ("_requests", "buffer", "exception", "length", "offset", "op", "outcome", "tag", "transferred")

    transferred: int
    outcome: Outcome | None
    exception: BaseException | None

    def __init__(self, requests: Requests, op: int, offset: int, length: int, buffer: object, tag: object) -> None:
        self._requests = requests
        self.op = op
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.tag = tag

    @property
    def done(self) -> bool:
        """Whether it has finished or failed."""
        return hasattr(self, "transferred")

    def result(self) -> int:
        """The number of bytes; raises the error if it failed, RuntimeError if it is not done."""
        try:
            error = self.exception
        except AttributeError:
            raise RuntimeError("the request is still in flight") from None
        if error is not None:
            raise error
        return self.transferred

    def finish(self, result: int) -> None:
        """The ring's answer has come. For `RingQueue`."""
        requests = self._requests
        if self.op:
            requests.order.quick.down()
        if result == self.length:
            requests.pending -= 1
            self.transferred = result
            self.outcome = requests.expected[self.op]
            self.exception = None
            requests.notify(self)
        else:
            requests.go_on(self, result)

    def __repr__(self) -> str:
        state = "in flight"
        if self.done:
            state = f"{self.transferred} bytes, {self.outcome}" if self.exception is None else repr(self.exception)
        return f"<Request {VERB[self.op]} {self.length} bytes at {self.offset}: {state}>"


class Started:
    """The requests of one open file that were started and are not done; `notify` is told once of each that is."""

    def __init__(self, notify: Callable[[Request], None]) -> None:
        self.notify = notify
        #: How many they are.
        self.pending = 0

    def _settle(self, request: Request, transferred: int, outcome: Outcome) -> None:
        self.pending -= 1
        request.transferred, request.outcome, request.exception = transferred, outcome, None
        self.notify(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        self.pending -= 1
        request.transferred, request.outcome, request.exception = 0, None, error
        self.notify(request)


#: Requests that are handed over together, where each need not wait for all that are started in a burst.
_HAND_OVER = 4


class Requests(Started):
    """Starts requests on one open file, on one scheduler and ring.

    device: the file past the page cache, None where that is refused; plain: for all that is not
    simple; notify: called once with every request that is done; expected: for READ and WRITE, the
    outcome of a transfer that the kernel takes as it is.
    """

    def __init__(
        self,
        state: FileState,
        device: FileDevice | None,
        plain: PlainFile,
        scheduler: Scheduler,
        size_fd: int,
        flags: int,
        expected: tuple[Outcome, Outcome],
        notify: Callable[[Request], None],
    ) -> None:
        super().__init__(notify)
        self.expected = expected
        # Counted from 0 where a burst is handed over in parts; from past that number it never comes to it.
        self._unsent = _HAND_OVER + 1
        self._on_uring = False
        #: Those that are tasks.
        self.tasks = 0
        self._state = state
        self.order = plain.order
        self._plain = plain
        self._scheduler = scheduler
        self._size_fd = size_fd
        self._flags = (flags & ~(FUA | ATOMIC), flags)
        # What atomic and polled transfers need, the general way knows.
        simple = device is not None and not flags & ATOMIC and not (flags & HIPRI and state.limits.poll)
        simple = simple and READ not in state.refused
        self._simple = DirectHandle(device.fd if simple and device is not None else -1, 1, 1, 1)
        self._limits: Limits | None = None
        if device is not None:
            self._gather = device.queue.gather
            self._queue = device.queue.ring.queue
            self._holds = device.queue.ring.holds
            # A ring on threads may do the work in `commit`, and a request must return at once.
            self._on_uring = device.queue.ring.kind == "io_uring"
            if self._on_uring:
                self._unsent = 0
                self._commit = device.queue.ring.commit
            self._handle = device.handle
        self._rwf = tuple(transfer_flags(flags & ~HIPRI) for flags in self._flags)
        self._adopt(state.limits)
        self._simple.size_hint = file_bytes(size_fd)

    def start(self, op: int, offset: int, buffer: object, tag: object) -> Request:
        """Start one transfer and return at once; it is handed over with the ring's next commit (B07).

        Raises ValueError for a negative offset or a buffer that cannot be used, TypeError for what
        is no buffer; nothing is started then.
        """
        request = self.start_now(op, offset, buffer, tag)
        return request if request is not None else self.start_task(op, offset, buffer, tag)

    def start_now(self, op: int, offset: int, buffer: object, tag: object) -> Request | None:
        """Start a transfer that is simple; None, with nothing done, if it is not.

        When a signal's handler raises in here, the transfer is counted if it was begun, and not otherwise.
        """
        length = self._simple.fits(op, buffer, offset)
        if length <= 0 or self._limits is not self._state.limits or not (op == READ or self._can_write_now()):
            return None
        if trace.active is not None:
            return None  # The general way tells what it does.
        request = Request(self, op, offset, length, buffer, tag)
        # No call from here until the ring has it: no handler can come in between.
        self.pending += 1
        if op == WRITE:
            self.order.quick.value += 1
        try:
            self._queue(op, self._handle, (buffer,), offset, length, self._rwf[op], request)
        except BaseException:
            if not self._holds(request):
                self.pending -= 1
                if op == WRITE:
                    self.order.quick.down()
            raise
        self._unsent += 1
        if self._unsent == _HAND_OVER:
            # The device begins while the caller goes on, instead of waiting for the last of a burst.
            self._unsent = 0
            self._commit()
        return request

    def collect(self, finished: collections.deque[Request]) -> bool:
        """Wait for what was started without a task, and put it on `finished`; False if that takes the scheduler.

        For who has the ring for himself, in place of polling and dispatching. `notify` is told of nothing here;
        a handler's exception loses nothing.
        """
        # A ring on threads has locks written in Python, where a handler's exception leaves one locked.
        if self.tasks or not self._on_uring:
            return False
        answers = self._gather()
        if answers is None:
            return False
        pending = self.pending
        while answers:
            request, result = answers[0]
            if type(request) is not Request or result != request.length:
                return self.pending < pending
            # No call from here on: no handler can come in between.
            del answers[0]
            request.transferred = result
            request.outcome = self.expected[request.op]
            request.exception = None
            self.pending -= 1
            if request.op:
                # Nobody waits for it to become zero: that would be a task.
                self.order.quick.value -= 1
            finished += (request,)
        return True

    def go_on(self, request: Request, result: int) -> None:
        """Finish, or fail, a request that the kernel did not do whole."""
        error = max(0, -result)
        waits = not self._flags[request.op] & NOWAIT
        if result > 0 and request.op == WRITE and not waits:
            # Going on could end in "would block", after a part was written (F08).
            self._settle(request, result, self.expected[WRITE])
            return
        if not error or error in REFUSALS or (error in TRANSIENT and waits):
            self._spawn(request)
            return
        failure = from_errno(error, f"{VERB[request.op]} {request.length} bytes at {request.offset}", self._state.path)
        if request.op == WRITE and self._flags[WRITE] & FUA and isinstance(failure, DeviceError):
            self._state.remember_failed_sync(failure)
        self._fail(request, failure)

    def resized(self, size: int) -> None:
        """The file has this many bytes now: what used to be inside it may be past its end (F02)."""
        self._simple.size_hint = size

    def _can_write_now(self) -> bool:
        """Whether a write may go on the ring by itself."""
        state = self._state
        return (
            not self.order.merging
            and WRITE not in state.refused
            and (state.failed_sync is None or not self._flags[WRITE] & FUA)
        )

    def start_task(self, op: int, offset: int, buffer: object, tag: object) -> Request:
        """Start what `start_now` did not. Raises what `start` does; must not be left by a handler's exception."""
        limits = self._state.limits
        size = file_bytes(self._size_fd)
        if size != self._simple.size_hint or limits is not self._limits:
            # The file has grown, or turned out to be choosier; now it may be simple after all.
            self._simple.size_hint = size
            self._adopt(limits)
            request = self.start_now(op, offset, buffer, tag)
            if request is not None:
                return request
        offset = checked_offset(offset)
        view = as_bytes_view(buffer, writable=op == READ)
        request = Request(self, op, offset, len(view), view, tag)
        self.pending += 1
        self._spawn(request)
        return request

    def _adopt(self, limits: Limits) -> None:
        simple = self._simple
        self._limits = limits
        simple.read_align, simple.write_align = limits.read_align, limits.write_align
        simple.memory_align = limits.memory_align

    def _spawn(self, request: Request) -> None:
        self.tasks += 1
        self._scheduler.spawn(self._generally(request))

    async def _generally(self, request: Request) -> None:
        call = self._plain.read if request.op == READ else self._plain.write
        try:
            view = as_bytes_view(request.buffer, writable=request.op == READ)
            segments = [view] if request.length else []
            moved = await call(request.offset, segments, request.length, self._flags[request.op])
        except BaseException as error:
            if isinstance(error, ODirectError) and error.filename is None:
                error.filename = self._state.path
            self.tasks -= 1
            self._fail(request, error)
        else:
            if request.op in self._state.refused:
                self._simple.fd = -1
            self.tasks -= 1
            self._settle(request, moved.transferred, moved.outcome)
