"""Races of real guests that need a cluster of their own: one is killed, inodes run out.

The fork server of clusters is one in a process, so these are not in the file whose cluster lasts.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from guests.workloads.races import RACES
from tests.support.ocfs2 import faults, problems
from tests.t5_cluster.race_oracles import judge
from tests.t5_cluster.races import FREE_INODES, GUESTS, racing_guests, read_space
from tests.t5_cluster.test_shared_races import SEEDS, judge_disk, losers

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("seed", SEEDS)
def test_node_is_killed_in_the_middle_of_all_races(
    seed: int, new_cluster_name: Callable[[], str], expect_warning: Callable[[str], None]
) -> None:
    """The others go on without an error, it comes back while they do, and what it synced is
    there. Then it is killed once more, with changes in its journal that nobody else wanted."""
    expect_warning(r"event=guest-died guest=\w+ exit_code=-9")
    folder = "/killed"
    with racing_guests(new_cluster_name()) as guests:
        empty = read_space(guests.image)
        guests.alone("red", "all", folder=folder, prepare=1, operations=0)
        victim = GUESTS[seed % 3]
        racers = {
            guest: guests.start(guest, "all", seed, operations=50, folder=folder)
            for guest in GUESTS
        }
        lives = [racers.pop(victim)]
        guests.await_work(victim, 20 + seed * 37 % 160)
        guests.kill(victim)
        guests.cluster.revive(victim)
        lives.append(guests.start(victim, "own", seed, operations=100_000, folder=folder))
        guests.finish(*racers)
        guests.await_work(victim, guests.status(victim)["done"] + 20 + seed % 20)
        guests.kill(victim)
        guests.cluster.revive(victim)
        lives.append(guests.start(victim, "all", seed, operations=10, folder=folder))
        guests.finish(*GUESTS)
        outcome = guests.outcome([*racers.values(), *lives], folder, lost=lives[:-1])
        for kind in RACES:
            assert judge(kind, outcome, f"{folder}/{kind}") == []
        others = "".join(guests.log(guest) for guest in racers)
        recovered = f"event=recovered node=node {victim} ({GUESTS.index(victim)})"
        assert others.count(recovered) == 2
        assert re.search(rf"{re.escape(recovered)} slot=\d blocks=[1-9]", others)
        guests.alone(victim, "remove", folder=folder)
        judge_disk(guests, empty)


@pytest.mark.parametrize("seed", SEEDS)
def test_inodes_are_taken_from_the_slot_that_has_them(
    seed: int, new_cluster_name: Callable[[], str]
) -> None:
    """There is no room for a second group of inodes: all live from the one of slot 0."""
    folder = "/i"
    with racing_guests(new_cluster_name(), room_blocks=0, full=True) as guests:
        empty = read_space(guests.image)
        assert empty.inode_bits == [1024, 0, 0]
        guests.alone("red", "all", folder=folder, prepare=1, operations=0)
        outcome = guests.race("inodes", seed, 120, folder)
        assert judge("inodes", outcome, f"{folder}/inodes") == []
        made = [call for call in outcome.named("create") if call.done]
        assert len({call.who for call in made}) == 3
        assert len(made) > FREE_INODES, "some were used again"
        assert losers(outcome, "create", "ENOSPC")

        # Each comes to the end of what all have.
        for guest in GUESTS:
            guests.alone(guest, "inodes", folder=folder, operations=2 * FREE_INODES, cutter=1)
        full = guests.outcome([], folder)
        guests.down()
        assert faults(guests.image) == []
        assert problems(guests.image) == []
        after = read_space(guests.image)
        assert after.inode_bits == empty.inode_bits
        assert after.inode_bits_used == 1024
        assert len(full.tree) + 1 == 1024 - empty.inode_bits_used
