"""Whoever uses a device or an image is found, by a real use of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loops import loop_device, made_image, mounted, needs_loop, needs_root, needs_tool, partition, run, swapped_on

from odirect.base.errors import DirectoryError, InUseError, MissingError
from odirect.block import in_use, sysfs
from odirect.block.in_use import Use, check_unused, claims


def uses(path: str | Path | int) -> list[tuple[Use, str]]:
    return [(claim.use, claim.by) for claim in claims(path)]


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    with made_image("ext4", 32 << 20, directory=scratch) as path:
        yield path


# --- what is free ---------------------------------------------------------------------------------


def test_what_nobody_uses_is_free(image: Path) -> None:
    assert claims(image) == []
    check_unused(image, what="write to")
    with loop_device(image) as device:
        assert claims(device) == []
        check_unused(device, what="write to")


def test_another_image_of_the_same_directory_is_free(image: Path, scratch: Path) -> None:
    """Files are told apart by what they are, not by where they lie."""
    other = scratch / "other"
    other.touch()
    with loop_device(image):
        assert claims(other) == []


def test_a_character_device_is_nobody_s() -> None:
    assert claims("/dev/null") == []


def test_a_path_that_is_no_file_is_refused(scratch: Path) -> None:
    with pytest.raises(DirectoryError):
        check_unused(scratch, what="write to")
    with pytest.raises(MissingError):
        check_unused(scratch / "missing", what="write to")


# --- mounts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options,mode", [("", "read-write"), ("ro", "read-only")])
def test_a_mounted_device_is_in_use(image: Path, options: str, mode: str) -> None:
    """F34: the message names the mount point and what to do."""
    with loop_device(image) as device, mounted(device, "ext4", options) as point:
        assert uses(device) == [(Use.MOUNT, os.fspath(point))]
        with pytest.raises(InUseError) as refused:
            check_unused(device, what="format")
        message = str(refused.value)
        assert "will not format it" in message and f"umount {point}" in message and mode in message
        assert refused.value.filename == device


def test_a_mount_point_with_a_space_is_named_rightly(image: Path, scratch: Path) -> None:
    point = scratch / "a b\tc\\d"
    point.mkdir()
    with loop_device(image) as device, mounted(device, "ext4", at=point):
        assert uses(device) == [(Use.MOUNT, os.fspath(point))]


def test_a_mounted_image_is_in_use(image: Path) -> None:
    """F34: a file is in use through the loop device over it, and through that one's mount."""
    with loop_device(image) as device, mounted(device, "ext4") as point:
        assert uses(image) == [(Use.MOUNT, os.fspath(point)), (Use.LOOP, device)]
        with pytest.raises(InUseError, match=f"loop device {device} over it is mounted on {point}"):
            check_unused(image, what="write to")


def test_a_mounted_btrfs_volume_is_in_use(scratch: Path) -> None:
    """F34: btrfs mounts have device numbers of their own."""
    with made_image("btrfs", directory=scratch) as path, loop_device(path) as device:
        with mounted(device, "btrfs") as point:
            assert uses(device) == [(Use.MOUNT, os.fspath(point))]
        assert claims(device) == []


def test_every_device_of_a_btrfs_volume_is_in_use(scratch: Path) -> None:
    """F34: mountinfo names one of them alone."""
    with (
        made_image(None, 200 << 20, directory=scratch) as one,
        made_image(None, 200 << 20, directory=scratch) as two,
        loop_device(one) as first,
        loop_device(two) as second,
    ):
        run("mkfs.btrfs", "-q", "-f", "-d", "raid1", "-m", "raid1", first, second)
        run("btrfs", "device", "scan", first, second)
        with mounted(first, "btrfs", f"device={second}"):
            assert [use for use, _ in uses(first)] == [Use.MOUNT]
            assert [use for use, _ in uses(second)] == [Use.MOUNT]
            with pytest.raises(InUseError, match="btrfs"):
                check_unused(second, what="write to")
            assert [use for use, _ in uses(two)] == [Use.MOUNT, Use.LOOP]
        run("btrfs", "device", "scan", "--forget", first)


def test_an_external_log_is_in_use(scratch: Path) -> None:
    """F34: XFS's log may be on a device of its own, which mountinfo's options name."""
    with (
        made_image(None, 320 << 20, directory=scratch) as data,
        made_image(None, 80 << 20, directory=scratch) as log,
        loop_device(data) as data_device,
        loop_device(log) as log_device,
    ):
        run("mkfs.xfs", "-q", "-f", "-l", f"logdev={log_device}", data_device)
        with mounted(data_device, "xfs", f"logdev={log_device}") as point:
            assert uses(log_device) == [(Use.MOUNT, os.fspath(point))]


def test_partitions_count_for_their_disk_and_the_disk_for_them(scratch: Path) -> None:
    """F34: a disk with a mounted partition is in use, its other partitions are not."""
    with (
        made_image(None, 80 << 20, directory=scratch) as path,
        loop_device(path) as disk,
        partition(disk, 1 << 20, 32 << 20, 1) as first,
        partition(disk, 40 << 20, 32 << 20, 2) as second,
    ):
        run("mkfs.ext4", "-q", "-F", first)
        with mounted(first, "ext4") as point:
            assert uses(first) == uses(disk) == [(Use.MOUNT, os.fspath(point))]
            assert claims(second) == []
            with pytest.raises(InUseError, match=f"partition {os.path.basename(first)} of it is mounted"):
                check_unused(disk, what="format")
            assert uses(path)[0] == (Use.MOUNT, os.fspath(point))
        assert claims(disk) == []
        run("mkfs.ext4", "-q", "-F", disk)
        with mounted(disk, "ext4") as point:
            assert uses(first) == uses(second) == [(Use.MOUNT, os.fspath(point))]


def test_a_symbolic_link_is_followed(image: Path, scratch: Path) -> None:
    with loop_device(image) as device, mounted(device, "ext4") as point:
        for name, target in (("to-device", device), ("to-image", os.fspath(image))):
            link = scratch / name
            link.symlink_to(target)
            assert uses(link)[0] == (Use.MOUNT, os.fspath(point))


def test_a_descriptor_will_do(image: Path) -> None:
    with loop_device(image) as device, mounted(device, "ext4") as point:
        for path in (device, os.fspath(image)):
            fd = os.open(path, os.O_RDONLY)
            try:
                assert uses(fd)[0] == (Use.MOUNT, os.fspath(point))
                with pytest.raises(InUseError, match=path):
                    check_unused(fd, what="write to")
            finally:
                os.close(fd)


# --- loop devices ---------------------------------------------------------------------------------


def test_the_file_behind_a_loop_device_is_in_use(image: Path) -> None:
    with loop_device(image) as device:
        assert uses(image) == [(Use.LOOP, device)]
        with pytest.raises(InUseError, match=f"losetup -d {device}"):
            check_unused(image, what="write to")


def test_a_hard_link_to_it_is_in_use_too(image: Path, scratch: Path) -> None:
    other = scratch / "other-name"
    os.link(image, other)
    with loop_device(image) as device:
        assert uses(other) == [(Use.LOOP, device)]


def test_a_file_that_took_the_image_s_name_is_free(image: Path, scratch: Path) -> None:
    """The kernel's answer counts, not the path that it shows."""
    moved = scratch / "moved"
    with loop_device(image) as device:
        image.rename(moved)
        image.write_bytes(b"another")
        assert claims(image) == []
        assert uses(moved) == [(Use.LOOP, device)]


def test_without_the_right_to_open_loop_devices_the_path_counts(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_use, "_identity_by_ioctl", lambda name, number: None)
    with loop_device(image) as device:
        assert uses(image) == [(Use.LOOP, device)]


def test_a_loop_device_over_a_loop_device(image: Path) -> None:
    """F34: uses are found through both."""
    with loop_device(image) as inner, loop_device(inner) as outer:
        assert uses(inner) == [(Use.LOOP, outer)]
        assert uses(image) == [(Use.LOOP, outer), (Use.LOOP, inner)]
        with mounted(outer, "ext4") as point:
            assert uses(image)[0] == (Use.MOUNT, os.fspath(point))


# --- swap, holders, O_EXCL ------------------------------------------------------------------------


def test_swap_on_a_device_is_a_use(scratch: Path) -> None:
    with made_image(None, 16 << 20, directory=scratch) as path, loop_device(path) as device:
        with swapped_on(device):
            assert uses(device) == [(Use.SWAP, "")]
            with pytest.raises(InUseError, match=f"swapoff {device}"):
                check_unused(device, what="write to")
        assert claims(device) == []


def test_swap_on_a_file_is_a_use(scratch: Path) -> None:
    needs_root()
    path = scratch / "swap file"
    path.write_bytes(bytes(4 << 20))
    path.chmod(0o600)
    with swapped_on(path):
        assert uses(path) == [(Use.SWAP, "")]


def test_holders_are_uses(scratch: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices stacked on top are read from sysfs, here a made one, for few machines can stack at will."""
    with loop_device(image) as device:
        number = os.stat(device).st_rdev
        name = os.path.basename(device)
        tree = scratch / "sys"
        (tree / f"devices/{name}/holders/dm-7").mkdir(parents=True)
        (tree / f"devices/{name}/dev").write_text(f"{os.major(number)}:{os.minor(number)}\n")
        (tree / "dev/block").mkdir(parents=True)
        (tree / f"dev/block/{os.major(number)}:{os.minor(number)}").symlink_to(tree / f"devices/{name}")
        monkeypatch.setattr(sysfs, "SYS", os.fspath(tree))
        assert uses(device) == [(Use.HOLDER, "dm-7")]
        with pytest.raises(InUseError, match="dm-7"):
            check_unused(device, what="write to")


if os.path.exists("/sys/class/misc/device-mapper"):
    # A kernel without device mapper has no holder of this kind that could be found, or missed.
    def test_a_real_holder_is_a_use(image: Path) -> None:
        """A device-mapper target over the loop device."""
        needs_loop()
        needs_tool("dmsetup")
        with loop_device(image) as device:
            name = f"odirect-test-{os.getpid()}"
            run("dmsetup", "create", name, "--table", f"0 2048 linear {device} 0")
            try:
                assert [use for use, _ in uses(device)] == [Use.HOLDER]
            finally:
                run("dmsetup", "remove", name)


@contextlib.contextmanager
def held_exclusively(device: str) -> Iterator[None]:
    """Another process has the device open with O_EXCL."""
    program = "import os, sys; os.open(sys.argv[1], os.O_RDWR | os.O_EXCL); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        try:
            assert holder.stdout.readline() == b"held\n"
            yield
        finally:
            holder.stdin.close()


def test_a_program_that_holds_it_exclusively_is_a_use(image: Path) -> None:
    """F34: also what cannot be seen in /proc shows by O_EXCL; who holds it himself can leave that out."""
    with loop_device(image) as device:
        with held_exclusively(device):
            assert uses(device) == [(Use.EXCLUSIVE, "")]
            with pytest.raises(InUseError, match="exclusively"):
                check_unused(device, what="write to")
            check_unused(device, what="write to", exclusive=False)
        check_unused(device, what="write to")


def test_a_mount_that_cannot_be_seen_is_a_use(image: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F34: a mount in another namespace is not in our mountinfo; O_EXCL finds it."""
    with loop_device(image) as device, mounted(device, "ext4"):
        monkeypatch.setattr(sysfs, "mounts", list)
        assert uses(device) == [(Use.EXCLUSIVE, "")]


def test_asking_leaves_the_device_free(image: Path) -> None:
    """The O_EXCL of the question is given back."""
    with loop_device(image) as device:
        check_unused(device, what="write to")
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))


def test_what_is_mounted_is_told_without_privileges(image: Path) -> None:
    """A user without rights on the device still learns that it is mounted."""
    needs_root()
    program = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "from odirect.block.in_use import claims\n"
        "print([str(claim.use) for claim in claims(sys.argv[1])])\n"
    )
    with loop_device(image) as device, mounted(device, "ext4"):
        # The package is imported by root, whose files a user may be unable to read.
        source = "import odirect.block.in_use\n" + program
        done = subprocess.run(
            [sys.executable, "-c", source, device],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    assert done.stdout == "['mount']\n", done.stderr
