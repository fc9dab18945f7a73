"""Cached pages of files: which frame holds which page, which are dirty, and how they go.

`PageCache` brings pages in and has the invariants; here they are written back, offered to
cleancache a batch at a time, and dropped.  A page that the host has dropped (`guests.pagestates`)
leaves when somebody looks for it or reclaim comes to it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.errors import corrupt
from fs.filesystem import FileSystem
from fs.hooks import Extent, PageHooks, SharedPageHooks
from fs.inode import Inode
from fs.runs import runs
from guests.memory import TRANSFER_PAGES, Memory
from guests.pagestates import DISCARDED, STABLE, VOLATILE
from guests.readahead import Readahead
from guests.reclaim import PageLists
from guests.verification import Verification

PAGE: Final = BLOCK_BYTES
FILES_MAX: Final = 1024
"""Files remembered without a cached page, for their readahead; more are forgotten together."""
DIRTY_SHARE: Final = 4
"""At most one frame in 4 is dirty; then whoever writes next writes the oldest file back."""


class CachedFile:
    """One file's pages: index -> frame, and which of them are dirty."""

    __slots__ = ("dirty", "frames", "inode", "readahead")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.frames: dict[int, int] = {}
        self.dirty: set[int] = set()
        self.readahead = Readahead()


class PageCacheCounters:
    """In pages, since boot."""

    __slots__ = ("evictions", "hits", "misses", "readahead_pages", "refaults", "written_pages")

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.readahead_pages = 0
        self.refaults = 0
        """Read from the disk although they were evicted a short time ago."""
        self.evictions = 0
        self.written_pages = 0


class CachedPages:
    """What is cached of one mounted file system; `PageCache` brings it in."""

    def __init__(
        self,
        fs: FileSystem,
        memory: Memory,
        hooks: PageHooks,
        shared: SharedPageHooks | None = None,
        verification: Verification | None = None,
    ) -> None:
        """`shared` are the hooks once more, if other nodes use the same pool; `verification` is
        there if the file system keeps checksums of pages."""
        self._fs = fs
        self._memory = memory
        self._states = memory.states
        self._hooks = hooks
        self._shared = shared
        self._verification = verification
        frames = memory.budget.frames
        self.lists = PageLists(frames)
        memory.reclaim.serve(files=self)
        self._owners: list[CachedFile | None] = [None] * frames
        self._indexes = array("Q", bytes(8 * frames))
        self._holes = bytearray(frames)
        self._files: OrderedDict[int, CachedFile] = OrderedDict()
        self._ghosts: OrderedDict[tuple[int, int], None] = OrderedDict()
        """Pages that were evicted last, as many as there are frames: inode number and index."""
        self._dirty_pages = 0
        self._dirty_pages_max = frames // DIRTY_SHARE
        self.counters = PageCacheCounters()

    @property
    def cached_pages(self) -> int:
        """Pages held."""
        return len(self.lists)

    @property
    def active_pages(self) -> int:
        """Pages that were used more than once."""
        return self.lists.active_pages

    @property
    def dirty_pages(self) -> int:
        """Pages that differ from the disk."""
        return self._dirty_pages

    # --- pages of a file

    def _file(self, inode: Inode) -> CachedFile:
        file = self._files.get(inode.ino)
        if file is None:
            if len(self._files) >= FILES_MAX:
                self._forget_empty_files()
            file = self._files[inode.ino] = CachedFile(inode)
        assert file.inode is inode, "two objects for one inode"
        return file

    def _forget_empty_files(self) -> None:
        """But for those of which something is owed to a shared pool: while their inodes live, their
        cluster locks are not given up unasked."""
        for ino in [ino for ino, known in self._files.items() if not known.frames]:
            if self._shared is None or self._shared.settle(self._files[ino].inode.key):
                del self._files[ino]

    def _insert(self, file: CachedFile, index: int) -> int:
        frame = self._memory.take()
        file.frames[index] = frame
        self._owners[frame] = file
        self._indexes[frame] = index
        self._holes[frame] = 0
        self.lists.add(frame)
        return frame

    def _drop(self, file: CachedFile, index: int) -> None:
        """A page leaves, whatever it holds."""
        frame = file.frames.pop(index)
        if index in file.dirty:
            file.dirty.remove(index)
            self._dirty_pages -= 1
        self._owners[frame] = None
        self.lists.remove(frame)
        self._memory.give(frame)

    # --- dirty pages

    def _to_be_overwritten(self, file: CachedFile, index: int) -> int:
        """A frame for a page whose whole content is about to be replaced; dirty from now on."""
        while self._dirty_pages >= self._dirty_pages_max:
            oldest = next(file for file in self._files.values() if file.dirty)
            self._write_back(oldest, sorted(oldest.dirty))
        if self._states is not None:
            self._remove_discarded(file, (index,))
        frame = file.frames.get(index)
        if frame is None:
            self._memory.reclaim.make_room(1)
            frame = self._insert(file, index)
        self._make_dirty(file, index)
        self.lists.touch(frame)
        return frame

    def _make_dirty(self, file: CachedFile, index: int) -> None:
        if index not in file.dirty:
            # I3: from here on the page is not what the disk holds.
            self._hooks.flush_page(file.inode.key, index)
            file.dirty.add(index)
            self._dirty_pages += 1
            frame = file.frames[index]
            self._holes[frame] = 0
            if self._states is not None:
                self._states.of[frame] = STABLE
            self._files.move_to_end(file.inode.ino)

    def _write_back(self, file: CachedFile, indexes: list[int]) -> None:
        """Write dirty pages (ascending) to their blocks, at most an extent at a time."""
        for start, length in _extents(indexes):
            blocks = self._fs.map_blocks(file.inode, start, length)
            for run in runs(blocks):
                if not run.block:
                    raise corrupt(f"inode {file.inode.ino}: a written page lost its block")
                first = start + run.position
                frames = [file.frames[index] for index in range(first, first + run.length)]
                data = self._gather(frames)
                self._fs.device.write(run.block, run.length, data)
                if self._verification is not None:
                    self._verification.checksums.written(file.inode, first, data)
                file.dirty.difference_update(range(first, first + run.length))
                self._dirty_pages -= run.length
                self.counters.written_pages += run.length
                if self._states is not None:
                    for frame in frames:
                        self._states.of[frame] = VOLATILE

    def _gather(self, frames: list[int]) -> memoryview:
        """The pages of up to `TRANSFER_PAGES` frames, side by side."""
        transfer = self._memory.transfer
        pages = self._memory.pages
        at = 0
        for frame in frames:
            transfer[at : at + PAGE] = pages[frame * PAGE : (frame + 1) * PAGE]
            at += PAGE
        return transfer[:at]

    # --- reclaim

    def evict(self, frames: list[int]) -> int:
        """Write the dirty pages of these frames, offer the clean ones, free all."""
        free = self._memory.free_pages
        if self._states is not None:
            frames = self._not_discarded(frames)
        by_file: dict[int, list[int]] = {}
        for frame in frames:
            owner = self._owners[frame]
            assert owner is not None, "a listed frame has an owner"
            by_file.setdefault(owner.inode.ino, []).append(self._indexes[frame])
        clean: list[tuple[CachedFile, list[int]]] = []
        try:
            for ino, indexes in by_file.items():
                file = self._files[ino]
                indexes.sort()
                self._write_back(file, [index for index in indexes if index in file.dirty])
                clean.append((file, indexes))
        finally:
            # What came before a file that can't be written goes all the same.
            self._let_go(clean)
        return self._memory.free_pages - free

    def _let_go(self, clean: list[tuple[CachedFile, list[int]]]) -> None:
        """Offer clean pages, by file and ascending, and free their frames."""
        extents: list[Extent] = []
        frames: list[int] = []
        holes = self._holes
        was_active = self.lists.was_active
        for file, indexes in clean:
            mapped = [index for index in indexes if not holes[file.frames[index]]]
            mapped_frames = [file.frames[index] for index in mapped]
            key = file.inode.key
            at = 0
            for start, length in _extents(mapped):
                index = start
                uses = (was_active[frame] for frame in mapped_frames[at : at + length])
                for active, pages in groupby(uses):
                    count = sum(1 for _ in pages)
                    extents.append(Extent(key, index, count, bool(active)))
                    index += count
                at += length
            frames += mapped_frames
        if extents:
            self._hooks.put_extents(extents, self._gather(frames))
        for file, indexes in clean:
            for index in indexes:
                self._drop(file, index)
                self._ghosts[file.inode.ino, index] = None
            self.counters.evictions += len(indexes)
        while len(self._ghosts) > self._memory.budget.frames:
            self._ghosts.popitem(last=False)

    # --- what the host has dropped

    def _remove_discarded(self, file: CachedFile, indexes: Iterable[int]) -> None:
        """Discard faults: of these pages those that the host has dropped leave."""
        assert self._states is not None
        states = self._states.of
        for index in indexes:
            frame = file.frames.get(index)
            if frame is not None and states[frame] == DISCARDED:
                self._drop(file, index)
                self._states.discard_faults += 1

    def _not_discarded(self, frames: list[int]) -> list[int]:
        """Victims with something in them, in place of these if need be: to give up a page that the
        host has dropped makes nothing free, and is done on the way."""
        assert self._states is not None
        states = self._states.of
        while frames:
            kept = [frame for frame in frames if states[frame] != DISCARDED]
            for frame in frames:
                if states[frame] == DISCARDED:
                    owner = self._owners[frame]
                    assert owner is not None, "a listed frame has an owner"
                    self._drop(owner, self._indexes[frame])
            if kept:
                return kept
            frames = self.lists.victims()
        return frames

    def _note_refaults(self, file: CachedFile, index: int, count: int) -> None:
        """Pages that were read from the disk although they had been here: evicted too early."""
        refaults = 0
        for at in range(index, index + count):
            if (file.inode.ino, at) in self._ghosts:
                del self._ghosts[file.inode.ino, at]
                refaults += 1
        if refaults:
            self.counters.refaults += refaults
            self._memory.reclaim.note_cost(files=refaults)


def _extents(indexes: list[int]) -> Iterator[tuple[int, int]]:
    """(first, length) of runs of consecutive numbers, each at most `TRANSFER_PAGES` long."""
    start = 0
    for at in range(1, len(indexes) + 1):
        if at < len(indexes) and indexes[at] == indexes[start] + at - start < (
            indexes[start] + TRANSFER_PAGES
        ):
            continue
        yield indexes[start], at - start
        start = at
