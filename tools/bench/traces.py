"""Request traces for the eviction policies: page ids in the order in which they are asked for.

Each is made by a seeded generator from the number of requests alone, so the figures of two machines
are figures of the same trace.  The shapes are those that tell policies apart; they are no claim
about what real guests do.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Final

_PAGES: Final = 20_000
_ELSEWHERE: Final = 1 << 24
"""Where ids of pages that are asked for once begin."""

_ZIPF_EXPONENT: Final = 0.9
_LOOP_PAGES: Final = 2_253
"""A tenth more than 2,048 pages, the middle one of the sizes that are measured."""

_SHIFTING_PAGES: Final = 3_000
_SHIFTS: Final = 20


def _zipf(rng: random.Random, requests: int, pages: int = _PAGES) -> list[int]:
    weights = itertools.accumulate(1 / rank**_ZIPF_EXPONENT for rank in range(1, pages + 1))
    ids = rng.sample(range(pages), pages)  # neighbours are not equally popular
    return rng.choices(ids, cum_weights=list(weights), k=requests)


def zipf(rng: random.Random, requests: int) -> list[int]:
    """Few pages that are popular and many that are not."""
    return _zipf(rng, requests)


def zipf_and_scan(rng: random.Random, requests: int) -> list[int]:
    """The same, with a stream of pages in between that nobody asks for again."""
    popular = iter(_zipf(rng, requests))
    stream = itertools.count(_ELSEWHERE)
    return [next(stream) if rng.random() < 0.3 else next(popular) for _ in range(requests)]


def loop(_rng: random.Random, requests: int) -> list[int]:
    """Round and round through a little more than fits."""
    return [number % _LOOP_PAGES for number in range(requests)]


def shifting(rng: random.Random, requests: int) -> list[int]:
    """A working set that moves on by a third of its size from time to time."""
    step = _SHIFTING_PAGES // 3
    return [
        number * _SHIFTS // requests * step + rng.randrange(_SHIFTING_PAGES)
        for number in range(requests)
    ]


def mixed(rng: random.Random, requests: int) -> list[int]:
    """Popular pages, a stream, a loop, and a working set that moves, all at once."""
    parts: list[Iterator[int]] = [
        iter(_zipf(rng, requests, _PAGES // 4)),
        itertools.count(_ELSEWHERE),
        itertools.cycle(range(2 * _PAGES, 2 * _PAGES + _LOOP_PAGES // 4)),
        (4 * _PAGES + page for page in shifting(rng, requests)),
    ]
    order = [number % len(parts) for number in range(requests)]
    rng.shuffle(order)
    return [next(parts[part]) for part in order]


TRACES: Final[dict[str, Callable[[random.Random, int], list[int]]]] = {
    "zipf": zipf,
    "zipf and scan": zipf_and_scan,
    "loop": loop,
    "shifting": shifting,
    "mixed": mixed,
}


def trace(name: str, requests: int, seed: int) -> list[int]:
    """The trace of this name."""
    return TRACES[name](random.Random(f"{name} {seed}"), requests)
