"""What the tests of `dio` share: running a coroutine over devices, data, and memory laid out oddly."""

from __future__ import annotations

import random
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from odirect.block.bio import Bio
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice
from odirect.block.filters.base import Filter, private_buffer
from odirect.sched.drive_sync import Stalled
from odirect.sched.scheduler import Scheduler, Task

T = TypeVar("T")


def drive(coroutine: Coroutine[Any, Any, T], *devices: BlockDevice) -> T:
    """What `coroutine` returns, run over devices that finish whatever was committed at the next look.

    Raises Stalled if it waits for what will never come.
    """
    scheduler = Scheduler()
    for device in devices:
        scheduler.add_device(device)
    task = scheduler.spawn(coroutine)
    pump(scheduler, task)
    return task.result()


def pump(scheduler: Scheduler, *tasks: Task[Any]) -> None:
    """Run until all of `tasks` have ended."""
    silent = 0
    while silent < 1000:
        scheduler.run_ready()
        if all(task.done for task in tasks):
            return
        scheduler.commit()
        finished = [bio for device in scheduler.devices for bio in device.poll(0)]
        silent = 0 if finished else silent + 1
        scheduler.dispatch(finished)
    raise Stalled(f"{tasks} wait for what never comes")


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes in which nothing repeats, so that whatever is misplaced is seen."""
    return random.Random(seed).randbytes(length)


def aligned(data: bytes, memory_align: int = 4096) -> memoryview:
    """Aligned memory with a copy of `data`."""
    view = private_buffer(len(data), memory_align) if data else empty(0)
    view[:] = data
    return view


def laid_out(data: bytes, cuts: Sequence[int], skew: Sequence[int]) -> list[memoryview]:
    """`data` in segments that end at `cuts`, the n-th one `skew[n]` bytes off a page's start in memory."""
    ends = [*sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    segments = []
    start = 0
    for number, end in enumerate(ends):
        away = skew[number % len(skew)] if skew else 0
        area = empty(away + end - start)
        area[away:] = data[start:end]
        segments.append(area[away:])
        start = end
    return segments


class Watch(Filter):
    """Passes everything on; `seen` are the bios in order of submission, `most` how many were in flight at once."""

    def __init__(self, lower: BlockDevice) -> None:
        super().__init__(lower)
        self.seen: list[tuple[int, int, int, int]] = []
        self.bios: list[Bio] = []
        self.open: set[Bio] = set()
        self.most = 0

    def submit(self, bio: Bio) -> None:
        self.lower.submit(bio)
        self.seen.append((bio.op, bio.addr, bio.length, bio.flags))
        self.bios.append(bio)
        self.open.add(bio)
        self.most = max(self.most, len(self.open))

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        finished = self.lower.poll(timeout_ns)
        self.open.difference_update(finished)
        return finished
