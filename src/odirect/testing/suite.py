"""What every BlockDevice must do, as tests that its own test class inherits.

    class TestMyDevice(DeviceConformance):
        @pytest.fixture
        def device(self):
            device = MyDevice(...)          # at least 1 MiB
            yield device
            device.close()

`ReadConformance` is the part for devices that cannot be written; `fill` says what they hold.
"""

from __future__ import annotations

import dataclasses
import errno
import random
import select
from collections.abc import Sequence

from odirect.block.bio import (
    ATOMIC,
    DISCARD,
    FLUSH,
    FUA,
    HIPRI,
    META,
    PREFLUSH,
    READ,
    WRITE,
    ZERO,
    Bio,
)
from odirect.block.device import BlockDevice, Limits
from odirect.block.filters.base import private_buffer

#: Answers of nothing in a row after which a device is said to have lost a bio.
_MOST_SILENCE = 10_000


class ReadConformance:
    """What holds for every device, also for one that is read-only."""

    #: Whether all that is not aligned is refused, the memory and each segment's length too. A kernel
    #: may take memory that is less aligned than it says, and offsets and lengths alone are tried then.
    strict_memory = True
    #: Whether memory past what a read at the device's end returned is left alone. A kernel clears it
    #: up to the end of its block; cutting the request is then up to the layer above (F02).
    leaves_tail = True
    #: Whether a write past the end makes the device longer, as with a regular file.
    grows = False
    #: Bytes at the start of the device that the tests use.
    span = 1 << 20

    def fill(self, device: BlockDevice) -> bytes:
        """The first `span` bytes of `device`, which this method may write first."""
        data = pattern(self.span, 1)
        step = min(device.limits.max_bio_bytes, 1 << 16)
        self.do(device, *(self.bio(device, WRITE, at, data[at : at + step]) for at in range(0, self.span, step)))
        return data

    def wait(self, device: BlockDevice) -> Sequence[Bio]:
        """Finished bios; override where waiting takes more than `poll(-1)`."""
        return device.poll(-1)

    # What the tests are written with.

    def unit(self, device: BlockDevice) -> int:
        """The alignment that suits reads and writes alike."""
        return max(device.limits.read_align, device.limits.write_align, device.limits.logical_block)

    def buffer(self, device: BlockDevice, length: int) -> memoryview:
        """Memory that suits `device`."""
        return private_buffer(length, device.limits.memory_align)

    def bio(
        self, device: BlockDevice, op: int, addr: int, data: bytes | int = 0, *, flags: int = 0, parts: int = 1
    ) -> Bio:
        """A bio of `data` (bytes to be written, or how many to read) in `parts` segments of aligned memory."""
        length = data if isinstance(data, int) else len(data)
        segments = []
        for part in range(parts):
            start, end = length * part // parts, length * (part + 1) // parts
            segment = self.buffer(device, end - start)
            if not isinstance(data, int):
                segment[:] = data[start:end]
            segments.append(segment)
        return Bio(op, addr, tuple(segments), length, flags)

    def do(self, device: BlockDevice, *bios: Bio) -> list[Bio]:
        """Submit and commit `bios`, and wait until every one is back, once; in order of completion."""
        for bio in bios:
            device.submit(bio)
        device.commit()
        return self.collect(device, bios)

    def collect(self, device: BlockDevice, bios: Sequence[Bio]) -> list[Bio]:
        """`bios`, waited for; fails if one comes twice, or another one, or one never does."""
        missing = list(bios)
        finished: list[Bio] = []
        silence = 0
        while missing:
            back = self.wait(device)
            silence = 0 if back else silence + 1
            if silence > _MOST_SILENCE:
                raise AssertionError(f"never came back: {missing}")
            for bio in back:
                if not any(bio is one for one in missing):
                    raise AssertionError(f"came back uncalled or twice: {bio}")
                missing = [one for one in missing if one is not bio]
                finished.append(bio)
        return finished

    def read(self, device: BlockDevice, addr: int, length: int) -> bytes:
        """Bytes of `device`, read by aligned bios that a bio can hold; fails on an error."""
        step = min(1 << 16, device.limits.max_bio_bytes)
        bios = [self.bio(device, READ, at, min(step, addr + length - at)) for at in range(addr, addr + length, step)]
        self.do(device, *bios)
        for bio in bios:
            check(bio, done=bio.length)
        return b"".join(b"".join(bio.segments) for bio in bios)

    # Tests.

    def test_is_a_block_device(self, device: BlockDevice) -> None:
        """It has the verbs of the protocol, and limits."""
        assert isinstance(device, BlockDevice)
        assert isinstance(device.limits, Limits)
        assert device.size_bytes >= self.span

    def test_reads_what_is_there(self, device: BlockDevice) -> None:
        """A read gives the device's bytes, all of them and in place."""
        data = self.fill(device)
        unit = self.unit(device)
        bio = self.bio(device, READ, unit, 4 * unit)
        self.do(device, bio)
        check(bio, done=4 * unit)
        assert bytes(bio.segments[0]) == data[unit : 5 * unit]

    def test_reads_vectors(self, device: BlockDevice) -> None:
        """Several segments are filled in their order, up to as many as a bio may have (B02)."""
        data = self.fill(device)
        unit = self.unit(device)
        limits = device.limits
        for parts in {1, 3, min(limits.max_segments, limits.max_bio_bytes // unit, self.span // unit)}:
            bio = self.bio(device, READ, 0, parts * unit, parts=parts)
            self.do(device, bio)
            check(bio, done=parts * unit)
            assert b"".join(bio.segments) == data[: parts * unit]

    def test_read_leaves_memory_around_it_alone(self, device: BlockDevice) -> None:
        """Only the segments are written to (F02)."""
        data = self.fill(device)
        unit = self.unit(device)
        # What is before and after it is a multiple of every alignment, so that the middle is aligned.
        margin = max(unit, device.limits.memory_align)
        memory = self.buffer(device, 2 * margin + unit)
        memory[:] = b"\xa5" * len(memory)
        bio = Bio(READ, 0, (memory[margin : margin + unit],), unit)
        self.do(device, bio)
        check(bio, done=unit)
        assert bytes(memory) == b"\xa5" * margin + data[:unit] + b"\xa5" * margin

    def test_refuses_misaligned_reads(self, device: BlockDevice) -> None:
        """Offset, length or memory that is not aligned is EINVAL, and nothing moves (B01, G01)."""
        self.fill(device)
        self.refuses_misaligned(device, READ, device.limits.read_align)

    def test_read_at_the_end(self, device: BlockDevice) -> None:
        """Reading at or past the end gives 0; across it, what is before it, and no byte more (B09, F02)."""
        self.fill(device)
        unit = device.limits.read_align
        end = device.size_bytes
        last = end - end % unit - (0 if end % unit else unit)
        past = end + -end % unit
        for addr in (past, past + 8 * unit):
            bio = self.bio(device, READ, addr, unit)
            bio.segments[0][:] = b"\xa5" * unit
            self.do(device, bio)
            check(bio, done=0)
            assert bytes(bio.segments[0]) == b"\xa5" * unit
        bio = self.bio(device, READ, last, b"\xa5" * (4 * unit), parts=4)
        self.do(device, bio)
        check(bio, done=end - last)
        if self.leaves_tail:
            assert b"".join(bio.segments)[end - last :] == b"\xa5" * (4 * unit - (end - last))

    def test_read_into_memory_that_cannot_be_written(self, device: BlockDevice) -> None:
        """Read-only memory fails that bio, by EFAULT or by refusing to queue it; its neighbours go through (B08)."""
        self.fill(device)
        unit = self.unit(device)
        good, after = self.bio(device, READ, 0, unit), self.bio(device, READ, unit, unit)
        bad = Bio(READ, 0, (self.buffer(device, unit).toreadonly(),), unit)
        queued = [good, after]
        device.submit(good)
        try:
            device.submit(bad)
        except (BufferError, TypeError, ValueError):
            refused = True
        else:
            refused = False
            queued.append(bad)
        device.submit(after)
        device.commit()
        self.collect(device, queued)
        assert refused or (bad.error == errno.EFAULT and not bad.done_bytes)
        check(good, done=unit)
        check(after, done=unit)

    def test_every_bio_comes_back_once(self, device: BlockDevice) -> None:
        """Many more bios than the queue is deep, each returned once, with its own bytes (B07)."""
        data = self.fill(device)
        unit = self.unit(device)
        count = min(4 * device.limits.queue_depth, 1024)
        places = [unit * (number * 7 % (self.span // unit)) for number in range(count)]
        bios = [self.bio(device, READ, place, unit) for place in places]
        self.do(device, *bios)
        for place, bio in zip(places, bios, strict=True):
            check(bio, done=unit)
            assert bytes(bio.segments[0]) == data[place : place + unit]
        assert not list(device.poll(0))

    def test_in_flight(self, device: BlockDevice) -> None:
        """Every bio that is not back counts, from submission on; an idle device has none."""
        self.fill(device)
        assert device.in_flight == 0
        bios = [self.bio(device, READ, 0, self.unit(device)) for _ in range(3)] + [Bio(FLUSH, 0) for _ in range(3)]
        for count, bio in enumerate(bios, 1):
            device.submit(bio)
            assert device.in_flight >= count
        device.commit()
        assert device.in_flight >= len(bios)
        self.collect(device, bios)
        assert device.in_flight == 0

    def test_leaves_the_submitters_fields_alone(self, device: BlockDevice) -> None:
        """`private`, `end`, the segments and the range are as they were; `end` is not called by the device."""
        self.fill(device)
        unit = self.unit(device)
        called: list[Bio] = []
        token = object()
        bio = self.bio(device, READ, 0, unit)
        bio.private, bio.end = token, called.append
        segments = bio.segments
        self.do(device, bio)
        assert bio.private is token and bio.segments is segments and not called
        assert (bio.op, bio.addr, bio.length) == (READ, 0, unit)

    def test_nothing_in_flight(self, device: BlockDevice) -> None:
        """An idle device returns nothing, and does not wait for ever with nothing to wait for."""
        device.commit()
        assert not list(device.poll(0))
        assert not list(device.poll(-1))
        assert not list(device.poll(1))

    def test_bios_of_several_commits(self, device: BlockDevice) -> None:
        """What an earlier commit handed over is not lost by a later one (G13)."""
        self.fill(device)
        unit = self.unit(device)
        bios = [self.bio(device, READ, 0, unit) for _ in range(6)]
        for bio in bios:
            device.submit(bio)
            device.commit()
        self.collect(device, bios)
        for bio in bios:
            check(bio, done=unit)

    def test_wakeup_fd(self, device: BlockDevice) -> None:
        """It becomes readable when a bio is finished, and `poll` resets it; or there is none at all."""
        self.fill(device)
        unit = self.unit(device)
        descriptor = device.wakeup_fd()
        assert device.wakeup_fd() == descriptor
        if descriptor is None:
            return
        assert self.falls_still(device, descriptor)
        for _ in range(3):
            bio = self.bio(device, READ, 0, unit)
            device.submit(bio)
            device.commit()
            assert readable(descriptor, 60_000), "no wake-up came"
            self.collect(device, [bio])
            assert self.falls_still(device, descriptor), "still readable, with nothing to be had"

    def falls_still(self, device: BlockDevice, descriptor: int) -> bool:
        """Whether the descriptor is not readable, but for a knock that came late: the answer was taken before it."""
        for _ in range(3):
            device.poll(0)
            if not readable(descriptor, 0):
                return True
        return False

    def test_wakeup_fd_made_late(self, device: BlockDevice) -> None:
        """Asked for when a bio is finished already, it is readable, or becomes so."""
        self.fill(device)
        bio = self.bio(device, READ, 0, self.unit(device))
        device.submit(bio)
        device.commit()
        descriptor = device.wakeup_fd()
        if descriptor is not None:
            assert readable(descriptor, 60_000), "no wake-up came"
        self.collect(device, [bio])

    def test_hipri_is_a_hint(self, device: BlockDevice) -> None:
        """HIPRI changes nothing that can be seen (B06)."""
        data = self.fill(device)
        unit = self.unit(device)
        bio = self.bio(device, READ, 0, unit, flags=HIPRI)
        self.do(device, bio)
        check(bio, done=unit)
        assert bytes(bio.segments[0]) == data[:unit]

    def test_close_twice(self, device: BlockDevice) -> None:
        """Closing again is harmless."""
        self.fill(device)
        device.close()
        device.close()

    def refuses_misaligned(self, device: BlockDevice, op: int, align: int) -> None:
        """Try what is not aligned in each way."""
        limits = device.limits
        base = max(align, limits.read_align, limits.write_align)
        before = self.read(device, 0, 4 * base)
        tries: list[tuple[str, Bio]] = []
        if align > 1:
            half = align // 2
            tries.append(("offset", self.bio(device, op, half, align)))
            tries.append(("length", self.bio(device, op, 0, align + half)))
            uneven = (self.buffer(device, half), self.buffer(device, align + half))
            if self.strict_memory:
                tries.append(("a segment's length", Bio(op, 0, uneven, 2 * align)))
        if limits.memory_align > 1 and self.strict_memory:
            memory = self.buffer(device, align + limits.memory_align)
            tries.append(("memory", Bio(op, 0, (memory[limits.memory_align // 2 :][:align],), align)))
        self.do(device, *(bio for _, bio in tries))
        for what, bio in tries:
            assert bio.error == errno.EINVAL, f"misaligned {what} was not refused: {bio}"
            assert bio.done_bytes == 0
        assert self.read(device, 0, 4 * base) == before


class DeviceConformance(ReadConformance):
    """What every device must do that can be written."""

    #: Whether what was discarded reads as zeroes.
    discard_zeroes = True

    def test_write_reads_back(self, device: BlockDevice) -> None:
        """What is written is read, and its neighbours are as before."""
        data = bytearray(self.fill(device))
        unit = self.unit(device)
        new = pattern(3 * unit, 2)
        bio = self.bio(device, WRITE, 2 * unit, new)
        self.do(device, bio)
        check(bio, done=3 * unit)
        data[2 * unit : 5 * unit] = new
        assert self.read(device, 0, 8 * unit) == data[: 8 * unit]

    def test_writes_vectors(self, device: BlockDevice) -> None:
        """Several segments are written in their order, up to as many as a bio may have (B02)."""
        self.fill(device)
        unit = self.unit(device)
        limits = device.limits
        for parts in {2, min(limits.max_segments, limits.max_bio_bytes // unit, self.span // unit)}:
            new = pattern(parts * unit, parts)
            bio = self.bio(device, WRITE, 0, new, parts=parts)
            self.do(device, bio)
            check(bio, done=parts * unit)
            assert self.read(device, 0, parts * unit) == new

    def test_writes_read_only_memory(self, device: BlockDevice) -> None:
        """Memory that can only be read can be written from."""
        unit = self.unit(device)
        self.fill(device)
        memory = self.buffer(device, unit)
        memory[:] = pattern(unit, 3)
        bio = Bio(WRITE, 0, (memory.toreadonly(),), unit)
        self.do(device, bio)
        check(bio, done=unit)
        assert self.read(device, 0, unit) == pattern(unit, 3)

    def test_refuses_misaligned_writes(self, device: BlockDevice) -> None:
        """Offset, length or memory that is not aligned is EINVAL, and nothing is written (B01, G01)."""
        self.fill(device)
        self.refuses_misaligned(device, WRITE, device.limits.write_align)

    def test_write_at_the_end(self, device: BlockDevice) -> None:
        """A write at or past the end is ENOSPC; one across it is too, or is short (B09)."""
        self.fill(device)
        if self.grows:
            return
        unit = device.limits.write_align
        end = device.size_bytes
        past = end + -end % unit
        for addr in (past, past + 4 * unit):
            bio = self.bio(device, WRITE, addr, unit)
            self.do(device, bio)
            assert bio.error == errno.ENOSPC, bio
        bio = self.bio(device, WRITE, past - unit, 2 * unit)
        self.do(device, bio)
        assert bio.error == errno.ENOSPC or (not bio.error and bio.done_bytes < bio.length), bio
        assert device.size_bytes == end

    def test_flush(self, device: BlockDevice) -> None:
        """FLUSH, with and without META, succeeds and changes nothing."""
        data = self.fill(device)
        bios = [Bio(FLUSH, 0), Bio(FLUSH, 0, flags=META)]
        self.do(device, *bios)
        for bio in bios:
            check(bio)
        assert self.read(device, 0, self.span) == data

    def test_fua_and_preflush(self, device: BlockDevice) -> None:
        """Writes with FUA (where there is such a thing) and PREFLUSH land as any (B05)."""
        self.fill(device)
        unit = self.unit(device)
        flags = [PREFLUSH, *((FUA, FUA | PREFLUSH) if device.limits.fua else ())]
        bios = [self.bio(device, WRITE, n * unit, pattern(unit, n), flags=flag) for n, flag in enumerate(flags)]
        self.do(device, *bios)
        for number, bio in enumerate(bios):
            check(bio, done=unit)
            assert self.read(device, number * unit, unit) == pattern(unit, number)

    def test_zero(self, device: BlockDevice) -> None:
        """ZERO makes its range zeroes and leaves the rest."""
        data = bytearray(self.fill(device))
        unit = self.unit(device)
        bio = Bio(ZERO, unit, length=2 * unit)
        self.do(device, bio)
        check(bio)
        data[unit : 3 * unit] = bytes(2 * unit)
        assert self.read(device, 0, 8 * unit) == data[: 8 * unit]

    def test_discard(self, device: BlockDevice) -> None:
        """DISCARD leaves the rest alone, and is EOPNOTSUPP where the limits say that there is none."""
        data = bytearray(self.fill(device))
        unit = self.unit(device)
        bio = Bio(DISCARD, 2 * unit, length=2 * unit)
        self.do(device, bio)
        if not device.limits.discard:
            assert bio.error == errno.EOPNOTSUPP
            return
        check(bio)
        if self.discard_zeroes:
            data[2 * unit : 4 * unit] = bytes(2 * unit)
        else:
            data[2 * unit : 4 * unit] = self.read(device, 2 * unit, 2 * unit)
        assert self.read(device, 0, 8 * unit) == data[: 8 * unit]

    def test_atomic_writes(self, device: BlockDevice) -> None:
        """ATOMIC is done inside the limits and refused outside them (F43)."""
        self.fill(device)
        limits = device.limits
        if not limits.atomic_max:
            bio = self.bio(device, WRITE, 0, self.unit(device), flags=ATOMIC)
            self.do(device, bio)
            assert bio.error in (errno.EINVAL, errno.EOPNOTSUPP), bio
            return
        least, most = max(limits.atomic_min, limits.write_align), limits.atomic_max
        good = [self.bio(device, WRITE, size, pattern(size, 4), flags=ATOMIC) for size in {least, most}]
        bad = [
            self.bio(device, WRITE, 0, 2 * most, flags=ATOMIC),
            self.bio(device, WRITE, limits.write_align, 2 * most, flags=ATOMIC),
        ]
        if most >= 2 * limits.write_align:
            bad.append(self.bio(device, WRITE, most // 2, most, flags=ATOMIC))
        for bio in (*good, *bad):
            self.do(device, bio)
        for bio in good:
            check(bio, done=bio.length)
        for bio in bad:
            assert bio.error == errno.EINVAL, bio

    def test_deep_queue_of_writes(self, device: BlockDevice) -> None:
        """A queue many times deeper than the device's: every write lands in its place (B07)."""
        self.fill(device)
        unit = self.unit(device)
        count = min(4 * device.limits.queue_depth, self.span // unit)
        bios = [self.bio(device, WRITE, number * unit, pattern(unit, number)) for number in range(count)]
        self.do(device, *bios)
        for bio in bios:
            check(bio, done=unit)
        assert self.read(device, 0, count * unit) == b"".join(pattern(unit, number) for number in range(count))

    def test_a_refusal_does_not_harm_its_neighbours(self, device: BlockDevice) -> None:
        """In one batch, each bio has its own result (B04)."""
        if device.limits.write_align == 1:
            return
        self.fill(device)
        unit = self.unit(device)
        first, last = self.bio(device, WRITE, 0, pattern(unit, 7)), self.bio(device, WRITE, unit, pattern(unit, 8))
        bad = self.bio(device, WRITE, device.limits.write_align // 2, unit)
        self.do(device, first, bad, last)
        assert bad.error == errno.EINVAL
        check(first, done=unit)
        check(last, done=unit)
        assert self.read(device, 0, 2 * unit) == pattern(unit, 7) + pattern(unit, 8)

    def test_random_operations(self, device: BlockDevice) -> None:
        """A few hundred random operations, several at once where they do not touch, agree with a bytearray."""
        model = bytearray(self.fill(device))
        unit = self.unit(device)
        blocks = min(64, self.span // unit)
        rng = random.Random(20)
        for _ in range(60):
            places = list(range(blocks))
            rng.shuffle(places)
            bios: list[tuple[Bio, bytes | None]] = []
            for place in places[: rng.randrange(1, 9)]:
                addr = place * unit
                op = rng.choice((READ, READ, WRITE, WRITE, ZERO))
                if op == READ:
                    bios.append((self.bio(device, READ, addr, unit), bytes(model[addr : addr + unit])))
                    continue
                new = bytes(unit) if op == ZERO else rng.randbytes(unit)
                model[addr : addr + unit] = new
                bios.append((Bio(ZERO, addr, length=unit) if op == ZERO else self.bio(device, WRITE, addr, new), None))
            if rng.random() < 0.1:
                bios.append((Bio(FLUSH, 0), None))
            self.do(device, *(bio for bio, _ in bios))
            for bio, expected in bios:
                check(bio)
                if expected is not None:
                    assert b"".join(bio.segments) == expected
        assert self.read(device, 0, self.span) == model


def pattern(length: int, number: int) -> bytes:
    """`length` bytes that differ from place to place and from one `number` to another."""
    return random.Random(number).randbytes(length)


def check(bio: Bio, *, done: int | None = None) -> None:
    """Fail unless `bio` went well and moved `done` bytes."""
    if bio.error or (done is not None and bio.done_bytes != done):
        raise AssertionError(f"{bio}, expected {done} bytes and no error")


def readable(descriptor: int, timeout_ms: int) -> bool:
    """Whether `descriptor` is readable, or becomes so in time."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(timeout_ms))


def without_fua(limits: Limits) -> Limits:
    """These limits, of a device with a volatile cache and no FUA (B05)."""
    return dataclasses.replace(limits, fua=False, volatile_cache=True)
