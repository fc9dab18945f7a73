"""SIGKILL to the hypervisor under load, at random moments, as `make crash-restart` does it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESTARTS = 10
"""`make crash-restart` does 500 of each."""


@pytest.mark.cluster
@pytest.mark.parametrize("eviction", ["clock", "fifo"])
def test_no_restart_loses_a_persistent_page_or_serves_a_stale_one(eviction: str) -> None:
    """Its last line says how many restarts and pages were checked; a failure prints the seed."""
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.crash_restart",
            f"--restarts={RESTARTS}",
            "--eviction",
            eviction,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert finished.returncode == 0, finished.stdout + finished.stderr
    last = finished.stdout.splitlines()[-1]
    found = re.match(
        r"restarts (\d+), persistent pages checked (\d+), lost (\d+), stale (\d+)", last
    )
    assert found, last
    restarts, checked, lost, stale = map(int, found.groups())
    assert (restarts, lost, stale) == (RESTARTS, 0, 0), finished.stdout
    assert checked > 1000
