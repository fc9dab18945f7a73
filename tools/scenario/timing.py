"""Whether two classes can be told apart by how long something took.

A classifier that is as simple as an attacker's: a threshold, learnt on the trials so far and tried
on the next ones.  How often it is right there is compared with a coin.

How many trials that takes depends on how busy the machine is, so it is a sequential test (Wald's,
of a coin against one that is right in 50 % and `MARGIN`): after each batch the odds of one over the
other are looked at, and when they are a thousand to one it ends.  Looking often costs nothing: who
guesses is taken for one who knows in one of a thousand runs, however many looks there were, and the
other way round; no distribution of times is assumed, for labels are drawn by a coin.  If neither
comes within the trials that are given, it is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

MARGIN: Final = 0.05
"""Who is right in less than 50 % and half of this of all cases is told nothing worth having."""
ODDS: Final = 1000.0

Batch = tuple[Sequence[bool], Sequence[float]]
"""Labels and values of some trials."""

_KEPT: Final = 4
"""Batches that a rule is learnt from: what else the machine does changes."""
_RIGHT: Final = math.log((0.5 + MARGIN) / 0.5)
_WRONG: Final = math.log((0.5 - MARGIN) / 0.5)


class Distinguished(NamedTuple):
    """`right` of `trials`."""

    right: int = 0
    trials: int = 0

    @property
    def accuracy(self) -> float:
        """The share that was right."""
        return self.right / self.trials if self.trials else 0.5

    @property
    def error(self) -> float:
        """How far it may be from the truth (two standard errors)."""
        if not self.trials:
            return 0.5
        return 2 * math.sqrt(self.accuracy * (1 - self.accuracy) / self.trials)

    @property
    def evidence(self) -> float:
        """The logarithm of the odds that it is more than guessing."""
        return self.right * _RIGHT + (self.trials - self.right) * _WRONG

    @property
    def leaks(self) -> bool:
        """The values tell the classes apart."""
        return self.evidence >= math.log(ODDS)

    @property
    def tells_nothing(self) -> bool:
        """They don't, but for the margin."""
        return self.evidence <= -math.log(ODDS)

    def __str__(self) -> str:
        """For a person."""
        return f"{self.accuracy:.1%} ± {self.error:.1%} right of {self.trials:,} (a coin: 50%)"


def distinguish(batches: Iterable[Batch]) -> Distinguished:
    """How well a threshold tells the label of a value; no more batches are taken than it needs."""
    found = Distinguished()
    known: list[Batch] = []
    for labels, values in batches:
        if known:
            threshold, above = _learn(known)
            right = sum(
                ((value > threshold) == above) == label
                for label, value in zip(labels, values, strict=True)
            )
            found = Distinguished(found.right + right, found.trials + len(labels))
            if found.leaks or found.tells_nothing:
                break
        known = [*known[1 - _KEPT :], (labels, values)]
    return found


def _learn(batches: Sequence[Batch]) -> tuple[float, bool]:
    """The threshold that is right most often, and whether the label is true above it."""
    labels = [label for some, _ in batches for label in some]
    values = [value for _, some in batches for value in some]
    pairs = sorted(zip(values, labels, strict=True))
    positives = sum(labels)
    best, best_right, best_above = 0.0, -1, True
    below_true = below_false = 0
    for value, label in pairs:
        below_true += label
        below_false += not label
        above_right = below_false + positives - below_true
        for right, above in ((above_right, True), (len(pairs) - above_right, False)):
            if right > best_right:
                best, best_right, best_above = value, right, above
    return best, best_above
