"""Bios on a ring: each comes back once, as itself, with the kernel's answer."""

from __future__ import annotations

import collections
import errno
from collections.abc import Sequence

import pytest

from odirect.block.bio import READ, WRITE, Bio
from odirect.block.queue import RingQueue, Step


class FakeRing:
    """A ring whose answers the test gives; `calls` is what it was asked."""

    def __init__(self) -> None:
        self.queued: list[tuple[object, ...]] = []
        self.running: list[tuple[object, ...]] = []
        self.answers: collections.deque[tuple[object, int]] = collections.deque()
        self.calls: list[tuple[object, ...]] = []
        self.closed = 0

    @property
    def in_flight(self) -> int:
        return len(self.queued) + len(self.running)

    def queue(
        self, op: int, handle: int, segments: Sequence[object], offset: int, length: int, flags: int, tag: object
    ) -> None:
        self.queued.append((op, handle, tuple(segments), offset, length, flags, tag))

    def commit(self) -> None:
        self.calls.append(("commit", len(self.queued)))
        self.running += self.queued
        self.queued = []

    def reap(self, timeout_ns: int, into: list[tuple[object, int]]) -> None:
        self.calls.append(("reap", timeout_ns))
        answers, self.answers = list(self.answers), collections.deque()
        tags = [tag for tag, _ in answers]
        self.running = [entry for entry in self.running if entry[-1] not in tags]
        into += answers

    def wakeup_fd(self) -> int:
        return 42

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def ring() -> FakeRing:
    return FakeRing()


def bio(op: int = READ, addr: int = 4096) -> Bio:
    return Bio(op, addr, (memoryview(bytearray(512)),), 512)


def test_a_bio_is_one_operation(ring):
    """B02: with its own segments, and itself as the tag."""
    queue, first = RingQueue(ring), bio()
    queue.submit(READ, 5, first, 8)
    assert ring.queued == [(READ, 5, first.segments, 4096, 512, 8, first)]
    assert queue.in_flight == 1 and not ring.calls
    queue.commit()
    ring.answers.append((first, 512))
    assert queue.poll(-1) == [first] and ring.calls == [("commit", 1), ("reap", -1)]
    assert (first.done_bytes, first.error, queue.in_flight) == (512, 0, 0)
    assert queue.wakeup_fd() == 42


def test_answers_are_counts_or_errors(ring):
    """F04: short counts and zeroes are told as they are."""
    queue = RingQueue(ring)
    bios = [bio() for _ in range(4)]
    for each in bios:
        queue.submit(READ, 5, each, 0)
    queue.commit()
    ring.answers.extend(zip(bios, (512, 100, 0, -errno.EIO), strict=True))
    assert queue.poll(0) == bios
    assert [(each.done_bytes, each.error) for each in bios] == [(512, 0), (100, 0), (0, 0), (0, errno.EIO)]
    assert queue.poll(0) == []


def test_a_bio_of_several_steps_comes_back_after_the_last(ring):
    """The next step is handed over at once: nobody else may come by and commit."""
    queue, write, other = RingQueue(ring), bio(WRITE), bio()

    def flushed(result: int) -> int | None:
        if result < 0:
            return result
        queue.submit(WRITE, 5, write, 0)
        return None

    queue.submit_step(2, 5, Step(write, flushed), 1, data=False)
    queue.submit(READ, 5, other, 0)
    assert ring.queued[0][2:5] == ((), 0, 0)
    queue.commit()
    ring.answers.extend([(ring.running[0][-1], 0), (other, 512)])
    assert queue.poll(-1) == [other]
    assert [entry[-1] for entry in ring.running] == [write] and queue.in_flight == 1
    ring.answers.append((write, 512))
    assert queue.poll(-1) == [write] and write.done_bytes == 512
    failing = bio(WRITE)
    queue.submit_step(WRITE, 5, Step(failing, flushed), 0)
    assert ring.queued[0][2:5] == (failing.segments, 4096, 512)
    queue.commit()
    ring.answers.append((ring.running[0][-1], -errno.ENOSPC))
    assert queue.poll(-1) == [failing] and failing.error == errno.ENOSPC


def test_a_step_may_change_the_answer(ring):
    queue, first = RingQueue(ring), bio()
    queue.submit_step(READ, 5, Step(first, lambda result: 7), 0)
    queue.commit()
    ring.answers.append((ring.running[0][-1], -errno.EINVAL))
    assert queue.poll(-1) == [first] and (first.done_bytes, first.error) == (7, 0)


def test_whatever_has_finish_may_be_a_tag(ring):
    """B07: a request takes its answer itself, and is no bio to be dispatched."""

    class Request:
        def finish(self, result: int) -> None:
            answers.append(result)

    answers: list[int] = []
    queue, request, first = RingQueue(ring), Request(), bio()
    ring.queue(READ, 5, (), 0, 0, 0, request)
    queue.submit(READ, 5, first, 0)
    queue.commit()
    ring.answers.extend([(request, 512), (first, 512)])
    assert queue.poll(-1) == [first] and answers == [512]


def test_hipri_bios_go_to_a_ring_of_their_own(ring):
    """B06: made at the first one; where there is none, the caller is told so."""
    made: list[FakeRing] = []

    def open_polled() -> FakeRing:
        made.append(FakeRing())
        return made[-1]

    queue = RingQueue(ring, open_polled=open_polled)
    first, second, plain = bio(), bio(), bio()
    assert not made
    for each in (first, second):
        assert queue.submit_polled(READ, 9, Step(each, lambda result: result), 0)
    assert len(made) == 1 and not ring.queued
    polled = made[0]
    queue.commit()
    polled.answers.append((polled.running[0][-1], 512))
    assert queue.poll(-1) == [first] and polled.calls[-1] == ("reap", -1)
    # With both rings busy it asks the two in turn until there is something.
    queue.submit(READ, 5, plain, 0)
    queue.commit()
    answer = ring.reap
    turns = []

    def later(timeout_ns: int, into: list[tuple[object, int]]) -> None:
        turns.append(timeout_ns)
        if len(turns) == 3:
            ring.answers.append((plain, 512))
        answer(timeout_ns, into)

    ring.reap = later  # type: ignore[method-assign]
    assert queue.in_flight == 2 and queue.poll(0) == []
    assert queue.poll(-1) == [plain] and turns == [0, 0, 0]
    assert not RingQueue(ring).submit_polled(READ, 9, Step(first, lambda result: result), 0)
    queue.close()
    assert ring.closed == polled.closed == 1


def test_a_queue_without_polled_bios_does_not_ask_for_them(ring):
    """B06: an idle polling ring is not spun on."""
    polled = FakeRing()
    queue = RingQueue(ring, open_polled=lambda: polled)
    first, plain = bio(), bio()
    queue.submit_polled(READ, 9, Step(first, lambda result: result), 0)
    queue.commit()
    polled.answers.append((polled.running[0][-1], 512))
    queue.poll(-1)
    polled.calls.clear()
    queue.submit(READ, 5, plain, 0)
    queue.commit()
    ring.answers.append((plain, 512))
    assert queue.poll(-1) == [plain]
    assert ("reap", -1) in ring.calls and not [call for call in polled.calls if call[0] == "reap"]


def test_answers_are_gathered_by_whoever_empties_the_list(ring):
    """B07: nothing of the tags is called; what is left is given out again, or settled by a poll."""
    queue, first, second = RingQueue(ring), bio(), bio()
    for each in (first, second):
        queue.submit(READ, 5, each, 0)
    queue.commit()
    ring.answers.extend([(first, 512), (second, 100)])
    answers = queue.gather()
    assert answers == [(first, 512), (second, 100)] and queue.in_flight == 2
    del answers[0]
    assert queue.gather() is answers == [(second, 100)]
    assert queue.poll(-1) == [second] and second.done_bytes == 100 and not queue.in_flight
    assert [call for call in ring.calls if call[0] == "reap"] == [("reap", -1), ("reap", 0)]


def test_nothing_is_gathered_beside_polled_bios(ring):
    """B06: those take `poll`."""
    queue = RingQueue(ring, open_polled=FakeRing)
    queue.submit_polled(READ, 9, Step(bio(), lambda result: result), 0)
    assert queue.gather() is None


def test_a_poll_of_two_rings_can_be_woken(ring):
    """B06: also while it spins on both."""
    polled = FakeRing()
    queue = RingQueue(ring, open_polled=lambda: polled)
    ring.wake = lambda: None  # type: ignore[attr-defined]
    queue.submit_polled(READ, 9, Step(bio(), lambda result: result), 0)
    queue.submit(READ, 5, bio(), 0)
    queue.commit()
    queue.wake()
    assert queue.poll(-1) == [] and queue.in_flight == 2
