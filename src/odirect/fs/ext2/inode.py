"""An inode of ext2 in memory: read from its record, and put back into it.

What the record has and this does not know is kept as it is on the disk. Times are nanoseconds since
1970; where an inode has only its first 128 bytes, or says that nothing follows them, the disk has
whole seconds from 1901 to 2038; else the extra parts of ext4's documentation, until 2446.
"""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING

from odirect.base.errors import UnsupportedError
from odirect.fs.ext2.format import (
    EXTRA,
    FAST_SYMLINK_BYTES,
    GOOD_OLD_INODE_BYTES,
    INODE,
    ROOT_INODE,
    SECTOR_BYTES,
    TRIPLE_INDIRECT,
    Inode,
    InodeFlags,
    ReadOnlyCompat,
)

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.base.layout import Place
    from odirect.cache.metacache import MetaCache
    from odirect.fs.ext2.geometry import Geometry

#: Where in the inode the block numbers are.
BLOCK_AT = INODE.offset_of("block")
# The parts of the record that `store` writes.
_HEAD = INODE.part("mode", "flags")
_NEXT, _NEXT_AT = INODE.part("generation", "file_acl"), INODE.offset_of("generation")
_SIZE_HIGH, _SIZE_HIGH_AT = INODE.part("size_high", "size_high"), INODE.offset_of("size_high")
_OWNERS, _OWNERS_AT = INODE.part("uid_high", "gid_high"), INODE.offset_of("uid_high")
_POINTERS = struct.Struct(f"<{TRIPLE_INDIRECT + 1}I")
_TWO_POINTERS = struct.Struct("<2I")
_KINDS = frozenset((stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR, stat.S_IFBLK, stat.S_IFREG, stat.S_IFLNK, stat.S_IFSOCK))
_SECOND = 1_000_000_000
_MASK = 0xFFFFFFFF
#: Bytes after the first 128 that are known here and in ext4: the extra times, the birth, version and project.
_EXTRA_BYTES = 32
_INLINE_DATA_FLAG = 0x10000000
_HUGE_FILE_FLAG = 0x40000


class Ext2Inode:
    """One inode. `parse` makes it from the disk, `create` from nothing; `store` puts it into its record.

    mode has the type bits. sectors counts 512 bytes, with block numbers' and attributes' blocks. block is
    the place of the 15 block numbers: 60 bytes, changed in place, never replaced. file_acl is the block of
    extended attributes, or 0. dtime is seconds, or the next orphan. extra_isize is how many bytes after the
    first 128 have a meaning; 0: none, and times are whole seconds.
    """

    __slots__ = (
        "atime_ns",
        "birth_ns",
        "block",
        "ctime_ns",
        "dtime",
        "extra_isize",
        "file_acl",
        "flags",
        "generation",
        "gid",
        "links",
        "mode",
        "mtime_ns",
        "number",
        "sectors",
        "size",
        "uid",
    )

    def __init__(self, number: int, mode: int) -> None:
        """Inode `number` with nothing in it but its mode; `parse` and `create` fill it."""
        self.number = number
        self.mode = mode
        self.uid = self.gid = self.size = self.dtime = self.links = self.sectors = self.flags = 0
        self.generation = self.file_acl = self.extra_isize = 0
        self.atime_ns = self.mtime_ns = self.ctime_ns = self.birth_ns = 0
        self.block = bytearray(_POINTERS.size)

    @classmethod
    def create(cls, geometry: Geometry, number: int, mode: int, now_ns: int) -> Ext2Inode:
        """A new inode with no links yet, its times now. Its record must be cleared by whoever stores it first."""
        inode = cls(number, mode)
        if geometry.inode_bytes >= GOOD_OLD_INODE_BYTES + _EXTRA_BYTES:
            inode.extra_isize = _EXTRA_BYTES
        inode.atime_ns = inode.mtime_ns = inode.ctime_ns = inode.birth_ns = inode.storable_time(now_ns)
        return inode

    @classmethod
    def parse(
        cls, geometry: Geometry, number: int, raw: memoryview | bytes | bytearray, place: Place | None = None
    ) -> Ext2Inode:
        """The inode whose record, of `geometry.inode_bytes`, is `raw`.

        A free inode (`is_free`) is an answer too; what it has besides is only what it was. Raises
        CorruptionError for a live one of no known kind, with a size that its block numbers cannot reach,
        or whose extra part does not fit, UnsupportedError for one with extents. place: where the record
        is, for messages.
        """
        place = place or geometry.inode_structure(number)
        if len(raw) < geometry.inode_bytes:
            raise place.corrupt(f"{len(raw)} bytes", f"{geometry.inode_bytes} bytes")
        found = INODE.read(raw, 0, place)
        inode = cls(number, found.mode)
        inode.uid = found.uid | found.uid_high << 16
        inode.gid = found.gid | found.gid_high << 16
        inode.size = found.size
        if inode.is_file:
            inode.size |= found.size_high << 32
        inode.dtime = found.dtime
        inode.links = found.links_count
        inode.flags = found.flags
        inode.block[:] = found.block
        inode.generation = found.generation
        inode.file_acl = found.file_acl
        inode.sectors = _sectors(geometry, found)
        inode._read_times(geometry, found, raw, place)
        if not inode.is_free:
            inode._check(geometry, place)
        return inode

    def store(self, geometry: Geometry, raw: memoryview | bytearray) -> None:
        """Put the inode into its record `raw`; what is not known here stays as it is there.

        Raises ValueError if a value does not fit the disk: a number, a size, too many sectors.
        """
        if len(raw) < geometry.inode_bytes:
            raise ValueError(f"inode {self.number} takes {geometry.inode_bytes} bytes, not {len(raw)}")
        if not self.is_file and self.size > _MASK:
            raise ValueError(f"inode {self.number}: only files can have {self.size} bytes")
        atime, ctime, mtime, birth = map(self.on_disk, (self.atime_ns, self.ctime_ns, self.mtime_ns, self.birth_ns))
        # Packed apart first: a value that does not fit must not leave half a record. Only the fields that are
        # known here, because this runs for every change of every file.
        record = bytearray(raw[: geometry.inode_bytes])
        try:
            _HEAD.pack_into(
                record,
                0,
                self.mode,
                self.uid & 0xFFFF,
                self.size & _MASK,
                atime[0],
                ctime[0],
                mtime[0],
                self.dtime,
                self.gid & 0xFFFF,
                self.links,
                self.sectors,
                self.flags,
            )
            record[BLOCK_AT : BLOCK_AT + len(self.block)] = self.block
            _NEXT.pack_into(record, _NEXT_AT, self.generation, self.file_acl)
            if self.is_file:
                _SIZE_HIGH.pack_into(record, _SIZE_HIGH_AT, self.size >> 32)
            _OWNERS.pack_into(record, _OWNERS_AT, self.uid >> 16, self.gid >> 16)
        except struct.error as error:
            raise ValueError(f"inode {self.number} cannot be stored: {error}") from error
        if self.extra_isize:
            # Only the fields that extra_isize covers are there.
            covered = min(self.extra_isize, EXTRA.size)
            checksum = EXTRA.struct.unpack_from(record, GOOD_OLD_INODE_BYTES)[1]
            extra = EXTRA.struct.pack(self.extra_isize, checksum, ctime[1], mtime[1], atime[1], birth[0], birth[1])
            record[GOOD_OLD_INODE_BYTES : GOOD_OLD_INODE_BYTES + covered] = extra[:covered]
        raw[: len(record)] = record

    def remember(self, cache: MetaCache) -> None:
        """Have the running transaction of `cache` put every field back as it is now if it is undone."""
        fields = [(name, getattr(self, name)) for name in self.__slots__ if name != "block"]
        block = bytes(self.block)

        def put_back() -> None:
            for name, value in fields:
                setattr(self, name, value)
            self.block[:] = block

        cache.undo(put_back)

    # -- what kind it is

    @property
    def is_free(self) -> bool:
        """Whether it is no file (any more): no name leads to it."""
        return self.links == 0

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    def is_device(self) -> bool:
        """Whether it is a character or block device, and so has a `device_number`."""
        return stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)

    def is_fast_symlink(self, geometry: Geometry) -> bool:
        """Whether the link's target is in the inode: it has no blocks but that of its attributes.

        Source: the kernel's rule (ext2_inode_is_fast_symlink).
        """
        attributes = geometry.block_bytes // SECTOR_BYTES if self.file_acl else 0
        return self.is_symlink and self.sectors == attributes

    def has_blocks(self, geometry: Geometry) -> bool:
        """Whether `block` holds block numbers: files, directories, and links too long for the inode."""
        return self.is_file or self.is_dir or (self.is_symlink and not self.is_fast_symlink(geometry))

    def fast_target(self, geometry: Geometry) -> bytes:
        """The target of a fast symbolic link. Raises CorruptionError if it is empty, too long or cut by a zero."""
        if not 0 < self.size < FAST_SYMLINK_BYTES:
            raise geometry.inode_structure(self.number).corrupt(
                f"a link of {self.size} bytes without blocks", f"1 to {FAST_SYMLINK_BYTES - 1} bytes"
            )
        target = bytes(self.block[: self.size])
        if 0 in target:
            raise geometry.inode_structure(self.number).corrupt(f"link {target!r}", "no zero byte in it")
        return target

    # -- what is in the block numbers' place

    def pointer(self, index: int) -> int:
        """The block number at place `index` (0 to 14); 0 is a hole."""
        return int.from_bytes(self.block[4 * index : 4 * index + 4], "little")

    def set_pointer(self, index: int, block: int) -> None:
        """Put a block number at place `index` (0 to 14)."""
        if not 0 <= index <= TRIPLE_INDIRECT:
            raise ValueError(f"an inode has no place {index} for a block number")
        self.block[4 * index : 4 * index + 4] = block.to_bytes(4, "little")

    def pointers(self) -> tuple[int, ...]:
        """All 15 block numbers."""
        return _POINTERS.unpack(self.block)

    @property
    def device_number(self) -> int:
        """A device's number as `os.makedev` makes it; 0 for what is no device.

        The first place has the old form (8 bits each), else the second has the new one (12 and 20 bits).
        """
        if not self.is_device:
            return 0
        old, new = _TWO_POINTERS.unpack_from(self.block, 0)
        if old:
            return _make_device(old >> 8 & 0xFF, old & 0xFF)
        return _make_device(new >> 8 & 0xFFF, (new & 0xFF) | (new >> 12 & 0xFFF00))

    @device_number.setter
    def device_number(self, number: int) -> None:
        major, minor = _split_device(number)
        if major < 256 and minor < 256:
            words = (major << 8 | minor, 0)
        elif major < 1 << 12 and minor < 1 << 20:
            words = (0, (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12)
        else:
            raise ValueError(f"device {major}:{minor} does not fit: 12 bits and 20 bits")
        self.block[:] = _TWO_POINTERS.pack(*words) + bytes(len(self.block) - _TWO_POINTERS.size)

    # -- times

    def storable_time(self, time_ns: int) -> int:
        """The nearest time at or before `time_ns` that this inode's record can hold (or its first or last)."""
        low, extra = self.on_disk(time_ns)
        return _from_disk(low, extra)

    def on_disk(self, time_ns: int) -> tuple[int, int]:
        """(seconds as 32 bits, the extra part) of a time, as this inode's record can hold it."""
        seconds, nanoseconds = divmod(time_ns, _SECOND)
        # ctime, mtime, atime and birth lie behind each other; a part that ends between them is not made.
        has_extra = self.extra_isize >= EXTRA.size
        last = (1 << 31) - 1 + (3 << 32 if has_extra else 0)
        if seconds < -(1 << 31):
            seconds, nanoseconds = -(1 << 31), 0
        elif seconds > last:
            seconds, nanoseconds = last, _SECOND - 1
        if not has_extra:
            return seconds & _MASK, 0
        epoch = (seconds + (1 << 31)) >> 32
        return seconds & _MASK, epoch | nanoseconds << 2

    def all_on_disk(self, times: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        """What `on_disk` says of many times, a row for each: seconds and nanoseconds before, the two parts after."""
        import numpy

        seconds, nanoseconds = times[:, 0], times[:, 1]
        has_extra = self.extra_isize >= EXTRA.size
        first, last = -(1 << 31), (1 << 31) - 1 + (3 << 32 if has_extra else 0)
        nanoseconds = numpy.where(seconds < first, 0, numpy.where(seconds > last, _SECOND - 1, nanoseconds))
        seconds = numpy.clip(seconds, first, last)
        extra = (seconds + (1 << 31)) >> 32 | nanoseconds << 2 if has_extra else numpy.zeros_like(seconds)
        return numpy.stack((seconds & _MASK, extra), axis=1)

    def _read_times(self, geometry: Geometry, found: Inode, raw: memoryview | bytes | bytearray, place: Place) -> None:
        extra = EXTRA.kind(*(0,) * 7)
        room = geometry.inode_bytes - GOOD_OLD_INODE_BYTES
        # Free inodes are not looked at: their extra part may be anything.
        if room and not self.is_free:
            extra_isize = int.from_bytes(raw[GOOD_OLD_INODE_BYTES : GOOD_OLD_INODE_BYTES + 2], "little")
            if extra_isize > room or extra_isize % 4:
                raise place.corrupt(f"extra_isize {extra_isize}", f"a multiple of 4, at most {room}")
            if not extra_isize and room >= _EXTRA_BYTES and not any(raw[GOOD_OLD_INODE_BYTES : geometry.inode_bytes]):
                # Nothing was ever there, so it may be used from now on, as ext4 does.
                extra_isize = _EXTRA_BYTES
            self.extra_isize = extra_isize
            covered = bytes(raw[GOOD_OLD_INODE_BYTES : GOOD_OLD_INODE_BYTES + min(extra_isize, EXTRA.size)])
            extra = EXTRA.kind(*EXTRA.struct.unpack(covered.ljust(EXTRA.size, b"\0")))
        self.atime_ns = _from_disk(found.atime, extra.atime_extra)
        self.mtime_ns = _from_disk(found.mtime, extra.mtime_extra)
        self.ctime_ns = _from_disk(found.ctime, extra.ctime_extra)
        self.birth_ns = _from_disk(extra.crtime, extra.crtime_extra)

    def _check(self, geometry: Geometry, place: Place) -> None:
        if self.flags & InodeFlags.EXTENTS:
            raise UnsupportedError(f"inode {self.number} has extents, which are ext4's", path=geometry.name)
        if self.flags & _INLINE_DATA_FLAG:
            raise UnsupportedError(f"inode {self.number} has its data inline, as only ext4 has", path=geometry.name)
        kind = stat.S_IFMT(self.mode)
        # The inodes below the first for files, but for the root, may be of no kind (that of bad blocks).
        reserved = self.number < geometry.first_inode and self.number != ROOT_INODE
        if kind not in _KINDS and (kind or not reserved):
            raise place.corrupt(f"mode {self.mode:#o}", "the type bits of a file, directory, link, device or pipe")
        if self.size > geometry.max_blocks * geometry.block_bytes:
            raise place.corrupt(
                f"size {self.size}",
                f"at most {geometry.max_blocks * geometry.block_bytes}, where its block numbers end",
            )


def _sectors(geometry: Geometry, found: Inode) -> int:
    if not geometry.ro_compat & ReadOnlyCompat.HUGE_FILE:
        return found.blocks
    count = found.blocks | found.blocks_high << 32
    if found.flags & _HUGE_FILE_FLAG:
        return count * (geometry.block_bytes // SECTOR_BYTES)
    return count


def _from_disk(seconds: int, extra: int) -> int:
    """Nanoseconds of 32 bits with sign, two more bits above them, and 30 bits of nanoseconds."""
    signed = seconds - (1 << 32) if seconds & 0x80000000 else seconds
    return (signed + ((extra & 3) << 32)) * _SECOND + (extra >> 2)


def _make_device(major: int, minor: int) -> int:
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12 | (major & ~0xFFF) << 32


def _split_device(number: int) -> tuple[int, int]:
    major = (number >> 8 & 0xFFF) | (number >> 32 & ~0xFFF)
    return major, (number & 0xFF) | (number >> 12 & 0xFFFFFF00)
