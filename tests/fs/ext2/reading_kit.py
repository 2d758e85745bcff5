"""Images of ext2 for the tests of the reading side, and a cache that is read from on a miss."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.loops import needs_tool, run

from odirect.base.layout import Place
from odirect.cache.metacache import BlockMiss
from odirect.fs.ext2.blockmap import BlockMap
from odirect.fs.ext2.format import SUPERBLOCK_ADDR, SUPERBLOCK_BYTES
from odirect.fs.ext2.geometry import Geometry, read_geometry
from odirect.fs.ext2.inode import Ext2Inode

T = TypeVar("T")
PLACE = Place("image", "test", 0)


class Blocks:
    """The look-ups of a MetaCache over an image file or bytes; `load` is a plain function here."""

    def __init__(self, source: Path | bytes | bytearray, block_bytes: int) -> None:
        self.source = source
        self.block_bytes = block_bytes
        self.held: dict[int, memoryview] = {}
        self.loads: list[tuple[int, ...]] = []

    def get(self, block: int) -> memoryview:
        return self.get_all([block])[0]

    def get_all(self, blocks: Sequence[int]) -> list[memoryview]:
        missing = tuple(dict.fromkeys(block for block in blocks if block not in self.held))
        if missing:
            raise BlockMiss(missing)
        return [self.held[block] for block in blocks]

    def peek(self, block: int) -> memoryview | None:
        return self.held.get(block)

    def read(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.held[block] = memoryview(read_bytes(self.source, block * self.block_bytes, self.block_bytes))

    def load(self, fn: Callable[[], T]) -> T:
        while True:
            try:
                return fn()
            except BlockMiss as miss:
                assert not all(block in self.held for block in miss.blocks), "a block that was read is missing again"
                self.loads.append(miss.blocks)
                self.read(miss.blocks)


class Image:
    """An opened image: its geometry, its blocks, and its inodes by number or path."""

    def __init__(self, source: Path | bytes | bytearray, device_bytes: int | None = None) -> None:
        self.source = source
        size = len(source) if isinstance(source, bytes | bytearray) else os.stat(source).st_size
        raw = read_bytes(source, SUPERBLOCK_ADDR, SUPERBLOCK_BYTES)
        self.geometry: Geometry = read_geometry(raw, name="image", device_bytes=device_bytes or size)
        self.cache: Any = Blocks(source, self.geometry.block_bytes)
        self.cache.load(lambda: self.geometry.load_fixed(self.cache))

    def raw_inode(self, number: int) -> bytes:
        return bytes(read_bytes(self.source, self.inode_addr(number), self.geometry.inode_bytes))

    def inode_addr(self, number: int) -> int:
        block, offset = self.cache.load(lambda: self.geometry.inode_place(self.cache, number))
        return block * self.geometry.block_bytes + offset

    def inode(self, number: int) -> Ext2Inode:
        return Ext2Inode.parse(self.geometry, number, self.raw_inode(number))

    def map(self, number: int) -> BlockMap:
        return BlockMap(self.geometry, self.cache, self.inode(number))

    def block(self, number: int) -> bytes:
        return read_bytes(self.source, number * self.geometry.block_bytes, self.geometry.block_bytes)

    def content(self, number: int) -> bytes:
        """All bytes of a file, through its block map."""
        inode = self.inode(number)
        size = self.geometry.block_bytes
        last = -(-inode.size // size) - 1
        blockmap = BlockMap(self.geometry, self.cache, inode)
        parts = []
        for found in self.cache.load(lambda: list(blockmap.runs(0, last))):
            if found.block:
                parts.append(read_bytes(self.source, found.block * size, found.count * size))
            else:
                parts.append(bytes(found.count * size))
        return b"".join(parts)[: inode.size]


def read_bytes(source: Path | bytes | bytearray, addr: int, length: int) -> bytes:
    if isinstance(source, bytes | bytearray):
        return bytes(source[addr : addr + length])
    with open(source, "rb") as file:
        file.seek(addr)
        return file.read(length)


def write_bytes(path: Path, addr: int, data: bytes | bytearray | memoryview) -> None:
    with open(path, "r+b") as file:
        file.seek(addr)
        file.write(data)


def make(path: Path, size: int, *options: str, kind: str = "ext2") -> Path:
    """A fresh volume of `size` bytes at `path`."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-F", "-t", kind, *options, path)
    return path


def debugfs(path: Path, *commands: str) -> str:
    """What debugfs printed for these commands, one after another; it writes. No root needed."""
    tool = needs_tool("debugfs")
    done = subprocess.run(
        [tool, "-w", "-f", "-", str(path)], input="\n".join(commands) + "\n", capture_output=True, text=True, check=True
    )
    said = [line for line in done.stderr.splitlines() if line and not line.startswith("debugfs ")]
    assert not said, said
    return done.stdout


def searched(pattern: str, text: str) -> re.Match[str]:
    """The first match of `pattern` in `text`, where lines are lines; there must be one."""
    found = re.search(pattern, text, re.M)
    assert found is not None, f"no {pattern!r} in {text}"
    return found


def inode_number(path: Path, name: str) -> int:
    """The inode that debugfs finds under that name."""
    return int(searched(r"Inode: (\d+)", run("debugfs", "-R", f"stat {name}", path)).group(1))


def check(path: Path) -> None:
    """e2fsck finds nothing at all."""
    done = subprocess.run([needs_tool("e2fsck"), "-fn", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def all_blocks(blockmap: BlockMap) -> Iterator[tuple[int, int]]:
    """(level, block) of all that the inode leads to, past its size too: 0 is data, others as in `indirect_blocks`."""
    last = blockmap.geometry.max_blocks - 1
    yield from blockmap.indirect_blocks(0, last)
    for part in blockmap.runs(0, last):
        if part.block:
            yield from ((0, block) for block in range(part.block, part.block + part.count))
