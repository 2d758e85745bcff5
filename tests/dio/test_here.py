"""A thread's own ring goes when it is forgotten, and files' descriptors with their files: also where a signal's handler
raised in between (F24)."""

from __future__ import annotations

import dis
import functools
import gc
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import odirect
from odirect.block.queue import RingQueue
from odirect.dio import here
from odirect.ring import choose

SOURCE = str(Path(odirect.__file__).parent)
# Not aligned, nor is a length: several bios, and a write's edges go through the page cache.
OFFSET = 200_001


class Stop(Exception):
    pass


def write(file: odirect.File) -> None:
    file.pwrite(odirect.empty(90_000), OFFSET)


def write_much(file: odirect.File) -> None:
    """By several workers."""
    file.pwrite(odirect.empty(3_000_000), OFFSET)


def read(file: odirect.File) -> None:
    file.preadinto(odirect.empty(90_000), OFFSET)


def sync(file: odirect.File) -> None:
    file.sync()


@pytest.fixture
def path(scratch: Path) -> Path:
    path = scratch / "file"
    path.write_bytes(bytes(4 << 20))
    return path


@pytest.fixture
def only_asked_for() -> Iterator[None]:
    """The collector runs when it is asked to, and looks only at what the test has made."""
    forget_all()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def forget_all() -> None:
    """Let go of what this thread keeps for its next call, the ring too."""
    here.forget()
    choose._local.__dict__.clear()


def assert_collected() -> None:
    """One collection is enough: a second one may be a long time away, and the ring's descriptor open until then.

    A weak reference is no witness: it ends where the collector has only begun to throw away.
    """
    forget_all()
    gc.collect()
    assert not [found for found in gc.get_objects() if isinstance(found, RingQueue)], "a ring is still there"


@pytest.mark.usefixtures("only_asked_for")
@pytest.mark.parametrize("call", [write, write_much, read, sync])
def test_a_request_that_was_left_with_io_in_flight(path: Path, call: Callable[[odirect.File], None]) -> None:
    """A handler raises where the caller waits, and again where he waits for what is in flight."""
    with odirect.open(path, "r+") as file:
        place = here.here()
        raised = 0

        def poll(timeout_ns: int) -> Any:
            nonlocal raised
            raised += 1
            raise Stop

        place.queue.poll = poll  # type: ignore[method-assign]
        with pytest.raises(Stop) as caught:
            call(file)
        assert raised == 2 and place.queue.in_flight
        del place, poll, caught
    assert_collected()


@functools.cache
def safe_points(code: CodeType) -> frozenset[int]:
    """The instructions before which the interpreter looks for signals: behind calls, entries and jumps back.

    What it raises there belongs to the call, what we raise to the instruction behind it: so both must be in one `try`.
    """
    entries: list[Any] = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]

    def caught_at(offset: int) -> list[int]:
        return [entry.target for entry in entries if entry.start <= offset < entry.end]

    looks = ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD")
    return frozenset(
        after.offset
        for before, after in itertools.pairwise(dis.get_instructions(code))
        if before.opname in looks and caught_at(before.offset) == caught_at(after.offset)
    )


class Raiser:
    """Sends signals at the `at`-th moment at which the interpreter would look for them inside of odirect."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen = 0
        self.armed = False
        self._returned_to = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.armed:
            raise Stop

    def run(self, call: Callable[[], None]) -> bool:
        """Whether `call` was stopped."""
        before = signal.signal(signal.SIGUSR1, self.handle)
        self.armed = True
        try:
            sys.settrace(self._enter)
            try:
                call()
            finally:
                sys.settrace(None)
        except Stop:
            return True
        finally:
            self.armed = False
            signal.signal(signal.SIGUSR1, before)
        return False

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        self._returned_to = 0
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "return":
            # A function in Python returns to another one without a look.
            inlined = frame.f_code.co_name != "__init__" and frame.f_back is not None
            self._returned_to = id(frame.f_back) if inlined else 0
        elif event == "opcode":
            returned, self._returned_to = self._returned_to == id(frame), 0
            if frame.f_lasti in safe_points(frame.f_code) and not returned:
                self.seen += 1
                if self.seen == self.at:
                    # Twice: the second one leaves at once.
                    signal.raise_signal(signal.SIGUSR1)
                    signal.raise_signal(signal.SIGUSR1)
        return self._step


@pytest.mark.slow
@pytest.mark.usefixtures("only_asked_for")
@pytest.mark.parametrize("call", [write, read, sync])
def test_handlers_that_raise_at_every_point(path: Path, call: Callable[[odirect.File], None]) -> None:
    """Wherever it is, the file can be used and closed after it, and the ring goes with the first collection."""

    def request(raiser: Raiser) -> bool:
        with odirect.open(path, "r+") as file:
            stopped = raiser.run(lambda: call(file))
            file.pread(100, 5)
        return stopped

    def attempt(at: int) -> tuple[Raiser, bool]:
        raiser = Raiser(at)
        stopped = request(raiser)
        assert_collected()
        return raiser, stopped

    with warnings.catch_warnings():
        # A coroutine that was stopped before its first step is dropped.
        warnings.simplefilter("ignore", RuntimeWarning)
        attempt(0)
        raiser, stopped = attempt(0)
        assert not stopped and raiser.seen > 100
        tried = range(1, raiser.seen + 1)
        assert sum(attempt(at)[1] for at in tried) > 0.9 * len(tried)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_handlers_that_raise_while_a_file_is_opened_or_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor stays open that nobody has."""
    # What comes in a destructor, Python drops and tells this hook; and files of its own it closes with a warning.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    def descriptors() -> int:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link) == str(path) for link in links)

    def attempt(at: int) -> Raiser:
        raiser = Raiser(at)
        raiser.run(lambda: odirect.open(path, "r+").close())
        return raiser

    count = attempt(0).seen
    assert count > 50
    for at in range(1, count + 1):
        attempt(at)
        gc.collect(0)  # a file that was never given to anybody may be in a cycle
        assert not descriptors(), f"open after a signal at point {at} of {count}"
