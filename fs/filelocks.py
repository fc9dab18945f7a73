"""Locks that programs take on files: whole files (flock) and byte ranges (fcntl).

They are advisory: nothing but another lock minds them. Owners are handles for whole files, and for
ranges whatever the caller names: a process (a number from 0 on: fcntl's classic locks), or the
handle itself (`handle_owner`: Linux's open file description locks).

Invariants:
  I1  two locks of different owners on one file, one of them exclusive, never cover the same byte,
      whichever nodes they are on;
  I2  an owner has one lock at most on a byte: a new one replaces what he had there;
  I3  no lock outlives its handle; those of an owner end with `release`.

Differs from Linux: nothing here waits. A lock that is in the way is EAGAIN, and who wants to wait
asks again between other work: a guest is one thread, and its other programs go on meanwhile. So
there is no EDEADLK, and no order among those who wait. The locks of one inode and mount are
bounded; beyond `RANGES_MAX` pieces of ranges it is ENOLCK.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from fs.errors import error
from fs.inode import Inode

END: Final = 1 << 63
"""One behind the last byte that a file can have; a range up to here grows with the file."""
RANGES_MAX: Final = 512


class RangeLock(NamedTuple):
    """A lock on the bytes `start` to `end - 1`; `node` is None for this mount."""

    start: int
    end: int
    exclusive: bool
    owner: int
    node: int | None = None


class OtherNodes(Protocol):
    """What the other mounts of a file system have to say; see `Alone`."""

    def lock_whole(self, inode: Inode, *, exclusive: bool) -> bool:
        """Take a share of the whole file, or all of it; False when another node is in the way."""
        ...

    def unlock_whole(self, inode: Inode, *, exclusive: bool) -> None:
        """Give back what `lock_whole` took."""
        ...

    def change_ranges(
        self, inode: Inode, change: Callable[[Sequence[RangeLock]], bool] | None
    ) -> Sequence[RangeLock]:
        """Call `change` with the ranges that other nodes have locked, while none of them takes
        more; it returns whether this node has any afterwards. Returns what it was called with."""
        ...

    def forget(self, inode: Inode) -> None:
        """No handle is left here, and no lock."""
        ...


class Alone:
    """The `OtherNodes` of a file system that is mounted once."""

    def lock_whole(self, inode: Inode, *, exclusive: bool) -> bool:  # noqa: ARG002
        """Nobody is in the way."""
        return True

    def unlock_whole(self, inode: Inode, *, exclusive: bool) -> None:
        """Nobody waits."""

    def change_ranges(
        self,
        inode: Inode,  # noqa: ARG002
        change: Callable[[Sequence[RangeLock]], bool] | None,
    ) -> Sequence[RangeLock]:
        """Nobody has any."""
        if change is not None:
            change(())
        return ()

    def forget(self, inode: Inode) -> None:
        """Nobody asked."""


def handle_owner(handle: int) -> int:
    """The owner that a handle is by itself; Linux, too, shows such owners as below zero."""
    return -1 - handle


def span(start: int, length: int) -> tuple[int, int]:
    """Start and end of `length` bytes from `start`, as fcntl has it: 0 is all that follows, and
    below 0 are the bytes before `start`. EINVAL, EOVERFLOW."""
    if length < 0:
        start, length = start + length, -length
    if start < 0:
        raise error(errno.EINVAL, "a range before the start of the file")
    end = start + length if length else END
    if end > END:
        raise error(errno.EOVERFLOW, "a range behind the end of what a file can be")
    return start, end


class Ranges:
    """The locked ranges of one file at this node, in order of their start."""

    def __init__(self) -> None:
        self.locks: list[RangeLock] = []

    def set(self, start: int, end: int, owner: int, *, exclusive: bool | None) -> None:
        """The owner's lock on these bytes is now this one; None: none. ENOLCK."""
        others = [lock for lock in self.locks if lock.owner != owner]
        mine = [
            piece
            for lock in self.locks
            if lock.owner == owner
            for piece in (
                lock._replace(end=min(lock.end, start)),
                lock._replace(start=max(lock.start, end)),
            )
            if piece.start < piece.end
        ]
        if exclusive is not None:
            mine.append(RangeLock(start, end, exclusive, owner))
        changed = sorted([*others, *_merged(sorted(mine))])
        if len(changed) > max(RANGES_MAX, len(self.locks)):
            raise error(errno.ENOLCK, f"more than {RANGES_MAX} locked ranges of a file")
        self.locks = changed

    def release(self, owner: int) -> None:
        """All of an owner's."""
        self.locks = [lock for lock in self.locks if lock.owner != owner]


def _merged(locks: list[RangeLock]) -> list[RangeLock]:
    """Neighbours of one kind are one lock."""
    merged: list[RangeLock] = []
    for lock in locks:
        last = merged[-1] if merged else None
        if last is not None and last.end == lock.start and last.exclusive == lock.exclusive:
            merged[-1] = last._replace(end=lock.end)
        else:
            merged.append(lock)
    return merged


def find_conflict(
    locks: Iterable[RangeLock], start: int, end: int, owner: int, *, exclusive: bool
) -> RangeLock | None:
    """The first of `locks` that is in the way of an owner of this node."""
    for lock in locks:
        mine = lock.node is None and lock.owner == owner
        if not mine and lock.start < end and start < lock.end and (exclusive or lock.exclusive):
            return lock
    return None


class _Held:
    """The locks on one inode."""

    __slots__ = ("ranges", "whole")

    def __init__(self) -> None:
        self.whole: dict[int, bool] = {}
        """By handle: whether exclusive."""
        self.ranges = Ranges()


class FileLocks:
    """The locks of one mount."""

    def __init__(self, others: OtherNodes) -> None:
        self._others = others
        self._held: dict[Inode, _Held] = {}

    # Whole files

    def lock_whole(self, inode: Inode, handle: int, *, exclusive: bool) -> None:
        """As flock: what the handle had goes first, also when it gets nothing for it. EAGAIN."""
        held = self._held.setdefault(inode, _Held())
        if held.whole.get(handle) == exclusive:
            return
        self.unlock_whole(inode, handle)
        in_the_way = any(exclusive or other for other in held.whole.values())
        if in_the_way or not self._others.lock_whole(inode, exclusive=exclusive):
            raise error(errno.EAGAIN, "another handle has locked the file")
        held.whole[handle] = exclusive

    def unlock_whole(self, inode: Inode, handle: int) -> None:
        """The handle's lock, if it has one."""
        held = self._held.get(inode)
        if held is not None and handle in held.whole:
            self._others.unlock_whole(inode, exclusive=held.whole.pop(handle))

    # Ranges

    def lock_range(
        self, inode: Inode, start: int, end: int, owner: int, *, exclusive: bool
    ) -> None:
        """Lock bytes that nobody else has locked, in place of the owner's own locks. EAGAIN."""
        ranges = self._held.setdefault(inode, _Held()).ranges

        def check(locks: Sequence[RangeLock]) -> None:
            if find_conflict(locks, start, end, owner, exclusive=exclusive) is not None:
                raise error(errno.EAGAIN, "another program has locked these bytes")

        def change(of_others: Sequence[RangeLock]) -> bool:
            check(of_others)
            # Waiting for other nodes, this one may have locked something else.
            check(ranges.locks)
            ranges.set(start, end, owner, exclusive=exclusive)
            return True

        check(ranges.locks)  # the other nodes need not be asked then
        self._others.change_ranges(inode, change)

    def unlock_range(self, inode: Inode, start: int, end: int, owner: int) -> None:
        """The owner's locks on these bytes, if there are any."""
        held = self._held.get(inode)
        if held is not None:
            held.ranges.set(start, end, owner, exclusive=None)

    def range_in_the_way(
        self, inode: Inode, start: int, end: int, owner: int, *, exclusive: bool
    ) -> RangeLock | None:
        """A lock that keeps `lock_range` from its work now, or None."""
        of_others = self._others.change_ranges(inode, None)
        locks = [*self.ranges_of(inode.ino, inode.generation), *of_others]
        return find_conflict(locks, start, end, owner, exclusive=exclusive)

    # The end

    def release(self, inode: Inode, owner: int) -> None:
        """All ranges of an owner; fcntl says so of a process that closes any handle of a file."""
        held = self._held.get(inode)
        if held is not None:
            held.ranges.release(owner)

    def close(self, inode: Inode, handle: int, *, last: bool) -> None:
        """A handle is closed, and with `last` no other is left."""
        held = self._held.get(inode)
        if held is None:
            return
        try:
            self.unlock_whole(inode, handle)
        finally:
            held.ranges.release(handle_owner(handle))
            if last:
                # A process may have forgotten to release its own.
                del self._held[inode]
                self._others.forget(inode)

    # To look at

    def whole_files(self) -> list[tuple[Inode, int, bool]]:
        """All locks on whole files: inode, handle, whether exclusive."""
        return [
            (inode, handle, exclusive)
            for inode, held in self._held.items()
            for handle, exclusive in held.whole.items()
        ]

    def ranges(self) -> list[tuple[Inode, RangeLock]]:
        """All ranges that this node has locked."""
        return [(inode, lock) for inode, held in self._held.items() for lock in held.ranges.locks]

    def ranges_of(self, ino: int, generation: int) -> list[RangeLock]:
        """What this node has locked of a file; other nodes ask."""
        for inode, held in self._held.items():
            if inode.ino == ino and inode.generation == generation:
                return list(held.ranges.locks)
        return []
