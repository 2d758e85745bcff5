"""ext2 images for the tests of the command line, and their judges: e2fsck, debugfs and the kernel."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.loops import made_image, run

from odirect.cli import main

MIB = 1 << 20


@contextlib.contextmanager
def image_in(directory: Path, size: int = 16 * MIB, *mkfs: str) -> Iterator[Path]:
    """An ext2 image of the system's own making; e2fsck must like it in the end, whatever was done to it."""
    with made_image("ext2", size, directory=directory, mkfs=mkfs) as image:
        yield image
        fsck(image)


def fsck(image: Path) -> None:
    """Fails the test unless e2fsck finds nothing at all."""
    run("e2fsck", "-fn", image)


def debugfs(image: Path, request: str) -> str:
    """What debugfs answers."""
    return run("debugfs", "-R", request, image)


def change(image: Path, *requests: str) -> None:
    """Have debugfs change the image."""
    for request in requests:
        run("debugfs", "-w", "-R", request, image)


def contents(image: Path, path: str, to: Path) -> bytes:
    """The bytes of a file in the image, as debugfs reads them."""
    said = debugfs(image, f"dump {path} {to}")
    assert to.exists(), said
    data = to.read_bytes()
    to.unlink()
    return data


def some_bytes(length: int, seed: int = 1) -> bytes:
    """Bytes that are never the same in two places."""
    return random.Random(seed).randbytes(length)


def odirect(*arguments: object) -> int:
    """The status of `odirect ARGUMENTS...` in this process."""
    return main.run([str(argument) for argument in arguments])


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What `odirect ARGUMENTS...` said in JSON."""
    assert odirect(*arguments) == 0
    return json.loads(capsys.readouterr().out)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `odirect ARGUMENTS...` said."""
    assert odirect(*arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """The message that `odirect ARGUMENTS...` failed with, with this status."""
    assert odirect(*arguments) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err
    return captured.err
