"""Where the kernel keeps a file's bytes: FS_IOC_FIEMAP, decoded and checked.

The request is a `struct fiemap` of 32 bytes followed by room for extents of 56 bytes each; the kernel
fills in as many as there is room for, and the next request starts where the last extent ended.
Source: linux/fiemap.h, Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import stat
import struct
from typing import NamedTuple

from odirect.base.errors import CorruptionError, UnsupportedError, from_errno

_FS_IOC_FIEMAP = 0xC020660B
_BLKGETSIZE64 = 0x80081272
_FLAG_SYNC = 0x1
_WHOLE_FILE = (1 << 64) - 1

# fm_start, fm_length, fm_flags, fm_mapped_extents, fm_extent_count, fm_reserved
_REQUEST = struct.Struct("=QQIIII")
# fe_logical, fe_physical, fe_length, two reserved, fe_flags, three reserved
_EXTENT = struct.Struct("=QQQ16xI12x")

#: Extents asked for at a time: 14 KiB of answer, one call for all but badly fragmented files.
_BATCH = 256


class ExtentFlag(enum.IntFlag):
    """The kernel's FIEMAP_EXTENT_* flags, under their published names."""

    LAST = 0x0001
    UNKNOWN = 0x0002
    DELALLOC = 0x0004
    ENCODED = 0x0008
    DATA_ENCRYPTED = 0x0080
    NOT_ALIGNED = 0x0100
    DATA_INLINE = 0x0200
    DATA_TAIL = 0x0400
    UNWRITTEN = 0x0800
    MERGED = 0x1000
    SHARED = 0x2000


class FileExtent(NamedTuple):
    """A run of a file: byte `offset` of the file is at byte `addr` of what its file system sees as its device.

    `addr` means nothing where `flags` has UNKNOWN, DELALLOC or DATA_INLINE. For btrfs it is a logical
    address, not one on a device. What no extent covers is a hole.
    """

    offset: int
    addr: int
    length: int
    flags: ExtentFlag

    @property
    def end(self) -> int:
        """The first byte of the file behind this extent."""
        return self.offset + self.length


def file_extents(fd: int, *, sync: bool = False, limit: int | None = None) -> list[FileExtent]:
    """The extents of the file open as `fd`, in the order of their offsets; a block device is one extent.

    `sync` has the file written out first, so that nothing is DELALLOC. With `limit`, no more than that
    many are asked for. The last extent may reach past the end of file.

    Raises UnsupportedError where the file system does not tell, CorruptionError where its answer is
    not in order (it would have us ask for ever, or believe in two places for one byte).
    """
    try:
        size = _device_bytes(fd) if stat.S_ISBLK(os.fstat(fd).st_mode) else None
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, "asking for the file's extents", _shown(fd)) from None
    if size is not None:
        return [FileExtent(0, 0, size, ExtentFlag.LAST)] if size else []
    found: list[FileExtent] = []
    start = 0
    while limit is None or len(found) < limit:
        room = _BATCH if limit is None else min(_BATCH, limit - len(found))
        batch = _ask(fd, start, room, sync)
        for extent in batch:
            _check(fd, extent, start)
            found.append(extent)
            start = extent.end
        if not batch or batch[-1].flags & ExtentFlag.LAST or start > _WHOLE_FILE >> 1:
            break
    return found


def _ask(fd: int, start: int, room: int, sync: bool) -> list[FileExtent]:
    """One batch: at most `room` extents that end behind byte `start` of the file."""
    request = bytearray(_REQUEST.size + room * _EXTENT.size)
    _REQUEST.pack_into(request, 0, start, _WHOLE_FILE - start, _FLAG_SYNC if sync else 0, 0, room, 0)
    try:
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
    except OSError as error:
        number = error.errno or errno.EIO
        if number in (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS):
            message = "the file system does not tell where a file's bytes are (no FIEMAP)"
            raise UnsupportedError(message, path=_shown(fd)) from None
        raise from_errno(number, "asking for the file's extents (FIEMAP)", _shown(fd)) from None
    mapped = _REQUEST.unpack_from(request)[3]
    if mapped > room:
        raise CorruptionError(f"FIEMAP answered {mapped} extents where there was room for {room}", path=_shown(fd))
    return [
        FileExtent(offset, addr, length, ExtentFlag(flags))
        for offset, addr, length, flags in (
            _EXTENT.unpack_from(request, _REQUEST.size + index * _EXTENT.size) for index in range(mapped)
        )
    ]


def _check(fd: int, extent: FileExtent, start: int) -> None:
    """Raise CorruptionError unless `extent` has bytes, and none of them before byte `start`."""
    if extent.length == 0 or extent.offset < start:
        raise CorruptionError(
            f"FIEMAP answered an extent of {extent.length} bytes at {extent.offset}, "
            f"where one at {start} or later with at least a byte was expected",
            path=_shown(fd),
        )


def _device_bytes(fd: int) -> int:
    """The block device's size, without touching the descriptor's position."""
    size: int = struct.unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    return size


def _shown(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"
