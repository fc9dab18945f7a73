"""A token is lifted for a node that holds the lock, for no other, and never lost again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import pytest

from fs.dlm import recovery
from fs.dlm.locks import NodeLocks
from fs.dlm.manager import LockManager
from fs.dlm.messages import VALUE_BYTES, Claim, Lift, Lifted, Record
from fs.dlm.modes import Mode
from fs.dlm.recovery import lift_limit
from fs.dlm.resource import Resource
from fs.dlm.twin import Link, Twin
from tests.t3_fs.dlm.campaign import run
from tests.t3_fs.dlm.cluster import Cluster
from tests.t3_fs.dlm.test_messages import frame_of

NL, PR, EX = Mode.NL, Mode.PR, Mode.EX
WANTED = (1 << 32) + 1000
ONE = b"1" * VALUE_BYTES
TWO = b"2" * VALUE_BYTES


def hold(cluster: Cluster, number: int, mode: Mode, name: bytes) -> LockManager:
    """A lock that is granted."""
    manager = cluster.nodes[number].manager
    manager.lock(name, mode)
    cluster.settle()
    assert manager.mode(name) == mode
    return manager


def written(cluster: Cluster, name: bytes, value: bytes = ONE) -> None:
    """Node 0 has written a value and keeps NL."""
    manager = hold(cluster, 0, EX, name)
    manager.set_value(name, value)
    manager.down(name, NL)
    cluster.settle()


@pytest.mark.parametrize("master", [0, 1])
@pytest.mark.parametrize("mode", [PR, EX])
def test_a_holder_gets_what_it_needs(master: int, mode: Mode) -> None:
    """Also from itself; the next writer's token is above, and the value is what it was."""
    cluster = Cluster(3)
    name = cluster.name_of_master(master)
    written(cluster, name)
    one = hold(cluster, 1, mode, name)
    one.lift(name, WANTED)
    cluster.settle()
    assert one.token(name) == WANTED
    assert one.value(name) == ONE
    one.down(name, NL)
    writer = hold(cluster, 2, EX, name)
    assert writer.token(name) == WANTED + 1
    assert writer.value(name) == ONE


def test_the_second_reader_gets_the_same() -> None:
    """Nothing grows without need."""
    cluster = Cluster(3)
    name = cluster.name_of_master(0)
    one, two = hold(cluster, 1, PR, name), hold(cluster, 2, PR, name)
    for reader, needed in ((one, WANTED), (two, WANTED - 5)):
        reader.lift(name, needed)
        cluster.settle()
    assert one.token(name) == two.token(name) == WANTED


@pytest.mark.parametrize("mode", [None, NL])
def test_who_holds_nothing_gets_nothing(mode: Mode | None) -> None:
    """It does not ask, and if it lies it is refused."""
    cluster = Cluster(3)
    name = cluster.name_of_master(0)
    two = hold(cluster, 2, PR, name)
    if mode is not None:
        hold(cluster, 1, mode, name)
    master, liar = cluster.nodes[0].manager, cluster.nodes[1].manager
    before = two.token(name)
    liar.lift(name, WANTED)
    cluster.settle()
    assert master.refused == 0
    liar.links.post(0, Lift(name, WANTED))
    liar.links.post(0, Lift(b"no such name", WANTED))
    cluster.settle()
    assert master.refused >= 1
    assert master.resources[name].token == before
    assert liar.token(name) in (0, before)


def test_a_token_that_is_too_high_is_refused_on_both_sides() -> None:
    """Above what a later view would go on from, or no room to grow."""
    cluster = Cluster(3)
    name = cluster.name_of_master(0)
    one = hold(cluster, 1, PR, name)
    before = one.token(name)
    for number, needed in enumerate((lift_limit(1), 2 << 32, (1 << 64) - 1), 1):
        one.lift(name, needed)
        assert one.refused == number
    assert one.links.idle
    one.links.post(0, Lift(name, lift_limit(1)))
    cluster.settle()
    assert cluster.nodes[0].manager.refused == 1
    assert one.token(name) == before
    one.lift(name, lift_limit(1) - 1)
    cluster.settle()
    assert one.token(name) == lift_limit(1) - 1
    assert lift_limit((1 << 32) - 1) < 1 << 64


def test_only_the_master_answers() -> None:
    """Anybody else's answer is refused."""
    cluster = Cluster(3)
    name = cluster.name_of_master(0)
    one = hold(cluster, 1, PR, name)
    before = one.token(name)
    cluster.nodes[2].manager.links.post(1, Lifted(name, WANTED))
    cluster.settle()
    assert (one.refused, one.token(name)) == (1, before)


def test_the_master_is_asked_once_until_it_has_answered() -> None:
    """For one value in one view; a higher one is another question."""
    cluster = Cluster(2)
    name = cluster.name_of_master(0)
    one = hold(cluster, 1, PR, name)
    queue = cluster.twin.queues.setdefault(Link(1, 0), deque())
    for needed in (WANTED, WANTED, WANTED - 1, WANTED + 1):
        one.lift(name, needed)
    assert len(queue) == 2
    cluster.settle()
    assert one.token(name) == WANTED + 1


def test_an_answer_that_finds_the_lock_given_up_changes_nothing() -> None:
    """The next grant says the token."""
    cluster = Cluster(2)
    name = cluster.name_of_master(0)
    one = hold(cluster, 1, PR, name)
    before = one.token(name)
    one.lift(name, WANTED)
    one.down(name, NL)
    cluster.settle()
    assert one.token(name) == before
    one.lock(name, PR)
    cluster.settle()
    assert one.token(name) == WANTED


@pytest.mark.parametrize("what", ["join", "death"])
def test_a_lifted_token_survives_a_new_master(what: str) -> None:
    """By record and claim, or by claims alone, and with it the value."""
    cluster = Cluster(4)
    name = cluster.name_of_master(3)
    written(cluster, name)
    one = hold(cluster, 1, PR, name)
    two = hold(cluster, 2, PR, name)
    one.lift(name, WANTED)
    cluster.settle()
    if what == "death":
        cluster.kill(3)
    else:
        cluster.view(0, 1, 2, 3)
    assert one.token(name) == WANTED
    for reader in (one, two):
        reader.down(name, NL)
    writer = hold(cluster, 0, EX, name)
    assert writer.token(name) > WANTED
    assert writer.value(name) == ONE


def test_a_lift_that_nobody_alive_has_heard_of_is_below_the_next_writer() -> None:
    """The master lifted its own token and was declared dead: its late puts must be refused."""
    cluster = Cluster(3)
    name = cluster.name_of_master(0)
    zombie = hold(cluster, 0, PR, name)
    reader = hold(cluster, 1, PR, name)
    zombie.lift(name, lift_limit(1) - 1)
    lifted = zombie.token(name)
    assert lifted == lift_limit(1) - 1
    cluster.kill(0)
    reader.down(name, NL)
    writer = hold(cluster, 2, EX, name)
    assert writer.token(name) > lifted
    zombie.lift(name, writer.token(name))
    assert zombie.token(name) == lifted, "a master of an old view can't reach the new one's tokens"


def test_a_zombie_asks_in_vain() -> None:
    """Its master lives in a later view, and hears nothing of the old one."""
    cluster = Cluster(3)
    name = cluster.name_of_master(0)
    zombie = hold(cluster, 1, PR, name)
    before = zombie.token(name)
    cluster.kill(1)
    writer = hold(cluster, 2, EX, name)
    needed = writer.token(name)
    zombie.lift(name, needed)
    cluster.nodes[0].manager.deliver(1, frame_of(Lift(name, needed), 1, 2))
    cluster.settle()
    assert zombie.token(name) == before < needed
    assert cluster.nodes[0].manager.resources[name].token == needed


@pytest.mark.parametrize("mode", [PR, EX])
def test_the_value_is_valid_though_the_answer_was_lost_with_the_view(mode: Mode) -> None:
    """The master has lifted, the holder has not heard it, and a new view begins."""
    cluster = Cluster(3)
    name = cluster.name_of_master(0)
    written(cluster, name)
    one = hold(cluster, 1, mode, name)
    if mode == EX:
        one.set_value(name, TWO)
    one.lift(name, WANTED)
    cluster.twin.arrive(Link(1, 0))
    assert cluster.nodes[0].manager.resources[name].token == WANTED
    if mode == EX:
        one.down(name, PR)
    cluster.twin.queues.clear()
    cluster.view(0, 1, 2)
    assert one.token(name) < WANTED
    one.lift(name, WANTED)
    cluster.settle()
    assert one.token(name) == WANTED, "it may be asked again"
    one.down(name, NL)
    two = hold(cluster, 2, PR, name)
    assert two.value(name) == (TWO if mode == EX else ONE)


def test_node_locks_lift_what_they_hold() -> None:
    """The way of a file system."""
    twin = Twin()
    locks = NodeLocks(0, twin.transport(0), lambda: None)
    locks.manager.set_view(1, frozenset({0}))
    locks.lift(b"name", WANTED)
    locks.acquire(b"name", PR)
    locks.lift(b"name", WANTED)
    assert locks.token(b"name") == WANTED
    locks.manager.set_view(2, frozenset({1}))
    locks.lift(b"name", 2 * WANTED)
    assert locks.manager.expelled


def test_random_lives_lift() -> None:
    """The campaign meets what it is for."""
    assert sum(run(seed, 800).lifts for seed in range(6)) > 20


def test_a_bound_that_is_too_wide_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: with it a node that nobody believes any more gets its page in."""
    monkeypatch.setattr("fs.dlm.master.lift_limit", lambda epoch: 1 << 63)
    monkeypatch.setattr("fs.dlm.manager.lift_limit", lambda epoch: 1 << 63)
    monkeypatch.setattr("fs.dlm.manager.token_limit", lambda epoch: 1 << 64)
    with pytest.raises(AssertionError, match="read "):
        _lives()


def test_a_lost_lift_that_is_not_reckoned_with_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test of the test: readers' claims alone don't say how far the token was lifted."""
    settle = recovery._settle

    def trusting(resource: Resource, records: list[Record], claims: Iterable[Claim]) -> None:
        resource.token = 0
        settle(resource, records, claims)

    monkeypatch.setattr(recovery, "_settle", trusting)
    with pytest.raises(AssertionError, match="read "):
        _lives()


def _lives() -> None:
    for seed in range(60):
        run(seed, 1500)
