"""Requests on a file of a volume that are started now and finish later, as `dio.requests` has them for plain files.

A transfer that is aligned, inside the file, in one known run of the device and met by no cached page is
one bio. Any other, and one that did not go through whole, becomes a task that goes the general way.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import cast

from odirect.base.errors import ODirectError, from_errno
from odirect.block.bio import FUA, NOWAIT, READ, WRITE, Bio
from odirect.block.buffers import as_bytes_view
from odirect.dio.blockdev import REFUSALS
from odirect.dio.outcome import Kind, Outcome, Promise
from odirect.dio.piece import TRANSIENT, VERB
from odirect.dio.requests import Request
from odirect.fs.base import Access
from odirect.fs.file import NodeFile
from odirect.ring._calls import DirectHandle
from odirect.sched.scheduler import Scheduler

# Requests that are handed over together, where each need not wait for all that are started in a burst.
_HAND_OVER = 8
# `DirectHandle.fits` asks for a descriptor that could be used; nothing is transferred by it here.
_ANY_DESCRIPTOR = 0

_EXPECTED = (Outcome(Kind.DIRECT), Outcome(Kind.DIRECT, promise=Promise.DEVICE))


class VolumeRequest(Request):
    """A `Request` on a file of a volume."""

    __slots__ = ()

    def __init__(self, op: int, offset: int, length: int, buffer: object, tag: object) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.tag = tag


class NodeRequests:
    """Starts requests on one handle. A `dio.submission.Starter`.

    notify: called once with every request that is done, where completions are dispatched. guard: held while
    something is started, where several threads use the volume.
    """

    def __init__(
        self,
        file: NodeFile,
        scheduler: Scheduler,
        access: Access,
        flags: int,
        notify: Callable[[Request], None],
        *,
        guard: contextlib.AbstractContextManager[object] | None = None,
    ) -> None:
        self.pending = 0
        self.notify = notify
        self._file = file
        self._node = file.node
        self._device = file.node.home.device
        self._scheduler = scheduler
        self._access = access
        self._flags = (flags & ~FUA, flags)
        self._guard = guard if guard is not None else contextlib.nullcontext()
        self._unsent = 0
        limits = file.limits
        self._simple = DirectHandle(_ANY_DESCRIPTOR, limits.read_align, limits.write_align, limits.memory_align)
        # What is cached, or durable when it is done, takes more than one bio.
        self._may = (access != "buffered", access != "buffered" and not flags & FUA)

    def start(self, op: int, offset: int, buffer: object, tag: object) -> Request:
        """Start one transfer and return at once. Raises ValueError or TypeError for what cannot be one."""
        request = self.start_now(op, offset, buffer, tag)
        return request if request is not None else self.start_task(op, offset, buffer, tag)

    def start_now(self, op: int, offset: int, buffer: object, tag: object) -> Request | None:
        """See `Starter`."""
        if not self._may[op]:
            return None
        with self._guard:
            node = self._node
            self._simple.size_hint = node.size_bytes
            length = self._simple.fits(op, buffer, offset)
            if length <= 0 or not self._file.may(op):
                return None
            addr = node.place(op, offset, length)
            if addr < 0:
                return None
            view = as_bytes_view(buffer, writable=op == READ)
            request = VolumeRequest(op, offset, length, buffer, tag)
            bio = Bio(op, addr, (view,), length, self._flags[op], self._ended, request)
            if op == WRITE:
                node.touch()
            node.in_flight.up()
            self.pending += 1
            try:
                self._device.submit(bio)
            except BaseException:
                node.in_flight.down()
                self.pending -= 1
                raise
            self._unsent += 1
            if self._unsent == _HAND_OVER:
                self._unsent = 0
                self._device.commit()
        return request

    def start_task(self, op: int, offset: int, buffer: object, tag: object) -> Request:
        """See `Starter`."""
        offset = operator.index(offset)
        if offset < 0:
            raise ValueError(f"the offset is {offset}; it cannot be negative")
        view = as_bytes_view(buffer, writable=op == READ)
        request = VolumeRequest(op, offset, len(view), view, tag)
        self.pending += 1
        self._spawn(request)
        return request

    def resized(self, size: int) -> None:
        """See `Starter`. The node's own size is looked at for every request."""

    def _ended(self, bio: Bio) -> None:
        """The bio has come back. Runs in the dispatch; never waits."""
        request = cast(VolumeRequest, bio.private)
        node = self._node
        node.in_flight.down()
        if bio.op == WRITE and not node.pages.invalidate(request.offset, request.length):
            # A buffered reader has brought in what was there before (F20).
            self._spawn(request)
        elif bio.done_bytes == request.length and not bio.error:
            self._settle(request, request.length, _EXPECTED[bio.op])
        elif bio.done_bytes and bio.op == WRITE and bio.flags & NOWAIT:
            self._settle(request, bio.done_bytes, _EXPECTED[WRITE])  # Going on could end in "would block" (F08).
        elif bio.error and bio.error not in REFUSALS and (bio.error not in TRANSIENT or bio.flags & NOWAIT):
            doing = f"{VERB[bio.op]} {request.length} bytes at {request.offset}"
            self._fail(request, from_errno(bio.error, doing, self._file.name))
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

    def _settle(self, request: VolumeRequest, transferred: int, outcome: Outcome) -> None:
        self.pending -= 1
        request.transferred, request.outcome, request.exception = transferred, outcome, None
        self.notify(request)

    def _fail(self, request: VolumeRequest, error: BaseException) -> None:
        self.pending -= 1
        request.transferred, request.outcome, request.exception = 0, None, error
        self.notify(request)
