"""The standard streams of the command: descriptors that are never anything else, and what writing to them meets."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from odirect.base.errors import ODirectError, from_errno

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2


class OutputError(Exception):
    """Standard output does not take what a verb says. error: what the command ends with.

    No ODirectError: those are of paths, and some verbs go on after them.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.error: ODirectError = from_errno(number, "writing to standard output")


def settle() -> None:
    """See that the descriptors 0, 1 and 2 are there, before anything else is opened, and have streams over 1 and 2.

    A file of ours that got the number of one that is closed would be read, or written, in its place. What was
    closed fails as before when it is used, with EBADF; messages to a closed standard error are dropped.
    Raises ODirectError if something is closed, and there is no /dev/null to take its place.
    """
    for fd in (STDIN, STDOUT, STDERR):
        if not _is_open(fd):
            # A descriptor that is only a path can be neither read nor written.
            _fill(fd, os.O_WRONLY if fd == STDERR else os.O_PATH)
    sys.stdout = _stream(STDOUT, sys.stdout, "backslashreplace")
    sys.stderr = _stream(STDERR, sys.stderr, "backslashreplace")


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _fill(fd: int, flags: int) -> None:
    try:
        got = os.open(os.devnull, flags)
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, f"standing in for descriptor {fd}", os.devnull) from error
    # It is the lowest free number, unless somebody has opened something already.
    if got != fd:
        os.dup2(got, fd)
        os.close(got)
    os.set_inheritable(fd, True)


def _stream(fd: int, there: TextIO | None, errors: str) -> TextIO:
    """A stream of text over `fd`, in the encoding that Python has found for it."""
    encoding = "utf-8" if there is None else there.encoding
    raw = _Raw(fd, raises=fd == STDOUT)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=raw.isatty())


class _Raw(io.FileIO):
    """A standard stream that says once that it takes no more, and has no more to say about it at the exit.

    raises: say so with OutputError, else not at all.
    """

    def __init__(self, fd: int, *, raises: bool) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._raises = raises
        self._failed = False

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of it, waiting where somebody has made it non-blocking; how much that was."""
        size = memoryview(data).nbytes
        while not self._failed:
            try:
                count = super().write(data)
            except OSError as error:
                self._failed = True
                if self._raises:
                    raise OutputError(error.errno or errno.EIO) from error
                break
            if count is not None:
                return count
            poller = select.poll()
            poller.register(self.fileno(), select.POLLOUT)
            poller.poll()
        return size
