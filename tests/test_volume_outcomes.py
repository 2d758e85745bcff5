"""What requests on files of a volume say of how they went (design: an honest outcome)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.volume_kit import volume_of

import odirect
from odirect.dio.outcome import Kind, Outcome, Promise, Reason

BLOCK = 4096
DIRECT = Outcome(Kind.DIRECT)
HOLE = Outcome(Kind.DIRECT, Reason.HOLE)
PAST_THE_END = Outcome(Kind.DIRECT, Reason.END_OF_FILE)


def test_reads_of_holes_and_past_the_end_say_so(tmp_path: Path) -> None:
    """The device was not asked for these bytes, or not for all of them (G09, F02)."""
    with volume_of("ext2", tmp_path, ("-b", str(BLOCK))) as volume:
        with volume.open("/file", "w") as file:
            file.pwrite(odirect.empty(BLOCK), 0)
            assert file.last_outcome == Outcome(Kind.DIRECT, promise=Promise.DEVICE)
            file.pwrite(odirect.empty(BLOCK), 4 * BLOCK)
        buffer = odirect.empty(2 * BLOCK)
        with volume.open("/file") as file:
            for offset, length, count, outcome in (
                (0, BLOCK, BLOCK, DIRECT),
                (BLOCK, BLOCK, BLOCK, HOLE),
                (0, 2 * BLOCK, 2 * BLOCK, HOLE),
                (3 * BLOCK, 2 * BLOCK, 2 * BLOCK, HOLE),
                (4 * BLOCK, BLOCK, BLOCK, DIRECT),
                (5 * BLOCK, BLOCK, 0, PAST_THE_END),
                (100 * BLOCK, BLOCK, 0, PAST_THE_END),
            ):
                assert file.preadinto(buffer[:length], offset) == count
                assert file.last_outcome == outcome, (offset, length)
                file.submit("read", offset, buffer[:length])
                (request,) = file.completions()
                assert (request.result(), request.outcome) == (count, outcome)
            file.read_batch([0, BLOCK, 2 * BLOCK, 4 * BLOCK], BLOCK, odirect.empty(4 * BLOCK))
            assert file.totals[HOLE].operations == 2 * 3 + 2


@pytest.mark.parametrize("kind", ["memory", "ext2"])
def test_an_empty_request_needs_no_reason(kind: str, tmp_path: Path) -> None:
    with volume_of(kind, tmp_path) as volume, volume.open("/file", "w+") as file:
        assert file.preadinto(bytearray(), 0) == 0
        assert file.last_outcome == DIRECT
