"""exec, logs, stats: looking into guests."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ipc.errors import ExitCode, OperatorError
from tools.cli.common import JsonOption, RunOption, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(
        "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
    )(execute)
    app.command()(logs)
    app.command()(stats)


def execute(
    guest: Annotated[str, typer.Argument(help="Name of the guest.")],
    command: Annotated[list[str], typer.Argument(help="Command and arguments, after --.")],
    timeout: Annotated[
        float, typer.Option(min=0.1, max=1e6, help="Seconds that the command may take.")
    ] = 10.0,
    run: RunOption = None,
) -> int:
    """Run a command in a guest: cat, ls, find, sha256sum, cp, df, flock, selfballoon, programs, ...

    A name that it does not know lists all.  The exit code is the command's own.
    """
    from tools.control import ask
    from tools.rundir import find_live

    if command[0] == "--":
        command = command[1:]
    if not command:
        raise OperatorError(f"say what {guest} shall run, after --", ExitCode.USAGE)
    directory, record = find_live(run)
    names = [one.name for one in record.guests]
    if guest not in names:
        raise OperatorError(
            f"there is no guest {guest!r}; there are {', '.join(names)}", ExitCode.USAGE
        )
    question = {"verb": "exec", "argv": command}
    answer = ask(directory.guest_socket(guest), question, timeout_seconds=timeout)
    if "error" in answer:
        raise OperatorError(f"{guest}: {answer['error']}", ExitCode.USAGE)
    sys.stdout.flush()
    sys.stdout.buffer.write(answer["stdout"])
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(answer["stderr"])
    sys.stderr.buffer.flush()
    return int(answer["exit_code"])


def logs(
    name: Annotated[
        str | None, typer.Argument(help="A guest, hypervisor or supervisor (default: all).")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as logs grow.")] = False,
    run: RunOption = None,
) -> int:
    """Print the logs of the cluster that lives, or of the newest one that did."""
    from tools.logs import LogReader
    from tools.rundir import find_logged

    directory = find_logged(run)
    reader = LogReader(directory, name)
    for line in reader.lines(follow=follow):
        print(line, flush=follow)
    return ExitCode.OK


def stats(run: RunOption = None, json: JsonOption = False) -> int:
    """Print each guest's memory, tmem pages and saved disk reads, as they are now."""
    from tools import stats as view
    from tools.rundir import find_live

    directory, record = find_live(run)
    shot = view.snapshot(directory, record)
    if json:
        print_json(shot)
        return ExitCode.OK
    print_table(view.HEADER, view.table(shot))
    print(view.headline(shot))
    return ExitCode.OK
