"""The image file or block device of a volume: opened past the page cache, locked, and given a ring.

Several readers, or one writer: an advisory lock (flock) says so to other programs that use this package
or heed such locks, O_EXCL to the kernel and to everybody who asks it, and mounts, loop devices and
swap are looked for by `block.in_use`.
Source: flock(2), open(2) under O_EXCL, F34.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from odirect.base.errors import InUseError, from_errno
from odirect.block.bio import READ, WRITE
from odirect.block.cached_file import CachedFileDevice
from odirect.block.device import BlockDevice, Limits
from odirect.block.file_device import FileDevice
from odirect.block.in_use import lock_holder, volume_closed, volume_opened
from odirect.block.queue import RingQueue
from odirect.dio.opening import Opened, Path, open_file
from odirect.dio.outcome import Kind, Outcome, Reason
from odirect.ring.choose import open_ring
from odirect.sched.clock import wall_ns
from odirect.sched.scheduler import Pollable, Scheduler

if TYPE_CHECKING:
    from odirect.fs.base import FileSystem

#: No file system here has smaller blocks.
SMALLEST_BLOCK_BYTES = 1024
# Threads for an image whose direct I/O is refused.
_CACHE_WORKERS = 4
# What an event loop's own ring takes at once, and its threads where there is no io_uring: nobody waits in it.
_LOOP_DEPTH = 256
_LOOP_WORKERS = 8
_PAST_THE_CACHE = (Kind.DIRECT, Kind.BOUNCED)


class LockedImage:
    """An image file or block device that is open and locked, before it is given a ring. Closed with its last reference.

    hold_fd: claims a block device; -1: there is no such claim.
    """

    def __init__(self, opened: Opened, hold_fd: int, name: str) -> None:
        self.opened = opened
        self.name = name
        self._hold_fd = hold_fd
        status = os.fstat(opened.cached_fd)
        self._identity: tuple[int, int] | None = status.st_dev, status.st_ino
        volume_opened(*self._identity)

    def close(self) -> None:
        """Unlock and close. Twice is harmless."""
        if self.opened.cached_fd >= 0:
            # By hand: a forked child may still have our descriptors, and with them the lock.
            try:
                fcntl.flock(self.opened.cached_fd, fcntl.LOCK_UN)
            except OSError:
                pass  # It was never locked, where locks are not to be had.
        self.forget()

    def forget(self) -> None:
        """Close the descriptors and nothing else: for a forked child, whose parent goes on."""
        hold_fd, self._hold_fd = self._hold_fd, -1
        if hold_fd >= 0:
            os.close(hold_fd)
        self.opened.close()
        identity, self._identity = self._identity, None
        if identity is not None:
            volume_closed(*identity)

    def __del__(self) -> None:
        self.forget()


class Image:
    """What a volume is on. `device` goes past the page cache where `is_direct`, and `scheduler` polls it.

    reasons: for READ and WRITE, why what reaches the device is in the page cache after all.
    """

    def __init__(self, locked: LockedImage, *, shared: bool = True) -> None:
        """shared: several threads use it; else it is for the event loop of this thread, which watches `polled`."""
        self.name = locked.name
        self.scheduler = Scheduler()
        self._locked = locked
        opened = locked.opened
        self._opened = opened
        self._queue: RingQueue | None = None
        self.device: BlockDevice
        self.reasons: dict[int, Reason] = dict(opened.state.refused) or dict(opened.state.cached)
        if opened.direct_fd < 0:
            self._use_cache()
            return
        ring = open_ring(shared=True) if shared else open_ring(_LOOP_DEPTH, workers=_LOOP_WORKERS)
        self._queue = RingQueue(ring)
        try:
            self.device = FileDevice(self._queue, opened.direct_fd, opened.state.limits)
        except BaseException:
            self._queue.close()
            raise
        self.scheduler.add_device(self._queue)

    @property
    def is_direct(self) -> bool:
        """Whether its bytes go past the page cache, as far as is known."""
        return not self.reasons

    @property
    def polled(self) -> Pollable:
        """What gives the finished bios of `device`; another after `use_cache`."""
        return self.device if self._queue is None else self._queue

    @property
    def limits(self) -> Limits:
        """The device's, each with its source."""
        return self.device.limits

    @property
    def align_bytes(self) -> int:
        """What every transfer's offset and length must be multiples of."""
        return max(self.limits.read_align, self.limits.write_align)

    @contextlib.contextmanager
    def beside(self) -> Iterator[BlockDevice]:
        """The same bytes through the page cache, for a look at them in pieces that the device does not take."""
        device = CachedFileDevice(self._opened.cached_fd, workers=1)
        self.scheduler.add_device(device)
        try:
            yield device
        finally:
            self.scheduler.remove_device(device)
            device.close()

    def use_cache(self) -> None:
        """Go through the page cache from now on, because the volume's blocks are smaller than the device's."""
        self._close_device()
        self.reasons = {READ: Reason.MISALIGNED_LENGTH, WRITE: Reason.MISALIGNED_LENGTH}
        self._use_cache()

    def seen(self, op: int, outcome: Outcome) -> Outcome:
        """The outcome of a transfer of the volume, with what the image's own file system does to it."""
        reason = self.reasons.get(op)
        if reason is None or outcome.kind not in _PAST_THE_CACHE:
            return outcome
        return Outcome(Kind.BUFFERED, reason, outcome.promise)

    def close(self) -> None:
        """Wait for what is in flight, unlock, close. Twice is harmless."""
        self._close_device()
        self._locked.close()

    def forget(self) -> None:
        """Close the descriptors and nothing else: for a forked child, whose parent goes on."""
        self._locked.forget()

    def _use_cache(self) -> None:
        self.device = device = CachedFileDevice(self._opened.cached_fd, workers=_CACHE_WORKERS)
        self.scheduler.add_device(device)

    def _close_device(self) -> None:
        queue, self._queue = self._queue, None
        if queue is None:
            if isinstance(self.device, CachedFileDevice):
                self.scheduler.remove_device(self.device)
                self.device.close()
            return
        self.device.close()
        self.scheduler.remove_device(queue)
        queue.close()


async def mount(image: Image, device: BlockDevice, *, writable: bool, use_reserved: bool) -> FileSystem:
    """The file system in an image, open. device: the image's, or the one `beside` it."""
    from odirect.fs.probe import open_filesystem

    return await open_filesystem(
        device,
        name=image.name,
        writable=writable,
        scheduler=image.scheduler,
        clock_ns=wall_ns,
        privileged=use_reserved,
    )


def open_image(path: Path, *, writable: bool, overwrite_in_use: bool = False) -> Image:
    """The image file or block device at `path`, locked: shared for reading, alone for writing.

    Raises InUseError with the reason, and the errors of `dio.opening.open_file`.
    """
    locked = lock_image(path, writable=writable, overwrite_in_use=overwrite_in_use)
    try:
        return Image(locked)
    except BaseException:
        locked.close()
        raise


def lock_image(path: Path, *, writable: bool, overwrite_in_use: bool = False) -> LockedImage:
    """The first part of `open_image`, which may block; any thread can make the `Image`."""
    opened = open_file(path, "r+" if writable else "r", overwrite_in_use=overwrite_in_use)
    try:
        _lock(opened, writable)
        claims = writable and opened.state.is_block and not overwrite_in_use
        return LockedImage(opened, _claim(opened) if claims else -1, os.fsdecode(path))
    except BaseException:
        opened.close()
        raise


def _lock(opened: Opened, writable: bool) -> None:
    fd = opened.cached_fd
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            return  # A file system without locks; who else is at it cannot be known there.
        verb = "write to" if writable else "read"
        raise InUseError(
            f"will not {verb} it: {lock_holder(fd)} has locked it (flock), as one that has a volume open does; "
            f"close that first{'' if writable else ' (it is open there for writing)'}",
            path=opened.state.path,
        ) from None


def _claim(opened: Opened) -> int:
    """A descriptor that holds the block device against mounts, and against others who ask as we do."""
    try:
        return os.open(f"/proc/self/fd/{opened.cached_fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            message = "will not write to it: it has just been mounted or claimed"
            raise InUseError(message, path=opened.state.path) from error
        raise from_errno(error.errno or errno.EIO, "claiming", opened.state.path) from error
