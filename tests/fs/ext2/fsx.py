"""Random operations on one file of a volume, through several handles and every access, against a file in memory.

Free space holds a canary when a run begins. Every read is compared, and what lies behind its count in the
caller's memory; in the end, e2fsck must be silent, and the volume, opened again and read by `RawImage`, must
have the model's bytes, with nothing but zeroes behind them in the last block (F02, F05, F11, F13, F20).

For long runs:  python -m tests.fs.ext2.fsx SEEDS OPERATIONS [FIRST SEED]
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from tests.dio.kit import pump
from tests.fs.ext2.crash_kit import Fsck
from tests.fs.ext2.crash_model import CANARY, base_image
from tests.fs.ext2.raw_image import RawImage

from odirect.base.errors import AlignmentError, NotDirectError, WouldBlockError
from odirect.block.bio import FUA, HIPRI, NOWAIT
from odirect.block.buffers import empty, segments_aligned
from odirect.block.device import Limits
from odirect.block.memory import MemoryDevice
from odirect.dio.outcome import Kind, Promise
from odirect.fs.base import ACCESSES, Access
from odirect.fs.ext2.volume import Ext2, open_ext2
from odirect.fs.file import NodeFile
from odirect.sched.scheduler import Scheduler, Task
from odirect.testing.model import ModelFile

T = TypeVar("T")

_BEHIND = 0xEE
_CANARIES = bytes([CANARY]) * 16


class Shape(NamedTuple):
    """What a run is on. align: read, write and memory alignment of the device. cache: bytes of its page cache."""

    block_bytes: int
    align: tuple[int, int, int] = (512, 512, 512)
    size: int = 16 << 20
    cache: int = 256 << 20
    max_bio: int = 8 << 20


SHAPES = (
    Shape(1024),
    Shape(2048),
    Shape(4096),
    Shape(4096, (4096, 4096, 4096)),
    Shape(4096, (512, 4096, 4)),
    Shape(1024, (512, 512, 4), cache=8 << 10, max_bio=8 << 10),
    Shape(2048, (1024, 2048, 512), cache=64 << 10),
)


class Fsx:
    """One run."""

    def __init__(self, seed: int, shape: Shape, fsck: Fsck) -> None:
        self.random = random.Random(seed)
        self.shape = shape
        self.fsck = fsck
        read, write, memory = shape.align
        limits = Limits(
            logical_block=min(read, write),
            physical_block=max(read, write),
            read_align=read,
            write_align=write,
            memory_align=memory,
            max_bio_bytes=shape.max_bio,
        )
        image = base_image(shape.size, shape.block_bytes)
        self.device = MemoryDevice(len(image), limits=limits, data=image)
        self.model = ModelFile()
        self.log: list[str] = []
        self.handles: list[NodeFile] = []
        self._stamp = 1
        self._now = 1_700_000_000_000_000_000
        self._open()
        number = self.run(self.volume.create(2, b"file", 0o100644))
        self.number = number
        self._handle()
        unit = shape.block_bytes
        pointers = unit // 4
        self.edges = [0, 12 * unit, (12 + pointers) * unit]

    # Running.

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        task: Task[T] = self.scheduler.spawn(coroutine)
        pump(self.scheduler, task)
        return task.result()

    def _clock(self) -> int:
        self._now += 1_000_000
        return self._now

    def _open(self) -> None:
        self.scheduler = Scheduler()
        self.scheduler.add_device(self.device)
        self.volume: Ext2 = self.run(
            open_ext2(self.device, name="image", writable=True, scheduler=self.scheduler, clock_ns=self._clock)
        )
        self.volume.page_cache.limit_bytes = self.shape.cache
        self._pins = dict(self.volume.cache._pins)

    def _handle(self) -> None:
        self.handles.append(cast(NodeFile, self.run(self.volume.open_file(self.number, writable=True))))

    # Chance.

    def offset(self) -> int:
        """Around an edge: of blocks, of sectors, of the tree's levels, of the file."""
        dice, unit = self.random, self.shape.block_bytes
        base = dice.choice((*self.edges, self.model.size, self.model.size, dice.randrange(6) * unit))
        base += dice.choice((0, 0, unit, -unit, 2 * unit, dice.randrange(-3, 4) * 512))
        base += dice.choice((0, 0, 0, 1, -1, dice.randrange(-unit, unit)))
        if dice.random() < 0.4:
            base -= base % dice.choice((512, unit))
        return max(0, base)

    def length(self) -> int:
        dice, unit = self.random, self.shape.block_bytes
        found = dice.choice(
            (unit, 2 * unit, 3 * unit, 512, 1, dice.randrange(1, 3 * unit), dice.randrange(0, 4 * unit))
        )
        if dice.random() < 0.02:
            found = dice.randrange(1, 20 * unit)
        return found

    def segments(self, length: int) -> list[memoryview]:
        """Memory of `length` bytes, in one or several segments, aligned or not."""
        dice = self.random
        cuts = [0, length]
        if length > 1 and dice.random() < 0.3:
            step = dice.choice((512, 1))
            cuts += [min(length, dice.randrange(length) // step * step) for _ in range(dice.randrange(1, 4))]
        cuts.sort()
        found = []
        for start, end in itertools.pairwise(cuts):
            away = dice.choice((0, 0, 0, 512, 4, 1))
            found.append(empty(end - start + away)[away:])
        return found

    def data(self, length: int) -> bytes:
        """Bytes that nobody wrote before, none of which can be taken for the canary."""
        self._stamp += 1
        return (b"%07d." % (self._stamp % 10**7) * (length // 8 + 1))[:length]

    # Operations.

    def step(self) -> None:
        dice = self.random
        verb = dice.choices(
            ("read", "write", "truncate", "punch", "sync", "handles", "reopen", "whole", "append"),
            (36, 36, 8, 7, 3, 5, 0.5, 1.5, 3),
        )[0]
        getattr(self, f"_{verb}")(dice.choice(self.handles))
        for handle in self.handles:
            assert handle.size_bytes == self.model.size, f"the size is {handle.size_bytes}, not {self.model.size}"

    def _read(self, handle: NodeFile) -> None:
        offset, length = self.offset(), self.length()
        access, flags = self.random.choice(ACCESSES), self.random.choice((0, 0, 0, NOWAIT, HIPRI))
        segments = self.segments(length)
        for segment in segments:
            segment[:] = bytes([_BEHIND]) * len(segment)
        self.log.append(f"read {length} at {offset} {access} {flags} {list(map(len, segments))}")
        expected = self.model.pread(length, offset)
        read, _, memory = self.shape.align
        misaligned = offset % read or not segments_aligned(segments, memory, read)
        try:
            done = self.run(handle.read(offset, segments, access=access, flags=flags))
        except WouldBlockError:
            assert flags & NOWAIT
            return
        except AlignmentError:
            assert access == "strict" and misaligned and expected
            return
        assert not (access == "strict" and misaligned and expected), "it is misaligned, and strict has taken it"
        found = b"".join(segments)
        assert done.transferred == len(expected), f"{done} where there are {len(expected)} bytes"
        _same(found[: len(expected)], expected, offset)
        assert found[len(expected) :] == bytes([_BEHIND]) * (length - len(expected)), (
            "memory past the count was touched"
        )
        kinds = {"strict": (Kind.DIRECT, Kind.BOUNCED), "buffered": (Kind.BUFFERED,)}.get(access, tuple(Kind))
        assert done.outcome.kind in kinds, done

    def _write(self, handle: NodeFile) -> None:
        self._write_at(handle, self.offset())

    def _append(self, handle: NodeFile) -> None:
        self._write_at(handle, None)

    def _write_at(self, handle: NodeFile, offset: int | None) -> None:
        length = self.length()
        access, flags = self.random.choice(ACCESSES), self.random.choice((0, 0, 0, 0, 0, NOWAIT, FUA))
        segments = self.segments(length)
        data = self.data(length)
        at = 0
        for segment in segments:
            segment[:] = data[at : at + len(segment)]
            at += len(segment)
        self.log.append(f"write {length} at {offset} {access} {flags} {list(map(len, segments))}")
        place = self.model.size if offset is None else offset
        _, write, memory = self.shape.align
        misaligned = place % write or not segments_aligned(segments, memory, write)
        try:
            done = self.run(handle.write(offset, segments, access=access, flags=flags))
        except WouldBlockError:
            assert flags & NOWAIT
            return
        except AlignmentError:
            assert access == "strict" and misaligned and length
            return
        except NotDirectError:
            assert access == "strict" and place < -(-self.model.size // self.shape.block_bytes) * self.shape.block_bytes
            return
        assert not (access == "strict" and misaligned and length)
        assert done.transferred == length or access == "strict", f"{done} of {length}"
        if access == "strict" and length:
            assert done.outcome.kind is Kind.DIRECT, done
        if flags & FUA and length:
            assert done.outcome.promise is Promise.DURABLE, done
        self.model.pwrite(data[: done.transferred], place)
        assert b"".join(segments) == data, "the caller's memory was changed"

    def _truncate(self, handle: NodeFile) -> None:
        size = self.random.choice((self.offset(), self.offset(), self.model.size // 2, 0))
        self.log.append(f"truncate {size}")
        self.run(handle.truncate(size))
        self.model.truncate(size)

    def _punch(self, handle: NodeFile) -> None:
        offset, length = self.offset(), self.length() or 1
        self.log.append(f"punch {length} at {offset}")
        self.run(handle.punch(offset, length))
        self.model.punch(offset, length)

    def _sync(self, handle: NodeFile) -> None:
        self.log.append("sync")
        self.run(handle.sync(data_only=self.random.random() < 0.5))

    def _handles(self, handle: NodeFile) -> None:
        if len(self.handles) > 1 and (len(self.handles) > 4 or self.random.random() < 0.6):
            self.log.append("close")
            self.handles.remove(handle)
            self.run(handle.close())
        else:
            self._handle()

    def _reopen(self, handle: NodeFile) -> None:
        self.log.append("reopen")
        self.close()
        self._open()
        self._handle()

    def _whole(self, handle: NodeFile) -> None:
        self.log.append("whole")
        _same(self._content(handle, self.random.choice(("auto", "buffered"))), self.model.data, 0)

    def _content(self, handle: NodeFile, access: Access) -> bytes:
        unit = max(self.shape.align)
        memory = empty(-(-handle.size_bytes // unit) * unit)
        done = self.run(handle.read(0, [memory], access=access)) if len(memory) else None
        return bytes(memory[: done.transferred if done else 0])

    # The end.

    def close(self) -> None:
        """Close the volume, and hold what is on the device against the model."""
        for handle in self.handles:
            self.run(handle.close())
        self.handles.clear()
        volume = self.volume
        assert volume.allocator.reserved == 0, f"{volume.allocator.reserved} blocks are reserved still"
        assert volume.cache._pins == self._pins, f"pins {volume.cache._pins}, at first {self._pins}"
        assert not volume.page_cache.used_bytes, "pages left"
        self.run(volume.close())

    def judge(self) -> None:
        """What e2fsck, a reader of our own, and the volume opened again say, after a last cut within a block."""
        if self.model.size:
            size = self.random.randrange(self.model.size)
            self.log.append(f"truncate {size}")
            self.run(self.handles[0].truncate(size))
            self.model.truncate(size)
        self.close()
        image = bytes(self.device.data)
        self.fsck.image.write_bytes(image)
        status, said = self.fsck.run("-fn")
        assert status == 0, said
        raw = RawImage(image)
        record = raw.records[raw.edges[2, b"file"]]
        _same(record.content, self.model.data, 0)
        assert not any(record.tail), "something is behind the end in the last block"
        self._open()
        self._handle()
        _same(self._content(self.handles[0], "strict"), self.model.data, 0)
        self.close()


def _same(found: bytes, expected: bytes, offset: int) -> None:
    if found == expected:
        return
    count = min(len(found), len(expected))
    at = next((at for at in range(count) if found[at] != expected[at]), count)
    what = " (the canary)" if _CANARIES in found[at : at + 64] else ""
    raise AssertionError(
        f"byte {offset + at}{what}: {found[at : at + 24]!r}, not {expected[at : at + 24]!r}; "
        f"{len(found)} bytes, not {len(expected)}"
    )


def run_one(seed: int, operations: int, shape: Shape, fsck: Fsck) -> Fsx:
    """A whole run. AssertionError with the seed and the last operations."""
    run = Fsx(seed, shape, fsck)
    try:
        for _ in range(operations):
            run.step()
        run.judge()
    except Exception as error:
        done = "\n".join(run.log[-25:])
        raise AssertionError(f"seed {seed}, {shape}: after {len(run.log)} operations: {error!r}\n{done}") from error
    return run


def main(arguments: Sequence[str]) -> int:
    """Run what the command line says; 1 if something failed."""
    seeds, operations, first = (*map(int, arguments), *(50, 1000, 0)[len(arguments) :])
    began = time.monotonic()
    failed = 0
    with Fsck() as fsck:
        for seed in range(first, first + seeds):
            try:
                run_one(seed, operations, SHAPES[seed % len(SHAPES)], fsck)
            except AssertionError as error:
                failed += 1
                print(f"{error}\n")
    print(f"{seeds} runs of {operations} operations, {failed} failed, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
