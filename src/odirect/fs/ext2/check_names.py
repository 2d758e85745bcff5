"""The second walk of `check`: every directory's entries, how directories hang together, and links.

Entries are judged as e2fsck judges them. A directory's block is parsed up to the first entry that cannot
be believed; from there on nothing in that block is.
"""

from __future__ import annotations

import array
import itertools
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from odirect.fs.ext2.checking import BATCH_BYTES
from odirect.fs.ext2.format import ENTRY_HEAD, ROOT_INODE, Compat, FileType, InodeFlags, ReadOnlyCompat, entry_bytes
from odirect.fs.ext2.indexhash import TEA, index_hash

if TYPE_CHECKING:
    from odirect.fs.ext2.check_inodes import Directory, InodeWalk
    from odirect.fs.ext2.checking import Reader, Report
    from odirect.fs.ext2.geometry import Geometry

#: Of an index's root, behind the entries "." and "..": zero, the hash, its own length, levels, flags.
_INDEX_INFO = struct.Struct("<I4B")
_INDEX_INFO_AT = 24
_INDEX_ROOT_AT = 32
_INDEX_NODE_AT = 8
_INDEX_COUNTS = struct.Struct("<2HI")
_INDEX_ENTRY = struct.Struct("<2I")
#: The largest hash, and `Superblock.flags` where bytes of names count from 0.
_LAST_HASH = 0xFFFFFFFE
_UNSIGNED_HASH = 2
_DIR_TYPE = int(FileType.DIRECTORY)


class _Open:
    """A directory while its blocks are gone through."""

    __slots__ = ("bounds", "directory", "hashes", "hashing", "leaves", "levels", "next", "nodes", "seen")

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.next = 0
        self.hashes = array.array("q")
        #: Of an index: its levels below the root (-1: no index) and its hash; the hashes that each of its nodes
        #: and leaves may have, and those that the names in each block do have.
        self.levels = -1
        self.hashing = -1
        self.nodes: dict[int, tuple[int, int]] = {}
        self.leaves: list[int] = []
        self.bounds: dict[int, tuple[int, int]] = {}
        self.seen: dict[int, tuple[int, int]] = {}


class NameWalk:
    """The walk. `InodeWalk` must have been made before: it knows the directories and the inodes in use."""

    def __init__(self, geometry: Geometry, reader: Reader, report: Report, inodes: InodeWalk) -> None:
        import numpy

        self._geometry = geometry
        self._reader = reader
        self._report = report
        self._inodes = inodes
        self._signed = not geometry.superblock.flags & _UNSIGNED_HASH
        # Of each inode: the names that lead to it; of a directory: where it has a name, and what it says.
        self._counts = numpy.zeros(geometry.inodes_count + 1, numpy.uint32)
        self._parents = numpy.zeros(geometry.inodes_count + 1, numpy.uint32)
        self._dotdots = numpy.zeros(geometry.inodes_count + 1, numpy.uint32)

    async def walk(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Look at every directory, then at the tree that they are and at the counts of links."""
        per_batch = max(1, BATCH_BYTES // self._geometry.block_bytes)
        places = self._places()
        total, done = len(self._inodes.directories), 0
        for batch in iter(lambda: list(itertools.islice(places, per_batch)), []):
            read = await self._reader.blocks([block for _, _, block in batch])
            for state, logical, block in batch:
                self._block(state, logical, block, read[block])
            if progress is not None:
                done = min(total, done + len(batch))
                progress(done, total)
        self._judge_tree()
        self._judge_links()

    def _places(self) -> Iterator[tuple[_Open, int, int]]:
        """(directory, block in it, block of the volume) of every block of every directory, in order."""
        for directory in self._inodes.directories:
            state = _Open(directory)
            # The walk came by the blocks of numbers in the order of the device.
            for logical, block in sorted(zip(directory.logical, directory.blocks, strict=True)):
                yield state, logical, block
            # All its blocks have been given out, but the last ones are judged only after this.
            directory.logical = array.array("Q")
            directory.blocks = array.array("I")

    # -- one block

    def _block(self, state: _Open, logical: int, block: int, data: memoryview) -> None:
        geometry = self._geometry
        directory = state.directory
        addr = block * geometry.block_bytes
        name = f"directory {directory.number}"
        last = directory.size // geometry.block_bytes - 1
        if logical != state.next:
            self._report.add(name, addr, f"a hole at its block {state.next}", "blocks without holes")
        state.next = logical + 1
        indexed = directory.flags & InodeFlags.INDEX and geometry.compat & Compat.DIR_INDEX
        if indexed and (logical == 0 or logical in state.nodes):
            self._index(state, logical, addr, data)
        self._entries(state, logical, addr, data)
        if logical == last:
            self._end(state, addr)

    def _entries(self, state: _Open, logical: int, addr: int, data: memoryview) -> None:
        geometry = self._geometry
        report = self._report
        number = state.directory.number
        title = f"directory {number}"
        unpack = ENTRY_HEAD.struct.unpack_from
        size = len(data)
        typed = geometry.has_file_type
        seen: set[bytes] = set()
        hashed = state.levels >= 0 and logical and logical not in state.nodes
        low, high = _LAST_HASH, 0
        at = order = 0
        while at < size:
            if at + 12 > size:
                report.add(title, addr + at, f"{size - at} bytes without an entry", "entries to the block's end")
                return
            inode, rec_len, name_len, kind = unpack(data, at)
            if rec_len < 12 or rec_len % 4 or at + rec_len > size or entry_bytes(name_len) > rec_len:
                found = f"an entry of {rec_len} bytes with a name of {name_len}"
                report.add(title, addr + at, found, f"12 to {size - at} bytes, a multiple of 4, with room for the name")
                if logical == 0 and order < 2:
                    report.add(title, addr + at, "no entries", "'.' and '..'")
                return
            name = bytes(data[at + 8 : at + 8 + name_len])
            where = addr + at
            if logical == 0 and order < 2:
                self._own_entry(number, order, inode, name, where)
            elif inode and name in (b".", b".."):
                report.add(title, where, f"the entry {name!r} again", "it once")
            if inode:
                if not name:
                    report.add(title, where, "an entry without a name", "a name")
                elif b"/" in name or b"\0" in name:
                    report.add(title, where, f"name {name!r}", "no slash and no zero byte")
                if name in seen:
                    report.add(title, where, f"the name {name!r} twice", "it once")
                seen.add(name)
                state.hashes.append(hash(name))
                if hashed:
                    found_hash = index_hash(name, state.hashing, geometry.superblock.hash_seed, signed=self._signed)
                    low, high = min(low, found_hash), max(high, found_hash)
                self._target(number, inode, name, kind if typed else -1, where, own=logical == 0 and order < 2)
                if not typed and kind:
                    report.add(title, where, f"{kind} behind the name's length", "0: there are no types in entries")
            order += 1
            at += rec_len
        if hashed and low <= high:
            state.seen[logical] = (low, high)
        if logical == 0 and order < 2:
            report.add(title, addr, f"{order} entries in the first block", "'.' and '..'")

    def _own_entry(self, number: int, order: int, inode: int, name: bytes, addr: int) -> None:
        expected = (b".", b"..")[order]
        if name != expected or not inode:
            found = f"entry {name!r} to inode {inode}"
            self._report.add(f"directory {number}", addr, found, f"{expected!r} as entry {order + 1}")
            return
        if order == 0 and inode != number:
            self._report.add(f"directory {number}", addr, f"'.' to inode {inode}", f"inode {number}")
        if order == 1:
            self._dotdots[number] = inode

    def _target(self, number: int, inode: int, name: bytes, kind: int, addr: int, *, own: bool) -> None:
        """What an entry leads to; kind: what it says that this is, -1 where entries do not."""
        geometry = self._geometry
        report = self._report
        title = f"directory {number}"
        if not 1 <= inode <= geometry.inodes_count:
            report.add(title, addr, f"{name!r} leads to inode {inode}", f"1 to {geometry.inodes_count}")
            return
        self._counts[inode] += 1
        if inode != ROOT_INODE and inode < geometry.first_inode:
            report.add(title, addr, f"{name!r} leads to inode {inode}", "no reserved inode")
            return
        if inode == ROOT_INODE and not own:
            report.add(title, addr, f"{name!r} leads to the root directory", "no other name for it")
            return
        if not self._inodes.inodes.has_one(inode):
            report.add(title, addr, f"{name!r} leads to inode {inode}, which is free", "an inode in use")
            return
        actual = int(self._inodes.kinds[inode])
        if kind >= 0 and actual and kind != actual:
            report.add(title, addr, f"type {kind} of {name!r}", f"{actual}, as inode {inode} says")
        if actual == _DIR_TYPE and not own:
            if self._parents[inode]:
                found = f"{name!r}, a second name of directory {inode}"
                report.add(title, addr, found, f"the one in directory {self._parents[inode]} alone")
            else:
                self._parents[inode] = number

    def _end(self, state: _Open, addr: int) -> None:
        """All blocks of a directory have been seen."""
        import numpy

        title = f"directory {state.directory.number}"
        if len(state.hashes) > 1:
            ordered = numpy.sort(numpy.frombuffer(state.hashes, numpy.int64))
            twice = int((ordered[1:] == ordered[:-1]).sum())
            if twice:
                self._report.add(title, addr, f"{twice} names that it has already", "each name once")
        if state.levels in (0, 1):
            expected = [logical for logical in range(1, state.next) if logical not in state.nodes]
            if sorted(state.leaves) != expected:
                found = f"an index of {len(set(state.leaves))} blocks"
                self._report.add(title, addr, found, f"each of its {len(expected)} blocks once")
            for logical, (low, high) in state.seen.items():
                bounds = state.bounds.get(logical, (0, _LAST_HASH))
                if low < bounds[0] or high > bounds[1]:
                    found = f"names with hashes {low:#x} to {high:#x} in its block {logical}"
                    self._report.add(title, addr, found, f"{bounds[0]:#x} to {bounds[1]:#x}, as its index says")

    # -- the index of hashes

    def _index(self, state: _Open, logical: int, addr: int, data: memoryview) -> None:
        """A block of the index: the root is a directory's first block, nodes are named by it."""
        report = self._report
        title = f"index of directory {state.directory.number}"
        start = _INDEX_NODE_AT
        if logical == 0:
            zero, hashing, length, levels, flags = _INDEX_INFO.unpack_from(data, _INDEX_INFO_AT)
            start = _INDEX_ROOT_AT
            if zero or hashing > TEA or length != 8 or levels > 1 or flags & 1:
                found = f"hash {hashing}, {length} bytes, {levels} levels, flags {flags}"
                report.add(title, addr + _INDEX_INFO_AT, found, "hash 0 to 2, 8 bytes, at most 1 level, no flags")
                return
            state.levels, state.hashing = levels, hashing
        limit, count, first = _INDEX_COUNTS.unpack_from(data, start)
        room = (len(data) - start) // _INDEX_ENTRY.size
        if limit != room or not 1 <= count <= limit:
            report.add(title, addr + start, f"{count} of {limit} entries", f"1 to {room} of {room}")
            return
        named = [(0, first)]
        named += [_INDEX_ENTRY.unpack_from(data, start + 8 * index) for index in range(1, count)]
        least, most = state.nodes.get(logical, (0, _LAST_HASH))
        lows = [least, *(entry[0] & ~1 for entry in named[1:])]
        if any(low > high for low, high in itertools.pairwise([*lows, most])):
            report.add(title, addr + start, "hashes that do not rise", "each above the one before")
        blocks = state.directory.size // self._geometry.block_bytes
        for (_, block), bounds in zip(named, itertools.pairwise([*lows, most]), strict=True):
            block &= 0x0FFFFFFF
            if not 1 <= block < blocks:
                report.add(title, addr + start, f"block {block} of the directory", f"1 to {blocks - 1}")
            elif logical == 0 and state.levels == 1:
                state.nodes[block] = bounds
            else:
                state.leaves.append(block)
                state.bounds[block] = bounds

    # -- all of it

    def _judge_tree(self) -> None:
        """Every directory has one name, says the same parent itself, and the root is above it."""
        import numpy

        report = self._report
        above = numpy.zeros(self._geometry.inodes_count + 1, numpy.uint8)  # 1: the root is; 2: being looked at
        above[ROOT_INODE] = 1
        for directory in self._inodes.directories:
            number = directory.number
            title = f"directory {number}"
            parent, dotdot = int(self._parents[number]), int(self._dotdots[number])
            if number == ROOT_INODE:
                if dotdot != ROOT_INODE:
                    report.add("the root directory", None, f"'..' to inode {dotdot}", "to itself")
                continue
            if not parent:
                report.add(title, None, "no name that leads to it", "one")
            elif dotdot != parent:
                report.add(title, None, f"'..' to inode {dotdot}", f"inode {parent}, where its name is")
            path: list[int] = []
            while number and not above[number]:
                above[number] = 2
                path.append(number)
                number = int(self._parents[number])
            if number and above[number] == 2:
                report.add(title, None, "directories that are above each other in a ring", "the root above them")
            above[path] = 1

    def _judge_links(self) -> None:
        """Each inode has as many links as names lead to it."""
        import numpy

        geometry = self._geometry
        links, counts = self._inodes.links, self._counts
        used = self._inodes.inodes.part(0, geometry.inodes_count + 1).astype(numpy.bool_)
        used[: geometry.first_inode] = False
        used[ROOT_INODE] = True
        wrong = used & (links != counts)
        if geometry.ro_compat & ReadOnlyCompat.DIR_NLINK:
            # A directory with too many links has 1.
            wrong &= ~((self._inodes.kinds == _DIR_TYPE) & (links == 1))
        for number in wrong.nonzero()[0].tolist():
            if not counts[number]:
                self._report.add(f"inode {number}", None, "no name that leads to it", f"{links[number]} names")
            else:
                self._report.add(f"inode {number}", None, f"{links[number]} links", f"{counts[number]}")
