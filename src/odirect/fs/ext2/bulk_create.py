"""Many small files at once: their data as a few large writes, then their inodes, by NumPy, and names.

The blocks of a batch are allocated in one piece where there is one, the data is written there, and only
then are the inodes made and named, all in one change. So a crash shows whole files or none of them,
and while one batch is on its way to the device the names of the one before are made.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from odirect.base.errors import DeviceError
from odirect.base.units import MIB, align_up
from odirect.block.bio import WRITE
from odirect.cache.metacache import FRESH, TREE
from odirect.dio.blockdev import transfer
from odirect.fs.base import Making, NewFile, NewFiles
from odirect.fs.ext2 import format, grow
from odirect.fs.ext2.allocate import NeedsCommit
from odirect.fs.ext2.inode import Ext2Inode
from odirect.sched.traps import gather, joined, this_scheduler

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.fs.ext2.geometry import Geometry
    from odirect.fs.ext2.volume import Ext2
    from odirect.sched.scheduler import Task

_BATCH_FILES = 256
_BATCH_BYTES = 8 << 20
_GENERATION_AT = format.INODE.offset_of("generation")


def most_bytes(geometry: Geometry) -> int:
    """The size up to which files can be made this way: the inode and one indirect block name all blocks."""
    return min(MIB, (format.DIRECT_BLOCKS + geometry.pointers_per_block) * geometry.block_bytes)


async def create_whole(volume: Ext2, files: Sequence[NewFile]) -> list[int]:
    """See `FileSystem.create_whole`."""
    numbers: list[int] = []
    under_way: Making | None = None
    try:
        for some in _batches(files, volume.block_bytes):
            making = await begin(volume, NewFiles.pack(some, volume.block_bytes))
            before, under_way = under_way, making
            if before is not None:
                numbers += await before.finish()
        if under_way is not None:
            last, under_way = under_way, None
            numbers += await last.finish()
    except GeneratorExit:
        raise  # Thrown away: nobody waits for anything any more.
    except BaseException:
        if under_way is not None:
            await under_way.give_up()
        raise
    return numbers


async def begin(volume: Ext2, files: NewFiles) -> Making:
    """See `FileSystem.begin_whole`."""
    scheduler = await this_scheduler()
    runs = await volume.change(lambda: _allocate(volume, files))
    writing = scheduler.spawn(_write(volume, files.memory, runs), "writing many files")
    scheduler.commit()
    return _Batch(volume, files, runs, writing)


class _Batch(Making):
    """Files, and the blocks that were allocated for them, in runs.

    Those for the data come first, in its order, then one for each file that needs an indirect block.
    """

    def __init__(self, volume: Ext2, files: NewFiles, runs: list[tuple[int, int]], writing: Task[None]) -> None:
        self.files = files
        self.runs = runs
        #: The directories that files are made in, in order, and the rows that are theirs.
        self.directories = _by_directory(files)
        self._volume = volume
        self._writing = writing

    async def finish(self) -> list[int]:
        try:
            await self._volume.cache.load(lambda: _look_ahead(self._volume, self))
            await joined(self._writing)
            return await self._volume.change(lambda: _make(self._volume, self))
        except GeneratorExit:
            raise  # Thrown away: nobody waits for anything any more.
        except BaseException:
            await self.give_up()
            raise

    async def give_up(self) -> None:
        try:
            await joined(self._writing)
        except DeviceError:
            pass  # What made the caller give up is the one to be told.
        # Nothing leads to the blocks, and nothing will.
        self._volume.give_back(self.runs)


def _batches(files: Sequence[NewFile], block_bytes: int) -> Iterator[Sequence[NewFile]]:
    start = size = 0
    for number, file in enumerate(files):
        more = align_up(len(file.content), block_bytes)
        if number > start and (number - start == _BATCH_FILES or size + more > _BATCH_BYTES):
            yield files[start:number]
            start, size = number, 0
        size += more
    if start < len(files):
        yield files[start:]


def _allocate(volume: Ext2, files: NewFiles) -> list[tuple[int, int]]:
    """Blocks for the files: (first, count) of each run. Plain, for changes."""
    data = len(files.memory) // volume.block_bytes
    needed = data + int((files.sizes > format.DIRECT_BLOCKS * volume.block_bytes).sum())
    if volume.available_blocks() < needed:
        raise volume.no_space()
    goal = grow.goal_of(volume, volume.inode(int(files.directories[0])))
    runs: list[tuple[int, int]] = []
    while needed:
        run = volume.allocator.find_run(goal, needed)
        runs.append(run)
        needed -= run[1]
        goal = run[0] + run[1]
    return runs


def _look_ahead(volume: Ext2, batch: _Batch) -> None:
    """Ask for the blocks that making the files will need, while their data is on its way. Plain; BlockMiss."""
    cache, geometry, allocator = volume.cache, volume.geometry, volume.allocator
    wanted = {number: len(rows) for number, rows in batch.directories}
    cache.get_all(list({geometry.inode_place(cache, number)[0] for number in wanted}))
    groups: dict[int, int] = {}
    blocks: list[int] = []
    for number, count in wanted.items():
        inode = volume.inode(number)
        group = geometry.group_of_inode(number)
        groups[group] = groups.get(group, 0) + count
        if inode.is_dir:
            pointers = inode.pointers()[: format.DIRECT_BLOCKS]
            blocks += [block for block in pointers if geometry.first_data_block < block < geometry.blocks_count]
    cache.get_all([*blocks, *[allocator.descriptor(group).inode_bitmap for group in groups]])
    tables: set[int] = set()
    for group, count in groups.items():
        first = group * geometry.inodes_per_group + 1
        tables.update(_tables(geometry, _array([first + index for index in allocator.free_inodes_in(group, count)])))
    cache.get_all(sorted(tables))


def _by_directory(files: NewFiles) -> list[tuple[int, list[int]]]:
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(files.directories.tolist()):
        rows.setdefault(number, []).append(row)
    return list(rows.items())


def _array(numbers: Sequence[int]) -> NDArray[numpy.int64]:
    import numpy

    return numpy.array(numbers, numpy.int64)


def _tables(geometry: Geometry, numbers: NDArray[numpy.int64]) -> list[int]:
    """The blocks that the records of these inodes are in, in order."""
    return sorted(set(geometry.inode_places(numbers)[0].tolist()))


async def _write(volume: Ext2, memory: memoryview, runs: Sequence[tuple[int, int]]) -> None:
    """Bring the data to the device."""
    scheduler = await this_scheduler()
    at = 0
    tasks = []
    for first, count in runs:
        size = min(count * volume.block_bytes, len(memory) - at)
        if not size:
            break  # What follows is for indirect blocks.
        view = memory[at : at + size]
        tasks.append(scheduler.spawn(transfer(volume.device, WRITE, first * volume.block_bytes, [view], size)))
        at += size
    await gather(*tasks)


def _make(volume: Ext2, batch: _Batch) -> list[int]:
    """Make and name the files of a batch, a directory at a time. Plain, for changes."""
    import numpy

    files = batch.files
    directories = [(number, rows, [files.names[row] for row in rows]) for number, rows in batch.directories]
    now_ns = volume.now_ns()
    numbers = numpy.zeros(len(files.names), numpy.int64)
    for directory, rows, names in directories:
        numbers[rows] = volume.new_files(directory, names)
    # Missed before the names are made, which takes longest.
    volume.cache.get_all(_tables(volume.geometry, numbers))
    needs: NeedsCommit | None = None
    for directory, rows, names in directories:
        try:
            volume.name_files(directory, names, numbers[rows].tolist(), now_ns)
        except NeedsCommit as need:
            needs = need  # All is undone; but first the other directories say what they need, for the same commit.
    if needs is not None:
        raise needs
    _store(volume, numbers, _records(volume, batch, now_ns))
    made: list[int] = numbers.tolist()
    return made


def _records(volume: Ext2, batch: _Batch, now_ns: int) -> NDArray[numpy.uint8]:
    """The inodes' records, but for their generations. Plain, for changes: makes indirect blocks."""
    import numpy

    geometry, files = volume.geometry, batch.files
    inode_bytes, block_bytes = geometry.inode_bytes, geometry.block_bytes
    for owners in (files.uids, files.gids):
        if owners.min() < 0 or owners.max() > 0xFFFFFFFF:
            raise ValueError("an owner of a file does not fit 32 bits")
    counts = -(-files.sizes // block_bytes)
    pointers, indirect = _pointers(volume, batch, counts)
    raw = numpy.zeros((len(files.names), inode_bytes), numpy.uint8)
    records = raw.view(format.INODE.dtype(inode_bytes))[:, 0]
    records["mode"] = stat.S_IFREG | files.modes & 0o7777
    records["uid"], records["uid_high"] = files.uids & 0xFFFF, files.uids >> 16
    records["gid"], records["gid_high"] = files.gids & 0xFFFF, files.gids >> 16
    records["size"] = files.sizes
    records["links_count"] = 1
    records["blocks"] = (counts + indirect) * (block_bytes // format.SECTOR_BYTES)
    at = format.INODE.offset_of("block")
    raw[:, at : at + pointers.shape[1] * 4] = pointers.view(numpy.uint8)
    # As an inode of ours stores its times, whatever its record has room for.
    pattern = Ext2Inode.create(geometry, 0, stat.S_IFREG, now_ns)
    now = pattern.on_disk(now_ns)
    times = {"atime": pattern.all_on_disk(files.atimes), "mtime": pattern.all_on_disk(files.mtimes)}
    records["ctime"] = now[0]
    for name, columns in times.items():
        records[name] = columns[:, 0]
    if pattern.extra_isize:
        start, size = format.GOOD_OLD_INODE_BYTES, format.EXTRA.size
        extra = numpy.zeros(len(files.names), format.EXTRA.dtype(size))
        extra["extra_isize"] = pattern.extra_isize
        extra["crtime"], extra["crtime_extra"] = now
        extra["ctime_extra"] = now[1]
        for name, columns in times.items():
            extra[f"{name}_extra"] = columns[:, 1]
        raw[:, start : start + size] = extra.view(numpy.uint8).reshape(len(files.names), size)
    return raw


def _pointers(
    volume: Ext2, batch: _Batch, counts: NDArray[numpy.int64]
) -> tuple[NDArray[numpy.uint32], NDArray[numpy.bool_]]:
    """The block numbers that each inode has, and whether one is that of an indirect block, which is made."""
    import numpy

    runs = [numpy.arange(first, first + count, dtype=numpy.int64) for first, count in batch.runs]
    blocks = numpy.concatenate([numpy.zeros(0, numpy.int64), *runs]).astype("<u4")
    starts = numpy.cumsum(counts) - counts
    pointers = numpy.zeros((len(counts), format.DIRECT_BLOCKS + 1), "<u4")
    for column in range(format.DIRECT_BLOCKS):
        rows = numpy.flatnonzero(counts > column)
        pointers[rows, column] = blocks[starts[rows] + column]
    indirect = counts > format.DIRECT_BLOCKS
    numbers = blocks[int(counts.sum()) :].tolist()
    for row, number in zip(numpy.flatnonzero(indirect).tolist(), numbers, strict=True):
        named = blocks[starts[row] + format.DIRECT_BLOCKS : starts[row] + counts[row]]
        volume.cache.create(number, FRESH)[: 4 * len(named)] = named.tobytes()
        pointers[row, format.DIRECT_BLOCKS] = number
    return pointers, indirect


def _store(volume: Ext2, numbers: NDArray[numpy.int64], raw: NDArray[numpy.uint8]) -> None:
    """Put the records into the inode tables, each with the generation that follows the one that is there."""
    import numpy

    cache, geometry = volume.cache, volume.geometry
    blocks, inside = geometry.inode_places(numbers)
    order = numpy.argsort(blocks, kind="stable")
    distinct, begins = numpy.unique(blocks[order], return_index=True)
    cache.get_all(distinct.tolist())
    ends = [*begins[1:].tolist(), len(order)]
    at = _GENERATION_AT
    for block, begin, end in zip(distinct.tolist(), begins.tolist(), ends, strict=True):
        which = order[begin:end]
        rows = numpy.frombuffer(cache.change(block, TREE), numpy.uint8).reshape(-1, geometry.inode_bytes)
        places = inside[which] // geometry.inode_bytes
        generations = rows[places, at : at + 4].view("<u4") + numpy.uint32(1)
        rows[places] = raw[which]
        rows[places, at : at + 4] = generations.view(numpy.uint8)
