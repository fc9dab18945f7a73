"""What goes wrong, and how often: drawn once for each call and each event.

The fault model, and what each party must then do

    late request      others are served first: any of them, the administrator, and fate
    late reply        others are served between the call and its guest's reading of the reply
    lost request      the hypervisor died before the call
    lost reply        it died after the call, before the reply was read
    restart           it comes back on the same arena: no persistent page is lost, nothing is stale
    arena lost        it comes back with nothing, and says so (RESUMED is not set)
    guest death       between any two calls and while one is late: its private pages go, what it
                      put into shared pools stays with the other sharers

Not here: death of the hypervisor inside a call (tests of the arena cut it at every store into the
segment), and lies of a guest (fuzzing).
"""

from __future__ import annotations

import random

from ipc.local import Fault

_RATES = (0.0, 0.0, 0.002, 0.01, 0.05)
_LATE_RATES = (0.0, 0.02, 0.1, 0.3)


class Faults:
    """The rates of one run: some runs are quiet, some are hell."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng
        self.late = rng.choice(_LATE_RATES)
        self.lost = rng.choice(_RATES)
        self.death = rng.choice(_RATES)
        self.arena_loss = rng.choice((0.0, 0.0, 0.1, 0.3))
        """Of restarts."""

    def of_call(self) -> Fault:
        """What happens to one call."""
        rng = self._random
        draw = rng.random()
        if draw < self.lost:
            return rng.choice((Fault.LOSE_REQUEST, Fault.LOSE_REPLY))
        if draw < self.lost + self.late:
            return rng.choice((Fault.LATE_REQUEST, Fault.LATE_REPLY))
        return Fault.NONE

    def kills_guest(self) -> bool:
        """Whether a guest dies before its next call."""
        return self._random.random() < self.death

    def kills_hypervisor(self) -> bool:
        """Whether the hypervisor dies now, between two calls."""
        return self._random.random() < self.lost

    def takes_arena(self) -> bool:
        """Whether its memory dies with it."""
        return self._random.random() < self.arena_loss

    def __str__(self) -> str:
        return f"late={self.late} lost={self.lost} death={self.death} arena-loss={self.arena_loss}"
