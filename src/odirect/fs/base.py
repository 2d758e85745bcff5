"""What every file system gives to those above it: names, inodes and files, as coroutines.

Inodes are numbers here and names are bytes. Everything suspends, so that one driver serves a caller
who waits, another an event loop, and another a simulation. Whoever holds an open file holds its
inode: a file that loses its last name goes when its last handle is closed.
"""

from __future__ import annotations

import contextlib
import enum
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from odirect.base.errors import CorruptionError, NoSpaceError, ODirectError
from odirect.base.units import align_up
from odirect.block.buffers import empty
from odirect.block.device import Limits
from odirect.dio.mapping import Extent
from odirect.dio.outcome import Outcome

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

_SECOND = 1_000_000_000

#: The attributes that say more of who may do what than a mode does: of an inode, and of what is made in a directory.
ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")

Access = Literal["auto", "strict", "buffered"]
ACCESSES: tuple[Access, ...] = ("auto", "strict", "buffered")


class FileKind(enum.StrEnum):
    """What an inode is."""

    REGULAR = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"
    SOCKET = "socket"
    UNKNOWN = "unknown"


_KINDS = {
    stat.S_IFREG: FileKind.REGULAR,
    stat.S_IFDIR: FileKind.DIRECTORY,
    stat.S_IFLNK: FileKind.SYMLINK,
    stat.S_IFCHR: FileKind.CHARACTER,
    stat.S_IFBLK: FileKind.BLOCK,
    stat.S_IFIFO: FileKind.FIFO,
    stat.S_IFSOCK: FileKind.SOCKET,
}


def kind_of(mode: int) -> FileKind:
    """The kind that the type bits of `mode` say."""
    return _KINDS.get(stat.S_IFMT(mode), FileKind.UNKNOWN)


class DirEntry(NamedTuple):
    """A name in a directory. kind is UNKNOWN where the directory does not tell it."""

    name: bytes
    inode: int
    kind: FileKind


class Attributes(NamedTuple):
    """What `stat` says. mode has the type bits; blocks512 counts 512-byte sectors in use."""

    inode: int
    mode: int
    links: int
    uid: int
    gid: int
    size: int
    blocks512: int
    block_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    device_number: int = 0

    @property
    def kind(self) -> FileKind:
        """What the inode is."""
        return kind_of(self.mode)


class TreeEntry(NamedTuple):
    """Something below a directory.

    path: from that directory on, without a slash before it. place: where on the device reading it
    begins; who reads many files in this order spares the device the way.
    """

    path: bytes
    attributes: Attributes
    place: int = 0


class NewFile(NamedTuple):
    """A regular file to be made, with all that is in it. mode without type bits."""

    directory: int
    name: bytes
    content: bytes | bytearray | memoryview
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0


class NewFiles(NamedTuple):
    """Regular files to be made, with all that is in them, as columns of one row for each.

    memory: the contents, one after the other, each from a multiple of the file system's block on, with zeroes
    after it. sizes in bytes, modes without type bits. atimes, mtimes: seconds since 1970 and nanoseconds, side
    by side. All but names and memory are arrays of int64.
    """

    directories: NDArray[numpy.int64]
    names: list[bytes]
    memory: memoryview
    sizes: NDArray[numpy.int64]
    modes: NDArray[numpy.int64]
    uids: NDArray[numpy.int64]
    gids: NDArray[numpy.int64]
    atimes: NDArray[numpy.int64]
    mtimes: NDArray[numpy.int64]

    @classmethod
    def pack(cls, files: Sequence[NewFile], block_bytes: int) -> NewFiles:
        """These files, their contents copied."""
        import numpy

        sizes = numpy.array([len(file.content) for file in files], numpy.int64)
        memory = empty(int((-(-sizes // block_bytes)).sum()) * block_bytes)  # Zeroes.
        at = 0
        for file in files:
            memory[at : at + len(file.content)] = file.content
            at += align_up(len(file.content), block_bytes)
        columns = numpy.array([(file.directory, file.mode, file.uid, file.gid) for file in files], numpy.int64).reshape(
            -1, 4
        )
        times = [
            numpy.array([divmod(time, _SECOND) for time in column], numpy.int64).reshape(-1, 2)
            for column in ([file.atime_ns for file in files], [file.mtime_ns for file in files])
        ]
        directories, modes, uids, gids = columns.T
        return cls(directories, [file.name for file in files], memory, sizes, modes, uids, gids, times[0], times[1])

    def rows(self, block_bytes: int) -> Iterator[NewFile]:
        """Each file by itself; the contents are not copied."""
        at = 0
        for row, (name, size) in enumerate(zip(self.names, self.sizes.tolist(), strict=True)):
            times = (int(column[row, 0]) * _SECOND + int(column[row, 1]) for column in (self.atimes, self.mtimes))
            numbers = (int(column[row]) for column in (self.modes, self.uids, self.gids))
            yield NewFile(int(self.directories[row]), name, self.memory[at : at + size], *numbers, *times)
            at += align_up(size, block_bytes)


class Making(ABC):
    """Files whose data is on its way. One of the two is called, once."""

    @abstractmethod
    async def finish(self) -> list[int]:
        """The files' inodes: all is written, and they have their names now. Raises as `create_whole` does."""

    @abstractmethod
    async def give_up(self) -> None:
        """Nothing of it is in flight any more, and no file was made."""


class SpaceUse(NamedTuple):
    """How full a volume is.

    blocks: all that it has; overhead: how many of them are the file system's own from the start, and never free.
    available leaves out what is kept for root.
    """

    block_bytes: int
    blocks: int
    free: int
    available: int
    files: int
    free_files: int
    name_bytes: int
    overhead: int = 0


class Finding(NamedTuple):
    """Something that `check` found wrong.

    structure: "inode 12", "block bitmap of group 3"; addr: the byte on the device, None where that
    says nothing; repaired_by: the command that mends it.
    """

    structure: str
    addr: int | None
    found: str
    expected: str
    repaired_by: str = ""

    def __str__(self) -> str:
        where = "" if self.addr is None else f" at byte {self.addr}"
        return f"{self.structure}{where}: found {self.found}, expected {self.expected}"


class Done(NamedTuple):
    """How many bytes of a request were moved, and which way."""

    transferred: int
    outcome: Outcome


class VolumeFile(ABC):
    """An open file of a volume. Requests may overlap; each is atomic to the others as the kernel has it."""

    inode: int
    name: str

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """The present size."""

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """What a direct request must be aligned to, with the sources."""

    @abstractmethod
    async def read(
        self, offset: int, segments: Sequence[memoryview], *, access: Access = "auto", flags: int = 0
    ) -> Done:
        """Read into the segments from byte `offset`, up to the end of the file (F02).

        strict raises AlignmentError for what is not aligned, NotDirectError for what falls back.
        """

    @abstractmethod
    async def write(
        self,
        offset: int | None,
        segments: Sequence[memoryview],
        *,
        access: Access = "auto",
        flags: int = 0,
    ) -> Done:
        """Write the segments at byte `offset`; None appends.

        flags: FUA makes it durable (with all that is needed to read it); NOWAIT. Raises NoSpaceError
        (ENOSPC, EFBIG), ReadOnlyError, DeviceError. A short count where only a part had room.
        """

    @abstractmethod
    async def truncate(self, size: int) -> None:
        """Make the file `size` bytes long."""

    @abstractmethod
    async def punch(self, offset: int, length: int) -> None:
        """Make a hole; the size stays."""

    @abstractmethod
    async def sync(self, *, data_only: bool = False) -> None:
        """Make what was written durable. Raises once what failed since the last call, and F41."""

    @abstractmethod
    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Where the bytes are, holes included, in order, without gaps, up to the size rounded up to a block."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of the inode. Data that was written through the cache is written back; it is not synced."""


class FileSystem(ABC):
    """A volume that is open. Raises what `base.errors` has: MissingError, ExistsError, NotDirectoryError, ..."""

    kind: str
    #: What messages call it: the path of its image or device.
    name: str
    uuid: bytes
    label: bytes
    block_bytes: int
    root: int
    #: The longest target of a symbolic link, and the longest name, in bytes.
    name_bytes: int = 255
    #: Files of up to so many bytes are quicker made by `create_whole` than one by one.
    small_file_bytes: int = 64 << 10
    #: Features by name, for `info`.
    features: Sequence[str] = ()

    @property
    @abstractmethod
    def writable(self) -> bool:
        """Whether changes are taken: opened so, and nothing has failed since."""

    @abstractmethod
    async def attributes(self, inode: int) -> Attributes:
        """What `stat` says of an inode."""

    @abstractmethod
    async def lookup(self, directory: int, name: bytes) -> int:
        """The inode that `name` is; MissingError, NotDirectoryError. "." and ".." are names too."""

    @abstractmethod
    async def entries(self, directory: int) -> list[DirEntry]:
        """All names of a directory but "." and "..", as they come."""

    @abstractmethod
    async def read_link(self, inode: int) -> bytes:
        """Where a symbolic link leads."""

    @abstractmethod
    async def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """Extended attributes by their full names (b"user.comment")."""

    @abstractmethod
    async def set_xattr(self, inode: int, name: bytes, value: bytes | None) -> None:
        """Set an extended attribute; None removes it (ENODATA if there is none)."""

    @abstractmethod
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
        """A new inode of the kind that `mode` says, under a new name; its number. ExistsError if the name is taken.

        target: of a symbolic link. Directories get "." and "..".
        """

    @abstractmethod
    async def link(self, inode: int, directory: int, name: bytes) -> None:
        """One more name for an inode that is no directory."""

    @abstractmethod
    async def unlink(self, directory: int, name: bytes) -> None:
        """Remove a name of something that is no directory; the last one takes the inode with it."""

    @abstractmethod
    async def rmdir(self, directory: int, name: bytes) -> None:
        """Remove an empty directory."""

    @abstractmethod
    async def rename(self, old_directory: int, old_name: bytes, new_directory: int, new_name: bytes) -> None:
        """Move a name, over what has the new one, as rename(2) has it. At every moment one of the two is there."""

    @abstractmethod
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
        """Change what is given. The type bits of `mode` are left alone."""

    @abstractmethod
    async def open_file(self, inode: int, *, writable: bool) -> VolumeFile:
        """A handle of a regular file. DirectoryError, UnsupportedError for what has no bytes, ReadOnlyError."""

    async def tree(self, directory: int) -> list[TreeEntry]:
        """Everything below a directory, parents before what is in them; a directory that is met again is left out."""
        found: list[TreeEntry] = []
        seen = {directory}
        waiting = [(b"", directory)]
        while waiting:
            path, number = waiting.pop()
            for entry in await self.entries(number):
                if b"/" in entry.name:
                    message = f"directory inode {number}: found the name {entry.name!r}, expected one without a slash"
                    raise CorruptionError(message, path=self.name)
                below = path + b"/" + entry.name if path else entry.name
                attributes = await self.attributes(entry.inode)
                found.append(TreeEntry(below, attributes))
                if attributes.kind is FileKind.DIRECTORY and entry.inode not in seen:
                    seen.add(entry.inode)
                    waiting.append((below, entry.inode))
        return found

    async def read_whole(self, inodes: Sequence[int]) -> list[bytes]:
        """The contents of these regular files, in this order. For many small ones: all is in memory at once."""
        contents: list[bytes] = []
        for number in inodes:
            file = await self.open_file(number, writable=False)
            try:
                memory = empty(align_up(file.size_bytes, max(file.limits.read_align, 1)))
                done = await file.read(0, [memory]) if len(memory) else None
                contents.append(bytes(memory[: done.transferred if done else 0]))
            finally:
                await file.close()
        return contents

    async def with_xattrs(self, inodes: Sequence[int]) -> set[int]:
        """Those of these inodes that have extended attributes, or may have."""
        return {number for number in dict.fromkeys(inodes) if await self.xattrs(number)}

    async def inherited_mode(self, directory: int) -> int | None:
        """The permission bits that what is made in a directory has at most; None if it inherits no access list."""
        return None

    async def create_whole(self, files: Sequence[NewFile]) -> list[int]:
        """The inodes of these new files, made with their contents. For many small ones.

        Raises what `create` and `write` raise; those before the one that failed may be there then, whole.
        """
        numbers: list[int] = []
        for new in files:
            mode = stat.S_IFREG | stat.S_IMODE(new.mode)
            number = await self.create(new.directory, new.name, mode, uid=new.uid, gid=new.gid)
            try:
                if len(new.content):
                    file = await self.open_file(number, writable=True)
                    try:
                        await self._write_whole(file, new)
                    finally:
                        await file.close()
                # The directory may have passed its group on; a change of owner by itself takes the set-id bits away.
                await self.set_attributes(
                    number, mode=new.mode, uid=new.uid, gid=new.gid, atime_ns=new.atime_ns, mtime_ns=new.mtime_ns
                )
            except Exception:
                with contextlib.suppress(ODirectError):
                    await self.unlink(new.directory, new.name)
                raise
            numbers.append(number)
        return numbers

    async def begin_whole(self, files: NewFiles) -> Making:
        """Begin to make files: their contents are on their way, and `files.memory` is theirs until the end.

        Who makes many begins some, then finishes those before. They inherit nothing of their directories. Raises
        as `create_whole` does, nothing being begun.
        """
        return _Later(self, files)

    async def _write_whole(self, file: VolumeFile, new: NewFile) -> None:
        done, content = 0, memoryview(new.content)
        while done < len(content):
            moved = (await file.write(done, [content[done:]])).transferred
            if not moved:
                raise NoSpaceError("no space is left on the volume", path=new.name)
            done += moved

    @abstractmethod
    async def space(self) -> SpaceUse:
        """How full it is."""

    @abstractmethod
    async def check(self) -> list[Finding]:
        """What is wrong with it, as far as a walk that only reads can tell."""

    @abstractmethod
    async def sync(self) -> None:
        """Make everything durable."""

    @abstractmethod
    async def close(self) -> None:
        """Sync, mark the volume clean if it was opened for writing, and let go of it. Open handles are closed."""


class _Later(Making):
    """Files that are made when they are to be finished, one by one."""

    def __init__(self, file_system: FileSystem, files: NewFiles) -> None:
        self._file_system = file_system
        self._files = files

    async def finish(self) -> list[int]:
        return await self._file_system.create_whole(list(self._files.rows(self._file_system.block_bytes)))

    async def give_up(self) -> None:
        pass
