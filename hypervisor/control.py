"""The administrator's socket: who may stop the hypervisor and see everybody's figures.

`control.sock` in the run directory, a stream of msgpack frames (`ipc.codec`), only for the user
that runs the hypervisor.  A guest's channel leads nowhere near it; Xen's guests could reach control
operations through the same hypercall until 2017.

    {"verb": "ping"}   -> {"generation", "pid"}
    {"verb": "stats"}  -> the record of `snapshot`
    {"verb": "stop"}   -> {"stopping": true}
    anything else      -> {"error": text}

A connection that sends half a frame is kept waiting, and so is one that is deaf: one answer is kept
until it is read, and no other question is taken meanwhile.  Neither holds up a guest's call.  An
answer may be longer than a socket has room for: guests with many pools make it so.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hypervisor.doorman import Doorman
from ipc.attach import CONTROL_SOCKET
from ipc.codec import BadRecord, Record, decode, encode, split_frame

CONNECTIONS_MAX: Final = 32
_REQUEST_BYTES_MAX: Final = 65536


class _Connection:
    __slots__ = ("events", "received", "waiting")

    def __init__(self) -> None:
        self.received = b""
        self.waiting = b""
        """What is left of an answer."""
        self.events = select.EPOLLIN


class Control:
    """`answer(record) -> record` does the work; this moves the frames.  `refused` is told of each
    connection that is not let in."""

    def __init__(
        self,
        run_directory: Path,
        poll: Doorman,
        handlers: dict[int, Callable[[], None]],
        answer: Callable[[Record], Record],
        refused: Callable[[str, str], None],
    ) -> None:
        self._path = run_directory / CONTROL_SOCKET
        self._poll = poll
        self._handlers = handlers
        self._answer = answer
        self._refused = refused
        self._connections: dict[socket.socket, _Connection] = {}
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind(os.fspath(self._path))
        self._path.chmod(0o600)
        self._listener.listen(CONNECTIONS_MAX)
        self._listener.setblocking(False)
        self._watch(self._listener, self._accept)

    def _watch(self, watched: socket.socket, handler: Callable[[], None]) -> None:
        self._handlers[watched.fileno()] = handler
        self._poll.register(watched.fileno(), select.EPOLLIN)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _gid = struct.unpack("iII", credentials)
        if uid not in (os.geteuid(), 0) or len(self._connections) >= CONNECTIONS_MAX:
            self._refused(
                "?", f"control socket: user {uid}, process {pid}, {len(self._connections)} are open"
            )
            connection.close()
            return
        connection.setblocking(False)
        self._connections[connection] = _Connection()
        self._watch(connection, lambda: self._serve(connection))

    def _serve(self, connection: socket.socket) -> None:
        held = self._connections[connection]
        try:
            if held.waiting:
                self._send(connection, held)
            else:
                chunk = connection.recv(_REQUEST_BYTES_MAX)
                if not chunk:
                    raise BadRecord("the end")
                held.received += chunk
                if len(held.received) > _REQUEST_BYTES_MAX:
                    raise BadRecord("too long")
            while not held.waiting and (frame := split_frame(held.received)) is not None:
                asked, held.received = frame
                held.waiting = encode(self._answer(decode(asked)))
                self._send(connection, held)
        except BlockingIOError:
            # An event of an earlier connection that had this descriptor, closed in the same round.
            return
        except (OSError, BadRecord):
            self._drop(connection)

    def _send(self, connection: socket.socket, held: _Connection) -> None:
        """What the kernel takes; nothing is read until it has taken all."""
        with contextlib.suppress(BlockingIOError):
            while held.waiting:
                held.waiting = held.waiting[connection.send(held.waiting) :]
        events = select.EPOLLOUT if held.waiting else select.EPOLLIN
        if events != held.events:
            held.events = events
            self._poll.unregister(connection.fileno())
            self._poll.register(connection.fileno(), events)

    def _drop(self, connection: socket.socket) -> None:
        del self._handlers[connection.fileno()]
        self._poll.unregister(connection.fileno())
        del self._connections[connection]
        connection.close()

    def close(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        with contextlib.suppress(KeyError):
            del self._handlers[self._listener.fileno()]
        self._listener.close()
        self._path.unlink(missing_ok=True)
