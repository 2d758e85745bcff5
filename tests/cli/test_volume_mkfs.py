"""`odirect mkfs`: what it makes is judged by e2fsck, dumpe2fs and the kernel."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

import pytest
from tests.cli.images import MIB, contents, fsck, odirect, refused, said, some_bytes, told
from tests.cli.test_volume_cp import listing
from tests.loops import loop_device, made_image, mounted, needs_loop, needs_root, run

from odirect.cli import mkfs

IDENTITY = "0b7ed1c4-6a5e-4f6b-9d1b-8f2a6c3e5d70"


def header(image: Path | str) -> dict[str, str]:
    shown = {}
    for line in run("dumpe2fs", "-h", image).splitlines():
        name, _, value = line.partition(":")
        shown[name] = value.strip()
    return shown


def test_a_new_file(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = scratch / "new.img"
    out = said(capsys, "mkfs", "ext2", image, "--size", "20M", "--label", "grün", "--uuid", IDENTITY)
    assert out == f"{image}: ext2, 20.0 MiB, 20480 blocks of 1024, 5112 inodes, uuid {IDENTITY}, label grün\n"
    fsck(image)
    found = header(image)
    assert found["Filesystem UUID"] == IDENTITY and found["Block count"] == "20480"
    assert image.stat().st_size == 20 * MIB and image.stat().st_blocks * 512 < 4 * MIB
    assert said(capsys, "ls", f"{image}:") == "lost+found\n"
    assert odirect("mkdir", f"{image}:/x") == 0
    fsck(image)


@pytest.mark.parametrize("size", ["8E", "999E"])
def test_more_than_a_file_can_have(size: str, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, 2, "mkfs", "ext2", scratch / "new.img", "--size", size)
    assert "--size" in message and f"{size} is more than" in message
    assert not (scratch / "new.img").exists()


@pytest.mark.parametrize("block,inode", [(1024, 128), (2048, 256), (4096, 256)])
def test_sizes_of_blocks_and_inodes(block: int, inode: int, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = scratch / "new.img"
    arguments = ("--size", "32M", "--block-size", block, "--inode-size", inode)
    made = told(capsys, "mkfs", "ext2", image, *arguments, "--json")
    assert (made["block_bytes"], made["inode_bytes"], made["size_bytes"]) == (block, inode, 32 * MIB)
    found = header(image)
    assert found["Block size"] == str(block) and found["Inode size"] == str(inode)
    assert uuid.UUID(made["uuid"]).version == 4 and found["Filesystem UUID"] == made["uuid"]
    fsck(image)


def test_the_same_once_more(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it is random but its identity: with that given, and the time, two are alike."""
    monkeypatch.setattr("odirect.sched.clock.wall_ns", lambda: 10**18)
    for name in ("a", "b"):
        assert odirect("mkfs", "ext2", scratch / name, "--size", "8M", "--uuid", IDENTITY, "-q") == 0
    assert (scratch / "a").read_bytes() == (scratch / "b").read_bytes()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--size", "8M", "--block-size", "3k"], "ext2 has 1024, 2048, 4096"),
        (["--size", "8M", "--inode-size", "100"], "128 or 256"),
        (["--size", "8M", "--label", "x" * 17], "at most 16 fit"),
        (["--size", "8M", "--uuid", "x"], "no UUID"),
        (["--from", "nothing", "--size", "8M"], "is not a directory"),
        ([], "--size says how large"),
    ],
)
def test_a_wrong_call_leaves_nothing(
    arguments: list[str], message: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in " ".join(refused(capsys, 2, "mkfs", "ext2", scratch / "new.img", *arguments).split())
    assert os.listdir(scratch) == []


def test_too_small(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "too few" in refused(capsys, 9, "mkfs", "ext2", scratch / "new.img", "--size", "10k")
    assert os.listdir(scratch) == []
    assert "xfs" in refused(capsys, 2, "mkfs", "xfs", scratch / "new.img", "--size", "8M")
    assert "No such file" in refused(capsys, 2, "mkfs", "ext2", scratch / "no" / "where", "--size", "8M")


# --- what is there already ------------------------------------------------------------------------


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "btrfs"])
def test_a_file_system_is_overwritten_only_by_force(
    fstype: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F34: it says what is there."""
    with made_image(fstype, directory=scratch) as image:
        before = image.read_bytes()
        message = refused(capsys, 2, "mkfs", "ext2", image)
        assert ("ext2" if fstype == "ext4" else fstype).lower() in message.lower() and "--force" in message
        assert image.read_bytes() == before
        assert odirect("mkfs", "ext2", image, "--force", "-q") == 0
        fsck(image)
        assert said(capsys, "ls", f"{image}:") == "lost+found\n"


@pytest.mark.parametrize("at", [0, 100_000, -1])
def test_data_that_nobody_knows_is_data(at: int, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(8 * MIB)
    data[at] = 1
    (scratch / "data").write_bytes(data)
    assert "not known here" in refused(capsys, 2, "mkfs", "ext2", scratch / "data")
    assert (scratch / "data").read_bytes() == data
    (scratch / "data").write_bytes(bytes(8 * MIB))
    assert odirect("mkfs", "ext2", scratch / "data", "-q") == 0
    assert header(scratch / "data")["Block count"] == "8192"
    fsck(scratch / "data")


def test_a_file_that_is_there_may_grow(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "empty").touch()
    assert odirect("mkfs", "ext2", scratch / "empty", "--size", "8M", "-q") == 0
    fsck(scratch / "empty")
    with made_image(None, 4 * MIB, directory=scratch) as image:
        assert odirect("mkfs", "ext2", image, "--size", "8M", "-q") == 0
        fsck(image)
        assert image.stat().st_size == 8 * MIB
        refused(capsys, 2, "mkfs", "ext2", image, "--size", "16M")
        assert image.stat().st_size == 8 * MIB


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_device(sector: int, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F51: blocks are as large as the device takes; F34: one that is in use is never overwritten."""
    needs_loop()
    with made_image(None, directory=scratch) as image, loop_device(image, sector) as device:
        made = told(capsys, "mkfs", "ext2", device, "--json")
        assert made["size_bytes"] == 16 * MIB and made["block_bytes"] >= sector
        fsck(Path(device))
        with mounted(device, "ext2") as point:
            for path in (device, image):
                assert str(point) in refused(capsys, 6, "mkfs", "ext2", path, "--force")


# --- with files in it -----------------------------------------------------------------------------


@pytest.fixture
def tree(scratch: Path) -> Path:
    top = scratch / "tree"
    (top / "usr" / "bin").mkdir(parents=True)
    for number in range(300):
        (top / "usr" / f"file-{number}").write_bytes(some_bytes(number * 37, number))
    (top / "usr" / "bin" / "big").write_bytes(some_bytes(5 * MIB))
    (top / "usr" / "bin" / "big").chmod(0o4755)
    os.link(top / "usr" / "bin" / "big", top / "big")
    os.symlink("usr/bin", top / "bin")
    with open(top / "sparse", "wb") as file:
        file.truncate(100 * MIB)
        os.pwrite(file.fileno(), b"end", 100 * MIB - 3)
    if os.geteuid() == 0:
        os.chown(top / "usr", 33, 44)
        os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    top.chmod(0o711)
    return top


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--size", "64M"], ["--block-size", "4k"]])
def test_from_a_directory(arguments: list[str], tree: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel finds all of it, the root's own mode included; and it is not much larger than it must be."""
    needs_root()
    image = scratch / "root.img"
    out = said(capsys, "mkfs", "ext2", image, "--from", tree, *arguments)
    assert "303 files" in out or "302 files" in out
    fsck(image)
    with mounted(image, "ext2", "ro") as point:
        found = listing(point)
        assert found.pop("lost+found") and found.pop("lost+found/.", True)
        assert found == listing(tree)
    if "--size" not in arguments:
        assert image.stat().st_size < 13 * MIB


@pytest.mark.slow
def test_many_small_files_have_inodes(scratch: Path) -> None:
    """More files than the usual number of inodes for such a size."""
    top = scratch / "tree"
    top.mkdir()
    for number in range(3000):
        (top / f"{number}").touch()
    assert odirect("mkfs", "ext2", scratch / "new.img", "--from", top, "-q") == 0
    fsck(scratch / "new.img")
    assert (scratch / "new.img").stat().st_size <= 8 * MIB


def test_what_does_not_fit_leaves_nothing(tree: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 9, "mkfs", "ext2", scratch / "new.img", "--size", "2M", "--from", tree)
    assert os.listdir(scratch) == ["tree"]


@pytest.mark.slow
def test_an_estimate_that_is_too_low_is_raised(
    tree: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mkfs._Needs, "size", lambda *_: 4 * MIB)
    assert odirect("mkfs", "ext2", scratch / "new.img", "--from", tree, "-q") == 0
    fsck(scratch / "new.img")
    data = contents(scratch / "new.img", "/usr/bin/big", scratch / "dump")
    assert data == (tree / "big").read_bytes()
