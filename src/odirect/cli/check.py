"""`odirect check`: what is wrong with a volume, found by a walk that only reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from odirect.base.errors import CorruptionError
from odirect.cli import common, places
from odirect.cli.sessions import warn_if_mounted

if TYPE_CHECKING:
    from odirect.fs.base import Finding

_SHOWN_FINDINGS = 100


@click.command("check")
@common.path_argument(name="image", metavar="IMAGE")
@click.option("--all", "all_findings", is_flag=True, help=f"List every finding, not just the first {_SHOWN_FINDINGS}.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, image: str, all_findings: bool, as_json: bool) -> None:
    """Look for what is wrong with the volume in IMAGE, an image file or block device. Nothing is written.

    Exit status: 0 if it is clean, 7 if something was found. What mends it is said with each finding.

    \b
    Examples:
      odirect check disk.img
      odirect check --json /dev/sdb1
    """
    from odirect.cli.volume_info import family
    from odirect.volumes import open_volume

    image = places.image(image)
    warn_if_mounted(image)
    about = ""
    try:
        with open_volume(image) as volume:
            about = family(volume.file_system)
            found = [_as_told(finding) for finding in volume.check()]
    except CorruptionError as error:
        # So bad that it cannot be gone on from there.
        found = [{"structure": "", "addr": None, "found": error.message, "expected": "", "repaired_by": ""}]
    if as_json:
        common.print_json({**common.told_path(image, "image"), "kind": about, "clean": not found, "findings": found})
    else:
        lines = _lines(image, about, found, len(found) if all_findings else _SHOWN_FINDINGS)
        click.echo("\n".join(lines).encode("utf-8", "replace"))
    if found:
        ctx.exit(CorruptionError.exit_code)


def _as_told(finding: Finding) -> dict[str, Any]:
    return finding._asdict()


def _lines(image: str, about: str, found: list[dict[str, Any]], most: int) -> list[str]:
    shown = common.shown(image)
    if not found:
        return [f"{shown}: {about}, clean"]
    lines = [f"{shown}: {f'{about}, ' if about else ''}{len(found)} finding{'s' * (len(found) != 1)}:"]
    for finding in found[:most]:
        where = "" if finding["addr"] is None else f" at byte {finding['addr']}"
        before = f"{finding['structure']}{where}: " if finding["structure"] else ""
        expected = f", expected {finding['expected']}" if finding["expected"] else ""
        lines.append(f"  {before}{'found ' if before else ''}{finding['found']}{expected}")
    if len(found) > most:
        lines.append(f"  ... and {len(found) - most} more (--all shows them)")
    mended = sorted({finding["repaired_by"] for finding in found if finding["repaired_by"]})
    lines += [f"{repair} mends it." for repair in mended]
    return lines
