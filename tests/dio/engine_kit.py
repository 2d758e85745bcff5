"""A file system that is no more than a list, for the generic engine: rows G.

A file is described by one letter a block:

    M  mapped, right behind what the letter before it was mapped to     H  hole
    m  mapped, with a gap on the device before it                       U  unwritten
    N  mapped, on the second device                                     D  delalloc: in the page cache only
    I  inline     E  encoded                                            B  mapped, and a boundary

Whatever no file data was ever put into is full of `CANARY`, free blocks and the rest of the last
block too: a canary in what a reader gets is somebody's old data (F11).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from tests.dio.kit import aligned, pattern

from odirect.base.errors import DeviceError
from odirect.block.bio import READ, WRITE, Bio
from odirect.block.device import BlockDevice, Limits
from odirect.block.filters.base import Filter
from odirect.block.filters.fault import Faults
from odirect.block.memory import MemoryDevice
from odirect.dio.completion import DeferredQueue
from odirect.dio.engine import DioFlags, DirectRequest, direct_io
from odirect.dio.mapping import BOUNDARY, DEFER_COMPLETION, NEW, Extent, ExtentKind, Fallback
from odirect.sched.drive_sync import Stalled
from odirect.sched.locks import Count, Held, Mutex
from odirect.sched.scheduler import Scheduler, Task
from odirect.sched.traps import yield_now

T = TypeVar("T")

CANARY = 0xCA
SMALL = Limits(max_bio_bytes=16 << 10, max_segments=8, queue_depth=8, fua=True, volatile_cache=False)

_KINDS = {
    "H": ExtentKind.HOLE,
    "U": ExtentKind.UNWRITTEN,
    "D": ExtentKind.DELALLOC,
    "I": ExtentKind.INLINE,
    "E": ExtentKind.ENCODED,
}


class Steps:
    """Everything that the engine asks of others, in order; the `fail_at`-th raises `error` instead."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.number = 0
        self.fail_at = -1
        self.error: BaseException = DeviceError("injected")
        self.hit = ""

    def at(self, name: str) -> None:
        number, self.number = self.number, self.number + 1
        self.log.append(name)
        if number == self.fail_at:
            self.hit = name
            raise self.error


class Line(Filter):
    """Counts commits, and notes every bio; `submit` is a step. While `closed`, finished bios are held back."""

    def __init__(self, lower: BlockDevice, steps: Steps) -> None:
        super().__init__(lower)
        self.steps = steps
        self.bios: list[Bio] = []
        self.open: set[Bio] = set()
        self.most = 0
        self.batches: list[int] = []
        self.closed = False
        self.held: list[Bio] = []
        self._uncommitted = 0

    def submit(self, bio: Bio) -> None:
        self.steps.at("submit")
        self.lower.submit(bio)
        self.bios.append(bio)
        self.open.add(bio)
        self.most = max(self.most, len(self.open))
        self._uncommitted += 1

    def commit(self) -> None:
        if self._uncommitted:
            self.batches.append(self._uncommitted)
            self._uncommitted = 0
        self.lower.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        self.held += self.lower.poll(timeout_ns)
        if self.closed:
            return []
        finished, self.held = self.held, []
        self.open.difference_update(finished)
        return finished

    def let_go(self, number: int) -> Bio:
        """The bio held back as the `number`-th, for the caller to dispatch."""
        bio = self.held.pop(number)
        self.open.discard(bio)
        return bio

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(op, address, length) of every bio."""
        return [(bio.op, bio.addr, bio.length) for bio in self.bios]


class Place:
    """What one block of the file is."""

    def __init__(self, kind: ExtentKind, device: BlockDevice | None = None, addr: int = -1) -> None:
        self.kind = kind
        self.device = device
        self.addr = addr
        self.cached = b""  # what is in the page cache, or in metadata
        self.boundary = False


class FakeFile:
    """An inode and its mapper at once. Give `hooked()` for a mapper that has a `submit`.

    most_blocks: blocks that one answer covers at most. unwritten: what is allocated is unwritten
    until `end_io` converts it, as a careful file system has it; else it is new, and there at once.
    defer: every mapping asks for deferred completion.
    """

    def __init__(
        self,
        letters: str = "",
        *,
        size: int | None = None,
        block: int = 4096,
        limits: Limits = SMALL,
        free: int = 64,
        most_blocks: int = 1 << 30,
        unwritten: bool = False,
        defer: bool = False,
        scheduler: Scheduler | None = None,
        devices: Sequence[BlockDevice] = (),
    ) -> None:
        self.block_bytes = block
        self.lock = Mutex()
        self.in_flight = Count()
        self.steps = Steps()
        self.limits = limits
        self.most_blocks = most_blocks
        self.unwritten = unwritten
        self.defer = defer
        self.scheduler = scheduler or Scheduler()
        total = (2 * len(letters) + free + 2) * block
        self.memories = [MemoryDevice(total, limits=limits, data=bytes([CANARY]) * total) for _ in range(2)]
        self.faults = [Faults(memory) for memory in self.memories]
        self.lines = [Line(faults, self.steps) for faults in self.faults]
        self.line = self.lines[0]
        self.devices: list[BlockDevice] = list(devices) or list(self.lines)
        for device in self.devices:
            self.scheduler.add_device(device)
        self.asked: list[tuple[int, int, bool]] = []
        self.ended: list[tuple[int, int, object]] = []
        self.forgotten: list[tuple[int, int]] = []
        self.synced: list[tuple[int, int, bool]] = []
        self.queues_made = 0
        self._queue: DeferredQueue | None = None
        self.size_bytes = len(letters) * block if size is None else size
        self.places: list[Place] = []
        self._next = [block, block]
        data = pattern(self.size_bytes, 7)
        for number, letter in enumerate(letters):
            self.places.append(self._made(letter, data[number * block : (number + 1) * block]))

    # -- what the engine asks ----------------------------------------------------------------------

    async def get_blocks(self, request: DirectRequest, offset: int, length: int, create: bool) -> Extent | Fallback:
        self.steps.at("get_blocks")
        self.asked.append((offset, length, create))
        await yield_now()
        block = self.block_bytes
        first, end = offset // block, -(-(offset + length) // block)
        flags = DEFER_COMPLETION if self.defer else 0
        while len(self.places) < end:
            self.places.append(Place(ExtentKind.HOLE))
        end = min(end, first + self.most_blocks)
        place = self.places[first]
        if create and place.kind in (ExtentKind.HOLE, ExtentKind.UNWRITTEN):
            count = 0
            while first + count < end and self.places[first + count].kind == place.kind:
                count += 1
            if place.kind is ExtentKind.HOLE:
                self._allocate(first, count)
                if not self.unwritten:
                    flags |= NEW
            place = self.places[first]
        last = first
        while (
            last + 1 < end
            and not self.places[last].boundary
            and self._continues(self.places[last], self.places[last + 1])
            and not (flags & NEW and last + 1 >= first + count)
        ):
            last += 1
        if self.places[last].boundary:
            flags |= BOUNDARY
        addr = place.addr if place.device is not None else None
        size = (last + 1 - first) * block
        return Extent(place.kind, first * block, size, place.device, addr, flags, ("private", first))

    def end_io(self, request: DirectRequest, offset: int, transferred: int, private: object) -> None:
        self.steps.at("end_io")
        self.ended.append((offset, transferred, private))
        if request.op != WRITE:
            return
        self.size_bytes = max(self.size_bytes, offset + transferred)
        for number in range(offset // self.block_bytes, -(-(offset + transferred) // self.block_bytes)):
            if self.places[number].kind is ExtentKind.UNWRITTEN:
                self.places[number].kind = ExtentKind.MAPPED

    def deferred(self) -> DeferredQueue:
        self.steps.at("deferred")
        if self._queue is None:
            self._queue = DeferredQueue(self.scheduler)
            self.queues_made += 1
        return self._queue

    async def write_back(self, offset: int, length: int) -> None:
        self.steps.at("write_back")
        await yield_now()
        for number in range(offset // self.block_bytes, -(-(offset + length) // self.block_bytes)):
            if number < len(self.places) and self.places[number].kind is ExtentKind.DELALLOC:
                data = self.places[number].cached
                self._allocate(number, 1)
                self.places[number].kind = ExtentKind.MAPPED
                # A page is written whole, with zeroes past the end of the file.
                self._put(number, 0, data.ljust(self.block_bytes, b"\0"))

    async def sync_written(self, offset: int, length: int, *, data_only: bool) -> None:
        self.steps.at("sync_written")
        await yield_now()
        self.synced.append((offset, length, data_only))

    def forget_blocks(self, device: BlockDevice, addr: int, length: int) -> None:
        self.steps.at("forget_blocks")
        self.forgotten.append((addr, length))

    # -- what a test does ----------------------------------------------------------------------------

    def start(self, request: DirectRequest, flags: int = 0, mapper: object = None) -> Task[None]:
        """A task that does `request`, a write under the inode lock where the engine is to lock."""
        return self.scheduler.spawn(self._call(request, flags, mapper))

    async def _call(self, request: DirectRequest, flags: int, mapper: object) -> None:
        held: Held | None = None
        if request.op == WRITE and flags & DioFlags.LOCKING:
            held = await self.lock.hold()
        try:
            await direct_io(request, self, mapper or self, flags)  # type: ignore[arg-type]
        finally:
            if held is not None:
                held.release()

    def turn(self) -> None:
        """Run what is ready, and hand over what it has queued; nothing comes back."""
        self.scheduler.run_ready()
        self.scheduler.commit()

    def pump(self, *tasks: Task[Any]) -> None:
        """Run until all of `tasks` have ended, and nothing is in flight."""
        silent = 0
        while silent < 100:
            self.turn()
            finished = [bio for device in self.scheduler.devices for bio in device.poll(0)]
            silent = 0 if finished else silent + 1
            self.scheduler.dispatch(finished)
            if all(task.done for task in tasks) and not any(line.in_flight for line in self.lines) and silent > 2:
                return
        raise Stalled(f"{tasks} wait for what never comes")

    def run(self, request: DirectRequest, flags: int = 0, mapper: object = None) -> int:
        """What `request` moved, once it is done; raises its error, or the engine's. Checks that nothing is left."""
        task = self.start(request, flags, mapper)
        self.pump(task)
        self.check_idle()
        task.result()
        return request.result()

    def check_idle(self) -> None:
        """G20: no lock, count, bio or task is left."""
        assert self.lock.idle, "the inode lock is held"
        assert self.in_flight.value == 0, "I/O is still counted"
        assert not any(line.in_flight for line in self.lines), "bios are in flight"
        assert not self.scheduler.ready, "tasks are ready"
        assert self._queue is None or self._queue.idle, "a deferred completion is left"

    def content(self) -> bytes:
        """The file's bytes as any reader would get them."""
        found = bytearray()
        for place in self.places:
            if place.kind is ExtentKind.MAPPED:
                found += self._memory_of(place).data[place.addr : place.addr + self.block_bytes]
            elif place.cached:
                found += place.cached.ljust(self.block_bytes, b"\0")
            else:
                found += bytes(self.block_bytes)
        return bytes(found[: self.size_bytes].ljust(self.size_bytes, b"\0"))

    def buffered_write(self, offset: int, data: bytes) -> None:
        """What the page cache would do with the rest of a write (G08): all of it, with zeroes around it."""
        at = offset
        while at < offset + len(data):
            number, within = divmod(at, self.block_bytes)
            taken = min(self.block_bytes - within, offset + len(data) - at)
            while len(self.places) <= number:
                self.places.append(Place(ExtentKind.HOLE))
            place = self.places[number]
            if place.kind is not ExtentKind.MAPPED:
                old = place.cached.ljust(self.block_bytes, b"\0")
                self._allocate(number, 1)
                self.places[number].kind = ExtentKind.MAPPED
                self._put(number, 0, old)
            self._put(number, within, data[at - offset : at - offset + taken])
            at += taken
        self.size_bytes = max(self.size_bytes, offset + len(data))

    def zero_tail(self) -> None:
        """What a file system does before a file grows past its last block's data."""
        number, within = divmod(self.size_bytes, self.block_bytes)
        if within and number < len(self.places) and self.places[number].kind is ExtentKind.MAPPED:
            self._put(number, within, bytes(self.block_bytes - within))

    # -- inside --------------------------------------------------------------------------------------

    def _made(self, letter: str, data: bytes) -> Place:
        block = self.block_bytes
        if letter in "HIED":
            place = Place(_KINDS[letter])
            place.cached = data if letter != "H" else b""
            return place
        index = 1 if letter == "N" else 0
        if letter == "m":
            self._next[index] += block
        addr = self._next[index]
        self._next[index] += block
        place = Place(ExtentKind.UNWRITTEN if letter == "U" else ExtentKind.MAPPED, self.devices[index], addr)
        place.boundary = letter == "B"
        if letter != "U":
            self.memories[index].data[addr : addr + len(data)] = data
        return place

    def _allocate(self, first: int, count: int) -> None:
        kind = ExtentKind.UNWRITTEN if self.unwritten else ExtentKind.MAPPED
        for number in range(first, first + count):
            self.places[number] = Place(kind, self.devices[0], self._next[0])
            self._next[0] += self.block_bytes

    def _continues(self, one: Place, other: Place) -> bool:
        if one.kind != other.kind or one.device is not other.device:
            return False
        return one.device is None or one.addr + self.block_bytes == other.addr

    def _memory_of(self, place: Place) -> MemoryDevice:
        return self.memories[next(n for n, device in enumerate(self.devices) if device is place.device)]

    def _put(self, number: int, within: int, data: bytes) -> None:
        place = self.places[number]
        start = place.addr + within
        self._memory_of(place).data[start : start + len(data)] = data


class Hooked:
    """The file's mapper with a `submit` of its own (G19)."""

    def __init__(self, file: FakeFile) -> None:
        self.file = file
        self.get_blocks = file.get_blocks
        self.end_io = file.end_io
        self.offsets: list[tuple[int, int, int]] = []

    def submit(self, bio: Bio, file_offset: int) -> None:
        self.offsets.append((file_offset, bio.addr, bio.length))
        self.file.line.submit(bio)


def reading(offset: int, length: int, **options: Any) -> tuple[DirectRequest, memoryview]:
    """A read into memory full of 0xA5, and that memory."""
    memory = aligned(b"\xa5" * length)
    return DirectRequest(READ, offset, [memory], **options), memory


def writing(offset: int, data: bytes, **options: Any) -> DirectRequest:
    """A write of `data`."""
    return DirectRequest(WRITE, offset, [aligned(data)], **options)
