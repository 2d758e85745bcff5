"""Access control lists in copies: kept, or inherited, as `cp` and the kernel do it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.images import odirect
from tests.fs.ext2.test_acl import ACCESS, DEFAULT, NAMED, attribute
from tests.loops import made_image, mounted, needs_root

from odirect import open_volume

#: u::rwx, g::r-x, g:500:rwx, m::r-x, o::---
BOUNDING = attribute((1, 7), (4, 5), (8, 7, 500), (0x10, 5), (0x20, 0))
#: The same without names: only the mode of what is made is bounded.
SHORT = attribute((1, 7), (4, 1), (0x20, 0))


TARGETS = ("none", "bounding", "short")


@contextlib.contextmanager
def three_images(directory: Path) -> Iterator[list[Path]]:
    """Empty volumes: one that is copied from, and two that are copied to."""
    with contextlib.ExitStack() as stack:
        images = []
        for name in ("from", "ours", "theirs"):
            (directory / name).mkdir()
            images.append(stack.enter_context(made_image("ext2", 24 << 20, directory=directory / name)))
        yield images


def make_source(top: Path) -> None:
    """Files and directories with lists and without, small ones and one that is not."""
    for directory in ("", "plain", "lists", "plain/deep"):
        (top / directory).mkdir(exist_ok=True)
        for number, mode in enumerate((0o644, 0o755, 0o600, 0o666)):
            path = top / directory / f"file{number}"
            path.write_bytes(b"x" * 1000 * number)
            path.chmod(mode)
    (top / "plain" / "large").write_bytes(b"l" * 3_000_000)
    os.mkfifo(top / "plain" / "fifo", 0o666)
    os.symlink("nowhere", top / "plain" / "link")
    os.setxattr(top / "lists" / "file1", ACCESS, NAMED)
    os.setxattr(top / "lists", DEFAULT, NAMED)
    os.setxattr(top / "plain" / "deep", ACCESS, NAMED)


def make_targets(top: Path) -> None:
    for name, default in zip(TARGETS, (None, BOUNDING, SHORT), strict=True):
        (top / name).mkdir()
        if default is not None:
            os.setxattr(top / name, DEFAULT, default)


def seen(top: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in top.rglob("*"):
        if path.name == "lost+found":
            continue
        names = os.listxattr(path, follow_symlinks=False)
        lists = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
        found[os.fspath(path.relative_to(top))] = stat.filemode(path.lstat().st_mode), lists
    return found


def by_command(way: str, ours: Path, source: Path, target: str) -> None:
    assert odirect("cp", "-q", way, source / "plain", source / "lists", f"{ours}:/{target}/") == 0


def by_copy_in(way: str, ours: Path, source: Path, target: str) -> None:
    with open_volume(ours, "r+") as volume:
        for name in ("plain", "lists"):
            report = volume.copy_in(source / name, f"/{target}", attributes=way == "-a")
            assert report.left_out == []


@pytest.mark.parametrize("copy", [by_command, by_copy_in])
@pytest.mark.parametrize("way", ["-a", "-r"])
def test_copies_into_a_volume_are_as_cp_makes_them(way: str, copy: Callable[..., None], tmp_path: Path) -> None:
    """`cp -a` leaves what the original has and nothing else; `cp -r` lets the directory's list bound what is made."""
    needs_root()
    with three_images(tmp_path) as (origin, ours, theirs):
        for image in (ours, theirs):
            with mounted(image, "ext2") as top:
                make_targets(top)
        with mounted(origin, "ext2") as source:
            make_source(source)
            for target in TARGETS:
                with mounted(theirs, "ext2") as top:
                    command = ["cp", way, *map(str, (source / "plain", source / "lists", top / target))]
                    # Without a mask: `copy_in` knows of none.
                    subprocess.run(command, check=True, umask=0)
                before = os.umask(0)
                try:
                    copy(way, ours, source, target)
                finally:
                    os.umask(before)
        with mounted(ours, "ext2") as one, mounted(theirs, "ext2") as other:
            assert seen(one) == seen(other)
        subprocess.run(["e2fsck", "-fn", ours], check=True, capture_output=True)


@pytest.mark.parametrize("command", [True, False])
def test_copies_out_of_a_volume_keep_lists(command: bool, tmp_path: Path) -> None:
    """To a host's file system that has access lists; what a directory there would pass on is taken away."""
    needs_root()
    with three_images(tmp_path) as (origin, ours, theirs):
        with mounted(origin, "ext2") as source:
            make_source(source)
        for image in (ours, theirs):
            with mounted(image, "ext2") as top:
                make_targets(top)
                for target in TARGETS:
                    if image == theirs:
                        with mounted(origin, "ext2") as source:
                            subprocess.run(["cp", "-a", source / "plain", source / "lists", top / target], check=True)
                        continue
                    for name in ("plain", "lists"):
                        if command:
                            assert odirect("cp", "-q", "-a", f"{origin}:/{name}", top / target) == 0
                        else:
                            with open_volume(origin) as volume:
                                assert volume.copy_out(f"/{name}", top / target).left_out == []
        with mounted(ours, "ext2") as one, mounted(theirs, "ext2") as other:
            assert seen(one) == seen(other)


def test_what_a_host_cannot_keep_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host's file system has no access lists the copy goes on, and says what it left out."""
    needs_root()
    set_xattr = os.setxattr

    def refuse(target: object, name: bytes, *rest: object, **options: object) -> None:
        if name == ACCESS:
            raise OSError(errno.EOPNOTSUPP, "not here")
        set_xattr(target, name, *rest, **options)  # type: ignore[arg-type]

    with three_images(tmp_path) as (origin, target, _):
        with mounted(origin, "ext2") as source:
            make_source(source)
        with mounted(target, "ext2") as top, open_volume(origin) as volume:
            monkeypatch.setattr(os, "setxattr", refuse)
            report = volume.copy_out("/lists", top)
            assert [line for line in report.left_out if "file1" in line and "posix_acl_access" in line]
            assert (top / "lists" / "file1").read_bytes() == b"x" * 1000
