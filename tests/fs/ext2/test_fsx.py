"""fsx over a whole ext2 volume: every access, alignment and size around every edge (F02, F05, F13, F20)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fs.ext2.crash_kit import Fsck
from tests.fs.ext2.fsx import SHAPES, Fsx, Shape, run_one
from tests.loops import mounted, needs_root


@pytest.fixture(scope="module")
def fsck() -> Iterator[Fsck]:
    with Fsck() as fsck:
        yield fsck


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.block_bytes}-{shape.align}-{shape.cache >> 10}K")
def test_random_operations(shape: Shape, fsck: Fsck) -> None:
    """F02, F05, F11, F13, F20: what was written is what is read, whichever way, and after reopening too."""
    for seed in range(2):
        run_one(seed, 250, shape, fsck)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.block_bytes}-{shape.align}-{shape.cache >> 10}K")
def test_many_random_operations(shape: Shape, fsck: Fsck) -> None:
    """The same for longer."""
    for seed in range(100, 102):
        run_one(seed, 1000, shape, fsck)


def test_a_punch_from_a_hole_into_a_block(fsck: Fsck) -> None:
    """F13: it begins in a hole and ends in a block that is none; with no whole block between them."""
    run = Fsx(0, Shape(1024), fsck)
    file = run.handles[0]
    run.run(file.write(1024, [memoryview(b"x" * 1024)]))
    run.model.pwrite(b"x" * 1024, 1024)
    run.run(file.punch(500, 1000))
    run.model.punch(500, 1000)
    run.judge()


@pytest.mark.parametrize("block_bytes", [1024, 2048, 4096])
def test_the_kernel_sees_the_same_file(block_bytes: int, fsck: Fsck, scratch: Path) -> None:
    """F13: the image after a run, mounted by Linux, and written to by Linux."""
    needs_root()
    run = run_one(50 + block_bytes, 300, Shape(block_bytes), fsck)
    image = scratch / "image"
    image.write_bytes(run.device.data)
    with mounted(image, "ext2") as point:
        file = point / "file"
        assert file.read_bytes() == run.model.data
        file.write_bytes(run.model.data[:1000] + b"by Linux")
    fsck.image.write_bytes(image.read_bytes())
    status, said = fsck.run("-fn")
    assert status == 0, said
