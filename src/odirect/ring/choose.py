"""Which ring to use: io_uring where the kernel lets us, threads elsewhere.

io_uring is often forbidden (containers filter it, `kernel.io_uring_disabled` turns it off), so it is
tried, once per process, and never assumed (F53). The environment variable `ODIRECT_RING` decides
otherwise: `auto` (the default), `io_uring` (an error where there is none) or `threads`.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import NamedTuple

from odirect.base.errors import ODirectError
from odirect.ring import _calls
from odirect.ring.contract import Ring
from odirect.ring.threads import ThreadRing

_VARIABLE = "ODIRECT_RING"
_VALUES = ("auto", "io_uring", "threads")

#: Threads of a ring that is shared; a private one works in the thread that enters it.
_WORKERS = 4

# Errnos of a kernel that has no io_uring, forbids it, or cannot afford it.
_REFUSALS = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOMEM, errno.EINVAL, errno.EOPNOTSUPP})


class Available(NamedTuple):
    """Which back ends there are here; `why_not` is empty or says why io_uring is not one of them."""

    io_uring: bool
    threads: bool
    why_not: str


_probed: tuple[int, Available, ODirectError | None] | None = None


def available() -> Available:
    """Which back ends this process can use. io_uring is tried once; a forked child tries again."""
    return _probe()[0]


def open_ring(depth: int = 128, *, shared: bool = False, iopoll: bool = False, workers: int | None = None) -> Ring:
    """A new ring of the kind that `ODIRECT_RING` and this kernel allow.

    `workers` is how many threads serve a ring on threads; None means none for a private ring, where
    the caller would only wait, and a few for a shared one. `iopoll` is for io_uring only.

    Raises ValueError for an `ODIRECT_RING` that is not auto, io_uring or threads, and the kernel's
    error if io_uring is demanded and cannot be had.
    """
    wanted = asked_for()
    if wanted != "threads":
        error = _probe()[1]
        if error is None:
            from odirect.ring._uring import UringRing

            try:
                return UringRing(depth, shared=shared, iopoll=iopoll)
            except ODirectError as refusal:
                # It worked before; by now memory or a limit may not suffice.
                if wanted == "io_uring" or refusal.errno not in _REFUSALS:
                    raise
        elif wanted == "io_uring":
            raise type(error)(f"{_VARIABLE}=io_uring, but {error.message}", errno=error.errno)
    if workers is None:
        workers = _WORKERS if shared else 0
    return ThreadRing(depth, workers=workers, shared=shared)


class _Local(threading.local):
    ring: Ring | None = None
    wanted = ""
    generation = -1


_local = _Local()


def thread_ring() -> Ring:
    """This thread's own private ring, made on first use and freed when the thread ends.

    A forked child gets a new one. It is for calls that leave nothing in flight on it; nobody closes it.
    """
    wanted = asked_for()
    generation = _calls.fork_generation()
    ring = _local.ring
    if ring is None or _local.generation != generation or _local.wanted != wanted:
        ring = open_ring()
        _local.ring, _local.generation, _local.wanted = ring, generation, wanted
    return ring


def _probe() -> tuple[Available, ODirectError | None]:
    global _probed
    generation = _calls.fork_generation()
    if _probed is None or _probed[0] != generation:
        from odirect.ring._uring import UringRing

        error: ODirectError | None = None
        try:
            UringRing(1).close()
        except ODirectError as refusal:
            error = refusal.with_traceback(None)
        found = Available(io_uring=error is None, threads=True, why_not="" if error is None else error.message)
        _probed = (generation, found, error)
    return _probed[1], _probed[2]


def asked_for() -> str:
    """What `ODIRECT_RING` says. The one place of this room that reads the environment."""
    value = os.environ.get(_VARIABLE) or "auto"
    if value not in _VALUES:
        raise ValueError(f"{_VARIABLE} is {value!r}; it can be {', '.join(_VALUES)}")
    return value
