"""Which page goes when memory is short: an active and an inactive list with a second chance.

    read --> inactive --- touched twice ---> active
               |  ^                            |
               |  +---- when active is longer -+   (with one touch kept if it was used there)
               v
            evicted

As in Linux's mm/vmscan.c for file pages: one touch is no proof of use, because a page that is read
once sequentially is touched once, so only a second touch makes it active.  Touching is one byte
written; lists are mended when memory is short and not on every access.  A page that was active once
is remembered as such until it leaves: whoever keeps it after us may want to know.

Simpler than Linux: no refault distances, no zones, no background reclaim.  A batch of
`BATCH_PAGES` is evicted by whoever needs a frame.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import Final

BATCH_PAGES: Final = 32

_USED: Final = 2


class PageLists:
    """The lists, by frame number, over `frames` frames."""

    def __init__(self, frames: int) -> None:
        self.touches = bytearray(frames)
        """0, 1 or 2 touches of each frame since it was listed."""
        self.was_active = bytearray(frames)
        """1 for a frame whose page has been on the active list."""
        self._inactive: OrderedDict[int, None] = OrderedDict()
        self._active: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._inactive) + len(self._active)

    @property
    def active_pages(self) -> int:
        """Length of the active list."""
        return len(self._active)

    def add(self, frame: int) -> None:
        """A page came in: youngest of the inactive list, untouched."""
        self.touches[frame] = 0
        self.was_active[frame] = 0
        self._inactive[frame] = None

    def touch(self, frame: int) -> None:
        """A page was used."""
        if self.touches[frame] < _USED:
            self.touches[frame] += 1

    def remove(self, frame: int) -> None:
        """A page left for another reason than reclaim."""
        if frame in self._inactive:
            del self._inactive[frame]
        else:
            del self._active[frame]

    def victims(self) -> list[int]:
        """Up to `BATCH_PAGES` frames to evict, oldest first.

        They stay listed: the caller removes each once its page is gone.  At least one, unless
        nothing is listed at all.
        """
        self._balance()
        chosen: list[int] = []
        used: list[int] = []
        for frame in self._inactive:
            if len(chosen) == BATCH_PAGES:
                break
            (used if self.touches[frame] == _USED else chosen).append(frame)
        for frame in used:
            self.touches[frame] = 0
            self.was_active[frame] = 1
            del self._inactive[frame]
            self._active[frame] = None
        if not chosen and self._active:
            self._deactivate(BATCH_PAGES)
            chosen = list(islice(self._inactive, BATCH_PAGES))
        return chosen

    def _balance(self) -> None:
        surplus = len(self._active) - len(self._inactive)
        if surplus > 0:
            self._deactivate(min(len(self._active), (surplus + 1) // 2 + BATCH_PAGES))

    def _deactivate(self, count: int) -> None:
        """Move the oldest active frames down; the touch of a used one counts for the next time."""
        for _ in range(min(count, len(self._active))):
            frame, _none = self._active.popitem(last=False)
            self.touches[frame] = 1 if self.touches[frame] else 0
            self._inactive[frame] = None
