"""What every open file of a synchronous caller is, whoever serves it: a raw binary file whose bytes go direct.

`files.File` and `volume_file.FileInVolume` are made of it. They say how a transfer and a batch are done; the position,
the stream over it, and the checks of what is asked are here.
"""

from __future__ import annotations

import abc
import io
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from odirect.base.errors import AlignmentError, ClosedError, WouldBlockError
from odirect.base.units import align_up, checked_offset
from odirect.block.bio import READ, WRITE
from odirect.block.buffers import as_bytes_view, empty
from odirect.block.device import Limits
from odirect.dio.blockdev import check_aligned
from odirect.dio.opening import OpenMode
from odirect.dio.outcome import Outcome, Tallies, Tally

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.dio.requests import Request

Buffer = object  # anything with the buffer protocol

#: Transfers in flight that a batch keeps unless told otherwise.
BATCH_DEPTH = 64
# How much `readall` asks for at once.
_READ_BYTES = 8 << 20
#: How much `pread` asks for at once of a file whose size says nothing.
GENERATED_BYTES = 1 << 18
_LARGEST_OFFSET = (1 << 63) - 1


def room(file: Sized, length: int, offset: int) -> int:
    """How much memory a read of `length` bytes at `offset` needs, which may go past the end of the file.

    With access "strict" the request must be one that the kernel takes, so the last block is asked for whole;
    AlignmentError for a length that it would refuse.
    """
    left = max(0, file.size - offset)
    if length <= left:
        return length
    if left and file.access == "strict":
        try:
            check_aligned(file.limits, READ, offset, (), length)
        except AlignmentError as error:
            error.filename = file.name
            raise
        return min(length, align_up(left, file.limits.read_align))
    return left


def past_end(error: BaseException | None, op: int, offset: int, size: Callable[[], int]) -> bool:
    """Whether this is the error of a misaligned read where nothing is left: there the kernel looks at no alignment."""
    return isinstance(error, AlignmentError) and op == READ and offset >= size()


class Sized(Protocol):
    """What `room` asks of a file."""

    name: Any
    access: str

    @property
    def size(self) -> int:
        """The present size in bytes."""
        ...

    @property
    def limits(self) -> Limits:
        """What a direct request must be aligned to."""
        ...


class Completing(Protocol):
    """What gives requests back."""

    def completions(self) -> Iterator[Request]:
        """Requests as they finish, until none is left."""
        ...


class RawFile(io.RawIOBase):
    """An open file; works wherever a raw binary file does.

    `read`, `write` and `seek` share one position, which a lock protects.
    """

    access: str
    _submission: Completing | None
    # Whether the file's size says how much can be read.
    _sized = True

    def __init__(self, name: str | bytes, mode: OpenMode) -> None:
        super().__init__()
        self.name = name
        self.mode = mode.shown
        self._mode = mode
        self._tallies = Tallies()
        self._position = 0
        self._submission = None
        self._forget_threads()
        _files.add(self)

    # What it is.

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        self._check_open()
        return self._mode.readable

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        self._check_open()
        return self._mode.writable

    def seekable(self) -> bool:
        """True: only what has bytes at offsets can be opened."""
        self._check_open()
        return True

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The present size in bytes."""

    @property
    @abc.abstractmethod
    def limits(self) -> Limits:
        """What a direct request must be aligned to."""

    @property
    def last_outcome(self) -> Outcome | None:
        """How the last request went, of whichever thread; None before the first."""
        return self._tallies.last

    @property
    def totals(self) -> dict[Outcome, Tally]:
        """Operations and bytes for each outcome that there was."""
        return self._tallies.totals()

    # Transfers at an offset.

    @abc.abstractmethod
    def preadinto(self, buffer: Buffer, offset: int) -> int:
        """Read into `buffer` from byte `offset`; the number of bytes, 0 at the end of the file."""

    @abc.abstractmethod
    def pwrite(self, buffer: Buffer, offset: int) -> int:
        """Write `buffer` at byte `offset`; the number of bytes."""

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes from byte `offset`, fewer only at the end of the file."""
        if length < 0:
            raise ValueError(f"cannot read {length} bytes")
        if offset < 0:
            raise ValueError(f"the offset is {offset}; it cannot be negative")
        if not self._sized:
            return self._pread_generated(length, offset)
        buffer = empty(room(self, length, offset))
        return bytes(buffer[: self.preadinto(buffer, offset)])

    def _pread_generated(self, length: int, offset: int) -> bytes:
        """`pread` of a file whose size says nothing: until it gives no more."""
        data = bytearray()
        buffer = empty(min(length, GENERATED_BYTES))
        while len(data) < length:
            part = buffer[: length - len(data)]
            count = self.preadinto(part, offset + len(data))
            data += part[:count]
            if count < len(part):
                break
        return bytes(data)

    def preadv(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Read into the buffers in turn from byte `offset`; the number of bytes."""
        return self._checked_transfer(READ, [as_bytes_view(buffer, writable=True) for buffer in buffers], offset)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Write the buffers in turn at byte `offset`; the number of bytes."""
        return self._checked_transfer(WRITE, [as_bytes_view(buffer, writable=False) for buffer in buffers], offset)

    # The stream: io.RawIOBase, which has Any where None can come, so that it fits under io.BufferedReader.

    def readinto(self, buffer: Buffer) -> int | Any:
        """Read into `buffer` from the position, which moves; None if nowait would wait."""
        with self._position_lock:
            try:
                count = self.preadinto(buffer, self._position)
            except WouldBlockError:
                return None
            self._position += count
            return count

    def readall(self) -> bytes | Any:
        """Everything from the position to the end, or up to where nowait would wait; None if that is here."""
        with self._position_lock:
            pieces = []
            try:
                while piece := self.pread(_READ_BYTES, self._position):
                    pieces.append(piece)
                    self._position += len(piece)
            except WouldBlockError:
                if not pieces:
                    return None
            return b"".join(pieces)

    def read(self, size: int | None = -1, /) -> bytes | Any:
        """Up to `size` bytes from the position, which moves; all that is left if it is negative."""
        if size is None or size < 0:
            return self.readall()
        with self._position_lock:
            try:
                data = self.pread(size, self._position)
            except WouldBlockError:
                return None
            self._position += len(data)
            return data

    def write(self, buffer: Buffer, /) -> int | Any:
        """Write `buffer` at the position, which moves (at the end, in mode "a"); None if nowait would wait."""
        with self._position_lock:
            try:
                if self._mode.appends:
                    return self._append(buffer)
                count = self.pwrite(buffer, self._position)
            except WouldBlockError:
                return None
            self._position += count
            return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position; whence is SEEK_SET, SEEK_CUR, SEEK_END, SEEK_DATA or SEEK_HOLE."""
        self._check_open()
        offset = operator.index(offset)
        with self._position_lock:
            if whence == os.SEEK_CUR:
                offset += self._position
            elif whence == os.SEEK_END:
                offset += self.size
            elif whence in (os.SEEK_DATA, os.SEEK_HOLE):
                offset = self._seek_kind(offset, whence)
            elif whence != os.SEEK_SET:
                raise ValueError(f"whence {whence} is none of SEEK_SET, SEEK_CUR, SEEK_END, SEEK_DATA, SEEK_HOLE")
            if offset < 0:
                raise ValueError(f"the position cannot be {offset}")
            self._position = offset
            return offset

    def tell(self) -> int:
        """The position in bytes."""
        self._check_open()
        return self._position

    def flush(self) -> None:
        """Nothing: a raw file holds nothing back. `sync` makes data durable."""
        if self.closed:
            raise ClosedError("the file is closed", path=self.name)

    # Many at once.

    def read_batch(
        self, offsets: Sequence[int] | NDArray[numpy.int64], length: int, out: Buffer, *, depth: int = BATCH_DEPTH
    ) -> NDArray[numpy.int64]:
        """Read `length` bytes at each of `offsets` into `out`, one after the other; bytes read for each.

        out: at least len(offsets) * length bytes, writable. depth: how many are in flight at once.
        A count is short only at the end of the file. Raises the error of the first element (by
        position) that failed, after all have been tried.
        """
        return self._checked_batch(READ, offsets, length, out, depth)

    def write_batch(
        self, offsets: Sequence[int] | NDArray[numpy.int64], length: int, data: Buffer, *, depth: int = BATCH_DEPTH
    ) -> NDArray[numpy.int64]:
        """Write consecutive runs of `length` bytes of `data` at each of `offsets`; bytes written for each.

        Elements that overlap land in any order. Those that make the file grow go last, in order of
        offset, so that its size never runs ahead of its data (F03). Errors as in `read_batch`.
        """
        return self._checked_batch(WRITE, offsets, length, data, depth)

    def completions(self) -> Iterator[Request]:
        """Requests of `submit` as they finish, each once, until none is left; more may be submitted meanwhile."""
        if self._submission is None:
            return iter(())
        return self._submission.completions()

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("an open file cannot be copied or pickled")

    # How. These are given by whoever serves the file.

    @abc.abstractmethod
    def _transfer(self, op: int, segments: list[memoryview], offset: int) -> int:
        """One request of any kind, counted: how many bytes. None of the segments is empty."""

    @abc.abstractmethod
    def _append(self, buffer: Buffer) -> int:
        """How many bytes of `buffer` were added at the end; the position is set to what is the end then."""

    @abc.abstractmethod
    def _seek_kind(self, offset: int, whence: int) -> int:
        """The first byte at or past `offset` that is data (SEEK_DATA), or in a hole (SEEK_HOLE)."""

    @abc.abstractmethod
    def _batch(
        self, op: int, view: memoryview, places: NDArray[numpy.int64], length: int, depth: int
    ) -> NDArray[numpy.int64]:
        """What `read_batch` and `write_batch` give back."""

    def _forget_threads(self) -> None:
        """Nobody is in here: so it is in a new file, and in a forked child, whose only thread is the caller."""
        self._position_lock = threading.RLock()

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the file is closed", path=self.name)

    def _check_usable(self, op: int) -> None:
        self._check_open()
        self._mode.check_usable(op)

    def _checked_transfer(self, op: int, segments: Sequence[memoryview], offset: int) -> int:
        """Any request: checked, done and counted."""
        self._check_usable(op)
        offset = checked_offset(offset)
        return self._transfer(op, [segment for segment in segments if len(segment)], offset)

    def _checked_batch(
        self, op: int, offsets: Sequence[int] | NDArray[numpy.int64], length: int, buffer: Buffer, depth: int
    ) -> NDArray[numpy.int64]:
        import numpy

        self._check_usable(op)
        given = numpy.asarray(offsets)
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(f"offsets must be whole numbers, not {given.dtype}")
        if given.size and given.dtype.kind == "u" and int(given.max()) > _LARGEST_OFFSET:
            raise ValueError(f"offset {int(given.argmax())} of the batch is {int(given.max())}: past any file's end")
        places = numpy.ascontiguousarray(given, dtype=numpy.int64)
        view = as_bytes_view(buffer, writable=op == READ)
        if given.ndim != 1 or length < 0 or depth < 1:
            raise ValueError("a batch takes a flat list of offsets, a length of at least 0, and a depth of at least 1")
        if len(view) < len(places) * length:
            raise ValueError(f"{len(places)} transfers of {length} bytes need more than the {len(view)} bytes given")
        if len(places) and int(places.min()) < 0:
            raise ValueError(f"offset {int(places.argmin())} of the batch is {int(places.min())}, which is negative")
        return self._batch(op, view, places, length, depth)

    def _shown(self, kind: str, access: str) -> str:
        """The `repr` of a file of this kind."""
        state = "closed " if self.closed else ""
        return f"<{state}{kind} {os.fsdecode(cast(str, self.name))!r} mode={self.mode!r} access={access!r}>"


#: Open files, of which a forked child has copies.
_files: weakref.WeakSet[RawFile] = weakref.WeakSet()


def _forget_threads() -> None:
    for file in list(_files):
        file._forget_threads()


os.register_at_fork(after_in_child=_forget_threads)
