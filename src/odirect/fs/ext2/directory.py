"""The entries of ext2's directories: read, checked and looked up.

A directory with an index (`InodeFlags.INDEX`) is read as the plain list that it is too: what the index
keeps lies behind entries that are free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from odirect.fs.ext2.format import ENTRY_HEAD, NAME_BYTES, FileType, entry_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from odirect.base.layout import Place
    from odirect.cache.metacache import MetaCache
    from odirect.fs.ext2.blockmap import BlockMap
    from odirect.fs.ext2.geometry import Geometry
    from odirect.fs.ext2.inode import Ext2Inode

#: The shortest that an entry may be, as the kernel has it: one with a name of one byte, free or not.
LEAST_ENTRY_BYTES = entry_bytes(1)
_DOTS = (b".", b"..")


class Entry(NamedTuple):
    """A directory's entry at byte `offset` of its block. inode 0: it is free, and name says nothing.

    rec_len: bytes to the next one. file_type: a `FileType`, UNKNOWN where the volume keeps none.
    """

    offset: int
    inode: int
    rec_len: int
    name: bytes
    file_type: int


class FoundEntry(NamedTuple):
    """Where a name is: block of the device, byte in it, and the byte of the entry before it in the same block."""

    block: int
    offset: int
    previous_offset: int | None
    inode: int
    file_type: int


def entries(geometry: Geometry, data: memoryview | bytes | bytearray, place: Place) -> Iterator[Entry]:
    """All entries of one block of a directory, free ones too, in order.

    place: where the block is. Raises CorruptionError at the first that is no entry: its length, its name,
    its inode, its type.
    """
    end = len(data)
    if end != geometry.block_bytes:
        raise place.corrupt(f"{end} bytes", f"a block of {geometry.block_bytes} bytes")
    unpack = ENTRY_HEAD.struct.unpack_from
    head_bytes = ENTRY_HEAD.size
    inodes_count, typed = geometry.inodes_count, geometry.has_file_type
    raw = bytes(data)
    at = 0
    while at < end:
        if end - at < LEAST_ENTRY_BYTES:
            raise _at(place, at).corrupt(f"{end - at} bytes left", f"an entry of {LEAST_ENTRY_BYTES} or more")
        inode, rec_len, name_len, file_type = unpack(raw, at)
        if rec_len < LEAST_ENTRY_BYTES or rec_len & 3 or rec_len > end - at:
            raise _at(place, at).corrupt(
                f"rec_len {rec_len}", f"a multiple of 4 from {LEAST_ENTRY_BYTES} to {end - at}, which ends the block"
            )
        name = b""
        if inode:
            if not typed:
                name_len |= file_type << 8
                file_type = FileType.UNKNOWN
            name = raw[at + head_bytes : at + head_bytes + name_len]
            if (
                not 0 < name_len <= NAME_BYTES
                or entry_bytes(name_len) > rec_len
                or inode > inodes_count
                or file_type > FileType.SYMLINK
                or 0 in name
                or b"/" in name
            ):
                raise _wrong_entry(geometry, _at(place, at), Entry(at, inode, rec_len, name, file_type), name_len)
        else:
            file_type = FileType.UNKNOWN
        yield Entry(at, inode, rec_len, name, file_type)
        at += rec_len


def find(cache: MetaCache, blockmap: BlockMap, inode: Ext2Inode, name: bytes) -> FoundEntry | None:
    """Where the entry `name` of directory `inode` is, or None.

    Raises BlockMiss, naming all blocks of the directory that are not cached, and CorruptionError for any
    wrong entry in the blocks up to the one that has the name, in all where none has: each block is checked
    once, and again after `BlockMap.changed`. ValueError for what can be no name.
    """
    if not 0 < len(name) <= NAME_BYTES or b"/" in name or 0 in name:
        raise ValueError(f"{name!r} cannot be the name of an entry")
    geometry = blockmap.geometry
    numbers, views = _blocks(cache, blockmap, inode)
    head_bytes = ENTRY_HEAD.size
    length = len(name)
    for index, (block, view) in enumerate(zip(numbers, views, strict=True)):
        if index not in blockmap.verified:
            _check_block(geometry, view, block, index, inode)
            blockmap.verified.add(index)
        # Only where the bytes of the name are, with its length before them, need the entries be walked.
        raw = bytes(view)
        at = raw.find(name, head_bytes)
        while at >= 0 and (at & 3 or raw[at - 2] != length):
            at = raw.find(name, at + 1)
        if at < 0:
            continue
        previous = None
        for entry in entries(geometry, view, _place(geometry, block, inode)):
            if entry.name == name and entry.inode:
                return FoundEntry(block, entry.offset, previous, entry.inode, entry.file_type)
            previous = entry.offset
    return None


def find_in_block(cache: MetaCache, blockmap: BlockMap, inode: Ext2Inode, block: int, name: bytes) -> FoundEntry | None:
    """`find` in one block of the directory, which must have been checked before."""
    geometry = blockmap.geometry
    previous = None
    for entry in entries(geometry, cache.get(block), _place(geometry, block, inode)):
        if entry.name == name and entry.inode:
            return FoundEntry(block, entry.offset, previous, entry.inode, entry.file_type)
        previous = entry.offset
    return None


def index(cache: MetaCache, blockmap: BlockMap, inode: Ext2Inode) -> dict[bytes, int]:
    """Every name of directory `inode`, with the block that it is in. Raises as `list_all` does."""
    numbers, views = _blocks(cache, blockmap, inode)
    found: dict[bytes, int] = {}
    for at, (block, view) in enumerate(zip(numbers, views, strict=True)):
        for entry in _check_block(blockmap.geometry, view, block, at, inode):
            if entry.inode:
                found[entry.name] = block
        blockmap.verified.add(at)
    return found


def list_all(cache: MetaCache, blockmap: BlockMap, inode: Ext2Inode) -> list[Entry]:
    """All entries in use of directory `inode`, "." and ".." first, in the order of the disk.

    Raises as `find` does, for any wrong entry in any block.
    """
    numbers, views = _blocks(cache, blockmap, inode)
    found: list[Entry] = []
    for index, (block, view) in enumerate(zip(numbers, views, strict=True)):
        found += [entry for entry in _check_block(blockmap.geometry, view, block, index, inode) if entry.inode]
        blockmap.verified.add(index)
    return found


def _blocks(cache: MetaCache, blockmap: BlockMap, inode: Ext2Inode) -> tuple[list[int], list[memoryview]]:
    """The numbers and the content of all blocks of the directory, each once."""
    geometry = blockmap.geometry
    place = geometry.inode_structure(inode.number)
    count, rest = divmod(inode.size, geometry.block_bytes)
    if rest or not 0 < count <= geometry.blocks_count:
        raise place.corrupt(f"a directory of {inode.size} bytes", f"whole blocks of {geometry.block_bytes} bytes")
    numbers: list[int] = []
    for run in blockmap.runs(0, count - 1):
        if not run.block:
            raise place.corrupt(f"a hole at block {run.file_block} of a directory", "no hole")
        numbers += range(run.block, run.block + run.count)
    if len(set(numbers)) != count:
        raise place.corrupt("a directory with the same block twice", "blocks that differ")
    return numbers, cache.get_all(numbers)


def _check_block(geometry: Geometry, view: memoryview, block: int, index: int, inode: Ext2Inode) -> list[Entry]:
    """The entries of block `index` of the directory, with "." and ".." where they belong and nowhere else."""
    place = _place(geometry, block, inode)
    found = list(entries(geometry, view, place))
    if index == 0:
        names = [entry.name for entry in found[:2]]
        if names != [b".", b".."] or not found[0].inode == inode.number or not found[1].inode:
            raise place.corrupt(
                f"{names} of inodes {[entry.inode for entry in found[:2]]}",
                f"the entries '.' (inode {inode.number}) and '..' first",
            )
    for entry in found[2:] if index == 0 else found:
        if entry.inode and entry.name in _DOTS:
            raise _at(place, entry.offset).corrupt(f"another entry {entry.name!r}", "it at the start only")
    return found


def _wrong_entry(geometry: Geometry, place: Place, entry: Entry, name_len: int) -> Exception:
    if not 0 < name_len <= NAME_BYTES or entry_bytes(name_len) > entry.rec_len:
        return place.corrupt(f"a name of {name_len} bytes", f"1 to {NAME_BYTES} that fit rec_len {entry.rec_len}")
    if entry.inode > geometry.inodes_count:
        return place.corrupt(f"inode {entry.inode}", f"a number from 1 to {geometry.inodes_count}")
    if entry.file_type > FileType.SYMLINK:
        return place.corrupt(f"file_type {entry.file_type}", f"at most {int(FileType.SYMLINK)}")
    return place.corrupt(f"name {entry.name!r}", "a name without '/' and zero bytes")


def _place(geometry: Geometry, block: int, inode: Ext2Inode) -> Place:
    return geometry.place(f"directory block {block} of inode {inode.number}", block * geometry.block_bytes)


def _at(place: Place, offset: int) -> Place:
    return place._replace(addr=place.addr + offset)
