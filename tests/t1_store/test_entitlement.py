"""Shares and allotments, with numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.entitlement import (
    Claim,
    Terms,
    allotment_bytes,
    share_bytes,
)

MIB = 1 << 20


# --- shares


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
