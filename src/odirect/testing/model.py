"""A file as Linux has it, in a bytearray: what every real one is compared with (F02, F05, F13)."""

from __future__ import annotations

import errno

from odirect.base.errors import NoSpaceError


class ModelFile:
    """The bytes of one file. Nothing suspends, nothing is cached, nothing is aligned.

    limit: no byte at or past it can be written, as on a full device; None: there is always room.
    """

    def __init__(self, data: bytes = b"", *, limit: int | None = None) -> None:
        if limit is not None and len(data) > limit:
            raise ValueError(f"{len(data)} bytes do not fit in {limit}")
        self._data = bytearray(data)
        self.limit = limit

    @property
    def size(self) -> int:
        """The file's length in bytes."""
        return len(self._data)

    @property
    def data(self) -> bytes:
        """A copy of all bytes."""
        return bytes(self._data)

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; less, or none, at the end of the file. Source: pread(2)."""
        _check(length, offset)
        return bytes(self._data[offset : offset + length])

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> int:
        """How many bytes were written at `offset`; a gap before it reads as zeroes.

        A write of nothing changes nothing. One that crosses `limit` is short; one that begins there
        raises NoSpaceError and changes nothing. Source: pwrite(2).
        """
        _check(len(data), offset)
        if not len(data):
            return 0
        count = len(data)
        if self.limit is not None:
            if offset >= self.limit:
                raise NoSpaceError(f"writing {count} bytes at {offset}: the model ends at {self.limit}")
            count = min(count, self.limit - offset)
        self._grow(offset)
        self._data[offset : offset + count] = memoryview(data)[:count]
        return count

    def append(self, data: bytes | bytearray | memoryview) -> int:
        """The offset at which `data` was added: the end of the file, as O_APPEND has it.

        What does not fit is left out, as in `pwrite`.
        """
        offset = self.size
        self.pwrite(data, offset)
        return offset

    def truncate(self, size: int) -> None:
        """Make the file `size` bytes long; what is new reads as zeroes and takes no room. Source: ftruncate(2)."""
        _check(size, 0)
        del self._data[size:]
        self._grow(size)

    def punch(self, offset: int, length: int) -> None:
        """Make a hole: these bytes read as zeroes, and the size stays. Source: FALLOC_FL_PUNCH_HOLE.

        Raises OSError(EINVAL) for a length of 0, as fallocate(2) does.
        """
        _check(length, offset)
        if not length:
            raise OSError(errno.EINVAL, "a hole of no bytes")
        end = min(offset + length, self.size)
        if offset < end:
            self._data[offset:end] = bytes(end - offset)

    def _grow(self, size: int) -> None:
        if size > self.size:
            self._data.extend(bytes(size - self.size))


def _check(length: int, offset: int) -> None:
    if length < 0 or offset < 0:
        raise OSError(errno.EINVAL, f"{length} bytes at {offset}")
