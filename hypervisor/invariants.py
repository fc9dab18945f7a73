"""One walk over the whole state that proves it consistent.

Every fact that is kept twice is compared: leaves against frame columns and entries, object words
against objects, kinds of frames against what lies in them, charges against what pages cost, counts
of pools and members against their pages, policies against the pages of their member, references of
shared content against the entries that name it, slab slots against the entries that own them, and
pool, member and guest records against clients, fencing tokens against the segment, each guest's
count of persistent pages against those that records in the segment give it, what was asked of
guests against what they did, and the frames that each is lent as RAM against those that the segment
says are.  Tests call it after every step.
"""

from __future__ import annotations

from collections import Counter

from hypervisor.arena import (
    CONTENT_FRAME,
    ENTRY_TABLE,
    HELD,
    HINTS_MASK,
    LENT_FRAME,
    NOBODY,
    SEQUENCE_SHIFT,
    SLAB_PART,
    SLOT_SHIFT,
    MemberRecord,
    PoolRecord,
)
from hypervisor.frames import CONTENT, EPHEMERAL, FREE, KINDS, LENT, PERSISTENT, SLAB, TABLE
from hypervisor.machine import Machine
from hypervisor.objects import NO_PAGES, TmemObject
from hypervisor.pools import RAW_COST_BYTES, Member, Pool
from hypervisor.pressure import WRITEBACK_PAGES_MAX
from hypervisor.store import Store
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError

Owned = dict[int, tuple[TmemObject, int]]
"""Page number -> (object, index)."""


def check(machine: Machine) -> None:
    """Raises InvariantError with what contradicts what."""
    store = machine.store
    pools = _all_pools(machine)
    owned = _check_pools(store, pools)
    _check_frames(store, owned)
    _check_entries(store, owned)
    _check_members(store, pools, owned)
    _check_objects(store)
    pool_records, member_records = store.arena.read_pools(), store.arena.read_members()
    _check_records(machine, pool_records, member_records)
    _check_clients(machine)
    _check_persistent(machine, owned, pool_records, member_records)
    _check_wishes(machine)
    _check_lent(machine)
    waiting = store.doomed_pools or store.doomed_objects
    if waiting and not store.doomed:
        _fail("doomed pages wait but nobody will reap them")


def _fail(text: str) -> None:
    raise InvariantError(text)


def _all_pools(machine: Machine) -> list[Pool]:
    """Doomed ones too."""
    live = list(machine.memberships.all_pools(machine.clients))
    pools = [*live, *machine.store.doomed_pools]
    if len({id(pool) for pool in pools}) != len(pools):
        _fail("a pool is found twice")
    return pools


def _check_pools(store: Store, pools: list[Pool]) -> Owned:
    """Page number -> (object, index) of every page that a leaf names."""
    owned: Owned = {}
    leaves: dict[int, int] = {}
    waiting = [found for found in store.doomed_objects if found.pages]
    for found in [*(one for pool in pools for one in pool.objects.values()), *waiting]:
        leaves[id(found.pool)] = leaves.get(id(found.pool), 0) + sum(1 for _ in found.leaves())
    if store.leaves != sum(leaves.values()) or store.leaves > store.arena.frames_count:
        _fail(f"{store.leaves} leaves are counted, {sum(leaves.values())} found")
    for pool in pools:
        if pool.leaves != leaves.get(id(pool), 0):
            _fail(f"pool {pool.number} counts {pool.leaves} leaves")
        pages = 0
        for oid, found in pool.objects.items():
            if found.pool is not pool or found.oid != oid or found.doomed:
                _fail(f"object {found.number} does not know its pool {pool.number}")
            pages += _check_object(store, found, owned)
        if pages != pool.pages:
            _fail(f"pool {pool.number} counts {pool.pages} of {pages} pages")
    for found in waiting:
        if not found.doomed:
            _fail(f"doomed object {found.number} is not")
        _check_object(store, found, owned)
    return owned


def _check_object(store: Store, found: TmemObject, owned: Owned) -> int:
    if store.objects[found.number] is not found:
        _fail(f"object number {found.number} is not its own")
    pages = 0
    for leaf_number, leaf in found.leaves():
        if leaf == NO_PAGES[len(leaf)]:
            _fail(f"leaf {leaf_number} of object {found.number} is empty")
        for place, number in enumerate(leaf):
            if number < 0:
                continue
            if number in owned:
                _fail(f"page number {number} holds two pages")
            owned[number] = (found, leaf_number * 64 + place)
            pages += 1
    if pages != found.pages or not pages:
        _fail(f"object {found.number} counts {found.pages} of {pages} pages")
    return pages


def _check_frames(store: Store, owned: Owned) -> None:
    frames = store.frames
    arena = store.arena
    if frames.free != frames.kinds.count(FREE):
        _fail(f"{frames.free} free frames are counted, {frames.kinds.count(FREE)} are marked")
    tables = set(store.entries.table_frames())
    marks = {TABLE: ENTRY_TABLE, SLAB: SLAB_PART, CONTENT: CONTENT_FRAME, LENT: LENT_FRAME}
    for frame in range(frames.count):
        state, kind, object_ = arena.state[frame], frames.kinds[frame], arena.object[frame]
        entry = owned.get(frame)
        if entry is not None:
            owner, index = entry
            if not 0 < state >> SEQUENCE_SHIFT <= store.sequence:
                _fail(f"frame {frame} has state {state:#x} at sequence {store.sequence}")
            if object_ != owner.number or arena.index[frame] != index:
                _fail(f"frame {frame} is object {object_} index {arena.index[frame]}")
            if kind != (PERSISTENT if owner.pool.persistent else EPHEMERAL):
                _fail(f"frame {frame} of a pool {owner.pool.kind} is marked {KINDS[kind]}")
        elif kind == FREE:
            if state:
                _fail(f"frame {frame} is free but has state {state:#x}")
        elif kind not in marks or object_ != marks[kind]:
            _fail(f"frame {frame} is marked {KINDS[kind]} but its object is {object_:#x}")
        elif kind != SLAB and state != HELD:
            _fail(f"frame {frame}, {KINDS[kind]}, has state {state:#x}")
        if (kind == TABLE) != (frame in tables):
            _fail(f"frame {frame} is a table, or is not: opinions differ")


def _check_entries(store: Store, owned: Owned) -> None:
    entries = store.entries
    live = set(entries.live())
    named = {number for number in owned if number >= entries.base}
    if live != named:
        _fail(f"{len(live - named)} entries without a leaf, {len(named - live)} leaves without one")
    free = entries.free_numbers()
    if len(free) != len(set(free)) or live & set(free):
        _fail("an entry is free twice, or free and live")
    if len(free) + len(live) != entries.room:
        _fail(f"{len(free)} free and {len(live)} live entries in {entries.tables} tables")
    for number in live:
        owner, index = owned[number]
        if entries.handle(number) != (owner.number, index):
            _fail(f"entry {number} is of {entries.handle(number)}")
        if not 0 < entries.state(number) >> SEQUENCE_SHIFT <= store.sequence:
            _fail(f"entry {number} has state {entries.state(number):#x}")
    store.contents.check(
        {number: _member_of(store, owned[number][0], number) for number in sorted(live)}
    )


def _member_of(store: Store, owner: TmemObject, number: int) -> Member:
    slot = store.state(number) >> SLOT_SHIFT & HINTS_MASK
    member = owner.pool.members.get(slot)
    if member is None:
        raise InvariantError(f"page {number} is of slot {slot}, which nobody has")
    return member


def _check_members(store: Store, pools: list[Pool], owned: Owned) -> None:
    pages: dict[int, set[int]] = {}
    raw: dict[int, int] = {}
    for number, (owner, _) in owned.items():
        member = _member_of(store, owner, number)
        pages.setdefault(id(member), set()).add(number)
        if number < store.entries.base:
            raw[id(member)] = raw.get(id(member), 0) + 1
    charges = store.contents.charges()
    purses: dict[int, int] = {}
    for pool in pools:
        if (pool.only is None) != pool.shared or (pool.only and pool.members != {0: pool.only}):
            _fail(f"pool {pool.number} has members {list(pool.members)}")
        for slot, member in pool.members.items():
            if member.slot != slot or member.pool is not pool:
                _fail(f"a member of pool {pool.number} is in the wrong slot")
            its_pages = pages.pop(id(member), set())
            if len(its_pages) != member.pages:
                _fail(f"a member is charged for {member.pages} of {len(its_pages)} pages")
            cost = raw.get(id(member), 0) * RAW_COST_BYTES + charges.get(id(member), 0)
            if cost != member.cost_bytes:
                _fail(f"a member is charged {member.cost_bytes} for pages that cost {cost}")
            purses[id(member.purse)] = purses.get(id(member.purse), 0) + cost
            _check_member(store, member, its_pages)
            if purses[id(member.purse)] > member.purse.bytes:
                _fail("a purse holds less than its members are charged")
    if pages:
        _fail(f"{len(pages)} members have pages but are in no pool")
    ephemeral = sum(len(pool.members) for pool in pools if not pool.persistent)
    if len(store.victims.members) != ephemeral:
        _fail(f"{len(store.victims.members)} possible victims, {ephemeral} ephemeral members")


def _check_member(store: Store, member: Member, its_pages: set[int]) -> None:
    persistent = member.pool.persistent
    if (member.policy is None) != persistent:
        _fail("persistent pages have no policy, ephemeral ones have one")
    if member.policy is not None:
        member.policy.check(its_pages)
        if store.victims.members.get(id(member)) is not member:
            _fail("a member can't be chosen as victim")
    if member.purse is not member.client.purses[persistent]:
        _fail("a member draws on the wrong purse")


def _check_objects(store: Store) -> None:
    free = set(store.free_object_numbers)
    doomed = {id(found) for found in store.doomed_objects}
    if len(free) != len(store.free_object_numbers):
        _fail("an object number is free twice")
    for number, found in enumerate(store.objects):
        entry = store.arena.read_object(number)
        if (found is None) != (number in free):
            _fail(f"object number {number} is neither used nor free, or both")
        if found is None:
            if store.arena.object_word[number]:
                _fail(f"object record {number} is not free")
        elif found.doomed:
            if entry is not None or id(found) not in doomed:
                _fail(f"doomed object {number} is live in the segment")
        elif entry is None or entry != (found.pool.number, found.oid):
            _fail(f"object record {number} says {entry}")
    for number in range(len(store.objects), store.arena.frames_count):
        if store.arena.object_word[number]:
            _fail(f"object record {number} was never given out")


def _check_records(
    machine: Machine, pool_records: list[PoolRecord], member_records: list[MemberRecord]
) -> None:
    store = machine.store
    pools = {pool.number: pool for pool in machine.memberships.all_pools(machine.clients)}
    doomed = {pool.number for pool in store.doomed_pools}
    records = {record.number: record for record in pool_records}
    if {n for n, record in records.items() if not record.dead} != set(pools):
        _fail("live pool records and pools differ")
    if {n for n, record in records.items() if record.dead} != doomed:
        _fail("dead pool records and doomed pools differ")
    if set(store.free_pool_numbers) & set(records):
        _fail("a pool number in use is free")
    guests = {record.name: record.number for record in store.arena.read_guests()}
    if guests != {client.name: client.number for client in machine.clients.values()}:
        _fail("guest records and clients differ")
    for number, pool in pools.items():
        record = records[number]
        owner = (NOBODY, 0) if pool.only is None else (pool.only.client.number, pool.only.pool_id)
        if (record.guest, record.pool_id) != owner:
            _fail(f"pool record {number} names another owner")
        _check_tokens(pool, record.token)
    members = {
        (pool.number, member.slot): (member.record, member.heir, member.client.number)
        for pool in pools.values()
        if pool.shared
        for member in pool.members.values()
    }
    recorded = {
        (record.pool, record.slot): (record.number, record.heir, record.guest)
        for record in member_records
    }
    if members != recorded:
        _fail("member records and members differ")
    if set(machine.memberships.free_records) & {record for record, _, _ in members.values()}:
        _fail("a member record in use is free")


def _check_tokens(pool: Pool, recorded: int) -> None:
    """T1 to T3 of `tokens`."""
    tokens = pool.tokens
    if (tokens is not None) != (pool.shared and not pool.persistent):
        _fail(f"pool {pool.number} of kind {pool.kind} has fencing tokens, or has none")
    if any(member.tokens is not tokens for member in pool.members.values()):
        _fail(f"a member of pool {pool.number} looks at other tokens")
    if tokens is None:
        if recorded:
            _fail(f"pool record {pool.number} has a token")
        return
    if tokens.pool_number != pool.number or tokens.newest != recorded:
        _fail(f"pool record {pool.number} has token {recorded}, not {tokens.newest}")
    wrong = tokens.check()
    if wrong:
        _fail(f"pool {pool.number}: {wrong}")


def _check_clients(machine: Machine) -> None:
    doomed = machine.store.doomed_pools
    for client in machine.clients.values():
        aimed = client.purses[False].target_bytes
        if aimed != sum(
            member.target_bytes
            for member in machine.store.victims.members.values()
            if member.client is client
        ):
            _fail(f"guest {client.name} counts targets of {aimed} bytes")
        for pool_id, member in client.members.items():
            if member.pool_id != pool_id or member.client is not client or member.heir:
                _fail(f"guest {client.name} has a wrong pool {pool_id}")
            if member.pool.members.get(member.slot) is not member:
                _fail(f"pool {member.pool.number} does not know its member {client.name}")
            if member.may_put != (member.may_get and member.writer and not client.settings.frozen):
                _fail(f"guest {client.name} may put into pool {pool_id}, or not: opinions differ")
        for member in client.inherited:
            if not member.heir or member.client is not client:
                _fail(f"guest {client.name} inherited what it does not pay for")
        parts = client.charged()
        parts += [m for p in doomed for m in p.members.values() if m.client is client]
        for persistent in (False, True):
            cost = sum(m.cost_bytes for m in parts if m.pool.persistent == persistent)
            if cost != client.purses[persistent].bytes:
                _fail(
                    f"guest {client.name} pays {client.purses[persistent].bytes} for parts "
                    f"that cost {cost}"
                )


def _check_persistent(
    machine: Machine,
    owned: Owned,
    pool_records: list[PoolRecord],
    member_records: list[MemberRecord],
) -> None:
    """Persistent pages of each guest as they are counted, and as a restart would find them: by the
    records in the segment alone, but for what waits to be reaped."""
    store = machine.store
    arena = store.arena
    frames = zip(store.frames.kinds, arena.object, arena.state, strict=False)
    pages = Counter(
        (number, state >> SLOT_SHIFT & HINTS_MASK)
        for kind, number, state in frames
        if kind == PERSISTENT
    )
    for entry, (owner, _) in owned.items():
        if entry >= store.entries.base and owner.pool.persistent:
            slot = store.entries.state(entry) >> SLOT_SHIFT & HINTS_MASK
            pages[store.entries.handle(entry)[0], slot] += 1
    payers = {(record.pool, record.slot): record.guest for record in member_records}
    pools = {record.number: record for record in pool_records if not record.dead}
    found: Counter[int] = Counter()
    for (number, slot), count in pages.items():
        record = arena.read_object(number)
        if record is not None and record[0] in pools:
            found[payers.get((record[0], slot), pools[record[0]].guest)] += count
    waiting: Counter[int] = Counter()
    """By id(): a guest that has gone pays for some of it, under a number that is free."""
    for doomed in store.doomed_objects:
        for _, leaf in doomed.leaves():
            for page in leaf:
                if page >= 0 and doomed.pool.persistent and not _is_doomed(store, doomed.pool):
                    waiting[id(_member_of(store, doomed, page).client)] += 1
    for client in machine.clients.values():
        counted = client.pages(persistent=True)
        expected = found[client.number] + waiting[id(client)]
        if counted != expected:
            _fail(f"guest {client.name} counts {counted} of {expected} persistent pages")


def _is_doomed(store: Store, pool: Pool) -> bool:
    return any(pool is one for one in store.doomed_pools)


def _check_wishes(machine: Machine) -> None:
    """W1, W2 and W4 of `pressure`."""
    for client in machine.clients.values():
        left = client.wishes.writeback_pages
        asked = client.account.writeback_asked_pages
        done = client.account.writeback_done_pages
        if not 0 <= left <= WRITEBACK_PAGES_MAX or not 0 <= done <= asked - left:
            _fail(f"guest {client.name} was asked for {asked} pages, did {done}, is to do {left}")
        if client.settings.balloon_bytes % PAGE_BYTES:
            _fail(f"guest {client.name} should have {client.settings.balloon_bytes} bytes")


def _check_lent(machine: Machine) -> None:
    """Frames that are lent, by the segment alone, and as guests, and those that have gone, are
    counted to have them; L2 and L5 of `lending`."""
    store = machine.store
    arena = store.arena
    found: Counter[int] = Counter(
        arena.index[frame]
        for frame in range(arena.frames_count)
        if arena.state[frame] and arena.object[frame] == LENT_FRAME
    )
    counted = Counter(store.loans.returning)
    if counted and not store.doomed:
        _fail("frames that were lent to guests that have gone wait, and nobody will free them")
    if counted.keys() & {
        *machine.free_guest_numbers,
        *(c.number for c in machine.clients.values()),
    }:
        _fail("a guest number is in use, or free, while frames are lent under it")
    for client in machine.clients.values():
        counted[client.number] += len(client.lent)
        if any(arena.index[frame] != client.number for frame in client.lent):
            _fail(f"guest {client.name} counts frames that others were lent")
    if +counted != found:
        _fail(f"guests, by number, are lent {dict(found)} frames, {dict(+counted)} counted")
    if store.loans.lent != sum(len(client.lent) for client in machine.clients.values()):
        _fail(f"{store.loans.lent} lent frames are counted")
    reserved_bytes = sum(settings.reserve_bytes for settings in machine.settings.values())
    total_bytes = arena.frames_count * PAGE_BYTES
    if store.loans.lent and store.loans.lent * PAGE_BYTES + reserved_bytes > total_bytes:
        _fail(f"{store.loans.lent} frames are lent, and {reserved_bytes} bytes reserved")
