"""What the lock manager asks of whatever carries its messages.

Nothing is promised: a message may be lost, come late, twice or out of order (`links` makes an
order of it). Only the sender's number is believed, so a transport must know whom it listens to.

The other direction are methods of `LockManager`: `deliver(from_node, message)` for each message
that came, `peer_up(node)` and `peer_down(node)` as hints that a connection came or went.
"""

from __future__ import annotations

from typing import Protocol


class LockTransport(Protocol):
    """Carries messages of at most `messages.FRAME_BYTES_MAX` bytes to other nodes."""

    def send(self, to_node: int, message: bytes) -> None:
        """Try to bring `message` to `to_node`; never blocks, never raises for a node away.

        It must not call `deliver` from inside.
        """
        ...
