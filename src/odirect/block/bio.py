"""The unit of work that a block device takes: one operation on one run of device bytes."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A bio holds at most this many segments, as the kernel's BIO_MAX_VECS has it (B02).
MAX_SEGMENTS = 256


class Op(enum.IntEnum):
    """What a bio does. FLUSH makes completed writes durable; DISCARD and ZERO carry no data."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    ZERO = 4


class BioFlags(enum.IntFlag):
    """How a bio is to be done. On a FLUSH, META asks for the metadata too (fsync, not fdatasync)."""

    NONE = 0
    FUA = 1
    PREFLUSH = 2
    META = 4
    NOWAIT = 8
    HIPRI = 16
    ATOMIC = 32


# Plain ints: an IntFlag operation costs a microsecond, and these are tested once per bio.
FUA = 1
PREFLUSH = 2
META = 4
NOWAIT = 8
HIPRI = 16
ATOMIC = 32

READ, WRITE, FLUSH, DISCARD, ZERO = 0, 1, 2, 3, 4


class Bio:
    """One operation, owned by the device from `submit` until `poll` returns it.

    addr       first byte on the device (for a plain file: of the file)
    length     bytes, the sum of the segments; for DISCARD and ZERO the length of the range
    segments   C-contiguous byte buffers, writable for READ; kept alive until completion (F24)
    flags      `BioFlags` as a plain int
    error      0, or a positive errno; set by the device
    done_bytes bytes transferred from the start. It may be short of `length` without an error: at
               the device's end, or because the kernel did a part; `dio.piece` resumes (F04).
               Without a meaning for FLUSH, DISCARD and ZERO
    end        called by whoever dispatches completions, once, with the bio; None: nobody waits
    private    the submitter's own; devices and filters leave it alone
    """

    __slots__ = ("addr", "done_bytes", "end", "error", "flags", "length", "op", "private", "segments", "state")

    def __init__(
        self,
        op: int,
        addr: int,
        segments: Sequence[memoryview] = (),
        length: int = 0,
        flags: int = 0,
        end: Callable[[Bio], None] | None = None,
        private: object = None,
    ) -> None:
        self.op = op
        self.addr = addr
        self.segments = segments
        self.length = length
        self.flags = flags
        self.end = end
        self.private = private
        self.error = 0
        self.done_bytes = 0
        self.state: object = None  # the device's own while it owns the bio

    def __repr__(self) -> str:
        flags = f" {BioFlags(self.flags)!r}" if self.flags else ""
        return f"<Bio {Op(self.op).name} {self.addr}+{self.length}{flags} error={self.error} done={self.done_bytes}>"
