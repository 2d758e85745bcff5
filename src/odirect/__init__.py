"""Direct I/O from Python: files and block devices past the page cache, with an honest outcome.

    import odirect

    with odirect.open("big.bin") as file:
        buffer = odirect.empty(1 << 20)
        file.preadinto(buffer, 0)
        print(file.last_outcome)            # direct

    with odirect.open_volume("disk.img", "r+") as volume:       # a file system that is not mounted
        volume.copy_in("tree", "/")
        print((volume / "etc" / "hosts").read_text())

`open`, `File`, `Request` and `aio` for transfers, `open_volume`, `Volume`, `VolumePath` and `FileInVolume` for
file systems inside images and devices, `copy` for whole files, `empty` for memory that can always go
direct, `alignment` for what a file or device demands and who says so, `errors` for what is raised,
`Outcome` and its parts for how it went. What is heavy is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PLACES = {
    "File": "odirect.files",
    "Request": "odirect.dio.requests",
    "open": "odirect.files",
    "open_volume": "odirect.volumes",
    "Volume": "odirect.volumes",
    "VolumePath": "odirect.volume_path",
    "FileInVolume": "odirect.volume_file",
    "TreeReport": "odirect.volume_copy",
    "empty": "odirect.block.buffers",
    "Limits": "odirect.block.device",
    "Alignment": "odirect.block.limits",
    "Kind": "odirect.dio.outcome",
    "Outcome": "odirect.dio.outcome",
    "Promise": "odirect.dio.outcome",
    "Reason": "odirect.dio.outcome",
    "Tally": "odirect.dio.outcome",
    "ODirectError": "odirect.base.errors",
    "alignment": "odirect.block.limits",
    "copy": "odirect.copying",
    "CopyReport": "odirect.copying",
}
_NAMES = {"alignment": "describe"}
_MODULES = {"aio": "odirect.aio", "errors": "odirect.base.errors"}

__all__ = [
    "Alignment",
    "CopyReport",
    "File",
    "FileInVolume",
    "Kind",
    "Limits",
    "ODirectError",
    "Outcome",
    "Promise",
    "Reason",
    "Request",
    "Tally",
    "TreeReport",
    "Volume",
    "VolumePath",
    "aio",
    "alignment",
    "copy",
    "empty",
    "errors",
    "open",
    "open_volume",
]

if TYPE_CHECKING:
    import odirect.aio as aio
    from odirect.base import errors
    from odirect.base.errors import ODirectError
    from odirect.block.buffers import empty
    from odirect.block.device import Limits
    from odirect.block.limits import Alignment
    from odirect.block.limits import describe as alignment
    from odirect.copying import CopyReport, copy
    from odirect.dio.outcome import Kind, Outcome, Promise, Reason, Tally
    from odirect.dio.requests import Request
    from odirect.files import File, open
    from odirect.volume_copy import TreeReport
    from odirect.volume_file import FileInVolume
    from odirect.volume_path import VolumePath
    from odirect.volumes import Volume, open_volume


def __getattr__(name: str) -> object:
    if name in _MODULES:
        value: object = importlib.import_module(_MODULES[name])
    elif name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), _NAMES.get(name, name))
    else:
        raise AttributeError(f"module 'odirect' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
