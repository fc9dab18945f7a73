"""Nodes of a volume that die or sleep too long, as real processes of a cluster in the background.

What the others do meanwhile is asked of them over their control sockets; what a node saw of its
cluster stands in its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fs.block.device import BLOCK_BYTES
from fs.block.file import FileDevice
from fs.block.reservations import Reservations
from fs.block.shared import SECTOR_BYTES
from fs.ocfs2.format import HEARTBEAT_BLOCKS
from fs.ocfs2.fsck.checker import check as check_volume
from guests.shareddisk import read_layout
from ipc.codec import Record
from ipc.errors import Disconnected
from tests.support.clusters import (
    left_behind,
    tmem,
    tmem_here,
    volume_toml,
    wait_until,
    write_tree,
)
from tools.control import ask
from tools.histories import Call, check, read_history
from tools.rundir import ClusterDirectory
from tools.volumeimage import build_volume

pytestmark = pytest.mark.cluster


class SharedCluster:
    """A cluster that is up: red, blue and green on one volume."""

    def __init__(self, folder: Path, image: Path) -> None:
        (path,) = (folder / "runs").glob("*/on")
        self.folder = folder
        self.directory = ClusterDirectory(path)
        self.image = image
        self._seed = 0

    def pid(self, name: str) -> int:
        """The process of a guest, or of the hypervisor."""
        rows = json.loads(tmem_here("ps", "--json", cwd=self.folder).stdout)
        return next(int(row["pid"]) for row in rows if row["name"] == name)

    def ask(self, name: str, question: Record) -> Record:
        """Over the guest's control socket."""
        return ask(self.directory.guest_socket(name), question)

    def status(self, name: str) -> Any:
        """What the guest says of its work."""
        return self.ask(name, {"verb": "status"})

    def start(self, name: str, **parameters: object) -> Path:
        """Begin the workload histories; where it writes down what it sees.

        Each has a seed of its own, or two would write the same values.
        """
        self._seed += 1
        seed = self._seed
        record = self.folder / f"{name}-{seed}.jsonl"
        everything = {"record": os.fspath(record), **parameters}
        question = {"verb": "run", "workload": "histories", "seed": seed, "parameters": everything}
        assert self.ask(name, question) == {"accepted": True}
        return record

    def finish(self, name: str) -> None:
        """Wait for the end of the workload."""
        wait_until(lambda: self.status(name)["state"] != "running", f"the work of {name}")
        assert self.status(name)["error"] is None

    def stop(self, name: str) -> int:
        """Stop a guest's process between two writes: in one the others would have to kill it."""
        pid = self.pid(name)
        number = ("red", "blue", "green").index(name)
        table = Reservations(f"{self.image}.reservations")
        try:
            for _ in range(100):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.02)
                if not table.writing(number):
                    return pid
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.02)
        finally:
            table.close()
        raise AssertionError(f"{name} was inside a write each time")

    def log(self, name: str) -> str:
        """What a process has logged."""
        return self.directory.log(name).read_text()

    def await_restart(self, count: int) -> None:
        """Wait until the hypervisor was started again so many times, and answers."""
        text = "event=hypervisor-restart"
        wait_until(lambda: self.log("supervisor").count(text) == count, text)
        wait_until(self._hypervisor_answers, "the hypervisor's answer")

    def _hypervisor_answers(self) -> bool:
        with contextlib.suppress(Disconnected):
            return "error" not in ask(self.directory.hypervisor_socket, {"verb": "ping"})
        return False

    def recovered(self, name: str) -> bool:
        """Whether another node has replayed what this one left."""
        others = {"red", "blue", "green"} - {name}
        return any(f"event=recovered node=node {name} " in self.log(other) for other in others)

    def await_log(self, name: str, text: str) -> None:
        """Wait until a process has logged something."""
        wait_until(lambda: text in self.log(name), f"{text!r} in the log of {name}")


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, folder: Path, cluster_name: str
) -> Iterator[SharedCluster]:
    """Up, and with the files of the workload made by red; afterwards down and sound.

    Its parameter is the mode of the jails.
    """
    tree = write_tree(folder / "tree", files=12)
    image = build_volume(str(tree), 2**20, "data", 3, folder / "made").path
    (folder / "cluster.toml").write_text(volume_toml(cluster_name, tree, image=image))
    jail = getattr(request, "param", "auto")
    done = tmem("up", "-d", "-f", "cluster.toml", "--jail", jail, cwd=folder)
    assert done.returncode == 0, done.stderr
    cluster = SharedCluster(folder, image)
    try:
        cluster.start("red", prepare=1, pages=40, operations=40)
        cluster.finish("red")
        yield cluster
    finally:
        tmem_here("down", cwd=folder)  # most tests have done it
    assert left_behind(folder, cluster_name) == []


def is_sound(image: Path) -> bool:
    """Whether our checker finds nothing but journals to replay."""
    device = FileDevice(image, read_only=True)
    try:
        return not [problem for problem in check_volume(device) if not problem.pending]
    finally:
        device.close()


def test_node_that_slept_past_its_death_wakes_fenced(cluster: SharedCluster, folder: Path) -> None:
    """It reads nothing old, writes nothing, ends with the code for it, and the others go on."""
    records = [cluster.start("red", operations=1_000_000, writes=0.5)]
    wait_until(lambda: cluster.status("red")["done"] > 20, "some work of red")
    red = cluster.stop("red")
    try:
        records += [cluster.start(name, operations=150) for name in ("blue", "green")]
        for name in ("blue", "green"):
            cluster.finish(name)
        assert cluster.recovered("red")
    finally:
        os.kill(red, signal.SIGCONT)
    cluster.await_log("supervisor", "event=guest-died guest=red")
    assert "exit_code=72" in cluster.log("supervisor"), cluster.log("red")

    assert "event=fenced node=node red (0)" in cluster.log("red")
    assert "event=bug" not in cluster.log("red")
    with pytest.raises(Disconnected):
        cluster.status("red")
    # What the others wrote over what red had open is what they read now.
    records.append(cluster.start("blue", operations=60, writes=0.0))
    cluster.finish("blue")
    assert check(_all_calls(folder), frozenset({"red"})) == []
    assert {path.stem for path in records} <= {path.stem for path in folder.glob("*.jsonl")}
    assert tmem("down", cwd=folder).returncode == 0
    assert is_sound(cluster.image)


def _calls(path: Path) -> list[Call]:
    return read_history(path.stem.partition("-")[0], path)


def _all_calls(folder: Path) -> list[Call]:
    return [call for path in folder.glob("*.jsonl") for call in _calls(path)]


def test_reads_of_other_files_go_on_while_a_node_is_silent(cluster: SharedCluster) -> None:
    """Until it is dead and recovered a survivor reads what it had nothing to do with; a writer of
    its files waits for the recovery."""
    quiet = {"folder": "/quiet", "pages": 4, "files": 2}
    cluster.start("green", prepare=1, operations=40, **quiet)
    cluster.finish("green")
    cluster.start("green", operations=1_000_000, writes=0.0, **quiet)
    cluster.start("red", operations=1_000_000, writes=1.0)
    wait_until(lambda: cluster.status("red")["done"] > 20, "some work of red")
    red = cluster.stop("red")
    # Blue writes each of red's files, so it meets a lock that red had.
    record = cluster.start("blue", operations=20, writes=1.0)
    time.sleep(0.4)
    assert not cluster.recovered("red")
    done = before = cluster.status("green")["done"]
    while not cluster.recovered("red"):
        time.sleep(0.02)
        if not cluster.recovered("red"):
            done = cluster.status("green")["done"]
    os.kill(red, signal.SIGKILL)
    cluster.finish("blue")

    assert done > before, "green did not read"
    assert sum(call.kind == "write" for call in _calls(record)) == 20
    assert cluster.ask("green", {"verb": "status"})["state"] == "running"
    assert tmem("down", cwd=cluster.folder).returncode == 0
    assert is_sound(cluster.image)


def test_killed_node_is_recovered_once_and_writers_go_on(cluster: SharedCluster) -> None:
    """Its process is known to be gone, so nobody waits for the dead time."""
    cluster.start("red", operations=1_000_000, writes=1.0)
    wait_until(lambda: cluster.status("red")["done"] > 20, "some work of red")
    os.kill(cluster.pid("red"), signal.SIGKILL)
    for name in ("blue", "green"):
        cluster.start(name, operations=40)
    for name in ("blue", "green"):
        cluster.finish(name)

    wait_until(lambda: cluster.recovered("red"), "the recovery of red")
    logs = cluster.log("blue") + cluster.log("green")
    assert logs.count("event=recovered node=node red (0)") == 1
    assert check(_all_calls(cluster.folder), frozenset({"red"})) == []
    assert tmem("down", cwd=cluster.folder).returncode == 0
    assert is_sound(cluster.image)


@pytest.mark.parametrize("cluster", ["off"], indirect=True)
def test_nodes_whose_disk_takes_no_writes_fence_themselves(
    cluster: SharedCluster, folder: Path
) -> None:
    """They live on, but from some place of the image on the kernel refuses what they write (EFBIG,
    by its limit on the size of files). Red still writes its heartbeat, but can't write back what
    it has under locks that others want; blue can't even do that. Green goes on alone. Without
    jails, since limits of another user's process take a capability that containers often lack."""
    layout = read_layout(cluster.image)
    heartbeat = layout.heartbeat_sector * SECTOR_BYTES
    cluster.start("red", operations=1_000_000, writes=0.5, syncs=0.3)
    wait_until(lambda: cluster.status("red")["done"] > 20, "some work of red")
    _limit(cluster.pid("red"), heartbeat + HEARTBEAT_BLOCKS * BLOCK_BYTES)
    for name in ("blue", "green"):
        cluster.start(name, operations=60, writes=0.5)
    for name in ("blue", "green"):
        cluster.finish(name)
    _fenced_for(cluster, "red", "it can't give up a lock (")

    _limit(cluster.pid("blue"), heartbeat)
    _fenced_for(cluster, "blue", "its heartbeat was not written in time")
    cluster.start("green", operations=60)
    cluster.finish("green")
    assert check(_all_calls(folder), frozenset({"red", "blue"})) == []
    assert tmem("down", cwd=folder).returncode == 0
    assert is_sound(cluster.image)


def _limit(pid: int, file_bytes: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))


def _fenced_for(cluster: SharedCluster, name: str, reason: str) -> None:
    """A guest ends for this reason, and another one replays its journal."""
    wait_until(lambda: _exit_code(cluster, name) is not None, f"the end of {name}")
    log = cluster.log(name)
    assert _exit_code(cluster, name) == "72", log
    assert "event=bug" not in log
    (why,) = re.findall(rf"event=fenced node=node {name} \(\d\) why=(.*)", log)
    assert why.startswith(reason)
    wait_until(lambda: cluster.recovered(name), f"the recovery of {name}")


def _exit_code(cluster: SharedCluster, name: str) -> str | None:
    found = re.search(rf"event=guest-died guest={name} exit_code=(\d+)", cluster.log("supervisor"))
    return found and found[1]


def _restarted_since(cluster: SharedCluster, restarts: int) -> bool:
    return cluster.log("supervisor").count("event=hypervisor-restart") > restarts


def test_hypervisor_is_killed_while_nodes_share(cluster: SharedCluster, folder: Path) -> None:
    """Flushes that it did not hear are owed; no page that it kept is old."""
    for name in ("red", "blue", "green"):
        cluster.start(name, operations=300, writes=0.4, pages=40)
    for restarts in (1, 2):
        os.kill(cluster.pid("hypervisor"), signal.SIGKILL)
        cluster.await_restart(restarts)
    for name in ("red", "blue", "green"):
        cluster.finish(name)
        assert cluster.status(name)["counters"]["mismatches"] == 0

    assert check(_all_calls(folder)) == []
