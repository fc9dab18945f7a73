"""S3-FIFO that believes what it is told, and learns how long probation should be.

    LOW             a queue of its own, which goes first of all, in order
    HIGH            the main queue, where the page is spared once
    ACTIVE          the main queue: the guest used the page again while it had it
    taken before    the main queue, as in `s3fifo`
    evicted lately  the same
    no hint         the small queue, on probation

One use in the small queue suffices, where the reference asks for two: it sees every request, but we
see only those that the guest's own cache could not answer.

The small queue's part begins at a tenth and moves between that and a half.  A page that comes back
soon after it was evicted on probation says that probation is too short; one that was evicted from
the main queue says that the main queue is.  That is ARC's idea (Megiddo and Modha, 2003), taken
slowly: at a tenth of its pace, and what comes back from the main queue starts on probation again,
as in S3-FIFO, or a loop that is a little too long would wash the main queue out.  It mends what
S3-FIFO is worst at, a working set that moves.

Without admission there is no probation, and hints only say what goes first and what is spared.
"""

from __future__ import annotations

from typing import Final

from hypervisor.eviction.ghosts import Ghosts
from hypervisor.eviction.links import Links
from hypervisor.eviction.s3fifo import LOW, MAIN, PAGES_PER_LEAF, S3Fifo
from hypervisor.frames import RUN_MAX, Run
from ipc.abi import CallFlag

_LOW: Final = int(CallFlag.LOW)
_HIGH: Final = int(CallFlag.HIGH)
_SHARE_MIN: Final = 0.1
_SHARE_MAX: Final = 0.5
_PACE: Final = 0.1


class Hinted(S3Fifo):
    """Three lists; the low one holds what is in neither of the others."""

    promoting_uses = 1

    def __init__(self, links: Links, *, admission: bool) -> None:
        super().__init__(links, admission=admission)
        self._low = links.new_list()
        self._main_ghosts = Ghosts()
        self._ghosts_of[MAIN] = self._main_ghosts
        self._share = _SHARE_MIN

    @property
    def _low_pages(self) -> int:
        return self.pages - self._small_pages - self._main_pages

    def inserted(self, first: int, count: int, key: int, place: int, hints: int, /) -> None:
        if not hints:
            super().inserted(first, count, key, place, hints)
            return
        self.pages += count
        if self.wants_keys:
            self._recall(key, place, count)  # what is here again is no ghost
        if hints & _LOW:
            self._links.append(self._low, first, count, LOW)
        else:
            self._into_main(first, count, MAIN + 1 if hints & _HIGH else MAIN)

    def evicted(self, first: int, count: int, key: int, place: int, /) -> None:
        if self.wants_keys:
            limit = max(self.capacity_pages, self.pages)
            self._main_ghosts.trim(limit, limit // PAGES_PER_LEAF)
        super().evicted(first, count, key, place)

    def victims(self, count: int, /) -> list[Run]:
        links = self._links
        runs: list[Run] = []
        first = self._low + links.following[self._low]
        while count > 0 and first != self._low:
            length = links.run_length(first, min(count, RUN_MAX))
            runs.append((first, length))
            count -= length
            last = first + length - 1
            first = last + links.following[last]
        return runs + super().victims(count) if count > 0 else runs

    def front(self) -> int:
        return self._links.front(self._low) if self._low_pages else super().front()

    def check(self, numbers: set[int], /) -> None:
        self._main_ghosts.check()
        super().check(numbers)

    def _recall(self, key: int, place: int, count: int) -> int:
        small, main = self._ghosts, self._main_ghosts
        known = 0
        if small.pages and (known := small.take(key, place, count)):
            self._learn(known.bit_count() * max(1.0, main.pages / (small.pages + 1)))
        if main.pages and (washed_out := main.take(key, place, count)):
            self._learn(-washed_out.bit_count() * max(1.0, small.pages / (main.pages + 1)))
        return known | self._taken.take(key, place, count)

    def _learn(self, pages: float) -> None:
        """The small queue should be longer by so many pages; pages of the rarer kind of ghosts were
        counted by the ratio of the kinds."""
        share = self._share + _PACE * pages / max(self.capacity_pages, self.pages)
        self._share = min(max(share, _SHARE_MIN), _SHARE_MAX)

    def _small_max(self, listed: int) -> int:
        return int(listed * self._share)

    def _queues(self) -> list[tuple[int, int, int]]:
        return [*super()._queues(), (self._low, LOW, self._low_pages)]
