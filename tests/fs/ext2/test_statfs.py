"""How full a volume is, beside what a mount of it by the kernel says."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.loops import made_image, mounted

import odirect
from odirect import aio

MIB = 1 << 20
_JOURNAL_INODE = 1024 + 224

GEOMETRIES = [
    ("ext2", 64, ("-b", "1024")),
    ("ext2", 64, ("-b", "2048")),
    ("ext2", 300, ("-b", "4096")),
    ("ext2", 64, ("-b", "1024", "-O", "^resize_inode")),
    ("ext2", 100, ("-b", "1024", "-O", "^sparse_super,^resize_inode", "-g", "2048")),
    ("ext2", 100, ("-b", "1024", "-g", "1024", "-I", "128", "-m", "0")),
    ("ext2", 300, ("-b", "1024", "-I", "256", "-N", "5000", "-m", "20")),
    ("ext2", 8, ("-r", "0")),
    ("ext3", 64, ("-b", "1024")),
]


def figures(found: os.statvfs_result) -> Sequence[int]:
    """What does not depend on how it is mounted."""
    names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax")
    return [getattr(found, f"f_{name}") for name in names]


@pytest.mark.parametrize(("kind", "size", "options"), GEOMETRIES)
def test_it_is_as_full_as_mounted(kind: str, size: int, options: tuple[str, ...], scratch: Path) -> None:
    """Without the overhead; where files use space, too."""
    with made_image(kind, size * MIB, directory=scratch, mkfs=options) as image:
        for _ in range(2):
            with mounted(image, kind, "ro") as point:
                theirs = figures(os.statvfs(point))
            with odirect.open_volume(image) as volume:
                assert figures(volume.statfs()) == theirs
                blocks = volume.file_system.geometry.blocks_count  # type: ignore[attr-defined]
                assert theirs[2] < blocks
            if kind == "ext2":
                with odirect.open_volume(image, "r+") as volume:
                    volume.write_bytes("/file", b"x" * (3 * MIB))
                    volume.mkdir("/directory", exist_ok=True)


def test_a_journal_that_is_none_takes_nothing(scratch: Path) -> None:
    """A number of a journal that leads nowhere is for `check` to tell."""
    with made_image("ext3", 16 * MIB, directory=scratch, mkfs=("-b", "1024")) as image:
        with odirect.open_volume(image) as volume:
            whole = volume.statfs().f_blocks
        with image.open("r+b") as file:
            file.seek(_JOURNAL_INODE)
            file.write(struct.pack("<I", 0xFFFFFFFF))
        with odirect.open_volume(image) as volume:
            assert volume.statfs().f_blocks == whole + 1024


async def _asynchronous(image: Path) -> Sequence[int]:
    async with aio.open_volume(image) as volume:
        return figures(await volume.statfs())


def test_the_same_for_asyncio(scratch: Path) -> None:
    with made_image("ext2", 16 * MIB, directory=scratch) as image, odirect.open_volume(image) as volume:
        assert asyncio.run(_asynchronous(image)) == figures(volume.statfs())
