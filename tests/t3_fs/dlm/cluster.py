"""Several lock managers on the deterministic network, and what they were told."""

from __future__ import annotations

import random

from fs.dlm.manager import LockManager
from fs.dlm.messages import NO_FLAG, Flag, Reason
from fs.dlm.modes import Mode
from fs.dlm.twin import Faults, Twin


class Node:
    """A manager and its events, newest last."""

    def __init__(self, twin: Twin, number: int) -> None:
        self.number = number
        self.events: list[tuple[object, ...]] = []
        self.manager = LockManager(number, twin.transport(number), self)
        twin.attach(number, self.manager)

    def granted(self, name: bytes, mode: Mode) -> None:
        self.events.append(("granted", name, mode))

    def denied(self, name: bytes, reason: Reason) -> None:
        self.events.append(("denied", name, reason))

    def blocking(self, name: bytes, mode: Mode) -> None:
        self.events.append(("blocking", name, mode))

    def recovered(self, epoch: int) -> None:
        self.events.append(("recovered", epoch))

    def expelled(self) -> None:
        self.events.append(("expelled",))

    def lock(self, name: bytes, mode: Mode, flags: Flag = NO_FLAG) -> None:
        self.manager.lock(name, mode, flags)

    def take_events(self) -> list[tuple[object, ...]]:
        events, self.events = self.events, []
        return events


class Cluster:
    """`count` nodes in one view, at rest."""

    def __init__(self, count: int) -> None:
        self.twin = Twin()
        self.now_ns = 0
        self.epoch = 0
        self.nodes = {number: Node(self.twin, number) for number in range(count)}
        self.view(*range(count))

    def view(self, *members: int) -> None:
        """Everybody sees a new view, and recovery runs."""
        self.epoch += 1
        for number in members:
            self.nodes[number].manager.set_view(self.epoch, frozenset(members))
        self.settle()

    def kill(self, *numbers: int, hold: bool = False) -> None:
        """Nodes die, and the others learn it."""
        for number in numbers:
            self.twin.kill(number)
            del self.nodes[number]
        for node in self.nodes.values():
            for number in numbers:
                if hold:
                    node.manager.hold(number)
        self.view(*self.nodes)

    def start(self, number: int) -> None:
        """A node that remembers nothing joins."""
        self.nodes[number] = Node(self.twin, number)
        self.view(*self.nodes)

    def settle(self, chance: random.Random | None = None, faults: Faults | None = None) -> None:
        """Let everything arrive."""
        for _ in range(100_000):
            if chance is not None and faults is not None:
                self.now_ns += 20_000_000
                for node in self.nodes.values():
                    node.manager.tick(self.now_ns)
                self.twin.step(chance, faults)
                if all(node.manager.links.idle for node in self.nodes.values()):
                    return
            elif links := self.twin.ready():
                self.twin.arrive(links[0])
            else:
                return
        raise AssertionError("no end of messages")

    def name_of_master(self, number: int, *more_masters: int) -> bytes:
        """A name whose master is `number`, and after its death the next of `more_masters`."""
        from fs.dlm.recovery import master_of

        for suffix in range(100_000):
            name = b"M%022x%08x" % (suffix, 1)
            members = set(self.nodes)
            for master in (number, *more_masters):
                if master_of(name, members) != master:
                    break
                members.discard(master)
            else:
                return name
        raise AssertionError("no such name")
