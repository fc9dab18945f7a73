"""What several commands share: how one is run, options, tables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol, TextIO, cast

import typer
from typer.exceptions import Abort, TyperException

from ipc.errors import Disconnected, ExitCode, OperatorError


class Command(Protocol):
    """What typer makes of an app."""

    def make_context(self, info_name: str, args: list[str]) -> Any:
        """The words of a command line, understood."""

    def invoke(self, ctx: Any) -> Any:
        """Do it."""


RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Directory of the run (default: $TMEM_RUN_DIR, else the newest live one in ./runs).",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def run_command(command: Command, arguments: Sequence[str]) -> int:
    """Run one command line; its exit code.  `command` is what typer makes of all commands.

    Not by its `main`, which has its own mind of Ctrl-C and of a reader that has left.
    """
    # Closed by who started us: what is printed goes nowhere.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    try:
        with command.make_context("tmem", list(arguments)) as context:
            code = int(command.invoke(context) or 0)
        # Here and not when the interpreter ends, where nobody would take what it raises.
        sys.stdout.flush()
    except typer.Exit as ended:
        return ended.exit_code
    except OperatorError as error:
        for line in str(error).splitlines():
            print(f"tmem: {line}", file=sys.stderr)
        return error.exit_code
    except Disconnected as error:
        print(f"tmem: no answer: {error}; see 'tmem logs'", file=sys.stderr)
        return ExitCode.UNAVAILABLE
    except TyperException as error:
        # Without any arguments the help was printed and there is nothing to add.
        if text := error.format_message():
            print(f"tmem: {text.rstrip('.')}; see 'tmem --help'", file=sys.stderr)
        return ExitCode.USAGE
    except (KeyboardInterrupt, Abort):
        print("tmem: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        forget_output()
        return ExitCode.OK
    except OSError as error:
        what = "output" if error.filename is None else os.fsdecode(error.filename)
        print(f"tmem: {what}: {error.strerror or error}", file=sys.stderr)
        return ExitCode.NO_INPUT
    return code


def forget_output() -> None:
    """The reader of a pipe has left; what we would still write has nowhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Unread:
    """Standard output for work that goes on when nobody reads of it any more: it has an exit code
    to say, and something to clean up."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream's."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            forget_output()
            return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            forget_output()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unread() -> Iterator[None]:
    """Print to an `Unread` meanwhile."""
    stream = sys.stdout
    sys.stdout = cast("TextIO", Unread(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = stream


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = [number > 0 and _is_number(rows, number) for number in range(len(header))]
    for line in lines:
        cells = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _is_number(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column][:1] == "-" for row in rows)
