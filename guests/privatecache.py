"""A private pool for the pages of a clustered file system: what a node has that does not share.

In a private pool a page would survive another node's change of the file: nobody else can flush it.
So a page's name holds the fencing token of the file's cluster lock too, which goes up with every
exclusive grant, to whichever node.  A page that was put before somebody could change the file is
never asked for again, and goes when its turn comes.  The price: a node that writes loses what it
had put of the file itself.

It is the baseline that a shared pool is measured against, and what a node falls back to that is not
let into the shared one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fs.hooks import Extent, FileKey, PageHooks

_WORD = (1 << 32) - 1
_SPREAD = 0x9E3779B1
"""Odd, so that epochs below 2**32 stay distinct."""


def _renamed(key: FileKey, token: int) -> FileKey:
    """Inode numbers of OCFS2 are blocks, below 2**32: the upper half is free for the counter."""
    epoch, counter = token >> 32, token & _WORD
    return FileKey(key.ino | counter << 32, (key.generation + epoch * _SPREAD) & _WORD)


class TokenNames:
    """A `PageHooks` in front of another.  `token_of` is None or 0 for a lock that is not held."""

    def __init__(self, hooks: PageHooks, token_of: Callable[[FileKey], int | None]) -> None:
        self._hooks = hooks
        self._token_of = token_of

    def get_pages(self, key: FileKey, index: int, count: int, into: memoryview) -> int:
        """As the other's, under the lock's token."""
        token = self._token_of(key)
        return self._hooks.get_pages(_renamed(key, token), index, count, into) if token else 0

    def put_pages(
        self, key: FileKey, index: int, count: int, pages: memoryview, *, active: bool = False
    ) -> None:
        """As the other's, under the lock's token."""
        token = self._token_of(key)
        if token:
            self._hooks.put_pages(_renamed(key, token), index, count, pages, active=active)

    def put_extents(self, extents: Sequence[Extent], pages: memoryview) -> None:
        """As the other's; if a lock is not held, none is put."""
        renamed = []
        for key, start, length, active in extents:
            token = self._token_of(key)
            if not token:
                return
            renamed.append(Extent(_renamed(key, token), start, length, active))
        self._hooks.put_extents(renamed, pages)

    def flush_page(self, key: FileKey, index: int) -> None:
        """As the other's, under the lock's token."""
        token = self._token_of(key)
        if token:
            self._hooks.flush_page(_renamed(key, token), index)

    def flush_inode(self, key: FileKey) -> None:
        """As the other's, under the lock's token."""
        token = self._token_of(key)
        if token:
            self._hooks.flush_inode(_renamed(key, token))

    def flush_fs(self) -> None:
        """As the other's."""
        self._hooks.flush_fs()
