"""`odirect stat`: all that a volume says of a file."""

from __future__ import annotations

import os
import stat
from typing import Any

import click

from odirect.cli import common, names, places
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import Failures, Volumes, naming
from odirect.fs.base import Attributes, FileKind

# Longer values of extended attributes are cut for people; JSON has them whole.
_SHOWN_BYTES = 64


@click.command("stat")
@common.path_argument(nargs=-1, name="paths", metavar="IMAGE:/PATH...")
@click.option("-L", "--dereference", is_flag=True, help="What a symbolic link leads to, not the link.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list, values of attributes in hexadecimal.")
def command(paths: tuple[str, ...], dereference: bool, as_json: bool) -> None:
    """Say all that a volume says of files: kind, size, owner, times, attributes.

    \b
    Examples:
      odirect stat disk.img:/etc/passwd
      odirect stat -L --json disk.img:/bin/sh
    """
    told: list[dict[str, Any]] = []
    failures = Failures()
    shown = 0
    with Volumes() as volumes:
        for text in paths:

            def look(text: str = text) -> None:
                nonlocal shown
                place = places.in_volume(text)
                with naming(place):
                    found = _gather(volumes, place, follow=dereference)
                if as_json:
                    told.append(found[0])
                else:
                    click.echo("\n".join(([""] if shown else []) + _lines(place, *found)).encode("utf-8", "replace"))
                    shown += 1

            failures.collect(look)
    if as_json:
        common.print_json(told)
    failures.end()


def _gather(
    volumes: Volumes, place: VolumePlace, *, follow: bool
) -> tuple[dict[str, Any], Attributes, bytes | None, dict[bytes, bytes]]:
    """For JSON, the attributes, where a link leads, and the extended attributes."""
    volume = volumes.of(place)
    attributes = volume.attributes(place.path, follow_symlinks=follow)
    target = volume.readlink(place.path) if attributes.kind is FileKind.SYMLINK else None
    xattrs = volume.xattrs(place.path, follow_symlinks=follow)
    told: dict[str, Any] = {**common.told_path(place.image, "image"), **common.told(place.path, "path")}
    told |= names.attributes_as_json(attributes)
    told["block_bytes"] = attributes.block_bytes
    if target is not None:
        told |= common.told(target, "target")
    told["xattrs"] = {common.shown(os.fsdecode(name)): value.hex() for name, value in xattrs.items()}
    # Names that are no UTF-8 may look alike there.
    odd = {name.hex(): value.hex() for name, value in xattrs.items() if "name_hex" in common.told(name)}
    if odd:
        told["xattrs_hex"] = odd
    return told, attributes, target, xattrs


def _lines(
    place: VolumePlace, _told: object, attributes: Attributes, target: bytes | None, xattrs: dict[bytes, bytes]
) -> list[str]:
    what = attributes.kind.value
    if attributes.kind in (FileKind.CHARACTER, FileKind.BLOCK):
        what += f" {os.major(attributes.device_number)}, {os.minor(attributes.device_number)}"
    leads_to = "" if target is None else f" -> {names.for_shell(target)}"
    rows = [
        ["size", common.exact(attributes.size)],
        ["on the device", f"{common.exact(attributes.blocks512 * 512)} in blocks of {attributes.block_bytes}"],
        ["inode", str(attributes.inode)],
        ["links", str(attributes.links)],
        ["mode", f"{stat.filemode(attributes.mode)} ({stat.S_IMODE(attributes.mode):04o})"],
        ["owner", f"user {attributes.uid}, group {attributes.gid}"],
        ["accessed", names.full_time(attributes.atime_ns)],
        ["modified", names.full_time(attributes.mtime_ns)],
        ["changed", names.full_time(attributes.ctime_ns)],
    ]
    for number, (name, value) in enumerate(sorted(xattrs.items())):
        cut = "" if len(value) <= _SHOWN_BYTES else f"... ({len(value)} bytes)"
        shown = names.escaped(value[:_SHOWN_BYTES])
        rows.append(["" if number else "attributes", f"{common.shown(os.fsdecode(name))} = {shown}{cut}"])
    return [f"{place}{leads_to}: {what}", "", *common.columns(rows)]
