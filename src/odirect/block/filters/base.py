"""What all filters share: handing bios down, and handing back what the lower device finished.

`Filter` changes nothing. `ActiveFilter` may also finish a bio by itself, or send bios of its own
to the lower device; its `poll` then has to wait for both. Either hands up unchanged every bio that
somebody else sent straight to the lower device.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import mmap
import os
import select
import threading
from typing import TYPE_CHECKING

from odirect.base.errors import ClosedError, from_errno
from odirect.base.units import align_up
from odirect.block.bio import READ, Bio
from odirect.block.buffers import empty
from odirect.ring._calls import address_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from odirect.block.device import BlockDevice, Limits

#: How often in a row `close` lets the lower device answer nothing before it believes that what is
#: in flight there never comes back, as after a power cut.
_PATIENCE = 64


class Filter:
    """A device with the verbs of the one below, doing the same."""

    def __init__(self, lower: BlockDevice) -> None:
        self.lower = lower

    @property
    def size_bytes(self) -> int:
        """The lower device's end."""
        return self.lower.size_bytes

    @property
    def limits(self) -> Limits:
        """The lower device's limits."""
        return self.lower.limits

    def submit(self, bio: Bio) -> None:
        """Queue `bio` on the lower device."""
        self.lower.submit(bio)

    def commit(self) -> None:
        """Hand over everything queued."""
        self.lower.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios."""
        return self.lower.poll(timeout_ns)

    @property
    def in_flight(self) -> int:
        """The lower device's, strangers' bios included."""
        return self.lower.in_flight

    def wakeup_fd(self) -> int | None:
        """The lower device's."""
        return self.lower.wakeup_fd()

    def wakeup_fds(self) -> list[int] | None:
        """All descriptors that can announce a finished bio, down to the lowest device; None: cannot be told.

        A filter over filters watches these directly: the kernel nests epolls only a few deep.
        """
        return wakeup_fds_of(self.lower)

    def close(self) -> None:
        """Close the lower device."""
        self.lower.close()


class ActiveFilter(Filter):
    """A filter that finishes bios of its own accord or has children on the lower device.

    Subclasses override `submit`, `commit`, `_returned` (a bio that the lower device finished),
    `_advance` (do what can be done by now) and `_kept` (how many bios they hold), and call
    `_finish` for what is to come out of `poll`. `_lock` guards their state: one thread may poll
    while another submits; the lower device is never waited for under it.
    """

    def __init__(self, lower: BlockDevice) -> None:
        super().__init__(lower)
        self._lock = threading.RLock()
        self._finished: collections.deque[Bio] = collections.deque()
        self._event = -1
        self._epoll: select.epoll | None = None
        self._closed = False

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios; with -1, waits until there is one or nothing of this filter's is in flight."""
        waited = False
        while True:
            descriptor = self.wakeup_fd() if timeout_ns else None
            self._collect(self.lower.poll(0))
            finished = self._take()
            if finished or timeout_ns == 0 or (waited and timeout_ns > 0):
                return finished
            if descriptor is None or not self.is_busy:
                # Nothing here can wake anybody up: the lower device knows best how to wait.
                self._collect(self.lower.poll(timeout_ns))
                finished = self._take()
                if finished or timeout_ns > 0 or not self.is_busy:
                    return finished
            else:
                poller = select.poll()
                poller.register(descriptor, select.POLLIN)
                poller.poll(None if timeout_ns < 0 else -(-timeout_ns // 1_000_000))
                waited = True

    @property
    def in_flight(self) -> int:
        """Bios that are here, and all on the lower device: children and strangers' too."""
        return len(self._finished) + self._kept() + self.lower.in_flight

    @property
    def is_busy(self) -> bool:
        """Whether a later `poll` may have more to return than what is finished already."""
        return bool(self._kept() or self.lower.in_flight)

    def wakeup_fd(self) -> int | None:
        """A descriptor that is readable when this filter or the lower device has finished bios."""
        if self._epoll is None and not self._closed:
            descriptors = self.wakeup_fds()
            if descriptors is None:
                return None
            epoll = select.epoll()
            for descriptor in descriptors:
                epoll.register(descriptor, select.EPOLLIN)
            self._epoll = epoll
        return None if self._epoll is None else self._epoll.fileno()

    def wakeup_fds(self) -> list[int] | None:
        """This filter's own eventfd, and those below."""
        below = super().wakeup_fds()
        if below is None or self._closed:
            return None
        with self._lock:
            if self._event < 0:
                self._event = os.eventfd(1 if self._finished else 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return [self._event, *below]

    def close(self) -> None:
        """Finish what is in flight, then close the lower device; a later `poll` still returns what was finished."""
        if self._closed:
            return
        self.commit()
        silent = 0
        while self.is_busy and silent < _PATIENCE:
            back = self.lower.poll(-1)
            self._collect(back)
            silent = 0 if back else silent + 1
        self._closed = True
        self.lower.close()
        self._collect(self.lower.poll(0))
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        if self._event >= 0:
            os.close(self._event)
            self._event = -1

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the device is closed")

    def _returned(self, bio: Bio) -> None:
        """The lower device has finished `bio`: ours, a child's, or a stranger's."""
        self._finish(bio)

    def _advance(self) -> None:
        """Do what can be done by now."""

    def _kept(self) -> int:
        """How many bios are here that are neither finished nor on the lower device."""
        return 0

    def _finish(self, bio: Bio) -> None:
        """Let the next `poll` return `bio`."""
        self._finished.append(bio)
        if self._event >= 0:
            os.eventfd_write(self._event, 1)

    def _collect(self, bios: Iterable[Bio]) -> None:
        with self._lock:
            for bio in bios:
                self._returned(bio)
            self._advance()

    def _take(self) -> list[Bio]:
        with self._lock:
            if self._event >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._event)
            finished = list(self._finished)
            self._finished.clear()
            return finished


def wakeup_fds_of(device: BlockDevice) -> list[int] | None:
    """All descriptors that can announce a finished bio of `device`, or None if it has none."""
    if isinstance(device, Filter):
        return device.wakeup_fds()
    descriptor = device.wakeup_fd()
    return None if descriptor is None else [descriptor]


def private_buffer(length: int, memory_align: int) -> memoryview:
    """`length` zeroed bytes of fresh memory whose address is a multiple of `memory_align`."""
    if memory_align <= mmap.PAGESIZE:
        return empty(length)
    view = empty(length + memory_align)
    skip = -address_of(view) % memory_align
    return view[skip : skip + length]


def joined(segments: Sequence[memoryview]) -> bytes:
    """A copy of the bytes that `segments` hold. Raises ValueError if one of them was released."""
    return b"".join(segments)


def scatter(data: bytes | memoryview, segments: Sequence[memoryview]) -> int:
    """Copy `data` into `segments` from their start; returns how many bytes there was room for."""
    place = 0
    for segment in segments:
        count = min(segment.nbytes, len(data) - place)
        if count > 0:
            segment.cast("B")[:count] = data[place : place + count]
            place += count
    return place


def child_of(
    op: int, addr: int, segments: Sequence[memoryview], length: int, flags: int = 0, private: object = None
) -> Bio:
    """A bio of a filter's own; nobody but its filter's `_returned` ever sees it."""
    return Bio(op, addr, segments, length, flags, None, private)


def read_whole(device: BlockDevice, strays: list[Bio]) -> bytes:
    """All bytes of `device`, read now, waiting; what else it finishes meanwhile goes to `strays`.

    Raises DeviceError (or what the errno calls for) if a part cannot be read.
    """
    limits = device.limits
    step = limits.max_bio_bytes - limits.max_bio_bytes % limits.read_align
    image = bytearray()
    while len(image) < device.size_bytes:
        length = min(step, align_up(device.size_bytes - len(image), limits.read_align))
        buffer = private_buffer(length, limits.memory_align)
        bio = child_of(READ, len(image), (buffer,), length)
        device.submit(bio)
        device.commit()
        back = False
        while not back:
            for finished in device.poll(-1):
                if finished is bio:
                    back = True
                else:
                    strays.append(finished)
        if bio.error or not bio.done_bytes:
            raise from_errno(bio.error or errno.EIO, f"reading {length} bytes at {bio.addr}")
        image += buffer[: bio.done_bytes]
    return bytes(image)
