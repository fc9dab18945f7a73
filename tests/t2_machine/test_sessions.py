"""Handshakes, one event after the other, in this process."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisor.arena import Arena, format_arena
from hypervisor.machine import Machine
from hypervisor.sessions import Sessions
from ipc import attach
from ipc.abi import ABI_REVISION, HELLO, HELLO_MAGIC, WELCOME_BYTES
from ipc.names import Registry


class Poll:
    """Events are of the test's making."""

    def register(self, fd: int, events: int) -> None:
        """Nothing comes of it."""

    def unregister(self, fd: int) -> None:
        """Nor of this."""


def test_an_event_of_an_earlier_connection_refuses_nobody(tmp_path: Path) -> None:
    """Its descriptor has been closed and used again in one round; the guest says HELLO later."""
    handlers: dict[int, Callable[[], None]] = {}
    poll: Any = Poll()
    refused: list[str] = []
    machine = Machine(Arena(format_arena(mmap.mmap(-1, 1 << 20)).mapping))
    sessions = Sessions(
        machine,
        tmp_path,
        f"s{os.getpid()}",
        Registry(tmp_path),
        poll,
        handlers,
        None,
        now_seconds=lambda: 0.0,
        random_bytes=os.urandom,
        refused=lambda _name, why: refused.append(why),
    )
    token = os.urandom(32)
    attach.enrol(tmp_path, "red", token, os.geteuid())
    try:
        (knock,) = handlers.values()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
            guest.connect(str(tmp_path / attach.ATTACH_SOCKET))
            knock()
            (advance,) = (handler for handler in handlers.values() if handler is not knock)
            advance()
            assert not refused

            guest.send(HELLO.pack(HELLO_MAGIC, ABI_REVISION, 0, b"red", token, b""))
            advance()
            assert len(guest.recv(WELCOME_BYTES)) == WELCOME_BYTES
            assert not refused
    finally:
        pending = [session.peer.pidfd for session in sessions._pending.values()]
        sessions.close()
        for pidfd in pending:
            os.close(pidfd)
