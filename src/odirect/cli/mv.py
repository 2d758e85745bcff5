"""`odirect mv`: rename files and directories in a volume."""

from __future__ import annotations

import click

from odirect.cli import common, places
from odirect.cli.sessions import Failures, Volumes, is_same_image, naming


@click.command("mv")
@common.path_argument(nargs=-1, name="sources", metavar="IMAGE:/SOURCE...")
@common.path_argument(name="target", metavar="IMAGE:/TARGET")
@click.option("-n", "--no-clobber", is_flag=True, help="Leave alone what is there under the new name.")
@click.option("-T", "--no-target-directory", "as_file", is_flag=True, help="TARGET is the new name, never a directory.")
def command(sources: tuple[str, ...], target: str, no_clobber: bool, as_file: bool) -> None:
    """Rename files and directories within a volume, or move them into a directory of it.

    What has the new name is replaced, and at every moment one of the two has it. Nothing is moved from one
    volume to another, or to this machine: copy it, and remove it when the copy is good.

    \b
    Examples:
      odirect mv disk.img:/etc/fstab.new disk.img:/etc/fstab
      odirect mv disk.img:/a disk.img:/b disk.img:/some/directory
    """
    found = [_placed(source, target) for source in sources]
    into = _placed(target, sources[0])
    for place in found:
        if not is_same_image(place.image, into.image):
            raise _across(str(place), str(into))
    failures = Failures()
    with Volumes(writing=[into]) as volumes:
        with naming(into):
            volume = volumes.of(into)
            is_directory = not as_file and volume.is_dir(into.path)
        if len(found) > 1 and not is_directory:
            raise click.UsageError(f"{into} is not a directory, and there are several sources")
        for place in found:
            goal = into.below(place.name) if is_directory and place.name else into

            def move(place: places.VolumePlace = place, goal: places.VolumePlace = goal) -> None:
                with naming(place, goal):
                    if no_clobber and volume.exists(goal.path, follow_symlinks=False):
                        return
                    volume.rename(place.path, goal.path)

            failures.collect(move)
    failures.end()


def _placed(text: str, other: str) -> places.VolumePlace:
    if places.parse(text) is None and not text.startswith("./"):
        raise _across(common.shown(text), common.shown(other))
    return places.in_volume(text)


def _across(one: str, other: str) -> click.UsageError:
    return click.UsageError(
        f"{one} and {other} are not in the same volume; copy it (odirect cp -a) and then remove it (odirect rm -r)"
    )
