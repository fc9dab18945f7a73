"""sim: a whole cluster in one process, from one seed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ipc.errors import ExitCode


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(sim)


def sim(
    seed: Annotated[int, typer.Argument(help="The first seed.", min=0)] = 1,
    seeds: Annotated[int, typer.Option(help="How many seeds, one after the other.", min=1)] = 1,
    events: Annotated[int, typer.Option(help="Events of each.", min=1)] = 300,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="A line an event; 'pydoc tools.sim' is the legend.")
    ] = False,
) -> int:
    """Simulate a cluster with faults and hold it to every promise; exit 1 if one is broken."""
    from tools.sim.run import run_seed

    failed = []
    totals = [0, 0, 0, 0]
    for number in range(seed, seed + seeds):
        outcome = run_seed(number, events, print if verbose else lambda _line: None)
        if outcome.failure:
            failed.append(number)
            print(outcome.failure if not verbose else outcome.failure.partition("Traceback")[2])
            print(f"seed {number} FAILED; again: tmem sim {number} --events {events} --verbose")
        elif seeds == 1:
            print(outcome.line())
        counts = outcome.events, outcome.calls, outcome.restarts, outcome.deaths
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        if sys.stderr.isatty() and seeds > 1:
            print(f"\r{number - seed + 1} of {seeds} seeds", end="", file=sys.stderr)
    if seeds > 1:
        print(
            f"seeds {seed} to {seed + seeds - 1}: {totals[0]} events, {totals[1]} calls, "
            f"{totals[2]} restarts, {totals[3]} deaths, {len(failed)} failed"
        )
    return ExitCode.VIOLATED if failed else ExitCode.OK
