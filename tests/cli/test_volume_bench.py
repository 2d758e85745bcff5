"""`odirect bench` of files in volumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.images import MIB, change, contents, fsck, image_in, odirect, refused, said, some_bytes, told

DATA = some_bytes(2 * MIB)


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    (scratch / "source").write_bytes(DATA)
    with image_in(scratch, 16 * MIB, "-b", "4096") as image:
        change(image, f"write {scratch / 'source'} file")
        yield image


def ways(found: dict[str, Any]) -> set[str]:
    return {outcome["kind"] for outcome in found["outcomes"]}


@pytest.mark.parametrize("engine", ["batch", "submit", "sync"])
@pytest.mark.parametrize("rw", ["read", "randread", "write", "randwrite"])
def test_every_engine(engine: str, rw: str, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F52: what is measured is direct, and says so."""
    arguments = ["--rw", rw, "--bs", "8k", "--number", "64", "--engine", engine, "--overwrite-data", "--require-direct"]
    arguments += ["--iodepth", "1" if engine == "sync" else "8", "--end-sync", "--json"]
    found = told(capsys, "bench", f"{image}:/file", *arguments)
    assert found["operations"] == 64 and found["bytes"] == 64 * 8192 and ways(found) == {"direct"}
    assert found["engine"] == engine and found["file"] == f"{image}:/file" and found["size"] == 2 * MIB
    fsck(image)


def test_what_was_not_asked_to_be_overwritten_is_not(
    image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--overwrite-data" in refused(capsys, 2, "bench", f"{image}:/file", "--rw", "write")
    assert contents(image, "/file", scratch / "dump") == DATA


def test_a_new_file_is_made(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--rw", "randwrite", "--number", 32, "--json")
    assert "--size says" in refused(capsys, 2, "bench", f"{image}:/new", *arguments)
    found = told(capsys, "bench", f"{image}:/new", *arguments, "--size", "1M", "--require-direct")
    assert found["operations"] == 32 and len(contents(image, "/new", scratch / "dump")) == MIB
    refused(capsys, 9, "bench", f"{image}:/large", *arguments, "--size", "1G")
    assert said(capsys, "ls", f"{image}:/") == "file\nlost+found\nnew\n"


@pytest.mark.slow
def test_several_readers(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "bench", f"{image}:/file", "--jobs", 2, "--number", 16, "--bs", "4k", "--json")
    assert found["operations"] == 32 and ways(found) == {"direct"}


def test_compared_with_a_cache(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "bench", f"{image}:/file", "--compare", "--number", 16, "--json")
    assert {name: ways(each) for name, each in found["compare"].items()} == {
        "direct": {"direct"},
        "buffered-cold": {"buffered"},
        "buffered-warm": {"buffered"},
    }


def test_holes_are_told(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "holes").touch()
    with open(scratch / "holes", "wb") as file:
        file.truncate(MIB)
    assert odirect("cp", "-q", scratch / "holes", f"{image}:/holes") == 0
    assert "Only 0 B of the file's 1.0 MiB" in said(capsys, "bench", f"{image}:/holes", "--number", 4)
    refused(
        capsys, 4, "bench", f"{image}:/holes", "--rw", "write", "--number", 1, "--overwrite-data", "--require-direct"
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--engine", "asyncio"], "asyncio does not know"),
        (["--jobs", "2", "--rw", "write"], "one process alone"),
        (["--offset", "4M"], "there is nothing at offset"),
        (["--size", "4M"], "fewer than --offset and --size"),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in " ".join(refused(capsys, 2, "bench", f"{image}:/file", *arguments).split())


def test_what_is_not_aligned_is_named(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, 3, "bench", f"{image}:/file", "--bs", "100", "--access", "strict", "--number", 5)
    assert message.startswith(f"odirect: {image}:/file: ")


def test_what_is_not_there(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(capsys, 2, "bench", f"{image}:/nothing")
    refused(capsys, 2, "bench", f"{image}:/lost+found")
