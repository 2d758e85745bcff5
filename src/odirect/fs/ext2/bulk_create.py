"""Many small files at once: their data as a few large writes, then their inodes and names.

The blocks of a batch are allocated in one piece where there is one, the data is written there, and only
then are the inodes made and named, all in one change. So a crash shows whole files or none of them,
and while one batch is on its way to the device the names of the one before are made.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from odirect.base.errors import DeviceError
from odirect.base.units import align_up
from odirect.block.bio import WRITE
from odirect.block.buffers import empty
from odirect.dio.blockdev import transfer
from odirect.fs.base import NewFile
from odirect.fs.ext2 import format, grow
from odirect.sched.traps import gather, joined, this_scheduler

if TYPE_CHECKING:
    from odirect.fs.ext2.volume import Ext2
    from odirect.sched.scheduler import Task

_BATCH_FILES = 256
_BATCH_BYTES = 8 << 20


class _Batch(NamedTuple):
    """Files, the memory with their data (each from a block on), and the blocks that it goes to."""

    files: Sequence[NewFile]
    memory: memoryview
    blocks: list[int]
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


def is_small(volume: Ext2, size: int) -> bool:
    """Whether a file of `size` bytes can be made this way: its blocks are all named by the inode."""
    return size <= format.DIRECT_BLOCKS * volume.block_bytes


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
    needed = starts[-1] // block_bytes

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
    return _Batch(files, memory, [block for first, count in runs for block in range(first, first + count)], runs)


async def _write(volume: Ext2, batch: _Batch) -> None:
    """Bring the data to the device."""
    scheduler = await this_scheduler()
    at = 0
    tasks = []
    for first, count in batch.runs:
        size = count * volume.block_bytes
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
    numbers = [0] * len(batch.files)
    starts = [0]
    for file in batch.files:
        starts.append(starts[-1] + -(-len(file.content) // volume.block_bytes))
    by_directory: dict[int, list[int]] = {}
    for index, file in enumerate(batch.files):
        by_directory.setdefault(file.directory, []).append(index)
    for directory, indices in by_directory.items():
        names = [batch.files[index].name for index in indices]
        for index, inode in zip(indices, volume.new_files(directory, names), strict=True):
            file = batch.files[index]
            blocks = batch.blocks[starts[index] : starts[index + 1]]
            inode.block[: 4 * len(blocks)] = struct.pack(f"<{len(blocks)}I", *blocks)
            inode.mode = stat.S_IFREG | stat.S_IMODE(file.mode)
            inode.uid = file.uid
            inode.gid = file.gid
            inode.size = len(file.content)
            inode.sectors = len(blocks) * (volume.block_bytes // format.SECTOR_BYTES)
            inode.atime_ns, inode.mtime_ns = file.atime_ns, file.mtime_ns
            volume.store(inode)
            numbers[index] = inode.number
    return numbers


def _give_back(volume: Ext2, batch: _Batch) -> None:
    """Nothing leads to the blocks, and nothing will."""
    volume.give_back(batch.runs)
