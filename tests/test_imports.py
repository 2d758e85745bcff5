"""`import odirect` is cheap: what costs is loaded when it is first needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LATER = (
    "numpy",
    "click",
    "rich",
    "asyncio",
    "ctypes",
    "concurrent.futures",
    "multiprocessing",
    "subprocess",
    "logging",
)


def _loaded(statement: str) -> set[str]:
    """The modules that `statement` loads in a fresh interpreter, over what that has loaded by itself."""
    program = (
        "import sys, json\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(json.loads(run.stdout))


@pytest.mark.parametrize("module", LATER)
def test_import_odirect_leaves_the_costly_modules_alone(module: str) -> None:
    """Bare `import odirect` loads none of these (the start-up budget)."""
    loaded = _loaded("import odirect")
    assert "odirect" in loaded
    assert module not in loaded


def test_everything_that_is_promised_can_be_had() -> None:
    """Each name in `odirect.__all__` exists, also where it is loaded late."""
    import odirect

    assert odirect.__all__
    for name in odirect.__all__:
        assert getattr(odirect, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    """A late-loading module still says AttributeError for what it has not."""
    import odirect

    name = "no_such_name"
    with pytest.raises(AttributeError, match=name):
        getattr(odirect, name)
