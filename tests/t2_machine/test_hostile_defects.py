"""Hostile guests: the other defects that Xen's tmem really had, one test a row.

Each is named after the commit that mended it there.  Against a real hypervisor over either
transport, while a second guest goes on verifying its pages (`tests.support.hostile`).
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.adversaries.raw import page_of
from ipc.abi import (
    BATCH_ENTRY,
    OID_BYTES,
    PAGE_BYTES,
    Op,
    Reason,
    ReplyFlag,
    Status,
    oid_from_int,
)
from ipc.errors import OperatorError
from ipc.limits import POOLS_PER_GUEST, WINDOW_BYTES, WINDOW_SLOTS, WINDOW_SLOTS_OFFSET
from tests.support.hostile import (
    NO_UUID,
    SHARED_UUID,
    TRANSPORTS,
    Attacker,
    Siege,
    assert_fault,
    besieged,
    until,
)

XEN_AUTH, XEN_RESTORE_NEW = 101, 102
FALLOC_FL_PUNCH_HOLE = 3  # with FALLOC_FL_KEEP_SIZE; include/uapi/linux/falloc.h
UUIDS = [bytes([number]) * 16 for number in range(1, 5)]


@pytest.fixture(scope="module", params=TRANSPORTS)
def siege(
    request: pytest.FixtureRequest,
    new_cluster_name: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Siege]:
    """One hypervisor for all tests of a transport; each has guests of its own."""
    with besieged(new_cluster_name(), tmp_path_factory.mktemp("defects"), request.param) as siege:
        yield siege


@pytest.fixture
def attacker(siege: Siege) -> Iterator[Attacker]:
    """A guest that leaves in the end, after which the witness is asked."""
    with siege.attacking() as attacker:
        yield attacker
    siege.unharmed()


def punch(attacker: Attacker) -> None:
    """Make holes in the guest's window: its pages read as zeros until somebody writes them."""
    libc_fallocate(attacker.window.fd, WINDOW_SLOTS_OFFSET, WINDOW_SLOTS * PAGE_BYTES)


def libc_fallocate(fd: int, start: int, length: int) -> None:
    """fallocate(2) with the mode that Python does not offer."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    result = fallocate(
        fd, FALLOC_FL_PUNCH_HOLE, ctypes.c_longlong(start), ctypes.c_longlong(length)
    )
    assert result == 0, os.strerror(ctypes.get_errno())


def test_9b0bd3d732_frames_that_do_not_exist_or_vanish(siege: Siege, attacker: Attacker) -> None:
    """A guest named frames that were not its own, and freed its page while Xen copied it.  Here a
    frame is a slot of the window, whose number is checked, and the window can't shrink
    (`test_hostile_window`).  What a guest can do is to punch its pages out while they are copied:
    it gets zeros or what it had."""
    pool = attacker.pool(persist=True)
    for slot in (64, 1 << 20, 1 << 36, -1):
        for op in (Op.PUT_PAGE, Op.GET_PAGE):
            reply = attacker.call(op, pool=pool, oid=1, count=1, slot=slot)
            assert_fault(reply, Reason.BAD_SLOT)
    stop = threading.Event()

    def vanish() -> None:
        while not stop.is_set():
            punch(attacker)

    thread = threading.Thread(target=vanish)
    thread.start()
    try:
        page = page_of("vanishing")
        for _ in range(150):
            attacker.window.slots[:] = page * WINDOW_SLOTS
            reply = attacker.call(Op.PUT_PAGE, pool=pool, oid=1, count=64)
            assert reply.status == Status.DONE
            assert attacker.call(Op.GET_PAGE, pool=pool, oid=1, count=64).status == Status.DONE
    finally:
        stop.set()
        thread.join()
    for index in range(64):
        found = attacker.get(pool, 1, index)
        assert found is not None
        assert all(
            found[at : at + 64] in (page[at : at + 64], bytes(64)) for at in range(0, 4096, 64)
        )


def test_b85a0ab122_clients_and_pools_that_are_gone(siege: Siege, attacker: Attacker) -> None:
    """Save asked for an unknown client or pool and met a NULL pointer.  Every operation on a pool
    that was destroyed, of the guest itself and of one that has left; and the administrator's
    questions about either."""
    pool = attacker.pool(persist=True)
    attacker.put(pool, 1, 0, page_of("gone"))
    attacker.call(Op.DESTROY_POOL, pool=pool)

    for op in (Op.PUT_PAGE, Op.GET_PAGE, Op.FLUSH_PAGE):
        assert attacker.call(op, pool=pool, oid=1, count=1).reason == Reason.NO_SUCH_POOL
    assert attacker.call(Op.FLUSH_OBJECT, pool=pool, oid=1).reason == Reason.NO_SUCH_POOL
    with siege.attacking() as other:
        other.put(other.pool(persist=True), 1, 0, page_of("gone"))
        name = other.name
    for verb, fields in (
        ("list", {"guest": name}),
        ("pools", {"guest": name}),
        ("destroy", {"guest": name}),
        ("destroy", {"guest": attacker.name, "pool": pool}),
        ("set", {"guest": attacker.name, "pool": pool, "weight": 1}),
        ("flush", {"guest": name, "size_bytes": 4096}),
    ):
        assert "error" in siege.ask(verb, **fields)


def test_1144c8f12b_no_guest_can_authorize(siege: Siege, attacker: Attacker) -> None:
    """Any guest could call TMEM_AUTH, and with client id 0xFFFF it opened all shared pools to
    everybody."""
    grants = siege.ask("auth", action="list")
    assert attacker.new_pool(uuid=SHARED_UUID).reason == Reason.SHARED_DENIED

    for number in (0, 1, 2, 0xFFFF):
        for fields in ({"index": number}, {"pool": number}, {"pool": 1, "index": number}):
            reply = attacker.call(XEN_AUTH, oid=SHARED_UUID + bytes(8), **fields)
            assert_fault(reply, Reason.UNKNOWN_OP)

    assert attacker.new_pool(uuid=SHARED_UUID).reason == Reason.SHARED_DENIED
    assert siege.ask("auth", action="list") == grants
    denials = [
        line
        for line in siege.audit()
        if f"guest={attacker.name} event=denied reason=shared_denied" in line
    ]
    assert len(denials) == 2
    assert SHARED_UUID.hex() in denials[0]


def test_8cd9fa11e1_no_guest_can_make_pools_for_another(siege: Siege, attacker: Attacker) -> None:
    """Any guest could call TMEM_RESTORE_NEW and name the client that was to get the pool."""

    def pools() -> dict[str, list[int]]:
        guests = siege.ask("list")["guests"]
        return {name: [pool["id"] for pool in one["pools"]] for name, one in guests.items()}

    before = pools()
    ids = [siege.guest(name)["id"] for name in ("witness", "friend")]
    for number in {*ids, 1, 2, 0xFFFF} - {0}:
        for fields in ({"index": number}, {"pool": number}, {"oid": number}):
            assert_fault(attacker.call(XEN_RESTORE_NEW, **fields), Reason.UNKNOWN_OP)
        # The guest's number has no place in a call; where it would be is a fault.
        assert_fault(attacker.call(Op.NEW_POOL, pool=1 << 24, oid=NO_UUID, index=number))
        assert_fault(attacker.call(Op.NEW_POOL, pool=1 << 24, oid=NO_UUID, token=number))
    assert pools() == before


def test_7ec4b2f89e_shared_pools_of_one_and_two_of_one_guest(siege: Siege) -> None:
    """A shared pool with a single member, or two shared pools in one guest, left a dangling pointer
    that listing or destroying followed.  All orders of leaving, listed at every step."""
    random_order = random.Random(1)
    name = siege.new_name("sharer")
    for uuid in UUIDS:
        siege.allow(name, uuid)
        siege.allow(f"{name}b", uuid)

    def look() -> None:
        siege.ask("list")
        assert "pools" in siege.ask("pools")
        assert "pools" in siege.ask("pools", guest=name)

    for _ in range(6):
        with siege.attacking(name) as first, siege.attacking(f"{name}b") as second:
            joined = [(first, first.pool(uuid=UUIDS[0]))]
            look()
            joined += [(first, first.pool(uuid=uuid)) for uuid in UUIDS]
            joined += [(first, first.pool(uuid=UUIDS[1])), (second, second.pool(uuid=UUIDS[1]))]
            look()
            for guest, pool in joined:
                assert guest.put(pool, 1, pool, page_of(pool)).status == Status.DONE
            random_order.shuffle(joined)
            for guest, pool in joined:
                assert guest.call(Op.DESTROY_POOL, pool=pool).status == Status.DONE
                look()
    siege.unharmed()


def test_0f496f4bb7_object_ids_that_differ_in_one_bit(attacker: Attacker) -> None:
    """The comparison of object ids compared a word with itself, so ids that differed in one of the
    three words were one object.  Each of 192 bits tells two objects apart."""
    pool = attacker.pool(persist=True)
    base = int.from_bytes(os.urandom(OID_BYTES - 1), "little")
    oids = [base ^ 1 << bit for bit in range(192)]
    for start in range(0, 192, 64):
        table = [
            (pool, 0, slot, 0, oid_from_int(oid), 0)
            for slot, oid in enumerate(oids[start : start + 64])
        ]
        for slot, oid in enumerate(oids[start : start + 64]):
            attacker.window.slot(slot)[:] = page_of(oid)
        attacker.window.write_table(table)
        assert attacker.call(Op.PUT_BATCH, count=64).status == Status.DONE

    assert attacker.get(pool, base, 0) is None
    for oid in oids:
        assert attacker.get(pool, oid, 0) == page_of(oid)
    assert attacker.call(Op.FLUSH_OBJECT, pool=pool, oid=oids[0]).value == 1
    assert attacker.get(pool, oids[0], 0) is None
    assert attacker.get(pool, oids[1], 0) == page_of(oids[1])


def fill_and_verify(attacker: Attacker, pool: int, seed: int, *, pages_max: int) -> int:
    """Put pages of every kind, many of them twice, until some are refused; every page that was
    said to be stored is there, and one that was refused is not.  How many were refused."""
    choose = random.Random(seed)
    stored: dict[int, bytes | None] = {}
    for start in range(0, pages_max, 64):
        pages = [
            choose.choice(
                (
                    page_of("twin", choose.randrange(8)),
                    page_of("single", start, number),
                    bytes([number]) * PAGE_BYTES,
                    b"shrinks %6d" % choose.randrange(40) * 315 + bytes(316),
                )
            )[:PAGE_BYTES]
            for number in range(64)
        ]
        attacker.window.slots[:] = b"".join(pages)
        reply = attacker.call(Op.PUT_PAGE, pool=pool, oid=7, index=start, count=64)
        assert reply.status in (Status.DONE, Status.ENOMEM, Status.ENOSPC)
        for at, page in enumerate(pages):
            stored[start + at] = page if reply.map >> at & 1 else None
    for index, expected in stored.items():
        assert attacker.get(pool, 7, index) == expected
    return list(stored.values()).count(None)


def test_2cb8e71744_eb4bf0683e_sharing_out_of_memory_and_off(siege: Siege) -> None:
    """Out of memory while pages were deduplicated was told as success, so the page was lost; and
    with deduplication off a lock was given back that nobody held.  Sharing and compression go on
    and off while persistent pages fill all that the guest may have; cheap ones that are replaced by
    dear ones do not take it further."""
    with siege.attacking() as attacker:
        pool = attacker.pool(persist=True)
        modes: list[dict[str, Any]] = [
            {"sharing": "guest", "compress": False},
            {"sharing": "off", "compress": True},
            {"sharing": "all", "compress": True},
            {"sharing": "off", "compress": False},
        ]
        refusals = []
        for seed, mode in enumerate(modes):
            assert "error" not in siege.ask("set", guest=attacker.name, **mode)
            refusals.append(fill_and_verify(attacker, pool, seed, pages_max=2304))
        assert refusals[-1], "all that it may have was not enough"
        record = siege.guest(attacker.name)
        assert record["cost_bytes"] <= record["allotment_bytes"] + PAGE_BYTES
        siege.ask("set", guest=attacker.name, **modes[2])
        fill_and_verify(attacker, pool, 9, pages_max=1024)
    siege.unharmed()


RACER = """
choose = random.Random(int(arguments[0]))
pools = [attacker.pool(persist=number % 2 == 0) for number in range(4)]
pools.append(attacker.pool(uuid=bytes([1]) * 16))
say("racing")
while True:
    pool = choose.choice(pools)
    op = choose.choice((Op.PUT_PAGE,) * 4 + (Op.GET_PAGE, Op.FLUSH_PAGE, Op.FLUSH_OBJECT))
    fields = {} if op == Op.FLUSH_OBJECT else {"index": choose.randrange(200), "count": 32}
    attacker.call(op, pool=pool, oid=choose.randrange(4), **fields)
    if choose.random() < 0.02:
        attacker.call(Op.DESTROY_POOL, pool=pools.pop(0))
        pools.append(attacker.pool(persist=choose.random() < 0.5))
"""


def test_2009_2010_death_at_any_moment_frees_each_page_once(siege: Siege) -> None:
    """Double frees, leaked references and races with a dying domain (six commits).  Guests are
    killed in the middle of everything, one of them in a pool that another goes on sharing; when all
    have gone, not a frame is missing."""
    until(lambda: not siege.ask("stats")["guests"].keys() - {"witness", "friend"}, "all have left")
    names = [siege.new_name("racer") for _ in range(4)]
    for name in names:
        siege.allow(name, UUIDS[0])

    def used() -> int:
        arena = siege.ask("stats")["arena"]
        own = sum(siege.guest(name)["ephemeral_pages"] for name in ("witness", "friend"))
        own += siege.guest("witness")["persistent_pages"]
        return int(arena["frames"] - arena["free_frames"] - own)

    with siege.attacking(names[0]) as survivor:
        pool = survivor.pool(uuid=UUIDS[0])
        rogues = [
            siege.rogue(RACER, str(number), name=name) for number, name in enumerate(names[1:])
        ]
        for rogue in rogues:
            assert rogue.says() == "racing"
        siege.unharmed()
        for rogue in rogues:
            rogue.kill()
            assert survivor.put(pool, 9, 0, page_of("survivor")).status == Status.DONE
            assert survivor.get(pool, 9, 0) in (page_of("survivor"), None)
        siege.unharmed()
    until(lambda: used() == 0, "every frame is free or the witness's")


def test_c8e6ce764f_a_get_that_fails_takes_no_page(attacker: Attacker) -> None:
    """The result of the copy to the guest was not looked at, so a page that was got exclusively
    could be gone without having arrived.  Here a get that faults has done nothing, alone or in a
    batch in which another entry is broken."""
    pool = attacker.pool()
    page = page_of("c8e6ce764f")
    attacker.put(pool, 1, 0, page, page)

    assert_fault(attacker.call(Op.GET_PAGE, pool=pool, oid=1, count=2, slot=63))
    entries = b"".join(
        BATCH_ENTRY.pack(pool, index, slot, 0, oid_from_int(1), 0)
        for index, slot in ((0, 0), (1, 1), (2, 64))
    )
    attacker.window.table[: len(entries)] = entries
    assert_fault(attacker.call(Op.GET_BATCH, count=3), Reason.BAD_SLOT)

    # Ephemeral pages may vanish, but not all of these, with the arena as empty as it is.
    found = [attacker.get(pool, 1, index) for index in (0, 1)]
    assert found == [page, page]
    assert attacker.get(pool, 1, 0) is None


def test_2013_map_slots_are_given_back(siege: Siege) -> None:
    """Mapping a guest's page took one of few slots, which ran out.  Here a guest has one window for
    its life: attaching again and again leaves no mapping and no descriptor behind."""
    process = siege.hypervisor.process.pid

    def held() -> tuple[int, int]:
        maps = Path(f"/proc/{process}/maps").read_text()
        return maps.count("memfd:tmem-window"), len(os.listdir(f"/proc/{process}/fd"))

    with siege.attacking():
        pass
    before = held()
    name = siege.new_name()
    for _ in range(20):
        # The last attachment of a process replaces the one before; the last one says good-bye.
        attachments = [siege.attacker(name) for _ in range(3)]
        attachments.pop().detach()
        for replaced in attachments:
            replaced.channel.close()
    until(lambda: name not in siege.ask("stats")["guests"], "the guest departs")
    until(lambda: held() <= before, "windows and descriptors are closed")
    assert WINDOW_BYTES < 1 << 20
    siege.unharmed()


def test_a_denied_guest_gets_no_private_pool_instead(siege: Siege, attacker: Attacker) -> None:
    """Xen said nothing and made one; a guest that is not told can't be coherent."""
    for uuid in (SHARED_UUID, UUIDS[3], b"\xff" * 16):
        reply = attacker.new_pool(uuid=uuid)
        assert reply.status == Status.EPERM
        assert reply.flags == ReplyFlag.NONE
    assert siege.guest(attacker.name)["pools"] == []
    assert [attacker.pool() for _ in range(POOLS_PER_GUEST)] == list(range(POOLS_PER_GUEST))
    with pytest.raises(OperatorError, match="not enrolled"):
        siege.knock(attacker.name, bytes(32))
