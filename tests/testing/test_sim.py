"""The simulator: same seed, same run; what is broken is found; what is right is not."""

from __future__ import annotations

import errno
import hashlib
import itertools
import re
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from odirect.block.bio import FLUSH, FUA, READ, WRITE, Bio
from odirect.block.buffers import empty
from odirect.block.device import BlockDevice
from odirect.block.filters.delay import Delay
from odirect.block.filters.fault import Faults
from odirect.block.filters.volatile_cache import VolatileCache
from odirect.block.memory import MemoryDevice
from odirect.sched.drive_sync import Stalled
from odirect.sched.locks import RangeLock
from odirect.sched.traps import Event, gather, sleep_ns, wait, yield_now
from odirect.testing.choices import RandomChooser, ScriptedChooser
from odirect.testing.sim import Simulation, explore, replay, run_seeds
from odirect.testing.sim_device import SimDevice, SimFaults
from odirect.testing.suite import DeviceConformance, check

SECTOR = 512


async def do(device: BlockDevice, bio: Bio) -> Bio:
    """Submit `bio` and wait for it."""
    event = Event()
    bio.end = event.fire
    device.submit(bio)
    await wait(event)
    return bio


async def write(device: BlockDevice, addr: int, data: bytes, flags: int = 0) -> Bio:
    memory = empty(len(data))
    memory[:] = data
    return await do(device, Bio(WRITE, addr, (memory,), len(data), flags))


async def read(device: BlockDevice, addr: int, length: int) -> bytes:
    bio = await do(device, Bio(READ, addr, (empty(length),), length))
    check(bio, done=length)
    return bytes(bio.segments[0])


# --- the device is a device ----------------------------------------------------------------------


class TestSimDevice(DeviceConformance):
    """Chosen latencies and orders, and no faults: an ordinary device."""

    span = 1 << 18

    @pytest.fixture(params=range(5))
    def device(self, request: pytest.FixtureRequest) -> Iterator[BlockDevice]:
        device = Simulation(request.param).device(2 << 20)
        yield device
        device.close()


class TestSimDeviceInAnyOrder(DeviceConformance):
    """As `explore` has it."""

    span = 1 << 18

    @pytest.fixture
    def device(self) -> Iterator[BlockDevice]:
        device = Simulation(1, ordering="any").device(2 << 20)
        yield device
        device.close()


class TestSimDeviceOverCache(DeviceConformance):
    """A simulated device whose store is a stack of filters."""

    span = 1 << 18

    @pytest.fixture
    def device(self) -> Iterator[BlockDevice]:
        sim = Simulation(3)
        device = VolatileCache(sim.device(store=VolatileCache(MemoryDevice(2 << 20)), add=False))
        yield device
        device.close()


# --- scenarios --------------------------------------------------------------------------------------


def counting(sim: Simulation, *, locked: bool) -> Coroutine[Any, Any, None]:
    """Several tasks add one to counters on disk, reading and writing whole ranges, under a lock or not."""
    device = sim.device(16 * SECTOR)
    lock = RangeLock()
    added = [0] * 16

    async def add(times: int) -> None:
        for _ in range(times):
            first = sim.rng.randrange(14)
            count = sim.rng.randrange(1, 3)
            held = await lock.hold(first * SECTOR, count * SECTOR) if locked else None
            old = await read(device, first * SECTOR, count * SECTOR)
            new = bytes(byte + 1 for byte in old)
            check(await write(device, first * SECTOR, new), done=len(new))
            for at in range(first, first + count):
                added[at] += 1
            if held is not None:
                held.release()
            if sim.rng.random() < 0.2:
                await sleep_ns(sim.rng.randrange(1_000_000))

    async def main() -> None:
        tasks = [sim.spawn(add(5), f"adder-{number}") for number in range(4)]
        await gather(*tasks)
        data = await read(device, 0, 16 * SECTOR)
        assert list(data[::SECTOR]) == added, f"{list(data[::SECTOR])} on the disk, {added} added"
        assert lock.idle

    return main()


def in_order(sim: Simulation) -> Coroutine[Any, Any, None]:
    """Broken on purpose: two overlapping writes in flight, and a belief that the second comes last."""
    device = sim.device(SECTOR)

    async def main() -> None:
        first = sim.spawn(write(device, 0, b"1" * SECTOR))
        second = sim.spawn(write(device, 0, b"2" * SECTOR))
        await gather(first, second)
        assert await read(device, 0, SECTOR) == b"2" * SECTOR

    return main()


def faulty(sim: Simulation) -> Coroutine[Any, Any, None]:
    """Reads and writes on a device that fails and is short now and then: what was acknowledged is there."""
    device = sim.device(
        8 * SECTOR, faults=SimFaults(read_error=0.2, write_error=0.2, flush_error=0.1, short=0.2), name="faulty"
    )

    async def owner(place: int) -> None:
        allowed = {bytes(4 * SECTOR)[:SECTOR]}
        for number in range(1, 8):
            new = bytes([number]) * SECTOR
            bio = await write(device, place * SECTOR, new)
            whole = not bio.error and bio.done_bytes == SECTOR
            allowed = {new} if whole else allowed | {new}
            bio = await do(device, Bio(FLUSH, 0))
            bio = await do(device, Bio(READ, place * SECTOR, (empty(SECTOR),), SECTOR))
            if not bio.error and bio.done_bytes == SECTOR:
                assert bytes(bio.segments[0]) in allowed

    async def main() -> None:
        await gather(*(sim.spawn(owner(place), f"owner-{place}") for place in range(8)))

    return main()


# --- determinism -----------------------------------------------------------------------------------


def traced(seed: int, scenario: Any) -> list[tuple[object, ...]]:
    with Simulation(seed) as sim:
        sim.run(scenario(sim))
    return sim.trace


def test_same_seed_same_trace() -> None:
    """300 seeds, each run twice: every step, submission, completion and time is the same; and they differ by seed."""
    digests = set()
    for seed in range(300):
        first, second = (traced(seed, lambda sim: counting(sim, locked=True)) for _ in range(2))
        assert first == second, f"seed {seed}"
        assert {"spawn", "step", "submit", "finish"} <= {entry[1] for entry in first}
        digests.add(hashlib.sha256(repr(first).encode()).hexdigest())
    assert len(digests) == 300


def test_same_seed_same_faults() -> None:
    """Injected faults and short transfers are part of the trace, and replay too."""
    kinds: set[object] = set()
    for seed in range(60):
        first, second = traced(seed, faulty), traced(seed, faulty)
        assert first == second, f"seed {seed}"
        kinds |= {entry[1] for entry in first}
    assert {"fault", "short", "finish"} <= kinds


# --- finding what is broken ---------------------------------------------------------------------------


def test_the_lock_holds_under_every_seed() -> None:
    """Several tasks under a RangeLock lose no addition under 300 seeds."""
    assert run_seeds(range(300), lambda sim: counting(sim, locked=True)) == 300


@pytest.mark.parametrize("scenario", [lambda sim: counting(sim, locked=False), in_order], ids=["no lock", "in order"])
def test_broken_scenarios_fail_under_some_seed(scenario: Any) -> None:
    """A task that skips the lock, or that believes in order, is found out, and the seed that is named fails again."""
    with pytest.raises(AssertionError, match=r"Simulation\(\d+\) failed") as caught:
        run_seeds(range(300), scenario)
    found = re.search(r"Simulation\((\d+)\)", str(caught.value))
    assert found is not None
    with pytest.raises(AssertionError) as again, Simulation(int(found[1])) as sim:
        sim.run(scenario(sim))
    assert any(f"Simulation({found[1]})" in note for note in again.value.__notes__)


def test_a_lock_left_held_is_a_stall() -> None:
    """F01: a task that waits for what nobody gives back is named, instead of a hang."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        device = sim.device(SECTOR)
        lock = RangeLock()

        async def keeper() -> None:
            await lock.hold(0, 10)
            await read(device, 0, SECTOR)

        async def main() -> None:
            await sleep_ns(100)
            await lock.hold(5, 1)

        sim.spawn(keeper(), "keeper")
        return main()

    with pytest.raises(AssertionError, match=r"Stalled.*main") as caught:
        run_seeds(range(1), scenario)
    assert isinstance(caught.value.__cause__, Stalled)


def test_a_lost_completion_is_a_stall() -> None:
    """A bio that never comes back (power cut) leaves its task waiting, which is said."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        device = VolatileCache(sim.device(8 * SECTOR, add=False))
        sim.scheduler.add_device(device)

        async def main() -> None:
            reader = sim.spawn(read(device, 0, SECTOR), "reader")
            await sleep_ns(500)  # less than any latency
            device.power_cut(sim.rng, in_flight="lost")
            await wait(reader.ended)

        return main()

    with pytest.raises(AssertionError, match=r"Stalled.*reader"):
        run_seeds(range(1), scenario)


def test_an_endless_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that go round for ever are stopped after very many rounds."""
    monkeypatch.setattr("odirect.testing.sim.MOST_ROUNDS", 100)

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        async def main() -> None:
            while True:
                await sleep_ns(10)

        return main()

    with pytest.raises(AssertionError, match="no end after 100"):
        run_seeds([5], scenario)


def test_an_error_in_a_task_that_nobody_awaits() -> None:
    """What a spawned task raises is the run's error."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        async def failing() -> None:
            await yield_now()
            raise LookupError("nobody looks here")

        async def main() -> None:
            sim.spawn(failing())
            await sleep_ns(10)

        return main()

    with pytest.raises(AssertionError, match="nobody looks here"):
        run_seeds(range(1), scenario)


# --- exhaustive -----------------------------------------------------------------------------------------


def test_explore_finds_every_order() -> None:
    """Three writes in flight together end in each of their 6 orders, and the exploration is complete."""
    orders = set()

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        device = sim.device(4 * SECTOR)
        order: list[int] = []

        async def one(number: int) -> None:
            await write(device, number * SECTOR, b"x" * SECTOR)
            order.append(number)

        async def main() -> None:
            await gather(*(sim.spawn(one(number)) for number in range(3)))
            orders.add(tuple(order))

        return main()

    explored = explore(scenario, 10_000)
    assert explored.complete and explored.runs >= 6
    assert orders == set(itertools.permutations(range(3)))


def test_explore_proves_a_small_lock() -> None:
    """Two tasks adding to one counter under the lock: right in every interleaving that there is."""

    def scenario(sim: Simulation, locked: bool = True) -> Coroutine[Any, Any, None]:
        device = sim.device(SECTOR)
        lock = RangeLock()

        async def add() -> None:
            held = await lock.hold(0, SECTOR) if locked else None
            old = await read(device, 0, SECTOR)
            await write(device, 0, bytes(byte + 1 for byte in old))
            if held is not None:
                held.release()

        async def main() -> None:
            await gather(sim.spawn(add()), sim.spawn(add()))
            assert (await read(device, 0, SECTOR))[0] == 2

        return main()

    assert explore(scenario, 10_000).complete
    with pytest.raises(AssertionError, match=r"replay\(\[[\d, ]*\], scenario\) failed") as caught:
        explore(lambda sim: scenario(sim, False), 10_000)
    script = [int(number) for number in re.findall(r"\d+", str(caught.value).split("]")[0])]
    with pytest.raises(AssertionError, match="failed"):
        replay(script, lambda sim: scenario(sim, False))


def test_explore_finds_the_one_bad_order() -> None:
    """A scenario that breaks in one order of many is found; a budget that is too small is said to be."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        device = sim.device(8 * SECTOR)
        order: list[int] = []

        async def one(number: int) -> None:
            await write(device, number * SECTOR, b"x" * SECTOR)
            order.append(number)

        async def main() -> None:
            await gather(*(sim.spawn(one(number)) for number in range(4)))
            assert order != [3, 1, 2, 0]

        return main()

    assert explore(scenario, 3) == (3, False)
    with pytest.raises(AssertionError, match="failed"):
        explore(scenario, 10_000)


def test_explore_tries_faults_both_ways() -> None:
    """With a fault that may happen, both that it does and that it does not are tried."""
    errors = set()

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        device = sim.device(4 * SECTOR, faults=SimFaults(write_error=0.01, errno=errno.ENOSPC))

        async def main() -> None:
            bio = await write(device, 0, b"x" * 4 * SECTOR)
            check(await do(device, Bio(READ, 0, (memory := empty(4 * SECTOR),), 4 * SECTOR)))
            errors.add((bio.error, bytes(memory[::SECTOR])))

        return main()

    assert explore(scenario, 1000).complete
    whole, parts = b"xxxx", {b"\0\0\0\0", b"x\0\0\0", b"xx\0\0", b"xxx\0", b"xxxx"}
    assert errors == {(0, whole)} | {(errno.ENOSPC, part) for part in parts}


def test_alarms_are_explored_too() -> None:
    """A timeout may ring before or after any completion."""
    orders = set()

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        device = sim.device(SECTOR)
        order: list[str] = []

        async def io() -> None:
            await read(device, 0, SECTOR)
            order.append("io")

        async def alarm() -> None:
            await sleep_ns(50)
            order.append("alarm")

        async def main() -> None:
            await gather(sim.spawn(io()), sim.spawn(alarm()))
            orders.add(tuple(order))

        return main()

    assert explore(scenario, 1000).complete
    assert orders == {("io", "alarm"), ("alarm", "io")}


def test_a_scenario_that_depends_on_more_than_the_choices() -> None:
    """It is said when a scenario does something else the second time."""
    runs: list[int] = []

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        runs.append(1)
        width = 3 if len(runs) == 1 else 1

        async def main() -> None:
            await gather(*(sim.spawn(yield_now()) for _ in range(width)))

        return main()

    with pytest.raises(AssertionError, match="depends on more"):
        explore(scenario, 100)
    with pytest.raises(AssertionError, match="depends on more"):
        replay([7], lambda sim: counting(sim, locked=True))


def test_a_cancelled_task_is_no_failure() -> None:
    """A task that was cancelled has ended; the run goes on without it."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        lock = RangeLock()

        async def waiter() -> None:
            await lock.hold(0, 1)

        async def main() -> None:
            held = await lock.hold(0, 1)
            task = sim.spawn(waiter())
            await sleep_ns(10)
            task.cancel()
            await wait(task.ended)
            held.release()
            assert lock.idle

        return main()

    assert run_seeds(range(10), scenario) == 10


# --- filters in a simulation -------------------------------------------------------------------------------


def test_power_cut_in_a_simulation() -> None:
    """F40: what was written with FUA, or flushed, is there after a power cut at any time, under 200 seeds."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        lower = sim.device(64 * SECTOR, add=False, name="disk")
        device = VolatileCache(lower)
        sim.scheduler.add_device(device)
        durable: dict[int, set[int]] = {place: {0} for place in range(64)}

        async def writer(first: int) -> None:
            for number in range(1, 20):
                place = first + sim.rng.randrange(8)
                flags = FUA if sim.rng.random() < 0.3 else 0
                durable[place] = durable[place] | {number}
                bio = await write(device, place * SECTOR, bytes([number]) * SECTOR, flags)
                if bio.error:
                    return
                if flags:
                    durable[place] = {number}
                elif sim.rng.random() < 0.2:
                    flush = await do(device, Bio(FLUSH, 0))
                    if flush.error:
                        return
                    durable[place] = {number}
                if sim.rng.random() < 0.3:
                    await sleep_ns(sim.rng.randrange(200_000))

        async def cutter() -> None:
            await sleep_ns(sim.rng.randrange(20_000_000))
            device.power_cut(sim.rng)

        async def main() -> None:
            tasks = [sim.spawn(writer(first), f"writer-{first}") for first in range(0, 64, 8)]
            await gather(sim.spawn(cutter(), "cutter"), *tasks)
            device.reopen()
            data = await read(device, 0, 64 * SECTOR)
            for place, allowed in durable.items():
                found = set(data[place * SECTOR : (place + 1) * SECTOR])
                assert len(found) == 1 and found <= allowed, (place, found, allowed)

        return main()

    assert run_seeds(range(200), scenario) == 200


def test_power_cut_without_fua_is_found() -> None:
    """F40: the same belief in a write that was only acknowledged fails under some seed."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        device = VolatileCache(sim.device(SECTOR, add=False))
        sim.scheduler.add_device(device)

        async def main() -> None:
            check(await write(device, 0, b"x" * SECTOR))
            device.power_cut(sim.rng)
            device.reopen()
            assert await read(device, 0, SECTOR) == b"x" * SECTOR

        return main()

    with pytest.raises(AssertionError, match="failed"):
        run_seeds(range(100), scenario)


@pytest.mark.parametrize("seed", range(20))
def test_stacks_run_to_the_end(seed: int) -> None:
    """Filters that work in several steps over a device that answers at once, and delays of virtual time."""
    with Simulation(seed) as sim:
        cache = VolatileCache(Faults(MemoryDevice(16 * SECTOR)))
        slow = Delay(sim.device(16 * SECTOR, add=False), sim.clock, 3_000_000)
        sim.scheduler.add_device(cache)
        sim.scheduler.add_device(slow)

        async def main() -> None:
            for device in (cache, slow):
                for place in range(4):
                    check(await write(device, 2 * place * SECTOR, b"x" * SECTOR))
                check(await do(device, Bio(FLUSH, 0)))
                assert (await read(device, 0, 16 * SECTOR))[::SECTOR] == b"x\0x\0x\0x" + bytes(9)

        sim.run(main())
        assert sim.clock.now_ns() >= 3_000_000
        assert isinstance(cache.lower, Faults)


def test_completions_are_told_in_any_order() -> None:
    """Bios that are finished at once are told in an order that the seed decides."""
    orders = set()
    for seed in range(30):
        with Simulation(seed) as sim:
            device = MemoryDevice(SECTOR)
            sim.scheduler.add_device(device)
            told: list[int] = []

            async def main(device: BlockDevice = device, told: list[int] = told) -> None:
                for number in range(3):
                    bio = Bio(READ, 0, (empty(SECTOR),), SECTOR, end=lambda bio, number=number: told.append(number))  # type: ignore[misc]
                    device.submit(bio)
                await do(device, Bio(FLUSH, 0))
                await yield_now()

            sim.run(main())
            orders.add(tuple(told))
    assert orders == set(itertools.permutations(range(3)))


def test_runs_one_after_another() -> None:
    """A simulation may be run again; its clock goes on."""
    with Simulation(1) as sim:
        device = sim.device(SECTOR)
        sim.run(write(device, 0, b"x" * SECTOR))
        then = sim.clock.now_ns()
        assert sim.run(read(device, 0, SECTOR)) == b"x" * SECTOR
        assert sim.clock.now_ns() >= then > 0


def test_wrong_arguments() -> None:
    """An ordering that there is not is a ValueError; choosers keep to their range."""
    with pytest.raises(ValueError, match="sideways"):
        Simulation(ordering="sideways")
    chooser = RandomChooser(Simulation(1).rng)
    assert {chooser.choose(3) for _ in range(100)} == {0, 1, 2} and chooser.choose(1) == 0
    assert not chooser.chance(0) and chooser.chance(1)
    scripted = ScriptedChooser([1])
    assert (scripted.choose(1), scripted.choose(2), scripted.choose(2)) == (0, 1, 0)
    assert scripted.next_script() == [1, 1]
    assert not scripted.chance(0) and scripted.chance(1)
    assert repr(SimDevice(Simulation(), 0, name="disk")) == "<SimDevice disk>"
