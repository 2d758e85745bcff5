"""`odirect cat`: write files to standard output."""

from __future__ import annotations

from typing import Literal

import click

from odirect.cli import common, places
from odirect.cli.sessions import Volumes

_STDOUT = 1


@click.command("cat")
@common.path_argument(nargs=-1, name="files", metavar="FILE...")
@click.option("--offset", type=common.Size(), default=0, metavar="SIZE", help="Begin at this byte. [0]")
@click.option("--length", type=common.Size(), metavar="SIZE", help="Write no more than this. [to the end]")
@click.option("--strict", is_flag=True, help="Fail instead of going through the page cache.")
def command(files: tuple[str, ...], offset: int, length: int | None, strict: bool) -> None:
    """Write files or block devices to standard output, past the page cache.

    IMAGE:/PATH is a file in the volume that an image file or block device holds.
    Offset and length hold for each file, and need not be aligned. What lies past the end is left out.

    \b
    Examples:
      odirect cat image.raw | zstd > image.zst
      odirect cat --offset 1M --length 4k /dev/sdb | xxd
      odirect cat disk.img:/etc/fstab
    """
    access: Literal["auto", "strict"] = "strict" if strict else "auto"
    with Volumes() as volumes:
        for path in files:
            place = places.parse(path)
            if place is not None:
                from odirect.cli.volume_cat import write_out

                write_out(volumes, place, offset=offset, length=length, access=access)
            else:
                from odirect.copying import copy_out

                copy_out(path, _STDOUT, offset=offset, length=length, access=access)
