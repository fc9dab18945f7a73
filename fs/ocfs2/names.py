"""Names: looking them up, giving and taking them. Moving them is in `rename`.

A change looks its names up before it takes the locks, because which inode to lock depends on
them, and once more inside the operation: another node may have been faster. Then it starts again.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from typing import Final, TypeVar

from fs.block.device import BLOCK_BYTES
from fs.dlm.modes import Mode
from fs.errors import corrupt, error
from fs.filesystem import Entry
from fs.inode import Inode
from fs.ocfs2.dentries import Dentries
from fs.ocfs2.dinode import Ocfs2Inode, own
from fs.ocfs2.format import FAST_SYMLINK_BYTES_MAX, LINKS_MAX, NAME_BYTES_MAX
from fs.ocfs2.inodelocks import Rank, Wanted
from fs.ocfs2.volume import Volume

TRIES_MAX: Final = 100
"""How often another node may be faster."""
CHILD_PLACE: Final = 1 << 48
"""Directories below a locked one are locked after it, among themselves by number."""

Result = TypeVar("Result")


class Changed(Exception):
    """A name means something else than before the locks were taken."""


class Names:
    """The entries of directories, as `FileSystem` has them."""

    def __init__(self, volume: Volume, hold_open: Callable[[Ocfs2Inode], None]) -> None:
        """`hold_open`: what makes a new file an open one."""
        self._volume = volume
        self._hold_open = hold_open
        self.dentries = Dentries(volume.locks.locks)

    # Looking up

    def iget(self, ino: int) -> Ocfs2Inode:
        """The inode `ino`."""
        volume = self._volume
        if not 0 < ino < volume.super.blocks:
            raise corrupt(f"inode number {ino} of {volume.super.blocks}")
        volume.locks.reap()
        inode = volume.locks.inode(ino)
        try:
            with volume.locked(inode, Mode.PR):
                return inode
        except OSError as reason:
            if reason.errno != errno.ESTALE:
                raise
        inode = volume.locks.inode(ino)  # the number is another file's by now, or nobody's
        with volume.locked(inode, Mode.PR):
            return inode

    def lookup(self, directory: Inode, name: bytes) -> Ocfs2Inode:
        """The inode that `name` stands for."""
        found = self.find(directory, name)
        if found is None:
            raise error(errno.ENOENT, repr(name))
        return found

    def find(self, directory: Inode, name: bytes) -> Ocfs2Inode | None:
        """The inode that `name` stands for, or None."""
        parent = self.directory(directory)
        if len(name) > NAME_BYTES_MAX:
            raise error(errno.ENAMETOOLONG, repr(name[:32]))
        kept = self.dentries.find(parent.ino, name)
        if kept is not None:
            return kept
        with self._volume.locked(parent, Mode.PR):
            ino = self._volume.directories.ino_of(parent, name)
            if ino is None:
                return None
            if name not in (b".", b".."):
                # Under the directory's lock the entry and the inode belong together.
                inode = self.iget(ino)
                self.dentries.looked_up(parent.ino, name, inode)
                return inode
        return self.iget(ino)

    def readdir(self, directory: Inode) -> list[Entry]:
        """All entries but `.` and `..`."""
        parent = self.directory(directory)
        with self._volume.locked(parent, Mode.PR):
            return [
                Entry(slot.name, slot.ino, slot.kind)
                for slot in self._volume.directories.entries(parent)
                if slot.name not in (b".", b"..")
            ]

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        link = own(inode)
        volume = self._volume
        with volume.locked(link, Mode.PR):
            if not link.is_symlink:
                raise error(errno.EINVAL, f"inode {link.ino} is not a symbolic link")
            if link.is_fast_symlink:
                text = volume.dinodes.symlink_text(link)
            else:
                block = volume.extents.map(link, 0, 1)[0]
                text = bytes(volume.transactions.get(block, link.ino).data[: link.size])
        if b"\0" in text:
            raise corrupt(f"symbolic link {link.ino} has a NUL in its target")
        return text

    def directory(self, inode: Inode) -> Ocfs2Inode:
        """A directory of this file system; ENOTDIR."""
        found = own(inode)
        if not found.is_dir:
            raise error(errno.ENOTDIR, f"inode {found.ino}")
        return found

    # Giving names

    def create(self, directory: Inode, name: bytes, mode: int) -> Ocfs2Inode:
        """A new empty regular file, open: another node may remove it at once, but not free it."""
        return self._make(
            directory, name, stat.S_IFREG | mode & 0o7777, lambda *_: None, then=self._hold_open
        )

    def mkdir(self, directory: Inode, name: bytes, mode: int) -> Ocfs2Inode:
        """A new empty directory."""

        def fill(parent: Ocfs2Inode, inode: Ocfs2Inode) -> None:
            if parent.nlink >= LINKS_MAX:
                raise error(errno.EMLINK, repr(name))
            block = self._volume.space.extend_directory(inode)
            self._volume.directories.initialise(inode, parent.ino, block)
            inode.nlink = 2
            parent.nlink += 1

        return self._make(directory, name, stat.S_IFDIR | mode & 0o7777, fill)

    def symlink(self, directory: Inode, name: bytes, target: bytes) -> Ocfs2Inode:
        """A new symbolic link: in the inode's block when it is short, else in one of its own."""
        volume = self._volume
        if not target:
            raise error(errno.ENOENT, "empty target")
        if len(target) >= BLOCK_BYTES:
            raise error(errno.ENAMETOOLONG, "target")

        def fill(_parent: Ocfs2Inode, inode: Ocfs2Inode) -> None:
            if len(target) <= FAST_SYMLINK_BYTES_MAX:
                volume.dinodes.set_symlink_text(inode, target)
            else:
                block = volume.space.extend_directory(inode)
                volume.transactions.create(block, inode.ino).data[: len(target)] = target
            inode.size = len(target)

        return self._make(
            directory, name, stat.S_IFLNK | 0o777, fill,
            extents=len(target) > FAST_SYMLINK_BYTES_MAX,
        )  # fmt: skip

    def _make(
        self,
        directory: Inode,
        name: bytes,
        mode: int,
        fill: Callable[[Ocfs2Inode, Ocfs2Inode], None],
        *,
        extents: bool = True,
        then: Callable[[Ocfs2Inode], None] = lambda _inode: None,
    ) -> Ocfs2Inode:
        parent = self.directory(directory)
        volume = self._volume
        _check_name(name)

        def body() -> Ocfs2Inode:
            self._check_free(parent, name)
            volume.touch(parent)
            now = volume.now_ns()
            inode = volume.dinodes.make(
                *volume.space.allocate_inode(), mode, 1, now, extents=extents
            )
            fill(parent, inode)
            volume.dinodes.store(inode)
            self._add(parent, name, inode)
            volume.locks.made(inode, lambda: then(inode))
            return inode

        wants = [_wants(parent), volume.space.wants_inode]
        if stat.S_ISDIR(mode):
            wants.append(volume.space.wants_clusters)
        return volume.run(wants, body)

    def _check_free(self, parent: Ocfs2Inode, name: bytes) -> None:
        if parent.nlink == 0:
            raise error(errno.ENOENT, "directory is removed")
        if self._volume.directories.ino_of(parent, name) is not None:
            raise error(errno.EEXIST, repr(name))

    def _add(self, parent: Ocfs2Inode, name: bytes, inode: Ocfs2Inode) -> None:
        self._volume.directories.add(
            parent, name, inode.ino, stat.S_IFMT(inode.mode), self._volume.space.extend_directory
        )
        self._volume.stamp(parent)

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """A further name for a file."""
        file = own(inode)
        parent = self.directory(directory)
        volume = self._volume
        if file.is_dir:
            raise error(errno.EPERM, "hard link to a directory")
        _check_name(name)

        def body() -> None:
            self._check_free(parent, name)
            if file.nlink == 0:
                raise error(errno.ENOENT, "the file is removed")
            if file.nlink >= LINKS_MAX:
                raise error(errno.EMLINK, repr(name))
            volume.touch(parent, file)
            self._add(parent, name, file)
            file.nlink += 1
            file.ctime_ns = volume.now_ns()
            volume.dinodes.store(file)

        volume.run([_wants(parent), wants_child(file)], body)

    # Taking names

    def unlink(self, directory: Inode, name: bytes) -> Ocfs2Inode:
        """Remove a name of a non-directory."""
        self._volume.check_writable()
        parent = self.directory(directory)

        def attempt() -> Ocfs2Inode:
            inode = self.lookup(parent, name)
            if inode.is_dir:
                raise error(errno.EISDIR, repr(name))
            return self._remove(parent, name, inode)

        return again(attempt)

    def rmdir(self, directory: Inode, name: bytes) -> Ocfs2Inode:
        """Remove an empty directory."""
        self._volume.check_writable()
        parent = self.directory(directory)

        def attempt() -> Ocfs2Inode:
            inode = self.lookup(parent, name)
            if not inode.is_dir:
                raise error(errno.ENOTDIR, repr(name))
            if name in (b".", b".."):
                raise error(errno.EINVAL if name == b"." else errno.ENOTEMPTY, repr(name))
            return self._remove(parent, name, inode)

        return again(attempt)

    def _remove(self, parent: Ocfs2Inode, name: bytes, inode: Ocfs2Inode) -> Ocfs2Inode:
        volume = self._volume

        def body() -> Ocfs2Inode:
            self.check_same(parent, name, inode)
            if inode.is_dir:
                self.check_removable(inode)
            volume.touch(parent)
            volume.directories.remove(parent, name)
            if inode.is_dir:
                parent.nlink = max(parent.nlink - 1, 2)
            volume.stamp(parent)
            self.forget_link(inode)
            return inode

        wants = [_wants(parent), wants_child(inode)]
        if inode.is_dir or inode.nlink == 1:
            wants.append(volume.orphans.wants(volume.space.slot))
        with self.dentries.alone((parent.ino, inode.ino)):
            return volume.run(wants, body)

    def check_same(self, parent: Ocfs2Inode, name: bytes, inode: Ocfs2Inode | None) -> None:
        """Inside an operation: the name still means this inode."""
        found = self._volume.directories.ino_of(parent, name)
        if found != (None if inode is None else inode.ino):
            raise Changed

    def check_removable(self, directory: Ocfs2Inode) -> None:
        """A directory may go: it is empty, and not one that the volume needs."""
        if directory.is_system:
            raise error(errno.EBUSY, f"directory {directory.ino}")
        if not self._volume.directories.is_empty(directory):
            raise error(errno.ENOTEMPTY, f"directory {directory.ino}")

    def forget_link(self, inode: Ocfs2Inode) -> None:
        """One name less; without any the inode is an orphan."""
        volume = self._volume
        if inode.is_system:
            raise error(errno.EBUSY, f"inode {inode.ino}")
        volume.touch(inode)
        inode.nlink = 0 if inode.is_dir else max(0, inode.nlink - 1)
        inode.ctime_ns = volume.now_ns()
        if not inode.nlink:
            volume.orphans.add(inode)
        volume.dinodes.store(inode)


def _wants(directory: Ocfs2Inode, place: int = 0) -> Wanted:
    return Wanted(Rank.DIRECTORY, place, directory)


def wants_child(inode: Ocfs2Inode) -> Wanted:
    """The lock of an inode whose directory is locked before."""
    if inode.is_dir:
        return Wanted(Rank.DIRECTORY, CHILD_PLACE + inode.ino, inode)
    return Wanted(Rank.INODE, inode.ino, inode)


def again(attempt: Callable[[], Result]) -> Result:
    """Do something that depends on names, anew each time that another node changed them."""
    for _ in range(TRIES_MAX):
        try:
            return attempt()
        except Changed:
            continue
    raise error(errno.EBUSY, "the name changes all the time")


def _check_name(name: bytes) -> None:
    if len(name) > NAME_BYTES_MAX:
        raise error(errno.ENAMETOOLONG, repr(name[:32]))
    if not name or b"/" in name or b"\0" in name:
        raise error(errno.EINVAL, repr(name))
