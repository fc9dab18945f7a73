"""Hostile guests: XSA-15 (CVE-2012-3497), what Xen's tmem got wrong in 2012 with a guest's input.

One test a row of the advisory's split, against a real hypervisor over either transport, while a
second guest goes on verifying its pages (`tests.support.hostile`).  Where Xen had something that
can't exist here, the docstring says what stands in its place.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator
from typing import Any

import pytest

from guests.adversaries.raw import page_of
from ipc.abi import (
    BATCH_ENTRY,
    BYE_MAGIC,
    CONFIRM,
    INVALID_OID,
    OID_BYTES,
    PAGE_BYTES,
    CallFlag,
    Op,
    PoolFlag,
    Reason,
    Status,
    oid_from_int,
    pool_flag_word,
)
from ipc.limits import POOLS_PER_GUEST, WINDOW_CALL_OFFSET, WINDOW_SLOTS
from ipc.mqueue import KICK
from ipc.wire import decode_reply
from tests.support.hostile import (
    NO_UUID,
    TRANSPORTS,
    Attacker,
    Handshake,
    Siege,
    assert_fault,
    besieged,
)

MOVERS = (Op.PUT_PAGE, Op.GET_PAGE)
EXTENTS = (*MOVERS, Op.FLUSH_PAGE)
BATCHES = (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH)
UNKNOWN_OPS = sorted(set(range(256)) - {int(op) for op in Op})
POOL_IDS_OF_NOBODY = (16, POOLS_PER_GUEST, -1, -2, -16, 1 << 31, (1 << 31) - 1, -(1 << 31), 0xFFFF)


@pytest.fixture(scope="module", params=TRANSPORTS)
def siege(
    request: pytest.FixtureRequest,
    new_cluster_name: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Siege]:
    """One hypervisor for all tests of a transport; each has guests of its own."""
    with besieged(new_cluster_name(), tmp_path_factory.mktemp("xsa15"), request.param) as siege:
        yield siege


@pytest.fixture
def attacker(siege: Siege) -> Iterator[Attacker]:
    """A guest that leaves in the end, after which the witness is asked."""
    with siege.attacking() as attacker:
        yield attacker
    siege.unharmed()


def broken_requests(attacker: Attacker, pool: int) -> Iterator[bytes]:
    """A request for every way out of every check, each fit but for one thing."""
    fit: dict[str, Any] = {"pool": pool, "oid": 1, "count": 1}
    for op in EXTENTS:
        for wrong in (
            {"count": 0},
            {"count": 65},
            {"count": 0xFFFF},
            {"index": -1, "count": 2},
            {"slot": WINDOW_SLOTS},
            {"oid": INVALID_OID},
            {"reserved": 1},
            {"reserved": 1 << 63},
            {"flags": 1 << 7},
        ):
            yield attacker.request(op, **(fit | wrong))
    yield attacker.request(Op.PUT_PAGE, **fit, flags=CallFlag.LOW | CallFlag.HIGH)
    yield attacker.request(Op.PUT_PAGE, **fit, flags=CallFlag.KEEP)
    yield attacker.request(Op.GET_PAGE, **fit, flags=CallFlag.LOW)
    for op in BATCHES:
        for wrong in (
            {"count": 0},
            {"count": 65},
            {"pool": 1},
            {"index": 1},
            {"oid": 1},
            {"slot": 1},
            {"token": 1},
            {"flags": 1},
        ):
            yield attacker.request(op, **({"count": 1} | wrong))
    for field in ("count", "index", "slot", "token", "flags"):
        yield attacker.request(Op.NEW_POOL, pool=pool_flag_word(), **{field: 1})
    for word in (
        0,
        pool_flag_word() | PoolFlag.PRECOMPRESSED,
        pool_flag_word() | 1 << 3,
        pool_flag_word() | 1 << 4,
        pool_flag_word() | 3 << 8,
        pool_flag_word() | 1 << 10,
        pool_flag_word() + (1 << 24),
        0xFFFFFFFF,
    ):
        yield attacker.request(Op.NEW_POOL, pool=word, oid=NO_UUID)
    yield attacker.request(Op.NEW_POOL, pool=pool_flag_word(), oid=b"\xff" * OID_BYTES)
    for field in ("count", "index", "oid", "slot", "token"):
        yield attacker.request(Op.DESTROY_POOL, pool=pool, **{field: 1})
    for field in ("count", "index", "slot"):
        yield attacker.request(Op.FLUSH_OBJECT, pool=pool, oid=1, **{field: 1})
    yield attacker.request(Op.FLUSH_OBJECT, pool=pool, oid=INVALID_OID)
    for field in ("pool", "count", "index", "oid", "slot", "token"):
        yield attacker.request(Op.VERSION, **{field: 1})


def test_cve_2012_6030_every_early_error_leaves_the_server_serving(
    siege: Siege, attacker: Attacker
) -> None:
    """Xen's early error paths checked the wrong lock and took the host down.  Here each error ends
    in a fault reply; nothing is done, and what is right is served right after it."""
    pool = attacker.pool(persist=True)
    page = page_of("6030")
    attacker.put(pool, 1, 0, page)
    before = siege.faults(attacker.name)

    sent = 0
    for message in broken_requests(attacker, pool):
        assert_fault(attacker.send(message))
        sent += 1
    assert sent > 80

    assert siege.faults(attacker.name) == before + sent
    assert attacker.get(pool, 1, 0) == page
    assert [one["id"] for one in siege.guest(attacker.name)["pools"]] == [pool]


def protect(attacker: Attacker, protection: int) -> None:
    """Change what the guest's own mapping of its page slots allows."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(attacker.window.slots))
    length = WINDOW_SLOTS * PAGE_BYTES
    mprotect = ctypes.CDLL(None).mprotect
    assert mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection) == 0


def test_cve_2012_6031_a_get_without_a_destination_then_the_same_object(
    attacker: Attacker,
) -> None:
    """A bad copy left the object's lock held, and whoever touched it next hung.  Here a destination
    is a window slot: one that is not there is a fault, and one that the guest can't write itself is
    still the hypervisor's to write.  Afterwards every operation on the object goes on."""
    for persist in (True, False):
        pool = attacker.pool(persist=persist)
        page = page_of("6031", persist)
        attacker.put(pool, 1, 0, page)
        for slot, count in ((WINDOW_SLOTS, 1), (WINDOW_SLOTS - 1, 2), (0, 65), (-1, 1)):
            assert_fault(
                attacker.call(Op.GET_PAGE, pool=pool, oid=1, index=0, count=count, slot=slot)
            )
        protect(attacker, mmap.PROT_READ)
        reply = attacker.call(
            Op.GET_PAGE, pool=pool, oid=1, index=0, count=1, slot=5, flags=CallFlag.KEEP
        )
        protect(attacker, mmap.PROT_READ | mmap.PROT_WRITE)
        assert reply.status == Status.DONE
        assert bytes(attacker.window.slot(5)) == page

        assert attacker.put(pool, 1, 1, page, page).status == Status.DONE
        assert attacker.get(pool, 1, 0) == page
        assert attacker.call(Op.FLUSH_PAGE, pool=pool, oid=1, index=1, count=1).map == 1
        assert attacker.call(Op.FLUSH_OBJECT, pool=pool, oid=1).status == Status.DONE


WRAPPING_SLOTS = (
    *((slot, count) for slot in (1 << 32, 1 << 52, 1 << 63, -1, -64) for count in (1, 64)),
    *((WINDOW_SLOTS - count + 1, count) for count in (1, 2, 63, 64)),
    ((1 << 64) - 64, 64),
    ((1 << 52) - 1, 2),
)
"""Slots whose sum with the count, or whose product with a page's size, wraps or is too large."""


def test_cve_2012_6032_offsets_that_wrap(attacker: Attacker) -> None:
    """tmem_offset + len and pfn_offset + len wrapped in 32 bits.  Ours are slot + count and
    index + count, of extents and in batch tables: no page moves, and no byte of the window."""
    pool = attacker.pool(persist=True)
    last = (1 << 32) - 1
    kept = page_of("6032")
    attacker.put(pool, 1, last, kept)
    attacker.put(pool, 1, 0, kept)
    pattern = page_of("window") * WINDOW_SLOTS
    attacker.window.slots[:] = pattern

    for slot, count in WRAPPING_SLOTS:
        for op in MOVERS:
            reply = attacker.call(op, pool=pool, oid=1, index=0, count=count, slot=slot)
            assert_fault(reply, Reason.BAD_SLOT)
    for op in EXTENTS:
        for index, count in ((last, 2), (last - 62, 64), (last, 64)):
            reply = attacker.call(op, pool=pool, oid=1, index=index, count=count)
            assert_fault(reply, Reason.BAD_INDEX)
    for slot in (64, 65, (1 << 32) - 1, 1 << 20):
        for op in BATCHES:
            attacker.window.table[:48] = BATCH_ENTRY.pack(pool, 0, slot, 0, oid_from_int(1), 0)
            assert_fault(attacker.call(op, count=1), Reason.BAD_SLOT)

    assert bytes(attacker.window.slots) == pattern
    assert attacker.get(pool, 1, last) == kept
    assert attacker.get(pool, 1, 0) == kept


def test_cve_2012_6033_no_control_operation_for_guests(siege: Siege, attacker: Attacker) -> None:
    """The check of TMEM_CONTROL's caller was commented out.  Here no number leads to an
    administrator's verb (`test_admin_unreachable` tries the other ways in)."""
    before = siege.ask("list", guest="witness")["guests"]["witness"]

    for op in UNKNOWN_OPS:
        for fields in ({}, {"pool": 1, "index": 0xFFFF, "oid": 1, "count": 1}):
            assert_fault(attacker.call(op, **fields), Reason.UNKNOWN_OP)

    after = siege.ask("list", guest="witness")["guests"]["witness"]
    for setting in ("frozen", "weight", "cap_bytes", "reserve_bytes", "compress", "priority"):
        assert after[setting] == before[setting]


def test_cve_2012_6034_short_buffers_and_bad_ones(attacker: Attacker) -> None:
    """Results were written to pointers that nobody had checked.  Here a guest names no address: a
    reply has its own place, and of what a guest can get wrong there are a message's length and the
    slot.  Messages of every length but the right one are faults, one byte is a kick."""
    pool = attacker.pool(persist=True)
    attacker.put(pool, 1, 0, page_of("6034"))
    request = attacker.request(Op.GET_PAGE, pool=pool, oid=1, count=1)

    for length in (0, *range(2, len(request))):
        # In the queue, whatever the transport: a call block always holds a whole request.
        attacker.channel._requests.send(request[:length])
        reply = decode_reply(attacker.channel._replies.receive(60)[0])
        assert_fault(reply, Reason.BAD_LENGTH)
        assert reply.sequence == int.from_bytes(request[: min(length, 4)], "little")
    with pytest.raises(ValueError, match="too long"):
        attacker.send(request + b"\0")
    attacker.channel._requests.send(KICK)
    for slot in (WINDOW_SLOTS, -1):
        reply = attacker.call(Op.GET_PAGE, pool=pool, oid=1, count=1, slot=slot)
        assert_fault(reply, Reason.BAD_SLOT)

    assert attacker.get(pool, 1, 0) == page_of("6034")


def test_cve_2012_6035_destroying_pools_that_nobody_has(siege: Siege, attacker: Attacker) -> None:
    """The pool id of destroy_pool was not looked at: 16, -1, 2**31 and so on."""
    pool = attacker.pool(persist=True)
    attacker.put(pool, 1, 0, page_of("6035"))

    for pool_id in POOL_IDS_OF_NOBODY:
        assert attacker.call(Op.DESTROY_POOL, pool=pool_id).status == Status.MISS

    assert [one["id"] for one in siege.guest(attacker.name)["pools"]] == [pool]
    assert attacker.get(pool, 1, 0) == page_of("6035")
    assert attacker.call(Op.DESTROY_POOL, pool=pool).status == Status.DONE
    assert attacker.call(Op.DESTROY_POOL, pool=pool).status == Status.MISS


def test_cve_2012_6036_negative_pool_ids_everywhere(attacker: Attacker) -> None:
    """They passed a signed comparison in the save and restore operations.  Every operation that
    names a pool, in extents and in batch tables, with a pool of its own beside them."""
    pool = attacker.pool()
    for pool_id in POOL_IDS_OF_NOBODY:
        for op in (*EXTENTS, Op.FLUSH_OBJECT):
            fields: dict[str, Any] = {} if op == Op.FLUSH_OBJECT else {"count": 1}
            reply = attacker.call(op, pool=pool_id, oid=1, **fields)
            assert (reply.status, reply.reason) == (Status.ENODEV, Reason.NO_SUCH_POOL)
        for op in BATCHES:
            entries = [(pool_id & 0xFFFFFFFF, 0, 0, 0, oid_from_int(1), 0)] * 3
            entries[1] = (pool, 0, 0, 0, oid_from_int(1), 0)
            attacker.window.write_table(entries)
            reply = attacker.call(op, count=3)
            assert (reply.status, reply.reason) == (Status.ENODEV, Reason.NO_SUCH_POOL)
            assert reply.map in (0, 0b010)


def test_3fed6db242_calls_while_there_is_no_client(siege: Siege, attacker: Attacker) -> None:
    """Save operations of a guest without a client record met a NULL pointer.  Here a guest has no
    client before CONFIRM and after BYE: what stands in its queue is served with the confirmation,
    or never."""
    request = attacker.request(Op.NEW_POOL, pool=pool_flag_word(), oid=NO_UUID)
    with Handshake(siege) as early:
        early.requests.send(request)
        early.window[WINDOW_CALL_OFFSET : WINDOW_CALL_OFFSET + 8] = (1).to_bytes(8, "little")
        siege.unharmed()
        assert early.replies.current_messages == 0

        early.confirm()
        assert early.replies.receive(60)[0][:4] == request[:4]
        early.door.send(CONFIRM.pack(BYE_MAGIC, 0))
        assert early.door.recv(1) == b""
        for _ in range(3):
            early.requests.send(request)
        siege.unharmed()
        assert early.requests.current_messages == 3
    with Handshake(siege) as given_up:
        given_up.requests.send(request)


def test_c2433b9750_a_guest_cant_fill_the_log(siege: Siege, attacker: Attacker) -> None:
    """Xen printed a line for each bad call.  Here each is counted, and the audit log has a bucket
    of lines for each guest; other guests' lines are not held back by it."""
    lines_before = len(siege.audit())
    calls = 3000
    for number in range(calls):
        assert_fault(attacker.call(Op.GET_PAGE, count=number % 2 * 65))

    assert siege.faults(attacker.name) == calls
    own = [line for line in siege.audit()[lines_before:] if f"guest={attacker.name} " in line]
    assert 50 <= len(own) < 500
    log = (siege.directory / "log" / "hypervisor.log").read_text()
    assert log.count(f"guest={attacker.name} ") <= 1, "that it has attached"
    with siege.attacking() as another:
        assert_fault(another.call(Op.GET_PAGE))
        assert any(f"guest={another.name} event=fault" in line for line in siege.audit())


def test_what_a_guest_says_is_one_word_in_the_audit_log(siege: Siege, attacker: Attacker) -> None:
    """Details of faults are numbers and flags of its own choice; no line is forged or broken."""
    for op, index in itertools.product((7, 10, 13, 32, 34, 61), (0x0A0A0A0A, 0x67756573)):
        attacker.call(op, index=index, oid=b"\nguest=root event=ok\n   ", reserved=index)
    lines = [line for line in siege.audit() if f"guest={attacker.name} " in line]

    assert lines
    for line in lines:
        stamp, guest, event, *_ = line.split(" ")
        assert stamp.endswith("Z")
        assert (guest, event) == (f"guest={attacker.name}", "event=fault")
    assert not any("root" in line for line in siege.audit())
