"""`odirect mkdir`, `rm`, `mv` and `ln`; every image is judged by e2fsck when it is done with."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.images import change, contents, fsck, image_in, odirect, refused, said, told
from tests.loops import loop_device, mounted, needs_loop


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    (scratch / "text").write_bytes(b"text\n")
    with image_in(scratch) as image:
        change(image, "mkdir d", f"write {scratch / 'text'} d/f", f"write {scratch / 'text'} f", "symlink l d")
        yield image


def names(capsys: pytest.CaptureFixture[str], image: Path, path: str = "/") -> list[str]:
    return said(capsys, "ls", f"{image}:{path}").split()


def test_mkdir(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert odirect("mkdir", f"{image}:/new", f"{image}:/d/new/") == 0
    assert "new" in names(capsys, image) and "new" in names(capsys, image, "/d")
    (made,) = told(capsys, "stat", "--json", f"{image}:/new")
    assert made["permissions"] == "0755" and made["kind"] == "directory"
    fsck(image)
    assert "File exists" in refused(capsys, 2, "mkdir", f"{image}:/new")
    assert "No such file" in refused(capsys, 2, "mkdir", f"{image}:/a/b")
    assert "Not a directory" in refused(capsys, 2, "mkdir", f"{image}:/f/b")


def test_mkdir_with_parents_and_mode(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mode is the last one's; what is there will do, but not if it is no directory."""
    assert odirect("mkdir", "-p", "-m", "1700", f"{image}:/a/b/c", f"{image}:/d", f"{image}:/") == 0
    found = {entry["path"]: entry["permissions"] for entry in told(capsys, "ls", "-R", "--json", f"{image}:/")}
    assert (found["/a"], found["/a/b"], found["/a/b/c"], found["/d"]) == ("0755", "0755", "1700", "0755")
    refused(capsys, 2, "mkdir", "-p", f"{image}:/f")
    for mode in ("8", "x", "10000"):
        assert "no mode in octal" in refused(capsys, 2, "mkdir", "-m", mode, f"{image}:/z")


def test_rm(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert odirect("rm", f"{image}:/f", f"{image}:/l") == 0
    assert names(capsys, image) == ["d", "lost+found"]
    assert "-r removes it" in refused(capsys, 2, "rm", f"{image}:/d")
    assert odirect("rm", "-r", f"{image}:/d") == 0
    assert names(capsys, image) == ["lost+found"]
    fsck(image)


def test_rm_of_what_is_not_there(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(capsys, 2, "rm", f"{image}:/x", f"{image}:/f")
    assert "f" not in names(capsys, image)
    assert odirect("rm", "-f", f"{image}:/x", f"{image}:/d/f/x") == 0
    assert capsys.readouterr().err == ""


def test_rm_follows_no_link_and_spares_the_root(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert odirect("rm", "-r", f"{image}:/l") == 0
    assert names(capsys, image, "/d") == ["f"]
    for path in ("", "/", "/d/.", "/d/..", "//"):
        assert "neither the root" in refused(capsys, 2, "rm", "-rf", f"{image}:{path}")
    assert names(capsys, image) == ["d", "f", "lost+found"]


def test_mv(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert odirect("mv", f"{image}:/f", f"{image}:/g") == 0
    assert odirect("mv", f"{image}:/g", f"{image}:/l/f") == 0  # Over what is there, through a link.
    assert odirect("mv", f"{image}:/l", f"{image}:/lost+found", f"{image}:/d") == 0
    assert names(capsys, image) == ["d"] and names(capsys, image, "/d") == ["f", "l", "lost+found"]
    assert contents(image, "/d/f", scratch / "out") == b"text\n"


def test_mv_refuses(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with image_in(scratch) as other:
        for source, target in ((f"{image}:/f", f"{other}:/f"), (f"{image}:/f", scratch / "f"), ("x", f"{image}:/x")):
            said = refused(capsys, 2, "mv", source, target)
            assert "copy it (odirect cp -a)" in " ".join(said.split())
    assert "No such file" in refused(capsys, 2, "mv", f"{image}:/x", f"{image}:/y")
    assert "into itself" in refused(capsys, 2, "mv", f"{image}:/d", f"{image}:/d/e")
    assert "not a directory" in refused(capsys, 2, "mv", f"{image}:/d", f"{image}:/l", f"{image}:/f")
    assert "directory" in refused(capsys, 2, "mv", "-T", f"{image}:/f", f"{image}:/d")
    assert odirect("mv", "-n", f"{image}:/f", f"{image}:/d/f") == 0
    assert names(capsys, image) == ["d", "f", "l", "lost+found"]


def test_ln(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert odirect("ln", f"{image}:/f", f"{image}:/hard") == 0
    assert odirect("ln", f"{image}:/hard", f"{image}:/d/x") == 0
    found = {entry["path"]: entry for entry in told(capsys, "ls", "-R", "--json", f"{image}:/")}
    assert found["/f"]["links"] == 3 and found["/f"]["inode"] == found["/d/x"]["inode"] == found["/hard"]["inode"]
    assert odirect("ln", f"{image}:/f", f"{image}:/d/../lost+found") == 0
    assert names(capsys, image, "/lost+found") == ["f"]
    assert odirect("ln", "-s", "../no where/\udcff", f"{image}:/soft") == 0
    assert "-> ../no\\ where/\\377" in said(capsys, "ls", "-lb", f"{image}:/soft")


def test_ln_replaces_only_when_told_to(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exists" in refused(capsys, 2, "ln", "-s", "x", f"{image}:/f").lower()
    assert odirect("ln", "-sf", "x", f"{image}:/f") == 0
    assert said(capsys, "ls", "-l", f"{image}:/f").endswith("f -> x\n")
    assert odirect("ln", "-f", f"{image}:/d/f", f"{image}:/f") == 0
    assert odirect("ln", "-f", f"{image}:/d/f", f"{image}:/f") == 0  # It is that file already.
    assert told(capsys, "stat", "--json", f"{image}:/f")[0]["links"] == 2
    assert names(capsys, image) == ["d", "f", "l", "lost+found"]
    refused(capsys, 2, "ln", f"{image}:/d", f"{image}:/e")


def test_ln_stays_in_one_volume(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with image_in(scratch) as other:
        assert "not in the same volume" in refused(capsys, 2, "ln", f"{image}:/f", f"{other}:/f")
    assert "is no path in a volume" in refused(capsys, 2, "ln", scratch / "text", f"{image}:/x")


@pytest.mark.parametrize("verb", [["mkdir"], ["rm"], ["cp", "text"]])
def test_who_has_it_locked_is_said(
    verb: list[str], image: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """F34: a volume that somebody else has open is not written, and he is named."""
    monkeypatch.chdir(scratch)
    with open(image, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        message = refused(capsys, 6, *verb, f"{image}:/x")
        assert message.startswith(f"odirect: {image}: ") and "has locked it" in message
        assert odirect("ls", f"{image}:/") == 0  # Readers are welcome beside each other.
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "open there for writing" in refused(capsys, 6, "ls", f"{image}:/")


def test_a_device_that_is_mounted_is_not_written(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F34: nor is the image under it; reading says that it may be out of date."""
    needs_loop()
    with loop_device(image) as device:
        assert odirect("mkdir", f"{device}:/through") == 0
        assert "through" in said(capsys, "ls", f"{device}:/").split()
        with mounted(device, "ext2") as point:
            for path in (device, image):
                assert str(point) in refused(capsys, 6, "mkdir", f"{path}:/x")
            assert odirect("ls", f"{device}:/") == 0
            captured = capsys.readouterr()
            assert "through" in captured.out and "may be out of date" in captured.err
            assert not (point / "x").exists()
        assert os.path.exists(device)


def test_an_unclean_volume_is_read_only(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(image, "set_super_value state 0")
    assert "e2fsck" in refused(capsys, 6, "mkdir", f"{image}:/x")
    assert "f" in names(capsys, image)
    change(image, "set_super_value state 1")
