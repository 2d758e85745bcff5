"""Trees of the host: listed with one call a directory, small files read many at once."""

from __future__ import annotations

import errno
import os
import random
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
from tests.volume_kit import volume_of

from odirect import host_tree, volume_copy_in
from odirect.base.errors import InUseError, MissingError, NotDirectoryError, ODirectError
from odirect.host_tree import Batch, SmallFiles, Status, list_tree, row_of
from odirect.ring import _calls

BLOCK = 4096


def read(directory: Path, names: list[bytes], *, room: int = BLOCK, plain: bool = True) -> tuple[list[int], bytes]:
    """What `read_small` answers for these names, and the memory."""
    found, raw = _calls.list_directory(directory)
    rows = numpy.frombuffer(raw, numpy.int64).reshape(-1, len(_calls.STATUS_FIELDS))
    statuses = rows[[found.index(name) for name in names]].copy()
    return read_as(directory, names, statuses, room=room, plain=plain)


def read_as(
    directory: Path, names: list[bytes], statuses: numpy.ndarray, *, room: int = BLOCK, plain: bool = True
) -> tuple[list[int], bytes]:
    memory = bytearray(b"\xee" * room * len(names))
    counts, rooms = numpy.array([len(names)], numpy.int64), numpy.full(len(names), room, numpy.int64)
    path = os.fsencode(directory)
    return _calls.read_small([path], counts, names, statuses, memory, rooms, plain), bytes(memory)


# --- listing --------------------------------------------------------------------------------------


def test_a_listing_says_what_lstat_says(tmp_path: Path) -> None:
    """All kinds of files, and more names than one call of the kernel's gives."""
    for number in range(3000):
        (tmp_path / f"{number}-{'n' * (number % 200)}").touch()
    (tmp_path / "file").write_bytes(b"x" * 5000)
    os.utime(tmp_path / "file", ns=(-1_500_000_000, 20_000_000_000_000_000_007 % 2**62))
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.link(tmp_path / "file", tmp_path / "second name")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / os.fsdecode(b"\xff\xfe")).touch()
    names, raw = _calls.list_directory(tmp_path)
    rows = numpy.frombuffer(raw, numpy.int64).reshape(-1, len(_calls.STATUS_FIELDS))
    assert sorted(names) == sorted(os.listdir(os.fsencode(tmp_path)))
    for name, row in zip(names, rows, strict=True):
        expected = os.lstat(os.path.join(os.fsencode(tmp_path), name))
        assert Status.of(row) == tuple(getattr(expected, field) for field in Status._fields)


def test_what_cannot_be_listed_is_named(tmp_path: Path) -> None:
    """Errors are the kernel's, with the path."""
    (tmp_path / "file").touch()
    with pytest.raises(MissingError) as missing:
        _calls.list_directory(tmp_path / "none")
    assert missing.value.filename == tmp_path / "none"
    with pytest.raises(NotDirectoryError):
        _calls.list_directory(tmp_path / "file")
    with pytest.raises(ValueError, match="null"):
        _calls.list_directory(b"a\0b")
    with pytest.raises(MissingError):
        list_tree(os.fsencode(tmp_path / "none"))


def test_listings_come_in_order(tmp_path: Path) -> None:
    """Names are sorted, and a directory comes after the one that it is in."""
    for path in ("b/z", "b/a/deep", "a/x", "c"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "b" / "file").write_bytes(b"12345")
    os.symlink("b", tmp_path / "link")
    listings = list_tree(os.fsencode(tmp_path) + b"/")
    below = {listing.path_of(row): number for listing in listings for row, number in listing.below.items()}
    assert all(listings[number].path == path for path, number in below.items())
    shown = [os.fsdecode(os.path.relpath(listing.path, os.fsencode(tmp_path))) for listing in listings]
    assert shown == [".", "a", "b", "c", "a/x", "b/a", "b/z", "b/a/deep"]
    assert [listing.names for listing in listings][:3] == [[b"a", b"b", b"c", b"link"], [b"x"], [b"a", b"file", b"z"]]
    assert listings[2].small(5).tolist() == [False, True, False]
    assert not listings[2].small(4).any()


# --- reading --------------------------------------------------------------------------------------


def test_files_are_read_and_padded(tmp_path: Path) -> None:
    """Each file is in its room, with zeroes after it: nothing of what the memory held before gets to a disk (F02)."""
    contents = {b"empty": b"", b"one": b"1", b"most": b"m" * BLOCK, b"some": b"s" * 1000}
    for name, content in contents.items():
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    results, memory = read(tmp_path, list(contents))
    assert results == [0] * len(contents)
    assert memory == b"".join(content.ljust(BLOCK, b"\0") for content in contents.values())


def test_what_is_not_small_is_left_alone(tmp_path: Path) -> None:
    """Larger than its room, with holes, with a second name, with attributes: not read."""
    (tmp_path / "large").write_bytes(b"l" * (BLOCK + 1))
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(BLOCK)
    (tmp_path / "linked").write_bytes(b"x")
    os.link(tmp_path / "linked", tmp_path / "too")
    (tmp_path / "plain").write_bytes(b"p")
    names = [b"large", b"hole", b"linked", b"plain"]
    results, memory = read(tmp_path, names)
    assert results == [_calls.NOT_SMALL] * 3 + [0]
    assert memory[3 * BLOCK :] == b"p".ljust(BLOCK, b"\0")


def test_extended_attributes_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    try:
        os.setxattr(tmp_path / "file", "user.key", b"value")
    except OSError as error:
        pytest.skip(f"no extended attributes here: {error}")
    assert read(tmp_path, [b"file"])[0] == [_calls.NOT_SMALL]
    assert read(tmp_path, [b"file"], plain=False)[0] == [0]


def test_who_took_the_name_is_not_read(tmp_path: Path) -> None:
    """A file, a link or a fifo in the place of the one that was listed is told, and not waited for (F24)."""
    for name in ("gone", "other", "link", "fifo", "socket"):
        (tmp_path / name).write_bytes(b"listed")
    names = [b"gone", b"other", b"link", b"fifo", b"socket"]
    found, raw = _calls.list_directory(tmp_path)
    rows = numpy.frombuffer(raw, numpy.int64).reshape(-1, len(_calls.STATUS_FIELDS))
    statuses = rows[[found.index(name) for name in names]].copy()
    (tmp_path / "keeps the inode").write_bytes(b"")
    for word in names:
        os.rename(tmp_path / os.fsdecode(word), tmp_path / f"old {os.fsdecode(word)}")
    (tmp_path / "other").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("other")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(tmp_path / "socket"))
        results, memory = read_as(tmp_path, names, statuses)
    assert results == [-errno.ENOENT, _calls.ANOTHER, -errno.ELOOP, _calls.ANOTHER, -errno.ENXIO]
    assert b"secret" not in memory
    (tmp_path / "not here").mkdir()
    assert read_as(tmp_path / "none", names, statuses)[0] == [-errno.ENOENT] * len(names)


def test_statuses_are_brought_up_to_date(tmp_path: Path) -> None:
    """What is stored of a file is what it was when it was read, not when it was listed."""
    (tmp_path / "file").write_bytes(b"x" * 10)
    _, raw = _calls.list_directory(tmp_path)
    statuses = numpy.frombuffer(raw, numpy.int64).reshape(1, -1)
    (tmp_path / "file").write_bytes(b"y" * 20)
    os.chmod(tmp_path / "file", 0o600)
    results, memory = read_as(tmp_path, [b"file"], statuses)
    assert results == [0] and memory == (b"y" * 20).ljust(BLOCK, b"\0")
    assert (statuses[0, host_tree.SIZE], stat.S_IMODE(int(statuses[0, host_tree.MODE]))) == (20, 0o600)


def test_arrays_that_do_not_match_are_refused(tmp_path: Path) -> None:
    """Nothing is written past the memory (F23)."""
    path, one = os.fsencode(tmp_path), numpy.array([1], numpy.int64)
    statuses = numpy.zeros((1, len(_calls.STATUS_FIELDS)), numpy.int64)
    good: tuple[Any, ...] = ([path], one, [b"x"], statuses, bytearray(8), one * 8, True)
    assert _calls.read_small(*good) == [-errno.ENOENT]
    for place, wrong in (
        (1, one * 2),
        (1, numpy.zeros(0, numpy.int64)),
        (2, []),
        (3, statuses[:0]),
        (3, statuses[:, :5].copy()),
        (4, bytearray(7)),
        (5, -one),
        (0, [b"a\0"]),
        (2, [b"a\0"]),
    ):
        with pytest.raises(ValueError):
            arguments = (*good[:place], wrong, *good[place + 1 :])
            _calls.read_small(*arguments)
    assert _calls.read_small([], one[:0], [], statuses[:0], bytearray(), one[:0], True) == []


@pytest.mark.parametrize("seed", range(4))
def test_batches_have_every_small_file_once(seed: int, tmp_path: Path) -> None:
    """Whatever the sizes and directories: all of them, in order, none in a batch that is too large."""
    dice = random.Random(seed)
    expected: list[tuple[bytes, bytes]] = []
    most = 300_000
    for number in range(6):
        directory = tmp_path / f"{number}"
        directory.mkdir()
        for at in range(dice.choice([0, 1, 40, 700])):
            size = dice.choice([0, 1, 4096, dice.randrange(20_000), dice.randrange(600_000) if at % 50 == 0 else 7])
            content = dice.randbytes(size)
            (directory / f"{at:04}").write_bytes(content)
            if size <= most:
                expected.append((b"%04d" % at, content))
    found: list[tuple[bytes, bytes]] = []
    listings = list_tree(os.fsencode(tmp_path))
    with SmallFiles(listings, most, BLOCK, plain=True) as files:
        for batch in files:
            found += _contents(batch)
            assert len(batch.names) <= host_tree.BATCH_FILES
            assert batch.rooms.sum() <= host_tree.BATCH_BYTES
            for row, name in enumerate(batch.names):
                number, at = row_of(batch.parts, row)
                assert listings[number].names[at] == name
            with pytest.raises(IndexError):
                row_of(batch.parts, len(batch.names))
            batch.memory[:] = b"\xff" * len(batch.memory)  # The next one must not rely on what is there.
            files.release(batch)
    assert found == expected


def _contents(batch: Batch) -> list[tuple[bytes, bytes]]:
    contents, start = [], 0
    assert not any(batch.results)
    for name, room, size in zip(batch.names, batch.rooms.tolist(), batch.statuses[:, host_tree.SIZE], strict=True):
        contents.append((name, bytes(batch.memory[start : start + int(size)])))
        assert not any(batch.memory[start + int(size) : start + room])
        start += room
    return contents


def test_who_stops_early_waits_for_the_threads(tmp_path: Path) -> None:
    """Their memory is in use until then (F24)."""
    for number in range(5 * host_tree.BATCH_FILES):
        (tmp_path / f"{number}").touch()
    before = set(threading.enumerate())
    with SmallFiles(list_tree(os.fsencode(tmp_path)), 4096, BLOCK, plain=True) as files:
        next(iter(files))
        assert files._reading
    assert set(threading.enumerate()) <= before


def test_what_a_thread_raises_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours in a thread must not look like the end of the tree."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(host_tree, "read_small", lambda *_: 1 / 0)
    listings = list_tree(os.fsencode(tmp_path))
    with SmallFiles(listings, 4096, BLOCK, plain=True) as files, pytest.raises(RuntimeError) as failed:
        list(files)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)


# --- copies of trees that change meanwhile --------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "ext2"])
def test_files_that_changed_since_they_were_listed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter, longer, with a hole, with a second name: each is copied as it is when it is read."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(40):
        (tree / f"{number:02}").write_bytes(bytes([number]) * 3000 * (1 + number % 4))

    def changed(top: bytes) -> list[host_tree.Listing]:
        listings = list_tree(top)
        for number in range(0, 40, 5):
            (tree / f"{number:02}").write_bytes(b"short")
            (tree / f"{number + 1:02}").write_bytes(b"long" * 10_000)
            os.truncate(tree / f"{number + 2:02}", 0)
            os.truncate(tree / f"{number + 2:02}", 60_000)
        os.link(tree / "03", tree / "second name")
        return listings

    monkeypatch.setattr(volume_copy_in, "list_tree", changed)
    with volume_of(kind, tmp_path) as volume:
        report = volume.copy_in(f"{tree}/", "/")
        assert report.files == 40
        expected = {f"/{number:02}": (tree / f"{number:02}").read_bytes() for number in range(40)}
        assert dict(volume.read_files()) == expected


@pytest.mark.parametrize("kind", ["memory", "ext2"])
@pytest.mark.parametrize("change", ["unlink", "replace"])
def test_a_file_that_went_is_an_error_that_names_it(
    kind: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(10):
        (tree / f"{number}").write_bytes(b"x" * 100)

    def changed(top: bytes) -> list[host_tree.Listing]:
        listings = list_tree(top)
        os.rename(tree / "7", tmp_path / "7")
        if change == "replace":
            (tree / "7").write_bytes(b"another")
        return listings

    monkeypatch.setattr(volume_copy_in, "list_tree", changed)
    with volume_of(kind, tmp_path) as volume:
        with pytest.raises(ODirectError) as failed:
            volume.copy_in(f"{tree}/", "/")
        assert isinstance(failed.value, InUseError if change == "replace" else MissingError)
        assert os.fsdecode(failed.value.filename) == f"{tree}/7"


@pytest.mark.parametrize("kind", ["memory", "ext2"])
def test_some_files_of_a_batch_go_their_own_way(kind: str, tmp_path: Path) -> None:
    """Files with attributes, with holes, and those whose name is taken, among others that go together."""
    tree = tmp_path / "tree"
    for directory in ("", "a", "b"):
        (tree / directory).mkdir()
        for number in range(30):
            path = tree / directory / f"{number:02}"
            path.write_bytes(os.urandom(1 + number * 400))
            if number % 7 == 0:
                os.truncate(path, 0)
                os.truncate(path, 30_000)
            if number % 5 == 1:
                try:
                    os.setxattr(path, "user.key", b"value %d" % number)
                except OSError as error:
                    pytest.skip(f"no extended attributes here: {error}")
    with volume_of(kind, tmp_path) as volume:
        volume.mkdir("/b")
        volume.write_bytes("/b/03", b"old")
        volume.write_bytes("/b/29", b"old")
        volume.copy_in(f"{tree}/", "/")
        found = dict(volume.read_files())
        assert found == {
            f"/{os.path.relpath(path, tree)}": path.read_bytes() for path in tree.rglob("*") if path.is_file()
        }
        for path in tree.rglob("*"):
            expected = {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}
            assert volume.xattrs(f"/{os.path.relpath(path, tree)}") == expected


@pytest.mark.parametrize("kind", ["memory", "ext2"])
@pytest.mark.parametrize("after", [0.0, 0.2, 0.5, 0.8, 0.9])
def test_a_copy_of_many_batches_that_is_stopped_leaves_nothing_behind(
    kind: str, after: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are on their way when it stops: no block of them is lost, and files are whole or not there."""
    monkeypatch.setattr(host_tree, "BATCH_FILES", 8)
    tree = tmp_path / "tree"
    for directory in range(4):
        (tree / f"{directory}").mkdir(parents=True)
        for number in range(25):
            (tree / f"{directory}" / f"{number:02}").write_bytes(os.urandom(100 + number * 700))

    def stop(done: int, whole: int) -> None:
        if done > after * whole:
            raise KeyboardInterrupt

    with volume_of(kind, tmp_path, ("-b", "1024")) as volume:
        with pytest.raises(KeyboardInterrupt):
            volume.copy_in(f"{tree}/", "/", progress=stop)
        found = dict(volume.read_files())
        assert len(found) <= 100
        for path, content in found.items():
            assert content == (tree / path[1:]).read_bytes()
        assert volume.check() == []
        volume.copy_in(f"{tree}/", "/")
        assert len(dict(volume.read_files())) == 100
