"""The alignments that direct reads of a file really need, found by reading it.

For file systems that say nothing in statx and whose rule is not known (old kernels, network file
systems, FUSE). Nothing is ever written. Source: F50, F51, open(2) under O_DIRECT, cachestat(2).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from typing import NamedTuple

from odirect.base.units import align_down, align_up
from odirect.block.support import DirectSupport
from odirect.ring._calls import address_of, cachestat

_LARGEST_PROBED = 65536
_SMALLEST_OFFSET_PROBED = 512
_SMALLEST_MEMORY_PROBED = 4


class Probed(NamedTuple):
    """What `probe` found. Alignments of 0: nothing could be found, and `why` says what was in the way."""

    offset_align: int
    memory_align: int
    support: DirectSupport
    why: str


class _Unsettled(Exception):
    """The probe met an error that says nothing about alignment."""


def probe(fd: int) -> Probed:
    """The smallest alignments with which the kernel really reads the file directly, found by reading.

    The file is opened again (through /proc, so `fd` itself is left alone) and read with ever smaller
    offsets, lengths and addresses until the kernel refuses one with EINVAL, or serves it from the page
    cache, which cachestat(2) tells if a part of the file was not cached before; what the probe itself
    brought into the cache is dropped again. Reads say nothing sure of writes: the same is assumed.

    An empty file cannot be probed. Source: F50, F51, open(2) under O_DIRECT, cachestat(2).
    """
    size = os.fstat(fd).st_size
    if not size:
        return _unknown("an empty file cannot be probed")
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            refused = "the kernel refuses O_DIRECT when the file is opened"
            return Probed(0, 0, DirectSupport(False, False, refused), refused)
        return _unknown(f"it cannot be opened again for a probe: {error.strerror}")
    try:
        return _probe_open(direct, size)
    except _Unsettled as error:
        return _unknown(f"the probe failed: {error}")
    finally:
        os.close(direct)


def _unknown(why: str) -> Probed:
    return Probed(0, 0, DirectSupport(True, True, f"not sure: {why}"), why)


def _probe_open(fd: int, size: int) -> Probed:
    # Read-ahead would bring in, and evict, more than what is asked for.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    place = _place(fd, size)
    if place is None:
        return _unknown("it has no data where a read would reach the device")
    start, end, judged = place
    with mmap.mmap(-1, 4 * _LARGEST_PROBED) as memory, memoryview(memory) as view:
        base = -address_of(memory) % _LARGEST_PROBED
        # btrfs serves a read into pages that were never touched from its cache.
        view[:] = bytes(len(view))

        def is_direct(offset: int, length: int, shift: int) -> bool:
            """Whether this read is taken, and not served from the cache as far as we can see."""
            first = base + shift
            try:
                with view[first : first + length] as segment:
                    os.preadv(fd, [segment], offset)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return False
                raise _Unsettled(error.strerror or str(error)) from None
            if not judged or not _cached_pages(fd, start):
                return True
            os.posix_fadvise(fd, start, 2 * _LARGEST_PROBED, os.POSIX_FADV_DONTNEED)
            return False

        def by_offset(unit: int) -> bool:
            # An odd multiple of the unit, so that no larger alignment is met by chance; reads start
            # inside the data, since elsewhere file systems answer without looking.
            return is_direct(start + unit if start + unit < end else start, unit, 0)

        if not is_direct(start, _LARGEST_PROBED, 0):
            refused = f"reads aligned to {_LARGEST_PROBED} bytes are refused or served from the page cache"
            return Probed(0, 0, DirectSupport(False, False, refused), refused)
        offset_align = _smallest(by_offset, _SMALLEST_OFFSET_PROBED)
        memory_align = offset_align
        # Linux 6.18 lets a read within one page pass unchecked, so it takes more data to see what
        # memory must be; what offsets must be is enough for it on every kernel.
        if end - start >= _LARGEST_PROBED:
            memory_align = _smallest(lambda unit: is_direct(start, _LARGEST_PROBED, unit), _SMALLEST_MEMORY_PROBED)
    if offset_align == 1 and not judged:
        return _unknown("the kernel takes any alignment, and whether it is direct cannot be seen")
    why = "found by reading; writes not tried"
    if not judged:
        why += ", and whether reads are served from the cache could not be seen"
    return Probed(offset_align, memory_align, DirectSupport(True, True, why), "")


def _smallest(accepted: Callable[[int], bool], floor: int) -> int:
    """The smallest power of two, from the largest probed down to `floor`, that is accepted; 1 if anything is."""
    unit = _LARGEST_PROBED
    while unit > floor and accepted(unit // 2):
        unit //= 2
    return 1 if unit == floor and accepted(1) else unit


def _place(fd: int, size: int) -> tuple[int, int, bool] | None:
    """(start, end, judged) of a run of data to probe in, or None if no such run is found.

    Holes will not do: nothing of them is asked of the device. `judged` says that the cache tells
    what is direct, which it does where nothing of the probed part is cached before.
    """
    step = 2 * _LARGEST_PROBED
    second_best = None
    for guess in (0, size // 2, size - 1):
        try:
            first = os.lseek(fd, align_down(guess, step), os.SEEK_DATA)
            start = align_up(first, step)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError:
            continue  # no data behind this point, or the file system is unable to say
        if start >= end:
            continue
        if _cached_pages(fd, start) == 0:
            return start, end, True
        second_best = second_best or (start, end, False)
    return second_best


def _cached_pages(fd: int, start: int) -> int | None:
    """Pages of the probed part that are in the page cache; None where the kernel does not tell (before 6.5)."""
    try:
        answer = cachestat(fd, start, 2 * _LARGEST_PROBED)
    except OSError:
        return None  # some file systems do not take part
    return None if answer is None else answer[0]
