"""A cluster whose guest red runs the probe of `tests.support.jailprobe`.

    python -m tests.support.jailedclusters FOLDER

prints its report as JSON, and how it goes when this process, of the same user and in no jail, looks
into the others: for tests of an ordinary user.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import posix_ipc

from ipc.attach import ATTACH_SOCKET
from ipc.codec import Record
from ipc.errors import Disconnected
from ipc.jail import Mode
from ipc.limits import HANDSHAKES_MAX
from tests.support.clusters import wait_until
from tests.support.jailprobe import outcome
from tests.t4_guest.worlds import make_image
from tools.cluster import Cluster, ClusterPlan, GuestPlan
from tools.control import ask
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory

MEMORY_BYTES = 1 << 20
SOURCE = "source.py"
ENCODING = "koi8-r"
"""Of a Python source on the guests' disks; it is a module, first looked for when it is needed."""


class JailedCluster:
    """A running cluster of red, who tries everything, and blue."""

    def __init__(self, folder: Path, cluster: Cluster, images: dict[str, Path]) -> None:
        self.folder = folder
        self.cluster = cluster
        self._images = images

    def pids(self) -> dict[str, int]:
        """Of guests and hypervisor, by name."""
        record = self.cluster.directory.read()
        assert record is not None
        guests = {guest.name: guest.pid for guest in record.guests if guest.pid is not None}
        return guests | {"hypervisor": int(self._ask_hypervisor({"verb": "ping"})["pid"])}

    def log(self, name: str) -> Path:
        """The log of somebody."""
        return self.cluster.directory.log(name)

    def stats(self) -> Record:
        """The hypervisor's figures."""
        return self._ask_hypervisor({"verb": "stats"})

    def administer(self, **question: object) -> Record:
        """A question to the hypervisor, whose answer is no error."""
        answer = self._ask_hypervisor(question)
        assert "error" not in answer, answer
        return answer

    def _ask_hypervisor(self, question: Record) -> Record:
        return ask(self.cluster.directory.hypervisor_socket, question)

    def restart_hypervisor(self) -> None:
        """SIGKILL, and wait until the next one listens."""
        restarts = self.cluster.restarts
        self.cluster.signal("hypervisor", signal.SIGKILL)

        def is_back() -> bool:
            self.cluster.watch()
            return self.cluster.restarts > restarts

        wait_until(is_back, "the hypervisor to be started again")
        log = self.log("blue")
        generation = f"generation={1 + self.cluster.restarts} resumed=True"
        wait_until(lambda: generation in log.read_text(), "the guests to be back")

    def lead_astray(self, bait: Path) -> bool:
        """Whether the hypervisor follows a link out of its run directory when it opens a file."""
        audit = self.log("audit")
        audit.unlink(missing_ok=True)
        audit.symlink_to(bait)
        # The file is opened at the first event of a hypervisor's life.
        self.restart_hypervisor()
        self.administer(verb="set", guest="red", weight=200)
        audit.unlink()
        return bait.exists()

    def crowd_the_door(self) -> bool:
        """Whether it is the same hypervisor that was there before many knocked at once."""
        before = self._ask_hypervisor({"verb": "ping"})

        def refused() -> bool:
            return int(self.stats()["audit"]["events"].get("refused", 0)) >= HANDSHAKES_MAX

        door = str(self.cluster.directory.door / ATTACH_SOCKET)
        with ExitStack() as crowd:
            for _ in range(2 * HANDSHAKES_MAX):
                knocking = crowd.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                knocking.connect(door)
            try:
                wait_until(refused, "the hypervisor to refuse whom it has no room for")
                return self._ask_hypervisor({"verb": "ping"}) == before
            except Disconnected:
                return False

    # --- red

    def ask(self, verb: str, **fields: object) -> Record:
        """A verb of red's control socket."""
        return self.cluster.ask_guest("red", {"verb": verb, **fields})

    def exec(self, *argv: str) -> bytes:
        """Standard output of a command that succeeds."""
        answer = self.ask("exec", argv=list(argv))
        assert answer["exit_code"] == 0, answer
        return bytes(answer["stdout"])

    def work(self, workload: str, **parameters: object) -> Record:
        """The status after a workload that succeeds."""
        return wait_for_work(self.cluster, "red", parameters, workload)

    def finish(self) -> Record:
        """The status when nothing is left to do."""
        return _finish(self.cluster, "red")

    def attempts(self) -> dict[str, Any]:
        """What the probe reports."""
        directory = self.cluster.directory
        pids = self.pids()
        queue = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_messages=1, max_message_size=8)
        try:
            with socket.create_server(("127.0.0.1", 0)) as outward, closing(queue):
                status = self.work(
                    "adversary",
                    sibling=pids["blue"],
                    hypervisor=pids["hypervisor"],
                    sibling_socket=str(directory.guest_socket("blue")),
                    image=str(self._images["blue"]),
                    disk_inode=self._images["red"].stat().st_ino,
                    folder=str(directory.path),
                    segment=(directory.path / "arena").read_text().strip(),
                    queue=queue.name,
                    port=outward.getsockname()[1],
                )
        finally:
            queue.unlink()
        return dict(status["report"])


def wait_for_work(
    cluster: Cluster, name: str, parameters: dict[str, object], workload: str = "adversary"
) -> Record:
    """The status of a guest after a workload that succeeds."""
    question = {"verb": "run", "workload": workload, "seed": 1, "parameters": parameters}
    assert cluster.ask_guest(name, question) == {"accepted": True}
    status = _finish(cluster, name)
    assert status["error"] is None, status
    return status


def _finish(cluster: Cluster, name: str) -> Record:
    deadline = time.monotonic() + 60
    while (status := cluster.ask_guest(name, {"verb": "status"}))["state"] == "running":
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    return status


@contextmanager
def jailed_cluster(folder: Path, mode: Mode) -> Iterator[JailedCluster]:
    """From start to stop."""
    folder.mkdir()
    tree = folder / "tree"
    tree.mkdir()
    (tree / SOURCE).write_text(f"# coding: {ENCODING}\nname = 'имя'\n", encoding=ENCODING)
    manifest = {SOURCE: hashlib.sha256((tree / SOURCE).read_bytes()).hexdigest()}
    (folder / "manifest").write_text(json.dumps(manifest))
    images = {name: make_image(folder / f"{name}.img", tree=tree) for name in ("red", "blue")}
    directory = ClusterDirectory(folder / "on")
    guests = [
        GuestPlan(name, MEMORY_BYTES, image, adversary="tests.support.jailprobe")
        for name, image in images.items()
    ]
    plan = ClusterPlan(f"jail-{os.getpid()}", guests, 2 << 20, jail=mode)
    with Interrupts() as interrupts, Cluster(plan, directory, interrupts) as cluster:
        yield JailedCluster(folder, cluster, images)


if __name__ == "__main__":
    with jailed_cluster(Path(sys.argv[1]), "auto") as running:
        told = {"report": running.attempts()}
        for name, pid in running.pids().items():
            told[name] = {
                "environ": outcome(Path(f"/proc/{pid}/environ").read_bytes),
                "stat": outcome(Path(f"/proc/{pid}/stat").read_bytes),
                "schedstat": outcome(Path(f"/proc/{pid}/schedstat").read_bytes),
                "statm": outcome(Path(f"/proc/{pid}/statm").read_bytes),
            }
        json.dump(told, sys.stdout)
