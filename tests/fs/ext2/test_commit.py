"""Commits: what reaches the device, in which order, and what a power cut at any write leaves."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable

import pytest
from tests.dio.kit import Watch, pump
from tests.fs.ext2.writing_kit import (
    NOW_NS,
    SmallVolume,
    complaint,
    device_of,
    fresh_image,
    populated_image,
    repaired,
    small,
    sound,
    tree,
)

from odirect.base.errors import DeviceError, NoSpaceError, StickySyncError
from odirect.block.bio import FLUSH, READ, WRITE, Op
from odirect.block.filters.fault import Faults
from odirect.block.filters.log_writes import LogWrites
from odirect.block.filters.volatile_cache import VolatileCache
from odirect.fs.ext2.allocate import NeedsCommit
from odirect.fs.ext2.format import ROOT_INODE, SUPERBLOCK
from odirect.sched.scheduler import Scheduler

MIB = 1 << 20
ONE_KIB = ("-b", "1024", "-m", "0")
CANARY = b"\xca\xfe\xba\xbe"


def watched() -> tuple[SmallVolume, Watch]:
    image = fresh_image(2 * MIB, *ONE_KIB)
    device = Watch(device_of(image))
    volume = SmallVolume(device, image)
    device.seen.clear()
    return volume, device


def wrote(device: Watch) -> list[tuple[Op, int]]:
    """What was written and flushed, in order."""
    return [(Op(op), addr) for op, addr, _, _ in device.seen if op != READ]


# The order of writes.


def test_every_phase_is_flushed_before_the_next() -> None:
    """New blocks, inodes, entries, bitmaps: each after a flush."""
    volume, device = watched()
    number = volume.create(ROOT_INODE, b"dir", 0o40755)
    volume.commit()
    device.seen.clear()
    file = volume.create(number, b"file")
    volume.write(file, 0, b"x" * 30_000)
    data = [addr for op, addr in wrote(device) if op is Op.WRITE]
    device.seen.clear()
    volume.commit()
    phases: list[set[int]] = [set()]
    for op, addr, length, _ in device.seen:
        if op == FLUSH:
            phases.append(set())
        elif op == WRITE:
            phases[-1] |= set(range(addr // 1024, (addr + length) // 1024))
    indirect = {block for level, block in volume.blocks_of(file) if level}
    tables = {volume.geometry.inode_place(volume.cache, inode)[0] for inode in (number, file)}
    directory = {block for _, block in volume.blocks_of(number)}
    group = volume.geometry.group_of_block(next(iter(indirect)))
    late = {1, 2, volume.geometry.block_bitmap(group), volume.geometry.inode_bitmap(0)}
    assert phases == [indirect, tables, directory, late, set()]
    assert data


def test_empty_phases_are_not_flushed() -> None:
    """The first flush is always there, for the data; then one for each phase that had something."""
    volume, device = watched()
    volume.commit()
    assert wrote(device) == [(Op.FLUSH, 0)]
    device.seen.clear()
    volume.load(lambda: volume.allocator.change_superblock(mnt_count=7))
    volume.commit()
    assert [op for op, _ in wrote(device)] == [Op.FLUSH, Op.WRITE, Op.FLUSH]


def test_the_superblock_says_when() -> None:
    """wtime is the clock's, in seconds; only where something was written."""
    volume, device = watched()
    volume.create(ROOT_INODE, b"file")
    volume.commit()
    assert volume.allocator.superblock().wtime == NOW_NS // 10**9
    raw = bytes(device.lower.data)[1024:2048]  # type: ignore[attr-defined]
    assert SUPERBLOCK.kind(*SUPERBLOCK.struct.unpack(raw)).wtime == NOW_NS // 10**9
    assert volume.cache.dirty_blocks == 0


def test_those_who_come_meanwhile_share_the_next_commit() -> None:
    """One runs at a time; what was changed before a caller came is in the commit that he waits for."""
    volume, device = watched()
    scheduler = Scheduler()
    scheduler.add_device(device)
    volume.create(ROOT_INODE, b"one")
    device.seen.clear()
    first = [scheduler.spawn(volume.committer.commit()) for _ in range(3)]
    while not device.open:
        scheduler.run_ready()
        scheduler.commit()
    with volume.cache.transaction():
        volume.allocator.change_superblock(mnt_count=9)
    second = [scheduler.spawn(volume.committer.commit()) for _ in range(3)]
    pump(scheduler, *first, *second)
    assert [task.error for task in first + second] == [None] * 6
    assert volume.committer.done == 2
    assert volume.cache.dirty_blocks == 0
    assert [op for op, _ in wrote(device)].count(Op.FLUSH) == 4 + 2


def test_cancelling_a_caller_stops_no_commit() -> None:
    """The others get what they waited for."""
    volume, device = watched()
    scheduler = Scheduler()
    scheduler.add_device(device)
    volume.create(ROOT_INODE, b"one")
    one, two = (scheduler.spawn(volume.committer.commit()) for _ in range(2))
    while not device.open:
        scheduler.run_ready()
        scheduler.commit()
    one.cancel()
    pump(scheduler, one, two)
    assert two.error is None
    assert volume.committer.done == 1
    assert complaint(device.lower.data) == ""  # type: ignore[attr-defined]


def test_a_change_that_asks_for_a_commit_gets_one() -> None:
    """And one that always asks is refused in the end."""
    volume = small(2 * MIB, *ONE_KIB)
    asked = iter([True, True, False])

    def change() -> str:
        if next(asked):
            raise NeedsCommit("please")
        return "done"

    assert volume.change(change) == "done"
    assert volume.committer.done == 2

    def never() -> None:
        raise NeedsCommit("again")

    with pytest.raises(NoSpaceError, match=r"no room after [0-9]+ commits: again"):
        volume.change(never)


# Failures.


def faulty() -> tuple[SmallVolume, Faults]:
    image = fresh_image(2 * MIB, *ONE_KIB)
    device = Faults(device_of(image))
    return SmallVolume(device, image), device


@pytest.mark.parametrize("op", [Op.WRITE, Op.FLUSH])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_commit_that_fails_ends_all_changes(op: Op, nth: int) -> None:
    """F41: the error is the caller's; every later commit says that one has failed, and nothing is written."""
    volume, device = faulty()
    volume.create(ROOT_INODE, b"dir", 0o40755)
    holds = volume.allocator.held_blocks
    seen = itertools.count()
    device.fail(op=op, where=lambda bio: next(seen) == nth)
    with pytest.raises(DeviceError) as caught:
        volume.commit()
    assert not isinstance(caught.value, StickySyncError)
    assert volume.committer.error is caught.value
    dirty = volume.cache.dirty_blocks
    assert dirty
    for _ in range(2):
        with pytest.raises(StickySyncError, match="a commit has failed before"):
            volume.commit()
    with pytest.raises(StickySyncError):
        volume.committer.check()
    assert volume.cache.dirty_blocks == dirty
    assert volume.allocator.held_blocks == holds


def test_everybody_who_waits_learns_of_the_failure() -> None:
    """Those who share it get its error, those of the next one a later one."""
    volume, device = faulty()
    scheduler = Scheduler()
    scheduler.add_device(device)
    volume.create(ROOT_INODE, b"one")
    device.fail(op=Op.WRITE)
    first = [scheduler.spawn(volume.committer.commit()) for _ in range(2)]
    while not device.in_flight:
        scheduler.run_ready()
        scheduler.commit()
    later = scheduler.spawn(volume.committer.commit())
    pump(scheduler, *first, later)
    assert [type(task.error) for task in first] == [DeviceError] * 2
    assert isinstance(later.error, StickySyncError)


def test_what_waited_for_the_commit_may_fail() -> None:
    """A note that cannot be done any more is left to whoever asked for it."""
    volume, _ = faulty()

    def first() -> None:
        raise NoSpaceError("nothing")

    volume.committer.notes.first[(1, 2, 3)] = first
    volume.commit()
    assert volume.committer.notes.first == {}
    assert volume.committer.error is None


# Power cuts.


def content(name: str, blocks: int, block_bytes: int) -> bytes:
    return b"".join(f"{name} {at} ".encode().ljust(block_bytes, b".") for at in range(blocks))


class Script:
    """Files before and after; `before` is committed, `after` is cut at every write."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.block_bytes = 1024 << SUPERBLOCK.kind(*SUPERBLOCK.struct.unpack(image[1024:2048])).log_block_size

    def of(self, name: str, blocks: int) -> bytes:
        return content(name, blocks, self.block_bytes)

    def file(self, volume: SmallVolume, parent: int, name: str, blocks: int) -> int:
        number = volume.create(parent, name.encode())
        volume.write(number, 0, self.of(name, blocks))
        return number

    def before(self, volume: SmallVolume) -> None:
        a, b = volume.mkdir(ROOT_INODE, b"a"), volume.mkdir(ROOT_INODE, b"b")
        volume.mkdir(ROOT_INODE, b"empty")
        for name, blocks in SIZES.items():
            self.file(volume, a, name, blocks)
        for at in range(40):
            volume.create(b, b"filler-%d" % at)
        volume.commit()

    def after(self, volume: SmallVolume) -> None:
        a, b = volume.find(ROOT_INODE, b"a"), volume.find(ROOT_INODE, b"b")
        assert a and b
        size = self.block_bytes

        def number(name: str) -> int:
            found = volume.find(a, name.encode())
            assert found
            volume.load(lambda: volume.inode(found))
            return found

        self.file(volume, a, "new-one", 20)
        volume.rename(a, b"move", b, b"moved")
        volume.rename(a, b"over", a, b"target")
        number("dead")
        volume.unlink(a, b"dead")
        volume.truncate(number("long"), 5 * size)
        volume.write(number("grow"), 12 * size, self.of("grow", 40)[12 * size :])
        volume.punch(number("sparse"), 10, 9)
        volume.mkdir(ROOT_INODE, b"c")
        self.file(volume, volume.find(ROOT_INODE, b"c") or 0, "below", 3)
        self.remove_empty(volume)
        temporary = self.file(volume, a, "temporary", 15)
        assert temporary
        volume.unlink(a, b"temporary")
        self.file(volume, a, "new-two", 30)
        volume.commit()
        self.file(volume, a, "new-three", 30)
        for at in range(0, 40, 3):
            number_of = volume.find(b, b"filler-%d" % at)
            assert number_of
            volume.load(functools.partial(volume.inode, number_of))
            volume.unlink(b, b"filler-%d" % at)
        for at in range(30):
            volume.create(b, b"later-%d-%s" % (at, b"x" * 40))
        volume.commit()

    def remove_empty(self, volume: SmallVolume) -> None:
        number = volume.find(ROOT_INODE, b"empty")
        assert number
        volume.load(lambda: volume.inode(number))
        volume.unlink(ROOT_INODE, b"empty")

    def check(self, after: bytes, said: str) -> None:
        """Nothing that was committed is lost, nothing old is seen, no block has two owners."""
        for word in ("ultiply-claimed", "illegal", "orrupt", "Salvage", "invalid", "bad block"):
            assert word not in said, said
        found = tree(after)
        files = {path.decode(): data for path, data in found.items() if data is not None}
        for path, data in files.items():
            assert CANARY not in data, path
        size = self.block_bytes
        lost = [data for path, data in files.items() if path.startswith("/lost+found/")]
        known = {name: self.of(name, blocks) for name, blocks in SIZES.items()}
        assert files["/a/keep"] == known["keep"]
        assert known["move"] in (files.get("/a/move"), files.get("/b/moved")), said
        assert known["over"] in (files.get("/a/over"), files.get("/a/target")), said
        assert files["/a/target"] in (known["over"], known["target"])
        if "/a/dead" in files:
            assert files["/a/dead"] == known["dead"], said
        assert files["/a/long"] in (known["long"], known["long"][: 5 * size])
        assert files["/a/grow"] in (known["grow"], self.of("grow", 40))
        for at in range(0, SIZES["sparse"] * size, size):
            block = files["/a/sparse"][at : at + size]
            punched = 10 <= at // size < 19
            assert block == known["sparse"][at : at + size] or (punched and not any(block))
        fresh = {"/a/new-one": 20, "/a/new-two": 30, "/a/new-three": 30, "/c/below": 3, "/a/temporary": 15}
        for path, blocks in fresh.items():
            if path in files:
                assert files[path] == self.of(path.rsplit("/")[-1], blocks), path
        for data in lost:
            # What was being removed, or had no name yet.
            assert not data or data in [
                *known.values(),
                *(self.of(path.rsplit("/")[-1], blocks) for path, blocks in fresh.items()),
            ], (data[:40], said)
        for at in range(40):
            assert at % 3 == 0 or f"/b/filler-{at}" in files


SIZES = {"keep": 30, "move": 5, "over": 14, "target": 3, "dead": 30, "long": 40, "grow": 12, "sparse": 30}


def canaried(image: bytes, block_bytes: int) -> bytes:
    """The image with every free block full of canaries."""
    volume = SmallVolume(device_of(image), image)
    data = bytearray(image)
    for group in range(volume.geometry.groups):
        bitmap = volume.load(functools.partial(volume.cache.get, volume.geometry.block_bitmap(group)))
        bits = int.from_bytes(bitmap, "little")
        for index in range(volume.geometry.blocks_in_group(group)):
            if not bits >> index & 1:
                at = (volume.geometry.first_block_of_group(group) + index) * block_bytes
                data[at : at + block_bytes] = CANARY * (block_bytes // 4)
    return bytes(data)


def cut_images(log: LogWrites, rng: random.Random) -> Iterable[tuple[int, bytes]]:
    """(number, image) for a power cut before each record and after the last: any sectors of what was not flushed."""
    for upto in range(len(log.records) + 1):
        unflushed = log.unflushed(upto)
        image = bytearray(log.replay(upto, without=unflushed))
        share = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        for number in unflushed:
            record = log.records[number]
            for at in range(0, record.length, 512):
                if rng.random() < share:
                    image[record.addr + at : record.addr + at + 512] = record.data[at : at + 512]
        yield upto, bytes(image)


def logged(script: Script, change: Callable[[SmallVolume], None]) -> LogWrites:
    """The log of everything that `change` did to a volume that `script.before` was done to."""
    device = device_of(script.image)
    volume = SmallVolume(device, script.image)
    script.before(volume)
    assert not complaint(device.data)
    image = canaried(bytes(device.data), script.block_bytes)
    log = LogWrites(VolatileCache(device_of(image)), base=image)
    again = SmallVolume(log, image)
    change(again)
    assert not complaint(log.replay()), complaint(log.replay())
    return log


@pytest.mark.slow
@pytest.mark.parametrize("options", [ONE_KIB, ("-b", "4096", "-m", "0", "-N", "256")], ids=["1 KiB", "4 KiB"])
def test_a_power_cut_at_every_write(options: tuple[str, ...]) -> None:
    """F11, F43's kind: e2fsck mends what is left with nothing committed lost, nothing old shown, no block shared."""
    script = Script(fresh_image(2 * MIB if options is ONE_KIB else 4 * MIB, *options))
    log = logged(script, script.after)
    assert len(log.records) > 20
    rng = random.Random(f"{options}")
    for upto, image in cut_images(log, rng):
        after, said = repaired(image)
        try:
            script.check(after, said)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"cut before write {upto} of {len(log.records)}: {log.records[upto - 1]}") from error


def test_cuts_find_a_commit_without_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with removals written with the rest, a renamed file is lost, or the like."""
    script = Script(fresh_image(2 * MIB, *ONE_KIB))

    def all_at_once(volume: SmallVolume) -> None:
        taken = volume.cache.snapshot

        def mixed() -> object:
            snapshot = taken()
            together = {block: image for phase in snapshot.phases for block, image in phase}
            snapshot.phases = [[], [], [], sorted(together.items())]
            return snapshot

        monkeypatch.setattr(volume.cache, "snapshot", mixed)
        script.after(volume)

    log = logged(script, all_at_once)
    rng = random.Random(5)
    failures = 0
    for _, image in cut_images(log, rng):
        try:
            script.check(*repaired(image))
        except (AssertionError, KeyError):
            failures += 1
        if failures:
            break
    assert failures


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_power_cuts_in_random_work(seed: int) -> None:
    """Random files with commits between: after any cut, what the last commit had and nobody touched is there."""
    rng = random.Random(seed)
    image = fresh_image(2 * MIB, *ONE_KIB)
    volume = SmallVolume(device_of(image), image)
    filled = canaried(bytes(volume.device.data), 1024)  # type: ignore[attr-defined]
    log = LogWrites(VolatileCache(device_of(filled)), base=filled)
    volume = SmallVolume(log, filled)
    directories = [ROOT_INODE, volume.mkdir(ROOT_INODE, b"one"), volume.mkdir(ROOT_INODE, b"two")]
    prefix = {ROOT_INODE: b"", directories[1]: b"/one", directories[2]: b"/two"}
    now: dict[tuple[int, bytes], bytes] = {}
    #: (records when the commit was done, everything there was); and who was touched since.
    points: list[tuple[int, dict[tuple[int, bytes], bytes], set[bytes]]] = []
    touched: set[bytes] = set()

    def point() -> None:
        nonlocal touched
        volume.commit()
        touched = set()
        points.append((len(log.records), dict(now), touched))

    point()
    for step in range(60):
        what = rng.choice(("make", "make", "make", "unlink", "rename", "cut", "commit"))
        if what == "commit":
            point()
        elif what == "make":
            key = rng.choice(directories), b"%d" % step + b"-name" * rng.randrange(20)
            text = content(f"{step}", rng.randrange(1, 40), 1024)
            number = volume.create(*key)
            volume.write(number, 0, text)
            now[key] = text
        elif now:
            key = rng.choice(sorted(now))
            touched.add(now[key])
            number = volume.find(*key) or 0
            volume.load(functools.partial(volume.inode, number))
            if what == "unlink":
                volume.unlink(*key)
                del now[key]
            elif what == "cut":
                size = 1024 * rng.randrange(len(now[key]) // 1024 + 1)
                volume.truncate(number, size)
                now[key] = now[key][:size]
            else:
                other = rng.choice([(rng.choice(directories), b"renamed-%d" % step), rng.choice(sorted(now))])
                if other != key:
                    touched.add(now.get(other, b""))
                    over = volume.find(*other)
                    if over:
                        volume.load(functools.partial(volume.inode, over))
                    volume.rename(*key, *other)
                    now[other] = now.pop(key)
    point()
    ends = [*(end for end, _, _ in points[1:]), 1 << 60]
    for upto, cut in list(cut_images(log, rng))[:: 1 + len(log.records) // 25]:
        after, said = repaired(cut)
        for word in ("ultiply-claimed", "illegal", "orrupt", "Salvage", "invalid"):
            assert word not in said, (upto, said)
        found = tree(after)
        assert not any(CANARY in data for data in found.values() if data), upto
        committed = [at for at, (end, _, _) in enumerate(points) if end <= upto]
        if not committed:
            continue
        _, there, since = points[committed[-1]]
        assert upto <= ends[committed[-1]]
        for (parent, name), data in there.items():
            if data not in since:
                assert found.get(prefix[parent] + b"/" + name) == data, (upto, name, said)


@pytest.mark.slow
def test_a_power_cut_while_room_is_cut_into_sectors() -> None:
    """A directory that mke2fs made: heads are written unseen and linked later, and no cut harms a name."""
    image = populated_image(60, "-b", "4096", "-N", "256")
    log = LogWrites(VolatileCache(device_of(image)), base=image)
    volume = SmallVolume(log, image)
    number = volume.find(ROOT_INODE, b"theirs") or 0
    theirs = set(volume.names(number))
    points = [(0, theirs)]
    for step in range(4):
        for at in range(12):
            volume.create(number, b"ours-%d-%d" % (step, at) + b"-long" * (at % 3 * 8))
        volume.commit()
        points.append((len(log.records), set(volume.names(number))))
    assert volume.committer.done > 4  # Some commits came of cutting.
    rng = random.Random(3)
    for upto, cut in cut_images(log, rng):
        after, said = repaired(cut)
        for word in ("ultiply-claimed", "illegal", "orrupt", "Salvage", "invalid"):
            assert word not in said, (upto, said)
        names = {path.rsplit(b"/")[-1] for path in tree(after) if path.startswith(b"/theirs/")}
        committed = max((point for point in points if point[0] <= upto), key=lambda point: point[0])[1]
        assert committed <= names <= points[-1][1], (upto, said)


def test_nothing_of_a_failed_commit_is_forgotten() -> None:
    """The blocks are dirty still, with what they held back, though nobody may write them."""
    volume, device = faulty()
    volume.create(ROOT_INODE, b"file")
    volume.commit()
    volume.unlink(ROOT_INODE, b"file")
    device.fail(op=Op.WRITE)
    with pytest.raises(DeviceError):
        volume.commit()
    (block,) = {block for level, block in volume.blocks_of(ROOT_INODE) if not level}
    with pytest.raises(StickySyncError):  # The name is on the disk still, and no commit will change that.
        volume.create(ROOT_INODE, b"file")
    assert volume.cache.peek(block) is not None
    assert volume.cache.dirty_blocks


def test_a_commit_of_a_volume_of_many_groups() -> None:
    """Descriptors in several blocks, several bitmaps: all there afterwards."""
    volume = small(12 * MIB, "-b", "1024", "-g", "256", "-m", "0", "-O", "^resize_inode")
    assert len(volume.geometry.descriptor_blocks) == 2
    for at in range(20):
        directory = volume.mkdir(ROOT_INODE, b"dir-%d" % at)
        volume.write(volume.create(directory, b"file"), 0, content(f"{at}", 30, 1024))
    sound(volume)
    found = tree(bytes(volume.device.data))  # type: ignore[attr-defined]
    assert [found[b"/dir-%d/file" % at] for at in range(20)] == [content(f"{at}", 30, 1024) for at in range(20)]
