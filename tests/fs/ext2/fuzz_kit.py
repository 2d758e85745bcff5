"""Damaged ext2 images for tests: small volumes with one of everything, and seeded ways to damage them.

Nothing here needs root: the volumes are made by mke2fs, debugfs and e2fsck.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.fs.ext2 import reading_kit
from tests.fs.ext2.reading_kit import all_blocks, debugfs
from tests.loops import needs_tool, run

import odirect
from odirect.base.errors import InUseError, ODirectError
from odirect.fs.ext2.blockmap import BlockMap
from odirect.fs.ext2.directory import list_all
from odirect.volumes import Volume

#: What lies behind the volume in its image, and before its superblock: nobody may ever write there.
CANARY = bytes(range(1, 252)) * 262
BOOT = bytes(range(5, 253)) * 5
#: Of a file that is longer (a wrong size, a hole) only pieces are read.
_MOST_READ = 256 << 10
_MOST_PATHS = 600


class Seed(NamedTuple):
    """A volume to be damaged. spans: for each path, the bytes of the image that what is there depends on."""

    name: str
    image: bytes
    volume_bytes: int
    spans: dict[bytes, list[range]]
    seen: dict[bytes, Any]


# --- volumes -------------------------------------------------------------------------------------

_SHAPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "1k": (512 << 10, ("-b", "1024", "-I", "128", "-N", "112", "-O", "^resize_inode,^dir_index")),
    "groups": (1 << 20, ("-b", "1024", "-g", "256", "-I", "256", "-N", "128")),
    "4k": (1 << 20, ("-b", "4096", "-I", "256", "-N", "128", "-O", "dir_index")),
    "old": (512 << 10, ("-b", "1024", "-r", "0", "-O", "none", "-N", "112")),
}
SHAPES = tuple(_SHAPES)


def _filled(directory: Path) -> None:
    """A tree with small and sparse files, of which one needs all three levels of block numbers."""
    (directory / "empty").touch()
    (directory / "small").write_bytes(b"small" * 30)
    (directory / "plain").write_bytes(random.Random(1).randbytes(9000))
    with open(directory / "deep", "wb") as file:
        for block in (0, 11, 12, 12 + 100, 12 + 256, 12 + 256 + 3000, 12 + 256 + 65536 + 5):
            file.seek(block * 1024)
            file.write(bytes([block % 251 + 1]) * 1024)
    below = directory / "d" / "e"
    below.mkdir(parents=True)
    (below / "leaf").write_bytes(b"leaf" * 700)
    os.link(below / "leaf", directory / "d" / "again")
    os.symlink("small", directory / "fast")
    os.symlink("d/" + "./" * 60 + "again", directory / "slow")
    os.mkfifo(directory / "fifo")
    many = directory / "many"
    many.mkdir()
    for number in range(60):
        os.symlink(f"{number}", many / f"a-name-of-some-length-{number:05d}")


def make_seed(name: str, directory: Path) -> Seed:
    """The volume of this name, undamaged."""
    size, options = _SHAPES[name]
    source = directory / f"source-{name}"
    source.mkdir()
    _filled(source)
    path = directory / f"seed-{name}"
    with open(path, "wb") as file:
        file.truncate(size)
    kind = () if name == "old" else ("-t", "ext2")
    run("mke2fs", "-q", "-F", *kind, "-d", source, *options, path)
    if name != "old":
        debugfs(
            path,
            f"ea_set small user.long {'v' * 300}",
            "ea_set small user.short w",
            "ea_set d security.x y",
            "ea_set plain user.a b",
        )
    # Large directories get an index.
    subprocess.run([needs_tool("e2fsck"), "-fyD", str(path)], capture_output=True, check=False)
    reading_kit.check(path)
    reading_kit.write_bytes(path, 0, BOOT[:1024])
    image = path.read_bytes() + CANARY
    path.write_bytes(image)
    with odirect.open_volume(path) as volume:
        assert volume.check() == []
        seen = look(volume)
    assert len(seen) > 15 and not any(_has_error(found) for found in seen.values())
    return Seed(name, image, size, _spans(image, seen), seen)


def _spans(image: bytes, seen: dict[bytes, Any]) -> dict[bytes, list[range]]:
    """For each path, which bytes it depends on: those that everything needs, its directories, its own."""
    opened = reading_kit.Image(image)
    geometry, cache = opened.geometry, opened.cache
    size = geometry.block_bytes
    common = [range(1024, 2048), *(range(block * size, (block + 1) * size) for block in geometry.descriptor_blocks)]
    # To be opened, the allocator's bitmaps are not needed for reading.
    found: dict[bytes, list[range]] = {}

    def own(number: int) -> list[range]:
        addr = opened.inode_addr(number)
        inode = opened.inode(number)
        spans = [range(addr, addr + geometry.inode_bytes)]
        if inode.file_acl:
            spans.append(range(inode.file_acl * size, (inode.file_acl + 1) * size))
        if inode.has_blocks(geometry):
            blockmap = BlockMap(geometry, cache, inode)
            spans += [
                range(block * size, (block + 1) * size) for _, block in cache.load(lambda: list(all_blocks(blockmap)))
            ]
        return spans

    def visit(number: int, path: bytes, above: list[range]) -> None:
        spans = found[path] = above + own(number)
        inode = opened.inode(number)
        if inode.is_dir:
            blockmap = BlockMap(geometry, cache, inode)
            for entry in cache.load(lambda: list_all(cache, blockmap, inode)):
                if entry.name not in (b".", b".."):
                    visit(entry.inode, path + b"/" + entry.name, spans)

    visit(2, b"", common)
    assert set(found) >= set(seen)
    return {path: found[path] for path in seen}


# --- damage --------------------------------------------------------------------------------------


class Damaged(NamedTuple):
    """An image with damage. changed: the bytes that differ now. what: in words."""

    image: bytearray
    changed: list[range]
    what: list[str]


class _Targets(NamedTuple):
    """Where in an image what is."""

    inodes: list[int]
    numbers: list[int]
    entries: list[int]
    attributes: list[int]
    bitmaps: list[int]
    descriptors: list[int]
    tables: list[int]
    directories: list[int]
    values: list[int]


_known: dict[str, _Targets] = {}


def _targets(seed: Seed) -> _Targets:
    if seed.name in _known:
        return _known[seed.name]
    opened = reading_kit.Image(seed.image)
    geometry, cache = opened.geometry, opened.cache
    size = geometry.block_bytes
    found = _Targets([], [], [], [], [], [], [], [], [])
    numbers = range(1, geometry.inodes_count + 1)
    for number in numbers:
        inode = opened.inode(number)
        if inode.is_free and number != 7:
            continue
        found.inodes.append(opened.inode_addr(number))
        if inode.file_acl:
            found.attributes.append(inode.file_acl)
        if not inode.has_blocks(geometry):
            continue
        blockmap = BlockMap(geometry, cache, inode)
        for level, block in cache.load(lambda blockmap=blockmap: list(all_blocks(blockmap))):
            if level:
                found.numbers.append(block)
        if inode.is_dir:
            for run_ in cache.load(
                lambda blockmap=blockmap, inode=inode: list(blockmap.runs(0, inode.size // size - 1))
            ):
                found.directories.extend(range(run_.block, run_.block + run_.count))
    for block in found.directories:
        at = 0
        while at < size:
            found.entries.append(block * size + at)
            at += int.from_bytes(seed.image[block * size + at + 4 : block * size + at + 6], "little")
    for group in range(geometry.groups):
        found.bitmaps.extend((geometry.block_bitmap(group), geometry.inode_bitmap(group)))
        found.tables.append(geometry.inode_table(group))
        block, offset = geometry.descriptor_place(group)
        found.descriptors.append(block * size + offset)
    found.values.extend(
        (0, 1, 2, 3, 7, 8, 11, 12, 0x7F, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    )
    found.values.extend((geometry.blocks_count - 1, geometry.blocks_count, geometry.inodes_count + 1, size, size - 4))
    found.values.extend((*found.bitmaps, *found.tables, *geometry.descriptor_blocks, *found.numbers[:6]))
    found.values.extend((*found.directories[:4], *found.attributes))
    _known[seed.name] = found
    return found


def damaged(seed: Seed, dice: random.Random) -> Damaged:
    """The seed's image with one to three wrong things in it."""
    made = Damaged(bytearray(seed.image), [], [])
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        dice.choice(_WAYS)(made, _targets(seed), dice, seed)
    return made


def _put(made: Damaged, addr: int, data: bytes, what: str) -> None:
    if made.image[addr : addr + len(data)] != data and addr + len(data) <= len(made.image) - len(CANARY):
        made.image[addr : addr + len(data)] = data
        made.changed.append(range(addr, addr + len(data)))
        made.what.append(f"{what} at {addr}: {data[:8].hex()}")


def _word(made: Damaged, addr: int, targets: _Targets, dice: random.Random, what: str, least: int = 1) -> None:
    """A number of 1, 2 or 4 bytes at `addr` becomes one that means something elsewhere, or is a bit off."""
    width = dice.choice([width for width in (1, 2, 4) if width >= least and addr % width == 0] or [1])
    old = int.from_bytes(made.image[addr : addr + width], "little")
    kind = dice.random()
    if kind < 0.6:
        value = dice.choice(targets.values)
    elif kind < 0.8:
        value = old + dice.choice((-4, -1, 1, 4, 12, 256))
    else:
        value = dice.getrandbits(32)
    _put(made, addr, (value & ((1 << 8 * width) - 1)).to_bytes(width, "little"), what)


def _bits(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    """Bits flipped anywhere that is in use."""
    for _ in range(dice.choice((1, 2, 8))):
        while True:
            addr = dice.randrange(1024, seed.volume_bytes)
            if dice.random() < 0.05 or any(made.image[addr - addr % 16 : addr - addr % 16 + 16]):
                break
        _put(made, addr, bytes([made.image[addr] ^ 1 << dice.randrange(8)]), "bit")


def _inode(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    offset = dice.choice((0, 2, 4, 24, 26, 28, 32, 40, 44, 88, 92, 96, 100, 104, 108, 128, 130))
    if offset >= 40 and offset < 100 and dice.random() < 0.5:
        offset = dice.randrange(40, 100, 4)
    if offset < 128 or made.image[1024 + 0x58] == 0:  # Inodes of 256 bytes.
        _word(made, dice.choice(targets.inodes) + offset, targets, dice, f"inode field {offset}", 2)


def _number(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    size = 1024 << made.image[1024 + 0x18]
    if targets.numbers:
        block = dice.choice(targets.numbers)
        used = [at for at in range(0, size, 4) if any(made.image[block * size + at : block * size + at + 4])]
        at = dice.choice(used) if used and dice.random() < 0.7 else dice.randrange(0, size, 4)
        _word(made, block * size + at, targets, dice, "block number", 4)


def _entry(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    addr = dice.choice(targets.entries)
    field = dice.choice(("inode", "inode", "length", "name length", "type", "name"))
    if field == "inode":
        value = dice.choice((0, 1, 2, 7, 11, 12, 13, 14, 15, 0xFFFFFFFF, dice.randrange(64)))
        _put(made, addr, value.to_bytes(4, "little"), "entry's inode")
    elif field == "length":
        value = dice.choice((0, 1, 4, 8, 11, 12, 13, 16, 24, 512, 1020, 1024, 4096, 0xFFFC, 0xFFFF))
        _put(made, addr + 4, value.to_bytes(2, "little"), "rec_len")
    elif field == "name length":
        _put(made, addr + 6, bytes([dice.choice((0, 1, 2, 255, dice.randrange(256)))]), "name_len")
    elif field == "type":
        _put(made, addr + 7, bytes([dice.choice((0, 1, 2, 3, 7, 8, 255))]), "file_type")
    else:
        _put(made, addr + 8, dice.choice((b"/", b"\0", b".", b"..", b"small", b"\xff\xfe")), "name")


def _descriptor(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    addr = dice.choice(targets.descriptors) + dice.choice((0, 4, 8, 12, 14, 16, 18, 20))
    _word(made, addr, targets, dice, "group descriptor", 2)


def _superblock(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    _word(made, 1024 + dice.randrange(0, 0x110, 2), targets, dice, "superblock")


def _attribute(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    size = 1024 << made.image[1024 + 0x18]
    if targets.attributes and dice.random() < 0.6:
        addr = dice.choice(targets.attributes) * size + dice.choice((0, 4, 8, 12, *range(32, 112, 2)))
        _word(made, addr, targets, dice, "attributes' block")
    elif made.image[1024 + 0x58] == 0:
        _word(made, dice.choice(targets.inodes) + dice.randrange(128, 200, 2), targets, dice, "attributes in inode")


def _bitmap(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    size = 1024 << made.image[1024 + 0x18]
    length = dice.choice((1, 8, 64))
    value = bytes([dice.choice((0, 0xFF, dice.randrange(256)))])
    _put(made, dice.choice(targets.bitmaps) * size + dice.randrange(0, 80), value * length, "bitmap")


def _block(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    """A whole block lost, or come from elsewhere (a misdirected write)."""
    size = 1024 << made.image[1024 + 0x18]
    groups = [targets.numbers, targets.directories, targets.attributes, targets.bitmaps, targets.tables]
    block = dice.choice(dice.choice([group for group in groups if group]))
    content = dice.choice(("zero", "ones", "noise", "other"))
    data = {"zero": bytes(size), "ones": b"\xff" * size, "noise": dice.randbytes(size)}.get(content)
    if data is None:
        other = dice.choice(dice.choice([group for group in groups if group]))
        data = bytes(seed.image[other * size : (other + 1) * size])
    if dice.random() < 0.3:
        data = data[:512]
    _put(made, block * size, data, f"block {block} {content}")


def _many_numbers(made: Damaged, targets: _Targets, dice: random.Random, seed: Seed) -> None:
    """A block of numbers that all lead to one block: itself, its parent, or data of somebody (a loop)."""
    size = 1024 << made.image[1024 + 0x18]
    if targets.numbers:
        block = dice.choice(targets.numbers)
        value = dice.choice((block, *targets.numbers, *targets.directories))
        _put(made, block * size, value.to_bytes(4, "little") * (size // 4), f"loop in block {block}")


_WAYS: tuple[Callable[[Damaged, _Targets, random.Random, Seed], None], ...] = (
    *(_bits,) * 3,
    *(_inode,) * 4,
    *(_number,) * 2,
    *(_entry,) * 3,
    _descriptor,
    *(_superblock,) * 2,
    *(_attribute,) * 2,
    _bitmap,
    _block,
    _many_numbers,
)


def make_clean(image: bytearray) -> None:
    """Have the superblock say that the volume was closed well, so that damage is not what refuses it."""
    state = struct.unpack_from("<H", image, 1024 + 0x3A)[0]
    struct.pack_into("<H", image, 1024 + 0x3A, state & ~0x6 | 1)
    image[1024 + 0xE8 : 1024 + 0xEC] = bytes(4)


# --- reading everything --------------------------------------------------------------------------


def attempt(fn: Callable[[], Any]) -> Any:
    """What `fn` returns, or the error of ours that it raises, in words; any other exception leaves."""
    try:
        return fn()
    except InUseError:
        raise
    except ODirectError as error:
        assert str(error), repr(error)
        return _Error(type(error).__name__, str(error))


class _Error(NamedTuple):
    kind: str
    message: str


def _has_error(found: Any) -> bool:
    return isinstance(found, _Error) or (isinstance(found, tuple) and any(_has_error(part) for part in found))


def look(volume: Volume) -> dict[bytes, Any]:
    """Everything that can be read, by path: attributes, names, contents, links, xattrs; errors as values."""
    found: dict[bytes, Any] = {}
    seen: set[int] = set()
    waiting = [b""]
    while waiting and len(found) < _MOST_PATHS:
        path = waiting.pop()
        status, names, found[path] = _look_at(volume, path)
        if names and status.st_ino not in seen:
            seen.add(status.st_ino)
            # Of the many names that are alike a few will do.
            waiting += [path + b"/" + name for name in names if b"a-name" not in name or name.endswith(b"7")]
    return found


def look_at(volume: Volume, path: bytes) -> Any:
    """What `look` has for this path."""
    return _look_at(volume, path)[2]


def _look_at(volume: Volume, path: bytes) -> tuple[Any, list[bytes], Any]:
    shown = path or b"/"
    status = attempt(lambda: volume.lstat(shown))
    if isinstance(status, _Error):
        return status, [], status
    attributes = attempt(lambda: volume.xattrs(shown, follow_symlinks=False))
    if isinstance(attributes, dict):
        attributes = tuple(sorted(attributes.items()))
    content: Any = None
    names: Any = []
    if stat.S_ISREG(status.st_mode):
        content = attempt(lambda: _content(volume, shown, status.st_size))
    elif stat.S_ISLNK(status.st_mode):
        content = attempt(lambda: volume.readlink(shown))
        attempt(lambda: volume.stat(shown))
    elif stat.S_ISDIR(status.st_mode):
        names = attempt(lambda: volume.listdir(shown))
        content = names if isinstance(names, _Error) else tuple(sorted(names))
    what = (tuple(status[:7]), status.st_mtime_ns, status.st_rdev, status.st_blocks, attributes, content)
    return status, [] if isinstance(names, _Error) else names, what


def _content(volume: Volume, path: bytes, size: int) -> tuple[str, int]:
    """A digest of a file, or of pieces of one that is long, and how many extents it has."""
    with volume.open(path) as file:
        if size <= _MOST_READ:
            data = volume.read_bytes(path)
            assert len(data) == size
            extents = file.extents()
            return hashlib.sha256(data).hexdigest(), len(extents)
        digest = hashlib.sha256()
        at = 0
        for offset in (0, 11 << 10, 268 << 10, 3268 << 10, 65797 << 10, size // 2 + 1, size - 5000):
            at = offset
            data = file.pread(5000, at)
            assert len(data) == max(0, min(5000, size - at))
            digest.update(data)
        extents = file.extents(0, 1 << 30)
        return digest.hexdigest(), len(extents)


def unaffected(seed: Seed, made: Damaged) -> Iterator[bytes]:
    """The paths whose bytes, and those of all that lead to them, are as they were."""
    for path, spans in seed.spans.items():
        if not any(
            span.start < changed.stop and changed.start < span.stop for span in spans for changed in made.changed
        ):
            yield path


# --- writing -------------------------------------------------------------------------------------


def scribble(volume: Volume, paths: list[bytes], dice: random.Random, steps: int = 14) -> dict[bytes, bytes]:
    """Do a bit of everything to the volume; the new files that nothing was said against, with what they hold."""
    written: dict[bytes, bytes] = {}
    directories = [b"", b"/d", b"/d/e", b"/many"]
    for number in range(steps):
        path = dice.choice(paths) or b"/"
        new = dice.choice(directories) + b"/new-%d" % number
        data = dice.randbytes(dice.choice((1, 100, 1024, 5000, 20_000)))
        verb = dice.choice(_VERBS)
        result = attempt(functools.partial(verb, volume, path, new, data, dice))
        if verb is _create and not isinstance(result, _Error):
            written[new] = data
        if verb is not _create:
            # It may have moved it, or a directory above it, or removed or changed it.
            gone = {path, new, *((b"/d/e", b"/many") if verb is _rmtree else ())}
            written = {
                one: held for one, held in written.items() if not any((one + b"/").startswith(at + b"/") for at in gone)
            }
    attempt(volume.sync)
    return written


def _create(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    volume.write_bytes(new, data)


def _overwrite(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    with volume.open(path, "r+") as file:
        size = min(file.size, 1 << 20)
        file.pwrite(data, dice.choice((0, size // 2, max(0, size - 100), size, size + 70_000)))


def _truncate(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    with volume.open(path, "r+") as file:
        file.truncate(dice.choice((0, 1, file.size // 2, max(0, file.size - 1), file.size + 5000)))


def _punch(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    with volume.open(path, "r+") as file:
        file.fallocate(dice.choice((0, 1024, 12 << 10, 100)), dice.choice((512, 4096, 300 << 10)), punch=True)


def _unlink(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    volume.unlink(path)


def _rename(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    volume.rename(path, new)


def _link(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    volume.link(path, new)


def _symlink(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    volume.symlink(b"x" * dice.choice((3, 59, 60, 300)), new)


def _mkdir(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    volume.mkdir(new)
    volume.rmdir(path)


def _rmtree(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    volume.rmtree(dice.choice((b"/d/e", b"/many", path)))


def _attributes(volume: Volume, path: bytes, new: bytes, data: bytes, dice: random.Random) -> None:
    volume.chmod(path, 0o640)
    volume.chown(path, 70_000, 5)
    volume.set_xattr(path, b"user.new", data[:200])
    volume.remove_xattr(path, b"user.short")


_VERBS: tuple[Callable[[Volume, bytes, bytes, bytes, random.Random], None], ...] = (
    *(_create,) * 3,
    *(_overwrite,) * 2,
    _truncate,
    _truncate,
    _punch,
    *(_unlink,) * 2,
    _rename,
    _rename,
    _link,
    _symlink,
    _mkdir,
    _rmtree,
    _attributes,
)


# --- one case ------------------------------------------------------------------------------------


def is_clean(path: Path) -> bool:
    """Whether e2fsck finds nothing at all. It may have millions of things to say, which nobody reads."""
    words = [needs_tool("e2fsck"), "-fn", str(path)]
    try:
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def run_case(seed: Seed, number: int, path: Path, *, judge: bool = False) -> list[str]:
    """Damage the seed's volume, read all of it, write to it, and read it again; what was done, for messages.

    judge: ask e2fsck whether the damage is any; a volume that it finds nothing wrong with must be so after
    our writing, too, and what was written must be there.
    """
    dice = random.Random(f"{seed.name}-{number}")
    made = damaged(seed, dice)
    make_clean(made.image)
    path.write_bytes(made.image)
    before = bytes(made.image)
    opened = attempt(lambda: odirect.open_volume(path))
    if isinstance(opened, Volume):
        with opened as volume:
            seen = look(volume)
            for one in unaffected(seed, made):
                now = seen[one] if one in seen else look_at(volume, one)
                assert now == seed.seen[one], f"{one!r} is not what it was: {now}"
            findings = attempt(volume.check)
            if dice.random() < 0.1:
                attempt(lambda: volume.statfs())
    else:
        seen, findings = {}, opened
    assert path.read_bytes() == before, "reading has changed the image"
    clean = judge and is_clean(path)
    if clean and isinstance(opened, Volume) and findings:
        # It may be less strict (a fifo with block numbers), but has refused nothing that we believe in.
        assert isinstance(findings, list), f"e2fsck finds nothing, and we {findings}"
        clean = False
    opened = attempt(lambda: odirect.open_volume(path, "r+"))
    written: dict[bytes, bytes] = {}
    if isinstance(opened, Volume):
        paths = sorted(path for path in seen if b"lost+found" not in path) or [b""]
        try:
            written = scribble(opened, paths, dice)
        finally:
            closed = attempt(opened.close)
        assert opened.closed
        after = path.read_bytes()
        end = max(seed.volume_bytes, _volume_bytes(before))
        assert after[:1024] == before[:1024], "the boot block was written"
        assert after[end:] == before[end:], "bytes behind the volume were written"
        assert len(after) == len(before)
        if clean:
            assert closed is None, closed
            assert is_clean(path), "the volume was whole, and is not after writing"
        opened = attempt(lambda: odirect.open_volume(path))
        if isinstance(opened, Volume):
            with opened as volume:
                look(volume)
                attempt(volume.check)
                if clean:
                    for one, data in written.items():
                        assert volume.read_bytes(one) == data
    return made.what


def _volume_bytes(image: bytes) -> int:
    blocks, log_block_size = struct.unpack_from("<I", image, 1024 + 4)[0], image[1024 + 0x18]
    return blocks * (1024 << min(log_block_size, 6))
