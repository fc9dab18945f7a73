"""A node of a volume that counts in the value block of one lock, as a program.

python -m tests.support.counting_node IMAGE FOLDER NUMBER SEED ROUNDS DIES_AT MEMBERS

With so many members in the cluster it begins. It writes one line of JSON to standard output when it
has the lock, when it is about to change the value, and before it lets go; in round DIES_AT it kills
itself with the lock in EX and the value changed. After the last round it says so and serves the
others until standard input ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from fs.cluster.config import Timing
from fs.dlm.messages import VALUE_BYTES
from fs.dlm.modes import Mode
from fs.ocfs2.locking import lock_name
from guests.kernel import GuestSpec, Kernel
from guests.node import Node, NodeSpec

NAMES = ("red", "blue", "green")
LOCK = lock_name(b"T", 0)
DEAD_THRESHOLD = 20
"""Four seconds, in which a busy machine gives it a turn. One that kills itself is seen at once."""
_IDLE_SECONDS = 0.002


def say(at: str, **facts: object) -> None:
    """One line, at once."""
    line = json.dumps({"at": at, "ns": time.monotonic_ns(), **facts}) + "\n"
    os.write(sys.stdout.fileno(), line.encode())


def count(node: Node, chance: Random, *, dies: bool) -> None:
    """Read the value; in EX give it the next one, or any new one when it is lost."""
    locks = node.locks
    mode = Mode.EX if dies or chance.random() < 0.5 else Mode.PR
    locks.acquire(LOCK, mode)
    block = locks.value(LOCK)
    value = None if block is None else int.from_bytes(block, "little")
    say("has", mode=mode.name, value=value)
    if mode == Mode.EX:
        value = chance.getrandbits(60) << 20 if value is None else value + 1
        say("sets", value=value)
        locks.set_value(LOCK, value.to_bytes(VALUE_BYTES, "little"))
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
    say("drops")
    locks.release(LOCK, mode)


def main() -> None:
    """All rounds, then until standard input ends."""
    image, folder = Path(sys.argv[1]), Path(sys.argv[2])
    number, seed, rounds, dies_at, members = map(int, sys.argv[3:])
    timing = replace(Timing.fast(), dead_threshold=DEAD_THRESHOLD)
    spec = NodeSpec("data", number, NAMES, bytes(32), timing)
    guest = GuestSpec(NAMES[number], image, 2**20, folder, attach=False, node=spec)
    kernel = Kernel(guest, clock_ns=time.time_ns, now_seconds=time.monotonic)
    node = kernel.node
    assert node is not None
    chance = Random(seed)
    while len(node.members) < members:
        select.select([node.mesh.fileno()], [], [], _IDLE_SECONDS)
        node.pump()
    for done in range(rounds):
        count(node, chance, dies=done == dies_at)
        node.pump()
        if chance.random() < 0.3:
            select.select([node.mesh.fileno()], [], [], _IDLE_SECONDS)
            node.pump()
    say("ends")
    while sys.stdin not in select.select([sys.stdin, node.mesh.fileno()], [], [], 0.02)[0]:
        node.pump()
    kernel.stop()


if __name__ == "__main__":
    main()
