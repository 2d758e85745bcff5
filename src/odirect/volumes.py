"""`odirect.open_volume`: file systems inside image files and block devices that are not mounted.

    with odirect.open_volume("disk.img", "r+") as volume:
        print(volume.listdir("/"))
        with volume.open("/data.bin", "r+") as file:
            file.preadinto(odirect.empty(1 << 20), 0)
            print(file.last_outcome)            # direct
        (volume / "etc" / "hosts").write_text("127.0.0.1 localhost\\n")

No mount, no root, no kernel module: the file system runs here, over the image opened past the page cache.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401
import contextlib
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import overload

from odirect.base.errors import ODirectError
from odirect.block.device import BlockDevice
from odirect.dio.opening import Path
from odirect.dio.outcome import Outcome
from odirect.fs.base import FileSystem, Finding
from odirect.fs.tree import ROOT, Owner
from odirect.volume_bulk import read_files
from odirect.volume_copy import Progress, TreeReport
from odirect.volume_copy_in import copy_in
from odirect.volume_copy_out import copy_out
from odirect.volume_entries import statvfs_result
from odirect.volume_facts import VolumeFacts
from odirect.volume_names import AnyPath, InVolume, VolumeNames
from odirect.volume_opening import SMALLEST_BLOCK_BYTES, Image, mount, open_image
from odirect.volume_path import VolumePath
from odirect.volume_runner import Runner, named

__all__ = ["Volume", "open_volume"]


def open_volume(
    path: Path,
    mode: str = "r",
    *,
    overwrite_in_use: bool = False,
    owner: tuple[int, int] | None = None,
    use_reserved: bool = False,
) -> Volume:
    """The file system in the image file or block device at `path`, open.

    mode: "r" reads, together with other readers; "r+" changes it too, alone. Until it is closed it is locked
    against other programs that heed such locks (flock), a block device that is written also against
    being mounted (O_EXCL).
    overwrite_in_use: write to it although it is mounted, looped or otherwise in use.
    owner: (uid, gid) of what is made in it; default: the caller's. use_reserved: may use the space that
    is kept for root.

    Raises InUseError with the reason, UnsupportedError for what is no file system of ours or has features
    that are not, ReadOnlyError with the reason where it can be read only (it was not closed cleanly, it has
    a journal), CorruptionError, and the errors of opening a file.
    """
    if mode not in ("r", "r+"):
        raise ValueError(f"mode {mode!r}: use 'r' or 'r+'")
    writable = mode == "r+"
    image = open_image(path, writable=writable, overwrite_in_use=overwrite_in_use)
    try:
        runner = Runner(image.scheduler, image.name)
        file_system = _open_filesystem(image, runner, writable=writable, use_reserved=use_reserved)
        whose = Owner(os.geteuid(), os.getegid()) if owner is None else Owner(*owner)
        return Volume(file_system, runner, image=image, owner=whose)
    except BaseException:
        image.close()
        raise


def _open_filesystem(image: Image, runner: Runner, *, writable: bool, use_reserved: bool) -> FileSystem:
    def opened(device: BlockDevice, writing: bool) -> FileSystem:
        return runner.run(mount(image, device, writable=writing, use_reserved=use_reserved))

    if image.align_bytes > SMALLEST_BLOCK_BYTES:
        # Blocks smaller than what the device takes cannot go past the page cache; a look says how large they are.
        with image.beside() as device:
            file_system = opened(device, False)
            runner.run(file_system.close())
        if file_system.block_bytes % image.align_bytes:
            image.use_cache()
    return opened(image.device, writable)


class Volume(VolumeNames, VolumeFacts):
    """An open volume: its files and directories in the manner of `os`, by paths from its root.

    Any thread may call; a context manager. `volume / "name"` is a `VolumePath`. A forked child cannot use
    it, and opens the volume itself. Made by `open_volume`.
    """

    def __init__(self, file_system: FileSystem, runner: Runner, *, image: Image | None, owner: Owner = ROOT) -> None:
        """image: what it is on, closed with the volume; None for a file system that is on nothing."""
        super().__init__(
            file_system,
            runner,
            reasons={} if image is None else image.reasons,
            seen=_as_it_is if image is None else image.seen,
            owner=owner,
        )
        self._image = image
        self._closed = False
        _open.add(self)

    # What it is.

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    def __repr__(self) -> str:
        return self._shown("odirect.Volume")

    def __truediv__(self, segment: AnyPath) -> VolumePath:
        return VolumePath(self, segment)

    @property
    def root(self) -> VolumePath:
        """The root directory as a `VolumePath`."""
        return VolumePath(self)

    # As a whole.

    def statfs(self) -> os.statvfs_result:
        """How full it is, as `os.statvfs` gives it."""
        return statvfs_result(self.run(self.file_system.space(), self.name), writable=self.writable)

    def sync(self) -> None:
        """Make everything durable: files and names."""
        self.run(self.file_system.sync(), self.name)

    def check(self) -> list[Finding]:
        """What is wrong with it, found by a walk that only reads."""
        return self.run(self.file_system.check(), self.name)

    @overload
    def read_files(self, top: bytes | os.PathLike[bytes]) -> Iterator[tuple[bytes, bytes]]: ...
    @overload
    def read_files(self, top: str | os.PathLike[str] | InVolume = "/") -> Iterator[tuple[str, bytes]]: ...
    def read_files(self, top: AnyPath = "/") -> Iterator[tuple[str, bytes]] | Iterator[tuple[bytes, bytes]]:
        """(path, content) of every regular file below the directory `top`, or of the file that `top` is.

        In the order in which they lie on the device, many at a time, the next ones being read while some are
        handed out: much quicker than to open one after the other. Symbolic links below `top` are not followed; a file
        with several names comes with each. Contents are whole, so where a file may be too large for memory use
        `walk` and `open`. The tree is looked at first: do not change it meanwhile.

        Raises MissingError, DeviceError, CorruptionError, UnsupportedError for a file that has gone since.
        """
        return read_files(self, top)  # type: ignore[return-value]

    def copy_in(
        self,
        source: Path,
        target: AnyPath,
        *,
        recursive: bool = True,
        attributes: bool = True,
        progress: Progress | None = None,
    ) -> TreeReport:
        """A report of copying `source`, a file or directory of the host, to `target` in the volume.

        Where `target` is a directory, the copy goes into it under the source's name; but what is in the source
        goes into it, if that ends with a slash. Directories that are there are filled, other things replaced.
        Kept are: kinds, permissions, holes, hard links within the tree, symbolic links as they are
        written; with attributes also owners, times and extended attributes. `source` itself may be a
        symbolic link, which is followed.
        progress: called with (bytes done, bytes in all); what it raises ends the copy.

        If anything fails, the file that was being copied is not left behind, others are. What could
        not be kept is in the report. Raises NoSpaceError, DirectoryError, NotDirectoryError, InUseError if a
        source changes meanwhile, and the errors of both sides.
        """
        return copy_in(self, source, target, recursive=recursive, attributes=attributes, progress=progress)

    def copy_out(
        self,
        source: AnyPath,
        target: Path,
        *,
        recursive: bool = True,
        attributes: bool = True,
        progress: Progress | None = None,
    ) -> TreeReport:
        """A report of copying `source`, a file or directory of the volume, to `target` on the host.

        The same as `copy_in` the other way. Nothing is written outside `target`, whatever the volume holds: no
        symbolic link below it is followed. Each file takes its name when it is whole; one that is in use (behind a loop
        device, as swap, locked by another program) is not replaced: InUseError. Without privileges,
        owners and devices are left out, and the report says so.
        """
        return copy_out(self, source, target, recursive=recursive, attributes=attributes, progress=progress)

    # Closing.

    def close(self) -> None:
        """Close its files, make everything durable, mark it clean and let go of it. Twice is harmless.

        Raises what cannot be written; it is closed all the same. RuntimeError in the middle of a call of this
        thread. In a forked child it lets go of the descriptors and leaves the rest to the parent.
        """
        if self._closed:
            return
        if self.runner.forked:
            self._closed = True
            if self._image is not None:
                self._image.forget()
            return
        self.runner.check_outside()
        failed: ODirectError | None = None
        for file in self.open_files():
            try:
                file.close()
            except ODirectError as error:
                failed = failed or error
        try:
            self.runner.close(self.file_system.close())
        except ODirectError as error:
            raise named(error, self.name) from failed
        finally:
            if self.runner.closed:
                self._closed = True
                if self._image is not None:
                    self._image.close()
        if failed is not None:
            raise failed

    def __enter__(self) -> Volume:
        self.runner.check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Nobody is inside, so its scheduler is at rest and can be used once more.
        if getattr(self, "_closed", True):
            return
        if sys.is_finalizing():
            self._closed = True
            return
        if not self.runner.forked:
            warnings.warn(f"a volume was not closed: {self!r}", ResourceWarning, stacklevel=2, source=self)
        self.close()


#: Closed when the program ends, if nobody has done so.
_open: weakref.WeakSet[Volume] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for volume in list(_open):
        with contextlib.suppress(Exception):
            volume.close()


def _close_before_workers() -> None:
    """The same, while a ring on threads still has its workers; but not while threads of the program go on."""
    main = threading.main_thread()
    if all(each is main or each.daemon or each.name.startswith("odirect-") for each in threading.enumerate()):
        _close_all()


# What `concurrent.futures` ends its own workers by; it has no public name. Who registers last is called first: that
# module is imported above, so that it has registered already.
getattr(threading, "_register_atexit", atexit.register)(_close_before_workers)


def _as_it_is(op: int, outcome: Outcome) -> Outcome:
    return outcome
