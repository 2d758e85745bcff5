"""What is said of a file or device before it is touched is what the kernel then does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loops import loop_device, made_image, mounted, needs_filesystem, needs_root, partition, run

from odirect.base.errors import DirectoryError, MissingError, UnsupportedError
from odirect.block import limits as limits_module
from odirect.block import probe as probe_module
from odirect.block import support as support_module
from odirect.block import sysfs
from odirect.block.limits import Alignment, DirectSupport, describe, file_limits
from odirect.block.probe import probe
from odirect.ring._calls import address_of, cachestat, statx

FILE_BYTES = 2 << 20
PIECE = 65536
DIOALIGN, DIO_READ_ALIGN, WRITE_ATOMIC = 0x2000, 0x20000, 0x10000


@contextlib.contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def filled(path: Path, size: int = FILE_BYTES) -> Path:
    """A file of random bytes, on the disk and in no cache."""
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, os.urandom(size))
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def limits_of(path: Path | str, *, writable: bool = True):
    with opened(path, os.O_RDWR if writable else os.O_RDONLY) as fd:
        return file_limits(fd, path=path, writable=writable)


def transfer(path: Path | str, write: bool, offset: int, length: int, shift: int) -> str:
    """ "taken" or the errno's name, for one direct transfer at `shift` bytes behind a 64 KiB boundary."""
    with opened(path, os.O_DIRECT | (os.O_RDWR if write else os.O_RDONLY)) as fd, mmap.mmap(-1, 8 * PIECE) as memory:
        memory[:] = bytes(len(memory))  # btrfs reads into untouched pages through its cache
        first = -address_of(memory) % PIECE + shift
        with memoryview(memory)[first : first + length] as view:
            try:
                count = os.pwritev(fd, [view], offset) if write else os.preadv(fd, [view], offset)
            except OSError as error:
                return errno.errorcode[error.errno or 0]
    assert count == length
    return "taken"


def check_against_kernel(path: Path | str) -> None:
    """The reported alignments are taken; half of each is refused."""
    limits, support = limits_of(path)
    assert support == DirectSupport(True, True, "")
    for write, align in ((False, limits.read_align), (True, limits.write_align)):
        memory = limits.memory_align
        assert transfer(path, write, align, align, memory) == "taken"
        assert transfer(path, write, align // 2, PIECE, 0) == "EINVAL"
        assert transfer(path, write, 0, PIECE + align // 2, 0) == "EINVAL"
        assert transfer(path, write, 0, PIECE, memory // 2) == "EINVAL"


# --- what the kernel says and does ---------------------------------------------------------------


@pytest.mark.parametrize("sector", [512, 4096])
def test_limits_of_a_loop_device_are_what_it_takes(scratch: Path, sector: int) -> None:
    """B01, F51: the smallest accepted alignments are reported, none smaller works."""
    with made_image(None, 8 << 20, directory=scratch) as image, loop_device(image, sector) as device:
        check_against_kernel(device)
        limits, _ = limits_of(device)
        assert (limits.logical_block, limits.read_align, limits.write_align) == (sector, sector, sector)
        assert limits.sources["logical_block"] == "BLKSSZGET"
        assert limits.sources["read_align"] in ("statx", "BLKSSZGET")
        assert limits.fua and limits.sources["fua"] == "RWF_DSYNC"


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_limits_of_a_mounted_file_are_what_it_takes(scratch: Path, fstype: str, sector: int) -> None:
    """B01, F51: also where the sector is not the file system's block."""
    with (
        made_image(fstype, directory=scratch, sector=sector) as image,
        loop_device(image, sector) as device,
        mounted(device, fstype) as home,
    ):
        path = filled(home / "file")
        check_against_kernel(path)
        limits, _ = limits_of(path)
        assert limits.logical_block == sector and limits.sources["logical_block"] == "sysfs"
        assert limits.sources["memory_align"] == "statx"
        alignment = describe(path)
        assert (alignment.kind, alignment.filesystem) == ("file", fstype)
        assert alignment.device == os.path.basename(device)


@pytest.mark.parametrize("fstype,sector", [("ext4", 512), ("ext4", 4096), ("xfs", 512)])
def test_the_probe_finds_what_statx_says(scratch: Path, fstype: str, sector: int) -> None:
    """F51: reading alone finds the alignments, and leaves nothing in the page cache."""
    with made_image(fstype, directory=scratch, sector=sector) as image, mounted(image, fstype, sector=sector) as home:
        path = filled(home / "file")
        said, _ = limits_of(path)
        with opened(path) as fd:
            found = probe(fd)
            after = cachestat(fd, 0, 0)
        assert (found.offset_align, found.memory_align) == (said.read_align, said.memory_align)
        assert found.support.reads
        assert after is None or after[0] == 0


@pytest.mark.parametrize("size", [1, 100, 511, 513, 4097, 70000])
def test_the_probe_works_on_short_files(scratch: Path, size: int) -> None:
    """F51: the end of file is not taken for an alignment; memory is aligned as offsets are, or better."""
    path = filled(scratch / "file", size)
    said, _ = limits_of(path)
    with opened(path) as fd:
        found = probe(fd)
    assert found.offset_align == said.read_align
    assert found.memory_align == (said.memory_align if size >= PIECE else said.read_align)


def test_the_probe_looks_for_data(scratch: Path) -> None:
    """F51: a hole takes any alignment, for nothing of it is read."""
    path = scratch / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 8 << 20)
        assert probe(fd).offset_align == 0 and "no data" in probe(fd).why
        os.pwrite(fd, os.urandom(4 * PIECE), 4 << 20)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found = probe(fd)
    said, _ = limits_of(path)
    assert (found.offset_align, found.memory_align) == (said.read_align, said.memory_align)


def test_an_empty_file_cannot_be_probed(scratch: Path) -> None:
    path = scratch / "empty"
    path.touch()
    with opened(path) as fd:
        found = probe(fd)
    assert found.offset_align == 0 and "empty" in found.why


def test_the_probe_never_writes(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor that it reads through cannot write."""
    path = filled(scratch / "file")
    before = path.read_bytes()
    seen = []
    real = probe_module._probe_open

    def spy(fd: int, size: int):
        seen.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
        return real(fd, size)

    monkeypatch.setattr(probe_module, "_probe_open", spy)
    with opened(path) as fd:
        probe(fd)
    assert seen == [os.O_RDONLY] and path.read_bytes() == before


def test_limits_follow_a_loop_device_that_comes_back_with_other_sectors(scratch: Path) -> None:
    """F51: nothing about alignment is remembered."""
    with made_image(None, 8 << 20, directory=scratch) as image:
        for sector in (512, 4096, 512):
            with loop_device(image, sector) as device:
                assert limits_of(device)[0].read_align == sector


def test_limits_of_a_partition(scratch: Path) -> None:
    """The queue of the disk counts for its partitions; discard too."""
    with (
        made_image(None, 16 << 20, directory=scratch) as image,
        loop_device(image) as disk,
        partition(disk, 1 << 20, 4 << 20) as part,
    ):
        check_against_kernel(part)
        limits, _ = limits_of(part)
        assert limits == limits_of(disk)[0]
        assert limits.sources["queue_depth"] == "sysfs"
        assert describe(part).device == os.path.basename(part)


# --- file systems that take it and do not do it ---------------------------------------------------


@pytest.fixture
def btrfs(scratch: Path) -> Iterator[Path]:
    with made_image("btrfs", 300 << 20, directory=scratch) as image, mounted(image, "btrfs") as home:
        yield home


def read_fills_cache(path: Path, offset: int, length: int, shift: int) -> bool:
    """Whether a direct read brings pages into the cache, which is to say that it was none."""
    with opened(path) as fd:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        before = cachestat(fd, 0, 0)
        if before is None:
            pytest.skip("needs cachestat(2)")
        assert before[0] == 0
        assert transfer(path, False, offset, length, shift) == "taken"
        after = cachestat(fd, 0, 0)
        assert after is not None
        return after[0] > 0


def write_fills_cache(path: Path, length: int = 32 << 20) -> bool:
    """Whether a direct write has pages in the cache while it runs (it drops them at its end)."""
    most = 0
    done = threading.Event()
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd, mmap.mmap(-1, length) as memory:
        if cachestat(fd, 0, 0) is None:
            pytest.skip("needs cachestat(2)")
        memory[:] = os.urandom(1 << 20) * (length >> 20)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

        def watch() -> None:
            nonlocal most
            while not done.is_set():
                answer = cachestat(fd, 0, 0)
                most = max(most, answer[0] if answer else 0)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert os.pwrite(fd, memory, 0) == length
        finally:
            done.set()
            watcher.join()
    return most > 0


def test_btrfs_reads_are_direct_only_at_its_sector_size(btrfs: Path) -> None:
    """F50, F51: btrfs takes every alignment and serves misaligned reads from the page cache."""
    path = filled(btrfs / "file")
    limits, support = limits_of(path)
    sector = limits.read_align
    assert limits.memory_align == limits.write_align == sector
    assert "btrfs" in limits.sources["read_align"]
    assert support.reads
    assert not read_fills_cache(path, sector, sector, sector)
    assert read_fills_cache(path, sector // 2, PIECE, 0)
    assert read_fills_cache(path, 0, PIECE + sector // 2, 0)
    assert read_fills_cache(path, 0, PIECE, sector // 2)


def test_the_probe_is_not_fooled_by_btrfs(btrfs: Path) -> None:
    """F50: being accepted is not being direct; the cache tells."""
    path = filled(btrfs / "file")
    with opened(path) as fd:
        if cachestat(fd, 0, 0) is None:
            pytest.skip("needs cachestat(2)")
        found = probe(fd)
    limits, _ = limits_of(path)
    assert (found.offset_align, found.memory_align) == (limits.read_align, limits.memory_align)


def test_the_probe_says_so_when_it_cannot_tell(btrfs: Path) -> None:
    """With the whole file cached, nothing shows whether a read was direct."""
    path = filled(btrfs / "file", 4096)
    path.read_bytes()
    with opened(path) as fd:
        found = probe(fd)
    assert found.offset_align == 0 and "cannot be seen" in found.why


@pytest.mark.parametrize("nocow", [False, True])
def test_btrfs_writes_are_direct_as_is_said(btrfs: Path, nocow: bool) -> None:
    """F50: data with checksums is written through the page cache since Linux 6.15, NOCOW data is not."""
    path = btrfs / "file"
    path.touch()
    if nocow:
        run("chattr", "+C", path)
    _, support = limits_of(path)
    # Before 6.15 it depends on what was backported, and the answer says that it is not sure.
    assert write_fills_cache(path) == (not support.writes) or "may write" in support.why
    if nocow:
        assert support == DirectSupport(True, True, "")
    else:
        assert "checksums" in support.why


def test_btrfs_without_checksums_is_recognised_per_file(scratch: Path) -> None:
    """F50: the mount option counts for files made under it, before and after it is taken away."""
    with made_image("btrfs", 300 << 20, directory=scratch) as image:
        with mounted(image, "btrfs") as home:
            filled(home / "with")
        with mounted(image, "btrfs", "nodatasum") as home:
            filled(home / "without")
        with mounted(image, "btrfs", "nodatasum") as home:
            _, without = limits_of(home / "without")
            _, with_sums = limits_of(home / "with")
            assert without == DirectSupport(True, True, "")
            assert write_fills_cache(home / "with") == (not with_sums.writes) or "may write" in with_sums.why
            assert not write_fills_cache(home / "without")


def test_btrfs_without_privilege_is_unsure_of_nodatasum(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the inode alone needs a tree search; without it the answer says that it is not sure."""
    monkeypatch.setattr(support_module, "_btrfs_has_checksums", lambda fd, ino: None)
    monkeypatch.setattr(support_module, "_kernel", lambda: (6, 15))
    with made_image("btrfs", directory=scratch) as image, mounted(image, "btrfs", "nodatasum") as home:
        _, support = limits_of(filled(home / "file"))
    assert not support.writes and "not sure" in support.why


def test_btrfs_compressed_data_is_read_through_the_cache(scratch: Path) -> None:
    """F50: compressed extents cannot go direct."""
    with made_image("btrfs", directory=scratch) as image, mounted(image, "btrfs", "compress-force=zstd") as home:
        path = home / "compressed"
        path.write_bytes(b"a" * FILE_BYTES)
        os.sync()
        _, support = limits_of(path)
        assert not support.reads and "compressed" in support.why
        assert read_fills_cache(path, 0, PIECE, 0)
        with opened(path) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert not probe(fd).support.reads


def test_btrfs_limits_know_the_disk_below(btrfs: Path) -> None:
    """btrfs has a device number of its own; the disk is found by the mount's source."""
    path = filled(btrfs / "file")
    alignment = describe(path)
    assert alignment.filesystem == "btrfs" and (alignment.device or "").startswith("loop")
    assert alignment.limits.sources["logical_block"] == "sysfs"


def test_tmpfs_is_memory() -> None:
    """F50: tmpfs takes O_DIRECT and has no device."""
    with mounted("odirect-test", "tmpfs", "size=8m") as home:
        path = home / "file"
        path.write_bytes(os.urandom(PIECE))
        limits, support = limits_of(path)
        assert not support.reads and not support.writes and "memory" in support.why
        assert (limits.read_align, limits.memory_align, limits.sources["read_align"]) == (1, 1, "tmpfs")
        assert describe(path).device is None


def test_ramfs_refuses_direct_io_at_open() -> None:
    """F50: the probe reports the refusal too."""
    needs_root()
    needs_filesystem("ramfs")
    with mounted("odirect-test", "tmpfs", "size=8m") as above:
        point = above / "ram"
        point.mkdir()
        run("mount", "-t", "ramfs", "none", point)
        try:
            path = point / "file"
            path.write_bytes(b"x" * PIECE)
            with pytest.raises(OSError) as refused:
                os.open(path, os.O_RDONLY | os.O_DIRECT)
            assert refused.value.errno == errno.EINVAL
            with opened(path) as fd:
                assert probe(fd).support == DirectSupport(False, False, probe(fd).why)
                assert "opened" in probe(fd).why
            assert not limits_of(path)[1].reads
        finally:
            run("umount", point)


def test_ext4_with_journalled_data_is_not_direct(scratch: Path) -> None:
    """F50: statx answers 0; why is found in the mount."""
    with made_image("ext4", 64 << 20, directory=scratch) as image, mounted(image, "ext4", "data=journal") as home:
        limits, support = limits_of(filled(home / "file"))
    assert not support.reads and not support.writes and "journalled" in support.why
    assert limits.sources["read_align"].startswith("default")


def test_ext4_with_inline_data_is_not_direct(scratch: Path) -> None:
    """F50: statx answers 0; why is found in the inode."""
    with made_image("ext4", directory=scratch, mkfs=["-O", "inline_data"]) as image, mounted(image, "ext4") as home:
        _, support = limits_of(filled(home / "file", 20))
    assert not support.reads and not support.writes and "inline" in support.why


@pytest.mark.parametrize(
    "flag,word", [(0x800, "encrypted"), (0x4000, "journalled"), (0x100000, "verity"), (0, "statx")]
)
def test_why_a_file_is_not_direct(scratch: Path, monkeypatch: pytest.MonkeyPatch, flag: int, word: str) -> None:
    """F50: statx's zeroes are a refusal, whatever the cause."""
    fake_statx(monkeypatch, mask=DIOALIGN, dio_mem_align=0, dio_offset_align=0)
    monkeypatch.setattr(support_module, "_inode_flags", lambda fd: flag)
    _, support = limits_of(filled(scratch / "file"))
    assert not support.reads and not support.writes and word in support.why


# --- what statx says is passed on -----------------------------------------------------------------


def fake_statx(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Have the kernel say these things of every file."""
    monkeypatch.setattr(limits_module, "statx", lambda fd: statx(fd)._replace(**changes))


@pytest.mark.parametrize("memory", [4, 512, 4096])
@pytest.mark.parametrize("offset", [512, 4096, 65536])
@pytest.mark.parametrize("read", [0, 512, 4096])
def test_every_answer_of_statx_is_believed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, memory: int, offset: int, read: int
) -> None:
    """F51: no alignment is built in; reads and writes may differ."""
    mask = DIOALIGN | (DIO_READ_ALIGN if read else 0)
    fake_statx(monkeypatch, mask=mask, dio_mem_align=memory, dio_offset_align=offset, dio_read_offset_align=read)
    path = scratch / "file"
    path.touch()
    limits, support = limits_of(path)
    assert (limits.memory_align, limits.write_align, limits.read_align) == (memory, offset, read or offset)
    assert limits.max_bio_bytes >= offset and support == DirectSupport(True, True, "")


def test_atomic_limits_are_passed_on(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F43: only what statx promises is promised."""
    path = scratch / "file"
    path.touch()
    mask = statx(os.fspath(path)).mask
    figures = {"atomic_write_unit_min": 4096, "atomic_write_unit_max": 65536, "atomic_write_segments_max": 1}
    fake_statx(monkeypatch, mask=mask | WRITE_ATOMIC, **figures)
    limits, _ = limits_of(path)
    assert (limits.atomic_min, limits.atomic_max, limits.atomic_max_segments) == (4096, 65536, 1)
    assert limits.sources["atomic_max"] == "statx"
    fake_statx(monkeypatch, mask=mask & ~WRITE_ATOMIC, **figures)
    assert limits_of(path)[0].atomic_max == 0


def test_without_statx_a_file_is_probed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F51: an old kernel's answer has no alignments; the same figures are found by reading."""
    path = filled(scratch / "file")
    said, _ = limits_of(path)
    fake_statx(monkeypatch, mask=0x7FF)
    found, support = limits_of(path)
    assert found.sources["read_align"] == found.sources["memory_align"] == "probe"
    assert (found.read_align, found.memory_align) == (said.read_align, said.memory_align)
    assert "not tried" in support.why
    empty = scratch / "empty"
    empty.touch()
    assert limits_of(empty)[0].sources["read_align"] == "default (an empty file cannot be probed)"


def test_without_statx_a_device_is_asked_by_ioctl(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F51, B01."""
    fake_statx(monkeypatch, mask=0x7FF)
    with made_image(None, directory=scratch) as image, loop_device(image, 4096) as device:
        limits, _ = limits_of(device)
    assert (limits.read_align, limits.write_align, limits.memory_align) == (4096, 4096, 4096)
    assert limits.sources["read_align"] == "BLKSSZGET"


def test_without_sysfs_nothing_is_promised(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F40: what nobody says of a write cache is taken for the worse."""
    monkeypatch.setattr(sysfs, "SYS", os.fspath(scratch / "none"))
    path = filled(scratch / "file")
    limits, _ = limits_of(path)
    assert limits.volatile_cache and not limits.poll
    assert {limits.sources[name] for name in ("volatile_cache", "poll", "queue_depth", "logical_block")} == {"default"}


@pytest.mark.parametrize("says,volatile", [("write back", True), ("write through", False)])
def test_the_write_cache_is_read_each_time(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, says: str, volatile: bool
) -> None:
    """F40: the administrator may switch it between two opens."""
    info = os.stat(scratch)
    queue = scratch / f"sys/dev/block/{os.major(info.st_dev)}:{os.minor(info.st_dev)}/queue"
    queue.mkdir(parents=True)
    (queue / "io_poll").write_text("1\n")
    (queue / "nr_requests").write_text("32\n")
    monkeypatch.setattr(sysfs, "SYS", os.fspath(scratch / "sys"))
    path = filled(scratch / "file")
    for said, expected in ((says, volatile), ("write back", True), ("write through", False)):
        (queue / "write_cache").write_text(said + "\n")
        limits, _ = limits_of(path)
        assert limits.volatile_cache is expected
    assert limits.poll and limits.queue_depth == 32


# --- describe, and refusals -----------------------------------------------------------------------


def test_every_alignment_has_its_source(scratch: Path) -> None:
    """F51: no figure is without a label."""
    alignment = describe(filled(scratch / "file"))
    assert isinstance(alignment, Alignment)
    labelled = {"logical_block", "physical_block", "read_align", "write_align", "memory_align", "max_bio_bytes"}
    assert labelled <= set(alignment.limits.sources)
    told = json.loads(json.dumps(alignment.as_dict()))
    assert told["limits"]["read_align"] == alignment.limits.read_align
    assert told["sources"] == dict(alignment.limits.sources)
    assert told["direct"]["reads"] is True


def test_only_a_writable_file_can_discard(scratch: Path) -> None:
    path = filled(scratch / "file")
    assert not limits_of(path, writable=False)[0].discard
    assert limits_of(path, writable=False)[0].sources["discard"] == "not writable"
    assert limits_of(path, writable=True)[0].discard


def test_what_is_no_file_is_refused(scratch: Path) -> None:
    with pytest.raises(DirectoryError):
        describe(scratch)
    with pytest.raises(UnsupportedError):
        describe("/dev/null")
    with pytest.raises(MissingError):
        describe(scratch / "missing")
