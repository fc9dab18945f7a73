"""How many pages to read when one is missing.

A miss where the last read of the file ended (or at the file's start) is sequential: the window
doubles from 4 to 32 pages.  Any other miss reads only what was asked for.

Simpler than Linux's mm/readahead.c: no marker page that starts the next window before the reader
meets its end, because nothing here happens in the background.
"""

from __future__ import annotations

from typing import Final

WINDOW_PAGES_MIN: Final = 4
WINDOW_PAGES_MAX: Final = 32


class Readahead:
    """The state of one file."""

    __slots__ = ("_next_index", "_window")

    def __init__(self) -> None:
        self._next_index = 0
        self._window = 0

    def plan(self, index: int, wanted: int, end: int) -> int:
        """Pages to read from `index` on, which is missing: 1 to 32, and not beyond `end`.

        `wanted` pages were asked for from there on.
        """
        if index in (0, self._next_index):
            self._window = min(WINDOW_PAGES_MAX, max(WINDOW_PAGES_MIN, 2 * self._window))
        else:
            self._window = 0
        pages = max(1, min(WINDOW_PAGES_MAX, max(wanted, self._window), end - index))
        self._next_index = index + pages
        return pages
