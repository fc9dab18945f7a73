"""Bits flip in the segment, and nobody ever gets a wrong page.

A machine with checksums works over a real segment in /dev/shm, of which random bits are turned from
outside: in pages, entries, columns and object records.  What a get returns is what was put last, or
nothing, or the error that says so.  A machine that dies of what it finds is started again, as the
supervisor would do it; one that can't recover begins anew.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hypervisor.deferral
from hypervisor.arena import Arena, format_arena, layout
from hypervisor.auth import Grants, Role
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from hypervisor.recovery import recover
from hypervisor.sharing import Sharing
from ipc.abi import PAGE_BYTES, REPLY, REQUEST, Op, Reason, Status, oid_from_int, pool_flag_word
from ipc.names import Registry
from ipc.segment import SHARED_MEMORY_DIRECTORY, create_segment, remove_segment
from ipc.window import anonymous_window

FRAMES = 192
KINDS = ((False, False), (True, False), (False, True), (True, True))
"""Pool ids are places in it: (persistent, shared)."""
GUESTS = ("packs", "plain", "later")
STEPS = 260
Key = tuple[str, int, int, int]
"""guest (of a shared pool: ""), pool, object, index."""


class Rig:
    """A machine over a segment, and what two guests have put."""

    def __init__(self, segment: mmap.mmap) -> None:
        self.segment = segment
        self.window = anonymous_window()
        self.grants = Grants()
        for name in GUESTS:
            for pool in (2, 3):
                self.grants.allow(bytes([pool]) * 16, name, Role.WRITER)
        self.seen: Counter[str] = Counter()
        self.arenas: list[Arena] = []
        self.begin(format_arena(segment, checksums=True))

    def begin(self, arena: Arena) -> None:
        """A hypervisor starts; with an arena that is new nothing is known."""
        self.truth: dict[Key, set[bytes]] = {}
        """What a page may be: more than one if a put was cut short."""
        self.machine = self.start(arena)
        for name in GUESTS:
            for pool, (persist, shared) in enumerate(KINDS):
                uuid = bytes([pool]) * 16 if shared else b"\xff" * 16
                word = pool_flag_word(persist=persist, shared=shared)
                made = self.call(name, Op.NEW_POOL, word, int.from_bytes(uuid, "little"))
                assert made[6] == pool

    def close(self) -> None:
        """Unmap the segment, of which each arena has views."""
        for arena in self.arenas:
            with contextlib.suppress(BufferError):
                arena.close()

    def start(self, arena: Arena) -> Machine:
        self.arenas.append(arena)
        packs = Settings(compress=True, sharing=Sharing.GROUP, group="g")
        machine = Machine(
            arena,
            scheduling="static",
            settings={"packs": packs, "plain": Settings(), "later": Settings(compress=True)},
            grants=self.grants,
            secret=b"seed",
        )
        recover(machine)
        return machine

    def restart(self) -> None:
        """As after SIGKILL; what can't be recovered is given up, as `hypervisor.boot` does."""
        self.seen["restarts"] += 1
        try:
            machine = self.start(Arena(self.segment))
            if set(GUESTS) - set(machine.clients):
                raise LookupError("a guest is not known any more")
        except Exception:  # noqa: BLE001
            self.seen["given up"] += 1
            self.segment[:] = bytes(len(self.segment))
            self.begin(format_arena(self.segment, checksums=True))
        else:
            self.machine = machine

    def call(
        self, name: str, op: Op, pool: int, oid: int, index: int = 0, count: int = 0
    ) -> tuple[int, ...]:
        """The fields of the reply."""
        client = self.machine.attach(name, 1, 1, 0)
        assert client is not None
        request = REQUEST.pack(1, op, 0, count, pool, index, oid_from_int(oid), 0, 0, 0)
        reply: tuple[int, ...] = REPLY.unpack(self.machine.execute(client, request, self.window))
        return reply

    def key(self, name: str, pool: int, oid: int, index: int) -> Key:
        return "" if KINDS[pool][1] else name, pool, oid, index

    def put(self, name: str, pool: int, oid: int, index: int, pages: list[bytes]) -> None:
        for slot, page in enumerate(pages):
            self.window.slot(slot)[:] = page
        for at, page in enumerate(pages):
            self.truth.setdefault(self.key(name, pool, oid, index + at), set()).add(page)
        bitmap = self.call(name, Op.PUT_PAGE, pool, oid, index, len(pages))[5]
        for at, page in enumerate(pages):
            # The old page is nothing to be had, whatever became of the new one.
            key = self.key(name, pool, oid, index + at)
            if bitmap >> at & 1:
                self.truth[key] = {page}
            else:
                del self.truth[key]

    def get(self, name: str, pool: int, oid: int, index: int, count: int) -> None:
        reply = self.call(name, Op.GET_PAGE, pool, oid, index, count)
        if reply[1] == Status.EIO:
            assert reply[2] == Reason.DAMAGED
            assert KINDS[pool][0], "an ephemeral page is a miss"
            self.seen["told"] += 1
        for at in range(count):
            key = self.key(name, pool, oid, index + at)
            if reply[5] >> at & 1:
                page = bytes(self.window.slot(at))
                assert page in self.truth.get(key, ()), f"wrong bytes for {key}"
                self.seen["right"] += 1
                if pool == 0:
                    del self.truth[key]
            elif key in self.truth:
                self.seen["lost"] += 1

    def flush(self, name: str, pool: int, oid: int, index: int) -> None:
        self.call(name, Op.FLUSH_PAGE, pool, oid, index, 1)
        self.truth.pop(self.key(name, pool, oid, index), None)


@pytest.fixture(autouse=True)
def _deferral(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of one guest are compressed later, also in an arena as small as this."""
    monkeypatch.setattr(hypervisor.deferral, "KEPT_FRAMES_LEAST", 4)


@pytest.fixture
def segment(tmp_path: Path, cluster_name: str) -> Iterator[tuple[mmap.mmap, int]]:
    """A segment, and a descriptor of its file."""
    registry = Registry(tmp_path)
    name = f"/tmem-{cluster_name}-rot"
    end = layout(FRAMES, checksums=True).end
    mapping = create_segment(name, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE, registry)
    fd = os.open(SHARED_MEMORY_DIRECTORY / name.lstrip("/"), os.O_RDWR)
    yield mapping, fd
    os.close(fd)
    remove_segment(name, registry)


def page_of(rng: random.Random) -> bytes:
    """Noise, prose that shrinks, one pattern, or one of a few that are put often."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(PAGE_BYTES)
    if kind == 1:
        return rng.randbytes(rng.randrange(300, 1500)).ljust(PAGE_BYTES, b".")
    if kind == 2:
        return rng.randbytes(8) * (PAGE_BYTES // 8)
    return random.Random(rng.randrange(4)).randbytes(PAGE_BYTES)


def flip(fd: int, rng: random.Random, bits: int) -> None:
    """Turn bits behind the records, from outside: in each column as many as in all pages."""
    where = layout(FRAMES, checksums=True)
    ends = [*where[where.index(where.state_column) :]]
    for _ in range(bits):
        region = rng.randrange(len(ends) - 1)
        at = rng.randrange(ends[region], ends[region + 1])
        os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1 << rng.randrange(8)]), at)


def work(rig: Rig, rng: random.Random) -> None:
    """One call."""
    name, pool = rng.choice(GUESTS), rng.randrange(len(KINDS))
    oid, index, count = rng.randrange(1, 4), rng.randrange(70), rng.choice((1, 1, 1, 4, 9))
    what = rng.random()
    if what < 0.45:
        rig.put(name, pool, oid, index, [page_of(rng) for _ in range(count)])
    elif what < 0.93:
        known = [key for key in rig.truth if key[1] == pool]
        if known:
            name, pool, oid, index = rng.choice(known)
        rig.get(name or rng.choice(GUESTS), pool, oid, index, count)
    elif what < 0.97:
        rig.flush(name, pool, oid, index)
    else:
        rig.machine.idle(16)


def play(rig: Rig, fd: int, seed: int, *, bits: int) -> None:
    """Calls, and now and then some bits, or a kill."""
    rng = random.Random(seed)
    for step in range(STEPS):
        try:
            work(rig, rng)
        except AssertionError as error:
            if "wrong bytes" in str(error) or "is a miss" in str(error):
                raise
            rig.restart()
        except Exception:  # noqa: BLE001
            assert bits, "it died of itself"
            rig.restart()
        if step % 10 == 9 and bits:
            flip(fd, rng, rng.randrange(1, bits))
        if step % 26 == 25:
            rig.restart()
        if not bits:
            check(rig.machine)


def swap_index(arena: Arena, page: int) -> None:
    """A raw page says that it is the one after it."""
    arena.index[page] ^= 2


def swap_object(arena: Arena, page: int) -> None:
    """A raw page says that it is of the other object."""
    arena.object[page] ^= 2


def age(arena: Arena, page: int) -> None:
    """A raw page is of the far future: a put after it would need a larger number than there is."""
    arena.state[page] |= ((1 << 48) - 1) << 16


def rename(arena: Arena, page: int) -> None:
    """The object of a raw page has another id."""
    arena.mapping[arena.layout.object_oid + 24 * arena.object[page]] ^= 8


def move_object(arena: Arena, page: int) -> None:
    """The object of a raw page is in another pool."""
    arena.object_word[arena.object[page]] ^= 3


def double(arena: Arena, page: int) -> None:
    """A record that nobody uses says that it is the object of a raw page, before that one."""
    number = arena.object[page]
    record = arena.read_object(number)
    assert record is not None
    arena.publish_object(number - 1, *record)


def spoil(arena: Arena, page: int) -> None:
    """The bytes of a raw page."""
    arena.data[page * PAGE_BYTES] ^= 1


@pytest.mark.parametrize("pool", [0, 1])
@pytest.mark.parametrize("turn", [swap_index, swap_object, age, rename, move_object, double, spoil])
def test_what_is_found_at_a_restart_is_looked_at(
    segment: tuple[mmap.mmap, int], turn: Callable[[Arena, int], None], pool: int
) -> None:
    """One word of a raw page's description, and its bytes: it is given to nobody, other pages are
    there, and the machine goes on."""
    rig = Rig(segment[0])
    rng = random.Random(1)
    pages = [rng.randbytes(PAGE_BYTES) for _ in range(6)]
    rig.put("plain", 1 - pool, 9, 0, pages[5:])
    for oid in (1, 2, 3):
        rig.put("plain", pool, oid, 0, [pages[oid]])
    rig.flush("plain", pool, 2, 0)  # its record is free, and still says what it was
    pool_objects = rig.machine.clients["plain"].members[pool].pool.objects
    victim = pool_objects.get(oid_from_int(3))
    assert victim is not None
    turn(rig.machine.store.arena, victim.find(0))
    rig.restart()
    assert not rig.seen["given up"]
    assert bool(rig.machine.store.damaged_pages) == (turn is not double)
    for _ in range(2):
        for oid in range(16):
            for at in range(4):
                for other in range(len(KINDS)):
                    rig.get("plain", other, oid, at, 1)
        # It has to be possible to go on, and nothing old may come back then.
        rig.put("plain", pool, 3, 0, [pages[4]])
        rig.get("plain", pool, 3, 0, 1)
        rig.restart()
        check(rig.machine)
    rig.close()
    assert rig.seen["right"] >= 2 + (turn is double)


@pytest.mark.parametrize("seed", range(6))
def test_nobody_gets_a_wrong_page(segment: tuple[mmap.mmap, int], seed: int) -> None:
    """Whatever flips; and most of what is there is still had."""
    mapping, fd = segment
    rig = Rig(mapping)
    play(rig, fd, seed, bits=20)
    rig.close()
    assert rig.seen["right"] > STEPS / 10, rig.seen


def test_without_a_flip_nothing_is_damaged(segment: tuple[mmap.mmap, int]) -> None:
    """No false alarm, and no persistent page is lost in all the restarts."""
    mapping, fd = segment
    rig = Rig(mapping)
    play(rig, fd, 1, bits=0)
    squeezed = rig.machine.store.squeezed_pages
    for index in range(0, 160, 4):
        rig.put("later", 1, 7, index, [page_of(random.Random(index)) for _ in range(4)])
    assert rig.machine.store.squeezed_pages > squeezed
    rig.restart()
    check(rig.machine)
    for name, pool, oid, index in list(rig.truth):
        if KINDS[pool][0]:
            rig.seen["lost"] = 0
            rig.get(name or GUESTS[0], pool, oid, index, 1)
            assert not rig.seen["lost"]
    rig.close()
    assert not rig.machine.store.damaged_pages
    assert not rig.seen["told"]
    assert not rig.seen["given up"]
