"""Hostile guests: what lay hidden in Xen's tmem, and what there is only a limited number of.

One test for each thing that reading Xen's source showed (reference 3.4), and one for each thing
that a guest can use up: pools, memberships, sharers, objects.  Against a real hypervisor over
either transport, while a second guest goes on verifying its pages (`tests.support.hostile`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from guests.adversaries.raw import page_of
from hypervisor.arena import MEMBERS_MAX, SLOTS
from hypervisor.pools import SHARERS_MAX
from ipc.abi import PAGE_BYTES, Op, Reason, ReplyFlag, Status
from ipc.limits import POOLS_PER_GUEST
from tests.support.hostile import (
    SHARED_UUID,
    TRANSPORTS,
    Attacker,
    Siege,
    besieged,
    until,
)

UUIDS = [bytes([0xA0, number]) * 8 for number in range(32)]


@pytest.fixture(scope="module", params=TRANSPORTS)
def siege(
    request: pytest.FixtureRequest,
    new_cluster_name: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Siege]:
    """One hypervisor for all tests of a transport; each has guests of its own."""
    with besieged(new_cluster_name(), tmp_path_factory.mktemp("latent"), request.param) as siege:
        yield siege


@pytest.fixture
def attacker(siege: Siege) -> Iterator[Attacker]:
    """A guest that leaves in the end, after which the witness is asked."""
    with siege.attacking() as attacker:
        yield attacker
    siege.unharmed()


@pytest.fixture
def victim(siege: Siege) -> Iterator[Attacker]:
    """A guest that means no harm and shares a pool with one that does."""
    with siege.attacking(siege.new_name("victim")) as victim:
        yield victim


def share(siege: Siege, uuid: bytes, *guests: Attacker, persist: bool = False) -> list[int]:
    """Let guests share a pool, as writers; their ids for it."""
    for guest in guests:
        siege.allow(guest.name, uuid)
    return [guest.pool(persist=persist, uuid=uuid) for guest in guests]


def own_pages(siege: Siege, name: str) -> int:
    """Pages that a guest is charged for."""
    record = siege.guest(name)
    return int(record["ephemeral_pages"] + record["persistent_pages"])


def fill(attacker: Attacker, pool: int, pages: int, oid: int = 77) -> int:
    """Put as many raw pages; how many were stored."""
    for slot in range(64):
        attacker.window.slot(slot)[:] = page_of("filling", slot)
    stored = 0
    for start in range(0, pages, 64):
        count = min(64, pages - start)
        reply = attacker.call(Op.PUT_PAGE, pool=pool, oid=oid, index=start, count=count)
        stored += reply.map.bit_count()
    return stored


# --- 3.4


def test_3_4_1_a_pool_that_could_not_be_made_leaves_no_slot(
    siege: Siege, attacker: Attacker
) -> None:
    """When NEW_POOL failed late, the slot pointed at a freed pool.  Every way for it to fail, with
    the last slot free and with none: the ids in use stay what they were and the next pool has the
    next one."""
    siege.allow(attacker.name, UUIDS[0])
    assert [attacker.pool() for _ in range(POOLS_PER_GUEST - 1)] == [*range(POOLS_PER_GUEST - 1)]
    for round_ in range(2):
        for persist, uuid, reason in (
            (False, SHARED_UUID, Reason.SHARED_DENIED),
            (False, b"\xff" * 16, Reason.SHARED_NEEDS_UUID),
            (False, UUIDS[1], Reason.SHARED_DENIED),
        ):
            reply = attacker.new_pool(persist=persist, uuid=uuid)
            assert reply.status == Status.EPERM
            assert reply.reason == (Reason.TOO_MANY_POOLS if round_ else reason)
        last = POOLS_PER_GUEST - 1
        reply = attacker.call(Op.GET_PAGE, pool=last, oid=1, count=1)
        assert (reply.reason == Reason.NO_SUCH_POOL) == (round_ == 0)
        if round_ == 0:
            assert attacker.pool(persist=True) == last
            assert attacker.put(last, 1, 0, page_of("last")).status == Status.DONE
    assert attacker.new_pool().reason == Reason.TOO_MANY_POOLS
    assert attacker.call(Op.DESTROY_POOL, pool=13).status == Status.DONE
    assert attacker.pool(uuid=UUIDS[0]) == 13
    assert attacker.new_pool(persist=True, uuid=UUIDS[0]).reason == Reason.TOO_MANY_POOLS
    assert attacker.call(Op.DESTROY_POOL, pool=14).status == Status.DONE
    assert attacker.new_pool(persist=True, uuid=UUIDS[0]).reason == Reason.KIND_DIFFERS
    assert attacker.pool() == 14
    assert attacker.get(POOLS_PER_GUEST - 1, 1, 0) == page_of("last")


def test_3_4_2_sharer_leaving_pins_nothing(
    siege: Siege, attacker: Attacker, victim: Attacker
) -> None:
    """Any sharer that left marked the pool as dying, and nothing in it could be evicted any more:
    memory was pinned by joining and leaving.  What a leaver has put goes as soon as others need
    the room."""
    (pool,) = share(siege, UUIDS[2], victim)
    for round_ in range(8):
        (joined,) = share(siege, UUIDS[2], attacker)
        assert fill(attacker, joined, 256, oid=round_) == 256
        assert attacker.call(Op.DESTROY_POOL, pool=joined).status == Status.DONE
    frames = siege.ask("stats")["arena"]["frames"]

    private = victim.pool()
    assert fill(victim, private, 2 * frames) == 2 * frames
    left = sum(
        victim.call(Op.GET_PAGE, pool=pool, oid=oid, index=start, count=64).map.bit_count()
        for oid in range(8)
        for start in range(0, 256, 64)
    )
    assert left < 8 * 256 // 2


def test_3_4_3_a_shared_put_is_the_putters(
    siege: Siege, attacker: Attacker, victim: Attacker
) -> None:
    """Everything in a shared pool was charged to whoever had made it, whose quota and frozen flag
    counted, and who took it along.  Here the maker is frozen, capped and leaves: the other one's
    pages are its own, and stay."""
    made, joined = share(siege, UUIDS[3], victim, attacker)
    assert victim.put(made, 1, 0, page_of("victim")).status == Status.DONE
    before = own_pages(siege, victim.name)
    assert fill(attacker, joined, 128) == 128
    assert own_pages(siege, victim.name) == before
    assert own_pages(siege, attacker.name) == 128

    siege.ask("freeze", guest=victim.name)
    assert attacker.put(joined, 2, 0, page_of("putter")).status == Status.DONE
    assert victim.put(made, 3, 0, page_of("frozen")).reason == Reason.FROZEN
    siege.ask("thaw", guest=victim.name)
    siege.ask("freeze", guest=attacker.name)
    assert victim.put(made, 3, 0, page_of("thawed")).status == Status.DONE
    assert attacker.put(joined, 4, 0, page_of("frozen")).reason == Reason.FROZEN
    siege.ask("thaw", guest=attacker.name)

    # The page that was touched last by a leaver was destroyed with its object.
    assert attacker.get(joined, 1, 0) == page_of("victim")
    assert attacker.call(Op.DESTROY_POOL, pool=joined).status == Status.DONE
    assert victim.get(made, 1, 0) == page_of("victim")
    assert victim.get(made, 3, 0) == page_of("thawed")
    assert victim.get(made, 2, 0) == page_of("putter")


def test_3_4_3_leaving_spends_nothing_of_who_stays(
    siege: Siege, attacker: Attacker, victim: Attacker
) -> None:
    """A sharer that fills a persistent pool, leaves and comes back can't use up what another guest
    may hold, nor more of the arena than its own allotment."""
    made, _ = share(siege, UUIDS[4], victim, attacker, persist=True)
    allotment = siege.guest(attacker.name)["allotment_bytes"] // PAGE_BYTES
    stored = 0
    for round_ in range(6):
        attacker.call(Op.DESTROY_POOL, pool=0)
        (joined,) = share(siege, UUIDS[4], attacker, persist=True)
        stored += fill(attacker, joined, 2 * allotment, oid=100 + round_)
        assert victim.put(made, 1, round_, page_of("victim", round_)).status == Status.DONE
    assert stored <= allotment
    private = victim.pool(persist=True)
    assert fill(victim, private, 256) == 256
    for round_ in range(6):
        assert victim.get(made, 1, round_) == page_of("victim", round_)
    siege.unharmed()


def test_3_4_4_a_large_pool_goes_in_slices(siege: Siege, attacker: Attacker) -> None:
    """Destroying a pool and flushing an object walked every page under a lock.  Here they are done
    at once and the pages are freed in slices between other guests' calls: the answers to those
    come while some still wait.  `test_hostile_work` bounds a slice, `tools.bench.bounded` times
    them."""
    with siege.attacking(siege.new_name("other")) as other:
        kept = other.pool(persist=True)
        for op in (Op.DESTROY_POOL, Op.FLUSH_OBJECT):
            pool = attacker.pool(persist=True)
            for slot in range(64):
                attacker.window.slot(slot)[:] = bytes([slot]) * PAGE_BYTES
            pages = 24_000
            for start in range(0, pages, 64):
                reply = attacker.call(Op.PUT_PAGE, pool=pool, oid=1, index=start, count=64)
                assert reply.status == Status.DONE
            assert own_pages(siege, attacker.name) == pages
            fields = {"oid": 1} if op == Op.FLUSH_OBJECT else {}
            assert attacker.call(op, pool=pool, **fields).status == Status.DONE

            assert other.put(kept, 1, 0, page_of("between")).status == Status.DONE
            assert other.get(kept, 1, 0) == page_of("between")
            assert attacker.call(Op.VERSION).status == Status.DONE
            if op == Op.FLUSH_OBJECT:
                assert attacker.get(pool, 1, 0) is None
            until(lambda: own_pages(siege, attacker.name) == 0, "all of them are freed")


def test_3_4_5_a_reader_poisons_nothing(siege: Siege, attacker: Attacker, victim: Attacker) -> None:
    """Any sharer could put anything under any handle of a shared pool.  A reader can do nothing but
    get; it is told so, and each try is in the audit log.  A writer is trusted by who allows it:
    whose page it is can be seen (`list`), and its rights can be taken back at any time."""
    (written,) = share(siege, UUIDS[5], victim)
    siege.allow(attacker.name, UUIDS[5], "reader")
    reply = attacker.new_pool(uuid=UUIDS[5])
    assert reply.flags == ReplyFlag.READER | ReplyFlag.JOINED
    read = reply.value
    page = page_of("pure")
    assert victim.put(written, 1, 0, page).status == Status.DONE

    attacker.window.write_table([(read, 0, 0, 0, (1).to_bytes(24, "little"), 0)])
    for reply in (
        attacker.put(read, 1, 0, page_of("poison")),
        attacker.call(Op.FLUSH_PAGE, pool=read, oid=1, count=1),
        attacker.call(Op.FLUSH_OBJECT, pool=read, oid=1),
        attacker.call(Op.PUT_BATCH, count=1),
        attacker.call(Op.FLUSH_BATCH, count=1),
    ):
        assert (reply.status, reply.reason) == (Status.EPERM, Reason.NOT_WRITER)
    assert attacker.get(read, 1, 0) == page
    assert victim.get(written, 1, 0) == page
    denials = [line for line in siege.audit() if f"guest={attacker.name} event=denied" in line]
    assert len(denials) == 5

    siege.allow(attacker.name, UUIDS[5], "writer")
    assert attacker.put(read, 1, 0, page_of("poison")).status == Status.DONE
    assert victim.get(written, 1, 0) == page_of("poison")
    assert siege.guest(attacker.name)["pools"][0]["own_pages"] == 1, "it can be seen whose it is"
    siege.ask("auth", action="deny", guest=attacker.name, uuid=UUIDS[5].hex())
    assert attacker.put(read, 1, 0, page_of("again")).reason == Reason.SHARED_DENIED
    assert attacker.call(Op.GET_PAGE, pool=read, oid=1, count=1).reason == Reason.SHARED_DENIED
    assert victim.put(written, 1, 0, page).status == Status.DONE
    assert victim.get(written, 1, 0) == page


def test_3_4_6_no_answer_depends_on_what_others_hold(
    siege: Siege, attacker: Attacker, victim: Attacker
) -> None:
    """Hits, EEMPTY and the time of a put told what other guests did; equal pages were stored once
    for everybody.  Without a common group nothing is stored for two guests, whatever they set, and
    no answer differs by what another guest has put under the same handle."""
    secret = page_of("secret")
    for guest in (attacker, victim):
        siege.ask("set", guest=guest.name, sharing="group")
    answers = []
    for _ in range(2):
        pool = attacker.pool()
        answers.append(
            [
                attacker.call(Op.GET_PAGE, pool=pool, oid=1, count=1)[1:],
                attacker.put(pool, 2, 0, secret)[1:],
                attacker.call(Op.GET_PAGE, pool=pool, oid=1, count=1)[1:],
                attacker.call(Op.FLUSH_PAGE, pool=pool, oid=1, count=1)[1:],
                attacker.call(Op.FLUSH_OBJECT, pool=pool, oid=1)[1:],
                attacker.call(Op.DESTROY_POOL, pool=pool)[1:],
            ]
        )
        their = victim.pool()
        victim.put(their, 1, 0, secret)
        victim.put(their, 2, 0, secret)
        assert siege.ask("stats")["savings"]["shared"]["pages"] <= 1, "the victim's own"
    assert answers[0] == answers[1]


def test_3_4_7_the_heavier_guest_keeps_its_pages(
    siege: Siege, attacker: Attacker, victim: Attacker
) -> None:
    """Xen compared weights the wrong way round, so the heavy guest lost its pages.  Both put more
    than there is room for; the light one can't push the heavy one out by being busy."""
    siege.ask("set", guest=victim.name, weight=900)
    siege.ask("set", guest=attacker.name, weight=100)
    siege.ask("schedule", mode="static")
    frames = siege.ask("stats")["arena"]["frames"]
    heavy, light = victim.pool(), attacker.pool()
    fill(victim, heavy, frames)
    for _ in range(3):
        fill(attacker, light, frames)
    assert own_pages(siege, victim.name) > 4 * own_pages(siege, attacker.name)
    siege.ask("schedule", mode="scheduled")


# --- what there is only a limited number of


def test_pools_used_up(siege: Siege, attacker: Attacker, victim: Attacker) -> None:
    """64 a guest: the one that has them all is refused, nobody else is, and each comes back."""
    for _ in range(3):
        for number in range(POOLS_PER_GUEST):
            assert attacker.pool(persist=number % 2 == 0) == number
        assert attacker.new_pool().reason == Reason.TOO_MANY_POOLS
        assert victim.pool() == 0
        victim.call(Op.DESTROY_POOL, pool=0)
        siege.unharmed()
        for number in range(POOLS_PER_GUEST):
            assert attacker.call(Op.DESTROY_POOL, pool=number).status == Status.DONE


def test_sharers_used_up(siege: Siege, attacker: Attacker, victim: Attacker) -> None:
    """A pool has 64 members, and naming it twice is legal, so one guest can be all of them.  The
    others are told; those who are in go on; and when it has left, there is room."""
    (inside,) = share(siege, UUIDS[6], victim)
    siege.allow(attacker.name, UUIDS[6])
    ids = [attacker.pool(uuid=UUIDS[6]) for _ in range(SHARERS_MAX - 1)]
    assert attacker.new_pool(uuid=UUIDS[6]).reason == Reason.TOO_MANY_SHARERS

    with siege.attacking(siege.new_name("late")) as late:
        siege.allow(late.name, UUIDS[6])
        assert late.new_pool(uuid=UUIDS[6]).reason == Reason.TOO_MANY_SHARERS
        assert late.pool() == 0
        assert victim.put(inside, 1, 0, page_of("inside")).status == Status.DONE
        siege.unharmed()
        for pool in ids:
            assert attacker.put(pool, 2, pool, page_of(pool)).status == Status.DONE
            assert attacker.call(Op.DESTROY_POOL, pool=pool).status == Status.DONE
        joined = late.pool(uuid=UUIDS[6])
        assert late.get(joined, 1, 0) == page_of("inside")
        assert late.get(joined, 2, ids[5]) == page_of(ids[5])


def test_memberships_used_up_by_leaving(siege: Siege, attacker: Attacker, victim: Attacker) -> None:
    """What a leaver has put keeps its record for as long as it is there, and there are 1024.  A
    guest that joins, puts one page and leaves, over and over in several pools, does not use them
    up for others."""
    pools = UUIDS[8:14]
    for uuid in pools:
        share(siege, uuid, victim)
    for number in range(MEMBERS_MAX + 200):
        uuid = pools[number % len(pools)]
        if number < len(pools):
            siege.allow(attacker.name, uuid)
        joined = attacker.pool(uuid=uuid)
        assert attacker.put(joined, number, 0, page_of(number)).status == Status.DONE
        assert attacker.call(Op.DESTROY_POOL, pool=joined).status == Status.DONE
    with siege.attacking(siege.new_name("late")) as late:
        (joined,) = share(siege, UUIDS[14], late)
        assert late.put(joined, 1, 0, page_of("late")).status == Status.DONE
        siege.allow(late.name, pools[0])
        assert late.new_pool(uuid=pools[0]).status == Status.DONE
    siege.unharmed()


def test_memberships_used_up_by_dying(siege: Siege, victim: Attacker) -> None:
    """What a guest leaves that has gone for good is another sharer's.  One that comes, puts a page
    and goes, more often than a pool has slots, neither fills them up nor costs the sharer what is
    its own."""
    (pool,) = share(siege, UUIDS[21], victim)
    name = siege.new_name("mayfly")
    siege.allow(name, UUIDS[21])
    assert victim.put(pool, 1, 0, page_of("mine")).status == Status.DONE
    for number in range(SLOTS + 20):
        mayfly = siege.attacker(name)
        joined = mayfly.pool(uuid=UUIDS[21])
        assert mayfly.put(joined, 2 + number, 0, page_of(number)).status == Status.DONE
        mayfly.detach()
    assert victim.get(pool, 1, 0) == page_of("mine")
    assert victim.put(pool, 1, 0, page_of("mine again")).status == Status.DONE
    siege.unharmed()


def test_memberships_used_up_by_many(siege: Siege, victim: Attacker) -> None:
    """Many guests together can be in as many pools as there are records; who comes later is told,
    keeps its private pools, and gets in when they have left."""
    siege.allow(victim.name, UUIDS[20])
    with ExitStack() as stack:
        crowd = [stack.enter_context(siege.attacking(siege.new_name("crowd"))) for _ in range(17)]
        refused = 0
        for number, guest in enumerate(crowd):
            uuid = UUIDS[15 + number % 4]
            siege.allow(guest.name, uuid)
            for _ in range(POOLS_PER_GUEST):
                reply = guest.new_pool(uuid=bytes(uuid))
                if reply.status != Status.DONE:
                    assert reply.reason == Reason.TOO_MANY_SHARERS
                    refused += 1
        assert refused
        assert victim.pool() == 0
        siege.unharmed()
    assert victim.pool(uuid=UUIDS[20]) == 1
    assert victim.put(1, 1, 0, page_of("in")).status == Status.DONE


@pytest.mark.parametrize("persist", [True, False])
def test_objects_used_up(siege: Siege, attacker: Attacker, victim: Attacker, persist: bool) -> None:
    """There are as many object slots as frames, and a same-filled page costs 32 bytes: one guest
    could have them all, and nobody could put into a new object any more.  A guest's persistent
    objects are bounded by its part; ephemeral ones go when others need a slot."""
    frames = siege.ask("stats")["arena"]["frames"]
    pool = attacker.pool(persist=persist)
    for slot in range(64):
        attacker.window.slot(slot)[:] = bytes([slot]) * PAGE_BYTES
    stored = 0
    for start in range(0, 2 * frames, 64):
        entries = [
            (pool, 0, slot, 0, (start + slot).to_bytes(24, "little"), 0) for slot in range(64)
        ]
        attacker.window.write_table(entries)
        stored += attacker.call(Op.PUT_BATCH, count=64).map.bit_count()
    if persist:
        assert stored <= siege.guest(attacker.name)["allotment_bytes"] // PAGE_BYTES
    for kept in (victim.pool(persist=True), victim.pool()):
        for number in range(300):
            reply = victim.put(kept, 1000 + number, 0, page_of(number))
            assert reply.status == Status.DONE, reply
    siege.unharmed()


def test_metadata_used_up(siege: Siege, attacker: Attacker, victim: Attacker) -> None:
    """One same-filled page in each 64 of a huge object costs the hypervisor memory of its own, in
    none of the guest's accounts; it is bounded like objects are."""
    frames = siege.ask("stats")["arena"]["frames"]
    pool = attacker.pool()
    attacker.window.slot(0)[:] = bytes(PAGE_BYTES)
    for start in range(0, 2 * frames, 64):
        attacker.window.write_table(
            [
                (pool, 64 * 1021 * (start + slot) & 0xFFFFFFFF, 0, 0, bytes(24), 0)
                for slot in range(64)
            ]
        )
        attacker.call(Op.PUT_BATCH, count=64)
    assert own_pages(siege, attacker.name) <= frames
    kept = victim.pool()
    for number in range(300):
        assert victim.put(kept, 1000 + number, 0, page_of(number)).status == Status.DONE
