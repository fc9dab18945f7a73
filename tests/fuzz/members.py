"""What a member of a cluster can send to another, or write on the disk that they share.

Messages of membership, heartbeat sectors, timings; a membership among others that beat on a disk
that it is told of, and a whole node (heartbeat, quorum, fence, membership) on sectors that anybody
has written.  What a node sends is a message, its views only go on, and it does nothing once it is
fenced.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from typing import Final

from fs.block.reservations import ReservationConflict
from fs.cluster import messages as cluster
from fs.cluster import region
from fs.cluster.config import Timing
from fs.cluster.membership import Membership
from fs.cluster.node import ClusterNode
from fs.cluster.view import MAX_EPOCH, Ballot, View, make_view
from tests.fuzz.reading import Reader, hold
from tests.support.messages import membership_message_is_taken

_VIEW_OFFSET: Final = 32
"""Of what a node says in its sector about the members: a magic number, the epoch."""

STEPS_MAX: Final = 120
_EPOCHS: Final = (1, 2, 2, 3, 4, 2**32, 2**63, 2**64 - 1)


class _Witness:
    """The disk as a node sees it: three nodes beat."""

    def __init__(self) -> None:
        self.beating = {0: 10, 1: 11, 2: 12}
        self.gone: dict[int, int] = {}
        self.epoch = 0

    def live(self) -> dict[int, int]:
        return dict(self.beating)

    def claims(self) -> Mapping[int, frozenset[int]]:
        return {}

    def unclean(self) -> dict[int, int]:
        return dict(self.gone)

    def silent(self) -> bool:
        return True

    def highest_epoch(self) -> int:
        return self.epoch

    def preempt(self, node: int, generation: int) -> bool:
        return self.beating.get(node) != generation

    def publish(self, epoch: int, members: frozenset[int]) -> bool:
        region.encode(region.Beat(1, 0, 10, 100, epoch, members))
        self.epoch = max(self.epoch, epoch)
        return True

    def fenced(self) -> bool:
        return False


class _Member:
    """One node's membership, told by bytes what comes in."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._witness = _Witness()
        self._epoch = 0
        self._now_ns = 0
        self._node = reader.byte() % 2
        self._membership = Membership(
            self._node,
            self._witness.beating[self._node],
            timing=Timing(),
            witness=self._witness,
            outcome=self,
            send=self._sent,
        )

    def _sent(self, to_node: int, message: bytes) -> None:
        hold(to_node != self._node, "a message to itself")
        cluster.decode(message)

    # Outcome

    def installed(self, view: View, dead: frozenset[int]) -> None:
        hold(view.epoch > self._epoch, "a view that is not newer")
        hold(self._node in view.members and self._node not in dead, "a view without the node")
        self._epoch = view.epoch

    def excluded(self, reason: str) -> None:
        pass

    def gone(self) -> None:
        pass

    def refused(self, reason: str) -> None:
        hold(len(reason) < 2000, "a long refusal")

    def run(self) -> None:
        """All steps."""
        for _ in range(STEPS_MAX):
            if self._reader.left <= 0:
                break
            self._step()

    def _step(self) -> None:
        reader = self._reader
        control = reader.byte()
        sender = control >> 3 & 3
        match control & 7:
            case 0:
                self._membership.deliver(sender, reader.take(reader.byte()))
            case 1 | 2:
                self._now_ns += 1 << 31
                self._membership.tick(self._now_ns)
            case 3:
                self._change_disk(sender)
            case _:
                message = bytearray(cluster.encode(self._message(sender)))
                if control >> 6 == 3:
                    message[reader.byte() % len(message)] ^= reader.byte()
                self._membership.deliver(sender, bytes(message))

    def _change_disk(self, node: int) -> None:
        if node == self._node:
            if self._reader.byte() == 255:
                self._membership.leave()
        elif node in self._witness.beating:
            self._witness.gone[node] = self._witness.beating.pop(node)
        else:
            made = self._witness.gone.pop(node, 12)
            self._witness.beating[node] = made + self._reader.byte() % 2

    def _message(self, sender: int) -> cluster.Message:
        return made_up(self._reader, sender, self._epoch, self._witness.beating)


def made_up(
    reader: Reader, sender: int, now: int, generations: Mapping[int, int]
) -> cluster.Message:
    """A message that may be right; `now` is the epoch of whoever gets it."""
    kind_byte, choice = reader.take(2)
    kind = tuple(cluster.Kind)[kind_byte % len(cluster.Kind)]
    epochs = (now + 1, now, now + 2, *_EPOCHS)
    epoch = min(epochs[choice % len(epochs)], 2**64 - 1)
    ballot = Ballot(epoch, (choice >> 4) + 1, sender)
    members = {node: made for node, made in generations.items() if not kind_byte >> 4 >> node & 1}
    left = frozenset(generations) - frozenset(members)
    view = make_view(epoch or 1, members or {sender: 1}, left=left - {sender})
    view = View(view.epoch, view.generations, left=left - view.members)
    accepted = (Ballot(view.epoch, 1, 2), view) if choice & 1 else None
    return cluster.Message(
        kind, generations.get(sender, 1), ballot, bool(choice & 128), accepted, view, epoch,
        Timing() if choice & 64 else Timing.fast(), "x" * choice,
    )  # fmt: skip


class _Node:
    """A whole node, node 1 of four; sectors of others are what the bytes have written."""

    _KNOWN: Final = {0: 10, 1: 11, 2: 12, 3: 13}

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._now_ns = 10**9
        self._epoch = 0
        self._over = False
        self._sectors = [bytes(region.SECTOR_BYTES)] * 4
        self._sequence = dict.fromkeys(self._KNOWN, 0)
        self._preempted = False
        self._dead: set[int] = set()
        self._timing = Timing.fast()
        self._node = ClusterNode(
            1,
            self._KNOWN[1],
            timing=self._timing,
            region=region.Region(self, 0, 4),
            reservations=self,
            clock=lambda: self._now_ns,
            send=self._sent,
            events=self,
        )

    # SectorDevice, ReservationTable

    def read_sectors(self, sector: int, count: int) -> bytes:
        if self._reader.left % 61 == 60:
            raise OSError(errno.EIO, "a sector that can't be read")
        return b"".join(self._sectors[sector : sector + count])

    def write_sector(self, sector: int, data: bytes) -> None:
        hold(sector == 1, "another's sector")
        if self._preempted:
            raise ReservationConflict(errno.EIO, "preempted")
        beat = region.decode(data)
        hold(beat is not None and beat.epoch <= MAX_EPOCH, "a beat that can't be")
        self._sectors[sector] = data

    def preempt(self, node: int, key: int) -> bool:
        hold(node != 1, "its own reservation")
        self._dead.add(node)
        return bool(key & 1)

    def gone(self, node: int, _key: int) -> bool:
        return node in self._dead

    def finish_off(self, node: int, _key: int) -> bool:
        hold(node != 1, "an end of its own")
        return True

    # ClusterEvents

    def _sent(self, to_node: int, message: bytes) -> None:
        hold(to_node != 1 and not self._over, "a message of one that is out, or to itself")
        cluster.decode(message)

    def view(self, epoch: int, members: frozenset[int], dead: frozenset[int]) -> None:
        hold(epoch > self._epoch and not self._over, "a view that is not newer")
        hold(1 in members and 1 not in dead, "a view without the node")
        self._epoch = epoch

    def fenced(self, reason: str) -> None:
        hold(bool(reason) and not self._over, "fenced twice, or for no reason")
        self._over = True

    def left(self) -> None:
        self._over = True

    def refused(self, reason: str) -> None:
        hold(len(reason) < 2000, "a long refusal")
        self._over = True

    def run(self) -> None:
        """All steps."""
        # Beats until others could know it, or nothing would come of what they say.
        for _ in range(self._reader.byte() % 8):
            self._tick()
        for _ in range(STEPS_MAX):
            if self._reader.left <= 0 or self._over:
                break
            self._step()

    def _tick(self) -> None:
        for node in (0, 2):
            if node not in self._dead:
                self._beat(node, self._KNOWN[node], self._epoch, frozenset())
        self._now_ns = max(self._now_ns, self._node.next_tick_ns)
        self._node.tick(self._now_ns)

    def _beat(self, node: int, generation: int, epoch: int, members: frozenset[int]) -> None:
        self._sequence[node] += 1
        beat = region.Beat(
            self._sequence[node], node, generation, self._timing.dead_ms, epoch, members
        )
        self._sectors[node] = region.encode(beat)

    def _step(self) -> None:
        reader = self._reader
        control = reader.byte()
        node = control >> 3 & 3
        match control & 7:
            case 0 | 1 | 2:
                self._tick()
            case 3:
                self._write_sector(node)
            case 4:
                self._happen(node, reader.byte())
            case _:
                message = bytearray(cluster.encode(made_up(reader, node, self._epoch, self._KNOWN)))
                if control >> 6 == 3:
                    message[reader.byte() % len(message)] ^= reader.byte()
                self._node.deliver(node, bytes(message))

    def _write_sector(self, node: int) -> None:
        choice, members = self._reader.take(2)
        epoch = min(_EPOCHS[choice & 7], MAX_EPOCH)
        generation = (self._KNOWN[node], 0, 99, 2**64 - 1)[choice >> 3 & 3]
        self._beat(node, generation, epoch, region.bits(bytes([members])))
        if choice & 128:
            sector = bytearray(self._sectors[node])
            at = self._reader.byte() % 64
            sector[at] ^= self._reader.byte()
            if choice & 64:
                sector[12:16] = region.checksum(sector).to_bytes(4, "little")
            self._sectors[node] = bytes(sector)

    def _happen(self, node: int, choice: int) -> None:
        match choice & 7:
            case 0 | 1 | 2:
                self._node.peer_up(node)
            case 3:
                self._node.peer_down(node)
            case 4:
                self._now_ns += choice << 26
            case 5:
                self._dead ^= {node} - {1}
            case 6:
                self._preempted = choice > 200
            case _:
                if choice > 200:
                    self._node.leave()


def fuzz_cluster(data: bytes) -> None:
    """The first byte chooses: a message, a sector, timings, or steps of a node or a part of it."""
    kind, rest = (data[0] % 8 if data else 0), data[1:]
    try:
        match kind:
            case 0 | 1:
                membership_message_is_taken(rest)
            case 2:
                sector = bytearray(rest[: region.SECTOR_BYTES].ljust(region.SECTOR_BYTES, b"\0"))
                beat = region.decode(bytes(sector))
                sector[12:16] = region.checksum(sector).to_bytes(4, "little")
                beat = beat or region.decode(bytes(sector))
                magic, epoch = struct.unpack_from("<8sQ", sector, _VIEW_OFFSET)
                impossible = magic == region.MAGIC and epoch > MAX_EPOCH
                hold((beat is None) == impossible, "a sector with the right checksum")
            case 3:
                hold(Timing.decode(rest).encode() == rest, "timings that change")
            case 4 | 5:
                _Member(Reader(rest)).run()
            case _:
                _Node(Reader(rest)).run()
    except ValueError:
        hold(kind < 4, "a node that gives up")
