"""What a program does with paths, as coroutines over any `FileSystem`: open, make, move, remove, change.

Each is what the system call of that name does on a mounted volume, errors included, for a user who
may do everything: permission bits are kept, not enforced. What checks and then acts does the latter
in one call of the file system, which checks again, so that other tasks may come in between.
Source: open(2), mkdir(2), rename(2), unlink(2), and the kernel's fs/namei.c for what they leave open.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Mapping
from typing import NamedTuple

from odirect.base.errors import (
    CorruptionError,
    ExistsError,
    MissingError,
    NoSpaceError,
    NotDirectoryError,
    ODirectError,
    PathError,
    UnsupportedError,
)
from odirect.fs.base import ACLS, Access, Attributes, DirEntry, FileKind, FileSystem, VolumeFile
from odirect.fs.paths import Spot, checked_name, failure, look_at, present, resolve, walk


class Owner(NamedTuple):
    """Whose what is made will be."""

    uid: int
    gid: int


ROOT = Owner(0, 0)


# --- files ---------------------------------------------------------------------------------------


async def open_file(
    file_system: FileSystem,
    path: bytes,
    *,
    writable: bool,
    create: bool = False,
    exclusive: bool = False,
    truncate: bool = False,
    permissions: int = 0o644,
    owner: Owner = ROOT,
) -> VolumeFile:
    """A handle of the file at `path`; create makes it if it is missing, exclusive only then.

    Raises DirectoryError, UnsupportedError for what is no regular file, ExistsError, MissingError.
    """
    while True:
        spot = await walk(file_system, path, follow=not exclusive, create=create)
        found = spot.attributes
        if found is None:
            if not create:
                raise failure(errno.ENOENT, "opening")
            try:
                inode = await file_system.create(
                    spot.directory,
                    spot.name,
                    stat.S_IFREG | stat.S_IMODE(permissions),
                    uid=owner.uid,
                    gid=owner.gid,
                )
            except ExistsError:
                if exclusive:
                    raise
                continue  # Somebody else was quicker.
            return await file_system.open_file(inode, writable=writable)
        if exclusive:
            raise failure(errno.EEXIST, "creating")
        if found.kind is FileKind.DIRECTORY:
            raise failure(errno.EISDIR, "opening")
        present(spot)
        if found.kind is not FileKind.REGULAR:
            raise UnsupportedError(f"it is a {found.kind.value}; only regular files have bytes of their own here")
        file = await file_system.open_file(found.inode, writable=writable)
        if truncate:
            try:
                await file.truncate(0)
            except BaseException:
                await file.close()
                raise
        return file


async def read_whole(file: VolumeFile, view: memoryview, offset: int = 0, *, access: Access = "auto") -> int:
    """How many bytes from byte `offset` of the file were read to `view`: all of it, or up to the file's end."""
    done = 0
    while done < len(view):
        moved = (await file.read(offset + done, [view[done:]], access=access)).transferred
        if not moved:
            break
        done += moved
    return done


async def write_whole(file: VolumeFile, offset: int, data: memoryview, *, access: Access = "auto") -> None:
    """Write all of `data` at byte `offset`. Raises NoSpaceError when a part has no room."""
    done = 0
    while done < len(data):
        moved = (await file.write(offset + done, [data[done:]], access=access)).transferred
        if not moved:
            raise failure(errno.ENOSPC, f"writing {len(data)} bytes at {offset}")
        done += moved


# --- making --------------------------------------------------------------------------------------


async def make(
    file_system: FileSystem,
    path: bytes,
    mode: int,
    *,
    owner: Owner = ROOT,
    device_number: int = 0,
    target: bytes = b"",
) -> int:
    """The inode of what is made at `path`, of the kind that `mode` says. ExistsError if anything is there."""
    if stat.S_ISLNK(mode) and not target:
        raise failure(errno.ENOENT, "making a symbolic link to nowhere")
    spot = await _free_spot(file_system, path, "creating", directory=stat.S_ISDIR(mode))
    return await file_system.create(
        spot.directory, spot.name, mode, uid=owner.uid, gid=owner.gid, device_number=device_number, target=target
    )


async def make_directories(
    file_system: FileSystem,
    path: bytes,
    *,
    permissions: int = 0o755,
    owner: Owner = ROOT,
    exist_ok: bool = False,
) -> None:
    """Make the directory at `path` and what is missing above it. A directory that is there is ExistsError, or fine."""
    missing: list[bytes] = []
    above = path
    while True:
        try:
            await resolve(file_system, above)
            break
        except MissingError:
            shorter, _, last = above.rstrip(b"/").rpartition(b"/")
            missing.append(above)
            if not last:
                raise
            above = shorter or b"/"
    if not missing:
        if exist_ok and await is_directory(file_system, path):
            return
        raise failure(errno.EEXIST, "making a directory")
    for part in reversed(missing):
        try:
            await make(file_system, part, stat.S_IFDIR | stat.S_IMODE(permissions), owner=owner)
        except ExistsError:
            # "a/.." when "a" was missing, or somebody else was quicker.
            if (part is missing[0] and not exist_ok) or not await is_directory(file_system, part):
                raise


async def link(file_system: FileSystem, source: bytes, path: bytes, *, follow: bool = False) -> None:
    """Give what is at `source` the name `path` too."""
    found = await resolve(file_system, source, follow=follow)
    spot = await _free_spot(file_system, path, "linking", directory=False)
    if found.kind is FileKind.DIRECTORY:
        raise failure(errno.EPERM, "linking a directory")
    await file_system.link(found.inode, spot.directory, spot.name)


# --- removing and moving -------------------------------------------------------------------------


async def unlink(file_system: FileSystem, path: bytes) -> None:
    """Remove the name `path` of what is no directory."""
    spot = await walk(file_system, path, follow=False)
    if spot.special:
        raise failure(errno.EISDIR, "removing")
    found = spot.attributes
    if found is not None and found.kind is FileKind.DIRECTORY:
        raise failure(errno.EISDIR, "removing")
    present(spot)
    await file_system.unlink(spot.directory, spot.name)


async def remove_directory(file_system: FileSystem, path: bytes) -> None:
    """Remove the empty directory at `path`."""
    spot = await walk(file_system, path, follow=False)
    _refuse_special(spot)
    if present(spot).kind is not FileKind.DIRECTORY:
        raise failure(errno.ENOTDIR, "removing a directory")
    await file_system.rmdir(spot.directory, spot.name)


async def remove_tree(file_system: FileSystem, path: bytes) -> None:
    """Remove the directory at `path` with all that is in it; what symbolic links lead to is left alone.

    Of a tree that others add to meanwhile, something may stay: then the error is ENOTEMPTY.
    """
    spot = await walk(file_system, path, follow=False)
    _refuse_special(spot)
    top = present(spot)
    if top.kind is not FileKind.DIRECTORY:
        raise failure(errno.ENOTDIR, "removing a tree")
    # By inode numbers, so that no depth is too deep for a path.
    stack = [(spot.directory, spot.name, top.inode, await file_system.entries(top.inode))]
    within = {top.inode}
    while stack:
        directory, name, inode, entries = stack[-1]
        if not entries:
            stack.pop()
            within.discard(inode)
            await file_system.rmdir(directory, name)
            continue
        entry = entries.pop()
        if await kind_of_entry(file_system, entry) is FileKind.DIRECTORY:
            if entry.inode in within:
                raise CorruptionError(
                    f"directory {entry.inode} is in itself, as {entry.name!r} in directory {inode}",
                    path=file_system.name,
                )
            within.add(entry.inode)
            stack.append((inode, entry.name, entry.inode, await file_system.entries(entry.inode)))
        else:
            await file_system.unlink(inode, entry.name)


async def rename(file_system: FileSystem, old: bytes, new: bytes) -> None:
    """Move what is at `old` to `new`, over what is there, as rename(2) has it."""
    source = await walk(file_system, old, follow=False, look=False)
    target = await walk(file_system, new, follow=False, look=False)
    if source.special or target.special:
        raise failure(errno.EBUSY, "renaming")
    found = (await look_at(file_system, source)).attributes
    if found is None:
        raise failure(errno.ENOENT, "renaming")
    there = (await look_at(file_system, target)).attributes
    if found.kind is not FileKind.DIRECTORY:
        if source.slash or target.slash:
            raise failure(errno.ENOTDIR, "renaming")
        if there is not None and await _is_above(file_system, there, source.directory):
            raise failure(errno.ENOTEMPTY, "renaming over a directory that it is in")
    await file_system.rename(source.directory, source.name, target.directory, target.name)


# --- looking -------------------------------------------------------------------------------------


async def is_directory(file_system: FileSystem, path: bytes) -> bool:
    """Whether there is a directory at `path`."""
    try:
        return (await resolve(file_system, path)).kind is FileKind.DIRECTORY
    except (MissingError, NotDirectoryError):
        return False


async def list_directory(file_system: FileSystem, path: bytes) -> list[DirEntry]:
    """All names in the directory at `path`."""
    found = await resolve(file_system, path)
    if found.kind is not FileKind.DIRECTORY:
        raise failure(errno.ENOTDIR, "listing")
    return [entry for entry in await file_system.entries(found.inode) if checked_name(file_system, entry.name)]


async def kind_of_entry(file_system: FileSystem, entry: DirEntry) -> FileKind:
    """What an entry is, asked of its inode where the directory does not tell."""
    if entry.kind is not FileKind.UNKNOWN:
        return entry.kind
    return (await file_system.attributes(entry.inode)).kind


async def read_link(file_system: FileSystem, path: bytes) -> bytes:
    """Where the symbolic link at `path` leads. EINVAL for anything else."""
    found = await resolve(file_system, path, follow=False)
    if found.kind is not FileKind.SYMLINK:
        raise failure(errno.EINVAL, f"reading a link that is a {found.kind.value}")
    return await file_system.read_link(found.inode)


async def change(
    file_system: FileSystem,
    path: bytes,
    *,
    follow: bool = True,
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    atime_ns: int | None = None,
    mtime_ns: int | None = None,
) -> Attributes:
    """What is at `path`, after what is given has been changed."""
    found = await resolve(file_system, path, follow=follow)
    await file_system.set_attributes(found.inode, mode=mode, uid=uid, gid=gid, atime_ns=atime_ns, mtime_ns=mtime_ns)
    return await file_system.attributes(found.inode)


def _refuse_special(spot: Spot) -> None:
    """Raise what rmdir(2) does for the root, "." and ".."."""
    if spot.special:
        number = {b"": errno.EBUSY, b".": errno.EINVAL}.get(spot.name, errno.ENOTEMPTY)
        raise failure(number, "removing a directory")


async def _is_above(file_system: FileSystem, found: Attributes, directory: int) -> bool:
    """Whether `found` is this directory or one above it."""
    if found.kind is not FileKind.DIRECTORY:
        return False
    seen = set()
    while directory not in seen:
        if directory == found.inode:
            return True
        seen.add(directory)
        directory = await file_system.lookup(directory, b"..")
    return False


async def _free_spot(file_system: FileSystem, path: bytes, doing: str, *, directory: bool) -> Spot:
    """Where `path` leads, nothing being there yet."""
    spot = await walk(file_system, path, follow=False)
    if spot.attributes is not None or spot.special:
        raise failure(errno.EEXIST, doing)
    if spot.slash and not directory:
        raise failure(errno.ENOENT, doing)
    return spot


async def make_like(
    file_system: FileSystem,
    inode: int,
    *,
    mode: int | None = None,
    owner: tuple[int, int] | None = None,
    times_ns: tuple[int, int] | None = None,
    xattrs: Mapping[bytes, bytes] | None = None,
) -> list[tuple[bytes, ODirectError]]:
    """Give an inode what its original has; None is left alone. The attributes that could not be given, and why.

    With xattrs, access lists that it has inherited and its original has not are taken away. times_ns: of access
    and of modification.
    """
    missed: list[tuple[bytes, ODirectError]] = []

    async def put(name: bytes, value: bytes | None) -> None:
        try:
            await file_system.set_xattr(inode, name, value)
        except (UnsupportedError, PathError, NoSpaceError) as error:
            missed.append((name, error))

    for name, value in (xattrs or {}).items():
        if name not in ACLS:
            await put(name, value)
    uid, gid = owner or (None, None)
    atime_ns, mtime_ns = times_ns or (None, None)
    await file_system.set_attributes(inode, mode=mode, uid=uid, gid=gid, atime_ns=atime_ns, mtime_ns=mtime_ns)
    if xattrs is not None:
        # After the mode, which they say more exactly.
        inherited = await file_system.xattrs(inode)
        for name in ACLS:
            if name in xattrs or name in inherited:
                await put(name, xattrs.get(name))
    return missed
