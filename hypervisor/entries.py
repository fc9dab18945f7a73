"""Entries: descriptors of pages that do not have a frame of their own.

A raw page is described by the columns of its frame.  A page that is same-filled, compressed, or
stored once for several handles has an *entry* of 32 bytes instead, in a page frame that serves as a
table of 128.

  state u64   as a frame's (arena A1)
  object u32, index u32
  location u64
  pattern u64 of a same-filled page

  location   bits 0-1   FILLED, FRAME or SLAB
             bits 2-3   codec (`compression`), of SLAB
             bits 4-15  length - 1 in bytes, of SLAB
             bits 16-   frame << 8 of FRAME, place of SLAB (`slab`): first frame << 8 | slot

Where something stands beside a page (`beside`) its entry lies in a *wide* table: 93 entries, then
as many tokens, then as many checksums.  Its guest pays 32 bytes all the same.

Entries have page numbers from `base` on (one number past the frames is left out, so that no run of
neighbours crosses from frames to entries), 128 to a block; which block lies in which frame is known
here only.  Ephemeral and persistent entries are in different tables, so that evicting everything
frees every ephemeral table.

A table costs its frame: metadata of this kind comes out of the arena, and only while it is needed.
Xen had a page descriptor of some 80 bytes a page in its heap, whatever the page held.
"""

from __future__ import annotations

from array import array
from typing import Final

from hypervisor.arena import ENTRY_TABLE, HELD, Arena
from hypervisor.eviction.links import Links
from hypervisor.frames import TABLE, Frames
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES

ENTRIES_PER_TABLE: Final = 128
ENTRY_WORDS: Final = 4
ENTRY_BYTES: Final = 8 * ENTRY_WORDS
"""What each costs its guest, beside what it names."""
_TABLE_WORDS: Final = PAGE_BYTES // 8
_EMPTY_TABLE: Final = bytes(PAGE_BYTES)
_WIDE_ENTRIES: Final = 93
_WIDE: Final = 2
"""In the kind of a table, beside 1 for persistent; the index column of its frame has the kind."""
_TOKENS_AT: Final = _WIDE_ENTRIES * ENTRY_WORDS
_SUMS_AT: Final = 2 * (_TOKENS_AT + _WIDE_ENTRIES)
"""In words of 32 bits."""
_FREE_STATES: Final = tuple(array("Q", [0]) * n for n in range(ENTRIES_PER_TABLE + 1))

FILLED: Final = 1
FRAME: Final = 2
SLAB: Final = 3
KIND_MASK: Final = 3

assert ENTRIES_PER_TABLE * ENTRY_WORDS == _TABLE_WORDS
assert _SUMS_AT + _WIDE_ENTRIES <= 2 * _TABLE_WORDS
assert _WIDE_ENTRIES >= EXTENT_PAGES_MAX


def frame_location(frame: int) -> int:
    """Location of a page that has a whole frame."""
    return frame << 24 | FRAME


def slab_location(place: int, length: int, codec: int) -> int:
    """Location of a compressed page of `length` bytes."""
    return place << 16 | length - 1 << 4 | codec << 2 | SLAB


def location_place(location: int) -> int:
    """Slab place, or frame << 8."""
    return location >> 16


def location_length(location: int) -> int:
    """Bytes in the slab."""
    return (location >> 4 & 0xFFF) + 1


def location_codec(location: int) -> int:
    """How they are compressed."""
    return location >> 2 & 3


def room_of(kind: int) -> int:
    """Entries in a table of this kind."""
    return _WIDE_ENTRIES if kind & _WIDE else ENTRIES_PER_TABLE


class Entries:
    """All tables.  `frames_needed` first; `allocate` relies on it.  `wide` says what tables the put
    that is being served needs, `beside` what is to stand beside the next page that is published."""

    def __init__(self, arena: Arena, frames: Frames, links: Links) -> None:
        self._arena = arena
        self._words = arena.words
        self._halves = arena.halves
        self._frames = frames
        self._links = links
        self.base = arena.frames_count + 1
        self._frame_of: dict[int, int] = {}
        """Block -> frame."""
        self.wide = False
        self.beside: tuple[int, int] | None = None
        """Token, checksum."""
        self._kinds: dict[int, int] = {}
        """Block -> kind."""
        self._open: tuple[dict[int, list[int]], ...] = ({}, {}, {}, {})
        """By kind: block -> its free numbers; blocks with none are not here."""
        self._free = [0, 0, 0, 0]
        self._spare_blocks: list[int] = []

    @property
    def tables(self) -> int:
        """Frames that serve as tables."""
        return len(self._frame_of)

    def frames_needed(self, count: int, *, persistent: bool) -> int:
        """Frames that must be free before `count` (at most 93) entries can be had: 0 or 1."""
        return 0 if self._free[persistent | self.wide * _WIDE] >= count else 1

    def allocate(self, *, persistent: bool) -> int:
        """A page number whose entry is free.  Precondition: `frames_needed` are there."""
        kind = persistent | self.wide * _WIDE
        tables = self._open[kind]
        if not tables:
            self._add_table(kind)
        block, numbers = next(reversed(tables.items()))
        number = numbers.pop()
        if not numbers:
            del tables[block]
        self._free[kind] -= 1
        return number

    def allocate_run(self, count: int, *, persistent: bool) -> list[int]:
        """`count` page numbers (at most 93), neighbours and ascending as far as they are free
        side by side.  Precondition as of `allocate`."""
        found: list[int] = []
        kind = persistent | self.wide * _WIDE
        tables = self._open[kind]
        while count:
            if not tables:
                self._add_table(kind)
            block, numbers = next(reversed(tables.items()))
            taken = numbers[-count:]
            del numbers[-count:]
            if not numbers:
                del tables[block]
            # What was freed one after the other lies in the list the wrong way round.
            taken.sort()
            found += taken
            count -= len(taken)
            self._free[kind] -= len(taken)
        return found

    def _add_table(self, kind: int) -> None:
        frame = self._frames.take(TABLE)
        self._arena.data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES] = _EMPTY_TABLE
        self._arena.object[frame] = ENTRY_TABLE
        self._arena.index[frame] = kind
        self._arena.state[frame] = HELD
        self.adopt(frame, kind)

    def adopt(self, frame: int, kind: int) -> int:
        """Know a table that is in the segment, all of it free; its first page number."""
        if self._spare_blocks:
            block = self._spare_blocks.pop()
        else:
            block = (self._links.new_block() - self.base) // ENTRIES_PER_TABLE
        first = self.base + block * ENTRIES_PER_TABLE
        self._frame_of[block] = frame
        room = room_of(kind)
        self._kinds[block] = kind
        self._open[kind][block] = list(range(first + room - 1, first - 1, -1))
        self._free[kind] += room
        return first

    def occupy(self, number: int) -> None:
        """Recovery: this entry of an adopted table is live."""
        block = (number - self.base) // ENTRIES_PER_TABLE
        kind = self._kinds[block]
        numbers = self._open[kind][block]
        numbers.remove(number)
        if not numbers:
            del self._open[kind][block]
        self._free[kind] -= 1

    def release(self, number: int) -> None:
        """The entry is free; its state is 0 already.  An empty table gives its frame back."""
        block = (number - self.base) // ENTRIES_PER_TABLE
        kind = self._kinds[block]
        tables = self._open[kind]
        numbers = tables.get(block)
        if numbers is None:
            tables[block] = [number]
        else:
            numbers.append(number)
            if len(numbers) == room_of(kind):
                self._drop_table(block)
                return
        self._free[kind] += 1

    def release_run(self, first: int, count: int) -> None:
        """`release` of neighbours in one table."""
        block = (first - self.base) // ENTRIES_PER_TABLE
        kind = self._kinds[block]
        numbers = self._open[kind].setdefault(block, [])
        numbers.extend(range(first + count - 1, first - 1, -1))
        self._free[kind] += count
        if len(numbers) == room_of(kind):
            self._free[kind] -= 1
            self._drop_table(block)

    def drop_empty(self) -> None:
        """Recovery: give back the tables in which nothing is live."""
        for kind, tables in enumerate(self._open):
            for block, numbers in list(tables.items()):
                if len(numbers) == room_of(kind):
                    self._free[kind] -= 1
                    self._drop_table(block)

    def _drop_table(self, block: int) -> None:
        frame = self._frame_of.pop(block)
        kind = self._kinds.pop(block)
        del self._open[kind][block]
        self._free[kind] -= room_of(kind) - 1
        self._spare_blocks.append(block)
        self._arena.state[frame] = 0
        self._frames.give(frame)

    # --- one entry

    def at(self, number: int) -> int:
        """Where its first word is in `arena.words`."""
        block, slot = divmod(number - self.base, ENTRIES_PER_TABLE)
        return self._frame_of[block] * _TABLE_WORDS + slot * ENTRY_WORDS

    def publish(
        self, number: int, object_number: int, index: int, location: int, pattern: int, state: int
    ) -> None:
        """Write an entry, its state last (arena A1)."""
        words = self._words
        block, slot = divmod(number - self.base, ENTRIES_PER_TABLE)
        at = self._frame_of[block] * _TABLE_WORDS + slot * ENTRY_WORDS
        words[at + 1] = object_number | index << 32
        words[at + 2] = location
        words[at + 3] = pattern
        if self.beside is not None:
            self._write_beside(number, *self.beside)
        words[at] = state

    def _write_beside(self, number: int, token: int, sum_: int) -> None:
        block, slot = divmod(number - self.base, ENTRIES_PER_TABLE)
        frame = self._frame_of[block]
        self._words[frame * _TABLE_WORDS + _TOKENS_AT + slot] = token
        self._halves[2 * frame * _TABLE_WORDS + _SUMS_AT + slot] = sum_

    def spoil(self, number: int, state: int, sum_: int) -> None:
        """Recovery: another state word, and a checksum that is wrong."""
        self._write_beside(number, 0, sum_)
        self._words[self.at(number)] = state

    def read_beside(self, number: int) -> tuple[int, int] | None:
        """Token and checksum; None where there are none."""
        block, slot = divmod(number - self.base, ENTRIES_PER_TABLE)
        if not self._kinds[block] & _WIDE:
            return None
        frame = self._frame_of[block]
        return (
            self._words[frame * _TABLE_WORDS + _TOKENS_AT + slot],
            self._halves[2 * frame * _TABLE_WORDS + _SUMS_AT + slot],
        )

    def state(self, number: int) -> int:
        return self._words[self.at(number)]

    def location(self, number: int) -> int:
        return self._words[self.at(number) + 2]

    def pattern(self, number: int) -> int:
        return self._words[self.at(number) + 3]

    def handle(self, number: int) -> tuple[int, int]:
        """(object number, index)."""
        word = self._words[self.at(number) + 1]
        return word & 0xFFFFFFFF, word >> 32

    def move(self, number: int, location: int) -> None:
        """The same bytes are elsewhere now: one aligned store (arena A6)."""
        self._words[self.at(number) + 2] = location

    def clear(self, number: int) -> None:
        """The page is no more (arena A1)."""
        self._words[self.at(number)] = 0

    # --- neighbours in one table

    def in_one_table(self, first: int, count: int) -> int:
        """How many of `count` neighbours from `first` on are in its table."""
        return min(count, ENTRIES_PER_TABLE - (first - self.base) % ENTRIES_PER_TABLE)

    def locations(self, first: int, count: int) -> list[int]:
        at = self.at(first) + 2
        return self._words[at : at + ENTRY_WORDS * count : ENTRY_WORDS].tolist()

    def clear_run(self, first: int, count: int) -> None:
        """These pages are no more (arena A1)."""
        at = self.at(first)
        self._words[at : at + ENTRY_WORDS * count : ENTRY_WORDS] = _FREE_STATES[count]

    def live(self) -> list[int]:
        """All numbers whose state is not 0; reads every table."""
        found = []
        for block, frame in self._frame_of.items():
            first = self.base + block * ENTRIES_PER_TABLE
            start = frame * _TABLE_WORDS
            end = start + room_of(self._kinds[block]) * ENTRY_WORDS
            states = self._words[start:end:ENTRY_WORDS]
            found += [first + at for at, state in enumerate(states.tolist()) if state]
        return found

    def has_block(self, block: int) -> bool:
        """Whether there is a table of this block."""
        return block in self._frame_of

    def blocks(self) -> list[int]:
        """All tables, by block."""
        return list(self._frame_of)

    def of_block(self, block: int) -> list[tuple[int, int, int]]:
        """(number, state, location) of the live entries of a table."""
        frame = self._frame_of[block]
        first = self.base + block * ENTRIES_PER_TABLE
        words = self._words[frame * _TABLE_WORDS : (frame + 1) * _TABLE_WORDS].tolist()
        return [
            (first + at, words[at * ENTRY_WORDS], words[at * ENTRY_WORDS + 2])
            for at in range(room_of(self._kinds[block]))
            if words[at * ENTRY_WORDS]
        ]

    @property
    def ephemeral_tables(self) -> int:
        """Tables of ephemeral entries."""
        return sum(not kind & 1 for kind in self._kinds.values())

    @property
    def room(self) -> int:
        """Entries that all tables together have."""
        return sum(map(room_of, self._kinds.values()))

    def free_numbers(self) -> list[int]:
        """All numbers that `allocate` may give, tables as they are."""
        return [
            number for tables in self._open for numbers in tables.values() for number in numbers
        ]

    def table_frames(self) -> list[int]:
        """The frames that are tables."""
        return list(self._frame_of.values())
