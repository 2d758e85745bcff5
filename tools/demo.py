"""What `make run` does: make a real file, copy it direct, verify it, read it back, and say how it went.

Two variables of the environment: SIZE ("1GiB" unless told otherwise), and DIR, the directory that the
scratch files are made in (one of the project's file system unless told otherwise). The scratch files
are removed at the end, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

import odirect
from odirect.base.units import MIB, format_bytes, parse_bytes

PROJECT = Path(__file__).resolve().parent.parent
ODIRECT = str(Path(sys.executable).with_name("odirect"))
CHUNK = 8 * MIB
RUNTIME_SECONDS = 3
#: (what it is called, --rw, --bs, --iodepth), for odirect and fio alike.
READINGS = (
    ("read 1 MiB × 8", "read", "1M", 8),
    ("random 4 KiB × 32", "randread", "4k", 32),
)

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 110  # a log is not folded


class Trouble(Exception):
    """The demonstration cannot go on; the message says why, and what to do."""


class Row(NamedTuple):
    """One line of the closing table."""

    work: str
    by: str
    seconds: float
    moved_bytes: int
    operations: int | None
    cpu_seconds: float
    outcome: str


class Ran(NamedTuple):
    """A child process that ended well."""

    output: str
    seconds: float
    cpu_seconds: float


def run(*command: str) -> Ran:
    """The run of `command`, whose messages and progress go to the terminal. Raises Trouble if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise Trouble(f"cannot run {command[0]}: {error}") from error
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    if done.returncode:
        raise Trouble(f"`{' '.join(command)}` ended with status {done.returncode}\n{done.stdout}".rstrip())
    cpu_seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Ran(done.stdout, seconds, cpu_seconds)


# --- where it happens ---------------------------------------------------------------------------


def file_system_of(directory: Path) -> str:
    """The type of the file system that `directory` is on, as the kernel names it ("ext4"); "" if unknown."""
    directory = directory.resolve()
    longest, kind = -1, ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, origin = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        if directory.is_relative_to(point) and len(point) >= longest:
            longest, kind = len(point), origin.split()[0]
    return kind


def choose_home() -> Path:
    """DIR, else the project's directory, else /var/tmp where that one is in memory or not ours to write."""
    asked = os.environ.get("DIR")
    if asked:
        home = Path(asked).expanduser().absolute()
        if not home.is_dir():
            raise Trouble(f"DIR={asked} is not a directory")
        return home
    for home in (PROJECT, Path("/var/tmp")):
        if os.access(home, os.W_OK) and file_system_of(home) not in ("tmpfs", "ramfs"):
            return home
    return Path(tempfile.gettempdir())


@contextlib.contextmanager
def scratch_directory(size: int) -> Iterator[Path]:
    """A directory with room for two files of `size` bytes, removed in the end."""
    home = choose_home()
    needed = 2 * size + 64 * MIB
    free = shutil.disk_usage(home).free
    if free < needed:
        raise Trouble(
            f"{home} has {format_bytes(free)} free; two files of {format_bytes(size)} need {format_bytes(needed)}.\n"
            "Say `make run SIZE=256MiB`, or `make run DIR=/another/disk`."
        )
    try:
        directory = Path(tempfile.mkdtemp(prefix=".odirect-demo-", dir=home))
    except OSError as error:
        raise Trouble(f"cannot make a directory in {home}: {error.strerror}; say DIR=/another/place") from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# --- the work -----------------------------------------------------------------------------------


def shown_outcomes(counts: Mapping[str, int]) -> str:
    """Outcomes as "direct", or where there are several as "1,023 direct, 1 bounced (end of file)"."""
    if len(counts) < 2:
        return next(iter(counts), "")
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {name}" for name, count in ordered)


def told_outcomes(told: list[dict[str, Any]]) -> str:
    """Outcomes as `odirect bench --json` lists them, in words."""
    counts: dict[str, int] = {}
    for each in told:
        reason = f" ({each['reason']})" if each["reason"] else ""
        promise = f" {each['promise']}" if each["promise"] != "none" else ""
        counts[f"{each['kind']}{reason}{promise}"] = each["operations"]
    return shown_outcomes(counts)


@contextlib.contextmanager
def progress(words: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for `total` bytes; call what it gives with each number of bytes that is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(words, total=total)
        yield lambda done: bar.advance(task, done)


def make_file(path: Path, size: int) -> Row:
    """Write `size` random bytes, which no layer below can squeeze, through odirect's file object."""
    generator = np.random.default_rng().bit_generator
    block = odirect.empty(CHUNK)
    words = np.frombuffer(block, dtype=np.uint64)
    seconds = cpu_seconds = 0.0
    with odirect.open(path, "w") as file, progress("making the file", size) as advance:
        for offset in range(0, size, CHUNK):
            words[:] = generator.random_raw(len(words))
            length = min(CHUNK, size - offset)
            start, cpu_start = time.perf_counter(), time.process_time()
            file.write(block[:length])
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            advance(length)
        start = time.perf_counter()
        file.sync()
        seconds += time.perf_counter() - start
        outcome = shown_outcomes({str(each): tally.operations for each, tally in file.totals.items()})
    return Row("write 8 MiB, sync", "File.write", seconds, size, -(-size // CHUNK), cpu_seconds, outcome)


def read_batch(path: Path, size: int) -> Row:
    """Read 4 KiB at random places by `read_batch`, for about as long as a benchmark runs."""
    length, count = 4096, 16384
    out = np.frombuffer(odirect.empty(length * count), dtype=np.uint8).reshape(count, length)
    generator = np.random.default_rng()
    operations = 0
    with odirect.open(path) as file:
        start, cpu_start = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < RUNTIME_SECONDS:
            offsets = generator.integers(0, max(1, size // length), count) * length
            file.read_batch(offsets, length, out, depth=READINGS[1][3])
            operations += count
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        outcome = shown_outcomes({str(each): tally.operations for each, tally in file.totals.items()})
    name = READINGS[1][0]
    return Row(name, "File.read_batch", seconds, operations * length, operations, cpu_seconds, outcome)


def bench(path: Path, work: str, rw: str, block: str, depth: int) -> Row:
    """One reading by `odirect bench`."""
    console.print(f"  odirect bench --rw {rw} --bs {block} --iodepth {depth} …", style="dim")
    ran = run(
        ODIRECT, "bench", str(path), "--rw", rw, "--bs", block, "--iodepth", str(depth),
        "--runtime", str(RUNTIME_SECONDS), "--json",
    )  # fmt: skip
    told: dict[str, Any] = json.loads(ran.output)
    operations = int(told["operations"])
    return Row(
        work,
        "odirect bench",
        told["seconds"],
        told["bytes"],
        operations,
        told["cpu_us_per_op"] * operations / 1e6,
        told_outcomes(told["outcomes"]),
    )


def fio(path: Path, size: int, work: str, rw: str, block: str, depth: int) -> Row | None:
    """The same reading by fio, through io_uring or else through libaio; None where fio can do neither."""
    console.print(f"  fio --rw={rw} --bs={block} --iodepth={depth} …", style="dim")
    for engine in ("io_uring", "libaio"):
        done = subprocess.run(
            [
                "fio", "--name=demo", f"--filename={path}", f"--size={size}", "--readonly", "--direct=1",
                f"--ioengine={engine}", f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}", "--time_based",
                f"--runtime={RUNTIME_SECONDS}", "--output-format=json",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            continue
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        told = job["read"]
        cpu_seconds = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        return Row(
            work, f"fio {engine}", told["runtime"] / 1000, told["io_bytes"], told["total_ios"], cpu_seconds, "O_DIRECT"
        )
    return None


def cached_bytes(path: Path) -> int | None:
    """How much of `path` is in the page cache; None where util-linux's fincore is missing."""
    if shutil.which("fincore") is None:
        return None
    done = subprocess.run(
        ["fincore", "--raw", "--noheadings", "--bytes", "--output", "RES", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return int(done.stdout.split()[0]) if done.returncode == 0 and done.stdout.split() else None


def drop_cached(path: Path) -> None:
    """Take what is clean of `path` out of the page cache, so that the next reader starts cold."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def copies(source: Path, target: Path, size: int) -> tuple[list[Row], list[str]]:
    """The rows for copying `source`: by odirect with and without verifying, by cp; and what is to be said."""
    rows, notes = [], []
    cached: dict[str, int | None] = {}
    commands = [
        ("copy and verify", "odirect cp", [ODIRECT, "cp", "--verify", "--json"]),
        ("copy and sync", "odirect cp", [ODIRECT, "cp", "--sync", "--json"]),
        ("copy and sync", "cp; sync", ["cp"]),
    ]
    for work, by, command in commands:
        if shutil.which(command[0]) is None:
            continue
        drop_cached(source)
        console.print(f"  {' '.join([Path(command[0]).name, *command[1:]])} …", style="dim")
        ran = run(*command, str(source), str(target))
        outcome = "buffered"
        seconds, cpu_seconds = ran.seconds, ran.cpu_seconds
        if command[0] == ODIRECT:
            told = json.loads(ran.output)
            outcome = shown_outcomes({name: each["operations"] for name, each in told["writes"].items()})
        else:
            synced = run("sync", str(target))
            seconds, cpu_seconds = seconds + synced.seconds, cpu_seconds + synced.cpu_seconds
        cached[by] = cached_bytes(target)
        rows.append(Row(work, by, seconds, size, None, cpu_seconds, outcome))
        target.unlink()
    kept = [f"{format_bytes(left)} by {by}" for by, left in cached.items() if left is not None]
    if kept:
        notes.append("Left in the page cache of the copied file: " + ", ".join(kept) + ".")
    return rows, notes


def show(rows: list[Row], title: str) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("work", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for heading in ("throughput", "ops/s", "CPU µs/op", "CPU s/GiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("outcome")
    previous = rows[0].work
    for row in rows:
        if row.work != previous:
            table.add_section()
            previous = row.work
        each, rate = "", ""
        if row.operations:
            each = f"{row.cpu_seconds * 1e6 / row.operations:,.1f}"
            rate = f"{row.operations / row.seconds:,.0f}"
        table.add_row(
            row.work,
            row.by,
            f"{format_bytes(row.moved_bytes / row.seconds)}/s",
            rate,
            each,
            f"{row.cpu_seconds / (row.moved_bytes / (1 << 30)):.2f}",
            row.outcome,
        )
    console.print(table)


def demonstrate(size: int) -> None:
    """Everything, in a scratch directory."""
    with scratch_directory(size) as scratch:
        kind = file_system_of(scratch)
        source, target = scratch / "source", scratch / "copy"
        console.print(f"A file of {format_bytes(size)} of random bytes on {kind or 'the file system'} ({scratch})")
        written = make_file(source, size)
        console.print("Copying it")
        copied, notes = copies(source, target, size)
        console.print("Reading it")
        rows = [written, *copied]
        for reading in READINGS:
            rows.append(bench(source, *reading))
            beside = fio(source, size, *reading) if shutil.which("fio") else None
            if beside is not None:
                rows.append(beside)
        rows.append(read_batch(source, size))
        notes.append("× is how many were in flight at once; CPU is user and system time of all threads.")
        if not shutil.which("fio"):
            notes.append("fio is not installed (Debian package fio); its rows are missing.")
        console.print()
        show(rows, f"{format_bytes(size)} on {kind or 'an unknown file system'}, {os.cpu_count()} CPUs")
        for note in notes:
            console.print(note)


def stop(number: int, _frame: object) -> None:
    """Turn SIGTERM into what removes the scratch on its way out."""
    raise SystemExit(128 + number)


def main() -> int:
    """Run it; the exit status."""
    signal.signal(signal.SIGTERM, stop)
    try:
        try:
            size = parse_bytes(os.environ.get("SIZE") or "1GiB")
        except ValueError as error:
            raise Trouble(f"SIZE: {error}") from None
        if size < MIB:
            raise Trouble("SIZE is too small to measure anything: 1MiB is the least")
        demonstrate(size)
    except KeyboardInterrupt:
        console.print("\ninterrupted; the scratch files are removed")
        return 128 + signal.SIGINT
    except (Trouble, odirect.ODirectError) as error:
        console.print(f"make run: {error}", style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
