"""Arbitrary bytes for one end of a mesh connection.

The first byte chooses what happens:

* a stranger's bytes, cut into pieces as the bytes say, for a node that listens or has connected:
  frames are taken and refused within bounds, and nobody gets a session without the key;
* a real handshake, one of whose three messages is changed: exactly the unchanged ones end in a
  session at both ends;
* a real session, whose frames are changed, moved or repeated: what is opened is a beginning of what
  was sealed.
"""

from __future__ import annotations

from typing import Final

from ipc.mesh.frames import (
    HANDSHAKE_BODY_MAX,
    HEADER,
    SEALED_BODY_MAX,
    BadFrame,
    Frame,
    FrameBuffer,
    Kind,
    Seal,
)
from ipc.mesh.handshake import Handshake, Identity, Refused, decode_refusal

_KEY: Final = b"the key that fuzzing never finds"
_NODES: Final = (0, 1, 2)


def _ends() -> tuple[Handshake, Handshake]:
    return (
        Handshake(Identity(1, "fuzz", b"time", b"1" * 16), _KEY, b"c" * 32, _NODES, peer=0),
        Handshake(Identity(0, "fuzz", b"time", b"0" * 16), _KEY, b"l" * 32, _NODES),
    )


def _frame(data: bytes) -> Frame | None:
    buffer = FrameBuffer()
    buffer.feed(data)
    return buffer.take(HANDSHAKE_BODY_MAX)


def _changed(message: bytes, change: bytes) -> bytes:
    """The message with bytes replaced: pairs of a position and what is added to that byte."""
    changed = bytearray(message)
    for place, value in zip(change[::2], change[1::2], strict=False):
        at = place % len(changed)
        changed[at] = (changed[at] + value) % 256
    return bytes(changed)


def _stranger(data: bytes, end: Handshake) -> None:
    if end.connecting:
        end.hello()
    buffer = FrameBuffer()
    piece = 1 + (data[0] if data else 0) % 97
    for start in range(1, len(data), piece):
        buffer.feed(data[start : start + piece])
        while (frame := buffer.take(HANDSHAKE_BODY_MAX)) is not None:
            reply = end.receive(frame)
            assert len(reply) <= HEADER.size + HANDSHAKE_BODY_MAX
            assert end.session is None, "a session without the key"
        assert len(buffer) <= HEADER.size + HANDSHAKE_BODY_MAX


def _handshake(data: bytes) -> None:
    which, change = (data[0] % 3 if data else 0), data[1:]
    connecter, listener = _ends()
    message = connecter.hello()
    intact = True
    for turn, end in enumerate((listener, connecter, listener)):
        if turn == which:
            changed = _changed(message, change)
            intact = changed == message
            message = changed
        try:
            frame = _frame(message)
            if frame is None:
                assert not intact
                return
            message = end.receive(frame)
        except (BadFrame, Refused):
            assert not intact, "a whole handshake was refused"
            return
    assert intact, "a changed handshake went through"
    assert connecter.session is not None
    assert listener.session is not None


def _session(data: bytes) -> None:
    sealing, opening = Seal(_KEY), Seal(_KEY)
    payloads = [data[start : start + 5] for start in range(0, min(len(data), 60), 5)]
    frames = [sealing.close(Kind.DATA, payload) for payload in payloads]
    stream = bytearray()
    for number, frame in enumerate(frames):
        control = data[-1 - number]
        # Most frames go through as they are, or nothing would ever come far.
        match control % 16:
            case 0:
                stream += _changed(frame, data[number : number + 2])
            case 1:
                stream += frames[control % len(frames)]
            case 2:
                pass
            case _:
                stream += frame
    buffer = FrameBuffer()
    buffer.feed(bytes(stream))
    opened: list[bytes] = []
    try:
        while (taken := buffer.take(SEALED_BODY_MAX)) is not None:
            opened.append(opening.open(taken))
    finally:
        assert opened == payloads[: len(opened)], "a payload that was never sealed here"


def fuzz_mesh(data: bytes) -> None:
    """Whatever the bytes are, only what is declared is raised."""
    kind, rest = data[:1], data[1:]
    try:
        match kind[0] % 5 if kind else 0:
            case 0:
                _stranger(rest, _ends()[1])
            case 1:
                _stranger(rest, _ends()[0])
            case 2:
                text = decode_refusal(rest)
                assert text.isprintable()
                assert len(text) <= 200
            case 3:
                _handshake(rest)
            case _:
                _session(rest)
    except (BadFrame, Refused):
        pass
