"""What watching the guests and setting targets costs: `python -m tools.bench.scheduling [--json]`.

One core, no cluster: the sampler and the scheduler are called as the hypervisor calls them.  A
page's price is that of one get and one put, which is what a page cache that is too small makes of a
refault.  Durations are the best of several rounds, so that a neighbour's noise is left out.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import OrderedDict
from itertools import accumulate
from typing import Final

from hypervisor.curve import Curve
from hypervisor.entitlement import Terms
from hypervisor.reuse import SAMPLE_MASK, ReuseSampler
from hypervisor.scheduler import GuestState, MemberState, Scheduling, Snapshot, targets
from ipc.abi import PAGE_BYTES

MEMBERS: Final = (4, 16, 64, 65, 256)
_SEED: Final = 20_260_101
_ROUNDS: Final = 3
_EVENTS: Final = 20_000

Measured = dict[str, float]


def _keys(leaves: int, rng: random.Random) -> list[int]:
    return [rng.getrandbits(64) for _ in range(leaves)]


def sampler_cost(arena_pages: int, working_set_pages: int, run: int) -> Measured:
    """Nanoseconds a page for a refault (get and put), by runs of `run` pages at random places."""
    rng = random.Random(_SEED)
    keys = _keys(working_set_pages // 64, rng)
    sampler = ReuseSampler(arena_pages)
    places = [(rng.choice(keys), rng.randrange(65 - run)) for _ in range(_EVENTS)]
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter_ns()
        for key, first in places:
            if key & SAMPLE_MASK < sampler.threshold:
                sampler.get(key, first, run)
                sampler.put(key, first, run)
        best = min(best, (time.perf_counter_ns() - begin) / (_EVENTS * run))
    return {
        "ns_a_page": best,
        "watched_share": sampler.rate,
        "watched_extents": sampler.watched_extents,
    }


def unwatched_cost() -> float:
    """Nanoseconds of the comparison that decides, for a leaf that is not watched, with the loop."""
    keys = [SAMPLE_MASK] * _EVENTS
    sampler = ReuseSampler(1 << 20)
    sampler.threshold = 1
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter_ns()
        for key in keys:
            if key & SAMPLE_MASK < sampler.threshold:
                sampler.get(key, 0, 1)
        best = min(best, (time.perf_counter_ns() - begin) / _EVENTS)
    return best


def period_cost(arena_pages: int) -> Measured:
    """Microseconds for the end of a period and for reading a curve."""
    rng = random.Random(_SEED)
    keys = _keys(arena_pages // 64, rng)
    sampler = ReuseSampler(arena_pages)
    for _ in range(_EVENTS):
        key = rng.choice(keys)
        if key & SAMPLE_MASK < sampler.threshold:
            sampler.get(key, 0, 64)
            sampler.put(key, 0, 64)
    begin = time.perf_counter_ns()
    sampler.advance()
    between = time.perf_counter_ns()
    sampler.curve()
    end = time.perf_counter_ns()
    return {"advance_us": (between - begin) / 1e3, "curve_us": (end - between) / 1e3}


def accuracy(pages: int, cache_pages: int, arena_pages: int, seed: int) -> Measured:
    """Mean absolute error of the hit ratio over 16 sizes, for zipf accesses through a page cache,
    beside an exclusive cache of that size that evicts the oldest page."""
    rng = random.Random(seed)
    weights = list(accumulate((rank + 1) ** -0.9 for rank in range(pages)))
    order = list(range(pages))
    rng.shuffle(order)
    keys = _keys(pages // 64 + 1, rng)
    sampler = ReuseSampler(arena_pages)
    inside: OrderedDict[int, None] = OrderedDict()
    sizes = [arena_pages * part // 16 for part in range(1, 17)]
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in sizes]
    hits = [0] * len(sizes)
    gets = 0
    for page in rng.choices(order, cum_weights=weights, k=5 * pages):
        if page in inside:
            inside.move_to_end(page)
            continue
        gets += 1
        key = keys[page >> 6]
        if key & SAMPLE_MASK < sampler.threshold:
            sampler.get(key, page & 63, 1)
        for at, cache in enumerate(caches):
            if page in cache:
                del cache[page]
                hits[at] += 1
        inside[page] = None
        if len(inside) <= cache_pages:
            continue
        out = inside.popitem(last=False)[0]
        key = keys[out >> 6]
        if key & SAMPLE_MASK < sampler.threshold:
            sampler.put(key, out & 63, 1)
        for cache, size in zip(caches, sizes, strict=True):
            if len(cache) >= size:
                cache.popitem(last=False)
            cache[out] = None
    sampler.advance()
    curve = sampler.curve()
    errors = [abs(found - curve.hits(size)) / gets for found, size in zip(hits, sizes, strict=True)]
    return {
        "mean_error": sum(errors) / len(errors),
        "largest_error": max(errors),
        "watched_share": sampler.rate,
    }


def _curve(rng: random.Random, arena_pages: int) -> Curve:
    """A cliff, a slope of 200 steps, or nothing."""
    size, found = rng.randrange(1000, arena_pages // 4), rng.uniform(1, 1000)
    shape = rng.randrange(3)
    steps = range(1, (0, 1, 200)[shape] + 1)
    count = max(len(steps), 1)
    return Curve(
        tuple(size * step // count for step in steps),
        tuple(found * (1 - (1 - step / count) ** 3) for step in steps),
        found,
        found,
        1000,
        50,
    )


def scheduler_cost(members: int, arena_pages: int = 1 << 18) -> float:
    """Milliseconds for one round of targets, in the steady state; a guest has one or two pools."""
    rng = random.Random(_SEED)
    guests = tuple(GuestState(number, Terms(rng.choice([50, 100]))) for number in range(members))
    states = tuple(
        MemberState(
            number,
            number - (number % 3 == 2),
            _curve(rng, arena_pages),
            target_bytes=arena_pages // members * PAGE_BYTES,
        )
        for number in range(members)
    )
    snapshot = Snapshot(Scheduling.SCHEDULED, arena_pages * PAGE_BYTES, guests, states)
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter_ns()
        targets(snapshot)
        best = min(best, (time.perf_counter_ns() - begin) / 1e6)
    return best


def measure() -> dict[str, Measured]:
    """All figures."""
    return {
        "not watched": {"ns_a_call": unwatched_cost()},
        "16 Ki pages, 4 KiB calls": sampler_cost(1 << 14, 1 << 14, 1),
        "16 Ki pages, 32-page calls": sampler_cost(1 << 14, 1 << 14, 32),
        "1 Mi pages, 4 KiB calls": sampler_cost(1 << 20, 1 << 20, 1),
        "1 Mi pages, 32-page calls": sampler_cost(1 << 20, 1 << 20, 32),
        "a period, 1 Mi pages": period_cost(1 << 20),
        "zipf in 4 Ki pages": accuracy(8000, 1000, 1 << 12, _SEED),
        "zipf in 64 Ki pages": accuracy(80_000, 10_000, 1 << 16, _SEED),
        **{f"targets of {count}": {"ms": scheduler_cost(count)} for count in MEMBERS},
    }


def main(arguments: list[str]) -> int:
    """Print the figures."""
    figures = measure()
    if "--json" in arguments:
        print(json.dumps(figures, indent=1))
        return 0
    width = max(map(len, figures))
    for name, values in figures.items():
        print(name.ljust(width), *(f"{key} {value:.4g}" for key, value in values.items()), sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
