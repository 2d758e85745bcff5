"""An open ext2 file: its node, and the mapper of its direct requests.

Blocks are allocated before the I/O and become the file's when it has ended well: until then nothing on
disk or in the cached metadata speaks of them, so a failed or interrupted write shows nothing of what was
there before (F11), and gives its blocks back.
"""

from __future__ import annotations

import collections
import errno
from typing import TYPE_CHECKING

from odirect.base.errors import NoSpaceError, ODirectError
from odirect.base.units import align_up
from odirect.block.device import BlockDevice
from odirect.cache.metacache import BlockMiss
from odirect.dio.engine import DirectRequest
from odirect.dio.mapping import BOUNDARY, NEW, Extent, ExtentKind, Fallback, Mapper
from odirect.dio.outcome import Reason
from odirect.fs.ext2 import grow
from odirect.fs.ext2.blockmap import BlockMap, Run, tree_indices
from odirect.fs.ext2.format import DIRECT_BLOCKS
from odirect.fs.ext2.inode import Ext2Inode
from odirect.fs.file import FileNode

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.fs.ext2.volume import Ext2

#: What one block may need besides itself: an indirect block of each level.
_MOST_INDIRECT = 3
#: Leaves of block numbers that are read at once for who goes through a file in order.
_MOST_LEAVES_AHEAD = 128


class Ext2Mapper:
    """Maps one request. reserved: what it allocates was promised to write-back before."""

    def __init__(self, node: Ext2Node, *, reserved: bool) -> None:
        self._node = node
        self._reserved = reserved
        self._prepared: list[grow.Prepared] = []

    async def get_blocks(self, request: DirectRequest, offset: int, length: int, create: bool) -> Extent | Fallback:
        """See `dio.mapping.Mapper`."""
        node = self._node
        block_bytes = node.block_bytes
        first = offset // block_bytes
        wanted = (offset + length - 1) // block_bytes - first + 1
        run = await node.look(first, wanted)
        at, size = first * block_bytes, run.count * block_bytes
        if run.block:
            flags = BOUNDARY if run.boundary else 0
            return Extent(ExtentKind.MAPPED, at, size, node.home.device, run.block * block_bytes, flags)
        if not create:
            return Extent(ExtentKind.HOLE, at, size)
        try:
            prepared = await node.volume.change(lambda: self._prepare(first, run.count))
        except NoSpaceError as error:
            if error.errno == errno.ENOSPC and offset > request.offset:
                return Fallback(Reason.NO_SPACE)
            raise
        self._prepared.append(prepared)
        size = prepared.count * block_bytes
        return Extent(ExtentKind.MAPPED, at, size, node.home.device, prepared.block * block_bytes, NEW)

    def _prepare(self, first: int, count: int) -> grow.Prepared:
        volume = self._node.volume
        if not self._reserved:
            # What is promised to others is not ours.
            path = volume.map_of(self._node.meta).path(first)
            indirect = len(tree_indices(volume.geometry, first)) - len(path)
            count = min(count, volume.available_blocks() - indirect)
            if count <= 0:
                raise volume.no_space()
        return grow.prepare(volume, self._node.meta, first, count)

    def end_io(self, request: DirectRequest, offset: int, transferred: int, private: object) -> None:
        """The data is on the device: now the file may say where (G17)."""
        node = self._node
        end = offset + transferred
        if not self._reserved:
            node.grown(end)
        size = min(end, node.size_bytes)
        if not self._prepared and size <= node.meta.size:
            return
        prepared, self._prepared = self._prepared, []
        volume = node.volume
        with volume.cache.transaction():
            node.meta.remember(volume.cache)
            for run in prepared:
                done = align_up(max(0, end - run.file_block * node.block_bytes), node.block_bytes)
                grow.publish(volume, run, min(run.count, done // node.block_bytes))
            node.meta.size = max(node.meta.size, size)
            volume.store(node.meta)
            volume.note_large(node.meta)

    def failed(self, request: DirectRequest) -> None:
        """Nothing counts: the blocks are given back."""
        prepared, self._prepared = self._prepared, []
        with self._node.volume.cache.transaction():
            for run in prepared:
                grow.abandon(self._node.volume, run)


class Ext2Node(FileNode):
    """A regular file that is open."""

    def __init__(self, volume: Ext2, meta: Ext2Inode) -> None:
        super().__init__(volume, volume.block_bytes, meta.size)
        self.volume = volume
        self.meta = meta
        self.max_bytes = volume.max_file_bytes
        #: Whether `meta` has times that its record has not.
        self.stale = False
        # The leaf of block numbers that a reader in order misses next, and how many were read at once.
        self._next_leaf = 0
        self._leaves_ahead = 1
        self._blocks: BlockMap | None = None
        self._flat: tuple[BlockMap, int, int, NDArray[numpy.int64], NDArray[numpy.int64]] | None = None

    def mapper(self, *, reserved: bool = False) -> Mapper:
        """See `FileNode`."""
        return Ext2Mapper(self, reserved=reserved)

    async def look(self, first: int, wanted: int) -> Run:
        """The run of the file that begins with block `first`."""
        blocks = self.volume.map_of(self.meta)
        try:
            return blocks.lookup(first, wanted)
        except BlockMiss:
            pass
        # Who goes through the file in order misses leaf after leaf: more and more of them are read at once.
        pointers = self.volume.geometry.pointers_per_block
        leaf = (first - DIRECT_BLOCKS) // pointers
        if not self._next_leaf - self._leaves_ahead <= leaf < self._next_leaf:  # Else they are on their way.
            self._leaves_ahead = min(4 * self._leaves_ahead, _MOST_LEAVES_AHEAD) if leaf == self._next_leaf else 1
            self._next_leaf = leaf + self._leaves_ahead
        if self._leaves_ahead > 1:
            size_blocks = -(-self.size_bytes // self.block_bytes)
            last = min(first + self._leaves_ahead * pointers, size_blocks) - 1
            try:
                await self.volume.cache.load(lambda: collections.deque(blocks.runs(first, last), maxlen=0))
            except ODirectError:
                pass  # Something is wrong with what is ahead: it is told when that is asked for.
        return await self.volume.cache.load(lambda: blocks.lookup(first, wanted))

    async def is_mapped(self, offset: int, length: int) -> bool:
        """See `FileNode`."""
        return not await self.volume.cache.load(lambda: self._missing(offset, length))

    def is_mapped_now(self, offset: int, length: int) -> bool:
        """See `FileNode`."""
        try:
            return not self._missing(offset, length)
        except BlockMiss:
            return False

    def place(self, op: int, offset: int, length: int) -> int:
        """See `FileNode`."""
        blocks = self._blocks
        if blocks is not None and self.lock.idle and not self.pages.is_cached(offset, length):
            addr = blocks.place(offset, length)
            if addr >= 0:
                return addr
        return super().place(op, offset, length)

    def known_place(self, offset: int, length: int) -> int:
        """See `FileNode`."""
        blocks = self._blocks
        if blocks is None:
            # An inode that is open is not forgotten, nor is its map.
            blocks = self._blocks = self.volume.map_of(self.meta)
        addr = blocks.place(offset, length)
        if addr >= 0:
            return addr
        first, inside = divmod(offset, self.block_bytes)
        try:
            run = blocks.lookup(first, -(-(inside + length) // self.block_bytes))
        except BlockMiss:
            return -1
        if not run.block or run.count * self.block_bytes < inside + length:
            return -1
        return run.block * self.block_bytes + inside

    async def places(self, offsets: NDArray[numpy.int64], length: int) -> NDArray[numpy.int64]:
        """See `FileNode`."""
        import numpy

        if not self.size_bytes or not len(offsets):
            return numpy.full(len(offsets), -1, numpy.int64)
        starts, addrs = await self.volume.cache.load(self._flat_map)
        inside = (offsets >= 0) & (offsets < self.size_bytes)
        which = numpy.searchsorted(starts, numpy.where(inside, offsets, 0), "right") - 1
        addr = addrs[which]
        whole = inside & (addr > 0) & (offsets + length <= starts[which + 1])
        return numpy.where(whole, addr + offsets - starts[which], -1)

    def _flat_map(self) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """(byte of the file where each run begins, and the end; byte of the device, 0 for a hole). Plain; BlockMiss."""
        import numpy

        blocks = self.volume.map_of(self.meta)
        if self._flat is None or self._flat[0] is not blocks or self._flat[1:3] != (blocks.version, self.size_bytes):
            last = (self.size_bytes - 1) // self.block_bytes
            runs = [(run.file_block, run.block) for run in blocks.runs(0, last)]
            table = numpy.array([*runs, (last + 1, 0)], numpy.int64) * self.block_bytes
            self._flat = blocks, blocks.version, self.size_bytes, table[:, 0].copy(), table[:, 1].copy()
        return self._flat[3], self._flat[4]

    async def is_hole(self, offset: int) -> bool:
        """See `FileNode`."""
        return not (await self.look(offset // self.block_bytes, 1)).block

    def reserve(self, offset: int, length: int) -> int:
        """See `cache.pagecache.Backing`: the blocks of the range that are missing, and indirect ones for them."""
        try:
            missing = self._missing(offset, length)
        except BlockMiss:
            missing = align_up(offset + length, self.block_bytes) // self.block_bytes - offset // self.block_bytes
        if not missing:
            return 0
        pointers = self.volume.geometry.pointers_per_block
        units = missing + _MOST_INDIRECT + missing // pointers
        if units > self.volume.available_blocks():
            raise self.volume.no_space()
        self.volume.allocator.reserve(units)
        return units

    def release(self, units: int) -> None:
        """See `cache.pagecache.Backing`."""
        self.volume.allocator.unreserve(units)

    def forget_blocks(self, device: BlockDevice, addr: int, length: int) -> None:
        """See `dio.engine.Inode`."""
        self.volume.cache.forget(addr // self.block_bytes, length // self.block_bytes)

    def touch(self) -> None:
        """See `FileNode`. The record follows with the next commit."""
        self.meta.mtime_ns = self.meta.ctime_ns = self.volume.now_ns()
        self.stale = True

    async def resize(self, size: int) -> None:
        """See `FileNode`."""
        meta, volume = self.meta, self.volume
        first = align_up(size, self.block_bytes) // self.block_bytes

        shrinks = size < meta.size or self.cut_short

        def change() -> bool:
            meta.remember(volume.cache)
            meta.size = size
            more = grow.free_from(volume, meta, first) if shrinks else False
            volume.store(meta)
            volume.note_large(meta)
            return more

        while await volume.change(change):
            await volume.commit()

    async def unmap(self, offset: int, length: int) -> None:
        """See `FileNode`."""
        meta, volume = self.meta, self.volume

        def change() -> bool:
            meta.remember(volume.cache)
            more = grow.punch(volume, meta, offset // self.block_bytes, length // self.block_bytes)
            volume.store(meta)
            # What is being read from these blocks may soon be another file's.
            self.pages.invalidate(offset, length)
            return more

        while await volume.change(change):
            await volume.commit()

    async def commit(self, *, data_only: bool) -> None:
        """See `FileNode`."""
        self.settle()
        await self.volume.commit(times=not data_only)

    async def make_room(self) -> None:
        """See `FileNode`."""
        await self.pages.write_back(0, max(self.size_bytes, 1))
        await self.volume.commit()

    def settle(self) -> None:
        """The record's size is what users see, once nothing is in the page cache alone."""
        if self.meta.size < self.size_bytes and not self.pages.dirty_bytes:
            with self.volume.cache.transaction():
                self.meta.remember(self.volume.cache)
                self.meta.size = self.size_bytes
                self.volume.store(self.meta)
                self.volume.note_large(self.meta)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """See `VolumeFile`."""
        return await self.volume.extents_of(self.meta, self.size_bytes, offset, length)

    async def let_go(self) -> None:
        """See `FileNode`."""
        self.handles -= 1
        if not self.handles:
            await self.volume.last_handle_closed(self)

    def _missing(self, offset: int, length: int) -> int:
        """How many blocks of the range have no place. Plain; BlockMiss."""
        blocks = self.volume.map_of(self.meta)
        block, last = offset // self.block_bytes, (offset + length - 1) // self.block_bytes
        missing = 0
        while block <= last:
            run = blocks.lookup(block, last - block + 1)
            if not run.block:
                missing += run.count
            block += run.count
        return missing
