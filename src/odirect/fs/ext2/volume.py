"""An ext2 volume that is open: names, inodes and files over the metadata cache.

Every change is one plain function, run by `change`: it sees all that it needs in the cache or is run
again, and it happens as a whole or not at all. What it changed is in memory until `commit`, which
brings it to the device in the order that `commit.py` explains.

An inode that is used is kept in `_inodes`, and its record in the inode table is brought up to date by
`store` in the same function that changes it, so that forgetting an inode loses nothing. The records
of open files are pinned: what ends with an I/O cannot wait for a block.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import errno
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from odirect.base.errors import (
    CorruptionError,
    DirectoryError,
    ExistsError,
    MissingError,
    NoSpaceError,
    NotDirectoryError,
    ODirectError,
    PathError,
    ReadOnlyError,
    UnsupportedError,
)
from odirect.base.layout import Place
from odirect.base.units import align_up
from odirect.block.bio import READ
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice
from odirect.cache.metacache import FRESH, LATE, TREE, MetaCache
from odirect.cache.pagecache import PageCache
from odirect.dio.blockdev import transfer
from odirect.dio.completion import DeferredQueue
from odirect.dio.mapping import Extent, ExtentKind
from odirect.fs.base import (
    Attributes,
    DirEntry,
    FileKind,
    FileSystem,
    Finding,
    Making,
    NewFile,
    NewFiles,
    SpaceUse,
    TreeEntry,
    VolumeFile,
    kind_of,
)
from odirect.fs.ext2 import acl, bulk, bulk_create, directory, entries, format, grow, xattr
from odirect.fs.ext2.allocate import Allocator, NeedsCommit
from odirect.fs.ext2.blockmap import BlockMap
from odirect.fs.ext2.commit import Committer
from odirect.fs.ext2.geometry import Geometry, read_geometry
from odirect.fs.ext2.inode import Ext2Inode
from odirect.fs.ext2.node import Ext2Node
from odirect.fs.file import NodeFile
from odirect.sched.scheduler import Scheduler

T = TypeVar("T")

# Inodes kept although nobody has them open.
_MOST_INODES = 4096
# A commit is begun when so many bytes of metadata wait for one.
_DIRTY_BYTES = 32 << 20
# How many new links are remembered before those that are on the disk are forgotten.
_MOST_LINKED = 1024
_TIME_MOST = 0xFFFFFFFF
# Directories of more blocks get an index of their names in memory; so many have one at once.
_INDEXED_BLOCKS = 4
_MOST_INDEXES = 16

_TYPES = {
    stat.S_IFREG: format.FileType.REGULAR,
    stat.S_IFDIR: format.FileType.DIRECTORY,
    stat.S_IFCHR: format.FileType.CHARACTER,
    stat.S_IFBLK: format.FileType.BLOCK,
    stat.S_IFIFO: format.FileType.FIFO,
    stat.S_IFSOCK: format.FileType.SOCKET,
    stat.S_IFLNK: format.FileType.SYMLINK,
}
_KINDS = {
    format.FileType.REGULAR: FileKind.REGULAR,
    format.FileType.DIRECTORY: FileKind.DIRECTORY,
    format.FileType.CHARACTER: FileKind.CHARACTER,
    format.FileType.BLOCK: FileKind.BLOCK,
    format.FileType.FIFO: FileKind.FIFO,
    format.FileType.SOCKET: FileKind.SOCKET,
    format.FileType.SYMLINK: FileKind.SYMLINK,
}


class Ext2(FileSystem):
    """An open ext2 (or, for reading, clean ext3) volume. Made by `open_ext2`."""

    kind = "ext2"
    most_ahead = 15
    root = format.ROOT_INODE

    def __init__(
        self,
        device: BlockDevice,
        geometry: Geometry,
        *,
        writable: bool,
        scheduler: Scheduler,
        clock_ns: Callable[[], int],
        privileged: bool = False,
    ) -> None:
        self.device = device
        self.geometry = geometry
        self.name = geometry.name
        self.block_bytes = geometry.block_bytes
        self.uuid = geometry.superblock.uuid
        self.label = geometry.superblock.volume_name.rstrip(b"\0")
        self.features = _feature_names(geometry)
        self.max_file_bytes = geometry.max_file_bytes
        self.small_file_bytes = bulk_create.most_bytes(geometry)
        self.cache = MetaCache(device, geometry.block_bytes, name=geometry.name)
        self.page_cache = PageCache()
        self.allocator = Allocator(geometry, self.cache)
        self.committer = Committer(self)
        #: Whether the blocks that are kept for root may be used.
        self.privileged = privileged
        self.now_ns = clock_ns
        self._scheduler = scheduler
        self._writable = writable
        self._deferred: DeferredQueue | None = None
        self._inodes: collections.OrderedDict[int, Ext2Inode] = collections.OrderedDict()
        self._maps: dict[int, tuple[Ext2Inode, BlockMap]] = {}
        self._nodes: dict[int, Ext2Node] = {}
        #: Inodes that got another name, each with how many commits there had been.
        self._linked: dict[int, int] = {}
        # By directory: every name, and the block that it is in.
        self._names: dict[int, dict[bytes, int]] = {}
        self._closed = False
        #: Those who read blocks of files that they have not open.
        self.readers = 0
        self._bulk = memoryview(b"")

    # What the parts of a volume ask of it.

    @property
    def writable(self) -> bool:
        """See `FileSystem`."""
        return self._writable and self.committer.error is None

    def check_writable(self) -> None:
        """Raise ReadOnlyError unless changes are taken; what made it read-only if something failed."""
        if not self._writable:
            raise ReadOnlyError("the volume is open for reading only", path=self.name)
        if self.committer.error is not None:
            raise ReadOnlyError(
                f"the volume takes no more changes, because one could not be written: {self.committer.error}",
                path=self.name,
            )

    def deferred(self) -> DeferredQueue:
        """See `fs.file.Home`."""
        if self._deferred is None:
            self._deferred = DeferredQueue(self._scheduler)
        return self._deferred

    def inode(self, number: int) -> Ext2Inode:
        """The inode of this number. Plain; BlockMiss, CorruptionError."""
        found = self._inodes.get(number)
        if found is None:
            if number < self.geometry.first_inode and number != self.root:
                # The journal, the blocks kept for more descriptors and their like, which no name can lead to.
                expected = f"{self.root}, or a number from {self.geometry.first_inode} on"
                raise self.geometry.inode_structure(number).corrupt("a name of a reserved inode", expected)
            block, offset = self.geometry.inode_place(self.cache, number)
            raw = self.cache.get(block)[offset : offset + self.geometry.inode_bytes]
            found = self._inodes[number] = Ext2Inode.parse(self.geometry, number, raw)
        else:
            self._inodes.move_to_end(number)
        return found

    def map_of(self, inode: Ext2Inode) -> BlockMap:
        """Where the blocks of `inode` are."""
        found = self._maps.get(inode.number)
        if found is None or found[0] is not inode:
            found = self._maps[inode.number] = inode, BlockMap(self.geometry, self.cache, inode)
        return found[1]

    def store(self, inode: Ext2Inode) -> None:
        """Bring the record of `inode` up to date, in the running change. BlockMiss unless it is open."""
        record = self._record(inode.number)
        try:
            inode.store(self.geometry, record)
        except ValueError as error:
            # What callers give has been looked at before, so it is a count that the disk had wrong.
            structure = self.geometry.inode_structure(inode.number)
            raise structure.corrupt(str(error), "counts that its record can hold") from error

    def _record(self, number: int) -> memoryview:
        """The record of an inode, to be changed."""
        block, offset = self.geometry.inode_place(self.cache, number)
        return self.cache.change(block, TREE)[offset : offset + self.geometry.inode_bytes]

    def note_large(self, inode: Ext2Inode) -> None:
        """Say in the superblock that there is a file whose size needs more than 31 bits."""
        if inode.size > 0x7FFFFFFF and inode.is_file:
            now = self.allocator.superblock()
            if not now.feature_ro_compat & format.ReadOnlyCompat.LARGE_FILE:
                features = now.feature_ro_compat | format.ReadOnlyCompat.LARGE_FILE
                self._set_feature(feature_ro_compat=features)

    def _set_feature(self, **fields: int) -> None:
        """Set features in the superblock. Revision 0 has none, so it becomes revision 1, as the kernel has it."""
        if self.allocator.superblock().rev_level == format.REV_ORIGINAL:
            fields["rev_level"] = format.REV_DYNAMIC
            fields["first_ino"] = format.FIRST_INODE_REV0
            fields["inode_size"] = format.GOOD_OLD_INODE_BYTES
        self.allocator.change_superblock(**fields)

    def available_blocks(self) -> int:
        """Blocks that a write may still ask for."""
        return max(0, self.allocator.room(privileged=self.privileged))

    def no_space(self) -> NoSpaceError:
        """What is raised where no block is left that may be asked for; those that wait for a commit count as left."""
        return NoSpaceError("no space is left on the volume", path=self.name)

    async def change(self, fn: Callable[[], T]) -> T:
        """What `fn` returns; it happens as a whole or not at all. Commits where `fn` asks for that."""
        self.check_writable()
        self._forget_some()
        result = await self.committer.perform(fn)
        if self.cache.dirty_blocks * self.block_bytes > _DIRTY_BYTES:
            await self.commit()
        return result

    async def commit(self, *, times: bool = True) -> None:
        """Make durable what is on the device and all metadata as it is now."""
        if times:
            with self.cache.transaction():
                for node in self._nodes.values():
                    if node.stale:
                        node.stale = False
                        self.store(node.meta)
        await self.committer.commit()

    # Names.

    async def lookup(self, directory: int, name: bytes) -> int:
        """See `FileSystem`."""
        self._forget_some()
        await self._index(directory)
        return await self.cache.load(lambda: self._found(self._directory(directory), name).inode)

    async def entries(self, directory_inode: int) -> list[DirEntry]:
        """See `FileSystem`."""

        def read() -> list[DirEntry]:
            inode = self._directory(directory_inode)
            return [
                DirEntry(entry.name, entry.inode, _KINDS.get(format.FileType(entry.file_type), FileKind.UNKNOWN))
                for entry in directory.list_all(self.cache, self.map_of(inode), inode)
                if entry.name not in (b".", b"..")
            ]

        return await self.cache.load(read)

    async def create(
        self,
        directory: int,
        name: bytes,
        mode: int,
        *,
        uid: int = 0,
        gid: int = 0,
        device_number: int = 0,
        target: bytes = b"",
    ) -> int:
        """See `FileSystem`."""
        file_type = _TYPES.get(stat.S_IFMT(mode))
        if file_type is None:
            raise ValueError(f"mode {mode:o} says no kind of file")
        is_symlink = file_type is format.FileType.SYMLINK
        if is_symlink and not target:
            raise MissingError("a symbolic link must lead somewhere", path=name)
        self._check_name(name)

        await self._index(directory)

        def make() -> int:
            parent = self._directory(directory)
            self._check_free(parent, name)
            if is_symlink and len(target) >= self.block_bytes:
                raise PathError(
                    f"a symbolic link of {len(target)} bytes: one block of {self.block_bytes} must hold it and a zero",
                    errno=errno.ENAMETOOLONG,
                )
            now = self.now_ns()
            is_dir = file_type is format.FileType.DIRECTORY
            number = self.allocator.new_inode(parent, is_dir)
            inode = self._new_inode(number, mode, uid, gid, now)
            if parent.mode & stat.S_ISGID:
                inode.gid = parent.gid
                inode.mode |= stat.S_ISGID if is_dir else 0
            default = None if is_symlink else self._acls(parent).get(acl.DEFAULT)
            inherited: dict[bytes, bytes] = {}
            if default is not None:
                inherited = acl.inherit(inode, default, self.geometry.inode_structure(parent.number))
            if is_dir:
                self._add_link(parent)
                inode.links = 2
                entries.make_directory_block(self, inode, parent.number)
            elif is_symlink:
                self._set_target(inode, target)
            elif file_type in (format.FileType.CHARACTER, format.FileType.BLOCK):
                inode.device_number = device_number
            if inherited:
                self._replace_xattrs(inode, inherited)
            else:
                self.store(inode)
            self._add_name(parent, name, number, file_type)
            self._touch_directory(parent, now)
            return number

        return await self.change(make)

    async def link(self, inode: int, directory: int, name: bytes) -> None:
        """See `FileSystem`."""
        self._check_name(name)

        await self._index(directory)

        def make() -> None:
            parent = self._directory(directory)
            self._check_free(parent, name)
            target = self._live(inode)
            if target.is_dir:
                raise PathError("a directory has one name", errno=errno.EPERM, path=name)
            now = self.now_ns()
            target.remember(self.cache)
            self._add_link(target)
            target.ctime_ns = now
            self.store(target)
            self._add_name(parent, name, inode, _TYPES[stat.S_IFMT(target.mode)])
            self._touch_directory(parent, now)
            self._note_link(inode)

        await self.change(make)

    async def unlink(self, directory: int, name: bytes) -> None:
        """See `FileSystem`."""

        await self._index(directory)

        def remove() -> int:
            parent = self._directory(directory)
            found = self._found(parent, name)
            inode = self._live(found.inode)
            if inode.is_dir:
                raise DirectoryError("it is a directory", path=name)
            now = self.now_ns()
            self._remove_name(parent, name, found)
            self._touch_directory(parent, now)
            self._drop_link(inode, now)
            return inode.number

        await self._free_unused(await self.change(remove))

    async def rmdir(self, directory: int, name: bytes) -> None:
        """See `FileSystem`."""
        if name in (b".", b".."):
            number = errno.EINVAL if name == b"." else errno.ENOTEMPTY
            raise PathError("a directory is not removed by this name", errno=number, path=name)

        await self._index(directory)

        def remove() -> int:
            parent = self._directory(directory)
            found = self._found(parent, name)
            inode = self._live(found.inode)
            self._check_removable(inode, name)
            now = self.now_ns()
            self._remove_name(parent, name, found)
            parent.remember(self.cache)
            parent.links -= 1
            self._touch_directory(parent, now)
            inode.remember(self.cache)
            inode.links = 1
            self._drop_link(inode, now)
            return inode.number

        await self._free_unused(await self.change(remove))

    async def rename(self, old_directory: int, old_name: bytes, new_directory: int, new_name: bytes) -> None:
        """See `FileSystem`."""
        if old_name in (b".", b"..") or new_name in (b".", b".."):
            raise PathError("a directory is not renamed by this name", errno=errno.EBUSY, path=old_name)
        self._check_name(new_name)

        await self._index(old_directory)
        await self._index(new_directory)

        def move() -> int:
            old, new = self._directory(old_directory), self._directory(new_directory)
            source = self._found(old, old_name)
            inode = self._live(source.inode)
            target = self._find(new, new_name)
            if target is not None and target.inode == source.inode:
                return 0
            now = self.now_ns()
            if inode.is_dir:
                self._check_not_below(inode, new)
            replaced: Ext2Inode | None = None
            if target is not None:
                replaced = self._live(target.inode)
                if replaced.is_dir and any(above is replaced for above in self._line_up(old)):
                    raise PathError("the directory is not empty", errno=errno.ENOTEMPTY, path=new_name)
                self._check_replaceable(inode, replaced, new_name)
                if self._has_new_link(replaced):
                    # The name that it loses and the one that it has got would be written in any order.
                    raise NeedsCommit("another name of what is replaced is not on the disk yet")
            for touched in (old, new, inode):
                touched.remember(self.cache)
            file_type = _TYPES[stat.S_IFMT(inode.mode)]
            if target is not None:
                entries.replace_entry(self, new, target, inode.number, file_type)
            else:
                if inode.is_dir and old is not new:
                    self._check_link_room(new)
                self._add_name(new, new_name, inode.number, file_type)
            self._remove_name(old, old_name, self._found(old, old_name))
            if inode.is_dir:
                if old is not new:
                    parent, written_ns = self._found(inode, b".."), inode.mtime_ns
                    entries.replace_entry(self, inode, parent, new.number, format.FileType.DIRECTORY)
                    inode.mtime_ns = written_ns  # Its names are what they were (as the kernel has it).
                    old.links -= 1
                    new.links += 1
                if replaced is not None:
                    new.links -= 1
            inode.ctime_ns = now
            self.store(inode)
            self._touch_directory(old, now)
            self._touch_directory(new, now)
            if replaced is None:
                return 0
            replaced.remember(self.cache)
            if replaced.is_dir:
                replaced.links = 1
            self._drop_link(replaced, now)
            return replaced.number

        number = await self.change(move)
        if number:
            await self._free_unused(number)

    # Attributes.

    async def attributes(self, inode: int) -> Attributes:
        """See `FileSystem`."""
        self._forget_some()
        found = await self.cache.load(lambda: self.inode(inode))
        node = self._nodes.get(inode)
        return Attributes(
            inode,
            found.mode,
            found.links,
            found.uid,
            found.gid,
            found.size if node is None else node.size_bytes,
            found.sectors,
            self.block_bytes,
            found.atime_ns,
            found.mtime_ns,
            found.ctime_ns,
            found.device_number,
        )

    async def set_attributes(
        self,
        inode: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """See `FileSystem`."""
        for owner in (uid, gid):
            if owner is not None and not 0 <= owner <= 0xFFFFFFFF:
                raise ValueError(f"{owner} is no owner: they are of 32 bits")

        def change() -> None:
            found = self._live(inode)
            found.remember(self.cache)
            if mode is not None:
                found.mode = stat.S_IFMT(found.mode) | stat.S_IMODE(mode)
                self._follow_mode(found)
            elif (uid is not None or gid is not None) and not found.is_dir:
                # Who gets a file does not get the right to run it as somebody else (as the kernel has it).
                found.mode &= ~(stat.S_ISUID | (stat.S_ISGID if found.mode & stat.S_IXGRP else 0))
            if uid is not None:
                found.uid = uid
            if gid is not None:
                found.gid = gid
            if atime_ns is not None:
                found.atime_ns = atime_ns
            if mtime_ns is not None:
                found.mtime_ns = mtime_ns
            found.ctime_ns = self.now_ns()
            self.store(found)

        await self.change(change)

    async def read_link(self, inode: int) -> bytes:
        """See `FileSystem`."""

        def read() -> bytes:
            found = self.inode(inode)
            if not found.is_symlink:
                raise PathError("it is not a symbolic link", errno=errno.EINVAL)
            if found.is_fast_symlink(self.geometry):
                return found.fast_target(self.geometry)
            place = self.geometry.inode_structure(inode)
            if not 0 < found.size < self.block_bytes:
                raise place.corrupt(f"a symbolic link of {found.size} bytes", f"1 to {self.block_bytes - 1}")
            run = self.map_of(found).lookup(0, 1)
            if not run.block:
                raise place.corrupt("a symbolic link without a block", "one block")
            target = bytes(self.cache.get(run.block)[: found.size])
            if 0 in target:
                raise place.corrupt(f"link {target!r}", "no zero byte in it")
            return target

        return await self.cache.load(read)

    async def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """See `FileSystem`."""
        return await self.cache.load(lambda: self._xattrs(self.inode(inode)))

    async def set_xattr(self, inode: int, name: bytes, value: bytes | None) -> None:
        """See `FileSystem`."""
        xattr.check_name(name)

        def change() -> None:
            found = self._live(inode)
            if name.startswith(b"user.") and not (found.is_file or found.is_dir):
                # The kernel's rule: permissions of others say nothing about who may write to them.
                raise PathError("only files and directories have attributes of users", errno=errno.EPERM, path=name)
            before = self._xattrs(found)
            attributes = dict(before)
            found.remember(self.cache)
            if name in acl.NAMES:
                if not acl.put(found, attributes, name, value):
                    return
            elif value is None:
                if name not in attributes:
                    raise PathError("there is no such attribute", errno=errno.ENODATA, path=name)
                del attributes[name]
            else:
                attributes[name] = value
            found.ctime_ns = self.now_ns()
            if attributes == before:
                self.store(found)
            else:
                self._replace_xattrs(found, attributes)

        await self.change(change)

    # Files.

    async def tree(self, directory: int) -> list[TreeEntry]:
        """See `FileSystem`."""
        return await bulk.tree(self, directory)

    async def with_xattrs(self, inodes: Sequence[int]) -> set[int]:
        """See `FileSystem`."""
        return await bulk.with_xattrs(self, inodes)

    async def read_whole(self, inodes: Sequence[int]) -> list[bytes]:
        """See `FileSystem`."""
        return await bulk.read_whole(self, inodes)

    async def create_whole(self, files: Sequence[NewFile]) -> list[int]:
        """See `FileSystem`."""
        for file in files:
            self._check_name(file.name)
        inheriting: set[int] = set()
        for number in dict.fromkeys(file.directory for file in files):
            await self._index(number)
            if await self.inherited_mode(number) is not None:
                inheriting.add(number)
        numbers: list[int] = []
        small: list[NewFile] = []
        for file in files:
            if len(file.content) <= self.small_file_bytes and file.directory not in inheriting:
                small.append(file)
                continue
            numbers += await bulk_create.create_whole(self, small)
            numbers += await super().create_whole([file])
            small.clear()
        return numbers + await bulk_create.create_whole(self, small)

    async def inherited_mode(self, directory: int) -> int | None:
        """See `FileSystem`."""

        def read() -> int | None:
            parent = self._directory(directory)
            default = self._acls(parent).get(acl.DEFAULT)
            return None if default is None else acl.most(default, self.geometry.inode_structure(directory))

        return await self.cache.load(read)

    async def begin_whole(self, files: NewFiles) -> Making:
        """See `FileSystem`."""
        if not _are_names(files.names):
            for name in files.names:
                self._check_name(name)
        for number in dict.fromkeys(files.directories.tolist()):
            await self._index(number)
        if len(files.sizes) and int(files.sizes.max()) > self.small_file_bytes:
            return await super().begin_whole(files)
        return await bulk_create.begin(self, files)

    def give_back(self, runs: Sequence[tuple[int, int]]) -> None:
        """Free blocks that were allocated and that nothing leads to. Their bitmaps are in the cache since."""
        with self.cache.transaction():
            for block, count in runs:
                self.allocator.free_run(block, count, never_used=True)

    def new_files(self, directory_inode: int, names: Sequence[bytes]) -> list[int]:
        """The numbers of new inodes for files that `name_files` will name. Plain, for changes; ExistsError."""
        parent = self._directory(directory_inode)
        known = self._names.get(directory_inode)
        if known is None:
            known = directory.index(self.cache, self.map_of(parent), parent)
        fresh = set(names)
        if len(fresh) < len(names) or not fresh.isdisjoint(known):
            seen = set(known)
            for name in names:
                if name in seen:
                    raise ExistsError("the name is taken", path=name)
                seen.add(name)
        numbers = self.allocator.new_files(parent, len(names))
        for number in numbers:
            # What is known of a free inode ends here.
            self._inodes.pop(number, None)
            self._maps.pop(number, None)
        return numbers

    def name_files(self, directory_inode: int, names: Sequence[bytes], numbers: Sequence[int], now_ns: int) -> None:
        """Put the names of new files into their directory; the inodes' records are the caller's. Plain, for changes."""
        parent = self._directory(directory_inode)
        file_type = format.FileType.REGULAR
        added = [(name, number, file_type) for name, number in zip(names, numbers, strict=True)]
        blocks = entries.add_entries(self, parent, added)
        known = self._names.get(directory_inode)
        if known is not None:
            known.update(zip(names, blocks, strict=True))
            self.cache.undo(lambda: [known.pop(name, None) for name in names])
        self._touch_directory(parent, now_ns)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While somebody reads blocks of files that he has not open, none that is freed is given to another file."""
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1

    def node(self, number: int) -> Ext2Node | None:
        """The open file of this inode, if it is open."""
        return self._nodes.get(number)

    def open_among(self, numbers: Sequence[int]) -> list[int]:
        """Which of these inodes are open files, as indices."""
        if not self._nodes:
            return []
        return [index for index, number in enumerate(numbers) if number in self._nodes]

    def bulk_memory(self, length: int) -> memoryview:
        """Memory for one bulk reader, kept for the next; another who comes meanwhile gets his own."""
        if self.readers > 1 or len(self._bulk) < length:
            fresh = empty(length)
            if self.readers > 1:
                return fresh
            self._bulk = fresh
        return self._bulk

    async def open_file(self, inode: int, *, writable: bool) -> VolumeFile:
        """See `FileSystem`."""
        if writable:
            self.check_writable()

        def find() -> Ext2Inode:
            found = self._live(inode)
            block, _ = self.geometry.inode_place(self.cache, inode)
            self.cache.get(block)
            return found

        found = await self.cache.load(find)
        if found.is_dir:
            raise DirectoryError("it is a directory", path=self.name)
        if not found.is_file:
            raise UnsupportedError(f"a {kind_of(found.mode).value} has no bytes in a volume", path=self.name)
        node = self._nodes.get(inode)
        if node is None:
            found = await self.cache.load(find)
            node = self._nodes.get(inode)  # Somebody else may have opened it meanwhile.
        if node is None:
            node = self._nodes[inode] = Ext2Node(self, found)
            self.cache.pin(self.geometry.inode_place(self.cache, inode)[0])
        return NodeFile(node, inode, self.name, writable=writable)

    async def last_handle_closed(self, node: Ext2Node) -> None:
        """Write back what is left of a file, or free it if it has no name. An error is raised when it is let go."""
        number = node.meta.number
        failed: ODirectError | None = None
        while node.in_flight.value or node.pages.dirty_bytes:
            await node.in_flight.zero()
            await node.pages.wait_write_back(0, max(node.size_bytes, node.pages.end_bytes, 1))
            if not node.meta.links:
                node.pages.truncate(0)
                break
            try:
                await node.pages.write_back(0, max(node.size_bytes, 1))
            except ODirectError as error:
                failed = failed or error
        if self.writable and not node.handles:
            await self.change(lambda: self.allocator.free_spares(number))
        if node.handles or self._nodes.get(number) is not node:
            if failed is not None:
                raise failed
            return  # It was opened again meanwhile.
        node.settle()
        if node.stale:
            node.stale = False
            with self.cache.transaction():
                self.store(node.meta)
        node.pages.truncate(0)
        del self._nodes[number]
        self.cache.unpin(self.geometry.inode_place(self.cache, number)[0])
        if not node.meta.links:
            await self._free_unused(number)
        if failed is not None:
            raise failed

    async def extents_of(self, inode: Ext2Inode, size: int, offset: int, length: int) -> list[Extent]:
        """The extents of a range of a file of `size` bytes, holes included."""
        block_bytes = self.block_bytes
        first = offset // block_bytes
        end = align_up(min(offset + length, size), block_bytes) // block_bytes
        found: list[Extent] = []
        while first < end:
            block = first
            run = await self.cache.load(lambda block=block: self.map_of(inode).lookup(block, end - block))  # type: ignore[misc]
            at, count = first * block_bytes, run.count * block_bytes
            last = found[-1] if found else None
            if run.block:
                extent = Extent(ExtentKind.MAPPED, at, count, self.device, run.block * block_bytes)
            else:
                extent = Extent(ExtentKind.HOLE, at, count)
            if (
                last is not None
                and last.kind is extent.kind
                and (last.addr is None or last.addr + last.length == extent.addr)
            ):
                found[-1] = last._replace(length=last.length + count)
            else:
                found.append(extent)
            first += run.count
        return found

    # The volume.

    async def space(self) -> SpaceUse:
        """See `FileSystem`."""
        superblock = self.geometry.superblock
        free = self.allocator.free_blocks - self.allocator.reserved
        return SpaceUse(
            self.block_bytes,
            self.geometry.blocks_count,
            free,
            max(0, free - superblock.r_blocks_count),
            self.geometry.inodes_count,
            self.allocator.free_inodes,
            format.NAME_BYTES,
            await self.cache.load(self._overhead),
        )

    def _overhead(self) -> int:
        """How many blocks are bookkeeping from the start: what a mount takes off what it says it has. Plain; BlockMiss.

        Source: the kernel's ext4_calculate_overhead (bsddf), compared with mounts.
        """
        geometry = self.geometry
        found = geometry.superblock
        blocks = found.first_data_block + geometry.groups * (2 + geometry.table_blocks)
        blocks += geometry.all_super_blocks
        if geometry.compat & format.Compat.HAS_JOURNAL and found.journal_inum:
            try:
                block, offset = geometry.inode_place(self.cache, found.journal_inum)
                raw = self.cache.get(block)[offset : offset + geometry.inode_bytes]
                blocks += Ext2Inode.parse(geometry, found.journal_inum, raw).size // self.block_bytes
            except CorruptionError:
                pass  # A journal that is none takes nothing; `check` says more.
        return blocks

    async def check(self) -> list[Finding]:
        """See `FileSystem`."""
        from odirect.fs.ext2.check import check

        if self._writable:
            await self.sync()
        return await check(self)

    async def sync(self) -> None:
        """See `FileSystem`."""
        for node in list(self._nodes.values()):
            await node.pages.write_back(0, max(node.size_bytes, 1))
            node.settle()
        await self.commit()

    async def close(self) -> None:
        """See `FileSystem`."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._writable and self.committer.error is None:
                for node in list(self._nodes.values()):
                    node.handles = 0
                    await self.last_handle_closed(node)
                await self.sync()
                await self._set_state(clean=True)
        finally:
            self._writable = False

    async def begin(self) -> None:
        """Get ready to be used; for writing, say on the disk that it is in use."""
        await self.cache.load(lambda: self.geometry.load_fixed(self.cache))
        await self.cache.load(self.allocator.load)
        root = await self.cache.load(lambda: self.inode(self.root))
        if not root.is_dir:
            raise self.geometry.inode_structure(self.root).corrupt(f"mode {root.mode:o}", "the root directory")
        if self._writable:
            await self._set_state(clean=False)

    # Plain functions, for changes.

    def _directory(self, number: int) -> Ext2Inode:
        inode = self.inode(number)
        if not inode.is_dir:
            raise NotDirectoryError("it is not a directory", path=self.name)
        if not inode.links:
            raise MissingError("the directory has been removed", path=self.name)
        return inode

    def _live(self, number: int) -> Ext2Inode:
        """The inode of a name or handle, which must be in use."""
        inode = self.inode(number)
        if not inode.links and number not in self._nodes:
            raise self.geometry.inode_structure(number).corrupt("an inode without links", "one in use")
        return inode

    def _found(self, parent: Ext2Inode, name: bytes) -> directory.FoundEntry:
        if len(name) > format.NAME_BYTES:
            raise PathError(f"a name of {len(name)} bytes", errno=errno.ENAMETOOLONG, path=name)
        found = self._find(parent, name)
        if found is None:
            raise MissingError("no such name", path=name)
        return found

    def _find(self, parent: Ext2Inode, name: bytes) -> directory.FoundEntry | None:
        """Where a name is; by the directory's index, where it has one."""
        names = self._names.get(parent.number)
        if names is None:
            return directory.find(self.cache, self.map_of(parent), parent, name)
        block = names.get(name)
        if block is None:
            return None
        return directory.find_in_block(self.cache, self.map_of(parent), parent, block, name)

    async def _index(self, number: int) -> None:
        """Make an index of a large directory's names, unless there is one. Its changes keep it right."""
        if number in self._names:
            return
        inode = await self.cache.load(lambda: self.inode(number))
        if not inode.is_dir or inode.size <= _INDEXED_BLOCKS * self.block_bytes:
            return
        names = await self.cache.load(lambda: directory.index(self.cache, self.map_of(inode), inode))
        if len(self._names) >= _MOST_INDEXES:
            self._names.clear()
        self._names[number] = names

    def _add_name(self, parent: Ext2Inode, name: bytes, number: int, file_type: int) -> None:
        block = entries.add_entry(self, parent, name, number, file_type)
        names = self._names.get(parent.number)
        if names is not None:
            names[name] = block
            self.cache.undo(lambda: names.pop(name, None))

    def _remove_name(self, parent: Ext2Inode, name: bytes, found: directory.FoundEntry) -> None:
        entries.remove_entry(self, parent, found)
        names = self._names.get(parent.number)
        if names is not None:
            names.pop(name, None)
            self.cache.undo(lambda: names.__setitem__(name, found.block))

    def _check_free(self, parent: Ext2Inode, name: bytes) -> None:
        if self._find(parent, name) is not None:
            raise ExistsError("the name is taken", path=name)

    def _check_name(self, name: bytes) -> None:
        if len(name) > format.NAME_BYTES:
            raise PathError(f"a name of {len(name)} bytes", errno=errno.ENAMETOOLONG, path=name)
        if not name or b"/" in name or b"\0" in name:
            raise ValueError(f"{name!r} is not a name")
        if name in (b".", b".."):
            raise ExistsError("the name is taken", path=name)

    def _check_link_room(self, inode: Ext2Inode) -> None:
        if inode.links >= format.LINK_MAX:
            raise PathError(f"it has {inode.links} links, the most that there can be", errno=errno.EMLINK)

    def _add_link(self, inode: Ext2Inode) -> None:
        self._check_link_room(inode)
        inode.remember(self.cache)
        inode.links += 1

    def _check_removable(self, inode: Ext2Inode, name: bytes) -> None:
        if not inode.is_dir:
            raise NotDirectoryError("it is not a directory", path=name)
        if inode.number == self.root:
            raise PathError("it is the root directory", errno=errno.EBUSY, path=name)
        if not entries.is_empty(self, inode):
            raise PathError("the directory is not empty", errno=errno.ENOTEMPTY, path=name)

    def _check_replaceable(self, inode: Ext2Inode, replaced: Ext2Inode, name: bytes) -> None:
        if inode.is_dir:
            self._check_removable(replaced, name)
        elif replaced.is_dir:
            raise DirectoryError("it is a directory", path=name)

    def _check_not_below(self, inode: Ext2Inode, place: Ext2Inode) -> None:
        """Raise EINVAL if `place` is `inode`, or somewhere in it."""
        if inode.number == self.root:
            structure = self.geometry.inode_structure(place.number)
            raise structure.corrupt("the root directory under another name", "names of other inodes")
        if any(above is inode for above in self._line_up(place)):
            raise PathError("a directory cannot be moved into itself", errno=errno.EINVAL)

    def _line_up(self, place: Ext2Inode) -> Iterator[Ext2Inode]:
        """A directory and all that it is in, but for the root."""
        seen: set[int] = set()
        while place.number != self.root:
            if place.number in seen:
                structure = self.geometry.inode_structure(place.number)
                raise structure.corrupt("directories that are each other's parents", "a way to the root")
            seen.add(place.number)
            yield place
            place = self._directory(self._found(place, b"..").inode)

    def _new_inode(self, number: int, mode: int, uid: int, gid: int, now: int) -> Ext2Inode:
        """An inode in a record that the allocator has just cleared."""
        inode = Ext2Inode.create(self.geometry, number, mode, now)
        block, offset = self.geometry.inode_place(self.cache, number)
        place = self.geometry.inode_structure(number)
        inode.generation = format.INODE.read(self.cache.get(block), offset, place).generation
        inode.uid, inode.gid, inode.links = uid, gid, 1
        self._inodes[number] = inode
        self._maps.pop(number, None)
        self.cache.undo(lambda: self._inodes.pop(number, None))
        return inode

    def _set_target(self, inode: Ext2Inode, target: bytes) -> None:
        inode.size = len(target)
        if len(target) < format.FAST_SYMLINK_BYTES:
            inode.block[: len(target)] = target
            return
        block = self._one_block(inode)
        self.cache.create(block, FRESH)[: len(target)] = target
        struct.pack_into("<I", inode.block, 0, block)
        inode.sectors += self.block_bytes // format.SECTOR_BYTES

    def _one_block(self, inode: Ext2Inode) -> int:
        """A block for metadata of `inode`, next to its other blocks."""
        if not self.available_blocks():
            raise self.no_space()
        block, _ = self.allocator.find_run(grow.goal_of(self, inode), 1)
        return block

    def _touch_directory(self, inode: Ext2Inode, now: int) -> None:
        inode.remember(self.cache)
        inode.mtime_ns = inode.ctime_ns = now
        self.store(inode)

    def _note_link(self, number: int) -> None:
        """An inode gets one more name. To be on the safe side this is not undone."""
        done = self.committer.done
        if len(self._linked) > _MOST_LINKED:
            self._linked = {other: at for other, at in self._linked.items() if done < at + 2}
        self._linked[number] = done

    def _has_new_link(self, inode: Ext2Inode) -> bool:
        """Whether another name of `inode` may not be on the disk: one commit may have been running already."""
        return inode.links > 1 and not inode.is_dir and self.committer.done < self._linked.get(inode.number, -2) + 2

    def _drop_link(self, inode: Ext2Inode, now: int) -> None:
        """One name less. The record of one that has none left changes on disk after the names (LATE)."""
        inode.remember(self.cache)
        inode.links -= 1
        inode.ctime_ns = now
        self.allocator.hold_record(inode.number)
        self.store(inode)

    def _acls(self, inode: Ext2Inode) -> dict[bytes, bytes]:
        """Those of its attributes that are access control lists."""
        return self._xattrs(inode, only=xattr.ACLS)

    def _xattrs(self, inode: Ext2Inode, only: Sequence[int] | None = None) -> dict[bytes, bytes]:
        """The attributes of an inode; only: of these kinds."""
        block, offset = self.geometry.inode_place(self.cache, inode.number)
        raw = self.cache.get(block)[offset : offset + self.geometry.inode_bytes]
        found = xattr.read_inode(self.geometry, raw, self.geometry.inode_structure(inode.number), only=only)
        if inode.file_acl:
            place = Place(self.name, f"attributes of inode {inode.number}", inode.file_acl * self.block_bytes)
            self.geometry.check_data_block(inode.file_acl, place)
            found |= xattr.read_block(self.geometry, self.cache.get(inode.file_acl), place, only=only)
        return found

    def _replace_xattrs(self, inode: Ext2Inode, attributes: dict[bytes, bytes]) -> None:
        """Make `attributes` those of an inode, wherever its others are now, and store it."""
        old, inode.file_acl = inode.file_acl, 0
        if attributes:
            # Never in place: a block of which a part was written would lose them all.
            data = xattr.build_block(attributes, self.block_bytes)
            inode.file_acl = self._one_block(inode)
            self.cache.create(inode.file_acl, FRESH)[:] = data
            inode.sectors += self.block_bytes // format.SECTOR_BYTES
        if old:
            self._release_xattr_block(inode, old)
        self.store(inode)
        xattr.store_inode(self.geometry, self._record(inode.number), {})
        features = self.allocator.superblock().feature_compat
        if not features & format.Compat.EXT_ATTR:
            self._set_feature(feature_compat=features | format.Compat.EXT_ATTR)

    def _follow_mode(self, inode: Ext2Inode) -> None:
        """The mode of an inode was set: its access control list, where it has one, must say the same."""
        if inode.is_symlink or acl.ACCESS not in self._acls(inode):
            return
        before = self._xattrs(inode)
        attributes = dict(before)
        acl.follow_mode(inode, attributes, self.geometry.inode_structure(inode.number))
        if attributes != before:
            self._replace_xattrs(inode, attributes)

    def _release_xattr_block(self, inode: Ext2Inode, block: int) -> None:
        """`inode` lets go of a block of attributes, which other inodes may have too."""
        place = Place(self.name, f"attributes of inode {inode.number}", block * self.block_bytes)
        self.geometry.check_data_block(block, place)
        data = self.cache.get(block)
        header = format.XATTR_HEADER.read(data, 0, place)
        references = xattr.references(data, place)  # It must be what it is taken for: it may be somebody's data.
        inode.sectors -= self.block_bytes // format.SECTOR_BYTES
        if references > 1:
            format.XATTR_HEADER.write(header._replace(refcount=header.refcount - 1), self.cache.change(block, LATE), 0)
            return
        # It stays to be written: the record of a deleted inode leads to it until the deletion is on the device.
        self.allocator.free_run(block, 1)

    async def _free_unused(self, number: int) -> None:
        """Free an inode that has neither a name nor a handle, and its blocks."""

        def free() -> bool:
            inode = self.inode(number)
            if inode.links or number in self._nodes:
                return False
            inode.remember(self.cache)
            if inode.has_blocks(self.geometry) and grow.free_from(self, inode, 0):
                self.store(inode)
                return True
            if inode.file_acl:
                self._release_xattr_block(inode, inode.file_acl)
                inode.file_acl = 0
            was_dir = inode.is_dir
            inode.size = 0
            inode.dtime = min(self.now_ns() // 1_000_000_000, _TIME_MOST)
            self.store(inode)
            self.allocator.free_inode(number, was_dir)
            self._names.pop(number, None)  # Made anew if this is undone.
            known, blocks = self._inodes.pop(number), self._maps.pop(number, None)
            self.cache.undo(lambda: self._inodes.__setitem__(number, known))
            if blocks is not None:
                self.cache.undo(lambda: self._maps.__setitem__(number, blocks))
            return False

        while await self.change(free):
            # So large that it goes in steps. Its name must be gone before any of it is.
            await self.commit()

    def _forget_some(self) -> None:
        """Keep the number of inodes bounded. Between changes only: during one, somebody holds them."""
        if len(self._inodes) <= _MOST_INODES:
            return
        for number in list(self._inodes)[: _MOST_INODES // 4]:
            if number not in self._nodes:
                del self._inodes[number]
                self._maps.pop(number, None)

    async def _set_state(self, *, clean: bool) -> None:
        def change() -> None:
            now = self.allocator.superblock()
            seconds = min(self.now_ns() // 1_000_000_000, _TIME_MOST)
            state = now.state & ~format.State.CLEAN | (format.State.CLEAN if clean else 0)
            opened = {} if clean else {"mtime": seconds, "mnt_count": min(now.mnt_count + 1, 0xFFFF)}
            self.allocator.change_superblock(state=state, wtime=seconds, **opened)

        await self.cache.load(change)
        await self.committer.commit()


def _are_names(names: Sequence[bytes]) -> bool:
    """Whether all of these can be names of files; in one go, because there are thousands."""
    joined = b"/".join(names)
    lengths = list(map(len, names))
    return (
        joined.count(b"/") == len(names) - 1
        and b"\0" not in joined
        and min(lengths) > 0
        and max(lengths) <= format.NAME_BYTES
        and b"." not in names
        and b".." not in names
    )


def _feature_names(geometry: Geometry) -> list[str]:
    """The features that are on, by the names that e2fsprogs has for them."""
    kinds: tuple[tuple[int, type[enum.IntFlag]], ...] = (
        (geometry.compat, format.Compat),
        (geometry.incompat, format.Incompat),
        (geometry.ro_compat, format.ReadOnlyCompat),
    )
    return [flag.name.lower() for bits, kind in kinds for flag in kind if bits & flag and flag.name]


async def read_superblock(device: BlockDevice) -> bytes:
    """The 1024 bytes at byte 1024 of the device; fewer if it ends before."""
    unit = max(device.limits.read_align, device.limits.memory_align)
    first = format.SUPERBLOCK_ADDR - format.SUPERBLOCK_ADDR % unit
    end = align_up(format.SUPERBLOCK_ADDR + format.SUPERBLOCK_BYTES, unit)
    memory = empty(end - first)
    count = await transfer(device, READ, first, [memory], len(memory))
    start = format.SUPERBLOCK_ADDR - first
    return bytes(memory[start : min(count, start + format.SUPERBLOCK_BYTES)])


async def open_ext2(
    device: BlockDevice,
    *,
    name: str,
    writable: bool,
    scheduler: Scheduler,
    clock_ns: Callable[[], int],
    privileged: bool = False,
) -> Ext2:
    """The ext2 volume on `device`, ready for use. The device stays the caller's.

    Raises CorruptionError, UnsupportedError for what is not ext2 (features by name), ReadOnlyError with
    the reason where it cannot be written: it is ext3 or ext4, or was not closed cleanly.
    """
    data = await read_superblock(device)
    geometry = read_geometry(data, name=name, device_bytes=device.size_bytes)
    refusal = geometry.read_refusal()
    if refusal is not None:
        raise UnsupportedError(refusal, path=name)
    if writable:
        refusal = geometry.write_refusal()
        if refusal is not None:
            raise ReadOnlyError(refusal, path=name)
    volume = Ext2(device, geometry, writable=writable, scheduler=scheduler, clock_ns=clock_ns, privileged=privileged)
    await volume.begin()
    return volume
