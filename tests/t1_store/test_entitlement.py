"""Shares, allotments and victims, with numbers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.entitlement import (
    Claim,
    Priority,
    Terms,
    allotment_bytes,
    evictable,
    is_over_share,
    share_bytes,
    victim,
)

MIB = 1 << 20


@dataclass
class Guest:
    cost_bytes: int
    reserve_bytes: int = 0


@dataclass
class Member:
    name: str
    owner: Guest
    ephemeral_bytes: int
    target_bytes: int | None = 0
    priority: int = Priority.NORMAL


def guest_with(
    name: str,
    ephemeral: int,
    target: int | None,
    *,
    persistent: int = 0,
    reserve: int = 0,
    priority: Priority = Priority.NORMAL,
) -> Member:
    """A guest with one member."""
    return Member(name, Guest(ephemeral + persistent, reserve), ephemeral, target, priority)


# --- shares


def test_xens_quota_test_the_right_way_round() -> None:
    """Half of the weight and a tenth of the pages is under; half and nine tenths is over.

    Xen compared (all pages / own pages) with (all weight / own weight): 10 > 2 was "over".
    """
    assert not is_over_share(own=10, everyones=100, weight=50, weights=100)
    assert is_over_share(own=90, everyones=100, weight=50, weights=100)
    assert not is_over_share(own=50, everyones=100, weight=50, weights=100)


def test_xens_inverted_victim() -> None:
    """The same two clients with their weight shares as targets: the larger one loses the page."""
    shares = share_bytes(100, [Claim(50), Claim(50)])
    small = guest_with("small", 10, shares[0])
    large = guest_with("large", 90, shares[1])

    assert victim([small, large], small.owner) is large
    assert victim([small, large], large.owner) is large


@pytest.mark.parametrize(
    ("total", "claims", "shares"),
    [
        (90, [Claim(1), Claim(2)], [30, 60]),
        (90, [Claim(1, 50), Claim(1)], [50, 40]),
        (90, [Claim(1), Claim(1, 0, 10)], [80, 10]),
        (90, [Claim(0), Claim(1)], [0, 90]),
        (90, [Claim(0, 20), Claim(1)], [20, 70]),
        (90, [Claim(1, 0, 10), Claim(1, 0, 10)], [10, 10]),
        (90, [Claim(1, 60), Claim(1, 60)], [45, 45]),
        (90, [Claim(1, 60, 20), Claim(1)], [20, 70]),
        (90, [Claim(1, 80), Claim(1, 0, 2), Claim(1)], [80, 2, 8]),
        (90, [], []),
        (0, [Claim(1), Claim(1, 5)], [0, 0]),
        (90, [Claim(0), Claim(0)], [0, 0]),
    ],
)
def test_shares(total: int, claims: list[Claim], shares: list[int]) -> None:
    """By weight, between the least and the most of each."""
    assert share_bytes(total, claims) == shares


@given(
    st.integers(0, 10_000),
    st.lists(
        st.builds(
            Claim,
            st.integers(0, 1000),
            st.integers(0, 5000),
            st.none() | st.integers(0, 5000),
        ),
        max_size=12,
    ),
)
def test_shares_keep_their_limits_and_waste_nothing(total: int, claims: list[Claim]) -> None:
    """Never more than there is; nothing left while somebody with a weight could take it."""
    shares = share_bytes(total, claims)

    assert sum(shares) <= total
    leasts = [
        min(one.least_bytes, one.least_bytes if one.most_bytes is None else one.most_bytes)
        for one in claims
    ]
    for share, least, claim in zip(shares, leasts, claims, strict=True):
        assert claim.most_bytes is None or share <= claim.most_bytes
        assert sum(leasts) > total or share >= least
    takers = [
        claim
        for share, claim in zip(shares, claims, strict=True)
        if claim.weight and (claim.most_bytes is None or share < claim.most_bytes)
    ]
    assert not takers or sum(shares) > total - len(claims) - 1


# --- allotments


def test_an_allotment_is_the_reservation_and_a_part_of_the_rest() -> None:
    """100 MiB, 20 reserved: 80 by weight, 1 to 3."""
    reserved = Terms(weight=100, reserve_bytes=20 * MIB)
    plain = Terms(weight=300)
    everyone = [reserved, plain]

    assert allotment_bytes(reserved, everyone, 100 * MIB) == 40 * MIB
    assert allotment_bytes(plain, everyone, 100 * MIB) == 60 * MIB


def test_a_cap_bounds_an_allotment() -> None:
    """Whatever the weight says."""
    capped = Terms(weight=900, cap_bytes=10 * MIB)

    assert allotment_bytes(capped, [capped, Terms()], 100 * MIB) == 10 * MIB


def test_weight_zero_is_no_part() -> None:
    """Such a guest has its reservation and no more."""
    none = Terms(weight=0, reserve_bytes=5 * MIB)

    assert allotment_bytes(none, [none, Terms()], 100 * MIB) == 5 * MIB
    assert allotment_bytes(Terms(weight=0), [Terms(weight=0)], 100 * MIB) == 0


@given(
    st.lists(st.builds(Terms, st.integers(0, 500), st.integers(0, 50)), min_size=1, max_size=9),
    st.integers(450, 5000),
)
def test_allotments_of_all_are_never_more_than_the_arena(everyone: list[Terms], arena: int) -> None:
    """So a guest within its allotment is never refused for another guest's persistent pages."""
    assert sum(allotment_bytes(terms, everyone, arena) for terms in everyone) <= arena


# --- victims


def test_the_member_furthest_over_its_target_loses_pages() -> None:
    """Over by 5, by 20 and under by 50."""
    members = [
        guest_with("a", 105, 100),
        guest_with("b", 40, 20),
        guest_with("c", 500, 550),
    ]

    assert victim(members, None) is members[1]


def test_of_those_over_their_targets_low_priority_goes_first() -> None:
    """Far over with high priority is safe while a low one is over by a page."""
    high = guest_with("high", 900, 100, priority=Priority.HIGH)
    low = guest_with("low", 101, 100, priority=Priority.LOW)

    assert victim([high, low], None) is low


def test_a_low_priority_does_not_lose_what_it_is_entitled_to() -> None:
    """At its target it is left alone while another is over."""
    high = guest_with("high", 101, 100, priority=Priority.HIGH)
    low = guest_with("low", 100, 100, priority=Priority.LOW)

    assert victim([high, low], None) is high


def test_when_nobody_is_over_the_nearest_to_its_target_loses() -> None:
    """The targets may not yet add up to what is held."""
    members = [guest_with("a", 10, 100), guest_with("b", 95, 100)]

    assert victim(members, None) is members[1]


def test_a_reservation_is_not_taken_for_others() -> None:
    """Within it, persistent pages included, a guest loses nothing, however far over its target."""
    reserved = guest_with("reserved", 50, 0, persistent=30, reserve=80)
    other = guest_with("other", 10, 100)

    assert victim([reserved, other], other.owner) is other
    assert victim([reserved], other.owner) is None
    assert evictable([reserved], other.owner) == []


def test_a_guest_within_its_reservation_replaces_its_own_pages_last() -> None:
    """Only if there is nobody else to take from."""
    reserved = guest_with("reserved", 50, 0, reserve=80)
    other = guest_with("other", 10, 100)

    assert victim([reserved, other], reserved.owner) is other
    assert victim([reserved], reserved.owner) is reserved


def test_pages_beyond_a_reservation_may_go() -> None:
    """One byte is enough."""
    reserved = guest_with("reserved", 81, 0, reserve=80)

    assert victim([reserved], None) is reserved


def test_nothing_to_evict_is_nobody() -> None:
    """Members without ephemeral pages are never named."""
    assert victim([guest_with("a", 0, 100, persistent=70)], None) is None


def test_without_targets_all_that_may_go_are_named() -> None:
    """Then the oldest page goes, and the store knows it."""
    members = [guest_with("a", 10, None), guest_with("b", 20, None), guest_with("c", 0, None)]

    assert evictable(members, None) == members[:2]
