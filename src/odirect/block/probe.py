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

from odirect.base.units import align_down
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
    start, judged = _quiet_start(fd, size)
    with mmap.mmap(-1, 4 * _LARGEST_PROBED) as memory, memoryview(memory) as view:
        base = -address_of(memory) % _LARGEST_PROBED

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
            # inside the file, since at its end some file systems answer 0 without looking.
            return is_direct(start + unit if start + unit < size else start, unit, 0)

        if not is_direct(start, _LARGEST_PROBED, 0):
            refused = f"reads aligned to {_LARGEST_PROBED} bytes are refused or served from the page cache"
            return Probed(0, 0, DirectSupport(False, False, refused), refused)
        offset_align = _smallest(by_offset, _SMALLEST_OFFSET_PROBED)
        length = max(offset_align, _SMALLEST_OFFSET_PROBED)
        memory_align = _smallest(lambda unit: is_direct(start, length, unit), _SMALLEST_MEMORY_PROBED)
    if offset_align == 1 and not judged:
        return _unknown("the kernel takes any alignment, and whether it is direct cannot be seen")
    seen = "" if judged else ", and whether reads are served from the cache could not be seen"
    return Probed(
        offset_align, memory_align, DirectSupport(True, True, f"found by reading; writes not tried{seen}"), ""
    )


def _smallest(accepted: Callable[[int], bool], floor: int) -> int:
    """The smallest power of two, from the largest probed down to `floor`, that is accepted; 1 if anything is."""
    unit = _LARGEST_PROBED
    while unit > floor and accepted(unit // 2):
        unit //= 2
    return 1 if unit == floor and accepted(1) else unit


def _quiet_start(fd: int, size: int) -> tuple[int, bool]:
    """Where to probe, and whether the cache tells: it does where nothing of it is cached before."""
    step = 2 * _LARGEST_PROBED
    for start in dict.fromkeys((0, align_down(size // 2, step), align_down(size - 1, step))):
        if _cached_pages(fd, start) == 0:
            return start, True
    return 0, False


def _cached_pages(fd: int, start: int) -> int | None:
    """Pages of the probed part that are in the page cache; None where the kernel does not tell (before 6.5)."""
    try:
        answer = cachestat(fd, start, 2 * _LARGEST_PROBED)
    except OSError:
        return None  # some file systems do not take part
    return None if answer is None else answer[0]
