"""`odirect trace`: the verb does what it does, and what is told of it is what happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.base.test_trace import Ticks, pairs
from tests.cli.test_main import STARTER

from odirect.base import trace as recorder
from odirect.base.trace import Event
from odirect.block.bio import READ, Bio
from odirect.cli import main, trace

DATA = random.Random(4).randbytes((5 << 20) + 123)


@pytest.fixture
def source(scratch: Path) -> Path:
    path = scratch / "source"
    path.write_bytes(DATA)
    return path


def traced(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*STARTER, "trace", *map(str, arguments)], capture_output=True, check=False)


# --- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--perfetto"])
def test_a_trace_to_standard_output(option: str, source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` is no file; the trace comes after what the verb says."""
    monkeypatch.chdir(scratch)
    done = traced(option, "-", "--", "cp", "--json", source, scratch / "target")
    assert done.returncode == 0, done.stderr
    assert not (scratch / "-").exists() and (scratch / "target").read_bytes() == DATA
    report, _, rest = done.stdout.decode().partition("\n")
    assert json.loads(report)["bytes_copied"] == len(DATA)
    if option == "--json":
        assert {json.loads(line)["kind"] for line in rest.splitlines()} >= {"request", "bio", "end"}
    else:
        assert json.loads(rest)["traceEvents"]


def test_not_both_to_standard_output(source: Path, scratch: Path) -> None:
    done = traced("--json", "-", "--perfetto", "-", "--", "cp", source, scratch / "target")
    assert done.returncode == 2 and b"both" in done.stderr and not (scratch / "target").exists()


def test_odd_names_in_a_trace(scratch: Path) -> None:
    """A name that is no UTF-8 has its bytes in hexadecimal beside it."""
    name = os.fsencode(scratch) + b"/\xff"
    with open(name, "wb") as file:
        file.write(DATA)
    for option in ("--json", "--perfetto"):
        done = traced(option, "-", "--", "cp", "-q", os.fsdecode(name), scratch / "target")
        assert f'"file_hex": "{name.hex()}"' in done.stdout.decode(), done.stderr


def test_a_copy_under_trace(source: Path, scratch: Path) -> None:
    """The copy is whole; the events cover it, as JSON lines and in pairs for Perfetto; both say the same."""
    target, lines, perfetto = scratch / "target", scratch / "lines", scratch / "perfetto"
    done = traced("--json", lines, "--perfetto", perfetto, "--", "cp", "--verify", "--chunk", "1M", source, target)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == DATA and done.stdout == b""
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    requests = {event["request"]: event for event in events if event["kind"] == "request"}
    ends = {event["request"]: event for event in events if event["kind"] == "end"}
    assert requests and requests.keys() == ends.keys()
    assert {request["file"] for request in requests.values()} >= {str(source)}
    for op, at_least in (("read", 2), ("write", 1)):
        moved = sum(ends[number]["transferred"] for number, request in requests.items() if request["op"] == op)
        assert moved >= at_least * len(DATA)
    bios = {event["bio"]: event for event in events if event["kind"] == "bio"}
    back = {event["bio"]: event for event in events if event["kind"] == "bio_end"}
    assert bios.keys() == back.keys()
    assert all(back[number]["time_ns"] >= bio["time_ns"] for number, bio in bios.items())
    drawn = json.loads(perfetto.read_text())["traceEvents"]
    names = [begin["name"] for begin, _ in pairs(drawn)]
    assert len([name for name in names if name.endswith(" bio")]) == len(bios)
    assert len([name for name in names if " at " in name]) == len(requests)
    assert drawn[0]["args"] == {"name": "odirect cp"}
    text = done.stderr.decode()
    assert "verified" in text, "the verb's own line is there"
    assert f"{len(requests)} requests, " in text and f", {len(bios)} bios" in text
    assert "read 1.0 MiB at 1048576" in text and "p99" in text


def test_what_the_verb_writes_is_its_own(source: Path) -> None:
    """Standard output is the verb's alone; without -- too; unaligned edges are said to bounce."""
    done = traced("cat", "--offset", "1", source)
    assert done.returncode == 0 and done.stdout == DATA[1:]
    assert b"bounced (end of file)" in done.stderr


def test_the_status_is_the_verbs(scratch: Path) -> None:
    """It fails as it would have; there is a trace all the same."""
    lines = scratch / "lines"
    done = traced("--json", lines, "--", "cat", scratch / "missing")
    assert done.returncode == 2
    assert f"odirect: {scratch}/missing: ".encode() in done.stderr and b"no request was recorded" in done.stderr
    assert lines.read_text() == ""


def test_few_of_many(source: Path, scratch: Path) -> None:
    """The first requests, and how many more there were; what found no room is said, on both ways out."""
    lines = scratch / "lines"
    done = traced("--first", "2", "--limit", "20", "--json", lines, "--", "cp", "--chunk", "64k", source, scratch / "b")
    text = done.stderr.decode()
    assert done.returncode == 0 and (scratch / "b").read_bytes() == DATA
    assert "more (--first shows more of them)" in text
    assert "events found no room: the trace holds 20 (--limit)" in text
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(events) == 21 and events[-1]["kind"] == "dropped" and str(events[-1]["events"]) in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "frobnicate"], "'frobnicate' is no verb; there are bench, cat"),
        (["--", "trace", "--", "cat", "x"], "cannot trace itself"),
        ([], "Missing argument"),
        (["--limit", "1", "--", "cat", "x"], "--limit"),
        (["--", "--version"], "'--version' is no verb"),
    ],
)
def test_a_wrong_call(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["trace", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert recorder.active is None


@pytest.mark.parametrize("option", ["--json", "--perfetto"])
def test_a_file_that_cannot_be_written(
    option: str, source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is known before anything is done."""
    target = scratch / "target"
    place = scratch / "missing" / "file"
    assert main.run(["trace", option, str(place), "--", "cp", str(source), str(target)]) == 2
    assert capsys.readouterr().err == f"odirect: {place}: opening it for the trace: No such file or directory\n"
    assert not target.exists() and recorder.active is None


def test_a_full_disk(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be written in the end is an error of ours, unless the verb has one of its own."""
    assert main.run(["trace", "--json", "/dev/full", "--", "cp", "-q", str(source), str(scratch / "b")]) == 9
    assert capsys.readouterr().err == "odirect: /dev/full: writing the trace: No space left on device\n"
    status = main.run(["trace", "--perfetto", "/dev/full", "--", "cat", str(scratch / "missing")])
    captured = capsys.readouterr()
    assert status == 2 and "missing: " in captured.err and "/dev/full: writing the trace" in captured.err


def test_help_of_a_verb_is_no_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["trace", "--", "cp", "--help"]) == 0
    captured = capsys.readouterr()
    assert "odirect cp" in captured.out and "no request was recorded" in captured.err


# --- the picture ---------------------------------------------------------------------------------------


def event(number: int, kind: str, time_ns: int, **fields: object) -> Event:
    return Event(number, kind, time_ns, fields)


def made() -> list[Event]:
    """Two requests: one with a wait, a mapping, a bio and a fallback, and one whose bio fails."""
    request: dict[str, Any] = {"via": "engine", "length": 4096, "flags": ""}
    return [
        event(1, "request", 0, op="read", offset=0, **request),
        event(1, "wait", 0, wait=1, what="lock"),
        event(1, "wait_end", 20, wait=1),
        event(1, "wait", 20, wait=2, what="mapping"),
        event(1, "wait_end", 30, wait=2),
        event(1, "bio", 30, bio=1, op="read", addr=0, length=4096, flags=""),
        event(2, "request", 50, op="write", offset=8192, **request),
        event(2, "bio", 50, bio=2, op="write", addr=8192, length=4096, flags=""),
        event(1, "bio_end", 60, bio=1, error="", done=4096),
        event(1, "fallback", 70, reason="hole", offset=4096),
        event(1, "end", 80, transferred=4096, outcome="direct, up to: hole", error=""),
        event(2, "bio_end", 95, bio=2, error="errno 5", done=0),
        event(2, "end", 100, transferred=0, outcome="", error="DeviceError: it failed"),
    ]


def test_columns_show_what_matters_most() -> None:
    one, other = trace.requests_of(made())
    cells = trace.cells_of(one, 0, 100, 10)
    assert cells == ["lock", "lock", "mapping", "bio", "bio", "bio", "request", "fallback", "", ""]
    assert trace.cells_of(other, 0, 100, 10) == [*[""] * 5, *["bio"] * 4, "error"]
    assert trace.cells_of(one, 0, 100, 2) == ["bio", "fallback"]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("pretty", [False, True])
def test_the_timeline_fits(width: int, pretty: bool) -> None:
    """No line is wider than the terminal, from 50 columns on; below that it is cropped, not folded."""
    lines = [line.plain for line in trace.timeline(trace.requests_of(made()), width, pretty=pretty)]
    assert len(lines) == 4 and lines[1].startswith("1 read") and lines[2].startswith("2 write")
    if width >= 50:
        assert all(len(line) <= width for line in lines[:3])
        assert ("█" if pretty else "#") in lines[1] and "80 ns" in lines[1] and "!" in lines[1]
        assert "DeviceError" in lines[2]
    if not pretty:
        assert all(line.isascii() for line in lines)


def test_a_terminal_gets_the_timeline(capsys: pytest.CaptureFixture[str]) -> None:
    """Bars for a terminal, a table elsewhere, the totals for both."""
    tracer = recorder.Tracer(Ticks())
    number = tracer.begin(None, "device", READ, 0, 4096, 0, {})
    bio = Bio(READ, 0, (), 4096)
    tracer.sent(number, bio)
    assert bio.end is not None
    bio.end(bio)
    tracer.end(number, {"transferred": 4096, "outcome": "direct", "error": ""})
    trace.show(tracer, 5, terminal=True, width=100)
    shown = capsys.readouterr().err
    assert "a bio in flight" in shown and "1 request, 4.0 KiB, 1 bio" in shown
    trace.show(tracer, 5, terminal=False, width=100)
    shown = capsys.readouterr().err
    assert "a bio in flight" not in shown and "waited" in shown and "1 request, 4.0 KiB, 1 bio" in shown
    trace.show(tracer, 0, terminal=True, width=100)
    assert "... and 1 more" in capsys.readouterr().err


def test_what_had_not_ended() -> None:
    """A request that was still under way when the trace stopped is shown so."""
    requests = trace.requests_of(made()[:8])
    assert [request.how for request in requests] == ["unfinished", "unfinished"]
    assert trace.cells_of(requests[0], 0, 60, 6) == ["lock", "lock", "mapping", "bio", "", ""]
    assert "unfinished" in "\n".join(trace.table(requests))
    assert list(trace.timeline(requests, 80, pretty=True))


@pytest.mark.parametrize(
    ("times", "expected"),
    [([7], [7, 7, 7, 7]), ([3, 1, 2], [2, 3, 3, 3]), (list(range(1, 201)), [100, 180, 198, 200])],
)
def test_percentiles(times: list[int], expected: list[int]) -> None:
    assert trace.percentiles(times) == expected
