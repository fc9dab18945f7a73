"""The operations of a workload, each of which changes at most one thing that others can see.

`perform` does one at a mounted node. A workload is a list of them in the order in which they are
done: one at a time, but with everything that its node waits for, and what the other nodes do for
it meanwhile.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fs.vfs import Vfs
from tests.support.ocfs2 import read


class Kind(enum.Enum):
    """What is done."""

    JOIN = enum.auto()
    LEAVE = enum.auto()
    SYNC = enum.auto()
    CREATE = enum.auto()
    MKDIR = enum.auto()
    SYMLINK = enum.auto()
    LINK = enum.auto()
    UNLINK = enum.auto()
    RMDIR = enum.auto()
    RENAME = enum.auto()
    READ = enum.auto()
    LIST = enum.auto()
    FSYNC = enum.auto()
    WRITE = enum.auto()
    APPEND = enum.auto()
    TRUNCATE = enum.auto()
    HOLD = enum.auto()
    HELD_WRITE = enum.auto()
    HELD_FSYNC = enum.auto()
    RELEASE = enum.auto()


PROMISES = {Kind.SYNC, Kind.FSYNC, Kind.HELD_FSYNC, Kind.LEAVE}
"""When one of these is done, all that its node did before survives."""
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL


@dataclass(frozen=True)
class Operation:
    """`target` is a new path, a link's target, or what a node calls a handle."""

    node: int
    kind: Kind
    path: str = ""
    target: str = ""
    offset: int = 0
    size: int = 0
    data: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        """For a person."""
        words = [f"node {self.node}", self.kind.name.lower(), self.path, self.target]
        if self.data:
            words.append(f"{len(self.data)} bytes at {self.offset}")
        if self.kind == Kind.TRUNCATE:
            words.append(f"to {self.size}")
        return " ".join(word for word in words if word)


def perform(vfs: Vfs, handles: dict[str, int], operation: Operation) -> object:
    """Do it at a node; returns what was read, or the number of the error, or None."""
    try:
        return _perform(vfs, handles, operation)
    except OSError as reason:
        if reason.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
            return reason.errno
        raise


def _perform(vfs: Vfs, handles: dict[str, int], operation: Operation) -> object:
    path, target, kind = operation.path, operation.target, operation.kind
    if kind in _ON_NAMES:
        _ON_NAMES[kind](vfs, path, target)
    elif kind == Kind.SYNC:
        vfs.sync()
    elif kind == Kind.TRUNCATE:
        vfs.truncate(path, operation.size)
    elif kind == Kind.READ:
        return read(vfs, path)
    elif kind == Kind.LIST:
        return sorted(name for name in vfs.listdir(path) if name != "lost+found")
    elif kind == Kind.HOLD:
        handles[target] = vfs.open(path, os.O_RDWR)
    elif kind == Kind.RELEASE:
        if target not in handles:
            return errno.EBADF
        vfs.close(handles.pop(target))
    elif kind in (Kind.HELD_WRITE, Kind.HELD_FSYNC):
        if target not in handles:
            return errno.EBADF
        _use(vfs, handles[target], operation)
    else:
        handle = vfs.open(path, os.O_RDWR | (os.O_APPEND if kind == Kind.APPEND else 0))
        try:
            _use(vfs, handle, operation)
        finally:
            vfs.close(handle)
    return None


_ON_NAMES: Final[dict[Kind, Callable[[Vfs, str, str], None]]] = {
    Kind.CREATE: lambda vfs, path, _: vfs.close(vfs.open(path, _NEW)),
    Kind.MKDIR: lambda vfs, path, _: vfs.mkdir(path),
    Kind.SYMLINK: lambda vfs, path, target: vfs.symlink(target, path),
    Kind.LINK: lambda vfs, path, target: vfs.link(path, target),
    Kind.UNLINK: lambda vfs, path, _: vfs.unlink(path),
    Kind.RMDIR: lambda vfs, path, _: vfs.rmdir(path),
    Kind.RENAME: lambda vfs, path, target: vfs.rename(path, target),
}


def _use(vfs: Vfs, handle: int, operation: Operation) -> None:
    if operation.kind in PROMISES:
        vfs.fsync(handle)
    else:
        vfs.pwrite(handle, operation.data, operation.offset)
