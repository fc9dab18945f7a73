"""Random faults: whatever happens, one view for an epoch, and nobody writes who was left out."""

from __future__ import annotations

import pytest

from tests.t3_fs.cluster.nemesis import RUNS, torment
from tests.t3_fs.cluster.world import World


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_agreement_and_fencing_hold_under_any_faults(seed: int, nodes: int) -> None:
    """Then the survivors agree, and all nodes that are started again get in."""
    print(f"seed {seed}, {nodes} nodes")
    world = World(seed * 10 + nodes, nodes)
    torment(world, nodes, rounds=12)
    world.settle()
    for node in range(nodes):
        if not world.guests[node].running:
            world.start(node)
    alive = world.settle()
    assert alive.keys() == set(range(nodes)), {n: g.end for n, g in world.guests.items()}
    assert world.written > 0
