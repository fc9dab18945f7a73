"""The seam between a page cache and whatever keeps the clean pages that it let go.

Linux called it `cleancache_ops`.

Differs from Linux in two points. Calls are in extents, because a call per page was the
interface's best known weakness. And a file is named by inode number **and generation**: an inode
number is used again after its file is gone, and the pages of the old file must never be taken for
the new file's.

Duties of whoever calls it (a page cache):
  - `put_pages` only for pages that are clean, up to date and mapped to the disk;
  - `flush_page` before a page that may have been put becomes different on the disk (and for each
    page cut partly by a truncate), `flush_inode` after a truncate and when the inode is freed,
    `flush_fs` on unmount;
  - `get_pages` is allowed to lose anything, so a miss is always answered by reading the disk.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class FileKey(NamedTuple):
    """Names one file for as long as it exists.

    `generation` (32 bits) differs each time `ino` is used again.
    """

    ino: int
    generation: int


class PageHooks(Protocol):
    """A store of clean pages of 4096 bytes. No method raises for a page that is not there."""

    def get_pages(self, key: FileKey, index: int, count: int, into: memoryview) -> int:
        """Fetch pages `index .. index+count-1` (1 <= count <= 64).

        Bit i of the result set = page `index+i` is now in `into[i*4096 : (i+1)*4096]`. Bytes of
        pages that missed are undefined.
        """
        ...

    def put_pages(self, key: FileKey, index: int, count: int, pages: memoryview) -> None:
        """Offer pages `index .. index+count-1` (1 <= count <= 64); each may be kept or not."""
        ...

    def flush_page(self, key: FileKey, index: int) -> None:
        """Forget one page: a later get misses until the next put."""
        ...

    def flush_inode(self, key: FileKey) -> None:
        """Forget all pages of one file."""
        ...

    def flush_fs(self) -> None:
        """Forget all pages of this file system (unmount)."""
        ...


class NoHooks:
    """Keeps nothing: what a page cache gets when there is no tmem."""

    def get_pages(
        self,
        key: FileKey,  # noqa: ARG002
        index: int,  # noqa: ARG002
        count: int,  # noqa: ARG002
        into: memoryview,  # noqa: ARG002
    ) -> int:
        """Always a miss."""
        return 0

    def put_pages(self, key: FileKey, index: int, count: int, pages: memoryview) -> None:
        """Drops the pages."""

    def flush_page(self, key: FileKey, index: int) -> None:
        """There is nothing to forget."""

    def flush_inode(self, key: FileKey) -> None:
        """There is nothing to forget."""

    def flush_fs(self) -> None:
        """There is nothing to forget."""
