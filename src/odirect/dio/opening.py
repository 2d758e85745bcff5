"""The modes of `open`; a plain file or block device opened twice: past the page cache, and through it for the rest.

What the kernel makes while it is read (in /proc, /sys, and in some file systems that are programs) has a size that
says nothing: 0, or a whole page. Such a file is never direct, and is read until it gives no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

from odirect.base import trace
from odirect.base.errors import DirectoryError, NotDirectError, ODirectError, UnsupportedError, from_errno
from odirect.block.bio import READ, WRITE, Bio
from odirect.block.buffers import BufferPool, slice_segments
from odirect.block.device import BlockDevice, Limits
from odirect.block.in_use import check_unused
from odirect.block.limits import file_limits
from odirect.dio import blockdev
from odirect.dio.bounce import Moved
from odirect.dio.outcome import Kind, Outcome, Reason
from odirect.dio.plainfile import FileState, PlainFile
from odirect.ring import choose

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_MODES = ("r", "r+", "w", "w+", "x", "x+", "a", "a+")

_NOT_A_FILE = "not a regular file or block device; direct I/O has no meaning here"


class OpenMode(NamedTuple):
    """What a file is opened for, taken from one of the modes of `open`. shown: the mode, with its "b"."""

    shown: str
    readable: bool
    writable: bool
    create: bool
    exclusive: bool
    truncate: bool
    appends: bool

    def check_usable(self, op: int) -> None:
        """Raise io.UnsupportedOperation (an OSError and ValueError) if it was not opened for `op`."""
        if not (self.readable if op == READ else self.writable):
            raise io.UnsupportedOperation(f"the file was not opened for {'reading' if op == READ else 'writing'}")


def parse_mode(mode: str) -> OpenMode:
    """The `OpenMode` of "r", "r+", "w", "w+", "x", "x+", "a" or "a+", "b" or not.

    Raises ValueError for any other text, TypeError for what is no text.
    """
    if not isinstance(mode, str):
        raise TypeError(f"the mode must be str, not {type(mode).__name__}")
    plain = mode.replace("b", "", 1)
    if plain not in _MODES:
        raise ValueError(f"mode {mode!r}: use one of {', '.join(_MODES)}, with or without b; text is not for here")
    return OpenMode(
        shown=plain[0] + "b" + plain[1:],
        readable=plain == "r" or "+" in plain,
        writable=plain != "r",
        create=plain[0] != "r",
        exclusive=plain[0] == "x",
        truncate=plain[0] == "w",
        appends=plain[0] == "a",
    )


@dataclasses.dataclass(slots=True)
class Opened:
    """Descriptors of one open file, and what is known of it.

    direct_fd is -1 where the kernel refused O_DIRECT at open. generated: its bytes are made while it is read, and
    its size says nothing of how many there are. `close` closes both, and so does being
    thrown away. A signal's handler may raise between any two calls: so a descriptor is put here, and taken
    away to be closed, without a call in between.
    """

    direct_fd: int
    cached_fd: int
    state: FileState
    mode: OpenMode
    generated: bool = False

    def close(self) -> None:
        """Close the descriptors. Twice is harmless."""
        try:
            fd, self.direct_fd = self.direct_fd, -1
            if fd >= 0:
                os.close(fd)
        finally:
            fd, self.cached_fd = self.cached_fd, -1
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        # An event loop that was closed in mid-flight leaves nobody else to do it.
        self.close()


def open_file(path: Path, mode: str, *, strict: bool = False, overwrite_in_use: bool = False) -> Opened:
    """The file at `path`, opened in one of the modes of `open` ("b" may be left out).

    strict: raises NotDirectError where O_DIRECT is refused, or the size says nothing. A block device that is
    mounted or in use, or a file that is locked, or that a loop device or swap is on, is not opened for writing
    (InUseError) unless `overwrite_in_use`. Raises ValueError for a mode or an `ODIRECT_RING` that is none,
    UnsupportedError for a pipe, terminal or socket, DirectoryError, and the kernel's answers as PathErrors.
    """
    parsed = parse_mode(mode)
    choose.asked_for()  # What is wrong with it is told now, and not by the first request that needs a ring.
    flags = _open_flags(parsed) | os.O_CLOEXEC | os.O_NOCTTY
    shown = os.fspath(path)
    opened = Opened(-1, -1, FileState(limits=Limits(), path=shown, is_block=False), parsed)
    try:
        # Without waiting for the other end of a pipe; then it waits as usual.
        (opened.cached_fd,) = map(os.open, (path,), (flags | os.O_NONBLOCK,), (0o666,))
        os.set_blocking(opened.cached_fd, True)
    except OSError as error:
        if error.errno == errno.ENXIO and not _is_block_device(path):
            raise UnsupportedError(_NOT_A_FILE, path=shown) from error  # a pipe that nobody reads, a socket
        raise from_errno(error.errno or errno.EIO, "opening", shown) from error
    except BaseException:
        opened.close()
        raise
    try:
        _finish_opening(opened, flags, strict=strict, overwrite_in_use=overwrite_in_use)
    except ODirectError:
        opened.close()
        raise
    except OSError as error:
        opened.close()
        raise from_errno(error.errno or errno.EIO, "opening", shown) from error
    except BaseException:
        opened.close()
        raise
    return opened


def _finish_opening(opened: Opened, flags: int, *, strict: bool, overwrite_in_use: bool) -> None:
    state = opened.state
    status = os.fstat(opened.cached_fd)
    if stat.S_ISDIR(status.st_mode):
        raise DirectoryError("a directory cannot be opened as a file", path=state.path)
    state.is_block = stat.S_ISBLK(status.st_mode)
    if not state.is_block and not stat.S_ISREG(status.st_mode):
        raise UnsupportedError(_NOT_A_FILE, path=state.path)
    if opened.mode.writable and not overwrite_in_use:
        check_unused(opened.cached_fd, what="write to")
    again = flags & ~(os.O_CREAT | os.O_EXCL) | os.O_DIRECT
    refusal, reason = "", Reason.REFUSED_AT_OPEN
    try:
        # By descriptor, not by name: the name may lead to another file by now.
        (opened.direct_fd,) = map(os.open, (f"/proc/self/fd/{opened.cached_fd}",), (again,))
    except OSError as error:
        refusal = os.strerror(error.errno or errno.EINVAL)
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.ENOENT):
            raise
    if stat.S_ISREG(status.st_mode) and opened.mode.readable and not opened.mode.truncate:
        opened.generated = _is_generated(opened, status)
    if opened.generated and opened.direct_fd >= 0:
        if strict:
            raise NotDirectError("its size is 0 and yet it has content: its file system makes it", path=state.path)
        fd, opened.direct_fd = opened.direct_fd, -1
        os.close(fd)
        reason = Reason.CACHED_BY_FS
    fd = opened.direct_fd if opened.direct_fd >= 0 else opened.cached_fd
    state.limits, support = file_limits(fd, path=state.path, writable=opened.mode.writable)
    if opened.direct_fd < 0:
        if strict:
            raise NotDirectError(f"O_DIRECT is refused at open: {refusal}", path=state.path)
        state.refused = {READ: reason, WRITE: reason}
    else:
        if not support.reads:
            state.cached[READ] = Reason.CACHED_BY_FS
        if not support.writes:
            state.cached[WRITE] = Reason.CACHED_BY_FS
        if strict:
            # What the cache would serve is refused, then, on the short ways too.
            state.refused = dict(state.cached)
    if opened.mode.truncate and not state.is_block:
        os.ftruncate(opened.cached_fd, 0)


def _is_generated(opened: Opened, status: os.stat_result) -> bool:
    """Whether the size of a regular file says nothing of what it holds.

    So it is where the kernel refuses O_DIRECT and neither the file nor its file system takes space on anything
    (/proc, /sys, cgroups, debugfs), and in any file system if a file of 0 bytes has a first byte.
    """
    fd = opened.cached_fd
    if opened.direct_fd < 0 and not status.st_blocks and not os.fstatvfs(fd).f_blocks:
        return True
    if status.st_size:
        return False
    with contextlib.suppress(OSError):
        # Unless somebody has just written it.
        return bool(os.pread(fd, 1, 0)) and not os.fstat(fd).st_size
    return False


def plain_file(
    opened: Opened,
    direct: BlockDevice | None,
    cached: BlockDevice,
    pool: BufferPool,
    *,
    strict: bool = False,
    ask_again: Callable[[], Limits] | None = None,
) -> PlainFile:
    """The coroutine side of an open file. The arguments are those of `PlainFile`."""
    if opened.generated:
        return _GeneratedFile(opened.state, cached, pool)
    return PlainFile(opened.state, direct, cached, pool, strict=strict, ask_again=ask_again)


class _GeneratedFile(PlainFile):
    """A file that ends where it gives no more, whatever its size."""

    def __init__(self, state: FileState, cached: BlockDevice, pool: BufferPool) -> None:
        super().__init__(state, None, cached, pool)
        self._whole = cached

    async def read(
        self, offset: int, segments: Sequence[memoryview], length: int, flags: int = 0, traced: int = 0
    ) -> Moved:
        """Read up to `length` bytes at `offset`, fewer only where there are no more. See `PlainFile.read`."""
        own = 0
        if trace.active is not None and not traced:
            own = traced = trace.begin(None, "file", READ, offset, length, flags, file=trace.name_of(self.state.path))
        done = 0
        outcome = Outcome(Kind.BUFFERED, self.state.refused.get(READ, Reason.REFUSED))
        try:
            while done < length:
                left = length - done
                _, parts, size = blockdev.split(slice_segments(segments, done, left), left, self._whole.limits, 1)[0]
                bio = Bio(READ, offset + done, parts, size, flags)
                await blockdev.run(self._whole, bio, traced)
                if bio.error and not (done and bio.error == errno.EAGAIN):
                    raise from_errno(bio.error, f"reading {bio.length} bytes at {bio.addr}", self.state.path)
                if not bio.done_bytes:
                    break
                done += bio.done_bytes
        except BaseException as error:
            if own:
                trace.end(own, 0, error)
            raise
        if own:
            trace.end(own, done, outcome=str(outcome))
        return Moved(done, outcome)


def _is_block_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _open_flags(mode: OpenMode) -> int:
    access = os.O_RDONLY
    if mode.writable:
        access = os.O_RDWR if mode.readable else os.O_WRONLY
    return access | (os.O_CREAT if mode.create else 0) | (os.O_EXCL if mode.exclusive else 0)
