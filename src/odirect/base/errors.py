"""Every error that leaves odirect.

    ODirectError                    exit  errno
    ├── DeviceError                    5  the device's, EIO where it gave none
    │   └── StickySyncError            5  EIO      an earlier sync failed: what was written may be lost
    ├── AlignmentError                 3  EINVAL   the kernel would refuse this offset, length or address
    ├── NotDirectError                 4  EOPNOTSUPP  strict was asked for and only a fallback is to be had
    ├── AtomicLimitError               3  EINVAL   an atomic write outside what the device promises
    ├── WouldBlockError               11  EAGAIN   NOWAIT, and nothing was done
    ├── BadBufferError                 5  EFAULT   the caller's memory cannot be used
    ├── NoSpaceError                   9  ENOSPC, EDQUOT, EFBIG
    ├── ReadOnlyError                  6  EROFS
    ├── InUseError                     6  EBUSY    mounted, locked, or otherwise not ours to write
    ├── VerifyError                   10  EIO      what was read back differs from what was written
    ├── CorruptionError                7  EUCLEAN  on-disk structure that cannot be believed
    ├── UnsupportedError               8  EOPNOTSUPP  a feature that is not ours
    ├── ClosedError                    2  EBADF    used after close (also a ValueError, as io has it)
    └── PathError                      2  the kernel's answer about a path or a handle
        ├── MissingError                  ENOENT   (also FileNotFoundError)
        ├── ExistsError                   EEXIST   (also FileExistsError)
        ├── ForbiddenError                EACCES, EPERM (also PermissionError)
        ├── DirectoryError                EISDIR   (also IsADirectoryError)
        └── NotDirectoryError             ENOTDIR  (also NotADirectoryError)

All are `OSError`s with an errno, so that code written for plain files keeps working. A caller's
mistake in types or values is a `TypeError` or `ValueError`, as everywhere in Python.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import ClassVar

__all__ = [
    "AlignmentError",
    "AtomicLimitError",
    "BadBufferError",
    "ClosedError",
    "CorruptionError",
    "DeviceError",
    "DirectoryError",
    "ExistsError",
    "ForbiddenError",
    "InUseError",
    "MissingError",
    "NoSpaceError",
    "NotDirectError",
    "NotDirectoryError",
    "ODirectError",
    "PathError",
    "ReadOnlyError",
    "StickySyncError",
    "UnsupportedError",
    "VerifyError",
    "WouldBlockError",
    "from_errno",
]


class ODirectError(OSError):
    """An error of odirect: `errno`, `strerror` (a sentence), and `filename` where there is one."""

    exit_code: ClassVar[int] = 1
    default_errno: ClassVar[int] = _errno.EIO

    def __init__(self, message: str, *, errno: int | None = None, path: object = None) -> None:
        super().__init__(self.default_errno if errno is None else errno, message)
        self.message = message
        if path is not None:
            self.filename = path

    def __str__(self) -> str:
        place = "" if self.filename is None else f"{_shown(self.filename)}: "
        return f"{place}{self.message}"


class DeviceError(ODirectError):
    """The device, or the kernel on its behalf, failed an I/O."""

    exit_code = 5


class StickySyncError(DeviceError):
    """A sync failed before; this handle stays failed until it is reopened (F41)."""


class AlignmentError(ODirectError):
    """Offset, length or memory address is not aligned as direct I/O demands (G01, B01)."""

    exit_code = 3
    default_errno = _errno.EINVAL


class AtomicLimitError(ODirectError):
    """An atomic write that the device does not promise to keep whole (F43)."""

    exit_code = 3
    default_errno = _errno.EINVAL


class NotDirectError(ODirectError):
    """`strict` was asked for, and this could only have been done through a fallback."""

    exit_code = 4
    default_errno = _errno.EOPNOTSUPP


class WouldBlockError(ODirectError, BlockingIOError):
    """A NOWAIT request would have had to wait; nothing was done (F08)."""

    exit_code = 11
    default_errno = _errno.EAGAIN


class BadBufferError(ODirectError):
    """The caller's memory cannot be read or written (F23)."""

    exit_code = 5
    default_errno = _errno.EFAULT


class NoSpaceError(ODirectError):
    """No room: the device's end, a full file system, a quota, or the largest file size."""

    exit_code = 9
    default_errno = _errno.ENOSPC


class ReadOnlyError(ODirectError):
    """A write to what can only be read."""

    exit_code = 6
    default_errno = _errno.EROFS


class InUseError(ODirectError):
    """Mounted, locked, or otherwise in use by somebody else."""

    exit_code = 6
    default_errno = _errno.EBUSY


class VerifyError(ODirectError):
    """What was read back is not what was written."""

    exit_code = 10


class CorruptionError(ODirectError):
    """An on-disk structure that fails a check; the message names place, found and expected."""

    exit_code = 7
    default_errno = _errno.EUCLEAN


class UnsupportedError(ODirectError):
    """A feature, format or operation that is not ours."""

    exit_code = 8
    default_errno = _errno.EOPNOTSUPP


class ClosedError(ODirectError, ValueError):
    """The file, ring or device has been closed."""

    exit_code = 2
    default_errno = _errno.EBADF


class PathError(ODirectError):
    """The kernel's answer about a path or a handle that has no class of its own."""

    exit_code = 2


class MissingError(PathError, FileNotFoundError):
    """No such file or directory."""

    default_errno = _errno.ENOENT


class ExistsError(PathError, FileExistsError):
    """It exists already."""

    default_errno = _errno.EEXIST


class ForbiddenError(PathError, PermissionError):
    """Not allowed."""

    default_errno = _errno.EACCES


class DirectoryError(PathError, IsADirectoryError):
    """A directory where a file was expected."""

    default_errno = _errno.EISDIR


class NotDirectoryError(PathError, NotADirectoryError):
    """A file where a directory was expected."""

    default_errno = _errno.ENOTDIR


_BY_ERRNO: dict[int, type[ODirectError]] = {
    _errno.ENOENT: MissingError,
    _errno.EEXIST: ExistsError,
    _errno.EACCES: ForbiddenError,
    _errno.EPERM: ForbiddenError,
    _errno.EISDIR: DirectoryError,
    _errno.ENOTDIR: NotDirectoryError,
    _errno.EAGAIN: WouldBlockError,
    _errno.EFAULT: BadBufferError,
    _errno.ENOSPC: NoSpaceError,
    _errno.EDQUOT: NoSpaceError,
    _errno.EFBIG: NoSpaceError,
    _errno.EROFS: ReadOnlyError,
    _errno.EBUSY: InUseError,
    _errno.ETXTBSY: InUseError,
    _errno.EUCLEAN: CorruptionError,
    _errno.EOPNOTSUPP: UnsupportedError,
    _errno.EBADF: ClosedError,
}

_DEVICE_ERRNOS = frozenset(
    {
        _errno.EIO,
        _errno.ENODATA,
        _errno.EREMOTEIO,
        _errno.ETIMEDOUT,
        _errno.ENOLINK,
        _errno.EILSEQ,
        _errno.ENXIO,
        _errno.ENODEV,
        _errno.EINVAL,
    }
)


def from_errno(number: int, doing: str, path: object = None) -> ODirectError:
    """The error object for a positive errno met while `doing` ("reading 4096 bytes at 512").

    The class is chosen by errno; an errno that only a device gives becomes a DeviceError.
    """
    text = os.strerror(number)
    kind = _BY_ERRNO.get(number)
    if kind is None:
        kind = DeviceError if number in _DEVICE_ERRNOS else PathError
    return kind(f"{doing}: {text}", errno=number, path=path)


def _shown(path: object) -> str:
    if isinstance(path, bytes):
        return os.fsdecode(path)
    return str(path)
