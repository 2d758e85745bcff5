"""io_uring denied by a filter, as container run-times do: everything works on threads (F53).

The whole suite runs like that with `pytest -p tests.denied_plugin`; here are a few calls of each kind.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.files import data_file
from tests.seccomp import can_deny_io_uring

SCRIPT = """
import asyncio, os, sys
from tests.seccomp import deny_io_uring
deny_io_uring({number})
import odirect
from odirect import aio
from odirect.ring.choose import available, open_ring, thread_ring

path = sys.argv[1]
{body}
print("done")
"""

FALLS_BACK = """
found = available()
assert not found.io_uring and found.threads and "io_uring" in found.why_not, found
assert open_ring().kind == open_ring(shared=True).kind == thread_ring().kind == "threads"
"""

PLAIN = """
content = bytes(range(256)) * 400
with odirect.open(path, "w+") as file:
    assert file.write(content) == len(content)
    for offset, length in ((0, 4096), (5, 1000), (len(content) - 10, 4096)):
        buffer = odirect.empty(length)
        count = file.preadinto(buffer, offset)
        assert bytes(buffer[:count]) == content[offset:offset + length]
    out = odirect.empty(20 * 4096)
    assert file.read_batch(range(0, 20 * 4096, 4096), 4096, out).tolist() == [4096] * 20
    assert bytes(out) == content[:20 * 4096]
    for number in range(40):
        file.submit("write" if number % 2 else "read", number * 1000, odirect.empty(1000))
    assert all(request.result() == 1000 for request in file.completions())
    file.sync()
    assert "buffered" not in {outcome.kind for outcome in file.totals}
"""

ASYNCIO = """
async def main():
    async with aio.open(path, "w+") as file:
        await asyncio.gather(*(file.pwrite(bytes([n]) * 5000, n * 5000) for n in range(100)))
        await asyncio.gather(*(file.pwrite(bytes([n]) * 512, n * 512) for n in range(100)))
        buffers = [odirect.empty(4096) for _ in range(300)]
        counts = await asyncio.gather(*(file.preadinto(b, 102400 + n % 90 * 4096) for n, b in enumerate(buffers)))
        assert counts == [4096] * 300
        await file.sync()
        reading = asyncio.ensure_future(file.pread(5000, 3))
        await asyncio.sleep(0)
        reading.cancel()
asyncio.run(main())
"""


def run_denied(body: str, path: Path, number: int = errno.EPERM, **environ: str) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter said that ran `body` without io_uring."""
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", SCRIPT.format(number=number, body=body), path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)]), **environ},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(autouse=True)
def _can_deny() -> None:
    if not can_deny_io_uring():
        pytest.skip("this machine's system call numbers are not known")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("body", ["", FALLS_BACK, PLAIN, ASYNCIO], ids=["import", "choice", "plain", "asyncio"])
def test_works_without_io_uring(scratch: Path, body: str, number: int) -> None:
    """Import, choice of the ring, the plain file and asyncio, whatever the filter answers (F53)."""
    done = run_denied(body, data_file(scratch / "file", b""), number)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_io_uring_that_is_demanded_is_an_error(scratch: Path) -> None:
    """With ODIRECT_RING=io_uring there is no silent fallback: the error names the variable and the reason."""
    body = "with odirect.open(path, 'w') as file: file.pwrite(b'x', 1)"
    done = run_denied(body, scratch / "file", ODIRECT_RING="io_uring")
    assert done.returncode == 1
    assert "ODIRECT_RING=io_uring" in done.stderr and "Error" in done.stderr


def test_denied_while_it_is_running(scratch: Path) -> None:
    """A filter that comes after io_uring was found: the next ring is one of threads."""
    script = """
import sys, threading
import odirect
from odirect.ring.choose import available, open_ring, thread_ring
had = available().io_uring
from tests.seccomp import deny_io_uring
deny_io_uring()
def work():
    assert open_ring().kind == thread_ring().kind == "threads"
    with odirect.open(sys.argv[1], "w+") as file:
        assert file.pwrite(b"x" * 5000, 3) == 5000
        assert file.pread(5000, 3) == b"x" * 5000
    print("done")
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, scratch / "file"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
