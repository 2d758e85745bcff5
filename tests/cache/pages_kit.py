"""A file for the page cache: its blocks in a dictionary, its space counted, its failures to order."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from odirect.base.errors import DeviceError, NoSpaceError
from odirect.cache.pagecache import FilePages, PageCache
from odirect.sched.drive_sync import Stalled
from odirect.sched.locks import Mutex
from odirect.sched.scheduler import Scheduler
from odirect.sched.traps import yield_now
from odirect.testing.model import ModelFile

T = TypeVar("T")

PAGE = 1024


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """What `coroutine` returns; Stalled if it waits for what never comes."""
    scheduler = Scheduler()
    task = scheduler.spawn(coroutine)
    scheduler.run_ready()
    if not task.done:
        raise Stalled(repr(task))
    return task.result()


class FakeFile:
    """A `Backing` whose calls suspend, are checked, and can be made to fail.

    blocks        what the device has, by page; pages that are not in it are holes
    free          how many blocks can still be allocated
    reserved      units that were promised and not given back
    overhead      units that every reservation asks for beside its blocks, and writing never uses
    bad_reads     pages whose reading fails, bad_writes: whose writing fails
    reads, writes (first page, count) of every call
    turns         how often an I/O lets others run
    """

    def __init__(self, data: bytes = b"", *, page_bytes: int = PAGE, free: int = 1 << 30, turns: int = 1) -> None:
        self.page_bytes = page_bytes
        self.size_bytes = len(data)
        self.blocks: dict[int, bytes] = {}
        for start in range(0, len(data), page_bytes):
            self.blocks[start // page_bytes] = data[start : start + page_bytes].ljust(page_bytes, b"\0")
        self.free = free
        self.reserved = 0
        self.overhead = 0
        self.bad_reads: set[int] = set()
        self.bad_writes: set[int] = set()
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.turns = turns
        self.before_write: Callable[[], None] = lambda: None
        self._being_written: set[int] = set()

    async def _turn(self) -> None:
        for _ in range(self.turns):
            await yield_now()

    def _pages(self, offset: int, segments: Sequence[memoryview]) -> range:
        length = sum(map(len, segments))
        assert offset % self.page_bytes == 0
        assert length % self.page_bytes == 0
        assert length > 0
        return range(offset // self.page_bytes, (offset + length) // self.page_bytes)

    async def read_pages(self, offset: int, segments: Sequence[memoryview]) -> None:
        pages = self._pages(offset, segments)
        self.reads.append((pages.start, len(pages)))
        for segment in segments:
            segment[:] = b"\xee" * len(segment)  # Whoever looks before it is over sees this.
        await self._turn()
        bad = self.bad_reads & set(pages)
        if bad:
            raise DeviceError(f"cannot read page {min(bad)}")
        data = b"".join(self.blocks.get(page, bytes(self.page_bytes)) for page in pages)
        past = max(0, offset + len(data) - max(offset, self.size_bytes))
        data = data[: len(data) - past] + bytes(past)
        at = 0
        for segment in segments:
            segment[:] = data[at : at + len(segment)]
            at += len(segment)
        await self._turn()

    async def write_pages(self, offset: int, segments: Sequence[memoryview]) -> None:
        pages = self._pages(offset, segments)
        self.writes.append((pages.start, len(pages)))
        assert not self._being_written & set(pages), "two writes of one page in flight"
        data = b"".join(map(bytes, segments))
        past = offset + len(data) - self.size_bytes
        if past > 0:
            assert not any(data[-past:]), "bytes past the size that are not zero"
        self._being_written |= set(pages)
        try:
            self.before_write()
            await self._turn()
            assert b"".join(map(bytes, segments)) == data, "the image changed while it was being written (F21)"
            bad = self.bad_writes & set(pages)
            if bad:
                raise DeviceError(f"cannot write page {min(bad)}")
            new = [page for page in pages if page not in self.blocks]
            assert len(new) <= min(self.free, self.reserved), "write-back of what was not reserved"
            self.free -= len(new)
            for place, page in enumerate(pages):
                self.blocks[page] = data[place * self.page_bytes : (place + 1) * self.page_bytes]
            await self._turn()
        finally:
            self._being_written -= set(pages)

    def reserve(self, offset: int, length: int) -> int:
        assert offset % self.page_bytes == length % self.page_bytes == 0
        pages = range(offset // self.page_bytes, (offset + length) // self.page_bytes)
        units = sum(page not in self.blocks for page in pages)
        if units:
            units += self.overhead
        if units > self.free - self.reserved:
            raise NoSpaceError(f"{units} blocks of {self.free - self.reserved}")
        self.reserved += units
        return units

    def release(self, units: int) -> None:
        assert 0 < units <= self.reserved
        self.reserved -= units

    def data(self) -> bytes:
        """What the device has of the file."""
        pages = range(-(-self.size_bytes // self.page_bytes))
        return b"".join(self.blocks.get(page, bytes(self.page_bytes)) for page in pages)[: self.size_bytes]

    def truncate_blocks(self, size: int) -> None:
        """Free what lies past `size`, as a file system does: on the device, too, the rest of a page is zero."""
        for page in [page for page in self.blocks if page * self.page_bytes >= size]:
            del self.blocks[page]
            self.free += 1
        page, inner = divmod(size, self.page_bytes)
        if page in self.blocks:
            self.blocks[page] = self.blocks[page][:inner].ljust(self.page_bytes, b"\0")


class CachedFile:
    """What a file system makes of it: the lock, the size, and the operations on file and model together."""

    def __init__(self, cache: PageCache, backing: FakeFile) -> None:
        self.backing = backing
        self.pages = FilePages(cache, backing)
        self.model = ModelFile(backing.data())
        self.lock = Mutex()

    async def write(self, offset: int, data: bytes | bytearray, *, in_steps: bool = False) -> int:
        def extend(end: int) -> None:
            self.model.pwrite(data[: end - offset], offset)
            self.backing.size_bytes = max(self.backing.size_bytes, end)

        with await self.lock.hold():
            # Inside the size it is done in steps anyway, and the model must follow each.
            in_steps = in_steps or offset + len(data) <= self.backing.size_bytes
            done = await self.pages.write(offset, [memoryview(data)], extend=extend if in_steps else None)
            if done:
                extend(offset + done)
            return done

    async def zero(self, offset: int, length: int) -> None:
        with await self.lock.hold():
            await self.pages.zero(offset, length)
            if length:
                self.model.pwrite(bytes(length), offset)
                self.backing.size_bytes = max(self.backing.size_bytes, offset + length)

    async def truncate(self, size: int) -> None:
        with await self.lock.hold():
            await self.pages.wait_write_back(size, 1 << 40)
            self.pages.truncate(size)
            self.backing.size_bytes = size
            self.backing.truncate_blocks(size)
            self.model.truncate(size)

    async def read(self, offset: int, length: int) -> bytes:
        memory = bytearray(b"\xaa" * length)
        done = await self.pages.read(offset, [memoryview(memory)])
        assert memory[done:] == b"\xaa" * (length - done), "more was written than was read (F02)"
        return bytes(memory[:done])


def explained(*files: FilePages) -> int:
    """The units that dirty pages, and those being written, stand for; each promise names them all (F30)."""
    holders: dict[int, list[Any]] = {}
    for file in files:
        for page in file._pages.values():
            assert page.promise is None or page.dirty
            if page.promise is not None:
                holders.setdefault(id(page.promise), [page.promise, 0])[1] += 1
            image = page.image
            if image is not None:
                promise = image.promises[image.pages.index(page)]
                if promise is not None:
                    holders.setdefault(id(promise), [promise, 0])[1] += 1
    for promise, count in holders.values():
        assert promise.pages == count
    return sum(promise.units for promise, _ in holders.values())


def check_quiet(cache: PageCache, *files: FilePages) -> None:
    """With no task left: the cache's counts agree with its pages, and nothing is held (F30, G20)."""
    idle, unwritten, used = set(), 0, 0
    for file in files:
        assert not file._fills
        assert not file._writing
        for index, page in file._pages.items():
            assert page.owner is file
            assert page.index == index
            assert not page.gone
            assert not page.pins
            assert page.fill is None
            assert page.image is None
            assert page.idle == (not page.dirty)
            assert page.dirty == (index in file._dirty)
            if page.idle:
                idle.add(page)
        assert file.dirty_bytes == len(file._dirty) * file.page_bytes
        assert (file in cache._dirty_files) == bool(file._dirty)
        unwritten += file.dirty_bytes
        used += len(file._pages) * file.page_bytes
        backing = file._backing
        assert isinstance(backing, FakeFile)
        assert backing.reserved == explained(file)
    assert set(cache._idle) == idle
    assert cache.dirty_bytes == unwritten
    assert cache.used_bytes == used
    assert not cache._images
    assert not cache._image_memory._small.lent
    assert not cache._image_memory._large.lent
    lent = {id(page) for memory in cache._memory.values() for slab in memory._with_room for page in slab.free}
    assert not lent & {id(page) for file in files for page in file._pages.values()}, "a page that is free and in use"
