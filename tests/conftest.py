"""What every test stands on: a directory on a real disk, and checks that a test leaves nothing behind.

Every test is watched for descriptors that it leaves open and for warnings that `odirect` logged
unasked; the session is watched for loop devices and mounts that are still there at its end. With
CI=true in the environment a skipped test fails the run: what is skipped there is not proven.
"""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if IN_CI else "local")

_SCRATCH_ROOT = pytest.StashKey[Path]()
_LEFT_BEHIND = pytest.StashKey[list[str]]()


# --- a directory on a real disk -----------------------------------------------------------------


def _refusal_of_direct_io(directory: Path) -> str:
    """Why O_DIRECT does not work in `directory`; "" where it does."""
    probe = directory / "probe"
    block = mmap.mmap(-1, 4096)
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.pwrite(fd, block, 0)
            os.preadv(fd, [block], 0)
        finally:
            os.close(fd)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    finally:
        block.close()
        probe.unlink(missing_ok=True)
    return ""


@pytest.fixture(scope="session")
def scratch_root(request: pytest.FixtureRequest) -> Iterator[Path]:
    """This session's directory on a disk: below ODIRECT_TEST_DIR, else /var/tmp (/tmp may be memory)."""
    home = Path(os.environ.get("ODIRECT_TEST_DIR") or "/var/tmp")
    if not home.is_dir():
        pytest.fail(f"ODIRECT_TEST_DIR={home} is not a directory")
    root = Path(tempfile.mkdtemp(prefix="odirect-tests-", dir=home)).resolve()
    request.config.stash[_SCRATCH_ROOT] = root
    try:
        refusal = _refusal_of_direct_io(root)
        if refusal:
            pytest.skip(f"{home} refuses O_DIRECT ({refusal}); set ODIRECT_TEST_DIR to a directory on a disk")
        yield root
    finally:
        # What is still mounted or looped there is reported when the session ends, and must not be
        # emptied through its mount point.
        if not _loops_and_mounts(root):
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def scratch(scratch_root: Path) -> Iterator[Path]:
    """An empty directory of the test's own, on a file system that takes O_DIRECT."""
    directory = Path(tempfile.mkdtemp(dir=scratch_root))
    try:
        yield directory
    finally:
        if not _loops_and_mounts(directory):
            shutil.rmtree(directory, ignore_errors=True)


# --- nothing is left behind ---------------------------------------------------------------------


def _descriptors() -> dict[int, str]:
    """Open descriptors of this process and what they are of."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of this very listing
    return found


def _forget_this_threads_ring() -> None:
    """The ring that a thread keeps for its next call is no leak: it goes with the thread, or here."""
    for module, kept in (("odirect.dio.here", "_threads"), ("odirect.ring.choose", "_local")):
        if module in sys.modules:
            getattr(sys.modules[module], kept).__dict__.clear()


@pytest.fixture(autouse=True)
def _no_descriptor_is_leaked(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test closes every descriptor that it opens (those of its fixtures too)."""
    before = _descriptors()
    yield
    if request.node.get_closest_marker("keeps_descriptors"):
        return
    leaked = {fd: of for fd, of in _descriptors().items() if before.get(fd) != of}
    if leaked:
        _forget_this_threads_ring()
        gc.collect()  # what only a cycle keeps open is not leaked
        leaked = {fd: of for fd, of in _descriptors().items() if before.get(fd) != of}
    if leaked:
        pytest.fail("descriptors left open: " + ", ".join(f"{fd} -> {of}" for fd, of in sorted(leaked.items())))


class LoggedWarnings(logging.Handler):
    """The warnings and errors that `odirect` logged during a test."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def expect(self, text: str) -> list[logging.LogRecord]:
        """The records whose message contains `text`, which must be some; they no longer fail the test."""
        found = [record for record in self.records if text in record.getMessage()]
        assert found, f"no warning says {text!r}; logged: {[record.getMessage() for record in self.records]}"
        self.records = [record for record in self.records if record not in found]
        return found


@pytest.fixture(autouse=True)
def logged_warnings() -> Iterator[LoggedWarnings]:
    """What `odirect` logs at WARNING and above; whatever the test has not expected fails it."""
    handler = LoggedWarnings()
    logger = logging.getLogger("odirect")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
    if handler.records:
        pytest.fail("unexpected warnings: " + "; ".join(record.getMessage() for record in handler.records))


def _unescaped(field: str) -> str:
    """A path as mountinfo writes it, with its octal escapes undone."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def _loops_and_mounts(root: Path) -> list[str]:
    """Loop devices over files below `root`, and mounts below it or of such a loop device.

    Others on this machine make theirs at the same time, so a list of all of them would not do.
    """
    inside = f"{root}/"
    left: list[str] = []
    loops = set()
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            path = backing.read_text().strip()
        except OSError:
            continue  # it has gone meanwhile
        if path.startswith(inside):
            device = f"/dev/{backing.parts[3]}"
            loops.add(device)
            left.append(f"loop device {device} over {path}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, origin = line.partition(" - ")
        point, source = _unescaped(fields.split()[4]), _unescaped(origin.split()[1])
        if f"{point}/".startswith(inside) or source in loops:
            left.append(f"mount of {source} on {point}")
    return left


# --- the session's verdict ----------------------------------------------------------------------


def _skips(config: pytest.Config) -> list[tuple[str, str]]:
    """(test or file, reason) of everything that was skipped."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    found = []
    for report in reporter.stats.get("skipped", []) if reporter else []:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found.append((report.nodeid, reason.removeprefix("Skipped: ")))
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    root = config.stash.get(_SCRATCH_ROOT, None)
    left = _loops_and_mounts(root) if root else []
    left += [f"thread {thread.name}" for thread in threading.enumerate() if not _may_stay(thread)]
    config.stash[_LEFT_BEHIND] = left
    failed = left or (IN_CI and _skips(config))
    if failed and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _may_stay(thread: threading.Thread) -> bool:
    return thread.daemon or thread is threading.main_thread() or thread is threading.current_thread()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = config.stash.get(_LEFT_BEHIND, [])
    if left:
        terminalreporter.section("left behind by the tests", red=True)
        for line in left:
            terminalreporter.line(line)
    skips = _skips(config)
    if skips:
        reasons: dict[str, int] = {}
        for _, reason in skips:
            reasons[reason] = reasons.get(reason, 0) + 1
        verdict = "; CI allows none, so this run fails" if IN_CI else ""
        terminalreporter.section(f"{len(skips)} skipped{verdict}", red=IN_CI, yellow=not IN_CI)
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            terminalreporter.line(f"{count:5d}  {reason}")
