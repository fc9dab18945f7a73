"""`tmem doctor`: one line a limit, the fix where one is too small, an exit code."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest

from ipc.errors import ExitCode
from ipc.jail import landlock
from tests.support.clusters import command, environment, tmem
from tools import doctor


def test_doctor_has_a_line_for_each_limit(tmp_path: Path) -> None:
    """The JSON says the same as the lines; this machine can run the tests."""
    done = tmem("doctor", cwd=tmp_path)
    findings = json.loads(tmem("doctor", "--json", cwd=tmp_path).stdout)

    lines = done.stdout.splitlines()
    assert len(lines) == len(findings)
    for line, finding in zip(lines, findings, strict=True):
        assert line.startswith(finding["state"])
        assert finding["subject"] in line
    assert {"python", "message queues", "/dev/shm", "free memory", "mke2fs"} <= {
        finding["subject"] for finding in findings
    }
    parts = {finding["subject"] for finding in findings if finding["subject"].startswith("jail: ")}
    assert parts == {"jail: files", "jail: system calls", "jail: user ids", "jail: memory"}
    missing = [finding for finding in findings if finding["state"] == "missing"]
    assert done.returncode == (69 if missing else 0)


@pytest.mark.parametrize(
    ("level", "state", "says"),
    [
        (0, "warning", "no Landlock (Linux 5.13 or newer, and landlock among the kernel's lsm=)"),
        (3, "ok", "Landlock, level 3, without Landlock on TCP (Linux 6.7), Landlock on device"),
        (9, "ok", "Landlock, level 9"),
    ],
)
def test_doctor_says_what_jails_can_do(
    monkeypatch: pytest.MonkeyPatch, level: int, state: str, says: str
) -> None:
    """No jail is no reason not to run; what newer kernels add is named."""
    monkeypatch.setattr(landlock, "level", lambda: level)
    monkeypatch.setattr(landlock, "open_queues", lambda: os.open("/dev/null", os.O_RDONLY))

    finding = doctor._jail_files()

    assert finding.state == state
    assert finding.found.startswith(says)
    assert (state == "ok") == (finding.fix == "")


def test_doctor_explains_a_small_queue_limit(tmp_path: Path) -> None:
    """With `ulimit -q 5000` two guests fit; the line says so, with the fix."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (5000, 5000))

    done = subprocess.run(
        command("doctor"),
        cwd=tmp_path,
        env=environment(),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )

    (line,) = (line for line in done.stdout.splitlines() if "message queues" in line)
    assert line.startswith("missing")
    assert "2 guests fit" in line
    assert "ulimit -q" in line
    assert done.returncode == 69


def test_cluster_that_does_not_fit_the_queue_limit_is_explained(tmp_path: Path) -> None:
    """The same limit, met by `tmem up`: not a word of open files, and nothing was started."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (5000, 5000))

    done = subprocess.run(
        command("up", "--topo", "default"),
        cwd=tmp_path,
        env=environment(),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )

    (line,) = done.stderr.splitlines()
    assert "4 guests need 9216 bytes of message queues" in line
    assert "2 guests fit" in line
    assert done.returncode == 69
    assert list(tmp_path.iterdir()) == []


def test_missing_program_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images can't be made without mke2fs; e2fsck is only missed by those who check."""
    monkeypatch.setattr(doctor, "find_program", lambda _name: None)

    findings = {finding.subject: finding for finding in doctor.examine()}

    assert findings["mke2fs"].state == "missing"
    assert "e2fsprogs" in findings["mke2fs"].fix
    assert findings["e2fsck"].state == "warning"
    assert doctor.exit_code(list(findings.values())) == ExitCode.UNAVAILABLE


def test_optimised_python_is_refused(tmp_path: Path) -> None:
    """With -O the assertions that find our own bugs are gone."""
    words = command("doctor")

    done = subprocess.run(
        [words[0], "-O", *words[1:]],
        cwd=tmp_path,
        env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == os.EX_UNAVAILABLE
    assert "run Python without -O" in done.stdout
