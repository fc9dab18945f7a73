"""What every transport must do, as tests; a transport's test module inherits them.

The other end runs `serve`, which is no tmem: it reports what it received and fills the window with
what it was asked for, so a lost, doubled or mixed-up byte shows.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from ipc.abi import (
    BATCH_ENTRY,
    EXTENT_PAGES_MAX,
    PAGE_BYTES,
    REPLY,
    REQUEST,
    REQUEST_BYTES,
    Op,
    Reply,
    ReplyFlag,
    Status,
    oid_from_int,
)
from ipc.channel import Channel
from ipc.errors import Disconnected
from ipc.limits import WINDOW_SLOTS
from ipc.window import Window
from ipc.wire import decode_reply

GENERATION = 7
SLEEP_SECONDS = 0.3
"""How long `serve` takes over a VERSION call."""


def pattern(seed: int) -> bytes:
    """A page that no other seed makes."""
    return random.Random(seed).randbytes(PAGE_BYTES)


def serve(message: bytes, window: Window) -> bytes:
    """The other end: PUT_PAGE answers the checksum of its slots, GET_PAGE fills them by `index`,
    PUT_BATCH answers the checksum of the table, VERSION takes a while, the rest only echoes."""
    sequence = int.from_bytes(message[:4], "little")
    if len(message) != REQUEST_BYTES:
        fault = ReplyFlag.FAULT
        return REPLY.pack(sequence, Status.EINVAL, 0, fault, GENERATION, 0, len(message))
    _, op, _, count, _, index, _, slot, token, _ = REQUEST.unpack(message)
    value = token
    if op == Op.PUT_PAGE:
        value = zlib.crc32(window.slot(slot, count))
    elif op == Op.PUT_BATCH:
        value = zlib.crc32(window.read_table(count))
    elif op == Op.GET_PAGE:
        for at in range(count):
            window.slot(slot + at)[:] = pattern(index + at)
    elif op == Op.VERSION:
        time.sleep(SLEEP_SECONDS)
    return REPLY.pack(sequence, Status.DONE, 0, 0, GENERATION, (1 << count) - 1, value)


def request(
    sequence: int, op: Op, *, count: int = 0, index: int = 0, slot: int = 0, token: int = 0
) -> bytes:
    """A request of this suite."""
    return REQUEST.pack(sequence, op, 0, count, 0, index, oid_from_int(1), slot, token, 0)


def ask(channel: Channel, message: bytes) -> Reply:
    """One call."""
    return decode_reply(channel.call(message))


Opener = Callable[[], AbstractContextManager[Channel]]


class TransportConformance:
    """Inherit, and add a fixture `open_channel` (an `Opener`) that makes channels whose other end
    runs `serve` and closes them on leaving."""

    @pytest.fixture
    def channel(self, open_channel: Opener) -> Iterator[Channel]:
        """One channel."""
        with open_channel() as channel:
            yield channel

    def test_every_request_gets_its_own_reply(self, channel: Channel) -> None:
        """Sequence and a value that only this request had, over the wrap of the sequence too."""
        for sequence in [*range(200), 2**32 - 1, 0, 1]:
            reply = ask(channel, request(sequence, Op.FLUSH_PAGE, token=sequence * 77))
            assert (sequence, sequence * 77) == (reply.sequence, reply.value)

    def test_replies_are_whole(self, channel: Channel) -> None:
        """Each field arrives, the widest values included."""
        reply = ask(channel, request(5, Op.FLUSH_PAGE, count=EXTENT_PAGES_MAX, token=2**64 - 1))
        assert Reply(5, Status.DONE, 0, 0, GENERATION, 2**64 - 1, 2**64 - 1) == reply

    @pytest.mark.parametrize("count", [1, 2, 63, 64])
    def test_the_other_end_sees_the_pages_that_the_guest_wrote(
        self, channel: Channel, count: int
    ) -> None:
        """All slots, and only the ones that were named."""
        slot = WINDOW_SLOTS - count
        pages = b"".join(pattern(at) for at in range(count))
        channel.window.slot(0, WINDOW_SLOTS)[:] = b"x" * (WINDOW_SLOTS * PAGE_BYTES)
        channel.window.slot(slot, count)[:] = pages

        reply = ask(channel, request(1, Op.PUT_PAGE, count=count, slot=slot))

        assert zlib.crc32(pages) == reply.value

    @pytest.mark.parametrize("count", [1, 2, 63, 64])
    def test_the_guest_sees_the_pages_that_the_other_end_wrote(
        self, channel: Channel, count: int
    ) -> None:
        """In the slots that were named; the others are as they were."""
        slot = WINDOW_SLOTS - count
        channel.window.slot(0, WINDOW_SLOTS)[:] = b"x" * (WINDOW_SLOTS * PAGE_BYTES)

        ask(channel, request(1, Op.GET_PAGE, count=count, slot=slot, index=1000))

        pages = b"".join(pattern(1000 + at) for at in range(count))
        assert bytes(channel.window.slot(slot, count)) == pages
        assert bytes(channel.window.slot(0, slot)) == b"x" * (slot * PAGE_BYTES)

    @pytest.mark.parametrize("count", [1, 64])
    def test_a_batch_table_arrives(self, channel: Channel, count: int) -> None:
        """As many entries as the call has."""
        table = [(at, at * 3, at % 64, 0, oid_from_int(at), 9) for at in range(count)]
        channel.window.write_table(table)

        reply = ask(channel, request(1, Op.PUT_BATCH, count=count))

        assert zlib.crc32(b"".join(BATCH_ENTRY.pack(*entry) for entry in table)) == reply.value

    def test_a_table_longer_than_a_batch_is_refused(self, channel: Channel) -> None:
        """The guest's own slip is found before it overwrites what lies behind."""
        entry = (0, 0, 0, 0, bytes(24), 0)
        with pytest.raises(ValueError, match="at most 64"):
            channel.window.write_table([entry] * (EXTENT_PAGES_MAX + 1))

    @pytest.mark.parametrize("length", [4, 5, 63])
    def test_a_short_message_reaches_the_other_end_as_it_is(
        self, channel: Channel, length: int
    ) -> None:
        """A transport judges nothing: the length is the parser's business."""
        reply = ask(channel, request(9, Op.VERSION)[:length])
        assert (9, length) == (reply.sequence, reply.value)

    def test_a_channel_knows_its_generation(self, channel: Channel) -> None:
        """A guest compares it to notice a restart."""
        assert channel.generation == GENERATION
        assert not channel.resumed

    def test_a_closed_channel_is_disconnected(self, channel: Channel) -> None:
        """And closing twice is no error."""
        channel.close()
        channel.close()
        with pytest.raises(Disconnected):
            channel.call(request(1, Op.VERSION))

    def test_channels_do_not_mix(self, open_channel: Opener) -> None:
        """Each has its own window and gets its own replies."""
        with open_channel() as one, open_channel() as other:
            one.window.slot(0)[:] = pattern(1)
            other.window.slot(0)[:] = pattern(2)

            answers = [ask(each, request(3, Op.PUT_PAGE, count=1)).value for each in (one, other)]

        assert [zlib.crc32(pattern(1)), zlib.crc32(pattern(2))] == answers
