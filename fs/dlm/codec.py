"""The lock manager's messages as bytes: frames of a fixed header and one message.

    frame   "LM" version:u8 kind:u8 epoch:u64 sequence:u64 acknowledged:u64 body
    body    fixed fields, then lists with a count before them, then the name as the last field

All little endian. An acknowledgement alone is a frame of kind `ACK` with sequence 0. Every frame
names the epoch (the number of the view) it belongs to; `links` says what becomes of others.

`decode` takes any bytes: what is not exactly one message of this version raises `MessageError`.
No field makes it do more work than the frame is long.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from fs.dlm.messages import (
    FRAME_BYTES_MAX,
    NAME_BYTES_MAX,
    NODE_MAX,
    TOKEN_MAX,
    VALUE_BYTES,
    Bast,
    Cancel,
    Claim,
    Death,
    Deny,
    Done,
    Down,
    Flag,
    Frame,
    Grant,
    Grave,
    Kind,
    Lift,
    Lifted,
    Member,
    Message,
    MessageError,
    Reason,
    Record,
    Release,
    Request,
    Value,
)
from fs.dlm.modes import Mode

MAGIC = b"LM"
VERSION = 2
NO_NODE = 255
NO_MODE = 255
LIST_MAX = 4096
"""Entries of one list in a `Done`; the lists hold dead nodes and grow with nothing else."""

_HEADER = struct.Struct("<2sBBQQQ")
_REQUEST = struct.Struct("<IBB")
_CANCEL = struct.Struct("<I")
_DOWN = struct.Struct("<BB")
_GRANT = struct.Struct("<IBQ")
_DENY = struct.Struct("<IB")
_BAST = struct.Struct("<B")
_RECORD = struct.Struct("<QQB")
_CLAIM = struct.Struct("<BBIBQ")
_DONE = struct.Struct("<QBQ")
_PAIR = struct.Struct("<BQ")
_COUNT = struct.Struct("<H")
_TOKEN = struct.Struct("<Q")


def encode_frame(epoch: int, sequence: int, acknowledged: int, kind: Kind, body: bytes) -> bytes:
    """The bytes of a frame."""
    return _HEADER.pack(MAGIC, VERSION, kind, epoch, sequence, acknowledged) + body


def encode(message: Message) -> tuple[Kind, bytes]:
    """The body of a message and its kind."""
    match message:
        case Request(name, request, mode, flags):
            return Kind.REQUEST, _REQUEST.pack(request, mode, flags) + name
        case Cancel(name, request):
            return Kind.CANCEL, _CANCEL.pack(request) + name
        case Down(name, mode, gone, value):
            return Kind.DOWN, _DOWN.pack(mode, gone) + _value(value) + name
        case Grant(name, request, mode, token, value):
            return Kind.GRANT, _GRANT.pack(request, mode, token) + _value(value) + name
        case Deny(name, request, reason):
            return Kind.DENY, _DENY.pack(request, reason) + name
        case Bast(name, mode):
            return Kind.BAST, _BAST.pack(mode) + name
        case Record(name, token, stamp, exclusive, value, deaths):
            node = NO_NODE if exclusive is None else exclusive
            fixed = _RECORD.pack(token, stamp, node) + _value(value)
            return Kind.RECORD, fixed + _pairs(sorted(deaths)) + name
        case Claim(name, granted, wanted, request, flags, token, value):
            modes = (NO_MODE if mode is None else mode for mode in (granted, wanted))
            fixed = _CLAIM.pack(*modes, request, flags, token) + _value(value)
            return Kind.CLAIM, fixed + name
        case Done():
            return Kind.DONE, _encode_done(message)
        case Release(death):
            return Kind.RELEASE, _PAIR.pack(*death)
        case Lift(name, token):
            return Kind.LIFT, _TOKEN.pack(token) + name
        case Lifted(name, token):
            return Kind.LIFTED, _TOKEN.pack(token) + name


def decode(untrusted: bytes) -> Frame:
    """The frame in these bytes, or `MessageError`."""
    if not _HEADER.size <= len(untrusted) <= FRAME_BYTES_MAX:
        raise MessageError(f"{len(untrusted)} bytes")
    magic, version, kind, epoch, sequence, acknowledged = _HEADER.unpack_from(untrusted)
    if magic != MAGIC or version != VERSION:
        raise MessageError(f"not version {VERSION} of the lock manager's messages")
    if (kind == Kind.ACK) != (sequence == 0):
        raise MessageError("sequence 0 belongs to acknowledgements")
    if kind == Kind.ACK:
        if len(untrusted) != _HEADER.size:
            raise MessageError("an acknowledgement with a body")
        return Frame(epoch, 0, acknowledged, None)
    try:
        message = _decode_body(Kind(kind), _Reader(untrusted, _HEADER.size))
    except MessageError:
        raise
    except ValueError as problem:
        raise MessageError(str(problem)) from None
    return Frame(epoch, sequence, acknowledged, message)


class _Reader:
    """Takes fields off the front of untrusted bytes."""

    def __init__(self, untrusted: bytes, offset: int) -> None:
        self._untrusted = untrusted
        self._offset = offset

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        """Fields of numbers."""
        fields: tuple[int, ...] = layout.unpack(self._bytes(layout.size))
        return fields

    def take_value(self) -> Value:
        """A flag and 64 bytes."""
        valid = self._bytes(1)[0]
        value = self._bytes(VALUE_BYTES)
        return value if _flag(valid) else None

    def pairs(self) -> list[tuple[int, int]]:
        """A list of nodes with a number each."""
        (count,) = self.take(_COUNT)
        if count > LIST_MAX:
            raise MessageError(f"a list of {count}")
        pairs = []
        for _ in range(count):
            node, number = self.take(_PAIR)
            pairs.append((_node(node), number))
        return pairs

    def deaths(self) -> frozenset[Death]:
        """A list of deaths."""
        return frozenset(Death(*pair) for pair in self.pairs())

    def nodes(self) -> frozenset[int]:
        """A list of nodes."""
        (count,) = self.take(_COUNT)
        return frozenset(_node(node) for node in self._bytes(count))

    def name(self) -> bytes:
        """All that is left."""
        name = self._untrusted[self._offset :]
        if not 1 <= len(name) <= NAME_BYTES_MAX:
            raise MessageError(f"a name of {len(name)} bytes")
        return name

    def end(self) -> None:
        """Nothing may be left."""
        if self._offset != len(self._untrusted):
            raise MessageError("bytes behind the last field")

    def _bytes(self, count: int) -> bytes:
        end = self._offset + count
        if end > len(self._untrusted):
            raise MessageError("cut short")
        piece = self._untrusted[self._offset : end]
        self._offset = end
        return piece


def _decode_body(kind: Kind, reader: _Reader) -> Message:
    match kind:
        case Kind.REQUEST:
            request, mode, flags = reader.take(_REQUEST)
            return Request(reader.name(), request, Mode(mode), _flags(flags))
        case Kind.CANCEL:
            (request,) = reader.take(_CANCEL)
            return Cancel(reader.name(), request)
        case Kind.DOWN:
            mode, gone = reader.take(_DOWN)
            value = reader.take_value()
            return Down(reader.name(), Mode(mode), _flag(gone), value)
        case Kind.GRANT:
            request, mode, token = reader.take(_GRANT)
            value = reader.take_value()
            return Grant(reader.name(), request, Mode(mode), _token(token), value)
        case Kind.DENY:
            request, reason = reader.take(_DENY)
            return Deny(reader.name(), request, Reason(reason))
        case Kind.BAST:
            (mode,) = reader.take(_BAST)
            return Bast(reader.name(), Mode(mode))
        case Kind.RECORD:
            token, stamp, node = reader.take(_RECORD)
            value = reader.take_value()
            deaths = reader.deaths()
            exclusive = None if node == NO_NODE else node
            return Record(reader.name(), _token(token), stamp, exclusive, value, deaths)
        case Kind.CLAIM:
            granted, wanted, request, flags, token = reader.take(_CLAIM)
            value = reader.take_value()
            modes = (_mode(granted), _mode(wanted))
            return Claim(reader.name(), *modes, request, _flags(flags), _token(token), value)
        case Kind.DONE:
            return _decode_done(reader)
        case Kind.RELEASE:
            node, epoch = reader.take(_PAIR)
            reader.end()
            return Release(Death(_node(node), epoch))
        case Kind.LIFT:
            (token,) = reader.take(_TOKEN)
            return Lift(reader.name(), _token(token))
        case Kind.LIFTED:
            (token,) = reader.take(_TOKEN)
            return Lifted(reader.name(), _token(token))
        case Kind.ACK:
            raise MessageError("an acknowledgement has no body")


def _encode_done(done: Done) -> bytes:
    parts = [
        _DONE.pack(done.epoch_before, done.ready, done.highest_token),
        _pairs(done.members_before),
        _pairs(sorted(done.held)),
        _pairs(sorted(done.released)),
        _COUNT.pack(len(done.graves)),
    ]
    for grave in done.graves:
        parts += [_nodes(grave.lost), _nodes(grave.members), _pairs(sorted(grave.deaths))]
    return b"".join(parts)


def _decode_done(reader: _Reader) -> Done:
    epoch_before, ready, highest_token = reader.take(_DONE)
    members = tuple(Member(*pair) for pair in reader.pairs())
    held, released = reader.deaths(), reader.deaths()
    (count,) = reader.take(_COUNT)
    graves = []
    for _ in range(count):
        lost, before = reader.nodes(), reader.nodes()
        if not before:
            raise MessageError("a view without members")
        graves.append(Grave(lost, before, reader.deaths()))
    reader.end()
    if epoch_before and not members:
        raise MessageError("a view without members")
    return Done(
        epoch_before,
        _flag(ready),
        _token(highest_token),
        members,
        held,
        released,
        frozenset(graves),
    )


def _value(value: Value) -> bytes:
    return bytes(1 + VALUE_BYTES) if value is None else b"\1" + value


def _pairs(pairs: Sequence[tuple[int, int]]) -> bytes:
    return _COUNT.pack(len(pairs)) + b"".join(_PAIR.pack(*pair) for pair in pairs)


def _nodes(nodes: Iterable[int]) -> bytes:
    numbers = bytes(sorted(nodes))
    return _COUNT.pack(len(numbers)) + numbers


def _flag(number: int) -> bool:
    if number > 1:
        raise MessageError(f"a flag of {number}")
    return number == 1


def _flags(number: int) -> Flag:
    if number & ~(Flag.NOQUEUE | Flag.RECOVERING):
        raise MessageError(f"request flags {number:#x}")
    return Flag(number)


def _token(number: int) -> int:
    if number > TOKEN_MAX:
        raise MessageError(f"token {number:#x}")
    return number


def _node(number: int) -> int:
    if number > NODE_MAX:
        raise MessageError(f"node {number}")
    return number


def _mode(number: int) -> Mode | None:
    return None if number == NO_MODE else Mode(number)
