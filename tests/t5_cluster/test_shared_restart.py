"""Two guests share clean pages again after their hypervisor was killed and started again.

A hypervisor that comes back has kept the pages and one token: the newest of all files. A put under
any older one is refused, also that of a file which nobody has written since, until the guests have
its lock's token lifted.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import left_behind, tmem, volume_toml, wait_until
from tests.t5_cluster.test_shared_deaths import SharedCluster
from tools.control import ask
from tools.volumeimage import build_volume

pytestmark = pytest.mark.cluster

FILES = 3
FILE_BYTES = 500_000
"""One alone nearly fills a guest's memory, so that reading all three pushes pages out."""


class Pair:
    """Red and blue on a volume with a few large files that nobody writes."""

    def __init__(self, folder: Path, image: Path, manifest: Path) -> None:
        self.cluster = SharedCluster(folder, image)
        self._manifest = manifest

    def read_all(self, name: str) -> dict[str, int]:
        """Read and verify all files twice; what the guest's cleancache counted meanwhile."""
        before = self.counters(name)
        question = {
            "verb": "run",
            "workload": "read_all",
            "seed": 1,
            "parameters": {"manifest": os.fspath(self._manifest), "passes": 2},
        }
        assert self.cluster.ask(name, question) == {"accepted": True}
        self.cluster.finish(name)
        assert self.cluster.status(name)["counters"]["mismatches"] == 0
        after = self.counters(name)
        return {key: after[key] - before[key] for key in ("puts", "stale", "succ_gets")}

    def counters(self, name: str) -> Any:
        """Of a guest's cleancache."""
        return self.cluster.status(name)["counters"]["cleancache"]

    def attach_again(self, name: str) -> None:
        """It notices that its attachment is gone, and gets another one."""
        self.read_all(name)
        wait_until(lambda: self.counters(name)["attached"], f"an attachment of {name}")
        assert self.counters(name)["reattaches"] == 1

    def tokens(self) -> dict[int, int]:
        """The token of each inode's lock, as its master has it."""
        locks = json.loads(tmem("locks", "--json", cwd=self.cluster.folder).stdout)
        return {lock["inode"]: lock["token"] for lock in locks if lock["kind"] == "meta"}

    def refusals(self, name: str) -> list[tuple[int, int]]:
        """Inode and needed token of each put that was refused."""
        found = re.findall(r"event=stale ino=(\d+) pages=\d+ needed=(\d+)", self.cluster.log(name))
        return [(int(ino), int(needed)) for ino, needed in found]

    def drop_pages(self) -> None:
        """What the pool held from before is gone."""
        question = {"verb": "flush", "size_bytes": 64 << 20}
        while ask(self.cluster.directory.hypervisor_socket, question).get("more"):
            pass


@pytest.fixture
def pair(folder: Path, cluster_name: str) -> Iterator[Pair]:
    """Up; afterwards down, with nothing left behind."""
    tree = folder / "tree"
    tree.mkdir()
    numbers = random.Random(8)
    for number in range(FILES):
        (tree / f"{number}.bin").write_bytes(numbers.randbytes(FILE_BYTES))
    made = build_volume(str(tree), 2**22, "data", 2, folder / "made")
    text = volume_toml(cluster_name, tree, image=made.path, guests=("red", "blue"))
    (folder / "cluster.toml").write_text(text)
    done = tmem("up", "-d", "-f", "cluster.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    try:
        yield Pair(folder, made.path, made.manifest)
    finally:
        tmem("down", cwd=folder)
    assert left_behind(folder, cluster_name) == []


def test_tokens_are_lifted_after_a_restart(pair: Pair) -> None:
    """Old ones are refused, then lifted, and what one guest has read the other gets again."""
    cluster = pair.cluster
    cluster.start("red", prepare=1, operations=0)
    cluster.finish("red")
    for name in ("red", "blue") * 2:
        # Other files, written by both in turns: their tokens are the newest.
        cluster.start(name, operations=6, writes=1.0, syncs=1.0)
        cluster.finish(name)
    assert pair.read_all("red")["puts"] > 0
    assert pair.read_all("blue")["succ_gets"] > 0
    assert pair.refusals("red") == pair.refusals("blue") == []
    before = pair.tokens()
    newest = max(before.values())

    os.kill(cluster.pid("hypervisor"), signal.SIGKILL)
    cluster.await_restart(1)
    for name in ("red", "blue"):
        pair.attach_again(name)
    pair.drop_pages()
    pair.read_all("red")
    assert pair.counters("red")["stale"] > 0
    refused = pair.refusals("red")
    assert len(refused) >= FILES
    assert {needed for _, needed in refused} == {newest}
    files = {ino for ino, _ in refused}
    assert len(files) == FILES
    assert all(before[ino] < newest for ino in files)
    after = pair.tokens()
    assert {after[ino] for ino in files} == {newest}
    assert {ino: after[ino] for ino in before.keys() - files} == {
        ino: before[ino] for ino in before.keys() - files
    }

    # The pool was empty, so what blue finds was put by red after the restart.
    assert pair.read_all("blue")["succ_gets"] > 0
    for name in ("red", "blue"):
        found = pair.read_all(name)
        assert found["puts"] > 0
        assert found["succ_gets"] > 0
        assert found["stale"] == 0
