"""The hash of a name in a directory's index, in the three kinds that ext2 and ext3 have.

Source: the kernel's documentation of ext4's data structures (Hash Tree Directories); half of MD4 after RFC 1320,
TEA after Wheeler and Needham.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

LEGACY, HALF_MD4, TEA = 0, 1, 2

_MASK = 0xFFFFFFFF
_MD4_START = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
_MD4_SECOND, _MD4_THIRD = 0x5A827999, 0x6ED9EBA1
#: Of each round of the half MD4: the order of the words, and the rotations.
_ROUNDS = (
    ((0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19)),
    ((1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13)),
    ((3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15)),
)
_TEA_STEP = 0x9E3779B9
_SEED = struct.Struct("<4I")
#: The largest hash means the end of a directory to its readers, so no name has it.
_END = 0xFFFFFFFE


def index_hash(name: bytes, kind: int, seed: bytes, *, signed: bool) -> int:
    """The hash (even, 32 bits) of `name`. kind: LEGACY, HALF_MD4 or TEA; seed: 16 bytes, all zeroes for none.

    signed: whether bytes from 128 on count as negative, as the superblock's flags say. Raises ValueError
    for another kind.
    """
    characters = [byte - 256 if signed and byte > 127 else byte for byte in name]
    words = _SEED.unpack(seed)
    state = list(words if any(words) else _MD4_START)
    if kind == LEGACY:
        found = _legacy(characters)
    elif kind == HALF_MD4:
        for chunk in _words(characters, 8):
            _half_md4(state, chunk)
        found = state[1]
    elif kind == TEA:
        for chunk in _words(characters, 4):
            _tea(state, chunk)
        found = state[0]
    else:
        raise ValueError(f"hash {kind}: the index of a directory has 0 to 2")
    found &= ~1
    return _END - 2 if found == _END else found


def _words(characters: list[int], count: int) -> Iterator[list[int]]:
    """The name in chunks of `count` words, the last one filled up with its length."""
    for start in range(0, len(characters), 4 * count):
        rest = len(characters) - start
        # What is left of the name, not of the chunk, is the filling.
        filling = (rest | rest << 8) & _MASK
        filling = (filling | filling << 16) & _MASK
        found = []
        for at in range(start, min(start + 4 * count, len(characters)), 4):
            value = filling
            for character in characters[at : at + 4]:
                value = (character + (value << 8)) & _MASK
            found.append(value)
        yield found + [filling] * (count - len(found))


def _half_md4(state: list[int], words: list[int]) -> None:
    a, b, c, d = state
    for number, (order, shifts) in enumerate(_ROUNDS):
        for step, index in enumerate(order):
            if number == 0:
                mixed = d ^ (b & (c ^ d))
            elif number == 1:
                mixed = (b & c) + ((b ^ c) & d) + _MD4_SECOND
            else:
                mixed = (b ^ c ^ d) + _MD4_THIRD
            value = (a + mixed + words[index]) & _MASK
            shift = shifts[step % 4]
            a, d, c, b = d, c, b, (value << shift | value >> (32 - shift)) & _MASK
    state[:] = [(old + new) & _MASK for old, new in zip(state, (a, b, c, d), strict=True)]


def _tea(state: list[int], words: list[int]) -> None:
    first, second = state[0], state[1]
    total = 0
    for _ in range(16):
        total = (total + _TEA_STEP) & _MASK
        mixed = ((second << 4) + words[0]) ^ (second + total) ^ ((second >> 5) + words[1])
        first = (first + mixed) & _MASK
        mixed = ((first << 4) + words[2]) ^ (first + total) ^ ((first >> 5) + words[3])
        second = (second + mixed) & _MASK
    state[0] = (state[0] + first) & _MASK
    state[1] = (state[1] + second) & _MASK


def _legacy(characters: list[int]) -> int:
    newer, older = 0x12A3FE2D, 0x37ABE8F9
    for character in characters:
        found = (older + (newer ^ (character * 7152373 & _MASK))) & _MASK
        if found & 0x80000000:
            found = (found - 0x7FFFFFFF) & _MASK
        newer, older = found, newer
    return newer << 1 & _MASK
