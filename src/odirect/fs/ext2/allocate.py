"""Which blocks and inodes are free, and giving them out.

What is free is told by the bitmaps, with counts in the group descriptors and the superblock; all of them
are changed in the metadata cache and written last in a commit (LATE). What is freed is *held*: it counts
as free on the disk, and is not given out again before the commit that frees it is on the device, so that
no crash can leave one block with two owners.

Blocks are looked for near a goal, in whole runs: at the goal, then in its group, then in the groups after
it, passing by groups whose count says that nothing is free. Directories are spread over the groups, files
stay in the group of their directory (Orlov's way).
Source: "Design and Implementation of the Second Extended Filesystem" (Card, Ts'o, Tweedie); the layout is
in `format.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from odirect.base.errors import CorruptionError, NoSpaceError
from odirect.base.layout import Place
from odirect.cache.metacache import LATE, TREE
from odirect.fs.ext2.format import (
    GROUP_DESCRIPTOR,
    INODE,
    ROOT_INODE,
    SUPERBLOCK,
    SUPERBLOCK_ADDR,
    GroupDescriptor,
    InodeFlags,
    Superblock,
)

if TYPE_CHECKING:
    import numpy

    from odirect.cache.metacache import MetaCache
    from odirect.fs.ext2.geometry import Geometry
    from odirect.fs.ext2.grow import Planned, Prepared
    from odirect.fs.ext2.inode import Ext2Inode

#: How many groups are looked at for a run of the wanted length before a shorter one is taken.
_GROUPS_TO_LOOK_AT = 4
# Places of the counts in a descriptor, in 16-bit words.
_FREE_BLOCKS, _FREE_INODES, _USED_DIRS = 6, 7, 8
_GENERATION, _GENERATION_AT = INODE.part("generation", "generation"), INODE.offset_of("generation")


class NeedsCommit(Exception):
    """What was asked for is possible once a commit has ended: commit and try again. Control flow, never a user's."""


class Holds(NamedTuple):
    """What was freed up to one commit, as bits of groups."""

    blocks: list[tuple[int, int]]
    inodes: list[tuple[int, int]]


class Allocator:
    """Free space of one volume. Everything is a plain function, and but for the promises under `cache.load`."""

    def __init__(self, geometry: Geometry, cache: MetaCache) -> None:
        self.geometry = geometry
        self.cache = cache
        #: Blocks promised to data that is not written yet.
        self.reserved = 0
        #: Kept by `grow`: indirect blocks that are allocated and linked nowhere yet, by inode and place,
        self.planned: dict[tuple[int, ...], Planned] = {}
        #: and the runs of an inode that are allocated and not published.
        self.prepared: dict[int, list[Prepared]] = {}
        self._super_block, self._super_offset = divmod(SUPERBLOCK_ADDR, geometry.block_bytes)
        self._loaded = False
        self._spares: dict[int, list[int]] = {}
        self._held_blocks = _Held()
        self._held_inodes = _Held()
        # Groups whose bitmap was found to have the group's own metadata in use.
        self._believed: set[int] = set()

    def load(self) -> None:
        """Bring superblock and descriptors into the cache, for good. Raises BlockMiss; does nothing the second time."""
        if not self._loaded:
            blocks = [self._super_block, *self.geometry.descriptor_blocks]
            self.cache.get_all(blocks)
            for block in blocks:
                self.cache.pin(block)
            self._loaded = True

    # The volume's own records.

    def superblock(self) -> Superblock:
        """The superblock as it is now."""
        self.load()
        data = self.cache.get(self._super_block)
        return SUPERBLOCK.read(data, self._super_offset, self._place("superblock", SUPERBLOCK_ADDR))

    def change_superblock(self, **fields: Any) -> None:
        """Set fields of the superblock."""
        changed = self.superblock()._replace(**fields)
        SUPERBLOCK.write(changed, self.cache.change(self._super_block, LATE), self._super_offset)

    def descriptor(self, group: int) -> GroupDescriptor:
        """The group's descriptor as it is now."""
        self.load()
        return self.geometry.descriptor(self.cache, group)

    # How much there is.

    @property
    def free_blocks(self) -> int:
        """Free blocks, with those that wait for a commit."""
        return self.superblock().free_blocks_count

    @property
    def free_inodes(self) -> int:
        """Free inodes, with those that wait for a commit."""
        return self.superblock().free_inodes_count

    @property
    def held_blocks(self) -> int:
        """Blocks that are free once a commit has ended."""
        return self._held_blocks.total

    def room(self, *, privileged: bool = False) -> int:
        """Free blocks that nobody was promised, less what is kept for root unless privileged; may be below 0."""
        now = self.superblock()
        return now.free_blocks_count + self.spare_blocks - self.reserved - (0 if privileged else now.r_blocks_count)

    def reserve(self, blocks: int, *, privileged: bool = False) -> None:
        """Promise `blocks` blocks: others find that many fewer.

        What is kept for root is left alone unless privileged. Raises NoSpaceError. `find_run` itself
        looks at no promise: who allocates without one asks here first, and gives it back after.
        """
        room = self.room(privileged=privileged)
        if blocks > room:
            raise NoSpaceError(f"{blocks} blocks are needed, {max(0, room)} are free", path=self.geometry.name)
        self.reserved += blocks

    def unreserve(self, blocks: int) -> None:
        """Give a promise back. RuntimeError if it was never made: that hides a bug (F30)."""
        if blocks > self.reserved:
            raise RuntimeError(f"{blocks} blocks are given back, {self.reserved} were promised")
        self.reserved -= blocks

    # Blocks.

    def find_run(self, goal: int, wanted: int) -> tuple[int, int]:
        """(first block, count) of a run of at most `wanted` free blocks, marked as used, near block `goal`.

        From the goal itself if that is free; else a run of `wanted` blocks in its group or one of the
        next few, else the longest that was seen. Cached copies of the blocks are dropped (G11). Raises
        NoSpaceError, NeedsCommit if there will be room after a commit, BlockMiss, CorruptionError.
        """
        if wanted < 1:
            raise ValueError(f"a run of {wanted} blocks")
        self.load()
        geometry = self.geometry
        if not geometry.first_data_block <= goal < geometry.blocks_count:
            goal = geometry.first_data_block
        home = geometry.group_of_block(goal)
        enough = min(wanted, max(1, geometry.blocks_per_group // 4))
        best = (0, 0)
        for number, group in enumerate(self._groups_with(_FREE_BLOCKS, self._held_blocks, home)):
            at_goal = goal - geometry.first_block_of_group(group) if group == home else 0
            found = self._longest(group, at_goal, wanted)
            if found[1] > best[1]:
                best = found
            if best[1] >= enough or best[0] == goal or number + 1 >= _GROUPS_TO_LOOK_AT:
                break
        block, count = best
        if not count:
            if self._spares:
                for number in list(self._spares):
                    self.free_spares(number)
                return self.find_run(goal, wanted)
            raise self._nothing_left("block", self._held_blocks)
        group = geometry.group_of_block(block)
        self._flip_blocks(group, block, count, used=True)
        self.cache.forget(block, count)
        return block, count

    def free_run(self, block: int, count: int, *, never_used: bool = False) -> None:
        """Make blocks free; they are given out again after the next commit, or at once if never_used.

        never_used: nothing on the disk, nor in a commit under way, ever pointed to them. Raises
        CorruptionError if one is free already or is the volume's own, BlockMiss.
        """
        self.load()
        if count < 1:
            raise ValueError(f"a run of {count} blocks")
        for group, first, number in self._split(block, count):
            self._flip_blocks(group, first, number, used=False)
            if not never_used:
                mask = ((1 << number) - 1) << (first - self.geometry.first_block_of_group(group))
                self._held_blocks.hold(self.cache, group, mask)

    # Spares: blocks that are marked as used, and kept for the indirect blocks of a file that grows. They are in
    # memory alone, and go back when the file is closed, or when nothing else is left.

    @property
    def spare_blocks(self) -> int:
        """How many spares there are."""
        return sum(map(len, self._spares.values()))

    def add_spares(self, inode: int, blocks: Iterable[int]) -> None:
        """Keep these blocks, which were just allocated, for the inode."""
        self._set_spares(inode, [*self._spares.get(inode, ()), *blocks])

    def take_spares(self, inode: int, most: int) -> list[int]:
        """At most so many of the inode's spares, the first ones; they are the caller's now."""
        spares = self._spares.get(inode, ())
        taken = list(spares[:most])
        if taken:
            self._set_spares(inode, list(spares[most:]))
        return taken

    def free_spares(self, inode: int) -> None:
        """Make the inode's spares free again. Raises BlockMiss."""
        spares = self._spares.get(inode, ())
        self.cache.get_all(self.bitmap_blocks((block, 1) for block in spares))
        self._set_spares(inode, [])
        for block in spares:
            self.free_run(block, 1, never_used=True)

    def _set_spares(self, inode: int, blocks: list[int]) -> None:
        before = self._spares.get(inode)

        def put_back() -> None:
            if before is None:
                self._spares.pop(inode, None)
            else:
                self._spares[inode] = before

        self.cache.undo(put_back)
        if blocks:
            self._spares[inode] = blocks
        else:
            self._spares.pop(inode, None)

    def bitmap_blocks(self, runs: Iterable[tuple[int, int]]) -> list[int]:
        """The blocks of the bitmaps that `free_run` of these (block, count) will change."""
        groups = {group for block, count in runs for group, _, _ in self._split(block, count)}
        return [self.descriptor(group).block_bitmap for group in sorted(groups)]

    # Inodes.

    def new_inode(self, parent: Ext2Inode, is_dir: bool) -> int:
        """The number of an inode that was free; its record is zeroed, with a new generation.

        Raises NoSpaceError, NeedsCommit, BlockMiss, CorruptionError.
        """
        self.load()
        geometry = self.geometry
        order = self._groups_for_directory(parent) if is_dir else self._groups_for_file(parent)
        for group in order:
            index = self._free_inode_in(group)
            if index is None:
                continue
            number = group * geometry.inodes_per_group + index + 1
            block, offset = geometry.inode_place(self.cache, number)
            self.cache.get(block)
            self._flip_inode(group, index, used=True, is_dir=is_dir)
            self._clear_record(number, block, offset)
            return number
        raise self._nothing_left("inode", self._held_inodes)

    def new_files(self, parent: Ext2Inode, wanted: int) -> list[int]:
        """The numbers of `wanted` inodes that were free, for files in directory `parent`.

        Their records are as they were: the caller makes them anew, with the generation that follows. Raises
        as `new_inode` does.
        """
        self.load()
        geometry = self.geometry
        numbers: list[int] = []
        while len(numbers) < wanted:
            for group in self._groups_for_file(parent):
                indices = self.free_inodes_in(group, wanted - len(numbers))
                if indices:
                    break
            else:
                raise self._nothing_left("inode", self._held_inodes)
            descriptor = self.descriptor(group)
            place = self._place(f"inode bitmap of group {group}", descriptor.inode_bitmap * geometry.block_bytes)
            if descriptor.free_inodes_count < len(indices):
                raise place.corrupt(
                    f"{len(indices)} free inodes", f"{descriptor.free_inodes_count}, as the descriptor says"
                )
            bitmap = self.cache.change(descriptor.inode_bitmap, LATE)
            for index in indices:
                bitmap[index >> 3] |= 1 << (index & 7)
            self._change_descriptor(group, free_inodes_count=descriptor.free_inodes_count - len(indices))
            self._change_total("free_inodes_count", -len(indices))
            numbers += [group * geometry.inodes_per_group + index + 1 for index in indices]
        return numbers

    def hold_record(self, number: int) -> None:
        """Keep inode `number` on the disk as it is now until the removal of its last name is there.

        To be called before the first change that a deletion makes to the inode, and before a link is
        taken from it. Survives a crash: a name never leads to an inode that is gone already.
        """
        block, offset = self.geometry.inode_place(self.cache, number)
        self.cache.get(block)
        self.cache.hold_back(block, offset, self.geometry.inode_bytes)

    def free_inode(self, number: int, was_dir: bool) -> None:
        """Make inode `number` free; it is given out again after the next commit.

        The record is the caller's to clear (links 0, a time of deletion), after `hold_record`. Raises
        CorruptionError if it is free already, BlockMiss.
        """
        self.load()
        group, index = divmod(number - 1, self.geometry.inodes_per_group)
        if not self.geometry.first_inode <= number <= self.geometry.inodes_count:
            raise ValueError(f"inode {number} is not one that can be freed")
        self._flip_inode(group, index, used=False, is_dir=was_dir)
        self._held_inodes.hold(self.cache, group, 1 << index)

    # Commits.

    def take_holds(self) -> Holds:
        """What was freed since this was last called: for the commit whose snapshot is taken now."""
        return Holds(self._held_blocks.take(), self._held_inodes.take())

    def release_holds(self, holds: Holds) -> None:
        """The commit that took them has ended: they may be given out."""
        self._held_blocks.release(holds.blocks)
        self._held_inodes.release(holds.inodes)

    def return_holds(self, holds: Holds) -> None:
        """The commit that took them has failed: they wait for another."""
        self._held_blocks.pending[:0] = holds.blocks
        self._held_inodes.pending[:0] = holds.inodes

    # Parts.

    def _place(self, structure: str, addr: int) -> Place:
        return Place(self.geometry.name, structure, addr)

    def _nothing_left(self, what: str, held: _Held) -> Exception:
        if held.total:
            return NeedsCommit(f"the only free {what}s wait for a commit")
        return NoSpaceError(f"no free {what} is left", path=self.geometry.name)

    def _split(self, block: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(group, first block, count) of the parts of a run."""
        geometry = self.geometry
        if block < geometry.first_data_block or block + count > geometry.blocks_count:
            raise CorruptionError(
                f"blocks {block}..{block + count - 1} are not of this volume, which ends at {geometry.blocks_count}",
                path=geometry.name,
            )
        while count:
            group = geometry.group_of_block(block)
            here = min(count, geometry.first_block_of_group(group) + geometry.blocks_in_group(group) - block)
            yield group, block, here
            block += here
            count -= here

    def _counts(self, word: int) -> numpy.ndarray[Any, Any]:
        """One count of every group."""
        import numpy

        parts = [
            numpy.frombuffer(self.cache.get(block), "<u2").reshape(-1, GROUP_DESCRIPTOR.size // 2)[:, word]
            for block in self.geometry.descriptor_blocks
        ]
        return numpy.concatenate(parts)[: self.geometry.groups].astype(numpy.int64)

    def _available(self, word: int, held: _Held) -> numpy.ndarray[Any, Any]:
        """What can be given out now in every group."""
        counts = self._counts(word)
        for group, number in held.counts.items():
            counts[group] -= number
        return counts

    def _groups_with(self, word: int, held: _Held, home: int) -> Iterator[int]:
        """The groups where something can be given out, from `home` on and around."""
        import numpy

        descriptor = self.descriptor(home)
        here = descriptor.free_blocks_count if word == _FREE_BLOCKS else descriptor.free_inodes_count
        if here > held.counts.get(home, 0):
            yield home
        groups = numpy.flatnonzero(self._available(word, held) > 0)
        after = int(numpy.searchsorted(groups, home, "right"))
        before = int(numpy.searchsorted(groups, home, "left"))
        for group in numpy.concatenate((groups[after:], groups[:before])):
            yield int(group)

    def _bitmap(self, group: int) -> tuple[memoryview, Place]:
        """The group's block bitmap, in which its own metadata is marked, and where it is."""
        geometry = self.geometry
        descriptor = self.descriptor(group)
        place = self._place(f"block bitmap of group {group}", descriptor.block_bitmap * geometry.block_bytes)
        bitmap = self.cache.get(descriptor.block_bitmap)
        if group not in self._believed:
            # A bitmap that offers the volume's own blocks would have them overwritten with data.
            start = geometry.first_block_of_group(group)
            own = [
                *range(start, start + geometry.super_blocks(group)),
                descriptor.block_bitmap,
                descriptor.inode_bitmap,
            ]
            own += range(descriptor.inode_table, descriptor.inode_table + geometry.table_blocks)
            for block in own:
                index = block - start
                if not bitmap[index >> 3] >> (index & 7) & 1:
                    raise place.corrupt(f"block {block} free", "it in use: it is the volume's own")
            self._believed.add(group)
        return bitmap, place

    def _longest(self, group: int, goal: int, wanted: int) -> tuple[int, int]:
        """(block, count) of the run in the group that serves best; counts from bit `goal` on, and around."""
        import numpy

        bitmap, place = self._bitmap(group)
        start = self.geometry.first_block_of_group(group)
        size = self.geometry.blocks_in_group(group)
        taken: bytes | memoryview = bitmap
        held = self._held_blocks.bits.get(group, 0)
        if held:
            taken = (int.from_bytes(bitmap, "little") | held).to_bytes(len(bitmap), "little")
        if not taken[goal >> 3] >> (goal & 7) & 1:
            # The common case, which need not look at the whole bitmap.
            end = min(size, goal + wanted)
            part = numpy.unpackbits(numpy.frombuffer(taken[goal >> 3 : (end + 7) >> 3], numpy.uint8), bitorder="little")
            part = part[goal & 7 : (goal & 7) + end - goal]
            stop = int(part.argmax())
            return start + goal, stop if part[stop] else end - goal
        edges = numpy.ones(size + 2, numpy.int8)
        edges[1:-1] = numpy.unpackbits(numpy.frombuffer(taken, numpy.uint8), count=size, bitorder="little")
        changes = numpy.flatnonzero(edges[1:] != edges[:-1])
        starts, lengths = changes[0::2], changes[1::2] - changes[0::2]
        if not len(starts):
            raise place.corrupt("no free block", f"{self.descriptor(group).free_blocks_count}, as the descriptor says")
        fitting = numpy.flatnonzero(lengths >= wanted)
        if len(fitting):
            later = int(numpy.searchsorted(starts[fitting], goal))
            chosen = int(fitting[later if later < len(fitting) else 0])
        else:
            chosen = int(lengths.argmax())
        return start + int(starts[chosen]), min(wanted, int(lengths[chosen]))

    def _flip_blocks(self, group: int, first: int, count: int, *, used: bool) -> None:
        """Mark blocks of one group used, or free, in bitmap and counts."""
        _, place = self._bitmap(group)
        descriptor = self.descriptor(group)
        index = first - self.geometry.first_block_of_group(group)
        if not used and self._has_own(group, descriptor, index, count):
            raise place.corrupt(f"blocks {first}..{first + count - 1} to be freed", "no block of the volume's own")
        if used and descriptor.free_blocks_count < count:
            raise place.corrupt(f"{count} free blocks", f"{descriptor.free_blocks_count}, as the descriptor says")
        _flip(self.cache.change(descriptor.block_bitmap, LATE), index, count, used, place, first)
        delta = -count if used else count
        self._change_descriptor(group, free_blocks_count=descriptor.free_blocks_count + delta)
        self._change_total("free_blocks_count", delta)

    def _has_own(self, group: int, descriptor: GroupDescriptor, index: int, count: int) -> bool:
        """Whether the volume's own metadata is among the group's blocks from `index` on."""
        geometry = self.geometry
        first = geometry.first_block_of_group(group) + index
        end = first + count
        return (
            index < geometry.super_blocks(group)
            or first <= descriptor.block_bitmap < end
            or first <= descriptor.inode_bitmap < end
            or (first < descriptor.inode_table + geometry.table_blocks and descriptor.inode_table < end)
        )

    def _flip_inode(self, group: int, index: int, *, used: bool, is_dir: bool) -> None:
        descriptor = self.descriptor(group)
        place = self._place(f"inode bitmap of group {group}", descriptor.inode_bitmap * self.geometry.block_bytes)
        delta = -1 if used else 1
        if used and not descriptor.free_inodes_count:
            raise place.corrupt("a free inode", "none, as the descriptor says")
        directories = descriptor.used_dirs_count - (delta if is_dir else 0)
        if directories < 0:
            raise place.corrupt("a directory to be freed", "none, as the descriptor says")
        number = group * self.geometry.inodes_per_group + index + 1
        _flip(self.cache.change(descriptor.inode_bitmap, LATE), index, 1, used, place, number)
        self._change_descriptor(
            group, free_inodes_count=descriptor.free_inodes_count + delta, used_dirs_count=directories
        )
        self._change_total("free_inodes_count", delta)

    def _change_descriptor(self, group: int, **fields: Any) -> None:
        changed = self.descriptor(group)._replace(**fields)
        block, offset = self.geometry.descriptor_place(group)
        try:
            GROUP_DESCRIPTOR.write(changed, self.cache.change(block, LATE), offset)
        except ValueError as error:
            place = self._place(f"descriptor of group {group}", block * self.geometry.block_bytes + offset)
            raise place.corrupt(fields, "counts of 16 bits") from error

    def _change_total(self, field: str, delta: int) -> None:
        found: int = getattr(self.superblock(), field)
        if found + delta < 0:
            raise self._place("superblock", SUPERBLOCK_ADDR).corrupt(f"{field} {found}", f"at least {-delta}")
        self.change_superblock(**{field: found + delta})

    def _clear_record(self, number: int, block: int, offset: int) -> None:
        """Zero the record of an inode, but for its generation, which is the next."""
        record = self.cache.change(block, TREE)[offset : offset + self.geometry.inode_bytes]
        (generation,) = _GENERATION.unpack_from(record, _GENERATION_AT)
        record[:] = bytes(len(record))
        _GENERATION.pack_into(record, _GENERATION_AT, (generation + 1) & 0xFFFFFFFF)

    def free_inodes_in(self, group: int, most: int) -> list[int]:
        """The places of at most `most` free inodes of the group, the lowest. BlockMiss."""
        import numpy

        count = self.geometry.inodes_per_group
        bitmap: bytes | memoryview = self.cache.get(self.descriptor(group).inode_bitmap)[: -(-count // 8)]
        held = self._held_inodes.bits.get(group, 0)
        if held:
            bitmap = (int.from_bytes(bitmap, "little") | held).to_bytes(len(bitmap), "little")
        taken = numpy.unpackbits(numpy.frombuffer(bitmap, numpy.uint8), count=count, bitorder="little")
        taken[: max(0, self.geometry.first_inode - 1 - group * count)] = 1
        found: list[int] = (taken == 0).nonzero()[0][:most].tolist()
        return found

    def _free_inode_in(self, group: int) -> int | None:
        """A free inode's place in the group; None if what is free there is held."""
        descriptor = self.descriptor(group)
        bitmap = self.cache.get(descriptor.inode_bitmap)
        taken = int.from_bytes(bitmap, "little") | self._held_inodes.bits.get(group, 0)
        first = self.geometry.first_inode - 1 - group * self.geometry.inodes_per_group
        if first > 0:
            taken |= (1 << first) - 1
        # The lowest bit that is not set.
        index = (~taken & (taken + 1)).bit_length() - 1
        return index if index < self.geometry.inodes_per_group else None

    def _groups_for_file(self, parent: Ext2Inode) -> Iterator[int]:
        """The parent's group; then, where inodes and blocks are free, farther and farther away; then any."""
        import numpy

        groups = self.geometry.groups
        home = self.geometry.group_of_inode(parent.number)
        there = self.descriptor(home)
        inodes_there = there.free_inodes_count - self._held_inodes.counts.get(home, 0)
        if inodes_there > 0 and there.free_blocks_count - self._held_blocks.counts.get(home, 0) > 0:
            yield home
        inodes = self._available(_FREE_INODES, self._held_inodes)
        blocks = self._available(_FREE_BLOCKS, self._held_blocks)
        # Files of one directory that do not fit its group go together to another one.
        group, step = (home + parent.number) % groups, 1
        while step < groups:
            group = (group + step) % groups
            step *= 2
            if inodes[group] > 0 and blocks[group] > 0:
                yield group
        for away in numpy.flatnonzero(numpy.roll(inodes, -home) > 0):
            yield (home + int(away)) % groups

    def _groups_for_directory(self, parent: Ext2Inode) -> Iterator[int]:
        """For a directory at the top, the emptiest group; for one below, near its parent unless that is full."""
        import numpy

        groups = self.geometry.groups
        home = self.geometry.group_of_inode(parent.number)
        inodes = self._available(_FREE_INODES, self._held_inodes)
        blocks = self._available(_FREE_BLOCKS, self._held_blocks)
        directories = self._counts(_USED_DIRS)
        if parent.number == ROOT_INODE or parent.flags & InodeFlags.TOPDIR:
            roomy = numpy.flatnonzero(
                (inodes > 0) & (inodes * groups >= inodes.sum()) & (blocks * groups >= blocks.sum())
            )
            # Fewest directories, then most free blocks, then the first.
            yield from (int(group) for group in roomy[numpy.lexsort((-blocks[roomy], directories[roomy]))])
        else:
            least_inodes = max(1, int(inodes.sum()) // groups - self.geometry.inodes_per_group // 4)
            least_blocks = max(1, int(blocks.sum()) // groups - self.geometry.blocks_per_group // 4)
            most = int(directories.sum()) // groups + self.geometry.inodes_per_group // 16 + 1
            good = (inodes >= least_inodes) & (blocks >= least_blocks) & (directories < most)
            for away in numpy.flatnonzero(numpy.roll(good, -home)):
                yield (home + int(away)) % groups
        for away in numpy.flatnonzero(numpy.roll(inodes, -home) > 0):
            yield (home + int(away)) % groups


class _Held:
    """Bits of groups that are free on the disk-to-be and not given out yet."""

    def __init__(self) -> None:
        self.bits: dict[int, int] = {}
        self.counts: dict[int, int] = {}
        self.total = 0
        #: Those of no snapshot yet.
        self.pending: list[tuple[int, int]] = []

    def hold(self, cache: MetaCache, group: int, mask: int) -> None:
        self._add(group, mask, 1)
        entry = (group, mask)
        self.pending.append(entry)
        cache.undo(lambda: self._unhold(entry))

    def take(self) -> list[tuple[int, int]]:
        taken, self.pending = self.pending, []
        return taken

    def release(self, entries: list[tuple[int, int]]) -> None:
        for group, mask in entries:
            self._add(group, mask, -1)

    def _unhold(self, entry: tuple[int, int]) -> None:
        self.pending.remove(entry)
        self._add(*entry, -1)

    def _add(self, group: int, mask: int, sign: int) -> None:
        number = sign * mask.bit_count()
        self.bits[group] = self.bits.get(group, 0) ^ mask
        self.counts[group] = self.counts.get(group, 0) + number
        self.total += number
        if not self.counts[group]:
            del self.bits[group], self.counts[group]


def _flip(bitmap: memoryview, index: int, count: int, used: bool, place: Place, number: int) -> None:
    """Set bits of a bitmap that are all clear, or the other way round."""
    start, end = index >> 3, (index + count + 7) >> 3
    mask = ((1 << count) - 1) << (index & 7)
    bits = int.from_bytes(bitmap[start:end], "little")
    if bits & mask != (0 if used else mask):
        what = f"{number}" if count == 1 else f"some of {number}..{number + count - 1}"
        raise place.corrupt(f"{what} {'in use' if used else 'free'}", "free" if used else "in use")
    bitmap[start:end] = (bits ^ mask).to_bytes(end - start, "little")
