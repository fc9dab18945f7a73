"""A few random lives of a cluster; `python -m tests.t3_fs.dlm.campaign` has more."""

from __future__ import annotations

import random

import pytest

from fs.dlm.manager import LockManager
from fs.dlm.resource import Resource
from tests.t3_fs.dlm.campaign import run

SEEDS = 8
TURNS = 1500


@pytest.mark.parametrize("number", range(SEEDS))
def test_a_life_with_every_fault(number: int) -> None:
    """A failure names the seed: `python -m tests.t3_fs.dlm.campaign --seeds 1 --seed N`."""
    seed = random.SystemRandom().randrange(1 << 30) // SEEDS * SEEDS + number
    print(f"seed {seed}")
    run(seed, TURNS)


def test_a_token_that_does_not_grow_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: with constant tokens an old page comes back from the pool."""
    grant = Resource._grant

    def stuck(self: Resource, waiter: object) -> object:
        self.token -= waiter.mode == 5  # type: ignore[attr-defined]
        return grant(self, waiter)  # type: ignore[arg-type]

    monkeypatch.setattr(Resource, "_grant", stuck)
    with pytest.raises(AssertionError, match="seed"):
        _lives(20)


def test_a_hold_that_is_forgotten_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: a dead writer's locks are given away before its journal is replayed."""
    monkeypatch.setattr(LockManager, "hold", lambda self, dead_node: None)
    with pytest.raises(AssertionError, match="seed"):
        _lives(20)


def _lives(count: int) -> None:
    for seed in range(count):
        run(seed, TURNS)
