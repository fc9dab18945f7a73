"""Taking stock of contents: work for idle time, recovery, and proof.

  compact     empties slab spans when too much of the slabs lies idle
  recompress  compresses harder what has lain long enough

Both work in bounded slices, write a second copy, turn the entries to it one by one (arena A6), and
then free the first.  `recover` takes over what a killed process left, `charges` and `check` compute
everything from the entries alone, for `invariants`.
"""

from __future__ import annotations

from typing import Final

from hypervisor.compression import LZ4, LZ4HC, recompress
from hypervisor.contents import LZ4_BEST, SHARED_MARK, held_bytes_at
from hypervisor.entries import (
    ENTRY_BYTES,
    FILLED,
    KIND_MASK,
    SLAB,
    location_codec,
    location_length,
    location_place,
)
from hypervisor.entryruns import EntryRuns
from hypervisor.frames import CONTENT
from hypervisor.pools import Member
from hypervisor.sharing import charge
from hypervisor.slab import BACK_BYTES, COMPACTION_LIMIT, class_bytes
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError

_TABLES_A_LOOK: Final = 8
"""Tables of entries that one slice of recompression looks through: 0.2 ms."""


class Inventory(EntryRuns):
    """Contents as the store has them."""

    # --- idle work

    def compact(self, moves_max: int, limit: float = COMPACTION_LIMIT) -> int:
        """Empty slab spans as long as more than `limit` of the slabs lies idle; objects moved."""
        moved = 0
        for persistent in (False, True):
            while moved < moves_max:
                span = self.slabs.compaction_candidate(persistent=persistent, limit=limit)
                places = [] if span is None else self.slabs.live_places(span)
                before = moved
                for place in places:
                    if moved >= moves_max:
                        break
                    moved += self._move(place)
                if moved == before:
                    break
        self.moved += moved
        return moved

    def _move(self, place: int) -> bool:
        """Move one object of the span that is to be emptied."""
        mark = int.from_bytes(self.slabs.read(place, BACK_BYTES), "little")
        if mark & SHARED_MARK:
            content = mark & ~SHARED_MARK
            location = self.shared.location[content]
        else:
            content = -1
            location = self._entries.location(mark)
        new_place = self.slabs.move(place, location_length(location) + BACK_BYTES)
        if new_place is None:
            return False
        self._turn(content, mark, location & 0xFFFF | new_place << 16)
        self.slabs.free(place)
        return True

    def _turn(self, content: int, number: int, location: int) -> None:
        """Let all that name a place name another one with the same bytes."""
        if content < 0:
            self._entries.move(number, location)
            return
        for one in self._entries_of(content):
            self._entries.move(one, location)
        self.shared.move(content, location)

    def recompress(self, sequence: int, age_puts: int, tries_max: int) -> int:
        """Try to make compressed pages smaller whose put is `age_puts` calls ago; tries made, or 1
        if some tables were looked at in vain, and 0 if that was true of all of them.

        A cursor goes round all entries, so that every page has its turn.
        """
        tries = 0
        tables = self._entries.blocks()
        for step in range(min(len(tables), _TABLES_A_LOOK)):
            block = tables[(self._cursor + step) % len(tables)]
            for number, state, _ in self._entries.of_block(block):
                # Read now: a page before this one may share its content, and have moved it.
                location = self._entries.location(number)
                if (
                    location & KIND_MASK == SLAB
                    and location_codec(location) == LZ4.number
                    and sequence - (state >> 16) >= age_puts
                ):
                    self._shrink(number, location)
                    tries += 1
                    if tries >= tries_max:
                        self._cursor = (self._cursor + step) % len(tables)
                        self._fruitless = 0
                        return tries
        self._cursor += _TABLES_A_LOOK
        self._fruitless = 0 if tries else self._fruitless + _TABLES_A_LOOK
        if tries or self._fruitless < len(tables):
            return max(tries, 1)
        self._fruitless = 0
        return 0

    def _shrink(self, number: int, location: int) -> None:
        started_ns = self._now_ns()
        content = self._content_at(location)
        length = location_length(location)
        page = self._bytes_at(location)
        data = recompress(page, length + BACK_BYTES) if page else None
        member = self.member_at(number)
        persistent = member.policy is None
        new_bytes = 0 if data is None else class_bytes(len(data) + BACK_BYTES)
        old_bytes = held_bytes_at(location)
        if (
            data is None
            or not 0 < new_bytes < old_bytes
            or not self._fits(len(data), 0, 1, persistent=persistent)
        ):
            self._turn(content, number, location & ~0xC | LZ4_BEST << 2)
            self.recompressed.cpu_ns += self._now_ns() - started_ns
            return
        fresh = self._write_slab(data, LZ4HC.number, persistent=persistent)
        place = location_place(fresh)
        back = number if content < 0 else SHARED_MARK | content
        self.slabs.write(place, back.to_bytes(BACK_BYTES, "little"))
        self._turn(content, number, fresh)
        self.slabs.free(location_place(location))
        if content < 0:
            member.charge(0, new_bytes - old_bytes)
        else:
            self._apply(self.shared.resize(content, old_bytes, new_bytes))
            extra = self.shared.refs[content] - 1
            self.sharing.bytes_saved += extra * (new_bytes - old_bytes)
        self.compressed.bytes_saved += old_bytes - new_bytes
        self.recompressed.pages += 1
        self.recompressed.bytes_saved += old_bytes - new_bytes
        self.recompressed.cpu_ns += self._now_ns() - started_ns

    # --- recovery

    def recover(self, live: list[tuple[int, Member]]) -> set[int]:
        """Take over the live entries of a killed process, whose slabs are adopted; the content
        frames that they name."""
        by_location: dict[int, list[tuple[int, Member]]] = {}
        for number, member in live:
            location = self._entries.location(number)
            if location & KIND_MASK == FILLED:
                member.charge(1, ENTRY_BYTES)
                self.filled.pages += 1
                self.filled.bytes_saved += PAGE_BYTES - ENTRY_BYTES
            else:
                # Whether LZ4HC was tried is the entry's to know: its siblings may have died untold.
                key = location & ~0xC
                by_location.setdefault(key, []).append((number, member))
        frames = set()
        for found in by_location.values():
            location = self._entries.location(found[0][0])
            if location & KIND_MASK == SLAB:
                size = location_length(location) + BACK_BYTES
                self.slabs.adopt(location_place(location), size)
            else:
                frames.add(location_place(location) >> 8)
            self._readopt(location, found)
        self.slabs.release_empty()
        return frames

    def _readopt(self, location: int, found: list[tuple[int, Member]]) -> None:
        member = found[0][1]
        domain = member.client.domains[member.policy is None]
        alone = location & KIND_MASK == SLAB and len(found) == 1
        if alone and domain is None:
            number = found[0][0]
            self.slabs.write(location_place(location), number.to_bytes(BACK_BYTES, "little"))
            member.charge(1, ENTRY_BYTES + held_bytes_at(location))
            self._count_stored(member, location, 1)
            return
        page = self._bytes_at(location)
        digest = -1 if domain is None else self.shared.digest(page, domain)
        if digest < 0 or self.shared.find(digest) >= 0:
            # The guest shares no more, or this is a second copy of the same bytes: the process died
            # while it was moving them.
            digest = self.shared.unmatched_digest()
        content = self.shared.insert(digest, location)
        self._name(content, location)
        self._count_stored(member, location, 1)
        for at, (number, holder) in enumerate(found):
            self._entries.move(number, location)
            self._chain(content, number)
            self._apply(self.shared.add(content, holder.number, held_bytes_at(location)))
            holder.charge(1, ENTRY_BYTES)
            if at:
                self.sharing.pages += 1
                self.sharing.bytes_saved += held_bytes_at(location) - ENTRY_BYTES

    def charges(self) -> dict[int, int]:
        """By id() of members: what their entries cost, computed from the entries alone."""
        references: dict[int, dict[int, int]] = {}
        totals: dict[int, int] = {}
        for number in self._entries.live():
            location = self._entries.location(number)
            member = self.member_at(number)
            totals[id(member)] = totals.get(id(member), 0) + ENTRY_BYTES
            if location & KIND_MASK == FILLED:
                continue
            holders = references.setdefault(location, {})
            holders[id(member)] = holders.get(id(member), 0) + 1
        for location, holders in references.items():
            refs = sum(holders.values())
            for member_id, own in holders.items():
                cost = charge(held_bytes_at(location), refs, own)
                totals[member_id] = totals.get(member_id, 0) + cost
        return totals

    def check(self, live: dict[int, Member]) -> None:
        """Raises InvariantError unless slabs, shared contents, chains and savings are what these
        entries say."""
        places: dict[int, int] = {}
        shared: dict[int, tuple[int, dict[int, int]]] = {}
        named: dict[int, set[int]] = {}
        frames: set[int] = set()
        persistent_frames: set[int] = set()
        filled = 0
        extra = 0
        for number, member in live.items():
            location = self._entries.location(number)
            kind = location & KIND_MASK
            if kind == FILLED:
                filled += 1
                continue
            place = location_place(location)
            if kind == SLAB:
                places[place] = location_length(location) + BACK_BYTES
            else:
                frames.add(place >> 8)
                if member.policy is None:
                    persistent_frames.add(place >> 8)
            content = self._content_at(location)
            if content < 0:
                if int.from_bytes(self.slabs.read(place, BACK_BYTES), "little") != number:
                    raise InvariantError(f"place {place:#x} does not know its entry {number}")
                continue
            known, holders = shared.setdefault(content, (location, {}))
            if known != location:
                raise InvariantError(f"content {content} lies at {known:#x} and {location:#x}")
            named.setdefault(content, set()).add(number)
            extra += bool(holders)
            holders[member.number] = holders.get(member.number, 0) + 1
        self.slabs.check(places)
        self.shared.check(shared)
        for content, numbers in named.items():
            if set(self._entries_of(content)) != numbers:
                raise InvariantError(f"the chain of content {content} is wrong")
        held = [len(frames - persistent_frames), len(persistent_frames)]
        if held != self.shared_frames:
            raise InvariantError(f"content frames are {held}, {self.shared_frames} counted")
        if frames != {n for n, content in enumerate(self._content_of_frame) if content >= 0}:
            raise InvariantError("content frames and their entries differ")
        if frames != {n for n, kind in enumerate(self._frames.kinds) if kind == CONTENT}:
            raise InvariantError("content frames and their marks differ")
        counted = (self.filled.pages, self.compressed.pages, self.sharing.pages)
        if counted != (filled, len(places), extra):
            raise InvariantError(f"savings count {counted}, not {(filled, len(places), extra)}")
