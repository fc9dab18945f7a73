"""The only parser of guest bytes, and its counterpart for the guest's side.

`decode_request` checks what can be checked without knowing the guest: length, operation, reserved
bits, count, sums that could wrap.  `decode_batch` does the same for a batch table.  What needs the
guest's state (its pools, the arena) is the machine's to check.

A request is handed on as the plain tuple that `ipc.abi.REQUEST` unpacks to, in the order sequence,
op, flags, count, pool, index, oid, slot, token, reserved: building a named tuple costs as much as
the rest of this module's work on a put or get (150 of 300 ns).
"""

from __future__ import annotations

import struct
from typing import NoReturn

from ipc.abi import (
    BATCH_ENTRY,
    EXTENT_PAGES_MAX,
    INVALID_OID,
    OID_BYTES,
    PUT_HINTS,
    REPLY,
    REQUEST,
    UUID_BYTES,
    CallFlag,
    Op,
    Reason,
    Reply,
)
from ipc.errors import GuestFault
from ipc.limits import WINDOW_SLOTS

RequestTuple = tuple[int, int, int, int, int, int, bytes, int, int, int]
EntryTuple = tuple[int, int, int, int, bytes, int]
"""pool, index, slot, flags, oid, token."""

INDEX_LIMIT = 1 << 32

_unpack_request = REQUEST.unpack
_NO_FLAGS: frozenset[int] = frozenset((0,))
_PUT_FLAGS = frozenset(
    flags
    for flags in range(PUT_HINTS + 1)
    if flags & (CallFlag.LOW | CallFlag.HIGH) != CallFlag.LOW | CallFlag.HIGH
)
_GET_FLAGS = frozenset((0, int(CallFlag.KEEP)))
_FLAGS: dict[int, frozenset[int]] = {
    int(Op.PUT_PAGE): _PUT_FLAGS,
    int(Op.PUT_BATCH): _PUT_FLAGS,
    int(Op.GET_PAGE): _GET_FLAGS,
    int(Op.GET_BATCH): _GET_FLAGS,
}
"""Flags that an operation knows; of a batch those of its entries."""
_MOVERS = tuple(
    _FLAGS[op] if op in (Op.PUT_PAGE, Op.GET_PAGE) else frozenset[int]() for op in range(256)
)
"""By operation: flags of those that move an extent.  As many pages as there are slots are no more
than an extent may have."""
_OPS = frozenset(int(op) for op in Op)
_BATCH_OPS = frozenset((int(Op.PUT_BATCH), int(Op.GET_BATCH), int(Op.FLUSH_BATCH)))
_ZERO_TAIL = bytes(OID_BYTES - UUID_BYTES)
_ZERO_OID = bytes(OID_BYTES)


def decode_request(untrusted_message: bytes) -> RequestTuple:
    """The request in a message; raises GuestFault for a rule that it breaks."""
    try:
        request: RequestTuple = _unpack_request(untrusted_message)
    except struct.error:
        raise GuestFault(Reason.BAD_LENGTH, f"{len(untrusted_message)} bytes") from None
    _, op, flags, count, _, index, oid, slot, _, reserved = request
    if (
        flags in _MOVERS[op]
        and count
        and slot + count <= WINDOW_SLOTS
        and index + count <= INDEX_LIMIT
        and not reserved
        and oid != INVALID_OID
    ):
        return request
    _check(request)
    return request


def decode_batch(untrusted_table: bytes, op: int) -> list[EntryTuple]:
    """The entries of a batch table that was copied out of the window, for a batch operation."""
    entries: list[EntryTuple] = []
    known = _FLAGS.get(op, _NO_FLAGS)
    slots = 1 if op == Op.FLUSH_BATCH else WINDOW_SLOTS
    for entry in BATCH_ENTRY.iter_unpack(untrusted_table):
        _, _, slot, flags, oid, _ = entry
        if flags not in known:
            raise GuestFault(Reason.BAD_FLAGS, hex(flags))
        if slot >= slots:
            raise GuestFault(Reason.BAD_SLOT, str(slot))
        if oid == INVALID_OID:
            raise GuestFault(Reason.INVALID_OID)
        entries.append(entry)
    return entries


def decode_reply(message: bytes) -> Reply:
    """The reply in a message.  Raises ValueError on a wrong length: a guest trusts its hypervisor,
    so that is a bug and no fault."""
    if len(message) != REPLY.size:
        raise ValueError(f"a reply has {REPLY.size} bytes, not {len(message)}")
    return Reply(*REPLY.unpack(message))


def _check(request: RequestTuple) -> None:
    """Every rule, one after the other; off the hot path.

    `index + count` may not pass 2**32 and `slot + count` may not pass the window: both sums are
    the places where Xen's 32-bit arithmetic wrapped (XSA-15, CVE-2012-6032).
    """
    _, op, flags, count, _, index, oid, slot, _, reserved = request
    if op not in _OPS:
        raise GuestFault(Reason.UNKNOWN_OP, str(op))
    if flags not in (_MOVERS[op] or _NO_FLAGS):
        raise GuestFault(Reason.BAD_FLAGS, hex(flags))
    if reserved:
        raise GuestFault(Reason.RESERVED_BITS, "the last word")
    if op in (Op.PUT_PAGE, Op.GET_PAGE, Op.FLUSH_PAGE):
        _check_extent(op, count, index, oid, slot)
    elif op in _BATCH_OPS:
        _check_count(count)
        _check_unused(request, "pool index oid slot token")
    elif op == Op.NEW_POOL:
        _check_unused(request, "count index slot token")
        if oid[UUID_BYTES:] != _ZERO_TAIL:
            raise GuestFault(Reason.RESERVED_BITS, "after the uuid")
    elif op == Op.FLUSH_OBJECT:
        _check_unused(request, "count index slot")
        if oid == INVALID_OID:
            raise GuestFault(Reason.INVALID_OID)
    elif op == Op.DESTROY_POOL:
        _check_unused(request, "count index oid slot token")
    elif op == Op.LEND:
        _check_unused(request, "count pool oid slot token")
    elif op == Op.REPORT:
        _check_unused(request, "count token")
        if slot >= WINDOW_SLOTS:
            raise GuestFault(Reason.BAD_SLOT, str(slot))
        if oid == INVALID_OID:
            raise GuestFault(Reason.INVALID_OID)
    else:
        _check_unused(request, "count pool index oid slot token")


def _check_extent(op: int, count: int, index: int, oid: bytes, slot: int) -> None:
    _check_count(count)
    if index + count > INDEX_LIMIT:
        raise GuestFault(Reason.BAD_INDEX, f"{index}+{count}")
    if op == Op.FLUSH_PAGE:
        if slot:
            raise GuestFault(Reason.BAD_SLOT, "a flush moves no page")
    elif slot + count > WINDOW_SLOTS:
        raise GuestFault(Reason.BAD_SLOT, f"{slot}+{count}")
    if oid == INVALID_OID:
        raise GuestFault(Reason.INVALID_OID)


def _check_count(count: int) -> None:
    if not 1 <= count <= EXTENT_PAGES_MAX:
        raise GuestFault(Reason.BAD_COUNT, str(count))


_FIELDS = ("sequence", "op", "flags", "count", "pool", "index", "oid", "slot", "token")


def _check_unused(request: RequestTuple, names: str) -> None:
    for name in names.split():
        value = request[_FIELDS.index(name)]
        if value not in (0, _ZERO_OID):
            _unused(name)


def _unused(name: str) -> NoReturn:
    raise GuestFault(Reason.RESERVED_BITS, f"{name} is not used by this operation")
