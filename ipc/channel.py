"""What a transport is: the guest's end and the hypervisor's end of one guest's calls.

Every transport (`mqueue`, `ring`, `local`) passes one conformance suite.

  guest                                  hypervisor
  Channel.call(request) --- 64 bytes --> Port.receive()
                                         machine.execute(...), pages through the window
  reply <----------------- 32 bytes ---- Port.send(reply)

A call is synchronous and at most one is in flight on a channel.  When the hypervisor goes away
`call` raises `Disconnected`: the call may or may not have been executed, so a caller must treat
its effect as unknown (repeat an idempotent call, or flush).
"""

from __future__ import annotations

from typing import Protocol

from ipc.window import Window


class Channel(Protocol):
    """The guest's end."""

    window: Window
    generation: int
    """The hypervisor's generation at attach; it goes up with each restart on the same arena."""
    resumed: bool
    """The pools that this guest had before are still there."""

    def call(self, request: bytes) -> bytes:
        """Send one request and wait for its reply; raises Disconnected."""
        ...

    def hypervisor_is_gone(self) -> bool:
        """Whether it is known that the next call will end in Disconnected; who makes no calls may
        ask now and then."""
        ...

    def close(self) -> None: ...


class Port(Protocol):
    """The hypervisor's end; only `wait` ever blocks."""

    window: Window

    def fileno(self) -> int:
        """A descriptor that polls readable while a request waits."""
        ...

    def receive(self) -> bytes | None:
        """The oldest waiting request as it came (untrusted, any length), or None."""
        ...

    def wait(self, patience_seconds: float | None = None) -> bytes | None:
        """Sleep until a request comes; None after `patience_seconds`, a signal or a kick."""
        ...

    def kick(self) -> None:
        """Wake whoever sleeps in `wait`; of no effect while requests are waiting."""
        ...

    def send(self, reply: bytes) -> bool:
        """False if the guest does not read its replies; the reply is dropped."""
        ...

    def close(self) -> None: ...
