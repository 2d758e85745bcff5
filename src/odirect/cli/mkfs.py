"""`odirect mkfs`: make a volume in an image file or on a block device, and fill it from a directory."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from odirect.base.errors import ExistsError, NoSpaceError, from_errno
from odirect.base.units import MIB, align_down, align_up, format_bytes
from odirect.cli import common
from odirect.cli.options import Uuid
from odirect.sched.interrupts import Interrupts

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.block.device import BlockDevice
    from odirect.fs.ext2.format import Superblock
    from odirect.fs.ext2.mkfs import Plan
    from odirect.host_tree import Listing
    from odirect.volume_copy import TreeReport

# Boot sectors, partition tables and superblocks of all that is known lie in the first, those of RAID in the last.
_FIRST_BYTES, _LAST_BYTES = 128 << 10, 64 << 10
_LABEL_BYTES = 16
# What an estimate leaves free, and by how much it is raised when it was too low after all.
_ROOM, _RAISE, _MOST_TRIES = 1.1, 1.25, 6
_LEAST_INODE_RATIO = 1024


@click.command("mkfs")
@click.argument("kind", metavar="ext2", type=click.Choice(["ext2"]))
@common.path_argument(name="image", metavar="IMAGE")
@click.option(
    "--size",
    type=common.Size(least=1),
    metavar="SIZE",
    help="How large.  [default: the file or device as it is; with --from, what that takes]",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=str),
    metavar="DIR",
    help="Copy what is in this directory into it, with owners, times and links.",
)
@click.option("--label", default="", metavar="TEXT", help=f"Its name, at most {_LABEL_BYTES} bytes.")
@click.option(
    "--block-size",
    type=common.Size(),
    metavar="SIZE",
    help="1k, 2k or 4k.  [default: 1k below 512 MiB, else 4k]",
)
@click.option("--inode-size", type=common.Size(), metavar="SIZE", help="128 or 256.  [default: 256]")
@click.option("--uuid", "identity", type=Uuid(), metavar="UUID", help="Its identity.  [default: a new one]")
@click.option("--force", is_flag=True, help="Although something is on it, which is lost. Never what is in use.")
@click.option("--progress/--quiet", "-p/-q", "progress", default=None, help="Show progress, or nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    kind: str,
    image: str,
    size: int | None,
    source: str | None,
    label: str,
    block_size: int | None,
    inode_size: int | None,
    identity: uuid.UUID | None,
    force: bool,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Make an ext2 volume in IMAGE, a file that is made or a block device, and fill it.

    Neither root nor a mount is needed. What looks like a file system, or like any data, is only overwritten
    with --force; what is mounted, looped or open elsewhere never is. If it fails, a file that was made
    is removed.

    \b
    Examples:
      odirect mkfs ext2 disk.img --size 1G --label data
      odirect mkfs ext2 rootfs.img --from build/rootfs
      odirect mkfs ext2 /dev/sdb1
    """
    encoded = os.fsencode(label)
    if len(encoded) > _LABEL_BYTES:
        raise click.UsageError(f"the label {common.shown(label)} has {len(encoded)} bytes; at most {_LABEL_BYTES} fit")
    if source is not None and not os.path.isdir(source):
        raise click.UsageError(f"{common.shown(source)} is not a directory")
    wanted = _Wanted(encoded, block_size, inode_size, identity or uuid.uuid4())
    there = _status(image)
    if source is not None and size is None and (there is None or not (stat.S_ISBLK(there.st_mode) or there.st_size)):
        made = _made_to_fit(image, source, wanted, there, progress)
    else:
        made = _made(image, size, source, wanted, there, progress, force=force)
    if as_json:
        common.print_json(_as_told(image, made, wanted))
    elif progress is not False:
        for line in _lines(image, made, wanted):
            click.echo(line.encode("utf-8", "replace"))


class _Wanted(NamedTuple):
    """What was asked for of the volume."""

    label: bytes
    block_bytes: int | None
    inode_bytes: int | None
    identity: uuid.UUID


class _Made(NamedTuple):
    """What there is now."""

    superblock: Superblock
    size_bytes: int
    filled: TreeReport | None


def _status(image: str) -> os.stat_result | None:
    try:
        return os.stat(image)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_errno(error.errno or errno.EIO, "looking at it", image) from error


def _made(
    image: str,
    size: int | None,
    source: str | None,
    wanted: _Wanted,
    there: os.stat_result | None,
    progress: bool | None,
    *,
    force: bool,
) -> _Made:
    """The volume, of this size or of the device's."""
    is_new = there is None or (stat.S_ISREG(there.st_mode) and not there.st_size)
    if is_new and size is None:
        raise click.UsageError(f"{common.shown(image)} is to be made; --size says how large")
    with _room(image, size, there):
        return _make_and_fill(image, size, source, wanted, progress, blank=is_new, force=force)


def _made_to_fit(
    image: str, source: str, wanted: _Wanted, there: os.stat_result | None, progress: bool | None
) -> _Made:
    """A new volume that is large enough for what is in `source`."""
    listings = _listed(source)
    needs = _Needs.of(listings, xattrs=True)
    size = needs.size(wanted)
    for turn in range(_MOST_TRIES):
        try:
            with _room(image, size, there):
                return _make_and_fill(
                    image, size, source, wanted, progress, blank=True, force=False, needs=needs, listings=listings
                )
        except NoSpaceError:
            # The host's own disk may be full; then a larger image is no help, and neither is the last try's.
            if turn == _MOST_TRIES - 1 or _is_full(image):
                raise
            size = align_up(int(size * _RAISE), MIB)
            there = _status(image)
    raise NoSpaceError("no size was large enough", path=image)


def _is_full(image: str) -> bool:
    free = os.statvfs(os.path.dirname(os.path.abspath(image)))
    return free.f_bavail * free.f_frsize < MIB


@contextlib.contextmanager
def _room(image: str, size: int | None, there: os.stat_result | None) -> Iterator[None]:
    """A file for the image: made if it is not there, long enough, and gone or empty again if anything fails."""
    if there is None:
        try:
            os.close(os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise from_errno(error.errno or errno.EIO, "making it", image) from error
    try:
        if size is not None and (there is None or (stat.S_ISREG(there.st_mode) and there.st_size < size)):
            try:
                os.truncate(image, size)
            except OSError as error:
                raise from_errno(error.errno or errno.EIO, f"giving it {size} bytes", image) from error
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if there is None:
                os.unlink(image)
            elif stat.S_ISREG(there.st_mode) and size is not None and there.st_size < size:
                os.truncate(image, there.st_size)
        raise


def _make_and_fill(
    image: str,
    size: int | None,
    source: str | None,
    wanted: _Wanted,
    progress: bool | None,
    *,
    blank: bool,
    force: bool,
    needs: _Needs | None = None,
    listings: list[Listing] | None = None,
) -> _Made:
    if source is not None and listings is None:
        listings = _listed(source)
        needs = _Needs.of(listings, xattrs=False)
    superblock, size = _make(image, size, wanted, needs, blank=blank, force=force)
    if source is None:
        return _Made(superblock, size, None)
    from odirect.volume_copy_in import copy_in
    from odirect.volumes import open_volume

    with (
        open_volume(image, "r+") as volume,
        common.progress_bar(common.shown(source), common.wants_progress(progress)) as told,
    ):
        # With a slash: what is in it, not the directory itself.
        filled = copy_in(volume, os.path.join(source, ""), "/", progress=told, listings=listings)
        return _Made(superblock, size, filled)


def _listed(source: str) -> list[Listing]:
    from odirect.host_tree import list_tree

    return list_tree(os.fsencode(os.path.join(source, "")))


def _make(
    image: str, size: int | None, wanted: _Wanted, needs: _Needs | None, *, blank: bool, force: bool
) -> tuple[Superblock, int]:
    """The superblock of the empty volume, and its size."""
    from odirect.fs.ext2.mkfs import make
    from odirect.sched.clock import wall_ns
    from odirect.sched.drive_sync import SyncDriver
    from odirect.volume_opening import open_image

    with Interrupts() as interrupts:
        opened = open_image(image, writable=True)
        try:
            driver = SyncDriver(opened.scheduler)
            if not blank and not force:
                driver.run(_refuse_used(opened.device, image))
            interrupts.check()
            size = opened.device.size_bytes if size is None else size
            try:
                superblock = driver.run(
                    make(
                        opened.device,
                        size,
                        block_bytes=wanted.block_bytes,
                        label=wanted.label,
                        uuid=wanted.identity.bytes,
                        now_seconds=wall_ns() // 1_000_000_000,
                        inode_bytes=wanted.inode_bytes,
                        bytes_per_inode=None if needs is None else needs.inode_ratio(size, wanted),
                        # The same for the same identity, so that an image can be made again.
                        hash_seed=bytes(byte ^ 0xFF for byte in wanted.identity.bytes),
                        blank=blank,
                    )
                )
            except ValueError as error:
                raise click.UsageError(str(error)) from error
            except NoSpaceError as error:
                error.filename = error.filename or image
                raise
            return superblock, size
        finally:
            opened.close()


async def _refuse_used(device: BlockDevice, image: str) -> None:
    """Raise ExistsError if there is anything on the device that somebody could miss."""
    from odirect.fs.probe import kind_of

    known = await kind_of(device)
    if known is None and not await _is_zero(device):
        known = "data that is not known here"
    if known is not None:
        raise ExistsError(f"it holds {known}, which would be lost; say --force if you mean it", path=image)


async def _is_zero(device: BlockDevice) -> bool:
    """Whether the first and the last bytes are all zero."""
    from odirect.block.bio import READ
    from odirect.block.buffers import empty
    from odirect.dio.blockdev import transfer

    unit = max(device.limits.read_align, 4096)
    end = align_down(device.size_bytes, device.limits.read_align)
    for start, length in ((0, _FIRST_BYTES), (max(0, align_down(end - _LAST_BYTES, unit)), _LAST_BYTES + unit)):
        length = min(length, end - start)
        if length <= 0:
            continue
        memory = empty(length)
        count = await transfer(device, READ, start, [memory], length)
        if bytes(memory[:count]).strip(b"\0"):
            return False
    return True


class _Needs(NamedTuple):
    """What a tree takes: its inodes, its directories' entries, and bytes of data and size of each file, as columns."""

    inodes: int
    entry_bytes: list[int]
    data: NDArray[numpy.int64]
    sizes: NDArray[numpy.int64]
    extra_blocks: int

    @classmethod
    def of(cls, listings: list[Listing], *, xattrs: bool) -> _Needs:
        """What is in these directories takes; what cannot be read is told when it is copied.

        xattrs: ask each file whether it has extended attributes, which take a block.
        """
        import numpy

        from odirect.host_tree import BLOCKS, DEV, INO, NLINK, SIZE

        entries, data, sizes = [], [numpy.zeros(0, numpy.int64)], [numpy.zeros(0, numpy.int64)]
        seen: set[tuple[int, int]] = set()
        inodes = extra = 0
        for listing in listings:
            statuses = listing.statuses
            lengths = numpy.fromiter(map(len, listing.names), numpy.int64, len(listing.names))
            entries.append(int((-(-lengths // 4) * 4 + 8).sum()))
            new = ~listing.are(stat.S_IFDIR) & (statuses[:, NLINK] > 1)
            for row in new.nonzero()[0].tolist():
                identity = int(statuses[row, DEV]), int(statuses[row, INO])
                new[row] = identity not in seen
                seen.add(identity)
            new |= listing.are(stat.S_IFDIR) | (statuses[:, NLINK] <= 1)
            inodes += int(new.sum())
            extra += int((new & listing.are(stat.S_IFLNK)).sum())
            for row in new.nonzero()[0].tolist() if xattrs else ():
                with contextlib.suppress(OSError):
                    extra += bool(os.listxattr(listing.path_of(row), follow_symlinks=False))
            files = statuses[new & listing.are(stat.S_IFREG)]
            sizes.append(files[:, SIZE])
            data.append(numpy.minimum(files[:, SIZE], numpy.maximum(files[:, BLOCKS] * 512, 1)))
        return cls(inodes, entries, numpy.concatenate(data), numpy.concatenate(sizes), extra)

    def blocks(self, block_bytes: int) -> int:
        """Blocks of this size that it takes at most."""
        pointers = block_bytes // 4
        # Entries do not cross sectors of 512 bytes, which wastes some of each.
        total = self.extra_blocks + sum(1 + -(-used * 5 // 4 // block_bytes) for used in self.entry_bytes)
        sparse = self.data < self.sizes
        blocks = -(-self.data // block_bytes) + sparse
        indirect = 3 + -(-blocks // pointers) * 2
        return total + int(blocks.sum()) + int(indirect[(blocks > 12) | sparse].sum())

    def size(self, wanted: _Wanted) -> int:
        """The size of a volume that it fits in, with some room."""
        from odirect.fs.ext2.mkfs import plan

        small = wanted.block_bytes or 1024
        size = align_up(int(self.blocks(small) * small * _ROOM) + MIB, MIB)
        while True:
            with contextlib.suppress(NoSpaceError):
                try:
                    chosen = plan(
                        size,
                        block_bytes=wanted.block_bytes,
                        inode_bytes=wanted.inode_bytes,
                        bytes_per_inode=self.inode_ratio(size, wanted),
                    )
                except ValueError as error:
                    raise click.UsageError(str(error)) from error
                if _free(chosen) >= self.blocks(chosen.block_bytes) * _ROOM and self._has_inodes(chosen):
                    return size
            size = align_up(size + size // 8, MIB)

    def inode_ratio(self, size: int, wanted: _Wanted) -> int | None:
        """Bytes for each inode where the usual number of inodes would be too low; None where it is enough."""
        from odirect.fs.ext2.mkfs import plan

        try:
            usual = plan(size, block_bytes=wanted.block_bytes, inode_bytes=wanted.inode_bytes)
        except (ValueError, NoSpaceError):
            return None
        if self._has_inodes(usual):
            return None
        return max(_LEAST_INODE_RATIO, size // (self._inodes() + 1))

    def _inodes(self) -> int:
        return int(self.inodes * _ROOM) + 16

    def _has_inodes(self, chosen: Plan) -> bool:
        return chosen.inodes_count >= self._inodes()


def _free(chosen: Plan) -> int:
    """Blocks for files, without what is kept for root."""
    used = sum(chosen.overhead(group) for group in range(chosen.groups))
    return chosen.blocks_count - used - chosen.reserved_blocks - 32


def _as_told(image: str, made: _Made, wanted: _Wanted) -> dict[str, Any]:
    superblock = made.superblock
    told: dict[str, Any] = {
        **common.told_path(image, "image"),
        "kind": "ext2",
        "size_bytes": made.size_bytes,
        "block_bytes": 1024 << superblock.log_block_size,
        "blocks": superblock.blocks_count,
        "inodes": superblock.inodes_count,
        "inode_bytes": superblock.inode_size,
        **common.told(wanted.label, "label"),
        "uuid": str(wanted.identity),
    }
    if made.filled is not None:
        told["filled"] = made.filled._asdict()
    return told


def _lines(image: str, made: _Made, wanted: _Wanted) -> list[str]:
    told = _as_told(image, made, wanted)
    lines = [
        f"{told['image']}: ext2, {format_bytes(made.size_bytes)}, {told['blocks']} blocks of {told['block_bytes']}, "
        f"{told['inodes']} inodes, uuid {told['uuid']}{', label ' + told['label'] if wanted.label else ''}"
    ]
    filled = made.filled
    if filled is not None:
        lines.append(
            f"  {filled.files} files, {filled.directories} directories, {filled.links} symbolic links, "
            f"{format_bytes(filled.bytes_copied)} copied"
        )
        lines += [f"  not kept: {missed}" for missed in filled.left_out]
    return lines
