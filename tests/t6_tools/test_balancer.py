"""The balancer of mode `balloon`: sizes from figures."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tools.experiment.balancer import Figures, fair_sizes, targets

IDLE = Figures(
    size=1000,
    told=1000,
    floor=200,
    maximum=2000,
    committed=100,
    reserved=100,
    free=600,
    stalled=0.0,
)
BUSY = replace(IDLE, committed=1500, free=0, stalled=0.5)


def test_memory_goes_from_the_idle_to_the_busy() -> None:
    """Both get what they need, and what is left over in equal parts."""
    sizes = fair_sizes({"idle": IDLE, "busy": BUSY}, 2000)

    assert sum(sizes.values()) <= 2000
    assert IDLE.needed <= sizes["idle"] < 400
    assert sizes["busy"] > 1600


def test_nobody_grows_by_what_another_still_has() -> None:
    """First the one shrinks, in a later round the other grows."""
    first = targets({"idle": IDLE, "busy": BUSY}, 2000)
    assert first["idle"] < 400
    assert first["busy"] == 1000

    shrunk = replace(IDLE, size=first["idle"], told=first["idle"], free=0)
    second = targets({"idle": shrunk, "busy": BUSY}, 2000)
    assert second["busy"] > 1600


def test_those_who_lack_get_the_same_share_of_what_they_lack() -> None:
    """Two that need more than there is."""
    sizes = fair_sizes({"a": BUSY, "b": BUSY}, 2000)

    assert sizes["a"] == sizes["b"]
    assert 1990 <= sum(sizes.values()) <= 2000


def test_page_cache_that_nobody_else_needs_stays() -> None:
    """A guest without free pages and without waiting keeps what it has."""
    full = replace(IDLE, free=0)

    assert fair_sizes({"a": full, "b": full}, 2000) == {"a": 1000, "b": 1000}


def test_who_waits_longer_wishes_more() -> None:
    """Pressure counts beside what is committed."""
    patient = replace(IDLE, free=0, stalled=0.02)
    sizes = fair_sizes({"much": replace(patient, stalled=0.4), "little": patient}, 2100)

    assert sizes["much"] > sizes["little"] + 200


def test_who_has_free_pages_gives_them_to_who_waits() -> None:
    """Though it keeps some, and gets a part of what nobody wants."""
    sizes = fair_sizes({"free": IDLE, "waits": replace(IDLE, free=0, stalled=0.02)}, 2000)

    assert IDLE.needed < sizes["free"] < 800
    assert sum(sizes.values()) == 2000


def test_nothing_is_left_over_while_somebody_can_take_it() -> None:
    """Those that are full give their part to the others."""
    small = replace(IDLE, maximum=300, size=300, told=300)
    sizes = fair_sizes({"small": small, "a": IDLE, "b": IDLE}, 3300)

    assert sizes == {"small": 300, "a": 1500, "b": 1500}


@pytest.mark.parametrize("seed", range(20))
def test_sizes_are_possible_and_never_more_than_there_is(seed: int) -> None:
    """Whatever guests say, as long as their floors fit."""
    rng = random.Random(seed)
    for _ in range(200):
        guests = {}
        for number in range(rng.randint(1, 8)):
            floor = rng.randint(100, 300)
            maximum = floor + rng.randint(0, 3000)
            size = rng.randint(floor, maximum)
            guests[f"g{number}"] = Figures(
                size=size,
                told=rng.choice([size, rng.randint(floor, maximum)]),
                floor=floor,
                maximum=maximum,
                committed=rng.randint(0, 5000),
                reserved=rng.randint(50, 150),
                free=rng.randint(0, size),
                stalled=rng.choice([0.0, rng.random()]),
            )
        total = sum(guest.held for guest in guests.values()) + rng.randint(0, 500)
        fair, told = fair_sizes(guests, total), targets(guests, total)

        assert sum(fair.values()) <= total
        for name, guest in guests.items():
            assert guest.floor <= fair[name] <= guest.maximum
            assert guest.floor <= told[name] <= guest.maximum
        # Until those that shrink have shrunk, all of it has room.
        assert sum(max(told[name], guest.held) for name, guest in guests.items()) <= total
