"""Crashes of nodes that verify pages of a pool that an attacker has (long form: `campaign`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from fs.block.writelog import PowerCuts
from tests.t5_cluster.ocfs2.deaths import DeathRun
from tests.t5_cluster.ocfs2.judgement import Width
from tests.t5_cluster.ocfs2.oracle import Oracle, agree
from tests.t5_cluster.ocfs2.poisoned import HostilePool, checksums_hold
from tests.t5_cluster.ocfs2.powercuts import PowerCutRun
from tests.t5_cluster.ocfs2.workload import volume, workload
from tests.t5_cluster.ocfs2.world import World

LENGTH = 60
CUTS = Width(subset_writes_max=6, samples=20, torn_each=1)
EVERY = 19


@pytest.mark.parametrize("seed", [1, 2])
def test_checksums_are_of_what_the_disk_holds_after_each_power_cut(
    seed: int, expect_warning: Callable[[str], None]
) -> None:
    """Whatever was under way, and in whatever order it got to the disk."""
    expect_warning("event=mismatch")
    run = PowerCutRun(seed, LENGTH, poisoned=True)
    states = PowerCuts(run._before, run._epochs)
    counts: Counter[str] = Counter()
    judged = 0
    for number, cut in enumerate(run._cuts(CUTS)):
        if number % EVERY == seed % EVERY:
            try:
                counts += checksums_hold(states.state(cut))
            except AssertionError as reason:
                raise AssertionError(f"{run.name}/{cut}: {reason}") from reason
            judged += 1
    assert judged > 50
    assert counts["checksums"] > 20 * judged
    assert counts["outside"] > 10 * judged


def test_the_volume_is_whole_as_well(expect_warning: Callable[[str], None]) -> None:
    """After power cuts, for both checkers, and holds what was synced."""
    expect_warning("event=mismatch")
    run = PowerCutRun(3, LENGTH, poisoned=True)
    run.run(Width(subset_writes_max=3, samples=3, torn_each=1, every=90, fsck_every=4))
    assert run.counts["power cuts"] > 5
    assert run.counts["fsck runs"] > 1


def test_a_node_dies_among_others_that_verify(expect_warning: Callable[[str], None]) -> None:
    """The others see no page of the attacker's: all that they read can be explained without."""
    expect_warning("event=mismatch")
    run = DeathRun(4, LENGTH, 1, poisoned=True)
    run.run(Width(every=431, fsck_every=6))
    assert run.counts["deaths"] > 3
    assert run.counts["mismatches"] > 50
    assert run.counts["checksums"] > 100
    assert run.counts["outside"] > 50


@pytest.mark.parametrize("honest", [True, False])
def test_what_nodes_read(honest: bool, expect_warning: Callable[[str], None]) -> None:
    """From an attacker's pool: what they would read without. From an honest one nothing is
    refused."""
    if not honest:
        expect_warning("event=mismatch")
    image, model = volume(poisoned=True)
    operations = workload(5, 150, poisoned=True)
    pool = HostilePool(5, honest=honest)
    world = World(image, 5, pool=pool)
    world.run(operations)
    oracle = Oracle(model, operations)
    for number, effect in enumerate(oracle.effects):
        assert agree(effect.outcome, world.outcomes[number]), str(operations[number])
    assert sum(one.verified for one in world.verifications) > 30
    mismatches = sum(one.mismatches for one in world.verifications)
    assert mismatches == 0 if honest else mismatches > 50
