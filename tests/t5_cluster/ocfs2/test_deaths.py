"""A node dies at steps of a workload (the long form: `campaign`)."""

from __future__ import annotations

import pytest

from tests.t5_cluster.ocfs2.deaths import DeathRun
from tests.t5_cluster.ocfs2.judgement import Width

LENGTH = 60
EVERY = 173


@pytest.mark.parametrize("seed", [2, 3])
def test_node_dies_and_the_others_go_on(seed: int) -> None:
    """They recover it, finish their work, and the volume holds what they saw and it promised."""
    run = DeathRun(seed, LENGTH, seed % 3)
    run.run(Width(every=EVERY, fsck_every=6))
    assert run.counts["deaths"] > 8
    assert run.counts["fsck runs"] > 1
