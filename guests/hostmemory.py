"""The guest's RAM as the host sees it: pages that are lent to it out of the memory that tmem uses.

    grow     LEND the larger size first, then take as many frames as were lent
    shrink   the frames go to the host first, then LEND the smaller size
    attach   LEND the size that the guest has, whatever was lent before

So while the hypervisor is there it has lent at least what the guest has; what it says is absolute,
and a call whose fate is unknown is made good by the next one.  What does not hold:

* While the hypervisor is away the guest may give pages back, of which it hears at the next attach;
  it takes none.
* A guest that starts while the hypervisor is away has its full size until it is told less.
* If the hypervisor comes back without its memory it may have less to lend than the guest has.
  Then the guest shrinks as far as it can, as for a balloon target, and has what is not its own
  until it is there; nobody is killed for it.
* It is the size that is lent, touched or not; and the interpreter is in no account.

Where the hypervisor does not lend, and where there is none, the guest has its RAM for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from guests.attachment import Attachment
from guests.hypercall import Hypercalls
from guests.memory import Memory
from ipc.abi import PAGE_BYTES, Reason
from ipc.errors import Disconnected, ExitCode, OperatorError

log = logging.getLogger(__name__)

ASK_AGAIN_SECONDS: Final = 0.25
"""After the host had not enough: room is made by others, so it takes a while."""
UNBOUNDED: Final = 1 << 62


class HostMemory:
    """A user of the attachment (`guests.attachment.User`); None: there is no hypervisor."""

    def __init__(
        self, memory: Memory, attachment: Attachment | None, now_seconds: Callable[[], float]
    ) -> None:
        self._memory = memory
        self._attachment = attachment
        self._now_seconds = now_seconds
        self._calls: Hypercalls | None = None
        self._ask_at = 0.0
        self.patience_seconds = ASK_AGAIN_SECONDS
        self.on_reply: Callable[[], None] = _nobody_waits
        """Called when the hypervisor has said how much it lends."""
        self.lends: bool | None = False if attachment is None else None
        """Whether the hypervisor does; None until it was asked."""
        self.lent_pages = 0
        """As it said last."""
        if attachment is not None:
            attachment.join(self)

    @property
    def size_pages(self) -> int:
        """What the guest has in all."""
        return self._memory.budget.total - self._memory.given_back_pages

    @property
    def bound_pages(self) -> int:
        """What the guest may have without asking."""
        return self.lent_pages if self.lends and self._calls is not None else UNBOUNDED

    def grow(self, pages: int) -> int:
        """The guest wants to have so many in all; how many it may have."""
        if self.lends is False:
            return pages
        now = self._now_seconds()
        if self._calls is not None and self.lent_pages < pages and now >= self._ask_at:
            self._ask(pages)
            if self.lent_pages < pages:
                self._ask_at = now + self.patience_seconds
        return min(pages, self.lent_pages) if self._calls is not None else self.size_pages

    def shrink(self) -> None:
        """The guest has given pages back."""
        if self.lends and self.lent_pages > self.size_pages:
            self._ask(self.size_pages)

    def require(self, pages: int) -> None:
        """At boot: raise OperatorError if the host can't lend so many."""
        if self.lends and self.lent_pages < pages:
            raise OperatorError(
                f"the host can lend {self.lent_pages * PAGE_BYTES} bytes of memory and the guest "
                f"needs at least {pages * PAGE_BYTES}; start it when others have given some back",
                ExitCode.UNAVAILABLE,
            )

    # --- as a user of the attachment

    def serve(self, calls: Hypercalls) -> bool:
        """Say what the guest has.  What it is not lent, and does not use, goes back at once."""
        self._calls = calls
        self._ask_at = 0.0
        # What a caller has made sure of a moment ago must not be lost.
        self._lend(calls, self.size_pages + self._memory.claimable_pages)
        if self.lends and self.lent_pages < self.size_pages:
            log.info("memory event=short wanted=%d lent=%d", self.size_pages, self.lent_pages)
            self._memory.give_back(self.size_pages - self.lent_pages)
        return True

    def lost(self) -> None:
        """What was lent may be used further on."""
        self._calls = None

    # --- calls

    def _ask(self, pages: int) -> None:
        calls = self._calls
        if calls is None:
            return
        try:
            self._lend(calls, pages)
        except Disconnected:
            assert self._attachment is not None
            self._attachment.lose(calls)

    def _lend(self, calls: Hypercalls, pages: int) -> None:
        """Call as long as it helps: one call does a bounded amount of work."""
        before = -1
        while True:
            reply = calls.lend(pages)
            self.lends = reply.reason != Reason.LENDING_OFF
            if self.lends:
                self.lent_pages = reply.value
            if not self.lends or self.lent_pages in (pages, before):
                break
            before = self.lent_pages
        self.on_reply()


def _nobody_waits() -> None:
    """A balloon sees to it itself."""
