"""What an open volume is, for whoever opened it, and however he waits."""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence

from odirect.block.device import Limits
from odirect.fs.base import FileSystem
from odirect.volume_opening import Image


class VolumeFacts(abc.ABC):
    """What can be told of an open volume without looking at its device."""

    file_system: FileSystem
    _image: Image | None

    @property
    def kind(self) -> str:
        """Which file system it is: "ext2"."""
        return self.file_system.kind

    @property
    def name(self) -> str:
        """The path of its image or device."""
        return self.file_system.name

    @property
    def label(self) -> str:
        """The name that was given to it when it was made, or later; "" for none."""
        return os.fsdecode(self.file_system.label)

    @property
    def uuid(self) -> str:
        """Its identity, as 8-4-4-4-12 hexadecimal digits."""
        digits = self.file_system.uuid.hex()
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    @property
    def features(self) -> Sequence[str]:
        """The format's features that it has, by name."""
        return tuple(self.file_system.features)

    @property
    def block_bytes(self) -> int:
        """The size of its blocks."""
        return self.file_system.block_bytes

    @property
    def writable(self) -> bool:
        """Whether it takes changes: it was opened so, and nothing has failed since."""
        return not self.closed and self.file_system.writable

    @property
    def is_direct(self) -> bool:
        """Whether its bytes go past the page cache, as far as is known before they go."""
        return self._image is not None and self._image.is_direct

    @property
    def limits(self) -> Limits:
        """What its device takes, each figure with its source."""
        return Limits() if self._image is None else self._image.limits

    @property
    @abc.abstractmethod
    def closed(self) -> bool:
        """Whether it has been closed."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("an open volume cannot be copied or pickled")

    def _shown(self, kind: str) -> str:
        """The `repr` of a volume of this kind."""
        state = "closed " if self.closed else ""
        return f"<{state}{kind} {self.name!r} {self.kind}{' writable' if self.writable else ''}>"


def device_number(file_system: FileSystem) -> int:
    """What `stat` gives as a volume's device.

    Equal for the same volume, so that `os.path.samestat` works within it, and unequal for others.
    """
    return int.from_bytes(file_system.uuid[:4], "little")
