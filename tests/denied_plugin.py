"""`pytest -p tests.denied_plugin`: the whole suite with io_uring denied, as container run-times do (F53).

The filter is installed before anything is collected and cannot be taken back, so everything, child
processes included, runs on threads. Tests of io_uring itself are deselected, with the reason in the
summary; a test that is skipped because io_uring is missing would be one that this list forgot.
"""

from __future__ import annotations

import pytest
from tests.seccomp import can_deny_io_uring, deny_io_uring

_REASON = "is of io_uring itself, which is denied here"
_DESELECTED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Deny io_uring to this process."""
    if not can_deny_io_uring():
        raise pytest.UsageError("this machine's system call numbers are not known to tests/seccomp.py")
    deny_io_uring()
    config.stash[_DESELECTED] = []


def pytest_report_header() -> str:
    return "io_uring: denied by a seccomp filter"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot be tested without io_uring."""
    wanted = [item for item in items if not _is_of_io_uring(item)]
    left_out = [item for item in items if _is_of_io_uring(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        config.stash[_DESELECTED] = [item.nodeid for item in left_out]
        items[:] = wanted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out, and why."""
    left_out = config.stash[_DESELECTED]
    if left_out:
        files: dict[str, int] = {}
        for nodeid in left_out:
            file = nodeid.split("::")[0]
            files[file] = files.get(file, 0) + 1
        terminalreporter.section("deselected")
        for file, count in sorted(files.items()):
            terminalreporter.line(f"{count:5d}  {file}: {_REASON}")


def _is_of_io_uring(item: pytest.Item) -> bool:
    """Whether a test names io_uring: by the marker `io_uring`, or by a parameter such as "uring-shared"."""
    if item.get_closest_marker("io_uring") is not None:
        return True
    callspec = getattr(item, "callspec", None)
    return callspec is not None and any(map(_names_io_uring, callspec.params.values()))


def _names_io_uring(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_names_io_uring, value))
    return isinstance(value, str) and value.startswith(("uring", "io_uring"))
