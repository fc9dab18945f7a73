"""What an operation promises, one test a rule; rows of the reference notes' tables 1.3 and 1.5."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hypervisor.arena import private_arena
from hypervisor.frames import EPHEMERAL as FRAME_EPHEMERAL
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Client
from ipc.abi import (
    ABI_REVISION,
    INVALID_OID,
    PAGE_BYTES,
    REQUEST,
    SPEC_VERSION,
    CallFlag,
    Op,
    PoolFlag,
    Reason,
    Reply,
    ReplyFlag,
    Status,
    oid_from_int,
    pool_flag_word,
)
from ipc.limits import GUESTS_MAX, POOLS_PER_GUEST, WINDOW_SLOTS
from ipc.window import anonymous_window
from ipc.wire import decode_reply

EPHEMERAL, PERSISTENT = 0, 1
ARENA_BYTES = 620 * 1024


class Guest:
    """One client of a machine, with its window."""

    def __init__(self, machine: Machine, name: str = "guest") -> None:
        self.machine = machine
        client = machine.attach(name, 1, 1, 0)
        assert client is not None
        self.client: Client = client
        self.window = anonymous_window()

    def raw(self, message: bytes) -> Reply:
        return decode_reply(self.machine.execute(self.client, message, self.window))

    def call(
        self,
        op: int,
        pool: int = 0,
        oid: bytes | int = 0,
        index: int = 0,
        count: int = 0,
        slot: int = 0,
        *,
        flags: int = 0,
        token: int = 0,
        reserved: int = 0,
    ) -> Reply:
        name = oid_from_int(oid) if isinstance(oid, int) else oid
        reply = self.raw(
            REQUEST.pack(9, op, flags, count, pool, index, name, slot, token, reserved)
        )
        assert reply.sequence == 9
        check(self.machine)
        return reply

    def put(self, pool: int, oid: int, index: int, *texts: str) -> Reply:
        for slot, text in enumerate(texts):
            self.window.slot(slot)[:] = text.encode().ljust(PAGE_BYTES)
        return self.call(Op.PUT_PAGE, pool, oid, index, len(texts))

    def get(self, pool: int, oid: int, index: int, count: int = 1) -> list[str | None]:
        reply = self.call(Op.GET_PAGE, pool, oid, index, count)
        return [
            bytes(self.window.slot(slot)).rstrip().decode() if reply.map >> slot & 1 else None
            for slot in range(count)
        ]


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that is consistent at the end."""
    made = Machine(private_arena(ARENA_BYTES))
    yield made
    check(made)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    """A guest with pool 0 ephemeral and pool 1 persistent."""
    made = Guest(machine)
    assert made.call(Op.NEW_POOL, pool_flag_word()).value == EPHEMERAL
    assert made.call(Op.NEW_POOL, pool_flag_word(persist=True)).value == PERSISTENT
    return made


def fill_with_persistent(guest: Guest) -> None:
    """Until no frame is left."""
    index = 0
    while guest.machine.store.frames.free:
        count = min(64, guest.machine.store.frames.free)
        assert guest.put(PERSISTENT, 1000, index, *["x"] * count).status == Status.DONE
        index += count


# --- rules of 1.5


def test_rule_1_private_ephemeral_get_removes_the_page(guest: Guest) -> None:
    """The second get misses, and the object goes with its last page."""
    guest.put(EPHEMERAL, 7, 0, "a")

    assert guest.get(EPHEMERAL, 7, 0) == ["a"]
    assert guest.get(EPHEMERAL, 7, 0) == [None]
    assert not guest.client.members[EPHEMERAL].pool.objects


def test_rule_3_persistent_get_keeps_the_page(guest: Guest) -> None:
    """Until it is flushed."""
    guest.put(PERSISTENT, 7, 0, "a")

    assert [guest.get(PERSISTENT, 7, 0)[0] for _ in range(3)] == ["a"] * 3
    guest.call(Op.FLUSH_PAGE, PERSISTENT, 7, 0, 1)
    assert guest.get(PERSISTENT, 7, 0) == [None]


@pytest.mark.parametrize("pool", [EPHEMERAL, PERSISTENT])
def test_rule_4_duplicate_put_replaces(guest: Guest, pool: int) -> None:
    """The new data, never the old."""
    guest.put(pool, 7, 0, "old")
    guest.put(pool, 7, 0, "new")

    assert guest.get(pool, 7, 0) == ["new"]


def test_rule_4_duplicate_put_that_fails_drops_the_old_page(guest: Guest) -> None:
    """With no frame left, the old copy may not stay: -ENOSPC and a miss."""
    guest.put(PERSISTENT, 7, 0, "old")
    fill_with_persistent(guest)

    reply = guest.put(PERSISTENT, 7, 0, "new")

    assert (reply.status, reply.reason) == (Status.ENOSPC, Reason.DUPLICATE_FLUSHED)
    assert guest.get(PERSISTENT, 7, 0) == [None]


def test_rule_5_put_put_get_never_returns_the_first(guest: Guest) -> None:
    """Nor after eviction made room in between."""
    for number in range(400):
        guest.put(EPHEMERAL, 7, number % 3, f"version {number}")
        guest.put(EPHEMERAL, 8, number, "pressure")

    assert guest.get(EPHEMERAL, 7, 0, 3) == ["version 399", "version 397", "version 398"]


def test_rule_5_get_get_after_a_miss_misses(guest: Guest) -> None:
    """Until a new put."""
    guest.put(EPHEMERAL, 1, 0, "other")

    assert guest.get(EPHEMERAL, 7, 0) == guest.get(EPHEMERAL, 7, 0) == [None]
    guest.put(EPHEMERAL, 7, 0, "a")
    assert guest.get(EPHEMERAL, 7, 0) == ["a"]


def test_rule_6_a_refused_persistent_put_loses_no_accepted_page(guest: Guest) -> None:
    """Full of persistent pages: refused with the reason, all accepted pages still there."""
    guest.put(PERSISTENT, 7, 0, "kept")
    fill_with_persistent(guest)

    reply = guest.put(PERSISTENT, 8, 0, "too much")

    assert (reply.status, reply.reason, reply.map) == (Status.ENOMEM, Reason.OVER_ALLOTMENT, 0)
    assert guest.get(PERSISTENT, 7, 0) == ["kept"]
    reply = guest.put(EPHEMERAL, 8, 0, "too much")
    assert (reply.status, reply.reason, reply.map) == (Status.ENOMEM, Reason.NO_MEMORY, 0)


def test_rule_6_ephemeral_pages_make_room_for_persistent_ones(guest: Guest) -> None:
    """A persistent put succeeds as long as anything ephemeral is left."""
    store = guest.machine.store
    for index in range(0, 128, 64):
        guest.put(EPHEMERAL, 5, index, *["e"] * 64)

    fill_with_persistent(guest)
    more = store.frames.count_kind(FRAME_EPHEMERAL)
    assert more
    evicted = store.evictions
    for index in range(more):
        assert guest.put(PERSISTENT, 6, index, "p").status == Status.DONE

    assert store.frames.count_kind(FRAME_EPHEMERAL) == 0
    assert store.evictions == evicted + more


def test_rule_7_flush_of_what_is_absent_succeeds(guest: Guest) -> None:
    """Page and object."""
    assert guest.call(Op.FLUSH_PAGE, EPHEMERAL, 7, 0, 64).status == Status.DONE
    assert guest.call(Op.FLUSH_OBJECT, EPHEMERAL, 7).status == Status.DONE


def test_rule_8_destroying_a_pool_drops_its_pages_and_frees_its_number(guest: Guest) -> None:
    """A new pool under the same number starts empty, even before the old frames are reaped."""
    guest.put(EPHEMERAL, 7, 0, "a", "b")

    assert guest.call(Op.DESTROY_POOL, EPHEMERAL).status == Status.DONE
    assert guest.call(Op.GET_PAGE, EPHEMERAL, 7, 0, 1).status == Status.ENODEV
    assert guest.call(Op.NEW_POOL, pool_flag_word()).value == EPHEMERAL
    assert guest.get(EPHEMERAL, 7, 0, 2) == [None, None]
    guest.put(EPHEMERAL, 7, 0, "new")
    assert guest.machine.store.reap() == 2
    assert guest.get(EPHEMERAL, 7, 0) == ["new"]


# --- results of 1.3


def test_version_answers_spec_and_revision(guest: Guest) -> None:
    """So that a client can refuse to go on."""
    assert guest.call(Op.VERSION).value == SPEC_VERSION << 32 | ABI_REVISION


def test_get_from_an_empty_pool_answers_eempty(guest: Guest) -> None:
    """And from a pool with other pages a plain miss."""
    assert guest.call(Op.GET_PAGE, EPHEMERAL, 7, 0, 1).status == Status.EEMPTY
    guest.put(EPHEMERAL, 8, 0, "a")
    assert guest.call(Op.GET_PAGE, EPHEMERAL, 7, 0, 1).status == Status.MISS


@pytest.mark.parametrize("pool", [2, POOLS_PER_GUEST - 1, POOLS_PER_GUEST, 2**31, 2**32 - 1])
def test_a_pool_that_was_not_made_is_enodev(guest: Guest, pool: int) -> None:
    """Numbers out of range, or negative in 32 bits, are like any other (CVE-2012-6035)."""
    for op, count in ((Op.PUT_PAGE, 1), (Op.GET_PAGE, 1), (Op.FLUSH_PAGE, 1), (Op.FLUSH_OBJECT, 0)):
        reply = guest.call(op, pool, 7, 0, count)
        assert (reply.status, reply.reason) == (Status.ENODEV, Reason.NO_SUCH_POOL)
    assert guest.call(Op.DESTROY_POOL, pool).status == Status.MISS


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (0, Reason.BAD_SPEC_VERSION),
        (2 << 24, Reason.BAD_SPEC_VERSION),
        (pool_flag_word() | 1 << 4, Reason.BAD_PAGE_SIZE),
        (pool_flag_word() | 3 << 8, Reason.BAD_POOL_FLAGS),
        (pool_flag_word() | 1 << 10, Reason.BAD_POOL_FLAGS),
        (pool_flag_word() | 1 << 23, Reason.BAD_POOL_FLAGS),
        (pool_flag_word() | 1 << 3, Reason.BAD_POOL_FLAGS),
        (pool_flag_word() | PoolFlag.PRECOMPRESSED, Reason.BAD_POOL_FLAGS),
    ],
)
def test_wrong_pool_flags_are_faults(guest: Guest, word: int, reason: Reason) -> None:
    """Each with its own reason; nothing is made."""
    reply = guest.call(Op.NEW_POOL, word)

    assert (reply.status, reply.reason, reply.flags) == (Status.EINVAL, reason, ReplyFlag.FAULT)
    assert len(guest.client.members) == 2


def test_a_shared_pool_is_refused_aloud(guest: Guest) -> None:
    """Xen made it private and said nothing (rule 9)."""
    reply = guest.call(Op.NEW_POOL, pool_flag_word(shared=True), b"\1" * 16 + bytes(8))

    assert (reply.status, reply.reason) == (Status.EPERM, Reason.SHARED_DENIED)
    reply = guest.call(Op.NEW_POOL, pool_flag_word(shared=True), b"\xff" * 16 + bytes(8))
    assert (reply.status, reply.reason) == (Status.EPERM, Reason.SHARED_NEEDS_UUID)
    assert len(guest.client.members) == 2


def test_pool_numbers_run_out_with_a_reason(guest: Guest) -> None:
    """At POOLS_PER_GUEST; a destroyed number is given out again."""
    for _ in range(POOLS_PER_GUEST - 2):
        assert guest.call(Op.NEW_POOL, pool_flag_word()).status == Status.DONE

    reply = guest.call(Op.NEW_POOL, pool_flag_word())

    assert (reply.status, reply.reason) == (Status.EPERM, Reason.TOO_MANY_POOLS)
    guest.call(Op.DESTROY_POOL, 17)
    assert guest.call(Op.NEW_POOL, pool_flag_word()).value == 17


def test_the_guest_table_runs_out_without_harm(machine: Machine) -> None:
    """Guest 257 is turned away, and a departure makes room."""
    clients = [machine.attach(f"g{n}", 1, 1, 0) for n in range(GUESTS_MAX)]
    assert None not in clients
    assert machine.attach("one-more", 1, 1, 0) is None

    first = clients[0]
    assert first is not None
    machine.depart(first)
    assert machine.attach("one-more", 1, 1, 0) is not None


# --- faults


@pytest.mark.parametrize(
    ("request_fields", "reason"),
    [
        ({"op": 0}, Reason.UNKNOWN_OP),
        ({"op": 3}, Reason.UNKNOWN_OP),
        ({"op": 255}, Reason.UNKNOWN_OP),
        ({"op": Op.PUT_PAGE, "count": 0}, Reason.BAD_COUNT),
        ({"op": Op.PUT_PAGE, "count": 65}, Reason.BAD_COUNT),
        ({"op": Op.GET_PAGE, "count": 65535}, Reason.BAD_COUNT),
        ({"op": Op.PUT_PAGE, "count": 1, "slot": WINDOW_SLOTS}, Reason.BAD_SLOT),
        ({"op": Op.GET_PAGE, "count": 2, "slot": WINDOW_SLOTS - 1}, Reason.BAD_SLOT),
        ({"op": Op.GET_PAGE, "count": 1, "slot": 2**64 - 1}, Reason.BAD_SLOT),
        ({"op": Op.GET_PAGE, "count": 2, "index": 2**32 - 1}, Reason.BAD_INDEX),
        ({"op": Op.FLUSH_PAGE, "count": 2, "index": 2**32 - 1}, Reason.BAD_INDEX),
        ({"op": Op.FLUSH_PAGE, "count": 1, "slot": 1}, Reason.BAD_SLOT),
        ({"op": Op.PUT_PAGE, "count": 1, "oid": INVALID_OID}, Reason.INVALID_OID),
        ({"op": Op.FLUSH_OBJECT, "oid": INVALID_OID}, Reason.INVALID_OID),
        ({"op": Op.PUT_PAGE, "count": 1, "flags": CallFlag.KEEP}, Reason.BAD_FLAGS),
        ({"op": Op.PUT_PAGE, "count": 1, "flags": CallFlag.LOW | CallFlag.HIGH}, Reason.BAD_FLAGS),
        ({"op": Op.PUT_PAGE, "count": 1, "flags": 16}, Reason.BAD_FLAGS),
        ({"op": Op.GET_PAGE, "count": 1, "flags": CallFlag.ACTIVE}, Reason.BAD_FLAGS),
        ({"op": Op.FLUSH_PAGE, "count": 1, "flags": CallFlag.KEEP}, Reason.BAD_FLAGS),
        ({"op": Op.NEW_POOL, "pool": pool_flag_word(), "flags": 1}, Reason.BAD_FLAGS),
        ({"op": Op.PUT_PAGE, "count": 1, "reserved": 1}, Reason.RESERVED_BITS),
        ({"op": Op.DESTROY_POOL, "index": 1}, Reason.RESERVED_BITS),
        ({"op": Op.VERSION, "pool": 1}, Reason.RESERVED_BITS),
        ({"op": Op.PUT_BATCH, "count": 0}, Reason.BAD_COUNT),
        ({"op": Op.NEW_POOL, "pool": pool_flag_word(), "oid": b"\1" * 24}, Reason.RESERVED_BITS),
    ],
)
def test_a_broken_rule_is_a_fault_without_effect(
    guest: Guest, request_fields: dict[str, int], reason: Reason
) -> None:
    """The guest learns the reason, the fault is counted, its pages are untouched."""
    guest.put(PERSISTENT, 7, 0, "kept")
    fields = dict(request_fields)

    reply = guest.call(fields.pop("op"), **fields)

    assert (reply.reason, reply.flags, reply.map) == (reason, ReplyFlag.FAULT, 0)
    assert reply.status in (Status.EINVAL, Status.ENOSYS)
    assert guest.client.account.faults == {reason: 1}
    assert guest.get(PERSISTENT, 7, 0) == ["kept"]


@pytest.mark.parametrize("length", [0, 1, 3, 63])
def test_a_short_message_is_a_fault(guest: Guest, length: int) -> None:
    """Whatever its length; the reply names it."""
    reply = guest.raw(bytes(length))

    assert (reply.reason, reply.flags) == (Reason.BAD_LENGTH, ReplyFlag.FAULT)


# --- extents and batches


def test_an_extent_crosses_leaves(guest: Guest) -> None:
    """64 pages from index 40 on live in two leaves and come back in order."""
    texts = [f"page {n}" for n in range(64)]
    assert guest.put(PERSISTENT, 7, 40, *texts).map == 2**64 - 1

    assert guest.get(PERSISTENT, 7, 40, 64) == texts
    assert guest.get(PERSISTENT, 7, 30, 12) == [None] * 10 + texts[:2]


def test_the_last_index_is_a_page_like_any_other(guest: Guest) -> None:
    """Index 2**32 - 1, alone and as the end of an extent."""
    guest.put(EPHEMERAL, 7, 2**32 - 2, "a", "b")

    assert guest.get(EPHEMERAL, 7, 2**32 - 1) == ["b"]
    assert guest.get(EPHEMERAL, 7, 2**32 - 2) == ["a"]


def test_a_partial_hit_says_which_pages(guest: Guest) -> None:
    """Status MISS is that of the first page that is not there; the map has the others."""
    guest.put(EPHEMERAL, 7, 0, "a")
    guest.put(EPHEMERAL, 7, 2, "c", "d")

    reply = guest.call(Op.GET_PAGE, EPHEMERAL, 7, 0, 5)

    assert (reply.status, reply.map) == (Status.MISS, 0b01101)


def test_an_extent_that_fits_in_part_drops_older_copies_of_the_rest(guest: Guest) -> None:
    """At the allotment a put goes page by page: the frame of the copy that was dropped serves the
    page behind it."""
    guest.put(PERSISTENT, 7, 2, "old 2")
    while guest.machine.store.frames.free > 2:
        guest.put(PERSISTENT, 1000, guest.machine.store.frames.free, "x")

    reply = guest.put(PERSISTENT, 7, 0, "new 0", "new 1", "new 2", "new 3")

    assert (reply.status, reply.reason) == (Status.ENOSPC, Reason.DUPLICATE_FLUSHED)
    assert reply.map == 0b1011
    assert guest.get(PERSISTENT, 7, 0, 4) == ["new 0", "new 1", None, "new 3"]


def test_a_batch_moves_unrelated_pages_in_order(guest: Guest) -> None:
    """Two puts of one handle in one batch: the second is the page."""
    for slot, text in enumerate(("a", "b", "c")):
        guest.window.slot(slot)[:] = text.encode().ljust(PAGE_BYTES)
    entry = (EPHEMERAL, 5, 0, 0, oid_from_int(7), 0)
    other = (PERSISTENT, 9, 2, 0, oid_from_int(8), 0)
    guest.window.write_table([entry, (EPHEMERAL, 5, 1, 0, oid_from_int(7), 0), other])

    assert guest.call(Op.PUT_BATCH, count=3).map == 0b111
    assert guest.get(EPHEMERAL, 7, 5) == ["b"]
    assert guest.get(PERSISTENT, 8, 9) == ["c"]


def test_a_batch_goes_on_after_a_refused_entry(guest: Guest) -> None:
    """The status is the first failure's, the map has what was done."""
    guest.put(PERSISTENT, 8, 9, "c")
    guest.window.write_table(
        [(33, 0, 0, 0, oid_from_int(1), 0), (PERSISTENT, 9, 1, 0, oid_from_int(8), 0)]
    )

    reply = guest.call(Op.GET_BATCH, count=2)

    assert (reply.status, reply.reason, reply.map) == (Status.ENODEV, Reason.NO_SUCH_POOL, 0b10)
    assert bytes(guest.window.slot(1)).rstrip() == b"c"
    assert guest.call(Op.FLUSH_BATCH, count=2).reason == Reason.BAD_SLOT


def test_a_bad_batch_entry_faults_the_whole_batch(guest: Guest) -> None:
    """Checked before the first entry is executed."""
    good = (EPHEMERAL, 5, 0, 0, oid_from_int(7), 0)
    guest.window.write_table([good, (EPHEMERAL, 5, WINDOW_SLOTS, 0, oid_from_int(7), 0)])

    assert guest.call(Op.PUT_BATCH, count=2).reason == Reason.BAD_SLOT
    assert guest.get(EPHEMERAL, 7, 5) == [None]


# --- guests among themselves


def test_guests_do_not_see_each_other(machine: Machine, guest: Guest) -> None:
    """The same handle names another page in another guest."""
    other = Guest(machine, "other")
    other.call(Op.NEW_POOL, pool_flag_word(persist=True))
    guest.put(PERSISTENT, 7, 0, "mine")
    other.put(0, 7, 0, "theirs")

    assert guest.get(PERSISTENT, 7, 0) == ["mine"]
    assert other.get(0, 7, 0) == ["theirs"]
    assert other.call(Op.GET_PAGE, PERSISTENT, 7, 0, 1).status == Status.ENODEV


def test_a_departed_guest_gives_everything_back_in_slices(machine: Machine, guest: Guest) -> None:
    """Its frames are freed a slice at a time and nobody else's with them."""
    other = Guest(machine, "other")
    other.call(Op.NEW_POOL, pool_flag_word(persist=True))
    other.put(0, 7, 0, "theirs")
    guest.put(EPHEMERAL, 7, 0, *["a"] * 64)
    guest.put(PERSISTENT, 7, 0, *["b"] * 20)
    free = machine.store.frames.free

    machine.depart(guest.client)

    assert machine.store.frames.free == free
    while machine.store.doomed:
        assert machine.store.reap(8) <= 64
        check(machine)
    assert machine.store.frames.free == free + 84
    assert other.get(0, 7, 0) == ["theirs"]


def test_doomed_pages_are_used_before_anything_is_evicted(machine: Machine, guest: Guest) -> None:
    """A flushed object's frames serve the next put though nobody reaped them yet."""
    while machine.store.frames.free > 64:
        guest.put(EPHEMERAL, 3, machine.store.frames.free, "e")
    guest.put(EPHEMERAL, 4, 0, *["x"] * machine.store.frames.free)
    guest.call(Op.FLUSH_OBJECT, EPHEMERAL, 4)

    guest.put(EPHEMERAL, 5, 0, *["y"] * 60)

    assert machine.store.evictions == 0


def test_sparse_objects_do_not_make_leaves_pile_up(guest: Guest) -> None:
    """A guest that touches one page in each of 20,000 leaves leaves no empty leaf behind (checked
    by the invariants after each call): metadata is bounded by the pages that are there."""
    for number in range(0, 20_000 * 64, 64 * 40):
        guest.put(EPHEMERAL, 1, number, "x")

    (found,) = guest.client.members[EPHEMERAL].pool.objects.values()
    assert len(list(found.leaves())) == found.pages <= guest.machine.store.frames.count


# --- counts


def test_counters_count_pages_and_outcomes(guest: Guest) -> None:
    """Linux's four names, in pages."""
    guest.put(EPHEMERAL, 1, 0, "a", "b", "c")
    guest.get(EPHEMERAL, 1, 1, 4)
    guest.call(Op.FLUSH_PAGE, EPHEMERAL, 1, 0, 2)
    guest.call(Op.FLUSH_OBJECT, EPHEMERAL, 1)

    assert guest.client.account.cleancache() == {
        "succ_gets": 2,
        "failed_gets": 2,
        "puts": 3,
        "invalidates": 3,
    }
    flush = guest.client.account.operations[Op.FLUSH_PAGE]
    assert (flush.calls, flush.pages, flush.done, flush.missed) == (1, 2, 1, 1)
