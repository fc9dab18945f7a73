"""The eviction policies beside their reference: `python -m tools.bench.eviction`.

Three tables: hit ratios of caches that keep their pages, beside libCacheSim's and Belady's optimum;
hit ratios of a guest and its cleancache together, with admission and hints on and off; and what the
policies cost.  The first two are the same on every machine; figures go to
`runs/bench/eviction.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hypervisor.eviction import POLICIES, Links, make_policy
from hypervisor.eviction.ghosts import Ghosts
from hypervisor.eviction.links import BLOCK_NUMBERS
from tools.bench import caches, traces

CACHE_PAGES: Final = (512, 2048, 8192)
GUEST_SHARE: Final = 4
"""A guest's own page cache is a quarter of its cleancache."""

VARIANTS: Final = (
    # policy, admission, hints
    ("fifo", True, False),
    ("clock", True, False),
    ("s3fifo", False, False),
    ("s3fifo", True, False),
    ("hinted", False, True),
    ("hinted", True, False),
    ("hinted", True, True),
)
RUN_PAGES: Final = (1, 8, 32, 64)
_COST_PAGES: Final = 1 << 16
_COST_REPETITIONS: Final = 7

Cells = list[list[str]]
Say = Callable[[str], None]


def compare(requests: int, seed: int, say: Say) -> list[dict[str, Any]]:
    """A record for each trace, size and policy: our hits and the reference's (None without it)."""
    records = []
    for name in traces.TRACES:
        trace = traces.trace(name, requests, seed)
        for pages in CACHE_PAGES:
            say(f"{name}, {pages} pages")
            for policy in (*POLICIES, "optimum"):
                if policy == "optimum":
                    hits = caches.optimal_hits(trace, pages)
                else:
                    hits = caches.keeping_hits(policy, trace, pages)
                reference = None
                if policy in caches.REFERENCES:
                    try:
                        reference = caches.reference_hits(policy, trace, pages)
                    except ImportError:
                        say("libcachesim is not installed: no reference")
                records.append(
                    {
                        "trace": name,
                        "pages": pages,
                        "policy": policy,
                        "hit_ratio": hits / requests,
                        "reference": None if reference is None else reference / requests,
                    }
                )
    return records


def compare_exclusive(requests: int, seed: int, say: Say) -> list[dict[str, Any]]:
    """A record for each trace, size and variant: requests answered by the guest or by tmem."""
    records = []
    for name in traces.TRACES:
        trace = traces.trace(name, requests, seed)
        for pages in CACHE_PAGES[:2]:
            say(f"{name}, {pages} pages below a guest's {pages // GUEST_SHARE}")
            record: dict[str, Any] = {"trace": name, "pages": pages}
            for policy, admission, hints in VARIANTS:
                cache = caches.Exclusive(
                    policy, pages, pages // GUEST_SHARE, admission=admission, hints=hints
                )
                answered = sum(cache.request(page) != "disk" for page in trace)
                cache.check()
                record[_variant(policy, admission, hints)] = answered / requests
            both = pages + pages // GUEST_SHARE
            record["optimum"] = caches.optimal_hits(trace, both) / requests
            records.append(record)
    return records


def _variant(policy: str, admission: bool, hints: bool) -> str:
    if policy not in ("s3fifo", "hinted"):
        return policy
    return f"{policy}{'' if admission else ', all in'}{', hints' if hints else ''}"


def costs(seed: int) -> list[dict[str, Any]]:
    """Nanoseconds a page of each call, for runs of several lengths; the best of repetitions."""
    records = []
    for policy in POLICIES:
        for run in RUN_PAGES:
            best: dict[str, float] = {}
            for repetition in range(_COST_REPETITIONS):
                for call, cost in _cost(policy, run, seed + repetition).items():
                    best[call] = min(cost, best.get(call, cost))
            records.append({"policy": policy, "run_pages": run, **best})
    return records


def _cost(name: str, run: int, seed: int) -> dict[str, float]:
    policy = make_policy(name, Links(_COST_PAGES))
    policy.capacity_pages = _COST_PAGES
    starts = list(range(0, _COST_PAGES, run))
    random.Random(seed).shuffle(starts)
    starts = starts[: min(len(starts), 4096)]
    pages = len(starts) * run
    now = time.thread_time_ns  # others may use the machine, too
    spent: dict[str, float] = {}

    def insert() -> None:
        for start in starts:
            policy.inserted(start, run, start, 0, 0)

    def use() -> None:
        for start in starts:
            policy.used(start, run)

    def take() -> None:
        for start in starts:
            policy.taken(start, run, start, 0)

    def remove() -> None:
        for start in starts:
            policy.removed(start, run)

    def search() -> None:
        for _ in starts:
            policy.victims(run)

    def evict() -> None:
        for _ in starts:
            for first, count in policy.victims(run):
                policy.evicted(first, count, first, 0)

    def timed(call: str, work: Callable[[], None]) -> None:
        begin = now()
        work()
        spent[call] = (now() - begin) / pages

    timed("insert", insert)
    timed("take", take)
    insert()
    timed("remove", remove)
    insert()
    timed("search", search)
    timed("search and evict", evict)
    insert()
    timed("use", use)
    timed("the same, all used", evict)
    return spent


def memory() -> list[dict[str, Any]]:
    """Bytes a page that the lists and the ghosts take."""
    leaves = 1 << 16
    rng = random.Random(0)
    records = [{"what": "links and marks", "bytes_per_page": _grown(_links)}]
    for places in (1, 8, 32, 64):

        def remember(places: int = places) -> tuple[object, int]:
            ghosts = Ghosts()
            for _ in range(leaves * 3):
                ghosts.trim(leaves * places)
                ghosts.add(rng.getrandbits(60), rng.randrange(65 - places), places)
            return ghosts, ghosts.pages

        what = f"ghosts, {places} a leaf"
        records.append({"what": what, "bytes_per_page": _grown(remember)})
    return records


def _links() -> tuple[object, int]:
    links = Links(_COST_PAGES)
    for _ in range(_COST_PAGES // BLOCK_NUMBERS):
        links.new_block()
    return links, 2 * _COST_PAGES


def _grown(make: Callable[[], tuple[object, int]]) -> float:
    tracemalloc.start()
    made, pages = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    return size / pages


def _ratio_cell(record: dict[str, Any]) -> str:
    reference = record["reference"]
    if reference is None:
        return f"{record['hit_ratio']:.4f}  "
    if reference == record["hit_ratio"]:
        return f"{record['hit_ratio']:.4f} ="
    return f"{record['hit_ratio']:.4f} not {reference:.4f}"


def tables(content: dict[str, Any]) -> list[tuple[str, Cells]]:
    """(title, cells with the heading first) of each table."""
    keeping: dict[tuple[str, int], list[str]] = {}
    for record in content["keeping"]:
        line = keeping.setdefault((record["trace"], record["pages"]), [])
        line.append(_ratio_cell(record))
    first = [["trace", "pages", *POLICIES, "optimum"]]
    first += [[name, str(pages), *line] for (name, pages), line in keeping.items()]
    heads = list(content["exclusive"][0])
    second = [heads]
    second += [
        [str(one) if isinstance(one, str | int) else f"{one:.4f}" for one in record.values()]
        for record in content["exclusive"]
    ]
    third = [list(content["costs"][0])]
    third += [
        [str(one) if isinstance(one, str | int) else f"{one:,.0f}" for one in record.values()]
        for record in content["costs"]
    ]
    fourth = [["", "bytes a page"]]
    fourth += [[one["what"], f"{one['bytes_per_page']:.1f}"] for one in content["memory"]]
    return [
        ("hit ratios where pages stay on a get (=: libCacheSim has exactly as many hits)", first),
        (f"hit ratios of a guest and its cleancache of {GUEST_SHARE} times the size", second),
        ("nanoseconds a page", third),
        ("memory", fourth),
    ]


def _print(title: str, cells: Cells) -> None:
    print(title)
    widths = [max(len(line[at]) for line in cells) for at in range(len(cells[0]))]
    for line in cells:
        first = line[0].ljust(widths[0])
        print(
            " ",
            first,
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        )
    print()


def main(arguments: list[str]) -> int:
    """Run it all; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.eviction", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/eviction.json"))
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    content = {
        "requests": options.requests,
        "seed": options.seed,
        "keeping": compare(options.requests, options.seed, say),
        "exclusive": compare_exclusive(options.requests, options.seed, say),
        "costs": costs(options.seed),
        "memory": memory(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    for title, cells in tables(content):
        _print(title, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
