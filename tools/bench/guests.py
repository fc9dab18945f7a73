"""Many guests at once: real processes, of which the first n call at the same time.

Each holds an equal share of the working set in persistent pages and alternates gets and puts of
extents of 32.  The processes are started once; one that has no part in a phase sleeps on its pipe.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from ipc import attach
from ipc.abi import EXTENT_PAGES_MAX
from ipc.errors import ExitCode, OperatorError
from ipc.limits import explain_queue_limit, read_queue_limits
from tools.bench.calls import Guest
from tools.bench.cluster import STOP_SECONDS, Cluster
from tools.bench.timing import Case, Figures, cpu_ns, figures

COUNT: Final = 32
_SLICE_SECONDS: Final = 0.005
_READY_SECONDS: Final = 60.0


class GuestProcesses:
    """As many guest processes as the largest count asks for, attached and filled."""

    def __init__(self, cluster: Cluster, counts: Sequence[int], pages: int, seed: int) -> None:
        refusal = explain_queue_limit(max(counts), read_queue_limits())
        if refusal is not None:
            raise OperatorError(refusal, ExitCode.UNAVAILABLE)
        self._cluster = cluster
        self._counts = counts
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(max(counts)):
            name = f"guest{number}"
            ours, theirs = context.Pipe()
            share = max(1, pages // max(counts) // EXTENT_PAGES_MAX) * EXTENT_PAGES_MAX
            arguments = (
                theirs, cluster.directory, name, cluster.enrol(name), share, seed + number
            )  # fmt: skip
            process = context.Process(target=_guest, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            self._hear(pipe, _READY_SECONDS)

    @property
    def pids(self) -> list[int]:
        """The guests' process ids."""
        return [process.pid for process in self._processes if process.pid is not None]

    def cases(self) -> list[Case]:
        """One case for each number of guests."""
        return [self._case(count) for count in self._counts]

    def _case(self, guests: int) -> Case:
        name = f"tmem extent {COUNT}, guests: {guests:2}"

        def run(seconds: float, core: int | None) -> dict[str, Figures]:
            del core  # pinned by the runner
            before = cpu_ns(self._cluster.pid)
            start = time.monotonic() + 0.02
            for pipe in self._pipes[:guests]:
                pipe.send((start, seconds))
            answers = [self._hear(pipe, seconds + STOP_SECONDS) for pipe in self._pipes[:guests]]
            spent = cpu_ns(self._cluster.pid) - before
            durations = [duration for answer, _ in answers for duration in answer]
            found = figures(durations, COUNT, spent)
            # Calls of several guests overlap, so the sum of their durations is no time: what
            # passed between the common start and the last guest's end is.
            passed = max(end for _, end in answers) - start
            return {
                name: Figures(
                    found.median_us,
                    found.p99_us,
                    len(durations) * COUNT / passed,
                    found.server_us_per_page,
                )
            }

        return Case(name, run)

    def _hear(self, pipe: Connection, seconds: float) -> tuple[list[int], float]:
        try:
            if pipe.poll(seconds):
                answer: tuple[list[int], float] = pipe.recv()
                return answer
        except EOFError:
            pass
        raise OperatorError("a guest process of the benchmark died", ExitCode.GUEST_DIED)

    def close(self) -> None:
        """End all guests; their pipes' end tells them to."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _guest(
    pipe: Connection, directory: Path, name: str, token: bytes, pages: int, seed: int
) -> None:
    """The life of one guest process; the end of the pipe is the end of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = attach.connect(directory, name, token, patience_seconds=_READY_SECONDS)
    guest = Guest(channel, pages, persist=True, seed=seed)
    guest.fill()
    choose = random.Random(seed).random
    try:
        pipe.send(([], 0.0))
        while True:
            start, seconds = pipe.recv()
            time.sleep(max(0.0, start - time.monotonic()))
            durations: list[int] = []
            end = start
            while end < start + seconds:
                time_calls = guest.time_gets if choose() < 0.5 else guest.time_puts
                durations += time_calls(COUNT, _SLICE_SECONDS)
                end = time.monotonic()
            pipe.send((durations, end))
    except (EOFError, BrokenPipeError):
        attach.detach(channel)
