"""The device in memory: the conformance suite, and what it enforces."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import pytest

from odirect.base.errors import ClosedError
from odirect.block.bio import ATOMIC, DISCARD, FUA, READ, WRITE, ZERO, Bio
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice, Limits
from odirect.block.memory import MemoryDevice
from odirect.testing.devices import OddDevice, atomic_limits
from odirect.testing.suite import DeviceConformance, pattern, readable, without_fua

MIB = 1 << 20


class TestMemoryDevice(DeviceConformance):
    @pytest.fixture
    def device(self) -> Iterator[BlockDevice]:
        device = MemoryDevice(2 * MIB)
        yield device
        device.close()


class TestOddMemoryDevice(DeviceConformance):
    """F51: large, unlike alignments."""

    @pytest.fixture(params=[(4, 512, 4096), (512, 65536, 512), (4096, 4096, 65536)])
    def device(self, request: pytest.FixtureRequest) -> Iterator[BlockDevice]:
        memory, read, write = request.param
        device = OddDevice(2 * MIB, memory_align=memory, read_align=read, write_align=write)
        yield device
        device.close()


class TestByteMemoryDevice(DeviceConformance):
    """A device without any alignment, a few bytes longer than a block, with atomic writes."""

    @pytest.fixture
    def device(self) -> Iterator[BlockDevice]:
        limits = Limits(
            read_align=1, write_align=1, memory_align=1, logical_block=1, fua=True, discard=True, atomic_max=4096
        )
        device = MemoryDevice(2 * MIB + 7, limits=limits)
        yield device
        device.close()


def done(device: MemoryDevice, *bios: Bio) -> list[Bio]:
    for bio in bios:
        device.submit(bio)
    device.commit()
    return list(device.poll(0))


def test_nothing_moves_before_commit_and_poll() -> None:
    """A bio is carried out by the poll that returns it, and not before its commit (G13, F24)."""
    device = MemoryDevice(4096)
    memory = empty(512)
    memory[:] = b"a" * 512
    bio = Bio(WRITE, 0, (memory,), 512)
    device.submit(bio)
    assert device.poll(0) == [] and device.in_flight == 1
    device.commit()
    assert device.data[:512] == bytes(512)
    memory[:] = b"b" * 512
    assert device.poll(0) == [bio] and device.in_flight == 0
    assert device.data[:512] == b"b" * 512
    device.close()


@pytest.mark.parametrize("memory_align", [4, 512, 4096])
@pytest.mark.parametrize("read_align", [512, 4096, 65536])
@pytest.mark.parametrize("write_align", [512, 4096, 65536])
def test_every_odd_alignment_is_enforced(memory_align: int, read_align: int, write_align: int) -> None:
    """F51, B01: exactly what is aligned is taken, read and write each by its own figure."""
    device = OddDevice(4 * 65536, memory_align=memory_align, read_align=read_align, write_align=write_align)
    memory = empty(2 * 65536 + 4096)
    for op, align in ((READ, read_align), (WRITE, write_align)):
        for step in (512, 4096, 65536):
            for addr, length, skip in (
                (step, 65536, 0),
                (0, step, 0),
                (0, 65536, step % 4096),
                (0, 65536, 4),
                (0, 65536, 2),
            ):
                bio = Bio(op, addr, (memory[skip : skip + length],), length)
                done(device, bio)
                good = addr % align == 0 and length % align == 0 and skip % memory_align == 0
                assert bio.error == (0 if good else errno.EINVAL), (bio, skip)
    device.close()


def test_every_odd_device_is_made() -> None:
    """F51: the factory covers each combination of memory 4, 512, 4096 and offset 512, 4096, 65536, once."""
    seen = set()
    for device in OddDevice.every(65536):
        seen.add((device.limits.memory_align, device.limits.read_align, device.limits.write_align))
    assert len(seen) == 27 and (4, 65536, 512) in seen


def test_limits_of_a_bio() -> None:
    """B02: more segments or bytes than a bio may have are EINVAL, as many as it may have are not."""
    device = MemoryDevice(MIB, limits=Limits(max_segments=4, max_bio_bytes=4096, volatile_cache=False))
    memory = empty(8192)
    four = Bio(READ, 0, tuple(memory[i * 512 : i * 512 + 512] for i in range(4)), 2048)
    five = Bio(READ, 0, tuple(memory[i * 512 : i * 512 + 512] for i in range(5)), 2560)
    most = Bio(READ, 0, (memory[:4096],), 4096)
    more = Bio(READ, 0, (memory[:4608],), 4608)
    lying = Bio(READ, 0, (memory[:1024],), 512)
    negative = Bio(READ, -512, (memory[:512],), 512)
    nonsense = Bio(9, 0, (memory[:512],), 512)
    done(device, four, five, most, more, lying, negative, nonsense)
    assert [bio.error for bio in (four, most)] == [0, 0]
    assert [bio.error for bio in (five, more, lying, negative)] == [errno.EINVAL] * 4
    assert nonsense.error == errno.EOPNOTSUPP
    device.close()


def test_end_of_device() -> None:
    """B09: the write that crosses the end moves nothing and is ENOSPC; the read is short."""
    device = MemoryDevice(1000, data=b"x" * 1000)
    memory = empty(1024)
    crossing, past = Bio(WRITE, 512, (memory[:512],), 512), Bio(WRITE, 1024, (memory[:512],), 512)
    zero, discard = Bio(ZERO, 512, length=512), Bio(DISCARD, 1024, length=512)
    short, none = Bio(READ, 512, (memory[:512],), 512), Bio(READ, 1024, (memory[512:],), 512)
    done(device, crossing, past, zero, discard, short, none)
    assert [bio.error for bio in (crossing, past, zero, discard)] == [errno.ENOSPC] * 4
    assert (short.error, short.done_bytes, none.error, none.done_bytes) == (0, 488, 0, 0)
    assert bytes(memory) == b"x" * 488 + bytes(536)
    assert device.data == b"x" * 1000
    device.close()


def test_memory_that_cannot_be_used() -> None:
    """B08: read-only, released, scattered and no memory at all are EFAULT."""
    device = MemoryDevice(4096, limits=Limits(memory_align=1, volatile_cache=False))
    gone = memoryview(bytearray(512))
    gone.release()
    bad = [
        Bio(READ, 0, (memoryview(bytes(512)),), 512),
        Bio(READ, 0, (gone,), 512),
        Bio(WRITE, 0, (gone,), 512),
        Bio(WRITE, 0, (memoryview(bytes(1024))[::2],), 512),
        Bio(WRITE, 0, (None,), 512),  # type: ignore[arg-type]
    ]
    done(device, *bad)
    assert [bio.error for bio in bad] == [errno.EFAULT] * len(bad)
    device.close()


def test_wide_and_empty_segments() -> None:
    """Memory of any item size is a run of bytes; an empty segment moves none."""
    device = MemoryDevice(4096, limits=Limits(memory_align=1, volatile_cache=False))
    wide = memoryview(bytearray(pattern(512, 1))).cast("Q")
    nothing = memoryview(b"")
    done(device, bio := Bio(WRITE, 0, (nothing, wide, nothing), 512))
    assert (bio.error, bio.done_bytes) == (0, 512)
    back = memoryview(bytearray(512)).cast("I")
    done(device, bio := Bio(READ, 0, (memoryview(bytearray()), back), 512))
    assert (bio.error, bio.done_bytes) == (0, 512)
    assert back.tobytes() == pattern(512, 1)
    device.close()


def test_fua_needs_a_device_that_has_it() -> None:
    """B05: with a volatile cache and no FUA, a write with FUA is refused; a flush after it is the caller's."""
    device = MemoryDevice(4096, limits=without_fua(Limits()))
    done(device, bio := Bio(WRITE, 0, (empty(512),), 512, FUA))
    assert bio.error == errno.EOPNOTSUPP
    device.close()


@pytest.mark.parametrize(
    ("addr", "length", "good"),
    [(0, 512, False), (0, 1024, True), (4096, 4096, True), (1024, 2048, False), (0, 8192, False), (0, 3072, False)],
)
def test_atomic_limits(addr: int, length: int, good: bool) -> None:
    """F43: a power of two, naturally aligned, within the limits; else EINVAL."""
    device = MemoryDevice(16384, limits=atomic_limits(4096, smallest=1024))
    done(device, bio := Bio(WRITE, addr, (empty(length),), length, ATOMIC))
    assert bio.error == (0 if good else errno.EINVAL)
    device.close()


def test_starting_data() -> None:
    """It starts with a copy of what it is given, and says what cannot be."""
    data = bytearray(b"abc")
    device = MemoryDevice(8, data=data)
    data[:] = b"xyz"
    assert bytes(device.data) == b"abc\0\0\0\0\0"
    device.close()
    with pytest.raises(ValueError, match="do not fit"):
        MemoryDevice(2, data=b"abc")
    with pytest.raises(ValueError, match="-1"):
        MemoryDevice(-1)


def test_close_finishes_what_was_submitted() -> None:
    """After close nothing is taken, and what was submitted still comes back."""
    device = MemoryDevice(4096)
    memory = empty(512)
    memory[:] = b"z" * 512
    bio = Bio(WRITE, 0, (memory,), 512)
    device.submit(bio)
    device.close()
    assert device.poll(-1) == [bio]
    assert device.data[:512] == memory
    with pytest.raises(ClosedError):
        device.submit(bio)
    assert device.wakeup_fd() is None


def test_submitting_while_another_thread_polls() -> None:
    """One thread submits while another polls by the wake-up: every bio comes back once."""
    device = MemoryDevice(MIB)
    total = 2000
    back: list[Bio] = []
    descriptor = device.wakeup_fd()
    assert descriptor is not None

    def poller() -> None:
        while len(back) < total and readable(descriptor, 60_000):
            back.extend(device.poll(0))

    thread = threading.Thread(target=poller)
    thread.start()
    bios = [Bio(READ, 0, (empty(512),), 512) for _ in range(total)]
    for bio in bios:
        device.submit(bio)
        device.commit()
    thread.join()
    assert len(back) == total and {id(bio) for bio in back} == {id(bio) for bio in bios}
    device.close()
