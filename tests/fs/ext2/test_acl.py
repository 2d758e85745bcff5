"""Access control lists: as the kernel takes, stores, inherits and gives them, and whole after a crash."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import stat
import struct
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.dio.kit import drive
from tests.fs.ext2.reading_kit import PLACE, check, make
from tests.fs.ext2.test_inode import geometry_of
from tests.fs.ext2.writing_kit import complaint, device_of, fresh_image, repaired
from tests.loops import mounted, needs_root, run

import odirect
from odirect.base.errors import (
    CorruptionError,
    ForbiddenError,
    MissingError,
    NoSpaceError,
    ODirectError,
    PathError,
    UnsupportedError,
)
from odirect.block.device import BlockDevice
from odirect.block.filters.log_writes import LogWrites
from odirect.fs.ext2 import acl, format, xattr
from odirect.fs.ext2.inode import Ext2Inode
from odirect.fs.ext2.volume import Ext2, open_ext2
from odirect.sched.scheduler import Scheduler
from odirect.volumes import Volume

T = TypeVar("T")

ACCESS, DEFAULT = acl.ACCESS, acl.DEFAULT
NO_ID = 0xFFFFFFFF
SMALL = (1 << 20, "-b", "1024", "-I", "256", "-N", "64", "-m", "0")


def attribute(*entries: tuple[int, int] | tuple[int, int, int], version: int = 2) -> bytes:
    """A list as setxattr(2) takes it."""
    return struct.pack("<I", version) + b"".join(
        struct.pack("<2HI", *(entry if len(entry) == 3 else (*entry, NO_ID))) for entry in entries
    )


#: u::rw-, u:70000:rwx, g::r--, g:1000:r-x, m::r-x, o::--x
NAMED = attribute((1, 6), (2, 7, 70000), (4, 4), (8, 5, 1000), (0x10, 5), (0x20, 1))
#: u::rwx, g::r-x, o::---
PLAIN = attribute((1, 7), (4, 5), (0x20, 0))


# --- a volume in memory --------------------------------------------------------------------------


class Small:
    """A volume in memory, whose operations are plain calls; `d` is a directory in it."""

    def __init__(self, device: BlockDevice | None = None) -> None:
        self.device = device or device_of(fresh_image(*SMALL))
        self.open()

    def open(self) -> None:
        now = iter(range(1_700_000_000_000_000_000, 1 << 62, 1_000_000_000))
        self.volume: Ext2 = self.run(
            open_ext2(self.device, name="image", writable=True, scheduler=Scheduler(), clock_ns=lambda: next(now))
        )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return drive(coroutine, self.device)

    def create(self, directory: int, name: bytes, mode: int, **more: Any) -> int:
        return self.run(self.volume.create(directory, name, mode, **more))

    def mkdir(self, name: bytes = b"d", mode: int = 0o777) -> int:
        return self.create(self.volume.root, name, stat.S_IFDIR | mode)

    def file(self, mode: int = 0o644) -> int:
        return self.create(self.volume.root, b"f", stat.S_IFREG | mode)

    def put(self, inode: int, name: bytes, value: bytes | None) -> None:
        self.run(self.volume.set_xattr(inode, name, value))

    def chmod(self, inode: int, mode: int) -> None:
        self.run(self.volume.set_attributes(inode, mode=mode))

    def mode(self, inode: int) -> int:
        return stat.S_IMODE(self.run(self.volume.attributes(inode)).mode)

    def seen(self, inode: int) -> tuple[int, dict[bytes, bytes]]:
        return self.mode(inode), self.run(self.volume.xattrs(inode))

    def has_default(self, inode: int) -> bool:
        return self.run(self.volume.inherited_mode(inode)) is not None

    def close(self) -> None:
        """e2fsck has nothing to say of it."""
        self.run(self.volume.close())
        assert complaint(self.device.data) == ""  # type: ignore[attr-defined]


# --- what Linux answers, which the tests with the kernel confirm ---------------------------------


def test_an_access_list_sets_the_mode() -> None:
    """Owner, mask and others are the permission bits; a list that says no more than these is not stored."""
    small = Small()
    number = small.file(0o4777)
    small.put(number, ACCESS, NAMED)
    assert small.seen(number) == (0o4651, {ACCESS: NAMED})
    # What says all in the mode takes away what was stored. Identities of those without a name do not count.
    small.put(number, ACCESS, attribute((1, 7, 5), (4, 5, 6), (0x20, 0, 7)))
    assert small.seen(number) == (0o4750, {})
    # A mask is more than the mode can say.
    masked = attribute((1, 7), (4, 7), (0x10, 2), (0x20, 1))
    small.put(number, ACCESS, masked)
    assert small.seen(number) == (0o4721, {ACCESS: masked})
    # The mode stays what it is where a list is removed; that may be asked for in three ways, and more than once.
    for nothing in (None, None, b"", attribute()):
        small.put(number, ACCESS, nothing)
        assert small.seen(number) == (0o4721, {})
    small.close()


def test_the_time_of_a_change_is_that_of_one() -> None:
    """Taking away a list that is not there changes nothing, as the kernel has it."""
    small = Small()
    number = small.file()

    def changed() -> int:
        return small.run(small.volume.attributes(number)).ctime_ns

    before = changed()
    small.put(number, ACCESS, None)
    small.put(number, DEFAULT, b"")
    assert changed() == before
    small.put(number, ACCESS, attribute((1, 6), (4, 4), (0x20, 4)))
    between = changed()
    assert between > before
    small.put(number, ACCESS, NAMED)
    assert changed() > between
    small.close()


def test_other_attributes_stay_beside_a_list() -> None:
    small = Small()
    number = small.file()
    small.put(number, b"user.a", b"1")
    small.put(number, ACCESS, NAMED)
    small.chmod(number, 0o600)
    assert small.seen(number)[1].keys() == {b"user.a", ACCESS}
    small.put(number, ACCESS, PLAIN)
    assert small.seen(number) == (0o750, {b"user.a": b"1"})
    small.close()


def test_chmod_changes_the_list() -> None:
    """Owner and others; the mask where there is one, else nothing is stored."""
    small = Small()
    number = small.file()
    small.put(number, ACCESS, NAMED)
    small.chmod(number, 0o3427)
    expected = attribute((1, 4), (2, 7, 70000), (4, 4), (8, 5, 1000), (0x10, 2), (0x20, 7))
    assert small.seen(number) == (0o3427, {ACCESS: expected})
    small.run(small.volume.set_attributes(number, uid=5, gid=6, mtime_ns=0))
    assert small.seen(number) == (0o3427, {ACCESS: expected})
    directory = small.mkdir()
    small.put(directory, DEFAULT, NAMED)
    small.chmod(directory, 0o700)
    assert small.seen(directory) == (0o700, {DEFAULT: NAMED})
    small.close()


def test_a_list_without_a_mask_that_is_stored_follows_the_mode() -> None:
    """Others store lists that a mode could say; chmod takes those away, as the kernel does."""
    small = Small()
    number = small.file(0o644)
    inode = small.run(small.volume.cache.load(lambda: small.volume.inode(number)))
    small.run(small.volume.change(lambda: small.volume._replace_xattrs(inode, {ACCESS: PLAIN})))
    assert small.seen(number) == (0o644, {ACCESS: PLAIN})
    small.chmod(number, 0o612)
    assert small.seen(number) == (0o612, {})
    small.close()


KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_list_is_inherited(kind: int) -> None:
    """It bounds the mode; the new access list has the mode's owner, mask and others; directories pass it on."""
    small = Small()
    directory = small.mkdir(mode=0o3777)
    assert not small.has_default(directory)
    small.put(directory, DEFAULT, NAMED)
    assert small.has_default(directory)
    assert small.seen(directory) == (0o3777, {DEFAULT: NAMED})
    number = small.create(directory, b"new", kind | 0o777, device_number=0x103)
    passed_on = {DEFAULT: NAMED} if kind == stat.S_IFDIR else {}
    group_id = stat.S_ISGID if kind == stat.S_IFDIR else 0
    assert small.seen(number) == (0o651 | group_id, {ACCESS: NAMED, **passed_on})
    number = small.create(directory, b"closed", kind | 0o1030)
    closed = attribute((1, 0), (2, 7, 70000), (4, 4), (8, 5, 1000), (0x10, 1), (0x20, 0))
    assert small.seen(number) == (0o1010 | group_id, {ACCESS: closed, **passed_on})
    small.close()


def test_a_default_list_that_a_mode_can_say() -> None:
    small = Small()
    directory = small.mkdir()
    small.put(directory, DEFAULT, PLAIN)
    number = small.create(directory, b"f", stat.S_IFREG | 0o6666)
    assert small.seen(number) == (0o6640, {})
    number = small.create(directory, b"below", stat.S_IFDIR | 0o777)
    assert small.seen(number) == (0o750, {DEFAULT: PLAIN})
    small.put(directory, DEFAULT, None)
    assert small.seen(small.create(directory, b"g", stat.S_IFREG | 0o666)) == (0o666, {})
    small.close()


def test_links_inherit_nothing() -> None:
    """A symbolic link neither inherits nor takes a list; one more name changes nothing."""
    small = Small()
    directory = small.mkdir()
    small.put(directory, DEFAULT, NAMED)
    link = small.create(directory, b"l", stat.S_IFLNK | 0o777, target=b"x")
    assert small.seen(link) == (0o777, {})
    for name in (ACCESS, DEFAULT):
        for value in (NAMED, b"", None):
            with pytest.raises(UnsupportedError, match="a symbolic link has no access control list"):
                small.put(link, name, value)
    number = small.file()
    small.run(small.volume.link(number, directory, b"again"))
    assert small.seen(number) == (0o644, {})
    small.close()


def test_only_directories_have_default_lists() -> None:
    small = Small()
    number = small.file()
    with pytest.raises(ForbiddenError, match="only a directory") as caught:
        small.put(number, DEFAULT, NAMED)
    assert caught.value.errno == errno.EACCES
    for nothing in (None, b"", attribute()):
        small.put(number, DEFAULT, nothing)
    assert small.seen(number) == (0o644, {})
    small.close()


INVALID = {
    "three bytes": b"\2\0\0",
    "half an entry": NAMED + b"\0\0",
    "a byte more": NAMED + b"\0",
    "tag 3": attribute((1, 7), (3, 4), (4, 5), (0x20, 0)),
    "tag 0": attribute((1, 7), (0, 4), (4, 5), (0x20, 0)),
    "no others": NAMED[:-8],
    "no owner": attribute((4, 5), (0x20, 0)),
    "no group": attribute((1, 7), (0x20, 0)),
    "no group, a mask": attribute((1, 7), (0x10, 7), (0x20, 0)),
    "two owners": attribute((1, 7), (1, 7), (4, 5), (0x20, 0)),
    "two groups": attribute((1, 7), (4, 5), (4, 5), (0x20, 0)),
    "two masks": attribute((1, 7), (4, 5), (0x10, 5), (0x10, 5), (0x20, 0)),
    "two for others": attribute((1, 7), (4, 5), (0x20, 0), (0x20, 0)),
    "out of order": attribute((1, 7), (0x20, 0), (4, 5)),
    "a user after the group": attribute((1, 7), (4, 5), (2, 5, 1), (0x10, 5), (0x20, 0)),
    "a user without a mask": attribute((1, 7), (2, 5, 1), (4, 5), (0x20, 0)),
    "a group without a mask": attribute((1, 7), (4, 5), (8, 5, 1), (0x20, 0)),
    "permissions 8": attribute((1, 8), (4, 5), (0x20, 0)),
    "nobody's user": attribute((1, 7), (2, 5), (4, 5), (0x10, 5), (0x20, 0)),
    "nobody's group": attribute((1, 7), (4, 5), (8, 5), (0x10, 5), (0x20, 0)),
}


@pytest.mark.parametrize("value", INVALID.values(), ids=INVALID.keys())
@pytest.mark.parametrize("name", [ACCESS, DEFAULT])
def test_lists_that_are_none(name: bytes, value: bytes) -> None:
    """EINVAL, and nothing has changed."""
    small = Small()
    directory = small.mkdir()
    small.put(directory, name, NAMED)
    before = small.seen(directory)
    with pytest.raises(PathError, match="access control list") as caught:
        small.put(directory, name, value)
    assert caught.value.errno == errno.EINVAL
    assert small.seen(directory) == before
    small.close()


def test_versions_that_are_not_known() -> None:
    small = Small()
    number = small.file()
    for version in (0, 1, 3):
        with pytest.raises(UnsupportedError, match=f"version {version}"):
            small.put(number, ACCESS, attribute((1, 7), version=version))
    assert small.seen(number) == (0o644, {})
    small.close()


def test_a_list_that_has_no_room_changes_nothing() -> None:
    small = Small()
    number = small.file()
    many = attribute((1, 7), *((2, 7, user) for user in range(200)), (4, 5), (0x10, 5), (0x20, 0))
    with pytest.raises(NoSpaceError):
        small.put(number, ACCESS, many)
    assert small.seen(number) == (0o644, {})
    small.close()


def test_a_full_volume() -> None:
    """What would inherit a list and has no block for it is not made; what a mode can say needs none."""
    small = Small(device_of(fresh_image(1 << 20, "-b", "1024", "-I", "256", "-N", "1500", "-m", "0")))
    directory = small.mkdir()
    small.put(directory, DEFAULT, NAMED)
    number = small.file()
    small.put(number, b"user.a", b"1")
    for count in range(1200):
        try:
            small.create(directory, b"l%d" % count, stat.S_IFLNK | 0o777, target=b"x" * 200)
        except NoSpaceError:
            break
    assert not small.volume.available_blocks()
    for kind in (stat.S_IFREG, stat.S_IFDIR):
        with pytest.raises(NoSpaceError):
            small.create(directory, b"new", kind | 0o644)
        with pytest.raises(MissingError):
            small.run(small.volume.lookup(directory, b"new"))
    small.put(number, ACCESS, PLAIN)
    assert small.seen(number) == (0o750, {b"user.a": b"1"})
    with pytest.raises(NoSpaceError):
        small.put(number, ACCESS, NAMED)
    assert small.seen(number) == (0o750, {b"user.a": b"1"})
    assert small.run(small.volume.check()) == []
    small.close()


# --- what a volume has that cannot be ------------------------------------------------------------


def with_stored(small: Small, number: int, attributes: dict[bytes, bytes]) -> None:
    """Store attributes as they are."""
    inode = small.run(small.volume.cache.load(lambda: small.volume.inode(number)))
    small.run(small.volume.change(lambda: small.volume._replace_xattrs(inode, attributes)))


@pytest.mark.parametrize(
    "value", [attribute((1, 7), (4, 5)), attribute((1, 7), (4, 0o10), (0x20, 0)), attribute((0x10, 1))]
)
def test_stored_lists_that_cannot_be(value: bytes) -> None:
    """They are told, neither inherited nor changed, and can be taken away."""
    small = Small()
    directory = small.mkdir()
    with_stored(small, directory, {ACCESS: value, DEFAULT: value})
    assert small.run(small.volume.xattrs(directory)) == {ACCESS: value, DEFAULT: value}
    with pytest.raises(CorruptionError, match=f"inode {directory} at byte .* access control list"):
        small.create(directory, b"f", stat.S_IFREG | 0o644)
    with pytest.raises(CorruptionError, match=f"inode {directory} at byte .* access control list"):
        small.chmod(directory, 0o700)
    small.create(directory, b"l", stat.S_IFLNK | 0o777, target=b"x")
    small.put(directory, ACCESS, None)
    small.put(directory, DEFAULT, None)
    small.chmod(directory, 0o700)
    small.create(directory, b"f", stat.S_IFREG | 0o644)
    small.close()


def test_an_empty_list_is_none() -> None:
    """The kernel lists one that has no entries, and has no value for it."""
    block = bytearray(xattr.build_block({DEFAULT: PLAIN, b"user.a": b"1"}, 1024))
    entry = block.index(struct.pack("<BB", 0, 3), 32)
    struct.pack_into("<I", block, entry + 8, 4)  # The value is its version, and no more,
    struct.pack_into("<I", block, entry + 12, 0)  # and has no hash.
    assert xattr.read_block(geometry_of(256), block, PLACE) == {b"user.a": b"1"}


def test_attributes_of_an_unknown_kind_are_in_nobodys_way() -> None:
    """A directory with an attribute of another system (here the Hurd's) is worked in as before."""
    small = Small()
    directory = small.mkdir()
    small.put(directory, b"user.a", b"1")
    small.put(directory, DEFAULT, NAMED)
    block = small.run(small.volume.cache.load(lambda: small.volume.inode(directory).file_acl))
    small.run(small.volume.close())
    data = small.device.data  # type: ignore[attr-defined]
    entry = bytes(data).index(struct.pack("<BB", 1, format.XattrIndex.USER), block * 1024 + 32)
    data[entry + 1] = 10
    small.open()
    with pytest.raises(UnsupportedError, match="kind 10 "):
        small.run(small.volume.xattrs(directory))
    small.chmod(directory, 0o700)
    assert small.mode(small.create(directory, b"f", stat.S_IFREG | 0o666)) == 0o640
    small.run(small.volume.close())


# --- values --------------------------------------------------------------------------------------

PERMISSIONS = st.integers(0, 7)
NAMES = st.lists(st.tuples(PERMISSIONS, st.integers(0, NO_ID - 1)), max_size=4)


@st.composite
def lists(draw: st.DrawFn) -> list[acl.Entry]:
    """Valid lists."""
    users, groups = draw(NAMES), draw(NAMES)
    found = [acl.Entry(1, draw(PERMISSIONS)), *(acl.Entry(2, *user) for user in users)]
    found += [acl.Entry(4, draw(PERMISSIONS)), *(acl.Entry(8, *group) for group in groups)]
    if users or groups or draw(PERMISSIONS) & 1:
        found.append(acl.Entry(0x10, draw(PERMISSIONS)))
    return [*found, acl.Entry(0x20, draw(PERMISSIONS))]


@given(entries=lists())
def test_both_forms_say_the_same(entries: list[acl.Entry]) -> None:
    disk = acl.to_disk(entries)
    named = sum(entry.tag in (2, 8) for entry in entries)
    assert len(disk) == 4 + 8 * named + 4 * (len(entries) - named)
    assert acl.from_disk(disk, PLACE) == entries
    assert acl.from_attribute(acl.to_attribute(entries)) == entries
    assert acl.to_attribute(entries) == attribute(*entries)


def test_published_forms() -> None:
    """Bytes worked out by hand: little-endian tag, permissions, and the identity where there is one."""
    entries = [acl.Entry(1, 6), acl.Entry(2, 7, 70000), acl.Entry(4, 4), acl.Entry(0x10, 5), acl.Entry(0x20, 1)]
    assert acl.to_disk(entries).hex() == "01000000 01000600 02000700 70110100 04000400 10000500 20000100".replace(
        " ", ""
    )
    assert acl.to_attribute(entries).hex() == (
        "0200000001000600ffffffff020007007011010004000400ffffffff10000500ffffffff20000100ffffffff"
    )


def an_inode(mode: int) -> Ext2Inode:
    return Ext2Inode.create(geometry_of(256), 12, mode, 0)


@given(data=st.data(), mode=st.integers(0, 0o7777), kind=st.sampled_from((*KINDS, stat.S_IFLNK)))
def test_any_bytes_are_a_list_or_refused(data: st.DataObject, mode: int, kind: int) -> None:
    """Nothing but an ODirectError comes of any bytes, in either form; what is taken is coherent with the mode."""
    value = bytearray(acl.to_attribute(data.draw(lists())))
    if data.draw(st.booleans()):
        for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(value) - 1), st.integers(0, 255)))):
            value[place] = byte
        value = value[: data.draw(st.integers(0, len(value)))] + data.draw(st.binary(max_size=9))
    elif data.draw(st.booleans()):
        value = bytearray(data.draw(st.binary(max_size=60)))
    inode = an_inode(kind | mode)
    for name in (ACCESS, DEFAULT):
        attributes = {b"user.a": b"1"}
        try:
            changed = acl.put(inode, attributes, name, bytes(value))
        except ODirectError as error:
            assert error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES)
            assert attributes == {b"user.a": b"1"}
            continue
        assert changed == bool(len(value) > 4 and (name == ACCESS or kind == stat.S_IFDIR))
        if name in attributes:
            assert attributes[name][:4] == b"\2\0\0\0"
            acl.follow_mode(inode, attributes | {ACCESS: attributes[name]}, PLACE)
    assert inode.mode & ~0o777 == kind | (mode & ~0o777)


@given(data=st.data(), mode=st.integers(0, 0o7777))
def test_any_bytes_on_the_disk_are_a_list_or_refused(data: st.DataObject, mode: int) -> None:
    """Nothing but a CorruptionError comes of what is stored; what is believed is stored again as it was."""
    value = bytearray(acl.to_disk(data.draw(lists())))
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(value) - 1), st.integers(0, 255)), max_size=3)):
        value[place] = byte
    value = value[: data.draw(st.integers(0, len(value)) | st.just(len(value)))] + data.draw(st.binary(max_size=9))
    try:
        entries = acl.from_disk(bytes(value), PLACE)
    except CorruptionError:
        return
    assert acl.to_disk(entries) == value
    stored = acl.to_attribute(entries)
    assert acl.from_attribute(stored) == entries
    for use in (
        lambda: acl.inherit(an_inode(stat.S_IFDIR | mode), stored, PLACE),
        lambda: acl.follow_mode(an_inode(stat.S_IFREG | mode), {ACCESS: stored}, PLACE),
    ):
        with contextlib.suppress(CorruptionError):
            use()


@given(entries=lists(), mode=st.integers(0, 0o7777))
def test_a_list_and_its_mode_agree(entries: list[acl.Entry], mode: int) -> None:
    """After put, chmod and inheritance the mode says owner, mask (or group) and others."""

    def says(inode: Ext2Inode, attributes: dict[bytes, bytes]) -> None:
        if ACCESS in attributes:
            found = {entry.tag: entry.permissions for entry in acl.from_attribute(attributes[ACCESS])}
            assert inode.mode >> 6 & 7 == found[1]
            assert inode.mode >> 3 & 7 == found.get(0x10, found[4])
            assert inode.mode & 7 == found[0x20]
        assert (ACCESS in attributes) == (len(entries) > 3)

    inode, attributes = an_inode(stat.S_IFREG | mode), dict[bytes, bytes]()
    assert acl.put(inode, attributes, ACCESS, acl.to_attribute(entries))
    says(inode, attributes)
    inode.mode = stat.S_IFREG | mode
    if ACCESS in attributes:
        acl.follow_mode(inode, attributes, PLACE)
        says(inode, attributes)
    inherited = acl.inherit(inode, acl.to_attribute(entries), PLACE)
    says(inode, inherited)
    assert inode.mode & ~mode & 0o7777 == 0


# --- crashes -------------------------------------------------------------------------------------


def test_a_power_cut_leaves_a_list_and_its_mode_together() -> None:
    """At every point of the log, what is there has the mode and the list that it had after one operation."""
    device = LogWrites(device_of(fresh_image(*SMALL)))
    small = Small(device)
    known: dict[bytes, list[Any]] = {}
    directory, number = small.mkdir(), small.file(0o640)
    other = attribute((1, 7), (2, 3, 9), (4, 1), (0x10, 3), (0x20, 4))
    small.put(directory, DEFAULT, NAMED)

    def note() -> None:
        small.run(small.volume.sync())
        for name, inode in ((b"d", directory), (b"f", number)):
            known.setdefault(name, []).append(small.seen(inode))

    note()
    begun = len(device.records)
    steps: list[Callable[[], Any]] = [
        lambda: small.put(number, ACCESS, NAMED),
        lambda: small.chmod(number, 0o707),
        lambda: small.create(directory, b"new", stat.S_IFREG | 0o666),
        lambda: small.create(directory, b"below", stat.S_IFDIR | 0o777),
        lambda: small.put(number, ACCESS, other),
        lambda: small.put(directory, DEFAULT, other),
        lambda: small.put(number, ACCESS, PLAIN),
        lambda: small.put(directory, DEFAULT, None),
    ]
    for step in steps:
        step()
        note()
    known[b"d/new"] = [(0o640, {ACCESS: attribute((1, 6), (2, 7, 70000), (4, 4), (8, 5, 1000), (0x10, 4), (0x20, 0))})]
    known[b"d/below"] = [(0o651, {ACCESS: NAMED, DEFAULT: NAMED})]
    dice = random.Random(3)
    seen: dict[bytes, set[str]] = {}
    for end in range(begun, len(device.records) + 1):
        loose = device.unflushed(end)
        image = device.replay(end, without=dice.sample(loose, dice.randint(0, len(loose))))
        crashed = Small(device_of(repaired(image)[0]))
        for name, states in known.items():
            try:
                inode = _resolve(crashed, name)
            except MissingError:
                assert name.startswith(b"d/"), f"{name!r} is gone after {end} writes"
                continue
            state = crashed.seen(inode)
            assert state in states, (name, end, state)
            seen.setdefault(name, set()).add(repr(state))
        crashed.close()
    assert {name: len(states) for name, states in seen.items()} == {b"d": 3, b"f": 5, b"d/new": 1, b"d/below": 1}
    small.run(small.volume.close())


def _resolve(small: Small, path: bytes) -> int:
    number = small.volume.root
    for name in path.split(b"/"):
        number = small.run(small.volume.lookup(number, name))
    return number


# --- with the kernel -----------------------------------------------------------------------------


class Kernel:
    """A mounted volume."""

    def __init__(self, point: Path) -> None:
        self._point = os.fsencode(point)

    def make(self, path: bytes, mode: int) -> None:
        if stat.S_ISDIR(mode):
            os.mkdir(self._point + path, stat.S_IMODE(mode))
        else:
            os.mknod(self._point + path, mode, 0x103)

    def symlink(self, path: bytes) -> None:
        os.symlink("nowhere", self._point + path)

    def remove(self, path: bytes) -> None:
        os.unlink(self._point + path)

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self._point + path, mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        os.chown(self._point + path, uid, gid, follow_symlinks=False)

    def put(self, path: bytes, name: bytes, value: bytes | None) -> None:
        if value is None:
            os.removexattr(self._point + path, name, follow_symlinks=False)
        else:
            os.setxattr(self._point + path, name, value, follow_symlinks=False)

    def seen(self) -> dict[bytes, Any]:
        """Every path with mode, owners and attributes."""
        found: dict[bytes, Any] = {}
        for directory, directories, files in os.walk(self._point):
            for name in [b".", *directories, *files]:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                attributes = {
                    os.fsencode(one): os.getxattr(path, one, follow_symlinks=False)
                    for one in os.listxattr(path, follow_symlinks=False)
                }
                found[path[len(self._point) :]] = status.st_mode, status.st_uid, status.st_gid, attributes
        return found


class Ours:
    """The same, by odirect."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def make(self, path: bytes, mode: int) -> None:
        if stat.S_ISDIR(mode):
            self._volume.mkdir(path, stat.S_IMODE(mode))
        else:
            self._volume.mknod(path, mode, 0x103)

    def symlink(self, path: bytes) -> None:
        self._volume.symlink("nowhere", path)

    def remove(self, path: bytes) -> None:
        self._volume.remove(path)

    def chmod(self, path: bytes, mode: int) -> None:
        self._volume.chmod(path, mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        self._volume.chown(path, uid, gid, follow_symlinks=False)

    def put(self, path: bytes, name: bytes, value: bytes | None) -> None:
        if value is None:
            self._volume.remove_xattr(path, name, follow_symlinks=False)
        else:
            self._volume.set_xattr(path, name, value, follow_symlinks=False)

    def seen(self) -> dict[bytes, Any]:
        found: dict[bytes, Any] = {}
        waiting = [b"/"]
        while waiting:
            directory = waiting.pop()
            for name in [b".", *self._volume.listdir(directory)]:
                path = os.path.join(directory, name)
                status = self._volume.lstat(path)
                attributes = {
                    os.fsencode(one): value for one, value in self._volume.xattrs(path, follow_symlinks=False).items()
                }
                found[path] = status.st_mode, status.st_uid, status.st_gid, attributes
                if stat.S_ISDIR(status.st_mode) and name != b".":
                    waiting.append(path)
        return found


def random_list(dice: random.Random) -> bytes:
    """A list; sometimes one that is none."""
    users = [(2, dice.randrange(8), dice.choice((0, 5, 70000, NO_ID - 1))) for _ in range(dice.choice((0, 0, 1, 3)))]
    groups = [(8, dice.randrange(8), dice.choice((0, 5, 70000))) for _ in range(dice.choice((0, 0, 1, 2)))]
    entries: list[Any] = [(1, dice.randrange(8)), *users, (4, dice.randrange(8)), *groups]
    if users or groups or dice.random() < 0.3:
        entries.append((0x10, dice.randrange(8)))
    entries.append((0x20, dice.randrange(8)))
    if dice.random() < 0.75:
        return attribute(*entries)
    at = dice.randrange(len(entries))
    fault = dice.randrange(10)
    if fault == 0:
        del entries[at]
    elif fault == 1:
        entries.insert(at, entries[at])
    elif fault == 2:
        dice.shuffle(entries)
    elif fault == 3:
        entries[at] = (entries[at][0], dice.choice((8, 0xFFFF, 7)))
    elif fault == 4:
        entries[at] = (dice.choice((0, 3, 0x40, 1, 0x20)), 7)
    elif fault == 5:
        return attribute(*entries)[: dice.randrange(len(attribute(*entries)))]
    elif fault == 6:
        return attribute(*entries) + bytes(dice.randrange(1, 9))
    elif fault == 7:
        return attribute(*entries, version=dice.choice((0, 1, 3)))
    elif fault == 8:
        entries.clear()
    else:
        return b""
    return attribute(*entries)


PATHS = (b"/a", b"/b", b"/d", b"/d/a", b"/d/b", b"/d/e", b"/d/e/a", b"/d/e/b", b"/d/e/f", b"/d/e/f/a")


def random_steps(dice: random.Random, count: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Verbs of both sides, with their arguments."""
    for path in (b"/d", b"/d/e", b"/d/e/f"):
        yield "make", (path, stat.S_IFDIR | 0o777)
        if dice.random() < 0.7:
            yield "put", (path, DEFAULT, random_list(dice))
    for _ in range(count):
        path = dice.choice(PATHS)
        verb = dice.choices(("make", "symlink", "remove", "chmod", "chown", "put", "user"), (9, 1, 4, 4, 1, 8, 1))[0]
        if verb == "make":
            kind = dice.choice((*KINDS, stat.S_IFREG, stat.S_IFDIR))
            # mkdir(2) takes set-id bits away, which `create` takes.
            yield "make", (path, kind | dice.choice((0o777, 0o666, 0o1640, 0, dice.randrange(0o2000))))
        elif verb == "chmod":
            yield "chmod", (path, dice.randrange(0o10000))
        elif verb == "chown":
            yield "chown", (path, dice.choice((0, 7)), dice.choice((0, 7)))
        elif verb == "put":
            value = None if dice.random() < 0.15 else random_list(dice)
            yield "put", (path, dice.choice((ACCESS, DEFAULT)), value)
        elif verb == "user":
            yield "put", (path, b"user.a", dice.choice((None, b"1", b"2" * 30)))
        else:
            yield verb, (path,)


def answer(side: Kernel | Ours, verb: str, arguments: tuple[Any, ...]) -> str:
    try:
        getattr(side, verb)(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


@contextlib.contextmanager
def no_umask() -> Iterator[None]:
    """A volume has none of its own."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("options", ["-b 1024 -I 128", "-b 4096 -I 256"])
@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_and_we_answer_the_same(scratch: Path, options: str, seed: int) -> None:
    """Both go on from what the kernel began; each step has the same errno, and both sides see the same after.

    The kernel reads what we made, we read what it made, and e2fsck has nothing to say.
    """
    needs_root()
    dice = random.Random(seed)
    first, twin = make(scratch / "ours.img", 8 << 20, *options.split()), scratch / "theirs.img"
    steps = list(random_steps(dice, 400))
    begun = len(steps) // 3
    with no_umask(), mounted(first, "ext2", "acl,user_xattr") as point:
        for step in steps[:begun]:
            answer(Kernel(point), *step)
    shutil.copyfile(first, twin)
    with no_umask(), mounted(twin, "ext2", "acl,user_xattr") as point:
        theirs = [answer(Kernel(point), *step) for step in steps[begun:]]
        expected = Kernel(point).seen()
    with writable(first) as volume:
        for step, said in zip(steps[begun:], theirs, strict=True):
            assert answer(Ours(volume), *step) == said, step
        assert volume.check() == []
        assert Ours(volume).seen() == expected
    check(first)
    with mounted(first, "ext2", "ro,acl,user_xattr") as point:
        assert Kernel(point).seen() == expected
    with odirect.open_volume(twin) as volume:
        assert Ours(volume).seen() == expected
    assert {"", "EINVAL", "EACCES"} <= set(theirs)
    assert sum(ACCESS in attributes for *_, attributes in expected.values()) > 1


def writable(image: Path) -> Volume:
    """The volume, open for writing, as soon as the kernel has let go of the loop device that it was mounted by."""
    for _ in range(100):
        if not run("losetup", "--associated", image):
            break
    return odirect.open_volume(image, "r+")


@pytest.mark.parametrize("value", [NAMED, PLAIN, b"", attribute(), *INVALID.values()])
@pytest.mark.parametrize("kind", [*KINDS, stat.S_IFLNK])
def test_the_kernel_takes_and_refuses_the_same_lists(
    value: bytes, kind: int, kernel_point: Path, small_volume: Small
) -> None:
    """Each list that the tests above are about, on each kind of inode."""
    for name in (ACCESS, DEFAULT):
        path, number = _of_kind(kind, kernel_point, small_volume)
        theirs = ours = ""
        try:
            os.setxattr(path, name, value, follow_symlinks=False)
        except OSError as error:
            theirs = errno.errorcode[error.errno or 0]
        try:
            small_volume.put(number, name, value)
        except ODirectError as error:
            ours = errno.errorcode[error.errno or 0]
        assert ours == theirs
        found = {
            os.fsencode(one): os.getxattr(path, one, follow_symlinks=False)
            for one in os.listxattr(path, follow_symlinks=False)
        }
        assert small_volume.seen(number) == (stat.S_IMODE(os.lstat(path).st_mode), found)
        os.rmdir(path) if kind == stat.S_IFDIR else os.unlink(path)
        remove = small_volume.volume.rmdir if kind == stat.S_IFDIR else small_volume.volume.unlink
        small_volume.run(remove(small_volume.volume.root, b"one"))


def _of_kind(kind: int, point: Path, small: Small) -> tuple[Path, int]:
    """The same new thing in both."""
    path = point / "one"
    with no_umask():
        if kind == stat.S_IFDIR:
            path.mkdir(0o777)
        elif kind == stat.S_IFLNK:
            path.symlink_to("x")
        else:
            os.mknod(path, kind | 0o777, 0x103)
    target = b"x" if kind == stat.S_IFLNK else b""
    return path, small.create(small.volume.root, b"one", kind | 0o777, device_number=0x103, target=target)


@pytest.fixture(scope="module")
def kernel_point(scratch_root: Path) -> Iterator[Path]:
    """A volume that the kernel has mounted, for tests that leave nothing in it."""
    needs_root()
    image = make(scratch_root / "acl-of-the-kernel.img", 8 << 20, "-b", "1024", "-I", "256")
    with mounted(image, "ext2", "acl,user_xattr") as point:
        yield point


@pytest.fixture(scope="module")
def small_volume() -> Small:
    return Small()
