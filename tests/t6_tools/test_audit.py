"""`tmem audit`: the log as events, through every turn-over."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hypervisor.audit
import tools.audit
from hypervisor.audit import BURST_LINES, EVENTS, LINES_PER_SECOND, Audit
from tests.support.clusters import tmem_here
from tools.audit import AuditReader, parse
from tools.rundir import ClusterDirectory


class Clock:
    """A wall clock that goes on by itself, so that no bucket runs dry, unless it is stopped."""

    def __init__(self, step_seconds: float = 1.0) -> None:
        self.seconds = 1.7e9
        self.step_seconds = step_seconds

    def __call__(self) -> float:
        self.seconds += self.step_seconds
        return self.seconds


@pytest.fixture
def directory(tmp_path: Path) -> ClusterDirectory:
    """A folder with logs, in which no cluster lives."""
    made = ClusterDirectory(tmp_path)
    made.logs.mkdir()
    return made


def details(reader: AuditReader, *, follow: bool = False) -> Iterator[str]:
    """What events say."""
    return (event["detail"] for _, event in reader.events(follow=follow))


@pytest.mark.parametrize(
    "detail",
    ["", "63+2", "a b", 'x" event=ok y="', "\n", "é", "a=b c=d", "\\", "=", " ", "z" * 200],
)
def test_what_was_recorded_is_read(directory: ClusterDirectory, detail: str) -> None:
    """Every word under its name, whatever a guest made of it."""
    audit = Audit(directory.logs, Clock())
    audit.record("web-1.x", "fault", reason="bad_slot", detail=detail, pages=7)
    audit.close()
    ((line, event),) = AuditReader(directory).events(follow=False)
    assert event.keys() == {"time", "guest", "event", "reason", "detail", "pages"}
    assert (event["guest"], event["event"], event["pages"]) == ("web-1.x", "fault", "7")
    assert event["detail"] == ascii(detail)[1:-1][:96].replace('"', "'")
    assert parse(line) == event


def test_a_follower_misses_nothing_when_the_log_is_turned_over(
    directory: ClusterDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event once and in order, wherever the files' ends fall between two looks; of what was
    there before, as much as two files hold."""
    monkeypatch.setattr(hypervisor.audit, "FILE_BYTES_MAX", 9000)
    monkeypatch.setattr(tools.audit, "_LOOK_SECONDS", 0.0)
    audit = Audit(directory.logs, Clock())
    numbers = itertools.count()
    looks = itertools.count()

    def write(count: int) -> None:
        for _ in range(count):
            audit.record("red", "fault", reason="bad_slot", detail=next(numbers))

    def look(_directory: ClusterDirectory) -> SimpleNamespace | None:
        """Asked once a look: the log grows meanwhile, by less than a file."""
        at = next(looks)
        write(at % 41)
        return SimpleNamespace(lives=at < 200)

    turned_over = AuditReader._was_turned_over

    def ask(reader: AuditReader, file: Any) -> bool:
        """It grows between a reading and this question, too."""
        at = next(looks)
        write(at % 37 if at < 200 else 0)
        return turned_over(reader, file)

    monkeypatch.setattr(AuditReader, "_was_turned_over", ask)
    write(300)
    monkeypatch.setattr(ClusterDirectory, "read", look)
    found = [int(detail) for detail in details(AuditReader(directory), follow=True)]
    audit.close()
    assert next(looks) > 200, "it did not follow to the end"
    last = next(numbers) - 1
    assert found == list(range(found[0], last + 1))
    assert 0 < found[0] < 300, "two files were not full"


def test_only_what_was_asked_for(directory: ClusterDirectory) -> None:
    """By guest, also what was done about it, and by kind; what is no event is counted."""
    audit = Audit(directory.logs, Clock())
    audit.record("red", "fault", reason="bad_slot", detail=1)
    audit.record("red", "denied", reason="not_writer", detail=2)
    audit.record("blue", "stale", reason="stale_token", detail=3)
    audit.record("administrator", "quarantine", result="done", about="red", detail=4)
    audit.close()
    with (directory.logs / "audit.log").open("ab") as file:
        file.write(b"2026-11-25T10:03:07Z event=half\ngarbage\n2026-11-25T10:03:07.1Z guest=red ev")
    everything = AuditReader(directory)
    assert list(details(everything)) == ["1", "2", "3", "4"]
    assert everything.unreadable == 2
    assert list(details(AuditReader(directory, guest="red"))) == ["1", "2", "4"]
    assert list(details(AuditReader(directory, events=["stale", "fault"]))) == ["1", "3"]
    assert list(details(AuditReader(directory, guest="red", events=["quarantine"]))) == ["4"]

    done = tmem_here(
        "audit", "--run", str(directory.path), "--guest", "blue", "--json", cwd=directory.path
    )
    assert done.returncode == 0
    assert [json.loads(line)["detail"] for line in done.stdout.splitlines()] == ["3"]
    assert done.stderr == "tmem: 2 lines are no events\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--event", "quarantin"], "--event quarantin: there is no such event; there are fault, "),
        (["--event", "fault", "--event", ""], "--event : there is no such event"),
        (
            ["--guest", "rde"],
            "--guest rde: nobody of that name was ever here; there are administrator, blue, red",
        ),
    ],
)
def test_what_can_never_be_in_the_log_is_refused(
    directory: ClusterDirectory, words: list[str], says: str
) -> None:
    """Nothing at all, with exit code 0, would be taken for good news."""
    audit = Audit(directory.logs, Clock())
    audit.record("red", "fault", reason="bad_slot")
    audit.close()
    (directory.path / "guests").mkdir()
    (directory.path / "guests" / "blue").touch()
    done = tmem_here("audit", "--run", str(directory.path), *words, cwd=directory.path)
    assert (done.returncode, done.stdout) == (64, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tmem: {says}")
    quiet = tmem_here("audit", "--run", str(directory.path), "--guest", "blue", cwd=directory.path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_only_known_events_are_written(directory: ClusterDirectory) -> None:
    """So that the list of what may be asked for can't fall behind."""
    audit = Audit(directory.logs, Clock())
    with pytest.raises(AssertionError, match="rumour"):
        audit.record("red", "rumour")
    for event in EVENTS:
        audit.record("red", event)
    audit.close()
    found = [event["event"] for _, event in AuditReader(directory).events(follow=False)]
    assert found == list(EVENTS)


def test_a_folder_without_a_cluster_is_told(tmp_path: Path) -> None:
    """As by `tmem logs`."""
    done = tmem_here("audit", "--run", str(tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 69
    assert "no cluster is running" in done.stderr


def test_when_a_flood_is_over_it_is_told_how_much_of_it_was_left_out(
    directory: ClusterDirectory,
) -> None:
    """Also if the guest never says anything again; damage has a bucket that no flood empties."""
    clock = Clock(0.0)
    audit = Audit(directory.logs, clock)
    for number in range(1000):
        audit.record("red", "fault", reason="bad_slot", detail=number)
    audit.record("red", "checksum", reason="damaged", detail="of red")
    audit.settle()
    assert list(details(AuditReader(directory, events=["checksum"]))) == ["of red"]
    assert not list(AuditReader(directory, events=["suppressed"]).events(follow=False))
    clock.seconds += BURST_LINES / LINES_PER_SECOND
    for _ in range(3):
        audit.settle()
    audit.close()
    ((_, told),) = AuditReader(directory, events=["suppressed"]).events(follow=False)
    assert (told["guest"], told["lines"]) == ("red", str(1000 - BURST_LINES))
    assert audit.record_counts() == {"events": {"fault": 1000, "checksum": 1}, "lost_lines": 0}
