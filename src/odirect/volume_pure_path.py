"""The names of paths inside a volume, in the manner of `pathlib.PurePosixPath`: nothing is asked of the volume."""

from __future__ import annotations

import fnmatch
import os
from itertools import takewhile
from typing import TYPE_CHECKING, Self, TypeAlias

from odirect.volume_names import InVolume

if TYPE_CHECKING:
    from pathlib import PurePosixPath

Segment: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes] | InVolume


class PureVolumePath(InVolume):
    """A path inside an open volume that only names: what `/` gives for a volume of an event loop.

    Always absolute, since a volume has no working directory. Equal, and hashed alike, for equal paths of one volume.
    ".." is kept, as pathlib does, because a symbolic link may be before it. It is no `os.PathLike` on purpose: `open`
    and its like would take it for a path of the host. Names that are no UTF-8 are text by `os.fsdecode`.
    """

    __slots__ = ("_parts",)

    def __init__(self, volume: object, *segments: Segment) -> None:
        parts: list[str] = []
        for segment in segments:
            if isinstance(segment, InVolume):
                if segment.volume is not volume:
                    raise ValueError(f"{segment.path} is a path of another volume")
                segment = segment.path
            text = os.fsdecode(segment)
            if text.startswith("/"):
                parts.clear()
            parts += [part for part in text.split("/") if part not in ("", ".")]
        self._parts = tuple(parts)
        super().__init__(volume, "/" + "/".join(parts))

    # Names.

    @property
    def parts(self) -> tuple[str, ...]:
        """The root "/", and the names below it."""
        return ("/", *self._parts)

    @property
    def drive(self) -> str:
        """Always "": as in every path of POSIX."""
        return ""

    @property
    def root(self) -> str:
        """Always "/": there is no other kind."""
        return "/"

    @property
    def anchor(self) -> str:
        """Drive and root: "/"."""
        return "/"

    def is_absolute(self) -> bool:
        """Whether it begins at the root: always."""
        return True

    def absolute(self) -> Self:
        """This path: it is absolute."""
        return self

    def is_reserved(self) -> bool:
        """Whether the name means a device, as on other systems: never."""
        return False

    @property
    def name(self) -> str:
        """The last name, "" for the root."""
        return self._parts[-1] if self._parts else ""

    @property
    def suffix(self) -> str:
        """The last name's ending with its dot, or ""."""
        stem, dot, ending = self.name.rpartition(".")
        return dot + ending if stem and ending else ""

    @property
    def suffixes(self) -> list[str]:
        """All endings of the last name, each with its dot."""
        if self.name.endswith("."):
            return []
        return ["." + ending for ending in self.name.lstrip(".").split(".")[1:]]

    @property
    def stem(self) -> str:
        """The last name without its last ending."""
        return self.name[: len(self.name) - len(self.suffix)]

    @property
    def parent(self) -> Self:
        """The path without its last name; the root's is the root."""
        return self._made(self._parts[:-1])

    @property
    def parents(self) -> list[Self]:
        """All paths above, the nearest first."""
        return [self._made(self._parts[:count]) for count in reversed(range(len(self._parts)))]

    def joinpath(self, *segments: Segment) -> Self:
        """This path with the segments behind it; one that begins with a slash starts anew at the root."""
        return type(self)(self.volume, self.path, *segments)

    def with_segments(self, *segments: Segment) -> Self:
        """The path of these segments in the same volume."""
        return type(self)(self.volume, *segments)

    def __truediv__(self, segment: Segment) -> Self:
        return self.joinpath(segment) if isinstance(segment, (str, bytes, os.PathLike, InVolume)) else NotImplemented

    def with_name(self, name: str) -> Self:
        """This path with another last name. ValueError if that is none, or this is the root."""
        check_text(name, "a name")
        if not self._parts or not name or "/" in name or name == ".":
            raise ValueError(f"{self.path} cannot have the name {name!r}")
        return self._made((*self._parts[:-1], name))

    def with_stem(self, stem: str) -> Self:
        """This path with another last name before its ending."""
        check_text(stem, "a stem")
        return self.with_name(stem + self.suffix)

    def with_suffix(self, suffix: str) -> Self:
        """This path with another ending ("" for none). ValueError if it is none."""
        check_text(suffix, "a suffix")
        if suffix and (not suffix.startswith(".") or suffix == "." or "/" in suffix):
            raise ValueError(f"{suffix!r} is no suffix")
        return self.with_name(self.stem + suffix)

    def relative_to(self, other: Segment, *more: Segment, walk_up: bool = False) -> PurePosixPath:
        """This path as seen from `other` (and `more` behind it), which must be it or above it (ValueError).

        walk_up: it may be anywhere, and ".." leads up. A relative path is no `VolumePath`: `other / relative` is.
        """
        above = self._above(other, more)
        shared = (
            0
            if above is None
            else sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._parts, above, strict=False)))
        )
        if above is None or (shared < len(above) and not walk_up):
            raise ValueError(f"{self.path} is not below {_text_of(other, more)}")
        if ".." in above[shared:]:
            raise ValueError(f"what is above '..' in {_text_of(other, more)} is not known")
        from pathlib import PurePosixPath

        return PurePosixPath(*[".."] * (len(above) - shared), *self._parts[shared:])

    def is_relative_to(self, other: Segment, *more: Segment) -> bool:
        """Whether `other` (and `more` behind it) is this path or above it."""
        above = self._above(other, more)
        return above is not None and self._parts[: len(above)] == above

    def match(self, pattern: str | os.PathLike[str]) -> bool:
        """Whether the last names match those of a glob pattern (all of them, if it begins with a slash)."""
        pattern = os.fspath(pattern)
        check_text(pattern, "a pattern")
        wanted = [part for part in pattern.split("/") if part]
        if not wanted:
            raise ValueError("an empty pattern")
        if len(wanted) > len(self._parts) or (pattern.startswith("/") and len(wanted) != len(self._parts)):
            return False
        return all(
            fnmatch.fnmatchcase(part, want) for part, want in zip(self._parts[-len(wanted) :], wanted, strict=True)
        )

    def as_posix(self) -> str:
        """The path as text."""
        return self.path

    def __str__(self) -> str:
        return self.path

    def __bytes__(self) -> bytes:
        return os.fsencode(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PureVolumePath):
            return NotImplemented
        return self.volume is other.volume and self._parts == other._parts

    def __lt__(self, other: PureVolumePath) -> bool:
        return self._parts < other._parts if self._comparable(other) else NotImplemented

    def __le__(self, other: PureVolumePath) -> bool:
        return self._parts <= other._parts if self._comparable(other) else NotImplemented

    def __gt__(self, other: PureVolumePath) -> bool:
        return self._parts > other._parts if self._comparable(other) else NotImplemented

    def __ge__(self, other: PureVolumePath) -> bool:
        return self._parts >= other._parts if self._comparable(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((id(self.volume), self._parts))

    # How.

    def _comparable(self, other: object) -> bool:
        return isinstance(other, PureVolumePath) and other.volume is self.volume

    def _above(self, other: Segment, more: tuple[Segment, ...]) -> tuple[str, ...] | None:
        """The names of another path; None if it is no absolute path of this volume."""
        if isinstance(other, InVolume):
            return type(self)(self.volume, other, *more)._parts if other.volume is self.volume else None
        if not os.fsdecode(other).startswith("/"):
            return None
        return type(self)(self.volume, other, *more)._parts

    def _made(self, parts: tuple[str, ...]) -> Self:
        return type(self)(self.volume, "/", *parts)


def check_text(text: object, called: str) -> None:
    """Raise TypeError if it is no str; called: what it is for."""
    if not isinstance(text, str):
        raise TypeError(f"{called} must be str, not {type(text).__name__}")


def _text_of(other: Segment, more: tuple[Segment, ...]) -> str:
    """Segments of a path as messages show them."""
    return "/".join(each.path if isinstance(each, InVolume) else os.fsdecode(each) for each in (other, *more))
