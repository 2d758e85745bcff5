"""What a file or block device takes, found before it is touched: alignments, support, limits.

The kernel is asked, best source first: statx (what the file system itself says), the block layer's
ioctls, /sys, the file system's known rule (btrfs), and at last a probe that reads. Every figure carries
the name of its source, and nothing here is cached: a loop device may come back with other sectors, and
a stale alignment or write-cache flag would lose data. Nothing here writes.

Source: statx(2), B01, F50, F51.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import stat
import struct
from typing import TypedDict

from odirect.base.errors import DirectoryError, UnsupportedError, from_errno
from odirect.base.units import MIB, is_power_of_two
from odirect.block import sysfs
from odirect.block.device import Limits
from odirect.block.probe import probe
from odirect.block.support import DirectSupport, btrfs_support, why_refused
from odirect.ring._calls import statx

__all__ = ["Alignment", "DirectSupport", "describe", "file_limits"]

# Bits of statx's mask.
_MNT_ID = 0x1000
_DIOALIGN = 0x2000
_WRITE_ATOMIC = 0x10000
_DIO_READ_ALIGN = 0x20000

_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B

_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_PUNCHING_FILE_SYSTEMS = frozenset({"btrfs", "tmpfs", "ext4", "xfs", "f2fs", "bcachefs", "ocfs2", "gfs2"})

# Where nobody says anything (a network file system, no /sys): an assumption, labelled "default".
_ASSUMED_BLOCK = 4096

_MAX_BIO_BYTES = 8 * MIB
_QUEUE_DEPTH = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Alignment:
    """What `describe` found of one path.

    kind is "file" or "block device"; `filesystem` the type's name ("ext4", None for a device or if
    unknown), `device` the kernel's name of the device it is on ("sda1"), `model` that disk's.
    """

    path: str
    kind: str
    filesystem: str | None
    limits: Limits
    support: DirectSupport
    device: str | None
    model: str | None

    def as_dict(self) -> dict[str, object]:
        """The same as dictionaries, strings and numbers, ready for JSON."""
        figures = {
            field.name: getattr(self.limits, field.name)
            for field in dataclasses.fields(Limits)
            if field.name != "sources"
        }
        return {
            "path": self.path,
            "kind": self.kind,
            "filesystem": self.filesystem,
            "device": self.device,
            "model": self.model,
            "direct": self.support._asdict(),
            "limits": figures,
            "sources": dict(self.limits.sources),
        }


def file_limits(fd: int, *, path: object, writable: bool) -> tuple[Limits, DirectSupport]:
    """What the file or block device open as `fd` takes, and whether its I/O is really direct.

    `path` is for error messages. `writable` says that the caller will write through `fd`; without it
    `discard` is False. `fd` may be open in any mode; nothing is written, and only where neither
    statx nor the block layer nor a known rule answers is something read (`probe`).

    Raises DirectoryError or UnsupportedError for what is neither file nor block device, and what
    statx raises. Source: B01, F51.
    """
    limits, support, _ = _examine(fd, path, writable)
    return limits, support


def describe(path: str | bytes | os.PathLike[str]) -> Alignment:
    """Everything known of direct I/O on the file or block device at `path`, each figure with its source.

    Raises the errors of opening it for reading, and those of `file_limits`.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, "opening it to see what it takes", path) from None
    try:
        limits, support, mount = _examine(fd, path, writable=True)
        info = os.fstat(fd)
        is_device = stat.S_ISBLK(info.st_mode)
        number: int | None = info.st_rdev
        if not is_device:
            mount = mount or sysfs.mount_of(fd)
            number = sysfs.source_device(mount) if mount else info.st_dev
        return Alignment(
            path=os.fsdecode(path),
            kind="block device" if is_device else "file",
            filesystem=mount.fstype if mount and not is_device else None,
            limits=limits,
            support=support,
            device=None if number is None else sysfs.device_name(number),
            model=None if number is None else sysfs.model(number),
        )
    finally:
        os.close(fd)


# --- the sources, one after the other ------------------------------------------------------------


class _Values(TypedDict, total=False):
    """The fields of `Limits` that are found here."""

    logical_block: int
    physical_block: int
    read_align: int
    write_align: int
    memory_align: int
    max_bio_bytes: int
    queue_depth: int
    fua: bool
    discard: bool
    volatile_cache: bool
    poll: bool
    atomic_min: int
    atomic_max: int
    atomic_max_segments: int


def _examine(fd: int, path: object, writable: bool) -> tuple[Limits, DirectSupport, sysfs.Mount | None]:
    """Limits, support, and the mount if it had to be looked up."""
    try:
        info = statx(fd)
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, "asking what it takes (statx)", path) from None
    mode = info.mode
    is_device = stat.S_ISBLK(mode)
    if stat.S_ISDIR(mode):
        raise DirectoryError("it is a directory; direct I/O is for files and block devices", path=path)
    if not is_device and not stat.S_ISREG(mode):
        raise UnsupportedError("it is neither a file nor a block device", path=path)

    mount: sysfs.Mount | None = None
    offset, memory = info.dio_offset_align, info.dio_mem_align
    answered = bool(info.mask & _DIOALIGN)
    usable = answered and is_power_of_two(offset) and is_power_of_two(memory)
    if is_device:
        number: int | None = os.makedev(info.rdev_major, info.rdev_minor)
    else:
        number = os.makedev(info.dev_major, info.dev_minor)
        if not usable:
            mount = sysfs.mount_of(fd, info.mnt_id if info.mask & _MNT_ID else None)
            if not info.dev_major:
                number = sysfs.source_device(mount) if mount else None
    queue = sysfs.Queue() if number is None else sysfs.queue(number)

    values: _Values = {"max_bio_bytes": _MAX_BIO_BYTES, "fua": True}
    sources = {"max_bio_bytes": "default", "max_segments": "default", "fua": "RWF_DSYNC"}
    if is_device:
        _blocks_of_device(fd, path, values, sources)
    else:
        _blocks_below_file(queue, values, sources)
    _queue_figures(queue, values, sources)

    support = DirectSupport(True, True, "")
    if usable:
        read = info.dio_read_offset_align if info.mask & _DIO_READ_ALIGN else 0
        values["write_align"] = offset
        values["read_align"] = read if is_power_of_two(read) else offset
        values["memory_align"] = memory
        sources["read_align"] = sources["write_align"] = sources["memory_align"] = "statx"
    elif is_device:
        # Before Linux 6.0 memory had to be aligned as offsets are; /sys may demand more, never less.
        sector = values["logical_block"]
        dma = (sysfs.dma_alignment(number) if number is not None else None) or 1
        _put_alignment(values, sources, sector, max(sector, dma), "BLKSSZGET")
    elif answered and not (offset and memory):
        support = DirectSupport(False, False, why_refused(fd, mount))
        _put_default(values, sources, "direct I/O is refused")
    else:
        support = _unanswered(fd, info.size, info.ino, mount, values, sources)

    if info.mask & _WRITE_ATOMIC and info.atomic_write_unit_max:
        values["atomic_min"] = info.atomic_write_unit_min
        values["atomic_max"] = info.atomic_write_unit_max
        values["atomic_max_segments"] = info.atomic_write_segments_max
        sources["atomic_min"] = sources["atomic_max"] = sources["atomic_max_segments"] = "statx"

    _discard(values, sources, number if is_device else None, usable or _punches(mount), writable)
    values["max_bio_bytes"] = max(values["max_bio_bytes"], values["read_align"], values["write_align"])
    return Limits(**values, sources=sources), support, mount


def _blocks_of_device(fd: int, path: object, values: _Values, sources: dict[str, str]) -> None:
    """Sector sizes of the block device `fd`, as the block layer says them."""
    try:
        values["logical_block"] = struct.unpack("=i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
        values["physical_block"] = struct.unpack("=I", fcntl.ioctl(fd, _BLKPBSZGET, bytes(4)))[0]
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, "asking for its sector size (BLKSSZGET)", path) from None
    sources["logical_block"], sources["physical_block"] = "BLKSSZGET", "BLKPBSZGET"


def _blocks_below_file(queue: sysfs.Queue, values: _Values, sources: dict[str, str]) -> None:
    """Sector sizes of the device that a file is on, as /sys says them."""
    logical, physical = queue.logical_block, queue.physical_block
    known = logical is not None and is_power_of_two(logical)
    values["logical_block"] = logical if known and logical is not None else _ASSUMED_BLOCK
    sources["logical_block"] = "sysfs" if known else "default"
    known = physical is not None and is_power_of_two(physical)
    values["physical_block"] = physical if known and physical is not None else values["logical_block"]
    sources["physical_block"] = "sysfs" if known else sources["logical_block"]


def _queue_figures(queue: sysfs.Queue, values: _Values, sources: dict[str, str]) -> None:
    """What the device's queue promises; where nothing is known, the figure that loses no data."""
    values["queue_depth"] = queue.requests or _QUEUE_DEPTH
    sources["queue_depth"] = "sysfs" if queue.requests else "default"
    values["volatile_cache"] = queue.volatile_cache is not False
    sources["volatile_cache"] = "default" if queue.volatile_cache is None else "sysfs"
    values["poll"] = bool(queue.poll)
    sources["poll"] = "default" if queue.poll is None else "sysfs"


def _discard(values: _Values, sources: dict[str, str], device: int | None, punches: bool, writable: bool) -> None:
    """Whether a range can be given up: BLKDISCARD for `device`, a punched hole for a file."""
    if not writable:
        values["discard"], sources["discard"] = False, "not writable"
    elif device is not None:
        values["discard"], sources["discard"] = bool(sysfs.discard_max_bytes(device)), "sysfs"
    else:
        values["discard"], sources["discard"] = punches, "file system" if punches else "default"


def _punches(mount: sysfs.Mount | None) -> bool:
    return mount is not None and mount.fstype in _PUNCHING_FILE_SYSTEMS


def _put_alignment(values: _Values, sources: dict[str, str], offset: int, memory: int, source: str) -> None:
    values["read_align"] = values["write_align"] = offset
    values["memory_align"] = memory
    sources["read_align"] = sources["write_align"] = sources["memory_align"] = source


def _put_default(values: _Values, sources: dict[str, str], why: str) -> None:
    """The logical block for everything: what direct I/O would most likely demand, and nobody says."""
    block = values["logical_block"]
    _put_alignment(values, sources, block, block, f"default ({why})")


def _unanswered(
    fd: int, size: int, ino: int, mount: sysfs.Mount | None, values: _Values, sources: dict[str, str]
) -> DirectSupport:
    """Alignment and support of a file on a file system that says nothing in statx."""
    name = mount.fstype if mount else None
    if name in _MEMORY_FILE_SYSTEMS:
        _put_alignment(values, sources, 1, 1, str(name))
        return DirectSupport(False, False, f"{name} keeps its files in memory; there is no device")
    if name == "btrfs" and mount is not None:
        sector = os.fstatvfs(fd).f_bsize
        _put_alignment(values, sources, sector, sector, "btrfs sector size (statvfs)")
        return btrfs_support(fd, size, ino, mount)
    found = probe(fd)
    if found.offset_align:
        _put_alignment(values, sources, found.offset_align, found.memory_align, "probe")
    else:
        _put_default(values, sources, found.why)
    return found.support
