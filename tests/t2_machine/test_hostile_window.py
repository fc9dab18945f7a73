"""Hostile guests: memory that changes while it is read, identities that are only claimed, and
words of an earlier life.

The window is shared with the guest for as long as it lives, so whatever the hypervisor reads there
may be something else a moment later; it is copied once, and the copy is checked and used.  Against
a real hypervisor over either transport, while a second guest goes on verifying its pages
(`tests.support.hostile`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import posix_ipc
import pytest

from guests.adversaries.raw import page_of
from ipc.abi import (
    BYE_MAGIC,
    CONFIRM,
    CONFIRM_MAGIC,
    PAGE_BYTES,
    Op,
    Reason,
    Status,
)
from ipc.errors import Disconnected, OperatorError
from ipc.limits import (
    WINDOW_BYTES,
    WINDOW_CALL_OFFSET,
    WINDOW_COMPLETION_OFFSET,
    WINDOW_SLOTS,
    WINDOW_SLOTS_OFFSET,
)
from ipc.mqueue import KICK
from ipc.ring import memory_order_suffices
from tests.support.hostile import (
    SHARED_UUID,
    TRANSPORTS,
    Attacker,
    Handshake,
    Siege,
    besieged,
    until,
)

F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_EXEC = 0x8, 0x10, 0x20  # include/uapi/linux/fcntl.h
MADV_COLD, MADV_PAGEOUT = 20, 21  # include/uapi/asm-generic/mman-common.h
COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 0x8, 0x10, 0x20  # include/uapi/linux/falloc.h


@pytest.fixture(scope="module", params=TRANSPORTS)
def siege(
    request: pytest.FixtureRequest,
    new_cluster_name: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Siege]:
    """One hypervisor for all tests of a transport; each has guests of its own."""
    with besieged(new_cluster_name(), tmp_path_factory.mktemp("window"), request.param) as siege:
        yield siege


@pytest.fixture
def attacker(siege: Siege) -> Iterator[Attacker]:
    """A guest that leaves in the end, after which the witness is asked."""
    with siege.attacking() as attacker:
        yield attacker
    siege.unharmed()


# --- double fetch

HAMMER = """
choose = random.Random(int(arguments[0]))
pools = [attacker.pool(persist=True), attacker.pool()]
window = attacker.window
entries = [
    [
        (pool, index, slot, flags, oid_from_int(oid), 0)
        for pool, index, slot, flags, oid in (
            (pools[0], 0, 0, 0, 1),
            (pools[1], 2**32 - 1, 63, 0, 2),
            (0xFFFFFFFF, 0, 1, 0, 1),
            (pools[0], 5, 2**32 - 1, 0, 1),
            (pools[0], 5, 64, 0, 1),
            (pools[1], 7, 3, 255, 1),
            (pools[1], 7, 3, 0, 2**192 - 1),
            (64, 7, 3, 0, 3),
        )
    ],
]
from ipc.abi import BATCH_ENTRY
packed = [BATCH_ENTRY.pack(*entry) for entry in entries[0]]
def hammer():
    mine = random.Random(choose.random())
    while True:
        at = mine.randrange(64) * 48
        window.table[at : at + 48] = mine.choice(packed)
        at = mine.randrange(64 * 48 - 8)
        window.table[at : at + 8] = mine.randbytes(8)
        slot = mine.randrange(64)
        window.slots[slot * 4096 : slot * 4096 + 4096] = mine.choice(PAGES)
PAGES = [bytes(4096), bytes([7]) * 4096, page_of(1), page_of(2), b"lean" * 1024, page_of(3)]
sys.setswitchinterval(1e-5)
for _ in range(2):
    threading.Thread(target=hammer, daemon=True).start()
for number in range(int(arguments[1])):
    op = choose.choice((Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH, Op.PUT_PAGE, Op.GET_PAGE))
    if op in (Op.PUT_PAGE, Op.GET_PAGE):
        attacker.call(op, pool=choose.choice(pools), oid=choose.randrange(3), count=64)
    else:
        attacker.call(op, count=choose.choice((1, 2, 64)))
say("done")
time.sleep(600)
"""


def test_a_batch_table_and_pages_that_change_while_a_call_runs(siege: Siege) -> None:
    """Two threads of the guest write the batch table and the slots all the time, right and wrong
    entries by turns, while its calls are served: each entry is what it was when it was copied, and
    a page that is taken for filled, shared or compressed is the one that is stored."""
    rogues = [siege.rogue(HAMMER, str(seed), "150") for seed in range(2)]
    for rogue in rogues:
        siege.ask("set", guest=rogue.name, compress=True, sharing="guest")
    for rogue in rogues:
        assert rogue.says() == "done"
    siege.unharmed()
    for rogue in rogues:
        assert siege.faults(rogue.name) > 20
        rogue.kill()
    until(lambda: all(r.name not in siege.ask("stats")["guests"] for r in rogues), "both leave")


STORED = """
pool = attacker.pool(persist=True)
A, B = bytes([1]) * 4096, page_of("B")
PAIRS = list(zip(A, B))
stop = []
def flip():
    while not stop:
        attacker.window.slot(0)[:] = A
        attacker.window.slot(0)[:] = B
attacker.window.slot(0)[:] = A
sys.setswitchinterval(1e-5)
thread = threading.Thread(target=flip)
thread.start()
for number in range(250):
    attacker.call(Op.PUT_PAGE, pool=pool, oid=1, index=number, count=1)
stop.append(True)
thread.join()
torn = 0
for number in range(250):
    page = attacker.get(pool, 1, number)
    again = attacker.get(pool, 1, number)
    assert page == again, "a page must be one page"
    assert all(byte in both for byte, both in zip(page, PAIRS)), "bytes that nobody wrote"
    torn += page not in (A, B)
say("stored", torn)
"""


@pytest.mark.parametrize("mode", ["off", "guest"])
def test_a_page_that_changes_while_it_is_stored_is_stored_once(siege: Siege, mode: str) -> None:
    """The page flips between one that is same-filled and one that is not.  It may be torn, which is
    the guest's own doing, but what was stored is one page: the same each time it is got."""
    name = siege.new_name("flipper")
    siege.ask("set", guest=name, compress=mode == "guest", sharing=mode)
    rogue = siege.rogue(STORED, name=name)
    assert rogue.says().startswith("stored")
    siege.unharmed()
    rogue.kill()


RING_HAMMER = """
pool = attacker.pool(persist=True)
requests = [
    attacker.request(op, pool=pool, oid=oid, index=index, count=count, slot=slot)
    for op, oid, index, count, slot in (
        (Op.PUT_PAGE, 1, 0, 1, 0),
        (Op.PUT_PAGE, 1, 2**32 - 1, 1, 63),
        (Op.GET_PAGE, 1, 0, 64, 0),
        (Op.GET_PAGE, 1, 0, 65, 0),
        (Op.GET_PAGE, 1, 2**32 - 1, 64, 63),
        (Op.FLUSH_OBJECT, 1, 0, 0, 0),
        (255, 1, 1, 1, 1),
    )
]
choose = random.Random(int(arguments[0]))
block = attacker.window.request
def tear():
    mine = random.Random(choose.random())
    while True:
        at, size = mine.choice(((0, 64), (4, 1), (6, 2), (12, 4), (40, 8), (16, 24), (8, 4)))
        block[at : at + size] = mine.choice(requests)[at : at + size]
sys.setswitchinterval(1e-5)
for _ in range(2):
    threading.Thread(target=tear, daemon=True).start()
words, answers = attacker.window.call_words, attacker.window.completion_words
number = words[0]
for _ in range(int(arguments[1])):
    number += 1
    words[0] = number
    while answers[0] != number:
        attacker.channel._ring()
        time.sleep(0)
say("done")
time.sleep(600)
"""


@pytest.mark.skipif(not memory_order_suffices(), reason="the ring needs x86-64")
def test_a_call_block_that_changes_while_it_is_read(siege: Siege) -> None:
    """Threads of the guest write the fields of the request by turns, right and wrong ones, while
    the hypervisor takes it for a call: it is copied once, so what was checked is what is done."""
    rogue = siege.rogue(RING_HAMMER, "1", "600", ring=True)
    assert rogue.says() == "done"
    siege.unharmed()
    assert siege.faults(rogue.name) > 10
    rogue.kill()


# --- the window itself


def assert_refused(call: Any, *numbers: int) -> None:
    """The kernel says no."""
    with pytest.raises(OSError, match="|".join(map(os.strerror, numbers))):
        call()


def test_a_window_cant_be_cut_off(siege: Siege, attacker: Attacker) -> None:
    """A guest that shortened the mapping would kill whoever touched it next (SIGBUS).  The window
    is sealed against shrinking and growing before the guest has it, and the seal can't be taken
    off, nor another one be put on that would stop the hypervisor from writing."""
    fd = attacker.window.fd
    for length in (0, 1, PAGE_BYTES, WINDOW_BYTES - 1, WINDOW_BYTES + 1, 1 << 40):
        assert_refused(lambda length=length: os.ftruncate(fd, length), errno.EPERM)
    assert_refused(lambda: os.posix_fallocate(fd, WINDOW_BYTES, PAGE_BYTES), errno.EPERM)
    for seals in (0, fcntl.F_SEAL_SHRINK, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_EXEC, 0xFF):
        assert_refused(
            lambda seals=seals: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals), errno.EPERM, errno.EINVAL
        )
    before = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    assert before & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL) == before
    # The same file by another door.
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        assert_refused(lambda: os.ftruncate(again, 0), errno.EPERM)
        assert_refused(lambda: fcntl.fcntl(again, fcntl.F_ADD_SEALS, F_SEAL_WRITE), errno.EPERM)
    finally:
        os.close(again)
    assert_refused(
        lambda: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC)), errno.EPERM
    )

    assert os.fstat(fd).st_size == WINDOW_BYTES
    pool = attacker.pool(persist=True)
    assert attacker.put(pool, 1, 0, page_of("whole")).status == Status.DONE
    assert attacker.get(pool, 1, 0) == page_of("whole")


def fallocate(fd: int, mode: int, start: int, length: int) -> int:
    """Change the file under a window: 0 or an errno."""
    call = ctypes.CDLL(None, use_errno=True).fallocate64
    failed = call(fd, mode, ctypes.c_longlong(start), ctypes.c_longlong(length))
    return ctypes.get_errno() if failed else 0


def test_games_with_the_mapping_hurt_nobody_else(siege: Siege, attacker: Attacker) -> None:
    """What a guest may do to its own mapping and file: holes, pages thrown away, other protections,
    private copies, write-only and read-only second mappings, a lease, a lock."""
    fd = attacker.window.fd
    pool = attacker.pool(persist=True)
    page = page_of("games")
    keep_size = 1
    for mode in (COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, ZERO_RANGE | keep_size, 0x40, 0x80):
        assert fallocate(fd, mode, 0, PAGE_BYTES) in (errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second = mmap.mmap(fd, WINDOW_BYTES, prot=mmap.PROT_READ)
    private = mmap.mmap(fd, WINDOW_BYTES, flags=mmap.MAP_PRIVATE)
    private[WINDOW_SLOTS_OFFSET : WINDOW_SLOTS_OFFSET + PAGE_BYTES] = page_of("never seen")
    for advice in (mmap.MADV_DONTNEED, mmap.MADV_REMOVE, MADV_COLD, MADV_PAGEOUT):
        assert attacker.put(pool, 1, 0, page).status == Status.DONE
        with contextlib.suppress(OSError):
            attacker.window._mapping.madvise(advice, WINDOW_SLOTS_OFFSET, WINDOW_SLOTS * PAGE_BYTES)
        assert attacker.get(pool, 1, 0) == page
    assert fallocate(fd, 3, WINDOW_SLOTS_OFFSET, WINDOW_SLOTS * PAGE_BYTES) == 0
    assert attacker.call(Op.PUT_PAGE, pool=pool, oid=1, count=64).status == Status.DONE
    assert attacker.get(pool, 1, 63) == bytes(PAGE_BYTES)
    second.close()
    private.close()


UNMAPPED = """
import mmap
fd = os.dup(attacker.window.fd)
requests, replies = attacker.channel._requests, attacker.channel._replies
pool = attacker.pool(persist=True)
request = attacker.request(Op.PUT_PAGE, pool=pool, oid=1, count=64)
attacker.window.close()
requests.send(request)
say("put", replies.receive(60)[0] != b"")
mapping = mmap.mmap(fd, 68 * 4096)
mapping[4 * 4096 :] = page_of("late") * 64
say("mapped again")
time.sleep(600)
"""


def test_a_guest_that_unmaps_its_window(siege: Siege) -> None:
    """The mapping of the hypervisor is its own."""
    rogue = siege.rogue(UNMAPPED, ring=False)
    assert rogue.says() == "put True"
    siege.unharmed()
    assert rogue.says() == "mapped again"
    rogue.kill()


# --- identities


def test_an_identity_in_the_payload_counts_for_nothing(siege: Siege, attacker: Attacker) -> None:
    """A guest is the queue that its message came from.  Other guests' numbers and pool ids, their
    tokens of every width and place, fencing tokens, the uuid that others share: nothing of it
    reaches a page of theirs."""
    victims = {name: siege.guest(name) for name in ("witness", "friend")}
    own = attacker.pool(persist=True)
    numbers = [record["id"] for record in victims.values()]
    their_pools = [pool["id"] for record in victims.values() for pool in record["pools"]]
    assert set(their_pools) - {own}

    for pool in {*their_pools, *numbers} - {own}:
        for op in (Op.GET_PAGE, Op.PUT_PAGE, Op.FLUSH_PAGE):
            for token in (0, 1, *numbers, (1 << 64) - 1):
                reply = attacker.call(op, pool=pool, oid=3, count=12, token=token)
                assert reply.reason == Reason.NO_SUCH_POOL
        assert attacker.call(Op.DESTROY_POOL, pool=pool).status == Status.MISS
    for oid in (3, int.from_bytes(SHARED_UUID, "little")):
        assert attacker.get(own, oid, 0) is None
    for name in ("witness", "friend"):
        for token in (bytes(32), os.urandom(32)):
            with pytest.raises(OperatorError, match="not enrolled"):
                siege.knock(name, token)
        with pytest.raises(OperatorError, match="attached by process"):
            siege.knock(name, siege.hypervisor.enrol(name))


@pytest.mark.parametrize("number", [0, 1, 255, 0xFFFF, 0xFFFFFFFF])
def test_another_guests_number_in_confirm(siege: Siege, number: int) -> None:
    """The handshake ends as whom it began, or not at all."""
    with Handshake(siege) as handshake:
        if number == handshake.number:
            number = siege.guest("witness")["id"]
        handshake.door.send(CONFIRM.pack(CONFIRM_MAGIC, number))
        assert b"no CONFIRM" in handshake.door.recv(512)
    assert handshake.name not in siege.ask("stats")["guests"]
    siege.unharmed()


# --- words of an earlier life


def test_an_attachment_that_was_replaced_is_dead(siege: Siege, attacker: Attacker) -> None:
    """Requests in its queues, calls in its ring, a BYE at its door, its names: none is heard."""
    pool = attacker.pool(persist=True)
    attacker.put(pool, 1, 0, page_of("kept"))
    old = attacker
    new = siege.attacker(attacker.name)
    assert new.channel.resumed

    request = old.request(Op.FLUSH_OBJECT, pool=pool, oid=1)
    for _ in range(3):
        old.channel._requests.send(request, 1)
    old.window.request[:] = request
    old.window.call_words[0] += 1
    with contextlib.suppress(OSError):
        old.channel._door.send(CONFIRM.pack(BYE_MAGIC, 0))
    siege.unharmed()
    with pytest.raises(Disconnected):
        old.call(Op.VERSION)

    assert new.get(pool, 1, 0) == page_of("kept")
    assert [one["id"] for one in siege.guest(new.name)["pools"]] == [pool]
    old.channel.close()
    attacker.channel = new.channel
    attacker.window = new.window


def test_names_of_queues_are_gone_with_the_confirmation(siege: Siege) -> None:
    """While they exist they belong to one handshake; then nobody can open them, and a queue that a
    guest makes under an old name is its own affair."""
    with Handshake(siege) as handshake:
        handshake.confirm()
        for name in handshake.names:
            with pytest.raises(posix_ipc.ExistentialError):
                posix_ipc.MessageQueue(name)
        forged = posix_ipc.MessageQueue(handshake.names[0], posix_ipc.O_CREX, max_messages=1)
        forged.close()
        handshake.door.send(CONFIRM.pack(BYE_MAGIC, 0))
        assert handshake.door.recv(1) == b""
        posix_ipc.unlink_message_queue(handshake.names[0])
    siege.unharmed()


def test_a_guest_that_takes_its_names_away_during_the_handshake(siege: Siege) -> None:
    """It may remove them and put queues of its own in their place: the hypervisor holds what it
    made."""
    with Handshake(siege) as handshake:
        for name in handshake.names:
            posix_ipc.unlink_message_queue(name)
        mine = posix_ipc.MessageQueue(handshake.names[0], posix_ipc.O_CREX, max_messages=1)
        handshake.confirm()
        siege.unharmed()
        mine.close()
        handshake.door.send(CONFIRM.pack(BYE_MAGIC, 0))
        assert handshake.door.recv(1) == b""
        for name in handshake.names:
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_message_queue(name)
    siege.unharmed()


@pytest.mark.skipif(not memory_order_suffices(), reason="the ring needs x86-64")
def test_ring_words_of_another_time(siege: Siege) -> None:
    """Numbers that go back, stand still, jump and wrap, in both halves of the ring; completions
    that the guest has forged itself.  Each change of `posted` is one call, and what is completed is
    what was posted, whatever the guest writes into the hypervisor's block."""
    with siege.attacking(ring=True) as attacker:
        words, answers = attacker.window.call_words, attacker.window.completion_words
        request = attacker.window.request
        request[:] = attacker.request(Op.VERSION)
        calls = 0

        def wait_for(posted: int) -> None:
            until(lambda: answers[0] == posted, "the call is completed")

        for posted in (5, 4, 4, 1, 0, (1 << 64) - 1, 1 << 56, 1 << 63, 7, 6, 0xFF << 56 | 9):
            if posted == words[0]:
                continue
            answers[0] = posted ^ 1
            answers[1] = 0
            words[0] = posted
            attacker.channel._requests.send(KICK)
            wait_for(posted)
            calls += 1
        counts = siege.guest(attacker.name)["operations"]
        assert counts["version"]["calls"] == calls
        # Forged: a completion of a call that was never made is the guest's own trouble.
        start, end = WINDOW_COMPLETION_OFFSET, WINDOW_COMPLETION_OFFSET + 64
        attacker.window._view[start:end] = os.urandom(64)
        attacker.window._view[WINDOW_CALL_OFFSET : WINDOW_CALL_OFFSET + 16] = bytes(16)
        answers[0] = 0
        assert attacker.call(Op.VERSION).status == Status.DONE
    siege.unharmed()


def test_replies_of_an_older_generation(new_cluster_name: Any, tmp_path: Path) -> None:
    """After the hypervisor was killed and started again: what stood in the old queues and the old
    ring is never served, each reply says which generation answered, and a page that was put with
    the older one is there."""
    for transport in TRANSPORTS:
        directory = tmp_path / transport
        directory.mkdir()
        with besieged(new_cluster_name(), directory, transport) as siege:
            attacker = siege.attacker()
            pool = attacker.pool(persist=True)
            attacker.put(pool, 1, 0, page_of("older"))
            before = attacker.call(Op.VERSION).generation
            siege.restart()
            old = attacker
            request = old.request(Op.FLUSH_OBJECT, pool=pool, oid=1)
            with contextlib.suppress(posix_ipc.BusyError):
                for _ in range(9):
                    old.channel._requests.send(request, 0)
            old.window.request[:] = request
            old.window.call_words[0] += 1

            new = siege.attacker(old.name)
            assert new.channel.resumed
            for _ in range(20):
                assert new.call(Op.VERSION).generation == before + 1
            assert new.get(pool, 1, 0) == page_of("older")
            with pytest.raises(Disconnected):
                old.call(Op.VERSION)
            old.channel.close()
            new.detach()
