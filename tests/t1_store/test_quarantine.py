"""Quarantine of many pages, in slices; and when a page was put, over longer than there is room."""

from __future__ import annotations

import random

import pytest

from hypervisor.administration import Administration
from hypervisor.arena import MOMENTS_MAX, Arena, layout, private_arena
from hypervisor.auth import Grants, Role
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.moments import Moments
from hypervisor.reclaim import REAP_SLICE_PAGES
from hypervisor.recovery import recover
from ipc.abi import EXTENT_PAGES_MAX, REPLY, REQUEST, Op, oid_from_int, pool_flag_word
from ipc.window import Window, anonymous_window

FRAMES = 6000
PAGES = 4096
UUID = b"u" * 16
SECOND_NS = 1_000_000_000


class Rig:
    """Two writers of one shared pool."""

    def __init__(self, arena: Arena) -> None:
        grants = Grants()
        for name in ("bad", "good"):
            grants.allow(UUID, name, Role.WRITER)
        self.machine = Machine(arena, grants=grants)
        recover(self.machine)
        self.window: Window = anonymous_window()
        self.window.slots[:] = random.Random(1).randbytes(len(self.window.slots))

    def call(self, name: str, op: Op, pool: int, oid: int, index: int = 0, count: int = 0) -> int:
        """The map of the reply."""
        client = self.machine.attach(name, 1, 1, 0)
        assert client is not None
        request = REQUEST.pack(1, op, 0, count, pool, index, oid_from_int(oid), 0, 0, 0)
        return int(REPLY.unpack(self.machine.execute(client, request, self.window))[5])

    def join(self, name: str) -> None:
        word = pool_flag_word(shared=True)
        self.call(name, Op.NEW_POOL, word, int.from_bytes(UUID, "little"))

    def put(self, name: str, first: int, pages: int) -> None:
        for index in range(first, first + pages, EXTENT_PAGES_MAX):
            self.call(name, Op.PUT_PAGE, 0, 1, index, EXTENT_PAGES_MAX)

    def had(self, first: int, pages: int) -> int:
        """Pages that the other one gets."""
        return sum(
            self.call("good", Op.GET_PAGE, 0, 1, index, EXTENT_PAGES_MAX).bit_count()
            for index in range(first, first + pages, EXTENT_PAGES_MAX)
        )


@pytest.fixture
def rig() -> Rig:
    """With many pages of both."""
    made = Rig(private_arena(layout(FRAMES).end))
    for name in ("bad", "good"):
        made.join(name)
    made.put("bad", 0, PAGES)
    made.put("good", PAGES, 640)
    return made


def test_all_pages_are_out_of_reach_at_once_and_freed_in_slices(rig: Rig) -> None:
    """A slice is no more work than one of any doomed pages; guests go on in between, and what the
    same guest puts meanwhile stays."""
    store = rig.machine.store
    administration = Administration(rig.machine)
    assert administration.answer({"verb": "quarantine", "guest": "bad"})["pages"] == PAGES
    assert rig.had(0, PAGES) == 0
    assert rig.had(PAGES, 640) == 640
    rig.put("bad", 8192, 128)
    slices = []
    while store.doomed:
        slices.append(store.reap())
        assert rig.had(8192, 128) == 128
        check(rig.machine)
    assert sum(slices) == PAGES
    assert max(slices) <= 2 * REAP_SLICE_PAGES
    assert len(slices) >= PAGES / (2 * REAP_SLICE_PAGES)
    assert administration.answer({"verb": "quarantined"}) == {
        "pages": {"bad": PAGES},
        "more": False,
    }
    assert store.frames.count - store.frames.free == 640 + 128
    assert not any(pool.vets for pool in rig.machine.memberships.shared.values())


def test_a_put_that_needs_room_takes_what_is_disowned_first(rig: Rig) -> None:
    """So nobody else's page is evicted while there is any."""
    store = rig.machine.store
    rig.put("good", 10_000, FRAMES - PAGES - 640 - EXTENT_PAGES_MAX)
    Administration(rig.machine).answer({"verb": "quarantine", "guest": "bad"})
    rig.put("good", 20_000, 1024)
    assert store.evictions == 0
    assert rig.had(20_000, 1024) == 1024


def test_a_kill_at_any_moment_gives_nothing_back(rig: Rig) -> None:
    """After no slice, and after one."""
    store = rig.machine.store
    Administration(rig.machine).answer({"verb": "quarantine", "guest": "bad"})
    for _ in range(2):
        again = Rig(Arena(store.arena.mapping))
        assert again.had(0, PAGES) == 0
        assert again.had(PAGES, 640) == 640
        check(again.machine)
        rig, store = again, again.machine.store
        Administration(rig.machine).answer({"verb": "quarantine", "guest": "bad"})
        store.reap()


def test_moments_are_thinned_and_none_is_wrong() -> None:
    """What is long ago is known more coarsely, and every put lies between the two
    moments that are told for it, also after a restart."""
    arena = private_arena(layout(64).end)
    moments = Moments(arena)
    seconds = 20_000
    rng = random.Random(1)
    second = 0
    while second < seconds:
        second = min(seconds, second + rng.choice((1, 1, 2, 60)))
        moments.note(10 * second, second * SECOND_NS)
    for known in (moments, Moments(arena)):
        spans = {}
        for ago in (0, 30, 3600, 9000, 19_000):
            second = seconds - ago
            after, before = (ns / SECOND_NS for ns in known.around(10 * second - 5))
            assert after < second <= (before or second)
            spans[ago] = (before or seconds) - after
        assert spans[0] <= 60
        assert all(span <= max(60, ago / 8) for ago, span in spans.items()), spans
    assert len(arena.read_moments()) <= MOMENTS_MAX
    after, before = moments.around(10 * seconds + 1)
    assert (after, before) == (seconds * SECOND_NS, 0)


def test_a_moment_that_was_cut_short_is_none() -> None:
    """Killed while it was written: its sequence is 0 then."""
    arena = private_arena(layout(64).end)
    Moments(arena).note(7, 5 * SECOND_NS)
    arena.publish_moment(3, 0, 99 * SECOND_NS)
    assert Moments(arena).around(7) == (0, 5 * SECOND_NS)
    assert Moments(arena).around(8) == (5 * SECOND_NS, 0)
