"""Requests on block devices: rows B, and how they fail."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.dio.kit import Watch, aligned, drive, laid_out, pattern, pump

from odirect.base.errors import (
    AlignmentError,
    AtomicLimitError,
    BadBufferError,
    ClosedError,
    DeviceError,
    NoSpaceError,
    UnsupportedError,
    WouldBlockError,
)
from odirect.block.bio import ATOMIC, DISCARD, FLUSH, FUA, HIPRI, META, NOWAIT, READ, WRITE, ZERO, Bio
from odirect.block.buffers import empty, slice_segments
from odirect.block.device import Limits
from odirect.block.filters.fault import Faults
from odirect.block.filters.volatile_cache import VolatileCache
from odirect.block.memory import MemoryDevice
from odirect.dio import blockdev
from odirect.dio.blockdev import Refused, change_range, flush, split, transfer
from odirect.sched.scheduler import Cancelled, Scheduler
from odirect.sched.traps import wait, yield_now
from odirect.testing.devices import OddDevice, TornDevice, atomic_limits
from odirect.testing.sim import Simulation, explore

KIB = 1 << 10
BLOCK = 512

SMALL_BIOS = Limits(max_bio_bytes=2048, max_segments=4, queue_depth=4, fua=True, volatile_cache=False)


@pytest.fixture(autouse=True)
def trackers_come_back() -> Iterator[None]:
    """B03: every tracker goes back to the reserve, clean."""
    yield
    assert len(blockdev._trackers) == blockdev._RESERVE
    for tracker in blockdev._trackers:
        assert tracker._outstanding == 0 and not tracker._pieces and tracker._device is None


def device_of(data: bytes, limits: Limits = SMALL_BIOS) -> MemoryDevice:
    return MemoryDevice(len(data), limits=limits, data=data)


# --- B01: alignment -------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "read", "write"), [(4, 512, 4096), (512, 4096, 512), (4096, 65536, 4096)])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_misaligned_requests_are_refused_before_anything_is_submitted(memory, read, write, op):
    """B01, F51: offset, length, each buffer's address and each buffer's length."""
    unit = read if op == READ else write
    watch = Watch(OddDevice(1 << 20, memory_align=memory, read_align=read, write_align=write))
    area = empty(8 * unit + 8192)
    good = [area[:unit], area[unit : 3 * unit]]
    wrong: list[tuple[int, Sequence[memoryview], int]] = [
        (1, good, 3 * unit),
        (unit - 1, good, 3 * unit),
        (unit // 2, good, 3 * unit),
        (0, [area[: unit + 1]], unit + 1),
        (0, [area[: unit // 2]], unit // 2),
        (0, [area[: unit // 2], area[unit // 2 : unit]], unit),
    ]
    if memory > 1:
        skew = memory // 2
        wrong += [
            (0, [area[skew : skew + unit]], unit),
            (0, [area[:unit], area[unit + skew : 2 * unit + skew]], 2 * unit),
        ]
    for offset, segments, length in wrong:
        with pytest.raises(AlignmentError) as caught:
            drive(transfer(watch, op, offset, segments, length), watch)
        assert caught.value.errno == errno.EINVAL
    assert watch.seen == []
    assert drive(transfer(watch, op, 0, good, 3 * unit), watch) == 3 * unit


# --- B02, B03: one bio, many bios ------------------------------------------------------------------


def test_what_fits_in_one_bio_takes_no_tracker(monkeypatch):
    """B02: one operation, with the caller's own memory, and no tracking structure."""
    monkeypatch.setattr(blockdev, "_take_tracker", lambda: pytest.fail("a tracker was taken"))
    data = pattern(256 * BLOCK)
    watch = Watch(MemoryDevice(256 * BLOCK, data=data))
    segments = [empty(BLOCK) for _ in range(256)]
    assert drive(transfer(watch, READ, 0, segments, 256 * BLOCK), watch) == 256 * BLOCK
    assert b"".join(segments) == data
    assert watch.seen == [(READ, 0, 256 * BLOCK, 0)]
    assert all(mine is theirs for mine, theirs in zip(segments, watch.bios[0].segments, strict=True))
    assert drive(transfer(watch, WRITE, 0, segments[:1], BLOCK, flags=FUA), watch) == BLOCK
    assert watch.seen[1:] == [(WRITE, 0, BLOCK, FUA)]


@pytest.mark.parametrize("op", [READ, WRITE])
def test_what_does_not_fit_is_split_exactly(op):
    """B03: bios of at most the device's bytes and segments, in units, one after another, all of it once."""
    data = pattern(64 * KIB)
    cases: list[tuple[list[int], list[int]]] = [
        ([8192], [2048] * 4),
        ([BLOCK] * 9, [2048, 2048, 512]),
        ([1536, 1024, 2560, 512], [2048, 2048, 1536]),
        ([512, 512, 512, 512, 512], [2048, 512]),
    ]
    for sizes, expected in cases:
        watch = Watch(device_of(data if op == READ else bytes(64 * KIB)))
        total = sum(sizes)
        source = pattern(total, 1)
        segments = [empty(size) for size in sizes]
        if op == WRITE:
            ends = list(itertools.accumulate(sizes))
            for segment, end in zip(segments, ends, strict=True):
                segment[:] = source[end - len(segment) : end]
        assert drive(transfer(watch, op, 1024, segments, total), watch) == total
        assert [length for _, _, length, _ in watch.seen] == expected
        starts = [1024 + sum(expected[:number]) for number in range(len(expected))]
        assert [addr for _, addr, _, _ in watch.seen] == starts
        assert all(len(bio.segments) <= 4 for bio in watch.bios)
        if op == READ:
            assert b"".join(segments) == data[1024 : 1024 + total]
        else:
            assert bytes(watch.lower.data) == bytes(1024) + source + bytes(64 * KIB - 1024 - total)


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(0, 5),
    st.sampled_from([512, 4096]),
)
def test_split_covers_all_once(blocks, most_segments, extra, unit):
    """B03: every byte in one bio, in order, each bio within the limits and a multiple of the unit."""
    limits = Limits(read_align=unit, write_align=unit, max_segments=most_segments, max_bio_bytes=unit * 3 + extra)
    sizes = [unit * count for count in blocks]
    data = pattern(sum(sizes))
    ends = list(itertools.accumulate(sizes))
    segments = [memoryview(data)[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    bios = split(segments, len(data), limits, unit)
    assert b"".join(b"".join(parts) for _, parts, _ in bios) == data
    place = 0
    for start, parts, size in bios:
        assert start == place and size == sum(map(len, parts)) and not size % unit
        assert 0 < size <= limits.max_bio_bytes and 0 < len(parts) <= most_segments
        place += size
    assert place == len(data)


def test_requests_beyond_the_reserve_of_trackers_make_progress(monkeypatch):
    """B03: with every tracker taken, the next request still has one."""
    monkeypatch.setattr(blockdev, "_trackers", [])
    device = device_of(pattern(64 * KIB))
    scheduler = Scheduler()
    scheduler.add_device(device)
    tasks = []
    for number in range(blockdev._RESERVE + 8):
        view = empty(4096)
        tasks.append((number, view, scheduler.spawn(transfer(device, READ, number % 15 * 4096, [view], 4096))))
    pump(scheduler, *[task for _, _, task in tasks])
    for number, view, task in tasks:
        assert task.result() == 4096
        assert view == device.data[number % 15 * 4096 : number % 15 * 4096 + 4096]
    assert len(blockdev._trackers) == blockdev._RESERVE


@pytest.mark.parametrize("depth", [1, 2, 5, 64])
def test_no_more_bios_in_flight_than_the_device_takes(depth):
    """G14: the device's queue is kept full, and no fuller."""
    limits = dataclasses.replace(SMALL_BIOS, queue_depth=depth)
    for seed in range(20):
        with Simulation(seed) as sim:
            device = sim.device(64 * KIB, limits=limits, add=False)
            watch = Watch(device)
            sim.scheduler.add_device(watch)
            assert sim.run(transfer(watch, WRITE, 0, [aligned(pattern(48 * KIB))], 48 * KIB)) == 48 * KIB
            assert watch.most == min(depth, 24)
            assert bytes(device.store.data[: 48 * KIB]) == pattern(48 * KIB)


def test_ordered_means_one_at_a_time_from_the_start():
    """F03: a file that grows has at no moment a hole below its size."""
    for seed in range(20):
        with Simulation(seed) as sim:
            device = sim.device(64 * KIB, limits=SMALL_BIOS, add=False)
            watch = Watch(device)
            sim.scheduler.add_device(watch)
            assert sim.run(transfer(watch, WRITE, 0, [empty(32 * KIB)], 32 * KIB, ordered=True)) == 32 * KIB
            assert watch.most == 1
            assert [addr for _, addr, _, _ in watch.seen] == list(range(0, 32 * KIB, 2048))


def test_flags_go_with_every_bio():
    watch = Watch(device_of(bytes(8192)))
    drive(transfer(watch, WRITE, 0, [empty(8192)], 8192, flags=FUA | HIPRI), watch)
    assert {flags for _, _, _, flags in watch.seen} == {FUA | HIPRI}


# --- B04, F06: errors -----------------------------------------------------------------------------

ERRNOS = (errno.EIO, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENODATA)


@pytest.mark.parametrize("op", [READ, WRITE])
def test_every_subset_of_failures_in_every_order(op):
    """B04, F06: the first error to come is the request's, and it comes once, after the last bio."""
    count = 3
    for subset in itertools.product([False, True], repeat=count):

        def scenario(sim: Simulation, subset: tuple[bool, ...] = subset):
            device = sim.device(count * 2048, limits=SMALL_BIOS, add=False)
            faults = Faults(device)
            watch = Watch(faults)
            for number, fails in enumerate(subset):
                if fails:
                    faults.fail(ERRNOS[number], nth=number)
            sim.scheduler.add_device(watch)
            came: list[int] = []

            async def main() -> None:
                dispatched = sim.scheduler.dispatch

                def dispatch(finished):
                    came.extend(bio.error for bio in finished if bio.error)
                    dispatched(finished)

                sim.scheduler.dispatch = dispatch  # type: ignore[method-assign]
                try:
                    moved = await transfer(watch, op, 0, [empty(count * 2048)], count * 2048)
                except DeviceError as error:
                    assert error.errno == came[0]
                else:
                    assert moved == count * 2048 and not any(subset)
                assert not watch.open and watch.most == count

            return main()

        explored = explore(scenario, 3000)
        assert explored.complete and explored.runs >= 2


@pytest.mark.parametrize("failing", [1, 5])
def test_nothing_more_is_built_after_an_error(failing):
    """B04: bios that were not submitted yet never are; those that were are waited for."""
    faults = Faults(device_of(bytes(64 * KIB)))
    watch = Watch(faults)
    faults.fail(nth=failing)
    with pytest.raises(DeviceError, match=f"writing 2048 bytes at {failing * 2048}"):
        drive(transfer(watch, WRITE, 0, [empty(64 * KIB)], 64 * KIB), watch)
    assert len(watch.seen) <= failing + 5 and not watch.open


@pytest.mark.parametrize("data_fails", [False, True])
@pytest.mark.parametrize("flush_fails", [False, True])
@pytest.mark.parametrize("length", [2048, 8192])
def test_the_flush_and_the_data_do_not_hide_each_others_error(data_fails, flush_fails, length):
    """F06, F41: on a device without FUA a write has two ways to fail."""
    limits = dataclasses.replace(SMALL_BIOS, fua=False, volatile_cache=True)
    faults = Faults(device_of(bytes(64 * KIB), limits))
    watch = Watch(faults)
    if data_fails:
        faults.fail(errno.ETIMEDOUT, op=WRITE, times=1)
    if flush_fails:
        faults.fail(errno.EIO, op=FLUSH)
    request = transfer(watch, WRITE, 0, [empty(length)], length, flags=FUA)
    if data_fails or flush_fails:
        with pytest.raises(DeviceError) as caught:
            drive(request, watch)
        assert caught.value.errno == (errno.ETIMEDOUT if data_fails else errno.EIO)
    else:
        assert drive(request, watch) == length
    assert (FLUSH in [op for op, *_ in watch.seen]) == (not data_fails)


def test_a_refusal_that_nobody_collects_is_an_error():
    faults = Faults(device_of(bytes(64 * KIB)))
    faults.fail(errno.EINVAL, nth=1)
    with pytest.raises(DeviceError) as caught:
        drive(transfer(faults, WRITE, 0, [empty(8192)], 8192), faults)
    assert caught.value.errno == errno.EINVAL


# --- B05, F40, F42: durable -----------------------------------------------------------------------


def power_cut(cache: VolatileCache, seed: int = 0) -> None:
    cache.power_cut(random.Random(seed))
    cache.reopen()


@pytest.mark.parametrize("fua", [True, False])
@pytest.mark.parametrize("length", [BLOCK, 2048, 16 * KIB])
@pytest.mark.parametrize("seed", range(4))
def test_what_was_acknowledged_with_fua_survives_a_power_cut(fua, length, seed):
    """B05, F40: in one bio and in many, on a device with FUA and on one without."""
    disk = device_of(bytes(64 * KIB))
    cache = VolatileCache(disk, fua=fua)
    watch = Watch(cache)
    data = pattern(length, seed)
    assert drive(transfer(watch, WRITE, 4096, [aligned(data)], length, flags=FUA), watch) == length
    power_cut(cache, seed)
    assert bytes(disk.data[4096 : 4096 + length]) == data
    ops = [(op, bool(flags & FUA)) for op, _, _, flags in watch.seen]
    if fua:
        assert set(ops) == {(WRITE, True)}
    else:  # The device is not asked for what it cannot do; it gets a flush, last.
        assert set(ops[:-1]) == {(WRITE, False)} and ops[-1] == (FLUSH, False)


def test_without_fua_nothing_is_durable_until_the_flush():
    """F40: the very same without the flag is lost, or the test above shows nothing."""
    disk = device_of(bytes(64 * KIB))
    cache = VolatileCache(disk)
    drive(transfer(cache, WRITE, 0, [aligned(b"\xff" * 4096)], 4096), cache)
    cache.power_cut()
    assert not any(disk.data)
    cache.reopen()
    drive(transfer(cache, WRITE, 0, [aligned(b"\xff" * 4096)], 4096), cache)
    drive(flush(cache), cache)
    cache.power_cut()
    assert bytes(disk.data[:4096]) == b"\xff" * 4096


@pytest.mark.parametrize("length", [2048, 8192])
def test_a_flush_that_fails_is_reported(length):
    """F41: the write is not acknowledged."""
    cache = VolatileCache(device_of(bytes(64 * KIB)), fua=False)
    cache.fail_flush()
    with pytest.raises(DeviceError, match="syncing"):
        drive(transfer(cache, WRITE, 0, [empty(length)], length, flags=FUA), cache)


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("short", [512, 700, 1024])
def test_a_short_write_is_resumed_before_it_is_flushed(length, short):
    """F42: write, rest of the write, flush: in this order, and the data is there after a power cut."""
    disk = device_of(bytes(64 * KIB))
    cache = VolatileCache(disk, fua=False)
    faults = Faults(cache)
    watch = Watch(faults)
    faults.shorten(short, op=WRITE, nth=0)
    data = pattern(length)
    assert drive(transfer(watch, WRITE, 0, [aligned(data)], length, flags=FUA), watch) == length
    assert [op for op, *_ in watch.seen].index(FLUSH) == len(watch.seen) - 1
    assert len(watch.seen) == -(-length // 2048) + 2
    cache.power_cut()
    assert bytes(disk.data[:length]) == data


def test_a_flush_asks_for_the_metadata_only_if_told():
    watch = Watch(device_of(bytes(4096)))
    drive(flush(watch), watch)
    drive(flush(watch, metadata=True), watch)
    assert watch.seen == [(FLUSH, 0, 0, 0), (FLUSH, 0, 0, META)]


# --- B08, F24: memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", range(8))
def test_a_bad_buffer_in_the_middle(bad):
    """B08: those that were submitted are waited for, and then the error is reported."""
    limits = dataclasses.replace(SMALL_BIOS, max_segments=1)
    watch = Watch(device_of(bytes(16 * KIB), limits))
    segments = [empty(2048) for _ in range(8)]
    segments[bad] = segments[bad].toreadonly()
    with pytest.raises(BadBufferError, match=f"2048 bytes at {bad * 2048}"):
        drive(transfer(watch, READ, 0, segments, 16 * KIB), watch)
    assert not watch.open and len(watch.seen) > bad


class Choosy(Watch):
    """Takes no bio at a certain place: `submit` itself raises."""

    def __init__(self, lower: MemoryDevice, bad: int) -> None:
        super().__init__(lower)
        self.bad = bad

    def submit(self, bio: Bio) -> None:
        if len(self.bios) == self.bad:
            raise ClosedError("no more")
        super().submit(bio)


@pytest.mark.parametrize("bad", range(6))
def test_a_bio_that_cannot_be_submitted(bad):
    """B08: what is in flight comes back first, and nothing is submitted after it."""
    device = Choosy(device_of(bytes(16 * KIB)), bad)
    with pytest.raises(ClosedError):
        drive(transfer(device, WRITE, 0, [empty(12 * KIB)], 12 * KIB), device)
    assert not device.open and len(device.bios) == bad


@pytest.mark.parametrize("length", [2048, 16 * KIB])
def test_cancelling_waits_for_the_device(length):
    """F24: the request ends when every bio has come back, and no more are built meanwhile."""
    for seed in range(30):
        with Simulation(seed) as sim:
            device = sim.device(64 * KIB, limits=SMALL_BIOS, add=False)
            watch = Watch(device)
            sim.scheduler.add_device(watch)
            task = sim.scheduler.spawn(transfer(watch, READ, 0, [empty(length)], length))

            async def main(sim=sim, task=task, watch=watch) -> None:
                for _ in range(sim.rng.randrange(4)):
                    await yield_now()
                task.cancel()
                await wait(task.ended)
                assert not watch.open

            sim.run(main())
            assert isinstance(task.error, Cancelled)
            assert len(watch.seen) <= 4


def test_a_request_that_is_thrown_away_in_flight_does_not_harm_the_next():
    """F24: its tracker still gets its bios' completions, so nobody else may be given it."""
    device = device_of(pattern(64 * KIB))
    scheduler = Scheduler()
    scheduler.add_device(device)
    lost = transfer(device, READ, 0, [empty(8192)], 8192)
    scheduler.spawn(lost)
    scheduler.run_ready()
    assert device.in_flight == 4
    lost.close()
    view = empty(6144)
    task = scheduler.spawn(transfer(device, READ, 8192, [view], 6144))
    pump(scheduler, task)
    assert task.result() == 6144 and view == device.data[8192 : 8192 + 6144]
    blockdev._trackers[:] = [blockdev._Tracker() for _ in range(blockdev._RESERVE)]


# --- B09: ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_reads_at_the_end(blocks):
    """B09: at or past the end 0, across it a short count; the memory past it stays as it was."""
    size = 8 * BLOCK
    data = pattern(size)
    device = device_of(data)
    length = blocks * BLOCK
    for offset in range(0, size + 3 * BLOCK, BLOCK):
        view = aligned(b"\xa5" * length)
        count = drive(transfer(device, READ, offset, [view], length), device)
        assert count == max(0, min(length, size - offset))
        assert bytes(view) == data[offset : offset + count] + b"\xa5" * (length - count)


def test_reads_at_an_end_inside_a_block():
    """B09, F04: the device's end is told from a short transfer by its size."""
    size = 5 * BLOCK + 100
    data = pattern(size)
    for blocks in (1, 2, 6, 12):
        for offset in range(0, 8 * BLOCK, BLOCK):
            watch = Watch(device_of(data))
            view = empty(blocks * BLOCK)
            count = drive(transfer(watch, READ, offset, [view], len(view)), watch)
            assert count == max(0, min(len(view), size - offset))
            assert bytes(view[:count]) == data[offset : offset + count]
            assert len(watch.seen) <= 4  # Nothing is asked again to find the end.


@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_writes_at_the_end(blocks):
    """B09: past the end ENOSPC, and nothing is submitted; across it a short count."""
    size = 8 * BLOCK
    length = blocks * BLOCK
    data = pattern(length, 5)
    for offset in range(0, size + 2 * BLOCK, BLOCK):
        watch = Watch(device_of(bytes(size)))
        request = transfer(watch, WRITE, offset, [aligned(data)], length)
        if offset >= size:
            with pytest.raises(NoSpaceError):
                drive(request, watch)
            assert not watch.seen
        else:
            count = drive(request, watch)
            assert count == min(length, size - offset)
            assert bytes(watch.lower.data) == bytes(offset) + data[:count] + bytes(size - offset - count)
    assert drive(transfer(watch, WRITE, 4 * size, [], 0), watch) == 0


# --- F04: short transfers -------------------------------------------------------------------------


class Stutter(Watch):
    """Moves `prefix` bytes of every bio that is longer, again and again."""

    def __init__(self, lower: MemoryDevice, op: int, prefix: int) -> None:
        faults = Faults(lower)
        faults.shorten(prefix, op=op)
        super().__init__(faults)


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize(("block", "memory"), [(512, 512), (4096, 4), (512, 2048)])
def test_every_short_prefix_is_resumed(op, block, memory):
    """F04, F51: same bytes, resubmitted where offset and memory are aligned, and it ends, for every length."""
    unit = max(block, memory)
    length = 4 * unit
    limits = Limits(
        read_align=block, write_align=block, memory_align=memory, max_bio_bytes=3 * unit, volatile_cache=False
    )
    step = 1 if unit == 512 else 257
    data = pattern(length + 2 * unit, 3)
    for prefix in sorted({*range(0, length + 1, step), unit - 1, unit, unit + 1, 2 * unit, 3 * unit - 1}):
        disk = device_of(data if op == READ else bytes(len(data)), limits)
        device = Stutter(disk, op, prefix)
        view = aligned(bytes(length) if op == READ else data[:length])
        request = transfer(device, op, unit, [view], length)
        if prefix < unit:
            # Less than one block each time: it can never get on.
            with pytest.raises(DeviceError, match="moves nothing") as caught:
                drive(request, device)
            assert caught.value.errno == errno.EIO
        else:
            assert drive(request, device) == length
            assert bytes(view) == bytes(disk.data[unit : unit + length])
            assert bytes(view) == (data[unit : unit + length] if op == READ else data[:length])
        assert all(addr % block == 0 and size % block == 0 for _, addr, size, _ in device.seen)
        assert len(device.seen) < 60 and not device.open


@settings(max_examples=60)
@given(st.lists(st.integers(0, 4096), max_size=12), st.integers(1, 8), st.sampled_from([READ, WRITE]))
def test_any_sequence_of_short_transfers(prefixes, blocks, op):
    """F04: each bio stops somewhere else; in the end all bytes are right."""
    length = blocks * BLOCK
    disk = device_of(pattern(16 * BLOCK))
    faults = Faults(disk)
    for number, prefix in enumerate(prefixes):
        faults.shorten(prefix, nth=number)
    source = pattern(length, 9)
    view = aligned(source)
    assert drive(transfer(faults, op, BLOCK, [view], length), faults) == length
    assert bytes(disk.data[BLOCK : BLOCK + length]) == bytes(view)
    if op == WRITE:
        assert bytes(view) == source


def test_a_device_that_says_again_and_again_that_it_was_interrupted():
    """F04: EINTR and EAGAIN are tried again, but not for ever."""
    for number in (errno.EINTR, errno.EAGAIN):
        faults = Faults(device_of(pattern(4096)))
        faults.fail(number, times=3)
        view = empty(4096)
        assert drive(transfer(faults, READ, 0, [view], 4096), faults) == 4096
        assert bytes(view) == pattern(4096)
        faults.fail(number)
        with pytest.raises(DeviceError, match="moves nothing"):
            drive(transfer(faults, READ, 0, [view], 4096), faults)


# --- F08: NOWAIT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("blocking", range(5))
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EIO, errno.ENOSPC])
def test_nowait_did_nothing_or_a_true_prefix(op, blocking, error):
    """F08: bio number `blocking` of four would wait, or fails."""
    data = pattern(8192)
    disk = device_of(pattern(8192, 1))
    faults = Faults(disk)
    watch = Watch(faults)
    faults.fail(error, nth=blocking)
    before = bytes(disk.data)
    view = aligned(bytes(8192) if op == READ else data)
    request = transfer(watch, op, 0, [view], 8192, flags=NOWAIT)
    if blocking == 0:
        kind = {errno.EAGAIN: WouldBlockError, errno.EIO: DeviceError, errno.ENOSPC: NoSpaceError}[error]
        with pytest.raises(kind):
            drive(request, watch)
        assert bytes(disk.data) == before
    else:
        count = drive(request, watch)
        assert count == min(blocking * 2048, 8192)
        if op == READ:
            assert bytes(view) == before[:count] + bytes(8192 - count)
        else:
            assert bytes(disk.data) == data[:count] + before[count:]
    assert watch.most == 1 and len(watch.seen) == min(blocking + 1, 4)


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("length", [2048, 8192])
def test_a_short_nowait_is_not_resumed(op, length):
    """F08: what was done is said, and nothing is waited for."""
    watch = Stutter(device_of(bytes(16 * KIB)), op, 1024)
    assert drive(transfer(watch, op, 0, [empty(length)], length, flags=NOWAIT), watch) == 1024
    assert len(watch.seen) == 1


@pytest.mark.parametrize("length", [2048, 8192])
def test_nowait_that_moved_nothing_would_have_waited(length):
    """F08: 0 bytes inside the file would look like its end."""
    watch = Stutter(device_of(bytes(16 * KIB)), READ, 0)
    with pytest.raises(WouldBlockError):
        drive(transfer(watch, READ, 0, [empty(length)], length, flags=NOWAIT), watch)
    assert drive(transfer(watch, READ, 16 * KIB, [empty(length)], length, flags=NOWAIT), watch) == 0


@pytest.mark.parametrize("length", [2048, 8192])
def test_a_refused_nowait_is_left_whole_to_the_other_way(length):
    """F08, F50: nothing was done, so all of it is collected."""
    faults = Faults(device_of(bytes(16 * KIB)))
    faults.fail(errno.EINVAL)
    refused = Refused()
    assert drive(transfer(faults, WRITE, 0, [empty(length)], length, flags=NOWAIT, refused=refused), faults) == 0
    assert refused == [(0, length)]


# --- F43: atomic ----------------------------------------------------------------------------------


def test_atomic_writes_outside_the_limits_are_refused():
    """F43: refused, and not merely attempted."""
    limits = atomic_limits(16 * KIB, smallest=1024, base=dataclasses.replace(SMALL_BIOS, max_bio_bytes=16 * KIB))
    limits = dataclasses.replace(limits, atomic_max_segments=2)
    watch = Watch(device_of(bytes(64 * KIB), limits))

    def write(offset: int, sizes: Sequence[int]) -> int:
        segments = [empty(size) for size in sizes]
        return drive(transfer(watch, WRITE, offset, segments, sum(sizes), flags=ATOMIC), watch)

    for offset, sizes in [
        (0, [512]),  # too small
        (0, [32 * KIB]),  # too large
        (0, [3 * KIB]),  # no power of two
        (1024, [2048]),  # not at a multiple of its length
        (0, [1024, 512, 512]),  # too many segments
    ]:
        with pytest.raises(AtomicLimitError) as caught:
            write(offset, sizes)
        assert caught.value.errno == errno.EINVAL
    assert watch.seen == []
    assert write(16 * KIB, [8 * KIB, 8 * KIB]) == 16 * KIB
    assert write(1024, [1024]) == 1024
    assert [(size, flags) for _, _, size, flags in watch.seen] == [(16 * KIB, ATOMIC), (1024, ATOMIC)]
    plain = Watch(device_of(bytes(8192)))
    with pytest.raises(AtomicLimitError, match="none at all"):
        drive(transfer(plain, WRITE, 0, [empty(1024)], 1024, flags=ATOMIC), plain)


@pytest.mark.parametrize("flags", [ATOMIC, ATOMIC | FUA])
def test_an_atomic_write_is_all_old_or_all_new_after_a_crash(flags):
    """F43: power is cut at every change, and any part of what was not flushed may have arrived."""
    limits = atomic_limits(8192, base=dataclasses.replace(SMALL_BIOS, max_bio_bytes=8192))
    old, new = b"\x11" * 8192, b"\x22" * 8192
    seen = set()
    for cut_at in range(3):
        for seed in range(20):
            disk = device_of(old * 2, limits)
            torn = TornDevice(disk, cut_at=cut_at, rng=random.Random(seed))

            async def work(torn: TornDevice = torn) -> bool:
                acknowledged = await transfer(torn, WRITE, 0, [aligned(new)], 8192, flags=flags) == 8192
                await transfer(torn, WRITE, 8192, [aligned(new)], 8192)
                await flush(torn)
                return acknowledged

            try:
                drive(work(), torn)
            except DeviceError:
                assert torn.was_cut
            half = bytes(disk.data[:8192])
            assert half in (old, new)
            seen.add(half)
            if cut_at and flags & FUA:
                assert half == new
    assert seen == ({new} if flags & FUA else {old, new})


def test_a_write_that_is_not_atomic_may_be_torn():
    """F43: without the flag the same crash leaves a mixture, or the test above shows nothing."""
    old, new = b"\x11" * 8192, b"\x22" * 8192
    mixed = 0
    for seed in range(20):
        disk = device_of(old)
        torn = TornDevice(disk, cut_at=0, rng=random.Random(seed))
        with contextlib.suppress(DeviceError):
            drive(transfer(torn, WRITE, 0, [aligned(new[:2048])], 2048), torn)
        assert torn.was_cut
        mixed += bytes(disk.data[:2048]) not in (old[:2048], new[:2048])
    assert mixed


# --- F07, F50: what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("refused_bio", range(8))
@pytest.mark.parametrize("ordered", [False, True])
def test_refused_runs_are_collected_and_the_rest_is_done(refused_bio, ordered):
    """F07, F50: moved and refused together are the whole, with no overlap; nothing refused was touched."""
    data = pattern(16 * KIB)
    disk = device_of(bytes(16 * KIB))
    faults = Faults(disk)
    watch = Watch(faults)
    faults.fail(errno.EINVAL, nth=refused_bio, times=1)
    refused = Refused()
    count = drive(transfer(watch, WRITE, 0, [aligned(data)], 16 * KIB, refused=refused, ordered=ordered), watch)
    covered = set()
    for start, size in refused:
        run = set(range(start, start + size))
        assert run and not run & covered
        covered |= run
    assert count == 16 * KIB - len(covered) and refused_bio * 2048 in covered
    expected = bytes(0 if place in covered else byte for place, byte in enumerate(data))
    assert bytes(disk.data) == expected
    if ordered:
        assert covered == set(range(refused_bio * 2048, 16 * KIB))


def test_a_short_bio_whose_rest_is_refused():
    """F07: the part that was moved counts, the rest is left to the other way."""
    disk = device_of(bytes(8192))
    for length, prefix in ((2048, 700), (8192, 512)):
        faults = Faults(disk)
        faults.shorten(prefix, nth=0)
        faults.fail(errno.EOPNOTSUPP, where=lambda bio, prefix=prefix: bio.addr == prefix // 512 * 512 and bio.addr > 0)
        refused = Refused()
        data = pattern(length)
        count = drive(transfer(faults, WRITE, 0, [aligned(data)], length, refused=refused), faults)
        assert refused[0] == (prefix, 2048 - prefix)
        assert count == length - sum(size for _, size in refused)


# --- change_range ---------------------------------------------------------------------------------


def test_change_range_zeroes_and_discards():
    limits = dataclasses.replace(SMALL_BIOS, discard=True)
    device = device_of(b"x" * 4096, limits)
    drive(change_range(device, ZERO, 512, 1024), device)
    drive(change_range(device, DISCARD, 3072, 512), device)
    assert bytes(device.data) == b"x" * 512 + bytes(1024) + b"x" * 1536 + bytes(512) + b"x" * 512
    with pytest.raises(DeviceError, match="zeroing 100 bytes at 0"):
        drive(change_range(device, ZERO, 0, 100), device)
    plain = device_of(b"x" * 4096)
    with pytest.raises(UnsupportedError, match="discarding 512 bytes at 0"):
        drive(change_range(plain, DISCARD, 0, 512), plain)


def test_the_callers_segments_are_not_changed():
    """The request slices them for itself."""
    data = pattern(8 * BLOCK)
    segments = laid_out(data, [BLOCK, 3 * BLOCK], [0])
    before = [(len(segment), bytes(segment)) for segment in segments]
    device = device_of(bytes(6 * BLOCK))
    assert drive(transfer(device, WRITE, 0, segments, 8 * BLOCK), device) == 6 * BLOCK
    assert [(len(segment), bytes(segment)) for segment in segments] == before
    assert b"".join(slice_segments(segments, 0, 6 * BLOCK)) == bytes(device.data)
