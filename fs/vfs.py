"""The virtual file system: what a program in a guest calls.

Paths, open handles and errno are as on Linux.

Differs from Linux on purpose: one user who may do everything (no permission checks), no access
times (as `noatime`), no working directory (relative paths start at the root), no devices, pipes
or sockets (opening one is ENXIO).

Invariants:
  I1  a file's data goes through `FilePages` only;
  I2  an inode without names lives while a handle is open on it, and is freed by the last close
      (or unmount): its pages are forgotten first, then its blocks and number are given back.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

from fs import pathwalk
from fs.block.device import Bytes
from fs.errors import corrupt, error
from fs.filelocks import FileLocks, RangeLock, handle_owner, span
from fs.filesystem import FilePages, FileSystem, FsStat
from fs.inode import Inode, Stat
from fs.pathwalk import Last, Path

WRITE_CHUNK_BYTES: Final = 64 * 4096
"""A write goes in pieces of this size, so that ENOSPC in the middle gives a short write."""

WALKS_MAX: Final = 16
"""How often another node may remove what a path means while it is walked."""

HANDLES_MAX: Final = 1024
"""Open handles of one mount; the next open is EMFILE."""


Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def _walks(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The path is walked anew when another node removed a file on it meanwhile, as Linux does."""

    @functools.wraps(method)
    def walk(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        for _ in range(WALKS_MAX):
            try:
                return method(*arguments, **options)
            except OSError as reason:
                if reason.errno != errno.ESTALE:
                    raise
        raise error(errno.ENOENT, "what the path means is removed all the time")

    return walk


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


class Vfs:
    """One mounted file system as a program sees it."""

    def __init__(self, fs: FileSystem, pages: FilePages) -> None:
        self.fs = fs
        self.pages = pages
        self._handles: dict[int, Handle] = {}
        self._opens: dict[Inode, int] = {}
        self.file_locks = FileLocks(fs.other_nodes)
        fs.attach_pages(pages)

    # Files

    @_walks
    def open(self, path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
        """Open a file (or, for reading, a directory) and return a handle number.

        Knows O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_APPEND, O_DIRECTORY and
        O_NOFOLLOW.
        """
        if len(self._handles) >= HANDLES_MAX:
            raise error(errno.EMFILE, repr(path))
        created = False
        if flags & os.O_CREAT:
            inode, created = self._open_or_create(path, flags, mode)
        else:
            inode = pathwalk.resolve(self.fs, path, follow=not flags & os.O_NOFOLLOW)
        handle = Handle(inode, flags)
        _check_openable(handle, path)
        if not created and (handle.writable or flags & os.O_TRUNC) and self.fs.read_only:
            raise error(errno.EROFS, repr(path))
        if inode not in self._opens and not created:
            try:
                self.fs.opened(inode)
            except FileNotFoundError as reason:
                raise error(errno.ESTALE, repr(path)) from reason
        self._opens[inode] = self._opens.get(inode, 0) + 1
        number = next(n for n in range(3, HANDLES_MAX + 4) if n not in self._handles)
        self._handles[number] = handle
        if flags & os.O_TRUNC and inode.is_file and not created:
            try:
                self._truncate(inode, 0)
            except BaseException:
                self.close(number)
                raise
        return number

    def _open_or_create(self, path: Path, flags: int, mode: int) -> tuple[Inode, bool]:
        if flags & os.O_DIRECTORY:
            raise error(errno.EINVAL, "O_CREAT with O_DIRECTORY")
        where = pathwalk.last(self.fs, path)
        for _ in range(pathwalk.LINKS_MAX + 1):
            if where.is_dots or where.slash:
                exclusive = flags & os.O_EXCL and where.is_dots
                raise error(errno.EEXIST if exclusive else errno.EISDIR, repr(path))
            inode = self._find(where)
            if inode is None:
                try:
                    return self.fs.create(where.directory, where.name, mode), True
                except FileExistsError:
                    if flags & os.O_EXCL:
                        raise
                    continue  # another node was faster
            if flags & os.O_EXCL:
                raise error(errno.EEXIST, repr(path))
            if inode.is_dir:
                raise error(errno.EISDIR, repr(path))
            if not inode.is_symlink or flags & os.O_NOFOLLOW:
                return inode, False
            where = pathwalk.last(self.fs, self.fs.readlink(inode), where.directory)
        raise error(errno.ELOOP, repr(path))

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

    @_walks
    def truncate(self, path: Path, size: int) -> None:
        """Set the size of a file."""
        if size < 0:
            raise error(errno.EINVAL)
        inode = pathwalk.resolve(self.fs, path)
        if inode.is_dir:
            raise error(errno.EISDIR, repr(path))
        if not inode.is_file:
            raise error(errno.EINVAL, repr(path))
        self._truncate(inode, size)

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

    # Names

    @_walks
    def stat(self, path: Path) -> Stat:
        """What a path means, links followed."""
        return self._stat(pathwalk.resolve(self.fs, path))

    @_walks
    def lstat(self, path: Path) -> Stat:
        """What a path means, a link in the last place not followed."""
        return self._stat(pathwalk.resolve(self.fs, path, follow=False))

    @_walks
    def readlink(self, path: Path) -> str:
        """The target of a symbolic link."""
        return _decode(self.fs.readlink(pathwalk.resolve(self.fs, path, follow=False)))

    @_walks
    def listdir(self, path: Path) -> list[str]:
        """The names in a directory, in on-disk order, without `.` and `..`."""
        return [_decode(entry.name) for entry in self.fs.readdir(pathwalk.resolve(self.fs, path))]

    def walk(self, top: Path = "/") -> Iterator[tuple[str, list[str], list[str]]]:
        """Like `os.walk` from the top down, not following links.

        Yields (path, directories, other names). Each directory is visited once: one that is met
        again (only on a damaged image) is EUCLEAN.
        """
        pending = [
            (_decode(pathwalk.encode(top)).rstrip("/") or "/", pathwalk.resolve(self.fs, top))
        ]
        seen: set[int] = set()
        while pending:
            path, inode = pending.pop()
            if inode.ino in seen:
                raise corrupt(f"directory {inode.ino} has two places in the tree")
            seen.add(inode.ino)
            directories: list[str] = []
            others: list[str] = []
            below: list[tuple[str, Inode]] = []
            for entry in self.fs.readdir(inode):
                name = _decode(entry.name)
                child = self.fs.iget(entry.ino)
                if child.is_dir:
                    directories.append(name)
                    below.append((f"{path.rstrip('/')}/{name}", child))
                else:
                    others.append(name)
            yield path, directories, others
            pending.extend(reversed(below))

    @_walks
    def mkdir(self, path: Path, mode: int = 0o755) -> None:
        """Make a directory."""
        where = self._place_for_new(path)
        self.fs.mkdir(where.directory, where.name, mode)

    @_walks
    def symlink(self, target: Path, path: Path) -> None:
        """Make a symbolic link at `path` to `target`."""
        content = pathwalk.encode(target)
        where = self._place_for_new(path)
        if where.slash:
            raise error(errno.ENOENT, repr(path))
        self.fs.symlink(where.directory, where.name, content)

    @_walks
    def link(self, old: Path, new: Path) -> None:
        """Give the file `old` (a link is not followed) the further name `new`."""
        inode = pathwalk.resolve(self.fs, old, follow=False)
        where = self._place_for_new(new)
        if where.slash:
            raise error(errno.ENOENT, repr(new))
        self.fs.link(inode, where.directory, where.name)

    def _place_for_new(self, path: Path) -> Last:
        where = pathwalk.last(self.fs, path)
        if where.is_dots or self._find(where) is not None:
            raise error(errno.EEXIST, repr(path))
        return where

    @_walks
    def unlink(self, path: Path) -> None:
        """Remove a name of a file."""
        where = pathwalk.last(self.fs, path)
        if where.is_dots:
            raise error(errno.EISDIR, repr(path))
        if where.slash:
            found = self.fs.lookup(where.directory, where.name)
            raise error(errno.EISDIR if found.is_dir else errno.ENOTDIR, repr(path))
        self._free_if_gone(self.fs.unlink(where.directory, where.name))

    @_walks
    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        where = pathwalk.last(self.fs, path)
        if where.is_dots:
            code = {b"": errno.EBUSY, b".": errno.EINVAL, b"..": errno.ENOTEMPTY}[where.name]
            raise error(code, repr(path))
        self._free_if_gone(self.fs.rmdir(where.directory, where.name))

    @_walks
    def rename(self, old: Path, new: Path) -> None:
        """Move a name, over an existing one if its kind allows it."""
        source = pathwalk.last(self.fs, old)
        target = pathwalk.last(self.fs, new)
        if source.is_dots or target.is_dots:
            raise error(errno.EBUSY, repr(old if source.is_dots else new))
        inode = self.fs.lookup(source.directory, source.name)
        self._find(target)  # before what follows, so that a name that is too long is said to be so
        if (source.slash or target.slash) and not inode.is_dir:
            raise error(errno.ENOTDIR, repr(old))
        gone = self.fs.rename(source.directory, source.name, target.directory, target.name)
        if gone is not None:
            self._free_if_gone(gone)

    # The whole file system

    def sync(self) -> None:
        """All data, then all metadata, then the device."""
        self.pages.sync_all()
        self.fs.sync()

    def statfs(self) -> FsStat:
        """Space used and free."""
        return self.fs.statfs()

    def unmount(self) -> None:
        """Close all handles, write everything back and mark the image clean.

        Closing frees the files that lost their names.
        """
        try:
            for number in list(self._handles):
                self.close(number)
            if not self.fs.read_only:
                self.pages.sync_all()
        finally:
            # Also after an error: the image must be given back, and what is in order written.
            self.fs.unmount()

    # Helpers

    def _handle(self, number: int) -> Handle:
        handle = self._handles.get(number)
        if handle is None:
            raise error(errno.EBADF, f"handle {number}")
        return handle

    def _check_writable(self) -> None:
        if self.fs.read_only:
            raise error(errno.EROFS)

    def _find(self, where: Last) -> Inode | None:
        try:
            return self.fs.lookup(where.directory, where.name)
        except FileNotFoundError:
            return None

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


def _check_openable(handle: Handle, path: Path) -> None:
    inode, flags = handle.inode, handle.flags
    if inode.is_symlink:
        raise error(errno.ENOTDIR if flags & os.O_DIRECTORY else errno.ELOOP, repr(path))
    if inode.is_dir:
        if handle.writable or flags & os.O_TRUNC:
            raise error(errno.EISDIR, repr(path))
        return
    if flags & os.O_DIRECTORY:
        raise error(errno.ENOTDIR, repr(path))
    if not inode.is_file:
        raise error(errno.ENXIO, repr(path))


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
