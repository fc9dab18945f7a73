"""experiment: which policy reads least from disk."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ipc.errors import ExitCode
from tools.cli.common import JsonOption, print_json, print_table

QuickOption = Annotated[
    bool, typer.Option("--quick", help="Half the size and half the length: about half a minute.")
]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    experiments = typer.Typer(
        help="Run an experiment over the real parts in one process.", no_args_is_help=True
    )
    experiments.command()(policy)
    experiments.callback()(_group)
    app.add_typer(experiments, name="experiment")


def _group() -> None:
    """Run an experiment over the real parts in one process."""


def policy(json: JsonOption = False, quick: QuickOption = False) -> int:
    """Disk reads of four guests under greedy, static and scheduled division of memory, beside the
    best static division there is.

    Exits with 1 if the scheduler does not keep what is promised of it, or a page was wrong.
    """
    from tools.experiment.policy import QUICK, Plan, measure

    found = measure(QUICK if quick else Plan(), _say)
    if json:
        print_json(found)
    else:
        _print(found)
    return ExitCode.OK if found["holds"] and not found["mismatches"] else ExitCode.VIOLATED


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(found: dict[str, Any]) -> None:
    runs = found["runs"]
    guests = list(next(iter(runs.values()))["reads"])
    rows = [
        [mode, f"{sum(run['reads'].values())}", *(str(run["reads"][guest]) for guest in guests)]
        for mode, run in runs.items()
    ]
    print_table(["policy", "disk reads", *guests], rows)
    parts = ", ".join(f"{guest} {parts}" for guest, parts in found["best_division"].items())
    print()
    print(f"best static division of {len(found['divisions'])}: {parts} parts")
    print(f"scheduled reads {found['fewer_than_greedy']:.1%} less than greedy")
    print(f"scheduled reads {found['over_best_static']:+.1%} beside the best static division")
    print(f"{found['verified_pages']} pages verified, {found['mismatches']} wrong")
