"""Persistent pages in idle memory: who may have them there, and that others get it back."""

from __future__ import annotations

import pytest

from hypervisor.administration import Administration
from hypervisor.arena import layout, private_arena
from hypervisor.limits import KEPT_FREE_SHARE
from hypervisor.machine import Machine
from hypervisor.pressure import WRITEBACK_PAGES_MAX
from hypervisor.reclaim import SQUEEZES_A_LOOK
from ipc.abi import PAGE_BYTES, Op, Reason, pool_flag_word
from tests.t2_machine.test_semantics import Guest

FRAMES = 1024
TURN = 16
PERSISTENT = pool_flag_word(persist=True)
EPHEMERAL = pool_flag_word()


class World:
    """A borrower and another guest, of equal weight."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.machine = Machine(private_arena(layout(FRAMES).end), clock_ns=lambda: self.now_ns)
        self.administration = Administration(self.machine)
        self.alpha, self.bravo = (Guest(self.machine, name) for name in ("alpha", "bravo"))
        self.persistent = {
            guest.client.name: guest.call(Op.NEW_POOL, PERSISTENT).value
            for guest in (self.alpha, self.bravo)
        }
        self.ephemeral = self.bravo.call(Op.NEW_POOL, EPHEMERAL).value

    def set(self, name: str, **settings: object) -> None:
        self.administration.answer({"verb": "set", "guest": name, **settings})

    @property
    def free(self) -> int:
        return self.machine.store.frames.free

    def fill(self, guest: Guest, pool: int, pages: int = FRAMES, *, start: int = 0) -> int:
        """Put until a put is refused; how many pages were stored."""
        stored = 0
        for index in range(start, start + pages, TURN):
            texts = [f"{guest.client.name} {index + at}" for at in range(TURN)]
            reply = guest.put(pool, 1, index, *texts)
            stored += reply.map.bit_count()
            if reply.map.bit_count() < TURN:
                break
        return stored


@pytest.fixture
def world() -> World:
    """Nobody is trusted yet."""
    return World()


def test_only_who_is_trusted_borrows(world: World) -> None:
    """The others have their allotment and no more, however much is idle."""
    allotment = world.alpha.client.allotment_bytes // PAGE_BYTES
    assert world.fill(world.bravo, world.persistent["bravo"]) == allotment
    for index in range(0, FRAMES, TURN):
        world.bravo.call(Op.FLUSH_PAGE, world.persistent["bravo"], 1, index, TURN)
    world.set("alpha", borrow=True)
    stored = world.fill(world.alpha, world.persistent["alpha"])
    assert stored > 1.5 * allotment
    assert FRAMES // KEPT_FREE_SHARE <= world.free < FRAMES // KEPT_FREE_SHARE + TURN
    refused = world.alpha.put(world.persistent["alpha"], 1, stored, "more")
    assert refused.reason == Reason.OVER_ALLOTMENT
    assert world.alpha.get(world.persistent["alpha"], 1, 5) == ["alpha 5"]


def test_nobodys_page_goes_for_it_and_no_reservation(world: World) -> None:
    """What others have stays, and what they have reserved can be had at once."""
    kept = world.fill(world.bravo, world.ephemeral, 320)
    world.set("alpha", borrow=True)
    world.set("bravo", reserve_bytes=100 * PAGE_BYTES)
    stored = world.fill(world.alpha, world.persistent["alpha"])
    assert stored > world.alpha.client.allotment_bytes // PAGE_BYTES
    assert world.machine.store.evictions == 0
    assert world.bravo.client.members[world.ephemeral].pages == kept == 320
    assert world.free >= 100
    assert world.fill(world.bravo, world.persistent["bravo"], 96) == 96
    assert world.machine.store.evictions == 0


@pytest.mark.parametrize("kind", ["persistent", "ephemeral"])
def test_it_is_asked_back(world: World, kind: str) -> None:
    """By another's refused put, or when others' clean pages go that are within their part."""
    world.set("alpha", borrow=True)
    stored = world.fill(world.alpha, world.persistent["alpha"])
    pool = world.persistent["bravo"] if kind == "persistent" else world.ephemeral
    had = world.fill(world.bravo, pool, 2 * SQUEEZES_A_LOOK * TURN)
    wishes = world.alpha.client.wishes
    assert wishes.writeback_pages == WRITEBACK_PAGES_MAX
    assert world.bravo.client.wishes.writeback_pages == 0

    # Until it has done so it gets nothing more, though there is room again.
    world.bravo.call(Op.FLUSH_OBJECT, pool, 1)
    world.machine.store.reap(FRAMES)
    half = WRITEBACK_PAGES_MAX // 2
    for index in range(0, half, TURN):
        world.alpha.call(Op.FLUSH_PAGE, world.persistent["alpha"], 1, index, TURN)
    assert wishes.writeback_pages == half
    assert world.free > FRAMES // KEPT_FREE_SHARE + TURN
    refused = world.alpha.put(world.persistent["alpha"], 1, stored, "more")
    assert refused.reason == Reason.OVER_ALLOTMENT
    for index in range(half, WRITEBACK_PAGES_MAX, TURN):
        world.alpha.call(Op.FLUSH_PAGE, world.persistent["alpha"], 1, index, TURN)
    assert wishes.writeback_pages == 0
    assert world.alpha.client.account.record()["writeback_done_pages"] == WRITEBACK_PAGES_MAX
    if kind == "persistent":
        assert world.fill(world.bravo, pool) >= had + WRITEBACK_PAGES_MAX
    else:
        assert not world.alpha.put(world.persistent["alpha"], 1, stored, "more").reason


def test_trust_can_be_taken_away(world: World) -> None:
    """What it has stays, for it can't be dropped; it gets no more, and it is on record."""
    world.set("alpha", borrow=True)
    stored = world.fill(world.alpha, world.persistent["alpha"])
    listed = world.administration.answer({"verb": "list"})["guests"]["alpha"]
    assert listed["borrow"] is True
    assert listed["persistent_over_bytes"] > 0
    world.set("alpha", borrow=False)
    for index in range(0, 2 * TURN, TURN):
        world.alpha.call(Op.FLUSH_PAGE, world.persistent["alpha"], 1, index, TURN)
    refused = world.alpha.put(world.persistent["alpha"], 1, stored, "more")
    assert refused.reason == Reason.OVER_ALLOTMENT
    assert world.alpha.get(world.persistent["alpha"], 1, stored - 1) == [f"alpha {stored - 1}"]
    question = {"verb": "set", "guest": "alpha", "borrow": "yes"}
    assert world.administration.answer(question) == {"error": "borrow is true or false"}
