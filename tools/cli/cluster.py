"""up, down, ps, clean: clusters as a whole."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipc.errors import ExitCode, OperatorError
from ipc.jail import MODES
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
        Path | None, typer.Option("-f", "--file", help="Cluster file (TOML); see tools/MANUAL.md.")
    ] = None,
    topo: Annotated[
        str | None,
        typer.Option(
            "--topo", help="NAME,key=value,... with NAME default, pair, single or shared."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option("--test", help="Of guests that share a disk: sharing or coherence."),
    ] = None,
    nemesis: Annotated[
        str | None,
        typer.Option(
            "--nemesis",
            help="What goes wrong in --test coherence: kill,pause,partition,messages,hypervisor,"
            "drop or all.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="How long --test coherence runs.", min=1.0, max=86400.0)
    ] = 20.0,
    background: Annotated[
        bool, typer.Option("-d", "--detach", help="Stay up in the background, without work.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.", min=0)] = None,
    jail: Annotated[
        str | None,
        typer.Option(
            "--jail",
            help="What guests and hypervisor may do: off (whatever you may), auto (as little as "
            "this machine can see to), strict (the same, or exit code 69) (default: auto).",
            show_default=False,
        ),
    ] = None,
    run: RunOption = None,
    keep_images: Annotated[
        bool, typer.Option("--keep-images", help="Keep the guests' disks after the run.")
    ] = False,
    json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> int:
    """Run the work of a cluster without tmem and with it, and compare; or start one with -d."""
    from tools.rundir import ENVIRONMENT, RUNS, ClusterDirectory, new_run

    if test is not None and topo is None and file is None:
        topo = "shared"
    config = _configuration(file, topo, seed, jail)
    _tell_what_jail_lacks(config)
    if test not in (None, "sharing", "coherence"):
        raise OperatorError(
            f"there is no test {test!r}; there are sharing, coherence", ExitCode.USAGE
        )
    if background and test is not None:
        raise OperatorError("a test does not run in the background; leave out -d", ExitCode.USAGE)
    if nemesis is not None and test != "coherence":
        raise OperatorError("--nemesis belongs to --test coherence", ExitCode.USAGE)
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
    if test == "sharing":
        return _sharing(config, run, cache, json=json, quiet=quiet)
    if test == "coherence":
        kinds = nemesis or ""
        return _coherence(config, run, cache, kinds, seconds, json=json, quiet=quiet)
    return _measure(config, run, cache, keep_images=keep_images, json=json, quiet=quiet)


def _sharing(config: ClusterConfig, run: Path, cache: Path, *, json: bool, quiet: bool) -> int:
    from tools import sharing
    from tools.interrupts import Interrupts
    from tools.progress import make_reporter
    from tools.report import write_results

    with Interrupts() as interrupts:
        reporter = make_reporter(sys.stderr, quiet=quiet)
        try:
            results = sharing.measure_sharing(config, run, cache, reporter, interrupts)
        finally:
            reporter.close()
    path = write_results(results, run)
    if json:
        print_json(results)
    else:
        print_table(sharing.HEADER, sharing.table(results))
        for line in sharing.summary(results):
            print(line)
        print(f"seed {config.seed}; results in {_short(path)}")
    code, lines = sharing.verdict(results)
    for line in lines:
        print(f"tmem: {line}", file=sys.stderr)
    return code


def _coherence(
    config: ClusterConfig,
    run: Path,
    cache: Path,
    kinds: str,
    seconds: float,
    *,
    json: bool,
    quiet: bool,
) -> int:
    from tools import coherence
    from tools.interrupts import Interrupts
    from tools.nemesis import parse_kinds
    from tools.report import write_results

    plan = parse_kinds(kinds)
    with Interrupts() as interrupts:
        results = coherence.run_test(
            config,
            run,
            cache,
            plan,
            seconds,
            say=lambda line: None if quiet else print(line, file=sys.stderr, flush=True),
            interrupts=interrupts,
        )
    path = write_results(results, run)
    if json:
        print_json(results)
    else:
        for line in coherence.summary(results):
            print(line)
        print(f"seed {config.seed}; results in {_short(path)}")
    return coherence.exit_code(results)


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
    from tools.stats import NODE_HEADER, node_cells, processes
    from tools.units import format_size

    directory, record = find_live(run)
    rows = processes(directory, record)
    if json:
        print_json(rows)
        return ExitCode.OK
    cells: list[tuple[str, ...]] = [
        (
            row["name"],
            row["kind"],
            str(row["pid"] or "-"),
            row["state"],
            format_size(row["memory_bytes"]) if row["memory_bytes"] else "-",
        )
        for row in rows
    ]
    header: tuple[str, ...] = ("NAME", "KIND", "PID", "STATE", "MEMORY")
    if any(row.get("node") for row in rows):
        header += NODE_HEADER
        cells = [(*line, *node_cells(row)) for line, row in zip(cells, rows, strict=True)]
    print_table(header, cells)
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


def _configuration(
    file: Path | None, topo: str | None, seed: int | None, jail: str | None
) -> ClusterConfig:
    from tools.config import read_config
    from tools.topology import build_topology

    if file is not None and topo is not None:
        raise OperatorError("give a cluster file or a topology, not both", ExitCode.USAGE)
    config = build_topology(topo or "default") if file is None else read_config(file)
    if jail not in (None, *MODES):
        raise OperatorError(f"--jail {jail}: there are {', '.join(MODES)}", ExitCode.USAGE)
    given = {"seed": seed, "jail": jail}
    return config.model_copy(
        update={key: value for key, value in given.items() if value is not None}
    )


def _tell_what_jail_lacks(config: ClusterConfig) -> None:
    """One line, if something is promised that this machine can't hold."""
    from tools.jails import missing_here

    missing = missing_here() if config.jail == "auto" else []
    if missing:
        print(f"tmem: jail: this machine has no {'; no '.join(missing)}", file=sys.stderr)


def _environment(name: str) -> str:
    import os

    return os.environ.get(name, "")


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
