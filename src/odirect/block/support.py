"""Whether a file's direct I/O is direct, where being accepted does not say so.

Several file systems take O_DIRECT and serve it from the page cache:

    file system         reads                                writes
    tmpfs, ramfs        from memory                          to memory
    btrfs, checksums    direct if aligned to its sector      from the cache since Linux 6.15
    btrfs, no checksums direct if aligned to its sector      the same; misaligned ones from the cache
    btrfs, compressed   from the cache                       from the cache
    ext4 data=journal, inline data, encryption, verity       statx says that there is no direct I/O

btrfs demands its sector size of memory too, and says nothing in statx; it also serves a read from the
cache if the caller's memory has never been touched (a fresh mmap, an empty NumPy array). Observed on Linux 6.18 with
cachestat(2); tests/block/test_limits.py holds it against the running kernel.
Source: statx(2), btrfs(5), F50.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from typing import NamedTuple

from odirect.base.errors import ODirectError
from odirect.block import sysfs
from odirect.block.fiemap import ExtentFlag, file_extents

_FS_IOC_GETFLAGS = 0x80086601
_BTRFS_IOC_TREE_SEARCH = 0xD0009411

# Inode flags of FS_IOC_GETFLAGS that take a file off the direct path, and what people call them.
_COMPRESSED = 0x4
_NO_COW = 0x00800000
_JOURNALLED = 0x00004000
_UNDIRECT_FLAGS = {
    0x00000800: "it is encrypted",
    _JOURNALLED: "its data is journalled",
    0x00100000: "it has verity",
    0x10000000: "its data is inline",
}


class DirectSupport(NamedTuple):
    """Whether aligned reads and writes of a file go to the device, and if not or unsure, why.

    It is said of the file and its file system, whatever the descriptor was opened for.
    """

    reads: bool
    writes: bool
    why: str


def why_refused(fd: int, mount: sysfs.Mount | None) -> str:
    """Why statx says that there is no direct I/O on this file."""
    flags = _inode_flags(fd) or 0
    if mount is not None and "data=journal" in mount.super_options | mount.options:
        flags |= _JOURNALLED
    reasons = [reason for flag, reason in _UNDIRECT_FLAGS.items() if flags & flag]
    name = mount.fstype if mount else "the file system"
    return f"{name} does no direct I/O on this file" + (f": {', '.join(reasons)}" if reasons else " (statx)")


def _inode_flags(fd: int) -> int | None:
    """The FS_*_FL flags of the file, or None where its file system has none."""
    try:
        # The ioctl is declared with a long, and gives an int.
        answer = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))
    except OSError:
        return None
    flags: int = struct.unpack_from("=I", answer)[0]
    return flags


def btrfs_support(fd: int, size: int, ino: int, mount: sysfs.Mount) -> DirectSupport:
    """What btrfs does with direct I/O on this file.

    Writes that need checksums have gone through the page cache since Linux 6.15 (a buffer that is
    changed under the device would make its checksum wrong for ever, F21), and so has compressed data
    in both directions. Whether data gets checksums is in the inode; only NODATACOW shows in the file's
    flags, NODATASUM takes a tree search, which needs CAP_SYS_ADMIN.
    """
    flags = _inode_flags(fd) or 0
    encoded = _encoded_part(fd)
    checksums: bool | None = False if flags & _NO_COW else _btrfs_has_checksums(fd, ino)
    compresses = flags & _COMPRESSED and not flags & _NO_COW

    why: list[str] = []
    reads = writes = True
    if encoded == "all":
        reads = False
        why.append("its extents are compressed, inline or encrypted: btrfs reads those through the page cache")
    elif encoded == "some":
        why.append("some of its extents are compressed or inline: btrfs reads those through the page cache")
    if compresses:
        why.append("btrfs compresses what is written to it")
        writes = False
    if checksums is not False:
        if _kernel() >= (6, 15):
            writes = False
            if checksums is None and "nodatasum" in mount.super_options:
                why.append("not sure that it has checksums: files made since the mount with nodatasum have none")
            why.append("btrfs writes data with checksums through the page cache")
        else:
            why.append("btrfs may write data with checksums through the page cache (a change of Linux 6.15)")
    return DirectSupport(reads, writes, "; ".join(why))


def _encoded_part(fd: int) -> str:
    """How much of the file is compressed or inline, by its first extents: "none", "some" or "all"."""
    try:
        extents = file_extents(fd, limit=32)
    except ODirectError:
        return "none"
    encoded = [extent for extent in extents if extent.flags & (ExtentFlag.ENCODED | ExtentFlag.DATA_INLINE)]
    if not encoded:
        return "none"
    return "all" if len(encoded) == len(extents) else "some"


def _btrfs_has_checksums(fd: int, ino: int) -> bool | None:
    """Whether this inode's data gets checksums; None if we may not look, or it is not committed yet.

    Source: btrfs_ioctl_search_args in linux/btrfs.h (the key is 104 bytes, then come items with a
    header of 32), btrfs_inode_item in linux/btrfs_tree.h (flags at byte 64; NODATASUM 1, NODATACOW 2).
    """
    everything = (1 << 64) - 1
    inode_item = 1
    request = bytearray(4096)
    # tree 0 is the tree of the descriptor; objectid, offset and transid from-to, type from-to, items
    struct.pack_into("=7Q4I", request, 0, 0, ino, ino, 0, everything, 0, everything, inode_item, inode_item, 1, 0)
    try:
        fcntl.ioctl(fd, _BTRFS_IOC_TREE_SEARCH, request)
    except OSError:
        return None
    found = struct.unpack_from("=I", request, 64)[0]
    objectid, _, kind, length = struct.unpack_from("=QQII", request, 104 + 8)
    if not found or objectid != ino or kind != inode_item or length < 72:
        return None
    flags: int = struct.unpack_from("=Q", request, 104 + 32 + 64)[0]
    return not flags & 3


def _kernel() -> tuple[int, int]:
    """The running kernel's version, (0, 0) if its name has none."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)
