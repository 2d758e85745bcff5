"""The documents say what is there: rows with proofs, files with lines, examples that run."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" / "odirect"

#: The rows of docs/direct-io.md that this version stands for.
ROWS = [
    *(f"B{number:02d}" for number in range(1, 10)),
    *(f"G{number:02d}" for number in range(1, 21)),
    *(f"F{number:02d}" for number in range(1, 9)),
    *(f"F{number}" for number in range(10, 14)),
    *(f"F{number}" for number in range(20, 25)),
    "F30",
    *(f"F{number}" for number in range(33, 36)),
    *(f"F{number}" for number in range(40, 44)),
    *(f"F{number}" for number in range(50, 54)),
]

# --- docs/direct-io.md: rows, where they live, what proves them ---------------------------------


class Row:
    """One row of the table: id, what must hold, source files, tests."""

    def __init__(self, line: str) -> None:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if len(cells) != 4:
            raise ValueError(f"docs/direct-io.md: {len(cells)} cells instead of 4: {line}")
        self.id, self.holds = cells[0], cells[1]
        self.files = re.findall(r"`([^`]+)`", cells[2])
        self.tests = re.findall(r"`([^`]+)`", cells[3])


@functools.cache
def table() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for line in (ROOT / "docs" / "direct-io.md").read_text().splitlines():
        if re.match(r"\| [A-Z][0-9]{2} \|", line):
            row = Row(line)
            assert row.id not in rows, f"{row.id} is there twice"
            rows[row.id] = row
    return rows


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _member(body: list[ast.stmt], name: str) -> Definition | None:
    for statement in body:
        if isinstance(statement, Definition) and statement.name == name:
            return statement
    return None


def _class_named(name: str) -> ast.ClassDef | None:
    """A class of the conformance suites that tests inherit from."""
    for path in sorted([*(SOURCES / "testing").glob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        found = _member(_tree(path).body, name)
        if isinstance(found, ast.ClassDef):
            return found
    return None


def _inherited(owner: ast.ClassDef, name: str) -> tuple[ast.ClassDef, Definition] | None:
    """`name` in `owner` or in what it inherits from, with the class that has it."""
    found = _member(owner.body, name)
    if found is not None:
        return owner, found
    for base in owner.bases:
        base_name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
        base_class = _class_named(base_name)
        if base_class is not None:
            above = _inherited(base_class, name)
            if above is not None:
                return above
    return None


def _texts_of(test: str) -> list[str]:
    """Name and docstrings of a test and of what it is in. Raises LookupError if there is no such test."""
    place, *names = test.split("::")
    path = ROOT / place
    if not path.is_file() or not 1 <= len(names) <= 2:
        raise LookupError(f"{test}: no such file, or not FILE::TEST or FILE::CLASS::TEST")
    tree = _tree(path)
    texts = [ast.get_docstring(tree) or ""]
    found = _member(tree.body, names[0])
    if found is None:
        raise LookupError(f"{test}: {place} has no {names[0]}")
    texts += [found.name, ast.get_docstring(found) or ""]
    if len(names) == 2:
        inherited = _inherited(found, names[1]) if isinstance(found, ast.ClassDef) else None
        if inherited is None:
            raise LookupError(f"{test}: {names[0]} has no {names[1]}")
        owner, found = inherited
        texts += [ast.get_docstring(owner) or "", found.name, ast.get_docstring(found) or ""]
    if isinstance(found, ast.ClassDef) or not found.name.startswith("test"):
        raise LookupError(f"{test}: not a test")
    return texts


def test_the_table_has_every_row_and_no_other() -> None:
    assert sorted(table()) == sorted(ROWS)


@pytest.mark.parametrize("row_id", ROWS)
def test_row_lives_somewhere(row_id: str) -> None:
    """Each row says what must hold, and every file that it names is there."""
    row = table()[row_id]
    assert len(row.holds) > 20
    assert row.files, f"{row_id} names no source file"
    assert [name for name in row.files if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("row_id", ROWS)
def test_row_is_proven(row_id: str) -> None:
    """Each row names at least one test; each of these exists and quotes the row."""
    row = table()[row_id]
    assert row.tests, f"{row_id} names no test"
    for test in row.tests:
        assert any(re.search(rf"{row_id}(?![0-9])", text, re.IGNORECASE) for text in _texts_of(test)), (
            f"{test} does not quote {row_id} in its name or docstring"
        )


# --- ARCHITECTURE.md: a line for every file -----------------------------------------------------


def _is_only_a_docstring(path: Path) -> bool:
    return len(_tree(path).body) <= 1 and ast.get_docstring(_tree(path)) is not None


def test_architecture_has_a_line_for_every_file() -> None:
    """ARCHITECTURE.md lists the source files, each once, and none that is missing."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listed = re.findall(r"^- `([^`]+\.pyx?)`: \S", text, re.MULTILINE)
    present = {
        str(path.relative_to(SOURCES))
        for path in [*SOURCES.rglob("*.py"), *SOURCES.rglob("*.pyx")]
        if not (path.name == "__init__.py" and _is_only_a_docstring(path))
    }
    assert sorted(present - set(listed)) == [], "files without a line"
    assert sorted(set(listed) - present) == [], "lines without a file"
    assert len(listed) == len(set(listed)), "a file has two lines"


@pytest.mark.parametrize("source", sorted(str(path.relative_to(ROOT)) for path in SOURCES.rglob("*.pyx")))
def test_native_module_has_its_types(source: str) -> None:
    """A .pyi lies beside every .pyx."""
    assert (ROOT / source).with_suffix(".pyi").is_file()


# --- README.md: the examples run ----------------------------------------------------------------


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_readme_example_runs(number: int, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python example of the README runs as it stands, on a `data.bin` of 64 MiB and an empty `disk.img`."""
    with open(scratch / "data.bin", "wb") as file:
        file.truncate(64 << 20)
        file.write(b"not a hole" * 1000)
    made = [sys.executable, "-m", "odirect.cli.main", "mkfs", "ext2", str(scratch / "disk.img"), "--size", "256M"]
    subprocess.run(made, check=True, capture_output=True)
    monkeypatch.chdir(scratch)
    exec(compile(_blocks("python")[number], f"README.md, example {number + 1}", "exec"), {"__name__": "example"})


def test_readme_names_only_options_that_there_are() -> None:
    """Each `odirect VERB --option` in the README's shell examples is known to the command."""
    from click.testing import CliRunner

    from odirect.cli.main import cli

    used = 0
    for block in _blocks("sh"):
        for line in block.splitlines():
            words = line.split("#")[0].split()
            if not words or words[0] != "odirect":
                continue
            used += 1
            help_text = CliRunner().invoke(cli, [words[1], "--help"])
            assert help_text.exit_code == 0, line
            for word in words[2:]:
                if word.startswith("--"):
                    assert re.search(rf"(?<![\w-]){word.split('=')[0]}(?![\w-])", help_text.output), (
                        f"{word} in: {line}"
                    )
    assert used >= 3


# --- every file ---------------------------------------------------------------------------------


def _our_files() -> list[Path]:
    kinds = ("*.py", "*.pyx", "*.pyi", "*.md", "*.toml", "*.in", "Makefile")
    rooms = ("src", "tests", "tools", "bench", "docs", ".ci")
    files = [path for kind in kinds for path in ROOT.glob(kind)]
    files += [path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()]
    return [path for path in files if path.suffix not in (".so", ".c", ".pyc") and ".egg-info" not in str(path)]


def test_no_file_names_a_place_of_one_machine() -> None:
    """No path into somebody's home or working directory, and not where this tree happens to lie."""
    homes = re.compile(r"(?<![\w.])/(?:home|Users)/[a-z]|(?<![\w.])/r(?:oot)/|(?<![\w.])/w(?:ork)/")
    files = _our_files()
    assert len(files) > 30
    found = []
    for path in files:
        text = path.read_text()
        if homes.search(text) or (len(ROOT.parts) > 2 and str(ROOT) in text):
            found.append(str(path.relative_to(ROOT)))
    assert found == []


def test_documents_link_to_files_that_are_there() -> None:
    """Relative links in the Markdown files lead somewhere."""
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
            if not (path.parent / target).exists():
                broken.append(f"{path.name}: {target}")
    assert broken == []
