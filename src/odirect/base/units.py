"""Conversions between bytes and what people write, and alignment arithmetic.

Everything inside the package is in bytes; numbers with a suffix exist only at its edges.
"""

from __future__ import annotations

import operator
import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SUFFIX = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15, "e": 10**18}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgtpe]?)(i?b)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """The number of bytes that `text` says: "4096", "4k", "1.5MiB" are binary, "4kB" is decimal.

    Raises ValueError if it is not a size, or not a whole number of bytes.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"not a size: {text!r} (write 4096, 4k, 1M or 2GiB)")
    number, suffix, unit = match[1], match[2].lower(), (match[3] or "").lower()
    scale: int = _DECIMAL[suffix] if unit == "b" and suffix else 1 << _SUFFIX[suffix]
    whole, _, fraction = number.partition(".")
    numerator = int(whole + fraction) * scale
    divisor: int = 10 ** len(fraction)
    if numerator % divisor:
        raise ValueError(f"not a whole number of bytes: {text!r}")
    return numerator // divisor


def format_bytes(count: float) -> str:
    """`count` bytes as a person reads them: "512 B", "4.0 KiB", "1.5 GiB"."""
    size = float(count)
    if abs(size) < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        size /= 1024
        if abs(size) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} EiB"


def is_power_of_two(value: int) -> bool:
    """Whether `value` is 1, 2, 4, 8, ..."""
    return value > 0 and not value & (value - 1)


def align_down(value: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def checked_offset(offset: int) -> int:
    """`offset` as a plain int. TypeError for what is no whole number, ValueError for what is negative."""
    offset = operator.index(offset)
    if offset < 0:
        raise ValueError(f"the offset is {offset}; it cannot be negative")
    return offset
