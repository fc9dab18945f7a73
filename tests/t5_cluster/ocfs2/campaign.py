"""Power cuts and deaths of nodes, in full, for `make crash-cluster`.

    python -m tests.t5_cluster.ocfs2.campaign [--seed first] [--seeds 4] [--length 40]
    python -m tests.t5_cluster.ocfs2.campaign --replay ID

A state that fails is printed with its id.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tests.t5_cluster.ocfs2.powercuts import PowerCutRun, Width


class Task(NamedTuple):
    """What one process does at a time."""

    what: str
    seed: int
    length: int
    part: int
    parts: int
    every: int


class Result(NamedTuple):
    """What came of it."""

    task: Task
    counts: Counter[str]
    failure: str | None


PARTS = 4


def tasks(seeds: range, length: int, every: int) -> Iterator[Task]:
    """All of a campaign."""
    for seed in seeds:
        for part in range(PARTS):
            yield Task("power", seed, length, part, PARTS, every)


def do(task: Task) -> Result:
    """One part of a run."""
    counts: Counter[str] = Counter()
    try:
        run = PowerCutRun(task.seed, task.length)
        counts = run.counts
        run.run(Width(every=task.every), task.part, task.parts)
    except AssertionError as failure:
        return Result(task, counts, str(failure))
    return Result(task, counts, None)


def replay(name: str) -> None:
    """One state."""
    _, seed, length, _ = name.split("/", 3)
    PowerCutRun(int(seed), int(length)).replay(name)


def main() -> int:
    """Run a campaign, or one state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--seeds", type=int, default=4, help="how many workloads")
    parser.add_argument("--length", type=int, default=40, help="operations of a workload")
    parser.add_argument("--every", type=int, default=1, help="of so many states one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", metavar="ID", help="judge one state again")
    arguments = parser.parse_args()
    if arguments.replay:
        replay(arguments.replay)
        print(f"{arguments.replay}: holds")
        return 0
    return campaign(arguments)


def campaign(arguments: argparse.Namespace) -> int:
    """All states; 1 if one fails."""
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    began = time.monotonic()
    total: Counter[str] = Counter()
    failures: list[str] = []
    with multiprocessing.Pool(arguments.jobs) as pool:
        work = tasks(seeds, arguments.length, arguments.every)
        for task, counts, failure in pool.imap_unordered(do, work):
            total += counts
            said = failure or _counted(counts)
            print(f"{task.what}/{task.seed} {task.part + 1}/{task.parts}: {said}", flush=True)
            if failure is not None:
                failures.append(failure.split(": ")[0])
    seconds = time.monotonic() - began
    judged = total["states"] + total["recovery cuts"]
    print(
        f"seeds {seeds[0]} to {seeds[-1]}: {_counted(total)}; "
        f"{seconds:.0f} seconds, {judged / seconds:.0f} a second"
    )
    for name in failures:
        print(f"again: python -m tests.t5_cluster.ocfs2.campaign --replay {name}")
    return bool(failures)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
