"""What a device refuses, told from the bio and the device's `Limits` alone."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from odirect.base.units import is_power_of_two
from odirect.block.bio import ATOMIC, DISCARD, FLUSH, FUA, READ, WRITE, ZERO
from odirect.ring._calls import address_of

if TYPE_CHECKING:
    from odirect.block.bio import Bio
    from odirect.block.device import Limits


def refusal(bio: Bio, size_bytes: int, limits: Limits) -> int:
    """The errno that a device of this size and these limits refuses `bio` with, or 0 if it takes it.

    EINVAL      offset, a length or a memory address is not aligned, more segments or bytes than a
                bio may have, lengths that contradict each other, an atomic write outside the limits
    EFAULT      memory that cannot be used: released, not contiguous, read-only under a READ (B08)
    ENOSPC      a WRITE, DISCARD or ZERO that goes past the end (B09)
    EOPNOTSUPP  an operation that is none, DISCARD where there is none, FUA on a device that has a
                volatile cache and no FUA (B05: such a device gets the write and then a flush)
    Source: B01, B02, B05, B09, F43, F51; for each segment's length the kernel's bdev_iter_is_aligned.
    """
    op = bio.op
    if op == FLUSH:
        return 0
    if bio.addr < 0 or bio.length < 0:
        return errno.EINVAL
    if op in (READ, WRITE):
        error = _data_refusal(bio, limits.read_align if op == READ else limits.write_align, limits)
    elif op in (DISCARD, ZERO):
        error = _range_refusal(bio, limits)
    else:
        error = errno.EOPNOTSUPP
    if error or op == READ:
        return error
    if bio.flags & FUA and limits.volatile_cache and not limits.fua:
        return errno.EOPNOTSUPP
    if bio.addr + bio.length > size_bytes:
        return errno.ENOSPC
    return 0


def _data_refusal(bio: Bio, align: int, limits: Limits) -> int:
    if len(bio.segments) > limits.max_segments or bio.length > limits.max_bio_bytes:
        return errno.EINVAL
    if (bio.addr | bio.length) & (align - 1):
        return errno.EINVAL
    memory_mask = limits.memory_align - 1
    total = 0
    for segment in bio.segments:
        try:
            if bio.op == READ and segment.readonly:
                return errno.EFAULT
            if not segment.c_contiguous:
                return errno.EFAULT
            count = segment.nbytes
            if count & (align - 1) or (memory_mask and address_of(segment) & memory_mask):
                return errno.EINVAL
        except (AttributeError, BufferError, TypeError, ValueError):  # not memory, or memory that was released
            return errno.EFAULT
        total += count
    if total != bio.length:
        return errno.EINVAL
    return _atomic_refusal(bio, limits) if bio.flags & ATOMIC else 0


def _range_refusal(bio: Bio, limits: Limits) -> int:
    if bio.op == DISCARD and not limits.discard:
        return errno.EOPNOTSUPP
    if bio.segments or bio.flags & ATOMIC or (bio.addr | bio.length) & (limits.logical_block - 1):
        return errno.EINVAL
    return 0


def _atomic_refusal(bio: Bio, limits: Limits) -> int:
    """EINVAL for an atomic write that `limits` does not promise to keep whole, else 0 (F43).

    Source: generic_atomic_write_valid in the kernel: a power of two, naturally aligned.
    """
    if bio.op != WRITE or not limits.atomic_min <= bio.length <= limits.atomic_max:
        return errno.EINVAL
    if not is_power_of_two(bio.length) or bio.addr % bio.length:
        return errno.EINVAL
    if limits.atomic_max_segments and len(bio.segments) > limits.atomic_max_segments:
        return errno.EINVAL
    return 0
