"""Checksums of pages that a file system keeps, and a page cache compares what it is given with.

Whoever shares a pool of clean pages with others can be given wrong ones. A checksum that comes with
the inode, from the disk and under its cluster lock, tells.

Duties of whoever moves the data (`FilePages`), of regular files only:
  - `changing` before a byte in the file changes, in the cache or on the disk, and before
    `allocate_blocks`, with the file's lock in EX;
  - `written` after pages were written to the disk, before their lock is given up;
  - `was_read` for pages that came from the disk;
  - all bytes behind the end of the file are zero in the pages that are told.
"""

from __future__ import annotations

from typing import Protocol

from fs.inode import Inode


class PageChecksums(Protocol):
    """Of one mount."""

    def changing(self, inode: Inode, start: int, end: int) -> None:
        """Bytes `start .. end-1` are about to change. May commit; raises OSError."""
        ...

    def written(self, inode: Inode, index: int, pages: memoryview) -> None:
        """The disk holds these pages from `index` on."""
        ...

    def was_read(self, inode: Inode, index: int, page: memoryview) -> None:
        """The disk holds this page, as was just seen."""
        ...

    def save(self, inode: Inode) -> None:
        """What is known of a file goes to the disk with the next commit; its lock is held in EX."""
        ...

    def known(self, inode: Inode, index: int, count: int) -> int:
        """Bit i: there is a checksum of page `index+i`."""
        ...

    def matches(self, inode: Inode, index: int, page: memoryview) -> bool:
        """Whether a page has the checksum that is known."""
        ...
