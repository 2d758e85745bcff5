"""A power cut at every write of scripted workloads on ext2: F11, F40, and what `commit.py` and `entries.py` promise.

What must hold after each is told in `crash_kit`. More of them: python -m tests.fs.ext2.crash_kit 0 500
Blocks of 2 KiB, sectors of 4 KiB and files that reach far: test_power_cut_wide.py.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator

import pytest
from tests.fs.ext2 import crash_kit
from tests.fs.ext2.crash_kit import check_crashes
from tests.fs.ext2.crash_model import Fold, Item, Workload, base_image, foreign_image

pytestmark = pytest.mark.slow

FILE, DIRECTORY, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777


@pytest.fixture(scope="module", autouse=True)
def _told(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{request.module.__name__.rpartition('.')[2]}: {crash_kit.total}")


def make(work: Workload, name: bytes, mode: int = FILE, parent: Item | None = None, *, target: bytes = b"") -> Item:
    item = work.run(work.create(parent or work.root, name, mode, target=target))
    assert item is not None
    return item


def direct(work: Workload) -> None:
    """Extensions, overwrites, appends, parts of blocks and holes, all past the cache."""
    block = work.volume.block_bytes
    one, two = make(work, b"one"), make(work, b"two")
    work.run(work.write(one, 0, work.data(8 * block)))
    work.run(work.fsync(one))
    work.run(work.write(one, 2 * block, work.data(3 * block)))
    work.run(work.write(one, 8 * block, work.data(9 * block), durable=True))
    work.run(work.write(two, 0, work.data(512), durable=True))
    work.run(work.write(two, None, work.data(512)))
    work.run(work.write(two, None, work.data(700)))
    work.run(work.write(two, 6 * block, work.data(block), durable=True))
    work.run(work.write(two, 2 * block, work.data(2 * block), durable=True))
    work.run(work.fsync(two))
    work.run(work.write(two, 512, work.data(512), durable=True))
    work.run(work.write(one, 40 * block + 512, work.data(1024), durable=True))
    work.run(work.sync())
    work.run(work.write(one, 0, work.data(20 * block)))


def buffered(work: Workload) -> None:
    """Through handles that stay open, so that what is written waits in the cache."""
    block = work.volume.block_bytes
    one, two = make(work, b"one"), make(work, b"two")
    work.run(work.open(one))
    work.run(work.open(two))
    work.run(work.write(one, 100, work.data(3 * block), access="buffered"))
    work.run(work.write(two, 9 * block + 17, work.data(2 * block), access="buffered"))
    work.run(work.fsync(two))
    work.run(work.truncate(one, block + 300))
    work.run(work.fsync(one))
    work.run(work.truncate(one, 5 * block))
    work.run(work.write(one, 7 * block + 1, work.data(10), access="buffered"))
    work.run(work.punch(two, 9 * block + 100, block))
    work.run(work.sync())
    work.run(work.write(two, 3, work.data(20), access="buffered", durable=True))
    work.run(work.write(two, 12 * block, work.data(6 * block), access="buffered"))
    work.run(work.unlink(work.root, b"one"))
    work.run(work.write(one, 0, work.data(4 * block), access="buffered"))
    work.run(work.close(two))
    work.run(work.sync())
    work.run(work.close(one))


def shrinking(work: Workload) -> None:
    """Truncates and punches through indirect blocks, and what was freed in use again."""
    block = work.volume.block_bytes
    pointers = block // 4
    one, two = make(work, b"one"), make(work, b"two")
    work.run(work.write(one, 0, work.data(30 * block)))
    far = (12 + pointers + 3) * block
    if far < 1 << 20:
        work.run(work.write(one, far, work.data(4 * block)))
    work.run(work.sync())
    work.run(work.punch(one, 10 * block + 5, 12 * block))
    work.run(work.write(two, 0, work.data(20 * block)))
    work.run(work.fsync(two))
    work.run(work.truncate(one, 13 * block + 700))
    work.run(work.write(two, 20 * block, work.data(30 * block)))
    work.run(work.sync())
    work.run(work.truncate(one, 13 * block))
    work.run(work.truncate(one, 14 * block))
    work.run(work.truncate(two, 0))
    work.run(work.write(two, 5, work.data(40 * block)))
    work.run(work.sync())
    work.run(work.punch(two, 0, 64 * block))
    work.run(work.write(one, 0, work.data(16 * block)))


def names(work: Workload) -> None:
    """Renames within and across directories and over what is there, links, and names used again."""
    left, right = make(work, b"left", DIRECTORY), make(work, b"right", DIRECTORY)
    one, two = make(work, b"one", parent=left), make(work, b"two", parent=right)
    work.run(work.write(one, 0, work.data(2000)))
    work.run(work.write(two, 0, work.data(3000)))
    work.run(work.sync())
    work.run(work.rename(left, b"one", right, b"moved"))
    work.run(work.rename(right, b"two", left, b"one"))
    work.run(work.fsync(one))
    work.run(work.rename(right, b"moved", left, b"one"))
    three = make(work, b"two", parent=right)
    work.run(work.link(three, left, b"three"))
    work.run(work.sync())
    work.run(work.unlink(right, b"two"))
    make(work, b"two", parent=right)
    work.run(work.rename(left, b"three", left, b"x" * 200))
    inner = make(work, b"inner", DIRECTORY, left)
    make(work, b"leaf", parent=inner)
    work.run(work.sync())
    work.run(work.rename(left, b"inner", right, b"inner"))
    empty = make(work, b"empty", DIRECTORY)
    work.run(work.fsync(one))
    work.run(work.rename(right, b"inner", work.root, b"empty"))
    work.run(work.unlink(inner, b"leaf"))
    work.run(work.sync())
    work.run(work.unlink(work.root, b"empty"))
    work.run(work.rename(work.root, b"right", left, b"right"))
    assert empty.gone is not None


def replaced(work: Workload) -> None:
    """A file that is replaced again and again by a new one: its name is always there, and leads to a whole one."""
    one = make(work, b"file")
    work.run(work.write(one, 0, work.data(1500)))
    work.run(work.sync())
    for number in range(8):
        new = make(work, b"new")
        work.run(work.write(new, 0, work.data(900 + 300 * number)))
        if number % 3 == 1:
            work.run(work.fsync(new))
        work.run(work.rename(work.root, b"new", work.root, b"file"))
        if number % 2:
            work.run(work.sync())


def backed_up(work: Workload) -> None:
    """What is replaced has just got another name: it keeps that one."""
    place = make(work, b"place", DIRECTORY)
    one = make(work, b"file")
    work.run(work.write(one, 0, work.data(1500)))
    work.run(work.sync())
    for number in range(6):
        work.run(work.link(work.edges[work.root, b"file"], place, b"old%d" % number))
        new = make(work, b"new")
        work.run(work.write(new, 0, work.data(1000)))
        work.run(work.rename(work.root, b"new", work.root, b"file"))
        work.run(work.sync())


def attributes(work: Workload) -> None:
    """Links of both kinds, modes, and extended attributes set, replaced, removed and gone with their file."""
    one = make(work, b"one")
    make(work, b"short", LINK, target=b"over/there")
    make(work, b"long", LINK, target=b"there/" * 60)
    work.run(work.set_xattr(one, b"user.a", work.data(50)))
    work.run(work.sync())
    work.run(work.set_xattr(one, b"user.a", work.data(60)))
    work.run(work.set_xattr(one, b"user.b", work.data(300)))
    work.run(work.set_mode(one, 0o600, 70000))
    work.run(work.fsync(one))
    work.run(work.set_xattr(one, b"user.a", None))
    work.run(work.unlink(work.root, b"long"))
    work.run(work.sync())
    two = make(work, b"two")
    work.run(work.set_xattr(two, b"user.a", work.data(70)))
    work.run(work.unlink(work.root, b"two"))
    work.run(work.unlink(work.root, b"one"))
    make(work, b"long", LINK, target=b"where/" * 40)
    work.run(work.sync())


def many(work: Workload) -> None:
    """A directory of many blocks: made in bulk, thinned out, filled again."""
    top, other = make(work, b"top", DIRECTORY), make(work, b"other", DIRECTORY)
    files = {b"%03d" % number + b"n" * 100: work.data(number * 13 % 1500) for number in range(60)}
    work.run(work.create_whole(top, files))
    work.run(work.sync())
    for name in list(files)[::3]:
        work.run(work.unlink(top, name))
    for name in list(files)[1:30:3]:
        work.run(work.rename(top, name, other, name + b"m" * 40))
    work.run(work.create_whole(top, {b"new%d" % number: work.data(600) for number in range(20)}))
    work.run(work.sync())
    for name in list(files)[2::3]:
        work.run(work.rename(top, name, top, b"r" + name))
    work.run(work.create_whole(other, {b"more%d" % number: b"" for number in range(10)}))


def theirs(work: Workload) -> None:
    """Directories that were made elsewhere, whose last entry has room over several sectors."""
    known = {name: item for (parent, name), item in work.edges.items() if parent is work.root}
    top, wide = known[b"theirs"], known[b"wide"]
    make(work, b"a" * 30, parent=top)
    make(work, b"b" * 200, parent=wide)
    work.run(work.unlink(top, b"file1"))
    work.run(work.sync())
    make(work, b"c" * 200, parent=top)
    make(work, b"d" * 240, parent=top)
    make(work, b"e" * 200, parent=wide)
    work.run(work.unlink(wide, b"%0200d" % 2))
    work.run(work.sync())
    make(work, b"f" * 180, parent=wide)
    work.run(work.rename(wide, b"%0200d" % 0, top, b"%0200d" % 0))
    make(work, b"g" * 100, DIRECTORY, wide)
    work.run(work.sync())
    for number in range(8):
        make(work, b"%d" % number + b"h" * 150, parent=top)
    work.run(work.sync())


def shortened(work: Workload) -> None:
    """In a directory made elsewhere, the room of each entry in turn is given to a longer one, or to one less long."""
    wide = next(item for (_, name), item in work.edges.items() if name == b"wide")
    for number in range(3):
        work.run(work.unlink(wide, b"%0200d" % number))
        work.run(work.sync())
        make(work, b"%d" % number + b"f" * 180, parent=wide)
        work.run(work.sync())


def handed_over(work: Workload) -> None:
    """Blocks are freed while a commit is on its way, and wanted by another file as soon as it has ended."""
    block = work.volume.block_bytes
    room = work.run(work.volume.space()).available
    files = [make(work, b"one"), make(work, b"two")]
    work.run(work.write(files[0], 0, work.data((room - 10) * block)))
    work.run(work.sync())
    for number in range(6):
        old, new = files[number % 2], files[1 - number % 2]
        work.run(work.set_mode(new, 0o600 + number, number))
        work.run(work.beside_a_sync(work.truncate(old, (room // 2) * block)))
        work.run(work.truncate(old, block))
        work.run(work.write(new, 0, work.data((room - 20) * block)))
        work.run(work.beside_a_sync(work.truncate(old, 0)))


def side_by_side(work: Workload) -> None:
    """Commits while data is on its way and names are made."""
    work.steps(3)
    for _ in range(12):
        work.run(work._together(4))


def in_need(work: Workload) -> None:
    """Nearly full: what one file gives up is wanted by the next before any commit."""
    block = work.volume.block_bytes
    room = work.run(work.volume.space()).available
    big, small = make(work, b"big"), make(work, b"small")
    work.run(work.write(big, 0, work.data((room - 8) * block)))
    work.run(work.sync())
    work.run(work.truncate(big, (room - 40) * block))
    work.run(work.write(small, 0, work.data(30 * block)))
    work.run(work.sync())
    work.run(work.unlink(work.root, b"small"))
    again = make(work, b"small")
    work.run(work.write(again, 0, work.data(34 * block), access="buffered"))
    work.run(work.write(again, 0, work.data(60 * block)))
    work.run(work.punch(big, 0, 20 * block))
    make(work, b"directory", DIRECTORY)
    work.run(work.write(again, 40 * block, work.data(room * block)))
    work.run(work.truncate(big, block))
    work.run(work.write(again, 70 * block, work.data(20 * block), access="buffered"))
    assert work.full


SCRIPTS: list[Callable[[Workload], None]] = [
    direct,
    buffered,
    shrinking,
    names,
    replaced,
    backed_up,
    attributes,
    many,
    side_by_side,
]


def crash(
    script: Callable[[Workload], None],
    image: bytes,
    *,
    tight: bool = False,
    ways: int = 4,
    sector: int = 512,
    fold: Fold | None = None,
) -> int:
    """How many states were looked at. sector: the device's, which a power cut does not tear."""
    work = Workload(7, image, tight=tight, sector=sector, fold=fold)
    with work.sim:
        script(work)
        work.run(work.end())
    return check_crashes(work, ways=ways)


@pytest.mark.parametrize("block_bytes", [1024, 4096])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripted(script: Callable[[Workload], None], block_bytes: int) -> None:
    """F11, F40: at every write, with whatever was not flushed reordered, lost and torn."""
    assert crash(script, base_image(2 << 20, block_bytes, "-N", "256")) > 50


@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_foreign_directories(block_bytes: int) -> None:
    """No entry that is added to them takes another with it when a sector is torn."""
    for script in (theirs, shortened):
        assert crash(script, foreign_image(3 << 20, block_bytes, "-N", "256")) > 50


@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_nearly_full(block_bytes: int) -> None:
    """F30: blocks have a new owner only after the old one has lost them on the disk."""
    image = base_image(160 * block_bytes, block_bytes, "-N", "16", "-m", "0")
    for script in (in_need, handed_over):
        assert crash(script, image, tight=True) > 50
