"""Eviction policies, one file each, behind `EvictionPolicy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from hypervisor.eviction.clock import Clock
from hypervisor.eviction.fifo import Fifo
from hypervisor.frames import Frames, Run
from ipc.errors import OperatorError


class EvictionPolicy(Protocol):
    """Told of every ephemeral page that comes and goes, if `listens`; names the next victims."""

    listens: bool
    """False: `Frames.kinds` is all it needs, and `inserted` and `removed` need not be called."""

    def inserted(self, first: int, count: int) -> None:
        """`count` neighbouring frames now hold new ephemeral pages."""
        ...

    def removed(self, first: int, count: int) -> None:
        """They are about to be freed, by a get, a flush or an eviction."""
        ...

    def victims(self, count: int) -> list[Run]:
        """Up to `count` frames with ephemeral pages, in runs of at most RUN_MAX; none only if there
        is no such page."""
        ...

    def check(self) -> None:
        """Raises InvariantError if what the policy knows is not what `Frames` knows."""
        ...


POLICIES: Final[dict[str, Callable[[Frames], EvictionPolicy]]] = {"clock": Clock, "fifo": Fifo}


def make_policy(name: str, frames: Frames) -> EvictionPolicy:
    """The policy of this name; raises OperatorError for one that we don't have."""
    if name not in POLICIES:
        raise OperatorError(f"no eviction policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](frames)
