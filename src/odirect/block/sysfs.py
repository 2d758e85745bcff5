"""What /sys and /proc say of block devices, mounts and swap, as plain values.

Nothing here is cached: an attribute of a device changes under us (`losetup`, `echo > queue/...`), and
a read costs microseconds. A file that is missing is an answer (None or an empty list), never an error:
/sys may be absent in a container, and what it holds differs from kernel to kernel.
Source: Documentation/ABI/stable/sysfs-block, proc_pid_mountinfo(5), proc_swaps(5).
"""

from __future__ import annotations

import io
import os
import re
import stat
from typing import NamedTuple

#: Where the two file systems are; tests point them at trees of their own.
SYS = "/sys"
PROC = "/proc"

_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of mountinfo. `dev` is what `os.stat` gives as st_dev on it (but not for btrfs subvolumes)."""

    mount_id: int
    dev: int
    point: str
    options: frozenset[str]
    fstype: str
    source: str
    super_options: frozenset[str]

    @property
    def read_only(self) -> bool:
        """Whether this mount cannot be written through."""
        return "ro" in self.options


class Queue(NamedTuple):
    """What a device's queue/ directory says; None where this kernel does not say it. Sizes in bytes."""

    logical_block: int | None = None
    physical_block: int | None = None
    volatile_cache: bool | None = None
    poll: bool | None = None
    requests: int | None = None


def read_text(path: str) -> str | None:
    """The text of a small attribute file, stripped; None if it cannot be read."""
    try:
        # A file object is closed even if a signal's handler raises before it has a name.
        with io.FileIO(path) as file:
            return (file.read(4096) or b"").decode("utf-8", "surrogateescape").strip()
    except OSError:
        return None


def read_int(path: str) -> int | None:
    """The whole number in an attribute file; None if it cannot be read or is none."""
    text = read_text(path)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return None


def device_dir(dev: int) -> str | None:
    """The resolved sysfs directory of block device number `dev` (a disk's or a partition's), or None."""
    link = f"{SYS}/dev/block/{os.major(dev)}:{os.minor(dev)}"
    return os.path.realpath(link) if os.path.exists(link) else None


def device_name(dev: int) -> str | None:
    """The kernel's name of block device number `dev`: "sda1", "loop0"; None if there is none."""
    path = device_dir(dev)
    return None if path is None else os.path.basename(path)


def disk_dir(dev: int) -> str | None:
    """The sysfs directory of the whole disk that `dev` is or is a partition of, or None."""
    path = device_dir(dev)
    if path is None:
        return None
    return os.path.dirname(path) if os.path.exists(f"{path}/partition") else path


def device_number(directory: str) -> int | None:
    """The device number of the disk or partition whose sysfs directory this is, or None."""
    major, _, minor = (read_text(f"{directory}/dev") or "").partition(":")
    return os.makedev(int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def partitions(dev: int) -> list[int]:
    """The device numbers of a whole disk's partitions; [] for a partition."""
    path = device_dir(dev)
    if path is None:
        return []
    found = (device_number(f"{path}/{name}") for name in _listing(path) if os.path.exists(f"{path}/{name}/partition"))
    return sorted(number for number in found if number is not None)


def whole_disk(dev: int) -> int:
    """The device number of the disk that partition `dev` is on; `dev` itself if it is none."""
    path = disk_dir(dev)
    number = None if path is None else device_number(path)
    return dev if number is None else number


def holders(dev: int) -> list[str]:
    """The names of the devices stacked on `dev` (device mapper, md, bcache)."""
    path = device_dir(dev)
    return [] if path is None else _listing(f"{path}/holders")


def model(dev: int) -> str | None:
    """The disk's model as its driver says it, or None (loop and virtio disks have none)."""
    path = disk_dir(dev)
    return None if path is None else read_text(f"{path}/device/model") or None


def queue(dev: int) -> Queue:
    """What queue/ says of block device number `dev`, or of the disk of a partition.

    All fields are None where there is no such device (a network file system's number).
    """
    path = f"{SYS}/dev/block/{os.major(dev)}:{os.minor(dev)}/queue"
    if not os.path.isdir(path):
        path = f"{os.path.dirname(path)}/../queue"  # Only the disk has one, its partitions share it.
    cache = read_text(f"{path}/write_cache")
    poll = read_int(f"{path}/io_poll")
    return Queue(
        read_int(f"{path}/logical_block_size"),
        read_int(f"{path}/physical_block_size"),
        None if cache is None else cache != "write through",
        None if poll is None else poll > 0,
        read_int(f"{path}/nr_requests"),
    )


def discard_max_bytes(dev: int) -> int | None:
    """How much one discard may cover on `dev`; 0 where it cannot discard, None if nobody says."""
    path = disk_dir(dev)
    return None if path is None else read_int(f"{path}/queue/discard_max_bytes")


def dma_alignment(dev: int) -> int | None:
    """What memory must be a multiple of for this device's transfers, or None if nobody says."""
    path = disk_dir(dev)
    mask = None if path is None else read_int(f"{path}/queue/dma_alignment")
    return None if mask is None else mask + 1


def loop_devices() -> list[tuple[str, str]]:
    """(kernel name, backing path as the kernel shows it) of every loop device that has a file."""
    found = []
    for name in _listing(f"{SYS}/block"):
        if name.startswith("loop"):
            backing = read_text(f"{SYS}/block/{name}/loop/backing_file")
            if backing:
                found.append((name, backing))
    return found


def btrfs_members() -> list[tuple[str, str]]:
    """(volume's UUID, kernel name of a member device) of every btrfs volume that is mounted.

    A volume of several devices appears in mountinfo with one of them alone.
    """
    base = f"{SYS}/fs/btrfs"
    return [(volume, name) for volume in _listing(base) for name in _listing(f"{base}/{volume}/devices")]


def mounts() -> list[Mount]:
    """The mounts that this process can see, in the kernel's order; [] without /proc."""
    found = []
    for line in _lines(f"{PROC}/self/mountinfo"):
        fields, separator, origin = line.partition(b" - ")
        before, after = fields.split(b" "), origin.split(b" ")
        if not separator or len(before) < 6 or len(after) < 2:
            continue
        major, _, minor = before[2].partition(b":")
        found.append(
            Mount(
                int(before[0]),
                os.makedev(int(major), int(minor)),
                unescaped(before[4]),
                frozenset(unescaped(before[5]).split(",")),
                unescaped(after[0]),
                unescaped(after[1]),
                frozenset(unescaped(after[2]).split(",")) if len(after) > 2 else frozenset(),
            )
        )
    return found


def mount_of(fd: int, mount_id: int | None = None) -> Mount | None:
    """The mount that descriptor `fd` was opened through, or None if it is not to be seen from here.

    `mount_id` is statx's, where the caller has it. (st_dev does not do: a btrfs subvolume's is its own.)
    """
    if mount_id is None:
        for line in _lines(f"{PROC}/self/fdinfo/{fd}"):
            if line.startswith(b"mnt_id:"):
                mount_id = int(line.partition(b":")[2])
    return next((mount for mount in mounts() if mount.mount_id == mount_id), None)


def source_device(mount: Mount) -> int | None:
    """The block device number under a mount: its own, or that of its source path; None if it has none."""
    if os.major(mount.dev):
        return mount.dev
    return block_number(mount.source) if mount.source.startswith("/") else None


def block_number(path: str) -> int | None:
    """The device number of the block device at `path`, through symbolic links; None if it is none."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_rdev if stat.S_ISBLK(info.st_mode) else None


def swaps() -> list[str]:
    """The paths of the files and devices that are swapped to."""
    found = []
    for line in _lines(f"{PROC}/swaps")[1:]:
        fields = line.split()
        if fields:
            found.append(unescaped(fields[0]))
    return found


def unescaped(field: bytes) -> str:
    """A path with the kernel's octal escapes (`\\040` for a space) undone."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def _lines(path: str) -> list[bytes]:
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read() or b"").splitlines()
    except OSError:
        return []


def _listing(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []
