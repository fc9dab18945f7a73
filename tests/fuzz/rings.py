"""The hypervisor's end of rings, with guests that write anything anywhere in their windows.

The bytes are steps of two guests (writes into both blocks, proper calls, KICKs, messages in the
queue) and of the hypervisor (looking at a queue, waiting in one, rounds over the rings, going to
rest, yields that take long).  What guests do may also come later: while a call is served, before
and after its answer, and while the hypervisor yields.  Findings are any exception, a call that
nobody made, more than one call of a guest a round, an answer in the wrong place, a hypervisor that
does not come to rest, and a proper call at the end that is not answered.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final
from unittest import mock

import posix_ipc

from ipc import ring
from ipc.abi import CALL_BLOCK, COMPLETION_BLOCK, REPLY_BYTES, REQUEST_BYTES
from ipc.limits import (
    REQUEST_QUEUE_MESSAGES,
    SLOW_YIELD_NS,
    SOON_NS,
    STRETCH_NS,
    WINDOW_CALL_OFFSET,
    WINDOW_COMPLETION_OFFSET,
    YIELDS_MAX,
)
from ipc.mqueue import KICK
from ipc.ring import RingPair, Rings
from ipc.window import anonymous_window
from tests.fuzz.reading import Reader

GUESTS: Final = 2
_LEAPS_NS: Final = (1_000, SLOW_YIELD_NS + 1, SOON_NS, STRETCH_NS, 10**9)
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

    def send(self, message: bytes, _timeout: float = 0) -> None:
        if len(self.messages) == REQUEST_QUEUE_MESSAGES:
            raise posix_ipc.BusyError
        self.messages.append(message)

    def receive(self, _timeout: float = 0) -> tuple[bytes, int]:
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
        self.interfere: Callable[[], None] = _nothing
        """What guests do meanwhile."""
        self.now_ns: Callable[[], int] = itertools.count().__next__

    def serve(self, pair: DryPair, message: bytes, moment_ns: int) -> int:
        self.interfere()
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
        self.interfere()
        return max(moment_ns, self.now_ns())

    def attend(self, pair: DryPair) -> None:
        """The queue is ready."""
        self._answer(pair, pair.receive())

    def favour(self, pair: DryPair) -> None:
        """Wait in the queue of the only one that calls."""
        self._answer(pair, pair.wait(0.0))

    def _answer(self, pair: DryPair, message: bytes | None) -> None:
        if message is not None:
            rang = not pair.came_by_queue
            started_ns = self.now_ns()
            self.serve(pair, message, started_ns)
            if rang:
                self.rings.watch(pair, pair, started_ns)

    def spin(self, rounds: int) -> None:
        before = self.served.copy()
        self.rings.spin(rounds)
        for pair in self.pairs:
            # One a round, and one more when it lies down.
            assert self.served[pair] - before[pair] <= rounds + 1


def _nothing() -> None:
    pass


def fuzz_ring(data: bytes) -> None:
    """All steps, then rest, then one proper call of each guest."""
    steps = _Steps(data)
    with (
        mock.patch.object(ring, "now_ns", steps.now_ns),
        mock.patch.object(ring, "_yield", steps.interfere),
    ):
        hypervisor = steps.hypervisor
        steps.run()
        hypervisor.rings.spin(YIELDS_MAX + 2)
        assert not hypervisor.rings.watched, "it never comes to rest"
        for pair in hypervisor.pairs:
            _proper_call(hypervisor, pair)
            pair.close()


class _Steps(Reader):
    """What guests and hypervisor do, as the bytes say."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.hypervisor = Hypervisor()
        self.hypervisor.interfere = self.interfere
        self.hypervisor.now_ns = self.now_ns
        self._clock = itertools.count()
        self._leap_ns = 0
        self._later: deque[tuple[int, int, bytes]] = deque()
        """Steps of guests that are still to come."""

    def now_ns(self) -> int:
        """A clock that goes on with each look, and leaps."""
        return next(self._clock) + self._leap_ns

    def interfere(self) -> None:
        """A guest's turn while the hypervisor does something."""
        if self._later:
            self._act(*self._later.popleft())

    def run(self) -> None:
        """All steps."""
        while self.left > 0:
            self._step()
        self._later.clear()

    def _step(self) -> None:
        control, choice = self.take(2)
        pair = self.hypervisor.pairs[control % GUESTS]
        rings = self.hypervisor.rings
        match control >> 1 & 15:
            case 0 | 1 | 2 | 3 | 4:
                self._act(control, choice, self.take(4))
            case 5 | 6 | 7:
                self._later.append((self.byte(), choice, self.take(4)))
            case 8 | 9 | 10:
                if pair.requests.messages:
                    self.hypervisor.attend(pair)
            case 11 | 12:
                self.hypervisor.spin(1 + choice % 4)
            case 13:
                (rings.rest if choice & 1 else rings.part_with_idlers)()
            case 14:
                self.hypervisor.favour(pair)
            case _:
                self._leap_ns += _LEAPS_NS[choice % len(_LEAPS_NS)]

    def _act(self, control: int, choice: int, words: bytes) -> None:
        """One thing that a guest does."""
        pair = self.hypervisor.pairs[control % GUESTS]
        window = pair.window
        match control >> 1 & 7:
            case 0 | 5:
                start, size = _PLACES[choice & 3]
                written = (words * 4)[: 1 + choice % 16]
                place = start + int.from_bytes(words[:2], "little") % (size - len(written) + 1)
                window._view[place : place + len(written)] = written
            case 1 | 6:
                window.request[:] = words.ljust(REQUEST_BYTES, b"\0")
                window.call_words[0] = (window.call_words[0] + 1) % 2**64
            case 2:
                message = KICK if choice < 128 else words * (choice % (REQUEST_BYTES // 4 + 1))
                if len(pair.requests.messages) < REQUEST_QUEUE_MESSAGES:
                    pair.requests.send(message, 0)
            case 3:
                window.call_words[1] = choice & 1
            case 4:
                window.completion_words[choice & 1] = int.from_bytes(words, "little")
            case _:
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
