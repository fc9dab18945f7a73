"""The ring beside the queues: on one core, on two, beside programs that compute, and at rest.

One hypervisor has two guests in this process, one of each transport, with equal working sets.  The
yields of a ring are quick when nobody else wants the processor and cost time slices when somebody
does, so each case is measured where it is worst as well as where it is best: with a *hog*, an
endless loop in Python, on each core the mean of all calls counts, not the median, because a call
that waits for a time slice is the point.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from tools.bench import cluster, cprogram
from tools.bench.calls import Guest
from tools.bench.plan import Plan
from tools.bench.timing import Figures, cpu_ns, figures, median, pin

ONE_CORE: Final = "one core"
TWO_CORES: Final = "two cores"
HOGS: Final = "hog on each core"
C_MQ: Final = cprogram.MQ
YIELDS: Final = cprogram.YIELDS
_HOG: Final = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""
_HOG_PHASES: Final = 4
"""Phases are as many times longer beside hogs: a time slice is a hundred calls."""
_IDLE_SECONDS: Final = 2.0

Samples = dict[tuple[str, str], list[Figures]]
"""(setting, row) -> one `Figures` a repetition."""


class Transports:
    """The cluster with its two guests; `measure` gives rows and ratios."""

    def __init__(self, plan: Plan, stack: ExitStack, program: Path | None) -> None:
        self._plan = plan
        self._program = program
        pages = plan.working_set_pages
        self._cluster = cluster.Cluster(2 * pages + cluster.SPARE_PAGES)
        stack.callback(self._cluster.close)
        self._guests: dict[str, Guest] = {}
        for name, ring in (("ring", True), ("mqueue", False)):
            guest = self._cluster.attach(name, pages, persist=True, seed=plan.seed, ring=ring)
            stack.callback(guest.close)
            guest.fill()
            self._guests[name] = guest
        self._samples: Samples = {}

    def measure(self, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """All settings; leaves this process and the hypervisor unpinned."""
        cores = sorted(os.sched_getaffinity(0))
        own, server = os.getpid(), self._cluster.pid
        try:
            say("transports: one core")
            pin([own, server], {cores[-1]})
            for _ in range(self._plan.repetitions):
                self._ping_pong(ONE_CORE, str(cores[-1]))
                self._calls(ONE_CORE, 1)
            if len(cores) > 1:
                say("transports: two cores")
                pin([own], {cores[-1]})
                pin([server], {cores[0]})
                for _ in range(self._plan.repetitions):
                    self._ping_pong(TWO_CORES, f"{cores[-1]},{cores[0]}")
                    self._calls(TWO_CORES, 1)
        finally:
            pin([own, server], set(cores))
        say("transports: beside hogs")
        with _hogs(cores):
            self._calls(HOGS, _HOG_PHASES)
            self._samples = {key: all_ for key, all_ in self._samples.items() if key[0] != HOGS}
            for _ in range(self._plan.repetitions):
                self._calls(HOGS, _HOG_PHASES)
        say("transports: at rest")
        return self._rows(), {**self._ratios(), "idle_cpu_share": self._idle_share()}

    def _ping_pong(self, setting: str, cores: str) -> None:
        seconds = self._plan.phase_seconds
        if self._program is not None:
            found = cprogram.ping_pong(self._program, cores, seconds)
            self._samples.setdefault((setting, C_MQ), []).append(found)
        found = cprogram.yields(cores, seconds)
        self._samples.setdefault((setting, YIELDS), []).append(found)

    def _calls(self, setting: str, phases: int) -> None:
        for verb in ("get", "put"):
            for name, guest in self._guests.items():
                time_calls = guest.time_gets if verb == "get" else guest.time_puts
                before = cpu_ns(self._cluster.pid)
                durations = time_calls(1, self._plan.phase_seconds * phases)
                spent = cpu_ns(self._cluster.pid) - before
                mean_us = sum(durations) / len(durations) / 1e3
                found = figures(durations, 1, spent, {"mean": mean_us})
                self._samples.setdefault((setting, f"{name} {verb} 1"), []).append(found)

    def _idle_share(self) -> float:
        """Processor time of the hypervisor while two attached guests do nothing."""
        time.sleep(0.1)
        before = cpu_ns(self._cluster.pid)
        time.sleep(_IDLE_SECONDS)
        return (cpu_ns(self._cluster.pid) - before) / 1e9 / _IDLE_SECONDS

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for (setting, name), repetitions in self._samples.items():
            medians = [found.median_us for found in repetitions]
            row: dict[str, Any] = {
                "name": name,
                "setting": setting,
                "median": round(median(medians), 3),
                "p99": round(median([found.p99_us for found in repetitions]), 3),
                "unit": "us/call",
                "spread": round(max(medians) - min(medians), 3),
                "repetitions": len(repetitions),
            }
            costs = [f.server_us_per_page for f in repetitions if f.server_us_per_page is not None]
            if costs:
                row["server_us_per_page"] = round(median(costs), 3)
                row["mean"] = round(median([found.extra["mean"] for found in repetitions]), 3)
            rows.append(row)
        return rows

    def _ratios(self) -> dict[str, float | None]:
        def over(setting: str, one: str, other: str, read: Callable[[Figures], float]) -> Any:
            pairs = zip(
                self._samples.get((setting, one), []),
                self._samples.get((setting, other), []),
                strict=False,
            )
            each = [read(left) / read(right) for left, right in pairs]
            return round(median(each), 4) if each else None

        def middle(found: Figures) -> float:
            return found.median_us

        def mean(found: Figures) -> float:
            return found.extra["mean"]

        return {
            "ring_get_vs_c_mq": over(ONE_CORE, "ring get 1", C_MQ, middle),
            "ring_put_vs_c_mq": over(ONE_CORE, "ring put 1", C_MQ, middle),
            "yields_vs_c_mq": over(ONE_CORE, YIELDS, C_MQ, middle),
            "mqueue_get_vs_c_mq": over(ONE_CORE, "mqueue get 1", C_MQ, middle),
            "mqueue_put_vs_c_mq": over(ONE_CORE, "mqueue put 1", C_MQ, middle),
            "ring_get_two_cores_vs_c_mq": over(TWO_CORES, "ring get 1", C_MQ, middle),
            "ring_get_beside_hogs_vs_mqueue": over(HOGS, "ring get 1", "mqueue get 1", mean),
        }


@contextmanager
def _hogs(cores: list[int]) -> Iterator[None]:
    hogs: list[subprocess.Popen[bytes]] = []
    try:
        for core in cores:
            hogs.append(subprocess.Popen([sys.executable, "-c", _HOG]))
            os.sched_setaffinity(hogs[-1].pid, {core})
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
