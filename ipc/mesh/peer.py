"""What a node knows of one other: its link, and when to try again.

An attempt to connect counts as a failure until the link is up.  The next one comes after
`reconnect_ns`, then after twice and four times that; more would only add to the time that a healed
network lies idle.
"""

from __future__ import annotations

from typing import Final

from ipc.mesh.addresses import Address
from ipc.mesh.link import Link

_SLOWEST: Final = 2  # doublings


class Peer:
    """One other node of the cluster."""

    def __init__(self, node: int, address: Address, now_ns: int) -> None:
        self.node = node
        self.address = address
        self.link: Link | None = None
        self.attempt: Link | None = None
        self.next_try_ns = now_ns
        self.cut = False
        self._failures = 0

    def links(self) -> list[Link]:
        """The link and the attempt, as far as there are any."""
        return [link for link in (self.link, self.attempt) if link is not None]

    def failed(self, now_ns: int, reconnect_ns: int) -> None:
        """Try again later, and the next time later still."""
        self.next_try_ns = now_ns + (reconnect_ns << self._failures)
        self._failures = min(self._failures + 1, _SLOWEST)

    def retry(self, now_ns: int) -> None:
        """Something has changed: try at once."""
        self.next_try_ns = now_ns
        self._failures = 0

    def connected(self, link: Link) -> None:
        """The link is up."""
        if self.attempt is link:
            self.attempt = None
        self.link = link
        self._failures = 0
