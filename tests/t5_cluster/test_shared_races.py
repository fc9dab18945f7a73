"""Three real guests race each other for the same names, files, inodes and locks of one volume.

The races are `guests.workloads.races`, what may come out of them `race_oracles`.  One cluster
serves all races of a seed, in the order of this file.

    make races SEEDS=20 (SEED=first)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest

from guests.workloads.races import RACES
from tests.support.ocfs2 import faults, problems
from tests.t5_cluster.race_oracles import judge
from tests.t5_cluster.races import (
    FREE_INODES,
    GUESTS,
    Outcome,
    RacingGuests,
    Space,
    racing_guests,
    read_space,
)

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("races")]

FIRST_SEED = int(os.environ.get("TMEM_RACES_FIRST", "1"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("TMEM_RACES", "1")))


MAKING = ("create", "mkdir", "symlink", "link")


class Races:
    """The cluster of one seed."""

    def __init__(self, seed: int, guests: RacingGuests) -> None:
        self.seed = seed
        self.guests = guests
        self.empty: Space = read_space(guests.image)

    def run(self, kind: str, operations: int) -> Outcome:
        """One race in a fresh folder, which is removed when all is as it must be."""
        folder = f"/{kind}"
        self.guests.alone("red", kind, folder=folder, prepare=1, operations=0)
        outcome = self.guests.race(kind, self.seed, operations, folder)
        assert judge(kind, outcome, f"{folder}/{kind}") == []
        self.guests.alone(GUESTS[self.seed % 3], "remove", folder=folder)
        return outcome


def winners(outcome: Outcome, *names: str) -> set[str]:
    """Who did any of these things."""
    return {call.who for call in outcome.named(*names)}


def losers(outcome: Outcome, name: str, error: str) -> set[str]:
    """Who came too late for one."""
    return {call.who for call in outcome.calls if (call.name, call.error) == (name, error)}


@pytest.fixture(scope="module", params=SEEDS)
def races(request: pytest.FixtureRequest, new_cluster_name: Callable[[], str]) -> Iterator[Races]:
    """Three guests that are up."""
    with racing_guests(new_cluster_name()) as guests:
        yield Races(request.param, guests)


def test_files_are_removed_by_other_nodes_while_open(races: Races) -> None:
    """Their makers go on with them; in the end each was removed once."""
    outcome = races.run("cross", 120)
    owners = {call.path: call.who for call in outcome.named("create")}
    assert any(owners[call.path] != call.who for call in outcome.named("unlink"))


def test_each_name_is_made_by_one(races: Races) -> None:
    """Files, directories, links: one node wins, the others hear that it exists."""
    outcome = races.run("create", 150)
    assert len(winners(outcome, *MAKING)) > 1
    assert any(losers(outcome, name, "EEXIST") for name in MAKING)


def test_things_move_between_directories(races: Races) -> None:
    """None is lost, doubled or out of reach."""
    outcome = races.run("directories", 150)
    assert len(winners(outcome, "rename")) > 1


def test_few_files_are_read_written_and_removed_by_all(races: Races) -> None:
    """Each read is one whole write."""
    outcome = races.run("files", 150)
    reads = [call for call in outcome.named("read") if call.facts["value"]]
    assert any(call.facts["value"][0] != call.who for call in reads)


def test_records_are_appended_while_logs_are_cut(races: Races) -> None:
    """None is torn, none lost but by a cut."""
    outcome = races.run("append", 150)
    assert len(winners(outcome, "append")) == 3
    assert {call.name for call in outcome.calls} >= {"cut", "empty"}


def test_no_space_is_lost(races: Races) -> None:
    """After all that, with everything removed and nobody mounted."""
    judge_disk(races.guests, races.empty)


def judge_disk(guests: RacingGuests, empty: Space) -> None:
    """All unmount; the volume is sound, and has the space that it had when it was empty."""
    guests.down()
    assert faults(guests.image) == []
    assert problems(guests.image) == []
    after = read_space(guests.image)
    assert after.accounted == empty.accounted, (empty, after)
    assert after.inode_bits_used == empty.inode_bits_used + sum(
        bits > before for bits, before in zip(after.inode_bits, empty.inode_bits, strict=True)
    ), "the block of each new group, and nothing else"


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
