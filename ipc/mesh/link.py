"""One connection between this node and a peer, or with somebody who may become one.

    CONNECTING  our connect(2) is under way
    SHAKING     the handshake runs
    PROVED      both ends know the key; the connecter waits for the listener to let it in
    UP          messages

Bounds, whatever the peer does: of its bytes at most one frame and one read are held; of ours at
most `queue_bytes_max`.  A link breaks when nothing *valid* came for the idle timeout, and also when
the peer takes nothing for that long though we have something: then it does not read, or is
stopped.  A handshake as a whole has its deadline, however many bytes trickle in.

A frozen link (`Mesh.cut`) neither reads nor writes, and its timers go on, as if the network were
gone.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from enum import Enum
from typing import Final, NamedTuple

from ipc.mesh.frames import (
    HANDSHAKE_BODY_MAX,
    SEALED_BODY_MAX,
    BadFrame,
    Frame,
    FrameBuffer,
    Kind,
)
from ipc.mesh.handshake import Handshake, Reason, Refused, Session, encode_refusal

READ_BYTES: Final = 128 * 1024
"""One read takes more than one frame, so a whole frame comes out of every two reads.  Of packets it
takes as many."""
_WRITE_BYTES: Final = 64 * 1024
"""A packet at most: less than one read takes, and than Linux has room for by default."""


class Timing(NamedTuple):
    """o2net's defaults; the same on all nodes of a cluster (`parameters` of the handshake)."""

    idle_timeout_ns: int = 30_000_000_000
    keepalive_ns: int = 2_000_000_000
    reconnect_ns: int = 2_000_000_000
    handshake_ns: int = 5_000_000_000


class Lost(Exception):
    """The connection is over; the text says why."""


class Phase(Enum):
    """What a link is doing."""

    CONNECTING = "connecting"
    SHAKING = "shaking"
    PROVED = "proved"
    UP = "up"


class Link:
    """A socket and all that is known of its other end."""

    def __init__(
        self,
        connection: socket.socket,
        handshake: Handshake,
        timing: Timing,
        queue_bytes_max: int,
        now_ns: int,
    ) -> None:
        self.socket = connection
        self.handshake = handshake
        self.phase = Phase.CONNECTING if handshake.connecting else Phase.SHAKING
        self.frozen = False
        self.began_ns = now_ns
        self.heard_ns = now_ns
        """When the last valid frame came."""
        self.sent_ns = now_ns
        """When the last frame was queued."""
        self._taken_ns = now_ns
        """When the kernel last took bytes of ours, or there were none."""
        self._timing = timing
        self._queue_bytes_max = queue_bytes_max
        self._in = FrameBuffer()
        self._out = bytearray()

    # --- what it is -----------------------------------------------------------------------------

    @property
    def node(self) -> int | None:
        """The peer's number: asked for or claimed before PROVED, then a fact."""
        return self.handshake.peer

    @property
    def session(self) -> Session:
        """Of a link that is PROVED or UP."""
        assert self.handshake.session is not None
        return self.handshake.session

    @property
    def queued_bytes(self) -> int:
        return len(self._out)

    @property
    def wants_to_write(self) -> bool:
        return self.phase is Phase.CONNECTING or bool(self._out)

    # --- out ------------------------------------------------------------------------------------

    def finish_connect(self) -> None:
        """The socket became writable for the first time; raises Lost."""
        error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise Lost(str(OSError(error, "connect failed")))
        self.phase = Phase.SHAKING
        self._out += self.handshake.hello()

    def queue(self, kind: Kind, payload: bytes, now_ns: int) -> bool:
        """Seal and queue a message; False if there is no room."""
        if len(self._out) + len(payload) > self._queue_bytes_max:
            return False
        if not self._out:
            self._taken_ns = now_ns
        self._out += self.session.outgoing.close(kind, payload)
        self.sent_ns = now_ns
        return True

    def flush(self, now_ns: int) -> None:
        """Write what the kernel takes; raises Lost."""
        try:
            while self._out and not self.frozen:
                with memoryview(self._out) as whole, whole[:_WRITE_BYTES] as part:
                    count = self.socket.send(part)
                del self._out[:count]
                self._taken_ns = now_ns
        except BlockingIOError:
            pass
        except OSError as error:
            raise Lost(f"the connection broke: {error.strerror}") from None

    def refuse(self, text: str) -> None:
        """Tell the peer why, if it can be told at once; the link is closed afterwards."""
        if self.phase is not Phase.CONNECTING and not self._out:
            try:
                self.socket.send(encode_refusal(text))
            except OSError:
                return

    # --- in -------------------------------------------------------------------------------------

    def read(self) -> None:
        """Take what has arrived, but little more than `READ_BYTES`; raises Lost."""
        taken = 0
        while taken < READ_BYTES:
            try:
                untrusted_chunk = self.socket.recv(READ_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                # Told once, and of packets before those that have arrived; the end comes after.
                continue
            except OSError as error:
                raise Lost(f"the connection broke: {error.strerror}") from None
            if not untrusted_chunk:
                if taken:
                    return  # the next read finds the end once more
                raise Lost("the connection was closed")
            self._in.feed(untrusted_chunk)
            taken += len(untrusted_chunk)

    def shake(self, now_ns: int) -> bool:
        """Go on with the handshake; True once this end may be UP.  Raises Refused."""
        try:
            while (frame := self._in.take(self._body_max())) is not None:
                if self.phase is Phase.PROVED and frame.kind is not Kind.REFUSE:
                    self._welcome(frame)
                    return True
                self._out += self.handshake.receive(frame)
                if self.handshake.session is not None:
                    self.phase = Phase.PROVED
                    if not self.handshake.connecting:
                        return True
        except BadFrame as error:
            raise Refused(Reason.PROTOCOL, f"{self.handshake.speaker} sent {error}") from None
        finally:
            self.heard_ns = now_ns
        return False

    def _welcome(self, frame: Frame) -> None:
        self.session.incoming.open(frame)
        if frame.kind is not Kind.KEEPALIVE:
            raise BadFrame("a DATA frame before the first KEEPALIVE")

    def _body_max(self) -> int:
        return SEALED_BODY_MAX if self.phase is Phase.UP else HANDSHAKE_BODY_MAX

    def rise(self, now_ns: int) -> None:
        """PROVED to UP; the listener lets the connecter in."""
        self.phase = Phase.UP
        self.heard_ns = now_ns
        self.queue(Kind.KEEPALIVE, b"", now_ns)

    def messages(self, now_ns: int) -> Iterator[bytes]:
        """The payloads that are here; raises Refused when a seal is broken."""
        try:
            while (frame := self._in.take(self._body_max())) is not None:
                payload = self.session.incoming.open(frame)
                self.heard_ns = now_ns
                if frame.kind is Kind.DATA:
                    yield payload
        except BadFrame as error:
            raise Refused(Reason.PROTOCOL, f"{self.handshake.speaker} sent {error}") from None

    # --- time -----------------------------------------------------------------------------------

    def deadline_ns(self) -> int:
        """When `tick` has something to do."""
        if self.phase is not Phase.UP:
            return self.began_ns + self._timing.handshake_ns
        deadline = min(
            self.heard_ns + self._timing.idle_timeout_ns, self.sent_ns + self._timing.keepalive_ns
        )
        return (
            min(deadline, self._taken_ns + self._timing.idle_timeout_ns) if self._out else deadline
        )

    def tick(self, now_ns: int) -> None:
        """Keepalive and timeouts; raises Lost and Refused."""
        idle_ns = self._timing.idle_timeout_ns
        if self.phase is not Phase.UP:
            if now_ns - self.began_ns >= self._timing.handshake_ns:
                if self.handshake.connecting:
                    raise Lost("nobody answers")
                raise Refused(
                    Reason.SLOW, f"{self.handshake.speaker} did not finish the handshake in time"
                )
            return
        if now_ns - self.heard_ns >= idle_ns:
            raise Lost(f"nothing was heard for {idle_ns / 1e9:g} s")
        if self._out and now_ns - self._taken_ns >= idle_ns:
            raise Lost(f"it took nothing for {idle_ns / 1e9:g} s")
        if now_ns - self.sent_ns >= self._timing.keepalive_ns:
            # A full queue has frames enough; the peer hears from us once it reads.
            self.sent_ns = now_ns
            if not self._out:
                self.queue(Kind.KEEPALIVE, b"", now_ns)
