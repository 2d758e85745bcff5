"""Block numbers that are read ahead for who goes through a file in order."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fs.ext2.writing_kit import device_of, fresh_image

from odirect.base.errors import CorruptionError
from odirect.block.bio import READ, Bio
from odirect.block.buffers import empty
from odirect.block.memory import MemoryDevice
from odirect.fs.ext2.volume import Ext2, open_ext2
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Scheduler

KIB = 1024
LEAVES = 24
SIZE = LEAVES * 256 * KIB


class Counting(MemoryDevice):
    """Remembers where reads began."""

    reads: list[int]

    def submit(self, bio: Bio) -> None:
        if bio.op == READ:
            self.reads.append(bio.addr)
        super().submit(bio)


def opened(device: Any, *, writable: bool) -> tuple[SyncDriver, Ext2]:
    scheduler = Scheduler()
    scheduler.add_device(device)
    driver = SyncDriver(scheduler)
    volume = driver.run(
        open_ext2(device, name="image", writable=writable, scheduler=scheduler, clock_ns=lambda: 1_700_000_000 * 10**9)
    )
    return driver, volume


def image_with_a_file() -> tuple[bytes, int, list[int]]:
    """An image with a file of 24 leaves; its inode, and the indirect blocks of its leaves."""
    device = device_of(fresh_image(16 << 20, "-b", "1024"))
    driver, volume = opened(device, writable=True)
    number = driver.run(volume.create(volume.root, b"file", 0o100644))
    file = driver.run(volume.open_file(number, writable=True))
    memory = empty(256 * KIB)
    for turn in range(LEAVES):
        memory[:] = bytes([turn + 1]) * len(memory)
        driver.run(file.write(turn * len(memory), [memory]))
    driver.run(file.close())
    inode = volume.inode(number)
    leaves = [block for level, block in volume.map_of(inode).indirect_blocks(0, SIZE // KIB - 1) if level == 1]
    driver.run(volume.close())
    return bytes(device.data), number, leaves


def read_in_order(image: bytes, number: int, size: int) -> Counting:
    device = Counting(len(image), data=image)
    device.reads = []
    driver, volume = opened(device, writable=False)
    file = driver.run(volume.open_file(number, writable=False))
    memory = empty(64 * KIB)
    for offset in range(0, size, len(memory)):
        assert driver.run(file.read(offset, [memory])).transferred == len(memory)
        assert memory[0] == offset // (256 * KIB) + 1
    driver.run(file.close())
    driver.run(volume.close())
    return device


def test_leaves_are_read_ahead() -> None:
    """Leaves are not waited for one by one, but more and more of them at once."""
    image, number, leaves = image_with_a_file()
    reads = read_in_order(image, number, SIZE).reads
    is_leaf = [addr // KIB in leaves for addr in reads]
    times = sum(here and not before for before, here in zip([False, *is_leaf], is_leaf, strict=False))
    assert 1 <= times <= 4, f"{LEAVES} leaves were waited for {times} times"


def test_what_is_wrong_ahead_is_told_where_it_is() -> None:
    """A wrong number in the last leaf does not keep anybody from what lies before it."""
    image, number, leaves = image_with_a_file()
    damaged = bytearray(image)
    damaged[leaves[-1] * KIB : leaves[-1] * KIB + 4] = b"\xff" * 4
    sound = (LEAVES - 2) * 256 * KIB
    read_in_order(bytes(damaged), number, sound)
    with pytest.raises(CorruptionError):
        read_in_order(bytes(damaged), number, SIZE)
