"""The arena: one shared-memory segment with the pages and all that is needed to find them again.

  header | guest, pool, member records, origins | frame columns | page frames | object columns
                                                   state  u64                    word u32
                                                   object u32                    oid  24 bytes
                                                   index  u32                    token u64
                    | columns beside: bases u64, code u16, sum u32 | blocks u8

A *frame* of 4 KiB holds one raw page, or serves pages that need less than a frame: then it is a
table of 128 *entries*, part of a slab, or content that entries refer to; or it is lent to a guest
as RAM, holds nothing, and its index is the guest's number (`lending`).  A raw page and an entry are
described alike: object number, page index, and a state word that is 0 if there is no page.  An
*object number* stands for (pool record, object id), so that a page costs 16 bytes and not 40.

  state     sequence of the put << 16 | slot of the member that put it << 8 | its hints
            (of a frame that holds no raw page: not 0, and `object` says what it is)
  entry     state u64, object u32, index u32, location u64, pattern u64   (`entries`)
  pool      flags, uuid, and whose it is, or of a shared pool its highest fencing token (`tokens`)
  member    a guest in a shared pool: word and guest, pool record, pool id, slot
            (a private pool has one member, its pool record says whom)
  origin    of a member record: who put the pages of its slot, whoever pays for them now, and up to
            which sequence they are disowned (`quarantine`)
  token     of an object in a shared ephemeral pool: fencing token of the put that made it; of its
            pages `code` says how far theirs is from it (`pagetokens`)
  sum       checksum of a page (`checksums`), in an arena that was made with them
  header    also moments: at this time the sequence was that (`provenance`)

Invariants (they let the hypervisor be killed at any instruction and started again)
  A1  A page is live if and only if its state is not 0.  State is written last when a page is put,
      by one aligned store, and first when a page goes.
  A2  A live page is never overwritten in place: a duplicate put fills another frame or entry,
      publishes it with a higher sequence, then frees the old one.  Of two live pages with one
      handle the higher state is the page (`recovery` frees the other); of equal states each has
      the same bytes, in a frame and compressed (`deferral`).
  A3  An object record is published before a page names it, and used again only when no page
      names it.  The same holds for pool records and objects, guest and member records and pools.
  A4  A pool or object word with DEAD set disowns every page below it at once; the frames are freed
      later, in slices.
  A5  A put's sequence is above that of every live page, whoever restarted in between.
  A6  What an entry's location names (slab place, content frame) is written before the location, and
      the location changes by one aligned store to another copy of the same bytes.  What no live
      entry names is free: occupancy of slabs and counts of references are not in the segment.
  A7  What stands beside a page (code, checksum) is written before its state, what a code refers to
      before the code, the mark of a block before its first code, an origin before its member word;
      to raise an origin's sequence disowns pages by one aligned store, like A4.

What a killed process stored is in memory up to the instruction it died at, in program order, so A1
needs no fence.  Slices of up to 64 state words go through memcpy, which moves an aligned span of at
most 512 bytes in whole 8-byte words; no word is ever torn.

The object columns come after the pages and fill from the bottom up, so that an arena of large files
never allocates most of them; the columns beside come last and take memory only where they are used.
Xen kept all of this in a heap that died with the hypervisor.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from typing import Final, NamedTuple

from ipc.abi import OID_BYTES, PAGE_BYTES, GuestId, PoolFlag, PoolId
from ipc.errors import ExitCode, OperatorError
from ipc.limits import GUEST_NAME_CHARACTERS_MAX, GUESTS_MAX

POOLS_MAX: Final = 4096
MEMBERS_MAX: Final = 1024
"""Memberships of shared pools, all pools together, heirs' included."""
FRAMES_MIN: Final = 64

SEQUENCE_SHIFT: Final = 16
SLOT_SHIFT: Final = 8
SLOTS: Final = 256
"""Member slots of a shared pool; 64 sharers and what leavers left behind."""
HINTS_MASK: Final = 0xFF

ENTRY_TABLE: Final = 0xFFFFFFFF
SLAB_PART: Final = 0xFFFFFFFE
CONTENT_FRAME: Final = 0xFFFFFFFD
LENT_FRAME: Final = 0xFFFFFFFC
"""In the object column: what a frame is that holds no raw page."""
SPECIAL_OBJECTS: Final = 0xFFFFFF00
"""Object numbers from here on are such marks."""
HELD: Final = 1
"""State of a table, content or lent frame."""

LIVE: Final = 1
DEAD: Final = 1 << 31

_MAGIC: Final = b"TMEMARN5"
_HEADER: Final = struct.Struct("<8sIIQI")
"""magic, frames, generation, segment bytes, flags."""
_CHECKSUMS: Final = 1
"""Flag: there is a column of checksums."""
_MOMENTS_OFFSET: Final = 64
_MOMENT_BYTES: Final = 16
"""sequence (0 free), ns since 1970."""
MOMENTS_MAX: Final = (PAGE_BYTES - _MOMENTS_OFFSET) // _MOMENT_BYTES
_GENERATION_OFFSET: Final = 12
_GUEST: Final = struct.Struct("<IIQI4x32s8x")
"""word (0 free, LIVE), pid, process start (clock ticks), uid, name."""
_POOL: Final = struct.Struct("<IIQ16s")
"""word (0 free, LIVE, LIVE | DEAD), pool flags, owner, uuid.

owner: of a private pool its guest record and pool id, 32 bits each; of a shared pool, which has
member records, the highest fencing token that was seen."""
NOBODY: Final = 0xFFFFFFFF
"""Guest of the record of a shared pool."""

_MEMBER: Final = struct.Struct("<IIIHH")
"""word (0 free, LIVE, HEIR), guest record, pool record, pool id, slot."""
HEIR: Final = 2
"""A member word: the guest has only inherited the charges of one that left."""

_ORIGIN: Final = struct.Struct("<32sI4xQ")
"""name, pid of who put a slot's pages; sequence up to which they are disowned."""
_ORIGIN_WORDS: Final = 6

_HEADER_BYTES: Final = PAGE_BYTES
_FRAME_COLUMN_BYTES: Final = 8 + 4 + 4
_OBJECT_COLUMN_BYTES: Final = 4 + OID_BYTES + 8
_CODE_BYTES: Final = 2
TOKEN_BASES: Final = 64
CODES_BLOCK_SHIFT: Final = 11
"""Codes of so many frames (their logarithm) share a page of the host's memory, and a mark."""
_SUM_BYTES: Final = 4

assert _GUEST.size == 64
assert _POOL.size == 32
assert _MEMBER.size == 16
assert _ORIGIN.size == 8 * _ORIGIN_WORDS
assert GUEST_NAME_CHARACTERS_MAX < 32


class GuestRecord(NamedTuple):
    """A guest that has attached; its number is its place in the table."""

    number: GuestId
    name: str
    pid: int
    start_ticks: int
    uid: int


class PoolRecord(NamedTuple):
    """A pool that was made; a dead one waits for its pages to be freed."""

    number: int
    dead: bool
    guest: GuestId
    pool_id: PoolId
    flags: int
    uuid: bytes
    token: int = 0
    """Of a shared pool."""


class MemberRecord(NamedTuple):
    """A guest's part in a shared pool; `heir` if it only pays for what another left."""

    number: int
    heir: bool
    guest: GuestId
    pool: int
    pool_id: PoolId
    slot: int


class Origin(NamedTuple):
    """Who put the pages of a member's slot, and the sequence up to which nobody may have them."""

    name: str
    pid: int
    disowned: int = 0


class Layout(NamedTuple):
    """Offsets into a segment of `frames` frames, in bytes."""

    frames: int
    guests: int
    pools: int
    members: int
    origins: int
    state_column: int
    object_column: int
    index_column: int
    data: int
    object_word: int
    object_oid: int
    object_token: int
    bases: int
    code: int
    sum: int
    blocks: int
    end: int


def layout(frames: int, *, checksums: bool = False) -> Layout:
    """Where everything is in a segment of this many frames; columns first, then pages."""
    guests = _HEADER_BYTES
    pools = guests + GUESTS_MAX * _GUEST.size
    members = pools + POOLS_MAX * _POOL.size
    origins = members + MEMBERS_MAX * _MEMBER.size
    state = origins + MEMBERS_MAX * _ORIGIN.size
    object_ = state + 8 * frames
    index = object_ + 4 * frames
    data = -(-(index + 4 * frames) // PAGE_BYTES) * PAGE_BYTES
    object_word = data + PAGE_BYTES * frames
    object_oid = object_word + 4 * frames
    object_token = -(-(object_oid + OID_BYTES * frames) // 8) * 8
    bases = object_token + 8 * frames
    code = bases + 8 * TOKEN_BASES
    sum_ = -(-(code + _CODE_BYTES * frames) // 4) * 4
    blocks = sum_ + checksums * _SUM_BYTES * frames
    return Layout(
        frames=frames,
        guests=guests,
        pools=pools,
        members=members,
        origins=origins,
        state_column=state,
        object_column=object_,
        index_column=index,
        data=data,
        object_word=object_word,
        object_oid=object_oid,
        object_token=object_token,
        bases=bases,
        code=code,
        sum=sum_,
        blocks=blocks,
        end=blocks + -((-frames) >> CODES_BLOCK_SHIFT),
    )


def frames_that_fit(arena_bytes: int, *, checksums: bool = False) -> int:
    """The most frames whose whole segment is at most `arena_bytes`; raises OperatorError below
    FRAMES_MIN."""
    per_frame = PAGE_BYTES + _FRAME_COLUMN_BYTES + _OBJECT_COLUMN_BYTES + _CODE_BYTES
    per_frame += checksums * _SUM_BYTES
    frames = max(0, arena_bytes - layout(0).end) // per_frame
    while frames and layout(frames, checksums=checksums).end > arena_bytes:
        frames -= 1
    if frames < FRAMES_MIN:
        least = layout(FRAMES_MIN, checksums=checksums).end
        raise OperatorError(
            f"an arena of {arena_bytes} bytes is too small; it needs at least {least}",
            ExitCode.BAD_CONFIG,
        )
    return frames


class Arena:
    """Typed views of one mapped segment.  It stores and finds nothing by itself: `Machine` keeps
    the rules A1 to A5, `recovery` relies on them."""

    def __init__(self, mapping: mmap.mmap) -> None:
        magic, frames, generation, segment_bytes, flags = _HEADER.unpack_from(mapping, 0)
        self.checksums = bool(flags & _CHECKSUMS)
        where = layout(frames, checksums=self.checksums)
        if magic != _MAGIC or segment_bytes != len(mapping) or where.end > len(mapping):
            raise OperatorError(
                "the segment is no arena of this version; remove it with 'tmem clean'",
                ExitCode.BAD_CONFIG,
            )
        self.mapping = mapping
        self.layout = where
        self.frames_count: int = frames
        self.generation: int = generation
        self.bytes = len(mapping)
        view = memoryview(mapping)
        self._view = view
        self.data = view[where.data : where.object_word]
        self.words = self.data.cast("Q")
        self.halves = self.data.cast("I")
        self.state = view[where.state_column : where.object_column].cast("Q")
        self.object = view[where.object_column : where.index_column].cast("I")
        self.index = view[where.index_column : where.index_column + 4 * frames].cast("I")
        self.state_octets = self.state.cast("B")
        self.object_octets = self.object.cast("B")
        self.object_word = view[where.object_word : where.object_oid].cast("I")
        self.object_token = view[where.object_token : where.bases].cast("Q")
        self.token_base = view[where.bases : where.code].cast("Q")
        self.token_code = view[where.code : where.code + _CODE_BYTES * frames].cast("H")
        self.token_blocks = view[where.blocks : where.end]
        self.sum = view[where.sum : where.blocks].cast("I")
        """Of no length without checksums."""
        self._pool_words = view[where.pools : where.members].cast("Q")
        self._member_words = view[where.members : where.origins].cast("Q")
        self._origin_words = view[where.origins : where.state_column].cast("Q")
        self._moment_words = view[_MOMENTS_OFFSET:_HEADER_BYTES].cast("Q")

    def punch(self, first: int, count: int) -> int:
        """Give the memory of free frames back to the host; bytes given.  They read as zeros then.

        Whole pages of the host only, so of neighbours of a frame that is in use.
        """
        start = self.layout.data + first * PAGE_BYTES
        length = count * PAGE_BYTES
        self.mapping.madvise(mmap.MADV_REMOVE, start, length)
        return length

    def next_generation(self) -> int:
        """Count a start of a hypervisor on this arena; guests see it go up."""
        self.generation += 1
        struct.pack_into("<I", self.mapping, _GENERATION_OFFSET, self.generation)
        return self.generation

    # --- objects

    def publish_object(self, number: int, pool_number: int, oid: bytes) -> None:
        start = self.layout.object_oid + number * OID_BYTES
        self.mapping[start : start + OID_BYTES] = oid
        self.object_word[number] = pool_number + 1

    def kill_object(self, number: int) -> None:
        self.object_word[number] |= DEAD

    def free_object(self, number: int) -> None:
        self.object_word[number] = 0

    def read_object(self, number: int) -> tuple[int, bytes] | None:
        """(pool record number, oid) of a live object, None of a free or dead one."""
        word = self.object_word[number]
        if word == 0 or word & DEAD:
            return None
        start = self.layout.object_oid + number * OID_BYTES
        return word - 1, self.mapping[start : start + OID_BYTES]

    # --- pools

    def publish_pool(
        self, number: int, guest: GuestId, pool_id: PoolId, flags: int, uuid: bytes
    ) -> None:
        offset = self._pool_offset(number)
        owner = 0 if flags & PoolFlag.SHARED else guest | pool_id << 32
        _POOL.pack_into(self.mapping, offset, 0, flags, owner, uuid)
        self._view[offset : offset + 4] = LIVE.to_bytes(4, "little")

    def set_pool_flags(self, number: int, flags: int) -> None:
        """One aligned word; persistent and shared stay as they are."""
        offset = self._pool_offset(number) + 4
        self._view[offset : offset + 4] = flags.to_bytes(4, "little")

    def set_pool_token(self, number: int, token: int) -> None:
        """Of a shared pool; one aligned word."""
        self._pool_words[number * (_POOL.size // 8) + 1] = token

    def kill_pool(self, number: int) -> None:
        offset = self._pool_offset(number)
        self._view[offset : offset + 4] = (LIVE | DEAD).to_bytes(4, "little")

    def free_pool(self, number: int) -> None:
        offset = self._pool_offset(number)
        self._view[offset : offset + 4] = bytes(4)

    def read_pools(self) -> list[PoolRecord]:
        """All pool records that are not free, dead ones too."""
        table = self._view[self.layout.pools : self.layout.members]
        words = array("I", table.tobytes())[:: _POOL.size // 4]  # few are not 0
        records = []
        for number, word in enumerate(words):
            if word:
                _, flags, owner, uuid = _POOL.unpack_from(table, number * _POOL.size)
                guest, pool_id, token = owner & 0xFFFFFFFF, owner >> 32, 0
                if flags & PoolFlag.SHARED:
                    guest, pool_id, token = NOBODY, 0, owner
                records.append(
                    PoolRecord(
                        number,
                        bool(word & DEAD),
                        GuestId(guest),
                        PoolId(pool_id),
                        flags,
                        uuid,
                        token,
                    )
                )
        return records

    def _pool_offset(self, number: int) -> int:
        return self.layout.pools + number * _POOL.size

    # --- members of shared pools

    def publish_member(self, record: MemberRecord) -> None:
        """Word and guest are one aligned word, written last; the same call turns a member into an
        heir's."""
        at = 2 * record.number
        self._member_words[at + 1] = record.pool | record.pool_id << 32 | record.slot << 48
        self._member_words[at] = (HEIR if record.heir else LIVE) | record.guest << 32

    def free_member(self, number: int) -> None:
        self._member_words[2 * number] = 0

    def read_members(self) -> list[MemberRecord]:
        """All member records that are not free."""
        table = self._view[self.layout.members : self.layout.origins]
        records = []
        for number, word in enumerate(array("Q", table.tobytes())[::2]):
            if word:
                kind, guest, pool, pool_id, slot = _MEMBER.unpack_from(table, number * _MEMBER.size)
                records.append(
                    MemberRecord(number, kind == HEIR, GuestId(guest), pool, PoolId(pool_id), slot)
                )
        return records

    def publish_origin(self, number: int, name: str, pid: int) -> None:
        """Of a member record that is about to be published for the first time."""
        offset = self.layout.origins + number * _ORIGIN.size
        _ORIGIN.pack_into(self.mapping, offset, name.encode(), pid, 0)

    def read_origin(self, number: int) -> Origin:
        """Of a member record that is not free."""
        offset = self.layout.origins + number * _ORIGIN.size
        name, pid, disowned = _ORIGIN.unpack_from(self.mapping, offset)
        return Origin(name.rstrip(b"\0").decode("ascii", "replace"), pid, disowned)

    def disown(self, number: int, sequence: int) -> None:
        """Nobody may have the pages of this member record that were put up to this sequence."""
        self._origin_words[number * _ORIGIN_WORDS + _ORIGIN_WORDS - 1] = sequence

    # --- moments

    def publish_moment(self, at: int, sequence: int, now_ns: int) -> None:
        """Replace one of `MOMENTS_MAX`; sequence 0 for none."""
        words = self._moment_words
        words[2 * at] = 0
        words[2 * at + 1] = now_ns
        words[2 * at] = sequence

    def read_moments(self) -> list[tuple[int, int, int]]:
        """(place, sequence, ns) of all that are not free."""
        words = self._moment_words.tolist()
        pairs = zip(words[::2], words[1::2], strict=True)
        return [(at, sequence, now) for at, (sequence, now) in enumerate(pairs) if sequence]

    # --- guests

    def publish_guest(self, record: GuestRecord) -> None:
        offset = self._guest_offset(record.number)
        name = record.name.encode()
        _GUEST.pack_into(self.mapping, offset, 0, record.pid, record.start_ticks, record.uid, name)
        self._view[offset : offset + 4] = LIVE.to_bytes(4, "little")

    def free_guest(self, number: GuestId) -> None:
        offset = self._guest_offset(number)
        self._view[offset : offset + 4] = bytes(4)

    def read_guests(self) -> list[GuestRecord]:
        """All guest records that are not free."""
        table = self._view[self.layout.guests : self.layout.pools]
        return [
            GuestRecord(
                GuestId(number),
                name.rstrip(b"\0").decode("ascii", "replace"),
                pid,
                start_ticks,
                uid,
            )
            for number, (word, pid, start_ticks, uid, name) in enumerate(_GUEST.iter_unpack(table))
            if word
        ]

    def _guest_offset(self, number: GuestId) -> int:
        return self.layout.guests + number * _GUEST.size

    def close(self) -> None:
        for view in (
            self.words,
            self.halves,
            self.data,
            self.state_octets,
            self.state,
            self.object_octets,
            self.object,
            self.index,
            self.object_word,
            self.object_token,
            self.token_base,
            self.token_code,
            self.token_blocks,
            self.sum,
            self._pool_words,
            self._member_words,
            self._origin_words,
            self._moment_words,
            self._view,
        ):
            view.release()
        self.mapping.close()


def format_arena(mapping: mmap.mmap, *, checksums: bool = False) -> Arena:
    """Make an arena of a zero-filled mapping of any size that holds FRAMES_MIN frames."""
    frames = frames_that_fit(len(mapping), checksums=checksums)
    flags = checksums * _CHECKSUMS
    _HEADER.pack_into(mapping, 0, _MAGIC, frames, 0, len(mapping), flags)
    return Arena(mapping)


def private_arena(arena_bytes: int, *, checksums: bool = False) -> Arena:
    """An arena in this process alone, for tests, simulation and fuzzing."""
    return format_arena(mmap.mmap(-1, arena_bytes), checksums=checksums)
