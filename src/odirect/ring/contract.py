"""What a ring is: a queue of operations on descriptors, in order to hand over many in one call.

Two implementations: `_uring.pyx` (io_uring) and `threads.py` (preadv2/pwritev2). Both are held to
this contract by one conformance suite. A ring knows nothing of bios: it takes an operation with a
`tag` and gives the tag back with the kernel's answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

# Operations. The first five have the numbers of block.bio.Op.
READ = 0
WRITE = 1
FSYNC = 2
DISCARD = 3
ZERO = 4

# Flags of `queue`. RWF_* are the kernel's own (linux/fs.h), passed through.
RWF_HIPRI = 0x01
RWF_DSYNC = 0x02
RWF_SYNC = 0x04
RWF_NOWAIT = 0x08
RWF_APPEND = 0x10
RWF_ATOMIC = 0x40
RWF_DONTCACHE = 0x80
DATA_ONLY = 0x1000  # on FSYNC: fdatasync


class RingFeatures(NamedTuple):
    """What this ring found that the kernel gives it; for people and for tests."""

    single_issuer: bool
    defer_taskrun: bool
    fixed_files: bool
    fixed_buffers: bool
    iopoll: bool


class Ring(Protocol):
    """A queue of operations on file descriptors.

    A ring made with shared=False may be entered by the thread that made it alone (RuntimeError
    otherwise), one made with shared=True by any thread: one in `reap` at a time, others meanwhile
    in `queue` and `commit`, all of them under one lock of the caller's, which `reap` alone is
    called without.
    """

    @property
    def kind(self) -> str:
        """ "io_uring" or "threads"."""
        ...

    @property
    def depth(self) -> int:
        """How many operations the kernel is given at once; more are held back in order."""
        ...

    @property
    def features(self) -> RingFeatures: ...

    @property
    def in_flight(self) -> int:
        """Operations queued or submitted whose tag `reap` has not yet returned."""
        ...

    @property
    def interruptible(self) -> bool:
        """Whether this thread waits inside `reap`, where an exception of a signal's handler loses nothing."""
        ...

    def add_file(self, fd: int) -> int:
        """A handle for `fd`, to be passed to `queue`: a registered slot where the kernel has them."""
        ...

    def remove_file(self, handle: int) -> None:
        """Give the handle back; nothing of it may be in flight."""
        ...

    def add_buffer(self, buffer: object) -> bool:
        """Register this writable buffer, kept alive by the ring; False where that is not possible.

        Later operations of one segment inside it use it (READ_FIXED, WRITE_FIXED) by themselves.
        """
        ...

    def queue(
        self, op: int, handle: int, segments: Sequence[object], offset: int, length: int, flags: int, tag: object
    ) -> None:
        """Queue one operation; never blocks. The buffers and the tag are kept until it is reaped.

        handle: from `add_file`, or a descriptor as it is.
        segments: C-contiguous buffers (writable for READ), together `length` bytes; empty for
        FSYNC, DISCARD and ZERO. What cannot be queued is answered by `reap` with its errno.
        """
        ...

    def commit(self) -> None:
        """Hand everything queued to the kernel, in one system call where that is possible."""
        ...

    def reap(self, timeout_ns: int, into: list[tuple[object, int]] | None = None) -> list[tuple[object, int]]:
        """(tag, result) of finished operations; result is a byte count or a negative errno.

        into: a list that they are added to, and that is returned: then a handler that raises right behind
        this call takes nothing with it. Commits first what is queued. timeout_ns: 0 looks, -1 waits
        for one; at once if nothing is in flight. A signal's Python handler runs in here: its
        exception leaves, nothing is lost.
        """
        ...

    def holds(self, tag: object) -> bool:
        """Whether an operation with this very tag was queued and not yet reaped. Slow."""
        ...

    def wake(self) -> None:
        """Make the `reap` that is under way in another thread, or else the next one, return soon.

        It may return nothing then.
        """
        ...

    def wakeup_fd(self) -> int:
        """An eventfd, made and registered on first use, readable when there may be something to reap.

        `reap` resets it.
        """
        ...

    def transfer_batch(
        self,
        op: int,
        handle: int,
        buffer: object,
        stride: int,
        offsets: object,
        length: int,
        flags: int,
        results: object,
        depth: int,
    ) -> int:
        """Do many transfers of one length at once, `depth` in flight; how many are not whole.

        Element i moves `length` bytes between buffer[i*stride:] and file offset offsets[i].
        offsets: int64 array; results: int64 array of the same length, filled with byte counts or
        negative errnos. The loop runs without the GIL. Raises what a signal's handler raises,
        after everything in flight has come back. Nothing else may be in flight on this ring.
        """
        ...

    def close(self) -> None:
        """Wait for everything in flight (answers are dropped), then free the ring. Twice is harmless."""
        ...
