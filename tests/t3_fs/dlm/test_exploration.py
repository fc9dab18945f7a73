"""Every interleaving and every crash point of small worlds, with the real code."""

from __future__ import annotations

import pytest

from fs.dlm.explore import Broken, explore, replay
from fs.dlm.modes import Mode
from tests.t3_fs.dlm import models
from tests.t3_fs.dlm.models import LockWorld, PageWorld

PR, EX = Mode.PR, Mode.EX


@pytest.mark.parametrize(
    ("wishes", "deaths", "states_least"),
    [
        ([[EX, PR], [PR, EX]], 0, 100),
        ([[PR, EX], [PR, EX]], 1, 400),
        ([[EX], [PR], [EX]], 0, 150),
        ([[PR, EX], [PR, EX], [PR]], 0, 500),
    ],
)
def test_locks(wishes: list[list[Mode]], deaths: int, states_least: int) -> None:
    """Exclusion, values, tokens and liveness in every state."""
    seen = explore(LockWorld(wishes, deaths=deaths), states_max=20_000)
    print(f"{len(wishes)} nodes, {deaths} deaths: {seen}")
    assert seen.complete
    assert seen.states >= states_least


@pytest.mark.parametrize(
    ("wishes", "deaths", "states_least"),
    [
        ([[EX, PR], [PR, EX]], 1, 1000),
        ([[EX], [PR, EX], [PR]], 0, 300),
    ],
)
def test_a_page(wishes: list[list[Mode]], deaths: int, states_least: int) -> None:
    """A read after a remote write never returns old bytes."""
    seen = explore(PageWorld(wishes, deaths=deaths), states_max=20_000)
    print(f"{len(wishes)} nodes, {deaths} deaths: {seen}")
    assert seen.complete
    assert seen.states >= states_least


def test_three_nodes_and_a_death_as_far_as_time_allows() -> None:
    """The whole of it takes hours; `explorations` goes further."""
    seen = explore(LockWorld([[EX], [PR], [EX]], deaths=1), states_max=900)
    print(f"3 nodes, 1 death: {seen}")
    assert seen.states == 900


def test_a_pool_that_takes_any_offer_is_found_out() -> None:
    """The test of the test: without tokens an old page comes back."""
    world = PageWorld([[PR, PR], [EX]], fenced=False)
    with pytest.raises(Broken, match="read 0, written was 1") as broken:
        explore(world, states_max=20_000)
    with pytest.raises(AssertionError, match="read 0"):
        replay(world, broken.value.steps)


def test_a_master_that_grants_too_much_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test."""
    monkeypatch.setattr("fs.dlm.resource.compatible", lambda one, other: True)
    with pytest.raises(Broken, match=r"beside|was lost"):
        explore(LockWorld([[EX], [PR]]), states_max=1000)


def test_a_wish_that_is_forgotten_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: without BAST somebody waits for ever."""
    monkeypatch.setattr(models.Node, "blocking", lambda self, name, mode: None)
    with pytest.raises(Broken, match="waits for ever"):
        explore(LockWorld([[EX], [PR]]), states_max=1000)
