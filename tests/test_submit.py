"""`File.submit` and `completions`: requests in flight of a synchronous caller."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

import pytest
from tests.files import cut_short, data_file, filled

import odirect
from odirect import Kind
from odirect.base.errors import BadBufferError, ClosedError, StickySyncError

SIZE = 1 << 20


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def path(scratch: Path, content: bytes) -> Path:
    return data_file(scratch / "file", content)


def test_each_request_is_completed_once(path: Path, content: bytes) -> None:
    """Hundreds of reads, more than are given to the kernel at once: each comes back once, with its tag (B07)."""
    with odirect.open(path) as file:
        places = [number * 1021 % (SIZE - 8192) for number in range(700)]
        for number, place in enumerate(places):
            length = 4096 if place % 2 else 5000
            if place % 3 == 0:
                place, length = place // 4096 * 4096, 4096
                places[number] = place
            request = file.submit("read", place, odirect.empty(length), number)
            assert not request.done
            with pytest.raises(RuntimeError, match="in flight"):
                request.result()
        seen = set()
        for request in file.completions():
            assert request.tag not in seen
            seen.add(request.tag)
            assert request.result() == request.length
            place = places[request.tag]  # type: ignore[call-overload]
            assert bytes(request.buffer) == content[place : place + request.length]  # type: ignore[call-overload]
        assert len(seen) == 700
        assert list(file.completions()) == []
        assert sum(tally.operations for tally in file.totals.values()) == 700


def test_more_may_be_submitted_while_completions_runs(path: Path, content: bytes) -> None:
    """The usual loop: one goes out for each that comes in."""
    with odirect.open(path) as file:
        left = [number * 4096 for number in range(SIZE // 4096)]
        for _ in range(16):
            file.submit("read", left.pop(), odirect.empty(4096))
        done = 0
        for request in file.completions():
            assert bytes(request.buffer) == content[request.offset : request.offset + 4096]  # type: ignore[call-overload]
            done += 1
            if left:
                file.submit("read", left.pop(), request.buffer)
        assert done == SIZE // 4096


def test_an_error_is_the_requests_own(path: Path) -> None:
    """One request that fails neither stops nor taints the others (B04, F06, F23)."""
    with odirect.open(path, "r+") as file, cut_short(path.parent, 8192) as gone:
        good = file.submit("read", 0, odirect.empty(4096))
        bad = file.submit("read", 0, gone[4096:8192])
        worse = file.submit("write", 5, gone[4096:4200])
        after = file.submit("read", 8192, odirect.empty(4096))
        assert {id(request) for request in file.completions()} == {id(one) for one in (good, bad, worse, after)}
        assert good.result() == after.result() == 4096
        for request in (bad, worse):
            assert request.done and request.outcome is None
            with pytest.raises(BadBufferError) as caught:
                request.result()
            assert caught.value.filename == os.fspath(path)


def test_what_cannot_be_started_is_told_at_once(path: Path) -> None:
    """A wrong argument raises, and nothing is in flight afterwards."""
    with odirect.open(path) as file:
        with pytest.raises(ValueError, match="negative"):
            file.submit("read", -4096, odirect.empty(4096))
        with pytest.raises(ValueError, match="append"):
            file.submit("append", 0, odirect.empty(4096))  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            file.submit("read", 0, bytes(4096))
        with pytest.raises(TypeError):
            file.submit("read", 0, 4096)
        with pytest.raises(TypeError):
            file.submit("read", 0.5, odirect.empty(4096))  # type: ignore[arg-type]
        with pytest.raises(OSError, match="not opened for writing"):
            file.submit("write", 0, odirect.empty(4096))
        assert list(file.completions()) == []


def test_another_thread_is_refused(path: Path) -> None:
    """submit and completions belong to one thread, aligned or not, and what is in flight is not harmed."""
    with odirect.open(path) as file:
        first = file.submit("read", 0, odirect.empty(4096))
        refused: list[str] = []

        def other() -> None:
            for offset in (4096, 5):
                try:
                    file.submit("read", offset, odirect.empty(4096))
                except RuntimeError as error:
                    refused.append(str(error))
            try:
                list(file.completions())
            except RuntimeError as error:
                refused.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(refused) == 3 and all("thread" in text for text in refused)
        assert list(file.completions()) == [first]


def test_close_waits_and_drops_the_answers(path: Path, content: bytes) -> None:
    """Closing with requests in flight, some of them finished and not fetched, ends when all are done (F24)."""
    file = odirect.open(path)
    requests = [file.submit("read", number * 4096, odirect.empty(4096)) for number in range(200)]
    next(iter(file.completions()))
    file.close()
    assert all(request.done for request in requests)
    for number, request in enumerate(requests):
        assert bytes(request.buffer) == content[number * 4096 : number * 4096 + 4096]  # type: ignore[call-overload]
    with pytest.raises(ClosedError):
        file.submit("read", 0, odirect.empty(4096))


def test_thrown_away_with_reads_in_flight(path: Path) -> None:
    """Garbage collection of the file, the requests and the buffers waits for the device (F24)."""
    for _ in range(50):
        file = odirect.open(path)
        for number in range(64):
            file.submit("read", number * 4096 + number % 2, odirect.empty(8192))
        del file
        gc.collect()


def test_a_growing_files_size_never_runs_ahead(scratch: Path) -> None:
    """Requests that make the file grow land in the order in which they were submitted (F03)."""
    path = scratch / "new"
    with odirect.open(path, "w+") as file:
        sizes = [1, 511, 512, 4095, 4096, 4097, 10_000] * 6
        at = 0
        for number, size in enumerate(sizes):
            file.submit("write", at, filled(size, number + 1), (at, size))
            at += size
        end = 0
        for request in file.completions():
            assert request.tag == (end, request.length), "done out of order"
            end += request.result()
            assert os.stat(path).st_size >= end
    expected = b"".join(bytes([number + 1]) * size for number, size in enumerate(sizes))
    assert path.read_bytes() == expected


def test_a_truncated_file_is_not_read_past_its_end(path: Path, content: bytes) -> None:
    """After a truncate through the file the memory past the count is left alone (F02)."""
    with odirect.open(path, "r+") as file:
        file.submit("read", 0, odirect.empty(4096))
        list(file.completions())
        file.truncate(5000)
        buffer = filled(8192, 0xA5)
        request = file.submit("read", 0, buffer)
        assert list(file.completions()) == [request]
        assert request.result() == 5000
        assert bytes(buffer) == content[:5000] + b"\xa5" * 3192


def test_neighbours_that_share_a_block(scratch: Path) -> None:
    """Writes of any alignment that share blocks and no byte, all in flight at once: none is undone (F10, F13)."""
    rng = random.Random(5)
    size = 64 << 10
    for _ in range(20):
        path = data_file(scratch / "file", bytes(size))
        cuts = sorted({0, size, *(rng.randrange(size) // unit * unit for unit in (1, 512) for _ in range(20))})
        runs = list(zip(cuts, cuts[1:], range(1, 100), strict=False))
        rng.shuffle(runs)
        with odirect.open(path, "r+") as file:
            for start, end, value in runs:
                file.submit("write", start, filled(end - start, value))
            for request in file.completions():
                assert request.result() == request.length
        expected = b"".join(bytes([value]) * (end - start) for start, end, value in sorted(runs))
        assert path.read_bytes() == expected
        assert data_file(path).read_bytes() == expected


def test_an_unaligned_write_beside_what_was_submitted(scratch: Path) -> None:
    """`pwrite` into a block with submitted writes in flight waits for those, and none is undone (F10)."""
    for _ in range(30):
        path = data_file(scratch / "file", bytes(4096))
        with odirect.open(path, "r+") as file:
            for number in range(1, 8):
                file.submit("write", number * 512, filled(512, number))
            assert file.pwrite(b"\xff" * 100, 7) == 100
            assert len(list(file.completions())) == 7
        expected = bytes(7) + b"\xff" * 100 + bytes(405) + b"".join(bytes([n]) * 512 for n in range(1, 8))
        assert data_file(path).read_bytes() == expected


def test_sticky_sync(path: Path) -> None:
    """After a sync has failed a durable write through submit fails too, until the file is reopened (F41)."""
    with odirect.open(path, "r+", dsync=True) as file:
        file._state.failed_sync = "it failed"
        for offset in (0, 5):
            request = file.submit("write", offset, odirect.empty(4096))
            assert list(file.completions()) == [request]
            with pytest.raises(StickySyncError):
                request.result()


def test_buffers_are_kept_until_they_are_filled(path: Path, content: bytes) -> None:
    """The request holds its buffer, whoever else lets go of it (F24)."""
    with odirect.open(path) as file:
        for number in range(100):
            file.submit("read", number * 4096, bytearray(4096))
            file.submit("read", number * 4096 + 1, bytearray(4096))
        gc.collect()
        for request in file.completions():
            assert bytes(request.buffer) == content[request.offset : request.offset + 4096]  # type: ignore[call-overload]
        kinds = {outcome.kind for outcome in file.totals}
        assert kinds <= {Kind.DIRECT, Kind.BOUNCED}
