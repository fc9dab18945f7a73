"""The power goes with several dirty journals (the long form: `campaign`)."""

from __future__ import annotations

import pytest

from tests.t5_cluster.ocfs2.judgement import Width
from tests.t5_cluster.ocfs2.powercuts import PowerCutRun

SHORT = Width(subset_writes_max=3, samples=3, torn_each=1, every=13, again_every=20, fsck_every=40)
LENGTH = 60


@pytest.mark.parametrize("seed", [1, 2])
def test_power_cut_with_several_dirty_journals(seed: int) -> None:
    """Whoever mounts replays them all: the volume is whole, and what was synced is there."""
    run = PowerCutRun(seed, LENGTH)
    run.run(SHORT)
    assert run.counts["power cuts"] > 40
    assert run.counts["recovery cuts"] > 20
    assert run.counts["fsck runs"] > 1
