"""`odirect cp`: copy files and block devices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from odirect.base.units import format_bytes
from odirect.cli import common, places
from odirect.cli.standard import STDIN, STDOUT

if TYPE_CHECKING:
    from odirect.copying import CopyReport


class _Asked(NamedTuple):
    """What the options say; see `command`."""

    recursive: bool
    archive: bool
    verify: bool
    sync: bool
    sparse: bool
    progress: bool | None
    as_json: bool
    strict: bool
    overwrite_in_use: bool
    chunk: int | None
    depth: int | None


@click.command("cp")
@common.path_argument(nargs=-1, name="sources", metavar="SOURCE...")
@common.path_argument(name="target", metavar="TARGET")
@click.option("-r", "-R", "--recursive", is_flag=True, help="Directories, with all that is in them.")
@click.option(
    "-a",
    "--archive",
    is_flag=True,
    help="As -r, and keep owners, modes, times, extended attributes and hard links. Both need a volume on one side.",
)
@click.option("--verify", is_flag=True, help="Read the copy back past the page cache, and compare it.")
@click.option("--sync/--no-sync", default=False, help="Return when the copy would survive a power cut. [no]")
@click.option("--sparse/--no-sparse", default=True, help="Keep holes, or write zeroes for them. [keep]")
@click.option(
    "--progress/--quiet",
    "-p/-q",
    "progress",
    default=None,
    help="Show progress, or nothing but errors. [progress on a terminal, and a line at the end]",
)
@click.option("--json", "as_json", is_flag=True, help="Report in JSON on standard output, a line for each copy.")
@click.option("--strict", is_flag=True, help="Fail instead of going through the page cache.")
@click.option(
    "--overwrite-in-use",
    is_flag=True,
    help="Write to a device although it is mounted or in use, which can destroy what is on it.",
)
@click.option("--chunk", type=common.Size(least=1, most=1 << 30), metavar="SIZE", help="Bytes moved by one request.")
@click.option("--depth", type=click.IntRange(1, 1024), help="Chunks under way at once.")
def command(sources: tuple[str, ...], target: str, **asked: Any) -> None:
    """Copy files and block devices, past the page cache.

    SOURCE and TARGET are files or block devices; TARGET may be a directory, and must be one for several
    sources; - is standard input or output. A file appears under its name when it is whole: interrupted or
    failed, nothing is left of it. Holes stay holes, and are zeroed on a device.

    IMAGE:/PATH is a path in the volume that an image file or block device holds, which is neither mounted
    nor to be mounted for this; IMAGE: is its root. A path that begins with ./ is always an ordinary one.
    Small files of a tree are read and made many at a time: on this machine through its page cache, unless
    --strict is given. --json says of each outcome why.

    \b
    Examples:
      odirect cp image.raw /mnt/backup/
      odirect cp --verify --sync image.raw /dev/sdb
      odirect cp /dev/sdb1 partition.raw
      zcat image.gz | odirect cp - image.raw
      odirect cp disk.img:/etc/fstab .
      odirect cp -a build/rootfs/. disk.img:/
      odirect cp -r old.img:/home /dev/sdb1:/
    """
    wishes = _Asked(**asked)
    if any(places.parse(path, is_there=True) is not None for path in sources) or places.parse(target) is not None:
        _copy_in_volumes(sources, target, wishes)
    else:
        _copy_files(sources, target, wishes)


def _copy_files(sources: tuple[str, ...], target: str, asked: _Asked) -> None:
    if asked.recursive or asked.archive:
        raise click.UsageError("trees are copied into volumes and out of them; here neither side is in one")
    to_stdout = target == common.STDIO
    if len(sources) > 1 and not to_stdout and not os.path.isdir(target):
        raise click.UsageError(f"{common.shown(target)} is not a directory, and there are several sources")
    if to_stdout and (asked.as_json or asked.verify or asked.sync):
        raise click.UsageError("standard output cannot be verified or synced, nor hold the JSON")
    options: dict[str, Any] = {"access": "strict" if asked.strict else "auto", **_sizes(asked)}
    if not to_stdout:
        options |= {"verify": asked.verify, "durable": asked.sync, "overwrite_in_use": asked.overwrite_in_use}
    for source in sources:
        report = _copy(source, target, options, asked.sparse, common.wants_progress(asked.progress))
        if asked.as_json:
            common.print_json(_as_json(source, report), indent=None)
        elif asked.progress is not False:
            click.echo(_line(source, report), err=True)


def _sizes(asked: _Asked) -> dict[str, int]:
    """The sizes that were asked for, for `copying` and `volume_cp`."""
    sizes = {"chunk_bytes": asked.chunk, "depth": asked.depth}
    return {name: size for name, size in sizes.items() if size is not None}


def _copy_in_volumes(sources: tuple[str, ...], target: str, asked: _Asked) -> None:
    """The same where a volume has part in it."""
    from odirect.cli import volume_cp

    if asked.overwrite_in_use:
        raise click.UsageError("--overwrite-in-use is not for volumes: two that write to one destroy it")
    if target == common.STDIO:
        if asked.as_json or asked.verify or asked.sync or asked.recursive or asked.archive:
            raise click.UsageError("standard output takes the bytes of files, and nothing else")
        from odirect.cli.cat import command as cat

        cat.callback(sources, 0, None, asked.strict)  # type: ignore[misc]
        return
    options = volume_cp.Options(
        recursive=asked.recursive or asked.archive,
        keep=asked.archive,
        verify=asked.verify,
        durable=asked.sync,
        sparse=asked.sparse,
        access="strict" if asked.strict else "auto",
        **_sizes(asked),
    )

    def tell(source: str, copied: volume_cp.TreeCopied) -> None:
        if asked.as_json:
            common.print_json({**_as_json(source, copied.report), **volume_cp.as_json(copied)}, indent=None)
        elif asked.progress is not False:
            trees = copied.directories + copied.links + copied.nodes + copied.hard_links
            what = f"{copied.files} files and {trees} others, " if trees or copied.files > 1 else ""
            click.echo(_line(source, copied.report, what), err=True)
        if not asked.as_json:
            for missed in copied.left_out:
                click.echo(f"odirect: not kept: {missed}".encode("utf-8", "replace"), err=True)

    volume_cp.copy_all(list(sources), target, options, common.wants_progress(asked.progress), tell)


def _copy(source: str, target: str, options: dict[str, Any], sparse: bool, progress: bool) -> CopyReport:
    from odirect import copying

    with common.progress_bar(common.shown(source), progress) as told:
        if target == common.STDIO:
            if source == common.STDIO:
                raise click.UsageError("from standard input to standard output: use `odirect cat -`")
            return copying.copy_out(source, STDOUT, progress=told, **options)
        if source == common.STDIO:
            return copying.copy_in(STDIN, target, progress=told, **options)
        return copying.copy(source, target, sparse=sparse, progress=told, **options)


def _line(source: str, report: CopyReport, what: str = "") -> str:
    words = [
        f"{common.shown(source)} -> {common.shown(report.target)}: {what}{format_bytes(report.bytes_copied)}",
        f"in {report.seconds:.2f} s, {common.rate(report.bytes_copied, report.seconds)}",
    ]
    told = [common.sentence_of(common.ways(report.read_outcomes, report.write_outcomes))]
    if report.bytes_skipped:
        told.append(f"{format_bytes(report.bytes_skipped)} of holes")
    told += ["verified"] if report.verified else []
    told += ["durable"] if report.durable else []
    return f"{' '.join(words)} ({'; '.join(told)})"


def _as_json(source: str, report: CopyReport) -> dict[str, object]:
    return {
        **common.told_path(source, "source"),
        **common.told_path(report.target, "target"),
        "bytes_copied": report.bytes_copied,
        "bytes_skipped": report.bytes_skipped,
        "seconds": report.seconds,
        "bytes_per_second": report.bytes_per_second,
        "verified": report.verified,
        "durable": report.durable,
        "outcomes": common.outcomes_as_json(report.read_outcomes, report.write_outcomes),
        "reads": common.outcomes_as_json(report.read_outcomes),
        "writes": common.outcomes_as_json(report.write_outcomes),
    }
