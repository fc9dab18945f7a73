"""tmem experiment policy: the scheduler beside greedy and static division, over the real parts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ipc.errors import ExitCode
from tools.cli import main
from tools.experiment import policy
from tools.experiment.policy import Plan, divisions, roles, run

SMALL = Plan(arena_frames=512, guest_frames=64, turns=200, parts=6)


def test_divisions_are_all_ways_of_giving_everything() -> None:
    """Four parts between two and three guests."""
    assert sorted(divisions(2, 4)) == [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]
    assert len(set(divisions(3, 4))) == 15
    assert all(sum(division) == 4 for division in divisions(3, 4))


def test_a_small_run_is_the_same_twice_and_every_page_is_right() -> None:
    """No clock, no order of hashes, no luck."""
    runs = [run(SMALL, "scheduled", roles(SMALL), {}, SMALL.arena_frames) for _ in range(2)]

    assert runs[0] == runs[1]
    assert runs[0].mismatches == 0
    assert runs[0].verified_pages > 10_000
    assert set(runs[0].reads) == {"stream", "loop", "zipf", "idle"}


def test_the_scheduler_saves_a_third_of_the_reads_in_a_small_arena_too() -> None:
    """The loop is served, the stream and the idle guest give way."""
    greedy, scheduled = (
        run(SMALL, mode, roles(SMALL), {}, SMALL.arena_frames) for mode in ("greedy", "scheduled")
    )

    assert scheduled.total < 0.65 * greedy.total
    assert scheduled.reads["loop"] < greedy.reads["loop"] / 3
    assert scheduled.reads["stream"] == greedy.reads["stream"]


def test_the_command_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As JSON: 35 % fewer reads than greedy, within 10 % of the best static division.

    Whether that holds of the real `--quick` too is the exit code of the README's own run.
    """
    monkeypatch.setattr(policy, "QUICK", replace(SMALL, turns=300))
    code = main(["experiment", "policy", "--quick", "--json"])
    found = json.loads(capsys.readouterr().out)

    assert set(found["reads"]) == {"greedy", "static", "scheduled", "best_static"}
    assert found["reads"]["scheduled"] <= 0.65 * found["reads"]["greedy"]
    assert found["reads"]["scheduled"] <= 1.10 * found["reads"]["best_static"]
    assert found["mismatches"] == 0
    assert len(found["divisions"]) == found["plan"]["parts"] + 1
    assert code == ExitCode.OK


def test_a_promise_that_is_not_kept_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a run of the command is a check."""
    monkeypatch.setattr(policy, "QUICK", replace(SMALL, turns=20, parts=1))
    monkeypatch.setattr(policy, "FEWER_LEAST", 0.99)

    assert main(["experiment", "policy", "--quick"]) == ExitCode.VIOLATED
    assert "less than greedy" in capsys.readouterr().out
