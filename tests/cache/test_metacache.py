"""The metadata cache: changes that can be undone, reads that are shared, and commits in phases."""

from __future__ import annotations

import asyncio
import copy
import errno
import os
import random
from collections.abc import Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.dio.kit import Watch, drive, pattern, pump

from odirect.base.errors import CorruptionError, DeviceError, ReadOnlyError, UnsupportedError
from odirect.block.bio import FLUSH, READ, WRITE, Bio
from odirect.block.device import Limits
from odirect.block.file_device import FileDevice
from odirect.block.filters.fault import Faults
from odirect.block.limits import file_limits
from odirect.block.memory import MemoryDevice
from odirect.block.queue import RingQueue
from odirect.cache.metacache import ENTRY, FRESH, LATE, TREE, BlockMiss, MetaCache, Snapshot
from odirect.ring._calls import address_of
from odirect.ring.threads import ThreadRing
from odirect.sched.drive_asyncio import AsyncioDriver
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Cancelled, Scheduler
from odirect.sched.traps import Event, shielded
from odirect.testing.devices import OddDevice, TornDevice
from odirect.testing.sim import Simulation, explore, run_seeds
from odirect.testing.sim_device import SimFaults

SIZE = 1024
BLOCKS = 64
CONTENT = pattern(SIZE * BLOCKS, 1)


class Undo(Exception):
    """Leaves a transaction."""


def on_disk(block: int, size: int = SIZE) -> bytes:
    return CONTENT[block * size : (block + 1) * size]


def made(**options: Any) -> MetaCache:
    """A cache over a device in memory that holds CONTENT."""
    return MetaCache(Watch(MemoryDevice(len(CONTENT), data=CONTENT)), SIZE, name="volume", **options)


def loaded(*blocks: int, **options: Any) -> MetaCache:
    cache = made(**options)
    drive(cache.read(blocks), cache.device)
    return cache


def contents(cache: MetaCache, blocks: Sequence[int]) -> list[bytes]:
    return [bytes(cache.get(block)) for block in blocks]


def reads(cache: MetaCache) -> list[tuple[int, int]]:
    """(first block, number of blocks) of every read so far."""
    device = cache.device
    assert isinstance(device, Watch)
    return [(addr // SIZE, length // SIZE) for op, addr, length, _ in device.seen if op == READ]


def fill(cache: MetaCache, block: int, tag: int, value: int) -> None:
    with cache.transaction():
        view = cache.change(block, tag)
        view[:] = bytes((value,)) * len(view)


def cached(cache: MetaCache, blocks: Iterable[int] = range(BLOCKS)) -> list[int]:
    return [block for block in blocks if cache.peek(block) is not None]


async def write_phases(cache: MetaCache, snapshot: Snapshot, *, flush: bool = True) -> None:
    for phase in snapshot.phases:
        await cache.write_images(phase)
        if flush:
            event = Event()
            bio = Bio(FLUSH, 0, end=event.fire)
            cache.device.submit(bio)
            await shielded(event)
            if bio.error:
                raise DeviceError("flush", errno=bio.error)


async def commit(cache: MetaCache) -> Snapshot:
    snapshot = cache.snapshot()
    await write_phases(cache, snapshot)
    cache.committed(snapshot)
    return snapshot


# --- looking up -----------------------------------------------------------------------------------


def test_what_is_missing_is_named_once_for_all() -> None:
    """One BlockMiss names everything that a look-up lacks; what is there is read-only."""
    cache = loaded(3)
    with pytest.raises(BlockMiss) as miss:
        cache.get(4)
    assert miss.value.blocks == (4,)
    with pytest.raises(BlockMiss) as miss:
        cache.get_all([5, 3, 4, 5])
    assert miss.value.blocks == (5, 4)
    assert cache.peek(4) is None
    view = cache.get(3)
    assert view == on_disk(3) and view.readonly
    assert [bytes(found) for found in cache.get_all([3, 3])] == [on_disk(3)] * 2
    shown = cache.peek(3)
    assert shown is not None and shown.readonly
    with pytest.raises(BlockMiss), cache.transaction():
        cache.change(4, LATE)
    with pytest.raises(BlockMiss), cache.transaction():
        cache.hold_back(4, 0, 1)
    assert not cache.held_back(4, 0)


def test_misuse_is_refused() -> None:
    """Changes outside a transaction, unknown tags, suspending or a snapshot inside one: errors, nothing changed."""
    cache = loaded(1)
    for call in (
        lambda: cache.change(1, LATE),
        lambda: cache.create(2),
        lambda: cache.hold_back(1, 0, 4),
        lambda: cache.undo(list),
    ):
        with pytest.raises(RuntimeError):
            call()
    with cache.transaction():
        for tag in (-1, 4):
            with pytest.raises(ValueError, match="phase"):
                cache.change(1, tag)
            with pytest.raises(ValueError, match="phase"):
                cache.create(2, tag)
        for offset, length in ((-1, 1), (0, SIZE + 1), (SIZE, 1), (0, -1)):
            with pytest.raises(ValueError, match="bytes"):
                cache.hold_back(1, offset, length)
        for inside in (cache.read([5]), cache.load(lambda: None)):
            with pytest.raises(RuntimeError, match="inside a transaction"):
                drive(inside, cache.device)
        with pytest.raises(RuntimeError, match="inside a transaction"):
            cache.snapshot()
    with pytest.raises(RuntimeError, match="not pinned"):
        cache.unpin(1)
    assert cache.dirty_blocks == 0 and cached(cache) == [1]
    outer, inner = cache.transaction(), cache.transaction()
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="innermost"):
        outer.__exit__(None, None, None)


def test_odd_sizes_are_refused() -> None:
    """Blocks that the device cannot write one by one: UnsupportedError, but for a volume that is only read (F51)."""
    device = OddDevice(1 << 16, memory_align=512, read_align=512, write_align=4096)
    for size, first in ((1024, 0), (4096, 1024)):
        with pytest.raises(UnsupportedError, match="4096"):
            MetaCache(device, size, name="volume", first_block_addr=first)
    MetaCache(device, 4096, name="volume", first_block_addr=8192)
    cache = MetaCache(device, 1024, name="volume", writable=False)
    drive(cache.read([1]), device)
    with cache.transaction():
        for call in (lambda: cache.change(1, LATE), lambda: cache.create(2), lambda: cache.hold_back(1, 0, 1)):
            with pytest.raises(ReadOnlyError):
                call()
    for size, limit, first in ((1000, 0, 0), (0, 0, 0), (1024, -1, 0), (1024, 0, -1)):
        with pytest.raises(ValueError, match="bytes"):
            MetaCache(device, size, name="volume", limit_bytes=limit, first_block_addr=first)


# --- transactions ---------------------------------------------------------------------------------


def test_undone_changes_are_undone_in_place() -> None:
    """A view that was handed out before shows the old bytes again; tag and dirtiness are as before."""
    cache = loaded(1, 2)
    before = cache.get(1)
    with pytest.raises(Undo), cache.transaction():
        first = cache.change(1, TREE)
        first[:10] = b"0123456789"
        assert bytes(before[:10]) == b"0123456789"
        cache.change(1, ENTRY)[10:12] = b"ab"
        raise Undo
    assert before == first == on_disk(1)
    assert cache.dirty_blocks == 0
    fill(cache, 2, ENTRY, 7)
    with pytest.raises(Undo), cache.transaction():
        cache.change(2, TREE)[:] = bytes(SIZE)
        raise Undo
    assert cache.get(2) == b"\7" * SIZE
    assert [[block for block, _ in phase] for phase in cache.snapshot().phases] == [[], [], [2], []]


def test_undone_creation_leaves_what_was() -> None:
    """A created block is gone, or has its former content, tag and held-back bytes."""
    cache = loaded(2, 3)
    with cache.transaction():
        cache.hold_back(3, 5, 2)
        cache.change(3, ENTRY)[5:7] = b"xy"
    dirty = bytes(cache.get(3))
    with pytest.raises(Undo), cache.transaction():
        for block in (1, 2, 3):
            assert cache.create(block) == bytes(SIZE)
        assert cache.dirty_blocks == 3 and not cache.held_back(3, 5)
        raise Undo
    assert cache.peek(1) is None
    assert cache.get(2) == on_disk(2) and cache.get(3) == dirty
    assert cache.held_back(3, 5) and cache.held_back(3, 6) and not cache.held_back(3, 7)
    assert cache.dirty_blocks == 1
    assert [[block for block, _ in phase] for phase in cache.snapshot().phases] == [[], [], [3], [3]]


def test_undone_forgetting_brings_back() -> None:
    """Forgotten blocks come back with content and tag, also if they were created anew meanwhile (G11)."""
    cache = loaded(1, 2, 3)
    fill(cache, 2, TREE, 9)
    with pytest.raises(Undo), cache.transaction():
        cache.forget(1, 3)
        assert cached(cache) == [] and cache.dirty_blocks == 0
        cache.create(1)[:] = b"z" * SIZE
        cache.forget(1)
        cache.create(1)
        cache.create(7)
        cache.forget(7)
        raise Undo
    assert cached(cache) == [1, 2, 3]
    assert cache.get(1) == on_disk(1) and cache.get(2) == b"\x09" * SIZE
    assert [[block for block, _ in phase] for phase in cache.snapshot().phases] == [[], [2], [], []]


def test_forgetting_stands_without_an_error() -> None:
    """Forgotten blocks, dirty or not, are read again from the device; a huge range costs what is cached."""
    cache = loaded(1, 2)
    fill(cache, 1, LATE, 3)
    with cache.transaction():
        cache.forget(0, 1 << 60)
    assert cached(cache) == [] and cache.dirty_blocks == 0 and cache.used_bytes == 0
    drive(cache.read([1, 2]), cache.device)
    assert cache.get(1) == on_disk(1)
    cache.forget(2)  # outside a transaction
    assert cached(cache) == [1]


def test_inner_transactions_join_the_outer_one() -> None:
    """What an inner one did stands or falls with the outer one; a failed inner one undoes its own part alone."""
    cache = loaded(1, 2)
    calls: list[str] = []
    with pytest.raises(Undo), cache.transaction():
        cache.undo(lambda: calls.append("outer"))
        cache.change(1, TREE)[0] = 1
        with cache.transaction():
            cache.undo(lambda: calls.append("inner"))
            cache.change(1, TREE)[0] = 2
            cache.change(2, TREE)[0] = 2
            cache.create(3)
            cache.forget(3)
        raise Undo
    assert calls == ["inner", "outer"]
    assert cache.get(1) == on_disk(1) and cache.get(2) == on_disk(2) and cached(cache) == [1, 2]
    calls.clear()
    with cache.transaction():
        cache.change(1, ENTRY)[0] = 1
        with pytest.raises(Undo), cache.transaction():
            cache.undo(lambda: calls.append("inner"))
            cache.change(1, TREE)[0] = 2
            cache.forget(2)
            raise Undo
        assert cache.get(1)[0] == 1 and cached(cache) == [1, 2]
    assert calls == ["inner"]
    assert [[block for block, _ in phase] for phase in cache.snapshot().phases] == [[], [], [1], []]


def test_every_undo_call_runs() -> None:
    """They run the last first, see the blocks as they were, and one that fails does not stop the others."""
    cache = loaded(1)
    calls: list[object] = []

    def broken() -> None:
        calls.append("broken")
        raise KeyError

    with pytest.raises(KeyError), cache.transaction():
        cache.change(1, LATE)[:] = bytes(SIZE)
        cache.undo(lambda: calls.append(bytes(cache.get(1)) == on_disk(1)))
        cache.undo(broken)
        raise Undo
    assert calls == ["broken", True]
    with cache.transaction():
        cache.undo(lambda: calls.append("never"))
    assert "never" not in calls


def test_memory_is_not_reused_under_a_view() -> None:
    """A plain function that forgets and creates blocks still sees in its views what it saw before."""
    cache = loaded(1, 2, limit_bytes=0)
    with cache.transaction():
        view = cache.get(1)
        cache.forget(1)
        for block in range(10, 40):
            cache.create(block)[:] = b"n" * SIZE
        assert view == on_disk(1)
    assert view == on_disk(1)


# --- tags, phases, what is held back --------------------------------------------------------------


@pytest.mark.parametrize("first", [FRESH, TREE, ENTRY, LATE])
@pytest.mark.parametrize("second", [FRESH, TREE, ENTRY, LATE])
def test_the_earlier_tag_stays(first: int, second: int) -> None:
    """FRESH stays FRESH, and of two others the earlier one is kept, whichever came first."""
    cache = loaded(1)
    with cache.transaction():
        cache.change(1, first)
        cache.change(1, second)
    assert [len(phase) for phase in cache.snapshot().phases].index(1) == min(first, second)


def test_held_back_bytes_show_in_all_phases_but_the_last() -> None:
    """A block with held-back bytes is written twice, first with them; the oldest bytes count; FRESH has none."""
    cache = loaded(1, 2)
    with cache.transaction():
        cache.hold_back(1, 10, 4)
        cache.change(1, LATE)[10:14] = b"abcd"
        cache.hold_back(1, 8, 8)
        cache.change(1, ENTRY)[8:16] = b"ABCDEFGH"
        cache.change(1, ENTRY)[20] = 5
        cache.create(9)[0] = 1
        cache.hold_back(9, 0, 1)
        cache.change(9, ENTRY)[0] = 2
        cache.hold_back(2, 0, 1)  # A late block is written once: there is nothing before it to hold back from.
        cache.change(2, LATE)[0] = 7
    assert cache.held_back(1, 8) and cache.held_back(1, 15) and not cache.held_back(1, 16)
    assert not cache.held_back(9, 0)
    final = bytearray(on_disk(1))
    final[8:16], final[20] = b"ABCDEFGH", 5
    early = bytearray(final)
    early[8:16] = on_disk(1)[8:16]
    snapshot = cache.snapshot()
    assert snapshot.blocks == 3
    assert [[(block, bytes(image)) for block, image in phase] for phase in snapshot.phases] == [
        [(9, b"\2" + bytes(SIZE - 1))],
        [],
        [(1, bytes(early))],
        [(1, bytes(final)), (2, b"\7" + on_disk(2)[1:])],
    ]
    assert not cache.held_back(1, 8), "it is the running commit's"


def test_a_change_during_a_commit_is_for_the_next_one() -> None:
    """Images are private; a block changed meanwhile is dirty again, its held-back bytes are the running commit's."""
    cache = loaded(1)
    with cache.transaction():
        cache.hold_back(1, 0, 1)
        cache.change(1, ENTRY)[0] = 1
    first = cache.snapshot()
    assert cache.dirty_blocks == 0
    with cache.transaction():
        cache.hold_back(1, 0, 2)
        cache.change(1, ENTRY)[:2] = b"\2\2"
    assert cache.dirty_blocks == 1
    assert first.phases[LATE][0][1][0] == 1
    drive(write_phases(cache, first), cache.device)
    cache.committed(first)
    assert cache.dirty_blocks == 1
    second = cache.snapshot()
    assert bytes(second.phases[ENTRY][0][1][:2]) == bytes((1, on_disk(1)[1]))
    assert bytes(second.phases[LATE][0][1][:2]) == b"\2\2"


def test_a_failed_commit_is_dirty_again() -> None:
    """With its tags and older held-back bytes, and what was changed since; what was forgotten stays away (F41)."""
    cache = loaded(1, 2, 3)
    with cache.transaction():
        cache.hold_back(1, 0, 2)
        cache.change(1, ENTRY)[:2] = b"\1\1"
        cache.create(8)[:] = b"8" * SIZE
        cache.change(2, TREE)[0] = 1
        cache.change(3, LATE)[0] = 1
    failed = cache.snapshot()
    with cache.transaction():
        cache.hold_back(1, 1, 2)
        cache.change(1, LATE)[1:3] = b"\2\2"
        cache.change(8, ENTRY)[0] = 0
        cache.forget(3)
    cache.commit_failed(failed)
    assert cache.dirty_blocks == 3
    again = cache.snapshot()
    assert [[block for block, _ in phase] for phase in again.phases] == [[8], [2], [1], [1]]
    assert bytes(again.phases[ENTRY][0][1]) == on_disk(1)
    assert bytes(again.phases[LATE][0][1][:3]) == b"\1\2\2"
    cache.committed(again)
    assert cache.dirty_blocks == 0


def test_one_commit_at_a_time() -> None:
    """A second snapshot, and the end of a commit that is not the running one, are refused."""
    cache = loaded(1)
    snapshot = cache.snapshot()
    assert snapshot.blocks == 0 and "0 blocks" in repr(snapshot)
    with pytest.raises(RuntimeError, match="running already"):
        cache.snapshot()
    cache.committed(snapshot)
    for end in (cache.committed, cache.commit_failed):
        with pytest.raises(RuntimeError, match="not the one"):
            end(snapshot)


def test_images_are_aligned_and_in_order() -> None:
    """Every image lies at a multiple of the device's memory alignment, sorted by block within its phase (F51)."""
    device = OddDevice(1 << 16, memory_align=4096, read_align=512)
    cache = MetaCache(device, SIZE, name="volume")
    with cache.transaction():
        for block in (9, 3, 4, 30, 1):
            cache.create(block, LATE)
    snapshot = cache.snapshot()
    assert [block for block, _ in snapshot.phases[LATE]] == [1, 3, 4, 9, 30]
    assert all(address_of(image) % 4096 == 0 and len(image) == SIZE for _, image in snapshot.phases[LATE])


# --- reading --------------------------------------------------------------------------------------


def test_load_reads_what_is_missing_and_starts_over() -> None:
    """Each miss is one batch, adjacent blocks are one bio, and a try that missed has changed nothing."""
    cache = made()
    tries: list[bytes] = []
    undone: list[int] = []

    def look() -> int:
        cache.create(50)
        cache.undo(lambda: undone.append(1))
        tries.append(b"".join(cache.get_all([9, 3, 4, 5])))
        assert cache.change(20, LATE)[0] == on_disk(20)[0]
        return 7

    assert drive(cache.load(look), cache.device) == 7
    assert tries == [b"".join(map(on_disk, (9, 3, 4, 5)))] * 2 and len(undone) == 2
    assert reads(cache) == [(3, 3), (9, 1), (20, 1)]
    assert isinstance(cache.device, Watch) and cache.device.most == 2
    assert cache.dirty_blocks == 2


def test_load_ends_though_nothing_may_stay() -> None:
    """What was loaded stays until the function has returned, whatever the limit; then it may go."""
    cache = made(limit_bytes=0)

    def look() -> list[bytes]:
        return [bytes(cache.get(block)) for block in (1, 7, 30, 3)]

    assert drive(cache.load(look), cache.device) == [on_disk(block) for block in (1, 7, 30, 3)]
    assert len(reads(cache)) == 4
    drive(cache.read([60]), cache.device)
    assert cached(cache) == [60]


def test_load_refuses_a_function_that_forgets_what_it_needs() -> None:
    """It would go on for ever."""
    cache = loaded(1)

    def forgetful() -> None:
        cache.forget(1)
        cache.get(1)

    with pytest.raises(RuntimeError, match="forgotten"):
        drive(cache.load(forgetful), cache.device)
    assert cache.get(1) == on_disk(1)


def test_errors_of_the_function_leave_load() -> None:
    """With everything undone and unpinned."""
    cache = made(limit_bytes=0)

    def broken() -> None:
        cache.get(1)
        cache.create(2)
        raise Undo

    with pytest.raises(Undo):
        drive(cache.load(broken), cache.device)
    assert cached(cache) == [1] and not cache._pins and cache.dirty_blocks == 0


@pytest.mark.parametrize("block", [BLOCKS, BLOCKS + 5, 1 << 60, -1])
def test_a_block_past_the_end_is_corruption(block: int) -> None:
    """The message names volume, block and byte; nothing is read."""
    cache = made()
    with pytest.raises(CorruptionError, match=rf"^volume: metadata block {block} at byte {block * SIZE}: "):
        drive(cache.load(lambda: cache.get_all([1, block])), cache.device)
    assert reads(cache) == [] and not cache._pins and not cache._reading


def test_a_device_that_ends_inside_a_block() -> None:
    """A device that ends in the middle of a block, or shrinks while it is read, is corruption, named (F04)."""
    device = MemoryDevice(2 * SIZE + 512)
    cache = MetaCache(device, SIZE, name="volume")
    with pytest.raises(CorruptionError, match="metadata block 2 at byte 2048"):
        drive(cache.read([2]), device)

    class Shrinking(Watch):
        size = len(CONTENT)

        @property
        def size_bytes(self) -> int:
            return self.size

        def submit(self, bio: Bio) -> None:
            Shrinking.size = 3 * SIZE + 512
            super().submit(bio)

    shrinking = Shrinking(MemoryDevice(3 * SIZE + 512, data=CONTENT[: 3 * SIZE + 512]))
    cache = MetaCache(shrinking, SIZE, name="volume")
    with pytest.raises(CorruptionError, match="metadata block 3 at byte 3072"):
        drive(cache.read([1, 2, 3, 4]), shrinking)
    assert cached(cache) == [1, 2] and cache.get(2) == on_disk(2)


@pytest.mark.parametrize("size", [512, 1024, 4096, 16384])
@pytest.mark.parametrize("first", [0, 512, 4096])
def test_every_alignment(size: int, first: int) -> None:
    """Reading is widened and bounced where the device wants larger pieces; all bytes are right (F51)."""
    data = pattern(1 << 18, 5)
    for device in OddDevice.every(1 << 18):
        device.data[:] = data
        writable = size % device.limits.write_align == 0 and first % device.limits.write_align == 0
        cache = MetaCache(device, size, name="volume", first_block_addr=first, writable=writable)
        last = ((1 << 18) - first) // size - 1
        wanted = sorted({0, 1, 2, 5, last // 2, last - 1, last})
        drive(cache.read(wanted), device)
        for block in wanted:
            at = first + block * size
            assert cache.get(block) == data[at : at + size], (device, block)
        if writable:
            for block in (1, 2, last):
                fill(cache, block, LATE, 0x5A)
            drive(commit(cache), device)
            after = bytearray(data)
            for block in (1, 2, last):
                after[first + block * size : first + (block + 1) * size] = b"\x5a" * size
            assert device.data == after


@pytest.mark.parametrize("bio_bytes", [512, 1024, 1536, 4096])
@pytest.mark.parametrize("segments", [1, 2, 256])
def test_small_bios(bio_bytes: int, segments: int) -> None:
    """Runs are cut to the device's limits, also in the middle of a block; nothing is lost (B02)."""
    limits = Limits(max_bio_bytes=bio_bytes, max_segments=segments, volatile_cache=False)
    device = MemoryDevice(len(CONTENT), data=CONTENT, limits=limits)
    cache = MetaCache(device, SIZE, name="volume")
    drive(cache.read(range(20)), device)
    assert b"".join(cache.get_all(range(20))) == CONTENT[: 20 * SIZE]
    for block in range(20):
        fill(cache, block, TREE, block)
    drive(commit(cache), device)
    assert device.data[: 20 * SIZE] == b"".join(bytes((block,)) * SIZE for block in range(20))


@pytest.mark.parametrize("memory_align", [512, 4096])
def test_short_transfers_are_resumed(memory_align: int) -> None:
    """However much each bio moves: whole blocks, on the device and in memory, and it ends (F04)."""
    for moved in (512, 1024, 1536, 2560):
        store = MemoryDevice(len(CONTENT), data=CONTENT, limits=Limits(memory_align=memory_align))
        device = Faults(store)
        rule = device.shorten(moved, times=5)
        cache = MetaCache(device, 4096, name="volume")
        drive(cache.read([1, 2, 3]), device)
        assert b"".join(cache.get_all([1, 2, 3])) == CONTENT[4096:16384]
        rule.remove()
        device.shorten(moved, times=5)
        for block in (1, 2, 3):
            fill(cache, block, LATE, block)
        drive(commit(cache), device)
        assert store.data[4096:16384] == b"".join(bytes((block,)) * 4096 for block in (1, 2, 3))


class Stuck(Watch):
    """Moves nothing and calls it a success."""

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        finished = super().poll(timeout_ns)
        for bio in finished:
            bio.done_bytes = 0
        return finished


def test_a_device_that_moves_nothing_is_an_error() -> None:
    """Not an endless loop, reading or writing (F04)."""
    device = Stuck(MemoryDevice(len(CONTENT), data=CONTENT))
    cache = MetaCache(device, SIZE, name="volume")
    with pytest.raises(DeviceError, match="moves nothing"):
        drive(cache.read([3]), device)
    with cache.transaction():
        cache.create(3)
    snapshot = cache.snapshot()
    with pytest.raises(DeviceError, match="moves nothing"):
        drive(cache.write_images(snapshot.phases[FRESH]), device)


def test_read_errors_leave_and_a_later_read_works() -> None:
    """The device's error, with the volume's name; what could be read stays, what could not is tried again."""
    device = Faults(MemoryDevice(len(CONTENT), data=CONTENT))
    device.fail(errno.EIO, op=READ, within=(5 * SIZE, 6 * SIZE), times=1)
    cache = MetaCache(device, SIZE, name="volume")
    with pytest.raises(DeviceError, match=r"^volume: reading"):
        drive(cache.load(lambda: cache.get_all([1, 5])), device)
    assert cached(cache) == [1] and not cache._reading and not cache._pins
    drive(cache.read([5]), device)
    assert cache.get(5) == on_disk(5)


def test_a_closed_device_is_an_error() -> None:
    """And not a task that waits for ever."""
    cache = made()
    cache.device.close()
    with pytest.raises(OSError, match="closed"):
        drive(cache.read([5, 7]), cache.device)
    assert not cache._reading


# --- other drivers, other tasks -------------------------------------------------------------------


def test_the_synchronous_driver() -> None:
    """`load` in the caller's own thread."""
    cache = made()
    scheduler = Scheduler()
    scheduler.add_device(cache.device)
    assert SyncDriver(scheduler).run(cache.load(lambda: bytes(cache.get(4)))) == on_disk(4)


def test_a_real_file_past_the_page_cache(scratch: Path) -> None:
    """Blocks and images go to a file open with O_DIRECT as they are."""
    path = scratch / "volume"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    queue = RingQueue(ThreadRing(64, workers=0, shared=False))
    try:
        device = FileDevice(queue, fd, file_limits(fd, path=path, writable=True)[0])
        cache = MetaCache(device, 4096, name="volume")
        scheduler = Scheduler()
        scheduler.add_device(device)
        driver = SyncDriver(scheduler)
        assert driver.run(cache.load(partial(contents, cache, [0, 1, 9]))) == [on_disk(n, 4096) for n in (0, 1, 9)]
        for block in (1, 2, 9):
            with cache.transaction():
                cache.create(block)[:] = bytes((block,)) * 4096
        driver.run(commit(cache))
        device.close()
    finally:
        queue.close()
        os.close(fd)
    after = path.read_bytes()
    for block in range(16):
        wanted = bytes((block,)) * 4096 if block in (1, 2, 9) else on_disk(block, 4096)
        assert after[block * 4096 : (block + 1) * 4096] == wanted


def test_asyncio() -> None:
    """A short read is resumed though no task is woken by it."""

    async def main() -> bytes:
        device = Faults(MemoryDevice(len(CONTENT), data=CONTENT))
        device.shorten(512, times=2)
        cache = MetaCache(device, SIZE, name="volume")
        driver = AsyncioDriver(asyncio.get_running_loop())
        driver.watch(device)
        try:
            return await asyncio.wait_for(driver.run(cache.load(lambda: bytes(cache.get(4)))), 60)
        finally:
            driver.unwatch(device)
            device.close()

    assert asyncio.run(main()) == on_disk(4)


def sim_cache(sim: Simulation, *, faults: SimFaults | None = None) -> MetaCache:
    """A cache over a simulated device that holds CONTENT."""
    store = MemoryDevice(len(CONTENT), data=CONTENT)
    device = Watch(sim.device(store=store, faults=faults, add=False))
    sim.scheduler.add_device(device)
    return MetaCache(device, SIZE, name="volume")


def test_two_tasks_that_miss_one_block_read_it_once() -> None:
    """In every order of tasks and completions; a short transfer changes nothing."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        cache = sim_cache(sim)

        async def look(*blocks: int) -> None:
            found = await cache.load(lambda: [bytes(cache.get(block)) for block in blocks])
            assert found == [on_disk(block) for block in blocks]

        async def main() -> None:
            other = sim.spawn(look(3, 4))
            await look(3, 5)
            await shielded(other.ended)
            read = [block for first, count in reads(cache) for block in range(first, first + count)]
            assert sorted(read) == [3, 4, 5]
            assert not cache._pins and not cache._reading

        return main()

    assert explore(scenario, 20_000).complete
    run_seeds(range(30), scenario)


@pytest.mark.parametrize("how", ["create", "forget", "create and undo", "forget and create"])
def test_what_is_newer_is_not_overwritten_by_a_read(how: str) -> None:
    """A block that is created or forgotten while it is read: the read brings its old bytes to nobody."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        cache = sim_cache(sim)
        store = cache.device.lower.store  # type: ignore[attr-defined]
        new = b"n" * SIZE

        async def interfere() -> None:
            if how == "create and undo":
                with pytest.raises(Undo), cache.transaction():
                    cache.create(3)[:] = new
                    raise Undo
                return
            with cache.transaction():
                if how != "create":
                    cache.forget(3)
                    # Only so can it be told whether bytes were read before or after.
                    store.data[3 * SIZE : 4 * SIZE] = new
                if how != "forget":
                    cache.create(3)[:] = new

        async def main() -> None:
            reader = sim.spawn(cache.read([2, 3, 4]))
            writer = sim.spawn(interfere())
            for task in (reader, writer):
                await shielded(task.ended)
            wanted = on_disk(3) if how == "create and undo" else new
            assert await cache.load(lambda: bytes(cache.get(3))) == wanted
            assert await cache.load(lambda: bytes(cache.get(4))) == on_disk(4)
            assert not cache._reading and not cache._pins

        return main()

    assert explore(scenario, 20_000).complete


def test_tasks_with_faults() -> None:
    """Many tasks, read errors and short transfers: right bytes or the device's error; nothing is left pinned."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        cache = sim_cache(sim, faults=SimFaults(read_error=0.1, short=0.3))
        cache.limit_bytes = 4 * SIZE

        async def look() -> None:
            for _ in range(4):
                blocks = sim.rng.sample(range(12), 3)
                try:
                    found = await cache.load(partial(contents, cache, blocks))
                except DeviceError:
                    continue
                assert found == [on_disk(block) for block in blocks]

        async def main() -> None:
            tasks = [sim.spawn(look()) for _ in range(4)]
            for task in tasks:
                await shielded(task.ended)
            assert not cache._pins and not cache._reading and cache.used_bytes <= 16 * SIZE

        return main()

    run_seeds(range(40), scenario)


def test_whoever_waits_for_anothers_read_that_fails_tries_himself() -> None:
    """One task's read of two adjacent blocks fails because of the other block; its neighbour's task gets its own."""
    device = Faults(MemoryDevice(len(CONTENT), data=CONTENT))
    device.fail(errno.EIO, op=READ, within=(6 * SIZE, 7 * SIZE))
    cache = MetaCache(device, SIZE, name="volume")
    scheduler = Scheduler()
    scheduler.add_device(device)
    both = scheduler.spawn(cache.read([5, 6]))
    one = scheduler.spawn(cache.read([5]))
    pump(scheduler, both, one)
    with pytest.raises(DeviceError):
        both.result()
    one.result()
    assert cache.get(5) == on_disk(5)


def test_a_cancelled_reader_takes_nothing_from_others() -> None:
    """It ends when its I/O is back; who waits for the same block gets it (F24)."""
    cache = made()
    scheduler = Scheduler()
    scheduler.add_device(cache.device)
    first = scheduler.spawn(cache.read([5]))
    second = scheduler.spawn(cache.load(lambda: bytes(cache.get(5))))
    scheduler.run_ready()
    first.cancel()
    scheduler.run_ready()
    assert not first.done
    pump(scheduler, first, second)
    assert isinstance(first.error, Cancelled)
    assert second.result() == on_disk(5) and len(reads(cache)) == 1 and not cache._pins


# --- reclaiming -----------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first() -> None:
    """Of the clean, unpinned ones; `peek` is no use, `get` is."""
    cache = loaded(1, 2, 3, 4, limit_bytes=4 * SIZE)
    assert cache.used_bytes == 4 * SIZE
    cache.get(1)
    cache.peek(2)
    drive(cache.read([10]), cache.device)
    assert cached(cache) == [1, 3, 4, 10]
    cache.pin(3)
    cache.pin(3)
    fill(cache, 4, LATE, 1)
    drive(cache.read([20, 21, 22, 23]), cache.device)
    assert cached(cache) == [3, 4, 20, 21, 22, 23]
    cache.unpin(3)
    drive(cache.read([30]), cache.device)
    assert 3 in cached(cache)
    cache.unpin(3)
    drive(cache.read([31]), cache.device)
    drive(cache.read([32, 33]), cache.device)
    assert cached(cache) == [4, 31, 32, 33]


def test_what_is_in_a_commit_stays_until_it_has_ended() -> None:
    """And goes then, if there is too much; a block that is dirty again stays."""
    cache = loaded(1, 2, 3, limit_bytes=0)
    fill(cache, 1, TREE, 1)
    fill(cache, 2, TREE, 2)
    snapshot = cache.snapshot()
    drive(cache.read([9]), cache.device)
    assert cached(cache) == [1, 2, 9]
    fill(cache, 2, TREE, 3)
    drive(write_phases(cache, snapshot), cache.device)
    cache.committed(snapshot)
    assert cached(cache) == [2]
    drive(cache.read([1]), cache.device)
    assert cache.get(1) == b"\1" * SIZE


def test_a_pin_outlives_the_block() -> None:
    """It is on the number: set before the block is there, and still set when it was forgotten and read again."""
    cache = made(limit_bytes=0)
    cache.pin(4)
    drive(cache.read([4]), cache.device)
    cache.forget(4)
    drive(cache.read([4]), cache.device)
    drive(cache.read([5]), cache.device)
    assert cached(cache) == [4, 5]
    cache.unpin(4)
    drive(cache.read([6]), cache.device)
    assert cached(cache) == [6]


def test_memory_is_given_back() -> None:
    """After many blocks came and went, the pool holds about what is cached."""
    device = MemoryDevice(8 << 20)
    cache = MetaCache(device, 4096, name="volume", limit_bytes=64 << 10)
    for first in range(0, 2048, 256):
        drive(cache.read(range(first, first + 256)), device)
    drive(cache.read([1]), device)
    assert cache.used_bytes <= 64 << 10
    assert sum(slab.slots for slab in cache._slabs._open) * 4096 <= 2 << 20


# --- writing --------------------------------------------------------------------------------------


def test_adjacent_images_are_one_bio_and_all_fly_at_once() -> None:
    """Up to the device's limits."""
    cache = made()
    with cache.transaction():
        for block in (1, 2, 3, 7, 9, 10):
            cache.create(block, LATE)[:] = bytes((block,)) * SIZE
    snapshot = cache.snapshot()
    drive(cache.write_images(snapshot.phases[LATE]), cache.device)
    assert isinstance(cache.device, Watch)
    assert [seen[1:3] for seen in cache.device.seen] == [(SIZE, 3 * SIZE), (7 * SIZE, SIZE), (9 * SIZE, 2 * SIZE)]
    assert cache.device.most == 3
    drive(cache.write_images([]), cache.device)
    image = snapshot.phases[LATE][0][1]
    for wrong in ([(1, image), (1, image)], [(1, image[:512])], [(-1, image)]):
        with pytest.raises(ValueError):
            drive(cache.write_images(wrong), cache.device)


def test_the_first_write_error_after_all_are_back() -> None:
    """Each subset of three writes fails: the first error to come back is raised, and nothing is in flight (F06)."""
    for failing in range(1, 8):
        watch = Watch(MemoryDevice(len(CONTENT), data=CONTENT))
        device = Faults(watch)
        numbers = [number for number in range(3) if failing >> number & 1]
        for number in numbers:
            device.fail(
                (errno.EIO, errno.ETIMEDOUT, errno.ENOLINK)[number],
                op=WRITE,
                within=(2 * number * SIZE, (2 * number + 1) * SIZE),
            )
        cache = MetaCache(device, SIZE, name="volume")
        with cache.transaction():
            for block in (0, 2, 4):
                cache.create(block)[:] = b"w" * SIZE
        snapshot = cache.snapshot()
        with pytest.raises(DeviceError, match=r"^volume: writing") as raised:
            drive(cache.write_images(snapshot.phases[FRESH]), device)
        assert raised.value.errno in [(errno.EIO, errno.ETIMEDOUT, errno.ENOLINK)[number] for number in numbers]
        assert not watch.open and device.in_flight == 0
        for number in set(range(3)) - set(numbers):
            assert watch.lower.data[number * 2 * SIZE : number * 2 * SIZE + SIZE] == b"w" * SIZE  # type: ignore[attr-defined]
        cache.commit_failed(snapshot)
        assert cache.dirty_blocks == 3


def test_a_cancelled_writer_waits_for_its_images() -> None:
    """The memory is the device's until all bios are back (F24)."""
    cache = made()
    with cache.transaction():
        cache.create(1)
        cache.create(5)
    snapshot = cache.snapshot()
    scheduler = Scheduler()
    scheduler.add_device(cache.device)
    task = scheduler.spawn(cache.write_images(snapshot.phases[FRESH]))
    scheduler.run_ready()
    task.cancel()
    scheduler.run_ready()
    assert not task.done
    pump(scheduler, task)
    assert isinstance(task.error, Cancelled) and cache.device.in_flight == 0


# --- against a model ------------------------------------------------------------------------------

NUMBERS = st.integers(0, 5)
TAGS = st.sampled_from((TREE, ENTRY, LATE, FRESH))
STEP = st.one_of(
    st.tuples(st.just("change"), NUMBERS, TAGS, st.integers(0, 500), st.integers(0, 12), st.integers(0, 255)),
    st.tuples(st.just("create"), NUMBERS, TAGS, st.integers(0, 255)),
    st.tuples(st.just("hold"), NUMBERS, st.integers(0, 500), st.integers(0, 12)),
    st.tuples(st.just("forget"), NUMBERS, st.integers(1, 2)),
)
STEPS: st.SearchStrategy[Any] = st.recursive(
    st.lists(STEP, max_size=5),
    lambda inner: st.lists(st.one_of(STEP, st.tuples(st.just("inner"), inner, st.booleans())), max_size=5),
    max_leaves=4,
)
ACTION = st.one_of(
    st.tuples(st.just("transaction"), STEPS, st.booleans()),
    st.tuples(st.just("transaction"), STEPS, st.just(False)),
    st.sampled_from((("snapshot",), ("commit",), ("fail",))),
)


class Model:
    """What is to be seen, kept in plain dictionaries: `newer` are the blocks whose bytes are not the device's."""

    def __init__(self, blocks: list[bytes]) -> None:
        self.disk = dict(enumerate(blocks))
        self.newer: dict[int, bytearray] = {}
        self.tags: dict[int, int] = {}
        self.held: dict[int, dict[int, int]] = {}
        self.commit: tuple[dict[int, int], dict[int, dict[int, int]]] | None = None

    def content(self, block: int) -> bytes:
        return bytes(self.newer.get(block, self.disk[block]))

    def writable(self, block: int) -> bytearray:
        return self.newer.setdefault(block, bytearray(self.disk[block]))

    def may(self, step: Any, gone: set[int]) -> bool:
        """Whether a file system would do this: forgotten blocks are not looked at, nor those of a commit forgotten."""
        if step[0] == "forget":
            return not (self.commit and any(step[1] <= block < step[1] + step[2] for block in self.commit[0]))
        return step[0] == "create" or step[1] not in gone

    def do(self, step: Any) -> None:
        kind, block = step[0], step[1]
        if kind == "change":
            _, _, tag, offset, length, value = step
            self.writable(block)[offset : offset + length] = bytes((value,)) * length
            self.tags[block] = min(tag, self.tags.get(block, tag))
        elif kind == "create":
            self.writable(block)[:] = bytes((step[3],)) * 512
            self.tags[block] = step[2]
            self.held.pop(block, None)
        elif kind == "hold":
            if self.tags.get(block) != FRESH and step[3]:
                held = self.held.setdefault(block, {})
                content = self.content(block)
                for offset in range(step[2], step[2] + step[3]):
                    held.setdefault(offset, content[offset])
                self.writable(block)
                self.tags.setdefault(block, LATE)
        else:
            for number in range(block, block + step[2]):
                for kept in (self.newer, self.tags, self.held):
                    kept.pop(number, None)  # type: ignore[attr-defined]

    def snapshot(self) -> list[list[tuple[int, bytes]]]:
        phases: list[list[tuple[int, bytes]]] = [[], [], [], []]
        for block, tag in sorted(self.tags.items()):
            held = self.held.get(block)
            if held and tag != LATE:
                image = bytearray(self.content(block))
                for offset, value in held.items():
                    image[offset] = value
                phases[tag].append((block, bytes(image)))
                tag = LATE
            phases[tag].append((block, self.content(block)))
        self.commit = (self.tags, self.held)
        self.tags, self.held = {}, {}
        return phases

    def committed(self, phases: list[list[tuple[int, bytes]]]) -> None:
        for phase in phases:
            self.disk.update(phase)
        self.newer = {block: content for block, content in self.newer.items() if block in self.tags}
        self.commit = None

    def failed(self) -> None:
        assert self.commit is not None
        for block, tag in self.commit[0].items():
            self.tags[block] = min(tag, self.tags.get(block, tag))
        for block, held in self.commit[1].items():
            self.held[block] = {**self.held.get(block, {}), **held}
        self.commit = None


def run_steps(cache: MetaCache, model: Model, steps: list[Any], gone: set[int]) -> None:
    """The same on cache and model; `model` is to be thrown away if this raises."""
    for step in steps:
        if step[0] == "inner":
            saved = copy.deepcopy(model.__dict__), set(gone)
            try:
                with cache.transaction():
                    run_steps(cache, model, step[1], gone)
                    if step[2]:
                        raise Undo
            except Undo:
                model.__dict__ = saved[0]
                gone.clear()
                gone.update(saved[1])
            continue
        if not model.may(step, gone):
            continue
        kind, block = step[0], step[1]
        if kind == "change":
            cache.change(block, step[2])[step[3] : step[3] + step[4]] = bytes((step[5],)) * step[4]
        elif kind == "create":
            cache.create(block, step[2])[:] = bytes((step[3],)) * 512
            gone.discard(block)
        elif kind == "hold":
            cache.hold_back(block, step[2], step[3])
        else:
            cache.forget(block, step[2])
            gone.update(range(block, block + step[2]))
        model.do(step)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.lists(ACTION, max_size=10), st.sampled_from((0, 2 * 512, 1 << 20)))
@example([("transaction", [("change", 0, TREE, 0, 4, 1), ("forget", 0, 1), ("create", 0, LATE, 3)], True)], 0)
def test_against_the_model(actions: list[Any], limit_bytes: int) -> None:
    """Random transactions, undone or not, and commits, ended or failed: bytes, tags, held-back bytes, images."""
    blocks = [pattern(512, number) for number in range(8)]
    device = MemoryDevice(8 * 512, data=b"".join(blocks))
    cache = MetaCache(device, 512, name="volume", limit_bytes=limit_bytes)
    model = Model(blocks)
    snapshot: Snapshot | None = None
    phases: list[list[tuple[int, bytes]]] = []
    for action in actions:
        if action[0] == "transaction":
            after: list[Model] = []

            def change(action: Any = action, after: list[Model] = after, model: Model = model) -> None:
                after[:] = [copy.deepcopy(model)]
                run_steps(cache, after[0], action[1], set())
                if action[2]:
                    raise Undo

            try:
                drive(cache.load(change), device)
                model = after[0]
            except Undo:
                pass
        elif action[0] == "snapshot":
            if snapshot is None:
                snapshot, phases = cache.snapshot(), model.snapshot()
                assert [[(block, bytes(image)) for block, image in phase] for phase in snapshot.phases] == phases
        elif snapshot is not None:
            drive(write_phases(cache, snapshot), device)
            if action[0] == "commit":
                cache.committed(snapshot)
                model.committed(phases)
            else:
                # All of it has arrived, and the last flush said that it failed.
                cache.commit_failed(snapshot)
                for phase in phases:
                    model.disk.update(phase)
                model.failed()
            snapshot = None
        for block in range(8):
            assert drive(cache.load(partial(contents, cache, [block])), device) == [model.content(block)]
            held = [offset for offset in range(512) if cache.held_back(block, offset)]
            assert held == sorted(model.held.get(block, {}))
        assert cache.dirty_blocks == len(model.tags)
        assert not cache._pins
    for block in range(8):
        assert device.data[block * 512 : (block + 1) * 512] == model.disk[block]


# --- power cuts -----------------------------------------------------------------------------------

PLAN = {FRESH: (1, 2, 9), TREE: (4, 5, 20), ENTRY: (7, 30), LATE: (3, 8)}
HELD = (4, 7)


def cut_commit(seed: int, cut_at: int, *, flush: bool) -> tuple[bool, int]:
    """(whether what the cut left is a prefix of the phases, how many changes the device saw)."""
    store = MemoryDevice(len(CONTENT), data=CONTENT)
    device = TornDevice(store, cut_at=cut_at, rng=random.Random(seed))
    cache = MetaCache(device, SIZE, name="volume")
    drive(cache.read(range(BLOCKS)), device)
    with cache.transaction():
        for tag, blocks in PLAN.items():
            for block in blocks:
                if block in HELD:
                    cache.hold_back(block, 0, 512)
                cache.change(block, tag)[:] = pattern(SIZE, 1000 + block)
    snapshot = cache.snapshot()
    try:
        drive(write_phases(cache, snapshot, flush=flush), device)
    except DeviceError:
        cache.commit_failed(snapshot)
        assert cache.dirty_blocks == sum(map(len, PLAN.values()))
    finals = {block: bytes(image) for block, image in snapshot.phases[LATE]}
    whole, begun = [], []
    for tag, phase in enumerate(snapshot.phases):
        arrived, started = True, False
        for block, image in phase:
            for at in range(0, SIZE, 512):
                here = store.data[block * SIZE + at : block * SIZE + at + 512]
                wanted, old = image[at : at + 512], on_disk(block)[at : at + 512]
                final = finals[block][at : at + 512] if block in finals else wanted
                arrived = arrived and here in (wanted, final)
                # What the last phase writes once more may be from there.
                shows = wanted != old and (tag == LATE or block not in finals)
                if tag == LATE and block in HELD:
                    shows = at == 0
                started = started or (shows and here == wanted)
        whole.append(arrived)
        begun.append(started)
    prefix = all(all(whole[:number]) for number in range(4) if begun[number])
    return prefix, device.changes


def test_a_power_cut_leaves_a_prefix_of_the_phases() -> None:
    """Wherever the power fails: nothing of a phase is there before all of the earlier ones (F40, F43)."""
    _, changes = cut_commit(0, 1 << 30, flush=True)
    for cut_at in range(changes + 1):
        for seed in range(6):
            assert cut_commit(seed, cut_at, flush=True)[0], (seed, cut_at)


def test_without_flushes_a_power_cut_is_found_out() -> None:
    """The deliberately broken run: no flush between the phases, and some cut leaves a later one without an earlier."""
    assert not all(cut_commit(seed, cut_at, flush=False)[0] for cut_at in range(10) for seed in range(6))
