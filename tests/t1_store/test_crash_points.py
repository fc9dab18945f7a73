"""The hypervisor is killed before every single bytecode of an operation, and started again.

Every state in which a kill may leave the arena (`tests.support.kills`) is given to a fresh machine,
which recovers from the bytes alone.  Then every page is as it was before the operation or as the
operation leaves it, an ephemeral one may have gone; the invariants hold, and the survivor serves.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from hypervisor.administration import Administration
from hypervisor.arena import FRAMES_MIN, Arena, format_arena, layout
from hypervisor.auth import Grants, Role
from hypervisor.entries import Entries
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Member, Settings
from hypervisor.recovery import recover
from hypervisor.sharing import Sharing
from ipc.abi import PAGE_BYTES, REPLY, REQUEST, Op, oid_from_int, pool_flag_word
from ipc.window import Window, anonymous_window
from tests.support.expectations import held_pages
from tests.support.kills import RECOVERERS, WRITERS, images_of, killed_at

FRAMES = 96
ARENA_BYTES = -(-layout(FRAMES).end // mmap.PAGESIZE) * mmap.PAGESIZE
E, P, ES, PS = range(4)
"""Pool ids of guest `a`: private and shared, ephemeral and persistent.  `b` is in ES and PS too."""
UUIDS = {ES: b"E" * 16, PS: b"P" * 16}
Key = tuple[int, int, int]
"""pool record, object id, index."""
Contents = dict[Key, bytes]

assert FRAMES >= FRAMES_MIN


class Rig:
    """A machine recovered from an arena; `a` and `b` compress and share, `c` does neither, `e`
    compresses and shares with nobody."""

    def __init__(self, arena: Arena) -> None:
        group = {"compress": True, "sharing": Sharing.GROUP, "group": "g"}
        grants = Grants()
        for uuid in UUIDS.values():
            for name in "abcd":
                grants.allow(uuid, name, Role.WRITER)
        self.machine = Machine(
            arena,
            scheduling="static",
            lends=True,
            settings={
                "a": Settings(**group),  # type: ignore[arg-type]
                "b": Settings(**group),  # type: ignore[arg-type]
                "c": Settings(),
                "e": Settings(compress=True),
            },
            grants=grants,
            secret=b"seed",
        )
        recover(self.machine)
        self.window: Window = anonymous_window()

    def call(
        self,
        name: str,
        op: Op,
        pool: int = 0,
        oid: int = 0,
        index: int = 0,
        count: int = 0,
        token: int = 0,
    ) -> int:
        """The map of the reply."""
        request = REQUEST.pack(1, op, 0, count, pool, index, oid_from_int(oid), 0, token, 0)
        client = self.machine.attach(name, 1, 1, 0)
        assert client is not None
        return int(REPLY.unpack(self.machine.execute(client, request, self.window))[5])

    def join(self, name: str) -> None:
        for kind in (E, P, ES, PS):
            word = pool_flag_word(persist=kind in (P, PS), shared=kind in UUIDS)
            uuid = int.from_bytes(UUIDS.get(kind, b"\xff" * 16), "little")
            self.call(name, Op.NEW_POOL, word, uuid)

    def put(self, name: str, pool: int, oid: int, index: int, *pages: bytes, token: int = 0) -> int:
        for slot, page in enumerate(pages):
            self.window.slot(slot)[:] = page
        return self.call(name, Op.PUT_PAGE, pool, oid, index, len(pages), token)

    def ask(self, **record: Any) -> None:
        assert "error" not in Administration(self.machine).answer(record)

    def contents(self) -> Contents:
        """All pages, read without removing any."""
        return {
            (pool.number, oid, index): page
            for pool in self.machine.memberships.all_pools(self.machine.clients)
            for (oid, index), page in held_pages(pool, self.machine).items()
        }

    def members(self, pool_id: int) -> list[Member]:
        """Of the pool that guests know by this id."""
        return [one.members[pool_id] for one in self.machine.clients.values()]

    def is_ephemeral(self, pool_number: int) -> bool:
        pools = self.machine.memberships.all_pools(self.machine.clients)
        return all(not pool.persistent for pool in pools if pool.number == pool_number)


def raw(version: int) -> bytes:
    """A page that does not shrink."""
    return random.Random(version).randbytes(PAGE_BYTES)


def poor(version: int) -> bytes:
    """A page that is worth compressing, a different size each; LZ4HC makes some of them smaller."""
    rng = random.Random(version)
    words = [rng.randbytes(rng.randrange(3, 9)) for _ in range(24)]
    text = b"".join(rng.choice(words) for _ in range(rng.randrange(60, 400)))
    return (b"%8d" % version + text).ljust(PAGE_BYTES, b".")[:PAGE_BYTES]


def lean(version: int) -> bytes:
    """A page that shrinks to one size, whatever it says."""
    return raw(version)[:700].ljust(PAGE_BYTES, b"\0")


def filled(version: int) -> bytes:
    """A page of one pattern."""
    return version.to_bytes(8, "little") * (PAGE_BYTES // 8)


def mixed(version: int) -> list[bytes]:
    """Eight neighbours: every way to store a page, some of them twice."""
    return [
        filled(version),
        poor(version),
        raw(version),
        poor(7),
        raw(version + 1),
        raw(7),
        filled(0),
        poor(version),
    ]


@cache
def prepared(*, full: bool = False, sparse: bool = False) -> bytes:
    """The bytes of an arena with all kinds of pools and pages; `full` of ephemeral pages up to a
    few frames, or with slabs that are mostly holes."""
    mapping = mmap.mmap(-1, ARENA_BYTES)
    rig = Rig(format_arena(mapping))
    for name in "abc":
        rig.join(name)
    for pool in (E, P, ES, PS):
        rig.put("a", pool, 1, 60, *mixed(10 * pool + 100))
        rig.put("a", pool, 2, 5, raw(pool))
    rig.put("b", ES, 3, 0, *mixed(200))
    rig.put("b", PS, 3, 0, *mixed(210))
    rig.put("b", E, 1, 0, raw(7), poor(7))
    rig.put("c", PS, 4, 0, raw(220), filled(220))
    rig.put("c", ES, 4, 0, raw(230), filled(230))
    if sparse:
        for index in range(40):
            rig.put("a", E, 8, index, lean(1000 + index))
            rig.put("a", P, 8, index, lean(2000 + index))
        for index in range(40):
            if index % 5:
                rig.call("a", Op.FLUSH_PAGE, E, 8, index, 1)
                rig.call("a", Op.FLUSH_PAGE, P, 8, index, 1)
        assert rig.machine.store.contents.compact(0) == 0
    index = 0
    while full and (room := rig.machine.store.frames.free - 4) > 0:
        rig.put("c", E, 9, index, *[raw(300 + n) for n in range(index, index + min(room, 8))])
        index += min(room, 8)
    check(rig.machine)
    return mapping[:]


def prepared_unshared() -> bytes:
    """The bytes of an arena in which nobody shares anything."""
    mapping = mmap.mmap(-1, ARENA_BYTES)
    rig = Rig(format_arena(mapping))
    rig.join("e")
    for pool in (E, P):
        rig.put("e", pool, 1, 60, *mixed(10 * pool + 100))
        rig.put("e", pool, 2, 5, raw(pool))
    # Left raw: how is all one.
    rig.ask(verb="set", guest="e", compress=False)
    rig.put("e", P, 3, 62, *mixed(130))
    check(rig.machine)
    return mapping[:]


def restored(image: bytes) -> Arena:
    """A copy of an arena."""
    mapping = mmap.mmap(-1, len(image))
    mapping[:] = image
    return Arena(mapping)


def reap(rig: Rig) -> None:
    """All that is doomed."""
    while rig.machine.store.doomed:
        rig.machine.store.reap(16)


def recompress(rig: Rig) -> None:
    """Every page once."""
    contents = rig.machine.store.contents
    assert contents.recompress(rig.machine.store.sequence, 0, 60)
    assert contents.recompressed.pages


def compact(rig: Rig) -> None:
    """Some spans' worth."""
    assert rig.machine.store.contents.compact(30) > 2


def squeeze(rig: Rig) -> None:
    """Compress what was left raw."""
    rig.machine.store.deferred = True
    assert rig.machine.store.squeeze(8) >= 3


Step = Callable[[Rig], object]


def put(name: str, pool: int, oid: int, index: int, *pages: bytes) -> Step:
    """A put, to be done later."""
    return lambda rig: rig.put(name, pool, oid, index, *pages)


def call(name: str, op: Op, pool: int, oid: int = 0, index: int = 0, count: int = 0) -> Step:
    """A call, to be made later."""
    return lambda rig: rig.call(name, op, pool, oid, index, count)


def join(name: str) -> Step:
    """A guest attaches, makes and joins pools."""
    return lambda rig: rig.join(name)


def ask(**record: Any) -> Step:
    """What the administrator asks."""
    return lambda rig: rig.ask(**record)


def depart(name: str) -> Step:
    """A guest's death."""
    return lambda rig: rig.machine.depart(rig.machine.clients[name])


def rows(first: int, count: int) -> list[bytes]:
    """Raw pages."""
    return [raw(first + number) for number in range(count)]


ROOMY: dict[str, list[Step]] = {
    "put a raw page": [put("c", P, 5, 0, raw(1))],
    "put a same-filled page": [put("a", P, 5, 0, filled(1))],
    "put a compressed page": [put("a", P, 5, 0, poor(1))],
    "put a page that is there already": [put("b", P, 5, 0, poor(7))],
    "put a raw page that is there already": [put("b", P, 5, 0, raw(7))],
    "put an extent of all kinds": [put("a", P, 5, 62, *mixed(1))],
    "put an extent of all kinds into a shared pool": [put("b", PS, 5, 62, *mixed(1))],
    "put an extent of a guest that encodes nothing": [put("c", P, 5, 62, *mixed(1))],
    "replace a raw page": [put("c", PS, 4, 0, raw(1))],
    "replace pages of all kinds": [put("a", P, 1, 60, *reversed(mixed(1)))],
    "replace pages with the same pages": [put("a", P, 1, 60, *mixed(110))],
    "replace another guest's pages": [put("a", PS, 3, 0, *mixed(1))],
    "replace ephemeral pages in part": [put("a", E, 1, 58, *mixed(1))],
    "get one ephemeral page": [call("a", Op.GET_PAGE, E, 2, 5, 1)],
    "get an ephemeral extent": [call("a", Op.GET_PAGE, E, 1, 60, 8)],
    "get a shared ephemeral extent": [call("b", Op.GET_PAGE, ES, 1, 60, 8)],
    "get persistent pages": [call("a", Op.GET_PAGE, P, 1, 60, 8)],
    "flush an extent": [call("a", Op.FLUSH_PAGE, P, 1, 61, 6)],
    "flush another guest's pages": [call("b", Op.FLUSH_PAGE, PS, 1, 61, 6)],
    "flush an object and reap": [call("a", Op.FLUSH_OBJECT, P, 1), reap],
    "destroy a pool and reap": [call("a", Op.DESTROY_POOL, P), reap],
    "make a pool": [call("a", Op.NEW_POOL, pool_flag_word(persist=True))],
    "a guest attaches, makes and joins pools": [join("d"), put("d", PS, 6, 0, raw(1))],
    "a guest leaves a shared pool": [call("b", Op.DESTROY_POOL, PS)],
    "all leave a shared pool": [*(call(name, Op.DESTROY_POOL, PS) for name in "bac"), reap],
    "an heir leaves in turn": [call("a", Op.DESTROY_POOL, ES), call("b", Op.DESTROY_POOL, ES)],
    "what was inherited goes, and its slot is used again": [
        call("c", Op.DESTROY_POOL, PS),
        call("a", Op.FLUSH_OBJECT, PS, 4),
        reap,
        join("c"),
    ],
    "a guest departs": [depart("a"), reap],
    "a guest departs that encodes nothing": [depart("c"), reap],
    "the administrator destroys a guest's pools": [ask(verb="destroy", guest="a"), reap],
    "recompress": [recompress],
}
FULL: dict[str, list[Step]] = {
    "put an extent that evicts": [put("c", P, 5, 62, *rows(400, 8))],
    "put pages of all kinds that evict": [put("b", P, 5, 62, *mixed(1))],
    "put one page that evicts": [put("a", P, 5, index, poor(index)) for index in range(3)],
    "the administrator flushes": [ask(verb="flush", size_bytes=30 * PAGE_BYTES)],
    "the administrator flushes one guest": [
        ask(verb="flush", guest="a", size_bytes=30 * PAGE_BYTES)
    ],
}
SPARSE: dict[str, list[Step]] = {
    "compact": [compact],
    "compact what was recompressed": [recompress, compact],
}
UNSHARED: dict[str, list[Step]] = {
    "put an extent of one that shares with nobody": [put("e", P, 5, 62, *mixed(1))],
    "replace pages of one that shares with nobody": [put("e", P, 1, 60, *reversed(mixed(1)))],
    "get an ephemeral extent of one that shares with nobody": [call("e", Op.GET_PAGE, E, 1, 60, 8)],
    "squeeze pages that were left raw": [squeeze],
    "flush an extent of one that shares with nobody": [call("e", Op.FLUSH_PAGE, P, 1, 61, 6)],
}
ACTIONS: dict[str, tuple[Callable[[], bytes], list[Step]]] = {
    **{name: (prepared, steps) for name, steps in ROOMY.items()},
    **{name: (lambda: prepared(full=True), steps) for name, steps in FULL.items()},
    **{name: (lambda: prepared(sparse=True), steps) for name, steps in SPARSE.items()},
    **{name: (prepared_unshared, steps) for name, steps in UNSHARED.items()},
}


def do(rig: Rig, steps: list[Step]) -> None:
    """One after the other."""
    for step in steps:
        step(rig)


def images_during(image: bytes, steps: list[Step]) -> tuple[Rig, list[bytes]]:
    """The rig after the steps, and what a kill during them leaves."""
    arena = restored(image)
    rig = Rig(arena)
    images = images_of(arena, WRITERS, lambda: do(rig, steps))
    check(rig.machine)
    return rig, list(dict.fromkeys(images))


@pytest.mark.parametrize("name", list(ACTIONS))
def test_a_kill_at_any_bytecode_loses_nothing_and_revives_nothing(name: str) -> None:
    """Every page is as it was before the operation, or as the operation leaves it."""
    prepare, steps = ACTIONS[name]
    image = prepare()
    start = Rig(restored(image))
    before = start.contents()
    finished, images = images_during(image, steps)
    after = finished.contents()
    ephemeral = {
        number: start.is_ephemeral(number) and finished.is_ephemeral(number)
        for number, _, _ in before.keys() | after.keys()
    }

    for number, left in enumerate(images):
        survivor = Rig(restored(left))
        check(survivor.machine)
        now = survivor.contents()
        for key in before.keys() | after.keys() | now.keys():
            allowed = {before.get(key), after.get(key)}
            if ephemeral.get(key[0]):
                # Room was made: an ephemeral page may go at any time, but only whole.
                allowed.add(None)
            assert now.get(key) in allowed, f"state {number} of {len(images)}: {key}"
        if number % 8 == 0:
            serve(survivor)
    assert len(images) > 1 or after == before


FENCED: dict[str, list[Step]] = {
    "put under a newer token": [lambda rig: rig.put("b", ES, 1, 60, *mixed(1), token=9)],
    "flush under a newer token": [lambda rig: rig.call("b", Op.FLUSH_PAGE, ES, 1, 61, 6, 9)],
    "flush an object under a newer token": [
        lambda rig: rig.call("b", Op.FLUSH_OBJECT, ES, 1, token=9),
        reap,
    ],
    "flush what is not there": [lambda rig: rig.call("b", Op.FLUSH_PAGE, ES, 77, 0, 1, 9)],
}


@pytest.mark.parametrize("name", list(FENCED))
def test_a_kill_never_lets_an_older_put_in(name: str) -> None:
    """Once anything that the call does can be seen, an older put is refused; what is there before
    that is as good as ever, and an older put is as good as it was."""
    arena = restored(prepared())
    rig = Rig(arena)
    rig.put("a", ES, 50, 0, raw(50), token=5)
    before = rig.contents()
    _, images = images_during(arena.mapping[:], FENCED[name])
    fenced = 0
    for number, left in enumerate(images):
        survivor = Rig(restored(left))
        check(survivor.machine)
        newest = {m.tokens.newest for m in survivor.members(ES) if m.tokens is not None}
        assert newest in ({5}, {9}), f"state {number}"
        now = survivor.contents()
        if newest == {9}:
            fenced += 1
            assert survivor.put("a", ES, 1, 60, raw(1), token=8) == 0, f"state {number}"
            assert survivor.contents() == now
        else:
            assert now == before, f"state {number}: it was done before the segment knew its token"
        assert survivor.put("a", ES, 1, 60, raw(1), token=9) == 1
    assert 0 < fenced < len(images)


def serve(rig: Rig) -> None:
    """What was recovered goes on serving."""
    for name in list(rig.machine.clients):
        for pool in list(rig.machine.clients[name].members):
            if rig.put(name, pool, 77, 3, raw(77), poor(77)) == 3:
                assert rig.call(name, Op.GET_PAGE, pool, 77, 4, 1) == 1
                assert rig.window.slot(0) == poor(77)
    rig.machine.store.reap(1000)
    check(rig.machine)


@pytest.mark.parametrize(
    "name", ["a guest departs", "put an extent of all kinds", "compact what was recompressed"]
)
def test_recovery_itself_can_be_killed_at_any_bytecode(name: str) -> None:
    """A hypervisor that dies while it recovers from a death is recovered by the next one."""
    prepare, steps = ACTIONS[name]
    _, images = images_during(prepare(), steps)
    first = images[len(images) * 2 // 3]
    expected = Rig(restored(first)).contents()
    arena = restored(first)
    states = images_of(arena, RECOVERERS, lambda: Rig(arena))
    assert len(states) > 2
    for number, left in enumerate(dict.fromkeys(states)):
        survivor = Rig(restored(left))
        check(survivor.machine)
        assert survivor.contents() == expected, f"state {number}"


def test_the_cut_sees_a_broken_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method has teeth: with the state word published before the rest, a cut finds it."""

    def publish_first(
        self: Any,
        number: int,
        object_number: int,
        index: int,
        location: int,
        pattern: int,
        state: int,
    ) -> None:
        words, at = self._words, self.at(number)
        words[at] = state
        words[at + 1] = object_number | index << 32
        words[at + 2] = location
        words[at + 3] = pattern

    image = prepared()
    before = Rig(restored(image)).contents()
    monkeypatch.setattr(Entries, "publish", publish_first)
    arena = restored(image)
    rig = Rig(arena)
    steps = ROOMY["replace pages of all kinds"]
    files = {*WRITERS, __file__}
    images = images_of(arena, files, lambda: do(rig, steps))
    after = rig.contents()

    wrong = 0
    for left in images:
        try:
            now = Rig(restored(left)).contents()
        except Exception:  # noqa: BLE001  (recovery may trip over what must not be)
            wrong += 1
        else:
            wrong += any(now.get(key) not in (before.get(key), after.get(key)) for key in after)
    assert wrong > 0


def test_states_are_what_kills_leave() -> None:
    """The shortcut is one: a kill before every single bytecode leaves no state that was not among
    those looked at."""
    image = prepared()
    steps = ROOMY["put a page that is there already"]
    _, images = images_during(image, steps)
    known = set(images)
    number = 0
    while True:
        arena = restored(image)
        rig = Rig(arena)
        if not killed_at(number, WRITERS, lambda rig=rig: do(rig, steps)):  # type: ignore[misc]
            break
        assert arena.mapping[:] in known
        number += 7
    assert number > 100


def test_a_dead_hypervisor_leaves_no_sequence_behind() -> None:
    """A5: the survivor's first put is younger than anything there is."""
    arena = restored(prepared())
    rig = Rig(arena)
    rig.put("a", P, 5, 0, raw(1))
    survivor = Rig(arena)
    survivor.put("a", P, 5, 0, raw(2))

    again = Rig(arena)

    (pool,) = [m.pool for m in again.machine.clients["a"].members.values() if m.pool_id == P]
    assert again.contents()[pool.number, 5, 0] == raw(2)
