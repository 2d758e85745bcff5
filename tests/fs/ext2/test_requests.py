"""Requests that finish later and batches on a file of a volume: the same as the general way, only faster.

Rows: B07, F02, F04, F06, F08, F20, G06, G20.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.dio.kit import Watch, drive, pump
from tests.fs.ext2.interleaving_kit import prepared_image
from tests.fs.ext2.writing_kit import device_of

from odirect.base.errors import (
    AlignmentError,
    ClosedError,
    DeviceError,
    ODirectError,
    ReadOnlyError,
    WouldBlockError,
)
from odirect.block.bio import FUA, NOWAIT, READ, WRITE
from odirect.block.buffers import empty
from odirect.block.filters.fault import Faults
from odirect.dio.outcome import Kind, Promise
from odirect.dio.requests import Request
from odirect.fs.base import ACCESSES, Access
from odirect.fs.ext2.volume import open_ext2
from odirect.fs.file import NodeFile
from odirect.fs.requests import NodeRequests
from odirect.sched.scheduler import Scheduler

T = TypeVar("T")

BLOCK = 1024
SIZE = 20 * BLOCK + 700
HOLES = ((3 * BLOCK, 2 * BLOCK), (14 * BLOCK, BLOCK))
CONTENT = bytes((at // 512 * 7 + at % 251) % 200 for at in range(SIZE))


class Setting:
    """A volume over a device that can be made to fail, and its file of `SIZE` bytes with `HOLES`."""

    def __init__(self, *, warm: bool = True) -> None:
        self.memory = device_of(prepared_image(CONTENT, HOLES, BLOCK))
        self.faults = Faults(self.memory)
        self.device = Watch(self.faults)
        self.scheduler = Scheduler()
        self.scheduler.add_device(self.device)
        self.volume = self.run(
            open_ext2(
                self.device,
                name="image",
                writable=True,
                scheduler=self.scheduler,
                clock_ns=lambda: 1_700_000_000 * 10**9,
            )
        )
        self.number = self.run(self.volume.lookup(2, b"file"))
        self.file = self.open()
        self.node = self.file.node
        if warm:
            self.run(self.file.extents(0, SIZE))
        self.done: list[Request] = []

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        task = self.scheduler.spawn(coroutine)
        pump(self.scheduler, task)
        return task.result()

    def open(self, *, writable: bool = True) -> NodeFile:
        return cast(NodeFile, self.run(self.volume.open_file(self.number, writable=writable)))

    def requests(self, access: Access = "auto", flags: int = 0, file: NodeFile | None = None) -> NodeRequests:
        return NodeRequests(file or self.file, self.scheduler, access, flags, self.done.append)

    def finish(self, requests: NodeRequests, *, alone: bool = True) -> None:
        """Until none is pending; nobody is told twice. alone: nobody else is at work, so nothing may be held."""
        for _ in range(1000):
            self.scheduler.run_ready()
            if not requests.pending:
                break
            self.scheduler.commit()
            self.scheduler.dispatch(list(self.device.poll(0)))
        assert not requests.pending
        assert len(set(map(id, self.done))) == len(self.done)
        assert self.node.overwriting.value == 0
        if alone:
            assert self.node.lock.idle and self.node.allocating.idle and self.node.in_flight.value == 0

    def content(self) -> bytes:
        memory = empty(-(-self.file.size_bytes // 4096) * 4096)
        return bytes(memory[: self.run(self.file.read(0, [memory])).transferred])

    def close(self) -> None:
        self.run(self.volume.close())


def expected_content() -> bytes:
    content = bytearray(CONTENT)
    for start, length in HOLES:
        content[start : start + length] = bytes(length)
    return bytes(content)


OLD = expected_content()


def filled(length: int, value: int, shift: int = 0) -> memoryview:
    memory = empty(length + shift)[shift:]
    memory[:] = bytes([value]) * length
    return memory


# --- as the general way --------------------------------------------------------------------------


@st.composite
def transfers(draw: Callable[..., Any]) -> tuple[int, int, int, int, int]:
    """(operation, offset, length, how far from aligned the memory is, value)."""
    unit = draw(st.sampled_from((512, 512, BLOCK, 1)))
    offset = draw(st.integers(0, (SIZE + 4 * BLOCK) // unit)) * unit
    length = draw(st.integers(0, 6 * BLOCK // unit)) * unit
    return (
        draw(st.sampled_from((READ, WRITE))),
        offset,
        length,
        draw(st.sampled_from((0, 0, 0, 512, 3))),
        draw(st.integers(1, 99)),
    )


def outcome_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ODirectError as error:
        return type(error), error.errno


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(transfers(), min_size=1, max_size=8), st.sampled_from(ACCESSES), st.sampled_from((0, 0, NOWAIT, FUA)))
def test_requests_are_as_the_general_way(
    program: list[tuple[int, int, int, int, int]], access: Access, flags: int
) -> None:
    """B07: bytes, counts, errors and outcomes, whether a request was one bio or a task."""
    quick, general = Setting(), Setting()
    requests = quick.requests(access, flags)
    for op, offset, length, shift, value in program:
        one, other = filled(length, value, shift), filled(length, value, shift)
        request = requests.start(op, offset, one, "tag")
        quick.finish(requests)
        assert request.done and request.tag == "tag" and quick.done[-1] is request
        first = outcome_of(lambda request=request: (request.result(), request.outcome))  # type: ignore[misc]
        call = general.file.read if op == READ else general.file.write
        own = flags & ~FUA if op == READ else flags
        second = outcome_of(
            lambda: tuple(general.run(call(offset, [other] if length else [], access=access, flags=own)))  # noqa: B023
        )
        assert first == second
        assert one == other
        assert quick.file.size_bytes == general.file.size_bytes
    assert quick.content() == general.content()
    assert quick.volume.allocator.free_blocks == general.volume.allocator.free_blocks
    quick.close()
    general.close()


def test_what_is_simple_is_one_bio() -> None:
    """B07: an aligned transfer in one run sends one bio and nothing else, and no task is made for it."""
    setting = Setting()
    requests = setting.requests()
    for op in (READ, WRITE):
        seen = len(setting.device.seen)
        request = requests.start_now(op, 512, filled(BLOCK, 5), None)
        assert request is not None
        setting.finish(requests)
        assert len(setting.device.seen) == seen + 1
        assert request.result() == BLOCK and request.outcome is not None and request.outcome.kind is Kind.DIRECT
        assert request.outcome.promise is (Promise.NONE if op == READ else Promise.DEVICE)


def test_what_is_not_simple_is_left_to_a_task() -> None:
    """G03, F02, F20: holes, two runs, the end, cached pages, a held lock, buffered and durable requests."""
    setting = Setting()
    requests = setting.requests()

    def simple(op: int, offset: int, length: int, shift: int = 0) -> bool:
        return requests.start_now(op, offset, filled(length, 1, shift), None) is not None

    assert not simple(READ, 3 * BLOCK, BLOCK) and not simple(WRITE, 3 * BLOCK, BLOCK)
    assert not simple(READ, 2 * BLOCK, 2 * BLOCK)
    assert (
        not simple(READ, 20 * BLOCK, BLOCK)
        and not simple(WRITE, 20 * BLOCK, BLOCK)
        and not simple(READ, 40 * BLOCK, 512)
    )
    assert not simple(READ, 100, 512) and not simple(READ, 512, 100) and not simple(WRITE, 512, 512, 3)
    setting.run(setting.file.write(0, [filled(10, 1)], access="buffered"))
    assert not simple(READ, 0, BLOCK) and not simple(WRITE, 0, 512)
    held = setting.node.lock.try_hold()
    assert held is not None
    assert not simple(READ, BLOCK, BLOCK) and not simple(WRITE, BLOCK, BLOCK)
    held.release()
    assert simple(READ, BLOCK, BLOCK)
    setting.finish(requests)
    assert setting.requests("buffered").start_now(READ, BLOCK, filled(BLOCK, 1), None) is None
    assert setting.requests("auto", FUA).start_now(WRITE, BLOCK, filled(BLOCK, 1), None) is None


def test_what_is_not_known_is_looked_up() -> None:
    """What is behind an indirect block that is not cached takes a task; the next one there does not."""
    setting = Setting(warm=False)
    requests = setting.requests()
    memory = filled(BLOCK, 0)
    assert requests.start_now(READ, 16 * BLOCK, memory, None) is None
    requests.start(READ, 16 * BLOCK, memory, None)
    setting.finish(requests)
    assert memory == OLD[16 * BLOCK : 17 * BLOCK]
    assert requests.start_now(READ, 17 * BLOCK, memory, None) is not None
    setting.finish(requests)
    assert memory == OLD[17 * BLOCK : 18 * BLOCK]


# --- what devices do -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", [READ, WRITE])
def test_short_transfers_are_gone_on_with(op: int) -> None:
    """F04: every prefix that a device may do of a request; the bytes are the same, and it ends."""
    for prefix in range(0, 2 * BLOCK, 512):
        setting = Setting()
        requests = setting.requests()
        memory = filled(2 * BLOCK, 77)
        setting.faults.shorten(prefix, op=op, times=1)
        request = requests.start(op, 0, memory, None)
        setting.finish(requests)
        assert request.result() == 2 * BLOCK
        assert len(setting.faults.injected) == 1
        now = setting.content()
        assert (
            (bytes(memory), now) == (OLD[: 2 * BLOCK], OLD) if op == READ else now == bytes(memory) + OLD[2 * BLOCK :]
        )


def test_a_write_that_may_not_wait_tells_a_short_count() -> None:
    """F08: a part was written; that is the count, and nobody goes on and then says EAGAIN."""
    setting = Setting()
    requests = setting.requests(flags=NOWAIT)
    setting.faults.shorten(512, op=WRITE, times=1)
    request = requests.start(WRITE, 0, filled(2 * BLOCK, 77), None)
    setting.finish(requests)
    assert request.result() == 512
    assert setting.content() == b"M" * 512 + OLD[512:]


def _moved(setting: Setting, call: Callable[..., Any], memory: memoryview) -> int:
    """How many bytes a transfer at byte 0 has moved."""
    moved: int = setting.run(call(0, [memory])).transferred
    return moved


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EINVAL, errno.EOPNOTSUPP])
def test_errors_are_those_of_the_general_way(op: int, number: int) -> None:
    """F06: an error is told, or what is passing or a refusal is tried again; nothing stays counted."""
    answers = []
    for quick in (True, False):
        setting = Setting()
        requests = setting.requests()
        setting.faults.fail(number, op=op, times=1)
        memory = filled(BLOCK, 7)
        if quick:
            request = requests.start(op, 0, memory, None)
            setting.finish(requests)
            answers.append(outcome_of(request.result))
            assert (request.exception is None) == (request.outcome is not None)
        else:
            call = setting.file.read if op == READ else setting.file.write
            answers.append(outcome_of(functools.partial(_moved, setting, call, memory)))
        setting.close()
    if number in (errno.EINVAL, errno.EOPNOTSUPP):
        assert answers[0] == BLOCK, "a refusal is asked again, in another way"
    else:
        assert answers[0] == answers[1]


def test_an_error_that_stays_is_told_once() -> None:
    """B04, F06: every request that meets it fails, and the others do not."""
    setting = Setting()
    place = setting.node.known_place(BLOCK, BLOCK)
    setting.faults.fail(errno.EIO, within=(place, place + BLOCK))
    requests = setting.requests()
    started = [requests.start(READ, at * BLOCK, filled(BLOCK, 0), at) for at in (0, 1, 2, 6)]
    setting.finish(requests)
    assert [isinstance(request.exception, DeviceError) for request in started] == [False, True, False, False]
    assert len(setting.done) == 4


# --- beside others -------------------------------------------------------------------------------


def test_truncate_waits_for_requests() -> None:
    """G06: what was started before sees the file as it was; what is started after, the shorter one."""
    setting = Setting()
    requests = setting.requests()
    memory = [filled(BLOCK, 0) for _ in range(6)]
    before = [requests.start(READ, at * BLOCK, memory[at], None) for at in (0, 1, 2)]
    write = requests.start(WRITE, 6 * BLOCK, filled(BLOCK, 9), None)
    truncate = setting.scheduler.spawn(setting.file.truncate(BLOCK + 100))
    setting.scheduler.run_ready()
    assert not truncate.done and setting.file.size_bytes == SIZE
    after = [requests.start(READ, at * BLOCK, memory[3 + at], None) for at in (0, 1, 2)]
    setting.finish(requests, alone=False)
    pump(setting.scheduler, truncate)
    assert [request.result() for request in before] == [BLOCK] * 3 and write.result() == BLOCK
    assert memory[:3] == [OLD[at * BLOCK : (at + 1) * BLOCK] for at in (0, 1, 2)]
    assert [request.result() for request in after] == [BLOCK, 100, 0]
    assert setting.content() == OLD[: BLOCK + 100]
    setting.close()


def test_a_buffered_write_of_the_same_block_waits_for_a_request() -> None:
    """F20: the page that it changes in part must not have what was there before the request."""
    setting = Setting()
    requests = setting.requests()
    requests.start(WRITE, 0, filled(512, 9), None)
    buffered = setting.scheduler.spawn(setting.file.write(600, [filled(10, 8)], access="buffered"))
    setting.scheduler.run_ready()
    assert not setting.node.pages.is_cached(0, BLOCK), "the page is read while the request is in flight"
    setting.finish(requests, alone=False)
    pump(setting.scheduler, buffered)
    setting.run(setting.file.sync())
    assert setting.content()[:BLOCK] == b"\x09" * 512 + OLD[512:600] + b"\x08" * 10 + OLD[610:BLOCK]


def test_a_buffered_reader_beside_a_request_sees_it_afterwards() -> None:
    """F20: the page that he brought in while it was written goes with its end."""
    setting = Setting()
    requests = setting.requests()
    requests.start(WRITE, 0, filled(BLOCK, 9), None)
    memory = filled(BLOCK, 0)
    reader = setting.scheduler.spawn(setting.file.read(0, [memory], access="buffered"))
    setting.finish(requests, alone=False)
    pump(setting.scheduler, reader)
    assert setting.run(setting.file.read(0, [memory], access="buffered")).transferred == BLOCK
    assert memory == b"\x09" * BLOCK


def test_what_cannot_be_a_request() -> None:
    """B08: refused before anything is started, or told by the request."""
    setting = Setting()
    requests = setting.requests()
    for bad, raised in ((-1, ValueError), ("1", TypeError)):
        with pytest.raises(raised):
            requests.start(READ, bad, filled(512, 0), None)  # type: ignore[arg-type]
    for buffer in (object(), "text"):
        with pytest.raises(TypeError):
            requests.start(WRITE, 0, buffer, None)
    with pytest.raises((ValueError, TypeError, BufferError)):
        requests.start(READ, 0, bytes(512), None)
    assert not requests.pending and setting.node.in_flight.value == 0
    reader = setting.requests(file=setting.open(writable=False))
    refused = reader.start(WRITE, 0, filled(512, 0), None)
    setting.finish(reader)
    assert isinstance(refused.exception, ReadOnlyError)
    strict = setting.requests("strict")
    misaligned = strict.start(READ, 1, filled(512, 0), None)
    setting.finish(strict)
    assert isinstance(misaligned.exception, AlignmentError)
    setting.run(setting.file.write(0, [filled(10, 1)], access="buffered"))
    nowait = setting.requests(flags=NOWAIT)
    waits = nowait.start(READ, 0, filled(512, 0), None)
    setting.finish(nowait)
    assert isinstance(waits.exception, WouldBlockError)
    setting.run(setting.file.close())
    closed = requests.start(READ, 0, filled(512, 0), None)
    setting.finish(requests)
    assert isinstance(closed.exception, ClosedError)


def test_a_close_whose_write_back_fails_lets_go_all_the_same() -> None:
    """F30, F41, G20: the error is told, and the file is not kept: unlinked, it is freed."""
    setting = Setting()
    pins = dict(setting.volume.cache._pins)
    setting.run(setting.file.write(0, [filled(BLOCK, 8)], access="buffered"))
    setting.faults.fail(errno.EIO, op=WRITE, times=1)
    with pytest.raises(DeviceError):
        setting.run(setting.file.close())
    assert setting.volume.node(setting.number) is None
    assert sum(setting.volume.cache._pins.values()) == sum(pins.values()) - 1
    free = setting.volume.allocator.free_inodes
    setting.run(setting.volume.unlink(2, b"file"))
    assert setting.volume.allocator.free_inodes == free + 1
    setting.close()


# --- batches -------------------------------------------------------------------------------------


def places(setting: Setting, op: int, offsets: list[int], length: int) -> list[int]:
    found = setting.run(setting.file.begin_batch(op, numpy.array(offsets, numpy.int64), length))
    return found.tolist()


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_the_places_of_a_batch(op: int, warm: bool) -> None:
    """G06: where the bytes are: in whole blocks and parts of them, none for holes, two runs, ends and odd offsets."""
    for length in (512, BLOCK, 2 * BLOCK):
        setting = Setting(warm=warm)
        offsets = [*range(0, SIZE + 3 * BLOCK, 256), -512, 1 << 40]
        found = places(setting, op, offsets, length)
        for offset, addr in zip(offsets, found, strict=True):
            if addr >= 0:
                assert offset % 512 == 0 and 0 <= offset <= SIZE - length
                assert setting.memory.data[addr : addr + length] == OLD[offset : offset + length]
            else:
                blocks = range(max(offset, 0) // BLOCK, (max(offset, 0) + length - 1) // BLOCK + 1)
                hole = any(start <= block * BLOCK < start + count for start, count in HOLES for block in blocks)
                # The indirect block lies between blocks 11 and 12.
                split = any(one in blocks and one + 1 in blocks for one in _ends_of_runs(setting))
                assert offset % 512 or not 0 <= offset <= SIZE - length or hole or split, f"{offset} has a place"
        assert setting.node.in_flight.value == 1
        setting.run(setting.file.end_batch(op))
        assert setting.node.in_flight.value == 0 and setting.node.overwriting.value == 0
        setting.close()


def _ends_of_runs(setting: Setting) -> list[int]:
    """The last block of each run of the file."""
    ends = []
    for extent in drive(setting.volume.extents_of(setting.node.meta, SIZE, 0, SIZE), setting.device):  # type: ignore[attr-defined]
        ends.append((extent.offset + extent.length) // BLOCK - 1)
    return ends


def test_a_batch_sees_and_drops_what_is_cached() -> None:
    """G03, F20: dirty pages are on the device when its reads begin, and not in the cache after its writes."""
    setting = Setting()
    setting.run(setting.file.write(BLOCK, [filled(BLOCK, 8)], access="buffered"))
    (addr,) = places(setting, READ, [BLOCK], BLOCK)
    assert setting.memory.data[addr : addr + BLOCK] == b"\x08" * BLOCK
    setting.run(setting.file.end_batch(READ))
    (addr,) = places(setting, WRITE, [BLOCK], BLOCK)
    memory = filled(BLOCK, 0)
    setting.run(setting.file.read(BLOCK, [memory], access="buffered"))
    setting.memory.data[addr : addr + BLOCK] = b"\x07" * BLOCK
    setting.run(setting.file.end_batch(WRITE))
    setting.run(setting.file.read(BLOCK, [memory], access="buffered"))
    assert memory == b"\x07" * BLOCK


@pytest.mark.parametrize("op", [READ, WRITE])
def test_truncate_and_punch_wait_for_a_batch(op: int) -> None:
    """G06: its blocks stay the file's until it has ended."""
    setting = Setting()
    places(setting, op, [0, BLOCK], BLOCK)
    tasks = []
    for change in (setting.file.truncate(100), setting.file.punch(0, BLOCK)):
        task = setting.scheduler.spawn(change)
        setting.scheduler.run_ready()
        setting.scheduler.commit()
        setting.scheduler.dispatch(list(setting.device.poll(0)))
        setting.scheduler.run_ready()
        assert not task.done
        tasks.append(task)
    assert setting.volume.allocator.free_blocks == Setting().volume.allocator.free_blocks
    setting.run(setting.file.end_batch(op))
    pump(setting.scheduler, *tasks)
    assert setting.content() == bytes(100)


def test_a_batch_of_nothing() -> None:
    """An empty list, and a file without bytes, have no places; what was counted is given back."""
    setting = Setting()
    assert places(setting, READ, [], 512) == []
    setting.run(setting.file.end_batch(READ))
    setting.run(setting.file.truncate(0))
    assert places(setting, WRITE, [0, 512], 512) == [-1, -1]
    setting.run(setting.file.end_batch(WRITE))
    assert setting.node.in_flight.value == 0 and setting.node.lock.idle


def test_a_closed_or_read_only_handle_has_no_batches() -> None:
    """Nothing is counted for it."""
    setting = Setting()
    reader = setting.open(writable=False)
    with pytest.raises(ReadOnlyError):
        setting.run(reader.begin_batch(WRITE, numpy.array([0]), 512))
    setting.run(setting.file.close())
    with pytest.raises(ClosedError):
        setting.run(setting.file.begin_batch(READ, numpy.array([0]), 512))
    assert setting.node.in_flight.value == 0
