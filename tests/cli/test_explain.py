"""`odirect explain`: what it says of requests is what really happens to them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.loops import loop_device, made_image, mounted, needs_loop, run

import odirect
from odirect.block.fiemap import ExtentFlag, FileExtent
from odirect.cli import explain, main
from odirect.dio.outcome import Outcome, Promise, Reason

MIB = 1 << 20


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main.run(["explain", "--json", *map(str, arguments)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def drawn(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main.run(["explain", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.fixture
def source(scratch: Path) -> Path:
    """3 MiB of data, a hole, 2 MiB that were reserved, and a hole up to 16 MiB and 5 bytes."""
    path = scratch / "source"
    with open(path, "wb") as file:
        file.write(random.Random(3).randbytes(3 * MIB))
        os.truncate(file.fileno(), 16 * MIB + 5)
        os.posix_fallocate(file.fileno(), 8 * MIB, 2 * MIB)
        os.fsync(file.fileno())
    return path


def test_the_pieces_of_a_file(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, source)
    assert found["bytes_by_kind"]["hole"] == 5 * MIB + 6 * MIB + 5
    assert found["bytes_by_kind"]["mapped"] + found["bytes_by_kind"]["unwritten"] == 5 * MIB
    done = 0
    for piece in found["extents"]:
        assert piece["offset"] == done and piece["length"] > 0
        done += piece["length"]
    assert done == found["size_bytes"] == 16 * MIB + 5


def test_the_picture(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = drawn(capsys, source)
    (bar,) = (line for line in out.splitlines() if line.startswith("  ▕"))
    width = len(bar) - 4
    assert width == 64
    assert bar[3 : 3 + 12] == "█" * 12 and bar[3 + 13] == "·" and "▒" in bar and bar[-2] == "·"
    assert "never written" in out and "16.0 MiB" in out and "on the device at" in out


def test_a_picture_for_terminals_that_have_only_ascii() -> None:
    pieces = [explain.Piece("mapped", 0, 50, 0), explain.Piece("hole", 50, 50, None)]
    bar, scale, *legend = map(click.unstyle, explain.picture(pieces, 100, width=10, signs=False))
    assert bar == "  |#####.....|"
    assert scale.split() == ["0", "100", "B"]
    assert [line.split()[0] for line in legend] == [".", "#"]


def test_a_small_piece_is_not_lost_in_the_picture() -> None:
    """What matters for direct I/O shows, however short it is."""
    pieces = [
        explain.Piece("mapped", 0, 10**9, 0),
        explain.Piece("compressed", 10**9, 1, 5),
        explain.Piece("mapped", 10**9 + 1, 10**9, 6),
    ]
    bar = click.unstyle(explain.picture(pieces, 2 * 10**9 + 1, width=21, signs=False)[0])
    assert bar.count("Z") == 1 and bar.count("#") == 20


@pytest.mark.parametrize(
    "flags,kind",
    [
        (ExtentFlag(0), "mapped"),
        (ExtentFlag.LAST, "mapped"),
        (ExtentFlag.UNWRITTEN | ExtentFlag.LAST, "unwritten"),
        (ExtentFlag.SHARED, "shared"),
        (ExtentFlag.ENCODED | ExtentFlag.SHARED, "compressed"),
        (ExtentFlag.DATA_INLINE | ExtentFlag.NOT_ALIGNED, "inline"),
        (ExtentFlag.DELALLOC | ExtentFlag.UNKNOWN, "delalloc"),
        (ExtentFlag.UNKNOWN, "unknown"),
    ],
)
def test_what_an_extent_is_called(flags: ExtentFlag, kind: str) -> None:
    assert explain.kind_of(flags) == kind
    assert kind in explain.LOOKS


def test_extents_past_the_end_are_cut() -> None:
    """Space that was reserved behind the end of the file is not the file's."""
    extents = [FileExtent(0, 4096, 4096, ExtentFlag(0)), FileExtent(8192, 65536, 8192, ExtentFlag.UNWRITTEN)]
    assert list(explain.pieces_of(extents, 9000)) == [
        explain.Piece("mapped", 0, 4096, 4096),
        explain.Piece("hole", 4096, 4096, None),
        explain.Piece("unwritten", 8192, 808, 65536),
    ]
    assert [piece.kind for piece in explain.pieces_of(extents, 5000)] == ["mapped", "hole"]
    assert list(explain.pieces_of([], 7)) == [explain.Piece("hole", 0, 7, None)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 60_000),
    block=st.one_of(st.sampled_from([512, 4096, 8192]), st.integers(100, 20_000)),
    offset=st.integers(0, 5000),
)
def test_what_is_said_is_what_happens(scratch: Path, size: int, block: int, offset: int) -> None:
    """B01, F50: every request is really made; outcomes and their number are those that were foretold."""
    path = scratch / "file"
    path.write_bytes(random.Random(size).randbytes(size))
    found = explain.explain(str(path), block, offset)
    real: dict[str, dict[Outcome, int]] = {"read": {}, "write": {}}
    memory = odirect.empty(block)
    with odirect.open(path, "r+") as file:
        for at in range(offset, size, block):
            count = file.preadinto(memory, at)
            outcome = file.last_outcome
            assert outcome is not None
            real["read"][outcome] = real["read"].get(outcome, 0) + 1
            file.pwrite(memory[:count], at)
            outcome = file.last_outcome
            assert outcome is not None
            outcome = outcome._replace(promise=Promise.NONE)
            real["write"][outcome] = real["write"].get(outcome, 0) + 1
    assert {cost.outcome: cost.requests for cost in found.reads} == real["read"]
    assert {cost.outcome: cost.requests for cost in found.writes} == real["write"]


def test_bios_are_counted(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B03: a request that is larger than the device's largest bio becomes several."""
    most = odirect.alignment(source).limits.max_bio_bytes
    found = told(capsys, source, "--bs", 2 * most)
    assert found["reads"][0]["bios"] == 2 * found["reads"][0]["requests"]
    found = told(capsys, source, "--bs", "4k")
    kinds = {(cost["kind"], cost["reason"]): (cost["requests"], cost["bios"]) for cost in found["reads"]}
    assert kinds == {("direct", ""): (4096, 4096), ("bounced", "end of file"): (1, 1)}


def test_odd_requests_are_counted_once() -> None:
    pieces = [
        explain.Piece("mapped", 0, 100, 0),
        explain.Piece("compressed", 100, 100, 0),
        explain.Piece("compressed", 200, 50, 0),
        explain.Piece("inline", 250, 50, None),
        explain.Piece("hole", 300, 1000, None),
    ]
    assert explain.odd_requests(pieces, 64, 0, 1300) == [
        explain.OddRun(1, 4, Reason.ENCODED),
        explain.OddRun(4, 5, Reason.INLINE),
    ]
    assert explain.odd_requests(pieces, 64, 290, 1300) == [explain.OddRun(0, 1, Reason.INLINE)]
    run = explain.OddRun(5, 23, Reason.INLINE)
    for cycle in (1, 2, 3, 7, 40):
        for turn in range(cycle):
            assert run.among(turn, cycle) == sum(number % cycle == turn for number in range(5, 23))


def test_nothing_to_say_of_an_empty_file(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "empty").touch()
    assert "It is empty." in drawn(capsys, scratch / "empty")
    found = told(capsys, scratch / "empty")
    assert found["extents"] == found["reads"] == found["writes"] == []


def test_an_offset_behind_the_end(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, source, "--offset", "1G")["reads"] == []
    assert "(0 in all)" in drawn(capsys, source, "--offset", "1G")


def test_many_extents_are_cut_short(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(scratch / "file", "wb") as file:
        for number in range(40):
            file.seek(number * 65536)
            file.write(b"x" * 4096)
        os.fsync(file.fileno())
    assert "... and 20 more" in drawn(capsys, scratch / "file")
    assert "more (--all" not in drawn(capsys, "--all", scratch / "file")


def test_a_device_is_one_piece(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_loop()
    with made_image(None, 4 * MIB, directory=scratch) as image, loop_device(image, 4096) as device:
        found = told(capsys, device, "--bs", "512")
        assert found["bytes_by_kind"] == {"mapped": 4 * MIB}
        reads = {(cost["kind"], cost["reason"]): cost["requests"] for cost in found["reads"]}
        assert reads == {("bounced", "misaligned offset"): 7168, ("bounced", "misaligned length"): 1024}
        assert "a block device" in drawn(capsys, device)


def test_a_file_in_memory_is_buffered(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F50, F52: which requests fall back, and why."""
    with mounted("odirect-test", "tmpfs", "size=8M") as place:
        (place / "file").write_bytes(bytes(MIB))
        found = told(capsys, place / "file", "--bs", "64k")
        for side in ("reads", "writes"):
            assert [(cost["kind"], cost["requests"]) for cost in found[side]] == [("buffered", 16)]
        assert found["extents"] is None and "FIEMAP" in found["why_no_extents"]
        assert "cannot be told" in drawn(capsys, place / "file")


@pytest.mark.slow
def test_btrfs_inline_compressed_and_shared(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What btrfs keeps in its trees or compressed cannot be read direct, and is drawn as what it is."""
    needs_loop()
    with made_image("btrfs", directory=scratch) as image, mounted(image, "btrfs", "compress-force=zlib") as place:
        (place / "inline").write_bytes(b"x" * 100)
        (place / "squeezed").write_bytes(b"x" * MIB)
        (place / "plain").touch()
        run("chattr", "+C", place / "plain")
        (place / "plain").write_bytes(random.Random(4).randbytes(MIB))
        os.sync()
        assert set(told(capsys, place / "inline")["bytes_by_kind"]) == {"inline"}
        squeezed = told(capsys, place / "squeezed", "--bs", "64k")
        assert set(squeezed["bytes_by_kind"]) == {"compressed"}
        assert [cost["kind"] for cost in squeezed["reads"]] == ["buffered"]
        plain = told(capsys, place / "plain", "--bs", "64k")
        assert set(plain["bytes_by_kind"]) == {"mapped"}
        assert [cost["kind"] for cost in plain["reads"]] == ["direct"]
        os.sync()
        (place / "twin").write_bytes(random.Random(5).randbytes(MIB))
        os.sync()
        run("cp", "--reflink=always", place / "twin", place / "twin2")
        os.sync()
        kinds = set(told(capsys, place / "twin")["bytes_by_kind"])
        assert kinds <= {"shared", "compressed"}


@pytest.mark.parametrize("arguments,status", [(["missing"], 2), (["--bs", "0", "x"], 2), (["."], 2), ([], 2)])
def test_what_goes_wrong(
    arguments: list[str],
    status: int,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(scratch)
    assert main.run(["explain", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err
