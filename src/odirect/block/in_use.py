"""Who else is using a block device or an image file, so that it is not ours to write.

A volume that is mounted and written behind its file system's back is lost, so everything that the
kernel tells is asked: mounts, swap, devices stacked on top, loop devices, and at last O_EXCL, by which
the kernel refuses a block device that anybody in it has claimed (also in another mount namespace).
All but O_EXCL and the loop devices' exact answer work without privileges. What is found is true for
the moment of asking; a caller who goes on to write holds the device open with O_EXCL.
Source: open(2) under O_EXCL, proc_pid_mountinfo(5), loop(4), F34.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import io
import os
import stat
import struct
from typing import NamedTuple

from odirect.base.errors import DirectoryError, InUseError, from_errno
from odirect.block import sysfs

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64_BYTES = 232

#: Mount options that name further devices of a file system: XFS's log and realtime device, ext4's journal.
_DEVICE_OPTIONS = ("logdev", "rtdev", "journal_path")


class Use(enum.StrEnum):
    """In which way something is used."""

    MOUNT = "mount"
    SWAP = "swap"
    HOLDER = "holder"
    LOOP = "loop"
    EXCLUSIVE = "exclusive"


class Claim(NamedTuple):
    """One use of a device or file.

    device   the kernel's name of the device that is used ("loop0p1"), or the path of a file
    use      in which way
    by       the mount point, the device stacked on top or the loop device; "" for swap and EXCLUSIVE
    detail   a sentence about it, with what to do
    """

    device: str
    use: Use
    by: str
    detail: str

    def __str__(self) -> str:
        return self.detail


def check_unused(path_or_fd: str | bytes | os.PathLike[str] | int, *, what: str, exclusive: bool = True) -> None:
    """None if nobody else uses this block device or file; else InUseError says who does.

    what: what is not to be done, a verb phrase that "it" can follow ("write to", "format"). With
    exclusive=False block devices are not tried with O_EXCL: for a caller who holds it so himself.
    Raises DirectoryError for a directory, and the kernel's answer if there is no such path.
    """
    found = claims(path_or_fd, exclusive=exclusive)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise InUseError(f"will not {what} it: {found[0].detail}{more}", path=_shown(path_or_fd))


def claims(path_or_fd: str | bytes | os.PathLike[str] | int, *, exclusive: bool = True) -> list[Claim]:
    """Everybody who uses this block device (with its partitions, or the disk it is part of) or file.

    A file is used by the loop devices over it, with what those are used for, and as swap. Symbolic
    links are followed. Raises as `check_unused` does, but for InUseError.
    """
    try:
        info = os.stat(path_or_fd)
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, "looking who uses it", _shown(path_or_fd)) from None
    if stat.S_ISDIR(info.st_mode):
        raise DirectoryError("it is a directory; a file or block device was expected", path=_shown(path_or_fd))
    if stat.S_ISBLK(info.st_mode):
        found = _claims_of_device(info.st_rdev, "it", set())
        if exclusive and not found:
            found = _exclusive_claim(path_or_fd, info.st_rdev)
        return found
    if stat.S_ISREG(info.st_mode):
        name = _name_of(path_or_fd) if isinstance(path_or_fd, int) else os.fsdecode(path_or_fd)
        return _claims_of_file(name, info)
    return []


# --- block devices -------------------------------------------------------------------------------


def _claims_of_device(number: int, called: str, seen: set[int]) -> list[Claim]:
    """The uses of device `number`, its partitions and its disk.

    `called` is what sentences call the device, `seen` ends rings of loops over loops.
    """
    if number in seen:
        return []
    seen.add(number)
    disk = sysfs.whole_disk(number)
    names = {dev: _kernel_name(dev) for dev in (number, *sysfs.partitions(number), disk)}
    subjects = {dev: f"partition {name} of {called}" for dev, name in names.items()}
    subjects[disk] = f"disk {names[disk]} with {called}"
    subjects[number] = called
    found = _mount_claims(names, subjects)
    for path in sysfs.swaps():
        dev = sysfs.block_number(path)
        if dev in names:
            detail = f"{subjects[dev]} is used as swap; turn that off first (swapoff {path})"
            found.append(Claim(names[dev], Use.SWAP, "", detail))
    for dev, name in names.items():
        for holder in sysfs.holders(dev):
            detail = f"{subjects[dev]} is part of device {holder}; take that apart first"
            found.append(Claim(name, Use.HOLDER, holder, detail))
    for loop in _loops():
        if loop.rdev in names:
            detail = f"{subjects[loop.rdev]} is behind loop device /dev/{loop.name}; {_detach(loop)}"
            found += _through_loop(Claim(names[loop.rdev], Use.LOOP, f"/dev/{loop.name}", detail), loop, seen)
    return found


def _mount_claims(names: dict[int, str], subjects: dict[int, str]) -> list[Claim]:
    """The mounts of these device numbers: as the mount's own device, its source, or one of several."""
    found = []
    mounted = set()
    for mount in sysfs.mounts():
        for dev in dict.fromkeys(_devices_of(mount)):
            if dev in names:
                mounted.add(names[dev])
                mode = "read-only" if mount.read_only else "read-write"
                detail = (
                    f"{subjects[dev]} is mounted on {mount.point} ({mount.fstype}, {mode}); "
                    f"unmount it first (umount {mount.point})"
                )
                found.append(Claim(names[dev], Use.MOUNT, mount.point, detail))
    by_name = {name: dev for dev, name in names.items()}
    for volume, name in sysfs.btrfs_members():
        if name in by_name and name not in mounted:
            subject = subjects[by_name[name]]
            detail = f"{subject} belongs to the mounted btrfs volume {volume}; unmount that first"
            found.append(Claim(name, Use.MOUNT, volume, detail))
    return found


def _devices_of(mount: sysfs.Mount) -> list[int]:
    """The device numbers of a mount, as far as mountinfo names them."""
    found = [mount.dev] if os.major(mount.dev) else []
    paths = [mount.source] if mount.source.startswith("/") and not found else []
    for option in mount.super_options:
        name, _, value = option.partition("=")
        if name in _DEVICE_OPTIONS:
            paths.append(value)
    return found + [number for number in map(sysfs.block_number, paths) if number is not None]


def _exclusive_claim(path_or_fd: str | bytes | os.PathLike[str] | int, number: int) -> list[Claim]:
    """The claim that only O_EXCL shows: a mount in another namespace, a program that holds the device."""
    path = f"{sysfs.PROC}/self/fd/{path_or_fd}" if isinstance(path_or_fd, int) else path_or_fd
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            detail = (
                "it is held exclusively by a program, or by a mount that cannot be seen from here; "
                "end that first (fuser and lsblk may show it)"
            )
            return [Claim(_kernel_name(number), Use.EXCLUSIVE, "", detail)]
        # Not permitted, no medium: opening it in earnest says so better than we could.
    return []


# --- files ---------------------------------------------------------------------------------------


def _claims_of_file(name: str, info: os.stat_result) -> list[Claim]:
    """The loop devices over a file, what those are used for, and its use as swap."""
    found = []
    for loop in _loops():
        if loop.rdev == 0 and (loop.dev, loop.ino) == (info.st_dev, info.st_ino):
            detail = f"it is behind loop device /dev/{loop.name}; {_detach(loop)}"
            found += _through_loop(Claim(name, Use.LOOP, f"/dev/{loop.name}", detail), loop, set())
    for path in sysfs.swaps():
        try:
            swap = os.stat(path)
        except OSError:
            continue  # deleted, or not to be seen from here
        if (swap.st_dev, swap.st_ino) == (info.st_dev, info.st_ino):
            found.append(Claim(name, Use.SWAP, "", f"it is used as swap; turn that off first (swapoff {path})"))
    return found


# --- loop devices --------------------------------------------------------------------------------


class _Loop(NamedTuple):
    """A loop device with the file (dev, ino) or block device (rdev, else 0) below it."""

    name: str
    number: int
    dev: int
    ino: int
    rdev: int


def _loops() -> list[_Loop]:
    """The loop devices whose backing can be told.

    The kernel's own answer comes first: the path that sysfs shows may have been renamed or deleted,
    or be of another mount namespace. It takes the right to open the device, so the path comes next.
    """
    found = []
    for name, backing in sysfs.loop_devices():
        number = sysfs.device_number(f"{sysfs.SYS}/block/{name}")
        if number is None:
            continue
        identity = _identity_by_ioctl(name, number) or _identity_by_path(backing)
        if identity is not None:
            found.append(_Loop(name, number, *identity))
    return found


def _identity_by_ioctl(name: str, number: int) -> tuple[int, int, int] | None:
    """(st_dev, st_ino, st_rdev) of what loop device `name` is over, by LOOP_GET_STATUS64."""
    try:
        # As in `sysfs.read_text`.
        with io.FileIO(f"/dev/{name}") as device:
            if os.fstat(device.fileno()).st_rdev != number:
                return None
            answer = fcntl.ioctl(device.fileno(), _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
    except OSError:
        return None  # Detached meanwhile, or not ours to open.
    dev, ino, rdev = struct.unpack_from("=QQQ", answer)
    return dev, ino, rdev


def _identity_by_path(backing: str) -> tuple[int, int, int] | None:
    try:
        info = os.stat(backing)
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_rdev if stat.S_ISBLK(info.st_mode) else 0


def _through_loop(claim: Claim, loop: _Loop, seen: set[int]) -> list[Claim]:
    """`claim` for the loop device itself, behind the uses of that loop device, which tell more."""
    uses = _claims_of_device(loop.number, f"loop device /dev/{loop.name} over it", seen)
    return [*(use._replace(device=claim.device) for use in uses), claim]


def _detach(loop: _Loop) -> str:
    return f"detach that first (losetup -d /dev/{loop.name})"


# --- names ---------------------------------------------------------------------------------------


def _kernel_name(number: int) -> str:
    return sysfs.device_name(number) or f"{os.major(number)}:{os.minor(number)}"


def _name_of(fd: int) -> str:
    try:
        return os.readlink(f"{sysfs.PROC}/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"


def _shown(path_or_fd: str | bytes | os.PathLike[str] | int) -> object:
    return _name_of(path_or_fd) if isinstance(path_or_fd, int) else path_or_fd
