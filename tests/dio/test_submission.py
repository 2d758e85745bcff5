"""`Submission` over a starter of the test's own: what a file in a volume will give."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from odirect.block.bio import READ, Bio
from odirect.block.buffers import empty
from odirect.block.memory import MemoryDevice
from odirect.dio.blockdev import transfer
from odirect.dio.outcome import Kind, Outcome
from odirect.dio.requests import Request
from odirect.dio.submission import Submission
from odirect.sched.drive_sync import SyncDriver
from odirect.sched.scheduler import Scheduler

SIZE = 64 << 10


class Tasks:
    """Starts every request as a task on a scheduler that others use, too."""

    def __init__(self, scheduler: Scheduler, device: MemoryDevice, notify: Callable[[Request], None]) -> None:
        self.scheduler = scheduler
        self.device = device
        self.notify = notify
        self.pending = 0
        self.sizes: list[int] = []

    def start_now(self, op: int, offset: int, buffer: object, tag: object) -> Request | None:
        return None

    def collect(self, finished: collections.deque[Request]) -> bool:
        return False

    def resized(self, size: int) -> None:
        self.sizes.append(size)

    def start_task(self, op: int, offset: int, buffer: object, tag: object) -> Request:
        view = memoryview(buffer)  # type: ignore[arg-type]
        request = Request(None, op, offset, len(view), buffer, tag)  # type: ignore[arg-type]
        self.pending += 1
        self.scheduler.spawn(self.move(request, view))
        return request

    async def move(self, request: Request, view: memoryview) -> None:
        request.transferred = await transfer(self.device, request.op, request.offset, [view], len(view))
        request.outcome, request.exception = Outcome(Kind.DIRECT), None
        self.pending -= 1
        self.notify(request)


class Setting:
    def __init__(self) -> None:
        self.data = bytes(number % 251 for number in range(SIZE))
        self.device = MemoryDevice(SIZE, data=self.data)
        self.scheduler = Scheduler()
        self.scheduler.add_device(self.device)
        self.driver = SyncDriver(self.scheduler)
        self.made: list[Tasks] = []
        self.told: list[Request] = []
        self.released: list[bool] = []

    def submission(self) -> Submission:
        def make(notify: Callable[[Request], None]) -> Tasks:
            self.made.append(Tasks(self.scheduler, self.device, notify))
            return self.made[-1]

        def check(op: int) -> None:
            if op != READ:
                raise PermissionError("it may only be read")

        return Submission(self.driver, make, check=check, tell=self.told.append, release=self.released.append)


@pytest.fixture
def setting() -> Iterator[Setting]:
    it = Setting()
    yield it
    it.driver.close()
    it.device.close()


def test_requests_of_several_threads_on_one_scheduler(setting: Setting) -> None:
    """B07: each thread has a submission of its own, and gets its own requests, each once."""
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            submission = setting.submission()
            for turn in range(20):
                for number in range(8):
                    submission.submit("read", (first + number) * 512, empty(512), (first, turn, number))
                seen: list[Any] = []
                for request in submission.completions():
                    start = request.offset
                    assert request.buffer == setting.data[start : start + 512]
                    seen.append(request.tag)
                assert sorted(seen) == [(first, turn, number) for number in range(8)]
            submission.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert errors == [] and len(setting.told) == 4 * 20 * 8 and setting.released == [True] * 4


def test_what_may_not_be_and_what_was_cut(setting: Setting) -> None:
    """The file's own check comes before anything is started; its size is passed on."""
    submission = setting.submission()
    with pytest.raises(PermissionError):
        submission.submit("write", 0, empty(512), None)
    with pytest.raises(ValueError, match="'copy'"):
        submission.submit("copy", 0, empty(512), None)
    submission.resized(7)
    assert setting.made[0].pending == 0 and setting.made[0].sizes == [7]
    assert list(submission.completions()) == []


def test_settle_and_close(setting: Setting) -> None:
    """What `settle` waited for is given out later; what `close` waited for is dropped."""
    submission = setting.submission()
    first = submission.submit("read", 0, empty(512), 1)
    submission.settle()
    assert first.done and list(submission.completions()) == [first]
    second = submission.submit("read", 0, empty(512), 2)
    submission.close()
    assert second.done and setting.released == [True]


def test_a_bio_is_not_gathered_as_a_request(setting: Setting) -> None:
    """A starter's answer False to `collect` means the driver, whatever else is in flight there."""
    submission = setting.submission()
    request = submission.submit("read", 512, empty(512), None)
    stranger = Bio(READ, 0, (empty(512),), 512)
    setting.device.submit(stranger)
    assert list(submission.completions()) == [request]
