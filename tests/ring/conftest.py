"""A ring of each kind, and a file to use it on."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from odirect.base.errors import ODirectError
from odirect.ring.contract import READ, Ring
from odirect.ring.threads import ThreadRing, _Operation

BLOCK = 4096
BLOCKS = 64

KINDS = ("uring", "uring-shared", "threads-4", "threads-0")


class MakeRing(Protocol):
    def __call__(self, depth: int = 32) -> Ring: ...


def new_ring(kind: str, depth: int) -> Ring:
    """A ring of this kind; skips the test where io_uring cannot be used."""
    if kind.startswith("uring"):
        from odirect.ring._uring import UringRing

        try:
            return UringRing(depth, shared=kind == "uring-shared")
        except ODirectError as refusal:
            pytest.skip(f"no io_uring here: {refusal}")
    return ThreadRing(depth, workers=int(kind[-1]), shared=kind == "threads-4")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_ring(kind: str) -> Iterator[MakeRing]:
    made: list[Ring] = []

    def make(depth: int = 32) -> Ring:
        made.append(new_ring(kind, depth))
        return made[-1]

    yield make
    for ring in made:
        ring.close()


@pytest.fixture
def content() -> bytes:
    return random.Random(53).randbytes(BLOCKS * BLOCK)


@pytest.fixture
def path(scratch: Path, content: bytes) -> Path:
    path = scratch / "data"
    path.write_bytes(content)
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> mmap.mmap:
    """Page-aligned memory as large as the file, zeroed."""
    return mmap.mmap(-1, BLOCKS * BLOCK)


def blocks(memory: object) -> list[memoryview]:
    """`memory` block by block."""
    view = memoryview(memory)  # type: ignore[arg-type]
    return [view[start : start + BLOCK] for start in range(0, len(view), BLOCK)]


def reap_all(ring: Ring) -> dict[object, int]:
    """Every answer of the ring by tag; fails on a tag that comes twice."""
    answers: dict[object, int] = {}
    while ring.in_flight:
        for tag, result in ring.reap(-1):
            assert tag not in answers
            answers[tag] = result
    assert ring.reap(0) == []
    return answers


def run_python(script: str, *arguments: object, environ: dict[str, str] | None = None) -> str:
    """What a fresh interpreter prints that runs `script`; fails with its error output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environ or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Blocked:
    """A read that does not end before it is told to: of a pipe with nothing in it."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind = kind
        self.end, self.inlet = os.pipe()
        self._rings: list[Ring] = []
        self.keep = True
        if not kind.startswith("uring"):
            # preadv(2), unlike io_uring, wants something that has offsets.
            monkeypatch.setattr(_Operation, "execute", lambda self: os.readv(self.handle, self.segments))

    def make_ring(self) -> Ring:
        ring = new_ring(self.kind, 32)
        if self.keep:
            self._rings.append(ring)
        return ring

    def start(self) -> tuple[Ring, Bytes]:
        """A ring with one read of 8 bytes in flight, tag "blocked", and its buffer."""
        ring = self.make_ring()
        buffer = Bytes(8)
        ring.queue(READ, self.end, (buffer,), 0, 8, 0, "blocked")
        ring.commit()
        return ring, buffer

    def let_go(self, count: int = 1) -> None:
        """Let `count` reads of 8 bytes end."""
        os.write(self.inlet, b"released" * count)

    def wait_for_workers(self) -> None:
        """Until the threads of rings that were dropped have ended."""
        for thread in threading.enumerate():
            if thread.name.startswith("odirect-ring"):
                thread.join(30)

    def close(self) -> None:
        for ring in self._rings:
            ring.close()
        os.close(self.end)
        os.close(self.inlet)


class Bytes(bytearray):
    """A bytearray that weak references can be made to."""


@pytest.fixture
def blocked(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocked]:
    it = Blocked(kind, monkeypatch)
    yield it
    it.close()
