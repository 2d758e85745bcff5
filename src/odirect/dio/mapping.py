"""What a file system tells the engine of a file: extents, and the contract of a mapper."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from odirect.block.bio import Bio
from odirect.block.device import BlockDevice
from odirect.dio.outcome import Reason

if TYPE_CHECKING:
    from odirect.dio.engine import DirectRequest


class ExtentKind(enum.IntEnum):
    """What is behind a run of a file's bytes.

    HOLE nothing; MAPPED data on the device; UNWRITTEN space that reads as zeroes until `end_io` makes
    it MAPPED; DELALLOC data in the page cache, with no place yet; INLINE data in a metadata block;
    ENCODED compressed data. A write into part of an UNWRITTEN or NEW block writes zeroes to the rest
    of it, so the mapper must not let it run beside another write of that block (F10).
    """

    HOLE = 0
    MAPPED = 1
    UNWRITTEN = 2
    DELALLOC = 3
    INLINE = 4
    ENCODED = 5


# Flags of an extent, as plain ints: they are tested once per mapping.
NEW = 1  #              MAPPED, and allocated by this very call: readers would see somebody's old data there
SHARED = 2  #           other files have these blocks too
BOUNDARY = 4  #         the next look-up must read metadata: send what is gathered (G12)
DEFER_COMPLETION = 8  # completion needs a task, because `end_io` has to wait for something (G05)
DIRTY = 16  #           there is metadata that a sync of the data must write too


class Extent(NamedTuple):
    """A mapper's answer: `length` bytes of the file from `offset` are at byte `addr` of `device`.

    device and addr are None where there is no place (HOLE, DELALLOC, INLINE, ENCODED). private is
    handed to `end_io`.
    """

    kind: ExtentKind
    offset: int
    length: int
    device: BlockDevice | None = None
    addr: int | None = None
    flags: int = 0
    private: object = None


class Fallback(NamedTuple):
    """A mapper's answer: this cannot go direct, and why. An expected outcome, so not an exception."""

    reason: Reason


class Mapper(Protocol):
    """The file system's side of direct I/O, for one file.

    `get_blocks` may suspend, to read metadata or take range locks; `end_io` may not. A mapper may
    have more: `submit` of `BioHook` gets every bio, with the file's byte that the bio's first byte
    belongs to, instead of the device (G19); `failed` of `FailureHook` is called where `end_io` is not.
    """

    async def get_blocks(self, request: DirectRequest, offset: int, length: int, create: bool) -> Extent | Fallback:
        """What is at byte `offset` of the file, for at most `length` bytes and as far as one run goes.

        The extent covers `offset`; it may begin before it, but no more than a block, and may end
        past the request, in the middle of whose last block the request may end. With `create`,
        blocks that are missing are allocated.
        """
        ...

    def end_io(self, request: DirectRequest, offset: int, transferred: int, private: object) -> None:
        """All bios have ended and `transferred` bytes were moved; `private` is the last mapping's (G17)."""
        ...


class FailureHook(Protocol):
    """An optional part of a mapper."""

    def failed(self, request: DirectRequest) -> None:
        """All bios have ended and nothing counts as transferred: called once, instead of `end_io`.

        What was locked, reserved or allocated for the request is given back here (G20).
        """
        ...


class BioHook(Protocol):
    """An optional part of a mapper."""

    def submit(self, bio: Bio, file_offset: int) -> None:
        """Send `bio`, whose first byte is the file's byte `file_offset`, wherever it belongs."""
        ...
