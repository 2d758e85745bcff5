"""The reading side as a whole: through the real metadata cache, and over volumes with bits flipped anywhere."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fs.ext2.reading_kit import Image, all_blocks, debugfs, make

from odirect.base.errors import CorruptionError, UnsupportedError
from odirect.block.memory import MemoryDevice
from odirect.cache.metacache import MetaCache
from odirect.fs.ext2.blockmap import BlockMap
from odirect.fs.ext2.directory import find, list_all
from odirect.fs.ext2.geometry import Geometry, read_geometry
from odirect.fs.ext2.inode import Ext2Inode
from odirect.fs.ext2.xattr import read_block, read_inode
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Scheduler


@pytest.fixture(scope="module")
def volume(scratch_root: Path):
    """(bytes of a small volume, the file that is in it, its name)."""
    source = scratch_root / "reading-source"
    with open(source, "wb") as file:
        for place in (0, 5, 12, 40, 12 + 256, 12 + 256 + 300):
            file.seek(place * 1024)
            file.write(bytes([place % 251 + 1]) * 1500)
    path = make(scratch_root / "reading.img", 512 << 10, "-b", "1024", "-I", "256", "-N", "32", "-O", "^resize_inode")
    debugfs(
        path,
        f"write {source} file",
        "mkdir d",
        "cd d",
        *(f"ln /file name-{count}" for count in range(20)),
        f"symlink long {'l' * 90}",
        "symlink short target",
        f"ea_set /file user.a {'v' * 120}",
        "ea_set /file trusted.b w",
        "ea_set /d security.c x",
    )
    yield path.read_bytes(), source.read_bytes()
    path.unlink()
    source.unlink()


def walk(geometry: Geometry, cache, load) -> dict[bytes, tuple[Ext2Inode, dict[bytes, bytes]]]:
    """Everything that can be read, by path: each step a look-up that `load` repeats until nothing is missing."""
    found: dict[bytes, tuple[Ext2Inode, dict[bytes, bytes]]] = {}
    seen: set[int] = set()

    def inode_of(number: int) -> tuple[Ext2Inode, dict[bytes, bytes]]:
        block, offset = geometry.inode_place(cache, number)
        raw = cache.get(block)[offset : offset + geometry.inode_bytes]
        inode = Ext2Inode.parse(geometry, number, raw)
        place = geometry.inode_structure(number)
        attributes = read_inode(geometry, raw, place)
        if inode.file_acl:
            geometry.check_data_block(inode.file_acl, place)
            attributes |= read_block(geometry, cache.get(inode.file_acl), place)
        return inode, attributes

    def visit(number: int, path: bytes) -> None:
        inode, attributes = load(functools.partial(inode_of, number))
        found[path] = inode, attributes
        if inode.is_symlink and inode.is_fast_symlink(geometry):
            inode.fast_target(geometry)
        if not inode.has_blocks(geometry):
            return
        blockmap = BlockMap(geometry, cache, inode)
        load(lambda: list(blockmap.runs(0, min(-(-inode.size // geometry.block_bytes), geometry.max_blocks) - 1)))
        load(lambda: list(all_blocks(blockmap)))
        if not inode.is_dir or number in seen:
            return
        seen.add(number)
        for entry in load(lambda: list_all(cache, blockmap, inode)):
            if entry.name not in (b".", b".."):
                there = load(functools.partial(find, cache, blockmap, inode, entry.name))
                assert there is not None
                visit(entry.inode, path + b"/" + entry.name)

    load(lambda: geometry.load_fixed(cache))
    visit(2, b"")
    return found


def test_a_volume_through_the_metadata_cache(volume):
    """All of it by way of a device and the real cache, of which nothing stays that is not in use."""
    image, source = volume
    device = MemoryDevice(len(image), data=image)
    scheduler = Scheduler()
    driver = SyncDriver(scheduler)
    scheduler.add_device(device)
    geometry = read_geometry(image[1024:2048], name="vol", device_bytes=len(image))
    cache = MetaCache(device, geometry.block_bytes, name="vol", limit_bytes=0)
    found = walk(geometry, cache, lambda fn: driver.run(cache.load(fn)))
    assert len(found) == 1 + 3 + 20 + 2
    inode, attributes = found[b"/d/name-7"]
    assert inode.number == found[b"/file"][0].number
    assert attributes == {b"user.a": b"v" * 120, b"trusted.b": b"w"}
    assert found[b"/d"][1] == {b"security.c": b"x"}
    assert Image(image).content(inode.number) == source
    assert found[b"/d/short"][0].fast_target(geometry) == b"target"
    assert Image(image).content(found[b"/d/long"][0].number) == b"l" * 90
    device.close()


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_bits_flipped_anywhere(volume, data: st.DataObject):
    """Whatever is flipped in the metadata: all is read, or it is said where it cannot be."""
    image = bytearray(volume[0])
    used = [at for at in range(1024, len(image), 64) if any(image[at : at + 64])]
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.sampled_from(used)) + data.draw(st.integers(0, 63))
        image[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        opened = Image(image)
        walk(opened.geometry, opened.cache, opened.cache.load)
    except (CorruptionError, UnsupportedError) as error:
        assert error.filename == "image"
