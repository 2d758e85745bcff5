"""The system calls of `_calls`."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from tests.ring.conftest import BLOCK, BLOCKS, run_python

from odirect.base.errors import ClosedError, MissingError, NotDirectoryError
from odirect.ring import _calls
from odirect.ring._calls import NOT_SIMPLE, DirectHandle, address_of, copy_guarded, span, zero_fill
from odirect.ring.contract import RWF_DSYNC


@pytest.fixture
def handle(fd: int) -> DirectHandle:
    handle = DirectHandle(fd, 512, 512, 512)
    handle.size_hint = BLOCKS * BLOCK
    return handle


def test_address_and_span() -> None:
    array = numpy.zeros(10, dtype="u4")
    assert address_of(array) == array.ctypes.data
    assert span(array, True) == (array.ctypes.data, 40)
    assert span(array[2:], False) == (array.ctypes.data + 8, 32)
    assert span(b"abc", False)[1] == 3
    with pytest.raises(ValueError):
        span(b"abc", True)
    for striped in (array[::2], memoryview(bytearray(4))[::2]):
        with pytest.raises(ValueError):
            span(striped, False)
    with pytest.raises(TypeError):
        address_of(5)


def test_simple_transfers(handle: DirectHandle, memory: mmap.mmap, path: Path, content: bytes) -> None:
    """B02: one call, with and without flags."""
    assert handle.pread(memory, 0) == len(content)
    assert memory[:] == content
    view = memoryview(memory)
    assert handle.pread(view[:512], int(numpy.int64(1024))) == 512
    assert memory[:512] == content[1024:1536]
    assert handle.pwrite(view[:BLOCK], BLOCK) == BLOCK
    assert handle.pwrite(view[:BLOCK], 2 * BLOCK, RWF_DSYNC) == BLOCK
    assert path.read_bytes()[BLOCK : 3 * BLOCK] == memory[:BLOCK] * 2
    assert handle.pwrite(view[:BLOCK], len(content)) == BLOCK  # a write may make the file longer
    assert handle.pread(view[:BLOCK], 0, 1 << 30) == -errno.EOPNOTSUPP


@pytest.mark.parametrize(
    ("offset", "start", "length"),
    [
        (1, 0, 512),
        (-512, 0, 512),
        (-1, 0, 512),
        (0, 1, 512),
        (0, 0, 511),
        (0, 0, 0),
        (1 << 63, 0, 512),
        (-(1 << 70), 0, 512),
        ("0", 0, 512),
        (0.0, 0, 512),
    ],
)
def test_what_is_not_simple(handle: DirectHandle, memory: mmap.mmap, offset: int, start: int, length: int) -> None:
    """B01, F51: nothing is done then, for reading and for writing."""
    piece = memoryview(memory)[start : start + length]
    assert handle.pread(piece, offset) == NOT_SIMPLE
    assert handle.pwrite(piece, offset) == NOT_SIMPLE
    assert not any(memory[:])


def test_the_end_of_file_is_not_simple(handle: DirectHandle, memory: mmap.mmap, content: bytes) -> None:
    """F02: whoever reads to the end or past it goes the way that knows the size."""
    view = memoryview(memory)[:BLOCK]
    assert handle.pread(view, len(content) - BLOCK) == BLOCK
    assert handle.pread(view, len(content) - 512) == NOT_SIMPLE
    assert handle.pread(view, (1 << 63) - BLOCK) == NOT_SIMPLE
    handle.size_hint = BLOCK - 1
    assert handle.pread(view, 0) == NOT_SIMPLE
    handle.size_hint = -1
    assert handle.pread(view, 0) == NOT_SIMPLE
    assert handle.pwrite(view, 0) == BLOCK


def test_buffers_that_are_not_simple(handle: DirectHandle, fd: int) -> None:
    assert handle.pread(bytes(512), 0) == NOT_SIMPLE
    assert handle.pread("text", 0) == NOT_SIMPLE
    assert handle.pwrite(numpy.zeros((4, 1024), dtype="u1")[:, :512], 0) == NOT_SIMPLE
    handle.fd = -1
    assert handle.pread(mmap.mmap(-1, 512), 0) == NOT_SIMPLE
    assert handle.pwrite(mmap.mmap(-1, 512), 0) == NOT_SIMPLE


def test_alignments_are_taken_as_given(fd: int, memory: mmap.mmap) -> None:
    """F51: reading, writing and memory each have their own."""
    handle = DirectHandle(fd, 4096, 8192, 1)
    handle.size_hint = BLOCKS * BLOCK
    assert (handle.read_align, handle.write_align, handle.memory_align) == (4096, 8192, 1)
    view = memoryview(memory)
    assert handle.pread(view[:4096], 4096) == 4096
    assert handle.pread(view[:512], 4096) == NOT_SIMPLE
    assert handle.pwrite(view[:8192], 4096) == NOT_SIMPLE
    assert handle.pwrite(view[:4096], 8192) == NOT_SIMPLE
    assert handle.pwrite(view[:8192], 8192) == 8192
    handle.memory_align = 1 << 40
    assert handle.pread(view[:4096], 4096) == NOT_SIMPLE
    for wrong in (0, -1, 3, 1 << 70):
        with pytest.raises(ValueError):
            handle.read_align = wrong
        with pytest.raises(ValueError):
            DirectHandle(fd, 512, wrong, 512)


def test_a_failed_transfer_is_its_errno(path: Path, memory: mmap.mmap) -> None:
    read_only = os.open(path, os.O_RDONLY)
    handle = DirectHandle(read_only, 1, 1, 1)
    assert handle.pwrite(memory, 0) == -errno.EBADF
    os.close(read_only)
    handle.size_hint = len(memory)
    assert handle.pread(memory, 0) == -errno.EBADF


def test_statx(path: Path, fd: int) -> None:
    """The same as stat(2), by descriptor and by path, with the alignments where the kernel has them."""
    status = os.stat(path)
    for target in (fd, path, str(path), os.fsencode(path)):
        found = _calls.statx(target)
        assert found.mode == status.st_mode
        assert found.ino == status.st_ino
        assert found.size == status.st_size
        assert found.blksize == status.st_blksize
        assert os.makedev(found.dev_major, found.dev_minor) == status.st_dev
        assert os.makedev(found.rdev_major, found.rdev_minor) == status.st_rdev
        if found.mask & 0x2000:
            assert found.dio_mem_align > 0
            assert found.dio_offset_align in (512, 1024, 2048, 4096)
    null = os.stat("/dev/null")
    device = _calls.statx("/dev/null")
    assert os.makedev(device.rdev_major, device.rdev_minor) == null.st_rdev
    assert any(
        line.startswith(f"mnt_id:\t{_calls.statx(fd).mnt_id}\n")
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines(keepends=True)
    )


def test_statx_errors(path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        _calls.statx(path.with_name("missing"))
    assert caught.value.filename == path.with_name("missing")
    with pytest.raises(MissingError):
        _calls.statx("")
    with pytest.raises(NotDirectoryError):
        _calls.statx(path / "below")
    with pytest.raises(ClosedError):
        _calls.statx(-1)
    with pytest.raises(ValueError):
        _calls.statx("nul\0")
    with pytest.raises(TypeError):
        _calls.statx(1.5)  # type: ignore[arg-type]


def test_cachestat(path: Path) -> None:
    with path.open("r+b", buffering=0) as file:
        file.read()
        file.write(b"x")
        found = _calls.cachestat(file.fileno(), 0, 0)
        if found is not None:
            assert found[0] >= BLOCKS
            os.fsync(file.fileno())
            after = _calls.cachestat(file.fileno(), 0, 0)
            assert after is not None
            assert after[1] == 0
    with pytest.raises(ClosedError):
        if found is None:
            raise ClosedError("there is no such call to ask")
        _calls.cachestat(-1, 0, 0)


def test_sync_file_range_and_fallocate(path: Path) -> None:
    with path.open("r+b") as file:
        fd = file.fileno()
        assert _calls.sync_file_range(fd, 0, 0, 7) == 0
        assert _calls.sync_file_range(fd, 0, 0, 1 << 20) == -errno.EINVAL
        assert _calls.fallocate(fd, 0, 0, 2 * BLOCKS * BLOCK) == 0
        assert os.fstat(fd).st_size == 2 * BLOCKS * BLOCK
        assert _calls.fallocate(fd, 0, 0, 0) == -errno.EINVAL
    assert _calls.sync_file_range(-1, 0, 0, 7) == _calls.fallocate(-1, 0, 0, 1) == -errno.EBADF


@pytest.fixture
def torn(scratch: Path) -> Iterator[mmap.mmap]:
    """A mapping of four blocks, of which the file has only the first two: touching the rest is SIGBUS."""
    with (scratch / "torn").open("w+b") as file:
        file.truncate(4 * BLOCK)
        mapping = mmap.mmap(file.fileno(), 4 * BLOCK)
        file.truncate(2 * BLOCK)
    yield mapping
    mapping.close()


def test_guarded_copies(torn: mmap.mmap) -> None:
    """F23: memory that is not there is EFAULT, as a source, as a target, and in the middle."""
    good = bytearray(os.urandom(4 * BLOCK))
    other = bytearray(4 * BLOCK)
    assert copy_guarded(other, good) == len(good)
    assert other == good
    assert copy_guarded(bytearray(), b"") == 0
    assert copy_guarded(torn, good) == -errno.EFAULT
    assert copy_guarded(other, torn) == -errno.EFAULT
    with memoryview(torn) as view, view[: 2 * BLOCK] as there:
        assert copy_guarded(there, good[: 2 * BLOCK]) == 2 * BLOCK
        assert there == good[: 2 * BLOCK]
        assert zero_fill(there) == 2 * BLOCK
        assert not any(there)
    assert zero_fill(torn) == -errno.EFAULT
    for length in (1, 65536, 16 * 65536, 17 * 65536 + 3):
        dirty = bytearray(b"\xff" * (length + 2))
        with memoryview(dirty) as view, view[1:-1] as inner:
            assert zero_fill(inner) == length
        assert dirty == b"\xff" + bytes(length) + b"\xff"
    with pytest.raises(ValueError):
        copy_guarded(bytearray(3), b"four")
    with pytest.raises(ValueError):
        copy_guarded(b"read", b"only")
    with pytest.raises(ValueError):
        zero_fill(b"read-only")


def test_fork_generation() -> None:
    """It grows in the child, also when the fork was not Python's."""
    script = (
        "import ctypes, os\n"
        "from odirect.ring._calls import fork_generation\n"
        "before = fork_generation()\n"
        "child = ctypes.CDLL(None).fork()\n"
        "if child == 0: os._exit(fork_generation() - before)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), fork_generation() - before)\n"
    )
    assert run_python(script) == "1 0\n"


def test_transfers_let_go_of_the_gil(tmp_path: Path) -> None:
    """Two threads meet: one writes the pipe that the other's call waits for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    end = os.open(fifo, os.O_RDWR)
    handle = DirectHandle(end, 1, 1, 1)
    handle.size_hint = 8
    # A pipe has no offsets: the call comes back at once, and the handle says why.
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(handle.pread(bytearray(8), 0)))
    thread.start()
    thread.join()
    os.close(end)
    assert answers == [-errno.ESPIPE]
