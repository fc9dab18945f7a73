"""A guest kernel in the test's own process, over the real machine and a real ext2 image."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fs.block.device import BlockDevice
from guests.anonymous import PageTable
from guests.kernel import GuestSpec, Kernel
from guests.pagecache import PageCache
from hypervisor.arena import HINTS_MASK, Arena, format_arena
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.recovery import recover
from ipc.abi import PAGE_BYTES
from ipc.channel import Channel
from ipc.errors import Disconnected
from ipc.local import Fault, LocalChannel
from ipc.window import Window
from tests.support.tools import need_tool

PAGE = PAGE_BYTES
SMALL_MEMORY_BYTES = 176 * PAGE
"""68 frames for the page cache beside the window, the transfer frames and 8 buffers."""


class LocalHypervisor:
    """The machine over one arena, with crashes.

    A lost request or reply is a crash; the machine is recovered from its arena when the guest
    attaches again.  With `lends` the guest's RAM comes out of the arena.
    """

    def __init__(self, arena_bytes: int = 1 << 20, *, lends: bool = False) -> None:
        self._mapping = mmap.mmap(-1, arena_bytes)
        format_arena(self._mapping)
        self._lends = lends
        self.machine = Machine(Arena(self._mapping), lends=lends)
        self.is_up = True
        self.draw_fault: Callable[[], Fault] = lambda: Fault.NONE
        self._crashed = False
        self._life = 0

    def connect(self) -> Channel:
        """As `ipc.attach.connect` does."""
        if not self.is_up:
            raise Disconnected("no hypervisor")
        if self._crashed:
            self.machine = Machine(Arena(self._mapping), lends=self._lends)
            recover(self.machine)
            self._crashed = False
        resumed = "guest" in self.machine.clients
        assert self.machine.attach("guest", 1, 1, 0) is not None
        return LocalChannel(
            self._execute,
            faults=self._faults(),
            generation=self.machine.generation,
            resumed=resumed,
        )

    def kill(self, *, arena_lost: bool = False) -> None:
        """Die between two calls; `start` brings it back, with an empty arena if that was lost."""
        self.is_up = False
        self._life += 1
        self._crashed = True
        if arena_lost:
            self._mapping[:] = bytes(len(self._mapping))
            format_arena(self._mapping)

    def start(self) -> None:
        """Be there again."""
        self.is_up = True

    def check(self) -> None:
        """Walk the machine's invariants; one that died is nothing until somebody attaches."""
        if not self._crashed:
            check(self.machine)

    def _execute(self, request: bytes, window: Window) -> bytes:
        return self.machine.execute(self.machine.clients["guest"], request, window)

    def _faults(self) -> Iterator[Fault]:
        life = self._life
        while True:
            lives = self.is_up and self._life == life
            fault = self.draw_fault() if lives else Fault.LOSE_REQUEST
            if lives and fault is not Fault.NONE:
                self._crashed = True
            yield fault

    def cleancache(self) -> dict[str, int]:
        """The hypervisor's own counters of this guest."""
        return self.machine.clients["guest"].account.cleancache()

    @property
    def pages(self) -> int:
        """Pages that the guest has here."""
        return sum(m.pool.pages for m in self.machine.clients["guest"].members.values())

    def persistent_slots(self) -> set[int]:
        """The indexes of all pages that the guest has in persistent pools."""
        return {
            number << 6 | place
            for member in self.machine.clients["guest"].members.values()
            if member.pool.persistent
            for found in member.pool.objects.values()
            for number, leaf in found.leaves()
            for place in range(len(leaf))
            if leaf[place] >= 0
        }

    def hints(self) -> dict[tuple[bytes, int], int]:
        """(object id, index) of every raw page that the guest has here -> the hints of its put."""
        store = self.machine.store
        return {
            (found.oid, number << 6 | place): store.state(leaf[place]) & HINTS_MASK
            for member in self.machine.clients["guest"].members.values()
            for found in member.pool.objects.values()
            for number, leaf in found.leaves()
            for place in range(len(leaf))
            if leaf[place] >= 0
        }


@dataclass
class Time:
    """A clock that the test moves."""

    seconds: float = 1000.0
    calendar_ns: int = field(default=1_735_689_600_000_000_000)

    def now_seconds(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def clock_ns(self) -> int:
        self.calendar_ns += 1_000_000
        return self.calendar_ns


def make_image(path: Path, *, mib: int = 8, tree: Path | None = None) -> Path:
    """An ext2 image, empty or with a tree."""
    with path.open("wb") as file:
        file.truncate(mib << 20)
    command = [need_tool("mke2fs"), "-q", "-t", "ext2", "-b", "4096"]
    command += ["-d", str(tree)] if tree is not None else []
    subprocess.run([*command, str(path)], check=True, capture_output=True)
    return path


def assert_clean(image: Path) -> None:
    """E2fsck finds nothing to say."""
    verdict = subprocess.run(
        [need_tool("e2fsck"), "-fn", str(image)], capture_output=True, text=True, check=False
    )
    assert verdict.returncode == 0, verdict.stdout


@contextmanager
def running_kernel(
    image: Path,
    hypervisor: LocalHypervisor | None = None,
    *,
    memory_bytes: int = SMALL_MEMORY_BYTES,
    time: Time | None = None,
    stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
    swap: Path | None = None,
    swap_stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
    sleep: Callable[[float], None] | None = None,
    **spec: Any,
) -> Iterator[Kernel]:
    """A kernel that is stopped at the end; while it sleeps only its clock goes on."""
    time = time or Time()
    kernel = Kernel(
        GuestSpec("guest", image, memory_bytes, image.parent, buffer_blocks=8, swap=swap, **spec),
        clock_ns=time.clock_ns,
        now_seconds=time.now_seconds,
        connect=hypervisor.connect if hypervisor is not None else None,
        stack=stack,
        swap_stack=swap_stack,
        sleep=sleep or time.sleep,
    )
    try:
        yield kernel
    finally:
        kernel.stop()


def check_pages(pages: PageCache) -> None:
    """Every frame is free or belongs to one page of one file, and is on one list (I1, I2)."""
    memory, lists = pages._memory, pages.lists
    owned = {}
    dirty = 0
    for file in pages._files.values():
        dirty += len(file.dirty)
        assert file.dirty <= file.frames.keys()
        for index, frame in file.frames.items():
            assert frame not in owned, "two pages in one frame"
            owned[frame] = (file, index)
            assert pages._owners[frame] is file
            assert pages._indexes[frame] == index
            assert index not in file.dirty or not pages._holes[frame]
    assert owned.keys().isdisjoint(memory._free)
    assert len(owned) == len(lists) <= memory.used_pages + memory._discarded_pages
    assert owned.keys() == lists._active.keys() | lists._inactive.keys()
    assert not lists._active.keys() & lists._inactive.keys()
    assert memory.used_pages <= memory.budget.frames
    assert dirty == pages.dirty_pages


def check_programs(kernel: Kernel, hypervisor: LocalHypervisor | None = None) -> None:
    """The invariants of anonymous memory, and that every frame and every slot has one owner.

    With the hypervisor: it has what frontswap says that it has.
    """
    userland = kernel.userland
    anonymous, swap = userland.anonymous, userland.swap
    named: dict[int, list[tuple[PageTable, int]]] = {}
    users: dict[int, int] = {}
    for process in userland.processes:
        counts = {True: 0, False: 0}
        for page, entry in process.table.used():
            counts[entry > 0] += 1
            assert process.maps.cover(page, page + 1)
            if entry > 0:
                named.setdefault(entry - 1, []).append((process.table, page))
            else:
                users[-entry] = users.get(-entry, 0) + 1
        assert counts == {
            True: process.table.resident_pages,
            False: process.table.swapped_pages,
        }
    listed = anonymous.lists._active.keys() | anonymous.lists._inactive.keys()
    assert anonymous._tables.keys() == listed
    for frame, tables in anonymous._tables.items():
        assert sorted(tables, key=lambda one: (id(one[0]), one[1])) == sorted(
            named.pop(frame, []), key=lambda one: (id(one[0]), one[1])
        )
        assert tables or frame in anonymous._slots, "a frame that nobody wants"
    assert not named, "an entry for a frame that is not here"
    assert {slot: frame for frame, slot in anonymous._slots.items()} == anonymous._cached
    memory = kernel.memory
    assert listed.isdisjoint(memory._free)
    owned = anonymous.pages + kernel.pages.cached_pages
    assert memory.used_pages + memory._discarded_pages == owned
    if swap is None:
        assert not users
        return
    for slot in range(1, len(swap._users)):
        assert swap.users(slot) == users.get(slot, 0)
        wanted = slot in users or slot in anonymous._cached
        assert swap.disk.is_used(slot) == wanted, f"slot {slot}"
    front = swap.frontswap
    if front is not None:
        assert all(swap.disk.is_used(slot) for slot in front.stored)
        assert front.stored.keys().isdisjoint(front._to_flush)
        assert front.stored.keys().isdisjoint(front.gone)
        if hypervisor is not None and front.attached:
            there = hypervisor.persistent_slots()
            assert front.stored.keys() <= there
            assert there <= front.stored.keys() | front._to_flush.keys()


def write_file(kernel: Kernel, path: str, data: bytes) -> None:
    """Make or replace a file."""
    handle = kernel.vfs.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        assert kernel.vfs.write(handle, data) == len(data)
    finally:
        kernel.vfs.close(handle)


def read_file(kernel: Kernel, path: str, offset: int = 0, size: int = 1 << 30) -> bytes:
    """What a file holds."""
    handle = kernel.vfs.open(path)
    try:
        return kernel.vfs.pread(handle, size, offset)
    finally:
        kernel.vfs.close(handle)


def push_out(kernel: Kernel, path: str = "/push-out") -> None:
    """Use a file larger than memory so much that every other page leaves the page cache."""
    size = (2 * kernel.memory.budget.frames + 64) * PAGE
    if path.lstrip("/") not in kernel.vfs.listdir("/"):
        write_file(kernel, path, bytes(size))
    # Three times each: pages that are used once never drive out those that were used twice.
    for offset in range(0, size, 16 * PAGE):
        for _ in range(3):
            read_file(kernel, path, offset, 16 * PAGE)
