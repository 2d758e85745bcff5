"""FIEMAP's answers, held against layouts that are known."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loops import loop_device, made_image, mounted

from odirect.base.errors import ClosedError, CorruptionError, UnsupportedError
from odirect.block import fiemap
from odirect.block.fiemap import ExtentFlag, FileExtent, file_extents
from odirect.ring._calls import fallocate

BLOCK = 4096
PUNCH_HOLE_KEEP_SIZE = 0x03
FICLONE = 0x40049409


@contextlib.contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(params=["ext4", "xfs"])
def home(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Path]:
    options = ["-b", "4096"] if request.param == "ext4" else []
    with (
        made_image(request.param, 320 << 20, directory=scratch, mkfs=options) as image,
        mounted(image, request.param) as point,
    ):
        yield point


def covered(extents: list[FileExtent]) -> list[tuple[int, int]]:
    """(start, end) of the runs of a file that extents cover, neighbours put together."""
    runs: list[tuple[int, int]] = []
    for extent in extents:
        if runs and runs[-1][1] == extent.offset:
            runs[-1] = (runs[-1][0], extent.end)
        else:
            runs.append((extent.offset, extent.end))
    return runs


def test_punched_holes_are_between_extents(home: Path) -> None:
    with opened(home / "file") as fd:
        os.write(fd, os.urandom(64 * BLOCK))
        for block in (3, 10, 40):
            assert fallocate(fd, PUNCH_HOLE_KEEP_SIZE, block * BLOCK, 2 * BLOCK) == 0
        runs = covered(file_extents(fd, sync=True))
    expected = [(0, 3), (5, 10), (12, 40), (42, 64)]
    assert runs == [(start * BLOCK, end * BLOCK) for start, end in expected]


def test_an_extent_s_address_is_where_the_bytes_are(scratch: Path) -> None:
    """The image, read at the address that the kernel gave, holds the file's bytes."""
    data = os.urandom(8 * BLOCK)
    with made_image("ext4", directory=scratch) as image:
        with mounted(image, "ext4") as point, opened(point / "file") as fd:
            os.write(fd, data)
            extents = file_extents(fd, sync=True)
        raw = image.read_bytes()
    found = b"".join(raw[extent.addr : extent.addr + extent.length] for extent in extents)
    assert found[: len(data)] == data


def test_preallocated_blocks_are_unwritten(home: Path) -> None:
    with opened(home / "file") as fd:
        assert fallocate(fd, 0, 0, 32 * BLOCK) == 0
        os.pwrite(fd, os.urandom(BLOCK), 8 * BLOCK)
        extents = file_extents(fd, sync=True)
    unwritten = covered([extent for extent in extents if extent.flags & ExtentFlag.UNWRITTEN])
    written = covered([extent for extent in extents if not extent.flags & ExtentFlag.UNWRITTEN])
    assert written == [(8 * BLOCK, 9 * BLOCK)]
    assert unwritten == [(0, 8 * BLOCK), (9 * BLOCK, 32 * BLOCK)]


def test_delayed_allocation_shows_until_it_is_synced(home: Path) -> None:
    with opened(home / "file") as fd:
        os.write(fd, os.urandom(4 * BLOCK))
        before = file_extents(fd)
        after = file_extents(fd, sync=True)
    assert any(extent.flags & ExtentFlag.DELALLOC for extent in before)
    assert all(extent.flags & ExtentFlag.UNKNOWN for extent in before if extent.flags & ExtentFlag.DELALLOC)
    assert not any(extent.flags & ExtentFlag.DELALLOC for extent in after)
    assert covered(after) == [(0, 4 * BLOCK)]


def test_the_last_extent_says_so(home: Path) -> None:
    with opened(home / "file") as fd:
        os.write(fd, os.urandom(BLOCK))
        extents = file_extents(fd, sync=True)
        os.ftruncate(fd, 0)
        empty = file_extents(fd)
    assert extents[-1].flags & ExtentFlag.LAST and empty == []


def test_many_extents_come_in_batches(home: Path) -> None:
    """Twice as many as one batch holds, and a limit that cuts inside the second."""
    pieces = 2 * fiemap._BATCH + 7
    with opened(home / "file") as fd:
        os.ftruncate(fd, 2 * pieces * BLOCK)  # else XFS preallocates behind the end, and joins the pieces
        for piece in range(pieces):
            os.pwrite(fd, b"x" * BLOCK, 2 * piece * BLOCK)
        extents = file_extents(fd, sync=True)
        some = file_extents(fd, limit=fiemap._BATCH + 3)
    assert [extent.offset for extent in extents] == [2 * piece * BLOCK for piece in range(pieces)]
    assert some == extents[: fiemap._BATCH + 3]


def test_reflinked_blocks_are_shared(scratch: Path) -> None:
    """C01: XFS says which blocks a direct write must not change; the rest of the file is its own."""
    with (
        made_image("xfs", directory=scratch, mkfs=["-m", "reflink=1"]) as image,
        mounted(image, "xfs") as home,
        opened(home / "one") as one,
        opened(home / "two") as two,
    ):
        os.write(one, os.urandom(16 * BLOCK))
        os.fsync(one)
        fcntl.ioctl(two, FICLONE, one)
        os.pwrite(one, os.urandom(4 * BLOCK), 4 * BLOCK)
        of_one, of_two = file_extents(one, sync=True), file_extents(two, sync=True)
    shared = covered([extent for extent in of_one if extent.flags & ExtentFlag.SHARED])
    assert shared == [(0, 4 * BLOCK), (8 * BLOCK, 16 * BLOCK)]
    assert of_one[0].addr == of_two[0].addr
    # The clone's middle is its alone by now.
    assert covered([extent for extent in of_two if not extent.flags & ExtentFlag.SHARED]) == [(4 * BLOCK, 8 * BLOCK)]


def test_btrfs_compressed_and_inline_extents(scratch: Path) -> None:
    """V03: what cannot be read directly is marked."""
    with made_image("btrfs", directory=scratch) as image, mounted(image, "btrfs", "compress-force=zstd") as home:
        with opened(home / "compressed") as fd:
            os.write(fd, b"a" * (1 << 20))
            compressed = file_extents(fd, sync=True)
        with opened(home / "inline") as fd:
            os.write(fd, b"abc")
            inline = file_extents(fd, sync=True)
    assert compressed and all(extent.flags & ExtentFlag.ENCODED for extent in compressed)
    assert len(inline) == 1 and inline[0].flags & ExtentFlag.DATA_INLINE
    assert inline[0].flags & ExtentFlag.NOT_ALIGNED


def test_a_block_device_is_one_extent(scratch: Path) -> None:
    with (
        made_image(None, 8 << 20, directory=scratch) as image,
        loop_device(image) as device,
        opened(device, os.O_RDONLY) as fd,
    ):
        os.lseek(fd, 5, os.SEEK_SET)
        assert file_extents(fd) == [FileExtent(0, 0, 8 << 20, ExtentFlag.LAST)]
        assert os.lseek(fd, 0, os.SEEK_CUR) == 5


def test_a_file_system_without_fiemap_says_so() -> None:
    with (
        mounted("odirect-test", "tmpfs", "size=1m") as home,
        opened(home / "file") as fd,
        pytest.raises(UnsupportedError, match="FIEMAP"),
    ):
        file_extents(fd)


def test_a_descriptor_that_is_closed_is_an_odirect_error(scratch: Path) -> None:
    with opened(scratch / "file") as fd:
        pass
    with pytest.raises(ClosedError):
        file_extents(fd)


def answering(monkeypatch: pytest.MonkeyPatch, *extents: tuple[int, int, int, int], mapped: int | None = None) -> None:
    """Have FIEMAP answer these (offset, addr, length, flags) whatever is asked."""

    def ioctl(fd: int, request: int, buffer: bytearray) -> int:
        assert request == fiemap._FS_IOC_FIEMAP
        struct.pack_into("=I", buffer, 20, len(extents) if mapped is None else mapped)
        for index, (offset, addr, length, flags) in enumerate(extents):
            struct.pack_into("=QQQ16xI12x", buffer, 32 + 56 * index, offset, addr, length, flags)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@pytest.mark.parametrize(
    "extents",
    [
        [(4096, 0, 4096, 0), (0, 0, 4096, 1)],  # backwards
        [(0, 0, 8192, 0), (4096, 0, 4096, 1)],  # one byte at two places
        [(0, 0, 4096, 0), (0, 0, 4096, 1)],  # twice the same
        [(0, 0, 0, 0)],  # nothing, and not the last: would be asked for ever
        [(0, 0, 4096, 0)],  # the same answer to the next question
    ],
)
def test_an_answer_out_of_order_is_corruption(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, extents: list[tuple[int, int, int, int]]
) -> None:
    """The walk ends, with an error, whatever the kernel says."""
    answering(monkeypatch, *extents)
    with opened(scratch / "file") as fd, pytest.raises(CorruptionError, match="FIEMAP"):
        file_extents(fd)


def test_more_extents_than_there_was_room_for_is_corruption(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, mapped=fiemap._BATCH + 1)
    with opened(scratch / "file") as fd, pytest.raises(CorruptionError, match="room"):
        file_extents(fd)


def test_the_record_sizes_are_the_kernel_s() -> None:
    assert (fiemap._REQUEST.size, fiemap._EXTENT.size) == (32, 56)
    assert ctypes.sizeof(ctypes.c_uint64) * 7 == fiemap._EXTENT.size
