"""Names that are no UTF-8 in JSON: wherever a verb tells one, its bytes are beside it in hexadecimal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.images import image_in, told

from odirect.cli import main

NAME = b"a\xffb"


@pytest.fixture
def here(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a file and, after an `i`, of an image that holds it, in the current directory."""
    monkeypatch.chdir(scratch)
    name = os.fsdecode(NAME)
    (scratch / name).write_bytes(bytes(8192))
    with image_in(scratch) as image:
        image.rename(f"i{name}")
        try:
            assert main.run(["cp", "-q", name, f"i{name}:/"]) == 0
            yield name
        finally:
            (scratch / f"i{name}").rename(image)


def names_in(found: dict[str, Any] | list[dict[str, Any]]) -> dict[str, bytes]:
    """Every key that has its bytes beside it, with those; that the name is the same but for what it cannot say."""
    names: dict[str, bytes] = {}
    for entry in found if isinstance(found, list) else [found]:
        for key, value in entry.items():
            if key.endswith("_hex"):
                base = key.removesuffix("_hex")
                names[base] = bytes.fromhex(value)
                assert entry[base] == names[base].decode("utf-8", "replace")
            elif isinstance(value, str) and "\ufffd" in value:
                assert f"{key}_hex" in entry, key
    return names


@pytest.mark.parametrize(
    "arguments,wanted",
    [
        ("info --json NAME", {"path": NAME}),
        ("info --json iNAME:", {"image": b"i" + NAME}),
        ("explain --json NAME", {"path": NAME}),
        ("explain --json iNAME:/NAME", {"image": b"i" + NAME, "path": b"i" + NAME + b":/" + NAME}),
        ("check --json iNAME", {"image": b"i" + NAME}),
        ("cp --json NAME /NAME2", {"source": NAME, "target": b"/NAME2"}),
        ("cp --json NAME iNAME:/2NAME", {"source": NAME, "target": b"i" + NAME + b":/2" + NAME}),
        ("cp --json iNAME:/NAME 2NAME", {"source": b"i" + NAME + b":/" + NAME, "target": b"2" + NAME}),
        ("mkfs ext2 mNAME --size 4M --json --label lNAME", {"image": b"m" + NAME, "label": b"l" + NAME}),
        ("stat --json iNAME:/NAME", {"image": b"i" + NAME, "path": b"/" + NAME}),
        ("ls --json iNAME:/NAME", {"image": b"i" + NAME, "path": b"/" + NAME, "name": NAME}),
        ("bench --json --number 1 --bs 4k NAME", {"file": NAME}),
        ("bench --json --number 1 --bs 4k iNAME:/NAME", {"file": b"i" + NAME + b":/" + NAME}),
    ],
)
def test_every_verb(
    arguments: str, wanted: dict[str, bytes], here: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two names that look alike in JSON can be told apart."""
    if "/NAME2" in arguments:
        arguments = arguments.replace("/NAME2", f"{scratch}/NAME2")
        wanted = {**wanted, "target": os.fsencode(f"{scratch}/") + NAME + b"2"}
    words = [word.replace("NAME", here) for word in arguments.split()]
    assert main.run(words) == 0
    assert names_in(json.loads(capsys.readouterr().out)) == wanted


def test_a_label(here: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["mkfs", "ext2", "new.img", "--size", "4M", "-q", "--label", here]) == 0
    assert names_in(told(capsys, "info", "--json", "new.img:")) == {"label": NAME}


def test_plain_names_have_nothing_beside_them(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "grün").write_bytes(bytes(4096))
    for verb in ("info", "explain"):
        found = told(capsys, verb, "--json", scratch / "grün")
        assert found["path"] == f"{scratch}/grün" and "path_hex" not in found


def test_attributes_that_look_alike(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Extended attributes are told by their bytes where their names are no UTF-8."""
    with image_in(scratch) as image:
        from odirect import open_volume

        with open_volume(image, "r+") as volume:
            (volume / "x").write_bytes(b"x")
            for name in (b"user.\xfe", b"user.\xff", b"user.plain"):
                volume.set_xattr("/x", name, b"of " + name)
        (found,) = told(capsys, "stat", "--json", f"{image}:/x")
        assert found["xattrs"]["user.plain"] == b"of user.plain".hex()
        exact: dict[str, Any] = {name.hex(): (b"of " + name).hex() for name in (b"user.\xfe", b"user.\xff")}
        assert found["xattrs_hex"] == exact
