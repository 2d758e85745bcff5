"""Many names at once in a directory made elsewhere, whose blocks must each be cut by a commit of its own."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import pytest
from tests.fs.ext2.test_faults import Rig, _closed  # noqa: F401
from tests.loops import needs_tool

from odirect.fs.base import NewFile


@functools.cache
def thinned_out(names: int) -> bytes:
    """A directory of 4 KiB blocks with one entry left in each: removals have given it all the room."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        top = Path(place) / "top"
        (top / "wide").mkdir(parents=True)
        for number in range(names):
            (top / "wide" / f"{number:0240d}").touch()
        image = Path(place) / "image"
        image.write_bytes(bytes(8 << 20))
        command = [needs_tool("mke2fs"), "-q", "-F", "-t", "ext2", "-b", "4096", "-N", "1024", "-d", str(top)]
        subprocess.run([*command, str(image)], check=True, capture_output=True)
        listed = subprocess.run(
            [needs_tool("debugfs"), "-R", "ls -p /wide", str(image)], check=True, capture_output=True, text=True
        ).stdout
        order = [line.split("/")[5] for line in listed.splitlines() if "0000" in line]
        removals = [f"rm /wide/{name}" for index, name in enumerate(order) if index % 16]
        subprocess.run(
            [needs_tool("debugfs"), "-w", "-f", "-", str(image)],
            input="\n".join(removals),
            text=True,
            check=True,
            capture_output=True,
        )
        return image.read_bytes()


@pytest.mark.slow
def test_many_names_at_once_in_wide_rooms() -> None:
    """F30: what is missing is a commit, again and again, and not space."""
    rig = Rig(thinned_out(160))
    wide = rig.run(rig.volume.lookup(2, b"wide"))
    files = [NewFile(wide, b"%03d" % number + b"n" * 237, b"x" * 50) for number in range(120)]
    assert len(rig.run(rig.volume.create_whole(files))) == 120
    assert rig.volume.committer.done > 5
    raw = rig.end()
    assert sum(directory == wide for directory, _ in raw.edges) == 130
