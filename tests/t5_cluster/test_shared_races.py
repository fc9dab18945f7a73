"""Three real guests race each other for the same names, files, inodes and locks of one volume.

The races are `guests.workloads.races`, what may come out of them `race_oracles`.  One cluster
serves all races of a seed, in the order of this file.

    make races SEEDS=20 (SEED=first)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.ocfs2 import faults, problems
from tests.t5_cluster.race_oracles import judge
from tests.t5_cluster.races import (
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
