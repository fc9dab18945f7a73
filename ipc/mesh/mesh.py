"""All links of one node of a cluster, in one thread that never blocks.

    mesh = Mesh(2, key, addresses, cluster="demo", parameters=timing_bytes, ...)
    mesh.received = manager.deliver            # and mesh.up, mesh.down
    while True:
        mesh.poll(1.0)

Or in another loop: register `mesh.fileno()` (an epoll descriptor, readable when a socket has
something), wait no longer than `deadline_ns()`, then call `poll()`.

Promises
  * `up(node)`, then messages of `node` in the order sent and each once, then `down(node)`; what was
    sent and did not arrive before `down` is lost.  Nothing is kept for a node that is down: `send`
    says False.  (A fault policy breaks all of this on purpose.)
  * Callbacks run inside `poll` only.  They may call `send` and also `poll`: an inner `poll` goes on
    with the messages after the one that is being delivered.
  * A peer that does not read costs `queue_bytes_max`; then `send` says False.  A peer that
    floods is read at most `READ_BYTES` a poll.

One connection a pair: the higher number connects, to the lower one's address, at once when its
process starts and after a loss every `reconnect_ns`, after failures up to four times as slowly.

A number claimed twice.  Each process has an incarnation.  A new connection of the same incarnation
replaces the old one, since the peer then has given that up.  One of another incarnation is refused
while the old link was heard of within two keepalive intervals; after that the old process is taken
for dead or cut off, and the new one replaces it.  o2net refuses until the idle timeout has passed.

Refused connections are counted by reason in `refused`, and logged once a minute for each node and
reason, so that a stranger can't fill the log.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from collections import Counter, deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final, NamedTuple

from ipc.errors import OperatorError
from ipc.mesh.addresses import Address, Listener, begin_connect, origin
from ipc.mesh.faults import Copy, Policy, Post
from ipc.mesh.frames import PAYLOAD_BYTES_MAX, Kind
from ipc.mesh.handshake import (
    INCARNATION_BYTES,
    NODE_MAX,
    NONCE_BYTES,
    Difference,
    Handshake,
    Identity,
    Reason,
    Refused,
    check_shared,
    show_difference,
)
from ipc.mesh.link import Link, Lost, Phase, Timing
from ipc.mesh.peer import Peer
from ipc.mesh.watch import Refusals, Watcher

log = logging.getLogger(__name__)

QUEUE_BYTES_MAX: Final = 1 << 20
HANDSHAKES_MAX: Final = 32
"""Strangers at a time; when another one comes the oldest of those goes of whose process there are
the most.  So who only opens connections keeps nobody out."""
_ACCEPTS_A_POLL: Final = 16
_INBOX_BYTES_MAX: Final = 4 << 20
"""No more is read when this much waits to be delivered."""


class _News(Enum):
    UP = "up"
    DOWN = "down"
    MESSAGE = "message"


class _Item(NamedTuple):
    news: _News
    node: int
    payload: bytes = b""


class Mesh:
    """See the module."""

    def __init__(
        self,
        node: int,
        key: bytes,
        addresses: Mapping[int, Address],
        *,
        now_ns: Callable[[], int],
        random_bytes: Callable[[int], bytes],
        cluster: str = "cluster",
        parameters: bytes = b"",
        timing: Timing | None = None,
        names: Mapping[int, str] | None = None,
        difference: Difference = show_difference,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
    ) -> None:
        """Listens at `addresses[node]`; raises OperatorError."""
        if node not in addresses or not all(0 <= n <= NODE_MAX for n in addresses):
            raise OperatorError(f"node numbers are 0 to {NODE_MAX}, and {node} needs an address")
        check_shared(key, cluster, parameters)
        self.node = node
        self.timing = timing or Timing()
        self.received: Callable[[int, bytes], None] = lambda _node, _payload: None
        self.up: Callable[[int], None] = lambda _node: None
        self.down: Callable[[int], None] = lambda _node: None
        self.faults: Policy | None = None
        self._names = names or {}
        self._difference = difference
        self._key = key
        self._now_ns = now_ns
        self._random_bytes = random_bytes
        self._queue_bytes_max = queue_bytes_max
        self._identity = Identity(node, cluster, parameters, random_bytes(INCARNATION_BYTES))
        now = now_ns()
        self._peers = {n: Peer(n, a, now) for n, a in addresses.items() if n != node}
        self._strangers: dict[Link, object] = {}
        """Handshakes with whoever came, oldest first, and whom they are from."""
        self._inbox: deque[_Item] = deque()
        self._inbox_bytes = 0
        self._post = Post(queue_bytes_max)
        self._refusals = Refusals(self.name(node))
        self._listener = Listener(addresses[node])
        self._deaf_until_ns: int | None = None
        self._watcher = Watcher(self._listener)

    # --- what it knows --------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """Where this node listens, with the port that the kernel chose."""
        return self._listener.address

    def name(self, node: int) -> str:
        """The node for a person."""
        return f"node {self._names[node]} ({node})" if node in self._names else f"node {node}"

    @property
    def refused(self) -> Counter[Reason]:
        """How many connections were refused, and why."""
        return self._refusals.counts

    def is_up(self, node: int) -> bool:
        return node in self.up_nodes()

    def up_nodes(self) -> frozenset[int]:
        return frozenset(node for node, peer in self._peers.items() if peer.link is not None)

    def incarnation(self, node: int) -> bytes | None:
        """Of the peer's process; None if it is down."""
        link = self._peers[node].link
        return None if link is None else link.session.peer.incarnation

    def queued_bytes(self, node: int) -> int:
        link = self._peers[node].link
        return 0 if link is None else link.queued_bytes

    # --- what is asked of it --------------------------------------------------------------------

    def send(self, node: int, payload: bytes) -> bool:
        """Queue a message; False if the node is down or its queue is full."""
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise ValueError(f"a message has at most {PAYLOAD_BYTES_MAX} bytes")
        peer = self._peers[node]
        if peer.link is None:
            return False
        now = self._now_ns()
        if self.faults is None and self._post.is_empty():
            return self._queue(peer.link, payload, now)
        copies = (Copy(),) if self.faults is None else self.faults.fate(node, payload)
        accepted = self._post.put(node, payload, copies, now)
        self._deliver_post(now)
        return accepted

    def rekey(self, key: bytes) -> None:
        """Prove membership by another key from now on.  Links that are up go on, they have keys of
        their own; between a node that has the new key and one that has not no link comes up."""
        check_shared(key, self._identity.cluster, self._identity.parameters)
        self._key = key

    def cut(self, node: int) -> None:
        """The network between this node and `node` is gone, both ways, and nobody is told."""
        peer = self._peers[node]
        peer.cut = True
        self._freeze(peer, frozen=True)

    def heal(self, node: int) -> None:
        """The network is back; a link that outlived the cut goes on where it was."""
        peer = self._peers[node]
        peer.cut = False
        peer.retry(self._now_ns())
        self._freeze(peer, frozen=False)

    def _freeze(self, peer: Peer, *, frozen: bool) -> None:
        for link in peer.links():
            link.frozen = frozen
            self._watcher.watch(link)

    def fileno(self) -> int:
        return self._watcher.fileno()

    def deadline_ns(self) -> int | None:
        """When `poll` must be called even if no socket is ready; None if never."""
        if self._inbox:
            return self._now_ns()
        deadlines = [link.deadline_ns() for link in self._watcher.links()]
        deadlines += [peer.next_try_ns for peer in self._peers.values() if self._may_connect(peer)]
        deadlines += [
            ns for ns in (self._deaf_until_ns, self._post.next_due_ns()) if ns is not None
        ]
        return min(deadlines, default=None)

    def poll(self, timeout_seconds: float = 0.0) -> None:
        """Wait until something happens, but not longer, and do all that there is to do."""
        deadline = self.deadline_ns()
        if deadline is not None:
            wait = max(0.0, (deadline - self._now_ns()) / 1e9)
            timeout_seconds = min(wait, max(0.0, timeout_seconds))
        ready = self._watcher.wait(timeout_seconds)
        # What has arrived comes before the timers: a process that was stopped itself must not
        # take the peers for silent.
        now = self._now_ns()
        for link, events in ready:
            if link is None:
                self._accept(now)
            elif link.socket.fileno() >= 0:
                self._serve(link, events, now)
        self._tick(now)
        self._deliver()

    def close(self) -> None:
        """Leave, without callbacks."""
        self._watcher.close()
        self._inbox.clear()
        self._strangers.clear()
        for peer in self._peers.values():
            peer.link = peer.attempt = None
        self._listener.close()

    # --- sockets --------------------------------------------------------------------------------

    def _link(self, connection: socket.socket, peer: int | None, now: int) -> Link:
        handshake = Handshake(
            self._identity,
            self._key,
            self._random_bytes(NONCE_BYTES),
            self._peers,
            peer=peer,
            name=self.name,
            difference=self._difference,
        )
        link = Link(connection, handshake, self.timing, self._queue_bytes_max, now)
        self._watcher.watch(link)
        return link

    def _accept(self, now: int) -> None:
        for _ in range(_ACCEPTS_A_POLL):
            try:
                connection = self._listener.accept()
            except OSError as error:
                # Out of descriptors: the listener would be ready all the time.
                log.warning("%s can't accept: %s", self.name(self.node), error.strerror)
                self._watcher.ignore()
                self._deaf_until_ns = now + self.timing.reconnect_ns
                return
            if connection is None:
                return
            if len(self._strangers) >= HANDSHAKES_MAX:
                refused = Refused(Reason.CROWDED, "too many handshakes at once")
                self._refuse(self._one_too_many(), refused, now)
            whose = origin(connection)
            self._strangers[self._link(connection, None, now)] = whose

    def _one_too_many(self) -> Link:
        """The oldest stranger of those who sent the most."""
        held = Counter(self._strangers.values())
        most = max(held.values())
        return next(link for link, whose in self._strangers.items() if held[whose] == most)

    def _may_connect(self, peer: Peer) -> bool:
        return peer.node < self.node and peer.link is None and peer.attempt is None and not peer.cut

    def _connect(self, peer: Peer, now: int) -> None:
        peer.failed(now, self.timing.reconnect_ns)
        try:
            connection = begin_connect(peer.address)
        except OSError as error:
            log.debug("%s does not answer: %s", self.name(peer.node), error.strerror)
            return
        peer.attempt = self._link(connection, peer.node, now)

    def _serve(self, link: Link, events: int, now: int) -> None:
        try:
            if link.phase is Phase.CONNECTING:
                link.finish_connect()
            elif events & ~select.EPOLLOUT and self._inbox_bytes <= _INBOX_BYTES_MAX:
                link.read()
                if link.phase is not Phase.UP:
                    self._shake(link, now)
                if link.phase is Phase.UP:
                    self._take(link, now)
            link.flush(now)
            self._watcher.watch(link)
        except Lost as lost:
            self._lose(link, str(lost), now)
        except Refused as refused:
            self._refuse(link, refused, now)

    def _shake(self, link: Link, now: int) -> None:
        proved = link.shake(now)
        if link.node is not None and self._peers[link.node].cut:
            raise Lost("it is cut off")
        if proved:
            self._admit(link, now)

    def _take(self, link: Link, now: int) -> None:
        assert link.node is not None
        for payload in link.messages(now):
            self._inbox_bytes += len(payload)
            self._inbox.append(_Item(_News.MESSAGE, link.node, payload))

    def _admit(self, link: Link, now: int) -> None:
        """Both ends have proved themselves; raises Refused if the number is in use."""
        theirs = link.session.peer
        peer = self._peers[theirs.node]
        old = peer.link
        if old is not None:
            other = old.session.peer.incarnation != theirs.incarnation
            if other and now - old.heard_ns < 2 * self.timing.keepalive_ns:
                name = self.name(peer.node)
                raise Refused(
                    Reason.IN_USE, f"{name} is connected already: two processes have its number"
                )
            self._lose(old, "replaced by a new connection", now)
        self._strangers.pop(link, None)
        peer.connected(link)
        link.rise(now)
        self._refusals.forgive(peer.node)
        log.info("%s: %s is connected", self.name(self.node), self.name(peer.node))
        self._inbox.append(_Item(_News.UP, peer.node))

    def _lose(self, link: Link, why: str, now: int) -> None:
        self._watcher.forget(link)
        self._strangers.pop(link, None)
        for peer in self._peers.values():
            if peer.attempt is link:
                peer.attempt = None
                log.debug("%s does not answer: %s", self.name(peer.node), why)
            elif peer.link is link:
                peer.link = None
                peer.failed(now, self.timing.reconnect_ns)
                log.info("%s: %s is lost: %s", self.name(self.node), self.name(peer.node), why)
                self._inbox.append(_Item(_News.DOWN, peer.node))

    def _refuse(self, link: Link, refused: Refused, now: int) -> None:
        self._refusals.add(link.node, refused, now)
        if refused.reason is not Reason.REFUSED and link.phase is not Phase.UP:
            link.refuse(refused.text)
        self._lose(link, refused.text, now)

    # --- messages and time ----------------------------------------------------------------------

    def _queue(self, link: Link, payload: bytes, now: int) -> bool:
        if not link.queue(Kind.DATA, payload, now):
            return False
        # A broken socket is noticed by the next poll, where callbacks may run.
        with contextlib.suppress(Lost):
            link.flush(now)
        self._watcher.watch(link)
        return True

    def _deliver_post(self, now: int) -> None:
        for node, payload in self._post.take_due(now):
            link = self._peers[node].link
            if link is not None:
                self._queue(link, payload, now)

    def _tick(self, now: int) -> None:
        if self._deaf_until_ns is not None and now >= self._deaf_until_ns:
            self._deaf_until_ns = None
            self._watcher.hear()
        self._deliver_post(now)
        for link in self._watcher.links():
            if link.deadline_ns() > now or link.socket.fileno() < 0:
                continue
            try:
                link.tick(now)
                link.flush(now)
                self._watcher.watch(link)
            except Lost as lost:
                self._lose(link, str(lost), now)
            except Refused as refused:
                self._refuse(link, refused, now)
        for peer in self._peers.values():
            if self._may_connect(peer) and now >= peer.next_try_ns:
                self._connect(peer, now)

    def _deliver(self) -> None:
        while self._inbox:
            news, node, payload = self._inbox.popleft()
            self._inbox_bytes -= len(payload)
            if news is _News.MESSAGE:
                self.received(node, payload)
            elif news is _News.UP:
                self.up(node)
            else:
                self.down(node)
