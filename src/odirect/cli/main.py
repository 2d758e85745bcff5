"""The command `odirect`: finds the verb, runs it, and turns what goes wrong into a message and a status."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import cast

import click

from odirect.base.errors import ODirectError
from odirect.cli import standard

#: Each verb is the attribute `command` of the module of its name, imported when it is asked for.
VERBS = {
    "bench": "Measure a file or device, and say whether it was really direct.",
    "cat": "Write files to standard output, past the page cache.",
    "check": "Look for what is wrong with a volume; nothing is written.",
    "cp": "Copy files, trees and block devices, past the page cache; into volumes and out of them.",
    "explain": "Say whether a file's I/O goes direct, where its bytes are, and what falls back.",
    "info": "Say what direct I/O on a file, device or volume demands, and who says so.",
    "ln": "Make links in a volume.",
    "ls": "List directories in a volume.",
    "mkdir": "Make directories in a volume.",
    "mkfs": "Make a volume, empty or with files in it.",
    "mv": "Rename files and directories in a volume.",
    "rm": "Remove files and directories in a volume.",
    "stat": "Say all that a volume says of a file.",
    "trace": "Run another command, and show what each of its requests did, and when.",
}

_INTERRUPTED = 128 + signal.SIGINT
_BROKEN_PIPE = 128 + signal.SIGPIPE


class _Verbs(click.Group):
    """A group whose verbs are imported late, so that `odirect cp` does not pay for `odirect bench`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return cast(click.Command, importlib.import_module(f"odirect.cli.{cmd_name}").command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(VERBS.items()))


def _print_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        import odirect

        click.echo(f"odirect {odirect.__version__}")
        context.exit()


@click.command(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`odirect COMMAND --help` shows a command's options, with examples.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Direct I/O on files and block devices, and inside volumes that are not mounted: past the page cache,
    with an honest outcome.

    IMAGE:/PATH is a path in the volume that an image file or block device holds: disk.img:/etc/fstab.

    \b
    Examples:
      odirect cp --verify --sync image.raw /mnt/backup/
      odirect cp -a build/rootfs disk.img:/ && odirect ls -l disk.img:/etc
      odirect explain data.bin
      odirect bench data.bin --rw randread --bs 4k --iodepth 32

    Exit status: 0 if all went well; 1 not enough memory; 2 for a wrong call or path; 3 misaligned; 4 not
    direct though that was demanded; 5 the device failed; 6 in use or read-only; 7 damaged on disk; 8 not
    supported; 9 no space; 10 what was read back differs; 11 it would have had to wait; 129 if the terminal
    hung up, 130 if interrupted, 141 if nobody reads the output, 143 if it was terminated.
    """


def run(arguments: Sequence[str]) -> int:
    """The exit status of `odirect ARGUMENTS...`; messages go to standard error."""
    try:
        with cli.make_context("odirect", list(arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return _INTERRUPTED
    except ODirectError as error:
        return _told(error)
    except standard.OutputError as stop:
        return _told(stop.error)
    except BrokenPipeError:
        return _BROKEN_PIPE
    except ValueError as error:
        if "ODIRECT_RING" not in str(error):
            raise
        _say(str(error))
        return 2
    except MemoryError as error:
        _say(str(error) or "there is not enough memory")
        return 1
    return 0


def main() -> None:
    """Run the command line of this process, and exit."""
    # What ends us politely must give us the time to remove a half copy.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)
    # NumPy's linear algebra, of which nothing is used, would keep a processor busy with starting threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        standard.settle()
    except ODirectError as error:
        sys.exit(_told(error))
    sys.exit(run(sys.argv[1:]))


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _told(error: ODirectError) -> int:
    """Say what went wrong; the status. Quiet, as `cat`, where whoever read our output has gone."""
    if error.errno == errno.EPIPE:
        return _BROKEN_PIPE
    _say(str(error))
    return error.exit_code


def _say(message: str) -> None:
    click.echo(f"odirect: {message}".encode("utf-8", "replace"), err=True)


if __name__ == "__main__":
    main()
