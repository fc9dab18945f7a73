"""The nemesis's plans, and the verdicts of the sharing and coherence tests."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import ExitCode, OperatorError
from tools import coherence, sharing
from tools.config import VolumeConfig
from tools.histories import INITIAL, Call, Register, Violation, check
from tools.nemesis import KINDS, Action, parse_kinds, plan

VOLUME = VolumeConfig(
    name="data",
    nodes=["red", "blue", "green"],
    heartbeat_interval=0.1,
    dead_threshold=10,
    idle_timeout=0.6,
    keepalive=0.1,
    reconnect=0.1,
)
DEAD_SECONDS = 1.0
FATAL = ("kill", "pause", "partition")


def test_plan_comes_from_its_seed() -> None:
    """The same seed gives the same plan, another one another."""
    assert plan(KINDS, VOLUME, 60, 1) == plan(KINDS, VOLUME, 60, 1)
    assert plan(KINDS, VOLUME, 60, 1) != plan(KINDS, VOLUME, 60, 2)


def test_plans_lose_one_node_at_a_time() -> None:
    """What loses a node waits until the last one was lost, is dead, and had time to come back."""
    first = random.randrange(2**32)
    seen: set[str] = set()
    lengths = set()
    for seed in range(first, first + 50):
        actions = plan(KINDS, VOLUME, 60, seed)
        assert [one.at_seconds for one in actions] == sorted(one.at_seconds for one in actions)
        fatal = [one for one in actions if one.kind in FATAL]
        for one, following in itertools.pairwise(fatal):
            over = one.at_seconds + one.duration_seconds + DEAD_SECONDS
            assert following.at_seconds >= over, f"seed {seed}: {one}; {following}"
        for one in actions:
            assert 0 <= one.at_seconds < 60
            assert set(one.nodes) <= set(VOLUME.nodes)
            assert len(one.nodes) == {"kill": 1, "pause": 1, "partition": 2}.get(one.kind, 0)
        lengths |= {one.duration_seconds > DEAD_SECONDS for one in actions if one.kind == "pause"}
        seen |= {one.kind for one in actions}
    assert seen == set(KINDS)
    assert lengths == {True, False}, "pauses are shorter and longer than the dead time"


def test_plan_has_only_what_was_asked_for() -> None:
    """And nothing at all if nothing was; a node alone is not killed."""
    assert {one.kind for one in plan(("kill",), VOLUME, 60, 1)} == {"kill"}
    assert plan((), VOLUME, 60, 1) == []
    with pytest.raises(OperatorError, match="there is no nemesis 'hail'; there are kill, pause"):
        parse_kinds("kill,hail")
    assert parse_kinds("all") == KINDS
    assert parse_kinds("kill,pause") == ("kill", "pause")
    assert parse_kinds("") == ()


def test_action_reads_as_a_sentence() -> None:
    """As it is printed while it happens."""
    assert str(Action("kill", 1.5, 0.0, ("red",))) == "1.5 s kill red"
    assert str(Action("pause", 2.0, 1.25, ("red",))) == "2.0 s pause red for 1.2 s"


# --- the verdict of the coherence test

PAGE = Register("/histories/0", 0)
OLD_READ = [
    Call("red#1", "write", PAGE, "1.0", 0, 1),
    Call("blue#1", "read", PAGE, INITIAL, 2, 3),
]


@pytest.mark.parametrize(
    ("calls", "mismatches", "damage", "problems", "shared", "verdict", "code"),
    [
        ([], 0, [], [], 5, "holds", ExitCode.OK),
        (OLD_READ, 0, [], [], 5, "violated", ExitCode.VIOLATED),
        (OLD_READ, 0, [], ["red did not come back"], 0, "violated", ExitCode.VIOLATED),
        ([], 1, [], [], 5, "violated", ExitCode.VIOLATED),
        ([], 0, ["[INODE] damaged"], [], 5, "violated", ExitCode.VIOLATED),
        ([], 0, [], ["red did not come back"], 5, "unknown", ExitCode.INCONCLUSIVE),
        ([], 0, [], [], 0, "unknown", ExitCode.INCONCLUSIVE),
    ],
)
def test_verdict_and_exit_code(
    calls: list[Call],
    mismatches: int,
    damage: list[str],
    problems: list[str],
    shared: int,
    verdict: str,
    code: ExitCode,
) -> None:
    """A violation counts more than doubts; a run that shows nothing is no proof."""
    violations = check(calls)
    assert coherence._verdict(violations, mismatches, damage, problems, shared) == verdict
    assert coherence.exit_code({"verdict": verdict}) is code
    assert [int(one) for one in (ExitCode.OK, ExitCode.VIOLATED, ExitCode.INCONCLUSIVE)] == [
        0,
        1,
        2,
    ]


def test_reads_of_others_writes_are_counted() -> None:
    """A node's reads of its own writes say nothing about sharing."""
    calls = [
        Call("red#1", "write", PAGE, "1.0", 0, 1),
        Call("red#1", "read", PAGE, "1.0", 2, 3),
        Call("blue#1", "read", PAGE, "1.0", 4, 5),
        Call("blue#1", "read", PAGE, INITIAL, 0, 1),
    ]
    assert coherence._shared_reads(calls) == 1


def test_image_that_is_no_volume_is_damage(tmp_path: Path) -> None:
    """The end of the test must not fall over it."""
    image = tmp_path / "image"
    image.write_bytes(b"noise" * 100_000)
    (line,) = coherence._examine(image)
    assert line.startswith("the volume can't be recovered: ")


def test_summary_names_what_was_found() -> None:
    """A person reads the violation, the torn pages, the problems and the verdict."""
    results = {
        "reads": 1000,
        "writes": 20,
        "syncs": 3,
        "reads_of_others_writes": 7,
        "nemesis": ["1.0 s kill red"],
        "lost_nodes": ["red#1"],
        "damage": [],
        "violations": [coherence._text(Violation(PAGE, "blue#1 read an old page"))],
        "mismatches": 2,
        "problems": ["red did not come back"],
        "verdict": "violated",
    }
    assert coherence.summary(results) == [
        "1,000 reads, 20 writes, 3 syncs; 7 reads of what another node wrote",
        "1 things went wrong, 1 nodes were lost",
        "volume: sound",
        "violation: /histories/0 page 0: blue#1 read an old page",
        "2 torn pages",
        "problem: red did not come back",
        "coherence violated",
    ]


# --- the verdict of the sharing test


def shared_results(**guest: Any) -> dict[str, Any]:
    """Results of two runs in which one guest of the shared one had something."""
    fine: dict[str, Any] = {
        "disk_reads_pages": 10,
        "mismatches": 0,
        "mismatch_paths": [],
        "cleancache": {"succ_gets": 3, "failed_gets": 1},
    }
    return {
        "private": {"errors": [], "guests": {"red": fine}},
        "shared": {"errors": [], "guests": {"red": fine | {"disk_reads_pages": 4} | guest}},
        "disk_reads_pages": {"private": 10, "shared": 4},
        "verified_pages": 2000,
        "mismatches": guest.get("mismatches", 0),
    }


def test_sharing_verdict() -> None:
    """Wrong files and dead guests are told by name, with the exit code for them."""
    assert sharing.verdict(shared_results()) == (ExitCode.OK, [])
    assert sharing.verdict(shared_results(mismatches=1, mismatch_paths=["/a"])) == (
        ExitCode.VIOLATED,
        ["shared: red read 1 wrong files: /a"],
    )
    assert sharing.verdict(shared_results(exit_code=-9)) == (
        ExitCode.GUEST_DIED,
        ["shared: guest red died (exit code -9)"],
    )
    assert sharing.table(shared_results()) == [
        ("red", "10", "4", "60.0%", "75.0%", "75.0%"),
        ("all", "10", "4", "60.0%", "75.0%", "75.0%"),
    ]
    assert "60.0% fewer disk reads" in sharing.summary(shared_results())[1]
