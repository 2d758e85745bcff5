"""Trees of small files for the benchmarks of volumes, and the ways that a tree is read and copied elsewhere."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
from _peers import Missing, drop_cached

import odirect
from odirect.base.units import KIB, MIB

_COMMAND = "import sys; from odirect.cli.main import main; sys.exit(main())"
_FILES_IN_DIRECTORY = 100
_SMALLEST, _LARGEST = KIB, 16 * KIB


def make_tree(top: Path, files: int, generator: numpy.random.Generator) -> int:
    """The bytes of a new tree of files of 1 to 16 KiB of random bytes, a hundred in each directory."""
    sizes = generator.integers(_SMALLEST, _LARGEST, files, endpoint=True).tolist()
    pool = generator.bytes(4 * MIB)
    starts = generator.integers(0, len(pool) - _LARGEST, files).tolist()
    for number, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        directory = top / f"{number // _FILES_IN_DIRECTORY:04}"
        if not number % _FILES_IN_DIRECTORY:
            directory.mkdir(parents=True)
        (directory / f"file{number:06}.dat").write_bytes(pool[start : start + size])
    return int(sum(sizes))


def image_bytes(files: int) -> int:
    """A size that is enough for a volume with such a tree."""
    return 64 * MIB + files * (_LARGEST + 8 * KIB)


def run(words: Sequence[str | Path], *, needs: str = "") -> None:
    """Run a command; Missing if it is not there, or fails."""
    if shutil.which(words[0]) is None:
        raise Missing(f"{needs or words[0]} is not installed")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise Missing(f"{words[0]} failed ({done.returncode}): {said[-1]}")


def seconds_of(*commands: Sequence[str | Path]) -> float:
    """What these commands take, one after the other."""
    start = time.perf_counter()
    for words in commands:
        run(words)
    return time.perf_counter() - start


def mkfs(image: Path, size: int, source: Path | None = None) -> list[str | Path]:
    """The command of ours that makes a volume of `size` bytes, with the tree at `source` in it."""
    filled: list[str | Path] = [] if source is None else ["--from", source]
    return [sys.executable, "-c", _COMMAND, "mkfs", "ext2", image, "--block-size", "4096", "--size", str(size), *filled]


def mke2fs(image: Path, size: int, source: Path) -> list[str | Path]:
    """The same by e2fsprogs, which takes blocks of 4 KiB as ours does."""
    return ["mke2fs", "-q", "-F", "-t", "ext2", "-b", "4096", "-d", source, image, f"{size // KIB}k"]


def read_by_us(image: Path) -> tuple[float, int]:
    """Seconds that it takes to open the volume and read every file of it, and the bytes."""
    drop_cached(image)
    start = time.perf_counter()
    with odirect.open_volume(image) as volume:
        total = sum(len(content) for _, content in volume.read_files())
    return time.perf_counter() - start, total


def read_by_walk(top: Path) -> tuple[float, int]:
    """The same by os.walk and open, below `top`."""
    start = time.perf_counter()
    total = 0
    for directory, _, names in os.walk(top):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                total += len(file.read())
    return time.perf_counter() - start, total


def read_by_dissect(image: Path) -> tuple[float, int]:
    """The same by dissect.extfs, a reader in pure Python, if somebody has installed it."""
    try:
        extfs = importlib.import_module("dissect.extfs")
    except ImportError:
        raise Missing("dissect.extfs is not installed") from None
    drop_cached(image)
    start = time.perf_counter()
    total = 0
    with image.open("rb") as raw:
        waiting = [extfs.ExtFS(raw).root]
        while waiting:
            for name, node in waiting.pop().listdir().items():
                if name in (".", ".."):
                    continue
                if node.filetype == 0o040000:
                    waiting.append(node)
                elif node.filetype == 0o100000:
                    total += len(node.open().read())
    return time.perf_counter() - start, total


@contextlib.contextmanager
def loop_mounted(image: Path, *, read_only: bool) -> Iterator[Path]:
    """The directory where an image is mounted through a loop device, nothing of it in the page cache."""
    if os.geteuid():
        raise Missing("a loop mount needs root")
    point = image.with_name(image.name + ".mount")
    drop_cached(image)
    point.mkdir()
    try:
        run(["mount", "-t", "ext2", "-o", "loop,ro" if read_only else "loop", image, point])
        try:
            yield point
        finally:
            subprocess.run(["umount", point], check=True)
    finally:
        point.rmdir()
