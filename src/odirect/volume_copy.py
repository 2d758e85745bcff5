"""What copying trees into and out of a volume share: the report, the progress, and the errors of the host."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, TypeVar

from odirect.base.errors import ODirectError, from_errno
from odirect.block.buffers import empty
from odirect.sched.interrupts import Interrupts
from odirect.sched.scheduler import Task
from odirect.volume_runner import Runner

T = TypeVar("T")
Progress = Callable[[int, int], None]

#: How much one request moves. Two buffers of it: one is read while the other is written.
CHUNK_BYTES = 4 << 20
#: A file of less goes through the host's page cache: to open it for direct I/O takes longer than to read it.
DIRECT_BYTES = 1 << 20
_LONGEST_NAME = 255


class TreeReport(NamedTuple):
    """What was copied. target: the path that was made or filled.

    files, directories, links (symbolic ones) and nodes (fifos, sockets, devices) were made, hard_links
    are further names of such. bytes_copied were moved, bytes_skipped are holes. left_out says of what
    could not be kept (an owner, an attribute, a device) where it belongs, and why.
    """

    target: str
    files: int
    directories: int
    links: int
    nodes: int
    hard_links: int
    bytes_copied: int
    bytes_skipped: int
    left_out: list[str]


class Counts:
    """A report in the making."""

    def __init__(self, progress: Progress | None, total: int, interrupts: Interrupts) -> None:
        self.files = self.directories = self.links = self.nodes = self.hard_links = 0
        self.copied = self.skipped = 0
        self.left_out: list[str] = []
        self._progress = progress
        self._total = total
        self._interrupts = interrupts

    def add(self, *, copied: int = 0, skipped: int = 0) -> None:
        """Tell the caller; what he raises, or a signal that has come, ends the copy here."""
        self.copied += copied
        self.skipped += skipped
        progress, done = self._progress, self.copied + self.skipped
        if progress is not None and (copied or skipped):
            self._interrupts.allowed(lambda: progress(done, max(done, self._total)))
        self._interrupts.check()

    def leave_out(self, path: bytes, what: str, error: OSError) -> None:
        """Note that something of `path` could not be kept."""
        reason = error.message if isinstance(error, ODirectError) else os.strerror(error.errno or errno.EIO)
        self.left_out.append(f"{os.fsdecode(path)}: {what}: {reason}")

    def report(self, target: str) -> TreeReport:
        """How it went."""
        return TreeReport(
            target,
            self.files,
            self.directories,
            self.links,
            self.nodes,
            self.hard_links,
            self.copied,
            self.skipped,
            self.left_out,
        )


class Buffers:
    """Two buffers that take turns, made when the first is asked for."""

    def __init__(self) -> None:
        self._made: list[memoryview] = []
        self._turn = 0

    def next(self) -> memoryview:
        """The one that was not given out last."""
        turn, self._turn = self._turn, self._turn ^ 1
        if len(self._made) <= turn:
            self._made.append(empty(CHUNK_BYTES))
        return self._made[turn]


def finished(runner: Runner, task: Task[T]) -> T:
    """What a task that was started returns, waited for."""
    runner.wait_until(lambda: task.done)
    return task.result()


def settle(runner: Runner, task: Task[T] | None) -> None:
    """Wait until nothing of `task` is in flight: its memory is the device's until then (F24)."""
    if task is not None and not task.done:
        runner.wait_until(lambda: task.done)


class on_host:
    """Turns the host's answers, within `with`, into errors of ours that name the path."""

    __slots__ = ("_doing", "_path")

    def __init__(self, doing: str, path: str | bytes) -> None:
        self._doing = doing
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ODirectError):
            error.filename = self._path
        elif isinstance(error, OSError):
            raise from_errno(error.errno or errno.EIO, self._doing, self._path) from error


def temporary_name(name: bytes, taken: Callable[[bytes], bool]) -> bytes:
    """A hidden name beside `name` that is not `taken`, for what is not whole yet."""
    for number in itertools.count():
        ending = b".%d-%d.odirect" % (os.getpid(), number)
        hidden = b"." + name[: _LONGEST_NAME - 1 - len(ending)] + ending
        if not taken(hidden):
            break
    return hidden


def chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces that [start, end) is moved in."""
    for offset in range(start, end, CHUNK_BYTES):
        yield offset, min(CHUNK_BYTES, end - offset)
