"""`odirect cp` where a volume has part in it: into one, out of one, between two, or within one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from odirect.base.errors import (
    DirectoryError,
    ForbiddenError,
    InUseError,
    MissingError,
    NoSpaceError,
    NotDirectoryError,
    ODirectError,
    PathError,
    UnsupportedError,
    VerifyError,
)
from odirect.base.units import align_down, align_up
from odirect.block.buffers import empty
from odirect.cli import common, places
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import Volumes, temporary_beside
from odirect.cli.standard import STDIN
from odirect.cli.trees import (
    SMALL_BYTES,
    Access,
    Changes,
    HostTree,
    Queued,
    Small,
    Source,
    Target,
    Tree,
    VolumeTree,
)
from odirect.copying import CHUNK_BYTES, DEPTH, CopyReport, read_full
from odirect.dio.outcome import Outcome, Tally
from odirect.sched.clock import MonotonicClock
from odirect.sched.interrupts import Interrupts

if TYPE_CHECKING:
    from odirect.dio.requests import Request

# What the edges of holes are rounded to: no file system here has larger blocks.
_BLOCK_BYTES = 4096
_PERMISSIONS = 0o777
# Small files that are read, or made, at once.
_AT_ONCE, _AT_ONCE_BYTES = 512, 16 << 20


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for. keep: all attributes, and hard links."""

    recursive: bool = False
    keep: bool = False
    verify: bool = False
    durable: bool = False
    sparse: bool = True
    access: Access = "auto"
    chunk_bytes: int = CHUNK_BYTES
    depth: int = DEPTH


class TreeCopied(NamedTuple):
    """How the copy of one source went. left_out: what could not be kept, a sentence each."""

    report: CopyReport
    files: int
    directories: int
    links: int
    nodes: int
    hard_links: int
    left_out: list[str]


class _Item(NamedTuple):
    """Something to copy: where it is, where it goes, and what it is."""

    source: bytes
    target: bytes
    status: os.stat_result


def copy_all(
    sources: list[str],
    target: str,
    options: Options,
    progress: bool,
    tell: Callable[[str, TreeCopied], None],
) -> None:
    """Copy each source, and `tell` how it went. Raises UsageError, and the first error met."""
    to = places.parse(target)
    found = [(text, places.parse(text, is_there=True)) for text in sources]
    with Volumes(writing=[to] if to is not None else []) as volumes:
        into = _tree(volumes, to)
        goal = os.fsencode(target) if to is None else to.path
        status = into.status(goal, follow=True)
        is_directory = status is not None and stat.S_ISDIR(status.st_mode)
        if len(sources) > 1 and not is_directory:
            raise click.UsageError(f"{into.shown(goal)} is not a directory, and there are several sources")
        for text, place in found:
            if text == common.STDIO:
                if is_directory:
                    raise DirectoryError("it is a directory; a stream has no name to take there", path=into.shown(goal))
                source, path = None, b""
            else:
                source, path = _tree(volumes, place), os.fsencode(text) if place is None else place.path
            exact = text if place is None else place.exact
            with common.progress_bar(common.shown(exact), progress) as told, Interrupts() as interrupts:
                copier = _Copier(into, options, told, interrupts)
                if source is None:
                    copied = copier.take_in(goal)
                else:
                    copied = copier.copy(source, path, goal, is_directory=is_directory)
            tell(exact, copied)
        # Closing the volume makes it durable; this says so before the command does.


def _tree(volumes: Volumes, place: VolumePlace | None) -> Tree:
    return HostTree() if place is None else VolumeTree(volumes.of(place), place.image)


class _Copier:
    """One copy: of a file, of a tree or of what a stream gives."""

    def __init__(
        self, into: Tree, options: Options, progress: Callable[[int, int], None] | None, interrupts: Interrupts
    ) -> None:
        self._into = into
        self._options = options
        self._progress = progress
        self._interrupts = interrupts
        self._total = self._done = 0
        self._counts = dict.fromkeys(("files", "directories", "links", "nodes", "hard_links"), 0)
        self._copied = self._skipped = 0
        self._left_out: list[str] = []
        self._reads: dict[Outcome, Tally] = {}
        self._writes: dict[Outcome, Tally] = {}
        #: What the file at hand had counted when it was written, and before it was read back.
        self._proven: dict[Outcome, Tally] | None = None
        self._buffers: list[memoryview] = []
        self._small: list[Small] = []
        self._small_bytes = 0
        #: Directories that this copy has made: nothing can be there already.
        self._fresh: set[bytes] = set()
        self._clock = MonotonicClock()
        self._began_ns = self._clock.now_ns()
        self._umask = _umask()

    # The whole.

    def copy(self, source: Tree, path: bytes, goal: bytes, *, is_directory: bool) -> TreeCopied:
        """Copy what is at `path` of `source` to `goal`, or into the directory that it is."""
        options, into = self._options, self._into
        deep = options.recursive or options.keep
        top = source.status(path, follow=not deep or path.endswith(b"/"))
        if top is None:
            raise MissingError("there is no such file or directory", path=source.shown(path))
        if is_directory:
            goal = _into_directory(goal, path, source)
        elif into.status(goal, follow=False) is not None:
            goal = into.real_path(goal)
        if stat.S_ISDIR(top.st_mode) and not deep:
            raise DirectoryError("it is a directory; -r copies it with all that is in it", path=source.shown(path))
        if goal.endswith(b"/") and not stat.S_ISDIR(top.st_mode):
            raise NotDirectoryError("there is no such directory", path=into.shown(goal))
        goal = goal.rstrip(b"/") or b"/"
        self._refuse_same(source, path, top, goal)
        items = _plan(source, path, goal, top)
        self._total = sum(item.status.st_size for item in items if stat.S_ISREG(item.status.st_mode))
        self._total *= 2 if options.verify else 1
        seen: dict[tuple[int, int], bytes] = {}
        fetched = 0
        for number, item in enumerate(items):
            self._interrupts.check()
            if number >= fetched and len(items) > 1 and self._is_small(item):
                fetched = self._fetch(source, items, number)
            self._copy_one(source, item, seen, is_top=number == 0, in_tree=len(items) > 1)
        self._make_small()
        for item in reversed(items):
            # When nothing is added to a directory any more, so that its times stay.
            if stat.S_ISDIR(item.status.st_mode) and (options.keep or item.target in self._fresh):
                self._finish(source, item)
        return self._ended(goal)

    def take_in(self, goal: bytes) -> TreeCopied:
        """Write what standard input gives to the file `goal`."""
        if self._into.status(goal, follow=False) is not None:
            goal = self._into.real_path(goal)
        replaced = self._into.status(goal, follow=False)
        changes = self._changes_of(None, 0o666, replaced)
        with self._made(goal, small=False) as (file, name):
            pieces: dict[int, tuple[int, bytes]] | None = {} if self._options.verify else None
            buffer = self._take(1)[0][: self._options.chunk_bytes]
            offset = 0
            while length := read_full(STDIN, buffer, self._interrupts):
                if pieces is not None:
                    pieces[offset] = length, _digest(buffer[:length])
                _write_all(file, buffer[:length], offset, self._into.shown(goal))
                offset += length
                self._add(length, copied=True)
            self._settle(file, goal, offset, pieces)
            self._change(name, goal, changes)
        self._counts["files"] += 1
        return self._ended(goal)

    def _ended(self, goal: bytes) -> TreeCopied:
        options = self._options
        if options.durable:
            # The names in directories, from the innermost on; a volume makes all durable at once.
            for directory in [] if self._into.syncs_whole else sorted(self._fresh, reverse=True):
                self._into.sync(directory)
            self._into.sync(os.path.dirname(goal))
        seconds = (self._clock.now_ns() - self._began_ns) / 1e9
        report = CopyReport(
            self._into.exact(goal),
            self._copied,
            self._skipped,
            seconds,
            self._reads,
            self._writes,
            options.verify,
            options.durable,
        )
        return TreeCopied(report, **self._counts, left_out=self._left_out)

    # One thing.

    def _copy_one(
        self, source: Tree, item: _Item, seen: dict[tuple[int, int], bytes], *, is_top: bool, in_tree: bool
    ) -> None:
        status, goal, into = item.status, item.target, self._into
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            self._copy_directory(item, is_top=is_top)
            return
        identity = status.st_dev, status.st_ino
        known = seen.get(identity) if self._options.keep and status.st_nlink > 1 else None
        if known is not None:
            with self._new_name(goal) as name:
                into.make_name(known, name)
            self._counts["hard_links"] += 1
            return
        if stat.S_ISREG(mode) or (
            stat.S_ISBLK(mode) and is_top and not (self._options.recursive or self._options.keep)
        ):
            self._copy_file(source, item, small=in_tree and status.st_size < SMALL_BYTES)
            self._counts["files"] += 1
        elif stat.S_ISLNK(mode):
            target = source.read_link(item.source)
            with self._new_name(goal) as name:
                into.make_link(name, target)
                self._finish(source, item, name)
            self._counts["links"] += 1
        elif not in_tree and not self._options.keep and not self._options.recursive:
            raise UnsupportedError(
                "it is neither a file nor a directory; -a copies what it is", path=source.shown(item.source)
            )
        else:
            try:
                with self._new_name(goal) as name:
                    into.make_node(name, stat.S_IFMT(mode) | 0o600, status.st_rdev)
                    self._finish(source, item, name)
            except ForbiddenError as error:
                self._left_out.append(f"{into.shown(goal)}: {error.message}")
                return
            self._counts["nodes"] += 1
        seen[identity] = goal

    def _is_small(self, item: _Item) -> bool:
        """Whether many such files are moved at once: no holes, no further names, nothing demanded of each."""
        status = item.status
        return (
            stat.S_ISREG(status.st_mode)
            and status.st_size < SMALL_BYTES
            and status.st_blocks * 512 >= status.st_size
            and not (self._options.keep and status.st_nlink > 1)
            and self._options.access != "strict"
        )

    def _fetch(self, source: Tree, items: list[_Item], first: int) -> int:
        """Have the small files from number `first` on read at once, as many as fit; the number of the next."""
        wanted: list[_Item] = []
        size = 0
        for number in range(first, len(items)):
            if self._is_small(items[number]):
                if len(wanted) == _AT_ONCE or size > _AT_ONCE_BYTES:
                    break
                wanted.append(items[number])
                size += items[number].status.st_size
            number += 1
        source.fetch([item.source for item in wanted], [item.status.st_ino for item in wanted])
        return number

    def _keep_small(self, source: Tree, item: _Item, reading: Source) -> None:
        """Read a small file, to be made together with others."""
        content = bytearray(reading.size)
        if reading.preadinto(content, 0) < len(content):
            raise _shrank(source.shown(item.source))
        changes = self._changes_of((source, item), item.status.st_mode, None)
        self._small.append(Small(item.target, content, changes))
        self._small_bytes += len(content)
        if len(self._small) == _AT_ONCE or self._small_bytes > _AT_ONCE_BYTES:
            self._make_small()

    def _make_small(self) -> None:
        files, self._small, size, self._small_bytes = self._small, [], self._small_bytes, 0
        made = self._into.make_small(files) if files else None
        if made is not None:
            _count(self._writes, made[0])
            self._left_out += made[1]
            self._add(size, copied=True)

    def _copy_directory(self, item: _Item, *, is_top: bool) -> None:
        if os.path.dirname(item.target) not in self._fresh:
            # Below the top no link is gone through: one that was copied before could lead anywhere.
            there = self._into.status(item.target, follow=is_top)
            if there is not None:
                if not stat.S_ISDIR(there.st_mode):
                    raise NotDirectoryError(
                        "a directory cannot replace what is none", path=self._into.shown(item.target)
                    )
                return
        self._into.make_directory(item.target)
        self._fresh.add(item.target)
        self._counts["directories"] += 1

    def _copy_file(self, source: Tree, item: _Item, *, small: bool) -> None:
        options, goal = self._options, item.target
        replaced = self._status_of_name(goal)
        reading = source.open_source(item.source, options.access, small=small)
        try:
            size = reading.size
            if (
                small
                and isinstance(self._into, VolumeTree)
                and not options.verify
                and self._is_small(item)
                and os.path.dirname(goal) in self._fresh
            ):
                self._keep_small(source, item, reading)
                return
            with self._made(goal, small=small and not options.verify) as (writing, name):
                pieces: dict[int, tuple[int, bytes]] | None = {} if options.verify else None
                runs = self._runs(reading, size, is_block=stat.S_ISBLK(item.status.st_mode))
                for start, end in runs:
                    self._move(reading, writing, start, end, pieces, source.shown(item.source), goal)
                skipped = size - sum(min(end, size) - start for start, end in runs)
                self._add(skipped, copied=False)
                self._settle(writing, goal, size, pieces)
                if options.keep or not stat.S_ISREG(item.status.st_mode):
                    mode = item.status.st_mode if stat.S_ISREG(item.status.st_mode) else 0o666
                    self._change(name, goal, self._changes_of((source, item), mode, replaced))
                else:
                    self._change(name, goal, self._changes_of(None, item.status.st_mode, replaced))
        finally:
            _count(self._reads, reading.totals)
            reading.close()

    def _settle(self, file: Target, goal: bytes, size: int, pieces: dict[int, tuple[int, bytes]] | None) -> None:
        """Give a file that has its bytes its size, and make and prove it what was asked for."""
        if file.size != size:
            file.truncate(size)
        if self._options.durable and not self._into.syncs_whole:
            file.sync()
        if pieces is not None:
            self._proven = file.totals
            self._check(file, size, pieces, self._into.shown(goal))

    # Bytes.

    def _runs(self, file: Source, size: int, *, is_block: bool) -> list[tuple[int, int]]:
        """[start, end) of what is to be moved: all, or what is no hole, to whole blocks."""
        if not self._options.sparse or is_block:
            return [(0, size)] if size else []
        found: list[tuple[int, int]] = []
        at = 0
        while at < size:
            try:
                start = file.seek(at, os.SEEK_DATA)
                end = file.seek(start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                start, end = at, size  # It does not tell.
            start, end = align_down(start, _BLOCK_BYTES), min(align_up(end, _BLOCK_BYTES), size)
            if found and start <= found[-1][1]:
                found[-1] = found[-1][0], end
            elif start < end:
                found.append((start, end))
            at = max(end, at + 1)
        return found

    def _move(
        self,
        reading: Source,
        writing: Target,
        start: int,
        end: int,
        pieces: dict[int, tuple[int, bytes]] | None,
        source: str,
        goal: bytes,
    ) -> None:
        """Copy [start, end): a piece after the other, or several at once where both sides take that."""
        shown = self._into.shown(goal)
        if end - start > self._options.chunk_bytes and isinstance(reading, Queued) and isinstance(writing, Queued):
            self._move_queued(reading, writing, start, end, pieces, source, shown)
            return
        buffer = self._take(1)[0]
        for offset in range(start, end, len(buffer)):
            length = min(end - offset, len(buffer))
            if reading.preadinto(buffer[: align_up(length, _BLOCK_BYTES)], offset) < length:
                raise _shrank(source)
            self._note(pieces, offset, buffer[:length])
            _write_all(writing, self._padded(buffer, length), offset, shown)
            self._add(length, copied=True)

    def _move_queued(
        self,
        reading: Queued,
        writing: Queued,
        start: int,
        end: int,
        pieces: dict[int, tuple[int, bytes]] | None,
        source: str,
        shown: str,
    ) -> None:
        """Copy [start, end): while some chunks are written, the next ones are read."""
        chunk = self._options.chunk_bytes
        half = max(1, self._options.depth // 2)
        buffers = self._take(2 * half)
        groups = buffers[:half], buffers[half : 2 * half]
        written = 0
        try:
            for turn, first in enumerate(range(start, end, half * chunk)):
                group = groups[turn % 2]
                for number, offset in enumerate(range(first, min(first + half * chunk, end), chunk)):
                    length = min(chunk, end - offset)
                    reading.submit("read", offset, group[number][: align_up(length, _BLOCK_BYTES)], (offset, number))
                # The other half of the buffers is free when it has been written.
                written = self._written(writing, written, shown)
                got = []
                for request in reading.completions():
                    offset, number = _tag(request)
                    length = min(chunk, end - offset)
                    if request.result() < length:
                        raise _shrank(source)
                    got.append((offset, number, length))
                for offset, number, length in sorted(got):
                    self._note(pieces, offset, group[number][:length])
                    writing.submit("write", offset, self._padded(group[number], length), length)
                    written += 1
            self._written(writing, written, shown)
        except BaseException:
            # Their memory is the device's until they are done (F24).
            for file in (reading, writing):
                for _ in file.completions():
                    pass
            raise

    def _written(self, writing: Queued, expected: int, shown: str) -> int:
        """Wait for what is being written; 0, the number that is left."""
        if expected:
            for request in writing.completions():
                if request.result() < request.length:
                    raise NoSpaceError(f"only {request.result()} of {request.length} bytes had room", path=shown)
                self._add(int(str(request.tag)), copied=True)
        return 0

    def _padded(self, buffer: memoryview, length: int) -> memoryview:
        """What is written of a chunk: all of it, up to a whole block where only that goes direct."""
        if self._options.access != "strict" or length % _BLOCK_BYTES == 0:
            return buffer[:length]
        end = align_up(length, _BLOCK_BYTES)
        buffer[length:end] = bytes(end - length)
        return buffer[:end]

    def _note(self, pieces: dict[int, tuple[int, bytes]] | None, offset: int, view: memoryview) -> None:
        if pieces is not None:
            pieces[offset] = len(view), _digest(view)

    def _check(self, file: Source, size: int, pieces: dict[int, tuple[int, bytes]], shown: str) -> None:
        """Read the copy back and compare it with what was written; what was not must be zeroes."""
        buffer = self._take(1)[0]
        at = 0
        for offset, (length, expected) in [*sorted(pieces.items()), (size, (0, b""))]:
            while at < offset:
                gap = min(offset - at, len(buffer))
                if bytes(self._read_back(file, buffer, at, gap, shown)) != bytes(gap):
                    raise VerifyError(f"bytes {at} to {at + gap - 1} should be zeroes, and are not", path=shown)
                at += gap
                self._add(gap, copied=None)
            if length and _digest(self._read_back(file, buffer, offset, length, shown)) != expected:
                raise VerifyError(f"bytes {offset} to {offset + length - 1} are not what was written there", path=shown)
            at = offset + length
            self._add(length, copied=None)

    def _read_back(self, file: Source, buffer: memoryview, offset: int, length: int, shown: str) -> memoryview:
        done = file.preadinto(buffer[: align_up(length, _BLOCK_BYTES)], offset)
        if done < length:
            raise VerifyError(f"only {done} of {length} bytes at {offset} could be read back", path=shown)
        return buffer[:length]

    def _take(self, count: int) -> list[memoryview]:
        while len(self._buffers) < count:
            self._buffers.append(empty(align_up(max(self._options.chunk_bytes, SMALL_BYTES), _BLOCK_BYTES)))
        return self._buffers

    def _add(self, count: int, *, copied: bool | None) -> None:
        """Tell of progress; None: of what was verified. A signal that has come ends the copy here."""
        if copied:
            self._copied += count
        elif copied is False:
            self._skipped += count
        self._done += count
        progress = self._progress
        if progress is not None and count:
            self._interrupts.allowed(lambda: progress(self._done, max(self._done, self._total) if self._total else 0))
        self._interrupts.check()

    # Names and attributes.

    @contextlib.contextmanager
    def _made(self, goal: bytes, *, small: bool) -> Iterator[tuple[Target, bytes]]:
        """A new open file and the name that it has as yet; it takes its real one when all went well."""
        with self._new_name(goal, is_file=True) as name:
            file = self._into.make_file(name, self._options.access, small=small)
            self._proven = None
            try:
                yield file, name
            finally:
                written = file.totals if self._proven is None else self._proven
                _count(self._writes, written)
                _count(self._reads, file.totals, written)  # What was read back.
                file.close()

    @contextlib.contextmanager
    def _new_name(self, goal: bytes, *, is_file: bool = False) -> Iterator[bytes]:
        """The name that something is made under: hidden, unless its directory is of our making; removed on failure.

        A file takes the place of files and symbolic links alone: `cp x /dev/null` must not be the end of that.
        """
        into = self._into
        name = goal
        if os.path.dirname(goal) not in self._fresh:
            there = into.status(goal, follow=False)
            if there is not None and stat.S_ISDIR(there.st_mode):
                raise DirectoryError(
                    "a directory has that name, and is not replaced by what is none", path=into.shown(goal)
                )
            if is_file and there is not None and not (stat.S_ISREG(there.st_mode) or stat.S_ISLNK(there.st_mode)):
                message = "it is neither a file nor a directory, and is not replaced; use - for a stream"
                raise UnsupportedError(message, path=into.shown(goal))
            if there is not None:
                into.check_replaceable(goal)
            name = temporary_beside(goal, lambda path: into.status(path, follow=False) is not None)
        try:
            yield name
            if name != goal:
                into.rename(name, goal)
        except BaseException as error:
            with contextlib.suppress(ODirectError):
                into.remove(name)
            if isinstance(error, ODirectError) and error.filename == into.shown(name):
                error.filename = into.shown(goal)  # What the user knows.
            raise

    def _status_of_name(self, goal: bytes) -> os.stat_result | None:
        if os.path.dirname(goal) in self._fresh:
            return None
        return self._into.status(goal, follow=False)

    def _finish(self, source: Tree, item: _Item, name: bytes | None = None) -> None:
        if self._options.keep:
            changes = self._changes_of((source, item), item.status.st_mode, None)
        elif stat.S_ISLNK(item.status.st_mode):
            return
        else:
            changes = self._changes_of(None, item.status.st_mode, None)
        self._change(item.target if name is None else name, item.target, changes)

    def _changes_of(self, original: tuple[Tree, _Item] | None, mode: int, replaced: os.stat_result | None) -> Changes:
        """What is set on a copy: all that its original has, or a mode as `cp` gives it."""
        if original is not None and self._options.keep:
            tree, item = original
            status = item.status
            return Changes(
                None if stat.S_ISLNK(status.st_mode) else stat.S_IMODE(status.st_mode),
                (status.st_uid, status.st_gid),
                (status.st_atime_ns, status.st_mtime_ns),
                tree.xattrs(item.source, status.st_ino),
            )
        if replaced is not None and stat.S_ISREG(replaced.st_mode):
            return Changes(stat.S_IMODE(replaced.st_mode), (replaced.st_uid, replaced.st_gid))
        return Changes(mode & _PERMISSIONS & ~self._umask)

    def _change(self, name: bytes, goal: bytes, changes: Changes) -> None:
        self._left_out += [f"{self._into.shown(goal)}: {missed}" for missed in self._into.change(name, changes)]

    def _refuse_same(self, source: Tree, path: bytes, top: os.stat_result, goal: bytes) -> None:
        """Raise PathError if something would be copied onto or into itself."""
        into = self._into
        if (there := into.status(goal, follow=True)) is not None and into.holds(goal, source):
            raise PathError("it is the image that is copied from", errno=errno.EINVAL, path=into.shown(goal))
        if source.holds(path, into):
            raise PathError("it is the image that is copied to", errno=errno.EINVAL, path=source.shown(path))
        if not source.is_same(into):
            return
        if there is not None and os.path.samestat(there, top):
            raise PathError("source and target are the same", errno=errno.EINVAL, path=source.shown(path))
        if stat.S_ISDIR(top.st_mode):
            above = os.path.dirname(goal) or b"."
            while True:
                there = into.status(above, follow=True)
                if there is not None and os.path.samestat(there, top):
                    raise PathError(
                        f"it cannot be copied into itself ({into.shown(goal)})",
                        errno=errno.EINVAL,
                        path=source.shown(path),
                    )
                if above in (b"/", b".", b""):
                    return
                above = os.path.dirname(above)


def _plan(source: Tree, path: bytes, goal: bytes, top: os.stat_result) -> list[_Item]:
    """All that is to be copied, a directory before what is in it."""
    items = [_Item(path, goal, top)]
    if stat.S_ISDIR(top.st_mode):
        for below, status in source.below(path):
            items.append(_Item(os.path.join(path, below), os.path.join(goal, below), status))
    return items


def _into_directory(goal: bytes, path: bytes, source: Tree) -> bytes:
    """The path in the directory `goal` that what is at `path` gets: the root of a volume gives what is in it."""
    name = os.path.basename(path.rstrip(b"/"))
    if isinstance(source, HostTree) and name in (b"", b".", b".."):
        name = os.path.basename(os.path.realpath(path))
    return os.path.join(goal, name) if name not in (b"", b".", b"..") else goal


def _count(
    tallies: dict[Outcome, Tally], totals: dict[Outcome, Tally], less: dict[Outcome, Tally] | None = None
) -> None:
    """Add `totals` to `tallies`, but for what is in `less`."""
    for outcome, tally in totals.items():
        before, known = tallies.get(outcome, Tally(0, 0)), (less or {}).get(outcome, Tally(0, 0))
        if tally.operations > known.operations:
            tallies[outcome] = Tally(
                before.operations + tally.operations - known.operations, before.bytes + tally.bytes - known.bytes
            )


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _tag(request: Request) -> tuple[int, int]:
    tag = request.tag
    if not isinstance(tag, tuple):
        raise TypeError(f"{tag!r} is no tag of a copy")
    return tag


def _digest(view: memoryview) -> bytes:
    return hashlib.blake2b(view, digest_size=16).digest()


def _shrank(source: str) -> InUseError:
    return InUseError("it became shorter while it was copied", path=source)


def _write_all(file: Target, view: memoryview, offset: int, shown: str) -> None:
    done = file.pwrite(view, offset)
    if done < len(view):
        raise NoSpaceError(f"only {done} of {len(view)} bytes at {offset} had room", path=shown)


def as_json(copied: TreeCopied) -> dict[str, Any]:
    """What the JSON of a copy has beyond that of a file."""
    return {key: value for key, value in copied._asdict().items() if key != "report"}
