"""audit, rotate: who was refused what, and why; other secrets."""

from __future__ import annotations

import json as json_format
import sys
from typing import Annotated

import typer

from ipc.errors import ExitCode, OperatorError
from tools.cli.common import RunOption

PANEL = "Security"


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(rich_help_panel=PANEL)(audit)
    rotate = typer.Typer(
        help="Draw secrets of a running cluster anew; the old ones are worthless from then on.",
        no_args_is_help=True,
    )
    rotate.command("token")(rotate_token)
    rotate.command("key")(rotate_key)
    rotate.command("seed")(rotate_seed)
    app.add_typer(rotate, name="rotate", rich_help_panel=PANEL)


def audit(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as events happen.")] = False,
    guest: Annotated[
        str | None, typer.Option(help="Only what this guest did, or what was done about it.")
    ] = None,
    event: Annotated[
        list[str] | None,
        typer.Option(
            help="Only such events: fault, denied, stale, refused, detached, reported, checksum, "
            "suppressed, quarantine, auth and other verbs of the administrator. May be repeated."
        ),
    ] = None,
    run: RunOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> int:
    """Print the audit log of the cluster that lives, or of the newest one that did."""
    from tools.audit import AuditReader, names
    from tools.rundir import find_logged

    events = _events(event or [])
    directory = find_logged(run)
    if guest is not None and guest not in (known := names(directory)):
        raise OperatorError(
            f"--guest {guest}: nobody of that name was ever here; there are "
            f"{', '.join(sorted(known)) or 'none'}",
            ExitCode.USAGE,
        )
    reader = AuditReader(directory, guest=guest, events=events)
    for line, found in reader.events(follow=follow):
        print(json_format.dumps(found) if json else line, flush=follow)
    if reader.unreadable:
        print(f"tmem: {reader.unreadable} lines are no events", file=sys.stderr)
    return ExitCode.OK


def _events(names: list[str]) -> list[str]:
    from hypervisor.audit import EVENTS

    for name in names:
        if name not in EVENTS:
            raise OperatorError(
                f"--event {name}: there is no such event; there are {', '.join(EVENTS)}",
                ExitCode.USAGE,
            )
    return names


def rotate_token(
    guest: Annotated[
        str | None, typer.Argument(help="Name or number of a guest (default: all).")
    ] = None,
    run: RunOption = None,
) -> int:
    """Give guests other tokens to attach with; who is attached stays so."""
    from tools import rotate
    from tools.administer import Administrator
    from tools.rundir import find_live

    directory, record = find_live(run)
    names = [one.name for one in record.guests]
    if guest is not None:
        names = [Administrator(directory, record).guest(guest)]
    for name in names:
        rotate.rotate_token(directory, record, name)
        print(f"{name}: another token")
    return ExitCode.OK


def rotate_key(
    volume: Annotated[str, typer.Argument(help="Name of the volume whose nodes have the key.")],
    run: RunOption = None,
) -> int:
    """Give the nodes of a volume another cluster key; links that are up go on."""
    from tools import rotate
    from tools.rundir import find_live

    nodes = rotate.rotate_key(*find_live(run), volume)
    print(f"{volume}: another key for {', '.join(nodes)}")
    return ExitCode.OK


def rotate_seed(run: RunOption = None) -> int:
    """Draw the seed of the hash that finds equal pages anew; pages of before match no new ones."""
    from tools.cli.admin import administrator

    administrator(run).ask("reseed")
    print("hypervisor: another seed")
    return ExitCode.OK
