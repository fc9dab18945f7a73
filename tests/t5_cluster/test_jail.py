"""From inside of a real guest's jail: everything that it is there to refuse, tried.

The same attempts are made by a guest without a jail, where they succeed: so each would be noticed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from ipc.errors import ExitCode
from ipc.jail import Mode, landlock
from tests.support.clusters import short_folder, tmem_here
from tests.support.jailedclusters import jailed_cluster

pytestmark = pytest.mark.cluster

OTHER_ERRNOS = {
    "take memory": "ENOMEM",
    "open many files": "EMFILE",
    "make its disk longer": "EFBIG",
}
"""Where it is not the filter that refuses."""
OF_ANOTHER_USER = {"open another queue": "EACCES", "knock there as at the door": "EACCES"}
"""Where it is the user id."""
OF_THE_SAME_USER = {"open another queue": "done", "knock there as at the door": "EPROTOTYPE"}
"""A queue whose name is known can be opened; names are random, and gone once both sides have it."""
IMPOSSIBLE_ANYWAY = {"execute": "ENOENT", "knock there as at the door": "EPROTOTYPE"}
"""Attempts that fail without a jail, too, but not by its errno."""
USER = 54_321


class Seen(NamedTuple):
    """What a cluster was like; gathered while it was up, for there can be one at a time."""

    report: dict[str, Any]
    statuses: dict[str, dict[str, str]]
    """Of every thread."""
    open: dict[str, set[str]]
    """What descriptors of a process stand for, without numbers."""
    listed: list[bytes]
    read_characters: int
    recorded: str
    compiled: tuple[int, int, int]
    no_record: str
    generations: tuple[int, int]
    listed_again: list[bytes]
    went_astray: bool
    survives_crowds: bool


def _look(folder: Path, mode: Mode) -> Seen:
    supervisor = logging.getLogger("tools.cluster")
    # It warns of the hypervisor that is killed, to whichever test asked for this first.
    with (
        patch.object(supervisor, "propagate", new=False),
        jailed_cluster(folder, mode) as cluster,
    ):
        statuses = {
            f"{name} {task.name}": _status(task)
            for name, pid in cluster.pids().items()
            for task in Path(f"/proc/{pid}/task").iterdir()
        }
        opened = {name: _open_files(pid) for name, pid in cluster.pids().items()}
        report = cluster.attempts()
        record = folder / "record"
        cluster.work("histories", record=str(record), prepare=1, pages=2, operations=10)
        absent = {"record": str(folder / "absent" / "record"), "operations": 1}
        answer = cluster.ask("run", workload="histories", seed=1, parameters=absent)
        no_record = str(answer.get("error") or cluster.finish()["error"])
        findings = cluster.work("compile", manifest=str(folder / "manifest"))["counters"]
        before = cluster.stats()["generation"]
        listed = cluster.exec("ls", "/").split()
        went_astray = cluster.lead_astray(folder / "bait")
        survives_crowds = cluster.crowd_the_door()
        return Seen(
            report,
            statuses,
            opened,
            listed,
            cluster.ask("status")["counters"]["rchar_bytes"],
            record.read_text(),
            (findings["compiled_files"], findings["uncompilable_files"], findings["mismatches"]),
            no_record,
            (before, cluster.stats()["generation"]),
            cluster.exec("ls", "/").split(),
            went_astray,
            survives_crowds,
        )


@pytest.fixture(scope="module")
def unjailed() -> Seen:
    """A cluster without jails."""
    with short_folder() as folder:
        return _look(folder / "off", "off")


@pytest.fixture(scope="module")
def jailed() -> Seen:
    """A cluster whose guests and hypervisor are jailed."""
    with short_folder() as folder:
        return _look(folder / "auto", "auto")


@pytest.mark.skipif(os.geteuid() != 0, reason="of guests with user ids of their own")
def test_everything_is_refused_in_a_jail(jailed: Seen) -> None:
    """Each attempt has the errno that it must have."""
    got = dict(jailed.report)
    ids = got.pop("uid"), got.pop("real_uid")

    expected = dict.fromkeys(got, "EPERM") | OTHER_ERRNOS | OF_ANOTHER_USER
    assert got == expected
    assert len(got) > 45
    assert all(0x7000_0000 <= one < 0x8000_0000 for one in ids)


@pytest.mark.skipif(os.geteuid() != 0, reason="of what root can do")
def test_the_same_attempts_succeed_without_a_jail(unjailed: Seen, jailed: Seen) -> None:
    """So the jail refuses them, and nothing else does."""
    got = dict(unjailed.report)

    assert (got.pop("uid"), got.pop("real_uid")) == (0, 0)
    assert got == dict.fromkeys(got, "done") | IMPOSSIBLE_ANYWAY
    assert set(got) == set(jailed.report) - {"uid", "real_uid"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_guests_of_an_ordinary_user_are_jailed(jailed: Seen) -> None:
    """Without user ids of their own, and without what only root can look into."""
    with short_folder() as folder:
        folder.chmod(0o777)
        done = subprocess.run(
            [
                *("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"),
                # The interpreter may lie in a folder of root's; the jail takes this away again.
                *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
                *(sys.executable, "-m", "tests.support.jailedclusters", str(folder / "auto")),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder)},
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    got = told.pop("report")

    # From outside: figures as ever, memory to nobody.
    open_to_all = {"stat": "done", "schedstat": "done", "statm": "done"}
    expected = {"environ": "EACCES"} | open_to_all
    assert told == dict.fromkeys(("red", "blue", "hypervisor"), expected)
    assert (got.pop("uid"), got.pop("real_uid")) == (USER, USER)
    assert got == dict.fromkeys(got, "EPERM") | OTHER_ERRNOS | OF_THE_SAME_USER
    assert set(got) == set(jailed.report) - {"uid", "real_uid"}


def test_processes_have_lost_what_they_had(jailed: Seen, unjailed: Seen) -> None:
    """As the host's kernel says, of every thread: no capability, a filter, nothing new to gain."""
    seen = jailed.statuses

    for name, status in seen.items():
        assert status["NoNewPrivs"] == "1", name
        assert status["Seccomp"] == "2", name
        kept = 1 if name.startswith("hypervisor") and os.geteuid() == 0 else 0
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == kept, name
        assert int(status["CapBnd"], 16) == 0 or os.geteuid() != 0, name
    if os.geteuid() == 0:
        users = {status["Uid"] for status in seen.values()}
        assert len(users) == 3
        groups = {seen[name]["Groups"] for name in seen if not name.startswith("hypervisor")}
        assert groups == {""}
    # The hypervisor has a second one, which listens.
    assert len([name for name in seen if name.startswith("hypervisor")]) == 2
    assert {status["Seccomp"] for status in unjailed.statuses.values()} == {"0"}


def test_the_hypervisor_is_not_of_the_guests_fork_server(jailed: Seen) -> None:
    """From which all guests have one seed of Python's hash, that it must not have."""
    parents = {name.split()[0]: status["PPid"] for name, status in jailed.statuses.items()}

    assert len(parents) == 3
    hypervisors = parents.pop("hypervisor")
    assert len(set(parents.values())) == 1
    assert hypervisors not in parents.values()


def _status(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_nothing_of_the_starters_is_open_in_a_jail(jailed: Seen, unjailed: Seen) -> None:
    """No pipe of the fork server, by which a guest would end all others; no console, in which it
    would speak for them; no input."""
    kinds = {"socket", "memfd", "queue", "anon_inode", "pidfd"}
    kept = {"/dev/null", "io", "ksm_stat", "run"}  # of these what the machine has
    for name in ("red", "blue"):
        own = {f"{name}.log", f"{name}.img"}
        assert own < jailed.open[name] <= own | kinds | kept
        assert {"pipe", "console.log"} < unjailed.open[name]
    assert "console.log" in jailed.open["hypervisor"]


def _open_files(pid: int) -> set[str]:
    """The last part of each path, what else it is, and `input` if there is any."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(fd.readlink())
            if fd.name == "0" and target != "/dev/null":
                found.add("input")
            if target.startswith("/tmem-"):
                target = "queue"
            kind = target.removeprefix("/").partition(":")[0]
            plain = target if target == "/dev/null" else Path(target).name
            found.add(plain if target.startswith("/") and ":" not in target else kind)
    return found


def test_guests_work_in_their_jails(jailed: Seen, unjailed: Seen) -> None:
    """Commands, files of the host that come with a question, its own /proc, rare encodings."""
    assert jailed.listed == [b"histories", b"lost+found", b"source.py"]
    assert jailed.compiled == unjailed.compiled == (1, 0, 0)
    assert jailed.read_characters > 0
    assert len(jailed.recorded.splitlines()) >= 20
    # A folder that is not there: the asker can't open it, and the guest less.
    assert "Operation not permitted" in jailed.no_record


def test_guests_come_back_to_a_hypervisor_that_was_started_again(jailed: Seen) -> None:
    """From inside: the door by a path of the working folder, queues that are theirs."""
    before, after = jailed.generations
    assert after == before + 1
    assert jailed.listed_again == jailed.listed


@pytest.mark.skipif(landlock.missing() is not None, reason="without Landlock on files")
def test_hypervisor_opens_nothing_outside_of_its_run_directory(
    jailed: Seen, unjailed: Seen
) -> None:
    """Led astray by a link in its run directory; without a jail it goes where that leads."""
    assert unjailed.went_astray
    assert not jailed.went_astray


def test_hypervisor_survives_a_crowd_at_its_door(jailed: Seen) -> None:
    """More handshakes than it takes at a time; what it does then it does in its jail."""
    assert jailed.survives_crowds


def test_strict_refuses_where_a_part_is_missing(
    folder: Path, cluster_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is started: one line, exit code 69.  `auto` names it and goes on."""
    monkeypatch.setattr(landlock, "level", lambda: 0)

    done = tmem_here("up", "-d", "--jail", "strict", "-f", str(cluster_file), cwd=folder)

    assert done.returncode == ExitCode.UNAVAILABLE
    assert "no Landlock (Linux 5.13 or newer" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "runs").exists()


def test_a_mode_that_is_none_is_refused(folder: Path, cluster_file: Path) -> None:
    """As any other wrong option."""
    done = tmem_here("up", "-d", "--jail", "tight", "-f", str(cluster_file), cwd=folder)

    assert done.returncode == ExitCode.USAGE
    assert done.stderr == "tmem: --jail tight: there are off, auto, strict\n"
