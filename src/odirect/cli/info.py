"""`odirect info`: what direct I/O on a file or device demands, and who says so."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from odirect.base.units import format_bytes
from odirect.cli import common, places

if TYPE_CHECKING:
    from odirect.block.device import Limits
    from odirect.block.limits import Alignment

#: Fields of `Limits` as people call them, and whether they are sizes.
_FIGURES = {
    "read_align": ("offset and length of reads", True),
    "write_align": ("offset and length of writes", True),
    "memory_align": ("address of memory", True),
    "logical_block": ("logical block", True),
    "physical_block": ("physical block", True),
    "max_bio_bytes": ("largest transfer at once", True),
    "max_segments": ("runs of memory at once", False),
    "queue_depth": ("requests of the queue", False),
    "fua": ("durable writes without a flush", False),
    "discard": ("discard", False),
    "volatile_cache": ("volatile write cache", False),
    "poll": ("polling for completions", False),
    "atomic_min": ("smallest atomic write", True),
    "atomic_max": ("largest atomic write", True),
    "atomic_max_segments": ("runs of memory of an atomic write", False),
}


@click.command("info")
@common.path_argument()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: str, as_json: bool) -> None:
    """Say what direct I/O on a file or block device demands, each figure with its source.

    IMAGE: is the volume that an image file or block device holds: what it is, how full, whether it is
    clean and whether it can be written. IMAGE:/PATH says so of a file in it, too. Of a volume that cannot be
    opened here it says what is known, and why it cannot; the exit status is that of the refusal.

    \b
    Examples:
      odirect info data.bin
      odirect info --json /dev/nvme0n1
      odirect info disk.img:
    """
    place = places.parse(path, is_there=True)
    if place is not None:
        from odirect.cli import volume_info

        in_volume, refusal = volume_info.gather(place)
        if as_json:
            common.print_json(in_volume)
        else:
            click.echo("\n".join(volume_info.lines(in_volume)).encode("utf-8", "replace"))
        if refusal is not None:
            raise refusal
        return
    found = gather(path)
    if as_json:
        common.print_json(found)
    else:
        click.echo("\n".join(_lines(found)))


def gather(path: str) -> dict[str, Any]:
    """All that is known, ready for JSON. Raises what `alignment` raises."""
    from odirect.block.in_use import claims
    from odirect.block.limits import describe
    from odirect.ring.choose import available

    alignment = describe(path)
    rings = available()
    return {
        **alignment.as_dict(),
        **common.told_path(path),
        **_sizes(path),
        "in_use": [
            {"device": claim.device, "use": claim.use.value, "by": claim.by, "detail": claim.detail}
            for claim in claims(path)
        ],
        "rings": {"io_uring": rings.io_uring, "threads": rings.threads, "why_not": rings.why_not},
    }


def headline(alignment: Alignment) -> str:
    """ "a file on ext4, device vda": what it is and where."""
    words = [place(alignment.kind, alignment.filesystem)]
    if alignment.device:
        words.append(f"device {alignment.device}")
    if alignment.model:
        words.append(alignment.model)
    return ", ".join(words)


def place(kind: str, filesystem: str | None) -> str:
    """ "a file on ext4", or "a block device"."""
    return f"a file on {filesystem or 'an unknown file system'}" if kind == "file" else "a block device"


def support_lines(direct: Mapping[str, Any]) -> list[list[str]]:
    """Rows that say whether reads and writes go direct, and why not."""
    rows = [
        ["direct reads", "yes" if direct["reads"] else "no, through the page cache"],
        ["direct writes", "yes" if direct["writes"] else "no, through the page cache"],
    ]
    if direct["why"]:
        rows.append(["because" if not (direct["reads"] and direct["writes"]) else "note", str(direct["why"])])
    return rows


def figure_rows(limits: Limits | Mapping[str, Any], sources: Mapping[str, str], names: list[str]) -> list[list[str]]:
    """Rows of a figure, its value and its source."""
    rows = []
    for name in names:
        value = limits[name] if isinstance(limits, Mapping) else getattr(limits, name)
        words, is_size = _FIGURES[name]
        rows.append([words, _value(name, value, is_size), f"({sources.get(name, 'default')})"])
    return rows


def _value(name: str, value: object, is_size: bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.startswith("atomic") and not value:
        return "none"
    if name.endswith("_align") and value == 1:
        return "any"
    if is_size and isinstance(value, int) and value >= 1 << 20:
        return format_bytes(value)
    return f"{value} bytes" if is_size else str(value)


def _sizes(path: str) -> dict[str, Any]:
    """Size, what is allocated of it, and what of it is in the page cache (None: the kernel does not tell)."""
    from odirect.block.file_device import file_bytes
    from odirect.ring._calls import cachestat

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        try:
            answer = cachestat(fd, 0, 0)
        except OSError:
            answer = None
        page = os.sysconf("SC_PAGE_SIZE")
        return {
            "size_bytes": file_bytes(fd),
            "allocated_bytes": None if stat.S_ISBLK(status.st_mode) else status.st_blocks * 512,
            "cached_bytes": None if answer is None else answer[0] * page,
            "dirty_bytes": None if answer is None else answer[1] * page,
        }
    finally:
        os.close(fd)


def _lines(found: Mapping[str, Any]) -> list[str]:
    limits, sources = found["limits"], found["sources"]
    what = place(found["kind"], found["filesystem"])
    lines = [f"{found['path']}: {what}, {common.exact(found['size_bytes'])}", ""]
    rows = [["device", " ".join(filter(None, (found["device"], found["model"])))]] if found["device"] else []
    if found["allocated_bytes"] is not None:
        rows.append(["allocated", common.exact(found["allocated_bytes"])])
    if found["cached_bytes"] is not None:
        dirty = f", {common.exact(found['dirty_bytes'])} of it dirty" if found["dirty_bytes"] else ""
        rows.append(["in the page cache", common.exact(found["cached_bytes"]) + dirty])
    rows += support_lines(found["direct"])
    rings = found["rings"]
    rows.append(["io_uring", "yes" if rings["io_uring"] else f"no: {rings['why_not']}"])
    if not found["in_use"]:
        rows.append(["in use", "no"])
    for number, claim in enumerate(found["in_use"]):
        rows.append(["" if number else "in use", claim["detail"]])
    lines += common.columns(rows)
    for title, names in (
        ("Direct transfers must be multiples of", ["read_align", "write_align", "memory_align"]),
        ("The device", [name for name in _FIGURES if not name.endswith("_align")]),
    ):
        lines += ["", f"{title}:", *common.columns(figure_rows(limits, sources, names), right=(1,))]
    return lines
