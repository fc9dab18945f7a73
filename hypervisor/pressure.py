"""What the hypervisor wishes of its guests, told through the shared info page of their windows.

  balloon target     how much RAM a guest should have: what the administrator says, kept by name
  writeback pages    persistent pages that a guest should take back and write to its own swap disk

*Writeback.*  A persistent page is never dropped by us, and a put that would take its guest over the
allotment is refused.  A guest is over its allotment all the same when that became smaller: another
guest came, or the administrator changed a weight; or when it may borrow (`limits`).  What it holds
too much then, others are entitled to and don't get: their puts find no room, or take their own
pages.  Such a put ends as ever, and whoever is furthest over is asked to take pages back, so that a
later put finds room:

  bravo's put finds no room --> alpha is furthest over --> alpha's window says 256 pages
  <-- NO_MEMORY, at once        (not bravo itself)         alpha gets them, writes them to its disk
                                nothing waits              and flushes them, when it gets to it

* W1  A request is for at most `WRITEBACK_PAGES_MAX` pages, no more than take the guest down to its
  allotment, and no more than it has in private persistent pools: of pages in shared ones others
  may be in need.
* W2  Until a guest has flushed as many pages, or `ASK_AGAIN_NS` has gone by, it is not asked again.
* W3  A refused guest that is itself as far over as any asks nobody: the reason tells it.
* W4  A guest that does nothing loses nothing.  What it was asked for and what it did are counted;
  of what it flushes at most as much counts as it was asked for.
* W5  A call asks once at most, and looks at each guest once for it.
* W6  A guest that has let a request go by (a second, and not one page) is asked after all who have
  not, the more requests in a row the later: it may be stopped, or have no disk.  The request
  stands, and with the first page that it takes back the guest is one of the others again.

Xen asked nobody: a domain's frontswap shrank if a service in the domain made it, and memory that
was promised to others stayed where it was until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from ipc.abi import PAGE_BYTES

if TYPE_CHECKING:
    from hypervisor.pools import Client

WRITEBACK_PAGES_MAX: Final = 256
ASK_AGAIN_NS: Final = 1_000_000_000


class Wishes:
    """What one guest was told last; lost with the hypervisor, whose refused puts ask again."""

    __slots__ = ("asked_at_ns", "notifications", "unheeded", "writeback_pages")

    def __init__(self) -> None:
        self.notifications = 0
        self.writeback_pages = 0
        """What is left of the last request."""
        self.asked_at_ns = 0
        self.unheeded = 0
        """Requests in a row, the last one included, of which it did nothing so far."""

    def gone_by(self, now_ns: int) -> int:
        """Requests in a row that it has let go by."""
        waits = self.writeback_pages and now_ns - self.asked_at_ns < ASK_AGAIN_NS
        return self.unheeded - 1 if waits and self.unheeded else self.unheeded


class Pressure:
    """Asks the guests in `clients`.  `notify` is told of each guest whose window is to be written
    anew (`shared_info`); `clock_ns` tells how long ago a guest was asked."""

    def __init__(self, clients: Mapping[str, Client], clock_ns: Callable[[], int]) -> None:
        self._clients = clients
        self._clock_ns = clock_ns
        self.notify: Callable[[Client], None] = _nobody_is_there

    def tell(self, client: Client) -> None:
        """Have a guest look at what is wished of it."""
        client.wishes.notifications += 1
        self.notify(client)

    def refused(self, client: Client) -> None:
        """A put of this guest found no room: ask for some."""
        now_ns = self._clock_ns()
        own_bytes = max(client.over_bytes, 0)
        chosen: Client | None = None
        highest = (0, 0)
        for other in self._clients.values():
            if other is client or other.purses[True].bytes - other.allotment_bytes <= own_bytes:
                # So it goes with nearly all; `over_bytes` is less, if it pays for others.
                continue
            over_bytes = other.over_bytes
            rank = -other.wishes.gone_by(now_ns), over_bytes
            if over_bytes <= own_bytes or (chosen is not None and rank <= highest):
                continue
            if other.private_persistent()[0]:
                chosen, highest = other, rank
        if chosen is not None:
            self._ask(chosen, highest[1], now_ns)

    def _ask(self, client: Client, over_bytes: int, now_ns: int) -> None:
        wishes = client.wishes
        if wishes.writeback_pages and now_ns - wishes.asked_at_ns < ASK_AGAIN_NS:
            return
        held_pages, cost_bytes = client.private_persistent()
        over_pages = -(-over_bytes * held_pages // max(cost_bytes, 1))
        wishes.writeback_pages = min(WRITEBACK_PAGES_MAX, held_pages, over_pages)
        wishes.asked_at_ns = now_ns
        wishes.unheeded += 1
        client.account.writeback_asked_pages += wishes.writeback_pages
        self.tell(client)

    def flushed(self, client: Client, pages: int) -> None:
        """A guest has taken pages of a private persistent pool back."""
        wishes = client.wishes
        if wishes.writeback_pages and pages:
            done = min(pages, wishes.writeback_pages)
            wishes.writeback_pages -= done
            wishes.unheeded = 0
            client.account.writeback_done_pages += done


def shared_info(client: Client) -> dict[str, int]:
    """What a guest's window has to say, as `Window.notify` takes it."""
    return {
        "notifications": client.wishes.notifications,
        "balloon_target_pages": client.settings.balloon_bytes // PAGE_BYTES,
        "writeback_pages": client.wishes.writeback_pages,
    }


def _nobody_is_there(_client: Client) -> None:
    """No guest of this machine has a window that anybody could write to."""
