"""Pages of cached files, and the memory that they lie in.

Memory comes in slabs, and a page belongs to one place of a slab for ever: the object is used again
with its memory, so that making a page costs next to nothing, and pages that were taken one after
the other lie beside each other and can go to the device as one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from odirect.block.buffers import empty
from odirect.sched.traps import Event

if TYPE_CHECKING:
    from odirect.cache.pagecache import FilePages
    from odirect.cache.writeback import Image, Promise

#: A slab is one huge page where the cache is large enough for that.
SLAB_BYTES = 2 << 20


class Fill:
    """One read of adjacent pages that is in flight. `ended` fires when it is over; `error` says how it failed."""

    __slots__ = ("ended", "error", "first", "pages", "stop")

    def __init__(self, first: int, stop: int) -> None:
        self.first = first
        self.stop = stop
        self.pages: list[Page] = []
        self.ended = Event()
        self.error: BaseException | None = None


class Page:
    """One block of one file in memory.

    memory   its bytes; what lies past the file's size is zero
    dirty    its bytes are newer than the device's and than those of `image`
    image    the copy of it that is being written, if one is
    fill     the read that brings it, while that goes on; its bytes mean nothing until then
    pins     how many need the memory to stay: readers on their way to it, and the read itself
    idle     it is up to date, clean and unpinned, and so may be reclaimed
    gone     its file does not have it any more; its memory is free when the last pin is
    promise  the space that was promised for writing it, if it is dirty
    """

    __slots__ = (
        "dirty",
        "fill",
        "gone",
        "idle",
        "image",
        "index",
        "memory",
        "owner",
        "pins",
        "promise",
        "slab",
        "slot",
    )

    owner: FilePages

    def __init__(self, slab: _Slab, slot: int, memory: memoryview) -> None:
        self.slab = slab
        self.slot = slot
        self.memory = memory
        self.index = 0
        self.dirty = False
        self.image: Image | None = None
        self.fill: Fill | None = None
        self.pins = 0
        self.idle = False
        self.gone = True
        self.promise: Promise | None = None


class _Slab:
    """Memory for some pages, and those of them that nobody has."""

    __slots__ = ("count", "free", "memory")

    def __init__(self, page_bytes: int, count: int) -> None:
        self.memory = empty(page_bytes * count)
        self.count = count
        # The last is lent first, and so they are lent in the order of their addresses.
        self.free = [
            Page(self, slot, self.memory[slot * page_bytes : (slot + 1) * page_bytes])
            for slot in range(count - 1, -1, -1)
        ]


class PageMemory:
    """Pages of one size that nobody has, and the making of more."""

    def __init__(self, page_bytes: int, slab_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._pages_in_slab = max(1, slab_bytes // page_bytes)
        self._with_room: dict[_Slab, None] = {}

    def take(self) -> Page:
        """A page with any bytes in it, which belongs to nobody. Raises MemoryError when there is none."""
        if not self._with_room:
            self._with_room[_Slab(self.page_bytes, self._pages_in_slab)] = None
        slab = next(reversed(self._with_room))
        page = slab.free.pop()
        if not slab.free:
            del self._with_room[slab]
        return page

    def give(self, page: Page) -> None:
        """Take `page` back. A slab that is free again goes back to the system if there is room without it."""
        slab = page.slab
        slab.free.append(page)
        if len(slab.free) == 1:
            self._with_room[slab] = None
        if len(slab.free) == slab.count and len(self._with_room) > 1:
            del self._with_room[slab]
            slab.free.clear()  # Its pages refer to it and it to them; let the memory go at once.


def segments_of(pages: Sequence[Page]) -> list[memoryview]:
    """The memory of `pages`, in order, as few segments: those beside each other in a slab are one."""
    segments: list[memoryview] = []
    at = 0
    while at < len(pages):
        first = pages[at]
        slab, slot, size = first.slab, first.slot, len(first.memory)
        begin = at
        at += 1
        while at < len(pages) and pages[at].slab is slab and pages[at].slot == slot + at - begin:
            at += 1
        segments.append(slab.memory[slot * size : (slot + at - begin) * size])
    return segments
