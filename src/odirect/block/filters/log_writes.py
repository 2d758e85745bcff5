"""A device that remembers every change in order, so that a crash can be replayed at any of them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from odirect.base.errors import VerifyError
from odirect.block.bio import FUA, PREFLUSH, READ, WRITE, Bio, Op
from odirect.block.filters.base import Filter, joined, read_whole

if TYPE_CHECKING:
    from odirect.block.device import BlockDevice


class Record:
    """One bio that changed, or should have made durable, something.

    sequence  its number, from 0, in the order of submission
    epoch     the number of the commit that handed it over, from 0
    op, addr, length, flags   as in the bio
    data      a copy of what was written (b"" for FLUSH, DISCARD and ZERO), taken at the commit
    finished  how many records there were when `poll` returned it: those before saw no
              acknowledgement of it; None while in flight
    error     the errno that it came back with
    """

    __slots__ = ("addr", "data", "epoch", "error", "finished", "flags", "length", "op", "sequence")

    def __init__(self, sequence: int, epoch: int, bio: Bio) -> None:
        self.sequence = sequence
        self.epoch = epoch
        self.op = Op(bio.op)
        self.addr = bio.addr
        self.length = bio.length
        self.flags = bio.flags
        self.data = joined(bio.segments) if bio.op == WRITE else b""
        self.finished: int | None = None
        self.error = 0

    def __repr__(self) -> str:
        return f"<Record {self.sequence} epoch {self.epoch} {self.op.name} {self.addr}+{self.length} {self.flags:#x}>"


class LogWrites(Filter):
    """Passes everything on and logs what changes the device. `records` is the log, `marks` named places in it."""

    def __init__(self, lower: BlockDevice, *, base: bytes | None = None) -> None:
        """A log that starts from `base`, the lower device's contents; without it, they are read now.

        Raises VerifyError if `base` is not as long as the device, DeviceError if it cannot be read.
        """
        super().__init__(lower)
        self._strays: list[Bio] = []
        self.base = read_whole(lower, self._strays) if base is None else base
        if len(self.base) != lower.size_bytes:
            raise VerifyError(f"the base has {len(self.base)} bytes, the device {lower.size_bytes}")
        self.records: list[Record] = []
        self.marks: dict[str, int] = {}
        self._queued: list[Bio] = []
        self._open: dict[Bio, Record] = {}
        self._epoch = 0
        self._lock = threading.Lock()

    def submit(self, bio: Bio) -> None:
        """Queue `bio`, to be logged when it is handed over."""
        self.lower.submit(bio)
        if bio.op != READ:
            self._queued.append(bio)

    def commit(self) -> None:
        """Log what was queued, and hand it over."""
        with self._lock:
            queued, self._queued = self._queued, []
            for bio in queued:
                record = Record(len(self.records), self._epoch, bio)
                self.records.append(record)
                self._open[bio] = record
            if queued:
                self._epoch += 1
        self.lower.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios."""
        finished: Sequence[Bio] = self.lower.poll(0 if self._strays else timeout_ns)
        with self._lock:
            for bio in finished:
                record = self._open.pop(bio, None)
                if record is not None:
                    record.finished = len(self.records)
                    record.error = bio.error
        if self._strays:
            finished = [*self._strays, *finished]
            self._strays = []
        return finished

    @property
    def in_flight(self) -> int:
        """The lower device's, and what came back of others while the base was read."""
        return len(self._strays) + self.lower.in_flight

    def mark(self, name: str) -> None:
        """Call the present end of the log `name`: `replay(marks[name])` is the device as of now."""
        self.marks[name] = len(self.records)

    def replay(self, upto: int | None = None, *, without: Collection[int] = ()) -> bytes:
        """The device's bytes once the records before number `upto` (all, if None) had been applied in order.

        `without`: numbers of records that never got there, such as a subset of `unflushed(upto)`.
        What the lower device is known to have refused is not applied.
        """
        image = bytearray(self.base)
        for record in self.records[:upto]:
            if record.sequence in without or record.error:
                continue
            if record.op is Op.WRITE:
                image[record.addr : record.addr + len(record.data)] = record.data
            elif record.op in (Op.DISCARD, Op.ZERO):
                image[record.addr : record.addr + record.length] = bytes(record.length)
        return bytes(image)

    def unflushed(self, upto: int | None = None) -> list[int]:
        """Numbers of the changes before `upto` that a power cut at that moment may take back.

        Durable is what was acknowledged before a flush was submitted that was itself acknowledged
        by then, and what was written with FUA and acknowledged (F40). A flush that failed flushed
        nothing (F41).
        """
        end = len(self.records) if upto is None else upto
        flushed_before = 0
        for record in self.records[:end]:
            flushes = record.op is Op.FLUSH or record.flags & PREFLUSH
            if flushes and not record.error and record.finished is not None and record.finished <= end:
                flushed_before = record.sequence
        return [
            record.sequence
            for record in self.records[:end]
            if record.op is not Op.FLUSH and not record.error and not _is_durable(record, flushed_before, end)
        ]


def _is_durable(record: Record, flushed_before: int, end: int) -> bool:
    if record.finished is None:
        return False
    return record.finished <= flushed_before or bool(record.flags & FUA and record.finished <= end)
