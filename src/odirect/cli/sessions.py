"""The volumes that one command has open, and how its errors and paths are told."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import click

from odirect.base.errors import ODirectError, from_errno
from odirect.cli import common
from odirect.cli.places import VolumePlace

if TYPE_CHECKING:
    from odirect.volumes import Volume

_Identity = tuple[bool, int, int]
_LONGEST_NAME = 255


class Volumes:
    """Each volume that a command needs, opened once, when it is asked for; a context manager that closes them all.

    writing: the places that will be written: their volumes are opened for writing, whoever asks first.
    """

    def __init__(self, writing: Iterable[VolumePlace] = ()) -> None:
        self._writing = {_identity(place.image) for place in writing}
        self._open: dict[_Identity, Volume] = {}

    def __enter__(self) -> Volumes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed: BaseException | None = None
        while self._open:
            try:
                self._open.popitem()[1].close()
            except ODirectError as closing:
                failed = failed or closing
        if failed is not None and error is None:
            raise failed

    def of(self, place: VolumePlace) -> Volume:
        """The volume of this place. Raises what opening it raises; who else has it is in the message."""
        identity = _identity(place.image)
        volume = self._open.get(identity)
        if volume is None:
            writable = identity in self._writing
            if not writable:
                warn_if_mounted(place.image)
            from odirect.volumes import open_volume

            volume = self._open[identity] = open_volume(place.image, "r+" if writable else "r")
        return volume


def warn_if_mounted(image: str) -> None:
    """Say on standard error if somebody writes to it behind our back: what is read may be half old, half new."""
    from odirect.block.in_use import Use, claims

    for claim in claims(image, exclusive=False):
        if claim.use is Use.MOUNT and ", read-only)" not in claim.detail:
            click.echo(
                f"odirect: {common.shown(image)}: note: {claim.detail}; what is read may be out of date", err=True
            )
            return


def is_same_image(first: str, second: str) -> bool:
    """Whether two paths lead to the same image or device."""
    return _identity(first) == _identity(second)


@contextlib.contextmanager
def naming(place: VolumePlace, other: VolumePlace | None = None) -> Iterator[None]:
    """Errors from inside call the place as the user does: `disk.img:/path`.

    What is wrong with the volume itself keeps the image's path.
    """
    try:
        yield
    except ODirectError as error:
        if error.filename is None or isinstance(error.filename, bytes):
            error.filename = str(place)
            if error.filename2 is not None and other is not None:
                error.filename = f"{place} -> {other}"
        raise


class Failures:
    """Errors of one path of several: told at once, while the others go on; the command ends with the first's status."""

    def __init__(self) -> None:
        self._status = 0

    def collect(self, call: Callable[[], object]) -> bool:
        """Whether `call` went well."""
        try:
            call()
        except ODirectError as error:
            self.tell(error)
            return False
        return True

    def tell(self, error: ODirectError) -> None:
        """Say what went wrong."""
        click.echo(f"odirect: {error}".encode("utf-8", "replace"), err=True)
        self._status = self._status or error.exit_code

    def end(self) -> None:
        """Leave the command with the first error's status, if there was one."""
        if self._status:
            raise click.exceptions.Exit(self._status)


def temporary_beside(path: bytes, is_taken: Callable[[bytes], bool]) -> bytes:
    """A hidden name in the same directory that nothing has."""
    directory, name = os.path.split(path)
    number = 0
    while True:
        ending = b".%d-%d.odirect" % (os.getpid(), number)
        found = os.path.join(directory, b"." + name[: _LONGEST_NAME - 1 - len(ending)] + ending)
        if not is_taken(found):
            return found
        number += 1


def _identity(image: str) -> _Identity:
    """What two paths of the same image or device have in common."""
    try:
        status = os.stat(image)
    except OSError as error:
        raise from_errno(error.errno or 0, "looking at it", image) from error
    if stat.S_ISBLK(status.st_mode):
        return True, status.st_rdev, 0
    return False, status.st_dev, status.st_ino
