"""Scenarios on real clusters: an attack is seen to work without its defence, and fails with it.

A few of the catalogue, of each kind of harm; `make scenarios` plays all of it, in both positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import ExitCode
from tests.support.clusters import tmem
from tools.interrupts import Interrupts
from tools.jails import missing_here
from tools.scenario.catalogue import find
from tools.scenario.play import play
from tools.scenario.scenario import Outcome

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that the scenarios of a module have in common."""
    return tmp_path_factory.mktemp("scenarios")


def played(name: str, cache: Path, *, defence: bool) -> Outcome:
    """A scenario in this process; its cluster is of others."""
    with Interrupts() as interrupts:
        return play(find(name), defence=defence, seed=11, cache=cache, interrupts=interrupts)


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The same by the command: exit code and JSON."""
    done = tmem("scenario", "run", *arguments, "--json", "--seed", "11", cwd=folder)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_poisoner_without_and_with_the_right_to_write(folder: Path) -> None:
    """By the command: broken and 1 without the defence, held and 0 with it."""
    code, found = run(folder, "reader-puts", "--defence", "off")
    assert code == ExitCode.VIOLATED
    assert found["verdict"] == "broken"
    assert found["succeeded"] == found["attempts"] == found["victim_mismatches"] == 32
    assert found["caught"] == 0

    code, found = run(folder, "reader-puts", "--defence", "on")
    assert code == ExitCode.OK, found
    assert found["verdict"] == "held"
    assert found["caught"] == found["attempts"] == 32
    assert found["succeeded"] == found["victim_mismatches"] == 0
    assert found["victim_checks"] == 32


@pytest.mark.parametrize("defence", [False, True])
def test_poison_by_a_member_with_all_rights(cache: Path, defence: bool) -> None:
    """Nodes that verify what they get read no wrong file; nodes that believe it do."""
    outcome = played("forged-pages", cache, defence=defence)
    tally = outcome.tally
    assert outcome.verdict == ("held" if defence else "broken"), (tally, outcome.events)
    assert tally.attempts == 288
    assert (tally.caught > 0) == defence
    assert (tally.victim_mismatches == 0) == defence
    assert not tally.problems
    if defence:
        # All are counted, of the first ones there are lines, and all those name the putter.
        audit = tally.figures["audit log"].measured
        assert audit["reported_pages"] == tally.caught
        assert list(audit["put_by"]) == ["mallory"]


def test_stale_pages_are_refused_for_their_tokens(cache: Path) -> None:
    """And for nothing else, which would prove nothing."""
    outcome = played("stale-pages", cache, defence=True)
    assert outcome.verdict == "held", (outcome.tally, outcome.events)
    assert outcome.tally.caught == 32
    assert outcome.tally.victim_checks == 16


def test_messages_that_are_none_are_counted_by_who_gets_them(cache: Path) -> None:
    """By the victim and not by the attacker, and the victim reads its files on."""
    outcome = played("lock-messages", cache, defence=True)
    tally = outcome.tally
    assert outcome.verdict == "held", (tally, outcome.events)
    assert tally.attempts == 600
    assert 300 < tally.caught <= 600
    assert tally.victim_checks > 0


@pytest.mark.skipif(bool(missing_here()), reason="a jail that lacks something holds less")
@pytest.mark.parametrize("defence", [False, True])
def test_a_spy_without_and_in_its_jail(cache: Path, defence: bool) -> None:
    """Whatever lies in the run directory is read without a jail, and nothing of it from inside."""
    outcome = played("run-directory", cache, defence=defence)
    tally = outcome.tally
    assert outcome.verdict == ("held" if defence else "broken"), (tally, outcome.events)
    assert tally.attempts > 10
    assert tally.caught == (tally.attempts if defence else 0)
    assert (tally.victim_checks, tally.victim_mismatches) == (32, 0)


def test_a_scenario_that_is_not_there(folder: Path) -> None:
    """One line, and the exit code of wrong usage."""
    done = tmem("scenario", "run", "nonsense", cwd=folder)
    assert done.returncode == ExitCode.USAGE
    assert "no scenario 'nonsense'" in done.stderr
    done = tmem("scenario", "run", "all", "--defence", "perhaps", cwd=folder)
    assert done.returncode == ExitCode.USAGE
    assert "say on or off" in done.stderr
