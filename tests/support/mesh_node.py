"""One node of a mesh as a program: commands on standard input, news on standard output.

python -m tests.support.mesh_node NODE IDLE KEEPALIVE RECONNECT HANDSHAKE ADDRESS...

The mesh is one descriptor among others in this program's own poll loop.
"""

from __future__ import annotations

import os
import select
import sys
import time

from ipc.mesh.addresses import parse_address
from ipc.mesh.link import Timing
from ipc.mesh.mesh import Mesh
from tests.support.mesh import CLUSTER, KEY, NAMES


def main() -> None:
    """Until `quit`, or the end of standard input."""
    node = int(sys.argv[1])
    timing = Timing(*(int(text) for text in sys.argv[2:6]))
    mesh = Mesh(
        node,
        KEY,
        dict(enumerate(parse_address(text) for text in sys.argv[6:])),
        now_ns=time.monotonic_ns,
        random_bytes=os.urandom,
        cluster=CLUSTER,
        timing=timing,
        names=NAMES,
    )
    mesh.up = lambda peer: print("up", peer, flush=True)
    mesh.down = lambda peer: print("down", peer, flush=True)
    mesh.received = lambda peer, payload: print("got", peer, payload.decode(), flush=True)
    poll = select.poll()
    poll.register(mesh, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    rest = b""
    while True:
        deadline_ns = mesh.deadline_ns()
        wait_ms = None
        if deadline_ns is not None:
            wait_ms = max(0, (deadline_ns - time.monotonic_ns()) // 1_000_000 + 1)
        ready = dict(poll.poll(wait_ms))
        mesh.poll()
        if sys.stdin.fileno() not in ready:
            continue
        chunk = os.read(sys.stdin.fileno(), 4096)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            match line.decode().split(" ", 2):
                case ["send", peer, text]:
                    print("sent" if mesh.send(int(peer), text.encode()) else "not sent", flush=True)
                case ["cut", peer]:
                    mesh.cut(int(peer))
                case ["heal", peer]:
                    mesh.heal(int(peer))
                case _:
                    mesh.close()
                    return
        if not chunk:
            mesh.close()
            return


if __name__ == "__main__":
    main()
