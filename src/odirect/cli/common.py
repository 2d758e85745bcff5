"""What the verbs share: sizes as options, numbers and outcomes as people read them, progress."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from odirect.base.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from odirect.dio.outcome import Outcome, Tally

STDIO = "-"
#: Where a file's last byte can be at most: the kernel's offsets have a sign.
MOST_BYTES = (1 << 63) - 1


if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
else:
    _IntParam = click.ParamType  # not generic before click 8.4


class Size(_IntParam):
    """An option that is a number of bytes: 4096, 4k, 1M, 1.5GiB."""

    name = "size"

    def __init__(self, *, least: int = 0, most: int = MOST_BYTES) -> None:
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes, or a usage error."""
        if isinstance(value, int):
            return value
        try:
            size = parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < self._least:
            self.fail(f"{value} is less than {format_bytes(self._least)}", param, ctx)
        if size > self._most:
            self.fail(f"{value} is more than {exact(self._most)}", param, ctx)
        return size


def path_argument(
    *, nargs: int = 1, name: str = "path", metavar: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A click argument for paths; whether they exist is for the verb to find out, with our messages."""
    return click.argument(name, nargs=nargs, metavar=metavar, required=True, type=click.Path(path_type=str))


def shown(path: str) -> str:
    """A path as it can be printed: names that are not UTF-8 included."""
    return os.fsencode(path).decode("utf-8", "replace")


def told(name: bytes, key: str = "name") -> dict[str, str]:
    """A name for JSON; where it is no UTF-8, its bytes in hexadecimal are beside it."""
    try:
        return {key: name.decode()}
    except UnicodeDecodeError:
        return {key: name.decode("utf-8", "replace"), f"{key}_hex": name.hex()}


def told_path(path: str, key: str = "path") -> dict[str, str]:
    """The same for a path of this machine, or a part of the command line."""
    return told(os.fsencode(path), key)


def exact(count: int) -> str:
    """Bytes for people and for calculators: "1.0 MiB (1048576 bytes)"."""
    return f"{count} bytes" if count < 1024 else f"{format_bytes(count)} ({count} bytes)"


def rate(count: int, seconds: float) -> str:
    """Bytes a second: "1.2 GiB/s"."""
    return f"{format_bytes(count / seconds)}/s" if seconds > 0 else "at once"


def ways(*tallies: Mapping[Outcome, Tally]) -> dict[str, int]:
    """Operations by the way they went, promises left aside, the most frequent first."""
    from odirect.dio.outcome import Promise

    counts: dict[str, int] = {}
    for tally in tallies:
        for outcome, (operations, _) in tally.items():
            name = str(outcome._replace(promise=Promise.NONE))
            counts[name] = counts.get(name, 0) + operations
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def sentence_of(counts: Mapping[str, int]) -> str:
    """ "direct", or "direct 99.9%, bounced (end of file) 0.1%"."""
    total = sum(counts.values())
    if len(counts) < 2:
        return next(iter(counts), "nothing to move")
    return ", ".join(f"{name} {max(100 * count / total, 0.01):.3g}%" for name, count in counts.items())


def outcomes_as_json(*tallies: Mapping[Outcome, Tally]) -> list[dict[str, str | int]]:
    """Outcomes for JSON, those of all `tallies` together, the most frequent first; everywhere in this form."""
    counts: dict[Outcome, list[int]] = {}
    for tally in tallies:
        for outcome, (operations, number) in tally.items():
            count = counts.setdefault(outcome, [0, 0])
            count[0] += operations
            count[1] += number
    return [
        {
            "kind": outcome.kind.value,
            "reason": outcome.reason.value,
            "promise": outcome.promise.value,
            "operations": operations,
            "bytes": number,
        }
        for outcome, (operations, number) in sorted(counts.items(), key=lambda item: -item[1][0])
    ]


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print it on standard output; names that are not UTF-8 are replaced."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    click.echo(text.encode("utf-8", "replace"))


def columns(rows: Iterable[Sequence[str]], *, indent: str = "  ", right: Sequence[int] = ()) -> list[str]:
    """Lines with the rows' fields below each other; `right` names the columns that are set flush right."""
    table = [list(row) for row in rows]
    widths: dict[int, int] = {}
    for row in table:
        for number, field in enumerate(row):
            widths[number] = max(widths.get(number, 0), len(field))
    lines = []
    for row in table:
        fields = [
            field.rjust(widths[number]) if number in right else field.ljust(widths[number])
            for number, field in enumerate(row)
        ]
        lines.append((indent + "  ".join(fields)).rstrip())
    return lines


def wants_progress(asked: bool | None) -> bool:
    """Whether to show progress: as asked, else where standard error is a terminal."""
    return sys.stderr.isatty() if asked is None else asked


@contextlib.contextmanager
def progress_bar(words: str, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, to be called with (bytes done, bytes in all; 0: not known); None if not to be shown.

    Where standard error is no terminal, a line is printed for each tenth instead.
    """
    if not show:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        parts = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(escape(words), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)
    else:
        yield _Lines(words).tell


class _Lines:
    """Progress for a log: a line for each tenth, or for each doubling where the whole is not known."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._next = 0

    def tell(self, done: int, total: int) -> None:
        if total:
            tenth = 10 * done // total
            if tenth >= self._next:
                self._next = tenth + 1
                click.echo(f"{self._words}: {10 * tenth}% of {format_bytes(total)}", err=True)
        elif done >= self._next:
            self._next = max(2 * done, 64 << 20)
            click.echo(f"{self._words}: {format_bytes(done)}", err=True)
