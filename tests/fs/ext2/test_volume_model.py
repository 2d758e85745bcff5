"""Names and files of an ext2 volume against a file system in memory: same results, same errnos, e2fsck silent."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from tests.fs.ext2.crash_kit import Fsck
from tests.fs.ext2.twins import KINDS, NAMES, ODD, ROOMY, TARGETS, TIGHT, XATTRS, Twins, run_twins
from tests.loops import mounted, needs_root

PATHS = st.sampled_from(NAMES) | st.sampled_from(NAMES) | st.sampled_from(ODD)
OFFSETS = st.sampled_from((0, 1, 512, 1000, 1024, 12 << 10, 13 << 10)) | st.integers(0, 20 << 10)
LENGTHS = st.sampled_from((1, 512, 1024, 3000, 4096))
WHICH = st.integers(0, 3)
ACCESS = st.sampled_from(("auto", "buffered"))


@pytest.fixture(scope="module")
def fsck() -> Iterator[Fsck]:
    with Fsck() as fsck:
        yield fsck


def machine_over(fsck: Fsck, image: tuple[Any, ...]) -> type[RuleBasedStateMachine]:
    """A machine whose volumes begin as `image`."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.twins = Twins(image)
            self.failed = False

        @rule(
            path=PATHS, kind=st.sampled_from(KINDS), mode=st.sampled_from((0o644, 0o2755)), gid=st.sampled_from((0, 7))
        )
        def create(self, path: bytes, kind: int, mode: int, gid: int) -> None:
            self.twins.create(path, kind | mode, 3, gid, 0x103)

        @rule(path=PATHS)
        def make_directory(self, path: bytes) -> None:
            self.twins.create(path, stat.S_IFDIR | 0o755, 0, 0)

        @rule(path=PATHS)
        def make_file(self, path: bytes) -> None:
            self.twins.create(path, stat.S_IFREG | 0o644, 0, 0)
            self.twins.open(path)

        @rule(path=PATHS, leads_to=st.sampled_from(TARGETS))
        def symlink(self, path: bytes, leads_to: bytes) -> None:
            self.twins.symlink(path, leads_to)

        @rule(source=PATHS, path=PATHS)
        def link(self, source: bytes, path: bytes) -> None:
            self.twins.link(source, path)

        @rule(source=PATHS, path=PATHS)
        def rename(self, source: bytes, path: bytes) -> None:
            self.twins.rename(source, path)

        @rule(path=PATHS)
        def unlink(self, path: bytes) -> None:
            self.twins.unlink(path)

        @rule(path=PATHS)
        def rmdir(self, path: bytes) -> None:
            self.twins.rmdir(path)

        @rule(path=PATHS, follow=st.booleans())
        def look(self, path: bytes, follow: bool) -> None:
            self.twins.stat(path, follow)
            self.twins.read_link(path)
            self.twins.readdir(path)

        @rule(
            path=PATHS,
            mode=st.sampled_from((0o600, 0o6755)),
            uid=st.sampled_from((0, 70000)),
            time=st.integers(0, 1 << 60),
        )
        def set_attributes(self, path: bytes, mode: int, uid: int, time: int) -> None:
            self.twins.set_attributes(path, {"mode": mode, "uid": uid, "mtime_ns": time})

        @rule(path=PATHS, name=st.sampled_from(XATTRS), value=st.sampled_from((None, b"", b"value", b"v" * 150)))
        def set_xattr(self, path: bytes, name: bytes, value: bytes | None) -> None:
            self.twins.set_xattr(path, name, value)
            self.twins.xattrs(path)

        @rule(path=PATHS)
        def open(self, path: bytes) -> None:
            self.twins.open(path)

        @rule(which=WHICH, offset=OFFSETS | st.none(), length=LENGTHS, value=st.integers(1, 199), access=ACCESS)
        def write(self, which: int, offset: int | None, length: int, value: int, access: str) -> None:
            self.twins.write(which, offset, length, value, access)

        @rule(which=WHICH, offset=OFFSETS, length=LENGTHS, access=ACCESS)
        def read(self, which: int, offset: int, length: int, access: str) -> None:
            self.twins.read(which, offset, length, access)

        @rule(which=WHICH, size=OFFSETS)
        def truncate(self, which: int, size: int) -> None:
            self.twins.truncate(which, size)

        @rule(which=WHICH, offset=OFFSETS, length=LENGTHS)
        def punch(self, which: int, offset: int, length: int) -> None:
            self.twins.punch(which, offset, length)

        @rule(which=WHICH)
        def close(self, which: int) -> None:
            self.twins.close(which)

        @rule(which=WHICH)
        def sync(self, which: int) -> None:
            self.twins.fsync(which)
            self.twins.sync()

        @rule()
        def reopen(self) -> None:
            self.twins.reopen()

        def teardown(self) -> None:
            self.twins.judge(fsck)

    return Machine


@pytest.mark.parametrize("image", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_every_operation_answers_as_the_model(image: tuple[Any, ...], fsck: Fsck) -> None:
    """F13, F30, F33: names, attributes and bytes, and what is refused, found by hypothesis."""
    run_state_machine_as_test(
        machine_over(fsck, image),
        settings=settings(
            max_examples=12, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("image", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_random_programs(image: tuple[Any, ...], fsck: Fsck) -> None:
    """The same with longer programs, from seeds."""
    for seed in range(6):
        run_twins(seed, 200, image, fsck)


@pytest.mark.slow
@pytest.mark.parametrize("image", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_many_random_programs(image: tuple[Any, ...], fsck: Fsck) -> None:
    """And more of them."""
    for seed in range(100, 130):
        run_twins(seed, 250, image, fsck)


def test_linux_sees_the_same_names(fsck: Fsck, scratch: Path) -> None:
    """F13: some of the volumes, mounted: every name, attribute, extended attribute and byte."""
    needs_root()
    for seed in range(200, 203):
        twins = run_twins(seed, 200, ROOMY, fsck)
        image = scratch / "image"
        image.write_bytes(twins.device.data)
        with mounted(image, "ext2", "ro,noatime") as point:
            twins.compare_mounted(point)
