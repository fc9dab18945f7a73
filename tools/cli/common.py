"""What several commands share: how one is run, options, tables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import Abort, TyperException

from ipc.errors import Disconnected, ExitCode, OperatorError

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Directory of the run (default: $TMEM_RUN_DIR, else the newest live one in ./runs).",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def run_command(command: Callable[..., Any], arguments: list[str] | None) -> int:
    """Run one command line; its exit code.  `command` is what typer makes of all commands."""
    try:
        return int(command(arguments, prog_name="tmem", standalone_mode=False) or 0)
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
        # The reader of a pipe has left; what we would still flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.OK


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
