"""A trace for other programs: as JSON lines, and for chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence

from odirect.base.trace import Event, Tracer

#: What lasts: the kind that begins it, the field with its number, and the kind that ends it.
SPANS = {"bio": ("bio", "bio_end"), "wait": ("wait", "wait_end")}
_ENDS = {ending: field for field, ending in SPANS.values()}


def json_lines(tracer: Tracer) -> Iterator[str]:
    """A line for each event, and, if some found no room, a last one that says how many.

    A line is an object with `request`, `kind`, `time_ns` and the fields of its kind (`docs/trace.md`).
    """
    for number, kind, time_ns, fields in tracer.events:
        yield _json({"request": number, "kind": kind, "time_ns": time_ns, **_exact(fields)}) + "\n"
    if tracer.dropped:
        yield _json({"request": 0, "kind": "dropped", "events": tracer.dropped, "limit": tracer.limit}) + "\n"


def perfetto(tracer: Tracer, title: str) -> Iterator[str]:
    """The pieces of one JSON object with `traceEvents`, in microseconds from the first event.

    Every request, bio and wait is a pair of "B" and "E" on a row of its own, so that no two on a row
    overlap; rows are used again. What had not ended when the trace stopped ends there, `unfinished`.
    Source: the Trace Event Format, which Chrome and Perfetto read.
    """
    yield '{"displayTimeUnit": "ns", "otherData": ' + _json({"dropped events": tracer.dropped}) + ', "traceEvents": [\n'
    yield _json({"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": title}})
    for event in _Rows().drawn(tracer.events):
        yield ",\n" + _json(event)
    yield "\n]}\n"


class _Rows:
    """Where each request is drawn, and its bios and waits below it."""

    def __init__(self) -> None:
        # A request's row holds the rows of its bios and waits, which a later request there uses again.
        self._tids: dict[tuple[int, int], int] = {}
        self._free_rows: list[int] = []
        self._used_rows = 0
        self._row_of: dict[int, int] = {}
        self._below: dict[int, list[int]] = {}
        self._open: dict[tuple[str, int], tuple[int, int]] = {}

    def drawn(self, events: Sequence[Event]) -> Iterator[dict[str, object]]:
        """The trace events; each row is named before it is used."""
        start = last = events[0].time_ns if events else 0
        for event in events:
            last = event.time_ns
            for drawn in self._one(event):
                yield {**drawn, "pid": 1, "ts": (last - start) / 1000}
        # What is below a request ends before it does.
        for key in sorted(self._open, key=lambda key: key[0] == "request"):
            row, below = self._open[key]
            ending = {"ph": "E", "tid": self._tids[row, below], "args": {"unfinished": True}}
            yield {**ending, "pid": 1, "ts": (last - start) / 1000}

    def _one(self, event: Event) -> Iterator[dict[str, object]]:
        number, kind, _, fields = event
        if kind == "request":
            row = self._free_rows.pop() if self._free_rows else self._new_row()
            self._row_of[number] = row
            name = f"{fields['op']} {fields['length']} at {fields['offset']}"
            yield from self._begun(("request", number), row, 0, name, {"request": number, **_exact(fields)})
        elif kind == "end":
            yield self._ended(("request", number), fields)
            self._free_rows.append(self._row_of[number])
            self._free_rows.sort(reverse=True)
        elif kind in SPANS:
            field = SPANS[kind][0]
            row = self._row_of[number]
            taken = self._below.setdefault(row, [])
            below = next((place for place, user in enumerate(taken) if not user), len(taken))
            taken[below : below + 1] = [number]
            name = str(fields.get("what") or f"{fields['op']} bio")
            yield from self._begun((field, _number(fields[field])), row, below + 1, name, {"request": number, **fields})
        elif kind in _ENDS:
            key = (_ENDS[kind], _number(fields[_ENDS[kind]]))
            if key in self._open:
                row, below = self._open[key]
                self._below[row][below - 1] = 0
                yield self._ended(key, fields)
        else:
            tid = self._tids[self._row_of[number], 0]
            yield {"ph": "i", "s": "t", "tid": tid, "name": kind, "args": {"request": number, **fields}}

    def _new_row(self) -> int:
        self._used_rows += 1
        return self._used_rows

    def _begun(
        self, key: tuple[str, int], row: int, below: int, name: str, fields: dict[str, object]
    ) -> Iterator[dict[str, object]]:
        tid = self._tids.get((row, below))
        if tid is None:
            tid = self._tids[row, below] = len(self._tids) + 1
            words = f"requests {row}" if not below else f"requests {row}: bios and waits {below}"
            yield {"ph": "M", "name": "thread_name", "tid": tid, "args": {"name": words}}
            yield {"ph": "M", "name": "thread_sort_index", "tid": tid, "args": {"sort_index": row * 1000 + below}}
        self._open[key] = (row, below)
        yield {"ph": "B", "tid": tid, "name": name, "cat": key[0], "args": fields}

    def _ended(self, key: tuple[str, int], fields: dict[str, object]) -> dict[str, object]:
        return {"ph": "E", "tid": self._tids[self._open.pop(key)], "args": fields}


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no number of a bio or wait")
    return value


def _exact(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields, and beside names that are no UTF-8 their bytes in hexadecimal."""
    found = dict(fields)
    for key, value in fields.items():
        if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
            found[f"{key}_hex"] = os.fsencode(value).hex()
    return found


def _json(value: object) -> str:
    """In one line; names that are not UTF-8 are replaced."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
