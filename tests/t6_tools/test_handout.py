"""The host of mode `cmm2`: who has to do with less when memory is short."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tools.experiment.handout import RESERVE_SHARE, Figures, targets

IDLE = Figures(floor=100, maximum=2000, size=900, lent=900, unused=100, volatile=500, demand=0)
BUSY = Figures(floor=100, maximum=2000, size=1000, lent=1000, unused=0, volatile=0, demand=600)
TOTAL = 2000


def test_nobody_is_told_anything_while_there_is_enough() -> None:
    """Whoever wants more takes what is free."""
    assert targets({"idle": IDLE, "busy": BUSY}, TOTAL, TOTAL // RESERVE_SHARE) == {
        "idle": 2000,
        "busy": 2000,
    }


def test_what_one_can_do_without_is_for_those_with_a_demand() -> None:
    """Unused and volatile pages, no stable ones."""
    told = targets({"idle": IDLE, "busy": BUSY}, TOTAL, 0)

    assert told["busy"] == 2000
    stable = IDLE.size - IDLE.unused - IDLE.volatile
    assert stable <= told["idle"] <= stable + IDLE.size // 32 + 100


def test_volatile_pages_stay_when_nobody_needs_their_place() -> None:
    """A little is short: that is found in what is unused."""
    told = targets({"idle": IDLE, "busy": replace(BUSY, demand=0)}, TOTAL, 50)

    assert told["idle"] >= IDLE.size - IDLE.unused


def test_what_is_left_over_is_for_those_with_a_demand() -> None:
    """One with many unused pages keeps none of them, though there are more than are wanted."""
    idle = replace(IDLE, size=1500, lent=1500, unused=1000, volatile=100)
    told = targets({"idle": idle, "busy": replace(BUSY, demand=50)}, 2500, 0)

    assert told == {"idle": idle.wished, "busy": 2000}
    assert idle.wished < 600


def test_volatile_pages_go_in_proportion() -> None:
    """Of the one with twice as many, twice as many."""
    guests = {
        "much": replace(IDLE, unused=0, volatile=600),
        "little": replace(IDLE, unused=0, volatile=300, size=600, lent=600),
        "busy": replace(BUSY, demand=100),
    }
    told = targets(guests, 2600, 0)

    kept = {name: told[name] - guests[name].needed for name in ("much", "little")}
    assert 0 < kept["little"] < 300
    assert kept["much"] == pytest.approx(2 * kept["little"], abs=2)


def test_stable_pages_beyond_an_even_share_go_when_all_is_stable() -> None:
    """The one that has more than its part has to evict; the one with less is not to starve."""
    greedy = replace(BUSY, size=1700, lent=1700)
    starved = replace(BUSY, size=300, lent=300)
    told = targets({"greedy": greedy, "starved": starved}, TOTAL, 0)

    assert told["starved"] == 2000
    assert told["greedy"] < 1200


@pytest.mark.parametrize("seed", range(10))
def test_what_is_told_is_possible(seed: int) -> None:
    """And when all have done as they were told, the reserve is there."""
    rng = random.Random(seed)
    for _ in range(200):
        guests = {}
        for number in range(rng.randint(1, 8)):
            floor = rng.randint(100, 300)
            size = floor + rng.randint(0, 2000)
            unused = rng.randint(0, size)
            guests[f"g{number}"] = Figures(
                floor=floor,
                maximum=size + rng.randint(0, 1000),
                size=size,
                lent=size + rng.randint(0, 64),
                unused=unused,
                volatile=rng.randint(0, size - unused),
                demand=rng.choice([0, rng.randint(0, 1000)]),
            )
        free = rng.randint(0, 300)
        total = sum(guest.held for guest in guests.values()) + free
        told = targets(guests, total, free)

        for name, guest in guests.items():
            assert guest.floor <= told[name] <= guest.maximum
        left = {name: min(told[name], guest.held) for name, guest in guests.items()}
        floors = sum(guest.floor for guest in guests.values())
        reserve = total // RESERVE_SHARE
        assert free >= reserve or sum(left.values()) <= max(floors, total - reserve)
