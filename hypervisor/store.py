"""The store: pages between the guests' windows and the arena.

The way of a page is  pool -> object -> leaf -> page number -> frame or entry; what a refusal is
called is `Machine`'s business.  Two differences in mechanism from Xen:

  * *Room first, then look.*  A put makes room before it looks its object up, because eviction may
    take pages, leaves and the very object that was looked up.
  * *Doom, then reap.*  Flushing an object and destroying a pool disown all their pages by one word
    in the segment (arena A4) and free the frames in slices (`reap`), so that a guest's million
    pages never hold up its neighbours; Xen walked them all under a lock.

Extents are done leaf by leaf, and within a leaf run by run: a run of neighbouring page numbers is
found by comparing a slice of the leaf with a slice of the identity array, and moved by one copy.
No Python object exists for a page.  Pages that `Contents` turns into entries go one by one.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from typing import Final

from hypervisor.arena import HINTS_MASK, POOLS_MAX, SEQUENCE_SHIFT, SLOT_SHIFT, Arena
from hypervisor.contents import Contents
from hypervisor.entries import Entries
from hypervisor.eviction import make_policy
from hypervisor.eviction.links import Links
from hypervisor.fill import candidates
from hypervisor.frames import EPHEMERAL, PERSISTENT, Frames
from hypervisor.objects import LEAF_PAGES, NO_PAGES, TmemObject
from hypervisor.pools import RAW_COST_BYTES, Client, Member, Pool
from hypervisor.reuse import SAMPLE_MASK, ReuseSampler
from hypervisor.room import EVICTION_BATCH_PAGES, Victims, may_have_leaf
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, CallFlag
from ipc.window import Window

REAP_SLICE_PAGES: Final = 512
"""Doomed pages freed between two turns of the server."""
_RUN_WORK: Final = 12
"""Pages of a run that take as long to free as there being a run, an entry or an object."""
_POOL_WORK: Final = 32
_SLICES_A_CALL: Final = 4
"""Slices that a call which finds no room reaps before it does without."""

_MASKS: Final = tuple((1 << n) - 1 for n in range(EXTENT_PAGES_MAX + 1))
_FREE_STATES: Final = tuple(array("Q", [0]) * n for n in range(EXTENT_PAGES_MAX + 1))
_KEY_MASK: Final = (1 << 63) - 1
PAGE_WORDS: Final = PAGE_BYTES // 8
_KEEP: Final = int(CallFlag.KEEP)

Run = tuple[int, int, int]
"""Pages whose numbers are neighbours: place in a slice of a leaf, count, first number."""

TAKEN: Final = 0
EVICTED: Final = 1
REMOVED: Final = 2
"""Why a page goes: what its eviction policy is told."""


LeafKey = Callable[[bytes, int], int]


def leaf_key(oid: bytes, leaf_number: int) -> int:
    """What policies and samplers know a leaf by, 63 bits; seeded by Python at every start, so that
    no guest can choose object ids that all samplers watch."""
    return hash((oid, leaf_number)) & _KEY_MASK


class NoObjectNumber(Exception):
    """There are as many leaves as may be, or the guest has its part of them."""


class Store:
    """`objects[n]` is the object with number n; `doomed_objects` were flushed and wait to be
    reaped, `doomed_pools` were destroyed."""

    def __init__(
        self,
        arena: Arena,
        policy: str,
        *,
        admission: bool = True,
        scheduling: str = "static",
        secret: bytes = b"",
        now_ns: Callable[[], int] = lambda: 0,
        leaf_key: LeafKey = leaf_key,
    ) -> None:
        self.arena = arena
        self.leaf_key = leaf_key
        self._data = arena.data
        self._state_column = arena.state
        self._object_column = arena.object
        self._index_column = arena.index
        self.frames = Frames(arena.frames_count)
        self.links = Links(arena.frames_count)
        self.entries = Entries(arena, self.frames, self.links)
        self.contents = Contents(arena, self.frames, self.entries, secret, now_ns)
        self.contents.member_at = self._member_at
        self._entry_base = self.entries.base
        self.policy_name = policy
        self.admission = admission
        make_policy(policy, self.links, admission=admission).close()  # refuses a wrong name now
        self.victims = Victims(scheduling)
        self.evictions = 0
        self.sequence = 0
        self.objects: list[TmemObject | None] = []
        self.free_object_numbers: list[int] = []
        self.leaves = 0
        """Of all objects, doomed ones too."""
        self.doomed = False
        """Something waits to be reaped: a plain attribute, the server reads it every turn."""
        self.doomed_objects: list[TmemObject] = []
        """Those without pages were evicted meanwhile."""
        self.doomed_pools: deque[Pool] = deque()
        self.free_pool_numbers = list(range(POOLS_MAX - 1, -1, -1))
        self.evicted_pages: Callable[[int], None] = lambda _pages: None
        """Told of every batch; `Balance` counts when to look at the targets again."""
        # The frame numbers themselves: a slice compared with a slice of a leaf tells a run, and
        # copied into a leaf writes one.
        count = max(arena.frames_count, LEAF_PAGES)
        self._ident = array("i", range(count))
        self._indexes = array("I", range(count))

    # --- members

    def open_member(self, member: Member) -> None:
        """A member may put pages from now on."""
        if not member.pool.persistent:
            member.policy = make_policy(self.policy_name, self.links, admission=self.admission)
            member.keyed = member.policy.wants_keys or member.sampler is not None
            self.victims.add(member)
        self.contents.admit(member)
        member.pool.members[member.slot] = member
        if not member.pool.shared:
            member.pool.only = member

    def bequeath(self, member: Member, heir: Client) -> None:
        """Another guest pays for a member's pages from now on."""
        if member.policy is not None:
            self.victims.remove(member)
        member.pass_to(heir)
        if member.policy is not None:
            self.victims.add(member)

    def close_member(self, member: Member) -> None:
        """A member without pages is no more."""
        assert not member.pages
        member.aim(0)
        if member.policy is not None:
            member.policy.close()
            self.victims.remove(member)
        self.contents.dismiss(member)
        del member.pool.members[member.slot]

    # --- one page: what `get` and `put` do, without their loops over leaves and runs

    def get_one(
        self, member: Member, oid: bytes, index: int, window: Window, slot: int, flags: int = 0
    ) -> bool:
        """`get` of one page: whether it was there."""
        pool = member.pool
        keep = flags & _KEEP or not pool.exclusive
        if member.sampler is not None:
            key = self.leaf_key(oid, index >> 6)
            if key & SAMPLE_MASK < member.sampler.threshold:
                member.sampler.get(key, index & 63, 1, keep=bool(keep))
        found = pool.objects.get(oid)
        if found is None:
            return False
        leaf = found.leaf(index >> 6)
        place = index & 63
        if leaf is None or place >= len(leaf):
            return False
        number = leaf[place]
        if number < 0:
            return False
        slots = window.slots
        if number < self._entry_base:
            slots[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES] = self._data[
                number * PAGE_BYTES : (number + 1) * PAGE_BYTES
            ]
        else:
            slots[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES] = self.contents.read(number)
        if not keep:
            self._remove(found, index >> 6, leaf, place, [(0, 1, number)], TAKEN)
        elif not pool.persistent:
            self._use(pool, number, 1)
        return True

    def put_one(
        self, member: Member, oid: bytes, index: int, window: Window, slot: int, flags: int = 0
    ) -> tuple[int, int]:
        """`put` of one page, with its results."""
        frames = self.frames
        if member.client.encodes or not frames.free:
            return self.put(member, oid, index, 1, window, slot, flags)
        words = window.words
        if words[slot * PAGE_WORDS] == words[slot * PAGE_WORDS + PAGE_WORDS - 1]:
            # It may be filled with one pattern.
            return self.put(member, oid, index, 1, window, slot, flags)
        pool = member.pool
        target = pool.objects.get(oid)
        place = index & 63
        leaf = None if target is None else target.leaf(index >> 6)
        if leaf is None or target is None:
            if pool.persistent or self.leaves >= self.arena.frames_count:
                return self.put(member, oid, index, 1, window, slot, flags)
            if target is None:
                target = self._new_object(pool, oid)
            leaf = self._new_leaf(target, index >> 6, place + 1)
        elif place >= len(leaf):
            target.lengthen(leaf, place + 1)
        frame = frames.take(PERSISTENT if pool.persistent else EPHEMERAL)
        self._data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES] = window.slots[
            slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES
        ]
        self.sequence = sequence = self.sequence + 1
        self._object_column[frame] = target.number
        self._index_column[frame] = index
        self._state_column[frame] = sequence << SEQUENCE_SHIFT | member.state_bits | flags
        old = leaf[place]
        leaf[place] = frame
        member.pages += 1
        member.cost_bytes += RAW_COST_BYTES
        member.purse.bytes += RAW_COST_BYTES
        if member.policy is not None:
            key = self.leaf_key(oid, index >> 6) if member.keyed else 0
            member.policy.inserted(frame, 1, key, place, flags)
            if member.sampler is not None and key & SAMPLE_MASK < member.sampler.threshold:
                member.sampler.put(key, place, 1)
        if old < 0:
            target.pages += 1
            pool.pages += 1
        else:
            self._release(target, old, 1, REMOVED, 0, place)
        return 1, 0

    # --- get

    def get(
        self,
        member: Member,
        oid: bytes,
        index: int,
        count: int,
        window: Window,
        slot: int,
        flags: int = 0,
    ) -> int:
        """Copy pages to window slots; bits of those that were there.  A private ephemeral get
        removes them, unless `flags` says KEEP."""
        pool = member.pool
        found = pool.objects.get(oid)
        if found is None and member.sampler is None:
            return 0
        exclusive = pool.exclusive and not flags & _KEEP
        bitmap = 0
        at = 0
        while at < count:
            place = (index + at) & 63
            leaf_number = (index + at) >> 6
            wanted = min(count - at, LEAF_PAGES - place)
            if member.sampler is not None:
                key = self.leaf_key(oid, leaf_number)
                if key & SAMPLE_MASK < member.sampler.threshold:
                    member.sampler.get(key, place, wanted, keep=not exclusive)
            leaf = None if found is None else found.leaf(leaf_number)
            if leaf is not None and found is not None:
                runs = self._runs(leaf[place : place + wanted])
                bitmap |= self._copy_out(runs, window.slots, slot + at) << at
                if exclusive and runs:
                    self._remove(found, leaf_number, leaf, place, runs, TAKEN)
                elif not pool.persistent:
                    for _, length, first in runs:
                        self._use(pool, first, length)
            at += wanted
        return bitmap

    def _copy_out(self, runs: list[Run], slots: memoryview, slot: int) -> int:
        """Bits of the pages that were copied to the window, from bit 0 for `slot`."""
        bitmap = 0
        data = self._data
        for at, count, first in runs:
            start = (slot + at) * PAGE_BYTES
            if first < self._entry_base:
                slots[start : start + count * PAGE_BYTES] = data[
                    first * PAGE_BYTES : (first + count) * PAGE_BYTES
                ]
            else:
                for number in range(first, first + count):
                    slots[start : start + PAGE_BYTES] = self.contents.read(number)
                    start += PAGE_BYTES
            bitmap |= _MASKS[count] << at
        return bitmap

    def _use(self, pool: Pool, first: int, count: int) -> None:
        """Pages were got and stay: their policies hear of it."""
        for member, number, length in self._by_member(pool, first, count):
            assert member.policy is not None
            member.policy.used(number, length)

    # --- put

    def put(
        self,
        member: Member,
        oid: bytes,
        index: int,
        count: int,
        window: Window,
        slot: int,
        flags: int = 0,
    ) -> tuple[int, int]:
        """Store pages from window slots; (bits of the pages stored, bits of older pages that were
        dropped because the new one did not fit).  Raises NoObjectNumber with nothing changed but
        pages evicted."""
        found = member.pool.objects.get(oid)
        first_leaf, last_leaf = index >> 6, index + count - 1 >> 6
        missing = int(found is None or found.leaf(first_leaf) is None)
        if last_leaf != first_leaf:
            missing += found is None or found.leaf(last_leaf) is None
        if missing:
            self._allow_leaves(member, missing)
        encodes = member.client.encodes
        filled = _MASKS[count] if encodes else candidates(window.words, slot, count)
        frames = self.frames
        persistent = member.pool.persistent
        reserved = 0
        if filled:
            reserved = self.entries.frames_needed(count, persistent=persistent)
        if frames.free < count + reserved:
            self.make_room(count + reserved, member.client)
            if filled:
                reserved = self.entries.frames_needed(count, persistent=persistent)
        pool = member.pool
        target = pool.objects.get(oid)
        if target is None:
            target = self._new_object(pool, oid)
        self.sequence += 1
        # What does not fit now is refused to the end of the call, though dropping older pages may
        # free frames on the way: the object could be gone by then.
        fits = max(0, min(count, frames.free - reserved))
        bitmap = 0
        dropped = 0
        at = 0
        while at < count:
            place = (index + at) & 63
            leaf_number = (index + at) >> 6
            wanted = min(count - at, LEAF_PAGES - place)
            storing = min(wanted, fits)
            if storing:
                self._put_in_leaf(
                    member,
                    target,
                    leaf_number,
                    place,
                    storing,
                    window.slots,
                    slot + at,
                    flags,
                    filled >> at,
                    fits - storing,
                )
                bitmap |= _MASKS[storing] << at
                fits -= storing
            if storing < wanted:
                bits = self._flush_in_leaf(target, leaf_number, place + storing, wanted - storing)
                dropped |= bits << (at + storing)
            at += wanted
        if not target.pages and pool.objects.get(oid) is target:
            self._drop_object(target)
        return bitmap, dropped

    def _put_in_leaf(
        self,
        member: Member,
        target: TmemObject,
        leaf_number: int,
        place: int,
        count: int,
        slots: memoryview,
        slot: int,
        flags: int,
        encode: int,
        remaining: int,
    ) -> None:
        """Store `count` pages; precondition: as many frames are free, and `remaining` more for the
        rest of the call, and entries for those whose bit is set in `encode`."""
        leaf = target.leaf(leaf_number)
        if leaf is None:
            leaf = self._new_leaf(target, leaf_number, place + count)
        elif place + count > len(leaf):
            target.lengthen(leaf, place + count)
        old = leaf[place : place + count]
        key = self.leaf_key(target.oid, leaf_number) if member.keyed else 0
        first_place = place
        if not encode & _MASKS[count]:
            self._put_raw(member, target, leaf_number, leaf, place, count, slots, slot, flags, key)
        else:
            at = 0
            while at < count:
                if encode >> at & 1:
                    self._put_encoded(
                        member,
                        target,
                        leaf_number,
                        leaf,
                        place + at,
                        slots,
                        slot + at,
                        flags,
                        key,
                        count - at - 1 + remaining,
                    )
                    at += 1
                    continue
                end = at + 1
                while end < count and not encode >> end & 1:
                    end += 1
                self._put_raw(
                    member,
                    target,
                    leaf_number,
                    leaf,
                    place + at,
                    end - at,
                    slots,
                    slot + at,
                    flags,
                    key,
                )
                at = end
        if member.sampler is not None and key & SAMPLE_MASK < member.sampler.threshold:
            member.sampler.put(key, first_place, count)
        fresh = count
        if old != NO_PAGES[count]:
            for at, length, first in self._runs(old):
                self._release(target, first, length, REMOVED, key, first_place + at)
                fresh -= length
        target.pages += fresh
        member.pool.pages += fresh

    def _put_raw(
        self,
        member: Member,
        target: TmemObject,
        leaf_number: int,
        leaf: array[int],
        place: int,
        count: int,
        slots: memoryview,
        slot: int,
        flags: int,
        key: int,
    ) -> None:
        number = target.number
        index = leaf_number * LEAF_PAGES + place
        state = self.sequence << SEQUENCE_SHIFT | member.state_bits | flags
        kind = PERSISTENT if member.policy is None else EPHEMERAL
        data = self._data
        for first, length in self.frames.allocate(count):
            data[first * PAGE_BYTES : (first + length) * PAGE_BYTES] = slots[
                slot * PAGE_BYTES : (slot + length) * PAGE_BYTES
            ]
            if length == 1:
                self._object_column[first] = number
                self._index_column[first] = index
                self._state_column[first] = state
                leaf[place] = first
            else:
                self._object_column[first : first + length] = array("I", [number]) * length
                self._index_column[first : first + length] = self._index_run(index, length)
                self._state_column[first : first + length] = array("Q", [state]) * length
                leaf[place : place + length] = self._ident[first : first + length]
            self.frames.mark(first, length, kind)
            if member.policy is not None:
                member.policy.inserted(first, length, key, place, flags)
            place += length
            index += length
            slot += length
        member.charge(count, count * RAW_COST_BYTES)

    def _put_encoded(
        self,
        member: Member,
        target: TmemObject,
        leaf_number: int,
        leaf: array[int],
        place: int,
        slots: memoryview,
        slot: int,
        flags: int,
        key: int,
        remaining: int,
    ) -> None:
        # Copied out once: what is looked at below must be what is stored.
        page = bytes(slots[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES])
        state = self.sequence << SEQUENCE_SHIFT | member.state_bits | flags
        index = leaf_number * LEAF_PAGES + place
        number = self.contents.put(member, page, target.number, index, state, remaining)
        leaf[place] = number
        if member.policy is not None:
            member.policy.inserted(number, 1, key, place, flags)

    def _index_run(self, index: int, length: int) -> array[int]:
        if index + length <= len(self._indexes):
            return self._indexes[index : index + length]
        return array("I", range(index, index + length))

    # --- flush

    def flush(self, member: Member, oid: bytes, index: int, count: int) -> int:
        """Drop pages; bits of those that were there."""
        if member.sampler is not None:
            self._sample_flush(member.sampler, oid, index, count)
        found = member.pool.objects.get(oid)
        bitmap = 0
        at = 0
        while found is not None and at < count:
            place = (index + at) & 63
            wanted = min(count - at, LEAF_PAGES - place)
            bitmap |= self._flush_in_leaf(found, (index + at) >> 6, place, wanted) << at
            at += wanted
        return bitmap

    def _sample_flush(self, sampler: ReuseSampler, oid: bytes, index: int, count: int) -> None:
        at = 0
        while at < count:
            place = (index + at) & 63
            wanted = min(count - at, LEAF_PAGES - place)
            key = self.leaf_key(oid, (index + at) >> 6)
            if key & SAMPLE_MASK < sampler.threshold:
                sampler.flush(key, place, wanted)
            at += wanted

    def _flush_in_leaf(self, found: TmemObject, leaf_number: int, place: int, wanted: int) -> int:
        leaf = found.leaf(leaf_number)
        bitmap = 0
        if leaf is not None:
            runs = self._runs(leaf[place : place + wanted])
            for at, length, _ in runs:
                bitmap |= _MASKS[length] << at
            if runs:
                self._remove(found, leaf_number, leaf, place, runs, REMOVED)
        return bitmap

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

    # --- making room

    def reap(self, limit_pages: int = REAP_SLICE_PAGES) -> int:
        """Free up to about `limit_pages` doomed pages, as many as they are if they lie together and
        fewer if each takes work of its own; how many."""
        freed = work = 0
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
        for _ in range(_SLICES_A_CALL):
            if enough() or not self.doomed:
                return
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
        """Free frames until `count` are free or nothing may be evicted: doomed pages first."""
        frames = self.frames
        self.reap_until(lambda: frames.free >= count)
        while frames.free < count:
            member = self.victims.choose(asking, self.state)
            if member is None or not self.evict(
                member, max(count - frames.free, EVICTION_BATCH_PAGES)
            ):
                break
            if frames.free < count and self.contents.compressed.pages:
                # Pages went that shared their frames with others: move these together.
                self.contents.compact(EVICTION_BATCH_PAGES, limit=0.0)

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
        for _ in range(_SLICES_A_CALL):
            if self.leaves <= leaves_max:
                return
            victim = self.victims.choose_by_leaves()
            if victim is None or not self.evict(victim, EVICTION_BATCH_PAGES):
                break
        if self.leaves > leaves_max:
            raise NoObjectNumber

    def _new_leaf(self, target: TmemObject, leaf_number: int, places: int) -> array[int]:
        self.leaves += 1
        target.pool.leaves += 1
        return target.new_leaf(leaf_number, places)

    def _count_leaf_gone(self, pool: Pool) -> None:
        self.leaves -= 1
        pool.leaves -= 1

    def evict(self, member: Member, pages: int) -> int:
        """Drop up to about so many of a member's ephemeral pages; how many went."""
        assert member.policy is not None
        gone = 0
        for first, length in member.policy.victims(pages):
            self._evict_run(first, length)
            gone += length
        self.evictions += gone
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

    # --- the bookkeeping that all of them share

    def state(self, number: int) -> int:
        """State word of a page."""
        if number < self._entry_base:
            return self._state_column[number]
        return self.entries.state(number)

    def member_of(self, pool: Pool, number: int) -> Member:
        """Who put a page."""
        if pool.only is not None:
            return pool.only
        return pool.members[self.state(number) >> SLOT_SHIFT & HINTS_MASK]

    def _member_at(self, number: int) -> Member:
        """Who put the page behind an entry."""
        owner = self.objects[self.entries.handle(number)[0]]
        assert owner is not None
        return self.member_of(owner.pool, number)

    def _by_member(self, pool: Pool, first: int, count: int) -> list[tuple[Member, int, int]]:
        """(member, first number, count) of neighbouring pages of one pool, by who put them."""
        if pool.only is not None:
            return [(pool.only, first, count)]
        parts: list[tuple[Member, int, int]] = []
        slot = -1
        for number in range(first, first + count):
            its_slot = self.state(number) >> SLOT_SHIFT & HINTS_MASK
            if its_slot == slot:
                member, start, length = parts[-1]
                parts[-1] = (member, start, length + 1)
            else:
                parts.append((pool.members[its_slot], number, 1))
                slot = its_slot
        return parts

    def _remove(
        self,
        owner: TmemObject,
        leaf_number: int,
        leaf: array[int],
        place: int,
        runs: list[Run],
        why: int,
    ) -> None:
        """Pages of a leaf are no more: `runs` are all that there are between `place`, from which
        they count, and the end of the last run."""
        gone = 0
        key = self.leaf_key(owner.oid, leaf_number) if why != REMOVED else 0
        for at, length, first in runs:
            self._release(owner, first, length, why, key, place + at)
            gone += length
        end = place + runs[-1][0] + runs[-1][1]
        leaf[place:end] = NO_PAGES[end - place]
        owner.pages -= gone
        if not owner.doomed:
            owner.pool.pages -= gone
        if not owner.pages:
            self._count_leaf_gone(owner.pool)
            self._drop_object(owner)
        elif leaf == NO_PAGES[len(leaf)]:
            self._count_leaf_gone(owner.pool)
            owner.drop_leaf(leaf_number)

    def _release(
        self, owner: TmemObject, first: int, count: int, why: int, key: int, place: int
    ) -> None:
        """Pages of one leaf stop being live, in the segment first (arena A1), and are no longer
        charged."""
        for member, number, length in self._by_member(owner.pool, first, count):
            if member.policy is not None:
                if why == TAKEN:
                    member.policy.taken(number, length, key, place + number - first)
                elif why == EVICTED and not owner.doomed:
                    member.policy.evicted(number, length, key, place + number - first)
                else:
                    member.policy.removed(number, length)
            if number >= self._entry_base:
                for entry in range(number, number + length):
                    self.contents.release(member, entry)
                continue
            member.charge(-length, -length * RAW_COST_BYTES)
            if length == 1:
                self._state_column[number] = 0
                self.frames.give(number)
            else:
                self._state_column[number : number + length] = _FREE_STATES[length]
                self.frames.release(number, length)

    def _new_object(self, pool: Pool, oid: bytes) -> TmemObject:
        """Precondition: `_allow_leaves`, so there is a number."""
        if self.free_object_numbers:
            number = self.free_object_numbers.pop()
        else:
            number = len(self.objects)
            assert number < self.arena.frames_count
            self.objects.append(None)
        made = TmemObject(number, pool, oid)
        self.objects[number] = made
        pool.objects[oid] = made
        self.arena.publish_object(number, pool.number, oid)
        return made

    def _drop_object(self, owner: TmemObject) -> None:
        self.arena.free_object(owner.number)
        if not owner.doomed:
            del owner.pool.objects[owner.oid]
        self.objects[owner.number] = None
        self.free_object_numbers.append(owner.number)

    def _runs(self, numbers: array[int]) -> list[Run]:
        """The runs in a slice of a leaf."""
        total = len(numbers)
        if not total:
            return []
        first = numbers[0]
        if first >= 0 and numbers == self._ident[first : first + total]:
            return [(0, total, first)]
        runs = []
        at = 0
        while at < total:
            first = numbers[at]
            start = at
            at += 1
            if first < 0:
                continue
            while at < total and numbers[at] == first + at - start:
                at += 1
            runs.append((start, at - start, first))
        return runs
