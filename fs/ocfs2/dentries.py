"""Names that this node may use without asking their directory, and the locks that make that safe.

A name that is looked up again and again, as the upper parts of paths are, would need the lock of
its directory each time; a node that makes files there would have to write back and commit for each
of the others' lookups. So a name that is looked up a second time is kept, under a lock of kind N
that belongs to the directory and the inode. Whoever takes a name away has that lock in EX first,
and thereby out of all caches. New names need nothing: only names that exist are kept.

Invariants:
  I1  a name is kept only while its lock is held here in PR: it is the name of that inode then, and
      the inode has not been removed since;
  I2  the lock is taken for a lookup under the directory's lock, and never waited for there; it is
      waited for in EX only, before any other lock but the one for moves. So the order is: moves,
      names, directories, inodes;
  I3  the fields of an inode found here may be old but for its number and kind, as without its lock
      they always may.

Differs from Linux: there every name that a node knows has such a lock from the first lookup on,
because the kernel's cache of names has no other; we look a name up in its directory once before it
is worth one. The number in the lock's name is in hexadecimal digits, there it is binary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from fs.dlm.modes import Mode
from fs.ocfs2.dinode import Ocfs2Inode
from fs.ocfs2.locking import ClusterLocks, dentry_lock_name

NAMES_MAX: Final = 1024
"""Kept at a node, and remembered as looked up once."""

Key = tuple[int, bytes]
"""The directory's inode number and the name."""


class Dentries:
    """The kept names of one mount."""

    def __init__(self, locks: ClusterLocks) -> None:
        self._locks = locks
        self._kept: OrderedDict[Key, Ocfs2Inode] = OrderedDict()
        self._under: dict[bytes, set[Key]] = {}
        """The kept names by their lock."""
        self._seen: OrderedDict[Key, None] = OrderedDict()
        """Looked up once."""

    def find(self, directory: int, name: bytes) -> Ocfs2Inode | None:
        """The inode of a kept name; None: ask the directory."""
        key = (directory, name)
        inode = self._kept.get(key)
        if inode is not None:
            self._kept.move_to_end(key)
        return inode

    def looked_up(self, directory: int, name: bytes, inode: Ocfs2Inode) -> None:
        """The name was found, and the directory's lock is in use: keep it if it is wanted often."""
        key = (directory, name)
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > NAMES_MAX:
                self._seen.popitem(last=False)
            return
        lock = dentry_lock_name(directory, inode.ino)
        if not self._locks.try_acquire(lock, Mode.PR):
            return  # somebody is taking it away
        self._kept[key] = inode
        self._under.setdefault(lock, set()).add(key)
        self._locks.release(lock, Mode.PR)
        if len(self._kept) > NAMES_MAX:
            self._forget(*self._kept.popitem(last=False))

    @contextmanager
    def alone(self, *names: tuple[int, int]) -> Iterator[None]:
        """No node has names of these inodes in these directories (pairs of directory and inode)
        in its cache inside: they may be taken away. No other lock is in use here."""
        locks = sorted({dentry_lock_name(directory, ino) for directory, ino in names})
        with ExitStack() as stack:
            for lock in locks:
                self._locks.acquire(lock, Mode.EX)
                stack.callback(self._free, lock)
                self.given_up(lock)
            yield

    def _free(self, lock: bytes) -> None:
        self._locks.release(lock, Mode.EX)
        self._drop_unused(lock)

    def given_up(self, lock: bytes) -> None:
        """Another node wants this lock, or this one is about to take the name away."""
        for key in self._under.pop(lock, ()):
            del self._kept[key]

    def _forget(self, key: Key, inode: Ocfs2Inode) -> None:
        lock = dentry_lock_name(key[0], inode.ino)
        keys = self._under.get(lock)
        if keys is not None:
            keys.discard(key)
            if not keys:
                del self._under[lock]
        self._drop_unused(lock)

    def _drop_unused(self, lock: bytes) -> None:
        if lock not in self._under:
            self._locks.drop(lock)

    def __len__(self) -> int:
        """Names that are kept."""
        return len(self._kept)
