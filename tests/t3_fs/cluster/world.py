"""A cluster in one thread: nodes, one disk with reservations, links, and a clock, all from a seed.

Everything that can be asked about safety is asked after each step (`check`) and at each event; a
violation is an AssertionError whose text names the seed.
"""

from __future__ import annotations

import errno
import heapq
import random
from collections.abc import Callable
from functools import partial

from fs.block.reservations import ReservationConflict
from fs.cluster.config import Timing
from fs.cluster.node import ClusterNode
from fs.cluster.region import SECTOR_BYTES, Region
from fs.cluster.view import View

MS = 1_000_000
STEP_NS = 20 * MS
TIMING = Timing(
    heartbeat_interval_ns=100 * MS,
    dead_threshold=5,
    idle_timeout_ns=300 * MS,
    keepalive_ns=100 * MS,
    reconnect_ns=100 * MS,
)


class Killed(BaseException):
    """Unwinds a node that was killed in the middle of what it did."""


class Disk:
    """Sectors, reservation keys, and who is inside a guarded write."""

    def __init__(self, world: World, nodes: int) -> None:
        self.world = world
        self.sectors = [bytes(SECTOR_BYTES)] * nodes
        self.keys: dict[int, int] = {}
        self.guarded: dict[int, int] = {}

    def preempt(self, node: int, key: int) -> bool:
        """As `Reservations.preempt`."""
        if self.keys.get(node) == key:
            del self.keys[node]
        elif node in self.keys:
            return True
        return node not in self.guarded


class Guest:
    """One incarnation of a node, with its own door to the disk."""

    def __init__(self, world: World, node: int, generation: int, timing: Timing) -> None:
        self.world = world
        self.number = node
        self.generation = generation
        self.epochs: list[int] = []
        self.end: str | None = None
        self.paused = False
        self.killed = False
        self.broken_reads = self.broken_writes = False
        world.disk.keys[node] = generation
        self.node = ClusterNode(
            node,
            generation,
            timing=timing,
            region=Region(self, 0, len(world.disk.sectors)),
            reservations=self,
            clock=lambda: world.now_ns,
            send=lambda to, message: world.post(self, to, message),
            events=self,
            names={n: f"web{n}" for n in range(len(world.disk.sectors))},
        )

    @property
    def running(self) -> bool:
        """Neither killed nor at an end."""
        return not self.killed and self.end is None

    # -- device

    def read_sectors(self, sector: int, count: int) -> bytes:
        """All sectors; the node may be stopped before and after."""
        self.world.maybe_pause(self)
        if self.broken_reads:
            raise OSError(errno.EIO, "broken")
        data = b"".join(self.world.disk.sectors[sector : sector + count])
        self.world.maybe_pause(self)
        return data

    def write_sector(self, sector: int, data: bytes) -> None:
        """A guarded write; the node may be stopped at each point."""
        assert sector == self.number
        if self.broken_writes:
            raise OSError(errno.EIO, "broken")
        self.guarded(lambda: self.world.disk.sectors.__setitem__(sector, data))

    def guarded(self, write: Callable[[], None]) -> None:
        """Check the key, then write, under the guard byte."""
        disk = self.world.disk
        self.world.maybe_pause(self)
        disk.guarded[self.number] = self.generation
        try:
            if disk.keys.get(self.number) != self.generation:
                raise ReservationConflict(errno.EIO, f"node {self.number} was preempted")
            self.world.maybe_pause(self, rarely=True)
            write()
        finally:
            disk.guarded.pop(self.number, None)
        self.world.maybe_pause(self)

    def preempt(self, node: int, key: int) -> bool:
        """Take a reservation."""
        return self.world.disk.preempt(node, key)

    def gone(self, node: int, key: int) -> bool:
        """Whether that process has ended; a world may know nothing of processes."""
        guest = self.world.guests.get(node)
        if guest is None or guest.generation < key or not self.world.knows_processes:
            return False
        return guest.generation > key or guest.killed

    def finish_off(self, node: int, key: int) -> bool:
        """Kill the guest that sits in the guard."""
        victim = self.world.guests.get(node)
        if victim is None or victim.generation != key or self.world.disk.guarded.get(node) != key:
            return False
        self.world.kill(node)
        return True

    def write_data(self) -> None:
        """What a file system does: check the lease, then write."""
        try:
            self.node.fence.check()
            self.world.maybe_pause(self)
            self.guarded(partial(self.world.data_written, self))
        except OSError:
            return

    # -- events

    def view(self, epoch: int, members: frozenset[int], dead: frozenset[int]) -> None:
        """Checked at once."""
        view = self.node.current
        assert view is not None and view.epoch == epoch and view.members == members
        self.world.installed(self, view, dead)
        self.epochs.append(epoch)

    def fenced(self, reason: str) -> None:
        """Out."""
        self._ended(f"fenced: {reason}")

    def left(self) -> None:
        """Gone."""
        self._ended("left")

    def refused(self, reason: str) -> None:
        """Not let in."""
        self._ended(f"refused: {reason}")

    def _ended(self, how: str) -> None:
        assert self.end is None, (self.world.seed, self.end, how)
        self.end = how


class World:
    """All guests and what is between them."""

    def __init__(self, seed: int, nodes: int, *, timing: Timing = TIMING) -> None:
        self.seed = seed
        self.timing = timing
        self.rng = random.Random(seed)
        self.knows_processes = self.rng.random() < 0.5
        self.now_ns = 10**9
        self.disk = Disk(self, nodes)
        self.guests: dict[int, Guest] = {}
        self.views: dict[int, View] = {}
        self.cuts: set[frozenset[int]] = set()
        self.lost_since_ns: dict[frozenset[int], int] = {}
        self.linked: set[frozenset[int]] = set()
        self.loss = self.doubled = 0.0
        self.delay_ns = 10 * MS
        self.pause_chance = 0.0
        self.longest_pause_ns = 0
        self.written = 0
        self._depth = 0
        self._posted: list[tuple[int, int, Guest, int, bytes]] = []
        self._count = 0
        self._generations = iter(range(0x1000, 1 << 32))

    # -- what tests do

    def start(self, node: int, timing: Timing | None = None) -> Guest:
        """A new incarnation; the former one must be gone."""
        old = self.guests.get(node)
        assert old is None or not old.running
        if old is not None:
            old.killed = True
        guest = Guest(self, node, next(self._generations), timing or self.timing)
        self.guests[node] = guest
        self.linked = {pair for pair in self.linked if node not in pair}
        return guest

    def kill(self, node: int) -> None:
        """As SIGKILL: locks go with the process."""
        self.guests[node].killed = True
        if self.disk.guarded.get(node) == self.guests[node].generation:
            del self.disk.guarded[node]

    def run(self, duration_ns: int) -> None:
        """Let time pass."""
        end_ns = self.now_ns + duration_ns
        while self.now_ns < end_ns:
            self.now_ns += STEP_NS
            self._mesh()
            self._deliver()
            for guest in self.shuffled():
                self._do(guest, partial(guest.node.tick, self.now_ns))
                if self.rng.random() < 0.3:
                    self._do(guest, guest.write_data)
            self.check()

    def shuffled(self) -> list[Guest]:
        """Running guests in any order."""
        guests = [guest for guest in self.guests.values() if guest.running]
        self.rng.shuffle(guests)
        return guests

    def settle(self) -> dict[int, Guest]:
        """No more faults; run until nothing can change any more; the survivors."""
        self.loss = self.doubled = self.pause_chance = 0.0
        self.cuts.clear()
        for guest in self.guests.values():
            guest.broken_reads = guest.broken_writes = False
        self.run(20 * self.timing.dead_ns)
        alive = {node: guest for node, guest in self.guests.items() if guest.running}
        views = {guest.node.current for guest in alive.values()}
        assert len(views) <= 1, (self.seed, views)
        for view in views:
            assert view is not None and view.members == alive.keys(), (self.seed, view, alive)
        return alive

    # -- what guests do

    def post(self, sender: Guest, to: int, message: bytes) -> None:
        """Send over a link with its faults."""
        copies = (self.rng.random() >= self.loss) + (self.rng.random() < self.doubled)
        for _ in range(copies):
            self._count += 1
            late_ns = self.now_ns + self.rng.randrange(self.delay_ns)
            heapq.heappush(self._posted, (late_ns, self._count, sender, to, message))

    def maybe_pause(self, guest: Guest, *, rarely: bool = False) -> None:
        """Stop this guest here while the others go on."""
        chance = self.pause_chance * (0.2 if rarely else 1.0)
        if self._depth < 3 and self.rng.random() < chance:
            guest.paused = True
            self._depth += 1
            try:
                self.run(self.rng.randrange(self.longest_pause_ns))
            finally:
                self._depth -= 1
                guest.paused = False
        if guest.killed:
            raise Killed

    def data_written(self, guest: Guest) -> None:
        """Bytes reach the disk: nobody may have gone on without this guest."""
        self._check_included(guest, "wrote")
        self.written += 1

    def installed(self, guest: Guest, view: View, dead: frozenset[int]) -> None:
        """Agreement, order, and fencing before takeover."""
        known = self.views.setdefault(view.epoch, view)
        assert known == view, (self.seed, known, view)
        assert not guest.epochs or view.epoch == guest.epochs[-1] + 1, (
            self.seed,
            guest.epochs,
            view,
        )
        assert view.generation(guest.number) == guest.generation
        before = self.views.get(view.epoch - 1)
        if before is None:
            return
        for node, generation in before.generations:
            if view.generation(node) == generation:
                continue
            # A first view names no dead: they are left to the slot map, but can't write either.
            first = not guest.epochs and not view.dead
            assert first or (node in view.left) != (node in view.dead), (self.seed, view)
            assert not guest.epochs or (node in dead) == (node in view.dead), (self.seed, view)
            if node not in view.left and self.guests[node].end != "left":
                assert self.disk.keys.get(node) != generation, (self.seed, view)
                assert self.disk.guarded.get(node) != generation, (self.seed, view)

    def check(self) -> None:
        """Nobody whose lease holds was left out."""
        for guest in self.guests.values():
            if guest.running and guest.node.current is not None:
                try:
                    guest.node.fence.check()
                except OSError:
                    continue
                self._check_included(guest, "may write")

    def _check_included(self, guest: Guest, what: str) -> None:
        if guest.node.current is None:
            return
        newest = self.views[max(self.views)]
        included = newest.generation(guest.number) == guest.generation
        assert included or guest.node.membership.leaving, (
            f"seed {self.seed}: node {guest.number} of epoch {guest.epochs[-1]} {what} in {newest}"
        )

    # -- links

    def _do(self, guest: Guest, act: Callable[[], None]) -> None:
        if not guest.running or guest.paused:
            return
        try:
            act()
        except Killed:
            guest.paused = False

    def _deliver(self) -> None:
        while self._posted and self._posted[0][0] <= self.now_ns:
            _, _, sender, to, message = heapq.heappop(self._posted)
            guest = self.guests.get(to)
            if guest is None or not guest.running or frozenset({sender.number, to}) in self.cuts:
                continue
            if guest.paused:
                self._count += 1
                again = (self.now_ns + STEP_NS, self._count, sender, to, message)
                heapq.heappush(self._posted, again)
                continue
            self._do(guest, partial(guest.node.deliver, sender.number, message))

    def _mesh(self) -> None:
        """Connections go up when both sides run, and down when one is silent for too long."""
        numbers = sorted(self.guests)
        for a in numbers:
            for b in numbers:
                if a < b:
                    self._link(self.guests[a], self.guests[b])

    def _link(self, a: Guest, b: Guest) -> None:
        pair = frozenset({a.number, b.number})
        whole = pair not in self.cuts and all(g.running and not g.paused for g in (a, b))
        if whole:
            self.lost_since_ns.pop(pair, None)
            if pair not in self.linked:
                self.linked.add(pair)
                a.node.peer_up(b.number)
                b.node.peer_up(a.number)
            return
        since_ns = self.lost_since_ns.setdefault(pair, self.now_ns)
        if pair in self.linked and self.now_ns - since_ns >= self.timing.idle_timeout_ns:
            self.linked.discard(pair)
            a.node.peer_down(b.number)
            b.node.peer_down(a.number)
