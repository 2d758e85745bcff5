"""What `odirect bench` has to see to where the file is in a volume."""

from __future__ import annotations

import click

from odirect.base.units import format_bytes
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import Volumes, naming

# How much is written at once where a file is made.
_PIECE_BYTES = 4 << 20


def check_options(place: VolumePlace, engine: str, jobs: int, *, writes: bool) -> None:
    """Raise UsageError for what cannot be in a volume."""
    if engine == "asyncio":
        raise click.UsageError(
            f"{place} is in a volume, which --engine asyncio does not know; use batch, submit or sync"
        )
    if writes and jobs > 1:
        raise click.UsageError("one process alone may write to a volume; use --iodepth instead of --jobs")


def prepared(place: VolumePlace, rw: str, size: int | None, start: int, *, overwrite: bool) -> int:
    """The bytes from `start` on that are ours to use, made where there were none.

    Raises UsageError if data would be overwritten unasked, or the range lies past the end.
    """
    writes = rw.endswith("write")
    with Volumes(writing=[place] if writes else []) as volumes, naming(place):
        volume = volumes.of(place)
        if writes:
            there = volume.stat(place.path).st_size if volume.exists(place.path) else 0
            if there and not overwrite:
                raise click.UsageError(
                    f"{place} holds {format_bytes(there)} of data, which would be overwritten; "
                    "say --overwrite-data if you mean it"
                )
            if size is None and not there:
                raise click.UsageError(f"{place} is empty or not there; --size says how long to make it")
            if size is not None and start + size > there:
                _grow(volumes, place, there, start + size)
        with volume.open(place.path) as file:
            found = file.size - start
    if found <= 0:
        raise click.UsageError(f"{place} has {found + start} bytes; there is nothing at offset {start}")
    if size is not None and size > found:
        raise click.UsageError(f"{place} has {found + start} bytes, fewer than --offset and --size need")
    return found if size is None else size


def _grow(volumes: Volumes, place: VolumePlace, there: int, size: int) -> None:
    """Write zeroes up to `size`: blocks for holes are not allocated by direct writes, which are measured."""
    from odirect.block.buffers import empty

    volume = volumes.of(place)
    is_new = not volume.exists(place.path)
    try:
        with volume.open(place.path, "x" if is_new else "r+") as file:
            zeroes = empty(_PIECE_BYTES)
            for offset in range(there, size, _PIECE_BYTES):
                file.pwrite(zeroes[: min(_PIECE_BYTES, size - offset)], offset)
    except BaseException:
        if is_new:
            volume.remove(place.path)
        raise


def notes(place: VolumePlace, rw: str) -> list[str]:
    """What makes the figures mean less than they seem to."""
    with Volumes() as volumes, naming(place):
        status = volumes.of(place).stat(place.path)
    allocated = status.st_blocks * 512
    if allocated >= status.st_size:
        return []
    what = "written through the cache" if rw.endswith("write") else "read without it"
    return [
        f"Only {format_bytes(allocated)} of the file's {format_bytes(status.st_size)} are on the device: "
        f"holes are {what}."
    ]
