"""The host's hand in a guest: gives it what it asks for of the pages that it may take (CMM2).

At boot the host has all frames but the least; none was ever touched.  From then on

    a frame is needed       one that is unused, else one that the host has and lends: it is asked
                            for a batch, and answers at once (`guests.hostmemory`).  When it has
                            none, the guest evicts
    many are unused         the host gets all but a batch: it could take them at any time, so that
                            a guest that needs them is lent them at once
    the target is below     unused frames go to the host, then volatile ones, all at once, without
    the size                a word to their owners and without a write
    it is below still       all that is left is stable: the guest evicts, as for a balloon

The target is the most that the guest may have; it comes through the window, as a balloon's, and is
heeded between two steps of work.  A host that does not lend is not asked: the target is what the
guest may take.  Dropped are the pages that were used least, as far as the lists of the page cache
tell; a host knows from the reference bits.

Differs from z/VM: a host that is short although all guests are stable writes their pages to paging
space of its own, at any time.  Ours has none, so the guest's own swap disk takes them, and who
wants to grow waits for that.  How the host decides, and how long it takes beside the step of work
that is being done (5 to 50 ms), is `tools.experiment.handout`'s business.
"""

from __future__ import annotations

from typing import Final

from guests.balloon import Balloon
from guests.hostmemory import HostMemory
from guests.memory import FRAMES_MIN, Memory
from guests.pagestates import DISCARDED, STABLE, VOLATILE
from guests.reclaim import PageLists

GROW_PAGES: Final = 64
"""Borrowed at a time."""
UNUSED_PAGES_MAX: Final = 2 * GROW_PAGES
"""With more unused frames than this the host gets some."""
PATIENCE_SECONDS: Final = 0.02
"""How long the host is not asked again when it had not enough."""


class Monitor:
    """One guest's, whose memory has page states; made before anything is in the frames."""

    def __init__(self, memory: Memory, balloon: Balloon, host: HostMemory) -> None:
        assert memory.states is not None
        self._memory = memory
        self._states = memory.states
        self._balloon = balloon
        self._host = host
        self._fixed_pages = memory.budget.total - memory.budget.frames
        self.files: PageLists | None = None
        """Of the page cache; until there is one nothing is volatile."""
        self.dropped_unused_pages = 0
        self.dropped_volatile_pages = 0
        host.patience_seconds = PATIENCE_SECONDS
        host.on_reply = self._allow
        memory.give_back(memory.budget.frames - FRAMES_MIN)
        memory.reclaim.grow = self.grow

    @property
    def allowed_pages(self) -> int:
        """What the guest may have without asking, also while the host is away."""
        allowed = self._balloon.target_pages
        if self._host.lends:
            allowed = min(allowed, self._host.lent_pages)
        return max(self._balloon.floor_pages, allowed)

    def _allow(self) -> None:
        self._memory.allow(self.allowed_pages - self._fixed_pages)

    def grow(self, pages: int) -> None:
        """Fewer than `pages` frames are free: let it be so many if the host has them."""
        if self._host.lends:
            memory = self._memory
            more = max(GROW_PAGES, pages - memory.free_pages)
            has = self._balloon.size_pages + memory.claimable_pages
            self._host.grow(min(has + more, self._balloon.target_pages))
        else:
            self._allow()

    def step(self) -> None:
        """Heed the target."""
        excess = self._balloon.size_pages - self.allowed_pages
        unused = self._memory.resident_free_pages
        if excess > 0:
            self._drop(excess)
            if self._balloon.size_pages > self.allowed_pages:
                self._balloon.step()
        elif self._host.lends and unused > UNUSED_PAGES_MAX:
            self._drop(unused - GROW_PAGES)
        elif self._host.lent_pages <= self._balloon.target_pages:
            self._allow()
            return
        self._host.shrink()
        self._allow()

    def _drop(self, pages: int) -> None:
        unused = self._memory.give_back(pages)
        self.dropped_unused_pages += unused
        self.dropped_volatile_pages += self._discard(pages - unused)

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
