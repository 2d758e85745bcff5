"""`odirect info` of a volume: what it is, how full, and whether it can be written."""

from __future__ import annotations

import enum
import os
import uuid
from typing import TYPE_CHECKING, Any

from odirect.base.errors import UnsupportedError
from odirect.base.units import align_up
from odirect.cli import common, info, names
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import Volumes, naming

if TYPE_CHECKING:
    from odirect.fs.base import FileSystem
    from odirect.fs.ext2.format import Superblock
    from odirect.volumes import Volume

_ALIGNMENTS = ("read_align", "write_align", "memory_align")
# Blocks of 64 KiB: no relation of ext2's has larger ones.
_LARGEST_LOG = 6
# Features that e2fsprogs calls otherwise than the format does.
_FEATURE_NAMES = {
    "extents": "extent",
    "sixtyfour_bit": "64bit",
    "recover": "needs_recovery",
    "gdt_csum": "uninit_bg",
    "csum_seed": "metadata_csum_seed",
    "largedir": "large_dir",
    "readonly": "read-only",
}


def gather(place: VolumePlace) -> tuple[dict[str, Any], UnsupportedError | None]:
    """All that is known of the volume, and of what is at `place` if that is not the root, ready for JSON.

    With it, why the volume cannot be opened, for one that is of our family and cannot.
    """
    from odirect.block.in_use import claims
    from odirect.block.limits import describe

    used = claims(place.image)
    with Volumes() as volumes:
        try:
            volume = volumes.of(place)
        except UnsupportedError as refusal:
            known = _known_of_refused(place)
            if known is None:
                raise
            why_unreadable, is_direct, limits = refusal.message, True, describe(place.image).limits
        else:
            known, why_unreadable, is_direct, limits = _known(volume), "", volume.is_direct, volume.limits
        # What it is opened for says nothing: this is whether it could be written, and then whether others let us.
        why_not = why_unreadable or known.pop("write_refusal", "") or next((claim.detail for claim in used), "")
        support = describe(place.image).support
        found: dict[str, Any] = {
            **common.told_path(place.image, "image"),
            **known,
            "readable": not why_unreadable,
            "why_not_readable": why_unreadable,
            "writable": not why_not,
            "why_not_writable": why_not,
            "direct": {
                "reads": support.reads and is_direct,
                "writes": support.writes and is_direct,
                "why": support.why or ("" if is_direct else "its blocks are smaller than what the device takes"),
            },
            "limits": {name: getattr(limits, name) for name in _ALIGNMENTS},
            "sources": {name: limits.sources.get(name, "default") for name in _ALIGNMENTS},
            "in_use": [
                {"device": claim.device, "use": claim.use.value, "by": claim.by, "detail": claim.detail}
                for claim in used
            ],
        }
        if why_unreadable:
            return found, UnsupportedError(why_unreadable, path=place.image)
        if place.path.strip(b"/"):
            with naming(place):
                attributes = volume.attributes(place.path)
            found["file"] = {**common.told(place.path, "path"), **names.attributes_as_json(attributes)}
    return found, None


def family(file_system: FileSystem) -> str:
    """What a file system is called: one of ext2's family by its features, as `blkid` does, any other by its kind."""
    from odirect.fs.ext2.volume import Ext2

    return _family(file_system.geometry.superblock) if isinstance(file_system, Ext2) else file_system.kind


def _family(superblock: Superblock) -> str:
    from odirect.fs.ext2.format import Compat, Incompat, ReadOnlyCompat

    ours = Incompat.FILETYPE | Incompat.RECOVER | Incompat.META_BG
    plain = ReadOnlyCompat.SPARSE_SUPER | ReadOnlyCompat.LARGE_FILE | ReadOnlyCompat.BTREE_DIR
    if superblock.feature_incompat & ~int(ours) or superblock.feature_ro_compat & ~int(plain):
        return "ext4"
    return "ext3" if superblock.feature_compat & Compat.HAS_JOURNAL else "ext2"


def _known(volume: Volume) -> dict[str, Any]:
    """What an open volume knows of itself."""
    from odirect.fs.ext2.volume import Ext2

    space = volume.statfs()
    found: dict[str, Any] = {
        "kind": family(volume.file_system),
        "uuid": volume.uuid,
        **common.told_path(volume.label, "label"),
        "size_bytes": space.f_blocks * space.f_frsize,
        "block_bytes": volume.block_bytes,
        "blocks": space.f_blocks,
        "free_blocks": space.f_bfree,
        "available_blocks": space.f_bavail,
        "files": space.f_files,
        "free_files": space.f_ffree,
        "name_bytes": space.f_namemax,
        "features": list(volume.features),
    }
    file_system = volume.file_system
    if isinstance(file_system, Ext2):
        geometry = file_system.geometry
        found |= {
            # Not statfs's, which leaves out what the file system itself takes.
            "size_bytes": geometry.blocks_count * geometry.block_bytes,
            "blocks": geometry.blocks_count,
            **_history(geometry.superblock),
            "groups": geometry.groups,
            "inode_bytes": geometry.inode_bytes,
            "write_refusal": geometry.write_refusal() or "",
        }
    return found


def _known_of_refused(place: VolumePlace) -> dict[str, Any] | None:
    """What the superblock says of a volume of ext2's family that cannot be opened; None for what has none."""
    from odirect.base.layout import Place
    from odirect.block.bio import READ
    from odirect.block.buffers import empty
    from odirect.dio.blockdev import transfer
    from odirect.fs.ext2 import format
    from odirect.sched.drive_sync import SyncDriver
    from odirect.volume_opening import open_image

    image = open_image(place.image, writable=False)
    try:
        memory = empty(align_up(format.SUPERBLOCK_ADDR + format.SUPERBLOCK_BYTES, image.align_bytes))
        count = SyncDriver(image.scheduler).run(transfer(image.device, READ, 0, [memory], len(memory)))
    finally:
        image.close()
    if count < format.SUPERBLOCK_ADDR + format.SUPERBLOCK_BYTES:
        return None
    where = Place(place.image, "superblock", format.SUPERBLOCK_ADDR)
    found = format.SUPERBLOCK.read(memory, format.SUPERBLOCK_ADDR, where)
    if found.magic != format.MAGIC or found.log_block_size > _LARGEST_LOG:
        return None
    block_bytes = 1024 << found.log_block_size
    wide = bool(found.feature_incompat & format.Incompat.SIXTYFOUR_BIT)
    blocks, free, reserved = (
        low + (high << 32 if wide else 0)
        for low, high in (
            (found.blocks_count, found.blocks_count_hi),
            (found.free_blocks_count, found.free_blocks_hi),
            (found.r_blocks_count, found.r_blocks_count_hi),
        )
    )
    kinds: tuple[tuple[int, type[enum.IntFlag]], ...] = (
        (found.feature_compat, format.Compat),
        (found.feature_incompat, format.Incompat),
        (found.feature_ro_compat, format.ReadOnlyCompat),
    )
    features = [flag.name.lower() for bits, kind in kinds for flag in kind if bits & flag and flag.name]
    return {
        "kind": _family(found),
        "uuid": str(uuid.UUID(bytes=found.uuid)),
        **common.told(found.volume_name.partition(b"\0")[0], "label"),
        "size_bytes": blocks * block_bytes,
        "block_bytes": block_bytes,
        "blocks": blocks,
        "free_blocks": free,
        "available_blocks": max(0, free - reserved),
        "files": found.inodes_count,
        "free_files": found.free_inodes_count,
        "name_bytes": format.NAME_BYTES,
        "features": [_FEATURE_NAMES.get(name, name) for name in features],
        **_history(found),
        "reserved_blocks": reserved,
        "groups": -(-(blocks - found.first_data_block) // max(1, found.blocks_per_group)),
        "inode_bytes": found.inode_size if found.rev_level >= format.REV_DYNAMIC else format.GOOD_OLD_INODE_BYTES,
    }


def _history(superblock: Superblock) -> dict[str, Any]:
    """What a superblock says beyond what all volumes have."""
    from odirect.fs.ext2.format import State

    return {
        "clean": bool(superblock.state & State.CLEAN) and not superblock.state & State.ERRORS,
        "revision": superblock.rev_level,
        "blocks_per_group": superblock.blocks_per_group,
        "inodes_per_group": superblock.inodes_per_group,
        "reserved_blocks": superblock.r_blocks_count,
        "mounts": superblock.mnt_count,
        "last_written_s": superblock.wtime,
        "last_checked_s": superblock.lastcheck,
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
        ["readable", "yes" if found["readable"] else f"no: {found['why_not_readable']}"],
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
