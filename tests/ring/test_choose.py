"""Which ring is chosen, and that everything works where io_uring is forbidden (F53)."""

from __future__ import annotations

import errno
import threading
import weakref

import pytest
from tests.ring.conftest import run_python
from tests.seccomp import can_deny_io_uring

from odirect.ring import choose
from odirect.ring.contract import FSYNC
from odirect.ring.threads import ThreadRing


def test_both_back_ends_can_be_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODIRECT_RING", "threads")
    ring = choose.open_ring(4)
    assert ring.kind == "threads"
    ring.close()
    if choose.available().io_uring:
        for value in ("io_uring", "auto", ""):
            monkeypatch.setenv("ODIRECT_RING", value)
            ring = choose.open_ring(4, shared=True)
            assert (ring.kind, ring.depth) == ("io_uring", 4)
            ring.close()


def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODIRECT_RING", "iouring")
    with pytest.raises(ValueError, match=r"'iouring'.*auto, io_uring, threads"):
        choose.open_ring()
    with pytest.raises(ValueError, match="ODIRECT_RING"):
        choose.thread_ring()


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private ring on threads needs none; a shared one has some."""
    monkeypatch.setenv("ODIRECT_RING", "threads")
    for shared, workers, expected in ((False, None, 0), (True, None, 4), (False, 2, 2), (True, 0, 0)):
        ring = choose.open_ring(shared=shared, workers=workers)
        assert isinstance(ring, ThreadRing)
        assert ring._workers == expected
        ring.close()


@pytest.mark.parametrize("wanted", ["auto", "threads"])
def test_each_thread_has_its_ring(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("ODIRECT_RING", wanted)
    mine = choose.thread_ring()
    assert choose.thread_ring() is mine
    theirs: list[weakref.ref[object] | int] = []

    def other() -> None:
        ring = choose.thread_ring()
        theirs.append(id(ring))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert theirs != [id(mine)]


def test_a_forked_child_gets_its_own() -> None:
    """F24: the child's first use makes a new ring; the parent's stays whole."""
    script = (
        "import os\n"
        "from odirect.ring.choose import thread_ring, available\n"
        "ring = thread_ring()\n"
        "child = os.fork()\n"
        "own = thread_ring()\n"
        "own.queue(2, 1, (), 0, 0, 0, 'it')\n"
        "code = 0 if (own is ring) == (child != 0) and len(own.reap(-1)) == 1 else 1\n"
        "if child == 0: os._exit(code)\n"
        "print(code, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert run_python(script) == "0 0\n"


_DENIED = """
import errno, os, sys
from tests.seccomp import deny_io_uring
number = int(sys.argv[1])
deny_io_uring(number)
import odirect.ring._uring
from odirect.base.errors import ODirectError
from odirect.ring.choose import available, open_ring, thread_ring
assert not available().io_uring and available().threads and available().why_not, available()
for ring in (open_ring(), open_ring(shared=True), thread_ring()):
    assert ring.kind == "threads"
    ring.queue(2, -1, (), 0, 0, 0, "it")
    assert ring.reap(-1) == [("it", -errno.EBADF)]
    ring.close()
os.environ["ODIRECT_RING"] = "io_uring"
try:
    open_ring()
except ODirectError as error:
    assert error.errno == number and "ODIRECT_RING=io_uring" in str(error), error
    print("refused")
"""


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_io_uring_denied(number: int) -> None:
    """F53: with the calls filtered, import works, threads are chosen, and a demand is refused with the reason."""
    if not can_deny_io_uring():
        pytest.skip("the system call numbers of this machine are not known")
    assert run_python(_DENIED, number) == "refused\n"


def test_sync_works_on_whatever_was_chosen() -> None:
    ring = choose.open_ring()
    ring.queue(FSYNC, -1, (), 0, 0, 0, "it")
    assert ring.reap(-1) == [("it", -errno.EBADF)]
    ring.close()
