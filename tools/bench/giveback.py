"""How fast a host that needs memory gets it back: `python -m tools.bench.giveback [--mib 1024]`.

A real hypervisor whose arena is full of one guest's ephemeral pages is told to flush all of them,
as an administrator would before a second arena is started.  Time runs from the question to the
moment when the segment's allocated blocks say that the memory is the host's again.  Raw pages are
dropped by the run; compressed ones (`--compress`) take an entry and a slab slot each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

from ipc.attach import CONTROL_SOCKET
from ipc.codec import Record
from ipc.errors import ExitCode
from ipc.segment import allocated_bytes
from tools.bench.cluster import Cluster
from tools.control import ask

_FRUITLESS_MAX: Final = 100
_MIB: Final = 2**20


class GiveBack(NamedTuple):
    """One flush: the segment's allocated bytes before and after, and how long it took."""

    before_bytes: int
    after_bytes: int
    seconds: float
    slices: int

    @property
    def seconds_per_gib(self) -> float:
        """Of memory that the host has back."""
        return self.seconds * 2**30 / max(1, self.before_bytes - self.after_bytes)


def give_back(mib: int, seed: int, *, compress: bool = False) -> GiveBack:
    """Fill an arena of so many MiB with ephemeral pages, and flush them all."""
    pages = mib * _MIB // 4096 // 1024 * 1024
    cluster = Cluster(pages + 4096)
    try:
        control = cluster.directory / CONTROL_SOCKET
        guest = cluster.attach("guest", pages, persist=False, seed=seed)
        if compress:
            _ask(control, {"verb": "set", "guest": "guest", "compress": True})
        guest.fill()
        segment = (cluster.directory / "arena").read_text().strip()
        before = allocated_bytes(segment)
        begin = time.perf_counter()
        slices = flush_all(control)
        seconds = time.perf_counter() - begin
        after = allocated_bytes(segment)
        guest.channel.close()
        return GiveBack(before, after, seconds, slices)
    finally:
        cluster.close()


def flush_all(control: Path) -> int:
    """Drop every ephemeral page and give the memory back; in how many slices."""
    slices = fruitless = 0
    while True:
        answer = _ask(control, {"verb": "flush", "size_bytes": 1 << 50})
        slices += 1
        if not answer["more"]:
            return slices
        progress = answer["flushed_pages"] or answer["released_bytes"] or answer["freed_bytes"]
        fruitless = 0 if progress else fruitless + 1
        if fruitless > _FRUITLESS_MAX:
            raise RuntimeError("the hypervisor says that there is more and gives nothing")


def _ask(control: Path, record: Record) -> Record:
    answer = ask(control, record)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def main(arguments: list[str]) -> int:
    """Print one line a repetition, and the median."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.giveback", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--compress", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    results = []
    for number in range(options.repetitions):
        one = give_back(options.mib, options.seed + number, compress=options.compress)
        results.append(one.seconds_per_gib)
        print(
            f"{one.before_bytes / _MIB:7.0f} MiB -> {one.after_bytes / _MIB:5.0f} MiB "
            f"in {one.seconds:.3f} s, {one.slices} slices, {one.seconds_per_gib:.3f} s per GiB"
        )
    print(f"median {statistics.median(results):.3f} s per GiB")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
