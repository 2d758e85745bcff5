"""A power cut at every write of random ext2 workloads, one seed each: see `crash_kit` for what must hold after.

Other seeds, as many as one has time for:  python -m tests.fs.ext2.crash_kit 0 5000
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.fs.ext2 import crash_kit
from tests.fs.ext2.crash_kit import check_crashes, random_workload, try_seed
from tests.loops import needs_filesystem, needs_loop

pytestmark = pytest.mark.slow

_AT_ONCE = 5


@pytest.fixture(scope="module", autouse=True)
def _told(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{request.module.__name__.rpartition('.')[2]}: {crash_kit.total}")


@pytest.mark.parametrize("first", range(0, 15, _AT_ONCE))
def test_seeds(first: int) -> None:
    """F11, F30, F40: one of each kind of volume, of operations one by one and side by side."""
    assert sum(try_seed(seed) for seed in range(first, first + _AT_ONCE)) > 200


@pytest.mark.parametrize("seed", [101, 102, 104])
def test_the_kernel_reads_what_is_left(seed: int) -> None:
    """What e2fsck leaves of a crash, the kernel's own ext2 reads as we do: names, contents, modes, links."""
    needs_loop()
    needs_filesystem("ext2")
    before = crash_kit.total.mounts
    check_crashes(random_workload(seed), ways=2, every=5, mount_every=6)
    assert crash_kit.total.mounts > before
