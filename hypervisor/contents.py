"""What a page costs: same-filled, shared, compressed, or raw.

  put   one pattern of 8 bytes over and over?    an entry that holds the pattern
        the guest shares, and the bytes are      an entry more that names them; each of n owners
        stored already?                          pays 1/n
        the guest compresses, and it shrinks     an entry and a slot of a slab; costs the slot
        by a size class at least?
        else                                     a frame; of a guest that shares an entry, too

An entry costs its 32 bytes, so that a million pages of zeros are not free.

`put` can't fail: whoever calls has a frame for each page and the entries free before, and a slab
that needs more than what is spare is done without.  The bytes are looked at in a private copy only.

In a slab four bytes stand in front of the compressed page: the number of its entry, or of its
shared content with SHARED_MARK.  They are what compaction needs to find who names a place, they are
not part of the page, and recovery writes them anew.  The entries of one shared content are chained
through their pattern words, which they do not need otherwise.

Ephemeral and persistent pages share nothing with each other: what may vanish can't hold what must
stay, and the other way round memory would be pinned.

Xen stored shared pages with a reference count for ephemeral pools only, because it could not say
whom a shared persistent page should be billed to; shares of 1/n answer that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from hypervisor.arena import CONTENT_FRAME, HELD, Arena
from hypervisor.beside import Beside
from hypervisor.compression import LZ4, decompress
from hypervisor.entries import (
    ENTRY_BYTES,
    FILLED,
    FRAME,
    KIND_MASK,
    SLAB,
    Entries,
    frame_location,
    location_codec,
    location_length,
    location_place,
    slab_location,
)
from hypervisor.fill import page_of, pattern_of
from hypervisor.frames import CONTENT, EPHEMERAL, PERSISTENT, Frames
from hypervisor.objects import TmemObject
from hypervisor.pools import RAW_COST_BYTES, Client, Member
from hypervisor.sharing import SharedContents
from hypervisor.slab import BACK_BYTES, Slabs, class_bytes
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError

SHARED_MARK: Final = 1 << 31
LZ4_BEST: Final = 3
"""Codec of an LZ4 page that LZ4HC would not make smaller: it is not tried again."""

_LOW: Final = 0xFFFFFFFF
TIMED_EVERY: Final = 16
"""One put in so many is timed, and counts for all of them: a CPU clock costs 0.6 us to read."""


class Saving:
    """Pages of one kind that are stored now, what they save, and what it took since the start."""

    __slots__ = ("bytes_saved", "cpu_ns", "pages")

    def __init__(self) -> None:
        self.pages = 0
        self.bytes_saved = 0
        self.cpu_ns = 0

    def record(self) -> dict[str, int]:
        return {"pages": self.pages, "bytes_saved": self.bytes_saved, "cpu_ns": self.cpu_ns}


class Contents:
    """Pages behind entries.  `member_at` tells whose page a number is; the store sets it."""

    def __init__(
        self,
        arena: Arena,
        frames: Frames,
        entries: Entries,
        secret: bytes,
        now_ns: Callable[[], int],
    ) -> None:
        self._arena = arena
        self._data = arena.data
        self._frames = frames
        self._entries = entries
        self._now_ns = now_ns
        self.slabs = Slabs(arena, frames)
        self.shared = SharedContents(int.from_bytes(secret[:8], "little"))
        self._members: dict[int, Member] = {}
        self._free_members: list[int] = []
        """Numbers that are used again: a guest could else count them up to where they end."""
        self._chains = array("I")
        """By content: its youngest entry."""
        self._content_of_frame = array("i")
        """-1 where there is none; of no length until there is one."""
        self.shared_frames = [0, 0]
        """Frames that hold a content of ephemeral, of persistent pages."""
        self.beside: Beside
        """The store sets it."""
        self.owner: TmemObject | None = None
        """Whose page is put, if something is to stand beside it."""
        self.member_at: Callable[[int], Member] = _nobody
        self.filled = Saving()
        self.compressed = Saving()
        self.sharing = Saving()
        self.recompressed = Saving()
        self.poor = 0
        self.moved = 0
        """Objects that compaction moved."""
        self._cursor = 0
        self._fruitless = 0
        self._puts = 0

    # --- members and guests

    def admit(self, member: Member) -> None:
        """A member may put pages from now on."""
        free = self._free_members
        member.number = free.pop() if free else len(self._members)
        self._members[member.number] = member

    def dismiss(self, member: Member) -> None:
        """It is no more."""
        del self._members[member.number]
        self._free_members.append(member.number)

    def retire(self, client: Client) -> None:
        """A guest leaves: nobody who comes under its name later matches what it stored."""
        for domain in client.domains:
            if domain is not None and domain.endswith(f" guest {client.name}"):
                self.shared.retire(domain)

    # --- put

    def put(
        self,
        member: Member,
        page: bytes,
        object_number: int,
        index: int,
        state: int,
        remaining: int,
    ) -> int:
        """Store a page and publish it under its handle; its page number, in `frames` or an entry.

        `remaining` further pages of this call have their frames and entries reserved.
        """
        self._puts += 1
        if self.owner is not None:
            self._prepare(page, index, state)
        now_ns = _no_clock if self._puts % TIMED_EVERY else self._now_ns
        started_ns = now_ns()
        pattern = pattern_of(page)
        if pattern is not None:
            number = self._entries.allocate(persistent=member.policy is None)
            self._entries.publish(number, object_number, index, FILLED, pattern, state)
            member.charge(1, ENTRY_BYTES)
            self.filled.pages += 1
            self.filled.bytes_saved += PAGE_BYTES - ENTRY_BYTES
            self.filled.cpu_ns += TIMED_EVERY * (now_ns() - started_ns)
            return number
        client = member.client
        persistent = member.policy is None
        domain = client.domains[persistent]
        digest = -1
        if domain is not None:
            digest = self.shared.digest(page, domain)
            content = self.shared.find(digest)
            if content >= 0:
                location = self.shared.location[content]
                if self._bytes_at(location) != page:
                    # A chance match of digests: this page stays alone.
                    digest = -1
                elif self.shared.is_crowded(content, member.number):
                    # This page is the first of a second copy.
                    self.shared.hide(content)
                else:
                    number = self._share(member, content, object_number, index, state)
                    self.sharing.cpu_ns += TIMED_EVERY * (now_ns() - started_ns)
                    return number
            looked_up_ns = now_ns()
            self.sharing.cpu_ns += TIMED_EVERY * (looked_up_ns - started_ns)
            started_ns = looked_up_ns
        data = None
        if client.settings.compress:
            data = client.compressor.compress(page)
            self.compressed.cpu_ns += TIMED_EVERY * (now_ns() - started_ns)
            if data is not None and not self._fits(
                len(data), remaining, remaining + 1, persistent=persistent
            ):
                data = None
            if data is None:
                self.poor += 1
        if data is None and digest < 0:
            return self._put_raw(member, page, object_number, index, state)
        if data is None:
            frame = self._frames.take(CONTENT)
            self._data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES] = page
            self._arena.object[frame] = CONTENT_FRAME
            self._arena.index[frame] = 0
            self._arena.state[frame] = HELD
            location = frame_location(frame)
        else:
            location = self._write_slab(data, LZ4.number, persistent=persistent)
        if digest < 0:
            return self._put_alone(member, location, object_number, index, state)
        content = self.shared.insert(digest, location)
        self._name(content, location)
        return self._share(member, content, object_number, index, state)

    def _prepare(self, page: bytes, index: int, state: int) -> None:
        """What is to stand beside the page that is published next."""
        assert self.owner is not None
        self._entries.beside = self.beside.of_page(self.owner, index, state, page)

    def _fits(self, length: int, frames: int, entries: int, *, persistent: bool) -> bool:
        """Whether a slab has a place that takes nothing from what is reserved: so many frames, and
        what so many entries need."""
        size = length + BACK_BYTES
        if not class_bytes(size):
            return False
        needed = self.slabs.frames_needed(size, persistent=persistent)
        if not needed:
            return True
        tables = self._entries.frames_needed(entries, persistent=persistent)
        return self._frames.free - frames - tables >= needed

    def _put_raw(
        self, member: Member, page: bytes, object_number: int, index: int, state: int
    ) -> int:
        frame = self._frames.take(PERSISTENT if member.policy is None else EPHEMERAL)
        self._data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES] = page
        if self.owner is not None and self._entries.beside is not None:
            self.beside.write(self.owner, frame, self._entries.beside[1])
        self._arena.object[frame] = object_number
        self._arena.index[frame] = index
        self._arena.state[frame] = state
        member.charge(1, RAW_COST_BYTES)
        return frame

    def _write_slab(self, data: bytes, codec: int, *, persistent: bool) -> int:
        """Put compressed bytes into a slab, whoever is to name them; the location."""
        place = self.slabs.allocate(len(data) + BACK_BYTES, persistent=persistent)
        self.slabs.write(place, data, BACK_BYTES)
        return slab_location(place, len(data), codec)

    def _put_alone(
        self, member: Member, location: int, object_number: int, index: int, state: int
    ) -> int:
        number = self._entries.allocate(persistent=member.policy is None)
        self.slabs.write(location_place(location), number.to_bytes(BACK_BYTES, "little"))
        self._entries.publish(number, object_number, index, location, 0, state)
        member.charge(1, ENTRY_BYTES + held_bytes_at(location))
        self._count_stored(member, location, 1)
        return number

    def _share(
        self, member: Member, content: int, object_number: int, index: int, state: int
    ) -> int:
        """One reference more to a shared content."""
        location = self.shared.location[content]
        number = self._entries.allocate(persistent=member.policy is None)
        first = not self.shared.refs[content]
        self._entries.publish(number, object_number, index, location, 0, state)
        self._chain(content, number)
        self._apply(self.shared.add(content, member.number, held_bytes_at(location)))
        member.charge(1, ENTRY_BYTES)
        if first:
            self._count_stored(member, location, 1)
        else:
            self.sharing.pages += 1
            self.sharing.bytes_saved += held_bytes_at(location) - ENTRY_BYTES
        return number

    def _apply(self, changes: Iterable[tuple[int, int]]) -> None:
        for number, bytes_ in changes:
            self._members[number].charge(0, bytes_)

    def _count_stored(self, member: Member, location: int, sign: int) -> None:
        """Bytes have been stored for a member, the first of their owners, or are no more."""
        if location & KIND_MASK == SLAB:
            self.compressed.pages += sign
            saved_bytes = PAGE_BYTES - ENTRY_BYTES - held_bytes_at(location)
            self.compressed.bytes_saved += sign * saved_bytes
        else:
            self.shared_frames[member.policy is None] += sign

    # --- get

    def read(self, number: int) -> bytes:
        """The page behind an entry."""
        location = self._entries.location(number)
        if location & KIND_MASK == FILLED:
            return page_of(self._entries.pattern(number))
        return self._bytes_at(location)

    def _bytes_at(self, location: int) -> bytes:
        """None at all if they are damaged, in an arena with checksums."""
        place = location_place(location)
        if location & KIND_MASK == FRAME:
            frame = place >> 8
            return bytes(self._data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES])
        codec = location_codec(location)
        data = self.slabs.read(place, location_length(location), BACK_BYTES)
        page = decompress(LZ4.number if codec == LZ4_BEST else codec, data)
        if page is None:
            if self.beside.sums:
                return b""
            raise InvariantError(f"the compressed page at {location:#x} is damaged")
        return page

    def forget_bytes(self, number: int) -> None:
        """Recovery: nothing that an entry says of its page is to be believed."""
        words, at = self._arena.words, self._entries.at(number)
        words[at + 2] = FILLED
        words[at + 3] = 0

    # --- release

    def release(self, member: Member, number: int) -> None:
        """A page behind an entry is no more, in the segment first, and no longer charged."""
        location = self._entries.location(number)
        kind = location & KIND_MASK
        content = -1 if kind == FILLED else self._content_at(location)
        if content >= 0:
            self._unchain(content, number)
        self._entries.clear(number)
        if kind == FILLED:
            member.charge(-1, -ENTRY_BYTES)
            self.filled.pages -= 1
            self.filled.bytes_saved -= PAGE_BYTES - ENTRY_BYTES
        elif content < 0:
            member.charge(-1, -ENTRY_BYTES - held_bytes_at(location))
            self._count_stored(member, location, -1)
            self._free(location)
        else:
            held_bytes = held_bytes_at(location)
            self._apply(self.shared.drop(content, member.number, held_bytes))
            member.charge(-1, -ENTRY_BYTES)
            if self.shared.refs[content]:
                self.sharing.pages -= 1
                self.sharing.bytes_saved -= held_bytes - ENTRY_BYTES
            else:
                self._count_stored(member, location, -1)
                self._free(location)
        self._entries.release(number)

    def _free(self, location: int) -> None:
        place = location_place(location)
        if location & KIND_MASK == SLAB:
            self.slabs.free(place)
            return
        frame = place >> 8
        self._content_of_frame[frame] = -1
        self._arena.state[frame] = 0
        self._frames.give(frame)

    # --- shared contents: their number at their place, their entries in a chain

    def _name(self, content: int, location: int) -> None:
        """Write the number of a content where it lies."""
        place = location_place(location)
        if location & KIND_MASK == SLAB:
            mark = SHARED_MARK | content
            self.slabs.write(place, mark.to_bytes(BACK_BYTES, "little"))
        else:
            if not self._content_of_frame:
                self._content_of_frame.extend(array("i", [-1]) * self._frames.count)
            self._content_of_frame[place >> 8] = content
        while len(self._chains) <= content:
            self._chains.append(0)

    def _content_at(self, location: int) -> int:
        """The shared content that lies there, -1 if it is one entry's alone."""
        place = location_place(location)
        if location & KIND_MASK == FRAME:
            return self._content_of_frame[place >> 8]
        mark = int.from_bytes(self.slabs.read(place, BACK_BYTES), "little")
        return mark & ~SHARED_MARK if mark & SHARED_MARK else -1

    def _chain(self, content: int, number: int) -> None:
        words, entries = self._arena.words, self._entries
        oldest = self._chains[content]
        if oldest:
            at = entries.at(oldest) + 3
            words[at] = words[at] & _LOW | number << 32
        words[entries.at(number) + 3] = oldest
        self._chains[content] = number

    def _unchain(self, content: int, number: int) -> None:
        words, entries = self._arena.words, self._entries
        link = words[entries.at(number) + 3]
        following, before = link & _LOW, link >> 32
        if before:
            at = entries.at(before) + 3
            words[at] = words[at] & ~_LOW | following
        else:
            self._chains[content] = following
        if following:
            at = entries.at(following) + 3
            words[at] = words[at] & _LOW | before << 32

    def _entries_of(self, content: int) -> Iterator[int]:
        number = self._chains[content]
        while number:
            yield number
            number = self._arena.words[self._entries.at(number) + 3] & _LOW

    # --- what is known about them

    def savings(self) -> dict[str, dict[str, int]]:
        """Pages, bytes saved and CPU time of each way to save."""
        return {
            "filled": self.filled.record(),
            "compressed": self.compressed.record(),
            "shared": self.sharing.record(),
            "recompressed": self.recompressed.record(),
        }

    def slab_record(self) -> dict[str, Any]:
        """How full the slabs are."""
        stats = self.slabs.stats()
        return {
            "objects": stats.objects,
            "used_bytes": stats.used_bytes,
            "held_bytes": stats.held_bytes,
            "fragmentation": stats.fragmentation,
            "moved": self.moved,
            "poor_pages": self.poor,
            "index_bytes": self.shared.metadata_bytes,
        }

    def ephemeral_frame_bytes(self) -> int:
        """Frames that would come free if every ephemeral page went, raw ones not counted."""
        frames = self._entries.ephemeral_tables + self.slabs.ephemeral_frames
        return (frames + self.shared_frames[False]) * PAGE_BYTES


def held_bytes_at(location: int) -> int:
    """What lies there takes so much of the arena."""
    if location & KIND_MASK == FRAME:
        return PAGE_BYTES
    return class_bytes(location_length(location) + BACK_BYTES)


def _no_clock() -> int:
    return 0


def _nobody(number: int) -> Member:
    raise InvariantError(f"nobody has told whose page {number} is")
