"""Whose page goes: guests, pools and reservations, with numbers."""

from __future__ import annotations

from typing import cast

from hypervisor.entitlement import Claim, share_bytes
from hypervisor.eviction import EvictionPolicy
from hypervisor.pools import Client, Member, Pool, Settings
from hypervisor.room import Victims
from ipc.abi import POOL_PRIORITY_SHIFT, GuestId, PoolFlag, PoolId, Priority


class Line:
    """An eviction policy that knows its oldest page only."""

    def __init__(self, oldest: int) -> None:
        self._oldest = oldest

    def front(self) -> int:
        return self._oldest


def guest(*, reserve: int = 0, priority: Priority = Priority.NORMAL) -> Client:
    """A guest without pools."""
    settings = Settings(reserve_bytes=reserve, priority=priority)
    return Client(GuestId(1), "guest", 1, 1, 0, settings)


def pool_of(
    client: Client,
    cost: int,
    target: int = 0,
    *,
    flags: int = 0,
    priority: Priority = Priority.NORMAL,
    oldest: int = 1,
) -> Member:
    """A pool of a guest; a page costs a byte here."""
    number = len(client.members)
    pool = Pool(number, flags | priority << POOL_PRIORITY_SHIFT, b"")
    member = Member(pool, client, 0, PoolId(number))
    client.members[number] = member
    member.policy = cast("EvictionPolicy", Line(oldest))
    member.charge(cost, cost)
    member.aim(target)
    return member


def part(
    cost: int,
    target: int,
    *,
    persistent: int = 0,
    reserve: int = 0,
    priority: Priority = Priority.NORMAL,
    oldest: int = 1,
) -> Member:
    """The only ephemeral pool of a guest."""
    client = guest(reserve=reserve, priority=priority)
    if persistent:
        pool_of(client, persistent, flags=PoolFlag.PERSIST)
    return pool_of(client, cost, target, oldest=oldest)


def chosen(
    parts: list[Member], asking: Member | None = None, mode: str = "static"
) -> Member | None:
    """Whose page goes; the state word of page n is n."""
    victims = Victims(mode)
    for one in parts:
        victims.add(one)
    return victims.choose(None if asking is None else asking.client, lambda page: page)


def test_xens_inverted_victim() -> None:
    """Half of the weight and a tenth of the pages is under, half and nine tenths is over.

    Xen compared all pages by a client's own with all weight by its own, 10 with 2, and took the
    larger for a surplus: the small one lost the page.
    """
    shares = share_bytes(100, [Claim(50), Claim(50)])
    small, large = part(10, shares[0]), part(90, shares[1])

    assert chosen([small, large], small) is large
    assert chosen([small, large], large) is large


def test_the_guest_furthest_over_its_target_loses_pages() -> None:
    """Over by 5, by 20, and under by 50."""
    parts = [part(105, 100), part(40, 20), part(500, 550)]

    assert chosen(parts) is parts[1]


def test_of_those_over_their_targets_low_priority_goes_first() -> None:
    """Far over with high priority is safe while a low one is over by a byte."""
    high = part(900, 100, priority=Priority.HIGH)
    low = part(101, 100, priority=Priority.LOW)

    assert chosen([high, low]) is low


def test_a_low_priority_does_not_lose_what_it_is_entitled_to() -> None:
    """At its target it is left alone while another is over."""
    high = part(101, 100, priority=Priority.HIGH)
    low = part(100, 100, priority=Priority.LOW)

    assert chosen([high, low]) is high


def test_when_nobody_is_over_the_nearest_to_its_target_loses() -> None:
    """The targets may not yet add up to what is held."""
    parts = [part(10, 100), part(95, 100)]

    assert chosen(parts) is parts[1]


def test_a_reservation_is_not_taken_for_others() -> None:
    """Within it, persistent pages included, a guest loses nothing, however far over its target."""
    reserved = part(50, 0, persistent=30, reserve=80)
    other = part(10, 100)

    assert chosen([reserved, other], other) is other
    assert chosen([reserved], other) is None
    assert chosen([reserved], other, mode="greedy") is None


def test_a_guest_replaces_its_own_pages_within_its_reservation() -> None:
    """Nobody else has anything."""
    reserved = part(50, 0, reserve=80)

    assert chosen([reserved], reserved) is reserved


def test_pages_beyond_a_reservation_may_go() -> None:
    """One byte is enough."""
    reserved = part(81, 0, reserve=80)

    assert chosen([reserved], part(0, 0)) is reserved


def test_of_a_guests_pools_the_one_of_low_priority_goes_first() -> None:
    """Among those over their targets; the neighbour's pools are not compared with."""
    owner = guest()
    important = pool_of(owner, 100, 10, priority=Priority.HIGH)
    plain = pool_of(owner, 60, 50)
    neighbour = part(90, 100, priority=Priority.LOW)

    assert chosen([important, plain, neighbour]) is plain


def test_greedy_takes_the_oldest_page_of_all() -> None:
    """Targets and priorities don't matter, as in Xen."""
    parts = [part(10, 0, oldest=7, priority=Priority.LOW), part(10, 100, oldest=3)]

    assert chosen(parts, mode="greedy") is parts[1]


def test_nothing_to_evict_is_nobody() -> None:
    """Guests without ephemeral pages are never named."""
    assert chosen([part(0, 100, persistent=70)]) is None
