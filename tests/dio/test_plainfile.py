"""Plain files on fake devices: what is refused, what falls back, what is promised, and how files grow."""

from __future__ import annotations

import dataclasses
import errno
import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.dio.kit import aligned, drive, laid_out, pattern, pump

from odirect.base.errors import (
    AlignmentError,
    AtomicLimitError,
    DeviceError,
    NoSpaceError,
    NotDirectError,
    StickySyncError,
    WouldBlockError,
)
from odirect.block.bio import ATOMIC, DISCARD, FLUSH, FUA, META, NOWAIT, READ, WRITE, ZERO, Bio
from odirect.block.buffers import BufferPool, empty
from odirect.block.cached_file import CACHED_LIMITS
from odirect.block.device import Limits
from odirect.dio import bounce, plainfile
from odirect.dio.bounce import Moved
from odirect.dio.outcome import Kind, Outcome, Promise, Reason, Tallies, Tally, worst
from odirect.dio.plainfile import NO_END, FileState, PlainFile
from odirect.ring._calls import address_of
from odirect.sched.scheduler import Scheduler
from odirect.sched.traps import gather, yield_now
from odirect.testing.devices import atomic_limits
from odirect.testing.model import ModelFile
from odirect.testing.sim import Simulation, explore, run_seeds

KIB = 1 << 10
CLAIMED = Limits(max_bio_bytes=16 * KIB, fua=True, volatile_cache=False)


class Contents:
    """The bytes of a file that grows, and every write to it. `check` is called after each."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.writes: list[tuple[str, int, int]] = []
        self.check: Callable[[], None] = lambda: None


class FakeFile:
    """A file as the kernel has it: grows when it is written past its end, and is as choosy as `takes`.

    claims: the limits that it says that it has. refuses: bios that are EINVAL all the same.
    """

    def __init__(
        self,
        name: str,
        contents: Contents,
        claims: Limits,
        takes: Limits | None = None,
        refuses: Callable[[Bio], bool] = lambda bio: False,
    ) -> None:
        self.name = name
        self.contents = contents
        self.limits = claims
        self.takes = claims if takes is None else takes
        self.refuses = refuses
        self.errors: dict[int, list[int]] = {}
        self.seen: list[tuple[int, int, int, int]] = []
        self._queued: list[Bio] = []
        self._committed: list[Bio] = []

    @property
    def size_bytes(self) -> int:
        return len(self.contents.data)

    @property
    def in_flight(self) -> int:
        return len(self._queued) + len(self._committed)

    def submit(self, bio: Bio) -> None:
        bio.error = bio.done_bytes = 0
        self._queued.append(bio)

    def commit(self) -> None:
        self._committed += self._queued
        self._queued = []

    def poll(self, timeout_ns: int) -> list[Bio]:
        finished, self._committed = self._committed, []
        for bio in finished:
            self.seen.append((bio.op, bio.addr, bio.length, bio.flags))
            bio.error = self._refusal(bio)
            if not bio.error:
                self._carry_out(bio)
        return finished

    def wakeup_fd(self) -> None:
        return None

    def close(self) -> None:
        pass

    def _refusal(self, bio: Bio) -> int:
        if self.errors.get(bio.op):
            return self.errors[bio.op].pop(0)
        if bio.op not in (READ, WRITE):
            return 0
        unit = self.takes.read_align if bio.op == READ else self.takes.write_align
        wrong = (bio.addr | bio.length) % unit or sum(map(len, bio.segments)) != bio.length
        wrong = wrong or any(
            address_of(segment) % self.takes.memory_align or len(segment) % unit for segment in bio.segments
        )
        return errno.EINVAL if wrong or self.refuses(bio) else 0

    def _carry_out(self, bio: Bio) -> None:
        data = self.contents.data
        place = bio.addr
        if bio.op == READ:
            for segment in bio.segments:
                part = data[place : place + len(segment)]
                segment[: len(part)] = part
                place += len(part)
            bio.done_bytes = place - bio.addr
        elif bio.op == WRITE:
            new = b"".join(bio.segments)
            data.extend(bytes(max(0, place + len(new) - len(data))))
            data[place : place + len(new)] = new
            bio.done_bytes = len(new)
            self.contents.writes.append((self.name, place, len(new)))
            self.contents.check()


class Setting:
    """A `PlainFile` over a fake file and its page cache."""

    def __init__(
        self,
        data: bytes = b"",
        *,
        claims: Limits = CLAIMED,
        takes: Limits | None = None,
        refuses: Callable[[Bio], bool] = lambda bio: False,
        strict: bool = False,
        ask_again: Callable[[], Limits] | None = None,
        is_block: bool = False,
        at_open: bool = True,
        twin: bool = True,
    ) -> None:
        self.contents = Contents(data)
        self.direct = FakeFile("direct", self.contents, claims, takes, refuses) if at_open else None
        self.cached = FakeFile("cached", self.contents, CACHED_LIMITS) if twin else None
        self.state = FileState(claims, "the file", is_block)
        if not at_open:
            self.state.refused = {READ: Reason.REFUSED_AT_OPEN, WRITE: Reason.REFUSED_AT_OPEN}
        self.pool = BufferPool(64 * KIB, 4)
        self.file = PlainFile(self.state, self.direct, self.cached, self.pool, strict=strict, ask_again=ask_again)

    def run(self, coroutine):
        devices = [device for device in (self.direct, self.cached) if device is not None]
        return drive(coroutine, *devices)

    def read(self, offset: int, *segments: memoryview, flags: int = 0) -> Moved:
        return self.run(self.file.read(offset, segments, sum(map(len, segments)), flags))

    def write(self, offset: int, *segments: memoryview, flags: int = 0) -> Moved:
        return self.run(self.file.write(offset, segments, sum(map(len, segments)), flags))

    @property
    def data(self) -> bytes:
        return bytes(self.contents.data)


def misaligned(data: bytes, by: int = 1) -> memoryview:
    view = empty(len(data) + by)[by:]
    view[:] = data
    return view


# --- outcomes and promises ------------------------------------------------------------------------


def test_outcomes_are_exact():
    """F50: direct, bounced or buffered, why, and what is promised."""
    here = Setting(pattern(8000))
    view, odd = empty(1024), misaligned(bytes(1024))
    assert here.read(512, view).outcome == Outcome(Kind.DIRECT)
    assert here.read(512, odd).outcome == Outcome(Kind.BOUNCED, Reason.MISALIGNED_MEMORY)
    assert here.read(100, view).outcome == Outcome(Kind.BOUNCED, Reason.MISALIGNED_OFFSET)
    assert here.read(7680, view).outcome == Outcome(Kind.BOUNCED, Reason.END_OF_FILE)
    for flags, promise in ((0, Promise.DEVICE), (FUA, Promise.DURABLE)):
        assert here.write(512, view, flags=flags).outcome == Outcome(Kind.DIRECT, Reason.NONE, promise)
        assert here.write(1, view, flags=flags).outcome == Outcome(Kind.BOUNCED, Reason.MISALIGNED_OFFSET, promise)


def test_refused_at_open_means_the_page_cache():
    """F50: every request says that it was buffered, and why; a write still promises what it keeps."""
    here = Setting(pattern(8192), at_open=False)
    view = empty(1024)
    assert here.read(100, view) == Moved(1024, Outcome(Kind.BUFFERED, Reason.REFUSED_AT_OPEN))
    assert bytes(view) == pattern(8192)[100:1124]
    assert here.write(0, view).outcome == Outcome(Kind.BUFFERED, Reason.REFUSED_AT_OPEN, Promise.DEVICE)
    assert here.write(0, view, flags=FUA).outcome == Outcome(Kind.BUFFERED, Reason.REFUSED_AT_OPEN, Promise.DURABLE)
    assert here.cached.seen[-1][3] & FUA
    here.run(here.file.sync())
    assert here.cached.seen[-1][0] == FLUSH


def test_what_the_file_system_serves_from_its_cache_is_not_called_direct():
    """F50: the kernel takes the request, and its cache serves it."""
    here = Setting(pattern(8192))
    here.state.cached[READ] = Reason.CACHED_BY_FS
    view = empty(1024)
    assert here.read(0, view).outcome == Outcome(Kind.BUFFERED, Reason.CACHED_BY_FS)
    assert here.write(0, view).outcome == Outcome(Kind.DIRECT, Reason.NONE, Promise.DEVICE)


def test_the_worst_part_is_the_requests_outcome():
    direct, bounced = Outcome(Kind.DIRECT, promise=Promise.DURABLE), Outcome(Kind.BOUNCED, Reason.MISALIGNED_LENGTH)
    assert worst(None, direct) == direct
    for first, second in itertools.permutations((direct, bounced)):
        assert worst(first, second) == Outcome(Kind.BOUNCED, Reason.MISALIGNED_LENGTH, Promise.NONE)
    weaker = Outcome(Kind.BOUNCED, Reason.MISALIGNED_LENGTH, Promise.DURABLE)
    assert worst(Outcome(Kind.DIRECT, promise=Promise.DEVICE), weaker).promise is Promise.DEVICE
    assert str(weaker) == "bounced (misaligned length) durable" and str(Outcome(Kind.DIRECT)) == "direct"


def test_outcomes_are_counted():
    tallies = Tallies()
    assert tallies.last is None and tallies.totals() == {}
    tallies.add(Outcome(Kind.DIRECT), 10)
    tallies.add(Outcome(Kind.BUFFERED), 5, 2)
    tallies.add(Outcome(Kind.DIRECT), 1)
    assert tallies.totals() == {Outcome(Kind.DIRECT): Tally(2, 11), Outcome(Kind.BUFFERED): Tally(2, 5)}
    assert tallies.last == Outcome(Kind.DIRECT)


# --- F50: refusals --------------------------------------------------------------------------------

CHOOSY = [
    (dataclasses.replace(CLAIMED, memory_align=4096), Reason.MISALIGNED_MEMORY),
    (dataclasses.replace(CLAIMED, read_align=4096, write_align=4096), Reason.MISALIGNED_OFFSET),
    (
        dataclasses.replace(CLAIMED, read_align=65536, write_align=65536, memory_align=4096, max_bio_bytes=65536),
        Reason.MISALIGNED_OFFSET,
    ),
]


@pytest.mark.parametrize(("takes", "reason"), CHOOSY)
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_file_that_is_choosier_than_it_said(takes, reason, asks, op):
    """F50: at the first read or write: ask again, or try coarser units; bounce, and say so."""
    old, new = pattern(200 * KIB), pattern(140000, 1)
    here = Setting(old, takes=takes, ask_again=(lambda: takes) if asks else None)
    view = empty(512 + 140000)[512:]
    if op == READ:
        moved = here.read(512, view)
        assert bytes(view) == old[512:140512] and here.data == old
    else:
        view[:] = new
        moved = here.write(512, view)
        assert here.data == old[:512] + new + old[140512:]
    assert moved.transferred == 140000
    assert moved.outcome.kind is Kind.BOUNCED
    # Feeling its way, it meets the memory first.
    assert moved.outcome.reason in ({reason} if asks or op == READ else {reason, Reason.MISALIGNED_MEMORY})
    assert op not in here.state.refused
    assert here.state.limits.memory_align >= takes.memory_align and here.state.limits.read_align >= takes.read_align
    if asks:
        assert here.state.limits is takes
    # What fits the new limits goes direct from now on, with no further refusal.
    here.direct.seen.clear()
    fitting = empty(65536)
    assert here.read(65536, fitting).outcome == Outcome(Kind.DIRECT)
    assert bytes(fitting) == here.data[65536:131072] and not was_refused(here)


def was_refused(here: Setting) -> bool:
    assert here.direct is not None
    return any((addr | length) % here.direct.takes.read_align for _, addr, length, _ in here.direct.seen)


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("asks", [False, True])
def test_the_ladder_ends_in_the_page_cache(op, asks):
    """F50: nothing is taken at all: buffered, with the reason; and it is not tried again."""
    old = pattern(200 * KIB)
    here = Setting(
        old, refuses=lambda bio: bio.op == op, ask_again=(lambda: dataclasses.replace(CLAIMED)) if asks else None
    )
    view = aligned(pattern(64 * KIB, 1))
    call = here.read if op == READ else here.write
    moved = call(64 * KIB, view)
    promise = Promise.NONE if op == READ else Promise.DEVICE
    assert moved == Moved(64 * KIB, Outcome(Kind.BUFFERED, Reason.REFUSED, promise))
    assert bytes(view) == here.data[64 * KIB : 128 * KIB]
    assert here.state.refused == {op: Reason.REFUSED}
    tried = len(here.direct.seen)
    assert tried < 24
    assert call(0, view).outcome.kind is Kind.BUFFERED
    assert len(here.direct.seen) == tried
    # The other operation is not refused.
    other = here.write if op == READ else here.read
    assert other(0, view).outcome.kind is Kind.DIRECT


@pytest.mark.parametrize("refused_from", [16 * KIB, 64 * KIB, 96 * KIB])
@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("size", [0, 200 * KIB])
def test_refused_in_mid_stream(refused_from, skew, size):
    """F07, F50: the total is exact, nothing is written twice, and the outcome is that of the worst part.

    From some place on the kernel takes nothing (encoded extents, another file system below).
    """
    old, new = pattern(size), pattern(120 * KIB, 1)
    here = Setting(old, refuses=lambda bio: bio.op == WRITE and bio.addr + bio.length > refused_from)
    moved = here.write(512, misaligned(new, skew) if skew else aligned(new))
    assert moved == Moved(120 * KIB, Outcome(Kind.BUFFERED, Reason.REFUSED, Promise.DEVICE))
    assert here.data == old[:512].ljust(512, b"\0") + new + old[512 + 120 * KIB :]
    once = sorted((start, start + length) for _, start, length in here.contents.writes)
    assert once[0][0] == 512 and once[-1][1] == 512 + 120 * KIB
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(once)), once
    assert ("direct" in {name for name, *_ in here.contents.writes}) == (refused_from > 32 * KIB)
    before = aligned(bytes(16 * KIB))
    assert here.read(0, before).outcome.kind is Kind.DIRECT


@pytest.mark.parametrize("offset", [0, 100, 512, 4096])
@pytest.mark.parametrize("skew", [0, 1, 512])
@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("changes_at", range(5))
def test_limits_that_tighten_in_mid_stream(offset, skew, growing, changes_at):
    """F07, F50: after some bios the kernel wants 4096 (the file moved to another disk): exact, and once."""
    stricter = dataclasses.replace(CLAIMED, read_align=4096, write_align=4096, memory_align=4096)
    old, new = b"" if growing else pattern(200 * KIB), pattern(100001, 1)
    here = Setting(old)
    model = ModelFile(old)

    def refuses(bio: Bio) -> bool:
        if len(here.direct.seen) > changes_at:
            here.direct.takes = stricter
        return False

    here.direct.refuses = refuses
    moved = here.write(offset, misaligned(new, skew) if skew else aligned(new))
    assert moved.transferred == model.pwrite(new, offset)
    assert here.data == model.data
    written = sum(length for _, _, length in here.contents.writes)
    assert written == len(new)
    assert WRITE not in here.state.refused


def test_requests_that_are_refused_together_climb_one_step():
    """F50: eight requests were sent under the same limits; that they all fail is one piece of news, not eight."""
    takes = dataclasses.replace(CLAIMED, read_align=4096, write_align=4096, memory_align=4096)
    for op in (READ, WRITE):
        here = Setting(pattern(512 * KIB), takes=takes)
        scheduler = Scheduler()
        for device in (here.direct, here.cached):
            scheduler.add_device(device)
        call = here.file.read if op == READ else here.file.write
        tasks = [scheduler.spawn(call(512 + number * 64 * KIB, [empty(16 * KIB)], 16 * KIB)) for number in range(8)]
        pump(scheduler, *tasks)
        assert {task.result().outcome.kind for task in tasks} == {Kind.BOUNCED}
        limits = here.state.limits
        assert (limits.read_align, limits.memory_align, here.state.refused) == (4096, 4096, {})


def test_the_descriptor_of_a_new_limit_names_its_source():
    here = Setting(pattern(8192), takes=CHOOSY[0][0])
    here.read(0, misaligned(bytes(512), 512))
    assert here.state.limits.sources["memory_align"] == "refused below"


# --- strict ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [READ, WRITE])
def test_strict_refuses_what_cannot_go_direct(op):
    """B01, F50: before anything is submitted."""
    here = Setting(pattern(8192), strict=True)
    call = here.read if op == READ else here.write
    for offset, view in ((100, empty(512)), (0, empty(100)), (0, misaligned(bytes(512)))):
        with pytest.raises(AlignmentError):
            call(offset, view)
    assert not here.direct.seen
    assert call(512, empty(512)).outcome.kind is Kind.DIRECT
    here.state.cached[op] = Reason.CACHED_BY_FS
    with pytest.raises(NotDirectError, match="serves it from its cache"):
        call(512, empty(512))
    closed = Setting(pattern(8192), strict=True, at_open=False)
    with pytest.raises(NotDirectError, match="refused by the kernel at open"):
        (closed.read if op == READ else closed.write)(512, empty(512))


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("length", [8 * KIB, 64 * KIB])
def test_strict_says_so_when_the_kernel_refuses_later(op, length):
    """F50: a refusal is no device error: the alignment is wrong after all, or it cannot go direct."""
    for takes in (CHOOSY[0][0], CHOOSY[1][0]):
        here = Setting(pattern(128 * KIB), takes=takes, strict=True, ask_again=lambda takes=takes: takes)
        view = empty(length + 512)[512:]
        with pytest.raises(AlignmentError):
            (here.read if op == READ else here.write)(512, view)
        assert not here.cached.seen
        assert (here.read if op == READ else here.write)(4096, empty(length)).outcome.kind is Kind.DIRECT
    here = Setting(pattern(128 * KIB), refuses=lambda bio: True, strict=True)
    with pytest.raises((NotDirectError, AlignmentError)):
        (here.read if op == READ else here.write)(0, empty(length))
    with pytest.raises(NotDirectError):
        for _ in range(8):
            (here.read if op == READ else here.write)(0, empty(64 * KIB))
    assert not here.cached.seen and here.data == pattern(128 * KIB)


def test_without_a_page_cache_a_refusal_is_an_error():
    here = Setting(pattern(8192), refuses=lambda bio: True, twin=False)
    with pytest.raises(NotDirectError, match="no page cache"):
        here.read(0, empty(512))


# --- the page cache -------------------------------------------------------------------------------


def test_the_page_cache_is_asked_for_what_is_counted_alone():
    """F02: the file may grow meanwhile; memory past the count stays as it was."""
    here = Setting(pattern(1000), at_open=False)
    for cuts in ([], [100, 700, 2000]):
        memory = laid_out(b"\xa5" * 4096, cuts, [3])
        assert here.read(300, *memory).transferred == 700
        assert b"".join(memory) == pattern(1000)[300:] + b"\xa5" * 3396
    assert here.read(1000, empty(10)).transferred == here.read(5000, empty(10)).transferred == 0


def test_nowait_does_not_write_through_the_page_cache():
    """F08: that would wait; nothing is done."""
    here = Setting(pattern(8192), at_open=False)
    with pytest.raises(WouldBlockError):
        here.write(0, empty(512), flags=NOWAIT)
    refusing = Setting(pattern(8192), refuses=lambda bio: bio.op == WRITE)
    for length in (512, 64 * KIB):
        with pytest.raises(WouldBlockError):
            refusing.write(0, empty(length), flags=NOWAIT)
    assert here.data == refusing.data == pattern(8192)
    view = empty(512)
    assert here.read(0, view, flags=NOWAIT).transferred == 512 and bytes(view) == pattern(8192)[:512]


# --- F41: sync ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_only", [False, True])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_sync_stays_failed(data_only, error):
    """F41: "try again" must not succeed: what was lost is lost. The data itself may still be read and written."""
    here = Setting(pattern(8192))
    here.run(here.file.sync(data_only=data_only))
    assert here.direct.seen[-1][::3] == (FLUSH, 0 if data_only else META)
    here.direct.errors[FLUSH] = [error]
    with pytest.raises(OSError) as first:
        here.run(here.file.sync(data_only=data_only))
    assert first.value.errno == error and not isinstance(first.value, StickySyncError)
    for _ in range(2):
        with pytest.raises(StickySyncError, match="newly opened"):
            here.run(here.file.sync())
        with pytest.raises(StickySyncError):
            here.write(0, empty(512), flags=FUA)
    assert here.read(0, empty(512)).transferred == here.write(0, empty(512)).transferred == 512


@pytest.mark.parametrize("offset", [0, 100])
def test_a_failed_durable_write_is_a_failed_sync(offset):
    """F41: its error is told once; afterwards nobody may believe that all is well."""
    here = Setting(pattern(8192))
    (here.direct if offset == 0 else here.cached).errors[WRITE] = [errno.EIO]
    with pytest.raises(DeviceError):
        here.write(offset, empty(512), flags=FUA)
    with pytest.raises(StickySyncError):
        here.run(here.file.sync())
    plain = Setting(pattern(8192))
    plain.direct.errors[WRITE] = [errno.EIO]
    with pytest.raises(DeviceError):
        plain.write(0, empty(512))
    plain.run(plain.file.sync())


def test_a_device_without_fua_is_flushed_after_each_durable_write():
    """B05, F41: the flush's error is the write's, and stays."""
    here = Setting(pattern(8192), claims=dataclasses.replace(CLAIMED, fua=False, volatile_cache=True))
    here.write(0, empty(512), flags=FUA)
    assert [op for op, *_ in here.direct.seen] == [WRITE, FLUSH]
    here.direct.errors[FLUSH] = [errno.EIO]
    with pytest.raises(DeviceError):
        here.write(0, empty(512), flags=FUA)
    with pytest.raises(StickySyncError):
        here.write(0, empty(512), flags=FUA)


# --- F03: growing ---------------------------------------------------------------------------------


def appends(
    sizes: Sequence[int], *, refused_at: int | None = None, flags: int = 0, skew: int = 0
) -> Callable[[Simulation], object]:
    """A scenario: so many appends at once; whoever looks at any moment sees only bytes that were written."""

    def scenario(sim: Simulation):
        contents = Contents()
        places = list(itertools.accumulate([0, *sizes]))
        final = pattern(places[-1])

        wrong: list[int] = []

        def check() -> None:
            if bytes(contents.data) != final[: len(contents.data)]:
                wrong.append(len(contents.data))

        contents.check = check
        limits = dataclasses.replace(CLAIMED, max_bio_bytes=2048, queue_depth=8)
        store = FakeFile("direct", contents, limits)
        if refused_at is not None:
            store.refuses = lambda bio: bio.op == WRITE and bio.addr + bio.length > refused_at
        direct = sim.device(store=store)
        cached = sim.device(store=FakeFile("cached", contents, dataclasses.replace(CACHED_LIMITS, max_bio_bytes=1000)))
        file = PlainFile(FileState(limits, "f", False), direct, cached, BufferPool(4096, 4))

        async def append(number: int) -> None:
            data = final[places[number] : places[number + 1]]
            view = misaligned(data, skew) if skew else aligned(data)
            moved = await file.write(places[number], [view], len(data), flags)
            assert moved.transferred == len(data)

        async def main() -> None:
            tasks = []
            for number in range(len(sizes)):
                # In the order of their offsets, as appends are.
                tasks.append(sim.scheduler.spawn(append(number)))
                while tasks[-1]._waits_for is None and not tasks[-1].done:
                    await yield_now()
            await gather(*tasks)
            assert not wrong, f"wrong bytes below these sizes: {wrong}"
            assert bytes(contents.data) == final

        return main()

    return scenario


@pytest.mark.parametrize("sizes", [[8192], [10000], [1, 511, 512, 5000], [4096, 4096, 100, 9000], [700] * 5])
@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("refused_at", [None, 0, 4096])
def test_every_byte_below_the_size_is_right(sizes, skew, refused_at):
    """F03: at every moment of every order, over bounced edges, several bios and falling back."""
    assert run_seeds(range(12), appends(sizes, refused_at=refused_at, skew=skew)) == 12


def test_every_order_of_two_small_appends():
    """F03: gone through exhaustively."""
    explored = explore(appends([1000, 700]), 800)
    assert explored.complete or explored.runs == 800


def test_out_of_order_a_hole_is_seen(monkeypatch):
    """F03: without the order some seed shows it, or the tests above show nothing."""
    whole = bounce.write

    async def unordered(*arguments, **options):
        return await whole(*arguments, **{**options, "ordered": False})

    monkeypatch.setattr(plainfile.bounce, "write", unordered)
    with pytest.raises(AssertionError, match="wrong bytes below"):
        run_seeds(range(40), appends([32 * KIB]))


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 20000), st.integers(0, 9000), st.sampled_from([0, 1, 512])),
        max_size=8,
    ),
    st.sampled_from([None, *[takes for takes, _ in CHOOSY[:2]]]),
)
def test_files_grow_as_the_model_does(operations, takes):
    """F05, F50: sizes are exact, gaps read as zeroes, whatever the kernel turns out to take."""
    here, model = Setting(takes=takes), ModelFile()
    for number, (writes, offset, length, skew) in enumerate(operations):
        if writes:
            data = pattern(length, number)
            view = misaligned(data, skew) if skew else aligned(data)
            assert here.write(offset, view).transferred == model.pwrite(data, offset)
        else:
            view = misaligned(b"\xa5" * length, skew) if skew else aligned(b"\xa5" * length)
            expected = model.pread(length, offset)
            assert here.read(offset, view).transferred == len(expected)
            assert bytes(view) == expected.ljust(length, b"\xa5")
        assert here.data == model.data


def test_a_write_past_the_largest_size():
    here = Setting(pattern(512))
    with pytest.raises(NoSpaceError) as caught:
        here.write(NO_END - 100, empty(512))
    assert caught.value.errno == errno.EFBIG and not here.direct.seen


def test_a_block_device_does_not_grow():
    """B09: it takes what there is room for."""
    here = Setting(pattern(8192), is_block=True)
    assert here.write(8192 - 512, empty(1024)).transferred == 512
    assert here.write(8000, misaligned(bytes(1000))).transferred == 192
    with pytest.raises(NoSpaceError):
        here.write(8192, empty(512))
    assert len(here.data) == 8192


# --- atomic, ranges -------------------------------------------------------------------------------


def test_an_atomic_write_goes_direct_or_not_at_all():
    """F43: neither bounced nor through the page cache, which promise nothing."""
    limits = atomic_limits(4096, base=CLAIMED)
    here = Setting(pattern(16 * KIB), claims=limits)
    assert here.write(4096, empty(4096), flags=ATOMIC | FUA) == Moved(
        4096, Outcome(Kind.DIRECT, Reason.NONE, Promise.DURABLE)
    )
    with pytest.raises(AtomicLimitError):
        here.write(0, empty(8192), flags=ATOMIC)
    for offset, view in ((100, empty(512)), (0, misaligned(bytes(512)))):
        with pytest.raises(AlignmentError):
            here.write(offset, view, flags=ATOMIC)
    here.state.refused[WRITE] = Reason.REFUSED
    with pytest.raises(AtomicLimitError, match="page cache"):
        here.write(0, empty(512), flags=ATOMIC)
    assert not here.cached.seen and len(here.direct.seen) == 1


def test_ranges_go_to_whichever_device_there_is():
    for at_open in (True, False):
        here = Setting(pattern(8192), at_open=at_open)
        for op in (ZERO, DISCARD):
            here.run(here.file.change_range(op, 512, 1024))
            assert (here.direct if at_open else here.cached).seen[-1][:3] == (op, 512, 1024)
        assert here.file.size_bytes == 8192
