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

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar, cast

from odirect.base.errors import WouldBlockError
from odirect.base.units import align_down, align_up
from odirect.sched.locks import Count, Held, RangeLock

T = TypeVar("T")

# How often a thread looks by itself whether the others have left.
_LOOK_SECONDS = 0.01
# The page cache works in pages and in the file system's blocks; there are none larger than this.
_LARGEST_BLOCK = 64 << 10


class _Shut:
    """What the gate answers when it is closed for a merge."""


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

    def try_direct(self, offset: int, length: int) -> Held | None:
        """The range, held against merges, or None if that would have to wait."""
        start, size = _blocks(offset, length)
        return self._ranges.try_hold(start, size, shared=True)

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


class Crowd:
    """Threads that are inside something, and waiting until there are none.

    An exception of a signal's handler may come between any two calls, also inside the locks of
    `threading` that are written in Python. So there is none here: a list, whose methods are atomic, and
    a plain lock as a bell, which may be rung in vain or not at all.
    """

    def __init__(self) -> None:
        self._inside: list[int] = []
        self._bell = threading.Lock()

    def __contains__(self, thread: int) -> bool:
        return thread in self._inside

    def run(self, call: Callable[[], T]) -> T:
        """What `call` returns; this thread is inside meanwhile."""
        thread = threading.get_ident()
        try:
            self._inside.append(thread)
            return call()
        finally:
            self._inside.remove(thread)
            if not self._inside and self._bell.locked():
                self._ring()

    def wait(self) -> None:
        """Return when nobody is inside."""
        while self._inside:
            self._bell.acquire(blocking=False)
            if self._inside:
                self._bell.acquire(timeout=_LOOK_SECONDS)

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # Somebody else has rung it.


class WriteGate:
    """Among threads: many write directly, or one merges. Not to be entered twice by one thread."""

    def __init__(self) -> None:
        self._direct = Crowd()
        self._merges = threading.Lock()
        self._closed = False

    def direct(self, call: Callable[[], T], *, wait: bool = True) -> T:
        """What `call` returns; nobody merges meanwhile. Raises WouldBlockError if it may not wait for that."""
        while True:
            done = self._direct.run(lambda: _Shut if self._closed else call())
            if done is not _Shut:
                return cast(T, done)
            if not wait:
                raise WouldBlockError("writing without waiting: another thread merges a part of a block")
            with self._merges:
                pass

    def merge(self, call: Callable[[], T]) -> T:
        """What `call` returns; nobody else merges or writes directly meanwhile."""
        with self._merges:
            try:
                # Whoever writes directly is in the crowd before he looks at this: one of us sees the other.
                self._closed = True
                self._direct.wait()
                return call()
            finally:
                self._closed = False


def _blocks(offset: int, length: int) -> tuple[int, int]:
    start = align_down(offset, _LARGEST_BLOCK)
    return start, align_up(offset + length, _LARGEST_BLOCK) - start
