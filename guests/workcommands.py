"""programs: the workload of that name as a command, for people who want to see memory run short.

    tmem exec alpha -- programs programs=2 pages=600

It goes on in slices, so other commands (`cat /proc/meminfo`) show the guest meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from guests.commands import Console, UsageError
from guests.workloads import programs as workload
from guests.workloads.job import BadParameters, Findings, Job

SLICE_SECONDS: Final = 0.05
"""Work between two looks at everything else."""
_PARAMETERS: Final = ("programs", "pages", "passes", "locality", "writes", "forks", "noise", "seed")


def programs(console: Console, arguments: list[str]) -> Iterator[None]:
    """programs [programs|pages|passes|locality|writes|forks|noise|seed=NUMBER]..."""  # noqa: D403
    parameters = dict(map(_parameter, arguments))
    kernel, findings = console.kernel, Findings()
    processes = kernel.userland.processes
    before = set(processes.kills)
    seed = int(parameters.pop("seed", 0))
    job = Job("programs", seed, parameters, kernel.vfs, findings, processes)
    try:
        yield from _sliced(console, workload.run(job))
    except BadParameters as reason:
        raise UsageError(str(reason)) from None
    for kill in processes.kills:
        if kill not in before:
            console.say(str(kill))
    for path in findings.mismatch_paths:
        kernel.findings.mismatch(path)
        console.say(f"{path} does not hold what was written")
    console.line(f"{job.done} accesses, {findings.mismatches} wrong")
    console.exit_code = 1 if findings.mismatches else 0


def _parameter(word: str) -> tuple[str, float]:
    name, _, text = word.partition("=")
    try:
        if name in _PARAMETERS:
            number = int(text) if text.isdigit() else float(text)
            if math.isfinite(number):
                return name, number
    except ValueError:
        pass
    raise UsageError(f"not a parameter and a number: '{word}'")


def _sliced(console: Console, steps: Iterator[None]) -> Iterator[None]:
    """As many steps at a time as fill a slice."""
    until = console.kernel.now_seconds() + SLICE_SECONDS
    for _ in steps:
        if console.kernel.now_seconds() >= until:
            yield
            until = console.kernel.now_seconds() + SLICE_SECONDS
