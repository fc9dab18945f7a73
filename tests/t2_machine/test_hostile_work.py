"""Hostile guests: how much work one of them can make of a call or a turn.

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
from hypervisor.invariants import check
from hypervisor.objects import FEW_MAX, SHARDS, Objects, TmemObject
from hypervisor.pools import Pool
from hypervisor.sharing import HOLDERS_MAX, REFS_MAX, Sharing
from ipc.abi import (
    ANY_UUID,
    PAGE_BYTES,
    Op,
    Status,
    oid_from_int,
)
from tests.support.crowd import Guest, filled, make_machine

MANY = 3 * FEW_MAX


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
