"""The programs of a guest, as its kernel knows them: address spaces, and who is killed for memory.

    process.map(bytes) -> address     private memory, zeros until it is written to
    process.write(address, data), process.read(address, size)
    process.fork(name)                 a child with the same memory, shared until one of them writes
    process.unmap(address, bytes), process.exit()

Addresses are bytes; mappings are whole pages, with a gap after each, so that a program that writes
past one is told (EFAULT).

A program is killed when there is no memory for anybody (the out-of-memory killer takes the one
that has most, as Linux's badness says), when a page of it can't be read from swap, and when its
pages were lost with the hypervisor's memory.  Whatever it does afterwards raises `ProcessKilled`.
All kills are on record, with what a person needs to know about them.

Differs from Linux: no threads, no file mappings, no overcommit limit (as with overcommit_memory=1).
"""

from __future__ import annotations

import errno
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Final, NamedTuple, TypeVar

from fs.block.device import Bytes
from fs.errors import error
from guests.anonymous import AnonymousMemory, PageTable
from guests.oom import Task, report
from ipc.abi import PAGE_BYTES

log = logging.getLogger(__name__)

MAP_START_PAGE: Final = 0x10000
PROCESSES_MAX: Final = 4096
MAPPED_PAGES_MAX: Final = 1 << 28
"""1 TiB a process."""
OOM_SCORE_ADJ_MIN: Final = -1000
"""A process with this is never taken."""
KILLS_MAX: Final = 100
"""Kept on record."""


View = TypeVar("View")


class ProcessKilled(Exception):
    """The process is no more; the text says why."""


class Kill(NamedTuple):
    """One process that was killed."""

    pid: int
    name: str
    why: str
    mapped_pages: int
    resident_pages: int
    swapped_pages: int
    table_bytes: int
    oom_score_adj: int

    def __str__(self) -> str:
        """In the words of Linux's out-of-memory killer, and what was in swap."""
        kib = PAGE_BYTES // 1024
        return (
            f"{self.why}: Killed process {self.pid} ({self.name}) "
            f"total-vm:{self.mapped_pages * kib}kB, anon-rss:{self.resident_pages * kib}kB, "
            f"file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:{self.table_bytes // 1024}kB "
            f"oom_score_adj:{self.oom_score_adj} swapped:{self.swapped_pages * kib}kB"
        )


class Maps:
    """Which pages of an address space may be used."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        """(first page, page after the last), ascending."""
        self._next_page = MAP_START_PAGE
        self.pages = 0

    def copy(self) -> Maps:
        """The same, for another address space."""
        return deepcopy(self)

    def add(self, pages: int) -> int:
        """A new range behind all others; its first page."""
        start = self._next_page
        self._next_page = start + pages + 1
        self._ranges.append((start, start + pages))
        self.pages += pages
        return start

    def remove(self, first: int, end: int) -> list[range]:
        """Take pages out; those that were in."""
        removed: list[range] = []
        kept: list[tuple[int, int]] = []
        for start, stop in self._ranges:
            low, high = max(start, first), min(stop, end)
            if low >= high:
                kept.append((start, stop))
                continue
            removed.append(range(low, high))
            self.pages -= high - low
            kept += [piece for piece in ((start, low), (high, stop)) if piece[0] < piece[1]]
        self._ranges = kept
        return removed

    def cover(self, first: int, end: int) -> bool:
        """Whether all these pages are in one range."""
        place = bisect_right(self._ranges, (first, MAPPED_PAGES_MAX << 1)) - 1
        return place >= 0 and end <= self._ranges[place][1]


class Process:
    """One program; made by `Processes.spawn` and `fork`."""

    def __init__(
        self, processes: Processes, pid: int, name: str, parent: Process | None = None
    ) -> None:
        self.pid = pid
        self.name = name
        self.oom_score_adj: int = parent.oom_score_adj if parent is not None else 0
        self.killed: Kill | None = None
        self.table = PageTable()
        self.maps: Maps = Maps() if parent is None else parent.maps.copy()
        self._processes = processes
        self._memory = processes.memory

    @property
    def is_alive(self) -> bool:
        """Neither killed nor ended."""
        return not self.table.closed

    # --- memory

    def map(self, length: int) -> int:
        """`length` bytes, rounded up to pages; returns their address.  EINVAL, ENOMEM."""
        self._check_alive()
        pages = -(-length // PAGE_BYTES)
        if pages <= 0:
            raise error(errno.EINVAL, f"{length} bytes")
        if self.maps.pages + pages > MAPPED_PAGES_MAX:
            raise error(errno.ENOMEM, f"more than {MAPPED_PAGES_MAX} pages")
        return self.maps.add(pages) * PAGE_BYTES

    def unmap(self, address: int, length: int) -> None:
        """Give memory back; parts of it may not be mapped.  EINVAL if `address` is in a page."""
        self._check_alive()
        if address % PAGE_BYTES or length <= 0:
            raise error(errno.EINVAL, f"{length} bytes at {address:#x}")
        for pages in self.maps.remove(address // PAGE_BYTES, -(-(address + length) // PAGE_BYTES)):
            for page in pages:
                self._memory.drop(self.table, page)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes; EFAULT if they are not all mapped."""
        self._check(address, size)
        parts = []
        for page, start, length in _pieces(address, size):
            view = self._have(self._memory.read, page)
            parts.append(bytes(length) if view is None else bytes(view[start : start + length]))
        return b"".join(parts)

    def write(self, address: int, data: Bytes) -> None:
        """Write all of `data`; EFAULT if there is not memory for all of it."""
        view = memoryview(data).cast("B")
        self._check(address, view.nbytes)
        at = 0
        for page, start, length in _pieces(address, view.nbytes):
            self._have(self._memory.write, page)[start : start + length] = view[at : at + length]
            at += length

    def _have(self, get: Callable[[PageTable, int], View], page: int) -> View:
        """A page, or the end of the process; ENOMEM if nobody could be killed for it."""
        try:
            return get(self.table, page)
        except OSError as reason:
            if self.is_alive and reason.errno == errno.ENOMEM:
                raise
            if self.is_alive:
                why = f"Bus error, a page of it can't be had ({reason.strerror})"
                self._processes.kill(self, why)
            raise ProcessKilled(str(self.killed)) from reason

    def _check(self, address: int, size: int) -> None:
        self._check_alive()
        if size < 0:
            raise error(errno.EINVAL, f"{size} bytes")
        first, end = address // PAGE_BYTES, -(-(address + size) // PAGE_BYTES)
        if size and not self.maps.cover(first, end):
            raise error(errno.EFAULT, f"{size} bytes at {address:#x} are not mapped")

    def _check_alive(self) -> None:
        if self.table.closed:
            raise ProcessKilled(str(self.killed or f"process {self.pid} has ended"))

    # --- its life

    def fork(self, name: str | None = None) -> Process:
        """A child with the same memory."""
        self._check_alive()
        child = self._processes.spawn(name or self.name, parent=self)
        try:
            self._memory.fork(self.table, child.table)
        except OSError:
            child.exit()
            raise
        return child

    def exit(self) -> None:
        """Give everything back.  Twice is once."""
        if not self.table.closed:
            for page, _ in list(self.table.used()):
                self._memory.drop(self.table, page)
            self.table.closed = True
            self._processes.ended(self)

    def badness(self, total_pages: int) -> int:
        """Linux's oom_badness: what killing it would set free, in pages, adjusted."""
        points = self.table.resident_pages + self.table.swapped_pages
        points += self.table.bytes // PAGE_BYTES
        return points + self.oom_score_adj * total_pages // 1000

    @property
    def task(self) -> Task:
        """For the report of the out-of-memory killer."""
        return Task(self.pid, self.name, self.maps.pages, self.table, self.oom_score_adj)


class Processes:
    """All programs of a guest; the out-of-memory killer."""

    def __init__(self, memory: AnonymousMemory, total_pages: int) -> None:
        """`total_pages` is RAM and swap together."""
        self.memory = memory
        self.oom_kills = 0
        self.kills: list[Kill] = []
        self._total_pages = total_pages
        self._alive: dict[int, Process] = {}
        self._pid = 0
        self._lost: set[int] = set()

    def __len__(self) -> int:
        return len(self._alive)

    def __iter__(self) -> Iterator[Process]:
        return iter(self._alive.values())

    @property
    def committed_pages(self) -> int:
        """Committed_AS: what they all may write to."""
        return sum(process.maps.pages for process in self._alive.values())

    def spawn(self, name: str, parent: Process | None = None) -> Process:
        """A program without memory yet; EAGAIN when there are too many."""
        if len(self._alive) >= PROCESSES_MAX:
            raise error(errno.EAGAIN, f"more than {PROCESSES_MAX} processes")
        self._pid += 1
        process = self._alive[self._pid] = Process(self, self._pid, name, parent)
        return process

    def ended(self, process: Process) -> None:
        """It has given everything back."""
        self._alive.pop(process.pid, None)

    def kill(self, process: Process, why: str) -> None:
        """End a process, with a record."""
        table = process.table
        kill = Kill(
            process.pid,
            process.name,
            why,
            process.maps.pages,
            table.resident_pages,
            table.swapped_pages,
            table.bytes,
            process.oom_score_adj,
        )
        process.killed = kill
        process.exit()
        self.kills = [*self.kills[-KILLS_MAX + 1 :], kill]
        log.error("event=killed why=%s", kill)

    def kill_for_memory(self) -> bool:
        """The out-of-memory killer: whether there was somebody to kill."""
        candidates = [one for one in self if one.oom_score_adj != OOM_SCORE_ADJ_MIN]
        worst = max(candidates, key=lambda one: one.badness(self._total_pages), default=None)
        if worst is None or not worst.table.resident_pages + worst.table.swapped_pages:
            return False
        self.oom_kills += 1
        for line in report(self.memory, [one.task for one in self], worst.task):
            log.info("oom %s", line)
        self.kill(worst, "Out of memory")
        return True

    def note_lost(self, slots: Sequence[int]) -> None:
        """The pages of these swap slots are nowhere any more; see `kill_the_robbed`."""
        self._lost.update(slots)

    def kill_the_robbed(self) -> None:
        """Kill whoever has lost a page.  Not done where it is noticed, in the middle of reclaim."""
        lost, self._lost = self._lost, set()
        if not lost:
            return
        for process in list(self):
            gone = sum(-entry in lost for _, entry in process.table.used())
            if gone:
                self.kill(process, f"{gone} of its pages were lost with the hypervisor's memory")


def _pieces(address: int, size: int) -> list[tuple[int, int, int]]:
    """(page, start in it, length) of a range of bytes."""
    pieces = []
    end = address + size
    while address < end:
        page, start = divmod(address, PAGE_BYTES)
        length = min(PAGE_BYTES - start, end - address)
        pieces.append((page, start, length))
        address += length
    return pieces
