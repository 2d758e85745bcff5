"""From paths to inodes: one walk, with symbolic links, for every file system and every face.

Paths are bytes and begin at the volume's root, with or without a slash in front: a volume has no
working directory. A symbolic link that begins with a slash leads to the volume's root, not the
machine's, and ".." at the root stays there, so that no path leads out.
Source: path_resolution(7), symlink(7), the kernel's fs/namei.c for the order of the errors.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from odirect.base.errors import CorruptionError, MissingError, ODirectError, PathError, from_errno
from odirect.fs.base import Attributes, FileKind, FileSystem

#: Symbolic links that one path may lead through; one more is ELOOP (MAXSYMLINKS).
MOST_LINKS = 40
#: The longest path in bytes: PATH_MAX, less the byte that ends it.
LONGEST_PATH = 4095

#: Last components that are no names: what they lead to can be looked at, but not made, moved or removed.
SPECIAL = (b"", b".", b"..")


class Spot(NamedTuple):
    """Where a path leads.

    directory is the inode of the directory that `name`, the last component, is looked for in, and
    attributes what it is, None if there is nothing of that name. name is b"" for the root, and can
    be b"." or b"..". slash: the path ends with a slash, so that it can only mean a directory.
    """

    directory: int
    name: bytes
    attributes: Attributes | None
    slash: bool

    @property
    def special(self) -> bool:
        """Whether the last component is no name but the root, "." or ".."."""
        return self.name in SPECIAL


def path_bytes(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> bytes:
    """A path as a file system has it: text by the file-system encoding, other bytes as surrogates.

    Raises TypeError for what is no path, ValueError for one with a null byte in it.
    """
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte in a path")
    return encoded


async def walk(file_system: FileSystem, path: bytes, *, follow: bool, look: bool = True, create: bool = False) -> Spot:
    """Where `path` leads. follow: if it ends at a symbolic link, where that leads.

    look=False: the last name is not looked for (`look_at` does that), unless it is the root, "." or "..".
    create: for a file that may be made; DirectoryError if a slash follows its name, whatever is there.

    Everything but the last component must be there: MissingError, NotDirectoryError. PathError with
    ELOOP after 40 links, ENAMETOOLONG for a name or path that is too long. The empty path is MissingError.
    """
    if len(path) > LONGEST_PATH:
        raise _failure(errno.ENAMETOOLONG)
    if not path:
        raise _failure(errno.ENOENT)
    root = await file_system.attributes(file_system.root)
    here, directory, name = root, root.inode, b""
    slash = path.endswith(b"/")
    links = 0
    # Components still to go, the next one last.
    ahead = _components(path)
    while ahead:
        if here.kind is not FileKind.DIRECTORY:
            raise _failure(errno.ENOTDIR)
        name = ahead.pop()
        above = here
        directory = above.inode
        if name == b"." or (name == b".." and directory == root.inode):
            continue
        if create and slash and not ahead and name != b"..":
            raise _failure(errno.EISDIR)
        if not (look or ahead) and name != b"..":
            return Spot(directory, name, None, slash)
        found = await _child(file_system, directory, name)
        if found is None:
            if ahead:
                raise _failure(errno.ENOENT)
            return Spot(directory, name, None, slash)
        here = found
        if here.kind is not FileKind.SYMLINK or not (ahead or follow):
            continue
        links += 1
        if links > MOST_LINKS:
            raise _failure(errno.ELOOP)
        target = await file_system.read_link(here.inode)
        if not target:
            raise _failure(errno.ENOENT)
        slash = slash or (not ahead and target.endswith(b"/"))
        ahead += _components(target)
        here = above
        if target.startswith(b"/"):
            here, directory, name = root, root.inode, b""
    return Spot(directory, name, here, slash)


async def look_at(file_system: FileSystem, spot: Spot) -> Spot:
    """The same, once its last name has been looked for."""
    if spot.special:
        return spot
    return spot._replace(attributes=await _child(file_system, spot.directory, spot.name))


async def resolve(file_system: FileSystem, path: bytes, *, follow: bool = True) -> Attributes:
    """What is at `path`. A path that ends with a slash is followed, and must be a directory."""
    spot = await walk(file_system, path, follow=follow or path.endswith(b"/"))
    return present(spot)


def present(spot: Spot) -> Attributes:
    """What is at the end of a walk. Raises MissingError, and NotDirectoryError if a slash follows what is none."""
    if spot.attributes is None:
        raise _failure(errno.ENOENT)
    if spot.slash and spot.attributes.kind is not FileKind.DIRECTORY:
        raise _failure(errno.ENOTDIR)
    return spot.attributes


def checked_name(file_system: FileSystem, name: bytes) -> bytes:
    """A name that a directory gave, once it is certain that it is one and leads nowhere else.

    For whoever makes files of that name elsewhere: "..", or a slash in a name, would leave the place
    that was meant. Raises CorruptionError.
    """
    if name in SPECIAL or b"/" in name or b"\0" in name:
        raise CorruptionError(f"a directory entry: found the name {name!r}, expected a name", path=file_system.name)
    return name


async def _child(file_system: FileSystem, directory: int, name: bytes) -> Attributes | None:
    """What has this name in a directory, None if nothing has."""
    if len(name) > file_system.name_bytes:
        raise _failure(errno.ENAMETOOLONG)
    try:
        return await file_system.attributes(await file_system.lookup(directory, name))
    except MissingError:
        return None


def _components(path: bytes) -> list[bytes]:
    """The components of `path`, last one first."""
    return [part for part in reversed(path.split(b"/")) if part]


def failure(number: int, doing: str) -> ODirectError:
    """The error of a path for errno `number`; a PathError where `from_errno` would blame the device."""
    if number in (errno.EINVAL, errno.EBUSY, errno.ENODATA, errno.ENXIO):
        return PathError(f"{doing}: {os.strerror(number)}", errno=number)
    return from_errno(number, doing)


def _failure(number: int) -> ODirectError:
    return failure(number, "looking it up")
