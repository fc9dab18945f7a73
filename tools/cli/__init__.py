"""`tmem`: the command line.  Thin: every command asks one module of `tools` and prints.

Results go to standard output, everything about them to standard error.  An OperatorError is one
line (or one a finding) on standard error and an exit code of `ipc.errors.ExitCode`; usage errors
exit with 64.  Heavy modules are imported inside commands, so `tmem --help` is fast.
"""

from __future__ import annotations

import os
import sys

import typer
from typer.exceptions import Abort, TyperException

from ipc.errors import Disconnected, ExitCode, OperatorError
from tools.cli import (
    admin,
    cluster,
    experiment,
    guest,
    machine,
    scenario,
    security,
    sim,
    volume,
    xen,
)

app = typer.Typer(
    name="tmem",
    help="Transcendent memory in user space: a hypervisor process and guests that share memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cluster.register(app)
guest.register(app)
machine.register(app)
admin.register(app)
security.register(app)
experiment.register(app)
scenario.register(app)
sim.register(app)
volume.register(app)
xen.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    try:
        return int(app(arguments, prog_name="tmem", standalone_mode=False) or 0)
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
