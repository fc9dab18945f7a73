"""One run: set everything up, time all cases interleaved, first pinned, then not, tear down."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tools.bench import bounded, cluster, cprogram, metadata, peers
from tools.bench.calls import Guest
from tools.bench.guests import GuestProcesses
from tools.bench.plan import Plan
from tools.bench.timing import NOISY_SHARE, Case, Figures, Skipped, lost_share, pin
from tools.bench.transports import Transports

AGED: Final = ", aged"
_LOOK_SECONDS: Final = 0.1
_BOUNDED_PHASES: Final = 4
"""The worst of many calls is looked for, so there are more of them."""

Samples = dict[str, list[Figures]]
"""Row name -> one `Figures` a repetition."""


@dataclass
class Outcome:
    """All that was measured; `samples[True]` pinned to one core, `samples[False]` not."""

    core: int
    samples: dict[bool, Samples] = field(default_factory=dict)
    lost: list[float] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    transport_rows: list[dict[str, Any]] = field(default_factory=list)
    transport_ratios: dict[str, float | None] = field(default_factory=dict)
    bounded_rows: list[dict[str, Any]] = field(default_factory=list)
    metadata: list[dict[str, float]] = field(default_factory=list)
    """Of large files, of small ones, and of large ones in a shared pool that were changed."""


def measure(plan: Plan, say: Callable[[str], None]) -> Outcome:
    """Do the whole run; `say` is told what happens."""
    cores = os.sched_getaffinity(0)
    outcome = Outcome(core=max(cores))
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        say("weighing metadata")
        for object_pages in (1024, 3):
            outcome.metadata.append(metadata.measure(plan.metadata_mib, object_pages))
        outcome.metadata.append(
            metadata.measure(plan.metadata_mib, 1024, shared=True, rewritten_percent=10)
        )
        say("starting servers and filling them")
        cases, pids = _set_up(plan, stack, outcome)
        for pinned in (True, False):
            pin([os.getpid(), *pids], {outcome.core} if pinned else cores)
            core = outcome.core if pinned else None
            outcome.samples[pinned] = _repeat(plan, cases, core, outcome, say)
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tmem-bench-")))
        c_cases, _ = cprogram.cases(directory, plan.working_set_pages)
        transports = Transports(plan, stack, directory / cprogram.PROGRAM if c_cases else None)
        outcome.transport_rows, outcome.transport_ratios = transports.measure(say)
    seconds = plan.phase_seconds * _BOUNDED_PHASES
    outcome.bounded_rows = bounded.measure(plan.bounded_pages, 1, seconds, say)
    return outcome


def _set_up(plan: Plan, stack: ExitStack, outcome: Outcome) -> tuple[list[Case], list[int]]:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tmem-bench-")))
    cases, skipped = cprogram.cases(directory, plan.working_set_pages)
    outcome.skipped += skipped
    made = _start(cluster.standard, plan, stack)
    cases += cluster.extent_cases(*made, (32, 64), "")
    # Single and scattered puts scatter the frames of later extents too: that is an arena's old age,
    # and the extents of this one are told apart from those that only extents were put before.
    aged = _start(cluster.standard, plan, stack)
    cases += cluster.extent_cases(*aged, (1,), "")
    cases += cluster.batch_cases(*aged)
    cases += cluster.extent_cases(*aged, (32,), AGED)
    full = _start(cluster.full, plan, stack)
    cases += cluster.extent_cases(*full, (1, 32), f", {plan.full_mib} MiB full")
    small = _start(cluster.two_thirds, plan, stack)
    cases += cluster.refault_cases(*small)
    pids = [one.pid for one, _ in (made, aged, full, small)]
    shared = cluster.Cluster(plan.working_set_pages + cluster.SPARE_PAGES)
    stack.callback(shared.close)
    guests = GuestProcesses(shared, plan.guest_counts, plan.working_set_pages, plan.seed)
    stack.callback(guests.close)
    cases += guests.cases()
    pids += [shared.pid, *guests.pids]
    peer_cases, peer_pids, missing = peers.start(plan, stack)
    outcome.skipped += missing
    return cases + peer_cases, pids + peer_pids


def _start(
    make: Callable[[Plan], tuple[cluster.Cluster, Guest]], plan: Plan, stack: ExitStack
) -> tuple[cluster.Cluster, Guest]:
    made, guest = make(plan)
    stack.callback(made.close)
    stack.callback(guest.close)
    return made, guest


def _repeat(
    plan: Plan,
    cases: list[Case],
    core: int | None,
    outcome: Outcome,
    say: Callable[[str], None],
) -> Samples:
    order = random.Random(plan.seed)
    samples: Samples = {}
    for repetition in range(plan.repetitions):
        how = "unpinned" if core is None else f"pinned to core {core}"
        say(f"{how}: repetition {repetition + 1} of {plan.repetitions}")
        outcome.lost.append(_wait_for_quiet(plan))
        for case in order.sample(cases, len(cases)):
            for name, figures in case.run(plan.phase_seconds, core).items():
                samples.setdefault(name, []).append(figures)
    return samples


def _wait_for_quiet(plan: Plan) -> float:
    """Wait, but not for ever, until others leave this core alone; the share that they took last."""
    deadline = time.monotonic() + plan.patience_seconds
    while (lost := lost_share(_LOOK_SECONDS)) > NOISY_SHARE and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return lost
