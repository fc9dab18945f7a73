"""Orphans: inodes without a name that are not freed yet.

When a file loses its last name it gets an entry in the orphan directory of the slot that took the
name away, and it leaves that directory in the operation that frees it. So whoever takes the slot
over after a crash finds all files that nobody needs any more. The entry's name is the inode's
number in 16 hexadecimal digits.

A subdirectory counts in the `nlink` of the orphan directory, as in any other.
"""

from __future__ import annotations

import stat

from fs.errors import corrupt
from fs.ocfs2.dinode import Dinodes, Ocfs2Inode
from fs.ocfs2.directory import Directories
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.inodelocks import InodeLocks, Rank, Wanted
from fs.ocfs2.space import Space
from fs.ocfs2.transaction import Transactions


class Orphans:
    """The orphan directories of a volume."""

    def __init__(
        self,
        transactions: Transactions,
        dinodes: Dinodes,
        directories: Directories,
        locks: InodeLocks,
        space: Space,
        system: dict[bytes, Ocfs2Inode],
    ) -> None:
        self._transactions = transactions
        self._dinodes = dinodes
        self._directories = directories
        self._locks = locks
        self._space = space
        self._system = system

    def directory(self, slot: int) -> Ocfs2Inode:
        """The orphan directory of a slot."""
        found = self._system.get(b"orphan_dir:%04d" % slot)
        if found is None:
            raise corrupt(f"there is no slot {slot}")
        return found

    def wants(self, slot: int) -> Wanted:
        """The lock to change a slot's orphan directory."""
        return Wanted(Rank.ORPHAN_DIR, slot, self.directory(slot))

    def add(self, inode: Ocfs2Inode) -> None:
        """An inode lost its last name; the caller stores it."""
        slot = self._space.slot
        directory = self.directory(slot)
        self._locks.need(Rank.ORPHAN_DIR, directory, slot)
        self._transactions.touch(directory)
        self._transactions.touch(inode)
        self._directories.add(
            directory,
            _name(inode),
            inode.ino,
            stat.S_IFMT(inode.mode),
            self._space.extend_directory,
        )
        if inode.is_dir:
            directory.nlink += 1
        self._dinodes.store(directory)
        inode.flags |= InodeFlag.ORPHANED
        inode.orphaned_slot = slot

    def remove(self, inode: Ocfs2Inode) -> None:
        """An orphan is being freed."""
        directory = self.directory(inode.orphaned_slot)
        self._locks.need(Rank.ORPHAN_DIR, directory, inode.orphaned_slot)
        self._transactions.touch(directory)
        self._directories.remove(directory, _name(inode))
        if inode.is_dir:
            directory.nlink = max(2, directory.nlink - 1)
        self._dinodes.store(directory)

    def numbers(self, slot: int) -> list[int]:
        """The inodes in a slot's orphan directory, whose lock is in use."""
        return [
            entry.ino
            for entry in self._directories.entries(self.directory(slot))
            if entry.name not in (b".", b"..")
        ]


def _name(inode: Ocfs2Inode) -> bytes:
    return b"%016x" % inode.ino
