"""`File.read_batch` and `write_batch`: many transfers at once."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import hypothesis
import numpy
import pytest
from hypothesis import strategies
from tests.files import cut_short, data_file, filled

import odirect
from odirect import Kind
from odirect.base.errors import AlignmentError, BadBufferError, DeviceError, NoSpaceError, ODirectError, StickySyncError
from odirect.ring.contract import Ring

SIZE = 1 << 20


@pytest.fixture
def content() -> bytes:
    return random.Random(21).randbytes(SIZE)


@pytest.fixture
def path(scratch: Path, content: bytes) -> Path:
    return data_file(scratch / "file", content)


@pytest.mark.parametrize(
    "given",
    [
        [8192, 0, 4096, 8192],
        (8192, 0, 4096, 8192),
        numpy.array([8192, 0, 4096, 8192]),
        numpy.array([8192, 0, 4096, 8192], "u4"),
        numpy.array([8192, 7, 0, 7, 4096, 7, 8192, 7])[::2],
    ],
    ids=["list", "tuple", "int64", "uint32", "strided"],
)
def test_offsets_of_any_kind(path: Path, content: bytes, given: list[int]) -> None:
    """A sequence or an array of whole numbers."""
    out = numpy.zeros((4, 4096), "u1")
    with odirect.open(path) as file:
        counts = file.read_batch(given, 4096, out)
    assert counts.dtype == numpy.int64 and counts.tolist() == [4096] * 4
    assert out.tobytes() == b"".join(content[at : at + 4096] for at in (8192, 0, 4096, 8192))


@pytest.mark.parametrize("depth", [1, 3, 64, 100_000])
@pytest.mark.parametrize("length", [512, 4096, 8192, 1000])
def test_reads_and_writes_in_place(path: Path, content: bytes, length: int, depth: int) -> None:
    """Every element's bytes are its own, at any depth; those that overlap may be read (B07)."""
    rng = random.Random(length)
    places = [rng.randrange(SIZE - length) // 512 * 512 for _ in range(300)]
    out = odirect.empty(300 * length)
    with odirect.open(path, "r+") as file:
        assert file.read_batch(places, length, out, depth=depth).tolist() == [length] * 300
        assert bytes(out) == b"".join(content[at : at + length] for at in places)
        apart = rng.sample(range(SIZE // 8192), 100)
        targets = [8192 * number for number in apart]
        assert file.write_batch(targets, length, out, depth=depth).tolist() == [length] * 100
        expected = bytearray(content)
        for number, at in enumerate(targets):
            expected[at : at + length] = out[number * length : (number + 1) * length]
        totals = file.totals.values()
        assert sum(tally.operations for tally in totals) == 400
        assert sum(tally.bytes for tally in totals) == 400 * length
    assert path.read_bytes() == expected


def test_the_end_of_the_file(path: Path, content: bytes) -> None:
    """Counts are short only there, and the memory past them is left alone (F02)."""
    os.truncate(path, 10_000)
    out = filled(6 * 4096, 0xA5)
    with odirect.open(path) as file:
        counts = file.read_batch([0, 4096, 8192, 12288, 9999, 1 << 40], 4096, out).tolist()
    assert counts == [4096, 4096, 1808, 0, 1, 0]
    for number, (count, at) in enumerate(zip(counts, [0, 4096, 8192, 0, 9999, 0], strict=True)):
        part = bytes(out[number * 4096 : (number + 1) * 4096])
        assert part == content[at : at + count] + b"\xa5" * (4096 - count)


def test_nothing_to_do(path: Path) -> None:
    """No elements, and elements of no bytes."""
    with odirect.open(path, "r+") as file:
        assert file.read_batch([], 4096, odirect.empty(0)).tolist() == []
        assert file.write_batch(numpy.zeros(0, numpy.int64), 4096, b"").tolist() == []
        assert file.read_batch([0, 5], 0, bytearray()).tolist() == [0, 0]
        assert file.write_batch([0, 2 * SIZE], 0, b"").tolist() == [0, 0]
        assert file.size == SIZE


def test_arguments_that_are_wrong(path: Path) -> None:
    """They raise before anything is moved (F53)."""
    out = odirect.empty(8192)
    with odirect.open(path, "r+") as file:
        for offsets, length, buffer, depth in (
            ([0, -4096], 4096, out, 64),
            ([0, 1, 2], 4096, out, 64),
            ([[0, 1]], 4096, out, 64),
            ([0], -1, out, 64),
            ([0], 4096, out, 0),
            ([0], 4096, bytes(4096), 64),
        ):
            with pytest.raises(ValueError):
                file.read_batch(offsets, length, buffer, depth=depth)  # type: ignore[arg-type]
        for floats, memory in (([0.5], out), (["a"], out), ([0], 5)):
            with pytest.raises(TypeError):
                file.read_batch(floats, 4096, memory)  # type: ignore[arg-type]
        with pytest.raises((ValueError, OverflowError, TypeError)):
            file.read_batch([1 << 70], 4096, out)
        assert not file.totals


@pytest.mark.parametrize("unit", [1, 512])
def test_growing(scratch: Path, unit: int) -> None:
    """Elements past the end go in order of offset, whatever their order in the batch (F03)."""
    length = 3 * unit * 100
    order = random.Random(22).sample(range(100), 100)
    data = odirect.empty(100 * length)
    for number, place in enumerate(order):
        data[number * length : (number + 1) * length] = bytes([place + 1]) * length
    path = data_file(scratch / "file", b"\x01" * 1000)
    with odirect.open(path, "r+") as file:
        assert file.write_batch([place * length for place in order], length, data).tolist() == [length] * 100
        assert file.size == 100 * length
    assert path.read_bytes() == b"".join(bytes([place + 1]) * length for place in range(100))


def test_growing_is_not_quadratic(scratch: Path) -> None:
    """Ten thousand elements that make the file grow are one run of data, not a search for each."""
    path = scratch / "new"
    with odirect.open(path, "w") as file:
        assert int(file.write_batch(range(0, 10_000 * 512, 512), 512, filled(10_000 * 512, 6)).sum()) == 10_000 * 512
        assert file.totals[file.last_outcome].operations == 10_000  # type: ignore[index]
    assert path.read_bytes() == b"\x06" * (10_000 * 512)


def test_the_first_error_by_position(path: Path, content: bytes) -> None:
    """All are tried; the error is that of the first element that failed (B04, F06)."""
    with odirect.open(path, "r+") as file, cut_short(path.parent, 5 * 4096) as gone:
        with pytest.raises(BadBufferError) as caught:
            file.read_batch([0, 4096, 8192, 12288, 16384], 4096, gone)
        assert "4096 bytes at 4096" in str(caught.value)
        assert bytes(gone[:4096]) == content[:4096]
        with pytest.raises(BadBufferError):
            file.write_batch([0, 4096, 8192, 12288, 16384], 4096, gone)
        assert path.read_bytes() == content


def test_strict(path: Path, content: bytes) -> None:
    """Elements that are not aligned are AlignmentError; the others are done (B01)."""
    with odirect.open(path, "r+", access="strict") as file:
        out = odirect.empty(3 * 4096)
        with pytest.raises(AlignmentError):
            file.read_batch([0, 100, 4096], 4096, out)
        assert bytes(out[:4096]) == content[:4096] and bytes(out[8192:]) == content[4096:8192]


def test_sticky_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A durable write that the device failed is remembered (F41)."""
    with odirect.open(path, "r+", dsync=True) as file:
        out = odirect.empty(8 * 4096)
        assert file.write_batch(range(0, 8 * 4096, 4096), 4096, out).tolist() == [4096] * 8

        def failing(ring: Ring, fd: int, op: int, view: object, offsets: object, length: int, *rest: object) -> None:
            results = rest[1]
            results[:] = length  # type: ignore[index]
            results[3] = -errno.EIO  # type: ignore[index]
            results[5] = -errno.ENOSPC  # type: ignore[index]

        with monkeypatch.context() as patched:
            patched.setattr("odirect.dio.batch.run_natively", failing)
            with pytest.raises(DeviceError):
                file.write_batch(range(0, 8 * 4096, 4096), 4096, out)
        with pytest.raises(StickySyncError):
            file.write_batch([0], 4096, out)


def test_refused_in_the_loop(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL from the native loop is tried another way, and each element is counted once (F50, F07)."""

    def refusing(ring: Ring, fd: int, op: int, view: object, offsets: object, length: int, *rest: object) -> None:
        rest[1][:] = -errno.EINVAL  # type: ignore[index]

    monkeypatch.setattr("odirect.dio.batch.run_natively", refusing)
    with odirect.open(path, "r+") as file:
        out = odirect.empty(8 * 4096)
        assert file.read_batch(range(0, 8 * 4096, 4096), 4096, out).tolist() == [4096] * 8
        assert bytes(out) == content[: 8 * 4096]
        assert file.write_batch(range(8 * 4096, 16 * 4096, 4096), 4096, out).tolist() == [4096] * 8
        assert sum(tally.operations for tally in file.totals.values()) == 16
    assert path.read_bytes() == content[: 8 * 4096] * 2 + content[16 * 4096 :]


def test_nowait(path: Path, content: bytes) -> None:
    """Whole, short and true, or an error that says what it is (F08)."""
    with odirect.open(path, "r+", nowait=True) as file:
        out = filled(64 * 4096, 0xA5)
        try:
            counts = file.read_batch(range(0, 64 * 4096, 4096), 4096, out).tolist()
        except BlockingIOError:
            return
        for number, count in enumerate(counts):
            part = bytes(out[number * 4096 : (number + 1) * 4096])
            assert part[:count] == content[number * 4096 : number * 4096 + count]


def test_no_space(path: Path) -> None:
    """Past the largest file size it is NoSpaceError (F53)."""
    with odirect.open(path, "r+") as file, pytest.raises(NoSpaceError):
        file.write_batch([(1 << 63) - 100], 4096, odirect.empty(4096))


@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    blocks=strategies.lists(strategies.integers(0, 60), unique=True, max_size=40),
    unit=strategies.sampled_from([512, 4096, 4096, 1000]),
    shift=strategies.sampled_from([0, 0, 1, 512]),
    size=strategies.integers(0, 300_000),
    depth=strategies.sampled_from([1, 4, 64]),
    write=strategies.booleans(),
)
def test_a_batch_is_its_elements(
    scratch_root: Path, blocks: list[int], unit: int, shift: int, size: int, depth: int, write: bool
) -> None:
    """The same bytes, counts, outcomes and totals as its elements one after the other."""
    content = random.Random(size).randbytes(size)
    path = scratch_root / "batch"
    places = [block * unit for block in blocks]
    if write:
        # One at a time, a gap would be filled later; in a batch growing elements go in order anyway.
        places.sort()
    answers = []
    try:
        for together in (True, False):
            data_file(path, content)
            buffer = filled(len(places) * unit, 0, shift=shift)
            buffer[:] = random.Random(1).randbytes(len(buffer))
            with odirect.open(path, "r+") as file:
                if together:
                    call = file.write_batch if write else file.read_batch
                    counts = call(places, unit, buffer, depth=depth).tolist()
                else:
                    one = file.pwrite if write else file.preadinto
                    counts = [one(buffer[n * unit : (n + 1) * unit], at) for n, at in enumerate(places)]
                kinds: dict[Kind, int] = {}
                for outcome, tally in file.totals.items():
                    kinds[outcome.kind] = kinds.get(outcome.kind, 0) + tally.bytes
            answers.append((counts, bytes(buffer), kinds, path.read_bytes()))
    except ODirectError:
        raise
    finally:
        path.unlink(missing_ok=True)
    if unit % 512 == 0:
        assert answers[0] == answers[1]
    else:
        # Growing neighbours that are not aligned are written as one run: better outcomes, the same bytes.
        assert answers[0][:2] == answers[1][:2] and answers[0][3] == answers[1][3]
