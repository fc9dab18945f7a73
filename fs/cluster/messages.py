"""The messages of membership: fixed binary, little endian, every byte checked.

Header: magic u16, version u8, kind u8, generation of the sender u64. Then by kind:
  JOIN      timings (config)               REFUSE    text, UTF-8, at most 512 bytes
  PREPARE   ballot, bootstrap u8           PROMISE   ballot, has u8, then accepted ballot and view
  ACCEPT    ballot, view                   ACCEPTED  ballot
  NACK      epoch of the sender u64 (0: no view), promised ballot
  VIEW      view                           INSTALLED epoch u64
  LEAVE     nothing
Ballot: epoch u64, round u32, node u8. View: epoch u64, number of members u8, node u8 and
generation u64 of each in ascending order, bitmaps of 32 bytes of the dead and of those that left.

A message that is longer or shorter than its fields, or whose fields are out of bounds, is a
`ValueError`; membership counts it and goes on.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from fs.cluster.config import MAX_NODES, TIMING_BYTES, Timing
from fs.cluster.region import bitmap, bits
from fs.cluster.view import MAX_EPOCH, NO_BALLOT, Ballot, View

MAGIC: Final = 0x6D76
VERSION: Final = 1
MAX_TEXT_BYTES: Final = 512
MAX_ROUND: Final = 1 << 31

_HEADER: Final = struct.Struct("<HBBQ")
_BALLOT: Final = struct.Struct("<QIB")
_VIEW: Final = struct.Struct("<QB")
_MEMBER: Final = struct.Struct("<BQ")
_MAPS: Final = struct.Struct("<32s32s")
_EPOCH: Final = struct.Struct("<Q")
MAX_MESSAGE_BYTES: Final = (
    _HEADER.size + 2 * _BALLOT.size + 1 + _VIEW.size + MAX_NODES * _MEMBER.size + _MAPS.size
)


class Kind(enum.IntEnum):
    """What a message says."""

    JOIN = 1
    REFUSE = 2
    PREPARE = 3
    PROMISE = 4
    ACCEPT = 5
    ACCEPTED = 6
    NACK = 7
    VIEW = 8
    INSTALLED = 9
    LEAVE = 10


@dataclass(frozen=True)
class Message:
    """A decoded message; the fields that its kind doesn't use keep their defaults."""

    kind: Kind
    generation: int
    ballot: Ballot = NO_BALLOT
    bootstrap: bool = False
    accepted: tuple[Ballot, View] | None = None
    view: View | None = None
    epoch: int = 0
    timing: Timing | None = None
    text: str = ""


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    header = _HEADER.pack(MAGIC, VERSION, message.kind, message.generation)
    return header + _encode_body(message)


def _encode_body(message: Message) -> bytes:
    kind = message.kind
    if kind is Kind.JOIN:
        return (message.timing or Timing()).encode()
    if kind is Kind.REFUSE:
        return message.text.encode()[:MAX_TEXT_BYTES]
    if kind is Kind.PREPARE:
        return _BALLOT.pack(*message.ballot) + bytes([message.bootstrap])
    if kind is Kind.PROMISE:
        body = _BALLOT.pack(*message.ballot)
        if message.accepted is None:
            return body + b"\0"
        ballot, view = message.accepted
        return body + b"\1" + _BALLOT.pack(*ballot) + _encode_view(view)
    if kind is Kind.ACCEPT:
        return _BALLOT.pack(*message.ballot) + _encode_view(_required(message.view))
    if kind is Kind.ACCEPTED:
        return _BALLOT.pack(*message.ballot)
    if kind is Kind.NACK:
        return _EPOCH.pack(message.epoch) + _BALLOT.pack(*message.ballot)
    if kind is Kind.VIEW:
        return _encode_view(_required(message.view))
    if kind is Kind.INSTALLED:
        return _EPOCH.pack(message.epoch)
    return b""


def _required(view: View | None) -> View:
    if view is None:
        raise ValueError("this kind of message carries a view")
    return view


def _encode_view(view: View) -> bytes:
    members = b"".join(_MEMBER.pack(*member) for member in view.generations)
    return (
        _VIEW.pack(view.epoch, len(view.generations))
        + members
        + _MAPS.pack(bitmap(view.dead), bitmap(view.left))
    )


def decode(untrusted_data: bytes) -> Message:
    """The message in these bytes; `ValueError` when it is none."""
    if len(untrusted_data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(untrusted_data)} bytes")
    reader = _Reader(untrusted_data)
    magic, version, kind_number, generation = reader.take(_HEADER)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"magic {magic:#x}, version {version}")
    if generation == 0:
        raise ValueError("a message from no incarnation")
    message = _decode_body(Kind(kind_number), generation, reader)
    if reader.rest():
        raise ValueError(f"{len(reader.rest())} bytes behind a {message.kind.name}")
    return message


def _decode_body(kind: Kind, generation: int, reader: _Reader) -> Message:
    if kind is Kind.JOIN:
        return Message(kind, generation, timing=Timing.decode(reader.raw(TIMING_BYTES)))
    if kind is Kind.REFUSE:
        text = reader.raw(min(len(reader.rest()), MAX_TEXT_BYTES))
        return Message(kind, generation, text=text.decode("utf-8", "replace"))
    if kind is Kind.PREPARE:
        ballot = reader.ballot()
        return Message(kind, generation, ballot=ballot, bootstrap=reader.flag())
    if kind is Kind.PROMISE:
        ballot = reader.ballot()
        if not reader.flag():
            return Message(kind, generation, ballot=ballot)
        accepted = reader.ballot()
        return Message(kind, generation, ballot=ballot, accepted=(accepted, reader.view()))
    if kind is Kind.ACCEPT:
        ballot = reader.ballot()
        return Message(kind, generation, ballot=ballot, view=reader.view())
    if kind is Kind.ACCEPTED:
        return Message(kind, generation, ballot=reader.ballot())
    if kind is Kind.NACK:
        epoch = reader.epoch()
        return Message(kind, generation, epoch=epoch, ballot=reader.ballot())
    if kind is Kind.VIEW:
        return Message(kind, generation, view=reader.view())
    if kind is Kind.INSTALLED:
        return Message(kind, generation, epoch=reader.epoch())
    return Message(kind, generation)


class _Reader:
    """Takes fields from the front of untrusted bytes."""

    def __init__(self, untrusted_data: bytes) -> None:
        self._data = untrusted_data
        self._at = 0

    def rest(self) -> bytes:
        return self._data[self._at :]

    def raw(self, count: int) -> bytes:
        if len(self._data) - self._at < count:
            raise ValueError(f"a message that ends after {len(self._data)} bytes")
        self._at += count
        return self._data[self._at - count : self._at]

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.raw(layout.size))

    def flag(self) -> bool:
        value = self.raw(1)[0]
        if value > 1:
            raise ValueError(f"a flag of {value}")
        return value == 1

    def epoch(self) -> int:
        (epoch,) = self.take(_EPOCH)
        if epoch > MAX_EPOCH:
            raise ValueError(f"epoch {epoch}")
        return epoch

    def ballot(self) -> Ballot:
        epoch, number, node = self.take(_BALLOT)
        if epoch > MAX_EPOCH or number >= MAX_ROUND or node >= MAX_NODES:
            raise ValueError(f"epoch {epoch}, round {number} of node {node}")
        return Ballot(epoch, number, node)

    def view(self) -> View:
        epoch, count = self.take(_VIEW)
        members = [self.take(_MEMBER) for _ in range(count)]
        nodes = [node for node, _ in members]
        if (
            not members
            or not 0 < epoch <= MAX_EPOCH
            or nodes != sorted(set(nodes))
            or nodes[-1] >= MAX_NODES
        ):
            raise ValueError(f"a view of epoch {epoch} with the nodes {nodes}")
        if any(generation == 0 for _, generation in members):
            raise ValueError("a member without a generation")
        dead, left = bits(self.raw(32)), bits(self.raw(32))
        if dead & left or (dead | left) & set(nodes):
            raise ValueError("a node in two parts of a view")
        return View(epoch, tuple((node, generation) for node, generation in members), dead, left)
