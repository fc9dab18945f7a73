"""Ctrl-C and SIGKILL at random moments: nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from ipc.names import process_start
from tests.support.clusters import left_behind, tmem, tmem_here, tmem_process, wait_until

pytestmark = pytest.mark.cluster


def _registered_processes(folder: Path) -> list[tuple[int, int]]:
    entries = [path.name.split(":") for path in folder.rglob("registry/process:*")]
    return [(int(pid), int(start)) for _, pid, start in entries]


@pytest.mark.parametrize("number", range(5))
def test_interrupt_at_any_moment_leaves_nothing(
    folder: Path, cluster_file: Path, cluster_name: str, number: int
) -> None:
    """Ctrl-C reaches the whole process group, as a terminal sends it."""
    seconds = _random_moment(number)
    with tmem_process("up", "-f", str(cluster_file), cwd=folder) as process:
        wait_until((folder / "runs").exists, "the run to begin")
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=40)

    # In the interpreter's last moments, with the run over, the signal ends it as a shell's 130.
    assert process.returncode in (130, -signal.SIGINT, 0), f"after {seconds} s: {errors}"
    assert "Traceback" not in errors, f"after {seconds} s"
    assert left_behind(folder, cluster_name) == [], f"after {seconds} s"
    logs = [path.read_text() for path in folder.rglob("supervisor.log")]
    assert not any("event=kill" in text for text in logs), f"after {seconds} s: {logs}"


@pytest.mark.parametrize("number", range(5))
def test_killed_supervisor_leaves_nothing_after_clean(
    folder: Path, cluster_file: Path, cluster_name: str, number: int
) -> None:
    """SIGKILL gives the supervisor no chance; the registry has what `tmem clean` removes."""
    seconds = _random_moment(number)
    with tmem_process("up", "-f", str(cluster_file), cwd=folder) as process:
        wait_until((folder / "runs").exists, "the run to begin")
        time.sleep(seconds)
        process.kill()
        process.communicate(timeout=40)
        registered = _registered_processes(folder)
        done = tmem_here("clean", cwd=folder)

    assert done.returncode == 0, f"after {seconds} s: {done.stderr}"
    assert left_behind(folder, cluster_name) == [], f"after {seconds} s"
    for pid, start in registered:
        wait_until(partial(_has_ended, pid, start), f"the end of {pid}")


def test_children_end_by_themselves_when_the_supervisor_is_killed(
    folder: Path, cluster_file: Path
) -> None:
    """Without any clean-up command, guests and hypervisor notice and end."""
    with tmem_process("up", "-f", str(cluster_file), cwd=folder) as process:
        wait_until(
            lambda: len(list(folder.glob("runs/*/on/guest-*.sock"))) == 2 or process.poll(),
            "two guests that are up",
        )
        registered = _registered_processes(folder)
        process.kill()
        process.communicate()

    assert len(registered) >= 5
    for pid, start in registered:
        wait_until(partial(_has_ended, pid, start), f"the end of {pid}")
    assert tmem_here("clean", cwd=folder).returncode == 0


def test_stale_run_directory_is_refused_then_cleaned(folder: Path, cluster_file: Path) -> None:
    """After SIGKILL the directory is not used again before `tmem clean` has been there."""
    up = ["up", "-d", "-f", str(cluster_file), "--run", "here"]
    assert tmem(*up, cwd=folder).returncode == 0
    (pid, _), *_ = [entry for entry in _registered_processes(folder) if _is_supervisor(entry[0])]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: process_start(pid) is None, "the end of the supervisor")

    refused = tmem_here(*up, cwd=folder)
    looked = tmem_here("ps", "--run", "here", cwd=folder)
    cleaned = tmem("clean", "--run", "here", cwd=folder)
    again = tmem(*up, cwd=folder)

    assert refused.returncode == 65
    assert "stale run directory" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert looked.returncode == 69
    assert "stale run directory" in looked.stderr
    assert cleaned.returncode == 0
    assert again.returncode == 0, again.stderr
    assert tmem("down", "--run", "here", cwd=folder).returncode == 0


def _has_ended(pid: int, start: int) -> bool:
    return process_start(pid) != start


def _is_supervisor(pid: int) -> bool:
    try:
        return b"tools.supervise" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _random_moment(number: int) -> float:
    """A moment in the run's life, spread over it; the failing test prints it."""
    return random.Random().uniform(0.6 * number, 0.6 * number + 0.6)
