"""Every ring keeps the contract of ring/contract.py: one suite over io_uring and threads."""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import mmap
import os
import select
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ring.conftest import BLOCK, BLOCKS, Blocked, MakeRing, blocks, new_ring, reap_all, run_python

from odirect.base.errors import ClosedError
from odirect.ring import contract, threads
from odirect.ring.contract import DATA_ONLY, DISCARD, FSYNC, READ, RWF_DSYNC, RWF_HIPRI, WRITE, ZERO, Ring

#: The kinds that have something in flight behind the caller's back; threads-0 never has.
can_wait = pytest.mark.parametrize("kind", ["uring", "uring-shared", "threads-4"])


def single(ring: Ring, op: int, handle: int, segments: object, offset: int, length: int, flags: int = 0) -> int:
    """The answer to one operation."""
    ring.queue(op, handle, segments, offset, length, flags, "it")  # type: ignore[arg-type]
    (answer,) = reap_all(ring).items()
    assert answer[0] == "it"
    return answer[1]


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


# --- operations ----------------------------------------------------------------------------------


def test_numbers_are_those_of_bios() -> None:
    """The device layer passes `Bio.op` straight on."""
    from odirect.block.bio import Op

    assert (READ, WRITE, FSYNC, DISCARD, ZERO) == (Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.ZERO)


def test_reads_one_segment(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes) -> None:
    ring = make_ring()
    handle = ring.add_file(fd)
    for index, piece in enumerate(blocks(memory)):
        ring.queue(READ, handle, (piece,), index * BLOCK, BLOCK, 0, index)
    assert ring.in_flight == BLOCKS
    assert reap_all(ring) == dict.fromkeys(range(BLOCKS), BLOCK)
    assert memory[:] == content
    ring.remove_file(handle)


@pytest.mark.parametrize("kind_of_sequence", [tuple, list, iter])
def test_segments_come_in_any_sequence(
    make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes, kind_of_sequence: type
) -> None:
    ring = make_ring()
    assert single(ring, READ, fd, kind_of_sequence(blocks(memory)[:1]), 0, BLOCK) == BLOCK
    assert single(ring, READ, fd, kind_of_sequence(blocks(memory)[1:3]), BLOCK, 2 * BLOCK) == 2 * BLOCK
    assert memory[: 3 * BLOCK] == content[: 3 * BLOCK]


def test_reads_scattered_segments(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes) -> None:
    ring = make_ring()
    pieces = blocks(memory)
    assert single(ring, READ, ring.add_file(fd), pieces[::-1], 0, BLOCKS * BLOCK) == BLOCKS * BLOCK
    assert b"".join(pieces[::-1]) == content


def test_slots_are_used_again_with_other_shapes(
    make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes
) -> None:
    """A slot that carried many segments carries one, a sync, and many again."""
    ring = make_ring(1)
    pieces = blocks(memory)
    for count in (64, 1, 3, 0, 64, 2, 1):
        memory[:] = bytes(len(memory))
        if count:
            assert single(ring, READ, fd, pieces[:count], 0, count * BLOCK) == count * BLOCK
        else:
            assert single(ring, FSYNC, fd, (), 0, 0) == 0
        assert memory[: count * BLOCK] == content[: count * BLOCK]
        assert not any(memory[count * BLOCK :])


def test_writes_and_syncs(make_ring: MakeRing, fd: int, path: Path, memory: mmap.mmap, content: bytes) -> None:
    """B05: DSYNC writes; FSYNC with and without DATA_ONLY."""
    ring = make_ring()
    handle = ring.add_file(fd)
    memory[:] = content[::-1]
    pieces = blocks(memory)
    for index in range(0, BLOCKS, 2):
        flags = RWF_DSYNC if index % 4 else 0
        ring.queue(WRITE, handle, pieces[index : index + 2], index * BLOCK, 2 * BLOCK, flags, index)
    assert set(reap_all(ring).values()) == {2 * BLOCK}
    assert single(ring, FSYNC, handle, (), 0, 0, DATA_ONLY) == 0
    assert single(ring, FSYNC, handle, (), 0, 0) == 0
    assert path.read_bytes() == content[::-1]


def test_discards_and_zeroes(make_ring: MakeRing, fd: int, path: Path, content: bytes) -> None:
    ring = make_ring()
    assert single(ring, DISCARD, fd, (), BLOCK, 2 * BLOCK) == 0
    assert single(ring, ZERO, fd, (), 8 * BLOCK, BLOCK) == 0
    assert single(ring, ZERO, fd, (), len(content), BLOCK) == 0
    expected = bytearray(content)
    expected[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
    expected[8 * BLOCK : 9 * BLOCK] = bytes(BLOCK)
    assert path.read_bytes() == expected  # and not longer


def test_end_of_file(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes) -> None:
    """F02, B09: a read that crosses the end is short, one past it gives 0.

    What the kernel does to the buffer past the count is its own affair (ext4 fills it with zeroes).
    """
    ring = make_ring()
    view = memoryview(memory)
    assert single(ring, READ, fd, (view[: 4 * BLOCK],), len(content) - BLOCK, 4 * BLOCK) == BLOCK
    assert single(ring, READ, fd, blocks(memory)[4:6], len(content) - BLOCK, 2 * BLOCK) == BLOCK
    assert single(ring, READ, fd, (view[8 * BLOCK : 9 * BLOCK],), len(content), BLOCK) == 0
    assert single(ring, READ, fd, (view[8 * BLOCK : 9 * BLOCK],), 1 << 40, BLOCK) == 0
    assert memory[:BLOCK] == memory[4 * BLOCK : 5 * BLOCK] == content[-BLOCK:]


def test_any_buffer_is_a_segment(make_ring: MakeRing, path: Path, content: bytes) -> None:
    """bytearray, memoryview, array, NumPy of any type, and bytes for a write."""
    ring = make_ring()
    buffered = os.open(path, os.O_RDWR)
    try:
        buffers = [
            bytearray(600),
            memoryview(bytearray(600)),
            array.array("d", [0.0] * 75),
            numpy.zeros((3, 25), dtype=numpy.int64),
        ]
        for buffer in buffers:
            assert single(ring, READ, buffered, (buffer,), 100, 600) == 600
            assert bytes(buffer) == content[100:700]
            assert single(ring, READ, buffered, (buffer, bytearray(1)), 200, 601) == 601
            assert bytes(buffer) == content[200:800]
        assert single(ring, WRITE, buffered, (b"abc", numpy.frombuffer(b"defg", dtype="u1")), 7, 7) == 7
        assert path.read_bytes()[7:14] == b"abcdefg"
    finally:
        os.close(buffered)


def test_nothing_to_transfer(make_ring: MakeRing, fd: int) -> None:
    """G02: length 0, with an empty segment, several, and none."""
    ring = make_ring()
    for segments in ((), (bytearray(),), (bytearray(), bytearray())):
        assert single(ring, READ, fd, segments, 0, 0) == 0


def test_hipri_is_harmless(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes) -> None:
    """B06: where nothing polls, the flag changes nothing."""
    ring = make_ring()
    assert single(ring, READ, fd, blocks(memory)[:1], 0, BLOCK, RWF_HIPRI) == BLOCK
    assert memory[:BLOCK] == content[:BLOCK]


# --- what is refused, by the kernel and by the ring ------------------------------------------------


def test_kernel_errors_come_back_as_answers(make_ring: MakeRing, fd: int, path: Path, memory: mmap.mmap) -> None:
    ring = make_ring()
    piece = blocks(memory)[0]
    assert single(ring, READ, -1, (piece,), 0, BLOCK) == -errno.EBADF
    assert single(ring, FSYNC, 0x3FFFFFF, (), 0, 0) == -errno.EBADF
    assert single(ring, READ, fd, (piece,), -1, BLOCK) == -errno.EINVAL
    assert single(ring, READ, fd, (piece,), -BLOCK, BLOCK) == -errno.EINVAL
    assert single(ring, READ, fd, (piece[1:513],), 0, 512) in (-errno.EINVAL, 512)  # some take any address
    assert single(ring, DISCARD, fd, (), 0, 0) == -errno.EINVAL
    read_only = os.open(path, os.O_RDONLY)
    try:
        assert single(ring, WRITE, read_only, (b"x",), 0, 1) == -errno.EBADF
        assert single(ring, READ, read_only, [bytearray(1)] * 1025, 0, 1025) == -errno.EINVAL
    finally:
        os.close(read_only)


def test_an_error_does_not_touch_its_neighbours(
    make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes
) -> None:
    """B04, F06: with every other operation failing, each answer is its own."""
    ring = make_ring(8)
    for index, piece in enumerate(blocks(memory)):
        ring.queue(READ, fd if index % 2 else -1, (piece,), index * BLOCK, BLOCK, 0, index)
    answers = reap_all(ring)
    assert answers == {index: BLOCK if index % 2 else -errno.EBADF for index in range(BLOCKS)}
    for index, piece in enumerate(blocks(memory)):
        assert bytes(piece) == (content[index * BLOCK :][:BLOCK] if index % 2 else bytes(BLOCK))


def test_a_mapping_cut_short_is_efault(make_ring: MakeRing, scratch: Path, fd: int) -> None:
    """F23: no SIGBUS, no hang: EFAULT, for reading into it and for writing from it."""
    ring = make_ring()
    victim = os.open(scratch / "victim", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(victim, 4 * BLOCK)
        with mmap.mmap(victim, 4 * BLOCK) as mapping, memoryview(mapping) as view:
            os.ftruncate(victim, 0)
            assert single(ring, READ, fd, (view[:BLOCK],), 0, BLOCK) == -errno.EFAULT
            assert single(ring, WRITE, fd, (view[BLOCK : 2 * BLOCK],), 0, BLOCK) == -errno.EFAULT
            pair = (view[:BLOCK], view[BLOCK : 2 * BLOCK])
            assert single(ring, READ, fd, pair, 0, 2 * BLOCK) == -errno.EFAULT
            for piece in pair:
                piece.release()
            gc.collect()
    finally:
        os.close(victim)


@pytest.mark.parametrize("count", [1, 2])
def test_bad_segments_are_refused_before_anything_is_queued(make_ring: MakeRing, fd: int, count: int) -> None:
    ring = make_ring()
    good: list[object] = [bytearray(8)] * (count - 1)
    striped = memoryview(bytearray(16))[::2]
    with pytest.raises(ValueError):
        ring.queue(READ, fd, [*good, b"8 bytes."], 0, 8 * count, 0, None)
    with pytest.raises(ValueError):
        ring.queue(READ, fd, [*good, striped], 0, 8 * count, 0, None)
    with pytest.raises(ValueError):
        ring.queue(WRITE, fd, [*good, striped], 0, 8 * count, 0, None)
    with pytest.raises(ValueError, match="operation 7"):
        ring.queue(WRITE, fd, [*good, b"8 bytes."], 0, 7, 0, None)
    with pytest.raises(TypeError):
        ring.queue(READ, fd, [*good, "text"], 0, 8 * count, 0, None)
    with pytest.raises(ValueError, match="not an operation"):
        ring.queue(9, fd, [], 0, 0, 0, None)
    with pytest.raises(OverflowError):
        ring.queue(READ, fd, [*good, bytearray(8)], 1 << 63, 8 * count, 0, None)
    assert ring.in_flight == 0
    assert ring.reap(-1) == []
    good_one = bytearray(8)
    with pytest.raises(ValueError):
        ring.queue(READ, fd, [good_one, b"8 bytes."], 0, 16, 0, None)
    good_one.append(1)  # and no export of it is left behind


@pytest.mark.parametrize("depth", [0, -1])
def test_depth_is_checked(kind: str, depth: int) -> None:
    with pytest.raises(ValueError, match="depth"):
        new_ring(kind, depth)


# --- the queue -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 8, 200])
def test_more_than_depth(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes, depth: int) -> None:
    """Every operation is answered once, however many are queued at once."""
    ring = make_ring(depth)
    assert ring.depth == depth
    handle = ring.add_file(fd)
    pieces = blocks(memory)
    count = 5 * BLOCKS
    for index in range(count):
        ring.queue(READ, handle, (pieces[index % BLOCKS],), index % BLOCKS * BLOCK, BLOCK, 0, index)
    assert ring.in_flight == count
    assert reap_all(ring) == dict.fromkeys(range(count), BLOCK)
    assert memory[:] == content


def test_queueing_while_reaping(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes) -> None:
    """A steady stream: each answer brings the next operation."""
    ring = make_ring(4)
    pieces = blocks(memory)
    todo = iter(range(BLOCKS))
    for index in [next(todo) for _ in range(6)]:
        ring.queue(READ, fd, (pieces[index],), index * BLOCK, BLOCK, 0, index)
    seen = []
    while ring.in_flight:
        for tag, result in ring.reap(-1):
            assert result == BLOCK
            seen.append(tag)
            for index in todo:
                ring.queue(READ, fd, (pieces[index],), index * BLOCK, BLOCK, 0, index)
                break
    assert sorted(seen) == list(range(BLOCKS))  # type: ignore[type-var]
    assert memory[:] == content


def test_tags_are_the_very_objects_and_are_let_go(make_ring: MakeRing, fd: int, memory: mmap.mmap) -> None:
    class Tag:
        pass

    ring = make_ring()
    tag = Tag()
    ring.queue(READ, fd, blocks(memory)[:1], 0, BLOCK, 0, tag)
    ((back, _),) = ring.reap(-1)
    assert back is tag
    weak = weakref.ref(tag)
    del tag, back
    gc.collect()
    assert weak() is None


def test_buffers_are_kept_and_let_go(make_ring: MakeRing, path: Path) -> None:
    """F24: from `queue` until the answer a buffer cannot be resized; afterwards it can."""
    ring = make_ring()
    buffered = os.open(path, os.O_RDONLY)
    try:
        for buffers in ([bytearray(100)], [bytearray(100), bytearray(100)]):
            ring.queue(READ, buffered, buffers, 0, 100 * len(buffers), 0, None)
            with pytest.raises(BufferError):
                buffers[-1].append(0)
            assert reap_all(ring) == {None: 100 * len(buffers)}
            gc.collect()
            buffers[-1].append(0)
    finally:
        os.close(buffered)


def test_reap_with_nothing_in_flight(make_ring: MakeRing) -> None:
    """It does not wait, whatever the timeout."""
    ring = make_ring()
    for timeout_ns in (0, 10**12, -1):
        assert ring.reap(timeout_ns) == []
    ring.commit()


def test_reap_zero_looks(make_ring: MakeRing, fd: int, memory: mmap.mmap) -> None:
    """reap(0) gets there too, without ever waiting."""
    ring = make_ring()
    for index, piece in enumerate(blocks(memory)):
        ring.queue(READ, fd, (piece,), index * BLOCK, BLOCK, 0, index)
    answers: list[tuple[object, int]] = []
    while len(answers) < BLOCKS:
        answers += ring.reap(0)
    assert sorted(answers) == [(index, BLOCK) for index in range(BLOCKS)]  # type: ignore[type-var]


@can_wait
def test_a_timeout_passes(blocked: Blocked) -> None:
    """With nothing finished, reap comes back with nothing when the time is up, and the answer is not lost."""
    ring, buffer = blocked.start()
    assert ring.reap(0) == []
    assert ring.reap(1_000_000) == []
    blocked.let_go()
    assert reap_all(ring) == {"blocked": 8}
    assert bytes(buffer) == b"released"


def test_wakeup_fd(make_ring: MakeRing, fd: int, memory: mmap.mmap) -> None:
    """B07: readable when there is something to reap, and not when all has been reaped."""
    ring = make_ring(4)
    wake = ring.wakeup_fd()
    assert ring.wakeup_fd() == wake
    assert not os.get_inheritable(wake)
    pieces = blocks(memory)
    for _ in range(3):
        assert not readable(wake)
        for index in range(16):  # more than the depth: what is held back must wake us too
            ring.queue(READ, fd, (pieces[index],), index * BLOCK, BLOCK, 0, index)
        ring.commit()
        seen: list[object] = []
        while len(seen) < 16:
            assert select.select([wake], [], [], 30)[0], "nothing wakes us, but something is in flight"
            seen += [tag for tag, _ in ring.reap(0)]
        assert sorted(seen) == list(range(16))  # type: ignore[type-var]
        ring.reap(0)


def test_wakeup_fd_made_late(make_ring: MakeRing, fd: int, memory: mmap.mmap) -> None:
    """The eventfd may be asked for when operations are under way; the next ones signal it."""
    ring = make_ring()
    ring.queue(READ, fd, blocks(memory)[:1], 0, BLOCK, 0, 1)
    ring.commit()
    wake = ring.wakeup_fd()
    reap_all(ring)
    ring.queue(READ, fd, blocks(memory)[:1], 0, BLOCK, 0, 2)
    ring.commit()
    assert select.select([wake], [], [], 30)[0]
    assert reap_all(ring) == {2: BLOCK}


# --- who may enter ---------------------------------------------------------------------------------


def in_thread(call: object) -> BaseException | None:
    """What `call` raises in another thread."""
    caught: list[BaseException] = []

    def body() -> None:
        try:
            call()  # type: ignore[operator]
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_a_private_ring_refuses_other_threads(kind: str, make_ring: MakeRing, fd: int, memory: mmap.mmap) -> None:
    ring = make_ring()
    shared = kind in ("uring-shared", "threads-4")
    calls = (
        lambda: ring.queue(READ, fd, blocks(memory)[:1], 0, BLOCK, 0, None),
        ring.commit,
        lambda: ring.reap(-1),
        lambda: ring.add_file(fd),
        ring.wakeup_fd,
    )
    for call in calls:
        error = in_thread(call)
        if shared:
            assert error is None
        else:
            assert isinstance(error, RuntimeError)
            assert "shared=False" in str(error)
    ring.queue(READ, fd, blocks(memory)[:1], 0, BLOCK, 0, None)
    if not shared:
        assert isinstance(in_thread(ring.close), RuntimeError)
        assert reap_all(ring) == {None: BLOCK}
        assert in_thread(ring.close) is None  # with nothing in flight anybody may
        with pytest.raises(ClosedError):
            ring.commit()


@pytest.mark.parametrize("kind", ["uring-shared", "threads-4"])
def test_threads_queue_while_one_reaps(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes) -> None:
    """Queueing and committing under one lock, reaping without it: nothing is lost or answered twice."""
    ring = make_ring(16)
    pieces = blocks(memory)
    lock = threading.Lock()
    each = 4 * BLOCKS

    def feed(number: int) -> None:
        for index in range(each):
            with lock:
                where = index % BLOCKS
                ring.queue(READ, fd, (pieces[where],), where * BLOCK, BLOCK, 0, (number, index))
                ring.commit()

    feeders = [threading.Thread(target=feed, args=(number,)) for number in range(3)]
    for feeder in feeders:
        feeder.start()
    answers: dict[object, int] = {}
    while len(answers) < 3 * each:
        for tag, result in ring.reap(-1):
            assert tag not in answers
            answers[tag] = result
    for feeder in feeders:
        feeder.join()
    assert set(answers.values()) == {BLOCK}
    assert memory[:] == content
    assert ring.in_flight == 0


@pytest.mark.parametrize("kind", ["uring-shared", "threads-4"])
def test_the_submitter_may_end_first(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes) -> None:
    """F24: what a thread submitted before it ended is still done, not cancelled."""
    ring = make_ring(64)
    pieces = blocks(memory)

    def submit() -> None:
        for index in range(BLOCKS):
            ring.queue(READ, fd, (pieces[index],), index * BLOCK, BLOCK, 0, index)
        for index in range(8):
            ring.queue(FSYNC, fd, (), 0, 0, 0, f"sync {index}")
        ring.commit()

    assert in_thread(submit) is None
    answers = reap_all(ring)
    assert all(answers.pop(f"sync {index}") == 0 for index in range(8))
    assert answers == dict.fromkeys(range(BLOCKS), BLOCK)
    assert memory[:] == content


# --- the end, with I/O in flight -------------------------------------------------------------------


@can_wait
def test_close_waits(blocked: Blocked) -> None:
    """F24: close returns after the read, not before it, and drops the answer."""
    ring, buffer = blocked.start()
    writer = threading.Timer(0.05, blocked.let_go)
    writer.start()
    ring.close()
    assert bytes(buffer) == b"released"
    writer.join()
    ring.close()
    buffer.append(0)  # the export is given back
    with pytest.raises(ClosedError):
        ring.reap(0)


def test_close_does_what_was_queued(make_ring: MakeRing, fd: int, path: Path, memory: mmap.mmap) -> None:
    """A write that was queued and not committed is not dropped by close."""
    ring = make_ring(2)
    memory[:] = b"\x11" * len(memory)
    for index, piece in enumerate(blocks(memory)):
        ring.queue(WRITE, fd, (piece,), index * BLOCK, BLOCK, 0, index)
    ring.close()
    assert path.read_bytes() == memory[:]


def test_every_call_after_close_says_so(make_ring: MakeRing, fd: int) -> None:
    ring = make_ring()
    handle = ring.add_file(fd)
    ring.close()
    ring.close()
    for call in (
        lambda: ring.queue(FSYNC, fd, (), 0, 0, 0, None),
        ring.commit,
        lambda: ring.reap(0),
        lambda: ring.add_file(fd),
        lambda: ring.remove_file(handle),
        lambda: ring.add_buffer(bytearray(1)),
        ring.wakeup_fd,
        lambda: ring.transfer_batch(READ, fd, bytearray(1), 1, int64s([0]), 1, 0, int64s([0]), 1),
    ):
        with pytest.raises(ClosedError):
            call()
    assert ring.in_flight == 0


@can_wait
def test_garbage_collection_waits_or_keeps(kind: str, blocked: Blocked) -> None:
    """F24: a ring that is dropped with a read in flight does not give the memory away before its end."""
    blocked.keep = False
    ring, buffer = blocked.start()
    weak = weakref.ref(buffer)
    view = memoryview(buffer)
    del buffer
    writer = threading.Timer(0.05, blocked.let_go)
    writer.start()
    del ring
    gc.collect()
    writer.join()
    blocked.wait_for_workers()
    assert bytes(view) == b"released"
    view.release()
    del view
    gc.collect()
    assert weak() is None  # and at last it is freed


def test_a_dropped_ring_that_tags_refer_to_is_collected(make_ring: MakeRing, kind: str, fd: int) -> None:
    """A cycle through a tag does not keep the ring, and its descriptor, for ever."""

    class Tag:
        ring: Ring

    before = len(os.listdir("/proc/self/fd"))
    tag = Tag()
    tag.ring = new_ring(kind, 4)
    weak = weakref.ref(tag)
    tag.ring.queue(FSYNC, fd, (), 0, 0, 0, tag)
    del tag
    gc.collect()
    assert weak() is None
    assert len(os.listdir("/proc/self/fd")) == before


_FORK = """
import mmap, os, sys
from odirect.base.errors import ODirectError
from odirect.ring.contract import READ
from tests.ring.conftest import new_ring
kind, path = sys.argv[1:]
content = open(path, "rb").read()
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
ring = new_ring(kind, 8)
memory = mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
view = memoryview(memory)
blocks = range(0, len(content), 4096)
for offset in blocks:
    ring.queue(READ, fd, (view[offset:offset + 4096],), offset, 4096, 0, offset)
ring.commit()
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads may not fork lightly
child = os.fork()
if child == 0:
    code = 1
    try:
        for call in (ring.commit, lambda: ring.reap(-1), ring.wakeup_fd, lambda: ring.add_file(fd)):
            try:
                call()
            except RuntimeError as error:
                assert "fork" in str(error), error
            else:
                raise SystemExit("the child may enter the ring")
        ring.close()
        own = new_ring(kind, 8)
        own.queue(READ, fd, (view[:4096],), 0, 4096, 0, "own")
        assert own.reap(-1) == [("own", 4096)]
        own.close()
        code = 0
    finally:
        os._exit(code)
seen = {}
while ring.in_flight:
    seen.update(ring.reap(-1))
_, status = os.waitpid(child, 0)
assert status == 0, status
assert seen == dict.fromkeys(blocks, 4096), seen
assert memory[:] == content
ring.close()
print("whole")
"""


def test_fork_with_reads_in_flight(kind: str, path: Path) -> None:
    """F24: the parent gets its data; the child may not touch the ring, and its exit harms nobody."""
    new_ring(kind, 1).close()  # skips here, not in the child
    assert run_python(_FORK, kind, path) == "whole\n"


# --- signals ---------------------------------------------------------------------------------------


class Stop(Exception):
    """What a handler raises."""


@contextlib.contextmanager
def signals(handler: object, every: float = 0.02) -> Iterator[None]:
    """Call `handler(frame)` from signals that come again and again: one alone may come just before the wait."""

    def handle(number: int, frame: FrameType | None) -> None:
        handler(frame)  # type: ignore[operator]

    main = threading.get_ident()
    over = threading.Event()

    def send() -> None:
        while not over.wait(every):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def alarm(handler: object) -> Iterator[None]:
    """Call `handler` once, from a signal, as soon as may be."""
    fired = False

    def once(frame: FrameType | None) -> None:
        nonlocal fired
        if not fired:
            fired = True
            handler()  # type: ignore[operator]

    with signals(once):
        yield


@can_wait
def test_a_handler_may_raise_in_reap(blocked: Blocked) -> None:
    """Its exception leaves `reap`, and the answer comes with the next one."""
    ring, buffer = blocked.start()

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop), alarm(stop):
        ring.reap(-1)
    assert ring.in_flight == 1
    blocked.let_go()
    assert reap_all(ring) == {"blocked": 8}
    assert bytes(buffer) == b"released"


@can_wait
def test_a_handler_may_return_in_reap(blocked: Blocked) -> None:
    """Then `reap` goes on waiting."""
    ring, _ = blocked.start()
    with alarm(blocked.let_go):
        assert ring.reap(-1) == [("blocked", 8)]


@can_wait
def test_a_handler_may_use_and_close_the_ring(blocked: Blocked) -> None:
    """It cannot reap as well; when it closes the ring, the reap that it came into says so."""
    ring, buffer = blocked.start()
    refused = []

    def close() -> None:
        try:
            ring.reap(0)
        except RuntimeError as error:
            refused.append(error)
        blocked.let_go()
        ring.close()

    with pytest.raises(ClosedError), alarm(close):
        ring.reap(-1)
    assert len(refused) == 1
    assert bytes(buffer) == b"released"


@can_wait
def test_a_handler_may_raise_when_there_are_answers(blocked: Blocked) -> None:
    """What has finished by the time that the handler raises is returned by the next reap."""
    ring, _ = blocked.start()

    def stop() -> None:
        blocked.let_go()
        raise Stop

    with pytest.raises(Stop), alarm(stop):
        ring.reap(-1)
    assert reap_all(ring) == {"blocked": 8}


@pytest.mark.parametrize("kind", ["threads-4", "threads-0"])
def test_handlers_that_raise_anywhere_lose_nothing(make_ring: MakeRing, fd: int, memory: mmap.mmap) -> None:
    """The Python ring can be interrupted between any two calls of its own: every tag still comes back once."""
    ring = make_ring(8)
    pieces = blocks(memory)
    raised = 0

    def stop(frame: FrameType | None) -> None:
        nonlocal raised
        if frame is not None and frame.f_code.co_filename == threads.__file__:
            raised += 1
            raise Stop

    seen: list[object] = []
    rounds = 0
    with signals(stop, 0.0005):
        while raised < 20:
            for where, piece in enumerate(pieces):
                while True:
                    try:
                        ring.queue(READ, fd, (piece,), where * BLOCK, BLOCK, 0, rounds * BLOCKS + where)
                        break
                    except Stop:
                        pass
            rounds += 1
            while len(seen) < rounds * BLOCKS:
                try:
                    answers = ring.reap(-1)
                except Stop:
                    continue
                seen += answers
    assert ring.in_flight == 0
    assert sorted(seen) == [(index, BLOCK) for index in range(rounds * BLOCKS)]  # type: ignore[type-var]


@can_wait
def test_a_handler_that_raises_in_reap_is_told_from_one_elsewhere(blocked: Blocked) -> None:
    """`interruptible` is true while this thread waits in `reap`, and for no other."""
    ring, _ = blocked.start()
    seen: list[bool] = []
    elsewhere: list[bool] = []

    def look() -> None:
        seen.append(ring.interruptible)
        other = threading.Thread(target=lambda: elsewhere.append(ring.interruptible))
        other.start()
        other.join()
        blocked.let_go()

    assert not ring.interruptible
    with alarm(look):
        assert ring.reap(-1) == [("blocked", 8)]
    assert seen == [True] and elsewhere == [False]
    assert not ring.interruptible


# --- from other threads ----------------------------------------------------------------------------


def test_answers_may_be_added_to_a_list(make_ring: MakeRing, fd: int, memory: mmap.mmap) -> None:
    """It is returned; a handler's exception right behind the call takes nothing with it."""
    ring = make_ring()
    into: list[tuple[object, int]] = [("before", 1)]
    assert ring.reap(0, into) is into
    ring.queue(READ, fd, (blocks(memory)[0],), 0, BLOCK, 0, "it")
    while ring.in_flight:
        assert ring.reap(-1, into) is into
    assert into == [("before", 1), ("it", BLOCK)]


def test_what_it_holds(make_ring: MakeRing, fd: int, memory: mmap.mmap) -> None:
    """A tag is held from `queue` until it is reaped; another that is equal is not."""
    ring = make_ring()
    tag, equal = "the tag", " ".join(["the", "tag"])
    assert not ring.holds(tag)
    ring.queue(READ, fd, (blocks(memory)[0],), 0, BLOCK, 0, tag)
    assert ring.holds(tag) and not ring.holds(equal)
    reap_all(ring)
    assert not ring.holds(tag)


@pytest.mark.parametrize("kind", ["uring-shared", "threads-4"])
def test_another_thread_wakes_whoever_reaps(blocked: Blocked) -> None:
    """`reap` comes back with nothing, what is in flight goes on, and the next one waits again."""
    ring, _ = blocked.start()
    answers: list[list[tuple[object, int]]] = []
    thread = threading.Thread(target=lambda: answers.append(ring.reap(-1)))
    thread.start()
    ring.wake()
    thread.join(30)
    assert answers == [[]] and ring.in_flight == 1
    thread = threading.Thread(target=lambda: answers.append(ring.reap(-1)))
    thread.start()
    blocked.let_go()
    thread.join(30)
    assert answers == [[], [("blocked", 8)]]


def test_a_wake_that_nobody_waited_for(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes) -> None:
    """It ends the next wait at most; neither answers nor a batch are confused by it."""
    ring = make_ring(4)
    pieces = blocks(memory)
    for _ in range(20):
        for number in range(8):
            ring.wake()
            ring.queue(READ, fd, (pieces[number],), number * BLOCK, BLOCK, 0, number)
        assert reap_all(ring) == dict.fromkeys(range(8), BLOCK)
    ring.wake()
    results = int64s([-1] * 4)
    offsets = int64s(range(0, 4 * BLOCK, BLOCK))
    assert ring.transfer_batch(READ, fd, memory, BLOCK, offsets, BLOCK, 0, results, 4) == 0
    assert list(results) == [BLOCK] * 4 and memory[: 4 * BLOCK] == content[: 4 * BLOCK]
    ring.wake()
    ring.close()


def test_a_ring_on_threads_that_was_interrupted_before_it_began() -> None:
    """What `__del__` needs is there although `__init__` never ran."""
    state = threads._State.__new__(threads._State)
    state.__del__()


# --- batches ---------------------------------------------------------------------------------------


def int64s(values: Iterable[int]) -> array.array[int]:
    return array.array("q", values)


@pytest.mark.parametrize("depth", [1, 7, 32, 1000])
def test_batch_reads(make_ring: MakeRing, fd: int, memory: mmap.mmap, content: bytes, depth: int) -> None:
    ring = make_ring()
    handle = ring.add_file(fd)
    order = [index * 29 % BLOCKS for index in range(BLOCKS)]
    results = numpy.full(BLOCKS, -7, dtype=numpy.int64)
    offsets = numpy.array(order, dtype=numpy.int64) * BLOCK
    assert ring.transfer_batch(READ, handle, memory, BLOCK, offsets, BLOCK, 0, results, depth) == 0
    assert set(results) == {BLOCK}
    assert memory[:] == b"".join(content[index * BLOCK :][:BLOCK] for index in order)
    assert ring.in_flight == 0
    ring.remove_file(handle)


def test_batch_writes(make_ring: MakeRing, fd: int, path: Path, memory: mmap.mmap, content: bytes) -> None:
    ring = make_ring()
    memory[:] = content[::-1]
    offsets = int64s(range(0, BLOCKS * BLOCK, BLOCK))
    assert ring.transfer_batch(WRITE, fd, memory, BLOCK, offsets, BLOCK, RWF_DSYNC, offsets_like(offsets), 16) == 0
    assert path.read_bytes() == content[::-1]


def offsets_like(offsets: array.array[int]) -> array.array[int]:
    return int64s([0] * len(offsets))


def test_batch_of_nothing(make_ring: MakeRing, fd: int) -> None:
    ring = make_ring()
    assert ring.transfer_batch(READ, fd, bytearray(), 0, int64s([]), 0, 0, int64s([]), 4) == 0
    results = int64s([5, 5])
    assert ring.transfer_batch(READ, fd, bytearray(), 0, int64s([0, 0]), 0, 0, results, 4) == 0
    assert list(results) == [0, 0]


def test_batch_arguments_are_checked(make_ring: MakeRing, fd: int) -> None:
    ring = make_ring()
    two = int64s([0, 0])
    for op, buffer, stride, offsets, length, results, depth in (
        (FSYNC, bytearray(16), 8, two, 8, two, 4),
        (READ, b"x" * 16, 8, two, 8, two, 4),  # read-only
        (READ, bytearray(15), 8, two, 8, two, 4),  # too short
        (READ, bytearray(16), -8, two, 8, two, 4),
        (READ, bytearray(16), 1 << 62, two, 8, two, 4),
        (READ, bytearray(16), 8, two, -1, two, 4),
        (READ, bytearray(16), 8, two, 8, int64s([0]), 4),
        (READ, bytearray(16), 8, array.array("i", [0, 0]), 8, two, 4),
        (READ, bytearray(16), 8, array.array("d", [0, 0]), 8, two, 4),
        (READ, bytearray(16), 8, two, 8, memoryview(two).toreadonly(), 4),
        (READ, bytearray(16), 8, two, 8, two, 0),
    ):
        with pytest.raises(ValueError):
            ring.transfer_batch(op, fd, buffer, stride, offsets, length, 0, results, depth)
    with pytest.raises(TypeError):
        ring.transfer_batch(READ, fd, bytearray(16), 8, [0, 0], 8, 0, two, 4)  # type: ignore[arg-type]
    ring.queue(FSYNC, fd, (), 0, 0, 0, None)
    with pytest.raises(RuntimeError, match="in flight"):
        ring.transfer_batch(READ, fd, bytearray(16), 8, two, 8, 0, two, 4)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    op=st.sampled_from([READ, WRITE]),
    offsets=st.lists(
        st.one_of(
            st.integers(-3, BLOCKS + 3).map(lambda block: block * BLOCK),
            st.sampled_from([-1, 1, 512, BLOCKS * BLOCK - 512, (1 << 63) - 512]),
        ),
        max_size=24,
    ),
    length=st.sampled_from([0, 512, BLOCK, 2 * BLOCK, 100]),
    gap=st.sampled_from([0, 512]),
    depth=st.integers(1, 40),
    registered=st.booleans(),
)
def test_batch_is_the_same_as_one_by_one(
    kind: str,
    path: Path,
    content: bytes,
    op: int,
    offsets: list[int],
    length: int,
    gap: int,
    depth: int,
    registered: bool,
) -> None:
    """The design's two speeds, one meaning: same bytes in memory and file, same answers."""
    if op == WRITE:
        # Each place once: the order of writes to one place is nobody's promise. And no file of exabytes.
        offsets = [offset for offset in dict.fromkeys(offsets) if offset % (2 * BLOCK) == 0 and offset < len(content)]
    stride = length + gap
    bytes_needed = max(1, stride * len(offsets))
    outcomes = []
    for in_batch in (True, False):
        path.write_bytes(content)
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        ring = new_ring(kind, 16)
        memory = mmap.mmap(-1, bytes_needed)
        memory[:] = bytes(index * 7 % 251 for index in range(bytes_needed))
        try:
            if registered:
                ring.add_buffer(memory)
            handle = ring.add_file(fd)
            if in_batch:
                results = int64s([-9] * len(offsets))
                bad = ring.transfer_batch(op, handle, memory, stride, int64s(offsets), length, 0, results, depth)
                answers = list(results)
            else:
                for index, offset in enumerate(offsets):
                    with memoryview(memory) as view:
                        piece = view[index * stride : index * stride + length]
                        ring.queue(op, handle, (piece,), offset, length, 0, index)
                        del piece
                by_tag = reap_all(ring)
                answers = [by_tag[index] for index in range(len(offsets))]
                bad = sum(answer != length for answer in answers)
        finally:
            ring.close()
            os.close(fd)
        outcomes.append((bad, answers, memory[:], path.read_bytes()))
    assert outcomes[0] == outcomes[1]


@can_wait
def test_a_handler_may_raise_in_a_batch(blocked: Blocked) -> None:
    """Nothing more is begun, what is under way comes back, then the exception leaves."""
    ring = blocked.make_ring()
    buffer = bytearray(8 * 8)
    results = int64s([-9] * 8)

    def stop() -> None:
        blocked.let_go(8)
        with pytest.raises(RuntimeError):
            ring.close()
        with pytest.raises(RuntimeError):
            ring.queue(FSYNC, blocked.end, (), 0, 0, 0, None)
        raise Stop

    with pytest.raises(Stop), alarm(stop):
        ring.transfer_batch(READ, blocked.end, buffer, 8, int64s([0] * 8), 8, 0, results, 2)
    done = sum(result == 8 for result in results)
    assert done >= 2
    assert all(result in (8, -errno.ECANCELED) for result in results)
    assert bytes(buffer).count(b"released") == done
    assert ring.in_flight == 0
    buffer.append(0)  # no export is left behind


def test_a_handler_may_raise_in_an_inline_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without workers, where the handler comes into the very call."""
    end, inlet = os.pipe()
    monkeypatch.setattr(threads._Operation, "execute", lambda self: os.readv(self.handle, self.segments))

    def stop() -> None:
        raise Stop

    ring = threads.ThreadRing(4, workers=0)
    results = int64s([-9] * 4)
    os.write(inlet, b"released")
    try:
        with pytest.raises(Stop), alarm(stop):
            ring.transfer_batch(READ, end, bytearray(32), 8, int64s([0] * 4), 8, 0, results, 2)
        assert list(results) == [8] + [-errno.ECANCELED] * 3
        ring.queue(READ, end, (bytearray(8),), 0, 8, 0, "again")
        with pytest.raises(Stop), alarm(stop):
            ring.reap(-1)
        os.write(inlet, b"released")
        assert reap_all(ring) == {"again": 8}
    finally:
        ring.close()
        os.close(end)
        os.close(inlet)


def test_the_contract_names_what_is_used() -> None:
    """Both implementations have every public name of the Protocol."""
    names = [name for name in vars(contract.Ring) if not name.startswith("_")]
    assert "transfer_batch" in names
    from odirect.ring._uring import UringRing

    for implementation in (UringRing, threads.ThreadRing):
        assert [name for name in names if not hasattr(implementation, name)] == []
        assert [name for name in names if not getattr(implementation, name).__doc__] == []
