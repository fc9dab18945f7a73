"""What the demo's calls would cost a hypervisor in Python that did next to nothing.

Three things are measured on the machine at hand, and multiplied by what the demo counted:

  start   processor time of a hypervisor process until it serves
  call    the same for a call that asks for its version, by a guest that computes in between, as the
          demo's do: the hypervisor has gone to sleep and is woken each time
  page    a loop that looks an object up in one dictionary and copies a call's pages side by side,
          between a window and a place in an arena of the demo's size, in this process

Nothing that a hypervisor is for is in it: no room is made, nothing is found again after a kill,
charged or ordered.  So what the demo takes beyond it is the machine's work.  Most of the floor is
being woken, which is the kernel's.
"""

from __future__ import annotations

import mmap
import random
import time
from typing import Final, NamedTuple

from guests.hypercall import Hypercalls
from ipc import attach
from ipc.abi import PAGE_BYTES, oid_from_int
from ipc.limits import WINDOW_SLOTS
from tools.bench.cluster import Cluster
from tools.bench.timing import cpu_ns, median

CALLS: Final = 2000
_WORK_NS: Final = 300_000
"""The demo's guests read, hash and compile for about so long between two calls."""
_ROUNDS: Final = 5
_COPIES: Final = 4000


class Floor(NamedTuple):
    """Processor time of the three."""

    start_us: float
    call_us: float
    page_us: float

    def total_us(self, calls: int, pages: int) -> float:
        """Of a run with so many calls that move so many pages."""
        return self.start_us + calls * self.call_us + pages * self.page_us


def measure(frames: int, pages_a_call: int, seed: int = 1, calls: int = CALLS) -> Floor:
    """For an arena of this size, from so many calls."""
    cluster = Cluster(frames)
    try:
        channel = attach.connect(
            cluster.directory, "floor", cluster.enrol("floor"), patience_seconds=20
        )
        start_ns = cpu_ns(cluster.pid)
        try:
            hypercalls = Hypercalls(channel)
            for _ in range(calls):
                _compute(_WORK_NS)
                hypercalls.version()
            call_ns = (cpu_ns(cluster.pid) - start_ns) / calls
        finally:
            channel.close()
    finally:
        cluster.close()
    return Floor(start_ns / 1e3, call_ns / 1e3, _page_ns(frames, pages_a_call, seed) / 1e3)


def _compute(duration_ns: int) -> None:
    end_ns = time.perf_counter_ns() + duration_ns
    while time.perf_counter_ns() < end_ns:
        pass


def _page_ns(frames: int, pages: int, seed: int) -> float:
    """Time to find and copy one page, in runs of `pages`."""
    rng = random.Random(seed)
    arena = memoryview(mmap.mmap(-1, frames * PAGE_BYTES))
    window = memoryview(mmap.mmap(-1, WINDOW_SLOTS * PAGE_BYTES))
    for view in (arena, window):
        for at in range(0, len(view), PAGE_BYTES):
            view[at] = 1
    objects = {
        oid_from_int(number): rng.randrange(frames - pages) * PAGE_BYTES
        for number in range(frames // pages)
    }
    asked = [oid_from_int(rng.randrange(len(objects))) for _ in range(_COPIES)]
    bytes_ = pages * PAGE_BYTES
    each_ns = []
    for _ in range(_ROUNDS):
        begin_ns = time.thread_time_ns()
        for number, oid in enumerate(asked):
            at = objects[oid]
            if number & 1:
                arena[at : at + bytes_] = window[:bytes_]
            else:
                window[:bytes_] = arena[at : at + bytes_]
        each_ns.append((time.thread_time_ns() - begin_ns) / (_COPIES * pages))
    return median(each_ns)
