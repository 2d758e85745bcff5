"""Measure odirect inside unmounted images against fio on the bare image, loop mounts and mke2fs, as ratios.

As bench/run.py: rounds are interleaved, figures are medians of the ratios within a round, and nothing is
asserted; see bench/README.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy
from _volume_works import VolumeSetting, all_groups, remove_all
from run import as_json, console, machine, make_file, measure_all, print_all, stopped

from odirect.base.units import MIB, parse_bytes
from odirect.benchmark import Stop


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """What the command line says."""
    names = [group.name for group in all_groups()]
    parser = argparse.ArgumentParser(description="Measure odirect in volumes against its peers; asserts nothing.")
    parser.add_argument("--quick", action="store_true", help="2 rounds of half a second, 256 MiB, 5,000 small files")
    parser.add_argument("--rounds", type=int, help="rounds of each work (default 5)")
    parser.add_argument("--seconds", type=float, help="length of each run (default 2)")
    parser.add_argument("--size", type=parse_bytes, help="length of the file in the volume (default 2GiB)")
    parser.add_argument("--files", type=int, help="small files in the tree (default 20000)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the files are made")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    chosen = parser.parse_args(words)
    quick = chosen.quick
    chosen.rounds = chosen.rounds or (2 if quick else 5)
    chosen.seconds = chosen.seconds or (0.5 if quick else 2.0)
    chosen.size = chosen.size or (256 * MIB if quick else 2048 * MIB)
    chosen.files = chosen.files or (5000 if quick else 20000)
    if chosen.size < 8 * MIB or chosen.rounds < 1 or chosen.seconds <= 0 or chosen.files < 1:
        parser.error("the size is at least 8 MiB, rounds and files at least 1, and seconds more than 0")
    return chosen


def main(words: Sequence[str] = sys.argv[1:]) -> int:
    """Run it; the exit status."""
    signal.signal(signal.SIGTERM, stopped)
    asked = arguments(words)
    groups = [group for group in all_groups() if not asked.only or group.name in asked.only]
    generator = numpy.random.default_rng(0)
    setting = VolumeSetting(
        Path(tempfile.mkdtemp(prefix="odirect-bench-", dir=asked.dir)),
        asked.size - asked.size % MIB,
        asked.files,
        asked.seconds,
        Stop(),
        generator,
        lambda path, size: make_file(path, size, generator),
        lambda message: console.print(message, style="dim"),
    )
    try:
        about = machine(setting.scratch)
        missing: dict[str, str] = {}
        interrupted = False
        try:
            missing = measure_all(groups, setting, asked.rounds)
        except KeyboardInterrupt:
            interrupted = True
        if asked.json:
            sizes = {"seconds": asked.seconds, "size": asked.size, "files": asked.files}
            print(as_json(groups, about, missing, asked.rounds, sizes))
        else:
            print_all(groups, about, missing, asked.dir)
        return 130 if interrupted else 0
    finally:
        remove_all(setting)


if __name__ == "__main__":
    sys.exit(main())
