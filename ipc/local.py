"""The local transport: both ends in one process, deterministic, with injected faults.

Fault model: what a guest can see of a hypervisor that dies and comes back around one call.

    LOSE_REQUEST  the hypervisor died before it executed the call
    LOSE_REPLY    it executed the call and died before the reply
    LATE_REQUEST  others' calls are served between the guest's sending and this call
    LATE_REPLY    others' calls are served between this call and the guest's reading of the reply

The first two surface as `Disconnected` and close the channel, exactly as with real queues; the
guest then attaches again.  While a call is late, `meanwhile` runs the others; what happens to the
channel then happens to the call.  Messages are never reordered or doubled: a POSIX queue does
neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from itertools import repeat

from ipc.errors import Disconnected
from ipc.window import Window, anonymous_window


class Fault(Enum):
    """What happens to one call."""

    NONE = "none"
    LOSE_REQUEST = "lose-request"
    LOSE_REPLY = "lose-reply"
    LATE_REQUEST = "late-request"
    LATE_REPLY = "late-reply"


Handler = Callable[[bytes, Window], bytes]


class LocalChannel:
    """A `Channel` whose other end is `handler(request, window) -> reply`; one fault a call is
    drawn from `faults`."""

    def __init__(
        self,
        handler: Handler,
        *,
        faults: Iterator[Fault] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        generation: int = 1,
        resumed: bool = False,
    ) -> None:
        self.window = anonymous_window()
        self.generation = generation
        self.resumed = resumed
        self._handler = handler
        self._faults = repeat(Fault.NONE) if faults is None else faults
        self._meanwhile = meanwhile
        self._closed = self._unmapped = False

    def call(self, request: bytes) -> bytes:
        if self._closed:
            raise Disconnected("the channel is closed")
        fault = next(self._faults)
        if fault is Fault.LOSE_REQUEST:
            self._closed = True
            raise Disconnected("the hypervisor died before the call")
        if fault is Fault.LATE_REQUEST:
            self._wait()
        reply = self._handler(request, self.window)
        if fault is Fault.LOSE_REPLY:
            self._closed = True
            raise Disconnected("the hypervisor died after the call")
        if fault is Fault.LATE_REPLY:
            self._wait()
        return reply

    def hypervisor_is_gone(self) -> bool:
        """Only after a call that told so: a fault is drawn when a call is made."""
        return self._closed

    def _wait(self) -> None:
        self._meanwhile()
        if self._closed:
            raise Disconnected("the hypervisor died while the call waited")

    def sever(self) -> None:
        """The other end is gone, of which this one hears at its next call."""
        self._closed = True

    def close(self) -> None:
        """As with real queues: nobody may look at the window any more."""
        if not self._unmapped:
            self._closed = self._unmapped = True
            self.window.close()
