"""The generic engine: rows G, and how direct I/O of file systems has failed (F01, F02, F06, F10–F12)."""

from __future__ import annotations

import dataclasses
import errno
import itertools
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.dio.engine_kit import CANARY, SMALL, FakeFile, Hooked, reading, writing
from tests.dio.kit import aligned, pattern

from odirect.base.errors import AlignmentError, BadBufferError, ClosedError, DeviceError, NoSpaceError, WouldBlockError
from odirect.block.bio import META, NOWAIT, READ, WRITE, Bio
from odirect.block.buffers import empty
from odirect.block.device import Limits
from odirect.block.filters.base import Filter
from odirect.block.memory import MemoryDevice
from odirect.dio.engine import DioFlags, DirectRequest, direct_io
from odirect.dio.mapping import NEW, Extent, ExtentKind, Fallback
from odirect.dio.outcome import Reason
from odirect.sched.locks import Held
from odirect.sched.scheduler import Cancelled
from odirect.sched.traps import joined
from odirect.testing.model import ModelFile
from odirect.testing.sim import Simulation, explore, run_seeds
from odirect.testing.sim_device import SimFaults

KIB = 1 << 10
LOCKING = DioFlags.LOCKING
SKIP_HOLES = DioFlags.SKIP_HOLES
ASYNC_EXTEND = DioFlags.ASYNC_EXTEND
SKIP_DIO_COUNT = DioFlags.SKIP_DIO_COUNT


def clean(data: bytes, *, run: int = 16) -> bool:
    """Whether no old contents are in `data`."""
    return bytes([CANARY]) * run not in data


# --- G01, G02: what is refused, what is nothing -----------------------------------------------------


@pytest.mark.parametrize("op", [READ, WRITE])
def test_misaligned_requests_touch_nothing(op):
    """G01: offset, addresses and lengths are checked before anything is locked, counted or mapped."""
    area = empty(16 * KIB)
    wrong = [
        (1, [area[:512]]),
        (511, [area[:512]]),
        (0, [area[:511]]),
        (0, [area[:512], area[512:1000]]),
        (0, [area[1:513]]),
        (0, [area[:512], area[513:1025]]),
    ]
    for offset, segments in wrong:
        file = FakeFile("MM")
        with pytest.raises(AlignmentError) as caught:
            file.run(DirectRequest(op, offset, segments), LOCKING)
        assert caught.value.errno == errno.EINVAL
        assert file.steps.log == []
    # The device may want more than the file system's blocks.
    file = FakeFile("MM", block=1024, limits=dataclasses.replace(SMALL, read_align=4096, write_align=4096))
    with pytest.raises(AlignmentError):
        file.run(DirectRequest(op, 1024, [area[:1024]]), LOCKING)
    assert file.steps.log == []
    # Not even a lock that is free only later is waited for.
    file = FakeFile("MM")
    held = file.lock.try_hold()
    assert held is not None
    task = file.start(DirectRequest(READ, 1, [area[:512]]), LOCKING)
    file.turn()
    assert isinstance(task.error, AlignmentError)
    held.release()


def test_the_finer_unit_is_used_where_only_that_fits():
    """G01: aligned to blocks: whole blocks at the end of the file; aligned to sectors alone: sectors."""
    file = FakeFile("MMM", size=4096 + 700)
    request, _ = reading(4096, 8192)
    assert file.run(request) == 700
    assert file.asked == [(4096, 4096, False)]
    file.asked.clear()
    request, memory = reading(4096 - 512, 8192)
    assert file.run(request) == 512 + 700
    assert file.asked == [(4096 - 512, 512 + 1024, False)]
    assert memory[: 512 + 700] == file.content()[4096 - 512 :]
    # The two alignments of a device need not be the same, and the memory's is a third.
    odd = dataclasses.replace(SMALL, read_align=512, write_align=1024, memory_align=4)
    file = FakeFile("MM", limits=odd)
    area = empty(4096)
    assert file.run(DirectRequest(READ, 512, [area[4:516]])) == 512
    with pytest.raises(AlignmentError):
        file.run(DirectRequest(WRITE, 512, [area[4:516]]))
    assert file.run(DirectRequest(WRITE, 1024, [area[4:1028]])) == 1024


@pytest.mark.parametrize("op", [READ, WRITE])
def test_nothing_is_done_for_no_bytes(op):
    """G02: a read of length 0 returns 0 and touches nothing, wherever it is; nor does such a write."""
    for offset, segments in ((0, []), (513, []), (4096, [memoryview(b"")]), (1 << 40, [])):
        file = FakeFile("M")
        held = file.lock.try_hold()
        assert held is not None
        request = DirectRequest(op, offset, segments)
        task = file.scheduler.spawn(direct_io(request, file, file, LOCKING))
        file.turn()
        assert task.done and request.result() == 0
        held.release()
        assert file.steps.log == []


# --- G03: the inode lock -----------------------------------------------------------------------------


def test_a_read_holds_the_lock_until_the_look_ups_are_done():
    """G03: lock, write back, map everything, unlock; only then is the I/O waited for."""
    file = FakeFile("MmM")
    file.line.closed = True
    at: list[tuple[str, bool]] = []
    seen = file.steps.at

    def watched(name: str) -> None:
        at.append((name, file.lock.idle))
        seen(name)

    file.steps.at = watched  # type: ignore[method-assign]
    request, memory = reading(0, 12 * KIB)
    task = file.start(request, LOCKING)
    file.turn()
    assert [name for name, _ in at] == ["write_back", "get_blocks", "get_blocks", "submit", "submit"]
    assert not any(idle for name, idle in at[:-1])
    assert not task.done and file.lock.idle and file.in_flight.value == 1
    file.line.closed = False
    file.pump(task)
    assert request.result() == 12 * KIB and memory == file.content()


def test_dirty_cached_data_is_written_back_before_it_is_read():
    """G03: the range is written back and waited for, under the lock."""
    file = FakeFile("MDM")
    expected = file.content()
    request, memory = reading(0, 12 * KIB)
    assert file.run(request, LOCKING) == 12 * KIB
    assert memory == expected
    assert file.steps.log[0] == "write_back"


def test_an_error_of_writing_back_ends_the_read():
    """G03: the lock is released, nothing was counted or mapped."""
    file = FakeFile("MM")
    file.steps.fail_at = 0
    request, _ = reading(0, 4096)
    with pytest.raises(DeviceError, match="injected"):
        file.run(request, LOCKING)
    assert file.steps.log == ["write_back"]
    file.steps.fail_at = -1
    assert file.run(reading(0, 4096)[0], LOCKING) == 4096


def test_without_the_flag_and_for_writes_the_engine_takes_no_lock():
    """G03: a write is called under the lock and returns under it; without the flag nothing is locked."""
    for op, flags in ((READ, 0), (WRITE, 0), (WRITE, LOCKING)):
        file = FakeFile("MM")
        held = file.lock.try_hold()
        assert held is not None
        request = DirectRequest(op, 0, [empty(4096)])
        task = file.scheduler.spawn(direct_io(request, file, file, flags))
        file.pump(task)
        assert request.result() == 4096
        assert not file.lock.idle and "write_back" not in file.steps.log
        held.release()


# --- G04, G18: what may be left in flight ------------------------------------------------------------


def left_in_flight(file: FakeFile, request: DirectRequest, flags: int = 0) -> bool:
    """Whether the engine returned while its bios were in flight; they are let through afterwards."""
    for line in file.lines:
        line.closed = True
    task = file.start(request, flags)
    file.turn()
    assert file.line.open, "nothing was sent"
    left = task.done
    assert not request.done.fired
    for line in file.lines:
        line.closed = False
    file.pump(task, file.scheduler.spawn(settled(request)))
    file.check_idle()
    return left


async def settled(request: DirectRequest) -> None:
    """Returns when `request` is done, well or not."""
    try:
        await request.wait()
    except Exception:
        assert request.error is not None


def test_a_write_past_the_end_is_synchronous_unless_it_may_not_be():
    """G04: the size must not be published before the data is on the device."""
    data = pattern(8192)
    for asynchronous, offset, flags, expected in (
        (False, 0, 0, False),
        (True, 0, 0, True),
        (True, 0, ASYNC_EXTEND, True),
        (True, 4096, 0, False),
        (True, 4096, LOCKING, False),
        (True, 8192, 0, False),
        (True, 4096, ASYNC_EXTEND, True),
        (True, 8192, ASYNC_EXTEND, True),
    ):
        file = FakeFile("MM")
        request = writing(offset, data, asynchronous=asynchronous)
        assert left_in_flight(file, request, flags) is expected, (asynchronous, offset, flags)
        assert request.result() == 8192
        assert file.size_bytes == max(8192, offset + 8192)
        assert file.content()[offset : offset + 8192] == data


def test_only_whole_writes_and_successful_reads_are_left_in_flight():
    """G18: what falls back, fails, or is cut by an error is waited for and answered synchronously."""
    cases: list[tuple[str, int, int, str, bool]] = [
        ("MMM", READ, 12 * KIB, "", True),
        ("MMM", READ, 16 * KIB, "", True),  # a short one, past the end of the file
        ("MMI", READ, 12 * KIB, "", True),  # a partial one
        ("MmM", WRITE, 12 * KIB, "", True),
        ("MMH", WRITE, 12 * KIB, "", False),
        ("MMI", WRITE, 12 * KIB, "", False),
        ("mmm", WRITE, 12 * KIB, "get_blocks", False),
        ("mmm", READ, 12 * KIB, "get_blocks", False),
        ("mmM", READ, 12 * KIB, "submit", False),
        ("mmM", WRITE, 12 * KIB, "submit", False),
    ]
    for letters, op, length, fails, expected in cases:
        file = FakeFile(letters)
        if fails:
            file.steps.fail_at = 3
        request = DirectRequest(op, 0, [empty(length)], asynchronous=True)
        assert left_in_flight(file, request, SKIP_HOLES) is expected, (letters, op, fails)
        assert file.steps.hit == fails


def test_a_failure_found_while_building_is_answered_synchronously():
    """G18, G14: a device error that reaping has found leaves nothing in flight, although all was mapped."""
    file = FakeFile("M" * 70, limits=dataclasses.replace(SMALL, max_bio_bytes=4096))
    file.faults[0].fail(nth=0)
    request = DirectRequest(WRITE, 0, [empty(70 * 4096)], asynchronous=True)
    file.line.closed = True
    task = file.start(request)
    file.turn()
    file.line.poll(0)
    failed = next(number for number, bio in enumerate(file.line.held) if bio.error)
    file.scheduler.dispatch([file.line.let_go(failed)])
    file.turn()
    assert not task.done and file.line.open
    file.line.closed = False
    file.pump(task)
    with pytest.raises(DeviceError):
        request.result()
    file.check_idle()


def test_a_short_asynchronous_read_leaves_nothing_locked():
    """G18, F01: it completes asynchronously as well, and the next I/O goes on."""
    for offset, length in ((0, 16 * KIB), (4096, 8192), (4096 - 512, 4096 + 1024), (8192, 4096), (12 * KIB, 4096)):
        for asynchronous, flags in itertools.product((False, True), (0, LOCKING)):
            file = FakeFile("MM", size=4096 + 100)
            request, memory = reading(offset, length, asynchronous=asynchronous)
            expected = max(0, min(length, 4196 - offset))
            assert file.run(request, flags) == expected
            assert memory[:expected] == file.content()[offset : offset + expected]
            assert file.run(writing(0, bytes(4096)), flags) == 4096


# --- G05: deferred completion ----------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("data_only", [False, True])
def test_a_synchronous_data_write_ends_with_a_sync_of_what_was_written(asynchronous, data_only):
    """G05: a deferred completion runs `end_io`, then the sync of the range, and then tells the caller."""
    file = FakeFile("MMM")
    request = writing(4096, pattern(4096), asynchronous=asynchronous, sync=True, data_only=data_only)
    assert file.run(request) == 4096
    assert file.synced == [(4096, 4096, data_only)]
    assert file.steps.log == ["get_blocks", "submit", "deferred", "end_io", "sync_written"]
    plain = FakeFile("MMM")
    assert plain.run(writing(0, pattern(4096), asynchronous=asynchronous)) == 4096
    assert plain.run(reading(0, 4096, sync=True)[0]) == 4096
    assert plain.synced == [] and plain.queues_made == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_of_the_sync_replaces_the_count(asynchronous):
    """G05, F06: the data is written, and still the caller gets the error, once."""
    file = FakeFile("MM")
    file.steps.fail_at = 4
    request = writing(0, pattern(8192), asynchronous=asynchronous, sync=True)
    with pytest.raises(DeviceError, match="injected"):
        file.run(request)
    assert file.steps.hit == "sync_written" and request.transferred == 0
    assert file.content() == pattern(8192)


def test_the_queue_is_made_once_for_many_writes():
    """G05: on first use, also when several completions come at once; each of them is completed."""
    file = FakeFile("MMMM")
    file.line.closed = True
    requests = [writing(n * 4096, pattern(4096, n), asynchronous=True, sync=True) for n in range(4)]
    tasks = [file.start(request) for request in requests]
    file.turn()
    assert file.queues_made == 0
    file.line.closed = False
    file.pump(*tasks)
    file.check_idle()
    assert [request.result() for request in requests] == [4096] * 4
    assert file.queues_made == 1 and sorted(offset for offset, _, _ in file.synced) == [0, 4096, 8192, 12288]


def test_a_mapping_can_ask_for_deferred_completion():
    """G05: `end_io` is then run by a task, not where the bio was dispatched; nothing is synced."""
    file = FakeFile("MM", defer=True)
    file.line.closed = True
    request = writing(0, pattern(8192), asynchronous=True)
    task = file.start(request)
    file.turn()
    file.line.poll(0)
    file.scheduler.dispatch([file.line.let_go(0)])
    assert file.steps.log[-1] == "deferred" and not request.done.fired and file.in_flight.value == 1
    file.pump(task)
    assert request.result() == 8192 and file.steps.log[-1] == "end_io" and file.synced == []
    file.check_idle()


# --- G06, G17: the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_end_io_then_the_count_then_the_caller(op, defer):
    """G06, G17: in this order, once, after the last bio, with what the last mapping carried."""
    file = FakeFile("MmM", defer=defer)
    file.line.closed = True
    order: list[str] = []
    end_io, down = file.end_io, file.in_flight.down

    def ended(*arguments: object) -> None:
        order.append(f"end_io count={file.in_flight.value} told={request.done.fired} open={len(file.line.open)}")
        end_io(*arguments)  # type: ignore[arg-type]

    def counted() -> None:
        order.append(f"down told={request.done.fired}")
        down()

    file.end_io = ended  # type: ignore[method-assign]
    file.in_flight.down = counted  # type: ignore[method-assign]
    request = DirectRequest(op, 0, [empty(12 * KIB)], asynchronous=True)
    task = file.start(request)
    file.turn()
    assert file.in_flight.value == 1
    file.line.poll(0)
    file.scheduler.dispatch([file.line.let_go(1)])
    file.turn()
    assert order == [] and not request.done.fired
    file.line.closed = False
    file.pump(task)
    assert order == ["end_io count=1 told=False open=0", "down told=False"]
    assert file.ended == [(0, 12 * KIB, ("private", 1))]
    assert request.done.fired


def test_a_truncate_waits_for_the_count_and_keeps_new_io_out():
    """G06: what is in flight is waited for; what comes meanwhile waits for the lock."""
    file = FakeFile("MMM")
    file.line.closed = True
    order: list[str] = []

    async def truncate() -> None:
        with await file.lock.hold():
            await file.in_flight.zero()
            order.append("truncated")
            file.size_bytes = 4096

    first, second = reading(0, 8192, asynchronous=True)[0], reading(0, 8192)[0]
    reader = file.start(first, LOCKING)
    file.turn()
    assert reader.done and not first.done.fired
    truncating = file.scheduler.spawn(truncate())
    file.turn()
    late = file.start(second, LOCKING)
    file.turn()
    assert order == [] and file.in_flight.value == 1 and not late.done
    file.line.closed = False
    file.pump(truncating, late)
    assert order == ["truncated"] and first.result() == 8192 and second.result() == 4096


def test_a_file_system_may_count_by_itself():
    """G06: with SKIP_DIO_COUNT the engine leaves the count alone."""
    file = FakeFile("MM")
    file.line.closed = True
    task = file.start(writing(0, bytes(4096)), SKIP_DIO_COUNT)
    file.turn()
    assert file.in_flight.value == 0
    file.line.closed = False
    file.pump(task)
    file.check_idle()


def test_end_io_runs_only_if_something_was_transferred():
    """G17: not for a request that fell back at once, found nothing, or failed; its error is the result."""
    for letters, op, offset in (("HM", WRITE, 0), ("IM", READ, 0), ("M", READ, 4096)):
        file = FakeFile(letters)
        assert file.run(DirectRequest(op, offset, [empty(4096)]), SKIP_HOLES) == 0
        assert file.ended == []
    file = FakeFile("MM")
    file.faults[0].fail()
    with pytest.raises(DeviceError):
        file.run(writing(0, bytes(8192)))
    assert file.ended == []
    for asynchronous in (False, True):
        file = FakeFile("MM")
        file.steps.fail_at = 2
        with pytest.raises(DeviceError, match="injected"):
            file.run(writing(0, bytes(8192), asynchronous=asynchronous))
        assert file.steps.hit == "end_io"


# --- G07: mapping -----------------------------------------------------------------------------------------


def test_the_mapper_is_asked_only_when_the_mapping_is_used_up():
    """G07: from where the last mapping ended, for at most what is left; one answer may cover everything."""
    file = FakeFile("MMMmMM")
    assert file.run(reading(4096, 5 * 4096)[0]) == 5 * 4096
    assert file.asked == [(4096, 5 * 4096, False), (3 * 4096, 3 * 4096, False)]
    file = FakeFile("M" * 6, most_blocks=2)
    assert file.run(reading(0, 6 * 4096)[0]) == 6 * 4096
    assert file.asked == [(0, 6 * 4096, False), (8192, 4 * 4096, False), (16384, 2 * 4096, False)]
    file = FakeFile("M" * 6)
    assert file.run(writing(512, pattern(1024))) == 1024
    assert file.asked == [(512, 1024, True)]


def test_blocks_are_created_by_writes_alone():
    """G07: with SKIP_HOLES only from the first block on that lies wholly past the end of the file."""
    for size in (8192, 4097, 8191):
        file = FakeFile("Hm", size=size, most_blocks=1)
        assert file.run(writing(4096, bytes(8192)), SKIP_HOLES) == 8192
        assert file.asked == [(4096, 8192, False), (8192, 4096, True)]
    file = FakeFile("M", size=4096)
    assert file.run(writing(4096, bytes(4096)), SKIP_HOLES) == 4096
    assert file.asked == [(4096, 4096, True)]
    file = FakeFile("", size=0)
    assert file.run(writing(0, bytes(4096)), SKIP_HOLES) == 4096
    assert file.asked == [(0, 4096, True)]
    file = FakeFile("HH")
    assert file.run(writing(0, bytes(4096))) == 4096
    assert file.run(reading(0, 8192)[0]) == 8192
    assert [create for _, _, create in file.asked] == [True, False, False]


def test_a_wrong_answer_does_not_become_wrong_data():
    """G07: an answer that does not cover what was asked, or has no place, is refused."""
    file = FakeFile("MMM")
    good = (ExtentKind.MAPPED, 4096, 4096, file.line, 4096)
    wrong = [
        Extent(ExtentKind.MAPPED, 8192, 4096, file.line, 4096),
        Extent(ExtentKind.MAPPED, 0, 4096, file.line, 4096),
        Extent(ExtentKind.MAPPED, 4096, 0, file.line, 4096),
        Extent(ExtentKind.MAPPED, 4096, 4096, None, 4096),
        Extent(ExtentKind.MAPPED, 4096, 4096, file.line, None),
    ]

    class Mapper:
        end_io = file.end_io
        answer = Extent(*good)

        async def get_blocks(self, *asked: object) -> Extent:
            return self.answer

    mapper = Mapper()
    for answer in wrong:
        mapper.answer = answer
        with pytest.raises(RuntimeError, match="mapper"):
            file.run(reading(4096, 4096)[0], LOCKING, mapper)
    assert file.line.bios == []
    mapper.answer = Extent(*good)
    assert file.run(reading(4096, 4096)[0], LOCKING, mapper) == 4096


# --- G08, G09: holes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letters", "reason"),
    [("MMHM", Reason.HOLE), ("MMDM", Reason.HOLE), ("MMIM", Reason.INLINE), ("MMEM", Reason.ENCODED)],
)
def test_a_write_stops_at_what_it_cannot_write_in_place(letters, reason):
    """G08: what came before counts, the rest is for the page cache, and the file has one continuous write."""
    file = FakeFile(letters)
    data = pattern(16 * KIB, 3)
    request = writing(0, data, asynchronous=True)
    assert file.run(request, SKIP_HOLES) == 8192
    assert request.fallback is reason
    assert file.content()[:8192] == data[:8192]
    assert file.ended == [(0, 8192, file.ended[0][2])]
    file.buffered_write(8192, data[8192:])
    assert file.content() == data
    first = writing(8192, data[:4096])
    file = FakeFile(letters)
    assert file.run(first, SKIP_HOLES) == 0 and first.fallback is reason
    assert file.line.bios == []


def test_the_mapper_may_refuse():
    """G08: a Fallback ends the request there, with its reason; for a read as well."""
    for op in (READ, WRITE):
        file = FakeFile("MM", most_blocks=1)

        class Mapper:
            end_io = file.end_io

            async def get_blocks(self, request: DirectRequest, offset: int, length: int, create: bool, file=file):
                if offset:
                    return Fallback(Reason.CACHED_BY_FS)
                return await file.get_blocks(request, offset, length, create)

        request = DirectRequest(op, 0, [empty(8192)])
        assert file.run(request, 0, Mapper()) == 4096
        assert request.fallback is Reason.CACHED_BY_FS


@pytest.mark.parametrize("letter", ["H", "U"])
def test_a_read_of_what_has_no_data_gives_zeroes(letter):
    """G09, F11: written by the engine, without I/O; whatever is on the device there is not looked at."""
    file = FakeFile(f"M{letter}{letter}M")
    expected = bytearray(file.content())
    request, memory = reading(512, 15 * KIB)
    assert file.run(request) == 15 * KIB
    assert memory == expected[512 : 512 + 15 * KIB] and expected[4096:12288] == bytes(8192)
    assert sum(length for _, _, length in file.line.runs) == 4096 - 512 + 4096 - 512
    alone, memory = reading(4096, 4096, asynchronous=True)
    assert file.run(alone) == 4096 and memory == bytes(4096)


def test_what_is_in_the_page_cache_only_is_not_read_as_zeroes():
    """G09: delalloc is data; where nobody has written it back, its reader is sent to the page cache."""
    file = FakeFile("MDM")
    request, memory = reading(0, 12 * KIB)
    assert file.run(request) == 4096 and request.fallback is Reason.CACHED_BY_FS
    assert memory[:4096] == file.content()[:4096]


@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4096, 4097])
@pytest.mark.parametrize("letters", ["MMMM", "HHHH", "mMmm", "UMHM"])
def test_a_read_ends_at_the_end_of_the_file(size, letters):
    """G09, F02: count = max(0, min(length, size - offset)); memory past it is as it was, and no canary is seen."""
    for offset, length, asynchronous in itertools.product(
        (0, 512, 3584, 4096, 4608, 8192), (512, 1024, 4096, 8192), (False, True)
    ):
        file = FakeFile(letters, size=size)
        request, memory = reading(offset, length, asynchronous=asynchronous)
        count = max(0, min(length, size - offset))
        assert file.run(request, LOCKING) == count
        assert memory[:count] == file.content()[offset : offset + count]
        assert memory[count:] == b"\xa5" * (length - count)
        is_cut = bool(count < length and size % 512) and letters[(size - 1) // 4096] in "Mm" and count > 0
        assert request.bounced == (Reason.END_OF_FILE if is_cut else Reason.NONE)


def test_the_last_sector_is_read_into_scattered_memory_too():
    """F02: the end of the file lies in any of the request's segments."""
    for size in (1, 700, 1024, 1500, 4000, 5000):
        file = FakeFile("MmM", size=size)
        areas = [aligned(b"\xa5" * length) for length in (512, 512, 1024, 4096, 2048)]
        assert file.run(DirectRequest(READ, 0, areas)) == size
        assert b"".join(areas) == file.content() + b"\xa5" * (8192 - size)


def test_nothing_is_mapped_past_the_end_of_the_file():
    """G09: a read there stops, after the dio block that holds the last byte."""
    file = FakeFile("MMMM", size=4097)
    assert file.run(reading(0, 16 * KIB)[0]) == 4097
    assert file.asked == [(0, 8192, False)]
    assert all(addr + length <= 4096 + 8192 for _, addr, length in file.line.runs)
    assert file.run(reading(8192, 4096)[0]) == 0 and len(file.asked) == 1


# --- G10, F10, F11: sub-block writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1024, 4096])
@pytest.mark.parametrize("unwritten", [False, True])
def test_a_new_block_that_is_written_in_part_is_zeroed_around_it(block, unwritten):
    """G10, F11: before the start and after the end, on the device, in every place where a write can lie."""
    for start, length in itertools.product(range(0, 2 * block, 512), (512, 1024, 1536, block, 2 * block)):
        file = FakeFile("HHHH", block=block, unwritten=unwritten, size=4 * block)
        data = pattern(length, start)
        assert file.run(writing(start, data)) == length
        expected = bytearray(4 * block)
        expected[start : start + length] = data
        assert file.content() == expected


@pytest.mark.parametrize("unwritten", [False, True])
def test_zeroes_go_in_one_bio_with_the_data(unwritten):
    """G10, G12: they are contiguous with it."""
    file = FakeFile("", unwritten=unwritten)
    assert file.run(writing(1024, pattern(512))) == 512
    assert file.line.runs == [(WRITE, 4096, 4096)]
    assert file.memories[0].data[4096:8192] == bytes(1024) + pattern(512) + bytes(2560)


def test_a_block_that_is_not_new_is_left_alone():
    """G10: the start is skipped, not zeroed, and so is the end."""
    file = FakeFile("MM")
    expected = bytearray(file.content())
    expected[512:1024] = pattern(512)
    assert file.run(writing(512, pattern(512))) == 512
    assert file.content() == expected
    assert file.line.runs == [(WRITE, 4096 + 512, 512)]


def test_an_unwritten_block_is_zeroed_around_a_write():
    """G10, F11, F12: converting it makes all of it readable."""
    file = FakeFile("MUUM")
    expected = bytearray(file.content())
    expected[6144:6656] = pattern(512)
    assert file.run(writing(6144, pattern(512))) == 512
    assert file.content() == expected and clean(file.content())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("unwritten", [False, True])
@pytest.mark.parametrize("halves", [((0, 512), (512, 512)), ((0, 512), (1024, 512)), ((1024, 512), (0, 512))])
def test_two_writes_into_one_new_block_both_survive(halves, unwritten, asynchronous):
    """F10: whichever bio is done first, and whoever comes first."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        store = MemoryDevice(32 * KIB, limits=SMALL, data=bytes([CANARY]) * (32 * KIB))
        device = sim.device(store=store)
        file = FakeFile("HM", block=2048, unwritten=unwritten, scheduler=sim.scheduler, devices=[device, device])
        file.memories[0] = store

        async def main() -> None:
            requests = [writing(at, pattern(size, at), asynchronous=asynchronous) for at, size in halves]
            tasks = [file.start(request, LOCKING) for request in requests]
            for task, request in zip(tasks, requests, strict=True):
                await joined(task)
                assert await request.wait() == request.length
            expected = bytearray(2048)
            for at, size in halves:
                expected[at : at + size] = pattern(size, at)
            assert file.content()[:2048] == expected

        return main()

    assert explore(scenario, max_states=400).runs > 1


@pytest.mark.parametrize("when", ["device error", "fault at completion", "fault at submission", "reported late"])
@pytest.mark.parametrize("unwritten", [False, True])
@pytest.mark.parametrize("letters", ["HHHHHHHH", "MHHMHHUU", ""])
def test_a_failed_write_never_shows_old_contents(letters, unwritten, when):
    """F11, F12, G15: at every bio in turn; new blocks hold zeroes or new data, whatever was sent of them."""
    block = 4096
    old = FakeFile(letters, block=block).content()
    data = pattern(32 * KIB - 1024, 9)
    for number in itertools.count():
        file = FakeFile(
            letters, block=block, limits=dataclasses.replace(SMALL, max_bio_bytes=4096), unwritten=unwritten
        )
        request = writing(512, data)
        if when == "fault at submission":
            count = 0
            submit = file.faults[0].submit

            def refuse(bio: Bio, submit=submit, number=number) -> None:
                nonlocal count
                count += 1
                if count == number + 1:
                    raise BufferError("it was released")
                submit(bio)

            file.faults[0].submit = refuse  # type: ignore[method-assign]
        else:
            code = errno.EIO if when == "device error" else errno.EFAULT
            file.faults[0].fail(code, nth=number, times=1, moved=512 if when == "reported late" else 0)
        try:
            file.run(request)
        except BadBufferError:
            assert when != "device error"
        except DeviceError:
            assert when == "device error"
        else:
            assert number > 3
            break
        assert clean(file.content())
        found, expected = file.content(), old.ljust(32 * KIB, b"\0")
        for at in range(0, len(found), 512):
            was, new = expected[at : at + 512], data[at - 512 : at] if at else b""
            assert found[at : at + 512] in (was, new, bytes(512))
        if when != "device error":
            assert file.run(reading(0, len(found) or 512)[0]) == len(found)


def test_a_mapping_that_fails_leaves_no_old_contents_behind_it():
    """F11, G16: new blocks that were gathered before no space was left are written."""
    file = FakeFile("HHmm", most_blocks=1)
    file.steps.fail_at = 2
    file.steps.error = NoSpaceError("injected")
    with pytest.raises(NoSpaceError):
        file.run(writing(512, pattern(8192)))
    assert file.steps.hit == "get_blocks"
    assert clean(file.content())


# --- G11: cached metadata --------------------------------------------------------------------------------------


def test_cached_copies_of_new_blocks_are_dropped_before_the_write():
    """G11: the whole of what was allocated, before anything is sent there; nothing for old blocks."""
    file = FakeFile("MHH")
    assert file.run(writing(0, pattern(10 * KIB + 512))) == 10 * KIB + 512
    new = file.places[1].addr
    assert file.forgotten == [(new, 8192)]
    log = file.steps.log
    assert log.index("forget_blocks") < [n for n, name in enumerate(log) if name == "submit"][-1]
    assert log[log.index("forget_blocks") - 1] == "get_blocks"
    file.forgotten.clear()
    assert file.run(writing(0, pattern(12 * KIB))) == 12 * KIB
    assert file.run(reading(0, 12 * KIB)[0]) == 12 * KIB
    assert file.forgotten == []


# --- G12, G13, G14: bios ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize(
    ("letters", "most_blocks", "expected"),
    [
        ("MMMM", 9, [(0, 16384)]),
        ("MMMM", 1, [(0, 16384)]),  # several mappings, contiguous on the device and in the file
        ("MMMMMM", 9, [(0, 16384), (16384, 8192)]),  # full at 16 KiB
        ("MmMM", 9, [(0, 4096), (8192, 12288)]),  # not contiguous on the device
        ("MNMN", 9, [(0, 4096), (4096, 4096)]),  # two devices
        ("MBMM", 9, [(0, 8192), (8192, 8192)]),  # a boundary
    ],
)
def test_what_is_contiguous_goes_in_one_bio(op, letters, most_blocks, expected):
    """G12: on the device and in the file; a full bio is sent, and so is what ends at a boundary."""
    file = FakeFile(letters, most_blocks=most_blocks)
    length = len(letters) * 4096
    request = DirectRequest(op, 0, [aligned(pattern(length, 1))])
    assert file.run(request) == length
    if letters != "MNMN":
        assert [(addr - 4096, size) for _, addr, size in file.line.runs] == expected
    else:
        assert [size for line in file.lines for _, _, size in line.runs] == [4096] * 4
    assert bytes(request.segments[0]) == file.content()


def test_a_gap_in_the_file_parts_bios_too():
    """G12: what is contiguous on the device alone is not merged."""
    file = FakeFile("MHM")
    request, memory = reading(0, 12 * KIB)
    assert file.run(request) == 12 * KIB and memory == file.content()
    assert file.line.runs == [(READ, 4096, 4096), (READ, 8192, 4096)]


def test_a_bio_has_no_more_segments_than_the_device_takes():
    """G12: memory in many pieces is in several bios, and each byte goes where it belongs."""
    file = FakeFile("MMMM")
    areas = [aligned(b"\xa5" * 512) for _ in range(32)]
    assert file.run(DirectRequest(READ, 0, areas)) == 16 * KIB
    assert b"".join(areas) == file.content()
    assert [len(bio.segments) for bio in file.line.bios] == [8, 8, 8, 8]


@pytest.mark.parametrize("lengths", [(512, 32 * KIB - 512), (1536, 16 * KIB, 16 * KIB - 1536), (512,) * 64])
def test_memory_stays_aligned_where_a_bio_is_full(lengths):
    """G12, F51: the device wants memory aligned more than lengths; bios are cut so that it is."""
    file = FakeFile("M" * 8, limits=dataclasses.replace(SMALL, memory_align=4096))
    areas = [aligned(b"\xa5" * length) for length in lengths]
    assert file.run(DirectRequest(READ, 0, areas)) == 32 * KIB
    assert b"".join(areas) == file.content()


def test_a_boundary_sends_what_is_gathered_before_the_next_look_up():
    """G12: the look-up will read metadata, and the device has something to do meanwhile."""
    file = FakeFile("MBMM")
    assert file.run(reading(0, 16 * KIB)[0]) == 16 * KIB
    assert file.steps.log[:4] == ["get_blocks", "submit", "get_blocks", "submit"]
    file = FakeFile("MMMM", most_blocks=2)
    assert file.run(reading(0, 16 * KIB)[0]) == 16 * KIB
    assert file.steps.log[:3] == ["get_blocks", "get_blocks", "submit"]


def test_bios_carry_the_flags_of_the_request():
    """G12: those, and no others."""
    file = FakeFile("Mm")
    assert file.run(reading(0, 8192, bio_flags=META)[0]) == 8192
    assert [bio.flags for bio in file.line.bios] == [META, META]


def test_all_bios_of_a_request_are_handed_over_at_once():
    """G13: one commit, however many look-ups there were, on every device."""
    file = FakeFile("MmNMmmNMM")
    assert file.run(reading(0, 9 * 4096)[0]) == 9 * 4096
    assert [line.batches for line in file.lines] == [[len(line.bios)] for line in file.lines]
    assert len(file.line.bios) > 3 and len(file.lines[1].bios) == 2


ONE_BLOCK = dataclasses.replace(SMALL, max_bio_bytes=4096)
FRAGMENTS = [("M", ONE_BLOCK), ("m", SMALL), ("B", SMALL), ("mB", SMALL)]


@pytest.mark.parametrize(("letters", "limits"), FRAGMENTS)
@pytest.mark.parametrize("op", [READ, WRITE])
def test_at_most_64_bios_are_in_flight_while_building(op, letters, limits):
    """G14: completed ones are reaped before more is built, in one extent and in many, with full bios or not."""
    letters = letters * (300 // len(letters))
    file = FakeFile(letters, limits=limits)
    request = DirectRequest(op, 0, [aligned(pattern(300 * 4096))])
    assert file.run(request) == 300 * 4096
    assert len(file.line.bios) >= 150 and file.line.most == 64
    assert bytes(request.segments[0]) == file.content()


@pytest.mark.parametrize(("letters", "limits"), FRAGMENTS)
def test_an_error_found_while_building_stops_it(letters, limits):
    """G14: nothing more is built or mapped; the error is the result."""
    letters = letters * (300 // len(letters))
    file = FakeFile(letters, limits=limits)
    file.faults[0].fail(nth=3)
    with pytest.raises(DeviceError):
        file.run(reading(0, 300 * 4096)[0])
    assert len(file.line.bios) == 64
    assert len(file.asked) <= 2 * 64 + 1


# --- G15: faults on the caller's memory -----------------------------------------------------------------------------


def test_a_fault_on_the_callers_memory_is_the_result():
    """G15: at submission and at completion; for a read nothing is covered."""
    file = FakeFile("MM")
    request = DirectRequest(READ, 0, [aligned(bytes(8192)).toreadonly()])
    with pytest.raises(BadBufferError):
        file.run(request)
    assert [bio.op for bio in file.line.bios] == [READ]
    file = FakeFile("MM")
    before = file.content()
    file.faults[0].fail(errno.EFAULT)
    with pytest.raises(BadBufferError):
        file.run(writing(0, pattern(8192)))
    assert file.content() == before and len(file.line.bios) == 1, "blocks that are not new are left alone"


def test_large_pieces_of_new_blocks_are_covered_whole():
    """G15: with zeroes in as many bios as the device's segments make of them."""
    total = 1 << 20
    limits = dataclasses.replace(SMALL, max_bio_bytes=total, max_segments=2)
    file = FakeFile("H" * (total // 4096), limits=limits, free=300)
    file.faults[0].fail(errno.EFAULT, nth=0)
    with pytest.raises(BadBufferError):
        file.run(writing(0, pattern(total)))
    assert file.content() == bytes(total)
    assert [length for _, _, length in file.line.runs] == [total] + [128 * KIB] * 8


@pytest.mark.parametrize("at_submission", [False, True])
def test_what_was_allocated_for_memory_that_faults_is_zeroed(at_submission):
    """G15: all of it, what was never sent too; the fault is the result, although the zeroes are written."""
    file = FakeFile("H" * 16, size=64 * KIB)
    refused = 0

    def refuse(bio: Bio) -> None:
        nonlocal refused
        if any(any(segment[:512]) for segment in bio.segments):
            refused += 1
            raise ValueError("it was released")
        submit(bio)

    submit = file.faults[0].submit
    if at_submission:
        file.faults[0].submit = refuse  # type: ignore[method-assign]
    else:
        file.faults[0].fail(errno.EFAULT, where=lambda bio: any(any(segment[:512]) for segment in bio.segments))
    with pytest.raises(BadBufferError):
        file.run(writing(1024, pattern(62 * KIB)))
    assert file.content() == bytes(64 * KIB)
    assert file.ended == []
    assert refused == (1 if at_submission else 0), "a fault stops the building"


def test_a_fault_while_zeroing_the_callers_memory_for_a_hole():
    """G15, G09: memory that cannot be written faults there too."""
    file = FakeFile("MH")
    request = DirectRequest(READ, 0, [aligned(bytes(4096)), aligned(bytes(4096)).toreadonly()])
    with pytest.raises(BadBufferError):
        file.run(request)


@pytest.mark.parametrize(("op", "letters", "size"), [(WRITE, "MH", 8192), (READ, "Mm", 8192), (READ, "MM", 5000)])
def test_memory_that_is_released_on_the_way(op, letters, size):
    """G15: while blocks are looked up, or before the last bytes are copied; new blocks are zeroed."""
    file = FakeFile(letters, size=size)
    before = file.content()
    areas = [aligned(pattern(4096)), aligned(pattern(4096))]
    request = DirectRequest(op, 0, areas)
    seen = file.steps.at
    file.line.closed = True

    def watched(name: str) -> None:
        if name == "get_blocks" and len(file.asked) == 1:
            areas[1].release()
        seen(name)

    file.steps.at = watched  # type: ignore[method-assign]
    task = file.start(request)
    file.turn()
    if size % 512:
        areas[1].release()
    file.line.closed = False
    file.pump(task)
    with pytest.raises(BadBufferError):
        request.result()
    file.check_idle()
    if op == WRITE:
        assert file.content() == pattern(4096) + bytes(4096)
    else:
        assert file.content() == before


def test_a_request_that_may_not_wait_is_not_asked_again():
    """G16: the device would have to wait; without NOWAIT it is asked again."""
    file = FakeFile("MM")
    file.faults[0].fail(errno.EAGAIN, times=1)
    assert file.run(reading(0, 8192)[0]) == 8192 and len(file.line.bios) == 2
    file.faults[0].fail(errno.EAGAIN, times=1)
    with pytest.raises(WouldBlockError):
        file.run(reading(0, 8192, bio_flags=NOWAIT)[0])
    assert len(file.line.bios) == 3


def test_a_closed_device_is_not_a_fault_of_the_memory():
    """G15, G16: ClosedError is a ValueError, but it says nothing of the buffer."""
    file = FakeFile("MM")
    file.line.close()
    with pytest.raises(ClosedError):
        file.run(reading(0, 4096)[0])


# --- G16: which error --------------------------------------------------------------------------------------------


def test_errors_come_in_their_order():
    """G16: that of mapping or building, then the first fault, then the first device error, then the count."""
    for mapping, fault, device in itertools.product((False, True), repeat=3):
        file = FakeFile("mmmmm")
        if fault:
            file.faults[0].fail(errno.EFAULT, nth=2)
        if device:
            file.faults[0].fail(errno.EIO, nth={0, 1})
            file.faults[0].fail(errno.ENODATA, nth=3)
        if mapping:
            file.steps.fail_at = 7
            file.steps.error = NoSpaceError("injected")
        request = writing(0, pattern(20 * KIB))
        try:
            assert file.run(request) == 20 * KIB
            error = 0
        except OSError as raised:
            error = raised.errno
        expected = errno.ENOSPC if mapping else errno.EFAULT if fault else errno.EIO if device else 0
        assert error == expected, (mapping, fault, device)
        assert request.transferred == (0 if error else 20 * KIB)
        assert (file.steps.hit == "get_blocks") is mapping


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_every_subset_of_bios_may_fail(op, asynchronous):
    """F06, G16: one error, the first; one completion, after the last bio; no sync hides it, no `end_io`."""
    for count in range(1, 5):
        for failing in itertools.combinations(range(4), count):
            for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
                file = FakeFile("mmmm")
                numbers = dict(zip(failing, (errno.EIO, errno.ENODATA, errno.ETIMEDOUT, errno.ENOLINK), strict=False))
                for number, code in numbers.items():
                    file.faults[0].fail(code, nth=number)
                file.line.closed = True
                request = DirectRequest(op, 0, [empty(16 * KIB)], asynchronous=asynchronous, sync=True)
                task = file.start(request)
                file.turn()
                file.line.poll(0)
                bios = {bio.addr: bio for bio in file.line.held}
                arranged = [bios[addr] for addr in sorted(bios)]
                for place, number in enumerate(order):
                    assert not request.done.fired
                    file.scheduler.dispatch([file.line.let_go(file.line.held.index(arranged[number]))])
                    file.scheduler.run_ready()
                    assert request.done.fired == (place == 3)
                file.line.closed = False
                file.pump(task)
                first = next(number for number in order if number in numbers)
                with pytest.raises(OSError) as caught:
                    request.result()
                assert caught.value.errno == numbers[first]
                assert file.ended == file.synced == []
                file.check_idle()


def test_a_result_is_there_only_at_the_end():
    """G16: asking before is a mistake of the caller's."""
    request = writing(0, bytes(512))
    with pytest.raises(RuntimeError, match="in flight"):
        request.result()


# --- G19: the submit hook ----------------------------------------------------------------------------------------


def test_the_hook_gets_every_bio_with_its_offset_in_the_file():
    """G19: also zeroes before the data, and what goes on where a bio came back short."""
    file = FakeFile("MmHM")
    hooked = Hooked(file)
    data = pattern(12 * KIB, 5)
    assert file.run(writing(512, data), 0, hooked) == 12 * KIB
    assert file.content()[512 : 512 + 12 * KIB] == data
    assert [(at, length) for at, _, length in hooked.offsets] == [
        (0 + 512, 3584),
        (4096, 4096),
        (8192, 4096),
        (12288, 512),
    ]
    file = FakeFile("HM")
    hooked = Hooked(file)
    assert file.run(writing(1024, data[:512]), 0, hooked) == 512
    assert [(at, length) for at, _, length in hooked.offsets] == [(0, 4096)]
    for op in (READ, WRITE):
        file = FakeFile("MmM")
        file.faults[0].shorten(1024, times=2)
        hooked = Hooked(file)
        request = DirectRequest(op, 0, [aligned(data)])
        assert file.run(request, 0, hooked) == 12 * KIB
        assert bytes(request.segments[0]) == file.content()
        assert len(hooked.offsets) > 2
        for at, addr, _ in hooked.offsets:
            place = file.places[at // 4096]
            assert addr == place.addr + at % 4096


def test_the_hook_may_fail():
    """G19, G20: its error is the request's."""
    file = FakeFile("MM")
    file.steps.fail_at = 1
    with pytest.raises(DeviceError, match="injected"):
        file.run(writing(0, bytes(8192)), 0, Hooked(file))
    assert file.steps.hit == "submit"


# --- G20, F01: every failure path --------------------------------------------------------------------------------


FAILING: list[tuple[str, int, int, int, bool, bool]] = [
    ("MmUHM", READ, 0, 5 * 4096, False, False),
    ("MmUHM", READ, 512, 5 * 4096, False, True),
    ("MmUHM", READ, 4096, 8 * 4096, True, False),
    ("mmHHU", WRITE, 512, 5 * 4096 - 1024, False, True),
    ("mmHHU", WRITE, 512, 6 * 4096, True, False),
    ("mmmm", WRITE, 0, 4 * 4096, False, True),
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("flags", [0, LOCKING, LOCKING | SKIP_HOLES, ASYNC_EXTEND | SKIP_DIO_COUNT])
@pytest.mark.parametrize("case", FAILING)
@pytest.mark.parametrize("error", [NoSpaceError("injected"), OSError("injected"), Cancelled(), ValueError("injected")])
def test_an_error_at_each_step_leaves_nothing_behind(case, flags, asynchronous, error):
    """G20, F01: no lock, count, bio or task is left, no canary is shown, and the next request goes through."""
    letters, op, offset, length, defer, sync = case
    for number in itertools.count():
        file = FakeFile(letters, defer=defer)
        file.steps.fail_at = number
        file.steps.error = error
        request = DirectRequest(op, offset, [aligned(pattern(length))], asynchronous=asynchronous, sync=sync)
        try:
            file.run(request, flags)
        except BaseException as raised:
            assert file.steps.hit, raised
        else:
            assert not file.steps.hit
        file.check_idle()
        if file.steps.hit not in ("forget_blocks",):
            assert clean(file.content())
        if not file.steps.hit:
            assert number > 3
            break
        file.steps.fail_at = -1
        assert file.run(reading(0, 4096)[0], flags) == 4096
        again = writing(0, pattern(4096, 2))
        assert file.run(again, flags) == 4096


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("case", FAILING)
def test_a_cancellation_at_each_wait_leaves_nothing_behind(case, asynchronous):
    """G20, F01: the caller's wait ends, the I/O does; what was given to the device is waited for."""
    letters, op, offset, length, defer, sync = case
    for turns in itertools.count():
        file = FakeFile(letters, defer=defer)
        request = DirectRequest(op, offset, [aligned(pattern(length))], asynchronous=asynchronous, sync=sync)
        task = file.start(request, LOCKING)
        for _ in range(turns):
            if file.scheduler.ready:
                file.scheduler.pick().step()
            else:
                file.scheduler.commit()
                file.scheduler.dispatch([bio for line in file.lines for bio in line.poll(0)])
        finished = task.done
        task.cancel()
        file.pump(task)
        file.check_idle()
        assert clean(file.content())
        assert file.run(reading(0, 4096)[0], LOCKING) == 4096
        if finished:
            assert turns > 3
            break


@pytest.mark.parametrize(("op", "letters"), [(READ, "mmmm"), (WRITE, "HHHH")])
def test_a_request_that_is_thrown_away_ends_quietly(op, letters):
    """G20, F24: nobody runs it again; closing the coroutine neither waits once more nor sends anything."""
    for turns in range(8):
        file = FakeFile(letters, most_blocks=1)
        coroutine = direct_io(DirectRequest(op, 0, [empty(16 * KIB)]), file, file, LOCKING)
        for _ in range(turns):
            waitable = coroutine.send(None)
            if hasattr(waitable, "fired"):
                break
        sent = len(file.line.bios)
        coroutine.close()
        assert file.lock.idle and len(file.line.bios) == sent


def test_no_lock_is_left_by_reads_around_the_end_of_the_file():
    """F01: crossing, touching and past it, aligned or not, with a failure at every mapping and bio."""
    for offset, length in ((0, 12 * KIB), (4096, 4096), (4096 + 512, 1024), (8192, 4096), (12 * KIB, 512)):
        for asynchronous, failing in itertools.product((False, True), ("", "map", "bio")):
            for number in range(3):
                file = FakeFile("Mmm", size=8192 - 100)
                if failing == "map":
                    file.steps.fail_at = 1 + 2 * number
                if failing == "bio":
                    file.faults[0].fail(nth=number)
                request, _ = reading(offset, length, asynchronous=asynchronous)
                try:
                    assert file.run(request, LOCKING) == max(0, min(length, 8092 - offset))
                except DeviceError:
                    assert failing
                file.check_idle()
                held = file.lock.try_hold()
                assert isinstance(held, Held)


# --- cost ----------------------------------------------------------------------------------------------------------


class Swallow(Filter):
    """Takes everything and moves nothing."""

    def __init__(self, size_bytes: int, limits: Limits) -> None:
        super().__init__(MemoryDevice(0, limits=limits))
        self._size = size_bytes
        self.count = 0
        self._queued: list[Bio] = []

    @property
    def size_bytes(self) -> int:
        return self._size

    def submit(self, bio: Bio) -> None:
        bio.done_bytes = bio.length
        self.count += 1
        self._queued.append(bio)

    def poll(self, timeout_ns: int) -> list[Bio]:
        finished, self._queued = self._queued, []
        return finished


@pytest.mark.parametrize("op", [READ, WRITE])
def test_cost_grows_with_extents_and_bios_not_with_bytes(op):
    """G07, G12: 4 GiB in one mapping are one look-up and as many bios as the device wants."""
    total = 4 << 30
    device = Swallow(2 * total, Limits(max_bio_bytes=64 << 20))
    file = FakeFile("", free=0, devices=[device])
    file.size_bytes = total
    asked: list[int] = []

    class Mapper:
        end_io = staticmethod(lambda *arguments: None)

        async def get_blocks(self, request: DirectRequest, offset: int, length: int, create: bool) -> Extent:
            asked.append(length)
            return Extent(ExtentKind.MAPPED, 0, total, device, total, NEW if op == WRITE else 0)

    memory = empty(64 << 20)
    request = DirectRequest(op, 0, [memory] * 64)
    assert file.run(request, 0, Mapper()) == total
    assert asked == [total] and device.count == 64


# --- everything at once -----------------------------------------------------------------------------------------------


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([READ, WRITE, WRITE]),
        st.integers(0, 40),  # offset, in sectors
        st.lists(st.integers(1, 12), min_size=1, max_size=4),  # segments, in sectors
        st.booleans(),  # asynchronous
        st.booleans(),  # sync
        st.integers(0, 15),  # flags
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=600)
@given(
    letters=st.text("MmNHUDIEB", max_size=8),
    cut=st.integers(0, 4095),
    block=st.sampled_from([1024, 4096]),
    most_blocks=st.sampled_from([1, 2, 100]),
    unwritten=st.booleans(),
    defer=st.booleans(),
    hooked=st.booleans(),
    short=st.sampled_from([0, 0, 512, 700, 2048]),
    operations=OPERATIONS,
)
def test_a_file_agrees_with_the_model(letters, cut, block, most_blocks, unwritten, defer, hooked, short, operations):
    """G01–G19, F02, F10, F11: any extents, sizes, flags and requests; what falls back is done through the cache."""
    size = max(0, len(letters) * block - cut % block) if letters else 0
    file = FakeFile(letters, size=size, block=block, most_blocks=most_blocks, unwritten=unwritten, defer=defer)
    if short:
        for faults in file.faults:
            faults.shorten(short, times=3)
    model = ModelFile(file.content())
    mapper = Hooked(file) if hooked and "N" not in letters else None
    for number, (op, sector, sizes, asynchronous, sync, flags) in enumerate(operations):
        offset, length = sector * 512, sum(sizes) * 512
        data = pattern(length, number)
        starts = [0, *itertools.accumulate(size * 512 for size in sizes)]
        areas = [aligned(data[start:end]) for start, end in itertools.pairwise(starts)]
        if op == WRITE and offset > file.size_bytes:
            file.zero_tail()
        request = DirectRequest(op, offset, areas, asynchronous=asynchronous, sync=sync)
        moved = file.run(request, flags, mapper)
        if op == READ:
            expected = model.pread(length, offset)
            if request.fallback is None:
                assert moved == len(expected)
            assert b"".join(areas) == expected[:moved] + data[moved:]
        else:
            assert request.fallback is not None or moved == length
            if moved and sync:
                assert file.synced[-1] == (offset, moved, True)
            file.buffered_write(offset + moved, data[moved:])
            model.pwrite(data, offset)
        assert file.content() == model.data
        assert clean(file.content())


@pytest.mark.parametrize("unwritten", [False, True])
def test_requests_at_once_agree_with_the_model(unwritten):
    """F10, G04, G17, G18: requests that do not overlap, within the same blocks too, done in any order."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        rng = sim.rng
        letters = "".join(rng.choices("MmHU", k=6))
        store = MemoryDevice(128 * KIB, limits=SMALL, data=bytes([CANARY]) * (128 * KIB))
        device = sim.device(store=store, faults=SimFaults(short=0.1))
        file = FakeFile(letters, block=2048, unwritten=unwritten, scheduler=sim.scheduler, devices=[device, device])
        for place in file.places:
            if place.kind is ExtentKind.MAPPED:
                store.data[place.addr : place.addr + 2048] = pattern(2048, place.addr)
        file.memories[0] = store
        model = ModelFile(file.content())
        cuts = [0, *sorted(rng.sample(range(1, 32), 6)), 32]

        async def main() -> None:
            requests = []
            for start, end in rng.sample(list(itertools.pairwise(cuts)), 7):
                options = {"asynchronous": rng.random() < 0.8, "sync": rng.random() < 0.3}
                data = pattern((end - start) * 512, start)
                model.pwrite(data, start * 512)
                requests.append(writing(start * 512, data, **options))
            tasks = [file.start(request, LOCKING) for request in requests]
            for task, request in zip(tasks, requests, strict=True):
                await joined(task)
                assert await request.wait() == request.length
            assert file.content() == model.data
            request, memory = reading(0, len(model.data))
            await joined(file.start(request, LOCKING))
            assert memory == model.data

        return main()

    assert run_seeds(range(60), scenario) == 60
