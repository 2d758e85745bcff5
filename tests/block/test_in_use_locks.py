"""An image that somebody has locked is in use (F34): found without a lock of our own, and never in anybody's way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loops import loop_device, made_image, mounted, needs_loop

import odirect
from odirect.base.errors import InUseError
from odirect.block import sysfs
from odirect.block.in_use import Use, check_unused, claims

_HOLD = """
import fcntl, sys
with open(sys.argv[1], "rb") as file:
    fcntl.flock(file, int(sys.argv[2]))
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def locked_elsewhere(path: Path, how: int) -> Iterator[int]:
    """Another process holds the lock; its number."""
    words = [sys.executable, "-c", _HOLD, str(path), str(how)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder.pid


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    with made_image("ext2", directory=scratch) as image:
        yield image


@pytest.fixture
def file(scratch: Path) -> Path:
    path = scratch / "file"
    path.write_bytes(b"old" * 10000)
    return path


def refused_everywhere(path: Path, words: str) -> None:
    """Neither opened for writing nor replaced; read it may be."""
    before, inode = path.read_bytes(), path.stat().st_ino
    source = path.with_name("source")
    source.write_bytes(b"new" * 20000)
    for mode in ("r+", "w", "w+", "a", "a+"):
        with pytest.raises(InUseError, match=words) as caught:
            odirect.open(path, mode)
        assert str(caught.value).startswith(f"{path}: will not write to it")
    with pytest.raises(InUseError, match=words):
        odirect.copy(source, path)
    with made_image("ext2", directory=path.parent) as other, odirect.open_volume(other, "r+") as volume:
        volume.write_bytes("/x", b"new")
        with pytest.raises(InUseError, match=words) as caught:
            volume.copy_out("/x", path)
        assert caught.value.filename == str(path)
    assert path.read_bytes() == before and path.stat().st_ino == inode
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]
    with odirect.open(path) as opened:
        assert opened.pread(4096, 0) == before[:4096]


@pytest.mark.parametrize("how", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_file_locked_by_another_process(file: Path, how: int) -> None:
    """F34: refused, with who it is, and given free with the lock; told otherwise, it is written."""
    with locked_elsewhere(file, how) as pid:
        refused_everywhere(file, rf"process {pid} .* has locked it")
        assert [(claim.use, f"process {pid} " in claim.by) for claim in claims(file)] == [(Use.LOCK, True)]
        with odirect.open(file, "r+", overwrite_in_use=True) as opened:
            opened.pwrite(b"x", 0)
        odirect.copy(file, file.with_name("copy"))
    check_unused(file, what="write to")
    with odirect.open(file, "r+") as opened:
        opened.pwrite(b"y", 0)
    with locked_elsewhere(file, how):
        odirect.copy(file.with_name("source"), file, overwrite_in_use=True)
    assert file.read_bytes() == b"new" * 20000


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_an_image_with_a_volume_open_here(image: Path, mode: str) -> None:
    """F34: this process's own volumes count, also as a child sees them."""
    with odirect.open_volume(image, mode):
        refused_everywhere(image, "this very process has locked it")
        program = f"import odirect; odirect.open({str(image)!r}, 'r+')"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode and f"process {os.getpid()}" in done.stderr
    odirect.open(image, "r+").close()
    with odirect.open_volume(image) as one:
        with odirect.open_volume(image):
            pass
        with pytest.raises(InUseError, match="for reading"):
            odirect.open(image, "r+")
        assert one.listdir()
    odirect.open(image, "r+").close()


def test_a_caller_s_own_lock_is_his(file: Path) -> None:
    """Who locks a file in order to write it may write it, and so may what he starts with the locked descriptor."""
    with open(file, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert claims(file) == []
        with odirect.open(file, "r+") as one, odirect.open(file, "r+") as other:
            one.pwrite(b"1", 0)
            other.pwrite(b"2", 4096)
        program = f"import odirect; odirect.open({str(file)!r}, 'r+').close()"
        inherited = {"pass_fds": (held.fileno(),)}
        subprocess.run([sys.executable, "-c", program], check=True, **inherited)  # type: ignore[call-overload]
        apart = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "InUseError" in apart.stderr


def test_asking_takes_no_lock(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who wants the lock while we ask is not refused because of us."""

    def flock(fd: int, how: int) -> None:
        raise AssertionError("a lock was tried")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_elsewhere(file, fcntl.LOCK_EX), pytest.raises(InUseError):
        odirect.open(file, "r+")


def test_a_volume_opened_during_a_copy(file: Path, image: Path) -> None:
    """F34: whoever opened the target while it was being copied to keeps it."""
    before = image.stat().st_ino
    with contextlib.ExitStack() as stack:

        def open_it(done: int, total: int) -> None:
            stack.enter_context(odirect.open_volume(image, "r+"))

        with pytest.raises(InUseError, match="locked"):
            odirect.copy(file, image, progress=open_it)
        assert image.stat().st_ino == before and not [name for name in os.listdir(file.parent) if name[0] == "."]


def test_a_lock_on_btrfs(scratch: Path) -> None:
    """The kernel shows another device number there than the file has."""
    with made_image("btrfs", directory=scratch) as image, mounted(image, "btrfs") as top:
        subprocess.run(["btrfs", "subvolume", "create", top / "sub"], check=True, capture_output=True)
        for path in (top / "file", top / "sub" / "file"):
            path.write_bytes(b"content")
            with locked_elsewhere(path, fcntl.LOCK_EX), pytest.raises(InUseError, match="locked"):
                odirect.open(path, "r+")


def test_lines_that_are_not_about_it(file: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only waits, other kinds of locks, other file systems and lines that are none are passed over."""
    info = file.stat()
    here = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    proc = scratch / "proc"
    proc.mkdir()
    monkeypatch.setattr(sysfs, "PROC", str(proc))
    lines = [
        f"1: -> FLOCK  ADVISORY  WRITE 1 {here} 0 EOF",
        f"2: POSIX  ADVISORY  WRITE 1 {here} 0 EOF",
        f"3: LEASE  ACTIVE  READ 1 {here} 0 EOF",
        f"4: FLOCK  ADVISORY  WRITE 1 ff:ff:{info.st_ino} 0 EOF",
        f"5: FLOCK  ADVISORY  WRITE x {here} 0 EOF",
        "6: FLOCK",
        "",
    ]
    (proc / "locks").write_text("\n".join(lines))
    assert claims(file) == []
    (proc / "locks").write_text("\n".join([*lines, f"7: FLOCK  ADVISORY  WRITE -1 {here} 0 EOF"]))
    assert [(claim.use, claim.by) for claim in claims(file)] == [(Use.LOCK, "another process")]


def test_a_tree_that_is_copied_over_one(file: Path, scratch: Path) -> None:
    """F34: what is locked or behind a loop device is not replaced; what comes before it in the tree is."""
    needs_loop()
    target = scratch / "target" / "tree"
    target.mkdir(parents=True)
    with made_image("ext2", directory=scratch) as image, odirect.open_volume(image, "r+") as volume:
        for name in ("a", "b"):
            volume.makedirs("/tree", exist_ok=True)
            volume.write_bytes(f"/tree/{name}", b"new")
            (target / name).write_bytes(b"old" * 1000)
        for use in (locked_elsewhere(target / "b", fcntl.LOCK_EX), loop_device(target / "b")):
            with use, pytest.raises(InUseError, match="will not replace it") as caught:
                volume.copy_out("/tree", target.parent)
            assert caught.value.filename == str(target / "b")
            assert sorted(os.listdir(target)) == ["a", "b"] and (target / "b").read_bytes() == b"old" * 1000
        assert (target / "a").read_bytes() == b"new"
        volume.copy_out("/tree", target.parent)
    assert (target / "b").read_bytes() == b"new"
