"""One node's lock manager: its locks, the resources it masters, and the way between both.

A state machine: `lock`, `down`, `unlock`, `cancel`, `deliver`, `tick` and `set_view` change it, and
what comes of them is told to `LockEvents`. It never waits and never looks at a clock. `locks` makes
something out of it that a file system can call.

What it promises, in o2dlm's terms: NL, PR and EX; a grant is told (AST) and so is being in the
way (BAST); requests that don't wait (NOQUEUE); cancel, which is answered by a denial or by the
grant that was faster; a value of 64 bytes; a master per resource; and, beyond o2dlm, a fencing
token that grows with each EX grant of a resource, and that a holder may have lifted.

Rules that make it simple:
  - going down takes effect here at once and needs no answer; going up is a request;
  - one request a lock at a time;
  - a message counts only from who may send it: grants from the master of that name, requests from
    members. Everything else is counted in `refused` and has no effect;
  - messages to itself take the same way as others, through `_to_self`.

A node that joins has a new `LockManager`. The epochs that membership gives out must grow over the
life of whatever remembers tokens (a shared pool), also when all nodes were gone in between.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType

from fs.dlm.links import RETRANSMIT_NS, Links
from fs.dlm.lock import Lock, LockEvents
from fs.dlm.master import Master
from fs.dlm.messages import (
    NAME_BYTES_MAX,
    NO_FLAG,
    NODE_MAX,
    Bast,
    Cancel,
    Claim,
    Death,
    Deny,
    Done,
    Down,
    Flag,
    Grant,
    Lift,
    Lifted,
    Member,
    Message,
    Reason,
    Record,
    Release,
    Request,
    Value,
)
from fs.dlm.modes import Mode
from fs.dlm.recovery import EPOCH_MAX, Rebuild, lift_limit, master_of, token_limit
from fs.dlm.resource import Post, Resource
from fs.dlm.transport import LockTransport
from fs.errors import error


class LockManager:
    """The lock manager of node `node`, which is called `label` when a person reads of it."""

    def __init__(
        self,
        node: int,
        transport: LockTransport,
        events: LockEvents,
        *,
        retransmit_ns: int = RETRANSMIT_NS,
        label: str = "",
    ) -> None:
        if not 0 <= node <= NODE_MAX:
            raise ValueError(f"node {node} is not between 0 and {NODE_MAX}")
        self.node = node
        self.label = label or f"node {node}"
        self.epoch = 0
        self.members: frozenset[int] = frozenset()
        self.ready = False
        self.expelled = False
        self.refused = 0
        """Messages that their sender had no right to send, or that made no sense."""
        self.links = Links(node, transport, retransmit_ns=retransmit_ns)
        self._events = events
        self._locks: dict[bytes, Lock] = {}
        self._master = Master()
        self._rebuild: Rebuild | None = None
        self._since: dict[int, int] = {}
        self._marked: set[int] = set()
        self._last_request = 0
        self._too_early: list[tuple[int, Message]] = []
        self._to_self: deque[Message] = deque()
        self._news: deque[tuple[str, tuple[object, ...]]] = deque()
        self._draining = False

    @property
    def resources(self) -> Mapping[bytes, Resource]:
        """What this node masters, to look at."""
        return MappingProxyType(self._master.resources)

    @property
    def locks(self) -> Mapping[bytes, Lock]:
        """What this node holds and wants, for people who look."""
        return MappingProxyType(self._locks)

    @property
    def missing(self) -> frozenset[int]:
        """Members that recovery waits for."""
        return self._rebuild.missing if self._rebuild is not None else frozenset()

    @property
    def held(self) -> frozenset[int]:
        """Dead nodes whose journals still have to be replayed, as far as is known here.

        Who replays one may die before all have heard of it: after each view a survivor looks at
        these journals, and says `release_dead` also for those that are clean already.
        """
        return frozenset(death.node for death in self._master.known.held)

    def mode(self, name: bytes) -> Mode | None:
        """What this node holds."""
        lock = self._locks.get(name)
        return None if lock is None else lock.granted

    def token(self, name: bytes) -> int:
        """The fencing token of the newest EX grant, or what it was lifted to since; right while PR
        or EX is held. The master may know a higher one, and will say so when it has to lift."""
        lock = self._locks.get(name)
        return 0 if lock is None else lock.token

    def value(self, name: bytes) -> Value:
        """The lock value block; right while PR or EX is held."""
        lock = self._locks.get(name)
        return None if lock is None else lock.value

    def set_value(self, name: bytes, value: bytes) -> None:
        """Write the lock value block: others see it when EX was given up."""
        lock = self._locks.get(name)
        (lock or Lock(name, None)).write(value)

    def master_of(self, name: bytes) -> int | None:
        """The master of a name in this view."""
        return master_of(name, self.members) if self.members else None

    def lock(self, name: bytes, mode: Mode, flags: Flag = NO_FLAG) -> None:
        """Ask for a new lock, or for more than what is held; `LockEvents` has the answer."""
        if self.expelled:
            raise error(errno.EIO, f"{self.label} is not in the cluster any more")
        if not 1 <= len(name) <= NAME_BYTES_MAX:
            raise ValueError(f"a lock's name has 1 to {NAME_BYTES_MAX} bytes, not {len(name)}")
        lock = self._locks.get(name)
        if lock is not None:
            if lock.wanted is not None:
                raise ValueError("a lock has one request at a time")
            if lock.granted is not None and mode <= lock.granted:
                raise ValueError(f"{lock.granted.name} is held already")
        else:
            lock = self._locks[name] = Lock(name, self.master_of(name))
        self._last_request = (self._last_request + 1) & 0xFFFFFFFF
        lock.wanted, lock.flags, lock.request = mode, flags, self._last_request
        self._post(lock.master, Request(name, lock.request, mode, flags))
        self._drain()

    def down(self, name: bytes, mode: Mode) -> None:
        """Go down to `mode`, at once."""
        lock = self._idle_lock(name)
        if lock.granted is None or mode > lock.granted:
            raise ValueError("going down means to a lower mode")
        value = lock.value if lock.granted == Mode.EX else None
        lock.granted = mode
        lock.recovering = lock.recovering and mode != Mode.NL
        self._post(lock.master, Down(name, mode, gone=False, value=value))
        self._drain()

    def unlock(self, name: bytes) -> None:
        """Have no lock on this resource any more, at once."""
        lock = self._idle_lock(name)
        value = lock.value if lock.granted == Mode.EX else None
        del self._locks[name]
        self._post(lock.master, Down(name, Mode.NL, gone=True, value=value))
        self._drain()

    def cancel(self, name: bytes) -> None:
        """Take the request back: it will be denied as cancelled, unless its answer was faster."""
        lock = self._locks.get(name)
        if lock is None or lock.wanted is None:
            return
        if not self.members:
            self._denied(lock, Reason.CANCELLED)
        else:
            lock.flags |= Flag.NOQUEUE  # a new view will not queue it again
            self._post(lock.master, Cancel(name, lock.request))
        self._drain()

    def lift(self, name: bytes, at_least: int) -> None:
        """Have the token lifted, if PR or EX is held; the master is asked once in a view."""
        lock = self._locks.get(name)
        if lock is None or not lock.protects or at_least <= max(lock.token, lock.lifting):
            return
        if at_least >= lift_limit(self.epoch):
            self.refused += 1
            return
        lock.lifting = at_least
        self._post(lock.master, Lift(name, at_least))
        self._drain()

    # Views.

    def hold(self, dead_node: int) -> None:
        """Hold back what `dead_node` had in EX. Call before the view that says it is dead."""
        self._marked.add(dead_node)

    def release_dead(self, dead_node: int) -> None:
        """The journal of `dead_node` was replayed. One node has to say so, if it lives (`held`)."""
        self._release(Death(dead_node, self.epoch))
        for node in sorted(self.members - {self.node}):
            self.links.post(node, Release(Death(dead_node, self.epoch)))
        self._drain()

    def set_view(self, epoch: int, members: frozenset[int]) -> None:
        """A new view begins. Older ones are ignored."""
        if epoch <= self.epoch or self.expelled:
            return
        if epoch > EPOCH_MAX:
            raise ValueError(f"epoch {epoch} is above {EPOCH_MAX}")
        if self.node not in members:
            self._expel()
            return
        before = tuple(Member(node, self._since[node]) for node in sorted(self.members))
        deaths = {Death(node, epoch) for node in self._marked}
        done = self._master.done(self.epoch, before, deaths, ready=self.ready)
        records = self._master.records() if self.ready else []
        self._since = {node: self._since.get(node, epoch) for node in members}
        self._master.known.held = done.held
        self._marked.clear()
        self.epoch, self.members, self.ready = epoch, members, False
        self._master.start(epoch)
        self._rebuild = Rebuild(epoch, members)
        self._too_early.clear()
        self._to_self.clear()
        self.links.start(epoch, members)
        for record in records:
            self._post(self.master_of(record.name), record)
        for lock in list(self._locks.values()):
            self._claim(lock)
        for node in sorted(members):
            self._post(node, done)
        for node, messages in self.links.came_early():
            for message in messages:
                self._handle(node, message)
        self._drain()

    # What comes from outside.

    def deliver(self, from_node: int, message: bytes) -> None:
        """Bytes from another node; any bytes."""
        if self.expelled:
            return
        for each in self.links.receive(from_node, message):
            self._handle(from_node, each)
        self._drain()

    def tick(self, now_ns: int) -> None:
        """Time has passed."""
        self.links.tick(now_ns)

    def peer_up(self, node: int) -> None:
        """The transport reaches `node` again."""
        self.links.peer_up(node)

    def peer_down(self, node: int) -> None:
        """It does not."""
        self.links.peer_down(node)

    # The inside.

    def _handle(self, from_node: int, message: Message) -> None:
        if _newest_token(message) >= token_limit(self.epoch) or _newest_death(message) > self.epoch:
            # A lie: adopted, a token would grow beyond what a message can carry, and of a death
            # that is still to come no release would ever tell.
            self.refused += 1
            return
        match message:
            case Claim() | Record() | Done():
                if self._rebuild is None or (
                    not isinstance(message, Done) and self.master_of(message.name) != self.node
                ):
                    self.refused += 1
                    return
                self._rebuild.take(from_node, message)
                if self._rebuild.complete:
                    self._finish(self._rebuild)
            case Grant() | Deny() | Bast() | Lifted():
                lock = self._locks.get(message.name)
                if lock is not None and lock.master == from_node:
                    self._answered(lock, message)
                else:
                    self.refused += lock is not None  # one that is gone may still be asked for
            case Release(death):
                self._release(death)
            case Request() | Cancel() | Down() | Lift():
                if self.master_of(message.name) != self.node:
                    self.refused += 1
                elif not self.ready:
                    self._too_early.append((from_node, message))
                elif (posts := self._master.handle(from_node, message)) is None:
                    self.refused += 1
                else:
                    self._post_all(posts)

    def _answered(self, lock: Lock, message: Grant | Deny | Bast | Lifted) -> None:
        match message:
            case Lifted(_, token):
                lock.lifted(token)
                self._master.saw(token)
            case Bast(_, mode):
                if lock.granted is not None and lock.granted > mode:
                    self._news.append(("blocking", (lock.name, mode)))
            case Grant(_, request, mode, token, value):
                if lock.wanted != mode or lock.request != request:
                    self.refused += 1
                    return
                lock.granted, lock.wanted = mode, None
                lock.recovering = bool(lock.flags & Flag.RECOVERING)
                lock.token, lock.value = token, value
                self._master.saw(token)
                self._news.append(("granted", (lock.name, mode)))
            case Deny(_, request, reason):
                if lock.wanted is None or lock.request != request:
                    self.refused += 1
                    return
                self._denied(lock, reason)

    def _denied(self, lock: Lock, reason: Reason) -> None:
        lock.wanted = None
        if lock.granted is None:
            del self._locks[lock.name]
        self._news.append(("denied", (lock.name, reason)))

    def _claim(self, lock: Lock) -> None:
        lock.master = self.master_of(lock.name)
        self._post(lock.master, lock.claim())

    def _finish(self, rebuild: Rebuild) -> None:
        self._rebuild = None
        findings = rebuild.finish(self._master.known)
        if self.node in findings.expelled:
            self._expel()
            return
        self._master.adopt(findings)
        self.ready = True
        self._news.append(("recovered", (self.epoch,)))
        self._post_all(rebuild.posts)
        too_early, self._too_early = self._too_early, []
        for from_node, message in too_early:
            self._handle(from_node, message)

    def _release(self, death: Death) -> None:
        self._post_all(self._master.release(Death(death.node, min(death.epoch, self.epoch))))

    def _expel(self) -> None:
        self.expelled = True
        self.ready = False
        self.members = frozenset()
        self._locks.clear()
        self._master.start(EPOCH_MAX)
        self._rebuild = None
        self._to_self.clear()
        self._too_early.clear()
        self.links.start(EPOCH_MAX, ())
        self._news.append(("expelled", ()))
        self._drain()

    def _idle_lock(self, name: bytes) -> Lock:
        lock = self._locks.get(name)
        if lock is None or lock.wanted is not None:
            raise ValueError("no lock that is held and not asked for")
        return lock

    def _post_all(self, posts: list[Post]) -> None:
        for to_node, message in posts:
            self._post(to_node, message)

    def _post(self, to_node: int | None, message: Message) -> None:
        if to_node == self.node:
            self._to_self.append(message)
        elif to_node is not None:
            self.links.post(to_node, message)

    def _drain(self) -> None:
        """Deal with messages to itself, then tell the node; not from inside of either."""
        if self._draining:
            return
        self._draining = True
        try:
            while self._to_self or self._news:
                if self._to_self:
                    self._handle(self.node, self._to_self.popleft())
                else:
                    event, arguments = self._news.popleft()
                    getattr(self._events, event)(*arguments)
        finally:
            self._draining = False
        self.links.acknowledge()


def _newest_token(message: Message) -> int:
    match message:
        case Grant() | Lifted() | Record() | Claim():
            return message.token
        case Done():
            return message.highest_token
    return 0


def _newest_death(message: Message) -> int:
    match message:
        case Record():
            deaths = message.deaths
        case Done():
            # What is said to be released is cut to this epoch where it is taken.
            deaths = message.held.union(*(grave.deaths for grave in message.graves))
        case _:
            return 0
    return max((death.epoch for death in deaths), default=0)
