"""`odirect trace`: run another verb, and show what each of its requests did, and when."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

import click

from odirect.base.errors import ODirectError, from_errno
from odirect.base.trace import DEFAULT_LIMIT, Tracer
from odirect.base.units import format_bytes
from odirect.cli import common

if TYPE_CHECKING:
    from rich.text import Text

    from odirect.base.trace import Event

_SHOWN = 20
_LEAST_WIDTH = 16
_UNFINISHED = "unfinished"

#: How a column of the timeline is drawn, by importance: sign, sign in ASCII, colour, words.
LOOKS = {
    "error": ("✗", "x", "red", "failed"),
    "fallback": ("!", "!", "magenta", "left the direct way"),
    "bio": ("█", "#", "green", "a bio in flight"),
    "lock": ("▒", "L", "yellow", "waits for a lock or a buffer"),
    "mapping": ("░", "m", "cyan", "waits for a mapping"),
    "wait": ("▒", "w", "yellow", "waits for write-back or a sync"),
    "request": ("─", "-", "white", "the request"),
    "": (" ", " ", "white", ""),
}
_WAITS = {"lock": "lock", "buffer": "lock", "mapping": "mapping", "write back": "wait", "sync": "wait"}
_MARKS = {"fallback": "fallback", "refused": "fallback", "failed": "error"}


@click.command("trace", context_settings={"allow_interspersed_args": False})
@click.option("--json", "json_path", metavar="FILE", type=click.Path(path_type=str), help="Write each event as a line.")
@click.option(
    "--perfetto",
    "perfetto_path",
    metavar="FILE",
    type=click.Path(path_type=str),
    help="Write a trace for ui.perfetto.dev or chrome://tracing.",
)
@click.option(
    "--limit",
    type=click.IntRange(2),
    default=DEFAULT_LIMIT,
    metavar="N",
    help=f"Keep so many events at most; others are counted. [{DEFAULT_LIMIT}]",
)
@click.option("--first", type=click.IntRange(0), default=_SHOWN, metavar="N", help=f"Show so many requests. [{_SHOWN}]")
@click.argument("verb", metavar="VERB")
@click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(
    context: click.Context,
    json_path: str | None,
    perfetto_path: str | None,
    limit: int,
    first: int,
    verb: str,
    arguments: tuple[str, ...],
) -> None:
    """Run `odirect VERB ARGS...`, and show what each of its requests did, and when.

    The timeline goes to standard error when the verb has ended: bios as bars, waits, mappings and fallbacks
    marked, and totals; where that is no terminal, a plain table. The status is the verb's. As FILE, - is
    standard output, after what the verb writes there.
    Transfers that otherwise are one system call, or go to the ring just as they are, take the general way while
    they are traced: the times are that way's, so `odirect trace -- bench` is slower than `odirect bench`.

    \b
    Examples:
      odirect trace -- cp image.raw copy.raw
      odirect trace --perfetto cat.json -- cat --offset 1 --length 1M image.raw > /dev/null
      odirect trace --json events.jsonl --limit 1000000 -- cp --verify image.raw /mnt/backup/
    """
    from odirect.cli import main

    if verb == "trace":
        raise click.UsageError("trace cannot trace itself; name the verb that is to run")
    if verb not in main.VERBS:
        raise click.UsageError(f"{common.shown(verb)!r} is no verb; there are {', '.join(sorted(main.VERBS))}")
    if json_path == perfetto_path == common.STDIO:
        raise click.UsageError("--json and --perfetto cannot both go to standard output")
    files = [_Output(path) for path in (json_path, perfetto_path) if path is not None]
    try:
        for file in files:
            file.open()  # What cannot be written is known before anything is done.
        status, tracer = _traced(lambda: main.run([verb, *arguments]), limit)
        from odirect.base import trace_export

        pieces = [trace_export.json_lines(tracer)] if json_path is not None else []
        if perfetto_path is not None:
            pieces.append(trace_export.perfetto(tracer, f"odirect {verb}"))
        try:
            for file, text in zip(files, pieces, strict=True):
                file.write(text)
        except ODirectError as error:
            if not status:
                raise
            click.echo(f"odirect: {error}", err=True)
    finally:
        for file in files:
            file.close()
    show(tracer, first)
    context.exit(status)


def _traced(call: Callable[[], int], limit: int) -> tuple[int, Tracer]:
    """What `call` returned, and what was recorded meanwhile."""
    from odirect.base import trace
    from odirect.sched.clock import MonotonicClock

    tracer = trace.start(MonotonicClock().now_ns, limit)
    try:
        return call(), tracer
    finally:
        trace.stop()


class _Output:
    """A file that the trace is written to, or standard output; errors are ours, with its name."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: TextIO | None = None

    def open(self) -> None:
        """Make it, empty."""
        if self._path == common.STDIO:
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise from_errno(error.errno or errno.EIO, "opening it for the trace", self._path) from error
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")

    def write(self, pieces: Iterable[str]) -> None:
        """All of it, down to the kernel."""
        if self._path == common.STDIO:
            sys.stdout.buffer.writelines(piece.encode() for piece in pieces)
            sys.stdout.buffer.flush()
            return
        if self._file is None:
            raise RuntimeError("the file is not open")
        try:
            self._file.writelines(pieces)
            self._file.flush()
        except OSError as error:
            raise from_errno(error.errno or errno.EIO, "writing the trace", self._path) from error

    def close(self) -> None:
        """For good; what could not be written was told by `write`."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass


# --- requests, put together from their events --------------------------------------------------------


class Span:
    """A bio or a wait of a request: from `start_ns` to `end_ns`, which is None while it lasts."""

    def __init__(self, kind: str, start_ns: int, length: int = 0) -> None:
        self.kind = kind
        self.start_ns = start_ns
        self.end_ns: int | None = None
        self.length = length
        self.failed = False


class Request:
    """One request of a trace."""

    def __init__(self, event: Event) -> None:
        self.number = event.request
        self.fields = event.fields
        self.start_ns = event.time_ns
        self.end_ns: int | None = None
        self.transferred = 0
        self.outcome = ""
        self.error = _UNFINISHED
        self.bios: list[Span] = []
        self.waits: list[Span] = []
        self.marks: list[tuple[str, int, str]] = []

    @property
    def name(self) -> str:
        """ "read 4.0 KiB at 512"."""
        length = self.fields["length"]
        size = format_bytes(length) if isinstance(length, int) else str(length)
        return f"{self.fields['op']} {size} at {self.fields['offset']}"

    @property
    def latency_ns(self) -> int | None:
        """How long it took; None if it had not ended."""
        return None if self.end_ns is None else self.end_ns - self.start_ns

    @property
    def how(self) -> str:
        """Its outcome, or what went wrong."""
        return self.error or self.outcome


def requests_of(events: Iterable[Event]) -> list[Request]:
    """The requests of a trace, in order of their beginning."""
    found: dict[int, Request] = {}
    spans: dict[object, Span] = {}
    for event in events:
        number, kind, time_ns, fields = event
        if kind == "request":
            found[number] = Request(event)
            continue
        request = found[number]
        if kind == "end":
            request.end_ns = time_ns
            request.transferred = int(str(fields["transferred"]))
            request.outcome, request.error = str(fields["outcome"]), str(fields["error"])
        elif kind == "bio":
            span = spans["bio", fields["bio"]] = Span(str(fields["op"]), time_ns, int(str(fields["length"])))
            request.bios.append(span)
        elif kind == "wait":
            span = spans["wait", fields["wait"]] = Span(str(fields["what"]), time_ns)
            request.waits.append(span)
        elif kind in ("bio_end", "wait_end"):
            name = kind.removesuffix("_end")
            span = spans.pop((name, fields[name]))
            span.end_ns = time_ns
            span.failed = bool(fields.get("error"))
        else:
            request.marks.append((kind, time_ns, str(fields.get("reason", ""))))
    return list(found.values())


# --- the picture -------------------------------------------------------------------------------------


def show(tracer: Tracer, first: int, *, terminal: bool | None = None, width: int | None = None) -> None:
    """Print the timeline of the first requests, or a table of them, and totals, on standard error."""
    from rich.console import Console

    console = Console(stderr=True, force_terminal=terminal, width=width, highlight=False, soft_wrap=False)
    requests = requests_of(tracer.events)
    if not requests:
        console.print("trace: no request was recorded", markup=False)
        return
    shown = requests[:first]
    if shown and console.is_terminal:
        for line in timeline(shown, console.width, pretty=_can_show_signs(console.encoding)):
            console.print(line, no_wrap=True, overflow="crop", crop=True)
    elif shown:
        print("\n".join(table(shown)), file=sys.stderr)
    if len(requests) > len(shown):
        print(f"  ... and {len(requests) - len(shown)} more (--first shows more of them)", file=sys.stderr)
    print("\n".join(totals(requests, tracer)), file=sys.stderr)


def timeline(requests: Sequence[Request], width: int, *, pretty: bool) -> Iterator[Text]:
    """Lines of `width` columns: each request's name, its time across, and how long it took and how it went."""
    from rich.text import Text

    start = min(request.start_ns for request in requests)
    last = max(max(_times(request)) for request in requests)
    names = [f"{request.number} {request.name}" for request in requests]
    told = [f"{_duration(request.latency_ns)}  {request.how}" for request in requests]
    left = min(max(map(len, names)), max(8, width // 3))
    right = min(max(map(len, told)), max(8, width // 3))
    across = max(_LEAST_WIDTH, width - left - right - 4)
    used: set[str] = set()
    yield Text(f"{'':{left}}  {'0':<{across // 2}}{_duration(last - start):>{across - across // 2}}", style="dim")
    for request, name, words in zip(requests, names, told, strict=True):
        line = Text(f"{name[:left]:{left}}  ")
        cells = cells_of(request, start, max(1, last - start), across)
        used.update(cells)
        for kind, run in itertools.groupby(cells):
            sign, plain, colour, _ = LOOKS[kind]
            line.append((sign if pretty else plain) * len(list(run)), style=colour)
        line.append(f"  {words}"[: right + 2], style="red" if request.error else "")
        yield line
    legend = Text("")
    for kind, (sign, plain, colour, meaning) in LOOKS.items():
        if kind in used and meaning:
            legend.append(f"  {sign if pretty else plain} ", style=colour)
            legend.append(meaning, style="dim")
    yield legend


def cells_of(request: Request, start: int, whole: int, columns: int) -> list[str]:
    """What each column of a request's row shows: the most important of what happened within it."""
    order = list(LOOKS)
    last = max(_times(request))
    cells = [""] * columns

    def draw(kind: str, begin: int, end: int) -> None:
        low = min(columns - 1, (begin - start) * columns // whole)
        high = min(columns, max(low + 1, -(-(end - start) * columns // whole)))
        for column in range(low, high):
            cells[column] = min(cells[column], kind, key=order.index)

    draw("request", request.start_ns, last)
    for wait in request.waits:
        if wait.kind in _WAITS:  # The bios show that it waits for them.
            draw(_WAITS[wait.kind], wait.start_ns, last if wait.end_ns is None else wait.end_ns)
    for bio in request.bios:
        end = last if bio.end_ns is None else bio.end_ns
        draw("bio", bio.start_ns, end)
        if bio.failed:
            draw("error", end, end)
    for kind, time_ns, _ in request.marks:
        if kind in _MARKS:
            draw(_MARKS[kind], time_ns, time_ns)
    return cells


def table(requests: Sequence[Request]) -> list[str]:
    """The same for a file or a pipe: a line for each request."""
    start = min(request.start_ns for request in requests)
    rows = [["request", "", "from", "took", "bios", "waited", "how", "marks"]]
    for request in requests:
        rows.append(
            [
                str(request.number),
                request.name,
                _duration(request.start_ns - start),
                _duration(request.latency_ns),
                str(len(request.bios)),
                _duration(sum(_took(wait) for wait in request.waits if wait.kind in _WAITS)),
                request.how,
                ", ".join(dict.fromkeys(f"{kind} ({why})" if why else kind for kind, _, why in request.marks)),
            ]
        )
    return common.columns(rows, right=(0, 2, 3, 4, 5))


def totals(requests: Sequence[Request], tracer: Tracer) -> list[str]:
    """Requests, bytes, how they went, how long they and their bios took, and what found no room."""
    bios = [bio for request in requests for bio in request.bios]
    moved = sum(request.transferred for request in requests)
    lines = ["", f"{_counted(len(requests), 'request')}, {format_bytes(moved)}, {_counted(len(bios), 'bio')}"]
    ways: dict[str, int] = {}
    for request in requests:
        ways[request.how] = ways.get(request.how, 0) + 1
    rows = [[f"{count}", how or "-"] for how, count in sorted(ways.items(), key=lambda way: -way[1])[:10]]
    lines += common.columns(rows, right=(0,))
    rows = [["", "p50", "p90", "p99", "most"]]
    kinds: dict[str, list[int]] = {
        "requests": [request.latency_ns for request in requests if request.latency_ns is not None],
        "bios": [_took(bio) for bio in bios if bio.end_ns is not None],
    }
    for request in requests:
        for wait in request.waits:
            if wait.end_ns is not None:
                kinds.setdefault(f"waits: {wait.kind}", []).append(_took(wait))
    rows += [[name, *map(_duration, percentiles(times))] for name, times in kinds.items() if times]
    lines += common.columns(rows, right=(1, 2, 3, 4))
    if tracer.dropped:
        lines.append(f"{tracer.dropped} events found no room: the trace holds {tracer.limit} (--limit)")
    return lines


def percentiles(times: Sequence[int]) -> list[int]:
    """The smallest time that half, 90 % and 99 % of `times` do not exceed, and the longest."""
    ordered = sorted(times)
    return [ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 90, 99, 100)]


def _took(span: Span) -> int:
    return 0 if span.end_ns is None else span.end_ns - span.start_ns


def _times(request: Request) -> Iterator[int]:
    """Every time that the trace knows of a request."""
    yield request.start_ns if request.end_ns is None else request.end_ns
    for span in (*request.bios, *request.waits):
        yield span.start_ns if span.end_ns is None else span.end_ns
    for _, time_ns, _ in request.marks:
        yield time_ns


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _duration(time_ns: int | None) -> str:
    """ "12.3 µs" in a unit that suits; "-" for what has no end."""
    if time_ns is None:
        return "-"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if time_ns >= size:
            return f"{time_ns / size:.3g} {unit}" if time_ns < 1000 * size else f"{time_ns / size:.0f} {unit}"
    return f"{time_ns} ns"


def _can_show_signs(encoding: str) -> bool:
    try:
        "".join(look[0] for look in LOOKS.values()).encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
