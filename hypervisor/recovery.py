"""Find everything again in an arena whose hypervisor was killed.

Reads only what arena invariants A1 to A5 promise.  It can itself be killed at any instruction and
run again: it frees frames that nobody owns before it frees the object and pool records that would
say so.

  guest records -> clients   pool records -> pools   object words -> objects
  frame states  -> leaves; of two frames with one handle the one of the higher sequence stays (A2)

The cost is one pass over the columns, about half a microsecond a live page.
"""

from __future__ import annotations

from typing import NamedTuple

from hypervisor.arena import PoolRecord
from hypervisor.frames import HOT, PERSISTENT
from hypervisor.machine import Machine
from hypervisor.pools import LEAF_PAGES, Client, Pool, TmemObject
from hypervisor.store import Store
from ipc.abi import GuestId, PoolFlag
from ipc.errors import InvariantError


class Recovered(NamedTuple):
    """What came back, in counts."""

    guests: int
    pools: int
    objects: int
    persistent_pages: int
    ephemeral_pages: int
    frames_freed: int
    """Live frames that nobody owned: of doomed pools and objects, or the older of two."""


def recover(machine: Machine) -> Recovered:
    """Fill a fresh machine from its arena; no client is attached yet."""
    store = machine.store
    arena = store.arena
    if machine.clients or store.objects or store.sequence:
        raise InvariantError("recovery needs a fresh machine")
    by_number: dict[GuestId, Client] = {}
    for record in arena.read_guests():
        client = Client(record.number, record.name, record.pid, record.start_ticks, record.uid)
        machine.clients[record.name] = client
        machine.free_guest_numbers.remove(record.number)
        by_number[record.number] = client
    records = arena.read_pools()
    pools = _recover_pools(store, records, by_number)
    orphans = _recover_objects(store, pools)
    freed = _recover_pages(store)
    for number in orphans:
        arena.free_object(number)
    for pool_record in records:
        if pool_record.number not in pools:
            arena.free_pool(pool_record.number)
    _drop_empty_objects(store)
    _order_by_age(store)
    return Recovered(
        guests=len(machine.clients),
        pools=len(pools),
        objects=sum(len(pool.objects) for pool in pools.values()),
        persistent_pages=store.frames.persistent,
        ephemeral_pages=store.frames.ephemeral,
        frames_freed=freed,
    )


def _recover_pools(
    store: Store, records: list[PoolRecord], clients: dict[GuestId, Client]
) -> dict[int, Pool]:
    """Pools by record number; a dead record, or one without a guest, gives none."""
    pools = {}
    for record in records:
        client = clients.get(record.guest)
        if record.dead or client is None:
            continue
        persistent = bool(record.flags & PoolFlag.PERSIST)
        pool = Pool(record.number, record.pool_id, record.flags, record.uuid, persistent=persistent)
        client.pools[record.pool_id] = pool
        pools[record.number] = pool
        store.free_pool_numbers.remove(record.number)
    return pools


def _recover_objects(store: Store, pools: dict[int, Pool]) -> list[int]:
    """Fill `store.objects`; the numbers whose records are to be freed once no frame names them."""
    orphans = []
    words = store.arena.object_word.tolist()
    used = max((number for number, word in enumerate(words) if word), default=-1) + 1
    for number in range(used):
        entry = store.arena.read_object(number)
        pool = None if entry is None else pools.get(entry[0])
        if entry is None or pool is None:
            store.objects.append(None)
            store.free_object_numbers.append(number)
            if words[number]:
                orphans.append(number)
        else:
            found = TmemObject(number, pool, entry[1])
            store.objects.append(found)
            pool.objects[entry[1]] = found
    return orphans


def _recover_pages(store: Store) -> int:
    arena = store.arena
    owners = arena.object.tolist()
    indexes = arena.index.tolist()
    states = arena.state.tolist()
    known = len(store.objects)
    freed = 0
    for frame, state in enumerate(states):
        if not state:
            continue
        number = owners[frame]
        owner = store.objects[number] if number < known else None
        if owner is None:
            arena.state[frame] = 0
            freed += 1
            continue
        index = indexes[frame]
        place = index & (LEAF_PAGES - 1)
        leaf = owner.leaf_for(index >> 6, place + 1)
        other = leaf[place]
        if other < 0:
            owner.pages += 1
            owner.pool.pages += 1
        else:
            loser = other if states[other] < state else frame
            arena.state[loser] = 0
            freed += 1
            if loser == frame:
                continue
            store.frames.give(other)
        leaf[place] = frame
        store.frames.mark(frame, 1, PERSISTENT if owner.pool.persistent else HOT)
    store.sequence = max(states, default=0)
    return freed


def _drop_empty_objects(store: Store) -> None:
    for number, found in enumerate(store.objects):
        if found is not None and not found.pages:
            del found.pool.objects[found.key]
            store.arena.free_object(number)
            store.objects[number] = None
            store.free_object_numbers.append(number)


def _order_by_age(store: Store) -> None:
    """Tell the policy of the ephemeral pages in the order in which they were put."""
    states = store.arena.state.tolist()
    kinds = store.frames.kinds
    ephemeral = [frame for frame, kind in enumerate(kinds) if kind == HOT]
    ephemeral.sort(key=lambda frame: states[frame])
    for frame in ephemeral:
        store.policy.inserted(frame, 1)
