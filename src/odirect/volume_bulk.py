"""Many small files of a volume at once: read ahead of whoever wants them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from odirect.base.errors import ODirectError
from odirect.block.buffers import empty
from odirect.fs import tree
from odirect.fs.base import Attributes, FileKind, FileSystem
from odirect.fs.paths import resolve
from odirect.sched.scheduler import Task
from odirect.volume_names import AnyPath, VolumeNames
from odirect.volume_runner import named

T = TypeVar("T")

#: What is read together: so many files, or so many bytes.
WINDOW_FILES = 1024
WINDOW_BYTES = 16 << 20


def read_files(volume: VolumeNames, top: AnyPath) -> Iterator[tuple[str | bytes, bytes]]:
    """(path, content) of every regular file below `top`; see `Volume.read_files`."""
    encoded, shown = volume._path(top)
    files = volume.run(find_files(volume.file_system, encoded), shown)
    # A file with several names is read once for each, so that nothing need be kept.
    contents = read_ahead(volume, files, lambda file: file[1], shown)
    return ((path_below(shown, below), content) for (below, _), content in contents)


async def find_files(file_system: FileSystem, top: bytes) -> list[tuple[bytes, Attributes]]:
    """(path from `top`, attributes) of every regular file below `top` in the order of the device; b"": `top` itself."""
    found = await resolve(file_system, top)
    if found.kind is not FileKind.DIRECTORY:
        return [(b"", found)]
    entries = await file_system.tree(found.inode)
    return [
        (entry.path, entry.attributes)
        for entry in sorted(entries, key=lambda entry: entry.place)
        if stat.S_ISREG(entry.attributes.mode)
    ]


def path_below(shown: str | bytes, below: bytes) -> str | bytes:
    """The path of what is `below` a path that was given as `shown`, of its type."""
    if not below:
        return shown
    return os.path.join(shown, below) if isinstance(shown, bytes) else os.path.join(shown, os.fsdecode(below))


def read_ahead(
    volume: VolumeNames, files: Sequence[T], attributes: Callable[[T], Attributes], shown: object
) -> Iterator[tuple[T, bytes]]:
    """(file, content) of each of `files`, in this order; while some are handed out, the next are being read.

    shown: what errors name. A file that is larger than a window is read alone.
    """
    runner = volume.runner
    ahead: Task[list[bytes]] | None = None
    portions = windows(files, lambda file: attributes(file).size)
    window = next(portions, None)
    if window is not None:
        ahead = runner.start(read_window(volume.file_system, [attributes(file) for file in window]))
    while window is not None and ahead is not None:
        task = ahead
        try:
            runner.wait_until(lambda task=task: task.done)  # type: ignore[misc]
            contents = task.result()
        except ODirectError as error:
            named(error, shown)
            raise
        done, window, ahead = window, next(portions, None), None
        if window is not None:
            ahead = runner.start(read_window(volume.file_system, [attributes(file) for file in window]))
        # Whoever stops here leaves a task behind; it owns its memory, and the next call takes it on.
        yield from zip(done, contents, strict=True)


def windows(files: Sequence[T], size: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """The files in portions that are read together."""
    start = total = 0
    for number, file in enumerate(files):
        more = size(file)
        if number > start and (number - start == WINDOW_FILES or total + more > WINDOW_BYTES):
            yield files[start:number]
            start, total = number, 0
        total += more
    if start < len(files):
        yield files[start:]


async def read_window(file_system: FileSystem, files: Sequence[Attributes]) -> list[bytes]:
    """The contents of files that are read together."""
    if len(files) > 1 or files[0].size <= WINDOW_BYTES:
        return await file_system.read_whole([file.inode for file in files])
    handle = await file_system.open_file(files[0].inode, writable=False)
    try:
        memory = empty(handle.size_bytes)
        return [bytes(memory[: await tree.read_whole(handle, memory)])]
    finally:
        # What failed is told of what was read, not of the end of reading.
        with contextlib.suppress(ODirectError):
            await handle.close()
