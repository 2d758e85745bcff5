"""The records of ext2 against the tools that know them: every field is set by debugfs, and read by us."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fs.ext2.reading_kit import PLACE, Image, debugfs, inode_number, make, read_bytes
from tests.loops import run

from odirect.base.errors import CorruptionError
from odirect.base.layout import Layout
from odirect.fs.ext2.format import (
    ENTRY_HEAD,
    EXTRA,
    GROUP_DESCRIPTOR,
    INODE,
    SUPERBLOCK,
    XATTR_ENTRY,
    XATTR_HEADER,
    entry_bytes,
)

#: debugfs' names of fields, and the value that each is set to; ours where they differ.
SUPER_FIELDS = {
    "inodes_count": 0x11223344,
    "blocks_count": 0x11223345,
    "r_blocks_count": 0x11223346,
    "free_blocks_count": 0x11223347,
    "free_inodes_count": 0x11223348,
    "first_data_block": 0x11223349,
    "log_block_size": 1,
    "log_cluster_size": 0x1122334B,
    "blocks_per_group": 0x1122334C,
    "clusters_per_group": 0x1122334D,
    "inodes_per_group": 0x1122334E,
    "mnt_count": 0x1122,
    "max_mnt_count": 0x1123,
    "state": 0x1125,
    "errors": 0x1126,
    "minor_rev_level": 0x1127,
    "checkinterval": 0x11223353,
    "creator_os": 0x11223354,
    "rev_level": 0x11223355,
    "def_resuid": 0x1128,
    "def_resgid": 0x1129,
    "first_ino": 0x11223356,
    "inode_size": 0x112A,
    "feature_compat": 0x11223357,
    "feature_incompat": 0x11223358,
    "feature_ro_compat": 0x11223359,
    "algorithm_usage_bitmap": 0x1122335A,
    "prealloc_blocks": 0x12,
    "prealloc_dir_blocks": 0x13,
    "reserved_gdt_blocks": 0x112C,
    "journal_inum": 0x1122335B,
    "journal_dev": 0x1122335C,
    "last_orphan": 0x1122335D,
    "jnl_backup_type": 0x14,
    "desc_size": 0x112D,
    "default_mount_opts": 0x1122335E,
    "first_meta_bg": 0x1122335F,
    "min_extra_isize": 0x112E,
    "want_extra_isize": 0x112F,
    "flags": 0x11223360,
}
INODE_FIELDS = {
    "mode": 0x81A5,
    "uid": 0x11221123,
    "size": 0x11223344,
    "gid": 0x11241125,
    "blocks": 0x1122,
    "file_acl": 0x1128,
    "links_count": 0x1124,
    "flags": 0x11223345,
    "generation": 0x11223346,
    "faddr": 0x11223347,
}


def only_change(before: Any, after: Any) -> list[str]:
    return [name for name in before._fields if getattr(before, name) != getattr(after, name)]


@pytest.fixture
def image(scratch: Path) -> Path:
    return make(scratch / "format.img", 4 << 20, "-b", "1024", "-I", "256")


def superblock(path: Path):
    return SUPERBLOCK.read(read_bytes(path, 1024, 1024), 0, PLACE)


def test_superblock_fields_lie_where_debugfs_puts_them(image: Path):
    """Each field is set alone; the backups are left alone, so the volume stays readable for debugfs."""
    pristine = read_bytes(image, 0, 4096)
    for name, value in SUPER_FIELDS.items():
        before = superblock(image)
        run("debugfs", "-w", "-R", f"set_super_value {name} {value:#x}", image)
        after = superblock(image)
        assert set(only_change(before, after)) - {"wtime", "rest"} == {name}
        assert getattr(after, name) == value, name
        with open(image, "r+b") as file:
            file.write(pristine)


def test_superblock_texts_and_identities(image: Path):
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    run("debugfs", "-w", "-R", f"ssv uuid {uuid}", image)
    run("debugfs", "-w", "-R", "ssv volume_name a-label", image)
    seed = uuid.replace("0", "8")
    run("debugfs", "-w", "-R", f"ssv hash_seed {seed}", image)
    run("debugfs", "-w", "-R", "ssv last_mounted /some/where", image)
    found = superblock(image)
    assert found.uuid.hex() == uuid.replace("-", "")
    assert found.hash_seed.hex() == seed.replace("-", "")
    assert found.volume_name.rstrip(b"\0") == b"a-label"
    assert found.last_mounted.rstrip(b"\0") == b"/some/where"
    run("debugfs", "-w", "-R", "ssv backup_bgs[1] 0x1122", image)
    assert only_change(found, superblock(image)) in (["rest"], ["wtime", "rest"])


def test_copies_say_in_which_group_they_are(scratch: Path):
    image = make(scratch / "groups.img", 20 << 20, "-b", "1024")
    assert SUPERBLOCK.read(read_bytes(image, 8193 * 1024, 1024), 0, PLACE).block_group_nr == 1


def test_superblock_times(image: Path):
    for field in ("mtime", "lastcheck", "mkfs_time"):
        before = superblock(image)
        run("debugfs", "-w", "-R", f"ssv {field} @0x41424344", image)
        after = superblock(image)
        assert getattr(after, field) == 0x41424344
        assert set(only_change(before, after)) - {"wtime", "rest"} <= {field}


def test_descriptor_fields_lie_where_debugfs_puts_them(image: Path):
    for name, value in {
        "block_bitmap": 4001,
        "inode_bitmap": 4002,
        "inode_table": 4003,
        "free_blocks_count": 0x1122,
        "free_inodes_count": 0x1123,
        "used_dirs_count": 0x1124,
        "flags": 0x3,
    }.items():
        pristine = read_bytes(image, 0, 4096)
        before = GROUP_DESCRIPTOR.read(pristine, 2048, PLACE)
        run("debugfs", "-w", "-R", f"set_block_group 0 {name} {value}", image)
        after = GROUP_DESCRIPTOR.read(read_bytes(image, 0, 4096), 2048, PLACE)
        assert set(only_change(before, after)) <= {name, "reserved"}, name
        assert getattr(after, name) == value
        with open(image, "r+b") as file:
            file.write(pristine)


def test_inode_fields_lie_where_debugfs_puts_them(image: Path):
    debugfs(image, f"write {__file__} f")
    opened = Image(image)
    number = inode_number(image, "f")
    for name, value in INODE_FIELDS.items():
        before = INODE.read(opened.raw_inode(number), 0, PLACE)
        run("debugfs", "-w", "-R", f"sif <{number}> {name} {value:#x}", image)
        after = INODE.read(opened.raw_inode(number), 0, PLACE)
        assert set(only_change(before, after)) <= {name, f"{name}_high"}, name
        high = getattr(after, f"{name}_high") if name in ("uid", "gid") else 0
        assert getattr(after, name) | high << 16 == value
    for name in ("atime", "ctime", "mtime", "dtime"):
        run("debugfs", "-w", "-R", f"sif <{number}> {name} @0x41424344", image)
        assert getattr(INODE.read(opened.raw_inode(number), 0, PLACE), name) == 0x41424344
    run("debugfs", "-w", "-R", f"sif <{number}> block[3] 0x1234", image)
    after = INODE.read(opened.raw_inode(number), 0, PLACE)
    assert struct.unpack("<15I", after.block)[3] == 0x1234
    for field in ("ctime_extra", "mtime_extra", "atime_extra", "crtime_extra"):
        run("debugfs", "-w", "-R", f"sif <{number}> {field} 0x01020304", image)
        assert getattr(EXTRA.read(opened.raw_inode(number), 128, PLACE), field) == 0x01020304
    run("debugfs", "-w", "-R", f"sif <{number}> crtime @0x51525354", image)
    assert EXTRA.read(opened.raw_inode(number), 128, PLACE).crtime == 0x51525354


def test_entries_round_up():
    assert [entry_bytes(length) for length in (1, 4, 5, 255)] == [12, 12, 16, 264]


@pytest.mark.parametrize(
    "layout",
    [SUPERBLOCK, GROUP_DESCRIPTOR, INODE, EXTRA, ENTRY_HEAD, XATTR_HEADER, XATTR_ENTRY],
    ids=lambda one: one.kind.__name__,
)
@given(data=st.data())
def test_records_are_read_and_written_back(layout: Layout, data: st.DataObject):
    """Any bytes are a record, and the record is those bytes; a cut one is a CorruptionError."""
    raw = data.draw(st.binary(min_size=layout.size, max_size=layout.size))
    assert layout.pack(layout.read(raw, 0, PLACE)) == raw
    with pytest.raises(CorruptionError, match="at byte 0"):
        layout.read(raw[:-1], 0, PLACE)
