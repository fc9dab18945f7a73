"""The balloon: RAM that the guest gives back to the host, and takes again.

The target is a size of the guest in pages, its whole budget (`guests.memory`).  Somebody else sets
it: an administrator or a balancer through the window's shared info page, or the guest itself
(`guests.selfballoon`).  It is approached in batches between two steps of work: free frames go at
once, others are reclaimed first.  A balloon kills nobody: when nothing more can be reclaimed the
guest stays as large as it is, and goes on trying.

Frames that were given back are the host's for real (the process's resident size falls), and zeros
when they come back.  Where the hypervisor lends RAM (`guests.hostmemory`) it hears of both, tmem
uses what was given back, and as much comes back as there is.  The parts of the budget that are no
frames stay, and `FRAMES_MIN` frames.

Differs from Xen's driver: no xenstore, no hot-plugged memory beyond the size at boot.
"""

from __future__ import annotations

import logging
from typing import Final

from guests.hostmemory import HostMemory
from guests.memory import FRAMES_MIN, Memory

log = logging.getLogger(__name__)

BATCH_PAGES: Final = 64


class Balloon:
    """One guest's."""

    def __init__(self, memory: Memory, host: HostMemory) -> None:
        self._memory = memory
        self._host = host
        self.maximum_pages = memory.budget.total
        self.floor_pages = memory.budget.total - memory.budget.frames + FRAMES_MIN
        self.target_pages = self.maximum_pages
        self.inflated_pages = 0
        """Given to the host so far, in all."""
        self.deflated_pages = 0
        """Taken back from it, in all."""

    @property
    def size_pages(self) -> int:
        """The guest as it is."""
        return self._host.size_pages

    @property
    def is_there(self) -> bool:
        """Whether the target is reached."""
        return self.size_pages == self.target_pages

    def set_target(self, pages: int) -> int:
        """What size to have from now on; a target that can't be is brought to the nearest one that
        can.  Returns that."""
        target = max(self.floor_pages, min(self.maximum_pages, pages))
        if target != pages:
            log.info(
                "balloon event=target-bounded asked=%d target=%d floor=%d maximum=%d",
                pages,
                target,
                self.floor_pages,
                self.maximum_pages,
            )
        self.target_pages = target
        return target

    def step(self, pages: int = BATCH_PAGES) -> int:
        """Come at most so many pages nearer to the target; how many it were."""
        size = self.size_pages
        goal = self.target_pages
        if size > self._host.bound_pages:
            goal = min(goal, max(self.floor_pages, self._host.bound_pages))
        if size < goal:
            granted = self._host.grow(min(size + pages, goal)) - size
            taken = self._memory.take_back(granted) if granted > 0 else 0
            self.deflated_pages += taken
            return taken
        wanted = min(pages, size - goal)
        if not wanted:
            return 0
        try:
            self._memory.reclaim.make_room(wanted, may_kill=False)
        except OSError as reason:
            log.debug("balloon event=stuck size=%d why=%s", self.size_pages, reason.strerror)
        given = self._memory.give_back(wanted)
        self.inflated_pages += given
        self._host.shrink()
        return given
