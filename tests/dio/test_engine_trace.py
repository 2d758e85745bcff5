"""What the engine and the paths beside it leave in a trace: complete, in causal order, also when they fail (G20)."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.dio.engine_kit import CANARY, SMALL, FakeFile, Hooked, reading, writing
from tests.dio.kit import aligned, drive, pattern
from tests.dio.test_engine import FAILING

from odirect.base import trace
from odirect.base.errors import AlignmentError, BadBufferError, DeviceError, NoSpaceError
from odirect.base.trace import Event, Tracer
from odirect.block.bio import DISCARD, FUA, NOWAIT, READ, WRITE
from odirect.block.buffers import BufferPool, empty
from odirect.block.device import Limits
from odirect.block.filters.fault import Faults
from odirect.block.memory import MemoryDevice
from odirect.dio import blockdev
from odirect.dio.engine import DioFlags, DirectRequest
from odirect.dio.outcome import Kind, Reason
from odirect.dio.plainfile import FileState, PlainFile
from odirect.sched.scheduler import Cancelled

KIB = 1 << 10
LOCKING = DioFlags.LOCKING


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    """Tracing is on, with a clock that counts."""
    yield trace.start(itertools.count().__next__)
    trace.stop()


def check(tracer: Tracer) -> list[Event]:
    """The events; raises unless each request is whole, and all that belongs to it lies within it, in order."""
    events = tracer.events
    assert not tracer.dropped
    begun: set[int] = set()
    ended: set[int] = set()
    open_now: set[tuple[int, str, object]] = set()
    for event in events:
        number, kind, _, fields = event
        assert number not in ended, f"{event} comes after the end of its request"
        if kind == "request":
            assert number not in begun
            begun.add(number)
            continue
        assert number in begun, f"{event} comes before its request"
        if kind in ("bio", "wait"):
            open_now.add((number, kind, fields[kind]))
        elif kind in ("bio_end", "wait_end"):
            name = kind.removesuffix("_end")
            open_now.remove((number, name, fields[name]))
        elif kind in ("end_io", "failed", "deferred"):
            assert not any(key[:2] == (number, "bio") for key in open_now), "it is completed before its bios"
        elif kind == "end":
            assert not any(key[0] == number for key in open_now), "it ends before its bios and waits"
            ended.add(number)
    assert begun == ended and not open_now
    return events


def kinds(tracer: Tracer) -> list[str]:
    """What happened, the waits by name."""
    return [
        f"wait: {event.fields['what']}" if event.kind == "wait" else event.kind
        for event in check(tracer)
        if event.kind != "wait_end"
    ]


def fields_of(tracer: Tracer, kind: str) -> list[dict[str, Any]]:
    return [event.fields for event in tracer.events if event.kind == kind]


# --- the engine --------------------------------------------------------------------------------------------


def test_every_step_of_a_read(tracer: Tracer) -> None:
    """Lock, write-back, mappings, bios, the wait for them, end_io and the end, with all that each knows."""
    file = FakeFile("MHm")
    request, _ = reading(0, 12 * KIB)
    assert file.run(request, LOCKING) == 12 * KIB
    assert kinds(tracer) == [
        "request",
        "wait: lock",
        "wait: write back",
        *("wait: mapping", "extent"),
        *("wait: mapping", "extent"),
        *("wait: mapping", "extent"),
        "bio",
        "bio",
        "wait: the rest",
        *("bio_end", "bio_end"),
        "end_io",
        "end",
    ]
    places = [place.addr for place in file.places]
    assert fields_of(tracer, "request") == [
        {"op": "read", "via": "engine", "offset": 0, "length": 12 * KIB, "flags": "LOCKING"}
    ]
    assert fields_of(tracer, "extent") == [
        {"extent": "mapped", "offset": 0, "length": 4096, "addr": places[0], "flags": ""},
        {"extent": "hole", "offset": 4096, "length": 4096, "addr": None, "flags": ""},
        {"extent": "mapped", "offset": 8192, "length": 4096, "addr": places[2], "flags": ""},
    ]
    assert fields_of(tracer, "bio") == [
        {"bio": 1, "op": "read", "addr": places[0], "length": 4096, "flags": ""},
        {"bio": 2, "op": "read", "addr": places[2], "length": 4096, "flags": ""},
    ]
    assert fields_of(tracer, "bio_end") == [{"bio": n, "error": "", "done": 4096} for n in (1, 2)]
    assert fields_of(tracer, "end_io") == [{"transferred": 12 * KIB}]
    assert fields_of(tracer, "end") == [{"transferred": 12 * KIB, "outcome": "direct", "error": ""}]


def test_a_write_that_allocates_and_must_be_durable(tracer: Tracer) -> None:
    """G05: new blocks, and a deferred completion that waits for the sync."""
    file = FakeFile("MH")
    assert file.run(writing(0, pattern(8192), sync=True, bio_flags=FUA)) == 8192
    happened = kinds(tracer)
    assert happened[-5:] == ["bio_end", "deferred", "end_io", "wait: sync", "end"]
    assert [fields["flags"] for fields in fields_of(tracer, "extent")] == ["", "new"]
    assert {fields["flags"] for fields in fields_of(tracer, "bio")} == {"fua"}


def test_a_request_that_is_left_in_flight(tracer: Tracer) -> None:
    """G18: it is said when, and with how many bios; the end comes with the last of them."""
    file = FakeFile("mm")
    request, _ = reading(0, 8192, asynchronous=True)
    assert file.run(request) == 8192
    assert kinds(tracer)[-5:] == ["left", "bio_end", "bio_end", "end_io", "end"]
    assert fields_of(tracer, "left") == [{"bios": 2}]


def test_the_wait_for_room(tracer: Tracer) -> None:
    """G14: a request of more than 64 bios waits for room while it is built."""
    file = FakeFile("m" * 70)
    request, _ = reading(0, 70 * 4096)
    assert file.run(request) == 70 * 4096
    happened = kinds(tracer)
    assert happened.index("wait: room") < len(happened) - 1 - happened[::-1].index("bio")
    assert happened.count("bio") == happened.count("bio_end") == 70
    assert file.line.most <= 64


@pytest.mark.parametrize(
    ("letters", "op", "reason"),
    [("MD", READ, Reason.CACHED_BY_FS), ("MI", READ, Reason.INLINE), ("ME", WRITE, Reason.ENCODED)],
)
def test_a_fallback_says_where_and_why(letters: str, op: int, reason: Reason, tracer: Tracer) -> None:
    """G08: what goes direct counts, and the rest is for another way."""
    file = FakeFile(letters)
    request = DirectRequest(op, 0, [empty(8192)])
    assert file.run(request) == 4096
    check(tracer)
    assert fields_of(tracer, "fallback") == [{"reason": reason.value, "offset": 4096}]
    assert fields_of(tracer, "end")[0]["outcome"] == f"direct, up to: {reason.value}"


def test_the_last_sector_bounces(tracer: Tracer) -> None:
    file = FakeFile("M", size=1000)
    assert file.run(reading(0, 4096)[0]) == 1000
    assert fields_of(tracer, "end")[0]["outcome"] == "bounced (end of file)"


def test_a_misaligned_request_ends_at_once(tracer: Tracer) -> None:
    """G01: the refusal is in the trace, and nothing else."""
    file = FakeFile("M")
    with pytest.raises(AlignmentError):
        file.run(reading(1, 512)[0], LOCKING)
    assert kinds(tracer) == ["request", "end"]
    assert fields_of(tracer, "end")[0]["error"].startswith("AlignmentError: ")


def test_a_mapper_that_is_told_of_failures(tracer: Tracer) -> None:
    """`failed` is there instead of `end_io`."""

    class Told(FakeFile):
        failures = 0

        def failed(self, request: DirectRequest) -> None:
            self.failures += 1

    file = Told("MM")
    file.faults[0].fail(nth=0)
    with pytest.raises(DeviceError):
        file.run(reading(0, 8192)[0])
    assert kinds(tracer)[-3:] == ["bio_end", "failed", "end"] and file.failures == 1
    assert fields_of(tracer, "bio_end")[0]["error"] == f"errno {errno.EIO}"


def test_a_hook_sees_the_same_bios(tracer: Tracer) -> None:
    """G19: the mapper's own submit changes nothing of what is recorded."""
    file = FakeFile("mm")
    hook = Hooked(file)
    assert file.run(reading(0, 8192)[0], 0, hook) == 8192
    check(tracer)
    sent = [(fields["addr"], fields["length"]) for fields in fields_of(tracer, "bio")]
    assert sent == [(addr, length) for _, addr, length in hook.offsets]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("flags", [0, LOCKING])
@pytest.mark.parametrize("case", FAILING)
@pytest.mark.parametrize("error", [NoSpaceError("injected"), Cancelled(), ValueError("injected")])
def test_a_trace_is_whole_whatever_fails(
    case: tuple[str, int, int, int, bool, bool],
    flags: int,
    asynchronous: bool,
    error: BaseException,
    tracer: Tracer,
) -> None:
    """G20: a failure at each step in turn; everything has its end, and bios are those of the device."""
    letters, op, offset, length, defer, sync = case
    for number in itertools.count():
        trace.stop()
        tracer = trace.start(itertools.count().__next__)
        file = FakeFile(letters, defer=defer)
        file.steps.fail_at = number
        file.steps.error = error
        request = DirectRequest(op, offset, [aligned(pattern(length))], asynchronous=asynchronous, sync=sync)
        try:
            moved = file.run(request, flags)
        except BaseException as raised:
            assert file.steps.hit, raised
            assert fields_of(tracer, "end")[0]["error"] == trace.described(raised)
        else:
            assert fields_of(tracer, "end")[0]["transferred"] == moved
        check(tracer)
        file.check_idle()
        refused = {fields["bio"] for fields in fields_of(tracer, "bio_end") if "injected" in fields["error"]}
        refused |= {fields["bio"] for fields in fields_of(tracer, "bio_end") if "Cancelled" in fields["error"]}
        sent = [fields for fields in fields_of(tracer, "bio") if fields["bio"] not in refused]
        ops = ("read", "write")
        assert [(ops.index(fields["op"]), fields["addr"], fields["length"]) for fields in sent] == file.line.runs
        assert len(refused) == (file.steps.hit == "submit")
        if not file.steps.hit:
            assert number > 3
            break


@pytest.mark.parametrize("case", FAILING)
def test_a_trace_is_whole_whichever_bio_fails(case: tuple[str, int, int, int, bool, bool], tracer: Tracer) -> None:
    """G20: the device fails each bio in turn; new blocks are covered with zeroes, by bios that are recorded too."""
    letters, op, offset, length, defer, sync = case
    for number in itertools.count():
        trace.stop()
        tracer = trace.start(itertools.count().__next__)
        file = FakeFile(letters, defer=defer)
        file.faults[0].fail(nth=number)
        failed = False
        try:
            file.run(DirectRequest(op, offset, [aligned(pattern(length))], sync=sync))
        except DeviceError:
            failed = True
        check(tracer)
        errors = [fields["error"] for fields in fields_of(tracer, "bio_end")]
        assert errors.count(f"errno {errno.EIO}") == failed
        assert len(errors) == len(file.line.bios)
        assert bytes([CANARY]) * 16 not in file.content()
        if not failed:
            assert number
            break


@pytest.mark.parametrize("case", FAILING)
def test_a_trace_is_whole_after_a_cancellation(case: tuple[str, int, int, int, bool, bool], tracer: Tracer) -> None:
    """G20: whenever the caller is cancelled."""
    letters, op, offset, length, defer, sync = case
    for turns in itertools.count():
        trace.stop()
        tracer = trace.start(itertools.count().__next__)
        file = FakeFile(letters, defer=defer)
        request = DirectRequest(op, offset, [aligned(pattern(length))], sync=sync)
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
        check(tracer)
        assert len(fields_of(tracer, "bio")) == len(file.line.bios)
        if finished:
            assert turns > 3
            break


@pytest.mark.parametrize("case", FAILING)
def test_tracing_changes_nothing(case: tuple[str, int, int, int, bool, bool]) -> None:
    """The same bios, bytes and steps with it and without."""
    letters, op, offset, length, defer, sync = case
    seen = []
    for on in (False, True):
        if on:
            trace.start(itertools.count().__next__)
        try:
            file = FakeFile(letters, defer=defer)
            memory = aligned(pattern(length, 3))
            moved = file.run(DirectRequest(op, offset, [memory], sync=sync), LOCKING)
            seen.append((moved, bytes(memory), file.content(), file.line.runs, file.steps.log))
        finally:
            trace.stop()
    assert seen[0] == seen[1]


def test_switched_on_and_off_in_the_middle() -> None:
    """A request that began before is not in it; one that goes on after it is there with what was seen of it."""
    file = FakeFile("mmmm", most_blocks=1)
    task = file.start(reading(0, 16 * KIB)[0], LOCKING)
    file.scheduler.pick().step()
    tracer = trace.start(itertools.count().__next__)
    file.pump(task)
    assert tracer.events == []
    task = file.start(reading(0, 16 * KIB)[0], LOCKING)
    file.turn()
    trace.stop()
    file.pump(task)
    file.check_idle()
    happened = [event.kind for event in tracer.events]
    assert happened[0] == "request" and "end" not in happened
    assert happened.count("bio") == happened.count("bio_end") == 4


# --- block devices and plain files -------------------------------------------------------------------------


def device(size: int = 1 << 20, **limits: Any) -> MemoryDevice:
    return MemoryDevice(size, limits=Limits(**{"max_bio_bytes": 16 << 10, "queue_depth": 4, "fua": False, **limits}))


def test_a_transfer_of_one_bio(tracer: Tracer) -> None:
    memory = device()
    assert drive(blockdev.transfer(memory, WRITE, 512, [empty(4096)], 4096, flags=FUA), memory) == 4096
    assert kinds(tracer) == ["request", "bio", "bio_end", "bio", "bio_end", "end"]
    assert [fields["op"] for fields in fields_of(tracer, "bio")] == ["write", "flush"]  # B05: no FUA, so a flush
    assert fields_of(tracer, "request")[0] == {
        "op": "write",
        "via": "device",
        "offset": 512,
        "length": 4096,
        "flags": "fua",
    }
    assert fields_of(tracer, "end") == [{"transferred": 4096, "outcome": "direct", "error": ""}]


@pytest.mark.parametrize("flags", [0, NOWAIT])
def test_a_transfer_of_several_bios(flags: int, tracer: Tracer) -> None:
    memory = device()
    assert drive(blockdev.transfer(memory, READ, 0, [empty(128 * KIB)], 128 * KIB, flags=flags), memory) == 128 * KIB
    happened = kinds(tracer)
    assert happened.count("bio") == happened.count("bio_end") == 8
    assert ("wait: room" in happened) == ("wait: the rest" in happened) == (not flags)


@pytest.mark.parametrize("how", ["first", "third", "short", "submit", "misaligned"])
def test_a_transfer_that_fails(how: str, tracer: Tracer) -> None:
    """B04: its request has an end, and every bio too."""
    memory = device()
    faults = Faults(memory)
    size = 64 * KIB
    segments = [empty(size)]
    if how in ("first", "third"):
        faults.fail(nth=0 if how == "first" else 2)
    if how == "short":
        faults.shorten(512, nth=0)
    if how == "submit":
        segments = [segments[0].toreadonly()]
    offset = 1 if how == "misaligned" else 0
    call = blockdev.transfer(faults, READ, offset, segments, size)
    if how == "short":
        assert drive(call, faults) == size
        assert len(fields_of(tracer, "bio")) == 5
    else:
        with pytest.raises((DeviceError, AlignmentError, BadBufferError)) as caught:
            drive(call, faults)
        assert fields_of(tracer, "end")[0]["error"] == trace.described(caught.value)
    check(tracer)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("flush", lambda to: blockdev.flush(to)),
        ("discard", lambda to: blockdev.change_range(to, DISCARD, 0, 4096)),
    ],
)
def test_what_carries_no_data(op: str, call: Callable[[Any], Any], fails: bool, tracer: Tracer) -> None:
    faults = Faults(device(discard=True))
    if fails:
        faults.fail()
        with pytest.raises(DeviceError):
            drive(call(faults), faults)
    else:
        drive(call(faults), faults)
    assert kinds(tracer) == ["request", "bio", "bio_end", "end"]
    assert fields_of(tracer, "request")[0]["op"] == op
    assert bool(fields_of(tracer, "end")[0]["error"]) == fails


def plain_file(memory: Any, cached: Any = None, **options: Any) -> PlainFile:
    state = FileState(memory.limits, b"/a\xff", True)
    return PlainFile(state, memory, cached or memory, BufferPool(1 << 20, 4), **options)


def test_a_bounced_write_is_one_request(tracer: Tracer) -> None:
    """Head, body and tail, their locks and buffers, all under the request that the file was given."""
    memory = device(read_align=512, write_align=512)
    twin = device(read_align=1, write_align=1, memory_align=1)
    file = plain_file(memory, twin)
    data = aligned(pattern(9000))
    moved = drive(file.write(100, [data], 9000), memory, twin)
    assert moved.transferred == 9000
    check(tracer)
    (request,) = fields_of(tracer, "request")
    assert (request["op"], request["via"], request["file"]) == ("write", "file", "/a\udcff")
    assert {fields["reason"] for fields in fields_of(tracer, "bounce")} == {"misaligned offset"}
    assert {"lock", "buffer"} <= {fields["what"] for fields in fields_of(tracer, "wait")}
    assert sum(fields["length"] for fields in fields_of(tracer, "bio")) == 9000
    assert fields_of(tracer, "end") == [{"transferred": 9000, "outcome": str(moved.outcome), "error": ""}]


def test_a_bounced_read_is_one_request(tracer: Tracer) -> None:
    memory = device()
    moved = drive(plain_file(memory).read(1, [empty(100)], 100), memory)
    assert moved.outcome.kind is Kind.BOUNCED
    check(tracer)
    assert fields_of(tracer, "bounce") == [{"reason": "misaligned offset", "offset": 1, "length": 100}]
    assert len(fields_of(tracer, "request")) == len(fields_of(tracer, "bio")) == 1


@pytest.mark.parametrize("op", [READ, WRITE])
def test_what_the_kernel_refuses(op: int, tracer: Tracer) -> None:
    """F50: each refusal, and the fallback, with the bios of both ways under one request."""
    faults, twin = Faults(device()), device()
    faults.fail(errno.EINVAL, times=1000)
    file = plain_file(faults, twin)
    call = file.read if op == READ else file.write
    moved = drive(call(0, [empty(1 << 17)], 1 << 17), faults, twin)
    assert moved.outcome.kind is Kind.BUFFERED and moved.transferred == 1 << 17
    happened = kinds(tracer)
    assert happened.count("request") == 1
    assert happened.index("refused") < happened.index("fallback")
    assert fields_of(tracer, "fallback") == [{"reason": "refused by the kernel", "offset": 0}]


def test_a_file_that_fails(tracer: Tracer) -> None:
    faults = Faults(device())
    faults.fail(nth=0)
    with pytest.raises(DeviceError) as caught:
        drive(plain_file(faults).read(0, [empty(4096)], 4096), faults)
    assert kinds(tracer) == ["request", "bio", "bio_end", "end"]
    assert fields_of(tracer, "end")[0]["error"] == trace.described(caught.value)


def test_a_full_trace_keeps_working() -> None:
    """What finds no room is counted, requests go through all the same, and what is there is whole."""
    tracer = trace.start(itertools.count().__next__, 10)
    try:
        memory, twin = device(), device(read_align=1, write_align=1, memory_align=1)
        file = plain_file(memory, twin)
        for _ in range(20):
            assert drive(file.write(1, [empty(600)], 600), memory, twin).transferred == 600
            assert FakeFile("mm", limits=SMALL).run(reading(0, 8192)[0], LOCKING) == 8192
    finally:
        trace.stop()
    assert len(tracer.events) <= 10 and tracer.dropped > 20
    happened = [event.kind for event in tracer.events]
    for begin, end in (("request", "end"), ("bio", "bio_end"), ("wait", "wait_end")):
        assert happened.count(begin) == happened.count(end)
