"""Requests on a file of a volume that are started now and finish later, as `dio.requests` has them for plain files.

A transfer that is aligned, inside the file, in one known run of the device and met by no cached page is
one bio. Any other, and one that did not go through whole, becomes a task that goes the general way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from odirect.base import trace
from odirect.base.errors import ODirectError, from_errno
from odirect.base.units import checked_offset
from odirect.block.bio import FUA, HIPRI, NOWAIT, READ, WRITE, Bio
from odirect.block.buffers import as_bytes_view
from odirect.block.file_device import FileDevice, transfer_flags
from odirect.dio.blockdev import REFUSALS
from odirect.dio.outcome import Kind, Outcome, Promise
from odirect.dio.piece import TRANSIENT, VERB
from odirect.dio.requests import Request, Started
from odirect.fs.base import Access
from odirect.fs.file import NodeFile
from odirect.ring._calls import DirectHandle
from odirect.sched.scheduler import Scheduler

# Requests that are handed over together, where each need not wait for all that are started in a burst: making one
# takes so long that the device would wait for the next.
_HAND_OVER = 2
# One of so many bytes keeps the device busy longer than it takes to hand it over.
_AT_ONCE_BYTES = 64 << 10
# `DirectHandle.fits` asks for a descriptor that could be used; nothing is transferred by it here.
_ANY_DESCRIPTOR = 0

_DIRECT_READ = Outcome(Kind.DIRECT)
_EXPECTED = (_DIRECT_READ, Outcome(Kind.DIRECT, promise=Promise.DEVICE))


class VolumeRequest(Request):
    """A `Request` on a file of a volume."""

    __slots__ = ("_starter",)

    def __init__(self, starter: NodeRequests, op: int, offset: int, length: int, buffer: object, tag: object) -> None:
        self._starter = starter
        self.op = op
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.tag = tag

    def finish(self, result: int) -> None:
        """The ring's answer has come, to a request that is on it without a bio. For `RingQueue`."""
        starter = self._starter
        if result != self.length or self.op:
            starter.came_back(self, max(0, result), max(0, -result))
            return
        in_flight = starter.in_flight
        if in_flight.value > 1:
            in_flight.value -= 1
        else:
            in_flight.down()
        starter.pending -= 1
        self.transferred = result
        self.outcome = _DIRECT_READ
        self.exception = None
        starter.notify(self)


class NodeRequests(Started):
    """Starts requests on one handle. A `dio.submission.Starter`.

    notify: called once with every request that is done, where completions are dispatched. shared: several threads
    use the volume; who starts something has its lock then.
    """

    def __init__(
        self,
        file: NodeFile,
        scheduler: Scheduler,
        access: Access,
        flags: int,
        notify: Callable[[Request], None],
        *,
        shared: bool = False,
    ) -> None:
        super().__init__(notify)
        self._file = file
        self._node = file.node
        self.in_flight = file.node.in_flight
        self._device = file.node.home.device
        self._scheduler = scheduler
        self._access = access
        self._flags = (flags & ~FUA, flags)
        self._shared = shared
        self._unsent = 0
        limits = file.limits
        self._simple = DirectHandle(_ANY_DESCRIPTOR, limits.read_align, limits.write_align, limits.memory_align)
        # A driver that several threads share polls without its lock; else the request itself can be on the ring, and
        # is told its answer there, which spares it a bio.
        self._queue: Callable[..., None] | None = None
        self._holds: Callable[[object], bool] = lambda tag: False
        self._commit = self._device.commit
        #: Whether a signal's handler may raise anywhere in `begin`. A ring on threads has locks written in Python.
        self.may_be_left = False
        if isinstance(self._device, FileDevice) and not flags & HIPRI:
            ring = self._device.queue.ring
            self._queue, self._holds, self._commit = ring.queue, ring.holds, ring.commit
            self.may_be_left = ring.kind == "io_uring"
            self._handle = self._device.handle
            self._rwf = (transfer_flags(self._flags[READ]), transfer_flags(self._flags[WRITE]))
        # What is cached, or durable when it is done, takes more than one bio.
        self._may = (access != "buffered", access != "buffered" and not flags & FUA)

    def start(self, op: int, offset: int, buffer: object, tag: object) -> Request:
        """Start one transfer and return at once. Raises ValueError or TypeError for what cannot be one."""
        request = self.start_now(op, offset, buffer, tag)
        return request if request is not None else self.start_task(op, offset, buffer, tag)

    def start_now(self, op: int, offset: int, buffer: object, tag: object) -> Request | None:
        """See `Starter`."""
        return self.begin(op, offset, buffer, tag) if self._file.may(op) else None

    def may_begin(self, op: int) -> bool:
        """Whether any request of this operation can be one bio."""
        return self._may[op]

    def begin(self, op: int, offset: int, buffer: object, tag: object) -> Request | None:
        """`start_now` for a caller who knows that the handle is open.

        When a signal's handler raises in here, the transfer is counted if it was begun, and not otherwise.
        """
        if not self._may[op] or trace.active is not None:
            return None  # What is traced goes the general way, which tells what it does.
        node = self._node
        simple = self._simple
        simple.size_hint = node.size_bytes
        length = simple.fits(op, buffer, offset)
        if length <= 0 or (op == WRITE and not self._file.may(op)):
            return None
        addr = node.place(op, offset, length)
        if addr < 0:
            return None
        request = VolumeRequest(self, op, offset, length, buffer, tag)
        queue = self._queue
        sent: object = request
        if queue is None or self._shared:
            view = as_bytes_view(buffer, writable=op == READ)
            sent = Bio(op, addr, (view,), length, self._flags[op], self._ended, request)
        if op == WRITE:
            node.touch()
        # No call from here until the ring has it: no handler can come in between.
        if op == WRITE:
            node.overwriting.value += 1
        self.in_flight.value += 1
        self.pending += 1
        try:
            if queue is not None:
                queue(op, self._handle, (buffer,), addr, length, self._rwf[op], sent)
            else:
                self._device.submit(cast(Bio, sent))
        except BaseException:
            if not self._holds(sent):
                if op == WRITE:
                    node.overwriting.down()
                self.in_flight.down()
                self.pending -= 1
            raise
        self._unsent += 1
        if self._unsent >= _HAND_OVER or length >= _AT_ONCE_BYTES:
            self._unsent = 0
            self._commit()
        return request

    def start_task(self, op: int, offset: int, buffer: object, tag: object) -> Request:
        """See `Starter`."""
        offset = checked_offset(offset)
        view = as_bytes_view(buffer, writable=op == READ)
        request = VolumeRequest(self, op, offset, len(view), view, tag)
        self.pending += 1
        self._spawn(request)
        return request

    def resized(self, size: int) -> None:
        """See `Starter`. The node's own size is looked at for every request."""

    def _ended(self, bio: Bio) -> None:
        """The bio has come back. Runs in the dispatch; never waits."""
        self.came_back(cast(VolumeRequest, bio.private), bio.done_bytes, bio.error)

    def came_back(self, request: VolumeRequest, done: int, error: int) -> None:
        """The device has done so many bytes of a request, or said this errno. Never waits."""
        node = self._node
        op = request.op
        self.in_flight.down()
        if op == WRITE and not node.overwritten(request.offset, request.length):
            # A page of it was changed meanwhile; it may have what was there before (F20).
            self._spawn(request)
        elif done == request.length and not error:
            self._settle(request, done, _EXPECTED[op])
        elif done and op == WRITE and self._flags[op] & NOWAIT:
            self._settle(request, done, _EXPECTED[WRITE])  # Going on could end in "would block" (F08).
        elif error and error not in REFUSALS and (error not in TRANSIENT or self._flags[op] & NOWAIT):
            doing = f"{VERB[op]} {request.length} bytes at {request.offset}"
            self._fail(request, from_errno(error, doing, self._file.name))
        else:
            self._spawn(request)

    def _spawn(self, request: VolumeRequest) -> None:
        self._scheduler.spawn(self._generally(request))

    async def _generally(self, request: VolumeRequest) -> None:
        file = self._file
        try:
            view = as_bytes_view(request.buffer, writable=request.op == READ)
            segments = [view] if request.length else []
            call = file.read if request.op == READ else file.write
            done = await call(request.offset, segments, access=self._access, flags=self._flags[request.op])
        except BaseException as error:
            if isinstance(error, ODirectError) and error.filename is None:
                error.filename = file.name
            self._fail(request, error)
        else:
            self._settle(request, done.transferred, done.outcome)
