"""Tiny caches over the hypervisor's eviction policies, and what they are compared with.

`Keeping` keeps its pages on a get, as the reference and the literature have it; `Exclusive` is a
cleancache, whose pages go back to the guest on a get, below a guest's own LRU page cache.  The
reference is libCacheSim through its Python package, which not every machine can have; the optimum
is computed here as well.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from hypervisor.eviction import EvictionPolicy, Links, make_policy
from ipc.abi import CallFlag

PLACES: Final = 64
NEVER: Final = 1 << 62


class _Pages:
    """Pages by id, as many as there are numbers; the policy says which one goes."""

    def __init__(self, policy: str, pages: int, *, admission: bool, leaf_pages: int) -> None:
        self.policy: EvictionPolicy = make_policy(policy, Links(pages), admission=admission)
        self.policy.capacity_pages = pages
        self._leaf_pages = leaf_pages
        self._ids = [-1] * pages
        self._numbers: dict[int, int] = {}
        self._free = list(range(pages))

    def _insert(self, page: int, hints: int) -> None:
        if not self._free:
            for first, count in self.policy.victims(1):
                assert count == 1
                victim = self._ids[first]
                self.policy.evicted(first, 1, *divmod(victim, self._leaf_pages))
                del self._numbers[victim]
                self._free.append(first)
        number = self._free.pop()
        self._ids[number] = page
        self._numbers[page] = number
        self.policy.inserted(number, 1, *divmod(page, self._leaf_pages), hints)

    def check(self) -> None:
        """Raises InvariantError unless the policy lists what is there."""
        self.policy.check(set(self._numbers.values()))


class Keeping(_Pages):
    """A get leaves the page; a miss puts it.  Each page is a leaf of its own."""

    def __init__(self, policy: str, pages: int, *, admission: bool = True) -> None:
        super().__init__(policy, pages, admission=admission, leaf_pages=1)

    def request(self, page: int) -> bool:
        """Get the page or, if it is not there, put it."""
        number = self._numbers.get(page)
        if number is not None:
            self.policy.used(number, 1)
            return True
        self._insert(page, 0)
        return False


class Exclusive(_Pages):
    """A guest's LRU page cache over tmem: a page is in one of them.  Leaves are of 64 pages.

    `listens` False: the guest gives no hints.
    """

    def __init__(
        self,
        policy: str,
        pages: int,
        guest_pages: int,
        *,
        admission: bool = True,
        hints: bool = True,
    ) -> None:
        super().__init__(policy, pages, admission=admission, leaf_pages=PLACES)
        self._guest_pages = guest_pages
        self._hints = hints
        self._guest: OrderedDict[int, int] = OrderedDict()
        """Page -> the hint of its put."""

    def request(self, page: int) -> str:
        """Where the page was: "guest", "tmem" or "disk"; it is in the guest now."""
        guest = self._guest
        if page in guest:
            guest.move_to_end(page)
            guest[page] = CallFlag.ACTIVE
            return "guest"
        number = self._numbers.pop(page, None)
        if number is not None:
            self.policy.taken(number, 1, *divmod(page, PLACES))
            self._free.append(number)
        guest[page] = 0
        if len(guest) > self._guest_pages:
            victim, hint = guest.popitem(last=False)
            self._insert(victim, hint if self._hints else 0)
        return "disk" if number is None else "tmem"


def keeping_hits(policy: str, trace: Sequence[int], pages: int, *, admission: bool = True) -> int:
    """How many requests of the trace a cache of this policy answers."""
    cache = Keeping(policy, pages, admission=admission)
    request = cache.request
    hits = sum(request(page) for page in trace)
    cache.check()
    return hits


def next_uses(trace: Sequence[int]) -> list[int]:
    """For each request, when its page is asked for next."""
    seen: dict[int, int] = {}
    uses = [NEVER] * len(trace)
    for at in range(len(trace) - 1, -1, -1):
        uses[at] = seen.get(trace[at], NEVER)
        seen[trace[at]] = at
    return uses


def optimal_hits(trace: Sequence[int], pages: int) -> int:
    """Belady's bound for a cache that holds each page at least until the next one comes."""
    held: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits = 0
    for page, use in zip(trace, next_uses(trace), strict=True):
        if page in held:
            hits += 1
        else:
            while len(held) >= pages:
                negative, victim = heapq.heappop(farthest)
                if held.get(victim) == -negative:
                    del held[victim]
        held[page] = use
        heapq.heappush(farthest, (-use, page))
    return hits


REFERENCES: Final = {"fifo": "FIFO", "clock": "Clock", "s3fifo": "S3FIFO", "optimum": "Belady"}
"""Our names and libCacheSim's."""

_HASH_POWER: Final = 16


def reference_hits(policy: str, trace: Sequence[int], pages: int) -> int:
    """The same from libCacheSim; raises ImportError where it is not installed."""
    import libcachesim

    cache = getattr(libcachesim, REFERENCES[policy])(pages, hashpower=_HASH_POWER)
    request = libcachesim.Request()
    request.obj_size = 1
    hits = 0
    for at, (page, use) in enumerate(zip(trace, next_uses(trace), strict=True)):
        request.obj_id = page
        request.clock_time = at
        request.next_access_vtime = use
        hits += cache.get(request)
    return hits
