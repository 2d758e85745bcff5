"""Files grow and shrink; the tree of block numbers, the bitmaps and the sectors always agree."""

from __future__ import annotations

import errno
import functools
import stat
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.writing_kit import SmallVolume, device_of, fresh_image, small, sound

from odirect.base.errors import CorruptionError, NoSpaceError
from odirect.cache.metacache import BlockMiss
from odirect.fs.ext2 import grow
from odirect.fs.ext2.allocate import NeedsCommit

MIB = 1 << 20
#: 256 block numbers in a block.
ONE_KIB = ("-b", "1024", "-m", "0")
P = 256


def file_of(volume: SmallVolume, name: bytes = b"file") -> int:
    return volume.create(2, name)


def extend(volume: SmallVolume, number: int, file_block: int, count: int) -> list[grow.Prepared]:
    """Fill blocks with whatever is on the device; the runs."""
    runs = []
    while count:
        run = volume.prepare(number, file_block, count)
        grow.publish(volume, run, run.count)
        runs.append(run)
        file_block += run.count
        count -= run.count
        with volume.cache.transaction():
            inode = volume.inodes[number]
            inode.remember(volume.cache)
            inode.size = max(inode.size, file_block * volume.block_bytes)
            volume.store(inode)
    return runs


def mapped(volume: SmallVolume, number: int) -> dict[int, int]:
    """File block to device block."""

    def look() -> dict[int, int]:
        blocks = volume.map_of(volume.inode(number))
        last = max(volume.inode(number).size // volume.block_bytes, 1) - 1
        return {
            run.file_block + at: run.block + at for run in blocks.runs(0, last) if run.block for at in range(run.count)
        }

    return volume.load(look)


def indirect(volume: SmallVolume, number: int) -> list[tuple[int, int]]:
    return [(level, block) for level, block in volume.blocks_of(number) if level]


def agrees(volume: SmallVolume, number: int) -> None:
    """The sectors are those of all blocks; no block is there twice; all are in use."""
    blocks = [block for _, block in volume.blocks_of(number)]
    assert len(set(blocks)) == len(blocks)
    assert volume.inodes[number].sectors == len(blocks) * volume.block_bytes // 512


# Growing.


def test_an_indirect_block_lies_right_before_its_data() -> None:
    """The classical order: 12 blocks, an indirect block, 256 blocks, two indirect blocks, and so on."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    runs = extend(volume, number, 0, 12 + P + 2 * P)
    assert [(run.file_block, run.count) for run in runs] == [(0, 12), (12, P), (12 + P, P), (12 + 2 * P, P)]
    first = runs[0].block
    assert [run.block for run in runs] == [first, first + 13, first + 13 + P + 2, first + 13 + 2 * P + 3]
    assert indirect(volume, number) == [
        (1, first + 12),
        (2, first + 13 + P),
        (1, first + 14 + P),
        (1, first + 15 + 2 * P),
    ]
    agrees(volume, number)
    sound(volume)


@pytest.mark.parametrize("file_block", [0, 11, 12, 12 + P - 1, 12 + P, 12 + P + P * P - 1, 12 + P + P * P])
@pytest.mark.parametrize("count", [1, 2])
def test_blocks_at_the_edges_of_the_trees(file_block: int, count: int) -> None:
    """One and two blocks where a tree begins or ends: as many indirect blocks as it takes."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    free_blocks = volume.allocator.free_blocks
    extend(volume, number, file_block, count)
    assert sorted(mapped(volume, number)) == list(range(file_block, file_block + count))
    agrees(volume, number)
    sound(volume)
    assert not volume.load(lambda: grow.free_from(volume, volume.inodes[number], 0))
    assert volume.inodes[number].sectors == 0
    assert not any(volume.inodes[number].block)
    assert volume.allocator.free_blocks == free_blocks


def test_no_block_past_the_last_that_a_file_can_have() -> None:
    """The last block's place is there; past it is EFBIG."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    last = volume.geometry.max_blocks - 1
    run = volume.prepare(number, last, 5)
    assert run.count == 1
    grow.abandon(volume, run)
    with pytest.raises(NoSpaceError) as caught:
        volume.prepare(number, last + 1, 1)
    assert caught.value.errno == errno.EFBIG


def test_nothing_speaks_of_a_run_before_it_is_published() -> None:
    """F11: the tree and the inode are as they were; abandoned, so is the free space (F30)."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    volume.commit()
    inode = volume.inodes[number]
    before = bytes(inode.block), inode.sectors, volume.allocator.free_blocks
    run = volume.prepare(number, 12 + P, 10)
    assert volume.cache.dirty_blocks <= 3  # a bitmap, a descriptor, the superblock
    assert (bytes(inode.block), inode.sectors) == before[:2]
    assert volume.allocator.free_blocks == before[2] - 12
    grow.abandon(volume, run)
    assert (bytes(inode.block), inode.sectors, volume.allocator.free_blocks) == before
    assert volume.allocator.planned == {}
    assert volume.allocator.prepared == {}
    assert volume.allocator.held_blocks == 0
    sound(volume)


def test_a_part_is_published_and_the_rest_given_back() -> None:
    """A short write."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    free_blocks = volume.allocator.free_blocks
    run = volume.prepare(number, 12, 100)
    grow.publish(volume, run, 30)
    with volume.cache.transaction():
        volume.inodes[number].size = 42 * 1024
        volume.store(volume.inodes[number])
    assert volume.allocator.free_blocks == free_blocks - 31
    assert sorted(mapped(volume, number)) == list(range(12, 42))
    sound(volume)


def test_several_runs_of_one_request_share_their_indirect_blocks() -> None:
    """Runs are prepared one after the other before any is published, in any order, some of them given up."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    free_blocks = volume.allocator.free_blocks
    starts = [0, 12, 12 + P, 12 + 2 * P]
    runs = [volume.prepare(number, start, P) for start in starts]
    more = volume.prepare(number, 12 + 3 * P, 10)
    again = volume.prepare(number, 12 + 3 * P + 10, 10)
    assert again.block == more.block + 10
    assert volume.allocator.free_blocks == free_blocks - (12 + 3 * P + 20) - 5
    for run in (runs[3], more, runs[0]):
        grow.publish(volume, run, run.count)
    for run in (runs[2], runs[1]):
        grow.abandon(volume, run)
    grow.publish(volume, again, again.count)
    volume.load(lambda: setattr(volume.inodes[number], "size", (12 + 3 * P + 20) * 1024))
    volume.load(lambda: volume.store(volume.inodes[number]))
    expected = [*range(12), *range(12 + 2 * P, 12 + 3 * P + 20)]
    assert sorted(mapped(volume, number)) == expected
    assert volume.allocator.free_blocks == free_blocks - len(expected) - 3
    assert volume.allocator.planned == {}
    agrees(volume, number)
    sound(volume)


def test_what_all_runs_planned_is_given_back_with_the_last() -> None:
    """Every order of giving up: no indirect block is left."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    free_blocks = volume.allocator.free_blocks
    runs = [volume.prepare(number, 12 + P + at * P, P) for at in range(3)]
    for run in (runs[1], runs[0], runs[2]):
        grow.abandon(volume, run)
    assert volume.allocator.free_blocks == free_blocks
    assert volume.allocator.planned == {}


def test_publishing_never_misses() -> None:
    """Everything else may have left the cache meanwhile; what publishing needs has not."""
    volume = small(8 * MIB, *ONE_KIB)
    volume.cache.limit_bytes = 0
    number = file_of(volume)
    table, _ = volume.geometry.inode_place(volume.cache, number)
    extend(volume, number, 12 + P, 5)
    volume.commit()
    run = volume.prepare(number, 12 + P + 5, 5)
    planned = volume.prepare(number, 12 + 2 * P, 5)
    third = volume.prepare(number, 12 + 2 * P + 5, 5)
    for _ in range(3):
        volume.commit()
        volume.run(volume.cache.read(range(4000, 4064)))
    grow.publish(volume, run, 5)
    grow.publish(volume, planned, 5)
    volume.commit()
    volume.run(volume.cache.read(range(4000, 4064)))
    grow.publish(volume, third, 2)
    volume.commit()
    assert volume.cache.peek(table) is None
    volume.load(lambda: setattr(volume.inodes[number], "size", (12 + 2 * P + 7) * 1024))
    volume.load(lambda: volume.store(volume.inodes[number]))
    agrees(volume, number)
    sound(volume)


def test_a_publication_can_be_undone_with_what_follows_it() -> None:
    """The run is as it was, and may be published once more."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    run = volume.prepare(number, 12, 20)
    before = bytes(volume.inodes[number].block), volume.allocator.free_blocks
    with pytest.raises(OSError, match="no"), volume.cache.transaction():
        grow.publish(volume, run, 10)
        raise OSError("no")
    assert (bytes(volume.inodes[number].block), volume.allocator.free_blocks) == before
    grow.publish(volume, run, 20)
    with pytest.raises(RuntimeError, match="published or given up"):
        grow.publish(volume, run, 20)
    with pytest.raises(RuntimeError, match="published or given up"):
        grow.abandon(volume, run)
    volume.load(lambda: setattr(volume.inodes[number], "size", 32 * 1024))
    volume.load(lambda: volume.store(volume.inodes[number]))
    agrees(volume, number)
    sound(volume)


def test_runs_end_where_something_is() -> None:
    """At a block that has a place, and at another prepared run; a block with a place is refused."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    extend(volume, number, 5, 1)
    extend(volume, number, 40, 1)
    assert volume.prepare(number, 0, 100).count == 5
    run = volume.prepare(number, 30, 5)
    assert run.count == 5
    assert volume.prepare(number, 20, 100).count == 10
    assert volume.prepare(number, 35, 100).count == 5
    for block in (0, 5, 32, 40):
        with pytest.raises(ValueError, match="has a place already"):
            volume.prepare(number, block, 1)
    with pytest.raises(ValueError, match="0 blocks from 3"):
        volume.prepare(number, 3, 0)
    with pytest.raises(ValueError, match="6 blocks of"):
        grow.publish(volume, run, 6)


def test_files_go_on_where_they_end() -> None:
    """Two files that grow in turn are each other's neighbours, and each continues if it can."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    first = extend(volume, number, 0, 4)[0]
    assert extend(volume, number, 4, 4)[0].block == first.block + 4
    assert volume.prepare(number, 8, 1, goal=5000).block == 5000
    inode = volume.inodes[number]
    assert volume.load(lambda: grow.goal_of(volume, inode, 9)) == 5001
    assert volume.load(lambda: grow.goal_of(volume, inode, 12)) == volume.geometry.first_data_block


def test_a_full_volume_leaves_nothing_behind() -> None:
    """F30: indirect blocks without room for their data are given back."""
    volume = small(1 * MIB, *ONE_KIB)
    number = file_of(volume)
    while True:
        try:
            extend(volume, number, volume.inodes[number].size // 1024, 1000)
        except NoSpaceError:
            break
    assert volume.allocator.free_blocks == 0
    agrees(volume, number)
    sound(volume)
    volume.truncate(number, 500 * 1024)
    other = file_of(volume, b"other")
    volume.commit()
    left = volume.allocator.free_blocks
    volume.load(lambda: volume.allocator.find_run(0, left - 2))
    while volume.allocator.free_blocks > 2:
        volume.load(lambda: volume.allocator.find_run(0, volume.allocator.free_blocks - 2))
    with pytest.raises(NoSpaceError):
        volume.prepare(other, 12 + P, 1)
    assert volume.allocator.free_blocks == 2
    assert volume.prepare(other, 12, 5).count == 1


def test_freed_space_is_asked_for_with_a_commit() -> None:
    """NeedsCommit, and then there is room."""
    volume = small(1 * MIB, *ONE_KIB)
    number = file_of(volume)
    with pytest.raises(NoSpaceError):
        extend(volume, number, 0, 2000)
    volume.commit()
    volume.truncate(number, 0)
    with pytest.raises(NeedsCommit):
        volume.load(lambda: grow.prepare(volume, volume.inodes[number], 0, 1))
    done = volume.committer.done
    assert volume.prepare(number, 0, 12).count == 12
    assert volume.committer.done == done + 1


# Shrinking.


def test_truncating_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step leaves a sound tree that ends earlier; all steps together free everything."""
    volume = small(32 * MIB, *ONE_KIB)
    number = file_of(volume)
    free_blocks = volume.allocator.free_blocks
    extend(volume, number, 0, 12 + P + 10 * P)
    extend(volume, number, 12 + P + P * P + 5 * P, 3)
    extend(volume, number, 12 + P + 2 * P * P, 3)
    sound(volume)
    monkeypatch.setattr(grow, "STEP_LEAVES", 3)
    steps = 0
    sizes = [volume.inodes[number].sectors]
    while volume.load(lambda: grow.free_from(volume, volume.inodes[number], 12 + P + 1)):
        steps += 1
        agrees(volume, number)
        sizes.append(volume.inodes[number].sectors)
        sound(volume)
    assert steps == 3
    assert sizes == sorted(set(sizes), reverse=True)
    assert max(mapped(volume, number)) == 12 + P
    volume.load(lambda: setattr(volume.inodes[number], "size", (12 + P + 1) * 1024))
    volume.load(lambda: volume.store(volume.inodes[number]))
    sound(volume)
    while volume.load(lambda: grow.free_from(volume, volume.inodes[number], 0)):
        pass
    assert volume.allocator.free_blocks == free_blocks
    assert volume.inodes[number].sectors == 0


@pytest.mark.parametrize("size", [0, 1, 5, 11, 12, 13, 12 + P - 1, 12 + P, 12 + P + 1, 12 + 2 * P, 12 + 2 * P + 7])
def test_truncating_to_any_size(size: int) -> None:
    """What is before stays where it is; indirect blocks that nothing is left in go."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    extend(volume, number, 0, 12 + 3 * P)
    before = mapped(volume, number)
    sound(volume)
    volume.truncate(number, size * 1024)
    assert mapped(volume, number) == {block: at for block, at in before.items() if block < size}
    leaves = (size > 12) + (size > 12 + P) + (size > 12 + 2 * P)
    assert len(indirect(volume, number)) == leaves + (size > 12 + P)
    agrees(volume, number)
    sound(volume)


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 12), (3, 5), (10, 4), (12, P), (12, P - 1), (13, P), (12 + P, 2 * P), (5, 2 * P), (0, 12 + 3 * P), (400, 0)],
)
def test_punching_a_hole(first: int, count: int) -> None:
    """The hole's blocks are free, the others where they were; empty indirect blocks go."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    extend(volume, number, 0, 12 + 3 * P)
    before = mapped(volume, number)
    sound(volume)
    volume.punch(number, first, count)
    left = {block: at for block, at in before.items() if not first <= block < first + count}
    assert mapped(volume, number) == left
    ends = [12 + P, 12 + 2 * P, 12 + 3 * P]
    leaves = [any(end - P <= block < end for block in left) for end in ends]
    assert len(indirect(volume, number)) == sum(leaves) + any(leaves[1:])
    agrees(volume, number)
    sound(volume)
    if count:
        extend(volume, number, first, count)
        assert len(mapped(volume, number)) == len(before)
        sound(volume)


def test_what_has_no_blocks_is_left_alone() -> None:
    """A short symbolic link has its target where others have numbers."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    inode = volume.inodes[number]
    inode.mode = stat.S_IFLNK | 0o777
    inode.block[:5] = b"hello"
    inode.size = 5
    assert not volume.load(lambda: grow.free_from(volume, inode, 0))
    assert bytes(inode.block[:5]) == b"hello"
    with pytest.raises(ValueError, match="-1 blocks"):
        volume.load(lambda: grow.punch(volume, inode, 0, -1))


def corrupt_leaf(volume: SmallVolume, number: int) -> None:
    leaf = indirect(volume, number)[0][1]
    table = volume.geometry.inode_table(0)
    volume.load(lambda: volume.cache.change(leaf, 1).__setitem__(slice(40, 44), table.to_bytes(4, "little")))


def corrupt_twice(volume: SmallVolume, number: int) -> None:
    leaf, data = indirect(volume, number)[0][1], mapped(volume, number)[3]
    volume.load(lambda: volume.cache.change(leaf, 1).__setitem__(slice(40, 44), data.to_bytes(4, "little")))


def corrupt_root(volume: SmallVolume, number: int) -> None:
    volume.inodes[number].set_pointer(14, 1 << 31)


def corrupt_direct(volume: SmallVolume, number: int) -> None:
    volume.inodes[number].set_pointer(3, volume.geometry.inode_bitmap(0))


def corrupt_sectors(volume: SmallVolume, number: int) -> None:
    volume.inodes[number].sectors = 8


@pytest.mark.parametrize(
    ("corrupt", "said"),
    [
        (corrupt_leaf, "block numbers in block"),
        (corrupt_twice, "in two places of the file"),
        (corrupt_root, "block 2147483648"),
        (corrupt_direct, "a block for files"),
        (corrupt_sectors, "8 sectors"),
    ],
)
def test_a_tree_that_cannot_be_believed(corrupt: Callable[[SmallVolume, int], None], said: str) -> None:
    """Nothing is freed of a file whose numbers lead where they must not."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    extend(volume, number, 0, 60)
    corrupt(volume, number)
    free_blocks = volume.allocator.free_blocks
    with pytest.raises(CorruptionError, match=said):
        volume.load(lambda: grow.free_from(volume, volume.inodes[number], 0))
    assert volume.allocator.free_blocks == free_blocks
    assert volume.allocator.held_blocks == 0


def test_a_miss_undoes_everything() -> None:
    """A step that must first read a block is begun anew, not gone on with."""
    volume = small(8 * MIB, *ONE_KIB)
    number = file_of(volume)
    extend(volume, number, 0, 12 + 3 * P)
    volume.commit()
    free_blocks = volume.allocator.free_blocks
    volume.cache.forget(indirect(volume, number)[-1][1])
    inode = volume.inodes[number]
    with pytest.raises(BlockMiss), volume.cache.transaction():
        grow.free_from(volume, inode, 0)
    assert volume.allocator.free_blocks == free_blocks
    assert inode.sectors > 0


# Against a model.


@settings(max_examples=40)
@given(st.data())
def test_two_files_against_a_model(data: st.DataObject) -> None:
    """F30: after any operations each file has the blocks that the model gives it, and free is what is left."""
    volume = SmallVolume(device_of(fresh_image(1 * MIB, *ONE_KIB)))
    numbers = [file_of(volume, b"a"), file_of(volume, b"b")]
    volume.commit()
    start = volume.allocator.free_blocks
    model: dict[int, dict[int, int]] = {number: {} for number in numbers}
    waiting: list[grow.Prepared] = []
    spots = st.sampled_from([0, 3, 11, 12, 13, 200, 12 + P - 1, 12 + P, 700, 12 + P + P * P - 2, 12 + P + P * P])
    for _ in range(data.draw(st.integers(1, 20))):
        number = data.draw(st.sampled_from(numbers))
        step = data.draw(st.sampled_from(("prepare", "prepare", "publish", "abandon", "punch", "cut", "commit")))
        if step == "prepare":
            first, count = data.draw(spots), data.draw(st.integers(1, 300))
            busy = [
                block
                for run in waiting
                if run.inode.number == number
                for block in range(run.file_block, run.file_block + run.count)
            ]
            if first in model[number] or first in busy:
                with pytest.raises(ValueError, match="has a place already"):
                    volume.prepare(number, first, count)
                continue
            try:
                run = volume.prepare(number, first, count)
            except NoSpaceError:
                continue
            assert not set(range(first, first + run.count)) & {*busy, *model[number]}
            waiting.append(run)
        elif step in ("publish", "abandon") and waiting:
            run = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            done = data.draw(st.integers(0, run.count)) if step == "publish" else 0
            grow.publish(volume, run, done)
            for at in range(done):
                model[run.inode.number][run.file_block + at] = run.block + at
        elif step in ("punch", "cut"):
            if any(run.inode.number == number for run in waiting):
                continue  # The file's locks keep these apart.
            first = data.draw(spots)
            count = data.draw(st.integers(1, 400)) if step == "punch" else volume.geometry.max_blocks
            if step == "punch":
                volume.punch(number, first, count)
            else:
                while volume.load(functools.partial(grow.free_from, volume, volume.inodes[number], first)):
                    pass
            model[number] = {at: block for at, block in model[number].items() if not first <= at < first + count}
        elif step == "commit":
            volume.commit()
    for run in waiting:
        grow.abandon(volume, run)
    used = 0
    everything: set[int] = set()
    for number in numbers:
        inode = volume.inodes[number]
        inode.size = (max(model[number], default=-1) + 1) * 1024
        volume.load(functools.partial(volume.store, inode))
        assert mapped(volume, number) == model[number]
        agrees(volume, number)
        blocks = {block for _, block in volume.blocks_of(number)}
        assert not blocks & everything
        everything |= blocks
        used += len(blocks)
    assert volume.allocator.free_blocks == start - used
    assert volume.allocator.planned == {}
    sound(volume)
