"""`odirect.aio`: many requests in flight, and what asyncio does to them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import gc
import os
import random
import threading
import tracemalloc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.files import DirectReader, cut_short, data_file, filled

import odirect
from odirect import Kind, aio
from odirect.base.errors import (
    AlignmentError,
    BadBufferError,
    ClosedError,
    DirectoryError,
    MissingError,
    NoSpaceError,
    NotDirectError,
    StickySyncError,
)
from odirect.ring.threads import _Operation

SIZE = 1 << 20


@pytest.fixture
def content() -> bytes:
    return random.Random(2).randbytes(SIZE)


@pytest.fixture
def path(scratch: Path, content: bytes) -> Path:
    return data_file(scratch / "file", content)


def test_a_thousand_reads_in_flight(path: Path, content: bytes) -> None:
    """More requests at once than the ring is deep, of every alignment: each gets its bytes, once (B07)."""
    rng = random.Random(3)
    places = [rng.randrange(SIZE // 512 - 16) * 512 for _ in range(800)]
    places += [rng.randrange(SIZE - 8192) for _ in range(200)]

    async def main() -> None:
        async with aio.open(path) as file:
            buffers = [odirect.empty(4096) for _ in places]
            counts = await asyncio.gather(
                *(file.preadinto(buffer, place) for buffer, place in zip(buffers, places, strict=True))
            )
            assert counts == [4096] * 1000
            for buffer, place in zip(buffers, places, strict=True):
                assert bytes(buffer) == content[place : place + 4096]
            assert sum(tally.operations for tally in file.totals.values()) == 1000
            assert sum(tally.bytes for tally in file.totals.values()) == 1000 * 4096

    asyncio.run(main())


def test_every_verb(scratch: Path) -> None:
    """Open, write, read, vectors, truncate, fallocate, sync, and what it says of itself."""
    path = scratch / "new"

    async def main() -> None:
        file = await aio.open(path, "w+")
        async with file:
            assert await file.pwrite(filled(4096, 1), 0) == 4096
            assert await file.pwrite(b"\x02" * 100, 4096) == 100
            assert await file.pwritev([b"\x03" * 10, filled(512, 4), b""], 4196) == 522
            assert file.size == 4718
            first, second = bytearray(4096), bytearray(1000)
            assert await file.preadv([first, second], 0) == 4718
            assert first == b"\x01" * 4096
            assert second == b"\x02" * 100 + b"\x03" * 10 + b"\x04" * 512 + bytes(378)
            assert await file.pread(20, 4190) == b"\x02" * 6 + b"\x03" * 10 + b"\x04" * 4
            assert await file.pread(10, 4718) == b""
            assert await file.truncate(4100) == 4100
            await file.fallocate(4100, 5000)
            assert file.size == 9100
            await file.fallocate(0, 4096, punch=True)
            await file.sync()
            await file.sync(data_only=True)
            assert await file.pread(5, 4095) == b"\x00\x02\x02\x02\x02"
            assert file.mode == "wb+" and file.name == os.fspath(path) and file.fileno() > 0
            assert file.limits.read_align >= 1
            assert file.last_outcome is not None
        assert file.closed
        await file.close()

    asyncio.run(main())
    assert path.read_bytes() == bytes(4096) + b"\x02" * 4 + bytes(5000)


def test_errors_are_those_of_the_plain_file(path: Path) -> None:
    """Missing, a directory, a wrong mode, not open for that, closed, bad arguments: the same classes (F53)."""

    async def main() -> None:
        with pytest.raises(MissingError):
            await aio.open(path.with_name("none"))
        with pytest.raises(DirectoryError):
            async with aio.open(path.parent):
                pass
        with pytest.raises(ValueError, match="mode"):
            await aio.open(path, "rt")
        with pytest.raises(ValueError, match="access"):
            aio.open(path, access="fast")  # type: ignore[arg-type]
        async with aio.open(path) as file:
            with pytest.raises(OSError, match="not opened for writing"):
                await file.pwrite(b"x", 0)
            with pytest.raises(ValueError):
                await file.preadinto(bytes(10), 0)
            with pytest.raises(ValueError, match="negative"):
                await file.preadinto(bytearray(10), -1)
            for call in (file.preadinto(bytearray(10), 0), file.preadv([bytearray(10)], 0)):
                assert await call == 10
            with pytest.raises(TypeError):
                await file.preadinto(bytearray(10), 0.5)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                await file.preadv([bytearray(10)], 0.5)  # type: ignore[arg-type]
        for late in (file.pread(1, 0), file.sync(), file.preadv([], 0)):
            with pytest.raises(ClosedError):
                await late
        with pytest.raises(ClosedError):
            await file.preadinto(bytearray(1), 0)
        async with aio.open(path, "r+") as file:
            with pytest.raises(NoSpaceError):
                await file.pwrite(b"xy", (1 << 63) - 2)
            with pytest.raises(ValueError):
                await file.truncate(-1)
            with pytest.raises(ValueError):
                await file.fallocate(0, 0)

    asyncio.run(main())


def test_memory_that_is_not_there(path: Path) -> None:
    """A mapping that was cut short is BadBufferError, aligned or bounced, to read or to write (F23)."""

    async def main() -> None:
        async with aio.open(path, "r+") as file:
            with cut_short(path.parent, 8192) as gone:
                for start, offset in ((4096, 0), (4096, 5), (4097, 0)):
                    buffer = gone[start : start + 2048]
                    for call in (file.preadinto, file.pwrite):
                        with pytest.raises(BadBufferError):
                            await call(buffer, offset)
                    with pytest.raises(BadBufferError):
                        await file.preadv([buffer], offset)

    asyncio.run(main())


@pytest.mark.slow
def test_a_storm_of_cancellations(path: Path, content: bytes) -> None:
    """Thousands of awaits are cancelled; no buffer is used again before the device has let go of it (F24).

    A buffer is refilled with a mark only when it is free, that is when nobody but the test refers
    to it; a late write by the device would destroy the mark.
    """

    async def main() -> None:
        rng = random.Random(4)
        cancelled = 0
        async with aio.open(path) as file:
            for _ in range(60):
                tasks = []
                for _ in range(50):
                    shift = rng.choice((0, 0, 0, 1))
                    place = rng.randrange(SIZE - 16384) // 4096 * 4096 + shift
                    buffer = bytearray(8192) if shift else odirect.empty(8192)

                    async def one(buffer: object, place: int) -> None:
                        assert await file.preadinto(buffer, place) == 8192
                        assert bytes(buffer) == content[place : place + 8192]  # type: ignore[call-overload]

                    tasks.append(asyncio.ensure_future(one(buffer, place)))
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
                for task in tasks:
                    if rng.random() < 0.8:
                        task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    cancelled += isinstance(result, asyncio.CancelledError)
                    assert result is None or isinstance(result, asyncio.CancelledError)
        assert cancelled > 1000

    asyncio.run(main())


def test_a_cancelled_read_keeps_its_buffer(path: Path, content: bytes) -> None:
    """The caller is cancelled and lets go of his buffer: it lives until the device has filled it (F24)."""

    class Watched(bytearray):
        pass

    async def main() -> None:
        async with aio.open(path) as file:
            for offset in (0, 1):
                buffer = Watched(4096)
                weak = weakref.ref(buffer)
                read = asyncio.ensure_future(file.preadinto(buffer, offset))
                del buffer
                read.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await read
                assert weak() is not None, "given up while the device has it"
                while (seen := weak()) is not None and bytes(seen) != content[offset : offset + 4096]:
                    del seen
                    await asyncio.sleep(0)
                seen = None
                assert await file.pread(1, 0) == content[:1]

    asyncio.run(main())


def test_close_waits_for_cancelled_callers(path: Path) -> None:
    """Reads whose callers were cancelled are over when `close` returns (F24)."""

    async def main() -> None:
        file = await aio.open(path, "r+")
        for number in range(200):
            if number % 3:
                waiting: asyncio.Future[int] = file.preadinto(odirect.empty(4096), number * 4096)
            elif number % 2:
                waiting = asyncio.ensure_future(file.preadv([odirect.empty(4096)], number * 4096))
            else:
                waiting = file.pwrite(filled(100, 7), number * 4096 + 1)
            await asyncio.sleep(0)
            waiting.cancel()
        await file.close()
        assert file._requests.pending == 0 and file._in_flight.busy.value == 0
        with pytest.raises(ClosedError):
            file.fileno()

    asyncio.run(main())


def test_close_that_is_cancelled_goes_on(path: Path) -> None:
    """Cancelling `close` does not keep the file open (F24)."""

    async def main() -> None:
        file = await aio.open(path)
        reads = [file.preadinto(odirect.empty(4096), number * 4096) for number in range(100)]
        closing = asyncio.ensure_future(file.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await asyncio.gather(*reads)
        while file._opened.cached_fd >= 0:
            await asyncio.sleep(0)

    asyncio.run(main())


def test_close_waits_for_the_thread_that_truncates(path: Path) -> None:
    """A cancelled `truncate` whose thread has not begun must not cut a file that gets the number next (F24)."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
        file = await aio.open(path, "r+")
        hold = threading.Event()
        blocked = loop.run_in_executor(None, hold.wait)
        truncating = asyncio.ensure_future(file.truncate(100))
        await asyncio.sleep(0)
        truncating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await truncating
        closing = asyncio.ensure_future(file.close())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not closing.done(), "closed with a thread about to truncate"
        hold.set()
        await closing
        await blocked
        assert path.stat().st_size in (100, SIZE)

    asyncio.run(main())


def test_open_that_is_cancelled_leaves_nothing_open(path: Path) -> None:
    """The thread that opens goes on, and what it opened is closed (F24); the descriptor check is the proof."""

    async def main() -> None:
        for _ in range(50):
            opening = asyncio.ensure_future(aio.open(path).__aenter__())
            await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening

    asyncio.run(main())
    gc.collect()


def test_two_loops_one_after_the_other(path: Path, content: bytes) -> None:
    """Each loop has a ring of its own, which goes with its last file."""

    async def main() -> bytes:
        async with aio.open(path) as one, aio.open(path) as other:
            assert one._pump is other._pump
            await asyncio.gather(*(file.preadinto(odirect.empty(4096), 0) for file in (one, other)))
            return await one.pread(1000, 5)

    for _ in range(5):
        assert asyncio.run(main()) == content[5:1005]
    assert not aio._pumps


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_loop_that_is_closed_with_the_file_open(path: Path, in_flight: bool) -> None:
    """No crash, and nothing stays open once all of it is collected (F24); the descriptor check is the proof."""

    async def main() -> aio.File:
        file = await aio.open(path, "r+")
        await file.preadinto(odirect.empty(4096), 0)
        await file.pwrite(b"x" * 10, 1)
        if in_flight:
            for number in range(50):
                file.preadinto(odirect.empty(4096), number * 4096)
                file.pwrite(b"y" * 10, number * 4096 + 1)
        return file

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            file = asyncio.run(main())
            assert not file.closed
            weak = weakref.ref(file)
            del file
            gc.collect()
            while weak() is not None:  # a thread may still be busy with a write of it
                gc.collect()
    assert {entry.category for entry in caught} == {ResourceWarning}
    assert not aio._pumps


def test_closed_after_its_loop(path: Path) -> None:
    """`close` in a later loop gives everything back."""

    async def main() -> aio.File:
        return await aio.open(path)

    file = asyncio.run(main())
    asyncio.run(file.close())
    assert file.closed and file._opened.cached_fd < 0


def test_thrown_away_in_a_running_loop(path: Path) -> None:
    """A file that is forgotten is closed, with a ResourceWarning, and the others of its loop go on (F24)."""

    async def main() -> None:
        async with aio.open(path) as other:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                file = await aio.open(path)
                await file.preadinto(odirect.empty(4096), 0)
                opened = file._opened
                del file
                gc.collect()
            assert [entry.category for entry in caught] == [ResourceWarning]
            while opened.cached_fd >= 0:
                await asyncio.sleep(0)
            assert await other.preadinto(odirect.empty(4096), 0) == 4096

    asyncio.run(main())


def test_another_loop_may_not_use_it(path: Path) -> None:
    """A file belongs to the loop that opened it; others are told, and do no harm."""
    done = threading.Event()
    ready: concurrent.futures.Future[aio.File] = concurrent.futures.Future()

    async def owner() -> None:
        async with aio.open(path) as file:
            ready.set_result(file)
            while not done.is_set():
                assert await file.pread(10, 0)

    thread = threading.Thread(target=lambda: asyncio.run(owner()))
    thread.start()
    try:
        file = ready.result(30)

        async def stranger() -> None:
            for call in (lambda: file.preadinto(odirect.empty(4096), 0), file.close, file.sync):
                with pytest.raises(RuntimeError, match=r"loop|thread"):
                    await call()  # type: ignore[operator]

        asyncio.run(stranger())
    finally:
        done.set()
        thread.join()


def test_debug_mode(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's debug mode finds nothing: no call from a wrong thread, nothing forgotten."""

    async def main() -> None:
        asyncio.get_running_loop().slow_callback_duration = 30
        async with aio.open(path, "r+") as file:
            await asyncio.gather(*(file.preadinto(odirect.empty(4096), number * 4096) for number in range(64)))
            await asyncio.gather(*(file.pwrite(b"z" * 100, number * 8192 + 5) for number in range(64)))
            await file.truncate(SIZE // 2)
            await file.sync()

    asyncio.run(main(), debug=True)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_the_kernel_is_choosier_than_it_said(path: Path, content: bytes) -> None:
    """What is refused in mid-flight finds its way through the page cache, and close ends (F50)."""

    async def main() -> None:
        async with aio.open(path, "r+") as file:
            file._state.limits = dataclasses.replace(file.limits, read_align=1, write_align=1, memory_align=1)
            buffer = bytearray(1000)
            async with asyncio.timeout(30):
                assert await file.pwrite(b"z" * 100, 10) == 100
                assert await file.preadinto(buffer, 3) == 1000
            assert file.limits.read_align > 1
            assert buffer == content[3:10] + b"z" * 100 + content[110:1003]

    asyncio.run(main())


def test_refused_at_open(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_DIRECT is refused everything is buffered and says so, and strict raises (F50)."""
    real = os.open

    def refusing(name: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)

    async def main() -> None:
        with pytest.raises(NotDirectError):
            await aio.open(path, access="strict")
        async with aio.open(path, "r+") as file:
            assert await file.pwrite(b"q" * 5000, 3) == 5000
            buffers = [bytearray(4096) for _ in range(40)]
            await asyncio.gather(*(file.preadinto(buffer, 8192) for buffer in buffers))
            assert all(buffer == content[8192 : 8192 + 4096] for buffer in buffers)
            assert {outcome.kind for outcome in file.totals} == {Kind.BUFFERED}

    asyncio.run(main())


def test_a_truncated_file_is_not_read_past_its_end(path: Path, content: bytes) -> None:
    """After a truncate through the file the memory past the count is left alone, also if that was cancelled (F02)."""

    async def main() -> None:
        for cancel in (False, True):
            data_file(path, content)
            async with aio.open(path, "r+") as file:
                await file.preadinto(odirect.empty(4096), 0)
                truncating = asyncio.ensure_future(file.truncate(5000))
                if cancel:
                    await asyncio.sleep(0)
                    truncating.cancel()
                    while file._in_flight.busy.value:
                        await asyncio.sleep(0)
                else:
                    await truncating
                buffer = filled(8192, 0xA5)
                assert await file.preadinto(buffer, 0) == 5000
                assert bytes(buffer) == content[:5000] + b"\xa5" * 3192

    asyncio.run(main())


def test_neighbours_that_share_a_block(scratch: Path) -> None:
    """Concurrent writes of any alignment that share blocks and no byte: none fails, and none is undone (F10, F13)."""
    rng = random.Random(6)
    size = 32 << 10

    async def main() -> None:
        for _ in range(40):
            path = data_file(scratch / "file", bytes(size))
            cuts = sorted({0, size, *(rng.randrange(size) // unit * unit for unit in (1, 512) for _ in range(12))})
            runs = list(zip(cuts, cuts[1:], range(1, 100), strict=False))
            shuffled = rng.sample(runs, len(runs))
            async with aio.open(path, "r+") as file:
                await asyncio.gather(*(file.pwrite(filled(end - at, value), at) for at, end, value in shuffled))
            expected = b"".join(bytes([value]) * (end - at) for at, end, value in runs)
            assert path.read_bytes() == expected
            assert data_file(path).read_bytes() == expected

    asyncio.run(main())


def test_growing_in_order(scratch: Path) -> None:
    """Concurrent appends at known offsets: below the size that is seen there is never a hole (F03)."""
    path = scratch / "new"

    async def main() -> None:
        async with aio.open(path, "w+") as file:
            step = 5000
            writes = [asyncio.ensure_future(file.pwrite(filled(step, 9), number * step)) for number in range(60)]
            beside = DirectReader(path)
            while not all(write.done() for write in writes):
                size = beside.size
                assert beside.read(0, size) == b"\x09" * size
                await asyncio.sleep(0)
            beside.close()
            assert [write.result() for write in writes] == [step] * 60

    asyncio.run(main())
    assert path.read_bytes() == b"\x09" * 300_000


def test_sticky_sync(path: Path) -> None:
    """After a sync has failed, syncs and durable writes fail until the file is reopened (F41)."""

    async def main() -> None:
        async with aio.open(path, "r+", dsync=True) as file:
            file._state.failed_sync = "it failed"
            for offset in (0, 5):
                with pytest.raises(StickySyncError):
                    await file.pwrite(odirect.empty(4096), offset)
            with pytest.raises(StickySyncError):
                await file.sync()
        async with aio.open(path, "r+", dsync=True) as file:
            assert await file.pwrite(odirect.empty(4096), 0) == 4096

    asyncio.run(main())


def test_threads_leave_the_loop_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without io_uring a slow device blocks a thread, not the event loop (F53)."""
    monkeypatch.setenv("ODIRECT_RING", "threads")
    free = threading.Event()
    execute = _Operation.execute

    def slow(operation: _Operation) -> int:
        if not free.wait(30):
            raise AssertionError("the event loop itself was blocked")
        return execute(operation)

    monkeypatch.setattr(_Operation, "execute", slow)

    async def main() -> None:
        async with aio.open(path) as file:
            read = file.preadinto(odirect.empty(4096), 0)
            for _ in range(10):
                await asyncio.sleep(0)
            assert not read.done()
            free.set()
            assert await read == 4096

    asyncio.run(main())


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.slow
def test_nothing_is_kept_of_finished_requests(path: Path, traced: None) -> None:
    """Ten thousand reads leave no memory behind."""

    async def main() -> None:
        async with aio.open(path) as file:
            buffers = [odirect.empty(4096) for _ in range(100)]

            async def round_of_reads() -> None:
                await asyncio.gather(*(file.preadinto(buffer, 4096 * n) for n, buffer in enumerate(buffers)))
                await asyncio.gather(*(file.preadinto(buffer, 4096 * n + 1) for n, buffer in enumerate(buffers[:10])))

            for _ in range(5):
                await round_of_reads()
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(100):
                await round_of_reads()
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - before < 100_000

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 512, 1000, 100_000])
def test_strict_reads_up_to_the_end(scratch: Path, size: int) -> None:
    """Strict access asks for the last block whole, as the kernel takes it, wherever the file ends (B01, F02)."""
    content = random.Random(size).randbytes(size)
    path = data_file(scratch / "file", content)

    async def main() -> None:
        async with aio.open(path, access="strict") as file:
            unit = file.limits.read_align
            last = (size - 1) // unit * unit
            assert await file.pread(4096, last) == content[last : last + 4096]
            assert await file.pread(1 << 50, 0) == content
            assert await file.pread(unit, size + 1) == b""
            assert await file.preadinto(odirect.empty(4096), size + 1) == 0
            if size % unit:
                with pytest.raises(AlignmentError):
                    await file.pread(unit + 1, last)
            if size > 1 and unit > 1:
                with pytest.raises(AlignmentError):
                    await file.pread(unit, 1)

    asyncio.run(main())


def test_a_descriptor_for_others(path: Path, content: bytes) -> None:
    """fileno takes any length at any offset, as others expect of a descriptor (G07)."""

    async def main() -> None:
        async with aio.open(path) as file:
            assert os.pread(file.fileno(), 777, 333) == content[333:1110]

    asyncio.run(main())
