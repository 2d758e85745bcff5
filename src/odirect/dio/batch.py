"""Many transfers of one length at once: one native loop for what is simple, tasks for the rest.

Both ways give the same bytes, errors and outcomes; a property test holds them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from odirect.block.bio import READ
from odirect.dio.bounce import Moved
from odirect.dio.plainfile import PlainFile
from odirect.ring._calls import address_of
from odirect.sched.traps import gather, this_scheduler

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from odirect.block.device import Limits
    from odirect.ring.contract import Ring

# Handing a run to the native loop is worth it from about this many elements on.
_SHORTEST_RUN = 4


def simple_runs(
    limits: Limits, op: int, view: memoryview, offsets: NDArray[numpy.int64], length: int, size: int
) -> Iterator[tuple[int, int]]:
    """[first, last) of the runs of elements that the native loop can take: aligned and inside the file."""
    import numpy

    unit = limits.read_align if op == READ else limits.write_align
    if not length or length % unit or length % limits.memory_align or address_of(view) % limits.memory_align:
        return
    simple = ((offsets & (unit - 1)) == 0) & (offsets <= size - length)
    if simple.all():
        yield 0, len(offsets)
        return
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate(([0], simple.view(numpy.int8), [0]))))
    for first, last in edges.reshape(-1, 2).tolist():
        if last - first >= _SHORTEST_RUN:
            yield first, last


def run_natively(
    ring: Ring,
    fd: int,
    op: int,
    view: memoryview,
    offsets: NDArray[numpy.int64],
    length: int,
    flags: int,
    results: NDArray[numpy.int64],
    depth: int,
) -> None:
    """One run through the ring's loop; `results` gets a count or a negative errno for each element."""
    handle = ring.add_file(fd)
    try:
        ring.transfer_batch(op, handle, view, length, offsets, length, flags, results, depth)
    finally:
        ring.remove_file(handle)


def growing_runs(elements: Sequence[int], offsets: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """(first element, how many) to write in turn, lowest offset first; neighbours in file and memory go together."""
    order = sorted(elements, key=lambda element: offsets[element])
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order)
            and order[stop] == order[stop - 1] + 1
            and offsets[order[stop]] == offsets[order[stop - 1]] + length
        ):
            stop += 1
        yield order[start], stop - start
        start = stop


async def run_each(
    plain: PlainFile,
    op: int,
    view: memoryview,
    offsets: Sequence[int],
    elements: Sequence[int],
    length: int,
    flags: int,
    depth: int,
) -> dict[int, Moved | Exception]:
    """Each of `elements` by the general way, `depth` at once; what became of each."""
    outcomes: dict[int, Moved | Exception] = {}
    turns = iter(elements)
    call = plain.read if op == READ else plain.write

    async def work() -> None:
        for element in turns:
            part = view[element * length : (element + 1) * length]
            try:
                outcomes[element] = await call(offsets[element], [part] if length else [], length, flags)
            except Exception as error:
                outcomes[element] = error

    scheduler = await this_scheduler()
    await gather(*[scheduler.spawn(work()) for _ in range(min(depth, len(elements)))])
    return outcomes
