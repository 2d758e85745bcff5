"""What `open_volume` refuses, with which words; what it marks, locks and lets go of; what it never writes (F34)."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.loops import loop_device, made_image, mounted, needs_root, needs_tool, run

import odirect
from odirect.base.errors import CorruptionError, InUseError, ODirectError, ReadOnlyError, UnsupportedError

SUPERBLOCK = 1024


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    """An ext2 image with a file in it."""
    with made_image("ext2", directory=scratch) as image:
        with odirect.open_volume(image, "r+") as volume:
            volume.write_bytes("/file", b"content" * 1000)
        yield image


def digest(path: Path) -> str:
    """Of the whole image."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refused(path: object, error: type[ODirectError], words: str, mode: str = "r+") -> ODirectError:
    """Opening is refused, twice, in these words, with the path; nothing is written, and nothing stays locked."""
    before = digest(Path(os.fspath(path))) if not Path(os.fspath(path)).is_block_device() else ""  # type: ignore[call-overload]
    for _ in range(2):
        with pytest.raises(error, match=words) as caught:
            odirect.open_volume(path, mode)  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"{path}: ")
        assert caught.value.errno
    if before:
        assert digest(Path(os.fspath(path))) == before  # type: ignore[call-overload]
        assert is_free(Path(os.fspath(path)))  # type: ignore[call-overload]
    return caught.value


def is_free(path: Path) -> bool:
    """Whether nobody has locked it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def state(path: Path) -> str:
    """What dumpe2fs says of it."""
    # Past this machine's page cache, as everybody would see it after a power cut.
    found = re.search(r"^Filesystem state: +(.*)$", run("dumpe2fs", "-h", path), re.M)
    assert found is not None
    return found.group(1)


def poke(path: Path, offset: int, layout: str, value: int) -> None:
    """Put a number into the superblock."""
    with path.open("r+b") as file:
        file.seek(SUPERBLOCK + offset)
        file.write(struct.pack(layout, value))


def peek(path: Path, offset: int, layout: str) -> int:
    """A number of the superblock."""
    with path.open("rb") as file:
        file.seek(SUPERBLOCK + offset)
        found: int = struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
        return found


# --- who else is at it ---------------------------------------------------------------------------


def test_a_mounted_image_is_refused(image: Path) -> None:
    """Mounted anyhow, written or read: the mount point is named, and what to do."""
    needs_root()
    for options in ("", "ro"):
        with mounted(image, "ext2", options) as point:
            before = digest(image)
            with pytest.raises(
                InUseError, match=rf"is mounted on {re.escape(str(point))} .*unmount it first"
            ) as caught:
                odirect.open_volume(image, "r+")
            assert caught.value.filename == str(image) and caught.value.exit_code == 6
            assert digest(image) == before
            assert is_free(image)
            with odirect.open_volume(image) as volume:
                assert volume.read_bytes("/file") == b"content" * 1000
    odirect.open_volume(image, "r+").close()


def test_a_mounted_device_is_refused(image: Path) -> None:
    """The device itself, too."""
    with loop_device(image) as device, mounted(device, "ext2") as point:
        with pytest.raises(InUseError, match=rf"it is mounted on {re.escape(str(point))} \(ext[24], read-write\)"):
            odirect.open_volume(device, "r+")
        odirect.open_volume(device).close()


def test_a_looped_image_is_refused(image: Path) -> None:
    """Even where nothing is mounted: the loop device has its own cache. It is named, with the command that ends it."""
    with loop_device(image) as device:
        error = refused(image, InUseError, rf"behind loop device {device}; .*losetup -d {device}")
        assert "will not write to it" in str(error)
        odirect.open_volume(image).close()
    odirect.open_volume(image, "r+").close()


_HOLDER = """
import odirect, sys
volume = odirect.open_volume(sys.argv[1], sys.argv[2])
if sys.argv[2] == "r+":
    volume.write_bytes("/from-the-child", b"x" * 5000)
    if sys.argv[3] == "sync":
        volume.sync()
print("open", flush=True)
sys.stdin.readline()
volume.close()
"""


@contextlib.contextmanager
def holder(image: Path, mode: str, how: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that has the image open."""
    words = [sys.executable, "-c", _HOLDER, str(image), mode, how]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.communicate()


@pytest.mark.parametrize("mine", ["r", "r+"])
@pytest.mark.parametrize("theirs", ["r", "r+"])
def test_another_process_has_it(image: Path, theirs: str, mine: str) -> None:
    """Readers share; a writer is alone, and named. It is free as soon as that one ends."""
    with holder(image, theirs) as child:
        if theirs == mine == "r":
            odirect.open_volume(image).close()
        else:
            verb = "write to" if mine == "r+" else "read"
            words = rf"will not {verb} it: process {child.pid} \(.+\) has locked it \(flock\).*close that first"
            with pytest.raises(InUseError, match=words) as caught:
                odirect.open_volume(image, mine)
            assert ("open there for writing" in str(caught.value)) == (mine == "r")
        child.communicate("end\n")
    odirect.open_volume(image, "r+").close()


# --- what it is ----------------------------------------------------------------------------------


def test_a_volume_that_was_not_closed_well(image: Path) -> None:
    """Not clean, errors, orphans: read, but not written."""
    clean = peek(image, 0x3A, "<H")
    for value, words in (
        (0, "was not closed well, or is in use; run e2fsck"),
        (3, "errors were found on it; run e2fsck"),
        (2, "errors were found on it; run e2fsck"),
        (5, "deleted files that are still to be cleaned up; run e2fsck"),
    ):
        poke(image, 0x3A, "<H", value)
        refused(image, ReadOnlyError, words)
        with odirect.open_volume(image) as volume:
            assert volume.read_bytes("/file") == b"content" * 1000
    poke(image, 0x3A, "<H", clean)
    poke(image, 0xE8, "<I", 12)
    refused(image, ReadOnlyError, "deleted files")
    poke(image, 0xE8, "<I", 0)
    odirect.open_volume(image, "r+").close()


def test_ext3_is_read_and_not_written(scratch: Path) -> None:
    """A journal that is clean does not disturb reading; one that is to be replayed does."""
    with made_image("ext3", directory=scratch) as image:
        refused(image, ReadOnlyError, r"journal \(ext3\), which is only read here")
        odirect.open_volume(image).close()
        poke(image, 0x60, "<I", peek(image, 0x60, "<I") | 0x4)
        for mode in ("r", "r+"):
            refused(image, UnsupportedError, "journal must be replayed first .needs_recovery.: run e2fsck", mode)


def test_ext4_is_refused_by_its_features(scratch: Path) -> None:
    """By the names that e2fsprogs has for them."""
    with made_image("ext4", directory=scratch, mkfs=("-O", "64bit,metadata_csum,inline_data")) as image:
        for mode in ("r", "r+"):
            error = refused(image, UnsupportedError, "features that are not ext2's", mode)
            for name in ("extents (ext4)", "64bit (ext4)", "flex_bg (ext4)", "inline_data (ext4)"):
                assert name in str(error)
    with made_image(
        "ext4", directory=scratch, mkfs=("-O", "^extents,^64bit,^flex_bg,metadata_csum,^has_journal")
    ) as image:
        error = refused(image, ReadOnlyError, "only read here")
        assert "metadata_csum (ext4)" in str(error) and "huge_file (ext4)" in str(error)


@pytest.mark.parametrize(
    ("offset", "bit", "error", "words"),
    [
        (0x60, 0x1, UnsupportedError, "compression"),
        (0x60, 0x8, UnsupportedError, "journal_dev"),
        (0x60, 0x10, UnsupportedError, "meta_bg"),
        (0x60, 0x40, UnsupportedError, r"extents \(ext4\)"),
        (0x60, 0x10000, UnsupportedError, "encrypt"),
        (0x60, 0x20000, UnsupportedError, "casefold"),
        (0x60, 0x20, UnsupportedError, "incompatible feature 0x20"),
        (0x60, 0x80000000, UnsupportedError, "incompatible feature 0x80000000"),
        (0x64, 0x4, ReadOnlyError, "btree_dir"),
        (0x64, 0x8, ReadOnlyError, "huge_file"),
        (0x64, 0x10, ReadOnlyError, "uninit_bg"),
        (0x64, 0x400, ReadOnlyError, "metadata_csum"),
        (0x64, 0x1000, ReadOnlyError, "read-only"),
        (0x64, 0x80, ReadOnlyError, "read-only compatible feature 0x80"),
        (0x64, 0x40000000, ReadOnlyError, "read-only compatible feature 0x40000000"),
        (0x5C, 0x4, ReadOnlyError, "journal"),
    ],
)
def test_features_that_are_not_ours(image: Path, offset: int, bit: int, error: type[ODirectError], words: str) -> None:
    """Each by its name, or by its number if it has none; those that allow reading do."""
    poke(image, offset, "<I", peek(image, offset, "<I") | bit)
    refused(image, error, words)
    if error is UnsupportedError:
        refused(image, error, words, "r")
    else:
        with odirect.open_volume(image) as volume:
            assert volume.read_bytes("/file") == b"content" * 1000


def test_compatible_features_may_be_anything(image: Path) -> None:
    """Who does not know them may ignore them, by definition."""
    poke(image, 0x5C, "<I", peek(image, 0x5C, "<I") | 0x40000000)
    with odirect.open_volume(image, "r+") as volume:
        volume.write_bytes("/more", b"more")


def test_revisions_and_sizes_to_come(image: Path) -> None:
    """Said in words."""
    for offset, layout, value, error, words in (
        (0x4C, "<I", 2, UnsupportedError, "revision 2"),
        (0x18, "<I", 6, UnsupportedError, "65536 bytes"),
        (0x18, "<I", 7, CorruptionError, "log_block_size 7"),
        (0x04, "<I", 1 << 30, CorruptionError, "was it cut short"),
        (0x58, "<H", 100, CorruptionError, "inode_size 100"),
    ):
        old = peek(image, offset, layout)
        poke(image, offset, layout, value)
        for mode in ("r", "r+"):
            refused(image, error, words, mode)
        poke(image, offset, layout, old)
    odirect.open_volume(image, "r+").close()


@pytest.mark.parametrize(("kind", "words"), [("btrfs", "btrfs"), ("xfs", "XFS")], ids=["btrfs", "xfs"])
def test_other_file_systems_are_named(scratch: Path, kind: str, words: str) -> None:
    """Also where an old superblock of ext2 shows through nothing of it."""
    with made_image(kind, directory=scratch) as image:
        for mode in ("r", "r+"):
            refused(image, UnsupportedError, f"it holds {words}, and only ext2 can be opened", mode)


def _swap(path: Path) -> None:
    run("mkswap", path)


def _dos(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\xff" * 3, 2048, 8192))
        file.seek(510)
        file.write(b"\x55\xaa")


def _gpt(path: Path) -> None:
    _dos(path)
    with path.open("r+b") as file:
        file.seek(512)
        file.write(b"EFI PART\0\0\1\0" + struct.pack("<I", 92))


def _noise(path: Path) -> None:
    path.write_bytes(hashlib.shake_128(b"noise").digest(1 << 20))


def _zeroes(path: Path) -> None:
    path.write_bytes(bytes(1 << 20))


def _gzip(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08" + bytes(5000))


def _text(path: Path) -> None:
    path.write_text("This is no file system.\n" * 1000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_swap, "it holds swap"),
        (_dos, "it holds a partition table"),
        (_gpt, "it holds a GPT partition table"),
        (_noise, "no file system on it that is known"),
        (_zeroes, "no file system on it that is known"),
        (_text, "no file system on it that is known"),
        (_gzip, "it holds gzip"),
    ],
)
def test_other_contents_are_named(scratch: Path, make: Callable[[Path], None], words: str) -> None:
    """What it is, where that can be told."""
    path = scratch / "image"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    make(path)
    for mode in ("r", "r+"):
        refused(path, UnsupportedError, words, mode)


@pytest.mark.parametrize("length", [0, 1, 511, 1024, 1080, 1082, 1536, 2047, 2048, 5000, 100_000])
def test_images_that_were_cut_short(image: Path, length: int) -> None:
    """Whatever is left of it: never an exception of another kind."""
    os.truncate(image, length)
    for mode in ("r", "r+"):
        words = "cut short|no file system on it|found .* bytes, expected 1024 bytes" if length else "no file system"
        before = digest(image)
        with pytest.raises((CorruptionError, UnsupportedError), match=words):
            odirect.open_volume(image, mode)
        assert digest(image) == before and is_free(image)


def test_a_file_that_may_not_be_written(image: Path) -> None:
    """As far as the machine says so: a read-only loop device."""
    with loop_device(image, read_only=True) as device:
        with pytest.raises(ODirectError):
            odirect.open_volume(device, "r+")
        with odirect.open_volume(device) as volume:
            assert volume.read_bytes("/file") == b"content" * 1000


# --- the mark ------------------------------------------------------------------------------------


def test_the_mark_while_it_is_written(image: Path) -> None:
    """On the disk from the start, also if nothing is ever changed; taken away at the end."""
    assert state(image) == "clean"
    with odirect.open_volume(image, "r+") as volume:
        assert state(image) == "not clean"
        volume.write_bytes("/new", b"x")
        volume.sync()
        assert state(image) == "not clean"
    assert state(image) == "clean"
    with odirect.open_volume(image, "r+"):
        assert state(image) == "not clean"
    assert state(image) == "clean"
    with odirect.open_volume(image):
        assert state(image) == "clean"


def test_the_mark_after_an_exception(image: Path) -> None:
    """The block is left with it, and the volume is closed well."""
    with pytest.raises(ZeroDivisionError), odirect.open_volume(image, "r+") as volume, volume.open("/new", "w") as file:
        file.write(b"until then")
        raise ZeroDivisionError
    assert state(image) == "clean"
    with odirect.open_volume(image, "r+") as volume:
        assert volume.read_bytes("/new") == b"until then"
        assert volume.check() == []


@pytest.mark.parametrize("how", ["sync", "not at all"])
def test_the_mark_after_a_crash(image: Path, how: str) -> None:
    """SIGKILL: it stays not clean and is refused, the lock is gone; what was synced is there, and e2fsck mends it."""
    with holder(image, "r+", how) as child:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert is_free(image)
        assert state(image) == "not clean"
        refused(image, ReadOnlyError, "was not closed well, or is in use; run e2fsck")
    with odirect.open_volume(image) as volume:
        assert volume.read_bytes("/file") == b"content" * 1000
        if how == "sync":
            assert volume.read_bytes("/from-the-child") == b"x" * 5000
    done = subprocess.run([needs_tool("e2fsck"), "-fy", str(image)], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout
    if how == "sync":
        assert done.stdout.count("Fix") == 0, done.stdout
    with odirect.open_volume(image, "r+") as volume:
        assert volume.check() == []


def test_what_was_not_clean_is_not_made_clean(image: Path) -> None:
    """A volume that is refused keeps its mark, whoever reads it."""
    poke(image, 0x3A, "<H", 0)
    odirect.open_volume(image).close()
    refused(image, ReadOnlyError, "not closed well")
    assert state(image) == "not clean"


# --- reading writes nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext2", "ext3"])
def test_reading_never_writes(scratch: Path, kind: str) -> None:
    """Not one byte, whatever is read, and whatever change is tried."""
    with made_image(kind, directory=scratch, mkfs=("-d", str(Path(__file__).parent / "block"))) as image:
        before = digest(image)
        times = image.stat().st_mtime_ns
        at = ""
        with odirect.open_volume(image) as volume:
            for path, _, names in volume.walk("/"):
                for name in names:
                    at = f"{path.rstrip('/')}/{name}"
                    volume.read_bytes(at)
                    with volume.open(at, access="buffered") as file:
                        file.pread(5000, 100)
                    volume.xattrs(at)
                    volume.stat(at)
                    volume.extents(at)
            assert volume.check() == []
            volume.statfs()
            volume.sync()
            assert at
            changes: list[Callable[[], object]] = [
                lambda: volume.open(at, "r+"),
                lambda: volume.open("/new", "w"),
                lambda: volume.write_bytes("/new", b"x"),
                lambda: volume.mkdir("/d"),
                lambda: volume.unlink(at),
                lambda: volume.rename(at, "/x"),
                lambda: volume.link(at, "/x"),
                lambda: volume.symlink("x", "/x"),
                lambda: volume.mknod("/x"),
                lambda: volume.chmod(at, 0),
                lambda: volume.chown(at, 1, 1),
                lambda: volume.utime(at),
                lambda: volume.set_xattr(at, "user.x", b"x"),
                lambda: volume.rmtree("/lost+found"),
                lambda: volume.copy_in(__file__, "/"),
            ]
            for change in changes:
                with pytest.raises(ReadOnlyError, match="open for reading only"):
                    change()
            volume.sync()
        assert digest(image) == before
        assert image.stat().st_mtime_ns == times


def test_an_image_that_nobody_may_write(image: Path) -> None:
    """Permissions to read are enough for reading (F34)."""
    needs_root()
    image.chmod(0o444)
    for directory in (image.parent, image.parent.parent):
        directory.chmod(0o755)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with odirect.open_volume(image) as volume:
                assert len(volume.read_bytes("/file")) == 7000
            with pytest.raises(PermissionError):
                odirect.open_volume(image, "r+")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# --- letting go ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_locks_are_gone_after_close(image: Path, mode: str) -> None:
    """And are there before."""
    with odirect.open_volume(image, mode):
        assert not is_free(image)
    assert is_free(image)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_locks_are_gone_after_garbage_collection(image: Path, mode: str) -> None:
    """With a warning for who has forgotten to close."""
    volume = odirect.open_volume(image, mode)
    assert not is_free(image)
    with pytest.warns(ResourceWarning, match="a volume was not closed"):
        del volume
        gc.collect()
    assert is_free(image) and state(image) == "clean"


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_locks_are_gone_after_a_crash(image: Path, mode: str) -> None:
    """The kernel lets go of them."""
    with holder(image, mode) as child:
        assert not is_free(image)
        child.kill()
        child.wait()
        assert is_free(image)


def test_locks_are_gone_after_a_refusal(image: Path) -> None:
    """At whatever step it was refused; the descriptors too, which the fixtures look at."""
    good = image.read_bytes()
    places = {"magic": 0x38, "groups": 0x20, "state": 0x3A, "features": 0x60, "blocks": 0x04, "first": 0x14}
    for offset in places.values():
        poke(image, offset, "<H", 0xFFFF if offset != 0x3A else 0)
        with pytest.raises(ODirectError):
            odirect.open_volume(image, "r+")
        assert is_free(image)
        image.write_bytes(good)
    # In the group descriptors, and in the root directory's inode.
    block_bytes = 1024 << good[SUPERBLOCK + 0x18]
    descriptors = (SUPERBLOCK // block_bytes + 1) * block_bytes
    for wrong in (0, 0xFFFFFFFF):
        with image.open("r+b") as file:
            file.seek(descriptors + 8)
            file.write(struct.pack("<I", wrong))
        with pytest.raises(CorruptionError, match="group 0"):
            odirect.open_volume(image, "r+")
        assert is_free(image) and peek(image, 0x3A, "<H") & 1
        image.write_bytes(good)
    odirect.open_volume(image, "r+").close()
