"""What `odirect bench` measures: one kind of transfer, many times over, through one of the ways in.

A `Work` says what is done, an engine does it, a `Measured` says how it went. Engines:

    sync      `File.preadinto`, `File.pwrite`: one request at a time
    batch     `File.read_batch`, `File.write_batch`: the native loop; single requests are not seen
    submit    `File.submit` and `File.completions`
    asyncio   `odirect.aio`, one coroutine for each request in flight

Several jobs are several processes, so that Python's lock does not bound them: each is this module,
run with `-m`, that takes a `Work` on its standard input, says that it is ready, waits for the word
to go, and answers with a `Measured`.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import dataclasses
import enum
import json
import math
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import numpy

from odirect import aio
from odirect.base import errors
from odirect.base.errors import DeviceError, ODirectError, from_errno
from odirect.block.buffers import empty
from odirect.dio.outcome import Kind, Outcome, Promise, Reason, Tally
from odirect.files import File
from odirect.files import open as open_direct
from odirect.ring.choose import open_ring, thread_ring
from odirect.ring.contract import READ, WRITE, Ring, RingFeatures
from odirect.sched.clock import MonotonicClock

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from odirect.volume_file import FileInVolume

#: Ways in, as `Work.engine` names them.
ENGINES = ("sync", "batch", "submit", "asyncio")
#: Kinds of access, as `Work.rw` names them.
KINDS = ("read", "write", "randread", "randwrite")

# Memory that one call of a batch may use, and the elements that it has at most.
_BATCH_BYTES = 64 << 20
_BATCH_ELEMENTS = 16384
# A call of a batch that is shorter is made longer, and the other way round, so that the clock (and
# Ctrl-C) is seen to in time.
_BATCH_NS = 100_000_000
# Offsets that are made at once where they are used one by one.
_OFFSETS = 4096


class Cache(enum.StrEnum):
    """Which way a `Work` goes, and what is in the page cache before."""

    DIRECT = "direct"
    COLD = "buffered-cold"
    WARM = "buffered-warm"


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What one job does.

    path          the file or device, which exists and is large enough
    image         if it is not "": what holds the volume that `path` is in
    rw            one of `KINDS`
    engine        one of `ENGINES`; "sync" or "batch" unless `cache` is DIRECT
    block_bytes   length of one request
    depth         requests in flight; 1 for "sync"
    start, blocks the first byte that is touched, and how many blocks from there
    number        requests to make, None: until the time is up
    runtime_ns    time to go on for, None: until the number is reached
    seed          what random offsets and data are made from, together with `job`
    end_sync      make what was written durable at the end, within the time that is measured
    huge          have the memory in huge pages
    """

    path: str
    rw: str
    engine: str
    block_bytes: int
    depth: int
    start: int
    blocks: int
    number: int | None
    runtime_ns: int | None
    seed: int
    job: int = 0
    access: str = "auto"
    dsync: bool = False
    hipri: bool = False
    end_sync: bool = False
    huge: bool = False
    cache: Cache = Cache.DIRECT
    image: str = ""

    @property
    def op(self) -> int:
        """READ or WRITE."""
        return WRITE if self.rw.endswith("write") else READ

    @property
    def is_random(self) -> bool:
        """Whether offsets are drawn, not counted up."""
        return self.rw.startswith("rand")


class Latencies:
    """How long requests took: a histogram that is exact to 0.8 %, of any number of them.

    `add` takes nanoseconds; call `fold` now and then, which moves what was added into the histogram.
    """

    _STEPS = 128  # of equal width in each power of two

    def __init__(self) -> None:
        self._new = array.array("q")
        self.add: Callable[[int], None] = self._new.append
        self.counts: NDArray[numpy.int64] = numpy.zeros(64 * self._STEPS, dtype=numpy.int64)
        self.longest_ns = 0

    def fold(self) -> None:
        """Count what was added."""
        if not self._new:
            return
        added = numpy.array(self._new, dtype=numpy.int64)
        del self._new[:]
        self.longest_ns = max(self.longest_ns, int(added.max()))
        mantissas, exponents = numpy.frexp(numpy.maximum(added, 1).astype(numpy.float64))
        places = exponents.astype(numpy.int64) * self._STEPS + ((mantissas - 0.5) * 2 * self._STEPS).astype(numpy.int64)
        self.counts += numpy.bincount(places, minlength=len(self.counts))

    @property
    def number(self) -> int:
        """How many were folded in."""
        return int(self.counts.sum())

    def percentile_ns(self, percent: float) -> float:
        """The time that `percent` of the requests took at most; 0 if there was none."""
        rank = math.ceil(self.number * percent / 100)
        if not rank:
            return 0.0
        place = int(numpy.searchsorted(self.counts.cumsum(), rank))
        exponent, step = divmod(place, self._STEPS)
        return min(math.ldexp(0.5 + (step + 1) / (2 * self._STEPS), exponent), float(self.longest_ns))

    def merge(self, other: Latencies) -> None:
        """Count those of `other` too."""
        other.fold()
        self.counts += other.counts
        self.longest_ns = max(self.longest_ns, other.longest_ns)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        self.fold()
        places = numpy.flatnonzero(self.counts)
        return {"places": places.tolist(), "counts": self.counts[places].tolist(), "longest_ns": self.longest_ns}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Latencies:
        """The histogram that `as_json` gave."""
        made = cls()
        made.counts[told["places"]] = told["counts"]
        made.longest_ns = told["longest_ns"]
        return made


@dataclasses.dataclass(slots=True)
class Measured:
    """How one job, or several together, went. Times of several processes are of one clock.

    latencies is None where the engine does not see single requests. cpu_ns is user and system time
    of the process, its threads and the kernel's threads for it, while it was measured.
    """

    began_ns: int = 0
    ended_ns: int = 0
    cpu_ns: int = 0
    outcomes: dict[Outcome, Tally] = dataclasses.field(default_factory=dict)
    latencies: Latencies | None = None

    @property
    def operations(self) -> int:
        """Requests that were finished."""
        return sum(tally.operations for tally in self.outcomes.values())

    @property
    def bytes(self) -> int:
        """Bytes that they moved."""
        return sum(tally.bytes for tally in self.outcomes.values())

    @property
    def seconds(self) -> float:
        """From the start of the first job to the end of the last."""
        return (self.ended_ns - self.began_ns) / 1e9

    @property
    def not_direct(self) -> int:
        """Requests whose outcome is not `direct` (F52)."""
        return sum(tally.operations for outcome, tally in self.outcomes.items() if outcome.kind is not Kind.DIRECT)

    def merge(self, other: Measured) -> None:
        """Add another job, which ran at the same time."""
        self.began_ns = min(self.began_ns, other.began_ns)
        self.ended_ns = max(self.ended_ns, other.ended_ns)
        self.cpu_ns += other.cpu_ns
        for outcome, tally in other.outcomes.items():
            mine = self.outcomes.get(outcome, Tally(0, 0))
            self.outcomes[outcome] = Tally(mine.operations + tally.operations, mine.bytes + tally.bytes)
        if self.latencies is None or other.latencies is None:
            self.latencies = None
        else:
            self.latencies.merge(other.latencies)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return {
            "began_ns": self.began_ns,
            "ended_ns": self.ended_ns,
            "cpu_ns": self.cpu_ns,
            "outcomes": [[*outcome, *tally] for outcome, tally in self.outcomes.items()],
            "latencies": None if self.latencies is None else self.latencies.as_json(),
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Measured:
        """What `as_json` gave."""
        return cls(
            told["began_ns"],
            told["ended_ns"],
            told["cpu_ns"],
            {
                Outcome(Kind(kind), Reason(reason), Promise(promise)): Tally(operations, size)
                for kind, reason, promise, operations, size in told["outcomes"]
            },
            None if told["latencies"] is None else Latencies.from_json(told["latencies"]),
        )


class Stop:
    """Whether Ctrl-C was pressed: a job that is running looks, and ends early with what it has.

    A signal's handler that raised would come in the middle of a request; this one does not, unless
    it is asked a second time and not `patient`.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.asked = False
        self.patient = patient
        self.children: list[subprocess.Popen[str]] = []

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """While this is entered, SIGINT asks for the end; outside the main thread nothing changes."""
        try:
            before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not the main thread, which Ctrl-C goes to
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self.patient:
            signal.default_int_handler(number, frame)
        self.asked = True
        for child in self.children:  # A terminal has told them too; twice does no harm.
            child.send_signal(signal.SIGINT)


def ring_in_use(depth: int) -> tuple[str, RingFeatures]:
    """The kind and the features of the ring that an engine gets here."""
    ring = open_ring(depth)
    try:
        return ring.kind, ring.features
    finally:
        ring.close()


def measure(works: Sequence[Work], stop: Stop) -> Measured:
    """What the jobs of `works` did, all at the same time: one in this process, several in one each.

    Ends early, with what there is by then, when `stop` is asked. Raises the first job's error.
    """
    if len(works) == 1:
        with stop.catching():
            return run(works[0], stop)
    return _run_apart(works, stop)


def run(work: Work, stop: Stop, ready: Callable[[], None] | None = None) -> Measured:
    """What this one job did, in this process. `ready` is called when all but the work is done."""
    if work.cache is not Cache.DIRECT and not work.image:
        return _run_buffered(work, stop, ready)
    if work.engine == "asyncio" and not work.image:
        return asyncio.run(_run_asyncio(work, stop, ready))
    with _opened(work) as file:
        before = file.totals
        session = _Session(work, stop, ready)
        if work.engine == "sync":
            call = file.preadinto if work.op == READ else file.pwrite
            _one_by_one(session, call)
        elif work.engine == "batch":
            batch = file.read_batch if work.op == READ else file.write_batch

            def transfer(offsets: NDArray[numpy.int64], memory: memoryview) -> None:
                batch(offsets, work.block_bytes, memory, depth=work.depth)

            _in_batches(session, transfer)
        elif work.engine == "submit":
            _submitted(session, file)
        else:
            raise ValueError(f"engine {work.engine!r}: use one of {', '.join(ENGINES)}")
        if work.end_sync and work.op == WRITE:
            file.sync(data_only=True)
        return session.finish(_since(before, file.totals))


@contextlib.contextmanager
def _opened(work: Work) -> Iterator[File | FileInVolume]:
    """The file of `work`, open; one in a volume goes through the volume's own cache if `work.cache` says so."""
    mode = "r" if work.op == READ else "r+"
    access: Literal["auto", "strict"] = "strict" if work.access == "strict" else "auto"
    if not work.image:
        with open_direct(work.path, mode, access=access, dsync=work.dsync, hipri=work.hipri) as file:
            yield file
        return
    from odirect.volumes import open_volume

    cached = work.cache is not Cache.DIRECT
    with (
        open_volume(work.image, mode) as volume,
        volume.open(
            work.path, mode, access="buffered" if cached else access, dsync=work.dsync, hipri=work.hipri
        ) as file,
    ):
        if work.cache is Cache.WARM:
            piece = empty(1 << 20)
            for offset in range(work.start, work.start + work.blocks * work.block_bytes, len(piece)):
                file.preadinto(piece, offset)
        yield file


def _since(before: dict[Outcome, Tally], after: dict[Outcome, Tally]) -> dict[Outcome, Tally]:
    """What was counted since then."""
    found = {}
    for outcome, tally in after.items():
        was = before.get(outcome, Tally(0, 0))
        if tally.operations > was.operations:
            found[outcome] = Tally(tally.operations - was.operations, tally.bytes - was.bytes)
    return found


# --- one job -------------------------------------------------------------------------------------


class _Session:
    """One job's offsets, memory, clock and figures. Its time is from `begin` to `finish`."""

    def __init__(self, work: Work, stop: Stop, ready: Callable[[], None] | None) -> None:
        self.work = work
        self.stop = stop
        self.latencies: Latencies | None = None
        self.now_ns = MonotonicClock().now_ns
        self._generator = numpy.random.default_rng((work.seed, work.job))
        self._made = 0
        self._ready = ready
        self._cpu_ns = self._began_ns = 0
        self.deadline_ns = (1 << 63) - 1

    def begin(self) -> int:
        """The present time, from which on is measured; all that is made once has been made before."""
        if self._ready is not None:
            self._ready()
        self._cpu_ns = _cpu_ns()
        self._began_ns = self.now_ns()
        if self.work.runtime_ns is not None:
            self.deadline_ns = self._began_ns + self.work.runtime_ns
        return self._began_ns

    def memory(self, length: int) -> memoryview:
        """Aligned memory; with random bytes in it if it is to be written, which nothing below can squeeze."""
        memory = empty(length, huge=self.work.huge)
        if self.work.op == WRITE:
            numpy.frombuffer(memory, dtype=numpy.uint8)[:] = numpy.frombuffer(
                self._generator.bytes(length), dtype=numpy.uint8
            )
        return memory

    def take(self, count: int) -> NDArray[numpy.int64]:
        """The next `count` offsets in bytes; fewer, at last none, when the number is reached."""
        work = self.work
        if work.number is not None:
            count = min(count, work.number - self._made)
        if work.is_random:
            places = self._generator.integers(0, work.blocks, count)
        else:
            places = numpy.arange(self._made, self._made + count, dtype=numpy.int64) % work.blocks
        self._made += count
        return places * work.block_bytes + work.start

    def each(self) -> Iterator[int]:
        """The offsets one by one."""
        while True:
            offsets = self.take(_OFFSETS).tolist()
            if not offsets:
                return
            yield from offsets
            if self.latencies is not None:
                self.latencies.fold()

    def finish(self, outcomes: dict[Outcome, Tally]) -> Measured:
        """The figures; the time ends here."""
        ended_ns = self.now_ns()
        cpu_ns = _cpu_ns() - self._cpu_ns
        if self.latencies is not None:
            self.latencies.fold()
        return Measured(self._began_ns, ended_ns, cpu_ns, outcomes, self.latencies)


def _cpu_ns() -> int:
    """User and system time of this process and its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return round((used.ru_utime + used.ru_stime) * 1e9)


def _one_by_one(session: _Session, call: Callable[[memoryview, int], int]) -> None:
    latencies = session.latencies = Latencies()
    add, now_ns, stop = latencies.add, session.now_ns, session.stop
    memory = session.memory(session.work.block_bytes)
    before = session.begin()
    deadline_ns = session.deadline_ns
    for offset in session.each():
        call(memory, offset)
        after = now_ns()
        add(after - before)
        before = after
        if after >= deadline_ns or stop.asked:
            return


def _in_batches(session: _Session, transfer: Callable[[NDArray[numpy.int64], memoryview], None]) -> None:
    work = session.work
    most = max(work.depth, min(_BATCH_ELEMENTS, _BATCH_BYTES // work.block_bytes))
    if work.number is not None:
        most = min(most, max(1, work.number))
    memory = session.memory(most * work.block_bytes)
    count = min(most, 8 * work.depth)
    before = session.begin()
    while True:
        offsets = session.take(count)
        if not len(offsets):
            return
        transfer(offsets, memory)
        after = session.now_ns()
        if after >= session.deadline_ns or session.stop.asked:
            return
        if after - before < _BATCH_NS:
            count = min(most, 2 * count)
        elif after - before > 3 * _BATCH_NS:
            count = max(min(most, work.depth), count // 2)
        before = after


def _submitted(session: _Session, file: File | FileInVolume) -> None:
    work, stop = session.work, session.stop
    latencies = session.latencies = Latencies()
    add, now_ns, submit = latencies.add, session.now_ns, file.submit
    op: Literal["read", "write"] = "read" if work.op == READ else "write"
    memory = session.memory(work.depth * work.block_bytes)
    buffers = [memory[place : place + work.block_bytes] for place in range(0, len(memory), work.block_bytes)]
    started = [0] * len(buffers)
    turns = session.each()
    session.begin()
    deadline_ns = session.deadline_ns
    for number, buffer in enumerate(buffers):
        offset = next(turns, None)
        if offset is None:
            break
        started[number] = now_ns()
        submit(op, offset, buffer, number)
    for request in file.completions():
        request.result()
        after = now_ns()
        number = cast(int, request.tag)
        add(after - started[number])
        if after < deadline_ns and not stop.asked:
            offset = next(turns, None)
            if offset is not None:
                started[number] = after
                submit(op, offset, buffers[number], number)


async def _run_asyncio(work: Work, stop: Stop, ready: Callable[[], None] | None) -> Measured:
    async with aio.open(
        work.path,
        "r" if work.op == READ else "r+",
        access="strict" if work.access == "strict" else "auto",
        dsync=work.dsync,
        hipri=work.hipri,
    ) as file:
        session = _Session(work, stop, ready)
        latencies = session.latencies = Latencies()
        add, now_ns = latencies.add, session.now_ns
        call = file.preadinto if work.op == READ else file.pwrite
        turns = session.each()
        memory = session.memory(work.depth * work.block_bytes)
        session.begin()
        deadline_ns = session.deadline_ns

        async def keep_one(buffer: memoryview) -> None:
            before = now_ns()
            for offset in turns:
                await call(buffer, offset)
                after = now_ns()
                add(after - before)
                before = after
                if after >= deadline_ns or stop.asked:
                    return

        try:
            async with asyncio.TaskGroup() as group:
                for place in range(0, len(memory), work.block_bytes):
                    group.create_task(keep_one(memory[place : place + work.block_bytes]))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the first, as everywhere
        if work.end_sync and work.op == WRITE:
            await file.sync(data_only=True)
        return session.finish(file.totals)


# --- through the page cache, to compare with -----------------------------------------------------


def _run_buffered(work: Work, stop: Stop, ready: Callable[[], None] | None) -> Measured:
    """The same work on a descriptor without O_DIRECT: by preadv2 or by the ring's own loop."""
    flags = os.O_CLOEXEC | (os.O_RDONLY if work.op == READ else os.O_RDWR)
    try:
        fd = os.open(work.path, flags | (os.O_DSYNC if work.dsync else 0))
    except OSError as error:
        raise from_errno(error.errno or 0, "opening", work.path) from error
    try:
        _prepare_cache(fd, work)
        session = _Session(work, stop, ready)
        promise = Promise.NONE
        if work.op == WRITE and (work.dsync or work.end_sync):
            promise = Promise.DURABLE
        done = [0, 0]
        if work.engine == "sync":
            call = os.preadv if work.op == READ else os.pwritev

            def move(memory: memoryview, offset: int) -> int:
                count = call(fd, [memory], offset)
                done[0] += 1
                done[1] += count
                return count

            _one_by_one(session, move)
        elif work.engine == "batch":
            ring = thread_ring()

            def transfer(offsets: NDArray[numpy.int64], memory: memoryview) -> None:
                done[0] += len(offsets)
                done[1] += _batch_on_ring(ring, fd, work, offsets, memory)

            _in_batches(session, transfer)
        else:
            raise ValueError(f"engine {work.engine!r} goes direct only; use sync or batch")
        if work.end_sync and work.op == WRITE:
            os.fdatasync(fd)
        return session.finish({Outcome(Kind.BUFFERED, Reason.NONE, promise): Tally(*done)} if done[0] else {})
    except OSError as error:
        if isinstance(error, ODirectError):
            raise
        raise from_errno(error.errno or 0, "moving bytes through the page cache", work.path) from error
    finally:
        os.close(fd)


def _batch_on_ring(ring: Ring, fd: int, work: Work, offsets: NDArray[numpy.int64], memory: memoryview) -> int:
    """Bytes that one batch moved; raises the error of the first element that failed."""
    results = numpy.zeros(len(offsets), dtype=numpy.int64)
    length = work.block_bytes
    ring.transfer_batch(work.op, fd, memory, length, offsets, length, 0, results, work.depth)
    worst = int(results.min())
    if worst < 0:
        place = int(offsets[int(results.argmin())])
        raise from_errno(-worst, f"moving {length} bytes at {place}", work.path)
    return int(results.sum())


def _prepare_cache(fd: int, work: Work) -> None:
    """Have all of the range in the page cache, or none of it."""
    length = work.blocks * work.block_bytes
    os.fdatasync(fd)
    if work.cache is Cache.COLD:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return
    piece = memoryview(mmap.mmap(-1, 1 << 20))
    for offset in range(work.start, work.start + length, len(piece)):
        os.preadv(fd, [piece], offset)


def drop_cached(path: str) -> None:
    """Write back and drop what of the file is in the page cache. Raises what opening it raises."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    except OSError as error:
        raise from_errno(error.errno or 0, "dropping its pages", path) from error


# --- several jobs --------------------------------------------------------------------------------


def _run_apart(works: Sequence[Work], stop: Stop) -> Measured:
    """Each job in a process of its own, all let go at once."""
    if not works:
        raise ValueError("there is no job to run")
    with contextlib.ExitStack() as stack, stop.catching():
        answers = []
        for work in works:
            child = _start()
            stop.children.append(child)
            stack.callback(_end, stop, child)
            _tell(child, json.dumps(dataclasses.asdict(work)))
            if work.op == WRITE:
                # One after the other: whoever opens a device for writing asks whether others hold it.
                answers.append(_hear(child))
        if stop.asked:  # Those that were started since then have not been told.
            for child in stop.children:
                child.send_signal(signal.SIGINT)
        answers += [_hear(child) for child in stop.children[len(answers) :]]
        for child, answer in zip(stop.children, answers, strict=True):
            if answer == "ready":
                _tell(child, "go")
        measured: Measured | None = None
        failure: Exception | None = None
        for child, answer in zip(stop.children, answers, strict=True):
            told = json.loads(_hear(child) if answer == "ready" else answer)
            if "error" in told:
                failure = failure or _raised(told["error"])
            elif measured is None:
                measured = Measured.from_json(told)
            else:
                measured.merge(Measured.from_json(told))
        if failure is not None or measured is None:
            raise failure or RuntimeError("no job said how it went")
        return measured


def _start() -> subprocess.Popen[str]:
    """A process of one job. SIGINT is held back in it until it can take it."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "odirect.benchmark"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _end(stop: Stop, child: subprocess.Popen[str]) -> None:
    """See that a job's process is gone."""
    stop.children.remove(child)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # What could not be written to a job that has ended.
                pipe.close()
    if child.poll() is None:
        child.terminate()
    child.wait()


def _tell(child: subprocess.Popen[str], line: str) -> None:
    pipe = child.stdin
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):  # It has ended; what it says, or does not, tells why.
            pipe.write(line + "\n")
            pipe.flush()


def _hear(child: subprocess.Popen[str]) -> str:
    """The next line of a job."""
    line = child.stdout.readline().strip() if child.stdout is not None else ""
    if not line:
        raise DeviceError(f"a job of the benchmark ended with status {child.wait()} before it said anything")
    return line


def _raised(told: dict[str, Any]) -> Exception:
    """The error that a job met."""
    kind = getattr(errors, told["kind"], None)
    if isinstance(kind, type) and issubclass(kind, ODirectError):
        return kind(told["message"], errno=told["errno"], path=told["path"])
    return ValueError(told["message"]) if told["kind"] == "ValueError" else RuntimeError(told["message"])


def main(requests: IO[str] = sys.stdin, answers: IO[str] = sys.stdout) -> int:
    """Be the process of one job: take a `Work`, answer with a `Measured` or an error. 0."""
    stop = Stop(patient=True)

    def say(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    def ready() -> None:
        say("ready")
        requests.readline()

    with stop.catching():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        told = json.loads(requests.readline())
        try:
            measured = run(Work(**{**told, "cache": Cache(told["cache"])}), stop, ready)
        except ODirectError as error:
            path = None if error.filename is None else os.fsdecode(error.filename)
            kind = type(error).__name__
            say(json.dumps({"error": {"kind": kind, "message": error.message, "errno": error.errno, "path": path}}))
        except (ValueError, OSError) as error:
            say(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}))
        else:
            say(json.dumps(measured.as_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
