"""Who is attached: the handshake on the attach socket, guests' lives and deaths.

A *session* is one attachment of one guest process: its queues and window (the `QueuePair`), its
connection to the attach socket and a pidfd.  The client in the machine outlives the session: after
a hypervisor restart the guest's new session finds its client, and pools, as they were.

  state of a client   session   how it ends
  attached            yes       BYE or process end: departed, pools freed in slices
  detached            no        comes back (same process), or its process ends: departed

Process end is seen on the pidfd, never guessed from silence.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Final

from hypervisor.doorman import Doorman
from hypervisor.machine import Machine
from hypervisor.pools import Client
from hypervisor.pressure import shared_info
from ipc import attach
from ipc.abi import BYE_MAGIC, CONFIRM, CONFIRM_BYTES, CONFIRM_MAGIC, HELLO_BYTES
from ipc.channel import Port
from ipc.errors import OperatorError
from ipc.limits import HANDSHAKE_SECONDS, HANDSHAKES_MAX
from ipc.mqueue import QueuePair
from ipc.names import Registry, process_start
from ipc.ring import RingPair, Rings
from ipc.window import create_window

log = logging.getLogger(__name__)

_TOO_MANY: Final = "too many guests attach at once; try again"
_BARRED: Final = "your process was detached: it broke too many rules"
BARRED_MAX: Final = 1024
"""Expelled processes remembered before those that have ended are forgotten."""

Handler = Callable[[], None]


class Session:
    """An attachment; `client` and `pair` are None until the guest has said who it is."""

    __slots__ = (
        "client",
        "connection",
        "deadline",
        "guest",
        "pair",
        "peer",
        "port",
        "ring",
        "token_digest",
    )

    guest: Client
    port: Port
    """`client` and `pair` once more, set when both are there: what serving reads each call."""
    ring: RingPair | None
    """The pair once more if it is one of a ring."""

    token_digest: bytes
    """Of the token that it came with, once it has said who it is."""

    def __init__(self, connection: socket.socket, peer: attach.Peer, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline
        self.peer = peer
        self.client: Client | None = None
        self.pair: QueuePair | None = None
        self.ring = None


class Sessions:
    """Owns the attach socket.  `handlers` maps each descriptor it watches in `poll` to what to do
    when it is readable; `serving` maps request queues' descriptors to sessions.  A guest that asks
    for a ring gets one unless `rings` is None; `refused` is told of each handshake that failed."""

    def __init__(
        self,
        machine: Machine,
        run_directory: Path,
        cluster: str,
        registry: Registry,
        poll: Doorman,
        handlers: dict[int, Handler],
        rings: Rings[Session] | None,
        *,
        now_seconds: Callable[[], float],
        random_bytes: Callable[[int], bytes],
        refused: Callable[[str, str], None],
        guests_gid: int | None = None,
    ) -> None:
        self._machine = machine
        self._run_directory = run_directory
        self._cluster = cluster
        self._registry = registry
        self._poll = poll
        self._handlers = handlers
        self._rings = rings
        self._now_seconds = now_seconds
        self._random_bytes = random_bytes
        self._refused = refused
        self.serving: dict[int, Session] = {}
        self._by_client: dict[str, Session] = {}
        self._pidfds: dict[str, int] = {}
        self._pending: dict[int, Session] = {}
        self._barred: set[tuple[int, int]] = set()
        """Process id and start of guests that were expelled."""
        self._barred_tokens: dict[str, bytes] = {}
        """By name; as many as were ever enrolled."""
        self._earlier_faults: dict[str, tuple[bytes, int]] = {}
        """Of guests that have left, by name, with the token they had: who comes back with it has
        them again."""
        self._listener = attach.listen(run_directory, guests_gid)
        self._watch(self._listener.fileno(), self._accept)
        machine.pressure.notify = self.notify
        for client in list(machine.clients.values()):
            self._await_return(client)

    def _watch(self, fd: int, handler: Handler) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def is_attached(self, client: Client) -> bool:
        return client.name in self._by_client

    def _await_return(self, client: Client) -> None:
        """A client that was found in the arena: its process may come back, or be dead already."""
        if process_start(client.pid) == client.start_ticks:
            with contextlib.suppress(ProcessLookupError):
                self._watch_life(client, os.pidfd_open(client.pid))
                return
        log.info("guest=%s event=gone-before-restart pid=%d", client.name, client.pid)
        self._machine.depart(client)

    def _watch_life(self, client: Client, pidfd: int) -> None:
        self._forget_life(client)
        self._pidfds[client.name] = pidfd
        self._watch(pidfd, lambda: self._guest_died(client))

    def _forget_life(self, client: Client) -> None:
        pidfd = self._pidfds.pop(client.name, None)
        if pidfd is not None:
            self._unwatch(pidfd)
            os.close(pidfd)

    # --- handshake

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        try:
            peer = attach.identify(connection)
        except (attach.HandshakeError, OSError):
            connection.close()
            return
        if len(self._pending) >= HANDSHAKES_MAX and not self._make_way(peer.pid):
            self._refused("?", _TOO_MANY)
            attach.send_refusal(connection, _TOO_MANY)
            connection.close()
            os.close(peer.pidfd)
            return
        connection.setblocking(False)
        session = Session(connection, peer, self._now_seconds() + HANDSHAKE_SECONDS)
        self._pending[connection.fileno()] = session
        self._watch(connection.fileno(), lambda: self._advance(session))

    def _make_way(self, pid: int) -> bool:
        """Give up the oldest handshake of the process that has the most, if that leaves it as many
        as this one will have; one that only opens doors then keeps nobody out."""
        held = Counter(session.peer.pid for session in self._pending.values())
        greediest, most = max(held.items(), key=itemgetter(1))
        if held[pid] + 1 >= most:
            return False
        oldest = next(one for one in self._pending.values() if one.peer.pid == greediest)
        self._abandon(oldest, _TOO_MANY)
        return True

    def expire(self) -> None:
        """Drop handshakes that take too long."""
        if not self._pending:
            return
        now = self._now_seconds()
        for session in list(self._pending.values()):
            if session.deadline < now:
                self._abandon(session, "the handshake took too long")

    def _advance(self, session: Session) -> None:
        try:
            if session.pair is None:
                self._welcome(session)
            else:
                self._confirm(session)
        except BlockingIOError:
            # An event of an earlier connection that had this descriptor, closed in the same round.
            return
        except (attach.HandshakeError, OperatorError) as refusal:
            self._abandon(session, str(refusal))
        except OSError as error:
            self._abandon(session, error.strerror or "connection error")

    def _welcome(self, session: Session) -> None:
        untrusted_message = session.connection.recv(HELLO_BYTES + 1)
        if not untrusted_message:
            raise attach.HandshakeError("the guest hung up")
        peer = session.peer
        hello = attach.decode_hello(untrusted_message)
        digest = session.token_digest = attach.token_digest(hello.token)
        if self._barred_tokens.get(hello.name) == digest:
            raise attach.HandshakeError(_BARRED)
        if not attach.is_enrolled(self._run_directory, hello, peer.uid):
            raise attach.HandshakeError(f"guest {hello.name} is not enrolled with this token")
        client, resumed = self._client_for(hello.name, peer, digest)
        session.client = client
        window = create_window()
        try:
            kind = RingPair if hello.ring and self._rings is not None else QueuePair
            session.pair = kind(self._cluster, self._registry, window, self._random_bytes, peer.uid)
        except OperatorError:
            window.close()
            raise
        window.publish_info(self._machine.generation, **shared_info(client))
        attach.send_welcome(
            session.connection,
            client.number,
            self._machine.generation,
            session.pair,
            resumed=resumed,
        )

    def _client_for(self, name: str, peer: attach.Peer, digest: bytes) -> tuple[Client, bool]:
        """The client for this process and whether it was known before."""
        start_ticks = process_start(peer.pid)
        if start_ticks is None:
            raise attach.HandshakeError("your process is gone")
        if (peer.pid, start_ticks) in self._barred:
            raise attach.HandshakeError(_BARRED)
        client = self._machine.clients.get(name)
        if client is not None:
            if (client.pid, client.start_ticks) == (peer.pid, start_ticks):
                return client, True
            if process_start(client.pid) == client.start_ticks:
                raise attach.HandshakeError(f"guest {name} is attached by process {client.pid}")
            self._end(client, "replaced")
        client = self._machine.attach(name, peer.pid, start_ticks, peer.uid)
        if client is None:
            raise attach.HandshakeError("the guest table is full")
        earlier_digest, faults = self._earlier_faults.get(name, (b"", 0))
        if earlier_digest == digest:
            client.account.faults_total += faults
        return client, False

    def _confirm(self, session: Session) -> None:
        untrusted_message = session.connection.recv(CONFIRM_BYTES + 1)
        client, pair, peer = session.client, session.pair, session.peer
        assert client is not None and pair is not None
        if untrusted_message != CONFIRM.pack(CONFIRM_MAGIC, client.number):
            raise attach.HandshakeError("this is no CONFIRM")
        if self._machine.clients.get(client.name) is not client:
            raise attach.HandshakeError("the guest has detached meanwhile")
        pair.forget_names()
        earlier = self._by_client.get(client.name)
        if earlier is not None:
            self._close(earlier)
        session.connection.send(untrusted_message)
        fd = session.connection.fileno()
        del self._pending[fd]
        self._handlers[fd] = lambda: self._hear(session)
        session.guest, session.port = client, pair
        session.ring = pair if isinstance(pair, RingPair) else None
        self._by_client[client.name] = session
        # Something may have been wished since WELCOME.
        self.notify(client)
        self.serving[pair.fileno()] = session
        self._poll.register(pair.fileno(), select.EPOLLIN)
        self._watch_life(client, peer.pidfd)
        session.peer = peer._replace(pidfd=-1)
        log.info(
            "guest=%s event=attached pid=%d id=%d transport=%s",
            client.name,
            client.pid,
            client.number,
            "mqueue" if session.ring is None else "ring",
        )

    def _abandon(self, session: Session, why: str) -> None:
        """Give a handshake up and tell the peer."""
        client = session.client
        self._refused(client.name if client else "?", why)
        attach.send_refusal(session.connection, why)
        self._pending.pop(session.connection.fileno(), None)
        self._close(session)
        if session.peer.pidfd >= 0:
            os.close(session.peer.pidfd)
        if client is not None and self._was_made_for_nothing(client):
            self._machine.depart(client)

    def _was_made_for_nothing(self, client: Client) -> bool:
        """Still there, though neither attached, nor expected back, nor waited for by another
        handshake of its process."""
        return (
            self._machine.clients.get(client.name) is client
            and client.name not in self._pidfds
            and not any(other.client is client for other in self._pending.values())
        )

    def notify(self, client: Client) -> None:
        """Write into a guest's window what is wished of it; one that is away is told when it comes
        back."""
        session = self._by_client.get(client.name)
        if session is not None:
            session.port.window.notify(**shared_info(client))

    # --- life and death

    def _hear(self, session: Session) -> None:
        """An attached guest says good-bye, or its connection ends."""
        try:
            untrusted_message = session.connection.recv(CONFIRM_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            untrusted_message = b""
        client = session.client
        assert client is not None
        if untrusted_message == CONFIRM.pack(BYE_MAGIC, 0):
            self._end(client, "detached")
        elif not untrusted_message:
            # Its process may live on and come back; the pidfd tells when it does not.
            self._close(session)
            log.info("guest=%s event=disconnected", client.name)

    def _guest_died(self, client: Client) -> None:
        self._end(client, "died")

    def _end(self, client: Client, event: str) -> None:
        session = self._by_client.get(client.name)
        if session is not None:
            faults = client.account.faults_total
            self._earlier_faults[client.name] = session.token_digest, faults
            self._close(session)
        self._forget_life(client)
        self._machine.depart(client)
        log.info("guest=%s event=%s pid=%d", client.name, event, client.pid)

    def expel(self, client: Client) -> None:
        """Detach a guest that broke too many rules.  Its process may not attach again, nor may any
        other with the same token, be it one that it has forked, nor at the next hypervisor: whoever
        wants the guest back starts it, and so enrols it, anew."""
        self._barred.add((client.pid, client.start_ticks))
        session = self._by_client.get(client.name)
        if session is not None:
            self._barred_tokens[client.name] = session.token_digest
            attach.strike_off(self._run_directory, client.name, session.token_digest)
        if len(self._barred) > BARRED_MAX:
            self._barred = {
                (pid, start) for pid, start in self._barred if process_start(pid) == start
            }
        self._end(client, "expelled")

    def _close(self, session: Session) -> None:
        self._unwatch(session.connection.fileno())
        session.connection.close()
        client, pair = session.client, session.pair
        if pair is not None:
            if self.serving.pop(pair.fileno(), None) is not None:
                self._poll.unregister(pair.fileno())
            if session.ring is not None and self._rings is not None:
                self._rings.forget(session.ring)
            pair.close()
        if client is not None and self._by_client.get(client.name) is session:
            del self._by_client[client.name]

    def close(self) -> None:
        for session in [*self._pending.values(), *self._by_client.values()]:
            self._close(session)
        for client in list(self._machine.clients.values()):
            self._forget_life(client)
        self._unwatch(self._listener.fileno())
        self._listener.close()
        (self._run_directory / attach.ATTACH_SOCKET).unlink(missing_ok=True)
