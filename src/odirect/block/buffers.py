"""Memory that direct I/O can use: aligned, not shared with a forked child, lent from a pool.

Anything with the buffer protocol can be given to odirect; memory from here can always go direct.
"""

from __future__ import annotations

import array
import collections
import errno
import mmap
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from odirect.base.errors import from_errno
from odirect.base.units import align_up
from odirect.ring._calls import copy_guarded, span
from odirect.sched.traps import wait

if TYPE_CHECKING:
    from odirect.ring.contract import Ring
    from odirect.sched.scheduler import Task

_HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it
# A forked child gets zeroes, not a copy: the device's pages stay the parent's. Left out of the child
# altogether (MADV_DONTFORK), the range could be mapped there by somebody else, and be unmapped under
# him when the child collects our inherited object.
_MADV_WIPEONFORK = 18
# Exporters whose memory cannot vanish under a plain copy; a mapping of a file can (F23).
_OWN_MEMORY = (bytes, bytearray, array.array)


class _AnonymousMemory(mmap.mmap):
    """Memory of ours; its type tells copies that it cannot be cut short from outside."""


def empty(length: int, *, huge: bool | None = None) -> memoryview:
    """`length` bytes of page-aligned, writable, zeroed memory, as a memoryview of bytes.

    The memory is anonymous and really there (where the kernel can: some file systems serve reads into
    memory that nobody has touched from their cache), reads as zeroes in a forked child (F24), and is
    freed with the last view of it. huge: ask for huge pages, which the kernel pins in a fraction of the
    time (default: from 2 MiB on, where not much of a page is wasted). Use `numpy.frombuffer` for an
    array over it. Raises ValueError for a negative length, MemoryError when there is none.
    """
    if length < 0:
        raise ValueError(f"a buffer cannot have {length} bytes")
    if huge is None:
        huge = length >= _HUGE_PAGE
    unit = _HUGE_PAGE if huge and length else mmap.PAGESIZE
    try:
        area = _AnonymousMemory(-1, max(unit, align_up(length, unit)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for a buffer of {length} bytes: {error}") from error
    area.madvise(_MADV_WIPEONFORK)
    if unit == _HUGE_PAGE:
        area.madvise(mmap.MADV_HUGEPAGE)
    try:
        area.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"no memory for a buffer of {length} bytes") from error
    return memoryview(area)[:length]


def as_bytes_view(buffer: object, *, writable: bool) -> memoryview:
    """`buffer` as a flat memoryview of bytes, without a copy.

    Raises TypeError if it has no buffer, ValueError if it is not contiguous, or read-only where
    the transfer writes to it.
    """
    view = buffer if type(buffer) is memoryview else memoryview(buffer)  # type: ignore[arg-type]
    if writable and view.readonly:
        raise ValueError("the buffer is read-only, and this would write to it")
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    if not view.c_contiguous:
        raise ValueError("the buffer is not contiguous; direct I/O needs one run of memory (C order)")
    if view.nbytes == 0:
        return memoryview(bytearray() if writable else b"")
    return view.cast("B")


def slice_segments(segments: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """The runs of memory that hold bytes [start, start+length) of the segments laid end to end."""
    if len(segments) == 1:
        return [segments[0][start : start + length]] if length else []
    taken: list[memoryview] = []
    for segment in segments:
        if length <= 0:
            break
        size = len(segment)
        if start >= size:
            start -= size
            continue
        part = segment[start : start + length]
        taken.append(part)
        length -= len(part)
        start = 0
    return taken


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy `source` to `target`, of the same length.

    Memory that is a mapping of a file may have no page behind it any more; touching it would kill
    the process, so it is copied by the kernel, which says BadBufferError instead (F23).
    """
    if _is_safe(source) and _is_safe(target):
        target[:] = source
        return
    done = copy_guarded(target, source)
    if done < 0:
        raise from_errno(-done, f"copying {len(source)} bytes between the caller's memory and a private buffer")


def gather_bytes(target: memoryview, segments: Sequence[memoryview]) -> None:
    """Copy the segments, end to end, to the start of `target`."""
    at = 0
    for segment in segments:
        copy_bytes(target[at : at + len(segment)], segment)
        at += len(segment)


def scatter_bytes(segments: Sequence[memoryview], source: memoryview) -> None:
    """Copy the start of `source` over the segments, end to end."""
    at = 0
    for segment in segments:
        copy_bytes(segment, source[at : at + len(segment)])
        at += len(segment)


def segments_aligned(segments: Sequence[memoryview], memory_align: int, length_align: int) -> bool:
    """Whether every segment's address is a multiple of one, and its length of the other."""
    for segment in segments:
        address, length = span(segment, False)
        if address % memory_align or length % length_align:
            return False
    return True


def _is_safe(view: memoryview) -> bool:
    owner = view.obj
    if isinstance(owner, _OWN_MEMORY):
        return True
    return isinstance(owner, _AnonymousMemory)


class Lease:
    """A buffer lent by a pool, until `release`. A context manager."""

    __slots__ = ("_pool", "view")

    def __init__(self, pool: BufferPool, view: memoryview) -> None:
        self._pool: BufferPool | None = pool
        self.view = view

    def release(self) -> None:
        """Give it back. No I/O on it may be in flight. RuntimeError the second time."""
        pool, self._pool = self._pool, None
        if pool is None:
            raise RuntimeError("the buffer has been given back already")
        pool._put(self.view)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class BufferPool:
    """Aligned buffers of one size, made as they are needed up to a number, lent in turn.

    A task that finds none waits, in order of arrival. One request holds at most one buffer while
    it waits for I/O, never while it waits for another buffer, so that lending cannot deadlock.
    """

    def __init__(self, chunk_bytes: int, chunks: int, *, ring: Ring | None = None) -> None:
        if chunk_bytes <= 0 or chunk_bytes % mmap.PAGESIZE or chunks <= 0:
            raise ValueError(f"a pool of {chunks} buffers of {chunk_bytes} bytes: whole pages and at least one")
        self.chunk_bytes = chunk_bytes
        self.chunks = chunks
        self._ring = ring
        self._free: list[memoryview] = []
        self._made = 0
        self._line: collections.deque[Task[object]] = collections.deque()

    @property
    def lent(self) -> int:
        """How many buffers are out."""
        return self._made - len(self._free)

    async def take(self) -> Lease:
        """A buffer of `chunk_bytes`; waits until there is one."""
        lease = self.try_take()
        if lease is not None:
            return lease
        view = await wait(self)
        if not isinstance(view, memoryview):
            raise TypeError(f"the pool was handed {view!r}")
        return Lease(self, view)

    def try_take(self) -> Lease | None:
        """A buffer of `chunk_bytes`, or None if all are lent."""
        if not self._free and self._made < self.chunks:
            self._make()
        return Lease(self, self._free.pop()) if self._free else None

    def add_waiter(self, task: Task[object]) -> None:
        """See `sched.traps.Waitable`."""
        self._line.append(task)

    def discard_waiter(self, task: Task[object]) -> None:
        """See `sched.traps.Waitable`."""
        if task in self._line:
            self._line.remove(task)

    def _make(self) -> None:
        """More buffers: as many as fit a huge page, or one."""
        number = min(self.chunks - self._made, max(1, _HUGE_PAGE // self.chunk_bytes))
        slab = empty(number * self.chunk_bytes)
        if self._ring is not None:
            self._ring.add_buffer(slab)
        size = self.chunk_bytes
        self._free.extend(slab[at : at + size] for at in range(0, number * size, size))
        self._made += number

    def _put(self, view: memoryview) -> None:
        if self._line:
            self._line.popleft().make_ready(view)
        else:
            self._free.append(view)
