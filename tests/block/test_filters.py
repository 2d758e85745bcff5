"""Filters over devices: each runs the conformance suite, and does what it is for."""

from __future__ import annotations

import errno
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from odirect.base.errors import DeviceError, VerifyError
from odirect.block.bio import ATOMIC, DISCARD, FLUSH, FUA, PREFLUSH, READ, WRITE, ZERO, Bio, Op
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice, Limits
from odirect.block.filters.base import Filter
from odirect.block.filters.delay import Delay
from odirect.block.filters.fault import Faults
from odirect.block.filters.log_writes import LogWrites
from odirect.block.filters.read_only import ReadOnly
from odirect.block.filters.stats import Stats
from odirect.block.filters.volatile_cache import Unit, VolatileCache
from odirect.block.memory import MemoryDevice
from odirect.sched.clock import MonotonicClock, VirtualClock
from odirect.testing.devices import BitRotDevice, MisdirectedDevice, OddDevice, TornDevice, atomic_limits
from odirect.testing.suite import DeviceConformance, ReadConformance, check, pattern, readable

MIB = 1 << 20
SECTOR = 512


def stack(device: BlockDevice) -> BlockDevice:
    """Every filter that changes nothing, one over the other."""
    return Stats(LogWrites(Faults(VolatileCache(Faults(device))), base=bytes(device.size_bytes)), MonotonicClock())


MAKERS: dict[str, Callable[[BlockDevice], BlockDevice]] = {
    "Filter": Filter,
    "Stats": lambda lower: Stats(lower, MonotonicClock()),
    "LogWrites": LogWrites,
    "Faults": Faults,
    "VolatileCache": VolatileCache,
    "VolatileCache without FUA": lambda lower: VolatileCache(lower, fua=False),
    "VolatileCache on VolatileCache": lambda lower: VolatileCache(VolatileCache(lower, fua=False)),
    "VolatileCache with atomic writes": lambda lower: VolatileCache(
        lower, limits=atomic_limits(16384, base=lower.limits)
    ),
    "TornDevice that is never cut": lambda lower: TornDevice(lower, cut_at=1 << 30),
    "Delay of nothing": lambda lower: Delay(lower, MonotonicClock(), 0),
    "Delay": lambda lower: Delay(lower, MonotonicClock(), lambda bio: bio.addr % 7 * 1000),
    "a stack": stack,
}


class TestFilters(DeviceConformance):
    """Every filter is a device."""

    span = 1 << 18

    @pytest.fixture(params=MAKERS)
    def device(self, request: pytest.FixtureRequest) -> Iterator[BlockDevice]:
        device = MAKERS[request.param](MemoryDevice(2 * MIB))
        yield device
        device.close()


class TestCacheOverOddDevice(DeviceConformance):
    """F51: the cache's own bios keep to the lower device's alignment."""

    @pytest.fixture(params=[(4096, 512, 4096), (4, 4096, 512), (4096, 65536, 4096)])
    def device(self, request: pytest.FixtureRequest) -> Iterator[BlockDevice]:
        memory, read, write = request.param
        device = VolatileCache(OddDevice(2 * MIB, memory_align=memory, read_align=read, write_align=write))
        yield device
        device.close()


class TestDelayOnVirtualClock(DeviceConformance):
    """Time that only the test moves."""

    span = 1 << 18

    @pytest.fixture
    def device(self) -> Iterator[BlockDevice]:
        device = Delay(MemoryDevice(2 * MIB), VirtualClock(), lambda bio: 1000 + bio.addr % 5)
        yield device
        device.close()

    def wait(self, device: BlockDevice) -> Sequence[Bio]:
        assert isinstance(device, Delay)
        finished = device.poll(0)
        if not finished and device.next_due_ns is not None:
            clock = device._clock
            assert isinstance(clock, VirtualClock)
            clock.move_to(device.next_due_ns)
            finished = device.poll(0)
        return finished


class TestReadOnly(ReadConformance):
    """A device that can be read, and nothing else."""

    @pytest.fixture
    def device(self) -> Iterator[BlockDevice]:
        device = ReadOnly(MemoryDevice(2 * MIB, data=pattern(MIB, 1)))
        yield device
        device.close()

    def fill(self, device: BlockDevice) -> bytes:
        return pattern(self.span, 1)

    def test_refuses_changes(self, device: BlockDevice) -> None:
        """WRITE, ZERO, DISCARD and a flush with data are EROFS; a plain FLUSH is not."""
        memory = empty(SECTOR)
        bad = [
            Bio(WRITE, 0, (memory,), SECTOR),
            Bio(ZERO, 0, length=SECTOR),
            Bio(DISCARD, 0, length=SECTOR),
            Bio(FLUSH, 0, (memory,), SECTOR),
        ]
        plain, read = Bio(FLUSH, 0), self.bio(device, READ, 0, SECTOR)
        self.do(device, *bad, plain, read)
        assert [bio.error for bio in bad] == [errno.EROFS] * 4
        assert plain.error == 0
        check(read, done=SECTOR)
        assert self.read(device, 0, self.span) == pattern(self.span, 1)


# --- helpers ---------------------------------------------------------------------------------


def send(device: BlockDevice, *bios: Bio) -> tuple[Bio, ...]:
    """Submit, commit, and wait for all of them."""
    for bio in bios:
        device.submit(bio)
    device.commit()
    missing = {id(bio) for bio in bios}
    for _ in range(1000):
        missing -= {id(bio) for bio in device.poll(-1)}
        if not missing:
            return bios
    raise AssertionError(f"{len(missing)} bios never came back")


def write(addr: int, data: bytes, flags: int = 0) -> Bio:
    memory = empty(len(data))
    memory[:] = data
    return Bio(WRITE, addr, (memory,), len(data), flags)


def read(addr: int, length: int) -> Bio:
    return Bio(READ, addr, (empty(length),), length)


def got(bio: Bio) -> bytes:
    return b"".join(bio.segments)[: bio.done_bytes]


def sector(letter: str) -> bytes:
    return letter.encode() * SECTOR


# --- every filter ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MAKERS, "ReadOnly"])
def test_strangers_bios_are_handed_up(name: str) -> None:
    """A bio that somebody sent straight to the lower device comes out of the filter's poll, as it was finished."""
    lower = MemoryDevice(MIB, data=pattern(MIB, 1))
    device = ReadOnly(lower) if name == "ReadOnly" else MAKERS[name](lower)
    stranger, ours = read(SECTOR, SECTOR), read(0, SECTOR)
    lower.submit(stranger)
    device.submit(ours)
    device.commit()
    assert device.in_flight >= 2
    back: list[Bio] = []
    for _ in range(1000):
        back.extend(device.poll(-1))
        if len(back) == 2:
            break
    assert {id(bio) for bio in back} == {id(stranger), id(ours)}
    assert got(stranger) == pattern(MIB, 1)[SECTOR : 2 * SECTOR]
    assert device.in_flight == 0
    device.close()


@pytest.mark.parametrize("name", MAKERS)
def test_two_threads(name: str) -> None:
    """One thread waits in poll(-1) while another submits: every bio comes back once, none is forgotten."""
    device = MAKERS[name](MemoryDevice(MIB))
    lock = threading.Lock()
    total, batch = 400, 8
    back: list[Bio] = []
    room = threading.Semaphore(4 * batch)

    def poller() -> None:
        for _ in range(10_000_000):
            for bio in device.poll(-1):
                back.append(bio)
                room.release()
            if len(back) == total:
                return

    thread = threading.Thread(target=poller)
    thread.start()
    bios: list[Bio] = []
    for first in range(0, total, batch):
        for number in range(first, first + batch):
            room.acquire()
            bio = write(number % 64 * SECTOR, sector("w")) if number % 3 else Bio(FLUSH, 0)
            bios.append(bio)
        with lock:
            for bio in bios[first : first + batch]:
                device.submit(bio)
            device.commit()
    thread.join(60)
    assert not thread.is_alive(), f"{total - len(back)} bios were forgotten"
    assert {id(bio) for bio in back} == {id(bio) for bio in bios} and len(back) == total
    device.close()


def test_waiting_is_ended_by_a_completion_of_the_filters_own() -> None:
    """A thread in poll(-1) is woken by a bio that never reaches the lower device, another waits there for ever."""

    class Silent(MemoryDevice):
        """Never finishes anything, but waits for it."""

        def poll(self, timeout_ns: int) -> Sequence[Bio]:
            return []

    lower = Silent(MIB)
    device = Faults(lower)
    device.fail(errno.EIO, op=WRITE)
    device.submit(read(0, SECTOR))
    device.commit()
    back: list[Bio] = []
    thread = threading.Thread(target=lambda: back.extend(device.poll(-1)))
    thread.start()
    failing = write(0, sector("x"))
    device.submit(failing)
    device.commit()
    thread.join(60)
    assert not thread.is_alive() and back == [failing] and failing.error == errno.EIO
    device.close()


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_subset_of_bios_fails(count: int) -> None:
    """F06: for each subset of n bios exactly those fail, before or after their data."""
    for moved in (0, None):
        for chosen in itertools.chain.from_iterable(
            itertools.combinations(range(count), size) for size in range(count + 1)
        ):
            lower = MemoryDevice(MIB)
            device = Faults(lower)
            device.fail(errno.EIO, nth=chosen, moved=moved)
            bios = send(device, *(write(number * SECTOR, sector("w")) for number in range(count)))
            assert [bio.error for bio in bios] == [errno.EIO if n in chosen else 0 for n in range(count)]
            assert [bio.done_bytes for bio in bios] == [0 if n in chosen else SECTOR for n in range(count)]
            assert sorted(fault.number for fault in device.injected) == list(chosen)
            for number in range(count):
                there = number not in chosen or moved is None
                assert lower.data[number * SECTOR : (number + 1) * SECTOR] == (sector("w") if there else bytes(SECTOR))
            device.close()


def test_which_bios_a_rule_matches() -> None:
    """Operation, place, predicate, number of times; the first rule that matches; removal."""
    device = Faults(MemoryDevice(MIB))
    by_op = device.fail(errno.EIO, op=FLUSH)
    device.fail(errno.ENOSPC, within=(4096, 8192), times=1)
    device.fail(errno.EAGAIN, where=lambda bio: bio.length == 1024)
    flush, there, again, long = Bio(FLUSH, 0), read(4096, SECTOR), read(4096, SECTOR), read(0, 1024)
    before, after = read(4096 - SECTOR, SECTOR), read(8192, SECTOR)
    send(device, flush, there, again, long, before, after)
    assert [bio.error for bio in (flush, there, again, long)] == [errno.EIO, errno.ENOSPC, 0, errno.EAGAIN]
    assert (before.error, after.error) == (0, 0)
    by_op.remove()
    assert send(device, Bio(FLUSH, 0))[0].error == 0
    device.clear()
    assert send(device, read(0, 1024))[0].error == 0
    assert [fault.op for fault in device.injected] == [Op.FLUSH, Op.READ, Op.READ]
    assert device.submitted == 8
    device.restart()
    assert device.submitted == 0 and not device.injected
    with pytest.raises(ValueError, match="errno"):
        device.fail(0)
    with pytest.raises(ValueError, match="-1"):
        device.shorten(-1)
    device.close()


@pytest.mark.parametrize("op", [READ, WRITE])
def test_short_transfers_of_every_length(op: int) -> None:
    """F04: any prefix, aligned or not, moves exactly that and leaves the rest of disk and memory alone."""
    old, new = pattern(4 * SECTOR, 1), pattern(3 * SECTOR, 2)
    for prefix in [0, 1, 2, 100, 511, 512, 513, 1000, 1024, 1025, 1535, 1536]:
        lower = MemoryDevice(MIB, data=old)
        device = Faults(lower)
        device.shorten(prefix, op=op)
        if op == READ:
            memory = empty(3 * SECTOR)
            memory[:] = new
            bio = Bio(READ, SECTOR, (memory[:SECTOR], memory[SECTOR:]), 3 * SECTOR)
        else:
            bio = write(SECTOR, new)
            memory = bio.segments[0]
        send(device, bio)
        assert (bio.error, bio.done_bytes) == (0, min(prefix, 3 * SECTOR))
        if op == READ:
            assert memory == old[SECTOR : SECTOR + prefix] + new[prefix:]
            assert lower.data[: len(old)] == old
        else:
            assert lower.data[: len(old)] == old[:SECTOR] + new[:prefix] + old[SECTOR + prefix :]
        device.close()


def test_short_write_on_an_odd_device() -> None:
    """F04, F51: the prefix that the lower device could not write itself is read, changed and written."""
    lower = OddDevice(4 * 65536, memory_align=4096, read_align=65536, write_align=4096)
    device = Faults(lower)
    device.shorten(5000)
    bio = write(8192, pattern(12288, 1))
    send(device, bio)
    assert (bio.error, bio.done_bytes) == (0, 5000)
    assert lower.data[8192:20480] == pattern(12288, 1)[:5000] + bytes(12288 - 5000)
    device.close()


def test_fault_after_a_prefix() -> None:
    """F07: the bytes up to k are on the device, and the bio says only that it failed."""
    lower = MemoryDevice(MIB)
    device = Faults(lower)
    device.fail(errno.EIO, op=WRITE, moved=700)
    bio = write(0, pattern(1024, 1))
    send(device, bio)
    assert (bio.error, bio.done_bytes) == (errno.EIO, 0)
    assert lower.data[:1024] == pattern(1024, 1)[:700] + bytes(324)
    assert device.injected[0].moved == 700
    device.close()


def test_refused_from_the_middle_on() -> None:
    """F50: EINVAL mid-stream, after some went through."""
    device = Faults(MemoryDevice(MIB))
    device.fail(errno.EINVAL, nth=range(3, 1 << 30))
    bios = send(device, *(write(number * SECTOR, sector("w")) for number in range(6)))
    assert [bio.error for bio in bios] == [0, 0, 0, errno.EINVAL, errno.EINVAL, errno.EINVAL]
    device.close()


def test_the_lower_devices_own_error_stays() -> None:
    """A bio that fails by itself is not reported as injected."""
    device = Faults(MemoryDevice(SECTOR))
    device.fail(errno.EIO, moved=None)
    bio = write(SECTOR, sector("w"))
    send(device, bio)
    assert bio.error == errno.ENOSPC and not device.injected
    device.clear()
    for prefix in (SECTOR, 100):
        device.shorten(prefix)
        bio = write(SECTOR, sector("w") * 2)
        send(device, bio)
        assert (bio.error, bio.done_bytes) == (errno.ENOSPC, 0) and not device.injected
        device.clear()
    device.close()


# --- delay and statistics ----------------------------------------------------------------------


def test_delay_holds_until_the_clock_says_so() -> None:
    """Completions come in the order of their time, and none before it."""
    clock = VirtualClock()
    device = Delay(MemoryDevice(MIB), clock, lambda bio: 1000 if bio.addr else 5000)
    slow, fast = read(0, SECTOR), read(SECTOR, SECTOR)
    device.submit(slow)
    device.submit(fast)
    device.commit()
    assert device.poll(0) == [] and device.next_due_ns == 1000
    clock.move_to(999)
    assert device.poll(0) == []
    clock.move_to(1000)
    assert device.poll(0) == [fast]
    clock.move_to(10_000)
    assert device.poll(0) == [slow] and device.next_due_ns is None
    device.submit(slow)
    device.commit()
    device.poll(0)
    device.close()
    assert device.poll(0) == [slow]


def test_stats() -> None:
    """Operations, bytes, errors, latency and depth, of what went through here alone."""
    clock = VirtualClock()
    lower = MemoryDevice(8192)
    device = Stats(lower, clock)
    bios = [read(0, 1024), write(0, sector("x")), write(8192, sector("x")), Bio(FLUSH, 0)]
    stranger = read(0, SECTOR)
    lower.submit(stranger)
    for bio in bios:
        device.submit(bio)
    device.commit()
    clock.move_to(1000)
    assert len(device.poll(0)) == 5
    assert device.operations == {Op.READ: 1, Op.WRITE: 2, Op.FLUSH: 1}
    assert device.bytes == {Op.READ: 1024, Op.WRITE: SECTOR, Op.FLUSH: 0}
    assert device.errors == {errno.ENOSPC: 1}
    assert (device.max_in_flight, device.commits) == (4, 1)
    assert device.latency[Op.WRITE] == {10: 2}
    assert device.percentile_ns(Op.READ, 0.5) == 1023
    assert device.percentile_ns(Op.ZERO, 0.5) == 0
    device.reset()
    assert not device.operations and device.max_in_flight == 0
    device.close()


# --- the log -----------------------------------------------------------------------------------


def test_replay_at_every_record() -> None:
    """The device as it was after each record; discards and zeroes too; what was refused never was."""
    rng = random.Random(7)
    base = pattern(64 * SECTOR, 1)
    lower = MemoryDevice(64 * SECTOR, data=base)
    device = LogWrites(lower)
    images = [base]
    for number in range(100):
        place = rng.randrange(64) * SECTOR
        op = rng.choice((WRITE, WRITE, ZERO, DISCARD, FLUSH, READ))
        if op == WRITE:
            send(device, write(place, rng.randbytes(SECTOR)))
        elif op == READ:
            send(device, read(place, SECTOR))
            continue
        else:
            send(device, Bio(op, place, length=0 if op == FLUSH else SECTOR))
        images.append(bytes(lower.data))
        if number == 50:
            device.mark("half")
            half = bytes(lower.data)
    assert len(images) == len(device.records) + 1
    for upto, image in enumerate(images):
        assert device.replay(upto) == image
    assert device.replay(device.marks["half"]) == half
    refused = write(64 * SECTOR, sector("x"))
    send(device, refused)
    assert refused.error == errno.ENOSPC and device.replay() == images[-1]
    device.close()


def test_log_copies_what_was_handed_over() -> None:
    """A caller who changes his memory afterwards does not change the log (F21)."""
    device = LogWrites(MemoryDevice(4096), base=bytes(4096))
    bio = write(0, sector("a"))
    send(device, bio)
    bio.segments[0][:] = sector("b")
    assert device.replay()[:SECTOR] == sector("a")
    with pytest.raises(VerifyError):
        LogWrites(device, base=b"")
    device.close()


def test_log_hands_up_what_finished_while_the_base_was_read() -> None:
    """A stranger's bio that was in flight when the log was begun is not lost."""
    lower = MemoryDevice(4096, data=pattern(4096, 1))
    stranger = read(0, SECTOR)
    lower.submit(stranger)
    device = LogWrites(lower)
    assert device.base == pattern(4096, 1) and device.in_flight == 1
    assert device.poll(-1) == [stranger] and device.in_flight == 0
    device.close()


def test_log_epochs() -> None:
    """Records of one commit share an epoch."""
    device = LogWrites(MemoryDevice(4096), base=bytes(4096))
    send(device, write(0, sector("a")), write(SECTOR, sector("b")))
    send(device, read(0, SECTOR))
    send(device, Bio(FLUSH, 0))
    assert [(record.op, record.epoch) for record in device.records] == [(Op.WRITE, 0), (Op.WRITE, 0), (Op.FLUSH, 1)]
    device.close()


def test_what_the_log_calls_unflushed() -> None:
    """F40, F41: durable is what a flush covered that was acknowledged, or FUA; a failed flush covers nothing."""
    lower = Faults(MemoryDevice(4096))
    device = LogWrites(lower, base=bytes(4096))
    send(device, write(0, sector("a")))  # 0
    send(device, write(512, sector("b"), FUA))  # 1
    assert device.unflushed() == [0]
    together = write(1024, sector("c"))  # 2: not acknowledged when the flush is submitted
    send(device, together, Bio(FLUSH, 0))  # 3
    assert device.unflushed(3) == [0, 2], "before the flush was acknowledged, or even submitted"
    assert device.unflushed() == [2]
    lower.fail(errno.EIO, op=FLUSH, times=1)
    send(device, Bio(FLUSH, 0))  # 4
    assert device.unflushed() == [2]
    send(device, write(1536, sector("d"), PREFLUSH))  # 5
    assert device.unflushed() == [5]
    assert device.replay(without=device.unflushed()) == sector("a") + sector("b") + sector("c") + bytes(4096 - 1536)
    device.close()


# --- the volatile cache --------------------------------------------------------------------------


def test_write_stays_in_the_cache() -> None:
    """F40: an acknowledged write reads back and is not on the lower device; a power cut drops it."""
    lower = MemoryDevice(MIB)
    device = VolatileCache(lower)
    send(device, write(0, sector("a") + sector("b")))
    assert device.limits.volatile_cache and device.limits.fua
    assert lower.data[:SECTOR] == bytes(SECTOR)
    assert got(send(device, read(0, 4 * SECTOR))[0]) == sector("a") + sector("b") + bytes(2 * SECTOR)
    assert device.unflushed() == [Unit(0, 0, SECTOR), Unit(0, SECTOR, SECTOR)]
    assert device.power_cut() == []
    device.reopen()
    assert got(send(device, read(0, SECTOR))[0]) == bytes(SECTOR)
    device.close()


@pytest.mark.parametrize("how", ["flush", "preflush", "fua", "zero", "close"])
def test_what_makes_durable(how: str) -> None:
    """F40: FLUSH and PREFLUSH bring everything down, FUA its own bio alone, closing everything."""
    lower = MemoryDevice(MIB, data=pattern(MIB, 1))
    device = VolatileCache(lower)
    send(device, write(0, sector("a")))
    old = pattern(MIB, 1)[SECTOR : 2 * SECTOR]
    if how == "flush":
        send(device, Bio(FLUSH, 0))
        expected = sector("a") + old
    elif how == "preflush":
        send(device, write(SECTOR, sector("b"), PREFLUSH))
        expected = sector("a") + old
    elif how == "fua":
        send(device, write(SECTOR, sector("b"), FUA))
        expected = pattern(MIB, 1)[:SECTOR] + sector("b")
    elif how == "zero":
        send(device, Bio(ZERO, SECTOR, length=SECTOR), Bio(DISCARD, 0, length=SECTOR))
        assert got(send(device, read(0, 2 * SECTOR))[0]) == bytes(2 * SECTOR)
        send(device, Bio(FLUSH, 0))
        expected = bytes(2 * SECTOR)
    else:
        device.close()
        expected = sector("a") + old
    if how != "close":
        device.power_cut()
    assert lower.data[: 2 * SECTOR] == expected
    assert lower.data[2 * SECTOR :] == pattern(MIB, 1)[2 * SECTOR :]
    device.close()


def test_every_subset_can_survive() -> None:
    """Each sector is old or new by itself, in any combination, also of several writes to one sector."""
    seen = set()
    for chosen in itertools.product((False, True), repeat=4):
        lower = MemoryDevice(4096, data=b"." * 4096)
        device = VolatileCache(lower)
        send(device, write(0, sector("a") + sector("b")))
        send(device, write(SECTOR, sector("c") + sector("d")))
        units = device.unflushed()
        kept = [unit for unit, is_kept in zip(units, chosen, strict=True) if is_kept]
        assert device.power_cut(keep=kept) == kept
        seen.add(bytes(lower.data[: 3 * SECTOR : SECTOR]))
        device.close()
    assert seen == {bytes(x) for x in itertools.product(b".a", b".bc", b".d")}


def test_power_cut_by_chance() -> None:
    """The generator decides, the same seed the same; over some seeds every outcome is met."""
    outcomes = set()
    for seed in range(100):
        images = []
        for _ in range(2):
            lower = MemoryDevice(4096)
            device = VolatileCache(lower)
            send(device, write(0, sector("a") + sector("b") + sector("c")))
            device.power_cut(random.Random(seed))
            images.append(bytes(lower.data))
            device.close()
        assert images[0] == images[1]
        outcomes.add(images[0][: 3 * SECTOR : SECTOR])
    assert len(outcomes) == 8


def test_flushed_data_survives_any_cut() -> None:
    """F40: random writes, flushes, FUA, evictions; after a cut each sector is what was durable, or later."""
    for seed in range(150):
        rng = random.Random(seed)
        lower = MemoryDevice(16 * SECTOR)
        device = VolatileCache(VolatileCache(lower) if seed % 2 else lower)
        allowed = [{0} for _ in range(16)]
        latest = [0] * 16
        for number in range(1, 40):
            place, count = rng.randrange(12), rng.randrange(1, 5)
            flags = rng.choice((0, 0, 0, FUA))
            bio = write(place * SECTOR, bytes([number]) * SECTOR * count, flags)
            send(device, bio)
            check(bio, done=bio.length)
            for at in range(place, place + count):
                allowed[at] = {number} if flags else allowed[at] | {number}
                latest[at] = number
            if rng.random() < 0.15:
                send(device, Bio(FLUSH, 0))
                allowed = [{one} for one in latest]
            if rng.random() < 0.2:
                device.evict(rng)
            if rng.random() < 0.3:
                bio = read(0, 16 * SECTOR)
                send(device, bio)
                assert list(got(bio)[::SECTOR]) == latest, seed
        device.power_cut(rng)
        device.reopen()
        if isinstance(device.lower, VolatileCache):
            device.lower.power_cut(rng)
            device.lower.reopen()
        bio = read(0, 16 * SECTOR)
        send(device, bio)
        for at in range(16):
            found = set(got(bio)[at * SECTOR : (at + 1) * SECTOR])
            assert len(found) == 1 and found <= allowed[at], (seed, at, found, allowed[at])
        device.close()


def test_atomic_writes_are_whole_after_a_cut() -> None:
    """F43: an atomic write is all there or not at all, also when it was evicted, overwritten, or overlaps another."""
    outcomes = set()
    for seed in range(300):
        rng = random.Random(seed)
        lower = MemoryDevice(16 * SECTOR)
        device = VolatileCache(lower, limits=atomic_limits(8 * SECTOR))
        tops = [0, 0]
        for number in range(1, 12):
            place = rng.choice((0, 8))
            bio = write(place * SECTOR, bytes([number]) * SECTOR * 8, ATOMIC)
            send(device, bio)
            check(bio, done=bio.length)
            tops[place // 8] = number
            if rng.random() < 0.3:
                device.evict(rng, 0.2)
            if rng.random() < 0.3:
                device.poll(0)
        device.power_cut(rng)
        for place in (0, 8):
            found = set(lower.data[place * SECTOR : (place + 8) * SECTOR])
            assert len(found) == 1, (seed, place, found)
            outcomes.add(found.pop() == tops[place // 8])
        device.close()
    assert outcomes == {True, False}


def test_without_atomic_a_write_is_torn() -> None:
    """F43: the same without ATOMIC is torn under some seed, so the test above could fail."""
    for seed in range(100):
        lower = MemoryDevice(8 * SECTOR)
        device = VolatileCache(lower)
        send(device, write(0, b"n" * SECTOR * 8))
        device.power_cut(random.Random(seed))
        torn = len(set(lower.data)) == 2
        device.close()
        if torn:
            return
    raise AssertionError("no write was torn under any seed")


def test_atomic_writes_through_two_caches() -> None:
    """F43: a cache hands an atomic write on as one, beside its neighbours, so that no lower cache can tear it."""
    for seed in range(200):
        rng = random.Random(seed)
        store = MemoryDevice(32 * SECTOR)
        limits = atomic_limits(8 * SECTOR, base=store.limits)
        lower = VolatileCache(store, limits=limits)
        device = VolatileCache(lower, limits=limits)
        for number in range(1, 12):
            place = rng.choice((0, 8, 16, 24))
            if place in (0, 16):
                send(device, write(place * SECTOR, bytes([number]) * SECTOR * 8, ATOMIC))
            else:
                send(device, write(place * SECTOR, bytes([number]) * SECTOR * 8))
            if rng.random() < 0.3:
                device.evict(rng, 0.3)
            for _ in range(rng.randrange(4)):
                device.poll(0)
            if rng.random() < 0.2:
                lower.evict(rng, 0.3)
        device.power_cut(rng)
        lower.power_cut(rng)
        for place in (0, 16):
            assert len(set(store.data[place * SECTOR : (place + 8) * SECTOR])) == 1, (seed, place)
        device.close()


def test_older_writes_do_not_come_over_what_has_landed() -> None:
    """F43: what the lower device has already is not torn by an older write that arrives at the power cut."""
    lower = MemoryDevice(8 * SECTOR)
    device = VolatileCache(lower, limits=atomic_limits(8 * SECTOR))
    send(device, write(0, sector("o")))
    old = device.unflushed()
    send(device, write(0, sector("n") * 8, ATOMIC))
    device.submit(Bio(FLUSH, 0))
    device.commit()
    assert list(device.poll(0)) == [], "the data has landed, the flush of the lower device is on its way"
    assert device.unflushed() == []
    device.power_cut(keep=old)
    assert lower.data == sector("n") * 8
    device.close()


def test_failed_flush_does_not_lose_what_came_after_it() -> None:
    """F41: writes handed over behind a flush that failed are not lost: FUA is durable, the rest is flushed later."""
    lower = MemoryDevice(4096)
    device = VolatileCache(lower)
    device.fail_flush(errno.EIO)
    flush, fua, plain = Bio(FLUSH, 0), write(SECTOR, sector("b"), FUA), write(2 * SECTOR, sector("c"))
    send(device, write(0, sector("a")))
    send(device, flush, fua, plain)
    assert (flush.error, fua.error, plain.error) == (errno.EIO, 0, 0)
    assert lower.data[: 2 * SECTOR] == bytes(SECTOR) + sector("b")
    assert send(device, Bio(FLUSH, 0))[0].error == 0
    device.power_cut()
    assert lower.data[: 3 * SECTOR] == bytes(SECTOR) + sector("b") + sector("c")
    device.close()


def test_units_are_what_the_lower_device_can_write() -> None:
    """F51: where writes must be aligned to more than a logical block, that is what a power cut keeps or drops."""
    lower = OddDevice(65536, memory_align=4096, read_align=512, write_align=4096)
    device = VolatileCache(lower)
    send(device, write(0, b"a" * 8192))
    first, second = device.unflushed()
    assert (first.length, second.addr) == (4096, 4096)
    assert device.power_cut(keep=[second]) == [second]
    assert lower.data[:8192] == bytes(4096) + b"a" * 4096
    device.close()


def test_reads_of_part_of_a_unit() -> None:
    """F51: reads may be finer than what is written, and still see the cache."""
    device = VolatileCache(OddDevice(65536, memory_align=4096, read_align=512, write_align=4096))
    send(device, write(4096, pattern(4096, 1)))
    for start, length in ((4608, 512), (3584, 1024), (7680, 1024), (3584, 5120)):
        image = bytes(4096) + pattern(4096, 1) + bytes(4096)
        assert got(send(device, read(start, length))[0]) == image[start : start + length]
    device.close()


def test_zeroes_are_handed_on_as_zeroes() -> None:
    """A ZERO reaches the lower device as one, not as bytes to be written, beside data that is."""
    lower = LogWrites(MemoryDevice(8 * SECTOR, data=b"." * 8 * SECTOR))
    device = VolatileCache(lower)
    send(device, write(0, sector("a")), Bio(ZERO, SECTOR, length=4 * SECTOR), write(3 * SECTOR, sector("b")))
    send(device, Bio(FLUSH, 0))
    changes = [(record.op, record.addr, record.length) for record in lower.records if record.op is not Op.FLUSH]
    assert changes == [
        (Op.WRITE, 0, SECTOR),
        (Op.ZERO, SECTOR, 2 * SECTOR),
        (Op.WRITE, 3 * SECTOR, SECTOR),
        (Op.ZERO, 4 * SECTOR, SECTOR),
    ]
    assert lower.replay()[::SECTOR] == b"a\0\0b\0..."
    device.close()


def test_runs_fit_the_lower_devices_bios() -> None:
    """B02: what is brought down is cut to the size of bio that the lower device takes."""
    lower = MemoryDevice(64 * SECTOR, limits=Limits(max_bio_bytes=4 * SECTOR, volatile_cache=False))
    device = VolatileCache(lower)
    for place in range(0, 64, 4):
        send(device, write(place * SECTOR, pattern(4 * SECTOR, place)))
    assert send(device, Bio(FLUSH, 0))[0].error == 0
    assert lower.data == b"".join(pattern(4 * SECTOR, place) for place in range(0, 64, 4))
    device.close()


def test_wakeup_fd_that_is_made_after_a_completion() -> None:
    """What a filter finished by itself before the descriptor was asked for makes it readable."""
    device = ReadOnly(MemoryDevice(4096))
    bio = write(0, sector("a"))
    device.submit(bio)
    device.commit()
    descriptor = device.wakeup_fd()
    assert descriptor is not None and readable(descriptor, 0)
    assert device.poll(0) == [bio] and not readable(descriptor, 0)
    device.close()


def test_flush_error_that_loses() -> None:
    """F41: after a failed flush the data reads back, a second flush "succeeds", and a power cut shows the truth."""
    lower = MemoryDevice(4096)
    device = VolatileCache(lower)
    device.fail_flush(errno.EIO)
    send(device, write(0, sector("a")))
    first, second = Bio(FLUSH, 0), Bio(FLUSH, 0)
    send(device, first)
    later = write(SECTOR, sector("b"))
    send(device, later)
    send(device, second)
    assert (first.error, second.error) == (errno.EIO, 0)
    assert got(send(device, read(0, 2 * SECTOR))[0]) == sector("a") + sector("b")
    device.power_cut(keep=lambda unit: True)
    assert lower.data[: 2 * SECTOR] == bytes(SECTOR) + sector("b")
    device.close()


def test_flush_error_that_keeps() -> None:
    """F41: a flush that failed without losing can be tried again; PREFLUSH fails its bio, which writes nothing."""
    lower = MemoryDevice(4096)
    device = VolatileCache(lower)
    device.fail_flush(errno.ENOSPC, times=2, lose=False)
    send(device, write(0, sector("a")))
    first, barrier = Bio(FLUSH, 0), write(SECTOR, sector("b"), PREFLUSH)
    send(device, first)
    send(device, barrier)
    assert (first.error, barrier.error, barrier.done_bytes) == (errno.ENOSPC, errno.ENOSPC, 0)
    assert send(device, Bio(FLUSH, 0))[0].error == 0
    device.power_cut()
    assert lower.data[: 2 * SECTOR] == sector("a") + bytes(SECTOR)
    device.close()


def test_lower_error_fails_the_flush() -> None:
    """F41: what the lower device refuses comes out of the flush; what it did not take is still unflushed."""
    lower = Faults(MemoryDevice(4096))
    device = VolatileCache(lower)
    lower.fail(errno.EIO, op=WRITE, times=1)
    send(device, write(0, sector("a")))
    flush, fua = Bio(FLUSH, 0), write(SECTOR, sector("b"), FUA)
    send(device, flush)
    assert flush.error == errno.EIO and device.unflushed() == [Unit(0, 0, SECTOR)]
    lower.fail(errno.EIO, op=WRITE, times=1)
    send(device, fua)
    assert (fua.error, fua.done_bytes) == (errno.EIO, 0)
    assert send(device, Bio(FLUSH, 0))[0].error == 0 and not device.unflushed()
    device.close()


@pytest.mark.parametrize("in_flight", ["error", "lost"])
def test_bios_in_flight_at_a_power_cut(in_flight: str) -> None:
    """They fail, or never come back; what was acknowledged does; until reopen all fails."""
    lower = MemoryDevice(4096, data=b"." * 4096)
    device = VolatileCache(lower)
    acknowledged = write(0, sector("a"))
    device.submit(acknowledged)
    device.commit()
    flush, reading, queued = Bio(FLUSH, 0), read(0, 2 * SECTOR), write(SECTOR, sector("b"))
    device.submit(flush)
    device.submit(reading)
    device.commit()
    device.submit(queued)
    device.power_cut(in_flight=in_flight)
    back = list(device.poll(0))
    if in_flight == "lost":
        assert back == [acknowledged]
    else:
        assert {id(bio) for bio in back} == {id(bio) for bio in (acknowledged, flush, reading, queued)}
        assert [bio.error for bio in (flush, reading, queued)] == [errno.EIO] * 3
    assert acknowledged.error == 0 and device.in_flight == 0
    late = read(0, SECTOR)
    send(device, late)
    assert late.error == errno.EIO
    device.reopen()
    assert send(device, read(SECTOR, SECTOR))[0].error == 0
    assert lower.data[SECTOR:] == b"." * (4096 - SECTOR)
    device.close()


def test_power_cut_in_the_middle_of_a_flush() -> None:
    """A flush moves run by run: a cut between two leaves the first and may drop the second."""
    images = set()
    for polls in range(8):
        lower = MemoryDevice(8 * SECTOR)
        device = VolatileCache(lower)
        send(device, write(0, sector("a")), write(2 * SECTOR, sector("b")), write(4 * SECTOR, sector("c")))
        flush = Bio(FLUSH, 0)
        device.submit(flush)
        device.commit()
        finished = [bio for _ in range(polls) for bio in device.poll(0)]
        device.power_cut()
        images.add(bytes(lower.data[: 5 * SECTOR : 2 * SECTOR]))
        if finished:
            assert flush.error == 0 and bytes(lower.data[: 5 * SECTOR : 2 * SECTOR]) == b"abc"
        device.close()
    assert images == {b"a\0\0", b"ab\0", b"abc"}


def test_power_cut_says_what_is_wrong() -> None:
    """A wrong argument is a ValueError; a lower device that fails while the rest lands is a DeviceError."""
    lower = Faults(MemoryDevice(4096))
    device = VolatileCache(lower)
    with pytest.raises(ValueError, match="maybe"):
        device.power_cut(in_flight="maybe")
    send(device, write(0, sector("a")))
    lower.fail(errno.EIO)
    with pytest.raises(DeviceError):
        device.power_cut(keep=lambda unit: True)
    lower.clear()
    device.close()


def test_reads_lay_the_cache_over_the_lower_device() -> None:
    """Reads over cached and uncached sectors, in vectors, across partly overwritten atomic writes."""
    lower = MemoryDevice(16 * SECTOR, data=b"." * (16 * SECTOR))
    device = VolatileCache(lower, limits=atomic_limits(8 * SECTOR))
    send(device, write(0, b"A" * 8 * SECTOR, ATOMIC))
    send(device, write(3 * SECTOR, b"b" * SECTOR), write(9 * SECTOR, b"c" * SECTOR))
    send(device, Bio(ZERO, 5 * SECTOR, length=SECTOR))
    memory = empty(12 * SECTOR)
    bio = Bio(READ, 0, (memory[: 3 * SECTOR], memory[3 * SECTOR : 4 * SECTOR], memory[4 * SECTOR :]), 12 * SECTOR)
    send(device, bio)
    assert got(bio)[::SECTOR] == b"AAAbA\0AA.c.."
    device.evict()
    assert got(send(device, read(0, 12 * SECTOR))[0])[::SECTOR] == b"AAAbA\0AA.c.."
    send(device, Bio(FLUSH, 0))
    assert bytes(lower.data[: 12 * SECTOR : SECTOR]) == b"AAAbA\0AA.c.." and not device.unflushed()
    device.close()


# --- broken devices ------------------------------------------------------------------------------


def test_torn_device() -> None:
    """F43: power goes with the n-th change, whichever that is; the bio fails and its sectors are old or new."""
    lengths = set()
    for cut_at in range(7):
        lower = MemoryDevice(16 * SECTOR)
        device = TornDevice(lower, cut_at=cut_at, rng=random.Random(cut_at))
        good = 0
        for number in range(6):
            bio = write(2 * number * SECTOR, sector("w") * 2, FUA)
            send(device, bio)
            good += not bio.error
        assert device.was_cut == (cut_at < 6) and device.changes == 6
        assert good == min(cut_at, 6)
        assert lower.data[: good * 2 * SECTOR] == sector("w") * good * 2, "what was acknowledged is there"
        lengths.add(good)
        if device.was_cut:
            device.reopen()
        assert send(device, read(0, SECTOR))[0].error == 0
        device.close()
    assert lengths == set(range(7))


def test_bit_rot() -> None:
    """Reads are wrong where told, the data is kept, and writing heals unless the fault is stuck."""
    device = BitRotDevice(4096, data=pattern(4096, 1))
    device.rot(700, 0x81)
    device.rot(1300, 2, stuck=True)
    device.lose(2048, 1)
    bad = bytearray(pattern(4096, 1))
    bad[700] ^= 0x81
    bad[1300] ^= 2
    memory = empty(2048)
    bio = Bio(READ, 0, (memory[:512], memory[512:]), 2048)
    send(device, bio)
    assert got(bio) == bad[:2048]
    assert device.data == pattern(4096, 1)
    assert send(device, read(0, 4096))[0].error == errno.EIO
    assert device.faulty == [700, 1300, 2048]
    send(device, write(512, sector("x")), write(1024, sector("y")), Bio(ZERO, 2048, length=512))
    assert device.faulty == [1300]
    assert got(send(device, read(1024, 512))[0])[1300 - 1024] == ord("y") ^ 2
    device.heal()
    assert got(send(device, read(1024, 512))[0]) == sector("y")
    with pytest.raises(ValueError, match="4096"):
        device.rot(4096)
    device.close()


def test_misdirected() -> None:
    """A write lands elsewhere and a read comes from elsewhere, once, and both say that they went well."""
    device = MisdirectedDevice(4096, data=b"." * 4096)
    device.misdirect(WRITE, 512, 1024)
    lost, next_one = write(512, sector("a")), write(512, sector("b"))
    send(device, lost)
    check(lost, done=512)
    assert device.data[512:1536] == b"." * 512 + sector("a")
    assert device.intended[512:1536] == sector("a") + b"." * 512
    send(device, next_one)
    assert device.data[512:1024] == sector("b")
    device.misdirect(READ, 0, 1024)
    assert got(send(device, read(0, 512))[0]) == sector("a")
    assert got(send(device, read(0, 512))[0]) == b"." * 512
    assert device.happened == [(WRITE, 512, 1024), (READ, 0, 1024)]
    send(device, Bio(ZERO, 0, length=512))
    assert device.intended[:512] == bytes(512)
    with pytest.raises(ValueError, match="9999"):
        device.misdirect(READ, 0, 9999)
    device.close()


def test_limits_pass_through() -> None:
    """A filter has the limits and the size of what is below."""
    limits = Limits(logical_block=4096, read_align=4096, write_align=4096, queue_depth=3, fua=True)
    for device in (Faults(MemoryDevice(8192, limits=limits)), ReadOnly(MemoryDevice(8192, limits=limits))):
        assert device.limits is limits and device.size_bytes == 8192
        device.close()
