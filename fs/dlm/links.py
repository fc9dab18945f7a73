"""Order and exactly-once between two nodes, on a transport that promises neither.

Each pair of nodes has, for each epoch, two numbered streams of messages. A frame is sent again
until it is acknowledged; a number that came already is dropped; one that came too early waits.
A new view starts all streams anew, and what was under way in the old one is forgotten on both
sides: `recovery` tells the new masters everything that counts. So no frame of an old view has an
effect, however late it comes, and no connection has to be set up or torn down.

A frame of a view that this node has not seen yet waits too (its sender was told sooner), within
the same bound. o2net leaves all this to TCP and declares the other node dead when a connection
breaks; we let links break, because membership alone decides who is dead.

Memory a peer can take: `WINDOW` frames too early and `WINDOW` of views to come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from fs.dlm.codec import decode, encode, encode_frame
from fs.dlm.messages import Frame, Kind, Message, MessageError
from fs.dlm.transport import LockTransport

WINDOW = 256
"""Frames under way to one peer that are not acknowledged yet."""
RETRANSMIT_NS = 100_000_000
BACKOFF_MAX = 16
"""A peer that is silent is asked at this many times the first interval."""


class _Sent:
    """A frame under way."""

    __slots__ = ("body", "kind", "sent_ns", "sequence")

    def __init__(self, sequence: int, kind: Kind, body: bytes) -> None:
        self.sequence = sequence
        self.kind = kind
        self.body = body
        self.sent_ns = 0


class _Peer:
    """Both streams between this node and another, in one epoch."""

    def __init__(self) -> None:
        self.next_sequence = 1
        self.under_way: deque[_Sent] = deque()
        self.backlog: deque[_Sent] = deque()
        self.expected = 1
        self.early: dict[int, Message] = {}
        self.must_acknowledge = False
        self.backoff = 1
        self.down = False


class Links:
    """This node's links to the other members of the view."""

    def __init__(
        self, node: int, transport: LockTransport, *, retransmit_ns: int = RETRANSMIT_NS
    ) -> None:
        self.node = node
        self.epoch = 0
        self.malformed = 0
        """Frames that were no messages."""
        self.retransmitted = 0
        self._transport = transport
        self._retransmit_ns = retransmit_ns
        self._now_ns = 0
        self._peers: dict[int, _Peer] = {}
        self._to_come: dict[int, list[tuple[int, bytes]]] = {}

    @property
    def idle(self) -> bool:
        """Everything that was sent has arrived."""
        return not any(peer.under_way for peer in self._peers.values())

    def start(self, epoch: int, members: Iterable[int]) -> None:
        """Start new streams; then call `came_early`."""
        self.epoch = epoch
        self._peers = {node: _Peer() for node in members if node != self.node}

    def came_early(self) -> Iterator[tuple[int, list[Message]]]:
        """Messages of the epoch that has just started, which were here before it."""
        waiting, self._to_come = self._to_come, {}
        for node in sorted(waiting):
            for epoch, untrusted in waiting[node]:
                if epoch > self.epoch:
                    self._to_come.setdefault(node, []).append((epoch, untrusted))
                elif epoch == self.epoch:
                    yield node, self.receive(node, untrusted)

    def post(self, to_node: int, message: Message) -> None:
        """Send `message`: it will arrive once, in order, if the epoch lasts."""
        peer = self._peers.get(to_node)
        if peer is None:
            return
        sent = _Sent(peer.next_sequence, *encode(message))
        peer.next_sequence += 1
        if len(peer.under_way) < WINDOW:
            peer.under_way.append(sent)
            self._send(to_node, peer, sent)
        else:
            peer.backlog.append(sent)

    def receive(self, from_node: int, untrusted: bytes) -> list[Message]:
        """The messages that are in order now. Call `acknowledge` when they were dealt with."""
        try:
            frame = decode(untrusted)
        except MessageError:
            self.malformed += 1
            return []
        if frame.epoch > self.epoch:
            waiting = self._to_come.setdefault(from_node, [])
            if len(waiting) < WINDOW:
                waiting.append((frame.epoch, untrusted))
            return []
        peer = self._peers.get(from_node)
        if frame.epoch < self.epoch or peer is None:
            return []
        peer.down = False
        self._acknowledged(from_node, peer, frame.acknowledged)
        return self._in_order(peer, frame)

    def acknowledge(self) -> None:
        """Acknowledge what no message back has acknowledged on its way."""
        for node, peer in self._peers.items():
            if peer.must_acknowledge:
                peer.must_acknowledge = False
                frame = encode_frame(self.epoch, 0, peer.expected - 1, Kind.ACK, b"")
                self._transport.send(node, frame)

    def tick(self, now_ns: int) -> None:
        """Send again what was not acknowledged in time."""
        self._now_ns = now_ns
        for node, peer in self._peers.items():
            if not peer.under_way or peer.down:
                continue
            if now_ns - peer.under_way[0].sent_ns >= self._retransmit_ns * peer.backoff:
                peer.backoff = min(2 * peer.backoff, BACKOFF_MAX)
                self._send_again(node, peer)

    def peer_up(self, node: int) -> None:
        """A connection came back: don't wait for the clock."""
        peer = self._peers.get(node)
        if peer is not None:
            peer.down = False
            peer.backoff = 1
            self._send_again(node, peer)

    def peer_down(self, node: int) -> None:
        """No connection: nothing is sent again until there is one, or the peer is heard."""
        if node in self._peers:
            self._peers[node].down = True

    def _in_order(self, peer: _Peer, frame: Frame) -> list[Message]:
        if frame.message is None:
            return []
        peer.must_acknowledge = True
        if peer.expected <= frame.sequence < peer.expected + WINDOW:
            peer.early[frame.sequence] = frame.message
        messages = []
        while peer.expected in peer.early:
            messages.append(peer.early.pop(peer.expected))
            peer.expected += 1
        return messages

    def _acknowledged(self, node: int, peer: _Peer, sequence: int) -> None:
        while peer.under_way and peer.under_way[0].sequence <= sequence:
            peer.under_way.popleft()
            peer.backoff = 1
        while peer.backlog and len(peer.under_way) < WINDOW:
            sent = peer.backlog.popleft()
            peer.under_way.append(sent)
            self._send(node, peer, sent)

    def _send_again(self, node: int, peer: _Peer) -> None:
        self.retransmitted += len(peer.under_way)
        for sent in peer.under_way:
            self._send(node, peer, sent)

    def _send(self, node: int, peer: _Peer, sent: _Sent) -> None:
        peer.must_acknowledge = False
        sent.sent_ns = self._now_ns
        frame = encode_frame(self.epoch, sent.sequence, peer.expected - 1, sent.kind, sent.body)
        self._transport.send(node, frame)
