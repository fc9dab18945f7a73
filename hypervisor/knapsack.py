"""Choosing one size for each of several, so that together they fit and are worth most.

A *step* is a size and what it is worth; a list of steps ascends in both and begins at size 0.  The
worth of a size is that of the largest step within it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Final

_STEPS_A_PIECE: Final = 8

Step = tuple[int, float]


class Knapsack:
    """The exact answer by dynamic programming, for every capacity up to the one given.

    Row n holds, by capacity, the most that the first n can be worth.  The choice is not stored but
    found again in the rows, which is exact because the same sums are formed.
    """

    def __init__(self, capacity: int) -> None:
        self._choices: list[Sequence[Step]] = []
        self._rows = [[0.0] * (capacity + 1)]

    def add(self, steps: Sequence[Step]) -> Iterator[None]:
        """One more to choose for; in pieces."""
        row = self._rows[-1]
        best = [0.0] * len(row)
        for number, (size, worth) in enumerate(steps):
            if size >= len(row):
                break
            moved = [before + worth for before in row[: len(row) - size]]
            best[size:] = map(max, best[size:], moved)
            if number % _STEPS_A_PIECE == _STEPS_A_PIECE - 1:
                yield
        self._choices.append(steps)
        self._rows.append(best)
        yield

    @property
    def worth(self) -> list[float]:
        """The most that all together can be worth, by capacity."""
        return self._rows[-1]

    def choose(self, capacity: int) -> list[int]:
        """For each the number of its step."""
        chosen: list[int] = []
        for number in range(len(self._choices) - 1, -1, -1):
            before, wanted = self._rows[number], self._rows[number + 1][capacity]
            at = next(
                at
                for at, (size, worth) in enumerate(self._choices[number])
                if size <= capacity and before[capacity - size] + worth == wanted
            )
            chosen.append(at)
            capacity -= self._choices[number][at][0]
        chosen.reverse()
        return chosen


def worth_of(steps: Sequence[Step], size: int) -> float:
    """What a size is worth."""
    return max((worth for needed, worth in steps if needed <= size), default=0.0)


def coarse(steps: Sequence[Step], least: float) -> list[Step]:
    """Fewer steps: each is worth at least that much more than the one before, but for the last."""
    kept = [steps[0]]
    for step in steps[1:]:
        if step[1] - kept[-1][1] >= least:
            kept.append(step)
    if kept[-1] != steps[-1]:
        kept.append(steps[-1])
    return kept


def hull(steps: Iterable[Step]) -> list[Step]:
    """The corners of the least concave line over the steps."""
    corners: list[Step] = []
    for size, worth in steps:
        while len(corners) >= 2:
            (size0, worth0), (size1, worth1) = corners[-2:]
            if (worth1 - worth0) * (size - size0) > (worth - worth0) * (size1 - size0):
                break
            corners.pop()
        corners.append((size, worth))
    return corners


Ascent = tuple[float, int, int, int]
"""A part of a hull: how steep, whose, from size, to size."""


def ascents(number: int, steps: Sequence[Step], size: int) -> list[Ascent]:
    """The parts of one hull above the size held."""
    above = [(size, worth_of(steps, size)), *(step for step in steps if step[0] > size)]
    return [
        ((worth1 - worth0) / (size1 - size0), number, size0, size1)
        for (size0, worth0), (size1, worth1) in pairwise(hull(above))
        if worth1 > worth0
    ]


def steepest_first(parts: list[Ascent]) -> list[tuple[int, int, int]]:
    """Whose, from size, to size.  Precondition: the parts of each hull are in order."""
    # A stable sort: they stay in order.
    return [part[1:] for part in sorted(parts, key=itemgetter(0), reverse=True)]
