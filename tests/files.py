"""What tests of the public files share: files on the disk alone, buffers, and memory that is not there."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import odirect
from odirect.ring._calls import cachestat


def data_file(path: Path, content: bytes | None = None) -> Path:
    """`path`, with `content` if it is given, written to the device and dropped from the page cache."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if content is not None:
            os.ftruncate(fd, 0)
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return path


def filled(length: int, value: int, *, shift: int = 0) -> memoryview:
    """A buffer of `length` bytes of `value`, `shift` bytes away from a page's start."""
    buffer = odirect.empty(length + shift)[shift:]
    buffer[:] = bytes([value & 0xFF]) * length
    return buffer


def cached_pages(path: Path) -> int | None:
    """Pages of the file that are in the page cache; None where the kernel does not tell."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = cachestat(fd, 0, 0)
    finally:
        os.close(fd)
    return None if found is None else found[0]


class DirectReader:
    """What is on the disk below the size that can be seen, past the page cache.

    A buffered reader beside a direct writer will not do: the kernel shows him the new size before it
    drops the page that was cached with zeroes behind the old one (seen with two lines of os.pwrite).
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._memory = odirect.empty(8 << 20)

    @property
    def size(self) -> int:
        """The size as it is seen now."""
        return os.fstat(self._fd).st_size

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end), or fewer."""
        begin = start // 4096 * 4096
        count = os.preadv(self._fd, [self._memory[: -(-(end - begin) // 4096) * 4096]], begin)
        return bytes(self._memory[start - begin : min(count, end - begin)])

    def close(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def cut_short(directory: Path, length: int) -> Iterator[memoryview]:
    """A writable mapping of a file of `length` bytes of which all but the first page has been cut off (F23)."""
    path = directory / "cut"
    path.write_bytes(b"m" * length)
    fd = os.open(path, os.O_RDWR)
    try:
        view = memoryview(mmap.mmap(fd, length))
        os.ftruncate(fd, mmap.PAGESIZE)
        yield view
    finally:
        os.close(fd)
        path.unlink()
