"""Who else is using a block device or an image file, so that it is not ours to write.

A volume that is mounted and written behind its file system's back is lost, so everything that the
kernel tells is asked: mounts, swap, devices stacked on top, loop devices, and at last O_EXCL, by which
the kernel refuses a block device that anybody in it has claimed (also in another mount namespace). A file
is also in use while somebody has locked it (flock), as one that has a volume in it open does. Locks are looked up
in /proc/locks and never tried, so that nobody who wants one meanwhile is refused; what that does not show (the
locks of another machine, and, from inside a PID namespace, of what is outside it) is not found.
All but O_EXCL and the loop devices' exact answer work without privileges. What is found is true for
the moment of asking; a caller who goes on to write holds the device open with O_EXCL.
Source: open(2) under O_EXCL, proc_pid_mountinfo(5), proc_locks(5), loop(4), F34.
"""

from __future__ import annotations

import collections
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
    LOCK = "lock"
    EXCLUSIVE = "exclusive"


class Claim(NamedTuple):
    """One use of a device or file.

    device   the kernel's name of the device that is used ("loop0p1"), or the path of a file
    use      in which way
    by       the mount point, the device stacked on top, the loop device or who has locked it; "" for swap
             and EXCLUSIVE
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

    A file is used by the loop devices over it, with what those are used for, as swap, and by whoever has locked
    it, unless that is this process itself otherwise than for a volume. Symbolic links are followed. Raises as
    `check_unused` does, but for InUseError.
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
        return _claims_of_file(name, info) + _lock_claims(name, path_or_fd, info)
    return []


def suspects() -> set[int]:
    """The inode numbers, on whatever file system, of files that somebody may be using now.

    For who replaces many files and asks `check_unused` of these alone.
    """
    found = {lock.ino for lock in _locks_in(f"{sysfs.PROC}/locks", "")}
    found.update(loop.ino for loop in _loops())
    for path in sysfs.swaps():
        try:
            found.add(os.stat(path).st_ino)
        except OSError:
            continue  # deleted, or not to be seen from here
    return found


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


# --- locks ---------------------------------------------------------------------------------------

#: How many volumes this process has open on each file, by its device and inode.
_volumes: collections.Counter[tuple[int, int]] = collections.Counter()


class _Lock(NamedTuple):
    """A lock on a file by flock. pid: who took it, 0 if that cannot be told; a child may have it by now."""

    exclusive: bool
    pid: int
    dev: int
    ino: int


def volume_opened(dev: int, ino: int) -> None:
    """This process has locked this file for a volume: the lock counts here too, until `volume_closed`."""
    _volumes[dev, ino] += 1


def volume_closed(dev: int, ino: int) -> None:
    """The end of what `volume_opened` began."""
    _volumes[dev, ino] -= 1
    if _volumes[dev, ino] <= 0:
        del _volumes[dev, ino]


def lock_holder(fd: int) -> str:
    """Who has locked an open file by flock, as far as the kernel tells: "process 12 (python)"."""
    locks = _locks_on(fd, os.fstat(fd))
    return _holder(next((lock for lock in locks if lock.exclusive), locks[0] if locks else None))


def _lock_claims(name: str, path_or_fd: str | bytes | os.PathLike[str] | int, info: os.stat_result) -> list[Claim]:
    """Whoever has locked a file. A caller's own locks are his to heed, but for those of our volumes."""
    locks = _locks_on(path_or_fd, info)
    if locks and (info.st_dev, info.st_ino) not in _volumes:
        own = _own_locks()
        locks = [lock for lock in locks if lock not in own]
    found = []
    for lock in sorted(locks, key=lambda lock: not lock.exclusive):
        holder = _holder(lock)
        way = "locked it (flock)" if lock.exclusive else "locked it (flock) for reading"
        detail = f"{holder} has {way}, as one that has a volume open does; close that first"
        found.append(Claim(name, Use.LOCK, holder, detail))
    return found


def _locks_on(path_or_fd: str | bytes | os.PathLike[str] | int, info: os.stat_result) -> list[_Lock]:
    """The locks on a file that /proc/locks shows."""
    locks = [lock for lock in _locks_in(f"{sysfs.PROC}/locks", "") if lock.ino == info.st_ino]
    if not locks:
        return []
    devices = {info.st_dev}
    if any(lock.dev not in devices for lock in locks):
        # The kernel shows the number of the file system, which for a btrfs subvolume is not that of its files.
        devices |= _file_system_numbers(path_or_fd)
    return [lock for lock in locks if lock.dev in devices]


def _own_locks() -> set[_Lock]:
    """The locks that this process has through its own descriptors, also inherited ones."""
    found: set[_Lock] = set()
    directory = f"{sysfs.PROC}/self/fdinfo"
    try:
        names = os.listdir(directory)
    except OSError:
        return found
    for name in names:
        found.update(_locks_in(f"{directory}/{name}", "lock:"))
    return found


def _locks_in(path: str, start: str) -> list[_Lock]:
    """The locks by flock in the lines of a /proc file that begin with `start`; [] if it cannot be read."""
    try:
        with io.FileIO(path) as file:
            text = file.readall() or b""
    except OSError:
        return []
    found = []
    for line in text.decode("ascii", "replace").splitlines():
        if not line.startswith(start):
            continue
        # "1: FLOCK ADVISORY WRITE 1234 08:01:5678 0 EOF"; one that is only waited for has "->" after the number.
        fields = line[len(start) :].split()
        if len(fields) < 6 or fields[1] != "FLOCK":
            continue
        major, _, rest = fields[5].partition(":")
        minor, _, inode = rest.partition(":")
        try:
            dev = os.makedev(int(major, 16), int(minor, 16))
            found.append(_Lock(fields[3] == "WRITE", max(0, int(fields[4])), dev, int(inode)))
        except ValueError:
            continue
    return found


def _file_system_numbers(path_or_fd: str | bytes | os.PathLike[str] | int) -> set[int]:
    """The device number that the mount of a file has in mountinfo, if it can be found out."""
    opened = -1
    try:
        if isinstance(path_or_fd, int):
            fd = path_or_fd
        else:
            fd = opened = os.open(path_or_fd, os.O_PATH | os.O_CLOEXEC)
        text = sysfs.read_text(f"{sysfs.PROC}/self/fdinfo/{fd}") or ""
    except OSError:
        return set()
    finally:
        if opened >= 0:
            os.close(opened)
    ids = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("mnt_id:")]
    return {mount.dev for mount in sysfs.mounts() if str(mount.mount_id) in ids}


def _holder(lock: _Lock | None) -> str:
    """Who took a lock, as it is shown to people."""
    if lock is None or not lock.pid:
        return "another process"
    if lock.pid == os.getpid():
        return "this very process"
    name = sysfs.read_text(f"{sysfs.PROC}/{lock.pid}/comm")
    return "another process" if name is None else f"process {lock.pid} ({name})"


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
