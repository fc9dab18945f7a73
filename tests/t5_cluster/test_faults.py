"""Processes of a running cluster die; the others go on and every byte stays right."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import Disconnected
from tests.support.clusters import (
    cluster_toml,
    left_behind,
    read_results,
    tmem,
    tmem_here,
    tmem_process,
    wait_until,
)
from tools.control import ask

pytestmark = pytest.mark.cluster


@pytest.fixture
def long_file(folder: Path, cluster_file: Path, cluster_name: str) -> Path:
    """The cluster with more work, so that there is time for a death."""
    cluster_file.write_text(cluster_toml(cluster_name, folder / "tree", passes=25))
    return cluster_file


def _figures(path: Path) -> dict[str, Any] | None:
    try:
        return ask(path, {"verb": "stats"})
    except Disconnected:
        return None


def _busy_hypervisor(folder: Path, generation: int) -> int | None:
    """Process id of the hypervisor once it has served a guest's pages."""
    for path in folder.glob("runs/*/on/control.sock"):
        stats = _figures(path)
        if stats and stats["generation"] == generation and stats["pages_put"] > 100:
            return int(stats["pid"])
    return None


def test_run_goes_on_when_the_hypervisor_is_killed_twice(
    folder: Path, long_file: Path, cluster_name: str
) -> None:
    """The supervisor starts it again on its arena; guests come back; no file is wrong."""
    with tmem_process("up", "-f", str(long_file), cwd=folder) as process:
        for generation in (1, 2):
            wait_until(
                lambda number=generation: _busy_hypervisor(folder, number),  # type: ignore[misc]
                f"generation {generation} at work",
            )
            pid = _busy_hypervisor(folder, generation)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert errors.count("hypervisor died (exit code -9)") == 2
    results = read_results(folder)
    assert results["on"]["hypervisor"]["restarts"] == 2
    for guest in results["on"]["guests"].values():
        assert guest["mismatches"] == 0
        assert guest["cleancache"]["reattaches"] >= 1
    log = next(folder.glob("runs/*/on/log/supervisor.log")).read_text()
    assert log.count("event=hypervisor-restart") == 2
    assert left_behind(folder, cluster_name) == []


def test_guest_that_is_killed_fails_the_run_and_harms_nobody(
    folder: Path, long_file: Path, cluster_name: str
) -> None:
    """The other guest finishes its work, the command says who died and exits with 71."""
    with tmem_process("up", "-f", str(long_file), cwd=folder) as process:
        wait_until(lambda: _busy_hypervisor(folder, 1), "a busy hypervisor")
        record = json.loads(next(folder.glob("runs/*/on/cluster.json")).read_text())
        (pid,) = (guest["pid"] for guest in record["guests"] if guest["name"] == "red")
        os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)

    assert process.returncode == 71, errors
    assert "guest red died (exit code -9)" in errors
    results = read_results(folder)
    assert results["on"]["guests"]["red"]["exit_code"] == -9
    assert results["on"]["guests"]["blue"]["mismatches"] == 0
    assert results["on"]["guests"]["blue"]["files_verified"] >= 25 * 120
    assert left_behind(folder, cluster_name) == []


def test_pools_of_a_killed_guest_are_freed(
    folder: Path, cluster_file: Path, cluster_name: str
) -> None:
    """An idle cluster: after SIGKILL the guest is gone from the hypervisor, its pages are free."""
    # An arena with room for what both guests evict.
    cluster_file.write_text(cluster_toml(cluster_name, folder / "tree", arena="8M"))
    assert tmem("up", "-d", "-f", str(cluster_file), cwd=folder).returncode == 0
    control = next(folder.glob("runs/*/on/control.sock"))
    for name in ("red", "blue"):
        # Larger than the guest's memory, so some of it is evicted to tmem.
        done = tmem_here("exec", name, "find", "/", cwd=folder)
        files = [line for line in done.stdout.splitlines() if line.endswith((".py", ".bin"))]
        assert tmem_here("exec", name, "sha256sum", *files, cwd=folder).returncode == 0
    before = ask(control, {"verb": "stats"})
    assert before["guests"]["red"]["ephemeral_pages"] > 0
    assert before["guests"]["blue"]["ephemeral_pages"] > 0

    os.kill(before["guests"]["red"]["pid"], signal.SIGKILL)
    wait_until(lambda: "red" not in ask(control, {"verb": "stats"})["guests"], "red to be gone")

    after = ask(control, {"verb": "stats"})
    assert after["guests"]["blue"]["ephemeral_pages"] == after["arena"]["ephemeral_pages"] > 0
    states = {
        row["name"]: row["state"]
        for row in json.loads(tmem_here("ps", "--json", cwd=folder).stdout)
    }
    assert states == {
        "supervisor": "running",
        "hypervisor": "running",
        "red": "gone",
        "blue": "idle",
    }
    assert tmem_here("exec", "blue", "ls", "/", cwd=folder).returncode == 0
    assert tmem("down", cwd=folder).returncode == 0
