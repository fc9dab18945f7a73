"""FIFO: the page that came first goes first, whatever happened to it meanwhile.

This is what Xen's lists amount to for private pools, whose pages leave when they are used.  (A hit
in a shared pool requeues the page in Xen; here that is what the other policies are for.)
"""

from __future__ import annotations

from hypervisor.eviction.links import Links
from hypervisor.frames import RUN_MAX, Run
from ipc.errors import InvariantError


class Fifo:
    """One list."""

    wants_keys = False

    def __init__(self, links: Links) -> None:
        self.pages = 0
        self.capacity_pages = 0
        self._links = links
        self._list = links.new_list()

    def inserted(self, first: int, count: int, _key: int, _place: int, _hints: int, /) -> None:
        self.pages += count
        self._links.append(self._list, first, count, 0)

    def used(self, first: int, count: int, /) -> None:
        """Changes nothing."""

    def taken(self, first: int, count: int, _key: int, _place: int, /) -> None:
        self.removed(first, count)

    def evicted(self, first: int, count: int, _key: int, _place: int, /) -> None:
        self.removed(first, count)

    def removed(self, first: int, count: int, /) -> None:
        self.pages -= count
        self._links.remove(first, count)

    def victims(self, count: int, /) -> list[Run]:
        links = self._links
        following, end = links.following, self._list
        runs: list[Run] = []
        first = end + following[end]
        while count > 0 and first != end:
            length = links.run_length(first, min(count, RUN_MAX))
            runs.append((first, length))
            count -= length
            last = first + length - 1
            first = last + following[last]
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
