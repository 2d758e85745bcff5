"""What every open file of an event loop is, whoever serves it: what `raw_file` is for synchronous callers.

`aio.File` and `aio_volume_file.FileInVolume` are made of it. They say how a transfer is started, and do all else.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from odirect.aio_runner import settle
from odirect.base.errors import ODirectError
from odirect.base.units import checked_offset
from odirect.block.bio import READ, WRITE
from odirect.block.buffers import as_bytes_view, empty
from odirect.block.device import Limits
from odirect.dio.bounce import DIRECT_READ
from odirect.dio.opening import OpenMode
from odirect.dio.outcome import Outcome, Tallies, Tally
from odirect.dio.requests import Request
from odirect.raw_file import GENERATED_BYTES, Buffer, past_end, room
from odirect.sched.locks import Count
from odirect.sched.traps import Event, shielded
from odirect.volume_runner import named


class Pending(Protocol):
    """What starts the requests of one file, and counts them."""

    @property
    def pending(self) -> int:
        """Requests that were started and are not done."""
        ...


class InFlight:
    """What was begun on one open file and has not ended, and how those who await it are told.

    owner: kept as long as a request is in flight. name: what errors name. seen: what becomes of an outcome; None if
    nothing does. size: the file's, where a misaligned read past its end would be told as an error. `requests` is set
    by whoever makes it, to what gives its requests to `done`, with their futures as tags.
    """

    def __init__(
        self,
        owner: object,
        name: str | bytes,
        seen: Callable[[int, Outcome], Outcome] | None = None,
        size: Callable[[], int] | None = None,
    ) -> None:
        self.tallies = Tallies()
        #: Calls under way that are no requests.
        self.busy = Count()
        self.requests: Pending | None = None
        self._size = size
        self._owner = owner
        self._name = name
        self._seen = seen
        self._idle: Event | None = None

    def done(self, request: Request) -> None:
        """Count a request, and tell its caller if he is still there. Runs in the dispatch, or in a task."""
        future: asyncio.Future[int] = request.tag  # type: ignore[assignment]
        outcome = request.outcome
        if outcome is not None:
            if self._seen is not None:
                outcome = self._seen(request.op, outcome)
            self.tallies.add(outcome, request.transferred)
            if not future.done():
                try:
                    future.set_result(request.transferred)
                except RuntimeError:
                    pass  # The loop is closed.
        else:
            error = request.exception
            if self._size is not None and past_end(error, request.op, request.offset, self._size):
                request.exception, request.outcome = None, DIRECT_READ
                self.done(request)
                return
            settle(future, named(error, self._name) if isinstance(error, ODirectError) else error)
        if self._idle is not None and self.requests is not None and not self.requests.pending:
            self._idle.fire()

    async def end(self) -> None:
        """Wait until nothing is in flight. Nothing may be begun meanwhile."""
        await self.busy.zero()
        if self.requests is not None and self.requests.pending:
            self._idle = Event()
            await shielded(self._idle)


class LoopFile(abc.ABC):
    """An open file of one event loop. Every transfer names its offset."""

    name: str | bytes
    access: str
    _mode: OpenMode
    _in_flight: InFlight
    # Whether the file's size says how much can be read.
    _sized = True

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
        """How the request that finished last went; None before the first."""
        return self._in_flight.tallies.last

    @property
    def totals(self) -> dict[Outcome, Tally]:
        """Operations and bytes for each outcome that there was."""
        return self._in_flight.tallies.totals()

    def preadinto(self, buffer: Buffer, offset: int) -> asyncio.Future[int]:
        """Read into `buffer` from byte `offset`; await it for the number of bytes, 0 at the end of the file.

        The transfer is started by the call, and handed over at the end of this turn of the loop. What lies past
        the bytes that are counted is left as it was (F02). Raises what the synchronous file's `preadinto` does.
        """
        return self._start(READ, offset, buffer)

    async def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes from byte `offset`, fewer only at the end of the file."""
        if length < 0:
            raise ValueError(f"cannot read {length} bytes")
        if offset < 0:
            raise ValueError(f"the offset is {offset}; it cannot be negative")
        if not self._sized:
            return await self._pread_generated(length, offset)
        buffer = empty(room(self, length, offset))
        return bytes(buffer[: await self._start(READ, offset, buffer)])

    async def _pread_generated(self, length: int, offset: int) -> bytes:
        """`pread` of a file whose size says nothing: until it gives no more."""
        data = bytearray()
        buffer = empty(min(length, GENERATED_BYTES))
        while len(data) < length:
            part = buffer[: length - len(data)]
            count = await self._start(READ, offset + len(data), part)
            data += part[:count]
            if count < len(part):
                break
        return bytes(data)

    def pwrite(self, buffer: Buffer, offset: int) -> asyncio.Future[int]:
        """Write `buffer` at byte `offset`; await it for the number of bytes, as of the synchronous file's `pwrite`.

        The transfer is started by the call, and handed over at the end of this turn of the loop.
        """
        return self._start(WRITE, offset, buffer)

    async def preadv(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Read into the buffers in turn from byte `offset`; the number of bytes."""
        views = [as_bytes_view(buffer, writable=True) for buffer in buffers]
        return await self._checked_transfer(READ, views, offset)

    async def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Write the buffers in turn at byte `offset`; the number of bytes."""
        views = [as_bytes_view(buffer, writable=False) for buffer in buffers]
        return await self._checked_transfer(WRITE, views, offset)

    @abc.abstractmethod
    async def close(self) -> None:
        """Wait for everything in flight, also of callers that were cancelled, and close. Twice is harmless."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("an open file cannot be copied or pickled")

    # How. These are given by whoever serves the file.

    @abc.abstractmethod
    def _start(self, op: int, offset: int, buffer: Buffer) -> asyncio.Future[int]:
        """One request, checked and begun."""

    @abc.abstractmethod
    async def _transfer(self, op: int, segments: list[memoryview], offset: int) -> int:
        """One request of any kind, counted: how many bytes. None of the segments is empty."""

    @abc.abstractmethod
    def _check_open(self) -> None:
        """Raise ClosedError if it is closed."""

    def _check_usable(self, op: int) -> None:
        self._check_open()
        self._mode.check_usable(op)

    async def _checked_transfer(self, op: int, segments: Sequence[memoryview], offset: int) -> int:
        self._check_usable(op)
        offset = checked_offset(offset)
        return await self._transfer(op, [segment for segment in segments if len(segment)], offset)
