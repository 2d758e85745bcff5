"""Requests that finish later: each is completed once, with the count or the error, whatever the ring answers."""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.dio.kit import aligned, pattern, pump

from odirect.base.errors import DeviceError, NoSpaceError, StickySyncError, WouldBlockError
from odirect.block.bio import FUA, NOWAIT, READ, WRITE
from odirect.block.buffers import BufferPool, empty
from odirect.block.cached_file import CachedFileDevice
from odirect.block.device import Limits
from odirect.block.file_device import FileDevice
from odirect.block.queue import RingQueue
from odirect.dio.outcome import Kind, Outcome, Promise, Reason
from odirect.dio.plainfile import FileState, PlainFile
from odirect.dio.requests import Request, Requests
from odirect.ring.contract import FSYNC, RWF_DSYNC
from odirect.sched.scheduler import Scheduler
from odirect.testing.model import ModelFile

LIMITS = Limits(fua=True, volatile_cache=True, max_bio_bytes=8192)
SIZE = 64 << 10


class ScriptRing:
    """A ring that does what it is asked, through the page cache, or answers what the test says."""

    kind = "threads"

    def __init__(self) -> None:
        self.queued: list[tuple[int, int, Sequence[memoryview], int, int, int, object]] = []
        self.running: list[tuple[int, int, Sequence[memoryview], int, int, int, object]] = []
        #: For the next operations: None to do it, a prefix to do, or a negative errno.
        self.script: list[int | None] = []
        self.seen: list[tuple[int, int, int, int]] = []

    @property
    def in_flight(self) -> int:
        return len(self.queued) + len(self.running)

    def queue(self, *entry) -> None:
        self.queued.append(entry)

    def commit(self) -> None:
        self.running += self.queued
        self.queued = []

    def reap(self, timeout_ns: int, into: list[tuple[object, int]]) -> None:
        running, self.running = self.running, []
        into += [(entry[-1], self._answer(*entry[:-1])) for entry in running]

    def holds(self, tag: object) -> bool:
        return any(entry[-1] is tag for entry in self.queued + self.running)

    def wakeup_fd(self) -> int:
        raise AssertionError("nobody waits for a descriptor here")

    def _answer(self, op: int, fd: int, segments: Sequence[object], offset: int, length: int, flags: int) -> int:
        self.seen.append((op, offset, length, flags))
        what = self.script.pop(0) if self.script else None
        if what is not None and what < 0:
            return what
        if op == FSYNC:
            return 0
        data = memoryview(segments[0]).cast("B") if segments else memoryview(b"")  # type: ignore[arg-type]
        if len(segments) > 1:
            raise AssertionError("one buffer a request")
        data = data[:what]
        return os.preadv(fd, [data], offset) if op == READ else os.pwritev(fd, [data], offset)


class Setting:
    """A file of `SIZE` bytes, and requests on it."""

    def __init__(self, path: Path, *, flags: int = 0, limits: Limits = LIMITS, strict: bool = False) -> None:
        path.write_bytes(pattern(SIZE))
        self.path = path
        self.fd = os.open(path, os.O_RDWR)
        self.ring = ScriptRing()
        self.queue = RingQueue(self.ring)  # type: ignore[arg-type]
        self.state = FileState(limits, "the file", False)
        self.device = FileDevice(self.queue, self.fd, limits, register=False)
        self.cached = CachedFileDevice(self.fd)
        self.scheduler = Scheduler()
        self.scheduler.add_device(self.queue)
        self.scheduler.add_device(self.cached)
        self.done: list[Request] = []
        plain = PlainFile(self.state, self.device, self.cached, BufferPool(65536, 4), strict=strict)
        promise = Promise.DURABLE if flags & FUA else Promise.DEVICE
        self.requests = Requests(
            self.state,
            self.device,
            plain,
            self.scheduler,
            self.fd,
            flags,
            (Outcome(Kind.DIRECT), Outcome(Kind.DIRECT, promise=promise)),
            self.done.append,
        )
        self.plain = plain

    def start(self, op: int, offset: int, buffer: object, tag: object = None) -> Request:
        return self.requests.start(op, offset, buffer, tag)

    def finish(self) -> None:
        """Run until every request is done."""
        for _ in range(1000):
            self.scheduler.run_ready()
            if not self.requests.pending:
                assert self.requests.tasks == 0 and self.requests.order.quick.value == 0
                return
            self.scheduler.commit()
            self.scheduler.dispatch([*self.queue.poll(0), *self.cached.poll(0)])
        raise AssertionError(f"{self.requests.pending} requests are never done")

    def do(self, op: int, offset: int, buffer: object) -> Request:
        request = self.start(op, offset, buffer)
        self.finish()
        assert self.done.pop() is request and not self.done
        return request

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Setting]]:
    made: list[Setting] = []

    def build(**options) -> Setting:
        made.append(Setting(tmp_path / f"file-{len(made)}", **options))
        return made[-1]

    yield build
    for setting in made:
        os.close(setting.fd)


def test_an_aligned_request_is_one_operation(make):
    """B02, B07: it returns at once, is handed over with the next commit, and is notified once."""
    here = make()
    view = empty(4096)
    request = here.start(READ, 512, view, tag="mine")
    assert not request.done and here.ring.running == [] and len(here.ring.queued) == 1
    with pytest.raises(RuntimeError, match="still in flight"):
        request.result()
    assert "in flight" in repr(request)
    here.finish()
    assert here.done == [request] and request.tag == "mine" and request.done
    assert (request.result(), request.outcome) == (4096, Outcome(Kind.DIRECT))
    assert bytes(view) == pattern(SIZE)[512:4608] and "4096 bytes" in repr(request)
    assert here.ring.seen == [(READ, 512, 4096, 0)]


@pytest.mark.parametrize(
    ("offset", "length", "skew", "reason"),
    [
        (100, 512, 0, Reason.MISALIGNED_OFFSET),
        (0, 100, 0, Reason.MISALIGNED_LENGTH),
        (0, 512, 1, Reason.MISALIGNED_MEMORY),
        (SIZE - 512, 1024, 0, Reason.NONE),
        (SIZE, 512, 0, Reason.NONE),
        (0, 0, 0, Reason.NONE),
    ],
)
def test_what_is_not_simple_goes_the_general_way(make, offset, length, skew, reason):
    """F02, F50: the same bytes and counts, with its own outcome."""
    here, model = make(), ModelFile(pattern(SIZE))
    view = empty(length + skew)[skew:]
    request = here.do(READ, offset, view)
    assert request.result() == len(model.pread(length, offset))
    assert bytes(view[: request.result()]) == model.pread(length, offset)
    assert request.outcome is not None and request.outcome.reason is reason
    view[:] = pattern(length, 1)
    assert here.do(WRITE, offset, view).result() == model.pwrite(pattern(length, 1), offset)
    assert here.data == model.data


def test_what_cannot_be_started_is_the_callers_mistake(make):
    """B07: nothing is started, and nothing is pending."""
    here = make()
    for op, offset, buffer, error in [
        (READ, -512, empty(512), ValueError),
        (READ, 0, bytes(512), ValueError),
        (READ, 0, "text", TypeError),
        (WRITE, 0, None, TypeError),
        (WRITE, 0, memoryview(bytearray(1024))[::2], ValueError),
    ]:
        with pytest.raises(error):
            here.start(op, offset, buffer)
    here.finish()
    assert here.requests.pending == 0 and not here.done and not here.ring.seen


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("prefix", [0, 1, 511, 512, 700, 4095])
def test_a_short_answer_is_resumed(make, op, prefix):
    """F04: by the general way; same bytes, one completion."""
    here = make()
    here.ring.script = [prefix]
    view = empty(4096) if op == READ else aligned(pattern(4096, 1))
    assert here.do(op, 1024, view).result() == 4096
    assert here.data[1024:5120] == bytes(view)
    assert here.data[:1024] + here.data[5120:] == pattern(SIZE)[:1024] + pattern(SIZE)[5120:]


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN, errno.EINTR])
def test_refusals_and_interruptions_are_not_the_callers(make, op, number):
    """F50, F04: tried again, another way if need be."""
    here = make()
    here.ring.script = [-number]
    view = empty(4096) if op == READ else aligned(pattern(4096, 1))
    assert here.do(op, 1024, view).result() == 4096
    assert here.data[1024:5120] == bytes(view)


@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_kernel_that_refuses_everything(make, op):
    """F50: the page cache takes it, the outcome says so, and the ring is not asked again and again."""
    here = make()
    here.ring.script = [-errno.EINVAL] * 100
    view = empty(4096) if op == READ else aligned(pattern(4096, 1))
    for _ in range(3):
        request = here.do(op, 4096, view)
        assert request.result() == 4096
        assert request.outcome is not None and request.outcome.kind in (Kind.BUFFERED, Kind.BOUNCED)
        assert here.data[4096:8192] == bytes(view)
    if op == READ:
        assert request.outcome == Outcome(Kind.BUFFERED, Reason.REFUSED)
        assert len(here.ring.seen) < 10
    assert here.state.failed_sync is None


@pytest.mark.parametrize("op", [READ, WRITE])
def test_an_error_is_the_requests(make, op):
    """B07: kept until asked for; the next request is none the worse for it."""
    here = make()
    here.ring.script = [-errno.EIO]
    request = here.do(op, 512, empty(512))
    assert request.outcome is None and request.transferred == 0
    for _ in range(2):
        with pytest.raises(DeviceError, match="512 bytes at 512") as caught:
            request.result()
        assert caught.value.filename == "the file"
    here.ring.script = [-errno.ENOSPC]
    with pytest.raises(NoSpaceError):
        here.do(op, 512, empty(512)).result()
    assert here.do(op, 512, empty(512)).result() == 512
    # An unaligned one says for which file, too.
    here.ring.script = [-errno.EIO]
    with pytest.raises(DeviceError) as caught:
        here.do(READ, 100, empty(100)).result()
    assert caught.value.filename == "the file"


@pytest.mark.parametrize("prefix", [0, 512, 700])
def test_nowait_says_truly_how_much_it_did(make, prefix):
    """F08: a short write is told as it is, whatever would come of going on; EAGAIN means that nothing was done."""
    here = make(flags=NOWAIT)
    here.ring.script = [prefix, -errno.EAGAIN, -errno.EAGAIN]
    request = here.do(WRITE, 0, aligned(pattern(4096, 1)))
    try:
        count = request.result()
    except WouldBlockError:
        count = 0
    assert count == prefix and here.data == pattern(4096, 1)[:prefix] + pattern(SIZE)[prefix:]
    for op in (READ, WRITE):
        here.ring.script = [-errno.EAGAIN]
        with pytest.raises(WouldBlockError):
            here.do(op, 0, empty(512)).result()


def test_durable_writes_carry_the_flag_and_a_failure_stays(make):
    """B05, F41: whichever way it goes; a full disk is not a failed sync."""
    here = make(flags=FUA)
    request = here.do(WRITE, 0, empty(512))
    assert request.outcome == Outcome(Kind.DIRECT, promise=Promise.DURABLE)
    here.do(READ, 0, empty(512))
    assert here.ring.seen == [(WRITE, 0, 512, RWF_DSYNC), (READ, 0, 512, 0)]
    here.ring.script = [-errno.ENOSPC]
    with pytest.raises(NoSpaceError):
        here.do(WRITE, 0, empty(512)).result()
    assert here.do(WRITE, 0, empty(512)).result() == 512
    here.ring.script = [-errno.EIO]
    with pytest.raises(DeviceError):
        here.do(WRITE, 0, empty(512)).result()
    for offset in (0, 100):
        with pytest.raises(StickySyncError):
            here.do(WRITE, offset, empty(512)).result()
    assert here.do(READ, 0, empty(512)).result() == 512
    task = here.scheduler.spawn(here.plain.sync())
    pump(here.scheduler, task)
    assert isinstance(task.error, StickySyncError)


def test_a_merge_waits_for_what_is_on_the_ring_and_the_ring_for_merges(make):
    """A write through the page cache and a direct one never meet in a block."""
    here = make()
    data = pattern(512, 1)
    quick = here.start(WRITE, 0, aligned(data))
    merge = here.start(WRITE, 600, aligned(b"m" * 10))
    here.scheduler.run_ready()
    assert not here.cached.in_flight, "merged beside a direct write in flight"
    late = here.start(WRITE, 1024, aligned(data))
    assert len(here.ring.queued) == 1, "written directly beside a merge"
    here.finish()
    assert [request.result() for request in (quick, merge, late)] == [512, 10, 512]
    assert here.data[:1536] == data + pattern(SIZE)[512:600] + b"m" * 10 + pattern(SIZE)[610:1024] + data


def test_limits_that_tighten_hold_for_the_next_request(make):
    """F50: what another user of the file has found out."""
    here = make()
    here.state.limits = dataclasses.replace(LIMITS, read_align=4096, write_align=4096, memory_align=4096)
    request = here.do(READ, 512, empty(512))
    assert request.outcome == Outcome(Kind.BOUNCED, Reason.MISALIGNED_OFFSET)
    assert here.ring.seen == [(READ, 0, 4096, 0)]
    assert here.do(READ, 4096, empty(4096)).outcome == Outcome(Kind.DIRECT)


def test_a_file_that_changes_its_size(make):
    """F02: grown by somebody else it is simple again; cut, the count is right."""
    here = make()
    os.truncate(here.path, 2 * SIZE)
    assert here.do(READ, SIZE, empty(4096)).result() == 4096
    os.truncate(here.path, 1000)
    view = aligned(b"\xa5" * 4096)
    assert here.do(READ, 0, view).result() == 1000
    assert bytes(view[:1000]) == pattern(SIZE)[:1000]
    assert here.do(READ, 4096, view).result() == 0


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([READ, WRITE]),
        st.integers(0, 15),
        st.sampled_from([0, 0, 0, 100]),
        st.integers(0, 4),
        st.sampled_from([0, 0, 0, 33]),
        st.sampled_from([0, 0, 1]),
    ),
    max_size=12,
)
ANSWERS = st.lists(st.sampled_from([None, None, None, 0, 512, 700, -errno.EAGAIN, -errno.EIO]), max_size=30)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPERATIONS, ANSWERS)
def test_any_requests_at_once(tmp_path, operations, script):
    """B07, F01: each is done once, successful ones are exact, and nothing is pending or held at the end."""
    here = Setting(tmp_path / "file")
    here.ring.script = list(script)
    try:
        started = []
        for number, (op, block, away, blocks, more, skew) in enumerate(operations):
            length = blocks * 512 + more
            # Each has a part of the file of its own, so that its bytes are known.
            offset = (number * 8 + block % 4) * 512 + away
            memory = empty(length + skew)[skew:]
            memory[:] = pattern(length, number)
            started.append((op, offset, memory, here.start(op, offset, memory, number)))
        here.finish()
        assert sorted(request.tag for request in here.done) == list(range(len(operations)))
        for number, (op, offset, memory, request) in enumerate(started):
            if request.exception is not None:
                assert isinstance(request.exception, DeviceError)
                continue
            assert request.result() == len(memory)
            if op == READ:
                assert bytes(memory) == pattern(SIZE)[offset : offset + len(memory)]
            else:
                assert here.data[offset : offset + len(memory)] == pattern(len(memory), number)
    finally:
        os.close(here.fd)


def test_whole_transfers_are_collected_without_being_told(make):
    """B07: who has the ring for himself takes them from it; whatever is short or a task takes the scheduler."""
    here = make()
    here.requests._on_uring = True
    finished: collections.deque[Request] = collections.deque()
    data = pattern(512, 3)
    read, write = here.start(READ, 0, aligned(bytes(512))), here.start(WRITE, 1024, aligned(data))
    short = here.start(READ, 4096, aligned(bytes(1024)))
    here.queue.commit()
    here.ring.script = [None, None, 512]
    assert here.requests.collect(finished)
    assert list(finished) == [read, write] and here.done == []
    assert (read.result(), write.result(), here.requests.pending) == (512, 512, 1)
    assert here.requests.order.quick.value == 0
    assert not here.requests.collect(finished)
    here.finish()
    assert here.done == [short] and short.result() == 1024
    unaligned = here.start(READ, 5, aligned(bytes(100)))
    assert not here.requests.collect(finished)
    here.finish()
    assert here.done == [short, unaligned] and len(finished) == 2


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_handler_that_raises_as_a_request_is_queued(make, op, taken):
    """F24: it is counted if the ring has it, and not otherwise."""
    here = make()
    queue = here.requests._queue

    def interrupted(*entry):
        if taken:
            queue(*entry)
        raise KeyboardInterrupt

    here.requests._queue = interrupted
    with pytest.raises(KeyboardInterrupt):
        here.start(op, 0, aligned(bytes(512)), "it")
    assert here.requests.pending == here.ring.in_flight == taken
    assert here.requests.order.quick.value == (taken and op == WRITE)
    here.requests._queue = queue
    here.finish()
    assert [request.tag for request in here.done] == ["it"] * taken
