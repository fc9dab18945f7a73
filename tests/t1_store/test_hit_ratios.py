"""The policies as caches: hit ratios beside libCacheSim's and Belady's, and what admission is for.

`python -m tools.bench.eviction` prints the whole table, of which these are a few lines.
"""

from __future__ import annotations

import importlib.util
import itertools
import random

import pytest

from hypervisor.eviction.clock import SPARED_MAX
from tools.bench import caches, traces
from tools.bench.caches import Exclusive

SEED = 1
REQUESTS = 40_000
PAGES = 1024

needs_reference = pytest.mark.skipif(
    importlib.util.find_spec("libcachesim") is None,
    reason="libcachesim has no wheel for this machine",
)


@needs_reference
@pytest.mark.parametrize("trace", traces.TRACES)
@pytest.mark.parametrize("policy", ["fifo", "clock", "s3fifo"])
def test_hits_are_those_of_libcachesim(policy: str, trace: str) -> None:
    """Not to three digits but to the last hit."""
    requests = traces.trace(trace, REQUESTS, SEED)

    assert caches.keeping_hits(policy, requests, PAGES) == caches.reference_hits(
        policy, requests, PAGES
    )


@needs_reference
def test_a_bounded_search_costs_next_to_nothing() -> None:
    """More pages than one search may spare, all of them used, and then others come: here our CLOCK
    may take a page that the reference spares, and stays the same to three digits."""
    pages = 2 * SPARED_MAX
    requests = [
        *range(pages),
        *range(pages),
        *range(pages // 2, 2 * pages),
        *range(pages, 2 * pages),
    ]
    ours = caches.keeping_hits("clock", requests, pages) / len(requests)

    assert ours == pytest.approx(
        caches.reference_hits("clock", requests, pages) / len(requests), abs=5e-4
    )


@needs_reference
@pytest.mark.parametrize("trace", traces.TRACES)
def test_the_optimum_is_that_of_libcachesim(trace: str) -> None:
    """Two computations of the bound agree."""
    requests = traces.trace(trace, REQUESTS, SEED)

    assert caches.optimal_hits(requests, PAGES) == caches.reference_hits("optimum", requests, PAGES)


@pytest.mark.parametrize("policy", ["fifo", "clock", "s3fifo", "hinted"])
def test_no_policy_is_better_than_the_optimum(policy: str) -> None:
    """The bound bounds."""
    requests = traces.trace("mixed", REQUESTS, SEED)

    assert caches.keeping_hits(policy, requests, PAGES) < caches.optimal_hits(requests, PAGES)


def working_set_hit_ratio(policy: str, *, admission: bool, hints: bool) -> float:
    """A guest uses 1,600 pages again and again while it streams through a large file, once.

    Its own cache holds 400 pages and tmem 1,500; the ratio is that of the working set's pages that
    the guest had lost and found in tmem.
    """
    rng = random.Random(SEED)
    cache = Exclusive(policy, 1500, 400, admission=admission, hints=hints)
    stream = itertools.count(1 << 20)
    found = {"tmem": 0, "disk": 0, "guest": 0}
    for number in range(60_000):
        cache.request(next(stream))
        where = cache.request(rng.randrange(1600))
        if number >= 20_000:
            found[where] += 1
    cache.check()
    return found["tmem"] / (found["tmem"] + found["disk"])


@pytest.mark.parametrize("policy", ["s3fifo", "hinted"])
@pytest.mark.parametrize("hints", [True, False])
def test_a_stream_does_not_push_out_pages_that_are_used(policy: str, hints: bool) -> None:
    """Pages that are seen once stay on probation; let in, they wash the working set out."""
    kept = working_set_hit_ratio(policy, admission=True, hints=hints)
    washed_out = working_set_hit_ratio(policy, admission=False, hints=hints)

    assert kept > 0.95
    assert washed_out < 0.75


def test_xens_policy_lets_the_stream_push_them_out() -> None:
    """What the filter is measured against."""
    assert working_set_hit_ratio("fifo", admission=True, hints=False) < 0.75


def answered(policy: str, requests: list[int]) -> int:
    """Requests that a guest's cache of 256 pages or its cleancache of 1,024 answers."""
    cache = Exclusive(policy, PAGES, PAGES // 4)
    found = sum(cache.request(page) != "disk" for page in requests)
    cache.check()
    return found


@pytest.mark.parametrize("trace", ["zipf and scan", "mixed"])
def test_hinted_beats_clock_where_something_of_everything_happens(trace: str) -> None:
    """With the guest's hints; most of it is admission and what was got, as the bench shows."""
    requests = traces.trace(trace, REQUESTS, SEED)

    assert answered("hinted", requests) > answered("clock", requests)


def test_hinted_follows_a_working_set_that_moves_better_than_s3fifo() -> None:
    """Probation becomes longer where it was too short."""
    requests = traces.trace("shifting", REQUESTS, SEED)

    assert caches.keeping_hits("hinted", requests, PAGES) > 1.1 * caches.keeping_hits(
        "s3fifo", requests, PAGES
    )
