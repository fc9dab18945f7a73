"""One seed or many, and what is said about them."""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tools.sim.caches import CacheUser, KernelUser
from tools.sim.cluster import Cluster
from tools.sim.lives import GuestMaker
from tools.sim.programs import Program

EVENTS: Final = 300
_KERNEL_SHARE: Final = 0.2
"""Of the seeds have a guest with a kernel: it is worth all the others in time."""


@dataclass
class Outcome:
    """What one seed gave; `failure` is empty if everything held."""

    seed: int
    digest: int = 0
    events: int = 0
    calls: int = 0
    restarts: int = 0
    deaths: int = 0
    evictions: int = 0
    persistent_checked: int = 0
    ephemeral_checked: int = 0
    failure: str = ""

    def line(self) -> str:
        """A summary."""
        return (
            f"seed {self.seed}: {self.events} events, {self.calls} calls, {self.restarts} restarts"
            f", {self.deaths} deaths, {self.evictions} evictions, "
            f"{self.persistent_checked} persistent and {self.ephemeral_checked} ephemeral pages "
            f"right, digest {self.digest:08x}"
        )


def guests_of(seed: int) -> dict[str, GuestMaker]:
    """What lives in the cluster of a seed."""
    rng = random.Random(f"guests {seed}")
    makers: dict[str, GuestMaker] = {}
    for number in range(rng.randrange(1, 6)):
        makers[f"app{number}"] = Program
    for number in range(rng.randrange(3)):
        makers[f"cache{number}"] = CacheUser
    if rng.random() < _KERNEL_SHARE:
        makers["kernel"] = KernelUser
    return makers


def run_seed(
    seed: int, events: int = EVENTS, emit: Callable[[str], None] = lambda _line: None
) -> Outcome:
    """Run one seed; never raises for what it finds."""
    # Guests complain of a hypervisor that comes and goes; here that is the point.
    logging.disable(logging.CRITICAL)
    outcome = Outcome(seed)
    cluster: Cluster | None = None
    try:
        cluster = Cluster(seed, guests_of(seed), emit)
        while cluster.events < events:
            cluster.step()
        cluster.finish()
    except Exception:  # noqa: BLE001 - whatever it is, the seed is to be told
        lines = [] if cluster is None else list(cluster.trace.lines)
        outcome.failure = "\n".join([*lines, traceback.format_exc().rstrip()])
    finally:
        logging.disable(logging.NOTSET)
        if cluster is not None:
            cluster.abandon()
    if cluster is not None:
        outcome.digest = cluster.trace.digest
        outcome.events = cluster.events
        outcome.calls = cluster.calls
        outcome.restarts = cluster.restarts
        outcome.deaths = cluster.deaths
        outcome.evictions = cluster.evictions
        outcome.persistent_checked = cluster.ledger.checked_persistent
        outcome.ephemeral_checked = cluster.ledger.checked_ephemeral
    return outcome
