"""`odirect info`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.loops import loop_device, made_image, mounted, needs_loop

import odirect
from odirect.cli import main


def info(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main.run(["info", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_file(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F51: every figure is that of this very file, with its source."""
    (scratch / "file").write_bytes(b"x" * 10_000)
    out = info(capsys, scratch / "file")
    limits = odirect.alignment(scratch / "file").limits
    assert out.startswith(f"{scratch / 'file'}: a file on ")
    assert "9.8 KiB (10000 bytes)" in out
    for name in ("read_align", "memory_align"):
        assert f"{getattr(limits, name)} bytes  ({limits.sources[name]})" in out
    assert "in use" in out and "io_uring" in out


def test_json_of_a_file(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "file").write_bytes(b"x" * 10_000)
    told = json.loads(info(capsys, "--json", scratch / "file"))
    alignment = odirect.alignment(scratch / "file")
    assert told["limits"]["read_align"] == alignment.limits.read_align
    assert told["sources"] == dict(alignment.limits.sources)
    assert told["size_bytes"] == 10_000 and told["allocated_bytes"] == (scratch / "file").stat().st_blocks * 512
    assert told["in_use"] == [] and told["rings"]["threads"] is True
    assert told["cached_bytes"] is None or told["cached_bytes"] >= 0


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_device(scratch: Path, sector: int, capsys: pytest.CaptureFixture[str]) -> None:
    needs_loop()
    with made_image("ext4", directory=scratch) as image, loop_device(image, sector) as device:
        told = json.loads(info(capsys, "--json", device))
        assert told["kind"] == "block device" and told["filesystem"] is None
        assert told["limits"]["logical_block"] == told["limits"]["write_align"] == sector
        assert told["size_bytes"] == image.stat().st_size and told["allocated_bytes"] is None
        assert "a block device" in info(capsys, device)
        used = json.loads(info(capsys, "--json", image))["in_use"]
        assert [(claim["use"], claim["by"]) for claim in used] == [("loop", device)]


def test_a_mounted_device(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F34: who uses it, before somebody finds out the hard way."""
    needs_loop()
    with (
        made_image("ext4", directory=scratch) as image,
        loop_device(image) as device,
        mounted(device, "ext4") as point,
    ):
        assert f"it is mounted on {point}" in info(capsys, device)


def test_a_file_in_memory(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F50: not direct, and why."""
    with mounted("odirect-test", "tmpfs", "size=8M") as place:
        (place / "file").write_bytes(b"x")
        out = info(capsys, place / "file")
        assert "a file on tmpfs" in out and "no, through the page cache" in out and "memory" in out
        assert json.loads(info(capsys, "--json", place / "file"))["direct"]["reads"] is False


def test_odd_names_can_be_printed(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsencode(scratch) + b"/\xff"
    with open(name, "wb") as file:
        file.write(b"x")
    assert main.run(["info", os.fsdecode(name)]) == 0
    assert main.run(["info", "--json", os.fsdecode(name)]) == 0
    assert "\ufffd" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["info", "explain", "cat", "bench"])
def test_an_image_that_is_none(
    verb: str, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`missing.img:` is said to be no image, not a file that could not be opened."""
    monkeypatch.chdir(scratch)
    assert main.run([verb, "missing.img:"]) == 2
    wanted = "odirect: missing.img: there is no image file or block device missing.img\n"
    assert capsys.readouterr().err == wanted
    assert main.run([verb, ".:"]) == 2
    assert capsys.readouterr().err.startswith("odirect: .: . is a directory")


@pytest.mark.parametrize("name,status", [("missing", 2), (".", 2)])
def test_what_cannot_be_told(name: str, status: int, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["info", str(scratch / name)]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("odirect: ")
