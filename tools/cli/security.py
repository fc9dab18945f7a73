"""audit: who was refused what, and why."""

from __future__ import annotations

import json as json_format
import sys
from typing import Annotated

import typer

from ipc.errors import ExitCode
from tools.cli.common import RunOption

PANEL = "Security"


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(rich_help_panel=PANEL)(audit)


def audit(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as events happen.")] = False,
    guest: Annotated[
        str | None, typer.Option(help="Only what this guest did, or what was done about it.")
    ] = None,
    event: Annotated[
        list[str] | None,
        typer.Option(
            help="Only such events: fault, denied, stale, refused, detached, checksum, suppressed, "
            "quarantine, auth and other verbs of the administrator. May be repeated."
        ),
    ] = None,
    run: RunOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> int:
    """Print the audit log of the cluster that lives, or of the newest one that did."""
    from tools.audit import AuditReader
    from tools.rundir import find_logged

    reader = AuditReader(find_logged(run), guest=guest, events=event or ())
    for line, found in reader.events(follow=follow):
        print(json_format.dumps(found) if json else line, flush=follow)
    if reader.unreadable:
        print(f"tmem: {reader.unreadable} lines are no events", file=sys.stderr)
    return ExitCode.OK
