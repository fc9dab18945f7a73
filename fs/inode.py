"""The inode in memory: what every file system tells about a file, and what `stat` shows of it.

There is at most one `Inode` object for an inode number while anyone holds it (the file system
keeps a weak map), so a page cache and open handles may use the object itself as the file's
identity.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

from fs.hooks import FileKey

SECTOR_BYTES = 512


@dataclass(slots=True, eq=False, weakref_slot=True)
class Inode:
    """A file.

    After changing a field, call `FileSystem.write_inode`. Times are nanoseconds since 1970.
    """

    ino: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    sectors: int
    """Allocated space in units of 512 bytes, metadata of the mapping included."""
    atime_ns: int
    mtime_ns: int
    ctime_ns: int

    @property
    def key(self) -> FileKey:
        """The name of this file's pages in `PageHooks`."""
        return FileKey(self.ino, self.generation)

    @property
    def is_dir(self) -> bool:
        """True for a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """True for a regular file: the only kind whose data goes through a page cache."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """True for a symbolic link."""
        return stat.S_ISLNK(self.mode)


@dataclass(slots=True, frozen=True)
class Stat:
    """A snapshot of an inode; field names are those of `os.stat_result`."""

    st_ino: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int
    generation: int

    @staticmethod
    def of(inode: Inode) -> Stat:
        """The snapshot of `inode` now."""
        return Stat(
            inode.ino,
            inode.mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.size,
            inode.sectors,
            inode.atime_ns,
            inode.mtime_ns,
            inode.ctime_ns,
            inode.generation,
        )
