"""Trees into and out of volumes of an event loop, all files of a tree, and paths that only name."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from tests.loops import made_image, needs_tool

import odirect
from odirect import aio
from odirect.base.errors import ClosedError, DirectoryError, MissingError, NoSpaceError

MIB = 1 << 20


@pytest.fixture(params=["auto", "threads"])
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With io_uring, where there is one, and without (F53)."""
    monkeypatch.setenv("ODIRECT_RING", request.param)
    return str(request.param)


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    """An ext2 image; whole in the end."""
    with made_image("ext2", 64 * MIB, directory=scratch, mkfs=("-b", "4096")) as image:
        yield image
        done = subprocess.run([needs_tool("e2fsck"), "-fn", image], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def host(scratch: Path) -> Path:
    """Small files and a large one, directories, links of both kinds, a hole."""
    top = scratch / "host"
    rng = random.Random(5)
    for directory in ("a", "b/c"):
        (top / directory).mkdir(parents=True)
        for number in range(40):
            (top / directory / f"file{number}").write_bytes(rng.randbytes(number * 211))
    (top / "large").write_bytes(rng.randbytes(9 * MIB + 77))
    with (top / "holes").open("wb") as file:
        file.write(b"start")
        file.truncate(5 * MIB)
    (top / "link").symlink_to("b/c")
    os.link(top / "large", top / "b" / "hard")
    return top


def contents(top: Path) -> dict[str, bytes | str]:
    """Every file and link below, by its path from there."""
    return {
        str(path.relative_to(top)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(top.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_trees_in_and_out(image: Path, host: Path, scratch: Path, ring: str) -> None:
    """The same in the end, beside other requests; progress is told in the loop's thread."""
    here = threading.get_ident()
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert threading.get_ident() == here
        told.append((done, total))

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            copying = asyncio.create_task(volume.copy_in(host, "/tree", progress=progress))
            others = await asyncio.gather(
                *(volume.write_bytes(f"/beside{number}", b"x" * number * 1000) for number in range(50)),
            )
            report = await copying
            assert (report.target, report.files, report.directories, report.links, report.hard_links) == (
                "/tree",
                82,
                4,
                1,
                1,
            )
            assert others == [number * 1000 for number in range(50)]
            assert told[-1][0] == told[-1][1] and len(told) > 3
            out, again = await asyncio.gather(
                volume.copy_out(volume / "tree", scratch / "out"), volume.copy_out(b"/tree", scratch / "again")
            )
            assert out.files == again.files == 82 and os.fsdecode(out.target) == str(scratch / "out")
            found = {path: content async for path, content in volume.read_files("/tree")}
            assert found == {
                f"/tree/{name}": content for name, content in contents(host).items() if isinstance(content, bytes)
            }
            assert [item async for item in volume.read_files(volume.root / "beside3")] == [("/beside3", b"x" * 3000)]
            assert {path async for path, _ in volume.read_files(b"/tree/a")} == {
                b"/tree/a/file%d" % number for number in range(40)
            }

    asyncio.run(main())
    assert contents(scratch / "out") == contents(scratch / "again") == contents(host)


def test_what_cannot_be_copied(image: Path, host: Path, scratch: Path) -> None:
    """The errors of the synchronous volume, and what the progress raises; nothing hidden is left behind."""

    class Enough(Exception):
        pass

    def enough(done: int, total: int) -> None:
        raise Enough

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            with pytest.raises(MissingError) as caught:
                await volume.copy_in(scratch / "none", "/x")
            assert caught.value.filename == os.fsencode(scratch / "none")
            with pytest.raises(MissingError) as caught:
                await volume.copy_out("/none", scratch / "x")
            assert caught.value.filename == "/none"
            with pytest.raises(DirectoryError):
                await volume.copy_in(host, "/x", recursive=False)
            with pytest.raises(Enough):
                await volume.copy_in(host / "large", "/x", progress=enough)
            with pytest.raises(MissingError):
                async for _ in volume.read_files("/none"):
                    pass
            huge = scratch / "huge"
            huge.write_bytes(b"x" * (80 * MIB))
            with pytest.raises(NoSpaceError):
                await volume.copy_in(huge, "/huge")
            assert await volume.listdir() == ["lost+found"]
        for call in (volume.copy_in(host, "/x"), volume.copy_out("/", scratch / "x")):
            with pytest.raises(ClosedError):
                await call

    asyncio.run(main())


def test_a_cancelled_copy_ends_and_close_waits(image: Path, scratch: Path, ring: str) -> None:
    """The caller is free at once; the copy ends at its next chunk and takes away what it made."""
    source = scratch / "source"
    source.write_bytes(random.Random(1).randbytes(48 * MIB))

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            started = asyncio.Event()
            last = 0

            def progress(done: int, total: int) -> None:
                nonlocal last
                last = done
                started.set()

            copy = asyncio.create_task(volume.copy_in(source, "/copy", progress=progress))
            await started.wait()
            copy.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copy
            closing = asyncio.create_task(volume.close())
            await asyncio.sleep(0)
            assert volume.closed
            with pytest.raises(ClosedError):
                await volume.copy_in(source, "/other")
            await closing
            assert last < source.stat().st_size

    asyncio.run(main())
    with odirect.open_volume(image) as volume:
        assert volume.listdir() == ["lost+found"]


def test_close_waits_for_a_copy(image: Path, host: Path) -> None:
    """What was begun is finished first, if nobody has cancelled it."""

    async def main() -> None:
        volume = await aio.open_volume(image, "r+")
        copy = asyncio.create_task(volume.copy_in(host, "/tree"))
        await asyncio.sleep(0)
        await volume.close()
        assert (await copy).files == 82

    asyncio.run(main())


def test_a_loop_that_is_closed_during_a_copy(image: Path, scratch: Path) -> None:
    """Its thread gives up, and the program can end; the volume is closed whole."""
    source = scratch / "source"
    source.write_bytes(bytes(40 * MIB))
    loop = asyncio.new_event_loop()
    started = asyncio.Event()

    async def begin() -> tuple[aio.Volume, asyncio.Task[object]]:
        volume = await aio.open_volume(image, "r+")
        task: asyncio.Task[object] = asyncio.create_task(
            volume.copy_in(source, "/copy", progress=lambda done, total: started.set())
        )
        await started.wait()
        return volume, task

    volume, task = loop.run_until_complete(begin())
    threads = [thread for thread in threading.enumerate() if thread.name == "odirect-copy"]
    assert len(threads) == 1
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    threads[0].join()
    asyncio.run(volume.close())


def test_paths_that_only_name(image: Path, scratch: Path) -> None:
    """`/` and `root` give paths with pathlib's names; every method takes them, and only of its own volume."""

    async def main() -> None:
        async with aio.open_volume(image, "r+") as volume:
            place = volume / "dir" / "name.txt"
            assert str(place) == "/dir/name.txt" and place.parent == volume.root / "dir" and place.suffix == ".txt"
            assert place.relative_to(volume / "dir") == PurePosixPath("name.txt") and volume / place == place
            assert repr(place) == "PureVolumePath('/dir/name.txt')" and not hasattr(place, "stat")
            await volume.mkdir(place.parent)
            await volume.write_bytes(place, b"text")
            async with volume.open(place) as file:
                assert await file.pread(9, 0) == b"text"
            await volume.symlink(place, volume / "soft")
            await volume.link(place, volume / "hard")
            await volume.rename(volume / "hard", place.with_name("moved"))
            await volume.mknod(volume / "node")
            assert await volume.readlink(volume / "soft") == "/dir/name.txt"
            assert await volume.exists(place) and await volume.is_dir(place.parent)
            assert sorted(await volume.listdir(place.parent)) == ["moved", "name.txt"]
            assert next(iter(await volume.scandir(place.parent))).path.startswith("/dir/")
            assert [directory async for directory, _, _ in volume.walk(place.parent)] == ["/dir"]
            with pytest.raises(MissingError) as caught:
                await volume.rename(volume / "none", volume / "x")
            assert (caught.value.filename, caught.value.filename2) == ("/none", "/x")
            with made_image("ext2", directory=scratch) as second, odirect.open_volume(second) as other:
                with pytest.raises(ValueError, match="another volume"):
                    await volume.stat(other / "x")
                with pytest.raises(ValueError, match="another volume"):
                    other.stat(place)

    asyncio.run(main())
