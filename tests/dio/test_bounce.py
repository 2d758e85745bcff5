"""Requests of any alignment: bytes, ends, memory, and what is left behind when they fail."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.dio.kit import Watch, aligned, drive, laid_out, pattern, pump

from odirect.base.errors import BadBufferError, DeviceError, NoSpaceError, ODirectError, WouldBlockError
from odirect.block.bio import FUA, NOWAIT, READ, WRITE, Bio
from odirect.block.buffers import BufferPool, empty
from odirect.block.device import BlockDevice, Limits
from odirect.block.filters.fault import Faults
from odirect.block.filters.log_writes import LogWrites
from odirect.block.memory import MemoryDevice
from odirect.dio import bounce
from odirect.dio.blockdev import Refused
from odirect.dio.bounce import Moved, Route
from odirect.dio.outcome import Kind, Outcome, Promise, Reason
from odirect.dio.write_order import WriteOrder
from odirect.ring._calls import address_of
from odirect.sched.locks import RangeLock
from odirect.sched.scheduler import Cancelled, Scheduler
from odirect.sched.traps import gather, wait, yield_now
from odirect.testing.devices import OddDevice
from odirect.testing.model import ModelFile
from odirect.testing.sim import Simulation, explore, run_seeds

KIB = 1 << 10
ALIGNS = [
    (memory, read, write) for memory in (4, 512, 4096) for read in (512, 4096, 65536) for write in (512, 4096, 65536)
]
BYTES = Limits(logical_block=1, read_align=1, write_align=1, memory_align=1, fua=True, volatile_cache=False)


class Twin(MemoryDevice):
    """The bytes of another device, one by one, as the page cache has those of a file."""

    def __init__(self, device: MemoryDevice) -> None:
        super().__init__(0, limits=BYTES)
        self._store = device._store


class Setting:
    """A device with all that a route needs; `top` is where the bios are seen."""

    def __init__(
        self,
        data: bytes,
        aligns: tuple[int, int, int] = (512, 512, 512),
        *,
        twin: bool = False,
        chunk: int = 64 * KIB,
        chunks: int = 2,
        **changed: Any,
    ) -> None:
        memory, read, write = aligns
        self.disk = OddDevice(len(data), memory_align=memory, read_align=read, write_align=write)
        self.disk._limits = dataclasses.replace(self.disk.limits, **changed)
        self.disk.data[:] = data
        self.log = LogWrites(self.disk, base=data)
        self.faults = Faults(self.log)
        self.top = Watch(self.faults)
        self.twin = Twin(self.disk) if twin else None
        self.lock = RangeLock()
        self.pool = BufferPool(chunk, chunks)
        self.route = Route(self.top, self.pool, self.twin, None if twin else self.lock)

    @property
    def devices(self) -> list[BlockDevice]:
        return [self.top] if self.twin is None else [self.top, self.twin]

    @property
    def data(self) -> bytes:
        return bytes(self.disk.data)

    def read(self, offset: int, segments: Sequence[memoryview], **options) -> Moved:
        options.setdefault("end", self.disk.size_bytes)
        length = sum(map(len, segments))
        return drive(bounce.read(self.route, offset, segments, length, **options), *self.devices)

    def write(self, offset: int, segments: Sequence[memoryview], **options) -> Moved:
        options.setdefault("end", self.disk.size_bytes)
        length = sum(map(len, segments))
        return drive(bounce.write(self.route, offset, segments, length, **options), *self.devices)

    def check_idle(self) -> None:
        """Nothing is locked, lent or in flight any more (F01)."""
        assert self.lock.idle and self.pool.lent == 0 and not self.top.open


class Guarded:
    """Memory in segments, each with canaries around it."""

    def __init__(self, length: int, cuts: Sequence[int], skew: Sequence[int]) -> None:
        ends = [*sorted({cut for cut in cuts if 0 < cut < length}), length]
        self.areas = []
        self.segments = []
        start = 0
        for number, end in enumerate(ends):
            away = 64 + (skew[number % len(skew)] if skew else 4032)
            area = empty(away + end - start + 64)
            area[:] = b"\xa5" * len(area)
            self.areas.append((area, away))
            self.segments.append(area[away : away + end - start])
            start = end

    @property
    def data(self) -> bytes:
        return b"".join(self.segments)

    def check_around(self) -> None:
        for (area, away), segment in zip(self.areas, self.segments, strict=True):
            assert set(area[:away]) | set(area[away + len(segment) :]) == {0xA5}


SIZE = 5 * 65536
EDGES = st.sampled_from([0, 512, 4096, 65536, 2 * 65536, 3 * 65536, SIZE])
OFFSETS = st.builds(
    lambda edge, away: max(0, edge + away), EDGES, st.sampled_from([-513, -1, 0, 1, 100, 511, 512, 4096])
)
LENGTHS = st.one_of(
    st.sampled_from([1, 511, 512, 513, 4095, 4096, 4097, 65536, 65537, 130000, 3 * 65536]), st.integers(0, 9000)
)
SKEWS = st.lists(st.sampled_from([0, 1, 4, 100, 512, 1024, 4032, 4096 - 64]), max_size=4)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from([READ, WRITE]), OFFSETS, LENGTHS, st.lists(st.integers(0, 9000), max_size=4), SKEWS),
    min_size=1,
    max_size=4,
)
ALIGNMENTS = st.sampled_from(ALIGNS)


# --- bytes ----------------------------------------------------------------------------------------


@settings(max_examples=250)
@given(ALIGNMENTS, st.booleans(), OPERATIONS, st.sampled_from([0, FUA]), st.booleans())
@example((4096, 512, 512), False, [(WRITE, 100, 9000, [], [1])], 0, False)
@example((4096, 512, 512), True, [(WRITE, 100, 130000, [], [1])], 0, True)
def test_any_request_does_what_the_model_does(aligns, twin, operations, flags, ordered):
    """F51, F02, B09: any offset, length, segments and memory, on any alignment, with and without a twin."""
    here = Setting(pattern(SIZE), aligns, twin=twin)
    model = ModelFile(pattern(SIZE), limit=SIZE)
    for number, (op, offset, length, cuts, skew) in enumerate(operations):
        if op == READ:
            memory = Guarded(length, cuts, skew)
            moved = here.read(offset, memory.segments, flags=flags & ~FUA)
            expected = model.pread(length, offset)
            assert moved.transferred == len(expected)
            assert memory.data == expected + b"\xa5" * (length - len(expected))
            memory.check_around()
        else:
            data = pattern(length, number)
            segments = laid_out(data, cuts, skew)
            if length and offset >= SIZE:
                with pytest.raises(NoSpaceError):
                    here.write(offset, segments, flags=flags, ordered=ordered)
            else:
                moved = here.write(offset, segments, flags=flags, ordered=ordered)
                assert moved.transferred == model.pwrite(data, offset)
                assert moved.outcome.promise is (Promise.DURABLE if flags else Promise.DEVICE)
            assert b"".join(segments) == data
            assert here.data == model.data
        here.check_idle()


@settings(max_examples=150)
@given(ALIGNMENTS, st.booleans(), OFFSETS, LENGTHS, SKEWS, st.lists(st.integers(0, 70000), min_size=1, max_size=8))
def test_short_transfers_on_the_way_change_nothing(aligns, twin, offset, length, skew, prefixes):
    """F04: whatever part of each bio is moved at first, bytes and counts are the same in the end."""
    for op in (READ, WRITE):
        here = Setting(pattern(SIZE), aligns, twin=twin)
        model = ModelFile(pattern(SIZE), limit=SIZE)
        for number, prefix in enumerate(prefixes):
            here.faults.shorten(prefix, nth=number)
        if op == READ:
            memory = Guarded(length, [700], skew)
            assert here.read(offset, memory.segments).transferred == len(model.pread(length, offset))
            assert memory.data == model.pread(length, offset).ljust(length, b"\xa5")
            memory.check_around()
        elif offset < SIZE:
            data = pattern(length, 1)
            assert here.write(offset, laid_out(data, [700], skew)).transferred == model.pwrite(data, offset)
        assert here.data == model.data
        here.check_idle()


@settings(max_examples=150)
@given(ALIGNMENTS, st.booleans(), OFFSETS, LENGTHS, SKEWS, st.integers(0, 6))
def test_nowait_is_all_nothing_or_a_true_prefix(aligns, twin, offset, length, skew, blocks_at):
    """F08: with misaligned parts, and with the n-th bio answering that it would wait."""
    here = Setting(pattern(SIZE), aligns, twin=twin, max_bio_bytes=65536)
    before = here.data
    here.faults.fail(errno.EAGAIN, nth=blocks_at)
    memory = Guarded(length, [700], skew)
    with contextlib.suppress(WouldBlockError):
        count = here.read(offset, memory.segments, flags=NOWAIT).transferred
        assert memory.data == before[offset : offset + count].ljust(length, b"\xa5")
        assert count or offset >= SIZE or not length
    memory.check_around()
    here.check_idle()
    here.faults.restart()
    data = pattern(length, 2)
    try:
        count = here.write(offset, laid_out(data, [700], skew), flags=NOWAIT).transferred
    except WouldBlockError:
        count = 0
    except NoSpaceError:
        count = 0
        assert offset >= SIZE
    assert here.data == before[:offset] + data[:count] + before[offset + count :]
    here.check_idle()


@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4096, 4097, 8192 + 13])
@pytest.mark.parametrize("unit", [512, 4096])
def test_the_count_at_the_end_of_a_file(size, unit):
    """F02: max(0, min(length, size - offset)) bytes, and not one byte of the caller's memory more."""
    data = pattern(size)
    here = Setting(data, (512, unit, unit))
    around = sorted({0, 1, 511, 512, 513, 4096, *(max(0, size + away) for away in (-513, -512, -1, 0, 1, 512))})
    for offset, length in itertools.product(around, [0, 1, 511, 512, 513, 4095, 4096, 4097, 12288]):
        for skew in ([4032], [1]):
            memory = Guarded(length, [], skew)
            moved = here.read(offset, memory.segments)
            count = max(0, min(length, size - offset))
            assert moved.transferred == count
            assert memory.data == data[offset : offset + count] + b"\xa5" * (length - count)
            memory.check_around()


def test_one_buffer_twice_in_a_request():
    """F22: whichever of the two comes last stays, and nothing is said to be wrong."""
    data = pattern(4096)
    here = Setting(data)
    view = empty(1024)
    assert here.read(512, [view, view]).transferred == 2048
    assert bytes(view) in (data[512:1536], data[1536:2560])
    view[:] = pattern(1024, 1)
    assert here.write(512, [view, view]).transferred == 2048
    assert here.data[512:2560] == pattern(1024, 1) * 2


# --- outcomes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "skew", "kind", "reason"),
    [
        (512, 1024, 0, Kind.DIRECT, Reason.NONE),
        (512, 0, 0, Kind.DIRECT, Reason.NONE),
        (100, 4096, 0, Kind.BOUNCED, Reason.MISALIGNED_OFFSET),
        (512, 1000, 0, Kind.BOUNCED, Reason.MISALIGNED_LENGTH),
        (512, 1024, 1, Kind.BOUNCED, Reason.MISALIGNED_MEMORY),
        (100, 4096, 1, Kind.BOUNCED, Reason.MISALIGNED_OFFSET),
        (7680, 1024, 0, Kind.DIRECT, Reason.NONE),
    ],
)
def test_the_outcome_says_which_way_and_why(offset, length, skew, kind, reason):
    """F50: direct, bounced, and the reason; a promise for writes alone."""
    here = Setting(pattern(8192))
    view = empty(skew + length)[skew:]
    assert here.read(offset, [view]).outcome == Outcome(kind, reason)
    assert here.write(offset, [view]).outcome == Outcome(kind, reason, Promise.DEVICE)
    assert here.write(offset, [view], flags=FUA).outcome == Outcome(kind, reason, Promise.DURABLE)


def test_the_end_of_the_file_is_a_reason_of_its_own():
    here = Setting(pattern(1000))
    assert here.read(0, [empty(4096)]).outcome == Outcome(Kind.BOUNCED, Reason.END_OF_FILE)
    assert here.read(1000, [empty(4096)]).outcome == Outcome(Kind.DIRECT)


def test_what_is_aligned_inside_a_request_goes_direct():
    """A body of a misaligned request is not copied; only its edges are."""
    here = Setting(pattern(1 << 20), chunk=256 * KIB)
    memory = empty(512 * KIB + 4096)
    # The memory is laid so that the body is aligned where the device's blocks are.
    view = memory[100 : 100 + 512 * KIB]
    data = pattern(len(view), 3)
    view[:] = data
    assert here.write(100, [view]).outcome.kind is Kind.BOUNCED
    assert here.data[100 : 100 + len(data)] == data
    start, end = address_of(view), address_of(view) + len(view)
    direct = [bio.length for bio in here.top.bios if bio.op == WRITE and start <= address_of(bio.segments[0]) < end]
    assert sum(direct) == 512 * KIB - 512
    view[:] = bytes(len(view))
    here.top.bios.clear()
    assert here.read(100, [view]).transferred == len(view) and bytes(view) == data
    direct = [bio.length for bio in here.top.bios if start <= address_of(bio.segments[0]) < end]
    assert sum(direct) == 512 * KIB - 512


# --- F21: private copies --------------------------------------------------------------------------


class Scribbler(Watch):
    """Changes the caller's memory whenever a write is handed over, as a thread would."""

    def __init__(self, lower: BlockDevice, memory: memoryview) -> None:
        super().__init__(lower)
        self.memory = memory
        self.writes: list[bytes] = []

    def commit(self) -> None:
        before = [b"".join(bio.segments) for bio in self.open if bio.op == WRITE]
        self.memory[:] = bytes(byte ^ 0xFF for byte in self.memory)
        assert before == [b"".join(bio.segments) for bio in self.open if bio.op == WRITE], "not a private copy"
        super().commit()


@pytest.mark.parametrize(("offset", "length"), [(100, 300), (1, 9000), (512, 8192), (0, 200000)])
def test_what_is_bounced_is_written_from_a_private_copy(offset, length):
    """F21: what the caller does to his buffer meanwhile changes nothing beside the range, and no bio."""
    here = Setting(pattern(SIZE))
    memory = empty(length + 3)[3:]  # So that no part of it is aligned, whatever the offset.
    data = pattern(length, 4)
    memory[:] = data
    top = Scribbler(here.top, memory)
    route = here.route._replace(device=top)
    moved = drive(bounce.write(route, offset, [memory], length, end=SIZE), top)
    assert moved.transferred == length
    written = here.data[offset : offset + length]
    flipped = bytes(byte ^ 0xFF for byte in data)
    assert all(byte in pair for byte, *pair in zip(written, data, flipped, strict=True))
    assert here.data[:offset] == pattern(SIZE)[:offset]
    assert here.data[offset + length :] == pattern(SIZE)[offset + length :]


# --- two writers ----------------------------------------------------------------------------------

RANGES = [(0, 100), (100, 412), (50, 100), (0, 512), (200, 300), (511, 1), (300, 700), (0, 1024)]


def two_writers(first: tuple[int, int], second: tuple[int, int], aligns: tuple[int, int, int], *, locked: bool):
    """A scenario: two writes at once; the result must be that of one after the other."""

    def scenario(sim: Simulation):
        old = b"\x00" * 8192
        limits = Limits(
            memory_align=aligns[0], read_align=aligns[1], write_align=aligns[2], fua=True, volatile_cache=False
        )
        disk = MemoryDevice(8192, limits=limits, data=old)
        device = sim.device(store=disk)
        lock, pool = RangeLock(), BufferPool(4096, 4)
        route = Route(device, pool, None, lock if locked else None)

        async def main() -> None:
            writes = [
                sim.spawn(bounce.write(route, offset, [aligned(bytes([fill]) * length)], length, end=8192))
                for (offset, length), fill in ((first, 1), (second, 2))
            ]
            await gather(*writes)
            allowed = set()
            for order in ((0, 1), (1, 0)):
                image = bytearray(old)
                for number in order:
                    offset, length = (first, second)[number]
                    image[offset : offset + length] = bytes([number + 1]) * length
                allowed.add(bytes(image))
            found = bytes(disk.data)
            assert found in allowed, "a byte of one write was lost"
            assert lock.idle and pool.lent == 0

        return main()

    return scenario


@pytest.mark.parametrize("first", RANGES[:5])
@pytest.mark.parametrize("second", RANGES)
def test_two_writes_into_one_block_both_survive(first, second):
    """F10: sub-block by sub-block and by whole blocks, in every order of completion."""
    explored = explore(two_writers(first, second, (512, 512, 512), locked=True), 4000)
    assert explored.complete and explored.runs > 1


def test_two_writes_where_reads_are_coarser_than_writes():
    """F10, F51: what is aligned for a write alone is still inside a block that somebody else may be changing."""
    for aligns in ((4, 4096, 512), (512, 512, 4096)):
        for first, second in [((0, 512), (512, 512)), ((0, 100), (512, 512)), ((1024, 512), (0, 4096))]:
            assert explore(two_writers(first, second, aligns, locked=True), 4000).complete


def test_without_the_lock_a_write_is_lost():
    """F10: the explorer finds the order, or the tests above show nothing."""
    with pytest.raises(AssertionError, match="a byte of one write was lost"):
        explore(two_writers((0, 100), (100, 412), (512, 512, 512), locked=False), 4000)
    with pytest.raises(AssertionError, match="a byte of one write was lost"):
        explore(two_writers((0, 100), (0, 512), (512, 512, 512), locked=False), 4000)


def test_many_writers_of_one_block():
    """F10: each writes his own bytes, by seed, over several chunks."""

    def scenario(sim: Simulation):
        disk = MemoryDevice(4096, limits=Limits(fua=True, volatile_cache=False))
        device = sim.device(store=disk)
        lock, pool = RangeLock(), BufferPool(4096, 2)
        route = Route(device, pool, None, lock)
        cuts = sorted(sim.rng.sample(range(1, 4096), 9))
        runs = list(itertools.pairwise([0, *cuts, 4096]))

        async def main() -> None:
            await gather(
                *[
                    sim.spawn(
                        bounce.write(
                            route, start, [aligned(bytes([number + 1]) * (end - start))], end - start, end=4096
                        )
                    )
                    for number, (start, end) in enumerate(runs)
                ]
            )
            expected = b"".join(bytes([number + 1]) * (end - start) for number, (start, end) in enumerate(runs))
            assert bytes(disk.data) == expected
            assert lock.idle and pool.lent == 0

        return main()

    assert run_seeds(range(60), scenario) == 60


# --- failures -------------------------------------------------------------------------------------

REQUESTS = [(100, 300, 0), (100, 9000, 0), (512, 8192, 1), (100, 200000, 1), (100, 200000, 100), (60000, 10000, 3)]


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize(("offset", "length", "skew"), REQUESTS)
@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.EFAULT])
def test_nothing_is_left_behind_by_a_failure_at_any_step(op, offset, length, skew, error):
    """F01, F11: each bio fails in turn; no range stays locked, no buffer lent, no byte outside is changed."""
    old = pattern(SIZE)
    data = pattern(length, 1)
    failing = 0
    while True:
        here = Setting(old, max_bio_bytes=16 * KIB)
        here.faults.fail(error, nth=failing)
        memory = empty(length + skew)[skew:]
        memory[:] = data
        if failing >= 100:
            raise AssertionError("it never gets through")
        try:
            if op == READ:
                here.read(offset, [memory])
            else:
                here.write(offset, [memory])
        except ODirectError as caught:
            assert caught.errno == error and here.faults.injected
        else:
            assert not here.faults.injected
            break
        finally:
            here.check_idle()
        found = here.data
        assert found[:offset] == old[:offset] and found[offset + length :] == old[offset + length :]
        if op == READ:
            assert found == old
        else:
            blocks = zip(found[offset : offset + length], old[offset:], data, strict=False)
            assert all(byte in pair for byte, *pair in blocks)
        failing += 1
    assert failing >= 1


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize(("offset", "length", "skew"), REQUESTS)
def test_nothing_is_left_behind_by_a_cancellation_at_any_step(op, offset, length, skew):
    """F24, F01: cancelled after any number of steps: what is in flight is waited for, and all is given back."""
    for steps in range(0, 40, 3):
        with Simulation(steps) as sim:
            store = OddDevice(SIZE, memory_align=512, read_align=512)
            device = sim.device(store=store, add=False)
            watch = Watch(device)
            sim.scheduler.add_device(watch)
            lock, pool = RangeLock(), BufferPool(64 * KIB, 2)
            route = Route(watch, pool, None, lock)
            call = bounce.read if op == READ else bounce.write
            memory = empty(length + skew)[skew:]
            task = sim.scheduler.spawn(call(route, offset, [memory], length, end=SIZE))

            async def main(sim=sim, steps=steps, task=task) -> None:
                for _ in range(steps):
                    await yield_now()
                task.cancel()
                await wait(task.ended)

            sim.run(main())
            assert task.error is None or isinstance(task.error, Cancelled)
            assert lock.idle and pool.lent == 0 and not watch.open


def test_a_buffer_that_cannot_be_written_to():
    """F23, B08: the copy out fails; nothing stays lent."""
    here = Setting(pattern(8192))
    with pytest.raises((BadBufferError, TypeError)):
        here.read(100, [memoryview(bytes(300))])
    here.check_idle()


def test_more_requests_than_buffers():
    """Each takes its turn: lending cannot deadlock, not even with one buffer for all."""
    for seed in range(20):
        with Simulation(seed) as sim:
            disk = MemoryDevice(SIZE, limits=Limits(fua=True, volatile_cache=False))
            device = sim.device(store=disk)
            lock, pool = RangeLock(), BufferPool(4096, 1)
            route = Route(device, pool, None, lock)
            tasks = [
                sim.spawn(bounce.write(route, 100 + number * 20000, [aligned(pattern(20000, number))], 20000, end=SIZE))
                for number in range(10)
            ]
            sim.run(gather(*tasks))
            found = bytes(disk.data)
            for number in range(10):
                assert found[100 + number * 20000 : 100 + (number + 1) * 20000] == pattern(20000, number)
            assert pool.lent == 0


@pytest.mark.parametrize("twin", [False, True])
def test_nowait_does_not_wait_for_our_own_locks_and_buffers(twin):
    """F08: what a lock or a private buffer would be waited for, says that it would block, with nothing done."""
    data = pattern(200 * KIB)
    here = Setting(data, twin=twin, chunks=1)
    lease = here.pool.try_take()
    assert lease is not None
    view = empty(700)
    with pytest.raises(WouldBlockError, match="buffers"):
        here.read(100, [view], flags=NOWAIT)
    assert bytes(view) == bytes(700)
    assert here.read(512, [empty(512)], flags=NOWAIT).transferred == 512
    lease.release()
    assert here.read(100, [view], flags=NOWAIT).transferred == 700 and view == data[100:800]

    order = WriteOrder()
    if twin:
        here.route = here.route._replace(order=order)
        held = drive(order.merge(0, 512))
    else:
        held = here.lock.try_hold(0, 512)
    with held:
        with pytest.raises(WouldBlockError, match="merged"):
            here.write(0, [aligned(bytes(1024))], flags=NOWAIT)
        assert here.data == data
        # What lies elsewhere goes on.
        assert here.write(128 * KIB, [aligned(bytes(512))], flags=NOWAIT).transferred == 512
    assert here.write(0, [aligned(bytes(1024))], flags=NOWAIT).transferred == 1024
    assert here.data[:1024] == bytes(1024)
    here.check_idle()


def test_nowait_stops_where_a_buffer_is_missing():
    """F08: what was read before counts."""
    data = pattern(200 * KIB)
    here = Setting(data, chunks=1)
    target = empty(150 * KIB)
    take, taken = here.pool.try_take, []

    def once():
        taken.append(1)
        return take() if len(taken) == 1 else None

    here.pool.try_take = once
    # Its memory is misaligned, so that all of it goes through private buffers.
    assert here.read(1, [target[3:]], flags=NOWAIT).transferred == 64 * KIB - 1
    assert target[3 : 64 * KIB + 2] == data[1 : 64 * KIB]
    here.check_idle()


def test_the_first_error_to_come_is_the_requests():
    """B04: also when a request goes through several private buffers at once."""

    class Reversed(Watch):
        """Answers what is in flight last first."""

        def poll(self, timeout_ns: int) -> Sequence[Bio]:
            return list(super().poll(timeout_ns))[::-1]

    here = Setting(pattern(SIZE), chunks=4)
    here.faults.fail(errno.ETIMEDOUT, within=(0, 512))
    here.faults.fail(errno.EIO, within=(65536, 65536 + 512))
    top = Reversed(here.top)
    memory = empty(3 * 65536 + 1)[1:]
    for call in (bounce.read, bounce.write):
        with pytest.raises(DeviceError) as caught:
            drive(call(here.route._replace(device=top), 0, [memory], len(memory), end=SIZE), top)
        assert caught.value.errno == errno.EIO
        here.check_idle()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("offset", "length", "skew"), [(0, 8192, 0), *REQUESTS, (0, 3 * 65536, 1)])
@pytest.mark.parametrize("many", [False, True])
def test_what_was_refused_and_what_was_written_are_the_whole(twin, ordered, offset, length, skew, many):
    """F07, F50: EINVAL at bio k of n: each byte is either written, once, or left to the other way."""
    old, data = pattern(SIZE), pattern(length, 1)
    failing, ended = 0, False
    while not ended:
        here = Setting(old, twin=twin, max_bio_bytes=16 * KIB)
        here.faults.fail(
            errno.EINVAL,
            where=lambda bio, here=here, k=failing: (
                bio.op == WRITE and bio.length >= 512 and here.top.seen and _body(bio) and _count(here, bio, k, many)
            ),
        )
        memory = empty(length + skew)[skew:]
        memory[:] = data
        refused = Refused()
        try:
            moved = here.write(offset, [memory], refused=refused, ordered=ordered)
        except DeviceError as caught:
            # The merge of a part of a block without a twin has no other way.
            assert caught.errno == errno.EINVAL and not twin
            here.check_idle()
            failing += 1
            continue
        here.check_idle()
        left = set()
        for start, size in refused:
            run = range(start, start + size)
            assert size > 0 and not left.intersection(run)
            left.update(run)
        assert moved.transferred == length - len(left)
        expected = bytes(old[offset + place] if place in left else byte for place, byte in enumerate(data))
        assert here.data == old[:offset] + expected + old[offset + length :]
        if ordered and left:
            assert left == set(range(min(left), length)), "written beyond what was refused"
        ended = not here.faults.injected
        failing += 1
        assert failing < 60


def _body(bio: Bio) -> bool:
    return bio.addr % 512 == 0


def _count(here: Setting, bio: Bio, k: int, many: bool) -> bool:
    """Whether this is write number k (or any from there on)."""
    counted = here.__dict__.setdefault("counted", {})
    counted.setdefault(id(bio), (len(counted), bio))
    number = counted[id(bio)][0]
    return number >= k if many else number == k


def test_refused_reads_leave_no_lock_or_buffer():
    """F50: whatever was refused of a read is read again as a whole."""
    for skew, failing in itertools.product((0, 1), range(6)):
        here = Setting(pattern(SIZE), max_bio_bytes=16 * KIB)
        here.faults.fail(errno.EINVAL, nth=failing, times=1)
        refused = Refused()
        memory = empty(3 * 65536 + skew)[skew:]
        here.read(100, [memory], refused=refused)
        assert refused
        here.check_idle()


# --- scheduling -----------------------------------------------------------------------------------


def test_chunks_are_moved_side_by_side():
    """One is copied while others are on their way; ordered writes go one after the other."""
    here = Setting(pattern(SIZE), chunks=8)
    memory = empty(4 * 65536 + 1)[1:]
    here.read(0, [memory])
    assert here.top.most == 4
    for ordered, most in ((False, 4), (True, 1)):
        here = Setting(pattern(SIZE), chunks=8)
        here.write(0, [memory], ordered=ordered)
        assert here.top.most == most


def test_buffers_too_small_for_a_block_are_a_mistake():
    """F51: said so, and not found out by the kernel."""
    here = Setting(pattern(SIZE), (512, 65536, 65536), chunk=4096)
    for call in (here.read, here.write):
        with pytest.raises(ValueError, match="4096 bytes does not hold whole blocks of 65536"):
            call(0, [empty(65536 + 1)[1:]])
        here.check_idle()


def test_requests_of_one_scheduler_share_the_pool():
    here = Setting(pattern(SIZE), chunks=1)
    scheduler = Scheduler()
    scheduler.add_device(here.top)
    views = [empty(300) for _ in range(5)]
    tasks = [
        scheduler.spawn(bounce.read(here.route, 100 * number + 1, [view], 300, end=SIZE))
        for number, view in enumerate(views)
    ]
    pump(scheduler, *tasks)
    for number, view in enumerate(views):
        assert bytes(view) == here.data[100 * number + 1 : 100 * number + 301]
