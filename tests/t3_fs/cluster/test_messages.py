"""Membership messages: every one goes through the wire unchanged, and nothing else gets in."""

from __future__ import annotations

import random

import pytest

from fs.cluster.config import Timing
from fs.cluster.messages import MAX_MESSAGE_BYTES, Kind, Message, decode, encode
from fs.cluster.view import MAX_EPOCH, Ballot, make_view
from tests.support.messages import membership_message_is_taken

VIEW = make_view(7, {0: 5, 3: (1 << 64) - 1, 254: 1}, frozenset({1}), frozenset({2}))
BALLOT = Ballot(7, 3, 254)
MESSAGES = [
    Message(Kind.JOIN, 1, timing=Timing.fast()),
    Message(Kind.REFUSE, 2, text="node b can't join: ä"),
    Message(Kind.PREPARE, 3, ballot=BALLOT, bootstrap=True),
    Message(Kind.PROMISE, 4, ballot=BALLOT),
    Message(Kind.PROMISE, 5, ballot=BALLOT, accepted=(Ballot(7, 2, 0), VIEW)),
    Message(Kind.ACCEPT, 6, ballot=BALLOT, view=VIEW),
    Message(Kind.ACCEPTED, 7, ballot=BALLOT),
    Message(Kind.NACK, 8, ballot=BALLOT, epoch=6),
    Message(Kind.VIEW, 9, view=VIEW),
    Message(Kind.INSTALLED, 10, epoch=7),
    Message(Kind.LEAVE, 11),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind.name)
def test_round_trip(message: Message) -> None:
    """Nothing is lost."""
    assert decode(encode(message)) == message


def test_the_largest_message_fits_its_bound() -> None:
    """255 members in a promise."""
    view = make_view(1, dict.fromkeys(range(255), 1))
    data = encode(Message(Kind.PROMISE, 1, ballot=BALLOT, accepted=(BALLOT, view)))
    assert len(data) == MAX_MESSAGE_BYTES
    with pytest.raises(ValueError, match="a message of"):
        decode(data + b"\0")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind.name)
def test_cut_and_longer_messages_are_refused(message: Message) -> None:
    """Every length but the right one; a text may be of any length."""
    data = encode(message)
    if message.kind is Kind.REFUSE:
        data = data[:12]
        cuts = range(len(data))
    else:
        cuts = range(len(data))
        with pytest.raises(ValueError, match="behind"):
            decode(data + b"\0")
    for cut in cuts:
        with pytest.raises(ValueError, match=r"ends after|timings of"):
            decode(data[:cut])


@pytest.mark.parametrize("seed", range(4))
def test_damaged_messages_are_refused_or_well_formed(seed: int) -> None:
    """Never another exception; what is accepted can be said again."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    accepted = 0
    for _ in range(2000):
        data = bytearray(encode(rng.choice(MESSAGES)))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        accepted += membership_message_is_taken(bytes(data))
    assert 0 < accepted < 2000


@pytest.mark.parametrize(
    "members",
    [[], [(3, 1), (3, 1)], [(4, 1), (3, 1)], [(255, 1)], [(3, 0)], [(1, 1)], [(2, 1)]],
)
def test_impossible_views_are_refused(members: list[tuple[int, int]]) -> None:
    """No members, doubled, unordered, no such node, no generation, dead or gone and a member."""
    body = b"".join(
        node.to_bytes(1, "little") + made.to_bytes(8, "little") for node, made in members
    )
    maps = encode(Message(Kind.VIEW, 1, view=VIEW))[-64:]
    head = encode(Message(Kind.LEAVE, 1))[:3] + bytes([Kind.VIEW]) + (1).to_bytes(8, "little")
    data = head + (7).to_bytes(8, "little") + bytes([len(members)]) + body + maps
    with pytest.raises(ValueError, match=r"view|member|node"):
        decode(data)


def test_the_last_epoch_and_none_behind_it() -> None:
    """A node that believed in a later one could not say what comes next."""
    for epoch in (MAX_EPOCH, MAX_EPOCH + 1, (1 << 64) - 1):
        ballot = Ballot(epoch, 1, 0)
        for message in (
            Message(Kind.PREPARE, 1, ballot=ballot),
            Message(Kind.VIEW, 1, view=make_view(epoch, {0: 1})),
            Message(Kind.NACK, 1, ballot=BALLOT, epoch=epoch),
            Message(Kind.INSTALLED, 1, epoch=epoch),
        ):
            data = encode(message)
            if epoch == MAX_EPOCH:
                assert decode(data) == message
            else:
                with pytest.raises(ValueError, match="epoch"):
                    decode(data)
