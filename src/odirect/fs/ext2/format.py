"""ext2 on the disk: every record and constant.

A volume is a row of blocks of 1, 2 or 4 KiB, in groups of at most 8 blocks' worth of bits. Everything
is little-endian. Byte 1024 holds the superblock; the block after the one that the superblock is in
begins the group descriptors. Copies of both are in groups 0 and 1 and those whose number is a power of
3, 5 or 7 (sparse_super), or in every group. Each group has a bitmap of its blocks, one of its inodes,
and a part of the inode table, where its descriptor says. Blocks are numbered from 0, of which group 0
leaves out the first where a block is 1 KiB (first_data_block).

An inode is 128 bytes, or more, of which only the first 128 are ours to know, but for what
`Inode.extra` says. Its 15 block numbers are 12 of data, then one that leads to a block of numbers, to
a block of those, and to a block of those. 0 is a hole. `blocks` counts sectors of 512 bytes with all
indirect blocks and the attributes' block. A symbolic link of less than 60 bytes is in the numbers' place.

A directory is a file of blocks; each is filled by entries whose `rec_len` lead from one to the next. An
entry with inode 0 is free.

Limitations: no 64-bit block numbers, no extents, no checksums, no inline data, no quota; those are ext4's.
Source: "The Second Extended File System - Internal Layout" (D. Poirier), and the kernel's documentation
of ext4's data structures, as far as they are ext2's.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from odirect.base.layout import layout

MAGIC = 0xEF53
SUPERBLOCK_ADDR = 1024
SUPERBLOCK_BYTES = 1024
BLOCK_BYTES = (1024, 2048, 4096)

#: Inodes with a fixed meaning.
BAD_BLOCKS_INODE = 1
ROOT_INODE = 2
RESIZE_INODE = 7
#: The first inode for files in revision 0; in revision 1 the superblock says it.
FIRST_INODE_REV0 = 11
GOOD_OLD_INODE_BYTES = 128

DIRECT_BLOCKS = 12
#: Places in an inode of the roots of the three trees of block numbers.
INDIRECT, DOUBLE_INDIRECT, TRIPLE_INDIRECT = 12, 13, 14
SECTOR_BYTES = 512
#: A symbolic link shorter than this is kept in the inode (with its closing zero it fills the place).
FAST_SYMLINK_BYTES = 60
NAME_BYTES = 255
LINK_MAX = 32000
XATTR_MAGIC = 0xEA020000

REV_ORIGINAL, REV_DYNAMIC = 0, 1


class State(enum.IntFlag):
    """`Superblock.state`."""

    CLEAN = 1
    ERRORS = 2
    ORPHANS = 4


class Compat(enum.IntFlag):
    """Features that whoever does not know them may ignore."""

    DIR_PREALLOC = 0x1
    IMAGIC_INODES = 0x2
    HAS_JOURNAL = 0x4
    EXT_ATTR = 0x8
    RESIZE_INODE = 0x10
    DIR_INDEX = 0x20
    SPARSE_SUPER2 = 0x200
    FAST_COMMIT = 0x400
    STABLE_INODES = 0x800
    ORPHAN_FILE = 0x1000


class ReadOnlyCompat(enum.IntFlag):
    """Features that whoever does not know them may read past, but not write."""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    BTREE_DIR = 0x4
    HUGE_FILE = 0x8
    GDT_CSUM = 0x10
    DIR_NLINK = 0x20
    EXTRA_ISIZE = 0x40
    QUOTA = 0x100
    BIGALLOC = 0x200
    METADATA_CSUM = 0x400
    REPLICA = 0x800
    READONLY = 0x1000
    PROJECT = 0x2000
    SHARED_BLOCKS = 0x4000
    VERITY = 0x8000
    ORPHAN_PRESENT = 0x10000


class Incompat(enum.IntFlag):
    """Features that whoever does not know them must leave alone."""

    COMPRESSION = 0x1
    FILETYPE = 0x2
    RECOVER = 0x4
    JOURNAL_DEV = 0x8
    META_BG = 0x10
    EXTENTS = 0x40
    SIXTYFOUR_BIT = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    EA_INODE = 0x400
    DIRDATA = 0x1000
    CSUM_SEED = 0x2000
    LARGEDIR = 0x4000
    INLINE_DATA = 0x8000
    ENCRYPT = 0x10000
    CASEFOLD = 0x20000


class InodeFlags(enum.IntFlag):
    """`Inode.flags`."""

    SECRM = 0x1
    UNRM = 0x2
    COMPR = 0x4
    SYNC = 0x8
    IMMUTABLE = 0x10
    APPEND = 0x20
    NODUMP = 0x40
    NOATIME = 0x80
    INDEX = 0x1000
    IMAGIC = 0x2000
    DIRSYNC = 0x10000
    TOPDIR = 0x20000
    EXTENTS = 0x80000


class FileType(enum.IntEnum):
    """`Entry.file_type`, where the feature FILETYPE is on."""

    UNKNOWN = 0
    REGULAR = 1
    DIRECTORY = 2
    CHARACTER = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    SYMLINK = 7


class XattrIndex(enum.IntEnum):
    """The prefix of an extended attribute's name, as a number."""

    USER = 1
    POSIX_ACL_ACCESS = 2
    POSIX_ACL_DEFAULT = 3
    TRUSTED = 4
    SECURITY = 6
    SYSTEM = 7


class Superblock(NamedTuple):
    """The volume. Counts in blocks or inodes, times in seconds since 1970."""

    inodes_count: int
    blocks_count: int
    r_blocks_count: int
    free_blocks_count: int
    free_inodes_count: int
    first_data_block: int
    log_block_size: int
    log_cluster_size: int
    blocks_per_group: int
    clusters_per_group: int
    inodes_per_group: int
    mtime: int
    wtime: int
    mnt_count: int
    max_mnt_count: int
    magic: int
    state: int
    errors: int
    minor_rev_level: int
    lastcheck: int
    checkinterval: int
    creator_os: int
    rev_level: int
    def_resuid: int
    def_resgid: int
    first_ino: int
    inode_size: int
    block_group_nr: int
    feature_compat: int
    feature_incompat: int
    feature_ro_compat: int
    uuid: bytes
    volume_name: bytes
    last_mounted: bytes
    algorithm_usage_bitmap: int
    prealloc_blocks: int
    prealloc_dir_blocks: int
    reserved_gdt_blocks: int
    journal_uuid: bytes
    journal_inum: int
    journal_dev: int
    last_orphan: int
    hash_seed: bytes
    def_hash_version: int
    jnl_backup_type: int
    desc_size: int
    default_mount_opts: int
    first_meta_bg: int
    mkfs_time: int
    jnl_blocks: bytes
    blocks_count_hi: int
    r_blocks_count_hi: int
    free_blocks_hi: int
    min_extra_isize: int
    want_extra_isize: int
    flags: int
    rest: bytes


SUPERBLOCK = layout(
    Superblock,
    "<13I6H4I2HI2H3I16s16s64sI2BH16s3I16s2BH3I68s3I2HI668s",
    SUPERBLOCK_BYTES,
)


class GroupDescriptor(NamedTuple):
    """A group: where its bitmaps and inodes are, and what is free in it."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_blocks_count: int
    free_inodes_count: int
    used_dirs_count: int
    flags: int
    reserved: bytes


GROUP_DESCRIPTOR = layout(GroupDescriptor, "<3I4H12s", 32)


class Inode(NamedTuple):
    """The 128 bytes that every inode has.

    size_high is the directory's ACL in revision 0. blocks counts sectors. dtime is the time of
    deletion, or the next orphan. block is the numbers' place, 60 bytes, whatever is in it.
    """

    mode: int
    uid: int
    size: int
    atime: int
    ctime: int
    mtime: int
    dtime: int
    gid: int
    links_count: int
    blocks: int
    flags: int
    osd1: int
    block: bytes
    generation: int
    file_acl: int
    size_high: int
    faddr: int
    blocks_high: int
    file_acl_high: int
    uid_high: int
    gid_high: int
    checksum_lo: int
    reserved: int


INODE = layout(Inode, "<2H5I2H3I60s4I4H2H", 128)


class Extra(NamedTuple):
    """What follows the 128 bytes where inodes are larger and `extra_isize` says that it is there.

    The upper parts of times: two bits of the epoch, 30 of nanoseconds. Source: ext4's documentation.
    """

    extra_isize: int
    checksum_hi: int
    ctime_extra: int
    mtime_extra: int
    atime_extra: int
    crtime: int
    crtime_extra: int


EXTRA = layout(Extra, "<2H5I", 24)


class EntryHead(NamedTuple):
    """What a directory's entry begins with; the name follows. Without FILETYPE, file_type is the
    length's upper byte, which is 0."""

    inode: int
    rec_len: int
    name_len: int
    file_type: int


ENTRY_HEAD = layout(EntryHead, "<IHBB", 8)


class XattrHeader(NamedTuple):
    """What a block of extended attributes begins with; entries follow, values fill it from its end."""

    magic: int
    refcount: int
    blocks: int
    hash: int
    checksum: int
    reserved: bytes


XATTR_HEADER = layout(XattrHeader, "<5I12s", 32)


class XattrEntry(NamedTuple):
    """An attribute; its name follows, padded to 4 bytes. Four bytes of zero end the list."""

    name_len: int
    name_index: int
    value_offs: int
    value_inum: int
    value_size: int
    hash: int


XATTR_ENTRY = layout(XattrEntry, "<2BH3I", 16)


def entry_bytes(name_bytes: int) -> int:
    """What an entry with a name of that length takes: 8 bytes and the name, up to a multiple of 4."""
    return (name_bytes + 11) & ~3
