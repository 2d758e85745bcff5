"""FileDevice: the conformance suite over every ring, on a plain file and on loop devices, and what is its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loops import loop_device

from odirect.base.errors import ODirectError
from odirect.block.bio import FLUSH, FUA, HIPRI, META, PREFLUSH, READ, WRITE, Bio
from odirect.block.buffers import empty
from odirect.block.file_device import FileDevice, file_bytes, transfer_flags
from odirect.block.limits import file_limits
from odirect.block.queue import RingQueue, Step
from odirect.ring.contract import RWF_DSYNC, RWF_HIPRI, RWF_NOWAIT, Ring
from odirect.ring.threads import ThreadRing
from odirect.testing.suite import DeviceConformance

RINGS = ("uring", "uring-shared", "threads-0", "threads-4")
SPAN = 1 << 20


def new_ring(kind: str) -> Ring:
    """A ring of this kind; skips the test where io_uring cannot be used."""
    if kind.startswith("uring"):
        from odirect.ring._uring import UringRing

        try:
            return UringRing(64, shared=kind == "uring-shared")
        except ODirectError as refusal:
            pytest.skip(f"no io_uring here: {refusal}")
    return ThreadRing(64, workers=int(kind[-1]), shared=kind == "threads-4")


@contextlib.contextmanager
def file_device(path: str | Path, kind: str) -> Iterator[FileDevice]:
    """A FileDevice over `path` on a ring of its own."""
    queue = RingQueue(new_ring(kind))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        device = FileDevice(queue, fd, file_limits(fd, path=path, writable=True)[0])
        yield device
        device.close()
    finally:
        queue.close()
        os.close(fd)


class TestOnAFile(DeviceConformance):
    """On a plain file, which grows."""

    grows = True
    strict_memory = False
    leaves_tail = False

    @pytest.fixture(params=RINGS)
    def device(self, request: pytest.FixtureRequest, scratch: Path) -> Iterator[FileDevice]:
        path = scratch / "device"
        path.write_bytes(bytes(SPAN))
        with file_device(path, request.param) as device:
            yield device


class TestOnALoopDevice(DeviceConformance):
    """On block devices with sectors of 512 and 4096 bytes (B01, B09, F51)."""

    strict_memory = False

    @pytest.fixture(params=[(kind, sector) for kind in RINGS for sector in (512, 4096)], ids=str)
    def device(self, request: pytest.FixtureRequest, scratch: Path) -> Iterator[FileDevice]:
        kind, sector = request.param
        path = scratch / "image"
        path.write_bytes(bytes(2 * SPAN))
        with loop_device(path, sector) as name, file_device(name, kind) as device:
            assert device.limits.logical_block == sector
            yield device


class FakeRing(ThreadRing):
    """A ring that remembers what was queued, and answers as it is told."""

    def __init__(self) -> None:
        super().__init__(8, workers=0)
        self.queued: list[tuple[int, int, int]] = []
        self.answers: dict[int, int] = {}

    def queue(  # type: ignore[override]
        self, op: int, handle: int, segments: object, offset: int, length: int, flags: int, tag: object
    ) -> None:
        self.queued.append((op, length, flags))
        super().queue(op, handle, segments, offset, length, flags, tag)  # type: ignore[arg-type]


@pytest.fixture
def fake(scratch: Path) -> Iterator[tuple[FileDevice, FakeRing]]:
    path = scratch / "device"
    path.write_bytes(bytes(1 << 16))
    ring = FakeRing()
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    queue = RingQueue(ring)
    device = FileDevice(queue, fd, file_limits(fd, path=path, writable=True)[0])
    yield device, ring
    device.close()
    queue.close()
    os.close(fd)


def do(device: FileDevice, bio: Bio) -> Bio:
    device.submit(bio)
    device.commit()
    while not device.poll(-1):
        pass
    return bio


def test_flags_of_a_bio_become_the_kernels() -> None:
    """FUA is RWF_DSYNC (B05), NOWAIT is RWF_NOWAIT (F08), HIPRI is RWF_HIPRI (B06), alone and together."""
    assert transfer_flags(0) == 0
    assert transfer_flags(FUA) == RWF_DSYNC
    assert transfer_flags(FUA | 8 | HIPRI) == RWF_DSYNC | RWF_NOWAIT | RWF_HIPRI
    assert transfer_flags(META) == 0


def test_fua_reaches_the_ring(fake: tuple[FileDevice, FakeRing]) -> None:
    """A write with FUA is queued with RWF_DSYNC, one without is not (B05)."""
    device, ring = fake
    do(device, Bio(WRITE, 0, (empty(4096),), 4096, FUA))
    do(device, Bio(WRITE, 0, (empty(4096),), 4096))
    assert [flags for _, _, flags in ring.queued] == [RWF_DSYNC, 0]


def test_preflush_is_a_sync_before_the_data(fake: tuple[FileDevice, FakeRing]) -> None:
    """PREFLUSH first makes earlier writes durable, then writes, and is one completion (F42)."""
    device, ring = fake
    bio = do(device, Bio(WRITE, 0, (empty(4096),), 4096, PREFLUSH | FUA))
    assert [(op, length) for op, length, _ in ring.queued] == [(2, 0), (1, 4096)]
    assert (bio.error, bio.done_bytes) == (0, 4096)


def test_hipri_is_harmless_where_nothing_polls(fake: tuple[FileDevice, FakeRing]) -> None:
    """HIPRI on a device that does not poll is queued without it (B06)."""
    device, ring = fake
    assert not device.limits.poll
    bio = do(device, Bio(READ, 0, (empty(4096),), 4096, HIPRI))
    assert bio.done_bytes == 4096
    assert ring.queued == [(0, 4096, 0)]


def test_flush_of_the_data_alone_or_with_metadata(fake: tuple[FileDevice, FakeRing]) -> None:
    """FLUSH is fdatasync, with META fsync."""
    device, ring = fake
    do(device, Bio(FLUSH, 0))
    do(device, Bio(FLUSH, 0, flags=META))
    assert [flags for _, _, flags in ring.queued] == [0x1000, 0]


def test_size_of_a_file_is_the_present_one(fake: tuple[FileDevice, FakeRing]) -> None:
    """A file that grows or shrinks beside us is seen to (F02)."""
    device, _ = fake
    assert device.size_bytes == 1 << 16
    os.ftruncate(device.fd, 100)
    assert device.size_bytes == file_bytes(device.fd) == 100


def test_queue_closes_both_rings_though_one_fails() -> None:
    """A ring that cannot be closed does not keep the other one open (F24)."""

    class Stubborn(ThreadRing):
        def close(self) -> None:
            super().close()
            raise RuntimeError("will not")

    first, second = Stubborn(4, workers=0), ThreadRing(4, workers=0)
    queue = RingQueue(first, open_polled=lambda: second)
    bio = Bio(READ, 0, (empty(512),), 512)
    with open("/dev/zero", "rb") as zero:
        queue.submit_polled(READ, zero.fileno(), Step(bio, lambda result: result), 0)
        queue.commit()
        assert queue.poll(-1) == [bio]
    with pytest.raises(RuntimeError, match="will not"):
        queue.close()
    with pytest.raises(ODirectError, match="closed"):
        second.commit()
