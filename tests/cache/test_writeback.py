"""Write-back: stable images, one at a time for each page, errors told once to each whom they concern."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cache.pages_kit import PAGE, CachedFile, FakeFile, check_quiet, drive, explained

from odirect.base.errors import CorruptionError, DeviceError, ODirectError
from odirect.cache.pagecache import PageCache
from odirect.cache.writeback import RUN_BYTES, ErrorSequence, adjacent_runs
from odirect.sched.scheduler import Cancelled, Scheduler, Task
from odirect.sched.traps import joined, yield_now
from odirect.testing.sim import Simulation, explore, run_seeds

MANY = 1 << 30


def cached(data: bytes = b"", *, turns: int = 1) -> tuple[PageCache, CachedFile, FakeFile]:
    cache = PageCache()
    backing = FakeFile(data, turns=turns)
    return cache, CachedFile(cache, backing), backing


def until_writing(scheduler: Scheduler, file: CachedFile) -> None:
    """Run tasks up to where an image has just been handed to the device."""
    while not file.pages._writing:
        scheduler.pick().step()


# --- the error sequence -------------------------------------------------------------------------


def test_an_error_is_told_once_to_every_handle_that_was_open():
    """F41: never to those that were opened later, and never twice."""
    errors = ErrorSequence()
    early, other = errors.sample(), errors.sample()
    assert errors.check(early) == (early, None)
    first, second = DeviceError("first"), DeviceError("second")
    errors.note(first)
    late = errors.sample()
    assert errors.check(late) == (late, None)
    early, told = errors.check(early)
    assert told is first
    assert errors.check(early) == (early, None)
    errors.note(second)
    assert errors.check(early)[1] is second
    assert errors.check(late)[1] is second
    other, told = errors.check(other)
    assert told is second
    assert errors.check(other) == (other, None)


@given(st.lists(st.sampled_from(["open", "fail", "check"]), max_size=40), st.randoms(use_true_random=False))
def test_error_sequences_tell_what_happened_since(steps, rng):
    """F41: a handle is told exactly if something failed since it was opened or last told."""
    errors = ErrorSequence()
    handles: list[list[Any]] = []  # the number, and the latest error that the handle has to be told
    for step in steps:
        if step == "open":
            handles.append([errors.sample(), None])
        elif step == "fail":
            error = DeviceError("failed")
            errors.note(error)
            for handle in handles:
                handle[1] = error
        elif handles:
            handle = rng.choice(handles)
            handle[0], told = errors.check(handle[0])
            assert told is handle[1]
            handle[1] = None


# --- runs ---------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 60)), st.integers(1, 9))
def test_runs_cover_the_pages_and_nothing_else(pages, most):
    runs = adjacent_runs(sorted(pages), most)
    assert [page for first, stop in runs for page in range(first, stop)] == sorted(pages)
    for (_, stop), (first, _) in itertools.pairwise(runs):
        assert first > stop or first % most == 0
    assert all(0 < stop - first <= most for first, stop in runs)


def test_adjacent_pages_are_one_write():
    cache, file, backing = cached()
    for page in (1, 2, 3, 7, 9, 8):
        drive(file.write(page * PAGE, b"x" * PAGE))
    drive(file.pages.write_back(2 * PAGE + 5, 6 * PAGE))
    assert sorted(backing.writes) == [(2, 2), (7, 2)]
    drive(file.pages.write_back(0, MANY))
    assert sorted(backing.writes) == [(1, 1), (2, 2), (7, 2), (9, 1)]
    check_quiet(cache, file.pages)
    drive(file.pages.write_back(0, MANY))
    assert len(backing.writes) == 4
    assert backing.data() == file.model.data


def test_long_runs_are_cut_and_several_are_in_flight():
    """At most 4 MiB a run, and four such at once."""
    cache = PageCache(1 << 30)
    backing = FakeFile(page_bytes=64 << 10, turns=3)
    file = CachedFile(cache, backing)
    drive(file.write(0, bytes(100) + b"x" * (9 * RUN_BYTES)))
    in_flight = 0

    def note() -> None:
        nonlocal in_flight
        in_flight = max(in_flight, len(cache._images))

    backing.before_write = note
    drive(file.pages.write_back(0, MANY))
    pages = RUN_BYTES // backing.page_bytes
    assert sorted(backing.writes) == [*((run * pages, pages) for run in range(9)), (9 * pages, 1)]
    assert in_flight == 4 + 1  # The last page has small memory.
    assert backing.data() == file.model.data
    check_quiet(cache, file.pages)


def test_scattered_pages_go_many_at_a_time():
    cache, file, backing = cached(turns=5)
    for page in range(0, 200, 2):
        drive(file.write(page * PAGE, bytes([page + 1]) * PAGE))
    most = 0

    def note() -> None:
        nonlocal most
        most = max(most, len(cache._images))

    backing.before_write = note
    drive(file.pages.write_back(0, MANY))
    assert most == 16
    assert backing.data() == file.model.data
    check_quiet(cache, file.pages)


# --- pages that change meanwhile ----------------------------------------------------------------


def test_a_page_that_changes_while_it_is_written_stays_dirty():
    """F21: the image does not change, readers see the new bytes, and these are written next."""
    cache, file, backing = cached(b"o" * 2 * PAGE, turns=3)
    drive(file.write(0, b"a" * 2 * PAGE))
    scheduler = Scheduler()
    task = scheduler.spawn(file.pages.write_back(0, MANY))
    until_writing(scheduler, file)
    assert file.pages.is_dirty(0, 1)
    assert drive(file.write(10, b"bbb")) == 3  # Neither this nor the next waits for the write.
    assert drive(file.read(8, 7)) == b"aabbbaa"
    scheduler.run_ready()
    task.result()
    assert backing.blocks[0] == b"a" * PAGE
    assert file.pages.is_dirty(0, 1)
    assert not file.pages.is_dirty(PAGE, 1)
    assert cache.dirty_bytes == file.pages.dirty_bytes == PAGE
    check_quiet(cache, file.pages)
    drive(file.pages.write_back(0, MANY))
    assert backing.data() == file.model.data


def test_write_back_waits_for_what_is_being_written():
    """And writes it again, after that, if it has changed: never two writes of one page in flight."""
    for changes in (False, True):
        cache, file, backing = cached(b"o" * PAGE, turns=4)
        drive(file.write(0, b"a"))
        scheduler = Scheduler()
        first = scheduler.spawn(file.pages.write_back(0, MANY))
        until_writing(scheduler, file)
        if changes:
            drive(file.write(0, b"b"))
        second = scheduler.spawn(file.pages.write_back(0, MANY))
        waiter = scheduler.spawn(file.pages.wait_write_back(0, MANY))
        while not second.done:
            assert not waiter.done or not file.pages._writing or changes
            scheduler.pick().step()
        assert first.done
        scheduler.run_ready()
        waiter.result()
        assert len(backing.writes) == 1 + changes
        assert backing.blocks[0][:1] == (b"b" if changes else b"a")
        check_quiet(cache, file.pages)


def test_a_new_page_that_is_written_again_meanwhile_is_promised_space_for_both():
    """F30: the promise of the image and that of the page are counted apart, and both come back."""
    cache, file, backing = cached(turns=3)
    drive(file.write(0, b"a" * 3 * PAGE))
    scheduler = Scheduler()
    task = scheduler.spawn(file.pages.write_back(0, MANY))
    until_writing(scheduler, file)
    drive(file.write(PAGE, b"b" * PAGE))
    assert backing.reserved == 4 == explained(file.pages)
    scheduler.run_ready()
    task.result()
    assert backing.reserved == 1 == explained(file.pages)
    drive(file.pages.write_back(0, MANY))
    assert backing.reserved == 0
    check_quiet(cache, file.pages)


def test_a_full_device_takes_a_page_that_is_being_written_again():
    """F30: what is still to be allocated counts twice for a moment; that refuses nobody."""
    cache, file, backing = cached(turns=3)
    backing.free = 1
    drive(file.write(0, b"a" * PAGE))
    scheduler = Scheduler()
    task = scheduler.spawn(file.pages.write_back(0, MANY))
    until_writing(scheduler, file)
    again = scheduler.spawn(file.write(0, b"b" * PAGE))
    scheduler.run_ready()
    task.result()
    assert again.result() == PAGE
    drive(file.pages.write_back(0, MANY))
    assert backing.blocks == {0: b"b" * PAGE}
    assert backing.free == 0
    check_quiet(cache, file.pages)


# --- errors -------------------------------------------------------------------------------------


def test_a_failed_run_is_noted_once_and_raised():
    """F41: each failing run once; its pages can still be read and are not dirty; the other runs are written."""
    cache, file, backing = cached()
    for page in (0, 1, 4, 5, 8, 9):
        drive(file.write(page * PAGE, b"x" * PAGE))
    backing.bad_writes = {1, 5}
    early = file.pages.errors.sample()
    with pytest.raises(DeviceError, match="cannot write"):
        drive(file.pages.write_back(0, MANY))
    assert file.pages.errors.sample() == early + 2
    assert sorted(backing.blocks) == [8, 9]
    assert file.pages.dirty_bytes == 0
    assert backing.reserved == 0
    assert drive(file.read(0, 10 * PAGE)) == file.model.data
    drive(file.pages.write_back(0, MANY))
    late = file.pages.errors.sample()
    assert isinstance(file.pages.errors.check(early)[1], DeviceError)
    assert file.pages.errors.check(late)[1] is None
    check_quiet(cache, file.pages)


def test_everybody_who_waits_for_a_failing_write_is_told():
    cache, file, backing = cached(turns=4)
    drive(file.write(0, b"x" * PAGE))
    backing.bad_writes = {0}
    scheduler = Scheduler()
    first = scheduler.spawn(file.pages.write_back(0, MANY))
    until_writing(scheduler, file)
    second = scheduler.spawn(file.pages.write_back(0, 1))
    third = scheduler.spawn(cache.write_back())
    waiter = scheduler.spawn(file.pages.wait_write_back(0, MANY))
    scheduler.run_ready()
    assert all(isinstance(task.error, DeviceError) for task in (first, second, third))
    assert waiter.error is None
    assert file.pages.errors.sample() == 1
    check_quiet(cache, file.pages)


def test_a_page_changed_while_its_write_failed_is_tried_again():
    cache, file, backing = cached(turns=3)
    drive(file.write(0, b"a" * PAGE))
    backing.bad_writes = {0}
    scheduler = Scheduler()
    task = scheduler.spawn(file.pages.write_back(0, MANY))
    until_writing(scheduler, file)
    drive(file.write(0, b"b"))
    scheduler.run_ready()
    assert isinstance(task.error, DeviceError)
    assert file.pages.is_dirty(0, 1)
    check_quiet(cache, file.pages)
    backing.bad_writes = set()
    drive(file.pages.write_back(0, MANY))
    assert backing.data() == file.model.data


def test_what_says_nothing_about_the_data_leaves_it_dirty():
    """A bug of the file system's is raised to the caller; what was not written is not taken for written."""
    cache, file, backing = cached()
    drive(file.write(0, b"a" * 2 * PAGE))

    def break_down() -> None:
        raise KeyError("a bug")

    backing.before_write = break_down
    with pytest.raises(KeyError):
        drive(file.pages.write_back(0, MANY))
    with pytest.raises(KeyError):
        drive(cache.write_back())
    assert file.pages.dirty_bytes == 2 * PAGE
    assert backing.reserved == 2
    assert file.pages.errors.sample() == 0
    check_quiet(cache, file.pages)
    backing.before_write = lambda: None
    drive(file.pages.write_back(0, MANY))
    assert backing.data() == file.model.data
    check_quiet(cache, file.pages)


def test_a_whole_cache_is_written_back():
    """Every file's pages; the first error after all of them."""
    cache = PageCache()
    files = [CachedFile(cache, FakeFile()) for _ in range(3)]
    for file in files:
        drive(file.write(3 * PAGE, b"x" * PAGE))
    files[0].backing.bad_writes = {3}
    with pytest.raises(DeviceError):
        drive(cache.write_back())
    assert [len(file.backing.blocks) for file in files] == [0, 1, 1]
    assert cache.dirty_bytes == 0
    drive(cache.write_back())
    check_quiet(cache, *(file.pages for file in files))


# --- cancelling ---------------------------------------------------------------------------------


def test_a_cancelled_caller_loses_no_write():
    """Cancelling a caller cancels his wait, never an I/O in flight: that one ends, others do not begin."""
    cache, file, backing = cached(turns=6)
    for page in range(0, 80, 2):
        drive(file.write(page * PAGE, b"x" * PAGE))
    scheduler = Scheduler()
    task = scheduler.spawn(file.pages.write_back(0, MANY))
    until_writing(scheduler, file)
    while not backing.writes:
        scheduler.pick().step()
    task.cancel()
    scheduler.run_ready()
    assert isinstance(task.error, Cancelled)
    assert 0 < len(backing.writes) <= 16
    assert len(backing.blocks) == len(backing.writes)
    assert file.pages.dirty_bytes == (40 - len(backing.writes)) * PAGE
    check_quiet(cache, file.pages)
    drive(file.pages.write_back(0, MANY))
    assert backing.data() == file.model.data


# --- many tasks ---------------------------------------------------------------------------------


def _handles(sim: Simulation):
    """Handles that open, write, sync and read while writes fail now and then (F41)."""
    rng = sim.rng
    cache = PageCache(rng.choice([4 * PAGE, 1 << 20]))
    backing = FakeFile(b"\1" * 6 * PAGE, turns=rng.randrange(3))
    file = CachedFile(cache, backing)
    noted: list[ODirectError] = []
    original = file.pages.errors.note

    def note(error: ODirectError) -> None:
        noted.append(error)
        original(error)

    file.pages.errors = Recording(note, file.pages.errors)  # type: ignore[assignment]

    async def handle() -> None:
        opened = len(noted)
        seen = file.pages.errors.sample()
        for _ in range(6):
            offset = rng.randrange(6 * PAGE)
            action = rng.choice(["write", "sync", "check", "break", "mend"])
            if action == "write":
                await file.write(offset, rng.randbytes(min(PAGE, 6 * PAGE - offset)))
            elif action == "sync":
                before = len(noted)
                dirty = file.pages.is_dirty(0, MANY)
                try:
                    await file.pages.write_back(0, MANY)
                except DeviceError as error:
                    assert dirty
                    assert error in noted
                else:
                    assert all(error in noted for error in noted[before:])
            elif action == "break":
                backing.bad_writes = {rng.randrange(6)}
            elif action == "mend":
                backing.bad_writes = set()
            seen, told = file.pages.errors.check(seen)
            assert (told is None) == (len(noted) == opened)
            assert told is None or told is noted[-1]
            opened = len(noted)

    async def main() -> None:
        tasks = [sim.spawn(handle()) for _ in range(4)]
        for task in tasks:
            await joined(task)
        backing.bad_writes = set()
        await file.pages.write_back(0, MANY)
        assert backing.reserved == 0
        check_quiet(cache, file.pages)

    return main()


class Recording:
    """An ErrorSequence whose `note` is seen."""

    def __init__(self, note: Any, errors: ErrorSequence) -> None:
        self.note = note
        self.sample = errors.sample
        self.check = errors.check


def test_every_handle_is_told_of_what_failed_since_it_was_opened():
    run_seeds(range(150), _handles)


def _two_syncs(sim: Simulation):
    """A writer and two who write back, one of whom is cancelled; the page may fail once."""
    cache = PageCache()
    backing = FakeFile(b"o" * PAGE, turns=0)
    file = CachedFile(cache, backing)

    async def main() -> None:
        await file.write(0, b"a")
        tasks: list[Task[Any]] = [
            sim.spawn(file.pages.write_back(0, PAGE)),
            sim.spawn(file.pages.write_back(0, PAGE)),
            sim.spawn(file.write(3, b"b")),
        ]
        await yield_now()
        tasks[0].cancel()
        for task in tasks:
            try:
                await joined(task)
            except Cancelled:
                assert task is tasks[0]
        await file.pages.write_back(0, PAGE)
        assert backing.data() == file.model.data
        check_quiet(cache, file.pages)

    return main()


def test_every_order_of_two_who_write_back():
    """No page is lost, none is written twice at once, whoever is cancelled wherever."""
    assert explore(_two_syncs, max_states=200).runs > 50


def test_corruption_met_by_write_back_is_an_error_too():
    cache, file, backing = cached()
    drive(file.write(0, b"a"))

    def corrupt() -> None:
        raise CorruptionError("an indirect block")

    backing.before_write = corrupt
    with pytest.raises(CorruptionError):
        drive(file.pages.write_back(0, MANY))
    assert file.pages.errors.sample() == 1
    assert not file.pages.dirty_bytes
    check_quiet(cache, file.pages)
