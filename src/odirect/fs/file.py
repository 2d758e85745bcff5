"""A file of a volume: which way each request goes, and how direct and cached I/O stay one file.

`FileNode` is an open inode: what the engine and the page cache ask of it, with what a file system must
add. `read` and `write` on it are what every handle calls.

    aligned                    the engine, between the caller's memory and the device
    misaligned memory, edges   a private copy, or a page that is written back and dropped at once (V04)
    a hole inside the file     a page likewise: blocks for holes are allocated by write-back alone (G08)

Who holds what: a writer, and a truncate, hold `lock`; a direct overwrite lets go of it when its bios are
sent, and a direct read when it is mapped (G03). `in_flight` counts direct I/O; truncate waits for it
while it holds the lock, so nothing new begins (G06). `overwriting` counts direct writes; whoever
changes a page in part waits for it while he holds the lock. `allocating` is held from the look-up of what is
missing to its publication, by whoever writes where blocks are missing. Order: lock, then allocating.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from odirect.base.errors import (
    AlignmentError,
    ClosedError,
    DeviceError,
    NoSpaceError,
    NotDirectError,
    ODirectError,
    ReadOnlyError,
    WouldBlockError,
)
from odirect.base.units import align_down, align_up
from odirect.block.bio import FUA, HIPRI, NOWAIT, READ, WRITE
from odirect.block.buffers import empty, gather_bytes, scatter_bytes, segments_aligned, slice_segments
from odirect.block.device import BlockDevice, Limits
from odirect.cache.pagecache import FilePages, PageCache
from odirect.dio.bounce import Part, plan
from odirect.dio.completion import DeferredQueue
from odirect.dio.engine import DioFlags, DirectRequest, direct_io
from odirect.dio.mapping import Extent, Mapper
from odirect.dio.outcome import Kind, Outcome, Promise, Reason, worst
from odirect.fs.base import Access, Done, VolumeFile
from odirect.sched.locks import Count, Held, Mutex

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

# A misaligned request goes through private memory in pieces of this many bytes.
_BOUNCE_BYTES = 4 << 20
# Two or three small I/Os take longer than one that reads a little more.
_READ_WHOLE_BELOW = 128 << 10
# Cached writes publish the size after each piece, so that write-back can begin behind them.
_CACHED_PIECE = 1 << 20

_DIRECT = Outcome(Kind.DIRECT)
_BUFFERED = Outcome(Kind.BUFFERED)
_WITH_HOLES = Outcome(Kind.DIRECT, Reason.HOLE)
_PAST_THE_END = Outcome(Kind.DIRECT, Reason.END_OF_FILE)
_AT_THE_END = Outcome(Kind.BOUNCED, Reason.END_OF_FILE)
_WRITTEN = Outcome(Kind.DIRECT, promise=Promise.DEVICE)


class Home(Protocol):
    """What a file needs of its volume."""

    device: BlockDevice
    page_cache: PageCache

    def deferred(self) -> DeferredQueue:
        """The volume's deferred completions, made on first use (G05)."""
        ...

    @property
    def writable(self) -> bool:
        """Whether it takes changes."""
        ...

    def check_writable(self) -> None:
        """Raise ReadOnlyError, or what made the volume read-only, unless it takes changes."""
        ...


class FileNode(ABC):
    """An open inode with bytes: `dio.engine.Inode` and `cache.pagecache.Backing`, and what a file system adds."""

    #: What the file system asks of the engine.
    dio_flags: int = DioFlags.LOCKING | DioFlags.SKIP_HOLES
    #: No byte at or past it can be.
    max_bytes: int

    def __init__(self, home: Home, block_bytes: int, size_bytes: int) -> None:
        self.home = home
        self.block_bytes = block_bytes
        self.page_bytes = block_bytes
        self.lock = Mutex()
        self.allocating = Mutex()
        self.in_flight = Count()
        #: Direct writes whose lock may be somebody else's by now. A page that is changed in part waits for them:
        #: what it had of their bytes would go over theirs.
        self.overwriting = Count()
        self.handles = 0
        self._size = size_bytes
        #: The block of the end, if it is known to be zero on the device behind it; else -1.
        self._clear_block = -1
        #: Whether a truncate failed before it had freed all that is past the end.
        self.cut_short = False
        self.pages = FilePages(home.page_cache, self)

    # What the engine and the page cache ask.

    @property
    def size_bytes(self) -> int:
        """The size that users see. What is on disk may be behind while data is in the page cache alone."""
        return self._size

    @property
    def limits(self) -> Limits:
        """The device's."""
        return self.home.device.limits

    def deferred(self) -> DeferredQueue:
        """The volume's."""
        return self.home.deferred()

    async def write_back(self, offset: int, length: int) -> None:
        """Write dirty pages of the range, and wait (G03)."""
        if self.pages.is_cached(offset, length):
            await self.pages.write_back(offset, length)

    async def sync_written(self, offset: int, length: int, *, data_only: bool) -> None:
        """Make a range that was written durable, with what is needed to read it."""
        await self.write_back(offset, length)
        await self.commit(data_only=data_only)

    async def read_pages(self, offset: int, segments: Sequence[memoryview]) -> None:
        """Fill whole pages from the device; zeroes for holes and past the size."""
        length = sum(map(len, segments))
        request = DirectRequest(READ, offset, segments)
        await direct_io(request, self, self.mapper(), DioFlags.NONE)
        done = request.result()
        for segment in slice_segments(segments, done, length - done):
            segment[:] = bytes(len(segment))

    async def write_pages(self, offset: int, segments: Sequence[memoryview]) -> None:
        """Write whole pages where they belong, allocating what is missing."""
        length = sum(map(len, segments))
        held: Held | None = None
        if not await self.is_mapped(offset, length):
            held = await self.allocating.hold()
        try:
            request = DirectRequest(WRITE, offset, segments)
            await direct_io(request, self, self.mapper(reserved=True), DioFlags.ASYNC_EXTEND)
            done = request.result()
        finally:
            if held is not None:
                held.release()
        if done < length:
            # The mapper allocates whatever is missing, so only what cannot be there stops it.
            raise NoSpaceError(f"writing back {length} bytes at {offset}: only {done} could be ({request.fallback})")
        last = align_down(self._size, self.block_bytes)
        if offset <= last < offset + length:
            self._clear_block = last

    # What a file system adds.

    @abstractmethod
    def mapper(self, *, reserved: bool = False) -> Mapper:
        """A mapper for one request. reserved: the space that it allocates was promised by `reserve`."""

    @abstractmethod
    async def is_mapped(self, offset: int, length: int) -> bool:
        """Whether every block of the range has a place that a write may simply go to."""

    @abstractmethod
    def reserve(self, offset: int, length: int) -> int:
        """See `cache.pagecache.Backing`."""

    @abstractmethod
    def release(self, units: int) -> None:
        """See `cache.pagecache.Backing`."""

    @abstractmethod
    def forget_blocks(self, device: BlockDevice, addr: int, length: int) -> None:
        """Drop cached metadata of bytes that will hold data (G11)."""

    @abstractmethod
    def touch(self) -> None:
        """The file's data changes now: its times."""

    @abstractmethod
    async def resize(self, size: int) -> None:
        """Publish another size; blocks past it are freed. The pages are right already; lock is held."""

    @abstractmethod
    async def unmap(self, offset: int, length: int) -> None:
        """Free the whole blocks of the range. The pages are gone already; lock is held."""

    @abstractmethod
    async def commit(self, *, data_only: bool) -> None:
        """Make durable what is on the device, and the metadata that speaks of it."""

    @abstractmethod
    async def make_room(self) -> None:
        """Do what may free space: write back what is reserved, commit what was freed."""

    @abstractmethod
    async def extents(self, offset: int, length: int) -> list[Extent]:
        """See `VolumeFile`."""

    @abstractmethod
    async def let_go(self) -> None:
        """A handle has been closed: the last one takes the node with it."""

    # For mappers.

    def grown(self, size: int) -> None:
        """Data up to `size` is on the device and published: users may see it (F03)."""
        if size > self._size:
            # A reader may have brought in the last block with nothing behind its end.
            self.pages.invalidate(self._size, 1)
            self._size = size

    def place(self, op: int, offset: int, length: int) -> int:
        """The byte of the device where these bytes of the file are, for a transfer that needs nothing else.

        -1 if they are not in one place, if that is not known without looking, or if a lock or a cached page
        is in the way: then the general way knows.
        """
        if not self.lock.idle or self.pages.is_cached(offset, length):
            return -1
        return self.known_place(offset, length)

    @abstractmethod
    def known_place(self, offset: int, length: int) -> int:
        """The byte of the device that the range begins at, if all of it follows there and memory knows; else -1."""

    @abstractmethod
    async def places(self, offsets: NDArray[numpy.int64], length: int) -> NDArray[numpy.int64]:
        """`known_place` of many transfers of one length; it looks at the device for what is not known."""

    # The requests.

    async def read(self, offset: int, segments: Sequence[memoryview], access: Access, flags: int) -> Done:
        """See `VolumeFile.read`."""
        length = sum(map(len, segments))
        count = min(length, self._size - offset)
        if count <= 0:
            return Done(0, _BUFFERED if access == "buffered" else _PAST_THE_END if length else _DIRECT)
        if flags & NOWAIT:
            self._check_nowait(READ, offset, count)
        if access == "buffered":
            return Done(await self.pages.read(offset, segments), _BUFFERED)
        unit = self.limits.read_align
        if offset % unit == 0 and segments_aligned(segments, self.limits.memory_align, unit):
            return await self._direct_read(offset, segments, length, access, flags)
        if access == "strict":
            raise _misaligned("reading", offset, length, unit, self.limits.memory_align)
        return await self._split_read(offset, segments, count, count < length, flags)

    async def write(self, offset: int | None, segments: Sequence[memoryview], access: Access, flags: int) -> Done:
        """See `VolumeFile.write`."""
        self.home.check_writable()
        held = self.lock.try_hold() if flags & NOWAIT else await self.lock.hold()
        if held is None:
            raise WouldBlockError("another writer is at work")
        writing = _Writing(held)
        try:
            done = await self._write(writing, self._size if offset is None else offset, segments, access, flags)
        finally:
            writing.let_go()
        if flags & FUA and done.transferred:
            # The pages of an edge and the metadata of new blocks are what FUA on the data would miss (F40).
            start = writing.offset
            await self.sync_written(start, done.transferred, data_only=True)
            done = done._replace(outcome=done.outcome._replace(promise=Promise.DURABLE))
        return done

    async def begin_batch(self, op: int, offsets: NDArray[numpy.int64], length: int) -> NDArray[numpy.int64]:
        """See `NodeFile.begin_batch`."""
        limits = self.limits
        unit = limits.read_align if op == READ else limits.write_align
        with await self.lock.hold():
            size = max(self._size, 1)
            if self.pages.is_cached(0, size):
                await self.pages.write_back(0, size)
                if op == WRITE:
                    await self.pages.drop(0, size)
            found = await self.places(offsets, length)
            found[((offsets | length | found) & (unit - 1) != 0) | (offsets > self._size - length)] = -1
            if op == WRITE:
                self.touch()
                self.overwriting.up()
            self.in_flight.up()
        return found

    async def truncate(self, size: int) -> None:
        """Make the file `size` bytes long; what is new reads as zeroes."""
        self.home.check_writable()
        if size < 0:
            raise ValueError(f"a file cannot have {size} bytes")
        if size > self.max_bytes:
            raise NoSpaceError(
                f"truncating to {size} bytes: the file system ends files at {self.max_bytes}", errno=errno.EFBIG
            )
        with await self.lock.hold():
            self.touch()
            if size >= self._size:
                if size > self._size:
                    await self._finish_cut()
                    await self._clear_tail()
                    self._size = size
                    self._clear_block = -1
                await self.resize(size)
                return
            if size % self.block_bytes:
                # The rest of the last block must not come back when the file grows again (F11).
                end = min(self._size, align_up(size, self.block_bytes))
                await self._cached_zero(size, end - size)
            await self._still(size, self._size - size)
            self.pages.truncate(size)
            self._size = size
            self._clear_block = -1
            self.cut_short = True
            await self._finish_cut()

    async def punch(self, offset: int, length: int) -> None:
        """Make a hole of whole blocks, and zeroes where it begins or ends within one."""
        self.home.check_writable()
        if offset < 0 or length <= 0:
            raise ValueError(f"{length} bytes at {offset} is not a range")
        with await self.lock.hold():
            self.touch()
            # Past the size nothing is allocated, but the last block is one to its end.
            end = min(offset + length, align_up(self._size, self.block_bytes))
            if offset >= end:
                return
            first, last = align_up(offset, self.block_bytes), align_down(end, self.block_bytes)
            if first >= last:
                await self._cached_zero(offset, min(end, self._size) - offset)
                return
            await self._cached_zero(offset, first - offset)
            await self._cached_zero(last, min(end, self._size) - last)
            while not await self.pages.drop(first, last - first):
                pass  # A reader had just asked for one of them again.
            await self._still(first, last - first)
            with await self.allocating.hold():
                await self.unmap(first, last - first)
            await self.forget(first, last - first)  # read while it was still mapped

    async def sync(self, *, data_only: bool) -> None:
        """Write back all pages and make everything durable."""
        await self.pages.write_back(0, max(self._size, 1))
        await self.commit(data_only=data_only)

    async def _still(self, offset: int, length: int) -> None:
        """Wait until nothing of the range is on its way to or from the device (G06)."""
        while True:
            await self.in_flight.zero()
            await self.pages.wait_write_back(offset, length)
            if not self.in_flight.value:
                return

    # Reading.

    async def _direct_read(
        self, offset: int, segments: Sequence[memoryview], length: int, access: Access, flags: int
    ) -> Done:
        request = DirectRequest(READ, offset, segments, asynchronous=True, bio_flags=flags & (NOWAIT | HIPRI))
        await direct_io(request, self, self.mapper(), self.dio_flags)
        done = await request.wait()
        outcome = _AT_THE_END if request.bounced else _WITH_HOLES if request.holes else _DIRECT
        if request.fallback is None:
            return Done(done, outcome)
        if access == "strict":
            if done:
                return Done(done, outcome)
            raise NotDirectError(f"reading {length} bytes at {offset}: {request.fallback.value}")
        more = await self.pages.read(offset + done, slice_segments(segments, done, length - done))
        return Done(done + more, worst(outcome if done else None, Outcome(Kind.BUFFERED, request.fallback)))

    async def _split_read(self, offset: int, segments: Sequence[memoryview], count: int, cut: bool, flags: int) -> Done:
        """Head and tail, or the whole, through private memory."""
        parts = plan(self.limits, self.limits.read_align, offset, segments, count, cut=cut)
        if len(parts) > 1 and count <= _READ_WHOLE_BELOW:
            parts = [Part(0, count, next(part.reason for part in parts if part.reason))]
        done = 0
        outcome: Outcome | None = None
        for part in parts:
            runs = slice_segments(segments, part.start, part.length)
            if part.reason is Reason.NONE:
                got, how = await self._direct_read(offset + part.start, runs, part.length, "auto", flags)
            else:
                got, how = await self._bounced_read(offset + part.start, runs, part, flags)
            outcome = worst(outcome, how)
            done += got
            if got < part.length:
                break
        return Done(done, outcome or _DIRECT)

    async def _bounced_read(self, offset: int, segments: Sequence[memoryview], part: Part, flags: int) -> Done:
        unit = max(self.limits.read_align, self.limits.memory_align)
        end = offset + part.length
        memory = empty(min(align_up(end, unit) - align_down(offset, unit), _BOUNCE_BYTES))
        done = 0
        outcome = Outcome(Kind.BOUNCED, part.reason)
        while done < part.length:
            first = align_down(offset + done, unit)
            view = memory[: min(len(memory), align_up(end, unit) - first)]
            got, how = await self._direct_read(first, [view], len(view), "auto", flags)
            skipped = offset + done - first
            taken = min(got - skipped, part.length - done)
            if taken <= 0:
                break
            scatter_bytes(slice_segments(segments, done, taken), view[skipped : skipped + taken])
            done += taken
            outcome = worst(outcome, how) if how.kind is Kind.BUFFERED else outcome
        return Done(done, outcome)

    # Writing. The lock is held.

    async def _write(
        self, writing: _Writing, offset: int, segments: Sequence[memoryview], access: Access, flags: int
    ) -> Done:
        length = sum(map(len, segments))
        writing.offset = offset
        if not length:
            return Done(0, _WRITTEN)
        if offset >= self.max_bytes:
            raise NoSpaceError(
                f"writing {length} bytes at {offset}: the file system ends files at {self.max_bytes}",
                errno=errno.EFBIG,
            )
        if offset + length > self.max_bytes:
            length = self.max_bytes - offset
            segments = slice_segments(segments, 0, length)
        if flags & NOWAIT:
            self._check_nowait(WRITE, offset, length)
        self.home.check_writable()
        unit = self.limits.write_align
        aligned = offset % unit == 0 and segments_aligned(segments, self.limits.memory_align, unit)
        if access == "strict" and not aligned:
            raise _misaligned("writing", offset, length, unit, self.limits.memory_align)
        self.touch()
        if offset + length > self._size:
            await self._finish_cut()
        if offset > self._size:
            await self._clear_tail()
        if access == "buffered":
            return Done(await self._cached_write(offset, segments, length), _BUFFERED)
        if aligned:
            return await self._direct_write(writing, offset, segments, length, access, flags)
        return await self._split_write(writing, offset, segments, length, flags)

    async def _direct_write(
        self,
        writing: _Writing,
        offset: int,
        segments: Sequence[memoryview],
        length: int,
        access: Access,
        flags: int,
    ) -> Done:
        if not await self._drop(offset, length):
            if access == "strict":
                raise NotDirectError(f"writing {length} bytes at {offset}: pages of it are in use")
            return await self._through_cache(offset, segments, length, Outcome(Kind.BUFFERED, Reason.CACHED_BY_FS))
        self.overwriting.up()
        try:
            try:
                request = await self._send(writing, offset, segments, length, flags)
            except NoSpaceError:
                await self.make_room()
                request = await self._send(writing, offset, segments, length, flags)
        finally:
            self.overwritten(offset, length)
        done = request.result()
        if done == length or request.fallback in (None, Reason.NO_SPACE):
            return Done(done, _WRITTEN)
        if access == "strict":
            if done:
                return Done(done, _WRITTEN)
            raise NotDirectError(f"writing {length} bytes at {offset}: {request.fallback.value}")
        rest = slice_segments(segments, done, length - done)
        fallback = Outcome(Kind.BUFFERED, request.fallback, Promise.DEVICE)
        more, how = await self._through_cache(offset + done, rest, length - done, fallback)
        return Done(done + more, worst(_WRITTEN if done else None, how))

    async def _send(
        self, writing: _Writing, offset: int, segments: Sequence[memoryview], length: int, flags: int
    ) -> DirectRequest:
        """The finished request. An overwrite lets go of the lock when its bios are sent."""
        request = DirectRequest(WRITE, offset, segments, asynchronous=True, bio_flags=flags & (NOWAIT | HIPRI))
        held: Held | None = None
        if offset + length > align_up(self._size, self.block_bytes):
            held = await self.allocating.hold()  # Past the end blocks are missing.
        try:
            await direct_io(request, self, self.mapper(), self.dio_flags)
            if held is None and writing.last and not request.done.fired:
                writing.let_go()
            await request.wait()
        finally:
            if held is not None:
                held.release()
        return request

    def overwritten(self, offset: int, length: int) -> bool:
        """A direct write has ended, well or not; what a buffered reader brought in meanwhile goes (F20).

        False if a page is left that is not clean. Both in one step, before whoever waits for the end goes on.
        """
        is_clean = self.pages.invalidate(offset, length)
        self.overwriting.down()
        return is_clean

    async def forget(self, offset: int, length: int) -> None:
        """Drop what a buffered reader brought in while these bytes were changed on the device (F20)."""
        if not self.pages.invalidate(offset, length):
            await self.pages.drop(offset, length)

    async def _split_write(
        self, writing: _Writing, offset: int, segments: Sequence[memoryview], length: int, flags: int
    ) -> Done:
        """Whole blocks direct, what is left of them at either end by a page that is written back at once (V04)."""
        parts = plan(self.limits, max(self.block_bytes, self.limits.write_align), offset, segments, length)
        done = 0
        outcome: Outcome | None = None
        for number, part in enumerate(parts):
            writing.last = number == len(parts) - 1
            at, runs = offset + part.start, slice_segments(segments, part.start, part.length)
            try:
                if part.reason is Reason.NONE:
                    got, how = await self._direct_write(writing, at, runs, part.length, "auto", flags)
                elif part.length < self.block_bytes:
                    bounced = Outcome(Kind.BOUNCED, part.reason, Promise.DEVICE)
                    got, how = await self._through_cache(at, runs, part.length, bounced)
                else:
                    got, how = await self._bounced_write(writing, at, runs, part, flags)
            except NoSpaceError:
                if not done:
                    raise
                break  # What had room counts.
            outcome = worst(outcome, how)
            done += got
            if got < part.length:
                break
        return Done(done, outcome or _WRITTEN)

    async def _bounced_write(
        self, writing: _Writing, offset: int, segments: Sequence[memoryview], part: Part, flags: int
    ) -> Done:
        """From misaligned memory, by way of a private copy."""
        unit = self.block_bytes
        memory = empty(min(align_up(part.length, unit), _BOUNCE_BYTES))
        outcome: Outcome | None = None
        done = 0
        writing.last = False  # The copy is used again.
        while done < part.length:
            at = offset + done
            taken = min(len(memory), part.length - done)
            if at % unit:
                taken = min(taken, align_up(at, unit) - at)
            elif taken > unit:
                taken = align_down(taken, unit)
            runs = slice_segments(segments, done, taken)
            if at % unit or taken % unit:
                how = Outcome(Kind.BOUNCED, part.reason, Promise.DEVICE)
                got, how = await self._through_cache(at, runs, taken, how)
            else:
                gather_bytes(memory[:taken], runs)
                got, how = await self._direct_write(writing, at, [memory[:taken]], taken, "auto", flags)
                how = how if how.kind is Kind.BUFFERED else how._replace(kind=Kind.BOUNCED, reason=part.reason)
            outcome = worst(outcome, how)
            done += got
            if got < taken:
                break
        return Done(done, outcome or _WRITTEN)

    async def _through_cache(self, offset: int, segments: Sequence[memoryview], length: int, outcome: Outcome) -> Done:
        """A buffered write, written back, waited for and dropped: a direct read right after sees it (G08, V04)."""
        done = await self._cached_write(offset, segments, length)
        await self.pages.write_back(offset, done)
        await self.pages.drop(offset, done)
        return Done(done, outcome._replace(promise=Promise.DEVICE))

    async def _cached_write(self, offset: int, segments: Sequence[memoryview], length: int) -> int:
        """Into the page cache; the size follows. Short if only a part has room."""
        await self.overwriting.zero()
        if offset + length > self._size:
            await self._clear_tail()
        done = 0
        while done < length:
            piece = min(length - done, _CACHED_PIECE)
            runs = slice_segments(segments, done, piece)
            await self.is_mapped(offset + done, piece)  # so that `reserve` need not guess
            try:
                got = await self.pages.write(offset + done, runs)
            except NoSpaceError:
                # More was promised than is needed; what is written back shows how much that was.
                await self.make_room()
                try:
                    got = await self.pages.write(offset + done, runs)
                except NoSpaceError:
                    if not done:
                        raise
                    break
            done += got
            if offset + done > self._size:
                self._size = offset + done
            if not got:
                break
        return done

    async def _cached_zero(self, offset: int, length: int) -> None:
        """Zeroes in the page cache, where a hole or the end does not say zero already."""
        end = offset + length
        while offset < end:
            part = min(end, align_up(offset + 1, self.block_bytes)) - offset
            if self.pages.is_cached(offset, part) or not await self.is_hole(offset):
                await self.overwriting.zero()
                await self.pages.zero(offset, part)
            offset += part

    @abstractmethod
    async def is_hole(self, offset: int) -> bool:
        """Whether the block that byte `offset` is in has no place."""

    async def _finish_cut(self) -> None:
        """Free what a truncate has left past the end, before the file may grow over it again (F11)."""
        if self.cut_short:
            with await self.allocating.hold():
                await self.resize(self._size)
            self.cut_short = False

    async def _clear_tail(self) -> None:
        """Zero what lies behind the end in its block, on the device, before the file grows over it (F11)."""
        tail = self._size % self.block_bytes
        start = self._size - tail
        if not tail or start == self._clear_block:
            return
        if not await self.is_hole(start):
            await self.overwriting.zero()
            await self.pages.zero(self._size, self.block_bytes - tail)
            await self.pages.write_back(start, self.block_bytes)
        self._clear_block = start

    async def _drop(self, offset: int, length: int) -> bool:
        """Write back and drop the pages of a range that is about to be written direct (F20)."""
        return not self.pages.is_cached(offset, length) or await self.pages.drop(offset, length)

    def _check_nowait(self, op: int, offset: int, length: int) -> None:
        """Raise WouldBlockError unless nothing of ours would have to wait (F08)."""
        waits = op == READ and not self.lock.idle
        if waits or self.pages.is_cached(offset, length) or not self.is_mapped_now(offset, length):
            verb = "reading" if op == READ else "writing"
            raise WouldBlockError(f"{verb} {length} bytes at {offset} without waiting: something would have to wait")

    @abstractmethod
    def is_mapped_now(self, offset: int, length: int) -> bool:
        """`is_mapped`, as far as memory knows: False where it would have to look at the device."""


class NodeFile(VolumeFile):
    """A handle of a `FileNode`. Errors of write-back reach every handle that was open then, once (F41)."""

    def __init__(self, node: FileNode, inode: int, name: str, *, writable: bool) -> None:
        self.node = node
        self.inode = inode
        self.name = name
        self._writable = writable
        self._seen = node.pages.errors.sample()
        self._failed: ODirectError | None = None
        self._closed = False
        node.handles += 1

    @property
    def size_bytes(self) -> int:
        """See `VolumeFile`."""
        return self.node.size_bytes

    @property
    def limits(self) -> Limits:
        """The device's."""
        return self.node.limits

    async def read(
        self, offset: int, segments: Sequence[memoryview], *, access: Access = "auto", flags: int = 0
    ) -> Done:
        """See `VolumeFile`."""
        self._check_open()
        if offset < 0:
            raise ValueError(f"the offset is {offset}; it cannot be negative")
        return await self.node.read(offset, segments, access, flags)

    async def write(
        self,
        offset: int | None,
        segments: Sequence[memoryview],
        *,
        access: Access = "auto",
        flags: int = 0,
    ) -> Done:
        """See `VolumeFile`."""
        self._check_writable()
        if offset is not None and offset < 0:
            raise ValueError(f"the offset is {offset}; it cannot be negative")
        if flags & FUA and self._failed is not None:
            raise self._failed
        try:
            return await self.node.write(offset, segments, access, flags)
        except DeviceError as error:
            if flags & FUA:
                self._failed = error
            raise

    async def truncate(self, size: int) -> None:
        """See `VolumeFile`."""
        self._check_writable()
        await self.node.truncate(size)

    async def punch(self, offset: int, length: int) -> None:
        """See `VolumeFile`."""
        self._check_writable()
        await self.node.punch(offset, length)

    async def sync(self, *, data_only: bool = False) -> None:
        """See `VolumeFile`. What failed once fails until the file is opened again: the data may be gone (F41)."""
        self._check_open()
        if self._failed is not None:
            raise self._failed
        try:
            await self.node.sync(data_only=data_only)
        except DeviceError as error:
            self._failed = error
        self._seen, noted = self.node.pages.errors.check(self._seen)
        self._failed = self._failed or noted
        if self._failed is not None:
            raise self._failed

    async def begin_batch(self, op: int, offsets: NDArray[numpy.int64], length: int) -> NDArray[numpy.int64]:
        """The byte of the device of each of these transfers, for a caller who moves them himself; -1: not so.

        They are inside the file, aligned there and on the device. Until `end_batch` the file keeps its
        blocks, as under any direct I/O (G06).
        """
        if op == READ:
            self._check_open()
        else:
            self._check_writable()
            self.node.home.check_writable()
        return await self.node.begin_batch(op, offsets, length)

    async def end_batch(self, op: int) -> None:
        """The transfers of `begin_batch` have ended, well or not."""
        if op == WRITE:
            self.node.overwritten(0, max(self.node.size_bytes, 1))
        self.node.in_flight.down()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """See `VolumeFile`."""
        self._check_open()
        await self.node.pages.write_back(0, max(self.node.size_bytes, 1))
        return await self.node.extents(offset, length)

    async def close(self) -> None:
        """See `VolumeFile`."""
        if self._closed:
            return
        self._closed = True
        await self.node.let_go()

    def may(self, op: int) -> bool:
        """Whether the handle takes this operation now; the general way says why not."""
        if op == READ:
            return not self._closed
        return not self._closed and self._writable and self.node.home.writable

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the file is closed", path=self.name)

    def _check_writable(self) -> None:
        self._check_open()
        if not self._writable:
            raise ReadOnlyError("the file is open for reading only", path=self.name)


class _Writing:
    """The lock of one write, which is given back once, and where the write began."""

    __slots__ = ("_held", "last", "offset")

    def __init__(self, held: Held) -> None:
        self._held: Held | None = held
        self.offset = 0
        #: Whether nothing of the request comes after the part at hand.
        self.last = True

    def let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.release()


def _misaligned(verb: str, offset: int, length: int, unit: int, memory_align: int) -> AlignmentError:
    return AlignmentError(
        f"{verb} {length} bytes at {offset}: offset and every length must be multiples of {unit}, "
        f"and every buffer's address of {memory_align}"
    )
