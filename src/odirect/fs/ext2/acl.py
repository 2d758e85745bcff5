"""Access control lists of ext2: their two forms, and what they and the permission bits do to each other.

A list has an entry for the owner, the group and all others, any number for named users and groups, and a mask
that bounds the named ones and the group. In an attribute, as setxattr(2) has it, each entry takes 8 bytes; on the
disk those without a name take 4. The permission bits of an inode are its access list in short: owner, mask (the
group where there is no mask) and others; so a list that says no more than they do is not stored. A directory's
default list is inherited by what is made in it.

Entries are taken in the order that the kernel demands, but named ones may be in any order, and twice. Nobody is
refused anything by a list here: who may open the volume may do all.

Source: acl(5); linux/posix_acl_xattr.h for the attribute, fs/ext2/acl.h for the disk; what Linux answers was
tried out, and the tests try it again.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from odirect.base.errors import ForbiddenError, PathError, UnsupportedError

if TYPE_CHECKING:
    from odirect.base.layout import Place
    from odirect.fs.ext2.inode import Ext2Inode

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"
NAMES = frozenset((ACCESS, DEFAULT))

_VERSION = struct.Struct("<I")
_SHORT = struct.Struct("<2H")
_LONG = struct.Struct("<2HI")
_ON_DISK, _IN_ATTRIBUTE = 1, 2
_NO_ID = 0xFFFFFFFF
_ALL = 0o7


class Tag(enum.IntEnum):
    """Whom an entry is about."""

    OWNER = 0x01
    USER = 0x02
    OWNING_GROUP = 0x04
    GROUP = 0x08
    MASK = 0x10
    OTHER = 0x20


class Entry(NamedTuple):
    """What somebody may do. permissions: as in a mode, 0 to 7; identity: of a named user or group, else all ones."""

    tag: int
    permissions: int
    identity: int = _NO_ID


_NAMED = (Tag.USER, Tag.GROUP)
_TAGS = frozenset(Tag)
# Which entries may come before an entry of this kind. The kernel demands this order.
_AFTER: dict[int, tuple[int | None, ...]] = {
    Tag.OWNER: (None,),
    Tag.USER: (Tag.OWNER, Tag.USER),
    Tag.OWNING_GROUP: (Tag.OWNER, Tag.USER),
    Tag.GROUP: (Tag.OWNING_GROUP, Tag.GROUP),
    Tag.MASK: (Tag.OWNING_GROUP, Tag.GROUP),
    Tag.OTHER: (Tag.OWNING_GROUP, Tag.MASK),
}


# --- the two forms -------------------------------------------------------------------------------


def from_disk(value: bytes, place: Place) -> list[Entry]:
    """The entries of a list as the disk has it, which may be none. Raises CorruptionError; place: where it is."""
    if len(value) < _VERSION.size or _VERSION.unpack_from(value)[0] != _ON_DISK:
        raise place.corrupt(f"an access control list that begins with {value[:4]!r}", f"version {_ON_DISK}")
    return _entries(value, place.corrupt, on_disk=True)


def from_attribute(value: bytes) -> list[Entry]:
    """The entries of a list as its attribute has it. Raises PathError with EINVAL, UnsupportedError for a version."""
    if len(value) < _VERSION.size:
        raise _invalid(f"{len(value)} bytes", f"at least {_VERSION.size}")
    (version,) = _VERSION.unpack_from(value)
    if version != _IN_ATTRIBUTE:
        raise UnsupportedError(f"an access control list of version {version}; only {_IN_ATTRIBUTE} is known")
    return _entries(value, _invalid, on_disk=False)


def to_disk(entries: Sequence[Entry]) -> bytes:
    """The list as the disk has it."""
    return _VERSION.pack(_ON_DISK) + b"".join(
        _LONG.pack(*entry) if entry.tag in _NAMED else _SHORT.pack(entry.tag, entry.permissions) for entry in entries
    )


def to_attribute(entries: Sequence[Entry]) -> bytes:
    """The list as its attribute has it."""
    return _VERSION.pack(_IN_ATTRIBUTE) + b"".join(_LONG.pack(*entry) for entry in entries)


def _entries(value: bytes, wrong: Callable[[object, object], Exception], *, on_disk: bool) -> list[Entry]:
    found: list[Entry] = []
    at = _VERSION.size
    while at < len(value):
        left = len(value) - at
        if left < _SHORT.size:
            raise wrong(f"an access control list with {left} bytes at its end", "whole entries")
        tag, permissions = _SHORT.unpack_from(value, at)
        if tag not in _TAGS:
            raise wrong(f"an access control list with tag {tag:#x}", "a known one")
        named = tag in _NAMED
        size = _LONG.size if named or not on_disk else _SHORT.size
        if left < size:
            raise wrong(f"an access control list with {left} bytes at its end", "whole entries")
        found.append(Entry(tag, permissions, _LONG.unpack_from(value, at)[2] if named else _NO_ID))
        at += size
    return found


def _invalid(found: object, expected: object) -> PathError:
    return PathError(f"an access control list: found {found}, expected {expected}", errno=errno.EINVAL)


def _check(entries: Sequence[Entry], wrong: Callable[[object, object], Exception]) -> None:
    """Raise unless there is one entry for owner, group and others each, in order, and a mask if there are names.

    Source: acl(5), valid ACLs; posix_acl_valid.
    """
    before: int | None = None
    for tag, permissions, _ in entries:
        if before not in _AFTER[tag]:
            after = "the beginning" if before is None else Tag(before).name
            raise wrong(f"{Tag(tag).name} after {after} in an access control list", "the order of acl(5)")
        if permissions & ~_ALL:
            raise wrong(f"permissions {permissions:#o} in an access control list", "0 to 7")
        before = tag
    if before != Tag.OTHER:
        raise wrong("an access control list that ends early", "an entry for all others")
    tags = {entry.tag for entry in entries}
    if Tag.MASK not in tags and not tags.isdisjoint(_NAMED):
        raise wrong("an access control list with names and no mask", "a mask")


# --- lists and permission bits -------------------------------------------------------------------


def mode_of(entries: Sequence[Entry], mode: int) -> tuple[int, bool]:
    """(the mode with the permission bits that the list has, whether these say all that the list says).

    Source: posix_acl_equiv_mode.
    """
    by_tag = {entry.tag: entry.permissions for entry in entries}
    group = by_tag.get(Tag.MASK, by_tag[Tag.OWNING_GROUP])
    bits = by_tag[Tag.OWNER] << 6 | group << 3 | by_tag[Tag.OTHER]
    return mode & ~0o777 | bits, len(entries) == 3


def with_mode(entries: Sequence[Entry], mode: int) -> list[Entry]:
    """The list after a chmod to `mode`: owner, others, and the mask, or the group where there is no mask.

    Source: posix_acl_chmod.
    """
    group = Tag.MASK if any(entry.tag == Tag.MASK for entry in entries) else Tag.OWNING_GROUP
    shifts: dict[int, int] = {Tag.OWNER: 6, group: 3, Tag.OTHER: 0}
    return [
        entry._replace(permissions=mode >> shifts[entry.tag] & _ALL) if entry.tag in shifts else entry
        for entry in entries
    ]


# --- what is done to an inode --------------------------------------------------------------------


def put(inode: Ext2Inode, attributes: dict[bytes, bytes], name: bytes, value: bytes | None) -> bool:
    """Put the list `value` (in the attribute's form; None or empty: no list) into the attributes of `inode`.

    An access list changes the inode's mode, and is kept only if it says more. Whether anything was changed: to
    take a list away where there is none is no error. Raises as Linux answers, before anything is changed:
    PathError with EINVAL, ForbiddenError (EACCES) for a default list of what is no directory, UnsupportedError
    for a symbolic link. Source: do_set_acl, set_posix_acl.
    """
    entries = from_attribute(value) if value else []
    for entry in entries:
        if entry.tag in _NAMED and entry.identity == _NO_ID:
            raise _invalid(f"identity {entry.identity}", "that of a user or group")
    if inode.is_symlink:
        raise UnsupportedError("a symbolic link has no access control list", path=name)
    if name == DEFAULT and not inode.is_dir:
        if not entries:
            return False
        raise ForbiddenError("only a directory has a default access control list", path=name)
    if not entries:
        return attributes.pop(name, None) is not None
    _check(entries, _invalid)
    is_all = False
    if name == ACCESS:
        inode.mode, is_all = mode_of(entries, inode.mode)
    if is_all:
        attributes.pop(name, None)
    else:
        attributes[name] = to_attribute(entries)
    return True


def follow_mode(inode: Ext2Inode, attributes: dict[bytes, bytes], place: Place) -> None:
    """Make the access list among the attributes of `inode` say what its new mode says.

    Raises CorruptionError for a list that cannot be; place: where the inode is.
    """
    entries = with_mode(_believed(attributes[ACCESS], place), inode.mode)
    _, is_all = mode_of(entries, inode.mode)
    if is_all:
        del attributes[ACCESS]
    else:
        attributes[ACCESS] = to_attribute(entries)


def inherit(inode: Ext2Inode, default: bytes, place: Place) -> dict[bytes, bytes]:
    """The attributes that a new inode has from the default list of its directory; it bounds the inode's mode.

    Not for symbolic links. Raises CorruptionError for a list that cannot be; place: where the directory is.
    Source: acl(5), object creation and default ACLs; posix_acl_create.
    """
    inherited = {DEFAULT: default} if inode.is_dir else {}
    entries = _believed(default, place)
    bits, is_all = mode_of(entries, 0)
    inode.mode &= bits | ~0o777
    if not is_all:
        inherited[ACCESS] = to_attribute(with_mode(entries, inode.mode))
    return inherited


def most(default: bytes, place: Place) -> int:
    """The permission bits that what inherits the list `default` has at most. Raises CorruptionError as `inherit`."""
    return mode_of(_believed(default, place), 0)[0]


def _believed(value: bytes, place: Place) -> list[Entry]:
    """The entries of a list that a volume has, which must be valid."""
    entries = from_attribute(value)
    _check(entries, place.corrupt)
    return entries
