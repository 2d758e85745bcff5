"""The recorder: whole requests, bios and waits only, bounded, in order, and nothing at all while it is off."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odirect.base import trace, trace_export
from odirect.base.errors import DeviceError
from odirect.block.bio import FUA, NOWAIT, READ, WRITE, Bio, BioFlags, Op


class Ticks:
    """A clock that goes on by 1000 ns whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1000
        return self.now


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    trace.stop()


def run(coroutine: Any) -> Any:
    """What a coroutine that never suspends returns."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it suspended")


# --- off, on ------------------------------------------------------------------------------------------


def test_off_it_is_not_there() -> None:
    """Nothing is kept, nothing is wrapped, and numbers are those of no request."""
    assert trace.active is None
    bio, answer = Bio(READ, 0), object()
    assert trace.begin(None, "file", READ, 0, 1) == -1
    assert trace.wait(1, "lock") == 0
    trace.sent(1, bio)
    trace.not_taken(bio, DeviceError("no"))
    trace.emit(1, "left")
    trace.end(1, 1)
    trace.waited(0)
    assert bio.end is None
    assert trace.waiting(answer, 1, "lock") is answer  # type: ignore[arg-type, comparison-overlap]
    assert trace.stop() is None


def test_one_at_a_time() -> None:
    tracer = trace.start(Ticks())
    assert trace.active is tracer
    with pytest.raises(RuntimeError, match="already"):
        trace.start(Ticks())
    assert trace.stop() is tracer and trace.active is None
    with pytest.raises(ValueError, match="holds no request"):
        trace.start(Ticks(), limit=1)
    assert trace.active is None


def test_names_are_those_of_the_bios() -> None:
    """The room below the bios numbers operations and flags as they do."""
    assert [op.name.lower() for op in Op] == list(trace.OPERATIONS)
    assert [flag.name.lower() for flag in BioFlags if flag and flag.name] == list(trace.FLAGS)
    assert trace.flags_of(FUA | NOWAIT) == "fua nowait" and trace.flags_of(0) == ""


def test_what_a_request_leaves() -> None:
    """Each event has its request, its time and its fields."""
    tracer = trace.start(Ticks())
    key = object()
    assert trace.begin(key, "engine", WRITE, 512, 1024, "LOCKING") == 1
    number = trace.begin(None, "file", READ, 0, 10, FUA, file="name")
    trace.emit(key, "extent", extent="hole", offset=0)
    wait = trace.wait(number, "lock")
    trace.waited(wait)
    trace.waited(wait)
    trace.end(number, 10, outcome="direct")
    trace.end(key, 0, DeviceError("it failed"))
    trace.emit(key, "late")
    assert [tuple(event) for event in tracer.events] == [
        (
            1,
            "request",
            1000,
            {"op": "write", "via": "engine", "offset": 512, "length": 1024, "flags": "LOCKING"},
        ),
        (
            2,
            "request",
            2000,
            {"op": "read", "via": "file", "offset": 0, "length": 10, "flags": "fua", "file": "name"},
        ),
        (1, "extent", 3000, {"extent": "hole", "offset": 0}),
        (2, "wait", 4000, {"wait": 1, "what": "lock"}),
        (2, "wait_end", 5000, {"wait": 1}),
        (2, "end", 6000, {"transferred": 10, "outcome": "direct", "error": ""}),
        (1, "end", 7000, {"transferred": 0, "outcome": "", "error": "DeviceError: it failed"}),
    ]
    assert tracer.dropped == 0


def test_a_bio_ends_in_the_trace_first() -> None:
    """Whoever sent it is still told, once, and a trace that was stopped meanwhile has its end all the same."""
    tracer = trace.start(Ticks())
    number = trace.begin(None, "device", READ, 0, 4096)
    told: list[tuple[Bio, int]] = []

    def end(bio: Bio) -> None:
        told.append((bio, len(tracer.events)))

    bio, lonely, refused = Bio(READ, 4096, (), 4096, FUA, end), Bio(READ, 0), Bio(READ, 8192)
    for one in (bio, lonely, refused):
        trace.sent(number, one)
    trace.not_taken(refused, ValueError("released"))
    trace.stop()
    bio.error, bio.done_bytes = 5, 512
    for one in (bio, lonely):
        assert one.end is not None
        one.end(one)
    assert told == [(bio, 6)]
    assert tracer.events[1].fields == {"bio": 1, "op": "read", "addr": 4096, "length": 4096, "flags": "fua"}
    assert [event.fields for event in tracer.events if event.kind == "bio_end"] == [
        {"bio": 3, "error": "ValueError: released", "done": 0},
        {"bio": 1, "error": "errno 5", "done": 512},
        {"bio": 2, "error": "", "done": 0},
    ]


def test_who_began_before_is_not_heard() -> None:
    """Neither counted nor kept: only whole requests are shown."""
    tracer = trace.start(Ticks())
    bio = Bio(READ, 0)
    for key in (0, -1, object()):
        trace.sent(key, bio)
        trace.emit(key, "left")
        assert trace.wait(key, "lock") == 0
        trace.end(key)
    assert tracer.events == [] and tracer.dropped == 0 and bio.end is None


def test_a_wait_ends_however_it_ends() -> None:
    tracer = trace.start(Ticks())
    number = trace.begin(None, "device", READ, 0, 4096)

    async def answer() -> int:
        return 7

    async def fault() -> int:
        raise DeviceError("no")

    assert run(trace.waiting(answer(), number, "mapping")) == 7
    with pytest.raises(DeviceError):
        run(trace.waiting(fault(), number, "mapping"))
    assert [event.kind for event in tracer.events] == ["request", "wait", "wait_end", "wait", "wait_end"]


# --- what may happen in any order: bounded, and always whole ------------------------------------------

STEPS = st.lists(st.tuples(st.sampled_from(["begin", "sent", "wait", "emit", "back", "waited", "end"]), st.integers(0)))


def played(steps: list[tuple[str, int]], limit: int) -> tuple[trace.Tracer, int]:
    """A trace of these steps, and how many were asked for that begin something or stand alone."""
    tracer = trace.start(Ticks(), limit)
    requests: list[int] = []
    bios: list[Bio] = []
    waits: list[int] = []
    asked = 0

    def one(name: str, choice: int) -> None:
        nonlocal asked
        if name == "begin":
            asked += 1
            requests.append(trace.begin(None, "device", READ, choice, 1))
        elif name == "back" and bios:
            bio = bios.pop(choice % len(bios))
            if bio.end is not None:
                bio.end(bio)
        elif name == "waited" and waits:
            trace.waited(waits.pop(choice % len(waits)))
        elif name in ("sent", "wait", "emit", "end") and requests:
            number = requests[choice % len(requests)]
            if name == "end":
                requests.remove(number)
                trace.end(number, 1)
                return
            asked += 1
            if name == "emit":
                trace.emit(number, "note", choice=choice)
            elif name == "wait":
                waits.append(trace.wait(number, "lock"))
            else:
                bios.append(Bio(READ, choice))
                trace.sent(number, bios[-1])

    for name, choice in steps:
        one(name, choice)
    trace.stop()
    return tracer, asked


@given(STEPS, st.integers(2, 40))
def test_a_full_trace_is_whole(steps: list[tuple[str, int]], limit: int) -> None:
    """At most `limit` events; no end without its beginning; everything else is in it or counted as dropped."""
    tracer, asked = played(steps, limit)
    events = tracer.events
    assert len(events) <= limit
    open_now = set()
    for event in events:
        name = {"request": "request", "end": "request"}.get(event.kind, event.kind.removesuffix("_end"))
        key = (name, event.request if name == "request" else event.fields.get(name))
        if event.kind in ("request", "bio", "wait"):
            assert key not in open_now
            open_now.add(key)
        elif event.kind != "note":
            open_now.remove(key)
    begun = sum(event.kind in ("request", "bio", "wait", "note") for event in events)
    assert begun + tracer.dropped == asked
    assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)


def test_several_threads() -> None:
    """Events of all, each whole, with times that never go back."""
    tracer = trace.start(Ticks(), 1000)

    def work() -> None:
        for _ in range(100):
            number = trace.begin(None, "device", READ, 0, 1)
            trace.waited(trace.wait(number, "lock"))
            trace.end(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = tracer.events
    assert len(events) + 2 >= 1000 and tracer.dropped >= 1
    assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)
    kinds = [event.kind for event in events]
    assert kinds.count("request") == kinds.count("end") and kinds.count("wait") == kinds.count("wait_end")


# --- exports -------------------------------------------------------------------------------------------


@given(STEPS, st.integers(2, 40))
def test_json_lines(steps: list[tuple[str, int]], limit: int) -> None:
    """A line for each event; the last says what found no room."""
    tracer, _ = played(steps, limit)
    lines = [json.loads(line) for line in trace_export.json_lines(tracer)]
    if tracer.dropped:
        assert lines.pop() == {"request": 0, "kind": "dropped", "events": tracer.dropped, "limit": limit}
    assert [(line.pop("request"), line.pop("kind"), line.pop("time_ns"), line) for line in lines] == [
        tuple(event) for event in tracer.events
    ]


def pairs(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(begin, end) of every pair; each row has one thing at a time."""
    open_now: dict[int, dict[str, Any]] = {}
    found = []
    for event in events:
        if event["ph"] == "B":
            assert event["tid"] not in open_now, "two overlap on a row"
            open_now[event["tid"]] = event
        elif event["ph"] == "E":
            begun = open_now.pop(event["tid"])
            assert begun["ts"] <= event["ts"]
            found.append((begun, event))
    assert not open_now
    return found


@given(STEPS, st.integers(2, 60))
def test_perfetto(steps: list[tuple[str, int]], limit: int) -> None:
    """Every request, bio and wait is one pair on a row of its own; rows have names, and times go forward."""
    tracer, _ = played(steps, limit)
    whole = json.loads("".join(trace_export.perfetto(tracer, "odirect cp")))
    events = whole["traceEvents"]
    begun = [event for event in tracer.events if event.kind in ("request", "bio", "wait")]
    matched = pairs(events)
    assert len(matched) == len(begun)
    assert sum(event["ph"] == "i" for event in events) == sum(event.kind == "note" for event in tracer.events)
    finished = sum(not end["args"].get("unfinished") for _, end in matched)
    assert finished == sum(event.kind in ("end", "bio_end", "wait_end") for event in tracer.events)
    named = [event["tid"] for event in events if event.get("name") == "thread_name"] if events else []
    assert len(named) == len(set(named)) and set(named) == {event["tid"] for event in events if event["ph"] in "BEi"}
    times = [event["ts"] for event in events if event["ph"] in "BEi"]
    assert times == sorted(times)
    assert whole["otherData"] == {"dropped events": tracer.dropped}


def test_rows_are_used_again() -> None:
    """Requests one after the other share a row; those at once do not, and bios lie below theirs."""
    tracer = trace.start(Ticks())
    for _ in range(3):
        one, other = (trace.begin(None, "device", READ, 0, 8) for _ in range(2))
        bios = [Bio(READ, 0), Bio(READ, 4)]
        for bio in bios:
            trace.sent(one, bio)
        for bio in bios:
            assert bio.end is not None
            bio.end(bio)
        trace.end(one)
        trace.end(other)
    events = json.loads("".join(trace_export.perfetto(tracer, "x")))["traceEvents"]
    names = [event["args"]["name"] for event in events if event.get("name") == "thread_name"]
    assert names == ["requests 1", "requests 2", "requests 1: bios and waits 1", "requests 1: bios and waits 2"]
    assert {begin["name"] for begin, _ in pairs(events)} == {"read 8 at 0", "read bio"}


@pytest.mark.parametrize("export", [trace_export.json_lines, lambda tracer: trace_export.perfetto(tracer, "x")])
def test_names_that_are_not_utf8(export: Callable[[trace.Tracer], Iterator[str]]) -> None:
    tracer = trace.start(Ticks())
    trace.begin(None, "file", READ, 0, 1, file=trace.name_of(b"/a\xff"))
    text = "".join(export(tracer))
    assert "/a?" in text
    text.encode()
