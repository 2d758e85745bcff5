"""Power cuts where ext2 is wider: triple-indirect blocks, blocks of 2 KiB, sectors of 4 KiB, names beside commits.

Files that reach far are folded (`Fold`), so that the model stays small.
What must hold after each is told in `crash_kit`. More seeds:  python -m tests.fs.ext2.crash_kit 0 500 2 wide
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.fs.ext2 import crash_kit
from tests.fs.ext2.crash_kit import WIDE_KINDS, check_crashes, try_seed, wide_workload
from tests.fs.ext2.crash_model import Fold, FoldedImage, Workload, base_image, far_windows, foreign_image
from tests.fs.ext2.test_power_cut import DIRECTORY, SCRIPTS, crash, make, shortened, theirs
from tests.loops import needs_filesystem, needs_loop

from odirect.cache.metacache import FRESH, LATE, TREE, MetaCache
from odirect.fs.ext2 import grow
from odirect.fs.ext2.allocate import Allocator
from odirect.fs.ext2.blockmap import tree_indices

pytestmark = pytest.mark.slow

#: (bytes of a block, of a sector).
SHAPES = [(1024, 512), (2048, 512), (4096, 4096)]
_AT_ONCE = 3


@pytest.fixture(scope="module", autouse=True)
def _told(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{request.module.__name__.rpartition('.')[2]}: {crash_kit.total}")


def edges(work: Workload) -> list[int]:
    """The bytes of contents where the numbers go on in another block: see `far_windows`."""
    block, pointers = work.volume.block_bytes, work.volume.block_bytes // 4
    double = 12 + pointers
    triple = double + pointers**2
    found = [12, double, double + pointers, triple, triple + pointers, triple + pointers**2]
    return [
        start + edge * block - first
        for edge, start, (first, _) in zip(found, work.fold.starts, work.fold.windows, strict=True)
    ]


def reaching(work: Workload) -> None:
    """Appends across every edge, after holes; and over them again."""
    block = work.volume.block_bytes
    one, two = make(work, b"one"), make(work, b"two")
    for number, edge in enumerate(edges(work)):
        work.run(work.truncate(one, edge - 2 * block))
        for turn in range(4):
            durable = turn == number % 4
            work.run(work.write(one, None, work.data(block + 100 * turn), durable=durable))
        if number % 2:
            work.run(work.fsync(one))
    for edge in reversed(edges(work)):
        work.run(work.write(two, edge - block, work.data(2 * block), durable=edge % 3 == 0))
    work.run(work.sync())
    for edge in edges(work):
        work.run(work.write(one, edge - 700, work.data(1400)))


def waiting_far_out(work: Workload) -> None:
    """The same through the cache, with handles that stay open, and syncs of one file and of all."""
    block = work.volume.block_bytes
    one, two = make(work, b"one"), make(work, b"two")
    work.run(work.open(one))
    work.run(work.open(two))
    for number, edge in enumerate(reversed(edges(work))):
        work.run(work.write(one, edge - block - 17, work.data(2 * block + 40), access="buffered"))
        work.run(work.write(two, edge, work.data(block), access="buffered"))
        if number % 2:
            work.run(work.beside_a_sync(work.fsync(one)))
    work.run(work.truncate(one, edges(work)[3] + 300))
    work.run(work.fsync(two))
    work.run(work.truncate(two, edges(work)[1]))
    work.run(work.close(two))
    work.run(work.sync())
    work.run(work.close(one))


def cut_back(work: Workload) -> None:
    """Truncated edge by edge, with what was freed in use by another file at once, with and without a sync before."""
    block = work.volume.block_bytes
    one, two = make(work, b"one"), make(work, b"two")
    for edge in edges(work):
        work.run(work.write(one, edge - 2 * block, work.data(4 * block)))
    work.run(work.sync())
    for number, edge in enumerate(reversed(edges(work))):
        size = edge + (0, block, -block, 300)[number % 4]
        if number % 2:
            work.run(work.beside_a_sync(work.truncate(one, size)))
        else:
            work.run(work.truncate(one, size))
        work.run(work.write(two, edge - block, work.data(3 * block)))
        if number % 3 == 1:
            work.run(work.sync())
    work.run(work.truncate(two, 0))
    work.run(work.write(one, edges(work)[-1], work.data(block), durable=True))


def punched(work: Workload) -> None:
    """Holes from inside one level to inside another, filled again; indirect blocks that nothing is left in."""
    block = work.volume.block_bytes
    one, two = make(work, b"one"), make(work, b"two")
    places = edges(work)
    for edge in places:
        work.run(work.write(one, edge - 3 * block, work.data(6 * block)))
    work.run(work.fsync(one))
    for low, high in ((3, 4), (1, 2), (0, 3), (4, 5), (0, 5)):
        begin, end = places[low] - 2 * block + 100, places[high] + block - 100
        work.run(work.beside_a_sync(work.punch(one, begin, end - begin)))
        work.run(work.write(two, places[high], work.data(4 * block)))
        work.run(work.write(one, places[high] - block, work.data(block + 5), durable=low == 0))
    work.run(work.sync())
    work.run(work.punch(two, 0, len(two.content)))
    work.run(work.write(one, places[3] - 2 * block, work.data(4 * block)))
    work.run(work.unlink(work.root, b"two"))
    work.run(work.write(one, places[1] - 2 * block, work.data(4 * block)))


def linked_beside_commits(work: Workload) -> None:
    """Renames over files that have other names, across directories, while a commit is under way."""
    left, right = make(work, b"left", DIRECTORY), make(work, b"right", DIRECTORY)
    for number in range(3):
        one, two = make(work, b"one", parent=left), make(work, b"two", parent=right)
        work.run(work.write(one, 0, work.data(700)))
        work.run(work.beside_a_sync(work.link(one, right, b"also%d" % number)))
        work.run(work.beside_a_sync(work.rename(left, b"one", right, b"two")))
        assert two.gone is not None
        work.run(work.beside_a_sync(work.rename(right, b"two", right, b"also%d" % number)))
        work.run(work.beside_a_sync(work.link(one, left, b"kept")))
        work.run(work.link(one, left, b"spare"))
        other = make(work, b"other", parent=right)
        work.run(work.beside_a_sync(work.rename(right, b"other", left, b"kept")))
        work.run(work.beside_a_sync(work.link(other, right, b"kept")))
        work.run(work.rename(left, b"spare", right, b"kept"))
        work.run(work.beside_a_sync(work.unlink(left, b"kept")))
        inner = make(work, b"inner", DIRECTORY, left if number % 2 else right)
        work.run(work.beside_a_sync(work.rename(left if number % 2 else right, b"inner", work.root, b"inner")))
        work.run(work.link(one, inner, b"last"))
        work.run(work.beside_a_sync(work.rename(right, b"kept", inner, b"last")))
        work.run(work.beside_a_sync(work.unlink(inner, b"last")))
        work.run(work.unlink(right, b"kept"))
        work.run(work.unlink(right, b"two"))
        work.run(work.unlink(work.root, b"inner"))


FAR = [reaching, waiting_far_out, cut_back, punched]


def crash_far(script: Callable[[Workload], None], block_bytes: int, sector: int = 512, *, ways: int = 2) -> int:
    image = base_image(3 << 20, block_bytes, "-N", "64")
    return crash(script, image, sector=sector, fold=Fold(far_windows(block_bytes)), ways=ways)


@pytest.mark.parametrize(("block_bytes", "sector"), SHAPES)
@pytest.mark.parametrize("script", FAR, ids=lambda script: script.__name__)
def test_far_out(script: Callable[[Workload], None], block_bytes: int, sector: int) -> None:
    """F11, F40: files that are reached through two and three levels of indirect blocks."""
    assert crash_far(script, block_bytes, sector) > 100


@pytest.mark.parametrize(("block_bytes", "sector"), SHAPES[1:])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripted(script: Callable[[Workload], None], block_bytes: int, sector: int) -> None:
    """F11, F40: what is done to blocks of 1 and 4 KiB elsewhere."""
    assert crash(script, base_image(2 << 20, block_bytes, "-N", "256"), sector=sector, ways=3) > 50


@pytest.mark.parametrize(("block_bytes", "sector"), [*SHAPES, (4096, 512)])
def test_names_beside_commits(block_bytes: int, sector: int) -> None:
    """A file keeps a name, and a name leads to a whole file, whatever is moved over it meanwhile."""
    image = base_image(2 << 20, block_bytes, "-N", "256")
    assert crash(linked_beside_commits, image, sector=sector, ways=3) > 300


@pytest.mark.parametrize(("block_bytes", "sector"), SHAPES[1:])
def test_foreign_directories(block_bytes: int, sector: int) -> None:
    """With sectors of 4 KiB, a directory's block is torn nowhere: all of its room is used."""
    for script in (theirs, shortened):
        assert crash(script, foreign_image(3 << 20, block_bytes, "-N", "256"), sector=sector) > 50


@pytest.mark.parametrize("first", range(0, len(WIDE_KINDS), _AT_ONCE))
def test_seeds(first: int) -> None:
    """F11, F30, F40: one of each kind."""
    assert sum(try_seed(seed, steps=30, wide=True) for seed in range(first, first + _AT_ONCE)) > 200


def test_the_kernel_reads_what_is_left_far_out() -> None:
    """What e2fsck leaves of a crash, the kernel's own ext2 reads as we do, through all levels."""
    needs_loop()
    needs_filesystem("ext2")
    before = crash_kit.total.mounts
    for seed in (0, 2):
        check_crashes(wide_workload(seed), ways=2, every=6, mount_every=8)
    assert crash_kit.total.mounts > before


# Deliberately broken: what finds nothing proves nothing.

Breaks = Callable[[pytest.MonkeyPatch], None]


def leaves_beside_pointers(patch: pytest.MonkeyPatch) -> None:
    """New indirect blocks are written with the blocks that lead to them, in any order."""
    patch.setattr(grow, "FRESH", TREE)


def leaves_after_pointers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grow, "FRESH", LATE)


def _of_level(wanted: int, tag: int) -> Breaks:
    """The same, for the lowest indirect block of one level alone."""

    def breaks(patch: pytest.MonkeyPatch) -> None:
        link, create = grow._link, MetaCache.create

        def late(volume: Any, prepared: grow.Prepared, count: int) -> None:
            indices = tree_indices(volume.geometry, prepared.file_block)
            last = volume.allocator.planned.get((prepared.inode.number, *indices[:-1]))
            block = last.block if last is not None and len(indices) == wanted + 1 else 0

            def tagged(self: MetaCache, number: int, chosen: int = FRESH) -> memoryview:
                return create(self, number, tag if number == block else chosen)

            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(MetaCache, "create", tagged)
                link(volume, prepared, count)

        patch.setattr(grow, "_link", late)

    return breaks


def old_numbers_stay(patch: pytest.MonkeyPatch) -> None:
    """A number in an indirect block that stays is taken away with the bitmaps, and its block given out at once."""
    free_run = Allocator.free_run

    def at_once(self: Allocator, block: int, count: int, *, never_used: bool = False) -> None:
        free_run(self, block, count, never_used=True)

    patch.setattr(Allocator, "free_run", at_once)
    patch.setattr(grow, "TREE", LATE)


@pytest.mark.parametrize(
    ("breaks", "script"),
    [
        pytest.param(leaves_beside_pointers, reaching, id="leaves beside pointers"),
        pytest.param(leaves_after_pointers, waiting_far_out, id="leaves after pointers"),
        pytest.param(_of_level(2, TREE), punched, id="double leaves beside pointers"),
        pytest.param(_of_level(3, TREE), punched, id="triple leaves beside pointers"),
        pytest.param(old_numbers_stay, cut_back, id="numbers of freed blocks stay"),
    ],
)
def test_it_is_found(breaks: Breaks, script: Callable[[Workload], None], monkeypatch: pytest.MonkeyPatch) -> None:
    breaks(monkeypatch)
    with pytest.raises(AssertionError, match="crash at"):
        crash_far(script, 1024, ways=8)


def test_smaller_tears_than_sectors_are_found() -> None:
    """A volume that goes by sectors of 4 KiB does not survive a device that tears at 512 bytes."""
    image = foreign_image(3 << 20, 4096, "-N", "256")
    work = Workload(7, image, sector=4096)
    with work.sim:
        theirs(work)
        work.run(work.end())
    check_crashes(work, ways=4)
    work.sector = 512
    with pytest.raises(AssertionError, match="crash at"):
        check_crashes(work, ways=30)


@pytest.mark.parametrize(
    ("block", "size_blocks", "said"), [(0, 101, "never ended there"), (100, 300, "nothing was ever written")]
)
def test_what_lies_between_the_windows_is_found(block: int, size_blocks: int, said: str) -> None:
    """A block, or an end, where no file of a fold ever had one is not passed over."""
    work = Workload(1, base_image(2 << 20, 1024, "-N", "64"))
    with work.sim:
        one = make(work, b"one")
        work.run(work.write(one, block * 1024, b"a" * 1024))
        work.run(work.truncate(one, size_blocks * 1024))
        work.run(work.end())
    windows = [(0, 24 * 1024), (260 * 1024, 400 * 1024)]
    FoldedImage(work.log.replay(), Fold())
    with pytest.raises(AssertionError, match=said):
        FoldedImage(work.log.replay(), Fold(windows))
