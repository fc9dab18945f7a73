"""A cluster in one process: real file systems and real nodes on one disk, one step at a time.

Real: `Ocfs2`, `Vfs`, the guest's page cache, `NodeLocks`, and `guests.node.Node`, which recovers
dead nodes as a guest does. Stand-ins: the network (`fs.dlm.twin`), the disk (memory, with a log of
all writes), and membership, which this world decides: a dead node is seen to be dead after some
turns, and each survivor hears of it when it likes.

Each node's program is a thread of its own, of which one runs at a time (`rota`); what comes next
is drawn from the seed. A step is each message sent, each message delivered, each block write and
each flush. `victim` dies before step `dies_at`, whoever takes that step: nothing that it does or
sent itself from then on has any effect, though what it sent before may still arrive.

The same seed gives the same steps: nothing here looks at a clock or at addresses, and the garbage
collector, which would let inodes leave memory at some time, is off.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from unittest import mock

from fs.block.device import BLOCK_BYTES, Bytes
from fs.block.memory import MemoryDevice
from fs.block.writelog import LoggingDevice
from fs.dlm.twin import Twin
from fs.hooks import NoHooks, SharedPageHooks
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.slots import NODES_MAX
from fs.vfs import Vfs
from guests import node as guest
from guests.memory import FRAMES_MIN, TRANSFER_PAGES, Budget, Memory
from guests.pagecache import PageCache
from guests.shareddisk import Layout
from guests.verification import Verification
from tests.support.ocfs2 import Clock
from tests.t3_fs.dlm.rota import Program
from tests.t5_cluster.ocfs2.operations import Kind, Operation, perform
from tests.t5_cluster.ocfs2.poisoned import CAPACITY

TURN_NS: Final = 5_000_000
TURNS_MAX: Final = 20_000
"""Of one operation: after that it waits for ever."""
UNSEEN_TURNS_MAX: Final = 60
"""How long a death may go unseen."""
ORPHAN_SCAN_TURNS: Final = 20
SLOTS: Final = 3


class Died(BaseException):
    """The node that was running is dead."""


class World:
    """Image, nodes, network and membership; runs a workload."""

    def __init__(
        self,
        image: MemoryDevice,
        seed: int,
        *,
        victim: int | None = None,
        dies_at: int | None = None,
        pool: SharedPageHooks | None = None,
    ) -> None:
        """With a `pool` all nodes share it, and verify what comes from there."""
        self.chance = random.Random(seed)
        self.pool = pool
        self.salts = random.Random(seed)
        self.verifications: list[Verification] = []
        self.disk = image.copy()
        self.log = LoggingDevice(self.disk)
        self.twin = Twin()
        self.clock = Clock()
        self.now_ns = 10**12
        self.nodes: dict[int, Node] = {}
        self.views: list[tuple[frozenset[int], frozenset[int]]] = []
        """Members, and who is newly dead; the epoch is the place in this list plus one."""
        self.victim = victim
        self.dies_at = dies_at
        self.death_unseen_turns: int | None = None
        self.steps = 0
        self.running: int | None = None
        """The operation under way."""
        self.epochs: list[int] = []
        """For each operation that began, the number of the log's epoch then."""
        self.began_at: list[int] = []
        """For each operation, how many steps there had been; and for the end of all."""
        self.outcomes: list[object] = []
        self.died_in: int | None = None
        """The operation during which the victim died."""

    @property
    def members(self) -> frozenset[int]:
        """Who is in the newest view."""
        return self.views[-1][0] if self.views else frozenset()

    def step(self, node: int) -> None:
        """`node` is about to do something that others could see."""
        self.steps += 1
        if self.steps == self.dies_at and self.victim in self.nodes:
            self._kill(self.victim)
        if node not in self.nodes:
            raise Died

    def _kill(self, victim: int) -> None:
        self.died_in = self.running
        self.nodes.pop(victim).dead = True
        self.twin.kill(victim)
        self.death_unseen_turns = self.chance.randrange(UNSEEN_TURNS_MAX)

    # What happens

    def run(self, operations: list[Operation]) -> None:
        """Do a workload."""
        every: list[Node] = []
        try:
            with _no_collector():
                for number, operation in enumerate(operations):
                    self.running = number
                    self.began_at.append(self.steps)
                    self.epochs.append(len(self.log.epochs) - 1)
                    self.outcomes.append(self._do(number, operation, every))
                self.began_at.append(self.steps)
        finally:
            for node in every:
                node.dead = True
                with contextlib.suppress(Died):
                    node.program.stop()

    def _do(self, number: int, operation: Operation, every: list[Node]) -> object:
        if operation.kind == Kind.JOIN:
            every.append(self._start(operation.node))
        node = self.nodes.get(operation.node)
        if node is None:
            return Died
        if operation.kind == Kind.LEAVE:
            self._until(lambda: self.at_rest, "recovery")
        node.give(operation)
        self._until(lambda: node.dead or node.operation is None, str(operation))
        if node.dead:
            return Died
        if operation.kind == Kind.LEAVE:
            del self.nodes[operation.node]
            self.twin.kill(operation.node)
        self.log.mark(number)
        return node.outcome

    def _start(self, number: int) -> Node:
        node = Node(self, number)
        self.nodes[number] = node
        self.twin.attach(number, node)
        self.new_view(self.members | {number}, frozenset())
        return node

    def new_view(self, members: frozenset[int], dead: frozenset[int]) -> None:
        """All members will hear of it."""
        self.views.append((members, dead))
        for node in self.nodes.values():
            if node.heard is None:
                node.heard = len(self.views) - 1

    @property
    def at_rest(self) -> bool:
        """Everybody knows the newest view, and the dead are recovered."""
        return self.death_unseen_turns is None and all(
            node.heard == len(self.views) and not node.guest._dead and not node.guest._abandoned
            for node in self.nodes.values()
        )

    def _until(self, done: Callable[[], bool], what: str) -> None:
        for _ in range(TURNS_MAX):
            if done():
                return
            self._turn()
        raise AssertionError(f"waits for ever: {what}")

    def _turn(self) -> None:
        chance = self.chance
        self.now_ns += TURN_NS
        for _ in range(chance.randrange(1, 6)):
            with contextlib.suppress(Died):
                self.twin.step(chance)
        if self.death_unseen_turns is not None:
            self.death_unseen_turns -= 1
            if self.death_unseen_turns < 0:
                assert self.victim is not None
                self.death_unseen_turns = None
                if self.victim in self.members:
                    self.new_view(self.members - {self.victim}, frozenset({self.victim}))
        if self.nodes:
            node = self.nodes[chance.choice(list(self.nodes))]
            with contextlib.suppress(Died):
                if chance.random() < 0.3:
                    node.hear()
                node.program.run()


class Node:
    """A guest's node and its program."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.dead = False
        self.heard: int | None = None
        """How many views it knows."""
        self.operation: Operation | None = None
        self.outcome: object = None
        self.handles: dict[str, int] = {}
        self.vfs: Vfs | None = None
        self.guest = self._make_guest()
        self.program = Program(self._life)

    def _make_guest(self) -> guest.Node:
        layout = Layout(b"", SLOTS, 0, NODES_MAX)
        names = tuple(f"guest{number}" for number in range(SLOTS))
        spec = guest.NodeSpec(
            "data", self.number, names, bytes(32), orphan_scan_ns=ORPHAN_SCAN_TURNS * TURN_NS
        )
        with mock.patch.multiple(
            guest,
            SharedDevice=lambda *_, **__: Disk(self),
            Mesh=lambda *_, **__: Network(self),
            ClusterNode=lambda *_, **__: Membership(self),
            Region=mock.Mock(),
            read_layout=lambda _: layout,
        ):
            return guest.Node(
                spec,
                Path("volume"),
                Path(),
                clock_ns=lambda: self.world.now_ns,
                random_bytes=bytes,
            )

    def give(self, operation: Operation) -> None:
        """Something to do."""
        self.operation, self.outcome = operation, None

    def hear(self) -> None:
        """Of the next view."""
        assert self.heard is not None
        if self.heard < len(self.world.views):
            members, dead = self.world.views[self.heard]
            self.heard += 1
            if self.number in members:
                self.guest.view(self.heard, members, dead)

    def deliver(self, from_node: int, message: bytes) -> None:
        """A message has come."""
        self.world.step(self.number)
        self.guest.mesh.received(from_node, message)

    def _life(self, program: Program) -> None:
        try:
            while True:
                program.wait()
                if self.operation is not None:
                    self.outcome = self._perform(self.operation)
                    self.operation = None
                else:
                    self.guest.pump()
        except Died:
            pass
        except Exception:
            if not self.dead:
                raise

    def _perform(self, operation: Operation) -> object:
        if operation.kind == Kind.JOIN:
            self.guest.join()
            self._mount()
            return None
        assert self.vfs is not None
        if operation.kind == Kind.LEAVE:
            self.vfs.unmount()
            self.guest.leave()
            return None
        return perform(self.vfs, self.handles, operation)

    def _mount(self) -> None:
        fs = Ocfs2(
            self.guest.volume_device,
            clock_ns=self.world.clock,
            locks=self.guest.locks,
            node=self.number,
            live_nodes=self.guest.live,
            keep_checksums=self.world.pool is not None,
            random_bytes=self.world.salts.randbytes,
            checksums_capacity=CAPACITY,
        )
        self.guest.mounted(fs)
        budget = Budget(FRAMES_MIN + TRANSFER_PAGES, FRAMES_MIN, TRANSFER_PAGES, 0, 0)
        memory, pool = Memory(budget), self.world.pool
        if pool is None:
            pages = PageCache(fs, memory, NoHooks())
        else:
            assert fs.checksums is not None
            verification = Verification(fs.checksums, pool.flush_page, lambda: 0.0)
            self.world.verifications.append(verification)
            pages = PageCache(fs, memory, pool, pool, verification)
        self.vfs = Vfs(fs, pages)


class Disk:
    """One node's way to the disk."""

    block_bytes = BLOCK_BYTES
    read_only = False

    def __init__(self, node: Node) -> None:
        self._node = node
        self._log = node.world.log
        self.blocks = self._log.blocks
        self.lease: object = None

    def read(self, block: int, count: int, into: memoryview) -> None:
        if self._node.dead:
            raise Died
        self._log.read(block, count, into)

    def write(self, block: int, count: int, data: Bytes) -> None:
        view = memoryview(data)
        for number in range(count):
            self._node.world.step(self._node.number)
            self._log.write(
                block + number, 1, view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            )

    def flush(self) -> None:
        self._node.world.step(self._node.number)
        self._log.flush()

    def close(self) -> None:
        """Nothing to give back."""


class Network:
    """In place of the mesh; whoever waits for a message lets the world go on."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._transport = node.world.twin.transport(node.number)
        self.refused: Counter[object] = Counter()
        self.received: Callable[[int, bytes], None]

    def send(self, to_node: int, message: bytes) -> None:
        self._node.world.step(self._node.number)
        self._transport.send(to_node, message)

    def poll(self, seconds: float) -> None:
        if seconds:
            self._node.program.wait()

    def close(self) -> None:
        """Nothing to give back."""


class Membership:
    """In place of the cluster node: the world knows who lives."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.fence = self

    def tick(self, now_ns: int) -> None:
        """Nothing is due."""

    def trip(self, reason: str) -> None:
        if not self._node.dead:
            raise AssertionError(f"node {self._node.number} fences itself: {reason}")

    def expired(self) -> bool:
        return False

    def leave(self) -> None:
        world = self._node.world
        world.new_view(world.members - {self._node.number}, frozenset())
        self._node.guest.left()


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
