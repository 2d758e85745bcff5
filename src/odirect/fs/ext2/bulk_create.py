"""Many small files at once: their data as a few large writes, then their inodes, by NumPy, and names.

The blocks of a batch are allocated in one piece where there is one, the data is written there, and only
then are the inodes made and named, all in one change. So a crash shows whole files or none of them,
and while one batch is on its way to the device the names of the one before are made.
"""

from __future__ import annotations

import collections
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from odirect.base.errors import DeviceError
from odirect.base.units import MIB, align_up
from odirect.block.bio import WRITE
from odirect.block.buffers import empty
from odirect.cache.metacache import FRESH, TREE
from odirect.dio.blockdev import transfer
from odirect.fs.base import NewFile
from odirect.fs.ext2 import format, grow
from odirect.fs.ext2.allocate import NeedsCommit
from odirect.fs.ext2.inode import Ext2Inode
from odirect.sched.traps import gather, joined, this_scheduler

if TYPE_CHECKING:
    import numpy

    from odirect.fs.ext2.geometry import Geometry
    from odirect.fs.ext2.volume import Ext2
    from odirect.sched.scheduler import Task

_BATCH_FILES = 256
_BATCH_BYTES = 8 << 20


class _Batch(NamedTuple):
    """Files, the memory with their data (each from a block on), and the blocks that were allocated, in runs.

    Those for the data come first, in its order, then one for each file that needs an indirect block.
    """

    files: Sequence[NewFile]
    memory: memoryview
    runs: list[tuple[int, int]]


async def create_whole(volume: Ext2, files: Sequence[NewFile]) -> list[int]:
    """See `FileSystem.create_whole`."""
    numbers: list[int] = []
    scheduler = await this_scheduler()
    under_way: tuple[_Batch, Task[None]] | None = None
    try:
        for some in _batches(files, volume.block_bytes):
            batch = await _allocate(volume, some)
            writing = scheduler.spawn(_write(volume, batch), "writing many files")
            before, under_way = under_way, (batch, writing)
            scheduler.commit()
            if before is not None:
                numbers += await _publish(volume, *before)
            await volume.cache.load(lambda some=some: _look_ahead(volume, some))  # type: ignore[misc]
        if under_way is not None:
            last, under_way = under_way, None
            numbers += await _publish(volume, *last)
    except GeneratorExit:
        raise  # Thrown away: nobody waits for anything any more.
    except BaseException:
        if under_way is not None:
            batch, writing = under_way
            try:
                await joined(writing)
            except DeviceError:
                pass  # The first error is the one to be told.
            _give_back(volume, batch)
        raise
    return numbers


def most_bytes(geometry: Geometry) -> int:
    """The size up to which files can be made this way: the inode and one indirect block name all blocks."""
    return min(MIB, (format.DIRECT_BLOCKS + geometry.pointers_per_block) * geometry.block_bytes)


def _batches(files: Sequence[NewFile], block_bytes: int) -> list[Sequence[NewFile]]:
    batches: list[Sequence[NewFile]] = []
    start = size = 0
    for number, file in enumerate(files):
        more = align_up(len(file.content), block_bytes)
        if number > start and (number - start == _BATCH_FILES or size + more > _BATCH_BYTES):
            batches.append(files[start:number])
            start, size = number, 0
        size += more
    if start < len(files):
        batches.append(files[start:])
    return batches


async def _allocate(volume: Ext2, files: Sequence[NewFile]) -> _Batch:
    """A batch with its data in one piece of memory, and blocks for it."""
    block_bytes = volume.block_bytes
    starts = [0]
    for file in files:
        starts.append(starts[-1] + align_up(len(file.content), block_bytes))
    indirect = sum(len(file.content) > format.DIRECT_BLOCKS * block_bytes for file in files)
    needed = starts[-1] // block_bytes + indirect

    def allocate() -> list[tuple[int, int]]:
        if volume.available_blocks() < needed:
            raise volume.no_space()
        parent = volume.inode(files[0].directory)
        goal = grow.goal_of(volume, parent)
        runs: list[tuple[int, int]] = []
        left = needed
        while left:
            run = volume.allocator.find_run(goal, left)
            runs.append(run)
            left -= run[1]
            goal = run[0] + run[1]
        return runs

    runs = await volume.change(allocate)
    memory = empty(starts[-1])  # Zeroes: what is behind a file's end in its last block.
    for file, at in zip(files, starts, strict=False):
        memory[at : at + len(file.content)] = file.content
    return _Batch(files, memory, runs)


def _look_ahead(volume: Ext2, files: Sequence[NewFile]) -> None:
    """Ask for the blocks that making the files will need, while their data is on its way. Plain; BlockMiss."""
    cache, geometry, allocator = volume.cache, volume.geometry, volume.allocator
    wanted = collections.Counter(file.directory for file in files)
    cache.get_all(list({geometry.inode_place(cache, number)[0] for number in wanted}))
    groups: collections.Counter[int] = collections.Counter()
    blocks: list[int] = []
    for number, count in wanted.items():
        inode = volume.inode(number)
        groups[geometry.group_of_inode(number)] += count
        if inode.is_dir:
            pointers = inode.pointers()[: format.DIRECT_BLOCKS]
            blocks += [block for block in pointers if geometry.first_data_block < block < geometry.blocks_count]
    cache.get_all([*blocks, *[allocator.descriptor(group).inode_bitmap for group in groups]])
    tables: set[int] = set()
    for group, count in groups.items():
        first = group * geometry.inodes_per_group + 1
        tables.update(geometry.inode_place(cache, first + index)[0] for index in allocator.free_inodes_in(group, count))
    cache.get_all(sorted(tables))


async def _write(volume: Ext2, batch: _Batch) -> None:
    """Bring the data to the device."""
    scheduler = await this_scheduler()
    at = 0
    tasks = []
    for first, count in batch.runs:
        size = min(count * volume.block_bytes, len(batch.memory) - at)
        if not size:
            break  # What follows is for indirect blocks.
        view = batch.memory[at : at + size]
        tasks.append(scheduler.spawn(transfer(volume.device, WRITE, first * volume.block_bytes, [view], size)))
        at += size
    await gather(*tasks)


async def _publish(volume: Ext2, batch: _Batch, writing: Task[None]) -> list[int]:
    """The numbers of the batch's files, which have their names now."""
    try:
        await joined(writing)
        return await volume.change(lambda: _make(volume, batch))
    except GeneratorExit:
        raise
    except BaseException:
        _give_back(volume, batch)
        raise


def _make(volume: Ext2, batch: _Batch) -> list[int]:
    """Make and name the files of a batch, a directory at a time. Plain, for changes."""
    import numpy

    by_directory: dict[int, list[int]] = {}
    for index, file in enumerate(batch.files):
        by_directory.setdefault(file.directory, []).append(index)
    names = {directory: [batch.files[index].name for index in indices] for directory, indices in by_directory.items()}
    now_ns = volume.now_ns()
    numbers = numpy.zeros(len(batch.files), numpy.int64)
    for directory, indices in by_directory.items():
        numbers[indices] = volume.new_files(directory, names[directory])
    # Missed before the names are made, which takes longest.
    places = [volume.geometry.inode_place(volume.cache, number)[0] for number in numbers.tolist()]
    volume.cache.get_all(list(dict.fromkeys(places)))
    needs: NeedsCommit | None = None
    for directory, indices in by_directory.items():
        try:
            volume.name_files(directory, names[directory], numbers[indices].tolist(), now_ns)
        except NeedsCommit as need:
            needs = need  # All is undone; but first the other directories say what they need, for the same commit.
    if needs is not None:
        raise needs
    _store(volume, numbers, _records(volume, batch, now_ns))
    made: list[int] = numbers.tolist()
    return made


def _records(volume: Ext2, batch: _Batch, now_ns: int) -> numpy.ndarray[Any, Any]:
    """The inodes' records, but for their generations. Plain, for changes: makes indirect blocks."""
    import numpy

    geometry, files = volume.geometry, batch.files
    inode_bytes, block_bytes = geometry.inode_bytes, geometry.block_bytes
    owners = numpy.array([(file.uid, file.gid) for file in files], numpy.int64)
    if owners.min() < 0 or owners.max() > 0xFFFFFFFF:
        raise ValueError("an owner of a file does not fit 32 bits")
    sizes = numpy.array([len(file.content) for file in files], numpy.int64)
    counts = -(-sizes // block_bytes)
    pointers, indirect = _pointers(volume, batch, counts)
    raw = numpy.zeros((len(files), inode_bytes), numpy.uint8)
    records = raw.view(format.INODE.dtype(inode_bytes))[:, 0]
    records["mode"] = [stat.S_IFREG | stat.S_IMODE(file.mode) for file in files]
    records["uid"], records["uid_high"] = owners[:, 0] & 0xFFFF, owners[:, 0] >> 16
    records["gid"], records["gid_high"] = owners[:, 1] & 0xFFFF, owners[:, 1] >> 16
    records["size"] = sizes
    records["links_count"] = 1
    records["blocks"] = (counts + indirect) * (block_bytes // format.SECTOR_BYTES)
    at = format.INODE.offset_of("block")
    raw[:, at : at + pointers.shape[1] * 4] = pointers.view(numpy.uint8)
    # As an inode of ours stores its times, whatever its record has room for.
    pattern = Ext2Inode.create(geometry, 0, stat.S_IFREG, now_ns)
    times = {
        "atime": [pattern.on_disk(file.atime_ns) for file in files],
        "mtime": [pattern.on_disk(file.mtime_ns) for file in files],
        "ctime": [pattern.on_disk(now_ns)] * len(files),
    }
    extra = None
    if pattern.extra_isize:
        start, size = format.GOOD_OLD_INODE_BYTES, format.EXTRA.size
        extra = numpy.zeros(len(files), format.EXTRA.dtype(size))
        extra["extra_isize"] = pattern.extra_isize
        extra["crtime"], extra["crtime_extra"] = pattern.on_disk(now_ns)
    for name, values in times.items():
        columns = numpy.array(values, numpy.uint32)
        records[name] = columns[:, 0]
        if extra is not None:
            extra[f"{name}_extra"] = columns[:, 1]
    if extra is not None:
        raw[:, start : start + size] = extra.view(numpy.uint8).reshape(len(files), size)
    return raw


def _pointers(
    volume: Ext2, batch: _Batch, counts: numpy.ndarray[Any, Any]
) -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]:
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


def _store(volume: Ext2, numbers: numpy.ndarray[Any, Any], raw: numpy.ndarray[Any, Any]) -> None:
    """Put the records into the inode tables, each with the generation that follows the one that is there."""
    import numpy

    cache, geometry = volume.cache, volume.geometry
    inode_bytes, at = geometry.inode_bytes, format.INODE.offset_of("generation")
    groups, places = numpy.divmod(numbers - 1, geometry.inodes_per_group)
    tables = numpy.array([geometry.inode_table(group) for group in range(geometry.groups)], numpy.int64)
    offsets = tables[groups] * geometry.block_bytes + places * inode_bytes
    blocks, inside = numpy.divmod(offsets, geometry.block_bytes)
    order = numpy.argsort(offsets)
    distinct, begins = numpy.unique(blocks[order], return_index=True)
    cache.get_all(distinct.tolist())
    ends = [*begins[1:].tolist(), len(order)]
    for block, begin, end in zip(distinct.tolist(), begins.tolist(), ends, strict=True):
        which = order[begin:end]
        rows = numpy.frombuffer(cache.change(block, TREE), numpy.uint8).reshape(-1, inode_bytes)
        places = inside[which] // inode_bytes
        generations = rows[places, at : at + 4].view("<u4") + numpy.uint32(1)
        rows[places] = raw[which]
        rows[places, at : at + 4] = generations.view(numpy.uint8)


def _give_back(volume: Ext2, batch: _Batch) -> None:
    """Nothing leads to the blocks, and nothing will."""
    volume.give_back(batch.runs)
