"""CLOCK: a hand goes round the frames; a HOT page becomes COLD, a COLD page is the victim.

A page comes in HOT, so it lives at least until the hand has passed it once.  A private ephemeral
get removes its page, so there HOT means "new" and the order is that of a second-chance FIFO; it is
the pages of shared pools that are used and stay.

Victims come in frame order and so mostly in runs of neighbours, which the next extent put can fill
with one copy.
"""

from __future__ import annotations

from typing import Final

from hypervisor.frames import COLD, FREE, HOT, PERSISTENT, RUN_MAX, Frames, Run

_STRIDE: Final = 4096
"""Frames looked at in one step; a step that finds no victim only cools."""
_COOL: Final = bytes(COLD if kind == HOT else kind for kind in range(256))
_COLD_BYTE: Final = bytes([COLD])

assert COLD not in (HOT, PERSISTENT, FREE)


class Clock:
    """A hand over `Frames.kinds`."""

    listens = False

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._hand = 0

    def inserted(self, first: int, count: int) -> None:
        """Nothing to do: frames are HOT when they are filled."""

    def removed(self, first: int, count: int) -> None:
        """Nothing to do: a freed frame is no longer COLD or HOT."""

    def victims(self, count: int) -> list[Run]:
        kinds = self._frames.kinds
        total = len(kinds)
        hand = self._hand
        runs: list[Run] = []
        # Twice round: the first round may have to cool every page, the second finds them.
        budget = 2 * total
        while count and budget > 0:
            end = min(hand + _STRIDE, total, hand + budget)
            victim = kinds.find(COLD, hand, end)
            stop = end if victim < 0 else victim
            if stop > hand:
                kinds[hand:stop] = kinds[hand:stop].translate(_COOL)
                budget -= stop - hand
                hand = stop
            if victim >= 0:
                if not runs:
                    # Victims stay COLD until the caller frees them: never come round to the first.
                    budget = min(budget, total)
                window = kinds[victim : min(victim + min(count, RUN_MAX), end)]
                length = len(window) - len(window.lstrip(_COLD_BYTE))
                runs.append((victim, length))
                count -= length
                budget -= length
                hand += length
            if hand >= total:
                hand = 0
        self._hand = hand
        return runs

    def check(self) -> None:
        """Nothing to compare: CLOCK keeps nothing but the kinds and its hand."""
