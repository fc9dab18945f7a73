"""Choosing one size for each of several, so that together they fit and are worth most.

A *step* is a size and what it is worth; a list of steps ascends in both and begins at size 0.  The
worth of a size is that of the largest step within it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import itemgetter

Step = tuple[int, float]


class Knapsack:
    """The exact answer by dynamic programming, for every capacity up to the one given.

    Row n holds, by capacity, the most that the first n can be worth.  The choice is not stored but
    found again in the rows, which is exact because the same sums are formed.
    """

    def __init__(self, choices: Sequence[Sequence[Step]], capacity: int) -> None:
        self._choices = choices
        self._rows = [[0.0] * (capacity + 1)]
        for steps in choices:
            self._rows.append(_with(self._rows[-1], steps))

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


def _with(row: list[float], steps: Sequence[Step]) -> list[float]:
    """The row with one more to choose for."""
    best = [0.0] * len(row)
    for size, worth in steps:
        if size >= len(row):
            break
        moved = [before + worth for before in row[: len(row) - size]]
        best[size:] = map(max, best[size:], moved)
    return best


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


def ascents(choices: Sequence[Sequence[Step]], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """The parts of all hulls above the sizes held, steepest first: whose, from size, to size."""
    found: list[tuple[float, int, int, int]] = []
    for number, (steps, size) in enumerate(zip(choices, sizes, strict=True)):
        above = [(size, worth_of(steps, size)), *(step for step in steps if step[0] > size)]
        corners = hull(above)
        for (size0, worth0), (size1, worth1) in pairwise(corners):
            if worth1 > worth0:
                found.append(((worth1 - worth0) / (size1 - size0), number, size0, size1))
    # A stable sort: the parts of one hull stay in order.
    found.sort(key=itemgetter(0), reverse=True)
    return [part[1:] for part in found]
