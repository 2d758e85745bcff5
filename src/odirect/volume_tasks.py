"""What is done to a volume by path, as coroutines that both of its faces run, and the checks of what they are given.

They refer to the file system and not to the volume, so that one that is under way does not keep its caller's object.
"""

from __future__ import annotations

import errno
import numbers
import operator
import os
import stat
from collections.abc import Mapping

from odirect.base.errors import (
    ExistsError,
    MissingError,
    NotDirectError,
    NotDirectoryError,
    PathError,
    UnsupportedError,
)
from odirect.block.bio import FUA, HIPRI, NOWAIT, READ, WRITE
from odirect.block.buffers import empty
from odirect.dio.opening import OpenMode
from odirect.dio.outcome import Reason
from odirect.fs import tree
from odirect.fs.base import ACCESSES, Access, Attributes, FileKind, FileSystem, VolumeFile
from odirect.fs.paths import resolve
from odirect.fs.tree import Owner
from odirect.sched.clock import wall_ns

#: What `mknod` makes if nothing is said.
NEW_NODE = stat.S_IFREG | 0o600
# What `chown` leaves as it is.
_KEEP = -1
_SECOND_NS = 1_000_000_000
# The kernel's mode_t, of which 16 bits mean something.
_LARGEST_MODE = 0o177777


# --- files ---------------------------------------------------------------------------------------


def transfer_flags(
    mode: OpenMode,
    access: Access,
    reasons: Mapping[int, Reason],
    path: object,
    *,
    dsync: bool,
    nowait: bool,
    hipri: bool,
    atomic: bool,
) -> int:
    """The flags of every request of a file that is opened so. reasons: of `volume_opening.Image`.

    Raises ValueError for an access that is none, NotDirectError where "strict" cannot be had, UnsupportedError
    for atomic.
    """
    if atomic:
        message = "writes cannot be atomic in a volume: its file system gives no run of blocks that promises it"
        raise UnsupportedError(message, path=path)
    if access not in ACCESSES:
        raise ValueError(f"access {access!r}: use 'auto', 'strict' or 'buffered'")
    for op, wanted in ((READ, mode.readable), (WRITE, mode.writable)):
        if access == "strict" and wanted and op in reasons:
            message = f"the volume's image does not go past the page cache: {reasons[op].value}"
            raise NotDirectError(message, path=path)
    return (FUA if dsync else 0) | (NOWAIT if nowait else 0) | (HIPRI if hipri else 0)


async def open_file(
    file_system: FileSystem, path: bytes, mode: OpenMode, *, permissions: int, owner: Owner
) -> VolumeFile:
    """A handle of the file at `path`, opened, made or cut as `mode` says. Raises ValueError for no permissions."""
    return await tree.open_file(
        file_system,
        path,
        writable=mode.writable,
        create=mode.create,
        exclusive=mode.exclusive,
        truncate=mode.truncate,
        permissions=permissions_of(permissions),
        owner=owner,
    )


async def read_bytes(file_system: FileSystem, path: bytes) -> bytes:
    """All bytes of the file at `path`."""
    file = await tree.open_file(file_system, path, writable=False)
    try:
        buffer = empty(file.size_bytes)
        return bytes(buffer[: await tree.read_whole(file, buffer)])
    finally:
        await file.close()


async def write_bytes(file_system: FileSystem, path: bytes, data: memoryview, *, permissions: int, owner: Owner) -> int:
    """How many bytes were written: all of `data`, which the file at `path` then holds, and nothing else."""
    file = await tree.open_file(
        file_system,
        path,
        writable=True,
        create=True,
        truncate=True,
        permissions=permissions_of(permissions),
        owner=owner,
    )
    try:
        await tree.write_whole(file, 0, data)
    finally:
        await file.close()
    return len(data)


# --- looking -------------------------------------------------------------------------------------


async def found_at(file_system: FileSystem, path: bytes, *, follow: bool) -> Attributes | None:
    """What is at `path`, None if nothing is: also for links in a ring, and for names that are too long."""
    try:
        return await resolve(file_system, path, follow=follow)
    except (MissingError, NotDirectoryError):
        return None
    except PathError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise


async def xattrs(file_system: FileSystem, path: bytes, *, follow: bool) -> dict[bytes, bytes]:
    """The extended attributes of what is at `path`, by their full names."""
    found = await resolve(file_system, path, follow=follow)
    return await file_system.xattrs(found.inode)


# --- making --------------------------------------------------------------------------------------


async def make_directory(
    file_system: FileSystem, path: bytes, mode: int, *, owner: Owner, parents: bool, exist_ok: bool
) -> None:
    """Make a directory; parents: and what is missing above it; exist_ok: one that is there will do."""
    permissions = permissions_of(mode)
    if parents:
        await tree.make_directories(file_system, path, permissions=permissions, owner=owner, exist_ok=exist_ok)
        return
    try:
        await tree.make(file_system, path, stat.S_IFDIR | permissions, owner=owner)
    except ExistsError:
        if not exist_ok:
            raise
        found = await found_at(file_system, path, follow=True)
        if found is None or found.kind is not FileKind.DIRECTORY:
            raise


def permissions_of(mode: int) -> int:
    """The permission bits of a mode. Raises ValueError for what is no mode, TypeError for no whole number."""
    mode = operator.index(mode)
    if not 0 <= mode <= _LARGEST_MODE:
        raise ValueError(f"the mode is {mode}; it must be from 0 to {_LARGEST_MODE:#o}")
    return stat.S_IMODE(mode)


def node_mode(mode: int, path: object) -> int:
    """The type, a file if none is said, and the permissions of what `mknod` makes."""
    permissions = permissions_of(mode)
    kind = stat.S_IFMT(mode) or stat.S_IFREG
    if kind in (stat.S_IFDIR, stat.S_IFLNK):
        raise PathError("mknod makes no directories and no links", errno=errno.EPERM, path=path)
    return kind | permissions


# --- changing ------------------------------------------------------------------------------------


async def change_mode(file_system: FileSystem, path: bytes, mode: int, *, follow: bool) -> None:
    """Set the permissions of what is at `path`. Those of a symbolic link cannot be set: UnsupportedError."""
    permissions = permissions_of(mode)
    if not follow and (await resolve(file_system, path, follow=False)).kind is FileKind.SYMLINK:
        raise UnsupportedError("a symbolic link has no permissions of its own")
    await tree.change(file_system, path, mode=permissions)


async def change_owner(file_system: FileSystem, path: bytes, uid: int, gid: int, *, follow: bool) -> None:
    """Set the owner and group of what is at `path`; -1 leaves one as it is."""
    new_uid, new_gid = (None if number == _KEEP else number for number in (uid, gid))
    await tree.change(file_system, path, follow=follow, uid=new_uid, gid=new_gid)


async def change_times(file_system: FileSystem, path: bytes, times_ns: tuple[int, int], *, follow: bool) -> None:
    """Set the times of access and change, in nanoseconds."""
    await tree.change(file_system, path, follow=follow, atime_ns=times_ns[0], mtime_ns=times_ns[1])


def chosen_times(times: tuple[float, float] | None, ns: tuple[int, int] | None) -> tuple[int, int]:
    """The nanoseconds that `utime` sets: of `times` in seconds, or `ns`, or now.

    Raises TypeError for what is not two numbers, ValueError for both, and for numbers that are no time.
    """
    if times is not None and ns is not None:
        raise ValueError("utime takes times or ns, not both")
    if times is not None:
        _check_pair("times", times, numbers.Real)
        try:
            return int(times[0] * _SECOND_NS), int(times[1] * _SECOND_NS)
        except OverflowError as error:
            raise ValueError(f"times are {times}: that is no time") from error
    if ns is not None:
        _check_pair("ns", ns, numbers.Integral)
        return int(ns[0]), int(ns[1])
    now_ns = wall_ns()
    return now_ns, now_ns


def _check_pair(name: str, given: object, kind: type) -> None:
    """Raise TypeError unless it is a tuple or list of two numbers of that kind."""
    if not isinstance(given, (tuple, list)) or len(given) != 2 or not all(isinstance(one, kind) for one in given):
        raise TypeError(f"{name} must be two {'whole ' if kind is numbers.Integral else ''}numbers, not {given!r:.99}")


async def change_xattr(
    file_system: FileSystem, path: bytes, name: str | bytes, value: bytes | None, *, follow: bool
) -> None:
    """Set an extended attribute, or remove it if there is no value."""
    found = await resolve(file_system, path, follow=follow)
    await file_system.set_xattr(found.inode, os.fsencode(name), value)
