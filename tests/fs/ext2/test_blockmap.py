"""Block maps: against the kernel's and debugfs' files, a plain dictionary, and trees that lie."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.reading_kit import Blocks, Image, all_blocks, debugfs, inode_number, make
from tests.fs.ext2.test_inode import geometry_of
from tests.loops import mounted, needs_root, run

from odirect.base.errors import CorruptionError
from odirect.block.fiemap import file_extents
from odirect.cache.metacache import BlockMiss
from odirect.fs.ext2.blockmap import BlockMap, Run, tree_indices
from odirect.fs.ext2.format import GROUP_DESCRIPTOR
from odirect.fs.ext2.geometry import Geometry
from odirect.fs.ext2.inode import Ext2Inode

POINTERS = 256
TREES = (12, 12 + POINTERS, 12 + POINTERS + POINTERS**2)
END = 12 + POINTERS + POINTERS**2 + POINTERS**3
#: The first block of the made-up volume that can be a file's: after the copies, bitmaps and 256 blocks of inodes.
FREE = 261


class MadeUp(Blocks):
    """A made-up volume of one group of 1 KiB blocks, of which only the blocks of numbers have content."""

    def __init__(self) -> None:
        super().__init__(b"", 1024)
        self.geometry: Geometry = geometry_of(128)
        self.content: dict[int, bytearray] = {}
        descriptor = bytearray(1024)
        GROUP_DESCRIPTOR.write(GROUP_DESCRIPTOR.kind(3, 4, 5, 0, 0, 0, 0, bytes(12)), descriptor, 0)
        self.content[2] = descriptor
        self.load(lambda: self.geometry.load_fixed(self))  # type: ignore[arg-type]
        self.inode = Ext2Inode(12, stat.S_IFREG)
        self.inode.links = 1

    def read(self, blocks) -> None:
        for block in blocks:
            assert block < self.geometry.blocks_count
            self.held[block] = memoryview(bytes(self.content.get(block, bytes(1024))))

    def put(self, holder: int, index: int, block: int) -> None:
        """Put a number into the inode (0) or a block of numbers."""
        if not holder:
            self.inode.set_pointer(index, block)
        else:
            struct.pack_into("<I", self.content.setdefault(holder, bytearray(1024)), 4 * index, block)

    def number(self, holder: int, index: int) -> int:
        if not holder:
            return self.inode.pointer(index)
        return struct.unpack_from("<I", self.content.setdefault(holder, bytearray(1024)), 4 * index)[0]

    def grow(self, file_block: int, block: int, pool: Iterator[int]) -> None:
        """Give `file_block` its number, with the blocks of numbers that lead to it."""
        holder = 0
        *above, last = tree_indices(self.geometry, file_block)
        for index in above:
            if not self.number(holder, index):
                self.put(holder, index, next(pool))
            holder = self.number(holder, index)
        self.put(holder, last, block)

    def map(self) -> BlockMap:
        return BlockMap(self.geometry, self, self.inode)  # type: ignore[arg-type]


def made_up() -> Any:
    """A `MadeUp`, which is as good as a MetaCache for look-ups."""
    return MadeUp()


def expected(blocks: dict[int, int], at: int, limit: int) -> tuple[int, int]:
    """(count, block) of the longest run from `at`, from a dictionary."""
    first = blocks.get(at, 0)
    count = 1
    while count < limit and at + count < END:
        there = blocks.get(at + count, 0)
        if there != (first + count if first else 0):
            break
        count += 1
    return count, first


# --- against a dictionary ------------------------------------------------------------------------

edges = st.one_of(
    st.integers(0, 30),
    *(st.integers(edge - 5, edge + 5) for edge in TREES),
    *(st.integers(edge + POINTERS - 3, edge + POINTERS + 3) for edge in TREES),
    st.integers(TREES[2] + POINTERS**2 - 3, TREES[2] + POINTERS**2 + 3),
    st.integers(END - 10, END - 1),
)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    runs=st.lists(st.tuples(edges, st.integers(1, 40)), max_size=8),
    asked=st.lists(st.tuples(edges, st.one_of(st.integers(1, 60), st.just(700))), min_size=1, max_size=12),
    apart=st.booleans(),
)
def test_lookups_are_those_of_a_dictionary(runs, asked, apart):
    """In any order, with whatever is cached: the longest run, or one that says that it ends at a boundary (G12)."""
    made, blocks = made_up(), {}
    numbers, data = iter(range(FREE, 1000)), iter(range(1000, 8000))
    for start, count in runs:
        for file_block in range(start, min(start + count, END)):
            if file_block not in blocks:
                blocks[file_block] = next(data)
                made.grow(file_block, blocks[file_block], numbers)
        if apart:
            next(data)
    blockmap = made.map()
    for at, limit in asked:
        count, block = expected(blocks, at, limit)
        found = made.load(lambda at=at, limit=limit: blockmap.lookup(at, limit))
        assert (found.file_block, found.block) == (at, block)
        assert found.count == count or (found.boundary and found.count < count)
        if found.boundary and found.count < limit:
            with pytest.raises(BlockMiss):
                blockmap.lookup(at + found.count, 1)
        together = found.count
        while together < count:
            more = made.load(lambda to=at + together, left=limit - together: blockmap.lookup(to, left))
            assert more.block == (block + together if block else 0)
            together += more.count
        assert together == count
        # Whatever the look-up passed over, all is cached now.
        if at + count < END:
            made.load(lambda to=at + count: blockmap.lookup(to, 1))
        assert blockmap.lookup(at, limit) == Run(at, count, block, False)
    for at, limit in asked:
        whole = made.load(lambda at=at, limit=limit: list(blockmap.runs(at, min(END, at + limit) - 1)))
        together = {run.file_block + step: run.block and run.block + step for run in whole for step in range(run.count)}
        assert together == {place: blocks.get(place, 0) for place in range(at, min(END, at + limit))}
        assert all(
            run == (run.file_block, *expected(blocks, run.file_block, at + limit - run.file_block), False)
            for run in whole
        )
    # All blocks, those of numbers too, each once.
    found = made.load(lambda: list(all_blocks(made.map())))
    assert sorted(block for level, block in found if level == 0) == sorted(blocks.values())
    above = [block for level, block in found if level]
    assert len(above) == len(set(above))
    assert set(above) == set(range(FREE, next(numbers)))


@settings(max_examples=60)
@given(places=st.lists(edges, min_size=1, max_size=6), asked=edges)
def test_paths_lead_to_the_number(places, asked):
    made, numbers = made_up(), iter(range(FREE, 1000))
    for count, place in enumerate(places):
        made.grow(place, 1000 + count, numbers)
    blockmap = made.map()
    for place in (*places, asked):
        path = made.load(lambda place=place: blockmap.path(place))
        assert [index for _, index in path] == list(tree_indices(made.geometry, place))[: len(path)]
        holders = [made.number(*step) for step in path]
        assert [holder for holder, _ in path] == [0, *holders[:-1]]
        assert all(holders[:-1])
        mapped = made.load(lambda place=place: blockmap.lookup(place, 1)).block
        assert holders[-1] == mapped if len(path) == len(tree_indices(made.geometry, place)) else holders[-1] == 0


@settings(max_examples=60)
@given(changes=st.lists(st.tuples(edges, st.integers(1, 30), st.booleans()), min_size=1, max_size=10))
def test_changed_numbers_are_seen(changes):
    """Runs are forgotten where numbers change, and only what is named need be."""
    made, numbers, data = made_up(), iter(range(FREE, 1000)), iter(range(1000, 8000))
    blocks: dict[int, int] = {}
    blockmap = made.map()
    for start, count, free in changes:
        count = min(count, END - start)
        made.load(lambda at=start: blockmap.lookup(at, 40))
        blockmap.verified.update((start, start + count - 1, start + count, max(0, start - 1)))
        for file_block in range(start, start + count):
            block = 0 if free else next(data)
            blocks[file_block] = block
            if block or made.number(*made.load(lambda at=file_block: made.map().path(at))[-1]):
                made.grow(file_block, block, numbers)
        made.held.clear()
        blockmap.changed(start, count)
        assert not blockmap.verified & set(range(start, start + count))
        assert start + count in blockmap.verified  # untouched
        for at in {start, start + count - 1, max(0, start - 3), min(END - 1, start + count)}:
            found = made.load(lambda at=at: blockmap.lookup(at, 50))
            count_there, block = expected(blocks, at, found.count)
            assert (found.count, found.block) == (count_there, block)
    blockmap.changed(5, 0)
    blockmap.changed(0, END + 1)
    assert not blockmap.verified


def test_adjacent_leaves_are_one_run_when_cached():
    """G12: the boundary is where the next look-up must read; then the run goes on."""
    made, numbers = made_up(), iter(range(FREE, 1000))
    for file_block in range(12 + 3 * POINTERS):
        made.grow(file_block, 2000 + file_block, numbers)
    blockmap = made.map()
    assert blockmap.lookup(0, 5000) == Run(0, 12, 2000, True)
    assert blockmap.lookup(3, 5) == Run(3, 5, 2003, False)
    assert blockmap.lookup(3, 9) == Run(3, 9, 2003, True)
    assert made.load(lambda: blockmap.lookup(12, 5000)) == Run(12, POINTERS, 2012, True)
    assert blockmap.lookup(0, 5000) == Run(0, 12 + POINTERS, 2000, True)
    made.load(lambda: blockmap.lookup(12 + 2 * POINTERS, 1))
    made.load(lambda: blockmap.lookup(12 + POINTERS, 1))
    assert blockmap.lookup(0, 5000) == Run(0, 12 + 3 * POINTERS, 2000, False)
    assert blockmap.lookup(0, 700) == Run(0, 700, 2000, False)


def test_a_hole_is_one_run_however_large():
    """Nothing is read, and nothing is walked, for blocks that no block of numbers leads to."""
    made, numbers = made_up(), iter(range(FREE, 1000))
    blockmap = made.map()
    loads = len(made.loads)
    assert blockmap.lookup(0, END) == Run(0, END, 0, False)
    assert list(blockmap.runs(0, END - 1)) == [Run(0, END, 0, False)]
    made.grow(END - 1, 5000, numbers)
    blockmap = made.map()
    assert len(made.loads) == loads
    assert blockmap.lookup(0, END) == Run(0, TREES[2], 0, True)
    assert made.load(lambda: list(blockmap.runs(0, END - 1))) == [Run(0, END - 1, 0), Run(END - 1, 1, 5000)]
    assert blockmap.lookup(5, END) == Run(5, END - 6, 0, False)
    assert blockmap.lookup(END - 1, 5) == Run(END - 1, 1, 5000, False)


def test_many_missing_leaves_are_named_at_once():
    made, numbers = made_up(), iter(range(FREE, 3000))
    for file_block in range(0, TREES[2] + 600, 100):
        made.grow(file_block, 4000 + file_block // 100, numbers)
    loads = len(made.loads)
    found = made.load(lambda: list(made.map().runs(0, TREES[2] + 599)))
    assert sum(run.count for run in found if run.block) == len(range(0, TREES[2] + 600, 100))
    assert len(made.loads) - loads <= 8


def test_memory_for_leaves_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("odirect.fs.ext2.blockmap._MOST_RUNS", 300)
    monkeypatch.setattr("odirect.fs.ext2.blockmap._MOST_LEAVES", 4)
    made, numbers = made_up(), iter(range(FREE, 3000))
    places = range(0, 12 + 9 * POINTERS, 2)
    for file_block in places:
        made.grow(file_block, 4000 + file_block, numbers)
    blockmap = made.map()
    for _ in range(2):
        for file_block in places:
            assert made.load(lambda at=file_block: blockmap.lookup(at, 9)) == Run(
                file_block, 1, 4000 + file_block, False
            )
        assert len(blockmap._leaves) <= 4
        assert blockmap._runs == sum(len(leaf.blocks) for leaf in blockmap._leaves.values()) <= 300


def test_blocks_that_no_file_has():
    made = made_up()
    blockmap = made.map()
    for at, limit in ((-1, 1), (END, 1), (0, 0), (5, -1)):
        for _ in range(2):
            with pytest.raises(ValueError, match="of a file"):
                blockmap.lookup(at, limit)
            blockmap.lookup(0, 1)
    with pytest.raises(ValueError, match="of a file"):
        blockmap.path(END)
    with pytest.raises(ValueError, match="of a file"):
        list(blockmap.runs(0, END))


# --- trees that lie ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1, 2, 3, 4, 5, FREE - 1, 8193, 0xFFFFFFFF])
@pytest.mark.parametrize("file_block", [3, 12, 40, TREES[1], TREES[2] + 7])
def test_numbers_that_no_file_has(wrong: int, file_block: int):
    """At every level: the error says in which block, and at which byte, the number is."""
    levels = len(tree_indices(geometry_of(128), file_block))
    for level in range(levels):
        made, numbers = made_up(), iter(range(FREE, 300))
        made.grow(file_block, 1000, numbers)
        holder, index = made.load(lambda made=made: made.map().path(file_block))[level]
        made.put(holder, index, wrong)
        made.held.clear()
        where = f"block numbers in block {holder}, number {index} at byte {holder * 1024 + 4 * index}"
        if not holder:
            where = f"block number {index} at byte {5 * 1024 + 11 * 128 + 40 + 4 * index}"
        for ask in (
            lambda blockmap: blockmap.lookup(file_block, 4),
            lambda blockmap: list(blockmap.runs(0, file_block)),
            lambda blockmap: list(all_blocks(blockmap)),
        ):
            with pytest.raises(CorruptionError, match=f"inode 12, {where}: found block {wrong}, expected a block for"):
                made.load(lambda made=made, ask=ask: ask(made.map()))


def test_trees_that_lead_back_to_themselves():
    """All numbers of a block lead to the block itself: an error where all are wanted, no endless walk."""
    made = made_up()
    made.content[500] = bytearray(struct.pack("<I", 500) * POINTERS)
    for root in (12, 13, 14):
        made.put(0, root, 500)
    blockmap = made.map()
    assert made.load(lambda: blockmap.lookup(END - 1, 10)) == Run(END - 1, 1, 500, False)
    for ask in (
        lambda: list(blockmap.runs(0, END - 1)),
        lambda: list(blockmap.indirect_blocks(0, END - 1)),
        lambda: list(all_blocks(blockmap)),
    ):
        with pytest.raises(
            CorruptionError, match="blocks of data and numbers, expected no more than the volume's 8193"
        ):
            made.load(ask)
    # The same with a leaf that is all holes: nothing is mapped, and yet it ends.
    made.content[501] = bytearray(1024)
    made.content[500] = bytearray(struct.pack("<I", 502) * POINTERS)
    made.content[502] = bytearray(struct.pack("<I", 501) * POINTERS)
    made.put(0, 12, 0)
    made.put(0, 13, 0)
    made.held.clear()
    with pytest.raises(CorruptionError, match="no more than the volume's"):
        made.load(lambda: list(made.map().runs(0, END - 1)))
    found = made.load(lambda: made.map().lookup(0, END))
    assert found.block == 0
    assert found.count > 1


@settings(max_examples=150)
@given(
    roots=st.lists(st.integers(0, 12) | st.integers(250, 270) | st.integers(0, 0xFFFFFFFF), min_size=15, max_size=15),
    filling=st.lists(st.binary(min_size=0, max_size=64), min_size=4, max_size=4),
    small=st.booleans(),
    at=edges,
)
def test_any_numbers_give_runs_or_an_error(roots, filling, small, at):
    made = made_up()
    for index, block in enumerate(roots):
        made.put(0, index, block % 300 if small else block)
    for block, raw in zip((261, 262, 263, 299), filling, strict=True):
        words = [word % 300 if small else word for (word,) in struct.iter_unpack("<I", raw[: len(raw) // 4 * 4])]
        made.content[block] = bytearray(b"".join(word.to_bytes(4, "little") for word in words).ljust(1024, b"\0"))
    blockmap = made.map()
    for ask in (
        lambda: blockmap.lookup(at, 1000),
        lambda: blockmap.path(at),
        lambda: list(blockmap.runs(0, min(END - 1, at + 1000))),
        lambda: list(all_blocks(blockmap)),
    ):
        try:
            made.load(ask)
        except CorruptionError as error:
            assert "expected" in str(error)


# --- real files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1024, 2048, 4096])
def test_a_sparse_file_of_debugfs(scratch: Path, block: int):
    """Data in all four places of the tree, by way of debugfs; compared with its own map and byte for byte."""
    source, path = scratch / "source", make(scratch / "d.img", 16 << 20, "-b", str(block))
    pointers = block // 4
    places = [0, 11, 12, 13, 12 + pointers - 1, 12 + pointers, 12 + 3 * pointers, 12 + pointers + pointers**2]
    with open(source, "wb") as file:
        for count, place in enumerate(places[: 7 if block == 4096 else 8]):
            file.seek(place * block)
            file.write(bytes([count + 1]) * block)
        file.truncate(places[6] * block + 5 * block + 17)
    debugfs(path, f"write {source} f")
    image = Image(path)
    number = inode_number(path, "f")
    assert image.content(number) == source.read_bytes()
    blockmap = image.map(number)
    for place in places[:7]:
        said = int(run("debugfs", "-R", f"bmap <{number}> {place}", path))
        assert image.cache.load(lambda place=place: blockmap.lookup(place, 1)).block == said
    every = sorted(int(block) for block in run("debugfs", "-R", f"blocks <{number}>", path).split())
    assert sorted(block for _, block in image.cache.load(lambda: list(all_blocks(blockmap)))) == every


def test_the_reserved_inodes(scratch: Path):
    """Inode 7 leads to the blocks kept for descriptors, which no other inode may have."""
    path = make(scratch / "d.img", 20 << 20, "-b", "1024")
    image = Image(path)
    found = [block for _, block in image.cache.load(lambda: list(all_blocks(image.map(7))))]
    kept = [block for block in found if image.geometry.is_fixed(block)]
    assert len(kept) == 2 * image.geometry.superblock.reserved_gdt_blocks
    said = {int(block) for block in run("debugfs", "-R", "blocks <7>", path).split()}
    assert set(found) == said
    assert image.cache.load(lambda: list(all_blocks(image.map(1)))) == []


@pytest.mark.parametrize("block", [1024, 2048, 4096])
def test_a_sparse_file_of_the_kernel(scratch: Path, block: int):
    """Up to the last byte that a file may have: the kernel's own extents, and every byte of them."""
    needs_root()
    path = make(scratch / "k.img", 48 << 20, "-b", str(block))
    most = Image(path).geometry.max_file_bytes
    pointers = block // 4
    single, double = 12 + pointers, 12 + pointers + pointers**2
    places = {0, 5, 11, 12, 100, single - 1, single, single + 7 * pointers, double - 1, double, double + 1}
    places |= {double + pointers**2 + place for place in (0, 5)} | {most // block - 1}
    wanted = {}
    with mounted(path, "ext2") as point, open(point / "f", "wb", buffering=0) as file:
        for place in sorted(places):
            text = place.to_bytes(8, "little") * (3 * block // 8)
            at = min(place * block + 3, most - len(text))
            os.pwrite(file.fileno(), text, at)
            wanted[at] = text
        os.truncate(file.fileno(), most)
        os.fsync(file.fileno())
        kernels = [(one.offset, one.length, one.addr) for one in file_extents(file.fileno())]
        number = os.fstat(file.fileno()).st_ino
    image = Image(path)
    inode = image.inode(number)
    assert inode.size == most
    blockmap = image.map(number)
    runs = image.cache.load(lambda: list(blockmap.runs(0, most // block - 1)))
    ours = {run.file_block + step: run.block + step for run in runs if run.block for step in range(run.count)}
    theirs = {
        offset // block + step: addr // block + step
        for offset, length, addr in kernels
        for step in range(length // block)
    }
    assert ours == theirs
    assert sum(run.count for run in runs) == most // block
    read = {place: image.block(there) for place, there in ours.items()}
    for at, text in wanted.items():
        first, last = at // block, (at + len(text) - 1) // block
        there = b"".join(read[place] for place in range(first, last + 1))
        later = [other for other in wanted if at < other < at + len(text)]
        end = min([*later, at + len(text)]) - at
        assert there[at - first * block :][:end] == text[:end]
    # Each by itself, from nothing cached.
    for place in sorted(ours):
        fresh = image.map(number)
        assert image.cache.load(lambda place=place, fresh=fresh: fresh.lookup(place, 1)).block == ours[place]
    # The blocks that the inode counts are those that the map has.
    every = image.cache.load(lambda: list(all_blocks(blockmap)))
    assert len(every) * (block // 512) == inode.sectors
    assert len(set(every)) == len(every)
