"""Anonymous memory: pages of programs that no file stands behind, in frames or in swap.

An entry of a page table is one of

    0           never written to: reads as zeros, costs nothing
    frame + 1   in this frame
    -slot       in this slot of the swap disk

A frame may be in the page tables of several programs (after a fork) until one writes: then the
writer gets a copy.  A frame may also have a slot that holds the same bytes (the swap cache), when
it was read from there.  Such a frame is given up without another write.

Invariants
  A1  A frame is here if and only if it is on `lists`; `_tables[frame]` are the entries for it.
  A2  `_slots[frame]` is the slot with the same bytes; `_cached[slot]` the frame, both or neither.
  A3  A slot is in use if and only if entries name it (`swap.users`) or a frame caches it.
  A4  Before a page with a slot is written to, its slot is given up, or the writer gets another
      frame because others name that slot.

Differs from Linux: no anon_vma (a frame knows its entries), no huge pages.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from fs.errors import error
from guests.memory import TRANSFER_PAGES, Memory
from guests.reclaim import PageLists
from guests.swap import READAHEAD_PAGES_MAX, Swap
from ipc.abi import PAGE_BYTES

LEAF_PAGES: Final = 512
_EMPTY_LEAF: Final = array("q", bytes(8 * LEAF_PAGES))
_ZEROS: Final = bytes(PAGE_BYTES)


class PageTable:
    """Page number to entry; most of it is empty."""

    def __init__(self) -> None:
        self._leaves: dict[int, array[int]] = {}
        self.resident_pages = 0
        self.swapped_pages = 0
        self.closed = False
        """The program has ended: nothing may be entered any more."""

    def __getitem__(self, page: int) -> int:
        leaf = self._leaves.get(page // LEAF_PAGES)
        return leaf[page % LEAF_PAGES] if leaf is not None else 0

    def __setitem__(self, page: int, entry: int) -> None:
        leaf = self._leaves.get(page // LEAF_PAGES)
        if leaf is None:
            leaf = self._leaves[page // LEAF_PAGES] = _EMPTY_LEAF[:]
        before = leaf[page % LEAF_PAGES]
        leaf[page % LEAF_PAGES] = entry
        self.resident_pages += (entry > 0) - (before > 0)
        self.swapped_pages += (entry < 0) - (before < 0)

    def used(self) -> Iterator[tuple[int, int]]:
        """Pages with an entry, ascending, and the entry."""
        for number in sorted(self._leaves):
            for place, entry in enumerate(self._leaves[number]):
                if entry:
                    yield number * LEAF_PAGES + place, entry

    @property
    def bytes(self) -> int:
        """What the table itself takes."""
        return len(self._leaves) * 8 * LEAF_PAGES


class AnonymousCounters:
    """In pages, since boot."""

    __slots__ = ("copies", "evictions", "faults", "major_faults", "readahead_hits", "zero_fills")

    def __init__(self) -> None:
        self.faults = 0
        self.major_faults = 0
        """The page had to be fetched from swap."""
        self.zero_fills = 0
        self.copies = 0
        self.evictions = 0
        self.readahead_hits = 0


class AnonymousMemory:
    """All anonymous pages of a guest (a `guests.reclaim.Pages`).

    `stalled` is a context for the time that a program waits for a page.
    """

    def __init__(
        self,
        memory: Memory,
        swap: Swap | None,
        stalled: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.lists = PageLists(memory.budget.frames)
        self.counters = AnonymousCounters()
        self.swap = swap
        self._memory = memory
        self._stalled = stalled
        self._tables: dict[int, list[tuple[PageTable, int]]] = {}
        self._slots: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._read_ahead: set[int] = set()
        memory.reclaim.serve(anonymous=self)
        if swap is not None:
            swap.note_cost = lambda pages: memory.reclaim.note_cost(anonymous=pages)

    @property
    def pages(self) -> int:
        """Frames with anonymous pages."""
        return len(self.lists)

    @property
    def cached_pages(self) -> int:
        """Frames whose bytes a slot has, too (SwapCached)."""
        return len(self._slots)

    def usage(self) -> dict[str, int]:
        """Of all frames, in pages, with the names of Linux's memory reports."""
        reclaim = self._memory.reclaim
        rows: dict[str, int] = {}
        for name, lists in (("anon", self.lists), ("file", reclaim.file_lists)):
            active = lists.active_pages if lists is not None else 0
            rows[f"active_{name}"] = active
            rows[f"inactive_{name}"] = (len(lists) if lists is not None else 0) - active
        return rows | {"free": self._memory.free_pages}

    # --- what programs do

    def read(self, table: PageTable, page: int) -> memoryview | None:
        """The bytes of a page, until anything else is done here; None: zeros.

        ESRCH if the program was killed to make room; OSError if the page can't be had.
        """
        entry = table[page]
        if not entry:
            return None
        if entry < 0:
            self.counters.faults += 1
            self._swap_in(table, page)
            entry = table[page]
        self.lists.touch(entry - 1)
        return self._memory.page(entry - 1)

    def write(self, table: PageTable, page: int) -> memoryview:
        """The same to change them: nobody else sees it.  ENOMEM, too."""
        while True:
            entry = table[page]
            if entry > 0 and self._is_own(entry - 1):
                self.lists.touch(entry - 1)
                return self._memory.page(entry - 1)
            self.counters.faults += 1
            if entry < 0:
                self._swap_in(table, page)
                continue
            self._make_room(table, 1)
            if table[page] != entry:
                continue  # reclaim took it meanwhile
            self._give_own(table, page, entry)

    def _is_own(self, frame: int) -> bool:
        """Whether a frame has one entry and no slot, by giving its slot up if that is enough."""
        if len(self._tables[frame]) > 1:
            return False
        slot = self._slots.get(frame)
        if slot is None:
            return True
        assert self.swap is not None
        if self.swap.users(slot):
            return False
        self._uncache(frame)
        self.swap.free(slot)
        return True

    def _give_own(self, table: PageTable, page: int, entry: int) -> None:
        """A frame for a page that has none, or not for itself."""
        new = self._memory.take()
        if entry:
            self._memory.page(new)[:] = self._memory.page(entry - 1)
            self._leave(entry - 1, table, page)
            self.counters.copies += 1
        else:
            self._memory.page(new)[:] = _ZEROS
            self.counters.zero_fills += 1
        self._tables[new] = [(table, page)]
        self.lists.add(new)
        table[page] = new + 1

    def _make_room(self, table: PageTable, count: int) -> None:
        if self._memory.free_pages < count:
            with self._stalled():
                self._memory.reclaim.make_room(count)
        _check_alive(table)

    def fork(self, parent: PageTable, child: PageTable) -> None:
        """The child has the parent's pages, until one of them writes.  ENOMEM."""
        for page, entry in parent.used():
            if entry > 0:
                self._tables[entry - 1].append((child, page))
            else:
                assert self.swap is not None
                self.swap.add_user(-entry)
            child[page] = entry

    def drop(self, table: PageTable, page: int) -> None:
        """The program does not want a page any more."""
        entry = table[page]
        table[page] = 0
        if entry > 0:
            self._leave(entry - 1, table, page)
        elif entry < 0:
            assert self.swap is not None
            self.swap.drop_user(-entry)
            self._free_if_unused(-entry)

    def _leave(self, frame: int, table: PageTable, page: int) -> None:
        """One entry less; the frame is freed with its last, unless others name its slot."""
        tables = self._tables[frame]
        tables.remove((table, page))
        if tables:
            return
        slot = self._slots.get(frame)
        if slot is None:
            self._free(frame)
        else:
            self._free_if_unused(slot)

    def _free_if_unused(self, slot: int) -> None:
        """Free a slot that no entry names, and the frame that caches it and that none names."""
        assert self.swap is not None
        if self.swap.users(slot):
            return
        frame = self._cached.get(slot)
        if frame is not None:
            if self._tables[frame]:
                return
            self._uncache(frame)
            self._free(frame)
        self.swap.free(slot)

    def _free(self, frame: int) -> None:
        del self._tables[frame]
        self._read_ahead.discard(frame)
        self.lists.remove(frame)
        self._memory.give(frame)

    def _uncache(self, frame: int) -> None:
        del self._cached[self._slots.pop(frame)]

    # --- swap

    def _swap_in(self, table: PageTable, page: int) -> None:
        """Have a page in a frame whose entry names a slot."""
        assert self.swap is not None
        slot = -table[page]
        if slot not in self._cached:
            self.counters.major_faults += 1
            with self._stalled():
                self._fetch(slot)
            _check_alive(table)
        frame = self._cached[slot]
        if frame in self._read_ahead:
            self._read_ahead.remove(frame)
            self.counters.readahead_hits += 1
            self.swap.readahead_hit()
        self._tables[frame].append((table, page))
        table[page] = frame + 1
        self.swap.drop_user(slot)
        if not self.swap.users(slot) and not self.swap.keeps(slot):
            self._uncache(frame)
            self.swap.free(slot)

    def _fetch(self, slot: int) -> None:
        """Read a slot and those around it that are worth it into frames."""
        assert self.swap is not None
        swap, memory, cached = self.swap, self._memory, self._cached
        window = swap.window(slot)
        if not cached.keys().isdisjoint(window):
            window = _run_around([one for one in window if one == slot or one not in cached], slot)
        if memory.free_pages < len(window):
            memory.reclaim.make_room(len(window))
            # Whoever was killed for that, or what was evicted, may have changed all of it; and to
            # evict may have brought some of these pages from frontswap to the disk.
            if not swap.users(slot) or slot in cached:
                return
            is_like = swap.likeness(slot)
            window = _run_around(
                [one for one in window if one == slot or (is_like(one) and one not in cached)],
                slot,
            )
        transfer, pages = memory.transfer, memory.pages
        try:
            swap.load(window, transfer)
        except OSError:
            if len(window) == 1:
                raise
            window = [slot]
            swap.load(window, transfer)
        start = 0
        for one in window:
            frame = memory.take()
            at = frame * PAGE_BYTES
            pages[at : at + PAGE_BYTES] = transfer[start : start + PAGE_BYTES]
            start += PAGE_BYTES
            self._tables[frame] = []
            self._slots[frame] = one
            cached[one] = frame
            self.lists.add(frame)
            if one != slot:
                self._read_ahead.add(frame)

    def evict(self, frames: list[int]) -> int:
        """Bring pages to swap, those that are there already without a write, and free frames."""
        if self.swap is None:
            return 0
        slot_of = self._slots
        dirty = [frame for frame in frames if frame not in slot_of]
        clean = [frame for frame in frames if frame in slot_of] if len(dirty) < len(frames) else []
        slots = self.swap.store(len(dirty), lambda count: self._gather(dirty[:count]))
        gone = len(clean)
        for frame in clean:
            slot = slot_of.pop(frame)
            del self._cached[slot]
            self._unmap(frame, slot)
        for frame, stored in zip(dirty, slots, strict=False):
            if stored is not None:
                self._unmap(frame, stored)
                gone += 1
        self.counters.evictions += gone
        return gone

    def _unmap(self, frame: int, slot: int) -> None:
        """Entries name the slot from now on; the frame is free."""
        assert self.swap is not None
        for table, page in self._tables[frame]:
            self.swap.add_user(slot)
            table[page] = -slot
        self._free(frame)
        if not self.swap.users(slot):
            self.swap.free(slot)

    def _gather(self, frames: list[int]) -> memoryview:
        """The pages of up to `TRANSFER_PAGES` frames, side by side."""
        transfer, pages = self._memory.transfer, self._memory.pages
        at = 0
        for frame in frames[:TRANSFER_PAGES]:
            transfer[at : at + PAGE_BYTES] = pages[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES]
            at += PAGE_BYTES
        return transfer[:at]

    # --- what is in swap

    def swap_back(self, slots: set[int], tables: list[PageTable]) -> int:
        """Bring the pages of some slots back into frames (a part of swapoff); how many.

        Stops when frames get few: nothing is evicted for it.
        """
        assert self.swap is not None
        least = self._memory.reclaim.low_pages + READAHEAD_PAGES_MAX
        done = 0
        for table in tables:
            for page, entry in list(table.used()):
                if -entry in slots:
                    if self._memory.free_pages < least:
                        return done
                    self._swap_in(table, page)
                    frame = self._cached.get(-entry)
                    if frame is not None and not self.swap.users(-entry):
                        self._uncache(frame)
                        self.swap.free(-entry)
                    done += 1
        return done


def _check_alive(table: PageTable) -> None:
    if table.closed:
        raise error(errno.ESRCH, "the program was killed")


def _run_around(slots: list[int], slot: int) -> list[int]:
    """The neighbours of `slot` without a gap, of ascending slots."""
    if slot not in slots:
        return []
    first = last = slots.index(slot)
    while first and slots[first - 1] == slots[first] - 1:
        first -= 1
    while last + 1 < len(slots) and slots[last + 1] == slots[last] + 1:
        last += 1
    return slots[first : last + 1]
