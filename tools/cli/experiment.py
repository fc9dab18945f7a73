"""experiment: questions about memory, answered by running the real parts."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ipc.errors import ExitCode, OperatorError
from tools.cli.common import JsonOption, print_json, print_table

QuickOption = Annotated[
    bool, typer.Option("--quick", help="Half the size and half the length: about half a minute.")
]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    experiments = typer.Typer(help="Run an experiment over the real parts.", no_args_is_help=True)
    experiments.command()(policy)
    experiments.command()(classic)
    experiments.command()(moving)
    experiments.command()(burst)
    experiments.command()(oom)
    experiments.callback()(_group)
    app.add_typer(experiments, name="experiment")


def _group() -> None:
    """Run an experiment over the real parts."""


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


def classic(
    guests: Annotated[int | None, typer.Option(help="How many guests (8).", min=1)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller, fewer levels, each run once: minutes.")
    ] = False,
    modes: Annotated[
        str | None, typer.Option(help="Only these, with commas between them.", metavar="A,B")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first run.", min=0)] = None,
    repeat: Annotated[int | None, typer.Option(help="Runs of each point.", min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html, report.md and results.json.")
    ] = None,
    direct: Annotated[
        bool,
        typer.Option(
            "--direct",
            help="Use disks and swap around the host's page cache (O_DIRECT): measured seconds are"
            " those of the disk below.",
        ),
    ] = False,
    ksm: Annotated[
        bool,
        typer.Option(
            "--ksm",
            help="Run mode tmem+ksm at the heaviest level: the host's kernel merges equal pages of"
            " RAM meanwhile (wants root).",
        ),
    ] = False,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Folder for clusters and their disks (runs).", metavar="DIR"),
    ] = None,
    json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> int:
    """The builds that made tmem known, measured again: disk reads, swap I/O and time from no
    pressure to far beyond memory, in each way of dividing the same memory.

    Exits with 1 if a page or file was wrong or a run failed.
    """
    from tools.experiment import classic as experiment
    from tools.experiment import classic_page, classic_report
    from tools.interrupts import Interrupts
    from tools.progress import SweepReporter
    from tools.rundir import RUNS, new_run

    plan = experiment.with_options(
        experiment.QUICK if quick else experiment.Plan(),
        guests=guests,
        seed=seed,
        repeat=repeat,
        modes=modes,
        direct=direct,
        ksm=ksm,
    )
    run = new_run(directory or RUNS, datetime.datetime.now(datetime.UTC).astimezone()).absolute()
    folder = out if out is not None else run
    try:
        # Before anything is measured that could then not be written down.
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise OperatorError(
            f"can't make the folder {folder}: {reason.strerror}", ExitCode.NO_INPUT
        ) from None
    reporter = SweepReporter(sys.stderr, quiet=quiet)
    try:
        with Interrupts() as interrupts:
            measured = experiment.measure(
                plan, run, run.parent / "cache", interrupts, reporter.step, reporter.news
            )
    finally:
        reporter.close()
    found = classic_report.complete(measured)
    classic_page.write(found, folder)
    if json:
        print_json(found)
    else:
        print(classic_report.markdown(found))
        print(f"report in {folder / 'report.html'}")
    code, lines = experiment.verdict(found)
    for line in lines:
        print(f"tmem: {line}", file=sys.stderr)
    return code


DemandModes = Annotated[
    str | None, typer.Option("--modes", help="Only these, with commas between them.", metavar="A,B")
]
DemandQuick = Annotated[bool, typer.Option("--quick", help="Smaller: a minute or so.")]


def moving(modes: DemandModes = None, quick: DemandQuick = False, json: JsonOption = False) -> int:
    """Demand that moves from guest to guest: each in turn needs twice its share of the memory."""
    return _demand("moving", modes, quick=quick, json=json)


def burst(modes: DemandModes = None, quick: DemandQuick = False, json: JsonOption = False) -> int:
    """A sudden demand: how long a guest takes to have three times its share of the memory."""
    return _demand("burst", modes, quick=quick, json=json)


def oom(modes: DemandModes = None, quick: DemandQuick = False, json: JsonOption = False) -> int:
    """Ever more demand: how much one guest's programs may have until one of them is killed."""
    return _demand("oom", modes, quick=quick, json=json)


def _demand(name: str, modes: str | None, *, quick: bool, json: bool) -> int:
    """Exits with 1 if a page was wrong or a run failed."""
    from dataclasses import replace

    from tools.experiment import demand as experiment
    from tools.interrupts import Interrupts
    from tools.progress import SweepReporter
    from tools.rundir import RUNS, new_run

    plan = experiment.QUICK if quick else experiment.Demand()
    if modes is not None:
        plan = replace(plan, modes=experiment.chosen_modes(modes))
    run = new_run(RUNS, datetime.datetime.now(datetime.UTC).astimezone()).absolute()
    reporter = SweepReporter(sys.stderr, quiet=json)
    try:
        with Interrupts() as interrupts:
            found = experiment.measure(
                name, plan, run, run.parent / "cache", interrupts, reporter.step, reporter.news
            )
    finally:
        reporter.close()
    if json:
        print_json(found)
    else:
        print_table(*experiment.table(found))
    lines = experiment.went_wrong(found)
    for line in lines:
        print(f"tmem: {line}", file=sys.stderr)
    return ExitCode.VIOLATED if lines else ExitCode.OK


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
