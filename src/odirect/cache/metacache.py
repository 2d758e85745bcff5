"""The metadata blocks of a volume in memory: looked up and changed by plain functions, read and written by bios.

**Looking up never waits.** What is not in the cache raises `BlockMiss`; `load` reads what was missing and
calls the function again, inside a transaction, so that a function that was stopped half-way has done
nothing. Plain functions are atomic to every other task; there is no lock here.

**Views.** What `get`, `change` and `create` give are views of the block itself. They are good up to the
caller's next `await` (or his call of `committed` or `commit_failed`); after that only while the block is
pinned and has not been forgotten. Memory is given to another block only at those points, so that no plain
function sees a view change under it.

**Writing back.** `snapshot` copies every dirty block at one instant, in four phases that the file system's
commit writes one after another with a flush between them; within a phase the order is free. A change is
tagged with the phase in which it may reach the device. What must stay as it was until the last phase (a
removed entry, a freed record) is *held back*: the earlier phases show the old bytes there. One commit
runs at a time. A block that is forgotten while its image is being written was freed, and may not be used
again before that commit has ended; so the write does no harm and is not stopped.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final, NamedTuple, TypeVar

from odirect.base.errors import CorruptionError, ReadOnlyError, UnsupportedError
from odirect.base.layout import Place
from odirect.base.units import align_down, align_up, is_power_of_two
from odirect.block.bio import READ, WRITE
from odirect.block.device import BlockDevice
from odirect.block.filters.base import private_buffer
from odirect.cache.slabs import Slabs, Slot
from odirect.cache.transfer import Transfer, all_back
from odirect.sched.traps import Event

T = TypeVar("T")

# The phases of a commit, in order. Plain ints: a block's tag is compared at every change.
FRESH: Final = 0  #: blocks that nothing on the device points to yet
TREE: Final = 1  #: inodes and pointer blocks that were there already
ENTRY: Final = 2  #: directory blocks that were there already, with what was added
LATE: Final = 3  #: what was removed, and the maps and counts of what is free
_CLEAN: Final = 4

#: Bytes that are held back: (offset in the block, the bytes), sorted, not overlapping.
_Held = tuple[tuple[int, bytes], ...]


class BlockMiss(Exception):
    """Blocks that a look-up needs and that are not in the cache; `load` catches it and reads them."""

    def __init__(self, blocks: tuple[int, ...]) -> None:
        super().__init__(blocks)
        self.blocks = blocks


class _Block:
    """A cached block. tag: the phase in which it is to be written, or _CLEAN."""

    __slots__ = ("held", "in_commit", "memory", "number", "slot", "tag", "view")

    def __init__(self, number: int, slot: Slot, block_bytes: int) -> None:
        self.number = number
        self.slot = slot
        self.memory = slot.memory[:block_bytes]
        self.view = self.memory.toreadonly()
        self.tag: int = _CLEAN
        self.held: _Held = ()
        self.in_commit = False


class _Before(NamedTuple):
    """How a block was when a transaction first touched it.

    `block` None: it was not cached. `content` None: the block left the cache as it was, so its memory
    still shows it.
    """

    block: _Block | None
    content: bytes | None
    tag: int
    held: _Held


class _Transaction:
    """One level of `MetaCache.transaction`. An inner one that goes well leaves what it knows to the outer one."""

    __slots__ = ("_cache", "_outer", "before", "undo")

    def __init__(self, cache: MetaCache) -> None:
        self._cache = cache
        self._outer: _Transaction | None = None
        self.before: dict[int, _Before] = {}
        self.undo: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        self._outer = self._cache._transaction
        self._cache._transaction = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cache._transaction is not self:
            raise RuntimeError("a transaction was left that is not the innermost one: something in it has awaited")
        self._cache._transaction = self._outer
        if kind is None:
            self._cache._keep(self, self._outer)
        else:
            self._cache._roll_back(self)


class _Reading:
    """Adjacent blocks that are being read by one transfer. `lead`: bytes read before the first one."""

    __slots__ = ("bounce", "error", "first", "lead", "slots", "transfer")

    def __init__(self, first: int, slots: list[Slot], lead: int, bounce: memoryview | None) -> None:
        self.first = first
        self.slots = slots
        self.lead = lead
        self.bounce = bounce
        self.error: Exception | None = None
        self.transfer: Transfer | None = None

    @property
    def numbers(self) -> range:
        """The blocks."""
        return range(self.first, self.first + len(self.slots))


class Snapshot:
    """All blocks that were dirty at one instant, in private aligned copies.

    phases  for FRESH, TREE, ENTRY and LATE the (block, image) pairs to write, sorted by block
    blocks  how many blocks these are; one with held-back bytes is in two phases
    """

    def __init__(self, phases: list[list[tuple[int, memoryview]]], taken: list[tuple[_Block, int, _Held]]) -> None:
        self.phases = phases
        self.blocks = len(taken)
        self._taken = taken

    def __repr__(self) -> str:
        return f"<Snapshot of {self.blocks} blocks, by phase {[len(phase) for phase in self.phases]}>"


class MetaCache:
    """The metadata blocks of one volume. Its tasks share it; threads enter it one at a time."""

    def __init__(
        self,
        device: BlockDevice,
        block_bytes: int,
        *,
        name: str,
        limit_bytes: int = 64 << 20,
        first_block_addr: int = 0,
        writable: bool = True,
    ) -> None:
        """A cache of blocks of `block_bytes`, block n at byte `first_block_addr` + n * block_bytes of `device`.

        name: the volume's, for messages. limit_bytes: clean blocks that nobody has pinned are dropped, the
        least recently used first, when the cache holds more. writable: False refuses changes, and takes
        devices whose blocks are larger than the volume's. Raises UnsupportedError if blocks cannot be
        written to the device one by one, ValueError for sizes that make no sense.
        """
        if not is_power_of_two(block_bytes) or limit_bytes < 0 or first_block_addr < 0:
            raise ValueError(f"blocks of {block_bytes} bytes from {first_block_addr} on, {limit_bytes} bytes of them")
        unit = device.limits.write_align
        if writable and (block_bytes % unit or first_block_addr % unit):
            raise UnsupportedError(
                f"blocks of {block_bytes} bytes from byte {first_block_addr} on cannot be written one by one to a "
                f"device that takes multiples of {unit} bytes; open the volume for reading only",
                path=name,
            )
        self.device = device
        self.block_bytes = block_bytes
        self.name = name
        self.limit_bytes = limit_bytes
        self._first_addr = first_block_addr
        self._writable = writable
        self._zeroes = bytes(block_bytes)
        self._slabs = Slabs(block_bytes, device.limits.memory_align)
        self._blocks: dict[int, _Block] = {}
        self._dirty: dict[int, _Block] = {}
        self._pins: dict[int, int] = {}
        # Clean, in no commit, not pinned: what may be reclaimed, the least recently used first.
        self._idle: collections.OrderedDict[int, _Block] = collections.OrderedDict()
        self._reading: dict[int, _Reading] = {}
        # Memory that nobody needs, but of which somebody may still hold a view.
        self._retired: list[Slot] = []
        self._transaction: _Transaction | None = None
        self._commit: Snapshot | None = None

    @property
    def dirty_blocks(self) -> int:
        """How many blocks the next snapshot will hold."""
        return len(self._dirty)

    @property
    def used_bytes(self) -> int:
        """The memory of all cached blocks, in bytes."""
        return len(self._blocks) * self._slabs.slot_bytes

    # -- looking up ------------------------------------------------------------------------------

    def get(self, block: int) -> memoryview:
        """The bytes of `block`, read-only. Raises BlockMiss if it is not cached."""
        found = self._blocks.get(block)
        if found is None:
            raise BlockMiss((block,))
        if block in self._idle:
            self._idle.move_to_end(block)
        return found.view

    def get_all(self, blocks: Sequence[int]) -> list[memoryview]:
        """The bytes of each of `blocks`, read-only. Raises one BlockMiss that names all that are not cached."""
        missing = tuple(dict.fromkeys(block for block in blocks if block not in self._blocks))
        if missing:
            raise BlockMiss(missing)
        return [self.get(block) for block in blocks]

    def peek(self, block: int) -> memoryview | None:
        """The bytes of `block`, read-only, or None if it is not cached. Does not count as a use."""
        found = self._blocks.get(block)
        return None if found is None else found.view

    # -- changing --------------------------------------------------------------------------------

    def transaction(self) -> AbstractContextManager[None]:
        """A `with` block whose changes are all undone if an exception leaves it. Nothing in it may await.

        Undone: changed bytes (in place: views show the old ones), tags, held-back bytes, created and
        forgotten blocks; then the calls given to `undo` run, the last one first. Inside another one it
        joins that: what it changed is undone with the outer one, too. Pins are not undone.
        """
        return _Transaction(self)

    def change(self, block: int, tag: int) -> memoryview:
        """The bytes of `block`, writable; it is dirty now, and written in phase `tag` or an earlier one.

        A dirty block keeps the earlier of its tag and this one. Raises BlockMiss if it is not
        cached, RuntimeError outside a transaction, ReadOnlyError if the cache is not writable.
        """
        transaction = self._changing(tag)
        found = self._blocks.get(block)
        if found is None:
            raise BlockMiss((block,))
        self._remember(transaction, found)
        found.tag = min(found.tag, tag)
        self._sort_in(found)
        return found.memory

    def create(self, block: int, tag: int = FRESH) -> memoryview:
        """Zeroes for `block`, writable, whatever the device or the cache has there; it is dirty now, with `tag`.

        Raises RuntimeError outside a transaction, ReadOnlyError if the cache is not writable.
        """
        transaction = self._changing(tag)
        found = self._blocks.get(block)
        if found is None:
            found = _Block(block, self._slabs.take(), self.block_bytes)
            transaction.before.setdefault(block, _Before(None, None, _CLEAN, ()))
            self._blocks[block] = found
            self._reading.pop(block, None)  # What is being read is older than this.
        else:
            self._remember(transaction, found)
        found.memory[:] = self._zeroes
        found.tag = tag
        found.held = ()
        self._sort_in(found)
        return found.memory

    def hold_back(self, block: int, offset: int, length: int) -> None:
        """Show bytes [offset, offset + length) of `block` as they are now in every phase but LATE of the next commit.

        To be called before they are changed; the block is dirty from here on. Bytes that are held back
        already stay what they were. Nothing for a block that is dirty FRESH: the device has no old bytes
        of it. Raises as `change` does, and ValueError for bytes outside the block.
        """
        transaction = self._changing(LATE)
        if offset < 0 or length < 0 or offset + length > self.block_bytes:
            raise ValueError(f"bytes {offset}+{length} of a block of {self.block_bytes}")
        found = self._blocks.get(block)
        if found is None:
            raise BlockMiss((block,))
        if found.tag == FRESH or not length:
            return
        self._remember(transaction, found)
        found.held = _with_gaps_filled(found.held, offset, found.view[offset : offset + length])
        found.tag = min(found.tag, LATE)
        self._sort_in(found)

    def held_back(self, block: int, offset: int) -> bool:
        """Whether byte `offset` of `block` is held back now, so that nothing else may be put there."""
        found = self._blocks.get(block)
        if found is None:
            return False
        return any(start <= offset < start + len(kept) for start, kept in found.held)

    def undo(self, call: Callable[[], object]) -> None:
        """Have `call` called if the running transaction is undone. RuntimeError if none is running."""
        if self._transaction is None:
            raise RuntimeError("there is no transaction that could be undone")
        self._transaction.undo.append(call)

    def forget(self, block: int, count: int = 1) -> None:
        """Drop the cached copies, dirty or not, of `count` blocks from `block` on: freed, or about to be data (G11).

        What is being read of them is not kept either. Undone with the transaction if inside one.
        """
        if count <= len(self._blocks) + len(self._reading):
            numbers: Iterable[int] = range(block, block + count)
        else:
            end = block + count
            numbers = [number for number in (*self._blocks, *self._reading) if block <= number < end]
        for number in numbers:
            self._reading.pop(number, None)
            found = self._blocks.get(number)
            if found is not None:
                self._forget(found)

    def pin(self, block: int) -> None:
        """Keep `block` from being reclaimed until `unpin` was called as often; it need not be cached yet.

        The pin is on the number: it does not hinder `forget`, and is not undone with a transaction.
        """
        self._pins[block] = self._pins.get(block, 0) + 1
        self._idle.pop(block, None)

    def unpin(self, block: int) -> None:
        """Take back one `pin`. RuntimeError if there is none."""
        pins = self._pins.get(block, 0)
        if not pins:
            raise RuntimeError(f"block {block} is not pinned")
        if pins > 1:
            self._pins[block] = pins - 1
            return
        del self._pins[block]
        found = self._blocks.get(block)
        if found is not None:
            self._sort_in(found)

    # -- reading ---------------------------------------------------------------------------------

    async def load(self, fn: Callable[[], T]) -> T:
        """What `fn` returns, called inside a transaction, as often as it takes until no block is missing.

        After a BlockMiss what `fn` changed is undone and all missing blocks are read in one batch; they
        stay pinned until `fn` has returned. Raises what `fn` raises, CorruptionError for a block past the
        device's end, and the device's errors.
        """
        pinned: list[int] = []
        try:
            while True:
                self._check_outside("loading")
                try:
                    with _Transaction(self):
                        return fn()
                except BlockMiss as miss:
                    missing = miss.blocks
                if all(block in self._blocks for block in missing):
                    raise RuntimeError(
                        f"blocks {missing} are cached, and were missed: were they forgotten just before?"
                    )
                for block in missing:
                    self.pin(block)
                    pinned.append(block)
                await self.read(missing)
        finally:
            for block in pinned:
                self.unpin(block)

    async def read(self, blocks: Iterable[int]) -> None:
        """Bring `blocks` into the cache, adjacent ones in one bio, all at once; on return all are there.

        What another task is reading already is waited for. Raises CorruptionError for a block past the
        device's end, and the device's errors; RuntimeError inside a transaction.
        """
        self._check_outside("reading")
        wanted = sorted(set(blocks))
        for block in wanted:
            self.pin(block)  # Else what came first might be reclaimed before the last is here.
        try:
            # Again if somebody has forgotten a block meanwhile, or has failed at reading it along with others.
            while missing := [block for block in wanted if block not in self._blocks]:
                own = self._start_reading([block for block in missing if block not in self._reading])
                others = {id(reading): reading for block in missing if (reading := self._reading.get(block))}
                events = [_ended(reading) for reading in (*own, *others.values())]
                await all_back(events)
                for reading in own:
                    if reading.error is not None and any(block not in self._blocks for block in reading.numbers):
                        raise reading.error
        finally:
            for block in wanted:
                self.unpin(block)

    # -- writing back ----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All dirty blocks as they are now; they are clean from here on, and stay cached until the commit has ended.

        It must end, by `committed` or `commit_failed`. What was held back goes with it: what is
        held back from here on is for the next one. RuntimeError inside a transaction, or while another
        commit runs; MemoryError, with nothing changed.
        """
        self._check_outside("a snapshot")
        if self._commit is not None:
            raise RuntimeError("a commit is running already")
        dirty = [self._dirty[number] for number in sorted(self._dirty)]
        # (phase, block, whether as the device has to see it before the last phase)
        shown = [(block.tag, block, False) for block in dirty if not _is_twice(block)]
        shown += [(phase, block, phase != LATE) for block in dirty if _is_twice(block) for phase in (block.tag, LATE)]
        shown.sort(key=lambda image: (image[0], image[1].number))
        step = self._slabs.slot_bytes
        memory = private_buffer(len(shown) * step, self.device.limits.memory_align)
        phases: list[list[tuple[int, memoryview]]] = [[], [], [], []]
        for place, (phase, block, as_before) in enumerate(shown):
            image = memory[place * step : place * step + self.block_bytes]
            image[:] = block.view
            if as_before:
                for offset, kept in block.held:
                    image[offset : offset + len(kept)] = kept
            phases[phase].append((block.number, image))
        self._commit = Snapshot(phases, [(block, block.tag, block.held) for block in dirty])
        for block in dirty:
            block.tag = _CLEAN
            block.held = ()
            block.in_commit = True
            self._sort_in(block)
        return self._commit

    async def write_images(self, images: Sequence[tuple[int, memoryview]]) -> None:
        """Write each (block, image) to the device, adjacent ones in one bio, all in flight at once.

        In any order: what must come first is flushed before by the caller. Raises the first error, in
        order of completion, when all have come back (F06); ValueError for an image of another size or a
        block that is there twice.
        """
        failed: list[Exception] = []

        def ended(transfer: Transfer) -> None:
            if transfer.error is not None:
                failed.append(transfer.error)

        transfers = []
        for first, run in self._runs(images):
            transfers.append(Transfer(self.device, WRITE, self._addr(first), run, name=self.name, finish=ended))
        for transfer in transfers:
            transfer.start()
        await all_back([transfer.ended for transfer in transfers])
        if failed:
            raise failed[0]

    def committed(self, snapshot: Snapshot) -> None:
        """Note that all of `snapshot` is on the device for good. RuntimeError unless it is the running commit."""
        self._end_commit(snapshot)
        for block, _, _ in snapshot._taken:
            block.in_commit = False
            if self._blocks.get(block.number) is block:
                self._sort_in(block)
        self._tidy(0)

    def commit_failed(self, snapshot: Snapshot) -> None:
        """Make all of `snapshot` dirty again, with its tags and what it held back.

        Any part of it may or may not be on the device. Where it held bytes back, those stay, not what
        was held back since. What was forgotten since is left alone. RuntimeError as for `committed`.
        """
        self._end_commit(snapshot)
        for block, tag, held in snapshot._taken:
            block.in_commit = False
            if self._blocks.get(block.number) is not block:
                continue
            for offset, kept in block.held:
                held = _with_gaps_filled(held, offset, kept)
            block.held = held
            block.tag = min(tag, block.tag)
            self._sort_in(block)
        self._tidy(0)

    # -- transactions, inside --------------------------------------------------------------------

    def _changing(self, tag: int) -> _Transaction:
        if self._transaction is None:
            raise RuntimeError("metadata is changed inside a transaction only")
        if not FRESH <= tag <= LATE:
            raise ValueError(f"{tag} is no phase of a commit")
        if not self._writable:
            raise ReadOnlyError("the volume is open for reading only", path=self.name)
        return self._transaction

    def _check_outside(self, doing: str) -> None:
        if self._transaction is not None:
            raise RuntimeError(f"{doing} inside a transaction")

    def _remember(self, transaction: _Transaction, block: _Block) -> None:
        """Keep how `block` is, unless the transaction has touched it already."""
        if block.number not in transaction.before:
            transaction.before[block.number] = _Before(block, bytes(block.view), block.tag, block.held)

    def _forget(self, block: _Block) -> None:
        self._remove(block)
        transaction = self._transaction
        if transaction is None:
            self._retired.append(block.slot)
            return
        before = transaction.before.setdefault(block.number, _Before(block, None, block.tag, block.held))
        if before.block is not block:  # It came and went within the transaction.
            self._retired.append(block.slot)

    def _keep(self, transaction: _Transaction, outer: _Transaction | None) -> None:
        """Let the changes of `transaction` stand, as part of `outer` if there is one."""
        if outer is not None:
            outer.undo.extend(transaction.undo)
        for number, before in transaction.before.items():
            if outer is not None and outer.before.setdefault(number, before).block is before.block:
                continue
            if before.block is not None and self._blocks.get(number) is not before.block:
                self._retired.append(before.block.slot)

    def _roll_back(self, transaction: _Transaction) -> None:
        for number, before in transaction.before.items():
            block = self._blocks.get(number)
            if block is not None and block is not before.block:
                self._remove(block)
                self._retired.append(block.slot)
            block = before.block
            if block is not None:
                if before.content is not None:
                    block.memory[:] = before.content
                block.tag = before.tag
                block.held = before.held
                self._blocks[number] = block
                self._sort_in(block)
        failed: BaseException | None = None
        for call in reversed(transaction.undo):
            try:
                call()
            except BaseException as error:  # The others must run all the same.
                failed = failed or error
        if failed is not None:
            raise failed

    # -- where blocks are ------------------------------------------------------------------------

    def _sort_in(self, block: _Block) -> None:
        """Put a cached block among the dirty and the idle ones, or take it away there, as it is now."""
        number = block.number
        if block.tag == _CLEAN:
            self._dirty.pop(number, None)
            if not block.in_commit and number not in self._pins:
                self._idle[number] = block
                return
        else:
            self._dirty[number] = block
        self._idle.pop(number, None)

    def _remove(self, block: _Block) -> None:
        del self._blocks[block.number]
        self._dirty.pop(block.number, None)
        self._idle.pop(block.number, None)

    def _tidy(self, wanted: int) -> None:
        """Reclaim what is over the limit once `wanted` blocks more are here. Only where views end."""
        for slot in self._retired:
            self._slabs.give(slot)
        self._retired.clear()
        over = self.used_bytes + wanted * self._slabs.slot_bytes - self.limit_bytes
        while over > 0 and self._idle:
            block = next(iter(self._idle.values()))
            self._remove(block)
            self._slabs.give(block.slot)
            over -= self._slabs.slot_bytes

    def _end_commit(self, snapshot: Snapshot) -> None:
        self._check_outside("ending a commit")
        if snapshot is not self._commit:
            raise RuntimeError("this snapshot is not the one whose commit is running")
        self._commit = None

    def _addr(self, block: int) -> int:
        return self._first_addr + block * self.block_bytes

    # -- reading, inside -------------------------------------------------------------------------

    def _start_reading(self, blocks: list[int]) -> list[_Reading]:
        """Begin to read `blocks`, which are sorted, and neither cached nor being read."""
        if not blocks:
            return []
        size = self.device.size_bytes
        for block in (blocks[0], blocks[-1]):
            if block < 0 or self._addr(block) + self.block_bytes > size:
                raise self._past_end(block)
        self._tidy(len(blocks))
        limits = self.device.limits
        most = max(1, min(limits.max_bio_bytes // self.block_bytes, limits.max_segments))
        started: list[_Reading] = []
        first = 0
        for place in range(1, len(blocks) + 1):
            if place == len(blocks) or blocks[place] != blocks[place - 1] + 1 or place - first == most:
                started.append(self._make_reading(blocks[first], place - first))
                first = place
        for reading in started:
            for number in reading.numbers:
                self._reading[number] = reading
        for reading in started:
            _transfer(reading).start()
        return started

    def _make_reading(self, first: int, count: int) -> _Reading:
        slots = [self._slabs.take() for _ in range(count)]
        addr = self._addr(first)
        length = count * self.block_bytes
        unit = self.device.limits.read_align
        if addr % unit or self.block_bytes % unit:
            # The device's blocks are larger: read those around, and copy out of them.
            start = align_down(addr, unit)
            bounce = private_buffer(align_up(addr + length, unit) - start, self.device.limits.memory_align)
            reading = _Reading(first, slots, addr - start, bounce)
            segments = [bounce]
        else:
            start = addr
            reading = _Reading(first, slots, 0, None)
            segments = [slot.memory[: self.block_bytes] for slot in slots]

        def landed(transfer: Transfer) -> None:
            self._landed(reading, transfer)

        reading.transfer = Transfer(self.device, READ, start, segments, name=self.name, finish=landed)
        return reading

    def _landed(self, reading: _Reading, transfer: Transfer) -> None:
        """Take in what was read, but for blocks that were created or forgotten meanwhile."""
        size = self.block_bytes
        whole = max(0, transfer.moved - reading.lead) // size
        for place, (number, slot) in enumerate(zip(reading.numbers, reading.slots, strict=True)):
            wanted = self._reading.get(number) is reading
            if wanted:
                del self._reading[number]
            if not wanted or place >= whole:
                self._slabs.give(slot)
                continue
            block = _Block(number, slot, size)
            if reading.bounce is not None:
                start = reading.lead + place * size
                block.memory[:] = reading.bounce[start : start + size]
            self._blocks[number] = block
            self._sort_in(block)
        reading.error = transfer.error
        if whole < len(reading.slots) and reading.error is None:
            reading.error = self._past_end(reading.first + whole)

    def _past_end(self, block: int) -> CorruptionError:
        addr, size = self._addr(block), self.device.size_bytes
        return Place(self.name, f"metadata block {block}", addr).corrupt(
            f"the device's end at byte {size}", f"{self.block_bytes} bytes on the device"
        )

    def _runs(self, images: Sequence[tuple[int, memoryview]]) -> list[tuple[int, list[memoryview]]]:
        """(first block, images) of each run of adjacent blocks."""
        runs: list[tuple[int, list[memoryview]]] = []
        following = 0
        for number, image in sorted(images, key=lambda pair: pair[0]):
            if len(image) != self.block_bytes:
                raise ValueError(f"an image of {len(image)} bytes for block {number} of {self.block_bytes}")
            if number < following:
                raise ValueError(f"block {number} is negative or to be written twice at once")
            if runs and number == following:
                runs[-1][1].append(image)
            else:
                runs.append((number, [image]))
            following = number + 1
        return runs


def _is_twice(block: _Block) -> bool:
    """Whether a dirty block is written in its own phase with what is held back, and again in the last."""
    return bool(block.held) and block.tag != LATE


def _transfer(reading: _Reading) -> Transfer:
    if reading.transfer is None:
        raise RuntimeError("the reading was not made ready")
    return reading.transfer


def _ended(reading: _Reading) -> Event:
    return _transfer(reading).ended


def _with_gaps_filled(held: _Held, offset: int, content: bytes | memoryview) -> _Held:
    """`held`, and of `content`, which lies at `offset`, what `held` does not cover."""
    added: list[tuple[int, bytes]] = []
    at, end = offset, offset + len(content)
    for start, kept in held:
        if start >= end:
            break
        if at < start:
            added.append((at, bytes(content[at - offset : start - offset])))
        at = max(at, start + len(kept))
    if at < end:
        added.append((at, bytes(content[at - offset :])))
    return tuple(sorted((*held, *added))) if added else held
