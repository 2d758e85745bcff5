"""What the tests of the writing side share: a small volume over a device in memory, and e2fsck's word on it."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast

from tests.dio.kit import drive
from tests.fs.ext2.reading_kit import Image, all_blocks
from tests.loops import needs_tool

from odirect.block.bio import READ, WRITE
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice, Limits
from odirect.block.memory import MemoryDevice
from odirect.cache.metacache import TREE, MetaCache
from odirect.dio.blockdev import transfer
from odirect.fs.ext2 import directory, entries, grow
from odirect.fs.ext2.allocate import Allocator
from odirect.fs.ext2.blockmap import BlockMap
from odirect.fs.ext2.commit import Committer
from odirect.fs.ext2.format import INODE, ROOT_INODE, SUPERBLOCK_ADDR, SUPERBLOCK_BYTES, FileType, InodeFlags
from odirect.fs.ext2.geometry import read_geometry
from odirect.fs.ext2.inode import Ext2Inode

T = TypeVar("T")

NOW_NS = 1_700_000_000_123_456_789
TYPES = {stat.S_IFREG: FileType.REGULAR, stat.S_IFDIR: FileType.DIRECTORY}


@functools.lru_cache(maxsize=32)
def fresh_image(size: int, *options: str) -> bytes:
    """A new ext2 image of `size` bytes, as mke2fs makes it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        path = Path(place) / "image"
        path.touch()
        os.truncate(path, size)
        subprocess.run(
            [needs_tool("mke2fs"), "-q", "-F", "-t", "ext2", *options, str(path)], check=True, capture_output=True
        )
        return path.read_bytes()


@functools.lru_cache(maxsize=8)
def populated_image(names: int, *options: str) -> bytes:
    """An image with a directory "theirs" of files of two lengths of name, made by mke2fs: not cut into sectors."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        tree = Path(place) / "tree"
        (tree / "theirs").mkdir(parents=True)
        for number in range(names):
            (tree / "theirs" / f"name-{number:03}{'-long' * (number % 3)}").touch()
        path = Path(place) / "image"
        path.touch()
        os.truncate(path, 8 << 20)
        subprocess.run(
            [needs_tool("mke2fs"), "-q", "-F", "-t", "ext2", *options, "-d", str(tree), str(path)],
            check=True,
            capture_output=True,
        )
        return path.read_bytes()


def device_of(image: bytes, *, sector: int = 512) -> MemoryDevice:
    """A device with a copy of the image, and sectors of that size."""
    limits = Limits(logical_block=sector, physical_block=sector, read_align=sector, write_align=sector)
    return MemoryDevice(len(image), limits=limits, data=image)


def complaint(image: bytes | memoryview) -> str:
    """What e2fsck -fn says that is wrong; "" for nothing."""
    status, said = _fsck("-fn", image)[:2]
    return "" if status == 0 else said


def repaired(image: bytes | memoryview) -> tuple[bytes, str]:
    """The image after e2fsck -fy, and what that said. Fails unless a second look finds nothing."""
    status, said, after = _fsck("-fy", image)
    assert status in (0, 1), said
    left = complaint(after)
    assert not left, f"{said}\nand then\n{left}"
    return after, said


def _fsck(how: str, image: bytes | memoryview) -> tuple[int, str, bytes]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        path = Path(place) / "image"
        path.write_bytes(image)
        done = subprocess.run([needs_tool("e2fsck"), how, str(path)], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr, path.read_bytes() if how == "-fy" else b""


class SmallVolume:
    """The attributes that the writing side asks of a volume, and files by number without handles or pages."""

    name = "image"
    readers = 0
    most_ahead = 0
    privileged = False

    def __init__(self, device: BlockDevice, image: bytes | None = None) -> None:
        """`image`: what is on the device, if it cannot be looked at."""
        self.device = device
        head = image or bytes(device.data)  # type: ignore[attr-defined]
        superblock = head[SUPERBLOCK_ADDR : SUPERBLOCK_ADDR + SUPERBLOCK_BYTES]
        self.geometry = read_geometry(superblock, name=self.name, device_bytes=device.size_bytes)
        self.block_bytes = self.geometry.block_bytes
        self.cache = MetaCache(device, self.block_bytes, name=self.name)
        self.allocator = Allocator(self.geometry, self.cache)
        self.committer = Committer(self)
        self.inodes: dict[int, Ext2Inode] = {}
        self.maps: dict[int, BlockMap] = {}
        self.load(lambda: self.geometry.load_fixed(self.cache))
        self.load(self.allocator.load)

    # What the writing side asks.

    def now_ns(self) -> int:
        return NOW_NS

    def store(self, inode: Ext2Inode) -> None:
        block, offset = self.geometry.inode_place(self.cache, inode.number)
        inode.store(self.geometry, self.cache.change(block, TREE)[offset : offset + self.geometry.inode_bytes])

    def map_of(self, inode: Ext2Inode) -> BlockMap:
        if inode.number not in self.maps:
            self.maps[inode.number] = BlockMap(self.geometry, self.cache, inode)
        return self.maps[inode.number]

    # Running.

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return drive(coroutine, self.device)

    def load(self, fn: Callable[[], T]) -> T:
        return self.run(self.cache.load(fn))

    def change(self, fn: Callable[[], T]) -> T:
        return self.run(self.committer.perform(fn))

    def commit(self) -> None:
        self.run(self.committer.commit())

    # Files.

    def inode(self, number: int) -> Ext2Inode:
        """Plain; BlockMiss."""
        if number not in self.inodes:
            block, offset = self.geometry.inode_place(self.cache, number)
            raw = self.cache.get(block)[offset : offset + self.geometry.inode_bytes]
            self.inodes[number] = Ext2Inode.parse(self.geometry, number, raw)
        return self.inodes[number]

    def find(self, parent: int, name: bytes) -> int | None:
        def look() -> int | None:
            inode = self.inode(parent)
            found = directory.find(self.cache, self.map_of(inode), inode, name)
            return found.inode if found else None

        return self.load(look)

    def names(self, parent: int) -> list[bytes]:
        def look() -> list[bytes]:
            inode = self.inode(parent)
            found = directory.list_all(self.cache, self.map_of(inode), inode)
            return [entry.name for entry in found if entry.name not in (b".", b"..")]

        return self.load(look)

    def create(self, parent: int, name: bytes, mode: int = stat.S_IFREG | 0o644) -> int:
        def make() -> int:
            above = self.inode(parent)
            is_dir = stat.S_ISDIR(mode)
            number = self.allocator.new_inode(above, is_dir)
            block, offset = self.geometry.inode_place(self.cache, number)
            inode = Ext2Inode.create(self.geometry, number, mode, NOW_NS)
            inode.generation = INODE.kind(*INODE.struct.unpack_from(self.cache.get(block), offset)).generation
            self.inodes[number] = inode
            self.maps.pop(number, None)
            self.cache.undo(lambda: self.inodes.pop(number))
            inode.links = 1
            if is_dir:
                inode.links = 2
                above.remember(self.cache)
                above.links += 1
                entries.make_directory_block(self, inode, parent)
            self.store(inode)
            entries.add_entry(self, above, name, number, TYPES[stat.S_IFMT(mode)])
            return number

        return self.change(make)

    def mkdir(self, parent: int, name: bytes) -> int:
        return self.create(parent, name, stat.S_IFDIR | 0o755)

    def unlink(self, parent: int, name: bytes) -> None:
        def take() -> int:
            above = self.inode(parent)
            found = directory.find(self.cache, self.map_of(above), above, name)
            assert found is not None
            inode = self.inode(found.inode)
            entries.remove_entry(self, above, found)
            if inode.is_dir:
                assert entries.is_empty(self, inode)
                above.remember(self.cache)
                above.links -= 1
                self.store(above)
            self._drop(inode)
            return found.inode

        number = self.change(take)
        if not self.inodes[number].links:
            self.free(number)

    def rename(self, old: int, old_name: bytes, new: int, new_name: bytes) -> None:
        """A file's, over another file's name or to a new one."""

        def move() -> int:
            source, target = self.inode(old), self.inode(new)
            found = directory.find(self.cache, self.map_of(source), source, old_name)
            assert found is not None
            over = directory.find(self.cache, self.map_of(target), target, new_name)
            if over is not None:
                entries.replace_entry(self, target, over, found.inode, FileType.REGULAR)
                self._drop(self.inode(over.inode))
            else:
                entries.add_entry(self, target, new_name, found.inode, FileType.REGULAR)
            again = directory.find(self.cache, self.map_of(source), source, old_name)
            assert again is not None
            entries.remove_entry(self, source, again)
            return over.inode if over else 0

        number = self.change(move)
        if number and not self.inodes[number].links:
            self.free(number)

    def _drop(self, inode: Ext2Inode) -> None:
        self.allocator.hold_record(inode.number)
        inode.remember(self.cache)
        inode.links = 0 if inode.is_dir else inode.links - 1
        self.store(inode)

    def free(self, number: int) -> None:
        def take() -> bool:
            inode = self.inode(number)
            self.allocator.hold_record(number)
            if grow.free_from(self, inode, 0):
                return True
            inode.remember(self.cache)
            inode.size = 0
            inode.dtime = NOW_NS // 10**9
            self.store(inode)
            self.allocator.free_inode(number, inode.is_dir)
            del self.inodes[number]
            self.cache.undo(lambda: self.inodes.update({number: inode}))
            return False

        while self.change(take):
            pass

    def prepare(self, number: int, file_block: int, count: int, goal: int = 0) -> grow.Prepared:
        return self.change(lambda: grow.prepare(self, self.inode(number), file_block, count, goal))

    def write(self, number: int, offset: int, data: bytes) -> None:
        """Whole blocks where there are none, the last one filled up with zeroes."""
        block_bytes = self.block_bytes
        count = -(-len(data) // block_bytes)
        memory = empty(count * block_bytes)
        memory[: len(data)] = data
        first = offset // block_bytes
        while count:
            run = self.prepare(number, first, count)
            size = run.count * block_bytes
            at = first * block_bytes - offset
            self.run(transfer(self.device, WRITE, run.block * block_bytes, [memory[at : at + size]], size))
            with self.cache.transaction():
                grow.publish(self, run, run.count)
                inode = self.inodes[number]
                inode.remember(self.cache)
                inode.size = max(inode.size, min(offset + len(data), (first + run.count) * block_bytes))
                self.store(inode)
            first += run.count
            count -= run.count

    def truncate(self, number: int, size: int) -> None:
        """To whole blocks."""
        first = -(-size // self.block_bytes)

        def cut() -> bool:
            inode = self.inode(number)
            inode.remember(self.cache)
            inode.size = size
            self.store(inode)
            return grow.free_from(self, inode, first)

        while self.change(cut):
            pass

    def punch(self, number: int, file_block: int, count: int) -> None:
        while self.change(lambda: grow.punch(self, self.inode(number), file_block, count)):
            pass

    def read(self, number: int) -> bytes:
        inode = self.load(lambda: self.inode(number))
        blocks = -(-inode.size // self.block_bytes)
        found = []
        if blocks:
            for run in self.load(lambda: list(self.map_of(inode).runs(0, blocks - 1))):
                memory = empty(run.count * self.block_bytes)
                if run.block:
                    self.run(transfer(self.device, READ, run.block * self.block_bytes, [memory], len(memory)))
                found.append(bytes(memory))
        return b"".join(found)[: inode.size]

    def blocks_of(self, number: int) -> list[tuple[int, int]]:
        """(level, block) of everything that the inode leads to."""
        return self.load(lambda: list(all_blocks(self.map_of(self.inode(number)))))


def small(size: int = 8 << 20, *options: str, sector: int = 512) -> SmallVolume:
    """A new volume on a device in memory."""
    return SmallVolume(device_of(fresh_image(size, *options), sector=sector))


def sound(volume: SmallVolume) -> None:
    """Commit, and fail unless e2fsck is content."""
    volume.commit()
    said = complaint(volume.device.data)  # type: ignore[attr-defined]
    assert not said, said


def tree(image: bytes) -> dict[bytes, bytes | None]:
    """Every path of an image with what is in the file; None for a directory."""
    opened = Image(image)
    found: dict[bytes, bytes | None] = {}

    def walk(number: int, path: bytes) -> None:
        inode = opened.inode(number)
        blocks = opened.map(number)
        cache = cast(MetaCache, opened.cache)
        for entry in opened.cache.load(lambda: directory.list_all(cache, blocks, inode)):
            if entry.name in (b".", b".."):
                continue
            below = path + b"/" + entry.name
            if opened.inode(entry.inode).is_dir:
                found[below] = None
                walk(entry.inode, below)
            else:
                found[below] = opened.content(entry.inode)

    walk(ROOT_INODE, b"")
    return found


@contextlib.contextmanager
def indexed(volume: SmallVolume, number: int) -> Any:
    """Set a directory's INDEX flag for a test."""
    with volume.cache.transaction():
        inode = volume.inodes[number]
        inode.flags |= InodeFlags.INDEX
        volume.store(inode)
    yield inode
