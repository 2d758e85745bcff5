"""One scheduler over a real ring, shared by several threads: entry is serialised, waiting is not."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from odirect.block.bio import READ, Bio
from odirect.block.buffers import empty
from odirect.block.queue import RingQueue
from odirect.dio.blockdev import run
from odirect.ring.choose import open_ring
from odirect.ring.contract import READ as RING_READ
from odirect.ring.threads import _Operation
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.locks import Mutex, RangeLock
from odirect.sched.scheduler import Scheduler
from odirect.sched.traps import Event, gather, joined, shielded, sleep_ns, wait

BLOCK = 512
BLOCKS = 2048
#: Longer than anything here takes; whoever waits that long has been forgotten.
PATIENCE = 30


class Silent:
    """A device that has one thing in flight, which never comes by itself."""

    def __init__(self, *, descriptor: bool) -> None:
        self.in_flight = 0
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if descriptor else None
        self.polled = threading.Event()

    def commit(self) -> None:
        """Nothing is queued here."""

    def poll(self, timeout_ns: int) -> list[Any]:
        self.polled.set()
        if timeout_ns < 0:
            raise AssertionError("waited for alone, it would be for ever")
        return []

    def wakeup_fd(self) -> int | None:
        return self.fd

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


class Setting:
    """A file, a shared ring and one driver."""

    def __init__(self, path: Path, workers: int | None = None) -> None:
        self.content = random.Random(7).randbytes(BLOCK * BLOCKS)
        path.write_bytes(self.content)
        self.fd = os.open(path, os.O_RDONLY)
        self.ring = open_ring(64, shared=True, workers=workers)
        self.queue = RingQueue(self.ring)
        self.scheduler = Scheduler()
        self.scheduler.add_device(self.queue)
        self.driver = SyncDriver(self.scheduler)
        self.pipe, self.inlet = os.pipe()
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    # A `BlockDevice`, as far as `run` needs one.

    def submit(self, bio: Bio) -> None:
        self.queue.submit(RING_READ, self.fd, bio, 0)

    async def read(self, block: int) -> None:
        view = empty(BLOCK)
        bio = Bio(READ, block * BLOCK, (view,), BLOCK)
        await run(self, bio)  # type: ignore[arg-type]
        if bio.done_bytes != BLOCK or view != self.content[block * BLOCK : (block + 1) * BLOCK]:
            raise AssertionError(f"block {block}: {bio}")

    async def never(self) -> None:
        """Wait for what comes only when the test says so: a read of a pipe."""
        bio = Bio(READ, 0, (memoryview(bytearray(1)),), 1)
        event = Event()
        bio.end = event.fire
        self.queue.submit(RING_READ, self.pipe, bio, 0)
        await shielded(event)

    def let_go(self) -> None:
        os.write(self.inlet, b"x")

    def start(self, call: Callable[[], object]) -> threading.Thread:
        def work() -> None:
            try:
                call()
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def join(self, *threads: threading.Thread) -> None:
        for thread in threads or self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a thread has been forgotten"
        assert self.errors == []

    def until(self, happened: Callable[[], object]) -> None:
        turns = threading.Event()
        for _ in range(PATIENCE * 1000):
            if happened():
                return
            turns.wait(0.001)
        raise AssertionError("it never came to that")

    def close(self) -> None:
        self.let_go()
        self.join()
        self.queue.close()
        self.driver.close()
        for fd in (self.fd, self.pipe, self.inlet):
            os.close(fd)


@pytest.fixture
def setting(scratch: Path) -> Iterator[Setting]:
    it = Setting(scratch / "file")
    yield it
    it.close()


@pytest.fixture
def endless(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A setting whose ring can wait for a pipe: preadv(2), unlike io_uring, wants something that has offsets."""
    usual = _Operation.execute

    def execute(operation: _Operation) -> int:
        if operation.handle == setting.pipe:
            return os.readv(operation.handle, operation.segments)
        return usual(operation)

    monkeypatch.setattr(_Operation, "execute", execute)
    return setting


def test_thousands_of_reads_of_four_threads(setting: Setting) -> None:
    """Each gets its own bytes; nobody is forgotten, and nothing is left."""

    def work(seed: int) -> None:
        rng = random.Random(seed)

        async def some(number: int) -> None:
            for _ in range(number):
                await setting.read(rng.randrange(BLOCKS))

        async def many() -> None:
            await gather(*[setting.scheduler.spawn(some(10)) for _ in range(8)])

        for _ in range(20):
            setting.driver.run(many())
            for _ in range(10):
                setting.driver.run(setting.read(rng.randrange(BLOCKS)))

    for seed in range(4):
        setting.start(lambda seed=seed: work(seed))  # type: ignore[misc]
    setting.join()
    assert setting.queue.in_flight == 0
    assert not setting.driver._line and setting.driver._watch is None


def test_tasks_that_wait_for_locks_of_other_threads_tasks(setting: Setting) -> None:
    """A lock is given on by whoever runs the task that holds it; the one who gets it finds its I/O handed over."""
    mutex, ranges = Mutex(), RangeLock()
    inside: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)

        async def exclusive() -> None:
            with await mutex.hold():
                inside.append(seed)
                await setting.read(rng.randrange(BLOCKS))
                assert inside == [seed]
                inside.clear()

        async def in_a_range() -> None:
            start = rng.randrange(8)
            with await ranges.hold(start, rng.randrange(1, 8), shared=rng.random() < 0.5):
                await setting.read(start)
                await sleep_ns(rng.randrange(100_000))

        for _ in range(250):
            setting.driver.run(exclusive() if rng.random() < 0.5 else in_a_range())

    for seed in range(4):
        setting.start(lambda seed=seed: work(seed))  # type: ignore[misc]
    setting.join()
    assert mutex.idle and ranges.idle


def test_an_alarm_beside_io_that_never_comes(endless: Setting) -> None:
    """Whoever polls for ever does not keep a later thread's alarm from ringing."""
    poller = endless.start(lambda: endless.driver.run(endless.never()))
    endless.until(lambda: endless.driver._watch is not None)
    endless.driver.run(sleep_ns(2_000_000))
    endless.driver.run(endless.read(5))
    assert poller.is_alive()
    endless.let_go()
    endless.join(poller)


def test_an_alarm_that_is_left_behind(endless: Setting) -> None:
    """A task that outlives the call which began it: its alarm is the poller's to wait for from then on."""
    rang = []

    async def later() -> None:
        await sleep_ns(2_000_000)
        rang.append(True)

    async def begin() -> None:
        endless.scheduler.spawn(later())

    poller = endless.start(lambda: endless.driver.run(endless.never()))
    endless.until(lambda: endless.driver._watch is not None)
    endless.driver.run(begin())
    endless.until(lambda: rang)
    assert poller.is_alive()
    endless.let_go()
    endless.join(poller)


def test_a_poller_whose_task_another_thread_ends(endless: Setting) -> None:
    """It leaves at once, although what is in flight never comes by itself, and hands its duty on."""
    event = Event()
    left = endless.scheduler.spawn(endless.never())
    poller = endless.start(lambda: endless.driver.run(wait(event)))
    endless.until(lambda: endless.driver._watch is not None)
    other = endless.start(lambda: endless.driver.run(joined(left)))
    endless.until(lambda: endless.driver._line)

    async def fire() -> None:
        event.fire()

    endless.driver.run(fire())
    endless.join(poller)
    assert other.is_alive() and not left.done
    endless.driver.run(endless.read(3))
    endless.let_go()
    endless.join(other)


def test_io_that_a_passer_by_began_for_the_poller(endless: Setting) -> None:
    """Who leaves hands over first what his turn has made other threads' tasks queue."""
    mutex = Mutex()
    held = mutex.try_hold()
    assert held is not None
    left = endless.scheduler.spawn(endless.never())

    async def locked() -> None:
        with await mutex.hold():
            await endless.read(9)

    poller = endless.start(lambda: endless.driver.run(locked()))
    endless.until(lambda: endless.driver._watch is not None)

    async def release() -> None:
        held.release()

    endless.driver.run(release())
    endless.join(poller)
    assert not left.done
    endless.let_go()
    endless.driver.run(joined(left))


@pytest.mark.parametrize("descriptor", [True, False])
def test_a_second_device_that_is_silent(setting: Setting, descriptor: bool) -> None:
    """Several devices, one of which has something in flight for ever: nobody's I/O on the other waits for it."""
    silent = Silent(descriptor=descriptor)
    silent.in_flight = 1
    with setting.driver.lock:
        setting.scheduler.add_device(silent)
    try:
        event = Event()
        if descriptor:
            # Once there has been more than one thread, a device with a descriptor is not waited in for ever.
            setting.driver._several = True
            poller = setting.start(lambda: setting.driver.run(wait(event)))
            setting.until(lambda: setting.driver._watch is not None and silent.polled.is_set())

        def work() -> None:
            for block in range(100):
                setting.driver.run(setting.read(block))

        threads = [setting.start(work) for _ in range(3)]
        setting.join(*threads)
        if descriptor:
            assert poller.is_alive()

            async def fire() -> None:
                event.fire()

            setting.driver.run(fire())
            setting.join(poller)
    finally:
        with setting.driver.lock:
            setting.scheduler.remove_device(silent)
        silent.close()


def test_a_device_that_gets_busy_while_another_is_waited_for(endless: Setting, scratch: Path) -> None:
    """The poller looks at one ring for ever; what a second thread sends to the other one is polled, too."""
    other = Setting(scratch / "other")
    with endless.driver.lock:
        endless.scheduler.add_device(other.queue)
    poller = endless.start(lambda: endless.driver.run(endless.never()))
    endless.until(lambda: endless.driver._watch is not None)
    for block in range(50):
        endless.driver.run(other.read(block))
    assert poller.is_alive()
    endless.let_go()
    endless.join(poller)
    with endless.driver.lock:
        endless.scheduler.remove_device(other.queue)
    other.close()
