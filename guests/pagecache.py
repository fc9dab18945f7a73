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

from collections.abc import Iterator
from typing import Final

from fs.block.device import Bytes
from fs.inode import Inode
from fs.runs import runs
from guests.cachedpages import PAGE, CachedFile, CachedPages
from guests.memory import TRANSFER_PAGES
from guests.pagestates import DISCARDED, VOLATILE

FLUSH_PAGES_MAX: Final = 8
"""A truncate that drops more pages than this flushes the file's whole object, as Linux always does;
below it page by page, so that the rest of the file stays in cleancache."""


class PageCache(CachedPages):
    """The `FilePages` of one mounted file system."""

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

    # --- pages that are read

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


def _clear_runs(bits: int, count: int) -> Iterator[tuple[int, int]]:
    """(first, length) of runs of clear bits among the lowest `count`."""
    first = 0
    for at in range(count + 1):
        if at == count or bits >> at & 1:
            if at > first:
                yield first, at - first
            first = at + 1
