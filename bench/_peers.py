"""What odirect is measured against: fio, cp, dd, and a bare loop around os.preadv."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

import odirect


class Missing(Exception):
    """The peer is not here, or cannot do this; the message says why."""


class Rate(NamedTuple):
    """How fast something went: operations a second, bytes a second, microseconds of CPU an operation."""

    iops: float
    bytes_per_second: float
    cpu_us_per_op: float


class Spent(NamedTuple):
    """What a command took: seconds of wall clock and of CPU, and pages of the named files it left in the cache."""

    seconds: float
    cpu_seconds: float
    cached_bytes_more: int | None


# --- fio -----------------------------------------------------------------------------------------


def fio_version() -> str | None:
    """ "fio-3.33", or None."""
    path = shutil.which("fio")
    if path is None:
        return None
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.strip()


def fio(path: Path, rw: str, block_bytes: int, depth: int, size: int, seconds: float, *, start: int = 0) -> Rate:
    """fio with io_uring, direct, at its leanest: no clock read for each request, no map of what was read."""
    if shutil.which("fio") is None:
        raise Missing("fio is not installed")
    done = subprocess.run(
        [
            "fio", "--name=bench", f"--filename={path}", f"--offset={start}", f"--size={size}", f"--rw={rw}",
            f"--bs={block_bytes}", f"--iodepth={depth}", "--ioengine=io_uring", "--direct=1", "--time_based",
            f"--runtime={seconds * 1000:.0f}ms",
            "--norandommap", "--randrepeat=0", "--gtod_reduce=1", "--overwrite=1", "--output-format=json",
            *(["--readonly"] if "read" in rw else []),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["nothing"]
        raise Missing(f"fio failed ({done.returncode}): {said[-1]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    told = job["read" if "read" in rw else "write"]
    if not told["total_ios"]:
        raise Missing("fio made no request in this time")
    cpu_seconds = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return Rate(told["iops"], told["bw_bytes"], cpu_seconds * 1e6 / told["total_ios"])


# --- one request at a time -----------------------------------------------------------------------


def bare_and_ours(path: Path, size: int, seconds: float, generator: numpy.random.Generator) -> tuple[Rate, Rate]:
    """A bare os.preadv loop and `preadinto`, both 4 KiB at random, taking turns of a hundred requests."""
    length, turn = 4096, 100
    buffer = odirect.empty(length)
    segments = [buffer]
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with odirect.open(path) as file:
            preadv, preadinto = os.preadv, file.preadinto

            def bare(offsets: list[int]) -> None:
                for offset in offsets:
                    preadv(fd, segments, offset)

            def ours(offsets: list[int]) -> None:
                for offset in offsets:
                    preadinto(buffer, offset)

            spent: dict[Callable[[list[int]], None], list[float]] = {bare: [0, 0, 0], ours: [0, 0, 0]}
            began = time.perf_counter()
            while time.perf_counter() - began < 2 * seconds:
                for call, sums in spent.items():
                    offsets = (generator.integers(0, size // length, turn) * length).tolist()
                    cpu, start = time.process_time(), time.perf_counter()
                    call(offsets)
                    sums[0] += time.perf_counter() - start
                    sums[1] += time.process_time() - cpu
                    sums[2] += turn
    finally:
        os.close(fd)
    rates = [Rate(count / wall, count * length / wall, cpu * 1e6 / count) for wall, cpu, count in spent.values()]
    return rates[0], rates[1]


# --- commands ------------------------------------------------------------------------------------


def cached_bytes(paths: Sequence[Path]) -> int | None:
    """How much of these files is in the page cache; None where neither cachestat(2) nor fincore is to be had."""
    from odirect.ring._calls import cachestat

    total = 0
    for path in paths:
        if not path.exists():
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            told = cachestat(fd, 0, 0)
        finally:
            os.close(fd)
        if told is not None:
            total += told[0] * os.sysconf("SC_PAGESIZE")
            continue
        if shutil.which("fincore") is None:
            return None
        done = subprocess.run(
            ["fincore", "--raw", "--noheadings", "--bytes", "--output", "RES", str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        total += int(done.stdout.split()[0]) if done.stdout.split() else 0
    return total


def copying(commands: Sequence[Sequence[str]], source: Path, target: Path) -> Spent:
    """What these commands, one after the other, take to copy `source`, which is not in the page cache before."""
    for command in commands:
        if shutil.which(command[0]) is None:
            raise Missing(f"{command[0]} is not installed")
    target.unlink(missing_ok=True)
    drop_cached(source)
    cached = cached_bytes([source, target])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise Missing(f"{' '.join(command[:2])} failed ({done.returncode}): {said[-1]}")
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    left = cached_bytes([source, target])
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Spent(seconds, cpu, None if cached is None or left is None else left - cached)


def drop_cached(path: Path) -> None:
    """Write back and drop what of the file is in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def started(python: str, statement: str) -> float:
    """Seconds that a fresh interpreter takes to run `statement` and end."""
    start = time.perf_counter()
    subprocess.run([python, "-c", statement], check=True)
    return time.perf_counter() - start
