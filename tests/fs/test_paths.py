"""Paths: the walk, symbolic links, and every answer that Linux gives to what programs do with names."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.volume_kit import (
    KINDS,
    Ours,
    memory_volume,
    needs_counted_directories,
    on_linux,
    perform,
    program,
    tree_of,
    volume_of,
)

from odirect.base.errors import (
    CorruptionError,
    ExistsError,
    MissingError,
    NotDirectoryError,
    ODirectError,
    PathError,
)
from odirect.fs.paths import LONGEST_PATH, MOST_LINKS, checked_name, path_bytes, walk
from odirect.volumes import Volume


@pytest.fixture
def volume() -> Iterator[Volume]:
    """/dir/sub/file, and links."""
    with memory_volume() as volume:
        volume.makedirs("/dir/sub")
        volume.write_bytes("/dir/sub/file", b"x")
        volume.symlink("sub/file", "/dir/relative")
        volume.symlink("/dir/sub", "/dir/absolute")
        volume.symlink("nowhere", "/dir/dangling")
        volume.symlink("ring", "/ring")
        yield volume


def _errno(volume: Volume, path: str, *, follow: bool = True) -> int | None:
    try:
        volume.stat(path, follow_symlinks=follow)
    except ODirectError as error:
        assert error.filename == path
        return error.errno
    return None


@pytest.mark.parametrize(
    "path",
    [
        "/dir/sub/file",
        "dir/sub/file",
        "//dir///sub/./file",
        "/dir/sub/../sub/file",
        "/../../dir/sub/file",
        "/dir/relative",
        "/dir/absolute/file",
        "/dir/absolute/../sub/file",
        b"/dir/sub/file",
        Path("/dir/sub/file"),
    ],
)
def test_ways_to_a_file(volume: Volume, path: str | bytes | Path) -> None:
    """All of these lead to one inode; ".." at the root stays there."""
    assert volume.stat(path).st_ino == volume.stat("/dir/sub/file").st_ino


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("", errno.ENOENT),
        ("/none", errno.ENOENT),
        ("/none/more", errno.ENOENT),
        ("/dir/dangling", errno.ENOENT),
        ("/dir/sub/file/", errno.ENOTDIR),
        ("/dir/sub/file/.", errno.ENOTDIR),
        ("/dir/sub/file/..", errno.ENOTDIR),
        ("/dir/sub/file/more", errno.ENOTDIR),
        ("/dir/relative/", errno.ENOTDIR),
        ("/ring", errno.ELOOP),
        ("/ring/more", errno.ELOOP),
        ("/" + "n" * 256, errno.ENAMETOOLONG),
        ("/dir/sub/file/" + "n" * 256, errno.ENOTDIR),
        ("/" + "n" * 255, errno.ENOENT),
        ("/" + "./" * 2047 + "n", errno.ENAMETOOLONG),
        ("/" + "./" * 2046 + "dir", errno.ENAMETOOLONG),
    ],
)
def test_ways_to_nowhere(volume: Volume, path: str, number: int) -> None:
    """Each with the errno of path_resolution(7), and the path as it was given."""
    assert _errno(volume, path) == number


def test_the_longest_path(volume: Volume) -> None:
    """4095 bytes are one, 4096 are not."""
    path = "/" * (LONGEST_PATH - len("dir")) + "dir"
    assert volume.is_dir(path)
    assert _errno(volume, "/" + path) == errno.ENAMETOOLONG


def test_links_that_are_not_followed(volume: Volume) -> None:
    """lstat shows the link itself, but what stands before a slash is followed."""
    assert volume.lstat("/dir/dangling").st_size == len("nowhere")
    assert volume.lstat("/dir/absolute").st_ino != volume.lstat("/dir/absolute/").st_ino
    assert volume.lstat("/dir/absolute/").st_ino == volume.stat("/dir/sub").st_ino
    assert _errno(volume, "/ring", follow=False) is None


def test_forty_links_are_followed(volume: Volume) -> None:
    """MAXSYMLINKS: the forty-first is ELOOP, wherever in the path the links are."""
    volume.symlink("/dir", "/link0")
    for number in range(1, MOST_LINKS + 1):
        volume.symlink(f"link{number - 1}", f"/link{number}")
    assert volume.is_dir(f"/link{MOST_LINKS - 1}")
    assert _errno(volume, f"/link{MOST_LINKS}") == errno.ELOOP
    assert _errno(volume, f"/link{MOST_LINKS - 1}/absolute") == errno.ELOOP
    assert _errno(volume, f"/link{MOST_LINKS - 2}/absolute/file") is None


def test_links_to_special_places(volume: Volume) -> None:
    """To the root, to ".", to "..", with a slash behind."""
    for target, inode in (("/", 2), (".", 2), ("..", 2), ("dir/", volume.stat("/dir").st_ino), ("dir/..", 2)):
        volume.symlink(target, "/special")
        assert volume.stat("/special").st_ino == inode
        assert volume.stat("/special/").st_ino == inode
        volume.remove("/special")
    volume.symlink("dir/sub/file/", "/special")
    assert _errno(volume, "/special") == errno.ENOTDIR


def test_a_walk_tells_where_something_would_be(volume: Volume) -> None:
    """The directory and the name, also behind a link that leads nowhere yet."""

    def spot(path: bytes, *, follow: bool) -> tuple[int, bytes, bool, bool]:
        found = volume.runner.run(walk(volume.file_system, path, follow=follow))
        return found.directory, found.name, found.attributes is not None, found.slash

    directory = volume.stat("/dir").st_ino
    assert spot(b"/dir/new", follow=True) == (directory, b"new", False, False)
    assert spot(b"/dir/new/", follow=True) == (directory, b"new", False, True)
    assert spot(b"/dir/dangling", follow=True) == (directory, b"nowhere", False, False)
    assert spot(b"/dir/dangling", follow=False) == (directory, b"dangling", True, False)
    assert spot(b"/", follow=False) == (2, b"", True, True)
    assert spot(b"/dir/.", follow=False) == (directory, b".", True, False)


def test_bytes_and_text() -> None:
    """Names that are no UTF-8 are surrogates in text; a null byte is a ValueError."""
    assert path_bytes("a\udcffb") == b"a\xffb"
    with pytest.raises(ValueError, match="null"):
        path_bytes("a\0b")
    with pytest.raises(TypeError):
        path_bytes(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/a", b"a\0"])
def test_a_directory_that_lies(volume: Volume, name: bytes) -> None:
    """A name that would lead elsewhere is a corruption, not a path (F35)."""
    with pytest.raises(CorruptionError, match="name"):
        checked_name(volume.file_system, name)


@pytest.mark.parametrize("path", ["/", "/.", "/..", "/dir/.", "/dir/.."])
def test_what_has_no_name_of_its_own(volume: Volume, path: str) -> None:
    """The root, "." and ".." can be neither made nor moved nor removed; the errors are the kernel's."""
    for call, number in (
        (lambda: volume.mkdir(path), errno.EEXIST),
        (lambda: volume.symlink("x", path), errno.EEXIST),
        (lambda: volume.link("/dir/sub/file", path), errno.EEXIST),
        (lambda: volume.mknod(path), errno.EEXIST),
        (lambda: volume.remove(path), errno.EISDIR),
        (lambda: volume.rename(path, "/new"), errno.EBUSY),
        (lambda: volume.rename("/dir/sub", path), errno.EBUSY),
        (lambda: volume.open(path, "w"), errno.EISDIR),
        (lambda: volume.open(path, "x"), errno.EEXIST),
    ):
        with pytest.raises(ODirectError) as caught:
            call()
        assert caught.value.errno == number
    expected = {"/": errno.EBUSY, "/.": errno.EINVAL, "/dir/.": errno.EINVAL}.get(path, errno.ENOTEMPTY)
    for call in (lambda: volume.rmdir(path), lambda: volume.rmtree(path)):
        with pytest.raises(ODirectError) as caught:
            call()
        assert caught.value.errno == expected


def test_directories_with_all_that_is_above(volume: Volume) -> None:
    """makedirs and mkdir(parents=True)."""
    volume.makedirs("/new/deep/er/")
    assert volume.is_dir("/new/deep/er")
    with pytest.raises(ExistsError):
        volume.makedirs("/new/deep")
    volume.makedirs("/new/deep", exist_ok=True)
    volume.makedirs("/", exist_ok=True)
    volume.mkdir("/new", exist_ok=True)
    with pytest.raises(NotDirectoryError):
        volume.makedirs("/dir/sub/file/more")
    for path in ("/dir/sub/file", "/dir/dangling"):
        with pytest.raises(ExistsError):
            volume.mkdir(path, exist_ok=True)
        with pytest.raises(ExistsError):
            volume.makedirs(path, exist_ok=True)
    with pytest.raises(MissingError):
        volume.mkdir("/none/more")
    with pytest.raises(MissingError):
        volume.makedirs("")


def test_no_tree_is_too_deep(volume: Volume) -> None:
    """rmtree goes by inodes: what is too deep for a path goes too."""
    inode = volume.stat("/dir").st_ino
    for _ in range(3000):
        inode = volume.runner.run(volume.file_system.create(inode, b"deeper", 0o40755))
    volume.symlink("/dir", "/dir/sub/up")
    volume.rmtree("/dir")
    assert not volume.exists("/dir")
    assert volume.check() == []
    with pytest.raises(PathError):
        volume.rmtree("/ring")
    assert volume.is_symlink("/ring")


@pytest.mark.parametrize("seed", range(12))
def test_answers_as_linux_does(scratch: Path, seed: int) -> None:
    """The same program on a mounted directory and in memory: each answer, and the tree at the end (F13)."""
    _compare("memory", scratch, seed, 400)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 104))
def test_ext2_answers_as_linux_does(scratch: Path, seed: int) -> None:
    """The same over ext2."""
    _compare("ext2", scratch, seed, 400)


def _compare(kind: str, scratch: Path, seed: int, length: int) -> None:
    home = scratch / "root"
    home.mkdir()
    needs_counted_directories(home)
    operations = program(seed, length, special_bits=kind == "memory")
    answers, tree = on_linux(home, operations)
    assert sum(isinstance(answer, int) for answer in answers) < length * 0.95
    with volume_of(kind, scratch) as volume:
        ours = Ours(volume)
        for operation, expected in zip(operations, answers, strict=True):
            assert (operation, perform(ours, operation)) == (operation, expected)
        assert tree_of(ours) == tree


def test_kinds_are_all_compared() -> None:
    """Both kinds of volume above are what the kit has."""
    assert KINDS == ("memory", "ext2")
