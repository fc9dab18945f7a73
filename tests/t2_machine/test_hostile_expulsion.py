"""Hostile guests: every broken rule is counted and audited, and after so many the guest is out.

`faults_max` of the cluster says how many.  An expelled guest loses its pools, its process and its
token are barred, and it is told why when it knocks again; other guests notice nothing.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hypervisor.audit
from hypervisor.audit import AUDIT_LOG, BURST_LINES, FILE_BYTES_MAX, LINES_PER_SECOND, Audit
from ipc import attach
from ipc.abi import Op, Status
from ipc.errors import OperatorError
from tests.support.hostile import TRANSPORTS, Rogue, Siege, besieged, until
from tests.support.hypervisors import running_hypervisor

FAULTS_MAX = 9
PATIENCE_FAULTS = 300
"""Who may break so many rules one after the other is not thrown out at all."""
EXPULSION_SECONDS = 10.0


@pytest.fixture(scope="module", params=TRANSPORTS)
def siege(
    request: pytest.FixtureRequest,
    new_cluster_name: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Siege]:
    """One hypervisor for all tests of a transport, that bears nine faults; offenders are processes
    of their own, for this one must not be barred."""
    directory = tmp_path_factory.mktemp("expulsion")
    with besieged(new_cluster_name(), directory, request.param, faults_max=FAULTS_MAX) as siege:
        yield siege


def departed_faults(siege: Siege) -> int:
    """Faults of all guests that have left."""
    return sum(siege.ask("stats")["departed"]["faults"].values())


def is_out(siege: Siege, rogue: Rogue) -> bool:
    """Whether the hypervisor has no such guest any more."""
    return rogue.name not in siege.ask("stats")["guests"]


OFFENDER = """
from ipc.errors import Disconnected, OperatorError
pool = attacker.pool(persist=True)
assert attacker.put(pool, 1, 0, page_of("offender")).status == Status.DONE
broken = {
    "slot": lambda: attacker.call(Op.PUT_PAGE, pool=pool, count=2, slot=63),
    "op": lambda: attacker.call(101),
    "batch": lambda: attacker.call(Op.PUT_BATCH, count=0),
}[arguments[0]]
for number in range(int(arguments[1])):
    assert broken().flags == ReplyFlag.FAULT
    say("fault", number + 1)
say(attacker.get(pool, 1, 0) == page_of("offender"))
def end():
    try:
        for _ in range(int(arguments[2])):
            broken()
            time.sleep(0.01)
    except Disconnected:
        say("disconnected")
    else:
        say("still in after", arguments[2], "faults more")
end()
def knock():
    try:
        enter()
    except OperatorError as error:
        say(error)
knock()
child = os.fork()
if not child:
    knock()
    os._exit(0)
os.waitpid(child, 0)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["slot", "op", "batch"])
def test_a_guest_that_breaks_too_many_rules_is_out(siege: Siege, how: str) -> None:
    """The last fault but one is still answered; then its pages are gone, it is told why, and so is
    a process that it forks.  Started anew, which enrols it anew, it may come in."""
    before = departed_faults(siege)
    rogue = siege.rogue(OFFENDER, how, str(FAULTS_MAX - 1), str(PATIENCE_FAULTS))
    for number in range(1, FAULTS_MAX):
        assert rogue.says() == f"fault {number}"
    assert rogue.says() == "True", "faults cost no page as long as it is in"
    siege.unharmed()

    assert rogue.says() == "disconnected"
    for _ in ("itself", "the process that it forks"):
        assert "your process was detached: it broke too many rules" in rogue.says()
    assert rogue.name not in siege.ask("stats")["guests"]
    # On a busy machine one more may be served before the round ends after which it goes.
    faults = departed_faults(siege) - before
    assert FAULTS_MAX <= faults <= FAULTS_MAX + 2
    until(lambda: siege.ask("stats")["arena"]["persistent_pages"] == 12, "its pages are freed")
    lines = [line for line in siege.audit() if f"guest={rogue.name} " in line]
    events = [line.split(" ")[2].removeprefix("event=") for line in lines]
    assert events == ["fault"] * faults + ["detached"]
    assert lines[faults].endswith(f"faults={faults}")
    siege.unharmed()
    rogue.kill()

    token = os.urandom(32)
    attach.enrol(siege.directory, rogue.name, token, os.getuid())
    siege.knock(rogue.name, token)


BURST = """
import posix_ipc
from ipc.errors import Disconnected
request = attacker.request(Op.GET_PAGE, count=65)
say("bursting")
try:
    for _ in range(int(arguments[0])):
        if arguments[1:]:
            attacker.channel._requests.send(request, 1)
        else:
            attacker.send(request)
except (Disconnected, posix_ipc.BusyError):
    say("disconnected")
else:
    say("still in after", arguments[0], "faults")
time.sleep(600)
"""


@pytest.mark.parametrize("deaf", [False, True])
def test_a_guest_that_faults_without_waiting_is_out_too(siege: Siege, deaf: bool) -> None:
    """One call after the other, or all at once without reading an answer; what was still in its
    queue is not served."""
    before = departed_faults(siege)
    times = str(PATIENCE_FAULTS), *(["deaf"] if deaf else [])
    rogue = siege.rogue(BURST, *times, ring=False if deaf else None)
    assert rogue.says() == "bursting"
    assert rogue.says() == "disconnected"
    until(lambda: is_out(siege, rogue), "it is out", EXPULSION_SECONDS)
    # Of a guest without an answer's patience some calls more may have been taken in one round.
    assert FAULTS_MAX <= departed_faults(siege) - before <= FAULTS_MAX + 16
    siege.unharmed()
    rogue.kill()


def test_faults_are_a_guests_own(siege: Siege) -> None:
    """Many guests with a few faults each stay in; refusals are no faults, however many."""
    rogues = [siege.rogue(OFFENDER, "op", str(FAULTS_MAX - 1), "0") for _ in range(2)]
    for rogue in rogues:
        for _ in range(FAULTS_MAX - 1):
            assert rogue.says().startswith("fault")
    with siege.attacking() as polite:
        for _ in range(20 * FAULTS_MAX):
            assert polite.call(Op.GET_PAGE, pool=5, oid=1, count=1).status == Status.ENODEV
            assert polite.new_pool(uuid=bytes(16)).status == Status.EPERM
        assert polite.call(Op.VERSION).status == Status.DONE
    for rogue in rogues:
        assert rogue.says() == "True"
        rogue.kill()
    siege.unharmed()


RETURNER = """
from ipc.errors import Disconnected
kept = attacker
try:
    for number in range(int(arguments[0])):
        assert kept.call(101).flags == ReplyFlag.FAULT
        if number in (3, 7):
            kept.detach()
            kept = enter()
            say("came back with", number + 1)
    for _ in range(int(arguments[1])):
        kept.call(Op.VERSION)
        time.sleep(0.01)
except Disconnected:
    say("disconnected")
else:
    say("still in after", arguments[0], "faults")
time.sleep(600)
"""


def test_a_guest_that_leaves_in_between_keeps_its_faults(siege: Siege) -> None:
    """Good-bye after the fourth and the eighth, and in again with the same token."""
    rogue = siege.rogue(RETURNER, str(FAULTS_MAX), str(PATIENCE_FAULTS))
    assert rogue.says() == "came back with 4"
    assert rogue.says() == "came back with 8"
    assert rogue.says() == "disconnected"
    until(lambda: is_out(siege, rogue), "it is out", EXPULSION_SECONDS)
    rogue.kill()


def test_the_bar_outlives_the_guest_and_the_hypervisor(cluster_name: str, tmp_path: Path) -> None:
    """What was enrolled once does not get in again; after a restart who is enrolled anew does."""
    with besieged(cluster_name, tmp_path, TRANSPORTS[-1], faults_max=FAULTS_MAX) as siege:
        rogue = siege.rogue(OFFENDER, "slot", "0", str(PATIENCE_FAULTS))
        assert rogue.says() == "True"
        assert rogue.says() == "disconnected"
        assert "broke too many rules" in rogue.says()
        token = siege.hypervisor.token(rogue.name)
        with pytest.raises(OperatorError, match="broke too many rules"):
            siege.knock(rogue.name, token)
        siege.restart()
        siege.unharmed()
        with pytest.raises(OperatorError, match="is not enrolled with this token"):
            siege.knock(rogue.name, token)
        siege.knock(rogue.name, siege.hypervisor.enrol(rogue.name))
        rogue.kill()


def test_faults_max_of_one(cluster_name: str, tmp_path: Path) -> None:
    """The strictest cluster: the first fault is answered, and is the last."""
    with besieged(cluster_name, tmp_path, TRANSPORTS[0], faults_max=1) as siege:
        rogue = siege.rogue(OFFENDER, "op", "1", "0")
        assert rogue.says() == "fault 1"
        until(lambda: is_out(siege, rogue), "it is out", EXPULSION_SECONDS)
        rogue.kill()


# --- the audit log by itself


class Clock:
    """A wall clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).timestamp()

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    """The audit log's."""
    return Clock()


def lines_of(directory: Path) -> list[str]:
    """Of the audit log."""
    return (directory / AUDIT_LOG).read_text().splitlines()


def test_a_guest_has_so_many_lines_and_others_have_theirs(tmp_path: Path, clock: Clock) -> None:
    """A burst, then a steady rate; what was left out is counted and told."""
    audit = Audit(tmp_path, clock)
    for _ in range(10_000):
        audit.record("mallory", "fault", reason="bad_slot", detail="63+2")
    audit.record("alice", "denied", reason="not_writer", detail="put")
    assert len(lines_of(tmp_path)) == BURST_LINES + 1
    assert lines_of(tmp_path)[-1].split(" ")[1] == "guest=alice"

    clock.seconds += 10
    for _ in range(10_000):
        audit.record("mallory", "fault", reason="bad_slot", detail="63+2")
    added = lines_of(tmp_path)[BURST_LINES + 1 :]
    assert len(added) == min(BURST_LINES, 10 * LINES_PER_SECOND) + 1
    assert added[0].endswith(f"event=suppressed lines={10_000 - BURST_LINES}")
    assert audit.counts == {"fault": 20_000, "denied": 1}
    audit.close()


def test_the_file_is_bounded_whatever_comes(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is turned over once; two files of the bound are all there ever is, and no line is cut."""
    bound = 40_000
    monkeypatch.setattr(hypervisor.audit, "FILE_BYTES_MAX", bound)
    audit = Audit(tmp_path, clock)
    for number in range(5000):
        clock.seconds += 1
        audit.record(f"guest{number % 7}", "fault", reason="bad_slot", detail="x" * 500)
    audit.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [AUDIT_LOG, f"{AUDIT_LOG}.1"]
    assert all(path.stat().st_size <= bound for path in tmp_path.iterdir())
    assert bound < FILE_BYTES_MAX
    shape = re.compile(r"\S+Z guest=guest\d event=fault reason=bad_slot detail=x{96}")
    assert all(shape.fullmatch(line) for line in lines_of(tmp_path))


@pytest.mark.parametrize(
    "detail",
    [
        "\n2026 guest=root event=ok",
        "\r\x1b[2J",
        "a" * 10_000,
        "\0",
        'x" event=ok y="',
        "é\u2028x",
        "",
    ],
)
def test_no_line_is_forged(tmp_path: Path, clock: Clock, detail: str) -> None:
    """Whatever a detail holds, it stays one word, or one string, of one line of ASCII."""
    audit = Audit(tmp_path, clock)
    audit.record("mallory", "fault", reason="bad_flags", detail=detail)
    audit.close()
    raw = (tmp_path / AUDIT_LOG).read_bytes()
    assert raw.count(b"\n") == 1
    assert raw.endswith(b"\n")
    assert all(32 <= byte < 127 for byte in raw[:-1])
    assert len(raw) < 300
    words = re.findall(r'(\w+)=("[^"]*"|\S+)', raw.decode())
    assert [key for key, _ in words] == ["guest", "event", "reason", "detail"]


def test_a_log_that_cant_be_written_stops_nothing(cluster_name: str, tmp_path: Path) -> None:
    """A folder stands where the file should be: faults are answered and counted all the same."""
    (tmp_path / "log" / AUDIT_LOG).mkdir(parents=True)
    with running_hypervisor(cluster_name, tmp_path) as running:
        guest = running.attach("guest")
        for _ in range(5):
            guest.call(Op.GET_PAGE, count=65)
        assert running.ask("stats")["guests"]["guest"]["faults"] == {"bad_count": 5}
        assert guest.call(Op.VERSION).status == Status.DONE
        guest.detach()
