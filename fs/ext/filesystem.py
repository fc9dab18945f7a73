"""A mounted ext2 file system: the `FileSystem` interface over the other modules of `fs.ext`.

Invariants:
  I1  there is one `ExtInode` for a number while anyone holds it (a weak map), plus the most
      recently used ones;
  I2  every change of an inode is stored in its table before the method returns, so dropping an
      inode loses nothing;
  I3  a method that fails for want of space (or for a name, a kind, a limit) leaves everything as
      it was;
  I4  an inode without names is in `_orphans` until it is freed, at the latest by `unmount`: a
      cleanly unmounted image has none.

Differs from Linux: no permissions, no quota, no attributes, immutable and append-only flags are
not enforced, an unlinked open file is not recorded on the disk (nor does Linux's ext2: after a
crash e2fsck finds it).
"""

from __future__ import annotations

import errno
import stat
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final
from weakref import WeakValueDictionary

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.buffers import Buffers
from fs.errors import ImageError, error
from fs.ext import xattr
from fs.ext.allocator import Allocator
from fs.ext.directory import NAME_BYTES_MAX, Directories
from fs.ext.group import Groups
from fs.ext.inode import FAST_LINK_BYTES_MAX, FILE_PAGES_MAX, ExtInode, InodeTable
from fs.ext.mapping import BlockMap
from fs.ext.namecache import NameCache
from fs.ext.super import ROOT_INO, Superblock
from fs.filelocks import Alone
from fs.filesystem import Entry, FilePages, FsStat
from fs.inode import Inode

LINKS_MAX: Final = 32000
"""Names of a file, and subdirectories of a directory: Linux's EXT2_LINK_MAX."""
LARGE_FILE_BYTES: Final = 1 << 31
INODES_CACHED: Final = 1024
"""Inodes kept that nobody holds, about 0.6 kB each."""
NAMES_CACHED: Final = 4096
BUFFERS_BLOCKS: Final = 64
"""256 KiB of metadata: the bitmaps, and the inode table and directories of the current work."""


class ExtFileSystem:
    """Mounts `device`.

    `clock_ns` gives the time since 1970; `buffer_blocks` (of 4 KiB) bounds the metadata in memory.
    A device that is read-only, or `read_only`, gives a mount that writes nothing at all. Raises
    `ImageError` (one line that begins with what is wrong; the caller knows the image's name) and
    closes nothing then.
    """

    def __init__(
        self,
        device: BlockDevice,
        *,
        clock_ns: Callable[[], int],
        buffer_blocks: int = BUFFERS_BLOCKS,
        read_only: bool = False,
    ) -> None:
        self.device = device
        self.other_nodes = Alone()
        self.now_ns = clock_ns
        self.file_bytes_max = FILE_PAGES_MAX * BLOCK_BYTES
        self._buffers = Buffers(device, buffer_blocks)
        self._mounted = False
        try:
            self._super = Superblock(self._buffers, device)
            self._groups = Groups(self._buffers, self._super)
            self._allocator = Allocator(self._buffers, self._super, self._groups)
            self._map = BlockMap(self._buffers, self._super, self._groups, self._allocator)
            self._table = InodeTable(self._buffers, self._super, self._groups)
            self._directories = Directories(self._buffers, self._super, self._map)
            self._live: WeakValueDictionary[int, ExtInode] = WeakValueDictionary()
            self._recent: OrderedDict[int, ExtInode] = OrderedDict()
            self._orphans: dict[int, ExtInode] = {}
            self._names = NameCache(NAMES_CACHED)
            self.root = self._root()
        except OSError as reason:
            raise ImageError(
                f"can't be mounted ({reason.strerror}); repair it with e2fsck"
            ) from reason
        self.uuid = self._super.uuid
        self.features = self._super.features
        self._super.read_only = self._super.read_only or read_only
        self._mounted = True
        if not self.read_only:
            self._super.mounted(self._now_s())
            self._flush()

    def _root(self) -> ExtInode:
        root = self._table.load(ROOT_INO)
        if not root.is_dir:
            raise ImageError(
                "has no root directory (inode 2 is something else); repair it with e2fsck"
            )
        self._live[ROOT_INO] = root
        return root

    @property
    def read_only(self) -> bool:
        """True when mounted so, and after damage when the image asks for it.

        `tune2fs -e remount-ro` makes it ask.
        """
        return self._super.read_only

    @property
    def was_clean(self) -> bool:
        """False when the image was not unmounted properly before this mount, or has errors.

        E2fsck should see it.
        """
        return self._super.was_valid

    # One node: there is nobody to come to terms with

    def attach_pages(self, pages: FilePages) -> None:
        """Data and metadata are written when the caller says so."""

    def reading(self, inode: Inode) -> AbstractContextManager[None]:  # noqa: ARG002
        """Always current."""
        return nullcontext()

    def writing(self, inode: Inode) -> AbstractContextManager[None]:  # noqa: ARG002
        """Always alone."""
        return nullcontext()

    def opened(self, inode: Inode) -> None:
        """Nobody else could free it."""

    def closed(self, inode: Inode) -> None:
        """Nobody else waits for it."""

    # Inodes

    def iget(self, ino: int) -> ExtInode:
        """The inode `ino`."""
        inode = self._live.get(ino)
        if inode is None:
            inode = self._table.load(ino)
            self._live[ino] = inode
        self._recent[ino] = inode
        self._recent.move_to_end(ino)
        if len(self._recent) > INODES_CACHED:
            self._recent.popitem(last=False)
        return inode

    def write_inode(self, inode: Inode) -> None:
        """Record the fields of `inode`."""
        own = _own(inode)
        if own.size >= LARGE_FILE_BYTES and own.is_file:
            self._super.need_large_file()
        self._table.store(own)

    def _new_inode(self, parent: ExtInode, mode: int, nlink: int) -> ExtInode:
        ino = self._allocator.allocate_inode(parent.ino, stat.S_ISDIR(mode))
        now = self.now_ns()
        inode = ExtInode(
            ino, self._table.clear(ino), mode, nlink, uid=0, gid=0, size=0, sectors=0,
            atime_ns=now, mtime_ns=now, ctime_ns=now, crtime_ns=now,
        )  # fmt: skip
        self._live[ino] = inode
        return inode

    def free_inode(self, inode: Inode) -> None:
        """Free the blocks and the number of an inode without names."""
        own = _own(inode)
        assert own.nlink == 0, "a file with names is never freed"
        self._orphans.pop(own.ino, None)
        self._recent.pop(own.ino, None)
        self._live.pop(own.ino, None)
        self._check_writable()
        own.dtime_s = max(1, self._now_s())
        try:
            xattr.release(own, self._buffers, self._super, self._groups, self._allocator)
            if own.has_blocks:
                self._map.truncate(own, 0)
            own.size = 0
        finally:
            self._table.store(own)
        self._allocator.free_inode(own.ino, own.is_dir)

    def _forget_link(self, inode: ExtInode) -> None:
        """One name less."""
        inode.nlink = 0 if inode.is_dir else max(0, inode.nlink - 1)
        inode.ctime_ns = self.now_ns()
        if not inode.nlink:
            self._orphans[inode.ino] = inode
        self._table.store(inode)

    # Directories

    def lookup(self, directory: Inode, name: bytes) -> ExtInode:
        """The inode that `name` stands for."""
        found = self._ino_of(_own_dir(directory), name)
        if found is None:
            raise error(errno.ENOENT, repr(name))
        return self.iget(found)

    def _ino_of(self, directory: ExtInode, name: bytes) -> int | None:
        if len(name) > NAME_BYTES_MAX:
            raise error(errno.ENAMETOOLONG, repr(name[:32]))
        if directory.ino == ROOT_INO and name == b"..":
            return ROOT_INO
        ino = self._names.get(directory.key, name)
        if ino is None:
            slot = self._directories.find(directory, name)
            if slot is None:
                return None
            ino = slot.ino
            self._names.put(directory.key, name, ino)
        return ino

    def readdir(self, directory: Inode) -> list[Entry]:
        """All entries but `.` and `..`."""
        own = _own_dir(directory)
        entries = []
        for slot in self._directories.entries(own):
            if slot.name not in (b".", b".."):
                entries.append(Entry(slot.name, slot.ino, slot.kind))
                self._names.put(own.key, slot.name, slot.ino)
        return entries

    def create(self, directory: Inode, name: bytes, mode: int) -> ExtInode:
        """A new empty regular file."""
        parent = self._place(directory, name)
        inode = self._new_inode(parent, stat.S_IFREG | mode & 0o7777, 1)
        return self._enter(parent, name, inode)

    def mkdir(self, directory: Inode, name: bytes, mode: int) -> ExtInode:
        """A new empty directory."""
        parent = self._place(directory, name)
        if parent.nlink >= LINKS_MAX:
            raise error(errno.EMLINK, repr(name))
        inode = self._new_inode(parent, stat.S_IFDIR | mode & 0o7777, 2)
        try:
            self._directories.initialise(inode, parent.ino)
        except OSError:
            self._undo(inode)
            raise
        self._enter(parent, name, inode)
        parent.nlink += 1
        self._table.store(parent)
        return inode

    def symlink(self, directory: Inode, name: bytes, target: bytes) -> ExtInode:
        """A new symbolic link: in the inode when it is short, else in a block of its own."""
        parent = self._place(directory, name)
        if not target:
            raise error(errno.ENOENT, "empty target")
        if len(target) >= BLOCK_BYTES:
            raise error(errno.ENAMETOOLONG, "target")
        inode = self._new_inode(parent, stat.S_IFLNK | 0o777, 1)
        inode.size = len(target)
        try:
            if len(target) <= FAST_LINK_BYTES_MAX:
                padded = target.ljust(FAST_LINK_BYTES_MAX + 1, b"\0")
                inode.pointers = [
                    int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)
                ]
            else:
                buffer = self._buffers.zeroed(self._map.allocate(inode, 0, 1)[0])
                buffer.data[: len(target)] = target
        except OSError:
            self._undo(inode)
            raise
        return self._enter(parent, name, inode)

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        own = _own(inode)
        if not own.is_symlink:
            raise error(errno.EINVAL, f"inode {own.ino} is not a symbolic link")
        if own.is_fast_symlink:
            text = b"".join(word.to_bytes(4, "little") for word in own.pointers)[: own.size]
        else:
            block = self._map.map(own, 0, 1)[0]
            if not block:
                raise self._super.damage(f"symbolic link {own.ino} has no block")
            text = bytes(self._buffers.get(block).data[: own.size])
        if b"\0" in text:
            raise self._super.damage(f"symbolic link {own.ino} has a NUL in its target")
        return text

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """A further name for a file."""
        own = _own(inode)
        if own.is_dir:
            raise error(errno.EPERM, "hard link to a directory")
        if own.nlink >= LINKS_MAX:
            raise error(errno.EMLINK, repr(name))
        parent = self._place(directory, name)
        self._add(parent, name, own)
        own.nlink += 1
        own.ctime_ns = self.now_ns()
        self._table.store(own)

    def unlink(self, directory: Inode, name: bytes) -> ExtInode:
        """Remove a name of a non-directory."""
        self._check_writable()
        parent = _own_dir(directory)
        inode = self.lookup(parent, name)
        if inode.is_dir:
            raise error(errno.EISDIR, repr(name))
        self._remove(parent, name)
        self._forget_link(inode)
        return inode

    def rmdir(self, directory: Inode, name: bytes) -> ExtInode:
        """Remove an empty directory."""
        self._check_writable()
        parent = _own_dir(directory)
        inode = self.lookup(parent, name)
        if not inode.is_dir:
            raise error(errno.ENOTDIR, repr(name))
        self._check_removable(inode)
        self._remove(parent, name)
        parent.nlink = max(parent.nlink - 1, 2)
        self._table.store(parent)
        self._forget_link(inode)
        return inode

    def rename(
        self, old_dir: Inode, old_name: bytes, new_dir: Inode, new_name: bytes
    ) -> ExtInode | None:
        """Move a name.

        The new entry is written before the old one goes, so a lack of space changes nothing.
        """
        self._check_writable()
        source, target = _own_dir(old_dir), _own_dir(new_dir)
        inode = self.lookup(source, old_name)
        if inode.is_dir:
            self._check_not_below(inode, target)
        found = self._ino_of(target, new_name)
        replaced = self.iget(found) if found is not None else None
        if replaced is inode:
            return None
        if replaced is not None and replaced.is_dir and self._is_below(source, replaced):
            raise error(errno.ENOTEMPTY, repr(new_name))
        self._check_replace(inode, replaced, new_name)
        moves_dir = inode.is_dir and source is not target
        if moves_dir and replaced is None and target.nlink >= LINKS_MAX:
            raise error(errno.EMLINK, repr(new_name))
        if replaced is None:
            self._add(target, new_name, inode)
        else:
            self._directories.replace(target, new_name, inode.ino, stat.S_IFMT(inode.mode))
            self._names.put(target.key, new_name, inode.ino)
            self._touch(target)
        self._remove(source, old_name)
        if moves_dir:
            self._directories.replace(inode, b"..", target.ino, stat.S_IFDIR)
            self._names.drop(inode.key, b"..")
            source.nlink = max(source.nlink - 1, 2)
            target.nlink += 1
            self._table.store(source)
        if replaced is not None:
            if replaced.is_dir:
                target.nlink = max(target.nlink - 1, 2)
            self._forget_link(replaced)
        self._table.store(target)
        inode.ctime_ns = self.now_ns()
        self._table.store(inode)
        return replaced

    def _check_replace(self, inode: ExtInode, replaced: ExtInode | None, name: bytes) -> None:
        if replaced is None:
            return
        if inode.is_dir and not replaced.is_dir:
            raise error(errno.ENOTDIR, repr(name))
        if replaced.is_dir and not inode.is_dir:
            raise error(errno.EISDIR, repr(name))
        if replaced.is_dir:
            self._check_removable(replaced)

    def _check_removable(self, directory: ExtInode) -> None:
        if directory.ino == ROOT_INO:
            raise error(errno.EBUSY, "the root directory")
        if not self._directories.is_empty(directory):
            raise error(errno.ENOTEMPTY, f"directory {directory.ino}")

    def _check_not_below(self, moved: ExtInode, target: ExtInode) -> None:
        if self._is_below(target, moved):
            raise error(errno.EINVAL, "a directory can't move below itself")

    def _is_below(self, directory: ExtInode, ancestor: ExtInode) -> bool:
        """True when `directory` is `ancestor` or below it, as the `..` entries tell.

        EUCLEAN when they form a loop.
        """
        seen: set[int] = set()
        current = directory
        while current is not ancestor:
            if current.ino == ROOT_INO:
                return False
            if current.ino in seen:
                raise self._super.damage(f"directory {directory.ino} is below itself")
            seen.add(current.ino)
            current = self.lookup(current, b"..")
        return True

    def _place(self, directory: Inode, name: bytes) -> ExtInode:
        """The directory, checked to be ready for the new entry `name`."""
        parent = _own_dir(directory)
        if self._ino_of(parent, name) is not None:
            raise error(errno.EEXIST, repr(name))
        if parent.nlink == 0:
            raise error(errno.ENOENT, "directory is removed")
        self._check_writable()
        return parent

    def _enter(self, parent: ExtInode, name: bytes, inode: ExtInode) -> ExtInode:
        """Give a new inode its first name; without space the inode is freed again."""
        try:
            self._add(parent, name, inode)
        except OSError:
            self._undo(inode)
            raise
        self._table.store(inode)
        return inode

    def _undo(self, inode: ExtInode) -> None:
        inode.nlink = 0
        self.free_inode(inode)

    def _add(self, parent: ExtInode, name: bytes, inode: ExtInode) -> None:
        self._directories.add(parent, name, inode.ino, stat.S_IFMT(inode.mode))
        self._names.put(parent.key, name, inode.ino)
        self._touch(parent)

    def _remove(self, parent: ExtInode, name: bytes) -> None:
        self._directories.remove(parent, name)
        self._names.drop(parent.key, name)
        self._touch(parent)

    def _touch(self, directory: ExtInode) -> None:
        directory.mtime_ns = directory.ctime_ns = self.now_ns()
        self._table.store(directory)

    # Blocks

    def map_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        """Block numbers of pages, 0 for holes."""
        return self._map.map(_own(inode), index, count)

    def allocate_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        """Block numbers of pages after holes got blocks."""
        own = _own(inode)
        self._check_writable()
        before = own.sectors
        try:
            return self._map.allocate(own, index, count)
        finally:
            if own.sectors != before:
                self._table.store(own)

    def truncate(self, inode: Inode, size: int) -> None:
        """Set the size and free what is beyond."""
        own = _own(inode)
        self._check_writable()
        if size > self.file_bytes_max:
            raise error(errno.EFBIG)
        try:
            if size < own.size:
                self._map.truncate(own, -(-size // BLOCK_BYTES))
            own.size = size
            own.mtime_ns = own.ctime_ns = self.now_ns()
        finally:
            self.write_inode(own)

    # The whole

    def sync(self) -> None:
        """Write all metadata back, superblock last, and flush the device."""
        if not self.read_only or self._super.damaged:
            self._store_and_flush()

    def _store_and_flush(self) -> None:
        if not self.device.read_only:
            self._super.store(self._now_s())
            self._flush()

    def _flush(self) -> None:
        self._buffers.flush()
        self.device.flush()

    def unmount(self) -> None:
        """Free what has no names, write everything, then mark the image clean in a second flush."""
        if not self._mounted:
            return
        self._mounted = False
        try:
            self._free_orphans()
        finally:
            try:
                self._write_and_mark_clean()
            finally:
                self.device.close()

    def _free_orphans(self) -> None:
        if not self.read_only:
            for inode in list(self._orphans.values()):
                self.free_inode(inode)

    def _write_and_mark_clean(self) -> None:
        self.sync()
        if not self.read_only:
            self._super.unmounted(self._now_s())
            self._flush()

    def statfs(self) -> FsStat:
        """Space used and free."""
        return FsStat(
            BLOCK_BYTES,
            self._super.blocks,
            self._super.free_blocks,
            self._super.inodes,
            self._super.free_inodes,
            NAME_BYTES_MAX,
        )

    # Helpers

    def _now_s(self) -> int:
        return (self.now_ns() // 1_000_000_000) & 0xFFFFFFFF

    def _check_writable(self) -> None:
        if self.read_only:
            raise error(errno.EROFS)


def _own(inode: Inode) -> ExtInode:
    assert isinstance(inode, ExtInode), "an inode is used with the file system that it came from"
    return inode


def _own_dir(inode: Inode) -> ExtInode:
    own = _own(inode)
    if not own.is_dir:
        raise error(errno.ENOTDIR, f"inode {own.ino}")
    return own
