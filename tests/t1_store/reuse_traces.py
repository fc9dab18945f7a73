"""What a hypervisor sees of guests, and what caches make of it, computed the long way."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Literal

from hypervisor.reuse import SAMPLE_MASK, ReuseSampler

Event = tuple[Literal["put", "get", "flush"], int]
"""What is done to a page, by its number."""

_64_BITS = (1 << 64) - 1


def leaf_hash(leaf: int, seed: int = 0) -> int:
    """A hash of 64 bits that any two leaves share by accident only (splitmix64)."""
    mixed = (leaf + seed * 0x5851F42D4C957F2D + 0x9E3779B97F4A7C15) & _64_BITS
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return mixed ^ (mixed >> 31)


def through_page_cache(accesses: Iterable[int], pages: int, batch: int = 1) -> Iterator[Event]:
    """Gets and puts of a guest whose own cache keeps `pages` pages, least recently used out first,
    `batch` at a time."""
    cache: OrderedDict[int, None] = OrderedDict()
    for page in accesses:
        if page in cache:
            cache.move_to_end(page)
            continue
        yield "get", page
        cache[page] = None
        if len(cache) > pages:
            for _ in range(min(batch, len(cache))):
                yield "put", cache.popitem(last=False)[0]


def loop(pages: int, rounds: int) -> Iterator[int]:
    """The same pages again and again."""
    for _ in range(rounds):
        yield from range(pages)


def zipf(pages: int, exponent: float, count: int, rng: random.Random) -> list[int]:
    """Page k is asked for in proportion to k ** -exponent; which page is k, is random."""
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(pages)))
    order = list(range(pages))
    rng.shuffle(order)
    return rng.choices(order, cum_weights=weights, k=count)


def exclusive_hits(events: Iterable[Event], pages: int) -> tuple[int, int]:
    """(hits, gets) of a cache whose pages leave when they are got, oldest out first."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = gets = 0
    for what, page in events:
        if what == "get":
            gets += 1
        if page in cache:
            del cache[page]
            hits += what == "get"
        elif what == "put" and len(cache) >= pages:
            cache.popitem(last=False)
        if what == "put":
            cache[page] = None
    return hits, gets


def inclusive_hits(events: Iterable[Event], pages: int) -> int:
    """Hits of a cache whose pages stay when they are got, least recently used out first."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for what, page in events:
        if page in cache:
            cache.move_to_end(page)
            hits += what == "get"
        elif what == "put":
            if len(cache) >= pages:
                cache.popitem(last=False)
            cache[page] = None
    return hits


def feed(sampler: ReuseSampler, events: Iterable[Event], seed: int = 0) -> int:
    """Tell a sampler what it would be told; how many events it was told of."""
    told = 0
    keys: dict[int, int] = {}
    for what, page in events:
        key = keys.get(page >> 6)
        if key is None:
            key = keys[page >> 6] = leaf_hash(page >> 6, seed)
        if key & SAMPLE_MASK < sampler.threshold:
            told += 1
            if what == "put":
                sampler.put(key, page & 63, 1)
            elif what == "get":
                sampler.get(key, page & 63, 1)
            else:
                sampler.flush(key, page & 63, 1)
    return told


def mean_error(sampler: ReuseSampler, events: list[Event], limit_pages: int) -> float:
    """Mean absolute error of the hit ratio over 16 sizes up to the limit."""
    sampler.advance()
    curve = sampler.curve()
    errors = []
    for part in range(1, 17):
        size = limit_pages * part // 16
        hits, gets = exclusive_hits(events, size)
        errors.append(abs(hits / gets - curve.hits(size) / gets))
    return sum(errors) / len(errors)
