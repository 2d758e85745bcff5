"""Power cuts of an ext2 volume: the states that a crash can leave, and what must hold in each of them.

A crash at log position k has all that was durable by then, and of the rest any part: whole writes, none
of them, or some of their 512-byte sectors. e2fsck -fy may then complain of counts, bitmaps, times of
deletion and inodes without names, and of nothing else. In what it leaves, read by `RawImage`:

    names      what was synced and not changed since is there; a name that was always taken is taken, by one
               of those that had it; what was moved has one of its names; no name that never was
    contents   what was synced and not changed since; else every byte is one that the file had there
    inodes     mode, owner, attributes and links' targets: one of those since the last commit
    secrets    free space was filled with a canary before: it is nowhere, ends of last blocks included

Run by itself it tries many seeds:  python -m tests.fs.ext2.crash_kit 0 500
and of the kinds in WIDE_KINDS:     python -m tests.fs.ext2.crash_kit 0 500 2 wide
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy
from tests.fs.ext2.crash_model import (
    CANARY,
    LOST,
    Fact,
    Fold,
    FoldedImage,
    Item,
    Key,
    Workload,
    base_image,
    far_windows,
    foreign_image,
)
from tests.fs.ext2.raw_image import RawImage, Record
from tests.loops import loop_device, mounted, needs_tool

from odirect.block.bio import FUA, PREFLUSH, Op
from odirect.block.filters.log_writes import Record as Written
from odirect.fs.ext2 import volume

SECTOR = 512

# What e2fsck may say of a volume that lost power.
_EXPECTED = [
    re.compile(pattern)
    for pattern in (
        r"^e2fsck \d",
        r"^image",
        r"^/.*: (\d+/\d+ files|\*+ FILE SYSTEM WAS MODIFIED)",
        r"was not cleanly unmounted",
        r"^Pass \d",
        r"^(Deleted inode|Inode) \d+ (has zero dtime|\(.*\) has zero dtime)\. ",
        r"^Unattached (zero-length )?inode \d+",
        r"^Unconnected directory inode \d+",
        r"^Connect to /lost\+found\?|^Clear\?|^Fix\?|^/lost\+found not found",
        r"^Inode \d+ ref count is \d+, should be \d+\.",
        r"^Inode \d+, i_(blocks|size) is \d+, should be \d+\.",
        r"^(Block|Inode) bitmap differences:|^ [-+(]|^Fix\? yes",
        r"^(Free|Directories) (blocks|inodes)? ?count wrong|^Directories count wrong",
        r"^Entry '.*' in .* has deleted/unused inode",
        r"^Entry '.*' in .* is a link to directory",
        r"^'\.\.' in .* is .*, should be ",
        r"^$",
    )
]


class Checked(NamedTuple):
    """An image after e2fsck: what is in it, and what was said."""

    raw: RawImage
    said: str


class Fsck:
    """e2fsck -fy on one file in memory, again and again."""

    def __init__(self, fold: Fold | None = None) -> None:
        self.fold = fold or Fold()
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/var/tmp"
        self.place = Path(tempfile.mkdtemp(prefix="odirect-crash-", dir=base))
        self.tool = needs_tool("e2fsck")
        self.image = self.place / "image"
        self._out = self.place / "said"
        self.runs = 0

    def __enter__(self) -> Fsck:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def run(self, how: str) -> tuple[int, str]:
        """(status, what it said). By posix_spawn: it is a tenth of the time of a fork."""
        out = (os.POSIX_SPAWN_OPEN, 1, str(self._out), os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        actions = [out, (os.POSIX_SPAWN_DUP2, 1, 2)]
        self.runs += 1
        child = os.posix_spawn(self.tool, ["e2fsck", how, str(self.image)], {}, file_actions=actions)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, self._out.read_text(errors="replace")

    def __call__(self, image: bytes | bytearray, *, twice: bool) -> Checked:
        """The image after -fy. twice: a second look must find nothing."""
        self.image.write_bytes(image)
        status, said = self.run("-fy")
        assert status in (0, 1), said
        for line in said.splitlines():
            if not any(pattern.search(line) for pattern in _EXPECTED):
                raise AssertionError(f"e2fsck says what no power cut explains: {line!r}\n{said}")
        if twice:
            status, again = self.run("-fn")
            assert not status, f"{said}\nand then\n{again}"
        return Checked(FoldedImage(self.image.read_bytes(), self.fold), said)


class Crashes:
    """The images that crashes of a workload leave, position by position."""

    def __init__(self, workload: Workload, dice: random.Random, *, sector: int = SECTOR) -> None:
        self._log = workload.log
        self._records = workload.log.records
        self._dice = dice
        self._sector = sector
        self._stable = bytearray(workload.log.base)
        self._applied = 0
        self._flushed = 0
        self._flushes = [record for record in self._records if _flushes(record)]

    def at(self, position: int, ways: int) -> Iterator[bytearray]:
        """`ways` images of a crash at `position`, which may not go back. The first: nothing but what is durable."""
        while self._flushes and self._flushes[0].sequence < position:
            finished = self._flushes[0].finished
            if finished is None or finished > position:
                break
            self._flushed = self._flushes.pop(0).sequence
        while self._applied < position and self._is_durable(self._records[self._applied], position):
            _apply(self._stable, self._records[self._applied])
            self._applied += 1
        rest = self._records[self._applied : position]
        loose = [record for record in rest if not self._is_durable(record, position)]
        if not any(record.op is not Op.FLUSH for record in loose):
            ways = 1
        for way in range(ways):
            yield self._image(rest, {record.sequence for record in loose}, way)

    def _is_durable(self, record: Written, position: int) -> bool:
        if record.error or record.op is Op.FLUSH:
            return True
        if record.finished is None:
            return False
        return record.finished <= self._flushed or bool(record.flags & FUA and record.finished <= position)

    def _image(self, rest: list[Written], loose: set[int], way: int) -> bytearray:
        image = bytearray(self._stable)
        dice = self._dice
        # All but one, one alone, the last few, each by chance, torn.
        style = "none" if not way else dice.choice(("all", "but one", "one", "chance", "chance", "torn", "torn"))
        special = dice.choice(sorted(loose)) if loose else -1
        for record in rest:
            if record.op is Op.FLUSH or record.error:
                continue
            torn = False
            if record.sequence in loose:
                keep = {
                    "none": False,
                    "all": True,
                    "but one": record.sequence != special,
                    "one": record.sequence == special,
                    "chance": dice.random() < 0.5,
                    "torn": dice.random() < 0.7,
                }[style]
                if not keep:
                    continue
                torn = style == "torn" and dice.random() < 0.7
            _apply(image, record, self._sector if torn else 0, dice)
        return image


def _flushes(record: Written) -> bool:
    return bool(record.op is Op.FLUSH or record.flags & PREFLUSH) and not record.error


def _apply(image: bytearray, record: Written, sector: int = 0, dice: random.Random | None = None) -> None:
    if record.op is Op.FLUSH or record.error:
        return
    data = record.data if record.op is Op.WRITE else bytes(record.length)
    if not sector or dice is None:
        image[record.addr : record.addr + len(data)] = data
        return
    for at in range(0, len(data), sector):
        if dice.random() < 0.5:
            part = data[at : at + sector]
            image[record.addr + at : record.addr + at + len(part)] = part


class Oracle:
    """What must hold in the image of a crash of one workload."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def check(self, position: int, checked: Checked) -> None:
        """AssertionError unless everything that holds at `position` holds."""
        raw, said = checked
        try:
            fact = max((fact for fact in self.workload.facts if fact.position <= position), key=lambda f: f.position)
            values, names = self._names(fact, position)
            self._check_names(fact, values, names, raw, said)
            items = self._alive(fact, position)
            for number, record in raw.records.items():
                self._check_secret(number, record)
                if number not in (2, LOST):
                    # A number in an indirect block may come before the size: then e2fsck has it be whole blocks.
                    block_bytes = raw.block_bytes if f"Inode {number}, i_size is" in said else 1
                    self._check_record(fact, number, record, items.get(number, []), position, block_bytes)
            self._check_claims(raw, position)
        except AssertionError as error:
            raise AssertionError(f"seed {self.workload.seed}, crash at {position}: {error}\n{said}") from None

    def _names(
        self, fact: Fact, position: int
    ) -> tuple[dict[Key, list[Item | None]], dict[Item, tuple[set[Key], bool]]]:
        """What each name has led to since the fact; for each item its names since, and whether it always had one."""
        values: dict[Key, list[Item | None]] = {key: [item] for key, item in fact.capture.edges.items()}
        names: dict[Item, set[Key]] = {}
        now: dict[Item, set[Key]] = {}
        always: dict[Item, bool] = {}
        for key, item in fact.capture.edges.items():
            names.setdefault(item, set()).add(key)
            now.setdefault(item, set()).add(key)
            always[item] = True
        present = dict(fact.capture.edges)
        for began, key, after in self.workload.changes[fact.capture.logged :]:
            if began >= position:
                break
            values.setdefault(key, [None]).append(after)
            before = present.pop(key, None)
            if before is not None:
                now[before].discard(key)
                if not now[before]:
                    always[before] = False
            if after is not None:
                present[key] = after
                now.setdefault(after, set()).add(key)
                names.setdefault(after, set()).add(key)
        return values, {item: (names[item], always.get(item, False)) for item in names}

    def _check_names(
        self,
        fact: Fact,
        values: dict[Key, list[Item | None]],
        names: dict[Item, tuple[set[Key], bool]],
        raw: RawImage,
        said: str,
    ) -> None:
        for (parent, name), led in values.items():
            if None in led or (len(led) > 1 and any(item and item.is_dir for item in led)):
                # A directory that is moved over another has two names on the way; e2fsck leaves it either.
                continue
            found = raw.edges.get((parent.inode, name))
            assert found is not None, f"the name {name!r} in {parent} was always there and is gone"
            assert found in {item.inode for item in led if item}, f"{name!r} leads to {found}, not to one of {led}"
        for item, (keys, always) in names.items():
            if always:
                there = [key for key in keys if raw.edges.get((key[0].inode, key[1])) == item.inode]
                assert there, f"{item} always had a name, and has none of {[key[1] for key in keys]}"
        known: dict[tuple[int, bytes], set[int]] = {}
        for (parent, name), led in values.items():
            known.setdefault((parent.inode, name), set()).update(item.inode for item in led if item)
        below_lost = {LOST}
        for (directory, name), number in raw.edges.items():
            if directory in below_lost:
                assert name == b"#%d" % number, f"lost+found has {name!r}"
                continue
            assert number in known.get((directory, name), ()), (
                f"{name!r} in {directory} leads to {number}: it never did"
            )

    def _alive(self, fact: Fact, position: int) -> dict[int, list[Item]]:
        """By inode, whoever may have had it since the fact."""
        found: dict[int, list[Item]] = {}
        for item in self.workload.items:
            if not item.inode or (item.began >= position and item.began):
                continue
            had_a_name = any(item is other for other in fact.capture.edges.values())
            if item.gone is not None and item.gone < fact.position and item in fact.capture.counts and not had_a_name:
                continue
            found.setdefault(item.inode, []).append(item)
        return found

    def _check_secret(self, number: int, record: Record) -> None:
        what = "what was on the disk before"
        if record.kind == stat.S_IFDIR:
            return
        assert CANARY not in record.content, f"inode {number} shows {what} at byte {record.content.index(CANARY)}"
        assert CANARY not in record.tail, f"inode {number} has {what} behind its end"
        assert not any(CANARY in value for value in record.attributes.values()), f"attributes show {what}"

    def _check_record(
        self, fact: Fact, number: int, record: Record, items: list[Item], position: int, unit: int
    ) -> None:
        assert items, f"inode {number} is there, and nobody has it"
        wrong = []
        for item in items:
            said = self._differs(fact, item, record, position, unit)
            if not said:
                return
            wrong.append(said)
        raise AssertionError(f"inode {number}: {'; '.join(wrong)}")

    def _differs(self, fact: Fact, item: Item, record: Record, position: int, unit: int) -> str:
        """How the record is not the item's, "" if it is."""
        _, attributes, xattrs = fact.capture.counts.get(item, (1, 1, 1))
        had = {value for began, value in item.attributes[attributes - 1 :] if began < position or not began}
        had |= {item.attributes[attributes - 1][1]}
        if (record.mode, *record.owner) not in had:
            return f"mode and owner {(oct(record.mode), *record.owner)}, not one of {had}"
        kept = [value for began, value in item.xattrs[xattrs - 1 :] if began < position]
        if record.attributes not in (item.xattrs[xattrs - 1][1], *kept):
            return f"attributes {record.attributes}, not {item.xattrs[xattrs - 1][1]} or one of {kept}"
        if item.is_dir:
            return ""
        base = max(count for at, count in item.synced if at <= position or count == 1)
        contents = [version.content for version in item.versions[base - 1 : base]]
        contents += [version.content for version in item.versions[base:] if version.began < position]
        return differs(record.content, contents, unit)

    def _check_claims(self, raw: RawImage, position: int) -> None:
        for claim in self.workload.claims:
            item, end = claim.item, claim.offset + len(claim.data)
            if claim.position > position or (item.gone is not None and item.gone < position):
                continue
            later = item.versions[claim.version :]
            if any(version.began < position and version.low < end and claim.offset < version.high for version in later):
                continue
            record = raw.records.get(item.inode)
            assert record is not None, f"{item} has acknowledged bytes and is not there"
            found = record.content[claim.offset : end]
            assert found == claim.data, f"{item}: bytes {claim.offset}..{end} were acknowledged and are not there"


def differs(content: bytes, contents: list[bytes], unit: int = 1) -> str:
    """How a content could not come of these; "" if it could.

    Each byte is one of theirs, zero past their ends; the size lies between theirs, the largest up to whole `unit`s.
    """
    if content in contents:
        return ""
    sizes = [len(one) for one in contents]
    if not min(sizes) <= len(content) <= -(-max(sizes) // unit) * unit:
        return f"{len(content)} bytes, not {min(sizes)} to {max(sizes)}"
    if len(contents) == 1 and len(content) == sizes[0]:
        return "another content than the synced one"
    found = numpy.frombuffer(content, numpy.uint8)
    right = numpy.zeros(len(content), bool)
    for one in contents:
        right |= numpy.frombuffer(one[: len(content)].ljust(len(content), b"\0"), numpy.uint8) == found
    if right.all():
        return ""
    wrong = numpy.flatnonzero(~right)
    return f"{len(wrong)} bytes that it never had, from {wrong[0]} on: {content[wrong[0] : wrong[0] + 8]!r}"


class Count:
    """How many crash states were looked at, and how many were different images."""

    def __init__(self) -> None:
        self.states = 0
        self.images = 0
        self.mounts = 0

    def __str__(self) -> str:
        return f"{self.states} states after a power cut ({self.images} different images, {self.mounts} mounted)"


#: What the tests of this process have looked at together.
total = Count()


def check_crashes(workload: Workload, *, ways: int = 2, every: int = 1, mount_every: int = 0, seed: int = 1) -> int:
    """Check crashes at every (`every`-th) write of the workload, in `ways` ways each; how many these were.

    mount_every: so many images apart, the kernel reads the repaired one as well.
    """
    oracle = Oracle(workload)
    crashes = Crashes(workload, random.Random(seed), sector=workload.sector)
    last = len(workload.log.records)
    states = images = 0
    before: tuple[bytes, Checked] | None = None
    with Fsck(workload.fold) as fsck:
        for position in [*range(workload.first, last, every), last]:
            for image in crashes.at(position, ways):
                states += 1
                if before is None or before[0] != image:
                    images += 1
                    try:
                        checked = fsck(image, twice=not images % 10)
                    except AssertionError as error:
                        raise AssertionError(f"seed {workload.seed}, crash at {position}: {error}") from None
                    before = bytes(image), checked
                    if mount_every and not images % mount_every:
                        compare_mounted(fsck.image, checked.raw, workload.fold)
                        total.mounts += 1
                oracle.check(position, before[1])
    total.states += states
    total.images += images
    return states


def compare_mounted(path: Path, raw: RawImage, fold: Fold) -> None:
    """Fail unless the kernel sees the names, contents, modes and links that we do."""
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(loop_device(path, direct_io=False))
        top = os.fsencode(stack.enter_context(mounted(device, "ext2", "ro")))
        found: dict[bytes, int] = {}
        for parent, directories, files in os.walk(top):
            for name in directories + files:
                below = os.path.join(parent, name)
                known = os.lstat(below)
                found[os.path.relpath(below, top)] = known.st_ino
                record = raw.records[known.st_ino]
                seen = (known.st_mode, (known.st_uid, known.st_gid), known.st_nlink)
                assert seen == (record.mode, record.owner, record.links), below
                if record.kind == stat.S_IFREG:
                    pieces = fold.pieces(os.stat(below).st_size)
                    with Path(os.fsdecode(below)).open("rb") as file:
                        parts = [os.pread(file.fileno(), end - first, first) for first, end in pieces]
                    assert b"".join(parts) == record.content, below
                    there = {os.fsencode(key): os.getxattr(below, key) for key in os.listxattr(below)}
                    assert there == record.attributes, below
                elif record.kind == stat.S_IFLNK:
                    assert os.readlink(below) == record.content, below
        assert found == raw.paths()


def random_workload(seed: int, steps: int = 40) -> Workload:
    """A workload of one of several kinds, by its seed; in every third one all directories have an index in memory."""
    indexed = 0 if seed % 3 == 0 else volume._INDEXED_BLOCKS
    with mock.patch.object(volume, "_INDEXED_BLOCKS", indexed):
        return _random_workload(seed, steps)


def _random_workload(seed: int, steps: int) -> Workload:
    kind = seed % 5
    if kind == 1:
        image, tight = base_image(2 << 20, 4096, "-N", "128"), True
    elif kind == 2:
        image, tight = foreign_image(3 << 20, (1024, 4096)[seed // 5 % 2], "-N", "256"), True
    elif kind == 3:
        image, tight = base_image(320 << 10, 1024, "-N", "48", "-m", "0"), True
    else:
        image, tight = base_image(2 << 20, 1024, "-N", "256"), True
    workload = Workload(seed, image, tight=tight)
    with workload.sim:
        workload.steps(steps)
        workload.run(workload.end())
    return workload


class Kind(NamedTuple):
    """What a wide workload runs on, and what it does most. far: its files reach into triple-indirect blocks."""

    block_bytes: int
    sector: int = SECTOR
    far: bool = False
    size: int = 2 << 20
    foreign: bool = False
    mostly_names: bool = False


#: One after the other, seed by seed.
WIDE_KINDS = [
    Kind(1024, far=True),
    Kind(4096, sector=4096, foreign=True, size=3 << 20),
    Kind(2048, far=True),
    Kind(1024, mostly_names=True),
    Kind(4096, sector=4096, far=True, size=3 << 20),
    Kind(2048, foreign=True, mostly_names=True, size=3 << 20),
    Kind(1024, far=True, size=120 << 10),
    Kind(2048),
    Kind(4096, sector=4096, mostly_names=True),
]


def wide_workload(seed: int, steps: int = 40) -> Workload:
    """As `random_workload`, of the kinds that reach far, have large sectors, or are mostly about names."""
    kind = WIDE_KINDS[seed % len(WIDE_KINDS)]
    make = foreign_image if kind.foreign else base_image
    options = ("-N", "256") if kind.size > 1 << 20 else ("-N", "32", "-m", "0")
    image = make(kind.size, kind.block_bytes, *options)
    fold = Fold(far_windows(kind.block_bytes)) if kind.far else None
    indexed = 0 if seed % 4 == 0 else volume._INDEXED_BLOCKS
    with mock.patch.object(volume, "_INDEXED_BLOCKS", indexed):
        workload = Workload(seed, image, tight=True, sector=kind.sector, fold=fold, mostly_names=kind.mostly_names)
        with workload.sim:
            workload.steps(steps)
            workload.run(workload.end())
    return workload


def try_seed(
    seed: int, *, steps: int = 40, ways: int = 2, every: int = 1, mount_every: int = 0, wide: bool = False
) -> int:
    """Run and crash the random workload of a seed; how many states it had."""
    workload = (wide_workload if wide else random_workload)(seed, steps)
    return check_crashes(workload, ways=ways, every=every, mount_every=mount_every, seed=seed)


def _one(seed: int, *, wide: bool = False) -> tuple[int, int, str]:
    try:
        return seed, try_seed(seed, wide=wide), ""
    except Exception as error:
        return seed, 0, f"{type(error).__name__}: {error}"


def main(first: int, last: int, processes: int, *, wide: bool = False) -> int:
    """Try the seeds [first, last); prints what is found wrong."""
    began = time.monotonic()
    states = wrong = 0
    with multiprocessing.Pool(processes) as pool:
        for seed, count, said in pool.imap_unordered(functools.partial(_one, wide=wide), range(first, last)):
            states += count
            if said:
                wrong += 1
                print(f"seed {seed}: {said}", flush=True)
    print(f"{last - first} seeds, {states} states, {wrong} seeds wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word != "wide"]
    sys.exit(main(numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else 2, wide="wide" in sys.argv))
