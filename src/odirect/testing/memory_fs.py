"""A file system in memory, which answers as Linux does: what real ones are compared with.

The files are `ModelFile`s. Errors, link counts, times and the rules of rename are those of the kernel over
an ext2 volume, for a user who may do everything; atimes stay as they were set (as mounted with noatime).
Each operation is done in one step, without suspending, unless `yields` is set: then others come in between,
before it begins.
Source: the manual pages of the system calls, the kernel's fs/namei.c for the order in which errors win.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Sequence

from odirect.base.errors import AlignmentError, ClosedError, MissingError, ReadOnlyError, UnsupportedError
from odirect.base.units import align_down, align_up
from odirect.block.bio import FUA
from odirect.block.buffers import gather_bytes, scatter_bytes, segments_aligned
from odirect.block.device import Limits
from odirect.dio.mapping import Extent, ExtentKind
from odirect.dio.outcome import Kind, Outcome, Promise, Reason
from odirect.fs.base import (
    Access,
    Attributes,
    DirEntry,
    Done,
    FileKind,
    FileSystem,
    Finding,
    SpaceUse,
    VolumeFile,
    kind_of,
)
from odirect.fs.paths import failure
from odirect.sched.traps import yield_now
from odirect.testing.model import ModelFile

_SECTOR = 512
_LIMITS = Limits(sources=dict.fromkeys(("read_align", "write_align", "memory_align"), "memory"))
# linux/limits.h
_XATTR_NAME_MAX, _XATTR_SIZE_MAX = 255, 65536
_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default")


class _Node:
    """One inode."""

    def __init__(self, number: int, mode: int, uid: int, gid: int, now_ns: int) -> None:
        self.number = number
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.links = 1
        self.atime_ns = self.mtime_ns = self.ctime_ns = now_ns
        self.device_number = 0
        self.target = b""
        self.file = ModelFile()
        #: Numbers of the file's blocks that are not holes.
        self.blocks: set[int] = set()
        self.entries: dict[bytes, int] = {}
        self.parent = 0
        self.xattrs: dict[bytes, bytes] = {}
        self.handles = 0

    @property
    def kind(self) -> FileKind:
        return kind_of(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class MemoryFileSystem(FileSystem):
    """A `FileSystem` in memory.

    blocks: how many there are for file data; directories and inodes take none. most_links: names that one
    inode may have. largest_file: bytes. clock_ns: the time, for stamps; without it a counter.
    """

    kind = "memory"
    features = ()
    root = 2

    def __init__(
        self,
        *,
        name: str = "memory",
        block_bytes: int = 1024,
        blocks: int = 1 << 20,
        most_links: int = 32000,
        largest_file: int = 1 << 40,
        writable: bool = True,
        clock_ns: Callable[[], int] | None = None,
        yields: bool = False,
    ) -> None:
        self.name = name
        self.uuid = bytes(range(16))
        self.label = b"memory"
        self.block_bytes = block_bytes
        self.blocks = blocks
        self.used_blocks = 0
        self.most_links = most_links
        self.largest_file = largest_file
        self.yields = yields
        self.syncs = 0
        self.closed = False
        self._writable = writable
        self._ticks = 0
        self._clock_ns = clock_ns or self._tick
        self._next = 11
        self._nodes: dict[int, _Node] = {}
        self._files: list[MemoryFile] = []
        top = _Node(self.root, stat.S_IFDIR | 0o755, 0, 0, self._clock_ns())
        top.links = 2
        top.parent = self.root
        self._nodes[self.root] = top

    @property
    def writable(self) -> bool:
        """As it was made."""
        return self._writable

    # Looking.

    async def attributes(self, inode: int) -> Attributes:
        """See `FileSystem`."""
        await self._enter()
        node = self._node(inode)
        size, blocks = node.file.size, len(node.blocks)
        if node.is_directory:
            size, blocks = self.block_bytes, 1
        elif node.kind is FileKind.SYMLINK:
            size = len(node.target)
        return Attributes(
            inode=inode,
            mode=node.mode,
            links=node.links,
            uid=node.uid,
            gid=node.gid,
            size=size,
            blocks512=blocks * self.block_bytes // _SECTOR,
            block_bytes=self.block_bytes,
            atime_ns=node.atime_ns,
            mtime_ns=node.mtime_ns,
            ctime_ns=node.ctime_ns,
            device_number=node.device_number,
        )

    async def lookup(self, directory: int, name: bytes) -> int:
        """See `FileSystem`."""
        await self._enter()
        found = self._find(self._directory(directory), name)
        if found is None:
            raise failure(errno.ENOENT, f"looking up {name!r}")
        return found

    async def entries(self, directory: int) -> list[DirEntry]:
        """See `FileSystem`."""
        await self._enter()
        node = self._directory(directory)
        return [DirEntry(name, number, self._nodes[number].kind) for name, number in node.entries.items()]

    async def read_link(self, inode: int) -> bytes:
        """See `FileSystem`."""
        await self._enter()
        node = self._node(inode)
        if node.kind is not FileKind.SYMLINK:
            raise failure(errno.EINVAL, "reading a link that is none")
        return node.target

    async def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """See `FileSystem`."""
        await self._enter()
        return dict(self._node(inode).xattrs)

    async def space(self) -> SpaceUse:
        """See `FileSystem`."""
        await self._enter()
        free = self.blocks - self.used_blocks
        return SpaceUse(self.block_bytes, self.blocks, free, free, 1 << 20, (1 << 20) - len(self._nodes), 255)

    async def check(self) -> list[Finding]:
        """What is inconsistent: link counts that do not fit the names, blocks counted wrongly."""
        await self._enter()
        names = dict.fromkeys(self._nodes, 0)
        names[self.root] = 1
        for node in self._nodes.values():
            for number in node.entries.values():
                names[number] += 1
        found = []
        for number, node in self._nodes.items():
            subdirectories = sum(self._nodes[child].is_directory for child in node.entries.values())
            expected = names[number] + (1 + subdirectories if node.is_directory and names[number] else 0)
            if node.links != expected:
                found.append(Finding(f"inode {number}", None, f"{node.links} links", f"{expected}"))
            if not expected and not node.handles:
                found.append(Finding(f"inode {number}", None, "an inode without names", "none"))
        used = sum(len(node.blocks) for node in self._nodes.values())
        if used != self.used_blocks:
            found.append(Finding("the count of blocks", None, str(self.used_blocks), str(used)))
        return found

    # Changing.

    async def set_xattr(self, inode: int, name: bytes, value: bytes | None) -> None:
        """See `FileSystem`."""
        await self._enter(change=True)
        node = self._node(inode)
        if not name or len(name) > _XATTR_NAME_MAX:
            raise failure(errno.ERANGE, "setting an extended attribute")
        if not name.startswith(_XATTR_PREFIXES) or name in _XATTR_PREFIXES[:3]:
            raise UnsupportedError(f"the name {name!r} belongs to no namespace of extended attributes")
        if value is not None and len(value) > _XATTR_SIZE_MAX:
            raise failure(errno.E2BIG, "setting an extended attribute")
        if name.startswith(b"user.") and node.kind not in (FileKind.REGULAR, FileKind.DIRECTORY):
            raise failure(errno.EPERM, f"setting a user attribute of a {node.kind.value}")
        if value is None:
            if name not in node.xattrs:
                raise failure(errno.ENODATA, f"removing the attribute {name!r}")
            del node.xattrs[name]
        else:
            node.xattrs[name] = bytes(value)
        node.ctime_ns = self._clock_ns()

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
        await self._enter(change=True)
        above = self._directory(directory)
        self._check_new(above, name)
        kind = kind_of(mode)
        if kind is FileKind.UNKNOWN:
            raise ValueError(f"mode {mode:o} has no kind")
        if kind is FileKind.DIRECTORY and above.links >= self.most_links:
            raise failure(errno.EMLINK, f"making the directory {name!r}")
        if kind is FileKind.SYMLINK:
            if not target:
                raise failure(errno.ENOENT, "making a symbolic link to nowhere")
            if len(target) >= self.block_bytes:
                raise failure(errno.ENAMETOOLONG, "making a symbolic link")
        now_ns = self._clock_ns()
        if kind is FileKind.SYMLINK:
            mode = stat.S_IFLNK | 0o777
        node = _Node(self._next, mode, uid, gid, now_ns)
        self._next += 1
        node.target = bytes(target) if kind is FileKind.SYMLINK else b""
        node.device_number = device_number if kind in (FileKind.CHARACTER, FileKind.BLOCK) else 0
        if above.mode & stat.S_ISGID:
            node.gid = above.gid
            node.mode |= stat.S_ISGID if node.is_directory else 0
        if node.is_directory:
            node.links = 2
            node.parent = directory
            above.links += 1
        self._nodes[node.number] = node
        self._put(above, name, node.number, now_ns)
        return node.number

    async def link(self, inode: int, directory: int, name: bytes) -> None:
        """See `FileSystem`."""
        await self._enter(change=True)
        node, above = self._node(inode), self._directory(directory)
        self._check_new(above, name)
        if node.is_directory:
            raise failure(errno.EPERM, "linking a directory")
        if not node.links:
            raise failure(errno.ENOENT, "linking what has lost its last name")
        if node.links >= self.most_links:
            raise failure(errno.EMLINK, "linking")
        now_ns = self._clock_ns()
        node.links += 1
        node.ctime_ns = now_ns
        self._put(above, name, inode, now_ns)

    async def unlink(self, directory: int, name: bytes) -> None:
        """See `FileSystem`."""
        await self._enter(change=True)
        above = self._directory(directory)
        node = self._entry(above, name)
        if node.is_directory:
            raise failure(errno.EISDIR, f"removing {name!r}")
        now_ns = self._clock_ns()
        self._take(above, name, now_ns)
        self._lose_name(node, now_ns)

    async def rmdir(self, directory: int, name: bytes) -> None:
        """See `FileSystem`."""
        await self._enter(change=True)
        above = self._directory(directory)
        if name in (b".", b".."):
            raise failure(errno.EINVAL if name == b"." else errno.ENOTEMPTY, f"removing {name!r}")
        node = self._entry(above, name)
        if not node.is_directory:
            raise failure(errno.ENOTDIR, f"removing {name!r}")
        if node.entries:
            raise failure(errno.ENOTEMPTY, f"removing {name!r}")
        now_ns = self._clock_ns()
        self._take(above, name, now_ns)
        above.links -= 1
        self._lose_directory(node, now_ns)

    async def rename(self, old_directory: int, old_name: bytes, new_directory: int, new_name: bytes) -> None:
        """See `FileSystem`."""
        await self._enter(change=True)
        source, target = self._directory(old_directory), self._directory(new_directory)
        if {old_name, new_name} & {b".", b".."}:
            raise failure(errno.EBUSY, "renaming")
        node = self._entry(source, old_name)
        self._check_name(new_name)
        number = self._find(target, new_name)
        replaced = None if number is None else self._nodes[number]
        if node.is_directory and node.number in self._line_above(target):
            raise failure(errno.EINVAL, f"moving {old_name!r} into itself")
        if replaced is not None and replaced is not node and replaced.number in self._line_above(source):
            raise failure(errno.ENOTEMPTY, f"moving {old_name!r} over a directory that it is in")
        if replaced is node:
            return
        if replaced is not None:
            if node.is_directory and not replaced.is_directory:
                raise failure(errno.ENOTDIR, f"moving a directory over {new_name!r}")
            if replaced.is_directory and not node.is_directory:
                raise failure(errno.EISDIR, f"moving a file over {new_name!r}")
            if replaced.entries:
                raise failure(errno.ENOTEMPTY, f"moving over {new_name!r}")
        else:
            if not target.links:
                raise failure(errno.ENOENT, "moving into a directory that was removed")
            if node.is_directory and source is not target and target.links >= self.most_links:
                raise failure(errno.EMLINK, f"moving the directory {old_name!r}")
        now_ns = self._clock_ns()
        self._take(source, old_name, now_ns)
        self._put(target, new_name, node.number, now_ns)
        node.ctime_ns = now_ns
        if node.is_directory:
            node.parent = new_directory
            source.links -= 1
            target.links += 1
        if replaced is not None and replaced.is_directory:
            target.links -= 1
            self._lose_directory(replaced, now_ns)
        elif replaced is not None:
            self._lose_name(replaced, now_ns)

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
        await self._enter(change=True)
        node = self._node(inode)
        if mode is not None:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        elif (uid is not None or gid is not None) and not node.is_directory:
            node.mode &= ~(stat.S_ISUID | (stat.S_ISGID if node.mode & stat.S_IXGRP else 0))
        node.uid = node.uid if uid is None else uid
        node.gid = node.gid if gid is None else gid
        node.atime_ns = node.atime_ns if atime_ns is None else atime_ns
        node.mtime_ns = node.mtime_ns if mtime_ns is None else mtime_ns
        node.ctime_ns = self._clock_ns()

    async def open_file(self, inode: int, *, writable: bool) -> MemoryFile:
        """See `FileSystem`."""
        await self._enter()
        node = self._node(inode)
        if node.is_directory:
            raise failure(errno.EISDIR, "opening")
        if node.kind is not FileKind.REGULAR:
            raise UnsupportedError(f"a {node.kind.value} has no bytes")
        if writable and not self._writable:
            raise ReadOnlyError("the volume is open for reading only")
        file = MemoryFile(self, node, writable)
        self._files.append(file)
        node.handles += 1
        return file

    async def sync(self) -> None:
        """Count that it was called: everything is where it will ever be."""
        await self._enter()
        self.syncs += 1

    async def close(self) -> None:
        """See `FileSystem`."""
        for file in list(self._files):
            self._let_go(file)
        self.closed = True

    # How.

    def _tick(self) -> int:
        self._ticks += 1_000_000
        return self._ticks

    async def _enter(self, *, change: bool = False) -> None:
        if self.yields:
            await yield_now()
        if self.closed:
            raise ClosedError("the volume is closed", path=self.name)
        if change and not self._writable:
            raise ReadOnlyError("the volume is open for reading only")

    def _node(self, inode: int) -> _Node:
        node = self._nodes.get(inode)
        if node is None:
            raise MissingError(f"there is no inode {inode}")
        return node

    def _directory(self, inode: int) -> _Node:
        node = self._node(inode)
        if not node.is_directory:
            raise failure(errno.ENOTDIR, f"inode {inode}")
        return node

    def _find(self, directory: _Node, name: bytes) -> int | None:
        self._check_name(name)
        if name == b".":
            return directory.number
        if name == b"..":
            return directory.parent
        return directory.entries.get(name)

    def _entry(self, directory: _Node, name: bytes) -> _Node:
        number = self._find(directory, name)
        if number is None:
            raise failure(errno.ENOENT, f"looking up {name!r}")
        return self._nodes[number]

    def _check_name(self, name: bytes) -> None:
        if len(name) > self.name_bytes:
            raise failure(errno.ENAMETOOLONG, "a name")
        if not name:
            raise failure(errno.ENOENT, "an empty name")
        if b"/" in name or b"\0" in name:
            raise ValueError(f"{name!r} cannot be a name")

    def _check_new(self, directory: _Node, name: bytes) -> None:
        if self._find(directory, name) is not None:
            raise failure(errno.EEXIST, f"making {name!r}")
        if not directory.links:
            raise failure(errno.ENOENT, "in a directory that was removed")

    def _line_above(self, directory: _Node) -> set[int]:
        """The numbers of a directory and of all above it."""
        line = {directory.number}
        while directory.number != self.root and directory.parent not in line:
            directory = self._nodes[directory.parent]
            line.add(directory.number)
        return line

    def _put(self, directory: _Node, name: bytes, number: int, now_ns: int) -> None:
        directory.entries[bytes(name)] = number
        directory.mtime_ns = directory.ctime_ns = now_ns

    def _take(self, directory: _Node, name: bytes, now_ns: int) -> None:
        del directory.entries[name]
        directory.mtime_ns = directory.ctime_ns = now_ns

    def _lose_name(self, node: _Node, now_ns: int) -> None:
        node.links -= 1
        node.ctime_ns = now_ns
        self._free_if_unused(node)

    def _lose_directory(self, node: _Node, now_ns: int) -> None:
        node.links = 0
        node.ctime_ns = now_ns
        self._free_if_unused(node)

    def _free_if_unused(self, node: _Node) -> None:
        if not node.links and not node.handles:
            self.used_blocks -= len(node.blocks)
            del self._nodes[node.number]

    def _let_go(self, file: MemoryFile) -> None:
        if file in self._files:
            self._files.remove(file)
            file.node.handles -= 1
            self._free_if_unused(file.node)

    # What a file changes.

    def _write(self, node: _Node, data: bytes, offset: int) -> int:
        """How many bytes there was room for. Raises NoSpaceError for none."""
        count = len(data)
        if not count:
            return 0
        if offset >= self.largest_file:
            raise failure(errno.EFBIG, f"writing at {offset}")
        count = min(count, self.largest_file - offset)
        unit = self.block_bytes
        free = self.blocks - self.used_blocks
        for number in range(offset // unit, (offset + count - 1) // unit + 1):
            if number in node.blocks:
                continue
            if not free:
                count = max(0, number * unit - offset)
                break
            free -= 1
            node.blocks.add(number)
            self.used_blocks += 1
        if not count:
            raise failure(errno.ENOSPC, f"writing {len(data)} bytes at {offset}")
        node.file.pwrite(data[:count], offset)
        node.mtime_ns = node.ctime_ns = self._clock_ns()
        return count

    def _truncate(self, node: _Node, size: int) -> None:
        if size < 0:
            raise failure(errno.EINVAL, f"making the file {size} bytes long")
        if size > self.largest_file:
            raise failure(errno.EFBIG, f"making the file {size} bytes long")
        node.file.truncate(size)
        self._free_blocks(node, -(-size // self.block_bytes), None)
        node.mtime_ns = node.ctime_ns = self._clock_ns()

    def _punch(self, node: _Node, offset: int, length: int) -> None:
        if offset < 0 or length <= 0:
            raise failure(errno.EINVAL, f"punching {length} bytes at {offset}")
        end = min(offset + length, node.file.size)
        if offset < end:
            node.file.punch(offset, end - offset)
        unit = self.block_bytes
        # A last block that the file ends in is freed with its end.
        last = -(-end // unit) if end == node.file.size else align_down(end, unit) // unit
        self._free_blocks(node, align_up(offset, unit) // unit, last)
        node.mtime_ns = node.ctime_ns = self._clock_ns()

    def _free_blocks(self, node: _Node, first: int, last: int | None) -> None:
        gone = {number for number in node.blocks if number >= first and (last is None or number < last)}
        node.blocks -= gone
        self.used_blocks -= len(gone)


class MemoryFile(VolumeFile):
    """A handle of a `MemoryFileSystem`."""

    def __init__(self, file_system: MemoryFileSystem, node: _Node, writable: bool) -> None:
        self.inode = node.number
        self.name = file_system.name
        self.node = node
        self.file_system = file_system
        self._writable = writable
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """The present size."""
        return self.node.file.size

    @property
    def limits(self) -> Limits:
        """512 bytes for everything."""
        return _LIMITS

    async def read(
        self, offset: int, segments: Sequence[memoryview], *, access: Access = "auto", flags: int = 0
    ) -> Done:
        """See `VolumeFile`."""
        await self._enter()
        length = sum(map(len, segments))
        outcome = self._outcome(offset, segments, access, Promise.NONE)
        data = self.node.file.pread(length, offset)
        scatter_bytes(_cut(segments, len(data)), memoryview(data))
        return Done(len(data), outcome)

    async def write(
        self, offset: int | None, segments: Sequence[memoryview], *, access: Access = "auto", flags: int = 0
    ) -> Done:
        """See `VolumeFile`."""
        await self._enter(change=True)
        data = bytearray(sum(map(len, segments)))
        gather_bytes(memoryview(data), segments)
        offset = self.size_bytes if offset is None else offset
        outcome = self._outcome(offset, segments, access, Promise.DURABLE if flags & FUA else Promise.DEVICE)
        return Done(self.file_system._write(self.node, bytes(data), offset), outcome)

    async def truncate(self, size: int) -> None:
        """See `VolumeFile`."""
        await self._enter(change=True)
        self.file_system._truncate(self.node, size)

    async def punch(self, offset: int, length: int) -> None:
        """See `VolumeFile`."""
        await self._enter(change=True)
        self.file_system._punch(self.node, offset, length)

    async def sync(self, *, data_only: bool = False) -> None:
        """See `VolumeFile`."""
        await self._enter()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """See `VolumeFile`."""
        await self._enter()
        unit, size = self.file_system.block_bytes, self.node.file.size
        found: list[Extent] = []
        start = align_down(offset, unit)
        for at in range(start, min(align_up(offset + length, unit), align_up(size, unit)), unit):
            kind = ExtentKind.MAPPED if at // unit in self.node.blocks else ExtentKind.HOLE
            if found and found[-1].kind is kind:
                found[-1] = found[-1]._replace(length=found[-1].length + unit)
            else:
                found.append(Extent(kind, at, unit))
        return found

    async def close(self) -> None:
        """See `VolumeFile`."""
        self._closed = True
        self.file_system._let_go(self)

    async def _enter(self, *, change: bool = False) -> None:
        await self.file_system._enter(change=change)
        if self._closed:
            raise ClosedError("the file is closed")
        if change and not self._writable:
            raise ReadOnlyError("the file was opened for reading")

    def _outcome(self, offset: int, segments: Sequence[memoryview], access: Access, promise: Promise) -> Outcome:
        """As it would have gone on a device of 512-byte sectors."""
        if offset < 0:
            raise failure(errno.EINVAL, f"at {offset}")
        length = sum(map(len, segments))
        if access == "buffered":
            return Outcome(Kind.BUFFERED, Reason.NONE, promise)
        reason = Reason.NONE
        if offset % _SECTOR:
            reason = Reason.MISALIGNED_OFFSET
        elif length % _SECTOR:
            reason = Reason.MISALIGNED_LENGTH
        elif not segments_aligned(segments, _SECTOR, 1):
            reason = Reason.MISALIGNED_MEMORY
        if reason and access == "strict":
            raise AlignmentError(f"{length} bytes at {offset}: {reason.value}")
        return Outcome(Kind.BOUNCED if reason else Kind.DIRECT, reason, promise)


def _cut(segments: Sequence[memoryview], length: int) -> list[memoryview]:
    """The first `length` bytes of the segments."""
    taken = []
    for segment in segments:
        if length <= 0:
            break
        taken.append(segment[:length])
        length -= len(taken[-1])
    return taken
