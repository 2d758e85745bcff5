"""Prints which tests quote which row of docs/direct-io.md, with a star where the table names them.

Arguments: the rows, all of them if none is named. A test that quotes a row need not prove it: it may
test a tool that the proof uses. Which of them go into the table is a judgement, so nothing is written there.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "direct-io.md"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def quoted(*nodes: ast.ClassDef | Function) -> set[str]:
    """The row ids in the names and docstrings of these."""
    text = " ".join(f"{node.name} {ast.get_docstring(node) or ''}" for node in nodes)
    # "F04-F08" and "B01–B03" quote their ends alone: a proof says which row it proves.
    return {
        found.upper() for found in re.findall(r"(?<![A-Za-z0-9])([BFGbfg][0-9]{2})(?![0-9])", text.replace("_", " "))
    }


def tests_by_row() -> dict[str, list[str]]:
    """Row id to the tests that quote it, as pytest names them."""
    rows: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        place = path.relative_to(ROOT)
        for node in ast.parse(path.read_text(), str(path)).body:
            found: list[tuple[str, set[str]]] = []
            if isinstance(node, Function) and node.name.startswith("test"):
                found.append((f"{place}::{node.name}", quoted(node)))
            elif isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, Function) and member.name.startswith("test"):
                        found.append((f"{place}::{node.name}::{member.name}", quoted(node, member)))
            for name, ids in found:
                for row in ids:
                    rows.setdefault(row, []).append(name)
    return rows


def main(arguments: list[str]) -> int:
    """Print the tests that quote each row, marked where the table names them; the exit status is 0."""
    wanted = {argument.upper() for argument in arguments}
    tests = tests_by_row()
    for line in TABLE.read_text().splitlines():
        row = re.match(r"\| ([A-Z][0-9]{2}) \|", line)
        if row and (not wanted or row[1] in wanted):
            print(row[1])
            for name in tests.get(row[1], []):
                print(f"  {'*' if f'`{name}`' in line else ' '} `{name}`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
