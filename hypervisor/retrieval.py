"""How pages are had and dropped: gets, flushes, and what of them the policies and samplers hear.

Extents are done leaf by leaf, and within a leaf run by run, as puts are (`store`).  Nothing here
makes room, so nothing that was looked up can go meanwhile.
"""

from __future__ import annotations

from typing import Final

from hypervisor.objects import LEAF_PAGES, TmemObject
from hypervisor.pages import REMOVED, TAKEN, Run
from hypervisor.pools import Member, Pool
from hypervisor.reuse import SAMPLE_MASK, ReuseSampler
from hypervisor.vetting import Vetting
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, CallFlag
from ipc.limits import WINDOW_SLOTS
from ipc.window import Window

MASKS: Final = tuple((1 << n) - 1 for n in range(EXTENT_PAGES_MAX + 1))
SLOTS: Final = tuple(
    slice(slot * PAGE_BYTES, (slot + 1) * PAGE_BYTES) for slot in range(WINDOW_SLOTS)
)
_KEEP: Final = int(CallFlag.KEEP)


class Retrieval(Vetting):
    """The store as those see it who get and flush."""

    def get_one(
        self, member: Member, oid: bytes, index: int, window: Window, slot: int, flags: int = 0
    ) -> int:
        """`get` of one page: 1 if it was there, else 0."""
        pool = member.pool
        keep = flags & _KEEP or not pool.exclusive
        key = -1
        if member.sampler is not None:
            key = self.leaf_key(oid, index >> 6)
            if key & SAMPLE_MASK < member.sampler.threshold:
                member.sampler.get(key, index & 63, 1, keep=bool(keep))
        found = pool.objects.get(oid)
        if found is None:
            return 0
        leaf = found.leaf(index >> 6)
        place = index & 63
        if leaf is None or place >= len(leaf):
            return 0
        number = leaf[place]
        if number < 0 or (pool.vets and not self._passes(found, number, index)):
            return 0
        start = number * PAGE_BYTES
        window.slots[SLOTS[slot]] = (
            self._data[start : start + PAGE_BYTES]
            if number < self._entry_base
            else self.contents.read(number)
        )
        if not keep:
            self._remove(found, index >> 6, leaf, place, [(0, 1, number)], TAKEN, key)
        elif not pool.persistent:
            self._use(pool, number, 1)
        return 1

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
        sampler = member.sampler
        if found is None and sampler is None:
            return 0
        exclusive = pool.exclusive and not flags & _KEEP
        bitmap = 0
        at = 0
        while at < count:
            place = (index + at) & 63
            leaf_number = (index + at) >> 6
            wanted = count - at if place + count - at <= LEAF_PAGES else LEAF_PAGES - place
            key = -1
            if sampler is not None:
                key = self.leaf_key(oid, leaf_number)
                if key & SAMPLE_MASK < sampler.threshold:
                    sampler.get(key, place, wanted, keep=not exclusive)
            leaf = None if found is None else found.leaf(leaf_number)
            if leaf is not None and found is not None:
                runs = self._runs(leaf[place : place + wanted])
                if pool.vets and runs:
                    runs = self._passing(found, leaf_number, place, runs)
                if runs:
                    bitmap |= self._copy_out(runs, window.slots, slot + at) << at
                    if exclusive:
                        self._remove(found, leaf_number, leaf, place, runs, TAKEN, key)
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
                self.contents.read_run(first, count, slots[start:])
            bitmap |= MASKS[count] << at
        return bitmap

    def _use(self, pool: Pool, first: int, count: int) -> None:
        """Pages were got and stay: their policies hear of it."""
        for member, number, length in self._by_member(pool, first, count):
            assert member.policy is not None
            member.policy.used(number, length)

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
                bitmap |= MASKS[length] << at
            if runs:
                self._remove(found, leaf_number, leaf, place, runs, REMOVED)
        return bitmap
