"""`odirect ls`: list directories in a volume."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from odirect.cli import common, names, places
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import Failures, Volumes, naming
from odirect.fs.base import FileKind

if TYPE_CHECKING:
    from odirect.fs.base import Attributes
    from odirect.volumes import Volume


class _Listed(NamedTuple):
    """Something that is listed. label: its path as the user has it; attributes: None where nobody needs them."""

    name: bytes
    label: bytes
    place: VolumePlace
    inode: int
    attributes: Attributes | None
    is_directory: bool


@click.command("ls")
@common.path_argument(nargs=-1, name="paths", metavar="IMAGE:/PATH...")
@click.option("-l", "long", is_flag=True, help="Mode, links, owner, size and time of each; owners as numbers.")
@click.option("-a", "--all", "hidden", is_flag=True, help="Names that begin with a dot, too.")
@click.option("-R", "--recursive", is_flag=True, help="And what is in the directories.")
@click.option("-d", "--directory", "itself", is_flag=True, help="Directories themselves, not what is in them.")
@click.option("-1", "single", is_flag=True, help="One name on each line, also on a terminal.")
@click.option("-b", "--escape", "escape", is_flag=True, help="What cannot be shown in names as C has it: \\n, \\377.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list, with all that -l has and more.")
def command(
    paths: tuple[str, ...],
    long: bool,
    hidden: bool,
    recursive: bool,
    itself: bool,
    single: bool,
    escape: bool,
    as_json: bool,
) -> None:
    """List what is in a volume's directories, sorted by the bytes of the names.

    IMAGE:/PATH is a path in the volume that an image file or a block device holds; IMAGE: is its root.
    Nothing is mounted and nothing is written. Names go out as they are, but on a terminal, where what
    cannot be shown is quoted for a shell. -l shows symbolic links, not what they lead to.

    \b
    Examples:
      odirect ls disk.img:/
      odirect ls -l disk.img:/etc /dev/sdb1:/home
      odirect ls -Ra --json disk.img:
    """
    listing = _Listing(long, hidden, recursive, as_json, _shower(escape), None if single else _terminal_width())
    failures = Failures()
    with Volumes() as volumes:
        found: list[_Listed] = []
        for text in paths:

            def look(text: str = text) -> None:
                place = places.in_volume(text)
                with naming(place):
                    found.append(listing.look_up(volumes.of(place), text, place, itself=itself))

            failures.collect(look)
        inside = [each for each in found if each.is_directory and not itself]
        listing.show([each for each in found if each not in inside], None, volumes)
        for each in sorted(inside, key=lambda each: each.name):
            listing.directory(volumes, each, failures, headed=recursive or len(paths) > 1)
    if as_json:
        common.print_json(listing.told)
    failures.end()


class _Listing:
    """How things are shown, and what has been."""

    def __init__(
        self,
        long: bool,
        hidden: bool,
        recursive: bool,
        as_json: bool,
        shower: Callable[[bytes], bytes],
        width: int | None,
    ) -> None:
        self.told: list[dict[str, Any]] = []
        self._long = long
        self._hidden = hidden
        self._recursive = recursive
        self._as_json = as_json
        self._shower = shower
        self._width = width
        self._now_s = time.time()
        self._begun = False

    def look_up(self, volume: Volume, text: str, place: VolumePlace, *, itself: bool) -> _Listed:
        """What a path of the command line is; a link to a directory is one, unless it is to be shown itself."""
        attributes = volume.attributes(place.path, follow_symlinks=False)
        is_directory = attributes.kind is FileKind.DIRECTORY
        if attributes.kind is FileKind.SYMLINK and not (self._long or itself):
            is_directory = volume.is_dir(place.path)
        name = os.fsencode(text + "/" if text.endswith(":") else text)
        return _Listed(name, name, place, attributes.inode, attributes, is_directory)

    def directory(self, volumes: Volumes, top: _Listed, failures: Failures, *, headed: bool) -> None:
        """Show what is in a directory, and in those below it if that is asked for."""
        waiting = [top]
        while waiting:
            directory = waiting.pop()

            def show(directory: _Listed = directory) -> None:
                with naming(directory.place):
                    entries = self._entries(volumes.of(directory.place), directory)
                    self.show(entries, directory.label if headed else None, volumes, total=self._long)
                if self._recursive:
                    waiting.extend(reversed([entry for entry in entries if entry.is_directory]))

            failures.collect(show)

    def show(self, entries: list[_Listed], heading: bytes | None, volumes: Volumes, *, total: bool = False) -> None:
        """Print the names, or keep them for JSON."""
        if self._as_json:
            self.told += [self._as_told(entry, volumes) for entry in entries]
            return
        lines = self._lines(entries, volumes)
        if total:
            used = sum(entry.attributes.blocks512 for entry in entries if entry.attributes is not None)
            lines.insert(0, b"total %d" % -(-used // 2))
        if heading is not None:
            lines.insert(0, self._shower(heading) + b":")
            if self._begun:
                lines.insert(0, b"")
        for line in lines:
            click.echo(line)
        self._begun = self._begun or bool(lines)

    def _entries(self, volume: Volume, directory: _Listed) -> list[_Listed]:
        entries = sorted(volume.scandir(directory.place.path), key=lambda entry: entry.name)
        entries = [entry for entry in entries if self._hidden or not entry.name.startswith(b".")]
        known: list[Attributes | None] = [None] * len(entries)
        if self._long or self._as_json:

            async def ask() -> list[Attributes | None]:
                return [await volume.file_system.attributes(entry.inode()) for entry in entries]

            # By number: by name, each would be looked for in the whole directory.
            known = volume.run(ask(), directory.place.path)
        before = directory.label.rstrip(b"/") + b"/"
        return [
            _Listed(
                entry.name,
                before + entry.name,
                directory.place.below(entry.name),
                entry.inode(),
                attributes,
                self._recursive and entry.is_dir(follow_symlinks=False),
            )
            for entry, attributes in zip(entries, known, strict=True)
        ]

    def _lines(self, entries: list[_Listed], volumes: Volumes) -> list[bytes]:
        shown = [os.fsdecode(self._shower(entry.name)) for entry in entries]
        if not self._long:
            lines = shown if self._width is None or not shown else names.in_columns(shown, self._width)
        else:
            rows = []
            for entry, name in zip(entries, shown, strict=True):
                if entry.attributes is not None:
                    target = self._target(entry, volumes)
                    leads_to = None if target is None else os.fsdecode(self._shower(target))
                    rows.append(names.long_row(entry.attributes, name, leads_to, self._now_s))
            lines = names.aligned(rows)
        return [os.fsencode(line) for line in lines]

    def _target(self, entry: _Listed, volumes: Volumes) -> bytes | None:
        if entry.attributes is None or entry.attributes.kind is not FileKind.SYMLINK:
            return None
        volume = volumes.of(entry.place)
        return volume.run(volume.file_system.read_link(entry.inode), entry.place.path)

    def _as_told(self, entry: _Listed, volumes: Volumes) -> dict[str, Any]:
        told: dict[str, Any] = {
            **common.told_path(entry.place.image, "image"),
            **common.told(entry.place.path, "path"),
            **common.told(entry.place.name),
        }
        if entry.attributes is not None:
            told |= names.attributes_as_json(entry.attributes)
            target = self._target(entry, volumes)
            if target is not None:
                told |= common.told(target, "target")
        return told


def _terminal_width() -> int | None:
    """Columns of the terminal that is written to; None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _shower(escape: bool) -> Callable[[bytes], bytes]:
    """What is done to a name before it is printed."""
    if escape:
        return lambda name: names.escaped(name).encode()
    if sys.stdout.isatty():
        return lambda name: names.for_shell(name).encode()
    return lambda name: name
