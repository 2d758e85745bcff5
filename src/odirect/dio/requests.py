"""Requests that are started now and finish later: what `submit` and asyncio are made of (B07).

An aligned transfer inside the file is one bio, which is the request itself; any other, and one that
did not go through whole, becomes a task that goes through `dio.plainfile`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from odirect.base.errors import ODirectError, from_errno
from odirect.block.bio import ATOMIC, FUA, NOWAIT, READ, WRITE, Bio
from odirect.block.buffers import as_bytes_view
from odirect.block.device import Limits
from odirect.block.file_device import FileDevice, file_bytes
from odirect.dio.outcome import Outcome
from odirect.dio.plainfile import FileState, PlainFile
from odirect.ring._calls import span
from odirect.sched.scheduler import Scheduler

_NAMES = {READ: "reading", WRITE: "writing"}


class Request(Bio):
    """One transfer that was started.

    op, addr (the file's byte), length and tag are as they were given. Once it is done, `transferred`
    and `outcome` say how it went, or `exception` why it failed; `result()` gives the one or raises
    the other.
    """

    __slots__ = ("_notify", "exception", "outcome", "tag", "transferred")

    def __init__(
        self,
        op: int,
        offset: int,
        segments: tuple[memoryview, ...],
        length: int,
        flags: int,
        tag: object,
        notify: Callable[[Request], None],
    ) -> None:
        self.op = op
        self.addr = offset
        self.segments = segments
        self.length = length
        self.flags = flags
        self.error = 0
        self.done_bytes = 0
        self.private = None
        self.state = None
        self.tag = tag
        self.transferred = 0
        self.outcome: Outcome | None = None
        self.exception: BaseException | None = None
        self._notify = notify

    def result(self) -> int:
        """The number of bytes; raises the error if it failed, RuntimeError if it is not done."""
        if self.exception is not None:
            raise self.exception
        if self.outcome is None:
            raise RuntimeError("the request is still in flight")
        return self.transferred

    def settle(self, transferred: int, outcome: Outcome) -> None:
        """It is done."""
        self.transferred = transferred
        self.outcome = outcome
        self._notify(self)

    def fail(self, error: BaseException) -> None:
        """It has failed."""
        self.exception = error
        self._notify(self)


class Requests:
    """Starts requests on one open file, on one scheduler.

    expected: for READ and WRITE, the outcome of a transfer that goes as one bio.
    """

    def __init__(
        self,
        state: FileState,
        device: FileDevice | None,
        plain: PlainFile,
        scheduler: Scheduler,
        size_fd: int,
        flags: int,
        expected: dict[int, Outcome],
    ) -> None:
        self._state = state
        self._device = device
        self._plain = plain
        self._scheduler = scheduler
        self._size_fd = size_fd
        self._expected = expected
        self._flags = {READ: flags & ~(FUA | ATOMIC), WRITE: flags}
        self._limits: Limits | None = None
        self._masks = {READ: 0, WRITE: 0}
        self._memory_mask = 0
        self._most = 0
        self._size = file_bytes(size_fd)
        self.pending = 0
        self.slow_pending = 0

    def start(self, op: int, offset: int, buffer: object, tag: object, notify: Callable[[Request], None]) -> Request:
        """Start one transfer; `notify` is called once, with the request, when it is done (B07).

        Raises ValueError for a negative offset or a buffer that cannot be used; nothing is started then.
        """
        address, length = span(buffer, op == READ)
        flags = self._flags[op]
        device = self._device
        if device is not None:
            if self._limits is not self._state.limits:
                self._adopt(self._state.limits)
            if (
                not ((offset | length) & self._masks[op] or address & self._memory_mask)
                and 0 <= offset
                and 0 < length <= self._most
                and not flags & ATOMIC
                and (offset + length <= self._size or self._grown(offset + length))
                and op not in self._state.refused
            ):
                request = Request(op, offset, (buffer,), length, flags, tag, notify)  # type: ignore[arg-type]
                request.end = self._ended
                self.pending += 1
                device.submit(request)
                return request
        if offset < 0:
            raise ValueError(f"the offset is {offset}; it cannot be negative")
        view = as_bytes_view(buffer, writable=op == READ)
        request = Request(op, offset, (view,) if length else (), length, flags, tag, notify)
        self.pending += 1
        self._start_slow(request)
        return request

    def _adopt(self, limits: Limits) -> None:
        self._limits = limits
        self._masks = {READ: limits.read_align - 1, WRITE: limits.write_align - 1}
        self._memory_mask = limits.memory_align - 1
        self._most = limits.max_bio_bytes

    def _grown(self, end: int) -> bool:
        """Whether the file reaches to `end` by now: it may have grown since it was looked at."""
        self._size = file_bytes(self._size_fd)
        return end <= self._size

    def _ended(self, bio: Bio) -> None:
        """A bio that is a request has come back."""
        request = bio
        if not isinstance(request, Request):
            raise TypeError(f"{bio!r} is not a request")
        error = request.error
        if request.done_bytes == request.length and not error:
            self.pending -= 1
            request.settle(request.length, self._expected[request.op])
        elif (
            not error
            or error in (errno.EINVAL, errno.EOPNOTSUPP)
            or (error in (errno.EAGAIN, errno.EINTR) and not request.flags & NOWAIT)
        ):
            # Short or refused: the general way resumes, tightens, or falls back.
            self._start_slow(request)
        else:
            self.pending -= 1
            failure = from_errno(
                error, f"{_NAMES[request.op]} {request.length} bytes at {request.addr}", self._state.path
            )
            if request.op == WRITE and request.flags & FUA and self._state.failed_sync is None:
                self._state.failed_sync = str(failure)
            request.fail(failure)

    def _start_slow(self, request: Request) -> None:
        self.slow_pending += 1
        self._scheduler.spawn(self._slow(request))

    async def _slow(self, request: Request) -> None:
        segments = [as_bytes_view(segment, writable=request.op == READ) for segment in request.segments]
        call = self._plain.read if request.op == READ else self._plain.write
        try:
            moved = await call(request.addr, segments, request.length, request.flags)
        except BaseException as error:
            if isinstance(error, ODirectError) and error.filename is None:
                error.filename = self._state.path
            self.pending -= 1
            self.slow_pending -= 1
            request.fail(error)
        else:
            self.pending -= 1
            self.slow_pending -= 1
            request.settle(moved.transferred, moved.outcome)
