"""The one attachment of a guest to its hypervisor, shared by all that put pages into tmem there.

A hypervisor knows a guest by its name, so there is one attachment a guest, and its users
(cleancache, frontswap) each have a pool behind it.  A user that has lost its pool alone gets
another; the others notice nothing.

When the hypervisor dies every call may end in `Disconnected`.  The guest then goes on as if tmem
were empty and tries to attach again, at most once in `RETRY_SECONDS`, in the course of its normal
calls.  Each user puts right with the new attachment what happened meanwhile (`serve`) before anyone
asks anything else of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

from guests.hypercall import Hypercalls
from ipc.channel import Channel
from ipc.errors import Disconnected, OperatorError

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 0.5


class User(Protocol):
    """Somebody with pages in tmem."""

    def serve(self, calls: Hypercalls) -> bool:
        """There is an attachment: have a pool that holds nothing which it may not.

        False if there is none to be had; it is asked again later.  Disconnected.
        """
        ...

    def lost(self) -> None:
        """There is none any more."""
        ...


class Attachment:
    """`connect` attaches (raises Disconnected or OperatorError) and `detach` ends an attachment for
    good; `now_seconds` is a monotonic clock.
    """

    def __init__(
        self,
        connect: Callable[[], Channel],
        now_seconds: Callable[[], float],
        detach: Callable[[Channel], None] = lambda channel: channel.close(),
    ) -> None:
        self.calls: Hypercalls | None = None
        self.slots = memoryview(b"")
        """The window's page slots."""
        self.disconnects = 0
        self.attaches = 0
        self._connect = connect
        self._detach = detach
        self._now_seconds = now_seconds
        self._users: list[User] = []
        self._unserved: list[User] = []
        self._retry_at = 0.0
        self._closed = False
        self._complaint = ""

    def join(self, user: User) -> None:
        """One more user; it is served from the next `attach` on."""
        self._users.append(user)
        self._unserved.append(user)

    def look(self) -> None:
        """Notice that the hypervisor is gone without a call, and try to be served again."""
        if self.calls is not None and self.calls.channel.hypervisor_is_gone():
            self.lose(self.calls)
        self.attach()

    def attach(self, *, refusal_is_fatal: bool = False) -> None:
        """Serve whoever is not served, unless that was tried a moment ago.

        Raises OperatorError for a refusal if that is fatal, as it is at boot.
        """
        now = self._now_seconds()
        if self._closed or not self._unserved or now < self._retry_at:
            return
        self._retry_at = now + RETRY_SECONDS
        calls = self.calls
        if calls is None:
            calls = self._try_to_connect(refusal_is_fatal=refusal_is_fatal)
            if calls is None:
                return
        try:
            self._unserved = [user for user in self._unserved if not user.serve(calls)]
        except Disconnected:
            self.lose(calls)

    def _try_to_connect(self, *, refusal_is_fatal: bool) -> Hypercalls | None:
        try:
            channel = self._connect()
        except (Disconnected, OperatorError) as error:
            if refusal_is_fatal and isinstance(error, OperatorError):
                raise
            # Once for each text: this is tried over and over.
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("tmem event=not-attached why=%s", error)
            return None
        self._complaint = ""
        self.attaches += 1
        self.calls = Hypercalls(channel)
        self.slots = channel.window.slots
        log.info(
            "tmem event=attached generation=%d resumed=%s", channel.generation, channel.resumed
        )
        return self.calls

    def lose(self, calls: Hypercalls) -> None:
        """The hypervisor is gone: a call of this attachment ended in Disconnected."""
        if calls is not self.calls:
            return
        self.disconnects += 1
        log.warning("tmem event=disconnected generation=%d", calls.channel.generation)
        self._retry_at = self._now_seconds() + RETRY_SECONDS
        self._end()
        calls.channel.close()

    def unserved(self, user: User) -> None:
        """A user has no pool any more; it is served again later."""
        if user not in self._unserved:
            self._unserved.append(user)
        self._retry_at = self._now_seconds() + RETRY_SECONDS

    def close(self) -> None:
        """For good: the hypervisor takes back whatever this guest has."""
        self._closed = True
        calls = self.calls
        self._end()
        if calls is not None:
            self._detach(calls.channel)

    def _end(self) -> None:
        self.calls = None
        self.slots = memoryview(b"")
        self._unserved = list(self._users)
        for user in self._users:
            user.lost()
