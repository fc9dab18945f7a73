"""A crowd at the hypervisor's door: handshakes that are begun and never finished.

Tries: connect to the attach socket as often as it can, and say nothing, so that nobody else gets in
and whoever listens has more than it has room for.

Stopped by: at most `HANDSHAKES_MAX` at a time, each with a deadline; when there are more, one of
the process goes that has the most (`hypervisor.sessions`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from guests.adversary import Cell
from ipc.attach import ATTACH_SOCKET

_HELD = 128


def run(cell: Cell) -> Iterator[None]:
    """Parameters: seconds."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    door = os.fspath(cell.spec.run_directory / ATTACH_SOCKET)
    until = time.monotonic() + cell.number("seconds", 1.0, 0.01, 600.0)
    crowd: list[socket.socket] = []
    try:
        while time.monotonic() < until:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.setblocking(False)
            crowd.append(connection)
            # Where nobody comes to the door for a moment there is no room in front of it.
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                connection.connect(door)
                report["attempts"] += 1
            if len(crowd) >= _HELD:
                crowd.pop(0).close()
            yield
    finally:
        for connection in crowd:
            connection.close()
