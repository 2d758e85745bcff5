"""`odirect.open` and `odirect.File`: what a user meets."""

from __future__ import annotations

import array
import asyncio
import contextlib
import copy
import errno
import gc
import io
import itertools
import mmap
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import hypothesis
import numpy
import pytest
from hypothesis import strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from tests.files import DirectReader, cached_pages, cut_short, data_file, filled
from tests.loops import needs_root
from tests.verbs import READ_VERBS, WRITE_VERBS, verb_name

import odirect
from odirect import Kind, Outcome, Promise, Reason, aio
from odirect.base.errors import (
    AlignmentError,
    AtomicLimitError,
    BadBufferError,
    ClosedError,
    DeviceError,
    DirectoryError,
    ExistsError,
    ForbiddenError,
    MissingError,
    NoSpaceError,
    NotDirectError,
    NotDirectoryError,
    ODirectError,
    StickySyncError,
    UnsupportedError,
    WouldBlockError,
)
from odirect.dio import here
from odirect.testing.model import ModelFile

SIZE = 300_000
EDGES = (1, 511, 512, 513, 4095, 4096, 4097)


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@pytest.fixture
def path(scratch: Path, content: bytes) -> Path:
    return data_file(scratch / "file", content)


# --- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", ["", "b"])
@pytest.mark.parametrize("mode", ["r", "r+", "w", "w+", "x", "x+", "a", "a+"])
def test_every_mode(scratch: Path, mode: str, binary: str) -> None:
    """Each mode does to the file, and allows, what it does with the built-in open."""
    ours, theirs = scratch / "ours", scratch / "theirs"
    if mode[0] != "x":
        for path in (ours, theirs):
            data_file(path, b"0123456789" * 100)
    with odirect.open(ours, mode + binary) as file, open(theirs, f"{mode[0]}b{mode[1:]}") as it:
        assert (file.readable(), file.writable(), file.seekable()) == (it.readable(), it.writable(), True)
        assert file.tell() == it.tell()
        if file.writable():
            assert file.write(b"new") == it.write(b"new")
        else:
            with pytest.raises(io.UnsupportedOperation):
                file.write(b"new")
            with pytest.raises(io.UnsupportedOperation):
                file.truncate(0)
            with pytest.raises(io.UnsupportedOperation):
                file.fallocate(0, 10)
        assert file.tell() == it.tell()
        file.seek(0)
        it.seek(0)
        if file.readable():
            assert file.read() == it.read()
        else:
            with pytest.raises(io.UnsupportedOperation):
                file.read(1)
            with pytest.raises(io.UnsupportedOperation):
                file.preadv([bytearray(1)], 0)
            with pytest.raises(io.UnsupportedOperation):
                file.readinto(bytearray(1))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("mode", ["", "b", "rt", "rw", "t", "+", "rb+b", "U", "wa", "w +", "r++"])
def test_modes_that_are_none(path: Path, mode: str) -> None:
    """Text and nonsense are ValueErrors, and the file is not touched."""
    with pytest.raises(ValueError, match="mode"):
        odirect.open(path, mode)
    assert path.stat().st_size == SIZE


def test_arguments_that_are_wrong(path: Path) -> None:
    """Types and values that make no sense are TypeError and ValueError (F53)."""
    with pytest.raises(ValueError, match="access"):
        odirect.open(path, access="quick")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        odirect.open(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        odirect.open(path, "r", "strict")  # type: ignore[misc]
    with pytest.raises((TypeError, AttributeError)):
        odirect.open(path, 3)  # type: ignore[arg-type]
    with odirect.open(os.fsencode(path)) as file:
        assert file.name == os.fsencode(path)
        assert os.fsdecode(os.fsencode(path)) in repr(file)


def test_appending(scratch: Path) -> None:
    """ "a" writes at the end whatever the position is, and an earlier writer's bytes stay."""
    path = data_file(scratch / "file", b"abc")
    with odirect.open(path, "a+") as file:
        assert file.tell() == 3
        file.seek(0)
        assert file.write(b"de") == 2
        assert file.tell() == 5
        with open(path, "ab") as other:
            other.write(b"f")
        file.write(b"g")
        file.seek(0)
        assert file.read() == b"abcdefg"


def test_what_cannot_be_opened(scratch: Path) -> None:
    """Missing, a directory, a file used as one, existing already, a pipe, a socket, a device: all ODirectErrors."""
    (scratch / "file").write_bytes(b"x")
    os.mkfifo(scratch / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(scratch / "socket"))
    wrong: list[tuple[Path, str, type[ODirectError]]] = [
        (scratch / "none", "r", MissingError),
        (scratch / "none" / "none", "w", MissingError),
        (scratch, "r", DirectoryError),
        (scratch, "w", DirectoryError),
        (scratch / "file" / "below", "r", NotDirectoryError),
        (scratch / "file", "x", ExistsError),
        (scratch / "fifo", "r", UnsupportedError),
        (scratch / "fifo", "r+", UnsupportedError),
        (scratch / "fifo", "w", UnsupportedError),
        (scratch / "socket", "r", UnsupportedError),
        (Path("/dev/null"), "r", UnsupportedError),
        (Path("/dev/null"), "w", UnsupportedError),
        (Path("/dev/zero"), "r", UnsupportedError),
    ]
    for path, mode, kind in wrong:
        with pytest.raises(kind) as caught:
            odirect.open(path, mode)
        assert caught.value.filename == os.fspath(path), (path, mode)
        assert caught.value.errno
    with pytest.raises(ValueError, match="null"):
        odirect.open("nul\0byte")


def in_child(work: Callable[[], None]) -> None:
    """Do `work` in a forked child; fails with what it raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            work()
            status = 0
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0, said


def test_permissions(scratch: Path) -> None:
    """Without the right to read or write it is ForbiddenError; with it all works as any user."""
    needs_root()
    os.chmod(scratch.parent, 0o755)
    os.chmod(scratch, 0o777)
    secret = data_file(scratch / "secret", b"x" * 5000)
    os.chmod(secret, 0o600)
    shown = data_file(scratch / "shown", b"y" * 5000)
    os.chmod(shown, 0o644)

    def work() -> None:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        for path, mode in ((secret, "r"), (secret, "w"), (shown, "r+"), (scratch.parent / "new", "w")):
            try:
                odirect.open(path, mode)
            except ForbiddenError:
                continue
            raise AssertionError(f"{path} could be opened in mode {mode}")
        with odirect.open(shown) as file:
            assert file.pread(6000, 0) == b"y" * 5000
        with odirect.open(scratch / "mine", "w+") as file:
            assert file.pwrite(filled(4096, 1), 0) == 4096
            assert file.last_outcome is not None and file.last_outcome.kind is Kind.DIRECT
            file.preadinto(odirect.empty(4096), 0)

    in_child(work)


def test_close(path: Path) -> None:
    """After close everything but what is known of the past is ClosedError, which is a ValueError too."""
    file = odirect.open(path, "r+")
    file.preadinto(odirect.empty(4096), 0)
    file.close()
    file.close()
    assert file.closed
    late: list[Callable[[], object]] = [
        file.fileno,
        file.readable,
        file.writable,
        file.seekable,
        file.tell,
        file.sync,
        file.flush,
        file.truncate,
        file.readall,
        file.read,
        lambda: file.size,
        lambda: file.seek(0),
        lambda: file.read(1),
        lambda: file.write(b"x"),
        lambda: file.write(odirect.empty(4096)),
        lambda: file.readinto(bytearray(1)),
        lambda: file.readinto(odirect.empty(4096)),
        lambda: file.pread(1, 0),
        lambda: file.pread(0, 0),
        lambda: file.preadinto(odirect.empty(4096), 0),
        lambda: file.pwrite(b"", 0),
        lambda: file.preadv([], 0),
        lambda: file.pwritev([], 0),
        lambda: file.fallocate(0, 1),
        lambda: file.read_batch([0], 10, bytearray(10)),
        lambda: file.write_batch([0], 10, bytearray(10)),
        lambda: file.submit("read", 0, bytearray(10)),
    ]
    for call in late:
        with pytest.raises(ValueError, match="closed") as caught:
            call()
        assert isinstance(caught.value, ClosedError) or call is file.read
    with pytest.raises(ValueError), file:
        pass
    assert file.totals and file.last_outcome and file.limits and "closed" in repr(file)
    assert list(file.completions()) == []


def test_context_manager_closes_also_after_an_error(path: Path) -> None:
    """Leaving the block closes it."""
    with pytest.raises(KeyError), odirect.open(path) as file:
        raise KeyError
    assert file.closed


def test_a_file_cannot_be_copied(path: Path) -> None:
    """Two objects that own one descriptor would close it twice."""
    with odirect.open(path) as file:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                call(file)


# --- as a raw file of io -------------------------------------------------------------------------


def test_is_a_raw_file(path: Path, content: bytes) -> None:
    """read, readall, readinto, seek and tell are those of io.RawIOBase."""
    with odirect.open(path) as file:
        assert isinstance(file, io.RawIOBase)
        assert file.read(10) == content[:10]
        assert file.read(0) == b""
        buffer = bytearray(100)
        assert file.readinto(buffer) == 100 and buffer == content[10:110]
        assert file.tell() == 110
        assert file.seek(-5, os.SEEK_CUR) == 105
        assert file.readall() == content[105:]
        assert file.read() == file.read(5) == b"" and file.readinto(buffer) == 0
        assert file.seek(-7, os.SEEK_END) == SIZE - 7
        assert file.read(None) == content[-7:]
        assert file.seek(SIZE + 100) == SIZE + 100
        assert file.read(10) == b""
        assert file.seek(numpy.int64(4096)) == 4096  # type: ignore[arg-type]
        assert file.read(4096) == content[4096:8192]
        for offset, whence, kind in (
            (-1, os.SEEK_SET, ValueError),
            (0, 17, ValueError),
            (-SIZE - 1, os.SEEK_END, ValueError),
            (0.5, os.SEEK_SET, TypeError),
            ("0", os.SEEK_SET, TypeError),
        ):
            with pytest.raises(kind):
                file.seek(offset, whence)  # type: ignore[arg-type]
        assert file.tell() == 8192
        assert next(file) == content[8192:].split(b"\n")[0] + b"\n"


def test_holes(scratch: Path) -> None:
    """SEEK_DATA and SEEK_HOLE find them; past the last data it is ENXIO."""
    path = scratch / "sparse"
    with odirect.open(path, "w+") as file:
        file.truncate(1 << 20)
        file.pwrite(filled(65536, 1), 1 << 19)
        assert file.seek(0, os.SEEK_DATA) == 1 << 19
        assert file.seek(1 << 19, os.SEEK_HOLE) == (1 << 19) + 65536
        assert file.tell() == (1 << 19) + 65536
        with pytest.raises(ODirectError) as caught:
            file.seek(1 << 20, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        assert file.pread(70000, (1 << 19) - 100) == bytes(100) + b"\x01" * 65536 + bytes(4364)


@pytest.mark.parametrize("buffer_size", [1, 100, 8192, 100_000])
def test_under_buffered_reader(path: Path, content: bytes, buffer_size: int) -> None:
    """io.BufferedReader reads every byte in place, with seeks in between."""
    with io.BufferedReader(odirect.open(path), buffer_size) as file:
        rng = random.Random(buffer_size)
        for _ in range(60):
            place, length = rng.randrange(SIZE), rng.randrange(20_000)
            file.seek(place)
            assert file.read(length) == content[place : place + length]
        file.seek(0)
        assert file.peek(1)[:1] == content[:1]
        first = file.read1(7)
        assert first and content.startswith(first)
        assert file.read() == content[len(first) :]


@pytest.mark.parametrize("buffer_size", [1, 100, 8192])
def test_under_buffered_writer(scratch: Path, buffer_size: int) -> None:
    """io.BufferedWriter leaves exactly what was written."""
    path = scratch / "new"
    rng = random.Random(buffer_size)
    expected = bytearray()
    with io.BufferedWriter(odirect.open(path, "w"), buffer_size) as file:
        for _ in range(80):
            data = rng.randbytes(rng.randrange(3000))
            assert file.write(data) == len(data)
            expected += data
    assert path.read_bytes() == expected


def test_under_buffered_random(path: Path, content: bytes) -> None:
    """io.BufferedRandom: reads, writes, seeks and truncates mixed, against a BytesIO."""
    rng = random.Random(9)
    model = io.BytesIO(content)
    with io.BufferedRandom(odirect.open(path, "r+"), 4096) as file:
        for _ in range(300):
            step = rng.randrange(10)
            if step < 4:
                place = rng.randrange(SIZE)
                assert file.seek(place) == model.seek(place)
            elif step < 7:
                length = rng.randrange(9000)
                assert file.read(length) == model.read(length)
            elif step < 9:
                data = rng.randbytes(rng.randrange(9000))
                assert file.write(data) == model.write(data)
            else:
                assert file.tell() == model.tell()
        assert file.truncate(12_345) == model.truncate(12_345)
    assert path.read_bytes() == model.getvalue()


def test_shutil_zipfile_pickle_numpy(path: Path, scratch: Path, content: bytes) -> None:
    """The libraries that take a binary file take this one."""
    with odirect.open(path) as source, odirect.open(scratch / "copy", "w") as target:
        shutil.copyfileobj(source, target)
    assert (scratch / "copy").read_bytes() == content
    with odirect.open(scratch / "zip", "w+") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("one", content)
            archive.writestr("two", b"2")
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
            assert archive.read("one") == content
    with zipfile.ZipFile(scratch / "zip") as archive:
        assert archive.read("two") == b"2"
    numbers = numpy.arange(30_000)
    with odirect.open(scratch / "pickle", "w+") as file:
        pickle.dump({"content": content, "numbers": numbers}, file)
        file.seek(0)
        loaded = pickle.load(io.BufferedReader(file))
    assert loaded["content"] == content and (loaded["numbers"] == numbers).all()
    with odirect.open(scratch / "numbers", "w+") as file:
        assert file.write(numbers) == numbers.nbytes
        back = numpy.zeros_like(numbers)
        file.seek(0)
        assert file.readinto(back) == numbers.nbytes
        assert (back == numbers).all()
        numpy.save(file, numbers)
    assert (numpy.fromfile(scratch / "numbers", numbers.dtype, numbers.size) == numbers).all()


@pytest.mark.parametrize(
    "make",
    [
        bytearray,
        lambda size: numpy.zeros(size, "u1"),
        lambda size: numpy.zeros((4, size // 16), "u4"),
        lambda size: array.array("d", bytes(size)),
        lambda size: mmap.mmap(-1, size),
        lambda size: memoryview(bytearray(size + 8))[8:],
        lambda size: odirect.empty(size).cast("q"),
        lambda size: odirect.empty(size).cast("i", (size // 64, 16)),
    ],
    ids=["bytearray", "u1", "u4 2d", "array", "mmap", "slice", "cast", "cast 2d"],
)
@pytest.mark.parametrize("offset", [0, 4096, 100])
def test_any_buffer(path: Path, content: bytes, make: Callable[[int], object], offset: int) -> None:
    """Whatever has the buffer protocol is filled and written, by its bytes, and counted once (F02)."""
    buffer = make(8192)
    with odirect.open(path, "r+") as file:
        assert file.preadinto(buffer, offset) == 8192
        assert bytes(memoryview(buffer).cast("B")) == content[offset : offset + 8192]  # type: ignore[arg-type]
        assert file.pwrite(buffer, 100_000) == 8192
        totals = file.totals.values()
        assert (sum(tally.operations for tally in totals), sum(tally.bytes for tally in totals)) == (2, 16384)
    assert path.read_bytes()[100_000:108_192] == content[offset : offset + 8192]


def test_buffers_that_are_none(path: Path) -> None:
    """Read-only, not contiguous, no buffer at all, numbers that are no integers: TypeError or ValueError."""
    sliced = numpy.zeros(8192, "u1")[::2]
    with odirect.open(path, "r+") as file:
        for call in (
            lambda: file.preadinto(bytes(4096), 0),
            lambda: file.readinto(b"x"),
            lambda: file.preadinto(sliced, 0),
            lambda: file.pwrite(sliced, 0),
            lambda: file.preadv([bytearray(5), b"x"], 0),
            lambda: file.preadinto(bytearray(4096), -4096),
            lambda: file.preadinto(odirect.empty(4096), -4096),
            lambda: file.pwrite(odirect.empty(4096), -1),
            lambda: file.pread(-1, 0),
            lambda: file.pread(1, -1),
            lambda: file.truncate(-1),
            lambda: file.fallocate(-1, 5),
            lambda: file.fallocate(0, 0),
            lambda: file.fallocate(0, 5, punch=True, zero=True),
        ):
            with pytest.raises(ValueError):
                call()
        for wrong in (
            lambda: file.preadinto("text", 0),
            lambda: file.pwrite("text", 0),
            lambda: file.write(None),
            lambda: file.preadv([5], 0),
            lambda: file.preadinto(odirect.empty(4096), 4096.0),  # type: ignore[arg-type]
            lambda: file.preadinto(odirect.empty(4096), 0.5),  # type: ignore[arg-type]
            lambda: file.pwrite(odirect.empty(4096), None),  # type: ignore[arg-type]
            lambda: file.pread(1.5, 0),  # type: ignore[arg-type]
            lambda: file.truncate(1.5),  # type: ignore[arg-type]
            lambda: file.fallocate(0.5, 5),  # type: ignore[arg-type]
        ):
            with pytest.raises(TypeError):
                wrong()
        assert path.stat().st_size == SIZE and not file.totals


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", READ_VERBS, ids=verb_name)
@pytest.mark.parametrize("size", EDGES)
def test_reads_near_the_end(scratch: Path, size: int, verb: Callable[..., int]) -> None:
    """Sizes and offsets around blocks: the count is exact, and the memory past it untouched (F02)."""
    content = random.Random(size).randbytes(size)
    path = data_file(scratch / "file", content)
    around = sorted({edge + delta for edge in (0, 512, 4096, size) for delta in (-513, -512, -1, 0, 1, 512)})
    with odirect.open(path) as file:
        for offset in (offset for offset in around if offset >= 0):
            for length in (0, 1, 512, 4096, 8192):
                for shift in (0, 1):
                    memory = filled(length + 2048, 0xA5, shift=shift)
                    count = verb(file, memory[:length], offset)
                    assert count == max(0, min(length, size - offset)), (offset, length, shift)
                    assert bytes(memory[:count]) == content[offset : offset + count]
                    assert bytes(memory[count:]) == b"\xa5" * (length + 2048 - count), (offset, length, shift)


@pytest.mark.parametrize("verb", WRITE_VERBS, ids=verb_name)
def test_every_size_is_written_exactly(scratch: Path, verb: Callable[..., int]) -> None:
    """Sizes from 0 to 3 blocks, in one write and in two, read back exactly, and the file has that size (F05)."""
    content = random.Random(11).randbytes(3 * 4096)
    edges = sorted({block * unit + delta for unit in (512, 4096) for block in range(4) for delta in (-1, 0, 1)})
    sizes = [size for size in edges if 0 <= size <= 3 * 4096]
    path = scratch / "new"
    for size in sizes:
        data = odirect.empty(size)
        data[:] = content[:size]
        for split in {0, size // 3, 512, 4095, 4096, size}:
            if split > size:
                continue
            with odirect.open(path, "w") as file:
                for start, end in ((0, split), (split, size)):
                    assert verb(file, data[start:end], start) == end - start
                assert file.size == size
            assert path.read_bytes() == content[:size], (size, split)


@pytest.mark.slow
def test_every_size_and_every_split(scratch: Path) -> None:
    """Every size from 0 to 3 blocks of 512 bytes, split into two at a random place (F05)."""
    content = random.Random(12).randbytes(1536)
    data = odirect.empty(1536)
    data[:] = content
    path = scratch / "new"
    rng = random.Random(13)
    with odirect.open(path, "w+") as file, open(path, "rb", buffering=0) as beside:
        for size in range(1537):
            for split in {size // 2 if size % 64 == 0 else 0, rng.randrange(size + 1)} - {0} or {0}:
                file.truncate(0)
                assert file.pwrite(data[:split], 0) == split
                assert file.pwrite(data[split:size], split) == size - split
                assert os.fstat(beside.fileno()).st_size == size
                assert os.pread(beside.fileno(), 4096, 0) == content[:size], (size, split)


def test_the_size_is_never_padded(scratch: Path) -> None:
    """While a file grows by odd sizes, its size as another descriptor sees it is never past what was asked (F05)."""
    path = scratch / "new"
    asked = [0]
    wrong: list[tuple[int, int]] = []
    done = threading.Event()
    with odirect.open(path, "w") as file:
        beside = os.open(path, os.O_RDONLY)

        def sample() -> None:
            while not done.is_set():
                size = os.fstat(beside).st_size
                most = asked[0]  # read after the size: it never shrinks
                if size > most:
                    wrong.append((size, most))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            rng = random.Random(14)
            for _ in range(150):
                length = rng.choice((1, 511, 513, 4097, 5000, 70_001, 1 << 20 | 1))
                data = filled(length, 1, shift=rng.choice((0, 0, 1)))
                at = asked[0]
                asked[0] = at + length
                assert file.pwrite(data, at) == length
                assert os.fstat(beside).st_size == at + length
        finally:
            done.set()
            sampler.join()
            os.close(beside)
    assert not wrong


def test_below_the_size_there_is_always_data(scratch: Path) -> None:
    """A reader checks every byte below the size that it saw, while appends of any alignment run (F03)."""
    path = scratch / "new"
    done = threading.Event()
    holes: list[tuple[int, int]] = []
    checked = [0]
    with odirect.open(path, "w") as file:
        beside = DirectReader(path)

        def check() -> None:
            start = 0
            while True:
                last = done.is_set()
                size = beside.size
                # What was seen whole stays whole: begin a block before the last end.
                data = beside.read(start, size)
                if len(data) < size - start or data.count(b"\x77") != len(data):
                    holes.append((start, size))
                    return
                checked[0] = size
                start = max(0, size - 8192)
                if last:
                    return

        reader = threading.Thread(target=check)
        reader.start()
        try:
            rng = random.Random(15)
            at = 0
            data = filled(3 << 20, 0x77)
            for number in range(120):
                length = rng.choice((100, 4096, 4097, 65536, 1 << 20, (1 << 20) + 100, 3 << 20))
                shift = rng.choice((0, 0, 512, 7))
                part = data[shift : shift + min(length, len(data) - shift)]
                if number % 3:
                    file.pwrite(part, at)
                else:
                    file.pwritev([part[:512], part[512:]], at)
                at += len(part)
        finally:
            done.set()
            reader.join()
            beside.close()
    assert not holes
    assert checked[0] == at


# --- outcomes ------------------------------------------------------------------------------------


def test_outcomes(path: Path, content: bytes) -> None:
    """Direct, bounced at the head, at the tail, for its memory; what a write promises; totals that add up."""
    with odirect.open(path, "r+") as file:
        unit = max(file.limits.read_align, file.limits.write_align)
        big = odirect.empty(1 << 18)
        shifted = odirect.empty((1 << 17) + 1)[1:]
        device = Promise.DEVICE
        steps: list[tuple[Callable[[], int], Outcome]] = [
            (lambda: file.preadinto(big[:4096], 4096), Outcome(Kind.DIRECT)),
            (lambda: file.preadv([big[:4096], big[4096:8192]], 0), Outcome(Kind.DIRECT)),
            (lambda: file.preadinto(big[:4096], 1), Outcome(Kind.BOUNCED, Reason.MISALIGNED_OFFSET)),
            (lambda: file.preadinto(big[: 4096 + 1], 4096), Outcome(Kind.BOUNCED, Reason.MISALIGNED_LENGTH)),
            (lambda: file.preadinto(shifted[:4096], 4096), Outcome(Kind.BOUNCED, Reason.MISALIGNED_MEMORY)),
            (lambda: file.preadinto(big[:8192], SIZE // unit * unit), Outcome(Kind.BOUNCED, Reason.END_OF_FILE)),
            (lambda: file.preadinto(big, SIZE), Outcome(Kind.DIRECT)),
            (lambda: file.pwrite(big[:4096], 8192), Outcome(Kind.DIRECT, promise=device)),
            (lambda: file.pwrite(big[:100], 8192), Outcome(Kind.BOUNCED, Reason.MISALIGNED_LENGTH, device)),
            (lambda: file.pwrite(big[:4096], 8193), Outcome(Kind.BOUNCED, Reason.MISALIGNED_OFFSET, device)),
            (lambda: file.pwrite(shifted[:4096], 8192), Outcome(Kind.BOUNCED, Reason.MISALIGNED_MEMORY, device)),
        ]
        moved = 0
        for number, (step, expected) in enumerate(steps):
            moved += step()
            assert file.last_outcome == expected, number
        totals = file.totals
        assert sum(tally.operations for tally in totals.values()) == len(steps)
        assert sum(tally.bytes for tally in totals.values()) == moved
        assert set(totals) == {expected for _, expected in steps}
    with odirect.open(path, "r+", dsync=True) as file:
        for offset, length in ((0, 4096), (5, 100)):
            file.pwrite(big[:length], offset)
            assert file.last_outcome is not None and file.last_outcome.promise is Promise.DURABLE


def test_strict(path: Path) -> None:
    """What the kernel would refuse is AlignmentError, EINVAL, and nothing is moved (B01)."""
    with odirect.open(path, "r+", access="strict") as file:
        unit = file.limits.read_align
        shifted = odirect.empty(4097)[1:]
        before = path.read_bytes()
        for call in (
            lambda: file.preadinto(odirect.empty(4096), unit // 2),
            lambda: file.preadinto(odirect.empty(unit + 1), 0),
            lambda: file.preadinto(shifted, 0),
            lambda: file.pwrite(odirect.empty(4096), unit // 2),
            lambda: file.pwrite(b"x" * 5, 0),
            lambda: file.pwritev([odirect.empty(unit // 2), odirect.empty(unit // 2)], 0),
            lambda: file.write(shifted),
            lambda: file.read_batch([1, 2], 512, odirect.empty(1024)),
        ):
            with pytest.raises(AlignmentError) as caught:
                call()
            assert caught.value.errno == errno.EINVAL
        assert path.read_bytes() == before and not file.totals
        assert file.preadinto(odirect.empty(4096), 0) == 4096
        assert file.pwrite(odirect.empty(4096), 4096) == 4096
        # The end of the file may be anywhere: a read across it is no mistake of the caller's.
        assert file.preadinto(odirect.empty(8192), SIZE // 512 * 512) == SIZE % 512
        assert all(outcome.kind in (Kind.DIRECT, Kind.BOUNCED) for outcome in file.totals)


def test_refused_at_open(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_DIRECT is refused at open, everything works through the page cache and says so (F50)."""
    real = os.open

    def refusing(name: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(NotDirectError, match="at open"):
        odirect.open(path, access="strict")
    with odirect.open(path, "r+") as file:
        assert file.preadinto(bytearray(5000), 3) == 5000
        assert file.last_outcome == Outcome(Kind.BUFFERED, Reason.REFUSED_AT_OPEN)
        assert file.pwrite(odirect.empty(4096), 4096) == 4096
        assert file.last_outcome == Outcome(Kind.BUFFERED, Reason.REFUSED_AT_OPEN, Promise.DEVICE)
        assert list(file.read_batch([0, 8192], 4096, odirect.empty(8192))) == [4096, 4096]
        file.sync()
        assert {outcome.kind for outcome in file.totals} == {Kind.BUFFERED}
    assert cached_pages(path) in (0, None)
    assert path.read_bytes() == content[:4096] + bytes(4096) + content[8192:]


@pytest.mark.parametrize("verb", [*READ_VERBS, *WRITE_VERBS], ids=verb_name)
def test_the_kernel_is_choosier_than_it_said(path: Path, content: bytes, verb: Callable[..., int]) -> None:
    """A refusal in mid-stream is tried again with coarser alignment, and the bytes are right (F50, F51)."""
    import dataclasses

    with odirect.open(path, "r+") as file:
        file._state.limits = dataclasses.replace(file.limits, read_align=1, write_align=1, memory_align=1)
        file._adopt(file._state.limits)
        buffer = filled(1000, 3)
        assert verb(file, buffer, 10) == 1000
        assert file.limits.read_align > 1
        expected = content
        if verb in WRITE_VERBS:
            expected = content[:10] + b"\x03" * 1000 + content[1010:]
        else:
            assert bytes(buffer) == content[10:1010]
    assert path.read_bytes() == expected


# --- the flags -----------------------------------------------------------------------------------


def test_nowait(path: Path, content: bytes) -> None:
    """With nowait a request is done, or raises WouldBlockError, and never half and an error (F08)."""
    with odirect.open(path, "r+", nowait=True) as file:
        for offset, length in ((0, 4096), (0, 1 << 18), (5, 100), (SIZE - 100, 4096), (4096, 100_000)):
            buffer = filled(length, 0xA5)
            try:
                count = file.preadinto(buffer, offset)
            except WouldBlockError as error:
                assert error.errno == errno.EAGAIN
                continue
            assert bytes(buffer[:count]) == content[offset : offset + count]
            assert bytes(buffer[count:]) == b"\xa5" * (length - count)
        expected = bytearray(content)
        for offset, length in ((0, 4096), (0, 1 << 18), (5, 100), (SIZE, 4096), (SIZE, 5)):
            data = filled(length, 0x11)
            try:
                count = file.pwrite(data, offset)
            except WouldBlockError:
                count = 0
            expected[offset : offset + count] = b"\x11" * count
            assert path.read_bytes() == expected
        # The stream says None, as raw files do.
        file.seek(1)
        assert file.write(b"unaligned") is None
        assert file.tell() == 1


@pytest.mark.parametrize("is_block", [False, True])
def test_nowait_does_not_wait_for_another_thread(path: Path, is_block: bool) -> None:
    """While another thread merges a part of a block, a write says that it would block (F08)."""
    with odirect.open(path, "r+", nowait=True) as file:
        file._state.is_block = is_block  # where the simple way passes the gate, too
        inside, over = threading.Event(), threading.Event()

        def merge() -> None:
            inside.set()
            over.wait(30)

        thread = threading.Thread(target=lambda: file._gate.merge(merge))
        thread.start()
        try:
            assert inside.wait(30)
            for buffers in ([odirect.empty(4096)], [odirect.empty(4096), odirect.empty(512)]):
                with pytest.raises(WouldBlockError):
                    file.pwritev(buffers, 0)
            if is_block:
                with pytest.raises(WouldBlockError):
                    file.pwrite(odirect.empty(4096), 0)
        finally:
            over.set()
            thread.join()
        file._state.is_block = False
        assert file.pwritev([odirect.empty(4096)], 0) == 4096


def test_nowait_counts_what_was_done(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that the kernel cut short is a true short count, by whichever way it went (F08)."""
    with odirect.open(path, "r+", nowait=True) as file:

        class Short:
            size_hint = SIZE
            fd = -1

            def pwrite(self, buffer: object, offset: int, flags: int) -> int:
                return 512

        monkeypatch.setattr(file, "_simple", Short())
        assert file.pwrite(odirect.empty(4096), 0) == 512
        assert sum(tally.bytes for tally in file.totals.values()) == 512


def test_hipri_is_harmless(path: Path, content: bytes) -> None:
    """hipri changes nothing that can be seen, whether the device polls or not (B06)."""
    with odirect.open(path, "r+", hipri=True) as file:
        for offset in (0, 5):
            for verb in READ_VERBS:
                buffer = odirect.empty(4096)
                assert verb(file, buffer, offset) == 4096
                assert bytes(buffer) == content[offset : offset + 4096]
            for verb in WRITE_VERBS:
                data = odirect.empty(4096)
                data[:] = content[offset : offset + 4096]
                assert verb(file, data, offset) == 4096
    assert path.read_bytes() == content


def test_atomic_is_refused_outside_the_limits(path: Path, content: bytes) -> None:
    """Unless the device promises to keep such a write whole, it is AtomicLimitError and nothing is written (F43)."""
    with odirect.open(path, "r+", atomic=True) as file:
        most = file.limits.atomic_max
        wrong = [(0, 3 * 4096), (1, 4096), (0, 100), (2048, 4096), (0, 2 * max(most, 4096))]
        if not most:
            wrong.append((0, 4096))
        for offset, length in wrong:
            for verb in WRITE_VERBS:
                with pytest.raises((AtomicLimitError, AlignmentError)) as caught:
                    verb(file, odirect.empty(length), offset)
                assert caught.value.errno == errno.EINVAL
        if most:
            assert file.pwrite(filled(most, 5), 0) == most
        assert file.preadinto(odirect.empty(100), 3) == 100
    assert path.read_bytes()[most:] == content[most:]


@pytest.mark.parametrize("verb", WRITE_VERBS, ids=verb_name)
def test_sticky_sync(path: Path, verb: Callable[..., int]) -> None:
    """After a sync has failed every durable write fails, aligned or not, until the file is reopened (F41)."""
    with odirect.open(path, "r+", dsync=True) as file:
        assert verb(file, odirect.empty(4096), 0) == 4096
        file._state.failed_sync = "it failed"
        for offset in (0, 5):
            with pytest.raises(StickySyncError):
                verb(file, odirect.empty(4096), offset)
        with pytest.raises(StickySyncError):
            file.sync()
    with odirect.open(path, "r+", dsync=True) as file:
        assert verb(file, odirect.empty(4096), 0) == 4096


def test_a_durable_write_that_failed_is_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's error of a durable write stays (F41); memory that cannot be used is the caller's alone (F23)."""
    with odirect.open(path, "r+", dsync=True) as file:
        with cut_short(path.parent, 8192) as gone:
            for start in (4096, 4097):
                with pytest.raises(BadBufferError):
                    file.pwrite(gone[start : start + 512], 0)
        assert file.pwrite(odirect.empty(4096), 0) == 4096

        class Failing:
            size_hint = SIZE
            fd = -1

            def pwrite(self, buffer: object, offset: int, flags: int) -> int:
                return -errno.EIO

        with monkeypatch.context() as patched:
            patched.setattr(file, "_simple", Failing())
            with pytest.raises(DeviceError):
                file.pwrite(odirect.empty(4096), 0)
        for call in (lambda: file.pwrite(odirect.empty(4096), 0), file.sync):
            with pytest.raises(StickySyncError):
                call()


# --- the file as a whole -------------------------------------------------------------------------


def test_truncate_and_fallocate(scratch: Path) -> None:
    """Sizes and ranges as the kernel has them."""
    path = data_file(scratch / "file", b"\x01" * 20_000)
    with odirect.open(path, "r+") as file:
        assert file.truncate(10_001) == file.size == 10_001
        assert file.tell() == 0
        file.seek(5000)
        assert file.truncate() == file.size == 5000
        assert file.truncate(9000) == 9000
        assert file.pread(9000, 0) == b"\x01" * 5000 + bytes(4000)
        file.fallocate(9000, 3000)
        assert file.size == 12_000
        file.fallocate(12_000, 50_000, keep_size=True)
        assert file.size == 12_000
        file.fallocate(100, 4096, punch=True)
        file.fallocate(4500, 100, zero=True)
        expected = b"\x01" * 100 + bytes(4096) + b"\x01" * 304 + bytes(100) + b"\x01" * 400 + bytes(7000)
        assert file.pread(20_000, 0) == expected
        for size in (1 << 63, (1 << 63) - 1, 1 << 70):
            with pytest.raises(NoSpaceError):
                file.truncate(size)
        with pytest.raises(NoSpaceError):
            file.pwrite(b"xy", (1 << 63) - 2)
        with pytest.raises((NoSpaceError, ValueError)):
            file.fallocate(0, 1 << 63)
        assert file.size == 12_000
    assert path.read_bytes() == expected


def test_a_size_that_another_changes(path: Path, content: bytes) -> None:
    """A file that another descriptor made longer or shorter is read up to its end as it is now (F02)."""
    with odirect.open(path) as file, open(path, "r+b", buffering=0) as other:
        other.truncate(5000)
        buffer = filled(8192, 0xA5)
        assert file.preadinto(buffer, 0) == 5000
        assert bytes(buffer) == content[:5000] + b"\xa5" * 3192
        assert file.read_batch([0, 4096, 8192], 4096, odirect.empty(3 * 4096)).tolist() == [4096, 904, 0]
        other.truncate(20_000)
        assert file.preadinto(buffer, 8192) == 8192
        assert bytes(buffer) == bytes(8192)
        assert file.size == 20_000


def test_nothing_stays_in_the_page_cache(scratch: Path) -> None:
    """After reads and writes of any alignment the page cache holds no more of the file than before (F50)."""
    path = data_file(scratch / "file", bytes(1 << 20))
    if cached_pages(path) is None:
        pytest.skip("needs cachestat(2)")
    with odirect.open(path, "r+") as file:
        rng = random.Random(16)
        for _ in range(60):
            length = rng.choice((1, 512, 4096, 5000, 200_000))
            buffer = odirect.empty(length)
            for verb in (*READ_VERBS, *WRITE_VERBS):
                verb(file, buffer, rng.randrange((1 << 20) - length))
        file.pwrite(b"x" * 10_001, 1 << 20)
        assert cached_pages(path) == 0


# --- memory --------------------------------------------------------------------------------------


def test_the_buffer_changes_while_it_is_written(path: Path) -> None:
    """A thread scribbles on the buffer during thousands of writes: each block on disk is one of its states (F21)."""
    aligned, unaligned = bytearray(4096), odirect.empty(4096)
    stop = threading.Event()

    def scribble() -> None:
        for value in itertools.cycle((b"\x01", b"\x02")):
            if stop.is_set():
                return
            aligned[:] = value * 4096
            unaligned[:] = value * 4096

    aligned[:] = unaligned[:] = b"\x01" * 4096
    thread = threading.Thread(target=scribble)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        with odirect.open(path, "r+") as file:
            for number in range(700):
                file.pwrite(unaligned, number % 8 * 4096)
                file.pwrite(unaligned, 100_000 + number % 3)
                file.pwrite(aligned, 200_000 + number % 3)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    written = path.read_bytes()
    for start, end in ((0, 32768), (100_002, 104_096), (200_002, 204_096)):
        assert set(written[start:end]) <= {1, 2}


def test_the_same_buffer_twice(path: Path, content: bytes) -> None:
    """A vector may name one buffer several times: the later part stays (F22)."""
    with odirect.open(path, "r+") as file:
        for buffer, offset in ((odirect.empty(4096), 0), (bytearray(1000), 7)):
            size = len(buffer)
            assert file.preadv([buffer, buffer, buffer], offset) == 3 * size
            state = bytes(buffer)
            assert state in (content[offset + k * size : offset + k * size + size] for k in range(3))
            assert file.pwritev([buffer, buffer], 100_000 + offset) == 2 * size
            assert file.pread(2 * size, 100_000 + offset) == state * 2


def test_the_buffer_is_a_mapping_of_the_same_file(path: Path, content: bytes) -> None:
    """No hang, and no stale data: what is read into a mapping of the file is in the file (F23)."""
    with open(path, "r+b") as other, odirect.open(path, "r+") as file:
        with mmap.mmap(other.fileno(), 65536) as area, memoryview(area) as view:
            expected = bytearray(content)
            for target, offset, length in ((0, 8192, 4096), (16384, 100_001, 3000), (0, 0, 8192)):
                with contextlib.suppress(BadBufferError):
                    if file.preadinto(view[target : target + length], offset) == length:
                        expected[target : target + length] = expected[offset : offset + length]
                with contextlib.suppress(BadBufferError):
                    if file.pwrite(view[target : target + length], 200_000) == length:
                        expected[200_000 : 200_000 + length] = expected[target : target + length]
        file.sync()
        assert file.pread(SIZE, 0) == expected
    assert data_file(path).read_bytes() == expected


@pytest.mark.parametrize("verb", [*READ_VERBS, *WRITE_VERBS], ids=verb_name)
def test_memory_that_is_not_there(path: Path, content: bytes, verb: Callable[..., int]) -> None:
    """A mapping that was cut short is BadBufferError, direct, bounced and through the cache, never a signal (F23)."""
    with odirect.open(path, "r+") as file, cut_short(path.parent, 65536) as gone:
        for start, length, offset in ((4096, 4096, 0), (4096, 4096, 5), (4097, 4096, 0), (4096, 100, 0), (0, 8192, 1)):
            with pytest.raises(BadBufferError) as caught:
                verb(file, gone[start : start + length], offset)
            assert caught.value.errno == errno.EFAULT
        # The file and its rings are none the worse for it.
        assert file.pread(100, 4096 * 5) == content[4096 * 5 : 4096 * 5 + 100]


def test_memory_that_may_not_be_touched(path: Path) -> None:
    """A mapping without the right is BadBufferError (F23)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    area = mmap.mmap(-1, 16384)
    view = memoryview(area)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    with odirect.open(path, "r+") as file:
        for protection, verbs in ((0, (*READ_VERBS, *WRITE_VERBS)), (1, READ_VERBS)):
            assert libc.mprotect(ctypes.c_void_p(address), 16384, protection) == 0
            try:
                for verb in verbs:
                    for start, offset in ((0, 0), (0, 3), (1, 0)):
                        with pytest.raises(BadBufferError):
                            verb(file, view[start : start + 8192], offset)
            finally:
                libc.mprotect(ctypes.c_void_p(address), 16384, 3)


# --- threads, forks, signals ---------------------------------------------------------------------


def test_several_threads(path: Path, content: bytes) -> None:
    """Reads, writes and batches of one file from several threads at once: all bytes and totals are right."""
    errors: list[BaseException] = []
    with odirect.open(path, "r+") as file:
        count = [0, 0]

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                mine = 100_000 + number * 20_000
                for turn in range(60):
                    place = rng.randrange(90_000)
                    buffer = odirect.empty(rng.choice((4096, 512, 1000)))
                    assert file.preadinto(buffer, place) == len(buffer)
                    assert bytes(buffer) == content[place : place + len(buffer)]
                    data = filled(rng.choice((4096, 5000, 300)), number + turn)
                    at = mine + rng.randrange(20_000 - 5000)
                    assert file.pwrite(data, at) == len(data)
                    assert file.pread(len(data), at) == bytes(data)
                    out = odirect.empty(8 * 4096)
                    places = [rng.randrange(20) * 4096 for _ in range(8)]
                    assert file.read_batch(places, 4096, out).tolist() == [4096] * 8
                    for n, at in enumerate(places):
                        assert bytes(out[n * 4096 : n * 4096 + 4096]) == content[at : at + 4096]
            except BaseException as error:
                errors.append(error)
            count[0] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        # Two threads in one counter may lose a count, as its description says; never invent one.
        assert sum(tally.operations for tally in file.totals.values()) <= 6 * 60 * 11
    assert path.read_bytes()[:100_000] == content[:100_000]


def test_threads_whose_writes_share_blocks(scratch: Path) -> None:
    """Threads write ranges of any alignment that share blocks and no byte: none is undone, none fails (F10, F13)."""
    rng = random.Random(17)
    size = 64 << 10
    for _ in range(12):
        path = data_file(scratch / "file", bytes(size))
        cuts = sorted({0, size, *(rng.randrange(size) // unit * unit for unit in (1, 1, 512) for _ in range(40))})
        runs = list(zip(cuts, cuts[1:], range(1, 200), strict=False))
        errors: list[BaseException] = []
        with odirect.open(path, "r+") as file:

            def work(mine: list[tuple[int, int, int]], errors: list[BaseException] = errors) -> None:
                try:
                    for start, end, value in mine:
                        if value % 5:
                            file.pwrite(filled(end - start, value), start)
                        else:
                            file.pwritev([filled(end - start, value)], start)
                except BaseException as error:
                    errors.append(error)

            shuffled = rng.sample(runs, len(runs))
            threads = [threading.Thread(target=work, args=(shuffled[number::4],)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not errors, errors
        expected = b"".join(bytes([value]) * (end - start) for start, end, value in runs)
        assert path.read_bytes() == expected
        assert data_file(path).read_bytes() == expected


def test_close_waits_for_other_threads(scratch: Path) -> None:
    """Closing waits for threads inside calls; later calls are ClosedError, and no byte goes astray (F24)."""
    path = data_file(scratch / "file", bytes(1 << 20))
    bystander = scratch / "bystander"
    for turn in range(20):
        file = odirect.open(path, "r+")
        begun = threading.Barrier(4)
        errors: list[BaseException] = []

        def work(
            file: odirect.File = file,
            begun: threading.Barrier = begun,
            number: int = turn,
            errors: list[BaseException] = errors,
        ) -> None:
            data = filled(300_001, 0xEE, shift=1)
            try:
                begun.wait()
                while True:
                    if number % 2:
                        file.pwrite(data, 5)
                    else:
                        file.write_batch(range(1, 300_000, 1000), 1000, data)
            except ClosedError:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait()
        file.close()
        # The descriptors' numbers go to this file at once.
        with open(bystander, "w+b") as beside, open(bystander, "r+b") as again:
            beside.write(b"safe")
            beside.flush()
            for thread in threads:
                thread.join()
            assert again.read() == b"safe"
        assert not errors, errors


def test_fork(path: Path, content: bytes) -> None:
    """A child uses inherited files and files of its own, while the parent has reads in flight (F24)."""
    with odirect.open(path, "r+") as file:
        file.preadinto(odirect.empty(4096), 1)
        requests = [file.submit("read", number * 4096, bytearray(4096)) for number in range(50)]

        def work() -> None:
            for verb in READ_VERBS:
                for offset in (0, 5):
                    buffer = odirect.empty(4096)
                    assert verb(file, buffer, offset) == 4096
                    assert bytes(buffer) == content[offset : offset + 4096]
            assert file.pwrite(b"child", 5) == 5
            with odirect.open(path) as own:
                assert own.pread(5, 5) == b"child"
            file.sync()
            file.close()

        in_child(work)
        assert len(list(file.completions())) == 50
        for request in requests:
            start = request.offset
            expected = content[:5] + b"child" + content[10:]
            assert bytes(request.buffer)[10:] == expected[start : start + 4096][10:]  # type: ignore[call-overload]
        assert file.pread(10, 0) == content[:5] + b"child"


def test_buffers_in_a_child() -> None:
    """A child sees zeroes in an inherited buffer, and letting go of it takes no memory of the child's own away (F24).

    A range that fork left out of the child would be a hole; what the child maps may land there, and
    the inherited object would unmap it when it is collected.
    """
    buffers = [filled(length, 0x5A) for length in (4096, 1 << 16, 1 << 20, 4 << 20) for _ in range(8)]

    def child() -> None:
        own = [(mmap.mmap(-1, len(buffer)), len(buffer)) for buffer in buffers]
        for area, length in own:
            area[:] = b"\x01" * length
        for buffer in buffers:
            assert bytes(buffer) == bytes(len(buffer))
        del buffer
        buffers.clear()
        gc.collect()
        own += [(mmap.mmap(-1, 1 << 20), 1 << 20)]
        for area, length in own[:-1]:
            assert area[:] == b"\x01" * length

    in_child(child)
    assert all(bytes(buffer) == b"\x5a" * len(buffer) for buffer in buffers)


def test_fork_while_threads_are_inside(path: Path) -> None:
    """Threads do not live on in a child, nor do the locks that they held: it can use and close the file (F24)."""
    stop = threading.Event()
    with odirect.open(path, "r+") as file:

        def work() -> None:
            data = filled(100_001, 1, shift=1)
            while not stop.is_set():
                file.pwrite(data, 3)
                file.seek(0)

        def child() -> None:
            signal.alarm(30)
            file.seek(200_007)
            assert file.pwrite(b"child", 200_007) == 5
            assert file.read(5) == b"child"
            file.close()

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                in_child(child)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@pytest.mark.slow
def test_interrupted(path: Path, content: bytes) -> None:
    """An exception of a signal's handler, at any point: nothing hangs, is left in flight, or is broken (F24)."""

    class Stop(Exception):
        pass

    armed = [False]

    def handler(*_: object) -> None:
        if armed[0]:
            raise Stop

    before = signal.signal(signal.SIGUSR1, handler)
    # Python drops an exception that comes in a finalizer, and tells this hook.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    main = threading.get_ident()
    done = threading.Event()

    def interrupt() -> None:
        rng = random.Random(18)
        while not done.wait(0.0001 + rng.random() * 0.004):
            signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = 0
    try:
        with odirect.open(path, "r+") as file:
            buffer, out, own = odirect.empty(100_001), odirect.empty(4096 * 64), content[200_001:290_000]
            while stopped < 400:
                armed[0] = True
                try:
                    while True:
                        file.preadinto(buffer, 3)
                        file.read_batch(range(0, 4096 * 64, 4096), 4096, out)
                        file.pwrite(own, 200_001)
                        file.seek(200_001)
                        file.write(own[:4096])
                except Stop:
                    armed[0] = False
                    stopped += 1
                assert file.pread(1000, 5) == content[5:1005]
                assert file.pwrite(content[5:8], 5) == 3
    finally:
        armed[0] = False
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
        sys.unraisablehook = hook
    assert path.read_bytes() == content
    here.forget()
    gc.collect()  # the tasks that were stopped half-way are in cycles


# --- every way is the same -----------------------------------------------------------------------


def describe(file: odirect.File, verb: Callable[..., int], buffer: memoryview, offset: int) -> tuple[object, ...]:
    """What came of a request: count or error, outcome, and the bytes."""
    before = file.totals
    try:
        result: object = verb(file, buffer, offset)
    except (ODirectError, ValueError, OverflowError) as error:
        return type(error), getattr(error, "errno", None)
    changed = {outcome for outcome, tally in file.totals.items() if before.get(outcome) != tally}
    return result, changed, bytes(buffer)


async def describe_aio(path: Path, access: str, name: str, buffer: memoryview, offset: int) -> tuple[object, ...]:
    """What came of a request by a method of `aio.File`."""
    async with aio.open(path, "r+", access=access) as file:  # type: ignore[arg-type]
        try:
            result = await getattr(file, name)([buffer] if name.endswith("v") else buffer, offset)
        except (ODirectError, ValueError, OverflowError) as error:
            return type(error), getattr(error, "errno", None)
        return result, set(file.totals), bytes(buffer)


@pytest.mark.parametrize("access", ["auto", "strict"])
@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=strategies.data())
def test_every_way_is_the_same(scratch_root: Path, access: str, data: strategies.DataObject) -> None:
    """One request, simple, general, in a batch, submitted, in asyncio: the same bytes, error and outcome."""
    unit = data.draw(strategies.sampled_from([1, 512, 4096]))
    size = data.draw(strategies.integers(0, 40)) * unit
    offset = data.draw(strategies.integers(0, 20)) * unit
    length = data.draw(strategies.integers(1, 20)) * unit
    shift = data.draw(strategies.sampled_from([0, 0, 0, 1, 512]))
    content = random.Random(size).randbytes(size)
    path = scratch_root / "same"
    try:
        for verbs in (READ_VERBS, WRITE_VERBS):
            answers = {}
            for verb in verbs:
                data_file(path, content)
                with odirect.open(path, "r+", access=access) as file:  # type: ignore[arg-type]
                    answers[verb_name(verb)] = (
                        describe(file, verb, filled(length, 0x3C, shift=shift), offset),
                        path.read_bytes(),
                    )
            for name in ("preadinto", "preadv") if verbs is READ_VERBS else ("pwrite", "pwritev"):
                data_file(path, content)
                buffer = filled(length, 0x3C, shift=shift)
                answers[f"aio.{name}"] = (
                    asyncio.run(describe_aio(path, access, name, buffer, offset)),
                    path.read_bytes(),
                )
            first = next(iter(answers.values()))
            assert all(answer == first for answer in answers.values()), answers
    finally:
        path.unlink(missing_ok=True)


class AgainstTheModel(RuleBasedStateMachine):
    """Random operations on a file, by all verbs, agree with a file in memory (F02, F05, F13)."""

    root: Path
    numbers = itertools.count()
    files = Bundle("files")

    def __init__(self) -> None:
        super().__init__()
        self.path = self.root / f"machine-{next(self.numbers)}"
        self.model = ModelFile()
        self.file = odirect.open(self.path, "w+")

    offsets = strategies.one_of(
        strategies.integers(0, 20).map(lambda block: block * 4096),
        strategies.integers(0, 160).map(lambda block: block * 512),
        strategies.integers(0, 80_000),
    )
    lengths = strategies.one_of(
        strategies.integers(0, 5).map(lambda block: block * 4096),
        strategies.integers(0, 40).map(lambda block: block * 512),
        strategies.integers(0, 20_000),
    )
    shifts = strategies.sampled_from([0, 0, 0, 1, 512])

    seeds = strategies.integers(0, 255)

    @rule(verb=strategies.sampled_from(WRITE_VERBS), offset=offsets, length=lengths, shift=shifts, seed=seeds)
    def write(self, verb: Callable[..., int], offset: int, length: int, shift: int, seed: int) -> None:
        data = odirect.empty(length + shift)[shift:]
        data[:] = random.Random(seed).randbytes(length)
        assert verb(self.file, data, offset) == length
        self.model.pwrite(data, offset)

    @rule(verb=strategies.sampled_from(READ_VERBS), offset=offsets, length=lengths, shift=shifts)
    def read(self, verb: Callable[..., int], offset: int, length: int, shift: int) -> None:
        buffer = filled(length, 0xA5, shift=shift)
        expected = self.model.pread(length, offset)
        assert verb(self.file, buffer, offset) == len(expected)
        assert bytes(buffer) == expected + b"\xa5" * (length - len(expected))

    @rule(offset=offsets, data=strategies.binary(max_size=50))
    def stream(self, offset: int, data: bytes) -> None:
        assert self.file.seek(offset) == offset
        assert self.file.write(data) == len(data)
        assert self.file.tell() == offset + len(data)
        self.model.pwrite(data, offset)
        assert self.file.read(100) == self.model.pread(100, offset + len(data))

    @rule(size=offsets)
    def truncate(self, size: int) -> None:
        self.file.truncate(size)
        self.model.truncate(size)

    @rule(offset=offsets, length=lengths.filter(bool))
    def punch(self, offset: int, length: int) -> None:
        self.file.fallocate(offset, length, punch=True)
        self.model.punch(offset, length)

    @rule(offset=offsets, length=lengths.filter(bool), keep_size=strategies.booleans())
    def zero(self, offset: int, length: int, keep_size: bool) -> None:
        self.file.fallocate(offset, length, zero=True, keep_size=keep_size)
        if not keep_size and offset + length > self.model.size:
            self.model.truncate(offset + length)
        self.model.punch(offset, length)

    @rule(offset=offsets, length=lengths.filter(bool), keep_size=strategies.booleans())
    def reserve(self, offset: int, length: int, keep_size: bool) -> None:
        self.file.fallocate(offset, length, keep_size=keep_size)
        if not keep_size and offset + length > self.model.size:
            self.model.truncate(offset + length)

    @rule(data_only=strategies.booleans())
    def sync(self, data_only: bool) -> None:
        self.file.sync(data_only=data_only)

    @rule(mode=strategies.sampled_from(["r+", "a+"]), dsync=strategies.booleans())
    def reopen(self, mode: str, dsync: bool) -> None:
        self.file.close()
        self.file = odirect.open(self.path, "r+", dsync=dsync)

    @rule(offset=offsets, data=strategies.binary(min_size=1, max_size=5000))
    def buffered_write_beside(self, offset: int, data: bytes) -> None:
        with open(self.path, "r+b") as beside:
            beside.seek(offset)
            beside.write(data)
        self.model.pwrite(data, offset)

    @rule()
    def buffered_read_beside(self) -> None:
        assert self.path.read_bytes() == self.model.data

    @invariant()
    def has_its_size(self) -> None:
        assert self.path.stat().st_size == self.model.size
        assert self.file.size == self.model.size

    def teardown(self) -> None:
        self.file.close()
        try:
            assert self.path.read_bytes() == self.model.data
            assert data_file(self.path).read_bytes() == self.model.data
        finally:
            self.path.unlink()


@pytest.mark.slow
def test_against_the_model(scratch: Path) -> None:
    """Random operations, verified at the end through the page cache and again from the disk (F02, F05, F13)."""
    AgainstTheModel.root = scratch
    hypothesis.stateful.run_state_machine_as_test(
        AgainstTheModel,
        settings=hypothesis.settings(
            max_examples=50, stateful_step_count=25, suppress_health_check=list(hypothesis.HealthCheck)
        ),
    )


# --- what an audit found -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 511, 512, 1000, 4097, 100_000])
def test_strict_reads_up_to_the_end(scratch: Path, size: int) -> None:
    """Strict access asks for the last block whole, as the kernel takes it, wherever the file ends (B01, F02)."""
    content = random.Random(size).randbytes(size)
    path = data_file(scratch / "file", content)
    with odirect.open(path, access="strict") as file:
        unit = file.limits.read_align
        last = (size - 1) // unit * unit
        assert file.pread(4096, last) == content[last : last + 4096]
        assert file.pread(1 << 50, 0) == content
        assert file.read() == content and file.read() == b"" and file.tell() == size
        assert file.readinto(odirect.empty(4096)) == 0
        assert file.pread(unit, size + 1) == b""
        file.seek(0)
        assert file.readall() == content
        if size % unit:
            with pytest.raises(AlignmentError, match="file"):
                file.pread(unit + 1, last)
        if size > 1 and unit > 1:
            with pytest.raises(AlignmentError):
                file.pread(unit, 1)
        for length in (4096, 1 << 16):
            file.seek(0)
            target = io.BytesIO()
            shutil.copyfileobj(file, target, length)
            assert target.getvalue() == content
        file.seek(0)
        assert io.BufferedReader(file).read() == content


@pytest.mark.parametrize("access", ["auto", "strict"])
@pytest.mark.parametrize("position", [0, 4096, 4000, 333, 299_999, SIZE])
def test_numpys_own_calls(path: Path, content: bytes, position: int, access: Literal["auto", "strict"]) -> None:
    """fromfile and tofile, which ask for a descriptor, are right at any position, also beside direct I/O (G07)."""
    with odirect.open(path, "r+", access=access) as file, path.open("rb") as other:
        file.seek(position)
        other.seek(position)
        found, wanted = numpy.fromfile(file, numpy.uint8, count=10), numpy.fromfile(other, numpy.uint8, count=10)
        assert (found == wanted).all() and file.tell() == other.tell() == min(position + 10, SIZE)
        file.seek(position)
        assert bytes(numpy.fromfile(file, numpy.uint8)) == content[position:]
        numbers = numpy.arange(25_000)
        file.seek(position)
        numbers.tofile(file)
        assert file.tell() == position + numbers.nbytes
        model = bytearray(content)
        model[position : position + numbers.nbytes] = numbers.tobytes()
        buffer = odirect.empty(len(model) + 4096 - len(model) % 4096)
        assert file.preadinto(buffer, 0) == len(model) and buffer[: len(model)] == model
        assert file.pwrite(filled(8192, 5), 4096) == 8192
        model[4096 : 4096 + 8192] = b"\x05" * 8192
        file.seek(0)
        assert bytes(numpy.fromfile(file, numpy.uint8)) == model
        file.sync()
    assert path.read_bytes() == model


def test_a_descriptor_for_others(path: Path, content: bytes) -> None:
    """fileno stands where the position is, takes any length, and is the file's: children, sendfile, mappings (G07)."""
    with odirect.open(path, "r+") as file:
        file.seek(1001)
        assert subprocess.run(["cat"], stdin=file.fileno(), capture_output=True, check=True).stdout == content[1001:]
        assert os.fstat(file.fileno()).st_ino == path.stat().st_ino
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert ours.sendfile(file, 77, 5000) == 5000
            assert theirs.recv(5000, socket.MSG_WAITALL) == content[77:5077]
        assert file.tell() == 5077
        with mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ) as area:
            assert area[:] == content[:4096]
        file.seek(1 << 70)
        assert os.fstat(file.fileno()).st_size == SIZE
        with pytest.raises(OSError, match="Bad file descriptor"):
            descriptor = file.fileno()
            file.close()
            os.fstat(descriptor)


def made_while_read() -> list[Path]:
    """Files of this machine whose size says nothing, and whose content stays."""
    places = (
        "/proc/version",
        "/proc/sys/kernel/ostype",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/proc/kallsyms",
    )
    return [Path(place) for place in places if os.access(place, os.R_OK)]


@pytest.mark.parametrize("path", made_while_read(), ids=str)
def test_files_that_are_made_while_they_are_read(path: Path) -> None:
    """What has a size of 0 or of a page and other content is read to its end, and said to be buffered (F02, F50)."""
    content = path.read_bytes()
    assert content and len(content) != path.stat().st_size
    with odirect.open(path) as file:
        assert file.read() == content and file.read() == b""
        assert file.pread(5, 2) == content[2:7] and file.pread(5, len(content)) == b""
        buffer = bytearray(len(content) + 5000)
        assert file.preadinto(buffer, 0) == len(content) and buffer[: len(content)] == content
        assert file.preadv([bytearray(3), bytearray(2)], 1) == 5
        assert file.read_batch([0, 3, len(content)], 2, bytearray(6)).tolist() == [2, 2, 0]
        assert {outcome.kind for outcome in file.totals} == {Kind.BUFFERED}
        with pytest.raises(UnsupportedError):
            file.submit("read", 0, bytearray(10))
    with odirect.open(path) as file:
        assert io.BufferedReader(file).read() == content
    with pytest.raises(NotDirectError):
        odirect.open(path, access="strict")

    async def main() -> None:
        async with aio.open(path) as file:
            assert await file.pread(1 << 40, 0) == content
            assert await file.pread(5, 2) == content[2:7]
            assert file.last_outcome is not None and file.last_outcome.kind is Kind.BUFFERED

    asyncio.run(main())


class _Sizeless:
    """A status that says that a file is empty, as some file systems that are programs do."""

    st_size = 0

    def __init__(self, status: os.stat_result) -> None:
        self._status = status

    def __getattr__(self, name: str) -> object:
        return getattr(self._status, name)


def test_a_size_of_zero_where_direct_is_taken(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_DIRECT is taken, a file of 0 bytes that has a first byte is read to its end all the same (F02)."""
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: _Sizeless(real(fd)))
    with odirect.open(path) as file:
        assert file.size == 0
        assert file.read() == content
        assert file.last_outcome == Outcome(Kind.BUFFERED, Reason.CACHED_BY_FS)
    with pytest.raises(NotDirectError, match="its size is 0"):
        odirect.open(path, access="strict")


def test_an_empty_file_stays_direct(scratch: Path) -> None:
    """A file that is empty when it is opened goes direct as soon as it holds something."""
    path = data_file(scratch / "empty", b"")
    with odirect.open(path) as reader, odirect.open(path, "r+") as writer:
        assert reader.read() == b""
        assert writer.pwrite(filled(4096, 7), 0) == 4096
        assert reader.preadinto(odirect.empty(4096), 0) == 4096
        assert reader.last_outcome == Outcome(Kind.DIRECT)


@pytest.mark.parametrize("mode", [None, 1, [], b"r"])
def test_a_mode_that_is_no_text(path: Path, mode: str) -> None:
    """It is TypeError, in both faces."""
    with pytest.raises(TypeError, match="mode"):
        odirect.open(path, mode)

    async def main() -> None:
        with pytest.raises(TypeError, match="mode"):
            await aio.open(path, mode)

    asyncio.run(main())


def test_a_ring_that_is_none_is_told_at_open(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong ODIRECT_RING is told before anything is done to the file (F53)."""
    monkeypatch.setenv("ODIRECT_RING", "uring")
    for mode in ("r", "w"):
        with pytest.raises(ValueError, match="ODIRECT_RING"):
            odirect.open(path, mode)
    assert path.read_bytes() == content


def test_offsets_past_what_is_signed(path: Path) -> None:
    """A batch names such an offset as it was given."""
    with odirect.open(path) as file:
        offsets: Any = numpy.array([0, 2**64 - 1], dtype=numpy.uint64)
        with pytest.raises(ValueError, match="offset 1 of the batch is 18446744073709551615"):
            file.read_batch(offsets, 512, odirect.empty(1024))
        assert file.read_batch(offsets[:1], 512, odirect.empty(512)).tolist() == [512]


def test_atomic_is_not_blamed_on_the_buffer(path: Path) -> None:
    """Where the device promises nothing, that is said, whatever else is wrong with the request (F43)."""
    with odirect.open(path, "r+", atomic=True) as file:
        if file.limits.atomic_max:
            pytest.skip("this device has atomic writes")
        for verb in WRITE_VERBS:
            with pytest.raises(AtomicLimitError, match="none at all"):
                verb(file, filled(4096, 1, shift=1), 0)
        with pytest.raises(io.UnsupportedOperation), odirect.open(path, atomic=True) as reader:
            reader.pwrite(bytes(4096), 0)
        assert file.truncate(SIZE) == SIZE

    async def main() -> None:
        async with aio.open(path, "r+", atomic=True) as file:
            for call in (file.pwrite, lambda buffer, offset: file.pwritev([buffer], offset)):
                with pytest.raises(AtomicLimitError, match="none at all"):
                    await call(filled(4096, 1, shift=1), 0)
            assert await file.truncate(SIZE) == SIZE

    asyncio.run(main())
