"""The deterministic twin of the network: every message waits until it is told to arrive.

One queue for each direction between two nodes. Whoever drives it says what happens next, from a
seed or from an explicit schedule: which queue delivers, what is lost, doubled or overtakes. Nodes
can be cut from each other, paused (what is for them waits) and killed (what is for them is lost;
what they sent may still arrive).
"""

from __future__ import annotations

import random
from collections import deque
from typing import NamedTuple, Protocol


class Receiver(Protocol):
    """Takes what was sent to a node."""

    def deliver(self, from_node: int, message: bytes) -> None:
        """A message has come."""
        ...


class Link(NamedTuple):
    """One direction between two nodes."""

    from_node: int
    to_node: int


class Faults(NamedTuple):
    """Chances, for each message that is about to arrive."""

    loss: float = 0.0
    doubling: float = 0.0
    overtaking: float = 0.0


NO_FAULTS = Faults()


class TwinTransport:
    """The `LockTransport` of one node."""

    def __init__(self, twin: Twin, node: int) -> None:
        self._twin = twin
        self._node = node

    def send(self, to_node: int, message: bytes) -> None:
        """Put it into the queue."""
        self._twin.post(Link(self._node, to_node), message)


class Twin:
    """The network."""

    def __init__(self) -> None:
        self.queues: dict[Link, deque[bytes]] = {}
        self.cut: set[Link] = set()
        """Directions in which everything is lost."""
        self.paused: set[int] = set()
        self._receivers: dict[int, Receiver] = {}

    def transport(self, node: int) -> TwinTransport:
        """What `node` sends with."""
        return TwinTransport(self, node)

    def attach(self, node: int, receiver: Receiver) -> None:
        """From now on `receiver` gets what is sent to `node`."""
        self._receivers[node] = receiver

    def kill(self, node: int) -> None:
        """`node` gets nothing and sends nothing any more."""
        self._receivers.pop(node, None)
        self.paused.discard(node)
        for link in [link for link in self.queues if link.to_node == node]:
            del self.queues[link]

    def post(self, link: Link, message: bytes) -> None:
        """A message starts on its way."""
        alive = link.from_node in self._receivers and link.to_node in self._receivers
        if alive and link not in self.cut:
            self.queues.setdefault(link, deque()).append(message)

    def ready(self) -> list[Link]:
        """Directions on which a message could arrive now, in a fixed order."""
        return sorted(link for link in self.queues if link.to_node not in self.paused)

    def arrive(self, link: Link, index: int = 0, *, keep: bool = False) -> None:
        """Let a message arrive; `index` 0 is the oldest, `keep` leaves a double of it."""
        message = self._take(link, index, keep=keep)
        if link not in self.cut:
            self._receivers[link.to_node].deliver(link.from_node, message)

    def lose(self, link: Link, index: int = 0) -> None:
        """Lose a message."""
        self._take(link, index, keep=False)

    def step(self, chance: random.Random, faults: Faults = NO_FAULTS) -> bool:
        """Let something happen to one message; False if there is none."""
        links = self.ready()
        if not links:
            return False
        link = chance.choice(links)
        index = 0
        if faults.overtaking and chance.random() < faults.overtaking:
            index = chance.randrange(len(self.queues[link]))
        if faults.loss and chance.random() < faults.loss:
            self.lose(link, index)
        else:
            double = bool(faults.doubling) and chance.random() < faults.doubling
            self.arrive(link, index, keep=double)
        return True

    def _take(self, link: Link, index: int, *, keep: bool) -> bytes:
        queue = self.queues[link]
        message = queue[index]
        if not keep:
            del queue[index]
            if not queue:
                del self.queues[link]
        return message
