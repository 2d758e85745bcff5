"""Changing directories: entries added, removed and led elsewhere.

In blocks that are made here no entry crosses a 512-byte boundary: free entries fill each sector, so that
an addition changes one sector, which a power cut leaves old or new. In other blocks (the kernel's) an
entry's room may reach over several sectors of the device. An addition must still change just one; where
it cannot, the heads of free entries are first written into the room, where nobody sees them, and linked
after the next commit.

Survives a crash: additions are written as ENTRY, after the inodes that they lead to, removals LATE, after
all additions; until then a removed entry is held back, and neither its slot nor its name is used again. In
a block that is new to the directory (FRESH) a name may be seen before its inode is there; that inode
is free on the disk then, and a checker drops the name.

An index of hashes (InodeFlags.INDEX) is given up by the first addition; its blocks read as plain ones.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from odirect.base.errors import NoSpaceError, PathError
from odirect.cache.metacache import ENTRY, FRESH, LATE
from odirect.fs.ext2 import grow
from odirect.fs.ext2.allocate import NeedsCommit
from odirect.fs.ext2.directory import LEAST_ENTRY_BYTES, list_all
from odirect.fs.ext2.format import (
    ENTRY_HEAD,
    LINK_MAX,
    NAME_BYTES,
    SECTOR_BYTES,
    EntryHead,
    FileType,
    InodeFlags,
    entry_bytes,
)

if TYPE_CHECKING:
    from odirect.block.device import BlockDevice
    from odirect.fs.ext2.directory import FoundEntry
    from odirect.fs.ext2.inode import Ext2Inode

__all__ = [
    "EntryNotes",
    "NeedsCommit",
    "Volume",
    "add_entries",
    "add_entry",
    "is_empty",
    "make_directory_block",
    "remove_entry",
    "replace_entry",
]

_HEAD = ENTRY_HEAD.struct
# How many more blocks are looked at before room that takes a commit to be used is used.
_PATIENCE_BLOCKS = 16

#: The key of a chain of free entries' heads inside an entry's room: block, where it begins and ends.
_Chain = tuple[int, int, int]


class EntryNotes:
    """What is remembered of directories between one change and the next, and about the commits between them."""

    def __init__(self) -> None:
        #: (directory, name) of what was removed since the last snapshot.
        self.removed: set[tuple[int, bytes]] = set()
        #: By directory, and length of an entry: blocks of the directory before this one have no room for it.
        self.hints: dict[int, dict[int, int]] = {}
        #: By directory: what was left of the room that the last addition took.
        self.rooms: dict[int, Room] = {}
        #: Chains that were written, each with the number of snapshots that there had been.
        self.chains: dict[_Chain, int] = {}
        #: What is to be done before the next snapshot.
        self.first: dict[_Chain, Callable[[], object]] = {}
        self._snapshots = 0
        self._committed = 0

    def forget(self, directory: int) -> None:
        """What is known of the room in the directory does not count any more."""
        self.hints.pop(directory, None)
        self.rooms.pop(directory, None)

    def snapshot_taken(self) -> None:
        """A commit has begun: what is removed from now on is of the next one."""
        self._snapshots += 1
        self.removed.clear()

    def committed(self) -> None:
        """It has ended well."""
        self._committed = self._snapshots

    def chain_written(self, chain: _Chain) -> None:
        """The chain is in the cache, to be in the next snapshot."""
        self.chains[chain] = self._snapshots

    def chain_is_there(self, chain: _Chain) -> bool:
        """Whether the device has the chain."""
        return self.chains.get(chain, self._committed) < self._committed


class _Notes(Protocol):
    @property
    def notes(self) -> EntryNotes:
        """The volume's notes on directories."""
        ...


class Volume(grow.Volume, Protocol):
    """What changing directories needs of a volume."""

    device: BlockDevice
    #: Whether the blocks that are kept for root may be used.
    privileged: bool

    @property
    def committer(self) -> _Notes:
        """What commits the volume."""
        ...

    @property
    def now_ns(self) -> Callable[[], int]:
        """The time of day, in nanoseconds since 1970."""
        ...


class Room(NamedTuple):
    """A place for an entry: bytes [start, end) of a block. head: the entry in use that gives it up, or -1."""

    block: int
    head: int
    start: int
    end: int


class _Search:
    """What a walk over blocks has found besides room."""

    def __init__(self) -> None:
        self.room: Room | None = None
        #: An entry whose room could be used if its sectors had heads: (block, offset, chain).
        self.wide: tuple[int, int, _Chain] | None = None
        #: Whether there will be room after a commit.
        self.waits = False


def add_entry(volume: Volume, directory: Ext2Inode, name: bytes, number: int, file_type: int) -> int:
    """Put `name`, which is not there yet, into the directory, leading to inode `number`; the block that it is in.

    The directory grows if need be; its size, times and flags change, its links are the caller's. Raises
    NeedsCommit where the order of writes wants a commit between, PathError (EMLINK) for a
    subdirectory too many, ValueError for what is no name, NoSpaceError, BlockMiss, CorruptionError.
    """
    return add_entries(volume, directory, [(name, number, file_type)])[0]


def add_entries(volume: Volume, directory: Ext2Inode, names: Sequence[tuple[bytes, int, int]]) -> list[int]:
    """Put (name, number, file_type) into the directory, as `add_entry` does; the names differ. Their blocks."""
    notes = volume.committer.notes
    for name, _, file_type in names:
        if not 0 < len(name) <= NAME_BYTES or b"/" in name or 0 in name:
            raise ValueError(f"{name!r} cannot be the name of an entry")
        if file_type == FileType.DIRECTORY and directory.links > LINK_MAX:
            raise PathError(f"it has {directory.links} links, the most are {LINK_MAX}", errno=errno.EMLINK, path=name)
        if (directory.number, name) in notes.removed:
            # Both would be seen at once after a crash.
            raise NeedsCommit("the name was removed, and is on the disk still")
    blocks: list[int] = []
    sector = _sector(volume)
    room = _last_room(volume, directory)
    while len(blocks) < len(names):
        need = entry_bytes(len(names[len(blocks)][0]))
        # Behind the one before there often is room for the next, or in the free entry after it.
        if room is None or not _fits(room, need, sector):
            room = _next_free(volume, room, need, sector) if room is not None else None
            room = room or _find_room(volume, directory, need) or _add_block(volume, directory)
        count, room = _fill(volume, room, names, len(blocks), sector)
        blocks += [room.block] * count
    if room is not None:
        notes.rooms[directory.number] = room
    # What is undone gives room back that the notes know nothing of.
    volume.cache.undo(lambda: notes.forget(directory.number))
    _changed(volume, directory, drop_index=True)
    return blocks


def _last_room(volume: Volume, directory: Ext2Inode) -> Room | None:
    """What the addition before left of its room, if that is room still."""
    room = volume.committer.notes.rooms.get(directory.number)
    if room is None:
        return None
    inode, rec_len, name_len, kind = _HEAD.unpack_from(volume.cache.get(room.block), room.head)
    if not volume.geometry.has_file_type:
        name_len |= kind << 8
    unchanged = inode and room.head + rec_len == room.end and room.head + entry_bytes(name_len) == room.start
    return room if unchanged else None


def _limit(room: Room, sector: int) -> int:
    """Where entries in the room end at the latest, so that one sector changes."""
    changes = room.start if room.head < 0 else room.head + 4
    return min(room.end, (changes // sector + 1) * sector)


def _fits(room: Room, need: int, sector: int) -> bool:
    """Whether an entry of `need` bytes has room there, so that one sector changes."""
    return room.start + need <= _limit(room, sector)


def _fill(
    volume: Volume, room: Room, names: Sequence[tuple[bytes, int, int]], first: int, sector: int
) -> tuple[int, Room]:
    """Put as many of `names`, from `first` on, into the room as fit; how many, at least one, and what is left of it."""
    limit = _limit(room, sector)
    typed = volume.geometry.has_file_type
    parts: list[bytes] = []
    last = room.start
    start = last
    count = 0
    for name, number, file_type in itertools.islice(names, first, None):
        length = len(name)
        need = entry_bytes(length)
        if count and start + need > limit:
            break
        last, start = start, start + need
        parts += (_HEAD.pack(number, need, length, file_type if typed else 0), name, bytes(need - _HEAD.size - length))
        count += 1
    view = volume.cache.change(room.block, ENTRY)
    if room.head >= 0:
        _set_length(view, room.head, room.start - room.head)
    view[room.start : start] = b"".join(parts)
    # The last one has what is left.
    _set_length(view, last, room.end - last)
    return count, Room(room.block, last, start, room.end)


def _next_free(volume: Volume, room: Room, need: int, sector: int) -> Room | None:
    """The free entry right behind `room`, if there is one that serves."""
    view = volume.cache.get(room.block)
    at = room.end
    if len(view) - at < LEAST_ENTRY_BYTES:
        return None
    inode, rec_len, _, _ = _HEAD.unpack_from(view, at)
    found = Room(room.block, -1, at, at + rec_len)
    sound = not rec_len & 3 and at + rec_len <= len(view)
    if inode or not sound or not _fits(found, need, sector) or volume.cache.held_back(room.block, at):
        return None
    return found


def remove_entry(volume: Volume, directory: Ext2Inode, found: FoundEntry) -> None:
    """Take the entry `found` (by `directory.find`) out of the directory. Raises BlockMiss.

    RuntimeError if `found` is not what is there any more: the caller looked in another transaction.
    """
    notes, cache = volume.committer.notes, volume.cache
    head, name = _entry_at(volume, found)
    cache.hold_back(found.block, found.offset, 4)
    view = cache.change(found.block, LATE)
    ENTRY_HEAD.write(head._replace(inode=0), view, found.offset)
    key = (directory.number, name)
    if cache.held_back(found.block, found.offset) and key not in notes.removed:
        notes.removed.add(key)
        cache.undo(lambda: notes.removed.discard(key))
    _room_made(volume, directory, found.block)
    _changed(volume, directory)


def replace_entry(volume: Volume, directory: Ext2Inode, found: FoundEntry, number: int, file_type: int) -> None:
    """Let the entry `found` lead to inode `number` instead. Raises as `remove_entry` does."""
    head, _ = _entry_at(volume, found)
    kind = file_type if volume.geometry.has_file_type else head.file_type
    view = volume.cache.change(found.block, ENTRY)
    ENTRY_HEAD.write(head._replace(inode=number, file_type=kind), view, found.offset)
    _changed(volume, directory)


def is_empty(volume: Volume, directory: Ext2Inode) -> bool:
    """Whether nothing but "." and ".." is in the directory. Raises BlockMiss, CorruptionError."""
    found = list_all(volume.cache, volume.map_of(directory), directory)
    return all(entry.name in (b".", b"..") for entry in found)


def make_directory_block(volume: Volume, directory: Ext2Inode, parent: int) -> None:
    """Give a new directory its first block, with "." and ".."; its size becomes one block.

    The links are the caller's. Raises NoSpaceError, NeedsCommit, BlockMiss.
    """
    volume.committer.notes.forget(directory.number)
    room = _add_block(volume, directory)
    kind = FileType.DIRECTORY if volume.geometry.has_file_type else 0
    view = volume.cache.change(room.block, FRESH)
    # A checker wants "." to be no longer than it must be; ".." has what is left of the sector.
    own = entry_bytes(1)
    for at, length, number, name in ((0, own, directory.number, b"."), (own, room.end - own, parent, b"..")):
        ENTRY_HEAD.write(EntryHead(number, length, len(name), kind), view, at)
        view[at + ENTRY_HEAD.size : at + ENTRY_HEAD.size + len(name)] = name


# Parts.


def _changed(volume: Volume, directory: Ext2Inode, *, drop_index: bool = False) -> None:
    """The directory's times, and the end of its index: an entry in any place contradicts the hashes."""
    directory.remember(volume.cache)
    if drop_index:
        directory.flags &= ~InodeFlags.INDEX
    directory.mtime_ns = directory.ctime_ns = directory.storable_time(volume.now_ns())
    volume.store(directory)


def _entry_at(volume: Volume, found: FoundEntry) -> tuple[EntryHead, bytes]:
    """The head and the name of an entry in use that was found before."""
    view = volume.cache.get(found.block)
    head = EntryHead(*ENTRY_HEAD.struct.unpack_from(view, found.offset))
    if head.inode != found.inode:
        raise RuntimeError(f"{found} has changed since: inode {head.inode}")
    length = head.name_len | (0 if volume.geometry.has_file_type else head.file_type << 8)
    start = found.offset + ENTRY_HEAD.size
    return head, bytes(view[start : start + length])


def _set_length(view: memoryview, offset: int, rec_len: int) -> None:
    head = EntryHead(*ENTRY_HEAD.struct.unpack_from(view, offset))
    if not head.inode:
        # The name of a free entry counts as well: one that is longer than its room is called corrupt.
        head = head._replace(name_len=0, file_type=0)
    ENTRY_HEAD.write(head._replace(rec_len=rec_len), view, offset)


def _blocks(volume: Volume, directory: Ext2Inode, first: int) -> list[int]:
    """The directory's blocks on the device from its block `first` on."""
    count = directory.size // volume.geometry.block_bytes
    numbers: list[int] = []
    if first < count:
        for run in volume.map_of(directory).runs(first, count - 1):
            if not run.block:
                place = volume.geometry.inode_structure(directory.number)
                raise place.corrupt(f"a hole at block {run.file_block} of a directory", "no hole")
            numbers += range(run.block, run.block + run.count)
    return numbers


def _room_made(volume: Volume, directory: Ext2Inode, block: int) -> None:
    """Something was removed from the device's block: earlier blocks may have room again."""
    volume.committer.notes.rooms.pop(directory.number, None)
    hints = volume.committer.notes.hints.get(directory.number)
    if hints:
        index = _blocks(volume, directory, 0).index(block)
        for need, first in hints.items():
            hints[need] = min(first, index)


def _find_room(volume: Volume, directory: Ext2Inode, need: int) -> Room | None:
    """The first place for an entry of `need` bytes; None if the directory must grow. May raise NeedsCommit."""
    notes, cache = volume.committer.notes, volume.cache
    hints = notes.hints.setdefault(directory.number, {})
    # Where there was no room for a shorter entry there is none for this one.
    first = max((at for length, at in hints.items() if length <= need), default=0)
    numbers = _blocks(volume, directory, first)
    cache.get_all(numbers)
    full = first
    wide: tuple[int, int, _Chain] | None = None
    waits = False
    last = first + len(numbers)
    for index, block in enumerate(numbers, first):
        search = _Search()
        _look(volume, directory, block, need, search)
        if search.room is not None:
            hints[need] = max(full, hints.get(need, 0))
            return search.room
        if wide is None and search.wide is not None:
            wide, last = search.wide, index + _PATIENCE_BLOCKS
        waits = waits or search.waits
        if index >= last:
            break  # Else every name would be sought room for in all of a large directory.
        if full == index and not search.wide and not search.waits:
            full = index + 1
    hints[need] = max(full, hints.get(need, 0))
    if wide is not None:
        return _use_wide(volume, *wide)
    if waits:
        raise NeedsCommit("what was removed from the directory is on the disk still")
    return None


def _look(volume: Volume, directory: Ext2Inode, block: int, need: int, search: _Search) -> None:
    """Look for room in one block: behind an entry in use, or in free entries side by side."""
    cache = volume.cache
    view = cache.get(block)
    size = len(view)
    sector = _sector(volume)
    wide_names = not volume.geometry.has_file_type
    unpack = ENTRY_HEAD.struct.unpack_from
    at = 0
    # The place that ends at `at`; start > at if there is none.
    head, start, reach = -1, size, 0
    while at < size:
        if size - at < LEAST_ENTRY_BYTES:
            raise _corrupt(volume, directory, block, at, f"{size - at} bytes left", "an entry")
        inode, rec_len, name_len, kind = unpack(view, at)
        if wide_names:
            name_len |= kind << 8
        end = at + rec_len
        used = entry_bytes(name_len) if inode else LEAST_ENTRY_BYTES
        if rec_len & 3 or rec_len < used or end > size:
            raise _corrupt(volume, directory, block, at, f"rec_len {rec_len}", f"{used} to {size - at}")
        if inode:
            # The length in its head and the new entry must be in one sector.
            head, start, reach = at, at + used, at + 4
        elif cache.held_back(block, at):
            search.waits = search.waits or rec_len >= need
            head, start, reach = -1, size, 0
            at = end
            continue
        elif start >= at or not at % SECTOR_BYTES:
            head, start, reach = -1, at, at
        for place in ((head, start, reach), (-1, at, at)):
            if place[1] + need <= end and place[2] // sector == (place[1] + need - 1) // sector:
                search.room = Room(block, place[0], place[1], end)
                return
            if inode:
                break
        if search.wide is None and sector < size:
            chain_at = -(-(at + used) // SECTOR_BYTES) * SECTOR_BYTES
            if min(end, chain_at + SECTOR_BYTES) - chain_at >= need:
                search.wide = block, at, (block, chain_at, end)
        at = end


def _sector(volume: Volume) -> int:
    """The bytes of a directory block that a power cut leaves all old or all new."""
    return min(volume.geometry.block_bytes, max(SECTOR_BYTES, volume.device.limits.logical_block))


def _corrupt(volume: Volume, directory: Ext2Inode, block: int, at: int, found: str, expected: str) -> Exception:
    addr = block * volume.geometry.block_bytes + at
    place = volume.geometry.place(f"directory block {block} of inode {directory.number}", addr)
    return place.corrupt(found, expected)


def _chain_of(chain: _Chain) -> list[tuple[int, int]]:
    """(offset, rec_len) of the free entries of a chain: one a sector, the last one up to the end."""
    _, start, end = chain
    heads: list[tuple[int, int]] = []
    while start < end:
        length = min(SECTOR_BYTES, end - start)
        if end - start - length < LEAST_ENTRY_BYTES:
            length = end - start
        heads.append((start, length))
        start += length
    return heads


def _use_wide(volume: Volume, block: int, at: int, chain: _Chain) -> Room:
    """The first place in an entry's room behind its sector, once the device has the chain that is to be there."""
    notes, cache = volume.committer.notes, volume.cache
    heads = _chain_of(chain)
    view = cache.get(block)
    written = all(view[offset : offset + 8] == _free_head(length) for offset, length in heads)
    if not written or not notes.chain_is_there(chain):
        notes.first[chain] = lambda: _write_chain(volume, chain)
        raise NeedsCommit("room that lies over several sectors is being cut")
    written_at = notes.chains.pop(chain)
    cache.undo(lambda: notes.chains.update({chain: written_at}))
    # Now the entry's length may end where the chain begins: one sector, once more.
    _set_length(cache.change(block, ENTRY), at, chain[1] - at)
    offset, length = heads[0]
    return Room(block, -1, offset, offset + length)


def _write_chain(volume: Volume, chain: _Chain) -> None:
    """Write the heads of free entries into the room that they are for, if that is still an entry's."""
    notes, cache = volume.committer.notes, volume.cache
    block, start, end = chain
    view = cache.get(block)
    offset = 0
    while offset < start:
        inode, rec_len, name_len, _ = ENTRY_HEAD.struct.unpack_from(view, offset)
        if rec_len < LEAST_ENTRY_BYTES or (not inode and cache.held_back(block, offset)):
            return
        # Whose room it is may have changed, or what changed it was undone; what counts is that it is somebody's.
        used = entry_bytes(name_len) if inode else LEAST_ENTRY_BYTES
        if offset + used <= start and offset + rec_len == end:
            view = cache.change(block, ENTRY)
            for place, length in _chain_of(chain):
                view[place : place + 8] = _free_head(length)
            notes.chain_written(chain)
            # Without the note the chain is only written once more.
            cache.undo(lambda: notes.chains.pop(chain, None))
            return
        offset += rec_len


def _free_head(length: int) -> bytes:
    return ENTRY_HEAD.pack(EntryHead(0, length, 0, 0))


def _add_block(volume: Volume, directory: Ext2Inode) -> Room:
    """Another block for the directory, full of free entries; the first of them."""
    block_bytes = volume.geometry.block_bytes
    index = directory.size // block_bytes
    prepared = grow.prepare(volume, directory, index, 1)
    if volume.allocator.room(privileged=volume.privileged) < 0:
        raise NoSpaceError("no block is left for the directory: the last ones are promised", path=volume.geometry.name)
    view = volume.cache.create(prepared.block, FRESH)
    for at in range(0, block_bytes, SECTOR_BYTES):
        view[at : at + 8] = _free_head(SECTOR_BYTES)
    directory.remember(volume.cache)
    grow.publish(volume, prepared, 1)
    directory.size += block_bytes
    volume.store(directory)
    return Room(prepared.block, -1, 0, SECTOR_BYTES)
