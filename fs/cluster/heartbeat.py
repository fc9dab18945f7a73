"""The disk heartbeat: every interval read all sectors, write the own one, count what changed.

The rules are o2hb's (Linux fs/ocfs2/cluster/heartbeat.c):
  live    after 2 samples that changed, at any time since the node was last dead;
  dead    after `dead_threshold` samples in a row without a change, or at once when the generation
          changed (the node was started again, or left cleanly with generation 0);
  a sector with a wrong checksum is a sample without a change;
  the own sector must hold what was last written, otherwise another node beats with our number (or
  the disk loses writes) and the lease is not renewed;
  a round in which reading fails writes nothing.

Invariants:
  H1  the lease (`fencing`) is renewed from a moment before the write, and only when the old lease
      still held after the write was done: others may count up to the old lease's end and not
      further before they have seen the new beat;
  H2  a node is declared dead not earlier than the write timeout after the end of the last round
      that saw it change. Together with H1: its lease is over by then, if clocks run equally fast.

Differs from o2hb: a node whose process has certainly ended (`gone`, asked of the reservation
table) is dead at once and not after the dead time; one round a tick however late it comes, so a
stopped observer never counts samples that it did not take; the sequence is a counter and not
seconds, so that short intervals work; generation 0 is never live; a fenced node does not beat any
more (o2hb's machine is off).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fs.block.reservations import ReservationConflict
from fs.cluster.config import LIVE_THRESHOLD, Timing, node_label
from fs.cluster.fencing import Fence
from fs.cluster.region import Beat, Region

STEADY_ROUNDS = LIVE_THRESHOLD + 1
"""Good rounds before the own node counts as seen by all."""


@dataclass
class _Slot:
    """What was seen of one other node."""

    seq: int = 0
    generation: int = 0
    changed: int = 0
    equal: int = 0
    changed_at_ns: int = 0
    live: bool = False
    lapsed: bool = False
    """Silent for the dead time: a lease that such a node may have had is over."""


def never_gone(node: int, generation: int) -> bool:  # noqa: ARG001
    """Nothing is known of a node but its sector."""
    return False


class Heartbeat:
    """The heartbeat of `node`, whose incarnation is `generation` (random, not 0)."""

    def __init__(
        self,
        region: Region,
        node: int,
        generation: int,
        *,
        timing: Timing,
        fence: Fence,
        clock: Callable[[], int],
        names: dict[int, str] | None = None,
        gone: Callable[[int, int], bool] = never_gone,
    ) -> None:
        if not 0 < generation < 1 << 64 or not 0 <= node < region.nodes:
            raise ValueError(f"node {node} of {region.nodes}, generation {generation}")
        self.node = node
        self.generation = generation
        self.rounds = 0
        self.next_round_ns = 0
        self.problem: str | None = None
        self.beats: dict[int, Beat] = {}
        self.claim: tuple[int, frozenset[int]] = (0, frozenset())
        self._region = region
        self._timing = timing
        self._fence = fence
        self._clock = clock
        self._names = names or {}
        self._gone = gone
        self._slots = {n: _Slot() for n in range(region.nodes) if n != node}
        self._written: Beat | None = None
        self._stopped = False

    @property
    def steady(self) -> bool:
        """The own beat was on the disk for long enough to be seen by every live node."""
        return self.rounds >= STEADY_ROUNDS

    @property
    def live(self) -> dict[int, int]:
        """Live nodes and their generations; this node once it is steady and not fenced."""
        live = {node: slot.generation for node, slot in self._slots.items() if slot.live}
        if self.steady and not self._stopped and self._fence.reason is None:
            live[self.node] = self.generation
        return live

    @property
    def highest_epoch(self) -> int:
        """The highest epoch that any sector names."""
        return max([self.claim[0], *(beat.epoch for beat in self.beats.values())])

    def unclean(self) -> dict[int, int]:
        """Nodes that are not live and did not leave: they may be stopped in the middle."""
        return {
            node: slot.generation
            for node, slot in self._slots.items()
            if not slot.live and slot.generation
        }

    def silent(self) -> bool:
        """Whether every node of `unclean` is certainly out: its process ended or its lease did."""
        return all(
            self._gone(node, generation) or self._slots[node].lapsed
            for node, generation in self.unclean().items()
        )

    def age_ns(self, node: int, now_ns: int) -> int | None:
        """How long ago `node` was last seen to change; None for one that never did."""
        slot = self._slots.get(node)
        return now_ns - slot.changed_at_ns if slot and slot.changed_at_ns else None

    def tick(self, now_ns: int) -> bool:
        """One round if it is due. True when there was one."""
        if self._stopped or self._fence.expired() or now_ns < self.next_round_ns:
            return False
        self.next_round_ns = now_ns + self._timing.heartbeat_interval_ns
        try:
            sectors = self._region.read()
        except OSError as reason:
            self.problem = f"heartbeat read: {reason}"
            return True
        own_is_good = self._check_own(sectors[self.node])
        written = self._write(renew=own_is_good)
        before = set(self.live)
        read_ns = self._clock()
        for node, slot in self._slots.items():
            self._sample(node, slot, sectors[node], now_ns, read_ns)
        if written and own_is_good and (self.steady or set(self.live) == before):
            self.rounds += 1
        return True

    def publish(self, epoch: int, members: frozenset[int]) -> bool:
        """Say on the disk, now, what this node is a member of. False when it did not get there."""
        old, self.claim = self.claim, (epoch, members)
        if self._stopped or self._fence.expired() or not self._write(renew=True):
            self.claim = old
            return False
        return not self._fence.expired()

    def stop(self, *, clean: bool) -> None:
        """No more beats. A clean stop says so on the disk."""
        if clean and not self._stopped and not self._fence.expired() and self._written:
            self.generation, kept = 0, self.generation
            self.claim = (self.claim[0], frozenset())
            self._write(renew=False)
            self.generation = kept
        self._stopped = True

    def _check_own(self, found: Beat | None) -> bool:
        if self._written is None:
            # Our number's former incarnation: go on from its sequence, and keep its epoch.
            seq = found.seq if found else 0
            self._written = Beat(seq % (1 << 63), self.node, 0, 0)
            self.claim = (max(self.claim[0], found.epoch if found else 0), frozenset())
            return True
        if found == self._written:
            return True
        label = node_label(self.node, self._names)
        self.problem = f"the heartbeat sector of {label} holds what it did not write: {found}"
        return False

    def _write(self, *, renew: bool) -> bool:
        if self._written is None:
            return False
        began_ns = self._clock()
        epoch, members = self.claim
        if not members:
            epoch = max([epoch, *(beat.epoch for beat in self.beats.values())])
        beat = Beat(
            self._written.seq + 1,
            self.node,
            self.generation,
            self._timing.dead_ms,
            epoch,
            members,
        )
        try:
            self._region.write(beat)
        except ReservationConflict as reason:
            self._fence.trip(str(reason.strerror))
            return False
        except OSError as reason:
            self.problem = f"heartbeat write: {reason}"
            return False
        self._written = beat
        if renew:
            self.problem = None
            self._fence.renew(began_ns + self._timing.write_timeout_ns)
        return True

    def _sample(
        self, node: int, slot: _Slot, beat: Beat | None, began_ns: int, read_ns: int
    ) -> None:
        ended = slot.live and self._gone(node, slot.generation)
        if beat is None:
            slot.equal += 1
            self._count_silence(slot, began_ns, ended=ended)
            return
        self.beats[node] = beat
        changed = beat.seq != slot.seq
        gone = beat.generation != slot.generation
        if changed:
            slot.changed += 1
        else:
            slot.equal += 1
        if changed or gone:
            slot.changed_at_ns = read_ns
        if gone or (changed and not slot.live):
            slot.equal = 0
        slot.seq, slot.generation = beat.seq, beat.generation
        self._count_silence(slot, began_ns, ended=ended, restarted=gone)
        if slot.live:
            if slot.changed:
                slot.changed = slot.equal = 0
        elif slot.changed >= LIVE_THRESHOLD and beat.generation and not (gone or ended):
            slot.live = True
            slot.equal = 0

    def _count_silence(
        self, slot: _Slot, began_ns: int, *, ended: bool, restarted: bool = False
    ) -> None:
        """Decide on death after this sample."""
        slot.lapsed = (
            slot.equal >= self._timing.dead_threshold
            and began_ns - slot.changed_at_ns >= self._timing.write_timeout_ns
        )
        if slot.live and (slot.lapsed or ended or restarted):
            slot.live = False
            if not restarted:
                slot.changed = 0
