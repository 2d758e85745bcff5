"""`odirect info` of a volume: what it is, how full, and whether it can be written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from odirect.cli import common, info, names
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import Volumes, naming

if TYPE_CHECKING:
    from odirect.volumes import Volume

_ALIGNMENTS = ("read_align", "write_align", "memory_align")


def gather(place: VolumePlace) -> dict[str, Any]:
    """All that is known of the volume, and of what is at `place` if that is not the root, ready for JSON."""
    from odirect.block.in_use import claims
    from odirect.block.limits import describe

    used = claims(place.image)
    with Volumes() as volumes:
        volume = volumes.of(place)
        space = volume.statfs()
        facts = _ext2_facts(volume)
        # What it is opened for says nothing: this is whether it could be written, and then whether others let us.
        why_not = str(facts.pop("write_refusal", "")) or next((claim.detail for claim in used), "")
        support = describe(place.image).support
        found: dict[str, Any] = {
            "image": common.shown(place.image),
            "kind": volume.kind,
            "uuid": volume.uuid,
            "label": common.shown(volume.label),
            "size_bytes": space.f_blocks * space.f_frsize,
            "block_bytes": volume.block_bytes,
            "blocks": space.f_blocks,
            "free_blocks": space.f_bfree,
            "available_blocks": space.f_bavail,
            "files": space.f_files,
            "free_files": space.f_ffree,
            "name_bytes": space.f_namemax,
            "features": list(volume.features),
            **facts,
            "writable": not why_not,
            "why_not_writable": why_not,
            "direct": {
                "reads": support.reads and volume.is_direct,
                "writes": support.writes and volume.is_direct,
                "why": support.why or ("" if volume.is_direct else "its blocks are smaller than what the device takes"),
            },
            "limits": {name: getattr(volume.limits, name) for name in _ALIGNMENTS},
            "sources": {name: volume.limits.sources.get(name, "default") for name in _ALIGNMENTS},
            "in_use": [
                {"device": claim.device, "use": claim.use.value, "by": claim.by, "detail": claim.detail}
                for claim in used
            ],
        }
        if place.path.strip(b"/"):
            with naming(place):
                attributes = volume.attributes(place.path)
            found["file"] = {**names.told(place.path, "path"), **names.attributes_as_json(attributes)}
    return found


def _ext2_facts(volume: Volume) -> dict[str, Any]:
    """What an ext2 volume knows of itself beyond what all have."""
    from odirect.fs.ext2.format import State
    from odirect.fs.ext2.volume import Ext2

    file_system = volume.file_system
    if not isinstance(file_system, Ext2):
        return {}
    geometry = file_system.geometry
    superblock = geometry.superblock
    return {
        "clean": bool(superblock.state & State.CLEAN) and not superblock.state & State.ERRORS,
        "revision": superblock.rev_level,
        "groups": geometry.groups,
        "blocks_per_group": geometry.blocks_per_group,
        "inodes_per_group": geometry.inodes_per_group,
        "inode_bytes": geometry.inode_bytes,
        "reserved_blocks": superblock.r_blocks_count,
        "mounts": superblock.mnt_count,
        "last_written_s": superblock.wtime,
        "last_checked_s": superblock.lastcheck,
        "write_refusal": geometry.write_refusal() or "",
    }


def lines(found: dict[str, Any]) -> list[str]:
    """As people read it."""
    block = found["block_bytes"]
    used = found["blocks"] - found["free_blocks"]
    rows = [
        ["label", found["label"] or "none"],
        ["uuid", found["uuid"]],
        ["blocks", f"{found['blocks']} of {block} bytes"],
        ["used", f"{common.exact(used * block)}, {_percent(used, found['blocks'])}"],
        ["free", f"{common.exact(found['free_blocks'] * block)}{_kept(found)}"],
        ["inodes", f"{found['files']}, {found['free_files']} of them free"],
    ]
    if "groups" in found:
        rows += [
            [
                "groups",
                f"{found['groups']}, of {found['blocks_per_group']} blocks and {found['inodes_per_group']} inodes of "
                f"{found['inode_bytes']} bytes",
            ],
            ["revision", str(found["revision"])],
            ["written last", names.full_time(found["last_written_s"] * 1_000_000_000)],
            ["checked last", names.full_time(found["last_checked_s"] * 1_000_000_000)],
            ["clean", "yes" if found["clean"] else "no"],
        ]
    rows += [
        ["features", ", ".join(found["features"]) or "none"],
        ["writable", "yes" if found["writable"] else f"no: {found['why_not_writable']}"],
        *info.support_lines(found["direct"]),
    ]
    if not found["in_use"]:
        rows.append(["in use", "no"])
    for number, claim in enumerate(found["in_use"]):
        rows.append(["" if number else "in use", claim["detail"]])
    told = [
        f"{found['image']}: {'an' if found['kind'][0] in 'aeio' else 'a'} {found['kind']} volume, "
        f"{common.exact(found['size_bytes'])}",
        "",
        *common.columns(rows),
        "",
        "Direct transfers must be multiples of:",
        *common.columns(info.figure_rows(found["limits"], found["sources"], list(_ALIGNMENTS)), right=(1,)),
    ]
    file = found.get("file")
    if file is not None:
        shown = names.for_shell(os.fsencode(file["path"]))
        told += ["", f"{shown}: {file['kind']}, {common.exact(file['size'])}, inode {file['inode']}"]
    return told


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0%"


def _kept(found: dict[str, Any]) -> str:
    kept = found["free_blocks"] - found["available_blocks"]
    return f", {common.exact(kept * found['block_bytes'])} of it kept for root" if kept > 0 else ""
