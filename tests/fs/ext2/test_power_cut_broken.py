"""Deliberately broken ext2 runs, each of which the crash states must show: what finds nothing here proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.fs.ext2.crash_kit import check_crashes, random_workload
from tests.fs.ext2.crash_model import CANARY, Workload, base_image, foreign_image
from tests.fs.ext2.test_power_cut import (
    DIRECTORY,
    attributes,
    backed_up,
    buffered,
    crash,
    direct,
    handed_over,
    make,
    replaced,
    shortened,
    side_by_side,
    theirs,
)

from odirect.base.errors import ODirectError
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice
from odirect.cache.metacache import ENTRY, FRESH, LATE, TREE, MetaCache, Snapshot
from odirect.dio import zeroing
from odirect.dio.blockdev import flush
from odirect.fs import base
from odirect.fs.ext2 import commit, entries, grow, node, volume
from odirect.fs.ext2.allocate import Allocator
from odirect.fs.ext2.commit import Committer
from odirect.fs.ext2.format import ENTRY_HEAD, EntryHead
from odirect.fs.file import FileNode

pytestmark = pytest.mark.slow

Breaks = Callable[[pytest.MonkeyPatch], None]


async def _no_flush(device: BlockDevice, *, metadata: bool = False) -> None:
    pass


def without_flushes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "flush", _no_flush)


def without_the_first_flush(patch: pytest.MonkeyPatch) -> None:
    """The one that covers data and new blocks."""
    snapshot = MetaCache.snapshot
    skipped = taken = 0

    def counted(self: MetaCache) -> Snapshot:
        nonlocal taken
        taken += 1
        return snapshot(self)

    async def skipping(device: BlockDevice, *, metadata: bool = False) -> None:
        nonlocal skipped
        if skipped == taken:
            await flush(device, metadata=metadata)
        skipped = taken

    patch.setattr(MetaCache, "snapshot", counted)
    patch.setattr(commit, "flush", skipping)


def _in_order(*order: int) -> Breaks:
    """The images of the phases in another order."""

    def breaks(patch: pytest.MonkeyPatch) -> None:
        snapshot = MetaCache.snapshot

        def mixed(self: MetaCache) -> Snapshot:
            taken = snapshot(self)
            taken.phases[:] = [taken.phases[phase] for phase in order]
            return taken

        patch.setattr(MetaCache, "snapshot", mixed)

    return breaks


entries_before_inodes = _in_order(FRESH, ENTRY, TREE, LATE)


def published_before_the_data(patch: pytest.MonkeyPatch) -> None:
    """Numbers in the inode while the data is on its way."""
    get_blocks = node.Ext2Mapper.get_blocks

    async def early(self: node.Ext2Mapper, request: Any, *arguments: Any) -> Any:
        answer = await get_blocks(self, request, *arguments)
        prepared, self._prepared = self._prepared, []
        for run in prepared:
            with self._node.volume.cache.transaction():
                meta = self._node.meta
                meta.remember(self._node.volume.cache)
                grow.publish(self._node.volume, run, run.count)
                end = (run.file_block + run.count) * self._node.block_bytes
                meta.size = max(meta.size, min(end, request.offset + request.length, self._node.size_bytes))
                self._node.volume.store(meta)
        return answer

    patch.setattr(node.Ext2Mapper, "get_blocks", early)


def freed_blocks_used_at_once(patch: pytest.MonkeyPatch) -> None:
    free_run = Allocator.free_run

    def at_once(self: Allocator, block: int, count: int, *, never_used: bool = False) -> None:
        free_run(self, block, count, never_used=True)

    patch.setattr(Allocator, "free_run", at_once)


def holds_end_too_early(patch: pytest.MonkeyPatch) -> None:
    """What is freed while a commit runs is given out when that ends, not after the next one."""
    take, release = Allocator.take_holds, Allocator.release_holds

    def all_of_them(self: Allocator, holds: Any) -> None:
        release(self, holds)
        release(self, take(self))

    patch.setattr(Allocator, "release_holds", all_of_them)


def nothing_held_back(patch: pytest.MonkeyPatch) -> None:
    """Removals reach the disk along with additions, or before them."""
    patch.setattr(MetaCache, "hold_back", lambda self, block, offset, length: None)


def records_not_held(patch: pytest.MonkeyPatch) -> None:
    """An inode is freed on the disk while names lead to it."""
    patch.setattr(Allocator, "hold_record", lambda self, number: None)


def names_used_again_at_once(patch: pytest.MonkeyPatch) -> None:
    """A removed entry's slot has another entry before the removal is on the disk."""
    patch.setattr(MetaCache, "held_back", lambda self, block, offset: False)


def entries_over_sectors(patch: pytest.MonkeyPatch) -> None:
    """Room over several sectors is used as if blocks could not be torn."""
    patch.setattr(entries, "_sector", lambda volume: volume.geometry.block_bytes)


def names_of_free_entries_kept(patch: pytest.MonkeyPatch) -> None:
    """A free entry is made shorter than the name that it had."""

    def shorter(view: memoryview, offset: int, rec_len: int) -> None:
        head = EntryHead(*ENTRY_HEAD.struct.unpack_from(view, offset))
        ENTRY_HEAD.write(head._replace(rec_len=rec_len), view, offset)

    patch.setattr(entries, "_set_length", shorter)


def new_links_trusted(patch: pytest.MonkeyPatch) -> None:
    """A file loses a name to another one while its new name is not on the disk."""
    patch.setattr(volume.Ext2, "_has_new_link", lambda self, inode: False)


def attributes_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A freed block of attributes is not written, though a record that is held back leads to it."""
    release = volume.Ext2._release_xattr_block

    def forgetting(self: volume.Ext2, inode: Any, block: int) -> None:
        release(self, inode, block)
        self.cache.forget(block)

    patch.setattr(volume.Ext2, "_release_xattr_block", forgetting)


def sync_without_pages(patch: pytest.MonkeyPatch) -> None:
    async def sync(self: FileNode, *, data_only: bool) -> None:
        await self.commit(data_only=data_only)

    patch.setattr(FileNode, "sync", sync)


def acknowledged_too_early(patch: pytest.MonkeyPatch) -> None:
    """O_DSYNC without the commit (F40)."""

    async def nothing(self: FileNode, offset: int, length: int, *, data_only: bool) -> None:
        pass

    patch.setattr(FileNode, "sync_written", nothing)


def commit_without_writing(patch: pytest.MonkeyPatch) -> None:
    """A sync that says that all is well, and does nothing."""

    async def nothing(self: Committer) -> None:
        pass

    patch.setattr(Committer, "commit", nothing)


def ends_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    """The rest of the last block of many small files is what the memory held (F11)."""

    def used(length: int) -> memoryview:
        memory = empty(length)
        memory[:] = bytes([CANARY]) * length
        return memory

    patch.setattr(base, "empty", used)


def edges_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    """The rest of a new block behind a direct write keeps what was there (F11)."""
    patch.setattr(zeroing, "after", lambda *_: 0)


#: What needs luck to be met at random, and a script that meets it.
_SCRIPTS = {
    entries_before_inodes: replaced,
    attributes_forgotten: attributes,
    sync_without_pages: buffered,
    published_before_the_data: side_by_side,
    edges_not_zeroed: direct,
    new_links_trusted: backed_up,
    holds_end_too_early: handed_over,
}


@pytest.mark.parametrize(
    "breaks",
    [
        pytest.param(without_flushes, id="no flushes"),
        pytest.param(without_the_first_flush, id="no flush of the data"),
        pytest.param(_in_order(LATE, ENTRY, TREE, FRESH), id="phases backwards"),
        pytest.param(_in_order(TREE, FRESH, ENTRY, LATE), id="inodes before new blocks"),
        pytest.param(entries_before_inodes, id="entries before inodes"),
        pytest.param(_in_order(FRESH, TREE, LATE, ENTRY), id="removal before addition"),
        pytest.param(published_before_the_data, id="published before the data"),
        pytest.param(freed_blocks_used_at_once, id="freed blocks used before the commit"),
        pytest.param(holds_end_too_early, id="freed blocks used after the wrong commit"),
        pytest.param(nothing_held_back, id="nothing held back"),
        pytest.param(records_not_held, id="records of the deleted not held back"),
        pytest.param(names_used_again_at_once, id="slots of removed entries used at once"),
        pytest.param(attributes_forgotten, id="attributes forgotten"),
        pytest.param(sync_without_pages, id="sync without pages"),
        pytest.param(acknowledged_too_early, id="acknowledged too early"),
        pytest.param(commit_without_writing, id="commits that write nothing"),
        pytest.param(new_links_trusted, id="new links trusted"),
        pytest.param(edges_not_zeroed, id="edges not zeroed"),
        pytest.param(ends_not_zeroed, id="ends not zeroed"),
    ],
)
def test_it_is_found(breaks: Breaks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power cuts of a few workloads show what is broken."""
    breaks(monkeypatch)
    script = _SCRIPTS.get(breaks)
    if script is handed_over:
        with pytest.raises(AssertionError, match="crash at"):
            crash(script, base_image(160 << 10, 1024, "-N", "16", "-m", "0"), tight=True, ways=6)
        return
    if script is not None:
        with pytest.raises(AssertionError, match="crash at"):
            for block_bytes in (1024, 4096):
                crash(script, base_image(2 << 20, block_bytes, "-N", "256"), ways=8)
        return
    # Those of nearly full volumes first: there are few blocks there, and they are used again soon.
    for seed in (*range(3, 200, 5), *range(60)):
        try:
            check_crashes(random_workload(seed), ways=3)
        except (AssertionError, ODirectError):
            return
    pytest.fail("nothing was found in a hundred workloads")


@pytest.mark.parametrize(
    ("breaks", "script", "block_bytes"),
    [(entries_over_sectors, theirs, 4096), (names_of_free_entries_kept, shortened, 1024)],
    ids=["entries over sectors", "names of free entries kept"],
)
def test_it_is_found_in_directories_made_elsewhere(
    breaks: Breaks, script: Callable[[Workload], None], block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last entry of a block has all the room that is left, over several sectors."""
    breaks(monkeypatch)
    with pytest.raises(AssertionError, match="crash at"):
        crash(script, foreign_image(3 << 20, block_bytes, "-N", "256"), ways=30)


def test_a_wrong_model_is_found() -> None:
    """The oracle believes nobody: not the workload either."""
    work = Workload(4, base_image(2 << 20, 1024, "-N", "256"))
    with work.sim:
        item = make(work, b"one")
        make(work, b"two", DIRECTORY)
        work.run(work.write(item, 0, b"a" * 3000))
        work.run(work.end())
    check_crashes(work)
    item.versions[-1] = item.versions[-1]._replace(content=b"a" * 2999 + b"b")
    with pytest.raises(AssertionError, match="that it never had"):
        check_crashes(work)
