"""Standard input, output and error that are closed, full, or that nobody reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.images import image_in, odirect
from tests.cli.test_main import STARTER

DATA = b"bytes of a file" * 1000
# A command that waits for itself must fail the test, not hang it.
TIMEOUT_SECONDS = 120


@pytest.fixture
def here(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a file and a volume that has it, too."""
    monkeypatch.chdir(scratch)
    (scratch / "file").write_bytes(DATA)
    with image_in(scratch) as image:
        image.rename("disk.img")
        try:
            assert odirect("cp", "-q", "file", "disk.img:/file") == 0
            yield scratch
        finally:
            (scratch / "disk.img").rename(image)


def shell(redirections: str, *command: object) -> subprocess.CompletedProcess[bytes]:
    """`COMMAND REDIRECTIONS`, as a shell does it."""
    words = ["sh", "-c", f'exec "$@" {redirections}', "sh", *map(str, command)]
    return subprocess.run(words, capture_output=True, check=False, timeout=TIMEOUT_SECONDS)


def clean(said: bytes) -> str:
    """What was said, without a word of Python's own."""
    text = said.decode()
    assert "Traceback" not in text and "Exception ignored" not in text
    return text


# --- closed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["cp", "-", "new"], ["cat", "-"], ["cp", "-", "disk.img:/new"]])
@pytest.mark.parametrize("others", ["", ">&-"])
def test_a_closed_input(arguments: list[str], others: str, here: Path) -> None:
    """It cannot be read; it is not empty, and nothing of ours is read in its place."""
    done = shell(f"<&- {others}", *STARTER, *arguments)
    assert done.returncode == 2 and done.stdout == b""
    assert clean(done.stderr) == "odirect: -: reading the stream: Bad file descriptor\n"
    assert not (here / "new").exists() and odirect("stat", "disk.img:/new") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["cat", "file"],
        ["cat", "disk.img:/file"],
        ["cp", "file", "-"],
        ["cp", "--json", "file", "copy"],
        ["ls", "disk.img:"],
        ["stat", "disk.img:/", "disk.img:/file"],
        ["info", "file"],
        ["info", "disk.img:"],
        ["explain", "--json", "file"],
        ["check", "disk.img"],
        ["mkfs", "ext2", "new.img", "--size", "4M"],
        ["bench", "--number", "1", "--bs", "4k", "file"],
        ["trace", "--json", "-", "--", "cp", "-q", "file", "copy"],
        ["--version"],
        ["--help"],
        ["ls", "--help"],
    ],
)
@pytest.mark.parametrize(
    "redirections,status,reason",
    [(">&-", 2, "Bad file descriptor"), (">/dev/full", 9, "No space left on device")],
)
def test_an_output_that_takes_nothing(
    redirections: str, status: int, reason: str, arguments: list[str], here: Path
) -> None:
    """One line and a status, whatever the verb; never success without a word."""
    done = shell(redirections, *STARTER, *arguments)
    assert done.returncode == status
    (line,) = [line for line in clean(done.stderr).splitlines() if line.startswith("odirect: ")]
    assert line.endswith(reason) and ("standard output" in line or line.startswith("odirect: -: "))


def test_a_traced_verb_that_cannot_say_anything(here: Path) -> None:
    done = shell(">/dev/full", *STARTER, "trace", "--", "ls", "disk.img:")
    assert done.returncode == 9 and clean(done.stderr).count("odirect: writing to standard output") == 1


@pytest.mark.parametrize("redirections", ["2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_messages_that_nobody_takes(redirections: str, here: Path) -> None:
    """A copy is no worse for it, and a failure is still one."""
    done = shell(redirections, *STARTER, "cp", "file", "copy")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (here / "copy").read_bytes() == DATA
    done = shell(redirections, *STARTER, "cp", "missing", "other")
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")
    done = shell(redirections, *STARTER, "trace", "--", "cp", "file", "copy")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_three_numbers_are_never_ours(scratch: Path) -> None:
    """What stands in for them can be neither read nor written, but for messages, which vanish."""
    program = (
        "import json, os, sys\n"
        "from odirect.cli import standard\n"
        "standard.settle()\n"
        "found = {'next': os.open('.', os.O_RDONLY)}\n"
        "for fd in range(3):\n"
        "    found[fd] = [os.readlink(f'/proc/self/fd/{fd}'), os.get_inheritable(fd)]\n"
        "def number(call, *arguments):\n"
        "    try:\n"
        "        call(*arguments)\n"
        "    except OSError as error:\n"
        "        return error.strerror\n"
        "found['read'] = number(os.read, 0, 1)\n"
        "found['write'] = number(os.write, 1, b'x')\n"
        "found['message'] = number(os.write, 2, b'x')\n"
        "print('a message', file=sys.stderr, flush=True)\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    json.dump(found, file)\n"
    )
    done = shell("<&- >&- 2>&-", sys.executable, "-c", program, scratch / "found")
    assert done.returncode == 0
    found = json.loads((scratch / "found").read_text())
    assert found.pop("next") > 2
    assert found == {
        "0": ["/dev/null", True],
        "1": ["/dev/null", True],
        "2": ["/dev/null", True],
        "read": "Bad file descriptor",
        "write": "Bad file descriptor",
        "message": None,
    }


def test_open_ones_stay_as_they_are(scratch: Path) -> None:
    program = (
        "import os, sys\n"
        "from odirect.cli import standard\n"
        "before = [os.fstat(fd) for fd in range(3)]\n"
        "standard.settle()\n"
        "assert all(map(os.path.samestat, before, [os.fstat(fd) for fd in range(3)]))\n"
        "sys.stdout.write('said')\n"
    )
    done = shell("", sys.executable, "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"said", b"")


def test_nothing_to_stand_in(scratch: Path) -> None:
    """Without /dev/null a closed one is the end, and open ones do not need it."""
    program = "import os, sys\nos.devnull = sys.argv.pop(1)\nfrom odirect.cli import main\nmain.main()\n"
    command = (sys.executable, "-c", program, scratch / "missing", "--version")
    done = shell("<&-", *command)
    assert done.returncode == 2 and done.stdout == b""
    assert clean(done.stderr).startswith(f"odirect: {scratch}/missing: standing in for descriptor 0: No such file")
    assert shell("", *command).returncode == 0


# --- nobody reads, or slowly -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["ls", "disk.img:"], ["stat", "disk.img:/", "disk.img:/file"], ["info", "file"], ["--help"], ["cat", "file"]],
)
def test_nobody_reads(arguments: list[str], here: Path) -> None:
    """Quiet, with the status that the shell gives to SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*STARTER, *arguments], stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_output_that_does_not_block() -> None:
    """Somebody has made the pipe so: all of it comes, as soon as there is room."""
    program = (
        "import os, sys\n"
        "from odirect.cli import standard\n"
        "os.set_blocking(1, False)\n"
        "standard.settle()\n"
        "sys.stdout.write('x' * (4 << 20))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=TIMEOUT_SECONDS)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout == b"x" * (4 << 20)


def test_signs_that_the_output_cannot_show(here: Path) -> None:
    """A table is printed where the locale has no µ."""
    done = subprocess.run(
        [*STARTER, "bench", "--number", "1", "--bs", "4k", "file"],
        env={**os.environ, "PYTHONIOENCODING": "iso8859-2"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and b"CPU \\xb5s/op" in done.stdout, clean(done.stderr)
