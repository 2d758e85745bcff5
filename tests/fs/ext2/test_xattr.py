"""Extended attributes: the kernel's and debugfs' are read, ours please e2fsck and the kernel, lies are found out."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fs.ext2.reading_kit import PLACE, Image, check, debugfs, inode_number, make, write_bytes
from tests.fs.ext2.test_inode import geometry_of, live
from tests.loops import mounted, needs_root, run

from odirect.base.errors import CorruptionError, NoSpaceError, UnsupportedError
from odirect.fs.ext2.format import XATTR_ENTRY, XATTR_HEADER, XATTR_MAGIC
from odirect.fs.ext2.xattr import build_block, check_name, read_block, read_inode, references, store_inode

GEOMETRY = geometry_of(256)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An access control list as its attribute has it."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<2HI", *one) for one in entries)


NO_ID = 0xFFFFFFFF
ACL = acl((1, 6, NO_ID), (2, 7, 70000), (4, 4, NO_ID), (8, 5, 1000), (0x10, 7, NO_ID), (0x20, 0, NO_ID))
ATTRIBUTES = {
    b"user.short": b"v",
    b"user.a much longer name than that": b"value" * 20,
    b"user.b": b"",
    b"trusted.t": b"\0\1\2\xff",
    b"security.s": b"x" * 33,
    b"system.posix_acl_access": ACL,
    b"user.\xff\xfe high bytes": b"7654321",
}


def attributes_of(image: Image, number: int) -> dict[bytes, bytes]:
    """What an inode has in its two places."""
    inode = image.inode(number)
    found = read_inode(image.geometry, image.raw_inode(number), image.geometry.inode_structure(number))
    if inode.file_acl:
        image.geometry.check_data_block(inode.file_acl, PLACE)
        place = image.geometry.place("attributes", inode.file_acl * image.geometry.block_bytes)
        more = read_block(image.geometry, image.block(inode.file_acl), place)
        assert not set(found) & set(more)
        found |= more
    return found


def of_the_kernel(path: Path) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}


# --- with the kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["-b 1024 -I 128", "-b 4096 -I 256", "-b 2048 -I 1024"])
def test_attributes_of_the_kernel(scratch: Path, options: str):
    """In the inode, in a block, in both; changed and removed; a block that two files share."""
    needs_root()
    path = make(scratch / "k.img", 8 << 20, *options.split())
    with mounted(path, "ext2", "user_xattr,acl") as point:
        for name in ("all", "one", "shared", "none", "cleared"):
            (point / name).touch()
        (point / "d").mkdir()
        for key, value in ATTRIBUTES.items():
            os.setxattr(point / "all", key, value)
        os.setxattr(point / "all", "user.short", b"another value")
        os.setxattr(point / "all", "user.gone", b"x")
        os.removexattr(point / "all", "user.gone")
        os.setxattr(point / "one", "user.x", b"y" * 500)
        os.setxattr(point / "shared", "user.x", b"y" * 500)
        os.setxattr(point / "cleared", "user.x", b"y")
        os.removexattr(point / "cleared", "user.x")
        os.setxattr(point / "d", "system.posix_acl_default", ACL)
    with mounted(path, "ext2", "ro,user_xattr,acl") as point:
        said = {one.name: of_the_kernel(point / one.name) for one in os.scandir(point)}
        inodes = {name: os.stat(point / name).st_ino for name in said}
    image = Image(path)
    assert set(said["all"]) == set(ATTRIBUTES)
    for name, theirs in said.items():
        assert attributes_of(image, inodes[name]) == theirs, name
    block = image.inode(inodes["one"]).file_acl
    if block:
        assert image.inode(inodes["shared"]).file_acl == block
        assert references(image.block(block), PLACE) == 2
        # But for the second reference it is ours to the byte, hashes and all.
        alone = bytearray(image.block(block))
        struct.pack_into("<I", alone, 4, 1)
        assert build_block(said["one"], image.geometry.block_bytes) == alone


@pytest.mark.parametrize("block", [1024, 4096])
def test_the_kernel_and_e2fsck_take_our_block(scratch: Path, block: int):
    """A block of ours in the place of one of the kernel's: no word from e2fsck, every value from the kernel."""
    needs_root()
    path = make(scratch / "k.img", 8 << 20, "-b", str(block), "-I", "128")
    with mounted(path, "ext2", "user_xattr,acl") as point:
        (point / "f").touch(mode=0o670)
        os.setxattr(point / "f", "user.x", b"y")
        number = (point / "f").stat().st_ino
    image = Image(path)
    addr = image.inode(number).file_acl * block
    sets = [
        ATTRIBUTES,
        {b"user.only": b"1"},
        {b"user.full": b"z" * (block - 32 - 16 - 4 - 4)},
        {b"user." + b"n" * 250: b"v", b"trusted." + b"m" * 247: b""},
        {b"user.%d" % count: bytes([count]) * (count % 9) for count in range(25)},
    ]
    for attributes in sets:
        write_bytes(path, addr, build_block(attributes, block))
        check(path)
        with mounted(path, "ext2", "user_xattr,acl") as point:
            assert of_the_kernel(point / "f") == attributes
            for name in attributes:
                assert os.getxattr(point / "f", name) == attributes[name]
            # The kernel finds its way in it: one more, and one less.
            if len(attributes) > 3:
                os.setxattr(point / "f", "user.more", b"m")
                os.removexattr(point / "f", next(iter(attributes)))
                assert os.getxattr(point / "f", "user.more") == b"m"
        check(path)
        # What the kernel changed is in a block of its choice.
        addr = Image(path).inode(number).file_acl * block


@pytest.mark.parametrize("inode_bytes", [256, 1024])
def test_the_kernel_and_e2fsck_take_ours_in_the_inode(scratch: Path, inode_bytes: int):
    needs_root()
    path = make(scratch / "k.img", 8 << 20, "-b", "4096", "-I", str(inode_bytes))
    with mounted(path, "ext2") as point:
        (point / "f").touch(mode=0o660)
        number = (point / "f").stat().st_ino
    image = Image(path)
    few = {b"user.a": b"1", b"trusted.bcd": b"", b"user.e": b"22222"}
    for attributes in (few, {b"user.x": b"v" * (inode_bytes - 160 - 4 - 20 - 4)}, {}):
        raw = bytearray(image.raw_inode(number))
        store_inode(image.geometry, raw, attributes)
        write_bytes(path, image.inode_addr(number), raw)
        check(path)
        assert attributes_of(image, number) == attributes
        with mounted(path, "ext2", "ro,user_xattr") as point:
            assert of_the_kernel(point / "f") == attributes


# --- with debugfs, as anybody --------------------------------------------------------------------


@pytest.mark.parametrize("options", ["-b 1024 -I 128", "-b 4096 -I 256"])
def test_attributes_of_debugfs(scratch: Path, options: str):
    path = make(scratch / "d.img", 8 << 20, *options.split())
    wanted = {b"user.a": b"1", b"user.bb": b"2" * 90, b"trusted.ccc": b"three", b"security.d": b"4" * 50}
    debugfs(
        path, f"write {__file__} f", *(f"ea_set f {name.decode()} {value.decode()}" for name, value in wanted.items())
    )
    image = Image(path)
    number = inode_number(path, "f")
    assert attributes_of(image, number) == wanted
    block = image.inode(number).file_acl
    size = image.geometry.block_bytes
    theirs = read_block(image.geometry, image.block(block), PLACE)
    write_bytes(path, block * size, build_block(theirs, size))
    check(path)
    for name, value in theirs.items():
        assert run("debugfs", "-R", f"ea_get f {name.decode()}", path).strip().endswith(f'"{value.decode()}"')


# --- values --------------------------------------------------------------------------------------

names = st.tuples(
    st.sampled_from([b"user.", b"trusted.", b"security.", b"system."]),
    st.binary(min_size=1, max_size=40).map(lambda raw: raw.replace(b"\0", b"z")),
).map(b"".join)
sets = st.dictionaries(names, st.binary(max_size=80), max_size=12)


@given(attributes=sets, with_acl=st.booleans())
def test_what_is_built_is_read(attributes: dict[bytes, bytes], with_acl: bool):
    if with_acl:
        attributes |= {b"system.posix_acl_access": ACL, b"system.posix_acl_default": acl((1, 7, NO_ID))}
    try:
        block = build_block(attributes, 1024)
    except NoSpaceError:
        assert sum(len(name) + len(value) for name, value in attributes.items()) > 600
        return
    assert len(block) == 1024
    assert read_block(GEOMETRY, block, PLACE) == attributes
    assert references(block, PLACE) == 1
    # The kernel looks names up in this order, and stops where it is past.
    heads, at = [], 32
    while block[at : at + 4] != bytes(4):
        head = XATTR_ENTRY.read(block, at, PLACE)
        heads.append((head.name_index, head.name_len, block[at + 16 : at + 16 + head.name_len]))
        at += 16 + (head.name_len + 3) // 4 * 4
    assert heads == sorted(heads)
    assert build_block(dict(reversed(attributes.items())), 1024) == block


@given(attributes=sets)
def test_what_is_stored_in_an_inode_is_read(attributes: dict[bytes, bytes]):
    geometry = geometry_of(1024)
    raw = bytearray(live() + bytes(768))
    before = bytes(raw)
    try:
        store_inode(geometry, raw, attributes)
    except NoSpaceError:
        assert raw == before
        return
    assert raw[:160] == before[:160]
    assert read_inode(geometry, raw, PLACE) == attributes
    store_inode(geometry, raw, {})
    assert raw == before


def test_published_hashes():
    """One entry, "user.a" with the value "b": worked out by hand after the documentation."""
    block = build_block({b"user.a": b"b"}, 1024)
    name = ord("a")
    entry_hash = (name << 16) ^ (name >> 16) ^ ord("b")
    assert XATTR_ENTRY.read(block, 32, PLACE) == (1, 1, 1020, 0, 1, entry_hash)
    assert XATTR_HEADER.read(block, 0, PLACE) == (XATTR_MAGIC, 1, 1, entry_hash, 0, bytes(12))
    assert block[1020:] == b"b\0\0\0"


def test_room():
    full = {b"user.x": bytes(1024 - 32 - 20 - 4)}
    assert read_block(GEOMETRY, build_block(full, 1024), PLACE) == full
    with pytest.raises(NoSpaceError, match="take 996 bytes, and there are 992"):
        build_block({b"user.x": bytes(1024 - 32 - 20 - 4 + 1)}, 1024)
    assert read_block(GEOMETRY, build_block({}, 1024), PLACE) == {}
    small = geometry_of(128)
    assert read_inode(small, live()[:128], PLACE) == {}
    store_inode(small, bytearray(live()[:128]), {})
    with pytest.raises(NoSpaceError, match="no room"):
        store_inode(small, bytearray(live()[:128]), {b"user.x": b""})


def test_the_kernels_limit_is_for_the_whole_name():
    check_name(b"user." + b"x" * 250)
    with pytest.raises(ValueError, match="at most 255 bytes"):
        check_name(b"user." + b"x" * 251)
    longest = {b"user." + b"x" * 255: b"1"}
    assert read_block(GEOMETRY, build_block(longest, 1024), PLACE) == longest


@pytest.mark.parametrize("name", [b"user.", b"trusted.", b"user." + b"x" * 256, b"user.a\0b", b"system."])
def test_names_that_are_none(name: bytes):
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        check_name(name)
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        build_block({name: b""}, 1024)


def test_names_of_other_file_systems():
    for name in (b"", b"user", b"btrfs.compression", b"x.y"):
        with pytest.raises(UnsupportedError, match="no attributes with this prefix"):
            check_name(name)
    for name in (*ATTRIBUTES, b"system.other"):
        check_name(name)


@pytest.mark.parametrize(
    "value", [b"", b"\2\0\0", struct.pack("<I", 1), ACL[:-1], acl((3, 1, 1)), acl((1, 7, NO_ID))[:-4], ACL + b"\0"]
)
def test_access_control_lists_that_are_none(value: bytes):
    with pytest.raises(ValueError, match="an access control list"):
        build_block({b"system.posix_acl_access": value}, 1024)


# --- what is not believed ------------------------------------------------------------------------


def changed(offset: int, layout: str, value: int, attributes: dict[bytes, bytes] | None = None) -> bytes:
    block = bytearray(build_block(attributes or {b"user.abc": b"value"}, 1024))
    struct.pack_into("<" + layout, block, offset, value)
    return bytes(block)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (changed(0, "I", 0xEA020001), "at byte 0: found magic 0xea020001"),
        (changed(4, "I", 0), "0 inodes that share it"),
        (changed(4, "I", 1025), "1025 inodes that share it"),
        (changed(8, "I", 2), "2 blocks"),
        (changed(32, "B", 200), "hash"),
        (changed(32, "B", 4), "hash"),
        (changed(34, "H", 1021), "at byte 32: found a value of 5 bytes at 1021"),
        (changed(34, "H", 40), "value of 5 bytes at 40"),
        (changed(34, "H", 0xFFFF), "value of 5 bytes at 65535"),
        (changed(36, "I", 12), "a value in inode 12"),
        (changed(40, "I", 0xFFFFFFFF), "value of 4294967295 bytes"),
        (changed(44, "I", 1), "hash 0x00000001, expected 0x"),
        (changed(48, "B", 0x62), "hash"),
        (changed(1016, "B", 0x62), "hash"),
        (changed(33, "B", 2), "name b'abc' of kind 2"),
        (build_block({b"user.a": b""}, 1024)[:1000], "1000 bytes, expected a block"),
        (
            build_block({}, 1024)[:32] + XATTR_ENTRY.pack(XATTR_ENTRY.kind(0, 2, 0, 0, 0, 0)) + bytes(976),
            "begins with b''",
        ),
        (
            build_block({}, 1024)[:32]
            + 2 * (XATTR_ENTRY.pack(XATTR_ENTRY.kind(1, 1, 0, 0, 0, 0)) + b"a\0\0\0")
            + bytes(952),
            "attribute b'user.a' twice",
        ),
        (build_block({}, 1024)[:32] + 62 * XATTR_ENTRY.pack(XATTR_ENTRY.kind(0, 4, 0, 0, 0, 0)), "a name of 0 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_blocks_that_cannot_be(block: bytes, words: str):
    with pytest.raises(CorruptionError, match=words):
        read_block(GEOMETRY, block, PLACE)


def test_kinds_that_are_not_known():
    with pytest.raises(UnsupportedError, match="kind 9 "):
        read_block(GEOMETRY, changed(33, "B", 9), PLACE)


def test_hashes_of_signed_bytes_and_none_are_taken():
    """Some kernels took the bytes of names with a sign; 0 means that there is no hash."""
    good = build_block({b"user.\xff": b""}, 1024)
    assert XATTR_ENTRY.read(good, 32, PLACE).hash == 0xFF
    for value in (0xFFFFFFFF, 0):
        raw = bytearray(good)
        struct.pack_into("<I", raw, 44, value)
        assert read_block(GEOMETRY, raw, PLACE) == {b"user.\xff": b""}


def test_room_in_the_inode_that_lies():
    raw = bytearray(live())
    store_inode(GEOMETRY, raw, {b"user.x": b"1"})
    struct.pack_into("<H", raw, 160 + 4 + 2, 500)
    with pytest.raises(
        CorruptionError, match="image: test, attributes in it at byte 164: found a value of 1 bytes at 500"
    ):
        read_inode(GEOMETRY, raw, PLACE)
    struct.pack_into("<H", raw, 128, 200)
    with pytest.raises(CorruptionError, match="extra_isize 200"):
        read_inode(GEOMETRY, raw, PLACE)
    with pytest.raises(CorruptionError, match="100 bytes, expected 256"):
        read_inode(GEOMETRY, bytes(100), PLACE)


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data())
def test_any_bytes_give_attributes_or_an_error(data: st.DataObject):
    block = bytearray(build_block(data.draw(st.just(ATTRIBUTES) | sets), 4096)[:4096])
    geometry = geometry_of(1024, log_block_size=2)
    inode = bytearray(live() + bytes(768))
    store_inode(geometry, inode, {b"user.a": b"1", b"trusted.bcd": b"2" * 50})
    for bit in data.draw(st.lists(st.integers(0, 400 * 8), min_size=1, max_size=5)):
        block[bit // 8] ^= 1 << bit % 8
        inode[(bit // 8 + 128) % 1024] ^= 1 << bit % 8
    if data.draw(st.booleans()):
        block[32:] = data.draw(st.binary(max_size=200)).ljust(4064, b"\0")
        inode[164:] = data.draw(st.binary(max_size=200)).ljust(860, b"\0")
    for ask in (lambda: read_block(geometry, block, PLACE), lambda: read_inode(geometry, inode, PLACE)):
        try:
            found = ask()
        except (CorruptionError, UnsupportedError):
            continue
        # What was believed can be written.
        assert read_block(geometry, build_block(found, 4096), PLACE) == found
