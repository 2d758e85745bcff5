"""`odirect rm`: remove files and directories in a volume."""

from __future__ import annotations

import errno

import click

from odirect.base.errors import DirectoryError, MissingError, NotDirectoryError, PathError
from odirect.cli import common, places
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import Failures, Volumes, naming


@click.command("rm")
@common.path_argument(nargs=-1, name="paths", metavar="IMAGE:/PATH...")
@click.option("-r", "-R", "--recursive", is_flag=True, help="Directories, with all that is in them.")
@click.option("-f", "--force", is_flag=True, help="What is not there is no error.")
def command(paths: tuple[str, ...], recursive: bool, force: bool) -> None:
    """Remove files, and with -r directories, in a volume. Symbolic links are removed, not followed.

    \b
    Examples:
      odirect rm disk.img:/etc/machine-id
      odirect rm -rf disk.img:/var/log disk.img:/tmp/build
    """
    failures = Failures()
    wanted = [places.in_volume(text) for text in paths]
    with Volumes(writing=wanted) as volumes:
        for place in wanted:
            failures.collect(lambda place=place: _remove(volumes, place, recursive=recursive, force=force))  # type: ignore[misc]
    failures.end()


def _remove(volumes: Volumes, place: VolumePlace, *, recursive: bool, force: bool) -> None:
    with naming(place):
        volume = volumes.of(place)
        if not place.name:
            raise PathError("neither the root nor . nor .. is removed", errno=errno.EINVAL)
        try:
            is_directory = volume.attributes(place.path.rstrip(b"/"), follow_symlinks=False).kind == "directory"
            if not is_directory:
                volume.remove(place.path)
            elif recursive:
                volume.rmtree(place.path)
            else:
                raise DirectoryError("it is a directory; -r removes it with all that is in it")
        except (MissingError, NotDirectoryError):
            if not force:
                raise
