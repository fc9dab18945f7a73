"""Random faults on a `World`, all from its seed. Safety is checked by the world in each step."""

from __future__ import annotations

import os

from tests.t3_fs.cluster.world import MS, Guest, World

RUNS = int(os.environ.get("TMEM_CLUSTER_RUNS", "8"))
"""How many seeds a campaign takes; `make campaigns` gives more."""


def torment(world: World, nodes: int, rounds: int) -> None:
    """Start, kill, pause, cut, lose, stall, leave, in any order; then `rounds` times again."""
    rng = world.rng
    for node in rng.sample(range(nodes), nodes):
        world.start(node)
        world.run(rng.choice([0, 20 * MS, 300 * MS]))
    for _ in range(rounds):
        world.loss = rng.choice([0.0, 0.0, 0.1, 0.4])
        world.doubled = rng.choice([0.0, 0.2])
        world.delay_ns = rng.choice([10, 100, 400]) * MS
        world.pause_chance = rng.choice([0.0, 0.0, 0.005, 0.02])
        world.longest_pause_ns = rng.choice([100, 450, 900]) * MS
        if rng.random() < 0.3:
            world.cuts = {
                frozenset({a, b})
                for a in range(nodes)
                for b in range(a)
                if rng.random() < rng.choice([0.1, 0.5])
            }
        elif rng.random() < 0.6:
            world.cuts = set()
        _hurt(world, world.guests[rng.randrange(nodes)])
        world.run(rng.choice([100, 300, 700, 2500]) * MS)


def _hurt(world: World, guest: Guest) -> None:
    rng = world.rng
    if not guest.running:
        if rng.random() < 0.7:
            world.start(guest.number)
        return
    fault = rng.randrange(7)
    if fault == 0:
        world.kill(guest.number)
    elif fault == 1:
        world.kill(guest.number)
        world.start(guest.number)
    elif fault == 2 and guest.node.current is not None:
        guest.node.leave()
    elif fault == 3:
        guest.broken_writes = rng.random() < 0.5
        guest.broken_reads = not guest.broken_writes
    elif fault == 4:
        guest.broken_writes = guest.broken_reads = False
    elif fault == 5:
        guest.paused = True
        world.run(rng.randrange(1, 900) * MS)
        guest.paused = False
