"""`odirect bench`: how fast a file or device is, and whether it really went direct."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from odirect.base.errors import NotDirectError, ODirectError, UnsupportedError, from_errno
from odirect.base.units import KIB, MIB, format_bytes
from odirect.cli import common, places, volume_bench
from odirect.cli.places import VolumePlace

if TYPE_CHECKING:
    from odirect.benchmark import Cache, Measured, Work
    from odirect.dio.outcome import Outcome, Tally
    from odirect.files import File

_KINDS = ("read", "write", "randread", "randwrite")
_ENGINES = ("auto", "batch", "submit", "asyncio", "sync")
_INTERRUPTED = 130
# Up to this block size the engine "auto" is the native loop; above it Python's share is small.
_BATCH_BELOW = 64 * KIB
_RUNTIME_SECONDS = 5.0


@click.command("bench")
@common.path_argument(name="file", metavar="FILE")
@click.option("--rw", type=click.Choice(_KINDS), default="read", show_default=True, help="What to do.")
@click.option(
    "--bs",
    type=common.Size(least=1),
    metavar="SIZE",
    help="Bytes of one request.  [default: 4k at random, 1M in sequence]",
)
@click.option(
    "--iodepth",
    type=click.IntRange(1, 32768),
    metavar="N",
    help="Requests in flight.  [default: 32 at random, 8 in sequence]",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    metavar="N",
    default=1,
    show_default=True,
    help="Processes that do this at once; their figures are added up. In sequence, each has its own part of the range.",
)
@click.option("--runtime", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="How long to go on.")
@click.option("--number", type=click.IntRange(1), metavar="N", help="Requests that each job makes.")
@click.option(
    "--size",
    type=common.Size(least=1),
    metavar="SIZE",
    help="Length of the range that is used; a file that does not exist is made so long.  [default: up to the end]",
)
@click.option(
    "--offset", type=common.Size(), metavar="SIZE", default=0, show_default=True, help="Where that range starts."
)
@click.option(
    "--engine",
    type=click.Choice(_ENGINES),
    default="auto",
    show_default=True,
    help="Way in: read_batch and write_batch, submit, odirect.aio, or one preadinto or pwrite at a time.",
)
@click.option(
    "--ring",
    type=click.Choice(("auto", "io_uring", "threads")),
    help="Back end.  [default: what ODIRECT_RING says, else auto]",
)
@click.option(
    "--access",
    type=click.Choice(("auto", "strict")),
    default="auto",
    show_default=True,
    help="strict: fail where a request could not go direct as it is.",
)
@click.option("--dsync", is_flag=True, help="Every write is durable before it counts.")
@click.option("--end-sync", is_flag=True, help="Sync at the end, within the time that is measured.")
@click.option("--hipri", is_flag=True, help="Poll the device for completions, where it can be polled.")
@click.option("--huge-pages", is_flag=True, help="Have the memory in huge pages, which a device takes faster.")
@click.option(
    "--seed", type=click.IntRange(0), metavar="N", help="For the offsets and the data.  [default: a new one, printed]"
)
@click.option("--require-direct", is_flag=True, help="Exit with status 4 if any request did not go direct.")
@click.option("--compare", is_flag=True, help="Also through the page cache, cold and warm (engine batch or sync).")
@click.option("--overwrite-data", is_flag=True, help="Write although the file has data, or is a block device.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    file: str,
    rw: str,
    bs: int | None,
    iodepth: int | None,
    jobs: int,
    runtime: float | None,
    number: int | None,
    size: int | None,
    offset: int,
    engine: str,
    ring: str | None,
    access: str,
    dsync: bool,
    end_sync: bool,
    hipri: bool,
    huge_pages: bool,
    seed: int | None,
    require_direct: bool,
    compare: bool,
    overwrite_data: bool,
    as_json: bool,
) -> None:
    """Measure reads or writes of FILE, a file or block device, past the page cache.

    IMAGE:/PATH is a file in the volume that an image file or block device holds; --compare goes through
    a cache of this program then.

    It goes on for --runtime seconds, or until each job has made --number requests, whichever comes
    first. With neither, it goes over --size once, or for five seconds without --size.

    What was measured is printed with the outcome of every request: one that was not direct says
    why. Ctrl-C ends the measuring, and what there is by then is printed.

    \b
    Examples:
      odirect bench data.bin --rw randread --bs 4k --iodepth 32 --require-direct
      odirect bench data.bin --compare
      odirect bench new.bin --rw write --size 1G --end-sync
      odirect bench disk.img:/data.bin --rw randread --iodepth 64
    """
    place = places.parse(file, is_there=not rw.endswith("write"))
    if size is not None and offset + size > common.MOST_BYTES:
        raise click.UsageError(
            f"--offset and --size end past {common.exact(common.MOST_BYTES)}, which is more than a file can have"
        )
    if place is not None:
        volume_bench.check_options(place, engine, jobs, writes=rw.endswith("write"))
    is_random = rw.startswith("rand")
    bs = bs or (4 * KIB if is_random else MIB)
    if iodepth is None:
        iodepth = 1 if engine == "sync" else 32 if is_random else 8
    engine = _chosen_engine(engine, iodepth, bs, compare=compare)
    with _ring_forced(ring), _naming(file, place):
        # Only now: what is loaded may look at the environment.
        from odirect.benchmark import Cache, Stop, Work, drop_cached, measure, ring_in_use

        if place is None:
            usable = _prepared(file, rw, size, offset, overwrite=overwrite_data)
        else:
            usable = volume_bench.prepared(place, rw, size, offset, overwrite=overwrite_data)
        blocks = usable // bs
        each = blocks if is_random else blocks // jobs
        if not each:
            raise click.UsageError(
                f"{jobs} jobs with requests of {bs} bytes do not fit in the {usable} bytes that there are", ctx
            )
        if runtime is None and number is None:
            if size is None:
                runtime = _RUNTIME_SECONDS
            else:
                number = max(1, blocks // jobs)
        if seed is None:
            import numpy

            seed = int(numpy.random.SeedSequence().generate_state(1)[0])
        works = [
            Work(
                path=file if place is None else os.fsdecode(place.path),
                image="" if place is None else place.image,
                rw=rw,
                engine=engine,
                block_bytes=bs,
                depth=iodepth,
                start=offset if is_random else offset + job * each * bs,
                blocks=each,
                number=number,
                runtime_ns=None if runtime is None else round(runtime * 1e9),
                seed=seed,
                job=job,
                access=access,
                dsync=dsync,
                hipri=hipri,
                huge=huge_pages,
                end_sync=end_sync or compare,
            )
            for job in range(jobs)
        ]
        stop = Stop()
        measured: dict[Cache, Measured] = {}
        kind, features = ring_in_use(iodepth)
        for cache in Cache if compare else (Cache.DIRECT,):
            if compare and place is None:
                drop_cached(file)
            measured[cache] = measure(_for_cache(works, cache), stop)
            if stop.asked:
                break
    notes = _notes(file, rw) if place is None else volume_bench.notes(place, rw)
    direct = measured[Cache.DIRECT]
    if as_json:
        told = {
            **_figures(direct),
            "engine": engine,
            "ring": kind,
            "ring_features": features._asdict(),
            **common.told_path(file, "file"),
            "rw": rw,
            "bs": bs,
            "iodepth": iodepth,
            "jobs": jobs,
            "offset": offset,
            "size": usable,
            "seed": seed,
            "interrupted": stop.asked,
            "notes": notes,
        }
        if compare:
            told["compare"] = {cache.value: _figures(figures) for cache, figures in measured.items()}
        common.print_json(told)
    else:
        shown = ", ".join(name for name, has in features._asdict().items() if has)
        lines = [
            f"{rw} of {format_bytes(bs)}, {iodepth} in flight, {jobs} {'job' if jobs == 1 else 'jobs'}, "
            f"in {format_bytes(usable)} of {common.shown(file)}",
            f"engine {engine}, ring {kind}{f' ({shown})' if shown else ''}, seed {seed}",
        ]
        _print({cache.value: figures for cache, figures in measured.items()}, lines, notes)
    if stop.asked:
        click.echo("interrupted: these are the figures up to then", err=True)
        ctx.exit(_INTERRUPTED)
    if require_direct and direct.not_direct:
        ways = ", ".join(
            str(outcome) for outcome, tally in direct.outcomes.items() if tally.operations and outcome.kind != "direct"
        )
        raise NotDirectError(
            f"{direct.not_direct} of {direct.operations} requests did not go direct: {ways}", path=file
        )


def _chosen_engine(engine: str, depth: int, block_bytes: int, *, compare: bool) -> str:
    """The engine that "auto" stands for, or the one that was asked for. Raises UsageError for one that cannot be."""
    if engine == "auto":
        if depth == 1:
            return "sync"
        return "batch" if compare or block_bytes <= _BATCH_BELOW else "submit"
    if engine == "sync" and depth != 1:
        raise click.UsageError("--engine sync keeps one request in flight; use --iodepth 1, and --jobs for more")
    if compare and engine not in ("sync", "batch"):
        raise click.UsageError(f"--compare cannot go through the page cache with --engine {engine}; use batch or sync")
    return engine


@contextlib.contextmanager
def _ring_forced(ring: str | None) -> Iterator[None]:
    """Have this process, and those that it starts, use this back end."""
    if ring is None:
        yield
        return
    before = os.environ.get("ODIRECT_RING")
    os.environ["ODIRECT_RING"] = ring
    try:
        yield
    finally:
        if before is None:
            del os.environ["ODIRECT_RING"]
        else:
            os.environ["ODIRECT_RING"] = before


@contextlib.contextmanager
def _naming(file: str, place: VolumePlace | None) -> Iterator[None]:
    """Errors from inside that name no file, or a path in a volume alone, name what is measured."""
    try:
        yield
    except ODirectError as error:
        name = error.filename
        if name is None:
            error.filename = common.shown(file)
        elif place is not None and (isinstance(name, bytes) or name == os.fsdecode(place.path)):
            error.filename = str(place)
        raise


def _prepared(path: str, rw: str, size: int | None, start: int, *, overwrite: bool) -> int:
    """The bytes from `start` on that are ours to use, made where there were none.

    Raises UsageError if data would be overwritten unasked, or the range lies past the end.
    """
    from odirect.files import open as open_direct

    writes = rw.endswith("write")
    if writes:
        size = _made(path, size, start, overwrite=overwrite)
    with open_direct(path) as file:
        there = file.size - start
    if there <= 0:
        raise click.UsageError(f"{path} has {there + start} bytes; there is nothing at offset {start}")
    if size is not None and size > there:
        raise click.UsageError(f"{path} has {there + start} bytes, fewer than --offset and --size need")
    return there if size is None else size


def _made(path: str, size: int | None, start: int, *, overwrite: bool) -> int | None:
    """The size of the range to write, in a file that is there now and long enough."""
    from odirect.files import open as open_direct

    try:
        status = os.stat(path)
    except FileNotFoundError:
        if size is None:
            raise click.UsageError(f"{path} does not exist; --size says how long to make it") from None
        with open_direct(path, "x") as file:
            try:
                _grow(file, start + size)
            except BaseException:
                os.unlink(path)
                raise
        return size
    except OSError as error:
        raise from_errno(error.errno or 0, "looking at it", path) from error
    is_block = stat.S_ISBLK(status.st_mode)
    if not overwrite and (is_block or status.st_size):
        what = "is a block device" if is_block else f"holds {format_bytes(status.st_size)} of data"
        raise click.UsageError(f"{path} {what}, which would be overwritten; say --overwrite-data if you mean it")
    if stat.S_ISREG(status.st_mode):
        if size is None and not status.st_size:
            raise click.UsageError(f"{path} is empty; --size says how long to make it")
        if size is not None and start + size > status.st_size:
            with open_direct(path, "r+") as file:
                _grow(file, start + size)
    return size


def _grow(file: File, size: int) -> None:
    """Reserve space, so that the file's blocks are not looked for while it is measured."""
    try:
        file.fallocate(0, size)
    except UnsupportedError:
        file.truncate(size)


def _for_cache(works: list[Work], cache: Cache) -> list[Work]:
    import dataclasses

    return [dataclasses.replace(work, cache=cache) for work in works]


def _notes(path: str, rw: str) -> list[str]:
    """What makes the figures mean less than they seem to."""
    notes: list[str] = []
    try:
        status = os.stat(path)
    except OSError:
        return notes
    if not rw.endswith("write") and stat.S_ISREG(status.st_mode) and status.st_blocks * 512 < status.st_size:
        allocated = format_bytes(status.st_blocks * 512)
        notes.append(
            f"Only {allocated} of the file's {format_bytes(status.st_size)} are on the device: "
            "holes are read, and compressed data unpacked, without it."
        )
    return notes


def _figures(measured: Measured) -> dict[str, Any]:
    """What the JSON says of one measurement."""
    seconds, operations, latencies = measured.seconds, measured.operations, measured.latencies
    percentiles = None
    if latencies is not None and operations:
        percentiles = {f"p{percent}": latencies.percentile_ns(percent) / 1e3 for percent in (50, 90, 99)}
        percentiles["max"] = latencies.longest_ns / 1e3
    return {
        "iops": operations / seconds if seconds else 0.0,
        "bytes_per_second": measured.bytes / seconds if seconds else 0.0,
        "operations": operations,
        "bytes": measured.bytes,
        "seconds": seconds,
        "cpu_us_per_op": measured.cpu_ns / 1e3 / operations if operations else 0.0,
        "latency_us": percentiles,
        "outcomes": common.outcomes_as_json(measured.outcomes),
    }


def _print(measured: dict[str, Measured], lines: list[str], notes: list[str]) -> None:
    seen = any(figures.latencies is not None for figures in measured.values())
    percentiles = ("p50", "p90", "p99", "max") if seen else ()
    speeds = [["", "throughput", "ops/s", "CPU µs/op", *(f"{name} µs" for name in percentiles)]]
    outcomes = [["", "outcome", "operations", "bytes", "seconds"]]
    for name, figures in measured.items():
        told = _figures(figures)
        latency = told["latency_us"]
        speeds.append(
            [
                name,
                f"{format_bytes(told['bytes_per_second'])}/s",
                f"{told['iops']:,.0f}",
                f"{told['cpu_us_per_op']:.2f}",
                *(f"{latency[percentile]:,.0f}" for percentile in percentiles if latency is not None),
            ]
        )
        seconds = f"{figures.seconds:.2f}"
        for outcome, tally in _by_number(figures):
            outcomes.append([name, str(outcome), f"{tally.operations:,}", format_bytes(tally.bytes), seconds])
            name = seconds = ""
    lines += ["", *common.columns(speeds, indent="", right=range(1, 8))]
    lines += ["", *common.columns(outcomes, indent="", right=(2, 3, 4))]
    if not all(figures.latencies is not None for figures in measured.values()):
        notes = [*notes, "The engine batch does not see single requests, so there are no latencies."]
    for line in [*lines, *notes]:
        click.echo(line)


def _by_number(measured: Measured) -> list[tuple[Outcome, Tally]]:
    """The outcomes, the most frequent first."""
    return sorted(measured.outcomes.items(), key=lambda item: -item[1].operations)
