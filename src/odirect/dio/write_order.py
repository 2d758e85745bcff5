"""Direct writes of a file and its writes through the page cache, kept apart where they would meet.

An asynchronous direct write has let go of the kernel's lock on the file while the device works. If a
part of a block is merged in the page cache meanwhile, the page is filled with the block as it was, and
two things can happen: writing the page back undoes the direct write beside it, or the kernel cannot
drop the page behind the direct write, notes that as a failed write-back, and the next sync of anybody is
EIO (`dio_warn_stale_pagecache`). Both happen to neighbours that share no byte. So a merge and a direct
write of one open file never meet in a block: `WriteOrder` sees to it among the tasks of one scheduler,
`WriteGate` among threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType

from odirect.base.units import align_down, align_up
from odirect.sched.locks import Count, Held, RangeLock

# The page cache works in pages and in the file system's blocks; there are none larger than this.
_LARGEST_BLOCK = 64 << 10


class WriteOrder:
    """Among the tasks of one scheduler: whoever writes directly shares a block, whoever merges has it alone.

    quick: direct writes that are on the ring without a task; they cannot wait, so none is begun while
    `merging` (merges under way or waiting) is not 0.
    """

    def __init__(self) -> None:
        self.quick = Count()
        self.merging = 0
        self._ranges = RangeLock()

    async def direct(self, offset: int, length: int) -> Held:
        """The range, held against merges; direct writes don't exclude each other."""
        start, size = _blocks(offset, length)
        return await self._ranges.hold(start, size, shared=True)

    async def merge(self, offset: int, length: int) -> Merge:
        """The range, held against direct writes."""
        start, size = _blocks(offset, length)
        self.merging += 1
        try:
            await self.quick.zero()
            return Merge(self, await self._ranges.hold(start, size))
        except BaseException:
            self.merging -= 1
            raise


class Merge:
    """A range that is held for a merge. A context manager."""

    __slots__ = ("_held", "_order")

    def __init__(self, order: WriteOrder, held: Held) -> None:
        self._order = order
        self._held = held

    def __enter__(self) -> Merge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._order.merging -= 1
        self._held.release()


class WriteGate:
    """Among threads: many write directly, or one merges. Not to be entered twice by one thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._direct = 0
        self._merging = False
        self._waiting = 0

    @contextlib.contextmanager
    def direct(self) -> Iterator[None]:
        """Nobody merges meanwhile; whoever waits to merge goes first."""
        entered = 0  # A signal's exception may come anywhere: only what was counted is given back.
        try:
            with self._changed:
                while self._merging or self._waiting:
                    self._changed.wait()
                entered = 1
                self._direct += entered
            yield
        finally:
            with self._changed:
                self._direct -= entered
                self._changed.notify_all()

    @contextlib.contextmanager
    def merge(self) -> Iterator[None]:
        """Nobody else merges or writes directly meanwhile."""
        entered = False
        try:
            with self._changed:
                self._waiting += 1
                try:
                    while self._merging or self._direct:
                        self._changed.wait()
                    self._merging = entered = True
                finally:
                    self._waiting -= 1
            yield
        finally:
            with self._changed:
                if entered:
                    self._merging = False
                self._changed.notify_all()


def _blocks(offset: int, length: int) -> tuple[int, int]:
    start = align_down(offset, _LARGEST_BLOCK)
    return start, align_up(offset + length, _LARGEST_BLOCK) - start
