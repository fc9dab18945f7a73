"""Frames that are lent to guests as RAM: killed at any bytecode, and what the host has of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hypervisor.balance
from hypervisor.arena import (
    FRAMES_MIN,
    HELD,
    LENT_FRAME,
    Arena,
    format_arena,
    layout,
    private_arena,
)
from hypervisor.frames import LENT
from hypervisor.invariants import check
from hypervisor.lending import FRAMES_A_CALL, Loans
from hypervisor.machine import Machine
from hypervisor.pools import Client, Settings
from hypervisor.reclaim import REAP_SLICE_PAGES
from hypervisor.recovery import recover
from ipc.abi import PAGE_BYTES, REPLY, REQUEST, Op, Reason, Status
from ipc.errors import InvariantError
from ipc.limits import GUESTS_MAX
from ipc.names import Registry
from ipc.segment import allocated_bytes, create_segment, remove_segment
from ipc.window import anonymous_window
from tests.support.kills import RECOVERERS, WRITERS, images_of
from tests.t1_store.test_crash_points import (
    E,
    P,
    Rig,
    do,
    images_during,
    prepared,
    raw,
    reap,
    restored,
)

WINDOW = anonymous_window()


def lend(machine: Machine, name: str, pages: int) -> int:
    """What a guest has as RAM after one call."""
    client = machine.attach(name, 1, 1, 0)
    assert client is not None
    request = REQUEST.pack(1, Op.LEND, 0, 0, 0, pages, bytes(24), 0, 0, 0)
    _, status, reason, _, _, _, value = REPLY.unpack(machine.execute(client, request, WINDOW))
    assert (status, reason) == (Status.DONE, Reason.NONE)
    return int(value)


def lent(machine: Machine) -> dict[str, set[int]]:
    """Frames of each guest, by the segment alone."""
    arena = machine.store.arena
    names: dict[int, str] = {record.number: record.name for record in arena.read_guests()}
    found: dict[str, set[int]] = {name: set() for name in names.values()}
    for frame in range(arena.frames_count):
        if arena.state[frame] == HELD and arena.object[frame] == LENT_FRAME:
            found.setdefault(names.get(arena.index[frame], "?"), set()).add(frame)
    return found


def lends(name: str, pages: int) -> Callable[[Rig], object]:
    """A call, to be made later."""
    return lambda rig: lend(rig.machine, name, pages)


def departs(name: str) -> Callable[[Rig], object]:
    """A guest's death, and what is freed after it."""

    def depart(rig: Rig) -> None:
        rig.machine.depart(rig.machine.clients[name])
        reap(rig)

    return depart


ACTIONS: dict[str, tuple[bool, list[Callable[[Rig], object]]]] = {
    "lend free frames": (False, [lends("b", 12)]),
    "lend frames of ephemeral pages": (True, [lends("b", 30)]),
    "lend a few that are left": (True, [lends("b", 6)]),
    "give some back": (False, [lends("a", 3)]),
    "give all back, and others use them": (
        False,
        [lends("a", 0), lambda rig: rig.put("c", P, 5, 0, *[raw(n) for n in range(8)])],
    ),
    "a guest departs": (False, [departs("a")]),
    "another takes its number": (False, [departs("a"), lends("d", 5)]),
}


@pytest.mark.parametrize("name", list(ACTIONS))
def test_a_kill_at_any_bytecode_loses_and_doubles_no_frame(name: str) -> None:
    """Each guest has its frames as before or after the call or between the two, and nobody else
    has them; no page goes that may not; and the call, repeated, has the outcome that it would have
    had."""
    full, steps = ACTIONS[name]
    arena = restored(prepared(full=full))
    first = Rig(arena)
    assert lend(first.machine, "a", 9) == 9
    image = arena.mapping[:]
    before = Rig(restored(image))
    finished, images = images_during(image, steps)
    old, new = lent(before.machine), lent(finished.machine)
    pages = before.contents()
    after = finished.contents()

    for number, left in enumerate(images):
        survivor = Rig(restored(left))
        check(survivor.machine)
        now = lent(survivor.machine)
        assert "?" not in now, f"state {number}"
        for guest in now:
            was, will = old.get(guest, set()), new.get(guest, set())
            kept = was & will
            assert kept <= now[guest] <= was | will, f"state {number}: {guest}"
        data = survivor.machine.store.arena.data
        for frame in set().union(*now.values()):
            bytes_ = data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES]
            assert not any(bytes_), f"state {number}: frame {frame} holds something"
        found = survivor.contents()
        for key in pages.keys() | after.keys():
            allowed = {pages.get(key), after.get(key)}
            allowed |= {None} if key[0] not in persistent(before) else set()
            assert found.get(key) in allowed, f"state {number}: {key}"
    # Absolute numbers: who does not know what became of a call makes it again.
    for left in images[:: max(1, len(images) // 8)]:
        survivor = Rig(restored(left))
        for step in steps:
            if step.__name__ != "depart" or "a" in survivor.machine.clients:
                step(survivor)
        check(survivor.machine)
        counts = {guest: len(frames) for guest, frames in lent(survivor.machine).items()}
        assert counts == {guest: len(frames) for guest, frames in new.items()}
    assert len(images) > 2


def persistent(rig: Rig) -> set[int]:
    """Numbers of pools whose pages stay."""
    pools = rig.machine.memberships.all_pools(rig.machine.clients)
    return {pool.number for pool in pools if pool.persistent}


def test_recovery_can_be_killed_while_it_finds_what_is_lent() -> None:
    """Of a guest that has gone, and of guests that are there."""
    arena = private_arena(layout(FRAMES_MIN).end)
    rig = Rig(arena)
    rig.join("a")
    lend(rig.machine, "a", 9)
    lend(rig.machine, "d", 7)
    rig.machine.depart(rig.machine.clients["d"])
    image = arena.mapping[:]
    expected = Rig(restored(image))
    assert {name: len(found) for name, found in lent(expected.machine).items()} == {"a": 9}
    again = restored(image)
    states = images_of(again, RECOVERERS, lambda: Rig(again))
    assert len(states) > 7
    for number, left in enumerate(dict.fromkeys(states)):
        survivor = Rig(restored(left))
        check(survivor.machine)
        assert lent(survivor.machine) == lent(expected.machine), f"state {number}"


def test_the_cut_sees_memory_that_is_given_back_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method has teeth: with the frame marked as lent first, a cut finds a page in it."""

    def mark_first(self: Any, client: Client, count: int) -> None:
        arena = self._arena
        for first, length in self._frames.allocate(count, LENT):
            for frame in range(first, first + length):
                arena.object[frame] = LENT_FRAME
                arena.index[frame] = client.number
                arena.state[frame] = HELD
            arena.punch(first, length)
            client.lent.extend(range(first, first + length))
        self.lent += count

    arena = restored(prepared(full=True))
    rig = Rig(arena)
    monkeypatch.setattr(Loans, "lend", mark_first)
    images = images_of(arena, {*WRITERS, __file__}, lambda: do(rig, [lends("b", 30)]))

    dirty = 0
    for left in images:
        machine = Rig(restored(left)).machine
        data = machine.store.arena.data
        for frames in lent(machine).values():
            dirty += sum(any(data[n * PAGE_BYTES : (n + 1) * PAGE_BYTES]) for n in frames)
    assert dirty > 0


def test_a_machine_that_does_not_lend_has_what_another_had_lent() -> None:
    """Switched off between two starts: the guests keep their RAM, and nobody counts it."""
    arena = restored(prepared())
    free = Rig(arena).machine.store.frames.free
    lend(Rig(arena).machine, "a", 9)

    machine = Machine(arena)
    found = recover(machine)

    assert found.lent_frames == 0
    assert machine.store.frames.free == free
    check(machine)


def test_a_call_does_a_bounded_amount_of_work() -> None:
    """Whatever a guest wants; and what a guest had that is gone is freed in slices."""
    machine = Machine(private_arena(layout(5000).end), lends=True)
    assert [lend(machine, "a", 4000) for _ in range(5)] == [1024, 2048, 3072, 4000, 4000]
    assert [lend(machine, "a", 1000) for _ in range(4)] == [2976, 1952, 1000, 1000]
    machine.depart(machine.clients["a"])
    assert machine.store.frames.free == 4000
    assert machine.store.reap(REAP_SLICE_PAGES) == REAP_SLICE_PAGES
    check(machine)
    assert machine.store.reap(REAP_SLICE_PAGES) == 1000 - REAP_SLICE_PAGES
    machine.store.reap()
    assert not machine.store.doomed
    check(machine)
    assert FRAMES_A_CALL == 1024


def test_numbers_of_guests_that_had_ram_are_used_again() -> None:
    """When their frames are free, which is brought about if there is no other number left."""
    machine = Machine(private_arena(layout(1000).end), lends=True)
    for _ in range(3 * GUESTS_MAX):
        assert lend(machine, "a", 2) == 2
        machine.depart(machine.clients["a"])
    check(machine)
    while machine.store.doomed:
        machine.store.reap()
    assert len(machine.free_guest_numbers) == GUESTS_MAX
    assert machine.store.frames.free == 1000


def test_targets_are_not_divided_for_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that is lent one frame and gives it back, all day long, moves nobody's target."""
    divisions = 0

    def division(_self: object) -> Iterator[None]:
        nonlocal divisions
        divisions += 1
        yield

    machine = Machine(private_arena(layout(5000).end), lends=True)
    monkeypatch.setattr(
        hypervisor.balance.Balance,
        "_division",
        division,
    )
    for _ in range(100):
        lend(machine, "a", 1)
        lend(machine, "a", 0)
    assert divisions == 0
    for _ in range(4):
        lend(machine, "a", 800)
        lend(machine, "a", 0)
    assert 4 <= divisions <= 8


def test_lent_memory_is_the_hosts(cluster_name: str, tmp_path: Path) -> None:
    """The segment shrinks by what is lent, and grows again only by what is put."""
    registry = Registry(tmp_path)
    name = f"{cluster_name}-lent"
    mapping = create_segment(f"/{name}", layout(2048).end, registry)
    try:
        machine = Machine(format_arena(mapping), lends=True)
        store = machine.store
        noise = random.Random(1).randbytes(PAGE_BYTES)
        for frame in range(2048):
            store.arena.data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES] = noise
        before = allocated_bytes(f"/{name}")
        assert [lend(machine, "a", 1500) for _ in range(2)] == [1024, 1500]
        columns = 16
        assert before - allocated_bytes(f"/{name}") >= (1500 - columns) * PAGE_BYTES
        small = allocated_bytes(f"/{name}")
        assert [lend(machine, "a", 0) for _ in range(2)] == [476, 0]
        assert allocated_bytes(f"/{name}") == small
        store.arena.close()
    finally:
        remove_segment(f"/{name}", registry)


def _count(machine: Machine) -> None:
    machine.store.loans.lent += 1


def _forget(machine: Machine) -> None:
    machine.clients["a"].lent.pop()
    machine.store.loans.lent -= 1


def _steal(machine: Machine) -> None:
    frame = machine.clients["a"].lent.pop()
    machine.attach("b", 1, 1, 0)
    machine.clients["b"].lent.append(frame)


def _sleep(machine: Machine) -> None:
    machine.depart(machine.clients["a"])
    machine.store.doomed = False


def _reuse_number(machine: Machine) -> None:
    number = machine.clients["a"].number
    machine.depart(machine.clients["a"])
    machine.free_guest_numbers.append(number)


def _reserve(machine: Machine) -> None:
    machine.settings["z"] = Settings(reserve_bytes=60 * PAGE_BYTES)


@pytest.mark.parametrize("tamper", [_count, _forget, _steal, _sleep, _reuse_number, _reserve])
def test_the_walker_counts_what_is_lent(tamper: Callable[[Machine], None]) -> None:
    """Each way in which counts, guests and segment can contradict each other."""
    machine = Machine(private_arena(layout(64).end), lends=True)
    lend(machine, "a", 10)
    check(machine)
    tamper(machine)

    with pytest.raises(InvariantError, match="lent"):
        check(machine)


def test_a_random_history_of_ram_and_pages() -> None:
    """No persistent page is lost to anybody's RAM, nobody has more than is there, and as much is
    lent as can be."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    arena: Arena = restored(prepared())
    rig = Rig(arena)
    kept: dict[tuple[str, int], bytes] = {}
    for step in range(240):
        name = rng.choice("abc")
        choice = rng.randrange(10)
        if choice < 4:
            had = len(rig.machine.clients[name].lent)
            wanted = rng.choice((0, rng.randrange(96), had + 1, 2000))
            has = lend(rig.machine, name, wanted)
            assert min(had, wanted) <= has <= max(had, wanted)
            if has < wanted:
                store = rig.machine.store
                everything_ephemeral = not any(m.pages for m in store.victims.members.values())
                assert not store.frames.free
                assert everything_ephemeral or store.evictions_left <= 0
        elif choice < 7:
            index = rng.randrange(24)
            kind = rng.choice((E, P, P))
            page = raw(rng.randrange(1 << 20))
            done = rig.put(name, kind, 60, index, page)
            if kind == P:
                kept.pop((name, index), None)
                if done:
                    kept[name, index] = page
        elif choice < 8 and kept:
            name, index = rng.choice(sorted(kept))
            assert rig.call(name, Op.GET_PAGE, P, 60, index, 1) == 1
            assert rig.window.slot(0) == kept[name, index]
        elif choice < 9:
            index = rng.randrange(24)
            rig.call(name, Op.FLUSH_PAGE, P, 60, index, 1)
            kept.pop((name, index), None)
        elif step % 3 == 0:
            counts = {one.name: len(one.lent) for one in rig.machine.clients.values()}
            rig = Rig(arena)
            assert counts == {one.name: len(one.lent) for one in rig.machine.clients.values()}
        check(rig.machine)
