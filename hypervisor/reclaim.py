"""Reclaim: what is disowned and freed later, and who has to make room.

*Doom, then reap.*  Flushing an object and destroying a pool disown all their pages by one word in
the segment (arena A4) and free the frames in slices (`reap`), so that a guest's million pages never
hold up its neighbours; Xen walked them all under a lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from hypervisor.arena import POOLS_MAX, Arena
from hypervisor.deferral import Deferral
from hypervisor.objects import LEAF_PAGES, TmemObject
from hypervisor.pages import EVICTED, REMOVED, StoreOptions
from hypervisor.pools import Client, Member, Pool
from hypervisor.room import EVICTION_BATCH_PAGES, may_have_leaf
from ipc.abi import PAGE_BYTES

REAP_SLICE_PAGES: Final = 512
"""Doomed pages freed between two turns of the server."""
_RUN_WORK: Final = 12
"""Pages of a run that take as long to free as there being a run, an entry or an object."""
_POOL_WORK: Final = 32
_LEAF_EVICTIONS_MAX: Final = 4
"""Batches evicted in the hope that a leaf goes with them."""
EVICTIONS_A_CALL: Final = 2048
SLICES_A_CALL: Final = 4
"""Pages evicted, and slices reaped, by a call that finds no room before it does without; of a batch
all entries together."""

SQUEEZES_A_LOOK: Final = 32
"""A look at who has borrowed goes through all guests."""


class NoObjectNumber(Exception):
    """There are as many leaves as may be, or the guest has its part of them."""


class Reclaim(Deferral):
    """`doomed_objects` were flushed and wait to be reaped, `doomed_pools` were destroyed."""

    def __init__(self, arena: Arena, options: StoreOptions) -> None:
        super().__init__(arena, options)
        self.evictions = 0
        self.slices_left = SLICES_A_CALL
        self.evictions_left = EVICTIONS_A_CALL
        """Of the call that is being served."""
        self.squeezed = False
        """Pages go of guests that have no more than they should have, and others may have borrowed
        what these need: it is time to look who has."""
        self.somebody_borrows = False
        """A guest may have persistent pages in idle memory."""
        self._squeezes = 0
        self.reserved_bytes = 0
        """What all guests together have reserved."""
        self.doomed = False
        """Something waits to be reaped: a plain attribute, the server reads it every turn."""
        self.doomed_objects: list[TmemObject] = []
        """Those without pages were evicted meanwhile."""
        self.doomed_pools: deque[Pool] = deque()
        self.free_pool_numbers = list(range(POOLS_MAX - 1, -1, -1))
        self.evicted_pages: Callable[[int], None] = lambda _pages: None
        """Told of every batch; `Balance` counts when to look at the targets again."""

    def begin_call(self) -> None:
        """What making room may take is counted from now."""
        self.slices_left = SLICES_A_CALL
        self.evictions_left = EVICTIONS_A_CALL
        self.squeezed = False

    # --- doom

    def flush_object(self, pool: Pool, oid: bytes) -> int:
        """Disown an object; the number of pages that it had."""
        found = pool.objects.pop(oid)
        if found is None:
            return 0
        self._doom_object(found)
        self.doomed = True
        return found.pages

    def _doom_object(self, found: TmemObject) -> None:
        self.arena.kill_object(found.number)
        found.doomed = True
        found.pool.pages -= found.pages
        self.doomed_objects.append(found)

    def doom_pool(self, pool: Pool) -> None:
        """Disown a pool that no client refers to any more."""
        self.arena.kill_pool(pool.number)
        self.doomed_pools.append(pool)
        self.doomed = True

    # --- reap

    def reap(self, limit_pages: int = REAP_SLICE_PAGES) -> int:
        """Free up to about `limit_pages` doomed pages, as many as they are if they lie together and
        fewer if each takes work of its own; how many.  What was lent to guests that have gone is
        freed first."""
        freed = work = self.loans.reap(limit_pages)
        while work < limit_pages:
            found = self._next_doomed()
            if found is None:
                if not self.doomed_pools:
                    self.doomed = False
                    break
                self._close_pool(self.doomed_pools.popleft())
                work += _POOL_WORK
                continue
            runs = self._runs(found.take_leaf())
            self._count_leaf_gone(found.pool)
            work += _RUN_WORK * len(runs)
            for at, length, first in runs:
                self._release(found, first, length, REMOVED, 0, at)
                found.pages -= length
                freed += length
                work += length if first < self._entry_base else _RUN_WORK * length
            if not found.pages:
                self._drop_object(found)
                work += _RUN_WORK
        return freed

    def reap_until(self, enough: Callable[[], bool]) -> None:
        """Reap for a call that needs what doomed pages hold: until it is enough, or nothing waits,
        or it would take too long.  Doomed pages need not give anything that the call needs."""
        while self.doomed and self.slices_left > 0 and not enough():
            self.slices_left -= 1
            self.reap()

    def take_pool_number(self) -> int | None:
        """A pool record that is free; None if all are taken, or wait with a doomed pool's pages."""
        return self.free_pool_numbers.pop() if self.free_pool_numbers else None

    def _next_doomed(self) -> TmemObject | None:
        """An object that waits; None if at most empty pools do."""
        while self.doomed_objects:
            found = self.doomed_objects[-1]
            if found.pages:
                return found
            self.doomed_objects.pop()
        if not self.doomed_pools or not self.doomed_pools[0].objects:
            return None
        found = self.doomed_pools[0].objects.take()
        self._doom_object(found)
        # All pools in turn: who gave up a small one need not wait for another's large one.
        self.doomed_pools.rotate(-1)
        return found

    def _close_pool(self, pool: Pool) -> None:
        """A doomed pool without objects is no more."""
        for member in list(pool.members.values()):
            self.close_member(member)
        self.arena.free_pool(pool.number)
        self.free_pool_numbers.append(pool.number)

    def make_room(self, count: int, asking: Client | None) -> None:
        """Free frames until `count` are free or nothing may be evicted: doomed pages first, then
        what compressing persistent pages gives.

        A batch takes nobody further below its target than the call needs.  Pages that share a frame
        with others may go without one coming free: a call that has evicted a good many does
        without, and the next one goes on where it stopped.
        """
        frames = self.frames
        self.reap_until(lambda: frames.free >= count)
        if self.deferred and frames.free < count + self.spare_frames:
            self.squeeze(2 * (count + self.spare_frames - frames.free))
        while frames.free < count and self.evictions_left > 0:
            member = self.victims.choose(asking, self.state)
            if member is None:
                break
            if self.somebody_borrows:
                self._note_squeeze(member.client)
            over_pages = (member.cost_bytes - member.target_bytes) // PAGE_BYTES
            gone = self.evict(
                member, max(count - frames.free, min(over_pages, EVICTION_BATCH_PAGES))
            )
            if not gone:
                break
            if frames.free < count and self.contents.compressed.pages:
                # Pages went that shared their frames with others: move these together.
                self.contents.compact(EVICTION_BATCH_PAGES, limit=0.0)

    def _note_squeeze(self, client: Client) -> None:
        purse = client.purses[False]
        if purse.bytes <= purse.target_bytes:
            self._squeezes += 1
            self.squeezed = self.squeezed or self._squeezes % SQUEEZES_A_LOOK == 0

    def _allow_leaves(self, member: Member, count: int) -> None:
        """A call may make as many leaves; raises NoObjectNumber if not.

        There are at most as many leaves as frames, and so never more objects than object numbers.
        Pages of a frame each keep to that by themselves; those that take less could use all numbers
        up, and the host's memory for their leaves, while they cost next to nothing.
        """
        if member.policy is None:
            self.reap_until(lambda: may_have_leaf(member.client))
            if not may_have_leaf(member.client):
                raise NoObjectNumber
        leaves_max = self.arena.frames_count - count
        if self.leaves > leaves_max:
            self.reap_until(lambda: self.leaves <= leaves_max)
        tries = _LEAF_EVICTIONS_MAX
        while self.leaves > leaves_max and tries > 0 and self.evictions_left > 0:
            tries -= 1
            victim = self.victims.choose_by_leaves()
            if victim is None or not self.evict(victim, EVICTION_BATCH_PAGES):
                break
        if self.leaves > leaves_max:
            raise NoObjectNumber

    def evict(self, member: Member, pages: int) -> int:
        """Drop up to about so many of a member's ephemeral pages; how many went."""
        assert member.policy is not None
        gone = 0
        for first, length in member.policy.victims(pages):
            self._evict_run(first, length)
            gone += length
        self.evictions += gone
        self.evictions_left -= gone
        self.evicted_pages(gone)
        return gone

    def _evict_run(self, first: int, count: int) -> None:
        """Drop the ephemeral pages of `count` neighbouring numbers, a leaf at a time."""
        if first < self._entry_base:
            numbers = self._object_column[first : first + count].tolist()
            indexes = self._index_column[first : first + count].tolist()
        else:
            handles = [self.entries.handle(number) for number in range(first, first + count)]
            numbers = [handle[0] for handle in handles]
            indexes = [handle[1] for handle in handles]
        at = 0
        while at < count:
            number, index = numbers[at], indexes[at]
            limit = min(count, at + LEAF_PAGES - (index & 63))
            end = at + 1
            while end < limit and numbers[end] == number and indexes[end] == index + end - at:
                end += 1
            owner = self.objects[number]
            assert owner is not None
            leaf = owner.leaf(index >> 6)
            assert leaf is not None
            self._remove(owner, index >> 6, leaf, index & 63, [(0, end - at, first + at)], EVICTED)
            at = end
