"""Loop devices, mounts and images for tests, all taken away again whatever happens.

Each is a context manager. What cannot be done here skips the test with the reason; what should work
and does not fails it with the tool's own words.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

Pathish = str | os.PathLike[str]

#: The smallest image that each mkfs takes, with some room.
SMALLEST = {"ext2": 8 << 20, "ext3": 16 << 20, "ext4": 16 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}

_MKFS_FLAGS = {
    "ext2": ["-q", "-F"],
    "ext3": ["-q", "-F"],
    "ext4": ["-q", "-F"],
    "xfs": ["-q", "-f"],
    "btrfs": ["-q", "-f"],
}


# --- what a test needs ---------------------------------------------------------------------------


def needs_root() -> None:
    """Skip the test unless it runs as root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


def needs_tool(name: str) -> str:
    """The path of a tool, looked for in the sbin directories too; skips the test where it is missing."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def needs_filesystem(name: str) -> None:
    """Skip the test unless the running kernel has this file system (built in, or loadable)."""
    listed = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    if name in listed:
        return
    modprobe = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if modprobe is None or subprocess.run([modprobe, "-q", name], check=False).returncode != 0:
        pytest.skip(f"needs a kernel with {name}")


def needs_loop() -> None:
    """Skip the test unless loop devices can be made here."""
    needs_root()
    needs_tool("losetup")
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("needs loop devices (/dev/loop-control)")


def run(*command: Pathish) -> str:
    """What the command printed; a failure fails the test with all that it said."""
    words = [os.fspath(word) for word in command]
    words[0] = needs_tool(words[0])
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(words)} failed ({done.returncode}): {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# --- loop devices --------------------------------------------------------------------------------


@contextlib.contextmanager
def loop_device(path: Pathish, sector: int = 512, read_only: bool = False, *, direct_io: bool = True) -> Iterator[str]:
    """The path of a loop device over the image at `path`, with sectors of 512 to 4096 bytes."""
    needs_loop()
    options = [f"--direct-io={'on' if direct_io else 'off'}", f"--sector-size={sector}"]
    options += ["--read-only"] if read_only else []
    device = run("losetup", "--find", "--show", *options, path).strip()
    try:
        yield device
    finally:
        # Detaching is put off by the kernel while somebody (udev, a failed test) has it open.
        subprocess.run([needs_tool("losetup"), "--detach", device], check=False, capture_output=True)
        # Who opens the image next must not be told that it is still behind the device.
        behind = f"/sys/block/{os.path.basename(device)}/loop/backing_file"
        give_up = time.monotonic() + 10
        while os.path.exists(behind) and time.monotonic() < give_up:
            os.sched_yield()


@contextlib.contextmanager
def partition(disk: str, start: int, length: int, number: int = 1) -> Iterator[str]:
    """The path of a partition of `disk`, in bytes, told to the kernel by hand: no partition table is needed."""
    run("addpart", disk, str(number), str(start // 512), str(length // 512))
    try:
        yield f"{disk}p{number}"
    finally:
        subprocess.run([needs_tool("delpart"), disk, str(number)], check=False, capture_output=True)


@contextlib.contextmanager
def swapped_on(path: Pathish) -> Iterator[None]:
    """The file or device at `path` is made swap and used; skips the test where that is forbidden."""
    needs_root()
    run("mkswap", path)
    done = subprocess.run([needs_tool("swapon"), path], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"swapon is refused here: {done.stderr.strip()}")
    try:
        yield
    finally:
        run("swapoff", path)


# --- mounts --------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(
    device_or_image: Pathish, fstype: str, options: str = "", *, sector: int = 512, at: Pathish | None = None
) -> Iterator[Path]:
    """The directory where a device, or an image through a loop device with `sector`, is mounted.

    For fstype "tmpfs" the device is only a name. Without `at` the directory is made and removed.
    """
    needs_root()
    needs_tool("mount")
    needs_filesystem(fstype)
    with contextlib.ExitStack() as stack:
        source = os.fspath(device_or_image)
        if fstype != "tmpfs" and stat.S_ISREG(os.stat(source).st_mode):
            read_only = "ro" in options.split(",")
            source = stack.enter_context(loop_device(source, sector, read_only=read_only))
        if at is None:
            point = Path(tempfile.mkdtemp(prefix="odirect-mount-", dir="/var/tmp"))
            stack.callback(_remove_directory, point)
        else:
            point = Path(at)
        run("mount", "-t", fstype, *(["-o", options] if options else []), source, point)
        stack.callback(_unmount, point)
        yield point


def _unmount(point: Path) -> None:
    """Unmount, lazily if a failed test still has a file open there: the loop device goes with the last file."""
    umount = needs_tool("umount")
    first = subprocess.run([umount, point], check=False, capture_output=True, text=True)
    if first.returncode:
        lazy = subprocess.run([umount, "--lazy", point], check=False, capture_output=True)
        if os.path.ismount(point) or lazy.returncode:
            raise RuntimeError(f"cannot unmount {point}: {first.stderr.strip()}")


def _remove_directory(point: Path) -> None:
    with contextlib.suppress(OSError):
        point.rmdir()  # never rmtree: it may still be a mount


# --- images --------------------------------------------------------------------------------------


@contextlib.contextmanager
def made_image(
    fstype: str | None,
    size: int | None = None,
    *,
    directory: Pathish = "/var/tmp",
    mkfs: Sequence[str] = (),
    sector: int = 512,
) -> Iterator[Path]:
    """A sparse image file with a fresh file system (None: all zeroes), removed afterwards.

    `size` is in bytes, by default the smallest that mkfs takes; `mkfs` are further options of its.
    `sector` is the sector size to format for (XFS writes it down; the others go by the block size).
    """
    tool = None if fstype is None else needs_tool(f"mkfs.{fstype}")
    if size is None:
        size = SMALLEST[fstype] if fstype else 16 << 20
    fd, name = tempfile.mkstemp(prefix="image-", suffix=f".{fstype or 'raw'}", dir=directory)
    os.close(fd)
    path = Path(name)
    try:
        os.truncate(path, size)
        if tool is not None and fstype is not None:
            flags = list(_MKFS_FLAGS[fstype])
            if fstype == "xfs" and sector != 512:
                flags += ["-s", f"size={sector}"]
            if fstype.startswith("ext") and sector > 1024:
                flags += ["-b", str(max(sector, 4096))]
            run(tool, *flags, *mkfs, path)
        yield path
    finally:
        path.unlink(missing_ok=True)
