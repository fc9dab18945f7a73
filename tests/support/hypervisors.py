"""A real hypervisor process for a test, and raw guests for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypervisor.server import FAULTS_MAX
from ipc import attach
from ipc.abi import REQUEST, Op, Reply, oid_from_int, pool_flag_word
from ipc.attach import CONTROL_SOCKET
from ipc.codec import receive_record, send_record
from ipc.mqueue import QueueChannel
from ipc.names import Registry
from ipc.wire import decode_reply

_PROGRAM = """
import sys
from pathlib import Path
from hypervisor.boot import HypervisorSpec, run
cluster, directory, arena_bytes, eviction, supervisor, transport, faults_max = sys.argv[1:]
supervisor_pid = int(supervisor) or None
run(
    HypervisorSpec(
        cluster,
        Path(directory),
        int(arena_bytes),
        eviction,
        supervisor_pid=supervisor_pid,
        transport=transport,
        faults_max=int(faults_max),
    )
)
"""
ROOT = Path(__file__).parents[2]


class RunningHypervisor:
    """A hypervisor process on `run_directory`; it can be killed and started again."""

    def __init__(
        self,
        cluster: str,
        run_directory: Path,
        arena_bytes: int,
        eviction: str = "clock",
        transport: str = "auto",
        faults_max: int = FAULTS_MAX,
    ) -> None:
        self.cluster = cluster
        self.run_directory = run_directory
        self.arena_bytes = arena_bytes
        self.eviction = eviction
        self.transport = transport
        self.faults_max = faults_max
        self.supervisor_pid = 0
        self.process: subprocess.Popen[str]
        self._tokens: dict[str, bytes] = {}

    def start(self) -> None:
        arguments = [
            self.cluster,
            os.fspath(self.run_directory),
            str(self.arena_bytes),
            self.eviction,
            str(self.supervisor_pid),
            self.transport,
            str(self.faults_max),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=20)
        return self.process.returncode

    def enrol(self, name: str) -> bytes:
        token = self._tokens.setdefault(name, os.urandom(32))
        attach.enrol(self.run_directory, name, token, os.getuid())
        return token

    def token(self, name: str) -> bytes:
        """Of a guest that was enrolled."""
        return self._tokens[name]

    def attach(self, name: str, *, ring: bool | None = None) -> RawGuest:
        """A guest in this process; without `ring` it asks for what the machine allows."""
        token = self.enrol(name)
        return RawGuest(attach.connect(self.run_directory, name, token, ring=ring))

    def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        """A verb on the control socket."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(os.fspath(self.run_directory / CONTROL_SOCKET))
            send_record(connection, {"verb": verb, **fields})
            record = receive_record(connection)
        assert record is not None
        return record


class RawGuest:
    """A channel and the two lines it takes to make a call."""

    def __init__(self, channel: QueueChannel) -> None:
        self.channel = channel
        self.sequence = 0

    def call(
        self, op: Op, pool: int = 0, oid: int = 0, index: int = 0, count: int = 0, slot: int = 0
    ) -> Reply:
        self.sequence += 1
        request = REQUEST.pack(
            self.sequence, op, 0, count, pool, index, oid_from_int(oid), slot, 0, 0
        )
        return decode_reply(self.channel.call(request))

    def new_pool(self, *, persist: bool) -> int:
        return self.call(Op.NEW_POOL, pool_flag_word(persist=persist)).value

    def detach(self) -> None:
        attach.detach(self.channel)


@contextmanager
def running_hypervisor(
    cluster: str,
    run_directory: Path,
    arena_bytes: int = 4 << 20,
    eviction: str = "clock",
    transport: str = "auto",
    faults_max: int = FAULTS_MAX,
) -> Iterator[RunningHypervisor]:
    """Start one, and leave nothing behind whatever happened."""
    hypervisor = RunningHypervisor(
        cluster, run_directory, arena_bytes, eviction, transport, faults_max
    )
    hypervisor.start()
    try:
        yield hypervisor
    finally:
        if hypervisor.process.poll() is None:
            hypervisor.kill()
        elif hypervisor.process.stderr is not None:
            hypervisor.process.stderr.close()
        Registry(run_directory).clean()
