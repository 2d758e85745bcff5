"""The cache of files' data: what is not direct goes through here.

A page is one block of a file. It is up to date, dirty, being written (as a copy, so that it can be
read and changed meanwhile) or being read; whoever needs a page that is being read waits for that
read. A `FilePages` has the pages of one file; the `PageCache` of the volume has the limit and the
order in which pages of all its files are reclaimed.

What the file system does for a file is its `Backing`. Reads and write-backs run as tasks of their
own: cancelling a caller cancels his wait, never an I/O in flight. Everything between two awaits is
atomic to other tasks, and each change of the cache's state lies between two.

Space: `Backing.reserve` is asked before a page becomes dirty, and what it promised is given back
once the page was written or truncated away, so that write-back never runs out of space (F30).
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from odirect.base.errors import BadBufferError, NoSpaceError, ODirectError
from odirect.base.units import align_down, is_power_of_two
from odirect.block.buffers import _is_safe, copy_bytes, gather_bytes, slice_segments
from odirect.cache.pages import SLAB_BYTES, Fill, Page, PageMemory, segments_of
from odirect.cache.writeback import ErrorSequence, Image, ImageMemory, Promise, write_out
from odirect.sched.scheduler import Scheduler
from odirect.sched.traps import this_scheduler, wait

_LEAST_PAGE, _MOST_PAGE = 1 << 10, 64 << 10

#: What a sequential reader is read ahead: at first, and at most.
_LEAST_AHEAD, _MOST_AHEAD = 16 << 10, 512 << 10

#: How much of one request is read, or copied by a writer, before others get a turn.
_STEP_BYTES = 4 << 20

#: Space is promised in pieces of this size, and memory that may vanish is copied in such pieces.
_PIECE_BYTES = 256 << 10

#: How much a writer who is over the limit writes back at a time.
_ROOM_BYTES = 8 << 20

_ZERO_STEP_BYTES = 64 << 20
_ZEROES = memoryview(bytes(_MOST_PAGE))

#: How often `drop` writes back pages that somebody changes again and again.
_DROP_ROUNDS = 4


class Backing(Protocol):
    """What a file's pages need of its file system. All offsets and lengths are whole pages."""

    page_bytes: int

    @property
    def size_bytes(self) -> int:
        """The file's size as users see it."""
        ...

    async def read_pages(self, offset: int, segments: Sequence[memoryview]) -> None:
        """Fill the segments from byte `offset` on, with zeroes for holes and past the size.

        Raises DeviceError or CorruptionError.
        """
        ...

    async def write_pages(self, offset: int, segments: Sequence[memoryview]) -> None:
        """Write one run of pages; returns when the device has it and its place is published.

        Raises DeviceError or CorruptionError.
        """
        ...

    def reserve(self, offset: int, length: int) -> int:
        """Units of space that writing this range may need beyond what it has; kept until `release`.

        Raises NoSpaceError.
        """
        ...

    def release(self, units: int) -> None:
        """Take back what `reserve` promised."""
        ...


class PageCache:
    """The pages of all files of a volume: the memory limit, and the least recently used order.

    limit_bytes: clean pages are reclaimed above it, and a writer who would bring more than half of it
    to be dirty writes some back first. It may be passed by what one request of each reader needs at
    once, and by up to 18 MiB of copies that are being written. Raises ValueError unless it is positive.
    """

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"a page cache of {limit_bytes} bytes")
        self.limit_bytes = limit_bytes
        self._used_bytes = 0
        self._unwritten_bytes = 0
        self._idle: collections.OrderedDict[Page, None] = collections.OrderedDict()
        self._dirty_files: dict[FilePages, None] = {}  # Whoever became dirty first is first.
        self._images: dict[Image, None] = {}
        self._image_memory = ImageMemory()
        self._memory: dict[int, PageMemory] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that there are."""
        return self._used_bytes

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the pages that the device does not have yet: dirty, or being written."""
        return self._unwritten_bytes

    async def write_back(self) -> None:
        """Write back every file's dirty pages, and wait for what is being written already.

        Raises the first error after all of it has ended.
        """
        failed: ODirectError | None = None
        for file in list(self._dirty_files):
            try:
                await file.write_back(0, file.end_bytes)
            except ODirectError as error:
                failed = failed or error
        for image in list(self._images):
            await wait(image.ended)
            if failed is None and isinstance(image.error, ODirectError):
                failed = image.error
        if failed is not None:
            raise failed

    # -- for FilePages -----------------------------------------------------------------------------

    def _take(self, page_bytes: int) -> Page:
        """A page that nobody has; others are reclaimed for it above the limit. Raises MemoryError."""
        if self._used_bytes + page_bytes > self.limit_bytes:
            while self._idle and self._used_bytes + page_bytes > self.limit_bytes:
                oldest = next(iter(self._idle))
                oldest.owner._forget(oldest)
        memory = self._memory.get(page_bytes)
        if memory is None:
            slab_bytes = max(page_bytes, min(SLAB_BYTES, self.limit_bytes))
            memory = self._memory[page_bytes] = PageMemory(page_bytes, slab_bytes)
        page = memory.take()
        self._used_bytes += page_bytes
        return page

    def _give(self, page: Page) -> None:
        """Take back the memory of a page that its file does not have any more and nobody has pinned."""
        self._used_bytes -= len(page.memory)
        self._memory[len(page.memory)].give(page)

    def _is_full_of_dirty(self, wanted: int) -> bool:
        return self._unwritten_bytes > 0 and self._unwritten_bytes + wanted > self.limit_bytes // 2

    async def _make_room(self, wanted: int) -> None:
        """Write back the oldest dirty pages until `wanted` bytes more may be dirty.

        An error is noted for the file whose pages they were, and is not this writer's.
        """
        while self._is_full_of_dirty(wanted):
            file = next(iter(self._dirty_files), None)
            if file is None:
                await wait(next(iter(self._images)).ended)
                continue
            del self._dirty_files[file]  # To the end, so that the others get their turn.
            self._dirty_files[file] = None
            try:
                await file._write_oldest(_ROOM_BYTES)
            except ODirectError:
                pass


class FilePages:
    """The cached pages of one file.

    cache: the volume's. backing: the file; its `page_bytes` is a power of two from 1 KiB to 64 KiB,
    else ValueError. Ranges are bytes of the file; buffers are flat views of bytes.
    """

    def __init__(self, cache: PageCache, backing: Backing) -> None:
        size = backing.page_bytes
        if not is_power_of_two(size) or not _LEAST_PAGE <= size <= _MOST_PAGE:
            raise ValueError(f"pages of {size} bytes: a power of two from {_LEAST_PAGE} to {_MOST_PAGE}")
        self.page_bytes = size
        self.errors = ErrorSequence()
        self._shift = size.bit_length() - 1
        self._mask = size - 1
        self._cache = cache
        self._backing = backing
        self._pages: dict[int, Page] = {}
        self._dirty: dict[int, Page] = {}  # Whoever became dirty first is first.
        self._writing: dict[int, Page] = {}
        self._fills = 0
        self._unwritten = 0  # How many are dirty, or being written, or both.
        self._read_end = 0
        self._ahead = 0

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the pages that the device does not have yet: dirty, or being written."""
        return self._unwritten << self._shift

    @property
    def end_bytes(self) -> int:
        """The end of the last page that is cached, 0 if none is."""
        return (max(self._pages) + 1) << self._shift if self._pages else 0

    def is_dirty(self, offset: int, length: int) -> bool:
        """Whether any page of the range is dirty or being written."""
        return self._unwritten > 0 and bool(self._unwritten_in(*self._span(offset, length)))

    def is_cached(self, offset: int, length: int) -> bool:
        """Whether any page of the range is here, in whatever state."""
        return bool(self._pages) and bool(_within(self._pages, *self._span(offset, length)))

    # -- reading -----------------------------------------------------------------------------------

    async def read(self, offset: int, segments: Sequence[memoryview]) -> int:
        """How many bytes were read into `segments`: up to the file's size (F02).

        What is missing is read: adjacent pages in one call, and for a sequential reader more than he
        asked for. A read that fails is raised to everybody who waits for it, and its pages are not
        kept; where pages beyond what is needed may be to blame, the needed one is read again alone.
        Raises what `Backing.read_pages` raises, BadBufferError, ValueError for a negative offset.
        """
        if offset < 0:
            raise ValueError(f"reading at {offset}")
        end = min(offset + sum(map(len, segments)), self._backing.size_bytes)
        position = offset
        if offset != self._read_end:
            self._ahead = 0
        is_sequential = offset == self._read_end
        widened = False
        alone_until = 0
        for segment in segments:
            while len(segment) and position < end:
                copied = self._copy_out(position, segment[: end - position])
                position += copied
                segment = segment[copied:]
                if not len(segment) or position >= end:
                    break
                if is_sequential and not widened:
                    self._ahead = min(max(_LEAST_AHEAD, 2 * self._ahead), _MOST_AHEAD)
                    widened = True
                alone_until = await self._bring(position, end, alone_until)
                end = min(end, self._backing.size_bytes)  # It may have been truncated meanwhile.
        # What was copied was there then; it counts, also if the file has been cut before it meanwhile.
        self._read_end = position
        return position - offset

    def _copy_out(self, position: int, target: memoryview) -> int:
        """How many bytes from `position` on were there, and have been copied."""
        if _is_safe(target):
            return self._copy_cached(position, target)
        # One guarded copy of many pages: it is a system call.
        copied = 0
        private = memoryview(bytearray(min(len(target), _PIECE_BYTES)))
        while copied < len(target):
            wanted = min(len(target) - copied, len(private))
            there = self._copy_cached(position + copied, private[:wanted])
            copy_bytes(target[copied : copied + there], private[:there])
            copied += there
            if there < wanted:
                break
        return copied

    def _copy_cached(self, position: int, target: memoryview) -> int:
        get, size, shift = self._pages.get, self.page_bytes, self._shift
        used = self._cache._idle.move_to_end
        length = len(target)
        index = position >> shift
        at = 0
        inner = position & self._mask
        if inner:
            page = get(index)
            if page is None or page.fill is not None:
                return 0
            at = min(size - inner, length)
            target[:at] = page.memory[inner : inner + at]
            if page.idle:
                used(page)
            index += 1
        stop = length - size
        while at <= stop:
            page = get(index)
            if page is None or page.fill is not None:
                return at
            target[at : at + size] = page.memory
            if page.idle:
                used(page)
            at += size
            index += 1
        if at < length:
            page = get(index)
            if page is None or page.fill is not None:
                return at
            target[at:] = page.memory[: length - at]
            if page.idle:
                used(page)
        return length

    async def _bring(self, position: int, end: int, alone_until: int) -> int:
        """Wait until pages from `position` on are there, or have to be looked for again.

        Returns the byte up to which pages are to be read one by one, because a read of many failed.
        """
        scheduler = await this_scheduler()
        end = min(end, self._backing.size_bytes)
        if position >= end:
            return alone_until
        first = position >> self._shift
        stop = min((end + self._mask) >> self._shift, first + self._step_pages())
        if position < alone_until:
            stop = first + 1
        fills: dict[Fill, None] = {}
        pinned: list[Page] = []
        try:
            index = first
            while index < stop:
                page = self._pages.get(index)
                if page is None:
                    missing = self._missing(index, stop)
                    last = missing if missing < stop or position < alone_until else self._missing_ahead(stop)
                    fill = self._start_fill(scheduler, index, last)
                    fills[fill] = None
                    wanted = fill.pages[: missing - index]
                    index = missing
                else:
                    if page.fill is not None:
                        fills[page.fill] = None
                    wanted = [page]
                    index += 1
                self._pin(wanted)
                pinned += wanted
            for fill in fills:
                await wait(fill.ended)
        finally:
            self._unpin(pinned)
        for fill in fills:
            if fill.error is not None and fill.stop - fill.first > 1:
                alone_until = max(alone_until, fill.stop << self._shift)
            elif fill.error is not None:
                raise fill.error
        return alone_until

    def _missing(self, index: int, stop: int) -> int:
        """The end of the run of missing pages that begins at `index`."""
        while index < stop and index not in self._pages:
            index += 1
        return index

    def _missing_ahead(self, stop: int) -> int:
        """The end of the pages to be read ahead, behind those before `stop`, which are missing too."""
        ahead = min(self._ahead, self._cache.limit_bytes // 8)
        size = (self._backing.size_bytes + self._mask) >> self._shift
        return self._missing(stop, min(stop + ((ahead + self._mask) >> self._shift), size))

    def _start_fill(self, scheduler: Scheduler, first: int, stop: int) -> Fill:
        """A read of the missing pages [first, stop), started."""
        fill = Fill(first, stop)
        try:
            for index in range(first, stop):
                page = self._new_page(index)
                page.fill = fill
                page.pins = 1
                fill.pages.append(page)
        except BaseException as error:
            self._fills += 1
            self._fill_ended(fill, error)
            raise
        self._fills += 1
        scheduler.spawn(self._run_fill(fill))
        return fill

    async def _run_fill(self, fill: Fill) -> None:
        error: BaseException | None = None
        try:
            await self._backing.read_pages(fill.first << self._shift, segments_of(fill.pages))
        except BaseException as raised:
            error = raised
        self._fill_ended(fill, error)

    def _fill_ended(self, fill: Fill, error: BaseException | None) -> None:
        self._fills -= 1
        fill.error = error
        for page in fill.pages:
            page.fill = None
            if error is not None and not page.gone:
                self._forget(page)
        self._unpin(fill.pages)
        fill.ended.fire()

    # -- writing -----------------------------------------------------------------------------------

    async def write(
        self, offset: int, data: Sequence[memoryview], *, extend: Callable[[int], None] | None = None
    ) -> int:
        """How many bytes of `data` were copied into pages; these are dirty afterwards.

        A page that is written in part is read first where the rest of it lies inside the size. The
        size is the caller's to change, right after; nothing suspends between the copying and that,
        so that nobody sees pages past the size. A write past the size is therefore copied in one
        step, however large. extend: called with the end of what was copied so far, to make the size
        reach there; with it, and inside the size, a long write is done in steps, between which
        dirty pages are written back if there are too many.

        A short count says that space (NoSpaceError), the buffer (BadBufferError) or a read failed
        there; it is raised if nothing was copied, and the cache is then as it was. Where space is
        short, dirty pages are written back, which gives back promises that were too high, and it is
        asked again. Raises ValueError for a negative offset.
        """
        if offset < 0:
            raise ValueError(f"writing at {offset}")
        total = sum(map(len, data))
        done = 0
        while done < total:
            start = offset + done
            count = total - done
            if extend is not None or offset + total <= self._backing.size_bytes:
                step = self._step_pages() << self._shift
                count = min(count, align_down(start, step) + step - start)
            try:
                if self._cache._is_full_of_dirty(count):
                    await self._cache._make_room(count)
                segments = data if count == total else slice_segments(data, done, count)
                copied = await self._write_step(start, start + count, segments)
            except (ODirectError, MemoryError):
                if not done:
                    raise
                break
            done += copied
            if extend is not None:
                extend(offset + done)
            if copied < count:
                break
        return done

    async def zero(self, offset: int, length: int) -> None:
        """Write zeroes, as `write` does; pages are read only where they are zeroed in part.

        Raises what `write` raises, also when a part has been zeroed.
        """
        done = 0
        while done < length:
            count = min(length - done, _ZERO_STEP_BYTES)
            whole, rest = divmod(count, len(_ZEROES))
            done += await self.write(offset + done, [_ZEROES] * whole + [_ZEROES[:rest]])

    async def _write_step(self, start: int, end: int, data: Sequence[memoryview]) -> int:
        """How many bytes of [start, end) were copied, all at one instant."""
        has_flushed = False
        while True:
            pinned = await self._load_edges(start, end)
            try:
                stop, promises, error = self._reserve(start >> self._shift, (end + self._mask) >> self._shift)
                if error is None or has_flushed or not self._cache._unwritten_bytes:
                    if error is not None and stop == start >> self._shift:
                        raise error
                    return self._copy_in(start, min(end, stop << self._shift), data, promises)
                for _, pages, promise in promises:
                    self._unpromise(promise, pages)
            finally:
                self._unpin(pinned)
            has_flushed = True
            try:
                await self._cache.write_back()
            except ODirectError:
                pass  # Noted for the files whose pages they were.

    async def _load_edges(self, start: int, end: int) -> list[Page]:
        """The pages that [start, end) covers in part, up to date and pinned, where their old bytes count."""
        pinned: list[Page] = []
        edges = self._edges(start, end)
        if not edges:
            return pinned
        scheduler: Scheduler | None = None
        try:
            while True:
                fills: list[Fill] = []
                for index in edges:
                    page = self._pages.get(index)
                    if page is None and self._needs_old(index, start, end):
                        if scheduler is None:
                            break
                        page = self._start_fill(scheduler, index, index + 1).pages[0]
                    if page is not None:
                        self._pin((page,))
                        pinned.append(page)
                        if page.fill is not None:
                            fills.append(page.fill)
                else:
                    if not fills:
                        return pinned
                if scheduler is None:
                    scheduler = await this_scheduler()
                for fill in fills:
                    await wait(fill.ended)
                for fill in fills:
                    # Of a read of many pages, another one may be to blame: this one is read alone then.
                    if fill.error is not None and fill.stop - fill.first == 1:
                        raise fill.error
        except BaseException:
            self._unpin(pinned)
            raise

    def _edges(self, start: int, end: int) -> list[int]:
        """The first and the last page of [start, end), if it covers them in part."""
        edges: list[int] = []
        if start & self._mask:
            edges.append(start >> self._shift)
        if end & self._mask and end >> self._shift not in edges:
            edges.append(end >> self._shift)
        return edges

    def _needs_old(self, index: int, start: int, end: int) -> bool:
        """Whether bytes of page `index` outside [start, end) lie inside the size."""
        size = self._backing.size_bytes
        begin = index << self._shift
        return begin < min(start, size) or end < min(begin + self.page_bytes, size)

    def _reserve(self, first: int, stop: int) -> tuple[int, list[tuple[int, int, Promise | None]], NoSpaceError | None]:
        """Promises for the pages of [first, stop) that are not dirty, as (page, count, promise).

        If space runs out: those up to there, where that is, and the error. Any other error leaves
        things as they were.
        """
        promises: list[tuple[int, int, Promise | None]] = []
        try:
            for begin, count in self._not_dirty(first, stop):
                try:
                    promises.append((begin, count, self._promise(begin, count)))
                except NoSpaceError as error:
                    for index in range(begin, begin + count):
                        try:
                            promises.append((index, 1, self._promise(index, 1)))
                        except NoSpaceError:
                            return index, promises, error
        except BaseException:
            for _, count, promise in promises:
                self._unpromise(promise, count)
            raise
        return stop, promises, None

    def _not_dirty(self, first: int, stop: int) -> list[tuple[int, int]]:
        """(page, count) of the runs of [first, stop) that are not dirty, cut at multiples of a piece."""
        runs: list[tuple[int, int]] = []
        dirty = self._dirty
        most = max(1, _PIECE_BYTES >> self._shift)
        index = first
        while index < stop:
            bound = min(stop, index - index % most + most)
            if not dirty:
                runs.append((index, bound - index))
                index = bound
                continue
            while index < bound and index in dirty:
                index += 1
            begin = index
            while index < bound and index not in dirty:
                index += 1
            if index > begin:
                runs.append((begin, index - begin))
        return runs

    def _promise(self, index: int, count: int) -> Promise | None:
        units = self._backing.reserve(index << self._shift, count << self._shift)
        return Promise(units, count) if units else None

    def _unpromise(self, promise: Promise | None, pages: int = 1) -> None:
        """So many pages do not need what was promised any more."""
        if promise is not None:
            promise.pages -= pages
            if not promise.pages:
                self._backing.release(promise.units)

    def _copy_in(
        self, start: int, end: int, data: Sequence[memoryview], promises: list[tuple[int, int, Promise | None]]
    ) -> int:
        """How many bytes of [start, end) were copied. The promises become those of the pages."""
        waiting = collections.deque(promises)
        position = start
        try:
            if all(map(_is_safe, data)):
                self._change(start, end, slice_segments(data, 0, end - start), waiting)
                return end - start
            while position < end:
                count = min(end, align_down(position, _PIECE_BYTES) + _PIECE_BYTES) - position
                private = memoryview(bytearray(count))
                gather_bytes(private, slice_segments(data, position - start, count))
                self._change(position, position + count, [private], waiting)
                position += count
        except (BadBufferError, MemoryError):
            if position == start:
                raise
        finally:
            for _, count, promise in waiting:
                self._unpromise(promise, count)
        return position - start

    def _change(
        self,
        start: int,
        end: int,
        data: Sequence[memoryview],
        promises: collections.deque[tuple[int, int, Promise | None]],
    ) -> None:
        """Copy `data` to [start, end), whose pages become dirty and take their promises from the queue.

        Whatever can fail comes before the first change.
        """
        first, stop = start >> self._shift, (end + self._mask) >> self._shift
        pages = self._pages
        if self._fills:
            for index in range(first, stop):
                page = pages.get(index)
                if page is not None and page.fill is not None:
                    self._forget(page)  # Overwritten whole; whoever waits for that read finds the new page.
        new = self._take_for(first, stop)
        for index in self._edges(start, end):
            if index not in pages:
                # The rest of it lies past the size.
                page = new.pop()
                page.memory[:] = _ZEROES[: self.page_bytes]
                self._put(page, index)
                page.idle = True
                self._cache._idle[page] = None
        while promises and promises[0][0] < stop:
            begin, count, promise = promises.popleft()
            self._make_dirty(begin, begin + count, promise, new)
        self._copy(start, data)

    def _take_for(self, first: int, stop: int) -> list[Page]:
        """Pages for those of [first, stop) that are missing, the first of them last. Raises MemoryError."""
        new: list[Page] = []
        try:
            while True:
                missing = stop - first - sum(map(self._pages.__contains__, range(first, stop)))
                if len(new) >= missing:
                    break
                # Taking one may reclaim a page of this very range.
                new.extend([self._cache._take(self.page_bytes) for _ in range(missing - len(new))])
        except BaseException:
            for page in new:
                self._cache._give(page)
            raise
        new.reverse()
        return new

    def _make_dirty(self, first: int, stop: int, promise: Promise | None, new: list[Page]) -> None:
        pages, dirty, idle = self._pages, self._dirty, self._cache._idle
        clean = 0
        for index in range(first, stop):
            page = pages.get(index)
            if page is None:
                page = new.pop()
                page.owner = self
                page.index = index
                page.gone = False
                pages[index] = page
            elif page.idle:
                page.idle = False
                del idle[page]
            page.dirty = True
            page.promise = promise
            dirty[index] = page
            if page.image is None:
                clean += 1
        self._count_unwritten(clean)
        self._cache._dirty_files.setdefault(self)

    def _copy(self, position: int, data: Sequence[memoryview]) -> None:
        pages, size, shift, mask = self._pages, self.page_bytes, self._shift, self._mask
        for segment in data:
            length = len(segment)
            if not length:
                continue
            index = position >> shift
            inner = position & mask
            position += length
            at = 0
            if inner:
                at = min(size - inner, length)
                pages[index].memory[inner : inner + at] = segment[:at]
                index += 1
            stop = length - size
            while at <= stop:
                pages[index].memory[:] = segment[at : at + size]
                at += size
                index += 1
            if at < length:
                pages[index].memory[: length - at] = segment[at:]

    # -- write-back --------------------------------------------------------------------------------

    async def write_back(self, offset: int, length: int) -> None:
        """Write the dirty pages of the range as they are now, or newer, and wait until the device has them.

        What is being written already is waited for. A page that is changed meanwhile stays dirty.
        Raises the first error after all has ended; each failed run is noted once in `errors`. Its
        pages stay readable, and are not dirty any more: nobody would know when to try again.
        """
        if self._unwritten:
            indexes = self._unwritten_in(*self._span(offset, length))
            if indexes:
                await write_out(self, self._cache._image_memory, indexes)

    async def wait_write_back(self, offset: int, length: int) -> None:
        """Wait until nothing of the range is being written. Errors are for `errors` to tell."""
        while self._writing:
            indexes = _within(self._writing, *self._span(offset, length))
            if not indexes:
                return
            image = self._writing[indexes[0]].image
            if image is not None:
                await wait(image.ended)

    async def _write_oldest(self, most: int) -> None:
        oldest = itertools.islice(self._dirty, max(1, most >> self._shift))
        await write_out(self, self._cache._image_memory, sorted(oldest))

    def image_of(self, index: int) -> Image | None:
        """See `writeback.Source`."""
        page = self._writing.get(index)
        return None if page is None else page.image

    def is_changed(self, index: int) -> bool:
        """See `writeback.Source`."""
        return index in self._dirty

    def take_image(self, index: int, stop: int, memory: memoryview) -> Image:
        """See `writeback.Source`."""
        image = Image(index)
        size = self.page_bytes
        at = 0
        while index < stop and at + size <= len(memory):
            page = self._dirty.get(index)
            if page is None or page.image is not None:
                break
            memory[at : at + size] = page.memory
            at += size
            image.pages.append(page)
            image.promises.append(page.promise)
            page.promise = None
            page.dirty = False
            page.image = image
            del self._dirty[index]
            self._writing[index] = page
            index += 1
        if not self._dirty:
            del self._cache._dirty_files[self]
        self._cache._images[image] = None
        return image

    async def write_image(self, image: Image, memory: memoryview) -> None:
        """See `writeback.Source`."""
        error: BaseException | None = None
        length = len(image.pages) << self._shift
        try:
            await self._backing.write_pages(image.first << self._shift, [memory[:length]])
        except BaseException as raised:
            error = raised
        self._image_ended(image, error)
        if error is not None and not isinstance(error, Exception):
            raise error

    def _image_ended(self, image: Image, error: BaseException | None) -> None:
        image.error = error
        # What is no error of the I/O (a cancelled task, a bug) says nothing about the data: still dirty.
        keeps_dirty = error is not None and not isinstance(error, ODirectError)
        written = 0
        for page, promise in zip(image.pages, image.promises, strict=True):
            page.image = None
            del self._writing[page.index]
            if page.dirty:
                self._unpromise(promise)
            elif keeps_dirty:
                page.dirty = True
                page.promise = promise
                self._dirty[page.index] = page
            else:
                self._unpromise(promise)
                written += 1
                self._settle(page)
        if keeps_dirty:
            self._cache._dirty_files.setdefault(self)
        self._count_unwritten(-written)
        del self._cache._images[image]
        if isinstance(error, ODirectError):
            self.errors.note(error)
        image.ended.fire()

    # -- forgetting --------------------------------------------------------------------------------

    async def drop(self, offset: int, length: int) -> bool:
        """Write back the range and forget its pages, those that it covers in part too (V04, L02).

        False if a page is left, because somebody changes it again and again (L03). Raises what
        `write_back` raises; the pages are then still here.
        """
        for _ in range(_DROP_ROUNDS):
            await self.write_back(offset, length)
            if self.invalidate(offset, length):
                return True
        return False

    def invalidate(self, offset: int, length: int) -> bool:
        """Forget the clean pages of the range (F20); False if dirty ones, or ones being written, were left.

        A page that is being read is forgotten too: whoever waits for it looks again.
        """
        if not self._pages:
            return True
        is_clean = True
        for index in _within(self._pages, *self._span(offset, length)):
            page = self._pages[index]
            if page.dirty or page.image is not None:
                is_clean = False
            else:
                self._forget(page)
        return is_clean

    def truncate(self, size: int) -> None:
        """Forget the pages past `size`, dirty or not, and zero the rest of the page that `size` is in.

        Gives back what was promised for them. Nothing of this may be in write-back (`wait_write_back`):
        RuntimeError, and nothing is changed, if a page past `size` is. The zeroed page does not become
        dirty: what the device holds past the size is for the file system to zero.
        """
        if not self._pages:
            return
        first = (size + self._mask) >> self._shift
        for index in self._writing:
            if index >= first:
                raise RuntimeError(f"page {index} is being written; it cannot be truncated to {size} bytes")
        for index in [index for index in self._pages if index >= first]:
            page = self._pages[index]
            if page.dirty:
                page.dirty = False
                del self._dirty[index]
                self._count_unwritten(-1)
                promise, page.promise = page.promise, None
                self._unpromise(promise)
            self._forget(page)
        if not self._dirty:
            self._cache._dirty_files.pop(self, None)
        inner = size & self._mask
        last = self._pages.get(size >> self._shift) if inner else None
        if last is not None and last.fill is not None:
            self._forget(last)  # The read may bring what is past the new size.
        elif last is not None:
            last.memory[inner:] = _ZEROES[: self.page_bytes - inner]

    # -- state -------------------------------------------------------------------------------------

    def _span(self, offset: int, length: int) -> tuple[int, int]:
        """The pages [first, stop) that the range touches. Raises ValueError if it is none."""
        if offset < 0 or length < 0:
            raise ValueError(f"not a range: {offset}+{length}")
        return offset >> self._shift, (offset + length + self._mask) >> self._shift if length else offset >> self._shift

    def _unwritten_in(self, first: int, stop: int) -> list[int]:
        dirty = _within(self._dirty, first, stop)
        if not self._writing:
            return dirty
        return sorted({*dirty, *_within(self._writing, first, stop)})

    def _step_pages(self) -> int:
        """How many pages one step of a long request has: less where the cache is small."""
        return max(1, min(_STEP_BYTES, self._cache.limit_bytes // 4) >> self._shift)

    def _new_page(self, index: int) -> Page:
        page = self._cache._take(self.page_bytes)
        self._put(page, index)
        return page

    def _put(self, page: Page, index: int) -> None:
        page.owner = self
        page.index = index
        page.gone = False
        self._pages[index] = page

    def _forget(self, page: Page) -> None:
        """The file does not have `page` any more, which is not dirty and not being written."""
        del self._pages[page.index]
        page.gone = True
        if page.idle:
            page.idle = False
            del self._cache._idle[page]
        if not page.pins:
            self._cache._give(page)

    def _pin(self, pages: Iterable[Page]) -> None:
        idle = self._cache._idle
        for page in pages:
            page.pins += 1
            if page.idle:
                page.idle = False
                del idle[page]

    def _unpin(self, pages: Iterable[Page]) -> None:
        for page in pages:
            page.pins -= 1
            if not page.pins:
                if page.gone:
                    self._cache._give(page)
                else:
                    self._settle(page)

    def _settle(self, page: Page) -> None:
        """Let `page` be reclaimed, if nothing is in the way."""
        if not (page.dirty or page.pins or page.idle) and page.image is None:
            page.idle = True
            self._cache._idle[page] = None

    def _count_unwritten(self, pages: int) -> None:
        self._unwritten += pages
        self._cache._unwritten_bytes += pages << self._shift


def _within(pages: dict[int, Page], first: int, stop: int) -> list[int]:
    """The pages of [first, stop) that are there, ascending. Linear in the smaller of the two."""
    if stop - first <= len(pages):
        return [index for index in range(first, stop) if index in pages]
    return sorted(index for index in pages if first <= index < stop)
