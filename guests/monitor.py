"""The host's hand in a guest: gives it what it asks for of the pages that it may take (CMM2).

The host says how much RAM the guest may have (its allowance), through the window, as a balloon's
target.  Between two steps of work the monitor sees to it:

    allowance below the size    unused frames go to the host, then volatile ones, all at once and
                                without a word to their owners: nothing is written for it
    still below                 all that is left is stable.  The guest evicts, as for a balloon
    allowance above the size    nothing happens: frames are taken when they are needed, without
                                asking (`Memory.allow`), and are zeros then

Dropped are the pages that were used least, as far as the page cache's lists tell: a host knows from
the reference bits.

Differs from z/VM: a host that is short of memory when all guests are stable writes their pages to
paging space of its own, at any time.  Ours has none, so the guest's own swap disk takes them, and
who wants to grow waits for that.  A guest can't grow at any page fault either, but within what it
was allowed last.  How long all of it takes is the business of whoever decides
(`tools.experiment.handout`), beside the step of work that is being done, some 5 to 50 ms.
"""

from __future__ import annotations

from guests.balloon import Balloon
from guests.memory import Memory
from guests.pagestates import DISCARDED, STABLE, VOLATILE
from guests.reclaim import PageLists


class Monitor:
    """One guest's, whose memory has page states; `files` are the lists of its file pages."""

    def __init__(self, memory: Memory, balloon: Balloon) -> None:
        assert memory.states is not None
        self._memory = memory
        self._states = memory.states
        self._balloon = balloon
        self._fixed_pages = memory.budget.total - memory.budget.frames
        self.files: PageLists | None = None
        """Until the page cache is there, nothing is volatile."""
        self.allowed_pages = 0
        """Heeded last: the guest may have so many at any time from now on."""
        self.dropped_unused_pages = 0
        self.dropped_volatile_pages = 0
        self.step()

    def step(self) -> None:
        """Heed the allowance."""
        allowed = self._balloon.target_pages
        if allowed != self.allowed_pages:
            self.allowed_pages = allowed
            self._memory.allow(allowed - self._fixed_pages)
        excess = self._balloon.size_pages - allowed
        if excess <= 0:
            return
        unused = self._memory.give_back(excess)
        self.dropped_unused_pages += unused
        self.dropped_volatile_pages += self._discard(excess - unused)
        if self._balloon.size_pages > allowed:
            self._balloon.step()

    def _discard(self, pages: int) -> int:
        """Drop so many volatile pages, as far as there are; how many it were."""
        if pages <= 0 or self.files is None:
            return 0
        states = self._states.of
        frames: list[int] = []
        for frame in self.files.least_used_first():
            if states[frame] == VOLATILE:
                frames.append(frame)
                if len(frames) == pages:
                    break
        self._memory.discard(frames)
        return len(frames)

    def counters(self) -> dict[str, int]:
        """Of `status`, in pages."""
        memory, states = self._memory, self._states
        return {
            "stable_pages": states.count(STABLE),
            "unused_pages": memory.resident_free_pages,
            "volatile_pages": states.count(VOLATILE),
            "discarded_pages": states.count(DISCARDED),
            "allowed_pages": self.allowed_pages,
            "discard_faults": states.discard_faults,
            "dropped_unused_pages": self.dropped_unused_pages,
            "dropped_volatile_pages": self.dropped_volatile_pages,
        }
