"""The lease under which a node may write: the node stops itself before others take its locks.

The lease runs from the moment before a heartbeat write began, for the write timeout. Others count
the dead time from a moment after that write was done, and the dead time is longer. So a node whose
lease holds has not been declared dead, as long as its clock runs as fast as the others'. A node
that was paused finds the lease over when it wakes, because the clock went on.

Invariants:
  F1  once fenced, always fenced: a node comes back only as a new incarnation;
  F2  `check` that returns means that the lease held at that moment. A write that follows may still
      be late (the process may be stopped in between): that gap is closed by the reservations of
      `fs.block.shared`.

Differs from o2cb, which restarts the machine ("sorry to be fencing this system"): only this file
system stops, every operation fails with EIO, and a person reads why.
"""

from __future__ import annotations

import errno
from collections.abc import Callable


class Fence:
    """The lease of one node. `clock` must go on while the process is stopped."""

    def __init__(self, label: str, clock: Callable[[], int]) -> None:
        self.label = label
        self.reason: str | None = None
        self.lease_end_ns = 0
        self._clock = clock

    def check(self) -> None:
        """Raise EIO when this node must not write (any more). Costs one look at the clock."""
        if self.reason is None and self._clock() < self.lease_end_ns:
            return
        if self.expired():
            raise OSError(errno.EIO, f"{self.label} is fenced: {self.reason}")
        raise OSError(errno.EIO, f"{self.label} is not in the cluster yet")

    def expired(self) -> bool:
        """Whether the node is fenced; notices a lease that ran out."""
        if self.reason is None and self.lease_end_ns:
            late_ns = self._clock() - self.lease_end_ns
            if late_ns >= 0:
                self.reason = (
                    "its heartbeat was not written in time,"
                    f" the lease ran out {late_ns / 1e9:.3f} s ago"
                )
        return self.reason is not None

    def renew(self, lease_end_ns: int) -> None:
        """A heartbeat reached the disk.

        A lease that ran out meanwhile stays over: others may have counted up to it.
        """
        if not self.expired():
            self.lease_end_ns = max(self.lease_end_ns, lease_end_ns)

    def trip(self, reason: str) -> None:
        """Fence this node for a reason of its own. The first reason stays."""
        if not self.expired():
            self.reason = reason
