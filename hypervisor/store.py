"""The store: pages between the guests' windows and the arena.  Puts; `retrieval` has the rest.

The way of a page is  pool -> object -> leaf -> page number -> frame or entry; what a refusal is
called is `Machine`'s business.  One difference in mechanism from Xen: *room first, then look*.  A
put makes room before it looks its object up, because eviction may take pages, leaves and the very
object that was looked up.

Extents are done leaf by leaf, and within a leaf run by run: a run of neighbouring page numbers is
found by comparing a slice of the leaf with a slice of the identity array, and moved by one copy.
No Python object exists for a page.  Pages that `Contents` turns into entries go one by one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

from hypervisor.arena import SEQUENCE_SHIFT, Arena
from hypervisor.deferral import SPARE_FRAMES
from hypervisor.fill import candidates
from hypervisor.frames import EPHEMERAL, PERSISTENT
from hypervisor.objects import LEAF_PAGES, NO_PAGES, TmemObject
from hypervisor.pages import REMOVED, StoreOptions
from hypervisor.pagetokens import NEAR
from hypervisor.pools import RAW_COST_BYTES, Member, Pool
from hypervisor.retrieval import MASKS, SLOTS, Retrieval
from hypervisor.reuse import SAMPLE_MASK
from ipc.abi import PAGE_BYTES
from ipc.window import Window

PAGE_WORDS: Final = PAGE_BYTES // 8

PutExtent = tuple[bytes, int, int, int]
"""Object id, index of the first page, count, hints."""


class Store(Retrieval):
    """The whole store; `pages` says how it is layered."""

    def __init__(self, arena: Arena, options: StoreOptions) -> None:
        super().__init__(arena, options)
        # The frame numbers once more, as what a run of indexes is copied from.
        self._indexes = memoryview(self._ident).cast("B").cast("I")
        self._object_octets = arena.object_octets
        self._state_octets = arena.state_octets

    def put_under(self, pool: Pool, oid: bytes, token: int) -> None:
        """A put into a shared ephemeral pool under this token begins.  Where it can't be kept how
        far it is from that of its object, the object begins anew: its pages go."""
        tokens = self.beside.tokens
        tokens.token = token
        owner = pool.objects.get(oid)
        if (
            owner is not None
            and not 0 <= token - self.arena.object_token[owner.number] < NEAR
            and not tokens.find_base()
        ):
            self.evictions += self.flush_object(pool, oid)

    # --- one page: what `get` and `put` do, without their loops over leaves and runs

    def put_one(
        self, member: Member, oid: bytes, index: int, window: Window, slot: int, flags: int = 0
    ) -> tuple[int, int]:
        """`put` of one page, with its results."""
        frames = self.frames
        if (frames.free <= SPARE_FRAMES and frames.free <= self.spare_frames) or (
            member.client.encodes and not self.defers(member, 1)
        ):
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
        start = frame * PAGE_BYTES
        self._data[start : start + PAGE_BYTES] = window.slots[SLOTS[slot]]
        self.sequence = sequence = self.sequence + 1
        self._object_column[frame] = target.number
        self._index_column[frame] = index
        state = sequence << SEQUENCE_SHIFT | member.state_bits | flags
        if pool.notes:
            self.beside.note(target, frame, 1, index, state)
        self._state_column[frame] = state
        old = leaf[place]
        leaf[place] = frame
        if member.policy is not None:
            key = self.leaf_key(oid, index >> 6) if member.keyed else 0
            member.policy.inserted(frame, 1, key, place, flags)
            if member.sampler is not None and key & SAMPLE_MASK < member.sampler.threshold:
                member.sampler.put(key, place, 1)
        if 0 <= old < self._entry_base and pool.only is not None:
            # Its own page, which cost the same.
            if member.policy is not None:
                member.policy.removed(old, 1)
            self._state_column[old] = 0
            frames.give(old)
            return 1, 0
        member.charge(1, RAW_COST_BYTES)
        if old < 0:
            target.pages += 1
            pool.pages += 1
        else:
            self._release(target, old, 1, REMOVED, 0, place)
        return 1, 0

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
        if (
            (index & 63) + count <= LEAF_PAGES
            and not member.client.encodes
            and self.put_extents(member, [(oid, index, count, flags)], window, slot, count)
        ):
            return MASKS[count], 0
        return self._put_any(member, oid, index, count, window, slot, flags)

    def put_extents(
        self, member: Member, extents: Sequence[PutExtent], window: Window, slot: int, count: int
    ) -> int:
        """Store `count` pages side by side from `slot` on, which are extents of a leaf each; how
        many of the extents, from the first on.

        The next one may be filled with one pattern, or finds no room, or needs a leaf for which
        there are rules: it goes by `put`.  Precondition: the guest's pages are not encoded.
        """
        frames, pool = self.frames, member.pool
        filled = candidates(window.words, slot, count)
        if filled:
            plain = (filled & -filled).bit_length() - 1
            extents, count = _first(extents, plain)
        if frames.free < count + self.spare_frames:
            self.make_room(count, member.client)
        if not count or frames.free < count:
            return 0
        if pool.persistent:
            if not all(_has_leaf(pool, oid, index) for oid, index, _, _ in extents):
                return 0
        elif self.leaves + len(extents) > self.arena.frames_count:
            return 0
        for extent in extents:
            self._put_extent(member, *extent, window.slots, slot)
            slot += extent[2]
        member.charge(count, count * RAW_COST_BYTES)
        return len(extents)

    def _put_extent(
        self,
        member: Member,
        oid: bytes,
        index: int,
        count: int,
        flags: int,
        slots: memoryview,
        slot: int,
    ) -> None:
        """Pages of one leaf, for which there are frames."""
        pool = member.pool
        target = pool.objects.get(oid)
        if target is None:
            target = self._new_object(pool, oid)
        leaf_number = index >> 6
        place = index & 63
        leaf = target.leaf(leaf_number)
        if leaf is None:
            leaf = self._new_leaf(target, leaf_number, place + count)
        elif place + count > len(leaf):
            target.lengthen(leaf, place + count)
        self.sequence += 1
        key = self.leaf_key(oid, leaf_number) if member.keyed else 0
        old = leaf[place : place + count]
        self._put_raw(member, target, leaf, index, count, slots, slot, flags, key)
        sampler = member.sampler
        if sampler is not None and key & SAMPLE_MASK < sampler.threshold:
            sampler.put(key, place, count)
        if old != NO_PAGES[count]:
            count -= self._replaced(target, old, key, place)
        target.pages += count
        pool.pages += count

    def _put_any(
        self,
        member: Member,
        oid: bytes,
        index: int,
        count: int,
        window: Window,
        slot: int,
        flags: int,
    ) -> tuple[int, int]:
        """`put` of pages in two leaves, or some of which become entries, or find no room."""
        found = member.pool.objects.get(oid)
        first_leaf, last_leaf = index >> 6, index + count - 1 >> 6
        missing = int(found is None or found.leaf(first_leaf) is None)
        if last_leaf != first_leaf:
            missing += found is None or found.leaf(last_leaf) is None
        if missing:
            self._allow_leaves(member, missing)
        encodes = member.client.encodes and not self.defers(member, count)
        if encodes and self.deferred:
            self.squeeze_for(member, count)
        filled = MASKS[count] if encodes else candidates(window.words, slot, count)
        frames = self.frames
        persistent = member.pool.persistent
        reserved = 0
        if filled:
            self.entries.wide = member.pool.notes
            reserved = self.entries.frames_needed(count, persistent=persistent)
        if frames.free < count + reserved + self.spare_frames:
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
                bitmap |= MASKS[storing] << at
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
        if not encode & MASKS[count]:
            index = leaf_number * LEAF_PAGES + place
            self._put_raw(member, target, leaf, index, count, slots, slot, flags, key)
            member.charge(count, count * RAW_COST_BYTES)
        else:
            at = 0
            while at < count:
                kind = encode >> at & 1
                end = at + 1
                while end < count and encode >> end & 1 == kind:
                    end += 1
                if kind:
                    self._put_encoded(
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
                        count - end + remaining,
                    )
                else:
                    self._put_raw(
                        member,
                        target,
                        leaf,
                        leaf_number * LEAF_PAGES + place + at,
                        end - at,
                        slots,
                        slot + at,
                        flags,
                        key,
                    )
                    member.charge(end - at, (end - at) * RAW_COST_BYTES)
                at = end
        if member.sampler is not None and key & SAMPLE_MASK < member.sampler.threshold:
            member.sampler.put(key, place, count)
        if old != NO_PAGES[count]:
            count -= self._replaced(target, old, key, place)
        target.pages += count
        member.pool.pages += count

    def _replaced(self, target: TmemObject, old: array[int], key: int, place: int) -> int:
        """Others have taken the places of these pages of a leaf; how many there were."""
        gone = 0
        for at, length, first in self._runs(old):
            self._release(target, first, length, REMOVED, key, place + at)
            gone += length
        return gone

    def _put_raw(
        self,
        member: Member,
        target: TmemObject,
        leaf: array[int],
        index: int,
        count: int,
        slots: memoryview,
        slot: int,
        flags: int,
        key: int,
    ) -> None:
        """Frames for pages of a leaf, filled; their columns, states last (arena A1); the leaf, and
        the policy.  Whoever asks charges them."""
        policy = member.policy
        number = target.number
        state = self.sequence << SEQUENCE_SHIFT | member.state_bits | flags
        data = self._data
        place = index & 63
        start = slot * PAGE_BYTES
        for first, length in self.frames.allocate(
            count, PERSISTENT if policy is None else EPHEMERAL
        ):
            end = start + length * PAGE_BYTES
            data[first * PAGE_BYTES : (first + length) * PAGE_BYTES] = slots[start:end]
            start = end
            if target.pool.notes:
                self.beside.note(target, first, length, index, state)
            if length == 1:
                self._object_column[first] = number
                self._index_column[first] = index
                self._state_column[first] = state
                leaf[place] = first
            else:
                # Words as bytes: repeating those makes one object, and no array of one word first.
                end = first + length
                self._object_octets[4 * first : 4 * end] = number.to_bytes(4, "little") * length
                self._index_column[first:end] = self._index_run(index, length)
                self._state_octets[8 * first : 8 * end] = state.to_bytes(8, "little") * length
                leaf[place : place + length] = self._ident[first:end]
            if policy is not None:
                policy.inserted(first, length, key, place, flags)
            place += length
            index += length

    def _put_encoded(
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
        remaining: int,
    ) -> None:
        self.contents.owner = target if member.pool.notes else None
        numbers = self.contents.put_run(
            member,
            slots[slot * PAGE_BYTES :],
            count,
            target.number,
            leaf_number * LEAF_PAGES + place,
            self.sequence << SEQUENCE_SHIFT | member.state_bits | flags,
            remaining,
        )
        self.entries.beside = None
        leaf[place : place + count] = array("i", numbers)
        if member.policy is not None:
            for at, length, first in self._runs(leaf[place : place + count]):
                member.policy.inserted(first, length, key, place + at, flags)

    def _index_run(self, index: int, length: int) -> array[int] | memoryview:
        if index + length <= len(self._indexes):
            return self._indexes[index : index + length]
        return array("I", range(index, index + length))


def _first(extents: Sequence[PutExtent], limit_pages: int) -> tuple[Sequence[PutExtent], int]:
    """As many extents as have at most so many pages together, and their pages."""
    pages = 0
    for number, (_, _, count, _) in enumerate(extents):
        if pages + count > limit_pages:
            return extents[:number], pages
        pages += count
    return extents, pages


def _has_leaf(pool: Pool, oid: bytes, index: int) -> bool:
    found = pool.objects.get(oid)
    return found is not None and found.leaf(index >> 6) is not None
