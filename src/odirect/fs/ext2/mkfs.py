"""Making an empty ext2 volume, laid out as mke2fs lays it out for the same size.

`plan` works out the geometry without touching anything; `make` writes it. The one difference on the disk
is in directory blocks: entries never cross a 512-byte boundary here, so that a torn write of such a block
does no harm.

Order of writes: the superblock and all its copies are wiped and flushed first; then everything else is
written and flushed; then the copies, flushed; then the superblock, flushed. Until the last write there is
no volume, so a power cut at any moment leaves either none, or all of it.

Limitations: no journal, no directory hashes, no meta_bg (volumes that would need it are refused), no check
for bad blocks, whole 4 KiB of the device only.
Source: mke2fs(8), mke2fs.conf(5), the documentation of ext2's layout; resize_inode as dumpe2fs shows it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from odirect.base.errors import NoSpaceError, ODirectError, UnsupportedError
from odirect.base.units import align_down, align_up
from odirect.block.bio import WRITE, ZERO
from odirect.block.filters.base import private_buffer
from odirect.dio.blockdev import change_range, flush, transfer
from odirect.dio.zeroing import zero_segments
from odirect.fs.ext2.format import (
    BLOCK_BYTES,
    DIRECT_BLOCKS,
    DOUBLE_INDIRECT,
    ENTRY_HEAD,
    EXTRA,
    FIRST_INODE_REV0,
    GOOD_OLD_INODE_BYTES,
    GROUP_DESCRIPTOR,
    INODE,
    MAGIC,
    RESIZE_INODE,
    ROOT_INODE,
    SECTOR_BYTES,
    SUPERBLOCK,
    SUPERBLOCK_ADDR,
    Compat,
    EntryHead,
    Extra,
    FileType,
    GroupDescriptor,
    Incompat,
    Inode,
    ReadOnlyCompat,
    State,
    Superblock,
    entry_bytes,
)
from odirect.sched.traps import gather, this_scheduler

if TYPE_CHECKING:
    from odirect.block.device import BlockDevice
    from odirect.sched.scheduler import Task

_KIB, _MIB, _TIB = 1 << 10, 1 << 20, 1 << 40
_MOST_BLOCKS = (1 << 32) - 1
#: A group's counts are 16 bits wide, so that a group has at most this many blocks.
_MOST_BLOCKS_PER_GROUP = (1 << 16) - 8
#: What a last group must have beyond its own metadata to be worth having.
_WORTHWHILE_BLOCKS = 50
#: A size is cut to whole pages, so that the kernel can read the last block through its cache.
_PAGE_BYTES = 4096
#: Where a partition table, a boot loader or another file system's magic may be: wiped with the superblock.
_WIPED_BYTES = 4096
#: RAID superblocks of old are in the last whole 64 KiB of a device.
_TAIL_BYTES = 64 << 10
_EXTRA_ISIZE = 32
_LOST_AND_FOUND = FIRST_INODE_REV0
_LOST_AND_FOUND_BYTES = 16 << 10
_FLAG_SIGNED_HASH = 1
#: A flag of a group: its inode table holds nothing old.
_TABLE_ZEROED = 4
_HALF_MD4 = 1
_MOUNT_XATTR_USER, _MOUNT_ACL = 0x4, 0x8
#: The place of `overhead_clusters` in `Superblock.rest`.
_OVERHEAD_AT = 0x248 - (1024 - 668)

#: The memory that one wave of writes is gathered in, and how many transfers it may hold.
_SLAB_BYTES = 4 << 20
_SLAB_TRANSFERS = 64


class Plan(NamedTuple):
    """The geometry of a volume to be made; counts in blocks and inodes."""

    block_bytes: int
    blocks_count: int
    first_data_block: int
    blocks_per_group: int
    groups: int
    inode_bytes: int
    inodes_per_group: int
    table_blocks: int
    descriptor_blocks: int
    reserved_descriptor_blocks: int
    reserved_blocks: int
    revision: int
    resize_inode: bool

    @property
    def inodes_count(self) -> int:
        """All inodes of the volume."""
        return self.inodes_per_group * self.groups

    def has_super(self, group: int) -> bool:
        """Whether the group begins with a copy of the superblock and the descriptors."""
        return self.revision == 0 or has_sparse_super(group)

    def first_block(self, group: int) -> int:
        """The group's first block."""
        return self.first_data_block + group * self.blocks_per_group

    def blocks_in(self, group: int) -> int:
        """The number of the group's blocks; the last group may have fewer than the others."""
        return min(self.blocks_per_group, self.blocks_count - self.first_block(group))

    def head_blocks(self, group: int) -> int:
        """The blocks of the superblock's copy, the descriptors and those reserved for more of them."""
        return 1 + self.descriptor_blocks + self.reserved_descriptor_blocks if self.has_super(group) else 0

    def overhead(self, group: int) -> int:
        """All blocks of a group that are never a file's."""
        return self.head_blocks(group) + 2 + self.table_blocks


def has_sparse_super(group: int) -> bool:
    """Whether the group has copies under sparse_super: 0, 1 and the powers of 3, 5 and 7."""
    if group <= 1:
        return True
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return False


def plan(
    size_bytes: int,
    *,
    block_bytes: int | None = None,
    inode_bytes: int | None = None,
    bytes_per_inode: int | None = None,
    reserved_percent: float = 5,
    revision: int = 1,
    resize_inode: bool = True,
    least_block_bytes: int = 1024,
) -> Plan:
    """The geometry of a volume of `size_bytes`, as mke2fs chooses it.

    Without `block_bytes`, volumes below 512 MiB have blocks of 1 KiB and others of 4 KiB, but none
    smaller than `least_block_bytes` (what the device can write). Raises ValueError for what cannot be
    asked for, NoSpaceError where the volume would be too small. Source: mke2fs.conf(5).
    """
    if size_bytes < 0:
        raise ValueError(f"a volume cannot have {size_bytes} bytes")
    if revision not in (0, 1):
        raise ValueError(f"revision {revision}: ext2 has 0 and 1")
    if block_bytes is None:
        block_bytes = max(1024 if size_bytes < 512 * _MIB else 4096, least_block_bytes)
    if block_bytes not in BLOCK_BYTES:
        raise ValueError(f"blocks of {block_bytes} bytes: ext2 has {', '.join(map(str, BLOCK_BYTES))}")
    if block_bytes < least_block_bytes:
        raise ValueError(f"blocks of {block_bytes} bytes: this device writes no less than {least_block_bytes}")
    if inode_bytes is None:
        inode_bytes = 256 if revision else GOOD_OLD_INODE_BYTES
    if inode_bytes not in ((128, 256) if revision else (128,)):
        raise ValueError(f"inodes of {inode_bytes} bytes: {'128 or 256' if revision else '128 in revision 0'}")
    if not 0 <= reserved_percent <= 50:
        raise ValueError(f"{reserved_percent} % of the blocks reserved: 0 to 50")
    if bytes_per_inode is None:
        bytes_per_inode = max(_usual_ratio(size_bytes), block_bytes)
    if not 1024 <= bytes_per_inode <= 4 << 20:
        raise ValueError(f"an inode for each {bytes_per_inode} bytes: 1024 to 4194304")
    blocks = align_down(size_bytes, _PAGE_BYTES) // block_bytes
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"{blocks} blocks of {block_bytes} bytes: ext2 numbers {_MOST_BLOCKS}; larger blocks help")
    inodes = blocks * block_bytes // bytes_per_inode
    if inodes > _MOST_BLOCKS:
        raise ValueError(f"{inodes} inodes: ext2 numbers {_MOST_BLOCKS}")
    if inodes * inode_bytes >= blocks * block_bytes and blocks:
        raise ValueError(f"an inode of {inode_bytes} bytes for each {bytes_per_inode} bytes leaves no room for files")
    wanted = Plan(
        block_bytes=block_bytes,
        blocks_count=blocks,
        first_data_block=1 if block_bytes == 1024 else 0,
        blocks_per_group=min(block_bytes * 8, _MOST_BLOCKS_PER_GROUP),
        groups=0,
        inode_bytes=inode_bytes,
        inodes_per_group=0,
        table_blocks=0,
        descriptor_blocks=0,
        reserved_descriptor_blocks=0,
        reserved_blocks=int(reserved_percent * blocks / 100),
        revision=revision,
        resize_inode=resize_inode and revision > 0,
    )
    return _fitted(wanted, max(inodes, FIRST_INODE_REV0 + 1), size_bytes)


def _usual_ratio(size_bytes: int) -> int:
    """Bytes of a volume for each inode, by its size."""
    for below, ratio in ((3 * _MIB, 8192), (512 * _MIB, 4096), (4 * _TIB, 16384), (16 * _TIB, 32768)):
        if size_bytes < below:
            return ratio
    return 65536


def _fitted(wanted: Plan, inodes: int, size_bytes: int) -> Plan:
    """`wanted` with its groups: a last one that is too small is dropped, one with too many inodes is shortened."""
    block_bytes, blocks = wanted.block_bytes, wanted.blocks_count
    per_group, reserved = wanted.blocks_per_group, wanted.reserved_blocks
    too_small = NoSpaceError(f"{size_bytes} bytes are too few for a volume with blocks of {block_bytes} bytes")
    while True:
        groups = -(-(blocks - wanted.first_data_block) // per_group)
        if groups <= 0:
            raise too_small
        inodes_per_group = -(-inodes // groups)
        if inodes_per_group > block_bytes * 8:
            # The bitmap of a group's inodes is one block; shorter groups have more of them.
            if per_group < 256:
                raise ValueError(f"{inodes} inodes are too many for {blocks} blocks of {block_bytes} bytes")
            per_group -= 8
            blocks = wanted.blocks_count
            continue
        found = _with_inodes(wanted, blocks, per_group, groups, inodes_per_group)
        if found.reserved_descriptor_blocks + found.descriptor_blocks > per_group * 3 // 4:
            raise ValueError(f"{groups} groups are too many for blocks of {block_bytes} bytes; larger blocks help")
        if found.overhead(0) > per_group:
            raise ValueError(f"{inodes} inodes are too many for {groups} groups of {per_group} blocks")
        rest = (blocks - wanted.first_data_block) % per_group
        if rest and rest < found.overhead(groups - 1) + _WORTHWHILE_BLOCKS:
            # As mke2fs has it: what was taken off here does not come back where the groups are made shorter later.
            reserved = wanted.reserved_blocks * (blocks - rest) // wanted.blocks_count
            blocks -= rest
            continue
        return found._replace(reserved_blocks=reserved)


def _with_inodes(wanted: Plan, blocks: int, per_group: int, groups: int, inodes_per_group: int) -> Plan:
    """The plan with full inode tables, each of a multiple of 8 inodes, and room for more descriptors."""
    block_bytes, inode_bytes = wanted.block_bytes, wanted.inode_bytes
    inodes_per_block = block_bytes // inode_bytes
    inodes_per_group = min(inodes_per_group, (1 << 16) - inodes_per_block)
    while True:
        full = -(-inodes_per_group // inodes_per_block) * inodes_per_block
        full = max(align_down(full, 8), 8)
        if full * groups <= _MOST_BLOCKS:
            break
        inodes_per_group -= 1
    if full * groups < FIRST_INODE_REV0 + 1:
        full = align_up(FIRST_INODE_REV0 + 1, 8)
    descriptors = -(-groups * GROUP_DESCRIPTOR.size // block_bytes)
    reserved = 0
    if wanted.resize_inode:
        # For growing a thousand times, or to the largest volume.
        most = min(_MOST_BLOCKS, blocks * 1024)
        most_groups = -(-(most - wanted.first_data_block) // per_group)
        reserved = min(-(-most_groups * GROUP_DESCRIPTOR.size // block_bytes) - descriptors, block_bytes // 4)
    return wanted._replace(
        blocks_count=blocks,
        blocks_per_group=per_group,
        groups=groups,
        inodes_per_group=full,
        table_blocks=-(-full * inode_bytes // block_bytes),
        descriptor_blocks=descriptors,
        reserved_descriptor_blocks=reserved,
    )


async def make(
    device: BlockDevice,
    size_bytes: int,
    *,
    block_bytes: int | None = None,
    label: bytes = b"",
    uuid: bytes,
    now_seconds: int,
    inode_bytes: int | None = None,
    bytes_per_inode: int | None = None,
    reserved_percent: float = 5,
    revision: int = 1,
    hash_seed: bytes,
    resize_inode: bool = True,
    blank: bool = False,
) -> Superblock:
    """The superblock of the empty volume that it makes on the first `size_bytes` of `device`.

    label: at most 16 bytes; uuid and hash_seed: 16; now_seconds: since 1970; bytes_per_inode: one inode
    for each. resize_inode: leave room for the descriptors of a volume that has grown. blank: the device is
    known to hold nothing but zeroes (a file just made), so none are written, and an image stays sparse.
    What was on the device is lost. Raises ValueError for what cannot be asked for, NoSpaceError where it does not fit,
    UnsupportedError for a device that writes no block as small as ext2's, DeviceError.
    """
    if len(label) > 16:
        raise ValueError(f"the label {label!r} has {len(label)} bytes; at most 16 fit")
    if len(uuid) != 16 or len(hash_seed) != 16:
        raise ValueError("the uuid and the hash seed have 16 bytes each")
    if not 0 <= now_seconds < 1 << 32:
        raise ValueError(f"{now_seconds} seconds since 1970: ext2 has 32 bits for them")
    if size_bytes > device.size_bytes:
        raise NoSpaceError(f"a volume of {size_bytes} bytes: the device has {device.size_bytes}")
    limits = device.limits
    least = max(limits.write_align, limits.logical_block)
    if least > BLOCK_BYTES[-1]:
        raise UnsupportedError(f"the device writes {least} bytes at least, and ext2 has blocks of {BLOCK_BYTES[-1]}")
    chosen = plan(
        size_bytes,
        block_bytes=block_bytes,
        inode_bytes=inode_bytes,
        bytes_per_inode=bytes_per_inode,
        reserved_percent=reserved_percent,
        revision=revision,
        resize_inode=resize_inode,
        least_block_bytes=max(1024, least),
    )
    first_files = _FirstFiles(chosen, now_seconds)
    superblock = _superblock(chosen, first_files, label, uuid, now_seconds, hash_seed)
    out = _Output(device, blank=blank)
    if not blank:
        await _wipe(out, chosen)
        # Nothing of the new volume may be there before the old one is surely gone.
        await flush(device)
    await _write_groups(out, chosen, first_files)
    # The superblock vouches for all the rest, so the rest is durable before it.
    await flush(device)
    # A copy says that it is not clean: whoever must use one should check the volume.
    for group in range(1, chosen.groups):
        if chosen.has_super(group):
            copy = superblock._replace(block_group_nr=group, state=superblock.state & ~State.CLEAN)
            await out.put(chosen.first_block(group) * chosen.block_bytes, _padded(copy, 0, chosen.block_bytes))
    await out.finish()
    await flush(device)
    before = 0 if chosen.first_data_block else SUPERBLOCK_ADDR
    await out.put(chosen.first_data_block * chosen.block_bytes, _padded(superblock, before, chosen.block_bytes))
    await out.finish()
    await flush(device)
    return superblock


def _padded(superblock: Superblock, before: int, block_bytes: int) -> bytes:
    return bytes(before) + SUPERBLOCK.pack(superblock) + bytes(block_bytes - before - SUPERBLOCK.size)


async def _wipe(out: _Output, chosen: Plan) -> None:
    """Zeroes where superblocks of an old volume, or what others know theirs by, may be."""
    block_bytes = chosen.block_bytes
    await out.zero(0, _WIPED_BYTES)
    end = chosen.blocks_count * block_bytes
    tail = align_down(end, _TAIL_BYTES) - _TAIL_BYTES
    if tail > 0:
        await out.zero(tail, end - tail)
    for group in range(1, chosen.groups):
        if chosen.has_super(group):
            await out.zero(chosen.first_block(group) * block_bytes, block_bytes)
    await out.finish()


async def _write_groups(out: _Output, chosen: Plan, first_files: _FirstFiles) -> None:
    """Everything but superblocks."""
    block_bytes = chosen.block_bytes
    descriptors = b"".join(_descriptors(chosen, first_files))
    descriptors += bytes(-len(descriptors) % block_bytes)
    for group in range(chosen.groups):
        at = chosen.first_block(group) * block_bytes
        if chosen.has_super(group):
            await out.put(at + block_bytes, descriptors)
            reserved_at = at + block_bytes + len(descriptors)
            if group == 0 and chosen.resize_inode:
                for number in range(chosen.reserved_descriptor_blocks):
                    await out.put(reserved_at + number * block_bytes, first_files.reserved_block(number))
            else:
                await out.zero(reserved_at, chosen.reserved_descriptor_blocks * block_bytes)
            at += chosen.head_blocks(group) * block_bytes
        used = chosen.overhead(group) + (first_files.blocks if group == 0 else 0)
        await out.put(at, _bitmap(used, chosen.blocks_in(group), block_bytes))
        in_use = FIRST_INODE_REV0 if group == 0 else 0
        await out.put(at + block_bytes, _bitmap(in_use, chosen.inodes_per_group, block_bytes))
        at += 2 * block_bytes
        table = first_files.table() if group == 0 else b""
        if table:
            await out.put(at, table)
        await out.zero(at + len(table), chosen.table_blocks * block_bytes - len(table))
    for block, data in first_files.contents():
        await out.put(block * block_bytes, data)
    await out.finish()


def _descriptors(chosen: Plan, first_files: _FirstFiles) -> Iterator[bytes]:
    for group in range(chosen.groups):
        bitmap = chosen.first_block(group) + chosen.head_blocks(group)
        first = group == 0
        yield GROUP_DESCRIPTOR.pack(
            GroupDescriptor(
                block_bitmap=bitmap,
                inode_bitmap=bitmap + 1,
                inode_table=bitmap + 2,
                free_blocks_count=chosen.blocks_in(group) - chosen.overhead(group) - first * first_files.blocks,
                free_inodes_count=chosen.inodes_per_group - first * FIRST_INODE_REV0,
                used_dirs_count=2 * first,
                flags=_TABLE_ZEROED,
                reserved=bytes(12),
            )
        )


def _bitmap(used: int, length: int, block_bytes: int) -> bytes:
    """A block with the first `used` bits set, and those from `length` on, which stand for nothing."""
    every = (1 << block_bytes * 8) - 1
    bits = ((1 << used) - 1) | (every ^ ((1 << length) - 1))
    return bits.to_bytes(block_bytes, "little")


def _superblock(
    chosen: Plan, first_files: _FirstFiles, label: bytes, uuid: bytes, now_seconds: int, hash_seed: bytes
) -> Superblock:
    overhead = sum(chosen.overhead(group) for group in range(chosen.groups))
    modern = chosen.revision > 0
    large_inodes = chosen.inode_bytes > GOOD_OLD_INODE_BYTES
    rest = bytearray(668)
    rest[_OVERHEAD_AT : _OVERHEAD_AT + 4] = (overhead + chosen.first_data_block).to_bytes(4, "little")
    compat = Compat.EXT_ATTR | (Compat.RESIZE_INODE if chosen.resize_inode else 0)
    log_block = chosen.block_bytes.bit_length() - 11
    return Superblock(
        inodes_count=chosen.inodes_count,
        blocks_count=chosen.blocks_count,
        r_blocks_count=chosen.reserved_blocks,
        free_blocks_count=chosen.blocks_count - chosen.first_data_block - overhead - first_files.blocks,
        free_inodes_count=chosen.inodes_count - FIRST_INODE_REV0,
        first_data_block=chosen.first_data_block,
        log_block_size=log_block,
        log_cluster_size=log_block,
        blocks_per_group=chosen.blocks_per_group,
        clusters_per_group=chosen.blocks_per_group,
        inodes_per_group=chosen.inodes_per_group,
        mtime=0,
        wtime=now_seconds,
        mnt_count=0,
        max_mnt_count=0xFFFF,
        magic=MAGIC,
        state=int(State.CLEAN),
        errors=1,
        minor_rev_level=0,
        lastcheck=now_seconds,
        checkinterval=0,
        creator_os=0,
        rev_level=chosen.revision,
        def_resuid=0,
        def_resgid=0,
        first_ino=FIRST_INODE_REV0,
        inode_size=chosen.inode_bytes,
        block_group_nr=0,
        feature_compat=int(compat) if modern else 0,
        feature_incompat=int(Incompat.FILETYPE) if modern else 0,
        feature_ro_compat=int(ReadOnlyCompat.SPARSE_SUPER | ReadOnlyCompat.LARGE_FILE) if modern else 0,
        uuid=uuid,
        volume_name=label,
        last_mounted=b"",
        algorithm_usage_bitmap=0,
        prealloc_blocks=0,
        prealloc_dir_blocks=0,
        reserved_gdt_blocks=chosen.reserved_descriptor_blocks,
        journal_uuid=bytes(16),
        journal_inum=0,
        journal_dev=0,
        last_orphan=0,
        hash_seed=hash_seed,
        def_hash_version=_HALF_MD4,
        jnl_backup_type=0,
        desc_size=0,
        default_mount_opts=_MOUNT_XATTR_USER | _MOUNT_ACL if modern else 0,
        first_meta_bg=0,
        mkfs_time=now_seconds,
        jnl_blocks=bytes(68),
        blocks_count_hi=0,
        r_blocks_count_hi=0,
        free_blocks_hi=0,
        min_extra_isize=_EXTRA_ISIZE if large_inodes else 0,
        want_extra_isize=_EXTRA_ISIZE if large_inodes else 0,
        flags=_FLAG_SIGNED_HASH,
        rest=bytes(rest),
    )


class _FirstFiles:
    """What is in a new volume: the root directory, lost+found, and the inode that knows the reserved descriptors.

    Their blocks follow the first group's inode table, in that order.
    """

    def __init__(self, chosen: Plan, now_seconds: int) -> None:
        self._plan = chosen
        self._now = now_seconds
        self._root = chosen.first_block(0) + chosen.overhead(0)
        self._lost_blocks = min(_LOST_AND_FOUND_BYTES // chosen.block_bytes, DIRECT_BLOCKS)
        self.blocks = 1 + self._lost_blocks + chosen.resize_inode

    def table(self) -> bytes:
        """The first blocks of the inode table, with the reserved inodes and lost+found."""
        chosen = self._plan
        data = bytearray(align_up(FIRST_INODE_REV0 * chosen.inode_bytes, chosen.block_bytes))
        INODE.write(self._inode(mode=0, links=0, size=0, blocks=0, pointers={}), data, 0)
        lost = {index: self._root + 1 + index for index in range(self._lost_blocks)}
        self._store(data, ROOT_INODE, self._inode(0o040755, 3, chosen.block_bytes, 1, {0: self._root}))
        lost_bytes = self._lost_blocks * chosen.block_bytes
        self._store(data, _LOST_AND_FOUND, self._inode(0o040700, 2, lost_bytes, self._lost_blocks, lost))
        if chosen.resize_inode:
            self._store(data, RESIZE_INODE, self._resize_inode())
        return bytes(data)

    def contents(self) -> Iterator[tuple[int, bytes]]:
        """(block, its bytes) of the directories and of the resize inode's tree."""
        chosen = self._plan
        types = (FileType.DIRECTORY if chosen.revision else FileType.UNKNOWN,) * 3
        root = ((ROOT_INODE, b"."), (ROOT_INODE, b".."), (_LOST_AND_FOUND, b"lost+found"))
        yield self._root, _directory_block(chosen.block_bytes, root, types)
        lost = ((_LOST_AND_FOUND, b"."), (ROOT_INODE, b".."))
        yield self._root + 1, _directory_block(chosen.block_bytes, lost, types)
        for index in range(1, self._lost_blocks):
            yield self._root + 1 + index, _directory_block(chosen.block_bytes, (), ())
        if chosen.resize_inode:
            yield self._root + 1 + self._lost_blocks, self._double_indirect()

    def reserved_block(self, number: int) -> bytes:
        """What the primary reserved descriptor block holds: the blocks kept for its copies in other groups."""
        chosen = self._plan
        data = bytearray(chosen.block_bytes)
        first = chosen.first_block(0) + 1 + chosen.descriptor_blocks + number
        for index, group in enumerate(self._copies()):
            data[index * 4 : index * 4 + 4] = (first + group * chosen.blocks_per_group).to_bytes(4, "little")
        return bytes(data)

    def _copies(self) -> list[int]:
        return [group for group in range(1, self._plan.groups) if self._plan.has_super(group)]

    def _double_indirect(self) -> bytes:
        chosen = self._plan
        data = bytearray(chosen.block_bytes)
        pointers = chosen.block_bytes // 4
        first = chosen.first_block(0) + 1 + chosen.descriptor_blocks
        for number in range(chosen.reserved_descriptor_blocks):
            at = (chosen.descriptor_blocks + number) % pointers * 4
            data[at : at + 4] = (first + number).to_bytes(4, "little")
        return bytes(data)

    def _resize_inode(self) -> Inode:
        chosen = self._plan
        pointers = chosen.block_bytes // 4
        size = (DIRECT_BLOCKS + pointers + pointers * pointers) * chosen.block_bytes
        blocks = 1 + chosen.reserved_descriptor_blocks * (1 + len(self._copies()))
        place = {DOUBLE_INDIRECT: self._root + 1 + self._lost_blocks}
        return self._inode(0o100600, 1, size, blocks, place)

    def _inode(self, mode: int, links: int, size: int, blocks: int, pointers: dict[int, int]) -> Inode:
        place = bytearray(60)
        for index, block in pointers.items():
            place[index * 4 : index * 4 + 4] = block.to_bytes(4, "little")
        return Inode(
            mode=mode,
            uid=0,
            size=size & 0xFFFFFFFF,
            atime=self._now,
            ctime=self._now,
            mtime=self._now,
            dtime=0,
            gid=0,
            links_count=links,
            blocks=blocks * self._plan.block_bytes // SECTOR_BYTES,
            flags=0,
            osd1=0,
            block=bytes(place),
            generation=0,
            file_acl=0,
            size_high=size >> 32,
            faddr=0,
            blocks_high=0,
            file_acl_high=0,
            uid_high=0,
            gid_high=0,
            checksum_lo=0,
            reserved=0,
        )

    def _store(self, table: bytearray, number: int, inode: Inode) -> None:
        at = (number - 1) * self._plan.inode_bytes
        INODE.write(inode, table, at)
        if self._plan.inode_bytes > INODE.size:
            EXTRA.write(Extra(_EXTRA_ISIZE, 0, 0, 0, 0, self._now, 0), table, at + INODE.size)


def _directory_block(block_bytes: int, entries: tuple[tuple[int, bytes], ...], types: tuple[FileType, ...]) -> bytes:
    """A directory's block: `entries` in its first 512 bytes, and every 512 bytes filled by themselves."""
    data = bytearray(block_bytes)
    at = 0
    for index, (number, name) in enumerate(entries):
        last = index == len(entries) - 1
        length = SECTOR_BYTES - at if last else entry_bytes(len(name))
        ENTRY_HEAD.write(EntryHead(number, length, len(name), types[index]), data, at)
        data[at + ENTRY_HEAD.size : at + ENTRY_HEAD.size + len(name)] = name
        at += length
    for free in range(at, block_bytes, SECTOR_BYTES):
        ENTRY_HEAD.write(EntryHead(0, SECTOR_BYTES, 0, 0), data, free)
    return bytes(data)


class _Output:
    """Writes that are gathered in aligned memory and sent in waves, each of one slab."""

    def __init__(self, device: BlockDevice, *, blank: bool) -> None:
        self._device = device
        self._blank = blank
        self._slab = private_buffer(_SLAB_BYTES, device.limits.memory_align)
        self._filled = 0
        self._writes: list[tuple[int, memoryview]] = []
        self._zeroes: list[tuple[int, int]] = []
        self._zeroes_itself = True
        self._align = max(device.limits.memory_align, 1)

    async def put(self, addr: int, data: bytes) -> None:
        """Write `data`, whole blocks, at byte `addr`, before the next `finish` returns."""
        view = memoryview(data)
        while view:
            start = self._filled
            if self._writes and self._writes[-1][0] + len(self._writes[-1][1]) == addr:
                # It goes on where the last ended, on the device and in memory: one transfer.
                merged = True
            else:
                start = align_up(start, self._align)
                merged = False
            room = align_down(max(0, _SLAB_BYTES - start), _PAGE_BYTES if len(view) > _PAGE_BYTES else len(view))
            count = min(len(view), room)
            if not count or (not merged and len(self._writes) >= _SLAB_TRANSFERS):
                await self.finish()
                continue
            target = self._slab[start : start + count]
            target[:] = view[:count]
            if merged:
                first, before = self._writes[-1]
                self._writes[-1] = (first, self._slab[start - len(before) : start + count])
            else:
                self._writes.append((addr, target))
            self._filled = start + count
            addr += count
            view = view[count:]

    async def zero(self, addr: int, length: int) -> None:
        """Zero whole blocks from byte `addr` on, before the next `finish` returns."""
        if length and not self._blank:
            self._zeroes.append((addr, length))
            if len(self._zeroes) >= _SLAB_TRANSFERS:
                await self.finish()

    async def finish(self) -> None:
        """Wait until all that was asked for is on the device. Raises its first error."""
        scheduler = await this_scheduler()
        zeroes, self._zeroes = self._zeroes, []
        writes, self._writes = self._writes, []
        self._filled = 0
        tasks: list[Task[None]] = [scheduler.spawn(self._zero(addr, length)) for addr, length in zeroes]
        tasks += [scheduler.spawn(self._write(addr, [view], len(view))) for addr, view in writes]
        await gather(*tasks)

    async def _write(self, addr: int, segments: list[memoryview], length: int) -> None:
        moved = await transfer(self._device, WRITE, addr, segments, length)
        if moved != length:
            raise NoSpaceError(f"writing {length} bytes at {addr}: the device took {moved}")

    async def _zero(self, addr: int, length: int) -> None:
        if self._zeroes_itself:
            try:
                await change_range(self._device, ZERO, addr, length)
                return
            except ODirectError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._zeroes_itself = False
        end = addr + length
        while addr < end:
            count = min(end - addr, _MIB)
            await self._write(addr, zero_segments(count), count)
            addr += count
