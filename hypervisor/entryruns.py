"""Runs of entries: what `contents` does with one page, for neighbours of one extent at a time.

A page that is compressed goes through some ten objects here, and to call each of them for each page
costs three times what LZ4 does.  So the common cases are written out: pages of a guest that shares
with nobody (`put_run`), pages that are read (`read_run`), and pages that go while nothing at all is
shared (`release_run`).  The rest is done page by page; what comes of it is the same.
"""

from __future__ import annotations

from hypervisor.compression import LZ4, decompress
from hypervisor.contents import LZ4_BEST, TIMED_EVERY, Contents
from hypervisor.entries import (
    ENTRY_BYTES,
    FILLED,
    KIND_MASK,
    SLAB,
    location_codec,
    location_length,
    location_place,
    slab_location,
)
from hypervisor.fill import pattern_of
from hypervisor.pools import Member
from hypervisor.slab import BACK_BYTES, class_bytes
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError


class EntryRuns(Contents):
    """`Contents` with extents."""

    def put_run(
        self,
        member: Member,
        untrusted_slots: memoryview,
        count: int,
        object_number: int,
        index: int,
        state: int,
        remaining: int,
    ) -> list[int]:
        """`put` of the first `count` pages in the slots, under neighbouring indexes; their page
        numbers.  `remaining` further pages of the call have frames and entries reserved."""
        pages = [
            # Copied out once: what is looked at below must be what is stored.
            untrusted_slots[start : start + PAGE_BYTES].tobytes()
            for start in range(0, count * PAGE_BYTES, PAGE_BYTES)
        ]
        if not member.client.settings.compress or member.client.domains[member.policy is None]:
            return [
                self.put(member, page, object_number, index + at, state, count - 1 - at + remaining)
                for at, page in enumerate(pages)
            ]
        return self._compress_run(member, pages, object_number, index, state, remaining)

    def _compress_run(
        self,
        member: Member,
        pages: list[bytes],
        object_number: int,
        index: int,
        state: int,
        remaining: int,
    ) -> list[int]:
        persistent = member.policy is None
        entries, slabs = self._entries, self.slabs
        spare = entries.allocate_run(len(pages), persistent=persistent)
        spare.reverse()
        numbers: list[int] = []
        left = len(pages) + remaining
        packed = packed_bytes = 0
        for at, page in enumerate(pages, index):
            left -= 1
            if self.owner is not None:
                self._prepare(page, at, state)
            pattern = pattern_of(page)
            if pattern is not None:
                number = spare.pop()
                entries.publish(number, object_number, at, FILLED, pattern, state)
                numbers.append(number)
                self._count_filled(member, 1)
                continue
            data = self._compressed(member, page, left, remaining)
            if data is None:
                numbers.append(self._put_raw(member, page, object_number, at, state))
                continue
            number = spare.pop()
            length = len(data)
            place = slabs.allocate(length + BACK_BYTES, persistent=persistent)
            slabs.write_whole(place, number, data)
            location = slab_location(place, length, LZ4.number)
            entries.publish(number, object_number, at, location, 0, state)
            numbers.append(number)
            packed += 1
            packed_bytes += class_bytes(length + BACK_BYTES)
        self._count_packed(member, packed, packed_bytes)
        for number in spare:
            entries.release(number)
        return numbers

    def pack(self, member: Member, page: bytes, object_number: int, index: int, state: int) -> int:
        """`put` of a page that lies in a frame of its own already; -1 if it is as well off there,
        or if there is no room for it to move."""
        entries, persistent = self._entries, member.policy is None
        if self._frames.free < entries.frames_needed(1, persistent=persistent):
            return -1
        data = self._compressed(member, page, 0, 1)
        if data is None:
            return -1
        number = entries.allocate(persistent=persistent)
        place = self.slabs.allocate(len(data) + BACK_BYTES, persistent=persistent)
        self.slabs.write_whole(place, number, data)
        location = slab_location(place, len(data), LZ4.number)
        entries.publish(number, object_number, index, location, 0, state)
        self._count_packed(member, 1, class_bytes(len(data) + BACK_BYTES))
        return number

    def _compressed(self, member: Member, page: bytes, frames: int, entries: int) -> bytes | None:
        """A page in fewer bytes, for which a slab has room beside so many frames and entries; None
        if it is to be stored raw."""
        self._puts += 1
        if self._puts % TIMED_EVERY:
            data = member.client.compressor.compress(page)
        else:
            started_ns = self._now_ns()
            data = member.client.compressor.compress(page)
            self.compressed.cpu_ns += TIMED_EVERY * (self._now_ns() - started_ns)
        persistent = member.policy is None
        if data is not None and (
            self.slabs.is_open(len(data) + BACK_BYTES, persistent=persistent)
            or self._fits(len(data), frames, entries, persistent=persistent)
        ):
            return data
        self.poor += 1
        return None

    def read_run(self, first: int, count: int, into: memoryview) -> None:
        """Copy the pages behind neighbouring entries to where `into` begins."""
        start = 0
        while count:
            here = self._entries.in_one_table(first, count)
            for number, location in enumerate(self._entries.locations(first, here), first):
                packed = location & KIND_MASK == SLAB
                page = self._unpacked(location) if packed else self.read(number)
                into[start : start + PAGE_BYTES] = page
                start += PAGE_BYTES
            first += here
            count -= here

    def _unpacked(self, location: int) -> bytes:
        codec = location_codec(location)
        data = self.slabs.view(location_place(location), location_length(location), BACK_BYTES)
        page = decompress(LZ4.number if codec == LZ4_BEST else codec, data)
        if page is None:
            raise InvariantError(f"the compressed page at {location:#x} is damaged")
        return page

    def release_run(self, member: Member, first: int, count: int) -> None:
        """`release` of neighbours."""
        if self.shared.count:
            # Each may have others behind it.
            for number in range(first, first + count):
                self.release(member, number)
            return
        while count:
            here = self._entries.in_one_table(first, count)
            locations = self._entries.locations(first, here)
            self._entries.clear_run(first, here)
            packed = [location for location in locations if location & KIND_MASK == SLAB]
            if packed:
                bytes_ = self.slabs.free_all([location_place(location) for location in packed])
                self._count_packed(member, -len(packed), -bytes_)
            if len(packed) < here:
                self._count_filled(member, len(packed) - here)
            self._entries.release_run(first, here)
            first += here
            count -= here

    def _count_packed(self, member: Member, pages: int, class_bytes_: int) -> None:
        """So many compressed pages more, which take so much of the slabs."""
        member.charge(pages, pages * ENTRY_BYTES + class_bytes_)
        self.compressed.pages += pages
        self.compressed.bytes_saved += pages * (PAGE_BYTES - ENTRY_BYTES) - class_bytes_

    def _count_filled(self, member: Member, pages: int) -> None:
        member.charge(pages, pages * ENTRY_BYTES)
        self.filled.pages += pages
        self.filled.bytes_saved += pages * (PAGE_BYTES - ENTRY_BYTES)
