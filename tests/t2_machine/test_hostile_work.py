"""Hostile guests: how much work one of them can make of a call, a turn, a choice.

Nothing is timed.  What is counted is what time is spent on: entries of the largest dictionary,
pages and runs of a slice, references that a move has to turn, slices of a call.  The machine is
driven in this process; `tools.bench.bounded` times the same with a real server.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from hypervisor import inventory, reclaim
from hypervisor.arena import layout, private_arena
from hypervisor.auth import Grants, Role
from hypervisor.entitlement import Terms, allotment_bytes
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.objects import FEW_MAX, SHARDS, Objects, TmemObject
from hypervisor.pools import Client, Pool
from hypervisor.room import RANKS, _readiness
from hypervisor.sharing import HOLDERS_MAX, REFS_MAX, Sharing
from ipc.abi import (
    ANY_UUID,
    OID_BYTES,
    PAGE_BYTES,
    REQUEST,
    Op,
    Reason,
    Reply,
    Status,
    oid_from_int,
    pool_flag_word,
)
from ipc.limits import GUESTS_MAX, POOLS_PER_GUEST
from ipc.window import anonymous_window
from ipc.wire import decode_reply

UUID = bytes(range(16))
MANY = 3 * FEW_MAX


def make_machine(frames: int = 4096, **options: Any) -> Machine:
    """Over an arena of so many frames."""
    return Machine(private_arena(layout(frames).end), secret=b"hostile!", **options)


class Guest:
    """A client and its window."""

    def __init__(self, machine: Machine, name: str = "guest", **settings: Any) -> None:
        self.machine = machine
        client = machine.attach(name, 1, 1, 0)
        assert client is not None
        self.client: Client = client
        for key, value in settings.items():
            setattr(client.settings, key, value)
        client.apply_settings()
        self.window = anonymous_window()

    def call(self, op: Op, pool: int = 0, oid: int = 0, index: int = 0, count: int = 0) -> Reply:
        request = REQUEST.pack(1, op, 0, count, pool, index, oid_from_int(oid), 0, 0, 0)
        return decode_reply(self.machine.execute(self.client, request, self.window))

    def pool(self, *, persist: bool = False, uuid: bytes | None = None) -> int:
        word = pool_flag_word(persist=persist, shared=uuid is not None)
        oid = int.from_bytes((uuid or ANY_UUID).ljust(OID_BYTES, b"\0"), "little")
        reply = self.call(Op.NEW_POOL, word, oid)
        assert reply.status == Status.DONE, reply
        return reply.value

    def batch(self, pool: int, handles: list[tuple[int, int]]) -> int:
        """Put one page under each (object, index); how many were stored."""
        self.window.write_table(
            [
                (pool, index, slot, 0, oid_from_int(oid), 0)
                for slot, (oid, index) in enumerate(handles)
            ]
        )
        return self.call(Op.PUT_BATCH, count=len(handles)).map.bit_count()

    def fill_window(self, page: Callable[[int], bytes]) -> None:
        for slot in range(64):
            self.window.slot(slot)[:] = page(slot)


def filled(slot: int) -> bytes:
    """A page of one byte."""
    return bytes([slot]) * PAGE_BYTES


# --- dictionaries


def test_a_pool_of_many_objects_has_no_large_dictionary() -> None:
    """Each is found, iterated and taken out exactly once, in whatever order; what grows or shrinks
    at a time is small."""
    pool = Pool(0, 0, ANY_UUID)
    objects = Objects()
    expected = {}
    for number in range(MANY):
        oid = oid_from_int(number)
        objects[oid] = expected[oid] = TmemObject(number, pool, oid)
    assert len(objects) == MANY
    assert dict(objects.items()) == expected
    assert len(list(objects.values())) == MANY
    assert len(objects._few) <= FEW_MAX
    assert max(map(len, objects._many)) < 4 * MANY // SHARDS + 64

    choose = random.Random(3)
    for oid in choose.sample(sorted(expected), MANY // 2):
        assert objects.get(oid) is expected[oid]
        if choose.random() < 0.5:
            assert objects.pop(oid) is expected.pop(oid)
            assert objects.pop(oid) is None
        else:
            del objects[oid]
            del expected[oid]
        assert objects.get(oid) is None
    while expected:
        taken = objects.take()
        assert expected.pop(taken.oid) is taken
    assert len(objects) == 0
    assert list(objects.values()) == []


def test_an_object_of_many_leaves_has_no_large_dictionary() -> None:
    """Leaf numbers are as a hostile guest likes them: near, far, all in one half, ends of both."""
    pool = Pool(0, 0, ANY_UUID)
    top = (1 << 26) - 1
    numbers = {0, 1, top, top - 1, *range(0, 20_000, 1), *(n << 13 for n in range(8192))}
    found = TmemObject(0, pool, oid_from_int(1))
    leaves = {number: found.new_leaf(number, 1) for number in numbers}
    assert found._rest is not None
    assert len(found._rest) <= 1 << 13
    assert max(map(len, found._rest.values())) <= 1 << 13
    assert {number: id(leaf) for number, leaf in found.leaves()} == {
        number: id(leaf) for number, leaf in leaves.items()
    }
    for number in random.Random(1).sample(sorted(numbers), 10_000):
        assert found.leaf(number) is leaves.pop(number)
        found.drop_leaf(number)
        assert found.leaf(number) is None
    left = {id(leaf) for leaf in leaves.values()}
    for _ in range(len(leaves)):
        left.remove(id(found.take_leaf()))
    assert not left
    assert not found._rest


# --- slices

SHAPES: dict[str, Callable[[int], tuple[int, int]]] = {
    "an object a page": lambda page: (page, 0),
    "a leaf a page": lambda page: (1, page * 64),
    "every other page": lambda page: (page // 512, page % 512 * 2),
    "dense": lambda page: (page // 1024, page % 1024),
}


@pytest.mark.parametrize("content", ["raw", "filled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [Op.DESTROY_POOL, Op.FLUSH_OBJECT])
def test_a_slice_is_a_slice_whatever_the_shape(
    op: Op, shape: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scattered pages take work of their own, so fewer of them make a slice; none is skipped, and
    each slice does something."""
    machine = make_machine()
    guest = Guest(machine)
    guest.fill_window(filled if content == "filled" else lambda slot: os.urandom(PAGE_BYTES))
    pool = guest.pool()
    handles = [SHAPES[shape](page) for page in range(1536)]
    for start in range(0, len(handles), 64):
        assert guest.batch(pool, handles[start : start + 64]) == 64
    if op == Op.DESTROY_POOL:
        guest.call(op, pool)
    else:
        for oid in {oid for oid, _ in handles}:
            guest.call(op, pool, oid)
    runs = 0
    release = machine.store._release

    def count(*arguments: Any) -> None:
        nonlocal runs
        runs += 1
        release(*arguments)

    monkeypatch.setattr(machine.store, "_release", count)
    freed = slices = 0
    while machine.store.doomed:
        runs = 0
        slices += 1
        done = machine.store.reap()
        assert done <= reclaim.REAP_SLICE_PAGES + 64
        assert runs <= reclaim.REAP_SLICE_PAGES // reclaim._RUN_WORK + 64
        freed += done
        if slices % 50 == 1:
            check(machine)
    assert freed == len(handles)
    assert machine.store.leaves == 0
    check(machine)


def test_no_call_reaps_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand doomed pages that give no frame: another guest's put that needs one looks
    at some slices of them, and does without."""
    machine = make_machine(1024)
    hostile, other = Guest(machine, "hostile"), Guest(machine, "other")
    hostile.fill_window(filled)
    doomed, kept = hostile.pool(), hostile.pool()
    # Two pools by turns, so that each table of entries has a page that stays.
    for start in range(0, 60_000, 64):
        hostile.call(Op.PUT_PAGE, doomed, 1, start, 64)
        hostile.call(Op.PUT_PAGE, kept, 1, start // 64, 1)
    hostile.call(Op.DESTROY_POOL, doomed)
    slices = 0
    reap = machine.store.reap

    def count(*arguments: int) -> int:
        nonlocal slices
        slices += 1
        return reap(*arguments)

    monkeypatch.setattr(machine.store, "reap", count)
    pool = other.pool(persist=True)
    for number in range(60):
        other.fill_window(lambda _slot: os.urandom(PAGE_BYTES))
        slices = 0
        reply = other.call(Op.PUT_PAGE, pool, 1, number * 64, 64)
        assert reply.status in (Status.DONE, Status.ENOMEM)
        assert slices <= reclaim.SLICES_A_CALL
    check(machine)


def test_pools_that_wait_to_be_reaped_take_turns() -> None:
    """Who gives up a small pool is not charged for it until somebody's huge one is gone."""
    machine = make_machine()
    hostile, other = Guest(machine, "hostile"), Guest(machine, "other")
    for guest, pages in ((hostile, 3000), (other, 64)):
        guest.fill_window(filled)
        pool = guest.pool()
        for start in range(0, pages, 64):
            guest.batch(pool, [(start + slot, 0) for slot in range(min(64, pages - start))])
        guest.call(Op.DESTROY_POOL, pool)
    while other.client.cost_bytes:
        machine.store.reap()
    assert hostile.client.cost_bytes > 2000 * 32
    check(machine)


# --- equal pages


@pytest.mark.parametrize("compress", [False, True])
def test_references_to_one_content_are_bounded(compress: bool) -> None:
    """The bytes of a page that a guest stores thousands of times move, at times, and each reference
    must then be turned: beyond some there is a second copy.  All of them read the same."""
    machine = make_machine()
    guest = Guest(machine, sharing=Sharing.GUEST, compress=compress)
    page = (b"a page that many have, over and over; " * 200)[:PAGE_BYTES]
    guest.fill_window(lambda _slot: page)
    pool = guest.pool()
    for start in range(0, 3 * REFS_MAX, 64):
        assert guest.call(Op.PUT_PAGE, pool, 1, start, 64).status == Status.DONE
    shared = machine.store.contents.shared
    assert max(shared.refs) == REFS_MAX
    assert shared.count == 3
    check(machine)
    for start in range(0, 3 * REFS_MAX, 640):
        guest.window.slots[:] = bytes(64 * PAGE_BYTES)
        guest.call(Op.GET_PAGE, pool, 1, start, 64)
        assert bytes(guest.window.slots) == page * 64
    assert guest.call(Op.FLUSH_OBJECT, pool, 1).value
    while machine.store.doomed:
        machine.store.reap()
    assert shared.count == 0
    check(machine)


def test_holders_of_one_content_are_bounded() -> None:
    """Whenever a reference comes or goes, all holders' charges change: one copy has only some."""
    machine = make_machine()
    page = os.urandom(PAGE_BYTES)
    guests = [
        Guest(machine, f"guest{number}", sharing=Sharing.ALL) for number in range(2 * HOLDERS_MAX)
    ]
    for guest in guests:
        guest.window.slot(0)[:] = page
        for _ in range(3):
            assert guest.call(Op.PUT_PAGE, guest.pool(), 1, 0, 1).status == Status.DONE
    shared = machine.store.contents.shared
    held = [len(shared.holders(content)) for content in range(shared.count)]
    assert max(held) <= HOLDERS_MAX
    assert sum(held) == 3 * len(guests)
    check(machine)
    for guest in guests[::2]:
        machine.depart(guest.client)
    while machine.store.doomed:
        machine.store.reap()
    check(machine)


def test_numbers_of_members_are_used_again() -> None:
    """They are 31 bits wide, and a guest that makes pools in a loop gets there in half a day."""
    machine = make_machine()
    guest = Guest(machine)
    for _ in range(500):
        pool = guest.pool()
        assert guest.client.members[pool].number < 3
        guest.call(Op.DESTROY_POOL, pool)
        machine.store.reap()


def test_recompression_looks_at_some_tables_a_slice() -> None:
    """Thousands of tables in which nothing is to be done are gone through a few at a time, and once
    only as long as nobody puts anything."""
    machine = make_machine()
    guest = Guest(machine, compress=True)
    guest.fill_window(filled)
    pool = guest.pool()
    for start in range(0, 20_000, 64):
        guest.call(Op.PUT_PAGE, pool, 1, start, 64)
    tables = machine.store.entries.tables
    assert tables > 10 * inventory._TABLES_A_LOOK
    slices = 0
    while machine.idle(4):
        slices += 1
        assert slices <= tables
    assert slices >= tables // inventory._TABLES_A_LOOK - 1
    assert not machine.idle(4)


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
