"""What the lock manager promises, one by one, on lock managers at rest."""

from __future__ import annotations

import errno
import random

import pytest

from fs.dlm.codec import encode, encode_frame
from fs.dlm.messages import (
    TOKEN_MAX,
    VALUE_BYTES,
    Death,
    Done,
    Flag,
    Grave,
    Member,
    Message,
    Reason,
    Record,
)
from fs.dlm.modes import Mode, compatible, highest_beside
from fs.dlm.recovery import master_of
from fs.dlm.twin import Faults, Link
from tests.t3_fs.dlm.cluster import Cluster

NAME = b"M0000000000000000000018feb14715"
NL, PR, EX = Mode.NL, Mode.PR, Mode.EX
ONE = b"1" * VALUE_BYTES
TWO = b"2" * VALUE_BYTES


@pytest.fixture(name="cluster")
def three_nodes() -> Cluster:
    """A cluster at rest."""
    cluster = Cluster(3)
    for node in cluster.nodes.values():
        assert node.take_events() == [("recovered", 1)]
    return cluster


def hold(cluster: Cluster, number: int, mode: Mode, name: bytes = NAME) -> None:
    """A lock that is granted at once."""
    cluster.nodes[number].lock(name, mode)
    cluster.settle()
    assert cluster.nodes[number].take_events() == [("granted", name, mode)]


def test_modes() -> None:
    """Who goes with whom."""
    assert [compatible(PR, other) for other in (NL, PR, EX)] == [True, True, False]
    assert [compatible(EX, other) for other in (NL, PR, EX)] == [True, False, False]
    for mode in Mode:
        assert compatible(mode, highest_beside(mode))


def test_readers_share_and_a_writer_is_told_apart(cluster: Cluster) -> None:
    """AST and BAST."""
    hold(cluster, 0, PR)
    hold(cluster, 1, PR)
    cluster.nodes[2].lock(NAME, EX)
    cluster.settle()
    assert cluster.nodes[2].take_events() == []
    for number in (0, 1):
        assert cluster.nodes[number].take_events() == [("blocking", NAME, NL)]
        cluster.nodes[number].manager.down(NAME, NL)
        cluster.settle()
    assert cluster.nodes[2].take_events() == [("granted", NAME, EX)]


def test_a_writer_is_asked_down_to_pr_by_a_reader(cluster: Cluster) -> None:
    """No further than needed."""
    hold(cluster, 0, EX)
    cluster.nodes[1].lock(NAME, PR)
    cluster.settle()
    assert cluster.nodes[0].take_events() == [("blocking", NAME, PR)]
    cluster.nodes[0].manager.down(NAME, PR)
    cluster.settle()
    assert cluster.nodes[1].take_events() == [("granted", NAME, PR)]
    assert cluster.nodes[0].manager.mode(NAME) == PR


def test_noqueue_answers_at_once_and_nobody_is_asked(cluster: Cluster) -> None:
    """EAGAIN."""
    hold(cluster, 0, PR)
    cluster.nodes[1].lock(NAME, EX, Flag.NOQUEUE)
    cluster.settle()
    assert cluster.nodes[1].take_events() == [("denied", NAME, Reason.AGAIN)]
    assert cluster.nodes[1].manager.mode(NAME) is None
    assert cluster.nodes[0].take_events() == []
    cluster.nodes[1].lock(NAME, PR, Flag.NOQUEUE)
    cluster.settle()
    assert cluster.nodes[1].take_events() == [("granted", NAME, PR)]


def test_nobody_is_overtaken(cluster: Cluster) -> None:
    """A reader that comes after a writer waits, though it would go with the holders."""
    hold(cluster, 0, PR)
    cluster.nodes[1].lock(NAME, EX)
    cluster.settle()
    cluster.nodes[2].lock(NAME, PR)
    cluster.settle()
    assert cluster.nodes[2].take_events() == []
    cluster.nodes[0].manager.unlock(NAME)
    cluster.settle()
    assert cluster.nodes[1].take_events() == [("granted", NAME, EX), ("blocking", NAME, PR)]


def test_a_conversion_comes_before_newcomers(cluster: Cluster) -> None:
    """Nobody else can get EX while it keeps PR."""
    hold(cluster, 0, PR)
    hold(cluster, 1, PR)
    cluster.nodes[2].lock(NAME, EX)
    cluster.settle()
    cluster.nodes[0].lock(NAME, EX)
    cluster.settle()
    cluster.nodes[1].manager.down(NAME, NL)
    cluster.settle()
    assert ("granted", NAME, EX) in cluster.nodes[0].take_events()
    assert cluster.nodes[2].take_events() == []


def test_two_readers_that_want_to_write_do_not_wait_for_each_other(cluster: Cluster) -> None:
    """EDEADLK for the second."""
    hold(cluster, 0, PR)
    hold(cluster, 1, PR)
    cluster.nodes[0].lock(NAME, EX)
    cluster.settle()
    cluster.nodes[1].lock(NAME, EX)
    cluster.settle()
    assert ("denied", NAME, Reason.DEADLOCK) in cluster.nodes[1].take_events()
    assert cluster.nodes[1].manager.mode(NAME) == PR
    cluster.nodes[1].manager.down(NAME, NL)
    cluster.nodes[1].lock(NAME, EX)
    cluster.settle()
    assert ("granted", NAME, EX) in cluster.nodes[0].take_events()
    cluster.nodes[0].manager.down(NAME, NL)
    cluster.settle()
    assert cluster.nodes[1].take_events() == [("granted", NAME, EX)]


def test_two_nodes_that_pass_a_lock_to_and_fro_let_a_third_in(cluster: Cluster) -> None:
    """With o2dlm's rule, conversions first, node 2 would wait as long as 0 and 1 go on."""
    hold(cluster, 0, EX)
    hold(cluster, 1, NL)
    cluster.nodes[1].lock(NAME, EX)
    cluster.settle()
    cluster.nodes[2].lock(NAME, EX)
    cluster.settle()
    holder = 0
    for _ in range(4):
        other = 1 - holder
        cluster.nodes[holder].manager.down(NAME, NL)
        cluster.settle()
        if cluster.nodes[2].manager.mode(NAME) == EX:
            return
        cluster.nodes[holder].lock(NAME, EX)
        cluster.settle()
        holder = other
    raise AssertionError("node 2 waits for ever")


@pytest.mark.parametrize("granted_first", [False, True])
def test_cancel_is_always_answered(cluster: Cluster, *, granted_first: bool) -> None:
    """By a denial, or by the grant that was faster."""
    hold(cluster, 0, EX)
    node = cluster.nodes[1]
    node.lock(NAME, PR)
    cluster.settle()
    if granted_first:
        cluster.nodes[0].manager.down(NAME, NL)
    node.manager.cancel(NAME)
    cluster.settle()
    assert len(node.events) == 1
    if node.events[0][0] == "denied":
        assert node.events == [("denied", NAME, Reason.CANCELLED)]
        assert node.manager.mode(NAME) is None
        assert not granted_first or cluster.nodes[0].manager.mode(NAME) == NL
        for resource in (r for n in cluster.nodes.values() for r in n.manager.resources.values()):
            assert not resource.waiting and not resource.converting
    else:
        assert granted_first and node.manager.mode(NAME) == PR


def test_the_value_goes_with_the_lock(cluster: Cluster) -> None:
    """Written under EX, read by the next holder."""
    hold(cluster, 0, EX)
    assert cluster.nodes[0].manager.value(NAME) == bytes(VALUE_BYTES)
    cluster.nodes[0].manager.set_value(NAME, ONE)
    cluster.nodes[0].manager.down(NAME, NL)
    hold(cluster, 1, PR)
    assert cluster.nodes[1].manager.value(NAME) == ONE
    with pytest.raises(ValueError, match="EX only"):
        cluster.nodes[1].manager.set_value(NAME, TWO)
    cluster.nodes[1].manager.down(NAME, NL)
    hold(cluster, 2, EX)
    with pytest.raises(ValueError, match="64 bytes"):
        cluster.nodes[2].manager.set_value(NAME, b"short")
    cluster.nodes[2].manager.set_value(NAME, TWO)
    cluster.nodes[2].manager.unlock(NAME)
    hold(cluster, 0, PR)
    assert cluster.nodes[0].manager.value(NAME) == TWO


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize("master", [0, 2])
def test_the_value_of_a_dead_writer_is_lost(
    cluster: Cluster, master: int, *, asked_before: bool
) -> None:
    """Wherever the master is, and whenever the next one asks; until somebody writes a new one."""
    name = cluster.name_of_master(master)
    hold(cluster, 0, EX, name)
    cluster.nodes[0].manager.set_value(name, ONE)
    cluster.nodes[0].manager.down(name, NL)
    hold(cluster, 2, EX, name)
    assert cluster.nodes[2].manager.value(name) == ONE
    cluster.nodes[2].manager.set_value(name, TWO)
    if not asked_before:
        cluster.nodes[0].manager.unlock(name)
        cluster.settle()
    cluster.kill(2, hold=True)
    if asked_before:
        cluster.nodes[1].lock(name, PR)
    cluster.nodes[0].manager.release_dead(2)
    cluster.settle()
    for node in cluster.nodes.values():
        node.take_events()
    if not asked_before:
        hold(cluster, 1, PR, name)
    assert cluster.nodes[1].manager.value(name) is None
    cluster.nodes[1].manager.unlock(name)
    cluster.settle()
    hold(cluster, 0 if not asked_before else 1, EX, name)
    writer = cluster.nodes[0 if not asked_before else 1].manager
    assert writer.value(name) is None
    writer.set_value(name, ONE)
    writer.down(name, NL)
    hold(cluster, 1 if not asked_before else 0, PR, name)
    assert cluster.nodes[1 if not asked_before else 0].manager.value(name) == ONE


@pytest.mark.parametrize("mode", [PR, EX])
def test_a_value_outlives_its_master(cluster: Cluster, mode: Mode) -> None:
    """A holder knows it; the token goes up, because the master may have lifted it."""
    name = cluster.name_of_master(2)
    hold(cluster, 0, EX, name)
    cluster.nodes[0].manager.set_value(name, ONE)
    cluster.nodes[0].manager.down(name, NL)
    hold(cluster, 1, mode, name)
    token = cluster.nodes[1].manager.token(name)
    cluster.kill(2)
    assert cluster.nodes[1].manager.mode(name) == mode
    cluster.nodes[0].take_events()
    cluster.nodes[1].manager.down(name, NL)
    hold(cluster, 0, EX, name)
    assert cluster.nodes[0].manager.value(name) == ONE
    assert token < cluster.nodes[0].manager.token(name) == (2 << 32) + 1


def test_tokens_grow_with_writers_only_and_survive_everything(cluster: Cluster) -> None:
    """Also the loss of all who knew them."""
    name = cluster.name_of_master(1)
    hold(cluster, 0, EX, name)
    first = cluster.nodes[0].manager.token(name)
    assert first >> 32 == 1
    cluster.nodes[0].manager.down(name, PR)
    hold(cluster, 2, PR, name)
    assert cluster.nodes[2].manager.token(name) == first
    cluster.nodes[2].manager.unlock(name)
    cluster.nodes[0].manager.unlock(name)
    cluster.settle()
    assert not cluster.nodes[1].manager.resources
    hold(cluster, 2, EX, name)  # the resource was forgotten, its token was not
    second = cluster.nodes[2].manager.token(name)
    assert second > first
    cluster.kill(1)
    cluster.nodes[2].take_events()
    cluster.nodes[2].manager.unlock(name)
    cluster.kill(2)
    cluster.nodes[0].take_events()
    hold(cluster, 0, EX, name)  # master and all holders are gone
    assert cluster.nodes[0].manager.token(name) > second


def test_nothing_granted_is_lost_and_waiters_wait_on(cluster: Cluster) -> None:
    """A master dies."""
    name = cluster.name_of_master(2)
    hold(cluster, 0, EX, name)
    cluster.nodes[1].lock(name, PR)
    cluster.settle()
    cluster.nodes[0].take_events()
    cluster.kill(2)
    assert cluster.nodes[0].manager.mode(name) == EX
    assert set(cluster.nodes[0].take_events()) == {("blocking", name, PR), ("recovered", 2)}
    cluster.nodes[0].manager.down(name, PR)
    cluster.settle()
    assert ("granted", name, PR) in cluster.nodes[1].take_events()


def test_the_dead_stand_in_nobodys_way(cluster: Cluster) -> None:
    """A holder dies."""
    hold(cluster, 2, EX)
    cluster.nodes[0].lock(NAME, EX)
    cluster.settle()
    cluster.kill(2)
    assert ("granted", NAME, EX) in cluster.nodes[0].take_events()


@pytest.mark.parametrize("master", [0, 2])
def test_what_a_dead_writer_had_waits_for_the_replay(cluster: Cluster, master: int) -> None:
    """Known from the record if the master lives; held back on suspicion if it died too."""
    name = cluster.name_of_master(master)
    free = cluster.name_of_master(1)
    hold(cluster, 2, EX, name)
    cluster.kill(2, hold=True)
    for node in cluster.nodes.values():
        node.take_events()
    hold(cluster, 0, EX, free)
    cluster.nodes[0].lock(name, EX)
    cluster.settle()
    assert cluster.nodes[0].take_events() == []
    cluster.nodes[1].lock(name, PR, Flag.RECOVERING)
    cluster.settle()
    assert ("granted", name, PR) in cluster.nodes[1].take_events()
    cluster.nodes[1].manager.unlock(name)
    cluster.start(3)  # a newcomer knows it too, as a master perhaps
    assert ("granted", name, EX) not in cluster.nodes[0].take_events()
    cluster.nodes[1].manager.release_dead(2)
    cluster.settle()
    assert ("granted", name, EX) in cluster.nodes[0].take_events()


def test_a_reader_proves_that_the_dead_did_not_write(cluster: Cluster) -> None:
    """Nothing is held back then."""
    name = cluster.name_of_master(2)
    hold(cluster, 0, PR, name)
    cluster.kill(2, hold=True)
    cluster.nodes[1].take_events()
    hold(cluster, 1, PR, name)


def test_a_node_that_came_back_remembers_nothing(cluster: Cluster) -> None:
    """It died and joined again before the others saw a view without it."""
    hold(cluster, 2, EX)
    cluster.nodes[0].lock(NAME, PR)
    cluster.settle()
    cluster.twin.kill(2)
    cluster.start(2)
    assert ("granted", NAME, PR) in cluster.nodes[0].take_events()


def test_a_node_that_missed_a_view_without_it_is_expelled(cluster: Cluster) -> None:
    """Its locks were given to others."""
    hold(cluster, 2, EX)
    left_out = cluster.nodes.pop(2)
    cluster.view(0, 1)
    hold_events = [cluster.nodes[number].take_events() for number in (0, 1)]
    assert hold_events == [[("recovered", 2)]] * 2
    hold(cluster, 0, EX)
    cluster.nodes[2] = left_out
    cluster.view(0, 1, 2)
    assert left_out.take_events() == [("expelled",)]
    assert cluster.nodes[0].manager.mode(NAME) == EX
    with pytest.raises(OSError, match="not in the cluster") as problem:
        left_out.lock(NAME, PR)
    assert problem.value.errno == errno.EIO


def test_messages_of_an_old_view_have_no_effect(cluster: Cluster) -> None:
    """However late they come."""
    name = cluster.name_of_master(1)
    hold(cluster, 0, PR, name)
    cluster.nodes[0].manager.down(name, NL)
    old = list(cluster.twin.queues[Link(0, 1)])
    cluster.view(0, 1, 2)
    cluster.nodes[0].take_events()
    hold(cluster, 0, EX, name)
    for message in old:
        cluster.nodes[1].manager.deliver(0, message)
    cluster.nodes[2].lock(name, PR, Flag.NOQUEUE)
    cluster.settle()
    assert ("denied", name, Reason.AGAIN) in cluster.nodes[2].take_events()


def test_requests_before_the_first_view_are_made_in_it() -> None:
    """A node may ask before it has joined."""
    cluster = Cluster(2)
    cluster.nodes[2] = type(cluster.nodes[0])(cluster.twin, 2)
    cluster.nodes[2].lock(NAME, EX)
    cluster.view(0, 1, 2)
    assert ("granted", NAME, EX) in cluster.nodes[2].take_events()


def test_masters_are_spread_and_few_change() -> None:
    """Rendezvous hashing."""
    names = [b"M%022x%08x" % (number, 0) for number in range(3000)]
    before = {name: master_of(name, range(4)) for name in names}
    for node in range(4):
        assert 600 < sum(master == node for master in before.values()) < 900
    for name in names:
        after = master_of(name, range(3))
        assert after == before[name] or before[name] == 3


def test_more_messages_than_a_window_holds_arrive_in_bad_weather() -> None:
    """Loss, doubles, overtaking."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cluster = Cluster(2)
    names = [b"M%030d" % number for number in range(700)]
    for name in names:
        cluster.nodes[0].lock(name, EX)
    cluster.settle(chance, Faults(loss=0.2, doubling=0.2, overtaking=0.3))
    granted = [event[1] for event in cluster.nodes[0].take_events() if event[0] == "granted"]
    assert sorted(granted) == sorted(names)  # type: ignore[type-var]
    assert cluster.nodes[0].manager.links.retransmitted


def test_a_token_that_cannot_be_is_no_token(cluster: Cluster) -> None:
    """A master that believed in it would give out one that no message can carry."""
    name = next(
        name for name in (b"%d" % n for n in range(99)) if master_of(name, range(3)) == 1
    )  # fmt: skip
    for number in (1, 2):
        cluster.nodes[number].manager.set_view(2, frozenset(range(3)))
    manager = cluster.nodes[1].manager
    lie: Message = Record(name, TOKEN_MAX, TOKEN_MAX, None, None, frozenset())
    manager.deliver(0, encode_frame(2, 1, 0, *encode(lie)))
    assert manager.refused == 1
    cluster.nodes[0].manager.links.start(2, range(3))
    cluster.view(0, 1, 2)
    cluster.view(0, 1, 2)
    for node in cluster.nodes.values():
        node.take_events()
    hold(cluster, 2, EX, name)
    assert cluster.nodes[2].manager.token(name) < TOKEN_MAX


@pytest.mark.parametrize("where", ["record", "held", "grave"])
def test_a_death_that_is_to_come_is_none(cluster: Cluster, where: str) -> None:
    """Nobody could say that its journal was replayed, and all that it held back would wait."""
    name = next(
        name for name in (b"%d" % n for n in range(99)) if master_of(name, range(3)) == 1
    )  # fmt: skip
    for number in (1, 2):
        cluster.nodes[number].manager.set_view(2, frozenset(range(3)))
    manager = cluster.nodes[1].manager
    deaths = frozenset({Death(7, 3)})
    members = frozenset(range(3))
    lie: Message = Record(name, 5, 5, None, None, deaths)
    if where != "record":
        graves = frozenset({Grave(members, members, deaths)} if where == "grave" else ())
        held = deaths if where == "held" else frozenset()
        since = tuple(Member(node, 1) for node in range(3))
        lie = Done(1, True, 5, since, held, frozenset(), graves)
    manager.deliver(0, encode_frame(2, 1, 0, *encode(lie)))
    assert manager.refused == 1
    manager.set_view(3, frozenset({1}))
    assert manager.ready
    assert not manager.held
    manager.lock(name, EX)
    assert manager.mode(name) == EX
