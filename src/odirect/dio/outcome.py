"""How a request went, and what can be promised of it."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Kind(enum.StrEnum):
    """Which way the bytes went, from best to worst; a request has the worst kind of its parts.

    direct      between the caller's memory and the device
    bounced     past the page cache, but through a private buffer (head, tail or whole)
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
    """Why a request, or a part of it, did not go direct."""

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
