"""Damaged images through the public API: values or errors of ours, nothing else, and nothing outside the volume.

A case is a number: it chooses the volume and the damage. `ODIRECT_FUZZ_CASES` runs more of them.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fs.ext2 import fuzz_kit, reading_kit
from tests.fs.ext2.fuzz_kit import SHAPES, Seed, make_seed, run_case

import odirect
from odirect.base.errors import CorruptionError

_CASES = int(os.environ.get("ODIRECT_FUZZ_CASES", "200"))
_PER_TEST = 20


@pytest.fixture(scope="module")
def seeds(scratch_root: Path) -> dict[str, Seed]:
    """All volumes, undamaged."""
    directory = scratch_root / "fuzz-seeds"
    directory.mkdir()
    return {name: make_seed(name, directory) for name in SHAPES}


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    """Where damaged images are put: in memory where there is room, because none of this is about the device."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield scratch / "image"
        return
    path = memory / f"odirect-fuzz-{os.getpid()}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(0, _CASES, _PER_TEST))
def test_damaged_images(first: int, seeds: dict[str, Seed], image: Path) -> None:
    """Read and written whatever is wrong with them; paths that are not concerned are as they were."""
    for number in range(first, first + _PER_TEST):
        seed = seeds[SHAPES[number % len(SHAPES)]]
        try:
            run_case(seed, number, image, judge=number % 7 == 0)
        except BaseException as error:
            what = fuzz_kit.damaged(seed, random.Random(f"{seed.name}-{number}")).what
            error.add_note(f"case {number}, volume {seed.name}: {what}")
            raise


# --- damage that must be said ---------------------------------------------------------------------


class Patient:
    """A volume to which one thing is done, by name of what it is in."""

    def __init__(self, seed: Seed, image: Path) -> None:
        self.path = image
        self.data = bytearray(seed.image)
        self.opened = reading_kit.Image(seed.image)
        self.size = self.opened.geometry.block_bytes
        self._volume = seed

    def number(self, path: bytes) -> int:
        found: int = self._volume.seen[path][0][1]
        return found

    def inode(self, path: bytes, offset: int, value: int, width: int = 4) -> None:
        self.put(self.opened.inode_addr(self.number(path)) + offset, value, width)

    def pointer(self, path: bytes, index: int) -> int:
        return self.opened.inode(self.number(path)).pointer(index)

    def put(self, addr: int, value: int, width: int = 4) -> None:
        self.data[addr : addr + width] = value.to_bytes(width, "little")

    def entry(self, directory: bytes, name: bytes) -> int:
        """The byte of an entry on the device."""
        block = self.pointer(directory, 0)
        at = self.data.find(name, block * self.size)
        assert block * self.size < at < (block + 1) * self.size
        return at - 8


def _wrong_blocks(patient: Patient) -> list[int]:
    """Numbers that no file's block can have."""
    geometry = patient.opened.geometry
    group = geometry.groups - 1
    return [
        geometry.blocks_count,
        0xFFFFFFFF,
        geometry.first_data_block or geometry.descriptor_blocks[-1],  # 0 would be a hole.
        geometry.descriptor_blocks[0],
        geometry.block_bitmap(0),
        geometry.inode_bitmap(group),
        geometry.inode_table(0) + geometry.table_blocks - 1,
    ]


def _says(patient: Patient, path: bytes, *words: str, read: bool = True) -> None:
    """What is at `path` cannot be read, and is refused as corruption at every try."""
    patient.path.write_bytes(patient.data)
    with odirect.open_volume(patient.path) as volume:
        for _ in range(2):
            with pytest.raises(CorruptionError) as caught:
                status = volume.lstat(path or b"/")
                if stat.S_ISDIR(status.st_mode):
                    volume.listdir(path or b"/")
                elif stat.S_ISLNK(status.st_mode):
                    volume.readlink(path)
                elif read:
                    with volume.open(path) as file:
                        for offset in (*range(0, 512 << 10, 64 << 10), 3268 << 10, max(0, file.size - 9000)):
                            file.pread(64 << 10, offset)
                else:
                    volume.xattrs(path)
            for word in words:
                assert word in str(caught.value)
        assert volume.check() != []
    fuzz_kit.make_clean(patient.data)
    patient.path.write_bytes(patient.data)


@pytest.mark.parametrize("shape", ["1k", "groups", "4k"])
def test_numbers_of_blocks_that_cannot_be(shape: str, seeds: dict[str, Seed], image: Path) -> None:
    """Into the volume's own blocks or outside it, at every level: never other bytes, never zeroes."""
    for which in range(7):
        for level in range(4):
            patient = Patient(seeds[shape], image)
            wrong = _wrong_blocks(patient)[which]
            # The file has data under each of its three trees of numbers, and in the inode.
            index = (0, 12, 13, 14)[level]
            if not patient.pointer(b"/deep", index):
                continue
            if level:
                holder = patient.pointer(b"/deep", index)
                used = next(
                    at
                    for at in range(0, patient.size, 4)
                    if any(patient.data[holder * patient.size + at : holder * patient.size + at + 4])
                )
                patient.put(holder * patient.size + used, wrong)
                _says(patient, b"/deep", "inode", f"block {wrong}")
                patient = Patient(seeds[shape], image)
            patient.inode(b"/deep", 40 + 4 * index, wrong)
            _says(patient, b"/deep", f"inode {patient.number(b'/deep')}", f"block {wrong}")


@pytest.mark.parametrize("shape", ["1k", "groups", "4k", "old"])
def test_directories_that_cannot_be(shape: str, seeds: dict[str, Seed], image: Path) -> None:
    """Entries that lead nowhere on, out of their block, or to no inode; sizes and holes: no name is just left out."""
    for value in (0, 1, 4, 8, 13, 0xFFFF, 0x7FFC):
        patient = Patient(seeds[shape], image)
        patient.put(patient.entry(b"/d", b"again") + 4, value, 2)
        _says(patient, b"/d", "directory block", "rec_len")
    for offset, value, width in ((6, 0, 1), (6, 250, 1), (0, 0x7FFFFFFF, 4), (8, ord("/"), 1), (9, 0, 1)):
        patient = Patient(seeds[shape], image)
        patient.put(patient.entry(b"/d", b"again") + offset, value, width)
        _says(patient, b"/d", "directory block")
    for size in (0, 1, 3 << 10, 1 << 30, 0xFFFFFFFF, 0xFFFFFC00):
        patient = Patient(seeds[shape], image)
        patient.inode(b"/d", 4, size if size != 3 << 10 else 3 * patient.size)
        _says(patient, b"/d", "a directory" if size != 0xFFFFFFFF else "")
    patient = Patient(seeds[shape], image)
    patient.inode(b"/d", 40, 0)
    _says(patient, b"/d", "a hole at block 0")
    patient = Patient(seeds[shape], image)
    patient.inode(b"/d", 40, patient.pointer(b"", 0))
    _says(patient, b"/d", "'.'")


@pytest.mark.parametrize("shape", ["1k", "4k", "old"])
def test_files_that_cannot_be(shape: str, seeds: dict[str, Seed], image: Path) -> None:
    """Sizes past what the numbers can reach, modes of nothing, links without a target."""
    for path, offset, value, width, word in (
        (b"/plain", 108, 0x7FFFFFFF, 4, "size"),
        (b"/plain", 0, 0x0040, 2, "mode"),
        (b"/plain", 0, 0xF1A4, 2, "mode"),
        (b"/fast", 4, 0, 4, "link"),
        (b"/fast", 4, 60, 4, "link"),
        (b"/fast", 4, 40, 4, "zero byte"),
        (b"/slow", 4, 0, 4, "link"),
        (b"/slow", 4, 5000, 4, "link"),
        (b"/slow", 4, 900, 4, "zero byte"),
        (b"/slow", 40, 0, 4, "link"),
        (b"/slow", 40, 1, 4, "block 1"),
    ):
        patient = Patient(seeds[shape], image)
        patient.inode(path, offset, value, width)
        _says(patient, path, f"inode {patient.number(path)}", word)


@pytest.mark.parametrize("shape", ["1k", "groups", "4k"])
def test_attributes_that_cannot_be(shape: str, seeds: dict[str, Seed], image: Path) -> None:
    """A block of them, or those in the inode: heads, names, values outside, and hashes that differ."""
    patient = Patient(seeds[shape], image)
    block = patient.opened.inode(patient.number(b"/small")).file_acl
    places: tuple[tuple[int, int], ...]
    if block:
        for wrong in (0xFFFFFFFF, patient.opened.geometry.block_bitmap(0), patient.pointer(b"/plain", 0)):
            patient = Patient(seeds[shape], image)
            patient.inode(b"/small", 104, wrong)
            _says(patient, b"/small", read=False)
        start = block * patient.size
        places = ((0, 4), (4, 4), (8, 4), (32 + 2, 2), (32 + 4, 4), (32 + 8, 4), (32, 1))
    else:
        start = patient.opened.inode_addr(patient.number(b"/small")) + 160
        places = ((4, 1), (4 + 2, 2), (4 + 4, 4), (4 + 8, 4))
    for offset, width in places:
        patient = Patient(seeds[shape], image)
        patient.put(start + offset, (1 << 8 * width) - 2, width)
        _says(patient, b"/small", read=False)


@pytest.mark.parametrize("shape", ["1k", "groups", "4k", "old"])
def test_names_of_reserved_inodes(shape: str, seeds: dict[str, Seed], image: Path) -> None:
    """No name leads to the blocks that are kept for descriptors, and removing such a name removes nothing."""
    for number in (1, 3, 7, 8, 10):
        patient = Patient(seeds[shape], image)
        patient.put(patient.entry(b"/d", b"again"), number)
        fuzz_kit.make_clean(patient.data)
        patient.path.write_bytes(patient.data)
        with odirect.open_volume(patient.path, "r+") as volume:
            for call in (volume.stat, volume.read_bytes, volume.unlink, volume.rmtree, volume.xattrs):
                with pytest.raises(CorruptionError, match=f"inode {number} .*reserved"):
                    call("/d/again")  # type: ignore[operator]
            assert "again" in volume.listdir("/d")


@pytest.mark.parametrize("shape", ["1k", "4k"])
def test_directories_in_themselves(shape: str, seeds: dict[str, Seed], image: Path) -> None:
    """A name that leads back up: walking and removing end, and moving one into itself does not hang."""
    patient = Patient(seeds[shape], image)
    at = patient.entry(b"/d", b"again")
    patient.put(at, patient.number(b"/d"))
    if patient.opened.geometry.has_file_type:
        patient.put(at + 7, 2, 1)
    patient.path.write_bytes(patient.data)
    with odirect.open_volume(patient.path, "r+") as volume:
        assert volume.read_bytes("/d/again/again/e/leaf") == b"leaf" * 700
        with pytest.raises(CorruptionError, match="is in itself, as b'again'"):
            volume.rmtree("/d")
        assert volume.check() != []
    patient = Patient(seeds[shape], image)
    at = patient.entry(b"/d", b"again")
    patient.put(at, 2)
    if patient.opened.geometry.has_file_type:
        patient.put(at + 7, 2, 1)
    patient.path.write_bytes(patient.data)
    with odirect.open_volume(patient.path, "r+") as volume:
        assert sorted(volume.listdir("/d/again")) == sorted(volume.listdir("/"))
        with pytest.raises(CorruptionError, match="root directory under another name"):
            volume.rename("/d/again", "/elsewhere")


@pytest.mark.parametrize("shape", ["1k", "4k"])
def test_attributes_that_are_data(shape: str, seeds: dict[str, Seed], image: Path) -> None:
    """A file that says that another one's data are its attributes is removed without a change to those."""
    patient = Patient(seeds[shape], image)
    victim = patient.pointer(b"/d/e/leaf", 0)
    patient.put(victim * patient.size + 4, 5)  # What would be the count of references.
    held = bytes(patient.data[victim * patient.size : victim * patient.size + 2800])
    patient.inode(b"/plain", 104, victim)
    patient.path.write_bytes(patient.data)
    with odirect.open_volume(patient.path, "r+") as volume:
        for call in (lambda: volume.set_xattr("/plain", "user.x", b"y"), lambda: volume.unlink("/plain")):
            with pytest.raises(CorruptionError, match=f"attributes of inode {patient.number(b'/plain')} .*magic"):
                call()
        assert volume.read_bytes("/d/e/leaf") == held


@pytest.mark.parametrize("shape", ["1k", "4k"])
def test_counts_that_cannot_grow(shape: str, seeds: dict[str, Seed], image: Path) -> None:
    """Sectors that do not fit their record any more, or are fewer than there are blocks: an error of ours."""
    for sectors in (0, 1, 0xFFFFFFFF):
        patient = Patient(seeds[shape], image)
        patient.inode(b"/plain", 28, sectors)
        patient.path.write_bytes(patient.data)
        with odirect.open_volume(patient.path, "r+") as volume:
            with pytest.raises(CorruptionError, match=f"inode {patient.number(b'/plain')} "):
                if sectors > 1:
                    volume.set_xattr("/plain", "user.x", b"y" * 400)
                    with volume.open("/plain", "a") as file:
                        file.write(bytes(50_000))
                else:
                    with volume.open("/plain", "r+") as file:
                        file.truncate(0)
            assert volume.read_bytes("/fast") == b"small" * 30
