"""Eviction policies, one file each, behind `EvictionPolicy`; one instance orders the pages that
one guest has in one pool.

    fifo    Xen's order, and what the others are measured against
    clock   FIFO with a second chance for pages that were used
    s3fifo  a probation queue that a stream of pages seen once does not leave, and ghosts
    hinted  the same, that also listens to the hints of a put

Arguments are positional: they are passed on the hot path.
"""

from __future__ import annotations

from typing import Final, Protocol

from hypervisor.eviction.clock import Clock
from hypervisor.eviction.fifo import Fifo
from hypervisor.eviction.hinted import Hinted
from hypervisor.eviction.links import Links
from hypervisor.eviction.s3fifo import S3Fifo
from hypervisor.frames import Run
from ipc.errors import OperatorError

__all__ = ["POLICIES", "EvictionPolicy", "Links", "make_policy"]


class EvictionPolicy(Protocol):
    """Told of every ephemeral page that comes, is used and goes; names the next victims.

    Runs are neighbours in number, at most RUN_MAX.  A leaf's key is a hash of what the leaf holds
    (object and place in it): policies remember pages that are gone by leaf and place.
    """

    wants_keys: bool
    """False: the keys are not looked at and may all be 0."""

    capacity_pages: int
    """About how many pages this policy may hold, as far as that is known; it may change at any
    time and is not enforced here."""

    pages: int
    """How many pages are listed."""

    def inserted(self, first: int, count: int, key: int, place: int, hints: int, /) -> None:
        """New pages: `place` and those behind it of the leaf `key`, put with these hints."""
        ...

    def used(self, first: int, count: int, /) -> None:
        """A get that left the pages where they are."""
        ...

    def taken(self, first: int, count: int, key: int, place: int, /) -> None:
        """A get that was exclusive: the pages were used, and are gone."""
        ...

    def evicted(self, first: int, count: int, key: int, place: int, /) -> None:
        """Victims go, pages of one leaf."""
        ...

    def removed(self, first: int, count: int, /) -> None:
        """The pages are gone otherwise: flushed, replaced, or destroyed with their pool."""
        ...

    def victims(self, count: int, /) -> list[Run]:
        """Up to `count` pages that should go next, the first to go first; none only if there is
        no page.  They stay listed until the policy is told that they are gone."""
        ...

    def front(self) -> int:
        """The number of a page that would go soon, -1 if there is no page."""
        ...

    def check(self, numbers: set[int], /) -> None:
        """Raises InvariantError unless exactly these pages are listed."""
        ...

    def close(self) -> None:
        """Give the lists back.  Precondition: there is no page."""
        ...


POLICIES: Final = ("fifo", "clock", "s3fifo", "hinted")


def make_policy(name: str, links: Links, *, admission: bool = True) -> EvictionPolicy:
    """A policy of this name; raises OperatorError for one that we don't have.

    Without `admission` every page is let into the main queue, where there is one.
    """
    match name:
        case "fifo":
            return Fifo(links)
        case "clock":
            return Clock(links)
        case "s3fifo":
            return S3Fifo(links, admission=admission)
        case "hinted":
            return Hinted(links, admission=admission)
        case _:
            choice = ", ".join(POLICIES)
            raise OperatorError(f"no eviction policy {name!r}; choose one of {choice}")
