"""The two interfaces around a mounted file system.

`FileSystem` is what it offers, `FilePages` is how the data of files reaches it.

A file system answers "which block holds page n of this file" and keeps names and free space; it
never moves the data of a regular file. That is the work of a `FilePages`: a page cache in a
guest, `fs.directpages.DirectPages` in tests and tools. Directories, symbolic links and all other
metadata stay inside the file system and its buffer cache.

Names are bytes without `/` and NUL. One thread. All methods raise `OSError`: ENOENT, EEXIST,
ENOTDIR, EISDIR, ENOTEMPTY, ENAMETOOLONG, EMLINK, ENOSPC, EFBIG, EROFS as Linux does, EUCLEAN for
damaged metadata, EIO from the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fs.block.device import BlockDevice, Bytes
from fs.filelocks import OtherNodes
from fs.inode import Inode


class Entry(NamedTuple):
    """One directory entry.

    `kind` is one of stat's `S_IF...` values, 0 when the directory doesn't say.
    """

    name: bytes
    ino: int
    kind: int


@dataclass(slots=True, frozen=True)
class FsStat:
    """Space of a file system; counts are in blocks and inodes."""

    block_bytes: int
    blocks: int
    blocks_free: int
    inodes: int
    inodes_free: int
    name_bytes_max: int


class FileSystem(Protocol):
    """One mounted file system."""

    @property
    def root(self) -> Inode:
        """The root directory."""
        ...

    @property
    def uuid(self) -> bytes:
        """The 16 bytes that name this file system."""
        ...

    @property
    def device(self) -> BlockDevice:
        """Where the blocks are.

        File data is read from and written to it directly by a `FilePages`.
        """
        ...

    @property
    def read_only(self) -> bool:
        """True when every change raises EROFS."""
        ...

    @property
    def file_bytes_max(self) -> int:
        """Largest size of a file; beyond it EFBIG."""
        ...

    @property
    def other_nodes(self) -> OtherNodes:
        """What other mounts have to say to locks on files."""
        ...

    def now_ns(self) -> int:
        """The clock of this mount, nanoseconds since 1970."""
        ...

    def attach_pages(self, pages: FilePages) -> None:
        """Where this mount's file data is cached.

        A file system with a journal writes it before it commits, a cluster file system before it
        gives a lock up.
        """
        ...

    def reading(self, inode: Inode) -> AbstractContextManager[None]:
        """Inside, the fields of `inode`, its pages and `map_blocks` are current.

        May be nested, also inside `writing`. ESTALE when another node freed the file.
        """
        ...

    def writing(self, inode: Inode) -> AbstractContextManager[None]:
        """As `reading`, and no other node sees or changes anything of the file inside.

        Must not begin inside `reading`.
        """
        ...

    def opened(self, inode: Inode) -> None:
        """The first handle here: no other node frees the file. ENOENT when one did."""
        ...

    def closed(self, inode: Inode) -> None:
        """The last handle here is closed."""
        ...

    def iget(self, ino: int) -> Inode:
        """The inode `ino`; EUCLEAN when the number is out of range or the inode is not in use."""
        ...

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        """The inode that `name` (also `.` and `..`) stands for; ENOENT."""
        ...

    def readdir(self, directory: Inode) -> list[Entry]:
        """All entries but `.` and `..`, in on-disk order."""
        ...

    def create(self, directory: Inode, name: bytes, mode: int) -> Inode:
        """A new empty regular file (`mode`: permission bits), as if `opened`; EEXIST."""
        ...

    def mkdir(self, directory: Inode, name: bytes, mode: int) -> Inode:
        """A new empty directory."""
        ...

    def symlink(self, directory: Inode, name: bytes, target: bytes) -> Inode:
        """A new symbolic link to `target` (1 to 4095 bytes)."""
        ...

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link; EINVAL for anything else."""
        ...

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """A further name for `inode`; EPERM for a directory, EMLINK."""
        ...

    def unlink(self, directory: Inode, name: bytes) -> Inode:
        """Remove a name of a non-directory and return its inode.

        When its `nlink` is now 0 the caller must call `free_inode` once no handle is open.
        """
        ...

    def rmdir(self, directory: Inode, name: bytes) -> Inode:
        """Remove an empty directory and return its inode, `nlink` 0; then as for `unlink`."""
        ...

    def rename(
        self, old_dir: Inode, old_name: bytes, new_dir: Inode, new_name: bytes
    ) -> Inode | None:
        """Move a name, over an existing one where Linux allows it.

        Returns the inode that lost its name (then as for `unlink`) or None. EINVAL when a
        directory would move below itself.
        """
        ...

    def truncate(self, inode: Inode, size: int) -> None:
        """Set the size of a regular file and free blocks beyond it.

        `FilePages.truncate` comes first. When it grows no blocks are allocated, but where the
        format has no holes.
        """
        ...

    def map_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        """The block numbers of pages `index .. index+count-1`; 0 is a hole (reads as zeros)."""
        ...

    def allocate_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        """As `map_blocks`, but holes get blocks first.

        All or nothing: ENOSPC leaves everything as it was. The content of a block that was a hole
        before is undefined on the disk: the caller writes it whole.
        """
        ...

    def write_inode(self, inode: Inode) -> None:
        """Record the fields of `inode` (in the buffer cache; on the disk after `sync`)."""
        ...

    def free_inode(self, inode: Inode) -> None:
        """The last name and the last handle are gone: free its blocks and its number.

        `FilePages.forget` comes first.
        """
        ...

    def sync(self) -> None:
        """Write all metadata back and flush the device.

        `FilePages.sync_all` comes first: data before metadata.
        """
        ...

    def unmount(self) -> None:
        """`sync`, mark the file system clean, close the device.

        Every inode with no name left must be freed before.
        """
        ...

    def statfs(self) -> FsStat:
        """Space in use and free."""
        ...


class FilePages(Protocol):
    """The way of regular files' data.

    A guest's page cache implements it, and `DirectPages` does without a cache.

    Rule for bytes past the end of a file: they are zero. So a page read from the disk is zeroed
    past `inode.size` (an image may hold anything there), and `truncate` to a size inside a page
    zeroes that page's tail.
    """

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`, fewer only at the end of the file."""
        ...

    def write(self, inode: Inode, offset: int, data: Bytes) -> None:
        """Write all of `data` at `offset`.

        Calls `FileSystem.allocate_blocks` before it makes a page dirty, so that ENOSPC is told
        here and not lost at write-back; all or nothing. Sets `inode.size` when the file grows;
        times and `write_inode` are the caller's.
        """
        ...

    def truncate(self, inode: Inode, new_size: int) -> None:
        """Called before `FileSystem.truncate`, `inode.size` still old.

        Drop pages beyond `new_size` without writing them back, zero the tail of the page that
        `new_size` cuts, flush what the hooks hold of them.
        """
        ...

    def sync(self, inode: Inode) -> None:
        """Write all dirty pages of `inode` to the device (no device flush)."""
        ...

    def sync_all(self) -> None:
        """Write all dirty pages of the file system to the device (no device flush)."""
        ...

    def invalidate(self, inode: Inode) -> None:
        """Another node is going to change the file: write back what is dirty, drop all pages.

        They are offered to the hooks before, whose pages stay: they are what the disk holds.
        """
        ...

    def settle(self, inode: Inode) -> bool:
        """Before the exclusive cluster lock of a file is given up: whether a shared pool holds
        nothing of it that is older than the disk. If not, the lock's value has to tell its next
        holders to `distrust` the file."""
        ...

    def distrust(self, inode: Inode) -> None:
        """Who had the file's cluster lock in EX could not flush all, or died."""
        ...

    def forget(self, inode: Inode) -> None:
        """The file is gone.

        Drop its pages without writing them back and flush the inode in the hooks.
        """
        ...
