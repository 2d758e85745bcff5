"""`odirect.copy`: every byte, every hole, and all or nothing, on every kind of home and device."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.loops import loop_device, made_image, mounted, needs_loop, needs_root

import odirect
from odirect import Kind
from odirect.base.errors import (
    DirectoryError,
    InUseError,
    MissingError,
    NoSpaceError,
    NotDirectError,
    NotDirectoryError,
    ODirectError,
    PathError,
    UnsupportedError,
    VerifyError,
)
from odirect.block.device import Limits
from odirect.block.support import DirectSupport
from odirect.copying import copy_in, copy_out
from odirect.ring._calls import cachestat

MIB = 1 << 20


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def holed(path: Path, size: int, pieces: dict[int, bytes]) -> None:
    """A sparse file of `size` bytes with data at these offsets."""
    with open(path, "wb") as file:
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)
        os.fsync(file.fileno())


def data_map(path: Path) -> list[tuple[int, int]]:
    """(start, end) of the data, as SEEK_DATA and SEEK_HOLE say."""
    runs = []
    fd = os.open(path, os.O_RDONLY)
    try:
        at, size = 0, os.fstat(fd).st_size
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                break
            at = os.lseek(fd, start, os.SEEK_HOLE)
            runs.append((start, at))
    finally:
        os.close(fd)
    return runs


def cached_pages(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        answer = cachestat(fd, 0, 0)
    finally:
        os.close(fd)
    if answer is None:
        pytest.skip("needs cachestat (Linux 6.5)")
    return answer[0]


def drop_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def device_bytes(path: str, length: int, offset: int = 0) -> bytes:
    """What is on the device, past everybody's cache."""
    with odirect.open(path) as file:
        return file.pread(length, offset)


def fill(device: str, byte: int) -> None:
    """Old contents that must not shine through."""
    with odirect.open(device, "r+") as file:
        buffer = odirect.empty(MIB)
        buffer[:] = bytes([byte]) * MIB
        for offset in range(0, file.size, MIB):
            file.pwrite(buffer, offset)
        file.sync()


@pytest.fixture(params=["auto", "threads"])
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both back ends: io_uring where the kernel lets us, and threads."""
    kind: str = request.param
    monkeypatch.setenv("ODIRECT_RING", kind)
    return kind


@pytest.fixture
def source(scratch: Path) -> Path:
    path = scratch / "source"
    path.write_bytes(noise(3 * MIB + 1234))
    return path


# --- plain files ----------------------------------------------------------------------------------


def test_a_copy_has_every_byte_and_says_how_it_went(ring: str, source: Path, scratch: Path) -> None:
    report = odirect.copy(source, scratch / "copy", chunk_bytes=256 << 10)
    assert (scratch / "copy").read_bytes() == source.read_bytes()
    assert report.target == str(scratch / "copy")
    assert report.bytes_copied == source.stat().st_size and report.bytes_skipped == 0
    assert sum(tally.bytes for tally in report.read_outcomes.values()) == report.bytes_copied
    assert sum(tally.bytes for tally in report.write_outcomes.values()) == report.bytes_copied
    kinds = {outcome.kind for outcome in (*report.read_outcomes, *report.write_outcomes)}
    assert kinds == {Kind.DIRECT, Kind.BOUNCED}  # the tail alone bounces
    assert not report.verified and not report.durable
    assert sorted(os.listdir(scratch)) == ["copy", "source"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.one_of(st.integers(0, 3 * 4096), st.sampled_from([1, 511, 512, 513, 4095, 4096, 4097, 8192, 12288])),
    chunk=st.sampled_from([1, 4096, 8192, MIB]),
    depth=st.integers(1, 4),
    verify=st.booleans(),
    sparse=st.booleans(),
)
def test_every_size_is_copied_exactly(
    scratch: Path, size: int, chunk: int, depth: int, verify: bool, sparse: bool
) -> None:
    """F05, F02: any size from 0 to 3 blocks; no tail is lost, and nothing is padded."""
    data = noise(size, size)
    (scratch / "from").write_bytes(data)
    report = odirect.copy(
        scratch / "from", scratch / "to", chunk_bytes=chunk, depth=depth, verify=verify, sparse=sparse
    )
    assert (scratch / "to").read_bytes() == data
    assert report.bytes_copied == size and report.verified == verify
    assert sorted(os.listdir(scratch)) == ["from", "to"]


def test_every_size_around_a_block_is_copied_exactly(ring: str, scratch: Path) -> None:
    """F05: the edges one by one, on both back ends."""
    for block in (0, 512, 4096, 8192, 12288):
        for size in range(max(0, block - 2), block + 3):
            data = noise(size, size)
            (scratch / "from").write_bytes(data)
            odirect.copy(scratch / "from", scratch / "to", verify=True)
            assert (scratch / "to").read_bytes() == data


def test_a_copy_leaves_nothing_in_the_page_cache(source: Path, scratch: Path) -> None:
    """The cache holds as much of both files as before: all of a warm source, nothing of a cold one."""
    drop_pages(source)
    cold = cached_pages(source)
    odirect.copy(source, scratch / "copy", verify=True, durable=True)
    assert cached_pages(source) <= cold
    assert cached_pages(scratch / "copy") == 0
    source.read_bytes()
    warm = cached_pages(source)
    assert warm > 0
    odirect.copy(source, scratch / "copy2")
    assert cached_pages(source) <= warm
    assert cached_pages(scratch / "copy2") == 0


def test_what_is_only_in_the_cache_of_the_source_is_copied(scratch: Path) -> None:
    """A source that was written a moment ago, and not yet written out, is copied as it is read."""
    data = noise(2 * MIB + 77)
    with open(scratch / "from", "wb", buffering=0) as file:
        file.write(data)
        odirect.copy(scratch / "from", scratch / "to")
    assert (scratch / "to").read_bytes() == data


def test_progress_ends_at_the_whole_and_never_goes_back(source: Path, scratch: Path) -> None:
    seen: list[tuple[int, int]] = []
    odirect.copy(source, scratch / "copy", chunk_bytes=MIB, progress=lambda done, total: seen.append((done, total)))
    size = source.stat().st_size
    assert seen == sorted(seen) and len(seen) == 4 and seen[-1] == (size, size)
    seen.clear()
    odirect.copy(source, scratch / "copy", verify=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (2 * size, 2 * size)


def test_seconds_are_of_the_given_clock(source: Path, scratch: Path) -> None:
    """The clock is injected."""

    class Clock:
        now = 0

        def now_ns(self) -> int:
            self.now += 10**9
            return self.now

    report = odirect.copy(source, scratch / "copy", clock=Clock())
    assert report.seconds == int(report.seconds) > 0
    assert report.bytes_per_second == report.bytes_copied / report.seconds


def test_wrong_calls_are_refused_before_anything_is_touched(source: Path, scratch: Path) -> None:
    for wrong in ({"chunk_bytes": 0}, {"depth": 0}, {"access": "fast"}):
        with pytest.raises(ValueError):
            odirect.copy(source, scratch / "copy", **wrong)  # type: ignore[arg-type]
    assert os.listdir(scratch) == ["source"]


# --- holes ----------------------------------------------------------------------------------------


def test_holes_stay_holes(ring: str, scratch: Path) -> None:
    holed(scratch / "from", 40 * MIB + 5, {3 * MIB: noise(MIB), 20 * MIB: noise(4096, 2), 30 * MIB + 100: b"x"})
    report = odirect.copy(scratch / "from", scratch / "to", verify=True)
    assert (scratch / "to").read_bytes() == (scratch / "from").read_bytes()
    assert data_map(scratch / "to") == data_map(scratch / "from")
    assert (scratch / "to").stat().st_blocks == (scratch / "from").stat().st_blocks
    assert report.bytes_copied == MIB + 2 * 4096
    assert report.bytes_copied + report.bytes_skipped == 40 * MIB + 5


def test_a_file_that_is_all_hole(scratch: Path) -> None:
    holed(scratch / "from", 5 * MIB + 1, {})
    report = odirect.copy(scratch / "from", scratch / "to", verify=True)
    assert report.bytes_copied == 0 and report.bytes_skipped == 5 * MIB + 1
    assert (scratch / "to").stat().st_size == 5 * MIB + 1 and (scratch / "to").stat().st_blocks == 0


def test_without_sparse_every_byte_is_written(scratch: Path) -> None:
    holed(scratch / "from", 4 * MIB, {MIB: noise(MIB)})
    report = odirect.copy(scratch / "from", scratch / "to", sparse=False)
    assert (scratch / "to").read_bytes() == (scratch / "from").read_bytes()
    assert report.bytes_copied == 4 * MIB and report.bytes_skipped == 0
    assert data_map(scratch / "to") == [(0, 4 * MIB)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.dictionaries(st.integers(0, 200_000), st.binary(min_size=1, max_size=9000), max_size=6),
    size=st.integers(0, 220_000),
    chunk=st.sampled_from([4096, 12288, 65536]),
)
def test_any_pattern_of_holes_is_copied(scratch: Path, pieces: dict[int, bytes], size: int, chunk: int) -> None:
    holed(scratch / "from", size, pieces)
    report = odirect.copy(scratch / "from", scratch / "to", chunk_bytes=chunk, verify=True)
    assert (scratch / "to").read_bytes() == (scratch / "from").read_bytes()
    assert (scratch / "to").stat().st_blocks <= (scratch / "from").stat().st_blocks
    assert report.bytes_copied + report.bytes_skipped == size


# --- names, modes, places -------------------------------------------------------------------------


def test_into_a_directory(source: Path, scratch: Path) -> None:
    (scratch / "into").mkdir()
    report = odirect.copy(source, scratch / "into")
    assert report.target == str(scratch / "into" / "source")
    assert (scratch / "into" / "source").read_bytes() == source.read_bytes()


def test_a_link_as_target_is_written_through(source: Path, scratch: Path) -> None:
    """As cp does: the link stays, what it names is replaced, also where that does not exist yet."""
    (scratch / "deep").mkdir()
    for name in ("old", "new"):
        (scratch / "link").symlink_to(Path("deep") / name)
        if name == "old":
            (scratch / "deep" / name).write_bytes(b"old")
        odirect.copy(source, scratch / "link")
        assert (scratch / "link").is_symlink()
        assert (scratch / "deep" / name).read_bytes() == source.read_bytes()
        (scratch / "link").unlink()
    assert sorted(os.listdir(scratch / "deep")) == ["new", "old"]


def test_bytes_and_odd_names(scratch: Path) -> None:
    name = os.fsencode(scratch) + b"/na\xffme \n" + b"x" * 200
    with open(name, "wb") as file:
        file.write(b"data")
    target = os.fsencode(scratch) + b"/" + b"\xfe" * 255
    odirect.copy(name, target)
    with open(target, "rb") as file:
        assert file.read() == b"data"
    os.mkdir(scratch / "into")
    odirect.copy(name, scratch / "into")
    assert os.listdir(os.fsencode(scratch / "into")) == [os.path.basename(name)]


def test_the_mode_is_the_sources_less_the_umask(source: Path, scratch: Path) -> None:
    """As cp does, and never the set-uid bits; a file that was there keeps its own mode."""
    source.chmod(0o4775)
    old = os.umask(0o027)
    try:
        odirect.copy(source, scratch / "new")
        (scratch / "old").touch()
        (scratch / "old").chmod(0o604)
        odirect.copy(source, scratch / "old")
    finally:
        os.umask(old)
    assert stat.S_IMODE((scratch / "new").stat().st_mode) == 0o750
    assert stat.S_IMODE((scratch / "old").stat().st_mode) == 0o604


def test_a_source_that_may_only_be_read(source: Path, scratch: Path) -> None:
    source.chmod(0o400)
    odirect.copy(source, scratch / "copy")
    assert stat.S_IMODE((scratch / "copy").stat().st_mode) == 0o400


def test_a_replaced_file_keeps_its_owner(source: Path, scratch: Path) -> None:
    needs_root()
    (scratch / "old").touch()
    os.chown(scratch / "old", 12, 34)
    odirect.copy(source, scratch / "old")
    status = (scratch / "old").stat()
    assert (status.st_uid, status.st_gid) == (12, 34)


def test_the_same_file_is_refused(source: Path, scratch: Path) -> None:
    before = source.read_bytes()
    (scratch / "link").symlink_to("source")
    os.link(source, scratch / "hard")
    for name in ("source", "link", "hard"):
        with pytest.raises(PathError, match="the same"):
            odirect.copy(source, scratch / name, overwrite_in_use=True)
    with pytest.raises(PathError, match="the same"):
        odirect.copy(source, scratch)
    assert source.read_bytes() == before


def test_targets_that_cannot_be(source: Path, scratch: Path) -> None:
    (scratch / "into" / "source").mkdir(parents=True)
    os.mkfifo(scratch / "pipe")
    (scratch / "loop").symlink_to("loop")
    cases: list[tuple[str, type[ODirectError]]] = [
        ("missing/copy", MissingError),
        ("missing/", NotDirectoryError),
        ("source/copy", NotDirectoryError),
        ("into", DirectoryError),
        ("pipe", UnsupportedError),
        ("loop", PathError),
    ]
    for name, error in cases:
        with pytest.raises(error):
            odirect.copy(source, f"{scratch}/{name}")
    assert sorted(os.listdir(scratch)) == ["into", "loop", "pipe", "source"]
    assert os.listdir(scratch / "into") == ["source"]


def test_sources_that_cannot_be(scratch: Path) -> None:
    os.mkfifo(scratch / "pipe")
    for name, error in (("missing", MissingError), (".", DirectoryError), ("pipe", UnsupportedError)):
        with pytest.raises(error):
            odirect.copy(scratch / name, scratch / "copy")
    assert os.listdir(scratch) == ["pipe"]


def test_an_image_in_use_is_not_replaced(source: Path, scratch: Path) -> None:
    """F34: the loop device would go on with the old file, and what is written there be lost."""
    needs_loop()
    with made_image(None, 16 * MIB, directory=scratch) as image, loop_device(image) as device:
        with pytest.raises(InUseError, match=device):
            odirect.copy(source, image)
        assert image.stat().st_size == 16 * MIB
        odirect.copy(source, image, overwrite_in_use=True)
        assert image.stat().st_size == source.stat().st_size


# --- all or nothing -------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopper(after: int, what: Callable[[], None]) -> Callable[[int, int], None]:
    """A progress callback that does something once `after` bytes are done."""
    told = False

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done >= after and not told:
            told = True
            what()

    return progress


def raise_stop() -> None:
    raise Stop


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_what_progress_raises_ends_the_copy(ring: str, source: Path, scratch: Path, share: float, verify: bool) -> None:
    """The target is as it was: not there, or the old file; and no temporary file is left."""
    size = source.stat().st_size * (1 + verify)
    for old in (None, b"old"):
        if old is not None:
            (scratch / "copy").write_bytes(old)
        with pytest.raises(Stop):
            odirect.copy(
                source,
                scratch / "copy",
                verify=verify,
                chunk_bytes=65536,
                progress=stopper(int(share * size), raise_stop),
            )
        assert sorted(os.listdir(scratch)) == (["source"] if old is None else ["copy", "source"])
        if old is not None:
            assert (scratch / "copy").read_bytes() == old


def test_a_source_that_shrinks_is_an_error(ring: str, source: Path, scratch: Path) -> None:
    """F02, F04: end of file is told from a short transfer; it is no zeroes, and no short copy."""
    progress = stopper(65536, lambda: os.truncate(source, 70_000))
    with pytest.raises(InUseError, match="became shorter") as caught:
        odirect.copy(source, scratch / "copy", chunk_bytes=65536, depth=2, progress=progress)
    assert caught.value.filename == os.fspath(source)
    assert os.listdir(scratch) == ["source"]


def test_a_source_that_shrinks_in_a_hole_is_an_error(scratch: Path) -> None:
    holed(scratch / "from", 8 * MIB, {0: noise(MIB)})
    progress = stopper(1, lambda: os.truncate(scratch / "from", 2 * MIB))
    with pytest.raises(InUseError, match="became shorter"):
        odirect.copy(scratch / "from", scratch / "to", progress=progress)
    assert os.listdir(scratch) == ["from"]


def test_a_temporary_name_that_is_taken_is_left_alone(source: Path, scratch: Path) -> None:
    """What a killed copy of a former process with this number left is not ours to remove."""
    taken = scratch / f".copy.{os.getpid()}-0.odirect"
    taken.write_bytes(b"somebody's")
    odirect.copy(source, scratch / "copy")
    assert taken.read_bytes() == b"somebody's"
    assert (scratch / "copy").read_bytes() == source.read_bytes()


def test_a_durable_copy_is_synced_before_it_has_its_name(
    source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F40: data and size first, then the name, then the directory; a power cut at any moment leaves all or nothing."""
    from odirect.dio.plainfile import PlainFile

    order: list[str] = []
    sync, rename, fsync = PlainFile.sync, os.rename, os.fsync

    async def synced(self: PlainFile, *, data_only: bool = False) -> None:
        await sync(self, data_only=data_only)
        order.append("data" if data_only else "file")

    def renamed(old: str, new: str) -> None:
        rename(old, new)
        order.append("rename")

    def fsynced(fd: int) -> None:
        fsync(fd)
        # A ring on threads syncs the file by this call too; that one is counted above.
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            order.append("directory")

    monkeypatch.setattr(PlainFile, "sync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "fsync", fsynced)
    report = odirect.copy(source, scratch / "copy", durable=True)
    assert order == ["file", "rename", "directory"] and report.durable


def test_a_sync_that_fails_leaves_nothing(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F41: the sync's error is the copy's error."""
    from odirect.base.errors import DeviceError
    from odirect.dio.plainfile import PlainFile

    async def failing(self: PlainFile, *, data_only: bool = False) -> None:
        raise DeviceError("syncing: Input/output error")

    monkeypatch.setattr(PlainFile, "sync", failing)
    with pytest.raises(DeviceError):
        odirect.copy(source, scratch / "copy", durable=True)
    assert os.listdir(scratch) == ["source"]


# --- verifying ------------------------------------------------------------------------------------


def temporary_in(directory: Path) -> Path:
    (found,) = (path for path in directory.iterdir() if path.name.endswith(".odirect"))
    return found


def damage(path: Path, offset: int) -> None:
    """Change one byte behind the copy's back, on the disk."""
    fd = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte ^ 0xFF]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("where", [0, 1, 65535, 65536, 1_000_003, 3 * MIB + 1233])
def test_verify_finds_one_wrong_byte_and_names_it(ring: str, source: Path, scratch: Path, where: int) -> None:
    """What was read back is compared with the buffer that was written; nothing of the copy is left."""
    progress = stopper(source.stat().st_size, lambda: damage(temporary_in(scratch), where))
    with pytest.raises(VerifyError, match=f"first at byte {where}:") as caught:
        odirect.copy(source, scratch / "copy", verify=True, chunk_bytes=65536, progress=progress)
    assert caught.value.filename == os.fspath(scratch / "copy")
    assert os.listdir(scratch) == ["source"]


def test_verify_names_the_first_of_several(source: Path, scratch: Path) -> None:
    def spoil() -> None:
        for where in (3 * MIB, 2 * MIB + 9, 70_000, 65_999):
            damage(temporary_in(scratch), where)

    progress = stopper(source.stat().st_size, spoil)
    with pytest.raises(VerifyError, match="first at byte 65999:"):
        odirect.copy(source, scratch / "copy", verify=True, chunk_bytes=65536, progress=progress)


def test_verify_looks_into_holes(scratch: Path) -> None:
    """What has appeared where a hole should be is found, and a hole that is one costs no reading."""
    holed(scratch / "from", 8 * MIB, {0: noise(4096)})
    progress = stopper(8 * MIB, lambda: damage(temporary_in(scratch), 5 * MIB + 17))
    with pytest.raises(VerifyError, match=f"first at byte {5 * MIB + 17}: 0xff instead of 0x00"):
        odirect.copy(scratch / "from", scratch / "to", verify=True, progress=progress)
    report = odirect.copy(scratch / "from", scratch / "to", verify=True)
    assert sum(tally.bytes for tally in report.read_outcomes.values()) == 2 * 4096


def test_a_source_that_changes_is_no_false_alarm(source: Path, scratch: Path) -> None:
    """F21, F22: what is checked is what was written, whatever becomes of the source meanwhile."""
    before = source.read_bytes()
    progress = stopper(source.stat().st_size, lambda: damage(source, 100_000))
    assert odirect.copy(source, scratch / "copy", verify=True, progress=progress).verified
    assert (scratch / "copy").read_bytes() == before


# --- strict, and refusals -------------------------------------------------------------------------


def test_strict_copies_what_goes_direct(source: Path, scratch: Path) -> None:
    report = odirect.copy(source, scratch / "copy", access="strict")
    assert (scratch / "copy").read_bytes() == source.read_bytes()
    assert Kind.BUFFERED not in {outcome.kind for outcome in report.write_outcomes}


def test_strict_refuses_the_page_cache(source: Path, scratch: Path) -> None:
    """F50, F52: tmpfs has no device; strict says so before anything is copied, auto says it in the outcome."""
    with mounted("odirect-test", "tmpfs", "size=16M") as memory:
        with pytest.raises(NotDirectError):
            odirect.copy(source, memory / "copy", access="strict")
        assert os.listdir(memory) == []
        report = odirect.copy(source, memory / "copy", verify=True)
        assert {outcome.kind for outcome in report.write_outcomes} == {Kind.BUFFERED}
        with pytest.raises(NotDirectError):
            odirect.copy(memory / "copy", scratch / "back", access="strict")
        odirect.copy(memory / "copy", scratch / "back", verify=True)
        assert (scratch / "back").read_bytes() == source.read_bytes()
        assert not any(name.endswith(".odirect") for name in os.listdir(scratch))


def test_open_without_direct_io_falls_back(
    ring: str, source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F50: O_DIRECT refused at open: the page cache takes it, several chunks at once, and none of it stays."""
    real = os.open

    def refusing(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    drop_pages(source)
    monkeypatch.setattr(os, "open", refusing)
    report = odirect.copy(source, scratch / "copy", verify=True, chunk_bytes=65536)
    monkeypatch.undo()
    assert {outcome.kind for outcome in (*report.read_outcomes, *report.write_outcomes)} == {Kind.BUFFERED}
    assert {outcome.reason for outcome in report.write_outcomes} == {odirect.Reason.REFUSED_AT_OPEN}
    assert cached_pages(scratch / "copy") == 0
    assert (scratch / "copy").read_bytes() == source.read_bytes()


def test_limits_that_turn_out_too_small_are_found_out(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F50, F51: the file says 512, the device wants 4096: asked again, bounced, and copied exactly."""
    from odirect.block.limits import file_limits as real
    from odirect.dio import opening

    def optimistic(fd: int, *, path: object, writable: bool) -> tuple[Limits, DirectSupport]:
        import dataclasses

        limits, support = real(fd, path=path, writable=writable)
        return dataclasses.replace(limits, read_align=512, write_align=512, memory_align=512), support

    needs_loop()
    with (
        made_image("ext4", 64 * MIB, directory=scratch, sector=4096) as image,
        mounted(image, "ext4", sector=4096) as home,
    ):
        data = noise(2 * MIB + 512 * 3 + 5)
        (home / "from").write_bytes(data)
        os.sync()
        monkeypatch.setattr(opening, "file_limits", optimistic)
        odirect.copy(home / "from", home / "to", chunk_bytes=65536, verify=True)
        assert (home / "to").read_bytes() == data


# --- devices --------------------------------------------------------------------------------------


@contextlib.contextmanager
def device(directory: Path, size: int, sector: int) -> Iterator[str]:
    with made_image(None, size, directory=directory) as image, loop_device(image, sector) as path:
        yield path


@pytest.mark.parametrize("sector", [512, 4096])
def test_file_to_device_and_back(ring: str, scratch: Path, sector: int) -> None:
    """F51: sectors of 512 and 4096 bytes; the file's bytes first, and not one beyond them changed (F05)."""
    needs_loop()
    data = noise(3 * MIB + 1001)
    (scratch / "from").write_bytes(data)
    with device(scratch, 8 * MIB, sector) as path:
        fill(path, 0xAA)
        report = odirect.copy(scratch / "from", path, verify=True, durable=True, chunk_bytes=MIB)
        assert report.target == path and report.durable
        assert device_bytes(path, 8 * MIB) == data + b"\xaa" * (8 * MIB - len(data))
        odirect.copy(path, scratch / "back", verify=True)
        assert (scratch / "back").read_bytes() == device_bytes(path, 8 * MIB)
        assert stat.S_IMODE((scratch / "back").stat().st_mode) & 0o111 == 0


@pytest.mark.parametrize("sectors", [(512, 4096), (4096, 512)])
def test_device_to_device(scratch: Path, sectors: tuple[int, int]) -> None:
    """F51: each side with alignments of its own."""
    needs_loop()
    with device(scratch, 4 * MIB, sectors[0]) as one, device(scratch, 8 * MIB, sectors[1]) as other:
        with odirect.open(one, "r+") as file:
            file.pwrite(noise(4 * MIB), 0)
        fill(other, 0x55)
        odirect.copy(one, other, verify=True, chunk_bytes=300_000)
        assert device_bytes(other, 8 * MIB) == noise(4 * MIB) + b"\x55" * (4 * MIB)


@pytest.mark.parametrize("zeroes", [True, False], ids=["zeroed by the device", "zeroes written"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_holes_become_zeroes_on_a_device(
    scratch: Path, sector: int, zeroes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F11: what the device held before never shines through a hole."""
    needs_loop()
    if not zeroes:
        from odirect.dio.plainfile import PlainFile

        async def refuse(self: PlainFile, op: int, offset: int, length: int) -> None:
            raise UnsupportedError("zeroing")

        monkeypatch.setattr(PlainFile, "change_range", refuse)
    holed(scratch / "from", 9 * MIB + 100, {MIB + 700: noise(5000), 6 * MIB: noise(2 * MIB)})
    with device(scratch, 12 * MIB, sector) as path:
        fill(path, 0xAA)
        report = odirect.copy(scratch / "from", path, verify=True, chunk_bytes=65536)
        found = device_bytes(path, 12 * MIB)
        assert found[: 9 * MIB + 100] == (scratch / "from").read_bytes()
        assert found[9 * MIB + 100 :] == b"\xaa" * (3 * MIB - 100)
        assert report.bytes_skipped > 6 * MIB


def test_verify_finds_what_a_device_did_not_keep(scratch: Path) -> None:
    needs_loop()
    holed(scratch / "from", 4 * MIB, {MIB: noise(MIB)})
    for where, match in ((MIB + 5, f"first at byte {MIB + 5}:"), (3 * MIB + 1, f"first at byte {3 * MIB + 1}: 0xff")):
        with device(scratch, 4 * MIB, 512) as path:
            progress = stopper(4 * MIB, lambda path=path, where=where: damage(Path(path), where))  # type: ignore[misc]
            with pytest.raises(VerifyError, match=match):
                odirect.copy(scratch / "from", path, verify=True, progress=progress)


def test_a_device_that_is_too_small_is_not_touched(scratch: Path) -> None:
    """B09: said before the first byte is written."""
    needs_loop()
    (scratch / "from").write_bytes(noise(4 * MIB + 1))
    with device(scratch, 4 * MIB, 512) as path:
        fill(path, 0xAA)
        with pytest.raises(NoSpaceError, match=str(4 * MIB + 1)):
            odirect.copy(scratch / "from", path)
        assert device_bytes(path, 4 * MIB) == b"\xaa" * (4 * MIB)
        os.truncate(scratch / "from", 4 * MIB)
        odirect.copy(scratch / "from", path)
        assert device_bytes(path, 4 * MIB) == noise(4 * MIB + 1)[:-1]


def test_a_mounted_device_is_not_written(scratch: Path) -> None:
    """F34: refused with the mount point; as a source it may be read."""
    needs_loop()
    (scratch / "from").write_bytes(b"x" * 4096)
    with made_image("ext4", directory=scratch) as image, loop_device(image) as path, mounted(path, "ext4") as point:
        with pytest.raises(InUseError, match=str(point)):
            odirect.copy(scratch / "from", path)
        odirect.copy(path, scratch / "taken")
        assert (scratch / "taken").stat().st_size == image.stat().st_size


def test_a_device_in_use_is_written_when_told_so(scratch: Path) -> None:
    needs_loop()
    (scratch / "from").write_bytes(noise(MIB))
    with device(scratch, 4 * MIB, 512) as below, loop_device(below) as above:
        with pytest.raises(InUseError, match=above):
            odirect.copy(scratch / "from", below)
        odirect.copy(scratch / "from", below, overwrite_in_use=True)
        assert device_bytes(below, MIB) == noise(MIB)


def test_nobody_mounts_the_device_meanwhile(scratch: Path) -> None:
    """F34: it is held exclusively for as long as it is written, and let go afterwards."""
    needs_loop()
    (scratch / "from").write_bytes(noise(MIB))
    refused: list[int | None] = []
    with device(scratch, 4 * MIB, 512) as path:

        def claim() -> None:
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_EXCL))
            except OSError as error:
                refused.append(error.errno)

        odirect.copy(scratch / "from", path, progress=stopper(1, claim))
        assert refused == [errno.EBUSY]
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL))


def test_a_device_onto_itself_is_refused(scratch: Path) -> None:
    needs_root()
    needs_loop()
    with device(scratch, MIB, 512) as path:
        number = os.stat(path).st_rdev
        twin = scratch / "twin"
        os.mknod(twin, 0o600 | stat.S_IFBLK, number)
        with pytest.raises(PathError, match="the same"):
            odirect.copy(path, twin)


# --- homes ----------------------------------------------------------------------------------------

HOMES = ["tmpfs", "ext4", "xfs", "btrfs"]


@contextlib.contextmanager
def home(kind: str, directory: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        if kind == "tmpfs":
            yield stack.enter_context(mounted("odirect-test", "tmpfs", "size=64M"))
        else:
            image = stack.enter_context(made_image(kind, directory=directory))
            yield stack.enter_context(mounted(image, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOMES)
def test_every_home_of_files(scratch: Path, kind: str) -> None:
    """F05, F50: sizes and holes on tmpfs, ext4, XFS and btrfs, from there, to there and within."""
    with home(kind, scratch) as place:
        for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, 100_000, MIB + 1):
            data = noise(size, size)
            (scratch / "from").write_bytes(data)
            odirect.copy(scratch / "from", place / "a", verify=True, durable=True)
            odirect.copy(place / "a", place / "b", verify=True)
            odirect.copy(place / "b", scratch / "back", verify=True)
            for copied in (place / "a", place / "b", scratch / "back"):
                assert copied.read_bytes() == data
        holed(place / "holes", 6 * MIB + 9, {MIB: noise(200_000), 5 * MIB + 1: b"end"})
        odirect.copy(place / "holes", place / "holes2", verify=True)
        assert (place / "holes2").read_bytes() == (place / "holes").read_bytes()
        # XFS counts what it reserved behind the last write as data, until that is given back.
        assert all(
            any(a <= start and end <= b for a, b in data_map(place / "holes"))
            for start, end in data_map(place / "holes2")
        )
        assert sorted(os.listdir(place)) == sorted(
            ["a", "b", "holes", "holes2"] + (["lost+found"] if kind == "ext4" else [])
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOMES)
def test_a_full_file_system_leaves_nothing(scratch: Path, kind: str) -> None:
    """ENOSPC is told, no temporary file is left, and the space is free again."""
    with home(kind, scratch) as place:
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        size = free + 8 * MIB
        with open(scratch / "from", "wb") as file:
            for _ in range(size // MIB):
                file.write(noise(MIB))
        before = sorted(os.listdir(place))
        with pytest.raises(NoSpaceError) as caught:
            odirect.copy(scratch / "from", place / "copy")
        assert caught.value.errno == errno.ENOSPC and caught.value.exit_code == 9
        assert sorted(os.listdir(place)) == before
        (scratch / "from").write_bytes(noise(2 * MIB))
        odirect.copy(scratch / "from", place / "copy", verify=True)


def test_a_lack_of_space_is_told_before_anything_is_written(scratch: Path) -> None:
    """The space is reserved first, where the file system can."""
    with home("ext4", scratch) as place:
        with open(scratch / "from", "wb") as file:
            for number in range(24):
                file.write(noise(MIB, number))
        moved: list[int] = []
        with pytest.raises(NoSpaceError, match="reserving"):
            odirect.copy(scratch / "from", place / "copy", progress=lambda done, total: moved.append(done))
        assert moved == [] and os.listdir(place) == ["lost+found"]


def test_a_read_only_file_system(source: Path, scratch: Path) -> None:
    from odirect.base.errors import ReadOnlyError

    needs_loop()
    with made_image("ext4", directory=scratch) as image:
        with mounted(image, "ext4") as place:
            (place / "there").write_bytes(b"there")
        with mounted(image, "ext4", "ro") as place:
            for name in ("new", "there"):
                with pytest.raises(ReadOnlyError) as caught:
                    odirect.copy(source, place / name)
                assert caught.value.exit_code == 6
            odirect.copy(place / "there", scratch / "taken")
            assert (scratch / "taken").read_bytes() == b"there"


# --- streams --------------------------------------------------------------------------------------


@contextlib.contextmanager
def feeding(data: bytes, piece: int) -> Iterator[int]:
    """The reading end of a pipe that a thread writes `data` to, `piece` bytes at a time."""
    reader, writer = os.pipe()

    def feed() -> None:
        try:
            for at in range(0, len(data), piece):
                left = memoryview(data)[at : at + piece]
                while left:
                    left = left[os.write(writer, left) :]
        except BrokenPipeError:
            pass
        finally:
            os.close(writer)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield reader
    finally:
        os.close(reader)
        thread.join()


class Drain:
    """The writing end of a pipe, and what came out of it when that is closed."""

    def __init__(self) -> None:
        self._reader, self.fd = os.pipe()
        self.data = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        pieces = []
        while piece := os.read(self._reader, 1 << 16):
            pieces.append(piece)
        self.data = b"".join(pieces)

    def close(self) -> bytes:
        os.close(self.fd)
        self._thread.join()
        os.close(self._reader)
        return self.data


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4096, 65536, 65537, MIB, 5 * MIB + 321])
def test_stream_to_file(ring: str, scratch: Path, size: int) -> None:
    """F05: the size is known at the end only, and is exact."""
    data = noise(size)
    with feeding(data, 10_007) as fd:
        report = copy_in(fd, scratch / "copy", chunk_bytes=65536, verify=True, durable=True)
    assert (scratch / "copy").read_bytes() == data
    assert report.bytes_copied == size and report.verified and report.durable
    status = (scratch / "copy").stat()
    assert status.st_blocks * 512 <= -(-size // 4096) * 4096 + 65536
    assert os.listdir(scratch) == ["copy"]


def test_stream_to_a_small_file_system(scratch: Path) -> None:
    """Room that is only asked for in advance must not be missed."""
    with home("ext4", scratch) as place:
        data = noise(3 * MIB)
        with feeding(data, 65536) as fd:
            copy_in(fd, place / "copy", chunk_bytes=MIB)
        assert (place / "copy").read_bytes() == data
        with feeding(bytes(40 * MIB), 65536) as fd, pytest.raises(NoSpaceError):
            copy_in(fd, place / "big")
        assert sorted(os.listdir(place)) == ["copy", "lost+found"]


def test_a_failure_is_told_although_the_stream_gives_no_more(ring: str, scratch: Path) -> None:
    """F41: whoever waits for more input must not keep the error of what was written to himself."""
    reader, writer = os.pipe()
    try:
        os.write(writer, bytes(4096))
        with pytest.raises(Stop):
            copy_in(reader, scratch / "copy", chunk_bytes=4096, depth=1, progress=stopper(1, raise_stop))
    finally:
        os.close(reader)
        os.close(writer)
    assert os.listdir(scratch) == []


def test_stream_to_device(scratch: Path) -> None:
    needs_loop()
    data = noise(2 * MIB + 99)
    with device(scratch, 4 * MIB, 4096) as path:
        fill(path, 0xAA)
        with feeding(data, 65536) as fd:
            copy_in(fd, path, verify=True)
        assert device_bytes(path, 4 * MIB) == data + b"\xaa" * (4 * MIB - len(data))
        with feeding(bytes(5 * MIB), 65536) as fd, pytest.raises(NoSpaceError):
            copy_in(fd, path)


def test_a_stream_needs_a_name(scratch: Path) -> None:
    with feeding(b"data", 4) as fd, pytest.raises(DirectoryError):
        copy_in(fd, scratch)


def test_stream_that_is_verified_finds_damage(scratch: Path) -> None:
    data = noise(MIB)
    with feeding(data, 65536) as fd:
        progress = stopper(MIB, lambda: damage(temporary_in(scratch), 70_000))
        with pytest.raises(VerifyError, match="65536 bytes at 65536"):
            copy_in(fd, scratch / "copy", verify=True, chunk_bytes=65536, depth=1, progress=progress)
    assert os.listdir(scratch) == []


@pytest.mark.parametrize(
    "offset,length",
    [(0, None), (0, 0), (1, 1), (511, 514), (65536, 65536), (100_000, None), (3 * MIB, 9999), (9 * MIB, 5)],
)
def test_file_to_stream(ring: str, source: Path, offset: int, length: int | None) -> None:
    """F02: any offset and length; what lies past the end is left out."""
    data = source.read_bytes()
    wanted = data[offset:] if length is None else data[offset : offset + length]
    drain = Drain()
    try:
        report = copy_out(source, drain.fd, offset=offset, length=length, chunk_bytes=65536, depth=3)
    finally:
        found = drain.close()
    assert found == wanted and report.bytes_copied == len(wanted)


def test_streams_that_do_not_block(source: Path, scratch: Path) -> None:
    """Somebody else may have made them non-blocking; that is no error."""
    data = source.read_bytes()
    drain = Drain()
    os.set_blocking(drain.fd, False)
    try:
        copy_out(source, drain.fd)
    finally:
        assert drain.close() == data
    with feeding(data, 1000) as fd:
        os.set_blocking(fd, False)
        copy_in(fd, scratch / "copy")
    assert (scratch / "copy").read_bytes() == data


def test_a_stream_that_nobody_reads(source: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(PathError) as caught:
        copy_out(source, writer)
    os.close(writer)
    assert caught.value.errno == errno.EPIPE


# --- interruption ---------------------------------------------------------------------------------


AT_ANY_MOMENT = """
import os, signal, sys, odirect
source, target, old = sys.argv[1], sys.argv[2], sys.argv[3].encode()
data = open(source, "rb").read()
others = set(os.listdir(os.path.dirname(target))) - {os.path.basename(target)}
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
odirect.copy(source, target, verify=True)  # what is imported late must not be interrupted half-way
interrupted = finished = 0
for step in range(60):
    if old:
        open(target, "wb").write(old)
    elif os.path.exists(target):
        os.unlink(target)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 * 1.1**step)
        odirect.copy(source, target, chunk_bytes=128 << 10, verify=True)
        finished += 1
    except KeyboardInterrupt:
        interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    found = open(target, "rb").read() if os.path.exists(target) else b""
    assert found in (old, data), (step, len(found))
    left = set(os.listdir(os.path.dirname(target))) - {os.path.basename(target)}
    assert left == others, (step, left)
print(interrupted, finished)
"""


@pytest.mark.slow
@pytest.mark.parametrize("old", ["", "old"])
def test_ctrl_c_at_any_moment_leaves_all_or_nothing(ring: str, scratch: Path, old: str) -> None:
    """F24: a signal inside the ring, a task or a system call; the target is the old one or the whole new one.

    In a child, which the alarm is for alone.
    """
    (scratch / "source").write_bytes(noise(16 * MIB))
    command = [sys.executable, "-c", AT_ANY_MOMENT, str(scratch / "source"), str(scratch / "copy"), old]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0


CHILD = """
import sys, odirect
def progress(done, total):
    if done >= {after}:
        print("there", flush=True)
        sys.stdin.readline()
odirect.copy({source!r}, {target!r}, chunk_bytes=65536, progress=progress)
print("finished", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_a_child_that_is_interrupted_in_the_middle(source: Path, scratch: Path, number: int) -> None:
    """Ctrl-C in the middle of a copy leaves no half file under the final name, nor another."""
    target = scratch / "copy"
    program = CHILD.format(after=MIB, source=os.fspath(source), target=os.fspath(target))
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        assert not target.exists()
        assert temporary_in(scratch).stat().st_size == source.stat().st_size
        child.send_signal(number)
        out, err = child.communicate()
    assert b"KeyboardInterrupt" in err and b"finished" not in out
    assert os.listdir(scratch) == ["source"]


# --- what is made while it is read ---------------------------------------------------------------


def made_while_read() -> list[Path]:
    """Files of this machine whose size says nothing, and whose content stays."""
    places = (
        "/proc/version",
        "/proc/sys/kernel/ostype",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/proc/kallsyms",
    )
    return [Path(place) for place in places if os.access(place, os.R_OK)]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("source", made_while_read(), ids=str)
def test_a_source_whose_size_says_nothing(ring: str, scratch: Path, source: Path, verify: bool) -> None:
    """It is copied to its end, and its reads are said to be buffered (F02, F50)."""
    content, done = source.read_bytes(), []
    report = odirect.copy(
        source, scratch, verify=verify, chunk_bytes=65536, progress=lambda count, total: done.append((count, total))
    )
    assert (scratch / source.name).read_bytes() == content
    assert report.bytes_copied == len(content) and report.target == str(scratch / source.name)
    assert done[-1] == (len(content) * (2 if verify else 1), 0)
    buffered = [tally.bytes for outcome, tally in report.read_outcomes.items() if outcome.kind is Kind.BUFFERED]
    assert buffered == [len(content)]
    assert (scratch / source.name).stat().st_mode & 0o777 == source.stat().st_mode & 0o777 & ~0o022
    assert odirect.copy(source, scratch / "again").bytes_copied == len(content)
    with pytest.raises(NotDirectError):
        odirect.copy(source, scratch / "strict", access="strict")
    assert not (scratch / "strict").exists()


@pytest.mark.parametrize("source", made_while_read(), ids=str)
def test_a_stream_of_what_has_no_size(ring: str, scratch: Path, source: Path) -> None:
    """It is written to a stream from any byte on, up to its end or less (F02)."""
    content = source.read_bytes()
    for offset, length in ((0, None), (2, None), (3, 10), (len(content) + 1, None)):
        with open(scratch / "out", "wb") as out:
            report = copy_out(source, out.fileno(), offset=offset, length=length, chunk_bytes=4096)
        wanted = content[offset:] if length is None else content[offset : offset + length]
        assert (scratch / "out").read_bytes() == wanted and report.bytes_copied == len(wanted)
        assert {outcome.kind for outcome in report.read_outcomes} == {Kind.BUFFERED}


def test_bounds_of_what_is_asked(scratch: Path) -> None:
    """More chunks than can be, and what is no clock, are refused before anything is made."""
    (scratch / "source").write_bytes(b"content")
    for depth in (1025, 1 << 31, 0):
        with pytest.raises(ValueError, match="at once"):
            odirect.copy(scratch / "source", scratch / "copy", depth=depth)
    with pytest.raises(TypeError, match="clock"):
        odirect.copy(scratch / "source", scratch / "copy", clock=True)  # type: ignore[arg-type]
    assert os.listdir(scratch) == ["source"]
    assert odirect.copy(scratch / "source", scratch / "copy", depth=1024, chunk_bytes=4096).bytes_copied == 7
