"""Hostile guests: whose page goes for whose, and who pays, whatever crowds there are.

A victim is looked for among some and is still the one that looking at all would give; memory is
divided in pieces and comes out as when it is done at once; who leaves a shared pool pays until it
has gone.  Nothing is timed, see `test_hostile_work`.
"""

from __future__ import annotations

import os
import random

import pytest

from hypervisor.auth import Grants, Role
from hypervisor.entitlement import Terms, allotment_bytes
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Client
from hypervisor.room import RANKS, _readiness
from ipc.abi import (
    PAGE_BYTES,
    Op,
    Reason,
    Status,
)
from ipc.limits import GUESTS_MAX, POOLS_PER_GUEST
from tests.support.crowd import Guest, filled, make_machine

UUID = bytes(range(16))


# --- choices


def rank_of(client: Client, asking: Client | None) -> tuple[bool, int, int] | None:
    """How much a guest is the next to lose pages, by looking at all its members; None if not."""
    members = [member for member in client.charged() if member.policy is not None]
    reserve_bytes = client.settings.reserve_bytes
    if client is not asking and 0 < reserve_bytes >= client.cost_bytes:
        return None
    if not any(member.pages for member in members):
        return None
    over = sum(member.cost_bytes - member.target_bytes for member in members)
    return over > 0, -RANKS[client.settings.priority], over


@pytest.mark.parametrize("seed", range(8))
def test_a_victim_is_the_one_that_looking_at_everybody_gives(seed: int) -> None:
    """It is chosen among guests and then among the pools of one, by sums that are kept."""
    choose = random.Random(seed)
    machine = make_machine(512, scheduling=choose.choice(("static", "scheduled")))
    guests = [Guest(machine, f"guest{number}") for number in range(6)]
    for guest in guests:
        guest.fill_window(lambda _slot: choose.randbytes(PAGE_BYTES))
    for _ in range(150):
        guest = choose.choice(guests)
        if not guest.client.members or choose.random() < 0.1:
            if len(guest.client.members) < 5:
                guest.pool(persist=choose.random() < 0.2)
        elif choose.random() < 0.05:
            guest.call(Op.DESTROY_POOL, choose.choice(list(guest.client.members)))
        elif choose.random() < 0.05:
            guest.client.settings.reserve_bytes = choose.randrange(100) * PAGE_BYTES
            machine.balance.retarget()
        else:
            pool = choose.choice(list(guest.client.members))
            guest.call(Op.PUT_PAGE, pool, choose.randrange(9), 0, choose.randrange(1, 65))
        while machine.store.doomed:
            machine.store.reap()
        asking = choose.choice([None, *(one.client for one in guests)])
        ranks = [rank_of(one.client, asking) for one in guests]
        victim = machine.store.victims.choose(asking, machine.store.state)
        if victim is None:
            assert ranks == [None] * len(guests)
            continue
        assert rank_of(victim.client, asking) == max(rank for rank in ranks if rank)
        holding = [m for m in victim.client.charged() if m.policy is not None and m.pages]
        assert _readiness(victim) == max(map(_readiness, holding))
    check(machine)


def test_the_oldest_of_thousands_is_looked_for_among_some() -> None:
    """In mode `greedy` one look is at 256 members, the next at the next ones."""
    machine = make_machine(8192, scheduling="greedy")
    guests = [Guest(machine, f"guest{number}") for number in range(8)]
    for guest in guests:
        guest.window.slot(0)[:] = os.urandom(PAGE_BYTES)
        for _ in range(POOLS_PER_GUEST):
            guest.call(Op.PUT_PAGE, guest.pool(), 1, 0, 1)
    looks = 0

    def state_of(number: int) -> int:
        nonlocal looks
        looks += 1
        return machine.store.state(number)

    first = machine.store.victims.choose(None, state_of)
    assert first is next(iter(machine.store.victims.members.values()))
    assert looks == 256
    seen: set[int] = set()
    for _ in range(4):
        victim = machine.store.victims.choose(None, state_of)
        assert victim is not None
        seen.add(id(victim))
    assert len(seen) == 2


def test_allotments_of_many_guests_are_what_the_formula_says() -> None:
    """Computed for all together whenever one comes or goes."""
    machine = make_machine()
    for number in range(GUESTS_MAX):
        client = machine.attach(f"guest{number}", number + 1, 1, 0)
        assert client is not None
        client.settings.weight = number
    machine.balance.allot()
    everyone = [Terms(weight=number) for number in range(GUESTS_MAX)]
    total = machine.store.frames.count * PAGE_BYTES
    for number, client in enumerate(machine.clients.values()):
        assert client.allotment_bytes == allotment_bytes(everyone[number], everyone, total)


# --- dividing memory


def test_memory_is_divided_in_pieces() -> None:
    """Guests and pools come and go between two pieces; what comes out in the end is what comes out
    when it is done at once."""
    machine = make_machine(1024)
    machine.balance.in_pieces = True
    guests = [Guest(machine, f"guest{number}") for number in range(6)]
    choose = random.Random(7)
    pieces = 0
    for guest in guests:
        guest.fill_window(lambda _slot: os.urandom(PAGE_BYTES))
        guest.pool()
        guest.pool()
    for step in range(600):
        guest = guests[choose.randrange(len(guests))]
        pool = choose.choice(list(guest.client.members))
        start = choose.randrange(12) * 32
        guest.call(Op.GET_PAGE, pool, 1, start, 32)
        guest.call(Op.PUT_PAGE, pool, 1, start, 32)
        while machine.balance.dividing is not None:
            machine.balance.divide()
            pieces += 1
            if pieces % 11 == 0 and len(guests) > 3:
                machine.depart(guests.pop().client)
            if pieces % 5 == 0:
                guests[0].call(Op.DESTROY_POOL, 1)
                while machine.store.doomed:
                    machine.store.reap()
                guests[0].pool()
        if step % 50 == 0:
            check(machine)
    assert pieces > 500

    def targets() -> list[int]:
        return [one.target_bytes for g in guests for one in g.client.members.values()]

    machine.balance.retarget()
    at_once = targets()
    for _ in machine.balance._division():
        pass
    assert targets() == at_once
    assert sum(at_once) > 0
    check(machine)


# --- leaving shared pools


def sharers(machine: Machine, *names: str) -> list[Guest]:
    """Guests that may write the pool of UUID."""
    for name in names:
        machine.memberships.grants.allow(UUID, name, Role.WRITER)
    return [Guest(machine, name) for name in names]


@pytest.mark.parametrize("persist", [False, True])
def test_who_leaves_pays_until_it_has_gone(persist: bool) -> None:
    """The pages stay with it when it comes back, and go to another sharer when it does not."""
    machine = make_machine(512, grants=Grants())
    leaver, stayer = sharers(machine, "leaver", "stayer")
    for guest in (leaver, stayer):
        guest.fill_window(lambda _slot: os.urandom(PAGE_BYTES))
        guest.pool(persist=persist, uuid=UUID)
    leaver.call(Op.PUT_PAGE, 0, 1, 0, 40)
    stayer.call(Op.PUT_PAGE, 0, 2, 0, 10)
    slot = leaver.client.members[0].slot

    for _ in range(5):
        leaver.call(Op.DESTROY_POOL, 0)
        check(machine)
        assert leaver.client.cost_bytes == 40 * PAGE_BYTES
        assert stayer.client.cost_bytes == 10 * PAGE_BYTES
        leaver.pool(persist=persist, uuid=UUID)
        assert leaver.client.members[0].slot == slot
        check(machine)
    leaver.call(Op.DESTROY_POOL, 0)
    machine.depart(leaver.client)
    check(machine)
    assert stayer.client.cost_bytes == 50 * PAGE_BYTES
    assert stayer.call(Op.GET_PAGE, 0, 1, 0, 40).status == Status.DONE

    (again,) = sharers(machine, "leaver")
    again.fill_window(lambda _slot: os.urandom(PAGE_BYTES))
    again.pool(persist=persist, uuid=UUID)
    assert again.client.members[0].slot != slot, "another life"
    assert again.client.cost_bytes == 0
    stayer.call(Op.DESTROY_POOL, 0)
    check(machine)
    again.call(Op.DESTROY_POOL, 0)
    while machine.store.doomed:
        machine.store.reap()
    assert (stayer.client.cost_bytes, again.client.cost_bytes) == (0, 0)
    check(machine)


def test_what_was_inherited_is_on_nobodys_allotment() -> None:
    """A guest that fills a shared pool with persistent pages and dies, again and again: who stays
    may hold what it could before, and the pool does not take more than a guest may have."""
    machine = make_machine(600, grants=Grants())
    (stayer,) = sharers(machine, "stayer")
    stayer.fill_window(lambda _slot: os.urandom(PAGE_BYTES))
    stayer.pool(persist=True, uuid=UUID)
    private = stayer.pool(persist=True)
    stored = 0
    for life in range(6):
        (mayfly,) = sharers(machine, "mayfly")
        mayfly.fill_window(lambda _slot: os.urandom(PAGE_BYTES))
        mayfly.pool(persist=True, uuid=UUID)
        for start in range(0, 640, 64):
            stored += mayfly.call(Op.PUT_PAGE, 0, 10 + life, start, 64).map.bit_count()
        machine.depart(mayfly.client)
        check(machine)
    assert 0 < stored <= 300
    assert (
        sum(
            stayer.call(Op.PUT_PAGE, private, 1, start, 50).map.bit_count()
            for start in range(0, 250, 50)
        )
        == 250
    )
    assert stayer.call(Op.PUT_PAGE, 0, 1, 0, 64).reason in (0, Reason.OVER_ALLOTMENT)
    for life in range(6):
        stayer.call(Op.FLUSH_OBJECT, 0, 10 + life)
    assert stayer.call(Op.PUT_PAGE, 0, 1, 0, 40).status == Status.DONE
    check(machine)


def test_cheap_pages_replaced_by_dear_ones() -> None:
    """A guest may replace what it has, but not grow by it beyond a page over its limit."""
    machine = make_machine(512)
    guest = Guest(machine)
    machine.attach("other", 2, 1, 0)
    pool = guest.pool(persist=True)
    guest.fill_window(filled)
    for start in range(0, 2048, 64):
        guest.call(Op.PUT_PAGE, pool, 1, start, 64)
    guest.fill_window(lambda _slot: os.urandom(PAGE_BYTES))
    for start in range(0, 2048, 64):
        guest.call(Op.PUT_PAGE, pool, 1, start, 64)
        assert guest.client.cost_bytes <= guest.client.allotment_bytes + PAGE_BYTES
    check(machine)
