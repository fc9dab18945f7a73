"""The benchmark's command line; figures go to `runs/bench/latest.json`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from ipc.errors import ExitCode, OperatorError
from tools.bench import bounded, report
from tools.bench.plan import FULL, QUICK, Plan
from tools.bench.run import measure


def _options(arguments: list[str]) -> tuple[Plan, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description="Measure tmem beside its peers."
    )
    parser.add_argument("--quick", action="store_true", help="about a minute instead of several")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON only")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/latest.json"))
    sizes = ("working_set_pages", "full_mib", "metadata_mib", "bounded_pages")
    for name in ("repetitions", *sizes, "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--phase-seconds", type=float)
    parser.add_argument("--patience-seconds", type=float)
    parser.add_argument("--guest-counts", type=_counts, help="for example 1,2,4")
    options = parser.parse_args(arguments)
    changes = {
        field.name: value
        for field in dataclasses.fields(Plan)
        if (value := getattr(options, field.name)) is not None
    }
    return dataclasses.replace(QUICK if options.quick else FULL, **changes), options


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _print_cells(cells: list[list[str]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        shown = Table(*cells[0])
        for line in cells[1:]:
            shown.add_row(*line)
        Console().print(shown)
        return
    widths = [max(len(line[at]) for line in cells) for at in range(len(cells[0]))]
    for line in cells:
        first = line[0].ljust(widths[0])
        print(first, *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)))


def _print(content: dict[str, Any]) -> None:
    _print_cells(report.table(content))
    print()
    _print_cells(report.transport_table(content))
    print()
    _print_cells(bounded.table(content["bounded_rows"]))
    print()
    _print_cells(report.ratio_table(content))
    print()
    state = "noisy" if content["noisy"] else "quiet"
    print(f"a busy loop on core {content['core']} lost {content['lost_share']:.1%}: {state}")
    for skipped in content["skipped"]:
        print(f"skipped {skipped['name']}: {skipped['reason']}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def main(arguments: list[str]) -> int:
    """Run the benchmark; the exit code."""
    plan, options = _options(arguments)
    signal.signal(signal.SIGTERM, _end)  # so that what was started is stopped
    try:
        content = report.document(measure(plan, _say))
    except OperatorError as error:
        _say(f"bench: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    content["plan"] = dataclasses.asdict(plan)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1)
    options.output.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        _print(content)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
