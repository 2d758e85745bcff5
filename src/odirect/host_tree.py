"""Trees of the host: listed with one call a directory, and their small files read many at once.

A call that goes over hundreds of files holds no lock of Python's, so other threads read what comes next
while what was read is put into a volume.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from odirect.block.buffers import empty
from odirect.fs.base import ACLS
from odirect.ring._calls import STATUS_FIELDS, list_directory, read_small

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

#: Small files are read so many at a time, or so many bytes of memory.
BATCH_FILES = 1024
BATCH_BYTES = 8 << 20
# Batches that are read before they are asked for: a cold disk answers several at once.
_AHEAD = 4

MODE, INO, DEV, NLINK, UID, GID, RDEV, SIZE, BLOCKS, ATIME, ATIME_NS, MTIME, MTIME_NS = range(len(STATUS_FIELDS))
_SECOND = 1_000_000_000
_TYPE_BITS = 0o170000


class Status(NamedTuple):
    """What `os.stat_result` has, as far as copies need it. Bytes, 512-byte blocks, and nanoseconds since 1970."""

    st_mode: int
    st_ino: int
    st_dev: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_size: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int

    @classmethod
    def of(cls, row: NDArray[numpy.int64]) -> Status:
        """That of a row of statuses."""
        fields: list[int] = row.tolist()
        times = (fields[at] * _SECOND + fields[at + 1] for at in (ATIME, MTIME))
        return cls(*fields[:ATIME], *times)


class Listing(NamedTuple):
    """A directory of a tree: its path, the names in it in order, and a row of `STATUS_FIELDS` for each.

    below: by row, the number of the listing of each directory in it.
    """

    path: bytes
    names: list[bytes]
    statuses: NDArray[numpy.int64]
    below: dict[int, int]

    def path_of(self, row: int) -> bytes:
        """The path of what has the name."""
        return self.path.rstrip(b"/") + b"/" + self.names[row]

    def small(self, most: int) -> NDArray[numpy.bool_]:
        """Which are regular files of one name and at most so many bytes."""
        fits = (self.statuses[:, SIZE] <= most) & (self.statuses[:, NLINK] == 1)
        small: NDArray[numpy.bool_] = self.are(stat.S_IFREG) & fits
        return small

    def are(self, kind: int) -> NDArray[numpy.bool_]:
        """Which have these type bits."""
        right: NDArray[numpy.bool_] = self.statuses[:, MODE] & _TYPE_BITS == kind
        return right


def list_tree(top: bytes) -> list[Listing]:
    """The listings of a directory and of all directories below it, each after the one that it is in.

    Raises an ODirectError that names what could not be looked at.
    """
    import numpy

    listings: list[Listing] = []
    waiting = collections.deque([top])
    made = 1
    while waiting:
        path = waiting.popleft()
        names, raw = list_directory(path)
        order = sorted(range(len(names)), key=names.__getitem__)
        statuses = numpy.frombuffer(raw, numpy.int64).reshape(-1, len(STATUS_FIELDS))[order]
        listing = Listing(path, [names[row] for row in order], statuses, {})
        for row in numpy.flatnonzero(listing.are(stat.S_IFDIR)).tolist():
            listing.below[row] = made
            made += 1
            waiting.append(listing.path_of(row))
        listings.append(listing)
    return listings


class Part(NamedTuple):
    """Which rows of which listing."""

    listing: int
    rows: NDArray[numpy.int64]


def row_of(parts: Sequence[Part], row: int) -> tuple[int, int]:
    """The listing, and the row in it, of a row of the parts together."""
    for listing, rows in parts:
        if row < len(rows):
            return listing, int(rows[row])
        row -= len(rows)
    raise IndexError(row)


class Batch(NamedTuple):
    """Small files that were read, in the order of the parts.

    statuses: rows as they are now. rooms: the bytes that each has in `memory`, one after the other. results: 0,
    or why a file was not read (`ring._calls.read_small`).
    """

    parts: list[Part]
    names: list[bytes]
    statuses: NDArray[numpy.int64]
    rooms: NDArray[numpy.int64]
    memory: memoryview
    results: list[int]


class _Reading(threading.Thread):
    """A batch that a thread of its own reads."""

    def __init__(self, read: Callable[[], Batch]) -> None:
        super().__init__(name="odirect-host")
        self._read = read
        self._found: Batch | BaseException | None = None
        self.start()

    def run(self) -> None:
        """Read it."""
        try:
            self._found = self._read()
        except BaseException as error:
            self._found = error

    def result(self) -> Batch:
        """The batch, waited for. Raises what reading it raised."""
        self.join()
        if not isinstance(self._found, Batch):
            raise RuntimeError("a batch was not read") from self._found
        return self._found


class SmallFiles:
    """Iterates over batches of the small files of a tree, in order, read by threads before they are asked for.

    most: bytes of the largest that is small. room_bytes: each has room for a multiple of it in memory. plain:
    files with extended attributes are not read. A batch's memory is used again once it was given back by
    `release`. A context manager: leaving waits for the threads.
    """

    def __init__(self, listings: Sequence[Listing], most: int, room_bytes: int, *, plain: bool) -> None:
        self._listings = listings
        self._most = most
        self._room_bytes = room_bytes
        self._plain = plain
        self._free: list[memoryview] = []
        self._reading: collections.deque[_Reading] = collections.deque()

    def __enter__(self) -> SmallFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reading in self._reading:
            reading.join()

    def __iter__(self) -> Iterator[Batch]:
        for parts, rooms in self._plan():
            memory = self._free.pop() if self._free else empty(max(BATCH_BYTES, self._most + self._room_bytes))
            self._reading.append(_Reading(functools.partial(self._read, parts, rooms, memory)))
            if len(self._reading) == _AHEAD:
                yield self._reading.popleft().result()
        while self._reading:
            yield self._reading.popleft().result()

    def release(self, batch: Batch) -> None:
        """Nobody needs the batch's memory any more."""
        self._free.append(batch.memory)

    def _plan(self) -> Iterator[tuple[list[Part], NDArray[numpy.int64]]]:
        """What each batch has, and the rooms in it."""
        import numpy

        parts: list[Part] = []
        rooms: list[NDArray[numpy.int64]] = []
        files = used = 0
        for number, listing in enumerate(self._listings):
            rows = numpy.flatnonzero(listing.small(self._most))
            needed = -(-listing.statuses[rows, SIZE] // self._room_bytes) * self._room_bytes
            while len(rows):
                ends = numpy.cumsum(needed[: BATCH_FILES - files])
                fit = int(numpy.searchsorted(ends, BATCH_BYTES - used, "right"))
                if not fit and not files:
                    fit = 1
                if fit:
                    parts.append(Part(number, rows[:fit]))
                    rooms.append(needed[:fit])
                    files, used = files + fit, used + int(ends[fit - 1])
                    rows, needed = rows[fit:], needed[fit:]
                if len(rows):
                    yield parts, numpy.concatenate(rooms)
                    parts, rooms = [], []
                    files = used = 0
        if parts:
            yield parts, numpy.concatenate(rooms)

    def _read(self, parts: list[Part], rooms: NDArray[numpy.int64], memory: memoryview) -> Batch:
        import numpy

        listings = [self._listings[part.listing] for part in parts]
        counts = numpy.array([len(part.rows) for part in parts], numpy.int64)
        names = [
            listing.names[row] for listing, part in zip(listings, parts, strict=True) for row in part.rows.tolist()
        ]
        statuses = numpy.concatenate(
            [listing.statuses[part.rows] for listing, part in zip(listings, parts, strict=True)]
        )
        paths = [listing.path for listing in listings]
        results = read_small(paths, counts, names, statuses, memory, rooms, self._plain)
        return Batch(parts, names, statuses, rooms, memory, results)


def set_xattrs(
    target: int | bytes, xattrs: Mapping[bytes, bytes], *, follow_symlinks: bool = True
) -> list[tuple[bytes, OSError]]:
    """Give a file of the host the extended attributes of its original; those that could not be given, and why.

    target: a descriptor or a path. Access lists that it has inherited and its original has not are taken away.
    """
    missed: list[tuple[bytes, OSError]] = []
    for name, value in xattrs.items():
        try:
            os.setxattr(target, name, value, follow_symlinks=follow_symlinks)
        except OSError as error:
            missed.append((name, error))
    for name in ACLS:
        if name not in xattrs:
            with contextlib.suppress(OSError):
                os.removexattr(target, name, follow_symlinks=follow_symlinks)
    return missed
