"""A handler may raise anywhere in `submit` on a file of a volume: nothing is lost, nothing is counted twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from tests.dio.test_here import Raiser
from tests.loops import made_image

import odirect
from odirect.fs.file import NodeFile

BLOCK = 4096


@pytest.mark.parametrize("op", ["read", "write"])
def test_handlers_that_raise_at_every_point_of_submit(op: Any, tmp_path: Path) -> None:
    """Whether a request was begun or not, the device's count of it is right, and whoever waits ends (F24, G06)."""
    with made_image("ext2", 16 << 20, directory=tmp_path) as image, odirect.open_volume(image, "r+") as volume:
        buffer = odirect.empty(4 * BLOCK)
        buffer[:] = b"\x17" * len(buffer)
        with volume.open("/file", "w+") as file:
            file.pwrite(buffer, 0)
            node = cast(NodeFile, file._handle).node

            def submit() -> None:
                file.submit(op, BLOCK, buffer[:BLOCK])

            def attempt(at: int) -> tuple[Raiser, bool, int]:
                raiser = Raiser(at)
                stopped = raiser.run(submit)
                done = list(file.completions())
                assert all(request.result() == BLOCK for request in done)
                assert node.in_flight.value == node.overwriting.value == 0
                assert file.pread(8, BLOCK) == b"\x17" * 8
                return raiser, stopped, len(done)

            submit()
            assert len(list(file.completions())) == 1
            raiser, stopped, count = attempt(0)
            assert not stopped and count == 1 and raiser.seen > 10
            stops = begun = 0
            for at in range(1, raiser.seen + 1):
                _, stopped, count = attempt(at)
                assert count <= 1
                stops += stopped
                begun += count
            # On threads handlers are kept out, and speak when it has begun.
            assert begun and stops > 0.8 * raiser.seen
        assert volume.check() == []
