"""The page cache: file data in the guest's page frames, on its way between programs and the disk.

    read:   cached? -> cleancache, a whole extent -> what is still missing: the disk, in runs
    write:  into a frame, dirty; to the disk at sync, or when the frame is needed
    evict:  dirty? -> disk.  Then clean and mapped to the disk: offered to cleancache, a whole
            batch in one call

Invariants
  I1  A frame in use belongs to one page of one file, and its owner is here.
  I2  A dirty page has a block on the disk (`allocate_blocks` comes first), so write-back never
      runs out of space.
  I3  Before a clean or missing page becomes dirty, cleancache has forgotten it: what cleancache
      holds of a page is what the disk holds, or nothing.
  I4  Only clean pages with a block are offered.  Holes, and pages that truncate or forget dropped,
      never are.
  I5  Bytes past the end of a file are zero in every cached page.
  I6  With page states (`guests.pagestates`) a page is volatile if and only if it is clean and all
      of it is there.  The host may have dropped such a page: it is found out here, by whoever
      looks for it, and by reclaim.

Differs from Linux: a write-back that fails (EIO) is told to whoever needed the frame and the page
stays dirty; Linux drops the page and tells only the next fsync.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

from fs.block.device import BLOCK_BYTES, Bytes
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
FLUSH_PAGES_MAX: Final = 8
"""A truncate that drops more pages than this flushes the file's whole object, as Linux always does;
below it page by page, so that the rest of the file stays in cleancache."""


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


class PageCache:
    """The `FilePages` of one mounted file system."""

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

    # --- FilePages

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`, fewer only at the end of the file."""
        end = min(offset + size, inode.size)
        if end <= offset:
            return b""
        file = self._file(inode)
        pages = self._memory.pages
        data = bytearray(end - offset)
        at = 0
        last = (end - 1) // PAGE
        for index in range(offset // PAGE, last + 1):
            start = self._present(file, index, last + 1 - index) * PAGE
            skip = offset - index * PAGE if not at else 0
            length = min(PAGE - skip, end - offset - at)
            data[at : at + length] = pages[start + skip : start + skip + length]
            at += length
        return bytes(data)

    def write(self, inode: Inode, offset: int, data: Bytes) -> None:
        """Write all of `data` at `offset`, or nothing when space runs out."""
        view = memoryview(data).cast("B")
        if not view.nbytes:
            return
        file = self._file(inode)
        first = offset // PAGE
        end = offset + view.nbytes
        count = -(-end // PAGE) - first
        # What a partial page holds is copied now: a later frame may push the page out again.
        head = self._page_bytes(file, first)[: offset - first * PAGE] if offset % PAGE else b""
        tail = b""
        if end % PAGE:
            inside = end < inode.size
            last = self._page_bytes(file, end // PAGE) if inside else bytes(PAGE)
            tail = last[end % PAGE :]
        if self._verification is not None:
            self._verification.checksums.changing(inode, offset, end)
        self._fs.allocate_blocks(inode, first, count)
        whole = b"".join((head, view, tail)) if head or tail else view
        with memoryview(whole) as source:
            for number in range(count):
                frame = self._to_be_overwritten(file, first + number)
                self._memory.page(frame)[:] = source[number * PAGE : (number + 1) * PAGE]
                # With each page, so that an error later on leaves no page beyond the end (I5).
                inode.size = max(inode.size, min(end, (first + number + 1) * PAGE))

    def truncate(self, inode: Inode, new_size: int) -> None:
        """Drop pages beyond `new_size`; zero what it cuts off the page that holds it."""
        if new_size >= inode.size:
            return
        file = self._file(inode)
        kept = -(-new_size // PAGE)
        cut = new_size % PAGE
        cut_page = -1
        if cut and self._fs.map_blocks(inode, kept - 1, 1)[0]:
            # First what may fail: nothing has changed if it does.
            cut_page = self._present(file, kept - 1, 1)
            if self._verification is not None:
                self._verification.checksums.changing(inode, new_size, kept * PAGE)
        gone = -(-inode.size // PAGE) - kept
        for index in [index for index in file.frames if index >= kept]:
            self._drop(file, index)
        if gone > FLUSH_PAGES_MAX or (gone and not new_size):
            self._hooks.flush_inode(inode.key)
        else:
            for index in range(kept, kept + gone):
                self._hooks.flush_page(inode.key, index)
        if cut_page >= 0:
            self._make_dirty(file, kept - 1)
            start = cut_page * PAGE
            self._memory.pages[start + cut : start + PAGE] = bytes(PAGE - cut)

    def sync(self, inode: Inode) -> None:
        """Write the file's dirty pages to the disk, neighbours together."""
        file = self._files.get(inode.ino)
        if file is not None:
            self._write_back(file, sorted(file.dirty))

    def sync_all(self) -> None:
        """Write all dirty pages."""
        for file in self._files.values():
            if file.dirty:
                self._write_back(file, sorted(file.dirty))

    def invalidate(self, inode: Inode) -> None:
        """Write the file's dirty pages, offer all to cleancache and drop them.

        What cleancache holds stays: it is what the disk holds (I3).
        """
        file = self._files.get(inode.ino)
        if file is None:
            return
        self._write_back(file, sorted(file.dirty))
        if self._states is not None:
            self._remove_discarded(file, list(file.frames))
        indexes = sorted(file.frames)
        for start in range(0, len(indexes), TRANSFER_PAGES):
            self._let_go([(file, indexes[start : start + TRANSFER_PAGES])])
        del self._files[inode.ino]

    def settle(self, inode: Inode) -> bool:
        """Whether the other nodes can find nothing old of this file in cleancache.

        False: the exclusive lock's next holders must `distrust` it.
        """
        if self._shared is None or self._shared.settle(inode.key):
            return True
        self._shared.hand_over(inode.key)
        return False

    def distrust(self, inode: Inode) -> None:
        """What cleancache holds of the file may be older than the disk."""
        if self._shared is not None:
            self._file(inode)
            self._shared.distrust(inode.key)

    def forget(self, inode: Inode) -> None:
        """The file is gone: nothing of it is written, kept or offered any more."""
        file = self._files.pop(inode.ino, None)
        if file is not None:
            for index in list(file.frames):
                self._drop(file, index)
        self._hooks.flush_inode(inode.key)

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

    def _present(self, file: CachedFile, index: int, wanted: int) -> int:
        """The frame of a page below the end of the file, read if need be.

        `wanted`: how many pages are going to be read from `index` on.
        """
        frame = file.frames.get(index)
        if self._states is not None and frame is not None and self._states.of[frame] == DISCARDED:
            frame = None
        if frame is None:
            self.counters.misses += 1
            self._fill(file, index, wanted)
            frame = file.frames[index]
        else:
            self.counters.hits += 1
        self.lists.touch(frame)
        return frame

    def _page_bytes(self, file: CachedFile, index: int) -> bytes:
        """A copy of a page; zeros past the end of the file."""
        if index * PAGE >= file.inode.size:
            return bytes(PAGE)
        return bytes(self._memory.page(self._present(file, index, 1)))

    def _fill(self, file: CachedFile, index: int, wanted: int) -> None:
        """Bring in the missing pages from `index` up to the next cached one or the window's end."""
        end = -(-file.inode.size // PAGE)
        planned = file.readahead.plan(index, wanted, end)
        if self._states is not None:
            self._remove_discarded(file, range(index, index + planned))
        count = 1
        while count < planned and index + count not in file.frames:
            count += 1
        self._memory.reclaim.make_room(count)
        transfer = self._memory.transfer
        get = self._hooks.get_pages
        if self._verification is None:
            found = get(file.inode.key, index, count, transfer)
        else:
            found = self._verification.get_pages(get, file.inode, index, count, transfer)
        self._adopt(file, index, count, found)
        if found != (1 << count) - 1:
            try:
                self._read_missing(file, index, count, found)
            except OSError:
                # Only the first page must be had now; the others' error is told when they must.
                if index not in file.frames:
                    if count == 1:
                        raise
                    self._read_missing(file, index, 1, 0)
        self.counters.readahead_pages += max(0, count - wanted)

    def _read_missing(self, file: CachedFile, index: int, count: int, found: int) -> None:
        """Read the pages whose bit is not in `found` from the disk, neighbouring blocks at once."""
        transfer = self._memory.transfer
        for first, length in _clear_runs(found, count):
            blocks = self._fs.map_blocks(file.inode, index + first, length)
            for run in runs(blocks):
                if run.block:
                    self._fs.device.read(run.block, run.length, transfer)
                    self._note_refaults(file, index + first + run.position, run.length)
                else:
                    transfer[: run.length * PAGE] = bytes(run.length * PAGE)
                whole = (1 << run.length) - 1
                self._adopt(
                    file, index + first + run.position, run.length, whole, hole=not run.block
                )
                if self._verification is not None and run.block:
                    at = index + first + run.position
                    for number in range(at, at + run.length):
                        page = self._memory.page(file.frames[number])
                        self._verification.checksums.was_read(file.inode, number, page)

    def _adopt(
        self, file: CachedFile, index: int, count: int, which: int, *, hole: bool = False
    ) -> None:
        """Copy the pages in `which` from the transfer frames into frames of their own."""
        transfer = self._memory.transfer
        for number in range(count):
            if which >> number & 1:
                frame = self._insert(file, index + number)
                self._holes[frame] = hole
                page = self._memory.page(frame)
                page[:] = transfer[number * PAGE : (number + 1) * PAGE]
                past = file.inode.size - (index + number) * PAGE
                if past < PAGE:
                    page[past:] = bytes(PAGE - past)
                if self._states is not None:
                    self._states.of[frame] = VOLATILE

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


def _clear_runs(bits: int, count: int) -> Iterator[tuple[int, int]]:
    """(first, length) of runs of clear bits among the lowest `count`."""
    first = 0
    for at in range(count + 1):
        if at == count or bits >> at & 1:
            if at > first:
                yield first, at - first
            first = at + 1
