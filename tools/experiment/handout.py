"""The host of mode `cmm2`: when memory is short, what is dropped of which guest.

All memory is free for whoever comes first: a guest that needs frames is lent some in a call, for as
long as there are any (`guests.monitor`), and never more than there are.  When few are left, it is
decided here who has to do with less.

What the host knows of a guest is what page states tell (`guests.pagestates`), and what a real one
sees as page faults:

    stable   what the guest has, without what is unused and volatile
    demand   by how many pages that has grown since the last look, and how many the guest had to
             evict meanwhile because it was allowed no more
    needed   stable, the same demand once more, and a little
    wished   its volatile pages besides

Each is to have what it needs, up to an even share, then what it needs beyond that, then what it
wishes.  What is left then is for those with a demand, or in equal parts for all when nobody has
any.  Whoever has more than that is told so, and drops unused and volatile pages before its next
step of work, without a write.  When that is not enough, all that it has beyond its part is stable,
and it has to evict by itself (`guests.monitor`).  Until then those who want more swap, if they have
nothing else to evict.

Reaction time: as long as there is free memory, that of a call, less than a millisecond.  What other
guests have, a host of z/VM takes within the page fault that needs it.  Ours looks every
`PERIOD_SECONDS`, and then waits for the steps of work that are being done: 0.1 to 0.3 s.  What is
swapped until then, a real host would have spared the guest, and so it keeps a reserve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tools.experiment.balancer import Bounds, divide

PERIOD_SECONDS: Final = 0.1
RESERVE_SHARE: Final = 32
"""Of all memory: when less is free than this, guests are told to drop pages."""
SLACK_SHARE: Final = 32
"""Of a guest's size: so much more it keeps than it needs, for what it takes until the next look."""


@dataclass(frozen=True)
class Figures(Bounds):
    """What is known of a guest, in pages."""

    size: int
    lent: int
    """It may take so much at any moment."""
    unused: int
    volatile: int
    demand: int

    @property
    def held(self) -> int:
        """What nobody else can have now."""
        return max(self.size, self.lent)

    @property
    def needed(self) -> int:
        """Without less than this it must swap."""
        stable = self.size - self.unused - self.volatile
        return self.bound(stable + self.demand + self.size // SLACK_SHARE)

    @property
    def wished(self) -> int:
        """So that none of its pages has to be read again."""
        return self.bound(self.needed + self.volatile)


def targets(guests: Mapping[str, Figures], total_pages: int, free_pages: int) -> dict[str, int]:
    """What each guest may have at most from now on, with so many pages that none has."""
    most = {name: guest.maximum for name, guest in guests.items()}
    reserve = total_pages // RESERVE_SHARE
    if free_pages >= reserve:
        return most
    even = total_pages // len(guests)
    wishes = [
        {name: min(guest.needed, guest.bound(even)) for name, guest in guests.items()},
        {name: guest.needed for name, guest in guests.items()},
        {name: guest.wished for name, guest in guests.items()},
        {name: guest.maximum if guest.demand else 0 for name, guest in guests.items()},
    ]
    fair = divide(guests, wishes, total_pages - reserve)
    return {
        name: fair[name] if fair[name] < guest.held else most[name]
        for name, guest in guests.items()
    }


def wanted_pages(counters: Mapping[str, Any]) -> int:
    """Stable pages and all that the guest ever evicted of its own accord; how much that grows is
    the demand."""
    anonymous, states = counters["anonymous"], counters["page_states"]
    reclaimed = anonymous["direct_reclaim_pages"] + anonymous["background_reclaim_pages"]
    return int(states["stable_pages"] + reclaimed - counters["balloon"]["inflated_pages"])


def figures(counters: Mapping[str, Any], demand: int) -> Figures:
    """Of a guest with these counters."""
    balloon, states = counters["balloon"], counters["page_states"]
    return Figures(
        size=balloon["size_pages"],
        floor=balloon["floor_pages"],
        maximum=balloon["maximum_pages"],
        lent=balloon["lent_pages"],
        unused=states["unused_pages"],
        volatile=states["volatile_pages"],
        demand=max(0, demand),
    )
