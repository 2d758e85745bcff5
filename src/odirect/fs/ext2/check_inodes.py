"""The first walk of `check`: every inode record, and every block that inodes lead to.

Whole tables are judged at once with NumPy; only what has something of its own (directories, trees of block
numbers, links, attributes) is looked at by itself. A block of numbers that somebody has already is not
followed, so the walk ends whatever the numbers say.
"""

from __future__ import annotations

import array
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from odirect.base.errors import CorruptionError, UnsupportedError
from odirect.base.layout import Place
from odirect.fs.ext2.checking import BATCH_BYTES, Bits
from odirect.fs.ext2.format import (
    BAD_BLOCKS_INODE,
    DIRECT_BLOCKS,
    DOUBLE_INDIRECT,
    FAST_SYMLINK_BYTES,
    GOOD_OLD_INODE_BYTES,
    RESIZE_INODE,
    ROOT_INODE,
    SECTOR_BYTES,
    XATTR_MAGIC,
    Compat,
    FileType,
    Incompat,
    InodeFlags,
    ReadOnlyCompat,
)
from odirect.fs.ext2.xattr import read_block, read_inode, references

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy
    from numpy.typing import NDArray

    from odirect.fs.ext2.checking import Reader, Report
    from odirect.fs.ext2.geometry import Geometry

_JOURNAL_INODE = 8
_BOOT_INODE = 5
_TYPES = {
    stat.S_IFREG: FileType.REGULAR,
    stat.S_IFDIR: FileType.DIRECTORY,
    stat.S_IFCHR: FileType.CHARACTER,
    stat.S_IFBLK: FileType.BLOCK,
    stat.S_IFIFO: FileType.FIFO,
    stat.S_IFSOCK: FileType.SOCKET,
    stat.S_IFLNK: FileType.SYMLINK,
}
#: Flags that only the features named give a meaning: compression, imagic inodes, and all that is ext4's.
_COMPRESSED, _IMAGIC, _HUGE_FILE = 0x4, 0x2000, 0x40000
_FOREIGN_FLAGS = 0x80000 | 0x10000000 | 0x800 | 0x40000000 | 0x100000 | 0x200000
#: How many blocks that several claim are told with the names of who does.
_MOST_SHARED = 4096
_INODE_FIELDS = [
    ("mode", "<u2"),
    ("uid", "<u2"),
    ("size", "<u4"),
    ("atime", "<u4"),
    ("ctime", "<u4"),
    ("mtime", "<u4"),
    ("dtime", "<u4"),
    ("gid", "<u2"),
    ("links", "<u2"),
    ("sectors", "<u4"),
    ("flags", "<u4"),
    ("osd1", "<u4"),
    ("block", "<u4", (15,)),
    ("generation", "<u4"),
    ("file_acl", "<u4"),
    ("size_high", "<u4"),
    ("faddr", "<u4"),
    ("blocks_high", "<u2"),
    ("file_acl_high", "<u2"),
    ("uid_high", "<u2"),
    ("gid_high", "<u2"),
    ("checksum_lo", "<u2"),
    ("reserved", "<u2"),
]


class Directory:
    """A directory that the first walk has seen: its blocks, by their number in it, and its flags."""

    __slots__ = ("blocks", "flags", "logical", "number", "size")

    def __init__(self, number: int, flags: int, size: int) -> None:
        self.number = number
        self.flags = flags
        self.size = size
        self.logical = array.array("Q")
        self.blocks = array.array("I")


class _Tree(NamedTuple):
    """A block of numbers still to be read: whose, at which level (1 leads to data), the first file block."""

    file: _File
    level: int
    block: int
    first: int


class _File:
    """An inode that has blocks, while they are counted. last: the last file block that is there, or -1."""

    __slots__ = ("blocks", "directory", "kind", "last", "number", "sectors", "size")

    def __init__(self, number: int, kind: int, size: int, sectors: int) -> None:
        self.number = number
        self.kind = kind
        self.size = size
        self.sectors = sectors
        self.blocks = 0
        self.last = -1
        self.directory: Directory | None = None


class InodeWalk:
    """The walk, and what it finds out: `used` blocks, inodes in use, their links and kinds, the directories.

    All arrays are indexed by inode number. The tables' places must have been checked.
    """

    def __init__(self, geometry: Geometry, reader: Reader, report: Report, fixed: Bits, tables: list[int]) -> None:
        import numpy

        self.geometry = geometry
        self.used = Bits(geometry.blocks_count)
        self.links = numpy.zeros(geometry.inodes_count + 1, numpy.uint16)
        self.kinds = numpy.zeros(geometry.inodes_count + 1, numpy.uint8)
        self.inodes = Bits(geometry.inodes_count + 1)
        self.directories: list[Directory] = []
        #: Blocks that more than one claims, and who does (filled by a second walk).
        self.shared: dict[int, list[str]] = {}
        self._reader = reader
        self._report = report
        self._fixed = fixed
        self._tables = tables
        self._naming = False
        self._attributes: dict[int, list[int]] = {}
        self._trees: list[_Tree] = []
        self._files: list[_File] = []
        self._links_to_read: list[tuple[int, int, int]] = []
        # A time of deletion that could be an inode's number is a link in the list of orphans, unless time is young.
        times = (geometry.superblock.mkfs_time, geometry.superblock.wtime, geometry.superblock.mtime)
        self._orphans_show = all(not time or time >= geometry.inodes_count for time in times)
        self._foreign_flags = _FOREIGN_FLAGS
        self._foreign_flags |= 0 if geometry.compat & Compat.IMAGIC_INODES else _IMAGIC
        self._foreign_flags |= 0 if geometry.ro_compat & ReadOnlyCompat.HUGE_FILE else _HUGE_FILE
        self._foreign_flags |= 0 if geometry.incompat & Incompat.COMPRESSION else _COMPRESSED
        fields: list[Any] = list(_INODE_FIELDS)
        if geometry.inode_bytes > GOOD_OLD_INODE_BYTES:
            fields += [("extra_isize", "<u2"), ("behind", f"V{geometry.inode_bytes - GOOD_OLD_INODE_BYTES - 2}")]
        self._dtype = numpy.dtype(fields)

    async def walk(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Look at every inode. progress: called with the groups done, and all of them."""
        geometry = self.geometry
        per_batch = max(1, BATCH_BYTES // geometry.block_bytes)
        for group, table in enumerate(self._tables):
            first = group * geometry.inodes_per_group + 1
            for start in range(0, geometry.table_blocks, per_batch):
                count = min(per_batch, geometry.table_blocks - start)
                data = await self._reader.run(table + start, count)
                number = first + start * geometry.block_bytes // geometry.inode_bytes
                inodes = min(len(data) // geometry.inode_bytes, first + geometry.inodes_per_group - number)
                await self._batch(data, number, inodes, (table + start) * geometry.block_bytes)
            if progress is not None:
                progress(group + 1, len(self._tables))
        await self._finish_attributes()

    async def name_sharers(self) -> None:
        """Walk once more, silently, to learn who claims the blocks that more than one claims, and report them."""
        if not self.shared:
            return
        again = InodeWalk(self.geometry, self._reader, self._report, self._fixed, self._tables)
        again._naming = True
        again.shared = self.shared
        self._report.muted = True
        try:
            await again.walk()
        finally:
            self._report.muted = False
        for block, owners in sorted(self.shared.items()):
            names = " and ".join(dict.fromkeys(owners)) or "inodes"
            if len(owners) != len(set(owners)):
                names += ", more than once"
            self._report.add(f"block {block}", block * self.geometry.block_bytes, f"used by {names}", "one owner")

    # -- a batch of records

    async def _batch(self, data: memoryview, number: int, count: int, addr: int) -> None:
        import numpy

        geometry = self.geometry
        rows = numpy.frombuffer(data, self._dtype, count)
        numbers = numpy.arange(number, number + count)
        links = rows["links"]
        special = numbers < geometry.first_inode
        live = links != 0
        if special.any():
            await self._special(rows, numbers, addr)
            live &= ~special | (numbers == ROOT_INODE)
            if geometry.compat & Compat.HAS_JOURNAL:
                live |= (numbers == geometry.superblock.journal_inum) & (links != 0)
        self._each(
            numbers, addr, ~live & ~special & (rows["mode"] != 0) & (links == 0) & (rows["dtime"] == 0),
            lambda _: ("a mode, no links and no time of deletion", "a time of deletion"),
        )  # fmt: skip
        if self._orphans_show:
            listed = (rows["dtime"] != 0) & (rows["dtime"] < geometry.inodes_count)
            self._each(
                numbers,
                addr,
                listed,
                lambda i: (f"{rows['dtime'][i]} as time of deletion", "a time, not the next orphan"),
            )
        if not live.any():
            return
        self.links[number : number + count][live] = links[live]
        self.inodes.add(numbers[live])
        kinds = numpy.zeros(count, numpy.uint8)
        formats = rows["mode"] & 0xF000
        for bits, kind in _TYPES.items():
            kinds[formats == bits] = kind
        kinds[~live] = 0
        self.kinds[number : number + count] = kinds
        self._fields(rows, numbers, addr, live, kinds)
        self._extra(rows, data, numbers, addr, live)
        self._take_attributes(rows, numbers, live)
        self._direct(rows, numbers, addr, live, kinds)
        await self._follow()
        self._judge_files(rows, number, addr)
        await self._judge_links()

    def _each(
        self,
        numbers: NDArray[numpy.int64],
        addr: int,
        which: NDArray[numpy.bool_],
        words: Callable[[int], tuple[object, object]],
    ) -> None:
        """A finding for each inode that `which` picks; words: what was found and expected, for its index."""
        if which.any():
            for index in which.nonzero()[0].tolist():
                found, expected = words(index)
                self._report.add(f"inode {numbers[index]}", addr + index * self.geometry.inode_bytes, found, expected)

    def _fields(
        self,
        rows: NDArray[numpy.void],
        numbers: NDArray[numpy.int64],
        addr: int,
        live: NDArray[numpy.bool_],
        kinds: NDArray[numpy.uint8],
    ) -> None:
        """What a record says by itself."""
        geometry = self.geometry
        mode, flags, block = rows["mode"], rows["flags"], rows["block"]
        each = self._each
        kind_of_dir, kind_of_link = int(FileType.DIRECTORY), int(FileType.SYMLINK)
        each(numbers, addr, live & (kinds == 0), lambda i: (f"mode {mode[i]:#o}", "the type bits of a file"))
        each(
            numbers, addr, live & (rows["dtime"] != 0),
            lambda i: (f"{rows['links'][i]} links and a time of deletion", "no time of deletion"),
        )  # fmt: skip
        zero = ["faddr", "file_acl_high"]
        if not geometry.ro_compat & ReadOnlyCompat.HUGE_FILE:
            zero.append("blocks_high")
        for name in zero:
            self._must_be_zero(rows[name], name, numbers, addr, live)
        self._must_be_zero(rows["size_high"], "upper part of the size", numbers, addr, live & (kinds == kind_of_dir))
        self._must_be_zero(flags & self._foreign_flags, "flags of other features", numbers, addr, live)
        may_have = live & (kinds == kind_of_dir) if geometry.compat & Compat.DIR_INDEX else live & False
        self._must_be_zero(flags & InodeFlags.INDEX, "index flag", numbers, addr, live & ~may_have)
        special = live & (kinds >= FileType.CHARACTER) & (kinds <= FileType.SOCKET)
        fixed = InodeFlags.IMMUTABLE | InodeFlags.APPEND
        each(
            numbers, addr, (special | (live & (kinds == kind_of_link))) & (flags & fixed != 0),
            lambda i: (f"flags {flags[i]:#x}", "neither immutable nor append-only: it has no bytes of its own"),
        )  # fmt: skip
        each(
            numbers, addr, special & ((rows["size"] != 0) | (rows["size_high"] != 0)),
            lambda i: (f"size {rows['size'][i]}", "0: it is a device, pipe or socket"),
        )  # fmt: skip
        each(
            numbers, addr, special & (block[:, 4:] != 0).any(axis=1),
            lambda i: ("block numbers", "none: it is a device, pipe or socket"),
        )  # fmt: skip

    def _must_be_zero(
        self,
        values: NDArray[numpy.integer[Any]],
        name: str,
        numbers: NDArray[numpy.int64],
        addr: int,
        which: NDArray[numpy.bool_],
    ) -> None:
        self._each(numbers, addr, which & (values != 0), lambda i: (f"{name} {int(values[i]):#x}", "0"))

    def _extra(
        self,
        rows: NDArray[numpy.void],
        data: memoryview,
        numbers: NDArray[numpy.int64],
        addr: int,
        live: NDArray[numpy.bool_],
    ) -> None:
        """What is behind the first 128 bytes: its length, and attributes."""
        import numpy

        geometry = self.geometry
        size = geometry.inode_bytes
        room = size - GOOD_OLD_INODE_BYTES
        if not room:
            return
        extra = rows["extra_isize"].astype(numpy.int64)
        wrong = live & (extra != 0) & ((extra < 4) | (extra > room) | (extra % 4 != 0))
        self._each(numbers, addr, wrong, lambda i: (f"extra_isize {extra[i]}", f"4 to {room}, a multiple of 4"))
        words = numpy.frombuffer(data, "<u4", len(rows) * size // 4).reshape(len(rows), size // 4)
        place = numpy.minimum((GOOD_OLD_INODE_BYTES + extra) // 4, size // 4 - 1)
        has = live & ~wrong & (words[numpy.arange(len(rows)), place] == XATTR_MAGIC) & (extra + 8 <= room)
        for index in has.nonzero()[0].tolist():
            where = addr + index * size
            name = f"inode {numbers[index]}"
            raw = data[index * size : (index + 1) * size]
            try:
                read_inode(geometry, raw, Place(geometry.name, name, where))
            except CorruptionError as error:
                self._report.add_error(name, where, error)
            except UnsupportedError:
                continue  # A kind of attribute that only others know.

    # -- blocks

    def _direct(
        self,
        rows: NDArray[numpy.void],
        numbers: NDArray[numpy.int64],
        addr: int,
        live: NDArray[numpy.bool_],
        kinds: NDArray[numpy.uint8],
    ) -> None:
        """Claim the blocks that the records name themselves, and note the trees and directories."""
        import numpy

        geometry = self.geometry
        sizes = rows["size"].astype(numpy.int64)
        regular = kinds == FileType.REGULAR
        sizes[regular] += rows["size_high"][regular].astype(numpy.int64) << 32
        slow = (kinds == FileType.SYMLINK) & (sizes >= FAST_SYMLINK_BYTES)
        fast = (kinds == FileType.SYMLINK) & ~slow
        mapped = live & (regular | (kinds == FileType.DIRECTORY) | slow)
        for index in (live & ~mapped).nonzero()[0].tolist():
            # What has no blocks but that of its attributes.
            file = _File(int(numbers[index]), int(kinds[index]), int(sizes[index]), int(rows["sectors"][index]))
            file.blocks = int(rows["file_acl"][index] != 0)
            self._files.append(file)
            if fast[index]:
                self._judge_fast_link(rows["block"][index].tobytes(), file, addr + index * geometry.inode_bytes)
        chosen = mapped.nonzero()[0]
        if not len(chosen):
            return
        pointers = rows["block"][chosen].astype(numpy.int64)
        good = self._good(pointers)
        for row, column in zip(*((pointers != 0) & ~good).nonzero(), strict=True):
            index = chosen[row]
            self._wrong_pointer(int(numbers[index]), int(pointers[row, column]), addr + index * geometry.inode_bytes)
        repeated = self._claim(pointers[good])
        twice = numpy.isin(pointers, repeated) & good if len(repeated) else None
        if self._naming:
            self._name(pointers, good, [int(numbers[index]) for index in chosen])
        data_good = good[:, :DIRECT_BLOCKS]
        counts = good.sum(axis=1)
        last = numpy.where(data_good.any(axis=1), DIRECT_BLOCKS - 1 - data_good[:, ::-1].argmax(axis=1), -1)
        # Most files are small and have no tree: their counting ends here, without an object each.
        acl = (rows["file_acl"][chosen] != 0).astype(numpy.int64)
        for row, index in enumerate(chosen.tolist()):
            kind = int(kinds[index])
            file = _File(int(numbers[index]), kind, int(sizes[index]), int(rows["sectors"][index]))
            file.blocks = int(counts[row] + acl[row])
            file.last = int(last[row])
            self._files.append(file)
            if kind == FileType.DIRECTORY:
                file.directory = Directory(file.number, int(rows["flags"][index]), file.size)
                self.directories.append(file.directory)
                for column in data_good[row].nonzero()[0].tolist():
                    file.directory.logical.append(column)
                    file.directory.blocks.append(int(pointers[row, column]))
            elif kind == FileType.SYMLINK:
                if good[row, 0]:
                    self._links_to_read.append((file.number, int(pointers[row, 0]), file.size))
                if (pointers[row, 1:] != 0).any() or not pointers[row, 0]:
                    where = addr + index * geometry.inode_bytes
                    self._report.add(f"inode {file.number}", where, "a link with other blocks", "one block")
            first = DIRECT_BLOCKS
            for level in (1, 2, 3):
                column = DIRECT_BLOCKS - 1 + level
                if good[row, column] and not (twice is not None and twice[row, column]):
                    self._trees.append(_Tree(file, level, int(pointers[row, column]), first))
                first += geometry.pointers_per_block**level

    async def _follow(self) -> None:
        """Read the trees of numbers that were noted, and what they lead to, until there are none."""
        import numpy

        geometry = self.geometry
        trees = self._trees
        while trees:
            # The lowest levels first: so few are waiting at any time, however large the files are.
            trees.sort(key=lambda tree: -tree.level)
            level = trees[-1].level
            most = max(1, BATCH_BYTES // geometry.block_bytes) if level == 1 else 4
            batch: list[_Tree] = []
            while trees and len(batch) < most and trees[-1].level == level:
                batch.append(trees.pop())
            read = await self._reader.blocks([tree.block for tree in batch])
            for tree in batch:
                pointers = numpy.frombuffer(read[tree.block], "<u4").astype(numpy.int64)
                if not pointers.any():
                    continue
                good = self._good(pointers)
                where = tree.block * geometry.block_bytes
                for index in ((pointers != 0) & ~good).nonzero()[0][:16].tolist():
                    self._wrong_pointer(tree.file.number, int(pointers[index]), where + index * 4)
                repeated = self._claim(pointers[good])
                if self._naming:
                    self._name(pointers, good, [tree.file.number])
                tree.file.blocks += int(good.sum())
                places = good.nonzero()[0]
                if not len(places):
                    continue
                span = geometry.pointers_per_block ** (tree.level - 1)
                if tree.level == 1:
                    tree.file.last = max(tree.file.last, tree.first + int(places[-1]))
                    if tree.file.directory is not None:
                        tree.file.directory.logical.extend((places + tree.first).tolist())
                        tree.file.directory.blocks.extend(pointers[places].tolist())
                    continue
                below = ~numpy.isin(pointers[places], repeated)
                for index in places[below].tolist():
                    trees.append(_Tree(tree.file, tree.level - 1, int(pointers[index]), tree.first + index * span))

    def _good(self, pointers: NDArray[numpy.int64]) -> NDArray[numpy.bool_]:
        """Of each block number whether it can be a file's; holes are not."""
        import numpy

        geometry = self.geometry
        inside = (pointers >= max(1, geometry.first_data_block)) & (pointers < geometry.blocks_count)
        safe = numpy.where(inside, pointers, 0)
        found: NDArray[numpy.bool_] = inside & ~self._fixed.has(safe)
        return found

    def _wrong_pointer(self, number: int, block: int, addr: int) -> None:
        geometry = self.geometry
        inside = geometry.first_data_block <= block < geometry.blocks_count
        expected = "a block for files, not one of metadata" if inside else f"a block below {geometry.blocks_count}"
        self._report.add(f"inode {number}", addr, f"block {block}", expected)

    def _claim(self, blocks: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        """Take `blocks` for a file; gives those that were taken already."""
        repeated = self.used.add(blocks)
        if not self._naming:
            for block in repeated.tolist():
                if len(self.shared) >= _MOST_SHARED:
                    self._report.add(f"block {block}", block * self.geometry.block_bytes, "several owners", "one")
                else:
                    self.shared.setdefault(block, [])
        return repeated

    def _name(self, pointers: NDArray[numpy.int64], good: NDArray[numpy.bool_], numbers: list[int]) -> None:
        """Note who claims those of `pointers` that are shared; a row for each of `numbers`."""
        import numpy

        shared = numpy.fromiter(self.shared, numpy.int64, len(self.shared))
        rows = pointers.reshape(len(numbers), -1)
        for row, column in zip(*(numpy.isin(rows, shared) & good.reshape(rows.shape)).nonzero(), strict=True):
            self.shared[int(rows[row, column])].append(f"inode {numbers[row]}")

    # -- files, when all their blocks are known

    def _judge_files(self, rows: NDArray[numpy.void], first: int, addr: int) -> None:
        geometry = self.geometry
        block_bytes = geometry.block_bytes
        per_block = block_bytes // SECTOR_BYTES
        files, self._files = self._files, []
        for file in files:
            index = file.number - first
            where = addr + index * geometry.inode_bytes
            name = f"inode {file.number}"
            if file.sectors != file.blocks * per_block and not rows["blocks_high"][index]:
                self._report.add(
                    name, where, f"{file.sectors} sectors", f"{file.blocks * per_block}, as its blocks take"
                )
            if file.kind == FileType.DIRECTORY:
                if file.size != (file.last + 1) * block_bytes or not file.size:
                    expected = f"{(file.last + 1) * block_bytes}, its blocks'"
                    self._report.add(name, where, f"a directory of {file.size} bytes", expected)
            elif file.kind == FileType.REGULAR:
                if file.size < file.last * block_bytes:
                    self._report.add(name, where, f"{file.size} bytes", f"more than {file.last * block_bytes}")
                elif file.size > geometry.max_blocks * block_bytes:
                    self._report.add(name, where, f"{file.size} bytes", f"at most {geometry.max_blocks * block_bytes}")

    def _judge_fast_link(self, place: bytes, file: _File, addr: int) -> None:
        target = place.split(b"\0", 1)[0]
        if len(target) != file.size or not file.size:
            self._report.add(
                f"inode {file.number}", addr, f"a link of {file.size} bytes", f"{len(target)}, its target's"
            )

    async def _judge_links(self) -> None:
        """Links whose target is in a block: it ends where the size says."""
        links, self._links_to_read = self._links_to_read, []
        per_batch = max(1, BATCH_BYTES // self.geometry.block_bytes)
        for start in range(0, len(links), per_batch):
            part = links[start : start + per_batch]
            read = await self._reader.blocks([block for _, block, _ in part])
            for number, block, size in part:
                target = bytes(read[block]).split(b"\0", 1)[0]
                if len(target) != size or size >= self.geometry.block_bytes:
                    addr = block * self.geometry.block_bytes
                    self._report.add(f"inode {number}", addr, f"a link of {size} bytes", f"{len(target)}, its target's")

    # -- attributes

    def _take_attributes(
        self, rows: NDArray[numpy.void], numbers: NDArray[numpy.int64], live: NDArray[numpy.bool_]
    ) -> None:
        """Count who uses which block of attributes; the first one claims it."""
        import numpy

        geometry = self.geometry
        for index in (live & (rows["file_acl"] != 0)).nonzero()[0].tolist():
            block = int(rows["file_acl"][index])
            number = int(numbers[index])
            if block in self._attributes:
                self._attributes[block][0] += 1
                continue
            one = numpy.array([block], numpy.int64)
            if not geometry.compat & Compat.EXT_ATTR or not self._good(one)[0]:
                expected = "a block for files" if geometry.compat & Compat.EXT_ATTR else "0: no such feature"
                self._report.add(f"inode {number}", None, f"attributes in block {block}", expected)
                continue
            self._attributes[block] = [1, number]
            self._claim(one)
            if self._naming and block in self.shared:
                self.shared[block].append(f"the attributes of inode {number}")

    async def _finish_attributes(self) -> None:
        """Read every block of attributes: is it one, and is its count of inodes right?"""
        if self._naming:
            return
        geometry = self.geometry
        blocks = sorted(self._attributes)
        per_batch = max(1, BATCH_BYTES // geometry.block_bytes)
        for start in range(0, len(blocks), per_batch):
            read = await self._reader.blocks(blocks[start : start + per_batch])
            for block, data in read.items():
                count, number = self._attributes[block]
                addr = block * geometry.block_bytes
                name = f"attributes of inode {number}"
                place = Place(geometry.name, name, addr)
                try:
                    found = references(data, place)
                    if found != count:
                        self._report.add(name, addr, f"{found} inodes that share them", count)
                    read_block(geometry, data, place)
                except CorruptionError as error:
                    self._report.add_error(name, addr, error)
                except UnsupportedError:
                    continue  # A kind of attribute that only others know.

    # -- inodes with a meaning of their own

    async def _special(self, rows: NDArray[numpy.void], numbers: NDArray[numpy.int64], addr: int) -> None:
        """The inodes before the first one for files."""
        geometry = self.geometry
        report = self._report
        for index in (numbers < geometry.first_inode).nonzero()[0].tolist():
            number, row = int(numbers[index]), rows[index]
            where = addr + index * geometry.inode_bytes
            name = f"inode {number}"
            self.inodes.add_one(number)
            mode, links = int(row["mode"]), int(row["links"])
            has_blocks = bool(row["block"].any())
            if number == ROOT_INODE:
                if not stat.S_ISDIR(mode):
                    report.add("the root directory", where, f"mode {mode:#o}", "a directory")
                if not links:
                    report.add("the root directory", where, "no links", "2 or more")
            elif number == BAD_BLOCKS_INODE:
                if has_blocks:
                    await self._bad_blocks(row, where)
                elif mode and not stat.S_ISREG(mode):
                    report.add(name, where, f"mode {mode:#o}", "0: it lists bad blocks")
            elif number == RESIZE_INODE:
                await self._resize_inode(row, where)
            elif number == _JOURNAL_INODE and geometry.compat & Compat.HAS_JOURNAL:
                if not stat.S_ISREG(mode) or not links:
                    report.add("the journal", where, f"mode {mode:#o} and {links} links", "a file")
            elif number == _BOOT_INODE:
                if stat.S_ISDIR(mode):
                    report.add(name, where, f"mode {mode:#o}", "no directory: it is the boot loader's")
            elif mode or (number == _JOURNAL_INODE and has_blocks):
                report.add(name, where, f"mode {mode:#o}", "0: it is reserved")

    async def _bad_blocks(self, row: numpy.void, addr: int) -> None:
        """Blocks that are kept from use because they are bad; they may be anywhere."""
        import numpy

        geometry = self.geometry
        found = [int(block) for block in row["block"][:DIRECT_BLOCKS] if block]
        trees = [(level, int(row["block"][DIRECT_BLOCKS - 1 + level])) for level in (1, 2, 3)]
        count = len(found)
        pending = [(level, block) for level, block in trees if block]
        while pending:
            level, block = pending.pop()
            count += 1
            inside = geometry.first_data_block <= block < geometry.blocks_count
            if not inside or self.used.add_one(block):
                self._report.add("inode 1 (bad blocks)", addr, f"block {block}", "a block of numbers of its own")
                continue
            data = await self._reader.run(block, 1)
            numbers = [number for number in numpy.frombuffer(data, "<u4").tolist() if number]
            if level > 1:
                pending += [(level - 1, number) for number in numbers]
            else:
                found += numbers
                count += len(numbers)
        for block in found:
            if not geometry.first_data_block <= block < geometry.blocks_count:
                self._report.add("inode 1 (bad blocks)", addr, f"block {block}", f"one below {geometry.blocks_count}")
            elif not self._fixed.has_one(block):
                self._claim(numpy.array([block], numpy.int64))
                if self._naming and block in self.shared:
                    self.shared[block].append("the bad blocks")
        # mke2fs does not count the blocks of numbers, the kernel would.
        sectors = [blocks * geometry.block_bytes // SECTOR_BYTES for blocks in (len(found), count)]
        if row["sectors"] not in sectors:
            self._report.add("inode 1 (bad blocks)", addr, f"{row['sectors']} sectors", sectors[0])

    async def _resize_inode(self, row: numpy.void, addr: int) -> None:
        """The inode that owns the blocks kept for more descriptors: its tree is what the geometry says."""
        import numpy

        geometry = self.geometry
        report = self._report
        name = "inode 7 (resize)"
        if not geometry.compat & Compat.RESIZE_INODE:
            if row["mode"] or row["links"] or row["block"].any():
                report.add(name, addr, "something", "nothing: the feature resize_inode is off")
            return
        reserved = geometry.superblock.reserved_gdt_blocks
        copies = [group for group in range(1, geometry.groups) if geometry.has_super(group)]
        sectors = (1 + reserved * (1 + len(copies))) * geometry.block_bytes // SECTOR_BYTES
        others = [int(block) for index, block in enumerate(row["block"]) if index != DOUBLE_INDIRECT]
        top = int(row["block"][DOUBLE_INDIRECT])
        one = numpy.array([top], numpy.int64)
        for found, expected in (
            (f"mode {row['mode']:#o}", None if stat.S_ISREG(int(row["mode"])) else "a file"),
            (f"{row['links']} links", None if row["links"] == 1 else "1"),
            (f"{row['sectors']} sectors", None if row["sectors"] == sectors else f"{sectors}"),
            (f"{row['dtime']} as time of deletion", None if not row["dtime"] else "0"),
            (f"flags {row['flags']:#x}", None if not row["flags"] else "0"),
            (f"block numbers {others}", None if not any(others) else "only one, doubly indirect"),
            (f"block {top}", None if self._good(one)[0] else "a block for files"),
            (f"attributes in block {row['file_acl']}", None if not row["file_acl"] else "none"),
        ):
            if expected is not None:
                report.add(name, addr, found, expected)
        if not self._good(one)[0]:
            return
        self._claim(one)
        if self._naming and top in self.shared:
            self.shared[top].append("inode 7")
        pointers = geometry.pointers_per_block
        start = geometry.descriptor_blocks.stop
        expected_top = numpy.zeros(pointers, numpy.int64)
        for index in range(reserved):
            expected_top[(len(geometry.descriptor_blocks) + index) % pointers] = start + index
        await self._same_numbers(name, top, expected_top)
        groups = numpy.array(copies, numpy.int64) * geometry.blocks_per_group
        for index in range(reserved):
            expected_below = numpy.zeros(pointers, numpy.int64)
            # More copies than numbers fit only in volumes that have copies everywhere.
            expected_below[: min(len(copies), pointers)] = (groups + start + index)[:pointers]
            await self._same_numbers(name, start + index, expected_below)

    async def _same_numbers(self, name: str, block: int, expected: NDArray[numpy.int64]) -> None:
        import numpy

        data = await self._reader.run(block, 1)
        found = numpy.frombuffer(data, "<u4").astype(numpy.int64)
        wrong = (found != expected).nonzero()[0]
        if len(wrong):
            index = int(wrong[0])
            where = block * self.geometry.block_bytes + index * 4
            self._report.add(name, where, f"block {found[index]}", f"block {expected[index]}")
