"""What the tests of `mkfs` and `check` share: volumes made here and by mke2fs, and e2fsck's word on them."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.loops import needs_tool

from odirect.block.device import BlockDevice
from odirect.block.file_device import FileDevice
from odirect.block.limits import file_limits
from odirect.dio.here import here
from odirect.fs.ext2 import mkfs
from odirect.fs.ext2.format import Superblock
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Scheduler

T = TypeVar("T")

UUID = bytes(range(16))
SEED = bytes(range(16, 32))
NOW = 1_700_000_000
_NAMED: dict[str, Any] = {"uuid": UUID, "hash_seed": SEED, "now_seconds": NOW}


def over(device: BlockDevice, coroutine: Coroutine[Any, Any, T]) -> T:
    """What `coroutine` returns, run over a device that is polled by itself."""
    scheduler = Scheduler()
    scheduler.add_device(device)
    return SyncDriver(scheduler).run(coroutine)


def make_on(device: BlockDevice, size: int, **options: Any) -> Superblock:
    """An empty volume on `device`."""
    options = _NAMED | options
    return over(device, mkfs.make(device, size, **options))


def make_file(path: Path, size: int, **options: Any) -> Superblock:
    """An empty volume in a file of `size` bytes at `path`, which is made anew."""
    path.write_bytes(b"")
    os.truncate(path, size)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        lent = here()
        device = FileDevice(lent.queue, fd, file_limits(fd, path=path, writable=True)[0], register=False)
        options = _NAMED | options
        return lent.run(mkfs.make(device, size, **options))
    finally:
        os.close(fd)


def mke2fs(path: Path, size: int, *options: str) -> str:
    """ "" once mke2fs has made an ext2 volume in a new file of `size` bytes, else what it said."""
    path.write_bytes(b"")
    os.truncate(path, size)
    words = [needs_tool("mke2fs"), "-q", "-F", "-t", "ext2", "-U", str(uuid.UUID(bytes=UUID))]
    words += ["-E", f"hash_seed={uuid.UUID(bytes=SEED)}", *options, str(path)]
    environment = dict(os.environ, E2FSPROGS_FAKE_TIME=str(NOW))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or "failed") if done.returncode else ""


def e2fsck(path: Path) -> tuple[int, str]:
    """The exit status of `e2fsck -fn`, and what it printed."""
    done = subprocess.run([needs_tool("e2fsck"), "-fn", str(path)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def complaints(path: Path) -> str:
    """What e2fsck has to say beyond its passes and its summary; "" for a clean volume."""
    code, said = e2fsck(path)
    usual = ("e2fsck ", "Pass ")
    lines = [line for line in said.splitlines() if line and not line.startswith(usual) and " files (" not in line]
    return "\n".join([*lines, f"exit {code}"]) if code or lines else ""


def accepted(path: Path) -> None:
    """Fail the test unless e2fsck finds nothing at all."""
    said = complaints(path)
    if said:
        pytest.fail(f"e2fsck of {path}: {said}")


def data_blocks(path: Path, block_bytes: int) -> set[int]:
    """The blocks of a sparse file that may hold something."""
    found: set[int] = set()
    with path.open("rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.update(range(start // block_bytes, -(-at // block_bytes)))
    return found


def differing_blocks(one: Path, other: Path, block_bytes: int) -> list[int]:
    """The blocks in which two sparse images differ."""
    blocks = sorted(data_blocks(one, block_bytes) | data_blocks(other, block_bytes))
    with one.open("rb") as first, other.open("rb") as second:
        return [
            block
            for block in blocks
            if os.pread(first.fileno(), block_bytes, block * block_bytes)
            != os.pread(second.fileno(), block_bytes, block * block_bytes)
        ]
