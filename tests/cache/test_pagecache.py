"""The page cache agrees with a plain file, reads and keeps no more than it should, and loses no space."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cache.pages_kit import PAGE, CachedFile, FakeFile, check_quiet, drive, explained

from odirect.base.errors import BadBufferError, DeviceError, NoSpaceError
from odirect.block.buffers import empty
from odirect.cache.pagecache import FilePages, PageCache
from odirect.cache.pages import PageMemory, segments_of
from odirect.sched.scheduler import Cancelled, Scheduler
from odirect.sched.traps import joined, yield_now
from odirect.testing.sim import Simulation, explore, run_seeds

MANY = 1 << 30


def numbered(pages: int, size: int = PAGE) -> bytes:
    """Pages that are each full of their number, from 1 on."""
    return b"".join(bytes([number % 250 + 1]) * size for number in range(pages))


# --- against the model --------------------------------------------------------------------------

OFFSETS = st.one_of(st.integers(0, 24 * PAGE), st.integers(0, 24).map(lambda page: page * PAGE))
LENGTHS = st.one_of(st.integers(0, 10 * PAGE), st.integers(0, 10).map(lambda page: page * PAGE), st.integers(0, 40))
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "write in steps"]), OFFSETS, LENGTHS, st.integers(1, 255)),
        st.tuples(st.sampled_from(["read", "zero", "write back", "drop", "invalidate"]), OFFSETS, LENGTHS),
        st.tuples(st.just("truncate"), OFFSETS),
        st.tuples(st.sampled_from(["fail reads", "fail writes"]), st.integers(0, 30)),
    ),
    max_size=40,
)


async def _apply(file: CachedFile, name: str, *rest: int) -> None:
    backing, model, pages = file.backing, file.model, file.pages
    match name, rest:
        case "write" | "write in steps", (offset, length, value):
            data = bytes((value + place) % 256 for place in range(length))
            before = model.size
            try:
                done = await file.write(offset, data, in_steps=name != "write")
            except NoSpaceError:
                done = 0
            if done < length:
                # False only where the next page really has no room: nothing else is reserved then (F30).
                page = (offset + done) // PAGE
                assert page not in backing.blocks
                assert not pages.is_dirty(page * PAGE, 1)
                assert backing.free - backing.reserved <= backing.overhead
                assert done == 0 or (offset + done) % PAGE == 0
            assert backing.size_bytes == max(before, offset + done if done else 0)
        case "zero", (offset, length):
            try:
                await file.zero(offset, length)
            except NoSpaceError:
                # What was zeroed before it ran out counts inside the size; the rest is still as it was.
                kept = await file.read(0, 1 << 18)
                assert len(kept) == model.size
                for place, (found, expected) in enumerate(zip(kept, model.data, strict=True)):
                    assert found == expected or (found == 0 and offset <= place < offset + length)
                if model.size:
                    model.pwrite(kept, 0)
                # Pages past the size that this has made dirty are given back by whoever gives up.
                await pages.wait_write_back(0, MANY)
                pages.truncate(model.size)
                backing.truncate_blocks(model.size)
        case "read", (offset, length):
            assert await file.read(offset, length) == model.pread(length, offset)
        case "write back", (offset, length):
            await pages.write_back(offset, length)
            assert not pages.is_dirty(offset, length)
        case "drop", (offset, length):
            assert await pages.drop(offset, length)
            assert not pages.is_cached(offset, length)
        case "invalidate", (offset, length):
            dirty = pages.is_dirty(offset, length)
            assert pages.invalidate(offset, length) == (not dirty)
            assert pages.is_cached(offset, length) == dirty
        case "truncate", (size,):
            await file.truncate(size)
        case "fail reads", (page,):
            await pages.drop(page * PAGE, PAGE)
            backing.bad_reads = {page}
            if page * PAGE < model.size:
                with pytest.raises(DeviceError, match=f"page {page}"):
                    await file.read(page * PAGE, 1)
            backing.bad_reads = set()
            assert not pages.is_cached(page * PAGE, 1)
        case "fail writes", (page,):
            seen = pages.errors.sample()
            was_dirty = pages.is_dirty(page * PAGE, 1)
            backing.bad_writes = {page}
            try:
                await pages.write_back(page * PAGE, 1)
                assert not was_dirty
            except DeviceError as error:
                assert pages.errors.check(seen) == (seen + 1, error)
                # It stays readable; this writes it again.
                backing.bad_writes = set()
                start = page * PAGE
                data = model.pread(PAGE, start)
                assert await file.read(start, PAGE) == data
                try:
                    await file.write(start, data)
                except NoSpaceError:
                    await file.truncate(0)
            backing.bad_writes = set()
        case _:
            raise AssertionError(name)


@settings(max_examples=200)
@given(
    OPERATIONS,
    st.sampled_from([3 * PAGE, 8 * PAGE, 1 << 20]),
    st.one_of(st.just(1 << 30), st.integers(0, 30)),
    st.integers(0, 2),
    st.integers(0, 12 * PAGE),
)
def test_the_cache_agrees_with_the_model(operations, limit_bytes, free, overhead, size):
    """F02, F05, F13, F30: holes, failing I/O, little memory and little space; and what is on the device at the end."""
    backing = FakeFile(bytes(place % 251 + 1 for place in range(size)), free=free, turns=0)
    backing.blocks.pop(2, None)  # a hole
    backing.overhead = overhead
    cache = PageCache(limit_bytes)
    file = CachedFile(cache, backing)
    for operation in operations:
        drive(_apply(file, *operation))
        check_quiet(cache, file.pages)
    assert drive(file.read(0, 1 << 18)) == file.model.data
    drive(file.pages.write_back(0, MANY))
    check_quiet(cache, file.pages)
    assert backing.reserved == 0
    assert backing.data() == file.model.data


@pytest.mark.parametrize("page_bytes", [1 << 10, 4 << 10, 64 << 10])
@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4096, 4097])
def test_ends_of_files(page_bytes, size):
    """F02: what is read around the end is what is there, and the caller's memory past it stays untouched."""
    data = bytes(place % 251 + 1 for place in range(size))
    for offset in (0, 1, 511, 512, 4095, 4096, size - 1, size, size + 1):
        file = CachedFile(PageCache(), FakeFile(data, page_bytes=page_bytes, turns=0))
        for length in (0, 1, 512, 4096, 9000):
            assert drive(file.read(offset, length)) == data[offset : offset + length]


def test_requests_in_several_segments():
    """Segments may end anywhere in a page, and be empty."""
    data = os.urandom(5 * PAGE + 77)
    file = CachedFile(PageCache(), FakeFile(turns=0))
    cuts = [0, 0, 1, 500, 500, PAGE, PAGE + 1, 3 * PAGE + 9, len(data), len(data)]
    parts = [memoryview(data)[start:stop] for start, stop in itertools.pairwise(cuts)]
    assert drive(file.pages.write(300, parts)) == len(data)
    file.backing.size_bytes = 300 + len(data)
    memory = bytearray(len(data))
    parts = [memoryview(memory)[start:stop] for start, stop in itertools.pairwise(cuts)]
    assert drive(file.pages.read(300, parts)) == len(data)
    assert memory == data
    assert drive(file.read(0, 300)) == bytes(300)


def test_what_is_no_request_is_refused():
    backing = FakeFile()
    pages = FilePages(PageCache(), backing)
    for call in (
        lambda: drive(pages.read(-1, [])),
        lambda: drive(pages.write(-1, [])),
        lambda: pages.invalidate(-1, 1) if pages._pages else pages._span(-1, 1),
        lambda: PageCache(0),
    ):
        with pytest.raises(ValueError, match=r"at -1|not a range|a page cache of"):
            call()
    for page_bytes in (512, 3000, 128 << 10):
        backing.page_bytes = page_bytes
        with pytest.raises(ValueError, match="a power of two"):
            FilePages(PageCache(), backing)


# --- what is read, and when ---------------------------------------------------------------------


def test_a_page_that_is_written_whole_is_not_read():
    file = CachedFile(PageCache(), FakeFile(numbered(4)))
    drive(file.write(PAGE, b"x" * 2 * PAGE))
    assert not file.backing.reads
    drive(file.write(10, b"y" * (PAGE - 10)))
    assert file.backing.reads == [(0, 1)]
    assert drive(file.read(0, 4 * PAGE)) == file.model.data


def test_what_lies_past_the_size_is_not_read():
    """Neither for writing nor for zeroing in part, and also where the end itself is written over."""
    file = CachedFile(PageCache(), FakeFile(b"old" * 100))
    drive(file.write(0, b"x" * 300))
    drive(file.write(5 * PAGE + 7, b"y"))
    drive(file.zero(9 * PAGE + 1, 2 * PAGE))
    assert not file.backing.reads
    assert drive(file.read(0, 1 << 18)) == file.model.data
    assert file.backing.reads  # of the hole between


def test_sequential_readers_are_read_ahead_and_others_are_not():
    """The window doubles from 16 KiB to 512 KiB at each miss; a jump ends it."""
    size = 4096
    file = CachedFile(PageCache(), FakeFile(numbered(1000, size), page_bytes=size))
    for page in range(600):
        assert drive(file.read(page * size, size)) == bytes([page % 250 + 1]) * size
    assert [count for _, count in file.backing.reads] == [5, 9, 17, 33, 65, 129, 129, 129, 129]
    assert drive(file.pages.drop(0, MANY))
    file.backing.reads.clear()
    for page in (900, 500, 800, 10):
        drive(file.read(page * size, 100))
    assert file.backing.reads == [(900, 1), (500, 1), (800, 1), (10, 1)]
    drive(file.read(998 * size, size))
    drive(file.read(999 * size, size))
    assert file.backing.reads[4:] == [(998, 1), (999, 1)]  # not past the end


def test_adjacent_missing_pages_are_one_read():
    file = CachedFile(PageCache(), FakeFile(numbered(64)))
    drive(file.read(5 * PAGE, 1))
    drive(file.read(9 * PAGE, PAGE * 2))
    file.backing.reads.clear()
    assert drive(file.read(2 * PAGE, 20 * PAGE)) == file.model.pread(20 * PAGE, 2 * PAGE)
    assert file.backing.reads == [(2, 3), (6, 3), (11, 11)]


def test_pages_beside_each_other_are_one_segment():
    memory = PageMemory(PAGE, 8 * PAGE)
    pages = [memory.take() for _ in range(11)]
    assert [len(segment) for segment in segments_of(pages)] == [8 * PAGE, 3 * PAGE]
    assert [len(segment) for segment in segments_of(pages[::2])] == [PAGE] * 6
    for place, page in enumerate(pages):
        page.memory[:] = bytes([place]) * PAGE
    assert b"".join(segments_of(pages)) == b"".join(bytes([place]) * PAGE for place in range(11))
    for page in pages:
        memory.give(page)
    assert len(memory._with_room) == 1  # The other slab went back to the system.


# --- reads that fail, and readers that wait -----------------------------------------------------


def test_everybody_who_waits_for_a_page_gets_it_or_its_error():
    """One read serves all; a failed one is raised to all, and the page is asked for again later."""
    backing = FakeFile(numbered(3))
    cache = PageCache()
    file = CachedFile(cache, backing)
    for bad in (set(), {1}):
        backing.bad_reads = bad
        backing.reads.clear()
        scheduler = Scheduler()
        readers = [scheduler.spawn(file.read(PAGE + 3, 100)) for _ in range(3)]
        scheduler.run_ready()
        assert backing.reads == [(1, 1)]
        if bad:
            assert all(isinstance(reader.error, DeviceError) for reader in readers)
            assert not file.pages.is_cached(0, MANY)
        else:
            assert [reader.result() for reader in readers] == [b"\2" * 100] * 3
        file.pages.invalidate(0, MANY)
        check_quiet(cache, file.pages)
    backing.bad_reads = set()
    assert drive(file.read(PAGE, 1)) == b"\2"


def test_a_bad_page_behind_the_wanted_one_does_no_harm():
    """What was read ahead, or for somebody else, may fail: the pages before it are read all the same."""
    backing = FakeFile(numbered(8))
    backing.bad_reads = {5}
    cache = PageCache()
    file = CachedFile(cache, backing)
    assert drive(file.read(0, PAGE)) == file.model.pread(PAGE, 0)
    with pytest.raises(DeviceError, match="page 5"):
        drive(file.read(0, 8 * PAGE))
    assert drive(file.read(0, 5 * PAGE)) == file.model.pread(5 * PAGE, 0)
    assert drive(file.read(6 * PAGE, 2 * PAGE)) == file.model.pread(2 * PAGE, 6 * PAGE)
    assert drive(file.write(4 * PAGE + 1, b"x")) == 1
    with pytest.raises(DeviceError, match="page 5"):
        drive(file.write(5 * PAGE + 1, b"x"))
    check_quiet(cache, file.pages)


def test_a_write_is_cut_short_by_what_cannot_be_read_only_in_steps():
    """In one step nothing is copied before the last page has been read; the error is then raised."""
    backing = FakeFile(numbered(8))
    backing.bad_reads = {6}
    file = CachedFile(PageCache(8 * PAGE), backing)  # steps of two pages
    assert drive(file.write(0, b"x" * (6 * PAGE + 5))) == 6 * PAGE
    assert drive(file.read(0, 6 * PAGE)) == b"x" * 6 * PAGE
    file = CachedFile(PageCache(), backing)
    with pytest.raises(DeviceError, match="page 6"):
        drive(file.write(0, b"x" * (6 * PAGE + 5)))
    assert not file.pages.is_dirty(0, MANY)


def test_a_cancelled_reader_leaves_the_read_to_the_others():
    """Cancelling a caller cancels his wait, never an I/O in flight."""
    backing = FakeFile(numbered(3), turns=5)
    cache = PageCache()
    file = CachedFile(cache, backing)
    scheduler = Scheduler()
    first, second = scheduler.spawn(file.read(0, PAGE)), scheduler.spawn(file.read(0, 2 * PAGE))
    while not backing.reads:
        scheduler.pick().step()
    for _ in range(4):
        scheduler.pick().step()
    first.cancel()
    scheduler.run_ready()
    assert isinstance(first.error, Cancelled)
    assert second.result() == file.model.pread(2 * PAGE, 0)
    assert len(backing.reads) == 1
    check_quiet(cache, file.pages)


# --- memory -------------------------------------------------------------------------------------


def test_the_least_recently_used_clean_page_goes_first():
    cache = PageCache(8 * PAGE)
    file = CachedFile(cache, FakeFile(numbered(64)))
    for page in (50, 40, 30, 20, 10, 0, 60, 55):
        drive(file.read(page * PAGE, 1))
    drive(file.read(50 * PAGE, 1))  # used again
    drive(file.write(40 * PAGE, b"x"))  # dirty
    for page in (5, 15):
        drive(file.read(page * PAGE, 1))
    here = [page for page in range(64) if file.pages.is_cached(page * PAGE, 1)]
    assert here == [0, 5, 10, 15, 40, 50, 55, 60]
    assert cache.used_bytes == 8 * PAGE


def test_one_limit_for_all_files():
    cache = PageCache(16 * PAGE)
    files = [CachedFile(cache, FakeFile(numbered(40))) for _ in range(3)]
    for page in range(40):
        for file in files:
            assert drive(file.read(page * PAGE, PAGE)) == file.model.pread(PAGE, page * PAGE)
            assert cache.used_bytes <= 16 * PAGE
    check_quiet(cache, *(file.pages for file in files))


def test_a_writer_above_the_limit_writes_back_first():
    """His own pages, and those of whoever has been dirty for longest; their errors are theirs (F41)."""
    cache = PageCache(16 * PAGE)
    idler, writer = (CachedFile(cache, FakeFile(free=1000)) for _ in range(2))
    drive(idler.write(0, b"i" * 4 * PAGE))
    idler.backing.bad_writes = {1}
    for page in range(100):
        assert drive(writer.write(page * PAGE, bytes([page]) * PAGE)) == PAGE
        assert cache.dirty_bytes <= 8 * PAGE
        assert cache.used_bytes <= 16 * PAGE
    assert idler.pages.errors.sample() == 1
    assert writer.pages.errors.sample() == 0
    assert not idler.pages.dirty_bytes
    assert drive(writer.read(0, 100 * PAGE)) == writer.model.data
    check_quiet(cache, idler.pages, writer.pages)


def test_a_long_write_is_done_in_steps_where_that_is_allowed():
    """Inside the size, or with `extend`: never more dirty than the limit has room for."""
    cache = PageCache(16 * PAGE)
    file = CachedFile(cache, FakeFile())
    most = 0

    def note() -> None:
        nonlocal most
        most = max(most, cache.dirty_bytes)

    file.backing.before_write = note
    data = os.urandom(200 * PAGE + 5)
    assert drive(file.write(3, data, in_steps=True)) == len(data)
    assert drive(file.write(0, data)) == len(data)
    assert 0 < most <= 8 * PAGE
    assert drive(file.read(0, 1 << 18)) == file.model.data


# --- space --------------------------------------------------------------------------------------


def test_a_refused_write_leaves_the_cache_as_it_was():
    """F30: nothing reserved, nothing dirty, nothing changed."""
    cache = PageCache()
    file = CachedFile(cache, FakeFile(numbered(2), free=0))
    with pytest.raises(NoSpaceError):
        drive(file.write(2 * PAGE, b"x" * PAGE))
    assert not file.pages.is_cached(2 * PAGE, PAGE)
    assert file.backing.reserved == 0
    assert drive(file.write(PAGE, b"x" * 3 * PAGE)) == PAGE  # over what is there, with nothing free
    assert file.backing.reserved == 0
    check_quiet(cache, file.pages)


def test_a_reservation_that_breaks_down_leaves_nothing_reserved():
    """F30: whatever `reserve` raises; here at the second piece of a long write."""

    class Broken(FakeFile):
        def reserve(self, offset: int, length: int) -> int:
            if offset:
                raise KeyError("not in the cache")
            return super().reserve(offset, length)

    cache = PageCache()
    file = CachedFile(cache, Broken())
    with pytest.raises(KeyError):
        drive(file.write(0, b"x" * (512 << 10)))
    assert file.backing.reserved == 0
    assert not file.pages.is_cached(0, MANY)
    check_quiet(cache, file.pages)


def test_promises_that_were_too_high_do_not_refuse_a_write():
    """F30: no false NoSpaceError while write-back would give space back."""
    backing = FakeFile(free=12)
    backing.overhead = 3
    cache = PageCache()
    file = CachedFile(cache, backing)
    for page in range(9):  # Each page is promised four blocks, and takes one.
        assert drive(file.write(page * PAGE, b"x" * PAGE)) == PAGE
    assert backing.writes
    drive(file.pages.write_back(0, MANY))
    assert backing.free == 3
    with pytest.raises(NoSpaceError):
        drive(file.write(9 * PAGE, b"x" * PAGE))
    assert backing.reserved == 0
    check_quiet(cache, file.pages)


def test_what_was_promised_is_given_back_by_truncation():
    backing = FakeFile(free=100)
    cache = PageCache()
    file = CachedFile(cache, backing)
    drive(file.write(0, b"x" * 20 * PAGE))
    assert backing.reserved == 20
    drive(file.truncate(0))
    assert backing.reserved == 0
    check_quiet(cache, file.pages)


# --- the caller's memory ------------------------------------------------------------------------


def test_memory_that_is_not_ours_gives_the_same_bytes():
    """F23: copied by the kernel, in pieces."""
    data = os.urandom(600 << 10)
    file = CachedFile(PageCache(), FakeFile(page_bytes=4096))
    with mmap.mmap(-1, len(data)) as foreign:
        foreign[:] = data
        with memoryview(foreign) as view:
            assert drive(file.pages.write(100, [view[:5000], view[5000:]])) == len(data)
        file.backing.size_bytes = 100 + len(data)
        foreign[:] = bytes(len(data))
        with memoryview(foreign) as view:
            assert drive(file.pages.read(100, [view])) == len(data)
        assert foreign[:] == data
    ours = empty(len(data))
    assert drive(file.pages.read(100, [ours])) == len(data)
    assert ours == data


def test_a_mapping_that_was_cut_short(scratch: Path):
    """F23: an error, or the short count up to there; no page is made of what could not be read."""
    path = scratch / "cut"
    path.write_bytes(bytes(1 << 20))
    cache = PageCache()
    file = CachedFile(cache, FakeFile(page_bytes=4096))
    with open(path, "r+b") as opened:
        area = mmap.mmap(opened.fileno(), 1 << 20)
        os.ftruncate(opened.fileno(), 300 << 10)
    view = memoryview(area)
    try:
        assert drive(file.pages.write(0, [view])) == 256 << 10
        file.backing.size_bytes = 256 << 10
        with pytest.raises(BadBufferError):
            drive(file.pages.write(0, [view[512 << 10 :]]))
        with pytest.raises(BadBufferError):
            drive(file.pages.read(0, [view[512 << 10 :]]))
        assert file.backing.reserved == 64
        check_quiet(cache, file.pages)
    finally:
        view.release()
        gc.collect()  # The errors and what they saw of the memory.
        area.close()


# --- forgetting ---------------------------------------------------------------------------------


def test_truncating_what_is_being_written_is_a_mistake():
    file = CachedFile(PageCache(), FakeFile())
    drive(file.write(0, b"x" * 4 * PAGE))
    scheduler = Scheduler()
    task = scheduler.spawn(file.pages.write_back(0, MANY))
    while not file.pages._writing:
        scheduler.pick().step()
    with pytest.raises(RuntimeError, match="being written"):
        file.pages.truncate(PAGE)
    assert file.pages.is_cached(3 * PAGE, 1)
    file.pages.truncate(4 * PAGE)
    scheduler.run_ready()
    task.result()
    file.pages.truncate(PAGE)
    assert not file.pages.is_cached(PAGE, MANY)


@pytest.mark.parametrize("when", ["before the device has answered", "before anybody is told", "afterwards"])
def test_truncation_zeroes_the_rest_of_the_page(when):
    """F11: what was there does not come back when the file grows again, also if it is just being read."""
    backing = FakeFile(numbered(3), turns=3)
    cache = PageCache()
    file = CachedFile(cache, backing)
    scheduler = Scheduler()
    reader = scheduler.spawn(file.read(0, 3 * PAGE))
    while not backing.reads:
        scheduler.pick().step()
    while when == "before anybody is told" and file.pages._pages[1].memory[:1] != b"\2":
        scheduler.pick().step()
    assert file.pages._pages[1].fill is not None
    if when == "afterwards":
        scheduler.run_ready()
    backing.size_bytes = PAGE + 10
    file.pages.truncate(PAGE + 10)
    backing.truncate_blocks(PAGE + 10)
    backing.size_bytes = 2 * PAGE
    scheduler.run_ready()
    now = b"\2" * 10 + bytes(PAGE - 10)
    assert reader.result()[PAGE:] == (numbered(3)[PAGE:] if when == "afterwards" else now)
    assert drive(file.read(PAGE, PAGE)) == now
    check_quiet(cache, file.pages)


def test_what_was_cut_off_before_the_read_began_is_not_read():
    file = CachedFile(PageCache(), FakeFile(numbered(3)))
    scheduler = Scheduler()
    reader = scheduler.spawn(file.read(PAGE, 2 * PAGE))
    scheduler.pick().step()
    drive(file.truncate(PAGE))
    scheduler.run_ready()
    assert reader.result() == b""
    assert not file.backing.reads


def test_a_direct_write_under_a_read_leaves_nothing_stale():
    """F20: a page that was being read when its block was written past the cache is read again."""
    backing = FakeFile(numbered(2), turns=3)
    cache = PageCache()
    file = CachedFile(cache, backing)
    scheduler = Scheduler()
    reader = scheduler.spawn(file.read(0, PAGE))
    while not backing.reads:
        scheduler.pick().step()
    while file.pages._pages[0].memory[:1] != b"\1":
        scheduler.pick().step()
    assert file.pages._pages[0].fill is not None  # The old bytes have arrived, and nobody was told.
    backing.blocks[0] = b"n" * PAGE
    assert file.pages.invalidate(0, PAGE)
    scheduler.run_ready()
    assert reader.result() == b"n" * PAGE
    assert drive(file.read(0, PAGE)) == b"n" * PAGE
    check_quiet(cache, file.pages)


def test_drop_gives_up_on_a_page_that_is_changed_again_and_again():
    """L03: False, with the page dirty and nothing else left behind; a pause lets it succeed."""
    backing = FakeFile(numbered(2))
    cache = PageCache()
    file = CachedFile(cache, backing)
    drive(file.write(0, b"a" * 2 * PAGE))
    changes = [100]

    def change() -> None:
        if changes[0]:
            changes[0] -= 1
            assert drive(file.pages.write(5, [memoryview(b"%3d" % changes[0])])) == 3

    backing.before_write = change
    assert not drive(file.pages.drop(0, 2 * PAGE))
    assert file.pages.is_dirty(0, 1)
    assert not file.pages.is_cached(PAGE, PAGE)
    changes[0] = 2
    assert drive(file.pages.drop(0, PAGE))
    assert backing.blocks[0][5:8] == b"  0"
    check_quiet(cache, file.pages)


def test_drop_raises_the_error_of_its_write_back():
    """G03: an error there ends the call; the page can still be read."""
    backing = FakeFile(numbered(2))
    file = CachedFile(PageCache(), backing)
    drive(file.write(0, b"a"))
    backing.bad_writes = {0}
    with pytest.raises(DeviceError):
        drive(file.pages.drop(0, PAGE))
    assert drive(file.read(0, 2)) == b"a\1"
    assert drive(file.pages.drop(0, PAGE))


# --- many tasks ---------------------------------------------------------------------------------


def _mixed(sim: Simulation, limit_bytes: int, free: int):
    """Writers, readers, write-back, truncation, dropping and cancelling at once, checked against the model."""
    rng = sim.rng
    cache = PageCache(limit_bytes)
    files = [
        CachedFile(cache, FakeFile(rng.randbytes(rng.randrange(9 * PAGE)), free=free, turns=rng.randrange(4)))
        for _ in range(2)
    ]
    for file in files:
        file.backing.overhead = rng.randrange(3)

    async def act(file: CachedFile) -> None:
        offset, length = rng.randrange(12 * PAGE), rng.randrange(4 * PAGE)
        match rng.choice(
            ["write", "write", "write", "read", "read one", "write back", "drop", "invalidate", "truncate"]
        ):
            case "write":
                try:
                    await file.write(offset, rng.randbytes(length), in_steps=rng.random() < 0.5)
                except NoSpaceError:
                    pass
            case "read":
                await file.read(offset, length)
            case "read one":
                # What lies in one page is copied at one instant, and `read` returns then.
                data = await file.read(offset, min(length, PAGE - offset % PAGE))
                assert data == file.model.pread(len(data), offset)  # It may have grown meanwhile.
            case "write back":
                await file.pages.write_back(offset, length)
            case "drop":
                await file.pages.drop(offset, length)
            case "invalidate":
                file.pages.invalidate(offset, length)
            case "truncate":
                await file.truncate(offset)

    async def worker(file: CachedFile) -> None:
        for _ in range(12):
            await act(file)

    async def main() -> None:
        tasks = [sim.scheduler.spawn(worker(files[number % 2])) for number in range(6)]
        rounds = rng.randrange(200)
        while not all(task.done for task in tasks):
            await yield_now()
            for file in files:
                assert explained(file.pages) == file.backing.reserved
            rounds -= 1
            if not rounds:
                tasks[0].cancel()
        for task in tasks:
            if task.error is not None and not isinstance(task.error, Cancelled):
                raise task.error
        for file in files:
            assert await file.read(0, 1 << 20) == file.model.data
            await file.pages.write_back(0, MANY)
            await file.pages.wait_write_back(0, MANY)
            assert file.backing.reserved == 0
            assert file.backing.data() == file.model.data
        while any(file.pages._fills for file in files):  # What a cancelled reader left to itself.
            await yield_now()
        check_quiet(cache, *(file.pages for file in files))

    return main()


@pytest.mark.parametrize(
    ("limit_bytes", "free"), [(1 << 20, 1 << 20), (4 * PAGE, 1 << 20), (12 * PAGE, 10)], ids=["roomy", "small", "full"]
)
def test_everything_at_once(limit_bytes, free):
    """F13, F20, F21, F30: after any interleaving, file, model and device agree and nothing is held."""
    run_seeds(range(60), lambda sim: _mixed(sim, limit_bytes, free))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit_bytes", "free"), [(1 << 20, 1 << 20), (4 * PAGE, 1 << 20), (12 * PAGE, 10)], ids=["roomy", "small", "full"]
)
def test_everything_at_once_for_longer(limit_bytes, free):
    run_seeds(range(1000, 1200), lambda sim: _mixed(sim, limit_bytes, free))


def _explored(*parts: str):
    """A scenario of a few tasks on two pages, for every order of their steps."""

    def scenario(sim: Simulation):
        cache = PageCache(2 * PAGE)
        file = CachedFile(cache, FakeFile(b"o" * 2 * PAGE, turns=1))
        file.backing.turns = 1 if len(parts) < 3 else 0

        async def part(name: str) -> None:
            match name:
                case "write":
                    await file.write(PAGE + 1, b"w" * 9)
                case "write whole":
                    await file.write(PAGE, b"W" * PAGE)
                case "read":
                    data = await file.read(PAGE, PAGE)
                    assert data == file.model.pread(PAGE, PAGE)
                case "back":
                    await file.pages.write_back(0, 2 * PAGE)
                case "truncate":
                    await file.truncate(PAGE + 4)
                case "drop":
                    await file.pages.drop(PAGE, PAGE)
                case "invalidate":
                    await yield_now()
                    file.pages.invalidate(0, 2 * PAGE)

        async def main() -> None:
            tasks = [sim.spawn(part(name), name) for name in parts]
            for task in tasks:
                await joined(task)
            assert await file.read(0, 4 * PAGE) == file.model.data
            await file.pages.write_back(0, 4 * PAGE)
            assert file.backing.data() == file.model.data
            check_quiet(cache, file.pages)

        return main()

    return scenario


@pytest.mark.parametrize(
    "parts",
    [
        ("write", "read"),
        ("write whole", "read"),
        ("write", "back"),
        ("truncate", "read"),
        ("truncate", "write"),
        ("drop", "write"),
        ("invalidate", "read"),
        ("write", "back", "truncate"),
        ("write whole", "read", "drop"),
    ],
    ids="-".join,
)
def test_every_order(parts):
    """The same for every order of the steps of two or three tasks (as many as there is time for)."""
    found = explore(_explored(*parts), max_states=400)
    assert found.runs > 10
