import os
from typing import Final, NamedTuple, final

import numpy
from numpy.typing import NDArray

NOT_SIMPLE: Final[int]
STATUS_FIELDS: Final[tuple[str, ...]]
NOT_SMALL: Final[int]
ANOTHER: Final[int]
SHORTER: Final[int]

def fork_generation() -> int: ...
def address_of(buffer: object) -> int: ...
def span(buffer: object, writable: bool) -> tuple[int, int]: ...

@final
class DirectHandle:
    """The short way to one aligned transfer; see the module's source for every promise."""

    fd: int
    size_hint: int
    read_align: int
    write_align: int
    memory_align: int
    def __init__(self, fd: int, read_align: int, write_align: int, memory_align: int) -> None: ...
    def fits(self, writing: int, buffer: object, offset: int) -> int: ...
    def pread(self, buffer: object, offset: int, flags: int = 0) -> int: ...
    def pwrite(self, buffer: object, offset: int, flags: int = 0) -> int: ...

class Statx(NamedTuple):
    mask: int
    blksize: int
    mode: int
    ino: int
    size: int
    dev_major: int
    dev_minor: int
    rdev_major: int
    rdev_minor: int
    mnt_id: int
    dio_mem_align: int
    dio_offset_align: int
    dio_read_offset_align: int
    atomic_write_unit_min: int
    atomic_write_unit_max: int
    atomic_write_segments_max: int
    atomic_write_unit_max_opt: int

def statx(target: int | str | bytes | os.PathLike[str]) -> Statx: ...
def cachestat(fd: int, offset: int, length: int) -> tuple[int, int, int, int, int] | None: ...
def sync_file_range(fd: int, offset: int, length: int, flags: int) -> int: ...
def fallocate(fd: int, mode: int, offset: int, length: int) -> int: ...
def copy_guarded(target: object, source: object) -> int: ...
def zero_fill(buffer: object) -> int: ...
def list_directory(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> tuple[list[bytes], bytearray]: ...
def read_small(
    directories: list[bytes],
    counts: NDArray[numpy.int64],
    names: list[bytes],
    statuses: NDArray[numpy.int64],
    memory: memoryview | bytearray,
    rooms: NDArray[numpy.int64],
    plain: bool,
) -> list[int]: ...
