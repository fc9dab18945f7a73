"""The floor of a call over the ring on one core: two processes that yield to each other in turn.

    python -m tools.bench.yields CORE[,CORE] SECONDS

Each side waits for its word of a shared page to change by nothing but `sched_yield`, answers, and
does nothing else.  What a call takes beyond that is its own: packing, copying, looking up.  The two
process switches are the kernel's, and no transport that waits by yielding can do without them.

Prints "median_ns p99_ns mean_ns count", as `pingpong.c` does.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from typing import Final

_PARENT_LOOKS: Final = 1 << 10
"""Yields between two looks whether there is still somebody to answer."""
_WORD: Final = mmap.PAGESIZE // 8
"""The answer stands in a page of its own."""


def _answer(words: memoryview) -> None:
    parent = os.getppid()
    give_way = os.sched_yield
    seen = 0
    while os.getppid() == parent:
        for _ in range(_PARENT_LOOKS):
            asked = words[0]
            if asked != seen:
                seen = words[_WORD] = asked
            give_way()


def _ask(words: memoryview, seconds: float) -> list[int]:
    durations: list[int] = []
    give_way, now_ns = os.sched_yield, time.perf_counter_ns
    end = now_ns()
    deadline = end + int(seconds * 1e9)
    while end < deadline:
        begin = now_ns()
        words[0] = number = len(durations) + 1
        while words[_WORD] != number:
            give_way()
        end = now_ns()
        durations.append(end - begin)
    return durations


def main(arguments: list[str]) -> None:
    """Measure and print."""
    cores = [int(core) for core in arguments[0].split(",")]
    words = memoryview(mmap.mmap(-1, 2 * mmap.PAGESIZE)).cast("Q")
    child = os.fork()
    if not child:
        os.sched_setaffinity(0, {cores[-1]})
        _answer(words)
        os._exit(0)
    try:
        os.sched_setaffinity(0, {cores[0]})
        durations = sorted(_ask(words, float(arguments[1])))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    count = len(durations)
    middle, high = durations[count // 2], durations[count * 99 // 100]
    print(middle, high, sum(durations) / count, count)


if __name__ == "__main__":
    main(sys.argv[1:])
