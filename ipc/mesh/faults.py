"""What a nemesis does to the messages of one node before they reach a link.

A `Policy` decides for each message how many copies arrive and how late each is.  A late copy is
either in turn, and all later ones to that node wait behind it, or it is overtaken.  The decisions
come from a random generator that is passed in, so the same seed and the same messages give the same
fate.  A copy that is still held when the link breaks goes over the next one: older than anything
TCP would deliver, which the lock manager must survive anyway.

Whole links are cut with `Mesh.cut`; both together are what the network can do.
"""

from __future__ import annotations

import heapq
from random import Random
from typing import NamedTuple, Protocol


class Copy(NamedTuple):
    """One arrival of a message."""

    delay_ns: int = 0
    overtaken: bool = False


class Policy(Protocol):
    """The fate of each message."""

    def fate(self, node: int, payload: bytes) -> tuple[Copy, ...]:
        """The copies of a message to `node`; none is a loss."""


class RandomFaults:
    """Each fault with its own probability, drawn for each message."""

    def __init__(
        self,
        random: Random,
        *,
        lose: float = 0.0,
        duplicate: float = 0.0,
        delay: float = 0.0,
        reorder: float = 0.0,
        delay_ns_max: int = 100_000_000,
    ) -> None:
        self._random = random
        self.lose = lose
        self.duplicate = duplicate
        self.delay = delay
        self.reorder = reorder
        self.delay_ns_max = delay_ns_max

    def fate(self, node: int, payload: bytes) -> tuple[Copy, ...]:  # noqa: ARG002
        """Independent of the node and of what is in the message."""
        # As many draws for each message, so that a fate depends on the message's place alone.
        loss, double, late, overtaken = (self._random.random() for _ in range(4))
        delays = [self._random.randrange(self.delay_ns_max) + 1 for _ in range(2)]
        if loss < self.lose:
            return ()
        first = Copy()
        if overtaken < self.reorder:
            first = Copy(delays[0], overtaken=True)
        elif late < self.delay:
            first = Copy(delays[0])
        return (first, Copy(delays[1], overtaken=True)) if double < self.duplicate else (first,)


class _Held(NamedTuple):
    due_ns: int
    number: int
    node: int
    payload: bytes


class Post:
    """Messages on their way to a link; at most `bytes_max` a node are held."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held: list[_Held] = []
        self._held_bytes: dict[int, int] = {}
        self._last_due_ns: dict[int, int] = {}
        self._number = 0

    def put(self, node: int, payload: bytes, copies: tuple[Copy, ...], now_ns: int) -> bool:
        """Hold the copies until they are due; False if there is no room for them."""
        held = self._held_bytes.get(node, 0) + len(payload) * len(copies)
        if held > self._bytes_max:
            return False
        self._held_bytes[node] = held
        for delay_ns, overtaken in copies:
            due_ns = now_ns + delay_ns
            if not overtaken:
                due_ns = max(due_ns, self._last_due_ns.get(node, 0))
                self._last_due_ns[node] = due_ns
            self._number += 1
            heapq.heappush(self._held, _Held(due_ns, self._number, node, payload))
        return True

    def is_empty(self) -> bool:
        return not self._held

    def next_due_ns(self) -> int | None:
        return self._held[0].due_ns if self._held else None

    def take_due(self, now_ns: int) -> list[tuple[int, bytes]]:
        """(node, payload) of all that is due, in the order in which it is."""
        due = []
        while self._held and self._held[0].due_ns <= now_ns:
            held = heapq.heappop(self._held)
            self._held_bytes[held.node] -= len(held.payload)
            due.append((held.node, held.payload))
        return due
