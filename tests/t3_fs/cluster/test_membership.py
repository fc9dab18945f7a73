"""Joins, leaves, deaths and cuts, one at a time, and what the nodes then agree on."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from fs.block.shared import SharedDevice
from fs.cluster.agreement import Voter
from fs.cluster.messages import Kind, Message, decode, encode
from fs.cluster.node import ClusterNode
from fs.cluster.region import Region
from fs.cluster.view import MAX_EPOCH, Ballot, View, make_view
from tests.t3_fs.cluster.world import MS, STEP_NS, TIMING, Guest, World

DEAD_NS = TIMING.dead_ns


def up(nodes: int, seed: int = 1, *, knows_processes: bool = False) -> World:
    """All of them in the first view."""
    world = World(seed, nodes)
    world.knows_processes = knows_processes
    for node in range(nodes):
        world.start(node)
    world.run(1000 * MS)
    assert agreed(world) == set(range(nodes))
    return world


def agreed(world: World) -> set[int]:
    """The members of the one view that all running nodes have."""
    views = {guest.node.current for guest in world.guests.values() if guest.running}
    assert len(views) == 1, views
    view = views.pop()
    return set(view.members) if view else set()


def run_until(world: World, done: object, limit_ns: int = 60 * DEAD_NS) -> int:
    """Step until `done()`; how long it took."""
    assert callable(done)
    began_ns = world.now_ns
    while not done():
        assert world.now_ns - began_ns < limit_ns
        world.run(STEP_NS)
    return world.now_ns - began_ns


def drop(world: World, *kinds: Kind, victims: set[int] | None = None) -> None:
    """From now on lose messages of these kinds."""
    post = world.post

    def lossy(sender: Guest, to: int, message: bytes) -> None:
        if decode(message).kind not in kinds or (victims is not None and to not in victims):
            post(sender, to, message)

    world.post = lossy  # type: ignore[method-assign]


def test_one_node_alone_makes_a_cluster() -> None:
    """No network, no quorum of others."""
    world = World(1, 3)
    world.start(2)
    world.run(1000 * MS)
    assert agreed(world) == {2}


def test_a_late_node_joins_with_the_next_epoch() -> None:
    """Nobody is dead for it, and all get the same view."""
    world = World(1, 3)
    world.start(1)
    world.run(1000 * MS)
    world.start(0)
    world.run(1000 * MS)
    assert agreed(world) == {0, 1}
    assert world.guests[1].epochs == [1, 2]
    assert world.guests[0].epochs == [2]


@pytest.mark.parametrize("node", [0, 1, 2])
def test_a_clean_leave_is_no_death(node: int) -> None:
    """The coordinator's too."""
    world = up(3)
    world.guests[node].node.leave()
    world.run(1000 * MS)
    assert world.guests[node].end == "left"
    assert agreed(world) == {0, 1, 2} - {node}
    assert world.views[max(world.views)].left == {node}
    assert not world.views[max(world.views)].dead


def test_all_leave_at_once_and_come_back_with_a_higher_epoch() -> None:
    """The epoch is on the disk."""
    world = up(3)
    for guest in world.guests.values():
        guest.node.leave()
    world.run(2000 * MS)
    assert {guest.end for guest in world.guests.values()} == {"left"}
    last = max(world.views)
    world.start(2)
    took_ns = run_until(world, lambda: world.guests[2].epochs)
    assert world.guests[2].epochs[0] > last
    assert took_ns < DEAD_NS


@pytest.mark.parametrize("knows_processes", [False, True])
@pytest.mark.parametrize("node", [0, 1, 2])
def test_a_death_is_agreed_after_the_lease(node: int, knows_processes: bool) -> None:
    """Not before the victim's lease is over, unless its process is known to have ended."""
    world = up(3, knows_processes=knows_processes)
    lease_end_ns = world.guests[node].node.fence.lease_end_ns
    world.kill(node)
    run_until(world, lambda: len(world.views) == 2)
    assert knows_processes == (world.now_ns < lease_end_ns)
    world.run(500 * MS)
    assert agreed(world) == {0, 1, 2} - {node}
    assert world.views[2].dead == {node}
    assert world.disk.keys.keys() == {0, 1, 2} - {node}


@pytest.mark.parametrize(
    "kind", [Kind.PREPARE, Kind.PROMISE, Kind.ACCEPT, Kind.ACCEPTED, Kind.VIEW]
)
@pytest.mark.parametrize("lost_to", [{1}, {2}, {0, 1, 2, 3}])
def test_a_coordinator_that_dies_at_each_step_leaves_one_view(
    kind: Kind, lost_to: set[int]
) -> None:
    """Node 3 died, node 0 leads the agreement and dies when its messages of one kind are lost."""
    world = up(4)
    post = world.post
    drop(world, kind, victims=lost_to)
    world.kill(3)
    run_until(world, lambda: world.guests[0].node.membership._attempt is not None)
    world.run(60 * MS)
    world.kill(0)
    world.post = post  # type: ignore[method-assign]
    world.run(4 * DEAD_NS)
    assert agreed(world) == {1, 2}
    for guest in world.guests.values():
        if guest.running:
            assert guest.epochs == list(range(1, max(world.views) + 1))


def test_what_only_the_dead_coordinator_installed_is_kept() -> None:
    """All accepted it, so it may have been acted upon: the next one brings it to its end."""
    world = up(3)
    drop(world, Kind.VIEW)
    world.start(2) if not world.guests[2].running else None
    world.guests[2].node.leave()
    run_until(world, lambda: len(world.views) == 2)
    assert world.guests[0].epochs == [1, 2] and world.guests[1].epochs == [1]
    world.kill(0)
    del world.__dict__["post"]
    world.run(4 * DEAD_NS)
    assert world.guests[1].epochs == [1, 2, 3]
    assert world.views[2].members == {0, 1}
    assert world.views[3].members == {1}


def test_a_restarted_node_is_a_death_and_a_join() -> None:
    """Two views, never one in which it merely changed its generation."""
    world = up(3)
    world.kill(1)
    world.start(1)
    world.run(2000 * MS)
    assert agreed(world) == {0, 1, 2}
    assert world.views[2].members == {0, 2} and world.views[2].dead == {1}
    assert world.views[3].members == {0, 1, 2}


def test_two_first_nodes_at_once_make_one_cluster() -> None:
    """Whoever starts when: never two clusters on one disk."""
    for seed, late in itertools.product(range(5), range(0, 500, 40)):
        world = World(seed, 2)
        world.start(1)
        world.run(late * MS)
        world.start(0)
        world.run(2000 * MS)
        assert agreed(world) == {0, 1}, (seed, late)


@pytest.mark.parametrize(("nodes", "apart", "stay"), [
    (2, {1}, {0}), (3, {0}, {1, 2}), (4, {2, 3}, {0, 1}), (4, {0}, {1, 2, 3}),
    (5, {0, 1}, {2, 3, 4}),
])  # fmt: skip
def test_the_side_without_quorum_fences_itself(nodes: int, apart: set[int], stay: set[int]) -> None:
    """It never sees a view without the others."""
    world = up(nodes)
    world.cuts = {frozenset({a, b}) for a in apart for b in stay}
    world.run(6 * DEAD_NS)
    assert agreed(world) == stay
    for node in apart:
        guest = world.guests[node]
        assert guest.end is not None and "it reaches" in guest.end
        assert guest.epochs == [1]


def test_of_one_cut_link_among_three_the_higher_node_gives_way() -> None:
    """Otherwise two members could never share a lock again."""
    world = up(3)
    world.cuts = {frozenset({0, 1})}
    world.run(8 * DEAD_NS)
    assert agreed(world) == {0, 2}
    assert "gives way" in str(world.guests[1].end)


def test_a_short_cut_changes_nothing() -> None:
    """Shorter than the quorum delay."""
    world = up(3)
    world.cuts = {frozenset({0, 1}), frozenset({0, 2})}
    world.run(TIMING.quorum_delay_ns // 2)
    world.cuts = set()
    world.run(6 * DEAD_NS)
    assert agreed(world) == {0, 1, 2}
    assert len(world.views) == 1


@pytest.mark.parametrize("node", [0, 2])
def test_a_pause_within_the_lease_is_forgiven_a_longer_one_is_not(node: int) -> None:
    """The woken node is fenced before it does anything."""
    world = up(3)
    guest = world.guests[node]
    guest.paused = True
    world.run(TIMING.write_timeout_ns // 2)
    guest.paused = False
    world.run(1000 * MS)
    assert agreed(world) == {0, 1, 2} and len(world.views) == 1
    guest.paused = True
    world.run(3 * DEAD_NS)
    guest.paused = False
    with pytest.raises(OSError, match="the lease ran out"):
        guest.node.fence.check()
    world.run(STEP_NS)
    assert guest.end is not None and "lease ran out" in guest.end
    assert agreed(world) == {0, 1, 2} - {node}


@pytest.mark.parametrize("what", ["broken_writes", "broken_reads"])
def test_a_node_that_lost_the_disk_fences_itself_first(what: str) -> None:
    """Before the others have a view without it (the world checks that in each step)."""
    world = up(3)
    setattr(world.guests[1], what, True)
    run_until(world, lambda: world.guests[1].end)
    assert len(world.views) == 1
    world.run(2 * DEAD_NS)
    assert agreed(world) == {0, 2}


def test_a_disk_that_stalls_for_all_fences_all_and_they_can_start_again() -> None:
    """As with o2cb when the shared disk is away for too long."""
    world = up(3)
    for guest in world.guests.values():
        guest.broken_writes = True
    world.run(2 * DEAD_NS)
    assert all("lease ran out" in str(guest.end) for guest in world.guests.values())
    for node in range(3):
        world.start(node)
    world.run(4 * DEAD_NS)
    assert agreed(world) == {0, 1, 2}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_different_timings_are_refused_by_name(order: tuple[int, int]) -> None:
    """Whoever is in the cluster stays; the text names the node and both values."""
    world = World(1, 2)
    other = dataclasses.replace(TIMING, dead_threshold=9)
    world.start(order[0])
    world.run(1000 * MS)
    world.start(order[1], other)
    world.run(1000 * MS)
    text = str(world.guests[order[1]].end)
    assert text.startswith("refused: ")
    assert f"node web{order[1]} ({order[1]}) can't join" in text
    assert f"dead_threshold is 5 at node web{order[0]} ({order[0]})" in text
    assert f"and 9 at node web{order[1]} ({order[1]})" in text
    world.run(2 * DEAD_NS)
    assert agreed(world) == {order[0]}
    assert len(world.views) == 1


def test_damaged_and_foreign_messages_are_counted_and_ignored() -> None:
    """From a former incarnation, from nobody, and noise."""
    world = up(2)
    node = world.guests[0].node
    for noise in (b"", b"\0" * 40, world.rng.randbytes(100)):
        node.deliver(1, noise)
    assert node.membership.malformed == 3
    posted: list[bytes] = []
    world.post = lambda sender, to, message: posted.append(message)  # type: ignore[method-assign]
    world.guests[1].node.leave()
    world.run(100 * MS)
    node.deliver(5, posted[0])
    node.deliver(0, posted[0])
    assert agreed(world) == {0, 1}
    assert not node.membership._leavers


def test_a_view_that_only_the_disk_shows_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member whose messages never arrive still reads that the others went on."""
    world = up(2)
    guest = world.guests[1]
    beat = dataclasses.replace(guest.node.heartbeat.beats[0], epoch=5, members=frozenset({0}))
    monkeypatch.setitem(guest.node.heartbeat.beats, 0, beat)
    guest.node._look_for_newer_views()
    assert guest.node.fence.reason == "node web0 (0) is in the view of epoch 5 without it"


class Owner:
    """A guest on a real image; keeps what it was told."""

    def __init__(self, image: Path, number: int, key: int, world: dict[int, Owner]) -> None:
        self.told: list[tuple[str, object]] = []
        self.number = number
        self.world = world
        self.device = SharedDevice(image, number, key)
        self.node = ClusterNode(
            number,
            key,
            timing=TIMING,
            region=Region(self.device, 64, 8),
            reservations=self.device,
            clock=lambda: Owner.now_ns,
            send=self._send,
            events=self,
        )
        self.device.lease = self.node.fence

    now_ns = 10**9

    def _send(self, to: int, message: bytes) -> None:
        self.world[to].node.deliver(self.number, message)

    def view(self, epoch: int, members: frozenset[int], dead: frozenset[int]) -> None:
        self.told.append(("view", (epoch, set(members), set(dead))))

    def fenced(self, reason: str) -> None:
        self.told.append(("fenced", reason))

    def left(self) -> None:
        self.told.append(("left", None))

    def refused(self, reason: str) -> None:
        self.told.append(("refused", reason))


def test_nodes_on_a_real_image(tmp_path: Path) -> None:
    """Heartbeat through `SharedDevice`; a node with a late clock is stopped all the same."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    world: dict[int, Owner] = {}
    for number in (1, 2):
        world[number] = Owner(image, number, 0xC0 + number, world)
    for a, b in ((1, 2), (2, 1)):
        world[a].node.peer_up(b)

    def run(*numbers: int) -> None:
        for _ in range(100):
            Owner.now_ns += STEP_NS
            for number in numbers:
                world[number].node.tick(Owner.now_ns)

    run(1, 2)
    assert world[1].told == world[2].told == [("view", (1, {1, 2}, set()))]
    world[2].device.write(0, 1, bytes(4096))
    run(1)
    assert world[1].told[1:] == [("view", (2, {1}, {2}))]
    with pytest.raises(OSError, match="node 2 is fenced"):
        world[2].device.write(0, 1, b"x" * 4096)
    world[2].device.lease = None
    with pytest.raises(OSError, match="node 2 was preempted by node 1"):
        world[2].device.write(0, 1, b"x" * 4096)
    run(1, 2)
    assert world[2].told[1][0] == "fenced" and len(world[2].told) == 2
    world[1].node.leave()
    run(1)
    assert world[1].told[-1] == ("left", None)
    for owner in world.values():
        owner.device.close()


def test_a_voter_keeps_its_promises() -> None:
    """Nothing below a promised ballot is promised or accepted; the same one again is."""
    voter = Voter()
    low, high = Ballot(2, 1, 5), Ballot(2, 2, 0)
    view = View(2, ((0, 1),))
    assert voter.promise(high) and voter.promise(high)
    assert not voter.promise(low) and not voter.accept(low, view)
    assert voter.accepted_for(2) is None
    assert voter.accept(high, view)
    assert voter.accepted_for(2) == (high, view) and voter.accepted_for(3) is None


def test_two_that_leave_at_once_with_the_last_view_lost() -> None:
    """The second one accepted that it is out, so it makes no other view of that epoch."""
    world = up(2)
    drop(world, Kind.VIEW)
    world.guests[1].node.leave()
    world.guests[0].node.leave()
    world.run(4 * DEAD_NS)
    assert {guest.end for guest in world.guests.values()} == {"left"}
    assert world.guests[0].epochs in ([1, 2], [1])


def test_a_view_knows_its_members() -> None:
    """And which incarnation each one is."""
    view = View(3, ((1, 10), (4, 40)))
    assert view.members == {1, 4}
    assert (view.generation(4), view.generation(2)) == (40, None)


def test_a_lie_about_the_epoch_stops_views_and_not_nodes() -> None:
    """There is no epoch behind the last one; whoever dies then stays a member."""
    world = World(1, 3)
    for node in range(2):
        world.start(node)
    world.run(1000 * MS)
    members = {n: world.guests[n].node.membership.generation for n in range(2)}
    seen: list[int] = []

    def note(guest: Guest, view: View, dead: frozenset[int]) -> None:
        seen.append(view.epoch)

    # The world would see at once that epochs were left out.
    world.installed = note  # type: ignore[method-assign]
    lie = Message(Kind.VIEW, members[1], view=make_view(MAX_EPOCH, members))
    world.guests[0].node.membership.deliver(1, encode(lie))
    world.kill(1)
    world.run(4 * DEAD_NS)
    assert world.guests[0].running
    assert seen == [MAX_EPOCH]
