"""Several nodes in one process: one image, one table of locks, taken in turns.

The table grants what the other nodes' cached locks allow after their `downconvert`. It insists on
what the lock manager promises and on what it may expect: a lock in use is never asked for by
another node (one thread: that would be a deadlock), EX is alone, a value is set in EX only.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fs.block.device import BLOCK_BYTES, Bytes
from fs.directpages import DirectPages
from fs.dlm.modes import Mode, compatible
from fs.filesystem import FilePages
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.locking import VALUE_BYTES
from fs.vfs import Vfs
from tests.support.ocfs2 import Clock


class SharedImage:
    """An image file that several nodes have open; `cut` makes a node's writes fail.

    With `cut_after` that happens by itself after so many block writes: the node dies there.
    """

    block_bytes = BLOCK_BYTES
    read_only = False

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b", buffering=0)
        self.blocks = path.stat().st_size // BLOCK_BYTES
        self.cut = False
        self.cut_after: int | None = None
        self.writes = 0

    def read(self, block: int, count: int, into: memoryview) -> None:
        assert block >= 0 and block + count <= self.blocks
        self._file.seek(block * BLOCK_BYTES)
        assert self._file.readinto(into[: count * BLOCK_BYTES]) == count * BLOCK_BYTES

    def write(self, block: int, count: int, data: Bytes) -> None:
        assert block >= 0 and block + count <= self.blocks
        for number in range(count):
            if self.writes == self.cut_after:
                self.cut = True
            if self.cut:
                raise OSError(5, "this node is dead")
            self.writes += 1
            self._file.seek((block + number) * BLOCK_BYTES)
            page = memoryview(data)[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            self._file.write(page)

    def flush(self) -> None:
        if self.cut:
            raise OSError(5, "this node is dead")

    def close(self) -> None:
        self._file.close()


@dataclass
class LockTable:
    """Who holds what."""

    holds: dict[bytes, dict[int, Mode]] = field(default_factory=dict)
    values: dict[bytes, bytes | None] = field(default_factory=dict)
    """None: lost."""
    tokens: Counter[bytes] = field(default_factory=Counter)
    nodes: dict[int, Node] = field(default_factory=dict)
    downconverts: int = 0

    def kill(self, node: int) -> None:
        """A node is dead: its locks are gone, and values that it may have changed not valid."""
        for name, holders in self.holds.items():
            if holders.pop(node, Mode.NL) == Mode.EX:
                self.values[name] = None
        del self.nodes[node]

    def bury(self, dead: Node, survivor: Node) -> None:
        """A node has died by itself: its locks go, and another one recovers its slot."""
        dead.device.cut = True
        dead.device.close()
        self.kill(dead.number)
        assert dead.fs.slot is not None
        survivor.fs.recover_slot(dead.fs.slot)


class TableLocks:
    """The `ClusterLocks` of one node."""

    def __init__(self, table: LockTable, node: int) -> None:
        self._table = table
        self._node = node
        self.uses: Counter[tuple[bytes, Mode]] = Counter()
        self.downconvert: Callable[[bytes, Mode], None] = lambda _name, _to: None

    def acquire(self, name: bytes, mode: Mode) -> None:
        assert self.try_acquire(name, mode, wait=True)

    def try_acquire(self, name: bytes, mode: Mode, *, wait: bool = False) -> bool:
        holders = self._table.holds.setdefault(name, {})
        if holders.get(self._node, Mode.NL) < mode:
            for other, held in list(holders.items()):
                if other == self._node or compatible(held, mode):
                    continue
                if not wait:
                    return False
                to = Mode.PR if mode == Mode.PR else Mode.NL
                node = self._table.nodes[other]
                using = [used for used in Mode if node.locks.uses[name, used]]
                assert not using, f"node {self._node} waits for {name!r} of node {other}"
                self._table.downconverts += 1
                try:
                    node.locks.downconvert(name, to)
                except OSError:
                    # It died while it gave the lock up: whoever waits for it recovers it first.
                    assert node.device.cut
                    self._table.bury(node, self._table.nodes[self._node])
                    continue
                holders[other] = to
            holders[self._node] = mode
            if mode == Mode.EX:
                self._table.tokens[name] += 1
        self.uses[name, mode] += 1
        return True

    def release(self, name: bytes, mode: Mode) -> None:
        assert self.uses[name, mode] > 0
        self.uses[name, mode] -= 1

    def pin(self, name: bytes) -> None:
        self.acquire(name, Mode.EX)
        self.uses[name, Mode.EX] -= 1

    def unpin(self, name: bytes) -> None:
        """Nothing was counted."""

    def value(self, name: bytes) -> bytes | None:
        return self._table.values.get(name, bytes(VALUE_BYTES))

    def set_value(self, name: bytes, value: bytes) -> None:
        assert self._table.holds[name][self._node] == Mode.EX
        self._table.values[name] = value

    def token(self, name: bytes) -> int:
        return self._table.tokens[name]

    def drop(self, name: bytes) -> None:
        assert not any(self.uses[name, mode] for mode in Mode)
        holders = self._table.holds.get(name, {})
        holders.pop(self._node, None)
        value = self.value(name)
        if not holders and value is not None and not value[-1]:
            self._table.values.pop(name, None)

    @property
    def in_use(self) -> int:
        return sum(self.uses.values())


@dataclass
class Node:
    """One mounted node."""

    number: int
    device: SharedImage
    locks: TableLocks
    fs: Ocfs2
    vfs: Vfs


class Cluster:
    """Nodes that share the image at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = LockTable()
        self.clock = Clock()

    def join(
        self,
        number: int,
        pages: Callable[[Ocfs2], FilePages] | None = None,
        **options: object,
    ) -> Node:
        """Mount as one more node."""
        device = SharedImage(self.path)
        locks = TableLocks(self.table, number)

        # Other nodes may ask before the mount is done.
        node = Node(number, device, locks, None, None)  # type: ignore[arg-type]
        self.table.nodes[number] = node
        node.fs = Ocfs2(
            device,
            clock_ns=self.clock,
            locks=locks,
            node=number,
            **{"live_nodes": lambda: set(self.table.nodes), **options},  # type: ignore[arg-type]
        )
        cache = pages(node.fs) if pages else DirectPages(node.fs)
        node.vfs = Vfs(node.fs, cache)
        return node

    def leave(self, node: Node) -> None:
        """Unmount; the node's locks are given back."""
        node.vfs.unmount()
        assert node.locks.in_use == 0
        del self.table.nodes[node.number]
        for holders in self.table.holds.values():
            holders.pop(node.number, None)

    def kill(self, node: Node) -> None:
        """The node is dead from now on, in the middle of whatever it did."""
        node.device.cut = True
        node.device.close()
        self.table.kill(node.number)

    def snapshot(self, path: Path) -> Path:
        """A copy of the image as it is now."""
        shutil.copyfile(self.path, path)
        return path
