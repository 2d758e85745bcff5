"""What only io_uring has: registered files and buffers, polling, and life without the right to lock memory."""

from __future__ import annotations

import array
import errno
import gc
import mmap
import os
from pathlib import Path

import pytest
from tests.ring.conftest import BLOCK, BLOCKS, MakeRing, blocks, new_ring, reap_all, run_python

from odirect.ring.contract import READ, WRITE

pytestmark = pytest.mark.parametrize("kind", ["uring", "uring-shared"])


def test_registered_buffers(make_ring: MakeRing, fd: int, memory: mmap.mmap, path: Path, content: bytes) -> None:
    """Inside, across the edge of, and outside registered memory: the same bytes."""
    ring = make_ring()
    if not ring.features.fixed_buffers:
        pytest.skip("this kernel has no sparse buffer tables")
    view = memoryview(memory)
    half = len(memory) // 2
    assert ring.add_buffer(view[half:])
    assert ring.add_buffer(view[: half // 2])
    for index, piece in enumerate(blocks(memory)):
        ring.queue(READ, fd, (piece,), index * BLOCK, BLOCK, 0, index)
    ring.queue(READ, fd, (view[half - BLOCK : half + BLOCK],), half - BLOCK, 2 * BLOCK, 0, "across")
    ring.queue(READ, fd, (view[half // 2 - BLOCK : half // 2 + BLOCK],), half // 2 - BLOCK, 2 * BLOCK, 0, "out")
    answers = reap_all(ring)
    assert answers.pop("across") == answers.pop("out") == 2 * BLOCK
    assert set(answers.values()) == {BLOCK}
    assert memory[:] == content
    memory[:] = content[::-1]
    for index, piece in enumerate(blocks(memory)):
        ring.queue(WRITE, fd, (piece,), index * BLOCK, BLOCK, 0, index)
    assert set(reap_all(ring).values()) == {BLOCK}
    assert path.read_bytes() == content[::-1]


def test_registered_buffers_live_as_long_as_the_ring(kind: str) -> None:
    ring = new_ring(kind, 4)
    buffer = bytearray(BLOCK)
    registered = ring.add_buffer(buffer)
    if registered:
        with pytest.raises(BufferError):
            buffer.append(0)
    ring.close()
    buffer.append(0)


def test_what_cannot_be_registered(make_ring: MakeRing) -> None:
    """It is refused with False or an error, and nothing is kept."""
    ring = make_ring()
    empty = bytearray()
    assert ring.add_buffer(empty) is False
    empty.append(0)
    with pytest.raises(ValueError):
        ring.add_buffer(b"read-only")
    with pytest.raises(TypeError):
        ring.add_buffer("text")


def test_more_buffers_than_the_table_holds(make_ring: MakeRing, fd: int, content: bytes) -> None:
    ring = make_ring()
    memory = [mmap.mmap(-1, BLOCK) for _ in range(300)]
    registered = [ring.add_buffer(piece) for piece in memory]
    assert sum(registered) in (0, 256)
    for index, piece in enumerate(memory):
        ring.queue(READ, fd, (piece,), index % BLOCKS * BLOCK, BLOCK, 0, index)
    assert reap_all(ring) == dict.fromkeys(range(300), BLOCK)
    assert all(piece[:] == content[index % BLOCKS * BLOCK :][:BLOCK] for index, piece in enumerate(memory))


def test_registered_files(make_ring: MakeRing, fd: int, path: Path) -> None:
    """Slots are given out once, given back, and run out into plain descriptors."""
    ring = make_ring()
    handles = [ring.add_file(fd) for _ in range(70)]
    if ring.features.fixed_files:
        assert len(set(handles)) == 65
        assert handles[-1] == fd
    other = os.open(path, os.O_RDONLY)
    for handle in handles:
        ring.queue(READ, handle, (bytearray(),), 0, 0, 0, None)
    while ring.in_flight:
        assert all(result == 0 for _, result in ring.reap(-1))
    ring.remove_file(handles[3])
    if ring.features.fixed_files:
        assert ring.add_file(other) == handles[3]
        ring.remove_file(handles[3])
        with pytest.raises(ValueError, match="not a handle"):
            ring.remove_file(handles[3])
    ring.queue(READ, handles[3], (bytearray(8),), 0, 8, 0, "removed")
    if ring.features.fixed_files:
        assert reap_all(ring) == {"removed": -errno.EBADF}
    else:
        reap_all(ring)
    assert ring.add_file(-1) == -1
    os.close(other)


def test_a_registered_file_may_be_closed(make_ring: MakeRing, path: Path, content: bytes) -> None:
    """The table has its own reference, so a handle never means another file that got the number."""
    ring = make_ring()
    if not ring.features.fixed_files:
        pytest.skip("this kernel has no registered files")
    first = os.open(path, os.O_RDONLY)
    handle = ring.add_file(first)
    os.close(first)
    buffer = bytearray(8)
    ring.queue(READ, handle, (buffer,), 0, 8, 0, None)
    assert reap_all(ring) == {None: 8}
    assert buffer == content[:8]


def test_polling(kind: str, fd: int, memory: mmap.mmap, content: bytes) -> None:
    """B06: on a device that cannot poll each operation answers EOPNOTSUPP; on one that can it is a read."""
    from odirect.ring._uring import UringRing

    ring = UringRing(8, shared=kind == "uring-shared", iopoll=True)
    assert ring.features.iopoll
    try:
        for index, piece in enumerate(blocks(memory)):
            ring.queue(READ, fd, (piece,), index * BLOCK, BLOCK, 1, index)
        answers = reap_all(ring)
        results = array.array("q", [0] * BLOCKS)
        offsets = array.array("q", range(0, BLOCKS * BLOCK, BLOCK))
        not_whole = ring.transfer_batch(READ, fd, memory, BLOCK, offsets, BLOCK, 1, results, 8)
    finally:
        ring.close()
    assert set(answers.values()) in ({BLOCK}, {-errno.EOPNOTSUPP})
    assert set(results) == set(answers.values())
    assert not_whole == (0 if results[0] == BLOCK else BLOCKS)
    assert results[0] != BLOCK or memory[:] == content


def test_a_completion_ring_of_a_given_size(kind: str, fd: int) -> None:
    from odirect.ring._uring import UringRing

    ring = UringRing(4, shared=kind == "uring-shared", cq_entries=256)
    ring.close()
    with pytest.raises(ValueError):
        UringRing(4, cq_entries=-1)


def test_a_private_ring_dropped_by_another_thread_keeps_its_memory(kind: str) -> None:
    """F24: who may not wait for the device does not free what it writes to either."""
    import threading

    from odirect.ring._uring import UringRing

    if kind == "uring-shared":
        return  # anybody may wait for a shared one
    end, inlet = os.pipe()
    box: list[UringRing] = []
    buffer = bytearray(8)

    def make() -> None:
        ring = UringRing(4)
        ring.queue(READ, end, (buffer,), 0, 8, 0, None)
        ring.commit()
        box.append(ring)
        del ring
        ready.set()
        dropped.wait()

    ready, dropped = threading.Event(), threading.Event()
    thread = threading.Thread(target=make)
    thread.start()
    ready.wait()
    box.clear()
    dropped.set()
    thread.join()
    gc.collect()
    with pytest.raises(BufferError):
        buffer.append(0)  # still exported: it is kept for ever
    os.close(end)
    os.close(inlet)


_MEMLOCK = """
import mmap, os, resource, sys
from odirect.ring._uring import UringRing
kind, path = sys.argv[1:]
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
ring = UringRing(4, shared=kind == "uring-shared")
memory = mmap.mmap(-1, 4 << 20)
print(ring.add_buffer(memory))
ring.queue(0, ring.add_file(fd), (memory,), 0, len(memory), 0, "it")
((_, count),) = ring.reap(-1)
content = open(path, "rb").read()
print(count == len(content), memory[:count] == content)
"""


def test_little_memory_may_be_locked(kind: str, path: Path) -> None:
    """A buffer larger than RLIMIT_MEMLOCK: registering answers False, and reading works all the same."""
    new_ring(kind, 1).close()
    path.chmod(0o644)
    for parent in path.parents[:2]:
        parent.chmod(0o755)
    assert run_python(_MEMLOCK, kind, path) == "False\nTrue True\n"
