"""File data without a cache: every read and write goes to the device.

For tests, tools and as the reference against which a page cache is compared.
"""

from __future__ import annotations

from fs.block.device import BLOCK_BYTES, Bytes
from fs.checksums import PageChecksums
from fs.filesystem import FileSystem
from fs.inode import Inode
from fs.runs import runs

EXTENT_PAGES = 256
"""Pages mapped at once: bounds the length of a block map at 1 MiB of data."""


class DirectPages:
    """A `FilePages` that holds nothing."""

    def __init__(self, fs: FileSystem, checksums: PageChecksums | None = None) -> None:
        self._fs = fs
        self._checksums = checksums

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """Read what is there between `offset` and the end of the file, at most `size` bytes."""
        end = min(offset + size, inode.size)
        if end <= offset:
            return b""
        first = offset // BLOCK_BYTES
        count = -(-end // BLOCK_BYTES) - first
        data = bytearray(count * BLOCK_BYTES)
        view = memoryview(data)
        for start in range(0, count, EXTENT_PAGES):
            blocks = self._fs.map_blocks(inode, first + start, min(EXTENT_PAGES, count - start))
            for run in runs(blocks):
                if run.block:
                    self._fs.device.read(
                        run.block, run.length, view[(start + run.position) * BLOCK_BYTES :]
                    )
        return bytes(view[offset - first * BLOCK_BYTES : end - first * BLOCK_BYTES])

    def write(self, inode: Inode, offset: int, data: Bytes) -> None:
        """Write whole pages at once.

        The first and the last page are read before when only part of them changes.
        """
        view = memoryview(data).cast("B")
        if not view.nbytes:
            return
        first = offset // BLOCK_BYTES
        end = offset + view.nbytes
        if self._checksums is not None:
            self._checksums.changing(inode, offset, end)
        count = -(-end // BLOCK_BYTES) - first
        pages = bytearray(count * BLOCK_BYTES)
        begin = offset - first * BLOCK_BYTES
        if begin:
            self._read_page(inode, first, memoryview(pages))
        if end % BLOCK_BYTES and (count > 1 or not begin):
            self._read_page(inode, first + count - 1, memoryview(pages)[-BLOCK_BYTES:])
        blocks = self._fs.allocate_blocks(inode, first, count)
        pages[begin : begin + view.nbytes] = view
        self._write_runs(blocks, pages)
        if self._checksums is not None:
            self._checksums.written(inode, first, memoryview(pages))
        inode.size = max(inode.size, end)

    def _read_page(self, inode: Inode, index: int, into: memoryview) -> None:
        found = self.read(inode, index * BLOCK_BYTES, BLOCK_BYTES)
        into[: len(found)] = found

    def _write_runs(self, blocks: list[int], pages: bytearray) -> None:
        view = memoryview(pages)
        for run in runs(blocks):
            start = run.position * BLOCK_BYTES
            self._fs.device.write(
                run.block, run.length, view[start : start + run.length * BLOCK_BYTES]
            )

    def truncate(self, inode: Inode, new_size: int) -> None:
        """Zero the tail of the page that the new end cuts."""
        kept = new_size % BLOCK_BYTES
        if new_size >= inode.size or not kept:
            return
        index = new_size // BLOCK_BYTES
        if self._checksums is not None:
            self._checksums.changing(inode, new_size, (index + 1) * BLOCK_BYTES)
        block = self._fs.map_blocks(inode, index, 1)[0]
        if block:
            page = bytearray(BLOCK_BYTES)
            self._fs.device.read(block, 1, memoryview(page))
            page[kept:] = bytes(BLOCK_BYTES - kept)
            self._fs.device.write(block, 1, page)
            if self._checksums is not None:
                self._checksums.written(inode, index, memoryview(page))

    def sync(self, inode: Inode) -> None:
        """Nothing is held back."""

    def sync_all(self) -> None:
        """Nothing is held back."""

    def invalidate(self, inode: Inode) -> None:
        """Nothing is kept."""

    def settle(self, inode: Inode) -> bool:  # noqa: ARG002
        """Nothing is owed."""
        return True

    def distrust(self, inode: Inode) -> None:
        """Nothing is kept."""

    def forget(self, inode: Inode) -> None:
        """Nothing is kept."""
