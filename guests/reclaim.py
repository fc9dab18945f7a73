"""Which page goes when memory is short: active and inactive lists, for files and for the rest.

    read --> inactive --- touched twice ---> active
               |  ^                            |
               |  +---- when active is longer -+   (with one touch kept if it was used there)
               v
            evicted

As in Linux's mm/vmscan.c: one touch is no proof of use, because a page that is read
once sequentially is touched once, so only a second touch makes it active.  Touching is one byte
written; lists are mended when memory is short and not on every access.  A page that was active once
is remembered as such until it leaves: whoever keeps it after us may want to know.

Files and anonymous memory each have such lists, and `Reclaim` says whose turn it is.  Giving up a
page costs what it takes to get it back, so each kind's cost is what the disk had to do for pages
that were given up too early, and the share of a kind goes down as its cost goes up; `swappiness`
weighs them (Linux's formula and default).  Costs fade, so a new load is judged by what it does now.

When free frames get few, some are made in the background, between two steps of work; when there
are none, by whoever needs one.  Both in batches of `BATCH_PAGES`.  When nothing can be evicted,
`exhausted` is asked (the out-of-memory killer), and if that doesn't help it is ENOMEM.

Simpler than Linux: no refault distances, no zones, no reserves for those who reclaim: a batch is
written from the transfer frames.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, Protocol

from fs.errors import error

BATCH_PAGES: Final = 32
SWAPPINESS: Final = 60
LOW_SHARE: Final = 128
"""The background begins when fewer than one frame in so many is free, and makes twice as many."""
FILES_FLOOR_PAGES: Final = BATCH_PAGES
"""With fewer file pages than this only anonymous memory is reclaimed, if it can be."""

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

    def least_used_first(self) -> Iterator[int]:
        """All frames: inactive before active, older ones first, but used ones after all others."""
        used = []
        for frame in self._inactive:
            if self.touches[frame] == _USED:
                used.append(frame)
            else:
                yield frame
        yield from used
        yield from self._active

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


class Pages(Protocol):
    """Whoever owns pages that can be given up."""

    @property
    def lists(self) -> PageLists:
        """All of them."""
        ...

    def evict(self, frames: list[int]) -> int:
        """Bring the pages of listed frames to where they can be had again, and free the frames.

        Returns how many became free; 0 if there is no place for them.  OSError.
        """
        ...


class Reclaim:
    """Makes free frames; `free_pages` counts them."""

    def __init__(self, frames: int, free_pages: Callable[[], int]) -> None:
        self.swappiness = SWAPPINESS
        self.low_pages = frames // LOW_SHARE
        self.exhausted: Callable[[], bool] = lambda: False
        """Nothing can be evicted: whether that was changed."""
        self.grow: Callable[[int], None] | None = None
        """Have at least so many free frames if the host has some (`guests.monitor`)."""
        self.direct_pages = 0
        self.background_pages = 0
        self._frames = frames
        self._free_pages = free_pages
        self._files: Pages | None = None
        self._anonymous: Pages | None = None
        self._file_cost = 0
        self._anonymous_cost = 0
        self._credit = 0.0
        self._filling = False

    def serve(self, *, files: Pages | None = None, anonymous: Pages | None = None) -> None:
        """Who owns pages."""
        self._files = files or self._files
        self._anonymous = anonymous or self._anonymous

    @property
    def file_lists(self) -> PageLists | None:
        """Pages of files, if there are any."""
        return self._files.lists if self._files is not None else None

    def note_cost(self, *, files: int = 0, anonymous: int = 0) -> None:
        """The disk had to move so many pages that had better stayed, or that went dirty."""
        self._file_cost += files
        self._anonymous_cost += anonymous
        if self._file_cost + self._anonymous_cost > self._frames // 4:
            self._file_cost //= 2
            self._anonymous_cost //= 2

    def make_room(self, count: int, *, may_kill: bool = True) -> None:
        """At least `count` free frames; a page that the caller has just brought in may leave.

        ENOMEM; OSError of a page that can't be written.
        """
        if self.grow is not None and self._free_pages() < count:
            self.grow(count)
        while self._free_pages() < count:
            freed = self._evict_batch()
            self.direct_pages += freed
            if not freed and not (may_kill and self.exhausted()):
                raise error(errno.ENOMEM, "no page can be evicted, and nobody can be killed")

    def in_background(self) -> None:
        """One batch, from the low mark on until twice as many frames are free."""
        free = self._free_pages()
        if self.grow is not None and free < 2 * self.low_pages:
            self.grow(2 * self.low_pages)
            free = self._free_pages()
        self._filling = free < self.low_pages or (self._filling and free < 2 * self.low_pages)
        if self._filling:
            self.background_pages += self._evict_batch()

    def _evict_batch(self) -> int:
        failure: OSError | None = None
        for pages in self._turns():
            victims = pages.lists.victims()
            try:
                freed = pages.evict(victims) if victims else 0
            except OSError as reason:
                failure = reason
                continue
            if freed:
                return freed
        if failure is not None:
            raise failure
        return 0

    def _turns(self) -> list[Pages]:
        """Whose turn it is, and who is next if that brings nothing."""
        files, anonymous = self._files, self._anonymous
        if files is None or anonymous is None:
            return [pages for pages in (files, anonymous) if pages is not None]
        if not self.swappiness or not len(anonymous.lists):
            return [files, anonymous]
        if len(files.lists) <= FILES_FLOOR_PAGES:
            return [anonymous, files]
        self._credit += self._anonymous_share()
        if self._credit < 1:
            return [files, anonymous]
        self._credit -= 1
        return [anonymous, files]

    def _anonymous_share(self) -> float:
        """Linux's get_scan_count: pressure goes to where giving up pages costs less."""
        total = self._file_cost + self._anonymous_cost + 1
        anonymous = self.swappiness * total / (self._anonymous_cost + 1)
        files = (200 - self.swappiness) * total / (self._file_cost + 1)
        return anonymous / (anonymous + files)
