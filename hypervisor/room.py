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

from collections.abc import Callable, Iterable
from typing import Final

from hypervisor.pools import Client, Member
from ipc.abi import Priority

GREEDY: Final = "greedy"
EVICTION_BATCH_PAGES: Final = 32
"""Pages evicted before the choice of a victim is looked at again; fewer when less is needed."""

RANKS: Final = {Priority.LOW: 0, Priority.NORMAL: 1, Priority.HIGH: 2}


class Victims:
    """Chooses; `members` are all parts that guests have in ephemeral pools."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.members: dict[int, Member] = {}
        """By id(), because a member is as good as the next one."""

    def add(self, member: Member) -> None:
        self.members[id(member)] = member

    def remove(self, member: Member) -> None:
        del self.members[id(member)]

    def choose(self, asking: Client | None, state_of: Callable[[int], int]) -> Member | None:
        """The member whose pages go next, None if nothing may be evicted.

        `asking` is the guest that needs room (None: the host), which may be taken below its own
        reservation; `state_of` tells a page's state word, and so its age.
        """
        candidates = [member for member in self.members.values() if member.pages]
        if self.mode == GREEDY:
            return self._oldest(self._unprotected(candidates, asking), state_of)
        clients = {id(member.client): member.client for member in candidates}
        over = dict.fromkeys(clients, 0)
        for member in self.members.values():
            if id(member.client) in over:
                over[id(member.client)] += member.cost_bytes - member.target_bytes
        open_clients = [one for one in clients.values() if not _protected(one, asking)]
        if not open_clients:
            return None
        victim = max(
            open_clients,
            key=lambda one: (over[id(one)] > 0, -RANKS[one.settings.priority], over[id(one)]),
        )
        return max((member for member in candidates if member.client is victim), key=_readiness)

    def choose_of(self, client: Client) -> Member | None:
        """The member of one guest whose pages go next, whatever its reservation."""
        return max(
            (member for member in client.charged() if member.policy is not None and member.pages),
            key=_readiness,
            default=None,
        )

    def _unprotected(self, members: Iterable[Member], asking: Client | None) -> list[Member]:
        return [member for member in members if not _protected(member.client, asking)]

    def _oldest(self, members: list[Member], state_of: Callable[[int], int]) -> Member | None:
        oldest = None
        lowest = 0
        for member in members:
            assert member.policy is not None
            front = member.policy.front()
            if front < 0:
                continue
            state = state_of(front)
            if oldest is None or state < lowest:
                oldest, lowest = member, state
        return oldest


def _readiness(member: Member) -> tuple[bool, int, int]:
    """Of the pools of one guest the one with the highest gives pages first."""
    over = member.cost_bytes - member.target_bytes
    return over > 0, -RANKS[member.pool.priority], over


def _protected(client: Client, asking: Client | None) -> bool:
    """Others can't take what is within a reservation."""
    reserve_bytes = client.settings.reserve_bytes
    return client is not asking and 0 < reserve_bytes >= client.cost_bytes
