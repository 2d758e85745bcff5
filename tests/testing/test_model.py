"""The model file, held against a file of the kernel's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from odirect.base.errors import NoSpaceError
from odirect.testing.model import ModelFile

PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

operations = st.lists(
    st.tuples(
        st.sampled_from(["pread", "pwrite", "truncate", "punch", "append"]),
        st.integers(0, 20000),
        st.integers(1, 9000),
        st.integers(0, 255),
    ),
    max_size=25,
)


def punch(fd: int, offset: int, length: int) -> None:
    from odirect.ring._calls import fallocate

    assert fallocate(fd, PUNCH, offset, length) == 0


@hypothesis.given(operations=operations)
@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_agrees_with_the_kernel(scratch: Path, operations: list[tuple[str, int, int, int]]) -> None:
    """F13: any operations give the same bytes, counts and size as on a file of the kernel's."""
    model = ModelFile()
    fd = os.open(scratch / "file", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        for verb, offset, length, byte in operations:
            data = bytes([byte]) * length
            if verb == "pread":
                assert model.pread(length, offset) == os.pread(fd, length, offset)
            elif verb == "pwrite":
                assert model.pwrite(data, offset) == os.pwrite(fd, data, offset)
            elif verb == "append":
                assert model.append(data) == os.lseek(fd, 0, os.SEEK_END)
                os.write(fd, data)
            elif verb == "truncate":
                model.truncate(offset)
                os.ftruncate(fd, offset)
            else:
                model.punch(offset, length)
                punch(fd, offset, length)
            assert model.size == os.fstat(fd).st_size
        assert model.data == os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4096, 4097])
def test_reads_end_at_the_end(size: int) -> None:
    """F02: count = max(0, min(length, size - offset))."""
    model = ModelFile(b"x" * size)
    for offset in (0, 1, size - 1, size, size + 1, 4096):
        for length in (0, 1, 512, 4096, 10000):
            if offset >= 0:
                assert len(model.pread(length, offset)) == max(0, min(length, size - offset))


def test_no_room() -> None:
    """A write that crosses the limit is short, one that begins there is ENOSPC; truncating takes no room."""
    model = ModelFile(b"ab", limit=4)
    assert model.pwrite(b"xyz", 2) == 2
    assert model.data == b"abxy"
    with pytest.raises(NoSpaceError) as caught:
        model.pwrite(b"z", 4)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(NoSpaceError):
        model.append(b"z")
    assert model.pwrite(b"", 9) == 0 and model.data == b"abxy"
    model.truncate(10)
    assert model.size == 10
    with pytest.raises(ValueError, match="3 bytes"):
        ModelFile(b"abc", limit=2)


def test_refusals() -> None:
    """EINVAL, as the kernel says it, for what is negative, and for a hole of nothing."""
    model = ModelFile(b"abc")
    for wrong in (
        lambda: model.pread(-1, 0),
        lambda: model.pread(1, -1),
        lambda: model.pwrite(b"x", -1),
        lambda: model.truncate(-1),
        lambda: model.punch(0, 0),
    ):
        with pytest.raises(OSError) as caught:
            wrong()
        assert caught.value.errno == errno.EINVAL
    assert model.data == b"abc"
