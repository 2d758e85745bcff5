"""`odirect ln`: make links in a volume."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from odirect.cli import common, places
from odirect.cli.sessions import Volumes, is_same_image, naming, temporary_beside

if TYPE_CHECKING:
    from odirect.volumes import Volume


@click.command("ln")
@common.path_argument(name="source", metavar="TARGET")
@common.path_argument(name="link", metavar="IMAGE:/LINK")
@click.option("-s", "--symbolic", is_flag=True, help="A symbolic link: TARGET is its text, as it is.")
@click.option("-f", "--force", is_flag=True, help="Replace what has the name, if it is no directory.")
def command(source: str, link: str, symbolic: bool, force: bool) -> None:
    """Give a file in a volume another name, or make a symbolic link.

    Without -s TARGET is a path in the same volume, and no directory. With -s it is kept as it is written
    and need not be there; one that begins with a slash leads to the root of the volume.
    Where LINK is a directory, the link is made in it, under TARGET's name.

    \b
    Examples:
      odirect ln disk.img:/boot/vmlinuz-6.1 disk.img:/boot/vmlinuz
      odirect ln -s ../usr/bin/python3 disk.img:/bin/python
    """
    place = places.in_volume(link)
    old: places.VolumePlace | None = None
    if not symbolic:
        old = places.in_volume(source)
        if not is_same_image(old.image, place.image):
            raise click.UsageError(f"{old} and {place} are not in the same volume, and one file is in one volume")
    with Volumes(writing=[place]) as volumes, naming(place):
        volume = volumes.of(place)
        if volume.is_dir(place.path):
            name = os.fsencode(os.path.basename(source.rstrip("/"))) if old is None else old.name
            if name:
                place = place.below(name)
        with naming(place):
            if not force or not volume.exists(place.path, follow_symlinks=False):
                _make(volume, old, source, place.path)
                return
            # Under another name first, so that the name is never without a file.
            if volume.is_dir(place.path, follow_symlinks=False):
                _make(volume, old, source, place.path)  # It says that the name is taken.
            if old is not None and os.path.samestat(volume.lstat(old.path), volume.lstat(place.path)):
                return
            beside = temporary_beside(place.path, lambda path: volume.exists(path, follow_symlinks=False))
            _make(volume, old, source, beside)
            volume.rename(beside, place.path)


def _make(volume: Volume, old: places.VolumePlace | None, text: str, path: bytes) -> None:
    """A name for `old`, or without it a symbolic link with this text."""
    if old is None:
        volume.symlink(os.fsencode(text), path)
    else:
        volume.link(old.path, path)
