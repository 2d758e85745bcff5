"""A plain file through the page cache, leaving nothing in it: where direct I/O is refused.

Any offset, length and address will do. A write has been written back, and its pages dropped, when
its bio finishes, so that the device's errors are seen at once (F41) and a direct read right after
sees the data. The kernel merges a part of a block under the file's own lock: no other writer's
bytes are lost, and the file's size is exact at every moment (F03, F05).
"""

from __future__ import annotations

import collections
import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from odirect.base.units import align_down, align_up
from odirect.block.bio import ATOMIC, DISCARD, FLUSH, FUA, META, NOWAIT, PREFLUSH, READ, WRITE, Bio
from odirect.block.device import Limits
from odirect.block.file_device import file_bytes
from odirect.ring._calls import fallocate, sync_file_range
from odirect.ring.contract import RWF_DONTCACHE, RWF_DSYNC, RWF_NOWAIT

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_WAIT_AND_WRITE = 1 | 2 | 4  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE, _WAIT_AFTER
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

#: What the page cache takes: anything.
CACHED_LIMITS = Limits(
    logical_block=1,
    physical_block=1,
    read_align=1,
    write_align=1,
    memory_align=1,
    max_bio_bytes=1 << 20,
    fua=True,
    discard=True,
    sources=dict.fromkeys(("read_align", "write_align", "memory_align"), "page cache"),
)


class _EventFd:
    """An eventfd that is closed with its last reference: a device may be thrown away with its event loop."""

    def __init__(self, count: int) -> None:
        self.fd = os.eventfd(count, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.fd)


class CachedFileDevice:
    """A descriptor open without O_DIRECT, one bounded bio at a time or `workers` of them.

    workers=0 does the bios in the thread that polls, for synchronous callers; else that many
    threads do them, which start with the first bio and end at `close`. The descriptor is the caller's.
    """

    limits = CACHED_LIMITS

    def __init__(self, fd: int, *, workers: int = 0) -> None:
        self._event: _EventFd | None = None
        self.fd = fd
        self.uses_dontcache = True  # until the kernel refuses it
        self._workers = workers
        self._queued: collections.deque[Bio] = collections.deque()
        self._finished: collections.deque[Bio] = collections.deque()
        self._running = 0
        self._pool: ThreadPoolExecutor | None = None
        self._condition = threading.Condition()
        # Pages that were read ahead are nobody's to drop.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def size_bytes(self) -> int:
        """The present size of the file."""
        return file_bytes(self.fd)

    @property
    def in_flight(self) -> int:
        """Bios submitted that `poll` has not yet returned."""
        with self._condition:
            return len(self._queued) + self._running + len(self._finished)

    def submit(self, bio: Bio) -> None:
        """Queue `bio`."""
        self._queued.append(bio)

    def commit(self) -> None:
        """Start the threads on what is queued; without threads, `poll` does it."""
        if not self._workers or not self._queued:
            return
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="odirect-cached")
        while self._queued:
            with self._condition:
                bio = self._queued.popleft()
                self._running += 1
            self._pool.submit(self._work, bio)

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios; see `BlockDevice.poll`."""
        if not self._workers:
            while self._queued:
                # Off the queue when it is done: what an interrupt leaves half done is done again.
                self._perform(self._queued[0])
                self._finished.append(self._queued.popleft())
            done = list(self._finished)
            self._finished.clear()
            return done
        with self._condition:
            if not self._finished and self._running and timeout_ns:
                self._condition.wait(None if timeout_ns < 0 else timeout_ns / 1e9)
            if self._event is not None and self._finished:
                os.eventfd_read(self._event.fd)
            taken = list(self._finished)
            self._finished.clear()
            return taken

    def wakeup_fd(self) -> int | None:
        """An eventfd that the threads write; None without threads, where `poll` itself does the work."""
        if not self._workers:
            return None
        with self._condition:
            if self._event is None:
                self._event = _EventFd(len(self._finished))
            return self._event.fd

    def close(self) -> None:
        """Wait for the threads and end them."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        self._event = None

    def _work(self, bio: Bio) -> None:
        self._perform(bio)
        with self._condition:
            self._running -= 1
            self._finished.append(bio)
            if self._event is not None:
                os.eventfd_write(self._event.fd, 1)
            self._condition.notify()

    def _perform(self, bio: Bio) -> None:
        bio.error = bio.done_bytes = 0
        try:
            if bio.op == READ:
                self._read(bio)
            elif bio.op == WRITE:
                self._write(bio)
            elif bio.op == FLUSH:
                (os.fsync if bio.flags & META else os.fdatasync)(self.fd)
            else:
                mode = _PUNCH_HOLE if bio.op == DISCARD else _ZERO_RANGE
                bio.error = -min(0, fallocate(self.fd, mode | _KEEP_SIZE, bio.addr, bio.length))
        except OSError as error:
            bio.error = error.errno or errno.EIO
        except (BufferError, TypeError, ValueError):  # not memory, or memory that was released (B08)
            bio.error = errno.EFAULT

    def _read(self, bio: Bio) -> None:
        flags = RWF_NOWAIT if bio.flags & NOWAIT else 0
        bio.done_bytes = self._dontcache(lambda extra: os.preadv(self.fd, bio.segments, bio.addr, flags | extra))
        self._drop(bio.addr, bio.done_bytes)

    def _write(self, bio: Bio) -> None:
        if bio.flags & ATOMIC:
            bio.error = errno.EINVAL
            return
        if bio.flags & PREFLUSH:
            os.fdatasync(self.fd)
        flags = (RWF_NOWAIT if bio.flags & NOWAIT else 0) | (RWF_DSYNC if bio.flags & FUA else 0)
        bio.done_bytes = self._dontcache(lambda extra: os.pwritev(self.fd, bio.segments, bio.addr, flags | extra))
        if bio.done_bytes and not bio.flags & FUA:
            # Not a promise of durability (no cache is flushed), but the device's error is seen.
            answer = sync_file_range(self.fd, bio.addr, bio.done_bytes, _WAIT_AND_WRITE)
            if answer < 0 and answer not in (-errno.ENOSYS, -errno.ESPIPE, -errno.EINVAL):
                bio.error = -answer
                return
        self._drop(bio.addr, bio.done_bytes)

    def _dontcache(self, call: Callable[[int], int]) -> int:
        """`call` with RWF_DONTCACHE where the kernel has it (6.14), else without."""
        if self.uses_dontcache:
            try:
                return call(RWF_DONTCACHE)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.uses_dontcache = False
        return call(0)

    def _drop(self, offset: int, length: int) -> None:
        if length:
            # RWF_DONTCACHE spares the cache meanwhile, but leaves pages that it did not make, or that were
            # written back by somebody else. The kernel drops whole pages only, so a page that is touched
            # in part is named in full.
            start = align_down(offset, mmap.PAGESIZE)
            end = align_up(offset + length, mmap.PAGESIZE)
            os.posix_fadvise(self.fd, start, end - start, os.POSIX_FADV_DONTNEED)
