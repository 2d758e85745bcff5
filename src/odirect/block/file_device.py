"""A plain file or block device that the kernel serves, as a block device of ours.

`FileDevice` goes past the page cache (the descriptor is open with O_DIRECT), over a ring.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence

from odirect.block.bio import ATOMIC, FLUSH, FUA, HIPRI, META, NOWAIT, PREFLUSH, WRITE, Bio
from odirect.block.device import Limits
from odirect.block.queue import RingQueue, Step
from odirect.ring.contract import (
    DATA_ONLY,
    DISCARD,
    FSYNC,
    RWF_ATOMIC,
    RWF_DSYNC,
    RWF_HIPRI,
    RWF_NOWAIT,
)

_BLKDISCARD = 0x1277  # linux/fs.h: _IO(0x12, 119)

# A flag of a bio, as the kernel's flag of a transfer: one look-up instead of four tests.
_RWF = {
    flags: (RWF_DSYNC if flags & FUA else 0)
    | (RWF_NOWAIT if flags & NOWAIT else 0)
    | (RWF_HIPRI if flags & HIPRI else 0)
    | (RWF_ATOMIC if flags & ATOMIC else 0)
    for flags in range(64)
}


def transfer_flags(flags: int) -> int:
    """The kernel's RWF_* flags of a transfer for a bio's flags."""
    return _RWF[flags & 63]


def file_bytes(fd: int) -> int:
    """The size of the file or block device that `fd` is open on, in bytes."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(fd, 0, os.SEEK_END)
    return status.st_size


class FileDevice:
    """A descriptor open with O_DIRECT, behind a `RingQueue` that it may share with others.

    The descriptor and the queue stay the caller's: `close` waits for this device's bios only as
    far as giving the ring's slot back needs, and closes neither.
    """

    def __init__(self, queue: RingQueue, fd: int, limits: Limits, *, register: bool = True) -> None:
        self.queue = queue
        self.limits = limits
        self.fd = fd
        self._registered = register
        self.handle = queue.ring.add_file(fd) if register else fd
        self._is_block = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._polls = limits.poll
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """The present size of the file or device. A regular file grows when it is written past it."""
        return file_bytes(self.fd)

    @property
    def in_flight(self) -> int:
        """Operations on the queue, this device's and others'."""
        return self.queue.in_flight

    def submit(self, bio: Bio) -> None:
        """Queue `bio` on the ring."""
        flags = bio.flags
        op = bio.op
        if op <= WRITE:
            if not flags:
                self.queue.submit(op, self.handle, bio, 0)
            elif flags & PREFLUSH and op == WRITE:
                self._submit_after_flush(bio)
            elif flags & HIPRI:
                self._submit_polled(bio)
            else:
                self.queue.submit(op, self.handle, bio, _RWF[flags & 63])
        elif op == FLUSH:
            self.queue.submit(FSYNC, self.handle, bio, 0 if flags & META else DATA_ONLY)
        elif op == DISCARD and self._is_block:
            step = Step(bio, lambda result: self._discarded(bio, result))
            self.queue.submit_step(DISCARD, self.handle, step, 0)
        else:
            self.queue.submit(op, self.handle, bio, 0)

    def commit(self) -> None:
        """Hand over everything queued."""
        self.queue.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios of all devices on the queue."""
        return self.queue.poll(timeout_ns)

    def wakeup_fd(self) -> int | None:
        """The queue's."""
        return self.queue.wakeup_fd()

    def close(self) -> None:
        """Give the ring's slot back. The descriptor stays open: it is the caller's."""
        if not self._closed:
            self._closed = True
            if self._registered:
                self.queue.ring.remove_file(self.handle)

    def _submit_after_flush(self, bio: Bio) -> None:
        """PREFLUSH: what was completed before is made durable, then the bio is written."""

        def flushed(result: int) -> int | None:
            if result < 0:
                return result
            bio.flags &= ~PREFLUSH
            self.submit(bio)
            return None

        self.queue.submit_step(FSYNC, self.handle, Step(bio, flushed), DATA_ONLY, data=False)

    def _submit_polled(self, bio: Bio) -> None:
        flags = _RWF[bio.flags & 63]
        if self._polls:

            def finished(result: int) -> int | None:
                if result not in (-errno.EOPNOTSUPP, -errno.EINVAL):
                    return result
                # It does not poll after all; from now on this flag is the harmless hint (B06).
                self._polls = False
                self.queue.submit(bio.op, self.handle, bio, flags & ~RWF_HIPRI)
                return None

            if self.queue.submit_polled(bio.op, self.fd, Step(bio, finished), flags & ~RWF_HIPRI):
                return
        self.queue.submit(bio.op, self.handle, bio, flags & ~RWF_HIPRI)

    def _discarded(self, bio: Bio, result: int) -> int:
        if result not in (-errno.EOPNOTSUPP, -errno.EINVAL):
            return result
        # A device that cannot promise zeroes afterwards refuses fallocate, not the ioctl.
        try:
            fcntl.ioctl(self.fd, _BLKDISCARD, struct.pack("QQ", bio.addr, bio.length))
        except OSError as error:
            return -(error.errno or errno.EIO)
        return 0
