"""`VolumePath`: the names of pathlib, inside a volume."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from tests.volume_kit import KINDS, memory_volume, volume_of

from odirect.base.errors import DirectoryError, ExistsError, MissingError, NotDirectoryError, PathError
from odirect.volume_path import VolumePath
from odirect.volumes import Volume


@pytest.fixture(params=KINDS)
def volume(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Volume]:
    """A volume with a small tree, of each kind."""
    with volume_of(request.param, scratch) as volume:
        volume.makedirs("/dir/sub/deep")
        volume.write_bytes("/dir/one.txt", b"one")
        volume.write_bytes("/dir/sub/two.txt", b"two")
        volume.write_bytes("/dir/sub/three.tar.gz", b"three")
        volume.symlink("sub", "/dir/link")
        volume.symlink("nowhere", "/dir/dangling")
        yield volume


@pytest.fixture
def memory() -> Iterator[Volume]:
    with memory_volume() as volume:
        yield volume


@pytest.mark.parametrize(
    "text",
    ["/", "/a", "/a/b.txt", "/a/b.tar.gz", "/a/.hidden", "/a/.hidden.txt", "/a/..", "/a/../b", "/a//b/./c/"],
)
def test_names_are_those_of_pathlib(memory: Volume, text: str) -> None:
    """Every part of a path is what PurePosixPath says."""
    ours, theirs = memory / text, PurePosixPath(text)
    for name in ("name", "stem", "suffix", "suffixes", "parts"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert str(ours) == str(theirs) and bytes(ours) == bytes(theirs) and ours.as_posix() == theirs.as_posix()
    assert str(ours.parent) == str(theirs.parent)
    assert [str(path) for path in ours.parents] == [str(path) for path in theirs.parents]
    assert str(ours / "x") == str(theirs / "x") and str(ours / "/x/y") == "/x/y"
    assert str(ours.joinpath("x", b"y", Path("z"))) == str(theirs / "x/y/z")
    if ours.name and ours.name != "..":
        assert str(ours.with_name("new")) == str(theirs.with_name("new"))
        assert str(ours.with_suffix(".new")) == str(theirs.with_suffix(".new"))
        assert str(ours.with_suffix("")) == str(theirs.with_suffix(""))
        assert str(ours.with_stem("new")) == str(theirs.with_stem("new"))
    for pattern in ("*", "*.txt", "a/*", "/a/*", "/*") if ours.name else ():
        assert ours.match(pattern) == theirs.match(pattern)


def test_what_makes_no_path(memory: Volume) -> None:
    """ValueError, as in pathlib."""
    root = memory.root
    for call in (
        lambda: root.with_name("x"),
        lambda: (root / "a").with_name(""),
        lambda: (root / "a").with_name("b/c"),
        lambda: (root / "a").with_suffix("x"),
        lambda: (root / "a").with_suffix("./x"),
        lambda: (root / "a").with_suffix("."),
        lambda: (root / "a").relative_to(root / "b"),
        lambda: (root / "a").match(""),
        lambda: list(root.glob("")),
        lambda: list(root.glob("/a")),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(TypeError):
        os.fspath(root)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        root / 3  # type: ignore[operator]


def test_equal_and_in_order(memory: Volume) -> None:
    """Paths of one volume compare; those of another are others."""
    assert memory / "a" / "b" == memory / "/a//b/" and hash(memory / "a/b") == hash(memory / "a" / "b")
    assert sorted([memory / "b", memory / "a" / "z", memory / "a"]) == [memory / "a", memory / "a/z", memory / "b"]
    assert memory / "a" != "/a" and memory / "a" != memory / "b"
    assert repr(memory / "a") == "VolumePath('/a')"
    with memory_volume() as other:
        assert other / "a" != memory / "a"
        assert not (memory / "a").is_relative_to(other.root) and not (memory / "a").samefile(other / "a")
        with pytest.raises(TypeError):
            assert memory / "a" < other / "b"
        with pytest.raises(ValueError):
            (memory / "a").relative_to(other.root)
    assert (memory / "a/b").relative_to(memory / "a") == PurePosixPath("b")
    assert (memory / "a").relative_to(memory / "a") == PurePosixPath()
    assert (memory / "a/b").is_relative_to(memory / "a") and not (memory / "a").is_relative_to(memory / "a/b")


def test_looking(volume: Volume) -> None:
    """exists, is_dir and the like, stat, lstat, iterdir, readlink, samefile, walk."""
    top = volume / "dir"
    assert top.is_dir() and not top.is_file() and top.exists() and not top.is_symlink() and not top.is_mount()
    assert volume.root.is_mount()
    assert (top / "one.txt").is_file() and (top / "link").is_dir() and (top / "link").is_symlink()
    assert not (top / "dangling").exists() and (top / "dangling").exists(follow_symlinks=False)
    assert not (top / "none").exists()
    assert sorted(path.name for path in top.iterdir()) == ["dangling", "link", "one.txt", "sub"]
    assert (top / "link").readlink() == "sub"
    assert (top / "link").lstat().st_size == 3 and (top / "one.txt").stat().st_size == 3
    assert (top / "link/two.txt").samefile(top / "sub/two.txt")
    assert next(str(place) for place, _, _ in top.walk()) == "/dir"
    assert {str(place) for place, _, _ in top.walk(top_down=False)} == {"/dir", "/dir/sub", "/dir/sub/deep"}
    with pytest.raises(NotDirectoryError):
        list((top / "one.txt").iterdir())
    with pytest.raises(MissingError) as caught:
        (top / "none").stat()
    assert caught.value.filename == "/dir/none"


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.txt",
        "*/*.txt",
        "**/*.txt",
        "sub/*",
        "sub/deep",
        "none",
        "*/none",
        "**",
        "**/*",
        "[ot]*",
        "s?b",
        "**/",
        "*/",
        "link/*",
        "*.txt/*",
        "**/sub/**",
        "sub/../one.txt",
    ],
)
def test_glob_finds_what_pathlib_finds(volume: Volume, scratch: Path, pattern: str) -> None:
    """The same tree on the host, the same patterns."""
    if pattern.rstrip("/").endswith("**") and sys.version_info >= (3, 13):
        pytest.skip("pathlib finds files by it, too, since 3.13")
    volume.copy_out("/dir", scratch / "dir")
    host = scratch / "dir"
    theirs = sorted(str(path.relative_to(scratch)) for path in host.glob(pattern))
    found = list((volume / "dir").glob(pattern))
    assert sorted(str(path)[1:] for path in found) == theirs
    assert len(found) == len(set(found))
    ours = sorted(str(path)[1:] for path in (volume / "dir").rglob(pattern))
    assert ours == sorted({str(path.relative_to(scratch)) for path in host.rglob(pattern)})


def test_files(volume: Volume) -> None:
    """Text and bytes, whole and through open, which gives what the built-in one does."""
    path = volume / "dir" / "text"
    assert path.write_text("grüße\n") == 6 and path.read_text() == "grüße\n"
    assert path.read_bytes() == "grüße\n".encode() and path.write_bytes(b"\xff") == 1
    assert path.read_text("latin-1") == "ÿ"
    with pytest.raises(UnicodeDecodeError):
        path.read_text()
    with pytest.raises(TypeError):
        path.write_text(b"bytes")  # type: ignore[arg-type]
    with path.open("w") as text:
        assert isinstance(text, io.TextIOWrapper)
        text.write("one\ntwo\n")
    with path.open() as text:
        assert list(text) == ["one\n", "two\n"]
    with path.open("rt", newline="\n") as text:
        assert text.readline() == "one\n"
    for mode, kind in (("rb", io.BufferedReader), ("r+b", io.BufferedRandom), ("ab", io.BufferedWriter)):
        with path.open(mode) as buffered:
            assert isinstance(buffered, kind)
    with path.open("rb", 0, access="buffered") as raw:
        assert isinstance(raw, io.RawIOBase) and raw.read() == b"one\ntwo\n"
    for mode, buffering, encoding in (("r", 0, None), ("rb", -1, "utf-8"), ("q", -1, None)):
        with pytest.raises(ValueError):
            path.open(mode, buffering, encoding)
    with pytest.raises(LookupError):
        path.open("r", encoding="no such encoding")
    with pytest.raises(DirectoryError):
        (volume / "dir").open()


def test_changing(volume: Volume) -> None:
    """mkdir, touch, rename, links, chmod, unlink, rmdir."""
    top = volume / "new" / "deep"
    with pytest.raises(MissingError):
        top.mkdir()
    top.mkdir(parents=True)
    top.mkdir(exist_ok=True)
    with pytest.raises(ExistsError):
        top.mkdir()
    file = top / "file"
    file.touch(0o600)
    assert file.stat().st_mode & 0o777 == 0o600 and file.read_bytes() == b""
    volume.utime(file, (1, 1))
    file.touch()
    assert file.stat().st_mtime > 1
    with pytest.raises(ExistsError):
        file.touch(exist_ok=False)
    with pytest.raises(MissingError):
        (top / "none" / "file").touch()
    moved = file.rename(top / "moved")
    assert moved == top / "moved" and moved.exists() and not file.exists()
    assert moved.replace("/new/again") == volume / "new/again"
    again = volume / "new" / "again"
    (top / "hard").hardlink_to(again)
    assert again.stat().st_nlink == 2 and (top / "hard").samefile(again)
    (top / "soft").symlink_to("../again")
    (top / "absolute").symlink_to(again)
    assert (top / "soft").samefile(again) and (top / "absolute").readlink() == "/new/again"
    again.chmod(0o640)
    assert (top / "hard").stat().st_mode & 0o777 == 0o640
    with pytest.raises(PathError) as caught:
        top.rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    for path in list(top.iterdir()):
        path.unlink()
    (top / "gone").unlink(missing_ok=True)
    with pytest.raises(MissingError):
        (top / "gone").unlink()
    top.rmdir()
    assert [path.name for path in (volume / "new").iterdir()] == ["again"]


def test_what_has_no_bytes(volume: Volume) -> None:
    """Fifos, sockets and devices are told apart, also through links; what is missing is none of them."""
    kinds = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "block_device": stat.S_IFBLK, "char_device": stat.S_IFCHR}
    for name, mode in kinds.items():
        volume.mknod(volume / name, mode | 0o600, os.makedev(1, 3))
        (volume / f"{name}-link").symlink_to(name)
        for path in (volume / name, volume / f"{name}-link"):
            assert [other for other in kinds if getattr(path, f"is_{other}")()] == [name]
            assert not path.is_file() and not path.is_dir()
    assert not any(getattr(volume / "none", f"is_{other}")() for other in kinds)


def test_resolve(volume: Volume) -> None:
    """Links and ".." go; what is missing stays as it is written."""
    top = volume / "dir"
    volume.symlink("/dir/link/deep", "/far")
    assert (volume / "far").resolve() == volume / "dir/sub/deep"
    assert (volume / "far/../two.txt").resolve() == volume / "dir/sub/two.txt"
    assert (top / "link/none/more").resolve() == top / "sub/none/more"
    assert (volume / "../..").resolve() == volume.root
    assert (top / "dangling").resolve() == top / "nowhere"
    with pytest.raises(MissingError):
        (top / "dangling").resolve(strict=True)
    volume.symlink("ring", "/ring")
    with pytest.raises(PathError) as caught:
        (volume / "ring").resolve()
    assert caught.value.errno == errno.ELOOP


def test_names_that_are_no_utf8(volume: Volume) -> None:
    """They are text by os.fsdecode, and come back as the same bytes."""
    name = b"n\xff\xfeame"
    path = volume / name
    path.write_bytes(b"x")
    assert path.name == os.fsdecode(name) and bytes(path) == b"/" + name
    assert volume.listdir(b"/")[-1] == name
    assert [found for found in volume.root.iterdir() if found.name == os.fsdecode(name)] == [path]
    assert list(volume.root.glob("n*ame")) == [path]
    path.unlink()


def test_paths_are_taken_where_paths_are(volume: Volume, scratch: Path) -> None:
    """The volume's own methods take them, also for copies."""
    top = volume / "dir"
    assert volume.listdir(top) == volume.listdir("/dir")
    assert volume.stat(top / "one.txt").st_size == 3
    volume.copy_out(top, scratch / "out")
    volume.copy_in(scratch / "out", top / "copy")
    assert (top / "copy" / "sub" / "two.txt").read_text() == "two"
    assert isinstance(top, VolumePath)


# --- beyond the names ------------------------------------------------------------------------------

_OTHERS = ("/", "/a", "/a/b", "/a/b/c.txt", "/a/c", "/b", "/ab")


@pytest.mark.parametrize("text", _OTHERS)
def test_seen_from_other_paths_as_in_pathlib(memory: Volume, text: str) -> None:
    """relative_to and is_relative_to take text, pathlib's paths and ours, and say what PurePosixPath says."""
    ours, theirs = memory / text, PurePosixPath(text)
    for other in _OTHERS:
        seen: list[object] = []
        for form in (other, os.fsencode(other), Path(other), memory / other):
            try:
                seen.append(ours.relative_to(form))
                assert ours.is_relative_to(form)
            except ValueError:
                seen.append(None)
                assert not ours.is_relative_to(form)
        expected = theirs.relative_to(other) if theirs.is_relative_to(other) else None
        assert seen == [expected] * 4
    assert not ours.is_relative_to("a") and ours.is_relative_to("/", ".")
    with pytest.raises(ValueError):
        ours.relative_to("a")
    assert PurePosixPath("/", *ours.relative_to("/x/y", walk_up=True).parts[2:]) == theirs
    assert str((memory / "a/b").relative_to("/a/c", walk_up=True)) == "../b"
    with pytest.raises(ValueError, match=r"'\.\.'"):
        ours.relative_to("/x/..", walk_up=True)
    assert (ours.anchor, ours.root, ours.drive) == (theirs.anchor, theirs.root, theirs.drive)
    assert ours.is_absolute() and ours.absolute() == ours and not ours.is_reserved()
    assert ours.with_segments("/x", "y") == memory / "x/y"


def test_paths_as_segments_and_in_order(memory: Volume) -> None:
    """A path of the volume may stand behind another, and all comparisons are there."""
    a, b = memory / "a", memory / "b"
    assert a / b == b and memory / memory.root == memory.root and memory / a == a and a.joinpath("x", b) == b
    assert a < b and a <= b and a <= a and b > a and b >= a and b >= b and not a >= b and not b <= a
    with memory_volume() as other:
        with pytest.raises(ValueError, match="another volume"):
            a / (other / "b")
        for compare in (lambda: a <= other / "b", lambda: a >= other / "b", lambda: a > other / "b", lambda: a <= "/b"):  # type: ignore[operator]
            with pytest.raises(TypeError):
                compare()
    for wrong in (
        lambda: a.match(None),  # type: ignore[arg-type]
        lambda: a.match(b"a"),  # type: ignore[arg-type]
        lambda: a.with_suffix(True),  # type: ignore[arg-type]
        lambda: a.with_name(None),  # type: ignore[arg-type]
        lambda: a.with_stem(b"x"),  # type: ignore[arg-type]
        lambda: a.relative_to(None),  # type: ignore[arg-type]
        lambda: a.is_relative_to(3),  # type: ignore[arg-type]
        lambda: memory.root.samefile(None),  # type: ignore[arg-type]
        lambda: list(a.glob(None)),  # type: ignore[arg-type]
        lambda: a.rglob(None),  # type: ignore[arg-type]
        lambda: a / None,  # type: ignore[operator]
    ):
        with pytest.raises(TypeError):
            wrong()


def test_other_paths_in_calls(volume: Volume) -> None:
    """samefile takes text; a symbolic link may be made to a path; owner and group are names."""
    assert (volume / "dir/one.txt").samefile("/dir/one.txt") and not (volume / "dir").samefile(b"/dir/sub")
    volume.symlink(volume / "dir/one.txt", volume / "by_path")
    (volume / "from_path").symlink_to(volume / "dir/sub")
    assert volume.readlink("/by_path") == "/dir/one.txt" and volume.readlink("/from_path") == "/dir/sub"
    with memory_volume() as other, pytest.raises(ValueError, match="another volume"):
        volume.symlink(other / "x", "/y")
    volume.chown("/dir/one.txt", 0, 0)
    assert ((volume / "dir/one.txt").owner(), (volume / "dir/one.txt").group()) == ("root", "root")
    volume.chown("/dir/one.txt", 3999999999, 3999999998)
    with pytest.raises(KeyError):
        (volume / "dir/one.txt").owner()
    with pytest.raises(KeyError):
        (volume / "dir/one.txt").group()
