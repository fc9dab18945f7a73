"""A guest as a node of a cluster: one volume that several guests mount, and all that takes.

    mesh (ipc)         sockets to the other nodes: carries membership and lock messages
    ClusterNode (fs)   heartbeat on the shared disk, agreed views, fencing
    NodeLocks (fs)     the cluster locks
    SharedDevice (fs)  the image, under this node's lease and reservation

Everything runs in the guest's one thread: in `pump`, which the kernel calls between two steps of
work, and while a lock is waited for.  A guest that does not come here for the length of its lease
finds itself fenced; the lease is many times longer than a step.

When a view says that nodes died, the locks that they held in EX stay held back.  Each survivor then
goes through the slot map under the super lock, and who comes first replays the journals and says
so to all.  That happens inside of waits too, also those of a mount, so it needs no other lock; the
dead nodes' slots are taken over and their orphans freed later, between two steps of work.  A dead
node's number is not admitted again before the coordinator has seen the journals replayed, so a slot
that belongs to a member is never replayed by another node.

A node that is fenced stays so: its device and its locks answer EIO, its pages go nowhere, and the
guest ends.  Starting it again makes a new node under the old number.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from fs.block.device import BlockDevice
from fs.block.shared import SharedDevice
from fs.cluster.config import Timing, node_label
from fs.cluster.node import ClusterNode
from fs.cluster.region import Region
from fs.dlm.locks import NodeLocks
from fs.dlm.modes import Mode
from fs.errors import ImageError
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.locking import LocalLocks
from fs.ocfs2.recovery import SUPER_LOCK, replay, slot_journal, slot_map
from fs.ocfs2.volume import Volume
from guests.orphanscanner import INTERVAL_NS as ORPHAN_SCAN_NS
from guests.orphanscanner import OrphanScanner
from guests.rangequeries import RangeQueries
from guests.shareddisk import KeptDevice, read_layout
from ipc.errors import ExitCode, OperatorError
from ipc.mesh.addresses import UnixAddress
from ipc.mesh.faults import RandomFaults
from ipc.mesh.handshake import Reason
from ipc.mesh.link import Timing as LinkTiming
from ipc.mesh.mesh import Mesh

log = logging.getLogger(__name__)

MEMBERSHIP: Final = b"\0"
LOCKS: Final = b"\1"
RANGES: Final = b"\2"
"""The first byte of each message between nodes: whose it is."""
WAIT_SECONDS: Final = 0.02
"""How long a node that waits for a lock sleeps between two looks at its timers."""
HANDSHAKE_NS: Final = 5_000_000_000
RECOVERY_BLOCKS: Final = 64
"""Blocks cached while journals are looked for."""
JOIN_DEAD_TIMES: Final = 4
"""A node that is not in a view after so many dead times gives up."""
LEAVE_SECONDS: Final = 5.0


@dataclass(frozen=True)
class NodeSpec:
    """A guest's place among the nodes that mount a volume.

    `names` are the guests by node number, `key` (32 bytes) is what they prove to each other,
    `shared` says whether they share one pool of clean pages, and with `nemesis` the control socket
    may cut links and spoil messages.  `orphan_scan_ns` lies between two looks at all orphans.
    With `verify` the volume keeps checksums, and pages from tmem are compared with them.
    """

    volume: str
    number: int
    names: tuple[str, ...]
    key: bytes = field(repr=False)
    timing: Timing = field(default_factory=Timing)
    shared: bool = True
    nemesis: bool = False
    orphan_scan_ns: int = ORPHAN_SCAN_NS
    verify: bool = False


class Fenced(OSError):
    """This node is not in the cluster any more."""


class Node:
    """The node of one guest.  `clock_ns` goes on while the process is stopped."""

    def __init__(
        self,
        spec: NodeSpec,
        image: Path,
        run_directory: Path,
        *,
        socket_mode: int = 0o600,
        clock_ns: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Takes its place on the disk and listens; raises ImageError or OperatorError."""
        self.spec = spec
        self.members: frozenset[int] = frozenset()
        self.epoch = 0
        self.fenced_because: str | None = None
        self.refused_because: str | None = None
        self.recovered_nodes = 0
        self._headless_messages = 0
        self.orphan_scanner = OrphanScanner(spec.orphan_scan_ns, random_bytes)
        self.fs: Ocfs2 | None = None
        self._left = False
        self._dead: set[int] = set()
        """Their journals are not replayed yet, as far as is known here."""
        self._abandoned: set[int] = set()
        """Their journals are; somebody has to take their slots over and free their orphans."""
        self._kept_open = False
        """A dead node may have had files open that are orphans of this one."""
        self._recovering = False
        self._leaving = False
        self._clock_ns = clock_ns
        names = dict(enumerate(spec.names))
        sockets = {n: f"{run_directory}/node-{name}.sock" for n, name in names.items()}
        generation = int.from_bytes(random_bytes(8), "little") | 1
        layout = read_layout(image)
        if spec.number >= layout.slots or len(spec.names) > layout.slots:
            raise ImageError(
                f"image {image}: has {layout.slots} slots for {len(spec.names)} nodes; make it "
                f"anew with more"
            )
        self.device = SharedDevice(image, spec.number, generation, names=names)
        self.volume_device: BlockDevice = KeptDevice(self.device)
        """What the volume is mounted from."""
        try:
            timing = spec.timing
            self.mesh = Mesh(
                spec.number,
                spec.key,
                {n: UnixAddress(path, socket_mode) for n, path in sockets.items()},
                now_ns=clock_ns,
                random_bytes=random_bytes,
                cluster=spec.volume,
                parameters=timing.encode(),
                timing=LinkTiming(
                    timing.idle_timeout_ns, timing.keepalive_ns, timing.reconnect_ns, HANDSHAKE_NS
                ),
                names=names,
                difference=_difference,
            )
        except BaseException:
            self.device.close()
            raise
        self.cluster = ClusterNode(
            spec.number,
            generation,
            timing=timing,
            region=Region(self.device, layout.heartbeat_sector, layout.heartbeat_nodes),
            reservations=self.device,
            clock=clock_ns,
            send=lambda node, message: self._send(node, MEMBERSHIP + message),
            events=self,
            names=names,
            admits=lambda node: node not in self._dead,
        )
        self.device.lease = self.cluster.fence
        self.locks = NodeLocks(
            spec.number, _LockTransport(self._send), self._wait, label=self.label
        )
        self.range_queries = RangeQueries(
            spec.number,
            send=lambda node, message: self._send(node, RANGES + message),
            members=self.live,
            wait=self._wait,
            now_ns=clock_ns,
            label=self.label_of,
        )
        self.mesh.received = self._received
        self.mesh.up = self._up
        self.mesh.down = self._down

    # --- its life

    def join(self) -> None:
        """Become a member; raises OperatorError when the others refuse it or it takes too long."""
        patience_ns = JOIN_DEAD_TIMES * self.spec.timing.dead_ns
        deadline_ns = self._clock_ns() + patience_ns
        while not (self.members and self.locks.manager.ready):
            if self.refused_because is not None:
                raise OperatorError(self.refused_because, ExitCode.UNAVAILABLE)
            if self.mesh.refused[Reason.PARAMETERS]:
                raise OperatorError(
                    f"{self.label} has another timing than a node of volume {self.spec.volume} "
                    "that is there already; the log says which: make them equal",
                    ExitCode.BAD_CONFIG,
                )
            if self._clock_ns() > deadline_ns:
                raise OperatorError(
                    f"{self.label} did not get into the cluster of volume {self.spec.volume} in "
                    f"{patience_ns / 1e9:.0f} s; are other nodes stopped, or is the disk held?",
                    ExitCode.UNAVAILABLE,
                )
            self._wait()

    def mounted(self, fs: Ocfs2) -> None:
        """The volume is mounted under these locks; the slots of dead nodes can be taken over."""
        self.fs = fs
        fs.other_nodes.ask = self.range_queries.ask

    def leave(self) -> None:
        """After the volume was unmounted: say goodbye, as far as the others listen."""
        self.fs = None
        self._leaving = True
        if self.fenced_because is None and self.members:
            deadline_ns = self._clock_ns() + int(LEAVE_SECONDS * 1e9)
            self.locks.leave()
            while not self.locks.manager.links.idle and self._goes_on(deadline_ns):
                self._wait()
            self.cluster.leave()
            while not self._left and self._goes_on(deadline_ns):
                self._wait()
        self.close()

    def close(self) -> None:
        """Let go of sockets and disk, without a word."""
        self.mesh.close()
        self.device.close()

    def _goes_on(self, deadline_ns: int) -> bool:
        return self.fenced_because is None and self._clock_ns() < deadline_ns

    def now_ns(self) -> int:
        """This node's clock."""
        return self._clock_ns()

    @property
    def label(self) -> str:
        """This node for a person."""
        return self.label_of(self.spec.number)

    def label_of(self, number: int) -> str:
        """A node for a person."""
        return node_label(number, dict(enumerate(self.spec.names)))

    # --- what keeps it going

    def pump(self) -> None:
        """All that is due now, without waiting: messages, timers, locks that others want."""
        self._turn(0.0)
        if self.fenced_because is not None:
            return
        try:
            self.locks.serve()
        except OSError as reason:
            # What can't be written back can't be given up either: the others would wait for ever.
            self.cluster.fence.trip(f"it can't give up a lock ({reason.strerror})")
            return
        self._tidy_up()

    def _wait(self) -> None:
        """The same while a lock is waited for; raises Fenced when there is nothing to wait for."""
        self._turn(WAIT_SECONDS)
        if self.fenced_because is not None:
            raise Fenced(errno.EIO, f"{self.label} is fenced: {self.fenced_because}")

    def _turn(self, seconds: float) -> None:
        self.mesh.poll(seconds)
        now_ns = self._clock_ns()
        self.cluster.tick(now_ns)
        if self.fenced_because is None:
            self.locks.manager.tick(now_ns)
            self._recover_dead()

    def live(self) -> frozenset[int]:
        """The members now; whoever else owns a slot is dead."""
        return self.members

    # --- messages

    def _send(self, node: int, message: bytes) -> None:
        self.mesh.send(node, message)

    def _received(self, node: int, untrusted_payload: bytes) -> None:
        whose, message = untrusted_payload[:1], untrusted_payload[1:]
        if whose == MEMBERSHIP:
            self.cluster.deliver(node, message)
        elif whose == LOCKS and self.fenced_because is None:
            self.locks.manager.deliver(node, message)
        elif whose == RANGES and self.fenced_because is None:
            self.range_queries.deliver(node, message)
        elif whose not in (LOCKS, RANGES):
            self._headless_messages += 1

    @property
    def malformed_messages(self) -> int:
        """What other nodes have sent that was no message; it was dropped."""
        return (
            self._headless_messages
            + self.cluster.membership.malformed
            + self.locks.manager.links.malformed
            + self.range_queries.malformed
        )

    def _up(self, node: int) -> None:
        self.cluster.peer_up(node)
        self.locks.manager.peer_up(node)

    def _down(self, node: int) -> None:
        self.cluster.peer_down(node)
        self.locks.manager.peer_down(node)

    # --- what the cluster says (`fs.cluster.node.ClusterEvents`)

    def view(self, epoch: int, members: frozenset[int], dead: frozenset[int]) -> None:
        """A new view was agreed."""
        for node in dead:
            self.locks.manager.hold(node)
        self._dead |= dead
        self.epoch, self.members = epoch, members
        log.info(
            "event=view epoch=%d members=%s dead=%s",
            epoch,
            self._list(members),
            self._list(dead),
        )
        self.locks.manager.set_view(epoch, members)

    def _list(self, numbers: frozenset[int]) -> str:
        return ", ".join(self.label_of(number) for number in sorted(numbers)) or "none"

    def fenced(self, reason: str) -> None:
        """This node is out."""
        self.fenced_because = reason
        log.error("event=fenced node=%s why=%s", self.label, reason)

    def left(self) -> None:
        """This node has gone."""
        self._left = True

    def refused(self, reason: str) -> None:
        """The others won't have this node."""
        self.refused_because = reason

    # --- recovery

    def _recover_dead(self) -> None:
        """Replay the journals of dead nodes. This happens while locks are waited for, those of a
        mount among them, so it takes no lock but one that nobody keeps while he waits for others.
        """
        if self._recovering or not self._dead or self._leaving or not self.locks.manager.ready:
            return
        self._recovering = self.locks.recovering = True
        try:
            for node in sorted(self._dead):
                self._replay(node)
        finally:
            self._recovering = self.locks.recovering = False

    def _replay(self, node: int) -> None:
        """Replay what a dead node left in its journal, unless another survivor has."""
        name = self.label_of(node)
        self.locks.acquire(SUPER_LOCK, Mode.EX)
        try:
            # Where journals and slot map are never changes: no lock is needed to find them.
            volume = Volume(self.volume_device, LocalLocks(), 0, lambda: 0, RECOVERY_BLOCKS)
            # Under the super lock: a node that is a member again has taken its own slot back.
            owners = slot_map(volume).read() if node not in self.members else []
            for slot in (slot for slot, owner in enumerate(owners) if owner == node):
                self._abandoned.add(node)
                if slot_journal(volume, slot).dirty:
                    blocks = replay(volume, slot)
                    if self.fs is not None:
                        self.fs.journals_replayed()
                    self.recovered_nodes += 1
                    log.info("event=recovered node=%s slot=%d blocks=%d", name, slot, blocks)
            self.locks.manager.release_dead(node)
            self._dead.discard(node)
            self._kept_open = True
        finally:
            self.locks.release(SUPER_LOCK, Mode.EX)

    def _tidy_up(self) -> None:
        """What takes all kinds of locks: take over dead nodes' slots and free their orphans, and
        those of others that they had open; else look for orphans now and then."""
        fs = self.fs
        if fs is None or self._dead or not self.locks.manager.ready:
            return
        if self._abandoned:
            node = self._abandoned.pop()
            for slot, owner in enumerate(fs.slot_nodes()):
                if owner == node:
                    fs.recover_slot(slot, partial(self._is_abandoned, fs, slot, node))
        elif self._kept_open:
            self._kept_open = False
            fs.free_orphans()
        else:
            self._scan_orphans(fs)

    def _scan_orphans(self, fs: Ocfs2) -> None:
        try:
            self.orphan_scanner.step(fs, self._clock_ns())
        except Fenced:
            raise
        except OSError as reason:
            log.warning("event=orphan_scan_failed why=%s", reason.strerror)

    def _is_abandoned(self, fs: Ocfs2, slot: int, node: int) -> bool:
        return node not in self.members and fs.slot_nodes()[slot] == node

    # --- the nemesis

    def spoil(
        self,
        *,
        cut: list[str],
        heal: list[str],
        faults: Mapping[str, float],
        seed: int,
    ) -> None:
        """Cut and mend links, and lose, double or delay messages; raises ValueError."""
        numbers = {name: number for number, name in enumerate(self.spec.names)}
        if not self.spec.nemesis:
            raise ValueError("this guest was not started for a nemesis")
        for name in (*cut, *heal):
            if numbers.get(name) in (None, self.spec.number):
                raise ValueError(f"no other node is called {name!r}")
        for name in cut:
            self.mesh.cut(numbers[name])
        for name in heal:
            self.mesh.heal(numbers[name])
        lose, duplicate, delay, reorder = (
            float(faults.get(kind, 0.0)) for kind in ("lose", "duplicate", "delay", "reorder")
        )
        self.mesh.faults = (
            RandomFaults(Random(seed), lose=lose, duplicate=duplicate, delay=delay, reorder=reorder)
            if lose or duplicate or delay or reorder
            else None
        )


class _LockTransport:
    def __init__(self, send: Callable[[int, bytes], None]) -> None:
        self._send = send

    def send(self, to_node: int, message: bytes) -> None:
        self._send(to_node, LOCKS + message)


def _difference(mine: bytes, theirs: bytes) -> str:
    """Which timings differ, for a person."""
    try:
        texts = Timing.decode(mine).differences(Timing.decode(theirs), "this node", "the other")
    except ValueError:
        return "its timings make no sense"
    return "; ".join(texts)
