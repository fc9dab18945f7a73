"""Frames of the control socket, whole and broken."""

from __future__ import annotations

import socket
import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.codec import (
    DEPTH_MAX,
    BadRecord,
    Record,
    decode,
    encode,
    receive_record,
    send_record,
    split_frame,
)
from ipc.limits import CONTROL_MESSAGE_BYTES_MAX

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
records = st.dictionaries(st.text(), values, max_size=5)


@given(records)
def test_a_record_round_trips_through_a_socket(record: Record) -> None:
    """Maps with string keys, nested, with bytes and text told apart."""
    here, there = socket.socketpair()
    with here, there:
        send_record(here, record)
        assert record == receive_record(there)


@given(records, st.data())
def test_a_frame_that_is_cut_short_is_no_frame_yet(record: Record, data: st.DataObject) -> None:
    """A reader waits for the rest, and takes what follows a frame as the next one."""
    frame = encode(record)
    cut = data.draw(st.integers(0, len(frame) - 1))

    assert split_frame(frame[:cut]) is None
    assert split_frame(frame + frame[:cut]) == (frame[4:], frame[:cut])


@given(st.binary(max_size=64))
def test_any_bytes_are_a_record_or_a_bad_record(body: bytes) -> None:
    """Nothing else is raised, whatever msgpack makes of it."""
    try:
        record = decode(body)
    except BadRecord:
        return
    assert all(isinstance(key, str) for key in record)


@pytest.mark.parametrize("value", [1, "text", [1, 2], None])
def test_what_is_not_a_map_is_no_record(value: object) -> None:
    """A record is a map, even if msgpack can carry more."""
    with pytest.raises(BadRecord, match="not a map"):
        decode(msgpack.packb(value))


def test_a_frame_that_claims_too_much_is_refused_before_it_is_read() -> None:
    """Nobody collects four gigabytes on a peer's word."""
    with pytest.raises(BadRecord, match="a frame of"):
        split_frame(struct.pack("<I", CONTROL_MESSAGE_BYTES_MAX + 1))
    assert split_frame(struct.pack("<I", CONTROL_MESSAGE_BYTES_MAX)) is None


def test_a_stream_that_ends_inside_a_frame_is_told_from_one_that_ends() -> None:
    """None is the end; half a frame is a bad record."""
    for sent, bad in ((b"", False), (encode({"a": 1})[:-1], True)):
        here, there = socket.socketpair()
        with there:
            here.sendall(sent)
            here.close()
            if bad:
                with pytest.raises(BadRecord, match="cut short"):
                    receive_record(there)
            else:
                assert receive_record(there) is None


def test_a_key_of_bytes_is_no_key() -> None:
    """It would go through msgpack."""
    with pytest.raises(BadRecord, match="no text"):
        decode(msgpack.packb({b"verb": "stop"}))


@pytest.mark.parametrize(("levels", "refused"), [(DEPTH_MAX - 1, False), (DEPTH_MAX, True)])
@pytest.mark.parametrize("shape", ["lists", "maps"])
def test_a_record_that_nests_too_deep_is_refused(levels: int, refused: bool, shape: str) -> None:
    """Who answers that there is no such verb has to write it down; at a thousand levels Python
    gives up, and with it a hypervisor or a guest would have."""
    verb: object = None
    for _ in range(levels):
        verb = [verb] if shape == "lists" else {"": verb}
    body = msgpack.packb({"verb": verb})
    if refused:
        with pytest.raises(BadRecord, match="levels"):
            decode(body)
    else:
        assert decode(body)["verb"] == verb
