"""Write-back: how dirty pages get to the device, and how a failure gets to those whom it concerns.

What is written is a private copy of the pages, taken at one instant (F21: what the device, a checksum
or a second mirror reads must not change meanwhile). So the pages stay readable and writable while
they are being written, and a run of adjacent pages goes as one segment. A page has at most one such
image in flight: two writes of one place would reach the device in any order.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from odirect.base.errors import ODirectError
from odirect.block.buffers import BufferPool, Lease
from odirect.sched.traps import Event, joined, this_scheduler, wait

if TYPE_CHECKING:
    from odirect.cache.pages import Page

#: The longest run of adjacent pages that is written as one, and how many of that size are in flight.
RUN_BYTES = 4 << 20
_RUNS = 4

#: Runs up to this size have memory of their own, so that scattered pages go many at a time.
_SMALL_RUN_BYTES = 64 << 10
_SMALL_RUNS = 32

_WORKERS = 16


class ErrorSequence:
    """Write-back errors, told once to every handle that was open when they happened (F41).

    A handle keeps the number that it got from `sample` or its last `check`.
    """

    __slots__ = ("_count", "_last")

    def __init__(self) -> None:
        self._count = 0
        self._last: ODirectError | None = None

    def note(self, error: ODirectError) -> None:
        """Remember that a write-back failed."""
        self._count += 1
        self._last = error

    def sample(self) -> int:
        """The number that a handle opened now starts with: nothing that failed before is told to it."""
        return self._count

    def check(self, seen: int) -> tuple[int, ODirectError | None]:
        """The handle's new number, and the latest error since `seen`, or None if there was none."""
        return (self._count, self._last) if self._count != seen else (seen, None)


class Promise:
    """Space that was promised for some adjacent pages, given back when none of them needs it any more.

    The file system says what a range needs, not which page of it; so the units go together.
    """

    __slots__ = ("pages", "units")

    def __init__(self, units: int, pages: int) -> None:
        self.units = units
        self.pages = pages


class Image:
    """A copy of adjacent pages that is being written. `ended` fires when it is over; `error` says how it failed."""

    __slots__ = ("ended", "error", "first", "pages", "promises")

    def __init__(self, first: int) -> None:
        self.first = first
        self.pages: list[Page] = []
        self.promises: list[Promise | None] = []
        self.ended = Event()
        self.error: BaseException | None = None


class ImageMemory:
    """The memory for images of all files of a volume: it bounds how much is being written at once."""

    def __init__(self) -> None:
        self._small = BufferPool(_SMALL_RUN_BYTES, _SMALL_RUNS)
        self._large = BufferPool(RUN_BYTES, _RUNS)

    async def take(self, length: int) -> Lease:
        """Memory for `length` bytes, or for as much of it as one run has. Waits until there is some."""
        pool = self._small if length <= _SMALL_RUN_BYTES else self._large
        return await pool.take()


class Source(Protocol):
    """What has the pages: one file."""

    page_bytes: int

    def image_of(self, index: int) -> Image | None:
        """The image in flight that page `index` is in, if there is one."""
        ...

    def is_changed(self, index: int) -> bool:
        """Whether page `index` is newer than the device and than its image in flight."""
        ...

    def take_image(self, index: int, stop: int, memory: memoryview) -> Image:
        """A copy, in `memory`, of the changed pages from `index` on: as many as are adjacent, before `stop`, and fit.

        Called only where `index` is changed and in no image.
        """
        ...

    async def write_image(self, image: Image, memory: memoryview) -> None:
        """Write it and note how that went in `image`; raises nothing that stops other runs."""
        ...


class _Outcome:
    """The first error of several runs."""

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def note(self, error: BaseException | None) -> None:
        if self.error is None:
            self.error = error


def adjacent_runs(indexes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(first, stop) of the runs in ascending `indexes`, cut at multiples of `most`."""
    runs: list[tuple[int, int]] = []
    first = stop = -1
    for index in indexes:
        if index != stop or index % most == 0:
            if first >= 0:
                runs.append((first, stop))
            first = index
        stop = index + 1
    if first >= 0:
        runs.append((first, stop))
    return runs


async def write_out(source: Source, memory: ImageMemory, indexes: Sequence[int]) -> None:
    """Write the pages `indexes` (ascending) as they are now or newer, and wait for it.

    Those that are being written already are waited for. Raises the first error once all have ended.
    Cancelling the caller starts no more runs; those in flight go on as tasks of their own.
    """
    scheduler = await this_scheduler()
    runs = collections.deque(adjacent_runs(indexes, max(1, RUN_BYTES // source.page_bytes)))
    outcome = _Outcome()
    workers = [scheduler.spawn(_work(source, memory, runs, outcome)) for _ in range(min(len(runs), _WORKERS))]
    try:
        for worker in workers:
            await joined(worker)
    finally:
        runs.clear()
    if outcome.error is not None:
        raise outcome.error


async def _work(
    source: Source, memory: ImageMemory, runs: collections.deque[tuple[int, int]], outcome: _Outcome
) -> None:
    while runs:
        await _write_run(source, memory, *runs.popleft(), outcome)


async def _write_run(source: Source, memory: ImageMemory, index: int, stop: int, outcome: _Outcome) -> None:
    while index < stop:
        is_changed, before = source.is_changed(index), source.image_of(index)
        if before is not None:
            await wait(before.ended)
            outcome.note(before.error)
        if not is_changed:
            index += 1
            continue
        if before is not None:
            continue  # Somebody else may have taken an image of it again.
        with await memory.take((stop - index) * source.page_bytes) as lease:
            if source.is_changed(index) and source.image_of(index) is None:
                image = source.take_image(index, stop, lease.view)
                await source.write_image(image, lease.view)
                outcome.note(image.error)
                index += len(image.pages)
