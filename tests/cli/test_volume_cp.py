"""`odirect cp` and `cat` with volumes: into one, out of one, between two and within one."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.images import MIB, change, contents, debugfs, fsck, image_in, odirect, refused, said, some_bytes, told
from tests.cli.test_main import STARTER
from tests.loops import loop_device, mounted, needs_loop, needs_root

import odirect as odirect_package
from odirect.cli import volume_cp

DATA = some_bytes(3 * MIB + 7)


@pytest.fixture
def image(scratch: Path) -> Iterator[Path]:
    with image_in(scratch, 32 * MIB) as image:
        yield image


@pytest.fixture
def source(scratch: Path) -> Path:
    path = scratch / "source"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def tree(scratch: Path) -> Path:
    """One of each kind, with everything that can be kept."""
    top = scratch / "tree"
    (top / "sub" / "empty").mkdir(parents=True)
    (top / "big").write_bytes(DATA)
    (top / "small").write_bytes(b"small")
    (top / "nothing").touch()
    os.link(top / "small", top / "sub" / "hard")
    os.symlink("../big", top / "sub" / "link")
    os.symlink("x" * 100, top / "long link")
    os.mkfifo(top / "fifo")
    if os.geteuid() == 0:
        os.mknod(top / "device", stat.S_IFBLK | 0o640, os.makedev(8, 3))
        os.chown(top / "small", 1234, 70000)
        os.lchown(top / "sub" / "link", 5, 6)
    os.setxattr(top / "big", "user.comment", b"\0odd")
    with open(top / "sparse", "wb") as file:
        file.truncate(4 * MIB + 3)
        os.pwrite(file.fileno(), b"in the middle", 2 * MIB)
    for path, mode in (("big", 0o4755), ("sub", 0o1777), ("small", 0o600)):
        (top / path).chmod(mode)
    for number, path in enumerate(("sub/empty", "sub/link", "sub", "big", "small", "fifo", ".")):
        os.utime(top / path, ns=(10**18 + number, 10**18 + 111_111_111 * number), follow_symlinks=False)
    return top


def listing(top: Path) -> dict[str, Any]:
    """Everything that a copy with -a keeps, by path."""
    found = {}
    for directory, names, files in os.walk(top):
        for name in [".", *names, *files]:
            path = Path(directory) / name
            status = path.lstat()
            entry: list[Any] = [stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns]
            if path.is_symlink():
                entry.append(os.readlink(path))
            elif path.is_file():
                entry += [
                    path.read_bytes(),
                    status.st_nlink,
                    {key: os.getxattr(path, key) for key in os.listxattr(path)},
                ]
            elif not path.is_dir():
                entry.append(status.st_rdev)
            found[os.path.normpath(os.path.relpath(path, top))] = entry
    return found


# --- one file -------------------------------------------------------------------------------------


def test_in_and_out(source: Path, image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert odirect("cp", source, f"{image}:/") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"{source} -> {image}:/source: 3.0 MiB in ")
    assert "direct" in captured.err
    assert contents(image, "/source", scratch / "dump") == DATA
    fsck(image)
    assert odirect("cp", f"{image}:/source", scratch / "out") == 0
    assert (scratch / "out").read_bytes() == DATA
    assert sorted(os.listdir(scratch)) == sorted(["source", "out", image.name])


def test_json(source: Path, image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "cp", "--json", "--verify", "--sync", source, f"{image}:/x")
    assert found["source"] == str(source) and found["target"] == f"{image}:/x"
    assert found["bytes_copied"] == len(DATA) and found["verified"] is found["durable"] is True
    assert found["files"] == 1 and found["directories"] == 0 and found["left_out"] == []
    assert sum(outcome["bytes"] for outcome in found["writes"]) == len(DATA)
    assert {outcome["kind"] for outcome in found["reads"]} <= {"direct", "bounced"}
    assert told(capsys, "cp", "--json", "-q", f"{image}:/x", scratch / "y")["bytes_copied"] == len(DATA)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 4096, 4097, 300_000, 2 * MIB])
@pytest.mark.parametrize("option", [[], ["--strict", "--verify"], ["--chunk", "64k", "--depth", "3"]])
def test_sizes(size: int, option: list[str], image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F05: every size comes back as it was, and direct where that was demanded."""
    (scratch / "a").write_bytes(DATA[:size])
    assert odirect("cp", *option, scratch / "a", f"{image}:/a") == 0
    assert contents(image, "/a", scratch / "dump") == DATA[:size]
    assert odirect("cp", *option, f"{image}:/a", scratch / "b") == 0
    assert (scratch / "b").read_bytes() == DATA[:size]
    assert "buffered" not in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--sparse", "--no-sparse"])
def test_holes(option: str, image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(scratch / "a", "wb") as file:
        file.truncate(8 * MIB)
        os.pwrite(file.fileno(), b"x" * 5000, 3 * MIB)
    assert odirect("cp", "--verify", option, scratch / "a", f"{image}:/a") == 0
    assert odirect("cp", "--verify", option, f"{image}:/a", scratch / "b") == 0
    assert (scratch / "b").read_bytes() == (scratch / "a").read_bytes()
    inside = told(capsys, "stat", "--json", f"{image}:/a")[0]["blocks512"] * 512
    assert (inside < MIB and (scratch / "b").stat().st_blocks * 512 < MIB) is (option == "--sparse")


def test_between_and_within(source: Path, image: Path, scratch: Path) -> None:
    with image_in(scratch, 16 * MIB, "-b", "4096") as other:
        assert odirect("cp", source, f"{image}:/a") == 0
        assert odirect("cp", f"{image}:/a", f"{other}:/b") == 0
        assert odirect("cp", "--verify", f"{other}:/b", f"{other}:/c") == 0
        assert contents(other, "/c", scratch / "dump") == DATA


def test_a_target_that_exists_is_replaced_whole(source: Path, image: Path, scratch: Path) -> None:
    """It keeps its mode and owner; a link on the command line is followed."""
    (scratch / "old").write_bytes(b"old")
    change(
        image,
        f"write {scratch / 'old'} x",
        "set_inode_field x mode 0100640",
        "set_inode_field x uid 77",
        "symlink way x",
    )
    assert odirect("cp", source, f"{image}:/way") == 0
    assert contents(image, "/x", scratch / "dump") == DATA
    shown = debugfs(image, "stat x")
    assert "Mode:  0640" in shown and "User:    77" in shown


def test_one_that_fails_leaves_the_target(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F30: no half file, nothing under another name, and the space is free again."""
    with image_in(scratch, 2 * MIB) as image:
        (scratch / "old").write_bytes(b"old")
        change(image, f"write {scratch / 'old'} x")
        assert f"odirect: {image}:/x: " in refused(capsys, 9, "cp", source, f"{image}:/x")
        assert refused(capsys, 9, "cp", source, f"{image}:/y")
        assert said(capsys, "ls", "-a", f"{image}:/") == "lost+found\nx\n"
        assert contents(image, "/x", scratch / "dump") == b"old"
        fsck(image)
        assert odirect("cp", "-q", scratch / "old", f"{image}:/y") == 0


def test_verifying_finds_what_differs(
    source: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = iter(range(1000))
    monkeypatch.setattr(volume_cp, "_digest", lambda view: bytes([next(digests) % 256]))
    assert "are not what was written there" in refused(capsys, 10, "cp", "--verify", source, f"{image}:/x")
    assert said(capsys, "ls", f"{image}:/") == "lost+found\n"


@pytest.mark.parametrize(
    "arguments,status,message",
    [
        (["{image}:/nothing", "{out}"], 2, "{image}:/nothing: there is no such file"),
        (["{image}:/", "{out}"], 2, "-r copies it"),
        (["{source}", "{image}:/no/where"], 2, "{image}:/no/where"),
        (["{source}", "{image}:/nothing/"], 2, "there is no such directory"),
        (["{source}", "{image}:/file/x"], 2, "Not a directory"),
        (["{image}:/file", "{image}:/file"], 2, "the same"),
        (["{image}:/file", "{out}/no/where"], 2, "{out}/no/where"),
        (["-r", "{image}:/lost+found", "{image}:/file"], 2, "cannot replace"),
        (["-r", "{image}:/dir", "{image}:/dir/inside"], 2, "into itself"),
        (["{source}", "{source}", "{image}:/file"], 2, "several sources"),
        (["--overwrite-in-use", "{source}", "{image}:/file"], 2, "not for volumes"),
        (["-r", "{image}:/", "-"], 2, "standard output"),
        (["-", "{image}:/dir"], 2, "no name to take there"),
        (["{image}:/fifo", "{out}"], 8, "neither a file nor a directory"),
        (["{image}:/file", "{pipe}"], 8, "{pipe}: it is neither a file nor a directory"),
        (["{source}", "{image}:/fifo"], 8, "{image}:/fifo: it is neither a file nor a directory"),
        (["-r", "{source}", "{out}"], 2, "neither side is in one"),
        (["{image}", "{image}:/x"], 2, "the image that is copied to"),
        (["{image}:/file", "{image}"], 2, "the image that is copied from"),
    ],
)
def test_what_goes_wrong_is_said(
    arguments: list[str],
    status: int,
    message: str,
    source: Path,
    image: Path,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(image, f"write {source} file", "mkdir dir", "mknod fifo p")
    os.mkfifo(scratch / "pipe")
    words = {"image": image, "source": source, "out": scratch / "out", "pipe": scratch / "pipe"}
    seen = refused(capsys, status, "cp", *(word.format(**words) for word in arguments))
    assert message.format(**words) in " ".join(seen.split())
    assert not (scratch / "out").exists() and (scratch / "pipe").is_fifo()
    assert said(capsys, "ls", "-R", f"{image}:/").split("\n\n")[0].split()[1:] == ["dir", "fifo", "file", "lost+found"]


# --- trees ----------------------------------------------------------------------------------------


def test_everything_is_kept_with_a(tree: Path, image: Path, scratch: Path) -> None:
    """The kernel finds in the volume what was in the directory, and so do we."""
    needs_root()
    assert odirect("cp", "-aq", tree, f"{image}:/") == 0
    fsck(image)
    with mounted(image, "ext2", "ro") as point:
        assert listing(point / "tree") == listing(tree)
        assert (point / "tree" / "sparse").stat().st_blocks * 512 < MIB
    assert odirect("cp", "-aq", "--verify", f"{image}:/tree", scratch / "out") == 0
    assert listing(scratch / "out") == listing(tree)


@pytest.mark.slow
def test_between_volumes_with_a(tree: Path, image: Path, scratch: Path) -> None:
    needs_root()
    with image_in(scratch, 32 * MIB, "-b", "4096") as other:
        assert odirect("cp", "-aq", tree, f"{image}:/deep") == 0
        assert odirect("cp", "-aq", f"{image}:/deep", f"{other}:/one") == 0
        assert odirect("cp", "-aq", f"{other}:/one", f"{other}:/two") == 0
        with mounted(other, "ext2", "ro") as point:
            assert listing(point / "one") == listing(point / "two") == listing(tree)


def test_r_makes_new_files(tree: Path, image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Modes less the special bits and the umask; hard links become files, symbolic ones stay."""
    before = os.umask(0o027)
    try:
        assert odirect("cp", "-r", tree, f"{image}:/t") == 0
    finally:
        os.umask(before)
    assert "files and" in capsys.readouterr().err
    found = {entry["path"]: entry for entry in told(capsys, "ls", "-R", "--json", f"{image}:/t")}
    assert found["/t/big"]["permissions"] == "0750" and found["/t/sub"]["permissions"] == "0750"
    assert found["/t/small"]["links"] == found["/t/sub/hard"]["links"] == 1
    assert found["/t/sub/link"]["target"] == "../big"
    assert found["/t/big"]["uid"] == os.geteuid() and found["/t/big"]["mtime_ns"] > 10**18 + 10**10
    before = os.umask(0o027)
    try:
        assert odirect("cp", "-rq", f"{image}:/t", scratch / "out") == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((scratch / "out" / "big").stat().st_mode) == 0o750
    assert (scratch / "out" / "sub" / "hard").read_bytes() == b"small"


def test_files_that_are_made_while_they_are_read(
    image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A size of 0 says nothing about a file of /proc; one that is empty stays so."""
    (scratch / "empty").touch()
    expected = Path("/proc/version").read_bytes()
    assert odirect("cp", "-q", "/proc/version", f"{image}:/version") == 0
    assert odirect("cp", "-q", scratch / "empty", f"{image}:/empty") == 0
    with odirect_package.open_volume(image, "r+") as volume:
        assert volume.read_bytes("/version") == expected and volume.read_bytes("/empty") == b""
        volume.copy_in("/proc/version", "/alone")
        volume.copy_in("/proc/sys/kernel/random/", "/tree", attributes=False)
        assert volume.read_bytes("/alone") == expected
        assert volume.read_bytes("/tree/poolsize") == Path("/proc/sys/kernel/random/poolsize").read_bytes()
    fsck(image)


def test_what_did_not_go_direct_in_a_tree_has_a_reason(
    image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small files, into a volume, out of it, and from one to another."""
    (scratch / "tree").mkdir()
    for number in range(3):
        (scratch / "tree" / f"{number}").write_bytes(b"x" * 5000)
    for source, target in (
        (scratch / "tree", f"{image}:/t"),
        (f"{image}:/t", scratch / "out"),
        (f"{image}:/t", f"{image}:/again"),
    ):
        found = told(capsys, "cp", "-r", "--json", source, target)
        outcomes = [*found["reads"], *found["writes"]]
        assert sum(outcome["bytes"] for outcome in outcomes) == 2 * 15_000
        assert all(outcome["kind"] == "direct" or outcome["reason"] for outcome in outcomes)
        assert "small file" in {outcome["reason"] for outcome in outcomes}


@pytest.mark.parametrize("mask,wanted", [(0o022, "0644"), (0o077, "0600")])
def test_the_mode_of_what_a_pipe_gives(
    mask: int, wanted: str, image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on the host: what everybody may do, less the umask."""
    for target in (scratch / "host", f"{image}:/piped"):
        subprocess.run([*STARTER, "cp", "-q", "-", target], input=b"x", umask=mask, check=True)
    assert f"{stat.S_IMODE((scratch / 'host').stat().st_mode):04o}" == wanted
    (found,) = told(capsys, "stat", "--json", f"{image}:/piped")
    assert found["permissions"] == wanted


def test_a_tree_goes_into_what_is_there(
    tree: Path, image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `cp`: twice is the tree in itself only by its name, files are replaced, what else is there stays."""
    change(image, "mkdir tree", "mkdir tree/sub", "mkdir tree/other")
    assert odirect("cp", "-rq", tree, f"{image}:/") == 0
    assert odirect("cp", "-rq", tree, f"{image}:/") == 0
    names = said(capsys, "ls", "-a", f"{image}:/tree").split("\n")
    assert "other" in names and "big" in names and "tree" not in names and not any(".odirect" in name for name in names)
    assert odirect("cp", "-rq", f"{image}:/tree/sub", tree) == 0
    assert (tree / "sub" / "hard").read_bytes() == b"small"


@pytest.mark.parametrize(
    "option",
    [
        [],
        ["-a"],
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (["--chunk", "1k"], ["--strict"], ["--verify", "--sync"])
        ),
    ],
)
def test_many_small_files(option: list[str], image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read and made many at once, and are the same as one by one."""
    top = scratch / "top"
    for number in range(60):
        directory = top / f"{number % 7}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number}").write_bytes(some_bytes(number * 401 % 20_000, number))
    (top / "nearly").write_bytes(some_bytes((128 << 10) - 1))
    os.setxattr(top / "3" / "3", "user.a", b"b")
    with open(top / "holes", "wb") as file:
        file.truncate(100_000)
    found = told(capsys, "cp", "-r", "--json", *option, top, f"{image}:/")
    size = sum(path.stat().st_size for path in top.rglob("*") if path.is_file())
    assert found["files"] == 62 and found["bytes_copied"] + found["bytes_skipped"] == size
    fsck(image)
    with image_in(scratch, 32 * MIB) as other:
        assert odirect("cp", "-rq", *option, f"{image}:/top", f"{other}:/again") == 0
        assert odirect("cp", "-rq", *option, f"{other}:/again", scratch / "out") == 0
    before = {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
    assert {
        path.relative_to(scratch / "out"): path.read_bytes()
        for path in (scratch / "out").rglob("[0-9hn]*")
        if path.is_file()
    } == before
    assert ("user.a" in os.listxattr(scratch / "out" / "3" / "3")) is (option == ["-a"])
    assert (scratch / "out" / "holes").stat().st_blocks == 0


def test_no_link_is_gone_through(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A volume cannot lead us out of where we were told to write: not by a link that was copied before."""
    (scratch / "x").write_bytes(b"x")
    (scratch / "out").mkdir()
    (scratch / "else").mkdir()
    change(image, "mkdir 1", "mkdir 1/d", f"symlink 1/d/a {scratch / 'else'}")
    change(image, "mkdir 2", "mkdir 2/d", "mkdir 2/d/a", f"write {scratch / 'x'} 2/d/a/x")
    assert "cannot replace" in refused(capsys, 2, "cp", "-r", f"{image}:/1/d", f"{image}:/2/d", scratch / "out")
    assert os.listdir(scratch / "else") == []


def test_what_is_not_ours_to_keep(image: Path, tree: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without privileges owners and devices are left out, each is told, and nothing runs with others' rights."""
    needs_root()
    assert odirect("cp", "-aq", tree, f"{image}:/") == 0
    change(image, "set_inode_field tree/big uid 1234")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "lchown", refuse)
    monkeypatch.setattr(os, "mknod", refuse)
    assert odirect("cp", "-a", f"{image}:/tree", scratch / "out") == 0
    assert stat.S_IMODE((scratch / "out" / "big").stat().st_mode) == 0o755
    assert not (scratch / "out" / "device").exists() and (scratch / "out" / "small").exists()


def test_an_image_in_use_is_not_replaced(image: Path, source: Path, scratch: Path) -> None:
    """F34: a loop device would go on with a file that nobody sees."""
    needs_loop()
    with image_in(scratch) as other, loop_device(other):
        change(image, f"write {source} x")
        assert odirect("cp", f"{image}:/x", other) == 6


def test_several_sources(source: Path, image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "b").write_bytes(b"b")
    change(image, "mkdir into")
    assert odirect("cp", "--json", source, scratch / "b", f"{image}:/into") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["target"] for each in found] == [f"{image}:/into/source", f"{image}:/into/b"]


def test_the_root_of_a_volume(tree: Path, image: Path, scratch: Path) -> None:
    """Out of `image:/` comes what is in it."""
    assert odirect("cp", "-rq", tree, f"{image}:/") == 0
    (scratch / "all").mkdir()
    assert odirect("cp", "-rq", f"{image}:/", scratch / "all") == 0
    assert sorted(os.listdir(scratch / "all")) == ["lost+found", "tree"]


def test_a_name_that_leads_out_is_corruption(image: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A volume cannot make us write outside of where we were told to."""
    (scratch / "into").mkdir()
    change(image, "mkdir d", "mkdir d/AABAA")
    data = bytearray(image.read_bytes())
    at = data.index(b"AABAA")
    data[at : at + 5] = b"../xx"
    broken = scratch / "broken.img"
    broken.write_bytes(data)
    refused(capsys, 7, "cp", "-r", f"{broken}:/d", scratch / "into")
    assert sorted(os.listdir(scratch)) == sorted(["broken.img", "into", image.name])


# --- streams and devices --------------------------------------------------------------------------


@pytest.mark.slow
def test_streams(image: Path, scratch: Path) -> None:
    done = subprocess.run(
        [*STARTER, "cp", "--verify", "-", f"{image}:/x"], input=DATA * 3, capture_output=True, check=True
    )
    assert b"verified" in done.stderr and contents(image, "/x", scratch / "dump") == DATA * 3
    assert subprocess.run([*STARTER, "cp", f"{image}:/x", "-"], capture_output=True, check=True).stdout == DATA * 3
    assert subprocess.run([*STARTER, "cat", f"{image}:/x"], capture_output=True, check=True).stdout == DATA * 3
    empty = subprocess.run([*STARTER, "cp", "-q", "-", f"{image}:/e"], stdin=subprocess.DEVNULL, check=True)
    assert empty.returncode == 0 and contents(image, "/e", scratch / "dump") == b""


@pytest.mark.parametrize(
    "offset,length", [(0, 10), (1, 4096), (4095, 2), (len(DATA) - 3, 100), (len(DATA), 5), (10**9, 5), (12345, None)]
)
def test_cat_a_part(
    offset: int, length: int | None, source: Path, image: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """F02: never more than there is."""
    change(image, f"write {source} x")
    part = [] if length is None else ["--length", length]
    assert odirect("cat", "--offset", offset, *part, f"{image}:/x", f"{image}:/x") == 0
    expected = DATA[offset:] if length is None else DATA[offset : offset + length]
    assert capfdbinary.readouterr().out == expected * 2


def test_cat_beside_ordinary_files(source: Path, image: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    change(image, f"write {source} x")
    assert odirect("cat", "--length", 5, source, f"{image}:/x") == 0
    assert capfdbinary.readouterr().out == DATA[:5] * 2
    assert odirect("cat", f"{image}:/lost+found") == 2


@pytest.mark.slow
def test_a_block_device(source: Path, image: Path, scratch: Path) -> None:
    needs_loop()
    with loop_device(image) as device:
        assert odirect("cp", "--verify", source, f"{device}:/x") == 0
        assert odirect("cp", f"{device}:/x", scratch / "out") == 0
        assert (scratch / "out").read_bytes() == DATA
        # A device as a source is its bytes.
        assert odirect("cp", "--json", device, scratch / "whole") == 0
    with image_in(scratch, 64 * MIB) as large, loop_device(image) as device:
        assert odirect("cp", "-q", device, f"{large}:/whole") == 0
        assert contents(large, "/whole", scratch / "dump") == image.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_a_whole_volume(
    image: Path, scratch: Path, number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C: the target is as it was, and the volume is clean and closed well."""
    (scratch / "old").write_bytes(b"old")
    change(image, f"write {scratch / 'old'} x")
    child = subprocess.Popen(
        [*STARTER, "cp", "--progress", "--chunk", "64k", "-", f"{image}:/x"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        assert child.stdin is not None and child.stderr is not None
        child.stdin.write(bytes(2 * MIB))
        child.stdin.flush()
        assert child.stderr.readline().startswith(b"-: ")
        child.send_signal(number)
        seen = child.stderr.read()
        assert child.wait() == status
        child.stdin.close()
    assert b"Traceback" not in seen
    fsck(image)
    assert contents(image, "/x", scratch / "dump") == b"old"
    assert said(capsys, "ls", "-a", f"{image}:/") == "lost+found\nx\n"
