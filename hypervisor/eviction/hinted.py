"""S3-FIFO that believes what it is told: the hints of a put, and what was got.

    LOW             a queue of its own, which goes first of all, in order
    HIGH            the main queue, where the page is spared once
    ACTIVE          the main queue: the guest used the page again while it had it
    taken before    the main queue, as in `s3fifo`
    evicted lately  the same
    no hint         the small queue, on probation

One use in the small queue suffices, where the reference asks for two: it sees every request, but we
see only those that the guest's own cache could not answer.

Without admission there is no probation, and hints only say what goes first and what is spared.
"""

from __future__ import annotations

from typing import Final

from hypervisor.eviction.links import Links
from hypervisor.eviction.s3fifo import LOW, MAIN, S3Fifo
from hypervisor.frames import RUN_MAX, Run
from ipc.abi import CallFlag

_LOW: Final = int(CallFlag.LOW)
_HIGH: Final = int(CallFlag.HIGH)


class Hinted(S3Fifo):
    """Three lists; the low one holds what is in neither of the others."""

    promoting_uses = 1

    def __init__(self, links: Links, *, admission: bool) -> None:
        super().__init__(links, admission=admission)
        self._low = links.new_list()

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

    def _queues(self) -> list[tuple[int, int, int]]:
        return [*super()._queues(), (self._low, LOW, self._low_pages)]
