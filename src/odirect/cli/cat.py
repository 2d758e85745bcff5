"""`odirect cat`: write files to standard output."""

from __future__ import annotations

from typing import Literal

import click

from odirect.cli import common

_STDOUT = 1


@click.command("cat")
@common.path_argument(nargs=-1, name="files", metavar="FILE...")
@click.option("--offset", type=common.Size(), default=0, metavar="SIZE", help="Begin at this byte. [0]")
@click.option("--length", type=common.Size(), metavar="SIZE", help="Write no more than this. [to the end]")
@click.option("--strict", is_flag=True, help="Fail instead of going through the page cache.")
def command(files: tuple[str, ...], offset: int, length: int | None, strict: bool) -> None:
    """Write files or block devices to standard output, past the page cache.

    Offset and length hold for each file, and need not be aligned. What lies past the end is left out.

    \b
    Examples:
      odirect cat image.raw | zstd > image.zst
      odirect cat --offset 1M --length 4k /dev/sdb | xxd
    """
    from odirect.copying import copy_out

    access: Literal["auto", "strict"] = "strict" if strict else "auto"
    for path in files:
        copy_out(path, _STDOUT, offset=offset, length=length, access=access)
