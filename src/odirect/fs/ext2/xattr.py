"""Extended attributes of ext2: in a block of their own, or behind the inode where inodes are large.

Both are a list of entries, ended by four zero bytes, whose values fill the room from its end. In a block,
entries are sorted and carry hashes, by which the kernel lets several inodes share a block; behind the
inode neither matters. Names are given and taken whole, with the prefix that the disk keeps as a number
("user.x"). Access control lists are given and taken in the form of their attribute (`acl.py`); an empty one
is none.

Source: the kernel's documentation of ext4's data structures (Extended Attributes), as far as it is ext2's.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from odirect.base.errors import NoSpaceError, ODirectError, UnsupportedError
from odirect.fs.ext2 import acl
from odirect.fs.ext2.format import (
    GOOD_OLD_INODE_BYTES,
    NAME_BYTES,
    XATTR_ENTRY,
    XATTR_HEADER,
    XATTR_MAGIC,
    XattrEntry,
    XattrHeader,
    XattrIndex,
)

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from odirect.base.layout import Place
    from odirect.fs.ext2.geometry import Geometry

#: Prefixes of names; those that are whole names have no dot at their end.
_PREFIXES: dict[int, bytes] = {
    XattrIndex.USER: b"user.",
    XattrIndex.POSIX_ACL_ACCESS: acl.ACCESS,
    XattrIndex.POSIX_ACL_DEFAULT: acl.DEFAULT,
    XattrIndex.TRUSTED: b"trusted.",
    XattrIndex.SECURITY: b"security.",
    XattrIndex.SYSTEM: b"system.",
}
ACLS = (XattrIndex.POSIX_ACL_ACCESS, XattrIndex.POSIX_ACL_DEFAULT)
_MASK = 0xFFFFFFFF
_END = bytes(4)
#: How many inodes may share a block, as the kernel has it.
_MOST_REFERENCES = 1024


class _Stored(NamedTuple):
    """An attribute as the disk has it; sorts as the kernel sorts entries."""

    kind: int
    length: int
    name: bytes
    value: bytes


# --- reading -------------------------------------------------------------------------------------


def read_block(
    geometry: Geometry, data: memoryview | bytes | bytearray, place: Place, *, only: Container[int] | None = None
) -> dict[bytes, bytes]:
    """The attributes in the block `data`, by their whole names. place: where the block is; only: of these kinds.

    Raises CorruptionError for a wrong head, an entry or value that is not in the block, or a wrong hash,
    UnsupportedError for names of a kind that is not known here.
    """
    return _named(_stored_in_block(geometry, data, place), place, only)


def references(data: memoryview | bytes | bytearray, place: Place) -> int:
    """How many inodes share the block `data` of attributes. Raises CorruptionError for a wrong head."""
    header = XATTR_HEADER.read(data, 0, place)
    if header.magic != XATTR_MAGIC:
        raise place.corrupt(f"magic {header.magic:#010x}", f"{XATTR_MAGIC:#010x} (extended attributes)")
    if header.blocks != 1:
        raise place.corrupt(f"{header.blocks} blocks of attributes", "1")
    if not 1 <= header.refcount <= _MOST_REFERENCES:
        raise place.corrupt(f"{header.refcount} inodes that share it", f"1 to {_MOST_REFERENCES}")
    return header.refcount


def read_inode(
    geometry: Geometry, raw: memoryview | bytes | bytearray, place: Place, *, only: Container[int] | None = None
) -> dict[bytes, bytes]:
    """The attributes behind the inode whose record is `raw`; none where it is small or has no room left.

    place: where the record is; only: of these kinds. Raises as `read_block` does.
    """
    start = _start_in_inode(geometry, raw, place)
    if start is None or int.from_bytes(raw[start : start + 4], "little") != XATTR_MAGIC:
        return {}
    area = bytes(raw[start + 4 : geometry.inode_bytes])
    where = place._replace(structure=f"{place.structure}, attributes in it", addr=place.addr + start + 4)
    return _named(_entries(area, 0, 0, where, hashed=False), where, only)


def _stored_in_block(geometry: Geometry, data: memoryview | bytes | bytearray, place: Place) -> list[_Stored]:
    if len(data) != geometry.block_bytes:
        raise place.corrupt(f"{len(data)} bytes", f"a block of {geometry.block_bytes} bytes")
    references(data, place)
    return _entries(bytes(data), XATTR_HEADER.size, 0, place, hashed=True)


def _entries(area: bytes, start: int, base: int, place: Place, *, hashed: bool) -> list[_Stored]:
    """The attributes whose entries begin at `start` of `area`; values lie at their offset from `base`."""
    heads: list[tuple[int, XattrEntry, bytes]] = []
    at = start
    while area[at : at + 4] != _END:
        where = place._replace(addr=place.addr + at)
        head = XATTR_ENTRY.read(area, at, where)
        after = at + _entry_bytes(head.name_len)
        # The four zero bytes at the end need room, too.
        if after + len(_END) > len(area):
            raise where.corrupt(f"a name of {head.name_len} bytes", "one that ends before the room does")
        name = area[at + XATTR_ENTRY.size : at + XATTR_ENTRY.size + head.name_len]
        heads.append((at, head, name))
        at = after
    found: list[_Stored] = []
    for offset, head, name in heads:
        where = place._replace(addr=place.addr + offset)
        if head.value_inum:
            raise where.corrupt(f"a value in inode {head.value_inum}", "0 (only ext4 has this)")
        low = base + head.value_offs
        if head.value_size and not at + len(_END) <= low <= len(area) - head.value_size:
            raise where.corrupt(
                f"a value of {head.value_size} bytes at {head.value_offs}", f"one within bytes {at + 4} to {len(area)}"
            )
        value = area[low : low + head.value_size] if head.value_size else b""
        if hashed and head.hash and head.hash not in _entry_hashes(name, value):
            raise where.corrupt(f"hash {head.hash:#010x}", f"{_entry_hash(name, value):#010x}, that of name and value")
        found.append(_Stored(head.name_index, head.name_len, name, value))
    return found


def _named(stored: list[_Stored], place: Place, only: Container[int] | None) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for kind, _, name, value in stored:
        if only is not None and kind not in only:
            continue
        prefix = _PREFIXES.get(kind)
        if prefix is None:
            raise UnsupportedError(
                f"{place.structure} at byte {place.addr}: attributes of kind {kind} are not known", path=place.volume
            )
        if (kind in ACLS) == bool(name) or 0 in name:
            raise place.corrupt(f"name {name!r} of kind {kind}", "a name after a prefix, none after a whole name")
        whole = prefix + name
        if whole in found:
            raise place.corrupt(f"attribute {whole!r} twice", "it once")
        if kind not in ACLS:
            found[whole] = value
        elif entries := acl.from_disk(value, place):
            found[whole] = acl.to_attribute(entries)
    return found


# --- writing -------------------------------------------------------------------------------------


def build_block(attributes: Mapping[bytes, bytes], block_bytes: int) -> bytes:
    """A block with these attributes, one inode's: entries sorted, hashes as the kernel and e2fsck want them.

    Raises NoSpaceError if they do not fit, UnsupportedError for a prefix that the disk has no number for,
    ValueError for a name or an access control list that is none.
    """
    stored = sorted(_split(name, value) for name, value in attributes.items())
    block = bytearray(block_bytes)
    hashes = _fill(block, XATTR_HEADER.size, stored, hashed=True)
    XATTR_HEADER.write(XattrHeader(XATTR_MAGIC, 1, 1, _block_hash(hashes), 0, bytes(12)), block, 0)
    return bytes(block)


def check_name(name: bytes) -> None:
    """Raises UnsupportedError for an attribute's name whose prefix the disk has no number for, ValueError for
    one that is empty after it, has a zero byte, or is longer than the kernel takes (255 bytes, prefix and all)."""
    _split_name(name)
    if len(name) > NAME_BYTES:
        raise ValueError(f"{name!r}: the name of an attribute has at most {NAME_BYTES} bytes")


def store_inode(geometry: Geometry, raw: memoryview | bytearray, attributes: Mapping[bytes, bytes]) -> None:
    """Make `attributes` the ones behind the inode whose record is `raw`, instead of those that are there.

    Raises as `build_block` does, and NoSpaceError where the record has no room for any; nothing has
    changed then.
    """
    start = _start_in_inode(geometry, raw, geometry.place("an inode's record", 0))
    if start is None:
        if attributes:
            raise NoSpaceError("this inode has no room for attributes behind it")
        return
    area = bytearray(geometry.inode_bytes - start)
    if attributes:
        area[:4] = XATTR_MAGIC.to_bytes(4, "little")
        inner = bytearray(len(area) - 4)
        _fill(inner, 0, sorted(_split(name, value) for name, value in attributes.items()), hashed=False)
        area[4:] = inner
    raw[start : geometry.inode_bytes] = area


def _fill(area: bytearray, start: int, stored: list[_Stored], *, hashed: bool) -> list[int]:
    """Put the entries at `start` of `area` and the values at its end; their hashes."""
    needed = sum(_entry_bytes(one.length) + _padded(len(one.value)) for one in stored) + len(_END)
    if start + needed > len(area):
        raise NoSpaceError(f"these extended attributes take {needed} bytes, and there are {len(area) - start}")
    hashes = []
    at, end = start, len(area)
    for kind, length, name, value in stored:
        if value:
            end -= _padded(len(value))
            area[end : end + len(value)] = value
        hashes.append(_entry_hash(name, value) if hashed else 0)
        XATTR_ENTRY.write(
            XattrEntry(length, kind, end if value else 0, 0, len(value), hashes[-1]),
            area,
            at,
        )
        area[at + XATTR_ENTRY.size : at + XATTR_ENTRY.size + length] = name
        at += _entry_bytes(length)
    return hashes


def _split_name(name: bytes) -> tuple[int, bytes]:
    # Whole names first: "system." is a prefix of them.
    for kind in sorted(_PREFIXES, key=lambda kind: -len(_PREFIXES[kind])):
        prefix = _PREFIXES[kind]
        if name == prefix if kind in ACLS else name.startswith(prefix):
            rest = name[len(prefix) :]
            break
    else:
        raise UnsupportedError(f"{name!r}: ext2 has no attributes with this prefix")
    if (not rest and kind not in ACLS) or len(rest) > NAME_BYTES or 0 in rest:
        raise ValueError(f"{name!r}: 1 to {NAME_BYTES} bytes, none of them 0, come after the prefix")
    return kind, rest


def _split(name: bytes, value: bytes) -> _Stored:
    kind, rest = _split_name(name)
    stored = bytes(value)
    if kind in ACLS:
        try:
            stored = acl.to_disk(acl.from_attribute(stored))
        except ODirectError as error:
            raise ValueError(f"{name!r} is not an access control list: {error.message}") from error
    return _Stored(kind, len(rest), rest, stored)


# --- where and how large -------------------------------------------------------------------------


def _start_in_inode(geometry: Geometry, raw: memoryview | bytes | bytearray, place: Place) -> int | None:
    """Where in the record `raw` the head of its attributes is; None where there is no room for any."""
    if len(raw) < geometry.inode_bytes:
        raise place.corrupt(f"{len(raw)} bytes", f"{geometry.inode_bytes} bytes")
    room = geometry.inode_bytes - GOOD_OLD_INODE_BYTES
    extra_isize = int.from_bytes(raw[GOOD_OLD_INODE_BYTES : GOOD_OLD_INODE_BYTES + 2], "little") if room else 0
    if extra_isize > room or extra_isize % 4:
        raise place.corrupt(f"extra_isize {extra_isize}", f"a multiple of 4, at most {room}")
    # An inode that says that nothing follows its 128 bytes has no attributes behind it either.
    if not extra_isize or room - extra_isize < 2 * len(_END) + XATTR_ENTRY.size:
        return None
    return GOOD_OLD_INODE_BYTES + extra_isize


def _padded(length: int) -> int:
    return (length + 3) & ~3


def _entry_bytes(name_len: int) -> int:
    return XATTR_ENTRY.size + _padded(name_len)


# --- hashes --------------------------------------------------------------------------------------


def _entry_hash(name: bytes, value: bytes, sign: int = 0) -> int:
    """The hash of an entry: of its name by bytes, then of its value by words.

    sign: what a byte from 128 on is taken as less than its value; old kernels took bytes with a sign on
    some machines.
    """
    found = 0
    for byte in name:
        byte -= sign if byte & 0x80 else 0
        found = (found << 5 & _MASK) ^ (found >> 27) ^ (byte & _MASK)
    padded = value.ljust(_padded(len(value)), b"\0")
    for (word,) in struct.iter_unpack("<I", padded):
        found = (found << 16 & _MASK) ^ (found >> 16) ^ word
    return found


def _entry_hashes(name: bytes, value: bytes) -> tuple[int, int]:
    """The hash of an entry, and the one that kernels have written that took names as signed bytes."""
    return _entry_hash(name, value), _entry_hash(name, value, 256)


def _block_hash(hashes: list[int]) -> int:
    """The hash of a block; 0, which says that it must not be shared, where an entry's is 0."""
    found = 0
    for one in hashes:
        if not one:
            return 0
        found = (found << 16 & _MASK) ^ (found >> 16) ^ one
    return found
