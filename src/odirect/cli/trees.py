"""Trees that `odirect cp` copies from and to: of this machine, or in a volume, with the same verbs.

Paths are bytes. Everything raises errors of odirect that name the path as the user would write it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from odirect.base.errors import MissingError, NotDirectoryError, ODirectError, from_errno
from odirect.cli import common
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import is_same_image, naming
from odirect.dio.outcome import Kind, Outcome, Promise, Reason, Tallies, Tally
from odirect.fs.base import NewFile
from odirect.host_tree import set_xattrs
from odirect.sched.clock import wall_ns

if TYPE_CHECKING:
    from odirect.dio.requests import Request
    from odirect.volumes import Volume

Access = Literal["auto", "strict"]

#: In a tree, smaller files of this machine go through its page cache: to open one for direct I/O takes longer.
SMALL_BYTES = 128 << 10

_WHOLE = stat.S_IRUSR | stat.S_IWUSR
# All permission bits.
_ALL = 0o777


class Source(Protocol):
    """What is asked of a file that is read: `odirect.File`, a file in a volume, a small file."""

    @property
    def size(self) -> int: ...
    @property
    def totals(self) -> dict[Outcome, Tally]: ...
    def preadinto(self, buffer: object, offset: int) -> int: ...
    def seek(self, offset: int, whence: int = ..., /) -> int: ...
    def close(self) -> None: ...


class Target(Source, Protocol):
    """What is asked of a file that is written."""

    def pwrite(self, buffer: object, offset: int) -> int: ...
    def truncate(self, size: int | None = None, /) -> int: ...
    def sync(self, *, data_only: bool = False) -> None: ...


@runtime_checkable
class Queued(Protocol):
    """What takes several transfers at once; small files go in one piece, and do not."""

    def submit(self, op: Literal["read", "write"], offset: int, buffer: object, tag: object = None) -> Request: ...
    def completions(self) -> Iterator[Request]: ...


class Changes(NamedTuple):
    """What is set on something when it is there; None is left alone."""

    mode: int | None = None
    owner: tuple[int, int] | None = None
    times_ns: tuple[int, int] | None = None
    xattrs: dict[bytes, bytes] | None = None


class Small(NamedTuple):
    """A small file that is to be made in a directory where nothing has its name."""

    path: bytes
    content: bytes | bytearray
    changes: Changes


class Tree(Protocol):
    """A file system, as far as copying needs it. What `change` could not do it gives back, a sentence each."""

    #: Whether one `sync` makes all of it durable.
    syncs_whole: bool

    def shown(self, path: bytes) -> str: ...
    def exact(self, path: bytes) -> str: ...
    def status(self, path: bytes, *, follow: bool) -> os.stat_result | None: ...
    def below(self, path: bytes) -> Sequence[tuple[bytes, os.stat_result]]: ...
    def read_link(self, path: bytes) -> bytes: ...
    def real_path(self, path: bytes) -> bytes: ...
    def xattrs(self, path: bytes, inode: int) -> dict[bytes, bytes]: ...
    def open_source(self, path: bytes, access: Access, *, small: bool) -> Source: ...
    def make_file(self, path: bytes, access: Access, *, small: bool) -> Target: ...
    def make_directory(self, path: bytes) -> None: ...
    def make_link(self, path: bytes, target: bytes) -> None: ...
    def make_node(self, path: bytes, mode: int, device: int) -> None: ...
    def make_name(self, path: bytes, other: bytes) -> None: ...
    def change(self, path: bytes, changes: Changes) -> list[str]: ...
    def rename(self, path: bytes, other: bytes) -> None: ...
    def remove(self, path: bytes) -> None: ...
    def sync(self, directory: bytes) -> None: ...
    def fetch(self, paths: Sequence[bytes], inodes: Sequence[int]) -> None: ...
    def make_small(self, files: Sequence[Small]) -> tuple[dict[Outcome, Tally], list[str]] | None: ...
    def is_same(self, other: Tree) -> bool: ...
    def holds(self, path: bytes, other: Tree) -> bool: ...
    def check_replaceable(self, path: bytes) -> None: ...


class VolumeTree:
    """The tree of an open volume."""

    syncs_whole = True

    def __init__(self, volume: Volume, image: str) -> None:
        self._volume = volume
        self.image = image
        #: Inodes that have no extended attributes, as far as is known.
        self._without: set[int] = set()
        self._fetched: dict[bytes, bytes] = {}
        self._directories: dict[bytes, int] = {}
        #: Those that have a list of access rights for what is made in them, and the most that it allows.
        self._inheriting: dict[bytes, int] = {}

    def _place(self, path: bytes) -> VolumePlace:
        return VolumePlace(self.image, path)

    def shown(self, path: bytes) -> str:
        """A path as the user would write it."""
        return str(self._place(path))

    def exact(self, path: bytes) -> str:
        """The same with all its bytes."""
        return self._place(path).exact

    def is_same(self, other: Tree) -> bool:
        """Whether both are of one volume."""
        return isinstance(other, VolumeTree) and other._volume is self._volume

    def holds(self, path: bytes, other: Tree) -> bool:
        """Whether the file at `path` is the image that `other` is on: never, as far as can be told."""
        return False

    def check_replaceable(self, path: bytes) -> None:
        """Nothing: in a volume everybody may do everything."""

    def status(self, path: bytes, *, follow: bool) -> os.stat_result | None:
        """What is at `path`, None if there is nothing."""
        with naming(self._place(path)):
            try:
                return self._volume.stat(path, follow_symlinks=follow)
            except (MissingError, NotDirectoryError):
                return None

    def below(self, path: bytes) -> Sequence[tuple[bytes, os.stat_result]]:
        """(path from there, what it is) of everything in a directory, a directory before what is in it."""
        from odirect.volume_entries import stat_result

        volume = self._volume
        top = self.status(path, follow=True)
        with naming(self._place(path)):
            found = volume.run(volume.file_system.tree(0 if top is None else top.st_ino), path)
            inodes = [entry.attributes.inode for entry in found]
            self._without.update(inodes)
            self._without -= volume.run(volume.file_system.with_xattrs(inodes), path)
        device = 0 if top is None else top.st_dev
        directories = [entry for entry in found if stat.S_ISDIR(entry.attributes.mode)]
        # The others in the order of the device, which spares a disk the way.
        others = sorted(
            (entry for entry in found if not stat.S_ISDIR(entry.attributes.mode)), key=lambda entry: entry.place
        )
        return [(entry.path, stat_result(entry.attributes, device)) for entry in (*directories, *others)]

    def read_link(self, path: bytes) -> bytes:
        """Where a symbolic link leads."""
        with naming(self._place(path)):
            return self._volume.readlink(path)

    def real_path(self, path: bytes) -> bytes:
        """`path`, or where the symbolic link leads that it is; a link to nothing is an error."""
        from odirect.fs.paths import walk

        for _ in range(40):
            with naming(self._place(path)):
                spot = self._volume.run(walk(self._volume.file_system, path, follow=False), path)
                if spot.attributes is None or not stat.S_ISLNK(spot.attributes.mode):
                    return path
                path = os.path.join(os.path.dirname(path.rstrip(b"/")), self._volume.readlink(path))
        raise from_errno(errno.ELOOP, "following the link", self.shown(path))

    def xattrs(self, path: bytes, inode: int) -> dict[bytes, bytes]:
        """The extended attributes of what is at `path`, which has this inode."""
        if inode in self._without:
            return {}
        with naming(self._place(path)):
            return self._volume.run(self._volume.file_system.xattrs(inode), path)

    def open_source(self, path: bytes, access: Access, *, small: bool) -> Source:
        """A file to be read."""
        content = self._fetched.pop(path, None)
        if content is not None:
            return Fetched(
                content, Outcome(Kind.BOUNCED if self._volume.is_direct else Kind.BUFFERED, Reason.SMALL_FILE)
            )
        with naming(self._place(path)):
            return self._volume.open(path, "r", access=access)

    def make_file(self, path: bytes, access: Access, *, small: bool) -> Target:
        """A new file, to be written and read."""
        with naming(self._place(path)):
            return self._volume.open(path, "x+", access=access, permissions=_WHOLE)

    def make_directory(self, path: bytes) -> None:
        """A new directory, for the owner alone as yet."""
        with naming(self._place(path)):
            self._volume.mkdir(path, 0o700)

    def make_link(self, path: bytes, target: bytes) -> None:
        """A new symbolic link."""
        with naming(self._place(path)):
            self._volume.symlink(target, path)

    def make_node(self, path: bytes, mode: int, device: int) -> None:
        """A new fifo, socket or device."""
        with naming(self._place(path)):
            self._volume.mknod(path, mode, device)

    def make_name(self, path: bytes, other: bytes) -> None:
        """A further name for what is at `path`."""
        with naming(self._place(other)):
            self._volume.link(path, other)

    def change(self, path: bytes, changes: Changes) -> list[str]:
        """See `Changes`: in one go, and the times last."""
        from odirect.fs.paths import resolve
        from odirect.fs.tree import make_like

        volume = self._volume

        async def apply() -> list[tuple[bytes, ODirectError]]:
            file_system = volume.file_system
            inode = (await resolve(file_system, path, follow=False)).inode
            mode = changes.mode
            if mode is not None and changes.xattrs is None and changes.owner is None:
                # Something new, with a mode of its own: what it has inherited bounds that.
                above = (await resolve(file_system, os.path.dirname(path) or b"/", follow=True)).inode
                bits = await file_system.inherited_mode(above)
                mode &= _ALL if bits is None else bits
            return await make_like(file_system, inode, **changes._replace(mode=mode)._asdict())

        with naming(self._place(path)):
            missed = volume.run(apply(), path)
        return [f"attribute {os.fsdecode(name)}: {error.message}" for name, error in missed]

    def rename(self, path: bytes, other: bytes) -> None:
        """Move `path` over `other`."""
        with naming(self._place(other)):
            self._volume.rename(path, other)

    def remove(self, path: bytes) -> None:
        """Remove what is no directory."""
        with naming(self._place(path)):
            self._volume.remove(path)

    def fetch(self, paths: Sequence[bytes], inodes: Sequence[int]) -> None:
        """Read small files, all at once, for `open_source` to find."""
        with naming(self._place(os.path.dirname(paths[0]))):
            contents = self._volume.run(self._volume.file_system.read_whole(inodes), paths[0])
        self._fetched = dict(zip(paths, contents, strict=True))

    def make_small(self, files: Sequence[Small]) -> tuple[dict[Outcome, Tally], list[str]] | None:
        """Make all of these at once; how they were written, and what of them could not be kept."""
        volume, owner, now_ns = self._volume, self._volume.owner, wall_ns()
        made = []
        for path, content, changes in files:
            directory, name = os.path.split(path)
            number = self._directories.get(directory)
            if number is None:
                number = self._directories[directory] = volume.attributes(directory).inode
                bits = volume.run(volume.file_system.inherited_mode(number), directory)
                if bits is not None:
                    self._inheriting[directory] = bits
            mode = changes.mode or 0
            if changes.xattrs is None:
                mode &= self._inheriting.get(directory, _ALL)
            uid, gid = changes.owner or owner
            atime_ns, mtime_ns = changes.times_ns or (now_ns, now_ns)
            made.append(NewFile(number, name, content, mode, uid, gid, atime_ns, mtime_ns))
        with naming(self._place(os.path.dirname(files[0].path))):
            volume.run(volume.file_system.create_whole(made), files[0].path)
        missed = []
        for path, _, changes in files:
            inherits = changes.xattrs is not None and os.path.dirname(path) in self._inheriting
            if changes.xattrs or inherits:
                missed += [f"{self.shown(path)}: {sentence}" for sentence in self.change(path, changes)]
        way = Outcome(Kind.BOUNCED if volume.is_direct else Kind.BUFFERED, Reason.SMALL_FILE, promise=Promise.DEVICE)
        return {way: Tally(len(files), sum(len(content) for _, content, _ in files))}, missed

    def sync(self, directory: bytes) -> None:
        """Make everything in the volume durable."""
        with naming(self._place(directory)):
            self._volume.sync()


class HostTree:
    """The files of this machine."""

    syncs_whole = False

    def shown(self, path: bytes) -> str:
        """A path as it can be printed."""
        return common.shown(self.exact(path))

    def exact(self, path: bytes) -> str:
        """The same with all its bytes."""
        return os.fsdecode(path)

    def is_same(self, other: Tree) -> bool:
        """Whether both are of this machine."""
        return isinstance(other, HostTree)

    def holds(self, path: bytes, other: Tree) -> bool:
        """Whether the file at `path` is the image that `other` is on."""
        return isinstance(other, VolumeTree) and is_same_image(os.fsdecode(path), other.image)

    def check_replaceable(self, path: bytes) -> None:
        """Raise what writing to the file would, as its directory may allow what it does not; and if it is in use."""
        if not os.path.isfile(path):
            return
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.ETXTBSY:  # A program that runs keeps its old file.
                raise _host_error(error, "opening for writing", path) from error
        from odirect.block.in_use import check_unused

        check_unused(path, what="replace")

    def status(self, path: bytes, *, follow: bool) -> os.stat_result | None:
        """What is at `path`, None if there is nothing."""
        try:
            return os.stat(path, follow_symlinks=follow)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _host_error(error, "looking at it", path) from error

    def below(self, path: bytes) -> Sequence[tuple[bytes, os.stat_result]]:
        """(path from there, what it is) of everything in a directory, a directory before what is in it."""
        found: list[tuple[bytes, os.stat_result]] = []
        waiting = [b""]
        while waiting:
            directory = waiting.pop()
            place = os.path.join(path, directory)
            with _answers("listing", place), os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    below = os.path.join(directory, entry.name)
                    status = entry.stat(follow_symlinks=False)
                    found.append((below, status))
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append(below)
        return found

    def read_link(self, path: bytes) -> bytes:
        """Where a symbolic link leads."""
        with _answers("reading the link", path):
            return os.readlink(path)

    def real_path(self, path: bytes) -> bytes:
        """The path without symbolic links."""
        return os.path.realpath(path)

    def xattrs(self, path: bytes, inode: int) -> dict[bytes, bytes]:
        """The extended attributes of what is at `path`, as far as they can be read."""
        found: dict[bytes, bytes] = {}
        try:
            for name in os.listxattr(path, follow_symlinks=False):
                with contextlib.suppress(OSError):
                    found[os.fsencode(name)] = os.getxattr(path, name, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                raise _host_error(error, "reading its attributes", path) from error
        return found

    def open_source(self, path: bytes, access: Access, *, small: bool) -> Source:
        """A file or block device to be read."""
        if small and access != "strict":
            file: Source = CachedFile(path, os.O_RDONLY)
        else:
            from odirect.files import open as open_direct

            file = open_direct(path, "r", access=access)
        if not file.size and (content := _made_while_read(path)):
            file.close()
            return Fetched(content, Outcome(Kind.BUFFERED, Reason.CACHED_BY_FS))
        return file

    def make_file(self, path: bytes, access: Access, *, small: bool) -> Target:
        """A new file, to be written and read."""
        if small and access != "strict":
            return CachedFile(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with _answers("making it", path):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _WHOLE))
        from odirect.files import open as open_direct

        return open_direct(path, "r+", access=access)

    def make_directory(self, path: bytes) -> None:
        """A new directory, for the owner alone as yet."""
        with _answers("making the directory", path):
            os.mkdir(path, 0o700)

    def make_link(self, path: bytes, target: bytes) -> None:
        """A new symbolic link."""
        with _answers("making the link", path):
            os.symlink(target, path)

    def make_node(self, path: bytes, mode: int, device: int) -> None:
        """A new fifo, socket or device."""
        with _answers("making it", path):
            os.mknod(path, mode, device)

    def make_name(self, path: bytes, other: bytes) -> None:
        """A further name for what is at `path`."""
        with _answers("linking", other):
            os.link(path, other, follow_symlinks=False)

    def change(self, path: bytes, changes: Changes) -> list[str]:
        """See `Changes`: the owner first, because that takes bits of the mode away, and the times last."""
        missed = []
        mode = changes.mode
        is_link = os.path.islink(path)
        if changes.owner is not None:
            status = os.lstat(path)
            try:
                if (status.st_uid, status.st_gid) != changes.owner:
                    os.lchown(path, *changes.owner)
            except OSError as error:
                missed.append(f"owner {changes.owner[0]}:{changes.owner[1]}: {os.strerror(error.errno or 0)}")
                # What is somebody else's runs as us now, so not with his rights.
                mode = None if mode is None else mode & ~(stat.S_ISUID | stat.S_ISGID)
        if changes.xattrs is not None:
            for name, reason in set_xattrs(path, changes.xattrs, follow_symlinks=False):
                missed.append(f"attribute {os.fsdecode(name)}: {os.strerror(reason.errno or 0)}")
        with _answers("changing its mode and times", path):
            if mode is not None and not is_link:
                os.chmod(path, mode)
            if changes.times_ns is not None:
                os.utime(path, ns=changes.times_ns, follow_symlinks=False)
        return missed

    def rename(self, path: bytes, other: bytes) -> None:
        """Move `path` over `other`."""
        with _answers("giving it its name", other):
            os.rename(path, other)

    def remove(self, path: bytes) -> None:
        """Remove what is no directory."""
        with _answers("removing", path):
            os.unlink(path)

    def fetch(self, paths: Sequence[bytes], inodes: Sequence[int]) -> None:
        """Nothing: the kernel reads ahead."""

    def make_small(self, files: Sequence[Small]) -> tuple[dict[Outcome, Tally], list[str]] | None:
        """None: files are made one by one."""
        return None

    def sync(self, directory: bytes) -> None:
        """Make the names in a directory durable."""
        with _answers("syncing", directory):
            fd = os.open(directory or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _made_while_read(path: bytes) -> bytes:
    """What a file without a size gives: nothing, or what is made while it is read, as in /proc."""
    with _answers("reading", path), open(path, "rb", buffering=0) as file:
        return file.readall()


class Fetched:
    """A small file that has been read already."""

    def __init__(self, content: bytes, outcome: Outcome) -> None:
        self._content = content
        self._outcome = outcome

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self._content)

    @property
    def totals(self) -> dict[Outcome, Tally]:
        """How it was read."""
        return {self._outcome: Tally(1, len(self._content))} if self._content else {}

    def preadinto(self, buffer: object, offset: int) -> int:
        """Copy into `buffer` from byte `offset`."""
        part = self._content[offset : offset + len(memoryview(buffer))]  # type: ignore[arg-type]
        memoryview(buffer)[: len(part)] = part  # type: ignore[arg-type]
        return len(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """All of it is data."""
        return offset if whence == os.SEEK_DATA else len(self._content)

    def close(self) -> None:
        """Nothing."""


class CachedFile:
    """A small file of this machine, through its page cache."""

    def __init__(self, path: bytes, flags: int) -> None:
        self._path = path
        self._tallies = Tallies()
        self._fd = -1
        with _answers("opening", path):
            self._fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, _WHOLE)

    @property
    def size(self) -> int:
        """The present size in bytes."""
        return os.fstat(self._fd).st_size

    @property
    def totals(self) -> dict[Outcome, Tally]:
        """How it went."""
        return self._tallies.totals()

    def preadinto(self, buffer: object, offset: int) -> int:
        """Read into `buffer` from byte `offset`."""
        with _answers("reading", self._path):
            count = os.preadv(self._fd, [memoryview(buffer)], offset)  # type: ignore[arg-type]
        self._tallies.add(Outcome(Kind.BUFFERED, Reason.SMALL_FILE), count)
        return count

    def pwrite(self, buffer: object, offset: int) -> int:
        """Write `buffer` at byte `offset`."""
        with _answers("writing", self._path):
            count = os.pwritev(self._fd, [memoryview(buffer)], offset)  # type: ignore[arg-type]
        self._tallies.add(Outcome(Kind.BUFFERED, Reason.SMALL_FILE), count)
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As os.lseek."""
        with _answers(f"seeking from {offset}", self._path):
            return os.lseek(self._fd, offset, whence)

    def truncate(self, size: int | None = None, /) -> int:
        """Make it `size` bytes long."""
        with _answers("truncating", self._path):
            os.ftruncate(self._fd, size or 0)
        return size or 0

    def sync(self, *, data_only: bool = False) -> None:
        """Make it durable."""
        with _answers("syncing", self._path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Close it. Twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def _answers(doing: str, path: bytes) -> Iterator[None]:
    """Turns the kernel's answers into errors of ours."""
    try:
        yield
    except ODirectError:
        raise
    except OSError as error:
        raise _host_error(error, doing, path) from error


def _host_error(error: OSError, doing: str, path: bytes) -> ODirectError:
    return from_errno(error.errno or errno.EIO, doing, os.fsdecode(path))
