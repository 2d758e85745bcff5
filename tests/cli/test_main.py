"""The command itself: its help, its statuses, its messages, and what it costs to start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from odirect.base import errors
from odirect.cli import main

STARTER = [sys.executable, "-c", "from odirect.cli.main import main; main()"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import odirect

    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"odirect {odirect.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_verbs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status = main.run(arguments)
    captured = capsys.readouterr()
    assert status == 0 or not arguments  # without any, click has called it both right and wrong
    for verb, words in main.VERBS.items():
        assert verb in captured.out + captured.err and words.split()[0] in captured.out + captured.err


def test_help_has_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of all errors, of signals, and of what is neither."""
    assert main.run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.partition("Exit status:")[2].split())
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ODirectError)]
    assert len(kinds) > 15
    for status in {0, 1, 129, 130, 141, 143} | {kind.exit_code for kind in kinds}:
        assert re.search(rf"(^|; |, ){status} (if )?[a-z]", text.strip()), status


@pytest.mark.parametrize("verb", sorted(main.VERBS))
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out and f"odirect {verb}" in out


@pytest.mark.parametrize("arguments", [["frobnicate"], ["cp"], ["cp", "--depth", "x", "a", "b"], ["--frobnicate"]])
def test_a_wrong_call_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Usage:" in captured.err


@pytest.mark.parametrize("size", ["x", "0", "1.3", "2GiB"])
def test_a_size_that_is_none_says_so(size: str, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["cp", "--chunk", size, str(scratch / "a"), str(scratch / "b")]) == 2
    assert "--chunk" in capsys.readouterr().err


def failing(error: BaseException) -> Callable[..., click.Command]:
    @click.command("info")
    def command() -> None:
        raise error

    return lambda *_: command


@pytest.mark.parametrize(
    "error,status,said",
    [
        (errors.DeviceError("reading: it failed", path="/x"), 5, "odirect: /x: reading: it failed\n"),
        (errors.NotDirectError("no"), 4, "odirect: no\n"),
        (errors.AlignmentError("no"), 3, "odirect: no\n"),
        (errors.InUseError("no"), 6, "odirect: no\n"),
        (errors.NoSpaceError("no"), 9, "odirect: no\n"),
        (errors.VerifyError("no"), 10, "odirect: no\n"),
        (errors.MissingError("no", path=b"/\xff"), 2, "odirect: "),
        (KeyboardInterrupt(), 130, "odirect: interrupted\n"),
        (click.Abort(), 130, "odirect: interrupted\n"),
        (ValueError("ODIRECT_RING is 'x'"), 2, "odirect: ODIRECT_RING is 'x'\n"),
        (MemoryError(), 1, "odirect: there is not enough memory\n"),
    ],
)
def test_every_error_is_a_line_and_a_status(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No traceback for what can happen; the status is the error class's own."""
    monkeypatch.setattr(main._Verbs, "get_command", failing(error))
    assert main.run(["info"]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(said) and captured.err.count("\n") == 1 and captured.out == ""


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no user can cause keeps its traceback."""
    monkeypatch.setattr(main._Verbs, "get_command", failing(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main.run(["info"])


@pytest.mark.parametrize("error", ["BrokenPipeError()", "from_errno(errno.EPIPE, 'writing')"])
def test_a_broken_pipe_is_quiet(error: str) -> None:
    """In a child, whose standard output it gives up."""
    program = (
        "import errno, sys\n"
        "import click\n"
        "from odirect.base.errors import from_errno\n"
        "from odirect.cli import main\n"
        "@click.command('info')\n"
        "def command():\n"
        f"    raise {error}\n"
        "main._Verbs.get_command = lambda *_: command\n"
        "sys.exit(main.run(['info']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 141 and done.stderr == b""


def test_the_back_end_that_is_none(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "a").write_bytes(b"a")
    monkeypatch.setenv("ODIRECT_RING", "rings")
    done = subprocess.run([*STARTER, "cp", scratch / "a", scratch / "b"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("odirect: ODIRECT_RING") and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["cp", "--help"], ["cat", "--help"]])
def test_starting_is_cheap(arguments: list[str]) -> None:
    """What costs is loaded by the verb that needs it, when it needs it."""
    program = (
        "import sys, json\n"
        "from odirect.cli.main import run\n"
        f"run({arguments!r})\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stderr))
    assert "click" in loaded
    for module in ("numpy", "rich", "asyncio", "odirect.files", "odirect.copying", "odirect.cli.bench"):
        assert module not in loaded
