"""The hypervisor under test: a real process in a run directory of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from hypervisor.arena import layout
from hypervisor.boot import HypervisorSpec, run
from ipc import attach
from ipc.abi import TOKEN_BYTES
from ipc.codec import BadRecord, receive_record, send_record
from ipc.names import Registry
from tools.bench.calls import Guest
from tools.bench.plan import Plan
from tools.bench.timing import Case, Figures, cpu_ns, figures

STOP_SECONDS: Final = 10.0
SPARE_PAGES: Final = 4096
"""Frames beyond the working set: a put over a page that is there fills a new frame first."""


class Cluster:
    """One hypervisor; `close` leaves nothing behind, whatever happened to the process."""

    def __init__(self, frames: int, *, eviction: str = "clock") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tmem-bench-"))
        spec = HypervisorSpec(
            f"bench{os.getpid()}",
            self.directory,
            layout(frames).end,
            eviction=eviction,
            supervisor_pid=os.getpid(),
        )
        # Spawned, so that it shares no memory with the benchmark and starts with a clean heap.
        self._process = multiprocessing.get_context("spawn").Process(target=run, args=(spec,))
        self._process.start()
        self._tokens: dict[str, bytes] = {}

    @property
    def pid(self) -> int:
        """The hypervisor's process id."""
        assert self._process.pid is not None
        return self._process.pid

    def enrol(self, name: str) -> bytes:
        """Allow a guest of this name; its token."""
        token = os.urandom(TOKEN_BYTES)
        attach.enrol(self.directory, name, token, os.getuid())
        return token

    def attach(
        self, name: str, pages: int, *, persist: bool, seed: int, ring: bool | None = None
    ) -> Guest:
        """A guest that lives in this process."""
        channel = attach.connect(
            self.directory, name, self.enrol(name), patience_seconds=20, ring=ring
        )
        return Guest(channel, pages, persist=persist, seed=seed)

    def close(self) -> None:
        """Stop the hypervisor and remove whatever it could not."""
        with contextlib.suppress(OSError, BadRecord):
            with socket.socket(socket.AF_UNIX) as control:
                control.settimeout(STOP_SECONDS)
                control.connect(os.fspath(self.directory / attach.CONTROL_SOCKET))
                send_record(control, {"verb": "stop"})
                receive_record(control)
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        Registry(self.directory).clean()
        shutil.rmtree(self.directory)


def extent_cases(cluster: Cluster, guest: Guest, counts: Sequence[int], note: str) -> list[Case]:
    """Hits and overwrites of pages that all fit, `counts` pages a call."""
    cases = []
    for count in counts:
        kind = "1" if count == 1 else f"extent {count}"
        for verb, time_calls in (("get", guest.time_gets), ("put", guest.time_puts)):
            cases.append(_case(cluster, f"tmem {verb} {kind}{note}", count, time_calls))
    return cases


def batch_cases(cluster: Cluster, guest: Guest) -> list[Case]:
    """Scattered batches: 32 unrelated pages a call."""
    return [
        _case(cluster, "tmem get batch 32", 32, guest.time_get_batches),
        _case(cluster, "tmem put batch 32", 32, guest.time_put_batches),
    ]


def _case(
    cluster: Cluster, name: str, count: int, time_calls: Callable[[int, float], list[int]]
) -> Case:
    def run(seconds: float, core: int | None) -> dict[str, Figures]:
        del core  # pinned by the runner
        before = cpu_ns(cluster.pid)
        durations = time_calls(count, seconds)
        return {name: figures(durations, count, cpu_ns(cluster.pid) - before)}

    return Case(name, run)


def refault_cases(cluster: Cluster, guest: Guest) -> list[Case]:
    """Misses and evictions: the arena holds two thirds of the working set."""
    pid = cluster.pid

    def case(count: int) -> Case:
        kind = "1" if count == 1 else f"extent {count}"

        def run(seconds: float, core: int | None) -> dict[str, Figures]:
            del core
            before = cpu_ns(pid)
            gets, puts, hits = guest.time_refaults(count, seconds)
            # One processor time for both: they alternate.  Half of it goes to each row.
            spent = (cpu_ns(pid) - before) // 2
            extra = {"hit_rate": hits}
            return {
                f"tmem get {kind}, arena 2/3": figures(gets, count, spent, extra),
                f"tmem put {kind}, arena 2/3": figures(puts, count, spent, extra),
            }

        return Case(f"arena 2/3, {kind}", run)

    return [case(1), case(32)]


def standard(plan: Plan) -> tuple[Cluster, Guest]:
    """The arena that holds the working set."""
    return _filled(plan.working_set_pages, SPARE_PAGES, plan, persist=True)


def full(plan: Plan) -> tuple[Cluster, Guest]:
    """The arena that is filled to `full_mib`, and all of it used."""
    return _filled(plan.full_mib * 256, SPARE_PAGES, plan, persist=True)


def two_thirds(plan: Plan) -> tuple[Cluster, Guest]:
    """The arena of two thirds of the working set, ephemeral pages."""
    missing = plan.working_set_pages - plan.working_set_pages * 2 // 3
    return _filled(plan.working_set_pages, -missing, plan, persist=False)


def _filled(pages: int, spare: int, plan: Plan, *, persist: bool) -> tuple[Cluster, Guest]:
    cluster = Cluster(pages + spare)
    try:
        guest = cluster.attach("guest", pages, persist=persist, seed=plan.seed)
        guest.fill()
    except BaseException:
        cluster.close()
        raise
    return cluster, guest
