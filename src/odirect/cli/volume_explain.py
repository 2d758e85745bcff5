"""`odirect explain` of a file in a volume.

What requests cost is not estimated: the file system's own code is run over the image, with a device in
between that reads metadata, moves no data, and drops everything that is written.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from odirect.base.errors import DirectoryError, NoSpaceError, ReadOnlyError
from odirect.block.bio import READ, WRITE, Bio
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice, Limits
from odirect.cli import common, explain
from odirect.cli.explain import Cost, Piece
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import naming, warn_if_mounted
from odirect.cli.volume_info import family
from odirect.dio.mapping import SHARED, Extent, ExtentKind
from odirect.dio.outcome import Kind, Outcome, Promise, Reason
from odirect.fs.base import FileKind, FileSystem, VolumeFile
from odirect.fs.paths import resolve
from odirect.fs.probe import open_filesystem
from odirect.sched.clock import wall_ns
from odirect.sched.drive_sync import SyncDriver
from odirect.volume_opening import Image, open_image

_KINDS = {
    ExtentKind.HOLE: "hole",
    ExtentKind.MAPPED: "mapped",
    ExtentKind.UNWRITTEN: "unwritten",
    ExtentKind.DELALLOC: "delalloc",
    ExtentKind.INLINE: "inline",
    ExtentKind.ENCODED: "compressed",
}


class Explanation(NamedTuple):
    """All that `explain` tells of a file in a volume. why_cached: why the image itself is not read past the cache."""

    place: VolumePlace
    kind: str
    block_bytes: int
    size: int
    limits: Limits
    why_cached: str
    pieces: list[Piece]
    request_bytes: int
    offset: int
    reads: list[Cost]
    writes: list[Cost]
    why_no_writes: str

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        figures = ("read_align", "write_align", "memory_align")
        return {
            **common.told_path(self.place.image, "image"),
            **common.told_path(self.place.exact),
            "filesystem": self.kind,
            "block_bytes": self.block_bytes,
            "size_bytes": self.size,
            "direct": {"reads": not self.why_cached, "writes": not self.why_cached, "why": self.why_cached},
            "limits": {name: getattr(self.limits, name) for name in figures},
            "sources": {name: self.limits.sources.get(name, "default") for name in figures},
            "extents": [piece._asdict() for piece in self.pieces],
            "bytes_by_kind": explain.bytes_by_kind(self.pieces),
            "request_bytes": self.request_bytes,
            "first_offset": self.offset,
            "reads": [explain.cost_as_json(cost) for cost in self.reads],
            "writes": [explain.cost_as_json(cost) for cost in self.writes],
            "why_no_writes": self.why_no_writes,
        }

    def lines(self, all_extents: bool) -> list[str]:
        """As people read it."""
        image = common.shown(self.place.image)
        lines = explain.report(
            f"{self.place}: a file in the {self.kind} volume of {image}, {common.exact(self.size)}",
            {"reads": not self.why_cached, "writes": not self.why_cached, "why": self.why_cached},
            self.limits,
            explain.extent_lines(self.pieces, self.size, all_extents),
            (self.request_bytes, self.offset),
            (self.reads, self.writes),
        )
        if self.why_no_writes:
            lines.append(f"It cannot be written: {self.why_no_writes}.")
        return lines


def explain_in_volume(place: VolumePlace, request_bytes: int, offset: int) -> Explanation:
    """Everything about the file at `place`. Nothing is written. Raises what opening the volume raises."""
    warn_if_mounted(place.image)
    with naming(place):
        image = open_image(place.image, writable=False)
        try:
            return _Dry(image).explain(place, request_bytes, offset)
        finally:
            image.close()


class _Dry:
    """A volume on which nothing is changed, whatever is done to it."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._driver = SyncDriver(image.scheduler)
        self._device: _DryDevice

    def explain(self, place: VolumePlace, request_bytes: int, offset: int) -> Explanation:
        """See `explain_in_volume`."""
        file_system, why_not = self._open()
        try:
            attributes = self._driver.run(resolve(file_system, place.path))
            if attributes.kind is FileKind.DIRECTORY:
                raise DirectoryError("it is a directory; the bytes of files are explained")
            file = self._driver.run(file_system.open_file(attributes.inode, writable=file_system.writable))
            try:
                size = file.size_bytes
                extents = self._driver.run(file.extents(0, size)) if size else []
                pieces = [_piece(extent, size) for extent in extents]
                self._device.watch(extents)
                costs = [
                    self._costs(file, op, pieces, request_bytes, offset, size)
                    if op == READ or file_system.writable
                    else []
                    for op in (READ, WRITE)
                ]
                reason = next(iter(self._image.reasons.values()), None)
                return Explanation(
                    place,
                    family(file_system),
                    file_system.block_bytes,
                    size,
                    file.limits,
                    "" if reason is None else reason.value,
                    pieces,
                    request_bytes,
                    offset,
                    costs[0],
                    costs[1],
                    why_not,
                )
            finally:
                self._driver.run(file.close())
        finally:
            self._driver.run(file_system.close())
            self._image.scheduler.remove_device(self._device)

    def _open(self) -> tuple[FileSystem, str]:
        """The file system, for writing if that could be, and else why not."""
        image = self._image
        try:
            return self._opened(image.device, writable=True), ""
        except ReadOnlyError as error:
            return self._opened(image.device, writable=False), error.message

    def _opened(self, lower: BlockDevice, *, writable: bool) -> FileSystem:
        image = self._image
        self._device = device = _DryDevice(lower)
        image.scheduler.add_device(device)
        try:
            found = self._driver.run(
                open_filesystem(device, name=image.name, writable=writable, scheduler=image.scheduler, clock_ns=wall_ns)
            )
        except BaseException:
            image.scheduler.remove_device(device)
            raise
        if found.block_bytes % image.align_bytes and lower is image.device:
            # As for everybody who opens it: such small blocks go through the page cache.
            self._driver.run(found.close())
            image.scheduler.remove_device(device)
            image.use_cache()
            return self._opened(image.device, writable=writable)
        return found

    def _costs(
        self, file: VolumeFile, op: int, pieces: Sequence[Piece], length: int, offset: int, size: int
    ) -> list[Cost]:
        """What the requests from `offset` to the end of the file become, the most frequent kind first.

        Whole requests within one piece whose offsets lie alike in their blocks go alike: few of each are tried.
        """
        found: dict[Outcome, list[int]] = {}

        def add(cost: Cost, count: int) -> None:
            tally = found.setdefault(cost.outcome, [0, 0])
            tally[0] += count
            tally[1] += count * cost.bios

        memory = empty(length)
        limits = file.limits
        unit = max(limits.read_align, limits.write_align, file.limits.memory_align, _LARGEST_BLOCK)
        cycle = unit // math.gcd(length, unit)
        ends = [piece.offset + piece.length for piece in pieces]
        at = offset
        while at < size:
            piece = bisect.bisect_right(ends, at)
            alike = max(0, min(ends[piece], size) - at) // length
            # The first of them may allocate what those after them find.
            first = min(alike, cycle)
            if alike <= 2 * cycle:
                first = max(alike, 1)
            for turn in range(first):
                add(self._try(file, op, at + turn * length, memory, size), 1)
            at += first * length
            left = max(0, alike - first)
            for turn in range(min(cycle, left)):
                add(self._try(file, op, at + turn * length, memory, size), (left - turn + cycle - 1) // cycle)
            at += left * length
        made = [Cost(outcome, requests, bios) for outcome, (requests, bios) in found.items()]
        return sorted(made, key=lambda cost: -cost.requests)

    def _try(self, file: VolumeFile, op: int, offset: int, memory: memoryview, size: int) -> Cost:
        """What one request becomes."""
        before = self._device.bios
        try:
            if op == READ:
                done = self._driver.run(file.read(offset, [memory]))
            else:
                done = self._driver.run(file.write(offset, [memory[: min(len(memory), size - offset)]]))
        except NoSpaceError:
            return Cost(Outcome(Kind.BUFFERED, Reason.NO_SPACE), 1, self._device.bios - before)
        outcome = self._image.seen(op, done.outcome)._replace(promise=Promise.NONE)
        return Cost(outcome, 1, self._device.bios - before)


#: No file system here has larger blocks.
_LARGEST_BLOCK = 4096


class _DryDevice:
    """The image, of which metadata is read; data and all that is written goes nowhere, and is counted."""

    def __init__(self, lower: BlockDevice) -> None:
        self._lower = lower
        self.limits = lower.limits
        self.size_bytes = lower.size_bytes
        self.bios = 0
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._finished: list[Bio] = []

    def watch(self, extents: Sequence[Extent]) -> None:
        """Count from now on; these are where the file's data is."""
        places = sorted((extent.addr, extent.addr + extent.length) for extent in extents if extent.addr is not None)
        self._starts = [start for start, _ in places]
        self._ends = [end for _, end in places]
        self.bios = 0

    @property
    def in_flight(self) -> int:
        """What `poll` will give back; the image is polled by the scheduler itself."""
        return len(self._finished)

    def submit(self, bio: Bio) -> None:
        """Pass reads of metadata down, and let all else have happened."""
        if bio.op == READ and not self._is_data(bio.addr):
            self._lower.submit(bio)
            return
        if bio.op in (READ, WRITE):
            self.bios += 1
        bio.done_bytes = bio.length
        self._finished.append(bio)

    def commit(self) -> None:
        """Hand over what was passed down."""
        self._lower.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """What has happened."""
        finished, self._finished = self._finished, []
        return finished

    def wakeup_fd(self) -> int | None:
        """None: everything happens at once."""
        return None

    def close(self) -> None:
        """Nothing: the image is not ours."""

    def _is_data(self, addr: int) -> bool:
        place = bisect.bisect_right(self._starts, addr) - 1
        return place >= 0 and addr < self._ends[place]


def _piece(extent: Extent, size: int) -> Piece:
    kind = "shared" if extent.flags & SHARED else _KINDS[extent.kind]
    return Piece(kind, extent.offset, min(extent.length, size - extent.offset), extent.addr)
