"""Copying: the bytes of one file to another, several chunks at once, so that both devices stay busy.

A worker takes the next chunk, reads it into a private buffer and writes it from there. While one
chunk is read others are written, and the buffers bound what is in flight. For a copy that is to be
verified the digest is taken of the very buffer that was written, which nobody else can touch, so
that what is checked later is what was meant to be written (F21, F22).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import mmap
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from odirect.base.errors import InUseError, NoSpaceError, NotDirectError, ODirectError, UnsupportedError, VerifyError
from odirect.base.units import align_down, align_up
from odirect.block.bio import ZERO
from odirect.block.buffers import BufferPool, empty
from odirect.dio.bounce import Moved
from odirect.dio.outcome import Kind, Outcome, Tally
from odirect.dio.plainfile import PlainFile
from odirect.sched.traps import gather, this_scheduler

T = TypeVar("T")

_DIGEST_BYTES = 16
#: The most that one request zeroes on a device, so that the copy can be interrupted in between.
_MOST_ZEROED = 64 << 20


class Chunk(NamedTuple):
    """A run of the file that is moved at once. `hole`: it reads as zeroes, and need not be read."""

    offset: int
    length: int
    hole: bool = False

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


def chunks_of(runs: Iterable[Chunk], chunk_bytes: int) -> Iterator[Chunk]:
    """The runs cut at multiples of `chunk_bytes`; holes at multiples of a larger size."""
    for run in runs:
        most = max(chunk_bytes, align_down(_MOST_ZEROED, chunk_bytes)) if run.hole else chunk_bytes
        start = run.offset
        while start < run.end:
            stop = min(run.end, align_down(start, most) + most)
            yield Chunk(start, stop - start, run.hole)
            start = stop


def settled(runs: Iterable[tuple[int, int]], size: int, unit: int) -> Iterator[Chunk]:
    """All of [0, size) as data and holes in turn, from the data's (start, end), lowest first.

    The edges of the data are moved outwards to multiples of `unit`, so that nothing is written in
    parts of blocks.
    """
    done = 0
    data_start = data_end = 0
    for start, end in runs:
        start, end = align_down(start, unit), min(size, align_up(end, unit))
        if start <= data_end and data_end > data_start:
            data_end = max(data_end, end)
            continue
        yield from _around(done, data_start, data_end)
        done = max(done, data_end)
        data_start, data_end = start, end
    yield from _around(done, data_start, data_end)
    done = max(done, data_end)
    if done < size:
        yield Chunk(done, size - done, True)


def _around(done: int, start: int, end: int) -> Iterator[Chunk]:
    """The hole before a run of data, and the run."""
    if end > start:
        if start > done:
            yield Chunk(done, start - done, True)
        yield Chunk(start, end - start)


@dataclasses.dataclass(slots=True)
class Counts:
    """How the requests went: operations and bytes for each outcome."""

    _of: dict[Outcome, list[int]] = dataclasses.field(default_factory=dict)

    def add(self, moved: Moved) -> None:
        """Count one finished request."""
        tally = self._of.setdefault(moved.outcome, [0, 0])
        tally[0] += 1
        tally[1] += moved.transferred

    def totals(self) -> dict[Outcome, Tally]:
        """As the caller gets them."""
        return {outcome: Tally(*tally) for outcome, tally in self._of.items()}


class Digests:
    """A digest for each chunk, by its number; the last chunk's length may differ."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def keep(self, number: int, view: memoryview) -> None:
        """Remember what chunk `number` holds."""
        end = (number + 1) * _DIGEST_BYTES
        if len(self._kept) < end:
            self._kept.extend(bytes(end - len(self._kept)))
        self._kept[end - _DIGEST_BYTES : end] = _digest(view)

    def matches(self, number: int, view: memoryview) -> bool:
        """Whether this is what chunk `number` held."""
        return self._kept[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES] == _digest(view)


def _digest(view: memoryview) -> bytes:
    # A collision-proof digest, where the processor has instructions for it as fast as a checksum.
    return hashlib.sha256(view).digest()[:_DIGEST_BYTES]


class Mover:
    """What the workers of one copy share: buffers, and what has become of the chunks.

    pool: its buffers are at least as long as a chunk. depth: chunks under way at once. strict:
    nothing may go through the page cache but parts of blocks (NotDirectError). on_bytes is called
    with each number of bytes that is done.
    """

    def __init__(
        self,
        pool: BufferPool,
        *,
        depth: int,
        strict: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.pool = pool
        self.depth = depth
        self.reads = Counts()
        self.writes = Counts()
        self.copied = 0
        self.skipped = 0
        self._strict = strict
        self._on_bytes = on_bytes
        self._zeroes = True  # until the target refuses it

    # The two passes of a copy.

    async def copy(
        self, source: PlainFile, target: PlainFile, chunks: Iterable[Chunk], *, digests: Digests | None, zero: bool
    ) -> None:
        """Write every chunk of `source` to the same place of `target`.

        Holes are left alone, or with `zero` made to read as zeroes. Raises InUseError if the
        source ends early, and the errors of reading and writing, the first that there was.
        """

        async def one(turn: tuple[int, Chunk]) -> None:
            number, chunk = turn
            if chunk.hole:
                if zero:
                    await self._zero(target, chunk)
                self.skipped += chunk.length
            else:
                with await self.pool.take() as lease:
                    await self.fill(source, chunk, lease.view)
                    view = lease.view[: chunk.length]
                    if digests is not None:
                        digests.keep(number, view)
                    await self.write(target, chunk.offset, view)
                self.copied += chunk.length
            self.done(chunk.length)

        await in_turn(one, enumerate(chunks), self.depth)

    async def check(
        self,
        source: PlainFile | None,
        target: PlainFile,
        chunks: Iterable[Chunk],
        digests: Digests,
        *,
        is_hole: Callable[[Chunk], bool],
    ) -> None:
        """Read every chunk of `target` back, and compare with what was written; holes must be zeroes.

        is_hole: whether a hole is one in the target, too, so that there is nothing to read.
        Raises VerifyError, which names the first byte that differs if `source` is there to tell, else
        the first chunk. (Chunks are begun in order, so whatever lies before it has been compared too.)
        """
        wrong: list[Chunk] = []
        zeroes = _Zeroes()

        async def one(turn: tuple[int, Chunk]) -> None:
            number, chunk = turn
            if wrong:
                return
            if chunk.hole and is_hole(chunk):
                self.done(chunk.length)
                return
            for part in chunks_of([chunk._replace(hole=False)], self.pool.chunk_bytes):
                with await self.pool.take() as lease:
                    await self.fill(target, part, lease.view)
                    view = lease.view[: part.length]
                    good = zeroes.match(view) if chunk.hole else digests.matches(number, view)
                if not good:
                    wrong.append(part._replace(hole=chunk.hole))
                    return
            self.done(chunk.length)

        await in_turn(one, enumerate(chunks), self.depth)
        if wrong:
            raise await self._difference(source, target, min(wrong))

    # One chunk.

    async def fill(self, file: PlainFile, chunk: Chunk, view: memoryview) -> None:
        """Read all of `chunk` to the start of `view`, which is as long as its last block demands.

        What a file has in its last block is read apart, so that it alone counts as bounced.
        """
        unit = file.state.limits.read_align
        body = align_down(chunk.length, unit)
        if body < chunk.length and chunk.offset + body + unit <= file.size_bytes:
            body += unit  # The block is whole; only the chunk ends within it.
        for start, stop in ((0, body), (body, chunk.length)):
            if start >= stop:
                continue
            asked = min(len(view), align_up(stop, unit)) - start
            with _named(file):
                moved = await file.read(chunk.offset + start, [view[start : start + asked]], asked)
            self._check_strict(moved, file)
            wanted = min(stop, chunk.length) - start
            self.reads.add(moved._replace(transferred=min(moved.transferred, wanted)))
            if moved.transferred < wanted:
                raise shrank(file, chunk.offset + start + moved.transferred, chunk.end)

    async def write(self, file: PlainFile, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`; a part of a page at its end apart, after the rest.

        The page cache merges that part, so that nothing else of its page may be under way meanwhile.
        """
        body = align_down(len(view), max(file.state.limits.write_align, mmap.PAGESIZE))
        for start, part in ((0, view[:body]), (body, view[body:])):
            if not part:
                continue
            with _named(file):
                moved = await file.write(offset + start, [part], len(part))
            self._check_strict(moved, file)
            self.writes.add(moved)
            if moved.transferred < len(part):
                raise NoSpaceError(
                    f"writing {len(part)} bytes at {offset + start}: it ends at {offset + start + moved.transferred}",
                    path=file.state.path,
                )

    async def _zero(self, target: PlainFile, chunk: Chunk) -> None:
        """Make a range of a device read as zeroes, by its own command or by writing them (never old contents)."""
        unit = target.state.limits.logical_block
        if self._zeroes and not chunk.offset % unit and not chunk.length % unit:
            try:
                with _named(target):
                    await target.change_range(ZERO, chunk.offset, chunk.length)
                return
            except UnsupportedError:
                self._zeroes = False
            except ODirectError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._zeroes = False
        for part in chunks_of([chunk._replace(hole=False)], self.pool.chunk_bytes):
            with await self.pool.take() as lease:
                view = lease.view[: part.length]
                view[:] = bytes(part.length)
                await self.write(target, part.offset, view)

    async def _difference(self, source: PlainFile | None, target: PlainFile, chunk: Chunk) -> VerifyError:
        """The error for a chunk that is not what was written, with the byte, where that can be told."""
        path = target.state.path
        place = f"in the {chunk.length} bytes at {chunk.offset}"
        if source is not None or chunk.hole:
            found, wanted = empty(self.pool.chunk_bytes), empty(self.pool.chunk_bytes)
            await self.fill(target, chunk, found)
            if not chunk.hole and source is not None:
                await self.fill(source, chunk, wanted)
            at = _first_difference(found, wanted, chunk.length)
            if at is not None:
                place = f"first at byte {chunk.offset + at}: {found[at]:#04x} instead of {wanted[at]:#04x}"
        return VerifyError(f"what was read back is not what was written, {place}", path=path)

    def _check_strict(self, moved: Moved, file: PlainFile) -> None:
        if self._strict and moved.outcome.kind is Kind.BUFFERED:
            raise NotDirectError(
                f"it cannot be copied direct: {moved.outcome.reason.value}; leave strict out to allow the page cache",
                path=file.state.path,
            )

    def done(self, count: int) -> None:
        """Tell whoever watches that so many more bytes are done."""
        if self._on_bytes is not None:
            self._on_bytes(count)


def shrank(file: PlainFile, found: int, expected: int) -> InUseError:
    """The error for a source that ended early."""
    return InUseError(
        f"it became shorter while it was being copied: it ended at byte {found}, and {expected} or more were expected",
        path=file.state.path,
    )


async def in_turn(work: Callable[[T], Coroutine[Any, Any, None]], turns: Iterable[T], workers: int) -> None:
    """Do `work` for each of `turns`, `workers` at once; after the first error no more is begun.

    Raises that first error, in order of time, when everything that was begun has ended (F24).
    """
    left = iter(turns)
    failed: BaseException | None = None

    async def worker() -> None:
        nonlocal failed
        for turn in left:
            if failed is not None:
                return
            try:
                await work(turn)
            except BaseException as error:
                failed = failed or error
                raise

    scheduler = await this_scheduler()
    try:
        await gather(*[scheduler.spawn(worker()) for _ in range(workers)])
    except BaseException as error:
        raise failed or error from None


class _Zeroes:
    """Whether memory holds zeroes only, at the speed of a comparison."""

    def __init__(self) -> None:
        self._zeroes = b""

    def match(self, view: memoryview) -> bool:
        if len(self._zeroes) < len(view):
            self._zeroes = bytes(len(view))
        return view.tobytes() == self._zeroes[: len(view)]


def _first_difference(found: memoryview, wanted: memoryview, length: int) -> int | None:
    """The first byte below `length` where they differ: by halves, since comparing bytes objects is quick."""
    low, high = 0, length
    if found[:length].tobytes() == wanted[:length].tobytes():
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if found[low:middle].tobytes() == wanted[low:middle].tobytes():
            low = middle
        else:
            high = middle
    return low


class _named:
    """Puts the file's name into an error that has none."""

    __slots__ = ("_file",)

    def __init__(self, file: PlainFile) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ODirectError) and error.filename is None:
            error.filename = self._file.state.path
