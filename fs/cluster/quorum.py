"""The quorum rule: which side of a cut network goes on.

The disk says who beats, the network says who can talk. A node that beats but can't talk to enough
of the others fences itself (o2quo, Linux fs/ocfs2/cluster/quorum.c):
  odd number of beating nodes    it must reach a majority, itself included;
  even number                    a majority, or a half that has the lowest beating node in it.
The decision is taken `quorum_delay_ns` after a connection was lost: if the other side was dead, the
heartbeat knows by then, and there is nothing to decide. It waits, for twice that time at most,
while another connection is lost but not yet for so long.

Differs from o2quo:
  - a connection to a node that doesn't beat counts for nothing (o2quo counts it and waits);
  - a cut between two nodes that both have a quorum, for example one link of three, leaves o2cb's
    two nodes unable to share locks for ever. Here the higher of the two gives way, once the rule
    above had the time to remove anyone (`2 * quorum_delay_ns + dead_ns`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fs.cluster.config import Timing, node_label


def verdict(
    node: int, beating: Collection[int], connected: Collection[int], names: dict[int, str]
) -> str | None:
    """Why `node` must fence itself; None when it may go on. Both sets have the node itself."""
    if node not in beating or len(beating) == 1:
        return None
    reached = set(connected) & set(beating) | {node}
    needed = (len(beating) + 1) // 2
    if len(reached) < needed:
        return f"it reaches {len(reached)} of {len(beating)} beating nodes, and needs {needed}"
    lowest = min(beating)
    if len(reached) * 2 == len(beating) and lowest not in reached:
        return (
            f"it reaches half of {len(beating)} beating nodes,"
            f" and the lowest, {node_label(lowest, names)}, is in the other half"
        )
    return None


class Quorum:
    """Watches the connections of `node`, and takes the decision when it is due."""

    def __init__(self, node: int, timing: Timing, names: dict[int, str]) -> None:
        self.connected: set[int] = {node}
        self._node = node
        self._timing = timing
        self._names = names
        self._lost_since_ns: dict[int, int] = {}

    def peer_up(self, node: int) -> None:
        """There is a connection with `node`."""
        self.connected.add(node)

    def peer_down(self, node: int) -> None:
        """The connection with `node` was given up."""
        if node != self._node:
            self.connected.discard(node)

    def tick(self, now_ns: int, live: Mapping[int, int]) -> str | None:
        """Why this node must fence itself now; None most of the time."""
        lost = {node for node in live if node not in self.connected and node != self._node}
        self._lost_since_ns = {
            node: self._lost_since_ns.get(node, now_ns) for node in lost if self._node in live
        }
        if not self._lost_since_ns:
            return None
        delay_ns = self._timing.quorum_delay_ns
        ages_ns = {node: now_ns - since for node, since in self._lost_since_ns.items()}
        oldest_ns = max(ages_ns.values())
        settled = min(ages_ns.values()) >= delay_ns or oldest_ns >= 2 * delay_ns
        if oldest_ns < delay_ns or not settled:
            return None
        reason = verdict(self._node, live.keys(), self.connected, self._names)
        if reason is not None:
            return reason
        for node, age_ns in sorted(ages_ns.items()):
            if node < self._node and age_ns >= 2 * delay_ns + self._timing.dead_ns:
                return (
                    f"it has no connection with {node_label(node, self._names)},"
                    " and the higher number of two gives way"
                )
        return None
