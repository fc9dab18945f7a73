"""Whether two classes can be told apart by how long something took.

A classifier that is as simple as an attacker's: a threshold, learnt on the first half of the trials
and tried on the second.  Its accuracy there is compared with guessing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

SIGMAS: Final = 3.0
"""An accuracy further from 50 % than so many standard errors of guessing is no accident: one run in
370 would be."""


class Distinguished(NamedTuple):
    """`accuracy` over `trials`, and the `error` that guessing has (`SIGMAS` standard errors)."""

    accuracy: float
    trials: int
    error: float

    @property
    def leaks(self) -> bool:
        """Whether the times tell the classes apart."""
        return self.accuracy > 0.5 + self.error

    def __str__(self) -> str:
        """For a person."""
        return f"{self.accuracy:.1%} right of {self.trials:,} (guessing: 50.0% ± {self.error:.1%})"


def distinguish(labels: Sequence[bool], values: Sequence[float]) -> Distinguished:
    """How well a threshold tells the label of a value."""
    half = len(labels) // 2
    threshold, above = _learn(labels[:half], values[:half])
    right = sum(
        ((value > threshold) == above) == label
        for label, value in zip(labels[half:], values[half:], strict=True)
    )
    trials = len(labels) - half
    error = SIGMAS * math.sqrt(0.25 / trials) if trials else 1.0
    return Distinguished(right / trials if trials else 0.5, trials, error)


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
