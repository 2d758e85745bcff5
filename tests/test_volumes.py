"""`odirect.open_volume`: opening, files, names, copies, threads, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import threading
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
from tests.loops import loop_device, made_image, mounted, needs_root, needs_tool
from tests.verbs import READ_VERBS, WRITE_VERBS, verb_name
from tests.volume_kit import KINDS, memory_volume, volume_of

import odirect
from odirect import Kind, Promise, Reason
from odirect.base.errors import (
    AlignmentError,
    ClosedError,
    CorruptionError,
    DirectoryError,
    ExistsError,
    InUseError,
    MissingError,
    NoSpaceError,
    NotDirectError,
    NotDirectoryError,
    ODirectError,
    PathError,
    ReadOnlyError,
    UnsupportedError,
    WouldBlockError,
)
from odirect.fs.base import Done
from odirect.testing.memory_fs import MemoryFile, MemoryFileSystem
from odirect.testing.model import ModelFile
from odirect.volume_runner import Runner
from odirect.volumes import Volume


@pytest.fixture(params=KINDS)
def volume(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Volume]:
    """An empty volume of each kind, open for writing, and whole in the end."""
    with volume_of(request.param, scratch) as volume:
        yield volume


@pytest.fixture
def memory() -> Iterator[Volume]:
    with memory_volume() as volume:
        yield volume


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    """An empty ext2 image."""
    with made_image("ext2", directory=scratch) as image:
        yield image


# --- opening -------------------------------------------------------------------------------------


def test_an_image_is_opened_and_described(image: Path) -> None:
    """What it is, what it is on, and that it is direct."""
    with odirect.open_volume(image, "r+") as volume:
        assert (volume.kind, volume.name, volume.writable, volume.closed) == ("ext2", str(image), True, False)
        assert volume.block_bytes in (1024, 4096)
        assert len(volume.uuid) == 36 and volume.label == "" and "filetype" in volume.features
        assert volume.is_direct and volume.limits.sources["read_align"]
        assert "ext2" in repr(volume)
        space = volume.statfs()
        assert 0 < space.f_blocks * space.f_frsize < image.stat().st_size
        assert 0 < space.f_bavail <= space.f_bfree < space.f_blocks and space.f_flag == 0 and space.f_namemax == 255
    assert volume.closed and not volume.writable and "closed" in repr(volume)
    with odirect.open_volume(os.fsencode(image)) as volume:
        assert not volume.writable and volume.statfs().f_flag == 1
        with pytest.raises(ReadOnlyError):
            volume.mkdir("/new")
        with pytest.raises(ReadOnlyError):
            volume.open("/new", "w")


def test_what_is_no_volume(scratch: Path) -> None:
    """Each is refused with a reason, and leaves nothing open or locked."""
    with pytest.raises(ValueError, match="mode"):
        odirect.open_volume(scratch, "w")
    with pytest.raises(MissingError):
        odirect.open_volume(scratch / "none")
    with pytest.raises(DirectoryError):
        odirect.open_volume(scratch)
    for content in (b"", b"x" * 100, bytes(1 << 20)):
        path = scratch / "nothing"
        path.write_bytes(content)
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="no file system"):
                odirect.open_volume(path, "r+")
    with made_image("xfs", directory=scratch) as path, pytest.raises(UnsupportedError, match="XFS"):
        odirect.open_volume(path)


def test_a_volume_that_is_not_ours_to_write(scratch: Path) -> None:
    """ext4 is not opened for writing, and the image is free again afterwards (F34)."""
    with made_image("ext4", directory=scratch) as path:
        for _ in range(2):
            with pytest.raises((ReadOnlyError, UnsupportedError)):
                odirect.open_volume(path, "r+")


def test_many_readers_or_one_writer(image: Path) -> None:
    """The advisory lock: refused at once, with the holder's name, and given back (F34)."""
    with odirect.open_volume(image) as one, odirect.open_volume(image) as other:
        assert one.listdir() == other.listdir()
        with pytest.raises(InUseError, match="this very process") as caught:
            odirect.open_volume(image, "r+")
        assert caught.value.filename == str(image)
    with odirect.open_volume(image, "r+"):
        for mode in ("r", "r+"):
            with pytest.raises(InUseError, match="locked"):
                odirect.open_volume(image, mode)
            program = f"import odirect; odirect.open_volume({str(image)!r}, {mode!r})"
            refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
            assert refused.returncode and f"process {os.getpid()}" in refused.stderr
    odirect.open_volume(image, "r+").close()


def test_an_image_behind_a_loop_device(image: Path) -> None:
    """Not written while a loop device or a mount has it, unless one insists (F34)."""
    with loop_device(image):
        with pytest.raises(InUseError, match="loop"):
            odirect.open_volume(image, "r+")
        odirect.open_volume(image).close()
        odirect.open_volume(image, "r+", overwrite_in_use=True).close()
    with mounted(image, "ext2"), pytest.raises(InUseError, match="mounted"):
        odirect.open_volume(image, "r+")
    odirect.open_volume(image, "r+").close()


def test_a_block_device(image: Path) -> None:
    """It is opened, and held against mounts and other writers as long as it is written."""
    with loop_device(image) as device:
        with odirect.open_volume(device, "r+") as volume:
            volume.write_bytes("/file", b"content")
            refused = subprocess.run([needs_tool("mount"), device, "/mnt"], capture_output=True, check=False)
            assert refused.returncode
            with pytest.raises(InUseError):
                os.close(odirect.open(device, "r+").fileno())
        with mounted(device, "ext2", "ro") as point:
            assert (point / "file").read_bytes() == b"content"
            with pytest.raises(InUseError, match="mounted"):
                odirect.open_volume(device, "r+")


@pytest.mark.parametrize(("blocks", "direct"), [("1024", False), ("4096", True)])
def test_a_device_with_large_sectors(scratch: Path, blocks: str, direct: bool) -> None:
    """Blocks that are smaller than the device's sectors go through the page cache, and it says so (F50)."""
    with (
        made_image("ext2", directory=scratch, mkfs=("-b", blocks)) as image,
        loop_device(image, 4096) as device,
        odirect.open_volume(device, "r+") as volume,
    ):
        assert volume.is_direct is direct and volume.block_bytes == int(blocks)
        buffer = odirect.empty(65536)
        buffer[:] = random.Random(1).randbytes(65536)
        with volume.open("/file", "w+") as file:
            assert file.pwrite(buffer, 0) == 65536
            assert file.last_outcome is not None
            assert file.last_outcome.kind is (Kind.DIRECT if direct else Kind.BUFFERED)
            assert file.last_outcome.reason is (Reason.NONE if direct else Reason.MISALIGNED_LENGTH)
        assert volume.read_bytes("/file") == bytes(buffer)
        assert volume.check() == []


def test_an_image_that_refuses_direct_io(scratch: Path) -> None:
    """On tmpfs the page cache serves it: honestly, and not at all for strict (F50)."""
    with made_image("ext2", directory=scratch) as image, mounted("odirect-test", "tmpfs", "size=32m") as memory:
        copy = memory / "image"
        copy.write_bytes(image.read_bytes())
        with odirect.open_volume(copy, "r+") as volume:
            volume.write_bytes("/file", bytes(8192))
            with volume.open("/file", "r+") as file:
                buffer = odirect.empty(8192)
                assert file.preadinto(buffer, 0) == 8192
                assert file.last_outcome == (Kind.BUFFERED, _refusal(volume), Promise.NONE)
            with pytest.raises(NotDirectError):
                volume.open("/file", access="strict")
            assert not volume.is_direct


def _refusal(volume: Volume) -> Reason:
    """Newer kernels take O_DIRECT on tmpfs and serve it from memory."""
    return next(iter(volume._reasons.values()))


def test_closed_is_closed(volume: Volume) -> None:
    """Everything is ClosedError afterwards, also of its files; closing twice is harmless."""
    file = volume.open("/file", "w+")
    path = volume / "file"
    other = memory_volume()
    other.close()
    other.close()
    for call in (
        lambda: other.stat("/"),
        lambda: other.exists("/"),
        lambda: other.listdir(),
        lambda: other.open("/x", "w"),
        lambda: other.sync(),
        lambda: other.statfs(),
        lambda: other.copy_in("/etc/hostname", "/"),
        lambda: other.__enter__(),
        lambda: (other / "x").read_bytes(),
    ):
        with pytest.raises(ClosedError):
            call()
    with memory_volume() as inner:
        left = inner.open("/file", "w+")
    assert left.closed
    with pytest.raises(ClosedError):
        left.pwrite(b"x", 0)
    file.close()
    file.close()
    for use in (lambda: file.pread(1, 0), lambda: file.size, lambda: file.seek(0), lambda: file.submit("read", 0, b"")):
        with pytest.raises(ClosedError):
            use()
    assert path.is_file()
    assert not volume.closed


def test_what_was_not_closed_is_closed_when_nobody_has_it(image: Path) -> None:
    """With a warning; what was written is there, and the volume is clean and free."""
    volume = odirect.open_volume(image, "r+")
    file = volume.open("/file", "w")
    file.write(b"kept")
    del volume
    gc.collect()
    file.write(b" on")  # A file keeps its volume.
    with pytest.warns(ResourceWarning, match="not closed"):
        del file
        gc.collect()
    with odirect.open_volume(image, "r+") as volume:
        assert volume.read_bytes("/file") == b"kept on"


def test_a_program_that_forgets_to_close(image: Path) -> None:
    """At its end the volume is closed for it."""
    program = f"import odirect; v = odirect.open_volume({str(image)!r}, 'r+'); v.write_bytes('/file', b'kept')"
    subprocess.run([sys.executable, "-c", program], check=True)
    with odirect.open_volume(image, "r+") as volume:
        assert volume.read_bytes("/file") == b"kept"


def test_a_file_that_was_thrown_away_is_closed(memory: Volume) -> None:
    """With the next call, so that nothing happens in the middle of another: an unlinked file is gone then."""
    memory.open("/file", "w").write(b"x" * 5000)
    gc.collect()
    memory.remove("/file")
    assert memory.check() == []
    assert memory.statfs().f_bfree == memory.statfs().f_blocks


def test_neither_copied_nor_pickled(memory: Volume) -> None:
    """They are of this process."""
    with memory.open("/file", "w") as file:
        for what in (memory, file):
            with pytest.raises(TypeError, match="pickled"):
                pickle.dumps(what)


def test_a_forked_child_has_nothing(image: Path) -> None:
    """A clear error there; closing, and ending, leave the parent's alone, and its lock too (F24)."""
    with odirect.open_volume(image, "r+") as volume, volume.open("/file", "w+") as file:
        file.write(b"parent")
        child = os.fork()
        if not child:
            status = 1
            try:
                for call in (lambda: volume.listdir(), lambda: file.pread(1, 0), lambda: file.size):
                    with pytest.raises(ClosedError, match="parent"):
                        call()
                file.close()
                volume.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert file.pread(100, 0) == b"parent"
        with pytest.raises(InUseError):
            odirect.open_volume(image, "r+")
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
    try:
        # The child still has the descriptors, but not the lock.
        with odirect.open_volume(image, "r+") as volume:
            assert volume.read_bytes("/file") == b"parent"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", ["", "b"])
@pytest.mark.parametrize("mode", ["r", "r+", "w", "w+", "x", "x+", "a", "a+"])
def test_every_mode(memory: Volume, scratch: Path, mode: str, binary: str) -> None:
    """Each mode does, and allows, what it does with the built-in open."""
    theirs = scratch / "file"
    if mode[0] != "x":
        theirs.write_bytes(b"0123456789" * 100)
        memory.write_bytes("/file", b"0123456789" * 100)
    with memory.open("/file", mode + binary) as file, open(theirs, f"{mode[0]}b{mode[1:]}") as it:
        assert (file.readable(), file.writable(), file.seekable()) == (it.readable(), it.writable(), True)
        assert file.tell() == it.tell()
        assert file.mode.replace("b", "") == mode
        if file.writable():
            assert file.write(b"new") == it.write(b"new")
        else:
            for call in (lambda: file.write(b""), lambda: file.truncate(0), lambda: file.fallocate(0, 1, punch=True)):
                with pytest.raises(io.UnsupportedOperation):
                    call()
        assert file.tell() == it.tell()
        assert (file.seek(0), it.seek(0)) == (0, 0)
        if file.readable():
            assert file.read() == it.read()
        else:
            for call in (
                lambda: file.read(1),
                lambda: file.readinto(bytearray(1)),
                lambda: file.submit("read", 0, b""),
            ):
                with pytest.raises(io.UnsupportedOperation):
                    call()
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
    assert memory.read_bytes("/file") == theirs.read_bytes()


@pytest.mark.parametrize("mode", ["", "b", "rt", "rw", "+", "rb+b", "U", "wa"])
def test_modes_that_are_none(memory: Volume, mode: str) -> None:
    with pytest.raises(ValueError, match="mode"):
        memory.open("/file", mode)
    assert memory.listdir() == []


def test_arguments_that_are_wrong(memory: Volume) -> None:
    """ValueError and TypeError, and nothing is done."""
    with memory.open("/file", "w+") as file:
        file.write(b"content")
        for call in (
            lambda: memory.open("/file", access="quick"),  # type: ignore[arg-type]
            lambda: file.pread(-1, 0),
            lambda: file.pread(1, -1),
            lambda: file.pwrite(b"x", -1),
            lambda: file.truncate(-1),
            lambda: file.seek(-1),
            lambda: file.seek(0, 9),
            lambda: file.fallocate(-1, 1, punch=True),
            lambda: file.fallocate(0, 0, punch=True),
            lambda: file.fallocate(0, 1, punch=True, zero=True),
            lambda: file.extents(-1),
            lambda: file.preadinto(b"readonly", 0),
            lambda: file.submit("move", 0, b""),  # type: ignore[arg-type]
            lambda: file.submit("read", -1, bytearray(1)),
            lambda: file.read_batch([[0]], 1, bytearray(1)),  # type: ignore[list-item]
            lambda: file.read_batch([-1], 1, bytearray(1)),
            lambda: file.read_batch([0], 1, bytearray(0)),
            lambda: file.read_batch([0], 1, bytearray(1), depth=0),
            lambda: memory.stat("a\0b"),
            lambda: memory.utime("/file", (1, 1), ns=(1, 1)),
        ):
            with pytest.raises(ValueError):
                call()
        for call in (
            lambda: file.pwrite("text", 0),
            lambda: file.pread(1, 0.5),  # type: ignore[arg-type]
            lambda: file.read_batch([0.5], 1, bytearray(1)),  # type: ignore[list-item]
            lambda: memory.stat(7),  # type: ignore[arg-type]
            lambda: memory.open("/file", 7),  # type: ignore[arg-type]
        ):
            with pytest.raises((TypeError, AttributeError)):
                call()
        with pytest.raises(UnsupportedError):
            file.fallocate(0, 1)
        assert file.pread(100, 0) == b"content"


@pytest.mark.parametrize("write", WRITE_VERBS, ids=verb_name)
@pytest.mark.parametrize("read", READ_VERBS, ids=verb_name)
def test_every_verb(memory: Volume, write: Callable[..., int], read: Callable[..., int]) -> None:
    """All ways to write and read give the same bytes and outcomes, aligned or not."""
    dice = random.Random(3)
    model = ModelFile()
    with memory.open("/file", "w+") as file:
        for offset, length in ((0, 4096), (4096, 8192), (100, 5), (12_000, 1000), (20_000, 1), (512, 1024)):
            data = odirect.empty(length)
            data[:] = dice.randbytes(length)
            assert write(file, data, offset) == model.pwrite(data, offset)
            assert file.size == model.size
            into = odirect.empty(length + 600)
            assert read(file, into, offset) == len(model.pread(length + 600, offset))
            assert bytes(into[: file.size - offset]) == model.pread(length + 600, offset)
            assert file.last_outcome is not None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("access", ["auto", "buffered"])
def test_a_file_against_the_model(volume: Volume, access: Any, seed: int) -> None:
    """Random operations on the file and on a plain one in memory agree (F02, F05, F13)."""
    dice = random.Random(seed)
    model = ModelFile()
    with volume.open("/file", "w+", access=access) as file:
        for _ in range(150):
            offset, length = dice.randrange(60_000), dice.choice((1, 511, 512, 4096, dice.randrange(30_000)))
            if dice.random() < 0.4:
                offset, length = offset // 512 * 512, -(-length // 512) * 512
            verb = dice.choice(("write", "write", "read", "truncate", "punch", "append", "zero", "data", "hole"))
            if verb == "write":
                data = dice.randbytes(length)
                assert file.pwrite(data, offset) == model.pwrite(data, offset)
            elif verb == "append":
                data = dice.randbytes(length)
                with volume.open("/file", "a", access=access) as appending:
                    assert appending.tell() == model.append(data)
                    assert appending.write(data) == length
                    assert appending.tell() == model.size
            elif verb == "truncate":
                model.truncate(offset)
                assert file.truncate(offset) == offset
            elif verb == "punch":
                model.punch(offset, length)
                file.fallocate(offset, length, punch=True)
            elif verb == "zero":
                model.pwrite(bytes(length), offset)
                file.fallocate(offset, length, zero=True)
            elif verb in ("data", "hole"):
                _check_seek(file, model, offset, data=verb == "data")
            assert file.size == model.size
            assert file.pread(length, offset) == model.pread(length, offset)
        assert volume.read_bytes("/file") == model.data
        file.seek(0)
        assert file.readall() == model.data
        assert sum(tally.operations for tally in file.totals.values()) > 100
    assert volume.stat("/file").st_size == model.size


def _check_seek(file: odirect.FileInVolume, model: ModelFile, offset: int, *, data: bool) -> None:
    """What is between the offset and the answer is a hole, or is data or the end."""
    try:
        found = file.seek(offset, os.SEEK_DATA if data else os.SEEK_HOLE)
    except OSError as error:
        assert error.errno == errno.ENXIO
        assert offset >= model.size or (data and not any(model.data[offset:]))
        return
    assert offset <= found <= model.size and file.tell() == found
    if data:
        assert not any(model.data[offset:found])


def test_holes_are_found(volume: Volume) -> None:
    """SEEK_DATA and SEEK_HOLE, and the extents, of a file with a hole in the middle and one at its end."""
    unit = 65536
    with volume.open("/file", "w+") as file:
        file.pwrite(b"x" * unit, 0)
        file.pwrite(b"y" * unit, 3 * unit)
        file.truncate(5 * unit)
        assert file.seek(0, os.SEEK_DATA) == 0
        assert file.seek(10, os.SEEK_HOLE) == unit
        assert file.seek(unit, os.SEEK_DATA) == 3 * unit
        assert file.seek(3 * unit, os.SEEK_HOLE) == 4 * unit
        assert file.seek(4 * unit + 5, os.SEEK_HOLE) == 4 * unit + 5
        for offset, whence in ((4 * unit, os.SEEK_DATA), (5 * unit, os.SEEK_HOLE), (5 * unit, os.SEEK_DATA)):
            with pytest.raises(OSError) as caught:
                file.seek(offset, whence)
            assert caught.value.errno == errno.ENXIO
        assert file.tell() == 4 * unit + 5
        extents = file.extents()
        kinds = [bool(kind) for kind, _ in itertools.groupby(extents, key=lambda extent: extent.kind)]
        assert kinds == [True, False, True, False]
        assert [extent.offset for extent in extents[1:]] == [each.offset + each.length for each in extents[:-1]]
        assert volume.extents("/file", unit, unit)[0].length >= unit
    assert volume.stat("/file").st_blocks * 512 < 3 * unit


def test_strict_and_durable(volume: Volume) -> None:
    """strict raises for what is not aligned; dsync promises; the outcome says what happened (F40)."""
    buffer = odirect.empty(8192)
    with volume.open("/file", "w+", access="strict", dsync=True) as file:
        assert file.pwrite(buffer, 0) == 8192
        assert file.last_outcome == (Kind.DIRECT, Reason.NONE, Promise.DURABLE)
        for call in (lambda: file.pwrite(buffer[:100], 8192), lambda: file.preadinto(buffer, 100)):
            with pytest.raises(AlignmentError) as caught:
                call()
            assert caught.value.filename == "/file"
        assert file.preadinto(buffer, 0) == 8192
        file.sync()
        file.sync(data_only=True)
        file.flush()
    with volume.open("/file", "r+") as file:
        assert file.pwrite(b"abc", 5) == 3
        assert file.last_outcome is not None and file.last_outcome.kind is not Kind.DIRECT
        assert file.pread(4, 4) == b"\0abc"
    volume.sync()


def test_it_fits_where_files_fit(volume: Volume) -> None:
    """zipfile, io.BufferedReader and TextIOWrapper work over it."""
    with volume.open("/archive.zip", "w+") as raw:
        with zipfile.ZipFile(raw, "w") as archive:
            archive.writestr("name", b"content" * 1000)
        with zipfile.ZipFile(raw) as archive:
            assert archive.read("name") == b"content" * 1000
    with io.TextIOWrapper(io.BufferedRandom(volume.open("/text", "w+")), "utf-8") as text:
        text.write("zwei\nZeilen\n")
        text.seek(0)
        assert text.readlines() == ["zwei\n", "Zeilen\n"]


def test_batches(volume: Volume) -> None:
    """Many at once, also past the end, which a write moves in order of offset (F03)."""
    dice = random.Random(5)
    content = dice.randbytes(200_000)
    volume.write_bytes("/file", content)
    with volume.open("/file", "r+") as file:
        offsets = [dice.randrange(250_000) for _ in range(100)]
        out = bytearray(100 * 1000)
        counts = file.read_batch(offsets, 1000, out, depth=7)
        for number, offset in enumerate(offsets):
            expected = content[offset : offset + 1000]
            assert counts[number] == len(expected)
            assert out[number * 1000 : number * 1000 + len(expected)] == expected
        data = dice.randbytes(64 * 4096)
        places = numpy.arange(64)[::-1] * 8192 + 100_000 // 4096 * 4096
        assert list(file.write_batch(places, 4096, data)) == [4096] * 64
        for number, place in enumerate(places.tolist()):
            assert file.pread(4096, place) == data[number * 4096 : (number + 1) * 4096]
        assert file.size == int(places.max()) + 4096
        assert list(file.read_batch([], 10, bytearray(0))) == []
        assert list(file.read_batch([0, 1], 0, bytearray(0))) == [0, 0]
    with volume.open("/file", "r+", access="strict") as file, pytest.raises(AlignmentError):
        file.read_batch([0, 7, 4096], 4096, odirect.empty(3 * 4096))


def test_submitted_requests(volume: Volume) -> None:
    """They finish each once, with their tags; those that grow the file land in order (B07, G04)."""
    with volume.open("/file", "w+") as file:
        assert list(file.completions()) == []
        blocks = [odirect.empty(4096) for _ in range(40)]
        for number, block in enumerate(blocks):
            block[:] = bytes([number]) * 4096
            request = file.submit("write", number * 4096, block, tag=number)
            assert request.tag == number and request.length == 4096
        finished = list(file.completions())
        assert all(request.result() == 4096 and request.outcome for request in finished)
        assert [request.tag for request in finished] == list(range(40))
        assert file.size == 40 * 4096
        into = [odirect.empty(4096) for _ in range(50)]
        for number, buffer in enumerate(into):
            file.submit("read", number * 4096, buffer, tag=number)
        for request in file.completions():
            assert request.done
            number = cast(int, request.tag)
            assert request.result() == (4096 if number < 40 else 0)
            if number < 40:
                assert bytes(into[number]) == bytes(blocks[number])
    with volume.open("/file", access="strict") as file:
        file.submit("read", 3, odirect.empty(512))
        (request,) = file.completions()
        with pytest.raises(AlignmentError) as caught:
            request.result()
        assert caught.value.filename == "/file" and request.outcome is None
        file.submit("read", 0, odirect.empty(512))  # close waits for it


def test_more_may_be_submitted_meanwhile(memory: Volume) -> None:
    """`completions` goes on until nothing is left."""
    memory.write_bytes("/file", bytes(range(256)) * 16)
    seen = 0
    with memory.open("/file") as file:
        file.submit("read", 0, bytearray(1))
        for request in file.completions():
            seen += request.result()
            if seen < 100:
                file.submit("read", seen, bytearray(1))
    assert seen == 100


def test_full_volumes(scratch: Path) -> None:
    """A short count where a part had room, then NoSpaceError with the file's path; room comes back."""
    with memory_volume(blocks=10) as volume, volume.open("/file", "w") as file:
        assert file.pwrite(bytes(20_000), 0) == 10_240
        with pytest.raises(NoSpaceError) as caught:
            file.pwrite(b"x", 10_240)
        assert caught.value.filename == "/file"
        with pytest.raises(NoSpaceError):
            volume.write_bytes("/other", b"x")
        file.truncate(0)
        assert volume.write_bytes("/other", b"x") == 1


def test_nowait(memory: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams give None where they would wait; transfers at an offset raise (F08)."""

    async def wait(*_: object, **__: object) -> Done:
        raise WouldBlockError("it would wait")

    memory.write_bytes("/file", b"x")
    with memory.open("/file", "r+", nowait=True) as file:
        monkeypatch.setattr(MemoryFile, "read", wait)
        monkeypatch.setattr(MemoryFile, "write", wait)
        assert file.read(1) is None and file.readall() is None and file.readinto(bytearray(1)) is None
        assert file.write(b"x") is None
        with pytest.raises(WouldBlockError):
            file.pread(1, 0)


# --- names ---------------------------------------------------------------------------------------


def _make_tree(top: Path) -> None:
    """A tree of the host with one of each."""
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "file").write_bytes(b"content" * 3000)
    (top / "none").touch()
    (top / "sub" / "other").write_bytes(b"x")
    os.link(top / "sub" / "other", top / "sub" / "deep" / "again")
    (top / "link").symlink_to("sub/other")
    (top / "dangling").symlink_to("/nowhere/at/all")
    (top / "to-dir").symlink_to("sub")
    os.mkfifo(top / "fifo", 0o640)
    (top / "sub" / os.fsdecode(b"n\xffame")).write_bytes(b"not utf-8")
    (top / "sub" / "n\u00e4me").write_bytes(b"utf-8")
    with (top / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"in the middle")
        file.truncate(5 << 20)
    os.chmod(top / "file", 0o4751)
    os.chmod(top / "empty", 0o1777)
    if os.geteuid() == 0:
        os.chown(top / "none", 70_000, 80_000)
        os.mknod(top / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(top / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
        os.chown(top / "link", 5, 6, follow_symlinks=False)
    with contextlib.suppress(OSError):
        os.setxattr(top / "file", "user.comment", b"\0bytes\xff")
        os.setxattr(top / "sub", "user.empty", b"")
    for number, path in enumerate(sorted(top.rglob("*"), key=lambda path: -len(path.parts))):
        os.utime(path, ns=(1_500_000_000_000_000_000 + number, 1_400_000_000_500_000_000), follow_symlinks=False)
    os.utime(top, ns=(10**18, 10**18))


def _described(side: Any, top: str, *, seconds: bool) -> dict[str, Any]:
    """All that can be told of a tree; seconds: times without fractions."""
    unit = 1_000_000_000 if seconds else 1
    found = {}
    for directory, directories, others in side.walk(top):
        for name in (*directories, *others):
            path = os.path.join(directory, name)
            status = side.lstat(path)
            is_file, is_link = stat.S_ISREG(status.st_mode), stat.S_ISLNK(status.st_mode)
            found[os.path.relpath(path, top)] = (
                stat.filemode(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_nlink,
                status.st_rdev,
                status.st_size if is_file or is_link else 0,
                None if is_link and os.geteuid() else status.st_mtime_ns // unit,
                side.readlink(path) if is_link else None,
                sorted(side.xattrs(path).items()) if is_file else None,
                side.read_bytes(path) if is_file else None,
            )
    return found


class _Host:
    walk = staticmethod(os.walk)
    lstat = staticmethod(os.lstat)
    readlink = staticmethod(os.readlink)

    @staticmethod
    def xattrs(path: str) -> dict[bytes, bytes]:
        return {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}

    @staticmethod
    def read_bytes(path: str) -> bytes:
        return Path(path).read_bytes()


def _has_fine_times(volume: Volume) -> bool:
    volume.write_bytes("/probe", b"")
    volume.utime("/probe", ns=(7, 7))
    fine = volume.stat("/probe").st_mtime_ns == 7
    volume.remove("/probe")
    return fine


def test_a_tree_goes_in_and_comes_out(volume: Volume, scratch: Path) -> None:
    """Everything is kept: kinds, owners, times, links, holes, attributes, names that are no UTF-8."""
    source = scratch / "source"
    _make_tree(source)
    expected = _described(_Host, str(source), seconds=not _has_fine_times(volume))
    told: list[tuple[int, int]] = []
    report = volume.copy_in(source, "/tree", progress=lambda done, whole: told.append((done, whole)))
    assert report.left_out == [] and report.target == "/tree"
    assert (report.hard_links, report.links) == (1, 3) and report.files == 6 and report.directories == 4
    assert report.bytes_skipped > 4 << 20 and report.bytes_copied < 1 << 20
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] == report.bytes_copied + report.bytes_skipped
    seconds = not _has_fine_times(volume)
    assert _described(volume, "/tree", seconds=seconds) == expected
    assert volume.stat("/tree").st_mtime_ns == 10**18
    assert volume.stat("/tree/sparse").st_blocks * 512 < 1 << 20
    target = scratch / "target"
    told.clear()
    back = volume.copy_out("/tree", target, progress=lambda done, whole: told.append((done, whole)))
    assert back.left_out == [] and back.target == str(target)
    assert back._replace(target="/tree", left_out=[], bytes_copied=0, bytes_skipped=0) == report._replace(
        bytes_copied=0, bytes_skipped=0
    )
    assert _described(_Host, str(target), seconds=seconds) == expected
    assert target.stat().st_mtime_ns == 10**18
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 20
    assert told[-1][0] == told[-1][1]
    # Once more, over what is there.
    assert volume.copy_in(f"{source}/", "/tree").directories == 0
    assert _described(volume, "/tree", seconds=seconds) == expected
    assert volume.copy_out("/tree/", target).directories == 0
    assert _described(_Host, str(target), seconds=seconds) == expected


def test_large_files_go_in_and_come_out(volume: Volume, scratch: Path) -> None:
    """More than one chunk, in several runs, the last one short."""
    content = bytearray(random.Random(8).randbytes(5_000_000))
    content[1 << 20 : 3 << 20] = bytes(2 << 20)
    source = scratch / "large"
    with source.open("wb") as file:
        file.write(content[: 1 << 20])
        file.seek(3 << 20)
        file.write(content[3 << 20 :])
    report = volume.copy_in(source, "/")
    assert report.target == "/large" and report.bytes_copied + report.bytes_skipped == len(content)
    assert volume.read_bytes("/large") == content
    volume.copy_out("/large", scratch / "back")
    assert (scratch / "back").read_bytes() == content
    assert [path.name for path in scratch.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("source", "target", "made"),
    [
        ("tree", "/new", "/new/file"),
        ("tree", "/new/", "/new/file"),
        ("tree", "/there", "/there/tree/file"),
        ("tree/", "/there", "/there/file"),
        ("tree/.", "/there/", "/there/file"),
        ("tree", "/", "/tree/file"),
        ("tree/", "/", "/file"),
        ("tree/file", "/new", "/new"),
        ("tree/file", "/there", "/there/file"),
        ("tree/file", "/there/old", "/there/old"),
        ("tree/file", "/link", "/there/file"),
        ("tree/file", "/there/to-old", "/there/old"),
    ],
)
def test_where_copies_go(memory: Volume, scratch: Path, source: str, target: str, made: str) -> None:
    """In both directions: a target that is a directory is gone into, but what is behind a slash goes there itself."""
    (scratch / "tree").mkdir()
    (scratch / "tree" / "file").write_bytes(b"new")
    (scratch / "host" / "there").mkdir(parents=True)
    (scratch / "host" / "there" / "old").write_bytes(b"old")
    (scratch / "host" / "link").symlink_to("there")
    (scratch / "host" / "there" / "to-old").symlink_to("old")
    memory.copy_in(scratch / "host/", "/host")
    memory.copy_in(f"{scratch}/host/", "/")
    memory.rmtree("/host")
    memory.copy_in(f"{scratch}/{source}", target)
    assert memory.read_bytes(made) == b"new"
    with memory_volume() as other:
        other.copy_in(scratch / "tree", "/tree")
        other.copy_out(f"/{source}", f"{scratch}/host{target}")
    assert Path(f"{scratch}/host{made}").read_bytes() == b"new" or "to-old" in target


def test_copies_that_are_refused(memory: Volume, scratch: Path) -> None:
    """Kinds that do not fit, trees that were not asked for, sources and targets that are not there."""
    (scratch / "tree" / "name").mkdir(parents=True)
    (scratch / "file").write_bytes(b"x")
    memory.makedirs("/tree/name")
    memory.write_bytes("/file", b"x")
    with pytest.raises(DirectoryError):
        memory.copy_in(scratch / "tree", "/new", recursive=False)
    with pytest.raises(DirectoryError):
        memory.copy_out("/tree", scratch / "new", recursive=False)
    for source, target in ((scratch / "tree", "/file"), (scratch / "file", "/file/")):
        with pytest.raises(NotDirectoryError):
            memory.copy_in(source, target)
    with pytest.raises(NotDirectoryError):
        memory.copy_out("/tree", scratch / "file")
    os.rename(scratch / "file", scratch / "name")
    with pytest.raises(DirectoryError) as caught:
        memory.copy_in(scratch / "name", "/tree")
    assert caught.value.filename == "/tree/name"
    memory.rename("/file", "/name")
    with pytest.raises(DirectoryError) as caught:
        memory.copy_out("/name", scratch / "tree")
    assert caught.value.filename == str(scratch / "tree" / "name")
    for call in (
        lambda: memory.copy_in(scratch / "none", "/"),
        lambda: memory.copy_in(scratch / "name", "/none/more"),
        lambda: memory.copy_in(scratch / "name", "/none/"),
        lambda: memory.copy_out("/none", scratch),
        lambda: memory.copy_out("/name", scratch / "none" / "more"),
        lambda: memory.copy_out("/name", f"{scratch}/none/"),
    ):
        with pytest.raises(MissingError):
            call()
    assert memory.check() == []


def test_nothing_is_written_outside_the_target(memory: Volume, scratch: Path) -> None:
    """Symbolic links in the target's tree are not followed, and names that lead out are refused."""
    outside = scratch / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(b"safe")
    target = scratch / "target"
    target.mkdir()
    (target / "sub").symlink_to(outside)
    (target / "file").symlink_to(outside / "victim")
    memory.makedirs("/sub")
    memory.write_bytes("/sub/new", b"evil")
    memory.write_bytes("/file", b"evil")
    with pytest.raises(ExistsError, match="symbolic link"):
        memory.copy_out("/", target)
    memory.copy_out("/file", target)
    assert (target / "file").read_bytes() == b"evil" and not (target / "file").is_symlink()
    assert sorted(path.name for path in outside.iterdir()) == ["victim"]
    assert (outside / "victim").read_bytes() == b"safe"
    file_system = memory.file_system
    assert isinstance(file_system, MemoryFileSystem)
    root = file_system._nodes[2]
    for name in (b"../outside/victim", b"..", b"/etc/evil", b""):
        root.entries[name] = root.entries[b"file"]
        with pytest.raises(CorruptionError):
            memory.copy_out("/", scratch / "fresh")
        with pytest.raises(CorruptionError):
            memory.listdir("/")
        del root.entries[name]
    assert not (scratch / "fresh").exists()


def test_half_a_file_never_stays(memory: Volume, scratch: Path) -> None:
    """Whatever ends a copy, what was being copied is gone and what it would have replaced is there."""
    big = scratch / "big"
    big.write_bytes(b"b" * (9 << 20))

    class Enough(Exception):
        pass

    def stop(done: int, whole: int) -> None:
        if done > 4 << 20:
            raise Enough

    for interrupt in (Enough, KeyboardInterrupt):
        call = stop if interrupt is Enough else lambda done, whole: os.kill(os.getpid(), signal.SIGINT)
        for target in ("/big", "/old"):
            memory.write_bytes("/old", b"old")
            with pytest.raises(interrupt):
                memory.copy_in(big, target, progress=call)
            assert memory.listdir() == ["old"] and memory.read_bytes("/old") == b"old"
    memory.copy_in(big, "/")
    out = scratch / "out"
    out.mkdir()
    for interrupt in (Enough, KeyboardInterrupt):
        call = stop if interrupt is Enough else lambda done, whole: os.kill(os.getpid(), signal.SIGINT)
        for target in ("big", "old"):
            (out / "old").write_bytes(b"old")
            with pytest.raises(interrupt):
                memory.copy_out("/big", out / target, progress=call)
            assert [path.name for path in out.iterdir()] == ["old"] and (out / "old").read_bytes() == b"old"
    assert memory.check() == []
    with memory_volume(blocks=5000) as small:
        with pytest.raises(NoSpaceError) as caught:
            small.copy_in(big, "/target")
        assert caught.value.filename == "/target"
        assert small.listdir() == [] and small.check() == []
        assert small.statfs().f_bfree == 5000


def test_a_source_that_changes(memory: Volume, scratch: Path) -> None:
    """Shorter than it was, or another file by now: InUseError, and nothing stays."""
    big = scratch / "big"
    big.write_bytes(b"b" * (9 << 20))
    with pytest.raises(InUseError, match="shorter"):
        memory.copy_in(big, "/", progress=lambda done, whole: os.truncate(big, 10))
    (scratch / "tree").mkdir()
    for name in ("a", "b"):
        (scratch / "tree" / name).write_bytes(b"x" * 300_000)

    def replace(done: int, whole: int) -> None:
        (scratch / "tree" / "b").unlink()
        (scratch / "tree" / "b").symlink_to("/etc/hostname")

    with pytest.raises((InUseError, PathError)):
        memory.copy_in(scratch / "tree", "/", progress=replace)
    assert memory.listdir("/") == ["tree"] and memory.listdir("/tree") == ["a"]


def test_copies_without_attributes(memory: Volume, scratch: Path) -> None:
    """Permissions stay, but owners, times and special bits are those of a new file."""
    path = scratch / "file"
    path.write_bytes(b"x")
    path.chmod(0o4751)
    os.utime(path, (1, 1))
    memory.owner = memory.owner._replace(uid=7, gid=8)
    memory.copy_in(path, "/", attributes=False)
    status = memory.stat("/file")
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o751, 7, 8) and status.st_mtime != 1
    memory.chmod("/file", 0o6640)
    memory.copy_out("/file", scratch / "out", attributes=False)
    found = (scratch / "out").stat()
    assert (found.st_mode & 0o7777, found.st_uid) == (0o640, os.geteuid())


def test_owners_that_may_not_be_given(memory: Volume, scratch: Path) -> None:
    """Without privileges: reported, and set-user-ID is not kept for somebody else."""
    needs_root()
    scratch.chmod(0o777)
    for above in (scratch, *scratch.parents):
        if above.stat().st_mode & 0o005 != 0o005:
            above.chmod(0o755)
    memory.write_bytes("/file", b"x")
    memory.chown("/file", 0, 0)
    memory.chmod("/file", 0o4755)
    memory.mknod("/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with memory_volume() as volume:
                volume.owner = volume.owner._replace(uid=0, gid=0)
                volume.write_bytes("/file", b"x")
                volume.chmod("/file", 0o4755)
                volume.mknod("/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
                report = volume.copy_out("/", scratch / "out")
                assert len(report.left_out) == 3 and report.nodes == 0, report
                assert (scratch / "out" / "file").stat().st_mode & 0o7777 == 0o755
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_scandir_and_walk_are_like_those_of_os(memory: Volume, scratch: Path) -> None:
    """The same entries, kinds and order of directories, for text and bytes, from above and from below."""
    _make_tree(scratch / "tree")
    memory.copy_in(scratch / "tree", "/")
    ours = {entry.name: entry for entry in memory.scandir("/tree")}
    with os.scandir(scratch / "tree") as entries:
        theirs = {entry.name: entry for entry in entries}
    assert ours.keys() == theirs.keys()
    for name, entry in theirs.items():
        mine = ours[name]
        assert mine.path == f"/tree/{name}" and mine.inode() == mine.stat(follow_symlinks=False).st_ino
        assert mine.is_symlink() == entry.is_symlink()
        for follow in (True, False):
            assert mine.is_dir(follow_symlinks=follow) == entry.is_dir(follow_symlinks=follow)
            assert mine.is_file(follow_symlinks=follow) == entry.is_file(follow_symlinks=follow)
        assert mine.stat(follow_symlinks=False).st_mode == entry.stat(follow_symlinks=False).st_mode
        assert name in repr(mine)

    def walked(walk: Callable[..., Any], top: Any, **options: Any) -> list[Any]:
        def relative(path: Any) -> Any:
            return path[len(top) :]

        return sorted((relative(place), sorted(dirs), sorted(names)) for place, dirs, names in walk(top, **options))

    host = str(scratch / "tree")
    for options in ({}, {"topdown": False}, {"followlinks": True}):
        assert walked(memory.walk, "/tree", **options) == walked(os.walk, host, **options)
        assert walked(memory.walk, b"/tree", **options) == walked(os.walk, os.fsencode(host), **options)
    below = [place for place, _, _ in memory.walk("/tree", topdown=False)]
    assert below[-1] == "/tree" and below.index("/tree/sub/deep") < below.index("/tree/sub")
    for place, directories, _ in memory.walk("/tree"):
        directories[:] = [name for name in directories if name != "sub"]
        assert "sub" not in place
    errors: list[OSError] = []
    assert list(memory.walk("/none", onerror=errors.append)) == [] and list(memory.walk("/none")) == []
    assert isinstance(errors[0], MissingError)
    assert sorted(memory.listdir(b"/tree/sub")) == sorted(os.listdir(os.fsencode(host) + b"/sub"))
    assert memory.readlink(b"/tree/link") == b"sub/other" and memory.readlink("/tree/link") == "sub/other"
    with memory.scandir("/tree") as entries_of:
        next(entries_of)
        entries_of.close()
        assert list(entries_of) == []


def test_an_entry_that_has_gone(memory: Volume) -> None:
    """It is nothing any more, as os.DirEntry has it, but its stat says so."""
    memory.symlink("target", "/link")
    memory.mkdir("/target")
    (entry,) = (entry for entry in memory.scandir() if entry.name == "link")
    assert entry.is_dir() and not entry.is_file()
    (entry,) = (entry for entry in memory.scandir() if entry.name == "link")
    memory.rmdir("/target")
    assert not entry.is_dir() and not entry.is_file()
    with pytest.raises(MissingError):
        entry.stat()


def test_attributes(volume: Volume) -> None:
    """chmod, chown, utime, xattrs, links, nodes: set, and read back through stat."""
    volume.write_bytes("/file", b"12345", permissions=0o600)
    volume.chmod("/file", 0o751)
    volume.chown("/file", 70_000, -1)
    volume.chown("/file", -1, 3)
    volume.utime("/file", (1_000_000_000.5, 1_100_000_000))
    status = volume.stat("/file")
    assert isinstance(status, os.stat_result)
    assert stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o751
    assert (status.st_uid, status.st_gid, status.st_size, status.st_nlink) == (70_000, 3, 5, 1)
    assert (int(status.st_atime), status.st_mtime, status.st_mtime_ns) == (10**9, 1.1e9, 11 * 10**17)
    assert status.st_blksize == volume.block_bytes and 0 < status.st_blocks <= 8
    before = status.st_ctime_ns
    volume.utime("/file")
    assert abs(volume.stat("/file").st_mtime - volume.stat("/file").st_atime) < 2
    volume.utime("/file", ns=(5 * 10**9, 6 * 10**9))
    assert volume.stat("/file").st_mtime == 6 and volume.stat("/file").st_ctime_ns >= before
    volume.set_xattr("/file", "user.name", b"value")
    volume.set_xattr("/file", b"user.other", b"")
    assert volume.xattrs("/file") == {b"user.name": b"value", b"user.other": b""}
    volume.remove_xattr("/file", "user.name")
    with pytest.raises(PathError) as caught:
        volume.remove_xattr("/file", "user.name")
    assert caught.value.errno == errno.ENODATA and caught.value.filename == "/file"
    volume.symlink("file", "/link")
    volume.chown("/link", 9, 9, follow_symlinks=False)
    assert volume.lstat("/link").st_uid == 9 and volume.stat("/link").st_uid == 70_000
    with pytest.raises(UnsupportedError):
        volume.chmod("/link", 0o600, follow_symlinks=False)
    volume.chmod("/link", 0o600)
    assert stat.S_IMODE(volume.stat("/file").st_mode) == 0o600
    volume.link("/file", "/second")
    volume.link("/link", "/third", follow_symlinks=True)
    assert volume.stat("/third").st_nlink == 3 and os.path.samestat(volume.stat("/third"), volume.stat("/file"))
    volume.mknod("/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert volume.stat("/null").st_rdev == os.makedev(1, 3) and stat.S_ISCHR(volume.stat("/null").st_mode)
    volume.mknod("/empty")
    assert volume.is_file("/empty") and volume.read_bytes("/empty") == b""
    with pytest.raises(UnsupportedError):
        volume.open("/null")
    for mode in (stat.S_IFDIR, stat.S_IFLNK):
        with pytest.raises(PathError):
            volume.mknod("/new", mode | 0o600)
    with volume.open("/x", "w", permissions=0o640):
        assert stat.S_IMODE(volume.stat("/x").st_mode) == 0o640


def test_errors_name_what_was_given(volume: Volume) -> None:
    """The path as it was given, both of them where there are two, and the volume's for the volume."""
    given: tuple[Any, ...] = ("/none/x", b"none/x", Path("none/x"))
    for path in given:
        for call in (volume.stat, volume.listdir, volume.open, volume.mkdir, volume.remove, volume.rmtree):
            with pytest.raises(MissingError) as caught:
                call(path)
            assert caught.value.filename == os.fspath(path)
            assert os.fsdecode(path) in str(caught.value)
    with pytest.raises(MissingError) as caught:
        volume.rename("/a", b"/b")
    assert (caught.value.filename, caught.value.filename2) == ("/a", b"/b")
    with memory_volume() as other, pytest.raises(ValueError, match="another volume"):
        volume.stat(other.root)


def test_exists_and_its_like(memory: Volume) -> None:
    """False for what cannot be, as `os.path` has it."""
    memory.mkdir("/dir")
    memory.symlink("dir", "/link")
    memory.symlink("loop", "/loop")
    memory.symlink("none", "/dangling")
    assert memory.exists("/link") and memory.is_dir("/link") and not memory.is_dir("/link", follow_symlinks=False)
    assert memory.exists("/dangling", follow_symlinks=False) and not memory.exists("/dangling")
    assert not memory.exists("/loop") and memory.is_symlink("/loop") and not memory.is_file("/loop")
    for path in ("/none", "/dir/x", "a\0b", "/" + "x" * 300, "x/" * 3000, ""):
        assert not memory.exists(path) and not memory.is_file(path) and not memory.is_symlink(path)


def test_groups_are_inherited(volume: Volume) -> None:
    """What is made in a set-group-ID directory has its group."""
    volume.mkdir("/dir")
    volume.chown("/dir", 1, 77)
    volume.chmod("/dir", 0o2755)
    volume.mkdir("/dir/sub")
    volume.write_bytes("/dir/file", b"")
    assert volume.stat("/dir/sub").st_gid == volume.stat("/dir/file").st_gid == 77
    assert volume.stat("/dir/sub").st_mode & stat.S_ISGID


# --- threads and signals -------------------------------------------------------------------------


def test_any_thread_may_call(volume: Volume) -> None:
    """Eight threads, each with files of its own and one that all share."""
    volume.write_bytes("/shared", bytes(range(256)) * 64)
    failed: list[BaseException] = []
    shared = volume.open("/shared")

    def work(number: int) -> None:
        try:
            dice = random.Random(number)
            volume.mkdir(f"/{number}")
            for turn in range(12):
                data = dice.randbytes(dice.randrange(1, 30_000))
                volume.write_bytes(f"/{number}/{turn}", data)
                assert volume.read_bytes(f"/{number}/{turn}") == data
                offset = dice.randrange(16_000)
                expected = (bytes(range(256)) * 64)[offset : offset + 100]
                assert shared.pread(100, offset) == expected
                with volume.open(f"/{number}/{turn}", "a") as file:
                    file.submit("write", len(data), b"end")
                    assert [request.result() for request in file.completions()] == [3]
            assert len(volume.listdir(f"/{number}")) == 12
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.close()
    assert failed == []
    assert len(volume.listdir("/")) == 9


def test_close_waits_for_other_threads(image: Path) -> None:
    """Calls that are under way end well; those that come later are ClosedError."""
    volume = odirect.open_volume(image, "r+")
    began = threading.Event()
    ended: list[type] = []

    def work() -> None:
        try:
            for number in range(100_000):
                volume.write_bytes(f"/{number % 50}", bytes(5000))
                began.set()
        except ODirectError as error:
            ended.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    volume.close()
    thread.join()
    assert ended == [ClosedError]
    with odirect.open_volume(image, "r+") as volume:
        assert volume.check() == []


def test_closing_a_file_waits_for_other_threads(volume: Volume) -> None:
    """A file that is closed while others read it: each reads what is there, or is told ClosedError (F24)."""
    content = bytes(range(256)) * 256
    volume.write_bytes("/file", content)
    wrong: list[object] = []
    for _ in range(20):
        file = volume.open("/file")
        began = threading.Barrier(4)

        def work(file: odirect.FileInVolume = file, began: threading.Barrier = began) -> None:
            began.wait()
            try:
                for offset in range(0, 65536, 512):
                    if file.pread(512, offset) != content[offset : offset + 512]:
                        wrong.append(offset)
            except ClosedError:
                pass
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        began.wait()
        file.pread(1, 0)
        file.close()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_the_middle_of_a_call_is_no_place_to_call(memory: Volume) -> None:
    """A signal's handler that uses the volume that it interrupts is told so; nothing hangs."""
    entered: list[str] = []

    async def in_the_middle() -> None:
        for call in (lambda: memory.listdir(), lambda: memory.close(), lambda: file.close()):
            with pytest.raises(RuntimeError, match="in the middle"):
                call()
        entered.append("yes")

    with memory.open("/file", "w") as file:
        memory.runner.run(in_the_middle())
        assert entered == ["yes"] and not memory.closed and not file.closed


def test_interrupts_leave_nothing_locked(image: Path) -> None:
    """Ctrl-C again and again: each time KeyboardInterrupt or nothing, and the volume goes on (F24).

    In a child: what Python itself does not expect there (a destructor that is interrupted) is told by no one.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.unraisablehook = lambda _: None
            warnings.simplefilter("ignore")
            _interrupted_program(image)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    with odirect.open_volume(image, "r+") as volume:
        assert volume.read_bytes("/after") == b"it goes on"
        assert volume.check() == []


def _interrupted_program(image: Path) -> None:
    stop = threading.Event()
    armed = False
    raised = number = 0
    written: set[int] = set()

    def handler(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    def press() -> None:
        dice = random.Random(9)
        while not stop.wait(dice.random() ** 3 * 0.04):
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, handler)
    with odirect.open_volume(image, "r+") as volume:
        file = volume.open("/shared", "w+")
        thread = threading.Thread(target=press)
        thread.start()
        while raised < 25 or not written:
            number += 1
            try:
                armed = True
                volume.write_bytes(f"/{number % 30}", b"x" * 20_000)
                if file.pwrite(b"y" * 10_000, number % 7 * 4096) == 10_000:
                    written.add(number % 7 * 4096)
                volume.rename(f"/{number % 30}", f"/{(number + 1) % 30}")
                if not number % 10:
                    file.sync()
                armed = False
            except KeyboardInterrupt:
                armed = False
                raised += 1
            except MissingError:
                armed = False
        stop.set()
        thread.join()
        for offset in written:
            assert file.pread(10_000, offset) == b"y" * 10_000
        file.close()
        volume.write_bytes("/after", b"it goes on")
        assert volume.check() == []


def test_close_is_not_left_half_way(image: Path) -> None:
    """An interrupt while it closes is raised when it has closed: the volume is clean."""

    class Impatient(MemoryFileSystem):
        async def close(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            await super().sync()
            await super().close()

    file_system = Impatient(yields=True)
    from odirect.sched.scheduler import Scheduler

    volume = Volume(file_system, Runner(Scheduler(), "memory"), image=None)
    with pytest.raises(KeyboardInterrupt):
        volume.close()
    assert volume.closed and file_system.closed and file_system.syncs == 1


def test_truncating_beside_batches_and_single_reads(volume: Volume) -> None:
    """A truncate waits for transfers that other threads do past the volume's own scheduler, and ends (G06)."""
    size = 1 << 20
    volume.write_bytes("/file", b"x" * size)
    wrong: list[object] = []
    with volume.open("/file", "r+") as file:
        stop = threading.Event()

        def batches() -> None:
            out = odirect.empty(256 * 4096)
            try:
                while not stop.is_set():
                    file.read_batch([4096 * number for number in range(256)], 4096, out)
            except BaseException as error:
                wrong.append(error)

        def singly() -> None:
            buffer = odirect.empty(4096)
            try:
                while not stop.is_set():
                    for offset in range(0, size, 65536):
                        file.preadinto(buffer, offset)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work) for work in (batches, singly)]
        for thread in threads:
            thread.start()
        # In memory nothing goes past the scheduler.
        for turn in range(60 if volume.kind == "ext2" else 2):
            file.truncate(size // 2 if turn % 2 else size)
        stop.set()
        for thread in threads:
            thread.join()
        assert file.pread(size, 0).rstrip(b"\0") == b"x" * (size // 2)
    assert wrong == []


# --- what cannot be asked ------------------------------------------------------------------------


def test_arguments_that_cannot_be(volume: Volume) -> None:
    """They are ValueError or TypeError, at once, and change nothing."""
    volume.write_bytes("/file", b"content")
    before, path = volume.stat("/file"), volume / "file"
    wrong: list[tuple[type[Exception], Callable[[], object]]] = [
        (TypeError, lambda: volume.open("/file", cast(str, None))),
        (TypeError, lambda: path.open(cast(str, []))),
        (TypeError, lambda: path.open(cast(str, b"r"))),
        (ValueError, lambda: path.open(buffering=2**63)),
        (ValueError, lambda: volume.utime("/file", (float("inf"), 1.0))),
        (ValueError, lambda: volume.utime("/file", (float("nan"), 1.0))),
        (ValueError, lambda: volume.utime("/file", (1e300, 1e300 * 1e300))),
        (TypeError, lambda: volume.utime("/file", ns=cast("tuple[int, int]", (1.5, 1)))),
        (TypeError, lambda: volume.utime("/file", ns=cast("tuple[int, int]", (1,)))),
    ]
    pairs: list[Any] = [{}, "", "ab", b"ab", 5, (1,), (1, 2, 3), (None, 1), ("a", "b"), ["a", 1]]
    for given in pairs:
        wrong.append((TypeError, lambda given=given: volume.utime("/file", cast("tuple[float, float]", given))))  # type: ignore[misc]
    for mode in (-1, 1 << 16, 1 << 70):
        wrong += [
            (ValueError, lambda mode=mode: volume.chmod("/file", mode)),  # type: ignore[misc]
            (ValueError, lambda mode=mode: volume.mkdir("/new", mode)),  # type: ignore[misc]
            (ValueError, lambda mode=mode: volume.mkdir("/new/new", mode, parents=True)),  # type: ignore[misc]
            (ValueError, lambda mode=mode: volume.mknod("/new", mode)),  # type: ignore[misc]
            (ValueError, lambda mode=mode: volume.open("/new", "w", permissions=mode)),  # type: ignore[misc]
            (ValueError, lambda mode=mode: volume.write_bytes("/new", b"", permissions=mode)),  # type: ignore[misc]
        ]
    for kind, call in wrong:
        with pytest.raises(kind):
            call()
    assert volume.listdir("/") == ["file"] and volume.stat("/file") == before
    volume.chmod("/file", stat.S_IFREG | 0o640)
    volume.utime("/file", [numpy.float64(1.5), 2])  # type: ignore[arg-type]
    found = volume.stat("/file")
    assert (stat.S_IMODE(found.st_mode), found.st_mtime) == (0o640, 2)


def test_atomic_is_refused_in_a_volume(volume: Volume) -> None:
    """A file in a volume takes what `odirect.open` takes, and says why atomic is not to be had (F43)."""
    with pytest.raises(UnsupportedError, match="atomic"):
        volume.open("/file", "w", atomic=True)
    assert volume.listdir("/") == []


def test_strict_reads_up_to_the_end(scratch: Path) -> None:
    """Strict access asks for the last block whole, wherever the file ends (B01, F02)."""
    content = random.Random(1).randbytes(100_001)
    with volume_of("ext2", scratch) as volume:
        volume.write_bytes("/file", content)
        volume.sync()
        with volume.open("/file", access="strict") as file:
            assert file.pread(4096, 98304) == content[98304:]
            assert file.read() == content and file.read() == b""
            with pytest.raises(AlignmentError):
                file.pread(4097, 98304)
            file.seek(0)
            assert io.BufferedReader(file).read() == content


def test_numpy_is_told_that_there_is_no_descriptor(volume: Volume) -> None:
    """What asks for a descriptor has a clear error, and nothing is read or written (G07)."""
    with volume.open("/file", "w+") as file:
        for call in (lambda: numpy.fromfile(file, numpy.uint8), lambda: numpy.arange(5).tofile(file)):
            with pytest.raises(io.UnsupportedOperation, match="no descriptor"):
                call()
        assert file.size == 0
