"""One lock of this node, and what the lock manager tells the node about it."""

from __future__ import annotations

from typing import Protocol

from fs.dlm.messages import NO_FLAG, Reason, Value
from fs.dlm.modes import Mode


class LockEvents(Protocol):
    """What a lock manager tells its node. Called when the manager's state is whole."""

    def granted(self, name: bytes, mode: Mode) -> None:
        """The request was granted (AST)."""
        ...

    def denied(self, name: bytes, reason: Reason) -> None:
        """The request was not granted; what was held before still is."""
        ...

    def blocking(self, name: bytes, mode: Mode) -> None:
        """Somebody waits until this node goes down to `mode` (BAST)."""
        ...

    def recovered(self, epoch: int) -> None:
        """All resources mastered here are in order again after the view of `epoch` began."""
        ...

    def expelled(self) -> None:
        """The others went on without this node: it holds nothing any more."""
        ...


class Lock:
    """This node's lock on one resource. `granted` None: only asked for yet."""

    __slots__ = (
        "flags", "granted", "master", "name", "recovering", "request", "token", "value", "wanted",
    )  # fmt: skip

    def __init__(self, name: bytes, master: int | None) -> None:
        self.name = name
        self.master = master
        self.granted: Mode | None = None
        self.wanted: Mode | None = None
        self.request = 0
        self.flags = NO_FLAG
        self.recovering = False
        self.token = 0
        self.value: Value = None
