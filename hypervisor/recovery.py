"""Find everything again in an arena whose hypervisor was killed.

Reads only what arena invariants A1 to A6 promise.  It can itself be killed at any instruction and
run again: it frees pages that nobody owns before it frees the object, pool and member records that
would say so.

  guest records -> clients    pool and member records -> pools, members    object words -> objects
  lent frames                 -> what guests have as RAM; of one that is gone they are free
  tables, slab frames         -> what entries may lie in and point to
  states of frames, entries   -> leaves; of two pages with one handle the younger one stays (A2)
  locations of live entries   -> slab occupancy, references; content that nothing names is free

The cost is one pass over the columns, about half a microsecond a raw page and some more an entry.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hypervisor.arena import (
    CONTENT_FRAME,
    ENTRY_TABLE,
    HELD,
    HINTS_MASK,
    LENT_FRAME,
    SEQUENCE_SHIFT,
    SLAB_PART,
    SLOT_SHIFT,
    SPECIAL_OBJECTS,
    MemberRecord,
    PoolRecord,
)
from hypervisor.frames import CONTENT, EPHEMERAL, PERSISTENT, TABLE
from hypervisor.machine import Machine
from hypervisor.objects import LEAF_PAGES, TmemObject
from hypervisor.pools import RAW_COST_BYTES, Client, Member, Pool
from hypervisor.store import Store
from ipc.abi import GuestId, PoolFlag, PoolId
from ipc.errors import InvariantError

_BELOW_SEQUENCE: Final = (1 << SEQUENCE_SHIFT) - 1


class Recovered(NamedTuple):
    """What came back, in counts."""

    guests: int
    pools: int
    objects: int
    persistent_pages: int
    ephemeral_pages: int
    pages_freed: int
    """Live pages that nobody owned: of doomed pools and objects, or the older of two."""
    lent_frames: int


def recover(machine: Machine) -> Recovered:
    """Fill a fresh machine from its arena; no client is attached yet."""
    store = machine.store
    arena = store.arena
    if machine.clients or store.objects or store.sequence:
        raise InvariantError("recovery needs a fresh machine")
    for record in arena.read_guests():
        machine.adopt(record)
        machine.free_guest_numbers.remove(record.number)
    records = arena.read_pools()
    member_records = arena.read_members()
    pools = _recover_pools(machine, records)
    stray_members = _recover_members(machine, pools, member_records)
    _drop_deserted(machine, pools)
    orphans, rivals = _recover_objects(store, pools)
    borrowers: dict[int, Client] = {client.number: client for client in machine.clients.values()}
    freed = _Pages(store, borrowers if machine.lending.on else {}).recover()
    for number in orphans:
        arena.free_object(number)
    for number in stray_members:
        arena.free_member(number)
    for pool_record in records:
        if pool_record.number not in pools:
            arena.free_pool(pool_record.number)
    _settle_rivals(store, rivals)
    _drop_empty_objects(store)
    machine.memberships.sweep_heirs()
    machine.balance.recovered()
    # Raw pages of guests that compress may be such as were left so.
    store.deferred = store.may_defer
    members = [member for pool in pools.values() for member in pool.members.values()]
    return Recovered(
        guests=len(machine.clients),
        pools=len(pools),
        objects=sum(len(pool.objects) for pool in pools.values()),
        persistent_pages=sum(one.pages for one in members if one.pool.persistent),
        ephemeral_pages=sum(one.pages for one in members if not one.pool.persistent),
        pages_freed=freed,
        lent_frames=store.loans.lent,
    )


def _recover_pools(machine: Machine, records: list[PoolRecord]) -> dict[int, Pool]:
    """Pools by record number; a dead record, or a private one without a guest, gives none."""
    clients = {client.number: client for client in machine.clients.values()}
    store = machine.store
    pools: dict[int, Pool] = {}
    for record in records:
        shared = bool(record.flags & PoolFlag.SHARED)
        client = clients.get(record.guest)
        if record.dead or (client is None and not shared):
            continue
        store.free_pool_numbers.remove(record.number)
        if shared:
            pool = machine.memberships.shared_pool(
                record.number, record.flags, record.uuid, record.token
            )
            machine.memberships.shared[record.uuid] = pool
        else:
            assert client is not None
            pool = Pool(record.number, record.flags, record.uuid)
            member = Member(pool, client, 0, record.pool_id)
            store.open_member(member)
            client.members[record.pool_id] = member
        pools[record.number] = pool
    return pools


def _recover_members(
    machine: Machine, pools: dict[int, Pool], records: list[MemberRecord]
) -> list[int]:
    """Fill shared pools; the numbers of records that belong to none."""
    clients: dict[GuestId, str] = {one.number: one.name for one in machine.clients.values()}
    memberships = machine.memberships
    strays = []
    for record in sorted(records, key=lambda record: (record.heir, record.number)):
        pool = pools.get(record.pool)
        sharers = [] if pool is None else pool.sharers()
        name = clients.get(record.guest)
        if pool is None or not pool.shared or (name is None and not sharers):
            strays.append(record.number)
            continue
        # A guest that is gone left what it put to a sharer; it died between the two words.
        heir = record.heir or name is None
        client = sharers[0].client if name is None else machine.clients[name]
        member = Member(pool, client, record.slot, record.pool_id, record=record.number)
        origin = machine.store.arena.read_origin(record.number)
        member.origin, member.disowned = (origin.name, origin.pid), origin.disowned
        memberships.free_records.remove(record.number)
        machine.store.open_member(member)
        if heir:
            machine.store.bequeath(member, client)
            # Whose pages they are is not in the segment.
            member.foreign = True
            client.inherited.append(member)
            machine.store.arena.publish_member(
                record._replace(heir=True, guest=client.number, pool_id=PoolId(0))
            )
        else:
            client.members[record.pool_id] = member
            memberships.apply_grant(member)
    for client in machine.clients.values():
        client.apply_settings()
    return strays


def _drop_deserted(machine: Machine, pools: dict[int, Pool]) -> None:
    """A shared pool without a sharer was being made or doomed."""
    for number, pool in list(pools.items()):
        if pool.shared and not pool.sharers():
            for member in list(pool.members.values()):
                member.client.inherited.remove(member)
                machine.store.close_member(member)
                machine.memberships.free_records.append(member.record)
                machine.store.arena.free_member(member.record)
            del machine.memberships.shared[pool.uuid]
            del pools[number]
            machine.store.free_pool_numbers.append(number)


def _recover_objects(store: Store, pools: dict[int, Pool]) -> tuple[list[int], list[TmemObject]]:
    """Fill `store.objects`; the numbers whose records are to be freed once no page names them, and
    objects of an id that another one has: a record of a damaged arena."""
    orphans = []
    rivals = []
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
            if pool.objects.get(entry[1]) is None:
                pool.objects[entry[1]] = found
            else:
                rivals.append(found)
    return orphans, rivals


def _settle_rivals(store: Store, rivals: list[TmemObject]) -> None:
    """Of two objects with one id the one is real whose pages are what was put."""
    for rival in rivals:
        pool = rival.pool
        other = pool.objects.get(rival.oid)
        assert other is not None
        loser = rival
        if _right_pages(store, rival) > _right_pages(store, other):
            pool.objects[rival.oid] = rival
            loser = other
        if loser.pages:
            store.doom_object(loser)
        else:
            store.arena.free_object(loser.number)
            store.objects[loser.number] = None
            store.free_object_numbers.append(loser.number)


def _right_pages(store: Store, owner: TmemObject) -> int:
    if not store.beside.sums:
        return owner.pages
    return sum(
        store.is_right(owner, number, leaf_number << 6 | place)
        for leaf_number, leaf in owner.leaves()
        for place, number in enumerate(leaf)
        if number >= 0
    )


class _Pages:
    """The pages of an arena: which live, and what they are charged to."""

    def __init__(self, store: Store, borrowers: dict[int, Client]) -> None:
        """`borrowers` are guests, by number, that may have frames as RAM."""
        self._store = store
        self._borrowers = borrowers
        self._arena = store.arena
        self._freed = 0
        self._states: dict[int, int] = {}
        """State of the entries that live; those of raw pages are read where they are."""
        self._raw_states: list[int] = []

    def recover(self) -> int:
        store, arena = self._store, self._arena
        self._raw_states = arena.state.tolist()
        owners = arena.object.tolist()
        indexes = arena.index.tolist()
        contents = []
        for frame, state in enumerate(self._raw_states):
            if owners[frame] == ENTRY_TABLE and state != HELD and store.beside.sums:
                # A table that was lost with its entries, or is: they must not come back with it.
                arena.object[frame] = arena.state[frame] = self._raw_states[frame] = 0
                continue
            if not state or owners[frame] == SLAB_PART:
                continue
            if owners[frame] == ENTRY_TABLE:
                store.frames.mark(frame, 1, TABLE)
                store.entries.adopt(frame, indexes[frame] & 3)
            elif owners[frame] == CONTENT_FRAME:
                contents.append(frame)
            elif owners[frame] == LENT_FRAME:
                self._adopt_lent(frame, indexes[frame])
            elif owners[frame] >= SPECIAL_OBJECTS:
                arena.state[frame] = 0
                self._freed += 1
            else:
                self._claim(frame, state, owners[frame], indexes[frame])
        store.contents.slabs.adopt_spans()
        for number in store.entries.live():
            object_number, index = store.entries.handle(number)
            state = store.entries.state(number)
            self._states[number] = state
            self._claim(number, state, object_number, index)
        if store.beside.sums:
            self._vet()
        self._charge_raw()
        self._adopt_entries(contents)
        raw = zip(self._raw_states, owners, strict=True)
        youngest = max(
            max((state for state, owner in raw if _is_raw(owner)), default=0),
            max(self._states.values(), default=0),
        )
        store.sequence = youngest >> SEQUENCE_SHIFT
        self._order_by_age()
        store.beside.tokens.recover(self._raw_states)
        return self._freed

    def _adopt_lent(self, frame: int, guest: int) -> None:
        borrower = self._borrowers.get(guest)
        if borrower is None:
            self._arena.state[frame] = 0
        else:
            self._store.loans.adopt(borrower, frame)

    def _claim(self, number: int, state: int, object_number: int, index: int) -> None:
        """This page says that it is that handle's."""
        store = self._store
        known = object_number < len(store.objects)
        owner = store.objects[object_number] if known else None
        slot = state >> SLOT_SHIFT & HINTS_MASK
        member = None if owner is None else owner.pool.members.get(slot)
        if owner is None or member is None or state >> SEQUENCE_SHIFT <= member.disowned:
            self._drop(number)
            return
        place = index & (LEAF_PAGES - 1)
        leaf = owner.leaf(index >> 6)
        if leaf is None:
            leaf = owner.new_leaf(index >> 6, place + 1)
            owner.pool.leaves += 1
            store.leaves += 1
        elif place >= len(leaf):
            owner.lengthen(leaf, place + 1)
        other = leaf[place]
        if other < 0:
            owner.pages += 1
            owner.pool.pages += 1
        elif self._state(other) < state:
            self._drop(other)
        else:
            self._drop(number)
            return
        leaf[place] = number

    def _vet(self) -> None:
        """Look at every page that lives: of those that are not what was put the ephemeral ones go,
        persistent ones stay to be told.  Only now: a damaged page may be the younger of two, and
        then the older one is nothing to be had either."""
        store, arena = self._store, self._arena
        owners, indexes = arena.object.tolist(), arena.index.tolist()
        for frame, state in enumerate(self._raw_states):
            if state and _is_raw(owners[frame]):
                self._vet_page(frame, state, owners[frame], indexes[frame])
        for number, state in list(self._states.items()):
            self._vet_page(number, state, *store.entries.handle(number))

    def _vet_page(self, number: int, state: int, object_number: int, index: int) -> None:
        store = self._store
        owner = store.objects[object_number]
        assert owner is not None
        if store.is_right(owner, number, index):
            return
        store.damaged_pages += 1
        if not owner.pool.persistent:
            self._drop(number)
            store.forget(owner, index)
            return
        # Its sequence may be anything, and the next put's has to be above it.
        sane = 1 << SEQUENCE_SHIFT | state & _BELOW_SEQUENCE
        store.spoil(owner, number, index, sane)
        if number < store.entries.base:
            self._raw_states[number] = sane
        else:
            self._states[number] = sane

    def _state(self, number: int) -> int:
        return (
            self._raw_states[number] if number < self._store.entries.base else self._states[number]
        )

    def _drop(self, number: int) -> None:
        self._freed += 1
        if number < self._store.entries.base:
            self._arena.state[number] = 0
            self._raw_states[number] = 0
        else:
            self._store.entries.clear(number)
            del self._states[number]

    def _member(self, object_number: int, state: int) -> Member:
        owner = self._store.objects[object_number]
        assert owner is not None
        return owner.pool.members[state >> SLOT_SHIFT & HINTS_MASK]

    def _charge_raw(self) -> None:
        owners = self._arena.object.tolist()
        for frame, state in enumerate(self._raw_states):
            if state and _is_raw(owners[frame]):
                member = self._member(owners[frame], state)
                self._store.frames.mark(
                    frame, 1, PERSISTENT if member.policy is None else EPHEMERAL
                )
                member.charge(1, RAW_COST_BYTES)

    def _adopt_entries(self, content_frames: list[int]) -> None:
        store = self._store
        named = store.contents.recover(
            [
                (number, self._member(store.entries.handle(number)[0], state))
                for number, state in sorted(self._states.items())
            ]
        )
        for number in self._states:
            store.entries.occupy(number)
        store.entries.drop_empty()
        for frame in content_frames:
            if frame in named:
                store.frames.mark(frame, 1, CONTENT)
            else:
                self._arena.state[frame] = 0
                self._freed += 1

    def _order_by_age(self) -> None:
        """Tell the policies of the ephemeral pages in the order in which they were put."""
        store = self._store
        pages: list[tuple[int, int, int, int]] = []
        owners, indexes = self._arena.object.tolist(), self._arena.index.tolist()
        for frame, state in enumerate(self._raw_states):
            if state and _is_raw(owners[frame]):
                pages.append((state, frame, owners[frame], indexes[frame]))
        for number, state in self._states.items():
            pages.append((state, number, *store.entries.handle(number)))
        pages.sort()
        for state, number, object_number, index in pages:
            member = self._member(object_number, state)
            if member.policy is not None:
                owner = store.objects[object_number]
                assert owner is not None
                key = store.leaf_key(owner.oid, index >> 6) if member.keyed else 0
                member.policy.inserted(number, 1, key, index & 63, state & HINTS_MASK)


def _is_raw(object_number: int) -> bool:
    """A frame's object column names an object, and no special use."""
    return object_number < SPECIAL_OBJECTS


def _drop_empty_objects(store: Store) -> None:
    for number, found in enumerate(store.objects):
        if found is not None and not found.pages:
            del found.pool.objects[found.oid]
            store.arena.free_object(number)
            store.objects[number] = None
            store.free_object_numbers.append(number)
