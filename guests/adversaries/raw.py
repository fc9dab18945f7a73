"""Calls with any field of the request as one likes it, below everything that a good kernel does.

What all adversaries have in common, and the hostile guests of the tests; no attack.  A reply is
counted as what it is: `DONE` kept or gave something, everything else was refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final, Protocol

from guests.adversary import Cell
from ipc.abi import (
    ANY_UUID,
    OID_BYTES,
    PAGE_BYTES,
    POOL_PRIORITY_SHIFT,
    REQUEST,
    Op,
    Reason,
    Reply,
    Status,
    oid_from_int,
    pool_flag_word,
)
from ipc.errors import Disconnected
from ipc.window import Window
from ipc.wire import decode_reply

_WORD: Final = 0xFFFF_FFFF
_LONG: Final = (1 << 64) - 1


def page_of(*what: object) -> bytes:
    """A page of bytes that only this name has, and that no filling or compressing shortens."""
    seed = hashlib.blake2b(repr(what).encode(), digest_size=32).digest()
    return hashlib.shake_128(seed).digest(PAGE_BYTES)


def file_oid(ino: int, generation: int) -> bytes:
    """The object id of a file, as file systems make it (`guests.cleancache.object_id`)."""
    return ino.to_bytes(8, "little") + generation.to_bytes(4, "little") + bytes(OID_BYTES - 12)


class Line(Protocol):
    """What calls go over: as much of a channel as they need."""

    @property
    def window(self) -> Window:
        """Where their pages lie."""

    def call(self, request: bytes) -> bytes:
        """The reply to a message."""


class Calls:
    """Calls over a line."""

    def __init__(self, channel: Line, sequence: int = 0) -> None:
        self.channel = channel
        self.sequence = sequence

    def request(self, op: int, **fields: Any) -> bytes:
        """The message of a call; negative numbers are sent as their two's complement."""
        self.sequence = (self.sequence + 1) & _WORD
        oid = fields.get("oid", 0)
        return REQUEST.pack(
            self.sequence,
            op & 0xFF,
            fields.get("flags", 0) & 0xFF,
            fields.get("count", 0) & 0xFFFF,
            fields.get("pool", 0) & _WORD,
            fields.get("index", 0) & _WORD,
            oid if isinstance(oid, bytes) else oid_from_int(oid),
            fields.get("slot", 0) & _LONG,
            fields.get("token", 0) & _LONG,
            fields.get("reserved", 0) & _LONG,
        )

    def send(self, message: bytes) -> Reply:
        """The reply to any message.  Disconnected."""
        return decode_reply(self.channel.call(message))

    def call(self, op: int, **fields: Any) -> Reply:
        """The reply to a call.  Disconnected."""
        return self.send(self.request(op, **fields))

    def new_pool(
        self, *, persist: bool = False, uuid: bytes | None = None, priority: int = 0
    ) -> Reply:
        """Ask for a private pool, or for the shared one of a uuid."""
        word = pool_flag_word(persist=persist, shared=uuid is not None)
        oid = (uuid or ANY_UUID).ljust(OID_BYTES, b"\0")
        return self.call(Op.NEW_POOL, pool=word | priority << POOL_PRIORITY_SHIFT, oid=oid)


class Raw(Calls):
    """Those of the guest that we are in."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell.channel, cell.random.getrandbits(32))
        self.cell = cell

    def put(
        self, pool: int, oid: int | bytes, index: int, pages: list[bytes], *, token: int = 0
    ) -> Reply:
        """Put neighbouring pages from slot 0 on."""
        window = self.channel.window
        for slot, page in enumerate(pages):
            window.slot(slot)[:] = page
        return self.call(
            Op.PUT_PAGE, pool=pool, oid=oid, index=index, count=len(pages), token=token
        )

    def get(self, pool: int, oid: int | bytes, index: int) -> bytes | None:
        """One page; None if it is not there, or not ours to have."""
        window = self.channel.window
        window.slot(0)[:] = bytes(PAGE_BYTES)
        reply = self.call(Op.GET_PAGE, pool=pool, oid=oid, index=index, count=1)
        return bytes(window.slot(0)) if reply.status == Status.DONE else None


def until_out(report: dict[str, Any], steps: Iterator[None]) -> Iterator[None]:
    """What an adversary does until it is thrown out for it, which `out` in its report says."""
    report["out"] = False
    try:
        yield from steps
    except Disconnected:
        report["out"] = True


def why(reply: Reply) -> str:
    """The reason of a reply, as it stands in the audit log."""
    if not reply.reason and reply.status == Status.MISS:
        return "nothing there"
    try:
        return Reason(reply.reason).name.lower()
    except ValueError:
        return str(reply.reason)
