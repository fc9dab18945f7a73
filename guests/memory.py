"""The guest's RAM: one anonymous mapping of page frames, and the sum of what it is used for.

A guest is given `memory_bytes` and takes no more, whatever it does with it:

    budget = frames                     in the mapping, for file pages and for anonymous memory
           + transfer frames            in the mapping, where extents stand on their way
           + metadata buffers           of the file system (`fs.buffers`), 4 KiB a block
           + window                     the mapping shared with the hypervisor, if there is one

Not counted, as a hypervisor does not count it either: the kernel's own code and structures (here
the Python interpreter), and what a program holds of a file's bytes after it has read them.

The transfer frames exist because frames of one extent are scattered over the mapping while a disk
or tmem moves neighbours: an extent is gathered or scattered there, one copy a page.

Invariant: a frame is free, or belongs to exactly one owner, or the host has it (`guests.balloon`).
With page states (`guests.pagestates`) the host may also have what a frame holds, unknown to its
owner: such a frame comes to the host when its owner gives it up.

The mapping is private to the process: only of such pages does the host take back what the guest
gives up (MADV_DONTNEED), and only such can it merge.
"""

from __future__ import annotations

import mmap
from array import array
from typing import Final, NamedTuple

from fs.runs import runs
from guests.ksm import make_mergeable
from guests.pagestates import DISCARDED, STABLE, UNUSED, PageStates
from guests.reclaim import Reclaim
from ipc.abi import PAGE_BYTES
from ipc.errors import OperatorError
from ipc.limits import WINDOW_BYTES

TRANSFER_PAGES: Final = 32
"""The longest extent: a whole readahead window, or a batch of reclaim."""
FRAMES_MIN: Final = 2 * TRANSFER_PAGES
"""A readahead and the batch that makes room for it fit at the same time."""
BUFFERS_MIN: Final = 8
BUFFERS_MAX: Final = 64
BUFFERS_SHARE: Final = 16
"""One page in 16 holds metadata, between the two bounds."""
WINDOW_PAGES: Final = WINDOW_BYTES // PAGE_BYTES


class Budget(NamedTuple):
    """How a guest's memory is divided; everything in pages, `total` is the sum of the rest."""

    total: int
    frames: int
    transfer: int
    buffers: int
    window: int


def divide(memory_bytes: int, *, attach: bool, buffer_blocks: int | None = None) -> Budget:
    """The budget of a guest; raises OperatorError if nothing useful fits."""
    total = memory_bytes // PAGE_BYTES
    buffers = buffer_blocks
    if buffers is None:
        buffers = min(BUFFERS_MAX, max(BUFFERS_MIN, total // BUFFERS_SHARE))
    window = WINDOW_PAGES if attach else 0
    frames = total - TRANSFER_PAGES - buffers - window
    if frames < FRAMES_MIN:
        least = (FRAMES_MIN + total - frames) * PAGE_BYTES
        raise OperatorError(
            f"{memory_bytes} bytes of memory are too little for a guest; give it at least {least}"
        )
    return Budget(total, frames, TRANSFER_PAGES, buffers, window)


class Memory:
    """The mapping and its free frames.  Frame n is `page(n)`."""

    def __init__(
        self, budget: Budget, *, mergeable: bool = False, page_states: bool = False
    ) -> None:
        """`mergeable`: the host may keep pages of equal content once (`guests.ksm`)."""
        self.budget = budget
        self._mapping = mmap.mmap(
            -1,
            (budget.frames + budget.transfer) * PAGE_BYTES,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        )
        self.is_mergeable = mergeable and make_mergeable(self._mapping)
        self.pages = memoryview(self._mapping)
        """All frames, frame 0 first."""
        self.transfer = self.pages[budget.frames * PAGE_BYTES :]
        """`TRANSFER_PAGES` neighbours for an extent on its way; nobody owns them over a call."""
        self._free = array("I", range(budget.frames - 1, -1, -1))
        self._given_back = array("I")
        self.states = PageStates(budget.frames) if page_states else None
        self._discarded_pages = 0
        self._allowed_frames = 0
        self.claimable_pages = 0
        """Frames that the host has and that may be taken without asking it."""
        self.reclaim = Reclaim(budget.frames, lambda: len(self._free) + self.claimable_pages)

    @property
    def free_pages(self) -> int:
        """Frames that nobody owns, and that can be taken."""
        return len(self._free) + self.claimable_pages

    @property
    def resident_free_pages(self) -> int:
        """Those of them that the host does not have."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Frames that somebody owns, with what they hold."""
        return self.budget.frames - len(self._free) - self.given_back_pages

    @property
    def given_back_pages(self) -> int:
        """Frames that the host has for now."""
        return len(self._given_back) + self._discarded_pages

    def take(self) -> int:
        """A free frame; the caller makes sure that there is one."""
        frame = self._free.pop() if self._free else self._claim()
        if self.states is not None:
            self.states.of[frame] = STABLE
        return frame

    def give(self, frame: int) -> None:
        """A frame is free again."""
        if self.states is not None and self._is_the_hosts(frame):
            return
        self._free.append(frame)

    def give_back(self, pages: int) -> int:
        """Let the host have so many free frames, as far as there are; how many it has got."""
        frames = sorted(self._free[-pages:]) if pages > 0 else []
        del self._free[len(self._free) - len(frames) :]
        self._to_host(frames)
        self._given_back.extend(frames)
        self._reckon()
        return len(frames)

    def _to_host(self, frames: list[int]) -> None:
        for run in runs(frames):
            self._mapping.madvise(
                mmap.MADV_DONTNEED, run.block * PAGE_BYTES, run.length * PAGE_BYTES
            )

    def take_back(self, pages: int) -> int:
        """Have frames again that the host had; they are zeros, and cost nothing until touched."""
        count = min(pages, len(self._given_back))
        for _ in range(count):
            self._free.append(self._given_back.pop())
        return count

    # --- with page states

    def allow(self, frames: int) -> None:
        """Frames that the host has may be taken until it is so many in all."""
        self._allowed_frames = frames
        self._reckon()

    def discard(self, frames: list[int]) -> None:
        """Let the host have what volatile frames hold; their owners are not told."""
        assert self.states is not None
        self._to_host(sorted(frames))
        for frame in frames:
            self.states.of[frame] = DISCARDED
        self._discarded_pages += len(frames)
        self._reckon()

    def _reckon(self) -> None:
        resident = self.budget.frames - self.given_back_pages
        self.claimable_pages = max(0, min(len(self._given_back), self._allowed_frames - resident))

    def _claim(self) -> int:
        """A frame that the host has.  The guest may not have it if it was free when the caller made
        sure, and a host that has lost its memory came back meanwhile (`guests.hostmemory`)."""
        frame = self._given_back.pop()
        self._reckon()
        return frame

    def _is_the_hosts(self, frame: int) -> bool:
        """A frame is given up: whether the host had discarded it, so that it has all of it now."""
        assert self.states is not None
        discarded = self.states.of[frame] == DISCARDED
        self.states.of[frame] = UNUSED
        if discarded:
            self._discarded_pages -= 1
            self._given_back.append(frame)
            self._reckon()
        return discarded

    def page(self, frame: int) -> memoryview:
        """The bytes of a frame, writable."""
        return self.pages[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES]
