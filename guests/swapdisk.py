"""A swap area in use: which slots are taken, and pages on their way to and from them.

Slot n is page n of the device, and slot 0 is the header.  What stands in a slot means nothing to
this module and nothing to anybody after the guest has ended, so nothing but the header outlives it
and there is no flush.

Slots are given out in clusters of 256, as Linux does on disks without moving parts
(SWAPFILE_CLUSTER): from the current cluster onwards until its end, where a gap for the whole batch
comes before smaller ones, then from a free cluster, else from one of those with the most room.  So
what is written together lies together, and a reader that comes back for one page of it finds the
others in the same readahead window.

Invariants
  I1  A slot is free, used, set aside until `bring_back`, or out of use for good (header, bad page
      of the header, retired).
  I2  `free_slots` and the figures by cluster are what counting the slots would give.
  I3  `allocate` gives a slot out once until it is freed, and never one that is set aside or out of
      use.

Differs from Linux: one current cluster and not one for each CPU, since a guest has one thread; no
count of users of a slot, which is the address spaces' business; a write error takes the one slot
out of use, where Linux would try it again and again; no discard.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Sequence
from typing import Final, Self

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.block.file import FileDevice
from fs.errors import ImageError, error
from fs.runs import Run, runs
from guests.swapheader import MADE_BY, SwapHeader, check_owner, make_swap, read_header

__all__ = ["CLUSTER_SLOTS", "SwapCounters", "SwapDisk", "make_swap", "open_swap"]

CLUSTER_SLOTS: Final = 256
_FREE: Final = 0
_USED: Final = 1
_OUT_OF_USE: Final = 2
_ASIDE: Final = 3
_ROOM_MAX: Final = CLUSTER_SLOTS.bit_length()


class SwapCounters:
    """Since the area was opened.  Calls that succeeded: `reads`, `writes`; their pages beside them.

    `read_errors` counts calls, `write_errors` slots, `retired_slots` those that are out of use now
    and were not when the area was opened.
    """

    __slots__ = (
        "read_errors",
        "read_pages",
        "reads",
        "retired_slots",
        "write_errors",
        "write_pages",
        "writes",
    )

    def __init__(self) -> None:
        self.reads = 0
        self.read_pages = 0
        self.read_errors = 0
        self.writes = 0
        self.write_pages = 0
        self.write_errors = 0
        self.retired_slots = 0


class SwapDisk:
    """The slots of a swap area on a block device."""

    def __init__(self, device: BlockDevice, header: SwapHeader) -> None:
        """`open` reads the header and checks it."""
        self._device = device
        self.uuid = header.uuid
        self.label = header.label
        self.counters = SwapCounters()
        self._end = header.last_page + 1
        # One byte a slot, so that find and count go through it at the speed of memchr.
        self._states = bytearray(self._end)
        for slot in (0, *header.bad_pages):
            self._states[slot] = _OUT_OF_USE
        starts = range(0, self._end, CLUSTER_SLOTS)
        self._free_in_cluster = array(
            "H", [self._states.count(_FREE, start, start + CLUSTER_SLOTS) for start in starts]
        )
        # The bit length of the same number: clusters with alike room are found with one `find`.
        self._room = bytearray(free.bit_length() for free in self._free_in_cluster)
        self.slots = self.free_slots = sum(self._free_in_cluster)
        self._aside: list[int] = []
        self._cluster = len(self._room) - 1
        self._next = self._cluster_end = self._end

    @classmethod
    def open(cls, device: BlockDevice, *, uuid: bytes | None = None) -> Self:
        """The area that a header describes, all slots free; `uuid` is whose it must be.

        Raises ImageError, one line without the image's name, which the device may not know.
        """
        header = read_header(device)
        if uuid is not None:
            check_owner(header, uuid)
        if device.read_only:
            raise ImageError("can't be written to, and a swap area must be; open it for writing")
        return cls(device, header)

    @property
    def used_slots(self) -> int:
        """Slots that were given out and not freed, set aside or retired since."""
        return self.slots - self.free_slots - len(self._aside)

    @property
    def aside_slots(self) -> int:
        """Slots that are set aside."""
        return len(self._aside)

    # --- slots

    def allocate(self, count: int) -> list[int]:
        """Up to `count` slots, neighbours where possible, ascending within a run of them.

        Fewer, or none, when the area is full.
        """
        taken: list[int] = []
        while len(taken) < count:
            wanted = count - len(taken)
            first = self._states.find(bytes(wanted), self._next, self._cluster_end)
            if first < 0:
                first = self._states.find(_FREE, self._next, self._cluster_end)
            if first < 0:
                if not self._enter_cluster():
                    break
                continue
            last = min(self._cluster_end, first + wanted)
            ahead = self._states[first:last]
            length = len(ahead) - len(ahead.lstrip(b"\0"))
            self._states[first : first + length] = bytes([_USED]) * length
            self._add_free(first, -length)
            self._next = first + length
            taken.extend(range(first, self._next))
        return taken

    def _enter_cluster(self) -> bool:
        """Go on in another cluster, the next after the current one of those with the most room."""
        for room in range(_ROOM_MAX, 0, -1):
            found = self._room.find(room, self._cluster + 1)
            if found < 0:
                found = self._room.find(room)
            if found >= 0:
                self._cluster = found
                self._next = found * CLUSTER_SLOTS
                self._cluster_end = min(self._next + CLUSTER_SLOTS, self._end)
                return True
        return False

    def _add_free(self, slot: int, count: int) -> None:
        cluster = slot // CLUSTER_SLOTS
        free = self._free_in_cluster[cluster] + count
        self._free_in_cluster[cluster] = free
        self._room[cluster] = free.bit_length()
        self.free_slots += count

    def free(self, slot: int) -> None:
        """Nobody wants what is in this slot any more; ValueError if it is not a used one."""
        if not self.is_used(slot):
            raise ValueError(f"slot {slot} is not in use and can't be freed")
        self._states[slot] = _FREE
        self._add_free(slot, 1)

    def retire(self, slot: int) -> None:
        """Never give this slot out again, whatever it is now; a second time changes nothing.

        A used one counts as given back by this: it is not to be freed as well.
        """
        if not 0 < slot < self._end:
            raise ValueError(f"slot {slot} is none of 1 to {self._end - 1}")
        state = self._states[slot]
        if state == _OUT_OF_USE:
            return
        self._states[slot] = _OUT_OF_USE
        if state == _FREE:
            self._add_free(slot, -1)
        elif state == _ASIDE:
            self._aside.remove(slot)
        self.slots -= 1
        self.counters.retired_slots += 1

    def set_aside(self, slot: int) -> None:
        """As `free`, but the slot is not given out before `bring_back`."""
        if not self.is_used(slot):
            raise ValueError(f"slot {slot} is not in use and can't be set aside")
        self._states[slot] = _ASIDE
        self._aside.append(slot)

    def take_aside(self, count: int) -> list[int]:
        """Up to `count` slots that are set aside, ascending; they are used from now on."""
        slots = sorted(self._aside[-count:]) if count > 0 else []
        del self._aside[len(self._aside) - len(slots) :]
        for slot in slots:
            self._states[slot] = _USED
        return slots

    def bring_back(self) -> None:
        """Free all slots that are set aside."""
        for slot in self._aside:
            self._states[slot] = _FREE
            self._add_free(slot, 1)
        self._aside.clear()

    def is_used(self, slot: int) -> bool:
        """Whether the slot was given out and not freed, set aside or retired since."""
        return 0 < slot < self._end and self._states[slot] == _USED

    def window(self, slot: int, pages: int) -> range:
        """The slots that are read ahead with `slot`: the aligned `pages` (a power of two) around
        it, without what lies outside the area.

        Free slots, and such that are out of use, may be among them.
        """
        if pages < 1 or pages & (pages - 1):
            raise ValueError(f"a window of {pages} pages can't be aligned")
        start = slot & ~(pages - 1)
        return range(max(start, 1), min(start + pages, self._end))

    # --- pages

    def write(self, slots: Sequence[int], pages: memoryview) -> dict[int, int]:
        """Write page i of `pages` to `slots[i]`; the slots that could not be written, and errno.

        Those hold nothing now.  They stay as they are until the caller, when it has found another
        place for their pages, retires them or sets them aside.
        """
        if pages.nbytes != len(slots) * BLOCK_BYTES:
            raise error(errno.EINVAL, f"{len(slots)} slots and {pages.nbytes} bytes")
        failed: dict[int, int] = {}
        for run in runs(slots):
            self._check(run.block, run.length)
            at = run.position * BLOCK_BYTES
            failed |= self._write_run(run, pages[at : at + run.length * BLOCK_BYTES])
        self.counters.write_errors += len(failed)
        return failed

    def _write_run(self, run: Run, data: memoryview) -> dict[int, int]:
        why = self._write_call(run.block, run.length, data)
        if not why:
            return {}
        if run.length == 1:
            return {run.block: why}
        # One bad block fails the whole call; which one it was, only single pages can tell.
        failed = {}
        for number in range(run.length):
            slot, at = run.block + number, number * BLOCK_BYTES
            if why := self._write_call(slot, 1, data[at : at + BLOCK_BYTES]):
                failed[slot] = why
        return failed

    def _write_call(self, slot: int, count: int, data: memoryview) -> int:
        """0, or errno."""
        try:
            self._device.write(slot, count, data)
        except OSError as reason:
            return reason.errno or errno.EIO
        self.counters.writes += 1
        self.counters.write_pages += count
        return 0

    def read(self, slot: int, count: int, into: memoryview) -> None:
        """Read `count` neighbouring slots; OSError says nothing about which of them is bad."""
        self._check(slot, count)
        try:
            self._device.read(slot, count, into)
        except OSError:
            self.counters.read_errors += 1
            raise
        self.counters.reads += 1
        self.counters.read_pages += count

    def _check(self, slot: int, count: int) -> None:
        if not 0 < slot <= slot + count - 1 < self._end:
            raise error(
                errno.EINVAL, f"slots {slot}..{slot + count - 1} are none of 1 to {self._end - 1}"
            )

    def close(self) -> None:
        """Close the device."""
        self._device.close()


def open_swap(
    path: str | os.PathLike[str],
    *,
    uuid: bytes | None = None,
    stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
    open_device: Callable[..., BlockDevice] = FileDevice,
) -> SwapDisk:
    """The swap area in the file `path`, on the devices that `stack` puts on it.

    `open_device(path, made_by=...)` opens the file.  Raises ImageError; the file is locked until
    the area is closed.
    """
    device = open_device(path, made_by=MADE_BY)
    try:
        return SwapDisk.open(stack(device), uuid=uuid)
    except ImageError as reason:
        device.close()
        raise ImageError(f"image {path}: {reason}") from reason
    except BaseException:
        device.close()
        raise
