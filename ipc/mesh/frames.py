"""MESH WIRE, part 1: frames.

Everything between two nodes is a frame, little endian:

    length    u32   bytes of the body
    kind      u8    HELLO 1, ANSWER 2, PROOF 3, REFUSE 4, KEEPALIVE 5, DATA 6
    reserved  3     zero
    body

KEEPALIVE and DATA are sealed, and nothing else is: the last 16 bytes of their body are

    HMAC-SHA256(session key, count u64, kind u8, payload)[:16]

Each direction has its session key (`handshake` says how it is made) and counts its sealed frames
from zero.  So a frame that was damaged, added, left out, repeated or moved breaks the connection.
What is sent is authentic but not secret.  The payload of KEEPALIVE is empty.

A length beyond what the reader allows at that moment is refused before the body is read:
`HANDSHAKE_BODY_MAX` until the key is proved, `SEALED_BODY_MAX` afterwards.
"""

from __future__ import annotations

import hmac
import struct
from enum import IntEnum
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("<IB3s")
HANDSHAKE_BODY_MAX: Final = 1024
PAYLOAD_BYTES_MAX: Final = 64 * 1024
"""The largest message.  Lock messages have some hundred bytes; a list of locks after a node's death
is sent in pieces."""
SEAL_BYTES: Final = 16
SEALED_BODY_MAX: Final = PAYLOAD_BYTES_MAX + SEAL_BYTES

_COUNT_KIND: Final = struct.Struct("<QB")
_RESERVED: Final = bytes(3)


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    ANSWER = 2
    PROOF = 3
    REFUSE = 4
    KEEPALIVE = 5
    DATA = 6


class BadFrame(Exception):
    """The bytes are no frame, or one that may not come now."""


class Frame(NamedTuple):
    """A frame as it was read; nobody has vouched for the body yet."""

    kind: Kind
    untrusted_body: bytes


def encode_frame(kind: Kind, body: bytes) -> bytes:
    """The frame's bytes."""
    return HEADER.pack(len(body), kind, _RESERVED) + body


class FrameBuffer:
    """Bytes of a stream, and the frames in them."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes)

    def feed(self, untrusted_chunk: bytes) -> None:
        """Append what was received."""
        self._bytes += untrusted_chunk

    def take(self, body_max: int) -> Frame | None:
        """The next frame, None if it is not all here yet; raises BadFrame."""
        if len(self._bytes) < HEADER.size:
            return None
        length, number, reserved = HEADER.unpack_from(self._bytes)
        try:
            kind = Kind(number)
        except ValueError:
            raise BadFrame(f"no frame has kind {number}") from None
        if reserved != _RESERVED:
            raise BadFrame("reserved bytes of a frame are set")
        if length > body_max:
            raise BadFrame(f"a {kind.name} frame of {length} bytes, at most {body_max} may come")
        end = HEADER.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[HEADER.size : end])
        del self._bytes[:end]
        return Frame(kind, body)


class Seal:
    """One direction of a session: seals what is sent, or checks what is received."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._count = 0

    def _tag(self, kind: Kind, payload: bytes) -> bytes:
        message = _COUNT_KIND.pack(self._count, kind) + payload
        self._count += 1
        return hmac.digest(self._key, message, "sha256")[:SEAL_BYTES]

    def close(self, kind: Kind, payload: bytes) -> bytes:
        """The sealed frame's bytes."""
        return encode_frame(kind, payload + self._tag(kind, payload))

    def open(self, frame: Frame) -> bytes:
        """The payload; raises BadFrame if the seal is not the next one of this session."""
        if frame.kind not in (Kind.KEEPALIVE, Kind.DATA):
            raise BadFrame(f"a {frame.kind.name} frame inside a session")
        body = frame.untrusted_body
        payload, tag = body[:-SEAL_BYTES], body[-SEAL_BYTES:]
        if not hmac.compare_digest(tag, self._tag(frame.kind, payload)):
            raise BadFrame(f"the seal of a {frame.kind.name} frame is broken")
        if frame.kind is Kind.KEEPALIVE and payload:
            raise BadFrame("a KEEPALIVE frame with a payload")
        return payload
