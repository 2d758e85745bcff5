"""`odirect info`, `check` and `explain` of volumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.images import MIB, change, debugfs, image_in, odirect, refused, said, some_bytes, told
from tests.loops import loop_device, made_image, mounted, needs_loop, run

import odirect as api

SIZE = 4 * MIB + 100


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    """An image with a file: a hole, two pieces of data, and 100 bytes in a last block."""
    with open(scratch / "source", "wb") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), some_bytes(MIB), MIB)
        os.pwrite(file.fileno(), some_bytes(MIB + 100), SIZE - MIB - 100)
    with image_in(scratch, 32 * MIB, "-b", "4096", "-L", "the label") as image:
        change(image, f"write {scratch / 'source'} file")
        yield image


# --- info -----------------------------------------------------------------------------------------


def test_info(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure is the one that dumpe2fs has."""
    found = told(capsys, "info", "--json", f"{image}:")
    shown = {}
    for line in run("dumpe2fs", "-h", image).splitlines():
        name, _, value = line.partition(":")
        shown[name] = value.strip()
    assert found["kind"] == "ext2" and found["label"] == "the label" and found["uuid"] == shown["Filesystem UUID"]
    assert found["blocks"] == int(shown["Block count"]) and found["free_blocks"] == int(shown["Free blocks"])
    assert found["files"] == int(shown["Inode count"]) and found["free_files"] == int(shown["Free inodes"])
    assert found["block_bytes"] == int(shown["Block size"]) and found["inode_bytes"] == int(shown["Inode size"])
    assert found["reserved_blocks"] == int(shown["Reserved block count"])
    assert set(found["features"]) == set(shown["Filesystem features"].split())
    assert found["clean"] is True and found["writable"] is True and found["in_use"] == []
    assert found["limits"]["read_align"] == api.alignment(image).limits.read_align
    out = said(capsys, "info", f"{image}:/")
    assert "an ext2 volume, 32.0 MiB" in out and "the label" in out and "kept for root" in out


def test_info_of_a_file_in_it(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "info", "--json", f"{image}:/file")["file"]["size"] == SIZE
    assert f"/file: file, 4.0 MiB ({SIZE} bytes)" in said(capsys, "info", f"{image}:/file")
    assert "No such file" in refused(capsys, 2, "info", f"{image}:/nothing")


def test_info_says_why_it_cannot_be_written(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F34: unclean, or in use."""
    change(image, "set_super_value state 0")
    found = told(capsys, "info", "--json", f"{image}:")
    assert found["clean"] is False and found["writable"] is False and "e2fsck" in found["why_not_writable"]
    assert "no: it was not closed well" in said(capsys, "info", f"{image}:")
    change(image, "set_super_value state 1")
    needs_loop()
    with loop_device(image) as device, mounted(device, "ext2", "ro") as point:
        found = told(capsys, "info", "--json", f"{device}:")
        assert found["writable"] is False and str(point) in found["why_not_writable"]


def test_info_of_ext3_and_of_what_is_not_ours(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with made_image("ext3", directory=scratch) as image:
        out = said(capsys, "info", f"{image}:")
        assert "journal" in out and out.startswith(f"{image}: an ext3 volume, ")
        assert told(capsys, "info", "--json", f"{image}:")["kind"] == "ext3"
        assert said(capsys, "check", image) == f"{image}: ext3, clean\n"
        assert "journal" in refused(capsys, 6, "mkdir", f"{image}:/x")
    with made_image("ext4", directory=scratch) as image:
        assert "extent" in refused(capsys, 8, "info", f"{image}:")


@pytest.mark.parametrize("kind,reason", [("ext3", "needs_recovery"), ("ext4", "extents (ext4)")])
def test_info_of_what_cannot_be_opened(
    kind: str, reason: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its superblock says, as dumpe2fs has it, why that is all, and the status of the refusal."""
    with made_image(kind, directory=scratch, mkfs=("-L", "the label")) as image:
        if kind == "ext3":
            change(image, "feature needs_recovery")
        shown = {}
        for line in run("dumpe2fs", "-h", image).splitlines():
            name, _, value = line.partition(":")
            shown[name] = value.strip()
        assert odirect("info", "--json", f"{image}:") == 8
        captured = capsys.readouterr()
        assert captured.err.startswith(f"odirect: {image}: ") and reason in captured.err
        found = json.loads(captured.out)
        assert found["kind"] == kind and found["label"] == "the label" and found["image"] == str(image)
        assert found["uuid"] == shown["Filesystem UUID"]
        assert found["blocks"] == int(shown["Block count"]) and found["free_blocks"] == int(shown["Free blocks"])
        assert found["files"] == int(shown["Inode count"]) and found["free_files"] == int(shown["Free inodes"])
        assert found["block_bytes"] == int(shown["Block size"]) and found["inode_bytes"] == int(shown["Inode size"])
        assert set(found["features"]) == set(shown["Filesystem features"].split())
        assert found["size_bytes"] == found["blocks"] * found["block_bytes"]
        assert found["readable"] is found["writable"] is False and reason in found["why_not_readable"]
        assert odirect("info", f"{image}:/some/file") == 8
        captured = capsys.readouterr()
        assert captured.out.startswith(f"{image}: an {kind} volume, ") and "the label" in captured.out
        assert reason in captured.out and reason in captured.err


def test_info_has_the_whole_size(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks, those that the file system takes for itself included, whatever `statfs` leaves out."""
    found = told(capsys, "info", "--json", f"{image}:")
    assert found["size_bytes"] == 32 * MIB and found["blocks"] == 8192
    assert found["readable"] is True and found["why_not_readable"] == ""


# --- check ----------------------------------------------------------------------------------------


def test_a_clean_one(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "check", image) == f"{image}: ext2, clean\n"
    assert told(capsys, "check", "--json", f"{image}:") == {
        "image": str(image),
        "kind": "ext2",
        "clean": True,
        "findings": [],
    }


def test_findings_are_status_7(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = scratch / "broken"
    broken.write_bytes(image.read_bytes())
    change(broken, "set_inode_field file links_count 5", "freei file")
    before = hashlib.sha256(broken.read_bytes()).digest()
    assert odirect("check", broken) == 7
    out = capsys.readouterr().out
    assert "finding" in out.splitlines()[0] and "expected" in out and "inode" in out
    assert odirect("check", "--json", broken) == 7
    assert hashlib.sha256(broken.read_bytes()).digest() == before


def test_one_that_is_too_bad_to_be_opened(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = scratch / "broken"
    broken.write_bytes(image.read_bytes())
    change(broken, "set_super_value inodes_per_group 7")
    assert odirect("check", broken) == 7
    assert "1 finding:" in capsys.readouterr().out
    assert "no such file" in refused(capsys, 2, "check", scratch / "nothing")
    assert refused(capsys, 8, "check", scratch / "source")


# --- explain --------------------------------------------------------------------------------------


def test_the_extents_are_those_of_debugfs(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "explain", "--json", f"{image}:/file")
    blocks: list[int] = []
    for piece in found["extents"]:
        assert piece["offset"] == len(blocks) * 4096
        count = -(-piece["length"] // 4096)
        blocks += [0] * count if piece["addr"] is None else [piece["addr"] // 4096 + turn for turn in range(count)]
    theirs = [int(debugfs(image, f"bmap file {number}").split()[0]) for number in range(0, len(blocks), 50)]
    assert blocks[::50] == theirs
    assert found["size_bytes"] == SIZE == sum(piece["length"] for piece in found["extents"])
    assert found["bytes_by_kind"]["hole"] == 2 * MIB and found["filesystem"] == "ext2"


def test_the_picture(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "explain", f"{image}:/file", "--bs", "64k")
    assert f"{image}:/file: a file in the ext2 volume of {image}, 4.0 MiB" in out
    assert "▕" in out and "█" in out and "·" in out and "direct reads   yes" in out
    assert "reading" in out and "writing" in out and "buffered (hole)" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "size,offset", [(4096, 0), (4096, 100), (1024, 1024), (1 << 20, 0), (300_000, 12345), (65536, 0)]
)
def test_what_it_says_is_what_happens(size: int, offset: int, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The outcomes of all requests, counted: first as they are told, then as they are when they are made."""
    found = told(capsys, "explain", "--json", f"{image}:/file", "--bs", size, "--offset", offset)
    with api.open_volume(image, "r+") as volume:
        for op, costs in (("read", found["reads"]), ("write", found["writes"])):
            expected = {(cost["kind"], cost["reason"]): cost["requests"] for cost in costs}
            memory = api.empty(size)
            with volume.open("/file", "r+") as file:
                for at in range(offset, SIZE, size):
                    if op == "read":
                        file.preadinto(memory, at)
                    else:
                        file.pwrite(memory[: min(size, SIZE - at)], at)
                seen: dict[tuple[str, str], int] = {}
                for outcome, tally in file.totals.items():
                    key = outcome.kind.value, outcome.reason.value
                    seen[key] = seen.get(key, 0) + tally.operations
            assert seen == expected


def test_nothing_is_written(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = hashlib.sha256(image.read_bytes()).digest()
    assert odirect("explain", f"{image}:/file") == 0
    assert hashlib.sha256(image.read_bytes()).digest() == before


def test_one_that_cannot_be_written(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(image, "set_super_value state 0")
    out = said(capsys, "explain", f"{image}:/file")
    assert "It cannot be written: it was not closed well" in out and "writing" not in out.split("In requests")[1]
    change(image, "set_super_value state 1")


def test_what_is_explained_is_a_file(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "nothing").touch()
    change(image, f"write {scratch / 'nothing'} empty", "mknod pipe p")
    assert "It is empty." in said(capsys, "explain", f"{image}:/empty")
    refused(capsys, 2, "explain", f"{image}:/lost+found")
    refused(capsys, 2, "explain", f"{image}:/nothing")
    refused(capsys, 8, "explain", f"{image}:/pipe")


def test_an_image_whose_own_file_system_caches(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F50: the file goes direct in the volume, and the volume does not; that is what counts."""
    with mounted("odirect-test", "tmpfs", "size=40M") as place:
        image = place / "image"
        image.touch()
        os.truncate(image, 16 * MIB)
        run("mke2fs", "-q", "-F", image)
        (scratch / "x").write_bytes(bytes(range(256)) * 64)
        assert odirect("cp", "-q", scratch / "x", f"{image}:/x") == 0
        found = told(capsys, "explain", "--json", f"{image}:/x")
        assert found["direct"]["reads"] is False and {cost["kind"] for cost in found["reads"]} == {"buffered"}
        assert told(capsys, "info", "--json", f"{image}:")["direct"]["why"]
