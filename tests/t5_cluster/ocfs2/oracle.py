"""What may be on the disk: which operations are there for certain, and which together.

A volume holds, of each node, its first so many operations: a `Vector` has the numbers. It is
allowed when

  - all is there that was promised: by an fsync or sync that had returned, or by a lock that went to
    another node, which takes what its holder did under it home to the disk;
  - no operation is there without those of other nodes that it was built upon;
  - nothing is there that had not begun.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from tests.t5_cluster.ocfs2.model import Effect, File, Model
from tests.t5_cluster.ocfs2.operations import PROMISES, Operation
from tests.t5_cluster.ocfs2.world import SLOTS, Died

Vector = tuple[int, ...]
"""For each node, how many of its operations count."""
NOTHING: Vector = (0,) * SLOTS
VECTORS_MAX = 100_000


class Oracle:
    """Of a workload. `lost` are operations of a node that died, which are gone but for what they
    wrote in place, if they had begun."""

    def __init__(
        self,
        base: Model,
        operations: Sequence[Operation],
        lost: Mapping[int, Effect] = MappingProxyType({}),
    ) -> None:
        self._base = base
        self._lost = lost
        self.operations = operations
        self.effects: list[Effect] = []
        """As if all others had been done."""
        self.counts: list[Vector] = []
        """How many operations of each node there were, with this one."""
        self.needs: list[Vector] = []
        self.promises: list[Vector] = []
        """What is certain once an operation is done."""
        self._of_node: list[list[int]] = [[] for _ in range(SLOTS)]
        self._models: dict[Vector, Model] = {}
        self._work_out()

    def _work_out(self) -> None:
        model = self._base.copy()
        changed: list[dict[int, int]] = [{} for _ in range(SLOTS)]
        """For each node and thing, the last operation that changed it."""
        for number, operation in enumerate(self.operations):
            if number in self._lost:
                self._leave_out(number, model)
                continue
            node = operation.node
            effect = model.apply(number + 1, operation)
            self._of_node[node].append(number)
            self.counts.append(tuple(len(numbers) for numbers in self._of_node))
            seen = NOTHING
            for other in range(SLOTS):
                if other != node:
                    for thing in effect.touched & changed[other].keys():
                        seen = _most(seen, self.needs[changed[other][thing]])
            own = self._of_node[node]
            before = self.needs[own[-2]] if len(own) > 1 else NOTHING
            need = _most(_most(before, seen), _only(node, len(own)))
            for thing in effect.changed:
                changed[node][thing] = number
            self.effects.append(effect)
            self.needs.append(need)
            self.promises.append(need if operation.kind in PROMISES else seen)

    def _leave_out(self, number: int, model: Model) -> None:
        model.maybe(self._lost[number])
        self.effects.append(self._lost[number])
        self.counts.append(self.counts[-1])
        self.needs.append(NOTHING)
        self.promises.append(NOTHING)

    def promised(self, done: Sequence[int]) -> Vector:
        """What is certain when these operations are done."""
        certain = NOTHING
        for number in done:
            certain = _most(certain, self.promises[number])
        return certain

    def vectors(self, least: Vector, most: Vector) -> Iterator[Vector]:
        """All that are allowed between both, without those that differ by mere looking."""
        choices = [
            [
                least[node],
                *(
                    count
                    for count in range(least[node] + 1, most[node] + 1)
                    if self.effects[self._of_node[node][count - 1]].changed
                ),
            ]
            for node in range(SLOTS)
        ]
        for number, vector in enumerate(itertools.product(*choices)):
            assert number < VECTORS_MAX, "too much is uncertain at a time"
            if all(self._is_closed(node, vector) for node in range(SLOTS)):
                yield vector

    def _is_closed(self, node: int, vector: Vector) -> bool:
        if not vector[node]:
            return True
        need = self.needs[self._of_node[node][vector[node] - 1]]
        return all(have >= needed for have, needed in zip(vector, need, strict=True))

    def model(self, vector: Vector) -> Model:
        """The volume with these operations, and with marks of the others."""
        if vector not in self._models:
            model = self._base.copy()
            for number, operation in enumerate(self.operations):
                lost = number in self._lost
                if lost or self.counts[number][operation.node] > vector[operation.node]:
                    model.maybe(self.effects[number])
                else:
                    model.apply(number + 1, operation)
            self._models[vector] = model
        return self._models[vector]


def agree(expected: object, outcome: object) -> bool:
    """Whether an operation may have come out like that."""
    if outcome is Died:
        return True
    if isinstance(expected, File):
        return isinstance(outcome, bytes) and expected.allows(outcome)
    return expected == outcome


def _most(one: Vector, other: Vector) -> Vector:
    return tuple(map(max, one, other))


def _only(node: int, count: int) -> Vector:
    return tuple(count if number == node else 0 for number in range(SLOTS))
