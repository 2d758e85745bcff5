"""`odirect cat`: write files to standard output."""

from __future__ import annotations

import errno
import os
import select
from typing import Literal

import click

from odirect.base.errors import from_errno
from odirect.cli import common, places
from odirect.cli.sessions import Volumes
from odirect.cli.standard import STDIN, STDOUT

_PIECE_BYTES = 1 << 20


@click.command("cat")
@common.path_argument(nargs=-1, name="files", metavar="FILE...")
@click.option("--offset", type=common.Size(), default=0, metavar="SIZE", help="Begin at this byte. [0]")
@click.option("--length", type=common.Size(), metavar="SIZE", help="Write no more than this. [to the end]")
@click.option("--strict", is_flag=True, help="Fail instead of going through the page cache.")
def command(files: tuple[str, ...], offset: int, length: int | None, strict: bool) -> None:
    """Write files or block devices to standard output, past the page cache.

    IMAGE:/PATH is a file in the volume that an image file or block device holds; - is standard input.
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
            place = places.parse(path, is_there=True)
            if path == common.STDIO:
                if strict:
                    raise click.UsageError("--strict is for files and devices; standard input comes as it does")
                _pass_on(offset, length)
            elif place is not None:
                from odirect.cli.volume_cat import write_out

                write_out(volumes, place, offset=offset, length=length, access=access)
            else:
                from odirect.copying import copy_out

                copy_out(path, STDOUT, offset=offset, length=length, access=access)


def _pass_on(offset: int, length: int | None) -> None:
    """Write bytes [offset, offset + length) of standard input to standard output, each piece when it is there."""
    from odirect.cli.volume_cat import write_full
    from odirect.sched.interrupts import Interrupts

    left = length
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with Interrupts() as interrupts:
        while left is None or left > 0:
            wanted = offset or left or _PIECE_BYTES
            interrupts.wait_for(STDIN, select.POLLIN)
            try:
                count = os.readv(STDIN, [buffer[:wanted]])
            except BlockingIOError:
                continue  # Somebody else reads it, too, and was quicker.
            except OSError as error:
                raise from_errno(error.errno or errno.EIO, "reading the stream", common.STDIO) from error
            if not count:
                return
            if offset:
                offset -= count
                continue
            interrupts.allowed(lambda view=buffer[:count]: write_full(view))  # type: ignore[misc]
            left = None if left is None else left - count
