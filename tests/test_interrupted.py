"""Signals' handlers that raise anywhere: a call is left, and nothing that a device has given is lost (F24)."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

_COMMON = """
import os, random, signal, sys, threading
import odirect

class Stop(Exception):
    pass

armed = False
hits = 0

def handle(number, frame):
    global hits
    if armed:
        hits += 1
        raise Stop

rng = random.Random(int(sys.argv[1]))
signal.signal(signal.SIGALRM, handle)

def arm():
    global armed
    armed = True
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 4e-4))

path, wanted = sys.argv[2], int(sys.argv[3])
with open(path, "rb") as plain:
    content = plain.read()
"""

_SUBMITTED = (
    _COMMON
    + """
buffers = [odirect.empty(8192) for _ in range(16)]
file = odirect.open(path)
turn = 0
while hits < wanted:
    turn += 1
    tried, begun, seen = (), (), ()
    try:
        arm()
        for number, buffer in enumerate(buffers):
            offset = rng.randrange(len(content) - 8192)
            if number % 4:
                offset = offset // 4096 * 4096
            # No call behind these: a handler sees them done or not.
            tried += (number,)
            file.submit("read", offset, buffer, (turn, number))
            begun += (number,)
        for request in file.completions():
            seen += (request,)
    except Stop:
        pass
    more = True
    while more:
        try:
            arm()
            for request in file.completions():
                seen += (request,)
            more = armed = False
        except Stop:
            pass
    numbers = [request.tag[1] for request in seen]
    assert len(set(numbers)) == len(numbers), "a request was given out twice"
    assert set(begun) <= set(numbers) <= set(tried), "a request was lost"
    for request in seen:
        assert request.tag[0] == turn and request.result() == 8192
        assert request.buffer == content[request.offset : request.offset + 8192]
    offset = rng.randrange(len(content) - 5000)
    try:
        arm()
        data = file.pread(5000, offset)
        armed = False
        assert data == content[offset : offset + 5000]
    except Stop:
        armed = False
assert list(file.completions()) == []
file.close()
print("whole")
"""
)

_SHARED = (
    _COMMON
    + """
from odirect.block.bio import READ, Bio
from odirect.block.queue import RingQueue
from odirect.dio.blockdev import run
from odirect.ring.choose import open_ring
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.locks import Mutex
from odirect.sched.scheduler import Cancelled, Scheduler
from odirect.sched.traps import gather, sleep_ns

fd = os.open(path, os.O_RDONLY)
queue = RingQueue(open_ring(64, shared=True))
scheduler = Scheduler()
scheduler.add_device(queue)
driver = SyncDriver(scheduler)
mutex = Mutex()
errors = []
over = False

class Device:
    def submit(self, bio):
        queue.submit(READ, fd, bio, 0)

device = Device()

async def read(offset):
    view = odirect.empty(512)
    bio = Bio(READ, offset, (view,), 512)
    await run(device, bio)
    assert bio.done_bytes == 512 and view == content[offset : offset + 512]

async def work(rng):
    offset = rng.randrange(len(content) - 512)
    if rng.random() < 0.3:
        with await mutex.hold():
            await read(offset)
    elif rng.random() < 0.3:
        await sleep_ns(rng.randrange(100_000))
    else:
        await gather(*[scheduler.spawn(read(offset)) for _ in range(3)])

def other(seed):
    rng = random.Random(seed)
    try:
        while not over:
            driver.run(work(rng))
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=other, args=(seed,)) for seed in range(2)]
for thread in threads:
    thread.start()
while hits < wanted and not errors:
    try:
        arm()
        driver.run(work(rng))
        armed = False
    except Stop:
        armed = False
    except Cancelled:
        raise AssertionError("a cancellation came out in place of what the handler raised")
over = True
for thread in threads:
    thread.join(30)
    assert not thread.is_alive(), "a thread has been forgotten"
assert not errors, errors
driver.run(read(0))
assert not driver._line and driver._watch is None and mutex.idle
# A second signal leaves at once; what it left behind ends now.
driver.wait_until(lambda: not queue.in_flight)
queue.close()
print("whole")
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("script", [_SUBMITTED, _SHARED], ids=["submitted", "shared"])
@pytest.mark.parametrize("seed", [1, 2])
def test_handlers_that_raise_at_thousands_of_points_lose_nothing(scratch: Path, script: str, seed: int) -> None:
    """Timers whose handler raises, over requests of `submit`, calls, and one scheduler that threads share (F24)."""
    path = scratch / "file"
    path.write_bytes(random.Random(seed).randbytes(1 << 20))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "faulthandler", "-c", script, str(seed), path, "1500"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
