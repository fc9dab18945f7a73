"""The balancer of mode `balloon`: memory moves between guests by balloon targets alone.

This is what tmem is compared with.  It sits on the host's side, asks each guest for its own figures
once a second, and says how large each should be:

    needed   what programs have asked for (Committed_AS), and what is no program's and no file's
    wished   what it has, without what is free beyond a little slack; a guest whose programs wait
             for memory wishes more, the more the longer they wait

All get what they need first, then what they wish, then what is left over in equal parts.  If there
is not enough for one of these, everybody gets the same share of what it lacks.

The sum of all sizes never passes the total.  A guest takes time to shrink, so whoever grows gets
only what is free at that moment and must wait for the rest: that is the reaction time of every
balancer, and no fault of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

PERIOD_SECONDS: Final = 1.0
SLACK_SHARE: Final = 16
"""Of a guest's size: so much may be free without being taken from it."""
STALL_LEAST: Final = 0.01
"""Programs that wait for a smaller part of the time have all they want."""


@dataclass(frozen=True)
class Bounds:
    """What sizes a guest can have, in pages."""

    floor: int
    maximum: int

    def bound(self, pages: int) -> int:
        """The nearest size that it can have."""
        return max(self.floor, min(self.maximum, pages))


@dataclass(frozen=True)
class Figures(Bounds):
    """What a guest says of itself; pages, `stalled` is a share of the time since last asked."""

    size: int
    told: int
    """Its last target: it may have that size at any moment."""
    committed: int
    reserved: int
    free: int
    stalled: float

    @property
    def held(self) -> int:
        """What nobody else can have now."""
        return max(self.size, self.told)

    @property
    def slack(self) -> int:
        """Free pages that it may keep."""
        return self.size // SLACK_SHARE

    @property
    def needed(self) -> int:
        """Without less than this it must swap."""
        return self.bound(self.committed + self.reserved + self.slack)

    @property
    def wished(self) -> int:
        """With what its files are worth to it."""
        if self.stalled > STALL_LEAST:
            more = self.slack + round(min(1.0, self.stalled) * self.size)
        else:
            more = min(0, self.slack - self.free)
        return max(self.needed, self.bound(self.size + more))


def fair_sizes(guests: Mapping[str, Figures], total_pages: int) -> dict[str, int]:
    """What each guest should have in the end."""
    needed = {name: guest.needed for name, guest in guests.items()}
    wished = {name: guest.wished for name, guest in guests.items()}
    return divide(guests, [needed, wished], total_pages)


def divide(
    guests: Mapping[str, Bounds], wishes: Sequence[Mapping[str, int]], total_pages: int
) -> dict[str, int]:
    """What each has if all have what they wish first, as far as there is enough, then what they
    wish next, and so on; what is left is divided evenly."""
    sizes = {name: guest.floor for name, guest in guests.items()}
    for wanted in wishes:
        _share(sizes, wanted, total_pages - sum(sizes.values()))
    left = total_pages - sum(sizes.values())
    # Those with the least room first: what they can't take is for the others.
    waiting = sorted(guests, key=lambda one: guests[one].maximum - sizes[one])
    for number, name in enumerate(waiting):
        part = min(guests[name].maximum - sizes[name], left // (len(waiting) - number))
        sizes[name] += part
        left -= part
    return sizes


def _share(sizes: dict[str, int], wanted: Mapping[str, int], pages: int) -> None:
    """Bring each size nearer to what is wanted, by the same share of what is missing."""
    missing = {name: max(0, wanted[name] - size) for name, size in sizes.items()}
    whole = sum(missing.values())
    for name in sizes:
        if whole:
            sizes[name] += missing[name] * max(0, min(pages, whole)) // whole


def targets(guests: Mapping[str, Figures], total_pages: int) -> dict[str, int]:
    """What each guest is told now: nobody grows by what another still holds."""
    fair = fair_sizes(guests, total_pages)
    told = {name: min(guest.size, fair[name]) for name, guest in guests.items()}
    free = total_pages - sum(guest.held for guest in guests.values())
    _share(told, fair, free)
    return told
