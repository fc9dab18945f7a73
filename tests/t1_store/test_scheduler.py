"""Targets, with numbers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from hypervisor.curve import Curve
from hypervisor.entitlement import Priority, Terms
from hypervisor.knapsack import Knapsack, coarse, hull, worth_of
from hypervisor.scheduler import (
    MEMBERS_EXACT_MAX,
    GuestState,
    MemberState,
    Scheduling,
    Snapshot,
    targets,
)
from ipc.abi import PAGE_BYTES

PAGES = 10_000
TOTAL = PAGES * PAGE_BYTES


def seen(*steps: tuple[int, float], gets: float = 0.0) -> Curve:
    """A curve that many samples and periods stand behind."""
    found = tuple(worth for _, worth in steps)
    asked = gets or max(found, default=0.0)
    return Curve(tuple(size for size, _ in steps), found, asked, asked, 10_000, 50)


def cliff(pages: int, hits: float) -> Curve:
    """A loop."""
    return seen((pages, hits))


def slope(pages: int, hits: float, steps: int = 100) -> Curve:
    """Each page brings less than the one before."""
    return seen(
        *((pages * at // steps, hits * (1 - (1 - at / steps) ** 3)) for at in range(1, steps + 1))
    )


IDLE = seen()
STREAM = seen(gets=5000.0)
NEW = Curve(periods=2, samples=3.0)


def snapshot(
    *curves: Curve, mode: Scheduling = Scheduling.SCHEDULED, total: int = TOTAL
) -> Snapshot:
    """A guest with one member for each curve."""
    return Snapshot(
        mode,
        total,
        tuple(GuestState(number) for number in range(len(curves))),
        tuple(MemberState(number, number, curve) for number, curve in enumerate(curves)),
    )


def with_guest(before: Snapshot, number: int, **changes: object) -> Snapshot:
    """The same with one guest changed."""
    guests = [
        replace(guest, **changes) if guest.number == number else guest  # type: ignore[arg-type]
        for guest in before.guests
    ]
    return replace(before, guests=tuple(guests))


def with_member(before: Snapshot, number: int, **changes: object) -> Snapshot:
    """The same with one member changed."""
    members = [
        replace(member, **changes) if member.number == number else member  # type: ignore[arg-type]
        for member in before.members
    ]
    return replace(before, members=tuple(members))


def pages_of(before: Snapshot) -> list[int]:
    """Targets in pages, in the order of the members."""
    result = targets(before)
    assert list(result) == [member.number for member in before.members]
    return [(target or 0) // PAGE_BYTES for target in result.values()]


def again(before: Snapshot) -> Snapshot:
    """The next round: the targets are set."""
    result = targets(before)
    return replace(
        before,
        members=tuple(
            replace(member, target_bytes=result[member.number]) for member in before.members
        ),
    )


# --- greedy and static


def test_greedy_sets_no_targets() -> None:
    """The oldest page goes."""
    assert targets(snapshot(IDLE, STREAM, mode=Scheduling.GREEDY)) == {0: None, 1: None}


def test_static_goes_by_weight_alone() -> None:
    """Whatever the curves say."""
    state = snapshot(IDLE, cliff(9000, 100.0), mode=Scheduling.STATIC)

    assert pages_of(state) == [5000, 5000]
    assert pages_of(with_guest(state, 0, terms=Terms(weight=300))) == [7500, 2500]


def test_static_charges_persistent_pages_to_their_guest() -> None:
    """2000 of its 5000 pages; with 8000 the neighbour still keeps what is left."""
    state = snapshot(IDLE, IDLE, mode=Scheduling.STATIC)

    assert pages_of(with_guest(state, 0, persistent_bytes=2000 * PAGE_BYTES)) == [3000, 5000]
    assert pages_of(with_guest(state, 0, persistent_bytes=8000 * PAGE_BYTES)) == [0, 2000]


def test_static_keeps_caps_and_reservations() -> None:
    """A cap of 1000 pages leaves 9000; a reservation of 8000 leaves 2000."""
    state = snapshot(IDLE, IDLE, mode=Scheduling.STATIC)
    capped = with_guest(state, 0, terms=Terms(cap_bytes=1000 * PAGE_BYTES))
    reserved = with_guest(state, 0, terms=Terms(reserve_bytes=8000 * PAGE_BYTES))

    assert pages_of(capped) == [1000, 9000]
    assert pages_of(reserved) == [8000, 2000]


def test_a_guests_share_is_divided_among_its_pools() -> None:
    """By the weights of its members."""
    state = Snapshot(
        Scheduling.STATIC,
        TOTAL,
        (GuestState(0), GuestState(1)),
        (MemberState(7, 0, weight=300), MemberState(8, 0, weight=100), MemberState(9, 1)),
    )

    assert pages_of(state) == [3750, 1250, 5000]


# --- scheduled


def test_a_cliff_gets_all_that_it_needs_or_nothing() -> None:
    """Two loops of which one fits: the one with more hits; the other gets what is left over."""
    sizes = pages_of(snapshot(cliff(6000, 500.0), cliff(7000, 600.0)))

    assert sizes[1] >= 7000
    assert sum(sizes) <= PAGES


def test_marginal_utility_would_choose_wrongly() -> None:
    """The steepest part first (4000 pages for 500 hits) leaves no room for 9000 pages and 900."""
    sizes = pages_of(snapshot(cliff(4000, 500.0), cliff(9000, 900.0)))

    assert sizes[1] >= 9000


def test_a_stream_and_an_idle_guest_give_way() -> None:
    """A loop above its share, and a slope that takes the rest."""
    sizes = pages_of(snapshot(STREAM, cliff(4000, 900.0), slope(8000, 700.0), IDLE))

    assert sizes[1] >= 4000
    assert sizes[2] > 5000
    assert sizes[0] + sizes[3] < 200


def test_what_nobody_has_a_use_for_goes_by_weight() -> None:
    """2000 pages are useful, 8000 are not: those who have least get them first."""
    state = snapshot(cliff(2000, 100.0), IDLE, IDLE)
    sizes = pages_of(with_guest(state, 2, terms=Terms(weight=200)))

    assert sum(sizes) >= PAGES - 3
    assert sizes == [2500, 2500, 5000]


def test_a_member_too_new_to_be_judged_has_its_share() -> None:
    """A quarter, though the others could use it."""
    sizes = pages_of(snapshot(NEW, slope(9000, 900.0), slope(9000, 900.0), IDLE))

    assert sizes[0] == 2500
    assert sizes[3] < 200


def test_a_member_that_was_watched_and_asked_for_nothing_has_none() -> None:
    """Few samples in many periods is an answer."""
    idle = Curve(periods=20, samples=3.0)

    assert pages_of(snapshot(idle, slope(20_000, 900.0)))[0] < 400


def test_a_reservation_stays_whatever_the_others_need() -> None:
    """Idle with 3000 reserved, of which 1000 are persistent pages: 2000 for ephemeral ones."""
    state = with_guest(
        snapshot(IDLE, slope(20_000, 900.0)),
        0,
        terms=Terms(reserve_bytes=3000 * PAGE_BYTES),
        persistent_bytes=1000 * PAGE_BYTES,
    )
    sizes = pages_of(state)

    assert 2000 <= sizes[0] < 2200
    assert sum(sizes) <= 9000


def test_a_reservation_is_used_first_by_its_guest() -> None:
    """Its own loop fits into what is reserved, so the other has all else."""
    state = with_guest(
        snapshot(cliff(2900, 10.0), cliff(6500, 900.0)),
        0,
        terms=Terms(reserve_bytes=3100 * PAGE_BYTES),
    )
    sizes = pages_of(state)

    assert sizes[0] >= 2900
    assert sizes[1] >= 6500


def test_a_cap_holds_for_both_kinds_of_pages() -> None:
    """3000 less 1000 persistent: the loop of 2500 can't have its way, the slope can."""
    state = with_guest(
        snapshot(cliff(2500, 900.0), slope(5000, 100.0)),
        0,
        terms=Terms(cap_bytes=3000 * PAGE_BYTES),
        persistent_bytes=1000 * PAGE_BYTES,
    )
    sizes = pages_of(state)

    assert sizes[0] <= 2000
    assert sizes[1] > 5000


def test_weights_and_priorities_multiply_hits() -> None:
    """Of two equal loops the heavier wins; a high priority outdoes three times the weight."""
    state = snapshot(cliff(6000, 500.0), cliff(6000, 500.0))
    heavier = with_guest(state, 1, terms=Terms(weight=300))

    assert pages_of(heavier)[1] >= 6000
    assert pages_of(with_guest(heavier, 0, priority=Priority.HIGH))[0] >= 6000
    assert pages_of(with_member(heavier, 0, priority=Priority.HIGH))[0] >= 6000
    assert pages_of(with_member(heavier, 1, priority=Priority.LOW))[0] >= 6000


def test_weight_zero_gets_what_nobody_else_has_a_use_for() -> None:
    """Its loop fits beside the other's, but a hit of the other is worth more than all of its."""
    state = snapshot(cliff(3000, 900.0), cliff(6000, 100.0))
    weightless = with_guest(state, 0, terms=Terms(weight=0))

    assert pages_of(weightless)[0] >= 3000
    more = with_member(weightless, 1, curve=cliff(8000, 100.0))
    assert pages_of(more) == [0, PAGES]


def test_compressed_pages_take_less() -> None:
    """At half a page each, two loops fit that would not."""
    state = snapshot(cliff(8000, 500.0), cliff(9000, 500.0))
    for number in (0, 1):
        state = with_member(state, number, held_pages=1000, held_bytes=1000 * PAGE_BYTES // 2)
    sizes = pages_of(state)

    assert sizes[0] >= 4000
    assert sizes[1] >= 4500


def test_the_pools_of_a_guest_share_its_cap() -> None:
    """Of two loops under one cap the better one is served, and another guest has the rest."""
    state = Snapshot(
        Scheduling.SCHEDULED,
        TOTAL,
        (GuestState(0, Terms(cap_bytes=5000 * PAGE_BYTES)), GuestState(1)),
        (
            MemberState(1, 0, cliff(3000, 100.0)),
            MemberState(2, 0, cliff(4000, 300.0)),
            MemberState(3, 1, cliff(4500, 50.0)),
        ),
    )
    sizes = pages_of(state)

    assert sizes[0] + sizes[1] <= 5000
    assert sizes[1] >= 4000
    assert sizes[2] >= 4500


def test_an_uncertain_curve_gets_a_margin() -> None:
    """Ten per cent of error: ten per cent more than the cliff."""
    curve = replace(cliff(5000, 900.0), error=0.1)

    assert pages_of(snapshot(curve, slope(20_000, 500.0)))[0] >= 5500


# --- hysteresis


def test_noise_moves_nothing() -> None:
    """Hits that go up and down by a hundredth leave the targets where they are."""
    rng = random.Random(5)
    state = again(snapshot(slope(8000, 1000.0), slope(9000, 900.0), cliff(2000, 400.0)))
    first = pages_of(state)
    for _ in range(20):
        noisy = [1 + rng.uniform(-0.01, 0.01) for _ in range(2)]
        state = with_member(state, 0, curve=slope(8000, 1000.0 * noisy[0]))
        state = with_member(state, 1, curve=slope(9000, 900.0 * noisy[1]))
        state = again(state)
        assert pages_of(state) == first


def test_a_change_moves_memory_at_once() -> None:
    """The loop ends, and another guest begins one."""
    state = again(snapshot(cliff(6000, 900.0), IDLE, slope(4000, 100.0)))
    assert pages_of(state)[0] >= 6000
    state = with_member(state, 0, curve=IDLE)
    state = with_member(state, 1, curve=cliff(6000, 900.0))

    assert pages_of(state)[1] >= 6000


def test_persistent_pages_take_what_is_not_missed_first() -> None:
    """Targets shrink by what they have beyond their last step: the loop keeps what it needs."""
    state = again(snapshot(cliff(6000, 900.0), IDLE))
    state = with_guest(state, 1, persistent_bytes=3000 * PAGE_BYTES)
    sizes = pages_of(state)

    assert sizes[0] >= 6000
    assert sum(sizes) <= 7000


def test_a_new_member_makes_room_for_itself() -> None:
    """It has no target yet, so all are set anew."""
    state = again(snapshot(slope(20_000, 900.0), slope(20_000, 900.0)))
    state = replace(
        state,
        guests=(*state.guests, GuestState(2)),
        members=(*state.members, MemberState(2, 2, NEW)),
    )

    assert pages_of(state)[2] == PAGES // 3


# --- many members, and degenerate ones


def test_nobody_and_nothing() -> None:
    """No members, no memory, persistent pages over all there is."""
    assert targets(snapshot()) == {}
    assert pages_of(snapshot(cliff(10, 10.0), IDLE, total=0)) == [0, 0]
    full = with_guest(snapshot(cliff(10, 10.0), IDLE), 0, persistent_bytes=2 * TOTAL)
    assert pages_of(full) == [0, 0]
    assert pages_of(snapshot(cliff(10, 10.0), NEW, total=PAGE_BYTES)) == [0, 0]


def random_snapshot(rng: random.Random, members: int) -> Snapshot:
    """Guests with one to three pools, some with caps, reservations and persistent pages."""
    guests: list[GuestState] = []
    states: list[MemberState] = []
    while len(states) < members:
        number = len(guests)
        persistent = rng.choice([0, 0, TOTAL // members // 4])
        guests.append(
            GuestState(
                number,
                Terms(
                    rng.choice([0, 50, 100, 100, 400]),
                    rng.choice([0, 0, TOTAL // members // 2]),
                    rng.choice([0, 0, TOTAL * 2 // members]),
                ),
                persistent,
                rng.choice(list(Priority)),
            )
        )
        for _ in range(rng.randrange(1, 4)):
            size, hits = rng.randrange(100, PAGES), rng.uniform(0, 1000)
            curve = rng.choice([cliff(size, hits), slope(size, hits), STREAM, IDLE, NEW])
            target = rng.choice([None, TOTAL // members])
            states.append(MemberState(len(states), number, curve, target_bytes=target))
    return Snapshot(Scheduling.SCHEDULED, TOTAL, tuple(guests), tuple(states))


@pytest.mark.parametrize("seed", range(40))
def test_limits_hold_in_any_state(seed: int) -> None:
    """Never more than there is, caps and reservations kept, with few members and with many."""
    rng = random.Random(seed)
    state = random_snapshot(rng, rng.choice([2, 5, 12, MEMBERS_EXACT_MAX + 40]))
    for _ in range(2):
        result = targets(state)
        persistent = sum(guest.persistent_bytes for guest in state.guests)
        assert sum(target or 0 for target in result.values()) <= TOTAL - persistent
        promised = sum(
            max(guest.terms.reserve_bytes, guest.persistent_bytes) for guest in state.guests
        )
        for guest in state.guests:
            held = guest.persistent_bytes + sum(
                result[member.number] or 0
                for member in state.members
                if member.guest == guest.number
            )
            cap = guest.terms.cap_bytes
            assert not cap or held <= max(cap, guest.persistent_bytes)
            # A byte may be lost to rounding.
            assert promised > TOTAL or held >= min(guest.terms.reserve_bytes, cap or TOTAL) - 3
        state = again(state)


def brute_force(choices: list[list[tuple[int, float]]], capacity: int) -> float:
    """All combinations."""
    return max(
        (
            sum(worth for _, worth in chosen)
            for chosen in itertools.product(*choices)
            if sum(size for size, _ in chosen) <= capacity
        ),
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_exact(seed: int) -> None:
    """Beside all combinations of four random staircases."""
    rng = random.Random(seed)
    choices: list[list[tuple[int, float]]] = []
    for _ in range(4):
        sizes = sorted(rng.sample(range(1, 40), 5))
        worths = sorted(rng.uniform(0, 100) for _ in range(5))
        choices.append([(0, 0.0), *zip(sizes, worths, strict=True)])
    sack = Knapsack(60)
    for steps in choices:
        assert set(sack.add(steps)) == {None}
    for capacity in (0, 7, 30, 60):
        chosen = [steps[at] for steps, at in zip(choices, sack.choose(capacity), strict=True)]
        best = brute_force(choices, capacity)
        assert sack.worth[capacity] == pytest.approx(best)
        assert sum(worth for _, worth in chosen) == pytest.approx(best)
        assert sum(size for size, _ in chosen) <= capacity


def test_hulls_and_coarse_steps() -> None:
    """What the two simplifications keep."""
    steps = [(0, 0.0), (10, 1.0), (20, 10.0), (30, 11.0), (40, 18.0)]

    assert hull(steps) == [(0, 0.0), (20, 10.0), (40, 18.0)]
    assert coarse(steps, 5.0) == [(0, 0.0), (20, 10.0), (40, 18.0)]
    assert coarse(steps, 50.0) == [(0, 0.0), (40, 18.0)]
    assert [worth_of(steps, size) for size in (0, 19, 20, 99)] == [0.0, 1.0, 10.0, 18.0]


def test_many_members_are_served_nearly_as_well() -> None:
    """Hulls beside the knapsack, on the same curves twice over."""
    rng = random.Random(11)
    half = MEMBERS_EXACT_MAX
    curves = [
        rng.choice([cliff, slope])(rng.randrange(50, 1000), rng.uniform(1, 100))
        for _ in range(half)
    ]

    def brought(state: Snapshot) -> float:
        sizes = pages_of(state)
        return sum(
            member.curve.hits(size) for member, size in zip(state.members, sizes, strict=True)
        )

    few = brought(snapshot(*curves))
    many = brought(snapshot(*curves, *curves, total=2 * TOTAL))
    assert many > 0.95 * 2 * few


# --- what is not known yet


def busy(puts: float, trial: float = 0.0) -> Curve:
    """A guest that has begun to put pages, none of which was asked for yet."""
    return Curve(
        gets=puts,
        puts=puts,
        samples=1000,
        periods=20,
        recent_gets=puts,
        recent_puts=puts,
        trial=trial,
    )


def test_guests_that_have_just_become_busy_get_room_in_equal_parts() -> None:
    """Nobody can know yet which of them will want its pages back."""
    sizes = pages_of(snapshot(busy(500.0), busy(520.0), IDLE))

    assert 0.8 < sizes[0] / sizes[1] < 1.25
    assert sum(sizes[:2]) > 9000


def test_hope_ends_when_an_arena_has_been_put() -> None:
    """What nothing came of gives way to a loop that needs all."""
    loop = cliff(9800, 100.0)

    assert pages_of(snapshot(busy(5000.0), loop))[1] < 9800
    assert pages_of(snapshot(busy(5000.0, trial=1.0), loop))[1] >= 9800


def test_a_guest_that_has_gone_quiet_gives_way() -> None:
    """Its curve still remembers the hits of a while ago, its last period does not."""
    was = replace(cliff(6000, 900.0), recent_gets=9.0)

    assert pages_of(snapshot(was, cliff(6000, 300.0)))[1] >= 6000
