"""Every way to move one run of bytes with a `File`, each as a function (file, buffer, offset) -> count.

They must give the same bytes, errors and outcomes.
"""

from __future__ import annotations

from collections.abc import Callable

import odirect
from odirect.dio.requests import Request

Verb = Callable[[odirect.File, memoryview, int], int]


def preadinto(file: odirect.File, buffer: memoryview, offset: int) -> int:
    return file.preadinto(buffer, offset)


def preadv(file: odirect.File, buffer: memoryview, offset: int) -> int:
    return file.preadv([buffer], offset)


def readinto(file: odirect.File, buffer: memoryview, offset: int) -> int:
    file.seek(offset)
    count = file.readinto(buffer)
    assert count is not None and file.tell() == offset + count
    return count


def read_batch(file: odirect.File, buffer: memoryview, offset: int) -> int:
    return int(file.read_batch([offset], len(buffer), buffer)[0])


def submit_read(file: odirect.File, buffer: memoryview, offset: int) -> int:
    return _submitted(file, file.submit("read", offset, buffer))


def pwrite(file: odirect.File, buffer: memoryview, offset: int) -> int:
    return file.pwrite(buffer, offset)


def pwritev(file: odirect.File, buffer: memoryview, offset: int) -> int:
    return file.pwritev([buffer], offset)


def write(file: odirect.File, buffer: memoryview, offset: int) -> int:
    file.seek(offset)
    count = file.write(buffer)
    assert count is not None and file.tell() == offset + count
    return count


def write_batch(file: odirect.File, buffer: memoryview, offset: int) -> int:
    return int(file.write_batch([offset], len(buffer), buffer)[0])


def submit_write(file: odirect.File, buffer: memoryview, offset: int) -> int:
    return _submitted(file, file.submit("write", offset, buffer))


def _submitted(file: odirect.File, request: Request) -> int:
    assert list(file.completions()) == [request]
    return request.result()


READ_VERBS: tuple[Verb, ...] = (preadinto, preadv, readinto, read_batch, submit_read)
WRITE_VERBS: tuple[Verb, ...] = (pwrite, pwritev, write, write_batch, submit_write)


def verb_name(verb: Verb) -> str:
    return verb.__name__
