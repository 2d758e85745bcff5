"""Memory for direct I/O: aligned, private, lent in turn, and copied without being killed."""

from __future__ import annotations

import array
import mmap
import os
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odirect.base.errors import BadBufferError
from odirect.block.buffers import (
    BufferPool,
    as_bytes_view,
    copy_bytes,
    empty,
    gather_bytes,
    scatter_bytes,
    segments_aligned,
    slice_segments,
)
from odirect.ring._calls import address_of
from odirect.sched.scheduler import Cancelled, Scheduler
from odirect.sched.traps import Event, wait

PAGE = mmap.PAGESIZE
HUGE = 2 << 20

# --- empty ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 511, PAGE, PAGE + 1, HUGE, HUGE + 1])
@pytest.mark.parametrize("options", [{}, {"huge": True}, {"huge": False}])
def test_empty_is_aligned_writable_and_zero(length, options):
    view = empty(length, **options)
    assert len(view) == length and view.format == "B" and not view.readonly
    assert not any(view)
    assert length == 0 or address_of(view) % PAGE == 0
    if length:
        view[-1] = 7
        assert view[-1] == 7


def test_empty_refuses_nonsense():
    with pytest.raises(ValueError, match="-1 bytes"):
        empty(-1)
    with pytest.raises(MemoryError):
        empty(1 << 62)


def test_empty_is_not_shared_with_a_child():
    """F24: a child gets zeroes, not a copy: no page that the device writes to becomes anybody else's."""
    view = empty(PAGE)
    maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
    start = f"{address_of(view):x}-"
    block = next(part for part in maps if f"\n{start}" in part or _covers(part, address_of(view)))
    flags = maps[maps.index(block) + 1].splitlines()[0].split()
    assert "wf" in flags  # wipe on fork


def _covers(part: str, address: int) -> bool:
    for line in part.splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and ":" not in head:
            start, end = (int(word, 16) for word in head.split("-"))
            if start <= address < end:
                return True
    return False


def test_an_array_over_it_keeps_it_alive():
    """F24: the memory lives as long as any view of it."""
    values = numpy.frombuffer(empty(8 * PAGE), dtype=numpy.int64)
    values[:] = 3
    assert int(values.sum()) == 3 * PAGE


# --- as_bytes_view --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(b"abcdefgh"),
        array.array("I", [1, 2]),
        numpy.arange(8, dtype=numpy.uint8),
        numpy.zeros((2, 4), dtype=numpy.int8),
        numpy.zeros((2, 2), dtype=">i2"),
        memoryview(bytearray(8)).cast("I"),
        numpy.zeros((), dtype=numpy.float64),
    ],
)
def test_anything_with_a_buffer_is_bytes_without_a_copy(buffer):
    view = as_bytes_view(buffer, writable=True)
    assert (view.format, view.ndim, len(view)) == ("B", 1, 8)
    assert address_of(view) == address_of(memoryview(buffer))
    view[0] ^= 0xFF
    assert bytes(memoryview(buffer).cast("B") if memoryview(buffer).ndim else view)[0] == view[0]


@pytest.mark.parametrize("empty_one", [b"", bytearray(), numpy.zeros((0, 4)), memoryview(bytearray(4))[2:2]])
def test_nothing_is_a_view_too(empty_one):
    assert len(as_bytes_view(empty_one, writable=False)) == 0


def test_what_cannot_be_used_is_the_callers_mistake():
    for bad in (None, "text", 5, object()):
        with pytest.raises(TypeError):
            as_bytes_view(bad, writable=False)
    for readonly in (b"abc", memoryview(b"abc"), numpy.frombuffer(b"abc", dtype=numpy.uint8)):
        with pytest.raises(ValueError, match="read-only"):
            as_bytes_view(readonly, writable=True)
        assert bytes(as_bytes_view(readonly, writable=False)) == b"abc"
    for strided in (memoryview(bytearray(8))[::2], numpy.zeros((4, 4))[:, 1], numpy.asfortranarray(numpy.eye(3))):
        with pytest.raises(ValueError, match="not contiguous"):
            as_bytes_view(strided, writable=False)
    released = memoryview(bytearray(4))
    released.release()
    with pytest.raises(ValueError):
        as_bytes_view(released, writable=False)


# --- segments -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 60), st.integers(0, 60))
def test_slices_of_segments_are_slices_of_the_whole(sizes, start, length):
    data = bytes(range(sum(sizes)))
    place, segments = 0, []
    for size in sizes:
        segments.append(memoryview(data)[place : place + size])
        place += size
    sliced = slice_segments(segments, start, length)
    assert b"".join(sliced) == data[start : start + length]
    if len(segments) > 1:
        assert all(len(part) for part in sliced) or not length


@given(st.lists(st.integers(0, 9), max_size=8))
def test_scatter_undoes_gather(sizes):
    segments = [memoryview(bytearray(os.urandom(size))) for size in sizes]
    whole = memoryview(bytearray(sum(sizes) + 3))
    gather_bytes(whole, segments)
    assert bytes(whole) == b"".join(segments) + bytes(3)
    targets = [memoryview(bytearray(size)) for size in sizes]
    scatter_bytes(targets, whole)
    assert [bytes(target) for target in targets] == [bytes(segment) for segment in segments]


def test_alignment_is_judged_by_address_and_length():
    """B01, F51: each segment's address by the one, its length by the other."""
    area = empty(4 * PAGE)
    assert segments_aligned([area[:512], area[512:1024]], 512, 512)
    assert not segments_aligned([area[:512], area[512:1024]], 1024, 512)
    assert not segments_aligned([area[:512], area[4:516]], 512, 512)
    assert segments_aligned([area[4:516]], 4, 512)
    assert not segments_aligned([area[:513]], 1, 512)
    assert segments_aligned([area[1:2]], 1, 1) and segments_aligned([], 4096, 4096)


# --- copies ---------------------------------------------------------------------------------------


def test_memory_of_a_file_that_was_cut_short_is_an_error(tmp_path):
    """F23: touching it would kill the process; the copy says EFAULT, in either direction."""
    path = tmp_path / "short"
    path.write_bytes(b"z" * 2 * PAGE)
    private = memoryview(bytearray(2 * PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 2 * PAGE) as area:
        view = memoryview(area)
        copy_bytes(private, view)
        assert bytes(private) == b"z" * 2 * PAGE
        os.truncate(path, PAGE)
        for target, source in ((private, view), (view, private)):
            with pytest.raises(BadBufferError):
                copy_bytes(target, source)
        copy_bytes(private[:PAGE], view[:PAGE])
        view.release()


# --- the pool -------------------------------------------------------------------------------------


def test_a_pool_is_of_whole_pages():
    for chunk, chunks in ((0, 1), (100, 1), (PAGE, 0), (-PAGE, 1)):
        with pytest.raises(ValueError):
            BufferPool(chunk, chunks)


def test_buffers_are_lent_and_come_back():
    pool = BufferPool(PAGE, 3)
    assert pool.lent == 0
    leases = [pool.try_take() for _ in range(3)]
    assert all(lease is not None and address_of(lease.view) % PAGE == 0 and len(lease.view) == PAGE for lease in leases)
    assert len({address_of(lease.view) for lease in leases}) == 3
    assert pool.lent == 3 and pool.try_take() is None
    with leases[1]:
        pass
    assert pool.lent == 2
    with pytest.raises(RuntimeError, match="given back already"):
        leases[1].release()
    again = pool.try_take()
    assert again is not None and address_of(again.view) == address_of(leases[1].view)


def test_who_finds_none_waits_in_order_of_arrival():
    """Cancelled ones leave the line, and a buffer that was granted to one is not lost."""
    scheduler, pool = Scheduler(), BufferPool(PAGE, 1)
    order, leave = [], [Event() for _ in range(5)]

    async def use(number: int) -> None:
        with await pool.take():
            order.append(number)
            await wait(leave[number])

    tasks = []
    for number in range(5):
        tasks.append(scheduler.spawn(use(number)))
        scheduler.run_ready()
    assert order == [0] and pool.lent == 1
    tasks[1].cancel()
    leave[0].fire()
    scheduler.ready[0].step()  # The first gives it back; number 2 is granted it, and has not run.
    scheduler.ready.popleft()
    scheduler.run_ready()
    assert order == [0, 2]
    leave[2].fire()
    scheduler.ready.popleft().step()  # Number 2 ends: number 3 is ready with the buffer.
    if scheduler.ready:
        tasks[3].cancel()
    scheduler.run_ready()
    assert order == [0, 2, 3, 4] and isinstance(tasks[3].error, Cancelled) and isinstance(tasks[1].error, Cancelled)
    leave[4].fire()
    scheduler.run_ready()
    assert pool.lent == 0


def test_buffers_are_registered_with_the_ring():
    """Each byte of the pool belongs to a buffer that the ring was given."""

    class Ring:
        def __init__(self) -> None:
            self.areas: list[tuple[int, int]] = []

        def add_buffer(self, buffer: memoryview) -> bool:
            self.areas.append((address_of(buffer), address_of(buffer) + len(buffer)))
            return True

    ring = Ring()
    pool = BufferPool(HUGE // 2, 5, ring=ring)  # type: ignore[arg-type]
    for _ in range(5):
        lease = pool.try_take()
        assert lease is not None
        start = address_of(lease.view)
        assert any(first <= start and start + len(lease.view) <= last for first, last in ring.areas)
    assert pool.try_take() is None
