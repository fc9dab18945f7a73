"""The shared cleancache: no read after another node's write returns old bytes, whatever happens."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator

import pytest

from fs.hooks import Extent, FileKey
from guests.attachment import RETRY_SECONDS
from guests.cleancache import object_id
from guests.sharedcache import SharedCleancache
from hypervisor.auth import Role
from hypervisor.machine import Machine
from ipc.local import Fault
from tests.t4_guest.shared_worlds import (
    FILE_PAGES,
    FILES,
    PAGE,
    UUID,
    Cluster,
    History,
    Node,
)

KEY = FileKey(0, 7)
SEEDS = 8
STEPS = 400


@pytest.fixture
def losing(expect_warning: Callable[[str], None]) -> None:
    """An attachment ends, or there is none."""
    expect_warning("(tmem|cleancache) event=")


@pytest.fixture
def silent() -> Iterator[None]:
    """A history may meet the end of an attachment, or not."""
    loggers = [
        logging.getLogger(f"guests.{name}") for name in ("attachment", "cleancache", "sharedcache")
    ]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    for logger in loggers:
        logger.setLevel(logging.NOTSET)


def page(number: int) -> bytes:
    """A page of its own content."""
    return random.Random(number).randbytes(16) * (PAGE // 16)


def held(cluster: Cluster, file: int, index: int) -> bytes | None:
    """A page in the pool."""
    oid = int.from_bytes(object_id(FileKey(file, 7)), "little")
    return cluster.hypervisor.held().get((oid, index))


def three() -> tuple[Cluster, Node, Node, Node]:
    """Nodes that have read nothing yet."""
    cluster = Cluster(3)
    a, b, c = cluster.nodes
    return cluster, a, b, c


def hand_round(cluster: Cluster, node: Node) -> None:
    """Let a node give up all its locks, by another one's taking them."""
    other = next(one for one in cluster.nodes if one is not node)
    for file in range(FILES):
        other.write(file, FILE_PAGES - 1, page(99))
        other.sync()


# --- sharing


def test_what_one_read_the_others_need_not_read() -> None:
    """The purpose of it all: losing a lock empties nothing when nothing changed."""
    cluster, a, b, c = three()
    for file in range(FILES):
        for index in range(FILE_PAGES):
            a.read(file, index)
    assert cluster.disk.reads == FILES * FILE_PAGES
    a.offer_all()
    for node in (b, c):
        for file in range(FILES):
            for index in range(FILE_PAGES):
                assert node.read(file, index) == bytes(PAGE)
    assert cluster.disk.reads == FILES * FILE_PAGES
    assert b.cache.succ_gets >= FILES * FILE_PAGES
    counters = b.cache.counters()
    assert (counters["stale"], counters["owed_files"], counters["reader"]) == (0, 0, False)


def test_an_exclusive_lock_that_changes_nothing_empties_nothing() -> None:
    """The pool is as it was after it went from hand to hand."""
    cluster, a, b, c = three()
    for index in range(FILE_PAGES):
        a.read(0, index)
    a.offer_all()
    b._lock(0, "exclusive")
    before = cluster.disk.reads

    for index in range(FILE_PAGES):
        c.read(0, index)
    assert cluster.disk.reads == before


def test_a_write_is_seen_at_once() -> None:
    """Only the page that was changed is read from somewhere else; it comes by way of the pool."""
    cluster, a, b, _ = three()
    for index in range(FILE_PAGES):
        a.read(0, index)
    a.offer_all()
    b.write(0, 3, page(1))
    assert held(cluster, 0, 3) is None
    assert held(cluster, 0, 4) == bytes(PAGE)

    assert a.read(0, 3) == page(1)
    cluster.check()


# --- late puts


def test_a_put_after_the_lock_was_lost_is_refused_and_counted() -> None:
    """A paused node wakes, with pages that were clean when it fell asleep."""
    cluster, a, b, c = three()
    a.write(0, 3, page(1))
    a.sync()
    cluster.declare_dead(a)
    b.write(0, 3, page(2))

    a.offer_all()

    assert a.cache.stale == 1
    assert a.stale_needs == [2]
    assert held(cluster, 0, 3) is None
    assert c.read(0, 3) == page(2)
    assert a.cache.attached, "a refusal is no reason to leave"


def test_a_put_that_was_under_way_when_the_lock_was_lost() -> None:
    """Paused between asking for the token and the hypervisor's hearing it."""
    cluster, a, b, c = three()
    a.write(0, 3, page(1))
    a.sync()
    late = [Fault.LATE_REQUEST]
    a.draw_fault = lambda: late.pop() if late else Fault.NONE

    def others() -> None:
        cluster.declare_dead(a)
        b.write(0, 3, page(2))
        assert c.read(0, 3) == page(2)
        b.write(0, 3, page(3))

    a.meanwhile = others
    a.offer_all()

    assert a.cache.stale == 1
    assert c.read(0, 3) == page(3)


def test_a_batch_is_refused_file_by_file() -> None:
    """Pages of files whose locks are still good are kept."""
    cluster, a, b, _ = three()
    a.write(0, 3, page(1))
    a.write(1, 3, page(1))
    a.sync()
    b.write(0, 9, page(2))
    # As if it had not noticed.
    a.tokens[FileKey(0, 7)] = 1
    a.cache.put_extents(
        [Extent(FileKey(0, 7), 3, 1, False), Extent(FileKey(1, 7), 3, 1, True)],
        memoryview(page(5) * 2),
    )
    assert a.cache.stale == 1
    assert held(cluster, 0, 3) == page(1), "what it offered in time is there, what it did not isn't"
    assert held(cluster, 1, 3) == page(5)


def test_nothing_is_offered_without_a_lock() -> None:
    """`token_of` knows none: a lease that has run out, a file that is not locked."""
    cluster, a, _, _ = three()
    a.cache.put_pages(KEY, 0, 1, memoryview(page(1)))

    assert held(cluster, 0, 0) is None
    assert (a.cache.puts, a.cache.skipped) == (0, 1)


@pytest.mark.usefixtures("losing")
def test_an_old_token_does_not_get_in_through_a_new_pool() -> None:
    """The pool died with its tokens; a zombie can't join the next one."""
    cluster, a, b, c = three()
    a.write(0, 3, page(1))
    a.sync()
    cluster.declare_dead(a)
    b.write(0, 3, page(2))
    cluster.hypervisor.kill(arena_lost=True)
    cluster.hypervisor.boot()
    cluster.seconds += RETRY_SECONDS
    b.read(1, 0)

    a.offer_all()

    cluster.seconds += RETRY_SECONDS
    assert c.read(0, 3) == page(2)


# --- a hypervisor that goes and comes


@pytest.mark.usefixtures("losing")
def test_a_restart_keeps_what_was_shared() -> None:
    """And the newest token of all files is what a put needs from then on."""
    cluster, a, b, _ = three()
    for index in range(FILE_PAGES):
        a.read(0, index)
    a.offer_all()
    for number in range(4):
        (a, b)[number % 2].write(1, 0, page(number))
    cluster.hypervisor.kill()
    cluster.hypervisor.boot()
    for node in (a, b):
        node.read(2, 0)
    cluster.seconds += RETRY_SECONDS
    before = cluster.disk.reads

    for index in range(FILE_PAGES):
        assert b.read(0, index) == bytes(PAGE)
    assert cluster.disk.reads == before
    assert a.cache.settle(FileKey(0, 7))
    b.offer_all()
    assert b.stale_needs
    assert b.stale_needs[0] == cluster.locks[1].token, "told to whoever can let a token jump"
    cluster.check()


@pytest.mark.usefixtures("losing")
def test_a_debt_is_paid_before_the_lock_goes() -> None:
    """Written while nobody was there; the hypervisor is back when another wants the lock."""
    cluster, a, b, c = three()
    a.read(0, 3)
    a.offer_all()
    cluster.hypervisor.kill()
    b.write(0, 3, page(2))
    assert b.cache.counters()["owed_files"] == 1
    cluster.hypervisor.boot()
    assert held(cluster, 0, 3) == bytes(PAGE), "the old page is there still"
    cluster.seconds += RETRY_SECONDS

    assert c.read(0, 3) == page(2)
    assert held(cluster, 0, 3) in (None, page(2))
    assert b.cache.counters()["owed_files"] == 0
    assert not cluster.locks[0].is_marked
    assert b.cache.handed_over == 0


@pytest.mark.usefixtures("losing")
def test_a_debt_that_can_not_be_paid_goes_with_the_lock() -> None:
    """The others reach the hypervisor, the debtor does not."""
    cluster, a, b, c = three()
    a.read(0, 3)
    a.offer_all()
    b.may_attach = False
    b.draw_fault = lambda: Fault.LOSE_REQUEST
    b.write(0, 3, page(2))
    b.sync()
    assert held(cluster, 0, 3) == bytes(PAGE)

    assert c.read(0, 3) == page(2)

    assert cluster.locks[0].is_marked
    assert (b.cache.handed_over, c.cache.distrusted) == (1, 1)
    assert held(cluster, 0, 3) is None
    a.write(0, 4, page(3))
    c.write(0, 5, page(4))
    assert not cluster.locks[0].is_marked, "an exclusive holder owed nothing"
    cluster.check()


@pytest.mark.usefixtures("losing")
def test_a_debtor_that_dies_leaves_a_lock_nobody_trusts() -> None:
    """Its lock's value is not valid, which means the same as the mark."""
    cluster, a, b, c = three()
    a.read(0, 3)
    a.offer_all()
    b.may_attach = False
    b.draw_fault = lambda: Fault.LOSE_REQUEST
    b.write(0, 3, page(2))
    b.sync()
    cluster.declare_dead(b)

    assert c.read(0, 3) == page(2)
    assert c.cache.distrusted == 1
    assert held(cluster, 0, 3) is None


@pytest.mark.usefixtures("losing")
def test_to_be_somebody_new_voids_no_debt_while_others_hold_the_pool() -> None:
    """The guest was taken for dead; its pool lives on with the others."""
    cluster, a, b, c = three()
    a.read(0, 3)
    a.offer_all()
    b.draw_fault = lambda: Fault.LOSE_REQUEST
    b.write(0, 3, page(2))
    machine = cluster.hypervisor.machine
    machine.depart(machine.clients[b.name])
    b.draw_fault = lambda: Fault.NONE
    cluster.seconds += RETRY_SECONDS

    assert c.read(0, 3) == page(2)
    assert held(cluster, 0, 3) in (None, page(2))
    assert b.cache.handed_over == 0


@pytest.mark.usefixtures("losing")
def test_a_debt_is_void_in_a_pool_that_we_made() -> None:
    """Nothing is in it."""
    cluster, a, b, _ = three()
    b.read(0, 0)
    cluster.hypervisor.kill(arena_lost=True)
    b.write(0, 3, page(2))
    cluster.hypervisor.boot()
    cluster.seconds += RETRY_SECONDS
    before = b.cache.invalidates

    assert b.cache.attach() is not None
    assert b.cache.counters()["owed_files"] == 0
    assert b.cache.invalidates == before
    assert a.read(0, 3) == page(2)


def test_who_may_not_share_still_tells_the_others() -> None:
    """The administrator took the grant away: what it changes goes with the lock."""
    cluster, a, b, c = three()
    a.read(0, 3)
    a.offer_all()
    cluster.hypervisor.grants.deny(UUID, b.name)
    client = cluster.hypervisor.machine.clients[b.name]
    for member in client.members.values():
        cluster.hypervisor.machine.memberships.apply_grant(member)
    b.write(0, 3, page(2))

    assert c.read(0, 3) == page(2)
    assert b.cache.handed_over == 1
    cluster.check()


# --- readers


def test_a_reader_gets_and_never_puts() -> None:
    """Not even a try."""
    cluster = Cluster(1, readers=1)
    writer, reader = cluster.nodes
    writer.write(0, 3, page(1))
    assert reader.read(0, 3) == page(1)
    before = cluster.disk.reads
    for index in range(FILE_PAGES):
        reader.read(1, index)
    reader.offer_all()

    assert reader.cache.counters()["reader"]
    assert reader.cache.puts == 0
    assert cluster.disk.reads > before
    account = cluster.hypervisor.machine.clients[reader.name].account
    assert not account.put.calls
    assert not account.put.refused


@pytest.mark.usefixtures("losing")
def test_a_reader_leaves_alone_what_it_distrusts() -> None:
    """It can't flush; once there was an exclusive holder without debts, it gets again."""
    cluster = Cluster(2, readers=1)
    a, b, reader = cluster.nodes
    a.read(0, 3)
    a.offer_all()
    b.may_attach = False
    b.draw_fault = lambda: Fault.LOSE_REQUEST
    b.write(0, 3, page(2))
    assert reader.read(0, 3) == page(2)
    assert held(cluster, 0, 3) == bytes(PAGE), "nobody who may has flushed it"
    assert reader.cache.counters()["owed_files"] == 1

    a.write(0, 4, page(3))
    a.sync()
    a.offer_all()
    gets = reader.cache.succ_gets
    assert reader.read(0, 3) == page(2)
    assert reader.read(0, 4) == page(3)
    assert reader.cache.counters()["owed_files"] == 0
    assert reader.cache.succ_gets > gets


def test_a_reader_that_becomes_one_stops_putting() -> None:
    """The grant changed; it is told so once."""
    cluster, a, _, _ = three()
    cluster.hypervisor.grants.allow(UUID, a.name, Role.READER)
    for member in cluster.hypervisor.machine.clients[a.name].members.values():
        cluster.hypervisor.machine.memberships.apply_grant(member)
    for file in range(FILES):
        a.read(file, 0)
        a.offer_all()
    assert a.cache.reader
    assert a.cache.counters()["puts"] > 0
    assert cluster.hypervisor.machine.clients[a.name].account.put.calls == 1


# --- histories


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("number", range(SEEDS))
def test_no_read_returns_old_bytes(number: int) -> None:
    """Deaths, zombies, lost and late calls, restarts with and without the arena, evictions."""
    seed = random.SystemRandom().randrange(1 << 30) // SEEDS * SEEDS + number
    history = History(seed, nodes=2 + number % 2, readers=number % 2)
    try:
        history.run(STEPS)
    except Exception as error:
        raise AssertionError(
            f"History({seed}, nodes={2 + number % 2}, readers={number % 2})"
        ) from (error)


@pytest.mark.usefixtures("silent")
def test_histories_meet_what_they_are_for() -> None:
    """Late puts, and debts that went with the lock."""
    histories = [History(seed) for seed in range(4)]
    for history in histories:
        history.run(STEPS)

    assert sum(history.hits for history in histories) > 0
    assert sum(history.stale for history in histories) > 0
    assert sum(history.handed_over for history in histories) > 0


def _no_fencing(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Machine._put

    def wrong(self: Machine, *arguments: object) -> object:
        return right(self, *arguments[:-1], 2**64 - 1)  # type: ignore[arg-type, call-arg]

    monkeypatch.setattr(Machine, "_put", wrong)


def _no_trust_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedCleancache, "distrust", lambda *_: None)


def _nothing_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedCleancache, "_owe", lambda *_: None)
    monkeypatch.setattr(SharedCleancache, "settle", lambda *_: True)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("break_it", [_no_fencing, _no_trust_lost, _nothing_owed])
def test_each_part_of_the_rule_is_needed(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it some history reads, or keeps, an old page."""
    break_it(monkeypatch)
    for seed in range(40):
        try:
            History(seed).run(STEPS)
        except AssertionError as error:
            found = str(error)
            break
    else:
        found = "nobody noticed"
    assert "an old page" in found
