"""One node of the cluster: heartbeat, quorum, fence and membership tied together.

Sans IO. The guest calls `tick` often (a tenth of the heartbeat interval is enough) and whenever
`next_tick_ns` has come, hands in messages with `deliver`, and says which connections are up. It
gets `ClusterEvents`. The order when a node dies:
  1. the survivors' heartbeats declare it dead; its own lease is over by then;
  2. the coordinator takes its reservation (`fs.block.shared`), and kills its process if that was
     stopped inside a write;
  3. the live nodes agree on a view without it: event `view`;
  4. the lock manager re-masters (`set_view`), the locks that the dead node had stay held back;
  5. one survivor replays its journal, and lets those locks go.
1 to 3 are here. 4 and 5 belong to whoever receives the event. The first view of a cluster has no
dead members, even if the last cluster died: what it left on the disk is found in the slot map.

Invariants: those of `fencing`, `heartbeat` and `membership`, and
  N1  `view` events have ascending epochs, and none follows `fenced`, `left` or `refused`;
  N2  a `view` event comes only while this node's own lease holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from fs.cluster.config import Timing, node_label
from fs.cluster.fencing import Fence
from fs.cluster.heartbeat import Heartbeat
from fs.cluster.membership import Membership
from fs.cluster.quorum import Quorum
from fs.cluster.region import Region
from fs.cluster.view import View
from fs.cluster.witness import admit_all


class ReservationTable(Protocol):
    """What the node needs of the shared device."""

    def preempt(self, node: int, key: int) -> bool:
        """Take a key away; True when no write under it can come any more."""
        ...

    def gone(self, node: int, key: int) -> bool:
        """Whether the process of that incarnation has certainly ended."""
        ...

    def finish_off(self, node: int, key: int) -> bool:
        """Kill a preempted node that was stopped inside a write."""
        ...


class ClusterEvents(Protocol):
    """What a node of the cluster tells its owner; called from `tick` and `deliver`."""

    def view(self, epoch: int, members: frozenset[int], dead: frozenset[int]) -> None:
        """A view was agreed; `dead` were members and did not leave: recover them."""
        ...

    def fenced(self, reason: str) -> None:
        """This node is out, for good. Nothing can be written any more."""
        ...

    def left(self) -> None:
        """This node has left cleanly."""
        ...

    def refused(self, reason: str) -> None:
        """This node may not join; the reason is for a person."""
        ...


class ClusterNode:
    """Node `node` in its incarnation `generation` (random 64 bits, not 0, and its reservation key).

    `clock` is CLOCK_BOOTTIME or the like: it must not stand still while the process is stopped.
    """

    def __init__(
        self,
        node: int,
        generation: int,
        *,
        timing: Timing,
        region: Region,
        reservations: ReservationTable,
        clock: Callable[[], int],
        send: Callable[[int, bytes], None],
        events: ClusterEvents,
        names: Mapping[int, str] | None = None,
        admits: Callable[[int], bool] = admit_all,
    ) -> None:
        self.node = node
        self.generation = generation
        self.timing = timing
        self.names = dict(names or {})
        self.ended = False
        self.fence = Fence(node_label(node, self.names), clock)
        self.heartbeat = Heartbeat(
            region,
            node,
            generation,
            timing=timing,
            fence=self.fence,
            clock=clock,
            names=self.names,
            gone=reservations.gone,
        )
        self.quorum = Quorum(node, timing, self.names)
        self._disk = _Disk(self.heartbeat, self.fence, reservations, timing, clock)
        self.membership = Membership(
            node,
            generation,
            timing=timing,
            witness=self._disk,
            outcome=self,
            send=send,
            names=self.names,
            admits=admits,
        )
        self._events = events

    @property
    def current(self) -> View | None:
        """The view that this node is a member of."""
        return self.membership.view

    @property
    def next_tick_ns(self) -> int:
        """When the next heartbeat is due."""
        return self.heartbeat.next_round_ns

    def tick(self, now_ns: int) -> None:
        """Everything that is due: heartbeat, quorum decision, membership."""
        if self.ended or self._ended_by_fence():
            return
        if self.heartbeat.tick(now_ns):
            self._look_for_newer_views()
        reason = self.quorum.tick(now_ns, self.heartbeat.live)
        if reason is not None:
            self.fence.trip(reason)
        if not self._ended_by_fence():
            self.membership.tick(now_ns)
            self._ended_by_fence()

    def deliver(self, from_node: int, message: bytes) -> None:
        """A membership message of another node."""
        if not self.ended and not self._ended_by_fence():
            self.membership.deliver(from_node, message)
            self._ended_by_fence()

    def peer_up(self, node: int) -> None:
        """There is a connection with `node`."""
        self.quorum.peer_up(node)

    def peer_down(self, node: int) -> None:
        """The connection with `node` was given up."""
        self.quorum.peer_down(node)

    def leave(self) -> None:
        """Begin to leave; `left` follows, unless this node is fenced before."""
        if not self.ended:
            self.membership.leave()

    def _ended_by_fence(self) -> bool:
        if not self.ended and self.fence.expired():
            self.ended = self.membership.stopped = True
            self.heartbeat.stop(clean=False)
            self._events.fenced(self.fence.reason or "")
        return self.ended

    def _look_for_newer_views(self) -> None:
        """The disk may show that the others went on without us, even if no message does."""
        view = self.membership.view
        if view is None or self.membership.leaving:
            return
        for node, generation in self.heartbeat.live.items():
            beat = self.heartbeat.beats.get(node)
            if beat is None or node == self.node or beat.generation != generation:
                continue
            if node in beat.members and self.node not in beat.members and beat.epoch > view.epoch:
                label = node_label(node, self.names)
                self.fence.trip(f"{label} is in the view of epoch {beat.epoch} without it")

    # -- what membership reports

    def installed(self, view: View, dead: frozenset[int]) -> None:
        """Pass the view on, if this node may still act on it."""
        if self.fence.expired():
            return
        self.heartbeat.claim = (view.epoch, view.members)
        self._events.view(view.epoch, view.members, dead)

    def excluded(self, reason: str) -> None:
        """Fence this node."""
        self.fence.trip(reason)

    def gone(self) -> None:
        """Say goodbye on the disk."""
        self.ended = True
        self.heartbeat.stop(clean=True)
        self._events.left()

    def refused(self, reason: str) -> None:
        """Say goodbye on the disk, and why to the owner."""
        self.ended = True
        self.heartbeat.stop(clean=True)
        self._events.refused(reason)


class _Disk:
    """The disk as membership sees it."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        fence: Fence,
        reservations: ReservationTable,
        timing: Timing,
        clock: Callable[[], int],
    ) -> None:
        self._heartbeat = heartbeat
        self._fence = fence
        self._reservations = reservations
        self._timing = timing
        self._clock = clock
        self._pending_since_ns: dict[tuple[int, int], int] = {}
        self._preempted: set[tuple[int, int]] = set()

    def live(self) -> dict[int, int]:
        return self._heartbeat.live

    def claims(self) -> Mapping[int, frozenset[int]]:
        return {node: beat.members for node, beat in self._heartbeat.beats.items()}

    def unclean(self) -> dict[int, int]:
        return self._heartbeat.unclean()

    def silent(self) -> bool:
        return self._heartbeat.silent()

    def highest_epoch(self) -> int:
        return self._heartbeat.highest_epoch

    def publish(self, epoch: int, members: frozenset[int]) -> bool:
        return self._heartbeat.publish(epoch, members)

    def fenced(self) -> bool:
        return self._fence.expired()

    def preempt(self, node: int, generation: int) -> bool:
        """Also kills what stays inside a write for a whole heartbeat interval."""
        victim = (node, generation)
        if victim in self._preempted:
            return True
        if self._reservations.preempt(node, generation):
            self._preempted.add(victim)
            self._pending_since_ns.pop(victim, None)
            return True
        since_ns = self._pending_since_ns.setdefault(victim, self._clock())
        if self._clock() - since_ns >= self._timing.heartbeat_interval_ns:
            self._reservations.finish_off(node, generation)
        return False
