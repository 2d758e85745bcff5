"""`odirect mkdir`: make directories in a volume."""

from __future__ import annotations

import click

from odirect.cli import common, places
from odirect.cli.options import Permissions
from odirect.cli.sessions import Failures, Volumes, naming

_USUAL = 0o755


@click.command("mkdir")
@common.path_argument(nargs=-1, name="paths", metavar="IMAGE:/PATH...")
@click.option("-p", "--parents", is_flag=True, help="Also those above it that are missing; one that is there will do.")
@click.option("-m", "--mode", type=Permissions(), metavar="MODE", help="Permissions in octal.  [default: 755]")
def command(paths: tuple[str, ...], parents: bool, mode: int | None) -> None:
    """Make directories in a volume.

    \b
    Examples:
      odirect mkdir disk.img:/data
      odirect mkdir -p -m 700 disk.img:/data/me/.ssh
    """
    failures = Failures()
    wanted = [places.in_volume(text) for text in paths]
    with Volumes(writing=wanted) as volumes:
        for place in wanted:

            def make(place: places.VolumePlace = place) -> None:
                with naming(place):
                    volume = volumes.of(place)
                    if not parents:
                        volume.mkdir(place.path, _USUAL if mode is None else mode)
                        return
                    if volume.is_dir(place.path):
                        return
                    # As mkdir -p has it: the mode is the last one's alone.
                    above = place.path.rstrip(b"/").rpartition(b"/")[0]
                    if above:
                        volume.mkdir(above, _USUAL, parents=True, exist_ok=True)
                    volume.mkdir(place.path, _USUAL if mode is None else mode, exist_ok=True)

            failures.collect(make)
    failures.end()
