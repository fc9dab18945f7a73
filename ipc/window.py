"""The window: one shared mapping between one guest and the hypervisor, for page bytes.

Layout, in pages of 4 KiB: 0 shared info, 1 batch table, 2 call block and 3 completion block of the
ring, then the slots.
The offsets are also told in WELCOME, so a client need not know them.  Entry n of the batch table is
at table offset + 48 n, slot n at slots offset + 4096 n.  Map it shared, readable and writable, from
offset 0.  Slots and table belong to the guest between calls and to the hypervisor during one;
sending and receiving a message orders the accesses, so no other barrier is needed.

The shared info page is how the hypervisor speaks first.  The guest remembers the notifications of
the state that it acted on, for as long as it has the window, and acts when it reads another number;
in a new window it acts on what is there.  So a wish stays until it was seen, whenever that is, and
the hypervisor need not know.  Every state is whole: `writeback pages` are what is asked for from
now on, and take the place of what is left of an earlier request.  A guest that ignores a wish loses
nothing.

Invariants

* I1  Only the guest and the hypervisor map it.  It has no name: it is a memfd whose descriptor is
  handed over the attach socket.  A POSIX segment would have a name to guess and could be truncated
  by the guest, which kills whoever touches the mapping next (SIGBUS); the memfd is sealed against
  shrinking and growing before it leaves the hypervisor.
* I2  The hypervisor never reads the shared info page; it writes there and believes nothing.
* I3  Whatever the hypervisor reads (a batch table, a page) it copies once and then checks the copy.
* I4  Notifications and wishes are one aligned word of 8 bytes, at offset 8, written by one store
  and read by one load.  So no read is torn, in whatever order a machine makes stores visible, and
  a hypervisor killed at any instruction leaves a whole state.  A counter read before and after
  would need that order, and a writer that died between the two would leave the guest waiting.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Final, NamedTuple

from ipc.abi import (
    BATCH_ENTRY,
    CALL_BLOCK,
    COMPLETION_BLOCK,
    EXTENT_PAGES_MAX,
    PAGE_BYTES,
    REPLY_BYTES,
    REQUEST_BYTES,
)
from ipc.limits import (
    BATCH_TABLE_BYTES,
    WINDOW_BYTES,
    WINDOW_CALL_OFFSET,
    WINDOW_COMPLETION_OFFSET,
    WINDOW_SLOTS,
    WINDOW_SLOTS_OFFSET,
    WINDOW_TABLE_OFFSET,
)

SHARED_INFO: Final = struct.Struct("<4sIHHI16s")
"""magic, generation, notifications, writeback pages, balloon target, spare.

magic: "TMWI".
generation: of the hypervisor; stays what it is for as long as the window is used.
notifications: goes up by one, from 0xffff to 0, each time that what follows is written.
writeback pages: persistent pages of private pools to take back from now on, at most 256; 0: none.
balloon target: pages that the guest should shrink or grow its RAM to; 0: no wish.
spare: zeros.
"""
_SHARED_INFO_MAGIC: Final = b"TMWI"

NOTIFICATIONS_MASK: Final = 0xFFFF
BALLOON_PAGES_MAX: Final = 0xFFFF_FFFF
"""Of a balloon target: 16 TiB."""


class SharedInfo(NamedTuple):
    """SHARED_INFO, as it was at one moment."""

    generation: int
    notifications: int
    balloon_target_pages: int
    writeback_pages: int


class Window:
    """A mapped window; `slots` is a writable view of all page slots, slot 0 first, and `words` the
    same as 64-bit words.

    `call_words` are `posted` and `sleeping` of the CALL_BLOCK and `request` its request;
    `completion_words` are `completed` and `sleeping` of the COMPLETION_BLOCK and `reply` its reply.
    """

    def __init__(self, mapping: mmap.mmap, fd: int = -1) -> None:
        self._mapping = mapping
        self._view = memoryview(mapping)
        self.fd = fd
        self._info_words = self._view[: SHARED_INFO.size].cast("Q")
        self.table = self._view[WINDOW_TABLE_OFFSET : WINDOW_TABLE_OFFSET + BATCH_TABLE_BYTES]
        self.slots = self._view[
            WINDOW_SLOTS_OFFSET : WINDOW_SLOTS_OFFSET + WINDOW_SLOTS * PAGE_BYTES
        ]
        self.words = self.slots.cast("Q")
        # An aligned word through a view of format Q is read and written by one instruction.
        self.call_words = self._view[WINDOW_CALL_OFFSET : WINDOW_CALL_OFFSET + 16].cast("Q")
        end = WINDOW_CALL_OFFSET + CALL_BLOCK.size
        self.request = self._view[end - REQUEST_BYTES : end]
        self.completion_words = self._view[
            WINDOW_COMPLETION_OFFSET : WINDOW_COMPLETION_OFFSET + 16
        ].cast("Q")
        end = WINDOW_COMPLETION_OFFSET + COMPLETION_BLOCK.size
        self.reply = self._view[end - REPLY_BYTES : end]

    def slot(self, number: int, count: int = 1) -> memoryview:
        """The bytes of `count` slots from slot `number` on, writable."""
        return self.slots[number * PAGE_BYTES : (number + count) * PAGE_BYTES]

    def publish_info(
        self,
        generation: int,
        *,
        notifications: int = 0,
        balloon_target_pages: int = 0,
        writeback_pages: int = 0,
    ) -> None:
        """Hypervisor only: write the shared info page, before the guest has the window."""
        SHARED_INFO.pack_into(
            self._view,
            0,
            _SHARED_INFO_MAGIC,
            generation,
            notifications & NOTIFICATIONS_MASK,
            writeback_pages,
            balloon_target_pages,
            b"",
        )

    def notify(
        self, notifications: int, *, balloon_target_pages: int, writeback_pages: int
    ) -> None:
        """Hypervisor only: write what is wished now; the count is one that was not there before."""
        self._info_words[1] = (
            notifications & NOTIFICATIONS_MASK | writeback_pages << 16 | balloon_target_pages << 32
        )

    def info(self) -> SharedInfo:
        """Guest only: the shared info page, never a mixture of two states of it."""
        wishes = self._info_words[1]
        return SharedInfo(
            self._info_words[0] >> 32,
            wishes & NOTIFICATIONS_MASK,
            wishes >> 32,
            wishes >> 16 & 0xFFFF,
        )

    def write_table(self, entries: list[tuple[int, int, int, int, bytes, int]]) -> None:
        """Guest only: the batch table, entries as `ipc.abi.BATCH_ENTRY` has them."""
        if len(entries) > EXTENT_PAGES_MAX:
            raise ValueError(f"a batch has at most {EXTENT_PAGES_MAX} entries")
        offset = 0
        for entry in entries:
            BATCH_ENTRY.pack_into(self.table, offset, *entry)
            offset += BATCH_ENTRY.size

    def read_table(self, count: int) -> bytes:
        """Hypervisor only: the first `count` entries, copied out once (I3)."""
        return bytes(self.table[: count * BATCH_ENTRY.size])

    def close(self) -> None:
        """Unmap and close the descriptor; views handed out must be gone."""
        for view in (
            self.table,
            self.words,
            self.slots,
            self.call_words,
            self.request,
            self.completion_words,
            self.reply,
            self._info_words,
            self._view,
        ):
            view.release()
        self._mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def create_window() -> Window:
    """A new sealed window; its descriptor is `window.fd` until `close`."""
    fd = os.memfd_create("tmem-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, WINDOW_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        return Window(mmap.mmap(fd, WINDOW_BYTES), fd)
    except BaseException:
        os.close(fd)
        raise


def map_window(fd: int) -> Window:
    """Map a window received from the hypervisor; takes over `fd`."""
    try:
        return Window(mmap.mmap(fd, WINDOW_BYTES), fd)
    except BaseException:
        os.close(fd)
        raise


def anonymous_window() -> Window:
    """A window inside one process, for the local transport."""
    return Window(mmap.mmap(-1, WINDOW_BYTES))
