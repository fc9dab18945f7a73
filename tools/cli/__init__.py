"""`tmem`: the command line.  Thin: every command asks one module of `tools` and prints.

Results go to standard output, everything about them to standard error.  An OperatorError is one
line (or one a finding) on standard error and an exit code of `ipc.errors.ExitCode`; usage errors
exit with 64.  Heavy modules are imported inside commands, so `tmem --help` is fast.
"""

from __future__ import annotations

import sys

import typer

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
from tools.cli.common import run_command

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
    return run_command(
        typer.main.get_command(app), sys.argv[1:] if arguments is None else arguments
    )
