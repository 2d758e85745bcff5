"""Empty ext2 volumes: mke2fs's own bytes, e2fsck's and the kernel's judgement, and power cuts meanwhile."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fs.ext2.make_kit import (
    SEED,
    UUID,
    accepted,
    data_blocks,
    differing_blocks,
    make_file,
    make_on,
    mke2fs,
    over,
)
from tests.loops import mounted

from odirect.base.errors import DeviceError, NoSpaceError, UnsupportedError
from odirect.block.bio import FLUSH, WRITE, ZERO, Bio
from odirect.block.device import Limits
from odirect.block.filters.log_writes import LogWrites
from odirect.block.memory import MemoryDevice
from odirect.fs.ext2 import mkfs
from odirect.fs.ext2.format import ENTRY_HEAD, SUPERBLOCK, EntryHead, Superblock
from odirect.testing.devices import OddDevice

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def tool_options(options: dict[str, Any]) -> list[str]:
    words = ["-L", options.get("label", b"").decode()]
    if options.get("revision", 1):
        words += ["-O", "^dir_index" if options.get("resize_inode", True) else "^dir_index,^resize_inode"]
    else:
        words += ["-r", "0"]
    for name, option in (("block_bytes", "-b"), ("inode_bytes", "-I"), ("bytes_per_inode", "-i")):
        if options.get(name):
            words += [option, str(options[name])]
    if "reserved_percent" in options:
        words += ["-m", str(options["reserved_percent"])]
    return words


def planned(size: int, options: dict[str, Any]) -> mkfs.Plan:
    return mkfs.plan(size, **{name: value for name, value in options.items() if name != "label"})


def directory_blocks(plan: mkfs.Plan) -> range:
    """The blocks of the root directory and of lost+found."""
    root = plan.first_block(0) + plan.overhead(0)
    return range(root, root + 1 + min(16 * KIB // plan.block_bytes, 12))


def agrees_with_mke2fs(scratch: Path, size: int, options: dict[str, Any]) -> None:
    """Make it both ways: both refuse, or every byte but those of directories is the same."""
    ours, theirs = scratch / "ours.img", scratch / "theirs.img"
    refusal = mke2fs(theirs, size, *tool_options(options))
    try:
        superblock = make_file(ours, size, **options)
    except (NoSpaceError, ValueError) as error:
        assert refusal, f"mke2fs makes what is refused here: {error}"
        return
    accepted(ours)
    if refusal:
        # mke2fs fails half-way where it counted fewer inodes than it needs itself.
        assert "Could not allocate inode" in refusal
        return
    block_bytes = 1024 << superblock.log_block_size
    different = set(differing_blocks(ours, theirs, block_bytes)) - set(directory_blocks(planned(size, options)))
    assert not different


# --- held against mke2fs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64 * KIB, {}),
        (128 * KIB, {}),
        (MIB, {"label": b"sixteen bytes ok"}),
        (3 * MIB - 4096, {}),
        (3 * MIB, {"reserved_percent": 0}),
        (8 * MIB + 1024, {"block_bytes": 1024, "inode_bytes": 128}),
        (8 * MIB + 512 * KIB, {"block_bytes": 1024, "resize_inode": False}),
        (20 * MIB, {"block_bytes": 2048, "bytes_per_inode": 65536}),
        (64 * MIB, {"bytes_per_inode": 1024, "inode_bytes": 128}),
        (64 * MIB, {"block_bytes": 4096, "bytes_per_inode": 1024, "inode_bytes": 128}),
        (129 * MIB, {"block_bytes": 4096}),
        (30 * MIB, {"revision": 0}),
        (600 * MIB, {"label": b"big", "reserved_percent": 1}),
    ],
)
def test_the_bytes_are_those_of_mke2fs(scratch: Path, size: int, options: dict[str, Any]) -> None:
    """All of the volume but the inside of directories is what mke2fs writes; e2fsck is silent."""
    agrees_with_mke2fs(scratch, size, options)


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size_and_options_as_mke2fs(scratch: Path, data: st.DataObject) -> None:
    """As above, for sizes up to 512 MiB and all options together."""
    size = data.draw(st.integers(16, 29).flatmap(lambda power: st.integers(1 << power, (2 << power) - 1)), "size")
    revision = data.draw(st.sampled_from([1, 1, 1, 0]), "revision")
    options = {
        "revision": revision,
        "block_bytes": data.draw(st.sampled_from([None, None, 1024, 2048, 4096]), "block_bytes"),
        "inode_bytes": data.draw(st.sampled_from([None, 128, 256] if revision else [None, 128]), "inode_bytes"),
        "bytes_per_inode": data.draw(st.sampled_from([None, None, 4096, 8192, 65536]), "bytes_per_inode"),
        "resize_inode": data.draw(st.booleans(), "resize_inode"),
        "reserved_percent": data.draw(st.sampled_from([0, 1, 5, 10, 50]), "reserved_percent"),
    }
    agrees_with_mke2fs(scratch, size, options)


@pytest.mark.slow
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(29, 35).flatmap(lambda power: st.integers(1 << power, (2 << power) - 1)))
def test_large_volumes_are_accepted_and_stay_sparse(scratch: Path, size: int) -> None:
    """Up to 64 GiB in a sparse file: e2fsck is silent, and no inode table is written out."""
    path = scratch / "large.img"
    superblock = make_file(path, size, blank=True)
    accepted(path)
    block_bytes = 1024 << superblock.log_block_size
    assert len(data_blocks(path, block_bytes)) * block_bytes < 16 * MIB + size // 1000


@pytest.mark.slow
@pytest.mark.parametrize("block_bytes", [1024, 2048, 4096])
def test_the_kernel_mounts_and_fills_it(scratch: Path, block_bytes: int) -> None:
    """The kernel writes directories and files until no space is left, and e2fsck is still content."""
    path = scratch / "volume.img"
    make_file(path, 20 * MIB, block_bytes=block_bytes)
    with mounted(path, "ext2") as at:
        assert sorted(entry.name for entry in at.iterdir()) == ["lost+found"]
        for number in range(200):
            directory = at / f"directory-{number % 7}"
            directory.mkdir(exist_ok=True)
            (directory / f"file-{number}").write_bytes(b"x" * number * 100)
        for number in range(300):
            (at / "lost+found" / f"recovered-{number}").touch()
        with pytest.raises(OSError, match="No space") as caught, (at / "full").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(MIB))
        assert caught.value.errno == errno.ENOSPC
    accepted(path)


# --- on the disk --------------------------------------------------------------------------------


def sector_entries(sector: bytes) -> list[tuple[EntryHead, bytes]]:
    found = []
    at = 0
    while at < len(sector):
        head = EntryHead(*ENTRY_HEAD.struct.unpack_from(sector, at))
        assert head.rec_len >= 8 and head.rec_len % 4 == 0 and at + head.rec_len <= len(sector)
        found.append((head, sector[at + 8 : at + 8 + head.name_len]))
        at += head.rec_len
    return found


@pytest.mark.parametrize("block_bytes", [1024, 2048, 4096])
def test_no_entry_crosses_a_sector(block_bytes: int) -> None:
    """Every 512 bytes of a directory block are filled by entries of their own, so that a torn write does no harm."""
    device = MemoryDevice(4 * MIB)
    make_on(device, 4 * MIB, block_bytes=block_bytes)
    names: list[bytes] = []
    for block in directory_blocks(mkfs.plan(4 * MIB, block_bytes=block_bytes)):
        content = bytes(device.data[block * block_bytes : (block + 1) * block_bytes])
        for at in range(0, block_bytes, 512):
            names += [name for head, name in sector_entries(content[at : at + 512]) if head.inode]
    assert names == [b".", b"..", b"lost+found", b".", b".."]


def test_the_superblock_is_returned_as_it_is_on_the_disk() -> None:
    device = MemoryDevice(4 * MIB)
    superblock = make_on(device, 4 * MIB, label=b"name")
    on_disk = Superblock(*SUPERBLOCK.struct.unpack_from(device.data, 1024))
    assert on_disk == superblock._replace(volume_name=b"name" + bytes(12), last_mounted=bytes(64))
    assert (on_disk.uuid, on_disk.hash_seed) == (UUID, SEED)


@pytest.mark.parametrize(("memory_align", "align"), [(4, 512), (4096, 512), (512, 1024), (512, 4096), (4096, 4096)])
def test_any_alignment_of_the_device(scratch: Path, memory_align: int, align: int) -> None:
    """F51: blocks are no smaller than what the device writes, and nothing unaligned is asked of it."""
    device = OddDevice(20 * MIB, memory_align=memory_align, read_align=align, write_align=align)
    superblock = make_on(device, 20 * MIB)
    assert 1024 << superblock.log_block_size == max(1024, align)
    path = scratch / "volume.img"
    path.write_bytes(device.data)
    accepted(path)


class Choosy(MemoryDevice):
    """A device that cannot zero a range by itself, or fails the write whose number is given."""

    def __init__(self, size: int, *, failing: int = -1, op: int = WRITE, data: bytes = b"") -> None:
        super().__init__(size, data=data)
        self.failing = failing
        self.op = op
        self.count = 0

    def _carry_out(self, bio: Bio) -> None:
        if bio.op == ZERO:
            bio.error = errno.EOPNOTSUPP
            return
        if bio.op == self.op:
            self.count += 1
            if self.count - 1 == self.failing:
                bio.error = errno.EIO
                return
        super()._carry_out(bio)


def test_a_device_without_zeroing_gives_the_same_bytes() -> None:
    """What was on the device before is overwritten with zeroes that are written."""
    dirty = random.Random(1).randbytes(20 * MIB)
    one, other = Choosy(20 * MIB, data=dirty), MemoryDevice(20 * MIB, data=dirty)
    make_on(one, 20 * MIB)
    make_on(other, 20 * MIB)
    plan = mkfs.plan(20 * MIB)
    for group in range(plan.groups):
        at = plan.first_block(group) * 1024
        metadata = slice(at, at + plan.overhead(group) * 1024)
        assert one.data[metadata] == other.data[metadata]


@pytest.mark.parametrize(("op", "failing"), [(WRITE, 0), (WRITE, 5), (WRITE, 11), (FLUSH, 0), (FLUSH, 1), (FLUSH, 2)])
def test_a_device_error_leaves_no_volume(op: int, failing: int) -> None:
    """F41: the first error ends it, and there is no superblock."""
    device = Choosy(20 * MIB, failing=failing, op=op)
    with pytest.raises(DeviceError):
        make_on(device, 20 * MIB)
    assert device.count > failing and bytes(device.data[1024 + 56 : 1024 + 58]) != b"\x53\xef"


def test_a_power_cut_leaves_the_old_volume_none_or_the_new_one(scratch: Path) -> None:
    """At every write, with any of what was not flushed lost: the old one, no superblock, or all of the new."""
    size = 20 * MIB
    old = scratch / "old.img"
    assert mke2fs(old, size, "-b", "1024", "-L", "old") == ""
    base = old.read_bytes()
    log = LogWrites(MemoryDevice(size, data=base))
    over(log, mkfs.make(log, size, uuid=UUID, hash_seed=SEED, now_seconds=1, block_bytes=2048))
    final = log.replay()
    plan = mkfs.plan(size, block_bytes=2048)
    places = [plan.first_block(group) * 2048 for group in range(1, plan.groups) if plan.has_super(group)]
    rng = random.Random(7)
    seen = set()
    for upto in range(len(log.records) + 1):
        unflushed = log.unflushed(upto)
        for lost in ([], unflushed, [number for number in unflushed if rng.random() < 0.5]):
            image = log.replay(upto, without=lost)
            if image[1024:2048] == base[1024:2048]:
                seen.add("old")
                copies = [8192 * 1024 * group + 1024 for group in (1,)]
                wiped = [
                    *range(size - 128 * KIB, size),
                    *(at + byte for at in [*copies, *places] for byte in range(2048)),
                ]
                assert all(image[at] in (0, base[at]) for at in wiped)
                assert image[2048:4096] in (base[2048:4096], bytes(2048))
            elif any(image[1024:2048]):
                seen.add("new")
                assert image == final
            else:
                seen.add("none")
            if any(image[at + 56 : at + 58] == b"\x53\xef" and image[at + 104 : at + 120] == UUID for at in places):
                # Nobody can build a volume from a copy whose rest is not there.
                assert image[4096:] == final[4096:] or image[:4096] == bytes(4096)
    assert seen == {"old", "none", "new"}


# --- what cannot be made ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_bytes": 512}, "blocks of 512"),
        ({"block_bytes": 8192}, "blocks of 8192"),
        ({"label": b"seventeen bytes..."}, "label"),
        ({"inode_bytes": 512}, "inodes of 512"),
        ({"inode_bytes": 256, "revision": 0}, "128 in revision 0"),
        ({"revision": 2}, "revision 2"),
        ({"reserved_percent": 51}, "reserved"),
        ({"reserved_percent": -1}, "reserved"),
        ({"bytes_per_inode": 512}, "for each 512"),
        ({"bytes_per_inode": 1024, "inode_bytes": 1024}, "inodes of 1024"),
        ({"uuid": b"short"}, "16 bytes each"),
        ({"hash_seed": b""}, "16 bytes each"),
        ({"now_seconds": 1 << 32}, "32 bits"),
        ({"now_seconds": -1}, "32 bits"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(options: dict[str, Any], message: str) -> None:
    device = MemoryDevice(4 * MIB, data=b"\xff" * (4 * MIB))
    with pytest.raises(ValueError, match=message):
        make_on(device, 4 * MIB, **options)
    assert device.data == b"\xff" * (4 * MIB)


@pytest.mark.parametrize(
    ("size", "options", "kind", "message"),
    [
        (0, {}, NoSpaceError, "too few"),
        (40 * KIB, {}, NoSpaceError, "too few"),
        (200 * KIB, {"block_bytes": 4096}, NoSpaceError, "too few"),
        (-1, {}, ValueError, "-1"),
        (4 << 42, {"block_bytes": 4096}, ValueError, "larger blocks|numbers"),
        (2 << 40, {"block_bytes": 1024}, ValueError, "larger blocks help"),
        (1 << 42, {"block_bytes": 1024}, ValueError, "numbers"),
    ],
)
def test_sizes_that_cannot_be(size: int, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        mkfs.plan(size, **options)


def test_the_largest_volume_can_be_planned() -> None:
    """Counting in 32 bits is enough for 16 TiB less a block."""
    plan = mkfs.plan((1 << 44) - 4096)
    assert plan.blocks_count <= (1 << 32) - 1 and plan.inodes_count <= (1 << 32) - 1


def test_more_than_the_device_has_is_refused() -> None:
    with pytest.raises(NoSpaceError, match="the device has"):
        make_on(MemoryDevice(MIB), 2 * MIB)


def test_a_device_with_larger_sectors_than_blocks_is_refused() -> None:
    """F51."""
    device = OddDevice(4 * MIB, memory_align=512, read_align=512, write_align=65536)
    with pytest.raises(UnsupportedError, match="65536"):
        make_on(device, 4 * MIB)
    with pytest.raises(ValueError, match="no less than 4096"):
        make_on(OddDevice(4 * MIB, memory_align=512, read_align=4096, write_align=4096), 4 * MIB, block_bytes=1024)


def test_copies_are_in_the_groups_that_sparse_super_names() -> None:
    found = [group for group in range(400) if mkfs.has_sparse_super(group)]
    assert found == [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343]


def test_the_limits_need_not_say_more_than_the_sectors() -> None:
    """A device whose transfers go anywhere, but whose sectors are 4 KiB, gets blocks of 4 KiB."""
    limits = Limits(logical_block=4096, physical_block=4096, read_align=1, write_align=1, memory_align=1)
    superblock = make_on(MemoryDevice(4 * MIB, limits=limits), 4 * MIB)
    assert superblock.log_block_size == 2


def test_the_end_of_the_device_is_not_touched() -> None:
    """A volume smaller than its device leaves what is behind it."""
    device = MemoryDevice(5 * MIB, data=os.urandom(5 * MIB))
    behind = bytes(device.data[4 * MIB :])
    make_on(device, 4 * MIB)
    assert device.data[4 * MIB :] == behind
