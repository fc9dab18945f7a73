"""Timed phases, processor time, pinning and noise.

A figure is never one number: each case runs once a repetition, all cases in shuffled order, so
that whatever disturbs the machine disturbs all of them alike.  The median over the repetitions of
the phases' own medians is printed with its spread; a ratio is taken within each repetition first.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

NOISY_SHARE: Final = 0.05
"""Above this the machine is called noisy; an idle core of a virtual machine loses 0.6 to 5 %."""
_GAP_NS: Final = 5_000
"""A step of a busy loop takes 0.1 us; whatever takes this long was taken from us."""


@dataclass(frozen=True)
class Figures:
    """What one phase of one case measured."""

    median_us: float
    p99_us: float
    pages_per_second: float | None = None
    server_us_per_page: float | None = None
    """Processor time of the serving process, None if nothing serves."""
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Something to time.

    `run(seconds, pinned core or None)` gives figures by the name of their row: several where two
    kinds of call can't be timed apart.
    """

    name: str
    run: Callable[[float, int | None], dict[str, Figures]]


@dataclass(frozen=True)
class Skipped:
    """A peer that could not be measured here, and why."""

    name: str
    reason: str


def figures(
    call_ns: Sequence[int],
    pages_per_call: int,
    server_cpu_ns: int | None = None,
    extra: dict[str, float] | None = None,
) -> Figures:
    """Reduce the durations of one client's calls; pages a second count time inside calls only."""
    ordered = sorted(call_ns)
    pages = len(ordered) * pages_per_call
    return Figures(
        median_us=ordered[len(ordered) // 2] / 1e3,
        p99_us=ordered[len(ordered) * 99 // 100] / 1e3,
        pages_per_second=pages / (sum(ordered) / 1e9),
        server_us_per_page=None if server_cpu_ns is None else server_cpu_ns / 1e3 / pages,
        extra=extra or {},
    )


def median(values: Sequence[float]) -> float:
    """The median; `values` is not empty."""
    return statistics.median(values)


def cpu_ns(pid: int) -> int:
    """Processor time that all threads of a process have used (first field of schedstat)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total


def pin(pids: Sequence[int], cores: set[int]) -> None:
    """Let all threads of all these processes run on these cores only."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)


def lost_share(seconds: float) -> float:
    """The share of time that a busy loop on this core did not get."""
    now = time.perf_counter_ns
    begin = last = now()
    end = begin + int(seconds * 1e9)
    lost = 0
    while last < end:
        moment = now()
        if moment - last > _GAP_NS:
            lost += moment - last
        last = moment
    return lost / (last - begin)
