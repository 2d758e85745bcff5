"""The ring on plain system calls: the same contract where io_uring is missing or forbidden.

With workers, `commit` hands operations to a pool of threads, each of which makes one system call at
a time. With `workers=0` nothing runs beside the caller: what is queued is done in order, in the
thread that calls `commit` or `reap`; that is for synchronous callers, who would only wait anyway.

A signal's handler may raise between any two calls in here. So an operation is taken off its queue
only when its answer is on the list of answers, and that list is emptied in one step which no
handler can come into.
"""

from __future__ import annotations

import array
import collections
import errno
import os
import select
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from odirect.base.errors import ClosedError
from odirect.ring import _calls
from odirect.ring.contract import DATA_ONLY, DISCARD, FSYNC, READ, WRITE, ZERO, RingFeatures
from odirect.sched.clock import MonotonicClock

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ZERO_RANGE = 16
_LONGEST = 0x7FFF_F000  # what the kernel moves at most in one call

_FEATURES = RingFeatures(single_issuer=False, defer_taskrun=False, fixed_files=False, fixed_buffers=False, iopoll=False)


class _Operation:
    __slots__ = ("flags", "handle", "length", "offset", "op", "segments", "tag")

    def __init__(
        self, op: int, handle: int, segments: list[memoryview], offset: int, length: int, flags: int, tag: object
    ) -> None:
        self.op = op
        self.handle = handle
        self.segments = segments
        self.offset = offset
        self.length = length
        self.flags = flags
        self.tag = tag

    def execute(self) -> int:
        """The kernel's answer: a count or a negative errno."""
        if self.handle < 0:
            return -errno.EBADF  # os.fsync has a ValueError for it
        if self.offset < 0:
            return -errno.EINVAL  # preadv2(2) would take -1 for "the current position"
        try:
            if self.op == READ:
                return os.preadv(self.handle, self.segments, self.offset, self.flags)
            if self.op == WRITE:
                return os.pwritev(self.handle, self.segments, self.offset, self.flags)
            if self.op == FSYNC:
                (os.fdatasync if self.flags & DATA_ONLY else os.fsync)(self.handle)
                return 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        except MemoryError:
            return -errno.ENOMEM
        mode = _KEEP_SIZE | (_PUNCH_HOLE if self.op == DISCARD else _ZERO_RANGE)
        return _calls.fallocate(self.handle, mode, self.offset, self.length)


class _State:
    """What the workers share with the ring. They hold this and not the ring, so that the ring can be collected."""

    # For `__del__`, if a signal's handler raises before `__init__` has begun.
    event_fd = -1

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: collections.deque[_Operation] = collections.deque()
        self.answers: list[tuple[object, int]] = []
        self.running = 0

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the eventfd."""
        if self.event_fd >= 0:
            os.close(self.event_fd)
            self.event_fd = -1

    def answered(self) -> None:
        """Make the eventfd readable, after something was put on `answers`."""
        if self.event_fd >= 0:
            os.eventfd_write(self.event_fd, 1)

    def reset(self) -> None:
        """Make the eventfd unreadable; the answers must be taken after this, not before."""
        if self.event_fd >= 0:
            try:
                os.eventfd_read(self.event_fd)
            except BlockingIOError:
                pass

    def work(self) -> None:
        """Do operations until none waits. Runs in a worker."""
        while True:
            with self.lock:
                if not self.waiting:
                    self.running -= 1
                    return
                operation = self.waiting.popleft()
            self.answers.append((operation.tag, operation.execute()))
            # The worker may go on to a long operation: it must not keep these buffers alive.
            del operation
            self.answered()


class ThreadRing:
    """A `Ring` (see ring/contract.py) on preadv2(2) and pwritev2(2).

    `workers` threads are started when first needed and end when the ring is closed or collected; 0
    means that operations are done in the thread that calls `commit` or `reap`. `shared` is as in the
    contract. Raises ValueError for a depth below 1 or a negative number of workers.
    """

    def __init__(self, depth: int = 128, *, workers: int = 4, shared: bool = False) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        if workers < 0:
            raise ValueError(f"workers must not be negative, it is {workers}")
        self._depth = depth
        self._workers = min(workers, depth)
        self._shared = shared
        self._owner = threading.get_ident()
        self._generation = _calls.fork_generation()
        self._state = _State()
        self._queued: collections.deque[_Operation] = collections.deque()
        self._taken = 0  # answers returned
        self._given = 0  # operations queued
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._left = threading.Event()  # set by the last to leave `reap` of a ring that is being closed
        self._batching = False
        self._reaping = 0  # the thread that is inside reap or transfer_batch
        self._waiting = False
        self._woken = False
        if self._workers or shared:
            # Only a private ring without workers never waits for somebody else.
            self._state.event_fd = _new_eventfd()

    @property
    def kind(self) -> str:
        """ "threads"."""
        return "threads"

    @property
    def depth(self) -> int:
        """As it was asked for; what the kernel is given at once is bounded by the number of workers too."""
        return self._depth

    @property
    def features(self) -> RingFeatures:
        """Nothing of io_uring."""
        return _FEATURES

    @property
    def in_flight(self) -> int:
        """Operations queued or submitted whose tag `reap` has not yet returned."""
        return self._given - self._taken

    @property
    def interruptible(self) -> bool:
        """Whether this thread waits inside `reap`, where an exception of a signal's handler loses nothing.

        Not while it hands operations to the pool, whose locks are written in Python: one may stay locked.
        """
        return self._waiting and self._reaping == threading.get_ident()

    def add_file(self, fd: int) -> int:
        """`fd` itself."""
        self._check()
        return fd

    def remove_file(self, handle: int) -> None:
        """Nothing: there is nothing to give back."""
        self._check()

    def add_buffer(self, buffer: object) -> bool:
        """False: there is nothing to register with. Raises ValueError if `buffer` is read-only or not contiguous."""
        self._check()
        _calls.span(buffer, True)
        return False

    def queue(
        self, op: int, handle: int, segments: Sequence[object], offset: int, length: int, flags: int, tag: object
    ) -> None:
        """Queue one operation; never blocks. The buffers and the tag are kept until it is reaped.

        Raises ValueError for an unknown `op`, a buffer that is read-only or not contiguous, and for
        segments that do not add up to `length`; TypeError for a segment that is no buffer.
        """
        self._check()
        views: list[memoryview] = []
        if op in (READ, WRITE):
            views = [_bytes_of(segment, writable=op == READ) for segment in segments]
            total = sum(map(len, views))
            if total != length:
                raise ValueError(f"the segments have {total} bytes, the operation {length}")
            if length > _LONGEST:
                views = _cut(views, _LONGEST)
        elif op not in (FSYNC, DISCARD, ZERO):
            raise ValueError(f"{op} is not an operation")
        if not -(1 << 63) <= offset < 1 << 63:
            raise OverflowError(f"offset {offset} does not fit in 64 bits")
        operation = _Operation(op, handle, views, offset, length, flags, tag)
        # Queued and counted without a call in between, so that a handler sees neither or both.
        self._queued += (operation,)
        self._given += 1

    def commit(self) -> None:
        """Start everything queued; with `workers=0`, do it."""
        self._check()
        self._commit()

    def _commit(self) -> None:
        queued = self._queued
        state = self._state
        if not self._workers:
            while queued:
                # Taken in one step, which neither a handler nor another thread can come into.
                operation = queued[0]
                del queued[0]
                try:
                    state.answers += [(operation.tag, operation.execute())]
                except BaseException:
                    queued.appendleft(operation)
                    raise
            if state.answers:
                state.answered()
            return
        if not queued and not state.waiting:
            return
        pool = self._open_pool()
        with state.lock:
            while queued:
                # No call in these two lines: no handler can come in between.
                state.waiting += (queued[0],)
                del queued[0]
            more = min(self._workers - state.running, len(state.waiting))
            for _ in range(more):
                pool.submit(state.work)
                state.running += 1

    def reap(self, timeout_ns: int, into: list[tuple[object, int]] | None = None) -> list[tuple[object, int]]:
        """(tag, result) of finished operations; result is a byte count or a negative errno.

        into: a list that they are added to, and that is returned: then a handler that raises right behind
        this call takes nothing with it. Commits first what is queued. `timeout_ns` 0 looks, -1 waits for
        one; at once if nothing is in flight. Raises what a signal's handler raises, with nothing lost, and
        RuntimeError if another call is inside `reap`.
        """
        self._check()
        out = [] if into is None else into
        if self._reaping:
            raise RuntimeError("another reap of this ring is under way")
        self._reaping = threading.get_ident()
        try:
            self._commit()
            state = self._state
            if not state.answers and self.in_flight and timeout_ns:
                self._waiting = True
                self._wait(timeout_ns)
                self._waiting = False
            state.reset()
            self._woken = False
            answers = state.answers
            count = len(answers)
            # No call from here to the return: no handler can come in between and lose the answers.
            # Workers only ever append.
            out += answers[:count]
            del answers[:count]
            self._taken += count
        except BaseException:
            # A handler's exception: whoever waits on the eventfd must still learn of the answers.
            if self._state.answers:
                self._state.answered()
            raise
        finally:
            self._waiting = False
            self._reaping = 0
            if self._closed:
                self._state.close()
                self._left.set()
        return out

    def _wait(self, timeout_ns: int) -> None:
        """Return when there is an answer, or the time is up."""
        state = self._state
        poll = select.poll()
        poll.register(state.event_fd, select.POLLIN)
        now_ns = MonotonicClock().now_ns
        deadline = now_ns() + timeout_ns
        while not state.answers and not self._woken:
            left_ns = deadline - now_ns()
            if timeout_ns > 0 and left_ns <= 0:
                return
            poll.poll(None if timeout_ns < 0 else -(-left_ns // 1_000_000))
            if self._closed:
                raise ClosedError("the ring was closed while it was waited on")
            if not state.answers:
                state.reset()

    def holds(self, tag: object) -> bool:
        """Whether an operation with this very tag waits to be started, or its answer to be reaped."""
        state = self._state
        operations = (*self._queued, *state.waiting)
        return any(operation.tag is tag for operation in operations) or any(each is tag for each, _ in state.answers)

    def wake(self) -> None:
        """Make the `reap` that is under way in another thread, or else the next one, return soon."""
        self._check()
        self._woken = True
        self._state.answered()

    def wakeup_fd(self) -> int:
        """An eventfd that is readable when there may be something to reap; `reap` resets it. Closed with the ring."""
        self._check()
        if self._state.event_fd < 0:
            self._state.event_fd = _new_eventfd()
            if self._state.answers:
                self._state.answered()
        return self._state.event_fd

    def transfer_batch(
        self,
        op: int,
        handle: int,
        buffer: object,
        stride: int,
        offsets: object,
        length: int,
        flags: int,
        results: object,
        depth: int,
    ) -> int:
        """Do many transfers of one length at once; how many are not whole. As `UringRing.transfer_batch`.

        At most `depth` and at most one per worker are with the kernel at once.
        """
        self._check()
        if self.in_flight or self._reaping:
            raise RuntimeError("a batch needs a ring with nothing else in flight")
        if op not in (READ, WRITE):
            raise ValueError(f"a batch reads or writes; {op} is neither")
        if depth < 1 or not 0 <= length <= _LONGEST or stride < 0:
            raise ValueError(f"depth {depth}, length {length} or stride {stride} is out of range")
        places, answers = _int64s(offsets, False), _int64s(results, True)
        memory = _bytes_of(buffer, writable=op == READ)
        count = len(places)
        if len(answers) != count:
            raise ValueError(f"{count} offsets but {len(answers)} results")
        if not count:
            return 0
        if (count - 1) * stride + length > len(memory):
            raise ValueError(
                f"the buffer's {len(memory)} bytes do not hold {count} elements of {length} bytes, {stride} apart"
            )
        # What a signal keeps from being begun stays like this.
        answers[:] = memoryview(array.array("q", [-errno.ECANCELED]) * count)
        todo = iter(range(count))
        stopped = threading.Event()

        def work() -> None:
            # A range's iterator gives each number to one thread alone.
            for index in todo:
                if stopped.is_set():
                    return
                piece = memory[index * stride : index * stride + length]
                answers[index] = _Operation(op, handle, [piece], places[index], length, flags, None).execute()

        self._reaping = threading.get_ident()
        self._batching = True
        try:
            if self._workers and count > 1:
                self._run(work, min(depth, self._workers, count), stopped)
            else:
                work()
        finally:
            self._reaping = 0
            self._batching = False
        return sum(1 for answer in answers if answer != length)

    def _run(self, work: Callable[[], None], threads: int, stopped: threading.Event) -> None:
        """Run `work` in this many workers, to the end; a signal's exception leaves only after that."""
        from concurrent.futures import wait

        pool = self._open_pool()
        futures: list[Future[None]] = []
        try:
            for _ in range(threads):
                futures.append(pool.submit(work))
            wait(futures)
        except BaseException:
            stopped.set()
            wait(futures)
            raise
        for future in futures:
            future.result()

    def _open_pool(self) -> ThreadPoolExecutor:
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(self._workers, "odirect-ring")
        return self._pool

    def close(self) -> None:
        """Wait for everything in flight (answers are dropped), then end the workers. Twice is harmless.

        Raises RuntimeError from a thread that may not enter the ring, while something is in flight.
        """
        if self._closed:
            return
        if self._generation != _calls.fork_generation():
            self._closed = True
            self._pool = None
            return
        if not self._shared and self._owner != threading.get_ident() and self.in_flight:
            raise RuntimeError("a private ring with I/O in flight can be closed by the thread that made it alone")
        if self._batching:
            raise RuntimeError("a batch is under way on this ring")
        self._commit()
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        if self._reaping and self._reaping != threading.get_ident():
            # Somebody waits in `reap`; everything is answered by now, so he is about to return.
            self._left.wait()
        if not self._reaping:
            self._state.close()
        self._state.answers.clear()
        self._given = self._taken = 0

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the ring is closed")
        if self._generation != _calls.fork_generation():
            raise RuntimeError("this ring was made before a fork, in the parent; the child must make its own")
        if self._batching:
            raise RuntimeError("a batch is under way on this ring")
        if not self._shared and self._owner != threading.get_ident():
            raise RuntimeError(
                "this ring was made with shared=False and may be entered by the thread that made it alone"
            )


def _new_eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def _bytes_of(buffer: object, *, writable: bool) -> memoryview:
    """The bytes of a contiguous buffer. Raises ValueError or TypeError as `_calls.span` does."""
    if not _calls.span(buffer, writable)[1]:
        return memoryview(bytearray() if writable else b"")  # an empty view cannot be cast
    return memoryview(buffer).cast("B")  # type: ignore[arg-type]


def _cut(views: list[memoryview], limit: int) -> list[memoryview]:
    """The first `limit` bytes of these."""
    kept = []
    for view in views:
        if not limit:
            break
        kept.append(view[:limit])
        limit -= len(kept[-1])
    return kept


def _int64s(buffer: object, writable: bool) -> memoryview:
    """The elements of a contiguous array of int64. Raises ValueError if it is not one."""
    bytes_held = _calls.span(buffer, writable)[1]
    view = memoryview(buffer)  # type: ignore[arg-type]
    if view.itemsize != 8 or view.format.lstrip("@=<") not in ("q", "l"):
        raise ValueError(f"offsets and results must be arrays of int64, not of {view.format!r}")
    return view.cast("B").cast("q") if bytes_held else memoryview(array.array("q"))
