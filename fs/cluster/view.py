"""A view: who is a member of the cluster, under which epoch; and the ballot it was agreed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple


class Ballot(NamedTuple):
    """One attempt to agree on the view of `epoch`. Ballots are ordered, the node breaks ties."""

    epoch: int
    round: int
    node: int


MAX_EPOCH: Final = (1 << 31) - 1
"""The lock manager's tokens have room for no more (`fs.dlm.recovery`); one a second lasts 68 years,
so a higher one is a lie."""
NO_BALLOT: Final = Ballot(0, 0, 0)
"""Below every real ballot: epochs begin at 1."""


@dataclass(frozen=True)
class View:
    """An agreed view: the members with their generations, and who went how since the last one."""

    epoch: int
    generations: tuple[tuple[int, int], ...]
    dead: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()
    members: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", frozenset(node for node, _ in self.generations))

    def generation(self, node: int) -> int | None:
        """The incarnation of `node` that is a member."""
        return dict(self.generations).get(node)


def make_view(
    epoch: int,
    members: Mapping[int, int],
    dead: frozenset[int] = frozenset(),
    left: frozenset[int] = frozenset(),
) -> View:
    """A view with its members in ascending order."""
    return View(epoch, tuple(sorted(members.items())), dead, left)
