"""`odirect ls` and `odirect stat`."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.cli.images import change, debugfs, image_in, odirect, refused, said, told
from tests.cli.test_main import STARTER
from tests.loops import mounted, needs_root, run

from odirect.cli import names
from odirect.fs.base import Attributes


@pytest.fixture
def image(scratch: Path) -> Any:
    """An image with one of each kind, made by debugfs."""
    (scratch / "hello").write_bytes(b"hello\n" * 1000)
    with image_in(scratch) as image:
        change(
            image,
            f"write {scratch / 'hello'} hello",
            "mkdir sub",
            "mkdir sub/deep",
            f"write {scratch / 'hello'} sub/.hidden",
            "symlink link ../somewhere/else",
            "symlink way /sub",
            "mknod block b 8 1",
            "mknod char c 5 100",
            "mknod fifo p",
            "set_inode_field hello mode 0104751",
            "set_inode_field hello uid 1234",
            "set_inode_field hello gid 70000",
            "set_inode_field hello mtime 20190203040506",
        )
        yield image


def test_names_are_sorted(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = ["block", "char", "fifo", "hello", "link", "lost+found", "sub", "way"]
    assert said(capsys, "ls", f"{image}:/").split() == expected
    assert said(capsys, "ls", "-1", f"{image}:").split() == expected


def test_hidden_ones_when_asked_for(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "ls", f"{image}:/sub").split() == ["deep"]
    assert said(capsys, "ls", "-a", f"{image}:/sub").split() == [".hidden", "deep"]


def test_the_long_form_is_that_of_ls(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Line by line what the system's own ls says of the same volume, mounted."""
    needs_root()
    ours = said(capsys, "ls", "-la", f"{image}:/").splitlines()
    with mounted(image, "ext2", "ro") as point:
        theirs = subprocess.run(
            ["ls", "-lnA", point], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
        ).stdout.splitlines()
    assert [line.split() for line in ours] == [line.split() for line in theirs]
    assert any(line.startswith("-rwsr-x--x 1 1234 70000") and "Feb  3  2019 hello" in line for line in ours)
    assert any(line.endswith("link -> ../somewhere/else") for line in ours)
    assert any(re.match(r"c--------- 1 +0 +0 +5, 100 ", line) for line in ours)


def test_recursion(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "ls", "-Ra", f"{image}:/")
    blocks = [block.splitlines() for block in out.split("\n\n")]
    assert [block[0] for block in blocks] == [f"{image}:/{name}:" for name in ("", "lost+found", "sub", "sub/deep")]
    assert blocks[2][1:] == [".hidden", "deep"]


def test_links_on_the_command_line(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to a directory is that directory, but for -l and -d; what it leads to starts at the volume's root."""
    assert said(capsys, "ls", f"{image}:/way") == "deep\n"
    assert said(capsys, "ls", "-d", f"{image}:/way") == f"{image}:/way\n"
    assert said(capsys, "ls", "-l", f"{image}:/way").endswith(f"{image}:/way -> /sub\n")
    assert said(capsys, "ls", "-l", f"{image}:/way/").splitlines()[1].endswith("deep")
    assert said(capsys, "ls", f"{image}:/link") == f"{image}:/link\n"


def test_several(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "ls", f"{image}:/sub", f"{image}:/hello", f"{image}:/sub/deep")
    assert out == f"{image}:/hello\n\n{image}:/sub:\ndeep\n\n{image}:/sub/deep:\n"


def test_one_that_is_missing_keeps_no_other_away(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert odirect("ls", f"{image}:/missing", f"{image}:/sub") == 2
    captured = capsys.readouterr()
    assert captured.out == f"{image}:/sub:\ndeep\n"
    assert captured.err.startswith(f"odirect: {image}:/missing: ") and captured.err.count("\n") == 1


def test_json(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {entry["name"]: entry for entry in told(capsys, "ls", "-R", "--json", f"{image}:/")}
    hello = found["hello"]
    assert hello["path"] == "/hello" and hello["image"] == str(image) and hello["size"] == 6000
    assert hello["mode"] == "-rwsr-x--x" and hello["permissions"] == "4751"
    assert (hello["uid"], hello["gid"]) == (1234, 70000)
    assert hello["mtime_ns"] // 10**9 == 1549166706
    assert found["link"]["target"] == "../somewhere/else"
    assert found["block"]["device"] == {"major": 8, "minor": 1}
    assert found["deep"]["path"] == "/sub/deep" and ".hidden" not in found
    assert f"Inode: {hello['inode']} " in debugfs(image, "stat hello").replace("  ", " ")


def test_names_that_are_no_utf8(scratch: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """As they are to a pipe, coded with -b, with their bytes in JSON, and they can be given back to us."""
    with image_in(scratch) as image:
        (scratch / "x").write_bytes(b"odd")
        name = b"a\xff b\nc"
        assert odirect("cp", "-q", scratch / "x", os.fsdecode(os.fsencode(f"{image}:/") + name)) == 0
        assert odirect("ls", f"{image}:/") == 0
        assert capfdbinary.readouterr().out == name + b"\nlost+found\n"
        assert odirect("ls", "-b", f"{image}:/") == 0
        assert capfdbinary.readouterr().out == b"a\\377\\ b\\nc\nlost+found\n"
        assert odirect("ls", "--json", f"{image}:/") == 0
        assert name.hex().encode() in capfdbinary.readouterr().out
        assert odirect("cat", os.fsdecode(os.fsencode(f"{image}:/") + name)) == 0
        assert capfdbinary.readouterr().out == b"odd"
        assert odirect("stat", os.fsdecode(os.fsencode(f"{image}:/") + name)) == 0
        assert "a\ufffd b".encode() in capfdbinary.readouterr().out


def test_on_a_terminal_names_are_in_columns_and_quoted(scratch: Path) -> None:
    with image_in(scratch) as image:
        change(image, 'mkdir "two words"', "mkdir plain")
        master, slave = pty.openpty()
        try:
            child = subprocess.run([*STARTER, "ls", f"{image}:/"], stdout=slave, check=True)
            assert child.returncode == 0
            assert os.read(master, 4096) == b"lost+found  plain  'two words'\r\n"
        finally:
            os.close(slave)
            os.close(master)


@pytest.mark.parametrize(
    "name,shown",
    [
        (b"plain-1.x", "plain-1.x"),
        (b"two words", "'two words'"),
        (b"it's", '"it\'s"'),
        (b"$it's", "'$it'\\''s'"),
        (b"\xff", "''$'\\377'"),
        (b"a\xffb", "'a'$'\\377''b'"),
        (b"a\nb", "'a'$'\\n''b'"),
        ("grün".encode(), "'grün'"),
    ],
)
def test_a_shell_reads_the_name_again(name: bytes, shown: str) -> None:
    assert names.for_shell(name) == shown
    read = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True).stdout
    assert read == name


def test_times() -> None:
    now = time.mktime((2026, 11, 21, 16, 0, 0, 0, 0, -1))
    assert names.short_time(int(now - 3600) * 10**9, now) == "Nov 21 15:00"
    assert names.short_time(int(now - 300 * 86400) * 10**9, now).endswith("  2026")
    assert names.short_time(int(now + 3600) * 10**9, now) == "Nov 21  2026"
    assert re.fullmatch(r"2026-11-21 16:00:00\.000000007 [+-]\d{4}", names.full_time(int(now) * 10**9 + 7))


def test_columns() -> None:
    assert names.in_columns(["a", "b", "c"], 80) == ["a  b  c"]
    assert names.in_columns(["aaaa", "b", "c"], 7) == ["aaaa  c", "b"]
    assert names.in_columns(["aaaa", "bbbb"], 3) == ["aaaa", "bbbb"]
    assert names.in_columns([], 80) == []


def test_a_row_of_a_device() -> None:
    attributes = Attributes(5, 0o060640, 1, 0, 6, 0, 0, 1024, 0, 0, 0, os.makedev(8, 17))
    row = names.long_row(attributes, "sdb1", None, 10**9)
    assert row == ["brw-r-----", "1", "0", "6", "8, 17", names.short_time(0, 10**9), "sdb1"]


# --- stat -----------------------------------------------------------------------------------------


def test_stat(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "stat", f"{image}:/hello", f"{image}:/link")
    assert out.startswith(f"{image}:/hello: file\n")
    assert "5.9 KiB (6000 bytes)" in out and "-rwsr-x--x (4751)" in out and "user 1234, group 70000" in out
    assert f"\n\n{image}:/link -> ../somewhere/else: symlink\n" in out
    assert "block device 8, 1" in said(capsys, "stat", f"{image}:/block")


def test_stat_json_and_attributes(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "value").write_bytes(b"\x00\xff")
    change(image, f"ea_set -f {scratch / 'value'} hello user.odd", "ea_set sub user.comment text")
    (hello,) = told(capsys, "stat", "--json", f"{image}:/hello")
    assert hello["xattrs"] == {"user.odd": "00ff"} and hello["block_bytes"] == 1024
    assert "user.odd = \\000\\377" in said(capsys, "stat", f"{image}:/hello")
    assert told(capsys, "stat", "-L", "--json", f"{image}:/way")[0]["xattrs"] == {"user.comment": b"text".hex()}
    assert told(capsys, "stat", "--json", f"{image}:/way")[0]["target"] == "/sub"
    assert "No such file" in refused(capsys, 2, "stat", f"{image}:/nothing")
    assert run("e2fsck", "-fn", image)
