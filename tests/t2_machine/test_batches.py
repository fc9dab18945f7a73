"""A batch of puts and the same puts one by one leave the same machine, whatever they meet.

The machine does neighbours of a batch as one extent; nobody may be able to tell.
"""

from __future__ import annotations

import mmap
import random

import pytest

from guests.hypercall import BatchEntry, Hypercalls
from hypervisor.administration import Administration
from hypervisor.arena import Arena, format_arena
from hypervisor.invariants import check
from hypervisor.machine import Machine
from ipc.abi import PAGE_BYTES, CallFlag, Reason, Status, oid_from_int
from ipc.limits import WINDOW_SLOTS
from ipc.local import LocalChannel
from ipc.window import Window

ARENA_BYTES = 2 << 20
"""More than all pages of both pools: what an eviction takes may depend on when it comes."""
OBJECTS = 2
PAGES = 80


class One:
    """A machine with one guest, which has an ephemeral and a persistent pool."""

    def __init__(self) -> None:
        mapping = mmap.mmap(-1, ARENA_BYTES)
        format_arena(mapping)
        self.machine = Machine(Arena(mapping))
        self.administration = Administration(self.machine)
        client = self.machine.attach("guest", 1, 1, 0)
        assert client is not None

        def handle(request: bytes, window: Window) -> bytes:
            return self.machine.execute(client, request, window)

        self.calls = Hypercalls(LocalChannel(handle))
        self.slots = self.calls.channel.window.slots
        self.pools = [self.calls.new_pool(persist=persist).value for persist in (False, True)]

    def ask(self, **record: object) -> None:
        assert "error" not in self.administration.answer(record)

    def content(self) -> list[tuple[int, bytes, int, bytes]]:
        """Every page by its name; takes the ephemeral ones out."""
        return [
            (pool, oid, index, bytes(self.slots[:PAGE_BYTES]))
            for pool in self.pools
            for oid in map(oid_from_int, range(OBJECTS))
            for index in range(PAGES)
            if self.calls.get(pool, oid, index, 1).map
        ]


def random_entries(rng: random.Random, pools: list[int]) -> list[BatchEntry]:
    """Runs of neighbours, some of them broken by another slot, hint, pool or object; pages of
    several runs often stand side by side, as those of a guest's files do."""
    entries: list[BatchEntry] = []
    slot = 0
    while len(entries) < 60:
        pool, oid = rng.choice(pools), oid_from_int(rng.randrange(OBJECTS))
        index = rng.randrange(PAGES - 8)
        if slot > WINDOW_SLOTS - 10 or rng.random() < 0.3:
            slot = rng.randrange(WINDOW_SLOTS - 10)
        hint = rng.choice((0, 0, CallFlag.ACTIVE, CallFlag.LOW))
        count = rng.randrange(1, 9)
        entries += [(pool, index + at, slot + at, int(hint), oid, 0) for at in range(count)]
        slot += count
    return entries[:60]


@pytest.mark.parametrize("seed", range(6))
def test_batch_does_what_single_puts_do(seed: int) -> None:
    """Same statuses, same pages; when frozen, with room, and (persistent pages alone) at a cap."""
    rng = random.Random(seed)
    batched, single = One(), One()
    pools = batched.pools[seed % 2 :]
    for _ in range(12):
        change = rng.randrange(6)
        for one in (batched, single):
            if change == 0:
                one.ask(verb="freeze")
            elif change == 1 and len(pools) == 1:
                one.ask(verb="set", guest="guest", cap_bytes=90 * PAGE_BYTES)
            elif change == 2:
                one.ask(verb="thaw")
                one.ask(verb="set", guest="guest", cap_bytes=0)
        pages = b"".join(
            rng.randbytes(PAGE_BYTES) if rng.random() < 0.9 else bytes([at]) * PAGE_BYTES
            for at in range(WINDOW_SLOTS)
        )
        entries = random_entries(rng, pools)
        batched.slots[:] = single.slots[:] = pages
        reply = batched.calls.put_batch(entries)
        replies = [
            single.calls.put(pool, oid, index, 1, slot, flags)
            for pool, index, slot, flags, oid, _ in entries
        ]
        refusal = next((one for one in replies if one.status != Status.DONE), None)

        assert [reply.map >> at & 1 for at in range(60)] == [one.map for one in replies]
        status, reason = (refusal.status, refusal.reason) if refusal else (Status.DONE, Reason.NONE)
        assert (reply.status, reply.reason) == (status, reason)
        check(batched.machine)
    counts = [
        one.machine.clients["guest"].account.cleancache()["puts"] for one in (batched, single)
    ]
    assert counts[0] == counts[1]
    assert batched.content() == single.content()
