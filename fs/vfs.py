"""The virtual file system: what a program in a guest calls.

Paths, open handles and errno are as on Linux.

Differs from Linux on purpose: one user who may do everything (no permission checks), no access
times (as `noatime`), no working directory (relative paths start at the root), no devices, pipes
or sockets (opening one is ENXIO).

What has a handle already is in `openfiles`, with the invariants.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator
from typing import Final, ParamSpec, TypeVar

from fs import pathwalk
from fs.errors import corrupt, error
from fs.filesystem import FilePages, FileSystem, FsStat
from fs.inode import Inode, Stat
from fs.openfiles import HANDLES_MAX, Handle, OpenFiles
from fs.pathwalk import Last, Path

WALKS_MAX: Final = 16
"""How often another node may remove what a path means while it is walked."""

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


class Vfs(OpenFiles):
    """One mounted file system as a program sees it."""

    def __init__(self, fs: FileSystem, pages: FilePages) -> None:
        super().__init__(fs, pages)
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
        writes = Handle(inode, flags).writable or bool(flags & os.O_TRUNC)
        _check_openable(inode, flags, path, writes=writes)
        if not created and writes and self.fs.read_only:
            raise error(errno.EROFS, repr(path))
        if inode not in self._opens and not created:
            try:
                self.fs.opened(inode)
            except FileNotFoundError as reason:
                raise error(errno.ESTALE, repr(path)) from reason
        number = self._add(inode, flags)
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

    def _find(self, where: Last) -> Inode | None:
        try:
            return self.fs.lookup(where.directory, where.name)
        except FileNotFoundError:
            return None


def _check_openable(inode: Inode, flags: int, path: Path, *, writes: bool) -> None:
    if inode.is_symlink:
        raise error(errno.ENOTDIR if flags & os.O_DIRECTORY else errno.ELOOP, repr(path))
    if inode.is_dir:
        if writes:
            raise error(errno.EISDIR, repr(path))
        return
    if flags & os.O_DIRECTORY:
        raise error(errno.ENOTDIR, repr(path))
    if not inode.is_file:
        raise error(errno.ENXIO, repr(path))


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
