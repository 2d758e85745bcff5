"""A volume's facts: read from real ones, and never believed where they cannot be."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.reading_kit import PLACE, Blocks, Image, make, read_bytes, searched, write_bytes
from tests.loops import mounted, needs_root, needs_tool, run

from odirect.base.errors import CorruptionError, UnsupportedError
from odirect.fs.ext2.format import GROUP_DESCRIPTOR, SUPERBLOCK, Compat, Incompat, ReadOnlyCompat, State
from odirect.fs.ext2.geometry import Geometry, read_geometry

#: mke2fs' options, the image's size, and what is special.
PROFILES = {
    "1k": (["-b", "1024"], 40 << 20),
    "2k": (["-b", "2048", "-I", "128"], 40 << 20),
    "4k": (["-b", "4096"], 300 << 20),
    "rev0": (["-b", "1024", "-r", "0"], 20 << 20),
    "all copies": (["-b", "1024", "-O", "^sparse_super,^resize_inode"], 60 << 20),
    "small groups": (["-b", "1024", "-g", "256", "-N", "2000", "-O", "^resize_inode"], 12 << 20),
    "two copies": (["-b", "1024", "-O", "sparse_super2,^resize_inode"], 60 << 20),
    "large inodes": (["-b", "4096", "-I", "4096", "-N", "64"], 20 << 20),
    "untyped": (["-b", "2048", "-O", "^filetype"], 20 << 20),
    "odd end": (["-b", "1024"], (20 << 20) + 700 * 1024 + 513),
}


@pytest.fixture(scope="module", params=PROFILES)
def volume(request, scratch_root: Path):
    options, size = PROFILES[request.param]
    path = make(scratch_root / f"geometry-{request.param.replace(' ', '-')}.img", size, *options)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def sound(scratch_root: Path):
    """(superblock, its bytes, the device's size) of a small good volume."""
    path = make(scratch_root / "geometry-sound.img", 20 << 20, "-b", "1024")
    raw = read_bytes(path, 1024, 1024)
    path.unlink()
    return SUPERBLOCK.read(raw, 0, PLACE), raw, 20 << 20


def dumped(path: Path) -> str:
    return run("dumpe2fs", path)


def number(text: str, label: str) -> int:
    return int(searched(rf"^{re.escape(label)}:\s+(\d+)", text).group(1))


# --- real volumes --------------------------------------------------------------------------------


def test_facts_are_those_of_dumpe2fs(volume: Path):
    text, geometry = dumped(volume), Image(volume).geometry
    for label, ours in {
        "Inode count": geometry.inodes_count,
        "Block count": geometry.blocks_count,
        "First block": geometry.first_data_block,
        "Block size": geometry.block_bytes,
        "Blocks per group": geometry.blocks_per_group,
        "Inodes per group": geometry.inodes_per_group,
        "Inode blocks per group": geometry.table_blocks,
    }.items():
        assert ours == number(text, label), label
    assert geometry.groups == len(re.findall(r"^Group \d+:", text, re.M))
    if "dynamic" in text:
        assert geometry.first_inode == number(text, "First inode")
        assert geometry.inode_bytes == number(text, "Inode size")
    else:
        assert (geometry.first_inode, geometry.inode_bytes) == (11, 128)
    features = searched(r"Filesystem features:(.*)", text).group(1)
    assert geometry.has_file_type == ("filetype" in features)
    assert geometry.has_large_file == ("large_file" in features)
    assert geometry.sparse_super == bool(re.search(r"sparse_super\b", features))
    assert geometry.read_refusal() is None
    assert geometry.write_refusal() is None


def ranges(text: str) -> list[range]:
    found = [part.split("-") for part in re.findall(r"\d+(?:-\d+)?", text)]
    return [range(int(part[0]), int(part[-1]) + 1) for part in found]


def test_fixed_blocks_are_those_of_dumpe2fs(volume: Path):
    """Every block of the volume: fixed exactly where dumpe2fs puts something fixed."""
    text, geometry = dumped(volume), Image(volume).geometry
    fixed: set[int] = set(range(geometry.first_data_block))
    for group, part in enumerate(re.split(r"^Group \d+:", text, flags=re.M)[1:]):
        first, last = searched(r"\(Blocks (\d+)-(\d+)\)", part).groups()
        assert geometry.first_block_of_group(group) == int(first)
        assert geometry.blocks_in_group(group) == int(last) - int(first) + 1
        assert geometry.group_of_block(int(first)) == geometry.group_of_block(int(last)) == group
        assert geometry.has_super(group) == ("superblock at" in part)
        for what in ("superblock at", "Group descriptors at", "Reserved GDT blocks at"):
            for found in re.findall(rf"{what} ([\d-]+)", part):
                for blocks in ranges(found):
                    fixed.update(blocks)
        for what, ours in (
            ("Block bitmap", geometry.block_bitmap(group)),
            ("Inode bitmap", geometry.inode_bitmap(group)),
            ("Inode table", geometry.inode_table(group)),
        ):
            (blocks,) = ranges(searched(rf"{what} at ([\d-]+)", part).group(1))
            assert blocks.start == ours
            fixed.update(blocks)
    blocks = range(-1, geometry.blocks_count + 2)
    assert {block for block in blocks if geometry.is_fixed(block)} == fixed | {-1} | set(blocks[-2:])
    for block in (*list(fixed)[:5], geometry.blocks_count, 0xFFFFFFFF):
        with pytest.raises(CorruptionError, match=f"test at byte 0: found block {block}, expected a block for files"):
            geometry.check_data_block(block, PLACE)


def test_many_blocks_are_checked_as_each(volume: Path):
    import numpy

    geometry = Image(volume).geometry
    for owner in (0, 1, 7, 12):
        every = numpy.arange(geometry.blocks_count + 3, dtype="<u4")
        allowed = [owner_may(geometry, int(block), owner) for block in every]
        assert geometry.first_wrong(every[[index for index, yes in enumerate(allowed) if yes]], owner) == -1
        for index in [index for index, yes in enumerate(allowed) if not yes][:: max(1, len(allowed) // 200)]:
            if index:
                pair = numpy.array([0, allowed.index(True), index], "<u4")
                assert geometry.first_wrong(pair, owner) == 2, (owner, index)
    assert geometry.first_wrong(numpy.zeros(9, "<u4")) == -1


def owner_may(geometry: Geometry, block: int, owner: int) -> bool:
    try:
        geometry.check_data_block(block, PLACE, owner)
    except CorruptionError:
        return False
    return True


def test_inodes_are_where_debugfs_says(volume: Path):
    image = Image(volume)
    geometry = image.geometry
    numbers = {1, 2, geometry.first_inode, geometry.inodes_per_group, geometry.inodes_per_group + 1}
    for inode in [*sorted(numbers & set(range(1, geometry.inodes_count + 1))), geometry.inodes_count]:
        said = run("debugfs", "-R", f"imap <{inode}>", volume)
        block, offset = searched(r"located at block (\d+), offset (0x[0-9a-f]+)", said).groups()
        assert geometry.inode_place(image.cache, inode) == (int(block), int(offset, 16))
        # The same without the tables known, by the descriptor.
        fresh = Geometry(geometry.superblock, "image")
        assert fresh.inode_place(image.cache, inode) == (int(block), int(offset, 16))
        addr = int(block) * geometry.block_bytes + int(offset, 16)
        assert geometry.inode_structure(inode) == ("image", f"inode {inode}", addr)
    every = range(1, geometry.inodes_count + 1, 7)
    blocks, offsets = geometry.inode_places(numpy.array(every))
    places = zip(blocks.tolist(), offsets.tolist(), strict=True)
    assert list(places) == [geometry.inode_place(image.cache, inode) for inode in every]
    with pytest.raises(RuntimeError):
        Geometry(geometry.superblock, "image").inode_places(numpy.array(every))
    for wrong in (0, -1, geometry.inodes_count + 1):
        with pytest.raises(CorruptionError, match=f"found inode {wrong}, expected a number from 1 to"):
            geometry.inode_place(image.cache, wrong)


def test_load_fixed_names_all_blocks_at_once(volume: Path):
    image = Image(volume)
    assert image.cache.loads == [tuple(image.geometry.descriptor_blocks)]
    with pytest.raises(RuntimeError, match="load_fixed"):
        Geometry(image.geometry.superblock, "image").is_fixed(5000)


def test_the_longest_file_is_the_kernels(scratch: Path):
    """Cutting a file at our limit works, and one byte further does not."""
    needs_root()
    for block in ("1024", "2048", "4096"):
        path = make(scratch / f"{block}.img", 4 << 20, "-b", block, "-I", "128")
        most = Image(path).geometry.max_file_bytes
        with mounted(path, "ext2") as point:
            file = point / "f"
            file.touch()
            os.truncate(file, most)
            with pytest.raises(OSError, match="too large"):
                os.truncate(file, most + 1)


# --- the ladder ----------------------------------------------------------------------------------


def opened(superblock, device_bytes: int = 20 << 20) -> Geometry:
    return read_geometry(SUPERBLOCK.pack(superblock), name="vol", device_bytes=device_bytes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"magic": 0xEF52}, "magic 0xef52, expected 0xef53"),
        ({"log_block_size": 7}, "log_block_size 7"),
        ({"log_block_size": 0xFFFFFFFF, "log_cluster_size": 0xFFFFFFFF}, "log_block_size"),
        ({"blocks_per_group": 0}, "blocks_per_group 0"),
        ({"blocks_per_group": 8193}, "blocks_per_group 8193, expected 1 to 8192"),
        ({"inodes_per_group": 0}, "inodes_per_group 0"),
        ({"inodes_per_group": 8193}, "inodes_per_group 8193"),
        ({"inodes_per_group": 1024}, "inodes_count"),
        ({"first_data_block": 0}, "first_data_block 0, expected 1 for blocks of 1024"),
        ({"first_data_block": 2}, "first_data_block 2"),
        ({"blocks_count": 0}, "blocks_count 0"),
        ({"blocks_count": 1}, "blocks_count 1"),
        ({"blocks_count": 20481}, "blocks_count 20481 of 1024 bytes, expected no more than the device's 20971520"),
        ({"blocks_count": 16400, "free_blocks_count": 0}, "group 2 of 15 blocks"),
        ({"inodes_count": 0}, "first_ino 11, expected 11 to 0"),
        ({"inodes_count": 5121}, "inodes_count 5121"),
        ({"inode_size": 0}, "inode_size 0"),
        ({"inode_size": 64}, "inode_size 64"),
        ({"inode_size": 192}, "inode_size 192"),
        ({"inode_size": 2048}, "inode_size 2048, expected a power of two from 128 to 1024"),
        ({"first_ino": 3}, "first_ino 3"),
        ({"r_blocks_count": 20482}, "r_blocks_count 20482"),
        ({"free_blocks_count": 20482}, "free_blocks_count 20482"),
        ({"free_inodes_count": 0xFFFFFFFF}, "free_inodes_count"),
        ({"reserved_gdt_blocks": 257}, "reserved_gdt_blocks 257"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_believed(sound, changes, field):
    with pytest.raises(CorruptionError, match=f"^vol: superblock at byte 1024: found .*({field})|{field}") as caught:
        opened(sound[0]._replace(**changes))
    assert "superblock at byte 1024" in str(caught.value)


def test_a_cut_device_and_cut_bytes(sound):
    superblock, raw, size = sound
    with pytest.raises(CorruptionError, match="was it cut short"):
        opened(superblock, size - 1024)
    with pytest.raises(CorruptionError, match="1023 bytes"):
        read_geometry(raw[:1023], name="vol", device_bytes=size)


@pytest.mark.parametrize("flag", [flag for flag in Incompat if flag != Incompat.FILETYPE], ids=lambda flag: flag.name)
def test_unknown_features_are_refused_by_name(sound, flag):
    """F34: what is not ours to read is named; a journal that must be replayed too."""
    names = {
        Incompat.RECOVER: "needs_recovery.*e2fsck",
        Incompat.EXTENTS: r"extents \(ext4\)",
        Incompat.SIXTYFOUR_BIT: r"64bit \(ext4\)",
        Incompat.META_BG: "meta_bg",
        Incompat.FLEX_BG: "flex_bg",
        Incompat.CSUM_SEED: "metadata_csum_seed",
        Incompat.LARGEDIR: "large_dir",
        Incompat.COMPRESSION: "compression",
    }
    superblock = sound[0]
    superblock = superblock._replace(feature_incompat=superblock.feature_incompat | flag)
    with pytest.raises(UnsupportedError, match=names.get(flag, flag.name.lower())) as caught:
        opened(superblock)
    assert caught.value.filename == "vol"


def test_several_features_and_those_without_a_name(sound):
    superblock = sound[0]._replace(feature_incompat=0x2 | 0x40 | 0x80 | 0x800000)
    with pytest.raises(UnsupportedError, match=r"extents \(ext4\), 64bit \(ext4\), incompatible feature 0x800000"):
        opened(superblock)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feature_compat": Compat.HAS_JOURNAL}, r"journal \(ext3\)"),
        ({"feature_ro_compat": 1 | ReadOnlyCompat.METADATA_CSUM}, r"metadata_csum \(ext4\)"),
        ({"feature_ro_compat": 1 | ReadOnlyCompat.HUGE_FILE | 0x400000}, "huge_file .*feature 0x400000"),
        ({"feature_ro_compat": 1 | ReadOnlyCompat.BTREE_DIR}, "btree_dir"),
        ({"state": 0}, "not closed well.*e2fsck"),
        ({"state": State.CLEAN | State.ERRORS}, "errors.*e2fsck"),
        ({"state": State.CLEAN | State.ORPHANS}, "deleted files.*e2fsck"),
        ({"last_orphan": 12}, "deleted files.*e2fsck"),
        ({"rev_level": 0, "inode_size": 0, "first_ino": 0}, "revision 0"),
    ],
)
def test_readable_but_not_writable(sound, changes, reason):
    """F34: what may only be read says why, and what to do."""
    superblock = sound[0]
    if "rev_level" in changes:
        superblock = superblock._replace(inodes_per_group=superblock.inodes_per_group)
    geometry = opened(superblock._replace(**changes))
    assert geometry.read_refusal() is None
    searched(reason, geometry.write_refusal() or "")


def test_compatible_features_do_not_matter(sound):
    superblock = sound[0]._replace(feature_compat=0xFFFFFFFF & ~int(Compat.HAS_JOURNAL))
    assert opened(superblock).write_refusal() is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rev_level": 2}, "revision 2"),
        ({"log_block_size": 3, "log_cluster_size": 3}, "blocks of 8192 bytes"),
        ({"log_cluster_size": 1}, "fragments or clusters"),
    ],
)
def test_other_kinds_of_ext2(sound, changes, reason):
    with pytest.raises(UnsupportedError, match=reason):
        opened(sound[0]._replace(**changes))


def test_ext3_is_read_when_its_journal_is_clean(scratch: Path):
    path = scratch / "ext3.img"
    make(path, 16 << 20, "-b", "1024", kind="ext3")
    geometry = Image(path).geometry
    assert "journal" in (geometry.write_refusal() or "")
    run("debugfs", "-w", "-R", "feature needs_recovery", path)
    with pytest.raises(UnsupportedError, match="replayed first"):
        Image(path)


@pytest.mark.parametrize("features", ["", "^extent,^64bit,^flex_bg"])
def test_ext4_is_refused_or_read(scratch: Path, features: str):
    """With ext4's defaults it is refused; with nothing of it that changes the layout, its checksums are read past."""
    path = make(scratch / "ext4.img", 16 << 20, *(["-O", features] if features else []), kind="ext4")
    if not features:
        with pytest.raises(UnsupportedError, match=r"extents.*flex_bg"):
            Image(path)
    else:
        geometry = Image(path).geometry
        assert geometry.write_refusal() is not None


# --- descriptors that lie ------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["block_bitmap", "inode_bitmap", "inode_table"])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_descriptors_that_lead_elsewhere(scratch: Path, field: str, group: int):
    path = make(scratch / "groups.img", 20 << 20, "-b", "1024")
    image = Image(path)
    geometry = image.geometry
    block, offset = geometry.descriptor_place(group)
    addr = block * 1024 + offset
    good: Any = geometry.descriptor(image.cache, group)
    last = geometry.first_block_of_group(group) + geometry.blocks_in_group(group) - 1
    wrong = [0, 1, last + 1, geometry.blocks_count, 0xFFFFFFFF]
    wrong += [geometry.first_block_of_group(group)] if geometry.has_super(group) else []
    wrong += [good.inode_table + 1] if field != "inode_table" else [last, good.block_bitmap]
    wrong += [good.inode_bitmap] if field == "block_bitmap" else []
    for value in wrong:
        write_bytes(path, addr, GROUP_DESCRIPTOR.pack(good._replace(**{field: value})))
        with pytest.raises(CorruptionError, match=f"descriptor of group {group} at byte {addr}: found .*{value}"):
            Image(path)
        cache: Any = Blocks(path, 1024)
        with pytest.raises(CorruptionError, match=f"descriptor of group {group}"):
            cache.load(lambda cache=cache: geometry.descriptor(cache, group))
    write_bytes(path, addr, GROUP_DESCRIPTOR.pack(good))
    Image(path)


# --- anything ------------------------------------------------------------------------------------


@given(raw=st.binary(min_size=1024, max_size=1024), size=st.integers(0, 1 << 45))
def test_any_bytes_give_a_volume_or_an_error(raw: bytes, size: int):
    try:
        read_geometry(raw, name="vol", device_bytes=size)
    except (CorruptionError, UnsupportedError):
        pass


@settings(max_examples=400)
@given(data=st.data(), size=st.one_of(st.just(20 << 20), st.integers(0, 1 << 45)))
def test_any_flipped_bits_give_a_volume_or_an_error(sound, data: st.DataObject, size: int):
    """Whatever is read can be asked everything, and says nothing that is outside the volume."""
    raw = bytearray(sound[1])
    for bit in data.draw(st.lists(st.integers(0, 0x170 * 8 - 1), min_size=1, max_size=6)):
        raw[bit // 8] ^= 1 << bit % 8
    try:
        geometry = read_geometry(raw, name="vol", device_bytes=size)
    except (CorruptionError, UnsupportedError):
        return
    assert geometry.blocks_count * geometry.block_bytes <= size
    assert geometry.descriptor_blocks.stop <= geometry.blocks_count
    assert geometry.groups * geometry.inodes_per_group == geometry.inodes_count
    geometry.write_refusal()
    last = geometry.groups - 1
    assert geometry.first_block_of_group(last) + geometry.blocks_in_group(last) == geometry.blocks_count


@settings(max_examples=100)
@given(data=st.data())
def test_any_descriptors_give_fixed_blocks_or_an_error(sound, data: st.DataObject):
    _, raw, size = sound
    geometry = read_geometry(raw, name="vol", device_bytes=size)
    image = bytearray(4096)
    for group in range(geometry.groups):
        _, offset = geometry.descriptor_place(group)
        value = st.integers(0, 20481) | st.integers(0, 0xFFFFFFFF)
        first = geometry.first_block_of_group(group)
        place = st.integers(first, first + geometry.blocks_in_group(group)) | value
        found = GROUP_DESCRIPTOR.kind(*(data.draw(place) for _ in range(3)), 0, 0, 0, 0, bytes(12))
        GROUP_DESCRIPTOR.write(found, image, 2048 + offset)
    cache: Any = Blocks(image, 1024)
    try:
        cache.load(lambda: geometry.load_fixed(cache))
    except CorruptionError:
        return
    for group in range(geometry.groups):
        assert geometry.is_fixed(geometry.block_bitmap(group))
        assert geometry.group_of_block(geometry.inode_table(group)) == group


def test_e2fsck_agrees_about_the_profiles(volume: Path):
    """The profiles are sound volumes to begin with."""
    done = subprocess.run([needs_tool("e2fsck"), "-fn", volume], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
