"""ext2 on devices that fail, lose their cache, or are full: F08, F11, F30, F40, F41."""

from __future__ import annotations

import contextlib
import errno
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from tests.fs.ext2.crash_kit import Fsck
from tests.fs.ext2.crash_model import CANARY, base_image
from tests.fs.ext2.raw_image import RawImage
from tests.fs.ext2.writing_kit import device_of

from odirect.base.errors import DeviceError, NoSpaceError, ODirectError, ReadOnlyError, StickySyncError, WouldBlockError
from odirect.block.bio import FLUSH, FUA, NOWAIT, READ, WRITE
from odirect.block.buffers import empty
from odirect.block.filters.fault import Faults
from odirect.block.filters.volatile_cache import VolatileCache
from odirect.block.memory import MemoryDevice
from odirect.dio.outcome import Kind, Promise
from odirect.fs.base import FileKind, NewFile
from odirect.fs.ext2.volume import Ext2, open_ext2
from odirect.fs.file import NodeFile
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Scheduler

T = TypeVar("T")

FILE, DIRECTORY, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777


_open: set[Rig] = set()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    for rig in list(_open):
        rig.close()


class Rig:
    """A volume with a canary in its free blocks, over a device that fails as it is told to."""

    def __init__(self, image: bytes, *, volatile: bool = False) -> None:
        self.store: MemoryDevice = device_of(image)
        self.cache = VolatileCache(self.store) if volatile else None
        self.faults = Faults(self.cache or self.store)
        _open.add(self)
        self.open()

    def open(self) -> None:
        scheduler = Scheduler()
        scheduler.add_device(self.faults)
        self.driver = SyncDriver(scheduler)
        self.seconds = 1_700_000_000
        self.volume: Ext2 = self.run(
            open_ext2(self.faults, name="image", writable=True, scheduler=scheduler, clock_ns=self._clock)
        )

    def close(self) -> None:
        self.faults.close()
        _open.discard(self)

    def _clock(self) -> int:
        self.seconds += 1
        return self.seconds * 10**9

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.driver.run(coroutine)

    def file(self, name: bytes, size: int = 0) -> NodeFile:
        """A new file that is open, with so many bytes in it."""
        number = self.run(self.volume.create(2, name, FILE))
        handle = self.handle(number)
        if size:
            self.run(handle.write(0, [memory(b"d" * size)]))
        return handle

    def handle(self, number: int) -> NodeFile:
        found = self.run(self.volume.open_file(number, writable=True))
        assert isinstance(found, NodeFile)
        return found

    def whole(self, handle: NodeFile, access: Any = "auto") -> bytes:
        return self.run(whole(handle, access))

    def free_by_bitmaps(self) -> int:
        """How many blocks the bitmaps in memory say are free."""
        volume, geometry = self.volume, self.volume.geometry

        def count() -> int:
            free = 0
            for group in range(geometry.groups):
                blocks = geometry.blocks_in_group(group)
                bits = int.from_bytes(volume.cache.get(volume.allocator.descriptor(group).block_bitmap), "little")
                free += blocks - (bits & ((1 << blocks) - 1)).bit_count()
            return free

        return self.run(volume.cache.load(count))

    def check_space(self) -> None:
        """F30: nothing is promised any more, and the counts are what the bitmaps say."""
        allocator = self.volume.allocator
        assert allocator.reserved == 0
        assert not allocator.planned and not allocator.prepared
        assert allocator.free_blocks == self.free_by_bitmaps()

    def end(self) -> RawImage:
        """What is on the device once the volume is closed, which e2fsck must find sound."""
        self.run(self.volume.close())
        with Fsck() as fsck:
            fsck.image.write_bytes(self.store.data)
            status, said = fsck.run("-fn")
            assert not status, said
        return RawImage(self.store.data)


def memory(data: bytes) -> memoryview:
    """The data where a device can take it from."""
    view = empty(len(data))
    view[:] = data
    return view


async def whole(handle: NodeFile, access: Any = "auto") -> bytes:
    view = empty(handle.size_bytes)
    done = await handle.read(0, [view], access=access) if len(view) else None
    return bytes(view[: done.transferred if done else 0])


def fresh(block_bytes: int = 1024, size: int = 1 << 20) -> bytes:
    return base_image(size, block_bytes, "-N", "64")


class Script:
    """Some of everything, one thing after the other, going on after errors; with what must be in which file."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.volume = rig.volume
        self.expected: dict[int, bytes] = {}
        self.unsure: set[int] = set()
        self.errors: list[ODirectError] = []
        self.handles: dict[int, NodeFile] = {}

    async def attempt(self, doing: Awaitable[T], number: int = 0) -> T | None:
        """What it gives; None if it failed, and then nobody knows what the file has."""
        try:
            return await doing
        except ODirectError as error:
            self.errors.append(error)
            self.unsure.add(number)
            return None

    async def make(self, name: bytes, mode: int = FILE, *, target: bytes = b"") -> int:
        number = await self.attempt(self.volume.create(2, name, mode, target=target))
        if number is None:
            return 0
        self.expected[number] = b""
        self.unsure.discard(number)
        if stat.S_ISREG(mode):
            handle = await self.attempt(self.volume.open_file(number, writable=True))
            if handle is not None:
                self.handles[number] = handle  # type: ignore[assignment]
        return number

    async def write(self, number: int, offset: int, data: bytes, access: Any = "auto", flags: int = 0) -> None:
        handle = self.handles.get(number)
        if handle is None:
            return
        done = await self.attempt(handle.write(offset, [memory(data)], access=access, flags=flags), number)
        if done is not None:
            # A fault may make it short; then it says so.
            before = self.expected[number].ljust(offset, b"\0")
            self.expected[number] = before[:offset] + data[: done.transferred] + before[offset + done.transferred :]

    async def on(
        self, number: int, call: Callable[[NodeFile], Awaitable[object]], after: Callable[[bytes], bytes]
    ) -> None:
        handle = self.handles.get(number)
        if handle is not None and await self.attempt(self._yes(call(handle)), number):
            self.expected[number] = after(self.expected[number])

    async def _yes(self, doing: Awaitable[object]) -> bool:
        await doing
        return True

    async def sync(self, number: int) -> None:
        await self.on(number, lambda handle: handle.sync(), lambda data: data)

    async def run(self) -> None:
        volume, block = self.volume, self.volume.block_bytes
        one, two = await self.make(b"one"), await self.make(b"two")
        await self.write(one, 0, b"a" * 4 * block)
        await self.write(two, 100, b"b" * (3 * block), "buffered")
        await self.sync(two)
        await self.write(one, 4 * block, b"c" * 512)
        await self.write(one, 20 * block, b"d" * 2 * block)
        await self.write(one, 10 * block + 7, b"e" * 600)
        await self.write(two, 2 * block, b"f" * 30, "buffered")
        await self.on(one, lambda handle: handle.truncate(11 * block + 5), lambda data: data[: 11 * block + 5])
        await self.on(one, lambda handle: handle.truncate(13 * block), lambda data: data.ljust(13 * block, b"\0"))
        await self.attempt(volume.create(2, b"directory", DIRECTORY))
        await self.make(b"link", LINK, target=b"there/" * 30)
        await self.attempt(volume.set_xattr(one, b"user.a", b"v" * 40)) if one else None
        await self.attempt(volume.rename(2, b"two", 2, b"three"))
        await self.write(two, 0, b"g" * block, flags=FUA)
        await self.attempt(volume.create_whole([NewFile(2, b"bulk%d" % n, b"h" * 700 * n) for n in range(4)]))
        await self.on(
            one, lambda handle: handle.punch(block + 9, 2 * block),
            lambda data: data[: block + 9] + bytes(2 * block) + data[3 * block + 9 :],
        )  # fmt: skip
        await self.attempt(volume.sync())
        three = await self.make(b"gone")
        await self.write(three, 0, b"i" * 5 * block, "buffered")
        if three:
            await self.attempt(volume.unlink(2, b"gone"))
        await self.write(two, 5 * block, b"j" * 2 * block, "buffered")

    async def look(self) -> None:
        """Whatever can be read is what was written, or at least not what was on the disk before (F11)."""
        for number, handle in self.handles.items():
            for access in ("auto", "buffered"):
                there = await whole(handle, access)
                assert CANARY not in there
                if number not in self.unsure and not handle.node.pages.errors.sample():
                    assert there == self.expected[number]

    async def close(self) -> None:
        for number, handle in self.handles.items():
            await self.attempt(handle.close(), number)
        self.handles.clear()


def check_fault(image: bytes, number: int, moved: int | None) -> int:
    """Run the script with one bio failing; how many bios it had."""
    with contextlib.closing(Rig(image)) as rig:
        return _check_fault(rig, number, moved)


def _check_fault(rig: Rig, number: int, moved: int | None) -> int:
    script = Script(rig)
    rig.faults.restart()
    rule = rig.faults.fail(nth=number, moved=moved)
    rig.run(script.run())
    rule.remove()
    bios, injected = rig.faults.submitted, list(rig.faults.injected)
    if injected and injected[0].op != READ:
        assert script.errors or rig.volume.committer.error or _noted(script), f"{injected} was told to nobody"
    rig.run(script.look())
    for handle in script.handles.values():
        if handle.node.pages.errors.sample() and not script.unsure:
            with pytest.raises(ODirectError):
                rig.run(handle.sync())
    rig.run(script.close())
    rig.check_space()
    broken = rig.volume.committer.error
    if broken is not None:
        assert not rig.volume.writable
        with pytest.raises(ReadOnlyError, match="could not be written"):
            rig.run(rig.volume.create(2, b"more", FILE))
        with pytest.raises(StickySyncError):
            rig.run(rig.volume.sync())
        rig.run(rig.volume.close())
    elif injected and injected[0].op == WRITE:
        rig.run(rig.volume.create(2, b"more", FILE))
    with Fsck() as fsck:
        raw = rig.end() if broken is None else fsck(bytes(rig.store.data), twice=True).raw
    for record in raw.records.values():
        assert record.kind == stat.S_IFDIR or CANARY not in record.content + record.tail
    return bios


def _noted(script: Script) -> bool:
    return any(handle.node.pages.errors.sample() for handle in script.handles.values())


@pytest.mark.slow
@pytest.mark.parametrize("block_bytes", [1024, 4096])
@pytest.mark.parametrize("moved", [0, 512, None], ids=["before", "torn", "after"])
def test_every_fault(block_bytes: int, moved: int | None) -> None:
    """F11, F30, F41: each bio of a script fails once, before, amid or after its data moved."""
    image = fresh(block_bytes)
    bios = check_fault(image, -1, moved)
    assert bios > 40
    for number in range(bios):
        try:
            check_fault(image, number, moved)
        except Exception as error:
            error.add_note(f"with bio {number} of {bios} failing")
            raise


# Errors of syncs (F41).


def test_an_error_of_write_back_is_told_to_every_handle() -> None:
    """Those that were open then: once each, and their syncs fail until they are opened again."""
    rig = Rig(fresh())
    one = rig.file(b"file", 4096)
    other = rig.handle(one.inode)
    rig.run(one.sync())
    rig.run(one.write(0, [memory(b"n" * 2048)], access="buffered"))
    rig.faults.fail(op=WRITE, times=1)
    with pytest.raises(DeviceError):
        rig.run(one.sync())
    for handle in (one, other, one, other):
        with pytest.raises(DeviceError):
            rig.run(handle.sync())
    later = rig.handle(one.inode)
    rig.run(later.sync())
    for handle in (one, other):
        rig.run(handle.close())
    again = rig.handle(later.inode)
    rig.run(again.write(0, [memory(b"m" * 2048)]))
    rig.run(again.sync())
    assert rig.end().records[again.inode].content == b"m" * 2048 + b"d" * 2048


@pytest.mark.parametrize("flags", [0, FUA])
def test_a_flush_that_fails(flags: int) -> None:
    """The sync fails, and all that follow; the volume says why it takes no more changes."""
    rig = Rig(fresh())
    one = rig.file(b"file", 4096)
    rig.faults.fail(errno.ENOMEM, op=FLUSH, times=1)
    with pytest.raises(ODirectError) as first:
        rig.run(one.write(0, [memory(b"n" * 1024)], flags=FUA)) if flags else rig.run(one.sync())
    assert first.value.errno == errno.ENOMEM
    for _ in range(2):
        with pytest.raises(ODirectError):
            rig.run(one.sync())
    with pytest.raises(ODirectError):
        rig.run(one.write(0, [memory(b"n" * 1024)], flags=FUA))
    assert not rig.volume.writable
    with pytest.raises(ReadOnlyError, match="could not be written"):
        rig.run(rig.volume.unlink(2, b"file"))
    with pytest.raises(ReadOnlyError):
        rig.run(rig.volume.open_file(one.inode, writable=True))
    assert rig.whole(one)[1024:] == b"d" * 3072
    rig.run(one.close())
    rig.run(rig.volume.close())
    # Not marked clean: what is there is for e2fsck to look at.
    with Fsck() as fsck:
        assert fsck(bytes(rig.store.data), twice=True).said.count("MODIFIED") <= 2
    assert not RawImage(rig.store.data).image[1024 + 58] & 1


def test_direct_writes_report_their_own_errors() -> None:
    """F41: the writer is told, once; the sync after is fine if all that it can still promise is there."""
    rig = Rig(fresh())
    one = rig.file(b"file", 4096)
    rig.faults.fail(op=WRITE, times=2)
    with pytest.raises(DeviceError):
        rig.run(one.write(4096, [memory(b"n" * 4096)]))
    rig.faults.clear()
    assert one.size_bytes == 4096
    rig.run(one.sync())
    rig.run(one.close())
    rig.check_space()
    assert rig.end().records[one.inode].content == b"d" * 4096


# A volatile cache that is cut after the acknowledgement (F40).

CASES: dict[str, tuple[int | None, int, str]] = {
    "overwrite": (1024, 2048, "auto"),
    "overwrite, strict": (1024, 2048, "strict"),
    "extension": (8192, 4096, "auto"),
    "across the end": (7168, 4096, "auto"),
    "append": (None, 1024, "auto"),
    "append, not aligned": (None, 700, "auto"),
    "far behind the end": (400 << 10, 1024, "auto"),
    "hole": (20 << 10, 2048, "auto"),
    "edges": (1000, 3000, "auto"),
    "one byte": (5, 1, "auto"),
    "buffered": (1024, 2048, "buffered"),
    "buffered extension": (8192, 5000, "buffered"),
}


@pytest.mark.parametrize("how", ["FUA", "sync", "data only", "volume"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_acknowledged_and_cut(block_bytes: int, case: str, how: str) -> None:
    """F40: what was acknowledged is there when the cache has lost all that was not flushed."""
    offset, length, access = CASES[case]
    rig = Rig(fresh(block_bytes, 2 << 20), volatile=True)
    one = rig.file(b"file", 8192)
    if case == "hole":
        rig.run(one.truncate(60 << 10))
    size = one.size_bytes
    at = size if offset is None else offset
    data = bytes(range(1, 101)) * (length // 100 + 1)
    view = memory(data[:length])
    done = rig.run(one.write(offset, [view], access=access, flags=FUA if how == "FUA" else 0))  # type: ignore[arg-type]
    assert done.transferred == length
    if how == "FUA":
        assert done.outcome.promise is Promise.DURABLE
    elif how == "volume":
        rig.run(rig.volume.sync())
    else:
        rig.run(one.sync(data_only=how == "data only"))
    cache = rig.cache
    assert cache is not None
    cache.power_cut()
    with Fsck() as fsck:
        raw = fsck(bytes(rig.store.data), twice=True).raw
    content = raw.records[raw.edges[2, b"file"]].content
    assert content[at : at + length] == data[:length]
    if how != "FUA" or case.startswith(("ext", "app", "over", "across")):
        # Whatever else was written before the sync as well; O_DSYNC promises its own bytes alone.
        assert content[: min(at, 8192)] == b"d" * min(at, 8192)


def test_without_a_sync_the_cut_loses_it() -> None:
    """The cut of these tests does take away what nobody has synced."""
    rig = Rig(fresh(), volatile=True)
    one = rig.file(b"file", 8192)
    rig.run(one.sync())
    rig.run(one.write(0, [memory(b"n" * 1024)]))
    cache = rig.cache
    assert cache is not None
    cache.power_cut()
    raw = RawImage(rig.store.data)
    assert raw.records[raw.edges[2, b"file"]].content == b"d" * 8192


# NOWAIT (F08).


def test_nowait_does_all_or_nothing() -> None:
    """What has no place yet, lies in the cache or is behind a lock is refused, and nothing has happened."""
    rig = Rig(fresh())
    one = rig.file(b"file", 8192)
    rig.run(one.write(20480, [memory(b"e" * 1024)]))
    rig.run(rig.volume.sync())
    free, before = rig.volume.allocator.free_blocks, rig.whole(one)
    for offset in (10240, 21504, 7168, None):
        with pytest.raises(WouldBlockError):
            rig.run(one.write(offset, [memory(b"n" * 2048)], flags=NOWAIT))
    assert (rig.volume.allocator.free_blocks, rig.whole(one)) == (free, before)
    done = rig.run(one.write(1024, [memory(b"n" * 1024)], flags=NOWAIT))
    assert done.transferred == 1024 and done.outcome.kind is Kind.DIRECT
    assert rig.run(one.read(1024, [empty(1024)], flags=NOWAIT)).transferred == 1024
    rig.run(one.write(2048, [memory(b"m" * 100)], access="buffered"))
    for _ in range(2):
        with pytest.raises(WouldBlockError):
            rig.run(one.write(2048, [memory(b"n" * 1024)], flags=NOWAIT))
        with pytest.raises(WouldBlockError):
            rig.run(one.read(2048, [empty(1024)], flags=NOWAIT))
    held = one.node.lock.try_hold()
    assert held is not None
    with pytest.raises(WouldBlockError):
        rig.run(one.write(1024, [memory(b"n" * 1024)], flags=NOWAIT))
    held.release()
    rig.run(one.close())
    rig.check_space()
    content = rig.end().records[one.inode].content
    assert content == before[:1024] + b"n" * 1024 + b"m" * 100 + before[2148:]


# A volume with nothing left (F30).


def full(block_bytes: int = 1024, *, inodes: int = 32) -> tuple[Rig, NodeFile]:
    """A volume whose one file has all the blocks."""
    rig = Rig(base_image(160 * block_bytes, block_bytes, "-N", str(inodes), "-m", "0"))
    handle = rig.file(b"big")
    with pytest.raises(NoSpaceError):
        while rig.run(handle.write(None, [memory(b"b" * 40 * block_bytes)])).transferred:
            pass
    assert not rig.volume.allocator.free_blocks
    rig.run(rig.volume.sync())
    return rig, handle


def everything(rig: Rig) -> Any:
    """Names, sizes, links and space: what a failed call must leave as it was."""

    async def look() -> Any:
        entries = await rig.volume.tree(2)
        known = [(entry.path, entry.attributes._replace(mtime_ns=0, ctime_ns=0, atime_ns=0)) for entry in entries]
        root = await rig.volume.attributes(2)
        return sorted(known), root.links, root.size, await rig.volume.space()

    return rig.run(look())


@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_a_full_volume_refuses_and_stays_as_it_was(block_bytes: int) -> None:
    """F30: direct, buffered, mkdir, symbolic links, attributes, many files: all or nothing, with the counts right."""
    rig, big = full(block_bytes)
    small = rig.file(b"small")  # It takes an inode alone.
    before = everything(rig)
    tries: list[Callable[[], Coroutine[Any, Any, object]]] = [
        lambda: small.write(0, [memory(b"n" * block_bytes)]),
        lambda: small.write(0, [memory(b"n" * block_bytes)], access="strict"),
        lambda: small.write(0, [memory(b"n" * 100)]),
        lambda: small.write(5, [memory(b"n" * 5000)], access="buffered"),
        lambda: small.write(0, [memory(b"n" * block_bytes)], flags=FUA),
        lambda: big.write(None, [memory(b"n" * block_bytes)]),
        lambda: rig.volume.create(2, b"directory", DIRECTORY),
        lambda: rig.volume.create(2, b"link", LINK, target=b"t" * 100),
        lambda: rig.volume.set_xattr(big.inode, b"user.a", b"v"),
        lambda: rig.volume.create_whole([NewFile(2, b"whole", b"w" * 10)]),
    ]
    for attempt in tries:
        with pytest.raises(NoSpaceError) as failed:
            rig.run(attempt())
        assert failed.value.errno == errno.ENOSPC
        assert everything(rig) == before
        rig.check_space()
    rig.run(rig.volume.create(2, b"fast", LINK, target=b"t" * 10))
    rig.run(small.close())
    rig.run(big.close())
    raw = rig.end()
    assert raw.free_blocks == 0 and raw.records[big.inode].content.count(b"b") == big.size_bytes


@pytest.mark.parametrize("access", ["auto", "strict", "buffered"])
def test_overwriting_takes_no_room(access: Any) -> None:
    """F30: in place, whole blocks and parts of them, with nothing free."""
    rig, big = full()
    assert rig.run(big.write(2048, [memory(b"n" * 3072)], access=access)).transferred == 3072
    if access != "strict":
        assert rig.run(big.write(10_001, [memory(b"m" * 700)], access=access)).transferred == 700
    rig.run(big.write(0, [memory(b"o" * 1024)], access=access, flags=FUA))
    rig.run(big.sync())
    rig.run(big.close())
    content = rig.end().records[big.inode].content
    assert content[:5120] == b"o" * 1024 + b"b" * 1024 + b"n" * 3072
    assert content.count(b"m") == (0 if access == "strict" else 700)


def test_room_comes_back() -> None:
    """F30: what was given up can be used right after, though only after a commit that nobody asked for."""
    rig, big = full()
    rig.run(big.truncate(big.size_bytes - 20 * 1024))
    small = rig.file(b"small")
    assert rig.run(small.write(0, [memory(b"n" * 8192)])).transferred == 8192
    rig.run(big.truncate(big.size_bytes - 10 * 1024))
    assert rig.run(small.write(8192, [memory(b"n" * 16384)], access="buffered")).transferred == 16384
    rig.run(rig.volume.create(2, b"directory", DIRECTORY))
    rig.run(small.close())
    rig.run(rig.volume.unlink(2, b"small"))
    other = rig.file(b"other")
    assert rig.run(other.write(0, [memory(b"m" * 20480)])).transferred == 20480
    for handle in (big, other):
        rig.run(handle.close())
    rig.check_space()
    assert rig.end().records[other.inode].content == b"m" * 20480


def test_a_write_that_has_room_for_a_part() -> None:
    """F30: a short count, and what it counts is there."""
    rig, big = full()
    rig.run(big.truncate(big.size_bytes - 12 * 1024))
    rig.run(rig.volume.sync())
    small = rig.file(b"small")
    done = rig.run(small.write(0, [memory(b"n" * 40_960)]))
    assert 1024 <= done.transferred < 40_960
    assert small.size_bytes == done.transferred
    for handle in (big, small):
        rig.run(handle.close())
    rig.check_space()
    assert rig.end().records[small.inode].content == b"n" * done.transferred


def test_no_inode_is_left() -> None:
    """Creating fails as a whole, and works again where one was given up."""
    rig = Rig(base_image(160 << 10, 1024, "-N", "16", "-m", "0"))
    made = 0
    with pytest.raises(NoSpaceError):
        while True:
            rig.run(rig.volume.create(2, b"%d" % made, FILE))
            made += 1
    before = everything(rig)
    for mode in (FILE, DIRECTORY, LINK):
        with pytest.raises(NoSpaceError):
            rig.run(rig.volume.create(2, b"more", mode, target=b"t" if mode == LINK else b""))
    with pytest.raises(NoSpaceError):
        rig.run(rig.volume.create_whole([NewFile(2, b"whole", b"w" * 3000)]))
    assert everything(rig) == before
    rig.check_space()
    rig.run(rig.volume.unlink(2, b"0"))
    rig.run(rig.volume.create(2, b"more", FILE))
    raw = rig.end()
    assert made > 3 and raw.free_inodes == 0


def test_a_directory_that_cannot_grow() -> None:
    """The name that would need a block is refused, those before it stay."""
    rig, big = full(inodes=128)
    made = 0
    with pytest.raises(NoSpaceError):
        while True:
            rig.run(rig.volume.create(2, b"%03d" % made + b"x" * 200, FILE))
            made += 1
    before = everything(rig)
    for call in (
        lambda: rig.volume.link(big.inode, 2, b"y" * 200),
        lambda: rig.volume.rename(2, b"big", 2, b"y" * 200),
        lambda: rig.volume.create(2, b"y" * 200, FILE),
    ):
        with pytest.raises(NoSpaceError):
            rig.run(call())
        assert everything(rig) == before
    rig.run(rig.volume.rename(2, b"big", 2, b"%03d" % 0 + b"x" * 200))
    rig.run(big.close())
    rig.check_space()
    assert len(rig.end().edges) == made + 1


def test_read_errors_leave_the_volume_writable() -> None:
    """A read that fails is its caller's affair alone."""
    rig = Rig(fresh())
    one = rig.file(b"file", 4096)
    rule = rig.faults.fail(op=READ)
    for access in ("auto", "strict", "buffered"):
        with pytest.raises(DeviceError):
            rig.run(one.read(0, [empty(4096)], access=access))  # type: ignore[arg-type]
    rule.remove()
    assert rig.volume.writable
    assert rig.whole(one) == rig.whole(one, "buffered") == b"d" * 4096
    assert rig.run(rig.volume.entries(2))[0].kind is FileKind.DIRECTORY
    rig.run(one.close())
    rig.end()
