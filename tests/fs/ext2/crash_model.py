"""Workloads on an ext2 volume whose every write is logged, with a model of what may be relied on after a crash.

Everything is noted with its position, the length of the log: a change may be on the disk from the position
at which it began on; a fact holds from the position at which the call that promises it returned.
"""

from __future__ import annotations

import functools
import random
import stat
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from tests.fs.ext2.raw_image import RawImage, Record
from tests.fs.ext2.writing_kit import device_of, fresh_image
from tests.loops import needs_tool

from odirect.base.errors import NoSpaceError
from odirect.block.bio import FUA
from odirect.block.buffers import empty
from odirect.block.filters.log_writes import LogWrites
from odirect.fs.base import NewFile
from odirect.fs.ext2.volume import Ext2, open_ext2
from odirect.fs.file import NodeFile
from odirect.sched.scheduler import Task
from odirect.sched.traps import gather
from odirect.testing.sim import Simulation

T = TypeVar("T")

CANARY = 0xCA
ROOT, LOST = 2, 11
Key = tuple["Item", bytes]


def with_canary(image: bytes) -> bytes:
    """The image with every free block filled with the canary."""
    raw = RawImage(image)
    out = bytearray(image)
    size = raw.block_bytes
    for block in raw.free_block_numbers():
        out[block * size : (block + 1) * size] = bytes([CANARY]) * size
    return bytes(out)


@functools.lru_cache(maxsize=8)
def base_image(size: int, block_bytes: int, *options: str) -> bytes:
    """An empty volume whose free space shows if it is read."""
    return with_canary(fresh_image(size, "-b", str(block_bytes), *options))


@functools.lru_cache(maxsize=8)
def foreign_image(size: int, block_bytes: int, *options: str) -> bytes:
    """A volume with directories made elsewhere: the last entry of a block has all the room that is left (-d)."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        top = Path(place) / "top"
        for directory in ("theirs", "theirs/inner", "wide"):
            (top / directory).mkdir(parents=True)
        for number in range(3):
            (top / "theirs" / f"file{number}").write_bytes(bytes([number + 1]) * 700 * number)
            (top / "wide" / f"{number:0200d}").write_bytes(b"w")
        path = Path(place) / "image"
        path.write_bytes(bytes(size))
        command = [needs_tool("mke2fs"), "-q", "-F", "-t", "ext2", "-b", str(block_bytes), *options]
        subprocess.run([*command, "-d", str(top), str(path)], check=True, capture_output=True)
        return with_canary(path.read_bytes())


class Fold:
    """Files that reach far and are holes but for a few windows, as contents that are short: the windows in a row.

    Byte `at` of a content is byte `far(at)` of the file. windows: (first, end) in bytes, whole blocks, in order,
    not touching; the last one goes on for ever.
    """

    def __init__(self, windows: Sequence[tuple[int, int]] = ((0, 1 << 60),)) -> None:
        self.windows = [*windows[:-1], (windows[-1][0], 1 << 60)]
        #: Where each window begins in the content.
        self.starts = [0]
        for first, end in windows[:-1]:
            self.starts.append(self.starts[-1] + end - first)

    def _index(self, at: int) -> int:
        return max(index for index, start in enumerate(self.starts) if start <= at)

    def far(self, at: int) -> int:
        """The byte of the file; where a window begins, that and not the end of the one before."""
        index = self._index(at)
        return self.windows[index][0] + at - self.starts[index]

    def end(self, at: int) -> int:
        """The size of a file, or end of a range, of `at` bytes of content: where a window ends, no hole behind it."""
        return self.far(at - 1) + 1 if at else 0

    def near(self, size: int) -> int:
        """How long the content of a file of `size` bytes is. AssertionError if it ends where no file ever did."""
        for start, (first, end) in zip(self.starts, self.windows, strict=True):
            if first <= size <= end:
                return start + size - first
        raise AssertionError(f"a file has {size} bytes, and never ended there")

    def room(self, at: int) -> int:
        """The bytes from `at` to the end of its window."""
        return self.windows[self._index(at)][1] - self.far(at)

    def pieces(self, size: int) -> list[tuple[int, int]]:
        """(first, end) of what a file of `size` bytes has of each window."""
        return [(first, min(end, size)) for first, end in self.windows if first < size]


def far_windows(block_bytes: int) -> list[tuple[int, int]]:
    """Around the places where a file's numbers go on in another block: of the inode, of each level, and of leaves."""
    pointers = block_bytes // 4
    double = 12 + pointers
    triple = double + pointers**2
    blocks = [
        (0, 24),
        (double - 8, double + 12),
        (double + pointers - 5, double + pointers + 5),
        (triple - 10, triple + 14),
        (triple + pointers - 5, triple + pointers + 5),
        (triple + pointers**2 - 6, triple + pointers**2 + 16),
    ]
    return [(first * block_bytes, end * block_bytes) for first, end in blocks]


class FoldedImage(RawImage):
    """An image whose files are read as their fold has them. AssertionError for a block outside of its windows."""

    def __init__(self, image: bytes | memoryview, fold: Fold) -> None:
        self.fold = fold
        super().__init__(image)

    def _record(self, number: int) -> Record:
        record = super()._record(number)
        if record.kind != stat.S_IFREG:
            return record
        group, index = divmod(number - 1, self.inodes_per_group)
        at = self.descriptor(group)[2] * self.block_bytes + index * self.inode_bytes
        low, high = struct.unpack_from("<I", self.image, at + 4)[0], struct.unpack_from("<I", self.image, at + 108)[0]
        size = self.fold.near(low | high << 32)
        whole = record.content + record.tail
        return record._replace(content=whole[:size], tail=whole[size:])

    def _content(self, numbers: tuple[int, ...], count: int) -> bytes:
        size = self.block_bytes
        pointers = size // 4
        places = {index: block for index, block in enumerate(numbers[:12]) if block}

        def add(block: int, level: int, first: int) -> None:
            if not block or first >= count:
                return
            if not level:
                places[first] = block
                return
            for index, below in enumerate(struct.unpack(f"<{pointers}I", self._block(block))):
                if below:
                    add(below, level - 1, first + index * pointers ** (level - 1))

        first = 12
        for level, block in enumerate(numbers[12:], 1):
            add(block, level, first)
            first += pointers**level
        out = []
        for low, end in self.fold.pieces(count * size):
            for index in range(low // size, end // size):
                block = places.pop(index, 0)
                out.append(self._block(block) if block else bytes(size))
        left = [index for index in places if index < count]
        assert not left, f"blocks {left[:4]} of a file are there, where nothing was ever written"
        return b"".join(out)


class Version(NamedTuple):
    """A content that a file had from `began` on; it differs from the one before in bytes [low, high)."""

    began: int
    content: bytes
    low: int
    high: int


class Item:
    """A file, directory or symbolic link of the model, also after it has gone."""

    def __init__(self, mode: int, began: int, owner: tuple[int, int] = (0, 0)) -> None:
        self.inode = 0
        self.began = began
        self.gone: int | None = None
        self.links = 1
        self.versions: list[Version] = [Version(began, b"", 0, 0)]
        #: (position, how many versions there were when the sync that returned there began).
        self.synced: list[tuple[int, int]] = [(began, 1)]
        self.attributes: list[tuple[int, tuple[int, int, int]]] = [(began, (mode, *owner))]
        self.xattrs: list[tuple[int, dict[bytes, bytes]]] = [(began, {})]

    def __repr__(self) -> str:
        return f"<{'directory' if self.is_dir else 'file'} {self.inode}>"

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.attributes[0][1][0])

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.attributes[0][1][0])

    @property
    def content(self) -> bytes:
        return self.versions[-1].content


class Capture(NamedTuple):
    """The model at one instant: names, and how many contents, attributes and so on each item had had."""

    logged: int
    edges: dict[Key, Item]
    counts: dict[Item, tuple[int, int, int]]


class Fact(NamedTuple):
    """From `position` on the disk has what the capture shows, or something newer."""

    position: int
    capture: Capture


class Claim(NamedTuple):
    """From `position` on these bytes are on the disk, unless a version from number `version` on has changed them."""

    position: int
    item: Item
    version: int
    offset: int
    data: bytes


class Workload:
    """A volume over a logging device in simulated time, and what may be relied on, noted down.

    tight: the volume may become full; what fails for want of room must have done nothing.
    sector: the device's, in bytes. fold: what contents and offsets in them stand for.
    mostly_names: random steps are about names, most of them, and a commit is under way.
    """

    def __init__(
        self,
        seed: int,
        image: bytes,
        *,
        tight: bool = False,
        sector: int = 512,
        fold: Fold | None = None,
        mostly_names: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.tight = tight
        self.sector = sector
        self.fold = fold or Fold()
        self.mostly_names = mostly_names
        self.sim = Simulation(seed)
        self.sim._traces = False
        self.device = self.sim.device(store=device_of(image, sector=sector), add=False)
        self.log = LogWrites(self.device, base=image)
        self.sim.scheduler.add_device(self.log)
        self.seconds = 1_700_000_000
        self.root = Item(stat.S_IFDIR | 0o755, 0)
        self.root.inode = ROOT
        self.edges: dict[Key, Item] = {}
        #: (position, directory and name, what it leads to from then on).
        self.changes: list[tuple[int, Key, Item | None]] = []
        self.items: list[Item] = [self.root]
        self.facts: list[Fact] = []
        self.claims: list[Claim] = []
        self.handles: dict[Item, NodeFile] = {}
        self.full = 0
        #: The model before what runs at this moment side by side began: a sync among it may miss all of that.
        self._before: Capture | None = None
        self._taken: Counter[object] = Counter()
        self._shared: Counter[Item] = Counter()
        self._names = 0
        self._learn(image)
        self.volume = self.run(self._open())
        self.first = len(self.log.records)
        self._fact(self._capture())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.sim.run(coroutine)

    def now(self) -> int:
        """The position."""
        return len(self.log.records)

    def _clock(self) -> int:
        self.seconds += 1
        return self.seconds * 1_000_000_000

    async def _open(self) -> Ext2:
        return await open_ext2(
            self.log, name="image", writable=True, scheduler=self.sim.scheduler, clock_ns=self._clock
        )

    def _learn(self, image: bytes) -> None:
        """The model of what is in the image already."""
        raw = RawImage(image)
        known = {ROOT: self.root}
        mode = raw.records[ROOT]
        self.root.attributes[0] = (0, (mode.mode, *mode.owner))
        for (directory, name), number in sorted(raw.edges.items()):
            record = raw.records[number]
            if number not in known:
                known[number] = item = Item(record.mode, 0, record.owner)
                item.inode = number
                item.versions = [Version(0, record.content, 0, 0)]
                item.links = 0
                self.items.append(item)
            known[number].links += 1
            self.edges[known[directory], name] = known[number]

    # Noting down.

    def _capture(self, own: Item | None = None) -> Capture:
        """What a sync that begins now brings to the disk. own: whom nobody else changes meanwhile."""
        if self._before is not None:
            counts = self._before.counts
            if own is not None and own in counts:
                counts = {**counts, own: (len(own.versions), *counts[own][1:])}
            return self._before._replace(counts=counts)
        counts = {item: (len(item.versions), len(item.attributes), len(item.xattrs)) for item in self.items}
        return Capture(len(self.changes), dict(self.edges), counts)

    def _fact(self, capture: Capture, contents: Iterable[Item] | None = None) -> None:
        """What was captured is on the disk: names and inodes, and the contents of these items (None: of all)."""
        position = self.now()
        self.facts.append(Fact(position, capture))
        for item in capture.counts if contents is None else contents:
            item.synced.append((position, capture.counts[item][0]))

    def _change(self, key: Key, item: Item | None) -> None:
        self.changes.append((self.now(), key, item))
        if item is None:
            self.edges.pop(key, None)
        else:
            self.edges[key] = item

    def _drop(self, item: Item) -> None:
        item.links -= 1
        if not item.links or item.is_dir:
            item.gone = self.now()

    def _content(self, item: Item, content: bytes, low: int, high: int) -> None:
        item.versions.append(Version(self.now(), content, low, high))

    async def _fits(self, doing: Awaitable[T]) -> T | None:
        """What it gives, None if the volume is full."""
        try:
            return await doing
        except NoSpaceError:
            if not self.tight:
                raise
            self.full += 1
            return None

    # Operations. Everything up to the first await is one instant.

    async def create(self, parent: Item, name: bytes, mode: int, *, target: bytes = b"") -> Item | None:
        """A new file, directory or link; None if there was no room."""
        item = Item(mode, self.now())
        if target:
            item.versions = [Version(self.now(), target, 0, 0)]
        self.items.append(item)
        self._change((parent, name), item)
        inode = await self._fits(self.volume.create(parent.inode, name, mode, target=target))
        if inode is None:
            self._change((parent, name), None)
            item.gone = item.began
            return None
        item.inode = inode
        return item

    async def create_whole(self, parent: Item, files: dict[bytes, bytes]) -> None:
        """Many files at once, each there with its content or not at all."""
        items = []
        for name, content in files.items():
            item = Item(stat.S_IFREG | 0o640, self.now())
            item.versions = [Version(self.now(), content, 0, 0)]
            items.append(item)
            self.items.append(item)
            self._change((parent, name), item)
        made = await self._fits(
            self.volume.create_whole([NewFile(parent.inode, name, data, 0o640) for name, data in files.items()])
        )
        if made is None:
            # Those before the one that failed may be there: what is, is whole.
            there = {entry.name: entry.inode for entry in await self.volume.entries(parent.inode)}
            for name, item in zip(files, items, strict=True):
                item.inode = there.get(name, 0)
                if not item.inode:
                    self._change((parent, name), None)
                    item.gone = item.began
            return
        for item, number in zip(items, made, strict=True):
            item.inode = number

    async def link(self, item: Item, parent: Item, name: bytes) -> None:
        self._change((parent, name), item)
        item.links += 1
        done = await self._fits(self._done(self.volume.link(item.inode, parent.inode, name)))
        if not done:
            self._change((parent, name), None)
            item.links -= 1

    async def unlink(self, parent: Item, name: bytes) -> None:
        item = self.edges[parent, name]
        self._change((parent, name), None)
        self._drop(item)
        if item.is_dir:
            await self.volume.rmdir(parent.inode, name)
        else:
            await self.volume.unlink(parent.inode, name)

    async def rename(self, parent: Item, name: bytes, new_parent: Item, new_name: bytes) -> None:
        item, over = self.edges[parent, name], self.edges.get((new_parent, new_name))
        if item is over:
            # Two names of one file: rename(2) has nothing to do.
            await self.volume.rename(parent.inode, name, new_parent.inode, new_name)
            return
        self._change((new_parent, new_name), item)
        self._change((parent, name), None)
        done = await self._fits(self._done(self.volume.rename(parent.inode, name, new_parent.inode, new_name)))
        if not done:
            self._change((parent, name), item)
            self._change((new_parent, new_name), over)
        elif over is not None:
            self._drop(over)

    async def write(
        self, item: Item, offset: int | None, data: bytes, *, access: str = "auto", durable: bool = False
    ) -> None:
        """Write to a file, up to the end of a window of the fold; durable: as O_DSYNC."""
        at = len(item.content) if offset is None else offset
        data = data[: self.fold.room(at)]
        where = None if offset is None and self.fold.far(at) == self.fold.end(at) else self.fold.far(at)
        capture = self._capture(item)
        new = bytearray(item.content.ljust(at, b"\0"))
        new[at : at + len(data)] = data
        self._content(item, bytes(new), min(at, len(item.content)), at + len(data))
        memory = empty(len(data))
        memory[:] = data

        async def go(handle: NodeFile) -> None:
            flags = FUA if durable else 0
            done = await self._fits(handle.write(where, [memory], access=access, flags=flags))  # type: ignore[arg-type]
            moved = 0 if done is None else done.transferred
            if moved < len(data):
                self.full += done is not None
                assert self.tight, f"only {moved} of {len(data)} bytes were written"
                there = await self._read(handle)
                self._content(item, there, 0, max(len(there), len(new)))
            if durable and moved:
                self._fact(capture, ())
                self.claims.append(Claim(self.now(), item, len(item.versions), at, data[:moved]))

        await self._with(item, go)

    async def truncate(self, item: Item, size: int) -> None:
        low = min(size, len(item.content))
        self._content(item, item.content[:size].ljust(size, b"\0"), low, 1 << 62)
        await self._with(item, lambda handle: handle.truncate(self.fold.end(size)))

    async def punch(self, item: Item, offset: int, length: int) -> None:
        end = min(offset + length, len(item.content))
        content = bytearray(item.content)
        content[offset:end] = bytes(max(0, end - offset))
        self._content(item, bytes(content), offset, end)
        where = self.fold.far(offset)
        bytes_there = self.fold.end(offset + length) - where
        await self._with(item, lambda handle: handle.punch(where, bytes_there))

    async def fsync(self, item: Item) -> None:
        """As fsync(2): this file's data; our commits bring all names and inodes along."""
        capture = self._capture(item)

        async def go(handle: NodeFile) -> None:
            await handle.sync()
            self._fact(capture, (item,) if item in capture.counts else ())

        await self._with(item, go)

    async def read(self, item: Item) -> None:
        """Whatever way it is read, it is what the model says."""

        async def go(handle: NodeFile) -> None:
            there = await self._read(handle)
            assert there == item.content, f"{item} differs at {_first_difference(there, item.content)}"

        await self._with(item, go)

    async def _read(self, handle: NodeFile) -> bytes:
        self.fold.near(handle.size_bytes)
        access: Literal["auto", "buffered"] = "auto"
        if handle.size_bytes:
            access = self.random.choice(("auto", "buffered"))
        content = b""
        for first, end in self.fold.pieces(handle.size_bytes):
            memory = empty(end - first)
            done = await handle.read(first, [memory], access=access)
            content += bytes(memory[: done.transferred])
        return content

    async def set_mode(self, item: Item, mode: int, uid: int) -> None:
        before = item.attributes[-1][1]
        item.attributes.append((self.now(), (stat.S_IFMT(before[0]) | mode, uid, before[2])))
        await self.volume.set_attributes(item.inode, mode=mode, uid=uid)

    async def set_xattr(self, item: Item, name: bytes, value: bytes | None) -> None:
        before = item.xattrs[-1][1]
        after = {key: kept for key, kept in before.items() if key != name}
        if value is not None:
            after[name] = value
        item.xattrs.append((self.now(), after))
        done = await self._fits(self._done(self.volume.set_xattr(item.inode, name, value)))
        if not done:
            item.xattrs.append((self.now(), before))

    async def sync(self) -> None:
        capture = self._capture()
        await self.volume.sync()
        self._fact(capture)

    async def open(self, item: Item) -> None:
        """Keep a handle open: what is written through it stays in the page cache until something wants it."""
        self.handles[item] = await self.volume.open_file(item.inode, writable=True)  # type: ignore[assignment]

    async def close(self, item: Item) -> None:
        await self.handles.pop(item).close()

    async def reopen(self) -> None:
        """Close the volume, handles and all, and open it again."""
        self.handles.clear()
        capture = self._capture()
        await self.volume.close()
        self._fact(capture)
        self.volume = await self._open()

    async def end(self) -> None:
        """Close the volume."""
        self.handles.clear()
        capture = self._capture()
        await self.volume.close()
        self._fact(capture)

    async def _done(self, doing: Awaitable[object]) -> bool:
        await doing
        return True

    async def _with(self, item: Item, call: Callable[[NodeFile], Awaitable[object]]) -> None:
        handle = self.handles.get(item)
        own = handle is None
        if handle is None:
            handle = await self.volume.open_file(item.inode, writable=True)  # type: ignore[assignment]
        try:
            await call(handle)  # type: ignore[arg-type]
        finally:
            if own:
                await handle.close()  # type: ignore[union-attr]

    # Random steps.

    def data(self, length: int) -> bytes:
        """Bytes that are not the canary, nor zero."""
        table = bytes((byte if byte not in (0, CANARY) else 1) for byte in range(256))
        return self.random.randbytes(length).translate(table)

    def steps(self, count: int) -> None:
        """So many random steps, some of them several operations at once."""
        for _ in range(count):
            dice = self.random.random()
            if dice < 0.06:
                self.run(self.sync())
            elif dice < 0.08:
                self.run(self.reopen())
            elif dice < (0.75 if self.mostly_names else 0.35):
                self.run(self._together(self.random.randrange(2, 6)))
            else:
                self.run(self._any())

    async def _together(self, count: int) -> None:
        scheduler = self.sim.scheduler
        self._before = self._capture()
        tasks = [scheduler.spawn(self._any(), "an operation") for _ in range(count)]
        if self.random.random() < (0.9 if self.mostly_names else 0.5):
            tasks.append(scheduler.spawn(self.sync(), "a sync"))
        await gather(*tasks)
        self._before = None

    async def beside_a_sync(self, doing: Coroutine[Any, Any, object]) -> None:
        """Do this while a sync is on its way."""
        self._before = self._capture()
        tasks: list[Task[Any]] = [self.sim.scheduler.spawn(self.sync()), self.sim.scheduler.spawn(doing)]
        await gather(*tasks)
        self._before = None

    async def _any(self) -> None:
        ways: list[tuple[int, Callable[[], Coroutine[Any, Any, None]]]] = [
            (6, self._create),
            (8, self._write),
            (3, self._truncate),
            (2, self._punch),
            (3, self._unlink),
            (2, self._rmdir),
            (4, self._rename),
            (3, self._replace),
            (2, self._link),
            (2, self._xattr),
            (2, self._chmod),
            (4, self._fsync),
            (4, self._handle),
            (1, self._bulk),
            (2, self._check),
        ]
        if self.mostly_names:
            about = (self._create, self._unlink, self._rename, self._replace, self._link)
            ways = [(4 * weight if way in about else 1, way) for weight, way in ways]
            ways.append((12, self._link))
        await self.random.choices([way for _, way in ways], [weight for weight, _ in ways])[0]()

    def _pick_file(self) -> Item | None:
        found = [item for item in dict.fromkeys(self.edges.values()) if item.is_file and self._is_free(item)]
        held = [item for item in self.handles if self._is_free(item)]
        if held and self.random.random() < 0.5:
            return self.random.choice(held)
        return self.random.choice(found) if found else None

    def _is_free(self, item: Item) -> bool:
        return bool(item.inode) and not self._taken[item] and item.inode != LOST

    def _pick_directory(self) -> Item:
        inside = [item for item in dict.fromkeys(self.edges.values()) if item.is_dir and self._is_free(item)]
        return self.random.choice([self.root, *inside])

    def _pick_edge(self, wanted: Callable[[Item], bool]) -> Key | None:
        found = [
            key
            for key, item in self.edges.items()
            if wanted(item) and self._is_free(item) and not self._taken[key] and not self._taken[key[0]]
        ]
        return self.random.choice(found) if found else None

    def _new_key(self) -> Key:
        parent = self._pick_directory()
        if self.random.random() < 0.3:
            # A name that was there before, if there is one: its removal may not be on the disk yet.
            old = [key for _, key, _ in self.changes if key[0] is parent and key not in self.edges]
            old = [key for key in old if not self._taken[key]]
            if old:
                return self.random.choice(old)
        self._names += 1
        return parent, b"n%d" % self._names + b"x" * self.random.choice((0, 0, 3, 20, 150, 240))

    async def _holding(self, doing: Coroutine[Any, Any, object], *taken: object, inside: Iterable[Item] = ()) -> None:
        """Nobody else takes these while it runs; and no directory that it is `inside` of goes away."""
        inside = list(inside)
        self._taken.update(taken)
        self._shared.update(inside)
        try:
            await doing
        finally:
            self._taken.subtract(taken)
            self._shared.subtract(inside)

    async def _create(self) -> None:
        parent, name = key = self._new_key()
        dice = self.random.random()
        mode, target = stat.S_IFREG | 0o644, b""
        if dice < 0.2:
            mode = stat.S_IFDIR | 0o755
        elif dice < 0.35:
            mode, target = (
                stat.S_IFLNK | 0o777,
                self.data(self.random.choice((5, 59, 60, 200, 1000))).replace(b"/", b"_"),
            )

        async def go() -> None:
            item = await self.create(parent, name, mode, target=target)
            if item is not None and item.is_file and self.random.random() < 0.8:
                self._taken[item] += 1
                await self._write_to(item)
                self._taken[item] -= 1

        await self._holding(go(), key, inside=[parent])

    async def _bulk(self) -> None:
        parent = self._pick_directory()
        files = {}
        for _ in range(self.random.randrange(1, 12)):
            self._names += 1
            files[b"b%d" % self._names] = self.data(self.random.choice((0, 1, 700, 3000)))
        await self._holding(self.create_whole(parent, files), inside=[parent])

    async def _write(self) -> None:
        item = self._pick_file()
        if item is not None:
            await self._holding(self._write_to(item), item)

    async def _write_to(self, item: Item) -> None:
        dice, block, size = self.random, self.volume.block_bytes, len(item.content)
        offset = dice.choice((0, None, size, dice.randrange(size + 1), dice.randrange(40_000)))
        if offset is not None and dice.random() < 0.5:
            offset -= offset % block
        if len(self.fold.starts) > 1 and dice.random() < 0.7:
            offset = self._spot()
        elif dice.random() < 0.05:
            offset = dice.randrange(1, 400) * block  # Past the single indirect block, if blocks are small.
        length = dice.choice((1, 100, 512, 1024, block, 3 * block, 5000, block * dice.randrange(1, 24)))
        access = dice.choice(("auto", "auto", "buffered"))
        await self.write(item, offset, self.data(length), access=access, durable=dice.random() < 0.1)

    def _spot(self) -> int:
        """A byte of contents in one of the fold's windows, or an edge of it, or one of a block in it."""
        dice, block, starts = self.random, self.volume.block_bytes, self.fold.starts
        start, end = dice.choice(list(zip(starts, [*starts[1:], starts[-1] + 16 * block], strict=True)))
        at = dice.randrange(start, end)
        return dice.choice((start, at, at - at % block, at - at % block))

    async def _truncate(self) -> None:
        item = self._pick_file()
        if item is not None:
            size = len(item.content)
            wanted = self.random.choice((0, self.random.randrange(size + 1), size + 700, self.random.randrange(60_000)))
            if len(self.fold.starts) > 1 and self.random.random() < 0.7:
                wanted = self._spot()
            await self._holding(self.truncate(item, wanted), item)

    async def _punch(self) -> None:
        item = self._pick_file()
        if item is not None and item.content:
            offset = self.random.randrange(len(item.content))
            length = self.random.randrange(1, 30_000)
            if len(self.fold.starts) > 1 and self.random.random() < 0.7:
                spots = sorted((self._spot(), self._spot()))
                offset, length = spots[0], max(1, spots[1] - spots[0])
            await self._holding(self.punch(item, offset, length), item)

    async def _unlink(self) -> None:
        key = self._pick_edge(lambda item: not item.is_dir)
        if key is not None:
            await self._holding(self.unlink(*key), key, self.edges[key], inside=[key[0]])

    def _is_empty(self, item: Item) -> bool:
        return item.is_dir and not self._shared[item] and not any(parent is item for parent, _ in self.edges)

    async def _rmdir(self) -> None:
        key = self._pick_edge(self._is_empty)
        if key is not None:
            await self._holding(self.unlink(*key), key, self.edges[key], inside=[key[0]])

    def _is_above(self, item: Item, below: Item) -> bool:
        while below is not self.root:
            if below is item:
                return True
            below = next(parent for (parent, _), child in self.edges.items() if child is below)
        return False

    async def _rename(self) -> None:
        key = self._pick_edge(lambda item: True)
        if key is not None:
            item, new = self.edges[key], self._new_key()
            if not (item.is_dir and self._is_above(item, new[0])):
                await self._holding(self.rename(*key, *new), key, new, item, inside=[key[0], new[0]])

    async def _replace(self) -> None:
        key = self._pick_edge(lambda item: True)
        if key is None:
            return
        item = self.edges[key]
        over = self._pick_edge(
            lambda other: other is not item and (self._is_empty(other) if item.is_dir else not other.is_dir)
        )
        if over is not None and not (item.is_dir and self._is_above(item, over[0])):
            await self._holding(self.rename(*key, *over), key, over, item, self.edges[over], inside=[key[0], over[0]])

    async def _link(self) -> None:
        key = self._pick_edge(lambda item: not item.is_dir)
        if key is not None:
            item, new = self.edges[key], self._new_key()
            await self._holding(self.link(item, *new), item, new, inside=[new[0]])

    async def _xattr(self) -> None:
        item = self._pick_file()
        if item is None:
            return
        name = b"user." + self.random.choice((b"a", b"b", b"longer"))
        value: bytes | None = self.data(self.random.randrange(200))
        if name in item.xattrs[-1][1] and self.random.random() < 0.3:
            value = None
        await self._holding(self.set_xattr(item, name, value), item)

    async def _chmod(self) -> None:
        item = self._pick_file()
        if item is not None:
            mode, uid = self.random.choice((0o600, 0o644, 0o755)), self.random.randrange(1 << 17)
            await self._holding(self.set_mode(item, mode, uid), item)

    async def _fsync(self) -> None:
        item = self._pick_file()
        if item is not None:
            await self._holding(self.fsync(item), item)

    async def _handle(self) -> None:
        item = self._pick_file()
        if item is None:
            return
        await self._holding(self.close(item) if item in self.handles else self.open(item), item)

    async def _check(self) -> None:
        item = self._pick_file()
        if item is not None:
            await self._holding(self.read(item), item)


def _first_difference(one: bytes, other: bytes) -> str:
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return f"byte {at}: {left:#x}, not {right:#x}"
    return f"the sizes {len(one)} and {len(other)}"
