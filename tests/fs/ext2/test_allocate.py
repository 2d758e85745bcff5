"""Blocks and inodes are given out near where they are wanted, each once, and counted right (F30)."""

from __future__ import annotations

import functools
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.writing_kit import SmallVolume, device_of, fresh_image, small, sound

from odirect.base.errors import CorruptionError, NoSpaceError
from odirect.cache.metacache import LATE
from odirect.fs.ext2.allocate import NeedsCommit
from odirect.fs.ext2.format import GROUP_DESCRIPTOR, INODE, SUPERBLOCK

MIB = 1 << 20
#: Eight groups of 1024 blocks of 1 KiB.
GROUPS = ("-b", "1024", "-g", "1024", "-N", "512", "-m", "0")


def find(volume: SmallVolume, goal: int, wanted: int) -> tuple[int, int]:
    return volume.load(lambda: volume.allocator.find_run(goal, wanted))


def free(volume: SmallVolume, block: int, count: int, *, never_used: bool = False) -> None:
    volume.load(lambda: volume.allocator.free_run(block, count, never_used=never_used))


def in_use(volume: SmallVolume) -> set[int]:
    """The blocks whose bits are set."""

    def look() -> set[int]:
        found = set()
        for group in range(volume.geometry.groups):
            bits = int.from_bytes(volume.cache.get(volume.geometry.block_bitmap(group)), "little")
            first = volume.geometry.first_block_of_group(group)
            size = volume.geometry.blocks_in_group(group)
            found |= {first + index for index in range(size) if bits >> index & 1}
        return found

    return volume.load(look)


def counted(volume: SmallVolume) -> None:
    """The bitmaps, the descriptors and the superblock agree (F30)."""
    total = volume.geometry.blocks_count - volume.geometry.first_data_block
    free_blocks = total - len(in_use(volume))
    assert volume.allocator.free_blocks == free_blocks
    groups = range(volume.geometry.groups)
    assert sum(volume.allocator.descriptor(group).free_blocks_count for group in groups) == free_blocks


def fill(volume: SmallVolume, *, but: int = 0) -> None:
    """Take every block, but for that many."""
    left = volume.allocator.free_blocks - but
    while left:
        left -= find(volume, 0, left)[1]


# Where blocks come from.


def test_the_goal_itself_comes_first() -> None:
    """A free goal begins the run, which ends at the first block in use."""
    volume = small(8 * MIB, *GROUPS)
    assert find(volume, 3000, 10) == (3000, 10)
    assert find(volume, 2990, 50) == (2990, 10)
    counted(volume)


def test_a_run_of_the_wanted_length_in_the_goals_group() -> None:
    """A taken goal: the next run behind it that is long enough, not the first that is there."""
    volume = small(8 * MIB, *GROUPS)
    for block in range(3000, 3040, 4):
        assert find(volume, block, 1) == (block, 1)
    assert find(volume, 3000, 3) == (3001, 3)
    assert find(volume, 3000, 20) == (3037, 20)


def test_a_run_before_the_goal_in_its_group() -> None:
    """Nothing behind the goal: the group is looked through from its start."""
    volume = small(8 * MIB, *GROUPS)
    find(volume, 2500, 4096)
    block, count = find(volume, 2600, 8)
    assert count == 8
    assert 2049 <= block < 2500


def test_another_group_when_the_own_one_has_only_crumbs() -> None:
    """A run of the wanted length next door is better than single blocks at home."""
    volume = small(8 * MIB, *GROUPS)
    first = volume.geometry.first_block_of_group(2)
    while volume.allocator.descriptor(2).free_blocks_count:
        find(volume, first, 1024)
    for block in range(first + 500, first + 540, 2):
        free(volume, block, 1, never_used=True)
    block, count = find(volume, first + 10, 16)
    assert count == 16
    assert volume.geometry.group_of_block(block) == 3


def test_crumbs_are_taken_when_there_is_nothing_else() -> None:
    """The longest run that is left, wherever it is."""
    volume = small(8 * MIB, *GROUPS)
    fill(volume)
    for block, count in ((1500, 1), (5000, 3), (5010, 2)):
        free(volume, block, count, never_used=True)
    assert find(volume, 0, 64) == (5000, 3)
    assert find(volume, 1400, 64) == (5010, 2)
    assert find(volume, 7000, 64) == (1500, 1)
    with pytest.raises(NoSpaceError):
        find(volume, 7000, 1)
    counted(volume)


def test_the_last_block_and_nothing_behind_it() -> None:
    """A last group that is no multiple of 8 blocks: its padding is never given out."""
    image = fresh_image(8 * MIB + 3 * 1024, "-b", "1024", "-m", "0")
    volume = SmallVolume(device_of(image))
    last = volume.geometry.blocks_count - 1
    assert (last + 1 - volume.geometry.first_data_block) % 8
    assert find(volume, last, 100) == (last, 1)
    fill(volume)
    assert volume.allocator.free_blocks == 0
    assert max(in_use(volume)) == last
    for block in range(last - 3, last + 1):
        free(volume, block, 1, never_used=True)
    assert find(volume, last - 1, 100) == (last - 1, 2)
    assert find(volume, 0, 100) == (last - 3, 2)


def test_a_full_volume_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts say that a group has nothing, so its bitmap is not looked at."""
    volume = small(8 * MIB, *GROUPS)
    fill(volume)
    looked: list[int] = []
    monkeypatch.setattr(volume.allocator, "_longest", lambda group, goal, wanted: looked.append(group))
    with pytest.raises(NoSpaceError):
        find(volume, 100, 5)
    assert looked == []


def test_stale_copies_are_dropped() -> None:
    """G11: what was cached of a block is gone when it is given out."""
    volume = small(8 * MIB, *GROUPS)
    volume.load(lambda: volume.cache.get(3000))
    assert volume.cache.peek(3000) is not None
    find(volume, 2999, 3)
    assert volume.cache.peek(3000) is None


def test_nonsense_is_refused() -> None:
    """Callers' mistakes are ValueErrors; a goal outside the volume is only a bad wish."""
    volume = small(8 * MIB, *GROUPS)
    with pytest.raises(ValueError, match="a run of 0"):
        find(volume, 0, 0)
    with pytest.raises(ValueError, match="a run of 0"):
        free(volume, 3000, 0)
    with pytest.raises(CorruptionError, match="not of this volume"):
        free(volume, 8000, 1000)
    assert find(volume, 1 << 40, 1)[1] == 1


# Freeing, and what a commit must come before.


def test_freed_blocks_wait_for_the_commit() -> None:
    """Held blocks count as free, are not given out, and are after the commit that frees them."""
    volume = small(8 * MIB, *GROUPS)
    fill(volume, but=2)
    sound_count = volume.allocator.free_blocks
    free(volume, 5000, 6)
    assert volume.allocator.free_blocks == sound_count + 6
    assert volume.allocator.held_blocks == 6
    taken = [find(volume, 5000, 1)[0] for _ in range(2)]
    assert not set(taken) & set(range(5000, 5006))
    with pytest.raises(NeedsCommit):
        find(volume, 5000, 1)
    volume.commit()
    assert volume.allocator.held_blocks == 0
    assert find(volume, 5000, 10) == (5000, 6)
    counted(volume)


def test_what_is_freed_during_a_commit_waits_for_the_next() -> None:
    """The holds of a snapshot end with its commit; later ones do not."""
    volume = small(8 * MIB, *GROUPS)
    find(volume, 5000, 20)
    free(volume, 5000, 4)
    holds = volume.allocator.take_holds()
    free(volume, 5010, 4)
    volume.allocator.release_holds(holds)
    assert volume.allocator.held_blocks == 4
    assert find(volume, 5000, 4) == (5000, 4)
    assert find(volume, 5010, 4)[0] != 5010
    failed = volume.allocator.take_holds()
    volume.allocator.return_holds(failed)
    assert volume.allocator.take_holds() == failed


def test_blocks_that_were_never_used_are_free_at_once() -> None:
    """Nothing on the disk knows of them."""
    volume = small(8 * MIB, *GROUPS)
    find(volume, 5000, 20)
    free(volume, 5005, 10, never_used=True)
    assert find(volume, 5005, 20) == (5005, 10)


def test_everything_is_undone_with_the_transaction() -> None:
    """F30: an operation that fails leaves counts, bits and holds as they were."""
    volume = small(8 * MIB, *GROUPS)
    find(volume, 5000, 20)
    before = in_use(volume), volume.allocator.free_blocks, volume.allocator.free_inodes
    parent = volume.load(lambda: volume.inode(2))

    def fails() -> None:
        volume.allocator.find_run(100, 50)
        volume.allocator.free_run(5000, 10)
        volume.allocator.new_inode(parent, True)
        raise NoSpaceError("as it happens")

    with pytest.raises(NoSpaceError):
        volume.load(fails)
    assert (in_use(volume), volume.allocator.free_blocks, volume.allocator.free_inodes) == before
    assert volume.allocator.held_blocks == 0
    assert volume.allocator.take_holds() == ([], [])
    free(volume, 5000, 10)


def test_runs_over_two_groups_are_freed() -> None:
    """The parts go to the bitmaps that they are in."""
    volume = small(8 * MIB, *GROUPS)
    boundary = volume.geometry.first_block_of_group(5)
    assert volume.load(lambda: volume.allocator.bitmap_blocks([(boundary - 1, 2)])) == [
        volume.geometry.block_bitmap(4),
        volume.geometry.block_bitmap(5),
    ]
    assert list(volume.allocator._split(boundary - 3, 5)) == [(4, boundary - 3, 3), (5, boundary, 2)]


# What the disk says is not believed.


def test_a_block_is_freed_once() -> None:
    """A block that is free already: two owners, or an owner too many."""
    volume = small(8 * MIB, *GROUPS)
    with pytest.raises(CorruptionError, match=r"block bitmap of group 4 at byte.*free"):
        free(volume, 5000, 1)
    counted(volume)


@pytest.mark.parametrize("what", ["super", "bitmap", "table"])
def test_the_volumes_own_blocks_are_not_freed(what: str) -> None:
    """A tree that leads to metadata cannot take it away."""
    volume = small(8 * MIB, *GROUPS)
    block = {
        "super": volume.geometry.first_block_of_group(1),
        "bitmap": volume.geometry.inode_bitmap(4),
        "table": volume.geometry.inode_table(4) + 1,
    }[what]
    with pytest.raises(CorruptionError, match="volume's own"):
        free(volume, block, 1)


def test_a_bitmap_that_offers_metadata() -> None:
    """Data would be written over an inode table."""
    image = bytearray(fresh_image(8 * MIB, *GROUPS))
    volume = SmallVolume(device_of(bytes(image)))
    table = volume.geometry.inode_table(4)
    index = table - volume.geometry.first_block_of_group(4)
    image[volume.geometry.block_bitmap(4) * 1024 + index // 8] &= ~(1 << index % 8)
    volume = SmallVolume(device_of(bytes(image)))
    with pytest.raises(CorruptionError, match=f"block {table} free"):
        find(volume, 5000, 1)


def test_a_descriptor_that_counts_what_is_not_there() -> None:
    """A bitmap without a free bit under a count above zero, and the other way round."""
    image = bytearray(fresh_image(8 * MIB, *GROUPS))
    volume = SmallVolume(device_of(bytes(image)))
    bitmap = volume.geometry.block_bitmap(4) * 1024
    image[bitmap : bitmap + 1024] = b"\xff" * 1024
    volume = SmallVolume(device_of(bytes(image)))
    with pytest.raises(CorruptionError, match="no free block"):
        find(volume, 5000, 1)
    block, offset = volume.geometry.descriptor_place(3)

    def lie() -> None:
        found = volume.allocator.descriptor(3)
        GROUP_DESCRIPTOR.write(found._replace(free_blocks_count=1), volume.cache.change(block, LATE), offset)

    volume.load(lie)
    with pytest.raises(CorruptionError, match="2 free blocks"):
        find(volume, 3500, 2)


def test_a_superblock_that_counts_less_than_there_is() -> None:
    """The count would go below zero."""
    volume = small(8 * MIB, *GROUPS)
    volume.load(lambda: volume.allocator.change_superblock(free_blocks_count=3))
    with pytest.raises(CorruptionError, match="free_blocks_count 3"):
        find(volume, 5000, 4)


# Promises.


def test_promises_are_kept() -> None:
    """Promised blocks are not promised twice; what root keeps is root's."""
    volume = small(8 * MIB, "-b", "1024", "-m", "10")
    kept = volume.geometry.superblock.r_blocks_count
    assert kept > 100
    free_blocks = volume.allocator.free_blocks
    volume.allocator.reserve(free_blocks - kept - 5)
    with pytest.raises(NoSpaceError, match="6 blocks are needed, 5 are free"):
        volume.allocator.reserve(6)
    volume.allocator.reserve(kept + 5, privileged=True)
    assert volume.allocator.reserved == free_blocks
    with pytest.raises(NoSpaceError):
        volume.allocator.reserve(1, privileged=True)
    volume.allocator.unreserve(free_blocks)
    with pytest.raises(RuntimeError, match="0 were promised"):
        volume.allocator.unreserve(1)


# Inodes.


def test_files_stay_with_their_directory_and_directories_do_not() -> None:
    """Directories at the top are spread, files are where their directory is."""
    volume = small(8 * MIB, *GROUPS, "-O", "^resize_inode")
    tops = [volume.mkdir(2, b"top%d" % number) for number in range(7)]
    assert {volume.geometry.group_of_inode(number) for number in tops} == set(range(1, 8))
    for number in tops:
        file = volume.create(number, b"file")
        assert volume.geometry.group_of_inode(file) == volume.geometry.group_of_inode(number)
        below = volume.mkdir(number, b"below")
        assert volume.geometry.group_of_inode(below) == volume.geometry.group_of_inode(number)
    sound(volume)


def test_every_inode_is_given_out_once() -> None:
    """All of a small volume, in all groups; then none is left."""
    volume = small(8 * MIB, *GROUPS)
    parent = volume.load(lambda: volume.inode(2))
    free_inodes = volume.allocator.free_inodes
    found = {volume.load(lambda: volume.allocator.new_inode(parent, False)) for _ in range(free_inodes)}
    assert len(found) == free_inodes
    assert min(found) >= volume.geometry.first_inode
    assert max(found) <= volume.geometry.inodes_count
    assert volume.allocator.free_inodes == 0
    for is_dir in (False, True):
        with pytest.raises(NoSpaceError):
            volume.load(functools.partial(volume.allocator.new_inode, parent, is_dir))
    some = max(found)
    volume.load(lambda: volume.allocator.free_inode(some, False))
    with pytest.raises(NeedsCommit):
        volume.load(lambda: volume.allocator.new_inode(parent, False))
    volume.commit()
    assert volume.load(lambda: volume.allocator.new_inode(parent, False)) == some


def test_a_new_inodes_record_is_empty_but_for_another_generation() -> None:
    """Whatever was there before cannot be taken for the new file's."""
    volume = small(8 * MIB, *GROUPS)
    number = volume.create(2, b"one")
    volume.write(number, 0, b"x" * 5000)
    generation = volume.inodes[number].generation
    volume.unlink(2, b"one")
    volume.commit()
    parent = volume.inodes[2]
    assert volume.load(lambda: volume.allocator.new_inode(parent, False)) == number
    block, offset = volume.geometry.inode_place(volume.cache, number)
    record = bytes(volume.cache.get(block)[offset : offset + volume.geometry.inode_bytes])
    expected = bytearray(len(record))
    INODE.write(INODE.kind(*INODE.struct.unpack_from(expected))._replace(generation=generation + 1), expected, 0)
    assert record == bytes(expected)


def test_what_is_no_file_is_not_freed() -> None:
    """Reserved inodes and numbers outside the table are a caller's mistake; a free one is corruption."""
    volume = small(8 * MIB, *GROUPS)
    for number in (0, 2, volume.geometry.inodes_count + 1):
        with pytest.raises(ValueError, match="not one that can be freed"):
            volume.load(functools.partial(volume.allocator.free_inode, number, False))
    with pytest.raises(CorruptionError, match="inode bitmap of group 0"):
        volume.load(lambda: volume.allocator.free_inode(20, False))
    file = volume.create(volume.mkdir(2, b"d"), b"f", stat.S_IFREG)
    group = volume.geometry.group_of_inode(file)
    while volume.allocator.descriptor(group).used_dirs_count:
        volume.load(lambda: volume.allocator._change_descriptor(group, used_dirs_count=0))
    with pytest.raises(CorruptionError, match="a directory to be freed"):
        volume.load(lambda: volume.allocator.free_inode(file, True))


# Against a model.


@settings(max_examples=40)
@given(st.data())
def test_blocks_against_a_model(data: st.DataObject) -> None:
    """F30: what is given out was free, and counts, holds and bits are a set's after any run of operations."""
    volume = small(1 * MIB, "-b", "1024", "-g", "256", "-m", "0")
    base = in_use(volume)
    owned: set[int] = set()
    held: set[int] = set()
    total = volume.geometry.blocks_count - volume.geometry.first_data_block
    for _ in range(data.draw(st.integers(1, 25))):
        step = data.draw(st.sampled_from(("find", "find", "free", "never", "commit", "undo")))
        if step == "commit":
            volume.commit()
            held.clear()
        elif step in ("free", "never"):
            if not owned:
                continue
            block = data.draw(st.sampled_from(sorted(owned)))
            count = 1
            while block + count in owned and count < data.draw(st.integers(1, 30)):
                count += 1
            free(volume, block, count, never_used=step == "never")
            owned -= set(range(block, block + count))
            held |= set(range(block, block + count)) if step == "free" else set()
        else:
            goal, wanted = data.draw(st.integers(0, total + 5)), data.draw(st.integers(1, 400))
            available = set(range(1, total + 1)) - base - owned - held
            try:
                block, count = find(volume, goal, wanted)
            except NeedsCommit:
                assert not available
                assert held
                continue
            except NoSpaceError:
                assert not available
                assert not held
                continue
            run = set(range(block, block + count))
            assert 1 <= count <= wanted
            assert run <= available
            if goal in available:
                assert block == goal
            owned |= run
    assert in_use(volume) == base | owned
    assert volume.allocator.free_blocks == total - len(base | owned)
    assert volume.allocator.held_blocks == len(held)
    counted(volume)


def test_the_superblock_on_the_disk_has_the_counts() -> None:
    """What a commit writes is what the cache says."""
    volume = small(8 * MIB, *GROUPS)
    volume.write(volume.create(2, b"a"), 0, bytes(100_000))
    volume.commit()
    raw = bytes(volume.device.data)[1024:2048]  # type: ignore[attr-defined]
    found = SUPERBLOCK.kind(*SUPERBLOCK.struct.unpack(raw))
    assert found.free_blocks_count == volume.allocator.free_blocks
    assert found.free_inodes_count == volume.allocator.free_inodes
    counted(volume)
