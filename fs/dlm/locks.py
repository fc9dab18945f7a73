"""Locks as a file system wants them: call, wait, hold, release; and keep what nobody else wants.

A lock that is out of use stays at this node (OCFS2 does the same), so the next use costs nothing.
When another node wants it (BAST), the file system is called back to write back and forget what the
lock protects (`downconvert`), and then the lock goes down to what the other can live with.

When a lock is given up:
  G1  never in use, and never between a grant and the first use by whoever waited for it: every
      grant is good for one use at least, or two nodes could pass a lock to and fro and neither
      get anything done;
  G2  with a use of its own still on the way down the stack it is lent again (nested use), else
      the wish of another node comes first: a busy node can't keep a lock for ever;
  G3  only while this node waits for some lock (its operation has changed nothing yet), when its
      last use of any lock ends, or in `serve`, which an idle node has to call now and then;
  G4  during the callback the lock is still held, and may be used as far as it is held. The
      callback may wait, which may give up other locks. It must not take a lock that comes before
      one in use in the file system's order: no lock manager can help then.
  G5  if the callback fails, the lock is kept and the error goes to whoever waited; another
      attempt is made later. A file system that wants to lose its data instead must not raise.

Two readers that both want to write: the master denies the second (`resource`). If it does not use
its PR, it goes down to NL and asks anew; if it does, `acquire` raises EDEADLK, and the caller has
to release first. A file system that takes its locks in their final mode never sees that.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from fs.dlm.links import RETRANSMIT_NS
from fs.dlm.manager import LockManager
from fs.dlm.messages import NO_FLAG, Flag, Reason, Value
from fs.dlm.modes import Mode
from fs.dlm.transport import LockTransport
from fs.errors import error


class _Entry:
    """What this node does with one lock."""

    __slots__ = (
        "abandoned",
        "denied",
        "dropped",
        "giving_up",
        "level",
        "pending",
        "reserved",
        "urgent",
        "users",
    )

    def __init__(self) -> None:
        self.users = {Mode.NL: 0, Mode.PR: 0, Mode.EX: 0}
        self.pending = False
        """A request is under way."""
        self.abandoned = False
        """Whoever made it does not wait any more."""
        self.reserved = False
        """It was granted, and whoever waits has not seen it yet."""
        self.urgent = False
        """The request goes past what is held back, or was taken back to make way for one that
        does."""
        self.denied: Reason | None = None
        self.level: Mode | None = None
        """How far another node wants this one to go down."""
        self.giving_up = False
        self.dropped = False

    @property
    def in_use(self) -> bool:
        return self.reserved or any(self.users.values())


def _nothing_to_forget(name: bytes, to: Mode) -> None:
    """The callback of a node without a file system."""


class NodeLocks:
    """The cluster locks of one node, and its lock manager (`manager`)."""

    def __init__(
        self,
        node: int,
        transport: LockTransport,
        pump: Callable[[], None],
        *,
        retransmit_ns: int = RETRANSMIT_NS,
        label: str = "",
    ) -> None:
        """`pump` delivers what has come, or waits a little for it; it may raise to end a wait."""
        self.manager = LockManager(node, transport, self, retransmit_ns=retransmit_ns, label=label)
        self.downconvert: Callable[[bytes, Mode], None] = _nothing_to_forget
        """The file system's callback."""
        self.on_recovered: Callable[[int], None] | None = None
        self.on_expelled: Callable[[], None] | None = None
        self.recovering = False
        """Requests go past what is held back for dead nodes: this node replays their journals."""
        self.downconverts = 0
        self._pump = pump
        self._entries: dict[bytes, _Entry] = {}
        self._wanted: dict[bytes, None] = {}
        """Names that another node wants, oldest wish first."""
        self._uses = 0
        self._depth = 0
        """Callbacks on the stack."""

    # What the file system calls.

    def acquire(self, name: bytes, mode: Mode) -> None:
        """Wait for the lock; it is in use then, until `release`."""
        self._take(name, mode, NO_FLAG)

    def try_acquire(self, name: bytes, mode: Mode) -> bool:
        """The same if no other node has to give anything up for it."""
        return self._take(name, mode, Flag.NOQUEUE)

    def release(self, name: bytes, mode: Mode) -> None:
        """One use ends. The lock stays here until another node wants it."""
        entry = self._entries.get(name)
        if entry is None or not entry.users[mode]:
            raise ValueError(f"{name!r} is not in use in mode {mode.name}")
        entry.users[mode] -= 1
        self._uses -= 1
        if not self._uses and not self._depth:
            self.serve()

    def pin(self, name: bytes) -> None:
        """Take a lock in EX and keep it, whoever wants it, until `unpin`. It is not in `uses`."""
        self.acquire(name, Mode.EX)
        self._uses -= 1

    def unpin(self, name: bytes) -> None:
        """As any other lock from now on."""
        self._uses += 1
        self.release(name, Mode.EX)

    def value(self, name: bytes) -> Value:
        """The lock value block, or None if it is not valid (or not even PR is held)."""
        return self.manager.value(name) if self._held(name) else None

    def set_value(self, name: bytes, value: bytes) -> None:
        """Under EX only; others see it when EX was given up."""
        self.manager.set_value(name, value)

    def token(self, name: bytes) -> int:
        """The fencing token; 0 if not even PR is held."""
        return self.manager.token(name) if self._held(name) else 0

    def lift(self, name: bytes, at_least: int) -> None:
        """Ask for a higher token, if PR or EX is held, without waiting for it."""
        if not self.manager.expelled:
            self.manager.lift(name, at_least)

    def drop(self, name: bytes) -> None:
        """No interest any more. What the lock protected was written back and forgotten."""
        entry = self._entries.get(name)
        if entry is None or entry.pending:
            return
        if entry.in_use:
            raise ValueError(f"{name!r} is in use")
        if entry.giving_up:
            entry.dropped = True
            return
        self._forget(name)

    # What the node's main loop calls.

    def serve(self) -> None:
        """Give up what others want and nobody here uses."""
        for name in list(self._wanted):
            entry = self._entries.get(name)
            if entry is None:
                self._wanted.pop(name, None)
            elif not (entry.in_use or entry.pending or entry.giving_up):
                self._give_up(name, entry)

    def leave(self) -> None:
        """Drop every lock; the node may go when `manager.links.idle`."""
        for name in list(self._entries):
            self.drop(name)

    @property
    def uses(self) -> int:
        """Locks in use now, each as often as it is."""
        return self._uses

    # What the lock manager tells.

    def granted(self, name: bytes, mode: Mode) -> None:  # noqa: ARG002
        """A request was granted."""
        entry = self._entries.get(name)
        if entry is not None:
            entry.pending = False
            entry.reserved = not entry.abandoned
            entry.abandoned = False

    def denied(self, name: bytes, reason: Reason) -> None:
        """A request was denied."""
        entry = self._entries.get(name)
        if entry is not None:
            entry.pending = entry.abandoned = False
            entry.denied = reason

    def blocking(self, name: bytes, mode: Mode) -> None:
        """Another node wants it."""
        entry = self._entries.get(name)
        if entry is not None and (entry.level is None or mode < entry.level):
            entry.level = mode
            self._wanted[name] = None

    def recovered(self, epoch: int) -> None:
        """Recovery is over here."""
        if self.on_recovered is not None:
            self.on_recovered(epoch)

    def expelled(self) -> None:
        """Everything is lost; those who wait are told."""
        self._wanted.clear()
        for entry in self._entries.values():
            entry.pending = entry.reserved = False
        if self.on_expelled is not None:
            self.on_expelled()

    # The inside.

    def _held(self, name: bytes) -> Mode:
        return self.manager.mode(name) or Mode.NL

    def _take(self, name: bytes, mode: Mode, flags: Flag) -> bool:
        while True:
            if self.manager.expelled:
                raise error(errno.EIO, f"{self.manager.label} is not in the cluster any more")
            # Anew each time: a callback may have dropped it.
            entry = self._entries.setdefault(name, _Entry())
            if self._may_use(name, entry, mode):
                break
            if entry.pending:
                if flags & Flag.NOQUEUE:
                    return False
                if self.recovering and not entry.urgent:
                    # What waits further down the stack may be held back until the recovery that
                    # this is has done its work: it has to ask again afterwards.
                    entry.urgent = True
                    self.manager.cancel(name)
                self._wait()
            elif entry.giving_up:
                raise error(errno.EDEADLK, f"{name!r} is being given up")
            elif not entry.in_use and entry.level is not None and self._held(name) > entry.level:
                self._give_up(name, entry)
            elif self._ask(name, entry, mode, flags):
                break
            elif entry.denied == Reason.AGAIN and flags & Flag.NOQUEUE:
                return False
            elif entry.denied == Reason.DEADLOCK:
                if entry.in_use:
                    raise error(errno.EDEADLK, f"another reader of {name!r} wants to write too")
                self._go_down(name, entry, Mode.NL)
        entry.users[mode] += 1
        entry.dropped = False
        self._uses += 1
        return True

    def _may_use(self, name: bytes, entry: _Entry, mode: Mode) -> bool:
        held = self.manager.mode(name)
        if held is None or held < mode:
            return False
        return entry.in_use or entry.giving_up or entry.level is None or mode <= entry.level

    def _ask(self, name: bytes, entry: _Entry, mode: Mode, flags: Flag) -> bool:
        entry.pending, entry.denied, entry.urgent = True, None, self.recovering
        flags |= Flag.RECOVERING if self.recovering else NO_FLAG
        try:
            self.manager.lock(name, mode, flags)
        except (OSError, ValueError):
            entry.pending = False
            raise
        try:
            while entry.pending:
                self._wait()
        except BaseException:
            entry.reserved = False
            if entry.pending:
                entry.abandoned = True
                self.manager.cancel(name)
            raise
        granted, entry.reserved = entry.reserved, False
        return granted

    def _wait(self) -> None:
        self._pump()
        self.serve()

    def _give_up(self, name: bytes, entry: _Entry) -> None:
        level = Mode.NL if entry.level is None else entry.level
        self._go_down(name, entry, level)
        if self._held(name) <= level and entry.level == level:
            entry.level = None
            self._wanted.pop(name, None)

    def _go_down(self, name: bytes, entry: _Entry, to: Mode) -> None:
        if self._held(name) > to:
            entry.giving_up = True
            self._depth += 1
            try:
                self.downconvert(name, to)
            finally:
                self._depth -= 1
                entry.giving_up = False
            self.downconverts += 1
        if entry.in_use:
            return  # the callback still uses it: later
        if entry.dropped:
            self._forget(name)
        elif self._held(name) > to:
            self.manager.down(name, to)

    def _forget(self, name: bytes) -> None:
        del self._entries[name]
        self._wanted.pop(name, None)
        if self.manager.mode(name) is not None:
            self.manager.unlock(name)
