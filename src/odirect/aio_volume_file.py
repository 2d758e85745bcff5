"""A file inside a volume, for asyncio: what `odirect.aio.File` is for one that the kernel serves."""

from __future__ import annotations

import asyncio
import io
import operator
import os
import warnings
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

from odirect.aio_runner import LoopRunner, settle
from odirect.base.errors import ClosedError, ODirectError, UnsupportedError
from odirect.block.bio import FUA, READ, WRITE
from odirect.block.buffers import as_bytes_view, empty
from odirect.block.device import Limits
from odirect.dio.mapping import Extent
from odirect.dio.outcome import Outcome, Tallies, Tally
from odirect.dio.requests import Request
from odirect.fs.base import Access
from odirect.fs.base import VolumeFile as Handle
from odirect.fs.file import NodeFile
from odirect.fs.requests import NodeRequests
from odirect.sched.locks import Count
from odirect.sched.traps import Event, shielded
from odirect.volume_file import Buffer, OpenMode
from odirect.volume_runner import named

T = TypeVar("T")


class Home(Protocol):
    """What an open file needs of its volume."""

    runner: LoopRunner

    def abandon(self, file: OpenFile) -> None:
        """Close a file that nobody has any more, in the loop's thread."""
        ...

    def closed_file(self, file: OpenFile) -> None:
        """It has been closed."""
        ...


class OpenFile:
    """The part of an open file that what is in flight refers to: it does not keep the caller's object, nor his volume.

    So those can be thrown away, and close what they stand for, while something is in flight, in a loop that has ended.
    """

    def __init__(
        self,
        home: Home,
        handle: Handle,
        path: str | bytes,
        access: Access,
        flags: int,
        seen: Callable[[int, Outcome], Outcome] | None,
    ) -> None:
        """seen: what becomes of an outcome by the image's own file system; None if nothing does."""
        self.home = home
        self.runner = home.runner
        self.handle = handle
        self.name = path
        self.access: Access = access
        self.closed = False
        self.tallies = Tallies()
        self.busy = Count()
        self.requests: NodeRequests | None = None
        if isinstance(handle, NodeFile):
            self.requests = NodeRequests(handle, home.runner.scheduler, access, flags, self._done)
        self._flags = (flags & ~FUA, flags)
        self._seen = seen
        self._idle: Event | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """What `coroutine` will return; `shut` waits for it."""
        if self.closed:
            coroutine.close()
            raise ClosedError("the file is closed", path=self.name)
        counted = self._counted(coroutine)
        self.busy.up()
        try:
            return self.runner.start(counted, self.name)
        except BaseException:
            coroutine.close()
            self.busy.down()
            raise

    async def move(self, op: int, offset: int, segments: list[memoryview]) -> int:
        """One request, counted; how many bytes."""
        segments = [segment for segment in segments if len(segment)]
        call = self.handle.read if op == READ else self.handle.write
        done = await call(offset, segments, access=self.access, flags=self._flags[op])
        outcome = done.outcome if self._seen is None else self._seen(op, done.outcome)
        self.tallies.add(outcome, done.transferred)
        return done.transferred

    async def clear(self, offset: int, length: int, *, grow: bool) -> None:
        """Make a range read as zeroes; grow: the file too, where the range ends past it."""
        await self.handle.punch(offset, length)
        if grow and offset + length > self.handle.size_bytes:
            await self.handle.truncate(offset + length)

    async def shut(self) -> None:
        """Wait until nothing is in flight, and let go of the handle. On the scheduler."""
        self.closed = True
        await self.busy.zero()
        if self.requests is not None and self.requests.pending:
            self._idle = Event()
            await shielded(self._idle)
        try:
            await self.handle.close()
        finally:
            self.home.closed_file(self)

    async def _counted(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return await coroutine
        finally:
            self.busy.down()

    def _done(self, request: Request) -> None:
        future: asyncio.Future[int] = request.tag  # type: ignore[assignment]
        outcome = request.outcome
        if outcome is not None:
            if self._seen is not None:
                outcome = self._seen(request.op, outcome)
            self.tallies.add(outcome, request.transferred)
            if not future.done():
                try:
                    future.set_result(request.transferred)
                except RuntimeError:
                    pass  # The loop is closed.
        else:
            error = request.exception
            settle(future, named(error, self.name) if isinstance(error, ODirectError) else error)
        if self._idle is not None and not cast(NodeRequests, self.requests).pending:
            self._idle.fire()


class FileInVolume:
    """An open file of a volume, in one event loop. Every transfer names its offset. Made by `Volume.open`.

    Every error carries the path as it was given there.
    """

    def __init__(self, file: OpenFile, mode: OpenMode, volume: object) -> None:
        """volume: kept as long as this is, because it closes itself when nobody has it any more."""
        self.access: Access = file.access
        self.mode = mode.shown
        self.name = file.name
        self._volume = volume
        self._file = file
        self._runner = file.runner
        self._loop = file.runner.loop
        self._kick = file.runner.driver.kick
        self._requests = file.requests
        self._opened = mode
        self._may = (mode.readable, mode.writable)
        self._ended: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether it has been closed, or is being closed."""
        return self._file.closed

    @property
    def inode(self) -> int:
        """The number of its inode."""
        return self._file.handle.inode

    @property
    def size(self) -> int:
        """The present size in bytes."""
        self._check_open()
        return self._file.handle.size_bytes

    @property
    def limits(self) -> Limits:
        """What a direct request must be aligned to, with the sources."""
        return self._file.handle.limits

    @property
    def last_outcome(self) -> Outcome | None:
        """How the request that finished last went; None before the first."""
        return self._file.tallies.last

    @property
    def totals(self) -> dict[Outcome, Tally]:
        """Operations and bytes for each outcome that there was."""
        return self._file.tallies.totals()

    def __repr__(self) -> str:
        state = "closed " if self.closed else ""
        return f"<{state}aio.FileInVolume {os.fsdecode(self.name)!r} mode={self.mode!r} access={self.access!r}>"

    # Transfers.

    def preadinto(self, buffer: Buffer, offset: int) -> asyncio.Future[int]:
        """Read into `buffer` from byte `offset`; await it for the number of bytes, 0 at the end of the file.

        The transfer is started by the call, and handed over at the end of this turn of the loop. What lies past
        the bytes that are counted is left as it was (F02). Raises what `odirect.FileInVolume.preadinto` does.
        """
        return self._start(READ, offset, buffer)

    async def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes from byte `offset`, fewer only at the end of the file."""
        if length < 0:
            raise ValueError(f"cannot read {length} bytes")
        if offset < 0:
            raise ValueError(f"the offset is {offset}; it cannot be negative")
        buffer = empty(max(0, min(length, self.size - offset)))
        return bytes(buffer[: await self._start(READ, offset, buffer)])

    def pwrite(self, buffer: Buffer, offset: int) -> asyncio.Future[int]:
        """Write `buffer` at byte `offset`; await it for the number of bytes, fewer only where the volume is full.

        The transfer is started by the call, and handed over at the end of this turn of the loop.
        """
        return self._start(WRITE, offset, buffer)

    async def preadv(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Read into the buffers in turn from byte `offset`; the number of bytes."""
        return await self._vector(READ, [as_bytes_view(buffer, writable=True) for buffer in buffers], offset)

    async def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Write the buffers in turn at byte `offset`; the number of bytes."""
        return await self._vector(WRITE, [as_bytes_view(buffer, writable=False) for buffer in buffers], offset)

    # The file as a whole.

    async def truncate(self, size: int) -> int:
        """Make the file `size` bytes long; the new size."""
        self._check_usable(WRITE)
        size = operator.index(size)
        if size < 0:
            raise ValueError(f"a file cannot have {size} bytes")
        await self._file.run(self._file.handle.truncate(size))
        return size

    async def fallocate(
        self, offset: int, length: int, *, punch: bool = False, zero: bool = False, keep_size: bool = False
    ) -> None:
        """Punch a hole, or make a range read as zeroes. As `odirect.FileInVolume.fallocate`."""
        self._check_usable(WRITE)
        offset, length = operator.index(offset), operator.index(length)
        if offset < 0 or length <= 0:
            raise ValueError(f"{length} bytes at {offset} is not a range")
        if punch and zero:
            raise ValueError("punch and zero exclude each other")
        if not punch and not zero:
            raise UnsupportedError("space cannot be reserved in this file system", path=self.name)
        await self._file.run(self._file.clear(offset, length, grow=zero and not keep_size))

    async def extents(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Where the bytes are on the device, holes included, in order, up to the size rounded up to a block."""
        length = max(0, self.size - offset) if length is None else length
        if offset < 0 or length < 0:
            raise ValueError(f"{length} bytes at {offset} is not a range")
        return await self._file.run(self._file.handle.extents(offset, length))

    async def sync(self, *, data_only: bool = False) -> None:
        """Make everything written durable: fsync, or fdatasync. After a failure it fails for ever (F41)."""
        self._check_open()
        await self._file.run(self._file.handle.sync(data_only=data_only))

    async def close(self) -> None:
        """Wait for everything in flight, also of callers that were cancelled, and close. Twice is harmless.

        A caller who is cancelled meanwhile does not keep it open.
        """
        runner = self._runner
        if self._ended is None and (runner.closed or runner.forked or self._loop.is_closed()):
            self._file.closed = True  # The volume closes what is open, or has done so; or it is the parent's to close.
            return
        runner.check_loop()
        if self._ended is None:
            self._ended = runner.start(self._file.shut(), self.name)
            self._file.closed = True
        await asyncio.shield(self._ended)

    async def __aenter__(self) -> FileInVolume:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if not hasattr(self, "_ended") or self.closed or self._runner.closed or self._runner.forked:
            return
        warnings.warn(f"a file in a volume was not closed: {self!r}", ResourceWarning, stacklevel=2, source=self)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._file.home.abandon, self._file)

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("an open file cannot be copied or pickled")

    # How.

    def _start(self, op: int, offset: int, buffer: Buffer) -> asyncio.Future[int]:
        if not self._may[op] or self._file.closed:
            self._check_usable(op)
        requests = self._requests
        if requests is None:
            offset = operator.index(offset)
            if offset < 0:
                raise ValueError(f"the offset is {offset}; it cannot be negative")
            return self._file.run(self._file.move(op, offset, [as_bytes_view(buffer, writable=op == READ)]))
        future: asyncio.Future[int] = asyncio.Future(loop=self._loop)
        # Another thread is refused by the ring. To ask for the loop that runs here takes a system call.
        if requests.begin(op, offset, buffer, future) is None:
            self._runner.check()
            requests.start_task(op, offset, buffer, future)
        self._kick()
        return future

    async def _vector(self, op: int, segments: list[memoryview], offset: int) -> int:
        self._check_usable(op)
        offset = operator.index(offset)
        if offset < 0:
            raise ValueError(f"the offset is {offset}; it cannot be negative")
        return await self._file.run(self._file.move(op, offset, segments))

    async def _move(self, op: int, offset: int, segments: list[memoryview]) -> int:
        """One request, counted; how many bytes."""
        segments = [segment for segment in segments if len(segment)]
        call = self._file.handle.read if op == READ else self._file.handle.write
        done = await call(offset, segments, access=self.access, flags=self._flags[op])
        outcome = done.outcome if self._seen is None else self._seen(op, done.outcome)
        self._file.tallies.add(outcome, done.transferred)
        return done.transferred

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the file is closed", path=self.name)
        self._runner.check()

    def _check_usable(self, op: int) -> None:
        self._check_open()
        if not (self._opened.readable if op == READ else self._opened.writable):
            raise io.UnsupportedOperation(f"the file was not opened for {'reading' if op == READ else 'writing'}")
