"""Moving a name, over another one where Linux allows it.

A move from one directory to another holds the rename lock of the whole volume, as Linux does for
directories only: while it is held no `..` changes, so who is below whom is certain, and the locks
of the two directories can be taken from the top down. We take it for files as well: two such
moves can't wait for each other then, whatever directories they name.
"""

from __future__ import annotations

import errno
import stat

from fs.dlm.modes import Mode
from fs.errors import corrupt, error
from fs.inode import Inode
from fs.ocfs2.dinode import Ocfs2Inode
from fs.ocfs2.format import LINKS_MAX, NAME_BYTES_MAX, SUPER_BLOCK
from fs.ocfs2.inodelocks import Rank, Wanted
from fs.ocfs2.locking import RENAME, lock_name
from fs.ocfs2.names import Names, again, wants_child
from fs.ocfs2.volume import Volume

_RENAME_LOCK = lock_name(RENAME, SUPER_BLOCK)


class Renames:
    """`rename` of a volume."""

    def __init__(self, volume: Volume, names: Names) -> None:
        self._volume = volume
        self._names = names

    def rename(
        self, old_dir: Inode, old_name: bytes, new_dir: Inode, new_name: bytes
    ) -> Ocfs2Inode | None:
        """Move a name; returns the inode that lost its name by it."""
        volume = self._volume
        volume.check_writable()
        source, target = self._names.directory(old_dir), self._names.directory(new_dir)
        if len(new_name) > NAME_BYTES_MAX:
            raise error(errno.ENAMETOOLONG, repr(new_name[:32]))
        dots = (b".", b"..")
        if old_name in dots or new_name in dots:
            raise error(errno.EBUSY, repr(old_name))
        if source is target:
            return again(lambda: self._attempt(source, old_name, target, new_name))
        locks = volume.locks.locks
        locks.acquire(_RENAME_LOCK, Mode.EX)
        try:
            return again(lambda: self._attempt(source, old_name, target, new_name))
        finally:
            locks.release(_RENAME_LOCK, Mode.EX)

    def _attempt(
        self, source: Ocfs2Inode, old_name: bytes, target: Ocfs2Inode, new_name: bytes
    ) -> Ocfs2Inode | None:
        inode = self._names.lookup(source, old_name)
        replaced = self._names.find(target, new_name)
        if source is not target and inode.is_dir and self._is_below(target, inode):
            raise error(errno.EINVAL, "a directory can't move below itself")
        if replaced is not None and replaced is not inode and replaced.is_dir:
            if replaced is source or (source is not target and self._is_below(source, replaced)):
                raise error(errno.ENOTEMPTY, repr(new_name))
        wants = [
            Wanted(Rank.DIRECTORY, place, directory)
            for place, directory in enumerate(self._ordered(source, target))
        ]
        wants.append(wants_child(inode))
        taken = [(source.ino, inode.ino)]
        if replaced is not None and replaced is not inode:
            taken.append((target.ino, replaced.ino))
            wants.append(wants_child(replaced))
            if replaced.is_dir or replaced.nlink == 1:
                wants.append(self._volume.orphans.wants(self._volume.space.slot))
        with self._names.dentries.alone(*taken):
            return self._volume.run(
                wants, lambda: self._move(source, old_name, target, new_name, inode, replaced)
            )

    def _ordered(self, one: Ocfs2Inode, other: Ocfs2Inode) -> list[Ocfs2Inode]:
        """Two directories, the upper one first; else by number."""
        if one is other:
            return [one]
        if self._is_below(one, other):
            return [other, one]
        if self._is_below(other, one) or one.ino < other.ino:
            return [one, other]
        return [other, one]

    def _move(
        self,
        source: Ocfs2Inode,
        old_name: bytes,
        target: Ocfs2Inode,
        new_name: bytes,
        inode: Ocfs2Inode,
        replaced: Ocfs2Inode | None,
    ) -> Ocfs2Inode | None:
        volume, names = self._volume, self._names
        names.check_same(source, old_name, inode)
        names.check_same(target, new_name, replaced)
        if replaced is inode:
            # Two names of one file: both stay. Under the locks, or it could be the same name that
            # another node has just moved there.
            return None
        if target.nlink == 0:
            raise error(errno.ENOENT, "directory is removed")
        if inode.is_system:
            raise error(errno.EBUSY, repr(old_name))
        self._check_replace(inode, replaced, new_name)
        moves_dir = inode.is_dir and source is not target
        if moves_dir and replaced is None and target.nlink >= LINKS_MAX:
            raise error(errno.EMLINK, repr(new_name))
        volume.touch(source, target, inode)
        kind = stat.S_IFMT(inode.mode)
        if replaced is None:
            volume.directories.add(target, new_name, inode.ino, kind, volume.space.extend_directory)
        else:
            volume.directories.replace(target, new_name, inode.ino, kind)
        volume.directories.remove(source, old_name)
        if moves_dir:
            volume.directories.replace(inode, b"..", target.ino, stat.S_IFDIR)
            source.nlink = max(source.nlink - 1, 2)
            target.nlink += 1
        if replaced is not None:
            if replaced.is_dir:
                target.nlink = max(target.nlink - 1, 2)
            names.forget_link(replaced)
        volume.stamp(source)
        volume.stamp(target)
        inode.ctime_ns = volume.now_ns()
        volume.dinodes.store(inode)
        return replaced

    def _check_replace(self, inode: Ocfs2Inode, replaced: Ocfs2Inode | None, name: bytes) -> None:
        if replaced is None:
            return
        if inode.is_dir and not replaced.is_dir:
            raise error(errno.ENOTDIR, repr(name))
        if replaced.is_dir and not inode.is_dir:
            raise error(errno.EISDIR, repr(name))
        if replaced.is_dir:
            self._names.check_removable(replaced)

    def _is_below(self, directory: Ocfs2Inode, ancestor: Ocfs2Inode) -> bool:
        """True when `directory` is `ancestor` or below it, as the `..` entries tell."""
        seen: set[int] = set()
        current = directory
        while current is not ancestor:
            if current.ino == self._volume.super.root_block:
                return False
            if current.ino in seen:
                raise corrupt(f"directory {directory.ino} is below itself")
            seen.add(current.ino)
            current = self._names.lookup(current, b"..")
            if not current.is_dir:
                raise corrupt(f"directory {directory.ino} has a parent that is none")
        return True
