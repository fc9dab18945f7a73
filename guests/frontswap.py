"""The frontswap client: pages on their way to the swap disk, kept in tmem instead.

One private persistent pool.  A page is named by the slot of the swap disk that is reserved for it:
object 1, index = slot.  So neighbouring slots go in one call, and there is never more in tmem than
the swap disk has slots.  The slot stays reserved, which is what makes it possible to bring a page
to the disk later (`guests.swap` does, when tmem has no room for newer ones).

What is where is known here, a bit a slot: a page is asked for only if it was accepted.

Promises
  F1  A page that was accepted is given back as it was, or its owner is told that it is lost.  There
      is no third way, and no page of zeros.
  F2  A slot whose page was stored again, freed or lost holds nothing that could be loaded.  Freed
      pages are flushed in batches; a slot that is used again before its flush was sent is taken out
      of the batch, since the new page has replaced the old.

When the hypervisor dies: a store whose fate is unknown counts as refused, and its slot is flushed
later.  A load waits until the hypervisor is back, up to `PATIENCE_SECONDS`.  If it is back without
our pages, `on_lost` is told which slots were lost.

Differs from Linux's mm/frontswap.c and Xen's shim: extents; no swizzle of 16 objects a device (it
was for locks that the hypervisor does not have); loads that take the page out are the caller's
choice, by freeing the slot after.  Write-through is a mode here too: every store is refused after
it was made, so the disk has all pages, and what tmem has only saves reads.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from fs.errors import error
from guests.attachment import Attachment
from guests.hypercall import BatchEntry, Hypercalls
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, Reason, ReplyFlag, Status, oid_from_int
from ipc.errors import Disconnected

log = logging.getLogger(__name__)

PATIENCE_SECONDS: Final = 60.0
FLUSH_BATCH: Final = EXTENT_PAGES_MAX
_OID: Final = oid_from_int(1)
_DONE: Final = int(Status.DONE)
_ENODEV: Final = int(Status.ENODEV)


class FrontswapCounters:
    """Linux's four, in pages, and what became of the rest."""

    __slots__ = ("failed_stores", "invalidates", "loads", "lost", "succ_stores")

    def __init__(self) -> None:
        self.loads = 0
        self.succ_stores = 0
        self.failed_stores = 0
        self.invalidates = 0
        self.lost = 0


class Frontswap:
    """`wait` lets time pass while the hypervisor is away; it may raise to end that."""

    def __init__(
        self,
        attachment: Attachment,
        now_seconds: Callable[[], float],
        wait: Callable[[], None],
    ) -> None:
        self.counters = FrontswapCounters()
        self.refusals: Counter[str] = Counter()
        """Refused stores by reason, in calls."""
        self.writethrough = False
        self.on_lost: Callable[[Sequence[int]], None] = lambda _slots: None
        self._attachment = attachment
        self._now_seconds = now_seconds
        self._wait = wait
        self._calls: Hypercalls | None = None
        self._pool: int | None = None
        self.stored: OrderedDict[int, bool] = OrderedDict()
        """Slots whose page is in tmem, the longest there first; whether the disk has it, too.  For
        reading, as `gone` is: they are asked for several times a page."""
        self.gone: set[int] = set()
        """Slots whose page is nowhere any more."""
        self._to_flush: dict[int, None] = {}
        attachment.join(self)

    @property
    def pages(self) -> int:
        """Pages in tmem (frontswap_curr_pages)."""
        return len(self.stored)

    @property
    def attached(self) -> bool:
        """Whether there are a hypervisor and a pool, as far as is known."""
        return self._calls is not None

    def holds(self, slot: int) -> bool:
        """Whether the page of this slot is in tmem."""
        return slot in self.stored

    def is_lost(self, slot: int) -> bool:
        """Whether the page of this slot was in tmem, and is nowhere now."""
        return slot in self.gone

    def postpone(self, slots: Sequence[int]) -> None:
        """These can't be brought to the disk: as if they had come last."""
        for slot in slots:
            self.stored.move_to_end(slot)

    def oldest(self, count: int) -> list[int]:
        """Up to so many slots whose pages are there, the longest there first."""
        return [slot for slot, _ in zip(self.stored, range(count), strict=False)]

    # --- pages

    def store(self, slots: Sequence[int], pages: memoryview) -> set[int]:
        """Offer page i of `pages` for `slots[i]` (at most 64); which slots were accepted."""
        calls = self._calls or self._attach()
        for slot in slots:
            self.stored.pop(slot, None)
            self.gone.discard(slot)
        if calls is None or self._pool is None:
            self._refuse(slots, "no hypervisor")
            return set()
        window = calls.channel.window
        window.slots[: len(slots) * PAGE_BYTES] = pages
        try:
            reply = (
                calls.put(self._pool, _OID, slots[0], len(slots))
                if slots[-1] - slots[0] == len(slots) - 1
                else calls.put_batch(self._entries(slots))
            )
        except Disconnected:
            self._attachment.lose(calls)
            self._refuse(slots, "no hypervisor")
            self._to_flush.update(dict.fromkeys(slots))
            return set()
        kept = {slot for number, slot in enumerate(slots) if reply.map >> number & 1}
        refused = [slot for slot in slots if slot not in kept]
        for slot in kept:
            self._to_flush.pop(slot, None)
        if refused:
            self._refuse(refused, Reason(reply.reason).name.lower())
        if reply.status == _ENODEV:
            self._pool_is_gone()
        if self.writethrough:
            # The disk gets a copy: nobody has to be told if tmem loses this one.
            self.counters.failed_stores += len(kept)
        else:
            self.counters.succ_stores += len(kept)
        self.stored.update(dict.fromkeys(sorted(kept), self.writethrough))
        return set() if self.writethrough else kept

    def _refuse(self, slots: Sequence[int], why: str) -> None:
        self.counters.failed_stores += len(slots)
        self.refusals[why] += 1

    def load(self, slots: Sequence[int], into: memoryview) -> bool:
        """Copy the pages of these slots (at most 64) out of tmem; they stay there.

        False when some are not there any more, but on the disk.  EIO when they are lost, or no
        hypervisor came back in time.
        """
        deadline = self._now_seconds() + PATIENCE_SECONDS
        while True:
            calls = self._calls or self._attach()
            if any(slot in self.gone for slot in slots):
                raise error(errno.EIO, "the page is lost with the hypervisor's memory")
            if not all(slot in self.stored for slot in slots):
                return False
            if calls is not None and self._pool is not None:
                try:
                    if self._get(calls, self._pool, slots):
                        size = len(slots) * PAGE_BYTES
                        into[:size] = calls.channel.window.slots[:size]
                        self.counters.loads += len(slots)
                        return True
                except Disconnected:
                    self._attachment.lose(calls)
            elif self._now_seconds() > deadline:
                raise error(errno.EIO, f"the hypervisor is away for {PATIENCE_SECONDS:.0f} s")
            else:
                self._wait()

    def _get(self, calls: Hypercalls, pool: int, slots: Sequence[int]) -> bool:
        """Get pages into the window; False if they are not all there."""
        reply = (
            calls.get(pool, _OID, slots[0], len(slots))
            if slots[-1] - slots[0] == len(slots) - 1
            else calls.get_batch(self._entries(slots))
        )
        missing = [slot for number, slot in enumerate(slots) if not reply.map >> number & 1]
        if missing:
            # A persistent page that was accepted is there, unless somebody took the pool away.
            if reply.status == _ENODEV:
                self._pool_is_gone()
            else:
                self._lose(missing)
        return not missing

    def look_at(self, slots: Sequence[int]) -> memoryview | None:
        """The pages of slots that it holds (at most 64), where they stand until the next call.

        None when they can't be had just now.
        """
        calls = self._calls
        if calls is None or self._pool is None:
            return None
        try:
            found = self._get(calls, self._pool, slots)
        except Disconnected:
            self._attachment.lose(calls)
            return None
        return calls.channel.window.slots[: len(slots) * PAGE_BYTES] if found else None

    def invalidate(self, slot: int) -> None:
        """The page of this slot is not wanted any more, or is on the disk now."""
        self.gone.discard(slot)
        if slot in self.stored:
            del self.stored[slot]
            self._to_flush[slot] = None
            if len(self._to_flush) >= FLUSH_BATCH:
                self.flush()

    def flush(self) -> None:
        """Tell the hypervisor of the slots that were invalidated, now or when it is back."""
        calls = self._calls or self._attach()
        if calls is None or self._pool is None:
            return
        # Neighbours side by side: the hypervisor does them together.
        slots = sorted(islice(self._to_flush, FLUSH_BATCH))
        if not slots:
            return
        try:
            reply = calls.flush_batch([(self._pool, slot, 0, 0, _OID, 0) for slot in slots])
        except Disconnected:
            self._attachment.lose(calls)
            return
        assert not reply.flags & ReplyFlag.FAULT, f"a flush is not well-formed: {reply}"
        if reply.status == _ENODEV:
            self._pool_is_gone()
            return
        self.counters.invalidates += len(slots)
        for slot in slots:
            del self._to_flush[slot]

    def invalidate_area(self) -> None:
        """The swap disk is not used any more (swapoff): the pool goes."""
        calls, pool = self._calls, self._pool
        self.stored.clear()
        self._to_flush.clear()
        self.gone.clear()
        self._pool = None
        if calls is not None and pool is not None:
            try:
                calls.destroy_pool(pool)
            except Disconnected:
                self._attachment.lose(calls)
        self._calls = None

    def _entries(self, slots: Sequence[int]) -> list[BatchEntry]:
        assert self._pool is not None
        return [(self._pool, slot, number, 0, _OID, 0) for number, slot in enumerate(slots)]

    # --- the hypervisor comes and goes (`guests.attachment.User`)

    def _attach(self) -> Hypercalls | None:
        self._attachment.attach()
        return self._calls

    def serve(self, calls: Hypercalls) -> bool:
        """Have a pool; what was in it is lost if it is another."""
        if self._pool is not None and not calls.channel.resumed:
            self._pool_was_lost()
        if self._pool is None:
            reply = calls.new_pool(persist=True)
            if reply.status != _DONE:
                log.warning("frontswap event=no-pool status=%d", reply.status)
                return False
            self._pool = reply.value
        self._calls = calls
        log.info("frontswap event=ready pool=%d pages=%d", self._pool, self.pages)
        return True

    def lost(self) -> None:
        """Go on without tmem; what it holds it still holds, as far as is known."""
        self._calls = None

    def _pool_is_gone(self) -> None:
        self._calls = None
        self._pool_was_lost()
        self._attachment.unserved(self)

    def _pool_was_lost(self) -> None:
        self._pool = None
        self._to_flush.clear()
        self._lose(list(self.stored))

    def _lose(self, slots: list[int]) -> None:
        """These pages are not in tmem any more; those that are nowhere else are lost."""
        lost = [slot for slot in slots if not self.stored.pop(slot)]
        if lost:
            self.gone.update(lost)
            self.counters.lost += len(lost)
            log.error("frontswap event=lost pages=%d", len(lost))
            self.on_lost(lost)
