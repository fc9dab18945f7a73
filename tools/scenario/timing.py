"""Whether two classes can be told apart by how long something took.

A classifier that is as simple as an attacker's: a threshold, learnt on one batch of trials and
tried on the next.  Its accuracy there is compared with guessing.  How many trials that takes
depends on how busy the machine is, so batches go on until it is certain that the classes can be
told apart, or that whoever tries is right in hardly more than half of all cases; if neither becomes
certain, it is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

SIGMAS: Final = 3.5
"""Standard errors of guessing that are no accident: one look in 4,300 would be, and there are at
most a dozen."""
MARGIN: Final = 0.05
"""Who is certainly right in less than 50 % and this of all cases is told nothing worth having."""

Batch = tuple[Sequence[bool], Sequence[float]]
"""Labels and values of some trials."""


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
        """How far guessing strays from 50 %."""
        return SIGMAS * math.sqrt(0.25 / self.trials) if self.trials else 1.0

    @property
    def leaks(self) -> bool:
        """Certainly the values tell the classes apart."""
        return self.accuracy - self.error > 0.5

    @property
    def tells_nothing(self) -> bool:
        """Certainly they don't, but for the margin."""
        return self.accuracy + self.error < 0.5 + MARGIN

    def __str__(self) -> str:
        """For a person."""
        return f"{self.accuracy:.1%} right of {self.trials:,} (guessing: 50.0% ± {self.error:.1%})"


def distinguish(batches: Iterable[Batch]) -> Distinguished:
    """How well a threshold tells the label of a value; no more batches are taken than it needs."""
    found = Distinguished()
    rule: tuple[float, bool] | None = None
    for labels, values in batches:
        if rule is not None:
            threshold, above = rule
            right = sum(
                ((value > threshold) == above) == label
                for label, value in zip(labels, values, strict=True)
            )
            found = Distinguished(found.right + right, found.trials + len(labels))
            if found.leaks or found.tells_nothing:
                break
        # From the newest: what else the machine does changes.
        rule = _learn(labels, values)
    return found


def _learn(labels: Sequence[bool], values: Sequence[float]) -> tuple[float, bool]:
    """The threshold that is right most often, and whether the label is true above it."""
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
