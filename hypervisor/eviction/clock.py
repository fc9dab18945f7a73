"""CLOCK: a page that was used since it came, or since it was last spared, is spared once.

It is FIFO with a second chance: the oldest page goes, unless its mark says that it was used; then
the mark is taken away and the page becomes the youngest.  A page comes unmarked.  This is the
textbook's clock with the hand standing still and the pages moving, and libCacheSim's `Clock` of
one bit to the page; a private ephemeral get removes its page, so there it is FIFO.

It differs in one rule: a search spares at most `SPARED_MAX` pages, then the oldest page goes even
if it was used.  So no put waits for a round through a million pages that all were used.
"""

from __future__ import annotations

from typing import Final

from hypervisor.eviction.links import Links
from hypervisor.frames import RUN_MAX, Run
from ipc.errors import InvariantError

SPARED_MAX: Final = 2048
"""Pages that one search for victims may move: 2 to 3 ms where none of them are neighbours."""

_UNUSED: Final = 0
_USED: Final = 1
_ALL_USED: Final = tuple(bytes([_USED]) * n for n in range(RUN_MAX + 1))


class Clock:
    """One list; a page's mark is 1 if it was used."""

    wants_keys = False

    def __init__(self, links: Links) -> None:
        self.pages = 0
        self.capacity_pages = 0
        self._links = links
        self._list = links.new_list()

    def inserted(self, first: int, count: int, _key: int, _place: int, _hints: int, /) -> None:
        self.pages += count
        self._links.append(self._list, first, count, _UNUSED)

    def used(self, first: int, count: int, /) -> None:
        self._links.marks[first : first + count] = _ALL_USED[count]

    def taken(self, first: int, count: int, _key: int, _place: int, /) -> None:
        self.pages -= count
        self._links.remove(first, count)

    def evicted(self, first: int, count: int, _key: int, _place: int, /) -> None:
        self.pages -= count
        self._links.remove(first, count)

    def removed(self, first: int, count: int, /) -> None:
        self.pages -= count
        self._links.remove(first, count)

    def victims(self, count: int, /) -> list[Run]:
        links = self._links
        following, marks, end = links.following, links.marks, self._list
        runs: list[Run] = []
        spare = SPARED_MAX
        named = end  # the last victim: what follows it is the oldest page that is not named yet
        while count > 0 and (first := named + following[named]) != end:
            length = links.run_length(first, min(count, RUN_MAX))
            used = marks.find(_USED, first, first + length) if spare > 0 else -1
            if used == first:
                unused = marks.find(_UNUSED, first, first + length)
                if unused >= 0:
                    length = unused - first
                spare -= length
                links.remove(first, length)
                links.append(end, first, length, _UNUSED)
                continue
            if used > 0:
                length = used - first
            runs.append((first, length))
            count -= length
            named = first + length - 1
        return runs

    def front(self) -> int:
        return self._links.front(self._list)

    def check(self, numbers: set[int], /) -> None:
        listed = list(self._links.walk(self._list))
        if len(listed) != self.pages or set(listed) != numbers or len(numbers) != len(listed):
            raise InvariantError(
                f"{len(listed)} pages are in line, {self.pages} counted, {len(numbers)} there"
            )

    def close(self) -> None:
        self._links.drop_list(self._list)
