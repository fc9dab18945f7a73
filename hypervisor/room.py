"""Making room: whose page goes when the arena is full.

First the guest, then its pool, then the page.

  guest   among those that hold more than their reservation: of those over their target the one of
          the lowest priority, then the one furthest over; if nobody is over, likewise
  pool    of that guest, likewise
  page    named by the pool member's own eviction policy

A pool's priority ranks it among the pools of its guest only: a guest that called all its pools
important would else live on its neighbours.

Targets come from outside (`Entitlements`), `greedy` has none: then the oldest page of all goes,
whosesoever it is, which is what Xen's global list did and what lets one streaming guest push out
everybody.  A guest is never taken below its reservation for another one; when nobody else has
anything, the put is refused.

Pages of persistent pools are in no policy and never chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hypervisor.pools import Client, Member
from ipc.abi import PAGE_BYTES, Priority

GREEDY: Final = "greedy"
_OLDEST_AMONG: Final = 256
EVICTION_BATCH_PAGES: Final = 32
"""Pages evicted before the choice of a victim is looked at again; fewer when less is needed."""

RANKS: Final = {Priority.LOW: 0, Priority.NORMAL: 1, Priority.HIGH: 2}


class Victims:
    """Chooses; `members` are all parts that guests have in ephemeral pools.

    A choice looks at each guest once and then at the members of one, because a guest may have 64
    pools: with thousands of members, a look at each of them would take longer than the eviction.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.members: dict[int, Member] = {}
        """By id(), because a member is as good as the next one."""
        self._clients: dict[int, tuple[Client, dict[int, Member]]] = {}
        """By id() of the guest that pays."""
        self._hand = 0

    def add(self, member: Member) -> None:
        self.members[id(member)] = member
        client = member.client
        self._clients.setdefault(id(client), (client, {}))[1][id(member)] = member

    def remove(self, member: Member) -> None:
        del self.members[id(member)]
        members = self._clients[id(member.client)][1]
        del members[id(member)]
        if not members:
            del self._clients[id(member.client)]

    def choose(self, asking: Client | None, state_of: Callable[[int], int]) -> Member | None:
        """The member whose pages go next, None if nothing may be evicted.

        `asking` is the guest that needs room (None: the host), which may be taken below its own
        reservation; `state_of` tells a page's state word, and so its age.
        """
        if self.mode == GREEDY:
            return self._oldest(asking, state_of)
        victim: dict[int, Member] | None = None
        highest = (False, 0, 0)
        for client, members in self._clients.values():
            purse = client.purses[False]
            if not purse.bytes or _protected(client, asking):
                continue
            over = purse.bytes - purse.target_bytes
            rank = over > 0, -RANKS[client.settings.priority], over
            if victim is None or rank > highest:
                victim, highest = members, rank
        if victim is None:
            return None
        return max((member for member in victim.values() if member.pages), key=_readiness)

    def choose_of(self, client: Client) -> Member | None:
        """The member of one guest whose pages go next, whatever its reservation."""
        return max(
            (member for member in client.charged() if member.policy is not None and member.pages),
            key=_readiness,
            default=None,
        )

    def choose_by_leaves(self) -> Member | None:
        """The member whose pages go because there are too many leaves: that with the most, of the
        guest that has the most beyond its part of all that may be."""
        victim: dict[int, Member] | None = None
        most = 0
        for client, members in self._clients.values():
            if client.purses[False].bytes:
                leaves = sum(_leaves(member) for member in members.values())
                over = leaves - client.allotment_bytes // PAGE_BYTES
                if victim is None or over > most:
                    victim, most = members, over
        if victim is None:
            return None
        return max((member for member in victim.values() if member.pages), key=_leaves)

    def _oldest(self, asking: Client | None, state_of: Callable[[int], int]) -> Member | None:
        """The member with the oldest page, of `_OLDEST_AMONG` members in turn if there are more."""
        oldest = None
        lowest = 0
        looked_at = 0
        members = list(self.members.values())
        start = self._hand if self._hand < len(members) else 0
        for at in range(start - len(members), start):
            member = members[at]
            if not member.pages or _protected(member.client, asking):
                continue
            assert member.policy is not None
            front = member.policy.front()
            if front < 0:
                continue
            state = state_of(front)
            if oldest is None or state < lowest:
                oldest, lowest = member, state
            looked_at += 1
            if looked_at >= _OLDEST_AMONG:
                self._hand = (at + 1) % len(members)
                break
        return oldest


def _readiness(member: Member) -> tuple[bool, bool, int, int]:
    """Of the pools of one guest the one with the highest gives pages first: what was left before
    what is in use."""
    over = member.cost_bytes - member.target_bytes
    return member.heir, over > 0, -RANKS[member.pool.priority], over


def _leaves(member: Member) -> int:
    """Its part of the leaves of its pool: any sharer may have made them."""
    pool = member.pool
    return pool.leaves // max(1, sum(not one.heir for one in pool.members.values()))


def may_have_leaf(client: Client) -> bool:
    """Whether a guest may have one leaf more of persistent pages: it has its part of them, as of
    the frames.  Else one guest could take all of them with pages that cost next to nothing, and
    nobody could put into a new object any more."""
    leaves = sum(_leaves(member) for member in client.members.values() if member.policy is None)
    return leaves < client.allotment_bytes // PAGE_BYTES


def _protected(client: Client, asking: Client | None) -> bool:
    """Others can't take what is within a reservation."""
    reserve_bytes = client.settings.reserve_bytes
    return client is not asking and 0 < reserve_bytes >= client.cost_bytes
