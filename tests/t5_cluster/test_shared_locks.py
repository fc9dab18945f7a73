"""flock and fcntl's ranges between real guests: who waits, who gets in, and what a death leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clusters import (
    LiveGuests,
    left_behind,
    tmem,
    tmem_process,
    volume_toml,
    wait_until,
    write_tree,
)

pytestmark = pytest.mark.cluster

ROUNDS = 60
GUESTS = ("red", "blue", "green")


class Guests(LiveGuests):
    """Three guests on one volume, and commands in them."""

    def exec(self, guest: str, *argv: str) -> tuple[int, str]:
        """A command's exit code and output."""
        answer = self.ask(guest, "exec", argv=list(argv))
        return answer["exit_code"], (answer["stdout"] + answer["stderr"]).decode()


@pytest.fixture
def guests(folder: Path, cluster_name: str) -> Iterator[Guests]:
    """They are up."""
    tree = write_tree(folder / "tree", files=3)
    (folder / "cluster.toml").write_text(volume_toml(cluster_name, tree, guests=GUESTS))
    done = tmem("up", "-d", "-f", "cluster.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    try:
        yield Guests(folder)
    finally:
        tmem("down", cwd=folder)
    assert left_behind(folder, cluster_name) == []


def count_together(guests: Guests, kind: str) -> None:
    """All guests add to the same counters at once; none of their additions is lost."""
    path = f"/{kind}"
    parameters = {"path": path, "counters": 2, "rounds": ROUNDS, "locks": kind}
    for seed, guest in enumerate(GUESTS):
        question = {"workload": "counters", "seed": seed, "parameters": parameters}
        assert guests.ask(guest, "run", **question) == {"accepted": True}
    for guest in GUESTS:
        wait_until(lambda one=guest: guests.ask(one, "status")["state"] == "idle", guest)  # type: ignore[misc]
        status = guests.ask(guest, "status")
        assert (status["error"], status["done"]) == (None, ROUNDS)
    content = guests.ask("green", "exec", argv=["cat", path])["stdout"]
    assert sum(struct.unpack("<QQ", content)) == len(GUESTS) * ROUNDS


def test_locks_exclude_wait_and_end_with_whoever_had_them(guests: Guests) -> None:
    """One after the other in one cluster: sums, refusals, waiting, a client that goes, a death."""
    count_together(guests, "flock")
    count_together(guests, "ranges")

    assert guests.exec("red", "mkdir", "/d")[0] == 0
    patient = ("exec", "--timeout", "60")
    words = ["red", "--", "flock", "/d/f", "sleep", "50"]
    with tmem_process(*patient, *words, cwd=guests.folder):
        wait_until(lambda: "FLOCK" in guests.exec("red", "cat", "/proc/locks")[1], "the lock")
        row = guests.exec("red", "cat", "/proc/locks")[1]
        assert re.fullmatch(r"1: FLOCK  ADVISORY  WRITE -\d+ 00:00:\d+ 0 EOF\n", row)
        assert guests.exec("blue", "flock", "-n", "/d/f", "ls") == (1, "")
        assert guests.exec("blue", "flock", "-s", "-w", "0.3", "/d/f", "ls") == (1, "")
        assert guests.exec("red", "flock", "-n", "/d/f", "ls") == (1, "")
        # A lock is no lock for who takes another kind, or none.
        assert guests.exec("blue", "lockf", "-n", "/d/f", "0", "0", "ls", "/d") == (0, "f\n")
        kinds = {one["kind"]: one for one in json.loads(_locks(guests)) if one["kind"] == "flock"}
        assert kinds["flock"]["holders"] == {"red": "EX"}
    # The client is gone, and with it the command and its lock; who waits gets it.
    assert guests.exec("blue", "flock", "-w", "5", "/d/f", "ls", "/d") == (0, "f\n")

    words = ["red", "--", "lockf", "/d/f", "10", "10", "sleep", "50"]
    with tmem_process(*patient, *words, cwd=guests.folder):
        wait_until(lambda: "OFDLCK" in guests.exec("red", "cat", "/proc/locks")[1], "the range")
        assert guests.exec("blue", "lockf", "-n", "/d/f", "0", "10", "ls", "/d") == (0, "f\n")
        assert guests.exec("blue", "lockf", "-ns", "/d/f", "19", "0", "ls", "/d") == (1, "")
        assert guests.exec("blue", "lockf", "-ns", "/d/f", "20", "0", "ls", "/d") == (0, "f\n")
        os.kill(guests.pids()["red"], signal.SIGKILL)
        # As long as red is not known to be dead the lock is its own.
        words = ["blue", "--", "lockf", "-w", "50", "/d/f", "15", "1", "flock", "/d/f", "ls", "/d"]
        done = tmem(*patient, *words, cwd=guests.folder)
        assert (done.returncode, done.stdout) == (0, "f\n"), done.stderr

    assert "usage: flock [-s|-x]" in guests.exec("blue", "flock", "/d/f")[1]
    assert guests.exec("blue", "flock", "-w", "soon", "/d/f", "ls")[0] == 2
    done = tmem("exec", "--timeout", "0.3", "blue", "--", "sleep", "5", cwd=guests.folder)
    assert done.returncode != 0
    assert "no answer in 0.3 s" in done.stderr


def _locks(guests: Guests) -> str:
    return tmem("locks", "--json", cwd=guests.folder).stdout
