"""`odirect.aio.open_volume`: volumes that are not mounted, in event loops."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import os
import random
import signal
import stat
import subprocess
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.files import filled
from tests.loops import loop_device, made_image, needs_root, needs_tool

import odirect
from odirect import Kind, Reason, aio
from odirect.aio_runner import LoopRunner
from odirect.base.errors import (
    AlignmentError,
    ClosedError,
    DirectoryError,
    ExistsError,
    InUseError,
    MissingError,
    NotDirectError,
    NotDirectoryError,
    ODirectError,
    PathError,
    ReadOnlyError,
    UnsupportedError,
)
from odirect.dio.mapping import ExtentKind
from odirect.sched.scheduler import Scheduler
from odirect.testing.memory_fs import MemoryFileSystem

SIZE = 4 << 20


def judged(image: Path) -> None:
    """The image is clean in the eyes of e2fsck."""
    done = subprocess.run([needs_tool("e2fsck"), "-fn", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(params=["auto", "threads"])
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With io_uring, where there is one, and without (F53)."""
    monkeypatch.setenv("ODIRECT_RING", request.param)
    return str(request.param)


@pytest.fixture
def content() -> bytes:
    return random.Random(2).randbytes(SIZE)


@pytest.fixture
def image(scratch: Path, content: bytes) -> Iterator[Path]:
    """An ext2 image with one file, /data; whole in the end."""
    with made_image("ext2", 32 << 20, directory=scratch, mkfs=("-b", "4096")) as image:
        with odirect.open_volume(image, "r+") as volume:
            volume.write_bytes("/data", content)
        yield image
        judged(image)


def memory_volume(**options: bool) -> aio.Volume:
    """A volume over a file system in memory, in the running loop."""
    file_system = MemoryFileSystem(**options)  # type: ignore[arg-type]
    runner = LoopRunner(asyncio.get_running_loop(), Scheduler(), file_system.name)
    return aio.Volume(file_system, runner, image=None)


# --- files ---------------------------------------------------------------------------------------


def test_many_reads_in_flight(image: Path, content: bytes, ring: str) -> None:
    """More requests at once than the ring is deep, of every alignment: each gets its bytes, once (B07)."""
    rng = random.Random(3)
    places = [rng.randrange(SIZE // 4096) * 4096 for _ in range(500)]
    places += [rng.randrange(SIZE - 4096) for _ in range(100)]

    async def main() -> None:
        async with aio.open_volume(image) as volume, volume.open("/data") as file:
            buffers = [odirect.empty(4096) for _ in places]
            counts = await asyncio.gather(
                *(file.preadinto(buffer, place) for buffer, place in zip(buffers, places, strict=True))
            )
            assert counts == [4096] * 600
            for buffer, place in zip(buffers, places, strict=True):
                assert bytes(buffer) == content[place : place + 4096]
            assert sum(tally.operations for tally in file.totals.values()) == 600
            assert sum(tally.bytes for tally in file.totals.values()) == 600 * 4096
            assert {outcome.kind for outcome in file.totals} <= {Kind.DIRECT, Kind.BOUNCED}

    asyncio.run(main())


def test_every_verb_of_a_file(image: Path, ring: str) -> None:
    """Open, write, read, vectors, truncate, holes, extents, sync, and what it says of itself."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            file = await volume.open("/new", "w+")
            async with file:
                assert await file.pwrite(filled(8192, 1), 0) == 8192
                assert file.last_outcome is not None and file.last_outcome.kind is Kind.DIRECT
                assert await file.pwrite(filled(4096, 5), 4096) == 4096
                assert await file.pwrite(b"\x02" * 100, 8192) == 100
                assert await file.pwritev([b"\x03" * 10, filled(512, 4), b""], 8292) == 522
                assert await file.pwrite(b"", 5) == 0
                assert file.size == 8814
                first, second = bytearray(8192), bytearray(1000)
                assert await file.preadv([first, second], 0) == 8814
                assert first == b"\x01" * 4096 + b"\x05" * 4096
                assert second == b"\x02" * 100 + b"\x03" * 10 + b"\x04" * 512 + bytes(378)
                assert await file.pread(20, 8286) == b"\x02" * 6 + b"\x03" * 10 + b"\x04" * 4
                assert await file.pread(10, 8814) == b""
                assert await file.preadinto(odirect.empty(4096), 8814) == 0
                assert await file.truncate(8200) == 8200
                await file.fallocate(4096, 4096, punch=True)
                assert [extent.kind for extent in await file.extents()] == [
                    ExtentKind.MAPPED,
                    ExtentKind.HOLE,
                    ExtentKind.MAPPED,
                ]
                await file.fallocate(8190, 10010, zero=True)
                assert file.size == 18200
                await file.sync()
                await file.sync(data_only=True)
                assert await file.pread(4, 4094) == b"\x01\x01\0\0"
                with pytest.raises(UnsupportedError, match="reserved"):
                    await file.fallocate(0, 4096)
                for arguments in ((0, 0, True, False), (-1, 5, True, False), (0, 5, True, True)):
                    offset, length, punch, zero = arguments
                    with pytest.raises(ValueError):
                        await file.fallocate(offset, length, punch=punch, zero=zero)
                assert file.mode == "wb+" and file.name == "/new" and file.inode > 10
                assert file.limits.read_align >= 1 and "/new" in repr(file)
            assert file.closed and "closed" in repr(file)
            await file.close()
            found = await volume.read_bytes("/new")
            assert found == b"\x01" * 4096 + bytes(4096 - 0) + found[8192:8190] + b"\x02" * 0 + bytes(18200 - 8192)

    asyncio.run(main())


def test_modes_and_access(image: Path) -> None:
    """Each mode of `open`, durable writes, the cache, and strict refusals, with the path as it was given."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            async with volume.open(b"x", "x", permissions=0o600) as file:
                assert await file.pwrite(b"abc", 0) == 3
                with pytest.raises(io.UnsupportedOperation, match="for reading"):
                    await file.pread(1, 0)
            assert stat.S_IMODE((await volume.stat("x")).st_mode) == 0o600
            with pytest.raises(ExistsError) as exists:
                await volume.open(b"x", "x")
            assert exists.value.filename == b"x"
            async with volume.open("x", "a+", dsync=True) as file:
                assert await file.pwrite(b"de", 3) == 2
                assert await file.pread(9, 0) == b"abcde"
            async with volume.open("x", "r+", access="buffered") as file:
                assert await file.pwrite(b"A", 0) == 1
                assert file.last_outcome is not None and file.last_outcome.kind is Kind.BUFFERED
                assert await file.pread(9, 0) == b"Abcde"
            async with volume.open("x") as file, volume.open("data", access="strict") as strict:
                with pytest.raises(io.UnsupportedOperation, match="for writing"):
                    await file.pwrite(b"x", 0)
                with pytest.raises(io.UnsupportedOperation, match="for writing"):
                    await file.truncate(0)
                with pytest.raises(AlignmentError) as misaligned:
                    await strict.preadinto(bytearray(10), 1)
                assert misaligned.value.filename == "data"
                assert await strict.preadinto(odirect.empty(4096), 4096) == 4096
                for buffer, offset in ((bytes(10), 0), (bytearray(10), -1)):
                    with pytest.raises(ValueError):
                        await file.preadinto(buffer, offset)
                with pytest.raises(ValueError):
                    await file.preadv([bytearray(1)], -1)
                for call in (lambda: file.pread(-1, 0), lambda: file.pread(1, -1), lambda: file.extents(-1)):
                    with pytest.raises(ValueError):
                        await call()
                with pytest.raises(TypeError):
                    await file.preadinto(5, 0)
            async with volume.open("x", "r+") as file:
                with pytest.raises(ValueError):
                    await file.truncate(-1)
            with pytest.raises(ValueError, match="access"):
                volume.open("x", access="fast")  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="mode"):
                volume.open("x", "rt")
            for path, kind in (("/none/x", MissingError), ("/x/y", NotDirectoryError), ("/", DirectoryError)):
                with pytest.raises(kind) as missing:
                    async with volume.open(path):
                        pass
                assert missing.value.filename == path
            await volume.mknod("fifo", stat.S_IFIFO | 0o600)
            with pytest.raises(UnsupportedError):
                await volume.open("fifo")

    asyncio.run(main())


def test_a_write_of_a_block_that_is_cached(image: Path, content: bytes) -> None:
    """Direct and cached I/O of two handles are one file (F20)."""

    async def main() -> None:
        async with (
            aio.open_volume(image, "r+") as volume,
            volume.open("/data", access="buffered") as cached,
            volume.open("/data", "r+") as direct,
        ):
            for value in range(1, 20):
                before = asyncio.ensure_future(cached.pread(4096, 8192))
                await direct.pwrite(filled(4096, value), 8192)
                await before
                assert await cached.pread(4096, 8192) == bytes([value]) * 4096
            assert await cached.pread(4096, 4096) == content[4096:8192]

    asyncio.run(main())


def test_an_image_that_loses_its_end(scratch: Path) -> None:
    """What the image cannot give is an error, not fewer bytes, on the short way too."""

    async def main() -> None:
        with made_image("ext2", 16 << 20, directory=scratch, mkfs=("-b", "4096")) as image:
            async with aio.open_volume(image, "r+") as volume:
                await volume.write_bytes("/data", bytes(1 << 20))
            async with aio.open_volume(image) as volume, volume.open("/data") as file:
                buffer = odirect.empty(4096)
                assert await file.preadinto(buffer, 8192) == 4096
                os.truncate(image, (await file.extents())[0].addr or 0)
                for _ in range(2):
                    with pytest.raises(ODirectError):
                        await file.preadinto(buffer, 8192)

    asyncio.run(main())


# --- names ---------------------------------------------------------------------------------------


def test_every_verb_of_a_volume(image: Path, ring: str) -> None:
    """Made, looked at, changed, moved and removed; and what the volume says of itself."""

    async def main() -> None:
        async with aio.open_volume(image, "r+", owner=(7, 8)) as volume:
            assert (volume.kind, volume.name, volume.writable, volume.closed) == ("ext2", str(image), True, False)
            assert volume.is_direct and volume.limits.sources["read_align"] and "ext2" in repr(volume)
            assert volume.block_bytes == 4096 and str(uuid.UUID(volume.uuid)) == volume.uuid and volume.label == ""
            assert "filetype" in volume.features
            await volume.mkdir("/a")
            await volume.makedirs("/a/b/c")
            await volume.mkdir("/a/b", exist_ok=True)
            await volume.makedirs("/a/b/c", exist_ok=True)
            with pytest.raises(ExistsError):
                await volume.mkdir("/a")
            assert await volume.write_bytes("/a/file", b"hello") == 5
            assert await volume.write_bytes("/a/file", b"hallo, you") == 10
            assert await volume.read_bytes("/a/file") == b"hallo, you"
            assert (await volume.attributes("/a/file")).uid == 7 and (await volume.stat("/a/file")).st_gid == 8
            await volume.symlink("file", "/a/link")
            assert await volume.readlink("/a/link") == "file" and await volume.readlink(b"/a/link") == b"file"
            assert stat.S_ISLNK((await volume.lstat("/a/link")).st_mode)
            assert (await volume.stat("/a/link")).st_size == 10
            await volume.link("/a/file", "/a/b/hard")
            assert (await volume.stat("/a/b/hard")).st_nlink == 2
            assert await volume.exists("/a") and not await volume.exists("/b") and not await volume.exists("a\0")
            assert await volume.is_dir("/a") and await volume.is_file("/a/link") and await volume.is_symlink("/a/link")
            assert not await volume.is_dir("/a/file") and not await volume.is_file("/a/file/x")
            await volume.chmod("/a/file", 0o640)
            await volume.chown("/a/file", 5, -1)
            await volume.utime("/a/file", ns=(10**9, 2 * 10**9))
            found = await volume.stat("/a/file")
            assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 5, 8)
            assert (found.st_atime_ns, found.st_mtime_ns) == (10**9, 2 * 10**9)
            await volume.utime("/a/file", (3.5, 4.5))
            await volume.utime("/a/file")
            with pytest.raises(ValueError):
                await volume.utime("/a/file", (1, 1), ns=(1, 1))
            with pytest.raises(UnsupportedError):
                await volume.chmod("/a/link", 0o600, follow_symlinks=False)
            await volume.set_xattr("/a/file", "user.note", b"one")
            assert await volume.xattrs("/a/file") == {b"user.note": b"one"}
            await volume.remove_xattr("/a/file", "user.note")
            with pytest.raises(PathError) as none:
                await volume.remove_xattr("/a/file", "user.note")
            assert none.value.errno == errno.ENODATA and none.value.filename == "/a/file"
            await volume.mknod("/a/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            assert (await volume.stat("/a/null")).st_rdev == os.makedev(1, 3)
            with pytest.raises(PathError, match="mknod"):
                await volume.mknod("/a/d", stat.S_IFDIR)
            assert sorted(await volume.listdir("/a")) == ["b", "file", "link", "null"]
            assert sorted(await volume.listdir(b"/a")) == [b"b", b"file", b"link", b"null"]
            assert [extent.length for extent in await volume.extents("/a/file")] == [4096]
            await volume.rename("/a/file", "/a/moved")
            await volume.replace("/a/moved", "/a/b/c/moved")
            with pytest.raises(MissingError) as missing:
                await volume.rename("/a/file", "/a/other")
            assert (missing.value.filename, missing.value.filename2) == ("/a/file", "/a/other")
            await volume.remove("/a/b/c/moved")
            await volume.unlink("/a/null")
            with pytest.raises(PathError):
                await volume.rmdir("/a/b")
            await volume.rmdir("/a/b/c")
            await volume.rmtree("/a")
            space = await volume.statfs()
            assert space.f_bsize == 4096 and space.f_flag == 0
            await volume.sync()
            assert await volume.check() == []
            assert sorted(await volume.listdir()) == ["data", "lost+found"]
        assert volume.closed and not volume.writable and "closed" in repr(volume)

    asyncio.run(main())


def test_entries_and_walks(image: Path) -> None:
    """`scandir` and `walk`, by str and bytes, with links, rings of links, errors, and changes on the way."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            await volume.rmdir("/lost+found")
            for path in ("/top/one/deep", "/top/two"):
                await volume.makedirs(path)
            await volume.write_bytes("/top/one/file", b"123")
            await volume.symlink("/top/one", "/top/two/down")
            await volume.symlink("ring", "/top/ring")
            await volume.symlink("nowhere", "/top/dangling")
            entries = {entry.name: entry for entry in await volume.scandir("/top")}
            assert sorted(entries) == ["dangling", "one", "ring", "two"] and entries["one"].path == "/top/one"
            assert (
                await entries["one"].is_dir() and not await entries["one"].is_file() and "one" in repr(entries["one"])
            )
            assert await entries["ring"].is_symlink() and not await entries["dangling"].is_file()
            assert (await entries["one"].stat()).st_ino == entries["one"].inode()
            (down,) = await volume.scandir(b"/top/two")
            assert down.path == b"/top/two/down" and await down.is_dir()
            assert not await down.is_dir(follow_symlinks=False)

            found = [place async for place in volume.walk("/top")]
            assert found[0][0] == "/top" and sorted(found[0][1]) == ["one", "two"]
            assert sorted(found[0][2]) == ["dangling", "ring"]
            assert {place[0] for place in found} == {"/top", "/top/one", "/top/one/deep", "/top/two"}
            upwards = [place[0] async for place in volume.walk(b"/top", topdown=False)]
            assert upwards[-1] == b"/top" and upwards.index(b"/top/one/deep") < upwards.index(b"/top/one")
            followed = {place[0] async for place in volume.walk("/top", followlinks=True)}
            assert "/top/two/down/deep" in followed
            async for _, directories, _ in volume.walk("/top"):
                directories.clear()
            errors: list[ODirectError] = []
            assert [place async for place in volume.walk("/none", onerror=errors.append)] == []
            assert [error.filename for error in errors] == ["/none"]
            assert [place async for place in volume.walk("/none")] == []

    asyncio.run(main())


def test_a_volume_that_is_read_only(image: Path) -> None:
    """Nothing is changed, and several may read it."""

    async def main() -> None:
        async with aio.open_volume(image) as one, aio.open_volume(image) as other:
            assert not one.writable and (await one.statfs()).f_flag == 1
            for call in (one.mkdir("/x"), one.remove("/data"), other.write_bytes("/data", b"")):
                with pytest.raises(ReadOnlyError):
                    await call
            with pytest.raises(InUseError):
                await aio.open_volume(image, "r+")

    asyncio.run(main())


def test_what_is_no_volume(scratch: Path) -> None:
    """Each is refused with a reason, and leaves nothing open or locked."""

    async def main() -> None:
        with pytest.raises(ValueError, match="mode"):
            aio.open_volume(scratch, "w")
        with pytest.raises(MissingError) as missing:
            await aio.open_volume(scratch / "none")
        assert missing.value.filename == str(scratch / "none")
        path = scratch / "nothing"
        for content in (b"", b"x" * 100, bytes(1 << 20)):
            path.write_bytes(content)
            for _ in range(2):
                with pytest.raises(UnsupportedError, match="no file system"):
                    async with aio.open_volume(path, "r+"):
                        pass

    asyncio.run(main())


def test_a_file_system_without_nodes() -> None:
    """Files that are no `NodeFile` go the general way, with the same answers."""

    async def main() -> None:
        async with memory_volume(yields=True) as volume:
            assert not volume.is_direct and volume.limits.logical_block
            async with volume.open("/file", "w+") as file:
                writes = [file.pwrite(bytes([value]) * 1024, value * 1024) for value in range(1, 20)]
                assert await asyncio.gather(*writes) == [1024] * 19
                assert await file.pread(4096, 0) == bytes(1024) + b"\1" * 1024 + b"\2" * 1024 + b"\3" * 1024
                with pytest.raises(ValueError):
                    await file.preadinto(bytearray(1), -1)
                assert sum(tally.operations for tally in file.totals.values()) == 20
                await file.sync()
                file.preadinto(bytearray(4096), 0).cancel()
            assert await volume.exists("/file")

    asyncio.run(main())


# --- many at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(scratch: Path, seed: int, ring: str) -> None:
    """Readers, writers and renamers of the same volume: every file holds what its writer wrote; e2fsck agrees."""

    async def main(image: Path) -> None:
        rng = random.Random(seed)
        async with aio.open_volume(image, "r+") as volume:
            expected: dict[str, bytearray] = {}

            async def worker(number: int) -> None:
                name, turn = f"/d{number % 3}/file{number}", 0
                model = bytearray()
                await volume.makedirs(os.path.dirname(name), exist_ok=True)
                async with volume.open(name, "w+") as file:
                    for _ in range(25):
                        verb = rng.choice(("write", "write", "read", "rename", "cut", "list", "sync", "grow"))
                        if verb in ("write", "grow"):
                            length = rng.choice((4096, 8192, 4096, 100, 5000))
                            offset = len(model) if verb == "grow" else rng.randrange(10) * rng.choice((4096, 4096, 777))
                            data = odirect.empty(length)
                            data[:] = bytes([rng.randrange(1, 256)]) * length
                            assert await file.pwrite(data, offset) == length
                            model.extend(bytes(max(0, offset + length - len(model))))
                            model[offset : offset + length] = data
                        elif verb == "read":
                            offset = rng.randrange(12) * rng.choice((4096, 777))
                            buffer = odirect.empty(4096)
                            count = await file.preadinto(buffer, offset)
                            assert bytes(buffer[:count]) == bytes(model[offset : offset + 4096])
                        elif verb == "rename":
                            turn += 1
                            new = f"/d{rng.randrange(3)}/file{number}.{turn}"
                            await volume.makedirs(os.path.dirname(new), exist_ok=True)
                            await volume.rename(name, new)
                            name = new
                        elif verb == "cut":
                            size = rng.randrange(len(model) + 1)
                            await file.truncate(size)
                            del model[size:]
                        elif verb == "list":
                            assert os.path.basename(name) in await volume.listdir(os.path.dirname(name))
                        elif rng.random() < 0.3:
                            await file.sync()
                expected[name] = model

            await asyncio.gather(*(worker(number) for number in range(12)))
            for name, model in expected.items():
                assert await volume.read_bytes(name) == model
        with odirect.open_volume(image) as volume_now:
            assert {name: volume_now.read_bytes(name) for name in expected} == expected

    with made_image(
        "ext2", 32 << 20, directory=scratch, mkfs=("-b", random.Random(seed).choice(("1024", "4096")))
    ) as image:
        asyncio.run(main(image))
        judged(image)


def test_two_volumes_in_one_loop(image: Path, scratch: Path, content: bytes, ring: str) -> None:
    """Each has a ring of its own; what goes from one to the other arrives."""

    async def main(other: Path) -> None:
        async with aio.open_volume(image) as source, aio.open_volume(other, "r+") as target:
            async with source.open("/data") as old, target.open("/copy", "w") as new:

                async def move(offset: int) -> None:
                    buffer = odirect.empty(64 << 10)
                    assert await old.preadinto(buffer, offset) == len(buffer)
                    assert await new.pwrite(buffer, offset) == len(buffer)

                await asyncio.gather(*(move(offset) for offset in range(0, SIZE, 64 << 10)))
            assert await target.read_bytes("/copy") == content
            with pytest.raises(ODirectError) as closed:
                await old.preadinto(bytearray(1), 0)
            assert isinstance(closed.value, ClosedError)

    with made_image("ext2", 32 << 20, directory=scratch) as other:
        asyncio.run(main(other))
        judged(other)


def test_loops_one_after_the_other(image: Path, content: bytes, ring: str) -> None:
    """Each loop opens the volume anew; nothing of the one before is left."""

    async def main(turn: int) -> bytes:
        async with aio.open_volume(image, "r+") as volume:
            await volume.mkdir(f"/turn{turn}")
            assert sorted(await volume.listdir()) == [
                "data",
                "lost+found",
                *(f"turn{each}" for each in range(turn + 1)),
            ]
            async with volume.open("/data") as file:
                return await file.pread(1000, 5)

    for turn in range(4):
        assert asyncio.run(main(turn)) == content[5:1005]
        judged(image)


# --- cancelled -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_storm_of_cancellations(image: Path, content: bytes, ring: str) -> None:
    """Thousands of awaits are cancelled; no buffer is used again before the device has let go of it (F24)."""

    async def main() -> None:
        rng = random.Random(4)
        cancelled = 0
        async with aio.open_volume(image) as volume, volume.open("/data") as file:

            async def one(buffer: object, place: int) -> None:
                assert await file.preadinto(buffer, place) == 8192
                assert bytes(buffer) == content[place : place + 8192]  # type: ignore[call-overload]

            for _ in range(40):
                tasks = []
                for _ in range(50):
                    shift = rng.choice((0, 0, 0, 1))
                    place = rng.randrange(SIZE - 16384) // 4096 * 4096 + shift
                    buffer = bytearray(8192) if shift else odirect.empty(8192)
                    tasks.append(asyncio.ensure_future(one(buffer, place)))
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
                for task in tasks:
                    if rng.random() < 0.8:
                        task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    cancelled += isinstance(result, asyncio.CancelledError)
                    assert result is None or isinstance(result, asyncio.CancelledError)
        assert cancelled > 500

    asyncio.run(main())


def test_a_cancelled_read_keeps_its_buffer(image: Path, content: bytes) -> None:
    """The caller is cancelled and lets go of his buffer: it lives until the device has filled it (F24)."""

    class Watched(bytearray):
        pass

    async def main() -> None:
        async with aio.open_volume(image) as volume, volume.open("/data") as file:
            for offset in (0, 1):
                buffer = Watched(4096)
                weak = weakref.ref(buffer)
                read = file.preadinto(buffer, offset)
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


def test_what_a_cancelled_caller_began_goes_on(image: Path) -> None:
    """Cancelling ends the wait alone: the change happens as a whole, and `close` waits for it (F24)."""

    async def main() -> None:
        data = bytes(range(256)) * 4096
        async with aio.open_volume(image, "r+") as volume:
            begun = [asyncio.ensure_future(volume.mkdir(f"/d{number}")) for number in range(10)]
            begun.append(asyncio.ensure_future(volume.write_bytes("/whole", data)))  # type: ignore[arg-type]
            begun.append(asyncio.ensure_future(volume.rename("/data", "/moved")))
            await asyncio.sleep(0)
            for task in begun:
                task.cancel()
            for result in await asyncio.gather(*begun, return_exceptions=True):
                assert isinstance(result, asyncio.CancelledError)
        async with aio.open_volume(image) as volume:
            names = await volume.listdir()
            assert {f"d{number}" for number in range(10)} <= set(names) and "moved" in names and "data" not in names
            assert await volume.read_bytes("/whole") == data

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(6))
def test_a_cancelled_open_leaves_no_handle(image: Path, turns: int) -> None:
    """A file that is opened for nobody is closed again (F24): once its name is gone, its blocks are free."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            opening = asyncio.ensure_future(volume.open("/data").__aenter__())
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await opening).close()  # It was quicker.
            del opening
            before = (await volume.statfs()).f_bfree
            await volume.remove("/data")
            while (await volume.statfs()).f_bfree < before + SIZE // 4096:
                await volume.sync()

    asyncio.run(main())


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34])
def test_a_cancelled_opening_of_a_volume(image: Path, turns: int, ring: str) -> None:
    """It goes on, and is closed when it is there (F24): unlocked, and clean."""

    async def main() -> None:
        opening = asyncio.ensure_future(aio.open_volume(image, "r+").__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        del opening
        while True:
            try:
                async with aio.open_volume(image, "r+"):
                    return
            except InUseError:
                await asyncio.sleep(0)

    asyncio.run(main())


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34])
def test_a_loop_that_ends_while_a_volume_is_opened(image: Path, turns: int) -> None:
    """Whatever had been done by then is undone, or finished: the image can be opened again, and is clean (F24)."""

    async def main() -> None:
        opening = asyncio.ensure_future(aio.open_volume(image, "r+").__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        assert not opening.done()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # It may have been open just then.
        asyncio.run(main())
        gc.collect()
    with odirect.open_volume(image, "r+") as volume:
        assert volume.exists("/data")


# --- closing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "volume"])
def test_close_with_requests_in_flight(image: Path, content: bytes, what: str, ring: str) -> None:
    """`close` waits for all of them, of cancelled callers too (F24)."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            file = await volume.open("/data", "r+")
            waiting: list[asyncio.Future[int]] = []
            for number in range(120):
                if number % 3 == 0:
                    waiting.append(file.preadinto(odirect.empty(4096), number * 4096))
                elif number % 3 == 1:
                    waiting.append(asyncio.ensure_future(file.preadv([odirect.empty(4096)], number * 4096)))
                else:
                    waiting.append(file.pwrite(filled(100, 7), number * 4096 + 1))
                if number % 4 == 0:
                    waiting[-1].cancel()
            await asyncio.sleep(0)
            closing = file.close() if what == "file" else volume.close()
            await closing
            assert file._requests is not None and file._requests.pending == 0 and file._in_flight.busy.value == 0
            done = await asyncio.gather(*waiting, return_exceptions=True)
            for number, result in enumerate(done):
                if number % 4:
                    assert result == (4096 if number % 3 < 2 else 100)
                else:
                    assert isinstance(result, asyncio.CancelledError)
            for late in (lambda: file.pread(1, 0), lambda: file.preadv([bytearray(1)], 0), file.sync):
                with pytest.raises(ClosedError):
                    await late()
            with pytest.raises(ClosedError):
                await file.preadinto(odirect.empty(4096), 0)
            await file.close()
            if what == "volume":
                with pytest.raises(ClosedError):
                    await volume.exists("/data")
        with odirect.open_volume(image) as now:
            assert now.read_bytes("/data")[2 * 4096 + 1 :][:100] == b"\x07" * 100

    asyncio.run(main())


def test_close_that_is_cancelled_goes_on(image: Path) -> None:
    """Cancelling `close` keeps neither the file nor the volume open (F24)."""

    async def main() -> None:
        volume = await aio.open_volume(image, "r+")
        file = await volume.open("/data", "r+")
        for number in range(50):
            file.pwrite(filled(4096, 3), number * 4096)
        for closing in (asyncio.ensure_future(file.close()), asyncio.ensure_future(volume.close())):
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
        await volume.close()
        await asyncio.gather(volume.close(), volume.close())
        assert volume.closed

    asyncio.run(main())
    with odirect.open_volume(image, "r+") as volume:
        assert volume.read_bytes("/data")[:4096] == b"\3" * 4096


def test_close_with_files_open(image: Path) -> None:
    """The volume closes its files; what went through the cache is written."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            file = await volume.open("/cached", "w", access="buffered")
            await file.pwrite(b"hello", 0)
        assert file.closed
        await file.close()
        async with aio.open_volume(image) as volume:
            assert await volume.read_bytes("/cached") == b"hello"

    asyncio.run(main())


def forgotten(caught: list[warnings.WarningMessage]) -> list[str]:
    """What the ResourceWarnings say; a warning keeps what it is about, until here."""
    assert {entry.category for entry in caught} <= {ResourceWarning}
    told = [str(entry.message) for entry in caught]
    caught.clear()
    gc.collect()
    return told


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_loop_that_is_closed_with_the_volume_open(image: Path, in_flight: bool, ring: str) -> None:
    """It is closed when it is thrown away, with a ResourceWarning: nothing is lost, nothing stays open (F24)."""

    async def main() -> weakref.ref[aio.Volume]:
        volume = await aio.open_volume(image, "r+")
        file = await volume.open("/data", "r+")
        await volume.write_bytes("/new", b"123")
        await file.preadinto(odirect.empty(4096), 0)
        if in_flight:
            for number in range(50):
                file.preadinto(odirect.empty(4096), number * 4096)
                file.pwrite(filled(100, 5), number * 4096 + 1)
            late = asyncio.ensure_future(volume.mkdir("/late"))
            await asyncio.sleep(0)
            late.cancel()
        return weakref.ref(volume)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weak = asyncio.run(main())
        gc.collect()
        told = forgotten(caught) + forgotten(caught)
        assert weak() is None
    assert len(told) == 2 and any("a volume was not closed" in text for text in told)
    with odirect.open_volume(image, "r+") as now:
        assert now.read_bytes("/new") == b"123" and now.exists("/late") is in_flight


def test_closed_after_its_loop(image: Path) -> None:
    """`close` in a later loop finishes what was begun, and gives everything back."""

    async def main() -> aio.Volume:
        volume = await aio.open_volume(image, "r+")
        volume.runner.start(volume.file_system.create(volume.file_system.root, b"made", stat.S_IFREG), "/made")
        return volume

    volume = asyncio.run(main())
    asyncio.run(volume.close())
    assert volume.closed
    with odirect.open_volume(image, "r+") as now:
        assert now.exists("/made")


def test_thrown_away_in_a_running_loop(image: Path) -> None:
    """A file or volume that is forgotten is closed, with a ResourceWarning, and the others go on (F24)."""

    async def main() -> None:
        async with aio.open_volume(image) as other:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                volume = await aio.open_volume(image)
                file = await volume.open("/data")
                await file.preadinto(odirect.empty(4096), 0)
                del file
                gc.collect()
                assert ["a file in a volume" in text for text in forgotten(caught)] == [True]
                assert await volume.exists("/data")
                weak = weakref.ref(volume)
                locked = volume._image
                assert locked is not None
                del volume
                gc.collect()
                assert ["a volume" in text for text in forgotten(caught)] == [True]
                assert weak() is None
            while locked._locked.opened.cached_fd >= 0:
                await asyncio.sleep(0)
            assert len(await other.read_bytes("/data")) == SIZE

    asyncio.run(main())


def test_another_loop_may_not_use_it(image: Path) -> None:
    """A volume belongs to the loop that opened it; others are told, and do no harm."""

    def elsewhere(call: Callable[[], object]) -> BaseException | None:
        caught: list[BaseException | None] = []

        async def use() -> None:
            try:
                await call()  # type: ignore[misc]
            except BaseException as error:
                caught.append(error)
            else:
                caught.append(None)

        thread = threading.Thread(target=lambda: asyncio.run(use()))
        thread.start()
        thread.join()
        return caught[0]

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume, volume.open("/data", "r+") as file:
            buffer = odirect.empty(4096)
            for call in (
                lambda: volume.exists("/data"),
                volume.close,
                file.close,
                file.sync,
                lambda: file.preadinto(bytearray(5), 1),
                lambda: file.preadinto(buffer, 0),
                lambda: file.pwrite(b"x", 0),
            ):
                assert isinstance(elsewhere(call), RuntimeError)
            assert await file.preadinto(buffer, 0) == 4096

    asyncio.run(main())


def test_a_forked_child(image: Path) -> None:
    """A child cannot use the volume, and what it does leaves the parent's alone (F24)."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume, volume.open("/data") as file:
            child = os.fork()
            if not child:
                signal.alarm(20)
                status = 1
                try:

                    async def use() -> None:
                        with pytest.raises(ClosedError, match="parent"):
                            await volume.exists("/data")
                        await file.close()
                        await volume.close()

                    asyncio.events._set_running_loop(None)
                    asyncio.run(use())
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            assert await file.preadinto(odirect.empty(4096), 0) == 4096
            await volume.mkdir("/after")

    asyncio.run(main())


def test_blocks_smaller_than_sectors(scratch: Path) -> None:
    """Where the device takes 4096 bytes and blocks have 1024, the way is the page cache, and it is said (F51)."""
    needs_root()

    async def main(device: str) -> None:
        async with aio.open_volume(device, "r+") as volume:
            assert not volume.is_direct and volume.block_bytes == 1024
            assert await volume.write_bytes("/file", b"x" * 5000) == 5000
            async with volume.open("/file") as file:
                assert await file.pread(5000, 0) == b"x" * 5000
                assert file.last_outcome is not None
                assert (file.last_outcome.kind, file.last_outcome.reason) == (Kind.BUFFERED, Reason.MISALIGNED_LENGTH)
            with pytest.raises(NotDirectError):
                volume.open("/file", access="strict")

    with made_image("ext2", 8 << 20, directory=scratch, mkfs=("-b", "1024")) as path:
        with loop_device(path, 4096) as device:
            asyncio.run(main(device))
        judged(path)


def test_arguments_that_cannot_be(image: Path, content: bytes) -> None:
    """They are what they are in the synchronous face: ValueError, TypeError, or refused with a reason."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            for call in (
                lambda: volume.chmod("/data", -1),
                lambda: volume.mkdir("/d", -1),
                lambda: volume.mknod("/n", -1),
            ):
                with pytest.raises(ValueError, match="mode"):
                    await call()
            pairs: list[Any] = [{}, "", "ab"]
            for given in pairs:
                with pytest.raises(TypeError, match="times"):
                    await volume.utime("/data", given)
            with pytest.raises(TypeError, match="mode"):
                await volume.open("/data", None)  # type: ignore[arg-type]
            with pytest.raises(UnsupportedError, match="atomic"):
                await volume.open("/data", "r+", atomic=True)
            with pytest.raises(ValueError, match="mode"):
                await volume.open("/new", "w", permissions=-1)
            assert sorted(await volume.listdir("/")) == ["data", "lost+found"]

    asyncio.run(main())


def test_strict_reads_up_to_the_end(image: Path) -> None:
    """Strict access asks for the last block whole, wherever the file ends (B01, F02)."""
    content = random.Random(1).randbytes(100_001)

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            await volume.write_bytes("/file", content)
            await volume.sync()
            async with volume.open("/file", access="strict") as file:
                assert await file.pread(4096, 98304) == content[98304:]
                assert await file.pread(1 << 40, 0) == content
                with pytest.raises(AlignmentError):
                    await file.pread(4097, 98304)

    asyncio.run(main())
