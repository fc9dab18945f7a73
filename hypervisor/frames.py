"""Which frames are free, and what the others hold: one byte a frame.

    FREE        nothing
    EPHEMERAL   a page that may be evicted, raw
    PERSISTENT  a page that may not, raw
    TABLE       a block of 128 entries (`entries`)
    SLAB        part of a span of compressed pages (`slab`)
    CONTENT     a whole page that entries refer to, maybe several (`sharing`)
    LENT        nothing: a guest has its memory as RAM (`lending`)

The bytes are all that allocation searches, with `bytearray.find` and `startswith`: both run at the
speed of memchr, where a free list of Python objects would cost more memory than the page columns.
Neighbouring frames matter, because a run of neighbours is copied by one slice; so an allocation
first takes runs that were freed lately (they are warm in the CPU's cache too), then a run found by
searching on from the last one, then whatever single frames there are.  Single frames are taken from
the bottom and runs from the top, so that single pages do not cut up the room in which extents lie.
`rfind` compares up to 64 bytes for each that it passes where a guest has left one frame in use
after every 63, which takes 10 ms for a million frames, so one allocation searches a part of them.
"""

from __future__ import annotations

from collections import deque
from typing import Final

FREE: Final = 0
EPHEMERAL: Final = 1
PERSISTENT: Final = 2
TABLE: Final = 3
SLAB: Final = 4
CONTENT: Final = 5
LENT: Final = 6

KINDS: Final = ("free", "ephemeral", "persistent", "table", "slab", "content", "lent")
"""Names of the kinds, by their number."""

RUN_MAX: Final = 64
_HINTS_MAX: Final = 256
_AMPLE_SHARE: Final = 8
"""A search for a whole run is tried while an eighth of the frames is free: below that it mostly
fails, and a failing search reads the whole array (24 us for 262,144 frames)."""

_WINDOW_FRAMES: Final = 2048
_WINDOWS_MAX: Final = 16
"""Searched by one allocation: 0.3 ms at worst."""
_RESTS_AFTER_FAILURE: Final = 64
"""Allocations that do without the search after it has failed."""

_RUNS: Final = tuple(
    tuple(bytes([kind]) * n for n in range(RUN_MAX + 1)) for kind in range(len(KINDS))
)

Run = tuple[int, int]
"""First number and count of neighbours."""


class Frames:
    """`kinds[frame]` says what it holds; `free` counts the free ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self.kinds = bytearray(count)
        self._hand = 0
        self._top = count
        self._searched = 0
        self._rests = 0
        self._freed: deque[Run] = deque(maxlen=_HINTS_MAX)
        self._freed_single: deque[int] = deque(maxlen=_HINTS_MAX)

    def count_kind(self, kind: int) -> int:
        """How many frames are of this kind; reads the whole array."""
        return self.kinds.count(kind)

    def take(self, kind: int) -> int:
        """One free frame, marked as `kind`.  Precondition: there is one."""
        kinds = self.kinds
        frame = self._freed_single.pop() if self._freed_single else -1
        if frame < 0 or kinds[frame]:
            frame = self.allocate(1)[0][0]
        kinds[frame] = kind
        self.free -= 1
        return frame

    def give(self, frame: int) -> None:
        """One frame that was in use becomes free."""
        self.kinds[frame] = FREE
        self.free += 1
        self._freed_single.append(frame)

    def allocate(self, count: int) -> list[Run]:
        """`count` free frames as few runs of at most RUN_MAX, not yet marked: `mark` does that.

        Precondition: count <= self.free.
        """
        freed = self._freed
        kinds = self.kinds
        if freed:
            first, length = freed.pop()
            if length >= count and kinds.startswith(_RUNS[FREE][count], first):
                if length > count:
                    freed.append((first + count, length - count))
                return [(first, count)]
        if count > 1 and self.free * _AMPLE_SHARE >= self.count:
            if self._rests:
                self._rests -= 1
            else:
                first = self._find_run(count)
                if first >= 0:
                    return [(first, count)]
        return self._gather(count)

    def _find_run(self, count: int) -> int:
        """The first of `count` free neighbours, -1 if none were found in as many windows as one
        allocation looks at; the next one goes on below, and all rest after once round in vain."""
        wanted = _RUNS[FREE][count]
        for _ in range(_WINDOWS_MAX):
            start = max(0, self._top - _WINDOW_FRAMES)
            first = self.kinds.rfind(wanted, start, self._top)
            if first >= 0:
                self._top = first
                self._searched = 0
                return first
            self._searched += self._top - start
            self._top = start + count - 1 if start else self.count
            if self._searched > self.count + _WINDOW_FRAMES:
                self._searched = 0
                self._rests = _RESTS_AFTER_FAILURE
                break
        return -1

    def _gather(self, count: int) -> list[Run]:
        """The next free frames from the hand on, wherever they are.  Once round the array meets
        each free frame once, and there are at least `count`."""
        runs: list[Run] = []
        kinds = self.kinds
        hand = self._hand
        while count:
            first = kinds.find(FREE, hand)
            if first < 0:
                hand = 0
                continue
            hand = first + 1
            limit = min(first + count, self.count)
            while hand < limit and not kinds[hand]:
                hand += 1
            runs.append((first, hand - first))
            count -= hand - first
        self._hand = hand
        return runs

    def mark(self, first: int, count: int, kind: int) -> None:
        """Free frames become `kind`."""
        self.kinds[first : first + count] = _RUNS[kind][count]
        self.free -= count

    def release(self, first: int, count: int) -> None:
        """Frames that were in use become free."""
        self.kinds[first : first + count] = _RUNS[FREE][count]
        self.free += count
        self._freed.append((first, count))

    def free_runs(self, start: int, limit: int) -> list[Run]:
        """Runs of free frames among `limit` frames from `start` on, of any length."""
        runs: list[Run] = []
        kinds = self.kinds
        end = min(self.count, start + limit)
        at = start
        while (first := kinds.find(FREE, at, end)) >= 0:
            window = kinds[first:end]
            length = len(window) - len(window.lstrip(b"\0"))
            runs.append((first, length))
            at = first + length
        return runs
