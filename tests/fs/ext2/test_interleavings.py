"""One file of an ext2 volume under readers and writers of every kind at once, in every order there is.

Rows: F01, F03, F10, F11, F12, F20, G03, G06, G20. The oracle is told in `interleaving_kit`.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest
from tests.fs.ext2.crash_kit import Fsck
from tests.fs.ext2.interleaving_kit import SECTOR, Do, Setting

from odirect.block.device import BlockDevice
from odirect.block.filters.fault import Faults
from odirect.fs.base import ACCESSES
from odirect.testing.sim import Explored, Simulation, explore, run_seeds
from odirect.testing.sim_device import SimFaults

OLD = b"\x09"


@pytest.fixture(scope="module")
def fsck() -> Iterator[Fsck]:
    with Fsck() as fsck:
        yield fsck


def every_order(
    fsck: Fsck,
    actors: Sequence[tuple[Do, ...]],
    content: bytes = b"",
    *,
    holes: tuple[tuple[int, int], ...] = (),
    block_bytes: int = 1024,
    most: int = 400,
    exact: bool = True,
    cold: bool = False,
) -> Explored:
    """Run the actors side by side in every order, or in the first `most` and as many others.

    e2fsck sees every eighth end.
    """
    runs = itertools.count()

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        setting = Setting(sim, content, holes, block_bytes=block_bytes, cold=cold)

        async def main() -> None:
            await setting.together(*[setting.actor(*actor) for actor in actors])
            setting.judge(None if next(runs) % 8 else fsck, exact=exact)

        return main()

    explored = explore(scenario, most)
    if not explored.complete:
        # The first orders differ in their ends alone; these differ everywhere.
        run_seeds(range(most), scenario)
    return explored


# --- two writers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", OLD * 4096, OLD * 5 * SECTOR], ids=["new", "old", "partly"])
@pytest.mark.parametrize("verb", ["write", "submit write"])
def test_sub_blocks_of_one_block(fsck: Fsck, verb: str, content: bytes) -> None:
    """F10: all pairs of sectors of one block, new or old, or at the file's end; both survive in every order."""
    for one, other in itertools.permutations((0, 1, 4, 7), 2):
        actors = [(Do(verb, one * SECTOR, SECTOR, 1),), (Do("write", other * SECTOR, SECTOR, 2),)]
        assert every_order(fsck, actors, content, block_bytes=4096).complete


@pytest.mark.parametrize("content", [b"", OLD * 2560, OLD * 8192], ids=["new", "partly", "old"])
def test_overlapping_writes(fsck: Fsck, content: bytes) -> None:
    """F10: the end is that of one order, as a whole."""
    ranges = [(0, 1024), (512, 1024), (0, 3072), (2048, 512), (1024, 2048), (3072, 1024)]
    for one, other in itertools.combinations_with_replacement(ranges, 2):
        assert every_order(fsck, [(Do("write", *one, 1),), (Do("write", *other, 2),)], content).complete


@pytest.mark.parametrize("holes", [(), ((1024, 2048),)], ids=["whole", "holes"])
@pytest.mark.parametrize("access", ACCESSES)
def test_every_kind_of_writer_beside_a_direct_one(fsck: Fsck, access: Any, holes: tuple[tuple[int, int], ...]) -> None:
    """F20: parts of blocks through the cache, or bounced, beside direct writes of the rest of them."""
    for verb in ("write", "submit write"):
        for offset, length in ((512, 512), (1100, 100), (900, 1500), (4000, 700)):
            if access == "strict" and (offset % SECTOR or length % SECTOR or holes):
                continue
            for start, count in ((0, 4096), (512, 512), (1536, 512)):
                actors = [(Do(verb, start, count, 1),), (Do("write", offset, length, 2, access),)]
                every_order(fsck, actors, OLD * 4096, holes=holes, exact=False, most=6)


def test_three_appends(fsck: Fsck) -> None:
    """Each has a place of its own, whatever its access."""
    actors = [(Do("write", -1, 512, 1),), (Do("write", -1, 700, 2),), (Do("write", -1, 512, 3, "buffered"),)]
    every_order(fsck, actors, OLD * 512, most=30)


def test_every_order_of_a_few(fsck: Fsck) -> None:
    """F03, F10, F20: what the tests around this one look at in part, in every order there is."""
    buffered = Do("read", 0, 2048, 0, "buffered")
    for actors in (
        [(Do("write", 0, 512, 1),), (Do("write", 600, 700, 2, "buffered"),)],
        [(Do("submit write", 0, 1024, 1),), (buffered, buffered)],
        [(Do("write", 512, 1536, 1),), (Do("truncate", 0, 100),)],
        [(Do("write", 1024, 1024, 1),), (Do("punch", 0, 2048),)],
        [(Do("write", 0, 1024, 1),), (Do("write", 512, 1024, 2),), (Do("read", 0, 2048, 0, "auto"),)],
    ):
        assert every_order(fsck, actors, OLD * 1536, exact=False, most=20_000).complete


# --- readers beside writers ----------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["read buffered", "read auto", "submit read"])
def test_a_reader_beside_a_writer(fsck: Fsck, reader: str) -> None:
    """F03, F20: two reads after each other, beside writes that overwrite, extend, and fill holes."""
    verb, _, access = reader.partition(" ") if reader != "submit read" else (reader, "", "auto")
    for content in (b"", OLD * 512, OLD * 700, OLD * 3072):
        for offset, length, how in ((512, 512, "auto"), (0, 2048, "auto"), (300, 900, "auto"), (600, 600, "buffered")):
            reads = (Do(verb, 0, 3072, 0, access), Do(verb, 0, 3072, 0, access))  # type: ignore[arg-type]
            write = Do("write", offset, length, 1, how)  # type: ignore[arg-type]
            every_order(fsck, [(write,), reads], content, exact=False, most=6)


def test_a_read_after_a_write_is_not_stale(fsck: Fsck) -> None:
    """F20: who wrote direct reads through the cache what he wrote, though others read there meanwhile."""
    buffered = Do("read", 0, 2048, 0, "buffered")
    for verb in ("write", "submit write", "batch write"):
        actors = [(Do(verb, 0, 1024, 1), buffered), (buffered, buffered)]
        every_order(fsck, actors, OLD * 2048, most=25)


# --- truncate and punch --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 1024, 1500, 5000])
def test_truncate_beside_everything(fsck: Fsck, size: int) -> None:
    """G06, F11: what is in flight is waited for, and nothing comes back from behind the end."""
    others = [
        Do("write", 1024, 1024, 1),
        Do("write", 512, 1000, 1),
        Do("write", 1400, 700, 1, "buffered"),
        Do("write", 4096, 512, 1),
        Do("submit write", 1024, 1024, 1),
        Do("read", 0, 4096, 0, "auto"),
        Do("read", 0, 4096, 0, "buffered"),
        Do("submit read", 512, 2048),
        Do("batch write", 512, 1024, 1),
    ]
    for other in others:
        after = Do("truncate", 0, 4096)
        every_order(fsck, [(Do("truncate", 0, size), after), (other,)], OLD * 3000, exact=False, most=6)


@pytest.mark.parametrize("place", [(0, 1024), (500, 2000), (900, 300), (0, 9999)])
def test_punch_beside_everything(fsck: Fsck, place: tuple[int, int]) -> None:
    """G06: as with truncate."""
    others = [
        Do("write", 1024, 1024, 1),
        Do("write", 512, 1000, 1),
        Do("write", 1400, 700, 1, "buffered"),
        Do("submit write", 1024, 1024, 1),
        Do("read", 0, 4096, 0, "auto"),
        Do("read", 0, 4096, 0, "buffered"),
        Do("batch write", 512, 1024, 1),
    ]
    for other in others:
        every_order(fsck, [(Do("punch", *place),), (other,)], OLD * 3000, exact=False, most=6)


@pytest.mark.parametrize("change", [Do("punch", 1024, 7168), Do("truncate", 0, 1024)])
@pytest.mark.parametrize(
    "other", [Do("submit write", 1024, 2048, 1), Do("read", 1024, 2048), Do("write", 1024, 2048, 1)]
)
def test_freed_blocks_are_not_another_write_s_too_soon(fsck: Fsck, change: Do, other: Do) -> None:
    """G06: with no other block free, a block that was freed is soon somebody else's; nothing in flight may reach it."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        setting = Setting(sim, OLD * 8192, full=True, latencies_ns=(1_000, 1_000, 50_000_000))

        async def main() -> None:
            again = (change, Do("sync"), Do("write", 10240, 512, 2), Do("read", 10240, 512))
            await setting.together(setting.actor(other), setting.actor(*again))
            setting.judge(fsck)

        return main()

    run_seeds(range(12), scenario)


# --- everything at once --------------------------------------------------------------------------


def some_operation(dice: random.Random, value: int, reach: int) -> Do:
    """An operation within `reach` bytes, around blocks and sectors."""
    verb = dice.choices(
        ("read", "write", "submit read", "submit write", "truncate", "punch", "sync", "batch write"),
        (5, 6, 2, 3, 2, 2, 1, 1),
    )[0]
    unit = dice.choice((SECTOR, SECTOR, 1024, 1))
    offset = dice.randrange(reach) // unit * unit
    length = max(unit, dice.randrange(1, reach) // unit * unit)
    if verb == "truncate":
        return Do(verb, 0, offset)
    if verb == "batch write":
        return Do(verb, offset // SECTOR * SECTOR, dice.choice((SECTOR, 2 * SECTOR)), value)
    aligned = not (offset % SECTOR or length % SECTOR)
    access: Any = dice.choice(("auto", "buffered", "strict" if aligned and "read" in verb else "auto"))
    if verb == "write" and dice.random() < 0.15:
        offset = -1
    return Do(verb, offset, length, value, access)


def random_scenario(
    fsck: Fsck, faults: SimFaults | None = None, tweak: Callable[[Setting], None] | None = None
) -> Callable[[Simulation], Coroutine[Any, Any, None]]:
    """Three to five actors with up to three operations each, of which at most five change the file."""

    def scenario(sim: Simulation) -> Coroutine[Any, Any, None]:
        dice = sim.rng
        block_bytes = dice.choice((1024, 1024, 2048, 4096))
        reach = dice.choice((block_bytes, 3 * block_bytes, 3 * block_bytes, 14 * block_bytes))
        content = OLD * dice.choice((0, dice.randrange(reach), dice.randrange(1 + reach // 512) * 512, reach))
        holes: tuple[tuple[int, int], ...] = ()
        if dice.random() < 0.4 and len(content) > block_bytes:
            holes = ((dice.randrange(len(content) // block_bytes) * block_bytes, block_bytes),)
        setting = Setting(
            sim, content, holes, block_bytes=block_bytes, faults=faults, cold=dice.random() < 0.4, handles=2
        )
        if dice.random() < 0.2:
            setting.volume.page_cache.limit_bytes = 4 * block_bytes
        actors: list[list[Do]] = [[] for _ in range(dice.randrange(3, 6))]
        changes = 0
        for number in range(dice.randrange(3, 9)):
            operation = some_operation(dice, number + 1, reach)
            changes += operation.changes + (operation.verb == "batch write")
            if changes <= 5:
                dice.choice(actors).append(operation)

        async def main() -> None:
            await setting.together(*[setting.actor(*actor, handle=at % 2) for at, actor in enumerate(actors)])
            setting.judge(fsck)

        return main()

    return scenario


def test_random_actors(fsck: Fsck) -> None:
    """Everything at once, where nothing fails."""
    run_seeds(range(80), random_scenario(fsck))


FAULTS = SimFaults(read_error=0.03, write_error=0.06, short=0.1)


def test_random_actors_on_a_failing_device(fsck: Fsck) -> None:
    """Everything at once, on a device that fails now and then, or does a part: F11, F12, F30, G20."""
    run_seeds(range(80), random_scenario(fsck, FAULTS))


@pytest.mark.slow
def test_many_random_actors(fsck: Fsck) -> None:
    """The same for longer."""
    run_seeds(range(1000, 1800), random_scenario(fsck))
    run_seeds(range(1000, 1600), random_scenario(fsck, FAULTS))


# --- a failure at every step ---------------------------------------------------------------------


class _FailNth(Faults):
    """Fails the bio of one number, counted over all."""

    def __init__(self, lower: BlockDevice, number: int) -> None:
        super().__init__(lower)
        self.fail(nth=number)


AROUND_THE_END = [(offset, length) for offset in (0, 13824, 14336, 14500, 16384) for length in (512, 2048, 700)]


@pytest.mark.parametrize("verb", ["read", "submit read"])
@pytest.mark.parametrize("size", [14336, 14500])
def test_reads_around_the_end_with_a_failure_at_every_bio(fsck: Fsck, verb: str, size: int) -> None:
    """F01, F02, G20: reads that cross, touch and lie past the end, with every look-up and transfer failing in turn."""
    for offset, length in AROUND_THE_END:
        for access in ("auto", "buffered"):
            operation = Do(verb, offset, length, 0, access)  # type: ignore[arg-type]
            _fail_each(fsck, [operation, Do("read", max(0, size - 1000), 2000)], OLD * size)


@pytest.mark.parametrize("verb", ["write", "submit write"])
def test_writes_with_a_failure_at_every_bio(fsck: Fsck, verb: str) -> None:
    """F11, G20: writes over, across and past the end, in holes; nothing leaks, and nobody sees the canary."""
    for offset, length in ((0, 1024), (13824, 2048), (14500, 700), (16384, 512), (12288, 1024), (12000, 3000)):
        for access in ("auto", "buffered"):
            operation = Do(verb, offset, length, 1, access)  # type: ignore[arg-type]
            _fail_each(fsck, [operation, Do("sync"), Do("read", 0, 20000)], OLD * 14500, ((12288, 1024),))


@pytest.mark.parametrize("operation", [Do("truncate", 0, 100), Do("truncate", 0, 20000), Do("punch", 100, 13900)])
def test_truncate_and_punch_with_a_failure_at_every_bio(fsck: Fsck, operation: Do) -> None:
    """G20: as with writes. What a truncate could not free does not come back when the file grows (F11)."""
    _fail_each(fsck, [operation, Do("sync"), Do("read", 0, 20000)], OLD * 14500)
    _fail_each(fsck, [operation, Do("write", 16384, 512, 1), Do("read", 0, 20000)], OLD * 14500)
    _fail_each(fsck, [operation, Do("truncate", 0, 30000), Do("read", 0, 30000)], OLD * 14500)


def _fail_each(fsck: Fsck, operations: list[Do], content: bytes, holes: tuple[tuple[int, int], ...] = ()) -> None:
    """Do the operations, with each of their bios failing in turn, until none is left to fail."""
    for number in range(100):
        found: list[_FailNth] = []

        def over(device: BlockDevice, number: int = number, found: list[_FailNth] = found) -> BlockDevice:
            found.append(_FailNth(device, number))
            return found[0]

        def scenario(
            sim: Simulation, over: Callable[[BlockDevice], BlockDevice] = over, number: int = number
        ) -> Coroutine[Any, Any, None]:
            setting = Setting(sim, content, holes, over=over, cold=True)

            async def main() -> None:
                await setting.together(setting.actor(*operations))
                setting.judge(fsck if number in (0, 3) else None)

            return main()

        run_seeds([number], scenario)
        if not found[0].injected:
            return
    raise AssertionError("there is no end of bios")


def main() -> None:
    """Run seeds from the command line:  python -m tests.fs.ext2.test_interleavings FIRST STOP [faults]"""
    first, stop = int(sys.argv[1]), int(sys.argv[2])
    failed = 0
    with Fsck() as fsck:
        for seed in range(first, stop):
            try:
                run_seeds([seed], random_scenario(fsck, FAULTS if len(sys.argv) > 3 else None))
            except AssertionError as error:
                failed += 1
                print(str(error)[:1500] + "\n", flush=True)
    print(f"{stop - first} seeds, {failed} failed")


if __name__ == "__main__":
    main()
