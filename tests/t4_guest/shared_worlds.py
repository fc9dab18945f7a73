"""Nodes that share a disk, a pool and a lock table, in one process: a model of a cluster as small
as it can be, with the real page cache, the real shared cleancache and the real machine.

The lock table is what a lock manager promises, without messages: shared and exclusive locks of
files, a token that grows with each exclusive grant, and a value that tells its next holders of
flushes that were not delivered, or that is not valid.  A node keeps its locks until another wants
them.  A node that was declared dead may be a zombie: it still believes in its locks, and what it
does with them must harm nobody.
"""

from __future__ import annotations

import errno
import mmap
import random
from collections.abc import Callable, Iterator
from typing import Final, cast

from fs.block.device import BLOCK_BYTES, Bytes
from fs.filesystem import FileSystem
from fs.hooks import FileKey
from fs.inode import Inode
from guests.attachment import Attachment
from guests.cleancache import object_id
from guests.memory import FRAMES_MIN, TRANSFER_PAGES, Budget, Memory
from guests.pagecache import PageCache
from guests.sharedcache import SharedCleancache
from hypervisor.administration import Administration
from hypervisor.arena import Arena, format_arena
from hypervisor.auth import Grants, Role
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.recovery import recover
from ipc.channel import Channel
from ipc.errors import Disconnected
from ipc.local import Fault, LocalChannel
from ipc.window import Window
from tests.support.expectations import held_pages

PAGE: Final = BLOCK_BYTES
UUID: Final = b"file system uuid"
FILES: Final = 4
FILE_PAGES: Final = 24
"""All files together do not fit a node's memory."""
SHARED: Final = "shared"
EXCLUSIVE: Final = "exclusive"


class SharedHypervisor:
    """The machine for several guests, which can be killed and started again."""

    def __init__(self, arena_bytes: int = 1 << 20) -> None:
        self._mapping = mmap.mmap(-1, arena_bytes)
        format_arena(self._mapping)
        self.grants = Grants()
        self.is_up = True
        self.boots = 0
        self.boot()

    def boot(self) -> None:
        """On the arena as it is."""
        self.boots += 1
        self.machine = Machine(Arena(self._mapping), grants=self.grants)
        recover(self.machine)
        self.is_up = True

    def kill(self, *, arena_lost: bool = False) -> None:
        """All attachments end."""
        self.is_up = False
        if arena_lost:
            self._mapping[:] = bytes(len(self._mapping))
            format_arena(self._mapping)

    def attach(self, node: Node) -> Channel:
        """As `ipc.attach.connect` does."""
        if not self.is_up:
            raise Disconnected("no hypervisor")
        machine = self.machine
        name = node.name
        resumed = name in machine.clients
        assert machine.attach(name, 1, 1, 0) is not None

        def execute(request: bytes, window: Window) -> bytes:
            if not self.is_up or self.machine is not machine:
                raise Disconnected("it died while the call waited")
            return machine.execute(machine.clients[name], request, window)

        def faults() -> Iterator[Fault]:
            while True:
                gone = not self.is_up or self.machine is not machine
                yield Fault.LOSE_REQUEST if gone else node.draw_fault()

        return LocalChannel(
            execute,
            faults=faults(),
            meanwhile=node.stand_still,
            generation=machine.generation,
            resumed=resumed,
        )

    def drop_pages(self, pages: int) -> None:
        """Ephemeral pages may go at any time."""
        if self.is_up:
            Administration(self.machine).answer({"verb": "flush", "size_bytes": pages * PAGE})

    def held(self) -> dict[tuple[int, int], bytes]:
        """(object id, index) -> page, of the shared pool."""
        pool = self.machine.memberships.shared.get(UUID)
        return {} if pool is None else held_pages(pool, self.machine)


class SharedDisk:
    """Blocks in memory, behind write fencing."""

    def __init__(self) -> None:
        self.data = bytearray(FILES * FILE_PAGES * PAGE)
        self.reads = 0

    def page(self, number: int) -> bytes:
        """What is there."""
        return bytes(self.data[number * PAGE : (number + 1) * PAGE])


class NodeDisk:
    """One node's way to the disk, and its file system: file n has pages n * FILE_PAGES and on."""

    block_bytes = PAGE
    read_only = False

    def __init__(self, disk: SharedDisk) -> None:
        self._disk = disk
        self.fenced = False
        self.device = self

    def read(self, block: int, count: int, into: memoryview) -> None:
        self._disk.reads += count
        into[: count * PAGE] = self._disk.data[block * PAGE : (block + count) * PAGE]

    def write(self, block: int, count: int, data: Bytes) -> None:
        if self.fenced:
            raise OSError(errno.EIO, "this node is fenced")
        self._disk.data[block * PAGE : (block + count) * PAGE] = data

    def map_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        first = inode.ino * FILE_PAGES + index
        return list(range(first, first + count))

    def allocate_blocks(self, inode: Inode, index: int, count: int) -> None:
        """All are there from the beginning."""


class _NoBlockZero(NodeDisk):
    """Block 0 means a hole, so the numbers that the page cache sees are higher by one."""

    def read(self, block: int, count: int, into: memoryview) -> None:
        super().read(block - 1, count, into)

    def write(self, block: int, count: int, data: Bytes) -> None:
        super().write(block - 1, count, data)

    def map_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        return [block + 1 for block in super().map_blocks(inode, index, count)]


class Lock:
    """Of one file."""

    def __init__(self) -> None:
        self.token = 0
        self.holders: dict[Node, str] = {}
        self.is_valid = True
        self.is_marked = False
        """Flushes are owed by somebody who no longer has the lock."""


class Dead(Exception):
    """The node was declared dead during what it did; nobody waits for the answer."""


class Node:
    """A page cache over the shared pool."""

    def __init__(self, cluster: Cluster, name: str, *, reader: bool = False) -> None:
        self.cluster = cluster
        self.name = name
        self.reader = reader
        self.draw_fault: Callable[[], Fault] = lambda: Fault.NONE
        self.meanwhile: Callable[[], None] = lambda: None
        self.may_attach = True
        self.dead = False
        self.tokens: dict[FileKey, int] = {}
        """Of the locks that it believes to hold."""
        self.stale_needs: list[int] = []
        self.disk = _NoBlockZero(cluster.disk)
        self.cache = SharedCleancache(
            Attachment(self._connect, lambda: cluster.seconds),
            UUID,
            self.tokens.get,
            on_stale=self._was_stale,
        )
        budget = Budget(FRAMES_MIN + TRANSFER_PAGES, FRAMES_MIN, TRANSFER_PAGES, 0, 0)
        self.pages = PageCache(cast("FileSystem", self.disk), Memory(budget), self.cache)
        self.inodes = [
            Inode(ino, 7, 0o100644, 1, 0, 0, FILE_PAGES * PAGE, 0, 0, 0, 0) for ino in range(FILES)
        ]

    def _connect(self) -> Channel:
        if not self.may_attach:
            raise Disconnected("too late")
        return self.cluster.hypervisor.attach(self)

    def stand_still(self) -> None:
        """In the middle of a call."""
        self.meanwhile()

    def _was_stale(self, key: FileKey, needed: int) -> None:
        self.stale_needs.append(needed)
        if self.cluster.lifts and not self.dead:
            # What a lock manager can do when the hypervisor has forgotten which token was whose.
            lock = self.cluster.locks[key.ino]
            lock.token = max(lock.token, needed)
            for holder in lock.holders:
                holder.tokens[key] = lock.token

    # --- what a program does

    def read(self, file: int, index: int) -> bytes:
        """A page, under the file's lock."""
        self._lock(file, SHARED)
        page = self.pages.read(self.inodes[file], index * PAGE, PAGE)
        self._still_alive()
        return page

    def write(self, file: int, index: int, page: bytes) -> None:
        """Likewise."""
        self._lock(file, EXCLUSIVE)
        self.pages.write(self.inodes[file], index * PAGE, page)
        self._still_alive()

    def sync(self) -> None:
        """All that is dirty."""
        self.pages.sync_all()
        self._still_alive()

    def _still_alive(self) -> None:
        if self.dead:
            raise Dead

    # --- locks

    def _lock(self, file: int, mode: str) -> None:
        lock = self.cluster.locks[file]
        key = self.inodes[file].key
        mine = lock.holders.get(self)
        if mine in (EXCLUSIVE, mode):
            return
        # One after the other: while one gives it up, others may go on, and take it.
        while conflicting := [
            other
            for other, theirs in lock.holders.items()
            if other is not self and EXCLUSIVE in (mode, theirs)
        ]:
            conflicting[0].give_up(file, mode)
        self._still_alive()
        if mode == EXCLUSIVE:
            lock.token += 1
            for holder in lock.holders:
                holder.tokens[key] = lock.token
        lock.holders[self] = mode
        self.tokens[key] = lock.token
        if lock.is_marked or not lock.is_valid:
            self.cache.distrust(key)
            self._still_alive()

    def give_up(self, file: int, wanted: str) -> None:
        """Another wants the lock."""
        lock = self.cluster.locks[file]
        inode = self.inodes[file]
        was = lock.holders[self]
        try:
            self.pages.sync(inode)
            if wanted == EXCLUSIVE:
                self._invalidate(file)
        except OSError:
            if not self.dead:
                raise
        if self.dead:
            # It died in the course of it, and its locks were taken away.
            return
        if was == EXCLUSIVE:
            lock.is_marked = not self.cluster.settle(self, inode.key)
            lock.is_valid = True
            if self.dead:
                # The value never reached anybody.
                lock.is_valid = False
                return
        if lock.is_marked:
            self.cache.hand_over(inode.key)
        if wanted == EXCLUSIVE:
            del lock.holders[self]
            del self.tokens[inode.key]
        else:
            lock.holders[self] = SHARED
            if lock.is_marked:
                # It reads on, with a lock whose value is marked.
                self.cache.distrust(inode.key)

    def _invalidate(self, file: int) -> None:
        """Offer the file's pages to the pool, while the lock is held, and drop them."""
        found = self.pages._files.get(file)
        if found is not None and found.frames:
            indexes = sorted(found.frames)
            self.pages._let_go([(found, indexes)])

    def offer_all(self) -> None:
        """What a zombie does when it wakes: it lets all its clean pages go."""
        for file in range(FILES):
            found = self.pages._files.get(file)
            if found is not None:
                clean = sorted(found.frames.keys() - found.dirty)
                if clean:
                    self.pages._let_go([(found, clean)])


class Cluster:
    """The disk, the hypervisor, the locks and the nodes."""

    def __init__(self, nodes: int = 2, *, readers: int = 0, arena_bytes: int = 1 << 20) -> None:
        self.seconds = 1000.0
        self.lifts = False
        """Whether a refusal makes the file's token jump."""
        self.disk = SharedDisk()
        self.hypervisor = SharedHypervisor(arena_bytes)
        self.locks = [Lock() for _ in range(FILES)]
        self.nodes: list[Node] = []
        self.zombies: list[Node] = []
        self.truth = [[bytes(PAGE)] * FILE_PAGES for _ in range(FILES)]
        """What a read must find."""
        self.settle: Callable[[Node, FileKey], bool] = lambda node, key: node.cache.settle(key)
        for number in range(nodes + readers):
            self.add(f"n{number}", reader=number >= nodes)

    def add(self, name: str, *, reader: bool) -> Node:
        """A node mounts the file system."""
        role = Role.READER if reader else Role.WRITER
        self.hypervisor.grants.allow(UUID, name, role)
        node = Node(self, name, reader=reader)
        node.cache.attach()
        self.nodes.append(node)
        return node

    def declare_dead(self, node: Node) -> None:
        """Its locks are taken away, its writes refused; it need not know."""
        assert not node.dead
        node.dead = node.disk.fenced = True
        # Its lease has run out, so it joins nothing any more; what it has said already may arrive.
        node.may_attach = False
        self.nodes.remove(node)
        self.zombies.append(node)
        for file, lock in enumerate(self.locks):
            if lock.holders.pop(node, None) == EXCLUSIVE:
                lock.is_valid = False
                for index in range(FILE_PAGES):
                    self.truth[file][index] = self.disk.page(file * FILE_PAGES + index)

    def bury(self, node: Node) -> Node:
        """A zombie's process ends, and the node comes back as another."""
        self.zombies.remove(node)
        machine = self.hypervisor.machine
        if self.hypervisor.is_up and node.name in machine.clients:
            machine.depart(machine.clients[node.name])
        return self.add(node.name, reader=node.reader)

    def check(self) -> None:
        """The machine's invariants; and what the pool holds of a file is what the disk holds,
        unless its lock says that nobody may believe it."""
        if not self.hypervisor.is_up:
            return
        check(self.hypervisor.machine)
        held = self.hypervisor.held()
        for file, lock in enumerate(self.locks):
            key = FileKey(file, 7)
            if lock.is_marked or not lock.is_valid:
                continue
            if any(key in node.cache._owed for node in self.nodes):
                continue
            oid = int.from_bytes(object_id(key), "little")
            for index in range(FILE_PAGES):
                page = held.get((oid, index))
                assert page in (None, self.disk.page(file * FILE_PAGES + index)), (
                    f"the pool holds an old page {index} of file {file}"
                )


class History:
    """Random steps of a cluster; every read is compared with what was written last."""

    def __init__(self, seed: int, *, nodes: int = 3, readers: int = 0) -> None:
        self.random = random.Random(seed)
        self.cluster = Cluster(
            nodes, readers=readers, arena_bytes=self.random.choice((1 << 19, 1 << 20))
        )
        self.cluster.lifts = self.random.random() < 0.5
        self.trouble = self.random.choice((0.0, 0.01, 0.05))
        self.version = 0
        self.stale = 0
        self.hits = 0
        self.handed_over = 0
        self.depth = 0
        self.busy: list[Node] = []
        """In the middle of something, so they begin nothing else."""
        for node in self.cluster.nodes:
            self._arm(node)

    def _arm(self, node: Node) -> None:
        node.draw_fault = self._draw_fault
        node.meanwhile = lambda: self._meanwhile(node)

    def _draw_fault(self) -> Fault:
        if self.random.random() >= self.trouble:
            return Fault.NONE
        return self.random.choice(
            (Fault.LOSE_REQUEST, Fault.LOSE_REPLY, Fault.LATE_REQUEST, Fault.LATE_REPLY)
        )

    def _meanwhile(self, node: Node) -> None:
        """The node stands still in the middle of a call, for so long that it is declared dead."""
        if self.depth or node.dead or not {*self.cluster.nodes} - {node, *self.busy}:
            return
        self.depth += 1
        self.cluster.declare_dead(node)
        for _ in range(self.random.randrange(12)):
            self.use()
        self.depth -= 1

    def page(self) -> bytes:
        self.version += 1
        return random.Random(self.version).randbytes(16) * (PAGE // 16)

    def use(self) -> None:
        """Somebody reads or writes."""
        cluster, rng = self.cluster, self.random
        node = rng.choice([node for node in cluster.nodes if node not in self.busy])
        self.busy.append(node)
        file, index = rng.randrange(FILES), rng.randrange(FILE_PAGES)
        choice = rng.random()
        try:
            if choice < 0.35 and not node.reader:
                page = self.page()
                node.write(file, index, page)
                cluster.truth[file][index] = page
            elif choice < 0.4:
                node.sync()
            else:
                page = node.read(file, index)
                assert page == cluster.truth[file][index], (
                    f"{node.name} read an old page {index} of file {file}"
                )
        except (Dead, OSError):
            if not node.dead:
                raise
        finally:
            self.busy.remove(node)

    def step(self) -> None:
        cluster, rng = self.cluster, self.random
        cluster.seconds += rng.choice((0.0, 0.0, 0.1, 0.6))
        choice = rng.random()
        if choice < 0.90:
            self.use()
        elif choice < 0.92:
            cluster.hypervisor.drop_pages(rng.randrange(1, 60))
        elif choice < 0.94:
            if not cluster.hypervisor.is_up:
                cluster.hypervisor.boot()
            elif rng.random() < 0.3:
                cluster.hypervisor.kill(arena_lost=rng.random() < 0.2)
        elif choice < 0.96 and len(cluster.nodes) > 1:
            cluster.declare_dead(rng.choice(cluster.nodes))
        elif cluster.zombies and choice < 0.98:
            zombie = rng.choice(cluster.zombies)
            zombie.offer_all()
        elif cluster.zombies:
            zombie = rng.choice(cluster.zombies)
            self.count(zombie)
            self._arm(cluster.bury(zombie))
        cluster.check()

    def count(self, node: Node) -> None:
        """What came of it, of a node that goes."""
        self.stale += node.cache.stale
        self.hits += node.cache.succ_gets
        self.handed_over += node.cache.handed_over

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        for node in [*self.cluster.nodes, *self.cluster.zombies]:
            self.count(node)
