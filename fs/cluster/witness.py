"""What membership is told of the disk, and whom it tells what was agreed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fs.cluster.view import View


class Witness(Protocol):
    """What membership needs to know of the disk, and may do to it."""

    def live(self) -> dict[int, int]:
        """Nodes that beat, with generations; this node too once it is steady."""
        ...

    def claims(self) -> Mapping[int, frozenset[int]]:
        """What each live node is a member of, as its sector says."""
        ...

    def unclean(self) -> dict[int, int]:
        """Nodes that don't beat and did not leave."""
        ...

    def silent(self) -> bool:
        """Whether all of `unclean` have been silent for so long that their leases are over."""
        ...

    def highest_epoch(self) -> int:
        """The highest epoch on the disk."""
        ...

    def preempt(self, node: int, generation: int) -> bool:
        """Take a reservation; True when no write of that incarnation can come any more."""
        ...

    def publish(self, epoch: int, members: frozenset[int]) -> bool:
        """Write what this node is a member of into its sector."""
        ...

    def fenced(self) -> bool:
        """Whether this node is fenced."""
        ...


class Outcome(Protocol):
    """What membership tells its node."""

    def installed(self, view: View, dead: frozenset[int]) -> None:
        """A view was agreed; `dead` are members of the last one that did not leave."""
        ...

    def excluded(self, reason: str) -> None:
        """The others went on without this node."""
        ...

    def gone(self) -> None:
        """This node has left."""
        ...

    def refused(self, reason: str) -> None:
        """This node may not join."""
        ...


def admit_all(node: int) -> bool:  # noqa: ARG001
    """Any node that asks may join."""
    return True
