"""CachedFileDevice: the conformance suite with and without threads, and that nothing stays in the page cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from odirect.block.bio import ATOMIC, FUA, NOWAIT, READ, WRITE, Bio
from odirect.block.buffers import empty
from odirect.block.cached_file import CachedFileDevice
from odirect.ring._calls import cachestat
from odirect.ring.contract import RWF_DONTCACHE
from odirect.testing.suite import DeviceConformance

SPAN = 1 << 20


class TestCachedFile(DeviceConformance):
    """It takes any alignment, and grows."""

    grows = True

    @pytest.fixture(params=[0, 1, 4], ids="workers-{}".format)
    def device(self, request: pytest.FixtureRequest, scratch: Path) -> Iterator[CachedFileDevice]:
        path = scratch / "device"
        path.write_bytes(bytes(SPAN))
        fd = os.open(path, os.O_RDWR)
        device = CachedFileDevice(fd, workers=request.param)
        yield device
        device.close()
        os.close(fd)


@pytest.fixture
def device(scratch: Path) -> Iterator[CachedFileDevice]:
    path = scratch / "file"
    path.write_bytes(os.urandom(SPAN))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    device = CachedFileDevice(fd)
    yield device
    device.close()
    os.close(fd)


def do(device: CachedFileDevice, bio: Bio) -> Bio:
    device.submit(bio)
    device.commit()
    while not device.poll(-1):
        pass
    return bio


def pages(fd: int) -> int:
    """Pages of the file in the page cache."""
    found = cachestat(fd, 0, 0)
    if found is None:
        pytest.skip("needs cachestat(2)")
    return found[0]


@pytest.mark.parametrize("dontcache", [True, False])
@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize(("offset", "length"), [(0, SPAN), (100, 10_000), (4095, 2), (SPAN - 5, 5)])
def test_leaves_no_pages(device: CachedFileDevice, dontcache: bool, op: int, offset: int, length: int) -> None:
    """With RWF_DONTCACHE and without it, no page is in the cache afterwards, whatever the alignment (F50)."""
    device.uses_dontcache = dontcache
    assert pages(device.fd) == 0
    bio = do(device, Bio(op, offset, (memoryview(bytearray(length)),), length))
    assert (bio.error, bio.done_bytes) == (0, length)
    assert pages(device.fd) == 0


def test_goes_on_without_dontcache(device: CachedFileDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 6.14, or a file system without it, refuses the flag: it is left away from then on (F50)."""
    asked = []
    preadv = os.preadv

    def old_kernel(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags & RWF_DONTCACHE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", old_kernel)
    for _ in range(2):
        bio = do(device, Bio(READ, 1, (memoryview(bytearray(5000)),), 5000))
        assert (bio.error, bio.done_bytes) == (0, 5000)
    assert asked == [RWF_DONTCACHE, 0, 0]
    assert pages(device.fd) == 0


def test_refuses_atomic(device: CachedFileDevice) -> None:
    """The page cache cannot keep a write whole (F43)."""
    assert do(device, Bio(WRITE, 0, (empty(4096),), 4096, ATOMIC)).error == errno.EINVAL


def test_a_durable_write_is_a_synchronous_one(device: CachedFileDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """FUA is RWF_DSYNC here too (B05)."""
    flags = []
    pwritev = os.pwritev

    def watched(fd: int, buffers: list[memoryview], offset: int, given: int = 0) -> int:
        flags.append(given & ~RWF_DONTCACHE)
        return pwritev(fd, buffers, offset, given)

    monkeypatch.setattr(os, "pwritev", watched)
    do(device, Bio(WRITE, 3, (empty(5),), 5, FUA))
    do(device, Bio(WRITE, 3, (empty(5),), 5))
    assert flags == [2, 0]


def test_write_back_errors_are_the_writes_own(device: CachedFileDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device says when the page is written back is this bio's error, not lost (F41)."""
    monkeypatch.setattr("odirect.block.cached_file.sync_file_range", lambda *_: -errno.EIO)
    assert do(device, Bio(WRITE, 3, (empty(5),), 5)).error == errno.EIO


def test_nowait_says_so_when_it_would_have_to_read(device: CachedFileDevice) -> None:
    """NOWAIT on a page that is not cached: EAGAIN or a refusal, and nothing was done (F08)."""
    target = bytearray(b"\xa5" * 100)
    bio = do(device, Bio(READ, 0, (memoryview(target),), 100, NOWAIT))
    assert bio.error in (errno.EAGAIN, errno.EOPNOTSUPP)
    assert bio.done_bytes == 0 and target == b"\xa5" * 100


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_that_was_released(scratch: Path, workers: int) -> None:
    """A view that its owner has released is EFAULT for that bio, and the device lives on (B08, F23)."""
    path = scratch / "file"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        device = CachedFileDevice(file.fileno(), workers=workers)
        view = memoryview(bytearray(100))
        bio = Bio(READ, 0, (view,), 100)
        device.submit(bio)
        view.release()
        device.commit()
        while device.in_flight:
            device.poll(-1)
        assert bio.error == errno.EFAULT
        assert do(device, Bio(READ, 0, (memoryview(bytearray(9)),), 9)).done_bytes == 9
        device.close()


def test_close_waits_for_the_threads(scratch: Path) -> None:
    """What was handed over is done when `close` returns (F24)."""
    path = scratch / "file"
    path.write_bytes(bytes(SPAN))
    with path.open("r+b") as file:
        device = CachedFileDevice(file.fileno(), workers=2)
        for number in range(32):
            data = memoryview(bytes([number]) * 1000)
            device.submit(Bio(WRITE, number * 1000, (data,), 1000))
        device.commit()
        device.close()
        written = path.read_bytes()
    assert written[:32000] == b"".join(bytes([number]) * 1000 for number in range(32))
