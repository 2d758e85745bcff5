"""The works of the speed table: each one round of odirect and of its peer, on the same file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Generic, TypeVar

import _peers
import numpy

from odirect.base.units import KIB, MIB
from odirect.benchmark import Measured, Stop, Work, measure


@dataclass(slots=True)
class Setting:
    """What all works share."""

    file: Path
    file_bytes: int
    copy_source: Path
    seconds: float
    stop: Stop
    generator: numpy.random.Generator
    make_copy_source: Callable[[], None]


@dataclass(slots=True)
class Line:
    """One comparison: figures of each round, and what is wanted of them."""

    work: str
    peer: str
    figure: str
    wanted: str
    met: Callable[[float], bool]
    kind: str = "ratio"  # "ratio": ours over the peer's; "ours": ours alone; "less": ours minus the peer's
    higher_is_better: bool = True
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def add(self, ours: float, theirs: float = 0.0) -> None:
        """One round."""
        self.ours.append(ours)
        self.theirs.append(theirs)

    @property
    def value(self) -> float:
        """The median over the rounds of what is compared with the target."""
        if self.kind == "ours":
            return median(self.ours)
        pairs = zip(self.ours, self.theirs, strict=True)
        if self.kind == "less":
            return median(ours - theirs for ours, theirs in pairs)
        if self.higher_is_better:
            return median(ours / theirs for ours, theirs in pairs)
        return median(theirs / ours for ours, theirs in pairs)


S = TypeVar("S")


@dataclass(slots=True)
class Group(Generic[S]):
    """Works that are measured together. `run` makes one round; it raises `_peers.Missing` if a peer is not there."""

    name: str
    lines: list[Line]
    run: Callable[[S, int], None]
    prepare: Callable[[S], None] | None = None
    notes: set[str] = field(default_factory=set)


def _rate(measured: Measured) -> _peers.Rate:
    return _peers.Rate(
        measured.operations / measured.seconds,
        measured.bytes / measured.seconds,
        measured.cpu_ns / 1e3 / measured.operations,
    )


def _with_fio(
    name: str, engine: str, rw: str, block_bytes: int, depth: int, lines: list[Line], *, huge: bool = False
) -> Group[Setting]:
    """odirect by `engine` and fio, in turns; who begins changes from round to round."""

    def run(setting: Setting, number: int) -> None:
        work = Work(
            path=str(setting.file),
            rw=rw,
            engine=engine,
            block_bytes=block_bytes,
            depth=depth,
            start=0,
            blocks=setting.file_bytes // block_bytes,
            number=None,
            runtime_ns=round(setting.seconds * 1e9),
            seed=number,
            huge=huge,
        )
        sides: dict[str, _peers.Rate] = {}
        for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            if side == "theirs":
                sides[side] = _peers.fio(setting.file, rw, block_bytes, depth, setting.file_bytes, setting.seconds)
                continue
            measured = measure([work], setting.stop)
            if measured.not_direct:
                group.notes.add(f"{measured.not_direct} requests of {name} did not go direct")
            if setting.stop.asked:
                raise KeyboardInterrupt
            sides[side] = _rate(measured)
        ours, theirs = sides["ours"], sides["theirs"]
        for line in group.lines:
            if line.figure == "CPU µs/op":
                line.add(ours.cpu_us_per_op, theirs.cpu_us_per_op)
            elif line.figure == "MiB/s":
                line.add(ours.bytes_per_second / MIB, theirs.bytes_per_second / MIB)
            else:
                line.add(ours.iops, theirs.iops)

    group = Group(name, lines, run)
    return group


def _at_random(name: str, engine: str, depth: int, least: float, most_cpu_us: float | None) -> Group[Setting]:
    """4 KiB at random; `most_cpu_us` is a bound of its own, None: no more CPU than fio."""
    words = {"batch": "read_batch", "submit": "submit", "asyncio": "odirect.aio"}[engine]
    work = f"4 KiB random read, {words}, depth {depth}"
    cpu = Line(work, "fio", "CPU µs/op", "≤ fio", lambda value: value >= 1.0, higher_is_better=False)
    if most_cpu_us is not None:
        cpu = Line(
            work, "fio", "CPU µs/op", f"≤ {most_cpu_us:g} µs", lambda value: value <= most_cpu_us, "ours",
            higher_is_better=False,
        )  # fmt: skip
    lines = [Line(work, "fio", "IOPS", f"≥ {least:.2f} ×", lambda value: value >= least), cpu]
    return _with_fio(name, engine, "randread", 4 * KIB, depth, lines)


def _in_sequence(name: str, engine: str, rw: str, *, huge: bool = False) -> Group[Setting]:
    """1 MiB after 1 MiB; `huge` gives odirect's memory huge pages, which fio's has not."""
    words = {"batch": f"{rw}_batch", "submit": "submit"}[engine]
    work = f"1 MiB sequential {rw}, {words}, depth 8{', huge pages' if huge else ''}"
    lines = [
        Line(work, "fio", "MiB/s", "" if huge else "≥ 0.98 ×", lambda value: value >= 0.98),
        Line(work, "fio", "CPU µs/op", "", lambda _: True, higher_is_better=False),
    ]
    return _with_fio(name, engine, rw, MIB, 8, lines, huge=huge)


def _one_at_a_time() -> Group[Setting]:
    work = "4 KiB random read, one preadinto at a time"
    lines = [
        Line(work, "os.preadv", "IOPS", "≥ 0.95 ×", lambda value: value >= 0.95),
        Line(work, "os.preadv", "CPU µs/op", "", lambda _: True, higher_is_better=False),
    ]

    def run(setting: Setting, number: int) -> None:
        bare, ours = _peers.bare_and_ours(setting.file, setting.file_bytes, setting.seconds, setting.generator)
        lines[0].add(ours.iops, bare.iops)
        lines[1].add(ours.cpu_us_per_op, bare.cpu_us_per_op)

    return Group("single", lines, run)


_COMMAND = "import sys; from odirect.cli.main import main; sys.exit(main())"


def _copy() -> Group[Setting]:
    work = "copy of a file, durable at the end"
    lines = [
        Line(work, "cp; sync", "seconds", "> 1 ×", lambda value: value > 1, higher_is_better=False),
        Line(work, "dd direct", "seconds", "> 1 ×", lambda value: value > 1, higher_is_better=False),
        Line(work, "cp; sync", "CPU seconds", "", lambda _: True, higher_is_better=False),
        Line(work, "cp; sync", "page cache, MiB more", "none", lambda value: value <= 0, "ours"),
    ]

    def run(setting: Setting, number: int) -> None:
        source, target = setting.copy_source, setting.copy_source.with_name("target")
        ways = {
            "ours": [[sys.executable, "-c", _COMMAND, "cp", "--sync", str(source), str(target)]],
            "cp": [["cp", str(source), str(target)], ["sync", "-f", str(target)]],
            "dd": [
                ["dd", f"if={source}", f"of={target}", "bs=1M", "iflag=direct", "oflag=direct", "conv=fsync"],
            ],
        }
        names = list(ways)
        turn = number % len(names)
        spent = {}
        try:
            for name in names[turn:] + names[:turn]:
                spent[name] = _peers.copying(ways[name], source, target)
        finally:
            target.unlink(missing_ok=True)
        ours, copied, dumped = spent["ours"], spent["cp"], spent["dd"]
        lines[0].add(ours.seconds, copied.seconds)
        lines[1].add(ours.seconds, dumped.seconds)
        lines[2].add(ours.cpu_seconds, copied.cpu_seconds)
        if ours.cached_bytes_more is not None and copied.cached_bytes_more is not None:
            lines[3].add(ours.cached_bytes_more / MIB, copied.cached_bytes_more / MIB)

    return Group("copy", lines, run, prepare=lambda setting: setting.make_copy_source())


def _import() -> Group[Setting]:
    lines = [
        Line(
            "import odirect", "bare Python", "ms", "≤ 60 ms more", lambda value: value <= 60, "less",
            higher_is_better=False,
        ),
        Line(
            "import odirect; odirect.open", "bare Python", "ms", "", lambda _: True, "less", higher_is_better=False
        ),
    ]  # fmt: skip

    def run(setting: Setting, number: int) -> None:
        for _ in range(5):
            bare = _peers.started(sys.executable, "pass") * 1e3
            lines[0].add(_peers.started(sys.executable, "import odirect") * 1e3, bare)
            lines[1].add(_peers.started(sys.executable, "import odirect; odirect.open") * 1e3, bare)

    return Group("import", lines, run)


def all_groups() -> list[Group[Setting]]:
    """Everything that there is to measure, by name."""
    return [
        _at_random("batch32", "batch", 32, 1.0, None),
        _at_random("batch128", "batch", 128, 1.0, None),
        _at_random("submit32", "submit", 32, 0.85, 8.0),
        _at_random("asyncio32", "asyncio", 32, 0.85, 8.0),
        _one_at_a_time(),
        _in_sequence("read8", "submit", "read"),
        _in_sequence("readbatch8", "batch", "read"),
        _in_sequence("write8", "submit", "write"),
        _in_sequence("writebatch8", "batch", "write"),
        _in_sequence("readhuge8", "submit", "read", huge=True),
        _in_sequence("writehuge8", "submit", "write", huge=True),
        _copy(),
        _import(),
    ]
