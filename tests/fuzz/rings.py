"""The hypervisor's end of rings, with guests that write anything anywhere in their windows.

The bytes are steps of two guests (writes into both blocks, proper calls, KICKs, messages in the
queue) and of the hypervisor (looking at a queue, rounds over the rings, going to rest).  Findings
are any exception, a call that nobody made, more than one call of a guest a round, an answer in the
wrong place, a hypervisor that does not come to rest, and a proper call at the end that is not
answered.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import Any, Final
from unittest import mock

import posix_ipc

from ipc import ring
from ipc.abi import CALL_BLOCK, COMPLETION_BLOCK, REPLY_BYTES, REQUEST_BYTES
from ipc.limits import (
    REQUEST_QUEUE_MESSAGES,
    WINDOW_CALL_OFFSET,
    WINDOW_COMPLETION_OFFSET,
    YIELDS_MAX,
)
from ipc.mqueue import KICK
from ipc.ring import RingPair, Rings
from ipc.window import anonymous_window

GUESTS: Final = 2
_PLACES: Final = (
    (WINDOW_CALL_OFFSET, CALL_BLOCK.size),
    (WINDOW_CALL_OFFSET, 16),
    (WINDOW_COMPLETION_OFFSET, COMPLETION_BLOCK.size),
    (0, 4 * 4096),
)


class StandInQueue:
    """A queue inside this process."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()

    def send(self, message: bytes, _timeout: float) -> None:
        if len(self.messages) == REQUEST_QUEUE_MESSAGES:
            raise posix_ipc.BusyError
        self.messages.append(message)

    def receive(self, _timeout: float) -> tuple[bytes, int]:
        if not self.messages:
            raise posix_ipc.BusyError
        return self.messages.popleft(), 0

    def close(self) -> None:
        pass


class DryPair(RingPair):
    """A pair without kernel objects."""

    def __init__(self) -> None:
        registry: Any = None
        super().__init__("fuzz", registry, anonymous_window(), bytes)

    def _create(self, name: str, messages: int, message_bytes: int) -> Any:
        return StandInQueue()

    @property
    def requests(self) -> StandInQueue:
        queue: Any = self._requests
        assert isinstance(queue, StandInQueue)
        return queue

    @property
    def replies(self) -> StandInQueue:
        queue: Any = self._replies
        assert isinstance(queue, StandInQueue)
        return queue


class Hypervisor:
    """Serves as `hypervisor.server` does, and counts."""

    def __init__(self) -> None:
        self.pairs = [DryPair() for _ in range(GUESTS)]
        self.rings: Rings[DryPair] = Rings(self.serve)
        self.served: Counter[DryPair] = Counter()

    def serve(self, pair: DryPair, message: bytes, moment_ns: int) -> int:
        by_queue = pair.came_by_queue
        self.served[pair] += 1
        waiting = len(pair.replies.messages)
        reply = bytes([self.served[pair] % 251]) * REPLY_BYTES
        kept = pair.send(reply)
        assert not pair.came_by_queue
        if by_queue:
            assert kept == (waiting < REQUEST_QUEUE_MESSAGES)
            assert not kept or pair.replies.messages[-1] == reply
        else:
            assert kept
            assert len(message) == REQUEST_BYTES
            assert pair.window.completion_words[0] == pair.seen
            assert bytes(pair.window.reply) == reply
        return moment_ns

    def attend(self, pair: DryPair) -> None:
        """The queue is ready."""
        message = pair.receive()
        if message is not None:
            rang = not pair.came_by_queue
            self.serve(pair, message, 0)
            if rang:
                self.rings.watch(pair, pair, 0)

    def spin(self, rounds: int) -> None:
        before = self.served.copy()
        self.rings.spin(rounds)
        for pair in self.pairs:
            # One a round, and one more when it lies down.
            assert self.served[pair] - before[pair] <= rounds + 1


def _no_yield() -> None:
    pass


def fuzz_ring(data: bytes) -> None:
    """All steps, then rest, then one proper call of each guest."""
    clock = itertools.count().__next__
    with mock.patch.object(ring, "now_ns", clock), mock.patch.object(ring, "_yield", _no_yield):
        hypervisor = Hypervisor()
        _play(hypervisor, data)
        hypervisor.rings.spin(YIELDS_MAX + 2)
        assert not hypervisor.rings.watched, "it never comes to rest"
        for pair in hypervisor.pairs:
            _proper_call(hypervisor, pair)
            pair.close()


def _play(hypervisor: Hypervisor, data: bytes) -> None:
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        taken = data[at : at + count]
        at += count
        return taken.ljust(count, b"\0")

    while at < len(data):
        control, choice = take(2)
        pair = hypervisor.pairs[control % GUESTS]
        window = pair.window
        step = control >> 1 & 7
        if step <= 1:
            start, size = _PLACES[choice & 3]
            written = take(1 + choice % 16)
            place = start + int.from_bytes(take(2), "little") % (size - len(written) + 1)
            window._view[place : place + len(written)] = written
        elif step == 2:
            window.request[:] = take(4).ljust(REQUEST_BYTES, b"\0")
            window.call_words[0] = (window.call_words[0] + 1) % 2**64
        elif step == 3:
            message = KICK if choice < 128 else take(choice % (REQUEST_BYTES + 1))
            if len(pair.requests.messages) < REQUEST_QUEUE_MESSAGES:
                pair.requests.send(message, 0)
        elif step == 4:
            if pair.requests.messages:
                hypervisor.attend(pair)
        elif step == 5:
            hypervisor.spin(1 + choice % 4)
        elif step == 6:
            rest = hypervisor.rings.rest if choice & 1 else hypervisor.rings.part_with_idlers
            rest()
        else:
            pair.replies.messages.clear()


def _proper_call(hypervisor: Hypervisor, pair: DryPair) -> None:
    """A guest that comes to its senses: it may have to wait for what it left, and no longer."""
    assert pair.asleep
    for _ in range(REQUEST_QUEUE_MESSAGES + 1):
        hypervisor.attend(pair)
    hypervisor.rings.rest()
    assert not pair.requests.messages
    before = hypervisor.served[pair]
    pair.window.call_words[0] = posted = (pair.seen + 1) % 2**64
    pair.requests.send(KICK, 0)
    hypervisor.attend(pair)
    assert hypervisor.served[pair] == before + 1
    assert pair.window.completion_words[0] == posted
    hypervisor.rings.forget(pair)
