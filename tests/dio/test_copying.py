"""The pipeline of a copy, over devices in memory that fail as they are told to."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odirect.base.errors import DeviceError, InUseError, NoSpaceError, VerifyError
from odirect.block.bio import READ, WRITE, ZERO
from odirect.block.buffers import BufferPool
from odirect.block.device import BlockDevice, Limits
from odirect.block.filters.fault import Faults
from odirect.block.memory import MemoryDevice
from odirect.dio.copying import Chunk, Digests, Mover, chunks_of, in_turn, settled
from odirect.dio.plainfile import FileState, PlainFile
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Cancelled, Scheduler
from odirect.sched.traps import Event, wait, yield_now
from odirect.testing.devices import BitRotDevice, MisdirectedDevice

CHUNK = 8192
SIZE = 10 * CHUNK


_used: list[BlockDevice] = []


@pytest.fixture(autouse=True)
def _devices_are_closed() -> Iterator[None]:
    yield
    while _used:
        _used.pop().close()


def run(coroutine: Coroutine[Any, Any, Any], *devices: BlockDevice) -> Any:
    scheduler = Scheduler()
    for device in devices:
        scheduler.add_device(device)
        _used.append(device)
    return SyncDriver(scheduler).run(coroutine)


def plain(device: BlockDevice, name: str) -> PlainFile:
    return PlainFile(FileState(device.limits, name, is_block=True), device, None, BufferPool(1 << 16, 2))


def data(size: int = SIZE) -> bytes:
    return random.Random(7).randbytes(size)


def content(device: MemoryDevice) -> bytes:
    return bytes(device.data)


def chunks(size: int = SIZE) -> list[Chunk]:
    return list(chunks_of([Chunk(0, size)], CHUNK))


# --- cutting --------------------------------------------------------------------------------------


@given(
    edges=st.lists(st.integers(0, 100_000), max_size=12),
    size=st.integers(0, 100_000),
    unit=st.sampled_from([1, 512, 4096]),
    chunk=st.sampled_from([4096, 8192, 65536]),
)
def test_every_byte_is_in_one_chunk(edges: list[int], size: int, unit: int, chunk: int) -> None:
    """All of the file, in order, no byte twice; data stays data, and edges are whole blocks."""
    points = sorted(set(edges))
    runs = [(start, end) for start, end in itertools.pairwise(points) if start < size][::2]
    whole = list(settled(iter(runs), size, unit))
    assert sum(run.length for run in whole) == size
    assert all(one.end == other.offset and one.hole != other.hole for one, other in itertools.pairwise(whole))
    assert not whole or whole[0].offset == 0
    for start, end in runs:
        assert any(not run.hole and run.offset <= start and min(end, size) <= run.end for run in whole)
    for run in whole:
        assert run.length > 0 and run.offset % unit == 0 and (run.end % unit == 0 or run.end == size)
    cut = list(chunks_of(whole, chunk))
    assert sum(piece.length for piece in cut) == size
    assert all(one.end == other.offset for one, other in itertools.pairwise(cut))
    assert all(
        piece.length <= chunk and piece.offset // chunk == (piece.end - 1) // chunk for piece in cut if not piece.hole
    )


def test_long_holes_are_zeroed_in_steps() -> None:
    """So that a copy can be interrupted in between."""
    pieces = list(chunks_of([Chunk(0, 1 << 30, True)], 3 << 20))
    assert len(pieces) > 8 and all(piece.offset % (3 << 20) == 0 for piece in pieces)
    assert sum(piece.length for piece in pieces) == 1 << 30


# --- copying --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_everything_arrives(depth: int) -> None:
    source, target = MemoryDevice(SIZE, data=data()), MemoryDevice(SIZE)
    done: list[int] = []
    mover = Mover(BufferPool(CHUNK, depth), depth=depth, on_bytes=done.append)
    run(mover.copy(plain(source, "s"), plain(target, "t"), chunks(), digests=None, zero=True), source, target)
    assert content(target) == data()
    assert mover.copied == sum(done) == SIZE
    assert mover.pool.lent == 0


def test_every_bio_that_may_fail() -> None:
    """B04, F06: fail each read and each write in turn: that error, with that file's name, and no buffer is lost."""
    for op, name in ((READ, "s"), (WRITE, "t")):
        for number in range(len(chunks())):
            source, target = MemoryDevice(SIZE, data=data()), MemoryDevice(SIZE)
            faults = Faults(source if op == READ else target)
            faults.fail(errno.EIO, op=op, nth=number)
            one, other = (faults, target) if op == READ else (source, faults)
            mover = Mover(BufferPool(CHUNK, 3), depth=3)
            with pytest.raises(DeviceError) as caught:
                run(mover.copy(plain(one, "s"), plain(other, "t"), chunks(), digests=None, zero=True), one, other)
            assert caught.value.filename == name and len(faults.injected) == 1
            assert mover.pool.lent == 0
            assert not one.in_flight and not other.in_flight


def test_after_an_error_no_more_is_begun() -> None:
    source, target = MemoryDevice(SIZE, data=data()), MemoryDevice(SIZE)
    faults = Faults(target)
    faults.fail(errno.EIO, op=WRITE, nth=0)
    mover = Mover(BufferPool(CHUNK, 2), depth=2)
    with pytest.raises(DeviceError):
        run(mover.copy(plain(source, "s"), plain(faults, "t"), chunks(), digests=None, zero=True), source, faults)
    assert faults.submitted <= 3


@pytest.mark.parametrize("prefix", [0, 1, 511, 512, 4096, 8191])
def test_short_transfers_are_resumed(prefix: int) -> None:
    """F04: whatever prefix a device moves at first, the copy is whole."""
    source, target = MemoryDevice(SIZE, data=data()), MemoryDevice(SIZE)
    reading, writing = Faults(source), Faults(target)
    reading.shorten(prefix, op=READ, times=4)
    writing.shorten(prefix, op=WRITE, times=4)
    mover = Mover(BufferPool(CHUNK, 2), depth=2)
    run(mover.copy(plain(reading, "s"), plain(writing, "t"), chunks(), digests=None, zero=True), reading, writing)
    assert content(target) == data() and mover.copied == SIZE


def test_a_source_that_ends_early() -> None:
    """F02: a short read at the end is no data, and no zeroes."""
    source, target = MemoryDevice(SIZE - CHUNK, data=data(SIZE - CHUNK)), MemoryDevice(SIZE)
    mover = Mover(BufferPool(CHUNK, 2), depth=2)
    with pytest.raises(InUseError, match=f"ended at byte {SIZE - CHUNK}"):
        run(mover.copy(plain(source, "s"), plain(target, "t"), chunks(), digests=None, zero=True), source, target)


def test_a_target_that_ends_early() -> None:
    """B09."""
    source, target = MemoryDevice(SIZE, data=data()), MemoryDevice(SIZE - 512)
    mover = Mover(BufferPool(CHUNK, 2), depth=2)
    with pytest.raises(NoSpaceError):
        run(mover.copy(plain(source, "s"), plain(target, "t"), chunks(), digests=None, zero=True), source, target)


@pytest.mark.parametrize("sector,memory", [(512, 4), (4096, 512), (65536, 4096)])
def test_any_alignment(sector: int, memory: int) -> None:
    """F51: sectors of every size, on either side."""
    size = 5 * 65536
    odd = Limits(sector, sector, sector, sector, memory, fua=True, discard=True, volatile_cache=False)
    for one, other in ((odd, None), (None, odd)):
        source, target = MemoryDevice(size, data=data(size), limits=one), MemoryDevice(size, limits=other)
        mover = Mover(BufferPool(65536, 2), depth=2)
        pieces = chunks_of([Chunk(0, size)], 65536)
        run(mover.copy(plain(source, "s"), plain(target, "t"), pieces, digests=None, zero=True), source, target)
        assert content(target) == data(size)


@pytest.mark.parametrize("number", [0, errno.EOPNOTSUPP, errno.EINVAL])
def test_holes_never_show_what_was_there(number: int) -> None:
    """F11: by the device's command, or by writing zeroes where it has none."""
    source, target = MemoryDevice(SIZE, data=data()), MemoryDevice(SIZE, data=b"\xaa" * SIZE)
    faults = Faults(target)
    if number:
        faults.fail(number, op=ZERO)
    pieces = [Chunk(0, CHUNK), Chunk(CHUNK, 3 * CHUNK, True), Chunk(4 * CHUNK, CHUNK), Chunk(5 * CHUNK, CHUNK, True)]
    mover = Mover(BufferPool(CHUNK, 2), depth=2)
    run(mover.copy(plain(source, "s"), plain(faults, "t"), pieces, digests=None, zero=True), source, faults)
    wanted = data()[:CHUNK] + bytes(3 * CHUNK) + data()[4 * CHUNK : 5 * CHUNK] + bytes(CHUNK)
    assert content(target) == wanted + b"\xaa" * (4 * CHUNK)
    assert mover.skipped == 4 * CHUNK and mover.copied == 2 * CHUNK


def test_zeroing_that_fails_is_an_error() -> None:
    source, target = MemoryDevice(SIZE), MemoryDevice(SIZE)
    faults = Faults(target)
    faults.fail(errno.EIO, op=ZERO)
    mover = Mover(BufferPool(CHUNK, 2), depth=2)
    with pytest.raises(DeviceError):
        run(mover.copy(plain(source, "s"), plain(faults, "t"), [Chunk(0, SIZE, True)], digests=None, zero=True), faults)


# --- checking -------------------------------------------------------------------------------------


def copied_with_digests(target: MemoryDevice, depth: int = 3) -> tuple[MemoryDevice, Mover, Digests]:
    source = MemoryDevice(SIZE, data=data())
    mover, digests = Mover(BufferPool(CHUNK, depth), depth=depth), Digests()
    run(mover.copy(plain(source, "s"), plain(target, "t"), chunks(), digests=digests, zero=True), source, target)
    return source, mover, digests


def never(_chunk: Chunk) -> bool:
    return False


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("known", [True, False])
def test_any_byte_that_rots_is_found(depth: int, known: bool) -> None:
    """Bit rot at the edges of chunks and within; the byte is named if the source is there to tell."""
    for where in (0, 1, CHUNK - 1, CHUNK, 5 * CHUNK + 77, SIZE - 1):
        target = BitRotDevice(SIZE)
        source, mover, digests = copied_with_digests(target, depth)
        target.rot(where)
        target.rot(SIZE - 1, 2)
        check = mover.check(plain(source, "s") if known else None, plain(target, "t"), chunks(), digests, is_hole=never)
        place = f"first at byte {where}:" if known else f"{CHUNK} bytes at {where // CHUNK * CHUNK}"
        with pytest.raises(VerifyError, match=place) as caught:
            run(check, source, target)
        assert caught.value.filename == "t" and mover.pool.lent == 0


def test_a_write_that_went_astray_is_found() -> None:
    """Right data at the wrong place: two chunks are wrong, and the first one is named."""
    target = MisdirectedDevice(SIZE)
    target.misdirect(WRITE, 3 * CHUNK, CHUNK)
    source, mover, digests = copied_with_digests(target, 1)
    assert target.happened
    with pytest.raises(VerifyError, match=f"first at byte {CHUNK}:"):
        run(mover.check(plain(source, "s"), plain(target, "t"), chunks(), digests, is_hole=never), source, target)


def test_what_is_whole_passes() -> None:
    """F22: what has changed in the source since is nobody's fault."""
    target = MemoryDevice(SIZE)
    source, mover, digests = copied_with_digests(target)
    source.data[0] ^= 1
    run(mover.check(plain(source, "s"), plain(target, "t"), chunks(), digests, is_hole=never), source, target)


# --- workers --------------------------------------------------------------------------------------


def test_the_first_error_in_time_is_raised() -> None:
    """B04: not that of the first worker."""

    async def work(turn: int) -> None:
        for _ in range(10 - turn):
            await yield_now()
        raise ValueError(str(turn))

    with pytest.raises(ValueError, match="2"):
        run(in_turn(work, range(10), 3))


def test_an_error_while_finding_work_is_raised() -> None:
    def turns() -> Any:
        yield 1
        raise OSError("no more")

    async def work(turn: int) -> None:
        await yield_now()

    with pytest.raises(OSError, match="no more"):
        run(in_turn(work, turns(), 2))


def test_cancelling_ends_every_worker() -> None:
    """F24: nothing outlives the call."""
    ended: list[int] = []

    async def work(turn: int) -> None:
        try:
            await wait(Event())
        finally:
            ended.append(turn)

    scheduler = Scheduler()
    task = scheduler.spawn(in_turn(work, range(10), 4))
    scheduler.run_ready()
    task.cancel()
    scheduler.run_ready()
    assert task.done and isinstance(task.error, Cancelled)
    assert ended == [0, 1, 2, 3]
