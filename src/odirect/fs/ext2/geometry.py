"""What never changes of an open ext2 volume: sizes, features, and where everything fixed is.

Reading climbs a ladder: magic, revision, features, block size, the groups' sizes, then every count
against the others and against the device. What is not ours to read is refused by name; what may be
read but not written (ext3 with its journal clean, a volume that was not closed well) says so in
`write_refusal`.
"""

from __future__ import annotations

import array
import struct
from typing import TYPE_CHECKING

from odirect.base.errors import UnsupportedError
from odirect.base.layout import Place
from odirect.fs.ext2.format import (
    BAD_BLOCKS_INODE,
    BLOCK_BYTES,
    DIRECT_BLOCKS,
    FIRST_INODE_REV0,
    GOOD_OLD_INODE_BYTES,
    GROUP_DESCRIPTOR,
    MAGIC,
    RESIZE_INODE,
    REV_DYNAMIC,
    REV_ORIGINAL,
    SECTOR_BYTES,
    SUPERBLOCK,
    SUPERBLOCK_ADDR,
    Compat,
    GroupDescriptor,
    Incompat,
    ReadOnlyCompat,
    State,
    Superblock,
)

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.cache.metacache import MetaCache

#: What the features are called in messages: as e2fsprogs prints them, and whose they are.
_INCOMPAT_NAMES = {
    Incompat.COMPRESSION: "compression (e2compr)",
    Incompat.RECOVER: "needs_recovery",
    Incompat.JOURNAL_DEV: "journal_dev (a journal, not a file system)",
    Incompat.META_BG: "meta_bg",
    Incompat.EXTENTS: "extents (ext4)",
    Incompat.SIXTYFOUR_BIT: "64bit (ext4)",
    Incompat.MMP: "mmp (ext4)",
    Incompat.FLEX_BG: "flex_bg (ext4)",
    Incompat.EA_INODE: "ea_inode (ext4)",
    Incompat.DIRDATA: "dirdata (Lustre)",
    Incompat.CSUM_SEED: "metadata_csum_seed (ext4)",
    Incompat.LARGEDIR: "large_dir (ext4)",
    Incompat.INLINE_DATA: "inline_data (ext4)",
    Incompat.ENCRYPT: "encrypt (ext4)",
    Incompat.CASEFOLD: "casefold (ext4)",
}
# Plain ints: the complement of a flag has only the bits that have names.
_OUR_INCOMPAT = int(Incompat.FILETYPE)
_READ_ONLY_NAMES = {
    ReadOnlyCompat.BTREE_DIR: "btree_dir",
    ReadOnlyCompat.HUGE_FILE: "huge_file (ext4)",
    ReadOnlyCompat.GDT_CSUM: "uninit_bg (ext4)",
    ReadOnlyCompat.DIR_NLINK: "dir_nlink (ext4)",
    ReadOnlyCompat.EXTRA_ISIZE: "extra_isize (ext4)",
    ReadOnlyCompat.QUOTA: "quota (ext4)",
    ReadOnlyCompat.BIGALLOC: "bigalloc (ext4)",
    ReadOnlyCompat.METADATA_CSUM: "metadata_csum (ext4)",
    ReadOnlyCompat.REPLICA: "replica (ext4)",
    ReadOnlyCompat.READONLY: "read-only",
    ReadOnlyCompat.PROJECT: "project (ext4)",
    ReadOnlyCompat.SHARED_BLOCKS: "shared_blocks (ext4)",
    ReadOnlyCompat.VERITY: "verity (ext4)",
    ReadOnlyCompat.ORPHAN_PRESENT: "orphan_present (ext4)",
}
_OUR_READ_ONLY = int(ReadOnlyCompat.SPARSE_SUPER | ReadOnlyCompat.LARGE_FILE)
#: Where `rest` of the superblock has the two groups that sparse_super2 gives copies to.
_BACKUP_GROUPS = struct.Struct("<2I")
_BACKUP_GROUPS_AT = 0x24C - 0x164


class Geometry:
    """Facts of one volume that stay while it is open.

    name: for messages. superblock: as read; its free counts and state grow old. inode_bytes: of one
    inode in the table. table_blocks: of one group's inode table. descriptor_blocks: the block numbers
    of the table of group descriptors that is used. max_blocks: how many blocks of a file the numbers in an
    inode can lead to. max_file_bytes: how long a file may be made, so that its sectors can be counted in 32
    bits (ext2's own limit).
    """

    def __init__(self, superblock: Superblock, name: str) -> None:
        """For a superblock that `read_geometry` has checked; use that."""
        self.name = name
        self.superblock = superblock
        self.block_bytes = 1024 << superblock.log_block_size
        self.blocks_count = superblock.blocks_count
        self.inodes_count = superblock.inodes_count
        self.first_data_block = superblock.first_data_block
        self.blocks_per_group = superblock.blocks_per_group
        self.inodes_per_group = superblock.inodes_per_group
        dynamic = superblock.rev_level >= REV_DYNAMIC
        self.inode_bytes = superblock.inode_size if dynamic else GOOD_OLD_INODE_BYTES
        self.first_inode = superblock.first_ino if dynamic else FIRST_INODE_REV0
        self.groups = -(-(self.blocks_count - self.first_data_block) // self.blocks_per_group)
        self.pointers_per_block = self.block_bytes // 4
        self.compat = superblock.feature_compat
        self.incompat = superblock.feature_incompat
        self.ro_compat = superblock.feature_ro_compat
        self.has_file_type = bool(self.incompat & Incompat.FILETYPE)
        self.has_large_file = bool(self.ro_compat & ReadOnlyCompat.LARGE_FILE)
        self.sparse_super = bool(self.ro_compat & ReadOnlyCompat.SPARSE_SUPER)
        self.table_blocks = -(-self.inodes_per_group * self.inode_bytes // self.block_bytes)
        self.descriptors_per_block = self.block_bytes // GROUP_DESCRIPTOR.size
        start = self.first_data_block + 1
        self.descriptor_blocks = range(start, start + -(-self.groups // self.descriptors_per_block))
        self._reserved_gdt = superblock.reserved_gdt_blocks if self.compat & Compat.RESIZE_INODE else 0
        pointers = self.pointers_per_block
        self.max_blocks = DIRECT_BLOCKS + pointers + pointers**2 + pointers**3
        self.max_file_bytes = _max_file_bytes(self.block_bytes)
        # Of every group, once `load_fixed` has run: the bitmaps' blocks and the inode table's first.
        self._block_bitmaps = array.array("I")
        self._inode_bitmaps = array.array("I")
        self._tables = array.array("I")
        self._arrays: tuple[NDArray[numpy.uint32], ...] = ()

    # -- where things are

    def place(self, structure: str, addr: int) -> Place:
        """A place of this volume for messages: what it is, and its byte on the device."""
        return Place(self.name, structure, addr)

    def group_of_block(self, block: int) -> int:
        """The group that `block` is in; blocks before the first group are said to be in group -1."""
        return (block - self.first_data_block) // self.blocks_per_group

    def group_of_inode(self, number: int) -> int:
        """The group whose table has inode `number` (from 1)."""
        return (number - 1) // self.inodes_per_group

    def first_block_of_group(self, group: int) -> int:
        """The number of the first block of `group`."""
        return self.first_data_block + group * self.blocks_per_group

    def blocks_in_group(self, group: int) -> int:
        """How many blocks `group` has: only the last one may have fewer than `blocks_per_group`."""
        return min(self.blocks_per_group, self.blocks_count - self.first_block_of_group(group))

    def has_super(self, group: int) -> bool:
        """Whether `group` begins with a copy of the superblock and of the descriptors."""
        if group == 0:
            return True
        if self.compat & Compat.SPARSE_SUPER2:
            return group in _BACKUP_GROUPS.unpack_from(self.superblock.rest, _BACKUP_GROUPS_AT)
        if not self.sparse_super or group == 1:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def super_blocks(self, group: int) -> int:
        """How many blocks at the start of `group` the copies take, with what is kept for more descriptors."""
        return 1 + len(self.descriptor_blocks) + self._reserved_gdt if self.has_super(group) else 0

    @property
    def all_super_blocks(self) -> int:
        """`super_blocks` of all groups together. RuntimeError before `load_fixed`."""
        self._need_fixed()
        return int(self._arrays[3].sum())

    def descriptor_place(self, group: int) -> tuple[int, int]:
        """(block, byte in it) of the descriptor of `group`."""
        block, index = divmod(group, self.descriptors_per_block)
        return self.descriptor_blocks[block], index * GROUP_DESCRIPTOR.size

    def descriptor(self, cache: MetaCache, group: int) -> GroupDescriptor:
        """The descriptor of `group`, its block numbers checked.

        Raises BlockMiss if it is not cached, CorruptionError if what it names is not inside its group.
        """
        block, offset = self.descriptor_place(group)
        data = cache.get(block)
        if self._tables:
            found = GROUP_DESCRIPTOR.kind(*GROUP_DESCRIPTOR.struct.unpack_from(data, offset))
            if (
                found.inode_table == self._tables[group]
                and found.block_bitmap == self._block_bitmaps[group]
                and found.inode_bitmap == self._inode_bitmaps[group]
            ):
                return found  # As it was when it was looked at.
        place = self.place(f"descriptor of group {group}", block * self.block_bytes + offset)
        found = GROUP_DESCRIPTOR.read(data, offset, place)
        first = self.first_block_of_group(group)
        bounds = self._bounds(group)
        for field, value, length in (
            ("block_bitmap", found.block_bitmap, 1),
            ("inode_bitmap", found.inode_bitmap, 1),
            ("inode_table", found.inode_table, self.table_blocks),
        ):
            if not bounds.start <= value <= bounds.stop - length:
                raise place.corrupt(f"{field} {value}", f"{length} blocks from {first} to {bounds.stop - 1}")
        table = range(found.inode_table, found.inode_table + self.table_blocks)
        if found.block_bitmap == found.inode_bitmap or found.block_bitmap in table or found.inode_bitmap in table:
            raise place.corrupt(
                f"bitmaps {found.block_bitmap} and {found.inode_bitmap}, inode table {found.inode_table}",
                f"bitmaps apart from each other and from {self.table_blocks} blocks of inodes",
            )
        return found

    def inode_place(self, cache: MetaCache, number: int, place: Place | None = None) -> tuple[int, int]:
        """(block, byte in it) of inode `number`.

        Raises BlockMiss if the descriptor is not cached, CorruptionError for a number that is not the
        volume's; `place` says where the number was found.
        """
        self.check_inode_number(number, place)
        group, index = divmod(number - 1, self.inodes_per_group)
        table = self._tables[group] if self._tables else self.descriptor(cache, group).inode_table
        block, offset = divmod(index * self.inode_bytes, self.block_bytes)
        return table + block, offset

    def inode_places(self, numbers: NDArray[numpy.int64]) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """What `inode_place` says of many inodes, all of them the volume's: blocks, and bytes in them.

        RuntimeError before `load_fixed`.
        """
        import numpy

        self._need_fixed()
        groups, indices = numpy.divmod(numbers - 1, self.inodes_per_group)
        blocks, offsets = numpy.divmod(indices * self.inode_bytes, self.block_bytes)
        return self._arrays[2].astype(numpy.int64)[groups] + blocks, offsets

    def inode_structure(self, number: int) -> Place:
        """The place of inode `number` for messages; its byte is 0 where `load_fixed` has not run."""
        addr = 0
        if self._tables and 1 <= number <= self.inodes_count:
            group, index = divmod(number - 1, self.inodes_per_group)
            addr = self._tables[group] * self.block_bytes + index * self.inode_bytes
        return self.place(f"inode {number}", addr)

    def check_inode_number(self, number: int, place: Place | None = None) -> None:
        """Raises CorruptionError unless `number` is an inode of this volume; `place`: where it was found."""
        if not 1 <= number <= self.inodes_count:
            where = place or self.place("a reference to an inode", SUPERBLOCK_ADDR)
            raise where.corrupt(f"inode {number}", f"a number from 1 to {self.inodes_count}")

    # -- what is fixed

    def load_fixed(self, cache: MetaCache) -> None:
        """Read all group descriptors, so that `is_fixed` and the checks of block numbers can answer.

        Raises BlockMiss, naming all that are not cached, and CorruptionError if a bitmap or an inode
        table is not in its group, or overlaps another. Run once, when the volume is opened.
        """
        import numpy

        views = cache.get_all(self.descriptor_blocks)
        raw = b"".join(views)[: self.groups * GROUP_DESCRIPTOR.size]
        words = numpy.frombuffer(raw, "<u4").reshape(self.groups, GROUP_DESCRIPTOR.size // 4)
        block_bitmaps, inode_bitmaps, tables = (words[:, column].astype(numpy.int64) for column in range(3))
        first = self.first_data_block + numpy.arange(self.groups, dtype=numpy.int64) * self.blocks_per_group
        end = numpy.minimum(first + self.blocks_per_group, self.blocks_count)
        supers = numpy.fromiter((self.super_blocks(group) for group in range(self.groups)), numpy.int64, self.groups)
        start = first + supers
        wrong = tables + self.table_blocks > end
        for column in (block_bitmaps, inode_bitmaps, tables):
            wrong |= (column < start) | (column >= end)
        for bitmap in (block_bitmaps, inode_bitmaps):
            wrong |= (bitmap >= tables) & (bitmap < tables + self.table_blocks)
        wrong |= block_bitmaps == inode_bitmaps
        if wrong.any():
            # The same check once more, for its words.
            group = int(wrong.argmax())
            self.descriptor(cache, group)
            block, offset = self.descriptor_place(group)
            place = self.place(f"descriptor of group {group}", block * self.block_bytes + offset)
            raise place.corrupt("bitmaps or an inode table elsewhere", "them in the group, each by itself")
        columns = [column.astype(numpy.uint32) for column in (block_bitmaps, inode_bitmaps, tables, supers)]
        self._block_bitmaps, self._inode_bitmaps, self._tables = (
            array.array("I", column.tobytes()) for column in columns[:3]
        )
        self._arrays = tuple(columns)

    def block_bitmap(self, group: int) -> int:
        """The block with the bitmap of the blocks of `group`. RuntimeError before `load_fixed`."""
        self._need_fixed()
        return self._block_bitmaps[group]

    def inode_bitmap(self, group: int) -> int:
        """The block with the bitmap of the inodes of `group`. RuntimeError before `load_fixed`."""
        self._need_fixed()
        return self._inode_bitmaps[group]

    def inode_table(self, group: int) -> int:
        """The first block of the inode table of `group`. RuntimeError before `load_fixed`."""
        self._need_fixed()
        return self._tables[group]

    def is_fixed(self, block: int) -> bool:
        """Whether `block` can never be a file's: superblocks, descriptors (and what is kept for more of
        them), bitmaps, inode tables, and what is before the first group or past the volume's end.

        RuntimeError before `load_fixed`.
        """
        return self._is_fixed(block, self._reserved_gdt)

    def check_data_block(self, block: int, place: Place, owner: int = 0) -> None:
        """Raises CorruptionError unless `block` can be a file's, for data or for block numbers.

        place: where the number was found. owner: the inode; those of bad blocks and of the blocks kept for
        descriptors own what others may not. RuntimeError before `load_fixed`.
        """
        if not self.may_own(owner, block):
            raise place.corrupt(f"block {block}", f"a block for files, below {self.blocks_count}")

    def may_own(self, owner: int, block: int) -> bool:
        """Whether `check_data_block` takes `block` for inode `owner`. RuntimeError before `load_fixed`."""
        if owner == BAD_BLOCKS_INODE:
            return self.first_data_block <= block < self.blocks_count
        return not self._is_fixed(block, 0 if owner == RESIZE_INODE else self._reserved_gdt)

    def first_wrong(self, blocks: NDArray[numpy.uint32], owner: int = 0) -> int:
        """The index of the first of `blocks` that `check_data_block` refuses, or -1; zeroes are holes."""
        import numpy

        self._need_fixed()
        used = blocks.nonzero()[0]
        if not len(used):
            return -1
        found = blocks[used].astype(numpy.int64)
        wrong = (found < self.first_data_block) | (found >= self.blocks_count)
        if owner != BAD_BLOCKS_INODE and not wrong.any():
            group, offset = numpy.divmod(found - self.first_data_block, self.blocks_per_group)
            block_bitmaps, inode_bitmaps, tables, supers = (column[group] for column in self._arrays)
            if owner == RESIZE_INODE:
                supers = numpy.where(supers > 0, supers - self._reserved_gdt, 0)
            in_table = (found >= tables) & (found < tables.astype(numpy.int64) + self.table_blocks)
            wrong = (found == block_bitmaps) | (found == inode_bitmaps) | in_table | (offset < supers)
        return int(used[wrong.argmax()]) if wrong.any() else -1

    def _is_fixed(self, block: int, reserved_gdt: int) -> bool:
        self._need_fixed()
        if not self.first_data_block <= block < self.blocks_count:
            return True
        group, offset = divmod(block - self.first_data_block, self.blocks_per_group)
        table = self._tables[group]
        return (
            table <= block < table + self.table_blocks
            or block == self._block_bitmaps[group]
            or block == self._inode_bitmaps[group]
            or (offset < 1 + len(self.descriptor_blocks) + reserved_gdt and self.has_super(group))
        )

    def _need_fixed(self) -> None:
        if not self._tables:
            raise RuntimeError("load_fixed has not run yet")

    def _bounds(self, group: int) -> range:
        first = self.first_block_of_group(group)
        return range(first + self.super_blocks(group), first + self.blocks_in_group(group))

    # -- what may be done with it

    def read_refusal(self) -> str | None:
        """Why the volume cannot be read, with the features' names; None: it can."""
        return _read_refusal(self.superblock)

    def write_refusal(self) -> str | None:
        """Why the volume may not be written, and what to do about it; None: it may."""
        superblock = self.superblock
        refusal = self.read_refusal()
        if refusal is not None:
            return refusal
        if self.compat & Compat.HAS_JOURNAL:
            return "it has a journal (ext3), which is only read here"
        names = _feature_names(self.ro_compat & ~_OUR_READ_ONLY, _READ_ONLY_NAMES, "read-only compatible")
        if names:
            return f"its features are only read here: {', '.join(names)}"
        if superblock.rev_level == REV_ORIGINAL and (self.compat or self.incompat or self.ro_compat):
            return "it is of revision 0 and has features; run e2fsck"
        if superblock.state & State.ERRORS:
            return "errors were found on it; run e2fsck"
        if not superblock.state & State.CLEAN:
            return "it was not closed well, or is in use; run e2fsck"
        if superblock.state & State.ORPHANS or superblock.last_orphan:
            return "it has deleted files that are still to be cleaned up; run e2fsck"
        return None


def read_geometry(data: bytes | bytearray | memoryview, *, name: str, device_bytes: int) -> Geometry:
    """The volume whose superblock (1024 bytes, from byte 1024 of the device) is `data`.

    name: the volume's, for messages. device_bytes: how large the device is. Raises CorruptionError for
    what cannot be believed, UnsupportedError, with the features' names, for what is not ours.
    """
    place = Place(name, "superblock", SUPERBLOCK_ADDR)
    found = SUPERBLOCK.read(data, 0, place)
    if found.magic != MAGIC:
        raise place.corrupt(f"magic {found.magic:#06x}", f"{MAGIC:#06x} (ext2)")
    if found.rev_level > REV_DYNAMIC:
        raise UnsupportedError(f"revision {found.rev_level} of ext2; known are 0 and 1", path=name)
    refusal = _read_refusal(found)
    if refusal is not None:
        raise UnsupportedError(refusal, path=name)
    _check_block_size(found, place)
    _check_groups(found, place)
    geometry = Geometry(found, name)
    _check_counts(geometry, place, device_bytes)
    return geometry


def _check_block_size(found: Superblock, place: Place) -> None:
    if found.log_block_size >= len(BLOCK_BYTES):
        if found.log_block_size <= 6:
            raise UnsupportedError(
                f"blocks of {1024 << found.log_block_size} bytes; known are {BLOCK_BYTES}", path=place.volume
            )
        raise place.corrupt(f"log_block_size {found.log_block_size}", f"at most {len(BLOCK_BYTES) - 1}")
    if found.log_cluster_size != found.log_block_size:
        raise UnsupportedError("fragments or clusters that are not one block", path=place.volume)
    if found.first_data_block != (1 if found.log_block_size == 0 else 0):
        raise place.corrupt(
            f"first_data_block {found.first_data_block}",
            f"{1 if found.log_block_size == 0 else 0} for blocks of {1024 << found.log_block_size} bytes",
        )


def _check_groups(found: Superblock, place: Place) -> None:
    block_bytes = 1024 << found.log_block_size
    bits = 8 * block_bytes
    if not 0 < found.blocks_per_group <= bits:
        raise place.corrupt(f"blocks_per_group {found.blocks_per_group}", f"1 to {bits}")
    inode_bytes = GOOD_OLD_INODE_BYTES
    if found.rev_level >= REV_DYNAMIC:
        inode_bytes = found.inode_size
        if not GOOD_OLD_INODE_BYTES <= inode_bytes <= block_bytes or inode_bytes & (inode_bytes - 1):
            raise place.corrupt(
                f"inode_size {inode_bytes}", f"a power of two from {GOOD_OLD_INODE_BYTES} to {block_bytes}"
            )
        if not FIRST_INODE_REV0 <= found.first_ino <= found.inodes_count:
            raise place.corrupt(f"first_ino {found.first_ino}", f"{FIRST_INODE_REV0} to {found.inodes_count}")
    if not block_bytes // inode_bytes <= found.inodes_per_group <= bits:
        raise place.corrupt(f"inodes_per_group {found.inodes_per_group}", f"{block_bytes // inode_bytes} to {bits}")
    if found.blocks_count <= found.first_data_block:
        raise place.corrupt(f"blocks_count {found.blocks_count}", f"more than {found.first_data_block}")


def _check_counts(geometry: Geometry, place: Place, device_bytes: int) -> None:
    found = geometry.superblock
    if found.blocks_count * geometry.block_bytes > device_bytes:
        raise place.corrupt(
            f"blocks_count {found.blocks_count} of {geometry.block_bytes} bytes",
            f"no more than the device's {device_bytes} bytes; was it cut short?",
        )
    if found.inodes_count != geometry.groups * geometry.inodes_per_group:
        raise place.corrupt(
            f"inodes_count {found.inodes_count}", f"{geometry.groups} groups of {geometry.inodes_per_group}"
        )
    for field, value, most in (
        ("r_blocks_count", found.r_blocks_count, found.blocks_count),
        ("free_blocks_count", found.free_blocks_count, found.blocks_count),
        ("free_inodes_count", found.free_inodes_count, found.inodes_count),
        ("reserved_gdt_blocks", found.reserved_gdt_blocks, geometry.pointers_per_block),
    ):
        if value > most:
            raise place.corrupt(f"{field} {value}", f"at most {most}")
    for group in (0, geometry.groups - 1):
        overhead = geometry.super_blocks(group) + 2 + geometry.table_blocks
        if geometry.blocks_in_group(group) < overhead:
            raise place.corrupt(
                f"group {group} of {geometry.blocks_in_group(group)} blocks",
                f"at least {overhead}: copies of the descriptors, two bitmaps and the inode table",
            )


def _read_refusal(found: Superblock) -> str | None:
    unknown = found.feature_incompat & ~_OUR_INCOMPAT
    if unknown & ~int(Incompat.RECOVER):
        names = _feature_names(unknown, _INCOMPAT_NAMES, "incompatible")
        return f"it has features that are not ext2's: {', '.join(names)}"
    if unknown:
        return "its journal must be replayed first (needs_recovery): run e2fsck, or mount it once as ext3"
    return None


def _feature_names(bits: int, known: dict[Incompat, str] | dict[ReadOnlyCompat, str], kind: str) -> list[str]:
    names = {int(flag): text for flag, text in known.items()}
    found = (1 << bit for bit in range(32) if bits >> bit & 1)
    return [names.get(value, f"{kind} feature {value:#x}") for value in found]


def _is_power(number: int, base: int) -> bool:
    value = base
    while value < number:
        value *= base
    return value == number


def _max_file_bytes(block_bytes: int) -> int:
    """The longest file without holes whose sectors, with those of its block numbers, count in 32 bits.

    Source: the kernel's limit (ext4_max_bitmap_size), which leaves a little room where blocks are 4 KiB.
    """
    most = ((1 << 32) - 1) // (block_bytes // SECTOR_BYTES)
    pointers = block_bytes // 4
    data = DIRECT_BLOCKS + pointers + pointers**2 + pointers**3
    tree = 1 + (1 + pointers) + (1 + pointers + pointers**2)
    if data + tree <= most:
        return data * block_bytes
    # The first two trees are full, and of the third there are as many blocks of numbers as what is left would take.
    rest = most - DIRECT_BLOCKS - pointers - pointers**2
    tree = 1 + (1 + pointers) + 1 + -(-rest // pointers) + -(-rest // pointers**2)
    return (most - tree) * block_bytes
