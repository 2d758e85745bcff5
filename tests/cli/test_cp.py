"""`odirect cp`."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import subprocess
from pathlib import Path

import pytest
from tests.cli.test_main import STARTER
from tests.loops import loop_device, made_image, mounted, needs_loop

from odirect.cli import common, main

MIB = 1 << 20


@pytest.fixture
def source(scratch: Path) -> Path:
    path = scratch / "source"
    path.write_bytes(random.Random(1).randbytes(3 * MIB + 7))
    return path


def cp(*arguments: object) -> int:
    return main.run(["cp", *map(str, arguments)])


def test_a_copy_with_a_line_at_the_end(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cp(source, scratch / "copy") == 0
    assert (scratch / "copy").read_bytes() == source.read_bytes()
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{source} -> {scratch / 'copy'}: 3.0 MiB in ") and "/s (direct " in line
    assert "bounced" in line and "verified" not in line and "durable" not in line


def test_what_was_asked_for_is_said(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(source, 10 * MIB)
    assert cp("--verify", "--sync", source, scratch / "copy") == 0
    assert capsys.readouterr().err.endswith("MiB of holes; verified; durable)\n")


def test_json(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cp("--json", "--verify", "--quiet", source, scratch / "copy") == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert captured.err == ""
    assert told["source"] == str(source) and told["target"] == str(scratch / "copy")
    assert told["bytes_copied"] == 3 * MIB + 7 and told["verified"] is True and told["durable"] is False
    assert told["seconds"] > 0
    for way in ("outcomes", "reads", "writes"):
        assert {tuple(each) for each in told[way]} == {("kind", "reason", "promise", "operations", "bytes")}
    assert sum(each["operations"] for each in told["outcomes"] if each["kind"] == "direct") >= 3
    assert sum(each["bytes"] for each in told["writes"]) == 3 * MIB + 7
    for number in ("operations", "bytes"):
        reads_and_writes = [*told["reads"], *told["writes"]]
        assert sum(each[number] for each in told["outcomes"]) == sum(each[number] for each in reads_and_writes)


def test_several_into_a_directory(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "other").write_bytes(b"other")
    (scratch / "into").mkdir()
    assert cp("--json", source, scratch / "other", scratch / "into") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["target"] for each in told] == [str(scratch / "into/source"), str(scratch / "into/other")]
    assert (scratch / "into/other").read_bytes() == b"other"


def test_several_onto_one_file_is_a_wrong_call(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cp(source, source, scratch / "copy") == 2
    assert "not a directory" in capsys.readouterr().err
    assert os.listdir(scratch) == ["source"]


def test_quiet_says_nothing(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cp("-q", source, scratch / "copy") == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_in_a_log_is_a_line_for_each_tenth(
    source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cp("--progress", "--chunk", "64k", source, scratch / "copy") == 0
    lines = capsys.readouterr().err.splitlines()
    assert 10 <= len(lines) <= 12 and lines[-2].endswith("100% of 3.0 MiB")


def test_progress_on_a_terminal(source: Path, scratch: Path) -> None:
    """A bar on standard error where that is a terminal, and nothing of it on standard output."""
    master, slave = pty.openpty()
    child = subprocess.Popen([*STARTER, "cp", source, scratch / "copy"], stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    seen = b""
    try:
        with child:
            while True:
                select.select([master], [], [])
                try:
                    piece = os.read(master, 4096)
                except OSError:  # EIO: the child has closed its side
                    break
                seen += piece
            assert child.stdout is not None
            assert child.stdout.read() == b""
    finally:
        os.close(master)
    assert child.returncode == 0
    assert b"\x1b[" in seen and b"->" in seen


def test_progress_of_unknown_size(capsys: pytest.CaptureFixture[str]) -> None:
    with common.progress_bar("-", True) as told:
        assert told is not None
        for done in range(0, 400 * MIB, MIB):
            told(done, 0)
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "0 B",
        "64.0 MiB",
        "128.0 MiB",
        "256.0 MiB",
    ]


@pytest.mark.parametrize("option", [[], ["--no-sparse"], ["--sparse"]])
def test_holes(option: list[str], scratch: Path) -> None:
    (scratch / "from").touch()
    os.truncate(scratch / "from", 4 * MIB)
    assert cp(*option, scratch / "from", scratch / "to") == 0
    status = (scratch / "to").stat()
    assert status.st_size == 4 * MIB and bool(status.st_blocks) == (option == ["--no-sparse"])


@pytest.mark.parametrize(
    "make,status,said",
    [
        (lambda scratch: ["missing", "copy"], 2, "odirect: missing: opening: No such file"),
        (lambda scratch: ["source", "source"], 2, "the same"),
        (lambda scratch: [".", "copy"], 2, "directory"),
        (lambda scratch: ["source", "/dev/null"], 8, "neither a regular file nor a block device"),
    ],
)
def test_what_goes_wrong_is_said(
    make: object,
    status: int,
    said: str,
    source: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert callable(make)
    monkeypatch.chdir(scratch)
    assert cp(*make(scratch)) == status
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1
    assert os.listdir(scratch) == ["source"]


def test_no_space_is_status_9(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted("odirect-test", "tmpfs", "size=1M") as place:
        assert cp(source, place) == 9
        assert os.listdir(place) == []
    assert "No space left" in capsys.readouterr().err


def test_strict(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F52: direct can be demanded."""
    assert cp("--strict", source, scratch / "copy") == 0
    with mounted("odirect-test", "tmpfs", "size=8M") as place:
        assert cp("--strict", source, place) == 4
        assert os.listdir(place) == []
        assert cp(source, place) == 0
    assert "buffered" in capsys.readouterr().err


def test_a_mounted_device_takes_a_flag_that_says_so(
    source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F34: refused, with who uses it."""
    needs_loop()
    with made_image("ext4", directory=scratch) as image, loop_device(image) as device:
        with mounted(device, "ext4") as point:
            assert cp(source, device) == 6
            assert str(point) in capsys.readouterr().err
        with loop_device(device) as above:
            assert cp(source, device) == 6
            assert above in capsys.readouterr().err
            assert cp("--overwrite-in-use", source, device) == 0
        assert cp("--verify", source, device) == 0


# --- streams --------------------------------------------------------------------------------------


def test_from_and_to_pipes(source: Path, scratch: Path) -> None:
    data = source.read_bytes()
    done = subprocess.run(
        [*STARTER, "cp", "--verify", "-", scratch / "copy"], input=data, capture_output=True, check=True
    )
    assert (scratch / "copy").read_bytes() == data and done.stdout == b"" and b"verified" in done.stderr
    done = subprocess.run([*STARTER, "cp", source, scratch / "copy", "-"], capture_output=True, check=True)
    assert done.stdout == data + data


def test_an_empty_pipe_makes_an_empty_file(scratch: Path) -> None:
    subprocess.run([*STARTER, "cp", "-q", "-", scratch / "copy"], stdin=subprocess.DEVNULL, check=True)
    assert (scratch / "copy").read_bytes() == b""


@pytest.mark.parametrize("arguments", [["-", "-"], ["--verify", "a", "-"], ["--sync", "a", "-"], ["--json", "a", "-"]])
def test_what_makes_no_sense_with_pipes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cp(*arguments) == 2
    assert "standard" in capsys.readouterr().err


# --- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_the_middle_leaves_nothing(scratch: Path, number: int, status: int) -> None:
    """Ctrl-C in the middle of a copy leaves no half file under the final name; nor do the others."""
    (scratch / "copy").write_bytes(b"old")
    child = subprocess.Popen(
        [*STARTER, "cp", "--progress", "--chunk", "64k", "--depth", "4", "-", scratch / "copy"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Whoever runs the tests under nohup has it ignored, by what he starts as well.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    with child:
        assert child.stdin is not None and child.stderr is not None
        # More than its buffers hold, so that something has been written; then it waits for more.
        child.stdin.write(bytes(16 * MIB))
        child.stdin.flush()
        assert child.stderr.readline().startswith(b"-: ")
        assert len(os.listdir(scratch)) == 2
        child.send_signal(number)
        said = child.stderr.read()
        assert child.wait() == status
        child.stdin.close()
    assert b"Traceback" not in said and (b"odirect: interrupted" in said) == (number == signal.SIGINT)
    assert os.listdir(scratch) == ["copy"] and (scratch / "copy").read_bytes() == b"old"
