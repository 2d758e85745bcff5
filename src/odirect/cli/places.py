"""Paths on the command line: of this machine, or in a volume (`image:/path`).

In `disk.img:/etc/passwd` the part before the colon names an existing image file or block device, and the
rest a path in the volume that it holds, from the volume's root on. `disk.img:` alone is the root.

    which colon        the last one that is followed by a slash (or by nothing) and has an existing file or
                       block device before it: `disk.img:/odd:/name` is found, and so is `a:/b.img:/name`
    ordinary paths     a path that exists as it is written is one, and so is every path that begins with `./`:
                       `./disk.img:/x` is a file in a directory of this machine called `disk.img:`
    verbs of volumes   those that work in volumes only (ls, rm, ...) take every path as one in a volume
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

import click

from odirect.base.errors import DirectoryError, MissingError, UnsupportedError, from_errno
from odirect.cli import common

_HERE = "./"


class VolumePlace(NamedTuple):
    """A path in a volume. image: the path of its image or device; path: from the volume's root on, with a slash."""

    image: str
    path: bytes

    def __str__(self) -> str:
        return common.shown(self.exact)

    @property
    def exact(self) -> str:
        """The path as it would be on a command line: bytes that are no UTF-8 as Python has them there."""
        return f"{self.image}:{os.fsdecode(self.path)}"

    @property
    def name(self) -> bytes:
        """The last component; b"" for the root, and for what is no name: "." and ".."."""
        last = self.path.rstrip(b"/").rpartition(b"/")[2]
        return b"" if last in (b".", b"..") else last

    def below(self, name: bytes) -> VolumePlace:
        """What has this name in the directory that this is."""
        return self._replace(path=self.path.rstrip(b"/") + b"/" + name)


def parse(text: str, *, is_there: bool = False) -> VolumePlace | None:
    """The path in a volume that `text` means, or None if it is an ordinary path, `-` included.

    is_there: it is not to be made, so that nobody can mean a new file by `missing.img:`.
    Raises MissingError, saying what was not found, for what can be neither.
    """
    if text == common.STDIO or text.startswith(_HERE) or ":" not in text or os.path.lexists(text):
        return None
    found = _split(text)
    if found is None:
        is_lost = ":/" in text and not os.path.isdir(os.path.dirname(text))
        if is_lost or (is_there and text.endswith(":") and _before_colons(text)):
            raise _nothing(text)
    return found


def in_volume(text: str) -> VolumePlace:
    """The path in a volume that `text` means, for verbs that know no other.

    Raises UsageError if it has no colon, MissingError if there is no such image.
    """
    found = _split(text)
    if found is None:
        if not _before_colons(text):
            like = f"{text}:/" if os.path.isfile(text) else "disk.img:/some/path"
            raise click.UsageError(f"{common.shown(text)} is no path in a volume; write {common.shown(like)}")
        raise _nothing(text)
    return found


def image(text: str) -> str:
    """The image file or block device that `text` names, for verbs that take a whole volume: `disk.img`, `disk.img:`.

    Raises MissingError, DirectoryError, and UnsupportedError for what cannot hold a volume.
    """
    found = None if os.path.lexists(text) else _split(text)
    if found is not None:
        if found.path != b"/":
            raise click.UsageError(f"{common.shown(text)} is a path in a volume; name the volume: {found.image}")
        text = found.image
    try:
        mode = os.stat(text).st_mode
    except FileNotFoundError:
        raise MissingError("there is no such file or block device", path=text) from None
    except OSError as error:
        raise from_errno(error.errno or 0, "looking at it", text) from error
    if stat.S_ISDIR(mode):
        raise DirectoryError("it is a directory; an image file or block device was expected", path=text)
    if not _can_hold(mode):
        raise UnsupportedError("it is neither a file nor a block device, so it holds no volume", path=text)
    return text


def _split(text: str) -> VolumePlace | None:
    """The last way to read `text` as a path in what exists."""
    for before, after in _before_colons(text):
        try:
            mode = os.stat(before).st_mode
        except OSError:
            continue
        if _can_hold(mode):
            return VolumePlace(before, os.fsencode(after) or b"/")
    return None


def _before_colons(text: str) -> list[tuple[str, str]]:
    """What is before and after each colon that is followed by a slash, or ends the text; the last first."""
    found = []
    at = len(text)
    while (at := text.rfind(":", 0, at)) > 0:
        after = text[at + 1 :]
        if not after or after.startswith("/"):
            found.append((text[:at], after))
    return found


def _can_hold(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _nothing(text: str) -> MissingError | DirectoryError | UnsupportedError:
    """What is wrong with a path whose part before the colon is no image."""
    before, after = _before_colons(text)[0]
    shown = common.shown(before)
    if not after:
        text = before
    if os.path.isdir(before):
        return DirectoryError(f"{shown} is a directory; an image file or block device was expected", path=text)
    if os.path.exists(before):
        return UnsupportedError(f"{shown} is neither a file nor a block device, so it holds no volume", path=text)
    return MissingError(f"there is no image file or block device {shown}", path=text)
