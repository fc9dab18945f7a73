"""Malformed messages from one node of a cluster to the others.

Tries: it is a member with the cluster's key, so its messages arrive.  It sends random bytes under
every heading, and real messages of its own with bytes changed, cut short and made longer, while it
goes on taking part.  What is a message all the same is made longer until it is none.

Stopped by: parsers that take any bytes (`fs.dlm.codec`, `fs.cluster`): what is not exactly one
message of this version is dropped and counted.  Well-formed lies of a member are not stopped: nodes
of one volume can write to its disk, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fs.cluster import messages as cluster
from fs.dlm import codec as dlm
from guests.adversary import Cell
from guests.node import LOCKS, MEMBERSHIP, RANGES

_HEADINGS: Final = (MEMBERSHIP, LOCKS, RANGES, b"\3", b"\xff", b"")
_KEPT: Final = 64


def run(cell: Cell) -> Iterator[None]:
    """Parameters: messages."""
    node = cell.node
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0}
    others = [number for number in range(len(node.spec.names)) if number != node.spec.number]
    real: list[bytes] = []
    send = node.mesh.send

    def listen(node: int, payload: bytes) -> bool:
        if len(real) < _KEPT:
            real.append(bytes(payload))
        return send(node, payload)

    node.mesh.send = listen  # type: ignore[method-assign]
    names = [name for name in cell.kernel.vfs.listdir("/") if name != "lost+found"]
    for number in range(cell.count("messages", 500, 1, 10**6)):
        if number % 50 == 0:
            # Something real to say, and to copy.
            cell.kernel.vfs.stat(f"/{cell.random.choice(names)}")
        payload = _payload(cell, real)
        while _is_message(payload):
            # A lie, which is not what is tried here.
            payload += b"\0"
        for other in others:
            report["attempts"] += send(other, payload)
        yield
    node.mesh.send = send  # type: ignore[method-assign]


def _is_message(payload: bytes) -> bool:
    decode = {LOCKS: dlm.decode, MEMBERSHIP: cluster.decode}.get(payload[:1])
    if decode is None:
        return False
    try:
        decode(payload[1:])
    except ValueError:
        return False
    return True


def _payload(cell: Cell, real: list[bytes]) -> bytes:
    numbers = cell.random
    if not real or numbers.random() < 0.4:
        return numbers.choice(_HEADINGS) + numbers.randbytes(numbers.choice((0, 1, 8, 40, 300)))
    message = bytearray(numbers.choice(real))
    change = numbers.randrange(4)
    if change == 0 and len(message) > 1:
        message[numbers.randrange(1, len(message))] ^= 1 << numbers.randrange(8)
    elif change == 1:
        del message[numbers.randrange(len(message)) :]
    elif change == 2:
        message += numbers.randbytes(numbers.randrange(1, 64))
    else:
        message[1:2] = numbers.randbytes(1)
    return bytes(message)
