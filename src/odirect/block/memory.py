"""A block device in memory, which holds its callers strictly to its limits."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
from typing import TYPE_CHECKING

from odirect.base.errors import ClosedError
from odirect.block.bio import DISCARD, READ, WRITE, ZERO
from odirect.block.check import refusal
from odirect.block.device import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from odirect.block.bio import Bio

_ZEROES = bytes(1 << 16)


class MemoryDevice:
    """A BlockDevice whose bytes are a `bytearray`. What it takes it does; nothing is ever lost.

    A bio is carried out by the `poll` that returns it, in the order of submission, and not before
    it was committed: who touches a buffer that the device still owns, or forgets to commit, is
    found out. `submit` and `commit` may be called by one thread while another polls.
    """

    def __init__(
        self, size_bytes: int, *, limits: Limits | None = None, data: bytes | bytearray | memoryview | None = None
    ) -> None:
        """A device of `size_bytes`, zeroed, or starting with a copy of `data`.

        Without `limits`: 512-byte sectors and memory alignment, discard and FUA, no volatile cache.
        Raises ValueError for a negative size, or more data than size.
        """
        if size_bytes < 0:
            raise ValueError(f"a device cannot have {size_bytes} bytes")
        if data is not None and len(data) > size_bytes:
            raise ValueError(f"{len(data)} bytes of data do not fit a device of {size_bytes}")
        self._limits = limits or Limits(
            fua=True, discard=True, volatile_cache=False, sources={"logical_block": "default"}
        )
        self._store = bytearray(size_bytes)
        if data is not None:
            self._store[: len(data)] = data
        self._queued: list[Bio] = []
        self._committed: collections.deque[Bio] = collections.deque()
        self._event = -1
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """The device's end (B09)."""
        return len(self._store)

    @property
    def limits(self) -> Limits:
        """What the device takes and promises; enforced."""
        return self._limits

    @property
    def data(self) -> memoryview:
        """The device's bytes themselves, for looking at and changing them past the device."""
        return memoryview(self._store)

    def submit(self, bio: Bio) -> None:
        """Queue `bio`. Raises ClosedError after `close`."""
        if self._closed:
            raise ClosedError("the memory device is closed")
        bio.error = bio.done_bytes = 0
        self._queued.append(bio)

    def commit(self) -> None:
        """Make everything queued ready for `poll`."""
        if self._queued:
            queued, self._queued = self._queued, []
            self._committed.extend(queued)
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """What was committed, done now. Never waits: nothing takes time here."""
        if self._event >= 0:  # Reset before looking, so that what comes meanwhile wakes again.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event)
        finished: list[Bio] = []
        for _ in range(len(self._committed)):
            try:
                bio = self._committed.popleft()
            except IndexError:  # Another thread polls as well, and has taken it.
                break
            self._carry_out(bio)
            finished.append(bio)
        return finished

    @property
    def in_flight(self) -> int:
        """Bios submitted that `poll` has not yet returned."""
        return len(self._queued) + len(self._committed)

    def wakeup_fd(self) -> int | None:
        """An eventfd, made on first use; None after `close`."""
        if self._event < 0 and not self._closed:
            self._event = os.eventfd(1 if self._committed else 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._event if self._event >= 0 else None

    def close(self) -> None:
        """Do what was submitted (a later `poll` still returns it) and take no more."""
        if self._closed:
            return
        self._closed = True
        self.commit()
        if self._event >= 0:
            os.close(self._event)
            self._event = -1

    def _carry_out(self, bio: Bio) -> None:
        bio.error = refusal(bio, len(self._store), self._limits)
        if bio.error:
            return
        try:
            if bio.op == READ:
                self._read(bio)
            elif bio.op == WRITE:
                self._write(bio)
            elif bio.op in (DISCARD, ZERO):
                self._zero(bio)
        except (BufferError, TypeError, ValueError):  # The memory went away between check and use (F23).
            bio.error = errno.EFAULT
            bio.done_bytes = 0

    def _read(self, bio: Bio) -> None:
        place = bio.addr
        end = min(bio.addr + bio.length, len(self._store))
        with memoryview(self._store) as store:
            for segment in bio.segments:
                count = min(segment.nbytes, end - place)
                if count <= 0:
                    if place < end:
                        continue  # An empty segment, which cannot be cast.
                    break
                segment.cast("B")[:count] = store[place : place + count]
                place += count
        bio.done_bytes = place - bio.addr

    def _write(self, bio: Bio) -> None:
        place = bio.addr
        with memoryview(self._store) as store:
            for segment in bio.segments:
                if segment.nbytes:  # An empty one cannot be cast.
                    store[place : place + segment.nbytes] = segment.cast("B")
                    place += segment.nbytes
        bio.done_bytes = bio.length

    def _zero(self, bio: Bio) -> None:
        place, end = bio.addr, bio.addr + bio.length
        with memoryview(self._store) as store:
            while place < end:
                count = min(len(_ZEROES), end - place)
                store[place : place + count] = _ZEROES[:count]
                place += count
        bio.done_bytes = bio.length
