"""Bringing changed metadata to the device, in an order that a crash at any moment leaves sound.

ext2 has no journal. A commit takes a snapshot of all changed blocks at one instant and writes it in four
phases, each flushed before the next:

    FRESH   blocks that nothing on the disk leads to yet. The flush after it covers all data as well,
            so that numbers of blocks never come before what is in them (F11)
    TREE    inodes and indirect blocks: an inode before the entry that leads to it
    ENTRY   entries that were added: an addition before a removal, so that a renamed file has a name
    LATE    entries that were removed, inodes that were freed, bitmaps, counts: what is freed after
            everything that led to it is gone

Whatever is freed is not used again before the commit that frees it has ended (`Allocator`). Where a write
or a flush fails nobody knows what the device has: the volume takes no more changes, and every later
commit says why (F41).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from odirect.base.errors import DeviceError, NoSpaceError, ODirectError, StickySyncError
from odirect.cache.metacache import FRESH
from odirect.dio.blockdev import flush
from odirect.fs.ext2.allocate import NeedsCommit
from odirect.fs.ext2.entries import EntryNotes
from odirect.sched.traps import joined, this_scheduler, wait

if TYPE_CHECKING:
    from odirect.block.device import BlockDevice
    from odirect.cache.metacache import MetaCache, Snapshot
    from odirect.fs.ext2.allocate import Allocator, Holds
    from odirect.sched.scheduler import Task

T = TypeVar("T")

_SECOND = 1_000_000_000
_MOST_SECONDS = (1 << 32) - 1
#: A change that asks for more commits than this one after another will never be content. Many names at once
#: may need one for each block of a directory that was made elsewhere.
_MOST_COMMITS = 300


class Volume(Protocol):
    """What a commit needs of a volume."""

    device: BlockDevice
    cache: MetaCache
    allocator: Allocator
    name: str
    #: Those who read blocks of files that they have not open.
    readers: int

    @property
    def now_ns(self) -> Callable[[], int]:
        """The time of day, in nanoseconds since 1970."""
        ...


class Committer:
    """The commits of one volume. error: what made the volume read-only, None while all is well."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.error: ODirectError | None = None
        #: What `entries` remembers, which begins and ends with commits.
        self.notes = EntryNotes()
        #: How many commits have ended well.
        self.done = 0
        self._running: Task[None] | None = None
        self._next: Task[None] | None = None

    async def commit(self) -> None:
        """Make everything durable that has been changed, and all data that the device has completed.

        One at a time: who comes while one runs shares the next one with all others who do. Cancelling a
        caller stops no commit. Raises the device's error, from then on StickySyncError.
        """
        scheduler = await this_scheduler()
        if self._next is None:
            self._next = scheduler.spawn(self._turn(self._running), "a commit")
        await joined(self._next)

    async def perform(self, change: Callable[[], T]) -> T:
        """What the plain function `change` gives back under `cache.load`; commits where it asks for that.

        Raises what it raises, and what `commit` raises; NoSpaceError if it is never content.
        """
        for _ in range(_MOST_COMMITS):
            try:
                return await self._volume.cache.load(change)
            except NeedsCommit as need:
                why = need
            await self.commit()
        raise NoSpaceError(f"no room after {_MOST_COMMITS} commits: {why}", path=self._volume.name)

    def check(self) -> None:
        """Raise StickySyncError if a commit has failed."""
        if self.error is not None:
            raise StickySyncError(
                f"a commit has failed before, what was changed since may be lost: {self.error}",
                errno=self.error.errno,
                path=self._volume.name,
            ) from self.error

    async def _turn(self, before: Task[None] | None) -> None:
        if before is not None:
            await wait(before.ended)
        self._running, self._next = self._next, None
        try:
            self.check()
            await self._prepare()
            await self._write()
        finally:
            self._running = None

    async def _prepare(self) -> None:
        """Do what was waiting for a commit to come."""
        cache = self._volume.cache
        while self.notes.first:
            _, first = self.notes.first.popitem()
            try:
                await cache.load(first)
            except ODirectError:
                # It is in the way of the change that asked for it, and met there again.
                continue

    async def _write(self) -> None:
        volume, notes = self._volume, self.notes
        if volume.cache.dirty_blocks:
            seconds = max(0, min(volume.now_ns() // _SECOND, _MOST_SECONDS))
            with volume.cache.transaction():
                volume.allocator.change_superblock(wtime=seconds)
        # No await between these: they are of one instant.
        snapshot = volume.cache.snapshot()
        holds = volume.allocator.take_holds()
        notes.snapshot_taken()
        try:
            for phase, images in enumerate(snapshot.phases):
                if images:
                    await volume.cache.write_images(images)
                if images or phase == FRESH:
                    await flush(volume.device, metadata=True)
        except ODirectError as error:
            self._failed(snapshot, holds, error)
            raise
        except BaseException as error:
            # The task was ended from outside, in the middle: as good as a device that failed.
            self._failed(snapshot, holds, DeviceError(f"a commit was interrupted: {error!r}", path=volume.name))
            raise
        volume.cache.committed(snapshot)
        if volume.readers:
            # Somebody reads blocks of files that he has not open: they wait for the next commit.
            volume.allocator.return_holds(holds)
        else:
            volume.allocator.release_holds(holds)
        notes.committed()
        self.done += 1

    def _failed(self, snapshot: Snapshot, holds: Holds, error: ODirectError) -> None:
        self.error = error
        self._volume.cache.commit_failed(snapshot)
        self._volume.allocator.return_holds(holds)
