"""The hypervisor's end of real queues, running the conformance suite's `serve`.

    python -m tests.t0_ipc.echo_server RUN_DIRECTORY CLUSTER

Much less than `hypervisor.server`, so that transport tests fail for the transport's reasons only.
It ends when its standard input does.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path

from ipc import attach
from ipc.abi import CONFIRM, CONFIRM_BYTES, CONFIRM_MAGIC, HELLO_BYTES
from ipc.mqueue import QueuePair
from ipc.names import Registry
from ipc.window import create_window
from tests.t0_ipc.conformance import GENERATION, serve


class Echo:
    """Guests by the descriptors they are heard on."""

    def __init__(self, run_directory: Path, cluster: str) -> None:
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
            for fd, _ in self.poll.poll():
                if fd == 0:
                    return
                if fd == self.listener.fileno():
                    self.welcome()
                elif fd in self.pairs:
                    self.answer(self.pairs[fd])
                else:
                    self.goodbye(fd)

    def welcome(self) -> None:
        door, _ = self.listener.accept()
        os.close(attach.identify(door).pidfd)
        attach.decode_hello(door.recv(HELLO_BYTES))
        pair = QueuePair(self.cluster, self.registry, create_window(), os.urandom)
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
        message = pair.receive()
        if message is not None:
            pair.send(serve(message, pair.window))

    def goodbye(self, fd: int) -> None:
        door, pair = self.doors.pop(fd)
        self.poll.unregister(door)
        self.poll.unregister(pair)
        del self.pairs[pair.fileno()]
        door.close()
        pair.close()


if __name__ == "__main__":
    Echo(Path(sys.argv[1]), sys.argv[2]).run()
