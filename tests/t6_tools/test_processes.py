"""What processes of a cluster have in common, and what they must not have."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest

from ipc.jail import landlock
from tests.support.clusters import short_folder, wait_until
from tests.support.secrecy import kill_nothing, write_environment, write_hash
from tools.processes import ProcessFactory


def test_guests_do_not_know_the_hypervisors_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is forked from one server has its seed, so the hypervisor is started apart; and then
    PYTHONHASHSEED, which a guest may know, says nothing."""
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    with short_folder() as folder:
        factory = ProcessFactory(folder, folder / "console")
        factory.start()
        try:
            hashes = []
            for number, apart in enumerate((False, False, True, True)):
                path = folder / f"hash{number}"
                process = factory.spawn(write_hash, path, path.name, apart=apart)
                process.join()
                assert process.exitcode == 0, Path(folder / "console").read_text()
                process.close()
                hashes.append(path.read_text())
        finally:
            factory.close()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.mark.skipif(landlock.level() < 6, reason="this kernel holds no signals")
@pytest.mark.parametrize("enclosed", [False, True])
def test_signals_of_enclosed_children_reach_nobody_else(*, enclosed: bool) -> None:
    """As whoever is asked is of the same user, nothing else holds them."""
    with short_folder() as folder:
        factory = ProcessFactory(folder, folder / "console", enclosed=enclosed)
        factory.start()
        try:
            asleep = factory.spawn(time.sleep, 60, "asleep")
            outcomes = []
            for pid in (os.getpid(), asleep.pid):
                process = factory.spawn(kill_nothing, (folder / "outcome", pid), "")
                process.join()
                process.close()
                outcomes.append((folder / "outcome").read_text())
            asleep.kill()
            asleep.join()
            asleep.close()
        finally:
            factory.close()
    assert outcomes == ["EPERM" if enclosed else "done", "done"]


def _environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_children_have_nothing_of_the_starters_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A key that a shell has for somebody else; the time zone is for everybody."""
    monkeypatch.setenv("PROCESSES_TEST_KEY", "hunter2")
    monkeypatch.setenv("TZ", "Europe/Oslo")
    with short_folder() as folder:
        factory = ProcessFactory(folder, folder / "console")
        helpers = factory.start()
        try:
            environments = []
            for apart in (False, True):
                process = factory.spawn(write_environment, folder / "environ", "", apart=apart)
                process.join()
                process.close()
                environments.append((folder / "environ").read_bytes())
            for pid in helpers:
                # Empty until it runs the program that it was started for.
                wait_until(partial(_environment, pid), "a helper")
                environments.append(_environment(pid))
        finally:
            factory.close()
    assert os.environ["PROCESSES_TEST_KEY"] == "hunter2"
    assert len(environments) == 4
    for environment in environments:
        assert b"TZ=Europe/Oslo\0" in environment
        assert b"hunter2" not in environment
