"""Random calls of several guests against a plain dictionary.

The model may lose an ephemeral page at any time; it never accepts a wrong, stale or foreign one,
nor the loss of a persistent one.  Between calls the hypervisor is restarted on the same arena,
guests die, doomed pages are reaped, and the invariants are walked.
"""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.arena import Arena, format_arena
from hypervisor.eviction import POLICIES
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.recovery import recover
from ipc.abi import REQUEST, Op, Reply, oid_from_int, pool_flag_word
from ipc.limits import WINDOW_SLOTS
from ipc.window import anonymous_window
from ipc.wire import decode_reply

ARENA_BYTES = 1 << 20
GUESTS = ("a", "b", "c")
Key = tuple[str, int, int, int]
"""guest, pool (0 ephemeral, 1 persistent), object, index."""


class World:
    """A machine, three guests with two pools each, and what their pages should hold."""

    def __init__(self, seed: int, policy: str) -> None:
        self.random = random.Random(seed)
        self.policy = policy
        self.mapping = mmap.mmap(-1, ARENA_BYTES)
        format_arena(self.mapping)
        self.windows = {name: anonymous_window() for name in GUESTS}
        self.pages: dict[Key, int] = {}
        self.version = 0
        self.start()
        for name in GUESTS:
            self.join(name)

    def start(self) -> None:
        self.machine = Machine(Arena(self.mapping), policy=self.policy)
        recover(self.machine)

    def join(self, name: str) -> None:
        self.machine.attach(name, 1, 1, 0)
        for persist in (False, True):
            self.call(name, Op.NEW_POOL, pool_flag_word(persist=persist))

    def call(
        self,
        name: str,
        op: Op,
        pool: int = 0,
        oid: int = 0,
        index: int = 0,
        count: int = 0,
        slot: int = 0,
    ) -> Reply:
        request = REQUEST.pack(1, op, 0, count, pool, index, oid_from_int(oid), slot, 0, 0)
        client = self.machine.clients[name]
        return decode_reply(self.machine.execute(client, request, self.windows[name]))

    def step(self) -> None:
        rng = self.random
        name = rng.choice(GUESTS)
        pool = rng.choice((0, 0, 1))
        oid = rng.randrange(5)
        count = rng.choice((1, 1, 1, 3, 32, 64))
        index = rng.choice((rng.randrange(100), rng.randrange(100), 2**32 - 64 - rng.randrange(64)))
        slot = rng.randrange(WINDOW_SLOTS - count + 1)
        choice = rng.random()
        if choice < 0.45:
            self.put(name, pool, oid, index, count, slot)
        elif choice < 0.75:
            self.get(name, pool, oid, index, count, slot)
        elif choice < 0.87:
            self.call(name, Op.FLUSH_PAGE, pool, oid, index, count)
            self.forget(lambda key: key[:3] == (name, pool, oid) and 0 <= key[3] - index < count)
        elif choice < 0.92:
            self.call(name, Op.FLUSH_OBJECT, pool, oid)
            self.forget(lambda key: key[:3] == (name, pool, oid))
        elif choice < 0.94:
            self.call(name, Op.DESTROY_POOL, pool)
            assert self.call(name, Op.NEW_POOL, pool_flag_word(persist=pool == 1)).value == pool
            self.forget(lambda key: key[:2] == (name, pool))
        elif choice < 0.96:
            self.machine.depart(self.machine.clients[name])
            self.join(name)
            self.forget(lambda key: key[0] == name)
        elif choice < 0.98:
            self.machine.store.reap(rng.randrange(1, 40))
        else:
            self.start()

    def forget(self, condition: Callable[[Key], bool]) -> None:
        self.pages = {key: value for key, value in self.pages.items() if not condition(key)}

    def put(self, name: str, pool: int, oid: int, index: int, count: int, slot: int) -> None:
        first = self.version + 1
        self.version += count
        for at in range(count):
            struct.pack_into("<Q", self.windows[name].slot(slot + at), 0, first + at)
            struct.pack_into("<Q", self.windows[name].slot(slot + at), 4088, first + at)
        reply = self.call(name, Op.PUT_PAGE, pool, oid, index, count, slot)
        for at in range(count):
            key = (name, pool, oid, index + at)
            if reply.map >> at & 1:
                self.pages[key] = first + at
            else:
                self.pages.pop(key, None)

    def get(self, name: str, pool: int, oid: int, index: int, count: int, slot: int) -> None:
        reply = self.call(name, Op.GET_PAGE, pool, oid, index, count, slot)
        for at in range(count):
            key = (name, pool, oid, index + at)
            if reply.map >> at & 1:
                page = self.windows[name].slot(slot + at)
                ends = struct.unpack_from("<Q", page, 0) + struct.unpack_from("<Q", page, 4088)
                assert ends == (self.pages[key],) * 2
                if pool == 0:
                    del self.pages[key]
            elif pool == 1:
                assert key not in self.pages, f"a persistent page is lost: {key}"
            else:
                self.pages.pop(key, None)


@pytest.mark.parametrize("policy", list(POLICIES))
@settings(
    max_examples=25, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(seed=st.integers(0, 2**32), steps=st.integers(50, 400))
def test_no_page_is_wrong_stale_foreign_or_lost(policy: str, seed: int, steps: int) -> None:
    """A failure prints the seed that replays it."""
    world = World(seed, policy)
    for number in range(steps):
        world.step()
        if number % 8 == 0:
            check(world.machine)
    check(world.machine)
