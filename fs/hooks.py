"""The seam between a page cache and whatever keeps the clean pages that it let go.

Linux called it `cleancache_ops`.

Differs from Linux in three points. Calls are in extents, because a call per page was the
interface's best known weakness. A file is named by inode number **and generation**: an inode
number is used again after its file is gone, and the pages of the old file must never be taken for
the new file's. And an offer says whether the page was *active*, used more than once while it was
in the page cache; the call's authors regretted that it could not be told, because a page that was
read once in passing is not worth the memory of one that is used all the time.

Duties of whoever calls it (a page cache):
  - `put_pages`, `put_extents` only for pages that are clean, up to date and mapped to the disk;
  - `flush_page` before a page that may have been put becomes different on the disk (and for each
    page cut partly by a truncate), `flush_inode` after a truncate and when the inode is freed,
    `flush_fs` on unmount;
  - `get_pages` is allowed to lose anything, so a miss is always answered by reading the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class FileKey(NamedTuple):
    """Names one file for as long as it exists.

    `generation` (32 bits) differs each time `ino` is used again.
    """

    ino: int
    generation: int


class Extent(NamedTuple):
    """Pages `start .. start+length-1` of a file that are offered; all were active, or none."""

    key: FileKey
    start: int
    length: int
    active: bool


class PageHooks(Protocol):
    """A store of clean pages of 4096 bytes. No method raises for a page that is not there."""

    def get_pages(self, key: FileKey, index: int, count: int, into: memoryview) -> int:
        """Fetch pages `index .. index+count-1` (1 <= count <= 64).

        Bit i of the result set = page `index+i` is now in `into[i*4096 : (i+1)*4096]`. Bytes of
        pages that missed are undefined.
        """
        ...

    def put_pages(
        self, key: FileKey, index: int, count: int, pages: memoryview, *, active: bool = False
    ) -> None:
        """Offer pages `index .. index+count-1` (1 <= count <= 64); each may be kept or not."""
        ...

    def put_extents(self, extents: Sequence[Extent], pages: memoryview) -> None:
        """Offer several extents, at most 64 pages in all; `pages` has theirs side by side."""
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


class SharedPageHooks(PageHooks, Protocol):
    """Pages that all nodes share that have mounted a clustered file system.

    More duties of whoever calls it:
      - `put_pages` of a file only under its cluster lock, `get_pages` likewise;
      - a page is flushed under the exclusive lock, before it becomes dirty.  That flush may stay
        undelivered, so before the exclusive lock is given up: `settle`.  If that fails, the lock is
        kept, or its value tells everybody (`hand_over`);
      - `distrust` by whoever gets a lock whose value tells so, or is not valid because an exclusive
        holder died: nobody knows what that one still had to flush.
    """

    def settle(self, key: FileKey) -> bool:
        """Try to deliver what is still to be flushed of a file; whether nothing is."""
        ...

    def hand_over(self, key: FileKey) -> None:
        """What is still to be flushed of a file is the business of its lock's next holder."""
        ...

    def distrust(self, key: FileKey) -> None:
        """What is kept of a file may be old: forget it before anything of it is got."""
        ...


class NoHooks:
    """Keeps nothing: what a page cache gets when there is no tmem.

    A node of a cluster whose other nodes share pages must not have it, for nobody would hear of
    what this one changes."""

    def get_pages(
        self,
        key: FileKey,  # noqa: ARG002
        index: int,  # noqa: ARG002
        count: int,  # noqa: ARG002
        into: memoryview,  # noqa: ARG002
    ) -> int:
        """Always a miss."""
        return 0

    def put_pages(
        self, key: FileKey, index: int, count: int, pages: memoryview, *, active: bool = False
    ) -> None:
        """Drops the pages."""

    def put_extents(self, extents: Sequence[Extent], pages: memoryview) -> None:
        """Drops the pages."""

    def flush_page(self, key: FileKey, index: int) -> None:
        """There is nothing to forget."""

    def flush_inode(self, key: FileKey) -> None:
        """There is nothing to forget."""

    def flush_fs(self) -> None:
        """There is nothing to forget."""

    def settle(self, key: FileKey) -> bool:  # noqa: ARG002
        """Nothing is owed."""
        return True

    def hand_over(self, key: FileKey) -> None:
        """There is nothing to hand over."""

    def distrust(self, key: FileKey) -> None:
        """There is nothing to forget."""
