"""Where the blocks of an ext2 file are: look-ups in its tree of block numbers.

The blocks of a file fall into leaves: the 12 that the inode names, then as many as a block holds
numbers, again and again. A leaf is checked and turned into runs once, with NumPy, and looked up by
bisection from then on. What lies above the leaves is read where a leaf is, so it needs no second copy.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from odirect.fs.ext2.format import DIRECT_BLOCKS, DOUBLE_INDIRECT, INDIRECT, TRIPLE_INDIRECT
from odirect.fs.ext2.inode import BLOCK_AT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from odirect.base.errors import CorruptionError
    from odirect.cache.metacache import MetaCache
    from odirect.fs.ext2.geometry import Geometry
    from odirect.fs.ext2.inode import Ext2Inode

#: How many runs one file may keep in memory, and how many leaves; the oldest leaves go first.
_MOST_RUNS = 1 << 17
_MOST_LEAVES = 1 << 13
#: How many leaves one miss may name at once.
_MOST_MISSES = 1024
#: How many leaves one look-up goes on over; a disk can be made to have millions that say nothing.
_MOST_MERGED = 4096


class Run(NamedTuple):
    """`count` blocks of a file from `file_block` on are at `block` of the device and what follows it, or,
    where `block` is 0, are a hole.

    boundary: the run ends only because what comes next must first be read (G12).
    """

    file_block: int
    count: int  # type: ignore[assignment]  # a tuple's own count is of no use here
    block: int
    boundary: bool = False


class _Leaf(NamedTuple):
    """The runs of a leaf: the first block of each, then the leaf's end; and where each is (0: a hole).

    holder: the block of numbers; 0 for the inode's own, and where there is none."""

    starts: list[int]
    blocks: list[int]
    holder: int = 0


class BlockMap:
    """The block numbers of one inode. Plain functions, which raise BlockMiss for what is not cached.

    Whoever changes the numbers calls `changed`, also where a transaction is undone. All raise
    CorruptionError for a number that cannot be a file's block.
    """

    def __init__(self, geometry: Geometry, cache: MetaCache, inode: Ext2Inode) -> None:
        """For `inode`, which must be one whose `block` holds block numbers (`Ext2Inode.has_blocks`)."""
        self.geometry = geometry
        self._cache = cache
        self._inode = inode
        self._pointers = geometry.pointers_per_block
        self._block_bytes = geometry.block_bytes
        self._leaves: dict[int, _Leaf] = {}
        self._runs = 0
        #: File blocks whose content a reader has checked, and need not again while they are the same ones
        #: (directory.py).
        self.verified: set[int] = set()
        #: Another after every change: for those who keep what they looked up.
        self.version = 0

    # -- looking up

    def lookup(self, file_block: int, limit: int) -> Run:
        """The longest run from `file_block` on, at most `limit` blocks (1 or more).

        It goes on over leaves while they are cached. Raises BlockMiss only for what `file_block` itself
        needs; ValueError for a block that no file can have.
        """
        leaf = self._leaves.get((file_block - DIRECT_BLOCKS) // self._pointers)
        if leaf is None or file_block < 0 or limit < 1:
            leaf = self._first_leaf(file_block, limit)
        starts, blocks, _ = leaf
        index = bisect_right(starts, file_block)
        count = starts[index] - file_block
        block = blocks[index - 1]
        if block:
            block += file_block - starts[index - 1]
        if count > limit:
            return Run(file_block, limit, block)
        if index < len(blocks):
            return Run(file_block, count, block)
        return self._longer(file_block, count, block, limit)

    def place(self, offset: int, length: int) -> int:
        """The byte of the device that byte `offset` (0 or more) is at, if the range follows there in one leaf that is
        known, or in two; -1 if `lookup` must be asked."""
        block_bytes = self._block_bytes
        file_block = offset // block_bytes
        key = (file_block - DIRECT_BLOCKS) // self._pointers
        leaf = self._leaves.get(key)
        if leaf is None:
            return -1
        starts, blocks, _ = leaf
        index = bisect_right(starts, file_block)
        block = blocks[index - 1]
        if not block:
            return -1
        ahead = block - starts[index - 1]
        end = offset + length
        if starts[index] * block_bytes < end:
            # Where the leaf ends the next one may go on.
            following = self._leaves.get(key + 1)
            if index < len(blocks) or following is None:
                return -1
            if following[1][0] != ahead + starts[index] or following[0][1] * block_bytes < end:
                return -1
        return ahead * block_bytes + offset

    def runs(self, first: int, last: int) -> Iterator[Run]:
        """All runs from block `first` to block `last`, holes too, in order; none has a boundary.

        Leaves that are missing are named many at a time. Whoever walks a large file does it in steps.
        Raises CorruptionError where the file would have more blocks than the volume: a tree that leads to
        the same blocks again and again.
        """
        if first < 0 or last >= self.geometry.max_blocks:
            raise ValueError(f"blocks {first} to {last} of a file")
        seen = 0
        at, end = first, last + 1
        pending = Run(first, 0, 0)
        while at < end:
            self._need(at, last)
            key = (at - DIRECT_BLOCKS) // self._pointers
            leaf = self._leaf(key, wait=True) or self._first_leaf(at, 1)
            index = bisect_right(leaf.starts, at) - 1
            if leaf.holder:
                seen += 1
            elif key >= 0:
                # There is no leaf, nor maybe what would lead to its neighbours.
                start = leaf.starts[0]
                leaf = _Leaf([start, max(leaf.starts[-1], start + self._hole_from(start))], [0])
            for start, stop, block in zip(
                leaf.starts[index:], leaf.starts[index + 1 :], leaf.blocks[index:], strict=False
            ):
                low, high = max(at, start), min(stop, end)
                if low >= high:
                    break
                if block:
                    block += low - start
                    seen += high - low
                if pending.count and block == (pending.block + pending.count if pending.block else 0):
                    pending = Run(pending.file_block, pending.count + high - low, pending.block)
                else:
                    if pending.count:
                        yield pending
                    pending = Run(low, high - low, block)
            if seen > self.geometry.blocks_count:
                raise self._too_many(seen)
            at = leaf.starts[-1]
        if pending.count:
            yield pending

    def path(self, file_block: int) -> list[tuple[int, int]]:
        """The places that lead to `file_block`, from the inode down: (block that holds the number, index in
        it), where block 0 is the inode itself.

        It ends at the place of the block's own number, or before, at the first place that holds 0. Raises
        BlockMiss; the leaf itself need not be cached.
        """
        indices = tree_indices(self.geometry, file_block)
        places = [(0, indices[0])]
        block = self._root(indices[0]) if len(indices) > 1 else 0
        for level, index in enumerate(indices[1:], 2):
            if not block:
                break
            places.append((block, index))
            if level < len(indices):
                block = self._number(block, index)
        return places

    def changed(self, first_file_block: int, count: int) -> None:
        """Forget what is cached of these blocks, because their numbers have changed."""
        if count <= 0:
            return
        self.version += 1
        if count > len(self.verified):
            end = first_file_block + count
            self.verified = {block for block in self.verified if not first_file_block <= block < end}
        else:
            self.verified.difference_update(range(first_file_block, first_file_block + count))
        first = (first_file_block - DIRECT_BLOCKS) // self._pointers
        last = (first_file_block + count - 1 - DIRECT_BLOCKS) // self._pointers
        affected: Iterable[int] = range(first, last + 1)
        if last - first > len(self._leaves):
            affected = [key for key in self._leaves if first <= key <= last]
        for key in affected:
            leaf = self._leaves.pop(key, None)
            if leaf is not None:
                self._runs -= len(leaf.blocks)

    def indirect_blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(level, block) of the blocks of numbers that lead to file blocks `first` to `last`: level 1 holds
        numbers of data, 2 numbers of those, 3 numbers of those.

        Each comes once, before those below it. Raises BlockMiss, naming many, and CorruptionError where
        there would be more of them than blocks in the volume.
        """
        pointers = self._pointers
        seen = 0
        for root, level in ((INDIRECT, 1), (DOUBLE_INDIRECT, 2), (TRIPLE_INDIRECT, 3)):
            base = _tree_start(pointers, level)
            low, high = max(first, base) - base, min(last, base + _blocks_below(pointers, level) - 1) - base
            block = self._root(root)
            if low > high or not block:
                continue
            for found in self._below(block, level, low, high):
                seen += 1
                if seen > self.geometry.blocks_count:
                    raise self._too_many(seen)
                yield found

    # -- leaves

    def _first_leaf(self, file_block: int, limit: int) -> _Leaf:
        if not 0 <= file_block < self.geometry.max_blocks or limit < 1:
            raise ValueError(f"{limit} blocks from block {file_block} of a file")
        leaf = self._leaf((file_block - DIRECT_BLOCKS) // self._pointers, wait=True)
        if leaf is None:
            raise RuntimeError("a leaf that may be waited for is always found")
        return leaf

    def _longer(self, file_block: int, count: int, block: int, limit: int) -> Run:
        """The run of `count` blocks, which ends with its leaf, made longer by the leaves after it."""
        end = self.geometry.max_blocks
        for _ in range(_MOST_MERGED):
            at = file_block + count
            if at >= end:
                return Run(file_block, min(count, limit), block)
            if not block:
                count += self._hole_from(at)
                if file_block + count > at:
                    if count > limit:
                        return Run(file_block, limit, block)
                    continue
            leaf = self._leaf((at - DIRECT_BLOCKS) // self._pointers, wait=False)
            if leaf is None:
                return Run(file_block, min(count, limit), block, count <= limit)
            if count >= limit:
                return Run(file_block, limit, block)
            found = leaf.blocks[0]
            if found != (block + count if block else 0):
                return Run(file_block, count, block)
            count += leaf.starts[1] - at
            if len(leaf.blocks) > 1 or count > limit:
                break
        return Run(file_block, min(count, limit), block)

    def _leaf(self, key: int, *, wait: bool) -> _Leaf | None:
        """The leaf `key` (-1: the inode's own numbers), or None where it would have to be read and may not."""
        leaf = self._leaves.get(key)
        if leaf is None:
            start = DIRECT_BLOCKS + key * self._pointers if key >= 0 else 0
            block = self._leaf_block(start, wait=wait) if key >= 0 else 0
            if block is None:
                return None
            if key < 0:
                leaf = self._direct_leaf()
            elif not block:
                leaf = _Leaf([start, start + self._pointers], [0])
            else:
                view = self._cache.get(block) if wait else self._cache.peek(block)
                if view is None:
                    return None
                leaf = self._runs_of(block, view, start)
            self._keep(key, leaf)
        return leaf

    def _keep(self, key: int, leaf: _Leaf) -> None:
        while self._leaves and (self._runs + len(leaf.blocks) > _MOST_RUNS or len(self._leaves) >= _MOST_LEAVES):
            oldest = next(iter(self._leaves))
            self._runs -= len(self._leaves.pop(oldest).blocks)
        self._leaves[key] = leaf
        self._runs += len(leaf.blocks)

    def _direct_leaf(self) -> _Leaf:
        starts: list[int] = []
        blocks: list[int] = []
        for index in range(DIRECT_BLOCKS):
            block = self._root(index)
            if not starts or block != (blocks[-1] + index - starts[-1] if blocks[-1] else 0):
                starts.append(index)
                blocks.append(block)
        starts.append(DIRECT_BLOCKS)
        return _Leaf(starts, blocks)

    def _runs_of(self, block: int, view: memoryview, start: int) -> _Leaf:
        """The runs of the block of numbers `block`, the first of whose numbers is that of file block `start`."""
        import numpy

        numbers = numpy.frombuffer(view, "<u4", self._pointers)
        wrong = self.geometry.first_wrong(numbers, self._inode.number)
        if wrong >= 0:
            self._check(int(numbers[wrong]), block, wrong)
        before, after = numbers[:-1], numbers[1:]
        # A run goes on by one more block or by one more hole.
        breaks = (after - before != (before != 0)).nonzero()[0] + 1
        starts = [0, *breaks.tolist()]
        blocks = numbers[starts].tolist()
        return _Leaf([start + index for index in starts] + [start + self._pointers], blocks, block)

    def _leaf_block(self, file_block: int, *, wait: bool) -> int | None:
        """The block of numbers that has the number of `file_block`; 0 in a hole; None if not known without reading."""
        indices = tree_indices(self.geometry, file_block)
        block = self._root(indices[0])
        for index in indices[1:-1]:
            if not block:
                return 0
            if not wait and self._cache.peek(block) is None:
                return None
            block = self._number(block, index)
        return block

    def _hole_from(self, file_block: int) -> int:
        """How many blocks from the leaf's start `file_block` on are known to be a hole, because the blocks of
        numbers that would lead to them are missing; reads nothing."""
        import numpy

        pointers = self._pointers
        indices = tree_indices(self.geometry, file_block)
        if len(indices) < 2:
            return 0
        level = len(indices) - 1
        block = self._root(indices[0])
        offset = file_block - _tree_start(pointers, level)
        for index in indices[1:]:
            span = _blocks_below(pointers, level)
            if not block:
                return span - offset % span
            level -= 1
            if not level:
                return 0
            view = self._cache.peek(block)
            if view is None:
                return 0
            numbers = numpy.frombuffer(view, "<u4", pointers)
            if not numbers[index]:
                span = _blocks_below(pointers, level)
                used = numbers[index:].nonzero()[0]
                empty = int(used[0]) if len(used) else pointers - index
                return empty * span - offset % span
            block = self._number(block, index)
        return 0

    def _need(self, first: int, last: int) -> None:
        """Raises BlockMiss naming leaves (many) that blocks `first` to `last` need, if that of `first` is one."""
        pointers = self._pointers
        key = (first - DIRECT_BLOCKS) // pointers
        if key < 0 or key in self._leaves:
            return
        start = DIRECT_BLOCKS + key * pointers
        own = self._leaf_block(start, wait=True)
        if not own or self._cache.peek(own) is not None:
            return
        # Those that the same block of numbers leads to; what is above them is cached now.
        indices = tree_indices(self.geometry, start)
        missing = [own]
        if len(indices) > 2:
            parent, index = self.path(start)[-2]
            more = min(pointers - index, (last - start) // pointers + 1, _MOST_MISSES)
            for at in range(index + 1, index + more):
                block = self._number(parent, at)
                if block and self._cache.peek(block) is None:
                    missing.append(block)
        self._cache.get_all(missing)

    def _below(self, block: int, level: int, low: int, high: int) -> Iterator[tuple[int, int]]:
        """See `indirect_blocks`: `block` and those below it; low and high are counted from where it begins."""
        yield level, block
        if level == 1:
            return
        span = _blocks_below(self._pointers, level - 1)
        first, last = low // span, high // span
        children = [self._number(block, index) for index in range(first, last + 1)]
        if level > 2:
            self._cache.get_all([child for child in children if child][:_MOST_MISSES])
        for index, child in enumerate(children, first):
            if child:
                base = index * span
                yield from self._below(child, level - 1, max(low - base, 0), min(high - base, span - 1))

    # -- single numbers

    def _root(self, index: int) -> int:
        """The inode's number at `index`, checked."""
        block = self._inode.pointer(index)
        if block and not self.geometry.may_own(self._inode.number, block):
            place = self.geometry.inode_structure(self._inode.number)
            structure = f"{place.structure}, block number {index}"
            addr = place.addr + BLOCK_AT + 4 * index
            self.geometry.check_data_block(block, self.geometry.place(structure, addr), self._inode.number)
        return block

    def _number(self, holder: int, index: int) -> int:
        """The number at `index` of the block of numbers `holder`, checked. Raises BlockMiss."""
        block = int.from_bytes(self._cache.get(holder)[4 * index : 4 * index + 4], "little")
        if block and not self.geometry.may_own(self._inode.number, block):
            self._check(block, holder, index)
        return block

    def _check(self, block: int, holder: int, index: int) -> None:
        structure = f"inode {self._inode.number}, block numbers in block {holder}, number {index}"
        addr = holder * self.geometry.block_bytes + 4 * index
        self.geometry.check_data_block(block, self.geometry.place(structure, addr), self._inode.number)

    def _too_many(self, seen: int) -> CorruptionError:
        return self.geometry.inode_structure(self._inode.number).corrupt(
            f"{seen} blocks of data and numbers", f"no more than the volume's {self.geometry.blocks_count}"
        )


def tree_indices(geometry: Geometry, file_block: int) -> tuple[int, ...]:
    """The index at each level that leads to `file_block`: in the inode, then in each block of numbers.

    One to four of them. Raises ValueError for a block that no file can have.
    """
    if not 0 <= file_block < geometry.max_blocks:
        raise ValueError(f"block {file_block} of a file, which has at most {geometry.max_blocks}")
    if file_block < DIRECT_BLOCKS:
        return (file_block,)
    pointers = geometry.pointers_per_block
    rest = file_block - DIRECT_BLOCKS
    if rest < pointers:
        return (INDIRECT, rest)
    rest -= pointers
    if rest < pointers**2:
        return (DOUBLE_INDIRECT, *divmod(rest, pointers))
    rest -= pointers**2
    high, rest = divmod(rest, pointers**2)
    return (TRIPLE_INDIRECT, high, *divmod(rest, pointers))


def _tree_start(pointers: int, level: int) -> int:
    """The first file block that the tree of that many levels leads to."""
    return DIRECT_BLOCKS + sum(_blocks_below(pointers, above) for above in range(1, level))


def _blocks_below(pointers: int, level: int) -> int:
    """How many blocks of a file a block of numbers of that level leads to."""
    return (1, pointers, pointers * pointers, pointers * pointers * pointers)[level]
