"""Meshes for a test: several nodes in this process on one hand-moved clock, nodes in processes of
their own, and raw peers that say what they like.

    with MeshBed(3, tmp_path) as bed:       # all links are up
        bed.nodes[0].mesh.send(1, b"hello")
        bed.settle(lambda: bed.nodes[1].messages == [(0, b"hello")])
        bed.advance(31.0)                   # time passes, nobody is polled meanwhile

Sockets are real in both; only in-process nodes have a clock that stands still.  A test that waits
for something that never comes fails after `PATIENCE_SECONDS` of real time.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from ipc.mesh.addresses import Address, TcpAddress, UnixAddress
from ipc.mesh.frames import Frame, FrameBuffer, Kind
from ipc.mesh.handshake import Greeting, Handshake, Identity
from ipc.mesh.link import Timing
from ipc.mesh.mesh import QUEUE_BYTES_MAX, Mesh
from tests.support.hypervisors import ROOT

PATIENCE_SECONDS = 20.0
KEY = b"a key for tests, 32 bytes long.."
CLUSTER = "testing"
NAMES = {0: "alpha", 1: "bravo", 2: "carol", 3: "delta"}
FAST = Timing(2_500_000_000, 250_000_000, 50_000_000, 1_000_000_000)
"""For processes: silence of 2.5 s is death."""


def eventually(condition: Callable[[], bool], step: Callable[[], None]) -> None:
    """Take steps until the condition holds; fails when it does not in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for never came"
        step()


def addresses(count: int, directory: Path, *, tcp: bool = False) -> dict[int, Address]:
    """An address for each node; TCP ports are free now, and given out by the kernel's order."""
    if not tcp:
        return {node: UnixAddress(f"{directory}/node{node}") for node in range(count)}
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
    return {node: TcpAddress("127.0.0.1", port) for node, port in enumerate(ports)}


class Clock:
    """Nanoseconds that pass when told to."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def __call__(self) -> int:
        return self.ns


class MeshNode:
    """A mesh and all that it has said."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.messages: list[tuple[int, bytes]] = []
        self.events: list[tuple[str, int]] = []
        mesh.received = lambda node, payload: self.messages.append((node, payload))
        mesh.up = lambda node: self.events.append(("up", node))
        mesh.down = lambda node: self.events.append(("down", node))


class MeshBed:
    """Nodes 0 to count-1 in this process, connected with each other."""

    def __init__(
        self,
        count: int,
        directory: Path,
        *,
        tcp: bool = False,
        timing: Timing | None = None,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        seed: int = 1,
    ) -> None:
        self.clock = Clock()
        self.random = random.Random(seed)
        self.timing = timing or Timing()
        self.addresses = addresses(count, directory, tcp=tcp)
        self._queue_bytes_max = queue_bytes_max
        self.nodes = {node: self.start(node) for node in range(count)}

    def start(
        self,
        node: int,
        *,
        key: bytes = KEY,
        cluster: str = CLUSTER,
        parameters: bytes = b"timing",
        at: Mapping[int, Address] | None = None,
    ) -> MeshNode:
        """A node, which is the bed's only if the caller puts it into `nodes`."""
        return MeshNode(
            Mesh(
                node,
                key,
                at or self.addresses,
                now_ns=self.clock,
                random_bytes=self.random.randbytes,
                cluster=cluster,
                parameters=parameters,
                timing=self.timing,
                names=NAMES,
                queue_bytes_max=self._queue_bytes_max,
            )
        )

    def stop(self, node: int) -> None:
        """The node's process has ended, as its peers see it."""
        self.nodes.pop(node).mesh.close()

    def poll(self) -> None:
        """Each node does what is ready."""
        for node in list(self.nodes.values()):
            node.mesh.poll()

    def settle(self, condition: Callable[[], bool]) -> None:
        """Poll until the condition holds; no time passes."""
        eventually(condition, self.poll)

    def rounds(self, count: int = 20) -> None:
        """Poll a while; for what must not happen."""
        for _ in range(count):
            self.poll()

    def advance(self, seconds: float, *, step: float | None = None) -> None:
        """Let time pass, in steps after each of which all are polled; without steps at once."""
        end_ns = self.clock.ns + round(seconds * 1e9)
        step_ns = round((step or seconds) * 1e9)
        while self.clock.ns < end_ns:
            self.clock.ns = min(end_ns, self.clock.ns + step_ns)
            self.rounds(3)

    def connected(self, *nodes: int) -> bool:
        """Whether these (or all) see each other."""
        among = set(nodes or self.nodes)
        return all(among - {node} <= self.nodes[node].mesh.up_nodes() for node in among)

    def connect(self, *nodes: int) -> None:
        """Poll until they are, letting time pass for those that try again."""

        def step() -> None:
            self.rounds(4)
            self.clock.ns += self.timing.reconnect_ns // 4

        eventually(lambda: self.connected(*nodes), step)

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.mesh.close()


class RawPeer:
    """A connection to a node that says whatever a test wants; it can also behave."""

    def __init__(self, address: Address) -> None:
        if isinstance(address, UnixAddress):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.socket.connect(address.path)
        else:
            self.socket = socket.create_connection(address)
        self.socket.setblocking(False)
        self.sent = bytearray()
        self.frames: list[Frame] = []
        self.closed = False
        self._buffer = FrameBuffer()

    def send(self, data: bytes) -> None:
        """Small enough to be taken whole."""
        self.sent += data
        try:
            self.socket.sendall(data)
        except OSError:
            self.closed = True

    def read(self) -> None:
        """Collect what has come."""
        try:
            chunk = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        self.closed = self.closed or not chunk
        self._buffer.feed(chunk)
        while (frame := self._buffer.take(1 << 20)) is not None:
            self.frames.append(frame)

    def refusal(self) -> str:
        """The text of the last frame, which is a refusal."""
        assert self.frames and self.frames[-1].kind is Kind.REFUSE, self.frames
        return self.frames[-1].untrusted_body.decode()

    def introduce(
        self,
        bed: MeshBed,
        node: int,
        peer: int,
        *,
        incarnation: bytes = bytes(16),
        nonce: bytes = bytes(32),
        key: bytes = KEY,
        until: Kind = Kind.KEEPALIVE,
    ) -> Handshake:
        """Shake hands as `node` until a frame of that kind has come; the handshake so far."""
        identity = Identity(node, CLUSTER, b"timing", incarnation)
        handshake = Handshake(identity, key, nonce, bed.addresses, peer=peer)
        self.send(handshake.hello())
        taken = 0

        def step() -> None:
            nonlocal taken
            bed.poll()
            self.read()
            for frame in self.frames[taken:]:
                taken += 1
                if frame.kind is Kind.ANSWER and until is not Kind.ANSWER:
                    self.send(handshake.receive(frame))

        eventually(lambda: self.closed or any(frame.kind is until for frame in self.frames), step)
        return handshake

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def greeting(node: int, peer: int, **changes: object) -> Greeting:
    """A greeting that would do, but for the changes."""
    good = Greeting(node, peer, CLUSTER, bytes(16), bytes(32), b"timing")
    return good._replace(**changes)  # type: ignore[arg-type]


class MeshProcess:
    """A node in a process of its own (`mesh_node`), which tells in lines what it sees."""

    def __init__(self, node: int, at: Sequence[str], timing: Timing = FAST) -> None:
        self.node = node
        self.lines: list[str] = []
        self._at = at
        self._timing = timing
        self._rest = b""
        self.start()

    def start(self) -> None:
        numbers = [str(value) for value in self._timing]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.mesh_node", str(self.node), *numbers, *self._at],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def tell(self, line: str) -> None:
        """`send NODE TEXT`, `cut NODE`, `heal NODE`, or `quit`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def read(self) -> None:
        """Collect the lines that have come, or wait a little for one."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], 0.02)[0]:
            *whole, self._rest = (
                self._rest + os.read(self.process.stdout.fileno(), 1 << 16)
            ).split(b"\n")
            self.lines += [line.decode() for line in whole]

    def expect(self, line: str) -> None:
        """Wait for this line; it and what came before it is done with."""
        eventually(lambda: line in self.lines, self.read)
        del self.lines[: self.lines.index(line) + 1]

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; `start` begins another one in its place."""
        self.process.kill()
        self.process.communicate()
        self._rest = b""
        self.lines.clear()
