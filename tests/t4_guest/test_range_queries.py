"""Questions about locked ranges over a network that loses, doubles, delays and lies."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from random import Random

import pytest

from fs.filelocks import END, RangeLock
from fs.hooks import FileKey
from guests.rangequeries import RETRY_NS, RangeQueries

FILE = FileKey(77, 5)
TURN_NS = 10_000_000
NODES = (0, 1, 2)


class Network:
    """Nodes whose messages may have any fate; time passes while one waits."""

    def __init__(self, seed: int, *, loses: float) -> None:
        self.random = Random(seed)
        self.loses = loses
        self.now_ns = 0
        self.members = set(NODES)
        self.sent = 0
        self.locked: dict[int, list[RangeLock]] = {node: [] for node in NODES}
        self.under_way: list[tuple[int, int, bytes]] = []
        self.on_turn: Callable[[], None] = lambda: None
        self.nodes = {node: self._make(node) for node in NODES}

    def _make(self, node: int) -> RangeQueries:
        made = RangeQueries(
            node,
            send=lambda to, message: self._send(node, to, message),
            members=lambda: self.members,
            wait=self.turn,
            now_ns=lambda: self.now_ns,
        )
        made.own = lambda ino, generation: self.locked[node] if (ino, generation) == FILE else []
        return made

    def _send(self, node: int, to: int, message: bytes) -> None:
        self.sent += 1
        for _ in range(self.random.choice((1, 1, 2))):
            if self.random.random() >= self.loses:
                self.under_way.append((node, to, message))

    def turn(self) -> None:
        """Some of what is under way arrives, in any order."""
        self.now_ns += TURN_NS
        assert self.now_ns < 10**12, "it never ends"
        self.on_turn()
        self.random.shuffle(self.under_way)
        for _ in range(self.random.randrange(3)):
            if self.under_way:
                node, to, message = self.under_way.pop()
                if to in self.members and node in self.members:
                    self.nodes[to].deliver(node, message)


def draw(random: Random, node: int) -> list[RangeLock]:
    """Some ranges of a node."""
    starts = sorted(random.sample(range(1000), random.randrange(5)))
    return [RangeLock(start, start + 1, random.random() < 0.5, -1 - node) for start in starts]


def of_all(network: Network, nodes: set[int]) -> list[RangeLock]:
    """What is to be answered."""
    return [lock._replace(node=node) for node in sorted(nodes) for lock in network.locked[node]]


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_those_of_this_question(seed: int) -> None:
    """Whatever gets lost, doubled or late: never an answer to an earlier question."""
    network = Network(seed, loses=0.4)
    for _ in range(20):
        for node in NODES:
            network.locked[node] = draw(network.random, node)
        asker = network.random.choice(NODES)
        whom = network.random.choice((None, {(asker + 1) % 3}, set(NODES)))
        others = (set(NODES) if whom is None else whom) - {asker}
        found = network.nodes[asker].ask(FILE, whom)
        assert found == of_all(network, others), f"seed {seed}"
        assert network.nodes[asker].ask(FileKey(1, 1), whom) == []


def test_a_node_that_leaves_is_not_waited_for() -> None:
    """What it had is free, also when it has answered before."""
    network = Network(1, loses=0.0)
    network.locked[2] = [*draw(Random(3), 2), RangeLock(2000, 3000, True, 5)]

    def leave() -> None:
        if network.now_ns > RETRY_NS // 2:
            network.members.discard(1)
            network.members.discard(2)

    network.on_turn = leave
    network.nodes[1].deliver = lambda node, untrusted_message: None  # type: ignore[method-assign]
    assert network.nodes[0].ask(FILE, None) == []


def hostile() -> Iterator[bytes]:
    """Answers to the first question that are none, and things that are no message at all."""
    head = struct.pack("<BQ", 1, 1)
    one = struct.pack("<QQ?q", 0, 10, True, 1)
    yield from (b"", b"\0", b"\1", b"\2" * 9, head[:-1], head + one[:-1], head + one * 513)
    yield head + struct.pack("<QQ?q", 10, 10, True, 1)
    yield head + struct.pack("<QQ?q", 0, END + 1, True, 1)
    yield b"\0" + bytes(19)


@pytest.mark.parametrize("message", list(hostile()), ids=lambda message: message[:12].hex())
def test_nonsense_is_no_answer(message: bytes, expect_warning: Callable[[str], None]) -> None:
    """It is refused with a line in the log, and the node goes on waiting for an answer."""
    expect_warning("bad-range-message")
    network = Network(2, loses=0.0)
    network.locked[1] = [RangeLock(5, 6, False, 1)]
    network.on_turn = lambda: network.nodes[0].deliver(1, message)
    assert network.nodes[0].ask(FILE, {1}) == [RangeLock(5, 6, False, 1, 1)]
    assert (network.nodes[0].malformed > 0, network.nodes[1].malformed) == (True, 0)
