"""A process that writes to a shared image as it is told on its standard input.

python -m tests.t3_fs.cluster.writer IMAGE NODE KEY. Each command is answered by one line:
  write BLOCK BYTE   `ok`, or `refused TEXT`
  before BLOCK BYTE  the same, but the process stops itself (SIGSTOP) before it checks
  inside BLOCK BYTE  the same, stopped between its check and its write; says `stopping` first
  flood BLOCK COUNT  writes 1, 2, 3 .. to COUNT blocks in turn until a write is refused
"""

from __future__ import annotations

import os
import signal
import sys

from fs.block.device import BLOCK_BYTES
from fs.block.shared import SharedDevice


def say(text: str) -> None:
    """One line to the test."""
    print(text, flush=True)


def stop_here() -> None:
    """As if the machine lost interest in us."""
    say("stopping")
    os.kill(os.getpid(), signal.SIGSTOP)


class Stopping(SharedDevice):
    """Can be stopped at the two places that matter."""

    where = ""

    def _guarded_write(self, view: memoryview, offset: int) -> None:
        if self.where == "before":
            stop_here()
        super()._guarded_write(view, offset)

    def _write_now(self, view: memoryview, offset: int) -> None:
        if self.where == "inside":
            stop_here()
        super()._write_now(view, offset)


def flood(device: SharedDevice, block: int, count: int) -> None:
    """Write without end."""
    say("flooding")
    number = 0
    while True:
        number += 1
        data = number.to_bytes(8, "little") * (BLOCK_BYTES // 8)
        device.write(block + number % count, 1, data)


def main() -> None:
    """Read commands until the end."""
    image, node, key = sys.argv[1:]
    device = Stopping(image, int(node), int(key))
    say("ready")
    for line in sys.stdin:
        command, first, second = line.split()
        try:
            if command == "flood":
                flood(device, int(first), int(second))
            device.where = command
            device.write(int(first), 1, bytes([int(second)]) * BLOCK_BYTES)
            say("ok")
        except OSError as reason:
            say(f"refused {reason.strerror}")


if __name__ == "__main__":
    main()
