"""`odirect explain`: will it go direct, where are the bytes, and what do requests of a size cost.

What requests cost is not estimated: the engine's own code is run over a device that moves nothing
and counts, with the limits of the real one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from odirect.base.errors import UnsupportedError
from odirect.base.units import format_bytes
from odirect.block.bio import READ, WRITE, Bio
from odirect.block.buffers import BufferPool, empty
from odirect.block.cached_file import CACHED_LIMITS
from odirect.block.device import Limits
from odirect.block.fiemap import ExtentFlag, FileExtent, file_extents
from odirect.block.file_device import file_bytes
from odirect.block.limits import Alignment, describe
from odirect.cli import common, info, places
from odirect.dio.opening import Opened, open_file
from odirect.dio.outcome import Kind, Outcome, Promise, Reason
from odirect.dio.plainfile import FileState, PlainFile
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Scheduler

if TYPE_CHECKING:
    from odirect.cli import volume_explain

_SHOWN_EXTENTS = 20
_PICTURE_WIDTH = 64
_POOL_BYTES = 1 << 20


class Look(NamedTuple):
    """How one kind of piece is drawn and called."""

    sign: str
    plain: str
    colour: str
    words: str


#: By importance: a column of the picture shows the first of these that lies in it.
LOOKS = {
    "compressed": Look("▤", "Z", "magenta", "compressed or encrypted: read through the page cache"),
    "inline": Look("▣", "i", "magenta", "inline, in a metadata block: read through the page cache"),
    "delalloc": Look("◌", "d", "yellow", "not yet on the device: written out first"),
    "shared": Look("▓", "S", "cyan", "shared with another file: copied when written"),
    "unwritten": Look("▒", "u", "blue", "allocated, never written: reads as zeroes"),
    "unknown": Look("?", "?", "red", "mapped, at a place that is not told"),
    "mapped": Look("█", "#", "green", "mapped"),
    "hole": Look("·", ".", "white", "hole: reads as zeroes"),
}


class Piece(NamedTuple):
    """A run of the file of one kind; addr is None where it has no place on the device."""

    kind: str
    offset: int
    length: int
    addr: int | None


class Cost(NamedTuple):
    """What `requests` requests of one kind become: how they go, and bios for all of them."""

    outcome: Outcome
    requests: int
    bios: int


@click.command("explain")
@common.path_argument(name="file", metavar="FILE")
@click.option(
    "--bs", type=common.Size(least=1, most=64 << 20), default="1M", metavar="SIZE", help="Size of a request. [1M]"
)
@click.option("--offset", type=common.Size(), default=0, metavar="SIZE", help="Where the first request begins. [0]")
@click.option("--all", "all_extents", is_flag=True, help=f"List every extent, not just the first {_SHOWN_EXTENTS}.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: str, bs: int, offset: int, all_extents: bool, as_json: bool) -> None:
    """Say whether a file's I/O goes direct, where its bytes are, and which requests fall back and why.

    IMAGE:/PATH is a file in the volume that an image file or block device holds.
    Nothing is written. Requests are taken to follow one another from --offset to the end of the file, with
    aligned memory.

    \b
    Examples:
      odirect explain data.bin
      odirect explain data.bin --bs 4k --offset 100
      odirect explain --json /dev/sdb
      odirect explain disk.img:/var/lib/data.db --bs 8k
    """
    place = places.parse(file, is_there=True)
    found: Explanation | volume_explain.Explanation
    if place is None:
        found = explain(file, bs, offset)
    else:
        from odirect.cli import volume_explain

        found = volume_explain.explain_in_volume(place, bs, offset)
    if as_json:
        common.print_json(found.as_json())
    else:
        click.echo("\n".join(found.lines(all_extents)))


class Explanation(NamedTuple):
    """All that `explain` tells."""

    path: str
    alignment: Alignment
    size: int
    pieces: list[Piece] | None
    why_no_pieces: str
    block: int
    offset: int
    reads: list[Cost]
    writes: list[Cost]

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **self.alignment.as_dict(),
            **common.told_path(self.path),
            "size_bytes": self.size,
            "extents": None if self.pieces is None else [piece._asdict() for piece in self.pieces],
            "why_no_extents": self.why_no_pieces,
            "bytes_by_kind": bytes_by_kind(self.pieces or []),
            "request_bytes": self.block,
            "first_offset": self.offset,
            "reads": [cost_as_json(cost) for cost in self.reads],
            "writes": [cost_as_json(cost) for cost in self.writes],
        }

    def lines(self, all_extents: bool) -> list[str]:
        """As people read it."""
        alignment = self.alignment
        return report(
            f"{common.shown(self.path)}: {info.headline(alignment)}, {common.exact(self.size)}",
            alignment.support._asdict(),
            alignment.limits,
            self._extent_lines(all_extents),
            (self.block, self.offset),
            (self.reads, self.writes),
        )

    def _extent_lines(self, all_extents: bool) -> list[str]:
        pieces = self.pieces
        if pieces is None:
            return [f"Where its bytes are cannot be told: {self.why_no_pieces}."]
        return extent_lines(pieces, self.size, all_extents)


def explain(path: str, block: int, offset: int) -> Explanation:
    """Everything about the file or device at `path`. Raises what opening it raises."""
    alignment = describe(path)
    opened = open_file(path, "r")
    try:
        size = file_bytes(opened.cached_fd)
        try:
            pieces, why = list(pieces_of(file_extents(opened.cached_fd), size)), ""
        except UnsupportedError as error:
            pieces, why = None, error.message
        odd = odd_requests(pieces or [], block, offset, size)
        reads, writes = (costs(opened, alignment, op, block, offset, size, odd) for op in (READ, WRITE))
        return Explanation(path, alignment, size, pieces, why, block, offset, reads, writes)
    finally:
        opened.close()


def report(
    headline: str,
    support: Mapping[str, Any],
    limits: Limits,
    extents: Sequence[str],
    asked: tuple[int, int],
    costs: tuple[Sequence[Cost], Sequence[Cost]],
) -> list[str]:
    """An explanation as people read it. asked: bytes of a request, and where the first begins; costs: reads, writes."""
    reads, writes = costs
    names = ["read_align", "write_align", "memory_align"]
    return [
        headline,
        "",
        *common.columns(info.support_lines(support)),
        "",
        "Direct transfers must be multiples of:",
        *common.columns(info.figure_rows(limits, limits.sources, names), right=(1,)),
        "",
        *extents,
        "",
        f"In requests of {common.exact(asked[0])} from byte {asked[1]} on "
        f"({sum(cost.requests for cost in reads)} in all), with aligned memory:",
        *common.columns(
            [["", "requests", "bios", "how"], *cost_rows("reading", reads), *cost_rows("writing", writes)],
            right=(1, 2),
        ),
    ]


def extent_lines(pieces: Sequence[Piece], size: int, all_extents: bool) -> list[str]:
    """A picture of the file, and its extents."""
    if not pieces:
        return ["It is empty."]
    extents = [piece for piece in pieces if piece.kind != "hole"]
    lines = [f"{len(extents)} extent{'s' * (len(extents) != 1)}:", "", *picture(pieces, size), ""]
    shown = extents if all_extents else extents[:_SHOWN_EXTENTS]
    rows = [["offset", "length", "on the device at", "kind"]]
    for piece in shown:
        rows.append([str(piece.offset), str(piece.length), "-" if piece.addr is None else str(piece.addr), piece.kind])
    if shown:
        lines += common.columns(rows, right=(0, 1, 2))
    if len(extents) > len(shown):
        lines.append(f"  ... and {len(extents) - len(shown)} more (--all shows them)")
    return lines


# --- where the bytes are -------------------------------------------------------------------------


def pieces_of(extents: Sequence[FileExtent], size: int) -> Iterator[Piece]:
    """The extents and the holes between them, in order, cut at the end of the file."""
    done = 0
    for extent in extents:
        start, end = extent.offset, min(extent.end, size)
        if start >= size:
            break
        if start > done:
            yield Piece("hole", done, start - done, None)
        kind = kind_of(extent.flags)
        placeless = extent.flags & (ExtentFlag.UNKNOWN | ExtentFlag.DELALLOC | ExtentFlag.DATA_INLINE)
        yield Piece(kind, start, end - start, None if placeless else extent.addr)
        done = end
    if done < size:
        yield Piece("hole", done, size - done, None)


def kind_of(flags: ExtentFlag) -> str:
    """What an extent is called; one that is several things by what decides about direct I/O."""
    for kind, bits in (
        ("inline", ExtentFlag.DATA_INLINE | ExtentFlag.DATA_TAIL),
        ("compressed", ExtentFlag.ENCODED | ExtentFlag.DATA_ENCRYPTED),
        ("delalloc", ExtentFlag.DELALLOC),
        ("unwritten", ExtentFlag.UNWRITTEN),
        ("shared", ExtentFlag.SHARED),
        ("unknown", ExtentFlag.UNKNOWN),
    ):
        if flags & bits:
            return kind
    return "mapped"


def picture(pieces: Sequence[Piece], size: int, *, width: int = _PICTURE_WIDTH, signs: bool | None = None) -> list[str]:
    """A bar of the whole file, a scale below it, and what its signs mean, with the bytes of each.

    signs: whether the terminal can show more than ASCII (default: as its encoding says).
    """
    pretty = _can_show_signs() if signs is None else signs
    order = list(LOOKS)
    bar = ["hole"] * width
    for piece in pieces:
        first = piece.offset * width // size
        last = max(first, -(-(piece.offset + piece.length) * width // size) - 1)
        for column in range(first, min(last, width - 1) + 1):
            bar[column] = min(bar[column], piece.kind, key=order.index)
    drawn = "".join(
        click.style(_sign(kind, pretty) * len(list(run)), fg=LOOKS[kind].colour) for kind, run in itertools.groupby(bar)
    )
    edge = "▕▏" if pretty else "||"
    scale = f"{'0':<{width // 2}}{format_bytes(size):>{width - width // 2}}"
    totals = bytes_by_kind(pieces)
    legend = [
        [_sign(kind, pretty), LOOKS[kind].words, common.exact(totals[kind])] for kind in order[::-1] if kind in totals
    ]
    return [f"  {edge[0]}{drawn}{edge[1]}", f"   {scale}", *common.columns(legend)]


def _sign(kind: str, pretty: bool) -> str:
    return LOOKS[kind].sign if pretty else LOOKS[kind].plain


def _can_show_signs() -> bool:
    import sys

    try:
        "".join(look.sign for look in LOOKS.values()).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def bytes_by_kind(pieces: Sequence[Piece]) -> dict[str, int]:
    """Bytes by the kind of piece that they are in."""
    totals: dict[str, int] = {}
    for piece in pieces:
        totals[piece.kind] = totals.get(piece.kind, 0) + piece.length
    return totals


# --- what requests cost --------------------------------------------------------------------------


class _Counter:
    """A device that moves nothing, and counts the bios that it is given."""

    def __init__(self, limits: Limits, size: int) -> None:
        self.limits = limits
        self.size_bytes = size
        self.bios = 0
        self._taken: list[Bio] = []

    @property
    def in_flight(self) -> int:
        return len(self._taken)

    def submit(self, bio: Bio) -> None:
        bio.done_bytes = bio.length if bio.op == WRITE else max(0, min(bio.length, self.size_bytes - bio.addr))
        self.bios += 1
        self._taken.append(bio)

    def commit(self) -> None:
        pass

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        taken, self._taken = self._taken, []
        return taken

    def wakeup_fd(self) -> int | None:
        return None

    def close(self) -> None:
        pass


class OddRun(NamedTuple):
    """Requests number `first` to `last` - 1, which touch what cannot be read direct, and why."""

    first: int
    last: int
    reason: Reason

    def among(self, turn: int, cycle: int) -> int:
        """How many of their numbers are `turn` modulo `cycle`."""
        return (self.last - turn + cycle - 1) // cycle - (self.first - turn + cycle - 1) // cycle


def odd_requests(pieces: Sequence[Piece], block: int, offset: int, size: int) -> list[OddRun]:
    """The requests that touch what cannot be read direct, none of them twice."""
    reasons = {"compressed": Reason.ENCODED, "inline": Reason.INLINE}
    found: list[OddRun] = []
    for piece in pieces:
        reason = reasons.get(piece.kind)
        end = min(piece.offset + piece.length, size)
        if reason is not None and end > offset:
            first = max(0, piece.offset - offset) // block
            if found:
                first = max(first, found[-1].last)
            last = -(-(end - offset) // block)
            if first < last:
                found.append(OddRun(first, last, reason))
    return found


def costs(
    opened: Opened, alignment: Alignment, op: int, block: int, offset: int, size: int, odd: list[OddRun]
) -> list[Cost]:
    """What the requests from `offset` to the end of the file become, the most frequent kind first.

    Whole requests whose offsets lie alike in their blocks go alike, so that one of each is tried.
    """
    whole, rest = divmod(max(0, size - offset), block)
    limits = alignment.limits
    unit = max(limits.read_align, limits.write_align)
    cycle = unit // math.gcd(block, unit)
    found: dict[Outcome, list[int]] = {}

    def add(cost: Cost) -> None:
        tally = found.setdefault(cost.outcome, [0, 0])
        tally[0] += cost.requests
        tally[1] += cost.bios

    memory = empty(block)
    for turn in range(min(cycle, whole)):
        count = (whole - turn + cycle - 1) // cycle
        cost = _try(opened, alignment, op, offset + turn * block, memory, size)
        for run in odd if op == READ and cost.outcome.kind is not Kind.BUFFERED else ():
            strange = run._replace(last=min(run.last, whole)).among(turn, cycle) if run.first < whole else 0
            if strange:
                add(Cost(Outcome(Kind.BUFFERED, run.reason), strange, strange * cost.bios))
                count -= strange
        if count:
            add(Cost(cost.outcome, count, count * cost.bios))
    if rest:
        cost = _try(opened, alignment, op, offset + whole * block, memory[: rest if op == WRITE else block], size)
        reason = next((run.reason for run in odd if run.first <= whole < run.last), None)
        if op == READ and reason is not None and cost.outcome.kind is not Kind.BUFFERED:
            cost = Cost(Outcome(Kind.BUFFERED, reason), 1, cost.bios)
        add(cost)
    made = [Cost(outcome, requests, bios) for outcome, (requests, bios) in found.items()]
    return sorted(made, key=lambda cost: -cost.requests)


def _try(opened: Opened, alignment: Alignment, op: int, offset: int, memory: memoryview, size: int) -> Cost:
    """What one request becomes, by running it over devices that only count."""
    limits, real = alignment.limits, opened.state
    state = FileState(limits, real.path, real.is_block, dict(real.refused), dict(real.cached))
    if opened.direct_fd >= 0 and not alignment.support.writes:
        state.cached[WRITE] = Reason.CACHED_BY_FS
    direct, cached = _Counter(limits, size), _Counter(CACHED_LIMITS, size)
    scheduler = Scheduler()
    scheduler.add_device(direct)
    scheduler.add_device(cached)
    plain = PlainFile(state, direct if opened.direct_fd >= 0 else None, cached, BufferPool(_POOL_BYTES, 8))
    call = plain.read if op == READ else plain.write
    moved = SyncDriver(scheduler).run(call(offset, [memory], len(memory)))
    outcome = moved.outcome._replace(promise=Promise.NONE)
    return Cost(outcome, 1, direct.bios + cached.bios)


def cost_rows(verb: str, found: Sequence[Cost]) -> list[list[str]]:
    """The fields of the table of costs."""
    rows = []
    for number, cost in enumerate(found):
        rows.append(["" if number else verb, str(cost.requests), str(cost.bios), str(cost.outcome)])
    return rows


def cost_as_json(cost: Cost) -> dict[str, object]:
    """Ready for JSON."""
    return {
        "kind": cost.outcome.kind.value,
        "reason": cost.outcome.reason.value,
        "requests": cost.requests,
        "bios": cost.bios,
    }
