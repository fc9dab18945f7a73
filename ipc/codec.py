"""msgpack, for the control socket and for streams; guests' hypercalls never come near it.

Records are maps with string keys, and nest at most `DEPTH_MAX` deep: what is asked is named in
answers and logs, and Python can't write down what nests a thousand deep.  A frame on a stream
socket is a 4-byte little-endian length and that many bytes of msgpack, at most
`CONTROL_MESSAGE_BYTES_MAX`.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, cast

import msgpack

from ipc.limits import CONTROL_MESSAGE_BYTES_MAX

Record = dict[str, Any]

DEPTH_MAX = 32

_LENGTH = struct.Struct("<I")


class BadRecord(Exception):
    """The bytes are no record: too long, cut short, or not msgpack."""


def encode(record: Record) -> bytes:
    """A record as a frame."""
    body = cast("bytes", msgpack.packb(record))
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Record:
    """The record in a frame's body; raises BadRecord."""
    try:
        record = msgpack.unpackb(body, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadRecord(str(error)) from None
    if not isinstance(record, dict):
        raise BadRecord("not a map")
    if not all(isinstance(key, str) for key in record):
        raise BadRecord("a key that is no text")
    _check_depth(record)
    return record


def _check_depth(record: Record) -> None:
    level: list[Any] = [record]
    for _ in range(DEPTH_MAX):
        deeper: list[Any] = []
        for value in level:
            inside = value.values() if isinstance(value, dict) else value
            deeper += [one for one in inside if isinstance(one, dict | list)]
        if not deeper:
            return
        level = deeper
    raise BadRecord(f"more than {DEPTH_MAX} levels")


def frame_length(buffer: bytes) -> int | None:
    """Length of the body of the frame that starts `buffer`, None if that is not known yet."""
    if len(buffer) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    if length > CONTROL_MESSAGE_BYTES_MAX:
        raise BadRecord(f"a frame of {length} bytes")
    return int(length)


def split_frame(buffer: bytes) -> tuple[bytes, bytes] | None:
    """(body, rest) if `buffer` starts with a whole frame; raises BadRecord if it is too long."""
    length = frame_length(buffer)
    if length is None or len(buffer) < _LENGTH.size + length:
        return None
    return buffer[_LENGTH.size : _LENGTH.size + length], buffer[_LENGTH.size + length :]


def send_record(connection: socket.socket, record: Record) -> None:
    """Send one record whole, on a blocking socket."""
    connection.sendall(encode(record))


def receive_record(connection: socket.socket, seconds: float | None = None) -> Record | None:
    """The next record of a blocking socket; None at the end of the stream.

    With `seconds` it is there after that time or TimeoutError is raised: the time-out of the socket
    alone starts again with each byte.
    """
    until = None if seconds is None else time.monotonic() + seconds
    buffer = b""
    while (frame := split_frame(buffer)) is None:
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
        chunk = connection.recv(65536)
        if not chunk:
            if buffer:
                raise BadRecord("cut short")
            return None
        buffer += chunk
    return decode(frame[0])
