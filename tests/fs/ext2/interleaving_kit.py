"""Operations side by side on one file of an ext2 volume in simulated time, and what they may show and leave.

The volume is opened, and judged, over its device in memory; in between every bio goes through a `SimDevice`,
which chooses when it ends, and how. What happens is noted with its begin and its end. Then:

    reads     each sector is what it was after some of the changes, in some order: all that had ended before the
              read began are among them, none that began after it. So nothing is stale, and nothing shows below
              the size that was never written (F03, F20)
    the end   the same after all changes; whole requests, where nothing is in several parts (F10)
    leftovers no lock, count, promise, prepared run or pin (F01, G06, G20, F30); e2fsck is silent; free space
              held a canary, which is nowhere (F11, F12)

A change that failed may have happened in part. One whose data failed later, in write-back, may have left
zeroes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy
from tests.dio.kit import drive
from tests.fs.ext2.crash_kit import Fsck
from tests.fs.ext2.crash_model import CANARY, with_canary
from tests.fs.ext2.raw_image import RawImage
from tests.fs.ext2.writing_kit import device_of, fresh_image

from odirect.base.errors import NoSpaceError, ODirectError
from odirect.block.bio import READ, WRITE, Bio
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice, Limits
from odirect.block.memory import MemoryDevice
from odirect.dio.blockdev import transfer
from odirect.dio.mapping import Extent
from odirect.dio.requests import Request
from odirect.fs.base import Access
from odirect.fs.ext2.volume import Ext2, open_ext2
from odirect.fs.file import FileNode, NodeFile
from odirect.fs.requests import NodeRequests
from odirect.sched.scheduler import Scheduler
from odirect.sched.traps import Event, gather, wait
from odirect.testing.model import ModelFile
from odirect.testing.sim import Simulation
from odirect.testing.sim_device import SimFaults

T = TypeVar("T")

SECTOR = 512
_SIZE = 192 << 10
_CLOCK = 1_700_000_000_000_000_000


class Do(NamedTuple):
    """One operation. `value` is what a write fills its range with; offset -1 appends."""

    verb: str
    offset: int = 0
    length: int = 0
    value: int = 0
    access: Access = "auto"

    @property
    def changes(self) -> bool:
        return self.verb not in ("read", "submit read", "batch read", "sync")

    def parts(self) -> set[Do]:
        """What may have happened of it when it failed: a write ends at its head or body, whatever the block size."""
        found = {self}
        if self.verb.endswith("write") and self.offset >= 0:
            end = self.offset + self.length
            for unit in (1024, 2048, 4096):
                for cut in (-(-self.offset // unit) * unit, end // unit * unit):
                    if self.offset < cut < end:
                        found.add(self._replace(length=cut - self.offset))
        return found

    def apply(self, content: bytes) -> bytes:
        """The file after it."""
        model = ModelFile(content)
        if self.verb in ("write", "submit write", "batch write"):
            model.pwrite(bytes([self.value]) * self.length, self.offset if self.offset >= 0 else model.size)
        elif self.verb == "truncate":
            model.truncate(self.length)
        elif self.verb == "punch":
            model.punch(self.offset, self.length)
        return model.data


class Happened(NamedTuple):
    """An operation that has ended. data: what a read gave; None if it failed."""

    what: Do
    began: int
    ended: int
    data: bytes | None
    error: ODirectError | None


class Relay:
    """A device that is another one."""

    def __init__(self, target: BlockDevice) -> None:
        self.target = target

    @property
    def size_bytes(self) -> int:
        return self.target.size_bytes

    @property
    def limits(self) -> Limits:
        return self.target.limits

    @property
    def in_flight(self) -> int:
        return self.target.in_flight

    def submit(self, bio: Bio) -> None:
        self.target.submit(bio)

    def commit(self) -> None:
        self.target.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        return self.target.poll(timeout_ns)

    def wakeup_fd(self) -> int | None:
        return None

    def close(self) -> None:
        pass


@functools.lru_cache(maxsize=64)
def prepared_image(content: bytes, holes: tuple[tuple[int, int], ...], block_bytes: int) -> bytes:
    """A volume with one file, the canary in its free space and behind the file's end; holes are (offset, length)."""
    size = _SIZE * block_bytes // 1024
    device = device_of(fresh_image(size, "-b", str(block_bytes), "-N", "16", "-m", "0"))

    async def make() -> None:
        volume = await _open(device, Scheduler())
        number = await volume.create(2, b"file", 0o100644)
        file = await volume.open_file(number, writable=True)
        if content:
            await file.write(0, [memoryview(content)])
        for offset, length in holes:
            await file.punch(offset, length)
        places.extend(await file.extents(0, len(content)))
        await volume.close()

    places: list[Extent] = []
    drive(make(), device)
    image = bytearray(with_canary(bytes(device.data)))
    if places and places[-1].addr is not None:
        # What is behind the file's end in its last block is nobody's to see either (F11).
        end = places[-1].addr + places[-1].length
        start = end - (places[-1].offset + places[-1].length - len(content))
        image[start:end] = bytes([CANARY]) * (end - start)
    return bytes(image)


async def _open(device: BlockDevice, scheduler: Scheduler) -> Ext2:
    return await open_ext2(device, name="image", writable=True, scheduler=scheduler, clock_ns=lambda: _CLOCK)


class Setting:
    """A volume and its one file, opened, in a simulation.

    cold: nothing of the file's tree is cached. full: no block is free. faults: of every bio until the
    judgement.
    """

    def __init__(
        self,
        sim: Simulation,
        content: bytes = b"",
        holes: tuple[tuple[int, int], ...] = (),
        *,
        block_bytes: int = 1024,
        faults: SimFaults | None = None,
        over: Callable[[BlockDevice], BlockDevice] | None = None,
        cold: bool = False,
        handles: int = 1,
        full: bool = False,
        latencies_ns: Sequence[int] | None = None,
    ) -> None:
        for start, length in holes:
            content = content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]
        self.sim = sim
        self.content = content
        self.faulty = faults is not None or over is not None
        self.memory: MemoryDevice = device_of(prepared_image(content, holes, block_bytes))
        self.relay = Relay(self.memory)
        self.history: list[Happened] = []
        self._time = 0
        self.volume = self.quietly(_open(self.relay, sim.scheduler))
        self.pins = dict(self.volume.cache._pins)
        self.number = self.quietly(self.volume.lookup(2, b"file"))
        self.handles = [
            cast(NodeFile, self.quietly(self.volume.open_file(self.number, writable=True))) for _ in range(handles)
        ]
        self.node: FileNode = self.handles[0].node
        if not cold:
            self.quietly(self.handles[0].extents(0, 1 << 20))
        if full:
            self.quietly(self._fill())
        device: BlockDevice = sim.device(store=self.memory, faults=faults, latencies_ns=latencies_ns, add=False)
        if over is not None:
            device = over(device)
        sim.scheduler.add_device(device)
        self.relay.target = device

    def quietly(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it returns, done at once, on a device that never fails."""
        return drive(coroutine, self.memory)

    async def _fill(self) -> None:
        """Leave no block free: what is allocated next was freed before."""
        number = await self.volume.create(2, b"filler", 0o100644)
        filler = await self.volume.open_file(number, writable=True)
        try:
            for blocks in (self.volume.available_blocks() - 8, *[1] * 9):
                await filler.write(None, [memoryview(bytes(self.volume.block_bytes * blocks))])
        except NoSpaceError:
            await filler.close()
        for inode in (2, 11, number):
            if self.volume.available_blocks():
                await self.volume.set_xattr(inode, b"user.x", b"x")
        await self.volume.sync()
        assert not self.volume.available_blocks()

    # What happens.

    def actor(self, *operations: Do, handle: int = 0) -> Coroutine[Any, Any, None]:
        """These operations, one after the other."""

        async def act() -> None:
            for operation in operations:
                await self.do(operation, self.handles[handle])

        return act()

    async def together(self, *actors: Coroutine[Any, Any, None]) -> None:
        """All at once, until all have ended."""
        await gather(*[self.sim.scheduler.spawn(actor, f"actor {number}") for number, actor in enumerate(actors)])

    async def do(self, operation: Do, handle: NodeFile) -> None:
        """One operation, noted down."""
        self._time += 1
        began, data, error = self._time, None, None
        try:
            data = await _VERBS[operation.verb](self, handle, operation)
        except ODirectError as raised:
            if not self.faulty:
                raise
            error = raised
        self._time += 1
        parts = [operation]
        if operation.verb == "batch write":
            ends = range(operation.offset, operation.offset + operation.length, SECTOR)
            parts = [operation._replace(offset=at, length=SECTOR) for at in ends]
        self.history += [Happened(part, began, self._time, data, error) for part in parts]

    async def _read(self, handle: NodeFile, what: Do) -> bytes:
        memory = empty(what.length)
        memory[:] = bytes([0xEE]) * what.length
        done = await handle.read(what.offset, [memory], access=what.access)
        assert bytes(memory[done.transferred :]) == bytes([0xEE]) * (what.length - done.transferred), "past the count"
        return bytes(memory[: done.transferred])

    async def _write(self, handle: NodeFile, what: Do) -> None:
        memory = empty(what.length)
        memory[:] = bytes([what.value]) * what.length
        done = await handle.write(None if what.offset < 0 else what.offset, [memory], access=what.access)
        assert done.transferred == what.length or self.faulty, done

    async def _truncate(self, handle: NodeFile, what: Do) -> None:
        await handle.truncate(what.length)

    async def _punch(self, handle: NodeFile, what: Do) -> None:
        await handle.punch(what.offset, what.length)

    async def _sync(self, handle: NodeFile, what: Do) -> None:
        await handle.sync()

    async def _submit(self, handle: NodeFile, what: Do) -> bytes | None:
        op = READ if what.verb == "submit read" else WRITE
        memory = empty(what.length)
        memory[:] = bytes([0xEE if op == READ else what.value]) * what.length
        ended = Event()
        requests = NodeRequests(handle, self.sim.scheduler, what.access, 0, ended.fire)
        request: Request = requests.start(op, what.offset, memory, None)
        await wait(ended)
        assert requests.pending == 0 and request.done
        count = request.result()
        if op == WRITE:
            assert count == what.length or self.faulty
            return None
        assert bytes(memory[count:]) == bytes([0xEE]) * (what.length - count), "past the count"
        return bytes(memory[:count])

    async def _batch(self, handle: NodeFile, what: Do) -> bytes | None:
        """Sector by sector, as a caller of `begin_batch` does it; the general way where there is no place."""
        op = READ if what.verb == "batch read" else WRITE
        offsets = numpy.arange(what.offset, what.offset + what.length, SECTOR, dtype=numpy.int64)
        memory = empty(what.length)
        memory[:] = bytes([what.value]) * what.length
        addrs = await handle.begin_batch(op, offsets, SECTOR)
        try:
            tasks = []
            for at, addr in zip(range(0, what.length, SECTOR), addrs.tolist(), strict=True):
                if addr >= 0:
                    view = memory[at : at + SECTOR]
                    tasks.append(self.sim.scheduler.spawn(transfer(self.relay, op, addr, [view], SECTOR)))
            await gather(*tasks)
        finally:
            await handle.end_batch(op)
        count = what.length
        for at in (numpy.flatnonzero(addrs < 0) * SECTOR).tolist():
            call = handle.read if op == READ else handle.write
            done = await call(what.offset + at, [memory[at : at + SECTOR]])
            count = min(count, at + done.transferred) if done.transferred < SECTOR else count
        return bytes(memory[:count]) if op == READ else None

    # The judgement.

    def judge(self, fsck: Fsck | None, *, exact: bool = False) -> None:
        """Raise AssertionError unless all that happened is right. exact: the end is that of one order, as a whole.

        Without e2fsck only its counts of free blocks are held against its bitmaps.
        """
        self.relay.target = self.memory
        changes = [one for one in self.history if one.what.changes]
        if self.node.pages.errors.sample():
            # A page that could not be written back is forgotten some day: nobody knows what of it was lost.
            changes = [one._replace(error=one.error or ODirectError("lost")) for one in changes]
        for one in self.history:
            if one.data is not None:
                self._judge_read(one, changes)
        self._judge_leftovers()
        broken = self.volume.committer.error is not None
        content = b"" if broken else self._content("auto")
        if not self.faulty:
            assert self._content("buffered") == content, "the cache and the device differ"
            self._judge_end(content, changes, exact=exact)
        self._judge_disk(fsck, content)

    def _content(self, access: Access) -> bytes:
        handle = self.handles[0]
        memory = empty(-(-handle.size_bytes // 4096) * 4096)
        done = self.quietly(handle.read(0, [memory], access=access)) if len(memory) else None
        return bytes(memory[: done.transferred if done else 0])

    def _judge_read(self, read: Happened, changes: list[Happened]) -> None:
        assert read.data is not None
        needed = frozenset(n for n, one in enumerate(changes) if one.ended < read.began and not one.error)
        barred = frozenset(n for n, one in enumerate(changes) if one.began > read.ended)
        states = [
            content for done, content in _states(self.content, _key(changes)) if needed <= done and not done & barred
        ]
        what = read.what
        counts = {max(0, min(what.length, len(content) - what.offset)) for content in states}
        if self.faulty or any(one.ended > read.began and one.began < read.ended for one in changes):
            # What was copied before the file was cut counts, and a write may extend it in steps.
            counts = set(range(min(counts), max(counts) + 1))
        assert len(read.data) in counts, f"{what} gave {len(read.data)} bytes; {sorted(counts)} would do"
        for one in changes:
            if one.what.verb == "truncate" and one.ended > read.began and one.began < read.ended:
                # The rest of the last block is cleared before the size changes, as the kernel does it.
                size = one.what.length
                end = -(-size // self.node.block_bytes) * self.node.block_bytes
                states += [content[:size] + bytes(len(content[size:end])) + content[end:] for content in states]
        self._judge_sectors(what, read.data, what.offset, states, zeroes=self.faulty)

    def _judge_sectors(self, what: object, data: bytes, offset: int, states: list[bytes], *, zeroes: bool) -> None:
        assert bytes([CANARY]) not in data, f"{what} shows the canary at {offset + data.index(CANARY)}"
        at = offset
        while at < offset + len(data):
            end = min(offset + len(data), at - at % SECTOR + SECTOR)
            seen = data[at - offset : end - offset]
            legal = {content[at:end] for content in states if len(content) >= end}
            if zeroes:
                # What was lost is as it was before, though the size is not.
                legal |= {content[at:end].ljust(end - at, b"\0") for content in states}
                legal.add(bytes(end - at))
            assert seen in legal, (
                f"{what} shows {_short(seen)} at {at}; it can be {[_short(one) for one in legal]}; "
                f"history: {[one[:3] for one in self.history]}"
            )
            at = end

    def _judge_end(self, content: bytes, changes: list[Happened], *, exact: bool) -> None:
        everything = frozenset(range(len(changes)))
        ends = [found for done, found in _states(self.content, _key(changes)) if done == everything]
        assert len(content) in set(map(len, ends)), f"{len(content)} bytes are left, not one of {set(map(len, ends))}"
        self._judge_sectors("the end", content, 0, [end for end in ends if len(end) == len(content)], zeroes=False)
        if exact:
            assert content in ends, f"no order ends so: {_runs(content)}; {[_runs(end) for end in ends]}"

    def _judge_leftovers(self) -> None:
        node, allocator = self.node, self.volume.allocator
        assert node.lock.idle and node.allocating.idle, "a lock is held"
        assert node.in_flight.value == 0, f"{node.in_flight.value} in flight"
        assert not allocator.prepared and not allocator.planned, (
            "blocks were prepared and neither published nor given up"
        )
        assert not any(page.pins for page in node.pages._pages.values()), "pages are pinned"
        assert not any(page.fill or page.image for page in node.pages._pages.values()), "pages are in transfer"
        if not node.pages.dirty_bytes:
            assert allocator.reserved == 0, f"{allocator.reserved} blocks are reserved for nobody"

    def _judge_disk(self, fsck: Fsck | None, content: bytes) -> None:
        broken = self.volume.committer.error is not None
        for handle in self.handles:
            try:
                self.quietly(handle.close())
            except ODirectError:
                assert self.faulty
        if not broken:
            assert self.volume.cache._pins == self.pins, f"pins {self.volume.cache._pins}, at first {self.pins}"
            assert self.volume.allocator.reserved == 0, f"{self.volume.allocator.reserved} blocks reserved in the end"
        self.quietly(self.volume.close())
        image = bytes(self.memory.data)
        if broken:
            if fsck is None:
                return
            raw = fsck(image, twice=True).raw
        else:
            if fsck is not None:
                fsck.image.write_bytes(image)
                status, said = fsck.run("-fn")
                assert status == 0, said
            raw = RawImage(image)
            assert raw.free_blocks == len(raw.free_block_numbers()), "the count of free blocks is wrong"
        record = raw.records[raw.edges[2, b"file"]]
        assert bytes([CANARY]) not in record.content, "the canary is in the file"
        if not self.faulty:
            assert record.content == content, f"on the disk: {_runs(record.content)}, not {_runs(content)}"


_VERBS: dict[str, Callable[[Setting, NodeFile, Do], Coroutine[Any, Any, bytes | None]]] = {
    "read": Setting._read,
    "write": Setting._write,
    "truncate": Setting._truncate,
    "punch": Setting._punch,
    "sync": Setting._sync,
    "submit read": Setting._submit,
    "submit write": Setting._submit,
    "batch read": Setting._batch,
    "batch write": Setting._batch,
}

_Key = tuple[tuple[Do, frozenset[int], bool], ...]


def _key(changes: list[Happened]) -> _Key:
    """Each change, which ones had ended before it began, and whether it failed."""
    return tuple(
        (one.what, frozenset(n for n, other in enumerate(changes) if other.ended < one.began), one.error is not None)
        for one in changes
    )


@functools.lru_cache(maxsize=4096)
def _states(content: bytes, changes: _Key) -> tuple[tuple[frozenset[int], bytes], ...]:
    """(changes that have happened, what the file is then), for every order that what was seen allows.

    A change that failed happens, or does not, or a part of it does.
    """
    found = {(frozenset[int](), content)}
    waiting = list(found)
    while waiting:
        done, now = waiting.pop()
        for number, (what, before, failed) in enumerate(changes):
            if number in done or not before <= done:
                continue
            for after in {now, *(part.apply(now) for part in what.parts())} if failed else {what.apply(now)}:
                state = (done | {number}, after)
                if state not in found:
                    found.add(state)
                    waiting.append(state)
    return tuple(found)


def _short(data: bytes) -> str:
    return "+".join(f"{count}×{value:02x}" for value, count in _pieces(data))


def _runs(content: bytes) -> str:
    return _short(content) or "nothing"


def _pieces(data: bytes) -> Iterator[tuple[int, int]]:
    start = 0
    for at in range(1, len(data) + 1):
        if at == len(data) or data[at] != data[start]:
            yield data[start], at - start
            start = at
