"""Which links of a mesh wait for what, told to epoll; and how refusals are counted and logged."""

from __future__ import annotations

import logging
import select
from collections import Counter
from typing import Final

from ipc.mesh.addresses import Listener
from ipc.mesh.handshake import Reason, Refused
from ipc.mesh.link import Link, Phase

log = logging.getLogger(__name__)

_LOG_AGAIN_NS: Final = 60_000_000_000


class Watcher:
    """An epoll descriptor with a listener and links."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._links: dict[int, tuple[Link, int]] = {}
        self._epoll = select.epoll()
        self.hear()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def hear(self) -> None:
        """Wait for connections."""
        self._epoll.register(self._listener, select.EPOLLIN)

    def ignore(self) -> None:
        """Don't wait for connections."""
        self._epoll.unregister(self._listener)

    def links(self) -> list[Link]:
        return [link for link, _ in self._links.values()]

    def wait(self, timeout_seconds: float) -> list[tuple[Link | None, int]]:
        """(link, events) of all that are ready; None is the listener."""
        ready: list[tuple[Link | None, int]] = []
        for fd, events in self._epoll.poll(timeout_seconds):
            if fd == self._listener.fileno():
                ready.append((None, events))
            else:
                ready.append((self._links[fd][0], events))
        return ready

    def watch(self, link: Link) -> None:
        """Wait for what this link can use now."""
        fd = link.socket.fileno()
        events = 0
        if not link.frozen:
            events = select.EPOLLOUT if link.wants_to_write else 0
            events |= 0 if link.phase is Phase.CONNECTING else select.EPOLLIN
        before = self._links.get(fd, (link, 0))[1]
        self._links[fd] = (link, events)
        if before and not events:
            # An error would wake epoll even if no event is asked for.
            self._epoll.unregister(fd)
        elif before and events != before:
            self._epoll.modify(fd, events)
        elif events and not before:
            self._epoll.register(fd, events)

    def forget(self, link: Link) -> None:
        """Close a link's socket."""
        _, events = self._links.pop(link.socket.fileno(), (link, 0))
        if events:
            self._epoll.unregister(link.socket)
        link.socket.close()

    def close(self) -> None:
        for link in self.links():
            link.socket.close()
        self._links.clear()
        self._epoll.close()


class Refusals:
    """All are counted; of one node and reason one a minute is logged."""

    def __init__(self, who: str) -> None:
        self.counts: Counter[Reason] = Counter()
        self._who = who
        self._logged_ns: dict[tuple[int | None, Reason], int] = {}

    def add(self, node: int | None, refused: Refused, now_ns: int) -> None:
        """`node` is what the peer claims to be, if that is one of the few known numbers."""
        self.counts[refused.reason] += 1
        last = self._logged_ns.get((node, refused.reason))
        if last is None or now_ns - last >= _LOG_AGAIN_NS:
            self._logged_ns[node, refused.reason] = now_ns
            # A member that is stopped or cut off in mid-handshake is slow, and no threat.
            level = logging.INFO if refused.reason is Reason.SLOW else logging.WARNING
            log.log(level, "%s: a connection was refused: %s", self._who, refused.text)

    def forgive(self, node: int) -> None:
        """The node is connected; what is refused next is news."""
        for reason in Reason:
            self._logged_ns.pop((node, reason), None)
