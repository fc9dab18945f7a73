"""The simulator: a few dozen seeds, the same history in every process, and that it finds bugs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypervisor.membership import Memberships
from hypervisor.pages import TAKEN
from hypervisor.store import Store
from ipc.errors import ExitCode
from tests.support.tools import need_tool
from tools.cli import main
from tools.sim.run import guests_of, run_seed

ROOT = Path(__file__).parents[2]
SEEDS = 16
EVENTS = 200
GROUPS = 4
KERNEL_SEED = next(seed for seed in range(100) if "kernel" in guests_of(seed))
ONCE_FAILED: tuple[int, ...] = ()
"""Seeds whose history once broke a promise."""


@pytest.mark.parametrize("group", range(GROUPS))
def test_every_promise_holds(group: int) -> None:
    """Whatever is late, lost or dies."""
    need_tool("mke2fs")
    for seed in range(group, SEEDS, GROUPS):
        outcome = run_seed(seed, EVENTS)
        assert not outcome.failure, f"tmem sim {seed} --events {EVENTS}\n{outcome.failure}"
        assert outcome.calls > 0


@pytest.mark.parametrize("seed", [3, KERNEL_SEED])
def test_seed_is_one_history_in_every_process(seed: int) -> None:
    """Line for line; no order depends on Python's hash seed."""
    need_tool("mke2fs")
    command = [sys.executable, "-m", "tools", "sim", str(seed), "--events", "150", "--verbose"]
    first, second = (
        subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    )

    assert first.splitlines() == second.splitlines()
    assert len(first.splitlines()) > 150


def test_broken_promise_tells_the_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And how to see it again; the exit code is 1."""
    need_tool("mke2fs")
    monkeypatch.setattr(Memberships, "apply_grant", lambda _self, _member: None)

    assert main(["sim", "1", "--seeds", "4"]) == ExitCode.VIOLATED
    out = capsys.readouterr().out
    assert "Broken: " in out
    assert "FAILED; again: tmem sim 1 --events 300 --verbose" in out
    assert out.splitlines()[-1].startswith("seeds 1 to 4: ")


def test_loss_and_staleness_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A get that takes a page out and leaves it; the ledger knows without looking inside."""
    need_tool("mke2fs")
    remove = Store._remove

    def keep_one(self: Store, *arguments: object) -> None:
        if arguments[5] != TAKEN:
            remove(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_remove", keep_one)
    failures = [run_seed(seed).failure for seed in range(6)]

    assert any("a page that was gone" in failure for failure in failures), failures
