"""From a path to an inode, one component at a time.

Relative paths start at the root: there is no working directory here. Symbolic links are followed
at most 40 times in one walk (Linux's limit too), then ELOOP. Every step consumes a component and
a link adds at most a path's length, so a walk ends on any image, also on one whose directories
form a loop.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Final, NamedTuple

from fs.errors import error
from fs.filesystem import FileSystem
from fs.inode import Inode

LINKS_MAX: Final = 40
PATH_BYTES_MAX: Final = 4096
"""Linux's PATH_MAX, its closing NUL included."""

Path = str | bytes


class Last(NamedTuple):
    """The last component of a path, not looked up: `name` is empty for the root itself."""

    directory: Inode
    name: bytes
    slash: bool
    """The path ended in a slash: it can only mean a directory."""

    @property
    def is_dots(self) -> bool:
        """True when the component is the root, `.` or `..`: nothing that can be made or removed."""
        return self.name in (b"", b".", b"..")


def encode(path: Path) -> bytes:
    """A path as bytes: UTF-8, other bytes as Python's surrogates."""
    untrusted_path = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
    if not untrusted_path:
        raise error(errno.ENOENT, "empty path")
    if len(untrusted_path) >= PATH_BYTES_MAX:
        raise error(errno.ENAMETOOLONG, "path")
    if b"\0" in untrusted_path:
        raise error(errno.EINVAL, "path with a NUL")
    return untrusted_path


def resolve(fs: FileSystem, path: Path, *, follow: bool = True) -> Inode:
    """The inode that `path` means.

    A symbolic link in the last place is followed when `follow` or a slash says so.
    """
    name = encode(path)
    return _walk(fs, fs.root, name, follow=follow, parent=False)[0]


def last(fs: FileSystem, path: Path, start: Inode | None = None) -> Last:
    """The directory that holds the last component of `path`, and that component."""
    name = encode(path)
    directory, component = _walk(fs, start or fs.root, name, follow=False, parent=True)
    return Last(directory, component, name.endswith(b"/"))


def _walk(
    fs: FileSystem, start: Inode, path: bytes, *, follow: bool, parent: bool
) -> tuple[Inode, bytes]:
    current = fs.root if path.startswith(b"/") else start
    pending = deque(part for part in path.split(b"/") if part)
    component = pending.pop() if parent and pending else b""
    must_be_dir = path.endswith(b"/") or bool(component)
    links = 0
    while pending:
        name = pending.popleft()
        if not current.is_dir:
            raise error(errno.ENOTDIR, repr(path))
        if name == b".":
            continue
        inode = fs.lookup(current, name)
        if inode.is_symlink and (pending or follow or must_be_dir):
            links += 1
            if links > LINKS_MAX:
                raise error(errno.ELOOP, repr(path))
            target = encode(fs.readlink(inode))
            must_be_dir = must_be_dir or (not pending and target.endswith(b"/"))
            pending.extendleft(reversed([part for part in target.split(b"/") if part]))
            current = fs.root if target.startswith(b"/") else current
        else:
            current = inode
    if must_be_dir and not current.is_dir:
        raise error(errno.ENOTDIR, repr(path))
    return current, component
