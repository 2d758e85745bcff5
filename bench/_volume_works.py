"""The works of the table of volumes: each one round of odirect inside an unmounted image, and of its peer."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import _peers
import _trees
import numpy
from _peers import Missing, Rate
from _works import Group, Line

import odirect
import odirect.aio
from odirect.base.units import GIB, MIB
from odirect.benchmark import Stop, Work, measure
from odirect.fs.ext2 import grow
from odirect.fs.ext2.volume import Ext2

_FILE = "/data.bin"
# Elements of one call of `read_batch`: so many that its beginning and end do not count.
_BATCH = 8192
_TURN = 100
_LOOK_UPS = 2000


@dataclass(slots=True)
class VolumeSetting:
    """What all works share. bare: a file of the same size beside the image; tree: where the small files are."""

    scratch: Path
    file_bytes: int
    tree_files: int
    seconds: float
    stop: Stop
    generator: numpy.random.Generator
    make_file: Callable[[Path, int], None]
    say: Callable[[str], None]

    @property
    def image(self) -> Path:
        """The volume with one large file."""
        return self.scratch / "volume.img"

    @property
    def bare(self) -> Path:
        """What fio may write to."""
        return self.scratch / "bare"

    @property
    def tree(self) -> Path:
        """The tree of small files."""
        return self.scratch / "tree"

    @property
    def tree_image(self) -> Path:
        """The volume with that tree."""
        return self.scratch / "tree.img"

    def make_volume(self) -> None:
        """An image with one file of random bytes in it, written by us."""
        if self.image.exists():
            return
        self.say(f"making a volume with a file of {self.file_bytes >> 20} MiB")
        _trees.run(_trees.mkfs(self.image, self.file_bytes + self.file_bytes // 16 + 64 * MIB))
        chunk = odirect.empty(8 * MIB)
        with odirect.open_volume(self.image, "r+", use_reserved=True) as volume, volume.open(_FILE, "w") as file:
            for offset in range(0, self.file_bytes, len(chunk)):
                numpy.frombuffer(chunk, numpy.uint8)[:] = numpy.frombuffer(
                    self.generator.bytes(len(chunk)), numpy.uint8
                )
                file.pwrite(chunk[: min(len(chunk), self.file_bytes - offset)], offset)

    def make_bare(self) -> None:
        """A file without a volume in it, to be written to."""
        self.make_volume()
        if not self.bare.exists():
            self.make_file(self.bare, self.file_bytes)

    def make_tree(self) -> None:
        """The tree of small files, all of it in the page cache."""
        if not self.tree.exists():
            self.say(f"making a tree of {self.tree_files:,} files")
            _trees.make_tree(self.tree, self.tree_files, self.generator)

    def make_tree_image(self) -> None:
        """A volume with the tree in it."""
        self.make_tree()
        if not self.tree_image.exists():
            _trees.run(_trees.mkfs(self.tree_image, _trees.image_bytes(self.tree_files), self.tree))


def _sides(
    number: int, ours: Callable[[], Rate], theirs: Callable[[], Rate], lines: list[Line], setting: VolumeSetting
) -> None:
    """One round: who begins changes from one to the next."""
    found: dict[str, Rate] = {}
    for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
        found[side] = ours() if side == "ours" else theirs()
        if setting.stop.asked:
            raise KeyboardInterrupt
    for line in lines:
        field = {"IOPS": "iops", "MiB/s": "bytes_per_second", "CPU µs/op": "cpu_us_per_op"}[line.figure]
        scale = MIB if line.figure == "MiB/s" else 1
        line.add(getattr(found["ours"], field) / scale, getattr(found["theirs"], field) / scale)


def _rate_and_cpu(work: str, figure: str, wanted: str, least: float | None, peer: str = "fio") -> list[Line]:
    met = (lambda _: True) if least is None else (lambda value: value >= least)
    return [
        Line(work, peer, figure, wanted, met),
        Line(work, peer, "CPU µs/op", "", lambda _: True, higher_is_better=False),
    ]


def _in_sequence(name: str, engine: str, rw: str, *, huge: bool = False) -> Group[VolumeSetting]:
    """1 MiB after 1 MiB; `huge` gives odirect's memory huge pages, as `odirect.empty` has them, and fio's has not."""
    words = {"batch": f"{rw}_batch", "submit": "submit"}[engine] + (", depth 8, huge pages" if huge else ", depth 8")
    lines = _rate_and_cpu(f"1 MiB sequential {rw} in a volume, {words}", "MiB/s", "≥ 0.97 ×", 0.97)

    def run(setting: VolumeSetting, number: int) -> None:
        work = Work(
            path=_FILE, image=str(setting.image), rw=rw, engine=engine, block_bytes=MIB, depth=8, start=0,
            blocks=setting.file_bytes // MIB, number=None, runtime_ns=round(setting.seconds * 1e9), seed=number,
            huge=huge,
        )  # fmt: skip
        peer = setting.image if rw == "read" else setting.bare
        start = _first_byte(setting.image) if rw == "read" else 0

        def ours() -> Rate:
            done = measure([work], setting.stop)
            if done.not_direct:
                group.notes.add(f"{done.not_direct} requests of {name} did not go direct")
            return Rate(done.operations / done.seconds, done.bytes / done.seconds, done.cpu_ns / 1e3 / done.operations)

        def theirs() -> Rate:
            return _peers.fio(peer, rw, MIB, 8, setting.file_bytes, setting.seconds, start=start)

        _sides(number, ours, theirs, lines, setting)

    group = Group(name, lines, run, VolumeSetting.make_volume if rw == "read" else VolumeSetting.make_bare)
    return group


def _first_byte(image: Path) -> int:
    """Where on the image the file begins, so that the peer reads the same bytes."""
    with odirect.open_volume(image) as volume:
        return volume.extents(_FILE)[0].addr or 0


def _offsets(setting: VolumeSetting, count: int) -> list[int]:
    return cast("list[int]", (setting.generator.integers(0, setting.file_bytes // 4096, count) * 4096).tolist())


def _fio_at_random(setting: VolumeSetting) -> Rate:
    start = _first_byte(setting.image)
    return _peers.fio(setting.image, "randread", 4096, 32, setting.file_bytes, setting.seconds, start=start)


class _Clock:
    """Time and CPU from its making on."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """Until now."""
        return time.perf_counter() - self._began

    def rate(self, count: int, length: int) -> Rate:
        """For so many requests of `length` bytes."""
        seconds, cpu = self.seconds, time.process_time() - self._cpu
        return Rate(count / seconds, count * length / seconds, cpu * 1e6 / count)


def _batches() -> Group[VolumeSetting]:
    lines = _rate_and_cpu("4 KiB random read in a volume, read_batch, depth 32", "IOPS", "≥ 0.95 ×", 0.95)

    def run(setting: VolumeSetting, number: int) -> None:
        def ours() -> Rate:
            memory = odirect.empty(_BATCH * 4096)
            with odirect.open_volume(setting.image) as volume, volume.open(_FILE) as file:
                file.extents()  # From here on the mapping is in memory.
                count, clock = 0, _Clock()
                while clock.seconds < setting.seconds and not setting.stop.asked:
                    offsets = setting.generator.integers(0, setting.file_bytes // 4096, _BATCH) * 4096
                    count += int((file.read_batch(offsets, 4096, memory, depth=32) == 4096).sum())
                return clock.rate(count, 4096)

        _sides(number, ours, lambda: _fio_at_random(setting), lines, setting)

    return Group("vbatch32", lines, run, VolumeSetting.make_volume)


def _coroutines() -> Group[VolumeSetting]:
    lines = _rate_and_cpu("4 KiB random read in a volume, odirect.aio, 32 coroutines", "IOPS", "≥ 0.80 ×", 0.8)

    async def read(setting: VolumeSetting) -> Rate:
        count = 0
        async with odirect.aio.open_volume(setting.image) as volume, volume.open(_FILE) as file:
            await file.extents()
            clock = _Clock()

            async def work() -> None:
                nonlocal count
                buffer = odirect.empty(4096)
                while clock.seconds < setting.seconds:
                    for offset in _offsets(setting, 256):
                        await file.preadinto(buffer, offset)
                        count += 1

            await asyncio.gather(*[work() for _ in range(32)])
            return clock.rate(count, 4096)

    def run(setting: VolumeSetting, number: int) -> None:
        _sides(number, lambda: asyncio.run(read(setting)), lambda: _fio_at_random(setting), lines, setting)

    return Group("vasyncio32", lines, run, VolumeSetting.make_volume)


def _one_at_a_time() -> Group[VolumeSetting]:
    work = "4 KiB random read in a volume, one preadinto at a time"
    lines = _rate_and_cpu(work, "IOPS", "", None, "os.preadv")

    def run(setting: VolumeSetting, number: int) -> None:
        import os

        buffer = odirect.empty(4096)
        start = _first_byte(setting.image)
        fd = os.open(setting.image, os.O_RDONLY | os.O_DIRECT)
        try:
            with odirect.open_volume(setting.image) as volume, volume.open(_FILE) as file:
                file.extents()
                sums = {"ours": [0.0, 0.0, 0.0], "theirs": [0.0, 0.0, 0.0]}
                began = time.perf_counter()
                while time.perf_counter() - began < 2 * setting.seconds and not setting.stop.asked:
                    for side, total in sums.items():
                        offsets = _offsets(setting, _TURN)
                        clock, cpu = time.perf_counter(), time.process_time()
                        if side == "ours":
                            for offset in offsets:
                                file.preadinto(buffer, offset)
                        else:
                            for offset in offsets:
                                os.preadv(fd, [buffer], start + offset)
                        total[0] += time.perf_counter() - clock
                        total[1] += time.process_time() - cpu
                        total[2] += _TURN
        finally:
            os.close(fd)
        rates = {
            side: Rate(count / wall, count * 4096 / wall, cpu * 1e6 / count)
            for side, (wall, cpu, count) in sums.items()
        }
        _sides(number, lambda: rates["ours"], lambda: rates["theirs"], lines, setting)

    return Group("vsingle", lines, run, VolumeSetting.make_volume)


def _mapping() -> Group[VolumeSetting]:
    """How long it takes to find where 4 KiB are: in a file of 4 GiB, and, as the peer, in one of 4 MiB."""
    work = "one look-up of where 4 KiB are, file of 4 GiB"
    lines = [Line(work, "file of 4 MiB", "µs", "≥ 0.90 ×", lambda value: value >= 0.9, higher_is_better=False)]
    sizes = {"/small": 4 * MIB, "/large": 4 * GIB}

    def image(setting: VolumeSetting) -> Path:
        return setting.scratch / "sparse.img"

    def prepare(setting: VolumeSetting) -> None:
        # The blocks are given to the files and never written: where they are is all that is asked.
        _trees.run(_trees.mkfs(image(setting), 5 * GIB))
        with odirect.open_volume(image(setting), "r+") as volume:
            for path, size in sizes.items():
                with volume.open(path, "w"):
                    pass
                _allocate(volume, volume.stat(path).st_ino, size)

    def run(setting: VolumeSetting, number: int) -> None:
        times = dict.fromkeys(sizes, 0.0)
        with odirect.open_volume(image(setting)) as volume:
            files = {path: volume.open(path) for path in sizes}
            for file in files.values():
                file.extents()
            for turn in range(10):
                for path, file in reversed(files.items()) if turn % 2 else files.items():
                    places = (setting.generator.integers(0, sizes[path] // 4096, _LOOK_UPS) * 4096).tolist()

                    async def look(handle: odirect.FileInVolume, offsets: list[int]) -> None:
                        for offset in offsets:
                            await handle._handle.extents(offset, 4096)

                    began = time.perf_counter()
                    volume.runner.run(look(file, places))
                    times[path] += time.perf_counter() - began
            for file in files.values():
                file.close()
        each = {path: seconds * 1e6 / (10 * _LOOK_UPS) for path, seconds in times.items()}
        lines[0].add(each["/large"], each["/small"])

    return Group("vmap", lines, run, prepare)


def _allocate(volume: odirect.Volume, number: int, size: int) -> None:
    """Give blocks to a file, as if it had been written."""
    file_system = cast(Ext2, volume.file_system)
    total = size // file_system.block_bytes
    done = 0

    def step() -> int:
        inode = file_system.inode(number)
        inode.remember(file_system.cache)
        prepared = grow.prepare(file_system, inode, done, total - done)
        grow.publish(file_system, prepared, prepared.count)
        inode.size = (done + prepared.count) * file_system.block_bytes
        file_system.store(inode)
        file_system.note_large(inode)
        return prepared.count

    while done < total:
        done += volume.runner.run(file_system.change(step))


def _read_tree() -> Group[VolumeSetting]:
    work = "reading a tree of small files, cold"
    walk = Line(
        work, "loop mount, os.walk", "seconds", "≥ 3 ×, aim 13 ×", lambda value: value >= 3, higher_is_better=False
    )
    dissect = Line(work, "dissect.extfs", "seconds", "", lambda _: True, higher_is_better=False)

    def run(setting: VolumeSetting, number: int) -> None:
        def by_walk() -> tuple[float, int]:
            with _trees.loop_mounted(setting.tree_image, read_only=True) as point:
                return _trees.read_by_walk(point)

        ways: dict[str, Callable[[], tuple[float, int]]] = {
            "ours": lambda: _trees.read_by_us(setting.tree_image),
            "walk": by_walk,
            "dissect": lambda: _trees.read_by_dissect(setting.tree_image),
        }
        spent: dict[str, tuple[float, int]] = {}
        for name, way in ways.items() if number % 2 else reversed(ways.items()):
            try:
                spent[name] = way()
            except Missing as reason:
                group.notes.add(f"{group.name}: {reason}")
        bytes_read = {total for _, total in spent.values()}
        if len(bytes_read) != 1:
            raise RuntimeError(f"the ways to read a tree differ: {spent}")
        for line, name in ((walk, "walk"), (dissect, "dissect")):
            if name in spent:
                line.add(spent["ours"][0], spent[name][0])

    group = Group("vreadtree", [walk, dissect], run, VolumeSetting.make_tree_image)
    return group


def _fill_tree() -> Group[VolumeSetting]:
    work = "a new volume with a tree of small files"

    def line(peer: str, wanted: str, least: float) -> Line:
        return Line(work, peer, "seconds", wanted, lambda value: value >= least, higher_is_better=False)

    lines = {
        "mke2fs": line("mke2fs -d", "level", 0.9),
        "mke2fs; sync": line("mke2fs -d; sync", "", 0),
        "cp": line("cp -r to a loop mount; sync", "≥ 2 ×", 2),
    }

    def run(setting: VolumeSetting, number: int) -> None:
        size = _trees.image_bytes(setting.tree_files)
        image = setting.scratch / "filled.img"

        def by_mke2fs() -> float:
            return _trees.seconds_of(_trees.mke2fs(image, size, setting.tree))

        def by_mke2fs_and_sync() -> float:
            return _trees.seconds_of(_trees.mke2fs(image, size, setting.tree), ["sync", image])

        def by_cp() -> float:
            _trees.run(_trees.mkfs(image, size))
            with _trees.loop_mounted(image, read_only=False) as point:
                return _trees.seconds_of(["cp", "-r", setting.tree, point], ["sync", "-f", point], ["sync", image])

        ways: dict[str, Callable[[], float]] = {
            "ours": lambda: _trees.seconds_of(_trees.mkfs(image, size, setting.tree)),
            "mke2fs": by_mke2fs,
            "mke2fs; sync": by_mke2fs_and_sync,
            "cp": by_cp,
        }
        spent: dict[str, float] = {}
        names = list(ways)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            image.unlink(missing_ok=True)
            try:
                spent[name] = ways[name]()
            except Missing as reason:
                if name == "ours":
                    raise
                group.notes.add(f"{group.name}: {reason}")
        image.unlink(missing_ok=True)
        for name, each in lines.items():
            if name in spent:
                each.add(spent["ours"], spent[name])

    group = Group("vfilltree", list(lines.values()), run, VolumeSetting.make_tree)
    return group


def all_groups() -> list[Group[VolumeSetting]]:
    """Everything that there is to measure, by name."""
    return [
        _in_sequence("vread8", "submit", "read"),
        _in_sequence("vreadbatch8", "batch", "read"),
        _in_sequence("vwrite8", "submit", "write"),
        _in_sequence("vwritebatch8", "batch", "write"),
        _in_sequence("vreadhuge8", "submit", "read", huge=True),
        _in_sequence("vwritehuge8", "submit", "write", huge=True),
        _batches(),
        _coroutines(),
        _one_at_a_time(),
        _mapping(),
        _read_tree(),
        _fill_tree(),
    ]


def remove_all(setting: VolumeSetting) -> None:
    """Everything that was made."""
    shutil.rmtree(setting.scratch, ignore_errors=True)
