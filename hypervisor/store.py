"""The store: pages between the guests' windows and the frames of the arena.

The way of a page is  pool -> object -> leaf -> frame; what a refusal is called and who is charged
is `Machine`'s business.  Two differences in mechanism from Xen:

  * *Room first, then look.*  A put makes room before it looks its object up, because eviction may
    take pages, leaves and the very object that was looked up.
  * *Doom, then reap.*  Flushing an object and destroying a pool disown all their pages by one word
    in the segment (arena A4) and free the frames in slices (`reap`), so that a guest's million
    pages never hold up its neighbours; Xen walked them all under a lock.

Extents are done leaf by leaf, and within a leaf run by run: a run of neighbouring frames is found
by comparing a slice of the leaf with a slice of the identity array, and moved by one copy.  No
Python object exists for a page.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import Final

from hypervisor.arena import POOLS_MAX, Arena
from hypervisor.eviction import make_policy
from hypervisor.frames import HOT, PERSISTENT, Frames
from hypervisor.pools import LEAF_PAGES, NO_FRAMES, Pool, TmemObject
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, PoolId

REAP_SLICE_PAGES: Final = 512
"""Doomed pages freed between two turns of the server."""

_MASKS: Final = tuple((1 << n) - 1 for n in range(EXTENT_PAGES_MAX + 1))
_FREE_STATES: Final = tuple(array("Q", [0]) * n for n in range(EXTENT_PAGES_MAX + 1))


Run = tuple[int, int, int]
"""Pages whose frames are neighbours: place in a slice of a leaf, count, first frame."""


class NoObjectNumber(Exception):
    """Every object number is in use; only reaping or eviction gives one back."""


class Store:
    """`objects[n]` is the object with number n.  A graveyard is a pool of no guest that holds the
    flushed objects of its kind until they are reaped."""

    def __init__(self, arena: Arena, policy: str) -> None:
        self.arena = arena
        self._data = arena.data
        self._state_column = arena.state
        self._object_column = arena.object
        self._index_column = arena.index
        self.frames = Frames(arena.frames_count)
        self.policy = make_policy(policy, self.frames)
        self.evictions = 0
        self.sequence = 0
        self.objects: list[TmemObject | None] = []
        self.free_object_numbers: list[int] = []
        self.doomed = False
        """Something waits to be reaped: a plain attribute, the server reads it every turn."""
        self.doomed_pools: deque[Pool] = deque()
        self.free_pool_numbers = list(range(POOLS_MAX - 1, -1, -1))
        self.graveyards = tuple(
            Pool(-1, PoolId(-1), 0, b"", persistent=persistent) for persistent in (False, True)
        )
        # The frame numbers themselves: a slice compared with a slice of a leaf tells a run, and
        # copied into a leaf writes one.
        count = max(arena.frames_count, LEAF_PAGES)
        self._ident = array("i", range(count))
        self._policy_listens = self.policy.listens
        self._indexes = array("I", range(count))

    # --- one page: what `get` and `put` do, without their loops over leaves and runs

    def get_one(self, pool: Pool, oid: bytes, index: int, slots: memoryview, slot: int) -> bool:
        """`get` of one page: whether it was there."""
        found = pool.objects.get(oid)
        if found is None:
            return False
        leaf = found.leaf(index >> 6)
        place = index & 63
        if leaf is None or place >= len(leaf):
            return False
        frame = leaf[place]
        if frame < 0:
            return False
        slots[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES] = self._data[
            frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES
        ]
        if not pool.persistent:
            self._remove(found, index >> 6, leaf, place, [(0, 1, frame)])
        return True

    def put_one(
        self, pool: Pool, oid: bytes, index: int, slots: memoryview, slot: int
    ) -> tuple[int, int]:
        """`put` of one page, with its results."""
        frames = self.frames
        if not frames.free:
            self._make_room(1)
            if not frames.free:
                return self.put(pool, oid, index, 1, slots, slot)
        target = pool.objects.get(oid)
        if target is None:
            target = self._new_object(pool, oid)
        place = index & 63
        leaf = target.leaf(index >> 6)
        if leaf is None or place >= len(leaf):
            leaf = target.leaf_for(index >> 6, place + 1)
        kind = PERSISTENT if pool.persistent else HOT
        frame = frames.take(kind)
        self._data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES] = slots[
            slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES
        ]
        self.sequence = sequence = self.sequence + 1
        self._object_column[frame] = target.number
        self._index_column[frame] = index
        self._state_column[frame] = sequence
        old = leaf[place]
        leaf[place] = frame
        if self._policy_listens and kind == HOT:
            self.policy.inserted(frame, 1)
        if old < 0:
            target.pages += 1
            pool.pages += 1
        else:
            self._release_one(pool, old)
        return 1, 0

    def _release_one(self, pool: Pool, frame: int) -> None:
        self._state_column[frame] = 0
        if self._policy_listens and not pool.persistent:
            self.policy.removed(frame, 1)
        self.frames.give(frame)

    # --- get

    def get(
        self, pool: Pool, oid: bytes, index: int, count: int, slots: memoryview, slot: int
    ) -> int:
        """Copy pages to window slots; bits of those that were there.  A private ephemeral get
        removes them."""
        found = pool.objects.get(oid)
        if found is None:
            return 0
        bitmap = 0
        at = 0
        while at < count:
            place = (index + at) & 63
            leaf_number = (index + at) >> 6
            wanted = min(count - at, LEAF_PAGES - place)
            leaf = found.leaf(leaf_number)
            if leaf is not None:
                bits = self._get_from_leaf(
                    found, leaf_number, leaf, place, wanted, slots, slot + at
                )
                bitmap |= bits << at
            at += wanted
        return bitmap

    def _get_from_leaf(
        self,
        found: TmemObject,
        leaf_number: int,
        leaf: array[int],
        place: int,
        wanted: int,
        slots: memoryview,
        slot: int,
    ) -> int:
        """Bits of the pages that were copied to the window, from bit 0 for `place`."""
        exclusive = not found.pool.persistent
        bitmap = 0
        data = self._data
        runs = self._runs(leaf[place : place + wanted])
        for at, count, first in runs:
            slots[(slot + at) * PAGE_BYTES : (slot + at + count) * PAGE_BYTES] = data[
                first * PAGE_BYTES : (first + count) * PAGE_BYTES
            ]
            bitmap |= _MASKS[count] << at
        if exclusive and runs:
            self._remove(found, leaf_number, leaf, place, runs)
        return bitmap

    # --- put

    def put(
        self, pool: Pool, oid: bytes, index: int, count: int, slots: memoryview, slot: int
    ) -> tuple[int, int]:
        """Store pages from window slots; (bits of the pages stored, bits of older pages that were
        dropped because the new one did not fit).  Raises NoObjectNumber with nothing changed but
        pages evicted."""
        if self.frames.free < count:
            self._make_room(count)
        target = pool.objects.get(oid)
        if target is None:
            target = self._new_object(pool, oid)
        self.sequence += 1
        # What does not fit now is refused to the end of the call, though dropping older pages may
        # free frames on the way: the object could be gone by then.
        fits = min(count, self.frames.free)
        bitmap = 0
        dropped = 0
        at = 0
        while at < count:
            place = (index + at) & 63
            leaf_number = (index + at) >> 6
            wanted = min(count - at, LEAF_PAGES - place)
            storing = min(wanted, fits)
            if storing:
                self._put_in_leaf(pool, target, leaf_number, place, storing, slots, slot + at)
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
        pool: Pool,
        target: TmemObject,
        leaf_number: int,
        place: int,
        count: int,
        slots: memoryview,
        slot: int,
    ) -> None:
        """Store `count` pages; precondition: as many frames are free."""
        leaf = target.leaf_for(leaf_number, place + count)
        old = leaf[place : place + count]
        number = target.number
        index = leaf_number * LEAF_PAGES + place
        sequence = self.sequence
        kind = PERSISTENT if pool.persistent else HOT
        data = self._data
        for first, length in self.frames.allocate(count):
            data[first * PAGE_BYTES : (first + length) * PAGE_BYTES] = slots[
                slot * PAGE_BYTES : (slot + length) * PAGE_BYTES
            ]
            if length == 1:
                self._object_column[first] = number
                self._index_column[first] = index
                self._state_column[first] = sequence
                leaf[place] = first
            else:
                self._object_column[first : first + length] = array("I", [number]) * length
                self._index_column[first : first + length] = self._index_run(index, length)
                self._state_column[first : first + length] = array("Q", [sequence]) * length
                leaf[place : place + length] = self._ident[first : first + length]
            self.frames.mark(first, length, kind)
            if self._policy_listens and kind == HOT:
                self.policy.inserted(first, length)
            place += length
            index += length
            slot += length
        if old == NO_FRAMES[count]:
            target.pages += count
            pool.pages += count
            return
        fresh = count
        for _, length, first in self._runs(old):
            self._release(pool, first, length)
            fresh -= length
        target.pages += fresh
        pool.pages += fresh

    def _index_run(self, index: int, length: int) -> array[int]:
        if index + length <= len(self._indexes):
            return self._indexes[index : index + length]
        return array("I", range(index, index + length))

    # --- flush

    def flush(self, pool: Pool, oid: bytes, index: int, count: int) -> int:
        """Drop pages; bits of those that were there."""
        found = pool.objects.get(oid)
        bitmap = 0
        at = 0
        while found is not None and at < count:
            place = (index + at) & 63
            wanted = min(count - at, LEAF_PAGES - place)
            bitmap |= self._flush_in_leaf(found, (index + at) >> 6, place, wanted) << at
            at += wanted
        return bitmap

    def _flush_in_leaf(self, found: TmemObject, leaf_number: int, place: int, wanted: int) -> int:
        leaf = found.leaf(leaf_number)
        bitmap = 0
        if leaf is not None:
            runs = self._runs(leaf[place : place + wanted])
            for at, length, _ in runs:
                bitmap |= _MASKS[length] << at
            if runs:
                self._remove(found, leaf_number, leaf, place, runs)
        return bitmap

    def flush_object(self, pool: Pool, oid: bytes) -> int:
        """Disown an object; the number of pages that it had."""
        found = pool.objects.pop(oid, None)
        if found is None:
            return 0
        self.arena.kill_object(found.number)
        graveyard = self.graveyards[pool.persistent]
        found.pool = graveyard
        found.key = found.number
        graveyard.objects[found.number] = found
        self.doomed = True
        graveyard.pages += found.pages
        pool.pages -= found.pages
        return found.pages

    def doom_pool(self, pool: Pool) -> None:
        """Disown a pool that no client refers to any more."""
        self.arena.kill_pool(pool.number)
        self.doomed_pools.append(pool)
        self.doomed = True

    # --- making room

    def reap(self, limit_pages: int = REAP_SLICE_PAGES) -> int:
        """Free up to about `limit_pages` doomed frames; how many."""
        freed = 0
        while freed < limit_pages:
            found = self._next_doomed()
            if found is None:
                self.doomed = False
                break
            while found.pages and freed < limit_pages:
                leaf_number, leaf = found.first_leaf()
                pages = found.pages
                self._remove(found, leaf_number, leaf, 0, self._runs(leaf))
                freed += pages - found.pages
        return freed

    def take_pool_number(self) -> int | None:
        """A pool record that is free; None if all are taken, or wait with a doomed pool's pages."""
        return self.free_pool_numbers.pop() if self.free_pool_numbers else None

    def _next_doomed(self) -> TmemObject | None:
        for yard in self.graveyards:
            if yard.objects:
                return next(iter(yard.objects.values()))
        while self.doomed_pools:
            pool = self.doomed_pools[0]
            if pool.objects:
                return next(iter(pool.objects.values()))
            self.doomed_pools.popleft()
            self.arena.free_pool(pool.number)
            self.free_pool_numbers.append(pool.number)
        return None

    def _make_room(self, count: int) -> None:
        """Free frames until `count` are free or nothing evictable is left: doomed pages first."""
        while self.frames.free < count and self.reap(count - self.frames.free):
            pass
        while self.frames.free < count:
            victims = self.policy.victims(count - self.frames.free)
            if not victims:
                break
            for first, length in victims:
                self._evict(first, length)

    def _evict(self, first: int, count: int) -> None:
        """Drop the ephemeral pages in `count` neighbouring frames, whosesoever they are."""
        numbers = self.arena.object[first : first + count].tolist()
        indexes = self.arena.index[first : first + count].tolist()
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
            self._remove(owner, index >> 6, leaf, index & 63, [(0, end - at, first + at)])
            at = end
        self.evictions += count

    # --- the bookkeeping that all of them share

    def _remove(
        self,
        owner: TmemObject,
        leaf_number: int,
        leaf: array[int],
        place: int,
        runs: list[Run],
    ) -> None:
        """Pages of a leaf are no more: `runs` are all that there are between `place`, from which
        they count, and the end of the last run."""
        pool = owner.pool
        gone = 0
        for _, length, first in runs:
            self._release(pool, first, length)
            gone += length
        end = place + runs[-1][0] + runs[-1][1]
        leaf[place:end] = NO_FRAMES[end - place]
        owner.pages -= gone
        pool.pages -= gone
        if not owner.pages:
            self._drop_object(owner)
        elif leaf == NO_FRAMES[len(leaf)]:
            owner.drop_leaf(leaf_number)

    def _release(self, pool: Pool, first: int, count: int) -> None:
        """Frames become free, in the segment first (arena A1)."""
        if count == 1:
            self._release_one(pool, first)
            return
        self._state_column[first : first + count] = _FREE_STATES[count]
        if self._policy_listens and not pool.persistent:
            self.policy.removed(first, count)
        self.frames.release(first, count)

    def _new_object(self, pool: Pool, oid: bytes) -> TmemObject:
        if self.free_object_numbers:
            number = self.free_object_numbers.pop()
        elif len(self.objects) < self.arena.frames_count:
            number = len(self.objects)
            self.objects.append(None)
        else:
            raise NoObjectNumber
        made = TmemObject(number, pool, oid)
        self.objects[number] = made
        pool.objects[oid] = made
        self.arena.publish_object(number, pool.number, oid)
        return made

    def _drop_object(self, owner: TmemObject) -> None:
        self.arena.free_object(owner.number)
        del owner.pool.objects[owner.key]
        self.objects[owner.number] = None
        self.free_object_numbers.append(owner.number)

    def _runs(self, frames: array[int]) -> list[Run]:
        """The runs in a slice of a leaf."""
        total = len(frames)
        if not total:
            return []
        first = frames[0]
        if first >= 0 and frames == self._ident[first : first + total]:
            return [(0, total, first)]
        runs = []
        at = 0
        while at < total:
            first = frames[at]
            start = at
            at += 1
            if first < 0:
                continue
            while at < total and frames[at] == first + at - start:
                at += 1
            runs.append((start, at - start, first))
        return runs
