"""The same files for asyncio: many requests in flight, cancel-safe.

    import asyncio, odirect

    async def main():
        async with odirect.aio.open("big.bin") as file:
            buffers = [odirect.empty(4096) for _ in range(32)]
            await asyncio.gather(*(file.preadinto(b, i * 4096) for i, b in enumerate(buffers)))

All files of one loop share one ring, which that loop's thread enters, and one pump. A caller that is
cancelled stops waiting; a transfer that the device has begun goes on, and keeps its buffer until it
has come back. `close` waits for all of them. `open_volume` is in `aio_volume`.
"""

from __future__ import annotations

import asyncio
import os
import warnings
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from odirect.aio_opening import Opening
from odirect.aio_raw_file import InFlight, LoopFile
from odirect.aio_volume import Volume, open_volume
from odirect.aio_volume_file import FileInVolume
from odirect.base.errors import AlignmentError, AtomicLimitError, ClosedError, ODirectError
from odirect.block.bio import ATOMIC, DISCARD, FUA, READ, WRITE, ZERO, Bio
from odirect.block.buffers import BufferPool
from odirect.block.cached_file import CachedFileDevice
from odirect.block.device import Limits
from odirect.block.file_device import FileDevice, file_bytes
from odirect.block.limits import file_limits
from odirect.block.queue import RingQueue
from odirect.dio.bounce import DIRECT_READ, Moved
from odirect.dio.here import POOL_CHUNK_BYTES, POOL_CHUNKS
from odirect.dio.opening import Opened, Path, open_file, plain_file
from odirect.dio.requests import Requests
from odirect.files import Access, change_space, check_atomic, expected_outcome, request_flags, truncate_file
from odirect.raw_file import Buffer, past_end
from odirect.ring.choose import open_ring
from odirect.sched.drive_asyncio import AsyncioDriver
from odirect.sched.scheduler import Scheduler

__all__ = ["File", "FileInVolume", "Volume", "open", "open_volume"]

T = TypeVar("T")

#: Operations that one loop gives to the kernel at once; more are held back in order.
LOOP_DEPTH = 256
# Threads of one file that do what only the page cache can.
_CACHED_WORKERS = 4
# Threads of a loop's ring where there is no io_uring.
WORKERS = 8


class _LoopPump:
    """What all open files of one loop share; they alone keep it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.driver = AsyncioDriver(loop)
        self.queue = RingQueue(open_ring(LOOP_DEPTH, workers=WORKERS), open_polled=lambda: open_ring(iopoll=True))
        self.pool = BufferPool(POOL_CHUNK_BYTES, POOL_CHUNKS, ring=self.queue.ring)
        self.driver.watch(self.queue)
        self.files = 0

    @property
    def scheduler(self) -> Scheduler:
        return self.driver.scheduler

    def close(self) -> None:
        self.driver.unwatch(self.queue)
        self.queue.close()


# Both weak: a loop that was closed with files open must not live for ever.
_pumps: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_LoopPump]] = weakref.WeakKeyDictionary()


def _pump_of(loop: asyncio.AbstractEventLoop) -> _LoopPump:
    known = _pumps.get(loop)
    pump = None if known is None else known()
    if pump is None:
        pump = _LoopPump(loop)
        _pumps[loop] = weakref.ref(pump)
    return pump


class _LoopCachedDevice(CachedFileDevice):
    """A file's page cache, which the loop watches from the first bio on: most files never need it."""

    def __init__(self, fd: int, driver: AsyncioDriver) -> None:
        super().__init__(fd, workers=_CACHED_WORKERS)
        self._driver = driver

    def submit(self, bio: Bio) -> None:
        """See `CachedFileDevice`."""
        self._driver.watch(self)
        super().submit(bio)


def open(
    path: Path,
    mode: str = "r",
    *,
    access: Access = "auto",
    dsync: bool = False,
    nowait: bool = False,
    hipri: bool = False,
    atomic: bool = False,
    overwrite_in_use: bool = False,
) -> Opening[File]:
    """A `File`, when awaited or entered with `async with`. The arguments are those of `odirect.open`."""
    flags = request_flags(access, dsync=dsync, nowait=nowait, hipri=hipri, atomic=atomic)

    async def make() -> File:
        loop = asyncio.get_running_loop()
        opening = asyncio.ensure_future(
            asyncio.to_thread(open_file, path, mode, strict=access == "strict", overwrite_in_use=overwrite_in_use)
        )
        try:
            opened = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The thread goes on; what it opens is closed when it is done.
            opening.add_done_callback(_close_opened)
            raise
        return File(opened, access, flags, loop)

    return Opening(make)


def _close_opened(opening: asyncio.Future[Opened]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class File(LoopFile):
    """An open plain file or block device of one event loop. Every transfer names its offset."""

    def __init__(self, opened: Opened, access: Access, flags: int, loop: asyncio.AbstractEventLoop) -> None:
        self._opened = opened
        self._state = opened.state
        self._flags = flags
        self._loop = loop
        self.access: Access = access
        self.mode = opened.mode.shown
        self.name = cast(str, opened.state.path)
        self._mode = opened.mode
        self._in_flight = InFlight(self, self.name, size=lambda: file_bytes(opened.cached_fd))
        self._pump = pump = _pump_of(loop)
        pump.files += 1
        self._device = None
        if opened.direct_fd >= 0:
            self._device = FileDevice(pump.queue, opened.direct_fd, self._state.limits)
        self._cached = _LoopCachedDevice(opened.cached_fd, pump.driver)
        self._plain = plain_file(
            opened,
            self._device,
            self._cached,
            pump.pool,
            strict=access == "strict",
            ask_again=self._ask_again,
        )
        self._requests = self._in_flight.requests = Requests(
            self._state,
            self._device,
            self._plain,
            pump.scheduler,
            opened.cached_fd,
            flags,
            (expected_outcome(self._state, READ, flags), expected_outcome(self._state, WRITE, flags)),
            self._in_flight.done,
        )
        self._sized = not opened.generated
        self._may = [opened.mode.readable, opened.mode.writable and self._promises_atomic()]
        self.closed = False

    def fileno(self) -> int:
        """A descriptor of the same file without O_DIRECT, for `os.fstat`, `fcntl`, `mmap` and the like.

        What is read and written there goes through the page cache, is no request of this file and has no outcome.
        """
        self._check_open()
        return self._opened.cached_fd

    @property
    def size(self) -> int:
        """The present size in bytes."""
        self._check_open()
        return file_bytes(self._opened.cached_fd)

    @property
    def limits(self) -> Limits:
        """Every alignment and limit as it is known by now, each with its source."""
        return self._state.limits

    async def truncate(self, size: int) -> int:
        """Make the file `size` bytes long; the new size."""
        self._check_usable(WRITE)
        return await self._in_thread(lambda: truncate_file(self._opened, size))

    async def fallocate(
        self, offset: int, length: int, *, punch: bool = False, zero: bool = False, keep_size: bool = False
    ) -> None:
        """Reserve, punch or zero a range. As `odirect.File.fallocate`."""
        self._check_usable(WRITE)
        if self._state.is_block and (punch or zero) and offset >= 0 and length > 0:
            await self._run(self._plain.change_range(DISCARD if punch else ZERO, offset, length))
            return
        await self._in_thread(
            lambda: change_space(self._opened, offset, length, punch=punch, zero=zero, keep_size=keep_size)
        )

    async def sync(self, *, data_only: bool = False) -> None:
        """Make everything written durable: fsync, or fdatasync. After a failure it fails for ever (F41)."""
        self._check_open()
        await self._run(self._plain.sync(data_only=data_only))

    async def close(self) -> None:
        """Wait for everything in flight, also of callers that were cancelled, and close. Twice is harmless."""
        if self.closed:
            return
        if asyncio.get_running_loop() is not self._loop and not self._loop.is_closed():
            raise RuntimeError("the file belongs to another event loop, which is still there to close it")
        self.closed = True
        self._may = [False, False]
        if self._loop.is_closed():
            self._release()  # There is nobody to wait for any more but the device, as the ring does.
            return
        idle = asyncio.ensure_future(self._pump.driver.run(self._in_flight.end()))
        try:
            await asyncio.shield(idle)
        except asyncio.CancelledError:
            idle.add_done_callback(lambda _: self._release())
            raise
        self._release()

    def __del__(self) -> None:
        if getattr(self, "closed", True):
            return
        warnings.warn(f"unclosed odirect.aio.File {os.fsdecode(self.name)!r}", ResourceWarning, 2, source=self)
        # It could not be thrown away if anything were in flight. The descriptors go with `Opened`.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        pump = self._pump
        pump.driver.unwatch(self._cached)
        self._cached.close()
        if self._device is not None:
            self._device.close()
        self._opened.close()
        pump.files -= 1
        if not pump.files:
            # The last file takes the ring with it, so that nothing is left when the loop is closed.
            _pumps.pop(self._loop, None)
            pump.close()

    def _start(self, op: int, offset: int, buffer: Buffer) -> asyncio.Future[int]:
        if not self._may[op]:
            self._check_usable(op)
            check_atomic(self._opened, self._flags)
        future: asyncio.Future[int] = self._loop.create_future()
        requests = self._requests
        requests.start(op, offset, buffer, future)
        self._pump.driver.kick()
        return future

    async def _transfer(self, op: int, segments: list[memoryview], offset: int) -> int:
        length = sum(map(len, segments))
        if op == READ:
            try:
                moved = await self._run(self._plain.read(offset, segments, length, self._flags & ~(FUA | ATOMIC)))
            except AlignmentError as error:
                if not past_end(error, op, offset, lambda: file_bytes(self._opened.cached_fd)):
                    raise
                moved = Moved(0, DIRECT_READ)
        else:
            check_atomic(self._opened, self._flags)
            moved = await self._run(self._plain.write(offset, segments, length, self._flags))
        self._in_flight.tallies.add(moved.outcome, moved.transferred)
        return moved.transferred

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """What `call` returns, in a thread. `close` waits for the thread even if the caller is cancelled."""
        self._in_flight.busy.up()
        work = self._loop.run_in_executor(None, call)
        work.add_done_callback(self._thread_ended)
        return await asyncio.shield(work)

    def _thread_ended(self, work: asyncio.Future[Any]) -> None:
        if not work.cancelled():
            work.exception()  # It has been told to the caller, or nobody asks.
        self._requests.resized(file_bytes(self._opened.cached_fd))
        self._in_flight.busy.down()
        self._pump.driver.kick()

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return await self._pump.driver.run(self._counted(coroutine))
        except ODirectError as error:
            if error.filename is None:
                error.filename = self.name
            raise

    async def _counted(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self._in_flight.busy.up()
        try:
            return await coroutine
        finally:
            self._in_flight.busy.down()

    def _ask_again(self) -> Limits:
        fd = self._opened.direct_fd if self._opened.direct_fd >= 0 else self._opened.cached_fd
        return file_limits(fd, path=self.name, writable=self._opened.mode.writable)[0]

    def _promises_atomic(self) -> bool:
        """Whether a write can do as this file demands: False if it is to be atomic, and none can be."""
        try:
            check_atomic(self._opened, self._flags)
        except AtomicLimitError:
            return False
        return True

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the file is closed", path=self.name)
