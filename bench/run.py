"""Measure odirect against fio, cp, dd and bare Python, and print ratios beside what is wanted of them.

Rounds are interleaved on the same file, and each figure is the median over the rounds of the ratio
within one, so that a machine that is busy, or a disk that slows down, weighs on both sides alike.
Nothing is asserted: see bench/README.md for what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import _peers
import numpy
from _volume_works import all_groups as volume_groups
from _works import Group, Line, S, Setting, all_groups
from rich.console import Console
from rich.table import Table

import odirect
from odirect.base.units import MIB, format_bytes, parse_bytes
from odirect.benchmark import Stop

CHUNK = 8 * MIB
console = Console(stderr=True, highlight=False)


def parser(description: str, *, quick: str, size: str) -> argparse.ArgumentParser:
    """The options that all scripts here have. --only takes the works of all of them, and each does its own."""
    names = [group.name for group in [*all_groups(), *volume_groups()]]
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--rounds", type=int, help="rounds of each work (default 5)")
    made.add_argument("--seconds", type=float, help="length of each run (default 2)")
    made.add_argument("--size", type=parse_bytes, help=size)
    made.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the files are made")
    made.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    made.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return made


def filled_in(chosen: argparse.Namespace, **defaults: tuple[int, int]) -> argparse.Namespace:
    """The options with their defaults: the first where all is measured, the second where it is to be quick."""
    chosen.rounds = chosen.rounds or (2 if chosen.quick else 5)
    chosen.seconds = chosen.seconds or (0.5 if chosen.quick else 2.0)
    for name, (whole, quick) in defaults.items():
        setattr(chosen, name, getattr(chosen, name) or (quick if chosen.quick else whole))
    return chosen


def chosen_groups(groups: list[Group[S]], only: Sequence[str] | None) -> list[Group[S]]:
    """Those that are to be measured; says so if none is."""
    found = [group for group in groups if not only or group.name in only]
    if not found:
        console.print("none of these works is measured here", style="dim")
    return found


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """What the command line says."""
    options = parser(
        "Measure odirect against its peers; prints, asserts nothing.",
        quick="2 rounds of half a second on a file of 256 MiB",
        size="length of the file that is read and written (default 1GiB)",
    )
    options.add_argument("--copy-size", type=parse_bytes, help="length of the file that is copied (default 2GiB)")
    sizes = {"size": (1024 * MIB, 256 * MIB), "copy_size": (2048 * MIB, 256 * MIB)}
    chosen = filled_in(options.parse_args(words), **sizes)
    if chosen.size < MIB or chosen.copy_size < MIB or chosen.rounds < 1 or chosen.seconds <= 0:
        options.error("sizes are at least 1 MiB, rounds at least 1, and seconds more than 0")
    return chosen


def make_file(path: Path, size: int, generator: numpy.random.Generator) -> None:
    """Write `size` random bytes, all of them on the disk."""
    block = odirect.empty(CHUNK)
    array = numpy.frombuffer(block, dtype=numpy.uint8)
    with odirect.open(path, "w") as file:
        for offset in range(0, size, CHUNK):
            array[:] = numpy.frombuffer(generator.bytes(CHUNK), dtype=numpy.uint8)
            file.pwrite(block[: min(CHUNK, size - offset)], offset)
        file.sync()


def machine(directory: Path) -> dict[str, Any]:
    """What the figures were taken on."""
    probe = directory / "probe"
    make_file(probe, 4096, numpy.random.default_rng(0))
    told = odirect.alignment(probe)
    probe.unlink()
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "odirect": odirect.__version__,
        "fio": _peers.fio_version(),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "filesystem": told.filesystem,
        "device": told.device,
        "direct": told.support.reads and told.support.writes,
    }


def measure_all(groups: list[Group[S]], setting: S, rounds: int) -> dict[str, str]:
    """Run every round of every group; why some were left out."""
    missing: dict[str, str] = {}
    for group in groups:
        try:
            if group.prepare is not None:
                group.prepare(setting)
            for number in range(rounds):
                console.print(f"{group.name}: round {number + 1} of {rounds}", style="dim")
                group.run(setting, number)
        except _peers.Missing as reason:
            missing[group.name] = str(reason)
    return missing


def shown(line: Line, value: float) -> str:
    """A figure as a person reads it."""
    if line.kind == "ratio":
        return f"{value:.2f} ×"
    return f"{value:,.1f}"


def table(groups: list[Group[S]]) -> Table:
    """Everything that was measured."""
    made = Table(title="odirect against its peers: medians over the rounds", title_justify="left")
    for heading in ("work", "figure", "peer"):
        made.add_column(heading)
    for heading in ("odirect", "the peer", "compared", "spread", "wanted"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("")
    for group in groups:
        for line in group.lines:
            if not line.ours:
                continue
            digits = 0 if line.figure in ("IOPS", "MiB/s") else 2
            verdict = "" if not line.wanted else "yes" if line.met(line.value) else "NO"
            spread = ""
            if line.kind == "ratio" and len(line.ours) > 1:
                pairs = zip(line.ours, line.theirs, strict=True)
                ratios = [ours / theirs if line.higher_is_better else theirs / ours for ours, theirs in pairs]
                spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
            made.add_row(
                line.work, line.figure, line.peer, f"{median(line.ours):,.{digits}f}",
                f"{median(line.theirs):,.{digits}f}", shown(line, line.value), spread, line.wanted, verdict,
            )  # fmt: skip
        made.add_section()
    return made


def as_json(
    groups: list[Group[S]], about: dict[str, Any], missing: dict[str, str], rounds: int, asked: dict[str, Any]
) -> str:
    """The same for a program."""
    works = [
        {
            "name": group.name,
            "work": line.work,
            "figure": line.figure,
            "peer": line.peer,
            "ours": line.ours,
            "theirs": line.theirs,
            "kind": line.kind,
            "value": line.value,
            "wanted": line.wanted,
            "met": line.met(line.value) if line.wanted else None,
        }
        for group in groups
        for line in group.lines
        if line.ours
    ]
    told = {
        "machine": about,
        "rounds": rounds,
        **asked,
        "works": works,
        "left_out": missing,
    }
    return json.dumps(told, indent=2)


def print_all(groups: list[Group[S]], about: dict[str, Any], missing: dict[str, str], directory: Path) -> None:
    """The table, with what is to be known beside it."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), markup=False, soft_wrap=True)
    out.print(table(groups))
    if not about["direct"]:
        out.print(f"{directory} does not take direct I/O: these figures are of the page cache")
    for name, reason in missing.items():
        out.print(f"{name} was left out: {reason}", markup=False)
    for note in sorted(note for group in groups for note in group.notes):
        out.print(note, markup=False)


def stopped(number: int, _frame: object) -> None:
    """Turn SIGTERM into what removes the scratch files on its way out."""
    raise SystemExit(128 + number)


def main(words: Sequence[str] = sys.argv[1:]) -> int:
    """Run it; the exit status."""
    signal.signal(signal.SIGTERM, stopped)
    asked = arguments(words)
    groups = chosen_groups(all_groups(), asked.only)
    if not groups:
        return 0
    generator = numpy.random.default_rng(0)
    scratch = Path(tempfile.mkdtemp(prefix="odirect-bench-", dir=asked.dir))
    try:
        about = machine(scratch)
        source = scratch / "source"

        def make_copy_source() -> None:
            console.print(f"making a file of {format_bytes(asked.copy_size)} to copy", style="dim")
            setting.file.unlink(missing_ok=True)
            make_file(source, asked.copy_size, generator)

        setting = Setting(scratch / "data", asked.size, source, asked.seconds, Stop(), generator, make_copy_source)
        console.print(f"making a file of {format_bytes(asked.size)} in {scratch}", style="dim")
        make_file(setting.file, asked.size, generator)
        missing: dict[str, str] = {}
        interrupted = False
        try:
            missing = measure_all(groups, setting, asked.rounds)
        except KeyboardInterrupt:
            interrupted = True
        if asked.json:
            sizes = {"seconds": asked.seconds, "size": asked.size, "copy_size": asked.copy_size}
            print(as_json(groups, about, missing, asked.rounds, sizes))
        else:
            print_all(groups, about, missing, asked.dir)
        return 130 if interrupted else 0
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
