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
Neighbouring frames matter, because a run of neighbours is copied by one slice; in a full arena,
where each put takes what gets have just left, that is most of what a page costs.  So an allocation
takes the smallest run that fits of those that were freed lately (they are warm in the CPU's cache
too), then a run found by searching on from the last one, then the largest pieces that were freed,
then whatever single frames there are.  What is freed is remembered together with the free frames
around it, by length, and looked at again before it is used: a hint may have become wrong.  Single
frames are taken from the bottom and runs from the top, so that single pages do not cut up the room
in which extents lie.
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
_HINTS_MAX: Final = 32
"""Runs of one length that are remembered."""
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

_FREE_BYTE: Final = bytes([FREE])
_PIECES_LEAST: Final = 1
"""Shorter ones are found by the hand as well."""

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
        self._freed = tuple(deque[int](maxlen=_HINTS_MAX) for _ in range(RUN_MAX + 1))
        """By length: first numbers of runs that were free when they were noted."""
        self._lengths = 0
        """Bit n: there may be a run of n."""
        self._singles = self._freed[1]

    def count_kind(self, kind: int) -> int:
        """How many frames are of this kind; reads the whole array."""
        return self.kinds.count(kind)

    def take(self, kind: int) -> int:
        """One free frame, marked as `kind`.  Precondition: there is one."""
        kinds = self.kinds
        frame = self._singles.pop() if self._singles else -1
        if frame < 0 or kinds[frame]:
            return self.allocate(1, kind)[0][0]
        kinds[frame] = kind
        self.free -= 1
        return frame

    def give(self, frame: int) -> None:
        """One frame that was in use becomes free."""
        kinds = self.kinds
        kinds[frame] = FREE
        self.free += 1
        if kinds[frame - 1] and kinds[frame + 1 - self.count]:
            self._singles.append(frame)
            self._lengths |= 1 << 1
        else:
            self._note_freed(frame, 1)

    def allocate(self, count: int, kind: int) -> list[Run]:
        """`count` free frames as few runs of at most RUN_MAX, marked as `kind`.

        Precondition: count <= self.free.
        """
        first = self._take_freed(count)
        if first < 0 and count > 1 and self.free * _AMPLE_SHARE >= self.count:
            if self._rests:
                self._rests -= 1
            else:
                first = self._find_run(count)
        if first >= 0:
            self.mark(first, count, kind)
            return [(first, count)]
        return self._gather(count, kind)

    def _take_freed(self, count: int) -> int:
        """The first of `count` neighbours that were freed lately, -1 if there are none; what is
        left of a longer run is remembered."""
        while lengths := self._lengths >> count:
            length = count + (lengths & -lengths).bit_length() - 1
            first = self._pop_freed(length)
            if first >= 0:
                if length > count:
                    self._freed[length - count].append(first + count)
                    self._lengths |= 1 << length - count
                return first
        return -1

    def _pop_freed(self, length: int) -> int:
        """The youngest run of this length that is still free, -1 if there is none."""
        freed = self._freed[length]
        free = _RUNS[FREE][length]
        startswith = self.kinds.startswith
        while freed:
            first = freed.pop()
            if startswith(free, first):
                return first
        self._lengths &= ~(1 << length)
        return -1

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

    def _gather(self, count: int, kind: int) -> list[Run]:
        """Pieces: the largest that were freed lately, then the next free frames from the hand on,
        wherever they are.  Once round the array meets each free frame once, and there are enough.
        """
        runs: list[Run] = []
        while count and self._lengths > 1 << _PIECES_LEAST:
            length = self._lengths.bit_length() - 1
            first = self._pop_freed(length) if length < count else self._take_freed(count)
            if first >= 0:
                length = min(length, count)
                self.mark(first, length, kind)
                runs.append((first, length))
                count -= length
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
            self.mark(first, hand - first, kind)
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
        self._note_freed(first, count)

    def _note_freed(self, first: int, count: int) -> None:
        """Remember what was freed, together with the free frames around it."""
        kinds = self.kinds
        end = first + count
        length = count
        if first and not kinds[first - 1]:
            before = kinds[max(0, first - RUN_MAX) : first]
            left = len(before) - len(before.rstrip(_FREE_BYTE))
            first -= left
            length += left
        if end < self.count and not kinds[end]:
            behind = kinds[end : end + RUN_MAX]
            length += len(behind) - len(behind.lstrip(_FREE_BYTE))
        if length > RUN_MAX:
            # All around is free; those that were in use are the warm ones.
            first, length = end - count, count
        self._freed[length].append(first)
        self._lengths |= 1 << length

    def free_runs(self, start: int, limit: int) -> list[Run]:
        """Runs of free frames among `limit` frames from `start` on, of any length."""
        runs: list[Run] = []
        kinds = self.kinds
        end = min(self.count, start + limit)
        at = start
        while (first := kinds.find(FREE, at, end)) >= 0:
            window = kinds[first:end]
            length = len(window) - len(window.lstrip(_FREE_BYTE))
            runs.append((first, length))
            at = first + length
        return runs
