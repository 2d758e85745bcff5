"""Kinds of options that verbs of volumes have."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    _IntParam = click.ParamType[int]
    _UuidParam = click.ParamType[uuid.UUID]
else:
    _IntParam = _UuidParam = click.ParamType  # not generic before click 8.4

_MOST = 0o7777


class Permissions(_IntParam):
    """An option that is a mode in octal: 644, 0755, 4755."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The mode's bits, or a usage error."""
        if isinstance(value, int):
            return value
        try:
            mode = int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= _MOST:
            self.fail(f"{value} is no mode in octal, such as 644 or 4755", param, ctx)
        return mode


class Uuid(_UuidParam):
    """An option that is a UUID."""

    name = "uuid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> uuid.UUID:
        """The UUID, or a usage error."""
        if isinstance(value, uuid.UUID):
            return value
        try:
            return uuid.UUID(value)
        except ValueError:
            self.fail(f"{value} is no UUID, such as 0b7ed1c4-6a5e-4f6b-9d1b-8f2a6c3e5d70", param, ctx)
