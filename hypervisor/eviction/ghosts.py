"""Ghosts: which pages were here lately, without the pages.

A ghost is one bit: the leaf's key leads to a bitmap of its 64 places, so that a leaf costs an entry
in a dictionary, however many of its pages are remembered.  The leaf to which pages were added
longest ago is forgotten first, whole; with one page a leaf this is a queue of pages, exactly.

Two dictionaries, because the oldest key of one can't be had in constant time once keys at its
front are gone: leaves come into the young one, and the old one is emptied through a list of its
keys.  When that is empty, the young one becomes the old one.

A leaf takes about 110 bytes, 16 more if keys have more than 60 bits; a bitmap of one run is one of
a table of constants and takes none.

Invariant: `pages` is the number of bits, and no key is in both dictionaries.
"""

from __future__ import annotations

import sys
from typing import Final

from hypervisor.frames import RUN_MAX
from ipc.errors import InvariantError

FORGET_MAX: Final = 256
"""Leaves that one call forgets."""

PLACES: Final = tuple((1 << n) - 1 for n in range(RUN_MAX + 1))
"""PLACES[n] is a bitmap of n places."""

_RUNS: Final = tuple(
    tuple(places << place for place in range(RUN_MAX + 1 - n)) for n, places in enumerate(PLACES)
)
"""_RUNS[n][place]: n places from `place` on."""


class Ghosts:
    """Bitmaps by leaf, in the order in which the leaves came."""

    __slots__ = ("_old", "_order", "_young", "pages")

    def __init__(self) -> None:
        self.pages = 0
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._order: list[int] = []

    @property
    def leaves(self) -> int:
        return len(self._young) + len(self._old)

    def add(self, key: int, place: int, count: int) -> None:
        """Remember `count` pages of a leaf from `place` on."""
        run = _RUNS[count][place]
        young = self._young
        known = young.pop(key, 0) or self._old.pop(key, 0)
        if known:
            self.pages -= known.bit_count()
            run |= known
            self.pages += run.bit_count()
        else:
            self.pages += count
        young[key] = run

    def take(self, key: int, place: int, count: int) -> int:
        """Which of these pages are remembered (bit 0 is `place`); they are no more."""
        if not self.pages:
            return 0
        leaves = self._young
        known = leaves.get(key)
        if known is None:
            leaves = self._old
            known = leaves.get(key)
            if known is None:
                return 0
        found = known & _RUNS[count][place]
        if found:
            if found == known:
                del leaves[key]
            else:
                leaves[key] = known ^ found
            self.pages -= found.bit_count()
        return found >> place

    def trim(self, pages: int, leaves: int = sys.maxsize) -> None:
        """Forget the oldest leaves until at most so many pages and leaves are remembered.

        The work is bounded: a limit that has fallen far is reached in several calls.
        """
        forgotten = 0
        while (self.pages > pages or self.leaves > leaves) and forgotten < FORGET_MAX:
            if not self._order:
                self._old = self._young
                self._young = {}
                self._order = list(self._old)
                self._order.reverse()
            self.pages -= self._old.pop(self._order.pop(), 0).bit_count()
            forgotten += 1

    def check(self) -> None:
        """Raises InvariantError if `pages` is not what there is."""
        bits = sum(
            bitmap.bit_count() for table in (self._young, self._old) for bitmap in table.values()
        )
        if bits != self.pages or self._young.keys() & self._old.keys():
            raise InvariantError(f"{bits} ghosts are remembered, {self.pages} counted")
        if not self._old.keys() <= set(self._order):
            raise InvariantError("a ghost is remembered for ever")
