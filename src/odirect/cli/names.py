"""Names, modes and times of files as `ls` shows them."""

from __future__ import annotations

import itertools
import os
import re
import stat
import time
from collections.abc import Sequence
from typing import Any

from odirect.fs.base import Attributes

# Half a year: what is older is shown with its year instead of its hour, as `ls` does.
_RECENT_SECONDS = 15778476
_SAFE = re.compile(r"[A-Za-z0-9_@%+=:,./-][A-Za-z0-9_@%+=:,./~#-]*")
_SECOND_NS = 1_000_000_000
_ESCAPES = {"\a": "\\a", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\v": "\\v", "\f": "\\f", "\r": "\\r", "\\": "\\\\"}


def for_shell(name: bytes) -> str:
    """A name as a shell would take it: as it is if it is plain, else quoted, what cannot be shown by its octal code.

    As GNU `ls` does on a terminal: `it's`, `'a b'`, `'a'$'\\377''b'`.
    """
    text = os.fsdecode(name)
    if _SAFE.fullmatch(text):
        return text
    if all(map(_is_shown, text)):
        if "'" in text and not any(sign in text for sign in '"$`\\!'):
            return f'"{text}"'
        return "'" + text.replace("'", "'\\''") + "'"
    parts = []
    for shown, run in itertools.groupby(text, _is_shown):
        piece = "".join(run)
        parts.append("'" + piece.replace("'", "'\\''") + "'" if shown else f"$'{''.join(map(_coded, piece))}'")
    whole = "".join(parts)
    return f"''{whole}" if whole.startswith("$") else whole


def escaped(name: bytes) -> str:
    """A name with what cannot be shown as C has it (`\\n`, `\\377`), and backslashes and spaces so: `ls -b`."""
    return "".join(
        "\\ " if sign == " " else _coded(sign) if sign == "\\" or not _is_shown(sign) else sign
        for sign in os.fsdecode(name)
    )


def _is_shown(sign: str) -> bool:
    return sign.isprintable() and not "\ud800" <= sign <= "\udfff"


def _coded(sign: str) -> str:
    if sign in _ESCAPES:
        return _ESCAPES[sign]
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(sign))


def long_row(attributes: Attributes, name: str, target: str | None, now_s: float) -> list[str]:
    """The fields of a line of `ls -ln`: mode, links, owner, group, size or device numbers, time, name -> target."""
    if stat.S_ISCHR(attributes.mode) or stat.S_ISBLK(attributes.mode):
        number = attributes.device_number
        size = f"{os.major(number)}, {os.minor(number)}"
    else:
        size = str(attributes.size)
    return [
        stat.filemode(attributes.mode),
        str(attributes.links),
        str(attributes.uid),
        str(attributes.gid),
        size,
        short_time(attributes.mtime_ns, now_s),
        name if target is None else f"{name} -> {target}",
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of `long_row`s, figures flush right, one space between the fields."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        fields = [row[0], *(field.rjust(wide) for field, wide in zip(row[1:5], widths[1:5], strict=True)), *row[5:]]
        lines.append(" ".join(fields))
    return lines


def short_time(time_ns: int, now_s: float) -> str:
    """ "Nov 21 16:22", or "Nov 21  2019" for what is older than half a year, or still to come; local time."""
    seconds = time_ns // _SECOND_NS
    there = time.localtime(seconds)
    day = f"{time.strftime('%b', there)} {there.tm_mday:2d}"
    if now_s - _RECENT_SECONDS < seconds <= now_s:
        return f"{day} {there.tm_hour:02d}:{there.tm_min:02d}"
    return f"{day}  {there.tm_year}"


def full_time(time_ns: int) -> str:
    """ "2026-11-21 16:22:03.000000042 +0000", local time."""
    seconds, rest = divmod(time_ns, _SECOND_NS)
    there = time.localtime(seconds)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', there)}.{rest:09d} {time.strftime('%z', there)}"


def attributes_as_json(attributes: Attributes) -> dict[str, Any]:
    """All that an inode says, ready for JSON; times in nanoseconds since 1970."""
    found: dict[str, Any] = {
        "kind": attributes.kind.value,
        "inode": attributes.inode,
        "mode": stat.filemode(attributes.mode),
        "permissions": f"{stat.S_IMODE(attributes.mode):04o}",
        "links": attributes.links,
        "uid": attributes.uid,
        "gid": attributes.gid,
        "size": attributes.size,
        "blocks512": attributes.blocks512,
        "atime_ns": attributes.atime_ns,
        "mtime_ns": attributes.mtime_ns,
        "ctime_ns": attributes.ctime_ns,
    }
    if stat.S_ISCHR(attributes.mode) or stat.S_ISBLK(attributes.mode):
        number = attributes.device_number
        found["device"] = {"major": os.major(number), "minor": os.minor(number)}
    return found


def in_columns(names: Sequence[str], width: int) -> list[str]:
    """Names below one another in as many columns as fit, sorted downwards, as `ls` has them on a terminal."""
    for rows in range(1, len(names) + 1):
        columns = [names[start : start + rows] for start in range(0, len(names), rows)]
        widths = [max(map(len, column)) for column in columns]
        if rows == len(names) or sum(widths) + 2 * (len(widths) - 1) <= width:
            return [
                "  ".join(
                    column[row].ljust(wide) for column, wide in zip(columns, widths, strict=True) if row < len(column)
                ).rstrip()
                for row in range(rows)
            ]
    return []
