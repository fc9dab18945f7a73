"""One resource as its master knows it: who holds it, who waits, its value and its token.

A node has at most one lock on a resource and at most one request for it, as OCFS2 uses o2dlm (a
node's processes share the node's lock). So a holder and a waiter are named by their node.

Who is next:
  - a reader that wants to become EX (`converting`) comes before all who wait, because nobody can
    be given EX while it keeps its PR. There is at most one: a second could never be granted, nor
    the first, so it is denied at once (`DEADLOCK`) and has to give up its PR;
  - all others wait in one row, whether they hold NL or nothing, and none is overtaken. o2dlm lets
    every conversion go first; then two nodes that hand a lock to and fro by NL -> EX could keep
    a newcomer waiting for ever;
  - whoever stands in the way of the next one is told once how far to go down (BAST).

The token is the number of the newest EX grant; it grows with each of them and never falls. A holder
of PR or EX may have it lifted (`lift`), when something that remembers tokens wants more than that:
nobody else can change what the lock protects meanwhile, so the higher number says the same. The
value belongs to the hold that wrote it: `stamp` is the token of that hold. While nobody holds EX
the stamp is the token; while somebody does, the value is his and the one here is older. After
his death no value has the newest token as its stamp, and that is what "not valid" means
(`recovery`).

While `deaths` is not empty only the node that replays the dead node's journal is granted anything.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from fs.dlm.messages import (
    VALUE_BYTES,
    Bast,
    Cancel,
    Death,
    Deny,
    Down,
    Flag,
    Grant,
    Lift,
    Lifted,
    Message,
    Reason,
    Record,
    Request,
    Value,
)
from fs.dlm.modes import Mode, compatible, highest_beside

FIRST_VALUE: Final = bytes(VALUE_BYTES)
"""The value of a resource that nobody has written to."""


class Waiter(NamedTuple):
    """A request that is not granted yet."""

    node: int
    request: int
    mode: Mode
    flags: Flag


class Post(NamedTuple):
    """A message to a node."""

    to_node: int
    message: Message


class Resource:
    """The master's side. Every method returns what has to be told to whom, in order."""

    def __init__(self, name: bytes, token: int, value: Value = FIRST_VALUE) -> None:
        self.name = name
        self.token = token
        self.stamp = token
        self.value = value
        self.holders: dict[int, Mode] = {}
        self.converting: list[Waiter] = []
        self.waiting: list[Waiter] = []
        self.deaths: frozenset[Death] = frozenset()
        self.asked: dict[int, Mode] = {}
        """How far holders were asked to go down since they last did."""

    @property
    def unused(self) -> bool:
        """Nobody would notice if it were forgotten (the token must outlive it). That a value was
        lost is remembered until there is a new one, and so is a value whose last byte is set."""
        if self.value is None or self.value[-1]:
            return False
        return not (self.holders or self.converting or self.waiting or self.deaths)

    @property
    def exclusive(self) -> int | None:
        """The node that holds EX."""
        return next((node for node, mode in self.holders.items() if mode == Mode.EX), None)

    def record(self) -> Record:
        """What the next master has to know; holders and waiters tell him the rest."""
        return Record(self.name, self.token, self.stamp, self.exclusive, self.value, self.deaths)

    def ask(self, node: int, request: Request) -> list[Post]:
        """A new lock or a conversion upwards."""
        self._forget_request(node)
        waiter = Waiter(node, request.request, request.mode, request.flags)
        held = self.holders.get(node)
        if held is not None and request.mode <= held:
            return [self._deny(waiter, Reason.INVALID)]
        upgrade = held == Mode.PR
        if request.flags & Flag.NOQUEUE:
            before = self.converting if upgrade else [*self.converting, *self.waiting]
            if self._next_of([*before, waiter]) != waiter or self._in_the_way(waiter):
                return [self._deny(waiter, Reason.AGAIN)]
        elif upgrade and self.converting:
            return [self._deny(waiter, Reason.DEADLOCK)]
        (self.converting if upgrade else self.waiting).append(waiter)
        return self.schedule()

    def cancel(self, node: int, cancel: Cancel) -> list[Post]:
        """Take a request back; one that was answered is left alone."""
        waiter = self._find(node)
        if waiter is None or waiter.request != cancel.request:
            return []
        self._forget_request(node)
        return [self._deny(waiter, Reason.CANCELLED), *self.schedule()]

    def down(self, node: int, down: Down) -> list[Post]:
        """A holder has gone down. It is granted as it stands: less is always free."""
        held = self.holders.get(node)
        if held is None or down.mode > held:
            return []
        if held == Mode.EX and down.mode != Mode.EX:
            self.value = down.value
            self.stamp = self.token
        if down.gone:
            del self.holders[node]
            self._forget_request(node)
        else:
            self.holders[node] = down.mode
            if down.mode == Mode.NL:
                self._requeue(node)
        if self.asked.get(node, Mode.EX) >= down.mode:
            self.asked.pop(node, None)
        return self.schedule()

    def lift(self, node: int, lift: Lift) -> list[Post] | None:
        """The token becomes the wanted one at least; None if `node` has no right to that."""
        if self.holders.get(node, Mode.NL) == Mode.NL:
            return None
        if lift.token > self.token:
            if self.stamp == self.token:
                self.stamp = lift.token
            self.token = lift.token
        return [Post(node, Lifted(self.name, self.token))]

    def release(self, deaths: frozenset[Death]) -> list[Post]:
        """Journals were replayed; `deaths` are those that were not."""
        self.deaths = deaths
        return self.schedule()

    def schedule(self) -> list[Post]:
        """Grant what can be granted, and tell those who are in the way of the next one."""
        posts = []
        while (waiter := self._next_of([*self.converting, *self.waiting])) is not None:
            obstacles = self._in_the_way(waiter)
            if obstacles:
                level = highest_beside(waiter.mode)
                for node in obstacles:
                    if self.asked.get(node, Mode.EX) > level:
                        self.asked[node] = level
                        posts.append(Post(node, Bast(self.name, level)))
                break
            posts.append(self._grant(waiter))
        return posts

    def _grant(self, waiter: Waiter) -> Post:
        self._forget_request(waiter.node)
        self.holders[waiter.node] = waiter.mode
        self.asked.pop(waiter.node, None)
        if waiter.mode == Mode.EX:
            self.token += 1
        grant = Grant(self.name, waiter.request, waiter.mode, self.token, self.value)
        return Post(waiter.node, grant)

    def _next_of(self, row: list[Waiter]) -> Waiter | None:
        for waiter in row:
            if not self.deaths or waiter.flags & Flag.RECOVERING:
                return waiter
        return None

    def _in_the_way(self, waiter: Waiter) -> list[int]:
        return [
            node
            for node, mode in self.holders.items()
            if node != waiter.node and not compatible(mode, waiter.mode)
        ]

    def _find(self, node: int) -> Waiter | None:
        row = [*self.converting, *self.waiting]
        return next((waiter for waiter in row if waiter.node == node), None)

    def _forget_request(self, node: int) -> None:
        self.converting = [waiter for waiter in self.converting if waiter.node != node]
        self.waiting = [waiter for waiter in self.waiting if waiter.node != node]

    def _requeue(self, node: int) -> None:
        """A reader that gave up its PR while it converted waits like everyone else."""
        self.waiting += [waiter for waiter in self.converting if waiter.node == node]
        self.converting = [waiter for waiter in self.converting if waiter.node != node]

    def _deny(self, waiter: Waiter, reason: Reason) -> Post:
        return Post(waiter.node, Deny(self.name, waiter.request, reason))
