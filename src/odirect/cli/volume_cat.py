"""`odirect cat` of a file in a volume, and `odirect cp` of one to standard output."""

from __future__ import annotations

import os
import select
from typing import Literal

from odirect.base.errors import InUseError, from_errno
from odirect.base.units import align_down, align_up
from odirect.block.buffers import empty
from odirect.cli.places import VolumePlace
from odirect.cli.sessions import Volumes, naming
from odirect.cli.standard import STDOUT
from odirect.sched.interrupts import Interrupts

_CHUNK_BYTES = 4 << 20
_BLOCK_BYTES = 4096


def write_out(
    volumes: Volumes, place: VolumePlace, *, offset: int, length: int | None, access: Literal["auto", "strict"]
) -> None:
    """Write bytes [offset, offset + length) of the file to standard output; past its end there are none.

    While one chunk is written, the next one is read. Raises PathError (EPIPE) if nobody reads any more.
    """
    with naming(place), Interrupts() as interrupts, volumes.of(place).open(place.path, "r", access=access) as file:
        end = file.size if length is None else min(file.size, offset + length)
        # From the start of a block, so that it need not be bounced.
        starts = range(align_down(offset, _BLOCK_BYTES), end, _CHUNK_BYTES) if offset < end else range(0)
        buffers = [empty(min(_CHUNK_BYTES, align_up(max(end - align_down(offset, _BLOCK_BYTES), 1), _BLOCK_BYTES)))]
        if len(starts) > 1:
            buffers.append(empty(_CHUNK_BYTES))

        def begin(turn: int) -> None:
            if turn < len(starts):
                wanted = min(_CHUNK_BYTES, align_up(end - starts[turn], _BLOCK_BYTES))
                file.submit("read", starts[turn], buffers[turn % 2][:wanted])

        begin(0)
        for turn, start in enumerate(starts):
            (request,) = file.completions()
            count = min(request.result(), end - start)
            if count < min(_CHUNK_BYTES, end - start):
                raise InUseError("it became shorter while it was read")
            begin(turn + 1)
            first = max(0, offset - start)
            interrupts.allowed(lambda view=buffers[turn % 2][first:count]: write_full(view))  # type: ignore[misc]


def write_full(view: memoryview) -> None:
    """Write all of `view` to standard output."""
    done = 0
    while done < len(view):
        try:
            done += os.write(STDOUT, view[done:])
        except BlockingIOError:
            poller = select.poll()
            poller.register(STDOUT, select.POLLOUT)
            poller.poll()
        except OSError as error:
            raise from_errno(error.errno or 0, "writing to the stream", "-") from error
