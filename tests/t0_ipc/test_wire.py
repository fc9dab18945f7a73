"""The parser of guest bytes against an independent reading of ABI.md's rules."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ipc.abi import (
    BATCH_ENTRY,
    EXTENT_PAGES_MAX,
    FIRST_FAULT_REASON,
    INVALID_OID,
    REPLY,
    REQUEST,
    REQUEST_BYTES,
    Op,
    Reason,
    Reply,
    oid_from_int,
)
from ipc.errors import GuestFault
from ipc.limits import WINDOW_SLOTS
from ipc.wire import RequestTuple, decode_batch, decode_reply, decode_request
from tools.abi_document import operation_uses

BATCHES = (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH)
USES = {op: operation_uses(op) for op in Op}


def u(bits: int) -> st.SearchStrategy[int]:
    """Unsigned numbers, the edges often."""
    top = (1 << bits) - 1
    edges = [0, 1, 63, 64, 65, top - 64, top - 1, top, 1 << (bits - 1)]
    return st.sampled_from([edge for edge in edges if edge <= top]) | st.integers(0, top)


oids = st.sampled_from([bytes(24), oid_from_int(1), b"u" * 16 + bytes(8), INVALID_OID]) | (
    st.binary(min_size=24, max_size=24)
)
requests = st.tuples(
    u(32),
    st.sampled_from([int(op) for op in Op]) | u(8),
    st.just(0) | st.integers(0, 15) | u(8),
    st.integers(0, 65) | u(16),
    st.integers(0, 3) | u(32),
    st.integers(0, 3) | u(32),
    oids,
    st.integers(0, 64) | u(64),
    st.just(0) | u(64),
    st.just(0) | u(64),
)


def flags_are_known(op: Op, flags: int) -> bool:
    """Hints go with puts, two of them not together; KEEP goes with gets."""
    if op in (Op.PUT_PAGE, Op.PUT_BATCH):
        return flags < 8 and flags & 3 != 3
    return flags in ((0, 8) if op in (Op.GET_PAGE, Op.GET_BATCH) else (0,))


def broken_rules(request: RequestTuple) -> set[Reason]:
    """Every rule of ABI.md that a request breaks, as the reasons that name them."""
    _, number, flags, count, pool, index, oid, slot, token, reserved = request
    if number not in set(Op):
        return {Reason.UNKNOWN_OP}
    op = Op(number)
    uses = USES[op]
    broken = set()
    if not flags_are_known(op, flags) or (flags and op in BATCHES):
        broken.add(Reason.BAD_FLAGS)
    fields = {"count": count, "pool": pool, "index": index, "slot": slot, "token": token}
    unused = any(value for name, value in fields.items() if name not in uses)
    if reserved or unused or ("oid" not in uses and any(oid)):
        broken.add(Reason.RESERVED_BITS)
    if op is Op.NEW_POOL:
        if any(oid[16:]):
            broken.add(Reason.RESERVED_BITS)
    elif "oid" in uses and oid == INVALID_OID:
        broken.add(Reason.INVALID_OID)
    if "count" in uses and not 1 <= count <= EXTENT_PAGES_MAX:
        broken.add(Reason.BAD_COUNT)
    if "index" in uses and index + count > 2**32:
        broken.add(Reason.BAD_INDEX)
    if "slot" in uses:
        if slot + max(count, 1) > WINDOW_SLOTS:
            broken.add(Reason.BAD_SLOT)
    elif slot and op is Op.FLUSH_PAGE:
        broken.add(Reason.BAD_SLOT)
    return broken


@given(requests)
@example((1, Op.PUT_PAGE, 0, 1, 0, 2**32 - 1, bytes(24), 63, 0, 0))
@example((1, Op.PUT_PAGE, 0, 64, 0, 2**32 - 63, bytes(24), 0, 0, 0))
@example((1, Op.GET_PAGE, 0, 2, 0, 0, bytes(24), 2**64 - 1, 0, 0))
def test_a_request_is_accepted_exactly_if_it_breaks_no_rule(request: RequestTuple) -> None:
    """Sums that could wrap included: index + count and slot + count."""
    broken = broken_rules(request)
    message = REQUEST.pack(*request)

    if not broken:
        assert decode_request(message) == request
        return
    with pytest.raises(GuestFault) as fault:
        decode_request(message)
    assert fault.value.reason in broken
    assert fault.value.reason >= FIRST_FAULT_REASON


@given(st.binary(min_size=REQUEST_BYTES, max_size=REQUEST_BYTES))
def test_any_64_bytes_decode_within_bounds_or_fault(message: bytes) -> None:
    """No other exception exists for a message of the right length."""
    try:
        accepted = not broken_rules(decode_request(message))
    except GuestFault as fault:
        accepted = fault.reason >= FIRST_FAULT_REASON
    assert accepted


@given(st.binary(max_size=200).filter(lambda message: len(message) != REQUEST_BYTES))
def test_any_other_length_faults(message: bytes) -> None:
    """Too short and too long alike."""
    with pytest.raises(GuestFault) as fault:
        decode_request(message)
    assert fault.value.reason is Reason.BAD_LENGTH


entries = st.tuples(
    u(32),
    u(32),
    st.integers(0, 64) | u(32),
    st.just(0) | st.integers(0, 15) | u(32),
    oids,
    st.just(0) | u(64),
)


@given(st.lists(entries, min_size=1, max_size=EXTENT_PAGES_MAX), st.sampled_from(BATCHES))
def test_a_batch_table_is_accepted_exactly_if_each_entry_is(
    table: list[tuple[int, int, int, int, bytes, int]], op: Op
) -> None:
    """One bad entry faults the whole table before anything is done."""
    packed = b"".join(BATCH_ENTRY.pack(*entry) for entry in table)
    broken = set()
    for _, _, slot, flags, oid, _ in table:
        if not flags_are_known(op, flags):
            broken.add(Reason.BAD_FLAGS)
        if slot >= WINDOW_SLOTS or (slot and op is Op.FLUSH_BATCH):
            broken.add(Reason.BAD_SLOT)
        if oid == INVALID_OID:
            broken.add(Reason.INVALID_OID)

    if broken:
        with pytest.raises(GuestFault) as fault:
            decode_batch(packed, op)
        assert fault.value.reason in broken
    else:
        assert table == decode_batch(packed, op)


@given(st.tuples(u(32), st.integers(-1001, 1), u(16), u(16), u(32), u(64), u(64)))
def test_a_reply_round_trips(fields: tuple[int, int, int, int, int, int, int]) -> None:
    """What the machine packs is what a guest reads."""
    assert Reply(*fields) == decode_reply(REPLY.pack(*fields))


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_reply_of_a_wrong_length_is_a_bug_and_said_so(length: int) -> None:
    """A guest trusts its hypervisor, so this is no fault of a guest."""
    with pytest.raises(ValueError, match=f"not {length}"):
        decode_reply(bytes(length))
