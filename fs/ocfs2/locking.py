"""Cluster locks as the file system sees them: their names, the interface, the one-node stand-in.

A name has 31 characters: a letter for the kind, "000000", the block in 16 hexadecimal digits, a
generation in 8; or, of kind N, the blocks of a directory and of an inode in 16 and 14 digits. As
in Linux the meta and open locks of ordinary inodes have generation 0 (a node has to take the lock
before it can read the generation), those of system files the volume's.

The value block of a meta lock holds a version that is new after each change of the inode or its
data. A node that gets a lock back with the version that it knew keeps what it has cached.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, Protocol

from fs.dlm.modes import Mode

META: Final = b"M"
OPEN: Final = b"O"
SUPER: Final = b"S"
RENAME: Final = b"R"
DENTRY: Final = b"N"
ORPHAN_SCAN: Final = b"P"
WRITE: Final = b"W"
FLOCK: Final = b"F"
RANGES: Final = b"L"
NAME_BYTES: Final = 31
VALUE_BYTES: Final = 64

_VALUE: Final = struct.Struct("<B7xQ47xB")
_VALUE_FORMAT: Final = 1


def lock_name(kind: bytes, block: int, generation: int = 0) -> bytes:
    """The name of a lock."""
    return b"%c000000%016x%08x" % (kind, block, generation)


def dentry_lock_name(directory: int, ino: int) -> bytes:
    """The name of the lock of an inode's names in a directory."""
    return b"%c%016x%014x" % (DENTRY, directory, ino)


def lock_block(name: bytes) -> int | None:
    """The block in the name of a meta lock; None for other kinds."""
    if len(name) != NAME_BYTES or name[:1] != META:
        return None
    try:
        return int(name[7:23], 16)
    except ValueError:
        return None


def encode_value(version: int, *, distrusted: bool = False) -> bytes:
    """The value block of a meta lock. With `distrusted` its last byte is set: a shared pool may
    hold older pages of the file than the disk."""
    return _VALUE.pack(_VALUE_FORMAT, version, distrusted)


def is_distrusted(value: bytes | None) -> bool:
    """Whether who had the file in EX did not flush all from a shared pool, or nobody knows."""
    return value is None or len(value) != VALUE_BYTES or bool(value[-1])


def decode_value(value: bytes | None) -> int | None:
    """The version in a value block; None when it is not valid, or not ours."""
    if value is None or len(value) != VALUE_BYTES:
        return None
    layout, version, _ = _VALUE.unpack(value)
    return version if layout == _VALUE_FORMAT and version else None


class ClusterLocks(Protocol):
    """The lock manager of one node.

    A lock that was acquired is in use until it is released; then it stays cached at this node
    until another node wants it. Before it is given up the file system's `downconvert(name, to)`
    is called, never while the lock is in use.
    """

    downconvert: Callable[[bytes, Mode], None]
    """Set by the file system before it changes anything, in its mount already: a lock that is given
    up there, too, leaves what was changed under it on the disk."""

    def acquire(self, name: bytes, mode: Mode) -> None:
        """Take a lock and wait for it; may be nested."""
        ...

    def try_acquire(self, name: bytes, mode: Mode) -> bool:
        """Take a lock if no other node stands in the way."""
        ...

    def release(self, name: bytes, mode: Mode) -> None:
        """Out of use, but cached."""
        ...

    def pin(self, name: bytes) -> None:
        """Take a lock in EX and keep it, whoever wants it, until `unpin`. It is no use."""
        ...

    def unpin(self, name: bytes) -> None:
        """As any other lock from now on."""
        ...

    def value(self, name: bytes) -> bytes | None:
        """The 64 bytes of the lock's value block, zeros of a lock that nobody has written to.

        None: it is lost, because a node died that had the lock in EX, or with the master. A value
        whose last byte is set is kept when nobody has the lock any more.
        """
        ...

    def set_value(self, name: bytes, value: bytes) -> None:
        """Change the value block, in EX only."""
        ...

    def token(self, name: bytes) -> int:
        """The fencing token of this node's hold: it grows with every grant of EX."""
        ...

    def drop(self, name: bytes) -> None:
        """No interest any more."""
        ...


class LocalLocks:
    """Locks of a node that is alone: everything is granted at once."""

    def __init__(self) -> None:
        self.downconvert: Callable[[bytes, Mode], None] = lambda _name, _to: None
        """Never called: nobody else wants anything."""
        self._values: dict[bytes, bytes] = {}
        self._uses: dict[bytes, int] = {}

    def acquire(self, name: bytes, mode: Mode) -> None:  # noqa: ARG002
        """Granted."""
        self._uses[name] = self._uses.get(name, 0) + 1

    def try_acquire(self, name: bytes, mode: Mode) -> bool:
        """Granted."""
        self.acquire(name, mode)
        return True

    def release(self, name: bytes, mode: Mode) -> None:  # noqa: ARG002
        """Counted, so that a release too many is seen."""
        uses = self._uses[name] - 1
        if uses:
            self._uses[name] = uses
        else:
            del self._uses[name]

    def pin(self, name: bytes) -> None:
        """Granted."""

    def unpin(self, name: bytes) -> None:
        """Nobody wanted it."""

    def value(self, name: bytes) -> bytes | None:
        """What was set."""
        return self._values.get(name, bytes(VALUE_BYTES))

    def set_value(self, name: bytes, value: bytes) -> None:
        """Remember."""
        self._values[name] = value

    def token(self, name: bytes) -> int:  # noqa: ARG002
        """0: nobody could come with an older one."""
        return 0

    def drop(self, name: bytes) -> None:
        """Forget the value."""
        self._values.pop(name, None)

    @property
    def in_use(self) -> int:
        """Locks in use: 0 between operations."""
        return len(self._uses)
