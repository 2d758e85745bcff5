"""A walk of a whole ext2 volume that changes nothing: what e2fsck would find, as a list.

Superblock and group descriptors come first; where these cannot be believed, nothing else can be judged.
Then every inode with all blocks it leads to (`check_inodes`), every directory (`check_names`), the bitmaps
and counts of what is free against both, and the copies of the superblock and of the descriptors.

Nothing on the disk makes it raise or go on without end: what is wrong is a `Finding`. Memory is a bit for
each block, some 15 bytes for each inode, 4 bytes for each block of a directory, and one batch of blocks.

Limitations: a journal's content is not looked at, and times are not judged. Names in an index are hashed in
Python: some 30 microseconds each. Source: the documentation of ext2's layout; e2fsck(8) for what counts as an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from odirect.base.errors import CorruptionError, UnsupportedError
from odirect.fs.base import Finding
from odirect.fs.ext2.check_inodes import InodeWalk
from odirect.fs.ext2.check_names import NameWalk
from odirect.fs.ext2.checking import BATCH_BYTES, Bits, Reader, Report, ranges
from odirect.fs.ext2.format import (
    GROUP_DESCRIPTOR,
    MAGIC,
    REV_DYNAMIC,
    SUPERBLOCK,
    SUPERBLOCK_ADDR,
    Compat,
    FileType,
    GroupDescriptor,
    ReadOnlyCompat,
    State,
    Superblock,
)
from odirect.fs.ext2.geometry import Geometry, read_geometry

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.block.device import BlockDevice

#: Called with what is being done, how many of it are done, and how many there are.
Progress = Callable[[str, int, int], None]

#: How many copies of the descriptors are compared: where every group has one, that would never end.
_MOST_COPIES = 64
#: Features that change nothing that is judged here, or that are.
_JUDGED = (
    ReadOnlyCompat.SPARSE_SUPER
    | ReadOnlyCompat.LARGE_FILE
    | ReadOnlyCompat.HUGE_FILE
    | ReadOnlyCompat.DIR_NLINK
    | ReadOnlyCompat.EXTRA_ISIZE
)
#: Flags of a group whose inodes or blocks were never used; only checksums of groups make them mean something.
_UNUSED_FLAGS = 0x3
#: Fields of the superblock that no copy has otherwise.
_SAME_IN_COPIES = (
    "magic",
    "inodes_count",
    "blocks_count",
    "first_data_block",
    "log_block_size",
    "blocks_per_group",
    "inodes_per_group",
    "uuid",
)


class Checkable(Protocol):
    """What `check` needs of a volume. Its changes must have been written to the device."""

    @property
    def device(self) -> BlockDevice:
        """Where the volume is."""
        ...

    @property
    def name(self) -> str:
        """The volume's, for messages."""
        ...


async def check(volume: Checkable, progress: Progress | None = None) -> list[Finding]:
    """All that is wrong with the volume, as its device has it; an empty list if nothing is.

    Nothing may change the volume meanwhile. Raises DeviceError where the device cannot be read.
    """
    return await check_device(volume.device, name=volume.name, progress=progress)


async def check_device(device: BlockDevice, *, name: str, progress: Progress | None = None) -> list[Finding]:
    """What `check` finds of the volume on `device`, which need not be one that could be opened."""
    report = Report()
    if device.size_bytes < SUPERBLOCK_ADDR + SUPERBLOCK.size:
        report.add("the device", None, f"{device.size_bytes} bytes", "room for a superblock")
        return report.finish()
    data = await Reader(device, 1024).bytes_at(SUPERBLOCK_ADDR, SUPERBLOCK.size)
    try:
        geometry = read_geometry(data, name=name, device_bytes=device.size_bytes)
    except (CorruptionError, UnsupportedError) as error:
        report.add_error("superblock", SUPERBLOCK_ADDR, error)
        return report.finish()
    walk = _Walk(geometry, Reader(device, geometry.block_bytes), report, progress)
    await walk.run()
    return report.finish()


class _Walk:
    """One check of one volume."""

    def __init__(self, geometry: Geometry, reader: Reader, report: Report, progress: Progress | None) -> None:
        self._geometry = geometry
        self._reader = reader
        self._report = report
        self._progress = progress
        self._fixed = Bits(geometry.blocks_count)
        self._descriptors: list[GroupDescriptor] = []

    async def run(self) -> None:
        """Go through all of it."""
        geometry, report = self._geometry, self._report
        believable = self._superblock()
        self._descriptors = await self._read_descriptors(geometry.descriptor_blocks.start)
        if not self._places() or not believable:
            return
        tables = [descriptor.inode_table for descriptor in self._descriptors]
        inodes = InodeWalk(geometry, self._reader, report, self._fixed, tables)
        await inodes.walk(self._told("inodes"))
        await inodes.name_sharers()
        names = NameWalk(geometry, self._reader, report, inodes)
        await names.walk(self._told("directories"))
        await self._bitmaps(inodes)
        await self._copies()

    def _told(self, what: str) -> Callable[[int, int], None] | None:
        progress = self._progress
        if progress is None:
            return None
        return lambda done, total: progress(what, done, total)

    # -- the superblock and the descriptors

    def _superblock(self) -> bool:
        """What `read_geometry` takes and is wrong all the same; False where nothing else can be judged."""
        geometry = self._geometry
        found = geometry.superblock
        wrong = self._wrong_in_superblock
        believable = True
        refusal = geometry.ro_compat & ~int(_JUDGED)
        if refusal:
            wrong(f"read-only compatible features {refusal:#x}", "none whose structures are not known here")
            believable = False
        if geometry.blocks_per_group % 8 or geometry.inodes_per_group % 8:
            sizes = f"groups of {geometry.blocks_per_group} blocks and {geometry.inodes_per_group} inodes"
            wrong(sizes, "multiples of 8")
            believable = False
        if found.clusters_per_group != found.blocks_per_group:
            wrong(f"clusters_per_group {found.clusters_per_group}", found.blocks_per_group)
        if found.r_blocks_count > found.blocks_count // 2:
            wrong(f"r_blocks_count {found.r_blocks_count}", f"at most {found.blocks_count // 2}")
        if found.rev_level >= REV_DYNAMIC and not any(found.uuid):
            wrong("no uuid", "one")
        if found.reserved_gdt_blocks and not geometry.compat & Compat.RESIZE_INODE:
            wrong(f"reserved_gdt_blocks {found.reserved_gdt_blocks}", "0: the feature resize_inode is off")
        if found.state & State.ERRORS:
            wrong("errors that were noted before", "none")
        if found.last_orphan:
            wrong(f"inode {found.last_orphan}, deleted while open", "none: e2fsck or a mount finishes that")
        journal = (found.journal_inum, found.journal_dev, any(found.journal_uuid))
        if any(journal) and not geometry.compat & Compat.HAS_JOURNAL:
            wrong(f"a journal (inode {found.journal_inum}, device {found.journal_dev:#x}, or its uuid)", "none")
        if not geometry.sparse_super and geometry.compat & Compat.RESIZE_INODE:
            wrong("resize_inode without sparse_super", "both or none")
        if found.rev_level < REV_DYNAMIC and (geometry.compat or geometry.incompat or geometry.ro_compat):
            wrong("features in revision 0", "revision 1")
        if geometry.inode_bytes > 128:
            for field, value in (
                ("min_extra_isize", found.min_extra_isize),
                ("want_extra_isize", found.want_extra_isize),
            ):
                if value > geometry.inode_bytes - 128 or value % 4:
                    wrong(f"{field} {value}", f"at most {geometry.inode_bytes - 128}, a multiple of 4")
        return believable

    def _wrong_in_superblock(self, found: object, expected: object) -> None:
        self._report.add("superblock", SUPERBLOCK_ADDR, found, expected)

    async def _read_descriptors(self, first_block: int) -> list[GroupDescriptor]:
        geometry = self._geometry
        data = await self._reader.run(first_block, len(geometry.descriptor_blocks))
        used = data[: geometry.groups * GROUP_DESCRIPTOR.size]
        return [GroupDescriptor(*fields) for fields in GROUP_DESCRIPTOR.struct.iter_unpack(used)]

    def _places(self) -> bool:
        """Note the blocks that are never a file's; False where a descriptor does not say where these are."""
        geometry = self._geometry
        believable = True
        if geometry.first_data_block:
            self._fixed.add_range(0, geometry.first_data_block)
        for group, descriptor in enumerate(self._descriptors):
            first = geometry.first_block_of_group(group)
            end = first + geometry.blocks_in_group(group)
            start = first + geometry.super_blocks(group)
            self._fixed.add_range(first, min(start, end))
            if descriptor.flags & _UNUSED_FLAGS and not geometry.ro_compat & ReadOnlyCompat.GDT_CSUM:
                self._wrong_in_group(group, f"flags {descriptor.flags:#x}", "0 or 4: its bitmaps are there")
            taken = [
                ("block_bitmap", descriptor.block_bitmap, 1),
                ("inode_bitmap", descriptor.inode_bitmap, 1),
                ("inode_table", descriptor.inode_table, geometry.table_blocks),
            ]
            for field, block, length in taken:
                if not start <= block <= end - length:
                    self._wrong_in_group(group, f"{field} {block}", f"{length} blocks from {start} to {end - 1}")
                    believable = False
                elif self._fixed.part(block, length).any():
                    self._wrong_in_group(group, f"{field} {block}", "a place of its own")
                    believable = False
                else:
                    self._fixed.add_range(block, block + length)
        return believable

    def _wrong_in_group(self, group: int, found: object, expected: object) -> None:
        block, offset = self._geometry.descriptor_place(group)
        addr = block * self._geometry.block_bytes + offset
        self._report.add(f"descriptor of group {group}", addr, found, expected)

    # -- what is free

    async def _bitmaps(self, inodes: InodeWalk) -> None:
        """The bitmaps, and the counts in the descriptors and the superblock, against what is in use."""
        import numpy

        geometry = self._geometry
        free_blocks = free_inodes = 0
        per_batch = max(1, BATCH_BYTES // geometry.block_bytes // 2)
        for start in range(0, geometry.groups, per_batch):
            part = range(start, min(start + per_batch, geometry.groups))
            numbers = [self._descriptors[group].block_bitmap for group in part]
            numbers += [self._descriptors[group].inode_bitmap for group in part]
            read = await self._reader.blocks(numbers)
            for group in part:
                descriptor = self._descriptors[group]
                first, length = geometry.first_block_of_group(group), geometry.blocks_in_group(group)
                used = self._fixed.part(first, length) | inodes.used.part(first, length)
                self._compare("block", group, descriptor.block_bitmap, read[descriptor.block_bitmap], used, first)
                first_inode = group * geometry.inodes_per_group + 1
                live = inodes.inodes.part(first_inode, geometry.inodes_per_group)
                self._compare("inode", group, descriptor.inode_bitmap, read[descriptor.inode_bitmap], live, first_inode)
                kinds = inodes.kinds[first_inode : first_inode + geometry.inodes_per_group]
                free = (length - int(used.sum()), geometry.inodes_per_group - int(live.sum()))
                dirs = int(numpy.count_nonzero(kinds == FileType.DIRECTORY))
                for field, value, expected in (
                    ("free_blocks_count", descriptor.free_blocks_count, free[0]),
                    ("free_inodes_count", descriptor.free_inodes_count, free[1]),
                    ("used_dirs_count", descriptor.used_dirs_count, dirs),
                ):
                    if value != expected:
                        self._wrong_in_group(group, f"{field} {value}", expected)
                free_blocks += free[0]
                free_inodes += free[1]
            if self._progress is not None:
                self._progress("bitmaps", part.stop, geometry.groups)
        found = geometry.superblock
        if found.free_blocks_count != free_blocks:
            self._wrong_in_superblock(f"free_blocks_count {found.free_blocks_count}", free_blocks)
        if found.free_inodes_count != free_inodes:
            self._wrong_in_superblock(f"free_inodes_count {found.free_inodes_count}", free_inodes)

    def _compare(
        self, what: str, group: int, block: int, data: memoryview, used: NDArray[numpy.uint8], first: int
    ) -> None:
        """One bitmap against `used`; bit 0 stands for number `first`."""
        import numpy

        title = f"{what} bitmap of group {group}"
        addr = block * self._geometry.block_bytes
        bits = numpy.unpackbits(numpy.frombuffer(data, numpy.uint8), bitorder="little")
        marked = bits[: len(used)]
        for wrong, found, expected in (
            ((used > marked).nonzero()[0], "marked as free", "used"),
            ((marked > used).nonzero()[0], "marked as used", "free: nothing leads there"),
        ):
            if len(wrong):
                where = addr + int(wrong[0]) // 8
                shown = ranges((wrong[:256] + first).tolist())
                more = f" ({len(wrong)} in all)" if len(wrong) > 1 else ""
                self._report.add(title, where, f"{what} {shown} {found}{more}", expected)
        if not bits[len(used) :].all():
            self._report.add(title, addr + len(used) // 8, "zeroes behind its end", "ones: nothing is there")

    # -- the copies

    async def _copies(self) -> None:
        """The copies of the superblock and the descriptors say the same of what does not change."""
        geometry = self._geometry
        compared = 0
        for group in range(1, geometry.groups):
            if not geometry.has_super(group):
                continue
            block = geometry.first_block_of_group(group)
            data = await self._reader.run(block, 1)
            copy = Superblock(*SUPERBLOCK.struct.unpack_from(data, 0))
            title = f"copy of the superblock in group {group}"
            addr = block * geometry.block_bytes
            # The kernel makes revision 1 of revision 0 without touching the copies.
            fields = _SAME_IN_COPIES + (("inode_size", "first_ino") if copy.rev_level else ())
            for field in fields:
                found, expected = getattr(copy, field), getattr(geometry.superblock, field)
                if found != expected:
                    self._report.add(title, addr, f"{field} {found!r}", repr(expected))
            if copy.magic == MAGIC and copy.block_group_nr not in (group, 0):
                self._report.add(title, addr, f"block_group_nr {copy.block_group_nr}", group)
            compared += 1
            if compared > _MOST_COPIES:
                continue
            for index, copied in enumerate(await self._read_descriptors(block + 1)):
                own = self._descriptors[index]
                if copied[:3] != own[:3]:
                    title = f"copy of the descriptor of group {index}, in group {group}"
                    where = addr + geometry.block_bytes + index * GROUP_DESCRIPTOR.size
                    self._report.add(title, where, copied[:3], own[:3])
                    break
