"""up, down, ps, clean: clusters as a whole."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipc.errors import ExitCode, OperatorError
from tools.cli.common import JsonOption, RunOption, print_json, print_table

if TYPE_CHECKING:
    from tools.config import ClusterConfig


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(up)
    app.command()(down)
    app.command()(ps)
    app.command()(clean)


def up(
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Cluster file (TOML); see README.md.")
    ] = None,
    topo: Annotated[
        str | None,
        typer.Option("--topo", help="NAME,key=value,... with NAME default, pair or single."),
    ] = None,
    background: Annotated[
        bool, typer.Option("-d", "--detach", help="Stay up in the background, without work.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.", min=0)] = None,
    run: RunOption = None,
    keep_images: Annotated[
        bool, typer.Option("--keep-images", help="Keep the guests' disks after the run.")
    ] = False,
    json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> int:
    """Run the work of a cluster without tmem and with it, and compare; or start one with -d."""
    from tools.rundir import ENVIRONMENT, RUNS, ClusterDirectory, new_run

    config = _configuration(file, topo, seed)
    if run is None and (named := _environment(ENVIRONMENT)):
        run = Path(named)
    run = (run or new_run(RUNS, datetime.datetime.now(datetime.UTC).astimezone())).absolute()
    cache = run.parent / "cache"
    if background:
        from tools import background as supervisor

        directory = ClusterDirectory(run / "on")
        supervisor.start(config, directory, cache)
        names = ", ".join(name for name, _ in config.guests())
        print(f"cluster {config.name} is up: {names} ({directory.path})")
        return ExitCode.OK
    return _measure(config, run, cache, keep_images=keep_images, json=json, quiet=quiet)


def _measure(
    config: ClusterConfig, run: Path, cache: Path, *, keep_images: bool, json: bool, quiet: bool
) -> int:
    from tools.demo import measure
    from tools.interrupts import Interrupts
    from tools.progress import make_reporter
    from tools.report import HEADER, LEGEND, summary, table, verdict, write_results

    with Interrupts() as interrupts:
        reporter = make_reporter(sys.stderr, quiet=quiet)
        try:
            results = measure(config, run, cache, reporter, interrupts, keep_images=keep_images)
        finally:
            reporter.close()
    path = write_results(results, run)
    if json:
        print_json(results)
    else:
        print_table(HEADER, table(results))
        for line in (*LEGEND, *summary(results)):
            print(line)
        print(f"seed {config.seed}; results in {_short(path)}")
    code, lines = verdict(results)
    for line in lines:
        print(f"tmem: {line}", file=sys.stderr)
    return code


def down(run: RunOption = None) -> int:
    """Stop the cluster."""
    from tools import background
    from tools.rundir import find_live

    directory, record = find_live(run)
    background.stop(directory, record)
    print(f"cluster {record.name} is down")
    return ExitCode.OK


def ps(run: RunOption = None, json: JsonOption = False) -> int:
    """List the processes of the cluster."""
    from tools.rundir import find_live
    from tools.stats import processes
    from tools.units import format_size

    directory, record = find_live(run)
    rows = processes(directory, record)
    if json:
        print_json(rows)
        return ExitCode.OK
    cells = [
        (
            row["name"],
            row["kind"],
            str(row["pid"] or "-"),
            row["state"],
            format_size(row["memory_bytes"]) if row["memory_bytes"] else "-",
        )
        for row in rows
    ]
    print_table(("NAME", "KIND", "PID", "STATE", "MEMORY"), cells)
    return ExitCode.OK


def clean(run: RunOption = None) -> int:
    """Remove what dead clusters left: processes, queues and segments in their registries."""
    from tools.rundir import clusters

    count = 0
    for directory in clusters(run):
        record = directory.read()
        if record is not None and record.lives:
            print(
                f"tmem: {directory.path}: left alone, a cluster is running; stop it with "
                "'tmem down'",
                file=sys.stderr,
            )
        elif directory.is_stale():
            from tools.demo import remove_disks

            for found in directory.sweep():
                print(f"removed {found}")
            remove_disks(directory)
            count += 1
    print(f"{count} stale run directories cleaned")
    return ExitCode.OK


def _configuration(file: Path | None, topo: str | None, seed: int | None) -> ClusterConfig:
    from tools.config import read_config
    from tools.topology import build_topology

    if file is not None and topo is not None:
        raise OperatorError("give a cluster file or a topology, not both", ExitCode.USAGE)
    config = build_topology(topo or "default") if file is None else read_config(file)
    return config if seed is None else config.model_copy(update={"seed": seed})


def _environment(name: str) -> str:
    import os

    return os.environ.get(name, "")


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
