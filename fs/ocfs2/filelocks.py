"""Locks on files between the nodes of a cluster: flock and byte ranges.

A lock on a whole file is a lock of kind F on the inode, PR or EX, that is dropped at the last
unlock: cached, it would be in the way of nodes that only try.

Each node knows the ranges that it has locked itself, and nobody else does. Who wants to lock a
range takes the range lock (kind L) of the inode in EX, so that nobody else locks anything of the
file meanwhile, and asks the others what they have. The value of that lock names the nodes that may
have some, so a file that one node uses alone is asked about once. Unlocking takes no lock at all:
an answer that is too old by then shows a range too many, and the asker tries again later.

A node that dies takes its ranges with it. If it held the range lock, the value is lost, and the
next asks all members.

Differs from OCFS2, which hands ranges to the cluster stack: Pacemaker's replicates every range to
all nodes in one order, o2cb's keeps them on the node, unseen by the others. Kind L does not exist
there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from fs.dlm.modes import Mode
from fs.filelocks import RangeLock
from fs.hooks import FileKey
from fs.inode import Inode
from fs.ocfs2.locking import FLOCK, RANGES, VALUE_BYTES, ClusterLocks, lock_name

_FORMAT: Final = 1
_NODES: Final = 256

Ask = Callable[[FileKey, frozenset[int] | None], Sequence[RangeLock]]
"""The ranges of a file that these other nodes (None: all) have locked, from themselves. A node that
is no member any more has none."""


def _nobody(_file: FileKey, _nodes: frozenset[int] | None) -> Sequence[RangeLock]:
    return ()


class NodeFileLocks:
    """The `fs.filelocks.OtherNodes` of an OCFS2 mount."""

    def __init__(self, locks: ClusterLocks, node: int) -> None:
        self.ask: Ask = _nobody
        """Set by whoever can reach the other nodes."""
        self._locks = locks
        self._node = node
        self._whole: Counter[bytes] = Counter()

    def lock_whole(self, inode: Inode, *, exclusive: bool) -> bool:
        """Without waiting for another node to give anything up."""
        name = _name(FLOCK, inode)
        granted = self._locks.try_acquire(name, _mode(exclusive=exclusive))
        if granted:
            self._whole[name] += 1
        else:
            self._drop_unused(name)
        return granted

    def unlock_whole(self, inode: Inode, *, exclusive: bool) -> None:
        """The last one at this node lets go of the cluster's."""
        name = _name(FLOCK, inode)
        self._whole[name] -= 1
        self._locks.release(name, _mode(exclusive=exclusive))
        self._drop_unused(name)

    def _drop_unused(self, name: bytes) -> None:
        if not self._whole[name]:
            del self._whole[name]
            self._locks.drop(name)

    def change_ranges(
        self, inode: Inode, change: Callable[[Sequence[RangeLock]], bool] | None
    ) -> Sequence[RangeLock]:
        """See `OtherNodes`; waits for the range lock and for the nodes that have ranges."""
        name = _name(RANGES, inode)
        self._locks.acquire(name, Mode.EX)
        try:
            value = self._locks.value(name)
            nodes = _decode(value)
            others = None if nodes is None else nodes - {self._node}
            found: Sequence[RangeLock] = ()
            if others is None or others:
                found = self.ask(FileKey(inode.ino, inode.generation), others)
            having = {lock.node for lock in found if lock.node is not None}
            if nodes is None or self._node in nodes:
                having.add(self._node)
            try:
                if change is not None and change(found):
                    having.add(self._node)
            finally:
                if (new := _encode(having)) != value:
                    self._locks.set_value(name, new)
        finally:
            self._locks.release(name, Mode.EX)
        return found

    def forget(self, inode: Inode) -> None:
        """No range of this node is left. Its bit in the value stays, and finds an empty answer."""
        self._locks.drop(_name(RANGES, inode))


def _name(kind: bytes, inode: Inode) -> bytes:
    return lock_name(kind, inode.ino, inode.generation)


def _mode(*, exclusive: bool) -> Mode:
    return Mode.EX if exclusive else Mode.PR


def _encode(nodes: Iterable[int]) -> bytes:
    bits = sum(1 << node for node in nodes)
    return (
        bytes([_FORMAT])
        + bits.to_bytes(_NODES // 8, "little")
        + bytes(VALUE_BYTES - 1 - _NODES // 8)
    )


def _decode(value: bytes | None) -> frozenset[int] | None:
    """The nodes that may have ranges; None: nobody knows."""
    if value is None or len(value) != VALUE_BYTES:
        return None
    if not any(value):
        return frozenset()  # a lock that nobody has written to
    if value[0] != _FORMAT:
        return None
    bits = int.from_bytes(value[1 : 1 + _NODES // 8], "little")
    return frozenset(node for node in range(_NODES) if bits >> node & 1)
