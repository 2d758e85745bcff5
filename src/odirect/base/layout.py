"""How a record of a disk is declared and read: a NamedTuple beside one `struct.Struct`.

The declaration is checked when it is imported: the struct has the published size, and the tuple has
as many fields as the struct. Reading checks the length first; what is then wrong with the values is
for the format to say.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from odirect.base.errors import CorruptionError

if TYPE_CHECKING:
    import numpy

_NUMPY_CODES = {"B": "u1", "H": "<u2", "I": "<u4", "Q": "<u8"}

T = TypeVar("T", bound=tuple[Any, ...])


class Place(NamedTuple):
    """Where a structure is, for messages: the volume's name, what it is, and the byte on the device."""

    volume: str
    structure: str
    addr: int

    def corrupt(self, found: object, expected: object) -> CorruptionError:
        """The error that says that `found` is here instead of `expected`."""
        return CorruptionError(
            f"{self.structure} at byte {self.addr}: found {found}, expected {expected}", path=self.volume
        )


class Layout(Generic[T]):
    """One kind of record: its struct, and the tuple that it becomes."""

    def __init__(self, kind: Callable[..., T], layout: str, size: int, fields: int) -> None:
        self.kind = kind
        self.form = layout
        self.struct = struct.Struct(layout)
        self.size = size
        if self.struct.size != size:
            raise TypeError(f"{kind} takes {self.struct.size} bytes, and should take {size}")
        if len(self.struct.unpack(bytes(size))) != fields:
            raise TypeError(f"the layout of {kind} has not {fields} fields")

    def read(self, buffer: memoryview | bytes | bytearray, offset: int, place: Place) -> T:
        """The record at byte `offset` of `buffer`. Raises CorruptionError if it is cut off there."""
        if offset < 0 or offset + self.size > len(buffer):
            raise place.corrupt(f"{max(0, len(buffer) - offset)} bytes", f"{self.size} bytes")
        return self.kind(*self.struct.unpack_from(buffer, offset))

    def write(self, record: T, buffer: memoryview | bytearray, offset: int) -> None:
        """Put `record` at byte `offset` of `buffer`. Raises ValueError if a field does not fit."""
        try:
            self.struct.pack_into(buffer, offset, *record)
        except struct.error as error:
            raise ValueError(f"{record} cannot be stored: {error}") from error

    def dtype(self, stride: int) -> numpy.dtype[Any]:
        """The same fields for NumPy, for records that are `stride` bytes apart: many are read at once."""
        import numpy

        formats = [_NUMPY_CODES.get(code) or f"V{code[:-1]}" for code in self._codes()]
        names = list(self.kind._fields)  # type: ignore[attr-defined]
        sizes = [numpy.dtype(form).itemsize for form in formats]
        offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        return numpy.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": stride})

    def offset_of(self, field: str) -> int:
        """The byte of the record that `field` begins at."""
        index = self.kind._fields.index(field)  # type: ignore[attr-defined]
        return struct.calcsize(self.form[0] + "".join(self._codes()[:index]))

    def part(self, first: str, last: str) -> struct.Struct:
        """The struct of the fields from `first` to `last`, for who changes these alone, at `offset_of(first)`."""
        fields = self.kind._fields  # type: ignore[attr-defined]
        codes = self._codes()[fields.index(first) : fields.index(last) + 1]
        return struct.Struct(self.form[0] + "".join(codes))

    def _codes(self) -> list[str]:
        """The form, a code for each field."""
        codes: list[str] = []
        for count, code in re.findall(r"(\d*)([BHIQs])", self.form):
            codes += [count + code] if code == "s" else [code] * int(count or 1)
        return codes

    def pack(self, record: T) -> bytes:
        """The record's bytes. Raises ValueError if a field does not fit."""
        data = bytearray(self.size)
        self.write(record, data, 0)
        return bytes(data)


def layout(kind: type[T], form: str, size: int) -> Layout[T]:
    """The `Layout` of the NamedTuple `kind`. Raises TypeError (at import) if size or fields do not agree."""
    return Layout(kind, form, size, len(kind._fields))  # type: ignore[attr-defined]
