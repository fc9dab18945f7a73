"""One lock of this node, and what the lock manager tells the node about it."""

from __future__ import annotations

from typing import Protocol

from fs.dlm.messages import NO_FLAG, VALUE_BYTES, Claim, Flag, Reason, Value
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
        "flags", "granted", "lifting", "master", "name", "recovering", "request", "token", "value",
        "wanted",
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
        self.lifting = 0
        """The token that the master was asked for in this view."""

    @property
    def protects(self) -> bool:
        """PR or EX is held."""
        return self.granted in {Mode.PR, Mode.EX}

    def write(self, value: bytes) -> None:
        """A new lock value block."""
        if self.granted != Mode.EX:
            raise ValueError("a lock value block is written under EX only")
        if len(value) != VALUE_BYTES:
            raise ValueError(f"a lock value block has {VALUE_BYTES} bytes, not {len(value)}")
        self.value = bytes(value)

    def lifted(self, token: int) -> None:
        """The master's answer. A lock that was given up meanwhile learns its token with a grant."""
        self.lifting = 0
        if self.protects:
            self.token = max(self.token, token)

    def claim(self) -> Claim:
        """What a new master has to know."""
        flags = self.flags if self.wanted is not None else NO_FLAG
        if self.recovering:
            flags |= Flag.RECOVERING
        self.lifting = 0  # whatever the old master answered is not heard any more
        return Claim(
            self.name, self.granted, self.wanted, self.request, flags, self.token, self.value
        )
