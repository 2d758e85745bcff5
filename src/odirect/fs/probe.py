"""Which file system a device holds, told by its magic numbers, and opening it.

Source: the places of the magic numbers are the published ones of each format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from odirect.base.errors import UnsupportedError
from odirect.base.units import align_down, align_up
from odirect.block.bio import READ
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice
from odirect.dio.blockdev import transfer
from odirect.fs.base import FileSystem
from odirect.sched.scheduler import Scheduler


class _Magic(NamedTuple):
    kind: str
    addr: int
    magic: bytes


_MAGICS = (
    _Magic("ext2", 1024 + 56, b"\x53\xef"),
    _Magic("XFS", 0, b"XFSB"),
    _Magic("btrfs", 65536 + 64, b"_BHRfS_M"),
    _Magic("LUKS", 0, b"LUKS\xba\xbe"),
    _Magic("F2FS", 1024, b"\x10\x20\xf5\xf2"),
    _Magic("exFAT", 3, b"EXFAT   "),
    _Magic("NTFS", 3, b"NTFS    "),
    _Magic("SquashFS", 0, b"hsqs"),
    _Magic("ISO 9660", 32769, b"CD001"),
    _Magic("swap", 4086, b"SWAPSPACE2"),
    _Magic("gzip", 0, b"\x1f\x8b"),
    _Magic("zstd", 0, b"\x28\xb5\x2f\xfd"),
    _Magic("qcow2", 0, b"QFI\xfb"),
    _Magic("a GPT partition table", 512, b"EFI PART"),
    _Magic("a partition table", 510, b"\x55\xaa"),
)


async def kind_of(device: BlockDevice) -> str | None:
    """What the device holds ("ext2" stands for all of its family), or None if nothing is recognised."""
    for kind, addr, magic in _MAGICS:
        if await _bytes_at(device, addr, len(magic)) == magic:
            return kind
    return None


async def open_filesystem(
    device: BlockDevice,
    *,
    name: str,
    writable: bool,
    scheduler: Scheduler,
    clock_ns: Callable[[], int],
    privileged: bool = False,
) -> FileSystem:
    """The file system on `device`, open; the device stays the caller's.

    clock_ns: the time of day in nanoseconds. privileged: may use the space that is kept for root.
    Raises UnsupportedError if it is none that is ours, CorruptionError, and ReadOnlyError with the
    reason where it cannot be written.
    """
    kind = await kind_of(device)
    if kind == "ext2":
        from odirect.fs.ext2.volume import open_ext2

        return await open_ext2(
            device, name=name, writable=writable, scheduler=scheduler, clock_ns=clock_ns, privileged=privileged
        )
    if kind is None:
        raise UnsupportedError("there is no file system on it that is known here", path=name)
    raise UnsupportedError(f"it holds {kind}, and only ext2 can be opened", path=name)


async def _bytes_at(device: BlockDevice, addr: int, length: int) -> bytes:
    unit = max(device.limits.read_align, device.limits.memory_align)
    first = align_down(addr, unit)
    memory = empty(align_up(addr + length, unit) - first)
    count = await transfer(device, READ, first, [memory], len(memory))
    return bytes(memory[addr - first : max(addr - first, min(count, addr - first + length))])
