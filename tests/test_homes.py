"""Plain files on every file system that is at hand, and block devices: the same bytes, and honest outcomes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.files import cached_pages, data_file, filled
from tests.loops import loop_device, made_image, mounted, needs_filesystem, needs_root, run
from tests.verbs import READ_VERBS, WRITE_VERBS, verb_name

import odirect
from odirect import Kind, Promise, Reason, aio
from odirect.base.errors import (
    ForbiddenError,
    InUseError,
    NoSpaceError,
    NotDirectError,
    ReadOnlyError,
    UnsupportedError,
    WouldBlockError,
)


class Home(NamedTuple):
    """Where a file lives, and what aligned reads and writes of it are to be there."""

    directory: Path
    reads: Kind
    writes: Kind
    in_memory: bool = False


@contextlib.contextmanager
def home(name: str, scratch: Path) -> Iterator[Home]:
    """The home of this name; skips the test where it cannot be made."""
    direct, buffered = Kind.DIRECT, Kind.BUFFERED
    with contextlib.ExitStack() as stack:
        if name == "tmpfs":
            yield Home(stack.enter_context(mounted("odirect-test", "tmpfs", "size=64m")), buffered, buffered, True)
        elif name == "overlay":
            below = Home(scratch, direct, direct)
            for part in ("lower", "upper", "work", "merged"):
                (scratch / part).mkdir()
            (scratch / "lower" / "file").write_bytes(b"lower")
            layers = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"
            needs_root()
            needs_filesystem("overlay")
            run("mount", "-t", "overlay", "-o", layers, "overlay", scratch / "merged")
            stack.callback(run, "umount", scratch / "merged")
            yield below._replace(directory=scratch / "merged")
        else:
            kind, _, variant = name.partition("-")
            mkfs = {"1k": ("-b", "1024"), "4k sectors": ()}.get(variant, ())
            sector = 4096 if variant == "4k sectors" else 512
            image = stack.enter_context(made_image(kind, directory=scratch, mkfs=mkfs, sector=sector))
            options = {"journal": "data=journal", "nodatacow": "nodatacow"}.get(variant, "")
            directory = stack.enter_context(mounted(image, kind, options, sector=sector))
            if variant == "journal":
                yield Home(directory, buffered, buffered)
            elif kind == "btrfs" and not variant:
                yield Home(directory, direct, buffered if _kernel() >= (6, 15) else direct)
            else:
                yield Home(directory, direct, direct)


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(itertools.takewhile(str.isdigit, minor)))


HOMES = (
    "tmpfs",
    "overlay",
    "ext4",
    "ext4-1k",
    "ext4-4k sectors",
    "ext4-journal",
    "xfs",
    "xfs-4k sectors",
    "btrfs",
    "btrfs-nodatacow",
)


@pytest.fixture(params=HOMES)
def place(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Home]:
    with home(request.param, scratch) as found:
        yield found


def test_every_home(place: Home) -> None:
    """Sizes exact, bytes right, outcomes honest, and no page left, wherever a file lives (F02, F05, F50)."""
    path = place.directory / "file"
    content = random.Random(31).randbytes(200_001)
    data = odirect.empty(len(content))
    data[:] = content
    with odirect.open(path, "w+") as file:
        for start, end in ((0, 65536), (65536, 65537), (65537, 131072), (131072, 200_001)):
            assert file.pwrite(data[start:end], start) == end - start
            assert os.stat(path).st_size == end
        file.sync()
    assert path.read_bytes() == content
    data_file(path)
    with odirect.open(path, "r+") as file:
        buffer = odirect.empty(65536)
        assert file.preadinto(buffer, 0) == 65536 and bytes(buffer) == content[:65536]
        assert file.last_outcome is not None
        if place.reads is Kind.BUFFERED:
            assert file.last_outcome.kind is Kind.BUFFERED and file.last_outcome.reason is Reason.CACHED_BY_FS
        else:
            assert file.last_outcome.kind is Kind.DIRECT
        assert file.pwrite(buffer, 65536) == 65536
        assert file.last_outcome.kind is place.writes
        assert file.last_outcome.promise is Promise.DEVICE
        rng = random.Random(32)
        expected = bytearray(content)
        expected[65536:131072] = content[:65536]
        for verb in (*READ_VERBS, *WRITE_VERBS):
            for offset, length in ((4096, 4096), (5, 100), (4000, 9000), (200_000, 4096), (65_000, 70_000)):
                shift = rng.choice((0, 0, 1))
                memory = filled(length, rng.randrange(256), shift=shift)
                if verb in READ_VERBS:
                    count = verb(file, memory, offset)
                    assert count == max(0, min(length, len(expected) - offset)), (verb_name(verb), offset, length)
                    assert bytes(memory[:count]) == expected[offset : offset + count]
                else:
                    assert verb(file, memory, offset) == length
                    if offset + length > len(expected):
                        expected.extend(bytes(offset + length - len(expected)))
                    expected[offset : offset + length] = memory
        kinds = {outcome.kind for outcome in file.totals}
        assert (Kind.DIRECT in kinds) == (Kind.DIRECT in (place.reads, place.writes))
        file.sync()
    if not place.in_memory and place.reads is Kind.DIRECT:
        assert cached_pages(path) in (0, None)
    assert path.read_bytes() == expected
    assert data_file(path).read_bytes() == expected


def test_strict(place: Home) -> None:
    """strict does what is direct, and refuses by every verb what the file system would serve from its cache (F50)."""
    path = data_file(place.directory / "file", bytes(65536))
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(odirect.open(path, "r+", access="strict"))
        except NotDirectError:
            assert place.reads is place.writes is Kind.BUFFERED
            return
        for verbs, kind in ((READ_VERBS, place.reads), (WRITE_VERBS, place.writes)):
            for verb in verbs:
                buffer = odirect.empty(16384)
                if kind is Kind.DIRECT:
                    assert verb(file, buffer, 16384) == 16384
                else:
                    with pytest.raises(NotDirectError):
                        verb(file, buffer, 16384)
        assert all(outcome.kind is Kind.DIRECT for outcome in file.totals)

    async def main() -> None:
        async with aio.open(path, "r+", access="strict") as file:
            for call, kind in ((file.preadinto, place.reads), (file.pwrite, place.writes)):
                if kind is Kind.DIRECT:
                    assert await call(odirect.empty(4096), 4096) == 4096
                else:
                    with pytest.raises(NotDirectError):
                        await call(odirect.empty(4096), 4096)

    asyncio.run(main())


def test_nowait(place: Home) -> None:
    """nowait gives the bytes, or says that it would wait, or that this file system cannot tell (F08)."""
    content = random.Random(33).randbytes(65536)
    path = data_file(place.directory / "file", content)
    with odirect.open(path, "r+", nowait=True) as file:
        for verb in READ_VERBS[:2]:
            buffer = filled(16384, 0xA5)
            try:
                count = verb(file, buffer, 4096)
            except (WouldBlockError, UnsupportedError):
                count = 0
            assert bytes(buffer) == content[4096 : 4096 + count] + b"\xa5" * (16384 - count)
        written = bytearray(content)
        for verb in WRITE_VERBS[:2]:
            try:
                count = verb(file, filled(16384, 7), 32768)
            except (WouldBlockError, UnsupportedError):
                count = 0
            written[32768 : 32768 + count] = b"\x07" * count
            assert path.read_bytes() == written


def test_neighbours_that_share_a_block(place: Home) -> None:
    """Concurrent writes of any alignment that share blocks and no byte: none is undone, none fails (F10, F13)."""
    rng = random.Random(34)
    size = 64 << 10

    async def main() -> None:
        for _ in range(6):
            path = data_file(place.directory / "file", bytes(size))
            cuts = sorted({0, size, *(rng.randrange(size) // unit * unit for unit in (1, 512) for _ in range(16))})
            runs = list(zip(cuts, cuts[1:], range(1, 100), strict=False))
            shuffled = rng.sample(runs, len(runs))
            async with aio.open(path, "r+") as file:
                await asyncio.gather(*(file.pwrite(filled(end - at, value), at) for at, end, value in shuffled))
            expected = b"".join(bytes([value]) * (end - at) for at, end, value in runs)
            assert path.read_bytes() == expected
            assert data_file(path).read_bytes() == expected

    asyncio.run(main())


def test_checksums_hold_though_the_buffer_changes(scratch: Path) -> None:
    """btrfs: a thread scribbles on the buffer during thousands of writes; every later read verifies (F21)."""
    with home("btrfs", scratch) as place:
        path = data_file(place.directory / "file", bytes(1 << 20))
        buffer = filled(16384, 1)
        stop = threading.Event()

        def scribble() -> None:
            for value in itertools.cycle((1, 2)):
                if stop.is_set():
                    return
                buffer[:] = bytes([value]) * 16384

        thread = threading.Thread(target=scribble)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        thread.start()
        try:
            with odirect.open(path, "r+") as file:
                for _ in range(30):
                    for call in (
                        lambda: file.write_batch([0] * 16 + [16384] * 16, 512, buffer),
                        lambda: file.pwrite(buffer, 65536),
                        lambda: file.pwritev([buffer[:8192], buffer[8192:]], 131072),
                        lambda: file.pwrite(buffer, 200_001),
                    ):
                        call()
                    for number in range(32):
                        file.submit("write", 300 * 1024 + number * 16384, buffer)
                    for request in file.completions():
                        assert request.result() == 16384
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)
        read = data_file(path).read_bytes()  # EIO if a checksum is wrong
        assert set(read[200_001 : 200_001 + 16384]) <= {1, 2}
        with odirect.open(path) as file:
            assert file.pread(1 << 20, 0) == read
        run("btrfs", "scrub", "start", "-B", place.directory)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_a_full_file_system(scratch: Path, kind: str) -> None:
    """NoSpaceError when it is full, and nothing lost that was written before (B04, F07)."""
    with home(kind, scratch) as place:
        path = place.directory / "file"
        chunk = odirect.empty(1 << 20)
        written = 0
        with odirect.open(path, "w+") as file:
            with pytest.raises(NoSpaceError) as caught:
                for number in range(1000):
                    chunk[:] = bytes([number % 251 + 1]) * (1 << 20)
                    assert file.write(chunk) == 1 << 20
                    written += 1 << 20
            assert caught.value.errno == errno.ENOSPC
            assert file.tell() == written, "the position moved without success"
            for verb in WRITE_VERBS:
                with contextlib.suppress(NoSpaceError):
                    verb(file, filled(8 << 20, 9), written)
            for number in range(written >> 20):
                assert file.pread(1 << 20, number << 20) == bytes([number % 251 + 1]) * (1 << 20)
            file.truncate(0)
            file.sync()
            assert file.pwrite(b"room again", 0) == 10
        assert path.read_bytes() == b"room again"


def test_a_read_only_file_system(scratch: Path) -> None:
    """Reading works, writing is ReadOnlyError at open (B04)."""
    with made_image("ext4", directory=scratch) as image:
        with mounted(image, "ext4") as directory:
            data_file(directory / "file", b"x" * 5000)
        with mounted(image, "ext4", "ro") as directory:
            with odirect.open(directory / "file") as file:
                assert file.pread(6000, 1) == b"x" * 4999
            for mode in ("r+", "w", "a"):
                with pytest.raises(ReadOnlyError):
                    odirect.open(directory / "file", mode)
            with pytest.raises(ReadOnlyError):
                odirect.open(directory / "new", "x")


# --- block devices -------------------------------------------------------------------------------


@pytest.fixture(params=[512, 4096])
def disk(request: pytest.FixtureRequest, scratch: Path) -> Iterator[tuple[str, int]]:
    """A loop device of 1 MiB of random bytes, and its sector size."""
    image = scratch / "image"
    image.write_bytes(random.Random(35).randbytes(1 << 20))
    with loop_device(image, request.param) as name:
        yield name, request.param


def bytes_of(disk: str) -> bytes:
    """What is on the device, not what may be in a cache."""
    return data_file(Path(disk)).read_bytes()


def test_a_block_device(disk: tuple[str, int]) -> None:
    """All verbs at all alignments on a device of 512 and of 4096 bytes' sectors (B01, B09, F02, F51)."""
    name, sector = disk
    expected = bytearray(bytes_of(name))
    end = len(expected)
    with odirect.open(name, "r+") as file:
        assert file.size == end and file.limits.read_align == sector
        rng = random.Random(sector)
        for verb in (*READ_VERBS, *WRITE_VERBS):
            for offset, length in ((8192, 4096), (5, 100), (4000, 9000), (65_000, 70_000), (end - 4096, 4096)):
                memory = filled(length, rng.randrange(256), shift=rng.choice((0, 0, 1)))
                assert verb(file, memory, offset) == length
                if verb in READ_VERBS:
                    assert bytes(memory) == expected[offset : offset + length]
                else:
                    expected[offset : offset + length] = memory
        for verb in READ_VERBS:
            memory = filled(8192, 0xA5)
            assert verb(file, memory, end - 1000) == 1000
            assert bytes(memory) == expected[-1000:] + b"\xa5" * 7192
            assert verb(file, memory, end) == verb(file, memory, end + 5) == 0
        for verb in WRITE_VERBS:
            for at in (end, end + 4096, end + 7):
                with pytest.raises(NoSpaceError):
                    verb(file, filled(4096, 1), at)
        assert file.size == end
        with pytest.raises(UnsupportedError):
            file.truncate(4096)
        with pytest.raises(UnsupportedError):
            file.fallocate(0, 4096)
        file.fallocate(0, 8192, zero=True)
        expected[:8192] = bytes(8192)
        file.fallocate(8192, 8192, punch=True)
        expected[8192:16384] = bytes(8192)
        file.sync()
        assert {outcome.kind for outcome in file.totals} == {Kind.DIRECT, Kind.BOUNCED}
        file.seek(-10, os.SEEK_END)
        assert file.read() == expected[-10:]
    assert bytes_of(name) == expected


def test_a_write_across_a_devices_end(disk: tuple[str, int]) -> None:
    """It is short, by every verb the same (B09)."""
    name, _ = disk
    with odirect.open(name, "r+") as file:
        counts = set()
        for verb in WRITE_VERBS:
            try:
                counts.add(verb(file, filled(8192, 5), file.size - 4096))
            except NoSpaceError:
                counts.add(-1)
        assert counts == {4096}
        assert file.pread(5000, file.size - 4096) == b"\x05" * 4096


def test_threads_and_tasks_whose_writes_share_sectors(disk: tuple[str, int]) -> None:
    """On a device, where the kernel has no lock: writes that share blocks and no byte all stay (F10, F13)."""
    name, _ = disk
    rng = random.Random(36)
    size = 64 << 10
    for turn in range(10):
        cuts = sorted({0, size, *(rng.randrange(size) // unit * unit for unit in (1, 512) for _ in range(30))})
        runs = list(zip(cuts, cuts[1:], range(turn, 300), strict=False))
        shuffled = rng.sample(runs, len(runs))
        errors: list[BaseException] = []
        if turn % 2:

            async def main(shuffled: list[tuple[int, int, int]] = shuffled) -> None:
                async with aio.open(name, "r+") as file:
                    await asyncio.gather(*(file.pwrite(filled(end - at, value), at) for at, end, value in shuffled))

            asyncio.run(main())
        else:
            with odirect.open(name, "r+") as file:

                def work(
                    mine: list[tuple[int, int, int]],
                    file: odirect.File = file,
                    errors: list[BaseException] = errors,
                ) -> None:
                    try:
                        for at, end, value in mine:
                            file.pwrite(filled(end - at, value), at)
                    except BaseException as error:
                        errors.append(error)

                threads = [threading.Thread(target=work, args=(shuffled[number::4],)) for number in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        assert not errors, errors
        expected = b"".join(bytes([value & 0xFF]) * (end - at) for at, end, value in runs)
        assert bytes_of(name)[:size] == expected


def flushes(disk: str) -> int:
    """How many flushes the device has done."""
    return int(Path(f"/sys/block/{os.path.basename(disk)}/stat").read_text().split()[15])


@pytest.mark.parametrize("verb", WRITE_VERBS, ids=verb_name)
def test_a_durable_write_flushes_the_device(disk: tuple[str, int], verb: Callable[..., int]) -> None:
    """dsync makes the device flush its cache before the write returns, bounced or not; nothing else does (B05)."""
    name, _ = disk
    for offset in (4096, 4099):
        for dsync in (True, False):
            with odirect.open(name, "r+", dsync=dsync) as file:
                before = flushes(name)
                assert verb(file, odirect.empty(4096), offset) == 4096
                assert (flushes(name) > before) is dsync
    with odirect.open(name, "r+") as file:
        before = flushes(name)
        file.sync()
        assert flushes(name) > before


def test_a_device_that_is_in_use(scratch: Path) -> None:
    """A mounted device is not written to, unless that is asked for by name (F34)."""
    with made_image("ext4", directory=scratch) as image, loop_device(image) as name, mounted(name, "ext4") as directory:
        with pytest.raises(InUseError, match=str(directory)) as caught:
            odirect.open(name, "r+")
        assert name in str(caught.value)
        with odirect.open(name) as file:
            assert len(file.pread(4096, 0)) == 4096
        with odirect.open(name, "r+", overwrite_in_use=True) as file:
            data = file.pread(4096, 0)
            assert file.pwrite(data, 0) == 4096


def test_a_read_only_device(scratch: Path) -> None:
    """A device that cannot be written says so, at open or at the first write (B04)."""
    image = data_file(scratch / "image", bytes(1 << 20))
    with loop_device(image, read_only=True) as name:
        with pytest.raises((ReadOnlyError, ForbiddenError)), odirect.open(name, "r+") as file:
            file.pwrite(odirect.empty(4096), 0)
        with odirect.open(name) as file:
            assert file.pread(10, 5) == bytes(10)
