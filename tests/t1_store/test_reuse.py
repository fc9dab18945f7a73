"""Reuse sampling: curves beside exact simulation of the same events, and the bounds."""

from __future__ import annotations

import random
import sys
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.reuse import SAMPLE_MASK, ReuseSampler
from tests.t1_store.reuse_traces import (
    Event,
    exclusive_hits,
    feed,
    inclusive_hits,
    leaf_hash,
    loop,
    mean_error,
    through_page_cache,
    zipf,
)

LIMIT = 4096


def check(sampler: ReuseSampler) -> None:
    """Every column says the same."""
    top = sampler._top
    live = list(sampler._live[:top])
    holes = list(sampler._holes[:top])
    counts = list(sampler._counts)
    assert counts[:top] == [bits.bit_count() + hole for bits, hole in zip(live, holes, strict=True)]
    assert not any(counts[top:])
    assert sampler._total == sum(counts) == sum(sampler._buckets)
    assert sampler._hollow == [at for at, hole in enumerate(holes) if hole]
    assert sampler.watched_extents == sum(1 for bits in live if bits)
    chained: dict[int, list[int]] = {}
    for key, latest in sampler._latest.items():
        places = chained.setdefault(key, [])
        position = latest
        while position >= 0:
            places.append(position)
            assert sampler._keys[position] == key
            position = sampler._chain[position]
    of_key: dict[int, list[int]] = {}
    for position in range(top - 1, -1, -1):
        if live[position]:
            of_key.setdefault(sampler._keys[position], []).append(position)
    assert chained == of_key
    for places in of_key.values():
        for at, position in enumerate(places):
            below = 0
            for older in places[at:]:
                assert not below & live[older]
                below |= live[older]
            assert below & ~sampler._union[position] == 0


def bytes_of(sampler: ReuseSampler) -> int:
    """Memory of a sampler: its columns, its index and the numbers in it."""
    columns = [value for value in vars(sampler).values() if isinstance(value, array)]
    latest = sampler._latest
    return (
        sum(map(sys.getsizeof, columns))
        + sys.getsizeof(latest)
        + sum(sys.getsizeof(key) + sys.getsizeof(at) for key, at in latest.items())
        + sys.getsizeof(sampler._hollow)
        + 28 * len(sampler._hollow)
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "put", "get", "get", "flush"]), st.integers(0, 60)),
        max_size=400,
    )
)
@settings(max_examples=200, deadline=None)
def test_every_size_finds_what_a_cache_of_that_size_finds(events: list[Event]) -> None:
    """Without sampling the curve is exact, whatever comes in whatever order: one page a leaf."""
    sampler = ReuseSampler(63, capacity=64)
    for what, page in events:
        getattr(sampler, what)(leaf_hash(page), page, 1)
    check(sampler)
    sampler.advance()
    curve = sampler.curve()

    for size in range(1, 64):
        assert curve.hits(size) == exclusive_hits(events, size)[0]


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get"]), st.integers(0, 30)),
        max_size=300,
    )
)
@settings(max_examples=100, deadline=None)
def test_pages_that_stay_make_a_least_recently_used_stack(events: list[Event]) -> None:
    """A get that leaves the page makes it the youngest: exact too, where misses are put again."""
    filled: list[Event] = []
    for what, page in events:
        filled.append((what, page))
        if what == "get":
            filled.append(("put", page))
    sampler = ReuseSampler(63, capacity=64)
    for what, page in filled:
        if what == "put":
            sampler.put(leaf_hash(page), page, 1)
        else:
            sampler.get(leaf_hash(page), page, 1, keep=True)
    check(sampler)
    sampler.advance()

    for size in range(1, 40):
        assert sampler.curve().hits(size) == inclusive_hits(filled, size)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_runs_in_any_order_keep_the_columns_true(data: st.DataObject) -> None:
    """Extents that overlap, little room and few positions: everything still says the same."""
    sampler = ReuseSampler(data.draw(st.sampled_from([300, 3000])), capacity=16)
    operations = st.tuples(
        st.sampled_from(["put", "put", "get", "keep", "flush"]),
        st.integers(0, 40),
        st.integers(0, 63),
        st.integers(1, 64),
    )
    for what, leaf, first, wanted in data.draw(st.lists(operations, max_size=120)):
        key = leaf_hash(leaf)
        count = min(wanted, 64 - first)
        if key & SAMPLE_MASK >= sampler.threshold:
            continue
        if what == "keep":
            sampler.get(key, first, count, keep=True)
        else:
            getattr(sampler, what)(key, first, count)
        assert sampler.watched_extents <= 16
    check(sampler)


@pytest.mark.parametrize("batch", [1, 32])
def test_a_loop_is_a_cliff(batch: int) -> None:
    """A loop finds nothing in a cache that is a little too small, and all in one that is not."""
    events = list(through_page_cache(loop(3000, 10), 1000, batch))
    sampler = ReuseSampler(LIMIT)
    feed(sampler, events)
    sampler.advance()
    curve = sampler.curve()

    assert exclusive_hits(events, 1950)[0] == curve.hits(1900) == 0
    assert curve.hits(2100) == exclusive_hits(events, 2050)[0] == 27_000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", [1, 32])
def test_a_zipf_guest_in_a_small_arena(seed: int, batch: int) -> None:
    """One page in four is watched: 0.01 mean error of the hit ratio."""
    rng = random.Random(seed)
    events = list(through_page_cache(zipf(6000, 0.9, 40_000, rng), 1000, batch))
    sampler = ReuseSampler(LIMIT)
    feed(sampler, events, seed)

    assert mean_error(sampler, events, LIMIT) < 0.03
    check(sampler)


@pytest.mark.parametrize("seed", range(2))
def test_a_zipf_guest_in_a_large_arena(seed: int) -> None:
    """One page in twenty-five is watched: about 0.02."""
    rng = random.Random(seed)
    events = list(through_page_cache(zipf(60_000, 0.9, 200_000, rng), 10_000))
    sampler = ReuseSampler(65_536, capacity=1024)
    feed(sampler, events, seed)

    assert sampler.rate < 0.06
    assert mean_error(sampler, events, 65_536) < 0.05
    check(sampler)


def test_a_loop_of_which_few_leaves_are_watched() -> None:
    """The cliff is found where it is, within the error that the curve states (three times)."""
    pages = 64 * 2000
    sampler = ReuseSampler(200_000, capacity=256)
    for leaf in [*range(2000)] * 4:
        key = leaf_hash(leaf)
        if key & SAMPLE_MASK < sampler.threshold:
            sampler.get(key, 0, 64)
            sampler.put(key, 0, 64)
    sampler.advance()
    curve = sampler.curve()

    assert 0.03 < curve.error < 0.1
    assert curve.hits(pages * (1 - 3 * curve.error)) < 0.05 * curve.gets
    assert curve.hits(pages * (1 + 3 * curve.error)) > 0.7 * curve.gets


def test_a_stream_has_no_use_for_memory() -> None:
    """Pages that never come back are counted as asked for and give no hit at any size."""
    sampler = ReuseSampler(LIMIT)
    feed(sampler, through_page_cache(range(50_000), 100))
    sampler.advance()
    curve = sampler.curve()

    assert curve.hits(LIMIT) == 0
    assert curve.gets == pytest.approx(50_000, rel=0.01)
    check(sampler)


def test_a_get_of_what_was_never_put_is_a_miss_at_any_size() -> None:
    """Nobody can have it."""
    sampler = ReuseSampler(1000)
    assert sampler.get(leaf_hash(1), 0, 64) == 0
    sampler.advance()

    assert sampler.curve().hits(1000) == 0
    assert sampler.curve().gets == 64


def test_a_get_says_which_pages_were_known() -> None:
    """Bits count from the first page asked for."""
    sampler = ReuseSampler(1000)
    sampler.put(leaf_hash(1), 10, 2)

    assert sampler.get(leaf_hash(1), 9, 4) == 0b0110
    assert sampler.get(leaf_hash(1), 9, 4) == 0


def test_pages_that_were_pushed_out_do_not_come_back_when_others_leave() -> None:
    """500 pages, then 1000 of a file that is deleted: a cache of 600 has lost the first ones.
    A plain stack distance would say 500."""
    sampler = ReuseSampler(2000)
    for page in range(500):
        sampler.put(leaf_hash(page), 0, 1)
    for page in range(1000, 2000):
        sampler.put(leaf_hash(page), 0, 1)
    for page in range(1000, 2000):
        sampler.flush(leaf_hash(page), 0, 1)
    for page in range(500):
        sampler.get(leaf_hash(page), 0, 1)
    sampler.advance()

    assert sampler.curve().hits(1000) == 0
    assert sampler.curve().hits(1600) == 500


def test_files_that_come_and_go_do_not_push_for_ever() -> None:
    """Their room is used again: ten rounds of 100 pages need no more than one."""
    sampler = ReuseSampler(2000)
    for page in range(500):
        sampler.put(leaf_hash(page), 0, 1)
    for turn in range(10):
        for page in range(100):
            sampler.put(leaf_hash(10_000 + turn * 100 + page), 0, 1)
        for page in range(100):
            sampler.flush(leaf_hash(10_000 + turn * 100 + page), 0, 1)
    for page in range(500):
        sampler.get(leaf_hash(page), 0, 1)
    sampler.advance()

    assert sampler.curve().hits(650) == 500


def test_an_idle_member_has_an_empty_curve() -> None:
    """Periods pass, nothing is asked for."""
    sampler = ReuseSampler(LIMIT)
    sampler.put(leaf_hash(1), 0, 64)
    for _ in range(10):
        sampler.advance()
    curve = sampler.curve()

    assert (curve.sizes, curve.gets, curve.samples, curve.periods) == ((), 0, 0, 10)


def test_a_change_of_behaviour_is_followed() -> None:
    """A loop over 500 pages becomes one over 1500: ten periods later the first is forgotten."""
    sampler = ReuseSampler(LIMIT, capacity=4096)
    for pages, periods in ((500, 10), (1500, 12)):
        for _ in range(periods):
            feed(sampler, through_page_cache(loop(pages, 6), 10))
            sampler.advance()
    curve = sampler.curve()

    assert curve.hits(600) < 0.05 * curve.gets
    assert curve.hits(1600) > 0.75 * curve.gets


@pytest.mark.parametrize("run", [1, 64])
def test_memory_is_bounded(run: int) -> None:
    """A million pages of working set, by the page and by the extent: 250 bytes an extent of the
    capacity."""
    rng = random.Random(7)
    sampler = ReuseSampler(1 << 20, capacity=1024)
    threshold = sampler.threshold
    for _ in range(60_000):
        leaf = rng.randrange(1 << 14)
        key = leaf_hash(leaf)
        if key & SAMPLE_MASK < sampler.threshold:
            first = rng.randrange(65 - run)
            sampler.get(key, first, run)
            sampler.put(key, first, run)
            assert sampler.watched_extents <= 1024
        assert sampler.threshold <= threshold
        threshold = sampler.threshold

    assert bytes_of(sampler) < 250 * 1024
    check(sampler)


def test_a_busy_guest_has_fewer_leaves_watched() -> None:
    """Time is bounded by the calls a period; a few leaves are always left."""
    sampler = ReuseSampler(1 << 14)
    for at in range(400_000):
        key = leaf_hash(at % 256)
        if key & SAMPLE_MASK < sampler.threshold:
            sampler.get(key, 0, 64)
            sampler.put(key, 0, 64)
    sampler.advance()

    assert 0.1 < sampler.threshold / (SAMPLE_MASK + 1) < 0.3
    assert 40 <= sampler.watched_extents <= 64
    check(sampler)


def test_after_a_stream_a_small_guest_is_seen_again() -> None:
    """The stream left one leaf in sixteen; a loop of 2000 pages in calls of one page is 32 leaves.
    The curve is kept while the new leaves settle."""
    sampler = ReuseSampler(1 << 20, capacity=256)
    for leaf in range(1 << 14):
        key = leaf_hash(1_000_000 + leaf)
        if key & SAMPLE_MASK < sampler.threshold:
            sampler.put(key, 0, 64)
    sampler.advance()
    thresholds = [sampler.threshold]
    for _ in range(40):
        for leaf in range(32):
            key = leaf_hash(leaf)
            if key & SAMPLE_MASK < sampler.threshold:
                sampler.get(key, 0, 64)
                sampler.put(key, 0, 64)
        sampler.advance()
        thresholds.append(sampler.threshold)
    curve = sampler.curve()

    assert thresholds[0] < SAMPLE_MASK / 16
    assert thresholds[-1] > 3 * thresholds[0]
    assert 1000 < curve.gets < 4000
    assert curve.hits(1000) == 0
    assert curve.hits(4000) > 0.9 * curve.gets
    check(sampler)
