"""`odirect cat`."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from tests.cli.test_main import STARTER
from tests.loops import loop_device, made_image, mounted, needs_loop

DATA = random.Random(2).randbytes((3 << 20) + 5)


@pytest.fixture
def source(scratch: Path) -> Path:
    path = scratch / "source"
    path.write_bytes(DATA)
    return path


def cat(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*STARTER, "cat", *map(str, arguments)], capture_output=True, check=False)


@pytest.mark.parametrize(
    "options,wanted",
    [
        ([], DATA),
        (["--offset", "1"], DATA[1:]),
        (["--offset", "1M", "--length", "513"], DATA[1 << 20 : (1 << 20) + 513]),
        (["--length", "0"], b""),
        (["--offset", "3M"], DATA[3 << 20 :]),
        (["--offset", "1G"], b""),
    ],
)
def test_what_was_asked_for_and_no_more(options: list[str], wanted: bytes, source: Path) -> None:
    """F02: offsets and lengths of any alignment, cut at the end of the file."""
    done = cat(*options, source)
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout == wanted


def test_several_files_in_order(source: Path, scratch: Path) -> None:
    (scratch / "other").write_bytes(b"other")
    assert cat(scratch / "other", source, scratch / "other").stdout == b"other" + DATA + b"other"


@pytest.mark.parametrize(
    "options,wanted",
    [
        ([], DATA),
        (["--offset", "1"], DATA[1:]),
        (["--offset", "2M", "--length", "1048000"], DATA[2 << 20 : (2 << 20) + 1048000]),
        (["--length", "0"], b""),
        (["--offset", "1G"], b""),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_input(kind: str, options: list[str], wanted: bytes, source: Path) -> None:
    """`-`: the same bytes of a pipe, or of a file that the shell has opened, as of a file."""
    command = [*STARTER, "cat", *options, "-"]
    if kind == "pipe":
        done = subprocess.run(command, input=DATA, capture_output=True, check=False)
    else:
        with open(source, "rb") as file:
            done = subprocess.run(command, stdin=file, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout == wanted


def test_standard_input_among_files(source: Path) -> None:
    command = [*STARTER, "cat", str(source), "-", str(source)]
    done = subprocess.run(command, input=b"between", capture_output=True, check=False)
    assert done.stdout == DATA + b"between" + DATA
    refused = subprocess.run([*STARTER, "cat", "--strict", "-"], input=b"x", capture_output=True, check=False)
    assert refused.returncode == 2 and refused.stdout == b"" and b"--strict" in refused.stderr


def test_standard_input_comes_at_once(source: Path) -> None:
    """What is there is passed on before there is more."""
    with subprocess.Popen([*STARTER, "cat", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"first")
        child.stdin.flush()
        assert child.stdout.read(5) == b"first"
        child.stdin.close()
        assert child.stdout.read() == b""
    assert child.returncode == 0


def test_a_device(source: Path, scratch: Path) -> None:
    needs_loop()
    with made_image(None, 4 << 20, directory=scratch) as image:
        image.write_bytes(DATA.ljust(4 << 20, b"\0"))
        with loop_device(image, 4096) as device:
            assert cat("--offset", "4095", "--length", "2", device).stdout == DATA[4095:4097]


def test_nobody_reads(source: Path) -> None:
    """As `cat ... | head`: it ends quietly, with the status that the shell gives to SIGPIPE."""
    child = subprocess.Popen([*STARTER, "cat", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.read(10)
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_what_goes_wrong(source: Path, scratch: Path) -> None:
    done = cat(source, scratch / "missing")
    assert done.stdout == DATA and done.returncode == 2
    assert done.stderr.decode() == f"odirect: {scratch}/missing: opening: No such file or directory\n"
    assert cat().returncode == 2
    assert cat("--offset", "-1", source).returncode == 2


def test_strict(source: Path, scratch: Path) -> None:
    """F52: direct or not at all, on demand."""
    assert cat("--strict", source).stdout == DATA
    with mounted("odirect-test", "tmpfs", "size=8M") as place:
        (place / "file").write_bytes(b"memory")
        assert cat(place / "file").stdout == b"memory"
        done = cat("--strict", place / "file")
        assert done.returncode == 4 and done.stdout == b""
