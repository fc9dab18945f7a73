"""One walk over the whole state that proves it consistent.

Every fact that is kept twice is compared: leaves against frame columns, object words against
objects, kinds against the counts of free and persistent frames, page counts of pools against their
objects, pool and guest records against clients.  Tests call it after every step.
"""

from __future__ import annotations

from collections.abc import Iterator

from hypervisor.frames import COLD, FREE, HOT, PERSISTENT
from hypervisor.machine import Machine
from hypervisor.pools import NO_FRAMES, Pool, TmemObject
from hypervisor.store import Store
from ipc.errors import InvariantError


def check(machine: Machine) -> None:
    """Raises InvariantError with what contradicts what."""
    store = machine.store
    owned = _check_pools(store, list(_all_pools(machine)))
    _check_frames(store, owned)
    _check_objects(store)
    _check_records(machine)
    store.policy.check()
    waiting = store.doomed_pools or any(yard.objects for yard in store.graveyards)
    if waiting and not store.doomed:
        _fail("doomed pages wait but nobody will reap them")


def _fail(text: str) -> None:
    raise InvariantError(text)


def _all_pools(machine: Machine) -> Iterator[Pool]:
    for client in machine.clients.values():
        yield from client.pools.values()
    yield from machine.store.doomed_pools
    yield from machine.store.graveyards


def _check_pools(store: Store, pools: list[Pool]) -> dict[int, tuple[TmemObject, int]]:
    """Frame -> (object, index) of every page that a leaf names."""
    owned: dict[int, tuple[TmemObject, int]] = {}
    for pool in pools:
        pages = 0
        for key, found in pool.objects.items():
            if found.pool is not pool or found.key != key:
                _fail(f"object {found.number} does not know its pool {pool.number}")
            if store.objects[found.number] is not found:
                _fail(f"object number {found.number} is not its own")
            object_pages = 0
            for leaf_number, leaf in found.leaves():
                if leaf == NO_FRAMES[len(leaf)]:
                    _fail(f"leaf {leaf_number} of object {found.number} is empty")
                for place, frame in enumerate(leaf):
                    if frame < 0:
                        continue
                    if frame in owned:
                        _fail(f"frame {frame} holds two pages")
                    owned[frame] = (found, leaf_number * 64 + place)
                    object_pages += 1
            if object_pages != found.pages or not object_pages:
                _fail(f"object {found.number} counts {found.pages} of {object_pages} pages")
            pages += object_pages
        if pages != pool.pages:
            _fail(f"pool {pool.number} counts {pool.pages} of {pages} pages")
    return owned


def _check_frames(store: Store, owned: dict[int, tuple[TmemObject, int]]) -> None:
    frames = store.frames
    arena = store.arena
    if frames.free != frames.kinds.count(FREE):
        _fail(f"{frames.free} free frames are counted, {frames.kinds.count(FREE)} are marked")
    if frames.persistent != frames.kinds.count(PERSISTENT):
        _fail("the count of persistent frames is wrong")
    for frame in range(frames.count):
        state, kind = arena.state[frame], frames.kinds[frame]
        entry = owned.get(frame)
        if entry is None:
            if state or kind != FREE:
                _fail(f"frame {frame} is nobody's but has state {state}, kind {kind}")
            continue
        owner, index = entry
        if not 0 < state <= store.sequence:
            _fail(f"frame {frame} has state {state} at sequence {store.sequence}")
        if arena.object[frame] != owner.number or arena.index[frame] != index:
            _fail(f"frame {frame} is object {arena.object[frame]} index {arena.index[frame]}")
        if kind not in ((PERSISTENT,) if owner.pool.persistent else (HOT, COLD)):
            _fail(f"frame {frame} of a pool {owner.pool.kind} has kind {kind}")


def _check_objects(store: Store) -> None:
    graves = set(store.graveyards)
    free = set(store.free_object_numbers)
    if len(free) != len(store.free_object_numbers):
        _fail("an object number is free twice")
    for number, found in enumerate(store.objects):
        entry = store.arena.read_object(number)
        if (found is None) != (number in free):
            _fail(f"object number {number} is neither used nor free, or both")
        if found is None:
            if store.arena.object_word[number]:
                _fail(f"object record {number} is not free")
        elif found.pool in graves:
            if entry is not None:
                _fail(f"doomed object {number} is live in the segment")
        elif entry is None or entry != (found.pool.number, found.key):
            _fail(f"object record {number} says {entry}")
    for number in range(len(store.objects), store.arena.frames_count):
        if store.arena.object_word[number]:
            _fail(f"object record {number} was never given out")


def _check_records(machine: Machine) -> None:
    store = machine.store
    pools = {
        pool.number: pool for client in machine.clients.values() for pool in client.pools.values()
    }
    doomed = {pool.number for pool in store.doomed_pools}
    records = {record.number: record for record in store.arena.read_pools()}
    if {n for n, record in records.items() if not record.dead} != set(pools):
        _fail("live pool records and pools differ")
    if {n for n, record in records.items() if record.dead} != doomed:
        _fail("dead pool records and doomed pools differ")
    if set(store.free_pool_numbers) & set(records):
        _fail("a pool number in use is free")
    guests = {record.name: record.number for record in store.arena.read_guests()}
    if guests != {client.name: client.number for client in machine.clients.values()}:
        _fail("guest records and clients differ")
    for client in machine.clients.values():
        for pool_id, pool in client.pools.items():
            record = records[pool.number]
            if (record.guest, record.pool_id) != (client.number, pool_id):
                _fail(f"pool record {pool.number} names another owner")
