"""Whole trees of an ext2 volume at once: names, inodes and the contents of many small files.

One file after the other, a tree costs a seek for each directory, inode and file. Here a level of
directories is read at a time, the inode tables in the order of the device and their records with NumPy,
and the blocks of many files as few large reads, gaps included where passing them by would take longer.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from odirect.base.errors import DirectoryError, UnsupportedError
from odirect.base.layout import Place
from odirect.base.units import align_up
from odirect.block.bio import READ
from odirect.dio.blockdev import transfer
from odirect.fs.base import Attributes, TreeEntry
from odirect.fs.ext2 import directory, format
from odirect.sched.traps import gather, this_scheduler

if TYPE_CHECKING:
    import numpy

    from odirect.fs.ext2.volume import Ext2

# Directories and inodes whose blocks are asked for together; the cache must hold them.
_DIRECTORIES_AT_ONCE = 512
_INODES_AT_ONCE = 16384
# Reading this much that nobody wants is quicker than one request more.
_GAP_BYTES = 64 << 10
_READ_BYTES = 1 << 20
# Indirect blocks that are asked for together.
_LEAF_BYTES = 8 << 20
_WORKERS = 8
_KIND_BITS = 0o170000


async def tree(volume: Ext2, top: int) -> list[TreeEntry]:
    """See `FileSystem.tree`."""
    found: list[TreeEntry] = []
    seen = {top}
    level = [(b"", top)]
    while level:
        below: list[TreeEntry] = []
        for start in range(0, len(level), _DIRECTORIES_AT_ONCE):
            some = level[start : start + _DIRECTORIES_AT_ONCE]
            for names in await _names(volume, some):
                below += await _entries(volume, names)
        found += below
        level = []
        for entry in below:
            number = entry.attributes.inode
            if stat.S_ISDIR(entry.attributes.mode) and number not in seen:
                seen.add(number)
                level.append((entry.path, number))
    return found


async def read_whole(volume: Ext2, inodes: Sequence[int]) -> list[bytes]:
    """See `FileSystem.read_whole`."""
    for number in inodes:
        node = volume.node(number)
        if node is not None:
            await node.pages.write_back(0, max(node.size_bytes, 1))
    if not inodes:
        return []
    with volume.reading():
        sizes, runs = await _runs(volume, inodes)
        return await _read_runs(volume, runs, sizes)


async def with_xattrs(volume: Ext2, inodes: Sequence[int]) -> set[int]:
    """See `FileSystem.with_xattrs`."""
    import numpy

    if not inodes:
        return set()
    found: set[int] = set()
    inode_bytes, start = volume.geometry.inode_bytes, format.GOOD_OLD_INODE_BYTES
    for first in range(0, len(inodes), _INODES_AT_ONCE):
        numbers = numpy.asarray(inodes[first : first + _INODES_AT_ONCE], numpy.int64)
        records = await _records(volume, numbers.tolist())
        having = records["file_acl"] != 0
        if inode_bytes >= start + 4:
            # They may be behind the inode's own fields too, however long those are; odd lengths are others' to judge.
            raw = numpy.frombuffer(records.tobytes(), numpy.uint8).reshape(len(numbers), inode_bytes)
            length = raw[:, start].astype(numpy.int64) | raw[:, start + 1].astype(numpy.int64) << 8
            at = numpy.minimum(start + length, inode_bytes - 4)
            rows = numpy.arange(len(numbers))
            magic = sum(raw[rows, at + byte].astype(numpy.int64) << 8 * byte for byte in range(4))
            having |= (magic == format.XATTR_MAGIC) | (start + length > inode_bytes)
        found.update(numbers[having].tolist())
    return found


# Names and inodes.


async def _names(volume: Ext2, directories: Sequence[tuple[bytes, int]]) -> list[list[tuple[bytes, int]]]:
    """(path, inode) of all that is in these directories, in portions that `_entries` takes at once."""
    cache, geometry = volume.cache, volume.geometry
    await cache.load(
        lambda: cache.get_all(sorted({geometry.inode_place(cache, number)[0] for _, number in directories}))
    )
    blocks: list[int] = []
    for _, number in directories:
        inode = await cache.load(lambda number=number: volume.inode(number))  # type: ignore[misc]
        if inode.is_dir and inode.size <= format.DIRECT_BLOCKS * geometry.block_bytes:
            blocks += [block for block in inode.pointers()[: format.DIRECT_BLOCKS] if _is_possible(volume, block)]
    await cache.read(sorted(set(blocks)))
    portions: list[list[tuple[bytes, int]]] = [[]]
    for path, number in directories:
        inode = await cache.load(lambda number=number: volume.inode(number))  # type: ignore[misc]
        if not inode.is_dir:
            continue
        listed = await cache.load(lambda inode=inode: directory.list_all(cache, volume.map_of(inode), inode))  # type: ignore[misc]
        before = path + b"/" if path else b""
        if len(portions[-1]) + len(listed) > _INODES_AT_ONCE:
            portions.append([])
        portions[-1] += [(before + entry.name, entry.inode) for entry in listed if entry.name not in (b".", b"..")]
    return portions


def _is_possible(volume: Ext2, block: int) -> bool:
    """Whether a number from a directory's inode can be read ahead; whether it is right is found out later."""
    return volume.geometry.first_data_block < block < volume.geometry.blocks_count


async def _entries(volume: Ext2, names: Sequence[tuple[bytes, int]]) -> list[TreeEntry]:
    """The names with what their inodes say."""
    import numpy

    if not names:
        return []
    geometry = volume.geometry
    numbers = [number for _, number in names]
    records = await _records(volume, numbers)
    mode = records["mode"].astype(numpy.int64)
    kind = mode & _KIND_BITS
    is_file = kind == stat.S_IFREG
    size = records["size"].astype(numpy.int64) + numpy.where(is_file, records["size_high"].astype(numpy.int64) << 32, 0)
    first = numpy.frombuffer(records["block"].tobytes(), "<u4").reshape(len(names), -1)[:, 0].astype(numpy.int64)
    columns = (
        mode,
        records["links_count"],
        records["uid"].astype(numpy.int64) | records["uid_high"].astype(numpy.int64) << 16,
        records["gid"].astype(numpy.int64) | records["gid_high"].astype(numpy.int64) << 16,
        size,
        records["blocks"],
        numpy.full(len(names), geometry.block_bytes),
        *_times(records),
    )
    rows = zip(numbers, *[column.tolist() for column in columns], strict=True)
    places = (first * geometry.block_bytes).tolist()
    found = [
        TreeEntry(path, Attributes(*row), place) for (path, _), row, place in zip(names, rows, places, strict=True)
    ]
    # There is more to links and devices than numbers, and an open file knows better than its record.
    odd = ~(is_file | (kind == stat.S_IFDIR)) | (records["links_count"] == 0)
    for index in {*numpy.flatnonzero(odd).tolist(), *volume.open_among(numbers)}:
        found[index] = TreeEntry(names[index][0], await volume.attributes(numbers[index]))
    return found


async def _records(volume: Ext2, numbers: Sequence[int]) -> numpy.ndarray[Any, Any]:
    """The first 128 bytes of these inodes' records, as an array with the fields of `format.Inode`."""
    import numpy

    raw = await _raw_records(volume, numbers)
    return numpy.ndarray((len(numbers),), format.INODE.dtype(volume.geometry.inode_bytes), raw)


async def _raw_records(volume: Ext2, numbers: Sequence[int]) -> numpy.ndarray[Any, Any]:
    import numpy

    cache, geometry = volume.cache, volume.geometry
    inode_bytes = geometry.inode_bytes
    asked = numpy.asarray(numbers, numpy.int64)
    for number in (int(asked.min()), int(asked.max())):
        geometry.check_inode_number(number)
    tables = numpy.array([geometry.inode_table(group) for group in range(geometry.groups)], numpy.int64)
    groups, places = numpy.divmod(asked - 1, geometry.inodes_per_group)
    offsets = tables[groups] * geometry.block_bytes + places * inode_bytes
    blocks, inside = numpy.divmod(offsets, geometry.block_bytes)
    order = numpy.argsort(blocks, kind="stable")
    distinct, begins = numpy.unique(blocks[order], return_index=True)
    raw = numpy.empty((len(numbers), inode_bytes), numpy.uint8)

    def copy() -> None:
        views = cache.get_all(distinct.tolist())
        ends = [*begins[1:].tolist(), len(order)]
        for view, begin, end in zip(views, begins.tolist(), ends, strict=True):
            which = order[begin:end]
            rows = numpy.frombuffer(view, numpy.uint8).reshape(-1, inode_bytes)
            raw[which] = rows[inside[which] // inode_bytes]

    await cache.load(copy)
    return raw.reshape(-1)


def _times(records: numpy.ndarray[Any, Any]) -> list[numpy.ndarray[Any, Any]]:
    """atime, mtime and ctime in nanoseconds of each inode."""
    import numpy

    start, stride = format.GOOD_OLD_INODE_BYTES, records.itemsize
    extra = None
    if stride >= start + format.EXTRA.size:
        raw = numpy.frombuffer(records.tobytes(), numpy.uint8).reshape(len(records), stride)
        behind = raw[:, start : start + format.EXTRA.size].tobytes()
        extra = numpy.frombuffer(behind, format.EXTRA.dtype(format.EXTRA.size))
    columns = []
    for name, more in (("atime", "atime_extra"), ("mtime", "mtime_extra"), ("ctime", "ctime_extra")):
        seconds = records[name].astype(numpy.int32).astype(numpy.int64)
        nanoseconds = numpy.zeros(len(records), numpy.int64)
        if extra is not None:
            word = numpy.where(extra["extra_isize"] >= format.EXTRA.size, extra[more], 0).astype(numpy.int64)
            seconds += (word & 3) << 32
            nanoseconds = word >> 2
        columns.append(seconds * 1_000_000_000 + nanoseconds)
    return columns


# Contents.


class _Runs(NamedTuple):
    """Runs of the device, in its order: which file each is of, its byte in it, its byte on the device, its length."""

    files: list[int]
    offsets: list[int]
    addrs: list[int]
    lengths: list[int]


async def _runs(volume: Ext2, inodes: Sequence[int]) -> tuple[list[int], _Runs]:
    """The files' sizes, and where their bytes are; holes are left out."""
    import numpy

    geometry = volume.geometry
    block_bytes = geometry.block_bytes
    records = await _records(volume, inodes)
    kinds = records["mode"] & _KIND_BITS
    wrong = numpy.flatnonzero((kinds != stat.S_IFREG) | (records["links_count"] == 0)).tolist()
    for index in wrong:
        if volume.node(inodes[index]) is None:
            kind = DirectoryError if int(kinds[index]) == stat.S_IFDIR else UnsupportedError
            raise kind(f"inode {inodes[index]} is no file", path=volume.name)
    sizes = records["size"].astype(numpy.int64) | records["size_high"].astype(numpy.int64) << 32
    pointers = numpy.frombuffer(records["block"].tobytes(), "<u4").reshape(len(inodes), -1)
    small = (sizes <= format.DIRECT_BLOCKS * block_bytes) & ((records["flags"] & format.InodeFlags.EXTENTS) == 0)
    for index in volume.open_among(inodes):
        small[index] = False
        sizes[index] = (await volume.attributes(inodes[index])).size
    # A row for each block that is there, in the order of files.
    middling = (
        ~small & (sizes <= _READ_BYTES) & (sizes <= (format.DIRECT_BLOCKS + geometry.pointers_per_block) * block_bytes)
    )
    middling &= (records["flags"] & format.InodeFlags.EXTENTS) == 0
    middling[volume.open_among(inodes)] = False
    numbers = pointers[:, : format.DIRECT_BLOCKS]
    there = numpy.arange(format.DIRECT_BLOCKS) * block_bytes < sizes[:, None]
    there &= (small | middling)[:, None] & (numbers != 0)
    files, columns = numpy.nonzero(there)
    rows = [_joined(volume, inodes, files, columns, numbers[files, columns])]
    # Those with one indirect block: all these blocks are read at once.
    indirect = numpy.flatnonzero(middling & (pointers[:, format.DIRECT_BLOCKS] != 0))
    if len(indirect):
        numbers = await _leaves(volume, inodes, indirect, pointers[indirect, format.DIRECT_BLOCKS])
        columns = numpy.arange(format.DIRECT_BLOCKS, format.DIRECT_BLOCKS + numbers.shape[1])
        there = (columns * block_bytes < sizes[indirect][:, None]) & (numbers != 0)
        files, places = numpy.nonzero(there)
        rows.append(_joined(volume, inodes, indirect[files], columns[places], numbers[files, places]))
    for index in numpy.flatnonzero(~(small | middling)).tolist():
        rows.append(await _large(volume, inodes[index], index, int(sizes[index])))
    joined = numpy.concatenate(rows, axis=1)
    joined = joined[:, numpy.argsort(joined[2], kind="stable")]
    return sizes.tolist(), _Runs(*joined.tolist())


def _joined(
    volume: Ext2,
    inodes: Sequence[int],
    files: numpy.ndarray[Any, Any],
    columns: numpy.ndarray[Any, Any],
    blocks: numpy.ndarray[Any, Any],
) -> numpy.ndarray[Any, Any]:
    """Rows of runs: block `columns` of file `files` is `blocks` on the device. Neighbours on both are one run."""
    import numpy

    geometry = volume.geometry
    block_bytes = geometry.block_bytes
    bad = geometry.first_wrong(blocks)
    if bad >= 0:
        place = Place(volume.name, f"block {columns[bad]} of inode {inodes[files[bad]]}", 0)
        geometry.check_data_block(int(blocks[bad]), place)
    addrs = blocks.astype(numpy.int64) * block_bytes
    offsets = columns.astype(numpy.int64) * block_bytes
    begins = numpy.ones(len(files), bool)
    begins[1:] = (
        (files[1:] != files[:-1])
        | (offsets[1:] != offsets[:-1] + block_bytes)
        | (addrs[1:] != addrs[:-1] + block_bytes)
    )
    heads = numpy.flatnonzero(begins)
    lengths = numpy.diff(numpy.append(heads, len(files))) * block_bytes
    return numpy.stack([files[heads], offsets[heads], addrs[heads], lengths])


async def _leaves(
    volume: Ext2, inodes: Sequence[int], which: numpy.ndarray[Any, Any], blocks: numpy.ndarray[Any, Any]
) -> numpy.ndarray[Any, Any]:
    """What is in the indirect blocks of these files, a row for each."""
    import numpy

    cache, geometry = volume.cache, volume.geometry
    bad = geometry.first_wrong(blocks)
    if bad >= 0:
        place = Place(volume.name, f"the indirect block of inode {inodes[which[bad]]}", 0)
        geometry.check_data_block(int(blocks[bad]), place)
    found: numpy.ndarray[Any, Any] = numpy.empty((len(blocks), geometry.pointers_per_block), "<u4")
    portion = max(1, _LEAF_BYTES // geometry.block_bytes)

    for start in range(0, len(blocks), portion):
        some = blocks[start : start + portion].tolist()

        def copy(start: int = start, some: list[int] = some) -> None:
            for row, view in enumerate(cache.get_all(some), start):
                found[row] = numpy.frombuffer(view, "<u4")

        await cache.load(copy)
    return found


async def _large(volume: Ext2, number: int, index: int, size: int) -> numpy.ndarray[Any, Any]:
    """The rows of a file that has more than direct blocks."""
    import numpy

    inode = await volume.cache.load(lambda: volume.inode(number))
    rows = []
    for extent in await volume.extents_of(inode, size, 0, size):
        if extent.addr is not None:
            for at in range(0, extent.length, _READ_BYTES):
                rows.append((index, extent.offset + at, extent.addr + at, min(_READ_BYTES, extent.length - at)))
    return numpy.array(rows, numpy.int64).reshape(-1, 4).T


class _Batch(NamedTuple):
    """One read: bytes [first, end) of the device, with runs number `start` to `stop`."""

    first: int
    end: int
    start: int
    stop: int


def _batches(runs: _Runs, unit: int) -> Iterator[_Batch]:
    """Reads that bring all the runs."""
    start = first = end = 0
    number = -1
    for number, (addr, length) in enumerate(zip(runs.addrs, runs.lengths, strict=True)):
        if number == start:
            first = addr - addr % unit
        elif addr > end + _GAP_BYTES or addr + length - first > _READ_BYTES:
            yield _Batch(first, align_up(end, unit), start, number)
            start, first, end = number, addr - addr % unit, 0
        end = max(end, addr + length)
    if number >= 0:
        yield _Batch(first, align_up(end, unit), start, number + 1)


async def _read_runs(volume: Ext2, runs: _Runs, sizes: list[int]) -> list[bytes]:
    """The files' contents."""
    whole: list[bytes | None] = [None] * len(sizes)
    # Files in pieces, or with holes.
    parts: dict[int, bytearray] = {}
    unit = max(volume.device.limits.read_align, volume.device.limits.memory_align)
    turns = _batches(runs, unit)
    files, offsets, addrs, lengths = runs
    device = volume.device

    async def work(memory: memoryview) -> None:
        for first, end, start, stop in turns:
            view = memory[: end - first]
            count = await transfer(device, READ, first, [view], end - first)
            if first + count < max(map(sum, zip(addrs[start:stop], lengths[start:stop], strict=True))):
                place = Place(volume.name, "data", first + count)
                raise place.corrupt("the end of the device", f"{end - first} bytes of files from byte {first} on")
            for number in range(start, stop):
                index, offset, at = files[number], offsets[number], addrs[number] - first
                size = sizes[index]
                if not offset and lengths[number] >= size:
                    whole[index] = bytes(view[at : at + size])
                else:
                    part = parts.setdefault(index, bytearray(size))
                    taken = min(lengths[number], size - offset)
                    part[offset : offset + taken] = view[at : at + taken]

    scheduler = await this_scheduler()
    memory = volume.bulk_memory(_WORKERS * (_READ_BYTES + unit))
    room = len(memory) // _WORKERS
    await gather(
        *[
            scheduler.spawn(work(memory[turn * room : (turn + 1) * room]), "reading many files")
            for turn in range(_WORKERS)
        ]
    )
    return [
        content if content is not None else bytes(parts.get(index) or sizes[index])
        for index, content in enumerate(whole)
    ]
