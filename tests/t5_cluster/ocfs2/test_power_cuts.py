"""The power goes with several dirty journals (the long form: `campaign`)."""

from __future__ import annotations

import pytest

from fs.block.writelog import PowerCut, PowerCuts
from tests.t5_cluster.ocfs2.judgement import Seen, Width, recovered
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


def test_run_is_the_same_again() -> None:
    """An id means something only then."""
    runs = [PowerCutRun(1, LENGTH) for _ in range(2)]
    logs = [run._epochs for run in runs]
    assert logs[0] == logs[1]
    runs[0].replay(f"{runs[0].name}/30:1/0:1")


def test_what_may_not_be_is_seen() -> None:
    """A name or a byte that was synced and is not there."""
    run = PowerCutRun(1, LENGTH)
    last = PowerCut(len(run._epochs) - 1, 0)
    seen = recovered(PowerCuts(run._before, run._epochs).state(last), 0)[1]
    run._must_be_allowed(last, seen)
    path, content = next((path, content) for path, content in seen.contents.items() if content)
    damaged = {**seen.contents, path: bytes([content[0] ^ 1]) + content[1:]}
    with pytest.raises(AssertionError, match="content of"):
        run._must_be_allowed(last, Seen(seen.shape, damaged))
    with pytest.raises(AssertionError, match="none of those"):
        run._must_be_allowed(last, Seen(seen.shape - {(path, len(content))}, seen.contents))
