"""What looking at a volume gives: `os.stat_result`, `os.statvfs_result`, and entries like `os.DirEntry`."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import AnyStr, Generic, Protocol

from odirect.base.errors import MissingError
from odirect.fs.base import Attributes, FileKind, SpaceUse

_SECOND_NS = 1_000_000_000
_READ_ONLY = 1  # ST_RDONLY


def stat_result(attributes: Attributes, device: int) -> os.stat_result:
    """Attributes as `os.stat` gives them. device: a number for the volume, to tell its files from others'."""
    times = (attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns)
    plain = (
        attributes.mode,
        attributes.inode,
        device,
        attributes.links,
        attributes.uid,
        attributes.gid,
        attributes.size,
        *(time_ns // _SECOND_NS for time_ns in times),
    )
    more: dict[str, object] = {
        "st_blksize": attributes.block_bytes,
        "st_blocks": attributes.blocks512,
        "st_rdev": attributes.device_number,
    }
    for name, time_ns in zip(("st_atime", "st_mtime", "st_ctime"), times, strict=True):
        more[name] = time_ns / _SECOND_NS
        more[f"{name}_ns"] = time_ns
    return os.stat_result(plain, more)


def statvfs_result(space: SpaceUse, *, writable: bool) -> os.statvfs_result:
    """How full a volume is, as `os.statvfs` gives it: f_blocks is without the overhead."""
    return os.statvfs_result(
        (
            space.block_bytes,
            space.block_bytes,
            max(0, space.blocks - space.overhead),
            space.free,
            space.available,
            space.files,
            space.free_files,
            space.free_files,
            0 if writable else _READ_ONLY,
            space.name_bytes,
        )
    )


class Stats(Protocol):
    """What an entry needs of its volume."""

    def stat(self, path: str | bytes, *, follow_symlinks: bool = True) -> os.stat_result:
        """What is at `path`."""
        ...


class VolumeEntry(Generic[AnyStr]):
    """A name in a directory of a volume, as `os.DirEntry` is one of a mounted directory.

    name, and path (what was scanned, and the name), are of the type of the scanned path.
    """

    __slots__ = ("_inode", "_kind", "_stat", "_stats", "name", "path")

    def __init__(self, stats: Stats, name: AnyStr, path: AnyStr, inode: int, kind: FileKind) -> None:
        self.name: AnyStr = name
        self.path: AnyStr = path
        self._stats = stats
        self._inode = inode
        self._kind = kind
        self._stat: dict[bool, os.stat_result] = {}

    def inode(self) -> int:
        """The number of its inode."""
        return self._inode

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a directory, or leads to one. False if there is nothing any more."""
        return self._is(FileKind.DIRECTORY, stat.S_ISDIR, follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a regular file, or leads to one. False if there is nothing any more."""
        return self._is(FileKind.REGULAR, stat.S_ISREG, follow_symlinks)

    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return self._is(FileKind.SYMLINK, stat.S_ISLNK, False)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """What it is, asked once."""
        found = self._stat.get(follow_symlinks)
        if found is None:
            found = self._stat[follow_symlinks] = self._stats.stat(self.path, follow_symlinks=follow_symlinks)
        return found

    def __repr__(self) -> str:
        return f"<VolumeEntry {self.name!r}>"

    def _is(self, kind: FileKind, test: Callable[[int], bool], follow: bool) -> bool:
        known = self._kind
        if known is not FileKind.UNKNOWN and not (follow and known is FileKind.SYMLINK):
            return known is kind
        try:
            return test(self.stat(follow_symlinks=follow).st_mode)
        except MissingError:
            return False


class Scan(Generic[AnyStr]):
    """The entries of a directory as it was when it was scanned: an iterator and a context manager."""

    def __init__(self, entries: list[VolumeEntry[AnyStr]]) -> None:
        self._entries: Iterator[VolumeEntry[AnyStr]] = iter(entries)

    def __iter__(self) -> Iterator[VolumeEntry[AnyStr]]:
        return self

    def __next__(self) -> VolumeEntry[AnyStr]:
        return next(self._entries)

    def close(self) -> None:
        """Leave the rest out."""
        self._entries = iter(())

    def __enter__(self) -> Scan[AnyStr]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
