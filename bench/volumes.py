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
from run import (
    as_json,
    chosen_groups,
    console,
    filled_in,
    machine,
    make_file,
    measure_all,
    parser,
    print_all,
    stopped,
)

from odirect.base.units import MIB
from odirect.benchmark import Stop


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """What the command line says."""
    options = parser(
        "Measure odirect in volumes against its peers; prints, asserts nothing.",
        quick="2 rounds of half a second, 256 MiB, 5,000 small files",
        size="length of the file in the volume (default 2GiB)",
    )
    options.add_argument("--files", type=int, help="small files in the tree (default 20000)")
    chosen = filled_in(options.parse_args(words), size=(2048 * MIB, 256 * MIB), files=(20000, 5000))
    if chosen.size < 8 * MIB or chosen.rounds < 1 or chosen.seconds <= 0 or chosen.files < 1:
        options.error("the size is at least 8 MiB, rounds and files at least 1, and seconds more than 0")
    return chosen


def main(words: Sequence[str] = sys.argv[1:]) -> int:
    """Run it; the exit status."""
    signal.signal(signal.SIGTERM, stopped)
    asked = arguments(words)
    groups = chosen_groups(all_groups(), asked.only)
    if not groups:
        return 0
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
