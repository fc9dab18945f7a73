"""Swap: where anonymous pages go when there is no frame for them; frontswap first, else the disk.

Each page that goes has a slot of the swap disk, wherever its bytes are.  A slot has users: the
page table entries that name it.  It is free when it has none and no frame holds its page, which
`guests.anonymous` knows.

When frontswap refuses pages for lack of room, the pages that are in it for the longest are brought
to their slots on the disk, and the newer ones get their place: what is used again soon is in
memory, what is not is on the disk.  Without that a full tmem is of no use to a guest that goes on
swapping (zcache had nothing to show for its memory there).  It costs one copy more for each page
that goes to the disk, and no disk access more: a page is written either way.

Without frontswap this is an ordinary swap disk, and without a disk there is no swap.
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from fs.errors import error
from guests.frontswap import Frontswap
from guests.memory import TRANSFER_PAGES
from guests.swapdisk import SwapDisk
from ipc.abi import PAGE_BYTES

log = logging.getLogger(__name__)

_USERS_MAX: Final = 0xFFFF
READAHEAD_PAGES_MAX: Final = 8
"""Linux's page-cluster of 3."""


class SwapCounters:
    """In pages."""

    __slots__ = ("lost_writes", "pages_in", "pages_out", "written_back")

    def __init__(self) -> None:
        self.pages_in = 0
        """Read from the disk."""
        self.pages_out = 0
        """Written to the disk, those brought there from frontswap among them."""
        self.written_back = 0
        """Brought from frontswap to the disk."""
        self.lost_writes = 0
        """Could not be written; they stayed where they were."""


class Swap:
    """The slots of a guest and what stands in them."""

    def __init__(self, disk: SwapDisk, frontswap: Frontswap | None = None) -> None:
        self.disk = disk
        self.frontswap = frontswap
        self.counters = SwapCounters()
        self.note_cost: Callable[[int], None] = lambda _pages: None
        """Told of each page that the disk has to move."""
        self.writes_back = True
        """Whether the oldest pages make room for newer ones in frontswap."""
        self.exclusive = True
        """Whether a page that is loaded leaves frontswap."""
        self._users = array("H")
        self._hits = 0
        self._last_slot = 0
        self._last_window = 1

    @property
    def total_pages(self) -> int:
        """Slots that can be used."""
        return self.disk.slots

    @property
    def free_pages(self) -> int:
        """Slots that nobody uses."""
        return self.disk.free_slots

    @property
    def is_short(self) -> bool:
        """More than half is in use: a slot is not kept for a page that is in memory (Linux's
        vm_swap_full)."""
        return self.free_pages * 2 < self.total_pages

    # --- slots

    def users(self, slot: int) -> int:
        """Page table entries that name the slot."""
        return self._users[slot] if slot < len(self._users) else 0

    def add_user(self, slot: int) -> None:
        """One more; ENOMEM when there are too many."""
        if self._users[slot] == _USERS_MAX:
            raise error(errno.ENOMEM, f"swap slot {slot} has {_USERS_MAX} users")
        self._users[slot] += 1

    def drop_user(self, slot: int) -> None:
        """One less; the slot is not freed by that."""
        self._users[slot] -= 1

    def keeps(self, slot: int) -> bool:
        """Whether a slot without users is worth to be kept while its page is in memory: that page
        may go again without a write.  Not in tmem, whose memory is for pages that are not here
        (Linux's exclusive gets)."""
        in_tmem = self.frontswap is not None and self.frontswap.holds(slot)
        return not self.is_short and not (in_tmem and self.exclusive)

    def free(self, slot: int) -> None:
        """Nobody wants what is in the slot."""
        assert not self._users[slot], "a slot with users is not free"
        if self.frontswap is not None:
            self.frontswap.invalidate(slot)
        self.disk.free(slot)

    # --- out

    def store(self, pages: int, gather: Callable[[int], memoryview]) -> list[int | None]:
        """Bring up to `pages` pages out; `gather(n)` gives the first n of them, side by side.

        For each page its slot, or None if it could not be brought anywhere; fewer than `pages` when
        the slots run out.
        """
        slots = self.disk.allocate(pages)
        if not slots:
            return []
        slots.sort()  # which page gets which slot is all the same
        self._users.extend([0] * (slots[-1] + 1 - len(self._users)))
        data = gather(len(slots))
        kept = self._offer(slots, data)
        failed = self._write(slots, data, kept)
        return [None if slot in failed else slot for slot in slots]

    def _offer(self, slots: list[int], data: memoryview) -> set[int]:
        """Which pages frontswap has taken."""
        if self.frontswap is None:
            return set()
        kept = self.frontswap.store(slots, data)
        refused = len(slots) - len(kept)
        if refused and self._may_write_back() and self.write_back(refused):
            for run, pages in _runs_without(slots, data, kept):
                kept |= self.frontswap.store(run, pages)
        return kept

    def _may_write_back(self) -> bool:
        front = self.frontswap
        return (
            front is not None
            and self.writes_back
            and not front.writethrough
            and front.attached
            and front.pages > 0
        )

    def _write(self, slots: list[int], data: memoryview, kept: set[int]) -> set[int]:
        """Write what was not kept to the disk; the slots that can't be written, retired."""
        failed: set[int] = set()
        for run, pages in _runs_without(slots, data, kept):
            failed.update(self.disk.write(run, pages))
        for slot in failed:
            log.error("swap event=write-error slot=%d", slot)
            if self.frontswap is not None:
                self.frontswap.invalidate(slot)
            self.disk.retire(slot)
        written = len(slots) - len(kept) - len(failed)
        self.counters.pages_out += written
        self.counters.lost_writes += len(failed)
        self.note_cost(written)
        return failed

    def write_back(self, pages: int) -> int:
        """Bring the pages that are in frontswap for the longest to the disk; how many."""
        front = self.frontswap
        if front is None:
            return 0
        done = 0
        while done < pages:
            slots = sorted(front.oldest(min(TRANSFER_PAGES, pages - done)))
            pages_there = front.look_at(slots) if slots else None
            if pages_there is None:
                break
            with pages_there:  # no view is left when a call finds out that the window is gone
                failed = set(self.disk.write(slots, pages_there))
            for slot in slots:
                if slot not in failed:
                    front.invalidate(slot)
            front.flush()
            moved = len(slots) - len(failed)
            self.counters.pages_out += moved
            self.counters.written_back += moved
            self.note_cost(moved)
            done += moved
            if failed:
                # Their slots are bad, and their pages are well where they are.
                front.postpone(sorted(failed))
                self.counters.lost_writes += len(failed)
                break
        return done

    # --- in

    def window(self, slot: int) -> list[int]:
        """The used slots to read together with `slot`, neighbours of it, all in one place."""
        pages = self._window_pages(slot)
        around = self.disk.window(slot, pages)
        first = last = slot
        while first - 1 in around and self.is_like(first - 1, slot):
            first -= 1
        while last + 1 in around and self.is_like(last + 1, slot):
            last += 1
        return list(range(first, last + 1))

    def _place(self, slot: int) -> bool:
        return self.frontswap is not None and self.frontswap.holds(slot)

    def is_like(self, slot: int, other: int) -> bool:
        """Whether a slot is in use and can be loaded together with another one."""
        lost = self.frontswap is not None and self.frontswap.is_lost(slot)
        return self.users(slot) > 0 and self._place(slot) == self._place(other) and not lost

    def _window_pages(self, slot: int) -> int:
        """As many as paid off last time (Linux's swapin_nr_pages)."""
        pages = self._hits + 2
        if pages == 2:
            if slot not in (self._last_slot + 1, self._last_slot - 1):
                pages = 1
        else:
            pages = max(4, 1 << (pages - 1).bit_length())
        pages = max(min(pages, READAHEAD_PAGES_MAX), self._last_window // 2)
        self._hits = 0
        self._last_slot, self._last_window = slot, pages
        return pages

    def readahead_hit(self) -> None:
        """A page that was read ahead is used."""
        self._hits += 1

    def load(self, slots: Sequence[int], into: memoryview) -> None:
        """Copy the pages of neighbouring slots, all in one place, into memory.  OSError."""
        assert len({self._place(slot) for slot in slots}) == 1, "pages of two places"
        front = self.frontswap
        if front is not None:
            if front.is_lost(slots[0]):
                raise error(errno.EIO, "the page is lost with the hypervisor's memory")
            if front.holds(slots[0]) and front.load(slots, into):
                return
        self.disk.read(slots[0], len(slots), into)
        self.counters.pages_in += len(slots)
        self.note_cost(len(slots))

    def close(self) -> None:
        """Swapoff, at the end: nothing is brought back."""
        if self.frontswap is not None:
            self.frontswap.invalidate_area()
        self.disk.close()


def _runs_without(
    slots: Sequence[int], data: memoryview, without: set[int]
) -> Iterator[tuple[list[int], memoryview]]:
    """Neighbouring slots (of ascending ones) that are not in `without`, and their pages."""
    start = 0
    for end in range(1, len(slots) + 1):
        goes_on = end < len(slots) and slots[end] == slots[end - 1] + 1
        if goes_on and (slots[end] in without) == (slots[start] in without):
            continue
        if slots[start] not in without:
            yield list(slots[start:end]), data[start * PAGE_BYTES : end * PAGE_BYTES]
        start = end
