"""The hypervisor's end of real queues, running the conformance suite's `serve`.

    python -m tests.t0_ipc.echo_server RUN_DIRECTORY CLUSTER [watch]

With `watch` it looks for the calls of ring guests for a while before it sleeps.

Much less than `hypervisor.server`, so that transport tests fail for the transport's reasons only.
It ends when its standard input does.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path
from time import perf_counter_ns

from ipc import attach
from ipc.abi import CONFIRM, CONFIRM_BYTES, CONFIRM_MAGIC, HELLO_BYTES
from ipc.mqueue import QueuePair
from ipc.names import Registry
from ipc.ring import RingPair, Rings
from ipc.window import create_window
from tests.t0_ipc.conformance import GENERATION, serve


class Echo:
    """Guests by the descriptors they are heard on."""

    def __init__(self, run_directory: Path, cluster: str, *, watches: bool) -> None:
        self.watches = watches
        self.rings: Rings[RingPair] = Rings(self.serve)
        self.registry = Registry(run_directory)
        self.cluster = cluster
        self.listener = attach.listen(run_directory)
        self.doors: dict[int, tuple[socket.socket, QueuePair]] = {}
        self.pairs: dict[int, QueuePair] = {}
        self.poll = select.epoll()
        self.poll.register(self.listener, select.EPOLLIN)
        self.poll.register(0, select.EPOLLIN)

    def run(self) -> None:
        print("ready", flush=True)
        while True:
            if self.rings.watched:
                self.rings.spin(16)
            for fd, _ in self.poll.poll(0 if self.rings.watched else None):
                if fd == 0:
                    return
                if fd == self.listener.fileno():
                    self.welcome()
                elif fd in self.pairs:
                    self.answer(self.pairs[fd])
                elif fd in self.doors:  # else the queue of a guest that left in this round
                    self.goodbye(fd)

    def welcome(self) -> None:
        door, _ = self.listener.accept()
        os.close(attach.identify(door).pidfd)
        hello = attach.decode_hello(door.recv(HELLO_BYTES))
        kind = RingPair if hello.ring else QueuePair
        pair = kind(self.cluster, self.registry, create_window(), os.urandom)
        attach.send_welcome(door, 0, GENERATION, pair, resumed=False)
        confirmation = door.recv(CONFIRM_BYTES)
        pair.forget_names()
        if confirmation == CONFIRM.pack(CONFIRM_MAGIC, 0):
            door.send(confirmation)
        self.doors[door.fileno()] = door, pair
        self.pairs[pair.fileno()] = pair
        self.poll.register(door, select.EPOLLIN)
        self.poll.register(pair, select.EPOLLIN)

    def answer(self, pair: QueuePair) -> None:
        rang_ns = perf_counter_ns()
        message = pair.receive()
        if message is not None:
            rang = isinstance(pair, RingPair) and not pair.came_by_queue
            self.serve(pair, message, 0)
            if self.watches and rang and isinstance(pair, RingPair):
                self.rings.watch(pair, pair, rang_ns)

    def serve(self, pair: QueuePair, message: bytes, _moment_ns: int) -> int:
        pair.send(serve(message, pair.window))
        return perf_counter_ns()

    def goodbye(self, fd: int) -> None:
        door, pair = self.doors.pop(fd)
        self.poll.unregister(door)
        self.poll.unregister(pair)
        del self.pairs[pair.fileno()]
        door.close()
        if isinstance(pair, RingPair):
            self.rings.forget(pair)
        pair.close()


if __name__ == "__main__":
    Echo(Path(sys.argv[1]), sys.argv[2], watches="watch" in sys.argv[3:]).run()
