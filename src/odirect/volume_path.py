"""Paths inside a volume, in the manner of `pathlib`."""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import re
from collections.abc import Iterator
from typing import IO, Any, cast

from odirect.base.errors import ExistsError, MissingError, ODirectError
from odirect.fs.base import Access, FileKind
from odirect.fs.paths import MOST_LINKS
from odirect.volume_file import FileInVolume
from odirect.volume_names import InVolume, VolumeNames
from odirect.volume_pure_path import PureVolumePath, Segment, check_text

_MAGIC = re.compile(r"[*?\[]")


class VolumePath(PureVolumePath):
    """A path inside an open volume, and what is there.

    `volume / "etc" / "hosts"` makes one. Nothing is asked of the volume until a method needs it.
    """

    __slots__ = ()

    volume: VolumeNames

    def __init__(self, volume: VolumeNames, *segments: Segment) -> None:
        super().__init__(volume, *segments)

    # Looking.

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """What is there."""
        return self.volume.stat(self, follow_symlinks=follow_symlinks)

    def lstat(self) -> os.stat_result:
        """What is there, be it a symbolic link."""
        return self.volume.lstat(self)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is anything."""
        return self.volume.exists(self, follow_symlinks=follow_symlinks)

    def is_dir(self) -> bool:
        """Whether it is a directory, or leads to one."""
        return self.volume.is_dir(self)

    def is_file(self) -> bool:
        """Whether it is a regular file, or leads to one."""
        return self.volume.is_file(self)

    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return self.volume.is_symlink(self)

    def is_fifo(self) -> bool:
        """Whether it is a fifo, or leads to one."""
        return self._is(FileKind.FIFO)

    def is_socket(self) -> bool:
        """Whether it is a socket, or leads to one."""
        return self._is(FileKind.SOCKET)

    def is_block_device(self) -> bool:
        """Whether it is a block device, or leads to one."""
        return self._is(FileKind.BLOCK)

    def is_char_device(self) -> bool:
        """Whether it is a character device, or leads to one."""
        return self._is(FileKind.CHARACTER)

    def is_mount(self) -> bool:
        """Whether it is the root: nothing is mounted inside a volume."""
        return not self._parts

    def samefile(self, other: Segment) -> bool:
        """Whether both lead to one inode; text is a path of this volume."""
        if isinstance(other, InVolume) and other.volume is not self.volume:
            return False
        return os.path.samestat(self.stat(), self.volume.stat(other))

    def owner(self) -> str:
        """The name that this machine has for the owner. Raises KeyError if it has none."""
        import pwd

        return pwd.getpwuid(self.stat().st_uid).pw_name

    def group(self) -> str:
        """The name that this machine has for the group. Raises KeyError if it has none."""
        import grp

        return grp.getgrgid(self.stat().st_gid).gr_name

    def resolve(self, strict: bool = False) -> VolumePath:
        """The path of the same thing with no symbolic link and no ".." in it.

        What is missing is taken as it is written, unless strict. Raises PathError for links in a ring.
        """
        if strict:
            self.stat()
        done: list[str] = []
        ahead = list(reversed(self._parts))
        links = 0
        while ahead:
            part = ahead.pop()
            if part in ("", "."):
                continue
            if part == "..":
                del done[-1:]
                continue
            place = self._made((*done, part))
            try:
                target = self.volume.readlink(place)
            except ODirectError as error:
                if not isinstance(error, (MissingError, NotADirectoryError)) and error.errno != errno.EINVAL:
                    raise
                done.append(part)
                continue
            links += 1
            if links > MOST_LINKS:
                self.stat()  # It says so better.
                break
            if target.startswith("/"):
                done.clear()
            ahead += reversed(target.split("/"))
        return self._made(tuple(done))

    def iterdir(self) -> Iterator[VolumePath]:
        """Everything in this directory."""
        for name in self.volume.listdir(self.path):
            yield self._made((*self._parts, name))

    def glob(self, pattern: str) -> Iterator[VolumePath]:
        """What is below this directory and matches: "*.txt", "*/name", "**" for any number of directories.

        Links are followed by a name or "*", not by "**". Raises ValueError for an empty or absolute pattern.
        """
        check_text(pattern, "a pattern")
        if not pattern or pattern.startswith("/"):
            raise ValueError(f"{pattern!r} is no relative pattern")
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        seen: set[VolumePath] = set()
        for found in self._select(parts, directory_wanted=pattern.endswith("/")):
            if found not in seen:
                seen.add(found)
                yield found

    def rglob(self, pattern: str) -> Iterator[VolumePath]:
        """What matches in this directory and at any depth below it."""
        check_text(pattern, "a pattern")
        return self.glob(f"**/{pattern}")

    def walk(self, top_down: bool = True) -> Iterator[tuple[VolumePath, list[str], list[str]]]:
        """(directory, names of directories, other names) for this directory and all below."""
        for place, directories, others in self.volume.walk(self.path, topdown=top_down):
            yield VolumePath(self.volume, place), directories, others

    def readlink(self) -> str:
        """Where the symbolic link leads, as it is written."""
        return self.volume.readlink(self)

    # Files.

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        access: Access = "auto",
    ) -> IO[Any]:
        """A file object as the built-in `open` gives it: text, or with "b" buffered bytes, or raw with buffering=0.

        `Volume.open` has all that a raw file can do.
        """
        if not isinstance(mode, str):
            raise TypeError(f"the mode must be str, not {type(mode).__name__}")
        is_binary = "b" in mode
        if buffering == 0 and not is_binary:
            raise ValueError("text cannot be unbuffered")
        if is_binary and (encoding or errors or newline):
            raise ValueError("bytes have no encoding, errors or newline")
        raw = self.volume.open(self, mode.replace("t", "", 1) if not is_binary else mode, access=access)
        if buffering == 0:
            return cast("IO[Any]", raw)
        try:
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            buffered = _buffered(raw, mode, size)
            if is_binary:
                return cast("IO[Any]", buffered)
            return io.TextIOWrapper(
                cast("io.BufferedRandom", buffered), encoding or "utf-8", errors, newline, line_buffering=buffering == 1
            )
        except OverflowError as error:
            raw.close()
            raise ValueError(f"a buffer of {buffering} bytes is too large") from error
        except BaseException:
            raw.close()
            raise

    def read_bytes(self) -> bytes:
        """All bytes of the file."""
        return self.volume.read_bytes(self)

    def write_bytes(self, data: object) -> int:
        """How many bytes were written: all of `data`, which the file then holds."""
        return self.volume.write_bytes(self, data)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The file's text, with every line's end as "\\n"."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding, errors).read()

    def write_text(self, text: str, encoding: str = "utf-8", errors: str = "strict") -> int:
        """How many characters were written: all of `text`, which the file then holds."""
        if not isinstance(text, str):
            raise TypeError(f"text must be str, not {type(text).__name__}")
        self.write_bytes(text.encode(encoding, errors))
        return len(text)

    def touch(self, mode: int = 0o644, exist_ok: bool = True) -> None:
        """Make an empty file, or set the times of what is there to now."""
        if exist_ok:
            try:
                self.volume.utime(self)
                return
            except MissingError:
                pass
        try:
            self.volume.open(self, "x", permissions=mode).close()
        except ExistsError:
            if not exist_ok:
                raise

    # Changing.

    def mkdir(self, mode: int = 0o755, parents: bool = False, exist_ok: bool = False) -> None:
        """Make this directory."""
        self.volume.mkdir(self, mode, parents=parents, exist_ok=exist_ok)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove this name of what is no directory."""
        try:
            self.volume.remove(self)
        except MissingError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        """Remove this empty directory."""
        self.volume.rmdir(self)

    def rename(self, target: Segment) -> VolumePath:
        """The new path, once this has been moved there, over what is there as rename(2) has it."""
        path = VolumePath(self.volume, target)
        self.volume.rename(self, path)
        return path

    replace = rename

    def symlink_to(self, target: Segment, target_is_directory: bool = False) -> None:
        """Make this a symbolic link to `target`."""
        self.volume.symlink(target, self)

    def hardlink_to(self, target: Segment) -> None:
        """Make this one more name of what is at `target`."""
        self.volume.link(target, self)

    def chmod(self, mode: int, *, follow_symlinks: bool = True) -> None:
        """Set the permissions."""
        self.volume.chmod(self, mode, follow_symlinks=follow_symlinks)

    # How.

    def _is(self, kind: FileKind) -> bool:
        return self.exists() and self.volume.attributes(self).kind is kind

    def _select(self, parts: list[str], *, directory_wanted: bool) -> Iterator[VolumePath]:
        if not parts:
            if not directory_wanted or self.is_dir():
                yield self
            return
        first, rest = parts[0], parts[1:]
        if first == "**":
            for place, _, _ in self.volume.walk(self.path):
                below = VolumePath(self.volume, place)
                if rest:
                    yield from below._select(rest, directory_wanted=directory_wanted)
                else:
                    yield below
            return
        if first == ".." or not _MAGIC.search(first):
            found = self._made((*self._parts, first))
            if found.exists(follow_symlinks=bool(rest)):
                yield from found._select(rest, directory_wanted=directory_wanted)
            return
        matches = re.compile(fnmatch.translate(first)).match
        try:
            with self.volume.scandir(self.path) as entries:
                chosen = [entry.name for entry in entries if matches(entry.name) and (not rest or entry.is_dir())]
        except (MissingError, NotADirectoryError):
            return
        for name in chosen:
            yield from self._made((*self._parts, name))._select(rest, directory_wanted=directory_wanted)


def _buffered(raw: FileInVolume, mode: str, size: int) -> io.BufferedIOBase:
    if "+" in mode:
        return io.BufferedRandom(raw, size)
    return io.BufferedReader(raw, size) if mode[0] == "r" else io.BufferedWriter(raw, size)
