"""When a page was put, as far as that can be known for nothing.

A *moment* says which sequence was reached at what time.  One is noted once a second while pages are
put; a page was put between the two moments around the sequence in its state word.  They are in the
segment's first page, so a restart forgets none, and there is room for `MOMENTS_MAX`: when that is
used up the one goes that is missed least, measured by its age.  So the last minute is known to
seconds, an hour ago to some minutes, and a day ago to an hour.

Times are of the wall clock, and go back when that does.
"""

from __future__ import annotations

from typing import Final

from hypervisor.arena import MOMENTS_MAX, Arena

_NOTE_NS: Final = 1_000_000_000


class Moments:
    """The moments of one arena, oldest first."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        found = sorted((sequence, now_ns, at) for at, sequence, now_ns in arena.read_moments())
        self._moments = found
        used = {at for _, _, at in found}
        self._free = [at for at in range(MOMENTS_MAX - 1, -1, -1) if at not in used]

    def note(self, sequence: int, now_ns: int) -> None:
        """The puts up to this sequence were before now."""
        if self._moments:
            last_sequence, last_ns, _ = self._moments[-1]
            if sequence <= last_sequence or 0 <= now_ns - last_ns < _NOTE_NS:
                return
        if not sequence:
            return
        if not self._free:
            self._thin(now_ns)
        at = self._free.pop()
        self._arena.publish_moment(at, sequence, now_ns)
        self._moments.append((sequence, now_ns, at))

    def _thin(self, now_ns: int) -> None:
        """Of all but the first and the last, which say how far notes reach, drop that one without
        which the gap is the smallest part of how long ago it was."""
        times = [moment_ns for _, moment_ns, _ in self._moments]
        least = min(
            range(1, len(times) - 1),
            key=lambda at: (times[at + 1] - times[at - 1]) / max(1, now_ns - times[at]),
        )
        _, _, at = self._moments.pop(least)
        self._arena.publish_moment(at, 0, 0)
        self._free.append(at)

    def around(self, sequence: int) -> tuple[int, int]:
        """(not before, not after) of a put, ns since 1970; 0 for unknown."""
        after = before = 0
        for noted, now_ns, _ in self._moments:
            if noted >= sequence:
                before = now_ns
                break
            after = now_ns
        return after, before
