"""Messages as bytes: what was said comes out again, and any bytes do no harm."""

from __future__ import annotations

import random

import pytest

from fs.dlm.codec import decode, encode, encode_frame
from fs.dlm.messages import (
    Bast,
    Cancel,
    Claim,
    Death,
    Deny,
    Done,
    Down,
    Flag,
    Grant,
    Grave,
    Lift,
    Lifted,
    Member,
    Message,
    MessageError,
    Reason,
    Record,
    Release,
    Request,
)
from fs.dlm.modes import Mode
from tests.support.messages import lock_frame_is_taken
from tests.t3_fs.dlm.cluster import Cluster

NAME = b"M0000000000000000000018feb14715"
VALUE = bytes(range(64))
MESSAGES: list[Message] = [
    Request(NAME, 7, Mode.EX, Flag.NOQUEUE | Flag.RECOVERING),
    Cancel(NAME, 8),
    Down(NAME, Mode.PR, gone=False, value=VALUE),
    Down(NAME, Mode.NL, gone=True, value=None),
    Grant(NAME, 9, Mode.PR, 1 << 40, VALUE),
    Deny(NAME, 10, Reason.DEADLOCK),
    Bast(NAME, Mode.NL),
    Record(NAME, 5, 4, 3, VALUE, frozenset({Death(1, 2), Death(2, 2)})),
    Record(NAME, 5, 5, None, None, frozenset()),
    Claim(NAME, None, Mode.PR, 3, Flag(0), 0, None),
    Claim(NAME, Mode.EX, None, 3, Flag(0), 77, VALUE),
    Done(0, False, 0, (), frozenset(), frozenset(), frozenset()),
    Done(
        4,
        True,
        1 << 34,
        (Member(0, 1), Member(5, 4)),
        frozenset({Death(2, 4)}),
        frozenset({Death(3, 2)}),
        frozenset({Grave(frozenset({2}), frozenset({0, 2}), frozenset({Death(2, 4)}))}),
    ),
    Release(Death(6, 9)),
    Lift(NAME, 1 << 33),
    Lifted(NAME, (1 << 33) + 5),
]


def frame_of(message: Message, epoch: int = 1, sequence: int = 1) -> bytes:
    """The bytes of a frame with this message."""
    return encode_frame(epoch, sequence, 0, *encode(message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_was_said_comes_out_again(message: Message) -> None:
    """Each kind, with and without its optional parts."""
    frame = decode(frame_of(message, 3, 4))
    assert frame == (3, 4, 0, message)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_cut_short_is_refused_or_has_a_shorter_name(message: Message) -> None:
    """At every length."""
    whole = frame_of(message)
    for length in range(len(whole)):
        try:
            frame = decode(whole[:length])
        except MessageError:
            continue
        assert frame.message is not None
        assert NAME.startswith(getattr(frame.message, "name", b"?"))


@pytest.mark.parametrize(
    "untrusted",
    [
        b"",
        b"LM",
        bytes(4096),
        frame_of(MESSAGES[0])[:2] + b"\x01" + frame_of(MESSAGES[0])[3:],
        encode_frame(1, 0, 0, *encode(MESSAGES[0])),
        frame_of(Grant(NAME, 1, Mode.EX, (1 << 64) - 1, None)),
        frame_of(Lift(NAME, (1 << 64) - 1)),
        frame_of(Lifted(NAME, (1 << 64) - 1)),
        frame_of(Bast(b"n" * 65, Mode.NL)),
        frame_of(MESSAGES[11]) + b"x",
        frame_of(Request(NAME, 1, Mode.EX)) + bytes(70_000),
    ],
)
def test_no_message(untrusted: bytes) -> None:
    """Refused by name, not by crash."""
    with pytest.raises(MessageError):
        decode(untrusted)


def test_any_bytes_and_any_lies_leave_a_manager_alive() -> None:
    """Bytes at random, real messages with flipped bytes, and true messages at the wrong time."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cluster = Cluster(3)
    victim = cluster.nodes[0].manager
    cluster.nodes[0].lock(NAME, Mode.PR)
    cluster.settle()
    expected = {1: 1, 2: 1}
    for _ in range(4000):
        sender = chance.choice((1, 2, 2, 9))
        data = bytearray(frame_of(chance.choice(MESSAGES), 1, 1 + chance.randrange(600)))
        if chance.random() < 0.5:
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.1:
            data = bytearray(chance.randbytes(chance.randrange(200)))
        lock_frame_is_taken(bytes(data))
        victim.deliver(sender, bytes(data))
    assert victim.links.malformed > 100
    assert expected  # the links went on
    for node in (1, 2):
        for sequence in range(1, 600):
            victim.deliver(node, frame_of(chance.choice(MESSAGES), 1, sequence))
    victim.set_view(2, frozenset({0}))
    assert victim.ready
    name = b"another"
    victim.lock(name, Mode.EX)
    assert victim.mode(name) == Mode.EX
