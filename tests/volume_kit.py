"""Volumes for tests: in memory, and real ext2; and Linux itself, to be compared with them, in a chroot."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.loops import made_image, needs_root

import odirect
from odirect.sched.scheduler import Scheduler
from odirect.testing.memory_fs import MemoryFileSystem
from odirect.volume_runner import Runner
from odirect.volumes import Volume

KINDS = ("memory", "ext2")


def memory_volume(**options: Any) -> Volume:
    """A volume over a file system in memory."""
    file_system = MemoryFileSystem(**options)
    return Volume(file_system, Runner(Scheduler(), file_system.name), image=None)


@contextlib.contextmanager
def volume_of(kind: str, directory: Path, mkfs: tuple[str, ...] = (), size: int = 16 << 20) -> Iterator[Volume]:
    """An empty volume, open for writing; whole afterwards by its own judgement."""
    if kind == "memory":
        with memory_volume() as volume:
            yield volume
            assert volume.check() == []
        return
    with made_image("ext2", size, directory=directory, mkfs=mkfs) as image, odirect.open_volume(image, "r+") as volume:
        volume.rmdir("/lost+found")
        yield volume
        assert volume.check() == []


# --- the same program for Linux and for a volume -------------------------------------------------


class Linux:
    """The operations of a volume, done by the kernel."""

    mkdir = staticmethod(os.mkdir)
    rmdir = staticmethod(os.rmdir)
    remove = staticmethod(os.unlink)
    rename = staticmethod(os.rename)
    symlink = staticmethod(os.symlink)
    readlink = staticmethod(os.readlink)
    stat = staticmethod(os.stat)
    lstat = staticmethod(os.lstat)
    chmod = staticmethod(os.chmod)
    listdir = staticmethod(os.listdir)

    @staticmethod
    def link(source: str, path: str) -> None:
        os.link(source, path, follow_symlinks=False)

    @staticmethod
    def mknod(path: str, mode: int) -> None:
        os.mknod(path, mode)

    @staticmethod
    def write(path: str, mode: str, data: bytes) -> bytes:
        """What a file has after it was opened, and written to."""
        with contextlib.suppress(OSError):
            kind = stat.S_IFMT(os.stat(path).st_mode)
            if kind == stat.S_IFDIR and mode == "r":
                raise IsADirectoryError(errno.EISDIR, "")
            if kind not in (stat.S_IFDIR, stat.S_IFREG) and mode != "x":
                raise LookupError("it would wait for the other end")
        with open(path, mode + "b") as file:
            if mode != "r":
                file.write(data)
        return Path(path).read_bytes()


class Ours:
    """The same, in a volume."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        for name in ("mkdir", "rmdir", "remove", "rename", "symlink", "readlink", "stat", "lstat", "chmod", "link"):
            setattr(self, name, getattr(volume, name))
        self.listdir = volume.listdir
        self.mknod = volume.mknod

    def write(self, path: str, mode: str, data: bytes) -> bytes:
        with self.volume.open(path, mode) as file:
            if mode != "r":
                file.write(data)
        return self.volume.read_bytes(path)


def program(seed: int, length: int, *, special_bits: bool = True) -> list[tuple[Any, ...]]:
    """Operations with few names, so that they meet; many of them fail.

    special_bits: with set-user-ID and its like, which a write by a user without privileges takes away.
    """
    dice = random.Random(seed)

    def path() -> str:
        names = [dice.choice("aaabbc") for _ in range(dice.choice((1, 1, 1, 2, 2, 3)))]
        if dice.random() < 0.05:
            names[dice.randrange(len(names))] = dice.choice((".", "..", "n" * 255, "n" * 256))
        return dice.choice(("", "/")) + "/".join(names) + dice.choices(("", "/", "/."), (20, 2, 1))[0]

    def one() -> tuple[Any, ...]:
        verb = dice.choices(
            ("mkdir", "rmdir", "remove", "rename", "link", "symlink", "write", "mknod", "chmod", "look"),
            (6, 2, 3, 6, 3, 4, 6, 1, 1, 2),
        )[0]
        if verb in ("rename", "link"):
            return verb, path(), path()
        if verb == "symlink":
            return verb, dice.choice((path(), path(), "../" + path(), "/")), path()
        if verb == "write":
            return verb, path(), dice.choice(("r", "r+", "w", "a", "x", "w", "a", "x")), b"%d" % dice.randrange(10**9)
        if verb == "mknod":
            return verb, path(), stat.S_IFIFO | 0o600
        if verb == "mkdir":
            return verb, path(), 0o755
        if verb == "chmod":
            return verb, path(), dice.choice((0o700, 0o2755, 0o4711) if special_bits else (0o700, 0o1777, 0o640))
        return dice.choice(("stat", "lstat", "readlink", "listdir")), path()

    return [one() for _ in range(length)]


def perform(side: Any, operation: tuple[Any, ...]) -> Any:
    """What came of an operation: an errno, or what it gave."""
    try:
        given = getattr(side, operation[0])(*operation[1:])
    except LookupError:
        return errno.EOPNOTSUPP
    except OSError as error:
        return error.errno
    if isinstance(given, os.stat_result):
        size = 0 if stat.S_ISDIR(given.st_mode) else given.st_size
        return "stat", stat.filemode(given.st_mode), given.st_nlink, size
    return sorted(given) if isinstance(given, list) else given


def tree_of(side: Any) -> list[Any]:
    """All that there is, with what can be told of it."""
    found = []
    stack = ["/"]
    while stack:
        directory = stack.pop()
        for name in sorted(side.listdir(directory)):
            path = os.path.join(directory, name)
            what = perform(side, ("lstat", path))
            found.append((path, what, perform(side, ("readlink", path)), perform(side, ("write", path, "r", b""))))
            if what[1][0] == "d":
                stack.append(path)
    return found


def on_linux(directory: Path, operations: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
    """What the kernel answers to each, and what there is at the end, in a process whose root is `directory`."""
    needs_root()
    answers = directory.with_name(directory.name + ".answers")
    child = os.fork()
    if not child:
        status = 1
        try:
            with answers.open("wb") as file:
                os.chroot(directory)
                os.chdir("/")
                os.umask(0o022)
                pickle.dump(([perform(Linux, each) for each in operations], tree_of(Linux)), file)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    found: tuple[list[Any], list[Any]] = pickle.loads(answers.read_bytes())
    answers.unlink()
    return found


def needs_counted_directories(directory: Path) -> None:
    """Skip the test unless the file system there counts subdirectories as links (btrfs does not)."""
    (directory / "above" / "below").mkdir(parents=True)
    links = (directory / "above").stat().st_nlink
    (directory / "above" / "below").rmdir()
    (directory / "above").rmdir()
    if links != 3:
        pytest.skip("needs a file system that counts subdirectories")
