"""How a request went, and what can be promised of it."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Kind(enum.StrEnum):
    """Which way the bytes went, from best to worst; a request has the worst kind of its parts.

    direct      between the caller's memory and the device
    bounced     through a private copy on the way to the device: a buffer of ours, or, for the part of
                a block that a write begins or ends with, a page of the kernel's that is written
                back and dropped before the request is done
    inline      from or to a metadata block
    compressed  through a decompressed copy
    buffered    through the page cache
    """

    DIRECT = "direct"
    BOUNCED = "bounced"
    INLINE = "inline"
    COMPRESSED = "compressed"
    BUFFERED = "buffered"


class Reason(enum.StrEnum):
    """Why a request, or a part of it, did not go direct; or why the device was not asked for all of a direct read."""

    NONE = ""
    MISALIGNED_OFFSET = "misaligned offset"
    MISALIGNED_LENGTH = "misaligned length"
    MISALIGNED_MEMORY = "misaligned memory"
    END_OF_FILE = "end of file"
    REFUSED = "refused by the kernel"
    REFUSED_AT_OPEN = "refused by the kernel at open"
    CACHED_BY_FS = "the file system serves it from its cache"
    HOLE = "hole"
    ENCODED = "encoded"
    INLINE = "inline"
    NO_SPACE = "no space"
    SMALL_FILE = "small file"


class Promise(enum.StrEnum):
    """What a finished write can promise.

    none     it may be in memory only
    device   the device has it, maybe in a volatile cache
    durable  it survives a power cut
    """

    NONE = "none"
    DEVICE = "device"
    DURABLE = "durable"


class Outcome(NamedTuple):
    """How one request went. Equal outcomes compare equal, so that they can be counted."""

    kind: Kind
    reason: Reason = Reason.NONE
    promise: Promise = Promise.NONE

    def __str__(self) -> str:
        words = [self.kind.value]
        if self.reason:
            words.append(f"({self.reason.value})")
        if self.promise is not Promise.NONE:
            words.append(self.promise.value)
        return " ".join(words)


_RANK = {kind: rank for rank, kind in enumerate(Kind)}


def worst(first: Outcome | None, second: Outcome) -> Outcome:
    """The outcome of a request with these two parts: the worse kind, and the weaker promise."""
    if first is None:
        return second
    kept = second if _RANK[second.kind] > _RANK[first.kind] else first
    promises = list(Promise)
    weaker = min(first.promise, second.promise, key=promises.index)
    return kept if kept.promise is weaker else kept._replace(promise=weaker)


class Tally(NamedTuple):
    """Operations and bytes that had one outcome."""

    operations: int
    bytes: int


class Tallies:
    """How many operations and bytes had which outcome; one for each open file."""

    __slots__ = ("_counts", "_latest")

    def __init__(self) -> None:
        self._counts: dict[Outcome, list[int]] = {}
        self._latest: tuple[Outcome, list[int]] | None = None

    def add(self, outcome: Outcome, count: int, operations: int = 1) -> None:
        """Count `operations` that moved `count` bytes. From several threads, now and then one is lost."""
        latest = self._latest
        # Most operations go like the one before, and looking an outcome up costs more than the rest.
        if latest is None or latest[0] is not outcome:
            latest = self._latest = (outcome, self._counts.setdefault(outcome, [0, 0]))
        tally = latest[1]
        tally[0] += operations
        tally[1] += count

    @property
    def last(self) -> Outcome | None:
        """The outcome that was counted last."""
        return None if self._latest is None else self._latest[0]

    def totals(self) -> dict[Outcome, Tally]:
        """Operations and bytes for each outcome that there was."""
        return {outcome: Tally(*counts) for outcome, counts in list(self._counts.items())}
