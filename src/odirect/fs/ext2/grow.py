"""Giving blocks to files, and taking them away: the writing side of the tree of block numbers.

Growing goes in two steps. `prepare` allocates a run, and the indirect blocks that it needs, in memory
alone: neither the inode nor the cached tree speaks of them. The data is written; then `publish` puts
the numbers where they belong, or `abandon` gives everything back. So what the tree leads to is always on
the device (F11, F12). An indirect block lies right before the data that it is allocated with.

Survives a crash: new indirect blocks are FRESH, on the device before the number that leads to them
(TREE). What is freed is unlinked (TREE) before the bitmaps say so (LATE), and held until then. A freed
indirect block keeps its contents and stays to be written: the record of a deleted inode may lead to it
until the deletion is on the device.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Protocol

from odirect.base.errors import NoSpaceError
from odirect.cache.metacache import FRESH, TREE
from odirect.fs.ext2.blockmap import tree_indices
from odirect.fs.ext2.format import DIRECT_BLOCKS, DOUBLE_INDIRECT, INDIRECT, SECTOR_BYTES, TRIPLE_INDIRECT

if TYPE_CHECKING:
    import numpy

    from odirect.cache.metacache import MetaCache
    from odirect.fs.ext2.allocate import Allocator
    from odirect.fs.ext2.blockmap import BlockMap
    from odirect.fs.ext2.geometry import Geometry
    from odirect.fs.ext2.inode import Ext2Inode

#: Indirect blocks are laid out ahead only while so many blocks are free.
_PLENTY_BLOCKS = 4096
#: How many leaves `free_from` and `punch` take away at once, so that a step fits the cache.
STEP_LEAVES = 2048


class Volume(Protocol):
    """What the writing side needs of a volume."""

    geometry: Geometry
    cache: MetaCache
    allocator: Allocator
    #: How many indirect blocks may be laid out ahead of a file that grows; who lets go of the file frees the rest.
    most_ahead: int

    def store(self, inode: Ext2Inode) -> None:
        """Put the inode into its record in the inode table, which is to be written with TREE."""
        ...

    def map_of(self, inode: Ext2Inode) -> BlockMap:
        """The block map of an inode."""
        ...


class Planned:
    """An indirect block that is allocated for prepared runs. users: how many of them are not at their end."""

    __slots__ = ("block", "key", "made", "users")

    def __init__(self, key: tuple[int, ...], block: int) -> None:
        self.key = key
        self.block = block
        self.users = 0
        self.made = False


class Prepared:
    """A run of blocks that belongs to an inode's file blocks as soon as it is published.

    file_block, count, block: which file blocks, and the first block on the device.
    """

    __slots__ = ("_open", "_pins", "_plans", "block", "count", "file_block", "inode")

    def __init__(
        self, inode: Ext2Inode, file_block: int, count: int, block: int, plans: list[Planned], pins: list[int]
    ) -> None:
        self.inode = inode
        self.file_block = file_block
        self.count = count
        self.block = block
        self._plans = plans
        self._pins = pins
        self._open = False

    def __repr__(self) -> str:
        return f"<Prepared inode {self.inode.number} blocks {self.file_block}+{self.count} at {self.block}>"

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError(f"{self!r} was published or given up already")

    def _begin(self, volume: Volume) -> None:
        """Take what the run needs until its end: pins, and its share in the planned blocks."""
        self._open = True
        for block in self._pins:
            volume.cache.pin(block)
        for plan in self._plans:
            plan.users += 1
            volume.allocator.planned[plan.key] = plan
        volume.allocator.prepared.setdefault(self.inode.number, []).append(self)

    def _end(self, volume: Volume) -> None:
        """Give all that back. RuntimeError the second time."""
        self._check_open()
        self._open = False
        for block in self._pins:
            volume.cache.unpin(block)
        for plan in self._plans:
            plan.users -= 1
            if not plan.users:
                del volume.allocator.planned[plan.key]
        others = volume.allocator.prepared[self.inode.number]
        others.remove(self)
        if not others:
            del volume.allocator.prepared[self.inode.number]


def goal_of(volume: Volume, inode: Ext2Inode, file_block: int = 0) -> int:
    """The block that should follow next for `file_block` of the inode: after what is before it in the file.

    Where there is a hole before it, after its indirect block, or in the inode's group. Raises BlockMiss.
    """
    geometry = volume.geometry
    for run in volume.allocator.prepared.get(inode.number, ()):
        if run.file_block + run.count == file_block:
            return run.block + run.count
    if inode.has_blocks(geometry):
        for before in (file_block - 1, file_block):
            if before >= 0:
                block = _last_number(volume, inode, before)
                if block:
                    return block + 1
    return geometry.first_block_of_group(geometry.group_of_inode(inode.number))


def prepare(volume: Volume, inode: Ext2Inode, file_block: int, count: int, goal: int = 0) -> Prepared:
    """A run of new blocks for file blocks from `file_block` on, which is a hole; at most `count`, maybe fewer.

    It ends where the hole ends, at the end of the leaf, and where another prepared run of the inode
    begins. A file that grows past leaf after leaf gets indirect blocks for some leaves ahead, before its data, so that
    its data lies in one piece over them (`Allocator.spares`). goal: a block to lie near; 0: `goal_of`. Space that
    is promised to others is not looked at (`Allocator.reserve`). A caller who runs into an error must
    let it undo the transaction. Raises NoSpaceError (ENOSPC; EFBIG past the last block that a file can
    have), NeedsCommit, BlockMiss, CorruptionError, ValueError if the block has a place already.
    """
    geometry, cache, allocator = volume.geometry, volume.cache, volume.allocator
    if count < 1 or file_block < 0:
        raise ValueError(f"{count} blocks from {file_block}")
    if file_block >= geometry.max_blocks:
        raise NoSpaceError(f"a file has at most {geometry.max_blocks} blocks", errno=errno.EFBIG, path=geometry.name)
    indices = tree_indices(geometry, file_block)
    holders = [block for block, _ in volume.map_of(inode).path(file_block)][1:]
    wanted = count
    count = _hole(volume, inode, file_block, count, indices, holders)
    # One indirect block of every level that is missing, unless another prepared run brings it along.
    keys = [(inode.number, *indices[:level]) for level in range(len(holders) + 1, len(indices))]
    missing = [key for key in keys if key not in allocator.planned]
    table = geometry.inode_place(cache, inode.number)[0]
    cache.get_all([table, *holders])
    goal = goal or goal_of(volume, inode, file_block)
    indirect = allocator.take_spares(inode.number, len(missing))
    ahead = _leaves_ahead(volume, inode, file_block, wanted - count) if len(missing) > len(indirect) else 0
    pins = [table, *holders]
    while True:
        block, got = allocator.find_run(goal, len(missing) - len(indirect) + ahead + count)
        pins += allocator.bitmap_blocks([(block, got)])
        own = min(got, len(missing) - len(indirect))
        indirect += range(block, block + own)
        block, got = block + own, got - own
        if got:
            break
        goal = block
    ahead = min(ahead, max(0, got - count))
    allocator.add_spares(inode.number, range(block, block + ahead))
    block, got = block + ahead, got - ahead
    new = {key: Planned(key, number) for key, number in zip(missing, indirect, strict=True)}
    plans = [new.get(key) or allocator.planned[key] for key in keys]
    # A pin needs no block: what is planned stays in the cache from when it is made.
    pins += [plan.block for plan in plans]
    pins += [bitmap for plan in plans for bitmap in allocator.bitmap_blocks([(plan.block, 1)])]
    prepared = Prepared(inode, file_block, got, block, plans, pins)
    prepared._begin(volume)
    cache.undo(lambda: prepared._end(volume))
    return prepared


def _leaves_ahead(volume: Volume, inode: Ext2Inode, file_block: int, more: int) -> int:
    """How many indirect blocks to lay out beyond those that are needed now: for the rest of the request, and as
    many as the file has had before, while there is plenty of room."""
    pointers = volume.geometry.pointers_per_block
    if not inode.is_file or volume.allocator.room() < _PLENTY_BLOCKS:
        return 0
    leaves = max(-(-more // pointers), (file_block - DIRECT_BLOCKS) // pointers if inode.size else 0)
    return max(0, min(leaves, volume.most_ahead))


def publish(volume: Volume, prepared: Prepared, blocks_done: int) -> None:
    """Make the first `blocks_done` blocks of the run the file's, and give the rest back.

    Plain, needs no `load`: all that it touches is pinned. Changes the numbers and the inode's sectors,
    not its size and times. RuntimeError the second time, ValueError for more blocks than there are.
    """
    if not 0 <= blocks_done <= prepared.count:
        raise ValueError(f"{blocks_done} blocks of {prepared!r}")
    prepared._check_open()
    allocator = volume.allocator
    inode = prepared.inode
    with volume.cache.transaction():
        if blocks_done:
            inode.remember(volume.cache)
            _link(volume, prepared, blocks_done)
        if blocks_done < prepared.count:
            allocator.free_run(prepared.block + blocks_done, prepared.count - blocks_done, never_used=True)
        for plan in prepared._plans:
            if plan.users == 1 and not plan.made:
                allocator.free_run(plan.block, 1, never_used=True)
        prepared._end(volume)
        volume.cache.undo(lambda: prepared._begin(volume))


def abandon(volume: Volume, prepared: Prepared) -> None:
    """Give the run back: its data did not get there. Plain, as `publish`."""
    publish(volume, prepared, 0)


def free_from(volume: Volume, inode: Ext2Inode, file_block: int) -> bool:
    """Free data and indirect blocks at and past `file_block`; whether there is more to free.

    A large file goes in steps, each of which leaves a sound tree that ends earlier: call it again, in
    another transaction, until it says False. Raises BlockMiss, CorruptionError.
    """
    return _free(volume, inode, file_block, volume.geometry.max_blocks)


def punch(volume: Volume, inode: Ext2Inode, file_block: int, count: int) -> bool:
    """Free the blocks of a range, and indirect blocks that nothing is left in; whether there is more to free.

    In steps, as `free_from`. Raises BlockMiss, CorruptionError.
    """
    if file_block < 0 or count < 0:
        raise ValueError(f"{count} blocks from {file_block}")
    return _free(volume, inode, file_block, min(file_block + count, volume.geometry.max_blocks))


# Growing, inside.


def _numbers(view: memoryview) -> numpy.ndarray[Any, numpy.dtype[numpy.uint32]]:
    import numpy

    return numpy.frombuffer(view, "<u4")


def _last_number(volume: Volume, inode: Ext2Inode, file_block: int) -> int:
    """The lowest number, of data or an indirect block, on the way to a file block; 0 if there is none."""
    found = 0
    for holder, index in volume.map_of(inode).path(file_block):
        if holder:
            view = volume.cache.get(holder)
            found = int.from_bytes(view[4 * index : 4 * index + 4], "little") or found
        else:
            found = inode.pointer(index)
    return found


def _hole(
    volume: Volume, inode: Ext2Inode, file_block: int, count: int, indices: tuple[int, ...], holders: list[int]
) -> int:
    """How many of `count` blocks are a hole that one prepared run can fill."""
    index = indices[-1]
    if len(indices) == 1:
        count = min(count, DIRECT_BLOCKS - index)
        there = [at for at in range(count) if inode.pointer(index + at)]
    else:
        count = min(count, volume.geometry.pointers_per_block - index)
        there = []
        if len(holders) == len(indices) - 1:
            there = _numbers(volume.cache.get(holders[-1]))[index : index + count].nonzero()[0][:1].tolist()
    if there:
        count = there[0]
    for other in volume.allocator.prepared.get(inode.number, ()):
        if other.file_block <= file_block < other.file_block + other.count:
            count = 0
        elif other.file_block > file_block:
            count = min(count, other.file_block - file_block)
    if not count:
        raise ValueError(f"block {file_block} of inode {inode.number} has a place already")
    return count


def _link(volume: Volume, prepared: Prepared, count: int) -> None:
    """Put the numbers of the run's first `count` blocks, and of indirect blocks that lead there, in place."""
    import numpy

    cache, geometry, inode = volume.cache, volume.geometry, prepared.inode
    indices = tree_indices(geometry, prepared.file_block)
    sectors = count
    holder: memoryview = memoryview(inode.block)
    for level in range(1, len(indices)):
        at = 4 * indices[level - 1]
        block = int.from_bytes(holder[at : at + 4], "little")
        if block:
            holder = cache.change(block, TREE)
            continue
        plan = volume.allocator.planned[(inode.number, *indices[:level])]
        holder[at : at + 4] = plan.block.to_bytes(4, "little")
        holder = cache.create(plan.block, FRESH)
        plan.made = True
        cache.undo(lambda plan=plan: setattr(plan, "made", False))  # type: ignore[misc]
        sectors += 1
    at = 4 * indices[-1]
    holder[at : at + 4 * count] = numpy.arange(prepared.block, prepared.block + count, dtype="<u4").tobytes()
    inode.sectors += sectors * (geometry.block_bytes // SECTOR_BYTES)
    volume.store(inode)
    _map_changed(volume, inode, prepared.file_block, count)


def _map_changed(volume: Volume, inode: Ext2Inode, file_block: int, count: int) -> None:
    blocks = volume.map_of(inode)
    blocks.changed(file_block, count)
    volume.cache.undo(lambda: blocks.changed(file_block, count))


# Shrinking, inside.


class _Cut:
    """What one step takes away, gathered before anything is changed."""

    def __init__(self) -> None:
        self.leaves = STEP_LEAVES
        self.more = False
        #: Numbers of data blocks, an array for each leaf.
        self.data: list[numpy.ndarray[Any, numpy.dtype[numpy.uint32]]] = []
        self.indirect: list[int] = []
        #: Numbers to be zeroed: (indirect block, first index, end).
        self.edits: list[tuple[int, int, int]] = []
        #: The same in the inode.
        self.roots: list[int] = []
        #: The first file block that was looked at.
        self.lowest = 0


def _free(volume: Volume, inode: Ext2Inode, first: int, end: int) -> bool:
    geometry, cache, allocator = volume.geometry, volume.cache, volume.allocator
    if first >= end or not inode.has_blocks(geometry):
        return False
    cut = _gather(volume, inode, first, end)
    runs = _runs(volume, inode, cut)
    if not runs:
        return False
    cache.get_all(allocator.bitmap_blocks(runs))
    inode.remember(cache)
    freed = 0
    for block, count in runs:
        allocator.free_run(block, count)
        freed += count
    for holder, start, stop in cut.edits:
        cache.change(holder, TREE)[4 * start : 4 * stop] = bytes(4 * (stop - start))
    for root in cut.roots:
        inode.set_pointer(root, 0)
    freed *= geometry.block_bytes // SECTOR_BYTES
    if freed > inode.sectors:
        raise geometry.inode_structure(inode.number).corrupt(f"{inode.sectors} sectors", f"{freed} at least")
    inode.sectors -= freed
    volume.store(inode)
    _map_changed(volume, inode, cut.lowest, end - cut.lowest)
    return cut.more


def _gather(volume: Volume, inode: Ext2Inode, first: int, end: int) -> _Cut:
    """What is to be freed of file blocks [first, end), from the end on, as much as one step takes."""
    import numpy

    pointers = volume.geometry.pointers_per_block
    place = volume.geometry.inode_structure(inode.number)
    cut = _Cut()
    cut.lowest = first
    base = DIRECT_BLOCKS + pointers + pointers**2
    for root, level in ((TRIPLE_INDIRECT, 3), (DOUBLE_INDIRECT, 2), (INDIRECT, 1)):
        low, high = max(first, base), min(end, base + pointers**level)
        block = inode.pointer(root)
        if low < high and block:
            volume.geometry.check_data_block(block, place, inode.number)
            if _gather_below(volume, inode, cut, block, level, low - base, high - base):
                cut.roots.append(root)
                cut.indirect.append(block)
            if cut.more:
                return cut
        base -= pointers ** (level - 1)
    direct = [index for index in range(first, min(end, DIRECT_BLOCKS)) if inode.pointer(index)]
    for index in direct:
        volume.geometry.check_data_block(inode.pointer(index), place, inode.number)
    cut.data.append(numpy.array([inode.pointer(index) for index in direct], numpy.uint32))
    cut.roots += direct
    return cut


def _gather_below(volume: Volume, inode: Ext2Inode, cut: _Cut, holder: int, level: int, low: int, high: int) -> bool:
    """Gather blocks [low, high), counted from where the indirect block `holder` begins; whether it is empty then."""
    geometry, cache = volume.geometry, volume.cache
    numbers = _numbers(cache.get(holder))
    span = geometry.pointers_per_block ** (level - 1)
    start, stop = low // span, -(-high // span)
    part = numbers[start:stop]
    wrong = geometry.first_wrong(part, inode.number)
    if wrong >= 0:
        addr = holder * geometry.block_bytes + 4 * (start + wrong)
        place = geometry.place(f"inode {inode.number}, block numbers in block {holder}", addr)
        geometry.check_data_block(int(part[wrong]), place, inode.number)
    used = (part.nonzero()[0] + start).tolist()
    others = bool(numbers[:start].any() or numbers[stop:].any())
    if level == 1:
        cut.leaves -= 1
        cut.data.append(part[part != 0])
        if others and used:
            cut.edits.append((holder, start, stop))
        return not others
    children = [int(numbers[index]) for index in used]
    if level == 2:
        cache.get_all(children[-max(1, cut.leaves) :])
    kept = 0
    edits: list[tuple[int, int, int]] = []
    for index, child in zip(reversed(used), reversed(children), strict=True):
        if cut.leaves <= 0:
            cut.more = True
        if cut.more:
            kept += 1
            continue
        inner_low, inner_high = max(low - index * span, 0), min(high - index * span, span)
        if _gather_below(volume, inode, cut, child, level - 1, inner_low, inner_high):
            edits.append((holder, index, index + 1))
            cut.indirect.append(child)
        else:
            kept += 1
    if kept or others:
        cut.edits += edits
        return False
    return True


def _runs(volume: Volume, inode: Ext2Inode, cut: _Cut) -> list[tuple[int, int]]:
    """The blocks that a step frees, as (block, count) in order."""
    import numpy

    blocks = numpy.concatenate([*cut.data, numpy.array(cut.indirect, numpy.uint32)]).astype(numpy.int64)
    blocks.sort()
    if not len(blocks):
        return []
    steps = numpy.diff(blocks)
    twice = (steps == 0).nonzero()[0]
    if len(twice):
        place = volume.geometry.inode_structure(inode.number)
        raise place.corrupt(f"block {int(blocks[twice[0]])} in two places of the file", "every block once")
    breaks = (steps != 1).nonzero()[0] + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(blocks)]
    return [(int(blocks[start]), stop - start) for start, stop in zip(starts, ends, strict=True)]
