"""A file inside a volume, for asyncio: what `odirect.aio.File` is for one that the kernel serves."""

from __future__ import annotations

import asyncio
import operator
import os
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from odirect.aio_raw_file import InFlight, LoopFile
from odirect.aio_runner import LoopRunner
from odirect.base.errors import ClosedError
from odirect.base.units import checked_offset
from odirect.block.bio import FUA, READ, WRITE
from odirect.block.buffers import as_bytes_view
from odirect.block.device import Limits
from odirect.dio.mapping import Extent
from odirect.dio.opening import OpenMode
from odirect.dio.outcome import Outcome
from odirect.fs.base import Access
from odirect.fs.base import VolumeFile as Handle
from odirect.fs.file import NodeFile
from odirect.fs.requests import NodeRequests
from odirect.raw_file import Buffer
from odirect.volume_file import check_clearing, clear

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
        self.in_flight = InFlight(self, path, seen)
        self.requests: NodeRequests | None = None
        if isinstance(handle, NodeFile):
            self.requests = NodeRequests(handle, home.runner.scheduler, access, flags, self.in_flight.done)
            self.in_flight.requests = self.requests
        self._flags = (flags & ~FUA, flags)
        self._seen = seen

    def run(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """What `coroutine` will return; `shut` waits for it."""
        if self.closed:
            coroutine.close()
            raise ClosedError("the file is closed", path=self.name)
        counted = self._counted(coroutine)
        self.in_flight.busy.up()
        try:
            return self.runner.start(counted, self.name)
        except BaseException:
            coroutine.close()
            self.in_flight.busy.down()
            raise

    async def move(self, op: int, offset: int, segments: list[memoryview]) -> int:
        """One request, counted; how many bytes."""
        segments = [segment for segment in segments if len(segment)]
        call = self.handle.read if op == READ else self.handle.write
        done = await call(offset, segments, access=self.access, flags=self._flags[op])
        outcome = done.outcome if self._seen is None else self._seen(op, done.outcome)
        self.in_flight.tallies.add(outcome, done.transferred)
        return done.transferred

    async def shut(self) -> None:
        """Wait until nothing is in flight, and let go of the handle. On the scheduler."""
        self.closed = True
        await self.in_flight.end()
        try:
            await self.handle.close()
        finally:
            self.home.closed_file(self)

    async def _counted(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return await coroutine
        finally:
            self.in_flight.busy.down()


class FileInVolume(LoopFile):
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
        self._mode = mode
        self._in_flight = file.in_flight
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

    def __repr__(self) -> str:
        state = "closed " if self.closed else ""
        return f"<{state}aio.FileInVolume {os.fsdecode(self.name)!r} mode={self.mode!r} access={self.access!r}>"

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
        offset, length = check_clearing(offset, length, punch=punch, zero=zero, path=self.name)
        await self._file.run(clear(self._file.handle, offset, length, grow=zero and not keep_size))

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

    def __del__(self) -> None:
        if not hasattr(self, "_ended") or self.closed or self._runner.closed or self._runner.forked:
            return
        warnings.warn(f"a file in a volume was not closed: {self!r}", ResourceWarning, stacklevel=2, source=self)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._file.home.abandon, self._file)

    # How.

    def _start(self, op: int, offset: int, buffer: Buffer) -> asyncio.Future[int]:
        if not self._may[op] or self._file.closed:
            self._check_usable(op)
        requests = self._requests
        if requests is None:
            offset = checked_offset(offset)
            return self._file.run(self._file.move(op, offset, [as_bytes_view(buffer, writable=op == READ)]))
        future: asyncio.Future[int] = asyncio.Future(loop=self._loop)
        # Another thread is refused by the ring. To ask for the loop that runs here takes a system call.
        if requests.begin(op, offset, buffer, future) is None:
            self._runner.check()
            requests.start_task(op, offset, buffer, future)
        self._kick()
        return future

    async def _transfer(self, op: int, segments: list[memoryview], offset: int) -> int:
        return await self._file.run(self._file.move(op, offset, segments))

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the file is closed", path=self.name)
        self._runner.check()
