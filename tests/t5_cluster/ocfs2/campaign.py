"""Power cuts and deaths of nodes, in full, for `make crash-cluster`.

    python -m tests.t5_cluster.ocfs2.campaign [--seed first] [--seeds 4] [--length 60]
    python -m tests.t5_cluster.ocfs2.campaign --replay ID

A state that fails is printed with its id. Ctrl-C ends it, and what was judged so far is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tests.t5_cluster.ocfs2.deaths import DeathRun
from tests.t5_cluster.ocfs2.judgement import Width
from tests.t5_cluster.ocfs2.poisoned import POISONED
from tests.t5_cluster.ocfs2.powercuts import PowerCutRun
from tests.t5_cluster.ocfs2.world import SLOTS


class Task(NamedTuple):
    """What one process does at a time."""

    what: str
    seed: int
    length: int
    part: int
    every: int

    def __str__(self) -> str:
        """For a person."""
        return f"{self.what} seed {self.seed}, part {self.part + 1} of {PARTS}"


class Result(NamedTuple):
    """What came of it."""

    task: Task
    counts: Counter[str]
    failure: str | None


PARTS = 12
POWER, DEATH, BOTH = "power", "death", "both"
KINDS = (POWER, DEATH, BOTH, *(POISONED + what for what in (POWER, DEATH, BOTH)))
"""The second three with checksums of pages and a pool that an attacker has."""


def tasks(seeds: range, length: int, every: int, only: str | None) -> Iterator[Task]:
    """All of a campaign. Each seed has one of the nodes as the victim."""
    for seed in seeds:
        for what in KINDS:
            if only in (None, what):
                yield from (Task(what, seed, length, part, every) for part in range(PARTS))


def do(task: Task) -> Result:
    """One part of a run."""
    counts: Counter[str] = Counter()
    try:
        run = _run(task.what, task.seed, task.length, task.seed % SLOTS, None)
        counts = run.counts
        run.run(Width(every=task.every), task.part, PARTS)
    except Exception as failure:  # noqa: BLE001 - whatever it is, it has to be named
        said = str(failure)
        if not said.startswith(f"{task.what}/"):
            # The workload itself did not go well.
            victim = "" if task.what.endswith(POWER) else f"/{task.seed % SLOTS}"
            said = f"{task.what}/{task.seed}/{task.length}{victim}: {failure!r}"
        return Result(task, counts, said)
    return Result(task, counts, None)


def _run(
    what: str, seed: int, length: int, victim: int, step: int | None
) -> PowerCutRun | DeathRun:
    poisoned = what.startswith(POISONED)
    if what.endswith(DEATH):
        return DeathRun(seed, length, victim, poisoned=poisoned)
    death = (victim, step) if what.endswith(BOTH) else None
    return PowerCutRun(seed, length, death, poisoned=poisoned)


def replay(name: str) -> None:
    """One state."""
    what, seed, length, *rest = name.split("/")
    kind = what.removeprefix(POISONED)
    victim = int(rest[0]) if kind != POWER else 0
    step = int(rest[1]) if kind == BOTH and len(rest) > 1 else None
    run = _run(what, int(seed), int(length), victim, step)
    if len(rest) > (kind == DEATH) + 2 * (kind == BOTH):
        run.replay(name)


def main() -> int:
    """Run a campaign, or one state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--seeds", type=int, default=4, help="how many workloads")
    parser.add_argument("--length", type=int, default=60, help="operations of a workload")
    parser.add_argument("--every", type=int, default=1, help="of so many states one")
    parser.add_argument("--only", choices=KINDS)
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
    work = tasks(seeds, arguments.length, arguments.every, arguments.only)
    began = time.monotonic()
    total: Counter[str] = Counter()
    failures: list[str] = []
    with contextlib.suppress(KeyboardInterrupt), multiprocessing.Pool(arguments.jobs) as pool:
        for task, counts, failure in pool.imap_unordered(do, work):
            total += counts
            print(f"{task}: {failure or _counted(counts)}", flush=True)
            if failure is not None:
                failures.append(failure.split(": ")[0])
    seconds = time.monotonic() - began
    judged = total["power cuts"] + total["recovery cuts"] + total["deaths"]
    print(
        f"seeds {seeds[0]} to {seeds[-1]}: {_counted(total)}; "
        f"{seconds:.0f} seconds, {judged / seconds:.0f} a second"
    )
    for name in failures:
        print(f"again: python -m tests.t5_cluster.ocfs2.campaign --replay {name}")
    return bool(failures)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
