"""Inodes: what the kernel and debugfs write is read, what is stored they read, and nothing else is believed."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.reading_kit import PLACE, Image, check, debugfs, make, write_bytes
from tests.loops import mounted, needs_root

from odirect.base.errors import CorruptionError, UnsupportedError
from odirect.fs.ext2.format import INODE, InodeFlags, Superblock
from odirect.fs.ext2.geometry import Geometry
from odirect.fs.ext2.inode import Ext2Inode

SECOND = 1_000_000_000
PROFILES = {
    "128": ["-b", "1024", "-I", "128"],
    "256": ["-b", "4096", "-I", "256"],
    "1024": ["-b", "2048", "-I", "1024"],
}


def geometry_of(inode_bytes: int, **changes: int) -> Geometry:
    """A geometry that was never on a disk."""
    fields: dict[str, Any] = dict.fromkeys(Superblock._fields, 0)
    fields |= dict.fromkeys(
        ("uuid", "volume_name", "last_mounted", "journal_uuid", "hash_seed", "jnl_blocks", "rest"), b""
    )
    fields |= {
        "inodes_count": 2048,
        "blocks_count": 8193,
        "first_data_block": 1,
        "blocks_per_group": 8192,
        "inodes_per_group": 2048,
        "rev_level": 1,
        "inode_size": inode_bytes,
        "first_ino": 11,
    }
    return Geometry(Superblock(**{**fields, **changes}), "vol")


# --- with the kernel -----------------------------------------------------------------------------


def populate(point: Path) -> None:
    (point / "empty").touch(mode=0o640)
    (point / "file").write_bytes(b"x" * 70000)
    os.chown(point / "file", 70000, 0xFFFFFFFE)
    os.chmod(point / "file", 0o6754)
    os.link(point / "file", point / "again")
    os.truncate(point / "empty", 5 << 30)
    os.mkdir(point / "dir", 0o1777)
    os.mkfifo(point / "fifo", 0o600)
    for name, kind, number in (
        ("char", stat.S_IFCHR, os.makedev(1, 3)),
        ("block", stat.S_IFBLK, os.makedev(255, 255)),
        ("minor", stat.S_IFCHR, os.makedev(8, 256)),
        ("major", stat.S_IFBLK, os.makedev(4095, (1 << 20) - 1)),
    ):
        os.mknod(point / name, kind | 0o660, number)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(point, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{here}/socket")
        finally:
            os.close(here)
    for length in (1, 59, 60, 200):
        os.symlink("t" * length, point / f"link{length}")
    os.setxattr(point / "link59", b"trusted.x", b"v" * 300, follow_symlinks=False)
    os.setxattr(point / "link60", b"trusted.x", b"v" * 300, follow_symlinks=False)
    for name, seconds in (("old", -1234567890), ("now", 1700000000), ("last", 0x7FFFFFFF), ("far", 15000000000)):
        (point / name).touch()
        os.utime(point / name, ns=(seconds * SECOND + 123456789, seconds * SECOND + 987654321))


@pytest.fixture(scope="module", params=PROFILES)
def populated(request, scratch_root: Path):
    """(image, what the kernel says of each inode by name, read links)."""
    needs_root()
    path = make(scratch_root / f"inodes-{request.param}.img", 24 << 20, *PROFILES[request.param])
    with mounted(path, "ext2") as point:
        populate(point)
    with mounted(path, "ext2", "ro") as point:
        said = {entry.name: os.lstat(entry) for entry in os.scandir(point)}
        links = {name: os.readlink(point / name) for name in said if name.startswith("link")}
    yield path, said, links
    path.unlink()


def test_everything_is_as_the_kernel_says(populated):
    path, said, links = populated
    image = Image(path)
    for name, there in said.items():
        inode = image.inode(there.st_ino)
        assert not inode.is_free
        ours = (inode.mode, inode.links, inode.uid, inode.gid, inode.size, inode.sectors, inode.device_number)
        theirs = (
            there.st_mode,
            there.st_nlink,
            there.st_uid,
            there.st_gid,
            there.st_size,
            there.st_blocks,
            there.st_rdev,
        )
        assert ours == theirs, name
        assert (inode.atime_ns, inode.mtime_ns, inode.ctime_ns) == (
            there.st_atime_ns,
            there.st_mtime_ns,
            there.st_ctime_ns,
        )
        assert inode.is_dir == stat.S_ISDIR(there.st_mode)
        assert inode.is_file == stat.S_ISREG(there.st_mode)
        assert inode.is_device == (there.st_rdev != 0)
        if inode.is_symlink:
            target = os.fsencode(links[name])
            assert inode.is_fast_symlink(image.geometry) == (len(target) < 60), name
            found = inode.fast_target(image.geometry) if len(target) < 60 else image.content(inode.number)
            assert found == target
        assert inode.has_blocks(image.geometry) == (inode.is_file or inode.is_dir or len(links.get(name, "")) >= 60)
    fast = {name: image.inode(said[name].st_ino) for name in ("link59", "link60")}
    assert fast["link59"].file_acl or path.name.endswith("1024.img")


def test_what_is_stored_unchanged_is_the_same_bytes(populated):
    """Unknown bytes are kept, and known ones come back as they were."""
    path, said, _ = populated
    image = Image(path)
    for name, there in {**said, "reserved": None}.items():
        for number in [there.st_ino] if there else range(1, 11):
            before = image.raw_inode(number)
            after = bytearray(before)
            image.inode(number).store(image.geometry, after)
            assert bytes(after) == before, (name, number)


def test_the_kernel_reads_what_is_stored(populated, scratch: Path):
    path, said, _ = populated
    copy = scratch / "copy.img"
    copy.write_bytes(path.read_bytes())
    image = Image(copy)
    wide = image.geometry.inode_bytes > 128
    changed: dict[str, Ext2Inode] = {}
    for at, name in enumerate(("file", "dir", "fifo", "minor", "link1", "old")):
        inode = image.inode(said[name].st_ino)
        inode.mode ^= 0o4110
        inode.uid, inode.gid = 0x12345 + at, 0xFEDCBA98 - at
        times = [
            -(1 << 31) * SECOND + 7,
            1_600_000_000_123_456_789 + at,
            (16_000_000_000 if wide else 2_000_000_000) * SECOND + 5,
        ]
        inode.atime_ns, inode.mtime_ns, inode.ctime_ns = (inode.storable_time(time) for time in times)
        if inode.is_device:
            inode.device_number = os.makedev(300, 70000)
        raw = bytearray(image.raw_inode(inode.number))
        inode.store(image.geometry, raw)
        write_bytes(copy, image.inode_addr(inode.number), raw)
        changed[name] = inode
    check(copy)
    with mounted(copy, "ext2", "ro") as point:
        for name, inode in changed.items():
            there = os.lstat(point / name)
            assert (inode.mode, inode.uid, inode.gid, inode.device_number) == (
                there.st_mode,
                there.st_uid,
                there.st_gid,
                there.st_rdev,
            )
            assert (inode.atime_ns, inode.mtime_ns, inode.ctime_ns) == (
                there.st_atime_ns,
                there.st_mtime_ns,
                there.st_ctime_ns,
            )


# --- with debugfs, as anybody --------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_what_debugfs_makes(scratch: Path, profile: str):
    path = make(scratch / "d.img", 8 << 20, *PROFILES[profile])
    debugfs(
        path,
        f"write {__file__} f",
        "mkdir d",
        "symlink short target",
        f"symlink long {'t' * 70}",
        "mknod pipe p",
        "mknod device c 10 200",
        "mknod disk b 300 7000",
        "sif f uid 70000",
        "sif f atime @1700000001",
        "sif f mode 0100604",
    )
    image = Image(path)
    found = {name: image.inode(inode) for name, inode in names_of(image).items()}
    assert (found["f"].uid, found["f"].atime_ns // SECOND, found["f"].mode) == (70000, 1700000001, 0o100604)
    assert image.content(found["f"].number) == Path(__file__).read_bytes()
    assert found["d"].is_dir
    assert found["d"].links == 2
    assert found["short"].fast_target(image.geometry) == b"target"
    assert not found["long"].is_fast_symlink(image.geometry)
    assert image.content(found["long"].number) == b"t" * 70
    assert stat.S_ISFIFO(found["pipe"].mode)
    assert found["device"].device_number == os.makedev(10, 200)
    assert found["disk"].device_number == os.makedev(300, 7000)
    # Inode 7 has the blocks kept for descriptors; no file may have them.
    assert image.geometry.is_fixed(image.inode(7).pointer(13)) is False


def names_of(image: Image) -> dict[str, int]:
    from odirect.fs.ext2.directory import list_all

    root = image.inode(2)
    blockmap = image.map(2)
    return {
        entry.name.decode(): entry.inode for entry in image.cache.load(lambda: list_all(image.cache, blockmap, root))
    }


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inode_bytes", [128, 256, 1024])
@given(data=st.data())
def test_every_value_comes_back(inode_bytes: int, data: st.DataObject):
    geometry = geometry_of(inode_bytes)
    kind = data.draw(
        st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
    )
    word = st.integers(0, 0xFFFFFFFF)
    inode = Ext2Inode.create(
        geometry, data.draw(st.integers(1, 2048)), kind | data.draw(st.integers(0, 0o7777)), 17 * SECOND
    )
    assert (inode.extra_isize, inode.birth_ns) == (0 if inode_bytes == 128 else 32, 17 * SECOND)
    inode.uid, inode.gid, inode.generation, inode.sectors, inode.dtime = (data.draw(word) for _ in range(5))
    inode.links = data.draw(st.integers(1, 0xFFFF))
    inode.flags = data.draw(word) & ~int(InodeFlags.EXTENTS) & ~0x10000000
    inode.file_acl = data.draw(word)
    inode.size = (
        data.draw(st.integers(0, geometry.max_blocks * 1024)) if kind == stat.S_IFREG else data.draw(word) % (1 << 31)
    )
    low, high = -(1 << 31), (1 << 31) - 1 + (0 if inode_bytes == 128 else 3 << 32)
    for field in ("atime_ns", "mtime_ns", "ctime_ns", "birth_ns"):
        wanted = data.draw(st.integers(low * SECOND, high * SECOND + SECOND - 1))
        kept = inode.storable_time(wanted)
        assert kept == (wanted if inode_bytes > 128 else wanted // SECOND * SECOND)
        setattr(inode, field, kept)
    if inode.is_device:
        inode.device_number = os.makedev(data.draw(st.integers(0, 4095)), data.draw(st.integers(0, (1 << 20) - 1)))
    else:
        inode.block[:] = data.draw(st.binary(min_size=60, max_size=60))
    raw = bytearray(inode_bytes)
    inode.store(geometry, raw)
    again = Ext2Inode.parse(geometry, inode.number, raw)
    for field in Ext2Inode.__slots__:
        if field != "birth_ns" or inode_bytes > 128:
            assert getattr(again, field) == getattr(inode, field), field
    assert again.device_number == inode.device_number


def test_times_out_of_range_are_the_first_or_last():
    narrow, wide = (Ext2Inode.create(geometry_of(size), 12, 0o100600, 0) for size in (128, 256))
    assert narrow.storable_time(-(1 << 40) * SECOND) == -(1 << 31) * SECOND
    assert narrow.storable_time((1 << 40) * SECOND) == ((1 << 31) - 1) * SECOND
    assert narrow.storable_time(-1) == -SECOND
    assert wide.storable_time(-1) == -1
    assert wide.storable_time((1 << 40) * SECOND) == 0x37FFFFFFF * SECOND + SECOND - 1


@given(
    inode_bytes=st.sampled_from([128, 256]),
    times=st.lists(st.integers(-(1 << 62), 1 << 62) | st.integers(-3 * SECOND, 3 * SECOND), max_size=20),
)
def test_many_times_are_stored_as_one_is(inode_bytes: int, times: list[int]) -> None:
    """`all_on_disk` against `on_disk`, also where a time does not fit the record."""
    inode = Ext2Inode.create(geometry_of(inode_bytes), 12, 0o100600, 0)
    far = [time * 1000 for time in times]
    pairs = numpy.array([divmod(time, SECOND) for time in times + far], numpy.int64).reshape(-1, 2)
    assert inode.all_on_disk(pairs).tolist() == [list(inode.on_disk(time)) for time in times + far]


def test_old_and_new_device_numbers():
    inode = Ext2Inode(12, stat.S_IFCHR)
    inode.device_number = os.makedev(255, 255)
    assert inode.pointers()[:3] == (0xFFFF, 0, 0)
    inode.device_number = os.makedev(8, 256)
    assert inode.pointers()[:3] == (0, 0x100800, 0)
    assert inode.device_number == os.makedev(8, 256)
    for number in (os.makedev(4096, 0), os.makedev(0, 1 << 20)):
        with pytest.raises(ValueError, match="does not fit"):
            inode.device_number = number
    assert Ext2Inode(12, stat.S_IFREG).device_number == 0


def test_values_that_do_not_fit():
    geometry = geometry_of(256)
    for field, value in (
        ("links", 70000),
        ("sectors", 1 << 32),
        ("uid", -1),
        ("gid", 1 << 32),
        ("size", 1 << 33),
        ("flags", -1),
    ):
        inode = Ext2Inode.create(geometry, 12, stat.S_IFDIR, 0)
        setattr(inode, field, value)
        raw = bytearray(256)
        with pytest.raises(ValueError, match=r"cannot be stored|only files"):
            inode.store(geometry, raw)
        assert raw == bytes(256)
    with pytest.raises(ValueError, match="not 128"):
        Ext2Inode.create(geometry, 12, stat.S_IFDIR, 0).store(geometry, bytearray(128))
    with pytest.raises(ValueError, match="no place 15"):
        Ext2Inode(12, 0).set_pointer(15, 1)


def test_a_changed_inode_is_put_back_when_its_transaction_is_undone():
    calls: list = []

    class Cache:
        def undo(self, call) -> None:
            calls.append(call)

    inode = Ext2Inode.create(geometry_of(256), 12, 0o100600, 5)
    inode.set_pointer(3, 77)
    block = inode.block
    inode.remember(Cache())  # type: ignore[arg-type]
    inode.size, inode.links = 9, 9
    inode.set_pointer(3, 78)
    (call,) = calls
    call()
    assert (inode.size, inode.links, inode.pointer(3)) == (0, 0, 77)
    assert inode.block is block


def test_an_extra_part_that_was_never_used_is_taken_up():
    """As ext4 does; but not over bytes that somebody has put there."""
    geometry = geometry_of(256)
    raw = bytearray(256)
    Ext2Inode.create(geometry_of(128), 12, 0o100600, 0).store(geometry_of(128), raw)
    raw[26] = 1
    assert Ext2Inode.parse(geometry, 12, raw).extra_isize == 32
    raw[200] = 1
    inode = Ext2Inode.parse(geometry, 12, raw)
    assert inode.extra_isize == 0
    assert inode.storable_time(5) == 0
    after = bytearray(raw)
    inode.store(geometry, after)
    assert after == raw


# --- what is not believed ------------------------------------------------------------------------


def live(**changes: Any) -> bytes:
    record = INODE.read(bytes(128), 0, PLACE)._replace(mode=0o100644, links_count=1)
    return INODE.pack(record._replace(**changes)) + b"\x20" + bytes(127)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": 0o644}, "mode 0o644"),
        ({"mode": 0o030644}, "mode 0o30644"),
        ({"mode": 0o170644}, "mode 0o170644"),
        ({"size_high": 5, "size": 0}, "size 21474836480, expected at most 17247252480"),
        ({"size_high": 0xFFFFFFFF}, "size 18446744069414584320"),
    ],
)
def test_inodes_that_cannot_be(changes, words):
    with pytest.raises(CorruptionError, match=f"^vol: inode 12 at byte 0: found {words}"):
        Ext2Inode.parse(geometry_of(256), 12, live(**changes))


def test_inodes_that_are_not_ours():
    for flag, words in ((InodeFlags.EXTENTS, "extents"), (0x10000000, "inline")):
        with pytest.raises(UnsupportedError, match=f"inode 12 has .*{words}"):
            Ext2Inode.parse(geometry_of(256), 12, live(flags=flag))


def test_a_directory_has_no_high_size():
    """Where a file has it, other inodes have something else, which stays."""
    raw = bytearray(live(mode=0o040755, size=1024, size_high=0x1234))
    inode = Ext2Inode.parse(geometry_of(256), 12, raw)
    assert inode.size == 1024
    inode.store(geometry_of(256), raw)
    assert INODE.read(raw, 0, PLACE).size_high == 0x1234


def test_free_inodes_and_the_one_of_bad_blocks():
    geometry = geometry_of(256)
    assert Ext2Inode.parse(geometry, 12, bytes(256)).is_free
    assert Ext2Inode.parse(geometry, 12, live(links_count=0, mode=0, flags=0x80000)).is_free
    assert Ext2Inode.parse(geometry, 1, live(mode=0)).mode == 0
    with pytest.raises(CorruptionError):
        Ext2Inode.parse(geometry, 2, live(mode=0))


@pytest.mark.parametrize("extra_isize", [1, 130, 132, 0xFFFF])
def test_an_extra_part_that_does_not_fit(extra_isize: int):
    raw = live()[:128] + extra_isize.to_bytes(2, "little") + bytes(126)
    with pytest.raises(CorruptionError, match=f"extra_isize {extra_isize}, expected a multiple of 4, at most 128"):
        Ext2Inode.parse(geometry_of(256), 12, raw)


def test_short_extra_parts_give_what_they_cover():
    """8 bytes: only the extra part of ctime is there."""
    raw = bytearray(live(ctime=5, mtime=6))
    raw[128:140] = b"\x08\0\0\0" + (7 << 2 | 1).to_bytes(4, "little") + (9 << 2).to_bytes(4, "little")
    inode = Ext2Inode.parse(geometry_of(256), 12, raw)
    assert (inode.ctime_ns, inode.mtime_ns) == ((5 + (1 << 32)) * SECOND + 7, 6 * SECOND)


@pytest.mark.parametrize(
    ("size", "block", "words"),
    [(0, b"", "a link of 0 bytes"), (60, b"x" * 60, "a link of 60 bytes"), (5, b"ab\0cd", "no zero byte")],
)
def test_fast_links_that_cannot_be(size: int, block: bytes, words: str):
    geometry = geometry_of(128)
    inode = Ext2Inode.parse(geometry, 12, live(mode=0o120777, size=size, block=block.ljust(60, b"\0")))
    assert inode.is_fast_symlink(geometry)
    with pytest.raises(CorruptionError, match=words):
        inode.fast_target(geometry)


def test_a_cut_record():
    with pytest.raises(CorruptionError, match="128 bytes, expected 256 bytes"):
        Ext2Inode.parse(geometry_of(256), 12, bytes(128))


@settings(max_examples=300)
@given(
    raw=st.binary(min_size=256, max_size=256), kind=st.sampled_from([None, 0o10, 0o4, 0o12, 0o6]), huge=st.booleans()
)
def test_any_bytes_give_an_inode_or_an_error(raw: bytes, kind: int | None, huge: bool):
    """And what is read stores itself again, or says why not."""
    geometry = geometry_of(256, feature_ro_compat=8 if huge else 0)
    if kind is not None:
        extra = b"\x20\x00" if raw[5] & 1 else raw[128:130]
        raw = (
            raw[:1]
            + bytes([raw[1] & 0xF | kind << 4 & 0xF0])
            + raw[2:35]
            + b"\0"
            + raw[36:108]
            + b"\0" * 4
            + raw[112:128]
            + extra
            + raw[130:]
        )
    try:
        inode = Ext2Inode.parse(geometry, 12, raw)
    except (CorruptionError, UnsupportedError):
        return
    for answer in (inode.device_number, inode.is_fast_symlink(geometry), inode.has_blocks(geometry), inode.pointers()):
        assert answer is not None
    if inode.is_symlink:
        try:
            assert len(inode.fast_target(geometry)) == inode.size
        except CorruptionError:
            pass
    if inode.sectors < 1 << 32:
        after = bytearray(raw)
        inode.store(geometry, after)
        again = Ext2Inode.parse(geometry, 12, after)
        assert all(
            getattr(again, field) == getattr(inode, field) for field in ("mode", "size", "uid", "links", "block")
        )
