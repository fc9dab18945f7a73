"""What the host may do with each frame of a guest's RAM: the page states of CMM2.

CMM2 (collaborative memory management; Linux on z/VM) overcommits the RAM of guests.  A guest tells
of each frame what its content is worth, and a host that is short takes what is worth nothing:

    unused      nobody's: the host may have the frame, and the content with it
    volatile    a clean page of a file: the host may drop it unasked, the guest reads it again
    stable      everything else: its content must stay
    discarded   it was volatile and the host has dropped it; its owner does not know that yet

             taken            read, or written back
    unused -------> stable --------------------------> volatile
       ^ ^            | ^                                |  |
       | +--- given --+ +-------- to be dirty -----------+  | the host drops it
       |                                                    v
       +------------- looked for: a discard fault ----- discarded

Invariants
  S1  A frame is unused if and only if nobody owns it.
  S2  A volatile or discarded frame belongs to a clean page of the page cache: what the disk holds,
      or a hole.  It is stable before the first byte of it changes.
  S3  Whoever looks for a page finds it in a frame that is not discarded, or not at all: the page
      cache removes a discarded page when it meets it (the discard fault) and reads it again.
  S4  Nothing is written, offered to tmem or counted as made free on account of a discarded frame.

Pages of programs are always stable.  No page is pinned but for the length of a step, during which
the host asks for nothing.

Differs from z/VM: there the hardware keeps the states (ESSA), the host takes pages at any instant,
even between two instructions of the guest, and a guest that makes a page stable is told if it came
too late.  Here the guest's own `guests.monitor` does what the host asks for, between two steps of
work, so to make a page stable never fails.  Clean pages of the swap cache are volatile there, too.
"""

from __future__ import annotations

from typing import Final

STABLE: Final = 0
UNUSED: Final = 1
VOLATILE: Final = 2
DISCARDED: Final = 3


class PageStates:
    """A byte a frame, and what came of it; there are none in a guest without page states."""

    __slots__ = ("discard_faults", "of")

    def __init__(self, frames: int) -> None:
        self.of = bytearray([UNUSED]) * frames
        self.discard_faults = 0
        """Discarded pages that somebody looked for."""

    def count(self, state: int) -> int:
        """Frames in a state."""
        return self.of.count(state)
