"""One ring, and the bios that are on it.

Several devices may share a queue. What the ring finishes is turned back into bios here; the
scheduler polls the queue, not each device, so that one system call serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from odirect.block.bio import Bio
from odirect.ring.contract import Ring


class Tag(Protocol):
    """What may be put on the ring besides bios: it is told the result, and takes it from there."""

    def finish(self, result: int) -> Bio | None:
        """The bio that this finishes, or None: there is none, or it has queued something more."""
        ...


class Step:
    """One of several operations that a bio takes.

    `judge(result)` returns the bio's result (bytes or a negative errno), or None when it has queued
    the next step.
    """

    __slots__ = ("_judge", "bio")

    def __init__(self, bio: Bio, judge: Callable[[int], int | None]) -> None:
        self.bio = bio
        self._judge = judge

    def finish(self, result: int) -> Bio | None:
        """See `Tag`."""
        judged = self._judge(result)
        if judged is None:
            return None
        _record(self.bio, judged)
        return self.bio


class RingQueue:
    """Bios on a ring, and on a second one that polls the device for HIPRI bios (B06)."""

    def __init__(self, ring: Ring, *, open_polled: Callable[[], Ring] | None = None) -> None:
        self.ring = ring
        self._open_polled = open_polled
        self._polled: Ring | None = None
        #: What the rings have answered and nobody has taken yet: also what an interrupt left.
        self._answers: list[tuple[object, int]] = []
        self._finished: list[Bio] = []
        self._woken = False

    @property
    def in_flight(self) -> int:
        """Operations that have not come back."""
        here = len(self._answers) + len(self._finished)
        return self.ring.in_flight + here + (self._polled.in_flight if self._polled is not None else 0)

    @property
    def interruptible(self) -> bool:
        """Whether this thread waits in a ring, where an exception of a signal's handler loses nothing."""
        return self.ring.interruptible or (self._polled is not None and self._polled.interruptible)

    def wake(self) -> None:
        """Make the `poll` that is under way in another thread return soon. Under the lock of whoever submits."""
        self._woken = True
        self.ring.wake()

    def submit(self, op: int, handle: int, bio: Bio, flags: int) -> None:
        """Queue a bio as one ring operation."""
        self.ring.queue(op, handle, bio.segments, bio.addr, bio.length, flags, bio)

    def submit_step(self, op: int, handle: int, step: Step, flags: int, *, data: bool = True) -> None:
        """Queue one operation of several of a bio; without its data if it is a flush before it."""
        bio = step.bio
        if data:
            self.ring.queue(op, handle, bio.segments, bio.addr, bio.length, flags, step)
        else:
            self.ring.queue(op, handle, (), 0, 0, flags, step)

    def submit_polled(self, op: int, fd: int, step: Step, flags: int) -> bool:
        """Queue a bio on the ring that polls the device; False if there is no such ring."""
        if self._polled is None:
            if self._open_polled is None:
                return False
            self._polled = self._open_polled()
        bio = step.bio
        self._polled.queue(op, fd, bio.segments, bio.addr, bio.length, flags, step)
        return True

    def commit(self) -> None:
        """Hand over everything queued."""
        self.ring.commit()
        if self._polled is not None:
            self._polled.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios of all devices on this queue. See `BlockDevice.poll`."""
        if self._answers or self._finished:
            timeout_ns = 0
        polled = self._polled
        if polled is None or not polled.in_flight:
            self.ring.reap(timeout_ns, self._answers)
            return self._settle()
        if not self.ring.in_flight:
            polled.reap(timeout_ns, self._answers)
            return self._settle()
        # Both are busy. HIPRI means that the processor may be spent on asking.
        while True:
            polled.reap(0, self._answers)
            self.ring.reap(0, self._answers)
            finished = self._settle()
            if finished or timeout_ns >= 0 or self._woken:
                self._woken = False
                return finished

    def wakeup_fd(self) -> int:
        """Readable when `poll(0)` would return bios."""
        return self.ring.wakeup_fd()

    def close(self) -> None:
        """Wait for everything in flight and close the rings."""
        try:
            self.ring.close()
        finally:
            if self._polled is not None:
                self._polled.close()

    def gather(self) -> list[tuple[object, int]] | None:
        """(tag, result) of what the ring has finished, after waiting for it, in a list that the caller empties.

        For those who put their own tags on the ring, and would have nothing of them called. What is left in the
        list is for the next `gather` or `poll`. None if this takes `poll`.
        """
        if self._polled is not None or self._finished:
            return None
        if not self._answers:
            self.ring.reap(-1, self._answers)
        return self._answers

    def _settle(self) -> list[Bio]:
        waiting = self._answers
        finished = self._finished
        unanswered = False
        while waiting:
            tag, result = waiting[0]
            del waiting[0]
            if type(tag) is Bio:
                _record(tag, result)
                finished.append(tag)
                continue
            request: Tag = tag  # type: ignore[assignment]
            bio = request.finish(result)
            if bio is None:
                unanswered = True
            else:
                finished.append(bio)
        if unanswered:
            self.commit()  # A step of a bio may have queued the next one.
        self._finished = []
        return finished


def _record(bio: Bio, result: int) -> None:
    if result < 0:
        bio.error = -result
    else:
        bio.done_bytes = result
