"""Scenarios without a cluster: what follows from what was counted, timing, reports."""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any, cast

import pytest

from guests.adversary import load, parameters
from ipc.errors import ExitCode, OperatorError
from tests.support.clusters import command, environment, tmem_here
from tools.cli.scenario import list_scenarios
from tools.interrupts import Interrupts
from tools.scenario import spying
from tools.scenario.catalogue import SCENARIOS, find
from tools.scenario.model import Part, Scene, Tally, Verdict, exit_code, verdict
from tools.scenario.play import adversaries, attack, typed
from tools.scenario.poisoned import last_report
from tools.scenario.report import markdown, page, timelines, write
from tools.scenario.scenario import KINDS, Outcome
from tools.scenario.screen import screen
from tools.scenario.stage import Stage, World, adversary
from tools.scenario.timing import Batch, Distinguished, distinguish

HELD = {"attempts": 3, "caught": 3, "victim_checks": 9}


@pytest.mark.parametrize(
    ("counts", "must_catch", "expected"),
    [
        (HELD, True, "held"),
        (HELD | {"caught": 0}, False, "held"),
        # Nobody was seen to stop it: it may never have reached the defence.
        (HELD | {"caught": 0}, True, "unknown"),
        (HELD | {"attempts": 0}, True, "unknown"),
        (HELD | {"victim_checks": 0}, True, "unknown"),
        (HELD | {"problems": ["a guest died"]}, True, "unknown"),
        (HELD | {"succeeded": 1}, True, "broken"),
        (HELD | {"victim_mismatches": 1}, True, "broken"),
        # Harm is harm, whatever else went wrong.
        (HELD | {"succeeded": 1, "problems": ["a guest died"]}, True, "broken"),
        ({"victim_mismatches": 1}, False, "broken"),
        ({}, False, "unknown"),
    ],
)
def test_what_follows_from_the_counts(
    counts: dict[str, Any], must_catch: bool, expected: Verdict
) -> None:
    """The verdict."""
    assert verdict(Tally(**counts), must_catch=must_catch) == expected


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["held"], ExitCode.OK),
        (["held", "held"], ExitCode.OK),
        (["broken"], ExitCode.VIOLATED),
        (["unknown"], ExitCode.INCONCLUSIVE),
        (["held", "unknown"], ExitCode.INCONCLUSIVE),
        (["unknown", "broken", "held"], ExitCode.VIOLATED),
        ([], ExitCode.INCONCLUSIVE),
    ],
)
def test_exit_codes(verdicts: list[Verdict], expected: ExitCode) -> None:
    """Of one scenario and of many."""
    assert exit_code(verdicts) == expected
    assert (ExitCode.OK, ExitCode.VIOLATED, ExitCode.INCONCLUSIVE) == (0, 1, 2)


def stage(tmp_path: Path) -> Stage:
    """A stage on which nothing is played."""
    return Stage(tmp_path, tmp_path, True, 1, Interrupts())


def test_only_the_defence_in_question_catches(tmp_path: Path) -> None:
    """An attack that failed for another reason proves nothing: that is a problem and no catch."""
    played = stage(tmp_path)
    world = World(played, cast("Any", None), cast("Any", None))

    report = {"attempts": 5, "succeeded": 0, "reasons": {"stale_token": 3, "no_such_pool": 2}}
    world.count_attack("mallory", report, by=("stale_token",))

    assert (played.tally.attempts, played.tally.caught) == (5, 3)
    assert "no_such_pool" in played.tally.problems[0]
    played.tally.victim_checks = 1
    assert verdict(played.tally, must_catch=True) == "unknown"


def test_lost_pages_are_harm(tmp_path: Path) -> None:
    """A page that is missing where none may be counts like a wrong one."""
    played = stage(tmp_path)
    world = World(played, cast("Any", None), cast("Any", None))
    world.count_check("alpha", {"checked": 4, "mismatches": 1, "missing": 3, "lost": 2})
    assert (played.tally.victim_checks, played.tally.victim_mismatches) == (4, 3)


def test_every_scenario_is_told_and_has_its_program() -> None:
    """In `tmem scenario list` and in the source."""
    assert {scenario.kind for scenario in SCENARIOS.values()} == set(KINDS)
    for name, scenario in SCENARIOS.items():
        assert name == scenario.name
        # Compiled and not run; its docstring says what it tries and what ought to stop it.
        document = load(adversary(scenario.adversary)).co_consts[0]
        assert "Tries:" in document, scenario.adversary
        assert "Stopped by:" in document, scenario.adversary
    with pytest.raises(OperatorError, match="no scenario 'nonsense'"):
        find("nonsense")


def batches(seed: int, difference: float, taken: list[int], trials: int = 200) -> Iterator[Batch]:
    """Labels, and times that are longer by so much for one of them; what was asked for is noted."""
    numbers = random.Random(seed)
    for number in range(41):
        taken.append(number)
        labels = [numbers.random() < 0.5 for _ in range(trials)]
        yield labels, [numbers.gauss(100 + difference * label, 10) for label in labels]


@pytest.mark.parametrize("difference", [-20, 20])
def test_times_that_differ_leak(difference: float) -> None:
    """In either direction, and one batch to learn from and one to try are enough."""
    taken: list[int] = []
    found = distinguish(batches(7, difference, taken))
    assert found.leaks
    assert not found.tells_nothing
    # Two bells two deviations apart: 84 % is the best that a threshold can do.
    assert abs(found.accuracy - 0.84) < found.error * 1.5
    assert found.trials == 200
    assert taken == [0, 1]


def test_times_that_differ_little_take_more_trials() -> None:
    """What a busy machine leaves of a difference is found, by trying longer."""
    taken: list[int] = []
    found = distinguish(batches(7, 4, taken))
    assert found.leaks, found
    assert 0.53 < found.accuracy < 0.61
    assert 2 < len(taken) < 41


@pytest.mark.parametrize("outliers", [0.0, 0.2])
def test_times_that_do_not_differ_tell_nothing(outliers: float) -> None:
    """The threshold is tried on trials that it was not learnt on, so noise gains nothing, however
    wild it is and however often one looks: it takes a thousand runs to be told otherwise once."""
    numbers = random.Random(11)

    def noisy(seed: int) -> Iterator[Batch]:
        for labels, values in batches(seed, 0, []):
            yield (
                labels,
                [value * 50 if numbers.random() < outliers else value for value in values],
            )

    found = [distinguish(noisy(seed)) for seed in range(40)]
    assert not any(one.leaks for one in found)
    assert all(one.tells_nothing for one in found)
    mean = sum(one.accuracy for one in found) / len(found)
    assert abs(mean - 0.5) < 0.01
    assert sum(one.trials for one in found) / len(found) < 2500


def test_what_is_too_little_to_tell_is_not_told() -> None:
    """Batches end before it is certain either way: neither is said."""
    found = distinguish(itertools.islice(batches(7, 1, []), 3))
    assert not found.leaks
    assert not found.tells_nothing
    assert found.error == pytest.approx(1 / found.trials**0.5, rel=0.01)


@pytest.mark.parametrize("given", [[], [([], [])], [([], []), ([], [])]])
def test_no_trials_tell_nothing(given: list[Batch]) -> None:
    """And don't show that there is nothing to be told, either."""
    found = distinguish(given)
    assert (found.leaks, found.tells_nothing) == (False, False)


@pytest.mark.parametrize("noun", ["", "nonsense", "../flood", "flood.run", "a.b", "raw"])
def test_an_adversary_that_is_not_there(noun: str) -> None:
    """No module is looked for under a name that somebody typed; what there is is named."""
    with pytest.raises(OperatorError, match=r"there is no adversary .*churn.*flood"):
        typed(noun, {})


@pytest.mark.parametrize(
    ("noun", "told", "says"),
    [
        ("flood", {"secnds": "1"}, "flood: no parameter 'secnds'; it takes seconds"),
        ("liar", {"b": "", "a": ""}, "liar: no parameter 'a', 'b'; it takes none"),
        ("forgery", {"Uuid": ""}, "it takes generation, ino, pages, pool, token, uuid"),
        ("flood", {"seconds": "soon"}, "flood: seconds=soon: write a number"),
        ("flood", {"seconds": ""}, "seconds=: write a number"),
        ("flood", {"seconds": "nan"}, "seconds=nan: write a number"),
        ("forgery", {"pages": "1" * 30}, "write a number, less than 2"),
    ],
)
def test_parameters_that_an_adversary_does_not_take(
    noun: str, told: dict[str, str], says: str
) -> None:
    """Refused before a cluster is started, with those that it takes."""
    with pytest.raises(OperatorError, match=re.escape(says)) as refusal:
        typed(noun, told)
    assert refusal.value.exit_code == ExitCode.USAGE


def test_parameters_are_what_the_program_takes_them_for() -> None:
    """Digits are a text where a text is taken."""
    told = {"uuid": "0" * 32, "pages": "7", "token": "-1"}
    assert typed("forgery", told) == {"uuid": "0" * 32, "pages": 7, "token": -1}
    assert typed("filepoison", {"seconds": "1.5", "folder": "7"}) == {"seconds": 1.5, "folder": "7"}


def test_a_grant_is_of_a_uuid() -> None:
    """Told before a cluster is started."""
    with pytest.raises(OperatorError, match=r"--grant: .* is no uuid"):
        attack("flood", {}, jail="off", nodes=0, grant=True, seed=1, interrupts=Interrupts())


@pytest.mark.parametrize(
    ("name", "out", "exit_code", "says"),
    [
        ("reader-puts", "out", ExitCode.USAGE, "there is no report of reader-puts"),
        ("poisoned-cluster", "file", ExitCode.NO_INPUT, "file: File exists"),
        ("all", "file/below", ExitCode.NO_INPUT, "Not a directory"),
    ],
)
def test_a_report_that_has_nowhere_to_go(
    tmp_path: Path, name: str, out: str, exit_code: ExitCode, says: str
) -> None:
    """Told before minutes are spent on it."""
    (tmp_path / "file").touch()
    done = tmem_here("scenario", "run", name, "--out", str(tmp_path / out), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_every_parameter_is_described() -> None:
    """Where the program says what it takes."""
    for noun in adversaries():
        found = parameters(adversary(noun))
        constants = load(adversary(noun)).co_consts
        told = " ".join(text for one in constants for text in _documents(one))
        assert "Parameters:" in told or "task" in found or not found, noun
        assert not {name for name in found if not re.search(rf"\b{name}\b", told)}, noun


def _documents(constant: object) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, CodeType):
        yield from (text for text in constant.co_consts[:1] if isinstance(text, str))


def test_attacks_on_what_is_not_there_are_named_and_not_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody shall take them for attacks that were held."""
    list_scenarios()

    _, untried = capsys.readouterr().out.split("not tried")
    assert "migration" in untried
    assert "flash" in untried
    assert not any("migration" in one.tries or "flash" in one.tries for one in SCENARIOS.values())


def test_every_scenarios_program_can_be_run_by_hand() -> None:
    """By the name that `tmem scenario list --json` has."""
    assert {scenario.adversary for scenario in SCENARIOS.values()} <= set(adversaries())


WORK = """
import sys
from tools.cli.common import unread
with unread():
    for _ in range(3):
        print("x" * 100_000, flush=True)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("program", "exit_code"),
    [(command("scenario", "list"), ExitCode.OK), ([sys.executable, "-c", WORK], 1)],
)
def test_a_reader_that_has_left(program: list[str], exit_code: int) -> None:
    """A list ends with what was read of it; work goes on, for it has an exit code to say."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            program, stdout=writing, stderr=subprocess.PIPE, env=environment(), check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (exit_code, b"")


class Twins:
    """How well a spy does in each scope of sharing, without a cluster."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **right: int) -> None:
        self.right = right
        self.measured: list[str] = []
        monkeypatch.setattr(spying, "_time_twins", self.time)

    def time(self, _stage: Stage, scope: str, _groups: dict[str, str]) -> Distinguished:
        """So many of 10,000 are right: 5,285 are a leak, and 5,216 are nothing."""
        self.measured.append(scope)
        return Distinguished(self.right[scope], 10_000)


@pytest.mark.parametrize(
    ("defence", "right", "expected"),
    [
        (False, {"all": 9000}, "broken"),
        (False, {"all": 5250}, "unknown"),
        (True, {"all": 9000, "group": 5000, "off": 4900}, "held"),
        (True, {"all": 9000, "group": 5000, "off": 9000}, "broken"),
        (True, {"all": 9000, "group": 5400, "off": 5000}, "broken"),
        (True, {"all": 9000, "group": 5000, "off": 5250}, "unknown"),
        # Nothing is told where all is shared: the machine is too busy to show anything.
        (True, {"all": 5000, "group": 5000, "off": 5000}, "unknown"),
    ],
)
def test_timing_is_judged_beside_what_it_tells_where_pages_are_shared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    defence: bool,
    right: dict[str, int],
    expected: Verdict,
) -> None:
    """Both outside of the trust group and, as a control, where all is shared."""
    twins = Twins(monkeypatch, **right)
    played = Stage(tmp_path, tmp_path, defence, 1, Interrupts())
    played.tally.victim_checks = 1

    SCENARIOS["twin-timing"].run(played)

    assert verdict(played.tally, must_catch=True) == expected
    assert twins.measured == list(right)


def outcome(*, served: int) -> Outcome:
    """A run of the poisoned cluster in which so many files were served wrong."""
    scenes = [
        Scene(
            "act <one>",
            float(second),
            (
                Part("alpha", "victim", read_files=second, wrong_files=served, caught_pages=2),
                Part("mallory", "attacker", poisoned_pages=second * 3),
            ),
        )
        for second in range(60)
    ]
    tally = Tally(attempts=9, succeeded=served, caught=2, victim_checks=59)
    events = ["mallory put <b>bold</b> bytes"]
    return Outcome(SCENARIOS["poisoned-cluster"], True, 5, 1.0, tally, events, scenes)


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        """As asked by `screen` and by rich."""
        return True


def test_on_a_terminal_what_is_said_in_the_end_stands_below_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a table is live, whatever is printed appears above it."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with screen(terminal) as shown:
        for scene in outcome(served=4).scenes[:3]:
            shown.watch(scene)
        shown.end()
        print("verdict: broken")

    assert "mallory" in terminal.getvalue()
    assert terminal.getvalue().endswith("verdict: broken\n")


def test_a_report_has_a_timeline_and_nothing_of_a_guest_in_it_is_markup(tmp_path: Path) -> None:
    """What a guest says ends up in the page as text."""
    path = write(outcome(served=4), tmp_path / "out")
    text = path.read_text()
    assert text.count("<svg") > 1
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text
    assert ">177<" in text, "pages put, in the last scene"
    assert (tmp_path / "out" / "timeline1.svg").read_text().startswith("<svg")
    assert "| mallory | attacker | 177 |" in (tmp_path / "out" / "report.md").read_text()


def test_acts_are_drawn_on_one_scale_with_what_began_when() -> None:
    """So that they can be compared by looking."""
    calm = [Scene("calm", float(at), (Part("mallory", "attacker"),)) for at in (1, 2)]
    storm = [
        Scene("storm", float(at), (Part("mallory", "attacker", poisoned_pages=at * 100),))
        for at in (1, 2, 4)
    ]
    first, second = timelines([*calm, replace(calm[1], at_seconds=3.0, mark="<attack>"), *storm])
    for picture in (first, second):
        assert re.findall(r'text-anchor="end">([\d,]+)<', picture) == [
            "0",
            "100",
            "200",
            "300",
            "400",
        ]
    assert first.count("&lt;attack&gt;") == 1
    assert "attack" not in second


def test_a_problem_quotes_the_log_that_goes(tmp_path: Path) -> None:
    """Its folder is gone when somebody reads of it."""
    log = tmp_path / "red.log"
    log.write_text("first\nthe disk is full\n")
    played = stage(tmp_path)
    played.problem(f"red: it ended; see {log}")
    played.problem(f"blue: it ended; see {tmp_path}/absent.log")
    assert played.tally.problems[0].endswith("red.log (the disk is full)")
    assert played.tally.problems[1].endswith("absent.log")


def test_a_report_says_the_verdict() -> None:
    """In its headline, in both forms."""
    assert "poisoned-cluster: broken" in page(outcome(served=4))
    assert markdown(outcome(served=0)).startswith("# poisoned-cluster: held\n")


def test_where_a_page_was_caught_is_read_from_the_audit_log() -> None:
    """The last of the victim's reports of which it is known who put the page."""
    page = {"event": "reported", "index": "4", "put_by": "mallory"}
    events = [
        page | {"guest": "alpha", "object": "0b00000000000000030000"},
        page | {"guest": "alpha", "object": "0c000000000000000003", "index": "40"},
        page | {"guest": "alpha", "object": "0d00", "put_by": "bravo"},
        page | {"guest": "bravo", "object": "0e"},
        {"guest": "alpha", "event": "reported", "object": "0f", "index": "1", "page": "gone"},
    ]
    assert last_report(events[:2], "alpha") == (12, 40, "mallory")
    assert last_report(events, "alpha") == (13, 4, "bravo")
    assert last_report(events, "carol") is None
