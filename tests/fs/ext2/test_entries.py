"""Directories change one sector at a time, and never say more than the disk can keep."""

from __future__ import annotations

import errno
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.reading_kit import all_blocks
from tests.fs.ext2.writing_kit import SmallVolume, device_of, fresh_image, indexed, populated_image, small, sound

from odirect.base.errors import CorruptionError, NoSpaceError, PathError
from odirect.base.layout import Place
from odirect.cache.metacache import ENTRY, FRESH, LATE, TREE
from odirect.fs.ext2 import directory, entries
from odirect.fs.ext2.allocate import NeedsCommit
from odirect.fs.ext2.directory import Entry
from odirect.fs.ext2.format import LINK_MAX, ROOT_INODE, FileType, InodeFlags

MIB = 1 << 20
FOUR_KIB = ("-b", "4096", "-m", "0")
ONE_KIB = ("-b", "1024", "-m", "0")


def theirs(names: int, *options: str, sector: int = 512) -> tuple[SmallVolume, int]:
    volume = SmallVolume(device_of(populated_image(names, *options), sector=sector))
    number = volume.find(ROOT_INODE, b"theirs")
    assert number is not None
    volume.load(lambda: volume.inode(number))
    return volume, number


def layout(volume: SmallVolume, number: int) -> list[list[Entry]]:
    """All entries of a directory's blocks, free ones too."""

    def look() -> list[list[Entry]]:
        inode = volume.inode(number)
        place = volume.geometry.place("test", 0)
        return [
            list(directory.entries(volume.geometry, volume.cache.get(block), place))
            for level, block in all_blocks(volume.map_of(inode))
            if not level
        ]

    return volume.load(look)


def add(volume: SmallVolume, number: int, name: bytes, to: int = ROOT_INODE) -> None:
    """Through NeedsCommit, as a file."""
    volume.change(lambda: entries.add_entry(volume, volume.inode(number), name, to, FileType.REGULAR))


def remove(volume: SmallVolume, number: int, name: bytes) -> None:
    def take() -> None:
        inode = volume.inode(number)
        found = directory.find(volume.cache, volume.map_of(inode), inode, name)
        assert found is not None
        entries.remove_entry(volume, inode, found)

    volume.change(take)


def changed_sectors(before: bytes, after: bytes) -> list[int]:
    return [at // 512 for at in range(0, len(before), 512) if before[at : at + 512] != after[at : at + 512]]


def blocks(volume: SmallVolume, number: int) -> dict[int, bytes]:
    return volume.load(
        lambda: {
            block: bytes(volume.cache.get(block))
            for level, block in all_blocks(volume.map_of(volume.inode(number)))
            if not level
        }
    )


# What is made here.


@pytest.mark.parametrize("options", [ONE_KIB, FOUR_KIB, ("-b", "2048", "-O", "none"), ("-b", "1024", "-r", "0")])
def test_no_entry_of_ours_crosses_a_sector(options: tuple[str, ...]) -> None:
    """Names of all lengths, removed and added again: each 512 bytes are a chain of their own."""
    volume = small(8 * MIB, *options)
    number = volume.mkdir(ROOT_INODE, b"ours")
    assert [entry[:3] for entry in layout(volume, number)[0][:3]] == [
        (0, number, 12),
        (12, ROOT_INODE, 500),
        (512, 0, 512),
    ]
    names = [bytes([97 + length % 26]) * length for length in range(3, 256, 7)]
    for name in names:
        volume.create(number, name)
    for name in names[::2]:
        volume.unlink(number, name)
    volume.commit()
    for name in names[::4]:
        volume.create(number, name)
    for block in layout(volume, number):
        for entry in block:
            assert entry.offset // 512 == (entry.offset + entry.rec_len - 1) // 512
    assert sorted(volume.names(number)) == sorted(names[1::2] + names[::4])
    sound(volume)


def test_an_addition_changes_one_sector_of_the_block() -> None:
    """A torn write of the block has the entry or has it not (F43's kind of promise)."""
    volume = small(8 * MIB, *FOUR_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    for at in range(150):
        before = blocks(volume, number)
        add(volume, number, b"entry-%03d" % at * (1 + at % 4))
        after = blocks(volume, number)
        for block, content in before.items():
            assert len(changed_sectors(content, after[block])) <= 1
    assert len(volume.names(number)) == 150


def test_the_directory_grows_by_a_block_of_free_entries() -> None:
    """Size and sectors follow; the next names go there without looking at the full blocks again."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    free_blocks = volume.allocator.free_blocks
    for at in range(14 * 1024):
        if volume.inodes[number].size == 14 * 1024:
            break
        volume.create(number, b"file-%d" % at + b"-" * 40)
    assert volume.inodes[number].sectors == 15 * 2
    assert volume.allocator.free_blocks == free_blocks - 14
    sound(volume)


def test_a_name_is_added_without_looking_at_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that are known to be full are passed by, so that adding many names is not quadratic."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    looked: list[int] = []
    look = entries._look

    def counting(*found: object) -> None:
        looked.append(1)
        look(*found)  # type: ignore[arg-type]

    monkeypatch.setattr(entries, "_look", counting)
    for at in range(1500):
        add(volume, number, b"name-%04d" % at)
    assert volume.inodes[number].size > 30 * 1024
    assert len(looked) < 2 * 1500
    looked.clear()
    add(volume, number, b"n" * 255)
    assert len(looked) <= 2
    # A removal makes room in an early block again.
    remove(volume, number, b"name-0003")
    volume.commit()
    size = volume.inodes[number].size
    add(volume, number, b"name-9999")
    first_block = layout(volume, number)[0]
    assert b"name-9999" in [entry.name for entry in first_block]
    assert volume.inodes[number].size == size


def test_room_of_removed_entries_is_put_together() -> None:
    """Three short entries side by side make room for a long one, in the same sector."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    at = 0
    while volume.inodes[number].size == 1024:
        add(volume, number, b"%03d-45678901" % at)
        at += 1
    full = layout(volume, number)[0]
    victims = [entry.name for entry in full if 530 < entry.offset < 620][:3]
    assert len(victims) == 3
    for name in victims:
        remove(volume, number, name)
    volume.commit()
    size = volume.inodes[number].size
    volume.committer.notes.hints.clear()
    add(volume, number, b"l" * 52)
    long = [entry for entry in layout(volume, number)[0] if entry.name == b"l" * 52]
    assert len(long) == 1
    assert volume.inodes[number].size == size


# The order of writes.


def test_a_removed_name_is_not_made_again_before_a_commit() -> None:
    """Both would be there after a crash between additions and removals."""
    volume = small(8 * MIB, *ONE_KIB)
    add(volume, ROOT_INODE, b"name", 11)
    volume.commit()
    remove(volume, ROOT_INODE, b"name")
    with pytest.raises(NeedsCommit):
        volume.load(lambda: entries.add_entry(volume, volume.inode(2), b"name", 11, FileType.DIRECTORY))
    done = volume.committer.done
    add(volume, ROOT_INODE, b"name", 11)
    assert volume.committer.done == done + 1
    # And the removal is forgotten if it was undone.
    with pytest.raises(NoSpaceError), volume.cache.transaction():
        inode = volume.inode(2)
        found = directory.find(volume.cache, volume.map_of(inode), inode, b"name")
        assert found is not None
        entries.remove_entry(volume, inode, found)
        raise NoSpaceError("as it happens")
    assert volume.committer.notes.removed == set()
    assert volume.find(ROOT_INODE, b"name") == 11


def test_a_removed_entrys_slot_waits_for_the_commit() -> None:
    """Its bytes are shown as they were until then; when it is all the room there is, a commit is asked for."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    while volume.inodes[number].size == 1024:
        add(volume, number, b"%03d-%s" % (len(volume.names(number)), b"x" * 90))
    while True:
        search = entries._Search()
        last = max(blocks(volume, number))
        volume.load(lambda: entries._look(volume, volume.inodes[number], last, 104, search))  # noqa: B023
        if search.room is None:
            break
        add(volume, number, b"%03d-%s" % (len(volume.names(number)), b"x" * 90))
    volume.commit()
    remove(volume, number, volume.names(number)[2])
    size = volume.inodes[number].size
    with pytest.raises(NeedsCommit):
        volume.load(lambda: entries.add_entry(volume, volume.inodes[number], b"y" * 94, ROOT_INODE, FileType.REGULAR))
    add(volume, number, b"y" * 94)
    assert volume.inodes[number].size == size


def test_additions_and_removals_are_of_different_phases() -> None:
    """ENTRY shows the new name beside the old one; LATE shows the old one gone."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    add(volume, number, b"old", 11)
    volume.commit()
    add(volume, number, b"new", 11)
    remove(volume, number, b"old")
    snapshot = volume.cache.snapshot()
    (block,) = blocks(volume, number)
    seen = {
        phase: sorted(
            entry.name
            for entry in directory.entries(volume.geometry, dict(snapshot.phases[phase])[block], PLACE)
            if entry.inode
        )
        for phase in range(4)
        if block in dict(snapshot.phases[phase])
    }
    assert seen == {ENTRY: [b".", b"..", b"new", b"old"], LATE: [b".", b"..", b"new"]}
    table, _ = volume.geometry.inode_place(volume.cache, number)
    assert table in dict(snapshot.phases[TREE])
    volume.cache.committed(snapshot)


PLACE = Place("image", "test", 0)


def test_a_new_block_comes_before_what_leads_to_it() -> None:
    """FRESH, and then the inode's number and size as TREE."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    snapshot = volume.cache.snapshot()
    assert list(dict(snapshot.phases[FRESH])) == list(blocks(volume, number))
    volume.cache.committed(snapshot)


# Blocks of the kernel's and mke2fs's make.


@pytest.mark.parametrize("names", [5, 60, 130, 200])
def test_a_directory_that_others_made(names: int) -> None:
    """Its entries lie anywhere; additions change one sector each, and its last block is used to the end."""
    volume, number = theirs(names, *FOUR_KIB)
    size = volume.inodes[number].size
    before = set(volume.names(number))
    added = 0
    while volume.inodes[number].size == size:
        content = blocks(volume, number)
        volume.create(number, b"added-%03d" % added)
        added += 1
        after = blocks(volume, number)
        # A commit may have put free entries' heads into room where they are not seen.
        assert all(len(changed_sectors(content[block], after[block])) <= 8 for block in content)
    sound(volume)
    assert set(volume.names(number)) == before | {b"added-%03d" % at for at in range(added)}
    used = sum(entry.rec_len for block in layout(volume, number) for entry in block if entry.inode)
    assert used > 0.85 * size
    # Every sector but the one that its last entry was in begins with an entry of its own now.
    assert volume.committer.done <= 2 + names // 40


def test_room_over_several_sectors_is_cut_first() -> None:
    """The heads of free entries go into the room unseen; only after a commit are they linked, in one sector."""
    volume, number = theirs(5, *FOUR_KIB)
    (block,) = blocks(volume, number)
    inode = volume.inodes[number]
    long = [b"%d" % at * 200 for at in range(3)]
    add(volume, number, long[0])
    while True:
        before = blocks(volume, number)[block]
        try:
            volume.load(lambda: entries.add_entry(volume, inode, b"s" * 200, 11, FileType.DIRECTORY))
        except NeedsCommit:
            break
        remove(volume, number, b"s" * 200)
        volume.commit()
        add(volume, number, b"f%d" % len(volume.names(number)) + b"x" * 190)
    assert blocks(volume, number)[block] == before
    listed = volume.names(number)
    volume.commit()
    cut = blocks(volume, number)[block]
    assert changed_sectors(before, cut) == list(range(1, 8))
    assert volume.names(number) == listed
    volume.load(lambda: entries.add_entry(volume, inode, b"s" * 200, 11, FileType.DIRECTORY))
    assert changed_sectors(cut, blocks(volume, number)[block]) == [0, 1]
    assert volume.committer.notes.chains == {}
    volume.load(lambda: setattr(inode, "links", inode.links))
    lengths = [entry.rec_len for entry in layout(volume, number)[0] if not entry.inode]
    assert lengths.count(512) == 6


def test_a_cut_that_was_lost_is_made_again() -> None:
    """What an unfinished note, or other bytes in the room, would say is not trusted."""
    volume, number = theirs(5, *FOUR_KIB)
    inode = volume.inodes[number]
    name = b"s" * 250

    def one() -> None:
        entries.add_entry(volume, inode, name, 11, FileType.DIRECTORY)

    add(volume, number, b"r" * 250)
    with pytest.raises(NeedsCommit):
        volume.load(one)
    volume.commit()
    ((chain, _),) = volume.committer.notes.chains.items()
    volume.load(lambda: volume.cache.change(chain[0], ENTRY).__setitem__(chain[1] + 4, 0xFF))
    with pytest.raises(NeedsCommit):
        volume.load(one)
    volume.commit()
    volume.load(one)
    assert name in volume.names(number)


def test_the_room_may_have_gone_before_it_is_cut() -> None:
    """Somebody else has put an entry in its place meanwhile: the note is passed by."""
    volume, number = theirs(5, *FOUR_KIB)
    inode = volume.inodes[number]
    add(volume, number, b"r" * 250)
    with pytest.raises(NeedsCommit):
        volume.load(lambda: entries.add_entry(volume, inode, b"s" * 250, 11, FileType.DIRECTORY))
    notes = volume.committer.notes
    ((chain, first),) = notes.first.items()
    last = layout(volume, number)[0][-1]
    volume.load(lambda: entries._set_length(volume.cache.change(chain[0], ENTRY), last.offset, 512 - last.offset))
    before = bytes(volume.cache.get(chain[0]))
    volume.load(first)
    assert bytes(volume.cache.get(chain[0])) == before
    assert notes.chains == {}


def test_a_device_of_large_sectors_needs_no_cutting() -> None:
    """Where the device writes the whole block at once, room is used as it is."""
    volume, number = theirs(5, *FOUR_KIB, sector=4096)
    size = volume.inodes[number].size
    while volume.inodes[number].size == size:
        volume.create(number, b"added-%03d" % len(volume.names(number)))
    assert volume.committer.done == 0
    sound(volume)


def test_an_index_is_given_up() -> None:
    """After an addition the directory is a plain list for everybody."""
    volume, number = theirs(200, *ONE_KIB)
    with indexed(volume, number) as inode:
        remove(volume, number, volume.names(number)[0])
        assert inode.flags & InodeFlags.INDEX
        add(volume, number, b"another", 11)
        assert not inode.flags & InodeFlags.INDEX


def test_a_block_of_an_index_is_one_free_entry() -> None:
    """A node of the index reads as free; it is filled from its first sector on."""
    volume = small(8 * MIB, *FOUR_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    (block,) = blocks(volume, number)
    while volume.inodes[number].size == 4096:
        add(volume, number, b"%03d-%s" % (len(volume.names(number)), b"x" * 60))
    last = max(blocks(volume, number))
    assert last != block
    content = bytes([0, 0, 0, 0, 0, 16, 0, 0]) + bytes(range(256)) * 16
    volume.load(lambda: volume.cache.change(last, ENTRY).__setitem__(slice(0, 4096), content[:4096]))
    volume.committer.notes.hints.clear()
    names = set(volume.names(number))
    for at in range(30):
        volume.create(number, b"new-%d-%s" % (at, b"y" * 60))
        names.add(b"new-%d-%s" % (at, b"y" * 60))
    assert set(volume.names(number)) == names
    assert volume.inodes[number].size == 2 * 4096


# The rest.


def test_replacing_leads_elsewhere() -> None:
    """Inode and type change in place, to be written with the additions."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    one, two = volume.create(number, b"one"), volume.create(number, b"two")
    volume.write(two, 0, b"content")
    sound(volume)
    volume.rename(number, b"two", number, b"one")
    assert volume.names(number) == [b"one"]
    assert volume.find(number, b"one") == two
    assert volume.inodes.get(one) is None
    sound(volume)
    inode = volume.inodes[number]
    found = volume.load(lambda: directory.find(volume.cache, volume.map_of(inode), inode, b"one"))
    assert found is not None
    stale = found._replace(inode=99)
    for change in (
        lambda: entries.replace_entry(volume, inode, stale, 12, FileType.REGULAR),
        lambda: entries.remove_entry(volume, inode, stale),
    ):
        with pytest.raises(RuntimeError, match="has changed since"):
            volume.load(change)


def test_a_directory_is_empty_when_nothing_but_dots_is_left() -> None:
    """Removed entries do not count, committed or not."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    inode = volume.inodes[number]
    assert volume.load(lambda: entries.is_empty(volume, inode))
    volume.create(number, b"file")
    assert not volume.load(lambda: entries.is_empty(volume, inode))
    volume.commit()
    volume.unlink(number, b"file")
    assert volume.load(lambda: entries.is_empty(volume, inode))
    volume.unlink(ROOT_INODE, b"ours")
    sound(volume)


def test_too_many_subdirectories() -> None:
    """EMLINK, where a link more cannot be counted."""
    volume = small(8 * MIB, *ONE_KIB)
    inode = volume.load(lambda: volume.inode(ROOT_INODE))
    inode.links = LINK_MAX + 1
    with pytest.raises(PathError) as caught:
        volume.load(lambda: entries.add_entry(volume, inode, b"one more", 12, FileType.DIRECTORY))
    assert caught.value.errno == errno.EMLINK
    volume.load(lambda: entries.add_entry(volume, inode, b"a file", 12, FileType.REGULAR))


@pytest.mark.parametrize("name", [b"", b"a/b", b"a\0b", b"x" * 256])
def test_what_is_no_name(name: bytes) -> None:
    """A caller's mistake."""
    volume = small(8 * MIB, *ONE_KIB)
    inode = volume.load(lambda: volume.inode(ROOT_INODE))
    with pytest.raises(ValueError, match="cannot be the name"):
        volume.load(lambda: entries.add_entry(volume, inode, name, 12, FileType.REGULAR))


@pytest.mark.parametrize("rec_len", [0, 4, 10, 14, 4096, 0xFFFC])
def test_an_entry_that_cannot_be_believed(rec_len: int) -> None:
    """No endless walk, no entry put into the dark."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    (block,) = blocks(volume, number)
    volume.load(lambda: volume.cache.change(block, ENTRY).__setitem__(slice(16, 18), rec_len.to_bytes(2, "little")))
    with pytest.raises(CorruptionError, match=f"directory block {block} of inode {number} at byte {block * 1024 + 12}"):
        add(volume, number, b"x")


def test_a_directory_with_a_hole() -> None:
    """Not one of ours: refused."""
    volume = small(8 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    volume.inodes[number].size += 1024
    with pytest.raises(CorruptionError, match="a hole at block 1"):
        add(volume, number, b"x" * 255)
        add(volume, number, b"y" * 255)
        add(volume, number, b"z" * 255)


def test_growing_takes_nothing_that_was_promised() -> None:
    """Delayed data has its blocks; the directory gets none of them."""
    volume = small(1 * MIB, *ONE_KIB)
    number = volume.mkdir(ROOT_INODE, b"ours")
    volume.allocator.reserve(volume.allocator.free_blocks)
    with pytest.raises(NoSpaceError):
        for at in range(100):
            add(volume, number, b"name-%d" % at)
    free_blocks = volume.allocator.free_blocks
    assert volume.inodes[number].size == 1024
    assert free_blocks == volume.allocator.reserved


@settings(max_examples=30)
@given(st.data())
def test_a_directory_against_a_set(data: st.DataObject) -> None:
    """Names come, go and are undone in any order; what is listed is what the set has, and e2fsck agrees."""
    made_here = data.draw(st.booleans())
    if made_here:
        volume = small(8 * MIB, *ONE_KIB)
        number = volume.mkdir(ROOT_INODE, b"ours")
    else:
        volume, number = theirs(60, *ONE_KIB)
    names = set(volume.names(number))
    lengths = st.sampled_from([1, 2, 9, 30, 100, 255])
    for step in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(("add", "add", "add", "remove", "again", "undo", "commit")))
        if what == "add":
            name = (b"%d" % step).ljust(data.draw(lengths), b"n")
            volume.create(number, name)
            names.add(name)
        elif what in ("remove", "again") and names:
            name = data.draw(st.sampled_from(sorted(names)))
            volume.unlink(number, name)
            names.discard(name)
            if what == "again":
                volume.create(number, name)
                names.add(name)
        elif what == "undo":
            with pytest.raises(NoSpaceError):
                volume.load(functools.partial(_add_and_fail, volume, number, b"u" * data.draw(lengths)))
        elif what == "commit":
            volume.commit()
        assert set(volume.names(number)) == names
    sound(volume)


def _add_and_fail(volume: SmallVolume, number: int, name: bytes) -> None:
    try:
        entries.add_entry(volume, volume.inode(number), name, 11, FileType.REGULAR)
    except NeedsCommit:
        pass
    raise NoSpaceError("as it happens")


def test_the_image_of_mke2fs_is_not_ours_to_judge() -> None:
    """The images of these tests are sound before anything is done to them."""
    sound(small(8 * MIB, *FOUR_KIB))
    sound(SmallVolume(device_of(fresh_image(1 * MIB, *ONE_KIB))))
    sound(theirs(200, *FOUR_KIB)[0])
