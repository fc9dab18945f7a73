"""The meta locks of inodes at this node, and what they say about what is cached here.

    acquire   take the lock; refresh the inode when another node may have changed it
    release   out of use; after a change in EX the value block gets a new version first
    need      inside an operation: "this lock too"; the operation starts again with it

Invariants:
  I1  an `Ocfs2Inode`'s fields and the cached blocks that it owns are current while its lock is in
      use;
  I2  no lock is waited for inside an operation: whoever finds there that a lock is missing raises
      `NeedLock`, everything is undone, and the operation starts again with that lock as well;
  I3  a version is given out once: it holds this node's number and a count that starts at the
      mount's time, so a version that is known can't come to mean something else;
  I4  an inode that was made has another version than what was in its block before, before another
      node can find it: what is cached of a removed inode is not taken for it.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import weakref
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from fs.dlm.modes import Mode
from fs.errors import corrupt, error
from fs.ocfs2.dinode import Dinodes, Ocfs2Inode, blank
from fs.ocfs2.locking import (
    META,
    ClusterLocks,
    decode_value,
    encode_value,
    is_distrusted,
    lock_name,
)
from fs.ocfs2.transaction import Transactions

_NODE_BITS: Final = 8
ROUNDS_MAX: Final = 64
"""How often an operation may find that it needs one more lock."""

Result = TypeVar("Result")


class Rank(enum.IntEnum):
    """The order in which an operation takes its locks."""

    DIRECTORY = 1
    INODE = 2
    ORPHAN_DIR = 3
    INODE_ALLOC = 4
    EXTENT_ALLOC = 5
    SLOT_FILE = 6
    GLOBAL_BITMAP = 7


class Wanted(NamedTuple):
    """A meta lock in EX that an operation needs; taken in the order of `rank` and `place`."""

    rank: Rank
    place: int
    inode: Ocfs2Inode


class NeedLock(Exception):
    """Inside an operation: it can't go on without this lock."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class LockState:
    """What this node knows about one meta lock."""

    __slots__ = ("exclusive", "fresh", "name", "serial", "users", "version")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.version: int | None = None
        self.fresh = False
        """The lock was held without a break since the last refresh."""
        self.serial = 0
        self.users = 0
        self.exclusive = 0


class InodeLocks:
    """All meta locks of one mount, and the inodes that live in memory."""

    def __init__(
        self,
        locks: ClusterLocks,
        node: int,
        transactions: Transactions,
        dinodes: Dinodes,
        now_ns: Callable[[], int],
    ) -> None:
        self.locks = locks
        self._node = node
        self._transactions = transactions
        self._dinodes = dinodes
        self._states: dict[int, LockState] = {}
        self._counter = now_ns() // 1000
        self._live: WeakValueDictionary[int, Ocfs2Inode] = WeakValueDictionary()
        self._departed: list[int] = []
        self._made: list[tuple[Ocfs2Inode, Callable[[], None]]] = []
        """By the running operation, and what is to be done then."""
        self.distrust: Callable[[Ocfs2Inode], None] = lambda _inode: None
        """Told of a file of which a shared pool may hold old pages: a node that had it in EX could
        not flush what it changed, or died."""
        self.system_blocks: set[int] = set()
        """Inodes whose locks are named with the volume's generation."""

    # Inodes in memory

    def inode(self, block: int) -> Ocfs2Inode:
        """The object for an inode; its fields are current only after `acquire`."""
        inode = self._live.get(block)
        if inode is None or inode.gone:
            inode = blank(block)
            self.adopt(inode)
        return inode

    def known(self, block: int) -> Ocfs2Inode | None:
        """The object for an inode, if there is one."""
        return self._live.get(block)

    def adopt(self, inode: Ocfs2Inode) -> None:
        """A new object is the one for its inode from now on."""
        self._live[inode.ino] = inode
        weakref.finalize(inode, self._departed.append, inode.ino).atexit = False

    def reap(self) -> None:
        """Give up the locks of inodes that left memory, but for those with changes in the log."""
        kept: list[int] = []
        while self._departed:
            block = self._departed.pop()
            state = self._states.get(block)
            if state is None or block in self._live:
                continue
            if state.users or self._transactions.cache.pinned(block):
                kept.append(block)
                continue
            del self._states[block]
            self._transactions.cache.drop(block)
            self.locks.drop(state.name)
        self._departed += kept

    def name(self, block: int) -> bytes:
        """The name of an inode's meta lock."""
        generation = self._dinodes.fs_generation if block in self.system_blocks else 0
        return lock_name(META, block, generation)

    def state(self, block: int) -> LockState:
        """What is known about the lock of an inode."""
        state = self._states.get(block)
        if state is None:
            state = self._states[block] = LockState(self.name(block))
        return state

    # Taking and giving back

    def acquire(self, inode: Ocfs2Inode, mode: Mode) -> None:
        """Take the meta lock; afterwards the inode's fields are current.

        EUCLEAN when the inode is not in use, ESTALE when it is not in use any more.
        """
        state = self.state(inode.ino)
        self.locks.acquire(state.name, mode)
        state.users += 1
        if mode == Mode.EX:
            state.exclusive += 1
        try:
            self._refresh(inode, state)
        except BaseException:
            self.release(inode, mode)
            raise

    def release(self, inode: Ocfs2Inode, mode: Mode) -> None:
        """Out of use."""
        state = self._states[inode.ino]
        state.users -= 1
        if mode == Mode.EX:
            state.exclusive -= 1
        self.locks.release(state.name, mode)

    def _refresh(self, inode: Ocfs2Inode, state: LockState) -> None:
        if inode.gone:
            raise error(errno.ESTALE, f"inode {inode.ino} was freed")
        distrusted = False
        if not state.fresh:
            value = self.locks.value(state.name)
            version = decode_value(value)
            distrusted = is_distrusted(value)
            if version is None or version != state.version:
                self._transactions.cache.drop(inode.ino)
                state.serial += 1
            state.version = version
        if inode.serial != state.serial or not inode.serial:
            state.serial = max(state.serial, 1)
            self._dinodes.load(inode)
            inode.serial = state.serial
        if distrusted and inode.is_file:
            self.distrust(inode)
            if state.exclusive:
                # From now on it is this node's business; `warn` says so if it can't see to it.
                self.changed(inode.ino)
        state.fresh = True

    def made(self, inode: Ocfs2Inode, then: Callable[[], None]) -> None:
        """The running operation makes this inode, whose lock nobody needs so far. After it `then`
        is called, before another node can find the inode."""
        self._made.append((inode, then))

    def _publish(self, inode: Ocfs2Inode) -> None:
        """Before its directory is given up. Who has its lock in use now looks for an inode that is
        gone, and waits for nothing meanwhile."""
        self.adopt(inode)
        state = self.state(inode.ino)
        state.serial = max(state.serial, 1)
        inode.serial = state.serial
        self.acquire(inode, Mode.EX)
        self.changed(inode.ino)
        self.release(inode, Mode.EX)

    def changed(self, block: int) -> None:
        """The inode or its data was changed in EX: its value block gets a new version."""
        state = self._states.get(block)
        if state is None or not state.exclusive:
            return
        state.version = self._next_version()
        self.locks.set_value(state.name, encode_value(state.version))

    def warn(self, block: int) -> None:
        """Before EX is given up: the next holders have to distrust the file.

        Under PR nothing is done: the value told this node so, and still does.
        """
        state = self._states.get(block)
        if state is not None:
            version = self._next_version()
            with contextlib.suppress(ValueError):
                self.locks.set_value(state.name, encode_value(version, distrusted=True))
                state.version = version

    def _next_version(self) -> int:
        self._counter += 1
        return self._counter << _NODE_BITS | self._node & 0xFF

    def exclusive(self, inode: Ocfs2Inode) -> bool:
        """True when the lock is in use in EX."""
        state = self._states.get(inode.ino)
        return state is not None and state.exclusive > 0

    def cached(self, inode: Ocfs2Inode) -> bool:
        """True when the inode's fields are current as far as this node was told."""
        state = self._states.get(inode.ino)
        return state is not None and state.fresh and inode.serial == state.serial

    def given_up(self, block: int) -> None:
        """The lock goes to another node: what is cached must be looked at again."""
        state = self._states.get(block)
        if state is not None:
            state.fresh = False

    def doubt_all(self, *, also_held: bool = False) -> None:
        """A journal was replayed: trust no cached block of a lock that was not held meanwhile."""
        for block, state in self._states.items():
            if also_held:
                state.fresh = False
            if not state.fresh:
                state.version = None
                self._transactions.cache.drop(block)

    # Operations

    def need(self, rank: Rank, inode: Ocfs2Inode, place: int | None = None) -> None:
        """The running operation changes this inode."""
        if not self.exclusive(inode):
            raise NeedLock(Wanted(rank, inode.ino if place is None else place, inode))

    def run(self, wanted: Iterable[Wanted], body: Callable[[], Result]) -> Result:
        """Do `body` as one operation with these meta locks in EX, and others that it needs."""
        assert not self._transactions.active, "locks are not waited for inside an operation"
        self.reap()
        wants = {want.inode.ino: want for want in wanted}
        for _ in range(ROUNDS_MAX):
            try:
                return self._run_once(sorted(wants.values(), key=_order), body)
            except NeedLock as need:
                if need.wanted.inode.ino in wants:
                    raise AssertionError("a lock that was taken is missing") from need
                wants[need.wanted.inode.ino] = need.wanted
        raise corrupt("an operation touches too many allocators")

    def _run_once(self, wanted: list[Wanted], body: Callable[[], Result]) -> Result:
        taken: list[Ocfs2Inode] = []
        try:
            for want in wanted:
                self.acquire(want.inode, Mode.EX)
                taken.append(want.inode)
            self._made.clear()
            with self._transactions.operation():
                result = body()
            for owner in self._transactions.modified_owners:
                self.changed(owner)
            for inode, then in self._made:
                self._publish(inode)
                then()
            return result
        finally:
            for inode in reversed(taken):
                self.release(inode, Mode.EX)


def _order(wanted: Wanted) -> tuple[int, int]:
    return wanted.rank, wanted.place
