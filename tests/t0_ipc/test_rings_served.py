"""The hypervisor's end of rings, and a guest that writes there what it likes."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from ipc import ring
from ipc.abi import REPLY_BYTES, REQUEST_BYTES, Op
from ipc.errors import Disconnected
from ipc.limits import (
    BACK_OFF_CALLS_MIN,
    REPLY_QUEUE_MESSAGES,
    REQUEST_QUEUE_MESSAGES,
    SLOW_YIELD_NS,
    SOON_NS,
    YIELDS_MAX,
)
from ipc.mqueue import KICK
from ipc.names import Registry
from ipc.ring import RingChannel, RingPair, Rings, memory_order_suffices
from ipc.window import create_window
from tests.t0_ipc.conformance import request
from tests.t0_ipc.processes import EchoProcess

pytestmark = pytest.mark.skipif(
    not memory_order_suffices(), reason="the ring in Python needs x86-64"
)


@pytest.fixture
def pair(tmp_path: Path, cluster_name: str) -> Iterator[RingPair]:
    """The hypervisor's end alone; the test writes the guest's words."""
    made = RingPair(cluster_name, Registry(tmp_path), create_window(), os.urandom)
    yield made
    made.close()


Served = list[bytes]


@pytest.fixture
def served() -> Served:
    """Messages in the order in which they were served."""
    return []


@pytest.fixture
def rings(served: Served, monkeypatch: pytest.MonkeyPatch) -> Rings[RingPair]:
    """Answers everything with zeros; no yield of this machine's is slow."""
    monkeypatch.setattr(ring, "now_ns", itertools.count().__next__)

    def serve(pair: RingPair, message: bytes, moment_ns: int) -> int:
        served.append(message)
        assert pair.send(bytes(REPLY_BYTES))
        return moment_ns

    return Rings(serve)


def bells(name: str) -> int:
    """Messages that wait in a queue."""
    queue = posix_ipc.MessageQueue(name)
    count: int = queue.current_messages
    queue.close()
    return count


def test_a_new_ring_has_no_call_and_must_be_rung(pair: RingPair) -> None:
    """Zeros everywhere but in the hypervisor's `sleeping`."""
    assert pair.look() is None
    assert list(pair.window.call_words) == [0, 0]
    assert list(pair.window.completion_words) == [0, 1]


def test_any_change_of_the_number_is_one_call(pair: RingPair) -> None:
    """Forward, backward, by anything; `completed` repeats what was read."""
    for posted in (1, 2, 99, 2**56 - 1, 1, 0, 2**64 - 1, 2**63, 7):
        pair.window.call_words[0] = posted
        assert pair.look() is not None
        assert pair.look() is None
        assert pair.send(bytes(REPLY_BYTES))
        assert pair.window.completion_words[0] == posted


def test_a_request_is_copied_once(pair: RingPair) -> None:
    """What the guest writes after the look changes nothing that was seen."""
    pair.window.request[:] = b"a" * REQUEST_BYTES
    pair.window.call_words[0] = 1
    message = pair.look()
    pair.window.request[:] = b"b" * REQUEST_BYTES
    assert message == b"a" * REQUEST_BYTES


def test_the_hypervisor_reads_none_of_its_own_words(pair: RingPair) -> None:
    """The guest may overwrite them at any time: the next store puts the truth back."""
    pair.window.call_words[0] = 1
    assert pair.look() is not None
    pair.window.completion_words[0] = pair.window.completion_words[1] = 2**64 - 1
    pair.window.reply[:] = b"x" * REPLY_BYTES
    assert pair.look() is None
    assert pair.asleep
    assert pair.send(b"r" * REPLY_BYTES)
    assert (pair.window.completion_words[0], bytes(pair.window.reply)) == (1, b"r" * REPLY_BYTES)


def test_a_guest_that_pretends_to_sleep_fills_only_its_own_queue(pair: RingPair) -> None:
    """And its calls are answered."""
    pair.window.call_words[1] = 2**64 - 1
    for posted in range(1, 100):
        pair.window.call_words[0] = posted
        assert pair.look() is not None
        assert pair.send(bytes(REPLY_BYTES))
        assert pair.window.completion_words[0] == posted
    assert bells(pair.reply_name) == REPLY_QUEUE_MESSAGES


def test_a_bell_without_a_call_is_none(pair: RingPair) -> None:
    """It costs its sender a place in the queue."""
    queue = posix_ipc.MessageQueue(pair.request_name, read=False)
    queue.send(KICK)
    assert pair.receive() is None
    queue.send(KICK)
    assert pair.wait(10) is None
    queue.close()
    assert pair.receive() is None


def test_a_call_is_answered_where_it_was_made(pair: RingPair) -> None:
    """In the queue or in the block, though both hold one."""
    queue = posix_ipc.MessageQueue(pair.request_name, read=False)
    replies = posix_ipc.MessageQueue(pair.reply_name, write=False)
    pair.window.call_words[0] = 5
    queue.send(b"q" * REQUEST_BYTES)
    for receive in (pair.receive, lambda: pair.wait(10)):
        assert receive() == b"q" * REQUEST_BYTES
        assert pair.send(b"1" * REPLY_BYTES)
        assert replies.receive(0)[0] == b"1" * REPLY_BYTES
        assert pair.window.completion_words[0] == 0
        queue.send(b"q" * REQUEST_BYTES)
    assert pair.receive() is not None
    unread = []
    for _ in range(REPLY_QUEUE_MESSAGES + 1):
        pair.came_by_queue = True
        unread.append(pair.send(bytes(REPLY_BYTES)))
    assert unread == [True] * REPLY_QUEUE_MESSAGES + [False]
    assert pair.receive() is not None
    assert pair.send(b"2" * REPLY_BYTES)
    assert (pair.window.completion_words[0], bytes(pair.window.reply)) == (5, b"2" * REPLY_BYTES)
    queue.close()
    replies.close()


def test_a_guest_is_watched_only_while_it_calls(
    pair: RingPair, rings: Rings[RingPair], served: Served
) -> None:
    """After as many fruitless rounds as a side may yield, it must ring again."""
    rings.watch(pair, pair, 0)
    rings.watch(pair, pair, 0)
    assert len(rings.watched) == 1
    assert pair.window.completion_words[1] == 0
    for posted in (1, 2, 3):
        pair.window.call_words[0] = posted
        rings.spin(YIELDS_MAX)
        assert len(served) == posted
        assert rings.watched
    rings.spin(1 << 60)
    assert not rings.watched
    assert pair.window.completion_words[1] == 1


def test_a_guest_that_only_plays_with_its_words_is_not_watched_for_long(
    pair: RingPair, rings: Rings[RingPair], served: Served
) -> None:
    """`sleeping` on both sides, the request, the reply: none of it is a call."""
    rings.watch(pair, pair, 0)
    choose = random.Random(1)
    for _ in range(YIELDS_MAX + 1):
        pair.window.call_words[1] = choose.randrange(2**64)
        pair.window.completion_words[0] = choose.randrange(2**64)
        pair.window.completion_words[1] = choose.randrange(2**64)
        pair.window.request[:] = choose.randbytes(REQUEST_BYTES)
        rings.spin(1)
    assert not rings.watched
    assert served == []


def test_a_round_takes_one_call_of_each(
    tmp_path: Path, cluster_name: str, rings: Rings[RingPair], served: Served
) -> None:
    """A guest that posts all the time is served as often as one that posts once a round."""
    pairs = [
        RingPair(cluster_name, Registry(tmp_path), create_window(), os.urandom) for _ in range(3)
    ]
    for number, pair in enumerate(pairs):
        pair.window.request[:] = bytes([number]) * REQUEST_BYTES
        rings.watch(pair, pair, 0)
    for posted in range(1, 11):
        for pair in pairs:
            pair.window.call_words[0] = posted
        rings.spin(1)
    assert [message[0] for message in served] == [0, 1, 2] * 10
    for pair in pairs:
        rings.forget(pair)
        pair.close()
    assert not rings.watched


def test_a_call_that_comes_while_the_hypervisor_lies_down_is_served(
    pair: RingPair, rings: Rings[RingPair], served: Served
) -> None:
    """It was posted before the guest could see that it must ring."""
    rings.watch(pair, pair, 0)
    pair.window.call_words[0] = 1
    rings.rest()
    assert len(served) == 1
    assert not rings.watched


@pytest.mark.parametrize("resting", [False, True])
def test_a_guest_that_lies_down_after_the_look_is_woken(
    pair: RingPair, rings: Rings[RingPair], monkeypatch: pytest.MonkeyPatch, resting: bool
) -> None:
    """The first look after an answer has no fence; the next one, or the one before resting, has."""

    def lie_down() -> None:
        pair.window.call_words[1] = 1

    monkeypatch.setattr(ring, "_yield", lie_down)
    rings.watch(pair, pair, 0)
    pair.window.call_words[0] = 1
    rings.spin(1)
    assert bells(pair.reply_name) == 0
    if resting:
        rings.rest()
    else:
        rings.spin(5)
    assert bells(pair.reply_name) == 1


def test_an_answer_to_a_guest_that_rings_is_behind_a_fence(
    pair: RingPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would look again."""
    pair.window.call_words[0] = 1
    assert pair.asleep
    assert pair.look() is not None
    looks: list[int] = []

    def acquire(_blocking: bool) -> bool:
        looks.append(pair.window.completion_words[0])
        return True

    def release() -> None:
        pair.window.call_words[1] = 1

    monkeypatch.setattr(pair, "_acquire", acquire)
    monkeypatch.setattr(pair, "_release", release)
    assert pair.send(bytes(REPLY_BYTES))
    assert looks == [1]
    assert bells(pair.reply_name) == 1


def test_idlers_must_ring_again(pair: RingPair, rings: Rings[RingPair], served: Served) -> None:
    """Between two calls of `part_with_idlers` a guest calls, or it is watched no longer."""
    rings.watch(pair, pair, 0)
    rings.part_with_idlers()
    assert rings.watched
    pair.window.call_words[0] = 1
    rings.spin(1)
    rings.part_with_idlers()
    assert rings.watched
    rings.part_with_idlers()
    assert not rings.watched
    assert pair.asleep
    rings.watch(pair, pair, 0)
    rings.part_with_idlers()
    pair.window.call_words[0] = 2
    pair.mark = pair.seen
    rings.part_with_idlers()
    assert len(served) == 2


def test_a_slow_yield_ends_the_watch(
    pair: RingPair,
    rings: Rings[RingPair],
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is told; the call that came during it is served first."""
    clock = iter(range(0, 1 << 60, SLOW_YIELD_NS + 1))
    monkeypatch.setattr(ring, "now_ns", lambda: next(clock))
    rings.watch(pair, pair, 0)
    assert not served
    pair.window.call_words[0] = 1
    rings.spin(5)
    assert len(served) == 1
    assert not rings.watched
    for _ in range(BACK_OFF_CALLS_MIN):
        rings.watch(pair, pair, 0)
        assert not rings.watched
        assert pair.asleep
    rings.watch(pair, pair, 0)
    assert rings.watched


def test_who_was_looked_for_in_vain_is_looked_for_half_as_long(
    pair: RingPair,
    rings: Rings[RingPair],
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the end not at all, until a guest rings so soon that looking would have found it."""
    moments, yields = itertools.count(), itertools.count()
    monkeypatch.setattr(ring, "now_ns", moments.__next__)
    monkeypatch.setattr(ring, "_yield", yields.__next__)
    rounds = []
    while True:
        rings.watch(pair, pair, 1 << 60)
        if not rings.watched:
            break
        before = next(yields)
        rings.spin(1 << 60)
        rounds.append(next(yields) - before - 1)
    assert rounds == [50, 25, 12, 6, 3, 1]
    assert pair.asleep
    rings.watch(pair, pair, next(moments) + SOON_NS)
    assert not rings.watched
    rings.watch(pair, pair, next(moments) + SOON_NS // 2)
    assert rings.watched
    pair.window.call_words[0] = 1
    rings.spin(1 << 60)
    assert len(served) == 1
    assert not rings.watched


def test_a_closed_ring_is_disconnected_at_once(tmp_path: Path, cluster_name: str) -> None:
    """A view of a closed window must not be mistaken for a message of a wrong length."""
    server = EchoProcess(tmp_path, cluster_name)
    try:
        with server.opened(ring=True) as channel:
            channel.close()
            for message in (request(1, Op.FLUSH_PAGE), b"short", bytes(100)):
                with pytest.raises(Disconnected):
                    channel.call(message)
    finally:
        server.close()


def test_a_queue_of_a_ring_is_as_large_as_any(pair: RingPair) -> None:
    """So the same limits hold for either transport."""
    queue = posix_ipc.MessageQueue(pair.request_name)
    assert (queue.max_messages, queue.max_message_size) == (REQUEST_QUEUE_MESSAGES, REQUEST_BYTES)
    queue.close()


def test_a_hypervisor_that_lies_down_after_the_look_is_rung_for(
    pair: RingPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest's first look has no fence; before it sleeps it looks again."""
    ours, theirs = socket.socketpair()
    requests = posix_ipc.MessageQueue(pair.request_name)
    replies = posix_ipc.MessageQueue(pair.reply_name)
    channel = RingChannel(requests, replies, pair.window, ours, 1, False)
    pair.wake()
    monkeypatch.setattr(ring, "_YIELDS", range(1))
    monkeypatch.setattr(ring, "_yield", pair.sleep)
    rung: list[int] = []

    def sleep(_seconds: float) -> tuple[bytes, int]:
        rung.append(requests.current_messages)
        assert pair.receive() is not None
        assert pair.send(b"r" * REPLY_BYTES)
        return KICK, 0

    monkeypatch.setattr(channel, "_receive", sleep)
    assert channel.call(request(1, Op.FLUSH_PAGE)) == b"r" * REPLY_BYTES
    assert rung == [1]
    requests.close()
    replies.close()
    ours.close()
    theirs.close()
