"""The quorum rule of o2quo, when it is applied, and what it leaves to us."""

from __future__ import annotations

import itertools

import pytest

from fs.cluster.quorum import Quorum, verdict
from tests.t3_fs.cluster.world import TIMING

DELAY_NS = TIMING.quorum_delay_ns


@pytest.mark.parametrize(
    ("node", "beating", "connected", "goes_on"),
    [
        (0, {0}, {0}, True),
        (0, {0, 1}, {0}, True),
        (1, {0, 1}, {1}, False),
        (1, {0, 1}, {0, 1}, True),
        (2, {0, 1, 2}, {2}, False),
        (2, {0, 1, 2}, {1, 2}, True),
        (3, {0, 1, 2, 3}, {2, 3}, False),
        (1, {0, 1, 2, 3}, {0, 1}, True),
        (3, {0, 1, 2, 3}, {1, 2, 3}, True),
        (3, {2, 3, 7, 9}, {2, 3}, True),
        (9, {2, 3, 7, 9}, {9}, False),
        (5, {0, 1, 2}, {5}, True),
        (2, {0, 1, 2}, {2, 5, 6}, False),
    ],
)
def test_the_rule(node: int, beating: set[int], connected: set[int], goes_on: bool) -> None:
    """Majority, or the half with the lowest; who doesn't beat counts for nothing."""
    assert (verdict(node, beating, connected, {}) is None) is goes_on


@pytest.mark.parametrize("count", range(2, 8))
def test_of_two_sides_exactly_one_goes_on(count: int) -> None:
    """Whatever the cut: all nodes of a side decide alike, and not both sides go on."""
    nodes = set(range(count))
    for size in range(1, count):
        for side in itertools.combinations(sorted(nodes), size):
            other = nodes - set(side)
            verdicts = {verdict(node, nodes, side, {}) is None for node in side}
            others = {verdict(node, nodes, other, {}) is None for node in other}
            assert len(verdicts) == len(others) == 1
            assert verdicts != others


def test_the_decision_comes_at_the_exact_tick() -> None:
    """Not before the heartbeat had its time to find the other side dead."""
    quorum = Quorum(1, TIMING, {0: "web0"})
    live = {0: 10, 1: 11}
    quorum.peer_up(0)
    assert quorum.tick(0, live) is None
    quorum.peer_down(0)
    assert quorum.tick(100, live) is None
    assert quorum.tick(100 + DELAY_NS - 1, live) is None
    reason = quorum.tick(100 + DELAY_NS, live)
    assert reason is not None and "node web0 (0)" in reason


def test_a_dead_side_needs_no_decision() -> None:
    """And a connection that came back starts the time again."""
    quorum = Quorum(1, TIMING, {})
    live = {0: 10, 1: 11}
    assert quorum.tick(0, live) is None
    assert quorum.tick(DELAY_NS, {1: 11}) is None
    assert quorum.tick(DELAY_NS + 1, live) is None
    quorum.peer_up(0)
    assert quorum.tick(2 * DELAY_NS, live) is None
    quorum.peer_down(0)
    assert quorum.tick(2 * DELAY_NS + 1, live) is None
    assert quorum.tick(3 * DELAY_NS, live) is None
    assert quorum.tick(3 * DELAY_NS + 1, live) is not None


def test_it_waits_for_a_younger_loss_but_not_for_ever() -> None:
    """A second connection that was just lost may be the first's own death."""
    live = {0: 1, 1: 1, 2: 1, 3: 1}
    quorum = Quorum(3, TIMING, {})
    for node in range(3):
        quorum.peer_up(node)
    quorum.peer_down(0)
    quorum.peer_down(1)
    assert quorum.tick(0, live) is None
    quorum.peer_down(2)
    assert quorum.tick(DELAY_NS - 1, live) is None
    assert quorum.tick(DELAY_NS, live) is None
    assert quorum.tick(2 * DELAY_NS - 1, live) is not None


def test_of_two_nodes_with_a_quorum_the_higher_gives_way_later() -> None:
    """One link of three is cut."""
    live = {0: 1, 1: 1, 2: 1}
    quorums = [Quorum(node, TIMING, {}) for node in range(3)]
    for quorum, other in itertools.product(quorums, range(3)):
        quorum.peer_up(other)
    quorums[0].peer_down(1)
    quorums[1].peer_down(0)
    late_ns = 2 * DELAY_NS + TIMING.dead_ns
    for now_ns in (0, DELAY_NS, late_ns - 1):
        assert [quorum.tick(now_ns, live) for quorum in quorums] == [None] * 3
    verdicts = [quorum.tick(late_ns, live) for quorum in quorums]
    assert verdicts[0] is None and verdicts[2] is None
    assert verdicts[1] is not None and "gives way" in verdicts[1]
