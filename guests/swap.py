"""Swap: where anonymous pages go when there is no frame for them; frontswap first, else the disk.

Each page that goes has a slot of the swap disk, wherever its bytes are.  A slot has users: the
page table entries that name it.  It is free when it has none and no frame holds its page, which
`guests.anonymous` knows.

When frontswap refuses pages for lack of room, the pages that are in it for the longest are brought
to their slots on the disk, and the newer ones get their place: what is used again soon is in
memory, what is not is on the disk.  Without that a full tmem is of no use to a guest that goes on
swapping (zcache had nothing to show for its memory there).  It costs one copy more for each page
that goes to the disk, and no disk access more: a page is written either way.

A slot that can't be written is retired, and the page stays where it was.  That the disk has no room
(a swap file with holes, on a host whose disk is full) says nothing about the slot: it is set aside
and tried again `RETRY_SECONDS` later, and a person is told once.

Without frontswap this is an ordinary swap disk, and without a disk there is no swap.
"""

from __future__ import annotations

import errno
import logging
import os
import time
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
RETRY_SECONDS: Final = 1.0
"""After the disk had no room: others make it, so it takes a while."""
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)


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

    def __init__(
        self,
        disk: SwapDisk,
        frontswap: Frontswap | None = None,
        now_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self.disk = disk
        self.frontswap = frontswap
        self.counters = SwapCounters()
        self.note_cost: Callable[[int], None] = lambda _pages: None
        """Told of each page that the disk has to move."""
        self.writes_back = True
        """Whether the oldest pages make room for newer ones in frontswap."""
        self.exclusive = True
        """Whether a page that is loaded leaves frontswap."""
        self._now_seconds = now_seconds
        self._retry_at = 0.0
        """Until then the disk has no room, as far as is known."""
        self._refused: set[int] = set()
        """Slots that it had no room for, until one of them is written."""
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
        return self.disk.free_slots + self.disk.aside_slots

    @property
    def is_short(self) -> bool:
        """More than half is in use, or the disk is full: a slot is not kept for a page that is in
        memory (Linux's vm_swap_full)."""
        return bool(self._refused) or self.free_pages * 2 < self.total_pages

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
        if self.exclusive and self._place(slot):
            return False
        return not self.is_short

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
        if self.disk.aside_slots and not self._is_full():
            self.disk.bring_back()
        failed: dict[int, int] = {}
        while slots := self._allocate(pages):
            data = gather(len(slots))
            # Tmem is offered them once.  It does not matter to it which slots they have.
            kept = set() if failed else self._offer(slots, data)
            failed = self._write(slots, data, kept)
            if len(failed) < len(slots):
                return [None if slot in failed else slot for slot in slots]
            # Not one of them could be written, and elsewhere on the disk they may.
        return [] if failed else self._store_without_disk(pages, gather)

    def _store_without_disk(
        self, pages: int, gather: Callable[[int], memoryview]
    ) -> list[int | None]:
        """While the disk has no room tmem may have some; it needs slots as names."""
        slots = self.disk.take_aside(pages) if self.frontswap is not None else []
        kept = self._offer(slots, gather(len(slots))) if slots else set()
        for slot in slots:
            if slot not in kept:
                self.disk.set_aside(slot)
        return [slot if slot in kept else None for slot in slots]

    def _allocate(self, pages: int) -> list[int]:
        slots = self.disk.allocate(pages)
        slots.sort()  # which page gets which slot is all the same
        if slots:
            self._users.extend([0] * (slots[-1] + 1 - len(self._users)))
        return slots

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

    def _write(self, slots: list[int], data: memoryview, kept: set[int]) -> dict[int, int]:
        """Write what was not kept to the disk; the slots that can't be written, given up, and
        errno."""
        failed: dict[int, int] = {}
        for run, pages in _runs_without(slots, data, kept):
            failed |= self.disk.write(run, pages)
        for slot, why in failed.items():
            if self.frontswap is not None:
                self.frontswap.invalidate(slot)
            if why in _NO_ROOM:
                self.disk.set_aside(slot)
            else:
                self.disk.retire(slot)
        bad = {slot: why for slot, why in failed.items() if why not in _NO_ROOM}
        if bad:
            first, why = min(bad.items())
            why_text = os.strerror(why)
            log.error("swap event=write-error slots=%d first=%d why=%s", len(bad), first, why_text)
        self._note_written([slot for slot in slots if slot not in kept], failed)
        return failed

    def _note_written(self, slots: list[int], failed: dict[int, int]) -> None:
        """These were to be written, and those of them could not be."""
        written = len(slots) - len(failed)
        self.counters.pages_out += written
        self.counters.lost_writes += len(failed)
        self.note_cost(written)
        refused = [slot for slot, why in failed.items() if why in _NO_ROOM]
        if refused:
            self._retry_at = self._now_seconds() + RETRY_SECONDS
            if not self._refused:
                log.error("swap event=disk-full why=the host's disk has no room for the swap file")
            self._refused.update(refused)
        elif not self._refused.isdisjoint(slots) and not failed:
            # Slots that were written before have room at any time, so others prove nothing.
            log.info("swap event=disk-has-room")
            self._refused.clear()

    def _is_full(self) -> bool:
        return self._now_seconds() < self._retry_at

    def write_back(self, pages: int) -> int:
        """Bring the pages that are in frontswap for the longest to the disk; how many."""
        front = self.frontswap
        if front is None:
            return 0
        done = 0
        while done < pages and not self._is_full():
            slots = sorted(front.oldest(min(TRANSFER_PAGES, pages - done)))
            pages_there = front.look_at(slots) if slots else None
            if pages_there is None:
                break
            with pages_there:  # no view is left when a call finds out that the window is gone
                failed = self.disk.write(slots, pages_there)
            for slot in slots:
                if slot not in failed:
                    front.invalidate(slot)
            front.flush()
            moved = len(slots) - len(failed)
            self.counters.written_back += moved
            self._note_written(slots, failed)
            done += moved
            if failed:
                # Their slots are bad, or the disk is full, and their pages are well where they are.
                front.postpone(sorted(failed))
                break
        return done

    # --- in

    def window(self, slot: int) -> list[int]:
        """The used slots to read together with `slot`, neighbours of it, all in one place."""
        around = self.disk.window(slot, self._window_pages(slot))
        first, last = slot, slot
        is_like = self.likeness(slot)
        while first > around.start and is_like(first - 1):
            first -= 1
        while last + 1 < around.stop and is_like(last + 1):
            last += 1
        return list(range(first, last + 1))

    def _place(self, slot: int) -> bool:
        return self.frontswap is not None and self.frontswap.holds(slot)

    def likeness(self, slot: int) -> Callable[[int], bool]:
        """Tells of slots whether they are in use and can be loaded together with this one."""
        users, front = self._users, self.frontswap
        end = len(users)
        if front is None:
            return lambda other: other < end and users[other] > 0
        stored, gone = front.stored, front.gone
        there = slot in stored
        return lambda other: (
            other < end and users[other] > 0 and (other in stored) is there and other not in gone
        )

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
