"""What an ext2 image says, read without a line of what is tested here.

For images that e2fsck has just called sound: nothing is checked, a broken one raises whatever comes.
"""

from __future__ import annotations

import stat
import struct
from typing import NamedTuple

_TYPES_WITH_BLOCKS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}


class Record(NamedTuple):
    """An inode. content: of a file or link; tail: what is in its last block past its end."""

    mode: int
    owner: tuple[int, int]
    links: int
    content: bytes
    tail: bytes
    attributes: dict[bytes, bytes]

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)


class RawImage:
    """All that can be reached from the root. edges: (directory's inode, name) to inode, without "." and ".."."""

    def __init__(self, image: bytes | memoryview) -> None:
        self.image = image = bytes(image)
        fields = struct.unpack_from("<10I", image, 1024)
        self.first_data_block, self.block_bytes = fields[5], 1024 << fields[6]
        self.blocks_count, self.free_blocks, self.free_inodes = fields[1], fields[3], fields[4]
        self.blocks_per_group, self.inodes_per_group = fields[8], struct.unpack_from("<I", image, 1024 + 40)[0]
        (self.inode_bytes,) = struct.unpack_from("<H", image, 1024 + 88)
        self.edges: dict[tuple[int, bytes], int] = {}
        self.records: dict[int, Record] = {}
        waiting = [2]
        seen = {2}
        while waiting:
            number = waiting.pop()
            record = self.records[number] = self._record(number)
            if record.kind != stat.S_IFDIR:
                continue
            for name, below in self._names(record.content):
                if name in (b".", b".."):
                    continue
                self.edges[number, name] = below
                if below not in seen:
                    seen.add(below)
                    waiting.append(below)

    def paths(self) -> dict[bytes, int]:
        """Every path, without a leading slash, and its inode."""
        below: dict[int, list[tuple[bytes, int]]] = {}
        for (directory, name), number in self.edges.items():
            below.setdefault(directory, []).append((name, number))
        found: dict[bytes, int] = {}
        waiting = [(b"", 2)]
        while waiting:
            path, number = waiting.pop()
            for name, inode in below.get(number, ()):
                found[path + name] = inode
                waiting.append((path + name + b"/", inode))
        return found

    def descriptor(self, group: int) -> tuple[int, ...]:
        """(block bitmap, inode bitmap, inode table, free blocks, free inodes, directories) of a group."""
        at = (self.first_data_block + 1) * self.block_bytes + 32 * group
        return struct.unpack_from("<3I3H", self.image, at)

    @property
    def groups(self) -> int:
        return -(-(self.blocks_count - self.first_data_block) // self.blocks_per_group)

    def free_block_numbers(self) -> list[int]:
        """All blocks that the bitmaps say are free."""
        found = []
        for group in range(self.groups):
            bitmap = self._block(self.descriptor(group)[0])
            first = self.first_data_block + group * self.blocks_per_group
            for index in range(min(self.blocks_per_group, self.blocks_count - first)):
                if not bitmap[index >> 3] >> (index & 7) & 1:
                    found.append(first + index)
        return found

    def _block(self, number: int) -> bytes:
        return self.image[number * self.block_bytes : (number + 1) * self.block_bytes]

    def _record(self, number: int) -> Record:
        group, index = divmod(number - 1, self.inodes_per_group)
        at = self.descriptor(group)[2] * self.block_bytes + index * self.inode_bytes
        raw = self.image[at : at + 128]
        mode, uid, size = struct.unpack_from("<HHI", raw)
        gid, links, sectors = struct.unpack_from("<HHI", raw, 24)
        numbers = struct.unpack_from("<15I", raw, 40)
        (acl,) = struct.unpack_from("<I", raw, 104)
        uid |= struct.unpack_from("<H", raw, 120)[0] << 16
        gid |= struct.unpack_from("<H", raw, 122)[0] << 16
        if stat.S_ISREG(mode):
            size |= struct.unpack_from("<I", raw, 108)[0] << 32
        content = tail = b""
        if stat.S_ISLNK(mode) and sectors == (self.block_bytes // 512 if acl else 0):
            content = raw[40 : 40 + size]
        elif stat.S_IFMT(mode) in _TYPES_WITH_BLOCKS:
            whole = self._content(numbers, -(-size // self.block_bytes))
            content, tail = whole[:size], whole[size:]
        return Record(mode, (uid, gid), links, content, tail, self._attributes(acl) if acl else {})

    def _content(self, numbers: tuple[int, ...], count: int) -> bytes:
        zeroes = bytes(self.block_bytes)
        pointers = self.block_bytes // 4
        places = list(numbers[:12])

        def add(block: int, level: int) -> None:
            if len(places) >= count:
                return
            if not block:
                places.extend([0] * min(pointers**level, count - len(places)))
            elif not level:
                places.append(block)
            else:
                for below in struct.unpack(f"<{pointers}I", self._block(block)):
                    add(below, level - 1)

        for level, block in enumerate(numbers[12:], 1):
            add(block, level)
        return b"".join(self._block(block) if block else zeroes for block in places[:count])

    def _names(self, content: bytes) -> list[tuple[bytes, int]]:
        found = []
        at = 0
        while at < len(content):
            number, length, name_bytes = struct.unpack_from("<IHB", content, at)
            if number:
                found.append((content[at + 8 : at + 8 + name_bytes], number))
            at += length
        return found

    def _attributes(self, acl: int) -> dict[bytes, bytes]:
        block = self._block(acl)
        found = {}
        at = 32
        while block[at : at + 4] != bytes(4):
            length, prefix, value_at, _, size = struct.unpack_from("<BBHII", block, at)
            found[_PREFIXES[prefix] + block[at + 16 : at + 16 + length]] = block[value_at : value_at + size]
            at += (16 + length + 3) & ~3
        return found
