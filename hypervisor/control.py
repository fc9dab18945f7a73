"""The administrator's socket: who may stop the hypervisor and see everybody's figures.

`control.sock` in the run directory, a stream of msgpack frames (`ipc.codec`), only for the user
that runs the hypervisor.  A guest's channel leads nowhere near it; Xen's guests could reach control
operations through the same hypercall until 2017.

    {"verb": "ping"}   -> {"generation", "pid"}
    {"verb": "stats"}  -> the record of `snapshot`
    {"verb": "stop"}   -> {"stopping": true}
    anything else      -> {"error": text}

A connection that sends half a frame is kept waiting; one that is deaf loses its connection; neither
holds up a guest's call.
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
        self._buffers: dict[socket.socket, bytes] = {}
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
        if uid not in (os.geteuid(), 0) or len(self._buffers) >= CONNECTIONS_MAX:
            self._refused(
                "?", f"control socket: user {uid}, process {pid}, {len(self._buffers)} are open"
            )
            connection.close()
            return
        # A reply must not wait for its reader; a deaf one fails when the buffer is full.
        connection.setblocking(False)
        self._buffers[connection] = b""
        self._watch(connection, lambda: self._read(connection))

    def _read(self, connection: socket.socket) -> None:
        try:
            chunk = connection.recv(_REQUEST_BYTES_MAX)
            if not chunk:
                raise BadRecord("the end")
            buffer = self._buffers[connection] + chunk
            if len(buffer) > _REQUEST_BYTES_MAX:
                raise BadRecord("too long")
            while (frame := split_frame(buffer)) is not None:
                body, buffer = frame
                connection.sendall(encode(self._answer(decode(body))))
            self._buffers[connection] = buffer
        except (OSError, BadRecord):
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        del self._handlers[connection.fileno()]
        self._poll.unregister(connection.fileno())
        del self._buffers[connection]
        connection.close()

    def close(self) -> None:
        for connection in list(self._buffers):
            self._drop(connection)
        with contextlib.suppress(KeyError):
            del self._handlers[self._listener.fileno()]
        self._listener.close()
        self._path.unlink(missing_ok=True)
