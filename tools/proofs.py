"""Prints which tests quote which row of docs/direct-io.md; with --fill, writes them into rows that name none.

python tools/proofs.py [--fill] [ROW...]
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "direct-io.md"
#: More than a reader would look at; the first ones in the order of files are named.
MOST = 4

Function = ast.FunctionDef | ast.AsyncFunctionDef


def quoted(*nodes: ast.ClassDef | Function) -> set[str]:
    """The row ids in the names and docstrings of these."""
    text = " ".join(f"{node.name} {ast.get_docstring(node) or ''}" for node in nodes)
    # "F04-F08" and "B01–B03" quote their ends alone: a proof says which row it proves.
    return {found.upper() for found in re.findall(r"(?<![A-Za-z0-9])([BFbf][0-9]{2})(?![0-9])", text.replace("_", " "))}


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
    """Print, and fill in if asked; the exit status is the number of rows that nothing quotes."""
    fill = "--fill" in arguments
    wanted = {argument.upper() for argument in arguments if not argument.startswith("-")}
    tests = tests_by_row()
    lines, unproven = [], 0
    for line in TABLE.read_text().splitlines():
        row = re.match(r"\| ([A-Z][0-9]{2}) \|", line)
        if row and (not wanted or row[1] in wanted):
            names = tests.get(row[1], [])
            unproven += not names
            print(row[1], *(names or ["nothing"]), sep="\n    ")
            if fill and names and re.search(r"\|\s*\|$", line):
                line = re.sub(r"\|\s*\|$", "", line) + "| " + ", ".join(f"`{name}`" for name in names[:MOST]) + " |"
        lines.append(line)
    if fill:
        TABLE.write_text("\n".join(lines) + "\n")
    return unproven


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
