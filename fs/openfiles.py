"""Open files by their numbers: reading, writing, cutting, locking, closing.

Invariants:
  I1  a file's data goes through `FilePages` only;
  I2  an inode without names lives while a handle is open on it, and is freed by the last close
      (or unmount): its pages are forgotten first, then its blocks and number are given back.

What has a path is in `vfs`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from fs.block.device import Bytes
from fs.errors import error
from fs.filelocks import FileLocks, RangeLock, handle_owner, span
from fs.filesystem import FilePages, FileSystem
from fs.inode import Inode, Stat

WRITE_CHUNK_BYTES: Final = 64 * 4096
"""A write goes in pieces of this size, so that ENOSPC in the middle gives a short write."""

HANDLES_MAX: Final = 1024
"""Open handles of one mount; the next open is EMFILE."""


@dataclass(slots=True)
class Handle:
    """An open file and its position."""

    inode: Inode
    flags: int
    offset: int = 0

    @property
    def readable(self) -> bool:
        """Opened for reading."""
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        """Opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class OpenFiles:
    """The handles of one mount."""

    def __init__(self, fs: FileSystem, pages: FilePages) -> None:
        self.fs = fs
        self.pages = pages
        self._handles: dict[int, Handle] = {}
        self._opens: dict[Inode, int] = {}
        self.file_locks = FileLocks(fs.other_nodes)

    def _add(self, inode: Inode, flags: int) -> int:
        """A new handle; the file is open."""
        self._opens[inode] = self._opens.get(inode, 0) + 1
        number = next(n for n in range(3, HANDLES_MAX + 4) if n not in self._handles)
        self._handles[number] = Handle(inode, flags)
        return number

    def close(self, number: int) -> None:
        """Give a handle back."""
        handle = self._handle(number)
        del self._handles[number]
        self._opens[handle.inode] -= 1
        last = not self._opens[handle.inode]
        try:
            self.file_locks.close(handle.inode, number, last=last)
        finally:
            if last:
                self._close_last(handle.inode)

    def _close_last(self, inode: Inode) -> None:
        del self._opens[inode]
        # In this order: a node that takes the last name before the close is known everywhere leaves
        # the freeing to this one, which would not hear of it any more if it had looked before.
        self.fs.closed(inode)
        try:
            with self.fs.reading(inode):
                pass
        except OSError as reason:
            if reason.errno != errno.ESTALE:
                raise
            return  # another node has taken the last name and freed it
        self._free_if_gone(inode)

    def read(self, number: int, size: int) -> bytes:
        """At most `size` bytes from the handle's position, which moves on; empty at the end."""
        data = self.pread(number, size, self._handle(number).offset)
        self._handle(number).offset += len(data)
        return data

    def pread(self, number: int, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset`."""
        handle = self._handle(number)
        if not handle.readable:
            raise error(errno.EBADF, "not open for reading")
        if handle.inode.is_dir:
            raise error(errno.EISDIR)
        if size < 0 or offset < 0:
            raise error(errno.EINVAL)
        with self.fs.reading(handle.inode):
            return self.pages.read(handle.inode, offset, size)

    def write(self, number: int, data: Bytes) -> int:
        """Write at the handle's position (at the end with O_APPEND).

        Returns the bytes written, fewer than asked only when space ran out.
        """
        handle = self._handle(number)
        with self._writing(handle):
            offset = handle.inode.size if handle.flags & os.O_APPEND else handle.offset
            done = self._write_at(handle, data, offset)
        if done:
            handle.offset = offset + done
        return done

    def pwrite(self, number: int, data: Bytes, offset: int) -> int:
        """Write at `offset`; with O_APPEND at the end all the same, as Linux does."""
        handle = self._handle(number)
        if offset < 0:
            raise error(errno.EINVAL)
        with self._writing(handle):
            return self._write_at(
                handle, data, handle.inode.size if handle.flags & os.O_APPEND else offset
            )

    def _writing(self, handle: Handle) -> AbstractContextManager[None]:
        if not handle.writable:
            raise error(errno.EBADF, "not open for writing")
        return self.fs.writing(handle.inode)

    def _write_at(self, handle: Handle, data: Bytes, offset: int) -> int:
        view = memoryview(data).cast("B")
        if not view.nbytes:
            return 0
        self._check_writable()
        if offset >= self.fs.file_bytes_max:
            raise error(errno.EFBIG)
        view = view[: self.fs.file_bytes_max - offset]
        inode = handle.inode
        done = 0
        try:
            while done < view.nbytes:
                # Pieces end at multiples of the chunk size: only the first and last are partial.
                size = WRITE_CHUNK_BYTES - (offset + done) % WRITE_CHUNK_BYTES
                piece = view[done : done + size]
                self.pages.write(inode, offset + done, piece)
                done += piece.nbytes
        except OSError as reason:
            if not done or reason.errno != errno.ENOSPC:
                raise
        finally:
            if done:
                inode.mtime_ns = inode.ctime_ns = self.fs.now_ns()
                self.fs.write_inode(inode)
        return done

    def seek(self, number: int, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the handle's position and return it."""
        handle = self._handle(number)
        if whence == os.SEEK_END:
            base: int | None = self._stat(handle.inode).st_size
        else:
            base = {os.SEEK_SET: 0, os.SEEK_CUR: handle.offset}.get(whence)
        if base is None or base + offset < 0:
            raise error(errno.EINVAL)
        handle.offset = base + offset
        return handle.offset

    def fsync(self, number: int) -> None:
        """The file's data, then all metadata, then the device.

        As strong as `sync` for this file.
        """
        handle = self._handle(number)
        with self.fs.reading(handle.inode):
            if handle.inode.is_file:
                self.pages.sync(handle.inode)
        self.fs.sync()

    def fstat(self, number: int) -> Stat:
        """What `stat` says of an open file."""
        return self._stat(self._handle(number).inode)

    def _stat(self, inode: Inode) -> Stat:
        with self.fs.reading(inode):
            return Stat.of(inode)

    def inode_of(self, number: int) -> Inode:
        """The inode behind a handle."""
        return self._handle(number).inode

    def ftruncate(self, number: int, size: int) -> None:
        """Set the size of an open file."""
        handle = self._handle(number)
        if size < 0 or not handle.writable:
            raise error(errno.EINVAL)
        self._truncate(handle.inode, size)

    def _truncate(self, inode: Inode, size: int) -> None:
        self._check_writable()
        if size > self.fs.file_bytes_max:
            raise error(errno.EFBIG)
        with self.fs.writing(inode):
            self.pages.truncate(inode, size)
            self.fs.truncate(inode, size)

    # Locks (`fs.filelocks`): nothing waits, EAGAIN says that somebody else has one

    def flock(self, number: int, operation: int) -> None:
        """Lock the whole file for this handle: LOCK_SH, LOCK_EX or LOCK_UN, as if with LOCK_NB."""
        inode = self._handle(number).inode
        wanted = operation & ~fcntl.LOCK_NB
        if wanted == fcntl.LOCK_UN:
            self.file_locks.unlock_whole(inode, number)
        elif wanted in (fcntl.LOCK_SH, fcntl.LOCK_EX):
            self.file_locks.lock_whole(inode, number, exclusive=wanted == fcntl.LOCK_EX)
        else:
            raise error(errno.EINVAL, f"operation {operation}")

    def lock_range(
        self, number: int, kind: int, start: int, length: int, owner: int | None = None
    ) -> None:
        """F_RDLCK, F_WRLCK or F_UNLCK of `length` bytes from `start`, 0: all from there.

        `owner` is a process (0 or more; the caller has to `unlock_owner` when it ends or closes
        the file), None the handle itself.
        """
        handle = self._handle(number)
        start, end = span(start, length)
        who = handle_owner(number) if owner is None else owner
        if kind == fcntl.F_UNLCK:
            self.file_locks.unlock_range(handle.inode, start, end, who)
            return
        exclusive = _is_exclusive(kind)
        if not (handle.writable if exclusive else handle.readable):
            raise error(errno.EBADF, "the handle was not opened for what it locks")
        self.file_locks.lock_range(handle.inode, start, end, who, exclusive=exclusive)

    def range_in_the_way(
        self, number: int, kind: int, start: int, length: int, owner: int | None = None
    ) -> RangeLock | None:
        """What would keep `lock_range` from its work now (F_GETLK), of whatever node."""
        inode = self._handle(number).inode
        start, end = span(start, length)
        who = handle_owner(number) if owner is None else owner
        exclusive = _is_exclusive(kind)
        return self.file_locks.range_in_the_way(inode, start, end, who, exclusive=exclusive)

    def unlock_owner(self, number: int, owner: int) -> None:
        """A process has closed the file, or ended: its ranges are free, by whichever handle."""
        self.file_locks.release(self._handle(number).inode, owner)

    # Helpers

    def _handle(self, number: int) -> Handle:
        handle = self._handles.get(number)
        if handle is None:
            raise error(errno.EBADF, f"handle {number}")
        return handle

    def _check_writable(self) -> None:
        if self.fs.read_only:
            raise error(errno.EROFS)

    def _free_if_gone(self, inode: Inode) -> None:
        if inode.nlink or inode in self._opens:
            return
        if inode.is_file:
            self.pages.forget(inode)
        self.fs.free_inode(inode)


def _is_exclusive(kind: int) -> bool:
    if kind not in (fcntl.F_RDLCK, fcntl.F_WRLCK):
        raise error(errno.EINVAL, f"kind of lock {kind}")
    return kind == fcntl.F_WRLCK
