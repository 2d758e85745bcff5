"""Paths in volumes: `image:/path`."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from tests.cli.images import image_in, refused
from tests.loops import loop_device, made_image, needs_loop

from odirect.base.errors import DirectoryError, MissingError, UnsupportedError
from odirect.cli import places


@pytest.fixture
def here(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a few images, files and directories, which is the current one."""
    monkeypatch.chdir(scratch)
    for name in ("disk.img", "odd:name.img", "plain:", "both"):
        (scratch / name).write_bytes(b"x")
    for name in ("directory", "deep:/er"):
        (scratch / name).mkdir(parents=True)
    (scratch / "deep:/er/b.img").write_bytes(b"x")
    (scratch / "both:").mkdir()
    (scratch / "both:/there").write_bytes(b"x")
    return scratch


@pytest.mark.parametrize(
    "text,image,path",
    [
        ("disk.img:/etc/passwd", "disk.img", b"/etc/passwd"),
        ("disk.img:/", "disk.img", b"/"),
        ("disk.img:", "disk.img", b"/"),
        ("disk.img:/a:/b", "disk.img", b"/a:/b"),
        ("disk.img:/a:", "disk.img", b"/a:"),
        ("odd:name.img:/x", "odd:name.img", b"/x"),
        ("deep:/er/b.img:/x", "deep:/er/b.img", b"/x"),
        ("directory/../disk.img:/x", "directory/../disk.img", b"/x"),
        ("both:/new", "both", b"/new"),
        ("disk.img:/\udcff", "disk.img", b"/\xff"),
    ],
)
def test_a_path_in_a_volume(text: str, image: str, path: bytes, here: Path) -> None:
    """The last colon before which there is an image counts."""
    assert places.parse(text) == (image, path)
    assert places.in_volume(text) == (image, path)


@pytest.mark.parametrize(
    "text",
    [
        "-",
        "disk.img",
        "plain:",
        "both:/there",
        "./disk.img:/x",
        "new:file",
        "new",
        "deep:/new",
        "deep:/er/new:",
        "a:b/c",
    ],
)
def test_an_ordinary_path(text: str, here: Path) -> None:
    """What exists as it is written is meant, and so is what begins with ./ or has no such colon."""
    assert places.parse(text) is None


def test_what_is_there_cannot_be_a_new_file(here: Path) -> None:
    """A colon at the end names an image, unless there is such a file, or one is to be made."""
    for text in ("new:", "deep:/er/new:"):
        assert places.parse(text) is None
        with pytest.raises(MissingError, match="no image file or block device"):
            places.parse(text, is_there=True)
    for text in ("plain:", "./new:", "new:file", "-"):
        assert places.parse(text, is_there=True) is None
    assert places.parse("disk.img:", is_there=True) == ("disk.img", b"/")


def test_a_relative_path_with_a_colon_means_a_volume_to_verbs_of_volumes(here: Path) -> None:
    assert places.in_volume("./disk.img:/x") == ("./disk.img", b"/x")
    assert places.in_volume("both:/there") == ("both", b"/there")


@pytest.mark.parametrize("find", [places.parse, places.in_volume])
def test_what_is_not_there_is_named(find: object, here: Path) -> None:
    assert callable(find)
    with pytest.raises(MissingError, match=r"no image file or block device missing\.img"):
        find("missing.img:/x")
    with pytest.raises(DirectoryError, match="directory is a directory"):
        find("directory:/x")
    os.mkfifo("pipe")
    with pytest.raises(UnsupportedError, match="pipe is neither"):
        find("pipe:/x")


def test_verbs_of_volumes_say_what_is_missing(here: Path) -> None:
    with pytest.raises(click.UsageError, match=r"write disk\.img:/"):
        places.in_volume("disk.img")
    with pytest.raises(click.UsageError, match="is no path in a volume"):
        places.in_volume("directory")


def test_the_image_itself(here: Path) -> None:
    assert places.image("disk.img") == places.image("disk.img:") == places.image("disk.img:/") == "disk.img"
    assert places.image("plain:") == "plain:"
    with pytest.raises(MissingError):
        places.image("missing.img")
    with pytest.raises(DirectoryError):
        places.image("directory")
    with pytest.raises(UnsupportedError):
        places.image("/dev/null")
    with pytest.raises(click.UsageError, match="name the volume"):
        places.image("disk.img:/x")


def test_a_block_device(scratch: Path) -> None:
    needs_loop()
    with made_image("ext2", directory=scratch) as image, loop_device(image) as device:
        assert places.parse(f"{device}:/x") == (device, b"/x")
        assert places.image(device) == device


def test_names() -> None:
    place = places.VolumePlace("d", b"/a/b/")
    assert place.name == b"b" and place.below(b"c").path == b"/a/b/c" and str(place) == "d:/a/b/"
    root = places.VolumePlace("d", b"/")
    assert root.name == b"" and root.below(b"c").path == b"/c"
    assert places.VolumePlace("d", b"/a/..").name == b""


def test_what_holds_no_volume(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "zeroes").write_bytes(bytes(1 << 20))
    assert "no file system" in refused(capsys, 8, "ls", f"{scratch}/zeroes:/")
    (scratch / "short").write_bytes(b"x")
    assert refused(capsys, 8, "ls", f"{scratch}/short:/").startswith(f"odirect: {scratch}/short")


def test_several_images_in_one_call(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that fails does not keep the others from being shown; its status is the command's."""
    with image_in(scratch) as image:
        assert "missing" in refused(capsys, 2, "ls", f"{scratch}/missing:/", f"{image}:/")
