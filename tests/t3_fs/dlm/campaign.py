"""Random lives of a cluster: file systems that lock, write, read and forget, under every fault.

Each node runs a program on real `NodeLocks`. Messages are lost, doubled, late and out of order;
links are cut, nodes pause (some for so long that they are declared dead, and wake up as nodes that
nobody believes any more), die, join again and leave; the shared pool drops what it likes and gets
offers late. What is checked, all the time:

  - no two live nodes hold modes that exclude each other;
  - tokens of a resource grow with EX, and no holder has an older one than the newest EX holder;
  - a value that is valid is the newest one;
  - what a dead node had in EX is not granted before its journal was replayed;
  - a read returns what was written last, wherever its page came from;
  - when the faults stop, everybody gets what he asked for.

    python -m tests.t3_fs.dlm.campaign --seeds 500 [--seed first] [--turns 3000]
"""

from __future__ import annotations

import argparse
import errno
import random
from typing import NamedTuple

from fs.dlm.locks import NodeLocks
from fs.dlm.messages import VALUE_BYTES
from fs.dlm.modes import Mode, compatible
from fs.dlm.twin import NO_FAULTS, Faults, Link, Twin
from tests.t3_fs.dlm.models import Pool
from tests.t3_fs.dlm.rota import Program

NODES = 4
NAMES = tuple(b"M%022x%08x" % (block, 7) for block in (24, 25, 31))
TURN_NS = 5_000_000
ROUNDS_TO_SETTLE = 60_000


class Impatient(Exception):
    """A program does not want to wait any more."""


class Offer(NamedTuple):
    """A page on its way into the pool."""

    name: bytes
    token: int
    page: int


class File:
    """What is true of one file."""

    def __init__(self) -> None:
        self.written = 0
        self.disk = 0
        self.value = 0
        self.value_view = 0
        self.newest_token = 0
        """Of the EX holders; tokens that were lifted go beyond."""
        self.replaying = False
        """A node died with EX, and nobody may be given the lock before `replay`."""
        self.pool = Pool(fenced=True)


class Node:
    """One node: its locks, its memory, its program."""

    def __init__(self, world: Campaign, number: int) -> None:
        self.world = world
        self.number = number
        self.chance = random.Random(world.chance.random())
        self.view = 0
        self.pages: dict[bytes, int] = {}
        self.dirty: set[bytes] = set()
        self.offers: list[Offer] = []
        self.zombie = False
        self.leaving = False
        self.busy = False
        self.done = 0
        self.impatient = False
        self.locks = NodeLocks(number, world.twin.transport(number), self.pump)
        self.locks.downconvert = self.downconvert
        world.twin.attach(number, self.locks.manager)
        self.program = Program(self.life)

    def pump(self) -> None:
        """The world goes on."""
        self.program.wait()
        if self.impatient and self.chance.random() < 0.02:
            raise Impatient

    def life(self, program: Program) -> None:
        """Operations, until the world ends."""
        while True:
            self.busy = False
            program.wait()
            self.busy = True
            self.locks.serve()
            if self.leaving or self.world.settling:
                continue
            if self.chance.random() < 0.5:
                try:
                    self.operation()
                except Impatient:
                    pass
                except OSError as problem:
                    if problem.errno != errno.EDEADLK and not self.zombie:
                        raise
                self.done += 1
                self.world.operations += 1

    def operation(self) -> None:
        chance = self.chance
        names = sorted(chance.sample(NAMES, chance.choice((1, 1, 2))))
        taken = []
        self.impatient = chance.random() < 0.2
        try:
            for name in names:
                mode = chance.choice((Mode.PR, Mode.PR, Mode.EX))
                if chance.random() < 0.15:
                    if not self.locks.try_acquire(name, mode):
                        continue
                else:
                    self.locks.acquire(name, mode)
                taken.append((name, mode))
            self.impatient = False
            for name, mode in taken:
                self.use(name, mode)
            for _ in range(chance.choice((0, 0, 1, 5))):
                self.program.wait()
            for name, mode in taken:
                if chance.random() < 0.2:  # nested
                    self.locks.acquire(name, mode)
                    self.use(name, mode)
                    self.locks.release(name, mode)
        finally:
            self.impatient = False
            for name, mode in reversed(taken):
                self.locks.release(name, mode)
        if chance.random() < 0.05:
            self.forget(chance.choice(NAMES))

    def use(self, name: bytes, mode: Mode) -> None:
        if self.zombie:
            return
        file = self.world.files[name]
        held = self.locks.manager.mode(name)
        assert held is not None and held >= mode
        assert not file.replaying, "granted before the journal was replayed"
        token = self.locks.token(name)
        assert token >= file.newest_token, f"token {token:#x} below {file.newest_token:#x}"
        if held == Mode.EX:
            file.newest_token = token
        value = self.locks.value(name)
        if value is not None and any(value):  # zeros: nobody remembers that it was written
            assert int.from_bytes(value, "little") == file.value, "an old value"
        else:
            assert not file.value or self.view > file.value_view, "a value was lost"
        if name not in self.pages:
            page = file.pool.page
            self.pages[name] = file.disk if page is None else page
        read = self.pages[name]
        assert read == file.written, f"{name!r}: read {read}, written was {file.written}"
        if mode == Mode.EX:
            self.write(name, file, token)

    def write(self, name: bytes, file: File, token: int) -> None:
        if name not in self.dirty:
            self.world.put(self)
            file.pool.flush(token)
            self.dirty.add(name)
        file.written += 1
        self.pages[name] = file.written
        file.value += 1
        file.value_view = self.view
        self.locks.set_value(name, file.value.to_bytes(VALUE_BYTES, "little"))

    def downconvert(self, name: bytes, to: Mode) -> None:
        if self.chance.random() < 0.2:
            self.program.wait()  # it takes its time
        if name in self.dirty:
            self.dirty.discard(name)
            if self.zombie:
                # The block layer refuses the write, and what can't be written is never offered.
                del self.pages[name]
            else:
                self.world.files[name].disk = self.pages[name]
        if name in self.pages:
            self.offers.append(Offer(name, self.locks.token(name), self.pages[name]))
            if to == Mode.NL:
                del self.pages[name]

    def forget(self, name: bytes) -> None:
        """The inode leaves memory."""
        if self.locks.manager.mode(name) is not None:
            self.downconvert(name, Mode.NL)
            self.locks.drop(name)
            # The value lives as long as somebody has a lock.
            self.world.files[name].value_view = -1


class Campaign:
    """The cluster, the truth and the nemesis."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.twin = Twin()
        self.files = {name: File() for name in NAMES}
        self.settling = False
        self.now_ns = 0
        self.faults = self.chance.choice(
            (NO_FAULTS, Faults(0.05, 0.05, 0.1), Faults(0.2, 0.2, 0.3), Faults(overtaking=0.5))
        )
        self.evil = self.chance.choice((0.0, 0.002, 0.005, 0.02))
        self.operations = 0
        self.lifting = self.chance.random() < 0.7
        self.lifts = 0
        self.nodes: dict[int, Node] = {}
        self.views: list[frozenset[int]] = []
        self.declared: dict[int, set[int]] = {}
        """For each view, the nodes it declares dead whose journals have to be replayed."""
        self.replays: dict[int, list[bytes]] = {}
        self.counts = dict.fromkeys(("death", "zombie", "join", "leave", "cut", "pause"), 0)
        for number in range(NODES):
            self.nodes[number] = Node(self, number)
        self._new_view(set())

    @property
    def epoch(self) -> int:
        return len(self.views)

    def put(self, node: Node) -> None:
        """The pool gets the offers of a node, in order."""
        for offer in node.offers:
            pool = self.files[offer.name].pool
            if offer.token < pool.newest and self.lifting:
                # A node that nobody believes any more asks, too.
                needed = pool.newest
                self.lifts += node.locks.token(offer.name) not in (0, needed)
                node.locks.lift(offer.name, needed)
            pool.put(offer.token, offer.page)
        node.offers.clear()

    def run(self, turns: int) -> None:
        zombies: list[Node] = []
        try:
            for _ in range(turns):
                self._turn(zombies)
            self._settle(zombies)
        finally:
            for node in [*self.nodes.values(), *zombies]:
                node.program.stop()

    def _turn(self, zombies: list[Node]) -> None:
        chance = self.chance
        self.now_ns += TURN_NS
        for _ in range(chance.randrange(6)):
            self.twin.step(chance, self.faults)
        running = [n for n in self.nodes.values() if n.number not in self.twin.paused]
        if running:
            node = chance.choice(running)
            node.locks.manager.tick(self.now_ns)
            node.program.run()
            if node.view < self.epoch and chance.random() < 0.3:
                self._show_view(node)
        if zombies and chance.random() < 0.1:
            zombie = chance.choice(zombies)
            zombie.program.run()
            self.put(zombie)
        for node in self.nodes.values():
            if node.offers and chance.random() < 0.1:
                self.put(node)
        if chance.random() < 0.05:
            chance.choice(list(self.files.values())).pool.page = None
        if self.lifting and chance.random() < 0.02:
            self._restart_hypervisor()
        if self.lifting and chance.random() < 0.2:
            self._lift(chance.choice([*self.nodes.values(), *zombies]))
        if chance.random() < self.evil:
            self._nemesis(zombies)
        if self.twin.cut and chance.random() < 0.01:
            self.twin.cut.clear()
        if self.twin.paused and chance.random() < 0.01:
            self.twin.paused.clear()
        if chance.random() < 0.01:
            self._replay()
        self._check()

    def _restart_hypervisor(self) -> None:
        """The newest token of all files is needed for each."""
        floor = max(file.pool.newest for file in self.files.values())
        for file in self.files.values():
            file.pool.newest = floor

    def _lift(self, node: Node) -> None:
        """A put was refused: whoever holds the lock, or believes so, offers its page again."""
        name = self.chance.choice(NAMES)
        pool = self.files[name].pool
        locks = node.locks
        if not locks.token(name):
            return
        before = locks.token(name)
        locks.lift(name, pool.newest + self.chance.choice((0, 0, 1, 1 << 20, 1 << 40)))
        self.lifts += locks.token(name) > before
        assert locks.token(name) >= before
        if name in node.pages and name not in node.dirty:
            node.offers.append(Offer(name, locks.token(name), node.pages[name]))

    def _nemesis(self, zombies: list[Node]) -> None:
        chance = self.chance
        what = chance.choice(("death", "zombie", "join", "leave", "cut", "cut", "pause", "pause"))
        live = sorted(self.nodes)
        node = self.nodes[chance.choice(live)]
        if what in {"death", "zombie", "leave"} and (len(live) < 3 or len(self.replays) > 1):
            return
        self.counts[what] += 1
        match what:
            case "death":
                self._bury(node)
                node.program.stop()
            case "zombie":
                node.zombie = True
                self._bury(node)
                zombies.append(node)
            case "join":
                absent = [n for n in range(NODES) if n not in self.nodes and n not in self.replays]
                if absent:
                    number = chance.choice(absent)
                    self.nodes[number] = Node(self, number)
                    self.nodes[number].view = self.epoch
                    self._new_view(set())
            case "leave":
                node.leaving = not node.leaving
            case "cut":
                ends = chance.sample(live, 2)
                cut = self.twin.cut
                link = Link(*ends)
                (cut.discard if link in cut else cut.add)(link)
            case "pause":
                paused = self.twin.paused
                (paused.discard if node.number in paused else paused.add)(node.number)
        for node in list(self.nodes.values()):
            if node.leaving and not node.locks.uses and not self.replays and len(self.nodes) > 2:
                self._leave(node)

    def _leave(self, node: Node) -> None:
        if node.busy:
            return
        for name in NAMES:
            if node.locks.manager.mode(name) is not None:
                for file_name in [name] if name in node.dirty else []:
                    self.files[file_name].disk = node.pages[file_name]
                node.dirty.discard(name)
        node.locks.leave()
        node.program.stop()
        self.twin.kill(node.number)
        del self.nodes[node.number]
        self._new_view(set())

    def _bury(self, node: Node) -> None:
        """The node is dead for the others; some of what it wrote is in its journal."""
        names = []
        for name in NAMES:
            if node.locks.manager.mode(name) == Mode.EX:
                self.files[name].replaying = True
                names.append(name)
            if name in node.dirty and self.chance.random() < 0.5:
                self.files[name].written = self.files[name].disk
        self.replays[node.number] = names
        self.twin.kill(node.number)
        del self.nodes[node.number]
        self._new_view({node.number})

    def _new_view(self, dead: set[int]) -> None:
        self.views.append(frozenset(self.nodes))
        self.declared[self.epoch] = dead

    def _show_view(self, node: Node) -> None:
        node.view += 1
        if node.number not in self.views[node.view - 1]:
            return
        for dead in self.declared[node.view]:
            node.locks.manager.hold(dead)
        node.locks.manager.set_view(node.view, self.views[node.view - 1])

    def _replay(self) -> None:
        """Some survivor has replayed a journal."""
        ready = [n for n in self.nodes.values() if n.view == self.epoch and n.locks.manager.ready]
        if not ready:
            return
        for node in ready:
            for dead in node.locks.manager.held - self.replays.keys():
                node.locks.manager.release_dead(dead)  # who replayed it died too soon
        if not self.replays:
            return
        dead = self.chance.choice(sorted(self.replays))
        for name in self.replays.pop(dead):
            file = self.files[name]
            file.replaying = False
            file.disk = file.written
        self.chance.choice(ready).locks.manager.release_dead(dead)

    def _check(self) -> None:
        for name in NAMES:
            held = [node.locks.manager.mode(name) for node in self.nodes.values()]
            modes = [mode for mode in held if mode]
            for position, mode in enumerate(modes):
                for other in modes[position + 1 :]:
                    assert compatible(mode, other), f"{mode.name} beside {other.name}"

    def _settle(self, zombies: list[Node]) -> None:
        """The faults stop: everybody has to get what he waits for, and then one use more."""
        self.faults = NO_FAULTS
        self.twin.cut.clear()
        self.twin.paused.clear()
        for node in self.nodes.values():
            node.leaving = False
        goal = {node.number: node.done + 2 for node in self.nodes.values()}
        for _ in range(ROUNDS_TO_SETTLE):
            self.now_ns += TURN_NS
            for node in self.nodes.values():
                while node.view < self.epoch:
                    self._show_view(node)
                node.locks.manager.tick(self.now_ns)
                node.program.run()
                self.put(node)
            for _ in range(12):
                self.twin.step(self.chance)
            self._replay()
            self._check()
            if all(node.done >= goal[node.number] for node in self.nodes.values()):
                return
        waiting = [n.number for n in self.nodes.values() if n.done < goal[n.number]]
        raise AssertionError(f"nodes {waiting} wait for ever")


def run(seed: int, turns: int) -> Campaign:
    """One life; an AssertionError says which seed it was."""
    campaign = Campaign(seed)
    try:
        campaign.run(turns)
    except Exception as problem:
        raise AssertionError(f"seed {seed}, {turns} turns: {problem!r}") from problem
    return campaign


def main() -> None:
    """Many lives, for `make`."""
    parser = argparse.ArgumentParser(description="Random lives of the lock manager")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3000)
    arguments = parser.parse_args()
    total: dict[str, int] = {}
    operations = 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        campaign = run(seed, arguments.turns)
        operations += campaign.operations
        for what, count in campaign.counts.items():
            total[what] = total.get(what, 0) + count
    faults = ", ".join(f"{count} x {what}" for what, count in total.items())
    print(f"{arguments.seeds} lives hold: {operations} operations, {faults}")


if __name__ == "__main__":
    main()
