"""A device that cannot be changed."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from odirect.block.bio import DISCARD, FLUSH, WRITE, ZERO
from odirect.block.filters.base import ActiveFilter

if TYPE_CHECKING:
    from odirect.block.bio import Bio
    from odirect.block.device import BlockDevice


class ReadOnly(ActiveFilter):
    """Reads the lower device; WRITE, DISCARD and ZERO, and a FLUSH that carries data, are EROFS."""

    def __init__(self, lower: BlockDevice) -> None:
        super().__init__(lower)
        self._refused: list[Bio] = []

    def submit(self, bio: Bio) -> None:
        """Queue `bio`, or its refusal."""
        self._check_open()
        if bio.op in (WRITE, DISCARD, ZERO) or (bio.op == FLUSH and (bio.segments or bio.length)):
            bio.error = errno.EROFS
            bio.done_bytes = 0
            self._refused.append(bio)
        else:
            self.lower.submit(bio)

    def commit(self) -> None:
        """Hand over everything queued."""
        with self._lock:
            refused, self._refused = self._refused, []
            for bio in refused:
                self._finish(bio)
        self.lower.commit()

    def _kept(self) -> int:
        return len(self._refused)
