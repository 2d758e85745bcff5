"""What each request did, and when: a recorder that costs a test for None while it is off.

A place that has something to tell does so in one line:

    if trace.active is not None:
        trace.emit(request, "left")

`request` is whatever the request was begun with: an object of the caller's (the engine's
`DirectRequest`), or the number that `begin` gave. Who has no request in the trace (it began before
the trace did, or the trace is full) says so with 0 or -1, and is not heard.

Three things last, and have two events each: a request (`request`, `end`), a bio (`bio`, `bio_end`)
and a wait (`wait`, `wait_end`). The room for the second is set aside with the first, so that a full
trace has whole requests, bios and waits only; what did not fit is counted in `dropped`. The table of
events is in `docs/trace.md`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")

#: Events that a trace holds at most, unless told otherwise: some tens of MiB.
DEFAULT_LIMIT = 100_000

# As `block.bio` numbers them, which is above this room; a test holds the two together.
OPERATIONS = ("read", "write", "flush", "discard", "zero")
FLAGS = ("fua", "preflush", "meta", "nowait", "hipri", "atomic")


class Event(NamedTuple):
    """One thing that happened. time_ns: by the clock of whoever started the trace; fields: plain JSON values."""

    request: int
    kind: str
    time_ns: int
    fields: dict[str, object]


class TracedBio(Protocol):
    """What a trace needs of a bio."""

    op: int
    addr: int
    length: int
    flags: int
    error: int
    done_bytes: int
    end: Any


class Tracer:
    """Events in the order in which they happened, at most `limit` of them. Any thread may add some."""

    def __init__(self, clock_now_ns: Callable[[], int], limit: int = DEFAULT_LIMIT) -> None:
        """Raises ValueError for a limit below 2: the shortest request has two events."""
        if limit < 2:
            raise ValueError(f"a trace of {limit} events holds no request")
        self.limit = limit
        self.dropped = 0
        self._now_ns = clock_now_ns
        self._events: list[Event] = []
        self._used = 0  # events that are there, and those that room is set aside for
        self._request_numbers, self._bio_numbers, self._wait_numbers = (itertools.count(1) for _ in range(3))
        self._requests: dict[object, int] = {}
        self._waits: dict[int, int] = {}
        # Reentrant: the collector may close a file, whose last flush is traced, in the middle of an event.
        self._lock = threading.RLock()

    @property
    def events(self) -> list[Event]:
        """All events so far, in order; their times never go back."""
        with self._lock:
            return list(self._events)

    def begin(
        self, key: object, via: str, op: int, offset: int, length: int, flags: int | str, fields: dict[str, object]
    ) -> int:
        """The number of a request that begins here, 0 if there is no room. See `begin` of this module."""
        with self._lock:
            if not self._reserve(2):
                return 0
            number = next(self._request_numbers)
            self._requests[number if key is None else key] = number
            said = flags_of(flags) if isinstance(flags, int) else flags
            told = {"op": OPERATIONS[op], "via": via, "offset": offset, "length": length, "flags": said, **fields}
            self._add(number, "request", told)
            return number

    def end(self, key: object, fields: dict[str, object]) -> None:
        """The request has ended; its key may be used again."""
        with self._lock:
            number = self._requests.pop(key, None)
            if number is not None:
                self._add(number, "end", fields)

    def emit(self, key: object, kind: str, fields: dict[str, object]) -> None:
        """Something happened to the request."""
        with self._lock:
            number = self._of(key)
            if number and self._reserve(1):
                self._add(number, kind, fields)

    def wait(self, key: object, what: str) -> int:
        """The number of a wait that begins here, 0 if there is no room or no such request."""
        with self._lock:
            number = self._of(key)
            if not number or not self._reserve(2):
                return 0
            wait = next(self._wait_numbers)
            self._waits[wait] = number
            self._add(number, "wait", {"wait": wait, "what": what})
            return wait

    def waited(self, wait: int) -> None:
        """The wait is over."""
        with self._lock:
            number = self._waits.pop(wait, None)
            if number is not None:
                self._add(number, "wait_end", {"wait": wait})

    def sent(self, key: object, bio: TracedBio) -> None:
        """The bio is about to be submitted. Its `end` is replaced by one that tells the trace first."""
        with self._lock:
            number = self._of(key)
            if not number or not self._reserve(2):
                return
            name = next(self._bio_numbers)
            told = {"bio": name, "op": OPERATIONS[bio.op], "addr": bio.addr, "length": bio.length}
            self._add(number, "bio", {**told, "flags": flags_of(bio.flags)})
            bio.end = _Watch(self, number, name, bio.end)

    def came_back(self, request: int, bio: int, error: str, done: int) -> None:
        """A bio has ended. For `_Watch`."""
        with self._lock:
            self._add(request, "bio_end", {"bio": bio, "error": error, "done": done})

    def _of(self, key: object) -> int:
        number = self._requests.get(key, 0)
        if not number and self.dropped:
            self.dropped += 1  # It had no room, or belongs to a request that had none.
        return number

    def _reserve(self, count: int) -> bool:
        if self._used + count > self.limit:
            self.dropped += 1
            return False
        self._used += count
        return True

    def _add(self, number: int, kind: str, fields: dict[str, object]) -> None:
        self._events.append(Event(number, kind, self._now_ns(), fields))


class _Watch:
    """A traced bio's `end`: tells the trace, and then whoever sent the bio."""

    __slots__ = ("_bio", "_end", "_request", "_tracer")

    def __init__(self, tracer: Tracer, request: int, bio: int, end: Callable[[Any], None] | None) -> None:
        self._tracer = tracer
        self._request = request
        self._bio = bio
        self._end = end

    def __call__(self, bio: TracedBio) -> None:
        self._tracer.came_back(self._request, self._bio, f"errno {bio.error}" if bio.error else "", bio.done_bytes)
        if self._end is not None:
            self._end(bio)

    def not_taken(self, error: BaseException) -> None:
        """The device would not take it; nobody will dispatch it."""
        self._tracer.came_back(self._request, self._bio, described(error), 0)


#: The recorder, or None: tracing is off. Set by `start` and `stop` alone.
active: Tracer | None = None


def start(clock_now_ns: Callable[[], int], limit: int = DEFAULT_LIMIT) -> Tracer:
    """A recorder that is told everything from now on. RuntimeError if there is one already."""
    global active
    if active is not None:
        raise RuntimeError("a trace is being recorded already")
    active = Tracer(clock_now_ns, limit)
    return active


def stop() -> Tracer | None:
    """The recorder that was active, None if there was none. Bios that are in flight still end in it."""
    global active
    stopped, active = active, None
    return stopped


# --- for those who have something to tell: nothing happens where tracing is off ---------------------


def begin(key: object, via: str, op: int, offset: int, length: int, flags: int | str = 0, **fields: object) -> int:
    """The number of a request that begins, -1 if it is not recorded.

    key: an object that stands for it until it ends; None: the number does. via: which path it takes.
    flags: BioFlags as an int, or words.
    """
    tracer = active
    return (tracer.begin(key, via, op, offset, length, flags, fields) if tracer is not None else 0) or -1


def end(key: object, transferred: int = 0, error: BaseException | None = None, outcome: str = "") -> None:
    """The request has ended: with `error`, or with that many bytes."""
    tracer = active
    if tracer is not None:
        told = "" if error is None else described(error)
        tracer.end(key, {"transferred": transferred, "outcome": outcome, "error": told})


def emit(key: object, kind: str, **fields: object) -> None:
    """Something happened to the request."""
    tracer = active
    if tracer is not None:
        tracer.emit(key, kind, fields)


def wait(key: object, what: str) -> int:
    """The number of a wait that begins, for `waited`; 0 if it is not recorded."""
    tracer = active
    return tracer.wait(key, what) if tracer is not None else 0


def waited(number: int) -> None:
    """The wait is over."""
    tracer = active
    if tracer is not None:
        tracer.waited(number)


def waiting(awaitable: Awaitable[T], key: object, what: str) -> Awaitable[T]:
    """`awaitable`, to be awaited at once; where tracing is on, the time until it answers is a wait."""
    return awaitable if active is None else _waiting(awaitable, key, what)


async def _waiting(awaitable: Awaitable[T], key: object, what: str) -> T:
    number = wait(key, what)
    try:
        return await awaitable
    finally:
        waited(number)


def sent(key: object, bio: TracedBio) -> None:
    """`bio`, whose `end` is set, is submitted next; that it ends is recorded without another call."""
    tracer = active
    if tracer is not None:
        tracer.sent(key, bio)


def not_taken(bio: TracedBio, error: BaseException) -> None:
    """The submission raised `error`, and the bio will never end."""
    if isinstance(bio.end, _Watch):
        bio.end.not_taken(error)


def described(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def flags_of(flags: int) -> str:
    """Flags of a bio in words: "fua nowait"."""
    return " ".join(name for bit, name in enumerate(FLAGS) if flags >> bit & 1)


def name_of(path: object) -> str:
    """A path as JSON can hold it."""
    return os.fsdecode(path) if isinstance(path, bytes) else str(path)
