"""Making, joining and leaving pools.

  NEW_POOL private ----> a pool with one member
  NEW_POOL shared  ----> the pool of that uuid, made for the first guest that may have it, and a
                         member more for each further one
  a member leaves  ----> private: the pool is doomed
                         shared, others stay: its pages stay, and it pays for them (`heir`) until it
                         comes back to them, or has gone for good: then another sharer pays
                         shared, nobody stays: the pool is doomed

What a leaver put stays under its slot, so that no page has to be touched: one word in the segment
says who pays now, and of the pages of whoever pays these are the first to be evicted.  In Xen a
leaving sharer destroyed the objects that it had touched last, and its leaving marked the pool as
dying, after which nothing in it could be evicted any more.

Leaving harms nobody who stays.  A guest that joins, puts and leaves in a loop spends its own
allotment; what others come to pay for when it has gone does not count against theirs, but against
everybody who puts into that pool.

A slot whose leaver has no page left is free again.  If a guest joined and left until every slot of
a pool, or every record of all, is an heir's, the next one to join evicts the smallest
(`SLOT_EVICTION_PAGES`) and may be told to try again; nothing stays pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from hypervisor.arena import MEMBERS_MAX, NOBODY, SLOTS, MemberRecord
from hypervisor.auth import Grants, Role
from hypervisor.pools import SHARERS_MAX, Client, Member, Pool
from hypervisor.store import Store
from hypervisor.tokens import Tokens
from ipc.abi import (
    ANY_UUID,
    POOL_PRIORITY_MASK,
    POOL_PRIORITY_SHIFT,
    GuestId,
    PoolFlag,
    PoolId,
    Priority,
    Reason,
    ReplyFlag,
)
from ipc.limits import POOLS_PER_GUEST

RECORDS_PER_GUEST: Final = 2 * POOLS_PER_GUEST
"""Memberships of a guest, those that it has left and pays for included."""
SLOT_EVICTION_PAGES: Final = 512
"""Pages of the smallest heir that are evicted when a joining guest finds no free slot."""


class NewPool(NamedTuple):
    """Outcome of NEW_POOL: the member, or the reason for a refusal."""

    member: Member | None
    reason: int
    flags: int = 0


class Memberships:
    """All pools by who is in them.  `shared` finds the pool of a uuid."""

    def __init__(self, store: Store, grants: Grants) -> None:
        self._store = store
        self._arena = store.arena
        self.grants = grants
        self.shared: dict[bytes, Pool] = {}
        self.free_records = list(range(MEMBERS_MAX - 1, -1, -1))

    # --- making and joining

    def new_pool(self, client: Client, flags: int, uuid: bytes) -> NewPool:
        """Make or join a pool; `flags` was checked."""
        if len(client.members) >= POOLS_PER_GUEST:
            return NewPool(None, Reason.TOO_MANY_POOLS)
        if flags & PoolFlag.SHARED:
            return self._share(client, flags, uuid)
        number = self._store.take_pool_number()
        if number is None:
            return NewPool(None, Reason.TOO_MANY_POOLS)
        pool_id = _free_id(client)
        self._arena.publish_pool(number, client.number, pool_id, flags, uuid)
        member = Member(Pool(number, flags, uuid), client, 0, pool_id)
        self._enter(member)
        return NewPool(member, 0)

    def _share(self, client: Client, flags: int, uuid: bytes) -> NewPool:
        if uuid == ANY_UUID:
            return NewPool(None, Reason.SHARED_NEEDS_UUID)
        role = self.grants.role(uuid, client.name)
        if role is None:
            return NewPool(None, Reason.SHARED_DENIED)
        pool = self.shared.get(uuid)
        reply_flags = 0 if role is Role.WRITER else int(ReplyFlag.READER)
        if pool is not None:
            if pool.persistent != bool(flags & PoolFlag.PERSIST):
                return NewPool(None, Reason.KIND_DIFFERS)
            reply_flags |= ReplyFlag.JOINED
        self.sweep_heirs(pool)
        left = next((m for m in client.inherited if m.pool is pool and not m.foreign), None)
        if left is not None and pool is not None and len(pool.sharers()) < SHARERS_MAX:
            self._come_back(left)
            return NewPool(left, 0, reply_flags)
        slot = 0 if pool is None else self._free_slot(pool)
        records = len(client.members) + sum(not member.foreign for member in client.inherited)
        if slot is None or records >= RECORDS_PER_GUEST or not self._has_record():
            return NewPool(None, Reason.TOO_MANY_SHARERS)
        if pool is None:
            number = self._store.take_pool_number()
            if number is None:
                return NewPool(None, Reason.TOO_MANY_POOLS)
            self._arena.publish_pool(number, GuestId(NOBODY), PoolId(0), flags, uuid)
            self.shared[uuid] = pool = self.shared_pool(number, flags, uuid)
        pool_id = _free_id(client)
        member = Member(pool, client, slot, pool_id, record=self.free_records.pop())
        self._arena.publish_origin(member.record, *member.origin)
        self._publish(member)
        self._enter(member)
        self.apply_grant(member)
        return NewPool(member, 0, reply_flags)

    def shared_pool(self, number: int, flags: int, uuid: bytes, token: int = 0) -> Pool:
        """A pool that is to be shared; `token` is the newest that was ever seen for it."""
        pool = Pool(number, flags, uuid)
        if not pool.persistent:
            pool.tokens = Tokens(self._arena, number, token)
        return pool

    def _enter(self, member: Member) -> None:
        self._store.open_member(member)
        member.client.members[member.pool_id] = member
        member.client.apply_settings()

    def _come_back(self, member: Member) -> None:
        """A guest joins a pool in which pages lie that it put before it left."""
        client = member.client
        client.inherited.remove(member)
        member.heir = False
        member.pool_id = _free_id(client)
        client.members[member.pool_id] = member
        self._publish(member)
        self.apply_grant(member)

    def _has_record(self) -> bool:
        """Whether there is a record for another member, if need be after the smallest heir of all
        has given up its pages."""
        if not self.free_records:
            heirs = [
                member
                for pool in self.shared.values()
                for member in pool.members.values()
                if member.heir and member.policy is not None
            ]
            if heirs:
                smallest = min(heirs, key=lambda member: member.pages)
                self._store.evict(smallest, SLOT_EVICTION_PAGES)
                self.sweep_heirs(smallest.pool)
        return bool(self.free_records)

    def _free_slot(self, pool: Pool) -> int | None:
        if len(pool.sharers()) >= SHARERS_MAX:
            return None
        free = _lowest_free_slot(pool)
        if free is None and not pool.persistent:
            smallest = min(
                (member for member in pool.members.values() if member.heir),
                key=lambda member: member.pages,
            )
            self._store.evict(smallest, SLOT_EVICTION_PAGES)
            self.sweep_heirs(pool)
            free = _lowest_free_slot(pool)
        return free

    def apply_grant(self, member: Member) -> None:
        """Let a member's rights be what its grant says now."""
        role = self.grants.role(member.pool.uuid, member.client.name)
        member.may_get = role is not None
        member.writer = role is Role.WRITER
        member.client.apply_settings()

    def prioritise(self, pool: Pool, priority: Priority) -> None:
        """Another priority than the one that the pool was made with."""
        mask = POOL_PRIORITY_MASK << POOL_PRIORITY_SHIFT
        pool.flags = pool.flags & ~mask | priority << POOL_PRIORITY_SHIFT
        pool.priority = priority
        self._arena.set_pool_flags(pool.number, pool.flags)

    # --- leaving

    def leave(self, member: Member, *, for_good: bool = False) -> None:
        """A guest gives its id of a pool back; `for_good`, because it goes altogether."""
        client, pool = member.client, member.pool
        del client.members[member.pool_id]
        client.settings.pool_weights.pop(str(member.pool_id), None)
        stayers = pool.sharers()
        if pool.shared:
            stayers.remove(member)
        if not pool.shared or not stayers:
            self._doom(pool)
            return
        self._bequeath(member, stayers[0].client if for_good else client)

    def part_with(self, client: Client) -> None:
        """A guest that goes has left all its pools; others pay from now on."""
        for member in client.inherited.copy():
            client.inherited.remove(member)
            self._bequeath(member, member.pool.sharers()[0].client)

    def _bequeath(self, member: Member, heir: Client) -> None:
        if not member.pages:
            self._close(member)
            return
        self._store.bequeath(member, heir)
        self._publish(member)
        heir.inherited.append(member)

    def _doom(self, pool: Pool) -> None:
        self._store.doom_pool(pool)
        if pool.shared:
            del self.shared[pool.uuid]
            for member in pool.members.values():
                if member in member.client.inherited:
                    member.client.inherited.remove(member)
                self._arena.free_member(member.record)
                self.free_records.append(member.record)

    def sweep_heirs(self, pool: Pool | None = None) -> None:
        """Forget what leavers left once none of it is there any more."""
        for one in [pool] if pool is not None else list(self.shared.values()):
            for member in [m for m in one.members.values() if m.heir and not m.pages]:
                member.client.inherited.remove(member)
                self._close(member)

    def _close(self, member: Member) -> None:
        self._store.close_member(member)
        self._arena.free_member(member.record)
        self.free_records.append(member.record)

    def _publish(self, member: Member) -> None:
        self._arena.publish_member(
            MemberRecord(
                member.record,
                member.heir,
                member.client.number,
                member.pool.number,
                member.pool_id,
                member.slot,
            )
        )

    def all_pools(self, clients: dict[str, Client]) -> Iterator[Pool]:
        """Every pool that is not doomed, once."""
        for client in clients.values():
            for member in client.members.values():
                if not member.pool.shared:
                    yield member.pool
        yield from self.shared.values()


def _free_id(client: Client) -> PoolId:
    return PoolId(next(n for n in range(POOLS_PER_GUEST) if n not in client.members))


def _lowest_free_slot(pool: Pool) -> int | None:
    return next((slot for slot in range(SLOTS) if slot not in pool.members), None)
