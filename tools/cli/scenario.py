"""scenario list, run, attack: attacks on a cluster of their own, with the defence off or on."""

from __future__ import annotations

import datetime
import functools
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ipc.errors import ExitCode, OperatorError
from tools.cli.common import JsonOption, print_json, print_table, run_command, unread

if TYPE_CHECKING:
    from tools.scenario.scenario import Outcome, Scenario

_WIDTH = 96
_WIDTH_LEAST = 20
_LIST_WIDTH = 29
"""Of what stands before what the attacker does, in the list."""
NODES_MAX = 8


def register(app: typer.Typer) -> None:
    """Add these commands."""
    scenarios = typer.Typer(
        help="Hostile guests and poisoned pages: shown, explained, stopped.", no_args_is_help=True
    )
    scenarios.command("list")(list_scenarios)
    scenarios.command()(run)
    scenarios.command()(attack)
    app.add_typer(scenarios, name="scenario")


def list_scenarios(json: JsonOption = False) -> int:
    """All scenarios: what is tried, and what stops it."""
    from tools.scenario.catalogue import SCENARIOS, UNTRIED

    if json:
        print_json(
            [
                {
                    "name": one.name,
                    "kind": one.kind,
                    "adversary": one.adversary,
                    "tries": one.tries,
                    "stops": one.stops,
                    "off": one.off,
                }
                for one in SCENARIOS.values()
            ]
        )
    else:
        rows = []
        for one in SCENARIOS.values():
            first, *others = _wrapped(one.tries, _LIST_WIDTH)
            rows += [(one.name, one.kind, first), *(("", "", line) for line in others)]
        print_table(("NAME", "KIND", "THE ATTACKER"), rows)
        print("not tried, as there is nothing to attack:")
        for line in UNTRIED:
            _say(line)
    return ExitCode.OK


def run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Of a scenario, or 'all'.")],
    defence: Annotated[
        str, typer.Option(help="off: see the attack work, where it can; on: see it fail.")
    ] = "on",
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why, and tell what happens as it happens.")
    ] = False,
    json: JsonOption = False,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report of poisoned-cluster (default: below ./runs)."),
    ] = None,
) -> int:
    """Play an attack against victims that check every page, on a cluster of its own.

    Exits with 0 if the victims were protected (held), 1 if the attack worked or a victim was harmed
    (broken: what is to be seen with --defence off), 2 if it can't be told (unknown).
    """
    from tools.interrupts import Interrupts
    from tools.scenario.catalogue import SCENARIOS, find
    from tools.scenario.model import exit_code
    from tools.scenario.play import play_all
    from tools.scenario.screen import screen

    if defence not in ("on", "off"):
        raise OperatorError(f"--defence {defence}: say on or off", ExitCode.USAGE)
    chosen = list(SCENARIOS.values()) if name == "all" else [find(name)]
    if out is not None:
        _check_folder(out, chosen)
    is_on = defence == "on"

    def announce(scenario: Scenario) -> None:
        if not json:
            _announce(scenario, is_on=is_on, explain=explain)

    def tell(line: str) -> None:
        if explain:
            _say(line, sys.stderr if json else sys.stdout)

    outcomes: list[Outcome] = []
    try:
        with unread(), Interrupts() as interrupts, screen(sys.stdout) as shown:
            for outcome in play_all(
                chosen,
                defence=is_on,
                seed=seed,
                interrupts=interrupts,
                announce=announce,
                tell=tell,
                watch=(lambda _scene: None) if json or explain else shown.watch,
                command=functools.partial(run_command, context.find_root().command),
            ):
                shown.end()
                outcomes.append(outcome)
                if not json:
                    _print(outcome, explain=explain)
                if outcome.scenes and (name != "all" or out is not None):
                    _report(outcome, out, quiet=json)
    finally:
        # Also of those that had ended when somebody pressed Ctrl-C.
        records = [outcome.record() for outcome in outcomes]
        if json and (records or name == "all"):
            print_json(records if name == "all" else records[0])
        elif len(outcomes) > 1:
            _print_sum(outcomes)
    return exit_code([outcome.verdict for outcome in outcomes])


def _check_folder(out: Path, chosen: list[Scenario]) -> None:
    """Before minutes are spent on a report that has nowhere to go."""
    if not any(scenario.watched for scenario in chosen):
        raise OperatorError(
            f"--out {out}: there is no report of {chosen[0].name}, only of poisoned-cluster",
            ExitCode.USAGE,
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        writable = os.access(out, os.W_OK | os.X_OK)
    except OSError as error:
        raise OperatorError(f"--out {out}: {error.strerror}", ExitCode.NO_INPUT) from None
    if not writable:
        raise OperatorError(f"--out {out}: no files can be made there", ExitCode.NO_INPUT)


def attack(
    module: Annotated[str, typer.Argument(help="One of guests/adversaries, for example flood.")],
    parameters: Annotated[
        list[str] | None, typer.Argument(help="What the program takes.", metavar="[KEY=VALUE]...")
    ] = None,
    jail: Annotated[
        str, typer.Option(help="off, auto or strict: how the guest is jailed.")
    ] = "off",
    nodes: Annotated[
        int,
        typer.Option(
            help="It is one of so many nodes that mount one volume (default: it has a disk of its "
            "own).",
            min=0,
            max=NODES_MAX,
            show_default=False,
        ),
    ] = 0,
    grant: Annotated[
        bool, typer.Option("--grant", help="It may write the shared pool of its parameter uuid.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 1,
) -> int:
    """Run one adversary by hand, in the only guest of a cluster of its own; print its report.

    Exits with 2 if it could not be run to its end.
    """
    from ipc.jail import MODES
    from tools.interrupts import Interrupts
    from tools.scenario import play

    mode = next((one for one in MODES if one == jail), None)
    if mode is None:
        raise OperatorError(f"--jail {jail}: say {', '.join(MODES)}", ExitCode.USAGE)
    with unread(), Interrupts() as interrupts:
        report, problems = play.attack(
            module,
            _parameters(parameters or []),
            jail=mode,
            nodes=nodes,
            grant=grant,
            seed=seed,
            interrupts=interrupts,
        )
    print_json(report)
    for line in problems:
        print(f"tmem: {line}", file=sys.stderr)
    return ExitCode.INCONCLUSIVE if problems else ExitCode.OK


def _parameters(texts: list[str]) -> dict[str, str]:
    told: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise OperatorError(f"{text!r} is no parameter; write KEY=VALUE", ExitCode.USAGE)
        if key in told:
            raise OperatorError(f"{key} is said twice", ExitCode.USAGE)
        told[key] = value
    return told


def _report(outcome: Outcome, out: Path | None, *, quiet: bool) -> None:
    from tools.rundir import RUNS, new_run
    from tools.scenario.report import write

    folder = out or new_run(RUNS, datetime.datetime.now().astimezone())
    path = write(outcome, folder)
    if not quiet:
        _say(f"report: {path}")


def _wrapped(text: str, used: int, stream: TextIO | None = None) -> list[str]:
    """The lines of a text on a terminal, of which so many columns are used; else one line."""
    if not (stream or sys.stdout).isatty():
        return [text]
    columns = shutil.get_terminal_size().columns
    return textwrap.wrap(text, max(columns - used, _WIDTH_LEAST)) or [""]


def _say(text: str, stream: TextIO | None = None) -> None:
    first, *others = _wrapped(text, 4, stream)
    for line in (f"  {first}", *(f"    {line}" for line in others)):
        print(line, file=stream or sys.stdout)
    (stream or sys.stdout).flush()


def _announce(scenario: Scenario, *, is_on: bool, explain: bool) -> None:
    print(f"{scenario.name} ({scenario.kind}), defence {'on' if is_on else 'off'}")
    _say(f"attacker: {scenario.tries}")
    if is_on:
        _say(f"defence:  {scenario.stops}")
    elif scenario.off is None:
        _say(f"defence:  on, it can't be switched off: {scenario.stops}")
    else:
        _say(f"defence:  off: {scenario.off}")
    if explain:
        for line in (
            _wrapped(scenario.explain, 4)
            if sys.stdout.isatty()
            else textwrap.wrap(scenario.explain, _WIDTH)
        ):
            print(f"  | {line}")
    sys.stdout.flush()


def _print(outcome: Outcome, *, explain: bool) -> None:
    tally = outcome.tally
    if not explain:
        for line in outcome.events:
            _say(line)
    for key, value in tally.figures.items():
        _say(f"{key}: {value}")
    _say(
        f"{tally.attempts:,} attempts, {tally.succeeded:,} succeeded, {tally.caught:,} caught; "
        f"victims checked {tally.victim_checks:,}, mismatches {tally.victim_mismatches:,}"
    )
    for line in tally.problems if not explain else []:
        _say(f"problem: {line}")
    _say(f"verdict: {outcome.verdict} ({outcome.seconds:.1f} s)")


def _print_sum(outcomes: list[Outcome]) -> None:
    counts = {
        verdict: sum(one.verdict == verdict for one in outcomes)
        for verdict in ("held", "broken", "unknown")
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{len(outcomes)} scenarios: {told}")
    switched = [one for one in outcomes if not one.defence and one.scenario.off is not None]
    if switched:
        seen = sum(one.verdict == "broken" for one in switched)
        print(f"{seen} of the {len(switched)} attacks whose defence can be off were seen to work")
