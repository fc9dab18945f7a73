"""The run directory: other guests' disks, tokens and sockets, and the administrator's door.

Tries: list it, read tokens, settings, logs and another guest's image, write into it, and ask the
hypervisor's control socket and another guest's for things that only the supervisor may ask.

Stopped by: modes (0710: no listing) and owners, Landlock (no file beneath), and the filter of
system calls: sockets of a jailed guest are SEQPACKET, control sockets are streams.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from guests.adversaries.objectnames import refuse
from guests.adversary import Cell
from ipc.codec import encode


def run(cell: Cell) -> Iterator[None]:
    """Parameters: folder (its absolute path), victim."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    folder, victim = cell.text("folder"), cell.text("victim")
    for place in (".", folder, f"{folder}/guests", f"{folder}/log", f"{folder}/registry"):
        _try(cell, lambda place=place: bool(os.listdir(place)))
        yield
    for name in (f"images/{victim}.img", f"guests/{victim}", "settings", "log/audit.log", "arena"):
        _try(cell, lambda name=name: _opens(f"{folder}/{name}", os.O_RDONLY))
        yield
    _try(cell, lambda: _opens(f"{folder}/planted", os.O_WRONLY | os.O_CREAT))
    for name in ("control.sock", f"guest-{victim}.sock"):
        _try(cell, lambda name=name: _asks(f"{folder}/{name}"))
        yield


def _try(cell: Cell, attempt: object) -> None:
    assert callable(attempt)
    try:
        won = attempt()
    except FileNotFoundError:
        return
    except OSError as error:
        refuse(cell, error)
    else:
        cell.report["attempts"] += 1
        cell.report["succeeded"] += bool(won)


def _opens(path: str, flags: int) -> bool:
    os.close(os.open(path, flags, 0o600))
    return True


def _asks(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(path)
        connection.sendall(encode({"verb": "status" if "guest-" in path else "list"}))
        return bool(connection.recv(64))
